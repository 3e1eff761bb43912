"""Identities of packets: equal wherever a packet is captured, different for different packets."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from frames import ARP, ethernet, geneve, gre, icmp, ipv4, ipv6, mpls, tcp, udp, vxlan

import netweaver

ETHERNET = 1
INNER = ipv4(tcp(seq=7), ident=9)
INNER6 = ipv6(tcp(seq=7))


def identity(frame: bytes, linktype: int = ETHERNET) -> bytes:
    """Return the identity of the innermost packet."""
    return netweaver.identify(frame, linktype)[-1]


def count_identities(frames: Iterable[bytes]) -> int:
    return len({identity(frame) for frame in frames})


def test_identity_leaves_out_what_routers_change() -> None:
    plain = ethernet(ipv4(tcp(seq=7)))
    other_checksums = bytearray(plain)
    other_checksums[24:26] = b"\1\2"
    other_checksums[50:52] = b"\3\4"
    other_addresses = bytes(12) + plain[12:]
    frames = [
        plain,
        bytes(other_checksums),
        other_addresses,
        ethernet(ipv4(tcp(seq=7), ttl=63, tos=0xB9)),
        ethernet(ipv4(tcp(seq=7)), pad=False),
    ]
    assert count_identities(frames) == 1
    assert count_identities([ethernet(ipv6(tcp())), ethernet(ipv6(tcp(), hop_limit=3))]) == 1


def test_options_of_a_syn_are_left_out() -> None:
    before = ethernet(ipv4(tcp(seq=7, options=b"\2\4\5\xb4")))
    after = ethernet(ipv4(tcp(seq=7, options=b"\2\4\5\x78")))
    assert identity(before) == identity(after)


@pytest.mark.parametrize("field", ["sport", "dport", "seq", "ack", "flags", "payload"])
def test_segments_are_distinguished_by_field(field: str) -> None:
    values: dict[str, Any] = {field: 9}
    if field == "payload":
        values = {field: b"x"}
    one = ethernet(ipv4(tcp()))
    another = ethernet(ipv4(tcp(**values)))
    assert count_identities([one, another]) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("ident", 2), ("source", "10.0.0.3"), ("destination", "10.0.0.3"), ("protocol", 50)],
)
def test_packets_are_distinguished_by_field(field: str, value: int | str) -> None:
    values: dict[str, Any] = {field: value}
    one = ethernet(ipv4(tcp()))
    another = ethernet(ipv4(tcp(), **values))
    assert count_identities([one, another]) == 2


@pytest.mark.parametrize(
    ("protocol", "payloads"),
    [
        (17, [udp(payload=b"a"), udp(payload=b"b")]),
        (17, [udp(payload=bytes(64)), udp(payload=bytes(65))]),
        (1, [icmp(seq=1), icmp(seq=2)]),
        (1, [icmp(kind=0), icmp(kind=8)]),
        (50, [b"abcd" * 9, b"abce" * 9]),
    ],
)
def test_packets_are_distinguished_by_payload(protocol: int, payloads: list[bytes]) -> None:
    for ip in (ipv4, ipv6):
        frames = [ethernet(ip(payload, protocol)) for payload in payloads]
        assert count_identities(frames) == 2


@pytest.mark.parametrize(
    ("body", "protocol", "captured"),
    [(tcp(flags=16, payload=b"data"), 6, 14), (udp(), 17, 6)],
)
def test_a_frame_that_ends_after_what_identifies_it(
    body: bytes, protocol: int, captured: int
) -> None:
    frame = ethernet(ipv4(body, protocol))
    whole = netweaver.identify(frame, 1)
    assert netweaver.identify(frame[: 34 + captured], 1) == whole
    with pytest.raises(netweaver.TOO_SHORT):
        netweaver.identify(frame[: 34 + captured - 1], 1)


def test_fragments_are_distinguished_by_offset() -> None:
    frames = []
    for offset in range(1, 4):
        frames.append(ethernet(ipv4(bytes(40), 17, fragment=offset)))
    assert count_identities(frames) == 3


@pytest.mark.parametrize("ip", [ipv4, ipv6])
def test_time_stamps_distinguish_retransmissions(ip: Callable[[bytes], bytes]) -> None:
    frames = []
    for time in range(3):
        options = b"\1\1\x08\x0a" + bytes(7) + bytes([time])
        frames.append(ethernet(ip(tcp(flags=16, options=options))))
    assert count_identities(frames) == 3


@pytest.mark.parametrize("size", [0, 11, 12, 13, 31, 32, 33, 100])
def test_datagrams_of_all_sizes_have_the_same_identity_behind_a_tag(size: int) -> None:
    """Plain datagrams are identified in a faster way than tagged ones."""
    content = ipv4(udp(payload=bytes(range(size))), 17)
    plain = ethernet(content, pad=False)
    assert identity(plain) == identity(ethernet(content, tags=[(0x8100, 5)]))
    assert identity(plain) == identity(content, linktype=101)


def tunnels(inner: bytes) -> list[bytes]:
    """Return frames with the packet in all encapsulations that are supported."""
    ethertype = 0x0800
    protocol = 4
    if inner[0] >> 4 == 6:
        ethertype = 0x86DD
        protocol = 41
    plain = ethernet(inner)
    datagrams = [
        vxlan(plain),
        vxlan(plain, 8472),
        geneve(plain),
        geneve(plain, options=bytes(252)),
        geneve(inner, kind=ethertype),
    ]
    tagged = ethernet(inner, tags=[(0x8100, 7)])
    outer_tags = [(0x88A8, 1), (0x8100, 2)]
    return [
        *[ethernet(ipv4(udp(*datagram), 17)) for datagram in datagrams],
        *[ethernet(ipv6(udp(*datagram), 17)) for datagram in datagrams],
        *[ethernet(ipv4(gre(plain, 0x6558, flags), 47)) for flags in (0, 0x2000, 0x8000, 0xB000)],
        ethernet(ipv4(gre(inner, ethertype), 47)),
        ethernet(ipv4(gre(tagged, 0x6558), 47), tags=outer_tags),
        ethernet(ipv4(inner, protocol)),
        ethernet(ipv6(inner, protocol)),
        ethernet(ipv4(ipv4(inner, protocol), 4)),
        ethernet(mpls(inner, 16, 17, 18), 0x8847),
        ethernet(inner, tags=[(0x8100, 1)]),
        ethernet(inner, tags=[(0x88A8, 5), (0x8100, 4095)]),
        ethernet(inner, tags=[(0x9100, 1), (0x8100, 2), (0x8100, 3)]),
    ]


@pytest.mark.parametrize("inner", [INNER, INNER6], ids=["IPv4", "IPv6"])
def test_an_encapsulated_packet_has_the_identity_of_the_plain_one(inner: bytes) -> None:
    for frame in tunnels(inner):
        assert identity(frame) == identity(ethernet(inner)), frame.hex()


@pytest.mark.parametrize(
    ("linktype", "header"),
    [
        (101, b""),
        (12, b""),
        (14, b""),
        (228, b""),
        (113, bytes(14) + b"\x08\0"),
        (113, bytes(14) + b"\x81\0\0\5\x08\0"),
        (276, b"\x08\0" + bytes(18)),
        (0, b"\2\0\0\0"),
        (0, b"\0\0\0\2"),
        (108, b"\0\0\0\2"),
    ],
)
def test_link_types(linktype: int, header: bytes) -> None:
    assert identity(header + INNER, linktype) == identity(ethernet(INNER))


@pytest.mark.parametrize(
    ("linktype", "header"),
    [
        (101, b""),
        (229, b""),
        (113, bytes(14) + b"\x86\xdd"),
        (276, b"\x86\xdd" + bytes(18)),
        (0, b"\x1e\0\0\0"),
        (0, b"\0\0\0\x0a"),
        (0, b"\x1c\0\0\0"),
        (108, b"\0\0\0\x18"),
    ],
)
def test_link_types_of_ipv6(linktype: int, header: bytes) -> None:
    assert identity(header + INNER6, linktype) == identity(ethernet(INNER6))


TAGS = {
    "older service VLAN": (0x9200, 2),
    "VN-Tag": (0x8926, 4),
    "HSR": (0x892F, 4),
    "802.1CB": (0xF1C1, 4),
    "security group": (0x8909, 6),
    "E-Tag": (0x893F, 6),
    "DSA": (0xDADA, 6),
    "MACsec without encryption": (0x88E5, 6),
    "FabricPath": (0x8903, 14),
    "802.1ah": (0x88E7, 16),
}


@pytest.mark.parametrize("inner", [INNER, INNER6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("tag", TAGS)
def test_tags_are_skipped(tag: str, inner: bytes) -> None:
    ethertype, size = TAGS[tag]
    plain = ethernet(inner)
    tagged = bytes(size) + plain[12:]
    assert identity(ethernet(tagged, ethertype)) == identity(plain)
    tagged_twice = ethernet(tagged, ethertype, tags=[(0x8100, 7)])
    assert identity(tagged_twice) == identity(plain)


def test_macsec_with_a_channel_identifier_is_skipped() -> None:
    plain = ethernet(INNER)
    tag = b"\x20" + bytes(13)
    assert identity(ethernet(tag + plain[12:], 0x88E5)) == identity(plain)


def test_llc_with_an_ethertype_is_skipped() -> None:
    plain = ethernet(INNER)
    llc = b"\xaa\xaa\x03\0\0\0"
    assert identity(ethernet(llc + plain[12:], 52)) == identity(plain)


@pytest.mark.parametrize(("inner", "protocol"), [(INNER, 0x21), (INNER6, 0x57)])
def test_packets_in_pppoe_sessions_are_identified(inner: bytes, protocol: int) -> None:
    session = struct.pack(">BBHHH", 0x11, 0, 42, 2 + len(inner), protocol) + inner
    assert identity(ethernet(session, 0x8864)) == identity(ethernet(inner))
    tagged = ethernet(session, 0x8864, tags=[(0x8100, 7)])
    assert identity(tagged) == identity(ethernet(inner))


def test_a_pseudowire_is_dissected() -> None:
    pseudowire = mpls(bytes(4) + ethernet(INNER), 16, 17)
    assert identity(ethernet(pseudowire, 0x8847)) == identity(ethernet(INNER))


@pytest.mark.parametrize(
    ("ethertype", "content"),
    [
        (0x8864, b"\x11\0\0\x2a\0\x20\xc0\x21" + bytes(40)),  # PPPoE without IP
        (0x88E5, b"\x0c" + bytes(5) + b"\x08\0" + INNER),  # encrypted by MACsec
        (43, b"\x42\x42\x03" + bytes(40)),  # spanning tree
    ],
)
def test_tags_without_an_ip_packet(ethertype: int, content: bytes) -> None:
    assert netweaver.identify(ethernet(content, ethertype), ETHERNET) == []


def test_tunnels_on_other_ports() -> None:
    ports = {14789: "vxlan", 16081: "geneve"}
    inner = ethernet(INNER)
    for datagram in (vxlan(inner, 14789), geneve(inner, port=16081)):
        frame = ethernet(ipv4(udp(*datagram), 17))
        assert len(netweaver.identify(frame, ETHERNET)) == 1
        packets = netweaver.identify(frame, ETHERNET, ports)
        assert packets[1:] == netweaver.identify(inner, ETHERNET)


def test_outer_packets_come_first() -> None:
    outer = ipv4(udp(*vxlan(ethernet(INNER))), 17, source="192.0.2.1")
    packets = netweaver.identify(ethernet(outer), ETHERNET)
    assert [netweaver.describe(packet).source for packet in packets] == ["192.0.2.1", "10.0.0.2"]


def test_header_options_are_skipped() -> None:
    with_options = ethernet(ipv4(tcp(seq=7), options=b"\x94\4\0\0"))
    assert netweaver.describe(identity(with_options)).sequence == 7
    hop_by_hop = b"\x2b\0" + bytes(6)
    routing = b"\x33\0" + bytes(6)
    authentication = b"\6\4" + bytes(22)
    extensions = hop_by_hop + routing + authentication
    for sequence in (7, 8):
        frame = ethernet(ipv6(tcp(seq=sequence), extensions=extensions, first=0))
        assert netweaver.describe(identity(frame)).sequence == sequence


def test_ipv6_fragments_are_distinguished_by_offset_and_identification() -> None:
    frames = []
    for offset in (0, 8, 9):
        for identification in (1, 2):
            header = bytes([17, 0, 0, offset << 3 | 1, 0, 0, 0, identification])
            frames.append(ethernet(ipv6(bytes(64), extensions=header, first=44)))
    assert count_identities(frames) == 6


@pytest.mark.parametrize(
    "frame",
    [
        ARP,
        ethernet(b"\x42" * 50, 0x88CC),
        ethernet(ipv4(udp(*vxlan(ARP)), 17)),
        ethernet(b"\x13" + bytes(50), 0x0800),
        ethernet(b"\x44" + bytes(50), 0x0800),
    ],
)
def test_a_frame_without_an_ip_packet_has_no_identity(frame: bytes) -> None:
    assert netweaver.identify(frame, ETHERNET) == []


@pytest.mark.parametrize("size", [14, 20, 33, 40, 47])
def test_a_frame_that_is_too_short_raises(size: int) -> None:
    with pytest.raises(netweaver.TOO_SHORT):
        netweaver.identify(ethernet(ipv4(tcp()))[:size], ETHERNET)


def test_malformed_content_of_a_whole_packet_is_left_out() -> None:
    outer = ipv4(udp(*vxlan(ethernet(INNER)[:20])), 17)
    assert len(netweaver.identify(ethernet(outer), ETHERNET)) == 1


def test_fields_of_a_segment() -> None:
    packet = netweaver.describe(identity(ethernet(ipv4(tcp(1, 2, 3, 4), ident=5))))
    assert packet == netweaver.PacketFields(
        length=40,
        ip_id=5,
        source="10.0.0.2",
        destination="10.0.0.1",
        protocol="TCP",
        source_port=1,
        destination_port=2,
        sequence=3,
        acknowledgment=4,
    )


def test_fields_of_an_echo_reply() -> None:
    packet = netweaver.describe(identity(ethernet(ipv6(icmp(129, 0, 6, 7), 58))))
    assert packet == netweaver.PacketFields(
        length=48,
        source="fd00::2",
        destination="fd00::1",
        protocol="ICMPv6",
        icmp_type=129,
        icmp_code=0,
        identifier=6,
        sequence=7,
    )


def test_fields_of_a_later_fragment() -> None:
    packet = netweaver.describe(identity(ethernet(ipv4(bytes(40), 17, fragment=0x2003))))
    assert packet == netweaver.PacketFields(
        length=60,
        ip_id=1,
        fragment_offset=24,
        source="10.0.0.2",
        destination="10.0.0.1",
        protocol="UDP",
    )


def test_a_flow_is_one_protocol_between_the_same_addresses_and_ports() -> None:
    frames = [
        ethernet(ipv4(tcp(1, 2, seq=1))),
        ethernet(ipv4(tcp(1, 2, seq=2))),
        ethernet(ipv4(tcp(1, 3))),
        ethernet(ipv4(tcp(1, 2), source="10.0.0.3")),
        ethernet(ipv4(udp(1, 2), 17)),
        ethernet(ipv4(icmp(seq=1), 1)),
        ethernet(ipv4(icmp(seq=2), 1)),
    ]
    flows = [netweaver.flow_of(identity(frame)) for frame in frames]
    assert flows[0] == flows[1]
    assert flows[5] == flows[6]
    assert len(set(flows)) == 5
