"""The kernel's trace: its pages, which packet an event belongs to.

And damaged or hostile traces.
"""

from __future__ import annotations

import os
import random
import re
import struct
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers import analyzed, offline
from kernelmodel import KernelModel
from kerneltrace import (
    CONSUMED,
    DROPPED,
    FORMATS,
    FORMATS_4_19,
    NETBACK,
    NFT,
    PAGE,
    QDISC,
    QUEUED,
    RECEIVED,
    SENT,
    TCP,
    SavedTrace,
    free_event,
    interface_event,
    page,
)

import netweaver

MILLISECOND = 1_000_000


def read(directory: Path, data: bytes, formats: str = FORMATS) -> netweaver.KernelTrace:
    """Return a trace with these pages of one processor."""
    (directory / "trace-cpu0").write_bytes(data)
    (directory / "trace-formats").write_text(formats)
    return netweaver.read_trace(directory=str(directory), vif="vif5.0", pifs=["eth0"])


def ordinary(run: SavedTrace, packet: int, start: int, processor: int = 0) -> None:
    """Add a packet that takes 1600 ns from pif to vif, with the kernel's events of it."""
    skb = 1000 + packet
    run.seen_at("pif", packet, start)
    run.received(processor, start + 400, skb)
    run.queued(processor, start + 1300, skb)
    run.seen_at("vif", packet, start + 1600)
    run.sent(processor, start + 1800, skb)


def with_others(run: SavedTrace) -> SavedTrace:
    """Add ordinary packets 10 ms before and after what the run has."""
    for packet, start in enumerate((-10, 10, 11, 12), 100):
        ordinary(run, packet, start * MILLISECOND)
    return run


def stage(report: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = report["stages"][name]
    return found


# -- reading --


def test_pages_of_linux_4_19(tmp_path: Path) -> None:
    """Freed packets have no reason, times are extended, and a page reports lost events."""
    records = [
        (1000, interface_event(RECEIVED, 7, "eth0", 46)),
        (1500, interface_event(QUEUED, 7, "vif5.0", 60)),
        (1900, interface_event(SENT, 7, "vif5.0", 60)),
        (5_000_000_000, free_event(DROPPED, 7, NETBACK)),
    ]
    lost = page([(6_000_000_000, free_event(DROPPED, 8, 1))], 6_000_000_000, 3 << 30)
    lost = lost[:48] + struct.pack("<Q", 41) + lost[56:]
    (length,) = struct.unpack_from("<I", lost, 8)
    assert length & 0xFFFFF == 36
    trace = read(tmp_path, page(records, 900) + lost[:52] + struct.pack("<Q", 41), FORMATS_4_19)
    [passage] = trace.passages[netweaver.IN]
    assert (passage.received, passage.queued, passage.sent) == (1000, 1500, 1900)
    assert (passage.received_size, passage.sent_size) == (46, 60)
    assert passage.freed == 5_000_000_000
    assert passage.end == netweaver.End(netweaver.EventKind.DROPPED, NETBACK, None)
    assert trace.lost == 41


def test_reasons(tmp_path: Path) -> None:
    records = [
        (1, interface_event(RECEIVED, 7, "eth0", 46)),
        (2, free_event(DROPPED, 7, NFT, 6)),
        (3, interface_event(RECEIVED, 8, "eth0", 46)),
        (4, free_event(CONSUMED, 8, TCP)),
    ]
    trace = read(tmp_path, page(records, 0))
    first, second = trace.passages[netweaver.IN]
    assert first.end == netweaver.End(netweaver.EventKind.DROPPED, NFT, "NETFILTER_DROP")
    assert second.end == netweaver.End(netweaver.EventKind.CONSUMED, TCP, None)
    assert trace.locations() == [NFT, TCP]


def test_damaged_pages(tmp_path: Path) -> None:
    chance = random.Random(1)
    records = [(1000 + i, interface_event(RECEIVED, i, "eth0", 46)) for i in range(80)]
    whole = page(records, 900)
    for _ in range(100):
        data = bytearray(whole * 2)
        for _ in range(chance.randrange(1, 200)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        trace = read(tmp_path, bytes(data[: chance.randrange(len(data))]))
        assert sum(map(len, trace.passages.values())) <= len(data) // 4


@pytest.mark.parametrize(
    "formats",
    [
        "",
        "name: x",
        "name: x\nID: 99999999999\n",
        "\0" * 1000,
        FORMATS.replace("skbaddr", "skb"),
        FORMATS.replace("offset:8;", "offset:99999;"),
    ],
)
def test_damaged_formats(tmp_path: Path, formats: str) -> None:
    data = page([(1000, interface_event(RECEIVED, 1, "eth0", 46))], 900)
    assert not read(tmp_path, data, formats).passages[netweaver.IN]


@pytest.mark.parametrize(
    "text",
    [
        "name: netif_receive_skb\nID: 1\n\tfield:" + "a" * 900_000,
        "name: kfree_skb\nID: 1\n" + '{ 1, "' * 150_000,
        "\tfield:" * 120_000,
        "name: " * 150_000,
        "name: x\n\tfield:" + "a[" * 450_000 + ";\toffset:",
    ],
)
def test_hostile_formats_are_read_in_linear_time(tmp_path: Path, text: str) -> None:
    begun = time.process_time()
    read(tmp_path, b"", text)
    assert time.process_time() - begun < 2


def test_many_tiny_records_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netweaver, "MOST_RECORDS", 10_000)
    run = with_others(SavedTrace())
    path = run.save(tmp_path / "run")
    tiny = struct.pack("<QQ", 0, PAGE - 16) + struct.pack("<II", 1, 0) * ((PAGE - 16) // 8)
    (tmp_path / "run" / "trace-cpu1").write_bytes(tiny * 1000)
    document = analyzed("--pcaps", path)
    assert document["packets"]["matched"] == 4
    assert any("10000 events" in warning for warning in document["warnings"])


def test_a_sparse_file_is_not_read_whole(tmp_path: Path) -> None:
    path = with_others(SavedTrace()).save(tmp_path / "run")
    with open(tmp_path / "run" / "trace-cpu1", "wb") as file:
        file.truncate(1 << 31)
    begun = time.process_time()
    document = analyzed("--pcaps", path)
    assert time.process_time() - begun < 5
    assert document["packets"]["matched"] == 4


def test_pipes_in_a_saved_run_are_ignored(tmp_path: Path) -> None:
    path = with_others(SavedTrace()).save(tmp_path / "run")
    os.mkfifo(tmp_path / "run" / "trace-cpu1")
    for name in ("formats", "stats", "offset", "symbols"):
        (tmp_path / "run" / f"trace-{name}").unlink()
        os.mkfifo(tmp_path / "run" / f"trace-{name}")
    document = analyzed("--pcaps", path)
    assert document["packets"]["matched"] == 4
    assert document["stages"] == {}


# -- the kernel's functions --


class TraceOfOneLoss(netweaver.KernelTrace):
    """A trace of a packet that was freed in a function of the kernel."""

    def locations(self) -> list[int]:
        return [0xFFFFFFFF81000010]


SYMBOLS = """ffffffff81000000 T _stext
ffffffff81000008 t nf_hook_slow
ffffffff81000020 T tcp_v4_rcv
"""


@pytest.mark.parametrize(
    ("symbols", "names"),
    [
        (SYMBOLS, {0xFFFFFFFF81000010: "nf_hook_slow"}),
        (re.sub("f{8}.{8}", "0" * 16, SYMBOLS), {}),
    ],
    ids=["shown", "hidden by kptr_restrict"],
)
def test_functions_by_address(tmp_path: Path, symbols: str, names: dict[int, str]) -> None:
    kallsyms = tmp_path / "kallsyms"
    kallsyms.write_text(symbols)

    def run(command: str, hint: str = "") -> str:
        command = command.replace("/proc/kallsyms", str(kallsyms))
        return subprocess.run(
            ["sh", "-c", command], stdout=subprocess.PIPE, text=True, check=True
        ).stdout

    trace = TraceOfOneLoss({}, {}, set(), 0, False, False, False)
    netweaver.fetch_symbols(run, str(tmp_path), trace)
    assert trace.symbols == names


# -- which packet an event belongs to --


def test_ordinary_packets(tmp_path: Path) -> None:
    run = SavedTrace()
    for packet in range(10):
        ordinary(run, packet, packet * MILLISECOND)
    document = analyzed("--pcaps", run.save(tmp_path / "run"))
    medians = {name: part["median"] for name, part in document["stages"].items()}
    assert medians == {"before_stack": 0.4, "forwarding": 0.9, "queueing": 0.5}
    assert document["config"]["stamp_error"] == {"pif": 0.4, "vif": 0.2}
    assert not [warning for warning in document["warnings"] if "stages" in warning]


def test_two_processors(tmp_path: Path) -> None:
    """The driver gets packet 0 only after packet 1 was seen on the vif."""
    run = SavedTrace()
    run.seen_at("pif", 0, 0)
    run.seen_at("pif", 1, 600)
    run.seen_at("vif", 0, 1600)
    run.seen_at("vif", 1, 1750)
    for processor, times in enumerate(((400, 1300, 1800), (1000, 1650, 2250))):
        skb = 10 + processor
        run.received(processor, times[0], skb)
        run.queued(processor, times[1], skb)
        run.sent(processor, times[2], skb)
    document = analyzed("--pcaps", with_others(run).save(tmp_path / "run"))
    assert stage(document, "queueing")["packets"] == 6
    assert stage(document, "queueing")["maximum"] == 0.6
    assert stage(document, "forwarding")["minimum"] == 0.65
    assert stage(document, "before_stack")["maximum"] == 0.4


def test_a_lost_event(tmp_path: Path) -> None:
    """The packet's reception isn't traced, but one of another packet much later."""
    run = SavedTrace()
    run.seen_at("pif", 0, 0)
    run.seen_at("vif", 0, 1600)
    run.queued(0, 1300, 10)
    run.sent(0, 1800, 10)
    run.received(0, 8 * MILLISECOND, 12)
    document = analyzed("--pcaps", with_others(run).save(tmp_path / "run"))
    assert stage(document, "before_stack")["packets"] == 4
    assert stage(document, "before_stack")["maximum"] == 0.4
    assert stage(document, "queueing")["packets"] == 5
    assert any("1 of 5 packets" in warning for warning in document["warnings"])


@pytest.mark.parametrize(("sent", "packets"), [(3000, 5), (8 * MILLISECOND, 4)])
def test_a_late_event_of_the_driver(tmp_path: Path, sent: int, packets: int) -> None:
    """If it's much too late, it's that of another packet, whose other events were lost."""
    run = SavedTrace()
    run.seen_at("pif", 0, 0)
    run.received(0, 400, 10)
    run.queued(0, 1300, 10)
    run.seen_at("vif", 0, 1600)
    run.sent(0, sent, 10)
    document = analyzed("--pcaps", with_others(run).save(tmp_path / "run"))
    assert document["packets"]["matched"] == 5
    assert stage(document, "queueing")["packets"] == packets
    assert stage(document, "queueing")["maximum"] < 10
    warned = any("1 of 5 packets" in warning for warning in document["warnings"])
    assert warned == (packets == 4)


def test_a_batch_with_a_packet_that_was_not_captured(tmp_path: Path) -> None:
    run = SavedTrace()
    run.seen_at("pif", 0, 100)
    run.received(0, 400, 12)
    run.consumed(0, 900, 12, TCP)
    run.received(0, 1000, 10)
    run.dropped(0, 1300, 10, NFT, 6)
    document = analyzed("--pcaps", with_others(run).save(tmp_path / "run"))
    [place] = document["lost_at"]
    assert place == {
        "stage": "forwarding",
        "where": "nft_do_chain",
        "reason": "NETFILTER_DROP",
        "packets": 1,
    }


def test_a_batch_with_two_causes_of_loss(tmp_path: Path) -> None:
    """It's unknown which of them the captured packet had."""
    run = SavedTrace()
    run.seen_at("pif", 0, 100)
    run.received(0, 400, 12)
    run.dropped(0, 900, 12, TCP, 2)
    run.received(0, 1000, 10)
    run.dropped(0, 1300, 10, NFT, 6)
    document = analyzed("--pcaps", with_others(run).save(tmp_path / "run"))
    assert document["packets"]["lost"] == 1
    assert document["lost_at"] == []
    assert any("1 of 5 packets" in warning for warning in document["warnings"])


def test_packets_of_another_size_are_no_candidates(tmp_path: Path) -> None:
    run = SavedTrace()
    run.seen_at("pif", 0, 100)
    run.received(0, 400, 12, size=1000)
    run.dropped(0, 900, 12, TCP, 2)
    run.received(0, 1000, 10)
    run.queued(0, 1200, 10)
    run.dropped(0, 1300, 10, QDISC, 51)
    document = analyzed("--pcaps", with_others(run).save(tmp_path / "run"))
    [place] = document["lost_at"]
    assert (place["stage"], place["reason"]) == ("queueing", "QDISC_DROP")


def test_netback_that_gives_packets_to_the_guest(tmp_path: Path) -> None:
    run = SavedTrace()
    run.backend = "netback"
    for packet in range(3):
        ordinary(run, packet, packet * MILLISECOND)
        end = packet * MILLISECOND + 4800
        run.dropped(1, end, 1000 + packet, NETBACK if packet else NFT)
    document = analyzed("--pcaps", run.save(tmp_path / "run"))
    assert document["after_vif"] == {"delivered": 2, "dropped": 1, "stuck": 0}
    assert stage(document, "to_guest")["median"] == 3.0
    [place] = document["lost_at"]
    assert (place["stage"], place["where"]) == ("to_guest", "nft_do_chain")
    assert any("never reached the guest" in warning for warning in document["warnings"])


# -- the shell commands that record a trace --


# Like uutils' dd: opens the file of its standard output by its name again, to overwrite it.
DD_OF_UUTILS = """#!/bin/sh
file=`readlink /proc/$$/fd/1`
case "$*" in
  *oflag=append*) exec /bin/dd "$@" >>"$file" ;;
  *conv=notrunc*) exec /bin/dd "$@" 1<>"$file" ;;
  *) exec /bin/dd "$@" >"$file" ;;
esac
"""
DD_OF_BUSYBOX = """#!/bin/sh
case "$*" in *nonblock*) echo "dd: invalid argument 'nonblock' to 'iflag'" >&2; exit 1 ;; esac
exec /bin/dd "$@"
"""


def run_shell(directory: Path, commands: str, dd: str = "") -> subprocess.CompletedProcess[str]:
    """Run commands that may call the functions of the trace in a directory, with another dd."""
    if dd:
        (directory / "dd").write_text(dd)
        (directory / "dd").chmod(0o755)
    environment = {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"}
    return subprocess.run(
        ["sh", "-c", f'{netweaver.TRACING}\neval "$tracing"\n{commands}'],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )


@pytest.mark.parametrize("dd", ["", DD_OF_UUTILS])
def test_each_drain_is_appended(tmp_path: Path, dd: str) -> None:
    for number in range(3):
        (tmp_path / f"from{number}").write_bytes(bytes([number]) * PAGE)
    done = run_shell(tmp_path, 'for i in 0 1 2; do copy "from$i" to 9; done', dd)
    assert done.returncode == 0
    assert (tmp_path / "to").read_bytes() == b"".join(bytes([n]) * PAGE for n in range(3))


def test_a_drain_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(bytes(5 * PAGE))
    run_shell(tmp_path, "copy from to 2")
    assert (tmp_path / "to").stat().st_size == 2 * PAGE


def test_a_dd_that_would_block(tmp_path: Path) -> None:
    done = run_shell(tmp_path, "start_trace 8192 1024 in vif5.0 eth0", DD_OF_BUSYBOX)
    status = netweaver.trace_status(done.stderr)
    assert status
    assert not status.running
    assert status.problem.startswith("dd: invalid argument 'nonblock' to 'iflag' (install")
    assert "kernel trace unavailable: dd: invalid argument" in status.warning


def test_status() -> None:
    assert netweaver.trace_status("1 listening on eth0\n") is None
    running = netweaver.trace_status("1 x\ntrace on vif cpu0 cpu1 ../x cpu77777\n2 y\n")
    assert running == netweaver.TraceStatus(True, "netback", ("cpu0", "cpu1"))
    other = netweaver.trace_status("trace on - cpu0\n")
    assert other == netweaver.TraceStatus(True, "", ("cpu0",))


@pytest.mark.parametrize(
    ("direction", "rate", "kib"),
    [("in", 1000, 8192), ("in", 100_000, 80_000), ("both", 100_000, 160_000)],
)
def test_size_of_the_buffers(direction: str, rate: int, kib: int) -> None:
    command = netweaver.trace_command(direction, "vif5.0", ["eth0", "eth1"], rate, None)
    assert command.endswith(f"\nstart_trace {kib} 131072 {direction} vif5.0 eth0 eth1")


def test_size_of_the_files() -> None:
    command = netweaver.trace_command("in", "vif5.0", ["eth0"], 1000, 40 << 20)
    assert command.endswith("start_trace 8192 10240 in vif5.0 eth0")


# -- a model of the kernel, of which the truth is known --


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, 0.9),
        ({"gap": 50_000}, 0.97),
        ({"foreign": 0.0}, 0.9),
        ({"batch": 1}, 0.9),
        ({"batch": 30}, 0.9),
        ({"processors": 4, "gap": 20_000}, 0.9),
        ({"slow_queue": True}, 0.9),
        ({"slow_queue": True, "processors": 4, "gap": 20_000}, 0.8),
        ({"lost_events": 0.001}, 0.9),
    ],
)
def test_events_of_equal_packets(options: dict[str, Any], share: float) -> None:
    """At most 0.1 % of packets get another one's stages, and none a negative one."""
    attached = wrong = packets = 0
    for seed in range(2):
        model = KernelModel(seed, **options)
        result = model.match()
        account = netweaver.account_for(result, model.trace(), "netback", 1)
        ranks, times = account.traced_packets()
        for row, rank in enumerate(ranks):
            found = [stage[row] for stage in list(times.values())[:3]]
            packet = result.identity(rank)[14:].decode()
            assert min(found) >= 0
            wrong += tuple(found) != model.truth.stages[packet]
        attached += len(ranks)
        packets += result.counts.matched
    assert wrong <= attached / 1000
    assert attached >= share * packets


@pytest.mark.parametrize("options", [{}, {"gap": 50_000}, {"slow_queue": True}])
def test_places_of_loss_of_equal_packets(options: dict[str, Any]) -> None:
    found: Counter[tuple[str, str]] = Counter()
    truth: Counter[tuple[str, str]] = Counter()
    for seed in range(2):
        model = KernelModel(seed, **options)
        account = netweaver.account_for(model.match(), model.trace(), "netback", 1)
        for place in account.losses:
            found[place.stage, place.where] += place.packets
        truth += model.truth.losses
    assert (found - truth).total() <= truth.total() / 100
    assert found.total() >= 0.75 * truth.total()


# -- the trace never costs the result --


class HostThatFails:
    """A host whose files can't be fetched."""

    def __init__(self, error: netweaver.NetWeaverError) -> None:
        self.error = error

    def fetch(self, files: Any, path: str, local: str, most: int) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        netweaver.CaptureError("hv: trace-cpu0 has more than 5 bytes"),
        netweaver.HostConnectionError("hv: no answer"),
    ],
)
def test_a_trace_that_cannot_be_fetched(tmp_path: Path, error: netweaver.NetWeaverError) -> None:
    host: Any = HostThatFails(error)
    files: Any = None
    warning = netweaver.fetch_trace(host, files, "/remote", str(tmp_path), ["cpu0"])
    assert "left out" in warning
    assert str(error) in warning
    trace = netweaver.read_trace(str(tmp_path), "vif5.0", ["eth0"])
    assert trace.devices == set()


@pytest.mark.parametrize(
    ("stats", "words"),
    [
        ("overrun: 3\ndropped events: 4\n", "lost 7 events"),
        ("dropped events: 0\nfull\n", "ended early"),
    ],
)
def test_events_that_are_missing(tmp_path: Path, stats: str, words: str) -> None:
    run = with_others(SavedTrace())
    run.stats = stats
    document = analyzed("--pcaps", run.save(tmp_path / "run"))
    [warning] = [warning for warning in document["warnings"] if "no known stages" in warning]
    assert words in warning


def test_place_of_loss_without_a_reason() -> None:
    """Linux before 5.17 gives no reason: the error names the function only."""
    for reason, words in ((None, "lost in nft_do_chain, "), ("NONE", "nft_do_chain (NONE), ")):
        place = netweaver.PlaceOfLoss("forwarding", "nft_do_chain", reason, 30)
        account = netweaver.TraceAccount(stages={}, stamp_errors={}, losses=[place])
        assert words in netweaver.main_loss(account)


def test_causes_of_an_empty_trace(tmp_path: Path) -> None:
    """Each of them is named, and it isn't the size of the buffers."""
    for packets, words in (
        ((), "trace is empty"),
        (("sent",), "no events from eth0"),
        (("received",), "no events from vif5.0"),
        (("received", "queued", "sent"), "no events match"),
    ):
        run = SavedTrace()
        for packet in range(3):
            run.seen_at("pif", packet, packet * MILLISECOND)
            run.seen_at("vif", packet, packet * MILLISECOND + 1600)
        if "received" in packets:
            run.received(0, 900_000_000, 1)
        if "sent" in packets:
            run.queued(0, 900_000_001, 1)
            run.sent(0, 900_000_002, 1)
        directory = tmp_path / "-".join(("run", *packets))
        document = analyzed("--pcaps", run.save(directory))
        [warning] = [text for text in document["warnings"] if "no known stages" in text]
        assert words in warning
        assert "buffer" not in warning


def test_the_table_says_where_the_last_stage_ends(tmp_path: Path) -> None:
    path = with_others(SavedTrace()).save(tmp_path / "run")
    shown = offline("--pcaps", path, "--format", "text").stdout
    assert "queueing ends after the vif's stamp" in shown
