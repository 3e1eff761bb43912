"""Files that other programs wrote, and another program's reading."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from frames import (
    WRAPPINGS,
    ethernet,
    ipv4,
    pcap,
    tcp,
    write,
)
from helpers import SeededPath, analyzed, traffic

wireshark = pytest.mark.skipif(
    not all(map(shutil.which, ("tshark", "editcap", "text2pcap")))
    and os.environ.get("NETWEAVER_REQUIRE_LAB") != "1",
    reason="tshark is not installed",
)


def by_tshark(pif: str, vif: str) -> tuple[dict[str, int], list[float]]:
    """Return counts and delays in microseconds.

    From tshark's fields joined by a few plain lines.
    """

    def rows(path: str) -> list[tuple[int, tuple[str, ...]]]:
        fields = [
            "frame.time_epoch",
            "ip.src",
            "ip.dst",
            "ip.id",
            "ipv6.src",
            "ipv6.dst",
            "tcp.srcport",
            "tcp.seq_raw",
            "tcp.ack_raw",
            "tcp.flags",
            "tcp.len",
            "udp.srcport",
            "udp.payload",
            "icmp.seq",
            "tcp.options",
        ]
        out = subprocess.run(
            [
                "tshark",
                "-n",
                "-r",
                path,
                "-o",
                "ip.defragment:FALSE",
                "-T",
                "fields",
                "-E",
                "occurrence=l",
                *(word for name in fields for word in ("-e", name)),
            ],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        found = []
        for line in out.splitlines():
            time, *rest = line.split("\t")
            seconds, _, fraction = time.partition(".")
            found.append((int(seconds) * 10**9 + int(fraction.ljust(9, "0")[:9]), tuple(rest)))
        return found

    sent: dict[tuple[str, ...], list[int]] = {}
    for time, key in rows(pif):
        sent.setdefault(key, []).append(time)
    copies: Counter[tuple[str, ...]] = Counter()
    counts, delays = Counter(pif=sum(map(len, sent.values()))), []
    for time, key in rows(vif):
        counts["vif"] += 1
        if key not in sent:
            counts["vif_only"] += 1
        elif copies[key] >= len(sent[key]):
            counts["duplicated"] += 1
        else:
            delays.append((time - sent[key][copies[key]]) / 1000)
        copies[key] += 1
    return counts, delays


@wireshark
@pytest.mark.parametrize(
    "convert",
    [
        ["-F", "pcap"],
        ["-F", "nsecpcap"],
        ["-F", "pcapng"],
        ["-F", "pcapng", "-T", "rawip", "-C", "14"],
        ["-F", "nsecpcap", "-T", "linux-sll", "-C", "14"],
    ],
    ids=" ".join,
)
def test_files_that_editcap_wrote(convert: list[str], tmp_path: Path) -> None:
    path = SeededPath(
        [item for item in traffic(800, 6) if item[1][0] >> 4 == 4 or "-C" not in convert], seed=7
    )
    files = []
    for name, packets in (("pif", path.pif), ("vif", path.vif)):
        prefix = bytes(14) + b"\x08\x00" if "linux-sll" in convert else b""
        records = [
            (time, bytes(14) + prefix + content if "-C" in convert else ethernet(content))
            for time, content in packets
        ]
        source = write(tmp_path / name, pcap(records))
        subprocess.run(
            ["editcap", *convert, source, f"{source}.out"], check=True, capture_output=True
        )
        files.append(f"{source}.out")
    document = analyzed("--pcaps", *files)
    if convert != ["-F", "pcap"]:
        path.check(document)
        return
    counts, delays = by_tshark(*files)  # which reads the same microseconds
    for name in ("pif", "vif", "duplicated", "vif_only"):
        assert document["packets"][name] == counts[name]
    assert document["packets"]["matched"] == len(delays) > 0
    assert document["average"] == pytest.approx(sum(delays) / len(delays), abs=1e-3)
    assert document["maximum"] == pytest.approx(max(delays), abs=1e-3)


@wireshark
@pytest.mark.parametrize("wrapping", ["plain", "QinQ", "VXLAN", "GRE"])
def test_tshark_reads_the_same(wrapping: str, tmp_path: Path) -> None:
    """The generator's frames are what they are meant to be.

    Tshark's innermost fields give the same counts.
    """
    path = SeededPath([item for item in traffic(600, 8) if item[1][0] >> 4 == 4], seed=9)
    pif = write(
        tmp_path / "pif", pcap([(time, WRAPPINGS[wrapping](content)) for time, content in path.pif])
    )
    vif = write(
        tmp_path / "vif", pcap([(time, WRAPPINGS[wrapping](content)) for time, content in path.vif])
    )
    counts, delays = by_tshark(pif, vif)
    assert (counts["pif"], counts["vif"], len(delays)) == (
        len(path.pif),
        len(path.vif),
        len(path.delays),
    )
    path.check(analyzed("--pcaps", pif, vif))


@wireshark
def test_a_file_that_text2pcap_wrote(tmp_path: Path) -> None:
    text = "".join(
        f"12:00:0{i}.5\n0000 {ethernet(ipv4(tcp(seq=i))).hex(' ')}\n\n" for i in range(5)
    )
    source = tmp_path / "text"
    source.write_text(text)
    subprocess.run(
        ["text2pcap", "-t", "%H:%M:%S.%f", str(source), str(tmp_path / "out")],
        check=True,
        capture_output=True,
    )
    shutil.copy(tmp_path / "out", tmp_path / "copy")
    document = analyzed("--pcaps", str(tmp_path / "out"), str(tmp_path / "copy"))
    assert document["packets"]["matched"] == 5
    assert document["maximum"] == 0
