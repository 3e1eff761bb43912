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
    import socket
    import threading
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import IO, Any, BinaryIO, NoReturn, TypeVar

    import paramiko

    Block = tuple[list[bytes], array[int]]           # identities, and the times at which they were seen
    Result = TypeVar("Result")

__version__ = "1.0.0"
__all__ = [
    "Capture", "CaptureError", "HostConnectionError", "Matching", "NetWeaver", "NetWeaverError", "NoMatchError",
    "RemoteCommandError", "TextCapture", "UsageError", "build_report", "describe", "main", "match", "match_files",
    "match_text_files", "merged", "reordering", "statistics", "variation", "write_csv",
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
SYN = 0x02
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
    number of bytes of a last record that is not whole.
    """

    def __init__(self, file: BinaryIO, name: str, *, translated: bool = False, sources: Iterable[str] = (),
                 destinations: Iterable[str] = ()) -> None:
        self.name = name
        self.records = self.other = self.filtered = self.cut = self.partial = 0
        self.precision = "microseconds"
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
            used = self._take(data, base, keys, times)
            base, rest = base + used, data[used:]
            yield keys, times
        self.partial = self.partial or len(rest)

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
                count = self._run(data, at, stride, layout, keys, times)
                if count:
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
    """Which packets of the pif were seen on the vif, and when.

    By the packet's rank in the pif's order: `identities`, `sent` (t_pif) and `delays` (D, or LOST), in nanoseconds;
    `arrivals` are the ranks of the matched packets in the vif's order.  `pif` and `vif` count the sightings,
    `duplicated` the copies on the vif beyond those on the pif (`extra_copies` by rank), `vif_only` the sightings of
    packets never seen on the pif (`stranger_times` are all of their times, `strangers` the first identities).  `alike`
    are the ranks of the packets that share their identity with another one; `last_seen` is the last time on the vif.
    """
    __slots__ = ("alike", "arrivals", "delays", "extra_copies", "identities", "last_seen", "sent", "stranger_times",
                 "strangers")

    def __init__(self) -> None:
        self.identities: list[bytes] = []
        self.sent: array[int] = array("q")
        self.delays: array[int] = array("q")
        self.arrivals: array[int] = array("I")
        self.extra_copies: dict[int, int] = {}
        self.strangers: list[bytes] = []
        self.stranger_times: array[int] = array("q")
        self.alike: set[int] = set()
        self.last_seen = 0

    @property
    def pif(self) -> int:
        return len(self.sent)

    @property
    def vif(self) -> int:
        return self.matched + self.duplicated + self.vif_only

    @property
    def duplicated(self) -> int:
        return sum(self.extra_copies.values())

    @property
    def vif_only(self) -> int:
        return len(self.stranger_times)

    @property
    def matched(self) -> int:
        return len(self.arrivals)

    @property
    def lost(self) -> int:
        return self.pif - self.matched

    def samples(self) -> list[int]:
        """The delays of the matched packets, in the pif's order."""
        return [delay for delay in self.delays if delay != LOST] if self.lost else self.delays.tolist()


def match(pif: Iterable[Block], vif: Iterable[Block]) -> Matching:
    """Pairs the sightings on the pif with those on the vif: the k-th copy of a packet with its k-th copy."""
    result = Matching()
    identities, sent, first = result.identities, result.sent, {}       # type: list[bytes], array[int], dict[bytes, int]
    copies: dict[bytes, list[int]] = {}              # the ranks of further copies, by identity
    for keys, times in pif:
        start, known = len(identities), len(first)
        ranks = list(map(first.setdefault, keys, count(start)))
        identities += keys
        sent.extend(times)
        if len(first) - known < len(keys):
            for rank, (key, original) in enumerate(zip(keys, ranks), start):
                if rank != original:
                    copies.setdefault(key, []).append(rank)
    order: list[bytes | None] = [*identities, None] if copies else identities    # type: ignore[assignment]
    for key, ranks in copies.items():
        result.alike.update(ranks, (first[key],))
        for rank in ranks:
            order[rank] = None                       # never the expected one
    further = {key: iter(ranks) for key, ranks in copies.items()}
    size = len(sent)
    result.delays = delays = array("q", [LOST]) * size
    arrivals, seen, find = result.arrivals, bytearray(size), first.get
    expected = 0
    for keys, times in vif:
        result.last_seen = times[-1] if times else result.last_seen
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


def within(matching: Matching, start: int, pif_end: int, vif_end: int) -> Matching:
    """What is left of a matching when only the time counts in which both captures certainly ran (ns).

    Both saw everything from `start` on, the pif's until `pif_end` and the vif's until `vif_end`.  A packet counts if it
    passed the pif in that time, and so early that even the longest delay would have brought it to the vif in time; one
    that only the vif saw, if it can't have passed the pif before `start`.
    """
    longest = max(0, max(matching.delays, default=0))
    end = min(pif_end, vif_end - longest)
    ranks = [rank for rank, time in enumerate(matching.sent) if start <= time <= end]
    times = [time for time in matching.stranger_times if start + longest <= time <= pif_end]
    if len(ranks) == matching.pif and len(times) == matching.vif_only:
        return matching
    new = {rank: place for place, rank in enumerate(ranks)}
    kept = Matching()
    kept.identities = [matching.identities[rank] for rank in ranks]
    kept.sent, kept.delays = (array("q", map(values.__getitem__, ranks)) for values in (matching.sent, matching.delays))
    kept.arrivals.extend(new[rank] for rank in matching.arrivals if rank in new)
    kept.extra_copies = {new[rank]: copies for rank, copies in matching.extra_copies.items() if rank in new}
    kept.alike = {new[rank] for rank in matching.alike if rank in new}
    kept.stranger_times.extend(times)
    kept.strangers, kept.last_seen = matching.strangers, matching.last_seen
    return kept


def merged(captures: Sequence[Iterable[Block]]) -> Iterator[Block]:
    """The blocks of one capture, or those of several (the slaves of a bond) as one block in the order of time."""
    if len(captures) == 1:
        yield from captures[0]
        return
    rows = [(time, key) for capture in captures for keys, times in capture for key, time in zip(keys, times)]
    rows.sort(key=itemgetter(0))
    yield [key for _, key in rows], array("q", [time for time, _ in rows])


def since(blocks: Iterable[Block], start: int) -> Iterator[Block]:
    """The sightings from a time on (ns).

    What one capture saw before the other was there must not be taken for the first copy of a later packet.
    """
    for keys, times in blocks:
        if times and min(times) < start:
            kept = [place for place, time in enumerate(times) if time >= start]
            keys, times = [keys[place] for place in kept], array("q", map(times.__getitem__, kept))
        yield keys, times


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
        self.ended = self.stopped = self.flooded = self._complete = False
        self.output = b""
        self._channel, self._changed, self._sink, self._most = channel, changed, sink, most
        self._out, self._errors = bytearray(), bytearray()
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
        """Sends a word of the lease; a broken connection has ended the lease by itself."""
        try:
            self._channel.sendall(word.encode() + b"\n")
        except OSError:
            pass

    def stop(self) -> None:
        """Asks the command to end; what it wrote stays until `leave`."""
        self.stopped = True
        self.say("stop")

    def leave(self, seconds: float = ANSWER_SECONDS) -> None:
        """Ends everything on the host; returns when it has ended there, or the time is over."""
        self.say("bye")
        self._reader.join(seconds)
        self._channel.close()

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
        except OSError:
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
                self._channel.close()
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


def last_line(text: str) -> str:
    """The last line that says something, for an error message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


class Remote:
    """An SSH connection to a host: runs commands under WRAPPER and fetches files."""

    def __init__(self, target: Target, access: Access, changed: threading.Condition,
                 log: Callable[[str], None]) -> None:
        self.name = str(target)
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
            raise HostConnectionError(f"the connection to {self.name} is lost")
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
            channel.exec_command("exec sh")
            channel.sendall(script.encode(errors="surrogateescape"))
        except (SSHException, EOFError, OSError) as error:
            raise HostConnectionError(f"{self.name}: can't start a command: {error or 'no answer'}") from error
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
                   f"could not be run: {last_line(job.errors)}")
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
        except OSError as error:
            os.unlink(local)
            raise CaptureError(f"can't write {local}: {error.strerror}") from error
        except BaseException:
            os.unlink(local)
            raise

    def _fetch_by_sftp(self, path: str, file: IO[bytes], sftp: paramiko.SFTPClient, most: int) -> None:
        import time
        with sftp.open(path, "rb") as remote:
            size = remote.stat().st_size or 0
            if size > most:
                raise CaptureError(f"{self.name}: {path} has {size} bytes, which is more than it was allowed to have")
            deadline = time.monotonic() + ANSWER_SECONDS + size / SLOWEST_TRANSFER
            remote.prefetch(size)
            while size > 0:
                data = remote.read(min(size, 1 << 15))
                if not data or time.monotonic() > deadline:
                    raise CaptureError(f"{self.name}: the transfer of {path} broke off")
                file.write(data)
                size -= len(data)

    def _fetch_by_command(self, path: str, file: IO[bytes], most: int) -> None:
        from shlex import quote
        seconds = ANSWER_SECONDS + most / SLOWEST_TRANSFER
        job = self.start(f"exec cat -- {quote(path)}", seconds, sink=file, most=most)
        self.finish(job, seconds)
        if job.status:
            raise CaptureError(f"{self.name}: can't fetch {path}: {last_line(job.errors)}")

    def close(self) -> None:
        for client in reversed(self._clients):
            client.close()


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

    def connect(self, target: Target, depth: int = 0) -> list[paramiko.SSHClient]:
        """An authenticated connection, last, after those to the hosts through which it goes.

        HostConnectionError says what failed and what to do.
        """
        import random
        import time

        import paramiko
        settings = self._settings(target.host)
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
                    client.close()
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
            clients += self.connect(Target(jumps.split(",")[-1].strip()), depth + 1)
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
            client.close()
            sock.close()
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


# ---- Toolstacks: a VM's name in, its interface out -----------------------------------------------------------

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
    lines = answer.split("\n")
    dom_ids = lines[0].strip().split(",")
    if not lines[0].strip():
        raise RemoteCommandError(f"there is no VM with the name-label {name_label!r} (names are case-sensitive; "
                                 "xe vm-list shows them)")
    if len(dom_ids) > 1:
        raise RemoteCommandError(f"{len(dom_ids)} VMs have the name-label {name_label!r} (dom-ids {lines[0].strip()}):"
                                 " make the name unique, or name the interface with --vif")
    if not re.fullmatch(r"-1|\d{1,9}", dom_ids[0], re.ASCII):
        raise RemoteCommandError(f"xe answered {lines[0][:80]!r} for {name_label!r}, which is no dom-id")
    if dom_ids[0] == "-1":
        raise RemoteCommandError(f"the VM {name_label!r} is not running (halted or suspended): start it first")
    if len(lines) > 1 and lines[1].strip() != dom_ids[0] and answer.count("\n") > 1:
        raise RemoteCommandError(f"the VM {name_label!r} runs on another host of the pool: give that one as --hv")
    return int(dom_ids[0])


# ---- NetWeaver: the orchestration ----------------------------------------------------------------------------

DRAIN_SECONDS = 1.1                                  # the kernel hands its blocks of packets over up to 1 s late
SNAPLEN = 128                                        # Ethernet, two tags, IPv6, TCP with options
BUFFER_KIB = 16384
TRANSMITTED = re.compile(r"^(\d+) packets transmitted", re.MULTILINE)    # hping3's statistics, on stderr


def capture_filter(sources: Iterable[str], destination: str) -> str:
    """The pcap-filter(7) expression for IP packets from one of the sources to the destination (literals)."""
    version = "ip6" if ":" in destination else "ip"
    hosts = [f"src host {source}" for source in sources if (":" in source) == (":" in destination)]
    either = f" and ({' or '.join(hosts)})" if hosts else ""
    return f"{version}{either} and dst host {destination}"


def capture_command(interface: str, expression: str, tcpdump_help: str) -> str:
    """The shell command that writes a pcap of what passes an interface to its standard output.

    A large buffer and nanosecond stamps where the help of this tcpdump knows them (since 4.0 and 4.6); -p leaves
    the interface's mode alone.
    """
    from shlex import quote
    options = f" -B {BUFFER_KIB}" if "[ -B size ]" in tcpdump_help else ""
    options += " --time-stamp-precision=nano" if "--time-stamp-precision" in tcpdump_help else ""
    return f"exec tcpdump -i {quote(interface)} -p -nn -s {SNAPLEN}{options} -w - -- {quote(expression)}"


def tcpdump_counts(errors: str) -> dict[str, int]:
    """What tcpdump said at its end: packets `captured`, `received` by the filter, `dropped` by kernel and interface.

    Counts that it didn't print are missing.
    """
    names = {"captured": "captured", "received by filter": "received", "dropped by kernel": "dropped",
             "dropped by interface": "dropped_by_interface"}
    return {names[what]: int(count) for count, what in
            re.findall(r"^(\d+) packets? (captured|received by filter|dropped by kernel|dropped by interface)",
                       errors, re.MULTILINE)}


class NetWeaver:
    """Measures the time that packets take from a hypervisor's physical interface to a VM's virtual one.

    `source_ip` (one, or several) and `destination_host_ip` are `[user@]host[:port]`; `destination_name_label` is
    the VM's name in the toolstack and `destination_ip` its address.  Without `ssh_key_path` the SSH agent and the
    default keys are used; `host_key_checking`, `known_hosts` and `ask` are those of Access.  `timeout` bounds the
    traffic (seconds), `max_capture_size` each capture (bytes).  With `match_nat` addresses take no part in the
    matching, and `slowest` is how many of the slowest packets to list.  `progress` and `log` are called with lines for
    people: the steps, and each command run.  `analyze` sets `matching`: the packets themselves.

    Use it as a context manager, or call `close`.  The methods are meant to be called in the order in which they
    stand here; each raises a NetWeaverError that says what happened and where.  For a hypervisor whose toolstack
    is not xe, override `determine_vif_number`.
    """

    def __init__(self, source_ip: str | Sequence[str], destination_name_label: str, destination_ip: str,
                 destination_host_ip: str, ssh_key_path: str | None = None, *, host_interface: str = "eth0",
                 vif_number: int = 0, vif: str | None = None, count: int = 1000, timeout: float | None = None,
                 match_nat: bool = False, slowest: int = 0, max_capture_size: int = 256_000_000,
                 host_key_checking: str = "accept-new", known_hosts: str | None = None,
                 ask: Callable[[str], str] | None = None,
                 progress: Callable[[str], None] = lambda line: None,
                 log: Callable[[str], None] = lambda line: None) -> None:
        import threading
        self.destination_name_label = destination_name_label
        self.destination_ip = resolve(destination_ip)
        self.host_interface, self.vif_number, self.vif, self.count = host_interface, vif_number, vif, count
        self.match_nat, self.slowest = match_nat, slowest
        self.matching: Matching | None = None
        self.timeout = max(600, count // 5) if timeout is None else timeout
        self._hypervisor = Target(destination_host_ip)
        self._sources = [Target(source) for source in ([source_ip] if isinstance(source_ip, str) else source_ip)]
        self.max_capture_size = max_capture_size
        self.interrupted = False
        self._access = Access(ssh_key_path, host_key_checking, known_hosts, ask)
        self._progress, self._log = progress, log
        self._changed = threading.Condition()
        self._remotes: dict[str, Remote] = {}
        self._jobs: list[Job] = []
        self._captures: dict[str, Job] = {}
        self._files: dict[str, str] = {}
        self._sftp_channels: dict[str, paramiko.Channel | None] = {}
        self._directory: str | None = None
        self._warnings: list[str] = []
        self._config: dict[str, Any] = {}
        self._recording = False
        self._window: tuple[int, int] | None = None          # both captures certainly ran, in the hypervisor's time

    def __enter__(self) -> NetWeaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(wait=kind is None or issubclass(kind, Exception))

    # -- the seed's public surface --

    def verify_connections(self) -> bool:
        """Connects to all hosts at once; True, or HostConnectionError for one that can't be used."""
        self._access.prepare()
        targets = {str(target): target for target in [self._hypervisor, *self._sources]}

        def connect(name: str) -> None:
            self._remotes[name] = Remote(targets[name], self._access, self._changed, self._log)

        in_parallel(*(lambda name=name: connect(name) for name in targets if name not in self._remotes),
                    seconds=5 * CONNECT_SECONDS)
        return True

    def determine_vif_number(self) -> str:
        """The name of the destination VM's interface on the hypervisor, such as vif5.0.

        Asks XenServer's xe for the domain id; override it for another toolstack (`run_command` is at hand).
        """
        answer = self.run_command(xe_dom_id_command(self.destination_name_label))
        try:
            return f"vif{parse_xe_dom_id(answer, self.destination_name_label)}.{self.vif_number}"
        except RemoteCommandError as error:
            raise RemoteCommandError(f"{self._hypervisor}: {error}") from None

    def generate_and_record(self, source_command: str | None = None, dest_pif_cmd: str | None = None,
                            dest_vif_cmd: str | None = None) -> None:
        """Runs the source command on all sources while both interfaces are captured.

        The defaults are hping3 and tcpdump.  A command of one's own for a capture writes it to its standard
        output, as pcap (`tcpdump -w -`) or as text, and ends upon SIGTERM; the captures are known to listen
        before any traffic starts, and are stopped once it has ended.
        """
        self.verify_connections()
        sources = [str(source) for source in self._sources]
        vif, tcpdump_help, expression = in_parallel(
            lambda: self.vif or self.determine_vif_number(), self._tcpdump_help,
            lambda: capture_filter(self._source_addresses(), self.destination_ip))
        self.vif = vif
        commands = {"pif": dest_pif_cmd or capture_command(self.host_interface, expression, tcpdump_help),
                    "vif": dest_vif_cmd or capture_command(vif, expression, tcpdump_help)}
        source_command = source_command or format_source_command(DEFAULT_SOURCE_COMMAND, self.count,
                                                                 self.destination_ip)
        self._config = {
            "version": __version__, "hypervisor": str(self._hypervisor), "sources": sources,
            "destination": self.destination_ip, "name_label": self.destination_name_label,
            "pif": self.host_interface, "vif": self.vif, "source_command": source_command,
            "pif_command": commands["pif"], "vif_command": commands["vif"]}
        self._progress("Spawning packet captures...")
        self._start_captures(commands)
        self._recording = True
        started = self._hypervisor_time()
        self._generate(source_command, sources)
        self._window = self._between(started, self._hypervisor_time())
        self._progress("Captures finished, waiting for files to flush.")
        self._stop_captures()

    def pull_generated_files(self) -> tuple[str, str]:
        """Fetches both captures into a private local directory and removes them from the hypervisor.

        Returns the paths of the pif's and of the vif's capture; they stay until `close`.
        """
        import tempfile
        self._progress("Transferring files...")
        self._directory = self._directory or tempfile.mkdtemp(prefix="netweaver-")
        remote = self._remotes[str(self._hypervisor)]
        in_parallel(*(lambda side=side: self._pull(remote, side) for side in self._captures))
        return self._files["pif"], self._files["vif"]

    def analyze(self, seq_no_col: int | None = None, timestamp_col: int | None = None,
                seq_no_split_by: str | None = None, seq_no_split_index: int = 0) -> dict[str, Any]:
        """The report on the two captures, as the README describes it; NoMatchError if they have no packet in common.

        Without parameters the captures are pcap files.  With them they are text, one packet a line: columns are
        separated by white space and counted from 0, `timestamp_col` is the time's column and `seq_no_col` the
        sequence number's, of which part `seq_no_split_index` counts after a split by `seq_no_split_by`.
        """
        pif_path, vif_path = self._files["pif"], self._files["vif"]
        warnings = list(self._warnings)
        if seq_no_col is None or timestamp_col is None:
            matching, files = match_files([pif_path], [vif_path], warnings, match_nat=self.match_nat,
                                          start=self._window[0] if self._window else 0)
        else:
            matching, files = match_text_files(pif_path, vif_path, warnings, seq_no_col, timestamp_col,
                                               seq_no_split_by, seq_no_split_index)
        capture = {side: {"interface": self._config[side], **tcpdump_counts(job.errors), **files[side]}
                   for side, job in self._captures.items()}
        if seq_no_col is None:
            matching = self._cut_to_window(matching, self._full_captures(capture, warnings))
        transmitted = self._config.get("transmitted", matching.pif)
        if matching.pif > transmitted:
            warnings.append(f"{matching.pif} packets were captured on the pif, and this run sent {transmitted}: other "
                            "traffic between the same hosts (another run?) is in the numbers")
        self.matching = matching
        return build_report(matching, capture, warnings, self._config, self.slowest, self.interrupted)

    # -- for subclasses, and for the end --

    def run_command(self, command: str, seconds: float = ANSWER_SECONDS) -> str:
        """The standard output of a shell command on the hypervisor; RemoteCommandError if it fails."""
        self.verify_connections()
        job = self._remotes[str(self._hypervisor)].run(command, seconds)
        if job.status:
            hint = " (give the interface with --vif if this host has another toolstack)" if job.status == 127 else ""
            raise RemoteCommandError(f"{job.host}: {command.split('||')[0].strip()}: exit status {job.status}: "
                                     f"{last_line(job.errors)}{hint}")
        return job.output.decode(errors="replace")

    def interrupt(self) -> bool:
        """Ends the traffic now and lets the run go on to its report; False if there is nothing yet to report on."""
        with self._changed:
            self.interrupted = self._recording
            self._changed.notify_all()
            return self._recording

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

    # -- steps --

    def _source_addresses(self) -> list[str]:
        """The addresses which the sources' packets to the destination may carry.

        That is the one under which a source was reached, and the one its routing chooses: management and traffic
        often have networks of their own.
        """
        def of(source: Target) -> list[str]:
            remote = self._remotes[str(source)]
            route = remote.run(f"ip -o route get {self.destination_ip}")
            found = re.search(r"\ssrc ([0-9A-Fa-f.:]+)", route.output.decode(errors="replace"))
            return [remote.address, *(found.groups() if found else ())]

        found = in_parallel(*(lambda source=source: of(source) for source in self._sources))
        return [address for address in dict.fromkeys(address for some in found for address in some) if address]

    def _tcpdump_help(self) -> str:
        """The usage message of the hypervisor's tcpdump; CaptureError if there is none."""
        job = self._remotes[str(self._hypervisor)].run("tcpdump --help 2>&1")
        text = job.output.decode(errors="replace")
        if job.status in (126, 127):
            raise CaptureError(f"{job.host}: can't run tcpdump: {last_line(text)} (install it there)")
        return text

    def _start_captures(self, commands: Mapping[str, str]) -> None:
        """Starts both captures at once; returns when both are listening."""
        remote = self._remotes[str(self._hypervisor)]
        seconds = self.timeout + 6 * ANSWER_SECONDS
        for side, command in commands.items():
            job = remote.start(command, seconds, f"{side}.pcap", size=self.max_capture_size, share=len(commands))
            self._captures[side] = job
            self._jobs.append(job)
        self._wait(lambda: all("listening on" in job.errors or job.ended for job in self._captures.values()),
                   ANSWER_SECONDS)
        self._check_captures()
        for side, job in self._captures.items():
            if "listening on" not in job.errors:
                self._warnings.append(f"the {side}'s command didn't say that it is listening: packets at the start "
                                      "may be missing")

    def _check_captures(self) -> None:
        """Raises CaptureError, in tcpdump's words, if a capture has ended by itself."""
        for side, job in self._captures.items():
            self._remotes[str(self._hypervisor)].check(job)
            if job.ended and job.status is None:
                raise CaptureError(f"{job.host}: the capture on {self._config[side]} can't run: "
                                   f"{last_line(job.errors)}")
            if job.ended and not job.stopped:
                words = "; ".join(line.strip() for line in job.errors.splitlines() if "listening on" not in line)
                raise CaptureError(f"{job.host}: the capture on {self._config[side]} ended with status {job.status}: "
                                   f"{words[-500:] or 'no message'}")

    def _hypervisor_time(self) -> tuple[int, int] | None:
        """Now: (the hypervisor's clock, ours, which only goes forward) in nanoseconds; None if it can't tell."""
        import time
        job = self._captures["pif"]
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

    def _generate(self, command: str, sources: Sequence[str]) -> None:
        """Runs the traffic to its end, to the time-out or to an interruption, while the captures run."""
        import time
        self._config["started"] = iso_time(time.time_ns())
        begun = time.monotonic()
        jobs = in_parallel(*(lambda name=name: self._remotes[name].start(command, self.timeout + ANSWER_SECONDS,
                                                                         "/dev/null") for name in sources))
        self._jobs += jobs
        captures = self._captures.values()
        over = self._wait(lambda: (all(job.ended for job in jobs) or any(job.ended for job in captures)
                                   or any(generator_error(job) for job in jobs) or self.interrupted), self.timeout)
        self._check_captures()
        for job in jobs:
            self._remotes[job.host].check(job)
            if error := generator_error(job):
                raise error
        if not all(job.ended for job in jobs):
            for job in jobs:
                job.stop()
            if not over:
                self._warnings.append(f"the source command was stopped after {self.timeout:g} s (--timeout)")
            if not self._wait(lambda: all(job.ended for job in jobs), ANSWER_SECONDS):
                raise RemoteCommandError(f"{', '.join(job.host for job in jobs if not job.ended)}: the source command "
                                         "doesn't end")
        self._config["duration"] = round(time.monotonic() - begun, 6)
        said = [TRANSMITTED.search(job.errors) for job in jobs]
        if all(said) and not any(job.stopped for job in jobs):       # who is stopped may have miscounted
            self._config["transmitted"] = sum(int(found[1]) for found in said if found)

    def _stop_captures(self) -> None:
        """Stops the captures when the kernel has handed over what it saw."""
        jobs = list(self._captures.values())
        remote = self._remotes[str(self._hypervisor)]
        self._sftp_channels = {side: remote.request_sftp() for side in self._captures}
        self._wait(lambda: any(job.ended for job in jobs), DRAIN_SECONDS)
        self._check_captures()
        for job in jobs:
            job.stop()
        if not self._wait(lambda: all(job.ended for job in jobs), ANSWER_SECONDS):
            raise CaptureError(f"{self._hypervisor}: a capture doesn't end")

    def _pull(self, remote: Remote, side: str) -> None:
        job = self._captures[side]
        local = os.path.join(self._directory or "", f"{side}.pcap")
        sftp = remote.open_sftp(self._sftp_channels[side])
        try:
            remote.fetch(f"{job.directory}/{side}.pcap", local, sftp, self.max_capture_size)
        finally:
            if sftp:
                sftp.close()
        job.leave()
        counts = tcpdump_counts(job.errors)
        if counts and os.path.getsize(local) < PCAP_HEADER:
            raise self._unwritten(side, counts, 0)
        self._files[side] = local

    def _unwritten(self, side: str, counts: Mapping[str, int], records: int) -> CaptureError:
        job = self._captures[side]
        return CaptureError(f"{job.host}: tcpdump captured {counts.get('captured', 0)} packets on {self._config[side]} "
                            f"and {records} are in the file: is the disk under {job.directory} full?")

    def _full_captures(self, capture: Mapping[str, Mapping[str, Any]], warnings: list[str]) -> list[str]:
        """The sides whose capture reached its size limit; CaptureError for one that the disk has cut short."""
        full = []
        for side, counts in capture.items():
            if counts.get("captured", 0) <= counts["records"]:
                continue
            job, size = self._captures[side], os.path.getsize(self._files[side])
            if size < job.size_limit - 4096:
                raise self._unwritten(side, counts, counts["records"])
            full.append(side)
            limit = ("--max-capture-size" if job.size_limit >= self.max_capture_size // 1024 * 1024 else
                     "half of the hypervisor's free space, for both captures")
            warnings.append(f"{side}: the capture reached its size limit of {job.size_limit} bytes ({limit}); what "
                            "came later is in no count")
        return full

    def _cut_to_window(self, matching: Matching, full: Sequence[str]) -> Matching:
        """The packets that passed while both captures certainly ran and had room."""
        if self._window is None:
            return matching
        start, end = self._window
        # The captures ran on for DRAIN_SECONDS, of which the kernel may keep the last one to itself.
        vif_end = end + int((DRAIN_SECONDS - 1) * NANOSECONDS)
        if "pif" in full:
            end = min(end, max(matching.sent, default=0))
        if "vif" in full:
            vif_end = min(vif_end, matching.last_seen)
        return within(matching, start, end, vif_end)

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

def match_files(pif_paths: Sequence[str], vif_paths: Sequence[str], warnings: list[str], *,
                match_nat: bool = False, sources: Iterable[str] = (), destinations: Iterable[str] = (),
                start: int = 0) -> tuple[Matching, dict[str, dict[str, Any]]]:
    """Pairs the packets of pcap or pcapng files; those of one side are merged by time.

    Returns the matching and, for each side, what was in its files; what was odd in them is added to the warnings.
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
        matching = match(since(merged(sides["pif"]), start), since(merged(sides["vif"]), start))
    return matching, {side: file_counts(side, captures, warnings) for side, captures in sides.items()}


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
                     *columns: Any) -> tuple[Matching, dict[str, dict[str, Any]]]:
    """Pairs the lines of two text captures by the columns which TextCapture describes; returns as match_files."""
    with open(pif_path, errors="replace") as pif, open(vif_path, errors="replace") as vif:
        captures = [TextCapture(pif, *columns), TextCapture(vif, *columns)]
        [(_, sent)], [(_, seen)] = blocks = [list(capture) for capture in captures]
    if sent and seen and not any(capture.dated for capture in captures):
        days = round((seen[0] - sent[0]) / DAY)      # midnight was between the first packet's sightings
        for i in range(len(seen) if days else 0):
            seen[i] -= days * DAY
    matching = match(*blocks)
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


def quality_warnings(matching: Matching, figures: Mapping[str, Any]) -> list[str]:
    """What speaks against the numbers of a matching, with what to do about it."""
    warnings = []
    if matching.alike:
        warnings.append(f"{len(matching.alike)} packets on the pif share all that identifies them with another one; "
                        "they were paired in order of appearance, which is a guess where some are lost")
    merged_segments = mergers(matching)
    if merged_segments:
        warnings.append(f"{merged_segments} packets have another length on the vif than on the pif, so they are in "
                        "neither's matches: segments were merged or split (GRO, TSO); measure with small packets, or "
                        "switch it off (ethtool -K)")
    if 2 * matching.matched < min(matching.pif, matching.vif) and not merged_segments:
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


def no_match_message(matching: Matching, pif: str, vif: str, cut: int) -> str:
    """Why two captures may have nothing in common."""
    if cut:
        cause = f"{cut} packets were cut by the snap length before what identifies them: capture more (tcpdump -s)"
    elif not matching.pif and not matching.vif:
        cause = ("the traffic passes neither: is DESTINATION the address of this VM, do the packets carry SOURCE's "
                 "address, does a firewall drop them earlier?")
    elif not matching.pif:
        cause = f"the traffic doesn't come in by {pif}: try another -i; inside a tunnel it is not found"
    elif not matching.vif:
        cause = (f"none reaches {vif}: does a firewall drop them, is the VM's address on another interface (--num), "
                 "does an HVM guest use its emulated one (tap instead of vif)?")
    elif mergers(matching):
        cause = "they differ in length: segments were merged or split (GRO, TSO); measure with small packets"
    else:
        cause = "the packets differ: are they translated (--match-nat), or was it other traffic?"
    return f"no packet was seen on both interfaces ({matching.pif} on {pif}, {matching.vif} on {vif}): {cause}"


def build_report(matching: Matching, capture: Mapping[str, Mapping[str, Any]], warnings: Sequence[str],
                 config: Mapping[str, Any], slowest: int = 0, interrupted: bool = False) -> dict[str, Any]:
    """The JSON document on a matching, as the README describes it; NoMatchError if no packet matched.

    `capture` holds, for each side, what is known of its capture (`records` at least), `warnings` what is wrong so
    far, `config` what ran (`pif` and `vif` name the interfaces or files).
    """
    if not matching.matched:
        cut = sum(counts.get("cut", 0) for counts in capture.values())
        raise NoMatchError(no_match_message(matching, str(config["pif"]), str(config["vif"]), cut))
    figures = statistics(matching.samples())
    ipdv, extents = variation(matching.delays), reordering(matching.arrivals)
    pdv, negative = figures.pop("pdv"), figures["negative"]
    warnings = [*warnings, *(warning for side in capture for warning in capture_warnings(side, capture[side])),
                *quality_warnings(matching, figures)]
    del figures["negative"]
    report = {
        **figures,
        "unit": "microseconds",
        "packets": {
            "pif": matching.pif, "vif": matching.vif, "matched": matching.matched, "lost": matching.lost,
            "duplicated": matching.duplicated, "reordered": len(extents), "vif_only": matching.vif_only},
        "loss_ratio": matching.lost / matching.pif,
        "reordering": {"ratio": len(extents) / matching.matched, "maximum_extent": max(extents.values(), default=0)},
        "pdv": pdv,
        "ipdv": None if ipdv is None else ipdv / 1000,
        "negative": negative,
        "capture": {side: dict(counts) for side, counts in capture.items()},
        "warnings": warnings,
        "config": dict(config),
        **({"interrupted": True} if interrupted else {}),
        "schema_version": SCHEMA_VERSION,
    }
    if slowest:
        report["slowest"] = slowest_packets(matching, slowest)
    return report


def iso_time(nanoseconds: int) -> str:
    """A time as ISO 8601 in UTC, with nanoseconds."""
    import time
    seconds, fraction = divmod(nanoseconds, NANOSECONDS)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{fraction:09}Z"


def slowest_packets(matching: Matching, count: int) -> list[dict[str, Any]]:
    """The matched packets with the largest delays, the slowest first: times, delay in microseconds, and identity."""
    from heapq import nlargest
    ranks = nlargest(count, matching.arrivals, key=matching.delays.__getitem__)
    return [{"t_pif": iso_time(matching.sent[rank]), "t_vif": iso_time(matching.sent[rank] + matching.delays[rank]),
             "delay": matching.delays[rank] / 1000, **describe(matching.identities[rank])} for rank in ranks]


CSV_FIELDS = ("source", "destination", "protocol", "source_port", "destination_port", "sequence", "acknowledgment",
              "icmp_type", "icmp_code", "identifier", "ip_id", "fragment_offset", "length")


def csv_rows(matching: Matching) -> Iterator[Sequence[Any]]:
    """A table of the pif's packets: time, identity, delay in microseconds (empty if lost) and flags."""
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
    """Writes the table of the pif's packets."""
    import csv
    write_whole(path, lambda file: csv.writer(file, lineterminator="\n").writerows(csv_rows(matching)))


def write_whole(path: str, write: Callable[[IO[str]], object]) -> None:
    """Writes a file which is there whole or not at all; UsageError if it can't be."""
    import tempfile
    name = None
    try:
        if os.path.exists(path) and not os.path.isfile(path):        # a device or a pipe
            with open(path, "w") as file:
                write(file)
            return
        with tempfile.NamedTemporaryFile("w", dir=os.path.dirname(path) or ".", prefix=".netweaver-",
                                         delete=False) as temporary:
            name = temporary.name
            write(temporary)
        os.replace(name, path)
        name = None
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}") from error
    finally:
        if name:
            os.unlink(name)


# ---- Command line ----------------------------------------------------------------------------------------------

EPILOG = """\
examples:
  the overhead of a VM's network, 1000 packets at 10 a second:
    netweaver -n instance-<uuid> --hv HV_IP -s SOURCE_IP -d DESTINATION_IP -k KEYFILE
  one packet a millisecond, through a bond, to the VM's second interface:
    netweaver -n web1 --hv root@hv:2222 -s 10.0.0.2 -d 10.0.0.1 -i bond0 --num 1 \\
      --source-command 'hping3 -c {count} -S -i u1000 {destination}'
  a known interface, without asking the toolstack:
    netweaver --vif vif5.0 --hv HV_IP -s SOURCE_IP -d DESTINATION_IP
  captures that are there already, and a table of their packets:
    netweaver --pcaps pif.pcap vif.pcap -d 10.0.0.1 --csv packets.csv --slowest 5

exit codes:
  0 measured   2 usage   3 connection, authentication or host key
  4 remote command or look-up   5 capture   6 no packet matched
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
    what.add_argument("-i", "--interface", metavar="PIF", default="eth0", type=interface,
                      help="the hypervisor's physical interface (default: %(default)s)")
    what.add_argument("--num", metavar="N", default=0, type=nic,
                      help="the number of the VM's interface, N in vif5.N (default: %(default)s)")
    what.add_argument("--vif", metavar="NAME", type=interface,
                      help="the virtual interface itself: the toolstack is not asked, and -n not needed")
    traffic = parser.add_argument_group("traffic")
    traffic.add_argument("-c", "--count", metavar="N", default=1000, type=positive,
                         help="packets to send (default: %(default)s)")
    traffic.add_argument("--source-command", metavar="TEMPLATE", default=DEFAULT_SOURCE_COMMAND,
                         help="shell command that generates the traffic and ends; {count} and {destination} are "
                              "filled in, {{ and }} are braces (default: %(default)s)")
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
    login = parser.add_argument_group("login")
    login.add_argument("-k", "--key", metavar="KEYFILE",
                       help="SSH private key (default: the SSH agent and the keys in ~/.ssh)")
    login.add_argument("--host-key-checking", choices=("accept-new", "yes", "no"), default="accept-new",
                       help="record the keys of new hosts, refuse new hosts, or check nothing (default: %(default)s)")
    login.add_argument("--known-hosts", metavar="FILE",
                       help="the file of known host keys (default: ~/.ssh/known_hosts)")
    output = parser.add_argument_group("output")
    output.add_argument("--csv", metavar="FILE", help="write a table of the pif's packets, a line each")
    output.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    output.add_argument("-v", "--verbose", action="store_true", help="show the commands that are run")
    output.add_argument("-h", "--help", action="help", help="show this help and exit")
    output.add_argument("--version", action="version", version=f"netweaver {__version__}", help="show the version")
    return parser


def measure(arguments: argparse.Namespace, signals: Signals, progress: Callable[[str], None],
            log: Callable[[str], None]) -> dict[str, Any]:
    """Runs a whole measurement; returns the report."""
    lacking = [option for option, value in (("--hv", arguments.hv), ("-s", arguments.source),
                                            ("-d", arguments.destination)) if not value]
    if lacking:
        raise UsageError(f"missing: {', '.join(lacking)} (see netweaver --help; --pcaps analyses existing captures)")
    if not arguments.name_label and not arguments.vif:
        raise UsageError("the destination VM is missing: give its name with -n, or its interface with --vif")
    destination = resolve(arguments.destination)
    source_command = format_source_command(arguments.source_command, arguments.count, destination)
    from getpass import getpass
    with NetWeaver(arguments.source, arguments.name_label or "", destination, arguments.hv, arguments.key,
                   host_interface=arguments.interface, vif_number=arguments.num, vif=arguments.vif,
                   count=arguments.count, timeout=arguments.timeout, match_nat=arguments.match_nat,
                   slowest=arguments.slowest, max_capture_size=arguments.max_capture_size * 1_000_000,
                   host_key_checking=arguments.host_key_checking, known_hosts=arguments.known_hosts,
                   ask=getpass if sys.stdin is not None and sys.stdin.isatty() else None,
                   progress=progress, log=log) as weaver:
        signals.interrupt = weaver.interrupt
        weaver.generate_and_record(source_command)
        weaver.pull_generated_files()
        report = weaver.analyze()
        if arguments.csv and weaver.matching:
            write_csv(weaver.matching, arguments.csv)
        return report


def analyze_files(arguments: argparse.Namespace) -> dict[str, Any]:
    """Analyses existing captures; returns the report."""
    pif, vif = ([path] if os.path.exists(path) else path.split(",") for path in arguments.pcaps)
    sources = [resolve(Target(source).host) for source in arguments.source]
    destinations = [resolve(arguments.destination)] if arguments.destination else []
    warnings: list[str] = []
    matching, capture = match_files(pif, vif, warnings, match_nat=arguments.match_nat, sources=sources,
                                    destinations=destinations)
    config = {"version": __version__, "pif": ",".join(pif), "vif": ",".join(vif), "sources": sources,
              "destination": destinations[0] if destinations else None, "match_nat": arguments.match_nat}
    report = build_report(matching, capture, warnings, config, arguments.slowest)
    if arguments.csv:
        write_csv(matching, arguments.csv)
    return report


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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    def say(line: str) -> None:
        print(printable(line), file=sys.stderr, flush=True)

    verbose = False
    with Signals() as signals:
        try:
            arguments = build_parser().parse_args(argv)
            verbose = arguments.verbose
            if arguments.host_key_checking == "no" and not arguments.pcaps:
                say("netweaver: warning: host keys are not checked: anyone in between can read and change what is sent")
            if arguments.pcaps:
                report = analyze_files(arguments)
            else:
                report = measure(arguments, signals, (lambda line: None) if arguments.quiet else say,
                                 say if verbose else lambda line: None)
            for warning in report["warnings"]:
                say(f"netweaver: warning: {warning}")
            import json
            print(json.dumps(report), flush=True)
            code = 0
        except NetWeaverError as error:
            say(f"netweaver: error: {error}")
            code = error.exit_code
        except KeyboardInterrupt:
            say("netweaver: error: interrupted")
            code = 130
        except Exception as error:
            if verbose:
                raise
            say(f"netweaver: error: unexpected {type(error).__name__}: {error} (-v shows where; please report it)")
            code = 1
        return 128 + signals.number if signals.number else code


if __name__ == "__main__":
    raise SystemExit(main())
