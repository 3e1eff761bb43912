"""The summary of a run, and the table of several, for people."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    analyzed,
    captures,
    distinct,
    failure,
    noisy,
    offline,
    pair,
    save_runs,
    through,
)

import netweaver


def counted(line: str) -> int:
    """Return the number of delays in a line of a histogram."""
    return int(re.split(r" (?:[mµn]?s) +", line)[1].split()[0])


def text(*arguments: str) -> list[str]:
    """Return the lines for people on a run that succeeds."""
    done = offline(*arguments, "--format", "text")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_summary(tmp_path: Path) -> None:
    delays = noisy(980, 1) + [None] * 10 + noisy(10, 2)
    lines = text("--pcaps", *pair(tmp_path, delays))
    assert lines[0] == "captures; pif pif.pcap, vif vif.pcap"
    assert re.match(r"Delay +median average +stdev", lines[1])
    assert re.match(r" in +\d+ µs +\d+ µs +[\d.]+ µs ", lines[2])
    assert " in       1000 on the pif, 990 matched, 10 lost (1 %)" in lines
    assert not any("--stages" in line for line in lines)
    bars = lines[lines.index("Distribution of the delay") + 1 :]
    assert len(bars) == netweaver.BINS + 1
    assert sum(map(counted, bars)) == 990


def test_a_summary_fits_a_terminal(tmp_path: Path) -> None:
    paths = pair(tmp_path, noisy(1000, 1, loss=0.1))
    lines = text("--pcaps", *paths, "-d", "10.0.0.1", "--direction", "both")
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert any(line.endswith(" maximum") for line in lines)  # wider lines would be cut off


@pytest.mark.parametrize(
    ("microseconds", "shown"),
    [
        (0.0004, "0 ns"),
        (0.25, "250 ns"),
        (1, "1 µs"),
        (12.345, "12.3 µs"),
        (999.4, "999 µs"),
        (1234, "1.23 ms"),
        (-1500, "-1.5 ms"),
        (2_500_000, "2.5 s"),
        (3.6e9, "3600 s"),
    ],
)
def test_durations(microseconds: float, shown: str) -> None:
    assert netweaver.duration_text(microseconds) == shown


@pytest.mark.parametrize(
    "delays",
    [
        [5],
        [5, 5, 5],
        [-3, 0, 4],
        list(range(1000)),
        [1] * 500 + [10**9],
        [-(10**9), 10**9],
        [10**i for i in range(9)],
    ],
)
def test_a_histogram_counts_each_delay_once(delays: list[int]) -> None:
    lines = netweaver.histogram(delays, fancy=False)
    assert 1 <= len(lines) <= netweaver.BINS + 1
    assert sum(map(counted, lines)) == len(delays)


def test_a_histogram_shows_the_shape_of_a_wide_distribution() -> None:
    """No bin holds most of a distribution that spans two decades."""
    delays = [round(1000 * 1.005**i) for i in range(1000)]
    shares = [counted(line) / len(delays) for line in netweaver.histogram(delays)]
    assert max(shares) < 0.15


def test_labels_of_a_narrow_histogram_differ() -> None:
    lines = netweaver.histogram([2_000_000 + i for i in range(1000)])
    labels = {line.strip().split("  ")[0] for line in lines}
    assert len(labels) == len(lines)


@pytest.mark.parametrize("char", ["\x1b", "\x07", "\x9b", "\u202e", "\udcff", "\n"])
def test_control_characters_are_escaped(char: str) -> None:
    shown = netweaver.printable(f"é{char}b")
    assert shown.isprintable()
    assert char not in shown
    assert shown.startswith("é")


def document(tmp_path: Path, **changes: object) -> dict[str, Any]:
    """Return the document on both directions of a run with stages and losses.

    Of which a part is made up.
    """
    inward = distinct(600)
    outward = distinct(600, source="10.0.0.1", destination="10.0.0.2")
    pif = sorted([*inward, *through(outward, [700_000] * 600)])
    vif = sorted([*through(inward, noisy(600, 1, loss=0.1)), *through(outward, [200_000] * 600)])
    paths = captures(tmp_path, pif, vif)
    document = analyzed("--pcaps", *paths, "-d", "10.0.0.1", "--direction", "both")
    names = ("average", "median", "minimum", "maximum", "stdev", "percentiles")
    stage = {**{name: document[name] for name in names}, "packets": 540}
    loss = {
        "stage": "forwarding",
        "where": "nft_do_chain",
        "reason": "NETFILTER_DROP",
        "packets": 9,
    }
    for part in (document, document["outbound"]):
        part["stages"] = dict.fromkeys(netweaver.STAGES, stage)
        part["lost_at"] = [{**loss, "packets": 9 - number} for number in range(5)]
    document["after_vif"] = {"delivered": 530, "dropped": 10, "stuck": 0}
    packets = {"answered": 540, "unanswered": 0, "ambiguous": 0}
    document["guest"] = {**stage, "packets": packets, "own": stage}
    counters = {"rx_dropped": 0, "tx_dropped": 3}
    queue = {"qdisc": "pfifo_fast", "queue_length": 32, "queues": 1, "before": counters}
    queue["after"] = {"rx_dropped": 0, "tx_dropped": 28}
    traffic = netweaver.Traffic("syn", 100).to_json()
    document["config"] |= {"name_label": "web1", "pif": "eth0", "vif": "vif5.0", "toolstack": "xe"}
    document["config"] |= {"platform": {"vif": queue}, "traffic": traffic, **changes}
    return document


def test_everything_at_once_fits_a_terminal(tmp_path: Path) -> None:
    report = document(tmp_path)
    lines = netweaver.summary(report, [])
    assert len(lines) <= 23
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("web1, syn-100 (100 packets a second); pif eth0, vif vif5.0")
    shown = "\n".join(lines)
    assert "9 lost in the firewall (NETFILTER_DROP): nft list ruleset" in shown
    assert "18 lost in 3 other places" in shown
    assert "after the vif's stamp" in shown
    assert "vif5.0: pfifo_fast, length 32, dropped 25 to the guest" in shown
    assert "--stages" not in shown
    assert "by tc" not in shown
    for part in (report, report["outbound"]):
        del part["stages"]
    lines = netweaver.summary(report, [1, 2, 3])
    assert " --stages shows where packets are lost" in lines
    assert any(line.endswith("0 from it (not by tc)") for line in lines)


@pytest.mark.parametrize(
    ("part", "pif", "reason", "command"),
    [
        ("in", "eth0", "TC_INGRESS", "tc -s filter show ingress dev eth0"),
        ("in", "eth0", "TC_EGRESS", "tc -s filter show egress dev vif5.0"),
        ("in", "eth0", "QDISC_DROP", "tc -s qdisc show dev vif5.0"),
        ("in", "eth0,eth1", "TC_INGRESS", "tc -s filter show ingress dev PIF"),
        ("out", "eth0", "TC_INGRESS", "tc -s filter show ingress dev vif5.0"),
        ("out", "eth0", "TC_EGRESS", "tc -s filter show egress dev eth0"),
        ("out", "eth0,eth1", "QDISC_DROP", "tc -s qdisc show dev PIF"),
    ],
)
def test_the_interface_where_packets_were_lost(
    tmp_path: Path, part: str, pif: str, reason: str, command: str
) -> None:
    report = document(tmp_path, pif=pif)
    loss = {"stage": "queueing", "where": "tcf_classify", "reason": reason, "packets": 9}
    losses = {"in": [], "out": [], part: [loss]}
    report["lost_at"] = losses["in"]
    report["outbound"]["lost_at"] = losses["out"]
    [line] = [line for line in netweaver.summary(report, []) if reason in line]
    assert line.endswith(command)


def test_a_queue_without_a_length(tmp_path: Path) -> None:
    """As `ip` shows that of a bridge's port with `noqueue`."""
    report = document(tmp_path)
    report["config"]["platform"]["vif"] |= {"qdisc": "noqueue", "queue_length": None}
    shown = "\n".join(netweaver.summary(report, []))
    assert "vif5.0: noqueue, dropped 25 to the guest" in shown


def test_a_table_of_two_vms(tmp_path: Path) -> None:
    """Each has rows and means of its own."""
    reports = []
    for number, (vm, vif) in enumerate([("web1", "vif5.0"), ("db1", "vif7.0")] * 2):
        directory = tmp_path / str(number)
        directory.mkdir()
        report = analyzed("--pcaps", *pair(directory, noisy(60, number, 1 + 9 * (vm == "db1"))))
        traffic = netweaver.Traffic("syn", 100).to_json()
        report["config"] |= {"name_label": vm, "pif": "eth0", "vif": vif, "traffic": traffic}
        reports.append(report)
    lines = netweaver.table(reports)
    [other] = [number for number, line in enumerate(lines) if line.startswith("db1; ")]
    assert lines[0].startswith("web1, db1, 4 runs")
    assert "vif7.0" in lines[other]
    means = [number for number, line in enumerate(lines) if "mean" in line]
    assert len(means) == 2
    assert means[0] < other < means[1]
    assert [line.split()[1] for line in lines[2:4]] == ["1", "3"]


@pytest.mark.parametrize(
    ("command", "rate"),
    [
        (None, "100/s"),
        ("hping3 -i u{interval} {destination}", "100/s"),
        ("hping3 --fast {destination}", ""),
    ],
)
def test_the_rate_of_a_command(command: str | None, rate: str) -> None:
    """Nobody knows it if the command has a rate of its own, and it wasn't measured."""
    info = netweaver.RunInfo(traffic=netweaver.Traffic("syn", 100, command=command))
    assert netweaver.rate_text(info) == rate


def test_nothing_is_cut_where_names_are_long(tmp_path: Path) -> None:
    vif = "tapf81d4fae-7de"
    report = document(tmp_path, name_label=f"instance-{'7' * 36}", pif="enp65s0f0np0", vif=vif)
    places = [
        ("forwarding", "__netif_receive_skb_core.constprop.0", "UNHANDLED_PROTO", 12345),
        ("queueing", "__dev_queue_xmit", "QDISC_OVERLIMIT", 120),
        ("before_stack", "ip_rcv_core", "NOT_SPECIFIED", 2),
    ]
    names = ("stage", "where", "reason", "packets")
    for part in (report, report["outbound"]):
        part["lost_at"] = [dict(zip(names, place)) for place in places]
    series = [{"median": 200.0 + run, "p99": 300.0, "loss_ratio": 0.0} for run in range(5)]
    report["comparison"] = {"path": "old", **netweaver.compare_runs(series, series[:1])}
    for lines in (netweaver.summary(report, []), netweaver.table([report, report])):
        assert max(map(len, lines)) <= 80
        words = " ".join(" ".join(lines).split())
        assert "12345 lost in forwarding (UNHANDLED_PROTO), at __netif_receive_skb_core" in words
        assert "dropped 25 to the guest, 0 from it" in words or "Traffic" in words
        assert "too few runs for a verdict" in words
    assert f"120 lost in the queue (QDISC_OVERLIMIT): tc -s qdisc show dev {vif}" in words
    assert "2 lost in before_stack, at ip_rcv_core in" in words
    report["stages"] = {**report["stages"], "queueing": {**report["guest"], "average": 1e9}}
    report["stages"]["queueing"]["packets"] = 1000
    lines = netweaver.summary(report, [])
    assert len(lines) <= 23
    assert lines[0].startswith("instance-777")
    assert sum("█" in line for line in lines) == 1


def test_the_histogram_leaves_room_for_the_warnings(tmp_path: Path) -> None:
    document = analyzed("--pcaps", *pair(tmp_path, noisy(1000, 1)))
    delays = list(range(1000))
    usual = netweaver.summary(document, delays)
    assert len(usual) + len(netweaver.summary({**document, "warnings": []}, delays)) == 2 * len(
        usual
    )
    document["warnings"] = ["x" * 200, "y" * 200, "z" * 200, "short"]
    assert len(netweaver.summary(document, delays)) <= 23 - 10


def test_a_long_heading_is_wrapped(tmp_path: Path) -> None:
    vm = "instance-f81d4fae-7dec-11d0-a765-00a0c91e6bf6"
    report = document(tmp_path, name_label=vm, pif="enp65s0f0np0,enp65s0f1np1", vif="vif123.0")
    first, second, *_ = netweaver.summary(report, [])
    assert f"{first}{second}".startswith(f"{vm}, syn-100 (100 packets a second); pif enp65s0f0np0")
    assert second.endswith("enp65s0f1np1, vif vif123.0 (found by xe)")


def test_a_table_of_runs(tmp_path: Path) -> None:
    report = document(tmp_path)
    interrupted = {**report, "interrupted": True}
    lines = netweaver.table([report, report, interrupted])
    assert lines[0] == "web1, 3 runs; pif eth0, vif vif5.0 (found by xe)"
    rows = [line.split() for line in lines]
    for run in ("1", "2", "3"):
        for direction in ("in", "out", "guest"):
            assert any(row[:3] == ["syn-100", run, direction] for row in rows)
        assert any(row[:3] == ["queueing", run, "in"] for row in rows)
    assert any(row[:3] == ["syn-100", "mean", "in"] for row in rows)
    assert any(row[:3] == ["syn-100", "s.d.", "guest"] for row in rows)
    assert " run 3 was interrupted" in lines
    rules = [line for line in lines if "firewall" in line]
    assert len(rules) == 30
    assert all(line.count("(") == line.count(")") for line in rules)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [
        (0, "0 %"),
        (0.5, "50 %"),
        (0.1234, "12.3 %"),
        (1.234e-3, "0.123 %"),
        (1.234e-4, "0.012 %"),
        (1.234e-5, "0.0012 %"),
        (9e-7, "<0.001 %"),
    ],
)
def test_a_small_loss_leaves_a_table_its_columns(ratio: float, shown: str, tmp_path: Path) -> None:
    report = {**document(tmp_path), "loss_ratio": ratio}
    row = netweaver.table([report, report])[2]
    assert row.split()[-2:] == shown.split()
    assert len(row) <= 80


@pytest.mark.parametrize("achieved", [None, 5900.4])
def test_the_achieved_rate_is_shown(achieved: float | None, tmp_path: Path) -> None:
    traffic = {**netweaver.Traffic("syn", 10_000).to_json(), "achieved": achieved}
    report = document(tmp_path, traffic=traffic)
    rate = "5900" if achieved else "10000"
    assert f"syn-10000 ({rate} packets a second)" in netweaver.summary(report, [])[0]
    row = netweaver.table([report, report])[2]
    assert ("5900/s" if achieved else "10000/s") in row


def test_a_difference_is_told_in_percentage_points(tmp_path: Path) -> None:
    report = document(tmp_path)
    before = [{"median": 200.0 + run, "p99": 300.0 + run, "loss_ratio": 0.0} for run in range(5)]
    now = [{"median": 300.0 + run, "p99": 400.0 - run, "loss_ratio": 0.02} for run in range(5)]
    report["comparison"] = {"path": "old", **netweaver.compare_runs(before, now)}
    lines = netweaver.comparison_lines(report, "web1 syn-100")
    assert lines[0] == "web1 syn-100 compared with old"
    assert lines[1].startswith(" significant difference: median is higher, p99 is higher (")
    report["comparison"] = {"path": "old", **netweaver.compare_runs(now, before)}
    assert "median is lower" in netweaver.comparison_lines(report, "web1")[1]
    assert any(line.startswith(" median  +100 µs (") for line in lines)
    assert any("+2 percentage points" in line for line in lines)


def test_a_wide_interval_fits_a_terminal(tmp_path: Path) -> None:
    report = document(tmp_path)
    before = [{"median": 217e3, "p99": 289e3, "loss_ratio": 0.0112 * run} for run in range(3)]
    now = [{"median": 282e3, "p99": 376e3, "loss_ratio": 0.0223 * run} for run in range(3)]
    report["comparison"] = {"path": "old", **netweaver.compare_runs(before, now)}
    *_, loss = netweaver.table([report])
    assert re.search(r" percentage points \(99 %: -[\d.]+ to \+[\d.]+\)$", loss)


def test_messages_name_their_runs(tmp_path: Path) -> None:
    save_runs(tmp_path, "web1-syn-100", runs=2)
    save_runs(tmp_path, "web1-udp-100", runs=1, traffic=netweaver.Traffic("udp", 100).to_json())
    done = offline("--pcaps", str(tmp_path), "--fail-if", "median>1us", "--fail-if", "p99.9>1s")
    assert done.returncode == 7
    lines = [line.removeprefix("netweaver: limit: ") for line in done.stderr.splitlines()]
    assert [line.partition(": median is ")[0] for line in lines] == [
        "web1 syn-100 run 1",
        "web1 udp-100 run 2",
        "web1 syn-100 run 3",
    ]


def test_an_equal_warning_of_several_runs_is_shown_once(tmp_path: Path) -> None:
    save_runs(tmp_path, "web1", runs=3, incidents=["something went wrong"])
    errors = offline("--pcaps", str(tmp_path)).stderr
    assert errors == "netweaver: warning: web1 syn-100 runs 1, 2, 3: something went wrong\n"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((), "web1 syn-100"),
        (("--traffic", "udp", "--runs", "2"), "web1 udp-100 run 1"),
        (("--source-command", "true"), "web1 command-100"),
    ],
)
def test_an_error_names_the_run(arguments: tuple[str, ...], name: str) -> None:
    hosts = ("--hv", "127.0.0.1:1", "-s", "127.0.0.1:1", "-d", "192.0.2.2")
    line = failure(offline("-n", "web1", *hosts, *arguments), 3)
    assert line.startswith(f"netweaver: error: {name}: root@127.0.0.1:1: ")


@pytest.mark.parametrize(
    ("arguments", "name", "words"),
    [
        (("-k", "/nowhere/key"), "web1 syn-100", "can't use the key /nowhere/key"),
        (("-d", "no.such.host.invalid"), "web1 syn-100", "-d: can't resolve"),
        (("--save", "/dev/null/runs"), "web1 syn-100", "can't save in /dev/null/runs"),
        (("--save", "/dev/null/runs", "--runs", "2"), "web1", "can't save in /dev/null/runs"),
        (("--traffic", "udp", "--keep", "3"), "web1 udp-100", "--keep requires --save"),
        (("--fail-if", "p99>1h"), "web1 syn-100", "p99>1h"),
        (("--baseline", "/nowhere"), "web1 syn-100", "--baseline /nowhere"),
        (("--output", "/nowhere/out"), "web1 syn-100", "can't write /nowhere/out"),
        (("--traffic", "sctp"), "web1", "argument --traffic"),
        (("--nonsense",), "web1", "unrecognized arguments"),
    ],
)
def test_an_error_before_any_connection_names_the_run(
    arguments: tuple[str, ...], name: str, words: str
) -> None:
    """As a mail from cron has nothing but the error."""
    hosts = ("--hv", "127.0.0.1:1", "-s", "127.0.0.1:1", "-d", "192.0.2.2")
    done = offline("-n", "web1", *hosts, *arguments)
    line = failure(done, done.returncode)
    assert line.startswith(f"netweaver: error: {name}: ")
    assert words in line
    assert line.count("web1") == 1


def test_an_error_of_an_output_names_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = document(tmp_path)
    monkeypatch.setattr(netweaver.NetWeaver, "measure", lambda weaver, traffic: report)
    monkeypatch.setattr(netweaver.NetWeaver, "results", [], raising=False)
    monkeypatch.setattr(netweaver.NetWeaver, "interrupted", False)
    hosts = ("--hv", "local", "-s", "local", "-d", "192.0.2.2")
    done = offline("-n", "web1", *hosts, "--direction", "both", "--output", "/dev/full")
    assert done.returncode == 2
    assert "netweaver: error: web1 syn-100: can't write /dev/full" in done.stderr


def test_the_error_of_a_saved_run_names_it(tmp_path: Path) -> None:
    save_runs(tmp_path, "web1", runs=2)
    *_, last = sorted(tmp_path.iterdir())
    (last / "vif.pcap").write_bytes((last / "vif.pcap").read_bytes()[:24])
    done = offline("--pcaps", str(tmp_path))
    assert done.returncode == 6
    assert f"netweaver: error: {last}: no packet was seen on both" in done.stderr
