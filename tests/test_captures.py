"""Captures: what is read from a file, and what identifies a packet."""
from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from frames import ARP, ethernet, icmp, ipv4, ipv6, pcap, tcp, udp, write

import netweaver

T = 1_700_000_000_123_456_789


def sightings(data: bytes) -> tuple[list[bytes], list[int], netweaver.Capture]:
    capture = netweaver.Capture(io.BytesIO(data), "test.pcap")
    keys: list[bytes] = []
    times: list[int] = []
    for block_keys, block_times in capture:
        keys += block_keys
        times += block_times
    return keys, times, capture


def identity(frame: bytes, linktype: int = 1) -> bytes:
    keys, _, _ = sightings(pcap([(T, frame)], linktype=linktype))
    assert len(keys) == 1
    return keys[0]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("nanoseconds", [True, False])
@pytest.mark.parametrize("count", [1, 5, 3000, 9000])
def test_times_and_order(order: str, nanoseconds: bool, count: int) -> None:
    records = [(T + i * 1_000_003, ethernet(ipv4(tcp(seq=i), ident=i & 0xFFFF))) for i in range(count)]
    keys, times, capture = sightings(pcap(records, order, nanoseconds))
    unit = 1 if nanoseconds else 1000
    assert times == [time // unit * unit for time, _ in records]
    assert len(set(keys)) == count == capture.records
    assert capture.precision == ("nanoseconds" if nanoseconds else "microseconds")


def test_blocks_of_any_mixture_equal_single_frames() -> None:
    """Runs are read by columns, the rest one by one: both must say the same."""
    vxlan = b"\x08" + bytes(7)
    kinds: list[Callable[[int], bytes]] = [
        lambda i: ethernet(ipv4(tcp(seq=i), ident=i & 0xFFFF)),
        lambda i: ethernet(ipv4(udp(payload=i.to_bytes(4, "big") * (i % 40)), 17, ident=i & 0xFFFF)),
        lambda i: ethernet(ipv6(tcp(seq=i, flags=16, options=bytes(12)))),
        lambda i: ARP,
        lambda i: ethernet(ipv4(icmp(seq=i & 0xFFFF), 1, ident=i & 0xFFFF)),
        lambda i: ethernet(ipv4(udp(dport=4789, payload=vxlan + ethernet(ipv4(tcp(seq=i)), pad=False)), 17)),
        lambda i: ethernet(ipv4(udp(dport=4789, payload=vxlan + ARP), 17)),
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
    (b"", "too short for a capture file (0 bytes)"),
    (b"2013-05-21 20:53:56.421831 IP 192.168.1.2.2911", "not a pcap file (it starts with 32303133)"),
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
    [(keys, times)] = list(capture)
    return keys, list(times), capture


def test_the_seeds_text_capture() -> None:
    line = "2013-05-21 20:53:56.421831 IP 192.168.1.2.2911 > 192.168.1.1.0: S 36550021:36550021(0) win 512\n"
    keys, times, capture = text([line, "\n", "reading from file\n"], 7, 1, ":", 0)
    assert keys == [b"36550021"]
    assert times == [1369169636_421831000]
    assert capture.skipped == 1


def test_todays_tcpdump_text() -> None:
    line = "2026-11-23 01:02:03.000000001 IP 10.0.0.2.1 > 10.0.0.1.0: Flags [S], seq 36550021, win 512, length 0"
    keys, times, _ = text([line], 9, 1, ",", 0)
    assert keys == [b"36550021"]
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
    assert list(netweaver.match_text_files(pif, vif, [], 0, 1).delays) == [2000, 100_000_000]
    assert list(netweaver.match_text_files(vif, pif, [], 0, 1).delays) == [-2000, -100_000_000]


def test_text_times_since_the_epoch() -> None:
    _, times, _ = text(["1369169636.421831 7"], 1, 0)
    assert times == [1369169636_421831000]
