"""Frames and capture files for the tests, made byte by byte without any code of netweaver."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from pathlib import Path


def tcp(
    sport: int = 1024,
    dport: int = 80,
    seq: int = 0,
    ack: int = 0,
    flags: int = 2,
    options: bytes = b"",
    payload: bytes = b"",
) -> bytes:
    """Return a TCP segment, by default a SYN."""
    words = 5 + len(options) // 4
    window = 512
    checksum = 0xBEEF
    header = struct.pack(
        ">HHIIBBHHH", sport, dport, seq, ack, words << 4, flags, window, checksum, 0
    )
    return header + options + payload


def udp(sport: int = 1024, dport: int = 53, payload: bytes = b"") -> bytes:
    """Return a UDP datagram."""
    checksum = 0xBEEF
    return struct.pack(">HHHH", sport, dport, 8 + len(payload), checksum) + payload


def icmp(
    kind: int = 8, code: int = 0, identifier: int = 1, seq: int = 1, payload: bytes = b""
) -> bytes:
    """Return an ICMP message, by default an echo request."""
    checksum = 0xBEEF
    return struct.pack(">BBHHH", kind, code, checksum, identifier, seq) + payload


def ipv4(
    body: bytes,
    protocol: int = 6,
    ident: int = 1,
    source: str = "10.0.0.2",
    destination: str = "10.0.0.1",
    fragment: int = 0,
    options: bytes = b"",
    ttl: int = 64,
    tos: int = 0,
) -> bytes:
    """Return an IPv4 packet; `fragment` is the field with flags and offset."""
    size = 20 + len(options)
    checksum = 0xDEAD
    header = struct.pack(
        ">BBHHHBBH",
        0x40 | size // 4,
        tos,
        size + len(body),
        ident,
        fragment,
        ttl,
        protocol,
        checksum,
    )
    addresses = ip_address(source).packed + ip_address(destination).packed
    return header + addresses + options + body


def ipv6(
    body: bytes,
    protocol: int = 6,
    source: str = "fd00::2",
    destination: str = "fd00::1",
    extensions: bytes = b"",
    first: int | None = None,
    hop_limit: int = 64,
) -> bytes:
    """Return an IPv6 packet; `first` is the type of the first of the extension headers."""
    next_header = protocol
    if first is not None:
        next_header = first
    length = len(extensions) + len(body)
    header = struct.pack(">IHBB", 6 << 28, length, next_header, hop_limit)
    addresses = ip_address(source).packed + ip_address(destination).packed
    return header + addresses + extensions + body


def ethernet(
    packet: bytes, kind: int | None = None, tags: Iterable[tuple[int, int]] = (), pad: bool = True
) -> bytes:
    """Return a frame with an IP packet, or with other content of an ethertype.

    It has 60 bytes at least, as on a wire.
    """
    if kind is None:
        kind = 0x0800
        if packet[0] >> 4 == 6:
            kind = 0x86DD
    frame = b"\2\0\0\0\0\1\2\0\0\0\0\2"
    for ethertype, tag in tags:
        frame += struct.pack(">HH", ethertype, tag)
    frame += struct.pack(">H", kind) + packet
    if pad:
        frame = frame.ljust(60, b"\0")
    return frame


ARP = ethernet(bytes(28), 0x0806)


def pcap(
    records: Iterable[tuple[int, bytes]],
    order: str = "<",
    nanoseconds: bool = True,
    linktype: int = 1,
    snaplen: int = 262144,
) -> bytes:
    """Return a pcap file with frames and their times in nanoseconds."""
    magic = 0xA1B2C3D4
    tick = 1000
    if nanoseconds:
        magic = 0xA1B23C4D
        tick = 1
    parts = [struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, snaplen, linktype)]
    for time, frame in records:
        captured = frame[:snaplen]
        seconds, fraction = divmod(time, 10**9)
        header = struct.pack(order + "IIII", seconds, fraction // tick, len(captured), len(frame))
        parts.append(header + captured)
    return b"".join(parts)


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def vxlan(frame: bytes, port: int = 4789) -> tuple[int, int, bytes]:
    """Return ports and payload of the UDP datagram around a frame."""
    return 49152, port, b"\x08\0\0\0\0\0\x2a\0" + frame


def geneve(
    content: bytes, kind: int = 0x6558, options: bytes = b"", port: int = 6081
) -> tuple[int, int, bytes]:
    return 49153, port, struct.pack(">BBHI", len(options) // 4, 0, kind, 0x2A00) + options + content


def gre(content: bytes, kind: int, flags: int = 0) -> bytes:
    """Return a GRE packet; the fields that the flags announce are 0."""
    optional_fields = 0
    for flag in (0x8000, 0x2000, 0x1000):
        if flags & flag:
            optional_fields += 1
    return struct.pack(">HH", flags, kind) + bytes(4 * optional_fields) + content


def mpls(content: bytes, *labels: int) -> bytes:
    """Return content below a stack of labels."""
    stack = b""
    for position, label in enumerate(labels):
        is_last = position == len(labels) - 1
        stack += struct.pack(">I", label << 12 | is_last << 8 | 64)
    return stack + content


def block(kind: int, body: bytes, order: str = "<") -> bytes:
    """Return a pcapng block."""
    padded = body + bytes(-len(body) % 4)
    size = struct.pack(order + "I", 12 + len(padded))
    return struct.pack(order + "I", kind) + size + padded + size


def interface(
    linktype: int, resolution: int | None = None, offset: int | None = None, order: str = "<"
) -> bytes:
    """Return an interface description block; `resolution` is the option if_tsresol."""
    body = struct.pack(order + "HHI", linktype, 0, 0)
    if resolution is not None:
        body += struct.pack(order + "HHB3x", 9, 1, resolution)
    if offset is not None:
        body += struct.pack(order + "HHq", 14, 8, offset)
    if len(body) > 8:
        body += bytes(4)  # end of the options
    return block(1, body, order)


def packet(number: int, ticks: int, frame: bytes, order: str = "<") -> bytes:
    """Return an enhanced packet block of an interface."""
    high = ticks >> 32
    low = ticks & 0xFFFFFFFF
    header = struct.pack(order + "5I", number, high, low, len(frame), len(frame))
    return block(6, header + frame, order)


def pcapng(*blocks: bytes, order: str = "<") -> bytes:
    """Return a section of a pcapng file."""
    header = struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1)
    return block(0x0A0D0D0A, header, order) + b"".join(blocks)


# Frames around an IP packet.
WRAPPINGS: dict[str, Callable[[bytes], bytes]] = {
    "plain": ethernet,
    "VLAN": lambda inner: ethernet(inner, tags=[(0x8100, 100)]),
    "QinQ": lambda inner: ethernet(inner, tags=[(0x88A8, 7), (0x8100, 100)]),
    "MPLS": lambda inner: ethernet(mpls(inner, 16, 17), 0x8847),
    "VXLAN": lambda inner: ethernet(ipv4(udp(*vxlan(ethernet(inner, pad=False))), 17)),
    "VXLAN over IPv6": lambda inner: ethernet(
        ipv6(udp(*vxlan(ethernet(inner, pad=False), 8472)), 17)
    ),
    "Geneve": lambda inner: ethernet(
        ipv4(udp(*geneve(ethernet(inner, pad=False), options=bytes(8))), 17)
    ),
    "GRE": lambda inner: ethernet(
        ipv4(gre(inner, 0x0800 if inner[0] >> 4 == 4 else 0x86DD, 0x2000), 47)
    ),
    "IP in IP": lambda inner: ethernet(ipv4(inner, 4 if inner[0] >> 4 == 4 else 41)),
}
