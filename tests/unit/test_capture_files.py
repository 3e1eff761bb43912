"""Capture files: what is read from pcap and pcapng files, and which are refused."""

from __future__ import annotations

import io
import struct
from itertools import cycle

import pytest
from frames import (
    ARP,
    block,
    ethernet,
    icmp,
    interface,
    ipv4,
    ipv6,
    packet,
    pcap,
    pcapng,
    tcp,
    udp,
    vxlan,
)

import netweaver

ETHERNET = 1
RAW = 101
SECOND = 10**9
T = 1_700_000_000_123_456_789
SYN = ethernet(ipv4(tcp(seq=7)))


def read(data: bytes) -> tuple[list[bytes], list[int], netweaver.Capture]:
    """Return the identities and times in a file, and the capture, whose counts are complete."""
    capture = netweaver.Capture(io.BytesIO(data), "test.pcap")
    identities: list[bytes] = []
    times: list[int] = []
    for one_block in capture:
        identities += one_block.identities
        times += one_block.times
    return identities, times, capture


def error_of(data: bytes) -> str:
    with pytest.raises(netweaver.CaptureError) as raised:
        read(data)
    return str(raised.value)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("nanoseconds", "tick"), [(True, 1), (False, 1000)])
@pytest.mark.parametrize("count", [1, 5, 3000])
def test_times_in_both_byte_orders(order: str, nanoseconds: bool, tick: int, count: int) -> None:
    records = []
    for index in range(count):
        records.append((T + index * 1_000_003, ethernet(ipv4(tcp(seq=index)))))
    identities, times, capture = read(pcap(records, order, nanoseconds))
    assert times == [time // tick * tick for time, _ in records]
    assert len(set(identities)) == count
    assert capture.records == count
    assert capture.span == (times[0], times[-1])
    assert capture.resolution == SECOND // tick


def mixed_frames() -> list[bytes]:
    """Return runs of equal kinds of frames that are longer than what is read at once."""
    frames: list[bytes] = []
    runs = cycle((1, 40, 2, 700, 33, 31, 64))
    for kind in list(range(11)) * 4:
        for _ in range(next(runs)):
            number = len(frames)
            frames.append(frame_of_kind(kind, number))
    return frames


def frame_of_kind(kind: int, number: int) -> bytes:
    payload = number.to_bytes(4, "big") * (number % 40)
    contents = [
        ipv4(tcp(seq=number)),
        ipv4(tcp(seq=number), fragment=0x4000),  # not to be fragmented
        ipv4(tcp(seq=number), fragment=64 << number % 2),  # the offset of a last fragment
        ipv4(tcp(seq=number, flags=16, payload=payload)),
        ipv4(tcp(seq=number, flags=16, options=bytes(12))),
        ipv4(udp(payload=payload), 17, ident=number & 0xFFFF),
        ipv4(icmp(seq=number & 0xFFFF), 1),
        ipv4(bytes(60), 17, fragment=1 + number % 50, ident=number & 0xFFFF),
        ipv4(udp(*vxlan(ethernet(ipv4(tcp(seq=number))))), 17),
        ipv6(tcp(seq=number)),
    ]
    if kind == len(contents):
        return ARP
    return ethernet(contents[kind])


def test_frames_of_any_mixture_are_identified_as_single_ones_are() -> None:
    """The reader has a faster way for the most frequent kind of frame."""
    frames = mixed_frames()
    records = [(T + index, frame) for index, frame in enumerate(frames)]
    expected = []
    expected_times = []
    for time, frame in records:
        packets = netweaver.identify(frame, ETHERNET)
        if packets:
            expected.append(packets[-1])
            expected_times.append(time)
    for order in "<>":
        identities, times, capture = read(pcap(records, order))
        assert identities == expected
        assert times == expected_times
        assert capture.records == len(frames)
        assert capture.other == len(frames) - len(expected)


def test_outer_packets_are_found_by_the_index_of_the_innermost() -> None:
    tunnelled = ethernet(ipv4(udp(*vxlan(SYN)), 17, source="192.0.2.1"))
    capture = netweaver.Capture(io.BytesIO(pcap([(T, SYN), (T, ARP), (T, tunnelled)])), "")
    (one_block,) = capture
    assert list(one_block.outer) == [1]
    (outer,) = one_block.outer[1]
    assert netweaver.describe(outer).source == "192.0.2.1"


@pytest.mark.parametrize("order", "<>")
def test_pcapng_with_several_interfaces_and_sections(order: str) -> None:
    raw = ipv4(tcp(seq=7))
    half_a_second_later = (T // SECOND + 5) << 20 | 1 << 19
    first_section = pcapng(
        interface(ETHERNET, order=order),
        interface(ETHERNET, order=order, resolution=9),
        interface(RAW, order=order, resolution=0x80 | 20, offset=-5),
        block(0x0BAD, b"whatever it is", order),
        packet(0, T // 1000, SYN, order),
        packet(1, T, SYN, order),
        packet(2, half_a_second_later, raw, order),
        block(3, b"\0\0\0\x3c" + SYN, order),
        packet(1, T + 1, ARP, order),
        order=order,
    )
    second_section = pcapng(interface(RAW, resolution=0), packet(0, T // SECOND, raw))
    identities, times, capture = read(first_section + second_section)
    assert set(identities) == {netweaver.identify(SYN, ETHERNET)[0]}
    whole_seconds = T // SECOND * SECOND
    assert times == [T // 1000 * 1000, T, whole_seconds + SECOND // 2, whole_seconds]
    assert capture.records == 6
    assert capture.other == 2
    assert capture.resolution == 1


def test_an_obsolete_packet_block_is_read() -> None:
    fields = (0).to_bytes(2, "little") + (9).to_bytes(2, "little")
    ticks = T // 1000
    for number in (ticks >> 32, ticks & 0xFFFFFFFF, len(SYN), len(SYN)):
        fields += number.to_bytes(4, "little")
    _, times, _ = read(pcapng(interface(ETHERNET), block(2, fields + SYN)))
    assert times == [T // 1000 * 1000]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "too short for a capture file (it ends at byte 0)"),
        (b"2013-05-21 20:53:56.421831 IP 192.168.1.2.2911", "not a capture file"),
        (b"\x1f\x8b\x08\0" + bytes(30), "gunzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(30), "unzstd"),
        (
            b"snoop\0\0\0" + bytes(30),
            "format snoop is not supported. If Wireshark can read it, convert it: editcap -F pcap",
        ),
        (b"\xcd\x34\xb2\xa1" + bytes(30), "Mesquita's pcap is not supported"),
        (pcap([])[:4] + b"\2\0\2\0" + pcap([])[8:], "pcap version 2.2 is not supported"),
        (pcap([], linktype=105), "link type 105 is not supported"),
        (
            pcap([(T, ARP)]) + bytes(8) + b"\xff\xff\xff\x7f" + bytes(4),
            "impossible record length 2147483647 at byte 108: damaged, or a variant of pcap. "
            "If Wireshark",
        ),
        (b"\n\r\r\n" + bytes(30), "damaged section header at byte 0"),
        (
            pcapng(interface(ETHERNET), packet(1, 0, SYN)),
            "damaged packet block at byte 48",
        ),
        (
            pcapng(interface(ETHERNET), block(6, bytes(12) + b"\xff\xff\0\0" + bytes(40))),
            "damaged packet block at byte 48",
        ),
        (
            pcapng(b"\6\0\0\0\7\0\0\0" + bytes(20)),
            "impossible block length 7 at byte 32",
        ),
        (
            pcapng(b"\6\0\0\0\xfc\xff\xff\xff" + bytes(20)),
            "impossible block length 4294967292 at byte 32",
        ),
    ],
)
def test_other_and_damaged_files_are_refused(data: bytes, reason: str) -> None:
    error = error_of(data)
    assert error.startswith("test.pcap: ")
    assert reason in error


def test_frames_without_an_ip_packet_are_counted() -> None:
    identities, _, capture = read(pcap([(T, ARP), (T, SYN), (T, ethernet(bytes(50), 0x88CC))]))
    assert len(identities) == 1
    assert capture.records == 3
    assert capture.other == 2


def test_frames_cut_before_their_identity_are_counted() -> None:
    long = ethernet(ipv4(udp(payload=bytes(100)), 17))
    identities, _, capture = read(pcap([(T, SYN), (T, SYN), (T, long)], snaplen=60))
    assert len(identities) == 2
    assert capture.cut == 1
    assert capture.other == 0


def test_malformed_packets_are_counted_with_other_frames() -> None:
    malformed = ethernet(ipv4(tcp())[:30], pad=False)
    identities, _, capture = read(pcap([(T, malformed)]))
    assert identities == []
    assert capture.other == 1
    assert capture.cut == 0


@pytest.mark.parametrize("missing", [1, 15, 16, 17, 60, 75])
def test_an_incomplete_last_record_is_left_out(missing: int) -> None:
    records = [(T + index, ethernet(ipv4(tcp(seq=index)))) for index in range(100)]
    identities, _, capture = read(pcap(records)[:-missing])
    assert len(identities) == 99
    (warning,) = capture.warnings()
    assert f"incomplete ({76 - missing} byte" in warning
    assert "ignored, after 99 complete records" in warning


def test_an_incomplete_last_block_is_left_out() -> None:
    data = pcapng(interface(ETHERNET), packet(0, 1, SYN), packet(0, 2, SYN))
    identities, _, capture = read(data[:-5])
    assert len(identities) == 1
    (warning,) = capture.warnings()
    assert f"incomplete ({len(packet(0, 2, SYN)) - 5} bytes)" in warning


def test_a_record_larger_than_what_is_read_at_once() -> None:
    large = ethernet(ipv4(udp(payload=b"x"), 17)) + bytes(200_000)
    identities, _, capture = read(pcap([(T, SYN), (T, large), (T, SYN)]))
    assert len(identities) == 3
    assert capture.warnings() == []


def records_of(magic: int, record_header: int, order: str, file_header: int = 24) -> bytes:
    """Return a file of a pcap variant with three packets, a microsecond apart."""
    fields = struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 65535, ETHERNET)
    data = fields.ljust(file_header, b"\0")
    for index in range(3):
        times = (T // SECOND, index)
        header = struct.pack(order + "4I", *times, len(SYN), len(SYN))
        data += header.ljust(record_header, b"\1") + SYN
    return data


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("magic", "file_header", "record_header", "tick"),
    [
        (0xA1B2CD34, 24, 24, 1000),
        (0x1C0001AB, 28, 16, 1000),
        (0x1C0001AC, 28, 16, 1),
    ],
)
def test_variants_of_pcap_are_read(
    order: str, magic: int, file_header: int, record_header: int, tick: int
) -> None:
    identities, times, capture = read(records_of(magic, record_header, order, file_header))
    start = T // SECOND * SECOND
    assert times == [start, start + tick, start + 2 * tick]
    assert set(identities) == set(netweaver.identify(SYN, ETHERNET))
    assert capture.warnings() == []


@pytest.mark.parametrize("record_header", [20, 24, 28])
def test_variants_of_pcap_without_a_magic_number_are_refused(record_header: int) -> None:
    assert "editcap" in error_of(records_of(0xA1B2C3D4, record_header, "<"))


@pytest.mark.parametrize("size", [16, 17, 1000, 300_000])
def test_zeros_at_the_end_of_a_pcap_are_left_out(size: int) -> None:
    identities, _, capture = read(pcap([(T, SYN), (T, ARP)]) + bytes(size))
    assert len(identities) == 1
    assert capture.records == 2
    (warning,) = capture.warnings()
    assert f"{size} bytes of zeros" in warning


@pytest.mark.parametrize("size", [12, 1000, 300_000])
def test_zeros_at_the_end_of_a_pcapng_are_left_out(size: int) -> None:
    data = pcapng(interface(ETHERNET), packet(0, 1, SYN))
    identities, _, capture = read(data + bytes(size))
    assert len(identities) == 1
    (warning,) = capture.warnings()
    assert f"{size} bytes of zeros" in warning


def test_zeros_before_other_data_are_an_error() -> None:
    data = pcap([(T, SYN)])
    assert "zeros instead of a record at byte" in error_of(data + bytes(16) + data)
    assert "zeros instead of a record at byte" in error_of(data + bytes(100_000) + data)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_packet_with_an_impossible_time_in_a_pcap_is_left_out(position: int) -> None:
    records = [bytearray(pcap([(T, SYN)])[24:]) for _ in range(3)]
    records[position][4:8] = SECOND.to_bytes(4, "little")
    identities, times, capture = read(pcap([]) + b"".join(records))
    assert len(identities) == 2
    assert times == [T, T]
    assert capture.other == 1
    (warning,) = capture.warnings()
    assert warning.startswith("1 packet ")


@pytest.mark.parametrize("ticks", [1 << 63, (1 << 64) - 1])
def test_a_packet_with_an_impossible_time_in_a_pcapng_is_left_out(ticks: int) -> None:
    blocks = [packet(0, 1, SYN), packet(0, ticks, SYN), packet(0, 3, SYN)]
    _, times, capture = read(pcapng(interface(ETHERNET), *blocks))
    assert times == [1000, 3000]
    assert capture.records == 3
    (warning,) = capture.warnings()
    assert warning.startswith("1 packet ")


def test_packets_without_a_time_are_left_out_with_a_warning() -> None:
    simple_packet = block(3, len(SYN).to_bytes(4, "little") + SYN)
    blocks = [packet(0, 1, SYN), packet(0, 2, SYN), simple_packet]
    identities, _, capture = read(pcapng(interface(ETHERNET), *blocks))
    assert len(identities) == 2
    (warning,) = capture.warnings()
    assert warning.startswith("1 packet of")
    assert "no time" in warning
    assert "no time" in error_of(pcapng(interface(ETHERNET), simple_packet))


def test_a_pcapng_of_an_unsupported_link_type_is_refused_as_a_pcap_is() -> None:
    assert "link type 9 is not supported" in error_of(pcapng(interface(9), packet(0, 1, SYN)))
    assert "link type 9 is not supported" in error_of(pcap([(T, SYN)], linktype=9))


def test_an_unused_interface_of_another_link_type_does_not_matter() -> None:
    _, times, capture = read(pcapng(interface(9), interface(ETHERNET), packet(1, 1, SYN)))
    assert times == [1000]
    assert capture.warnings() == []


def test_packets_of_another_link_type_are_left_out_with_a_warning() -> None:
    blocks = [packet(0, 1, SYN), packet(1, 2, SYN), packet(0, 3, SYN)]
    _, times, capture = read(pcapng(interface(9), interface(ETHERNET), *blocks))
    assert times == [2000]
    assert capture.other == 2
    (warning,) = capture.warnings()
    assert "2 packets" in warning
    assert "link type 9" in warning


@pytest.mark.parametrize(
    ("resolution", "ticks", "time"),
    [
        (6, 1_700_000_000_123_456, 1_700_000_000_123_456_000),
        (9, 1_700_000_000_123_456_789, 1_700_000_000_123_456_789),
        (3, 1_700_000_000_123, 1_700_000_000_123_000_000),
        (12, 1_700_000_000_123_456_789_999 % 2**64, 1_700_000_000_123_456_789_999 % 2**64 // 1000),
        (0x80 | 30, (1_700_000_000 << 30) + 1, 1_700_000_000_000_000_000),
        (0x80 | 10, (1_700_000_000 << 10) + 1, 1_700_000_000_000_976_562),
    ],
)
def test_times_of_interfaces_with_different_resolutions_are_exact(
    resolution: int, ticks: int, time: int
) -> None:
    interfaces = [interface(ETHERNET, resolution=9), interface(ETHERNET, resolution=resolution)]
    _, times, _ = read(pcapng(*interfaces, packet(0, T, SYN), packet(1, ticks, SYN)))
    assert times == [T, time]


def test_a_warning_names_the_units_of_one_file() -> None:
    interfaces = [interface(ETHERNET, resolution=9), interface(ETHERNET, resolution=6)]
    blocks = [packet(0, T, SYN), packet(1, T // 1000, SYN)]
    _, _, capture = read(pcapng(*interfaces, *blocks))
    assert capture.resolution == 10**6
    (warning,) = capture.warnings()
    assert "microseconds" in warning
    assert "nanoseconds" in warning
