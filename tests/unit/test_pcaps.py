"""Files that are given with --pcaps: pipes, damaged, cut and missing ones."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from frames import (
    WRAPPINGS,
    ethernet,
    interface,
    ipv4,
    packet,
    pcap,
    pcapng,
    tcp,
    udp,
    write,
)
from helpers import T, analyzed, captures, distinct, failure, offline, through, traffic
from laboratory import NETWEAVER

import netweaver


def test_files_are_analysed_without_paramiko(tmp_path: Path) -> None:
    arguments = ["--pcaps", *captures(tmp_path, traffic(50), traffic(50))]
    code = (
        "import sys; sys.modules.update(paramiko=None, matplotlib=None); "
        "import netweaver; sys.exit(netweaver.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=NETWEAVER.parent,
    )
    assert done.returncode == 0, done.stderr


def test_the_same_capture_on_both_sides(tmp_path: Path) -> None:
    pif, vif = captures(tmp_path, distinct(5), distinct(5))
    assert "is given for both the pif and the vif" in failure(offline("--pcaps", pif, pif), 2)
    link = tmp_path / "link"
    link.symlink_to(pif)
    assert "is given for both the pif and the vif" in failure(
        offline("--pcaps", pif, f"{vif},{link}"), 2
    )
    assert analyzed("--pcaps", f"{pif},{link}", vif)["packets"]["pif"] == 5


def test_captures_from_pipes(tmp_path: Path) -> None:
    """One is standard input, the other a FIFO; one pass over each is enough for both directions."""
    selection = ("-d", "10.0.0.1", "--direction", "both")
    inward, outward = distinct(300), distinct(300, source="10.0.0.1", destination="10.0.0.2")
    vif = sorted([*through(inward, [500] * 300), *through(outward, [-400] * 300)])
    paths = captures(tmp_path, sorted([*inward, *outward]), vif)
    plain = analyzed("--pcaps", *paths, *selection)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = subprocess.Popen(["sh", "-c", 'cat "$0" >"$1"', paths[1], str(fifo)])
    with open(paths[0], "rb") as pif:
        done = subprocess.run(
            [sys.executable, str(NETWEAVER), "--pcaps", "-", str(fifo), *selection],
            stdin=pif,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert writer.wait(10) == 0
    assert done.returncode == 0, done.stderr
    piped = json.loads(done.stdout)
    assert {**piped, "config": 0} == {**plain, "config": 0}
    assert piped["packets"]["matched"] == 300


def test_a_short_snap_length(tmp_path: Path) -> None:
    pif = [(T + i * 1000, ipv4(tcp(seq=i), ident=i)) for i in range(600)]
    done = offline("--pcaps", *captures(tmp_path, pif, through(pif, [500] * 600), snaplen=40))
    assert done.returncode == 6
    assert "too short to identify 600 packets" in done.stderr
    mixed = [*pif, (T + 10**9, ipv4(udp(payload=bytes(90)), 17))]
    document = analyzed(
        "--pcaps", *captures(tmp_path, mixed, through(mixed, [500] * 601), snaplen=56)
    )
    assert document["packets"]["matched"] == 600
    assert "too short to identify 1 packet," in document["warnings"][0]


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    good = write(tmp_path / "good", pcap([(T, ethernet(ipv4(tcp())))]))
    for name, data, words in (
        ("empty", b"", "too short for a capture file (it ends at byte 0)"),
        ("text", b"nothing to see here, really", "not a capture file (byte 0:"),
        (
            "huge",
            pcap([]) + bytes(8) + b"\xff" * 8,
            "impossible record length 4294967295 at byte 32",
        ),
    ):
        done = offline("--pcaps", good, write(tmp_path / name, data))
        assert (done.returncode, done.stdout) == (5, "")
        assert done.stderr.startswith(f"netweaver: error: {tmp_path / name}: {words}")
        assert done.stderr.count("\n") == 1
    for path, words in (
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "No such file or directory"),
    ):
        done = offline("--pcaps", good, str(path))
        assert (done.returncode, done.stdout) == (5, "")
        assert done.stderr == f"netweaver: error: {path}: can't read it: {words}\n"
    partial = write(tmp_path / "partial", pcap([(T, ethernet(ipv4(tcp())))] * 2)[:-1])
    assert (
        "the last record of partial is incomplete"
        in analyzed("--pcaps", good, partial)["warnings"][0]
    )


def seeds() -> list[bytes]:
    packets = traffic(5 * len(WRAPPINGS), 11)
    records = [
        (time, wrap(content))
        for index, wrap in enumerate(WRAPPINGS.values())
        for time, content in packets[5 * index : 5 * index + 5]
    ]
    return [
        pcap(records),
        pcap(records, ">", False, snaplen=70),
        pcap([(T, ethernet(ipv4(tcp(seq=i)))) for i in range(25)]),
        pcapng(
            interface(1, 9),
            interface(101, 6),
            *(packet(i % 2, *record) for i, record in enumerate(records)),
        ),
        pcap([(time, content) for time, content in packets], linktype=101),
    ]


def damaged(chance: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 5, 50])):
        where = (
            chance.randrange(len(out))
            if chance.random() < 0.5
            else chance.randrange(min(200, len(out)))
        )
        action = chance.randrange(5)
        if action == 0:
            out[where] = chance.randrange(256)
        elif action == 1:
            out[where : where + 4] = bytes.fromhex(
                chance.choice(["00000000", "ffffffff", "01000000", "00000001", "7fffffff"])
            )
        elif action == 2:
            del out[where : where + chance.randrange(1, 40)]
        elif action == 3:
            out[where:where] = chance.randbytes(chance.randrange(1, 40))
        else:
            del out[max(1, where) :]
        if not out:
            break
    return bytes(out)


@pytest.mark.parametrize("seed", range(5))
def test_damaged_files_yield_a_report_or_an_error(seed: int) -> None:
    """1,000 mutated files in all.

    Nothing but a report or a NetWeaverError, in memory in proportion to the file.
    """
    chance = random.Random(seed)
    originals = seeds()
    selection = netweaver.Selection(netweaver.DIRECTIONS["both"], [], ["10.0.0.1"])
    ends: Counter[str] = Counter()
    if seed == 0:  # it slows the others down
        tracemalloc.start()
    try:
        for _ in range(200):
            original = chance.choice(originals)
            mutant = damaged(chance, original)
            if seed == 0:
                tracemalloc.reset_peak()
            try:
                found = netweaver.collect(
                    {
                        side: [netweaver.Capture(io.BytesIO(data), side)]
                        for side, data in (("pif", original), ("vif", mutant))
                    },
                    selection,
                )
                results = [netweaver.match(each) for each in found]
                guest = netweaver.guest_times(results[0], results[1])
                sides: dict[str, Any] = {"pif": {"records": 0}, "vif": {"records": 0}}
                json.dumps(
                    netweaver.build_report(
                        netweaver.Analysis(results, sides, [], guest),
                        netweaver.RunInfo("a", "b", selection),
                        sides,
                    )
                )
                for _ in netweaver.csv_rows(results[0]):
                    pass
                ends["report"] += 1
            except netweaver.NetWeaverError as error:
                ends[type(error).__name__] += 1
            assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
    assert ends["report"] > 25
    assert ends["CaptureError"] > 25


@pytest.mark.parametrize("arguments", [("a,", "b"), ("a", ",b"), ("a", "b", "--baseline", "a,")])
def test_a_comma_too_many(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = offline("--pcaps", *arguments)
    assert "comma too many" in failure(done, 2)
