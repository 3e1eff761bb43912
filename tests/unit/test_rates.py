"""The achieved rate of the probes, and warnings if they are too few or too many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from frames import ethernet, ipv4, pcap, tcp, udp
from helpers import T, analyzed, paired, save_runs

import netweaver
from netweaver import Traffic

# Saved runs have 600 packets, one each millisecond.
RATE = 1000


def analyzed_with(directory: Path, traffic: Traffic, **config: Any) -> dict[str, Any]:
    """Return the document of a saved run with this traffic."""
    config = {"sources": ["root@source"], "traffic": traffic.to_json(), **config}
    save_runs(directory, "web1", runs=1, **config)
    return analyzed("--pcaps", str(directory))


def rate_of(document: dict[str, Any]) -> Any:
    return document["config"]["traffic"]["achieved"]


@pytest.mark.parametrize(("asked", "warns"), [(1000, False), (1050, False), (1053, True)])
def test_a_rate_below_95_percent(tmp_path: Path, asked: int, warns: bool) -> None:
    document = analyzed_with(tmp_path, Traffic(rate=asked))
    assert rate_of(document) == RATE
    assert (
        any(f"less than 95 % of --rate {asked}" in warning for warning in document["warnings"])
        == warns
    )


def test_the_rate_of_each_of_two_sources(tmp_path: Path) -> None:
    document = analyzed_with(tmp_path, Traffic(rate=500), sources=["one", "two"])
    assert rate_of(document) == pytest.approx(RATE / 2, rel=0.01)
    assert document["warnings"] == []


def test_one_of_two_sources_is_selected(tmp_path: Path) -> None:
    """How much both have sent together is no measure of it."""
    traffic = Traffic(rate=RATE).to_json()
    sources = ["one", "two"]
    save_runs(tmp_path, "web1", runs=1, sources=sources, traffic=traffic, transmitted=1200)
    document = analyzed("--pcaps", str(tmp_path), "-s", "10.0.0.2")
    assert document["packets"]["matched"] == 600
    assert rate_of(document) is None
    assert document["warnings"] == []


def test_the_rate_is_unknown_if_a_source_failed_meanwhile(tmp_path: Path) -> None:
    document = analyzed_with(tmp_path, Traffic(rate=RATE), sources=["one", "two"], senders=0)
    assert rate_of(document) is None
    assert document["warnings"] == []


def test_the_rate_of_the_only_source_that_has_not_failed(tmp_path: Path) -> None:
    document = analyzed_with(tmp_path, Traffic(rate=RATE), sources=["one", "two"], senders=1)
    assert rate_of(document) == RATE
    assert document["warnings"] == []


@pytest.mark.parametrize(
    ("command", "warns"), [("iperf3 -c {destination}", False), ("send {interval}", True)]
)
def test_a_command_without_an_interval_was_asked_for_no_rate(
    tmp_path: Path, command: str, warns: bool
) -> None:
    document = analyzed_with(tmp_path, Traffic(rate=5000, command=command))
    assert any("less than 95 %" in warning for warning in document["warnings"]) == warns


def test_fragments_count_as_their_datagram(tmp_path: Path) -> None:
    traffic = Traffic(pattern="udp", rate=RATE, load="sh load.sh")
    save_runs(
        tmp_path,
        "web1",
        runs=1,
        sources=["root@source"],
        traffic=traffic.to_json(),
        duration=0.1,
        selection={"probes": [17, None]},
    )
    whole = udp(payload=bytes(40))
    for point, delay in (("pif", 0), ("vif", 5000)):
        records = []
        for number in range(100):
            time = T + number * 10**9 // RATE + delay
            records.append((time, ethernet(ipv4(whole[:24], 17, number, fragment=0x2000))))
            records.append((time + 1, ethernet(ipv4(whole[24:], 17, number, fragment=3))))
        [path] = tmp_path.glob(f"*/{point}*")
        path.write_bytes(pcap(records))
    document = analyzed("--pcaps", str(tmp_path))
    assert rate_of(document) == RATE
    assert document["warnings"] == []


def test_traffic_of_others_has_no_rate(tmp_path: Path) -> None:
    document = analyzed_with(tmp_path, Traffic(), sources=[])
    assert rate_of(document) is None


def test_a_source_that_is_fast_enough(tmp_path: Path) -> None:
    """Seven of each hundred packets don't reach the pif: the source has sent them all the same."""
    document = analyzed_with(tmp_path, Traffic(rate=1075), transmitted=645)
    assert rate_of(document) == RATE
    [warning] = document["warnings"]
    assert "only 600 of 645 packets sent reached the pif" in warning


def save_run_with_resets(directory: Path, reached: int, seen: int, **config: Any) -> None:
    """Save a run of SYNs, each with its RST, of which the first ones were seen on the vif."""
    traffic = Traffic("syn", RATE).to_json()
    save_runs(directory, "web1", runs=1, sources=["root@source"], traffic=traffic, **config)
    for point, count, delay in (("pif", reached, 0), ("vif", seen, 5000)):
        records = []
        for number in range(count):
            time = T + number * 10**6 + delay
            syn = tcp(sport=1024 + number, seq=number)
            reset = tcp(sport=1024 + number, seq=number + 1, flags=4)
            records.append((time, ethernet(ipv4(syn, ident=number))))
            records.append((time + 300_000, ethernet(ipv4(reset, ident=0))))
        [path] = directory.glob(f"*/{point}*")
        path.write_bytes(pcap(records))


def test_resets_under_way_are_nobodys_probes(tmp_path: Path) -> None:
    """Nobody knows how many of the packets under way at the end are RSTs."""
    times = {"start": T - 1000, "end": T + 10**8, "watched_until": T + 95 * 10**6 - 10**5}
    window = {name: netweaver.iso_time(time) for name, time in times.items()}
    save_run_with_resets(tmp_path, 100, 95, transmitted=100, window=window)
    document = analyzed("--pcaps", str(tmp_path))
    assert document["packets"]["matched"] == 190
    assert document["packets"]["undecided"] == 10
    assert not any("this run sent" in warning for warning in document["warnings"])


def test_a_filter_may_select_one_of_two_sources(tmp_path: Path) -> None:
    config: dict[str, Any] = {"sources": ["one", "two"], "filter": "src host one"}
    document = analyzed_with(tmp_path, Traffic(rate=RATE), **config)
    assert not any("less than 95 %" in warning for warning in document["warnings"])


def test_one_packet_more_than_the_seconds_allow(tmp_path: Path) -> None:
    """Each source sends its first packet at once."""
    traffic = Traffic(rate=1, load="sh load.sh")
    info = netweaver.RunInfo(traffic=traffic, sources=["one"], duration=5.06)
    probes = [(str(number), number * 10**9) for number in range(6)]
    result = paired(probes, [(name, time + 1000) for name, time in probes])
    assert netweaver.rate_warnings(result, info) == []


@pytest.mark.parametrize(("sent", "reached"), [(600, 300), (600, 270)])
def test_resets_do_not_stand_in_for_probes(tmp_path: Path, sent: int, reached: int) -> None:
    """The source's kernel rejects each answer of an open port, by the same way."""
    save_run_with_resets(tmp_path, reached, reached, transmitted=sent)
    document = analyzed("--pcaps", str(tmp_path))
    assert any(f"only {reached} of {sent} packets" in text for text in document["warnings"])
    assert rate_of(document) == pytest.approx(RATE, rel=0.01)


@pytest.mark.parametrize(("duration", "warns"), [(0.6, False), (0.55, False), (0.5, True)])
def test_more_probes_than_the_sources_can_have_sent(
    tmp_path: Path, duration: float, warns: bool
) -> None:
    traffic = Traffic(rate=RATE, load="sh load.sh")
    selection = {"probes": [6, None]}
    document = analyzed_with(tmp_path, traffic, duration=duration, selection=selection)
    assert any("--load" in warning for warning in document["warnings"]) == warns
