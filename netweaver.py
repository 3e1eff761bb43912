#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["paramiko>=3.4"]
# ///
"""Measure what a hypervisor's virtual network costs: the time from pif to vif.

netweaver logs in to a hypervisor and to source VMs, captures on the physical
interface (pif) and on the destination VM's virtual interface (vif) while the
sources generate traffic, and matches the packets of the two captures.  What it
reports is t_vif - t_pif of each packet, by the one clock of the hypervisor's
kernel: bridge or Open vSwitch, firewall and queueing in between.  The network
card's interrupt and the guest's own receive path are not inside.

    python netweaver.py -n instance-<uuid> --hv HV_IP -s SOURCE_IP -d DESTINATION_IP -k KEYFILE
"""
from __future__ import annotations

import os
import re
import sys
from array import array
from bisect import bisect, bisect_left
from itertools import count, islice
from operator import itemgetter, le, mul, sub
from struct import Struct, iter_unpack, unpack_from

TYPE_CHECKING = False                                # importing typing costs more than analysing 10,000 packets
if TYPE_CHECKING:
    import argparse
    import random
    import socket
    import threading
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
    from typing import IO, Any, BinaryIO, NoReturn, TypeVar

    import paramiko
    from matplotlib.figure import Figure

    Block = tuple[list[bytes], array[int]]           # identities, and the times at which they were seen
    Column = tuple[list[int], list[list[int]]]
    Result = TypeVar("Result")
    Run = Callable[..., str]

__version__ = "1.0.0"
__all__ = [
    "Capture", "CaptureError", "HostConnectionError", "Matching", "NetWeaver", "NetWeaverError", "NoMatchError",
    "RemoteCommandError", "TOOLSTACKS", "TextCapture", "UsageError", "build_report", "compare", "describe",
    "guest_times", "main", "match", "match_captures", "match_directions", "match_files", "match_text_files", "merged",
    "plot", "prometheus", "reordering", "statistics", "variation", "write_csv",
]

SCHEMA_VERSION = 1
DEFAULT_SOURCE_COMMAND = "hping3 -c {count} -S -L 0 -Q --fast {destination}"
NANOSECONDS = 1_000_000_000


# ---- Errors -------------------------------------------------------------------------------------------------

class NetWeaverError(Exception):
    """What a user can do something about; only `main` turns it into an exit code."""
    exit_code = 1


class UsageError(NetWeaverError):
    """An argument that can't be used."""
    exit_code = 2


class HostConnectionError(NetWeaverError):
    """A host can't be reached, or its key or our key was refused, or the connection broke."""
    exit_code = 3


class RemoteCommandError(NetWeaverError):
    """A remote command failed, or its answer to a look-up was not the one that was needed."""
    exit_code = 4


class CaptureError(NetWeaverError):
    """A capture could not be made, fetched or read."""
    exit_code = 5


class NoMatchError(NetWeaverError):
    """Both captures are fine, and they have no packet in common."""
    exit_code = 6


# ---- Captures: bytes in, sightings out ----------------------------------------------------------------------
# A sighting is an identity (bytes which are the same wherever the packet is seen) and a time (integer
# nanoseconds since the epoch).  Dissecting a frame step by step is slow in Python, so it is done once for each
# kind of frame: it yields the Layout, that is which bytes decide that a frame is of this kind and which identify
# the packet, and all further frames of the kind are read with two precompiled structs.  Runs of records of one
# length and layout, which is what generators send, are read column by column without a step of Python for each.

CHUNK = 1 << 19
PCAP_HEADER, LARGEST_RECORD, LARGEST_BLOCK = 24, 1 << 18, 1 << 24       # bytes; the limits are libpcap's own
SHORTEST_RUN = 32                                    # records from which on reading by columns pays
MOST_LAYOUTS, MOST_ADMITTED = 16, 4096               # what is remembered of the frames so far
PAYLOAD = 32                                         # bytes of payload that take part in an identity

IPV4, IPV6, TRANSPARENT_ETHERNET, MPLS = 0x0800, 0x86DD, 0x6558, (0x8847, 0x8848)
VLAN_TAGS = (0x8100, 0x88A8, 0x9100)
IDENTIFIED, UNKNOWN = -1, 0                          # beside ethertypes: where a dissection ends
NULL, EN10MB, LOOP, LINUX_SLL, LINUX_SLL2, RAW_IP = 0, 1, 108, 113, 276, (12, 14, 101, 228, 229)
LINK_TYPES = frozenset((NULL, EN10MB, LOOP, LINUX_SLL, LINUX_SLL2, *RAW_IP))
ADDRESS_FAMILIES = {2: IPV4, 10: IPV6, 24: IPV6, 28: IPV6, 30: IPV6}     # Linux, and the BSDs
ICMP, IP_IN_IP, TCP, UDP, IPV6_IN_IP, GRE, ICMPV6 = 1, 4, 6, 17, 41, 47, 58
HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS = 0, 43, 44, 51, 60
EXTENSION_HEADERS = frozenset((HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS))
VXLAN_PORTS, GENEVE_PORT = frozenset((4789, 8472)), 6081
TUNNEL_PORTS = VXLAN_PORTS | {GENEVE_PORT}
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
MOST_HEADERS = 32                                    # in one frame; more are no traffic that anyone sends
# An identity's first byte: IP's version or TEXT, and whether it is a fragment but the first, has no addresses, or has
# IPv6 extension headers.
TEXT, NOT_FIRST, TRANSLATED, EXTENDED = 0, 0x80, 0x40, 0x20


class _Truncated(Exception):
    """The frame ends before its identity does."""


class _Dissection:
    """What a walk through the headers of one frame finds out.

    `checks` are the byte ranges (offset, size) whose values led the way, `guards` the 16-bit values (offset, least,
    most, others that are barred) which only had to be in a range; `spans` are the byte ranges that identify the
    innermost packet, `addresses` those of its source and destination, and `kind` the identity's first byte.  There
    are no spans in a frame without an IP packet.
    """

    def __init__(self, frame: bytes, linktype: int, translated: bool) -> None:
        self.frame, self.translated = frame, translated
        self.checks: list[tuple[int, int]] = []
        self.guards: list[tuple[int, int, int, frozenset[int]]] = []
        self.spans: list[tuple[int, int]] = []
        self.addresses: list[tuple[int, int]] = []
        self.kind = 0
        steps = {IPV4: self._ipv4, IPV6: self._ipv6, TRANSPARENT_ETHERNET: self._ethernet,
                 **dict.fromkeys(MPLS, self._mpls), **dict.fromkeys(VLAN_TAGS, self._tag)}
        protocol, at = self._link(linktype)
        for _ in range(MOST_HEADERS):                # outermost header first
            if protocol not in steps:
                break
            protocol, at = steps[protocol](at)
        if protocol != IDENTIFIED:
            self.spans = []

    def _value(self, at: int, size: int) -> int:
        if at + size > len(self.frame):
            raise _Truncated
        return int.from_bytes(self.frame[at:at + size], "big")

    def _look(self, at: int, size: int) -> int:
        """The value of a field on which the layout depends."""
        self.checks.append((at, size))
        return self._value(at, size)

    # Each step returns the ethertype of what follows and its offset.

    def _link(self, linktype: int) -> tuple[int, int]:
        if linktype == EN10MB:
            return self._ethernet(0)
        if linktype in RAW_IP:
            return self._ip_version(0)
        if linktype in (LINUX_SLL, LINUX_SLL2):
            return (self._look(14, 2), 16) if linktype == LINUX_SLL else (self._look(0, 2), 20)
        if linktype in (NULL, LOOP):                 # NULL is in the byte order of the host that captured
            family = self._look(0, 4)
            return ADDRESS_FAMILIES.get(family if family < 256 else family >> 24, UNKNOWN), 4
        return UNKNOWN, 0

    def _ip_version(self, at: int) -> tuple[int, int]:
        return {4: IPV4, 6: IPV6}.get(self._look(at, 1) >> 4, UNKNOWN), at

    def _ethernet(self, at: int) -> tuple[int, int]:
        return self._look(at + 12, 2), at + 14

    def _tag(self, at: int) -> tuple[int, int]:
        return self._look(at + 2, 2), at + 4

    def _mpls(self, at: int) -> tuple[int, int]:
        bottom = self._look(at + 2, 1) & 1
        return self._ip_version(at + 4) if bottom else (MPLS[0], at + 4)

    def _ipv4(self, at: int) -> tuple[int, int]:
        header = (self._look(at, 1) & 15) * 4
        if header < 20:
            return UNKNOWN, 0
        self.kind, self.addresses = 4, [(at + 12, 4), (at + 16, 4)]
        self.spans = [(at + 2, 4), (at + 9, 1)]      # length, id; protocol
        if not self.translated:
            self.spans += self.addresses
        fragment = self._value(at + 6, 2)
        if fragment & 0x1FFF:                        # not the first: no transport header
            self.kind |= NOT_FIRST
            more = fragment & 0xE000
            self.guards.append((at + 6, more | 1, more | 0x1FFF, frozenset()))
            self.spans.append((at + 6, 2))
            return IDENTIFIED, 0
        self._look(at + 6, 2)
        return self._transport(self._look(at + 9, 1), at + header, at + 2, header)

    def _ipv6(self, at: int) -> tuple[int, int]:
        protocol, here = self._look(at + 6, 1), at + 40
        self.kind, self.addresses = 6, [(at + 8, 16), (at + 24, 16)]
        self.spans = [(at + 4, 3)]                   # length, next header
        if not self.translated:
            self.spans += self.addresses
        for _ in range(MOST_HEADERS):
            if protocol not in EXTENSION_HEADERS:
                break
            self.kind |= EXTENDED
            self.spans.append((here, 1))
            extension, protocol, size = protocol, self._look(here, 1), self._look(here + 1, 1)
            if extension == FRAGMENT:
                self.spans.append((here + 4, 4))
                if self._value(here + 2, 2) & 0xFFF8:
                    self.kind |= NOT_FIRST
                    self.guards.append((here + 2, 8, 0xFFFF, frozenset()))
                    self.spans.append((here + 2, 2))
                    return IDENTIFIED, 0
                self._look(here + 2, 2)
                here += 8
            else:
                here += (size + 2) * 4 if extension == AUTHENTICATION else (size + 1) * 8
        return self._transport(protocol, here, at + 4, here - at - 40)

    def _transport(self, protocol: int, at: int, length: int, excess: int) -> tuple[int, int]:
        """Spans of the transport header at an offset, or what it carries.

        The 16-bit field at `length` counts the IP payload and `excess` bytes more.
        """
        if protocol in (IP_IN_IP, IPV6_IN_IP):
            return (IPV4 if protocol == IP_IN_IP else IPV6), at
        if protocol == UDP:
            return self._udp(at)
        if protocol == GRE:
            return self._gre(at)
        if protocol == TCP:
            header, flags = (self._look(at + 12, 1) >> 4) * 4, self._look(at + 13, 1)
            self.spans.append((at, 14))              # ports, sequence and acknowledgment numbers, flags
            if header > 20 and not flags & SYN:      # the time stamps of a retransmission; routers do edit SYNs
                self.spans.append((at + 20, header - 20))
        elif protocol in (ICMP, ICMPV6):
            self.spans += [(at, 2), (at + 4, 4)]     # type and code; identifier and sequence number
        else:
            self._payload(at, length, excess)
        return IDENTIFIED, 0

    def _udp(self, at: int) -> tuple[int, int]:
        port = self._value(at + 2, 2)
        if port in TUNNEL_PORTS:
            self._look(at + 2, 2)
            if port == GENEVE_PORT:
                return self._look(at + 10, 2), at + 16 + (self._look(at + 8, 1) & 63) * 4
            if self._look(at + 8, 1) & 8:            # VXLAN with a valid VNI
                return TRANSPARENT_ETHERNET, at + 16
        else:
            self.guards.append((at + 2, 0, 0xFFFF, TUNNEL_PORTS))
        self.spans.append((at, 6))                   # ports, length
        self._payload(at + 8, at + 4, 8)
        return IDENTIFIED, 0

    def _gre(self, at: int) -> tuple[int, int]:
        flags = self._look(at, 2)                    # checksum, key and sequence number are there or not
        return self._look(at + 2, 2), at + 4 + 4 * ((flags >> 15 & 1) + (flags >> 13 & 1) + (flags >> 12 & 1))

    def _payload(self, at: int, length: int, excess: int) -> None:
        """Up to PAYLOAD bytes at an offset, of which the field at `length` counts `excess` more."""
        size = self._value(length, 2) - excess
        if size >= PAYLOAD:
            self.guards.append((length, excess + PAYLOAD, 0xFFFF, frozenset()))
        else:
            self._look(length, 2)
        self.spans.append((at, max(0, min(size, PAYLOAD))))


class _Layout:
    """The byte ranges of one kind of frame, compiled."""
    __slots__ = ("addresses", "admit", "admitted", "decide", "expected", "fixed", "guards", "identity", "need", "pick",
                 "prefix")

    def __init__(self, frame: bytes, linktype: int, translated: bool = False) -> None:
        found = _Dissection(frame, linktype, translated)
        checks, spans = _joined(found.checks), _joined(found.spans)
        self.guards, self.addresses = found.guards, found.addresses
        self.prefix = bytes((found.kind | TRANSLATED * translated,))
        ranges = [*checks, *spans, *self.addresses, *((at, 2) for at, *_ in self.guards)]
        self.need = max((at + size for at, size in ranges), default=0)
        if self.need > len(frame):
            raise _Truncated
        self.decide = Struct(_form(checks)).unpack_from
        self.pick = Struct(_form(spans)).unpack_from
        self.expected = self.decide(frame, 0)
        # Values for which the guards held once need no second look.
        self.admit = Struct(_form(_joined((at, 2) for at, *_ in self.guards))).unpack_from
        self.admitted: set[tuple[bytes, ...]] = set() if self.guards else {()}
        self.fixed = [(at + i, frame[at + i]) for at, size in checks for i in range(size)]
        self.identity = [at + i for at, size in spans for i in range(size)]

    def guarded(self, data: bytes, at: int) -> bool:
        """Whether the guards of this layout hold for the frame at an offset."""
        for offset, low, high, barred in self.guards:
            value = data[at + offset] << 8 | data[at + offset + 1]
            if not low <= value <= high or value in barred:
                return False
        if len(self.admitted) < MOST_ADMITTED:
            self.admitted.add(self.admit(data, at))
        return True


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The (offset, size) ranges in order; those that touch or overlap are one."""
    out: list[tuple[int, int]] = []
    for at, size in sorted(ranges):
        if out and at <= sum(out[-1]):
            start, known = out[-1]
            out[-1] = start, max(known, at + size - start)
        elif size:
            out.append((at, size))
    return out


def _form(ranges: Iterable[tuple[int, int]]) -> str:
    """The struct format that takes the ranges and skips what lies between them."""
    out, end = "=", 0
    for at, size in ranges:
        out += f"{at - end}x{size}s"
        end = at + size
    return out


def _gather(data: bytes, start: int, stop: int, stride: int, offsets: Sequence[int], width: int,
            first: int = 0) -> bytearray:
    """The bytes at the offsets of equally long records, packed into rows of `width` bytes from column `first` on."""
    rows = bytearray(len(range(start, stop, stride)) * width)
    for column, offset in enumerate(offsets, first):
        rows[column::width] = data[start + offset:stop:stride]
    return rows


def _alike(data: bytes, start: int, stride: int, count: int, fixed: Iterable[tuple[int, int]]) -> int:
    """How many of the records at equal distances have the same given bytes at the given offsets."""
    for offset, value in fixed:
        column = data[start + offset:start + count * stride:stride]
        if column.count(value) != count:
            count -= len(column.lstrip(bytes((value,))))
    return count


class Capture:
    """The packets in a pcap or pcapng file, as blocks of sightings.

    Iterating yields pairs (identities, times in integer nanoseconds) of equal length, and raises CaptureError for
    what is no capture.  With `translated` the addresses take no part in the identities (the path has NAT); with
    `sources` or `destinations` (IP addresses) only packets from and to one of them count.

    The counts are complete when the iteration is: `records` in the file, `other` of them without an IP packet,
    `filtered` of them with other addresses, `cut` of them too short to identify the packet, and `partial`, the
    number of bytes of a last record that is not whole; `last` is the time of the last packet (ns).
    """

    def __init__(self, file: BinaryIO, name: str, *, translated: bool = False, sources: Iterable[str] = (),
                 destinations: Iterable[str] = ()) -> None:
        self.name = name
        self.records = self.other = self.filtered = self.cut = self.partial = 0
        self.precision, self.last = "microseconds", 0
        self.offsets: array[int] | None = None       # of the records of each block, if an array is put here
        self._file, self._translated = file, translated
        self._wanted = [packed_addresses(sources), packed_addresses(destinations)]
        self._order, self._unit, self._linktype = "<", 1, -1
        self._layouts: list[_Layout] = []            # of this link type, the newest first

    def __iter__(self) -> Iterator[Block]:
        base, rest = PCAP_HEADER, b""
        for chunk in self._chunks(self._file.read(PCAP_HEADER)):
            data = rest + chunk if rest else chunk
            keys: list[bytes] = []
            times: array[int] = array("q")
            if self.offsets is not None:
                del self.offsets[:]
            used = self._take(data, base, keys, times)
            base, rest = base + used, data[used:]
            if times:
                self.last = times[-1]
            yield keys, times
        self.partial = self.partial or len(rest)

    @property
    def order(self) -> str:
        """The byte order of the records, as struct writes it."""
        return self._order

    # -- files --

    def _chunks(self, head: bytes) -> Iterator[bytes]:
        """The file's records, a pcapng's as if it were a pcap; chunks may end within a record."""
        if head[:2] == b"\x1f\x8b":
            raise CaptureError(f"{self.name}: compressed: gunzip it first (byte 0)")
        if len(head) < PCAP_HEADER:
            raise CaptureError(f"{self.name}: too short for a capture file (it ends at byte {len(head)})")
        if head[:4] == b"\n\r\r\n":
            yield from self._pcapng(head)
            return
        for self._order in "<>":
            magic, linktype = unpack_from(self._order + "I16xI", head)
            if magic in (0xA1B2C3D4, 0xA1B23C4D):
                break
        else:
            raise CaptureError(f"{self.name}: not a capture file (byte 0: {head[:4].hex()})")
        if magic == 0xA1B23C4D:
            self.precision = "nanoseconds"
        self._unit = 1 if magic == 0xA1B23C4D else 1000
        self._linktype = linktype & 0xFFFF
        if self._linktype not in LINK_TYPES:
            raise CaptureError(f"{self.name}: link type {self._linktype} is not supported (byte 20)")
        yield from iter(lambda: self._file.read(CHUNK), b"")

    def _pcapng(self, data: bytes) -> Iterator[bytes]:
        """The packets of a pcapng file as records of a little-endian nanosecond pcap, whole ones of one link type."""
        order, base, records = "<", 0, []            # type: str, int, list[bytes]
        interfaces: list[tuple[int, int, int]] = []
        record = Struct("<IIII").pack
        while more := self._file.read(CHUNK):
            data, at = data + more, 0
            while at + 12 <= len(data):
                kind, size = unpack_from(order + "II", data, at)
                if kind == 0x0A0D0D0A:               # a new section: its byte order, and interfaces of its own
                    order = {b"\x4d\x3c\x2b\x1a": "<", b"\x1a\x2b\x3c\x4d": ">"}.get(data[at + 8:at + 12], "")
                    if not order:
                        raise CaptureError(f"{self.name}: damaged section header at byte {base + at}")
                    size, = unpack_from(order + "I", data, at + 4)
                    interfaces = []
                if size < 12 or size % 4 or size > LARGEST_BLOCK:
                    raise CaptureError(f"{self.name}: impossible block length {size} at byte {base + at + 4}")
                if at + size > len(data):
                    break
                if kind == 1:
                    interfaces.append(self._interface(data[at + 8:at + size - 4], order))
                elif kind in (2, 6) and size >= 32:  # (obsolete) packet block, enhanced packet block
                    fields = order + ("Hxx4I" if kind == 2 else "5I")
                    number, high, low, kept, length = unpack_from(fields, data, at + 8)
                    if number >= len(interfaces) or kept > size - 32:
                        raise CaptureError(f"{self.name}: damaged packet block at byte {base + at}")
                    linktype, per_second, offset = interfaces[number]
                    time = (high << 32 | low) * NANOSECONDS // per_second + offset * NANOSECONDS
                    if not 0 <= time < NANOSECONDS << 32:
                        raise CaptureError(f"{self.name}: impossible time stamp at byte {base + at + 12}")
                    if linktype != self._linktype:
                        if records:
                            yield b"".join(records)
                        self._linktype, self._layouts, records = linktype, [], []
                    records.append(record(*divmod(time, NANOSECONDS), kept, length))
                    records.append(data[at + 28:at + 28 + kept])
                elif kind == 3:                      # a simple packet block has no time
                    self.records += 1
                    self.other += 1
                at += size
            base, data = base + at, data[at:]
            if records:
                yield b"".join(records)
            records = []
        self.partial = len(data)

    def _interface(self, body: bytes, order: str) -> tuple[int, int, int]:
        """(link type, ticks per second, seconds to add) of an interface description block."""
        linktype, at = int.from_bytes(body[:2], "little" if order == "<" else "big"), 8
        per_second, offset = 1_000_000, 0
        while at + 4 <= len(body):
            code, size = unpack_from(order + "HH", body, at)
            value = body[at + 4:at + 4 + size]
            if code == 9 and value:                  # if_tsresol
                per_second = 2 ** (value[0] & 127) if value[0] & 128 else 10 ** value[0]
            elif code == 14 and len(value) == 8:     # if_tsoffset
                offset, = unpack_from(order + "q", value)
            elif not code:
                break
            at += 4 + (size + 3 & ~3)
        if per_second >= NANOSECONDS:
            self.precision = "nanoseconds"
        return linktype, per_second, offset

    # -- records --

    def _take(self, data: bytes, base: int, keys: list[bytes], times: array[int]) -> int:
        """Adds the whole records of data; returns how many bytes they have."""
        head = Struct(self._order + "III").unpack_from
        unit, layouts, join, filtered = self._unit, self._layouts, b"".join, any(self._wanted)
        add_key, add_time = keys.append, times.append
        at, end, attempt, last = 0, len(data), 0, -1         # attempt: where to look for a run again
        while at + 16 <= end:
            seconds, fraction, size = head(data, at)
            stride = 16 + size
            if at + stride > end:
                if size > LARGEST_RECORD:
                    raise CaptureError(f"{self.name}: impossible record length {size} at byte {base + at + 8}")
                break
            frame = at + 16
            for place, layout in enumerate(layouts):
                if (size >= layout.need and layout.decide(data, frame) == layout.expected
                        and (layout.admit(data, frame) in layout.admitted or layout.guarded(data, frame))):
                    if place > 1:                    # what comes often is found first
                        layouts.insert(0, layouts.pop(place))
                    break
            else:
                learned = self._learn(data, at, stride)
                if learned is None:
                    at += stride
                    continue
                layout = learned
            far = at + SHORTEST_RUN * stride
            if size == last and at >= attempt and data[far + 8:far + 12] == data[at + 8:at + 12]:
                known = len(keys)
                count = self._run(data, at, stride, layout, keys, times)
                if count:
                    if self.offsets is not None and len(keys) > known:
                        self.offsets.extend(range(base + at, base + at + count * stride, stride))
                    at += count * stride
                    continue
                attempt = far
            last = size
            self.records += 1
            if not layout.identity:
                self.other += 1
            elif filtered and not self._passes(data, frame, layout):
                self.filtered += 1
            else:
                if self.offsets is not None:
                    self.offsets.append(base + at)
                add_key(layout.prefix + join(layout.pick(data, frame)))
                add_time(seconds * NANOSECONDS + fraction * unit)
            at += stride
        return at

    def _passes(self, data: bytes, frame: int, layout: _Layout) -> bool:
        """Whether the addresses of a packet are among those that are wanted."""
        return all(not wanted or data[frame + at:frame + at + size] in wanted
                   for (at, size), wanted in zip(layout.addresses, self._wanted))

    def _learn(self, data: bytes, at: int, stride: int) -> _Layout | None:
        """The layout of the record at an offset; None, and counted, if it holds no whole packet."""
        size, = unpack_from(self._order + "I", data, at + 12)
        try:
            layout = _Layout(data[at + 16:at + stride], self._linktype, self._translated)
        except _Truncated:
            self.records += 1
            if stride - 16 < size:
                self.cut += 1
            else:
                self.other += 1                      # whole, yet shorter than its headers say: malformed
            return None
        self._layouts.insert(0, layout)
        del self._layouts[MOST_LAYOUTS:]
        return layout

    def _run(self, data: bytes, start: int, stride: int, layout: _Layout, keys: list[bytes],
             times: array[int]) -> int:
        """Adds a run of records of one length and layout, if there is a long one; returns how many they are."""
        fixed = layout.fixed
        if any(self._wanted):                        # then the run is of one flow, wanted or not
            fixed = fixed + [(at + i, data[start + 16 + at + i]) for at, size in layout.addresses for i in range(size)]
        count = (len(data) - start) // stride
        count = _alike(data, start, stride, count, [(8 + i, data[start + 8 + i]) for i in range(4)])
        count = _alike(data, start, stride, count, [(16 + at, value) for at, value in fixed])
        for at, low, high, barred in layout.guards:
            rows = _gather(data, start + 16, start + count * stride, stride, (at, at + 1), 2)
            values = [value for value, in iter_unpack(">H", rows)]
            bad = {value for value in set(values) if not low <= value <= high or value in barred}
            if bad:
                count = next(i for i, value in enumerate(values) if value in bad)
        if count < SHORTEST_RUN:
            return 0
        self.records += count
        if not layout.identity:
            self.other += count
            return count
        if not self._passes(data, start + 16, layout):
            self.filtered += count
            return count
        stop, width = start + count * stride, 1 + len(layout.identity)
        rows = _gather(data, start + 16, stop, stride, layout.identity, width, 1)
        rows[::width] = layout.prefix * count
        keys += [key for key, in iter_unpack(f"{width}s", rows)]
        # Seconds and fractions as two huge numbers with a 64-bit digit for each packet: two multiplications.
        digits = (0, 1, 2, 3) if self._order == "<" else (3, 2, 1, 0)
        seconds, fractions = (int.from_bytes(_gather(data, start + field, stop, stride, digits, 8), "little")
                              for field in (0, 4))
        run = array("q", (seconds * NANOSECONDS + fractions * self._unit).to_bytes(8 * count, "little"))
        if sys.byteorder == "big":
            run.byteswap()
        times.extend(run)
        return count


def packed_addresses(addresses: Iterable[str]) -> frozenset[bytes]:
    """IP addresses as they stand in a packet."""
    wanted = list(addresses)
    if not wanted:
        return frozenset()
    from ipaddress import ip_address
    return frozenset(ip_address(address).packed for address in wanted)


def describe(identity: bytes) -> dict[str, Any]:
    """The fields of an identity, for people; those that it doesn't have are missing."""
    if identity[0] == TEXT:
        return {"sequence": identity[1:].decode()}
    kind, version = identity[0], identity[0] & 15
    fields: dict[str, Any] = {"length": int.from_bytes(identity[1:3], "big") + (40 if version == 6 else 0)}
    if version == 4:
        fields["ip_id"], at = int.from_bytes(identity[3:5], "big"), 5
        if kind & NOT_FIRST:
            fields["fragment_offset"], at = (int.from_bytes(identity[5:7], "big") & 0x1FFF) * 8, 7
        protocol, at = identity[at], at + 1
    else:
        protocol, at = identity[3], 4
    if not kind & TRANSLATED:
        from ipaddress import ip_address
        size = 4 if version == 4 else 16
        fields["source"] = str(ip_address(identity[at:at + size]))
        fields["destination"] = str(ip_address(identity[at + size:at + 2 * size]))
        at += 2 * size
    if kind & EXTENDED:
        return fields
    fields["protocol"] = {ICMP: "ICMP", ICMPV6: "ICMPv6", TCP: "TCP", UDP: "UDP"}.get(protocol, str(protocol))
    if not kind & NOT_FIRST and protocol in (TCP, UDP):
        fields["source_port"], fields["destination_port"] = unpack_from(">HH", identity, at)
    if not kind & NOT_FIRST and protocol == TCP:
        fields["sequence"], fields["acknowledgment"] = unpack_from(">II", identity, at + 4)
    if not kind & NOT_FIRST and protocol in (ICMP, ICMPV6):
        fields["icmp_type"], fields["icmp_code"], fields["identifier"], fields["sequence"] = unpack_from(
            ">BBHH", identity, at)
    return fields


def _probe(identity: bytes) -> tuple[int, bytes, bytes, int] | None:
    """IP protocol, source, destination, and the offset of the transport header; None if it isn't one packet's own."""
    kind, version = identity[0], identity[0] & 15
    if version not in (4, 6) or kind & (NOT_FIRST | TRANSLATED | EXTENDED):
        return None
    at, size = (6, 4) if version == 4 else (4, 16)
    return identity[at - 1], identity[at:at + size], identity[at + size:at + 2 * size], at + 2 * size


def expected_answers(identity: bytes) -> list[bytes]:
    """What `answer_key` gives for the answer to a packet, which is one of these; none if the packet is no probe.

    A SYN's data may be acknowledged with it or not.
    """
    probe = _probe(identity)
    if probe is None:
        return []
    protocol, source, destination, at = probe
    if protocol == TCP and identity[at + 13] & (FIN | SYN | RST | ACK) == SYN:
        ports, (sequence,) = identity[at + 2:at + 4] + identity[at:at + 2], unpack_from(">I", identity, at + 4)
        length = int.from_bytes(identity[1:3], "big") - (20 if len(source) == 4 else 0) - (identity[at + 12] >> 4) * 4
        return [b"T" + destination + source + ports + ((sequence + 1 + data) & 0xFFFFFFFF).to_bytes(4, "big")
                for data in {0: 0, max(0, length): 0}]
    if (protocol, identity[at:at + 1]) in ((ICMP, b"\x08"), (ICMPV6, b"\x80")):
        return [b"E" + destination + source + identity[at + 2:at + 6]]
    return []


def answer_key(identity: bytes) -> bytes | None:
    """What tells to which probe a packet is the answer; None if it is none: SYN/ACK, RST or echo reply."""
    answer = _probe(identity)
    if answer is None:
        return None
    protocol, source, destination, at = answer
    if protocol == TCP and identity[at + 13] & (RST | ACK) and identity[at + 13] & (SYN | RST):
        return b"T" + source + destination + identity[at:at + 4] + identity[at + 8:at + 12]
    if (protocol, identity[at:at + 1]) in ((ICMP, b"\0"), (ICMPV6, b"\x81")):
        return b"E" + source + destination + identity[at + 2:at + 6]
    return None


class TextCapture:
    """The packets in a text capture, one a line, as one block of sightings.

    The identity is column `seq_no_col` (from 0, columns are separated by white space), of which part
    `seq_no_split_index` counts after a split by `seq_no_split_by` (None or "": the whole column).  The time is
    column `timestamp_col`: HH:MM:SS[.fraction], after a date YYYY-MM-DD in the column before it if there is one,
    or seconds since the epoch.  Times without a date start again at midnight: a step back by more than half a day
    is a new day.  Lines without these columns are counted in `skipped`.
    """

    def __init__(self, lines: Iterable[str], seq_no_col: int, timestamp_col: int, seq_no_split_by: str | None = None,
                 seq_no_split_index: int = 0) -> None:
        self.records = self.skipped = 0
        self.dated = False
        self._lines = lines
        self._columns = seq_no_col, timestamp_col
        self._split = seq_no_split_by, seq_no_split_index

    def __iter__(self) -> Iterator[Block]:
        sequence, stamp = self._columns
        split_by, split_index = self._split
        keys: list[bytes] = []
        times: array[int] = array("q")
        days = last = 0
        for line in self._lines:
            columns = line.split()
            if not columns:
                continue
            try:
                key = columns[sequence]
                if split_by:
                    key = key.split(split_by)[split_index]
                time, clock = _text_time(columns[stamp]), ":" in columns[stamp]
                date = _text_date(columns[stamp - 1]) if clock and stamp else None
            except (IndexError, ValueError):
                self.skipped += 1
                continue
            if clock and date is None:
                if last - time > DAY // 2:
                    days += 1
                last = time
                time += days * DAY
            elif date is not None:
                time += date * DAY
            self.dated |= date is not None or not clock
            keys.append(bytes((TEXT,)) + key.encode(errors="replace"))
            times.append(time)
        self.records = len(keys)
        yield keys, times


DAY = 86_400 * NANOSECONDS


def _text_time(text: str) -> int:
    """Nanoseconds since midnight of HH:MM:SS[.fraction], or since the epoch of seconds[.fraction]."""
    found = re.fullmatch(r"(?:(\d\d?):(\d\d):)?(\d+)(?:[.,](\d{1,9}))?", text, re.ASCII)
    if not found or len(found[3]) > 10:
        raise ValueError(text)
    hours, minutes, seconds = int(found[1] or 0), int(found[2] or 0), int(found[3])
    return ((hours * 60 + minutes) * 60 + seconds) * NANOSECONDS + int((found[4] or "").ljust(9, "0"))


def _text_date(text: str) -> int | None:
    """Days since the epoch of YYYY-MM-DD; None for other text."""
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
        return None
    import datetime
    return datetime.date.fromisoformat(text).toordinal() - datetime.date(1970, 1, 1).toordinal()


# ---- Analysis: sightings in, numbers out --------------------------------------------------------------------
# RFC 7679 and its kin speak of a packet's one-way delay between two points; here D = t_vif - t_pif in integer
# nanoseconds.  A lost packet has no delay.

LOST = -1 << 63
ABREAST = 32                                         # packets that are compared at once while they come in order
LONGEST_DELAY = 1 * NANOSECONDS                      # in one host; a longer one is hardly true
SAMPLE = 1000                                        # unmatched packets that are kept to find out why


class Matching:
    """Which packets that passed one point (the pif, say) were seen at a second one (the vif), and when.

    By the packet's rank in the order of the first point: `identities`, `sent` (the time there) and `delays` (D, or
    LOST), in nanoseconds; `arrivals` are the ranks of the matched packets in the order of the second.  `first` and
    `second` count the sightings, `duplicated` the copies at the second beyond those at the first (`extra_copies` by
    rank), `second_only` the sightings of packets never seen at the first (`stranger_times` are all of their times,
    `strangers` the first identities).  `alike` are the ranks of the packets that share their identity with another one.
    """
    __slots__ = ("alike", "arrivals", "delays", "extra_copies", "identities", "sent", "stranger_times", "strangers")

    def __init__(self) -> None:
        self.identities: list[bytes] = []
        self.sent: array[int] = array("q")
        self.delays: array[int] = array("q")
        self.arrivals: array[int] = array("I")
        self.extra_copies: dict[int, int] = {}
        self.strangers: list[bytes] = []
        self.stranger_times: array[int] = array("q")
        self.alike: set[int] = set()

    @property
    def first(self) -> int:
        return len(self.sent)

    @property
    def second(self) -> int:
        return self.matched + self.duplicated + self.second_only

    @property
    def duplicated(self) -> int:
        return sum(self.extra_copies.values())

    @property
    def second_only(self) -> int:
        return len(self.stranger_times)

    @property
    def matched(self) -> int:
        return len(self.arrivals)

    @property
    def lost(self) -> int:
        return self.first - self.matched

    def samples(self) -> list[int]:
        """The delays of the matched packets, in the order of the first point."""
        return [delay for delay in self.delays if delay != LOST] if self.lost else self.delays.tolist()


def match(first: Iterable[Block], second: Iterable[Block], early: Container[bytes] = ()) -> Matching:
    """Pairs the sightings at one point with those at a second: the k-th copy of a packet with its k-th copy.

    What was seen at the first before anything counted is `early`; at the second it is no stranger, and counts neither.
    """
    result = Matching()
    identities, sent, known = result.identities, result.sent, {}       # type: list[bytes], array[int], dict[bytes, int]
    copies: dict[bytes, list[int]] = {}              # the ranks of further copies, by identity
    for keys, times in first:
        start, distinct = len(identities), len(known)
        ranks = list(map(known.setdefault, keys, count(start)))
        identities += keys
        sent.extend(times)
        if len(known) - distinct < len(keys):
            for rank, (key, original) in enumerate(zip(keys, ranks), start):
                if rank != original:
                    copies.setdefault(key, []).append(rank)
    order: list[bytes | None] = [*identities, None] if copies else identities    # type: ignore[assignment]
    for key, ranks in copies.items():
        result.alike.update(ranks, (known[key],))
        for rank in ranks:
            order[rank] = None                       # never the expected one
    further = {key: iter(ranks) for key, ranks in copies.items()}
    size = len(sent)
    result.delays = delays = array("q", [LOST]) * size
    arrivals, seen, find = result.arrivals, bytearray(size), known.get
    expected = 0
    for keys, times in second:
        for place in range(0, len(keys), ABREAST):
            some, when = keys[place:place + ABREAST], times[place:place + ABREAST]
            until = expected + len(some)
            if some == order[expected:until] and 1 not in seen[expected:until]:
                delays[expected:until] = array("q", map(sub, when, sent[expected:until]))
                seen[expected:until] = b"\1" * len(some)
                arrivals.extend(range(expected, until))
                expected = until
                continue
            for key, time in zip(some, when):
                if expected < size and order[expected] == key:
                    rank = expected
                else:
                    rank = find(key, -1)
                    if rank < 0:
                        if key in early:
                            continue
                        result.stranger_times.append(time)
                        if len(result.strangers) < SAMPLE:
                            result.strangers.append(key)
                        continue
                if seen[rank]:
                    original, rank = rank, next(further.get(key, iter(())), -1)
                    if rank < 0:
                        result.extra_copies[original] = result.extra_copies.get(original, 0) + 1
                        continue
                seen[rank] = 1
                delays[rank] = time - sent[rank]
                arrivals.append(rank)
                expected = rank + 1
    return result


def within(matching: Matching, start: int, first_end: int, second_end: int) -> Matching:
    """What is left of a matching when only the time counts in which both captures certainly ran (ns).

    Both saw everything from `start` on, the first until `first_end` and the second until `second_end`.  A packet counts
    if it passed the first point in that time, and so early that even the longest delay would have brought it to the
    second in time; one that only the second saw, if it can't have passed the first before `start`.
    """
    longest = max(0, max(matching.delays, default=0))
    end = min(first_end, second_end - longest)
    ranks = [rank for rank, time in enumerate(matching.sent) if start <= time <= end]
    times = [time for time in matching.stranger_times if start + longest <= time <= first_end]
    if len(ranks) == matching.first and len(times) == matching.second_only:
        return matching
    new = {rank: place for place, rank in enumerate(ranks)}
    kept = Matching()
    kept.identities = [matching.identities[rank] for rank in ranks]
    kept.sent, kept.delays = (array("q", map(values.__getitem__, ranks)) for values in (matching.sent, matching.delays))
    kept.arrivals.extend(new[rank] for rank in matching.arrivals if rank in new)
    kept.extra_copies = {new[rank]: copies for rank, copies in matching.extra_copies.items() if rank in new}
    kept.alike = {new[rank] for rank in matching.alike if rank in new}
    kept.stranger_times.extend(times)
    kept.strangers = matching.strangers
    return kept


def merged(captures: Sequence[Iterable[Block]]) -> Iterator[Block]:
    """The blocks of one capture, or those of several (the slaves of a bond) as one block in the order of time."""
    if len(captures) == 1:
        yield from captures[0]
        return
    rows = [(time, key) for capture in captures for keys, times in capture for key, time in zip(keys, times)]
    rows.sort(key=itemgetter(0))
    yield [key for _, key in rows], array("q", [time for time, _ in rows])


def since(blocks: Iterable[Block], start: int, early: set[bytes] | None = None) -> Iterator[Block]:
    """The sightings from a time on (ns); the identities of those before are added to `early`.

    What one capture saw before the other was there must not be taken for the first copy of a later packet.
    """
    for keys, times in blocks:
        if times and min(times) < start:
            if early is not None:
                early.update(key for key, time in zip(keys, times) if time < start)
            kept = [place for place, time in enumerate(times) if time >= start]
            keys, times = [keys[place] for place in kept], array("q", map(times.__getitem__, kept))
        yield keys, times


def guest_times(inbound: Matching, outbound: Matching) -> tuple[list[int], dict[str, int]]:
    """How long the VM took from each probe's passing the vif to its answer's (ns).

    A probe is a TCP SYN, answered by acknowledgment number, or an ICMP echo request, answered by identifier and
    sequence number.  Takes the matchings from pif to vif and from vif to pif.  Also counts the probes on the vif:
    `answered`, `unanswered`, and `ambiguous`: sent several times, so that their answers can't be told apart.
    """
    probes: dict[bytes, int] = {}                    # by what their answer will have; when they came to the vif
    keys: dict[bytes, list[bytes]] = {}
    ambiguous = 0
    for rank in inbound.arrivals:
        expected = expected_answers(inbound.identities[rank])
        if not expected:
            continue
        arrived = inbound.sent[rank] + inbound.delays[rank]
        ambiguous += expected[0] in keys
        keys[expected[0]] = [] if expected[0] in keys else expected
        probes.update(dict.fromkeys(expected, arrived))
    repeated = sum(not expected for expected in keys.values())
    first: dict[bytes, int] = {}
    for identity, time in zip(outbound.identities, outbound.sent):
        key = answer_key(identity)
        if key is not None and time >= probes.get(key, time + 1):
            first.setdefault(key, time)
    times = [min(first[key] for key in expected if key in first) - probes[expected[0]]
             for expected in keys.values() if any(key in first for key in expected)]
    unanswered = len(keys) - repeated - len(times)
    return times, {"answered": len(times), "unanswered": unanswered, "ambiguous": ambiguous + repeated}


def reordering(arrivals: Sequence[int]) -> dict[int, int]:
    """The reordered packets (RFC 4737: type-P-reordered): their ranks, with the extent of each.

    Takes the ranks of the unique packets in the order in which they arrived.
    """
    if all(map(le, arrivals, islice(arrivals, 1, None))):
        return {}
    extents = {}
    newest, peaks, places = -1, [], []               # type: int, list[int], list[int]
    for place, rank in enumerate(arrivals):
        if rank > newest:
            newest = rank
            peaks.append(rank)
            places.append(place)
        else:                                        # back to the earliest arrival that was sent later
            extents[rank] = place - places[bisect(peaks, rank)]
    return extents


def variation(delays: Sequence[int]) -> float | None:
    """The mean absolute IPDV (RFC 3393) in nanoseconds: between consecutive packets that both arrived; None if none."""
    if LOST in delays:
        steps = [abs(b - a) for a, b in zip(delays, islice(delays, 1, None)) if a != LOST and b != LOST]
    else:
        steps = list(map(abs, map(sub, islice(delays, 1, None), delays)))
    return sum(steps) / len(steps) if steps else None


def statistics(delays: Iterable[int]) -> dict[str, Any]:
    """Average, extremes, population standard deviation and percentiles of delays, exact until the last rounding.

    Takes integer nanoseconds, at least one, and returns microseconds.
    """
    ranked = sorted(delays)
    size, total = len(ranked), sum(ranked)
    squares = sum(map(mul, ranked, ranked))

    def percentile(permille: int) -> float:          # linear between the two nearest ranks
        low, part = divmod(permille * (size - 1), 1000)
        high = min(low + 1, size - 1)
        return (ranked[low] * 1000 + (ranked[high] - ranked[low]) * part) / 1_000_000

    return {
        "average": total / size / 1000,
        "minimum": ranked[0] / 1000,
        "maximum": ranked[-1] / 1000,
        "stdev": (size * squares - total * total) ** 0.5 / size / 1000,
        "median": percentile(500),
        "percentiles": {"90": percentile(900), "95": percentile(950), "99": percentile(990), "99.9": percentile(999)},
        "pdv": (percentile(990) * 1000 - ranked[0]) / 1000,
        "negative": bisect_left(ranked, 0),
    }


BLOCKS, SHORTEST_BLOCK, RESAMPLES, CONFIDENCE = 25, 10, 2000, 0.95
ENOUGH_FOR_P99 = 500                                 # packets; of fewer hardly one is above it
# By so much equal runs may differ on a busy host: a share of the baseline, and in any case so many microseconds.
RUN_TO_RUN = {"median": (0.1, 1.0), "p99": (0.3, 5.0), "loss_ratio": (0.0, 0.0)}
CANDIDATES = 500                                     # values of which a resampled percentile is one


class _Blocks:
    """The packets of a matching in successive blocks, to draw samples from: neighbours are not independent."""

    def __init__(self, matching: Matching) -> None:
        size = matching.first
        self.number = max(1, min(BLOCKS, size // SHORTEST_BLOCK))
        bounds = [size * i // self.number for i in range(self.number + 1)]
        blocks = [sorted(delay for delay in matching.delays[a:b] if delay != LOST)
                  for a, b in zip(bounds, islice(bounds, 1, None))]
        self._sent = [b - a for a, b in zip(bounds, islice(bounds, 1, None))]
        self._matched = list(map(len, blocks))
        self.ranked = sorted(matching.samples())
        self._columns = {permille: self._column(blocks, self.ranked, *window)
                         for permille, window in {500: (0.2, 0.8), 990: (0.95, 1.0)}.items()}

    @staticmethod
    def _column(blocks: Sequence[list[int]], ranked: Sequence[int], low: float, high: float) -> Column:
        """Values of a range of ranks, and for each how many of each block are not above it."""
        first, last = int(low * len(ranked)), int(high * len(ranked)) - 1
        step = max(1, (last - first) // CANDIDATES)
        values = sorted({ranked[0], *(ranked[rank] for rank in range(first, last, step)), ranked[-1]})
        return values, [[bisect(block, value) for block in blocks] for value in values]

    def draw(self, generator: random.Random) -> tuple[float, float, float] | None:
        """Median, 99th percentile (ns) and loss ratio of as many blocks, drawn with repetition; None if all is lost."""
        weights = [0] * self.number
        for block in generator.choices(range(self.number), k=self.number):
            weights[block] += 1
        matched = sum(map(mul, weights, self._matched))
        if not matched:
            return None
        found = []
        for permille, (values, below) in self._columns.items():
            place = bisect_left(below, permille * matched,
                                key=lambda counts: 1000 * sum(map(mul, weights, counts)))
            found.append(values[place])
        return found[0], found[1], 1 - matched / sum(map(mul, weights, self._sent))


def compare(baseline: Matching, current: Matching) -> dict[str, Any]:
    """The shift of median and 99th percentile (µs) and of the loss ratio from one measurement to another.

    Each with an interval by block bootstrap (Carlstein 1986): blocks of successive packets are drawn with repetition,
    in each measurement by itself.  The intervals are widened as Student's t is for so few blocks, and hold together
    with a probability of CONFIDENCE (Bonferroni).  A shift is distinguishable from no change if its interval doesn't
    contain zero and, since one run doesn't tell how much the next one would differ by itself, it is more than
    RUN_TO_RUN says.  Too few packets for the 99th percentile have neither.  Always gives the same result.
    """
    from random import Random
    from statistics import NormalDist
    generator, sides = Random(1), [_Blocks(baseline), _Blocks(current)]
    shifts: list[tuple[float, ...]] = []
    for _ in range(RESAMPLES):
        before, after = (side.draw(generator) for side in sides)
        if before and after:
            shifts.append(tuple(map(sub, after, before)))
    tail = (1 - CONFIDENCE) / 3 / 2
    normal, freedom = NormalDist().inv_cdf(1 - tail), max(1, min(side.number for side in sides) - 1)
    wider = 1 + (normal * normal + 1) / (4 * freedom)        # of Student's t to the normal distribution's quantile
    figures = [statistics(side.ranked) for side in sides]
    points = {"median": ([each["median"] for each in figures], 1000),
              "p99": ([each["percentiles"]["99"] for each in figures], 1000),
              "loss_ratio": ([matching.lost / matching.first for matching in (baseline, current)], 1)}
    result: dict[str, Any] = {}
    for place, (name, ((before, after), unit)) in enumerate(points.items()):
        ranked = sorted(shift[place] / unit for shift in shifts)
        cut, shift = int(tail * len(ranked)), after - before
        interval = [shift + wider * (end - shift) for end in (ranked[cut], ranked[-1 - cut])]
        if name == "p99" and min(baseline.matched, current.matched) < ENOUGH_FOR_P99:
            interval = []
        share, least = RUN_TO_RUN[name]
        usual = max(share * abs(before), least)
        certain = abs(shift) > usual and not interval[0] <= 0 <= interval[1] if interval else None
        result[name] = {"baseline": before, "current": after, "shift": shift, "interval": interval or None,
                        "run_to_run": usual, "distinguishable": certain}
    return {**result, "distinguishable": any(part["distinguishable"] for part in result.values()),
            "confidence": CONFIDENCE, "resamples": len(shifts), "blocks": [side.number for side in sides]}


# ---- Remote: one SSH connection, and commands that certainly end ---------------------------------------------
# Every remote command runs under WRAPPER, which is fed to `sh` on standard input: login shells of any kind see
# nothing but "exec sh", and no process list shows an argument.  What remains of standard input is a lease: lines
# that say "stop" (end the command), "bye" (end everything), "mark" (tell the time) or "alive".  The command ends, and
# its directory is removed, when the lease ends (the client died), when it is not renewed for IDLE seconds (the network
# did) and after LIMIT seconds.  Its file takes no more than SIZE KiB, nor than half of the free space divided by SHARE.
# POSIX sh and coreutils only: dom0s have neither Python nor, some of them, timeout(1).

WRAPPER = r"""
umask 077
LC_ALL=C; export LC_ALL
dir= p= lease= dog= group= detach= gone=
command -v setsid >/dev/null 2>&1 && detach=setsid group=-
tell() { kill -s "$1" -- "$group$p" || kill -s "$1" "$p"; } 2>/dev/null
linger() { for i in 1 2 3; do tell 0 || return 0; sleep 1; done; tell KILL; }
finish() {
  trap '' HUP INT TERM PIPE; trap - EXIT; exec 2>/dev/null         # stdout stays: its end says that all is done
  if [ -n "$p" ]; then
    tell TERM
    (for i in 1 2 3; do sleep 1; done; tell KILL) 3<&- 4>&- >/dev/null & killer=$!
    wait "$p"; kill -s KILL $killer; linger
  fi
  for i in $lease $dog; do kill -s KILL $i; done     # a young subshell can lose any other signal
  [ -z "$dir" ] || rm -rf "$dir"
}
bound() {
  set -- `df -Pk "$dir" | sed -n '$p'`
  case ${4:-x} in *[!0-9]*) ;; *) [ "$SIZE" -le $(($4 / 2 / SHARE)) ] || SIZE=$(($4 / 2 / SHARE)) ;; esac
  [ "$SIZE" -ge 64 ] || { echo "no space left in ${dir%/*}" >&2; return 1; }
  units=1; ulimit -S -f 8                            # in units of 512 bytes or of 1024: it depends on the shell
  case `grep '^Max file size' /proc/self/limits` in *" 4096 "*) units=2 ;; esac
  ulimit -f $((SIZE * units)); trap '' XFSZ
}
main() {
  exec 3<&0 </dev/null 4>&1                          # only here: shells read their script bit by bit
  trap finish EXIT; trap 'gone=1' HUP INT TERM PIPE
  case $OUTPUT in
    -|/*) ;;
    *) dir=`mktemp -d "${TMPDIR:-/tmp}/netweaver.XXXXXXXXXX"` && bound || exit 70; OUTPUT=$dir/$OUTPUT ;;
  esac
  printf '\n%s begin %s %s\n' "$TOKEN" "${dir:--}" "$SIZE"
  if [ "$OUTPUT" = - ]; then $detach sh -c "$COMMAND" 3<&- 4>&- &
  else $detach sh -c "$COMMAND" >"$OUTPUT" 3<&- 4>&- & fi
  p=$!
  (trap 'n=0' USR1; t=0 n=0
   while [ $t -lt "$LIMIT" ] && [ $n -lt "$IDLE" ]; do
     sleep 1; t=$((t + 1)) n=$((n + 1)); kill -s 0 $$ || break
   done
   kill -s TERM $$; for i in 1 2 3 4 5; do sleep 1; kill -s 0 $$ || break; done
   tell KILL; rm -rf "$dir") 3<&- 4>&- >/dev/null 2>&1 & dog=$!
  (while read -r line; do
     case $line in
       alive) kill -s USR1 $dog ;;
       mark) printf '\n%s mark %s\n' "$TOKEN" "`date +%s%N`" >&4 ;;
       stop) tell TERM ;;
       bye) break ;;
     esac
   done
   kill -s TERM $$ || { tell KILL; rm -rf "$dir"; }) <&3 >/dev/null 2>&1 & lease=$!
  trap 'exit 143' HUP INT TERM PIPE; [ -z "$gone" ] || exit 143
  wait "$p"; status=$?; linger; p=
  printf '\n%s end %s\n' "$TOKEN" "$status"; printf '\n%s end %s\n' "$TOKEN" "$status" >&2
  [ -z "$dir" ] || wait "$lease"
  exit 0
}
main
"""

CONNECT_SECONDS, CONNECT_ATTEMPTS = 10, 5            # for each step of a connection; a busy sshd drops new ones
ANSWER_SECONDS = 12                                  # for a look-up or a tool's start or end
ALIVE_SECONDS, IDLE_SECONDS = 2, 10
DEAD_PEER_SECONDS = 8                                # unacknowledged data after which the network is down
SLOWEST_TRANSFER = 100_000                           # bytes per second
SUDO_SHELL = ("""exec sh -c 'if [ "$(id -u)" = 0 ]; then exec sh; elif sudo -n sh -c :; then exec sudo -n sh; """
              "else read line; exit 1; fi'")         # it has been sent something when it ends
SUDO_HINT = " (--sudo needs a rule with NOPASSWD in that host's sudoers)"
LARGEST_ANSWER = 1 << 20


class Target:
    """Whom to log in as, and where: `[user@]host[:port]`, IPv6 literals in brackets when a port follows.

    `user` and `port` are None where the text doesn't say: then ~/.ssh/config does, or they are root and 22.
    """
    __slots__ = ("host", "port", "user")

    def __init__(self, text: str) -> None:
        user, at, place = text.rpartition("@")
        found = re.fullmatch(r"(?:\[([^]]+)]|([^:]+))(?::(\d{1,5}))?", place)
        if not found and place.count(":") > 1:       # a bare IPv6 literal
            found = re.fullmatch(r"()([0-9A-Fa-f:.]+(?:%\w+)?)()", place)
        self.user = user if at else None
        self.host = (found[1] or found[2]) if found else ""
        self.port = int(found[3]) if found and found[3] else None
        if (not re.fullmatch(r"[\w.:%][\w.:%-]*", self.host, re.ASCII) or self.port not in (None, *range(1, 65536))
                or (at and not re.fullmatch(r"[\w.][\w.@\\$-]*", user))):
            raise UsageError(f"{text!r} is not [user@]host[:port] (an IPv6 address with a port goes in brackets)")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.user or 'root'}@{host}" + (f":{self.port}" if self.port not in (None, 22) else "")


class Job:
    """A command that runs on a host under WRAPPER, and what is known of it so far.

    `directory` is set when it was started ("-" if it has none), and `size_limit` (bytes) with it; `status` is its exit
    status once it has ended, and `ended` is also true when the connection broke before.  `output` is its standard
    output, if that was asked for (in `sink` instead, if there is one; `flooded` if it was more than it may be),
    `errors` the end of its standard error, and `mark` the host's time in nanoseconds when it was last asked.
    `changed` is notified whenever one of them changes.
    """

    def __init__(self, host: str, command: str, channel: paramiko.Channel, token: str, changed: threading.Condition,
                 sink: IO[bytes] | None = None, most: int = LARGEST_ANSWER) -> None:
        import threading
        self.host, self.command = host, command
        self.directory: str | None = None
        self.size_limit = 0
        self.status: int | None = None
        self.mark: int | None = None
        self.ended = self.stopped = self.flooded = self._complete = self._left = False
        self.output = b""
        self._channel, self._changed, self._sink, self._most = channel, changed, sink, most
        self._out, self._errors = bytearray(), bytearray()
        self._speaking = threading.Lock()
        word = re.escape(token.encode())
        self._begin = re.compile(rb"\n%b begin (-|/\S+) (\d+)\n" % word, re.ASCII)
        self._mark = re.compile(rb"\n%b mark (\S+)\n" % word, re.ASCII)
        self._end = re.compile(rb"\n%b end (\d{1,3})\n" % word, re.ASCII)
        self._tail = len(token) + 64                 # what may be the beginning of one of these lines
        self._reader = threading.Thread(target=self._read, name=f"netweaver {host}", daemon=True)
        self._reader.start()

    @property
    def errors(self) -> str:
        return bytes(self._errors).decode(errors="replace")

    def say(self, word: str) -> None:
        """Sends a word of the lease; a broken connection has ended the lease by itself.

        Nothing is sent when the host is about to close the channel: what paramiko sends on a channel just as it closes
        makes sshd end the whole connection.
        """
        with self._speaking:
            over = self.status is not None or self._complete
            if self._left or (over and self.directory in (None, "-")):
                return
            self._left = word == "bye"
            try:
                self._channel.sendall(word.encode() + b"\n")
            except (OSError, EOFError):
                pass

    def stop(self) -> None:
        """Asks the command to end; what it wrote stays until `leave`."""
        self.stopped = True
        self.say("stop")

    def leave(self, seconds: float = ANSWER_SECONDS) -> None:
        """Ends everything on the host; returns when it has ended there, or the time is over."""
        self.say("bye")
        self._reader.join(seconds)
        close(self._channel)

    def _read(self) -> None:
        import select
        import time
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        beat = time.monotonic()
        try:
            while True:
                poll.poll(1000 * ALIVE_SECONDS)
                over = self._channel.closed or self._channel.eof_received
                while self._channel.recv_ready():
                    self._take(self._channel.recv(65536))
                while self._channel.recv_stderr_ready():
                    self._take_errors(self._channel.recv_stderr(65536))
                if over:
                    break
                if time.monotonic() - beat > ALIVE_SECONDS:
                    beat = time.monotonic()
                    self.say("alive")
        except (OSError, EOFError):
            pass
        finally:
            with self._changed:
                self.ended = True
                self._changed.notify_all()

    def _take(self, data: bytes) -> None:
        with self._changed:
            self._out += data
            if self.directory is None and (found := self._begin.search(self._out)):
                self.directory, self.size_limit = found[1].decode(), int(found[2]) * 1024
                del self._out[:found.end()]
            if self.directory is not None:
                if found := self._mark.search(self._out):
                    self.mark = int(found[1]) if re.fullmatch(rb"\d{19}", found[1]) else 0
                    del self._out[found.start():found.end()]
                if found := self._end.search(self._out):
                    self.status = int(found[1])
                    self._over()
                ready = bytes(self._out[:found.start() if found else -self._tail])
                if self._sink:
                    self._sink.write(ready)
                    self._most -= len(ready)
                    del self._out[:len(ready)]
                elif found:
                    self.output = ready
            if len(self._out) > LARGEST_ANSWER or self._most < 0:
                self.flooded = True
                close(self._channel)
            self._changed.notify_all()

    def _take_errors(self, data: bytes) -> None:
        with self._changed:
            self._errors += data
            if found := self._end.search(self._errors):
                del self._errors[found.start():]
                self._complete = True
                self._over()
            del self._errors[:-65536]
            self._changed.notify_all()

    def _over(self) -> None:
        """It has ended when both streams say so: they may come in any order."""
        self.ended = self.ended or (self.status is not None and self._complete)


def close(connection: socket.socket | paramiko.Channel | paramiko.SFTPClient | paramiko.SSHClient) -> None:
    """Closes what may be broken already: then paramiko can't say so any more."""
    try:
        connection.close()
    except (OSError, EOFError):
        pass


def last_line(text: str) -> str:
    """The last line that says something, for an error message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


class Remote:
    """An SSH connection to a host: runs commands under WRAPPER and fetches files."""

    def __init__(self, target: Target, access: Access, changed: threading.Condition,
                 log: Callable[[str], None], sudo: bool = False) -> None:
        import threading
        self.name = str(target)
        self._shell = SUDO_SHELL if sudo else "exec sh"
        self._prefetching = threading.Lock()
        self._changed, self._log = changed, log
        self._clients = access.connect(target)

    @property
    def address(self) -> str:
        """The IP address of the host, as the connection has it; nothing if that goes through another host."""
        if len(self._clients) > 1:
            return ""
        try:
            return str(self.transport().getpeername()[0]).split("%")[0].removeprefix("::ffff:")
        except (OSError, AttributeError, IndexError):
            return ""

    def transport(self) -> paramiko.Transport:
        """The connection; HostConnectionError if it is lost."""
        transport = self._clients[-1].get_transport()
        if transport is None or not transport.is_active():
            reason = transport.get_exception() if transport else None
            raise HostConnectionError(f"the connection to {self.name} is lost{f': {reason}' if reason else ''}")
        return transport

    def start(self, command: str, seconds: float, output: str = "-", *, size: int = 0, share: int = 1,
              sink: IO[bytes] | None = None, most: int = LARGEST_ANSWER) -> Job:
        """Starts a shell command that ends after so many seconds at the latest.

        Its standard output goes to the job ("-"; to `sink`, if there is one, at most `most` bytes), to an absolute
        path, or to a file of that name in the job's private directory, which then stays until `Job.leave` and takes at
        most `size` bytes, and half of the free space divided by `share`.
        """
        from shlex import quote

        from paramiko import SSHException
        token = f"netweaver-{os.urandom(12).hex()}"
        self._log(f"{self.name}: {command}")
        assignments = {"TOKEN": token, "COMMAND": command, "OUTPUT": output, "LIMIT": str(int(seconds) + 1),
                       "IDLE": str(IDLE_SECONDS), "SIZE": str(size // 1024), "SHARE": str(share)}
        script = "".join(f"{name}={quote(value)}\n" for name, value in assignments.items()) + WRAPPER
        try:
            channel = self.transport().open_session(timeout=CONNECT_SECONDS)
            channel.settimeout(CONNECT_SECONDS)
            channel.exec_command(self._shell)
        except (SSHException, EOFError, OSError) as error:
            raise HostConnectionError(f"{self.name}: can't start a command: {error or 'no answer'}") from error
        try:
            channel.sendall(script.encode(errors="surrogateescape"))
        except (OSError, EOFError):
            self.transport()                         # else a shell that has ended at once; it may have said why
        return Job(self.name, command, channel, token, self._changed, sink, most)

    def check(self, job: Job) -> None:
        """HostConnectionError if a job has ended since the connection did, not by itself."""
        if job.ended and job.status is None and not job.flooded:
            self.transport()
            if job.directory or not job.errors.strip():      # it did start, or couldn't even say why not
                raise HostConnectionError(f"the connection to {self.name} is lost (or its shell there was killed)")

    def finish(self, job: Job, seconds: float) -> None:
        """Waits for the end of a job; RemoteCommandError if it was not one of its own."""
        with self._changed:
            self._changed.wait_for(lambda: job.ended, seconds)
        if job.status is None:
            if not job.flooded:
                self.check(job)
                self.transport()
            why = ("did not answer in time" if not job.ended else "says too much" if job.flooded else
                   f"could not be run: {last_line(job.errors)}{SUDO_HINT if 'sudo' in job.errors else ''}")
            job.leave(0)
            raise RemoteCommandError(f"{self.name}: {job.command}: {why}")

    def run(self, command: str, seconds: float = ANSWER_SECONDS) -> Job:
        """Runs a shell command to its end; returns the job, whatever its status."""
        job = self.start(command, seconds)
        self.finish(job, seconds)
        return job

    def request_sftp(self) -> paramiko.Channel | None:
        """A channel on which an SFTP server was asked for; None if the host has none."""
        from paramiko import SSHException
        try:
            channel = self.transport().open_session(timeout=CONNECT_SECONDS)
            channel.settimeout(CONNECT_SECONDS)
            channel.invoke_subsystem("sftp")
            return channel
        except (SSHException, EOFError, OSError):
            self.transport()
            return None

    def open_sftp(self, channel: paramiko.Channel | None) -> paramiko.SFTPClient | None:
        """The SFTP session on a channel that was requested a while ago; None if no server is there.

        A server that ends at once must have had the time to: what is sent on a channel while it closes makes sshd end
        the whole connection.
        """
        from paramiko import SFTPClient, SFTPError, SSHException
        try:
            if channel and not channel.closed and not channel.eof_received:
                return SFTPClient(channel)
        except (SFTPError, SSHException, EOFError, OSError):
            self.transport()
        self._log(f"{self.name}: no SFTP; files come over the channel of a command")
        return None

    def fetch(self, path: str, local: str, sftp: paramiko.SFTPClient | None, most: int) -> None:
        """Copies a file of the host, of `most` bytes at the most, over SFTP or else over a command's channel.

        CaptureError if it can't be copied whole; then there is no local file.
        """
        from paramiko import SFTPError, SSHException
        try:
            with open(local, "wb") as file:
                if sftp:
                    try:
                        self._fetch_by_sftp(path, file, sftp, most)
                        return
                    except (SFTPError, SSHException, EOFError, OSError):
                        self.transport()
                        file.seek(0)
                        file.truncate()
                self._fetch_by_command(path, file, most)
        except BaseException as error:
            if os.path.exists(local):
                os.unlink(local)
            if isinstance(error, OSError):
                raise CaptureError(f"can't write {local}: {error.strerror}") from error
            raise

    def _fetch_by_sftp(self, path: str, file: IO[bytes], sftp: paramiko.SFTPClient, most: int) -> None:
        import threading
        import time
        with sftp.open(path, "rb") as remote:
            size = remote.stat().st_size or 0
            if size > most:
                raise CaptureError(f"{self.name}: {path} has {size} bytes, which is more than it was allowed to have")
            deadline = time.monotonic() + ANSWER_SECONDS + size / SLOWEST_TRANSFER
            with self._prefetching:
                before = threading.enumerate()
                remote.prefetch(size)                # in a thread of its own
                asking = [thread for thread in threading.enumerate()
                          if thread not in before and "_prefetch_thread" in thread.name]
            try:
                while size > 0:
                    data = remote.read(min(size, 1 << 15))
                    if not data or time.monotonic() > deadline:
                        raise CaptureError(f"{self.name}: the transfer of {path} broke off")
                    file.write(data)
                    size -= len(data)
            finally:                                 # it may still be asking for what has come already
                for thread in asking:
                    thread.join(max(0, deadline - time.monotonic()))

    def _fetch_by_command(self, path: str, file: IO[bytes], most: int) -> None:
        from shlex import quote
        seconds = ANSWER_SECONDS + most / SLOWEST_TRANSFER
        job = self.start(f"exec cat -- {quote(path)}", seconds, sink=file, most=most)
        self.finish(job, seconds)
        if job.status:
            raise CaptureError(f"{self.name}: can't fetch {path}: {last_line(job.errors)}")

    def close(self) -> None:
        for client in reversed(self._clients):
            close(client)


class Access:
    """How to log in to hosts: keys, known hosts and ~/.ssh/config, in OpenSSH's terms.

    `host_key_checking` is accept-new (record the keys of new hosts), yes (refuse new hosts) or no (check nothing).
    `ask` gets the passphrase of a key from a person; without it, a protected key can't be used.
    """

    def __init__(self, key_path: str | None = None, host_key_checking: str = "accept-new",
                 known_hosts: str | None = None, ask: Callable[[str], str] | None = None) -> None:
        import threading
        import warnings
        try:
            with warnings.catch_warnings():          # what paramiko's and cryptography's versions think of each other
                warnings.simplefilter("ignore")
                import paramiko  # noqa: F401
        except Exception as error:
            raise NetWeaverError(f"can't import paramiko ({error}): pip install -U paramiko") from error
        self._key_path, self._checking, self._known_hosts, self._ask = key_path, host_key_checking, known_hosts, ask
        self._keys: dict[str, paramiko.PKey] = {}
        self._lock = threading.Lock()                # one question at a time

    def prepare(self) -> None:
        """Loads the key, which may need a question, before any connection is made."""
        if self._key_path:
            self._key(os.path.expanduser(self._key_path))

    def connect(self, target: Target, depth: int = 0, way: Sequence[str] = ()) -> list[paramiko.SSHClient]:
        """An authenticated connection, last, after those to the hosts through which it goes.

        Those are the `way`, if one is given, or else what ~/.ssh/config says.  HostConnectionError says what failed and
        what to do.
        """
        import random
        import time

        import paramiko
        settings = self._settings(target.host)
        if way:
            settings["proxyjump"] = ",".join(way)
        host = str(settings.get("hostname", target.host))
        port = target.port or int(settings.get("port", 22))
        user = target.user or str(settings.get("user", "root"))
        paths = str(settings.get("userknownhostsfile", "~/.ssh/known_hosts")).split()
        known = KnownHosts([self._known_hosts] if self._known_hosts else paths, host, port, str(target))
        key = self._key(os.path.expanduser(self._key_path)) if self._key_path else None
        files = [] if key else [path for path in settings.get("identityfile", []) if os.path.exists(path)]
        for attempt in range(1, CONNECT_ATTEMPTS + 1):
            clients: list[paramiko.SSHClient] = []
            begun = time.monotonic()
            try:
                sock = self._socket(target, host, port, settings, clients, depth)
                clients.append(self._session(sock, host, port, user, key, files, known))
                return clients
            except BaseException as error:
                for client in reversed(clients):
                    close(client)
                # Of many connections at a time sshd closes some without a word (MaxStartups).
                dropped = str(error).startswith("Error reading SSH protocol banner") and time.monotonic() - begun < 2
                if dropped and attempt < CONNECT_ATTEMPTS:
                    time.sleep(random.uniform(0.1, 0.5) * attempt)
                    continue
                if isinstance(error, (paramiko.SSHException, EOFError, OSError, TypeError, ValueError)):
                    raise HostConnectionError(f"{target}: {self._explain(error, user, port)}") from error
                raise
        raise AssertionError("unreachable")

    def _settings(self, name: str) -> dict[str, Any]:
        """What ~/.ssh/config says of a host."""
        import paramiko
        path = os.path.expanduser("~/.ssh/config")
        try:
            config = paramiko.SSHConfig.from_path(path)
            return dict(config.lookup(name))
        except FileNotFoundError:
            return {}
        except Exception as error:                   # whatever its parser makes of a strange file
            raise HostConnectionError(f"{path}: can't use it: {last_line(str(error))}") from error

    def _socket(self, target: Target, host: str, port: int, settings: Mapping[str, Any],
                clients: list[paramiko.SSHClient], depth: int) -> socket.socket | paramiko.Channel:
        """The way to a host: TCP, a command, or a channel through other hosts, which are added to the clients."""
        import socket
        jumps, command = str(settings.get("proxyjump", "none")), str(settings.get("proxycommand", "none"))
        if jumps.lower() != "none":
            if depth > 7:
                raise HostConnectionError(f"{target}: too many hosts to jump over (ProxyJump)")
            *before, last = (jump.strip() for jump in jumps.split(","))
            clients += self.connect(Target(last), depth + 1, before)
            transport = clients[-1].get_transport()
            assert transport is not None
            return transport.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=CONNECT_SECONDS)
        if command.lower() != "none":
            import subprocess
            ours, theirs = socket.socketpair()
            with theirs:                             # as ssh does: the user's own command, in the user's own shell
                subprocess.Popen(["sh", "-c", f"exec {command}"], stdin=theirs.fileno(), stdout=theirs.fileno(),
                                 start_new_session=True)
            ours.settimeout(CONNECT_SECONDS)
            return ours
        sock = socket.create_connection((host, port), CONNECT_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):      # Linux: without it a dead peer is noticed after 15 minutes
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PEER_SECONDS * 1000)
        return sock

    def _session(self, sock: socket.socket | paramiko.Channel, host: str, port: int, user: str,
                 key: paramiko.PKey | None, files: Sequence[str], known: KnownHosts) -> paramiko.SSHClient:
        import logging

        import paramiko
        logging.getLogger("paramiko").addHandler(logging.NullHandler())      # else it prints tracebacks
        checking = self._checking

        class Policy(paramiko.MissingHostKeyPolicy):
            def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
                if checking != "no":                 # the client knows no host: known does all of the checking
                    known.check(key, record=checking == "accept-new")

        def transport(*arguments: Any, **options: Any) -> paramiko.Transport:
            made = paramiko.Transport(*arguments, **options)
            security, algorithms = made.get_security_options(), known.algorithms()
            security.key_types = tuple(sorted(security.key_types, key=lambda name: name not in algorithms))
            return made

        client = paramiko.SSHClient()
        client.set_missing_host_key_policy(Policy())
        try:
            client.connect(host, port, user, pkey=key, key_filename=list(files), sock=sock,      # type: ignore[arg-type]
                           timeout=CONNECT_SECONDS, banner_timeout=CONNECT_SECONDS, auth_timeout=CONNECT_SECONDS,
                           channel_timeout=CONNECT_SECONDS, allow_agent=key is None, look_for_keys=key is None,
                           transport_factory=transport)
            made = client.get_transport()
            assert made is not None
            made.set_keepalive(DEAD_PEER_SECONDS // 2)
            return client
        except BaseException:
            close(client)
            close(sock)
            raise

    def _key(self, path: str) -> paramiko.PKey:
        """The private key in a file; HostConnectionError with the reason if there is none that can be used."""
        import paramiko
        with self._lock:
            if path in self._keys:
                return self._keys[path]
            passphrase = None
            try:
                if _is_protected(path):
                    if not self._ask:
                        raise HostConnectionError(f"{path}: can't use this key: it is protected by a passphrase: load "
                                                  "it into ssh-agent (ssh-add) and leave -k out")
                    passphrase = self._ask(f"Passphrase for {path}: ").encode()
                # The second parameter has other names in other versions.
                self._keys[path] = paramiko.PKey.from_path(path, passphrase)         # type: ignore[arg-type]
                return self._keys[path]
            except OSError as error:
                reason = error.strerror or str(error)
            except (paramiko.SSHException, ValueError, TypeError) as error:
                reason = ("the passphrase is wrong" if passphrase else
                          f"not a private key in OpenSSH or PEM format ({last_line(str(error))})")
        raise HostConnectionError(f"{path}: can't use this key: {reason}")

    def _explain(self, error: BaseException, user: str, port: int) -> str:
        """What failed, and what to do."""
        import paramiko
        if isinstance(error, paramiko.ssh_exception.IncompatiblePeer):
            return f"no common SSH algorithms ({error}): for an old sshd try pip install 'paramiko<5'"
        if isinstance(error, paramiko.AuthenticationException) or "authentication methods" in str(error):
            offered = f"the key {self._key_path}" if self._key_path else "the keys of ssh-agent and ~/.ssh"
            return f"refused {offered} for {user}: add the public key to {user}'s ~/.ssh/authorized_keys there"
        if isinstance(error, (paramiko.SSHException, EOFError)):
            return f"no SSH session: {error or 'the connection was closed'}: is it sshd that listens there?"
        reason = "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or str(error)
        return f"can't reach port {port}: {reason}: check the address, the network and sshd"


def _is_protected(path: str) -> bool:
    """Whether a private key needs a passphrase; paramiko's answer depends on the versions."""
    from base64 import b64decode
    with open(path, "rb") as file:
        text = file.read(LARGEST_ANSWER)
    found = re.search(rb"-----BEGIN OPENSSH PRIVATE KEY-----\s+([A-Za-z0-9+/\s]{40})", text)
    if found:                                        # magic, then the length and the name of the cipher
        return b64decode(b"".join(found[1].split())[:32])[15:23] != b"\0\0\0\x04none"
    return b"ENCRYPTED" in text


class KnownHosts:
    """What OpenSSH's known_hosts files say of one host: who is new is recorded, who has changed is refused.

    New keys go into the first of the files, hashed if others there are.
    """

    def __init__(self, paths: Sequence[str], host: str, port: int, shown: str) -> None:
        self._paths = [os.path.expanduser(path) for path in paths]
        self._shown = shown
        self.name = (host if port == 22 else f"[{host}]:{port}").lower()
        self._read()

    def _read(self) -> None:
        self.known: list[tuple[str, paramiko.PKey]] = []
        self.revoked: list[tuple[str, paramiko.PKey]] = []
        self._hashed = False
        for path in (*self._paths, "/etc/ssh/ssh_known_hosts"):
            try:
                with open(path, encoding="utf-8", errors="replace") as file:
                    lines = file.read().splitlines()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise HostConnectionError(f"{self._shown}: can't read {path}: {error.strerror}") from error
            self._hashed |= path == self._paths[0] and any(line.startswith("|1|") for line in lines)
            for number, line in enumerate(lines, 1):         # one by one: a strange line spoils no other
                marker, _, rest = line.strip().partition(" ")
                if marker.startswith("#"):
                    continue
                place = f"line {number} of {path}"
                if marker == "@revoked":
                    self.revoked += [(place, key) for key in self._keys(number, rest)]
                elif not marker.startswith("@"):     # certificate authorities are not for host keys
                    self.known += [(place, key) for key in self._keys(number, line)]

    def _keys(self, number: int, line: str) -> list[paramiko.PKey]:
        """The key of a line, if it speaks of this host."""
        import paramiko
        try:
            entry = paramiko.hostkeys.HostKeyEntry.from_line(line, number)
        except Exception:                            # whatever it makes of a strange line
            return []
        if entry is None or entry.key is None or not entry.hostnames:
            return []
        matches = [self._matches(pattern.lstrip("!")) for pattern in entry.hostnames]
        negated = any(hit and pattern.startswith("!") for hit, pattern in zip(matches, entry.hostnames))
        return [entry.key] if any(matches) and not negated else []

    def _matches(self, pattern: str) -> bool:
        if pattern.startswith("|1|"):
            import paramiko
            return paramiko.HostKeys.hash_host(self.name, pattern) == pattern
        expression = re.escape(pattern.lower()).replace(r"\*", ".*").replace(r"\?", ".")
        return re.fullmatch(expression, self.name) is not None

    def algorithms(self) -> set[str]:
        """The host key algorithms to prefer, so that the server shows a key that is known."""
        names = {key.get_name() for _, key in self.known}
        return names | ({"rsa-sha2-512", "rsa-sha2-256"} if "ssh-rsa" in names else set())

    def check(self, key: paramiko.PKey, record: bool = True) -> None:
        """Accepts a key that is known, or records it if the host is new; raises HostConnectionError otherwise."""
        shown = f"{key.get_name()} {_fingerprint(key)}"
        for place, revoked in self.revoked:
            if revoked == key:
                raise HostConnectionError(f"{self._shown}: its host key {shown} is revoked: see {place}")
        if any(known == key for _, known in self.known):
            return
        if self.known:
            places = ", ".join(place for place, _ in self.known)
            raise HostConnectionError(f"{self._shown}: the host key has changed, or someone is in between: it is now "
                                      f"{shown}; if that is right, remove {places}")
        if not record:
            raise HostConnectionError(f"{self._shown}: its host key {shown} is not in {self._paths[0]}, and "
                                      "--host-key-checking is yes: connect once with ssh, or use accept-new")
        self._record(key)

    def _record(self, key: paramiko.PKey) -> None:
        """Appends one line, under a lock: other runs may be doing the same."""
        import fcntl

        import paramiko
        path = self._paths[0]
        try:
            os.makedirs(os.path.dirname(path) or ".", 0o700, exist_ok=True)
            with open(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._read()
                if self.known:
                    return self.check(key)
                old = file.read()
                newline = b"" if not old or old.endswith(b"\n") else b"\n"
                name = paramiko.HostKeys.hash_host(self.name) if self._hashed else self.name
                file.write(newline + f"{name} {key.get_name()} {key.get_base64()}\n".encode())
        except OSError as error:
            raise HostConnectionError(f"{self._shown}: can't record its host key in {path}: {error.strerror} "
                                      "(--known-hosts names another file)") from error


def _fingerprint(key: paramiko.PKey) -> str:
    """A key's fingerprint as OpenSSH prints it."""
    from base64 import b64encode
    from hashlib import sha256
    return "SHA256:" + b64encode(sha256(key.asbytes()).digest()).decode().rstrip("=")


def resolve(name: str) -> str:
    """The IP address of a host given as an address or a name; UsageError if it is neither."""
    if re.fullmatch(r"[\d.]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*", name, re.ASCII):
        from ipaddress import ip_address
        try:
            return str(ip_address(name))
        except ValueError:
            raise UsageError(f"{name!r} is not an IP address") from None
    import socket
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{name!r} is neither an IP address nor a name that can be resolved") from error
    return str(found[0][4][0])


def in_parallel(*calls: Callable[[], Result], seconds: float | None = None) -> list[Result]:
    """The results of the calls, each made in a thread of its own; raises the first error, once all have ended.

    HostConnectionError if they take more than so many seconds (a resolver may take its time).
    """
    import threading
    import time
    deadline = None if seconds is None else time.monotonic() + seconds
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def run(place: int, call: Callable[[], Result]) -> None:
        try:
            results[place] = call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(None if deadline is None else max(0, deadline - time.monotonic()))
    if errors:
        raise errors[0]
    if len(results) < len(calls):
        raise HostConnectionError(f"no answer after {seconds} s: check addresses, name resolution and network")
    return [results[place] for place in range(len(calls))]


# ---- Toolstacks: a VM's name in, its interfaces out ----------------------------------------------------------
# For each toolstack there is a function of `run`, the VM's name and the number of its interface, which returns the
# interface's name on the hypervisor; for xe also one that returns the physical interfaces behind it, and whether a
# tunnel is in between.  `run(command, hint)` is NetWeaver.run_command: it returns the output of a shell command on
# the hypervisor, and raises RemoteCommandError, with the hint, if that fails.

XE_HINT = "is xapi up there? systemctl status xapi tells"
VM_INTERFACE = re.compile(r"(vif|tap|emu)\d+\.\d+|(tap|veth|fwln|fwpr|fwbr)\d+[ip]\d+|vnet\d+|veth[0-9a-f]{6,}"
                          r"|(tap|qvb|qvo|qbr)[0-9a-f-]{9,}")
TUNNELS = ("vxlan", "geneve", "gre", "gretap", "ip6gre", "ip6gretap", "stt")


def xe_dom_id_command(name_label: str) -> str:
    """Prints the dom-ids of the VMs with a name, then those of them that live on this host, a line each."""
    from shlex import quote
    query = f"xe vm-list name-label={quote(name_label)} is-control-domain=false params=dom-id --minimal"
    return (f"{query} || exit; INSTALLATION_UUID=; [ ! -r /etc/xensource-inventory ] || . /etc/xensource-inventory; "
            f'[ -z "$INSTALLATION_UUID" ] || {query} resident-on="$INSTALLATION_UUID"')


def parse_xe_dom_id(answer: str, name_label: str) -> int:
    """The domain id in the answer to `xe_dom_id_command`; RemoteCommandError if the VM isn't one that runs here.

    `xe --minimal` exits 0 for all of these: a list for several VMs, -1 for a halted one, nothing for none, and
    the domain id on another host of the pool, where a VM of this host may have the same.
    """
    lines = [line.strip() for line in answer.split("\n")]
    everywhere = dom_ids = lines[0].split(",") if lines[0] else []
    if answer.count("\n") > 1:                       # who runs elsewhere doesn't count; who is halted may be meant
        dom_ids = [*filter(None, lines[1].split(",")), *(dom_id for dom_id in everywhere if dom_id == "-1")]
    if not everywhere:
        raise RemoteCommandError(f"there is no VM with the name-label {name_label!r} (names are case-sensitive; "
                                 "xe vm-list shows them)")
    if not all(re.fullmatch(r"-1|\d{1,9}", dom_id, re.ASCII) for dom_id in (*everywhere, *dom_ids)):
        raise RemoteCommandError(f"xe answered {answer[:80]!r} for {name_label!r}, which are no dom-ids")
    if not dom_ids:
        raise RemoteCommandError(f"the VM {name_label!r} runs on another host of the pool: give that one as --hv")
    if len(dom_ids) > 1:
        raise RemoteCommandError(f"{len(dom_ids)} VMs have the name-label {name_label!r} (dom-ids {','.join(dom_ids)}):"
                                 " make the name unique, or name the interface with --vif")
    if dom_ids[0] == "-1":
        raise RemoteCommandError(f"the VM {name_label!r} is not running (halted or suspended): start it first")
    return int(dom_ids[0])


def xe_vif(run: Run, name: str, number: int) -> str:
    """On XenServer and XCP-ng."""
    return f"vif{parse_xe_dom_id(run(xe_dom_id_command(name), XE_HINT), name)}.{number}"


def parse_minimal(answer: str) -> list[str]:
    """The values that `xe --minimal` printed."""
    values = re.findall(r"((?:[^,\\]|\\.)+)", answer.strip())
    return [re.sub(r"\\(.)", r"\1", value) for value in values]


def xe_uplinks(run: Run, name: str, number: int) -> tuple[list[str], bool]:
    """The physical interfaces of the network of a VM's interface, and whether that network is a tunnel.

    A VLAN is captured on its parent, a bond on its slaves: with Open vSwitch a bond is no device.
    """
    from shlex import quote

    def ask(kind: str, params: str, **filters: str) -> list[str]:
        query = " ".join(f"{name.replace('_', '-')}={quote(value)}" for name, value in filters.items())
        return parse_minimal(run(f"xe {kind}-list {query} params={params} --minimal", XE_HINT))

    host = run(". /etc/xensource-inventory && echo $INSTALLATION_UUID", "is this XenServer or XCP-ng?").strip()
    vms = ask("vm", "uuid", name_label=name, is_control_domain="false", resident_on=host)
    if len(vms) != 1:
        raise RemoteCommandError(f"{len(vms) or 'no'} VMs with the name-label {name!r} run on this host")
    networks = ask("vif", "network-uuid", vm_uuid=vms[0], device=str(number))
    if not networks:
        raise RemoteCommandError(f"the VM {name!r} has no interface number {number} (--num; xe vif-list "
                                 f"vm-uuid={vms[0]} shows them)")
    pifs = ask("pif", "uuid", network_uuid=networks[0], host_uuid=host)
    if not pifs:
        raise RemoteCommandError(f"interface {number} of the VM {name!r} is in an internal network, without a physical "
                                 "interface on this host: give the interface to compare with by -i")
    transport = ask("tunnel", "transport-PIF", access_PIF=pifs[0])
    devices = ask("pif", "device", uuid=(transport or pifs)[0])
    for parent in ask("pif", "uuid", device=devices[0], host_uuid=host, VLAN="-1") if devices else ():
        for bond in ask("bond", "uuid", master=parent):
            devices = ask("pif", "device", bond_slave_of=bond) or devices
    if not devices:
        raise RemoteCommandError(f"xe names no device of the PIF {(transport or pifs)[0]}: give it by -i")
    return devices, bool(transport)


def xl_vif(run: Run, name: str, number: int) -> str:
    """On plain Xen."""
    from shlex import quote
    guard = "-- " if name.startswith("-") else ""
    answer = run(f"xl domid {guard}{quote(name)}", "it isn't running, or has another name: xl list shows them").strip()
    if not re.fullmatch(r"\d{1,9}", answer, re.ASCII):
        raise RemoteCommandError(f"xl answered {answer[:80]!r} for {name!r}, which is no domain id")
    if answer == "0":
        raise RemoteCommandError(f"{name!r} is the control domain, which has no vif")
    return f"vif{answer}.{number}"


def virsh_vif(run: Run, name: str, number: int) -> str:
    """On libvirt, with KVM for example."""
    from shlex import quote
    hint = "virsh list --all shows the names; systemctl status libvirtd whether libvirt runs"
    domain = f"{'--domain ' if name.startswith('-') else ''}{quote(name)}"
    off = RemoteCommandError(f"the domain {name!r} is shut off: start it first (virsh start)")
    if re.fullmatch(r"\d+", name, re.ASCII):         # most commands take it for an id, domid never does
        domain = quote(run(f"LC_ALL=C virsh -q domid {domain}", hint).strip())
        if domain == "-":
            raise off
    answer = run(f"LC_ALL=C virsh -q domiflist {domain}", hint)
    if run(f"LC_ALL=C virsh -q domstate {domain} || :").strip() == "shut off":       # it may list a name all the same
        raise off
    return parse_virsh_domiflist(answer, name, number)


def parse_virsh_domiflist(answer: str, name: str, number: int) -> str:
    """The interface in row `number` of virsh's table; RemoteCommandError if it has none.

    Old versions print a header and a rule in spite of -q; the interfaces of a domain that is shut off are "-".
    """
    rows = [line.split() for line in answer.splitlines() if line.strip()]
    rows = [row for row in rows if row[:2] != ["Interface", "Type"] and not re.fullmatch("-{2,}", row[0])]
    if number >= len(rows):
        raise RemoteCommandError(f"the domain {name!r} has {len(rows)} interfaces, and none of number {number} (--num "
                                 f"counts from 0; virsh domiflist {name} shows them)")
    if rows[number][0] == "-":
        raise RemoteCommandError(f"interface {number} of the domain {name!r} has no device on the host (hostdev, "
                                 "vhost-user, or the domain is shut off): tcpdump can't see it")
    return rows[number][0]


def qm_vif(run: Run, name: str, number: int) -> str:
    """On Proxmox VE."""
    return f"tap{parse_qm_list(run('qm list', 'is this a Proxmox VE host?'), name)}i{number}"


def parse_qm_list(answer: str, name: str) -> int:
    """The VMID of a running VM by its name or, if none has that name, its VMID; RemoteCommandError if it isn't one."""
    vms = re.findall(r"^\s*(\d+)\s+(\S.*?)\s+(\S+)\s+\d+\s+[\d.]+\s+\d+\s*$", answer, re.MULTILINE | re.ASCII)
    found = [vm for vm in vms if vm[1] == name] or [vm for vm in vms if vm[0] == name]
    if not found:
        raise RemoteCommandError(f"there is no VM {name!r} on this host (qm list shows them; a container's interface "
                                 "is given with --vif veth<id>i<n>)")
    if len(found) > 1:
        ids = ", ".join(vmid for vmid, _, _ in found)
        raise RemoteCommandError(f"{len(found)} VMs have the name {name!r} (VMIDs {ids}): give the VMID as -n")
    vmid, _, status = found[0]
    if status != "running":
        raise RemoteCommandError(f"the VM {name!r} (VMID {vmid}) is {status}: start it first (qm start {vmid})")
    return int(vmid)


TOOLSTACKS = {"xe": xe_vif, "xl": xl_vif, "virsh": virsh_vif, "qm": qm_vif}

LINKS_COMMAND = """\
ip -o -d link || exit; command -v ovs-vsctl >/dev/null || exit 0
for bridge in `ovs-vsctl list-br`; do
  echo "ovs `ovs-vsctl br-to-parent $bridge` "`ovs-vsctl list-ifaces $bridge`
done; echo "ovs-interfaces `ovs-vsctl -f json --columns=name,type,options list Interface | tr -d '\\n'`\""""


class Links:
    """The network interfaces of a host and how they hang together, from what LINKS_COMMAND printed."""

    def __init__(self, answer: str) -> None:
        self.kinds: dict[str, str] = {}              # "" for hardware
        self.bridges: dict[str, str] = {}            # port: bridge (or bond)
        self.peers: dict[str, str] = {}              # the other end, or what an interface is stacked on
        self.remotes: dict[str, str] = {}            # of tunnels
        for line in answer.splitlines():
            if line.startswith("ovs "):
                bridge, *ports = line.split()[1:]
                self.bridges.update(dict.fromkeys(ports, f"ovs {bridge}"))
            elif line.startswith("ovs-interfaces "):
                self._open_vswitch(line.split(None, 1)[1])
            elif found := re.match(r"\d+: ([^\s:@]+)(?:@([^\s:]+))?: ", line):
                name, peer = found.groups()
                kind = re.search(r"\\\s+link/[^\\]*\\\s+(\w+)\b", line)
                self.kinds[name] = kind[1] if kind and not kind[1].endswith("_slave") else ""
                for pattern, into in ((r" master (\S+)", self.bridges), (r" dev (\S+)", self.peers),
                                      (r" remote (\S+)", self.remotes)):
                    if value := re.search(pattern, line):
                        into.setdefault(name, value[1])
                if peer and not re.fullmatch(r"if\d+|NONE", peer):
                    self.peers[name] = peer

    def _open_vswitch(self, text: str) -> None:
        import json
        try:
            rows = json.loads(text)["data"]
        except (ValueError, KeyError):
            return
        for name, kind, (_, options) in rows:
            settings = dict(options)
            if kind == "patch" and "peer" in settings:
                self.kinds[name], self.peers[name] = "patch", settings["peer"]
            if kind in TUNNELS and "remote_ip" in settings:
                self.kinds[name], self.remotes[name] = kind, settings["remote_ip"]

    def uplinks(self, interface: str) -> tuple[set[str], list[str]]:
        """What leads out of the host from the bridge of an interface: physical interfaces, and tunnels' names."""
        devices: set[str] = set()
        tunnels: list[str] = []
        seen, todo = {interface}, [interface]
        while todo:
            for port in self._ports(self.bridges.get(todo.pop(), "")):
                if port in seen:
                    continue
                seen.add(port)
                kind, peer = self.kinds.get(port, ""), self.peers.get(port, "")
                if kind in TUNNELS:
                    tunnels.append(port)
                elif kind in ("veth", "patch") and peer in self.bridges:     # on to another bridge of this host
                    seen.add(peer)
                    todo.append(peer)
                elif kind not in ("tun", "patch", "openvswitch") and not VM_INTERFACE.fullmatch(port):
                    devices |= self.bottom(port)
        return devices, tunnels

    def bottom(self, device: str, depth: int = 8) -> set[str]:
        """The physical interfaces of which a VLAN, a bond or a bridge is made; the device itself if it is none."""
        kind, below = self.kinds.get(device, ""), []         # type: str, list[str]
        if kind == "vlan" and device in self.peers:
            below = [self.peers[device]]
        elif kind in ("bond", "team", "bridge"):
            below = self._ports(device)
        elif kind == "openvswitch":
            below = self._ports(f"ovs {device}")
        below = [port for port in below if not VM_INTERFACE.fullmatch(port) and self.kinds.get(port) != "tun"]
        if depth and below and below != [device]:
            return {found for port in below if port != device for found in self.bottom(port, depth - 1)}
        return {device}

    def _ports(self, bridge: str) -> list[str]:
        return [port for port, of in self.bridges.items() if of == bridge]


def bridge_uplinks(run: Run, vif: str) -> tuple[list[str], bool]:
    """The physical interfaces behind the bridge (or Open vSwitch) of a vif, and whether it leads into a tunnel."""
    from shlex import quote
    links = Links(run(LINKS_COMMAND, "name the physical interface with -i"))
    devices, tunnels = links.uplinks(vif)
    for tunnel in tunnels:
        carrier, remote = links.peers.get(tunnel), links.remotes.get(tunnel, "")
        if not carrier and re.fullmatch(r"[0-9A-Fa-f.:]+", remote):
            route = re.search(r" dev (\S+)", run(f"ip -o route get {quote(remote)}"))
            carrier = route[1] if route else None
        devices |= links.bottom(carrier) if carrier else set()
    if not devices:
        bridge = links.bridges.get(vif)
        why = (f"its bridge {bridge.removeprefix('ovs ')} has no physical interface" if bridge else
               "it is in no bridge" if vif in links.kinds else "there is no such interface")
        raise RemoteCommandError(f"can't find the physical interface behind {vif}: {why}: give it with -i (there are: "
                                 f"{', '.join(sorted(name for name in links.kinds if name != 'lo'))})")
    return sorted(devices), bool(tunnels)


# ---- NetWeaver: the orchestration ----------------------------------------------------------------------------

DRAIN_SECONDS = 1.1                                  # the kernel hands its blocks of packets over up to 1 s late
SNAPLEN = 128                                        # Ethernet, two tags, IPv6, TCP with options
OVERLAY_SNAPLEN = 448                                # and the same around it, with UDP and Geneve's options
BUFFER_KIB = 16384
TRANSMITTED = re.compile(r"^(\d+) packets transmitted", re.MULTILINE)    # hping3's statistics, on stderr


def capture_filter(sources: Iterable[str], destination: str, direction: str = "in") -> str:
    """The pcap-filter(7) expression for IP packets between the sources (all, if none is given) and the destination.

    Takes addresses, not names, of one IP version.
    """
    def term(end: int, address: str) -> str:
        return f"{('src', 'dst')[end]} host {address}"

    return f"{'ip6' if ':' in destination else 'ip'} and {_flows(term, list(sources), destination, direction)}"


def tunnel_filter(sources: Iterable[str], destination: str, direction: str = "in") -> str:
    """The expression for VXLAN, Geneve and GRE packets that may carry a packet for which `capture_filter` is.

    It looks into the tunnel where that packet is at a fixed place (in VXLAN, and Geneve without options, over IPv4 and
    without an inner tag), and takes all other packets of tunnels.
    """
    from ipaddress import ip_address
    ethertype, addresses = ("0x86dd", (38, 54)) if ":" in destination else ("0x0800", (42, 46))     # from UDP's header

    def term(end: int, address: str) -> str:
        at, packed = addresses[end], ip_address(address).packed
        return f"({' and '.join(f'udp[{at + i}:4] = 0x{packed[i:i + 4].hex()}' for i in range(0, len(packed), 4))})"

    plain = f"udp[28:2] != {ethertype} or ({_flows(term, list(sources), destination, direction)})"
    ports = " or ".join(f"udp dst port {port}" for port in sorted(TUNNEL_PORTS))
    return (f"(ip and ({ports}) and ((udp dst port {GENEVE_PORT} and udp[8] & 0x3f != 0) or {plain})) or "
            f"(ip6 and ({ports})) or ip proto {GRE} or ip6 proto {GRE}")


def _flows(term: Callable[[int, str], str], sources: Sequence[str], destination: str, direction: str) -> str:
    """An expression for packets of the directions; `term` is that for an address at an end (0: source, 1: destination).

    In an expression `and` binds no stronger than `or`.
    """
    def way(theirs: int, ours: int) -> str:
        ends = [term(theirs, source) for source in sources]
        either = [f"({' or '.join(ends)})"] if len(ends) > 1 else ends
        return " and ".join([*either, term(ours, destination)])

    if direction == "both":
        return f"(({way(0, 1)}) or ({way(1, 0)}))"
    return way(1, 0) if direction == "out" else way(0, 1)


def tagged_filter(expression: str) -> str:
    """An expression for an Ethernet interface which finds packets under up to two VLAN tags, too.

    `vlan` shifts all that follows it, and knows tags in the frame as well as those that the card has taken out of it.
    """
    return f"({expression}) or (vlan and (({expression}) or (vlan and ({expression}))))"


def capture_command(interface: str, expression: str, tcpdump_help: str, snaplen: int = SNAPLEN) -> str:
    """The shell command that writes a pcap of what passes an interface to its standard output.

    A large buffer and nanosecond stamps where the help of this tcpdump knows them (since 4.0 and 4.6); -p leaves
    the interface's mode alone.
    """
    from shlex import quote
    options = f" -B {BUFFER_KIB}" if "[ -B size ]" in tcpdump_help else ""
    options += " --time-stamp-precision=nano" if "--time-stamp-precision" in tcpdump_help else ""
    return f"exec tcpdump -i {quote(interface)} -p -nn -s {snaplen}{options} -w - -- {quote(expression)}"


OFFLOADS = ("generic-receive-offload", "generic-segmentation-offload", "large-receive-offload", "rx-vlan-offload",
            "tcp-segmentation-offload", "tx-vlan-offload")


def facts_command(pifs: Iterable[str], vif: str) -> str:
    """A shell command that prints what the hypervisor tells of itself and its interfaces, a fact a line."""
    from shlex import quote
    lines = ['echo "kernel `uname -r`"; echo "load `cat /proc/loadavg`"',
             'echo "cpus `grep -c ^processor /proc/cpuinfo`"',
             f"v={quote(vif)}; printf 'vif %s\\n' \"`ip -o link show dev \"$v\"`\"",
             'echo "ovs `ovs-vsctl --version | head -n 1`"',
             'echo "backend `cat /etc/xensource/network.conf`"']
    for pif in pifs:
        lines.append(f"p={quote(pif)}; printf 'pif %s link %s\\n' \"$p\" \"`ip -o link show dev \"$p\"`\"; "
                     'echo "pif $p driver `readlink "/sys/class/net/$p/device/driver"`"; '
                     f"ethtool -k \"$p\" | sed -n 's/^\\([a-z-]*\\): on.*/\\1/p' | while read f; do "
                     'echo "pif $p offload $f"; done')
    return "{ " + "\n".join(lines) + "\n} 2>/dev/null"


def platform(facts: str, tcpdump_help: str) -> dict[str, Any]:
    """The platform (RFC 8172), as far as the output of `facts_command` and tcpdump's usage message tell."""
    found = dict(re.findall(r"^(kernel|cpus|load|vif|ovs|backend) (.*\S)", facts, re.MULTILINE))
    version = re.search(r"tcpdump version (\S+)", tcpdump_help)
    bridge = re.search(r" master (\S+)", found.get("vif", ""))
    ovs = re.search(r"\d[\d.]*\d", found.get("ovs", ""))
    known: dict[str, Any] = {"kernel": found.get("kernel"), "tcpdump": version[1] if version else None}
    if (bridge and bridge[1] == "ovs-system") or (not bridge and found.get("backend") == "openvswitch"):
        known["switch"] = f"Open vSwitch {ovs[0]}" if ovs else "Open vSwitch"
    else:
        known["switch"] = "bridge" if bridge or found.get("backend") == "bridge" else None
    known["cpus"] = int(found["cpus"]) if found.get("cpus", "").isdigit() else None
    known["load"] = [float(value) for value in re.findall(r"\d+\.\d+", found.get("load", ""))[:3]] or None
    pifs: dict[str, dict[str, Any]] = {}
    for name, what, value in re.findall(r"^pif (\S+) (driver|offload) ?(.*)$", facts, re.MULTILINE):
        pif = pifs.setdefault(name, {"driver": None, "offloads": []})
        if what == "driver":
            pif["driver"] = os.path.basename(value) or None
        elif value in OFFLOADS:
            pif["offloads"].append(value)
    known["pifs"] = pifs or None
    return {name: value for name, value in known.items() if value is not None}


def tcpdump_counts(errors: str) -> dict[str, int]:
    """What tcpdump said at its end: packets `captured`, `received` by the filter, `dropped` by kernel and interface.

    Counts that it didn't print are missing.
    """
    names = {"captured": "captured", "received by filter": "received", "dropped by kernel": "dropped",
             "dropped by interface": "dropped_by_interface"}
    return {names[what]: int(count) for count, what in
            re.findall(r"^(\d+) packets? (captured|received by filter|dropped by kernel|dropped by interface)",
                       errors, re.MULTILINE)}


class Recording:
    """One capture of a run: of which side (pif or vif) and interface, the job that makes it, and its file here."""

    def __init__(self, side: str, interface: str, job: Job) -> None:
        self.side, self.interface, self.job = side, interface, job
        self.path = ""
        self.sftp: paramiko.Channel | None = None


class NetWeaver:
    """Measures the time that packets take between a hypervisor's physical interface and a VM's virtual one.

    `source_ip` (one, several or none) and `destination_host_ip` are `[user@]host[:port]`; `destination_name_label` is
    the VM's name in the `toolstack` (one of TOOLSTACKS), `destination_ip` its address, `vif_number` the number of its
    interface.  `vif` names that itself, and `host_interface` the physical one, or several (the slaves of a bond), or
    "auto".  `direction` is in (pif to vif), out (vif to pif) or both; `overlay` that the traffic is inside a tunnel
    there; `filters` are pcap-filter(7) expressions by side, instead of our own.

    Without `ssh_key_path` the SSH agent and the default keys are used; `host_key_checking`, `known_hosts` and `ask` are
    those of Access; with `sudo` commands run as root by sudo.  `timeout` bounds the traffic (seconds), `duration` is
    how long to measure (needed without sources), `max_capture_size` bounds each capture (bytes).  With `match_nat`
    addresses take no part in the matching, and `slowest` is how many of the slowest packets to list.  `labels` go into
    the report.  `progress` and `log` are called with lines for people: the steps, and each command run; `tick` once a
    second while traffic runs, with the seconds so far and the packets of any kind that the vif has passed on since, if
    that is known.  `analyze` sets `matchings`: the packets themselves, of each direction that was measured.

    Use it as a context manager, or call `close`.  The methods are meant to be called in the order in which they
    stand here; each raises a NetWeaverError that says what happened and where.  For a hypervisor with another
    toolstack, override `determine_vif_number`.
    """

    def __init__(self, source_ip: str | Sequence[str], destination_name_label: str, destination_ip: str,
                 destination_host_ip: str, ssh_key_path: str | None = None, *,
                 host_interface: str | Sequence[str] = "eth0", vif_number: int = 0, vif: str | None = None,
                 toolstack: str = "xe", direction: str = "in", overlay: bool = False,
                 filters: Mapping[str, str] | None = None, count: int = 1000, duration: float | None = None,
                 timeout: float | None = None, match_nat: bool = False, slowest: int = 0,
                 max_capture_size: int = 256_000_000, labels: Mapping[str, str] | None = None, sudo: bool = False,
                 host_key_checking: str = "accept-new", known_hosts: str | None = None,
                 ask: Callable[[str], str] | None = None,
                 progress: Callable[[str], None] = lambda line: None,
                 log: Callable[[str], None] = lambda line: None,
                 tick: Callable[[float, int | None], None] | None = None) -> None:
        import threading
        if toolstack not in TOOLSTACKS or direction not in ("in", "out", "both"):
            raise UsageError(f"toolstack must be one of {', '.join(TOOLSTACKS)} and direction in, out or both")
        if direction == "both" and match_nat:
            raise UsageError("with address translation the two directions can't be told apart: measure in and out "
                             "one after the other")
        self.destination_name_label, self.destination_ip = destination_name_label, resolve(destination_ip)
        self.host_interfaces = [host_interface] if isinstance(host_interface, str) else list(host_interface)
        self.toolstack, self.vif_number, self.vif = toolstack, vif_number, vif
        self.direction, self.overlay, self.filters = direction, overlay, dict(filters or {})
        self.count, self.duration, self.match_nat, self.slowest = count, duration, match_nat, slowest
        self.timeout = duration or timeout or max(600, count // 5)
        self.max_capture_size, self.labels = max_capture_size, dict(labels or {})
        self.matchings: list[Matching] = []
        self.interrupted = False
        self._hypervisor = Target(destination_host_ip)
        self._sources = [Target(source) for source in ([source_ip] if isinstance(source_ip, str) else source_ip)]
        if not self._sources and not duration:
            raise UsageError("without a source (-s) nothing ends the measurement: give its --duration")
        self._access = Access(ssh_key_path, host_key_checking, known_hosts, ask)
        self._sudo, self._progress, self._log, self._tick = sudo, progress, log, tick
        self._changed = threading.Condition()
        self._remotes: dict[str, Remote] = {}
        self._failed: dict[str, NetWeaverError] = {}         # sources, if there are others
        self._addresses: list[str] = []                      # the sources' own, in the traffic
        self._jobs: list[Job] = []
        self._recordings: list[Recording] = []
        self._directory: str | None = None
        self._warnings: list[str] = []
        self._whole: list[Matching] = []                     # before they are cut to the window
        self._read: dict[str, list[Capture]] = {}
        self._config: dict[str, Any] = {}
        self._reportable = False
        self._counter: paramiko.SFTPClient | None = None
        self._window: tuple[int, int] | None = None          # both captures certainly ran, in the hypervisor's time

    def __enter__(self) -> NetWeaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(wait=kind is None or issubclass(kind, Exception))

    # -- the seed's public surface --

    def verify_connections(self) -> bool:
        """Connects to all hosts at once; True, or HostConnectionError if the measurement can't be made.

        Of several sources one that can't be used is left out, and named in the report.
        """
        self._access.prepare()
        targets = {str(target): target for target in [self._hypervisor, *self._sources]}

        def connect(name: str) -> None:
            try:
                self._remotes[name] = Remote(targets[name], self._access, self._changed, self._log, self._sudo)
            except NetWeaverError as error:
                if name == str(self._hypervisor):
                    raise
                self._fail(name, error)

        in_parallel(*(lambda name=name: connect(name) for name in targets
                      if name not in self._remotes and name not in self._failed), seconds=5 * CONNECT_SECONDS)
        self._live_sources()
        return True

    def determine_vif_number(self) -> str:
        """The name of the destination VM's interface on the hypervisor, such as vif5.0.

        Asks the toolstack; override it for another one (`run_command` is at hand).
        """
        try:
            return TOOLSTACKS[self.toolstack](self.run_command, self.destination_name_label, self.vif_number)
        except RemoteCommandError as error:
            raise self._located(error) from None

    def generate_and_record(self, source_command: str | None = None, dest_pif_cmd: str | None = None,
                            dest_vif_cmd: str | None = None) -> None:
        """Runs the source command on all sources while the interfaces are captured.

        The defaults are hping3 and tcpdump.  A command of one's own for a capture writes it to its standard
        output, as pcap (`tcpdump -w -`) or as text, and ends upon SIGTERM; the captures are known to listen
        before any traffic starts, and are stopped once it has ended.
        """
        self._recordings = []
        self.verify_connections()
        addresses, tcpdump_help, vif = in_parallel(
            lambda: " ".join(self._source_addresses()), self._tcpdump_help,
            lambda: self.vif or self.determine_vif_number())
        self._addresses = addresses.split()
        pifs = self._physical_interfaces(vif)
        facts, before = self._facts(pifs, vif)
        own = {"pif": dest_pif_cmd, "vif": dest_vif_cmd}
        commands = [(side, interface, own[side] or self._capture_command(side, interface, facts, tcpdump_help))
                    for side, interfaces in (("pif", pifs), ("vif", [vif]))
                    for interface in (interfaces[:1] if own[side] else interfaces)]
        source_command = source_command or format_source_command(DEFAULT_SOURCE_COMMAND, self.count,
                                                                 self.destination_ip)
        self._config = {
            "version": __version__, "hypervisor": str(self._hypervisor),
            "sources": [str(source) for source in self._sources], "destination": self.destination_ip,
            "name_label": self.destination_name_label, "toolstack": None if self.vif else self.toolstack,
            "direction": self.direction, "match_nat": self.match_nat, "overlay": self.overlay,
            "pif": ",".join(pifs), "vif": vif,
            "source_command": source_command if self._sources else None,
            **{f"{side}_command": "\n".join(command for of, _, command in commands if of == side) for side in own},
            "platform": platform(facts, tcpdump_help), "labels": self.labels}
        self._progress("Spawning packet captures...")
        remote = self._host
        counter = remote.request_sftp() if self._tick else None
        self._start_captures(commands)
        self._counter = remote.open_sftp(counter) if self._tick else None
        self._reportable = True
        started = self._hypervisor_time()
        self._generate(source_command)
        self._window = self._between(started, self._hypervisor_time())
        self._progress("Captures finished, waiting for files to flush.")
        in_parallel(self._stop_captures, lambda: self._check_interface(vif, before))

    def pull_generated_files(self) -> tuple[str, str]:
        """Fetches the captures into a private local directory and removes them from the hypervisor.

        Returns the paths of the pif's and of the vif's capture (several of one side with commas in between); they stay
        until `close`.
        """
        import tempfile
        self._progress("Transferring files...")
        self._directory = self._directory or tempfile.mkdtemp(prefix="netweaver-")
        in_parallel(*(lambda number=number: self._pull(number) for number in range(len(self._recordings))))
        return ",".join(self._paths("pif")), ",".join(self._paths("vif"))

    def analyze(self, seq_no_col: int | None = None, timestamp_col: int | None = None,
                seq_no_split_by: str | None = None, seq_no_split_index: int = 0) -> dict[str, Any]:
        """The report on the captures, as the README describes it; NoMatchError if they have no packet in common.

        Without parameters the captures are pcap files.  With them they are text, one packet a line: columns are
        separated by white space and counted from 0, `timestamp_col` is the time's column and `seq_no_col` the
        sequence number's, of which part `seq_no_split_index` counts after a split by `seq_no_split_by`.
        """
        warnings = list(self._warnings)
        outward = self.direction == "out"
        guest = None
        matchings: list[Matching]
        if seq_no_col is None or timestamp_col is None:
            self._whole, self._read = self._match()
            files = {side: file_counts(side, found, warnings) for side, found in self._read.items()}
            ends = self._ends(self._read, warnings)
            matchings = [self._cut_to_window(matching, outward or place > 0, ends)
                         for place, matching in enumerate(self._whole)]
            if self.direction == "both":
                guest = guest_times(matchings[0], self._whole[1])    # an answer may come after the window
        else:
            matching, files = match_text_files(self._paths("pif")[0], self._paths("vif")[0], warnings, seq_no_col,
                                               timestamp_col, seq_no_split_by, seq_no_split_index, outward=outward)
            matchings = [matching]
        capture = {side: {"interface": self._config[side], **self._counts(side), **files[side]} for side in files}
        self.matchings, matching = matchings, matchings[0]
        transmitted = self._config.get("transmitted", matching.first)
        if matching.first > transmitted and not outward:
            warnings.append(f"{matching.first} packets were captured on the pif, and this run sent {transmitted}: "
                            "other traffic between the same hosts (another run?) is in the numbers")
        report = build_report(matching, capture, warnings, self._config, self.slowest, outward=outward,
                              outbound=matchings[1] if guest else None, guest=guest)
        if self._failed:
            report["failed_sources"] = {name: str(error) for name, error in self._failed.items()}
        if self.interrupted:
            report["interrupted"] = True
        return report

    def save(self, directory: str, report: Mapping[str, Any]) -> str:
        """Keeps the report, and of the captures what is counted in it, in a new directory there; returns its path.

        It is there whole or not at all.  Several captures of one side are called pif.pcap, pif1.pcap and so on.
        """
        import json
        import shutil
        import tempfile
        started = re.sub(r"[-:]|\..*", "", self._config["started"])
        name = f"{started}Z-{re.sub(r'[^A-Za-z0-9_.-]', '_', self.destination_name_label or self._config['vif'])}"
        temporary = ""
        try:
            os.makedirs(directory, exist_ok=True)
            temporary = tempfile.mkdtemp(prefix=".netweaver-", dir=directory)
            counted = {side: self._keep(side) for side in ("pif", "vif")}
            for recording in self._recordings:
                target = os.path.join(temporary, os.path.basename(recording.path))
                keep = counted[recording.side]
                if keep:
                    with open(target, "wb") as file:
                        excerpt(recording.path, keep, file, self.match_nat)
                else:
                    shutil.copyfile(recording.path, target)
            for number in range(1, 1000):
                path = os.path.join(directory, name if number == 1 else f"{name}-{number}")
                if os.path.exists(path):
                    continue
                with open(os.path.join(temporary, "report.json"), "w") as text:
                    text.write(json.dumps({**report, "saved": path}) + "\n")
                os.chmod(temporary, unmasked(0o777))
                try:
                    os.rename(temporary, path)
                except OSError:
                    if os.path.exists(path):         # another run was faster
                        continue
                    raise
                temporary = ""
                return path
            raise UsageError(f"can't save in {directory}: too many runs of the same second")
        except OSError as error:
            raise UsageError(f"can't save in {directory}: {error.strerror}") from error
        finally:
            if temporary:
                shutil.rmtree(temporary, ignore_errors=True)

    # -- for subclasses, and for the end --

    def run_command(self, command: str, hint: str = "", seconds: float = ANSWER_SECONDS) -> str:
        """The standard output of a shell command on the hypervisor; RemoteCommandError, with the hint, if it fails."""
        self.verify_connections()
        job = self._host.run(command, seconds)
        if job.status == 127:
            hint = "--toolstack says which one this host has; --vif names the interface itself"
        if job.status:
            raise RemoteCommandError(f"{job.host}: {command.split('||')[0].strip()}: exit status {job.status}: "
                                     f"{last_line(job.errors)}{f' ({hint})' if hint else ''}")
        return job.output.decode(errors="replace")

    def interrupt(self) -> bool:
        """Ends the traffic now and lets the run go on to its report; False if there is nothing yet to report on."""
        with self._changed:
            self.interrupted = self._reportable
            self._changed.notify_all()
            return self._reportable

    def close(self, wait: bool = True) -> None:
        """Ends whatever still runs on the hosts, and removes all files, here and there.

        Without `wait` it only drops the connections: the hosts then clean up by themselves.
        """
        import shutil
        jobs, self._jobs = self._jobs, []
        try:
            if jobs and wait:
                in_parallel(*(job.leave for job in jobs))
        finally:
            directory, self._directory = self._directory, None
            if directory:
                shutil.rmtree(directory, ignore_errors=True)
            remotes, self._remotes = self._remotes, {}
            for remote in remotes.values():
                remote.close()

    # -- before the captures --

    def _located(self, error: RemoteCommandError) -> RemoteCommandError:
        """An error of the hypervisor's, with its name in front."""
        place = f"{self._hypervisor}: "
        return error if str(error).startswith(place) else RemoteCommandError(f"{place}{error}")

    @property
    def _host(self) -> Remote:
        """The connection to the hypervisor."""
        return self._remotes[str(self._hypervisor)]

    def _live_sources(self) -> list[str]:
        """The sources that have not failed; raises the first failure if there are none."""
        names = list(dict.fromkeys(str(source) for source in self._sources))
        live = [name for name in names if name not in self._failed]
        if names and not live:
            raise self._failed[names[0]]
        return live

    def _source_addresses(self) -> list[str]:
        """The addresses which the sources' packets to the destination may carry.

        That is the one under which a source was reached, and the one its routing chooses: management and traffic
        often have networks of their own.
        """
        def of(name: str) -> list[str]:
            remote = self._remotes[name]
            route = remote.run(f"ip -o route get {self.destination_ip}")
            found = re.search(r"\ssrc ([0-9A-Fa-f.:]+)", route.output.decode(errors="replace"))
            return [remote.address, *(found.groups() if found else ())]

        found = in_parallel(*(lambda name=name: of(name) for name in self._live_sources()))
        return [address for address in dict.fromkeys(address for some in found for address in some)
                if address and (":" in address) == (":" in self.destination_ip)]

    def _tcpdump_help(self) -> str:
        """The usage message of the hypervisor's tcpdump; CaptureError if there is none."""
        job = self._host.run("tcpdump --help 2>&1")
        text = job.output.decode(errors="replace")
        if job.status in (126, 127):
            raise CaptureError(f"{job.host}: can't run tcpdump: {last_line(text)} (install it there)")
        return text

    def _physical_interfaces(self, vif: str) -> list[str]:
        """The interfaces to capture on the pif's side; asks the toolstack or the vif's bridge if one is "auto"."""
        if "auto" not in self.host_interfaces:
            return self.host_interfaces
        try:
            if self.toolstack == "xe" and not self.vif:
                pifs, overlay = xe_uplinks(self.run_command, self.destination_name_label, self.vif_number)
            else:
                pifs, overlay = bridge_uplinks(self.run_command, vif)
        except RemoteCommandError as error:
            raise self._located(error) from None
        self.overlay = self.overlay or overlay
        return pifs

    def _facts(self, pifs: Sequence[str], vif: str) -> tuple[str, str]:
        """What the hypervisor says of itself, as far as it does, and the vif's index, which a new vif doesn't get."""
        try:
            job = self._host.run(facts_command(pifs, vif))
        except RemoteCommandError:
            return "", ""
        text = job.output.decode(errors="replace")
        index = re.search(r"^vif (\d+): ", text, re.MULTILINE)
        return text, index[1] if index else ""

    def _capture_command(self, side: str, interface: str, facts: str, tcpdump_help: str) -> str:
        expression = self.filters.get(side)
        if not expression:
            flow = self._addresses, self.destination_ip, self.direction
            expression = capture_filter(*flow)
            if side == "pif":
                if self.overlay:
                    expression = f"({expression}) or {tunnel_filter(*flow)}"
                kind = re.search(rf"^pif {re.escape(interface)} link .*\slink/(\w+)", facts, re.MULTILINE)
                if kind is None or kind[1] == "ether":
                    expression = tagged_filter(expression)
        return capture_command(interface, expression, tcpdump_help, OVERLAY_SNAPLEN if self.overlay else SNAPLEN)

    # -- while they run --

    def _start_captures(self, commands: Iterable[tuple[str, str, str]]) -> None:
        """Starts all captures at once; returns when they are listening."""
        remote, seconds = self._host, self.timeout + 6 * ANSWER_SECONDS
        commands = list(commands)
        for side, interface, command in commands:
            job = remote.start(command, seconds, f"{side}.pcap", size=self.max_capture_size, share=len(commands))
            self._recordings.append(Recording(side, interface, job))
            self._jobs.append(job)
        self._wait(lambda: all("listening on" in recording.job.errors or recording.job.ended
                               for recording in self._recordings), ANSWER_SECONDS)
        self._check_captures()
        for recording in self._recordings:
            if "listening on" not in recording.job.errors:
                self._warnings.append(f"the {recording.side}'s command didn't say that it is listening: packets at the "
                                      "start may be missing")

    def _check_captures(self) -> None:
        """Raises CaptureError, in tcpdump's words, if a capture has ended by itself."""
        remote = self._host
        for recording in self._recordings:
            job = recording.job
            remote.check(job)
            if not job.ended or job.stopped:
                continue
            if job.status is None:
                raise CaptureError(f"{job.host}: the capture on {recording.interface} can't run: "
                                   f"{last_line(job.errors)}")
            words = "; ".join(line.strip() for line in job.errors.splitlines() if "listening on" not in line)
            hint = ""
            if "No such device" in words or "doesn't exist" in words:
                links = remote.run("ip -o link || ls /sys/class/net").output.decode(errors="replace")
                names = re.findall(r"^(?:\d+: )?([^\s:@]+)", links, re.MULTILINE)
                names.sort(key=lambda name: (bool(VM_INTERFACE.fullmatch(name)) != (recording.side == "vif"), name))
                hint = f" (there are: {', '.join(names[:40])}{', …' if len(names) > 40 else ''})"
            elif "permi" in words:
                hint = " (log in as root, or use --sudo)"
            raise CaptureError(f"{job.host}: the capture on {recording.interface} ended with status {job.status}: "
                               f"{words[-500:] or 'no message'}{hint}")

    def _hypervisor_time(self) -> tuple[int, int] | None:
        """Now: (the hypervisor's clock, ours, which only goes forward) in nanoseconds; None if it can't tell."""
        import time
        job = self._recordings[0].job
        job.mark = None
        job.say("mark")
        self._wait(lambda: job.mark is not None or job.ended, ANSWER_SECONDS)
        return (job.mark, time.monotonic_ns()) if job.mark else None

    def _between(self, start: tuple[int, int] | None, end: tuple[int, int] | None) -> tuple[int, int] | None:
        """The window between two times of the hypervisor; None, and a warning, if its clock was set meanwhile."""
        if start is None or end is None:
            return None
        step = (end[0] - start[0]) - (end[1] - start[1])
        if abs(step) > NANOSECONDS:
            self._warnings.append(f"the hypervisor's clock was set by about {step / NANOSECONDS:.0f} s during the run: "
                                  "delays across that moment are wrong; measure again")
            return None
        self._config["window"] = [iso_time(start[0]), iso_time(end[0])]
        return start[0], end[0]

    def _generate(self, command: str) -> None:
        """Runs the traffic to its end, to the time-out or to an interruption, while the captures run."""
        import time
        self._config["started"] = iso_time(time.time_ns())
        begun = time.monotonic()
        jobs: list[Job] = []

        def start(name: str) -> None:
            try:
                jobs.append(self._remotes[name].start(command, self.timeout + ANSWER_SECONDS, "/dev/null"))
            except HostConnectionError as error:
                self._fail(name, error)

        in_parallel(*(lambda name=name: start(name) for name in self._live_sources()))
        self._live_sources()
        self._jobs += jobs
        over = self._watch(lambda: (bool(jobs) and all(job.ended for job in jobs)) or self.interrupted
                           or any(recording.job.ended for recording in self._recordings))
        self._check_captures()
        for job in jobs:
            try:
                self._remotes[job.host].check(job)
                if error := generator_error(job):
                    raise error
            except NetWeaverError as failure:
                self._fail(job.host, failure)
        self._live_sources()
        if not all(job.ended for job in jobs):
            for job in jobs:
                job.stop()
            if not over and not self.duration:
                self._warnings.append(f"the source command was stopped after {self.timeout:g} s (--timeout)")
            if not self._wait(lambda: all(job.ended for job in jobs), ANSWER_SECONDS):
                raise RemoteCommandError(f"{', '.join(job.host for job in jobs if not job.ended)}: the source command "
                                         "doesn't end")
        self._config["duration"] = round(time.monotonic() - begun, 6)
        said = [TRANSMITTED.search(job.errors) for job in jobs]
        if said and all(said) and not any(job.stopped for job in jobs) and not self._failed:
            self._config["transmitted"] = sum(int(found[1]) for found in said if found)

    def _watch(self, done: Callable[[], bool]) -> bool:
        """Waits for the end of the traffic, telling once a second how far it is; False if the time is over."""
        import time
        begun = time.monotonic()
        first = self._passed()
        while True:
            left = begun + self.timeout - time.monotonic()
            if self._wait(done, max(0, min(left, 1)) if self._tick else max(0, left)):
                return True
            if left <= 1 or not self._tick:
                return self._wait(done, max(0, begun + self.timeout - time.monotonic()))
            passed = self._passed()
            self._tick(time.monotonic() - begun, None if first is None or passed is None else passed - first)

    def _passed(self) -> int | None:
        """How many packets the vif has passed on to the VM (or from it) so far, by the kernel; None if not known.

        A file read in sshd itself: no process is started on the hypervisor while it measures.
        """
        if self._counter is None:
            return None
        from paramiko import SFTPError, SSHException
        which = "rx" if self.direction == "out" else "tx"
        try:
            with self._counter.open(f"/sys/class/net/{self._config['vif']}/statistics/{which}_packets") as file:
                return int(file.read(32))
        except (SFTPError, SSHException, EOFError, OSError, ValueError):
            self._counter = None
            return None

    def _fail(self, source: str, error: NetWeaverError) -> None:
        """Notes that one of the sources is of no use."""
        self._failed[source] = error
        self._warnings.append(f"a source failed, so its traffic is missing or not whole: {error}")

    def _stop_captures(self) -> None:
        """Stops the captures when the kernel has handed over what it saw."""
        remote = self._host
        for recording in self._recordings:
            recording.sftp = remote.request_sftp()
        self._wait(lambda: any(recording.job.ended for recording in self._recordings), DRAIN_SECONDS)
        self._check_captures()
        for recording in self._recordings:
            recording.job.stop()
        if not self._wait(lambda: all(recording.job.ended for recording in self._recordings), ANSWER_SECONDS):
            raise CaptureError(f"{self._hypervisor}: a capture doesn't end")

    def _check_interface(self, vif: str, before: str) -> None:
        """RemoteCommandError if the VM has another interface now than when the captures began."""
        from shlex import quote
        advice = "the VM was moved, restarted or unplugged during the run: measure again"
        try:
            now = self.vif or self.determine_vif_number()
        except RemoteCommandError as error:
            raise RemoteCommandError(f"{error}: {advice}") from None
        answer = self._host.run(f"ip -o link show dev {quote(vif)}").output
        index = answer.partition(b":")[0].decode(errors="replace")
        if now != vif or (before and index != before):
            became = f"is {now} now" if now != vif else "is another one now" if index else "is gone"
            raise RemoteCommandError(f"{self._hypervisor}: {vif} {became}: {advice}")

    # -- after them --

    def _paths(self, side: str) -> list[str]:
        return [recording.path for recording in self._recordings if recording.side == side]

    def _counts(self, side: str) -> dict[str, int]:
        """What tcpdump said of a side's captures, in sum."""
        total: dict[str, int] = {}
        for recording in self._recordings:
            for name, number in (tcpdump_counts(recording.job.errors) if recording.side == side else {}).items():
                total[name] = total.get(name, 0) + number
        return total

    def _pull(self, number: int) -> None:
        recording, remote = self._recordings[number], self._host
        job, side = recording.job, recording.side
        before = sum(other.side == side for other in self._recordings[:number])
        local = os.path.join(self._directory or "", f"{side}{before or ''}.pcap")
        sftp = remote.open_sftp(recording.sftp)
        try:
            remote.fetch(f"{job.directory}/{side}.pcap", local, sftp, self.max_capture_size)
        finally:
            if sftp:
                close(sftp)
        job.leave()
        recording.path = local
        counts = tcpdump_counts(job.errors)
        if counts and os.path.getsize(local) < PCAP_HEADER:
            raise self._unwritten(recording, 0)

    def _unwritten(self, recording: Recording, records: int) -> CaptureError:
        job = recording.job
        return CaptureError(f"{job.host}: tcpdump captured {tcpdump_counts(job.errors).get('captured', 0)} packets on "
                            f"{recording.interface} and {records} are in the file: is the disk under {job.directory} "
                            "full?")

    def _match(self) -> tuple[list[Matching], dict[str, list[Capture]]]:
        """Pairs the packets of each direction that is measured."""
        sources: list[str] = []
        destinations: list[str] = []
        if self.direction == "both" or (self.overlay and not self.match_nat):        # else the filter has done it
            sources, destinations = [] if self.filters else self._addresses, [self.destination_ip]
        return match_directions(self._paths("pif"), self._paths("vif"), self.direction, match_nat=self.match_nat,
                                sources=sources, destinations=destinations,
                                start=self._window[0] if self._window else 0)

    def _ends(self, captures: Mapping[str, Sequence[Capture]], warnings: list[str]) -> dict[str, int]:
        """The last time of each side whose capture reached its size limit; CaptureError if the disk cut it short."""
        ends: dict[str, int] = {}
        for side, found in captures.items():
            recordings = [recording for recording in self._recordings if recording.side == side]
            for recording, capture in zip(recordings, found):
                job, records = recording.job, capture.records
                if tcpdump_counts(job.errors).get("captured", 0) <= records:
                    continue
                if os.path.getsize(recording.path) < job.size_limit - 4096:
                    raise self._unwritten(recording, records)
                ends[side] = min(ends.get(side, capture.last), capture.last)
                limit = ("--max-capture-size" if job.size_limit >= self.max_capture_size // 1024 * 1024 else
                         "half of the hypervisor's free space, for all captures")
                warnings.append(f"{side}: the capture reached its size limit of {job.size_limit} bytes ({limit}); what "
                                "came later is in no count")
        return ends

    def _cut_to_window(self, matching: Matching, outward: bool, ends: Mapping[str, int]) -> Matching:
        """The packets that passed while all captures certainly ran and had room."""
        if self._window is None:
            return matching
        start, end = self._window
        first, second = ("vif", "pif") if outward else ("pif", "vif")
        # The captures ran on for DRAIN_SECONDS, of which the kernel may keep the last one to itself.
        drained = end + int((DRAIN_SECONDS - 1) * NANOSECONDS)
        return within(matching, start, min(end, ends.get(first, end)), min(drained, ends.get(second, drained)))

    def _keep(self, side: str) -> Callable[[bytes, int], bool] | None:
        """Which packets of a side's captures are counted in the report; None if all are."""
        start = self._window[0] if self._window else 0
        if not self._read:                           # text
            return None
        there = sum(capture.records - capture.other - capture.cut for capture in self._read[side])
        firsts: set[tuple[bytes, int]] = set()
        seconds: set[bytes] = set()
        known: set[bytes] = set()
        strangers: set[int] = set()
        counted = 0
        for place, (kept, whole) in enumerate(zip(self.matchings, self._whole)):
            outward = self.direction == "out" or place > 0
            if outward == (side == "vif"):
                counted += kept.first
                firsts.update(zip(kept.identities, kept.sent))
            else:
                counted += kept.second
                seconds.update(kept.identities)
                known.update(whole.identities)
                strangers.update(kept.stranger_times)
        if counted == there:
            return None
        return lambda identity, time: ((identity, time) in firsts or (time >= start and (
            identity in seconds or (identity not in known and time in strangers))))

    def _wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Waits for a condition on the jobs; False if the time is over."""
        with self._changed:
            return self._changed.wait_for(condition, seconds)


def generator_error(job: Job) -> NetWeaverError | None:
    """What is wrong with a source command that has ended; exit status 1 for "no reply" is no failure."""
    if not job.ended or job.stopped:
        return None
    if job.status is None:
        return RemoteCommandError(f"{job.host}: the source command could not be run: {last_line(job.errors)}")
    program = os.path.basename(job.command.split(None, 1)[0]) if job.command.split() else ""
    unanswered = TRANSMITTED.search(job.errors) or program in ("ping", "ping6")
    if job.status == 0 or (job.status == 1 and unanswered):
        return None
    hint = " (install it there, or choose another --source-command)" if job.status == 127 else ""
    return RemoteCommandError(f"{job.host}: {job.command}: exit status {job.status}: {last_line(job.errors)}{hint}")


def format_source_command(template: str, count: int, destination: str) -> str:
    """The source command with {count} and {destination} filled in; UsageError for any other placeholder."""
    from string import Formatter
    values = {"count": str(count), "destination": destination}
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UsageError(f"--source-command: {error}; write {{{{ or }}}} for a brace") from None
    for _, name, spec, conversion in parts:
        if name is not None and (name not in values or spec or conversion):
            raise UsageError(f"--source-command: unknown placeholder {{{name}}}; there are {{count}} and "
                             "{destination}; write {{ or }} for a brace")
    return template.format_map(values)


# ---- Report: what was measured, as a document ------------------------------------------------------------------

def match_captures(pif_paths: Sequence[str], vif_paths: Sequence[str], *, outward: bool = False,
                   match_nat: bool = False, sources: Iterable[str] = (), destinations: Iterable[str] = (),
                   start: int = 0) -> tuple[Matching, dict[str, list[Capture]]]:
    """Pairs the packets of pcap or pcapng files; those of one side are merged by time.

    Returns the matching, from pif to vif or `outward` from vif to pif, and the captures by side, with their counts.
    With `match_nat` the addresses take no part; `sources` and `destinations` are addresses to which the packets are
    limited, and `start` the time (ns) before which none counts.  Raises CaptureError for a file that can't be read.
    """
    from contextlib import ExitStack
    sources, destinations = list(sources), list(destinations)
    sides: dict[str, list[Capture]] = {"pif": [], "vif": []}
    with ExitStack() as files:
        for side, paths in (("pif", pif_paths), ("vif", vif_paths)):
            for path in paths:
                try:
                    file = files.enter_context(open(path, "rb"))
                    file.peek()                      # a directory can be opened
                except OSError as error:
                    raise CaptureError(f"{path}: can't read it: {error.strerror}") from error
                sides[side].append(Capture(file, path, translated=match_nat, sources=sources,
                                           destinations=destinations))
        early: set[bytes] = set()
        first, second = (merged(captures) for captures in (reversed(sides.values()) if outward else sides.values()))
        return match(since(first, start, early), since(second, start), early), sides


def excerpt(path: str, keep: Callable[[bytes, int], bool], file: IO[bytes], translated: bool = False) -> None:
    """Copies those records of a pcap file whose packets (identity, time) are to be kept."""
    with open(path, "rb") as source, open(path, "rb") as records:
        capture = Capture(source, path, translated=translated)
        capture.offsets = array("Q")
        file.write(records.read(PCAP_HEADER))
        for keys, times in capture:
            for key, time, offset in zip(keys, times, capture.offsets):
                if keep(key, time):
                    records.seek(offset)
                    head = records.read(16)
                    size, = unpack_from(capture.order + "I", head, 8)
                    file.write(head + records.read(size))


def match_directions(pif_paths: Sequence[str], vif_paths: Sequence[str], direction: str, *,
                     sources: Iterable[str] = (), destinations: Iterable[str] = (),
                     **options: Any) -> tuple[list[Matching], dict[str, list[Capture]]]:
    """Pairs the packets of one direction (in: pif to vif, out), or of both: then returns first in, then out.

    `sources` and `destinations` are those of the way in; takes the further options of `match_captures`.
    """
    ways = [match_captures(pif_paths, vif_paths, outward=outward, **options,
                           sources=destinations if outward else sources,
                           destinations=sources if outward else destinations)
            for outward in {"in": (False,), "out": (True,), "both": (False, True)}[direction]]
    captures = ways[0][1]
    for _, others in ways[1:]:                       # filtered is what is in neither direction
        for capture, other in zip((*captures["pif"], *captures["vif"]), (*others["pif"], *others["vif"])):
            capture.filtered -= other.records - other.other - other.cut - other.filtered
            capture.last = max(capture.last, other.last)
    return [matching for matching, _ in ways], captures


def match_files(pif_paths: Sequence[str], vif_paths: Sequence[str], warnings: list[str],
                **options: Any) -> tuple[Matching, dict[str, dict[str, Any]]]:
    """Pairs the packets of pcap or pcapng files, with the options of `match_captures`.

    Returns the matching and, for each side, what was in its files; what was odd in them is added to the warnings.
    """
    matching, captures = match_captures(pif_paths, vif_paths, **options)
    return matching, {side: file_counts(side, found, warnings) for side, found in captures.items()}


def file_counts(side: str, captures: Sequence[Capture], warnings: list[str]) -> dict[str, Any]:
    """What was in the files of a side, for the report; what was odd is added to the warnings."""
    for capture in captures:
        if capture.partial:
            warnings.append(f"{side}: the last record of {os.path.basename(capture.name)} is not whole "
                            f"({capture.partial} bytes); the {capture.records} before it are used")
        if capture.cut:
            warnings.append(f"{side}: {capture.cut} packets were cut by the snap length before what identifies them, "
                            "and are left out of all counts: capture more of each packet (tcpdump -s)")
    names = ("records", "other", "filtered", "cut")
    counts: dict[str, Any] = {name: sum(getattr(capture, name) for capture in captures) for name in names}
    precisions = {capture.precision for capture in captures}
    return {**counts, "precision": "microseconds" if "microseconds" in precisions else "nanoseconds"}


def match_text_files(pif_path: str, vif_path: str, warnings: list[str],
                     *columns: Any, outward: bool = False) -> tuple[Matching, dict[str, dict[str, Any]]]:
    """Pairs the lines of two text captures by the columns which TextCapture describes; returns as match_files."""
    with open(pif_path, errors="replace") as pif, open(vif_path, errors="replace") as vif:
        captures = [TextCapture(pif, *columns), TextCapture(vif, *columns)]
        [(_, sent)], [(_, seen)] = blocks = [list(capture) for capture in captures]
    if sent and seen and not any(capture.dated for capture in captures):
        days = round((seen[0] - sent[0]) / DAY)      # midnight was between the first packet's sightings
        for i in range(len(seen) if days else 0):
            seen[i] -= days * DAY
    matching = match(*(reversed(blocks) if outward else blocks))
    sides = {}
    for side, capture in zip(("pif", "vif"), captures):
        sides[side] = {"records": capture.records, "skipped": capture.skipped}
        if capture.skipped:
            warnings.append(f"{side}: {capture.skipped} lines without a sequence number or time were left out")
    if matching.alike:
        warnings.append("are the sequence numbers really in column seq_no_col?")
    return matching, sides


def capture_warnings(side: str, counts: Mapping[str, Any]) -> list[str]:
    """What tcpdump's own counts say against a capture."""
    warnings = []
    if counts.get("dropped"):
        warnings.append(f"{side}: the kernel dropped {counts['dropped']} packets before tcpdump read them, so \"lost\" "
                        "can't be trusted: generate less traffic, or give the hypervisor more CPU")
    return warnings


def quality_warnings(matching: Matching, figures: Mapping[str, Any], outward: bool = False) -> list[str]:
    """What speaks against the numbers of a matching, with what to do about it."""
    warnings = []
    first, second = ("vif", "pif") if outward else ("pif", "vif")
    if matching.alike:
        warnings.append(f"{len(matching.alike)} packets on the {first} share all that identifies them with another "
                        "one; they were paired in order of appearance, which is a guess where some are lost")
    merged_segments = mergers(matching)
    if merged_segments:
        warnings.append(f"{merged_segments} packets have another length on the {second} than on the {first}, so they "
                        "are in neither's matches: segments were merged or split (GRO, TSO); measure with small "
                        "packets, or switch it off (ethtool -K)")
    if 2 * matching.matched < min(matching.first, matching.second) and not merged_segments:
        warnings.append("most packets of each interface were not seen on the other: is there address translation "
                        "(--match-nat), a tunnel of an unknown kind, or other traffic?")
    if figures["negative"]:
        warnings.append(f"{figures['negative']} delays are negative (down to {figures['minimum']:g} µs): the stamps of "
                        "two CPU cores disagree, the clock was set, or pif and vif are swapped")
    if figures["maximum"] * 1000 > LONGEST_DELAY:
        absurd = sum(delay > LONGEST_DELAY for delay in matching.delays)
        warnings.append(f"{absurd} delays are longer than {LONGEST_DELAY / NANOSECONDS:g} s (up to "
                        f"{figures['maximum']:g} µs): was the clock set meanwhile?")
    few = [percent for percent, enough in (("90", 5), ("95", 10), ("99", 50), ("99.9", 500))
           if matching.matched < enough]
    if few:
        warnings.append(f"too few packets matched ({matching.matched}) for the percentiles {', '.join(few)}, which are "
                        "hardly more than the maximum: send more (-c)")
    return warnings


def mergers(matching: Matching) -> int:
    """How many of the packets that only the vif saw are the same as one lost from the pif, but for their length.

    It looks at no more than the first SAMPLE of them.
    """
    if not matching.strangers or not matching.lost:
        return 0
    rest = {identity[:1] + identity[3:] for identity, delay in zip(matching.identities, matching.delays)
            if delay == LOST and identity[0] != TEXT}
    return sum(identity[:1] + identity[3:] in rest for identity in matching.strangers)


def no_match_message(matching: Matching, pif: str, vif: str, cut: int, outward: bool = False) -> str:
    """Why two captures may have nothing in common."""
    first, second = ("vif", "pif") if outward else ("pif", "vif")
    seen = {first: matching.first, second: matching.second}
    if cut:
        cause = f"{cut} packets were cut by the snap length before what identifies them: capture more (tcpdump -s)"
    elif not any(seen.values()) and outward:
        cause = "the VM sent nothing: is DESTINATION its address, does it answer this traffic?"
    elif not any(seen.values()):
        cause = ("the traffic passes neither: is DESTINATION the address of this VM, do the packets carry SOURCE's "
                 "address, does a firewall drop them earlier?")
    elif not seen["pif"]:
        cause = (f"the traffic doesn't {'go out' if outward else 'come in'} by {pif}: try another -i, or -i auto; "
                 "inside a tunnel it is found with --overlay")
    elif not seen["vif"]:
        cause = (f"none is on {vif}: does a firewall drop them, is the VM's address on another interface (--num), "
                 f"does an HVM guest use its emulated one (--vif {re.sub('^vif', 'tap', vif)})?")
    elif mergers(matching):
        cause = "they differ in length: segments were merged or split (GRO, TSO); measure with small packets"
    else:
        cause = "the packets differ: are they translated (--match-nat), or was it other traffic?"
    return f"no packet was seen on both interfaces ({seen['pif']} on {pif}, {seen['vif']} on {vif}): {cause}"


def figures_of(matching: Matching, warnings: list[str], outward: bool = False) -> dict[str, Any]:
    """The numbers of one direction, of which at least one packet matched; what is wrong goes to the warnings."""
    figures = statistics(matching.samples())
    ipdv, extents = variation(matching.delays), reordering(matching.arrivals)
    warnings += quality_warnings(matching, figures, outward)
    pdv, negative = figures.pop("pdv"), figures.pop("negative")
    first, second = ("vif", "pif") if outward else ("pif", "vif")
    return {
        **figures,
        "unit": "microseconds",
        "packets": {
            first: matching.first, second: matching.second, "matched": matching.matched, "lost": matching.lost,
            "duplicated": matching.duplicated, "reordered": len(extents), f"{second}_only": matching.second_only},
        "loss_ratio": matching.lost / matching.first,
        "reordering": {"ratio": len(extents) / matching.matched, "maximum_extent": max(extents.values(), default=0)},
        "pdv": pdv,
        "ipdv": None if ipdv is None else ipdv / 1000,
        "negative": negative,
    }


def guest_figures(times: Sequence[int], counts: Mapping[str, int], warnings: list[str]) -> dict[str, Any]:
    """The numbers of `guest_times`; what is wrong goes to the warnings."""
    if counts["ambiguous"]:
        warnings.append(f"guest: {counts['ambiguous']} probes were sent more than once (retransmissions?) and are left "
                        "out: which of them was answered is not known")
    if not times:
        return {"packets": dict(counts)}
    figures = statistics(times)
    del figures["pdv"], figures["negative"]
    return {**figures, "unit": "microseconds", "packets": dict(counts)}


def build_report(matching: Matching, capture: Mapping[str, Mapping[str, Any]], warnings: Sequence[str],
                 config: Mapping[str, Any], slowest: int = 0, *, outward: bool = False,
                 outbound: Matching | None = None,
                 guest: tuple[Sequence[int], Mapping[str, int]] | None = None) -> dict[str, Any]:
    """The JSON document on a matching, as the README describes it; NoMatchError if no packet matched.

    `capture` holds, for each side, what is known of its capture (`records` at least), `warnings` what is wrong so
    far, `config` what ran (`pif` and `vif` name the interfaces or files).  With `outward` the matching is from vif to
    pif; `outbound` is that of the other direction and `guest` what `guest_times` found, if both were measured.
    """
    if not matching.matched:
        cut = sum(counts.get("cut", 0) for counts in capture.values())
        raise NoMatchError(no_match_message(matching, str(config["pif"]), str(config["vif"]), cut, outward))
    warnings = [*warnings, *(warning for side in capture for warning in capture_warnings(side, capture[side]))]
    report = figures_of(matching, warnings, outward)
    if outbound is not None:
        back: list[str] = []
        if outbound.matched:
            report["outbound"] = figures_of(outbound, back, outward=True)
        else:
            report["outbound"] = None
            back.append(no_match_message(outbound, str(config["pif"]), str(config["vif"]), 0, outward=True))
        warnings += [f"outbound: {warning}" for warning in back]
    if guest is not None:
        report["guest"] = guest_figures(*guest, warnings)
    report |= {"capture": {side: dict(counts) for side, counts in capture.items()}, "warnings": warnings,
               "config": dict(config), "schema_version": SCHEMA_VERSION}
    if slowest:
        report["slowest"] = slowest_packets(matching, slowest, outward)
    return report


def iso_time(nanoseconds: int) -> str:
    """A time as ISO 8601 in UTC, with nanoseconds."""
    import time
    seconds, fraction = divmod(nanoseconds, NANOSECONDS)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{fraction:09}Z"


def slowest_packets(matching: Matching, count: int, outward: bool = False) -> list[dict[str, Any]]:
    """The matched packets with the largest delays, the slowest first: times, delay in microseconds, and identity."""
    from heapq import nlargest
    ranks = nlargest(count, matching.arrivals, key=matching.delays.__getitem__)
    first, second = ("t_vif", "t_pif") if outward else ("t_pif", "t_vif")
    return [{first: iso_time(matching.sent[rank]), second: iso_time(matching.sent[rank] + matching.delays[rank]),
             "delay": matching.delays[rank] / 1000, **describe(matching.identities[rank])} for rank in ranks]


CSV_FIELDS = ("source", "destination", "protocol", "source_port", "destination_port", "sequence", "acknowledgment",
              "icmp_type", "icmp_code", "identifier", "ip_id", "fragment_offset", "length")


def csv_rows(matching: Matching) -> Iterator[Sequence[Any]]:
    """A table of the packets of the first point: time, identity, delay in microseconds (empty if lost) and flags."""
    yield "time", *CSV_FIELDS, "delay_us", "flags"
    late = reordering(matching.arrivals)
    for rank, (time, delay) in enumerate(zip(matching.sent, matching.delays)):
        fields = describe(matching.identities[rank])
        flags = [flag for flag, applies in (
            ("lost", delay == LOST), ("reordered", rank in late), ("duplicated", rank in matching.extra_copies),
            ("alike", rank in matching.alike)) if applies]
        yield (iso_time(time), *(fields.get(name, "") for name in CSV_FIELDS),
               "" if delay == LOST else f"{delay / 1000:.3f}", " ".join(flags))


def write_csv(matching: Matching, path: str) -> None:
    """Writes the table of `csv_rows`."""
    import csv
    write_whole(path, lambda file: csv.writer(file, lineterminator="\n").writerows(csv_rows(matching)))


def unmasked(mode: int) -> int:
    """The mode that a new file or directory would have."""
    os.umask(mask := os.umask(0))
    return mode & ~mask


def write_whole(path: str, write: Callable[[Any], object], mode: str = "w") -> None:
    """Writes a file which is there whole or not at all, with the mode that the umask gives; UsageError if it can't."""
    import tempfile
    name = None
    try:
        if os.path.exists(path) and not os.path.isfile(path):        # a device or a pipe
            with open(path, mode) as file:
                write(file)
            return
        with tempfile.NamedTemporaryFile(mode, dir=os.path.dirname(path) or ".", prefix=".netweaver-",
                                         delete=False) as temporary:
            name = temporary.name
            write(temporary)
        os.chmod(name, unmasked(0o666))
        os.replace(name, path)
        name = None
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}") from error
    finally:
        if name:
            os.unlink(name)


# ---- Presentation: a document, for people and for other programs ----------------------------------------------

BINS, BAR = 12, 40                                   # of a histogram: lines, and the width of the longest bar


def duration_text(microseconds: float) -> str:
    """A time in a unit that suits it."""
    for unit, size in (("s", 1e6), ("ms", 1e3), ("µs", 1)):
        if abs(microseconds) >= size:
            number = microseconds / size
            return f"{number:.3g} {unit}" if abs(number) < 999.5 else f"{number:.0f} {unit}"
    return f"{microseconds * 1000:.0f} ns"


def percent(ratio: float) -> str:
    return f"{100 * ratio:.3g} %"


def histogram(delays: Sequence[int], fancy: bool = True) -> list[str]:
    """Lines that show how the delays (ns) are distributed, up to their 99th percentile, and how many are above it."""
    ranked = sorted(delays)
    low, high = ranked[0], ranked[(len(ranked) - 1) * 99 // 100]
    width = max(1, -(-(high + 1 - low) // BINS))
    edges = [low + width * place for place in range(BINS + 1) if low + width * (place - 1) <= high]
    below = [bisect_left(ranked, edge) for edge in edges]
    counts = list(map(sub, islice(below, 1, None), below))
    rows = [(duration_text(edge / 1000), number) for edge, number in zip(edges, counts)]
    if len(ranked) > below[-1]:
        rows.append((f"> {duration_text(edges[-1] / 1000)}", len(ranked) - below[-1]))
    most, column = max(number for _, number in rows), max(len(label) for label, _ in rows)
    lines = []
    for label, number in rows:
        eighths = -(-number * BAR * 8 // most)
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip() if fancy else "#" * (eighths // 8)
        lines.append(f"{label:>{column}}  {number:>{len(str(most))}}  {bar}".rstrip())
    return lines


def side_names(config: Mapping[str, Any]) -> dict[str, str]:
    """The interfaces, or the files' names without their directories, by side."""
    return {side: ",".join(map(os.path.basename, str(config[side]).split(","))) for side in ("pif", "vif")}


def summary(report: Mapping[str, Any], delays: Sequence[int], fancy: bool = True) -> list[str]:
    """Lines for people on what was measured; `delays` are the samples (ns)."""
    config, names = report["config"], side_names(report["config"])
    ways = [("out" if config.get("direction") == "out" else "in", report)]
    if report.get("outbound"):
        ways.append(("out", report["outbound"]))
    lines = []
    for way, part in ways:
        first, second = ("vif", "pif") if way == "out" else ("pif", "vif")
        packets, reordered = part["packets"], part["reordering"]
        lines += [f"{names[first]} -> {names[second]}: {packets['matched']} packets matched of {packets[first]}",
                  *_delay_lines(part),
                  f"  lost {packets['lost']} ({percent(part['loss_ratio'])})   duplicated {packets['duplicated']}   "
                  f"reordered {packets['reordered']} ({percent(reordered['ratio'])})   "
                  f"on {names[second]} alone {packets[f'{second}_only']}"]
    guest = report.get("guest")
    if guest:
        counts = guest["packets"]
        lines += [f"the VM itself: {counts['answered']} probes answered, {counts['unanswered']} not",
                  *(_delay_lines(guest) if "median" in guest else ())]
    if report.get("comparison"):
        lines.append(comparison_text(report["comparison"]))
    return [*lines, *(f"  {line}" for line in histogram(delays, fancy))]


def _delay_lines(part: Mapping[str, Any]) -> list[str]:
    named = [(name, part[name]) for name in ("median", "average", "stdev", "minimum", "maximum")]
    named += [(f"p{name}", value) for name, value in part["percentiles"].items()]
    cells = [f"{name:<8}{duration_text(value):>9}" for name, value in named]
    return ["  " + "   ".join(cells[:5]), "  " + "   ".join(cells[5:])]


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """A line on what has changed since the baseline."""
    parts = []
    for name, label in (("median", "median"), ("p99", "p99"), ("loss_ratio", "loss")):
        part = comparison[name]
        shift, *ends = [f"{100 * value:+.3g} %" if name == "loss_ratio" else _signed(value)
                        for value in (part["shift"], *(part["interval"] or ()))]
        sure = " to ".join(ends) or "too few packets to tell"
        parts.append(f"{label} {shift} ({sure}{', changed' if part['distinguishable'] else ''})")
    verdict = "different from" if comparison["distinguishable"] else "no difference to be seen from"
    return f"{verdict} {comparison['path']}: {', '.join(parts)}"


def _signed(microseconds: float) -> str:
    return f"{'-' if microseconds < 0 else '+'}{duration_text(abs(microseconds))}"


def prometheus(report: Mapping[str, Any]) -> str:
    """The numbers of a report for node_exporter's textfile collector, in Prometheus' base units (seconds)."""
    config = report["config"]
    common = {name: config.get(name) or "" for name in ("hypervisor", "name_label", "destination", "pif", "vif")}
    common |= {re.sub(r"^(?=\d)|[^A-Za-z0-9_]", "_", key): value for key, value in config.get("labels", {}).items()}
    families: dict[str, tuple[str, list[tuple[dict[str, str], float]]]] = {
        "delay_seconds": ("Time from one interface to the other; guest: time that the VM took to answer.", []),
        "packets": ("Packets by what became of them.", []),
        "loss_ratio": ("Lost packets per packet sent (RFC 7680).", []),
        "reordered_ratio": ("Reordered packets per packet received (RFC 4737).", []),
        "negative_delays": ("Delays below zero.", []),
        "warnings": ("How many warnings speak against these numbers.", [({}, len(report["warnings"]))]),
        "measured_timestamp_seconds": ("When the traffic started.", []),
    }
    parts = [("out" if config.get("direction") == "out" else "in", report), ("out", report.get("outbound")),
             ("guest", report.get("guest"))]
    for way, part in parts:
        if not part:
            continue
        values = {name: part.get(name) for name in ("average", "minimum", "maximum", "stdev", "median", "pdv", "ipdv")}
        values |= {f"p{name}": value for name, value in part.get("percentiles", {}).items()}
        families["delay_seconds"][1].extend(({"direction": way, "statistic": name}, value / 1e6)
                                            for name, value in values.items() if value is not None)
        families["packets"][1].extend(({"direction": way, "kind": kind}, number)
                                      for kind, number in part["packets"].items())
        if "loss_ratio" in part:
            families["loss_ratio"][1].append(({"direction": way}, part["loss_ratio"]))
            families["reordered_ratio"][1].append(({"direction": way}, part["reordering"]["ratio"]))
            families["negative_delays"][1].append(({"direction": way}, part["negative"]))
    if "started" in config:
        from calendar import timegm
        from time import strptime
        started = timegm(strptime(config["started"][:19], "%Y-%m-%dT%H:%M:%S"))
        families["measured_timestamp_seconds"][1].append(({}, started))
    lines = []
    for name, (text, samples) in families.items():
        if samples:
            lines += [f"# HELP netweaver_{name} {text}", f"# TYPE netweaver_{name} gauge"]
        for own, value in samples:
            labels = ",".join(f'{key}="{_label_value(text)}"' for key, text in {**common, **own}.items())
            lines.append(f"netweaver_{name}{{{labels}}} {value!r}")
    return "\n".join(lines) + "\n"


def _label_value(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# Limits that a run can be held to: which numbers, and in which units they may be given.
TIMES = {"ns": 1e-3, "us": 1, "µs": 1, "ms": 1e3, "s": 1e6, "": 1}
LIMITED: dict[str, tuple[tuple[str, ...], dict[str, float]]] = {
    **{name: ((name,), TIMES) for name in ("average", "minimum", "maximum", "stdev", "median", "pdv", "ipdv")},
    **{f"p{name}": (("percentiles", name), TIMES) for name in ("90", "95", "99", "99.9")},
    **{name: (("packets", name), {"": 1}) for name in ("matched", "lost", "duplicated", "reordered")},
    "negative": (("negative",), {"": 1}),
    "loss": (("loss_ratio",), {"": 1, "%": 0.01}),
    "reordering": (("reordering", "ratio"), {"": 1, "%": 0.01}),
}


class Limit:
    """A condition such as "p99>200" (µs), "loss>0.1%" or "outbound.median>=50us"; UsageError if it is none."""

    def __init__(self, text: str) -> None:
        found = re.fullmatch(r"\s*(?:(outbound|guest)\.)?([a-z]+[\d.]*)\s*(>=|<=|>|<)\s*(\d+\.?\d*(?:e-?\d+)?)\s*"
                             r"([a-zµ%]*)\s*", text.replace("\u03bc", "µ"))      # the Greek letter, too
        part, name, sign, number, unit = found.groups() if found else (None, "", "", "0", "")
        if not found or name not in LIMITED or unit not in LIMITED[name][1]:
            raise UsageError(f"--fail-if {text!r}: give NAME>NUMBER (or >=, <, <=) with a unit if you like, such as "
                             f"'p99>200us' or 'loss>0.1%'; names are {', '.join(LIMITED)}, also with outbound. or "
                             "guest. in front")
        self.text, self._part, self._path, self._sign = text.strip(), part, LIMITED[name][0], sign
        self._limit = float(number) * LIMITED[name][1][unit]
        self._time = LIMITED[name][1] is TIMES

    def breach(self, report: Mapping[str, Any]) -> str | None:
        """How the report meets the condition; None if it doesn't.  What isn't known meets every condition."""
        value: Any = report.get(self._part) if self._part else report
        for key in self._path:
            value = value.get(key) if value else None
        if value is None:
            return f"{self.text}: not known"
        met = {">": value > self._limit, ">=": value >= self._limit, "<": value < self._limit,
               "<=": value <= self._limit}[self._sign]
        return f"{self.text}: it is {duration_text(value) if self._time else f'{value:g}'}" if met else None


def figure_class(path: str) -> type[Figure]:
    """Matplotlib's Figure, for a picture of that name; UsageError if it can't be made."""
    if not path.lower().endswith((".png", ".svg", ".pdf")):
        raise UsageError(f"--plot {path}: the name must end in .png, .svg or .pdf")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"--plot needs matplotlib ({error}): pip install 'netweaver[plot]', or pip install matplotlib"
                         ) from None
    return Figure


def plot(path: str, report: Mapping[str, Any], matchings: Sequence[Matching]) -> None:
    """Draws the delay of each packet over time, with the lost ones, beside its distribution; by the path's ending."""
    config, names = report["config"], side_names(report["config"])
    figure = figure_class(path)(figsize=(10, 4.8), layout="constrained")
    over_time, distribution = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    ways = [config.get("direction") == "out"] if len(matchings) == 1 else [False, True]
    start = min(min(matching.sent) for matching in matchings if matching.first)
    # Colours of Okabe and Ito, which everyone tells apart; markers and dashes do it in grey.
    styles = (("#0072B2", "o", "-"), ("#E69F00", "^", "--"))
    for matching, outward, (color, marker, dashes) in zip(matchings, ways, styles):
        if not matching.matched:
            continue
        ends = (names["vif"], names["pif"]) if outward else (names["pif"], names["vif"])
        moments = [(time - start) / NANOSECONDS for time in matching.sent]
        seen = [(moment, delay / 1000) for moment, delay in zip(moments, matching.delays) if delay != LOST]
        lost = [moment for moment, delay in zip(moments, matching.delays) if delay == LOST]
        over_time.plot(*zip(*seen), marker, markersize=3, color=color, alpha=0.6, markeredgewidth=0,
                       rasterized=len(seen) > 5000, label=" to ".join(ends))
        if lost:
            over_time.plot(lost, [0.02] * len(lost), "x", markersize=6, color="#D55E00", label=f"lost ({len(lost)})",
                           transform=over_time.get_xaxis_transform())
        ranked = sorted(delay for _, delay in seen)
        distribution.plot([100 * rank / len(ranked) for rank in range(1, len(ranked) + 1)], ranked, color=color,
                          linestyle=dashes)
    everything = [delay for matching in matchings for delay in matching.samples()]
    if min(everything) > 0 and max(everything) > 5000 * report["median"]:
        from matplotlib.ticker import LogFormatter
        over_time.set_yscale("log")
        over_time.yaxis.set_major_formatter(LogFormatter())          # 200, not 2e2
        over_time.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    over_time.set(xlabel="time since the first packet (s)", ylabel="delay (µs)")
    distribution.set(xlabel="packets that took no longer (%)", xlim=(0, 100))
    for axes in (over_time, distribution):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    what = config.get("name_label") or config.get("destination") or "delay"
    figure.suptitle(f"{what}: median {duration_text(report['median'])}, 99 % within "
                    f"{duration_text(report['percentiles']['99'])}, {matchings[0].lost} of {matchings[0].first} "
                    "packets lost", fontsize="medium")
    write_whole(path, lambda file: figure.savefig(file, format=path[-3:].lower(), dpi=150), "wb")


# ---- Command line ----------------------------------------------------------------------------------------------

EPILOG = """\
examples:
  the overhead of a VM's network, 1000 packets at 10 a second:
    netweaver -n instance-<uuid> --hv HV_IP -s SOURCE_IP -d DESTINATION_IP -k KEYFILE
  one packet a millisecond, through a bond, to the VM's second interface:
    netweaver -n web1 --hv root@hv:2222 -s 10.0.0.2 -d 10.0.0.1 -i bond0 --num 1 \\
      --source-command 'hping3 -c {count} -S -i u1000 {destination}'
  another toolstack, and the physical interface found by itself:
    netweaver --toolstack virsh -n web1 -i auto --hv HV_IP -s SOURCE_IP -d DESTINATION_IP
  a known interface, without asking the toolstack; the traffic that there is, both ways, for a minute:
    netweaver --vif vif5.0 --hv HV_IP -d DESTINATION_IP --duration 60 --direction both
  keep a run, and compare another one with it later, as a cron job that fails when it gets slow:
    netweaver ... --save runs
    netweaver ... --baseline runs/<time>-<name> --fail-if 'p99>200us' --fail-if 'loss>0.1%'
  captures that are there already, and a table of their packets:
    netweaver --pcaps pif.pcap vif.pcap -d 10.0.0.1 --csv packets.csv --slowest 5

exit codes:
  0 measured   2 usage   3 connection, authentication or host key
  4 remote command or look-up   5 capture   6 no packet matched   7 a limit of --fail-if
  129, 130, 143 interrupted by a signal   1 anything else
"""


def build_parser() -> argparse.ArgumentParser:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(f"{message} (see {self.prog} --help)")

    def positive(text: str) -> int:
        if not re.fullmatch(r"0*[1-9]\d{0,9}", text, re.ASCII):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
        return int(text)

    def seconds(text: str) -> float:
        if not re.fullmatch(r"\d{1,7}(\.\d*)?", text, re.ASCII) or not float(text):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
        return float(text)

    def nic(text: str) -> int:
        if not re.fullmatch(r"\d{1,4}", text, re.ASCII):
            raise argparse.ArgumentTypeError(f"{text!r} is not the number of an interface")
        return int(text)

    def interface(text: str) -> str:
        if not re.fullmatch(r"[^\s/-][^\s/]{0,14}", text):
            raise argparse.ArgumentTypeError(f"{text!r} can't be the name of a network interface")
        return text

    def label(text: str) -> tuple[str, str]:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
        return key, value

    columns = min(os.get_terminal_size().columns if sys.stdout.isatty() else 100, 120)
    parser = Parser(
        prog="netweaver", allow_abbrev=False, add_help=False, epilog=EPILOG,
        description="Measure the time that packets take from a hypervisor's physical interface (pif) to a VM's "
                    "virtual interface (vif), in microseconds, as JSON.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=columns))
    what = parser.add_argument_group("what is measured")
    what.add_argument("-n", "--name-label", metavar="NAME", help="the destination VM's name in the toolstack")
    what.add_argument("--hv", metavar="HOST", help="its hypervisor, as [user@]host[:port]")
    what.add_argument("-s", "--source", metavar="SOURCE", default=[], action="append",
                      help="a VM that generates traffic, as [user@]host[:port]; may be repeated")
    what.add_argument("-d", "--destination", metavar="DESTINATION", help="the destination VM's address")
    what.add_argument("--toolstack", choices=tuple(TOOLSTACKS), default="xe",
                      help="what the hypervisor is managed with: XenServer's xe, plain Xen's xl, libvirt's virsh or "
                           "Proxmox's qm (default: %(default)s)")
    what.add_argument("-i", "--interface", metavar="PIF", default=[], action="append", type=interface,
                      help="the hypervisor's physical interface; auto finds it; may be repeated, for the slaves of a "
                           "bond (default: eth0)")
    what.add_argument("--num", metavar="N", default=0, type=nic,
                      help="the number of the VM's interface, N in vif5.N (default: %(default)s)")
    what.add_argument("--vif", metavar="NAME", type=interface,
                      help="the virtual interface itself: the toolstack is not asked, and -n not needed")
    what.add_argument("--direction", choices=("in", "out", "both"), default="in",
                      help="from pif to vif, from vif to pif, or both, with the VM's own time in between (default: "
                           "%(default)s)")
    what.add_argument("--overlay", action="store_true",
                      help="the traffic is inside VXLAN, Geneve or GRE on the physical interface")
    what.add_argument("--filter", metavar="EXPR", help="capture what this pcap-filter(7) expression says, instead of "
                                                       "the traffic between SOURCE and DESTINATION")
    what.add_argument("--pif-filter", metavar="EXPR", help="the same for the physical interface alone")
    what.add_argument("--vif-filter", metavar="EXPR", help="the same for the virtual interface alone")
    traffic = parser.add_argument_group("traffic")
    traffic.add_argument("-c", "--count", metavar="N", default=1000, type=positive,
                         help="packets to send (default: %(default)s)")
    traffic.add_argument("--source-command", metavar="TEMPLATE", default=DEFAULT_SOURCE_COMMAND,
                         help="shell command that generates the traffic and ends; {count} and {destination} are "
                              "filled in, {{ and }} are braces (default: %(default)s)")
    traffic.add_argument("--duration", metavar="SECONDS", type=seconds,
                         help="measure for so long; without -s nothing is generated, and whatever traffic reaches "
                              "DESTINATION is measured")
    traffic.add_argument("--timeout", metavar="SECONDS", type=seconds,
                         help="stop the traffic after so long (default: 600, or COUNT / 5 if that is more)")
    traffic.add_argument("--max-capture-size", metavar="MB", default=256, type=positive,
                         help="the most that each capture may take on the hypervisor (default: %(default)s)")
    analysis = parser.add_argument_group("analysis")
    analysis.add_argument("--pcaps", nargs=2, metavar=("PIF", "VIF"),
                          help="analyse existing captures (pcap or pcapng) instead of making them; several files of "
                               "one side are separated by commas; -s and -d then select by address")
    analysis.add_argument("--match-nat", action="store_true",
                          help="leave addresses out of the matching, where the path translates them")
    analysis.add_argument("--slowest", metavar="N", default=0, type=positive,
                          help="list the N slowest packets in the JSON")
    judging = parser.add_argument_group("judging")
    judging.add_argument("--fail-if", metavar="EXPR", default=[], action="append",
                         help="exit with 7 if this is so, such as 'p99>200us' or 'loss>0.1%%'; may be repeated")
    judging.add_argument("--baseline", metavar="DIR", help="compare with a run that --save has kept, or with two "
                                                           "captures given as PIF.pcap,VIF.pcap")
    login = parser.add_argument_group("login")
    login.add_argument("-k", "--key", metavar="KEYFILE",
                       help="SSH private key (default: the SSH agent and the keys in ~/.ssh)")
    login.add_argument("--sudo", action="store_true",
                       help="who isn't root on a host runs the commands there by sudo -n")
    login.add_argument("--host-key-checking", choices=("accept-new", "yes", "no"), default="accept-new",
                       help="record the keys of new hosts, refuse new hosts, or check nothing (default: %(default)s)")
    login.add_argument("--known-hosts", metavar="FILE",
                       help="the file of known host keys (default: ~/.ssh/known_hosts)")
    output = parser.add_argument_group("output")
    output.add_argument("--csv", metavar="FILE", help="write a table of the packets that came in, a line each")
    output.add_argument("--output", metavar="FILE", help="write the result there, whole or not at all, instead of to "
                                                         "standard output")
    output.add_argument("--format", choices=("json", "prometheus"), default="json",
                        help="of the result: JSON, or a file for node_exporter's textfile collector (default: "
                             "%(default)s)")
    output.add_argument("--save", metavar="DIR", help="keep the captures and the JSON in a new directory under DIR")
    output.add_argument("--plot", metavar="FILE", help="draw the delays, as .png, .svg or .pdf (needs matplotlib)")
    output.add_argument("--label", metavar="KEY=VALUE", default=[], action="append", type=label,
                        help="add this to the JSON's config.labels; may be repeated")
    output.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    output.add_argument("-v", "--verbose", action="store_true", help="show the commands that are run")
    output.add_argument("-h", "--help", action="help", help="show this help and exit")
    output.add_argument("--version", action="version", version=f"netweaver {__version__}", help="show the version")
    return parser


class Outcome:
    """What came of a measurement or an analysis: the document and the packets, and what went wrong after them."""

    def __init__(self, report: dict[str, Any], matchings: Sequence[Matching]) -> None:
        self.report, self.matchings = report, matchings
        self.problems: list[NetWeaverError] = []

    def attempt(self, step: Callable[[], object]) -> None:
        """Makes something of the numbers; if that fails, they are not lost, and the error comes at the end."""
        try:
            step()
        except NetWeaverError as error:
            self.problems.append(error)


def measure(arguments: argparse.Namespace, signals: Signals, screen: Screen,
            complete: Callable[[Outcome], None]) -> Outcome:
    """Runs a whole measurement, and completes it before its files go."""
    lacking = [option for option, value in (
        ("--hv", arguments.hv), ("-s", arguments.source or arguments.duration), ("-d", arguments.destination))
        if not value]
    if lacking:
        raise UsageError(f"missing: {', '.join(lacking)} (see netweaver --help; instead of -s, --duration measures "
                         "what traffic there is; --pcaps analyses existing captures)")
    if not arguments.name_label and not arguments.vif:
        raise UsageError("the destination VM is missing: give its name with -n, or its interface with --vif")
    destination = resolve(arguments.destination)
    source_command = format_source_command(arguments.source_command, arguments.count, destination)
    filters = {"pif": arguments.pif_filter or arguments.filter, "vif": arguments.vif_filter or arguments.filter}
    expected = arguments.duration or expected_seconds(source_command)

    def tick(elapsed: float, passed: int | None) -> None:
        about = f" of {'' if arguments.duration else 'about '}{expected:.0f} s" if expected else " s"
        screen.live(f"{elapsed:.0f}{about}" + (f", {passed} packets through the vif" if passed is not None else ""))

    import threading
    from getpass import getpass
    if not arguments.verbose:                        # paramiko's threads end in tracebacks when a connection does
        threading.excepthook = lambda _: None
    with NetWeaver(arguments.source, arguments.name_label or "", destination, arguments.hv, arguments.key,
                   host_interface=arguments.interface or "eth0", vif_number=arguments.num, vif=arguments.vif,
                   toolstack=arguments.toolstack, direction=arguments.direction, overlay=arguments.overlay,
                   filters={side: expression for side, expression in filters.items() if expression},
                   count=arguments.count, duration=arguments.duration, timeout=arguments.timeout,
                   match_nat=arguments.match_nat, slowest=arguments.slowest,
                   max_capture_size=arguments.max_capture_size * 1_000_000, labels=dict(arguments.label),
                   sudo=arguments.sudo, host_key_checking=arguments.host_key_checking,
                   known_hosts=arguments.known_hosts,
                   ask=getpass if sys.stdin is not None and sys.stdin.isatty() else None,
                   progress=screen.step, log=screen.log, tick=tick if screen.live_line else None) as weaver:
        signals.interrupt = weaver.interrupt
        weaver.generate_and_record(source_command)
        weaver.pull_generated_files()
        outcome = Outcome(weaver.analyze(), weaver.matchings)
        complete(outcome)
        if arguments.save:
            outcome.attempt(lambda: outcome.report.update(saved=weaver.save(arguments.save, outcome.report)))
        return outcome


def expected_seconds(command: str) -> float | None:
    """About how long hping3 or ping will take to send its packets; None if their command doesn't tell."""
    count = re.search(r"(?:^|\s)-c\s*(\d+)", command)
    program = re.match(r"\s*(?:\S*/)?(hping3|ping6?)\s", command)
    if not count or not program or "--flood" in command:
        return None
    interval, unit = 1.0, 1.0
    if program[1] == "hping3" and (fast := re.search(r"\s--fast(er)?\b", command)):
        interval = 1e-6 if fast[1] else 0.1
    elif given := re.search(r"\s-i\s*(u?)(\d+\.?\d*|\.\d+)", command):
        interval, unit = float(given[2]), 1e-6 if given[1] else 1.0
    return int(count[1]) * interval * unit + 1


def analyze_files(arguments: argparse.Namespace, complete: Callable[[Outcome], None]) -> Outcome:
    """Analyses existing captures."""
    if arguments.save:
        raise UsageError("--save keeps the captures of a measurement; those of --pcaps are there already")
    pif, vif = ([path] if os.path.exists(path) else path.split(",") for path in arguments.pcaps)
    sources = [resolve(Target(source).host) for source in arguments.source]
    destinations = [resolve(arguments.destination)] if arguments.destination else []
    both = arguments.direction == "both"
    if both and (arguments.match_nat or not destinations):
        raise UsageError("--direction both tells the directions apart by the VM's address: give it with -d, and not "
                         "--match-nat")
    warnings: list[str] = []
    matchings, captures = match_directions(pif, vif, arguments.direction, match_nat=arguments.match_nat,
                                           sources=sources, destinations=destinations)
    matching, outbound = matchings[0], matchings[1] if both else None
    capture = {side: file_counts(side, found, warnings) for side, found in captures.items()}
    config = {"version": __version__, "pif": ",".join(pif), "vif": ",".join(vif), "sources": sources,
              "destination": destinations[0] if destinations else None, "match_nat": arguments.match_nat,
              "direction": arguments.direction, "labels": dict(arguments.label)}
    report = build_report(matching, capture, warnings, config, arguments.slowest, outbound=outbound,
                          outward=arguments.direction == "out",
                          guest=guest_times(matching, outbound) if outbound else None)
    outcome = Outcome(report, matchings)
    complete(outcome)
    return outcome


class Baseline:
    """An earlier measurement to compare with: a directory of --save, or two captures, "PIF,VIF"."""

    def __init__(self, text: str, direction: str) -> None:
        import json
        self.text = text
        outward, match_nat, destinations = direction == "out", False, []       # type: bool, bool, list[str]
        if os.path.isdir(text):
            names = sorted(os.listdir(text))
            pif, vif = ([os.path.join(text, name) for name in names if re.fullmatch(rf"{side}\d*\.pcap", name)]
                        for side in ("pif", "vif"))
            try:
                with open(os.path.join(text, "report.json"), encoding="utf-8") as file:
                    config = json.load(file)["config"]
                before, match_nat = config["direction"], config.get("match_nat", False)
                if before == "both":
                    destinations = [config["destination"]]
            except (OSError, ValueError, KeyError, TypeError):
                raise UsageError(f"--baseline {text}: not a directory that --save made: it has no usable report.json"
                                 ) from None
            if (before == "out") != outward:
                raise UsageError(f"--baseline {text}: it was measured with --direction {before}")
        else:
            pif, vif = ([path] for path in text.split(",")) if text.count(",") == 1 else ([], [])
        if not pif or not vif:
            raise UsageError(f"--baseline {text}: give a directory of --save, or two captures as PIF.pcap,VIF.pcap")
        self._matching, _ = match_captures(pif, vif, outward=outward, match_nat=match_nat,
                                           sources=destinations if outward else [],
                                           destinations=[] if outward else destinations)
        if not self._matching.matched:
            raise UsageError(f"--baseline {text}: no packet is in both of its captures")

    def compare(self, outcome: Outcome) -> None:
        """Adds the comparison to a report."""
        outcome.report["comparison"] = {"path": self.text, **compare(self._matching, outcome.matchings[0])}


def printable(text: str) -> str:
    """Text whose control characters can't do anything to a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class Signals:
    """The first SIGINT, SIGTERM or SIGHUP ends the traffic, if there is some to report on; another ends all at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.interrupt: Callable[[], bool] = lambda: False

    def __enter__(self) -> Signals:
        import signal
        self._before = {number: signal.signal(number, self._handle)
                        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
                        if signal.getsignal(number) is not signal.SIG_IGN}           # nohup
        return self

    def __exit__(self, *_: object) -> None:
        import signal
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        again, self.number = self.number is not None, self.number or number
        if again or not self.interrupt():
            raise KeyboardInterrupt


class Screen:
    """What a person sees on stderr: lines and, at a terminal, the progress, a live line, colours and a summary."""

    def __init__(self, quiet: bool = False, verbose: bool = False) -> None:
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._people = terminal and not quiet
        dumb = os.environ.get("TERM") == "dumb"
        self.live_line = self._people and not verbose and not dumb
        self._verbose = verbose
        self._colours = terminal and not os.environ.get("NO_COLOR") and not dumb
        self._live = False
        self.fancy = "utf" in (getattr(sys.stderr, "encoding", None) or "").lower()

    def say(self, line: str, colour: str = "") -> None:
        """A line that everyone gets."""
        line = printable(line)
        erase = "\r\x1b[K" if self._live else ""
        self._live = False
        if not self.fancy:
            line = line.replace("µ", "u").encode("ascii", "replace").decode()
        print(f"{erase}{COLOURS[colour]}{line}{COLOURS['end']}" if colour and self._colours else f"{erase}{line}",
              file=sys.stderr, flush=True)

    def step(self, line: str) -> None:
        """A line on how far the run is."""
        if self._people or self._verbose:
            self.say(line)

    def log(self, line: str) -> None:
        """A command that is run."""
        if self._verbose:
            self.say(line)

    def live(self, text: str) -> None:
        """A line that the next one replaces."""
        if self.live_line:
            self._live = True
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            print(f"\r\x1b[K{printable(text)[:columns - 1]}", end="", file=sys.stderr, flush=True)

    def summary(self, outcome: Outcome) -> None:
        """The numbers for people."""
        if self._people:
            for line in summary(outcome.report, outcome.matchings[0].samples(), self.fancy):
                self.say(line, "" if line.startswith(" ") else "bold")


COLOURS = {"bold": "\x1b[1m", "error": "\x1b[31m", "warning": "\x1b[33m", "end": "\x1b[0m"}


def check_outputs(arguments: argparse.Namespace) -> None:
    """UsageError if what is to be written can't be, as far as that is known before a long measurement."""
    if arguments.plot:
        figure_class(arguments.plot)
    for path in (arguments.csv, arguments.plot, arguments.output):
        directory = os.path.dirname(path or "") or "."
        device = bool(path) and os.path.exists(path) and not os.path.isfile(path)
        if path and (os.path.isdir(path) or not os.access(path if device else directory, os.W_OK)):
            why = ("it is a directory" if os.path.isdir(path) else "no such directory" if not os.path.isdir(directory)
                   else "no permission to write there")
            raise UsageError(f"can't write {path}: {why}")


def publish(outcome: Outcome, arguments: argparse.Namespace) -> None:
    """Prints the document, or writes it where it is wanted."""
    import json
    text = prometheus(outcome.report) if arguments.format == "prometheus" else json.dumps(outcome.report) + "\n"
    if arguments.output:
        outcome.attempt(lambda: write_whole(arguments.output, lambda file: file.write(text)))
    else:
        print(text, end="", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    screen, verbose = Screen(), False
    with Signals() as signals:
        try:
            arguments = build_parser().parse_args(argv)
            verbose = arguments.verbose
            screen = Screen(arguments.quiet, verbose)
            if arguments.host_key_checking == "no" and not arguments.pcaps:
                screen.say("netweaver: warning: host keys are not checked: anyone in between can read and change what "
                           "is sent", "warning")
            limits = [Limit(text) for text in arguments.fail_if]
            check_outputs(arguments)
            baseline = Baseline(arguments.baseline, arguments.direction) if arguments.baseline else None

            def complete(outcome: Outcome) -> None:
                if baseline:
                    baseline.compare(outcome)
                if arguments.csv:
                    outcome.attempt(lambda: write_csv(outcome.matchings[0], arguments.csv))
                if arguments.plot:
                    outcome.attempt(lambda: plot(arguments.plot, outcome.report, outcome.matchings))

            outcome = (analyze_files(arguments, complete) if arguments.pcaps else
                       measure(arguments, signals, screen, complete))
            screen.summary(outcome)
            for warning in outcome.report["warnings"]:
                screen.say(f"netweaver: warning: {warning}", "warning")
            publish(outcome, arguments)
            breaches = [breach for limit in limits if (breach := limit.breach(outcome.report))]
            for breach in breaches:
                screen.say(f"netweaver: limit: {breach}", "error")
            for problem in outcome.problems:
                screen.say(f"netweaver: error: {problem}", "error")
            code = outcome.problems[0].exit_code if outcome.problems else 7 if breaches else 0
        except NetWeaverError as error:
            screen.say(f"netweaver: error: {error}", "error")
            code = error.exit_code
        except KeyboardInterrupt:
            screen.say("netweaver: error: interrupted", "error")
            code = 130
        except Exception as error:
            if verbose:
                raise
            screen.say(f"netweaver: error: unexpected {type(error).__name__}: {error} (-v shows where; please report "
                       "it)", "error")
            code = 1
        return 128 + signals.number if signals.number else code


if __name__ == "__main__":
    raise SystemExit(main())
