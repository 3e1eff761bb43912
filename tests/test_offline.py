"""Analysis of capture files: against another program's reading, against a generator's truth, and against damage."""
from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from frames import (
    ARP,
    ethernet,
    geneve,
    gre,
    icmp,
    interface,
    ipv4,
    ipv6,
    mpls,
    packet,
    pcap,
    pcapng,
    tcp,
    udp,
    vxlan,
    write,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab import NETWEAVER

import netweaver

T = 1_700_000_000_123_456_789


def offline(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(NETWEAVER), *arguments], capture_output=True, text=True, check=False,
                          cwd=cwd, timeout=120)


def analyzed(*arguments: str) -> dict[str, Any]:
    done = offline(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def traffic(count: int, seed: int = 1) -> list[tuple[int, bytes]]:
    """A mixture of IP packets of many sizes, and their times."""
    chance = random.Random(seed)
    kinds: list[Callable[[int], bytes]] = [
        lambda i: ipv4(tcp(1024 + i % 60000, 0, chance.getrandbits(32)), ident=chance.getrandbits(16)),
        lambda i: ipv4(tcp(80, 9000, i, 7, 24, payload=bytes(chance.randrange(1400))), ident=i & 0xFFFF),
        lambda i: ipv4(udp(53, 9000, chance.randbytes(chance.randrange(1200))), 17, ident=i & 0xFFFF),
        lambda i: ipv4(icmp(8, 0, 77, i & 0xFFFF, bytes(56)), 1, ident=chance.getrandbits(16)),
        lambda i: ipv6(udp(53, 9000, chance.randbytes(16 + chance.randrange(1200))), 17),
        lambda i: ipv6(tcp(80, 9000, i, 7, 16, b"\1\1\x08\x0a" + i.to_bytes(8, "big"), bytes(100))),
    ]
    return [(T + i * 9973, chance.choice(kinds)(i)) for i in range(count)]


class SeededPath:
    """A path from pif to vif with seeded faults, and its truth."""

    def __init__(self, packets: list[tuple[int, bytes]], seed: int, loss: float = 0.03, duplicate: float = 0.02,
                 jitter: int = 60_000) -> None:
        chance = random.Random(seed)
        arrived = []
        self.delays: dict[int, int] = {}
        self.duplicated = 0
        for rank, (time, content) in enumerate(packets):
            if chance.random() < loss:
                continue
            self.delays[rank] = delay = chance.randrange(1000, 1000 + jitter)
            arrived.append((time + delay, rank, content))
            if chance.random() < duplicate:
                arrived.append((time + delay + 1 + chance.randrange(jitter), rank, content))
                self.duplicated += 1
        arrived.sort(key=lambda item: item[0])
        self.vif = [(time, content) for time, _, content in arrived]
        self.pif = packets
        firsts = list(dict.fromkeys(rank for _, rank, _ in arrived))
        self.extents = {}
        highest = -1
        for place, rank in enumerate(firsts):
            if rank < highest:
                self.extents[rank] = place - min(j for j in range(place) if firsts[j] > rank)
            highest = max(highest, rank)

    def check(self, found: dict[str, Any]) -> None:
        delays = numpy.array(list(self.delays.values())) / 1000
        assert found["packets"] == {
            "pif": len(self.pif), "vif": len(self.vif), "matched": len(delays), "lost": len(self.pif) - len(delays),
            "duplicated": self.duplicated, "reordered": len(self.extents), "vif_only": 0}
        assert found["loss_ratio"] == (len(self.pif) - len(delays)) / len(self.pif)
        assert found["reordering"] == {"ratio": len(self.extents) / len(delays),
                                       "maximum_extent": max(self.extents.values(), default=0)}
        steps = [abs(delay - self.delays[rank - 1]) / 1000 for rank, delay in self.delays.items()
                 if rank - 1 in self.delays]
        for name, value in (("average", delays.mean()), ("minimum", delays.min()), ("maximum", delays.max()),
                            ("stdev", delays.std()), ("median", numpy.median(delays)),
                            ("pdv", numpy.percentile(delays, 99) - delays.min())):
            assert found[name] == pytest.approx(value, abs=1e-3), name
        assert found["ipdv"] == (pytest.approx(numpy.mean(steps), abs=1e-3) if steps else None)
        for percent, value in found["percentiles"].items():
            assert value == pytest.approx(numpy.percentile(delays, float(percent)), abs=1e-3)


WRAPPINGS: dict[str, Callable[[bytes], bytes]] = {
    "plain": ethernet,
    "VLAN": lambda inner: ethernet(inner, tags=[(0x8100, 100)]),
    "QinQ": lambda inner: ethernet(inner, tags=[(0x88A8, 7), (0x8100, 100)]),
    "MPLS": lambda inner: ethernet(mpls(inner, 16, 17), 0x8847),
    "VXLAN": lambda inner: ethernet(ipv4(udp(*vxlan(ethernet(inner, pad=False))), 17)),
    "VXLAN over IPv6": lambda inner: ethernet(ipv6(udp(*vxlan(ethernet(inner, pad=False), 8472)), 17)),
    "Geneve": lambda inner: ethernet(ipv4(udp(*geneve(ethernet(inner, pad=False), options=bytes(8))), 17)),
    "GRE": lambda inner: ethernet(ipv4(gre(inner, 0x0800 if inner[0] >> 4 == 4 else 0x86DD, 0x2000), 47)),
    "IP in IP": lambda inner: ethernet(ipv4(inner, 4 if inner[0] >> 4 == 4 else 41)),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_an_encapsulated_pif_against_a_plain_vif(wrapping: str, tmp_path: Path) -> None:
    path = SeededPath(traffic(3000), seed=2)
    wrap = WRAPPINGS[wrapping]
    pif = write(tmp_path / "pif", pcap([(time, wrap(content)) for time, content in path.pif]))
    vif = write(tmp_path / "vif", pcap([(time, ethernet(content)) for time, content in path.vif], ">"))
    path.check(analyzed("--pcaps", pif, vif))


@pytest.mark.parametrize("count", [1, 31, 32, 33, 1000, 20_000])
def test_runs_of_equal_packets(count: int, tmp_path: Path) -> None:
    """What hping3 sends, which is read by columns; the last run ends with the file or in a chunk's middle."""
    packets = [(T + i * 1000, ipv4(tcp(i % 60000, 0, i * 2654435761 % 2**32), ident=i % 65521)) for i in range(count)]
    path = SeededPath(packets, seed=3, loss=0.01 if count > 32 else 0, jitter=5000)
    pif = write(tmp_path / "pif", pcap([(time, ethernet(content)) for time, content in path.pif]))
    vif = write(tmp_path / "vif", pcap([(time, content) for time, content in path.vif], linktype=101))
    path.check(analyzed("--pcaps", pif, vif))


def test_slaves_of_a_bond_are_merged_by_time(tmp_path: Path) -> None:
    path = SeededPath(traffic(2000), seed=4)
    chance = random.Random(5)
    slaves: list[list[tuple[int, bytes]]] = [[], [], []]
    for time, content in path.pif:
        chance.choice(slaves).append((time, ethernet(content)))
    pifs = ",".join(write(tmp_path / f"eth{i}", pcap(slave)) for i, slave in enumerate(slaves))
    vif = write(tmp_path / "vif,5.0", pcap([(time, ethernet(content)) for time, content in path.vif]))
    path.check(analyzed("--pcaps", pifs, vif))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_pair_gives_back_what_made_it(data: st.DataObject) -> None:
    """Any traffic with any loss, duplication, reordering, encapsulation and file format, in process."""
    chance = random.Random(data.draw(st.integers(0, 2**32)))
    path = SeededPath(traffic(data.draw(st.integers(1, 300)), chance.getrandbits(32)), chance.getrandbits(32),
                 data.draw(st.sampled_from([0, 0.03, 0.5])), data.draw(st.sampled_from([0, 0.1, 0.6])),
                 data.draw(st.sampled_from([10, 60_000, 10_000_000])))
    wraps = [WRAPPINGS[data.draw(st.sampled_from(sorted(WRAPPINGS)))] for _ in range(2)]
    noise = data.draw(st.booleans())

    def capture(packets: list[tuple[int, bytes]], wrap: Callable[[bytes], bytes]) -> Any:
        records = [(time, wrap(content)) for time, content in packets]
        if noise:
            records = [record for pair in records for record in (pair, (pair[0], ARP))[:1 + chance.randrange(2)]]
        order = chance.choice("<>")
        if data.draw(st.booleans()):
            return pcap(records, order)
        return pcapng(interface(1, 9, order=order), *(packet(0, *record, order) for record in records), order=order)

    pif, vif = [netweaver.Capture(io.BytesIO(capture(packets, wrap)), "x")
                for packets, wrap in zip((path.pif, path.vif), wraps)]
    matching = netweaver.match(pif, vif)
    assert not matching.alike
    assert {rank: delay for rank, delay in enumerate(matching.delays) if delay != netweaver.LOST} == path.delays
    assert (matching.duplicated, matching.second_only) == (path.duplicated, 0)
    assert netweaver.reordering(matching.arrivals) == path.extents


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("pv"), st.sampled_from("abcdefgh")), max_size=80), st.integers(1, 70))
def test_pairing_follows_its_definition(sightings: list[tuple[str, str]], size: int) -> None:
    """Any sightings, in blocks of any size: the counts are those of the definition."""
    sides: dict[str, list[tuple[bytes, int]]] = {"p": [], "v": []}
    for time, (side, letter) in enumerate(sightings):
        sides[side].append((letter.encode(), time))
    blocks = {side: [([key for key, _ in some[i:i + size]], array("q", [time for _, time in some[i:i + size]]))
                     for i in range(0, len(some), size)] for side, some in sides.items()}
    found = netweaver.match(blocks["p"], blocks["v"])
    pif, vif = (Counter(key for key, _ in sides[side]) for side in "pv")
    assert found.matched == sum((pif & vif).values())
    assert found.lost == sum((pif - vif).values())
    assert found.duplicated == sum((vif - pif)[key] for key in pif)
    assert found.second_only == sum(vif[key] for key in vif.keys() - pif.keys())
    assert len(found.alike) == sum(times for times in pif.values() if times > 1)
    for key in pif:
        sent, seen = ([time for other, time in sides[side] if other == key] for side in "pv")
        ranks = [rank for rank, identity in enumerate(found.identities) if identity == key]
        expected = [b - a for a, b in zip(sent, seen)] + [netweaver.LOST] * max(0, len(sent) - len(seen))
        assert [found.delays[rank] for rank in ranks] == expected


# -- other programs' files, and another program's reading ---------------------------------------------------------

wireshark = pytest.mark.skipif(not all(map(shutil.which, ("tshark", "editcap", "text2pcap"))) and
                               os.environ.get("NETWEAVER_REQUIRE_LAB") != "1", reason="tshark is not installed")


def by_tshark(pif: str, vif: str) -> tuple[dict[str, int], list[float]]:
    """Counts and delays in microseconds, from tshark's fields joined by a few plain lines."""
    def rows(path: str) -> list[tuple[int, tuple[str, ...]]]:
        fields = ["frame.time_epoch", "ip.src", "ip.dst", "ip.id", "ipv6.src", "ipv6.dst", "tcp.srcport", "tcp.seq_raw",
                  "tcp.ack_raw", "tcp.flags", "tcp.len", "udp.srcport", "udp.payload", "icmp.seq", "tcp.options"]
        out = subprocess.run(["tshark", "-n", "-r", path, "-o", "ip.defragment:FALSE", "-T", "fields", "-E",
                              "occurrence=l", *(word for name in fields for word in ("-e", name))], check=True,
                             capture_output=True, text=True).stdout
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
@pytest.mark.parametrize("convert", [
    ["-F", "pcap"], ["-F", "nsecpcap"], ["-F", "pcapng"], ["-F", "pcapng", "-T", "rawip", "-C", "14"],
    ["-F", "nsecpcap", "-T", "linux-sll", "-C", "14"]], ids=" ".join)
def test_files_that_editcap_wrote(convert: list[str], tmp_path: Path) -> None:
    path = SeededPath([item for item in traffic(800, 6) if item[1][0] >> 4 == 4 or "rawip" not in convert], seed=7)
    files = []
    for name, packets in (("pif", path.pif), ("vif", path.vif)):
        prefix = bytes(14) + b"\x08\x00" if "linux-sll" in convert else b""
        records = [(time, bytes(14) + prefix + content if "-C" in convert else ethernet(content))
                   for time, content in packets if not prefix or content[0] >> 4 == 4]
        source = write(tmp_path / name, pcap(records))
        subprocess.run(["editcap", *convert, source, f"{source}.out"], check=True, capture_output=True)
        files.append(f"{source}.out")
    counts, delays = by_tshark(*files)
    found = analyzed("--pcaps", *files)
    assert {name: found["packets"][name] for name in ("pif", "vif", "duplicated", "vif_only")} == {
        name: counts[name] for name in ("pif", "vif", "duplicated", "vif_only")}
    assert found["packets"]["matched"] == len(delays) > 0
    assert found["average"] == pytest.approx(sum(delays) / len(delays), abs=1e-3)
    assert found["maximum"] == pytest.approx(max(delays), abs=1e-3)


@wireshark
@pytest.mark.parametrize("wrapping", ["plain", "QinQ", "VXLAN", "GRE"])
def test_tshark_reads_the_same(wrapping: str, tmp_path: Path) -> None:
    """The generator's frames are what they are meant to be: tshark's innermost fields give the same counts."""
    path = SeededPath([item for item in traffic(600, 8) if item[1][0] >> 4 == 4], seed=9)
    pif = write(tmp_path / "pif", pcap([(time, WRAPPINGS[wrapping](content)) for time, content in path.pif]))
    vif = write(tmp_path / "vif", pcap([(time, WRAPPINGS[wrapping](content)) for time, content in path.vif]))
    counts, delays = by_tshark(pif, vif)
    assert (counts["pif"], counts["vif"], len(delays)) == (len(path.pif), len(path.vif), len(path.delays))
    path.check(analyzed("--pcaps", pif, vif))


@wireshark
def test_a_file_that_text2pcap_wrote(tmp_path: Path) -> None:
    text = "".join(f"12:00:0{i}.5\n0000 {ethernet(ipv4(tcp(seq=i))).hex(' ')}\n\n" for i in range(5))
    source = tmp_path / "text"
    source.write_text(text)
    subprocess.run(["text2pcap", "-t", "%H:%M:%S.%f", str(source), str(tmp_path / "out")], check=True,
                   capture_output=True)
    found = analyzed("--pcaps", str(tmp_path / "out"), str(tmp_path / "out"))
    assert found["packets"]["matched"] == 5
    assert found["maximum"] == 0


# -- the command line --------------------------------------------------------------------------------------------

def pair(tmp_path: Path, packets: list[tuple[int, bytes]], vif: list[tuple[int, bytes]], **options: Any) -> list[str]:
    return ["--pcaps", write(tmp_path / "pif.pcap", pcap([(time, ethernet(content)) for time, content in packets])),
            write(tmp_path / "vif.pcap", pcap([(time, ethernet(content)) for time, content in vif], **options))]


def test_it_needs_neither_network_nor_paramiko(tmp_path: Path) -> None:
    arguments = pair(tmp_path, traffic(50), traffic(50))
    code = ("import sys; sys.modules.update(paramiko=None, socket=None, ssl=None, asyncio=None); "
            "import netweaver; sys.exit(netweaver.main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False,
                          cwd=NETWEAVER.parent)
    assert done.returncode == 0, done.stderr


def test_selecting_by_address(tmp_path: Path) -> None:
    flows = [(T + i, ipv4(tcp(seq=i), source=f"10.0.0.{2 + i % 3}")) for i in range(90)]
    arguments = pair(tmp_path, flows, [(time + 5000, content) for time, content in flows])
    assert analyzed(*arguments)["packets"]["matched"] == 90
    assert analyzed(*arguments, "-s", "10.0.0.2")["packets"]["matched"] == 30
    assert analyzed(*arguments, "-s", "10.0.0.2", "-s", "root@10.0.0.3")["packets"]["matched"] == 60
    assert analyzed(*arguments, "-d", "10.0.0.1")["packets"]["matched"] == 90
    assert offline(*arguments, "-d", "10.0.0.2").returncode == 6
    assert offline(*arguments, "-d", "10.0.0").returncode == 2


def test_translated_addresses(tmp_path: Path) -> None:
    pif = [(T + i * 1000, ipv4(tcp(seq=i), destination="192.0.2.1")) for i in range(60)]
    vif = [(T + i * 1000 + 5, ipv4(tcp(seq=i), destination="10.0.0.1")) for i in range(60)]
    arguments = pair(tmp_path, pif, vif)
    done = offline(*arguments)
    assert done.returncode == 6
    assert "--match-nat" in done.stderr
    assert analyzed(*arguments, "--match-nat")["packets"]["matched"] == 60


def test_the_table_and_the_slowest(tmp_path: Path) -> None:
    pif = [(T + i * 1_000_000, ipv4(tcp(seq=i), ident=i)) for i in range(6)]
    pif.append((T + 6_000_000, pif[5][1]))
    arrivals = ((0, 1001), (2, 2000), (1, 3_000_007), (3, -50), (3, 9))
    vif = [(T + 1_000_000 * i + delay, pif[i][1]) for i, delay in arrivals]
    table = tmp_path / "table.csv"
    table.write_text("old")
    found = analyzed(*pair(tmp_path, pif, vif), "--csv", str(table), "--slowest", "2")
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 7
    assert [row["delay_us"] for row in rows] == ["1.001", "3000.007", "2.000", "-0.050", "", "", ""]
    assert [row["flags"] for row in rows] == ["", "reordered", "", "duplicated", "lost", "lost alike", "lost alike"]
    assert rows[1]["time"] == "2023-11-14T22:13:20.124456789Z"
    assert [rows[1][name] for name in ("source", "protocol", "sequence", "ip_id")] == ["10.0.0.2", "TCP", "1", "1"]
    assert table.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o22))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pif.pcap", "table.csv", "vif.pcap"]
    assert [(slow["delay"], slow["sequence"]) for slow in found["slowest"]] == [(3000.007, 1), (2.0, 2)]
    assert found["slowest"][0]["t_vif"] == "2023-11-14T22:13:20.127456796Z"
    assert found["negative"] == 1
    done = offline(*pair(tmp_path, pif, vif), "--csv", str(tmp_path / "none" / "table.csv"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "can't write" in done.stderr


@pytest.mark.parametrize(("change", "words"), [
    (lambda pif: [(time - 9000, content) for time, content in pif], "delays are negative"),
    (lambda pif: pif[:40], "too few packets matched (40) for the percentiles 99, 99.9"),
    (lambda pif: [*pif[:100], *((time, ipv4(tcp(seq=9), ident=9, source="10.9.9.9")) for time, _ in pif[100:])],
     "most packets of each interface were not seen on the other"),
    (lambda pif: [*pif[:599], (T, ipv4(tcp(seq=599, payload=b"x" * 50), ident=599))],
     "segments were merged or split (GRO"),
])
def test_what_speaks_against_the_numbers(change: Any, words: str, tmp_path: Path) -> None:
    pif = [(T + i * 1000, ipv4(tcp(seq=i), ident=i)) for i in range(600)]
    found = analyzed(*pair(tmp_path, pif, change(pif)))
    assert words in " ".join(found["warnings"])
    assert analyzed(*pair(tmp_path, pif, pif))["warnings"] == []


def test_what_can_not_be_told_apart_is_told(tmp_path: Path) -> None:
    pif = [(T + i * 1000, ipv4(tcp(seq=i // 2))) for i in range(600)]
    assert analyzed(*pair(tmp_path, pif, pif))["warnings"] == [
        "600 packets on the pif share all that identifies them with another one; they were paired in order of "
        "appearance, which is a guess where some are lost"]


def test_a_short_snap_length(tmp_path: Path) -> None:
    pif = [(T + i * 1000, ipv4(tcp(seq=i), ident=i)) for i in range(600)]
    done = offline(*pair(tmp_path, pif, pif, snaplen=40))
    assert done.returncode == 6
    assert "600 packets were cut by the snap length" in done.stderr
    mixed = [*pif, (T + 10**9, ipv4(udp(payload=bytes(90)), 17))]
    found = analyzed(*pair(tmp_path, mixed, mixed, snaplen=56))
    assert found["packets"]["matched"] == 600
    assert "vif: 1 packets were cut by the snap length" in found["warnings"][0]


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    good = write(tmp_path / "good", pcap([(T, ethernet(ipv4(tcp())))]))
    for name, data, words in (
            ("empty", b"", "too short for a capture file (it ends at byte 0)"),
            ("text", b"nothing to see here, really", "not a capture file (byte 0:"),
            ("huge", pcap([]) + bytes(8) + b"\xff" * 8, "impossible record length 4294967295 at byte 32")):
        done = offline("--pcaps", good, write(tmp_path / name, data))
        assert (done.returncode, done.stdout) == (5, "")
        assert done.stderr.startswith(f"netweaver: error: {tmp_path / name}: {words}")
        assert done.stderr.count("\n") == 1
    for path, words in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file or directory")):
        done = offline("--pcaps", good, str(path))
        assert (done.returncode, done.stdout) == (5, "")
        assert done.stderr == f"netweaver: error: {path}: can't read it: {words}\n"
    partial = write(tmp_path / "partial", pcap([(T, ethernet(ipv4(tcp())))] * 2)[:-1])
    assert "the last record of partial is not whole" in analyzed("--pcaps", good, partial)["warnings"][0]


# -- damage ------------------------------------------------------------------------------------------------------

def seeds() -> list[bytes]:
    packets = traffic(60, 11)
    records = [(time, WRAPPINGS[name](content)) for name in WRAPPINGS for time, content in packets[:20]]
    return [pcap(records), pcap(records, ">", False, snaplen=70),
            pcap([(T, ethernet(ipv4(tcp(seq=i)))) for i in range(99)]),
            pcapng(interface(1, 9), interface(101, 6), *(packet(i % 2, *record) for i, record in enumerate(records))),
            pcap([(time, content) for time, content in packets], linktype=101)]


def damaged(chance: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 5, 50])):
        where = chance.randrange(len(out)) if chance.random() < 0.5 else chance.randrange(min(200, len(out)))
        action = chance.randrange(5)
        if action == 0:
            out[where] = chance.randrange(256)
        elif action == 1:
            out[where:where + 4] = bytes.fromhex(chance.choice(
                ["00000000", "ffffffff", "01000000", "00000001", "7fffffff"]))
        elif action == 2:
            del out[where:where + chance.randrange(1, 40)]
        elif action == 3:
            out[where:where] = chance.randbytes(chance.randrange(1, 40))
        else:
            del out[max(1, where):]
        if not out:
            break
    return bytes(out)


@pytest.mark.parametrize("seed", range(5))
def test_damaged_files_yield_a_report_or_an_error(seed: int) -> None:
    """1,000 mutated files in all: nothing but a report or a NetWeaverError, in memory in proportion to the file."""
    chance = random.Random(seed)
    originals = seeds()
    ends: Counter[str] = Counter()
    tracemalloc.start()
    try:
        for _ in range(200):
            original = chance.choice(originals)
            mutant = damaged(chance, original)
            tracemalloc.reset_peak()
            try:
                matching = netweaver.match(netweaver.Capture(io.BytesIO(original), "a"),
                                           netweaver.Capture(io.BytesIO(mutant), "b"))
                report = netweaver.build_report(matching, {"pif": {"records": 0}, "vif": {"records": 0}}, [],
                                                {"pif": "a", "vif": "b"}, 3)
                json.dumps(report)
                list(netweaver.csv_rows(matching))
                netweaver.guest_times(matching, matching)
                ends["report"] += 1
            except netweaver.NetWeaverError as error:
                ends[type(error).__name__] += 1
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert ends["report"] > 25
    assert ends["CaptureError"] > 25
