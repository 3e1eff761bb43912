"""Frames and capture files for the tests, made byte by byte, with nothing of netweaver's in them."""
from __future__ import annotations

import struct
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path


def tcp(sport: int = 1024, dport: int = 80, seq: int = 0, ack: int = 0, flags: int = 2, options: bytes = b"",
        payload: bytes = b"") -> bytes:
    return struct.pack(">HHIIBBHHH", sport, dport, seq, ack, (5 + len(options) // 4) << 4, flags, 512, 0xBEEF,
                       0) + options + payload


def udp(sport: int = 1024, dport: int = 53, payload: bytes = b"") -> bytes:
    return struct.pack(">HHHH", sport, dport, 8 + len(payload), 0xBEEF) + payload


def icmp(kind: int = 8, code: int = 0, identifier: int = 1, seq: int = 1, payload: bytes = b"") -> bytes:
    return struct.pack(">BBHHH", kind, code, 0xBEEF, identifier, seq) + payload


def ipv4(body: bytes, protocol: int = 6, ident: int = 1, source: str = "10.0.0.2", destination: str = "10.0.0.1",
         fragment: int = 0, options: bytes = b"", ttl: int = 64, tos: int = 0) -> bytes:
    header = 20 + len(options)
    return struct.pack(">BBHHHBBH4s4s", 0x40 | header // 4, tos, header + len(body), ident, fragment, ttl, protocol,
                       0xDEAD, ip_address(source).packed, ip_address(destination).packed) + options + body


def ipv6(body: bytes, protocol: int = 6, source: str = "fd00::2", destination: str = "fd00::1",
         extensions: bytes = b"", first: int | None = None, hop_limit: int = 64) -> bytes:
    """`extensions` are whole extension headers, of which `first` is the type of the first one."""
    return struct.pack(">IHBB16s16s", 6 << 28, len(extensions) + len(body), protocol if first is None else first,
                       hop_limit, ip_address(source).packed, ip_address(destination).packed) + extensions + body


def ethernet(packet: bytes, kind: int | None = None, tags: Iterable[tuple[int, int]] = (),
             pad: bool = True) -> bytes:
    """A frame around an IP packet (or other content of the given ethertype), padded to 60 bytes as a card sends it."""
    if kind is None:
        kind = 0x86DD if packet[0] >> 4 == 6 else 0x0800
    tagged = b"".join(struct.pack(">HH", ethertype, tag) for ethertype, tag in tags)
    frame = b"\2\0\0\0\0\1\2\0\0\0\0\2" + tagged + struct.pack(">H", kind) + packet
    return frame.ljust(60, b"\0") if pad else frame


ARP = ethernet(bytes(28), 0x0806)


def pcap(records: Iterable[tuple[int, bytes]], order: str = "<", nanoseconds: bool = True, linktype: int = 1,
         snaplen: int = 262144) -> bytes:
    """A pcap file of (time in ns, frame) pairs."""
    unit = 1 if nanoseconds else 1000
    out = [struct.pack(order + "IHHiIII", 0xA1B23C4D if nanoseconds else 0xA1B2C3D4, 2, 4, 0, 0, snaplen, linktype)]
    for time, frame in records:
        kept = frame[:snaplen]
        out.append(struct.pack(order + "IIII", time // 10**9, time % 10**9 // unit, len(kept), len(frame)) + kept)
    return b"".join(out)


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def vxlan(frame: bytes, port: int = 4789) -> tuple[int, int, bytes]:
    """(source port, destination port, payload) of the UDP datagram around a frame."""
    return 49152, port, b"\x08\0\0\0\0\0\x2a\0" + frame


def geneve(content: bytes, kind: int = 0x6558, options: bytes = b"") -> tuple[int, int, bytes]:
    return 49153, 6081, struct.pack(">BBHI", len(options) // 4, 0, kind, 0x2A00) + options + content


def gre(content: bytes, kind: int, flags: int = 0) -> bytes:
    optional = sum(4 for bit in (0x8000, 0x2000, 0x1000) if flags & bit)
    return struct.pack(">HH", flags, kind) + bytes(optional) + content


def mpls(content: bytes, *labels: int) -> bytes:
    last = len(labels) - 1
    return b"".join(struct.pack(">I", label << 12 | (i == last) << 8 | 64)
                    for i, label in enumerate(labels)) + content


def block(kind: int, body: bytes, order: str = "<") -> bytes:
    """A pcapng block."""
    padded = body + bytes(-len(body) % 4)
    size = struct.pack(order + "I", 12 + len(padded))
    return struct.pack(order + "I", kind) + size + padded + size


def interface(linktype: int, resolution: int | None = None, offset: int | None = None, order: str = "<") -> bytes:
    options = b""
    if resolution is not None:
        options += struct.pack(order + "HHB3x", 9, 1, resolution)
    if offset is not None:
        options += struct.pack(order + "HHq", 14, 8, offset)
    return block(1, struct.pack(order + "HHI", linktype, 0, 0) + options + (bytes(4) if options else b""), order)


def packet(number: int, ticks: int, frame: bytes, order: str = "<") -> bytes:
    return block(6, struct.pack(order + "5I", number, ticks >> 32, ticks & 0xFFFFFFFF, len(frame), len(frame)) + frame,
                 order)


def pcapng(*blocks: bytes, order: str = "<") -> bytes:
    return block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1), order) + b"".join(blocks)
