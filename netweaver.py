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
from struct import Struct, iter_unpack, unpack_from

TYPE_CHECKING = False                                # importing typing costs more than analysing 10,000 packets
if TYPE_CHECKING:
    import argparse
    import threading
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any, BinaryIO, NoReturn, TypeVar

    import paramiko

    Block = tuple[list[bytes], array[int]]           # identities, and the times at which they were seen
    Result = TypeVar("Result")

__version__ = "1.0.0"
__all__ = [
    "Capture", "CaptureError", "HostConnectionError", "Matching", "NetWeaver", "NetWeaverError", "NoMatchError",
    "RemoteCommandError", "TextCapture", "UsageError", "main", "match", "statistics",
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
LARGEST_RECORD = 1 << 18                             # libpcap's own limit (MAXIMUM_SNAPLEN)
SHORTEST_RUN = 32                                    # records from which on reading by columns pays
PAYLOAD = 32                                         # bytes of payload that take part in an identity

IPV4, IPV6, TRANSPARENT_ETHERNET = 0x0800, 0x86DD, 0x6558
VLAN_TAGS = frozenset((0x8100, 0x88A8, 0x9100))
EN10MB, LINUX_SLL, LINUX_SLL2 = 1, 113, 276
RAW_IP = frozenset((12, 14, 101, 228, 229))
ICMP, IP_IN_IP, TCP, UDP, IPV6_IN_IP, GRE, ICMPV6 = 1, 4, 6, 17, 41, 47, 58
HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS = 0, 43, 44, 51, 60
EXTENSION_HEADERS = frozenset((HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS))
VXLAN_PORTS, GENEVE_PORT = frozenset((4789, 8472)), 6081
TUNNEL_PORTS = VXLAN_PORTS | {GENEVE_PORT}
SYN = 0x02


IDENTIFIED, UNKNOWN = -1, 0                          # beside ethertypes: where a dissection ends


class _Truncated(Exception):
    """The frame ends before its identity does."""


class _Dissection:
    """What a walk through the headers of one frame finds out.

    `checks` are the byte ranges (offset, size) whose values led the way, `guards` the 16-bit values which only
    had to lie in a range and outside a set, `spans` the byte ranges that identify the innermost packet; no spans
    for a frame without an IP packet.
    """

    def __init__(self, frame: bytes, linktype: int) -> None:
        self.frame = frame
        self.checks: list[tuple[int, int]] = []
        self.guards: list[tuple[int, int, int, frozenset[int]]] = []
        self.spans: list[tuple[int, int]] = []
        kind, at = self._link(linktype)
        while kind in (IPV4, IPV6):                  # one turn for each IP header, outermost first
            kind, at = self._ipv4(at) if kind == IPV4 else self._ipv6(at)
        if kind != IDENTIFIED:
            self.spans = []

    def _value(self, at: int, size: int) -> int:
        if at + size > len(self.frame):
            raise _Truncated
        return int.from_bytes(self.frame[at:at + size], "big")

    def _look(self, at: int, size: int) -> int:
        """The value of a field on which the layout depends."""
        self.checks.append((at, size))
        return self._value(at, size)

    def _link(self, linktype: int) -> tuple[int, int]:
        """(ethertype, offset) of the packet in a frame of this link type."""
        if linktype == EN10MB:
            return self._ethernet(0)
        if linktype in RAW_IP:
            return {4: IPV4, 6: IPV6}.get(self._look(0, 1) >> 4, UNKNOWN), 0
        field, at = (14, 16) if linktype == LINUX_SLL else (0, 20)
        return self._tags(self._look(field, 2), at)

    def _ethernet(self, at: int) -> tuple[int, int]:
        return self._tags(self._look(at + 12, 2), at + 14)

    def _tags(self, kind: int, at: int) -> tuple[int, int]:
        while kind in VLAN_TAGS:
            kind = self._look(at + 2, 2)
            at += 4
        return kind, at

    def _ipv4(self, at: int) -> tuple[int, int]:
        header = (self._look(at, 1) & 15) * 4
        if header < 20:
            return UNKNOWN, 0
        self.spans = [(at + 2, 4), (at + 9, 1), (at + 12, 8)]          # length, id; protocol; addresses
        fragment = self._value(at + 6, 2)
        if fragment & 0x1FFF:                        # not the first: no transport header
            more = fragment & 0xE000
            self.guards.append((at + 6, more | 1, more | 0x1FFF, frozenset()))
            self.spans.append((at + 6, 2))
            return IDENTIFIED, 0
        self._look(at + 6, 2)
        return self._transport(self._look(at + 9, 1), at + header, at + 2, header)

    def _ipv6(self, at: int) -> tuple[int, int]:
        protocol, here = self._look(at + 6, 1), at + 40
        self.spans = [(at + 4, 2), (at + 8, 32)]     # length; addresses
        while protocol in EXTENSION_HEADERS:
            extension, protocol, size = protocol, self._look(here, 1), self._look(here + 1, 1)
            if extension == FRAGMENT:
                self.spans.append((here + 4, 4))
                if self._value(here + 2, 2) & 0xFFF8:
                    self.guards.append((here + 2, 8, 0xFFFF, frozenset()))
                    self.spans.append((here + 2, 2))
                    return IDENTIFIED, 0
                self._look(here + 2, 2)
                here += 8
            else:
                here += (size + 2) * 4 if extension == AUTHENTICATION else (size + 1) * 8
        self.spans.append((at + 6, 1))
        return self._transport(protocol, here, at + 4, here - at - 40)

    def _transport(self, protocol: int, at: int, length: int, excess: int) -> tuple[int, int]:
        """Spans of the transport header at an offset, or what it carries.

        The 16-bit field at `length` counts the IP payload and `excess` bytes more.
        """
        if protocol in (IP_IN_IP, IPV6_IN_IP):
            return (IPV4 if protocol == IP_IN_IP else IPV6), at
        if protocol == GRE:
            return self._gre(at, length, excess)
        if protocol == UDP:
            return self._udp(at)
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
                inner = at + 16 + (self._look(at + 8, 1) & 63) * 4
                kind = self._look(at + 10, 2)
                return self._ethernet(inner) if kind == TRANSPARENT_ETHERNET else (kind, inner)
            if self._look(at + 8, 1) & 8:            # VXLAN with a valid VNI
                return self._ethernet(at + 16)
        else:
            self.guards.append((at + 2, 0, 0xFFFF, TUNNEL_PORTS))
        self.spans.append((at, 6))                   # ports, length
        self._payload(at + 8, at + 4, 8)
        return IDENTIFIED, 0

    def _gre(self, at: int, length: int, excess: int) -> tuple[int, int]:
        flags, kind = self._look(at, 2), self._look(at + 2, 2)
        inner = at + 4 + 4 * ((flags >> 15 & 1) + (flags >> 13 & 1) + (flags >> 12 & 1))
        if kind == TRANSPARENT_ETHERNET:
            return self._ethernet(inner)
        if kind in (IPV4, IPV6):
            return kind, inner
        self._payload(at, length, excess)
        return IDENTIFIED, 0

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
    __slots__ = ("admit", "decide", "expected", "fixed", "guards", "identity", "need", "pick")

    def __init__(self, frame: bytes, linktype: int) -> None:
        found = _Dissection(frame, linktype)
        checks, spans = _joined(found.checks), _joined(found.spans)
        self.guards = found.guards
        self.need = max(at + size for at, size in [*checks, *spans, *((at, 2) for at, *_ in self.guards)])
        if self.need > len(frame):
            raise _Truncated
        self.decide = Struct(_form(checks)).unpack_from
        self.pick = Struct(_form(spans)).unpack_from
        self.expected = self.decide(frame, 0)
        self.fixed = [(at + i, frame[at + i]) for at, size in checks for i in range(size)]
        self.identity = [at + i for at, size in spans for i in range(size)]

    def guarded(self, data: bytes, at: int) -> bool:
        """Whether the guards of this layout hold for the frame at an offset."""
        for offset, low, high, barred in self.guards:
            value = data[at + offset] << 8 | data[at + offset + 1]
            if not low <= value <= high or value in barred:
                return False
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


def _gather(data: bytes, start: int, stop: int, stride: int, offsets: Sequence[int], width: int) -> bytearray:
    """The bytes at the offsets of equally long records, packed into rows of `width` bytes."""
    rows = bytearray(len(range(start, stop, stride)) * width)
    for column, offset in enumerate(offsets):
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
    """The packets in a pcap file, as blocks of sightings.

    Iterating yields pairs (identities, times in integer nanoseconds) of equal length and raises CaptureError for
    what is no capture.  The counts are complete when the iteration is: `records` in the file, `other` of them
    without an IP packet, `cut` of them too short to identify the packet, and `partial`, the number of bytes of a
    last record that is not whole.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name
        self.records = self.other = self.cut = self.partial = 0
        self.precision = "microseconds"
        self._file = file
        self._order = "<"
        self._unit = 1
        self._linktype = EN10MB
        self._layouts: list[_Layout] = []

    def __iter__(self) -> Iterator[Block]:
        self._header()
        base, rest = 24, b""
        while chunk := self._file.read(CHUNK):
            data = rest + chunk if rest else chunk
            keys: list[bytes] = []
            times: array[int] = array("q")
            used = self._take(data, base, keys, times)
            base, rest = base + used, data[used:]
            yield keys, times
        self.partial = len(rest)

    def _header(self) -> None:
        head = self._file.read(24)
        if len(head) < 24:
            raise CaptureError(f"{self.name}: too short for a capture file ({len(head)} bytes)")
        for self._order in "<>":
            magic, linktype = unpack_from(self._order + "I16xI", head)
            if magic in (0xA1B2C3D4, 0xA1B23C4D):
                break
        else:
            raise CaptureError(f"{self.name}: not a pcap file (it starts with {head[:4].hex()})")
        if magic == 0xA1B23C4D:
            self.precision = "nanoseconds"
        self._unit = 1 if magic == 0xA1B23C4D else 1000
        self._linktype = linktype & 0xFFFF
        if self._linktype not in RAW_IP | {EN10MB, LINUX_SLL, LINUX_SLL2}:
            raise CaptureError(f"{self.name}: link type {self._linktype} is not supported (byte 20)")

    def _take(self, data: bytes, base: int, keys: list[bytes], times: array[int]) -> int:
        """Adds the whole records of data; returns how many bytes they have."""
        head = Struct(self._order + "III").unpack_from
        unit, layouts, join = self._unit, self._layouts, b"".join
        add_key, add_time = keys.append, times.append
        at, end, attempt = 0, len(data), 0           # attempt: where to look for a run again
        while at + 16 <= end:
            seconds, fraction, size = head(data, at)
            stride = 16 + size
            if at + stride > end:
                if size > LARGEST_RECORD:
                    raise CaptureError(f"{self.name}: impossible record length {size} at byte {base + at + 8}")
                break
            frame = at + 16
            for layout in layouts:
                if (size >= layout.need and layout.decide(data, frame) == layout.expected
                        and (not layout.guards or layout.guarded(data, frame))):
                    break
            else:
                learned = self._learn(data, at, stride)
                if learned is None:
                    at += stride
                    continue
                layout = learned
            far = at + SHORTEST_RUN * stride
            if at >= attempt and data[far + 8:far + 12] == data[at + 8:at + 12]:
                count = self._run(data, at, stride, layout, keys, times)
                if count:
                    at += count * stride
                    continue
                attempt = far
            if layout.identity:
                add_key(join(layout.pick(data, frame)))
                add_time(seconds * NANOSECONDS + fraction * unit)
            else:
                self.other += 1
            self.records += 1
            at += stride
        return at

    def _learn(self, data: bytes, at: int, stride: int) -> _Layout | None:
        """The layout of the record at an offset; None, and counted, if it holds no whole packet."""
        size, = unpack_from(self._order + "I", data, at + 12)
        try:
            layout = _Layout(data[at + 16:at + stride], self._linktype)
        except _Truncated:
            self.records += 1
            if stride - 16 < size:
                self.cut += 1
            else:
                self.other += 1                      # whole, yet shorter than its headers say: malformed
            return None
        self._layouts.insert(0, layout)
        del self._layouts[16:]
        return layout

    def _run(self, data: bytes, start: int, stride: int, layout: _Layout, keys: list[bytes],
             times: array[int]) -> int:
        """Adds a run of records of one length and layout, if there is a long one; returns how many they are."""
        count = (len(data) - start) // stride
        count = _alike(data, start, stride, count, [(8 + i, data[start + 8 + i]) for i in range(4)])
        count = _alike(data, start, stride, count, [(16 + at, value) for at, value in layout.fixed])
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
        stop, width = start + count * stride, len(layout.identity)
        rows = _gather(data, start + 16, stop, stride, layout.identity, width)
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
            keys.append(key.encode())
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


class Matching:
    """Which packets of the pif were seen on the vif, and when.

    `sent` holds t_pif of each packet in the pif's order, `delays` its D or LOST (both in nanoseconds), `arrivals`
    the pif's ranks of the matched packets in the vif's order.  `pif` and `vif` count the sightings, `duplicated`
    the copies on the vif beyond those on the pif, `vif_only` the sightings of packets never seen on the pif,
    and `alike` the packets of the pif that share their identity with another one.
    """
    __slots__ = ("alike", "arrivals", "delays", "duplicated", "pif", "sent", "vif", "vif_only")

    def __init__(self) -> None:
        self.sent: array[int] = array("q")
        self.delays: array[int] = array("q")
        self.arrivals: array[int] = array("q")
        self.pif = self.vif = self.duplicated = self.vif_only = self.alike = 0

    @property
    def matched(self) -> int:
        return len(self.arrivals)

    @property
    def lost(self) -> int:
        return self.pif - self.matched


def match(pif: Iterable[Block], vif: Iterable[Block]) -> Matching:
    """Pairs the sightings on the pif with those on the vif: the k-th copy of a packet with its k-th copy."""
    result = Matching()
    sent, first = result.sent, {}                    # type: array[int], dict[bytes, int]
    order: list[bytes | None] = []                   # the identities by rank; None for further copies
    copies: dict[bytes, list[int]] = {}
    for keys, times in pif:
        start, known = len(order), len(first)
        ranks = [first.setdefault(key, rank) for rank, key in enumerate(keys, start)]
        order += keys
        sent.extend(times)
        if len(first) - known < len(keys):
            for place, (key, original) in enumerate(zip(keys, ranks), start):
                if place != original:
                    order[place] = None
                    copies.setdefault(key, []).append(place)
    order.append(None)
    further = {key: iter(ranks) for key, ranks in copies.items()}
    result.pif = len(sent)
    result.alike = len(copies) + sum(map(len, copies.values()))
    result.delays = delays = array("q", [LOST]) * len(sent)
    arrive, find = result.arrivals.append, first.get
    expected = 0
    for keys, times in vif:
        result.vif += len(keys)
        for key, time in zip(keys, times):
            # Most often it is the next one, without a look-up.
            rank = expected if order[expected] == key else find(key, -1)
            if rank < 0:
                result.vif_only += 1
                continue
            if delays[rank] != LOST:
                rank = next(further.get(key, iter(())), -1)
                if rank < 0:
                    result.duplicated += 1
                    continue
            expected = rank + 1
            delays[rank] = time - sent[rank]
            arrive(rank)
    return result


def reordered(arrivals: Sequence[int]) -> int:
    """How many packets arrived after one that was sent later (RFC 4737, type-P-reordered)."""
    count = expected = 0
    for rank in arrivals:
        if rank < expected:
            count += 1
        else:
            expected = rank + 1
    return count


def statistics(delays: Iterable[int]) -> dict[str, Any]:
    """Average, extremes, population standard deviation and percentiles of delays, exact until the last rounding.

    Takes integer nanoseconds, at least one, and returns microseconds.
    """
    ranked = sorted(delays)
    size, total = len(ranked), sum(ranked)
    squares = sum(delay * delay for delay in ranked)

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
    }


# ---- Remote: one SSH connection, and commands that certainly end ---------------------------------------------
# Every remote command runs under WRAPPER, which is fed to `sh` on standard input: login shells of any kind see
# nothing but "exec sh", and no process list shows an argument.  What remains of standard input is a lease: lines
# that say "stop" (end the command), "bye" (end everything) or "alive".  The command ends, and its directory is
# removed, when the lease ends (the client died), when it is not renewed for IDLE seconds (the network did) and
# after LIMIT seconds.  POSIX sh and coreutils only: dom0s have neither Python nor, some of them, timeout(1).

WRAPPER = r"""
umask 077
LC_ALL=C; export LC_ALL
dir= p= lease= dog= group= detach= gone=
command -v setsid >/dev/null 2>&1 && detach=setsid group=-
tell() { kill -s "$1" -- "$group$p" || kill -s "$1" "$p"; } 2>/dev/null
linger() { for i in 1 2 3; do tell 0 || return 0; sleep 1; done; tell KILL; }
rest() { sleep 1 & nap=$!; wait $nap; wait $nap; }   # again: a trap cuts a wait short
finish() {
  trap '' HUP INT TERM PIPE; trap - EXIT; exec >/dev/null 2>&1
  if [ -n "$p" ]; then
    tell TERM
    (trap 'kill -s KILL $nap; exit' TERM; for i in 1 2 3; do rest; done; tell KILL) 3<&- & killer=$!
    wait "$p"; kill -s TERM $killer; wait $killer; linger
  fi
  [ -z "$lease" ] || kill -s KILL $lease
  [ -z "$dog" ] || { kill -s TERM $dog; wait $dog; }
  [ -z "$dir" ] || rm -rf "$dir"
}
main() {
  exec 3<&0 </dev/null                               # only here: shells read their script bit by bit
  trap finish EXIT; trap 'gone=1' HUP INT TERM PIPE
  dir=`mktemp -d "${TMPDIR:-/tmp}/netweaver.XXXXXXXXXX"` || exit 70
  printf '\n%s begin %s\n' "$TOKEN" "$dir"
  case $OUTPUT in
    -) $detach sh -c "$COMMAND" 3<&- & ;;
    /*) $detach sh -c "$COMMAND" >"$OUTPUT" 3<&- & ;;
    *) $detach sh -c "$COMMAND" >"$dir/$OUTPUT" 3<&- & ;;
  esac
  p=$!
  (trap 'n=0' USR1; trap 'kill -s KILL $nap; exit' TERM; t=0 n=0
   while [ $t -lt "$LIMIT" ] && [ $n -lt "$IDLE" ]; do
     rest; t=$((t + 1)) n=$((n + 1)); kill -s 0 $$ || break
   done
   kill -s TERM $$; for i in 1 2 3 4 5; do rest; kill -s 0 $$ || break; done
   tell KILL; rm -rf "$dir") 3<&- >/dev/null 2>&1 & dog=$!
  (while read -r line; do
     case $line in alive) kill -s USR1 $dog ;; stop) tell TERM ;; bye) break ;; esac
   done
   kill -s TERM $$ || { tell KILL; rm -rf "$dir"; }) <&3 >/dev/null 2>&1 & lease=$!
  trap 'exit 143' HUP INT TERM PIPE; [ -z "$gone" ] || exit 143
  wait "$p"; status=$?; linger; p=
  printf '\n%s end %s\n' "$TOKEN" "$status"
  case $OUTPUT in -|/*) exit 0 ;; esac
  wait "$lease"
  exit 0
}
main
"""

CONNECT_SECONDS = 10                                 # for each step of a connection: TCP, banner, key, channel
ANSWER_SECONDS = 12                                  # for a look-up or a tool's start or end
ALIVE_SECONDS, IDLE_SECONDS = 2, 10
DEAD_PEER_SECONDS = 8                                # unacknowledged data after which the network is down
LARGEST_ANSWER = 1 << 20


class Target:
    """Whom to log in as, and where: `[user@]host[:port]`, IPv6 literals in brackets when a port follows."""
    __slots__ = ("host", "port", "user")

    def __init__(self, text: str) -> None:
        user, at, place = text.rpartition("@")
        found = re.fullmatch(r"(?:\[([^]]+)]|([^:]+))(?::(\d{1,5}))?", place)
        if not found and place.count(":") > 1:       # a bare IPv6 literal
            found = re.fullmatch(r"()([0-9A-Fa-f:.]+(?:%\w+)?)()", place)
        self.user = user if at else "root"
        self.host = (found[1] or found[2]) if found else ""
        self.port = int(found[3] or 22) if found else 22
        if (not re.fullmatch(r"[\w.:%][\w.:%-]*", self.host, re.ASCII) or not 0 < self.port < 65536
                or not re.fullmatch(r"[\w.][\w.@\\$-]*", self.user)):
            raise UsageError(f"{text!r} is not [user@]host[:port] (an IPv6 address with a port goes in brackets)")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.user}@{host}" + (f":{self.port}" if self.port != 22 else "")


class Job:
    """A command that runs on a host under WRAPPER, and what is known of it so far.

    `directory` is set when it was started; `status` is its exit status once it has ended, and `ended` is also
    true when the connection broke before.  `output` is its standard output, if that was asked for, and `errors`
    the end of its standard error.  `changed` is notified whenever one of them changes.
    """

    def __init__(self, host: str, command: str, channel: paramiko.Channel, token: str,
                 changed: threading.Condition) -> None:
        import threading
        self.host, self.command = host, command
        self.directory: str | None = None
        self.status: int | None = None
        self.ended = self.stopped = False
        self.output = b""
        self._channel, self._changed = channel, changed
        self._out, self._errors = bytearray(), bytearray()
        self._begin = re.compile(rb"\n%b begin (/\S+/netweaver\.\w{10})\n" % token.encode(), re.ASCII)
        self._end = re.compile(rb"\n%b end (\d{1,3})\n" % token.encode(), re.ASCII)
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
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def _take(self, data: bytes) -> None:
        with self._changed:
            self._out += data
            if self.directory is None and (found := self._begin.search(self._out)):
                self.directory = found[1].decode()
                del self._out[:found.end()]
            if self.directory is not None and (found := self._end.search(self._out)):
                self.output = bytes(self._out[:found.start()])
                self.status, self.ended = int(found[1]), True
            if len(self._out) > LARGEST_ANSWER:
                self._channel.close()
            self._changed.notify_all()

    def _take_errors(self, data: bytes) -> None:
        with self._changed:
            self._errors += data
            del self._errors[:-65536]
            self._changed.notify_all()


def last_line(text: str) -> str:
    """The last line that says something, for an error message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


class Remote:
    """An SSH connection to a host: runs commands under WRAPPER and fetches files."""

    def __init__(self, target: Target, key: paramiko.PKey | None, key_path: str | None,
                 changed: threading.Condition, log: Callable[[str], None]) -> None:
        self.target = target
        self.name = str(target)
        self._changed, self._log = changed, log
        self._client = _connect(target, key, key_path)

    @property
    def address(self) -> str:
        """The IP address of the host, as the connection has it."""
        return str(self._transport().getpeername()[0])

    def _transport(self) -> paramiko.Transport:
        transport = self._client.get_transport()
        if transport is None or not transport.is_active():
            raise HostConnectionError(f"the connection to {self.name} is lost")
        return transport

    def start(self, command: str, seconds: float, output: str = "-") -> Job:
        """Starts a shell command that ends after so many seconds at the latest.

        Its standard output goes to the job ("-"), to an absolute path, or to a file of that name in the job's
        private directory, which then stays until `Job.leave`.
        """
        from shlex import quote
        token = f"netweaver-{os.urandom(12).hex()}"
        self._log(f"{self.name}: {command}")
        assignments = {"TOKEN": token, "COMMAND": command, "OUTPUT": output, "LIMIT": str(int(seconds) + 1),
                       "IDLE": str(IDLE_SECONDS)}
        script = "".join(f"{name}={quote(value)}\n" for name, value in assignments.items()) + WRAPPER
        with _ssh_errors(self.name):
            channel = self._transport().open_session(timeout=CONNECT_SECONDS)
            channel.settimeout(CONNECT_SECONDS)
            channel.exec_command("exec sh")
            channel.sendall(script.encode())
            return Job(self.name, command, channel, token, self._changed)

    def run(self, command: str, seconds: float = ANSWER_SECONDS) -> Job:
        """Runs a shell command to its end; returns the job, whatever its status."""
        job = self.start(command, seconds)
        with self._changed:
            self._changed.wait_for(lambda: job.ended, seconds + 2)
        if job.status is None:
            self._transport()
            job.leave(0)
            why = "did not answer in time" if not job.ended else f"could not be run: {last_line(job.errors)}"
            raise RemoteCommandError(f"{self.name}: {command}: {why}")
        return job

    def fetch(self, remote_path: str, local_path: str, sftp: paramiko.SFTPClient) -> None:
        """Copies a file of the host over SFTP."""
        with _ssh_errors(self.name):
            try:
                sftp.get(remote_path, local_path)
            except OSError as error:
                raise CaptureError(f"{self.name}: can't fetch {remote_path}: {error}") from error

    def open_sftp(self) -> paramiko.SFTPClient:
        with _ssh_errors(self.name):
            return self._client.open_sftp()

    def close(self) -> None:
        self._client.close()


class _ssh_errors:
    """Turns what paramiko and sockets raise for a broken connection into a HostConnectionError."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        from paramiko import SSHException
        if isinstance(error, (SSHException, EOFError, OSError)):
            reason = str(error) or "timed out" if isinstance(error, TimeoutError) else str(error)
            raise HostConnectionError(f"{self._name}: the SSH connection failed: {reason}") from error


def _load_key(path: str) -> paramiko.PKey:
    """The private key in a file; HostConnectionError with the reason if there is none that can be used."""
    import paramiko
    try:
        return paramiko.PKey.from_path(path, None)
    except OSError as error:
        reason = error.strerror or str(error)
    except TypeError:
        reason = "it is protected by a passphrase: load it into ssh-agent (ssh-add) and leave -k out"
    except (paramiko.SSHException, ValueError, UnicodeDecodeError) as error:
        reason = f"not a private key in OpenSSH or PEM format ({last_line(str(error))})"
    raise HostConnectionError(f"{path}: can't use this key: {reason}")


def _connect(target: Target, key: paramiko.PKey | None, key_path: str | None) -> paramiko.SSHClient:
    """An authenticated connection; HostConnectionError says what failed and what to do."""
    import logging
    import socket

    import paramiko

    logging.getLogger("paramiko").addHandler(logging.NullHandler())      # else it prints tracebacks

    def failure(what: str, advice: str = "") -> HostConnectionError:
        return HostConnectionError(f"{target}: {what}" + (f": {advice}" if advice else ""))

    try:
        sock = socket.create_connection((target.host, target.port), CONNECT_SECONDS)
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise failure(f"can't reach port {target.port}: {reason}", "check the address, the network and sshd") from error
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):          # Linux: without it a dead peer is noticed after 15 minutes
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PEER_SECONDS * 1000)
    client = paramiko.SSHClient()
    try:
        known_hosts = KnownHosts(os.path.expanduser("~/.ssh/known_hosts"), target)
        client.set_missing_host_key_policy(_host_key_policy(known_hosts))
        client.connect(target.host, target.port, target.user, pkey=key, sock=sock, timeout=CONNECT_SECONDS,
                       banner_timeout=CONNECT_SECONDS, auth_timeout=CONNECT_SECONDS,
                       channel_timeout=CONNECT_SECONDS, allow_agent=key is None, look_for_keys=key is None,
                       transport_factory=_transport_factory(known_hosts))
        transport = client.get_transport()
        assert transport is not None
        transport.set_keepalive(5)
        return client
    except BaseException as error:
        client.close()
        sock.close()
        if isinstance(error, paramiko.ssh_exception.IncompatiblePeer):
            raise failure(f"no common SSH algorithms ({error})",
                          "for an old sshd try pip install 'paramiko<5'") from error
        if isinstance(error, paramiko.AuthenticationException) or "authentication methods" in str(error):
            offered = f"the key {key_path}" if key_path else "the keys of ssh-agent and ~/.ssh"
            raise failure(f"refused {offered} for {target.user}",
                          f"add the public key to {target.user}'s ~/.ssh/authorized_keys there") from error
        if isinstance(error, (paramiko.SSHException, EOFError, OSError, TypeError)):
            raise failure(f"no SSH session: {error or 'the connection was closed'}") from error
        raise


def _host_key_policy(known_hosts: KnownHosts) -> paramiko.MissingHostKeyPolicy:
    """The paramiko policy that leaves every decision to known_hosts (the client itself knows no host)."""
    import paramiko

    class Policy(paramiko.MissingHostKeyPolicy):
        def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
            known_hosts.check(key)

    return Policy()


def _transport_factory(known_hosts: KnownHosts) -> Callable[..., paramiko.Transport]:
    """Makes transports which ask for the known host key first."""
    import paramiko

    def make(*arguments: Any, **options: Any) -> paramiko.Transport:
        transport = paramiko.Transport(*arguments, **options)
        security, known = transport.get_security_options(), known_hosts.algorithms()
        security.key_types = tuple(sorted(security.key_types, key=lambda name: name not in known))
        return transport

    return make


class KnownHosts:
    """What OpenSSH's known_hosts file says of one host: who is new is recorded, who has changed is refused."""

    def __init__(self, path: str, target: Target) -> None:
        self.path, self._target = path, target
        self.name = (target.host if target.port == 22 else f"[{target.host}]:{target.port}").lower()
        self._read()

    def _read(self) -> None:
        self.known: list[tuple[int, paramiko.PKey]] = []
        self.revoked: list[tuple[int, paramiko.PKey]] = []
        try:
            with open(self.path, encoding="utf-8", errors="replace") as file:
                lines = file.read().splitlines()
        except FileNotFoundError:
            return
        except OSError as error:
            raise HostConnectionError(f"{self._target}: can't read {self.path}: {error.strerror}") from error
        for number, line in enumerate(lines, 1):     # one by one: a line that paramiko can't read spoils no other
            marker, _, rest = line.strip().partition(" ")
            if marker == "@revoked":
                self.revoked += self._keys(number, rest)
            elif not marker.startswith("@"):         # certificate authorities are not for host keys
                self.known += self._keys(number, line)

    def _keys(self, number: int, line: str) -> list[tuple[int, paramiko.PKey]]:
        """[(number, key)] of a line if it speaks of this host."""
        import paramiko
        try:
            entry = paramiko.hostkeys.HostKeyEntry.from_line(line, number)
        except (paramiko.SSHException, ValueError):
            return []
        if entry is None or entry.key is None or not entry.hostnames:
            return []
        matches = [self._matches(pattern.lstrip("!")) for pattern in entry.hostnames]
        negated = any(hit and pattern.startswith("!") for hit, pattern in zip(matches, entry.hostnames))
        return [(number, entry.key)] if any(matches) and not negated else []

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

    def check(self, key: paramiko.PKey) -> None:
        """Accepts a key that is known, or records it if the host is new; raises HostConnectionError otherwise."""
        for number, revoked in self.revoked:
            if revoked == key:
                raise HostConnectionError(f"{self._target}: its host key is revoked: {self.path} line {number}")
        if any(known == key for _, known in self.known):
            return
        if self.known:
            places = ", ".join(str(number) for number, _ in self.known)
            raise HostConnectionError(
                f"{self._target}: the host key has changed, or someone is in between: it now shows "
                f"{key.get_name()} {_fingerprint(key)}; if that is right, remove line {places} of {self.path}")
        self._record(key)

    def _record(self, key: paramiko.PKey) -> None:
        """Appends one line, under a lock: other runs may be doing the same."""
        import fcntl
        try:
            os.makedirs(os.path.dirname(self.path), 0o700, exist_ok=True)
            with open(os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._read()
                if self.known:
                    return self.check(key)
                old = file.read()
                newline = b"" if not old or old.endswith(b"\n") else b"\n"
                file.write(newline + f"{self.name} {key.get_name()} {key.get_base64()}\n".encode())
        except OSError as error:
            raise HostConnectionError(f"{self._target}: can't record its host key in {self.path}: "
                                      f"{error.strerror}") from error


def _fingerprint(key: paramiko.PKey) -> str:
    """A key's fingerprint as OpenSSH prints it."""
    from base64 import b64encode
    from hashlib import sha256
    return "SHA256:" + b64encode(sha256(key.asbytes()).digest()).decode().rstrip("=")


def in_parallel(*calls: Callable[[], Result]) -> list[Result]:
    """The results of the calls, each made in a thread of its own; raises the first error, once all have ended."""
    import threading
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
        thread.join()
    if errors:
        raise errors[0]
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
NO_REPLY = re.compile(r"^\d+ packets transmitted", re.MULTILINE)         # hping3's statistics, on stderr


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
    default keys are used.  `timeout` bounds the traffic (seconds).  `progress` and `log` are called with lines
    for people: the steps, and each command run.

    Use it as a context manager, or call `close`.  The methods are meant to be called in the order in which they
    stand here; each raises a NetWeaverError that says what happened and where.  For a hypervisor whose toolstack
    is not xe, override `determine_vif_number`.
    """

    def __init__(self, source_ip: str | Sequence[str], destination_name_label: str, destination_ip: str,
                 destination_host_ip: str, ssh_key_path: str | None = None, *, host_interface: str = "eth0",
                 vif_number: int = 0, vif: str | None = None, count: int = 1000, timeout: float | None = None,
                 progress: Callable[[str], None] = lambda line: None,
                 log: Callable[[str], None] = lambda line: None) -> None:
        import threading
        self.destination_name_label = destination_name_label
        self.destination_ip = destination_ip
        self.host_interface, self.vif_number, self.vif, self.count = host_interface, vif_number, vif, count
        self.timeout = max(600, count // 5) if timeout is None else timeout
        self._hypervisor = Target(destination_host_ip)
        self._sources = [Target(source) for source in ([source_ip] if isinstance(source_ip, str) else source_ip)]
        self._key_path, self._progress, self._log = ssh_key_path, progress, log
        self._changed = threading.Condition()
        self._remotes: dict[str, Remote] = {}
        self._jobs: list[Job] = []
        self._captures: dict[str, Job] = {}
        self._files: dict[str, str] = {}
        self._directory: str | None = None
        self._warnings: list[str] = []
        self._config: dict[str, Any] = {}

    def __enter__(self) -> NetWeaver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the seed's public surface --

    def verify_connections(self) -> bool:
        """Connects to all hosts at once; True, or HostConnectionError for one that can't be used."""
        key = _load_key(self._key_path) if self._key_path else None
        targets = {str(target): target for target in [self._hypervisor, *self._sources]}

        def connect(name: str) -> None:
            self._remotes[name] = Remote(targets[name], key, self._key_path, self._changed, self._log)

        in_parallel(*(lambda name=name: connect(name) for name in targets if name not in self._remotes))
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
        self._generate(source_command, sources)
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
            matching = match_files(pif_path, vif_path, warnings)
        else:
            matching = match_text_files(pif_path, vif_path, warnings, seq_no_col, timestamp_col, seq_no_split_by,
                                        seq_no_split_index)
        capture = {side: {"interface": self._config[side], **tcpdump_counts(job.errors)}
                   for side, job in self._captures.items()}
        for side, count in (("pif", matching.pif), ("vif", matching.vif)):
            warnings += capture_warnings(side, capture[side], count)
        if not matching.matched:
            raise NoMatchError(no_match_message(matching, self._config["pif"], self._config["vif"]))
        return build_report(matching, capture, warnings, self._config)

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

    def close(self) -> None:
        """Ends whatever still runs on the hosts, and removes all files, here and there."""
        import shutil
        jobs, self._jobs = self._jobs, []
        try:
            if jobs:
                in_parallel(*(job.leave for job in jobs))
        finally:
            for remote in self._remotes.values():
                remote.close()
            self._remotes = {}
            if self._directory:
                shutil.rmtree(self._directory, ignore_errors=True)
                self._directory = None

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
            return [remote.address.split("%")[0].removeprefix("::ffff:"), *(found.groups() if found else ())]

        found = in_parallel(*(lambda source=source: of(source) for source in self._sources))
        return list(dict.fromkeys(address for addresses in found for address in addresses))

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
            job = remote.start(command, seconds, f"{side}.pcap")
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
            if job.ended and job.status is None:
                self._remotes[str(self._hypervisor)]._transport()
                raise CaptureError(f"{job.host}: the capture on {self._config[side]} can't run: "
                                   f"{last_line(job.errors)}")
            if job.ended and not job.stopped:
                words = "; ".join(line.strip() for line in job.errors.splitlines() if "listening on" not in line)
                raise CaptureError(f"{job.host}: the capture on {self._config[side]} ended with status {job.status}: "
                                   f"{words[-500:] or 'no message'}")

    def _generate(self, command: str, sources: Sequence[str]) -> None:
        """Runs the traffic to its end, or to the time-out, while the captures run."""
        import datetime
        import time
        self._config["started"] = datetime.datetime.now(datetime.timezone.utc).isoformat().replace("+00:00", "Z")
        begun = time.monotonic()
        jobs = in_parallel(*(lambda name=name: self._remotes[name].start(command, self.timeout + ANSWER_SECONDS,
                                                                         "/dev/null") for name in sources))
        self._jobs += jobs
        captures = self._captures.values()
        over = self._wait(lambda: all(job.ended for job in jobs) or any(job.ended for job in captures), self.timeout)
        self._check_captures()
        if not over:
            for job in jobs:
                job.stop()
            self._warnings.append(f"the source command was stopped after {self.timeout:g} s (--timeout)")
            self._wait(lambda: all(job.ended for job in jobs), ANSWER_SECONDS)
        self._config["duration"] = round(time.monotonic() - begun, 6)
        for job in jobs:
            if not job.stopped:
                check_generator(job)

    def _stop_captures(self) -> None:
        """Stops the captures when the kernel has handed over what it saw."""
        jobs = list(self._captures.values())
        self._wait(lambda: any(job.ended for job in jobs), DRAIN_SECONDS)
        self._check_captures()
        for job in jobs:
            job.stop()
        if not self._wait(lambda: all(job.ended for job in jobs), ANSWER_SECONDS):
            raise CaptureError(f"{self._hypervisor}: a capture doesn't end")

    def _pull(self, remote: Remote, side: str) -> None:
        job = self._captures[side]
        local = os.path.join(self._directory or "", f"{side}.pcap")
        sftp = remote.open_sftp()
        try:
            remote.fetch(f"{job.directory}/{side}.pcap", local, sftp)
        finally:
            sftp.close()
        job.leave()
        self._files[side] = local

    def _wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Waits for a condition on the jobs; False if the time is over."""
        with self._changed:
            return self._changed.wait_for(condition, seconds)


def check_generator(job: Job) -> None:
    """Raises RemoteCommandError if a source command failed; exit status 1 for "no reply" is no failure."""
    if job.status is None:
        raise HostConnectionError(f"{job.host}: the connection broke while the source command ran")
    program = os.path.basename(job.command.split(None, 1)[0]) if job.command.split() else ""
    unanswered = NO_REPLY.search(job.errors) or program in ("ping", "ping6")
    if job.status == 0 or (job.status == 1 and unanswered):
        return
    hint = " (install it there, or choose another --source-command)" if job.status == 127 else ""
    raise RemoteCommandError(f"{job.host}: {job.command}: exit status {job.status}: {last_line(job.errors)}{hint}")


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

def match_files(pif_path: str, vif_path: str, warnings: list[str]) -> Matching:
    """Pairs the packets of two pcap files; what was odd in them is added to the warnings."""
    captures = []
    try:
        with open(pif_path, "rb") as pif, open(vif_path, "rb") as vif:
            captures = [Capture(pif, pif_path), Capture(vif, vif_path)]
            matching = match(*captures)
    except OSError as error:
        raise CaptureError(f"{error.filename}: can't read it: {error.strerror}") from error
    for side, capture in zip(("pif", "vif"), captures):
        if capture.partial:
            warnings.append(f"{side}: the last record is not whole; the {capture.records} before it are used")
        if capture.cut:
            warnings.append(f"{side}: {capture.cut} packets were cut before what identifies them and are left out: "
                            "capture with a longer snap length")
    if matching.alike:
        warnings.append(f"{matching.alike} packets on the pif can't be told apart from another one; they were "
                        "paired in order of appearance")
    return matching


def match_text_files(pif_path: str, vif_path: str, warnings: list[str], *columns: Any) -> Matching:
    """Pairs the lines of two text captures by the columns which TextCapture describes."""
    with open(pif_path, errors="replace") as pif, open(vif_path, errors="replace") as vif:
        captures = [TextCapture(pif, *columns), TextCapture(vif, *columns)]
        [(_, sent)], [(_, seen)] = blocks = [list(capture) for capture in captures]
    if sent and seen and not any(capture.dated for capture in captures):
        days = round((seen[0] - sent[0]) / DAY)      # midnight was between the first packet's sightings
        for i in range(len(seen) if days else 0):
            seen[i] -= days * DAY
    matching = match(*blocks)
    for side, capture in zip(("pif", "vif"), captures):
        if capture.skipped:
            warnings.append(f"{side}: {capture.skipped} lines without a sequence number or time were left out")
    if matching.alike:
        warnings.append(f"{matching.alike} lines on the pif share their sequence number with another one; they were "
                        "paired in order of appearance: is seq_no_col right?")
    return matching


def capture_warnings(side: str, counts: Mapping[str, Any], records: int) -> list[str]:
    """What tcpdump's own counts say against a capture."""
    warnings = []
    if counts.get("dropped"):
        warnings.append(f"{side}: the kernel dropped {counts['dropped']} packets before tcpdump read them, so "
                        "\"lost\" can't be trusted: generate less traffic, or give the hypervisor more CPU")
    if counts.get("captured", records) > records:
        warnings.append(f"{side}: tcpdump captured {counts['captured']} packets and {records} are in the file: is the "
                        "hypervisor's disk full?")
    return warnings


def no_match_message(matching: Matching, pif: str, vif: str) -> str:
    """Why two captures may have nothing in common."""
    if not matching.pif and not matching.vif:
        cause = ("the traffic passes neither: is DESTINATION the address of this VM, do the packets carry SOURCE's "
                 "address, does a firewall drop them earlier?")
    elif not matching.pif:
        cause = f"the traffic doesn't come in by {pif}: try another -i; inside a tunnel it is not found"
    elif not matching.vif:
        cause = (f"none reaches {vif}: does a firewall drop them, is the VM's address on another interface (--num), "
                 "does an HVM guest use its emulated one (tap instead of vif)?")
    else:
        cause = "the packets differ: are they translated (NAT), or was it other traffic?"
    return (f"no packet was seen on both interfaces ({matching.pif} on {pif}, {matching.vif} on {vif}): {cause}")


def build_report(matching: Matching, capture: Mapping[str, Any], warnings: Sequence[str],
                 config: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON document for a matching with at least one matched packet."""
    return {
        **statistics(delay for delay in matching.delays if delay != LOST),
        "unit": "microseconds",
        "packets": {
            "pif": matching.pif, "vif": matching.vif, "matched": matching.matched, "lost": matching.lost,
            "duplicated": matching.duplicated, "reordered": reordered(matching.arrivals),
            "vif_only": matching.vif_only},
        "capture": dict(capture),
        "warnings": list(warnings),
        "config": dict(config),
        "schema_version": SCHEMA_VERSION,
    }


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

exit codes:
  0 measured   2 usage   3 connection, authentication or host key
  4 remote command or look-up   5 capture   6 no packet matched
  130, 143 interrupted by a signal   1 anything else
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
    what.add_argument("--hv", metavar="HOST", required=True, help="its hypervisor, as [user@]host[:port]")
    what.add_argument("-s", "--source", metavar="SOURCE", required=True, action="append",
                      help="a VM that generates traffic, as [user@]host[:port]; may be repeated")
    what.add_argument("-d", "--destination", metavar="DESTINATION", required=True, help="the destination VM's address")
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
    login = parser.add_argument_group("login")
    login.add_argument("-k", "--key", metavar="KEYFILE",
                       help="SSH private key (default: the SSH agent and the keys in ~/.ssh)")
    output = parser.add_argument_group("output")
    output.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    output.add_argument("-v", "--verbose", action="store_true", help="show the commands that are run")
    output.add_argument("-h", "--help", action="help", help="show this help and exit")
    output.add_argument("--version", action="version", version=f"netweaver {__version__}", help="show the version")
    return parser


def resolve(name: str) -> str:
    """The IP address of a destination given as an address or a name; UsageError if it is neither."""
    import socket
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{name!r} is neither an IP address nor a name that can be resolved") from error
    return str(found[0][4][0])


def measure(arguments: argparse.Namespace, progress: Callable[[str], None],
            log: Callable[[str], None]) -> dict[str, Any]:
    """Runs a whole measurement; returns the report."""
    if not arguments.name_label and not arguments.vif:
        raise UsageError("the destination VM is missing: give its name with -n, or its interface with --vif")
    destination = resolve(arguments.destination)
    source_command = format_source_command(arguments.source_command, arguments.count, destination)
    with NetWeaver(arguments.source, arguments.name_label or "", destination, arguments.hv, arguments.key,
                   host_interface=arguments.interface, vif_number=arguments.num, vif=arguments.vif,
                   count=arguments.count, timeout=arguments.timeout, progress=progress, log=log) as weaver:
        weaver.generate_and_record(source_command)
        weaver.pull_generated_files()
        return weaver.analyze()


def printable(text: str) -> str:
    """Text whose control characters can't do anything to a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    import json
    import signal

    def say(line: str) -> None:
        print(printable(line), file=sys.stderr, flush=True)

    def terminate(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, terminate)
    verbose = False
    try:
        arguments = build_parser().parse_args(argv)
        verbose = arguments.verbose
        report = measure(arguments, (lambda line: None) if arguments.quiet else say,
                         say if verbose else lambda line: None)
        for warning in report["warnings"]:
            say(f"netweaver: warning: {warning}")
        print(json.dumps(report), flush=True)
        return 0
    except NetWeaverError as error:
        say(f"netweaver: error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("netweaver: error: interrupted")
        return 130
    except Exception as error:
        if verbose:
            raise
        say(f"netweaver: error: unexpected {type(error).__name__}: {error} (-v shows where; please report it)")
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
