"""Captures: what is read from a file, and what identifies a packet."""
from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from frames import (
    ARP,
    block,
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

import netweaver

T = 1_700_000_000_123_456_789


def sightings(data: bytes, **options: Any) -> tuple[list[bytes], list[int], netweaver.Capture]:
    """The identities and times of the packets of a file that count, and what was in it."""
    capture, other = netweaver.Capture(io.BytesIO(data), "test.pcap"), netweaver.Capture(io.BytesIO(pcap([])), "")
    found, = netweaver.read({"pif": [capture], "vif": [other]}, netweaver.Selection(**options))
    numbers, times = found.seen["pif"]
    keys = list(found.numbers)
    return [keys[number] for number in numbers], list(times), capture


def identity(frame: bytes, linktype: int = 1, **options: Any) -> bytes:
    keys, _, _ = sightings(pcap([(T, frame)], linktype=linktype), **options)
    assert len(keys) == 1
    return keys[0]


def described(frame: bytes) -> dict[str, Any]:
    return netweaver.describe(identity(frame))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("nanoseconds", [True, False])
@pytest.mark.parametrize("count", [1, 5, 3000, 9000])
def test_times_and_order(order: str, nanoseconds: bool, count: int) -> None:
    records = [(T + i * 1_000_003, ethernet(ipv4(tcp(seq=i), ident=i & 0xFFFF))) for i in range(count)]
    keys, times, capture = sightings(pcap(records, order, nanoseconds))
    unit = 1 if nanoseconds else 1000
    assert times == [time // unit * unit for time, _ in records]
    assert len(set(keys)) == count == capture.records
    assert capture.resolution == (10**9 if nanoseconds else 10**6)


def test_frames_of_any_mixture_equal_single_ones() -> None:
    """Alike ones are read by columns, the rest one by one: both must say the same."""
    head = b"\x08" + bytes(7)
    kinds: list[Callable[[int], bytes]] = [
        lambda i: ethernet(ipv4(tcp(seq=i), ident=i & 0xFFFF)),
        lambda i: ethernet(ipv4(udp(payload=i.to_bytes(4, "big") * (i % 40)), 17, ident=i & 0xFFFF)),
        lambda i: ethernet(ipv6(tcp(seq=i, flags=16, options=bytes(12)))),
        lambda i: ARP,
        lambda i: ethernet(ipv4(icmp(seq=i & 0xFFFF), 1, ident=i & 0xFFFF)),
        lambda i: ethernet(ipv4(udp(dport=4789, payload=head + ethernet(ipv4(tcp(seq=i)), pad=False)), 17)),
        lambda i: ethernet(ipv4(udp(dport=4789, payload=head + ARP), 17)),
        lambda i: ethernet(ipv4(bytes(60), 17, fragment=1 + i % 50, ident=i & 0xFFFF)),
    ]
    frames: list[bytes] = []
    for run, kind in zip(itertools.cycle((1, 40, 2, 700, 33, 31, 64)), kinds * 9):
        frames += [kind(len(frames) + i) for i in range(run)]
    keys, times, capture = sightings(pcap([(T + i, frame) for i, frame in enumerate(frames)]))
    expected: list[bytes] = []
    expected_times = []
    for i, frame in enumerate(frames):
        single, _, _ = sightings(pcap([(T, frame)]))
        expected += single
        expected_times += [T + i] * len(single)
    assert keys == expected
    assert times == expected_times
    assert capture.records == len(frames)
    assert capture.other == len(frames) - len(expected)


def same(frames: Iterable[bytes]) -> bool:
    return len({identity(frame) for frame in frames}) == 1


def test_what_may_change_on_the_way_is_no_part_of_the_identity() -> None:
    plain = ethernet(ipv4(tcp(seq=7)))
    other_checksums = bytearray(plain)
    other_checksums[24:26] = b"\1\2"
    other_checksums[50:52] = b"\3\4"
    other_macs = b"\4" * 12 + plain[12:]
    assert same([plain, ethernet(ipv4(tcp(seq=7), ttl=63, tos=0xB9)), bytes(other_checksums), other_macs,
                 ethernet(ipv4(tcp(seq=7)), tags=[(0x8100, 5)]), ethernet(ipv4(tcp(seq=7)), pad=False),
                 ethernet(ipv4(tcp(seq=7)), tags=[(0x88A8, 5), (0x8100, 4095)])])
    assert same([ethernet(ipv6(tcp())), ethernet(ipv6(tcp(), hop_limit=3))])


def test_what_tells_packets_apart() -> None:
    frames = [
        ethernet(ipv4(tcp(seq=7))),
        ethernet(ipv4(tcp(seq=8))),
        ethernet(ipv4(tcp(seq=7), ident=2)),
        ethernet(ipv4(tcp(seq=7), source="10.0.0.3")),
        ethernet(ipv4(tcp(seq=7), destination="10.0.0.3")),
        ethernet(ipv4(tcp(seq=7, sport=1025))),
        ethernet(ipv4(tcp(seq=7, dport=81))),
        ethernet(ipv4(tcp(seq=7, ack=1))),
        ethernet(ipv4(tcp(seq=7, flags=16))),
        ethernet(ipv4(tcp(seq=7, payload=b"x"))),
        ethernet(ipv4(udp(payload=b"a"), 17)),
        ethernet(ipv4(udp(payload=b"b"), 17)),
        ethernet(ipv4(udp(payload=b"a" * 64), 17)),
        ethernet(ipv4(udp(payload=b"a" * 65), 17)),
        ethernet(ipv4(icmp(seq=1), 1)),
        ethernet(ipv4(icmp(seq=2), 1)),
        ethernet(ipv4(icmp(kind=0, seq=2), 1)),
        ethernet(ipv4(b"abcd" * 9, 50)),
        ethernet(ipv4(b"abce" * 9, 50)),
        ethernet(ipv4(b"abce" * 9, 51)),
        ethernet(ipv4(b"x" * 40, 17, fragment=10)),
        ethernet(ipv4(b"x" * 40, 17, fragment=11)),
        ethernet(ipv6(tcp(seq=7))),
        ethernet(ipv6(tcp(seq=7, flags=16, options=b"\1\1\x08\x0a" + bytes(8)))),
        ethernet(ipv6(tcp(seq=7, flags=16, options=b"\1\1\x08\x0a" + bytes(7) + b"\1"))),
        ethernet(ipv6(icmp(128), 58)),
        ethernet(ipv6(icmp(129), 58)),
    ]
    assert len({identity(frame) for frame in frames}) == len(frames)


INNER = ipv4(tcp(seq=7), ident=9)
INNER6 = ipv6(tcp(seq=7))


@pytest.mark.parametrize("inner", [INNER, INNER6], ids=["IPv4", "IPv6"])
def test_the_identity_is_the_innermost_packets(inner: bytes) -> None:
    """However it is wrapped on one side, it matches the plain packet on the other."""
    plain = ethernet(inner)
    six = inner[0] >> 4 == 6
    tunnels = [vxlan(plain), vxlan(plain, 8472), geneve(plain), geneve(plain, options=bytes(252)),
               geneve(inner, kind=0x86DD if six else 0x0800)]
    wrapped = [
        *(ethernet(ipv4(udp(sport, port, payload), 17, ident=i)) for i, (sport, port, payload) in enumerate(tunnels)),
        *(ethernet(ipv6(udp(sport, port, payload), 17)) for sport, port, payload in tunnels),
        *(ethernet(ipv4(gre(plain, 0x6558, flags), 47)) for flags in (0, 0x2000, 0x8000, 0xB000)),
        ethernet(ipv4(gre(inner, 0x86DD if six else 0x0800), 47)),
        ethernet(ipv4(gre(ethernet(inner, tags=[(0x8100, 7)]), 0x6558), 47), tags=[(0x88A8, 1), (0x8100, 2)]),
        ethernet(ipv4(inner, 41 if six else 4)),
        ethernet(ipv6(inner, 41 if six else 4)),
        ethernet(ipv4(ipv4(inner, 41 if six else 4), 4)),
        ethernet(mpls(inner, 16, 17, 18), 0x8847),
        ethernet(inner, tags=[(0x9100, 1), (0x8100, 2), (0x8100, 3)]),
    ]
    assert {identity(frame) for frame in wrapped} == {identity(plain)}


@pytest.mark.parametrize(("linktype", "head"), [
    (101, b""), (12, b""), (14, b""), (228, b""), (113, bytes(14) + b"\x08\0"), (276, b"\x08\0" + bytes(18)),
    (113, bytes(14) + b"\x81\0\0\5\x08\0"), (0, b"\2\0\0\0"), (0, b"\0\0\0\2"), (108, b"\0\0\0\2")])
def test_link_types(linktype: int, head: bytes) -> None:
    assert identity(head + INNER, linktype) == identity(ethernet(INNER))


@pytest.mark.parametrize(("linktype", "head"), [
    (101, b""), (229, b""), (113, bytes(14) + b"\x86\xdd"), (276, b"\x86\xdd" + bytes(18)), (0, b"\x1e\0\0\0"),
    (0, b"\0\0\0\x0a"), (108, b"\0\0\0\x18"), (0, b"\x1c\0\0\0")])
def test_link_types_of_ipv6(linktype: int, head: bytes) -> None:
    assert identity(head + INNER6, linktype) == identity(ethernet(INNER6))


def test_options_and_extension_headers() -> None:
    options = ethernet(ipv4(tcp(seq=7), options=b"\x94\4\0\0"))
    assert identity(options) != identity(ethernet(ipv4(tcp(seq=7))))      # its length differs
    assert described(options)["sequence"] == 7
    hop_by_hop, route, auth = b"\x2b\0" + bytes(6), b"\x33\0" + bytes(6), b"\6\4" + bytes(22)
    extended = [ethernet(ipv6(tcp(seq=seq), extensions=hop_by_hop + route + auth, first=0)) for seq in (7, 8)]
    assert not same(extended)
    fragment = [bytes((17, 0, 0, offset << 3 | 1, 0, 0, 0, ident)) for offset in (0, 8, 9) for ident in (1, 2)]
    fragments = [ethernet(ipv6(b"x" * 64, extensions=header, first=44)) for header in fragment]
    assert len({identity(frame) for frame in fragments}) == 6


def test_translated_addresses_take_no_part() -> None:
    before, after = ethernet(ipv4(tcp(seq=7))), ethernet(ipv4(tcp(seq=7), source="192.0.2.9", destination="192.0.2.1"))
    assert not same([before, after])
    assert identity(before, translated=True) == identity(after, translated=True)
    assert identity(before, translated=True) != identity(ethernet(ipv4(tcp(seq=8))), translated=True)
    six = [ethernet(ipv6(tcp(seq=7), destination=destination)) for destination in ("fd00::1", "fd00::3")]
    assert identity(six[0], translated=True) == identity(six[1], translated=True)


@pytest.mark.parametrize("run", [1, 200])
def test_only_wanted_addresses_count(run: int) -> None:
    flows = [("10.0.0.2", "10.0.0.1"), ("10.0.0.2", "10.0.0.9"), ("10.0.0.3", "10.0.0.1"), ("10.0.0.1", "10.0.0.2")]
    frames = [ethernet(ipv4(tcp(seq=i), source=source, destination=destination))
              for source, destination in flows * 3 for i in range(run)]
    outer = [ethernet(ipv4(udp(*vxlan(frame)), 17, source="192.0.2.1", destination="192.0.2.2")) for frame in frames]
    for data in (pcap([(T, frame) for frame in frames]), pcap([(T, frame) for frame in outer])):
        for sources, destinations, share in ((["10.0.0.2"], [], 2), ([], ["10.0.0.1"], 2),
                                             (["10.0.0.2", "10.0.0.3"], ["10.0.0.1"], 2), (["fd00::1"], [], 0)):
            keys, _, capture = sightings(data, sources=sources, destinations=destinations)
            assert len(keys) == share * 3 * run
            assert capture.filtered == len(frames) - len(keys)


def test_identities_are_readable() -> None:
    assert described(ethernet(ipv4(tcp(1, 2, 3, 4), ident=5))) == {
        "length": 40, "ip_id": 5, "source": "10.0.0.2", "destination": "10.0.0.1", "protocol": "TCP", "source_port": 1,
        "destination_port": 2, "sequence": 3, "acknowledgment": 4}
    assert described(ethernet(ipv6(icmp(129, 0, 6, 7), 58))) == {
        "length": 48, "source": "fd00::2", "destination": "fd00::1", "protocol": "ICMPv6", "icmp_type": 129,
        "icmp_code": 0, "identifier": 6, "sequence": 7}
    assert described(ethernet(ipv4(b"x" * 40, 17, fragment=0x2003))) == {
        "length": 60, "ip_id": 1, "fragment_offset": 24, "source": "10.0.0.2", "destination": "10.0.0.1",
        "protocol": "UDP"}


@pytest.mark.parametrize("order", "<>")
def test_pcapng(order: str) -> None:
    """Several interfaces, their resolutions and offsets, unknown blocks, and a second section."""
    frame, raw = ethernet(INNER), INNER
    data = pcapng(
        interface(1, order=order),
        interface(1, order=order, resolution=9),
        interface(101, order=order, resolution=0x80 | 20, offset=-5),
        block(0x0BAD, b"whatever it is", order),
        packet(0, T // 1000, frame, order),
        packet(1, T, frame, order),
        packet(2, (T // 10**9 + 5) << 20 | 1 << 19, raw, order),
        block(3, b"\0\0\0\x3c" + frame, order),
        packet(1, T + 1, ethernet(b"", 0x0806), order), order=order)
    data += pcapng(interface(101, resolution=0, order="<"), packet(0, T // 10**9, raw, "<"), order="<")
    keys, times, capture = sightings(data)
    assert set(keys) == {identity(frame)}
    assert times == [T // 1000 * 1000, T, T // 10**9 * 10**9 + 500_000_000, T // 10**9 * 10**9]
    assert (capture.records, capture.other) == (6, 2)
    assert sightings(data[:-5])[2].partial > 0


@pytest.mark.parametrize(("data", "words"), [
    (pcapng(interface(1), packet(1, 0, INNER)), "damaged packet block at byte 48"),
    (pcapng(interface(1, offset=-9), packet(0, 0, INNER)), "impossible time stamp at byte 76"),
    (pcapng(interface(1), block(6, bytes(12) + b"\xff\xff\0\0" + bytes(40))), "damaged packet block at byte 48"),
    (pcapng(block(6, b"")[:4] + b"\7\0\0\0" + bytes(20)), "impossible block length 7 at byte 32"),
    (pcapng(block(6, b"")[:4] + b"\xfc\xff\xff\xff" + bytes(20)), "impossible block length 4294967292 at byte 32"),
    (b"\n\r\r\n" + bytes(30), "damaged section header at byte 0"),
    (b"\x1f\x8b\x08\0" + bytes(30), "compressed: gunzip it first"),
])
def test_what_is_damaged_in_a_pcapng_is_an_error(data: bytes, words: str) -> None:
    with pytest.raises(netweaver.CaptureError, match=words):
        sightings(data)


def test_no_ip_is_no_traffic() -> None:
    keys, _, capture = sightings(pcap([(T, ARP), (T, ethernet(ipv4(tcp()))), (T, ethernet(b"\x42" * 50, 0x88CC))]))
    assert len(keys) == 1
    assert (capture.records, capture.other) == (3, 2)


def test_a_frame_cut_before_its_identity_is_counted_not_matched() -> None:
    long = ethernet(ipv4(udp(payload=b"x" * 100), 17))
    keys, _, capture = sightings(pcap([(T, ethernet(ipv4(tcp())))] * 2 + [(T, long)], snaplen=60))
    assert len(keys) == 2
    assert capture.cut == 1


def test_a_malformed_packet_is_no_traffic() -> None:
    keys, _, capture = sightings(pcap([(T, ethernet(ipv4(tcp())[:30], pad=False))]))
    assert keys == []
    assert (capture.other, capture.cut) == (1, 0)


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 60])
def test_a_last_record_cut_short_is_left_out_and_told(cut: int) -> None:
    data = pcap([(T + i, ethernet(ipv4(tcp(seq=i)))) for i in range(100)])
    keys, _, capture = sightings(data[:-cut])
    assert len(keys) == 99
    assert capture.partial == 76 - cut


@pytest.mark.parametrize(("data", "words"), [
    (b"", "too short for a capture file (it ends at byte 0)"),
    (b"2013-05-21 20:53:56.421831 IP 192.168.1.2.2911", "not a capture file (byte 0: 32303133)"),
    (pcap([], linktype=105), "link type 105 is not supported"),
    (pcap([(T, ARP)]) + b"\0" * 8 + b"\xff\xff\xff\x7f" + b"\0" * 4, "impossible record length 2147483647 at byte 108"),
])
def test_what_is_no_capture_is_an_error(data: bytes, words: str) -> None:
    with pytest.raises(netweaver.CaptureError) as caught:
        sightings(data)
    assert words in str(caught.value)
    assert str(caught.value).startswith("test.pcap: ")


def text(lines: Iterable[str], *columns: int | str) -> tuple[list[bytes], list[int], netweaver.TextCapture]:
    capture = netweaver.TextCapture(lines, *columns)  # type: ignore[arg-type]
    return capture.identities, list(capture.times), capture


def test_the_seeds_text_capture() -> None:
    line = "2013-05-21 20:53:56.421831 IP 192.168.1.2.2911 > 192.168.1.1.0: S 36550021:36550021(0) win 512\n"
    keys, times, capture = text([line, "\n", "reading from file\n"], 7, 1, ":", 0)
    assert keys == [b"\x0036550021"]
    assert times == [1369169636_421831000]
    assert capture.skipped == 1


def test_todays_tcpdump_text() -> None:
    line = "2026-11-23 01:02:03.000000001 IP 10.0.0.2.1 > 10.0.0.1.0: Flags [S], seq 36550021, win 512, length 0"
    keys, times, _ = text([line], 9, 1, ",", 0)
    assert keys == [b"\x0036550021"]
    assert times[0] % 10**9 == 1


def test_text_times_go_on_after_midnight() -> None:
    day = 86400 * 10**9
    _, times, _ = text(["1 23:59:59.9", "2 00:00:00.1", "3 23:59:59", "4 00:00:01"], 0, 1)
    assert times == [day - 10**8, day + 10**8, 2 * day - 10**9, 2 * day + 10**9]
    _, times, _ = text(["2024-02-28 23:59:59.9 1", "2024-02-29 00:00:00.1 2", "2024-03-01 00:00:00.1 2"], 2, 1)
    assert [times[1] - times[0], times[2] - times[1]] == [2 * 10**8, day]


def test_midnight_between_two_text_captures(tmp_path: Path) -> None:
    pif = write(tmp_path / "pif", b"7 23:59:59.999999\n8 00:00:00.5\n")
    vif = write(tmp_path / "vif", b"7 00:00:00.000001\n8 00:00:00.6\n")
    for paths, delays in (((pif, vif), [2000, 100_000_000]), ((vif, pif), [-2000, -100_000_000])):
        result, = netweaver.analyze_text(*paths, netweaver.IN, 0, 1).results
        assert list(result.delays) == delays


def test_text_times_since_the_epoch() -> None:
    _, times, _ = text(["1369169636.421831 7"], 1, 0)
    assert times == [1369169636_421831000]
