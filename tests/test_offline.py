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
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from frames import (
    ARP,
    ethernet,
    geneve,
    gre,
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
from helpers import SeededPath, T, analyzed, captures, distinct, failure, offline, paired, through, traffic
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab import NETWEAVER

import netweaver

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

    found, = netweaver.read({side: [netweaver.Capture(io.BytesIO(capture(packets, wrap)), side)]
                             for side, packets, wrap in zip(("pif", "vif"), (path.pif, path.vif), wraps)},
                            netweaver.Selection())
    result = netweaver.classify(netweaver.match(found))
    assert not result.ambiguous
    assert {rank: delay for rank, delay in enumerate(result.delays) if delay != netweaver.NO_DELAY} == path.delays
    assert (result.duplicated, result.second_only) == (path.duplicated, 0)
    assert netweaver.reordering(result) == path.extents


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("pv"), st.sampled_from("abcdefgh")), max_size=80))
def test_pairing_follows_its_definition(sightings: list[tuple[str, str]]) -> None:
    """Any sightings: the counts are exact, and there is a delay only where no copy is missing."""
    sides: dict[str, list[tuple[str, int]]] = {"p": [], "v": []}
    for time, (side, letter) in enumerate(sightings):
        sides[side].append((letter, time))
    found = paired(sides["p"], sides["v"])
    pif, vif = (Counter(key for key, _ in sides[side]) for side in "pv")
    assert found.matched == sum((pif & vif).values())
    assert found.lost == sum((pif - vif).values())
    assert found.duplicated == sum((vif - pif)[key] for key in pif)
    assert found.second_only == sum(vif[key] for key in vif.keys() - pif.keys())
    assert found.undecided == 0
    assert found.ambiguous == sum(min(pif[key], vif[key]) for key in pif if pif[key] > 1 and pif[key] != vif[key])
    assert found.first == len(sides["p"])
    assert found.second == len(sides["v"])
    for key in pif:
        sent, seen = ([time for other, time in sides[side] if other == key] for side in "pv")
        delays = [delay for (other, _), delay in zip(sides["p"], found.delays) if other == key]
        if len(sent) in (1, len(seen)) and seen:
            assert delays == [b - a for a, b in zip(sent, seen)]
        else:
            assert set(delays) == {netweaver.NO_DELAY}


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
    shutil.copy(tmp_path / "out", tmp_path / "copy")
    found = analyzed("--pcaps", str(tmp_path / "out"), str(tmp_path / "copy"))
    assert found["packets"]["matched"] == 5
    assert found["maximum"] == 0


# -- the command line --------------------------------------------------------------------------------------------

def test_it_needs_neither_network_nor_paramiko(tmp_path: Path) -> None:
    arguments = ["--pcaps", *captures(tmp_path, traffic(50), traffic(50))]
    code = ("import sys; sys.modules.update(paramiko=None, socket=None, ssl=None, asyncio=None); "
            "import netweaver; sys.exit(netweaver.main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False,
                          cwd=NETWEAVER.parent)
    assert done.returncode == 0, done.stderr


def test_selecting_by_address(tmp_path: Path) -> None:
    flows = [(T + i, ipv4(tcp(seq=i), source=f"10.0.0.{2 + i % 3}")) for i in range(90)]
    arguments = "--pcaps", *captures(tmp_path, flows, [(time + 5000, content) for time, content in flows])
    assert analyzed(*arguments)["packets"]["matched"] == 90
    assert analyzed(*arguments, "-s", "10.0.0.2")["packets"]["matched"] == 30
    assert analyzed(*arguments, "-s", "10.0.0.2", "-s", "root@10.0.0.3")["packets"]["matched"] == 60
    assert analyzed(*arguments, "-d", "10.0.0.1")["packets"]["matched"] == 90
    assert offline(*arguments, "-d", "10.0.0.2").returncode == 6
    assert offline(*arguments, "-d", "10.0.0").returncode == 2


def test_translated_addresses(tmp_path: Path) -> None:
    pif = [(T + i * 1000, ipv4(tcp(seq=i), destination="192.0.2.1")) for i in range(60)]
    vif = [(T + i * 1000 + 5, ipv4(tcp(seq=i), destination="10.0.0.1")) for i in range(60)]
    arguments = "--pcaps", *captures(tmp_path, pif, vif)
    done = offline(*arguments)
    assert done.returncode == 6
    assert "--match-nat" in done.stderr
    assert analyzed(*arguments, "--match-nat")["packets"]["matched"] == 60


def test_the_table_and_the_slowest(tmp_path: Path) -> None:
    pif = [(T + i * 1_000_000, ipv4(tcp(seq=i), ident=i)) for i in range(6)]
    pif.append((T + 6_000_000, pif[5][1]))
    pif += [(T + (7 + i) * 1_000_000, ipv4(tcp(seq=99), ident=99)) for i in range(2)]
    arrivals = ((0, 1001), (2, 2000), (1, 3_000_007), (3, -50), (3, 9))
    vif = [(T + 1_000_000 * i + delay, pif[i][1]) for i, delay in (*arrivals, (8, 5))]
    table = tmp_path / "table.csv"
    table.write_text("old")
    found = analyzed("--pcaps", *captures(tmp_path, pif, vif), "--csv", str(table), "--slowest", "2")
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 9
    assert [row["delay_us"] for row in rows] == ["1.001", "3000.007", "2.000", "-0.050", "", "", "", "", ""]
    assert [row["flags"] for row in rows] == ["", "reordered", "", "duplicated", *["lost"] * 3, *["ambiguous"] * 2]
    assert rows[1]["time"] == "2023-11-14T22:13:20.124456789Z"
    assert [rows[1][name] for name in ("source", "protocol", "sequence", "ip_id")] == ["10.0.0.2", "TCP", "1", "1"]
    assert table.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o22))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pif.pcap", "table.csv", "vif.pcap"]
    assert [(slow["delay"], slow["sequence"]) for slow in found["slowest"]] == [(3000.007, 1), (2.0, 2)]
    assert found["slowest"][0]["t_vif"] == "2023-11-14T22:13:20.127456796Z"
    assert found["negative"] == 1
    done = offline("--pcaps", *captures(tmp_path, pif, vif), "--csv", str(tmp_path / "none" / "table.csv"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "can't write" in done.stderr


@pytest.mark.parametrize(("change", "words"), [
    (lambda vif: [(vif[0][0] - 9000, vif[0][1]), *vif[1:]], "1 delays are negative (down to -8 "),
    (lambda vif: [(vif[0][0] - 1000, vif[0][1]), *vif[1:]], "1 delays are exactly 0"),
    (lambda vif: [*vif[:-1], (vif[-1][0] + 2 * 10**9, vif[-1][1])], "1 delays are longer than 1 s"),
    (lambda vif: vif[:40], "too few packets matched (40) for the percentiles 99, "),
    (lambda vif: [*vif[:100], *((time, ipv4(tcp(seq=9), ident=9, source="10.9.9.9")) for time, _ in vif[100:])],
     "most packets of each interface were not seen on the other"),
])
def test_what_speaks_against_the_numbers(change: Any, words: str, tmp_path: Path) -> None:
    pif = distinct(600)
    vif = through(pif, [1000] * 600)
    assert words in " ".join(analyzed("--pcaps", *captures(tmp_path, pif, change(vif)))["warnings"])
    assert analyzed("--pcaps", *captures(tmp_path, pif, vif))["warnings"] == []


# -- one stray, and packets that are alike --

def test_one_stray_delay_costs_nothing(tmp_path: Path) -> None:
    """All that matched counts, however long it took."""
    delays: list[int | None] = [2000] * 10_000
    delays[5000] = 4 * 10**9
    found = analyzed("--pcaps", *captures(tmp_path, distinct(10_000), through(distinct(10_000), delays)))
    assert found["packets"]["matched"] == 10_000
    assert found["maximum"] == 4e6
    assert found["median"] == 2


UDP6 = ipv6(udp(payload=b"same"), 17)                # without an id, and so all alike


def test_a_lost_one_of_packets_that_are_alike_shifts_no_other(tmp_path: Path) -> None:
    """Their number is known, but not which of them was lost."""
    pif = [(T + i * 2_000_000, UDP6) for i in range(1000)] + distinct(600, source="10.0.0.7")
    delays = [None if i in (300, 700) else 2_000_000 for i in range(1000)] + [2_000_000] * 600
    found = analyzed("--pcaps", *captures(tmp_path, sorted(pif), through(pif, delays)))
    assert (found["packets"]["matched"], found["packets"]["lost"], found["packets"]["ambiguous"]) == (1598, 2, 998)
    assert found["minimum"] == found["maximum"] == 2000
    assert found["loss_ratio"] == 2 / 1600
    assert any("998 matched packets share all that identifies them" in text and "make packets distinct" in text
               for text in found["warnings"])


def test_packets_that_are_alike_have_a_delay_if_none_is_missing(tmp_path: Path) -> None:
    pif = [(T + i * 2_000_000, UDP6) for i in range(1000)]
    found = analyzed("--pcaps", *captures(tmp_path, pif, through(pif, [2_500_000] * 1000)))
    assert (found["packets"]["matched"], found["packets"]["ambiguous"], found["median"]) == (1000, 0, 2500)
    assert found["warnings"] == []


def test_no_delay_that_is_certain_is_an_error(tmp_path: Path) -> None:
    pif = [(T + i * 2_000_000, UDP6) for i in range(100)]
    line = failure(offline("--pcaps", *captures(tmp_path, pif, through(pif, [None] + [2_000_000] * 99))), 6)
    assert "99 packets were seen on both interfaces, and no delay is certain" in line
    assert "to make packets distinct" in line


def test_sources_behind_a_translation_with_equal_packets(tmp_path: Path) -> None:
    """Two hping3 of the same second send the same; without addresses they can't be told apart."""
    pif = [(T + i * 1000, ipv4(tcp(seq=i // 2), ident=i // 2, source=f"192.0.2.{i % 2}")) for i in range(1200)]
    vif = [(T + i * 1000 + 500, ipv4(tcp(seq=i // 2), ident=i // 2, source="10.0.0.9")) for i in range(1200)]
    found = analyzed("--pcaps", *captures(tmp_path, pif, [*vif[:100], *vif[101:]]), "--match-nat")
    assert (found["packets"]["matched"], found["packets"]["lost"], found["packets"]["ambiguous"]) == (1199, 1, 1)
    assert found["minimum"] == found["maximum"] == 0.5


def test_packets_of_other_streams_overtake_nobody(tmp_path: Path) -> None:
    """RFC 4737 knows reordering within a stream alone; here one of three sources is slow."""
    pif = [(T + i * 1000, ipv4(tcp(seq=i), ident=i, source=f"10.0.0.{2 + i % 3}")) for i in range(900)]
    vif = through(pif, [50_000 if i % 3 else 90_000 for i in range(900)])
    assert analyzed("--pcaps", *captures(tmp_path, pif, vif))["packets"]["reordered"] == 0
    late = through(pif, [90_000 if i == 300 else 50_000 for i in range(900)])
    found = analyzed("--pcaps", *captures(tmp_path, pif, late))
    assert (found["packets"]["reordered"], found["reordering"]["maximum_extent"]) == (1, 13)


@pytest.mark.parametrize("flags", [0x18, 0x10, 0x11, 0x90])
def test_merged_segments_are_recognised(flags: int, tmp_path: Path) -> None:
    """What GRO makes of ten segments has the first one's number, and the last one's PSH or FIN."""
    def segment(i: int, size: int, more: int) -> bytes:
        return ipv4(tcp(80, 9000, i * 1000, 7, 0x10 | more, b"\1\1\x08\x0a" + bytes(8), bytes(size)), ident=i)

    pif = [(T + i * 10_000, segment(i, 10_000, flags) if i < 3000 else segment(i, 10, 0)) for i in range(0, 3040, 10)]
    vif = [(T + i * 10_000 + 5000, segment(i, 1000 if i < 3000 else 10, 0x18 if i % 10 == 9 else 0))
           for i in range(3040) if i < 3000 or i % 10 == 0]
    found = analyzed("--pcaps", *captures(tmp_path, pif, vif))
    assert (found["packets"]["lost"], found["packets"]["matched"]) == (300, 4)
    assert any("300 packets have another length" in text and "GRO, TSO" in text for text in found["warnings"])
    assert "--match-nat" not in " ".join(found["warnings"])


@pytest.mark.parametrize("coarse", ["pif", "vif"])
def test_stamps_of_two_precisions(coarse: str, tmp_path: Path) -> None:
    """No delay is negative by rounding, and a warning says so."""
    sides = {"pif": [(when, ethernet(content)) for when, content in distinct(600, 1_000_007)]}
    sides["vif"] = [(when + 200, frame) for when, frame in sides["pif"]]
    paths = [write(tmp_path / side, pcap(records, nanoseconds=side != coarse)) for side, records in sides.items()]
    found = analyzed("--pcaps", *paths)
    assert found["negative"] == 0
    assert set(map(float, (found["minimum"], found["maximum"]))) == {0, 1}
    units = {side: "microseconds" if side == coarse else "nanoseconds" for side in sides}
    assert any(f"of the pif are in {units['pif']}, and those of the vif in {units['vif']}" in text
               for text in found["warnings"])


def test_the_same_capture_on_both_sides(tmp_path: Path) -> None:
    pif, vif = captures(tmp_path, distinct(5), distinct(5))
    assert "is given for the pif and for the vif" in failure(offline("--pcaps", pif, pif), 2)
    link = tmp_path / "link"
    link.symlink_to(pif)
    assert "is given for the pif and for the vif" in failure(offline("--pcaps", pif, f"{vif},{link}"), 2)
    assert analyzed("--pcaps", f"{pif},{link}", vif)["packets"]["pif"] == 5


def test_swapped_captures(tmp_path: Path) -> None:
    pif, vif = captures(tmp_path, distinct(50), through(distinct(50), [1000] * 50))
    line = failure(offline("--pcaps", vif, pif), 6)
    assert "all 50 delays are negative (-1 to -1 µs): are pif and vif swapped?" in line


@pytest.mark.parametrize("port", [4789, 8472, 6081])
@pytest.mark.parametrize("payload", [bytes(64), b"\x08" * 64, b"\xff" * 64, b"\x08" + bytes(7), b"x"], ids=len)
def test_udp_to_a_tunnels_port_that_is_no_tunnel(port: int, payload: bytes, tmp_path: Path) -> None:
    packets = [(T + i * 1000, ipv4(udp(1024 + i, port, payload), 17, ident=i)) for i in range(100)]
    found = analyzed("--pcaps", *captures(tmp_path, packets, through(packets, [700] * 100)))
    assert (found["packets"]["matched"], found["capture"]["pif"]["other"]) == (100, 0)


@pytest.mark.parametrize("direction", ["in", "both"])
def test_a_tunnel_that_the_guest_terminates(direction: str, tmp_path: Path) -> None:
    """The innermost packet that has the addresses counts: here that is the tunnel's own."""
    def outer(i: int, source: str, destination: str) -> bytes:
        inner = ethernet(ipv4(tcp(seq=i), source="172.16.0.1", destination="172.16.0.2"))
        return ipv4(udp(*vxlan(inner)), 17, ident=i, source=source, destination=destination)

    inward = [(T + i * 1000, outer(i, "10.0.0.2", "10.0.0.1")) for i in range(100)]
    outward = [(T + i * 1000 + 300, outer(i, "10.0.0.1", "10.0.0.2")) for i in range(100)]
    vif = [*((when + 100, content) for when, content in inward), *((when - 50, content) for when, content in outward)]
    found = analyzed("--pcaps", *captures(tmp_path, sorted([*inward, *outward]), sorted(vif)), "-d", "10.0.0.1",
                     "--direction", direction)
    assert (found["packets"]["matched"], found["minimum"], found["maximum"]) == (100, 0.1, 0.1)
    if direction == "both":
        assert (found["outbound"]["packets"]["matched"], found["outbound"]["maximum"]) == (100, 0.05)


# -- pipes --

@pytest.mark.parametrize("direction", ["in", "out", "both"])
def test_captures_from_pipes(direction: str, tmp_path: Path) -> None:
    """One is standard input, the other a FIFO; one pass over each is enough in any direction."""
    inward, outward = distinct(300), distinct(300, source="10.0.0.1", destination="10.0.0.2")
    vif = sorted([*through(inward, [500] * 300), *through(outward, [-400] * 300)])
    paths = captures(tmp_path, sorted([*inward, *outward]), vif)
    plain = analyzed("--pcaps", *paths, "-d", "10.0.0.1", "--direction", direction)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = subprocess.Popen(["sh", "-c", 'cat "$0" >"$1"', paths[1], str(fifo)])
    with open(paths[0], "rb") as pif:
        done = subprocess.run([sys.executable, str(NETWEAVER), "--pcaps", "-", str(fifo), "-d", "10.0.0.1",
                               "--direction", direction], stdin=pif, capture_output=True, text=True, timeout=60,
                              check=False)
    assert writer.wait(10) == 0
    assert done.returncode == 0, done.stderr
    piped = json.loads(done.stdout)
    assert {**piped, "config": 0} == {**plain, "config": 0}
    assert piped["packets"]["matched"] == 300


def test_a_short_snap_length(tmp_path: Path) -> None:
    pif = [(T + i * 1000, ipv4(tcp(seq=i), ident=i)) for i in range(600)]
    done = offline("--pcaps", *captures(tmp_path, pif, through(pif, [500] * 600), snaplen=40))
    assert done.returncode == 6
    assert "600 packets were cut by the snap length" in done.stderr
    mixed = [*pif, (T + 10**9, ipv4(udp(payload=bytes(90)), 17))]
    found = analyzed("--pcaps", *captures(tmp_path, mixed, through(mixed, [500] * 601), snaplen=56))
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
                found = netweaver.read({side: [netweaver.Capture(io.BytesIO(data), side)]
                                        for side, data in (("pif", original), ("vif", mutant))},
                                       netweaver.Selection([netweaver.IN, netweaver.OUT], [], ["10.0.0.1"]))
                results = [netweaver.classify(netweaver.match(each)) for each in found]
                guest = netweaver.guest_times(results[0], results[1].matching)
                sides: dict[str, Any] = {"pif": {"records": 0}, "vif": {"records": 0}}
                json.dumps(netweaver.build_report(netweaver.Analysis(results, sides, [], guest),
                                                  {"pif": "a", "vif": "b", "direction": "both"}, sides, 3))
                netweaver.write_csv(results[0], "/dev/null")
                ends["report"] += 1
            except netweaver.NetWeaverError as error:
                ends[type(error).__name__] += 1
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert ends["report"] > 25
    assert ends["CaptureError"] > 25
