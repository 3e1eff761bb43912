#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["paramiko>=3.4"]
# ///
"""Measure what a hypervisor's virtual network costs: the time from pif to vif.

netweaver captures on the physical interface (pif) of a hypervisor and on the
virtual interface (vif) of a VM while source VMs generate traffic, and matches
the packets of the two captures: t_vif - t_pif of each, by one kernel's clock.

    python netweaver.py -n instance-<uuid> --hv HV_IP -s SOURCE_IP -d DESTINATION_IP -k KEYFILE

The rooms of this file, each of which knows only those before it: captures (a
file in, identities and times out), analysis (who was seen where, and what that
says), remote (commands that certainly end, and logging in), toolstacks (a VM's
name in, its interfaces out), measurement (plan, record, fetch, analyse), report
(the document and its files), people and monitors, and the command line.
"""
from __future__ import annotations

import errno
import os
import re
import select
import sys
import threading
import time
from array import array
from bisect import bisect, bisect_left
from collections import defaultdict, namedtuple
from functools import partialmethod
from itertools import count, islice
from operator import itemgetter, le, mul
from shlex import quote
from struct import Struct, unpack_from
from struct import error as StructError

# What takes more than 2 ms, or isn't needed to analyse files, is imported where it is needed.
TYPE_CHECKING = False                                # importing typing takes 7 ms
if TYPE_CHECKING:
    import argparse
    import subprocess
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import ExitStack
    from typing import Any, BinaryIO, NoReturn

    import paramiko

    Block = tuple[list[bytes], array[int], dict[int, list[bytes]]]       # see Capture
    Report = Mapping[str, Any]
    Run = Callable[..., str]                         # see the toolstacks

__version__ = "2.0.0"

SCHEMA_VERSION = 2
NANOSECONDS = 1_000_000_000
DAY = 86_400 * NANOSECONDS


class NetWeaverError(Exception):
    """What a user can do something about; only `main` turns it into an exit code."""
    exit_code = 1


class UsageError(NetWeaverError):
    """An argument that can't be used, or a file that can't be written."""
    exit_code = 2


class HostConnectionError(NetWeaverError):
    """A host can't be reached, its key or ours was refused, or the connection broke."""
    exit_code = 3


class RemoteCommandError(NetWeaverError):
    """A remote command failed, or its answer was not the one that was needed."""
    exit_code = 4


class UnknownVMError(RemoteCommandError):
    """A toolstack has no VM of that name: another one may have it."""


class CaptureError(NetWeaverError):
    """A capture could not be made, fetched or read."""
    exit_code = 5


class NoMatchError(NetWeaverError):
    """Both captures are fine, and there is no delay in them."""
    exit_code = 6


class ReaderGone(NetWeaverError):
    """Who read standard output doesn't any more."""
    exit_code = 141


# ---- Captures: identities ------------------------------------------------------------------------------------
# An identity is what tells a packet from all others wherever it is seen: IP's version (1 byte; 0 for a line of text;
# with NOT_FIRST for a fragment but the first), protocol (1), length (2), id (2), source and destination (8 or 32), and
# of the transport header or the payload what no router changes.

TEXT, NOT_FIRST = 0, 0x80
ADDRESSES = 6                                        # where they begin in an identity
PAYLOAD = 32                                         # bytes of payload that take part
MOST_HEADERS = 32                                    # in one frame; more are no traffic that anyone sends

UNKNOWN, ANY_IP = 0, -1                              # beside ethertypes
IPV4, ARP, IPV6, TRANSPARENT_ETHERNET = 0x0800, 0x0806, 0x86DD, 0x6558
VLAN_TAGS, MPLS = (0x8100, 0x88A8, 0x9100), (0x8847, 0x8848)
EN10MB, LINUX_SLL, LINUX_SLL2 = 1, 113, 276
# By link type: where the ethertype is (None: there are IP packets alone), and what follows the header.
LINK_HEADERS: dict[int, tuple[int | None, int]] = {
    EN10MB: (12, 14), LINUX_SLL: (14, 16), LINUX_SLL2: (0, 20), 0: (None, 4), 108: (None, 4),        # NULL, LOOP
    **dict.fromkeys((12, 14, 101, 228, 229), (None, 0))}
ICMP, IP_IN_IP, TCP, UDP, IPV6_IN_IP, FRAGMENT, GRE, AUTHENTICATION, ICMPV6 = 1, 4, 6, 17, 41, 44, 47, 51, 58
EXTENSION_HEADERS = (0, 43, FRAGMENT, AUTHENTICATION, 60)    # hop-by-hop, routing, ..., destination options
GENEVE_PORT, TUNNEL_PORTS = 6081, (4789, 8472, 6081)         # the others are VXLAN's
FIN, SYN, RST, PSH, ACK, CWR = 0x01, 0x02, 0x04, 0x08, 0x10, 0x80
IPV4_IN_ETHERNET = b"\x08\0\x45"                     # ethertype, version and size
TOO_SHORT = IndexError, StructError                  # what reading beyond the end of a frame raises

_ipv4_fields = Struct(">Bx4s2sxc2x8s").unpack_from   # version and size; length, id; fragment; protocol; addresses
_ipv6_fields = Struct(">B3x2sBx32s").unpack_from     # version; length; next header; addresses


def identify(frame: bytes, linktype: int) -> list[bytes]:
    """The identities of the IP packets in a frame: the outermost first, then what a tunnel carries.

    There is none in a frame that carries ARP.  Raises one of TOO_SHORT if the frame ends before the innermost packet
    is identified, unless the packet around it is whole: then what is inside is malformed.
    """
    if linktype == EN10MB and frame[12:15] == IPV4_IN_ETHERNET and (identity := _plain(frame)):
        return [identity]
    packets: list[bytes] = []
    place, at = LINK_HEADERS.get(linktype, (None, len(frame)))
    ethertype = ANY_IP if place is None else _u16(frame, place)
    end = 0                                          # of the packet around
    for _ in range(MOST_HEADERS):
        try:
            if ethertype in (UNKNOWN, ARP):
                return [] if ethertype == ARP else packets
            if ethertype not in (IPV4, IPV6):
                ethertype, at = _other_header(frame, ethertype, at)
                continue
            identity, at, size = (_ipv4 if ethertype == IPV4 else _ipv6)(frame, at)
            packets.append(_with_transport(frame, identity, at, size))
            end = at + size
            ethertype, at = _inside(frame, identity, at)
        except TOO_SHORT:
            if not packets or end > len(frame):
                raise
            break
        except ValueError:                           # no IP header, whatever the ethertype says
            break
    return packets


def _plain(frame: bytes) -> bytes:
    """The identity of what most frames are, TCP or UDP in IPv4, at once; empty for any other packet."""
    if len(frame) < 54 or frame[21] or frame[20] & 0x3F:
        return b""
    if frame[23] == TCP and (frame[46] == 0x50 or frame[47] & SYN):          # no options, or none that count
        return b"\4\6" + frame[16:20] + frame[26:48]
    if (frame[23] == UDP and len(frame) >= 42 + PAYLOAD and frame[38:40] >= b"\0\x28" and frame[16:18] >= b"\0\x3c"
            and _u16(frame, 36) not in TUNNEL_PORTS):
        return b"\4\x11" + frame[16:20] + frame[26:40] + frame[42:42 + PAYLOAD]
    return b""


def _u16(frame: bytes, at: int) -> int:
    return frame[at] << 8 | frame[at + 1]


def _part(frame: bytes, at: int, size: int) -> bytes:
    if at + size > len(frame):
        raise IndexError
    return frame[at:at + size]


# These two return the ethertype of what follows, and where that begins.

def _other_header(frame: bytes, ethertype: int, at: int) -> tuple[int, int]:
    if ethertype in VLAN_TAGS:
        return _u16(frame, at + 2), at + 4
    if ethertype == TRANSPARENT_ETHERNET:
        return _u16(frame, at + 12), at + 14
    if ethertype in MPLS:                            # the lowest label of the stack, or another one
        return ANY_IP if frame[at + 2] & 1 else ethertype, at + 4
    return {4: IPV4, 6: IPV6}.get(frame[at] >> 4, UNKNOWN) if ethertype == ANY_IP else UNKNOWN, at


def _inside(frame: bytes, identity: bytes, at: int) -> tuple[int, int]:
    """What a packet with its transport header at an offset carries, if it is a tunnel's."""
    protocol = UNKNOWN if identity[0] & NOT_FIRST else identity[1]
    if protocol == UDP and (port := _u16(frame, at + 2)) in TUNNEL_PORTS:
        first = frame[at + 8]
        if port != GENEVE_PORT and first & 8:        # with a valid VNI
            return TRANSPARENT_ETHERNET, at + 16
        if port == GENEVE_PORT and not first >> 6:   # version 0
            return _u16(frame, at + 10), at + 16 + (first & 63) * 4
    elif protocol == GRE:                            # checksum, key and sequence number are there or not
        return _u16(frame, at + 2), at + 4 + 4 * sum(frame[at] >> bit & 1 for bit in (7, 5, 4))
    elif protocol in (IP_IN_IP, IPV6_IN_IP):
        return IPV4 if protocol == IP_IN_IP else IPV6, at
    return UNKNOWN, at


# These two return an identity without the transport header's part, where that begins, and the payload's size.

def _ipv4(frame: bytes, at: int) -> tuple[bytes, int, int]:
    version, length_id, fragment, protocol, addresses = _ipv4_fields(frame, at)  # type: int, bytes, bytes, bytes, bytes
    if not 0x45 <= version <= 0x4F:
        raise ValueError
    if fragment[0] & 0x1F or fragment[1]:
        return bytes((4 | NOT_FIRST,)) + protocol + length_id + addresses + fragment, 0, 0
    header = (version & 15) * 4
    return b"\4" + protocol + length_id + addresses, at + header, _u16(length_id, 0) - header


def _ipv6(frame: bytes, at: int) -> tuple[bytes, int, int]:
    version, length, protocol, addresses = _ipv6_fields(frame, at)       # type: int, bytes, int, bytes
    if version >> 4 != 6:
        raise ValueError
    here, ip_id = at + 40, b"\0\0"
    while protocol in EXTENSION_HEADERS:
        extension, protocol, size = protocol, frame[here], frame[here + 1]
        if extension == FRAGMENT:
            fragment, size = _part(frame, here + 2, 6), 0        # offset and flags, id
            ip_id = fragment[4:]
            if fragment[0] or fragment[1] & 0xF8:
                return bytes((6 | NOT_FIRST, protocol)) + length + ip_id + addresses + fragment, 0, 0
        here += (size + 2) * 4 if extension == AUTHENTICATION else (size + 1) * 8
    return bytes((6, protocol)) + length + ip_id + addresses, here, _u16(length, 0) - (here - at - 40)


def _with_transport(frame: bytes, identity: bytes, at: int, size: int) -> bytes:
    """An identity with the part of the transport header at an offset, of a payload of so many bytes."""
    protocol = identity[1]
    if identity[0] & NOT_FIRST:
        return identity
    if protocol == TCP:
        identity += _part(frame, at, 14)             # ports, sequence and acknowledgment numbers, flags
        # Of a SYN routers do edit the options; in others are the time stamps of a retransmission.
        options = 0 if identity[-1] & SYN else (identity[-2] >> 4) * 4 - 20
        return identity + _part(frame, at + 20, max(options, 0))
    if protocol == UDP:
        length = _u16(frame, at + 4) or size         # of a jumbogram there is none
        return identity + _part(frame, at, 6) + _part(frame, at + 8, min(max(min(length, size) - 8, 0), PAYLOAD))
    if protocol in (ICMP, ICMPV6):                   # type and code; identifier and sequence number
        return identity + frame[at:at + 2] + _part(frame, at + 4, 4)
    return identity + _part(frame, at, min(max(size, 0), PAYLOAD))


def addresses_of(identity: bytes) -> bytes:
    """Source and destination as they stand in the packet; empty for a line of text."""
    version = identity[0] & ~NOT_FIRST
    return identity[ADDRESSES:ADDRESSES + (8 if version == 4 else 32)] if version else b""


def _transport_of(identity: bytes) -> bytes:
    """What an identity has of the transport header; of a fragment but the first, its offset."""
    return identity[ADDRESSES + len(addresses_of(identity)):]


def flow_of(identity: bytes) -> bytes:
    """What all packets of a flow share: IP version, protocol, addresses and ports."""
    addresses = addresses_of(identity)
    ports = 4 if identity[1] in (TCP, UDP) and addresses and not identity[0] & NOT_FIRST else 0
    return identity[:2] + identity[ADDRESSES:ADDRESSES + len(addresses) + ports]


def describe(identity: bytes) -> dict[str, Any]:
    """The fields of an identity, for people; those that it doesn't have are missing."""
    if identity[0] == TEXT:
        return {"sequence": identity[1:].decode()}
    from ipaddress import ip_address
    six, protocol, flow, rest = identity[0] & 15 == 6, identity[1], addresses_of(identity), _transport_of(identity)
    half = len(flow) // 2
    fields: dict[str, Any] = {
        "length": _u16(identity, 2) + 40 * six, "source": str(ip_address(flow[:half])),
        "destination": str(ip_address(flow[half:])),
        "protocol": {ICMP: "ICMP", ICMPV6: "ICMPv6", TCP: "TCP", UDP: "UDP"}.get(protocol, str(protocol))}
    if not six or any(identity[4:6]):
        fields["ip_id"] = _u16(identity, 4)
    names, form = (), ""                             # type: tuple[str, ...], str
    if identity[0] & NOT_FIRST:
        fields["fragment_offset"] = _u16(rest, 0) & 0xFFF8 if six else (_u16(rest, 0) & 0x1FFF) * 8
    elif protocol in (TCP, UDP):
        names = ("source_port", "destination_port", "sequence", "acknowledgment")
        form = ">HHII" if protocol == TCP else ">HH"
    elif protocol in (ICMP, ICMPV6):
        names, form = ("icmp_type", "icmp_code", "identifier", "sequence"), ">BBHH"
    return fields | dict(zip(names, unpack_from(form, rest)))


# ---- Captures: files -----------------------------------------------------------------------------------------

CHUNK = 1 << 19
PCAP_HEADER, RECORD_HEADER, LARGEST_RECORD, LARGEST_BLOCK = 24, 16, 1 << 18, 1 << 24     # bytes; libpcap's own limits
# What generators send are records of one length with Ethernet, IPv4 and TCP, none with options that count.  Where all
# of a chunk are, which a few columns of bytes tell, there are only four fields to take from each: seconds, fraction,
# length and id, addresses with the TCP header.
UNIFORM_RECORD, UNIFORM_SIZE = "II24x4s6x22s", 54
UNIFORM_COLUMNS = (8, 9, 10, 11, 28, 29, 30, 36, 37, 39, 62)    # size, ethertype, version, fragment, protocol, TCP size


class Capture:
    """The packets in a pcap or pcapng file, which may be a pipe; CaptureError for what is neither.

    Yields blocks: the identities of the innermost packets, their times, and by place in these lists the identities of
    the packets around, where there are any.  When the iteration is complete, so are the counts: `records` in the file,
    `other` of them without an IP packet, `cut` of them too short to identify it, `filtered` of them left out by `read`,
    and `partial`, the number of bytes of a last record that is not whole.  `resolution` is the number of ticks per
    second of the coarsest time stamps, and `last` the last one.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name, self._file = name, file
        self.records = self.other = self.cut = self.filtered = self.partial = self.last = 0
        self.resolution = NANOSECONDS
        self._order, self._linktype = "<", EN10MB
        self._interfaces: list[tuple[int, int, int]] = []    # of a pcapng file, see _interface

    def __iter__(self) -> Iterator[Block]:
        data, base = self._read(PCAP_HEADER), 0
        if data[:2] == b"\x1f\x8b":
            raise self._error("compressed: gunzip it first")
        if len(data) < PCAP_HEADER:
            raise self._error(f"too short for a capture file (it ends at byte {len(data)})")
        take = self._blocks
        if data[:4] != b"\n\r\r\n":
            self._header(data)
            data, base, take = b"", PCAP_HEADER, self._records
        while more := self._read(CHUNK):
            data += more
            block: Block = [], array("q"), {}
            used = take(data, base, block)
            self.last = max((self.last, *block[1][-1:]))
            yield block
            data, base = data[used:], base + used
        self.partial = len(data)

    def _error(self, what: str) -> CaptureError:
        return CaptureError(f"{self.name}: {what}")

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            raise self._error(f"can't read it: {error.strerror}") from error

    def _header(self, data: bytes) -> None:
        """Reads the header of a pcap file."""
        for self._order in "<>":
            magic, linktype = unpack_from(self._order + "I16xI", data)
            if magic in (0xA1B2C3D4, 0xA1B23C4D):
                break
        else:
            raise self._error(f"not a capture file (byte 0: {data[:4].hex()})")
        self._linktype = linktype & 0xFFFF
        if self._linktype not in LINK_HEADERS:
            raise self._error(f"link type {self._linktype} is not supported (byte 20)")
        self.resolution = NANOSECONDS if magic == 0xA1B23C4D else 1_000_000

    def _records(self, data: bytes, base: int, block: Block) -> int:
        """Adds the packets of the whole records at the start of the data; returns how many bytes those have."""
        header, unit = Struct(self._order + "4I").unpack_from, NANOSECONDS // self.resolution
        at, last = self._uniform(data, block), len(data)
        while at + RECORD_HEADER <= last:
            seconds, fraction, size, length = header(data, at)
            frame = at + RECORD_HEADER
            if frame + size > last:
                if size > LARGEST_RECORD:
                    raise self._error(f"impossible record length {size} at byte {base + at + 8}")
                break
            at = frame + size
            self._add(data[frame:at], length, self._linktype, seconds * NANOSECONDS + fraction * unit, block)
        return at

    def _uniform(self, data: bytes, block: Block) -> int:
        """The same if all records are alike, else 0."""
        stride: int = RECORD_HEADER + unpack_from(self._order + "I", data.ljust(12), 8)[0]
        number, first = len(data) // stride, data[RECORD_HEADER:stride]
        if (self._linktype != EN10MB or first[12:15] != IPV4_IN_ETHERNET or len(first) < UNIFORM_SIZE
                or first[23] != TCP or not _plain(first)):
            return 0
        end = number * stride
        for at in UNIFORM_COLUMNS if first[46] == 0x50 else (*UNIFORM_COLUMNS, 63):      # with options: TCP's flags
            if data[at:end:stride].count(data[at]) != number:
                return 0
        add_identity, add_time, unit = block[0].append, block[1].append, NANOSECONDS // self.resolution
        records = Struct(f"{self._order}{UNIFORM_RECORD}{stride - RECORD_HEADER - 48}x").iter_unpack(data[:end])
        for seconds, fraction, length_id, rest in records:
            add_identity(b"\4\6" + length_id + rest)
            add_time(seconds * NANOSECONDS + fraction * unit)
        self.records += number
        return end

    def _add(self, frame: bytes, length: int, linktype: int, when: int, block: Block) -> None:
        """Counts a record, of a frame that was `length` bytes long, and adds its packet to the block."""
        self.records += 1
        try:
            packets = identify(frame, linktype)
        except TOO_SHORT:
            if len(frame) < length:
                self.cut += 1
                return
            packets = []                             # malformed: whole, yet shorter than its headers say
        if not packets:
            self.other += 1
            return
        if len(packets) > 1:
            block[2][len(block[0])] = packets[:-1]
        block[0].append(packets[-1])
        block[1].append(when)

    def _blocks(self, data: bytes, base: int, block: Block) -> int:
        """The same as _records for the blocks of a pcapng file."""
        at = 0
        while at + 12 <= len(data):
            kind, = unpack_from(self._order + "I", data, at)
            if kind == 0x0A0D0D0A:                   # a new section: its byte order, and interfaces of its own
                self._order = {b"\x4d\x3c\x2b\x1a": "<", b"\x1a\x2b\x3c\x4d": ">"}.get(data[at + 8:at + 12], "")
                if not self._order:
                    raise self._error(f"damaged section header at byte {base + at}")
                self._interfaces = []
            size, = unpack_from(self._order + "I", data, at + 4)
            if size < 12 or size % 4 or size > LARGEST_BLOCK:
                raise self._error(f"impossible block length {size} at byte {base + at + 4}")
            if at + size > len(data):
                break
            if kind == 1:
                self._interfaces.append(self._interface(data[at + 8:at + size - 4]))
            elif kind in (2, 6) and size >= 32:      # (obsolete) packet block, enhanced packet block
                fields = self._order + ("Hxx4I" if kind == 2 else "5I")
                number, high, low, kept, length = unpack_from(fields, data, at + 8)
                if number >= len(self._interfaces) or kept > size - 32:
                    raise self._error(f"damaged packet block at byte {base + at}")
                linktype, per_second, offset = self._interfaces[number]
                when = (high << 32 | low) * NANOSECONDS // per_second + offset * NANOSECONDS
                if not 0 <= when < NANOSECONDS << 32:
                    raise self._error(f"impossible time stamp at byte {base + at + 12}")
                self.resolution = min(self.resolution, per_second)
                self._add(data[at + 28:at + 28 + kept], length, linktype, when, block)
            elif kind == 3:                          # a simple packet block has no time
                self.records += 1
                self.other += 1
            at += size
        return at

    def _interface(self, body: bytes) -> tuple[int, int, int]:
        """(link type, ticks per second, seconds to add) of an interface description block."""
        linktype, at = int.from_bytes(body[:2], "little" if self._order == "<" else "big"), 8
        per_second, offset = 1_000_000, 0            # type: Any, int
        while at + 4 <= len(body):
            code, size = unpack_from(self._order + "HH", body, at)
            value = body[at + 4:at + 4 + size]
            if code == 9 and value:                  # if_tsresol
                per_second = 2 ** (value[0] & 127) if value[0] & 128 else 10 ** value[0]
            elif code == 14 and len(value) == 8:     # if_tsoffset
                offset, = unpack_from(self._order + "q", value)
            elif not code:
                break
            at += 4 + (size + 3 & ~3)
        return linktype, per_second, offset


class TextCapture:
    """The packets in a text capture, one a line: identities and times of all of them, in order.

    The identity is column `seq_no_col` (from 0, columns are separated by white space), of which part
    `seq_no_split_index` counts after a split by `seq_no_split_by` (None or "": the whole column).  The time is column
    `timestamp_col`: HH:MM:SS[.fraction], after a date YYYY-MM-DD in the column before it if there is one, or seconds
    since the epoch.  Without a date a step back by more than half a day is a new day; `dated` says that there is none
    of these times.  Lines without these columns are counted in `skipped`.
    """

    def __init__(self, lines: Iterable[str], seq_no_col: int, timestamp_col: int, seq_no_split_by: str | None = None,
                 seq_no_split_index: int = 0) -> None:
        self.identities: list[bytes] = []
        self.times: array[int] = array("q")
        self.skipped, self.dated = 0, False
        days = last = 0
        for columns in filter(None, map(str.split, lines)):
            try:
                key = columns[seq_no_col]
                if seq_no_split_by:
                    key = key.split(seq_no_split_by)[seq_no_split_index]
                when, dated = _text_time(columns[timestamp_col], columns[timestamp_col - 1] if timestamp_col else "")
            except (IndexError, ValueError):
                self.skipped += 1
                continue
            if not dated:
                days += last - when > DAY // 2
                last = when
                when += days * DAY
            self.dated |= dated
            self.identities.append(bytes((TEXT,)) + key.encode(errors="replace"))
            self.times.append(when)


def _text_time(text: str, before: str) -> tuple[int, bool]:
    """Nanoseconds of a time (since the epoch, or midnight), and whether a date is known; ValueError if it is none."""
    parts = re.fullmatch(r"(?:(\d\d?):(\d\d):)?(\d{1,10})(?:[.,](\d{1,9}))?", text, re.ASCII)
    if not parts:
        raise ValueError(text)
    hours, minutes, seconds = int(parts[1] or 0), int(parts[2] or 0), int(parts[3])
    when = ((hours * 60 + minutes) * 60 + seconds) * NANOSECONDS + int((parts[4] or "").ljust(9, "0"))
    if not parts[1] or not re.fullmatch(r"\d{4}-\d\d-\d\d", before, re.ASCII):
        return when, not parts[1]
    import datetime
    return when + (datetime.date.fromisoformat(before) - datetime.date(1970, 1, 1)).days * DAY, True


# ---- Captures: which packets count, and in which direction they go -------------------------------------------

Direction = namedtuple("Direction", "name first second")     # from which point packets go to which
IN, OUT = Direction("in", "pif", "vif"), Direction("out", "vif", "pif")
DIRECTIONS = {"in": (IN,), "out": (OUT,), "both": (IN, OUT)}


class Selection:
    """Which packets count, and in which direction they go, by their addresses.

    What goes from one of the sources (none: from anywhere) to one of the destinations goes IN, and the opposite OUT.
    Without any address all packets count, as those of the first of the directions.  `translated` says that addresses
    are translated on the way, so that they are no part of what is the same at both points.  `probes` are a protocol and
    a port (None: any), if nothing else counts.
    """

    def __init__(self, directions: Sequence[Direction] = (IN,), sources: Iterable[str] = (),
                 destinations: Iterable[str] = (), translated: bool = False,
                 probes: tuple[int, int | None] | None = None) -> None:
        self.directions, self.translated, self._probes = directions, translated, probes
        self._ends = frozenset(map(_packed, sources)), frozenset(map(_packed, destinations))
        self.everything = not any(self._ends) and not translated and not probes

    def is_probe(self, packet: bytes) -> bool:
        """Whether a packet counts, by its protocol and ports."""
        if not self._probes:
            return True
        protocol, port = self._probes
        ports = () if port is None or packet[0] & NOT_FIRST else unpack_from(">HH", _transport_of(packet))
        return packet[1] in ((ICMP, ICMPV6) if protocol == ICMP else (protocol,)) and (port is None or port in ports)

    def direction(self, flow: bytes) -> Direction | None:
        """The direction of a packet by its source and destination as they stand in it; None if it doesn't count."""
        addresses = flow[:len(flow) // 2], flow[len(flow) // 2:]
        for direction in self.directions:
            ends = self._ends[::-1] if direction is OUT else self._ends
            if all(not end or address in end for address, end in zip(addresses, ends)):
                return direction
        return None


def _packed(address: str) -> bytes:
    """An IP address as it stands in a packet."""
    from ipaddress import ip_address
    return ip_address(address).packed


class Traffic:
    """The packets of one direction: each has a number, and at each point there are numbers and times, in order.

    `numbers` are by what is the same of a packet at both points, `identities` by number.
    """

    def __init__(self, direction: Direction) -> None:
        self.direction = direction
        self.numbers: defaultdict[bytes, int] = defaultdict(count().__next__)
        self.seen = {point: (array("I"), array("q")) for point in (direction.first, direction.second)}
        self._originals: list[bytes] = []            # identities, where they are not what is the same

    def add(self, point: str, keys: Iterable[bytes], times: Iterable[int], originals: Iterable[bytes] = ()) -> None:
        """Adds what was seen at a point; `originals` are the identities, if the keys are not."""
        numbers, stamps = self.seen[point]
        old = len(numbers)
        stamps.extend(times)
        numbers.extend(map(self.numbers.__getitem__, keys))
        for identity, number in zip(originals, islice(numbers, old, None)):
            if number == len(self._originals):
                self._originals.append(identity)

    @property
    def identities(self) -> list[bytes]:
        return self._originals or list(self.numbers)

    def sort(self, point: str) -> None:
        """Brings what several captures saw at a point (the slaves of a bond) into the order of time."""
        numbers, times = self.seen[point]
        order = sorted(range(len(times)), key=times.__getitem__)
        self.seen[point] = array("I", map(numbers.__getitem__, order)), array("q", map(times.__getitem__, order))

    def coarsen(self, point: str, resolution: int) -> None:
        """Brings the times at a point to so many ticks a second."""
        numbers, times = self.seen[point]
        ticks = (when * resolution // NANOSECONDS for when in times)
        self.seen[point] = numbers, array("q", (tick * NANOSECONDS // resolution for tick in ticks))


def read(captures: Mapping[str, Sequence[Capture]], selection: Selection) -> list[Traffic]:
    """The traffic of each direction, in one pass over the captures of each point (pif and vif).

    If a point has coarser time stamps than the other, both get its resolution: no delay must be negative by rounding.
    """
    traffic = [Traffic(direction) for direction in selection.directions]
    for point, files in captures.items():
        for capture in files:
            for block in capture:
                if selection.everything:
                    traffic[0].add(point, *block[:2])
                else:
                    capture.filtered += _select(block, selection, traffic, point)
        for each in traffic if len(files) > 1 else ():
            each.sort(point)
    finest = {point: max(capture.resolution for capture in files) for point, files in captures.items()}
    coarsest = min(capture.resolution for files in captures.values() for capture in files)
    for point in captures:
        for each in traffic if finest[point] > coarsest else ():
            each.coarsen(point, coarsest)
    return traffic


def _select(block: Block, selection: Selection, traffic: Sequence[Traffic], point: str) -> int:
    """Adds what counts of a block, of each frame the innermost packet that does; returns how many frames don't."""
    chosen: dict[Direction | None, list[tuple[int, bytes]]] = {each.direction: [] for each in traffic}
    known: dict[bytes, Direction | None] = {}
    left_out = 0
    for place, identity in enumerate(block[0]):
        direction = None
        for packet in (identity, *reversed(block[2].get(place, ()))):
            flow = addresses_of(packet)
            if flow not in known:
                known[flow] = selection.direction(flow)
            direction = known[flow] if selection.is_probe(packet) else None
            if direction:
                chosen[direction].append((block[1][place], packet))
                break
        left_out += direction is None
    for each in traffic:
        times, packets = zip(*chosen[each.direction]) if chosen[each.direction] else ((), ())
        if selection.translated:
            each.add(point, (packet[:ADDRESSES] + _transport_of(packet) for packet in packets), times, packets)
        else:
            each.add(point, packets, times)
    return left_out


# ---- Analysis: who was seen at both points -------------------------------------------------------------------
# RFC 7679 and its kin speak of a packet's one-way delay between two points.  A lost packet has no delay.  All times and
# delays are integer nanoseconds.

NO_DELAY = -1 << 63
OUTSIDE, MATCHED, AMBIGUOUS, LOST, UNDECIDED = range(5)      # the classes of packets
STRANGER, REPEATED = -1, -2                          # in the place of a rank
LONGEST_WAIT = NANOSECONDS                           # a longer delay, in one host, decides nothing about other packets


class Window(namedtuple("Window", "start end watched_until wait", defaults=(NO_DELAY, -NO_DELAY, -NO_DELAY, 0))):
    """The time that counts, by the clock of the captures.

    All captures ran from `start` on; the traffic ended at `end`; what passed until `watched_until` is certainly in the
    captures.  `wait` is for how long the user wanted to wait for a packet.
    """


ALWAYS = Window()


class Matching:
    """Which packets that passed one point were seen at a second one, and when.

    By the packet's rank in the order of the first point: `sent`, the time there, and `delays`, NO_DELAY for those that
    have none.  `arrivals` are the ranks of those that have one in the order of the second point, and `extra_copies`
    says how often they came once more.  Of packets that share their identity it isn't known which is which, unless
    one was sent or none is missing: else they are in `unclear`, by identity, as the ranks of those that may count, and
    the numbers of matched and of duplicated ones.  `strangers` and `stranger_times` are what was never seen at the
    first point.
    """

    def __init__(self, traffic: Traffic) -> None:
        self.direction, self.identities = traffic.direction, traffic.identities
        self.numbers, self.sent = traffic.seen[traffic.direction.first]
        self.delays = array("q", (NO_DELAY,)) * len(self.sent)
        self.arrivals, self.stranger_times = array("I"), array("q")
        self.extra_copies: defaultdict[int, int] = defaultdict(int)
        self.unclear: list[tuple[list[int], int, int]] = []
        self.strangers: list[bytes] = []

    def identity(self, rank: int) -> bytes:
        return self.identities[self.numbers[rank]]


def match(traffic: Traffic, window: Window = ALWAYS) -> Matching:
    """Finds the packets of the first point among those of the second."""
    matching = Matching(traffic)
    sent, delays = matching.sent, matching.delays
    numbers, times = traffic.seen[matching.direction.second]
    rank_of = array("i", (STRANGER,)) * len(matching.identities)         # by number
    repeated: dict[int, list[int]] = {}              # the ranks of packets that were sent several times, by number
    for rank, number in enumerate(matching.numbers):
        if rank_of[number] == STRANGER:
            rank_of[number] = rank
        else:
            repeated.setdefault(number, [rank_of[number]]).append(rank)
    places: dict[int, list[int]] = {number: [] for number in repeated}
    for place, number in enumerate(numbers) if repeated else ():
        if number in places:
            places[number].append(place)
    partners: dict[int, int] = {}                    # ranks, by the place at the second point
    for number, ranks in repeated.items():
        rank_of[number] = REPEATED
        partners.update(_pair_copies(matching, ranks, places[number], times, window))
    arrive = matching.arrivals.append
    for place, rank in enumerate(map(rank_of.__getitem__, numbers)):
        if rank == REPEATED:
            rank = partners.get(place, REPEATED)
        if rank >= 0 and delays[rank] == NO_DELAY:
            delays[rank] = times[place] - sent[rank]
            arrive(rank)
        elif rank == STRANGER:
            matching.strangers.append(matching.identities[numbers[place]])
            matching.stranger_times.append(times[place])
        elif rank >= 0:
            matching.extra_copies[rank] += 1
    return matching


def _pair_copies(matching: Matching, ranks: list[int], places: list[int], times: Sequence[int],
                 window: Window) -> dict[int, int]:
    """The ranks of packets of one identity, by their places at the second point; empty, and noted, if that is unclear.

    Only what was sent from the window's start on counts, since one capture may have begun before the other.  What
    arrived then may still have been sent before: the first ones, and only if so many can have been on their way.  When
    the last ones were sent, the second point must have been watched for long enough.
    """
    sent, start = matching.sent, window.start
    counting = [rank for rank in ranks if sent[rank] >= start]
    arrived = [place for place in places if times[place] >= start]
    early, earlier = len(arrived) - len(counting), len(ranks) - len(counting)
    if not counting or not arrived:
        return {}
    if 0 <= early <= earlier:
        pairs = dict(zip(arrived[early:], counting))
        longest = max(times[place] - sent[rank] for place, rank in pairs.items())
        in_flight = sum(start - longest <= sent[rank] < start for rank in ranks)
        if early == in_flight and sent[counting[-1]] + longest <= window.watched_until:
            return pairs
    matching.unclear.append((counting, min(len(counting), len(arrived)), max(0, early - earlier)))
    return {}


class Result(namedtuple("Result", "matching classes delays first second matched ambiguous lost undecided duplicated "
                                  "second_only stages", defaults=({},))):
    """The packets of a matching that count: how many there are of each class, and by rank the classes and delays.

    `first` and `second` are how many passed each point.  `matched` are ambiguous ones, too: those are counted, but have
    neither a delay nor a place in the order.  `stages` are those of `account`, if the kernel's trace is known.
    """

    def samples(self) -> list[int]:
        """The delays, in the order of the first point."""
        return [delay for delay in self.delays if delay != NO_DELAY]

    def arrivals(self) -> Sequence[int]:
        """The ranks of the packets with a delay, in the order of the second point."""
        ranks: array[int] = self.matching.arrivals
        return [rank for rank in ranks if self.classes[rank] == MATCHED] if OUTSIDE in self.classes else ranks

    def ranks(self, *classes: int) -> list[int]:
        """Those of the packets of these classes, in order."""
        return [rank for rank, kind in enumerate(self.classes) if kind in classes]

    def outcomes(self) -> Sequence[int]:
        """The delays in the order of the first point, NO_DELAY for lost packets."""
        return array("q", map(self.delays.__getitem__, self.ranks(MATCHED, LOST)))


def classify(matching: Matching, window: Window = ALWAYS) -> Result:
    """Says which packets count.

    What passed the first point before the start is outside.  What isn't at the second is lost, or undecided if it was
    watched for less time than the longest delay, but at most LONGEST_WAIT or what the user wanted; if it passed after
    the traffic's end, it is outside then.  What only the second saw counts if it must have passed the first meanwhile.
    """
    sent, delays = matching.sent, matching.delays
    if min(sent, default=window.start) < window.start:
        delays = array("q", (NO_DELAY if when < window.start else delay for when, delay in zip(sent, delays)))
    longest = max(0, min(max(delays, default=0), max(LONGEST_WAIT, window.wait)))
    decided = window.watched_until - longest

    def fate(rank: int) -> int:
        """The class of a packet that isn't at the second point."""
        if sent[rank] < window.start or (sent[rank] > decided and sent[rank] > window.end):
            return OUTSIDE
        return UNDECIDED if sent[rank] > decided else LOST

    classes = bytearray((MATCHED,)) * len(sent)
    for rank, delay in enumerate(delays):
        if delay == NO_DELAY:
            classes[rank] = fate(rank)
    ambiguous = lost = undecided = duplicated = 0
    for ranks, matched, more in matching.unclear:
        missing = sorted(map(fate, ranks), key=(OUTSIDE, UNDECIDED, LOST).index)[:len(ranks) - matched]
        ambiguous, lost = ambiguous + matched, lost + missing.count(LOST)
        undecided, duplicated = undecided + missing.count(UNDECIDED), duplicated + more
        for rank in ranks:
            classes[rank] = AMBIGUOUS
    duplicated += sum(more for rank, more in matching.extra_copies.items() if classes[rank] == MATCHED)
    second_only = sum(window.start + longest <= when <= window.watched_until for when in matching.stranger_times)
    matched, lost = classes.count(MATCHED) + ambiguous, classes.count(LOST) + lost
    undecided += classes.count(UNDECIDED)
    return Result(matching, classes, delays, matched + lost + undecided, matched + duplicated + second_only, matched,
                  ambiguous, lost, undecided, duplicated, second_only)


# ---- Analysis: figures ---------------------------------------------------------------------------------------

def statistics(delays: Iterable[int]) -> dict[str, Any]:
    """Average, extremes, population standard deviation and percentiles of delays, exact until the last rounding.

    Takes integer nanoseconds, at least one, and returns microseconds with three decimals; `negative` and `zero` are
    numbers of delays.
    """
    ranked = sorted(delays)
    size, total = len(ranked), sum(ranked)
    squares, negative = sum(map(mul, ranked, ranked)), bisect_left(ranked, 0)
    median, *tail = (percentile(ranked, permille) for permille in (500, 900, 950, 990, 999))
    return {
        "average": microseconds(total / size),
        "minimum": microseconds(ranked[0]),
        "maximum": microseconds(ranked[-1]),
        "stdev": microseconds((size * squares - total * total) ** 0.5 / size),
        "median": microseconds(median),
        "percentiles": dict(zip(("90", "95", "99", "99.9"), map(microseconds, tail))),
        "pdv": microseconds(tail[2] - ranked[0]),
        "negative": negative,
        "zero": bisect(ranked, 0) - negative,
    }


def microseconds(nanoseconds: float) -> float:
    """The same to a whole nanosecond, since no stamp knows more."""
    return round(nanoseconds) / 1000


def percentile(ranked: Sequence[int], permille: int) -> float:
    """That of sorted values, linear between the two nearest ranks."""
    low, part = divmod(permille * (len(ranked) - 1), 1000)
    high = min(low + 1, len(ranked) - 1)
    return (ranked[low] * 1000 + (ranked[high] - ranked[low]) * part) / 1000


def variation(delays: Sequence[int]) -> float | None:
    """The mean absolute IPDV (RFC 3393, ns): between consecutive packets that both have a delay; None if none do."""
    steps = [abs(after - before) for before, after in zip(delays, islice(delays, 1, None))
             if before != NO_DELAY and after != NO_DELAY]
    return sum(steps) / len(steps) if steps else None


def reordering(result: Result) -> dict[int, int]:
    """The reordered packets (RFC 4737: type-P-reordered), by rank, with the extent of each.

    Only packets of the same stream, from one address to another, overtake each other.
    """
    arrivals = result.arrivals()
    if all(map(le, arrivals, islice(arrivals, 1, None))):
        return {}
    streams: defaultdict[bytes, array[int]] = defaultdict(lambda: array("I"))
    for rank in arrivals:
        streams[addresses_of(result.matching.identity(rank))].append(rank)
    extents = {}
    for ranks in streams.values():
        peaks, places = [-1], [-1]                   # the newest packets so far, and where they arrived
        for place, rank in enumerate(ranks):
            if rank > peaks[-1]:
                peaks.append(rank)
                places.append(place)
            else:                                    # back to the earliest arrival that was sent later
                extents[rank] = place - places[bisect(peaks, rank)]
    return extents


def by_flow(result: Result) -> tuple[int, list[int], list[int]]:
    """How many flows there are, and the delays of their first and of their later packets, in order of size.

    A switch or a firewall may know a flow only from its first packet on, which takes the slow path.  In text there are
    none.
    """
    matching, delays = result.matching, result.delays
    kinds = set(map(itemgetter(slice(0, 2)), matching.identities))
    alike = len(kinds) == 1 and kinds < {b"\4\6", b"\4\x11"}           # TCP, or UDP, in IPv4
    key = itemgetter(slice(ADDRESSES, ADDRESSES + 12)) if alike else flow_of
    latest_first = map(key, map(matching.identities.__getitem__, reversed(matching.numbers)))
    first = set() if matching.identity(0)[0] == TEXT else set(
        dict(zip(latest_first, range(len(matching.numbers) - 1, -1, -1))).values())
    later = sorted(delay for rank, delay in enumerate(delays) if delay != NO_DELAY and rank not in first)
    return len(first), sorted(delays[rank] for rank in first if delays[rank] != NO_DELAY), later


def _tcp(identity: bytes) -> tuple[bytes, bytes]:
    """Of a TCP segment's identity the addresses, and from the ports to the flags; both empty for other packets."""
    if identity[0] not in (4, 6) or identity[1] != TCP:
        return b"", b""
    return addresses_of(identity), _transport_of(identity)


def resized(result: Result) -> int:
    """How many of the packets that only the second point saw are one lost from the first, but for their length.

    Segments were merged (GRO) or split (TSO) on the way, which may also alter PSH, FIN and CWR.
    """
    def unsized(identity: bytes) -> bytes:
        flow, header = _tcp(identity)
        return (flow and identity[:2] + identity[4:6] + flow + header[:13]
                + bytes((header[13] & ~(PSH | FIN | CWR),)) + header[14:])

    matching = result.matching
    lost = {unsized(matching.identity(rank)) for rank in result.ranks(LOST)} - {b""}
    return sum(unsized(identity) in lost for identity in matching.strangers) if lost else 0


def closing_resets(result: Result) -> int:
    """How many of the packets that count are RSTs with which a source's kernel answers the answers to its SYNs."""
    opened: set[bytes] = set()                       # by addresses and ports
    resets = 0
    for rank in result.ranks(MATCHED, AMBIGUOUS, LOST, UNDECIDED):
        flow, header = _tcp(result.matching.identity(rank))
        flags = header[13] & (FIN | SYN | RST | ACK) if flow else 0
        if flags == SYN:
            opened.add(flow + header[:4])
        resets += flags == RST and flow + header[:4] in opened
    return resets


def guest_times(inbound: Result, outbound: Matching) -> tuple[dict[int, int], dict[str, int]]:
    """How long the VM took, by rank, from a probe's arrival at its interface to the answer's departure from there (ns).

    A probe is a TCP SYN, answered by acknowledgment number, or an ICMP echo request, answered by identifier and
    sequence number.  Also counts the probes: `answered`, `unanswered`, and `ambiguous`: sent several times, so that
    their answers can't be told apart.
    """
    matching = inbound.matching
    probes: defaultdict[bytes, list[int]] = defaultdict(list)        # their ranks, by what an answer may have
    for rank in inbound.ranks(MATCHED, AMBIGUOUS):
        for key in _exchange(matching.identity(rank))[0]:
            probes[key].append(rank)
    asked = {rank for ranks in probes.values() for rank in ranks}
    unclear = {rank for ranks in probes.values() for rank in ranks
               if len(ranks) > 1 or inbound.classes[rank] == AMBIGUOUS}
    times: dict[int, int] = {}
    for number, when in zip(outbound.numbers, outbound.sent):
        for rank in probes.get(_exchange(outbound.identities[number])[1], ()):
            took = when - matching.sent[rank] - inbound.delays[rank]
            if rank not in unclear and took >= 0:
                times.setdefault(rank, took)
    return times, {"answered": len(times), "unanswered": len(asked) - len(unclear) - len(times),
                   "ambiguous": len(unclear)}


def _exchange(identity: bytes) -> tuple[list[bytes], bytes]:
    """What tells that two packets are probe and answer: what the answer to a probe may have, and what an answer has."""
    flow, rest = addresses_of(identity), _transport_of(identity)
    back = flow[len(flow) // 2:] + flow[:len(flow) // 2]
    kind = identity[1], rest[:1]
    if _tcp(identity)[0]:
        flags, sequence = rest[13] & (FIN | SYN | RST | ACK), int.from_bytes(rest[4:8], "big")
        if flags == SYN:                             # its data may be acknowledged, or not
            data = max(0, _u16(identity, 2) - (20 if identity[0] == 4 else 0) - (rest[12] >> 4) * 4)
            numbers = ((sequence + 1 + more) % (1 << 32) for more in {0, data})
            return [back + rest[2:4] + rest[:2] + number.to_bytes(4, "big") for number in numbers], b""
        if flags & (RST | ACK) and flags & (SYN | RST):
            return [], flow + rest[:4] + rest[8:12]
    elif identity[0] in (4, 6) and kind in ((ICMP, b"\x08"), (ICMPV6, b"\x80")):
        return [back + rest[2:6]], b""
    elif identity[0] in (4, 6) and kind in ((ICMP, b"\0"), (ICMPV6, b"\x81")):
        return [], flow + rest[2:6]
    return [], b""


# ---- Analysis: the kernel's own account of the way -----------------------------------------------------------
# A trace of the hypervisor's kernel (TRACING, below) tells when its stack received a packet at the first interface,
# when it reached the second one's queue and its driver, and where it was freed.  The captures say which packet that
# was: an event belongs to a sighting by time and length, and the address of the packet's sk_buff (skb) only confirms
# it, since a switch may copy the packet into another one.

STAGES = ("before_stack", "forwarding", "queueing", "to_guest")
PAGE, LOST_BEFORE, LOST_NUMBER = 4096, 1 << 31, 1 << 30      # of the ring buffer; flags of a page
SOONEST, LATEST, LATEST_OF_SKB = -200, 10_000_000, NANOSECONDS       # of an event after its stamp (ns)
NEAREST = 50                                         # events after a stamp, of which one may be its own
# Where netback frees what it gave to the guest.
DELIVERED = ("xenvif_rx_copy", "xenvif_rx_action", "xenvif_rx_skb", "xenvif_rx_next")

# `name` is the event's, `device` the interface's; `end` is where a packet was freed and why (None before Linux 5.17).
Event = namedtuple("Event", "when name device skb size end")


class Passage:
    """What happened to one packet, by the trace; times are 0 where it doesn't tell."""
    __slots__ = ("end", "freed", "queued", "received", "received_size", "sent", "sent_size")

    def __init__(self, received: int = 0, size: int = 0) -> None:
        self.received, self.received_size = received, size
        self.queued = self.sent = self.sent_size = self.freed = 0
        self.end: tuple[str, int, str | None] = "", 0, None


def trace_formats(text: str) -> dict[int, tuple[str, dict[str, int], dict[int, str]]]:
    """Name, offsets of fields and names of reasons by an event's number, from the kernel's `format` files."""
    formats = {}
    for block in text.split("name: ")[1:]:
        number = re.search(r"^ID: (\d{1,5})$", block, re.MULTILINE)
        fields = re.findall(r"\tfield:[^;]*?(\w+)(?:\[\w*\])?;\toffset:(\d{1,5});", block)
        reasons = re.findall(r'\{ (\d{1,5}), "(\w+)" \}', block)
        if number:
            formats[int(number[1])] = (block.split("\n", 1)[0].strip(), {name: int(at) for name, at in fields},
                                       {int(code): name for code, name in reasons})
    return formats


def trace_records(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Time (ns), begin and end of each record in the ring buffer's pages; where some are lost, how many, 0 and 0."""
    for base in range(0, len(data) - 15, PAGE):
        when, commit = unpack_from("<QQ", data, base)
        place, end = base + 16, min(base + 16 + (commit & 0xFFFFF), base + PAGE, len(data))
        if commit & LOST_BEFORE:
            known = commit & LOST_NUMBER and end + 8 <= len(data)
            yield (unpack_from("<Q", data, end)[0] if known else 1), 0, 0
        while place + 8 <= end:
            head, word = unpack_from("<II", data, place)
            kind, delta = head & 31, head >> 5
            if kind == 29 and not delta:             # nothing more on this page
                break
            if kind == 31:                           # a whole time, but for its highest bits
                when = when >> 59 << 59 | word << 27 | delta
            else:
                when += delta + (word << 27 if kind == 30 else 0)
            size = {0: 4 + word, 29: 4 + word, 30: 8, 31: 8}.get(kind, 4 + 4 * kind)
            if kind < 29 and place + size <= end:
                yield when, place + (4 if kind else 8), place + size
            place += size


def trace_events(data: bytes, formats: Mapping[int, tuple[str, dict[str, int], dict[int, str]]], offset: int,
                 lost: list[int]) -> Iterator[Event]:
    """The events on one processor, in order, an offset later; what is lost is added to `lost`."""
    for when, at, end in trace_records(data):
        if not end:
            lost.append(when)
            continue
        try:
            name, fields, reasons = formats[unpack_from("<H", data, at)[0]]
            skb, device, size = unpack_from("<Q", data, at + fields["skbaddr"])[0], "", 0
            freed: tuple[str, int, str | None] = "", 0, None
            if "name" in fields:
                where, = unpack_from("<I", data, at + fields["name"])
                start = at + (where & 0xFFFF)
                device = data[start:min(start + (where >> 16), end)].split(b"\0")[0].decode(errors="replace")
                size, = unpack_from("<I", data, at + fields["len"])
            elif name in ("kfree_skb", "consume_skb"):
                location = unpack_from("<Q", data, at + fields["location"])[0] if "location" in fields else 0
                code = unpack_from("<I", data, at + fields["reason"])[0] if "reason" in fields else -1
                freed = name, location, reasons.get(code)
            yield Event(when + offset, name, device, skb, size, freed)
        except (KeyError, *TOO_SHORT):               # an event of another kind, or a damaged one
            continue


def passages(events: Iterable[Event], vif: str, direction: Direction) -> list[Passage]:
    """What happened to packets on their way, by events in order of time; all other interfaces are physical ones."""
    under_way: dict[int, Passage] = {}               # by skb
    found: list[Passage] = []

    def begin(skb: int, passage: Passage) -> Passage:
        under_way[skb] = passage
        found.append(passage)
        return passage

    for when, name, device, skb, size, end in events:
        passage, at_second = under_way.get(skb), (device == vif) == (direction is IN)
        if name == "netif_receive_skb":
            under_way.pop(skb, None)
            if not at_second:
                begin(skb, Passage(when, size))
        elif name == "net_dev_queue" and at_second:
            if passage is None or passage.queued:
                passage = begin(skb, Passage())
            passage.queued = when
        elif name == "net_dev_start_xmit" and at_second and passage and not passage.sent:
            passage.sent, passage.sent_size = when, size
        elif end[0] and passage:
            passage.freed, passage.end = when, end
            del under_way[skb]
    return found


def attach(result: Result, found: Sequence[Passage]) -> tuple[dict[int, Passage], dict[int, Passage]]:
    """The passages of packets, by rank, on the side of the first point and on that of the second.

    The second point's tap is just before the driver: an event is of the last sighting before it.  At the first one a
    batch may be stamped before all of it is received: the event is the first one after the sighting.
    """
    matching, sent, delays = result.matching, result.matching.sent, result.delays

    def fits(rank: int, size: int, header: int) -> bool:
        """Whether that may be the length of a packet with so many bytes before it, a tag or padding included."""
        identity = matching.identity(rank)
        length = _u16(identity, 2) + (40 if identity[0] & 15 == 6 else 0) + header
        padded = max(length, 46 + header)
        return size in (length, length + 4, padded, padded + 4)

    arrivals = sorted(result.arrivals(), key=lambda rank: sent[rank] + delays[rank])
    times = [sent[rank] + delays[rank] for rank in arrivals]
    behind: dict[int, Passage] = {}
    for passage in sorted((passage for passage in found if passage.sent), key=lambda passage: passage.sent):
        place = bisect(times, passage.sent - SOONEST) - 1
        if place >= 0 and passage.sent - times[place] < LATEST and fits(arrivals[place], passage.sent_size, 14):
            behind.setdefault(arrivals[place], passage)
    before = {rank: passage for rank, passage in behind.items()
              if passage.received and SOONEST <= passage.received - sent[rank] < LATEST_OF_SKB}
    used = set(map(id, before.values()))
    marks = sorted((passage for passage in found if passage.received and id(passage) not in used),
                   key=lambda passage: passage.received)
    starts, place = [passage.received for passage in marks], 0
    for rank in result.ranks(MATCHED, LOST):
        if rank in before:
            continue
        place = max(place, bisect_left(starts, sent[rank] + SOONEST))
        while place < len(marks) and id(marks[place]) in used:
            place += 1
        for mark in marks[place:min(place + NEAREST, bisect_left(starts, sent[rank] + LATEST))]:
            if id(mark) not in used and fits(rank, mark.received_size, 0):
                used.add(id(mark))
                before[rank] = mark
                break
    return before, behind


def account(result: Result, found: Sequence[Passage], symbols: Mapping[int, str],
            backend: str) -> tuple[dict[int, tuple[int, ...]], dict[str, Any]]:
    """The times (ns) of each packet in STAGES, by rank, as far as they are known; and the report's account.

    That is what was lost where, and what became of packets behind the second point, if there is a `backend` that takes
    them (netback or tap).  `symbols` are the kernel's functions by address.
    """
    before, behind = attach(result, found)
    sent, delays, (_, first, second) = result.matching.sent, result.delays, result.matching.direction
    stages: dict[int, tuple[int, ...]] = {}
    errors: list[int] = []
    fates = {"delivered": 0, "dropped": 0, "stuck": 0}
    losses: defaultdict[tuple[str, str | None, str | None], int] = defaultdict(int)

    def lose(stage: str, passage: Passage) -> None:
        kind, location, reason = passage.end
        losses[stage, symbols.get(location, hex(location)) if kind else None, reason] += 1

    matched, lost = result.ranks(MATCHED), result.ranks(LOST)
    for rank in matched:
        one, other = before.get(rank), behind.get(rank)
        if not other:
            continue
        errors.append(other.sent - sent[rank] - delays[rank])
        freed, location, _ = other.end
        given = freed == "consume_skb" if backend == "tap" else symbols.get(location, "").startswith(DELIVERED)
        fates["delivered" if given else "dropped" if freed else "stuck"] += 1
        if backend and freed and not given:
            lose("to_guest", other)
        if one and other.queued:
            times = one.received - sent[rank], other.queued - one.received, other.sent - other.queued
            stages[rank] = (*times, other.freed - other.sent) if backend and given else times
    known = [before[rank] for rank in lost if rank in before]
    for passage in known:
        lose("to_guest" if passage.sent else "queueing" if passage.queued else "forwarding", passage)
    places = sorted(losses.items(), key=lambda item: -item[1])
    ahead = [times[0] for times in stages.values()]
    return stages, {
        "lost_at": [{"stage": stage, "where": where, "reason": reason, "packets": number}
                    for (stage, where, reason), number in places],
        "after_vif": fates if backend else None,
        "unattached": len(matched) + len(lost) - len(stages) - len(known),
        "stamp_error": {point: microseconds(percentile(sorted(values), 500)) if values else None
                        for point, values in ((first, ahead), (second, errors))}}


def _of_stage(values: Iterable[int]) -> dict[str, Any]:
    return {name: value for name, value in statistics(values).items() if name not in ("pdv", "negative", "zero")}


# ---- Analysis: comparing two measurements --------------------------------------------------------------------

MOST_BLOCKS, SHORTEST_BLOCK, FEWEST_BLOCKS = 25, 10, 5
FEWEST_RUNS = 3                                      # a side, for the runs themselves to be what is compared
CONFIDENCE = 0.99                                    # of the three intervals together (Bonferroni)
# Student's quantile for that, as a series in 1 / (degrees of freedom) (Abramowitz and Stegun, 26.7.5).
STUDENT = 2.935, 7.056, 15.65, 26.45, 32.61
ENOUGH_FOR_P99 = 500                                 # packets; of fewer hardly one is above it
# By so much equal runs may differ on a busy host, where there are too few to measure that: a share of the baseline, and
# at least so much (µs, but for the loss).
RUN_TO_RUN = {"median": (0.1, 1.0), "p99": (0.3, 5.0), "loss_ratio": (0.0, 0.0)}


def compare(baseline: Sequence[Sequence[int]], current: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The shift of median and 99th percentile (µs) and of the loss ratio from some runs, by their outcomes, to others.

    Each has Student's interval for the difference of two means (Welch): of FEWEST_RUNS runs or more, those of the runs'
    own figures, and `run_to_run` is their standard deviation.  Of fewer, those of blocks of successive packets, since
    neighbours are not independent; as such runs don't tell how much the next one would differ by itself, a shift is
    distinguishable only if it is also larger than RUN_TO_RUN.  With too few blocks, or packets for the 99th percentile,
    there is no interval and no verdict (None).
    """
    by_run = min(len(baseline), len(current)) >= FEWEST_RUNS
    sides = [[_figures(part) for run in runs for part in ([run] if by_run else _blocks(run))]
             for runs in (baseline, current)]
    wholes = [{} if by_run else _figures([outcome for run in runs for outcome in run]) for runs in (baseline, current)]
    enough = min(len(run) - run.count(NO_DELAY) for runs in (baseline, current) for run in runs) >= ENOUGH_FOR_P99
    comparison: dict[str, Any] = {}
    for name, (share, least) in RUN_TO_RUN.items():
        columns = [[figures[name] for figures in side if name in figures] for side in sides]
        before, after = (sum(column) / len(column) if by_run and column else whole.get(name, 0.0)
                         for column, whole in zip(columns, wholes))
        shift, usual = after - before, max(share * abs(before), least)
        interval = certain = None
        if min(map(len, columns)) >= (FEWEST_RUNS if by_run else FEWEST_BLOCKS) and (enough or name != "p99"):
            reach = _reach(*columns)
            interval, certain = [shift - reach, shift + reach], abs(shift) > (reach if by_run else max(reach, usual))
            usual = (sum(map(_variance, columns)) / 2) ** 0.5 if by_run else usual
        digits = 6 if name == "loss_ratio" else 3
        comparison[name] = {
            "baseline": round(before, digits), "current": round(after, digits), "shift": round(shift, digits),
            "interval": interval and [round(end, digits) for end in interval],
            "run_to_run": round(usual, digits), "distinguishable": certain}
    verdicts = [figure["distinguishable"] for figure in comparison.values()]
    verdict = True in verdicts if set(verdicts) != {None} else None
    return {**comparison, "distinguishable": verdict, "confidence": CONFIDENCE,
            "compared": "runs" if by_run else "blocks", "numbers": list(map(len, sides))}


def _blocks(outcomes: Sequence[int]) -> list[Sequence[int]]:
    size, number = len(outcomes), max(1, min(MOST_BLOCKS, len(outcomes) // SHORTEST_BLOCK))
    return [outcomes[size * place // number:size * (place + 1) // number] for place in range(number)]


def _figures(outcomes: Sequence[int]) -> dict[str, float]:
    """Those that the outcomes (delays, or NO_DELAY) have: without a matched packet there is no median."""
    ranked = sorted(outcome for outcome in outcomes if outcome != NO_DELAY)
    figures = {"loss_ratio": 1 - len(ranked) / len(outcomes)} if outcomes else {}
    if ranked:
        figures |= {"median": percentile(ranked, 500) / 1000, "p99": percentile(ranked, 990) / 1000}
    return figures


def _variance(column: Sequence[float]) -> float:
    """That of a sample."""
    mean = sum(column) / len(column)
    return sum((value - mean) ** 2 for value in column) / (len(column) - 1)


def _reach(*columns: Sequence[float]) -> float:
    """Half of the width of Student's interval for the difference of two means (Welch)."""
    errors = [(_variance(column) / len(column), len(column) - 1) for column in columns]
    error = sum(part for part, _ in errors)
    if not error:
        return 0.0
    freedom = error * error / sum(part * part / last for part, last in errors)
    reach: float = error ** 0.5 * sum(factor / freedom ** power for power, factor in enumerate(STUDENT))
    return reach


# ---- Remote: commands that certainly end ---------------------------------------------------------------------
# Every remote command runs under WRAPPER, which is fed to `sh` on standard input: login shells see nothing but "exec
# sh", and no process list an argument.  What remains of standard input is a lease: lines that say "stop" (end the
# command), "bye" (end everything), "mark" (tell the time) or "alive" (which is answered).  The command ends, and its
# private directory is removed, when the lease ends (the client died), when it is not renewed for IDLE seconds (the
# network did) and after LIMIT seconds.  POSIX sh and coreutils only: dom0s have no Python, and some no timeout(1).

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
main() {
  exec 3<&0 </dev/null 4>&1                          # only here: shells read their script bit by bit
  trap finish EXIT; trap 'gone=1' HUP INT TERM PIPE
  if [ -n "$PRIVATE" ]; then
    dir=`mktemp -d "${TMPDIR:-/tmp}/netweaver.XXXXXXXXXX"` && cd "$dir" || exit 70
    [ -z "$SUDO_UID" ] || { chown "$SUDO_UID" "$dir"; umask 022; }   # SFTP has the rights of who has logged in
  fi
  printf '\n%s begin %s\n' "$TOKEN" "${dir:--}"
  $detach sh -c "$COMMAND" 3<&- 4>&- &
  p=$!
  (trap 'n=0' USR1; t=0 n=0
   while [ $t -lt "$LIMIT" ] && [ $n -lt "$IDLE" ]; do
     sleep 1; t=$((t + 1)) n=$((n + 1)); kill -s 0 $$ || break
   done
   kill -s TERM $$; for i in 1 2 3 4 5; do sleep 1; kill -s 0 $$ || break; done
   tell KILL; rm -rf "$dir") 3<&- 4>&- >/dev/null 2>&1 & dog=$!
  (while read -r line; do
     case $line in
       alive) kill -s USR1 $dog; printf '\n%s alive\n' "$TOKEN" >&4 ;;
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

# Several captures in one session, since sshd counts them (MaxSessions): each writes a file of its own, and what it says
# on stderr, and that it ends, comes with its number.  All of them end upon one TERM.
CAPTURES = r"""
capture() {
  mkfifo "$1.err"
  (trap '' TERM; while IFS= read -r line; do printf '%s %s\n' "$1" "$line"; done) <"$1.err" >&2 &
  (trap 'kill -s TERM $c 2>/dev/null' TERM; c=
   sh -c "$2" >"$1.pcap" & c=$!
   until wait $c; s=$?; ! kill -s 0 $c 2>/dev/null; do :; done
   wait $c 2>/dev/null; t=$?; [ $t = 127 ] || s=$t   # a signal may have cut the last one short
   echo "exit $s" >&2) 2>"$1.err" &
  all="$all $!"
}
all=; trap 'kill -s TERM $all 2>/dev/null' TERM
"""

# Beside the captures: a trace in a private instance, drained into files each second, and certainly removed: by a keeper
# outside of the process group, or else by the guard that watches the keeper, or else by the next run.
TRACING = r"""
tracing='
remove() {
  echo 0 >"$1/tracing_on"; echo 0 >"$1/events/enable"
  n=0; until rmdir "$1" || [ ! -d "$1" ] || [ $n = 9 ]; do n=$((n + 1)); sleep 0.2 || sleep 1; done
  release
} >/dev/null 2>&1
release() {                                          # what was mounted for this, if no other run traces
  ! grep -q "^netweaver /sys/kernel/tracing " /proc/mounts || ls -d /sys/kernel/tracing/instances/netweaver-* ||
    umount /sys/kernel/tracing
} >/dev/null 2>&1
drain() {
  for c in "$i"/per_cpu/cpu*; do                     # of all that there may be; those that run have a directory here
    on=0 cpu=/sys/devices/system/cpu/${c##*/}; [ ! -d $cpu ] || on=1; [ ! -r $cpu/online ] || read -r on <$cpu/online
    [ "$on" = 0 ] || dd if="$c/trace_pipe_raw" bs=4096 iflag=nonblock >>"trace-${c##*/}"
  done
}
offset() { awk "/^ clock 1:/ { f = 1 } f && /offset/ { print \$2; exit }" /proc/timer_list >>trace-offset; }
keep() {
  trap "" HUP INT PIPE; trap stop=1 TERM; stop= i=$1
  while [ -z "$stop" ] && kill -s 0 "$2" && kill -s 0 "$3"; do
    drain; sleep 1 & wait $!
    [ `du -ck trace-cpu* | tail -n 1 | cut -f 1` -lt "$4" ] || { stop=1; echo "dropped events: 1" >>trace-stats; }
  done
  echo 0 >"$i/tracing_on"; drain; cat "$i"/per_cpu/cpu*/stats >>trace-stats; offset; remove "$i"
}'
stages() {                                           # KIB MOST DIRECTION VIF PIF...
  kib=$1 most=$2 direction=$3 vif=$4; shift 4; eval "$tracing"
  for t in /sys/kernel/tracing /sys/kernel/debug/tracing; do [ ! -d $t/instances ] || break; done
  for i in $t/instances/netweaver-*; do              # of runs that could not remove them
    grep -q netweaver "/proc/${i##*-}/cmdline" 2>/dev/null || [ ! -d "$i" ] || remove "$i"
  done
  [ -d $t/instances ] || { t=/sys/kernel/tracing; mount -t tracefs netweaver $t || return; }
  i=$t/instances/netweaver-$$
  mkdir $i || { release; return 1; }
  {
    echo 0 >$i/tracing_on; echo mono >$i/trace_clock; echo "$kib" >$i/buffer_size_kb; echo 0 >$i/options/overwrite
    for n in 1 2 3; do                               # of a bond or a VLAN those below
      for p; do
        shift; set -- "$@" `ls -d /sys/class/net/$p/lower_* 2>/dev/null | sed "s/.*lower_//" | grep . || echo "$p"`
      done
    done
    to="name == \"$vif\"" from=; for p; do from="$from || name == \"$p\""; done; from=${from# || }
    case $direction in out) p=$to to=$from from=$p ;; both) to="$to || $from" from=$to ;; esac
    events='net/netif_receive_skb net/net_dev_queue net/net_dev_start_xmit skb/kfree_skb' failed=
    kind=`readlink "/sys/class/net/$vif/device/driver"`; kind=${kind##*/}
    if [ -e "/sys/class/net/$vif/tun_flags" ]; then
      kind=tap events="$events skb/consume_skb"
      echo 'comm ~ "vhost*" || comm ~ "qemu*" || comm ~ "kvm*" || comm ~ "CPU *"' >$i/events/skb/consume_skb/filter
    fi
    for e in $events; do
      case $e in
        net/netif*) echo "$from" >$i/events/$e/filter ;;
        net/*) echo "$to" >$i/events/$e/filter ;;
      esac
      cat $i/events/$e/format >>trace-formats && echo 1 >$i/events/$e/enable || failed=1
    done
    [ -z "$failed" ] && offset && echo 1 >$i/tracing_on
  } || { remove $i; return 1; }
  `command -v setsid` sh -c "$tracing; keep $i $$ $PPID $most 2>/dev/null" 3<&- >/dev/null 2>&1 & k=$!
  (trap 'exit 0' TERM; while kill -s 0 $k 2>/dev/null; do sleep 1 & wait $!; done; remove $i) >/dev/null 2>&1 &
  all="$all $k $!"
}
"""

CONNECT_SECONDS, CONNECT_ATTEMPTS = 10, 5            # for each step of a connection; a busy sshd drops new ones
ANSWER_SECONDS = 12                                  # for a look-up or a tool's start or end
ALIVE_SECONDS, IDLE_SECONDS = 2, 10                  # between heartbeats, and without one until a host is gone
DEAD_PEER_SECONDS = 8                                # unacknowledged data after which the network is down
SUDO_SHELL = ("""exec sh -c 'if [ "$(id -u)" = 0 ]; then exec sh; elif sudo -n sh -c :; then exec sudo -n sh; """
              "else read line; exit 1; fi'")         # it has been sent something when it ends
SUDO_HINT = " (--sudo needs a rule with NOPASSWD in that host's sudoers)"
LARGEST_ANSWER = 1 << 20


class Job:
    """A command that runs on a host under WRAPPER, and what is known of it so far.

    `ended` is true when it has ended there or the connection broke, `flooded` when it said too much.  `changed` is
    notified whenever something changes.
    """

    def __init__(self, name: str, channel: paramiko.Channel, token: str, changed: threading.Condition) -> None:
        self.name, self._channel, self._token, self._changed = name, channel, token.encode(), changed
        self.ended = self.stopped = self.flooded = self._left = False
        self._out, self._errors, self._speaking = bytearray(), bytearray(), threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _told(self, word: bytes) -> list[str]:
        """What the wrapper has told of something."""
        found = re.findall(rb"\n%b %b ?(\S*)\n" % (self._token, word), self._out)
        return [text.decode(errors="replace") for text in found]

    def _complete(self) -> bool:
        """Whether all of its standard error has come."""
        return b"\n%b end " % self._token in self._errors

    @property
    def directory(self) -> str:
        """Its private directory; "-" if it has none, and empty before it has begun."""
        return "".join(self._told(b"begin")[:1])

    @property
    def status(self) -> int | None:
        """Its exit status; None if it hasn't ended, or the connection broke before."""
        return next((int(status) for status in self._told(b"end") if is_number(status)), None)

    @property
    def output(self) -> str:
        """Its standard output, without what login shells say before."""
        _, _, begun = self._out.partition(b"\n%b begin " % self._token)
        return begun.partition(b"\n")[2].partition(b"\n%b end " % self._token)[0].decode(errors="replace")

    @property
    def errors(self) -> str:
        """The end of its standard error."""
        return self._errors.partition(b"\n%b end " % self._token)[0].decode(errors="replace")

    def time(self) -> str:
        """What `date +%s%N` says there now; empty if the host doesn't answer."""
        before = len(self._told(b"mark"))
        self.say("mark")
        with self._changed:
            self._changed.wait_for(lambda: self.ended or len(self._told(b"mark")) > before, ANSWER_SECONDS)
        return "".join(self._told(b"mark")[before:])

    def say(self, word: str) -> None:
        """Sends a word of the lease; a broken connection has ended the lease by itself.

        Nothing is sent when the host is about to close the channel: what paramiko sends on a channel just as it closes
        makes sshd end the whole connection.
        """
        over = self.ended or self._complete()
        with self._speaking:
            if not self._left and not (over and self.directory in ("", "-")):
                self._left = word == "bye"
                quietly(self._channel.sendall, word.encode() + b"\n")

    def stop(self) -> None:
        """Asks the command to end; its files stay until `leave`."""
        self.stopped = True
        self.say("stop")

    def leave(self, seconds: float = ANSWER_SECONDS) -> None:
        """Ends everything on the host; returns when it has ended there, or the time is over."""
        self.say("bye")
        self._reader.join(seconds)
        quietly(self._channel.close)

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        said = heard = time.monotonic()
        over: int = False
        while not over:
            poll.poll(1000 * ALIVE_SECONDS)
            now, over = time.monotonic(), self._channel.closed or self._channel.eof_received
            while self._channel.recv_ready():
                heard = now
                self._take(self._out, self._channel.recv(65536))
            while self._channel.recv_stderr_ready():
                heard = now
                self._take(self._errors, self._channel.recv_stderr(65536))
            if now - heard > IDLE_SECONDS:           # then all that goes through this connection is lost
                quietly(self._channel.get_transport().close)
                over = True
            elif now - said > ALIVE_SECONDS:
                said = now
                self.say("alive")
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def _take(self, stream: bytearray, data: bytes) -> None:
        with self._changed:
            stream += data
            self._out[:] = self._out.replace(b"\n%b alive\n" % self._token, b"")
            self.flooded = self.flooded or len(self._out) > LARGEST_ANSWER
            del self._errors[:-LARGEST_ANSWER]
            # It has ended when both streams say so: they may come in any order.
            self.ended = self.ended or (self._complete() and self.status is not None)
            self._changed.notify_all()
        if self.flooded:
            quietly(self._channel.close)


def quietly(call: Callable[..., object], *arguments: object) -> None:
    """Does something with a connection that may be broken already: then paramiko can't say so any more."""
    try:
        call(*arguments)
    except (OSError, EOFError):
        pass


def last_line(text: str) -> str:
    """The last line that says something, for an error message."""
    return ["no message", *filter(None, map(str.strip, text.splitlines()))][-1][:300]


def is_number(text: str) -> bool:
    """Whether it is a number that a host may have meant."""
    return re.fullmatch(r"\d{1,9}", text, re.ASCII) is not None


class Host:
    """A host that is logged in to: runs commands under WRAPPER, and fetches files.

    `way` is the connection, as Access makes it; `changed` is notified whenever something changes there; `log` is called
    with each command that is run.
    """

    def __init__(self, name: str, way: Way | LocalWay, changed: threading.Condition, log: Callable[[str], None],
                 sudo: bool) -> None:
        self.name, self._way, self._changed, self._log = name, way, changed, log
        self._transport: Any = way.transport
        self._shell = SUDO_SHELL if sudo else "exec sh"
        self._jobs: list[Job] = []

    @property
    def address(self) -> str:
        """The IP address of the host, as the connection has it; nothing if that goes through another host."""
        try:
            return str(self._transport.getpeername()[0]).split("%")[0].removeprefix("::ffff:")
        except (OSError, AttributeError, IndexError):
            return ""

    def check(self) -> None:
        """HostConnectionError if the connection is lost."""
        if not self._transport.is_active():
            reason = str(self._transport.get_exception() or "")      # EOFError has no words
            raise HostConnectionError(f"the connection to {self.name} is lost{f': {reason}' if reason else ''}")

    def _session(self) -> paramiko.Channel:
        """A new session; sshd counts one that has just ended a little longer."""
        from paramiko import ChannelException, SSHException
        for attempt in range(6):
            self.check()
            try:
                channel: paramiko.Channel = self._transport.open_session(timeout=CONNECT_SECONDS)
                channel.settimeout(CONNECT_SECONDS)
                return channel
            except (SSHException, EOFError, OSError) as error:
                # Of several that are refused at once, paramiko tells only one why.
                if not isinstance(error, ChannelException) and str(error) != "Unable to open channel.":
                    raise HostConnectionError(
                        f"{self.name}: can't start a session: {str(error) or 'no answer'}") from error
            time.sleep(0.02 * 2 ** attempt)
        raise HostConnectionError(f"{self.name}: sshd allows too few sessions on a connection: its sshd_config needs "
                                  "MaxSessions 2 or more")

    def start(self, command: str, seconds: float, *, private: bool = False, shown: Iterable[str] = ()) -> Job:
        """Starts a shell command that ends after so many seconds at the latest; people are `shown` it, or those.

        With `private` it runs in a directory of its own, which stays until `Job.leave`.
        """
        from paramiko import SSHException
        token, channel = f"netweaver-{os.urandom(12).hex()}", self._session()
        assignments = {"TOKEN": token, "COMMAND": command, "PRIVATE": "yes" if private else "",
                       "LIMIT": str(int(seconds) + 1), "IDLE": str(IDLE_SECONDS)}
        script = "".join(f"{name}={quote(value)}\n" for name, value in assignments.items()) + WRAPPER
        for line in shown or [command]:
            self._log(f"{self.name}: {line}")
        try:
            channel.exec_command(self._shell)
            channel.sendall(script.encode(errors="surrogateescape"))
        except (SSHException, EOFError, OSError):
            self.check()                             # else a shell that has ended at once; it may have said why
        self._jobs.append(Job(self.name, channel, token, self._changed))
        return self._jobs[-1]

    def check_job(self, job: Job) -> None:
        """HostConnectionError if a job has ended since the connection did, not by itself."""
        if job.ended and job.status is None and not job.flooded:
            self.check()
            if job.directory or not job.errors.strip():      # it did start, or couldn't even say why not
                raise HostConnectionError(f"the connection to {self.name} is lost (or its shell there was killed)")

    def run(self, command: str, seconds: float = ANSWER_SECONDS) -> Job:
        """Runs a shell command to its end; RemoteCommandError if that is not one of its own."""
        job = self.start(command, seconds)
        self._jobs.remove(job)
        with self._changed:
            self._changed.wait_for(lambda: job.ended, seconds)
        if job.status is None:
            self.check_job(job)
            why = ("did not answer in time" if not job.ended else "says too much" if job.flooded else
                   f"could not be run: {last_line(job.errors)}{SUDO_HINT if 'sudo' in job.errors else ''}")
            job.leave(0)
            raise RemoteCommandError(f"{self.name}: {command}: {why}")
        return job

    def open_sftp(self) -> Any:
        """The session in which files are fetched, an SFTPClient; CaptureError if the host has none."""
        from paramiko import SFTPClient, SFTPError, SSHException
        if isinstance(self._way, LocalWay):
            return self._way
        channel = self._session()
        try:
            channel.invoke_subsystem("sftp")
            return SFTPClient(channel)
        except (SFTPError, SSHException, EOFError, OSError) as error:
            raise CaptureError(f"{self.name}: has no SFTP ({str(error) or 'it ended at once'}): its sshd_config needs "
                               "a line such as 'Subsystem sftp internal-sftp'") from error

    def fetch(self, sftp: Any, path: str, local: str, most: int) -> None:
        """Copies a file of the host, of `most` bytes at the most; CaptureError if it can't be copied whole."""
        from paramiko import SFTPError, SSHException

        def check(size: int, _: int = 0) -> None:
            if size > most:
                raise CaptureError(f"{self.name}: {path} has more than the {most} bytes which it may have")

        try:
            with open(local, "wb") as file:
                check(sftp.stat(path).st_size or 0)
                sftp.getfo(path, file, check)
        except (SFTPError, SSHException, EOFError, OSError) as error:
            number = getattr(error, "errno", None)
            if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
                raise CaptureError(f"can't write {local} on this machine: {os.strerror(number)}") from error
            self.check()
            raise CaptureError(f"{self.name}: can't fetch {path}: {str(error) or 'the transfer broke off'}") from error

    def leave(self) -> None:
        """Ends all that still runs there."""
        in_parallel(*(job.leave for job in self._jobs))

    def close(self) -> None:
        self._way.close()


def in_parallel(*calls: Callable[[], Any], seconds: float | None = None) -> list[Any]:
    """The answers of the calls, each made in a thread of its own; raises the first error, once all have ended.

    HostConnectionError if they take more than so many seconds (a resolver may take its time).
    """
    deadline = time.monotonic() + (seconds or threading.TIMEOUT_MAX / 2)
    answers: dict[int, Any] = {}
    errors: list[BaseException] = []

    def run(place: int, call: Callable[[], Any]) -> None:
        try:
            answers[place] = call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
    if errors:
        raise errors[0]
    if len(answers) < len(calls):
        raise HostConnectionError(f"no answer after {seconds} s: check addresses, name resolution and network")
    return [answers[place] for place in range(len(calls))]


# ---- Remote: logging in --------------------------------------------------------------------------------------
# OpenSSH answers what OpenSSH would do: `ssh -G` resolves its configuration, `ssh-keygen -F` finds the lines of
# known_hosts, and a jump is `ssh -W`.  What is left to do here: compare host keys, append a line, and try keys.

RSA_WITH_SHA2 = ("rsa-sha2-512", "rsa-sha2-256")     # which OpenSSH has since 7.2


class Target:
    """Whom to log in as, and where: `[user@]host[:port]`, IPv6 literals in brackets when a port follows.

    `user` and `port` are None where the text doesn't say: then ssh_config does, or they are root and 22.  "local" is
    this machine, without SSH.
    """

    def __init__(self, text: str) -> None:
        user, at, place = text.rpartition("@")
        parts = re.fullmatch(r"(?:\[([^]]+)]|([^:]+))(?::(\d{1,5}))?", place)
        if not parts and place.count(":") > 1:       # a bare IPv6 literal
            parts = re.fullmatch(r"()([0-9A-Fa-f:.]+(?:%\w+)?)()", place)
        self.user, self.host = user if at else None, (parts[1] or parts[2]) if parts else ""
        self.port = int(parts[3]) if parts and parts[3] else None
        if (not re.fullmatch(r"[\w.:%][\w.:%-]*", self.host, re.ASCII) or self.port not in (None, *range(1, 65536))
                or (at and not re.fullmatch(r"[\w.][\w.@\\$-]*", user))):
            raise UsageError(f"{text!r} is not [user@]host[:port] (an IPv6 address with a port goes in brackets)")

    def named(self, user: str, port: int) -> str:
        """What it is called in messages and in the report."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{user}@{host}" + (f":{port}" if port != 22 else "")


class HostSettings:
    """What OpenSSH's configuration says of a target, by the lines that `ssh -G` printed, by keyword.

    `names` are those in known_hosts: a key which only the second one has is accepted, too.  `own_files` are the
    user's known_hosts files, of which the first gets new keys; `files` are those and the system's.  `checking` is yes,
    no, ask or accept-new.  `jumps` and `command` are empty if there is none.
    """

    def __init__(self, target: Target, values: Mapping[str, Sequence[str]]) -> None:
        import pwd

        def value(keyword: str) -> str:
            text = values.get(keyword, ["none"])[0]
            return "" if text.lower() == "none" else text

        def paths(keyword: str) -> list[str]:        # ssh -G joins them by blanks, and doesn't quote theirs
            return [home_path(path) for path in re.split(r" (?=[/~])", value(keyword)) if path]

        def expand(text: str) -> str:
            return re.sub(r"%(.)", lambda token: tokens.get(token[1], token[0]), text)

        alias, local, me = value("hostkeyalias"), os.uname().nodename, pwd.getpwuid(os.getuid())
        self.host, self.port, self.user = value("hostname"), int(value("port")), value("user")
        self.name = target.named(self.user, self.port)
        self.place = f"port {self.port}" + ("" if self.host == target.host else f" of {self.host}")
        for keyword in ("revokedhostkeys", "knownhostscommand"):         # better no session than one that ssh refuses
            if value(keyword):
                raise HostConnectionError(f"{self.name}: ssh_config sets {keyword}, which netweaver can't honour")
        tokens = {"%": "%", "d": me.pw_dir, "h": self.host, "i": str(me.pw_uid), "k": alias or self.host, "l": local,
                  "L": local.partition(".")[0], "n": target.host, "p": str(self.port), "r": self.user,
                  "u": me.pw_name}
        place = self.host if self.port == 22 else f"[{self.host}]:{self.port}"
        self.names = [alias] if alias else list(dict.fromkeys((place, self.host)))
        self.own_files = paths("userknownhostsfile")
        self.files = self.own_files + paths("globalknownhostsfile")
        checking = value("stricthostkeychecking")
        self.checking = {"true": "yes", "false": "no", "off": "no"}.get(checking, checking)
        self.hashed, self.only_named = value("hashknownhosts") == "yes", value("identitiesonly") == "yes"
        self.agent = values.get("identityagent") != ["none"]
        self.identities = [os.path.expandvars(expand(home_path(path))) for path in values.get("identityfile", ())
                           if path != "none"]
        self.jumps, self.command = value("proxyjump"), expand(value("proxycommand"))
        self.way = f"ProxyJump {self.jumps}" if self.jumps else f"ProxyCommand {self.command}"


def home_path(path: str) -> str:
    """A path with ~ as ssh expands it, which doesn't look at $HOME."""
    import pwd
    return pwd.getpwuid(os.getuid()).pw_dir + path[1:] if path[:2] == "~/" else os.path.expanduser(path)


def ask_openssh(*command: str) -> subprocess.CompletedProcess[str]:
    """What one of OpenSSH's programs answers."""
    import subprocess
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=CONNECT_SECONDS,
                              encoding="utf-8", errors="surrogateescape")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostConnectionError(f"can't run {command[0]} ({error}): is OpenSSH's client installed?") from error


def words_of(text: str) -> str:
    """What a program has said, on one line."""
    lines = [line.strip() for line in text.split("\n") if line.strip(" @\r")]
    return "; ".join(line for line in lines if not line.startswith("Warning: Permanently added"))[-400:]


KnownKey = namedtuple("KnownKey", "place marker kind blob")          # marker: REVOKED, CA or nothing


def known_keys(name: str, files: Iterable[str]) -> list[KnownKey]:
    """What known_hosts files say of a name; the blob of a damaged line is empty.

    `ssh-keygen -F` knows patterns, negation, hashes, blanks and markers.
    """
    from base64 import b64decode
    keys = []
    for file in filter(os.path.exists, files):
        answer = ask_openssh("ssh-keygen", "-F", name, "-f", file)
        if answer.returncode > 1 or not os.access(file, os.R_OK):
            raise HostConnectionError(f"can't read {file}: {words_of(answer.stderr) or 'no permission'}")
        lines = answer.stdout.split("\n")
        for header, line in zip(lines[::2], lines[1::2]):        # "# Host NAME found: line 3 REVOKED", and the line
            number, marker = re.findall(r" found: line (\d+) ?(\w*)$", header.rstrip("\r"))[0]
            _, kind, key, *_ = [*line.split()[1 if marker else 0:], "", "", ""]
            try:
                blob = b64decode(key, validate=True)
            except ValueError:
                blob = b""
            keys.append(KnownKey(f"line {number} of {file}", marker, kind, blob))
    return keys


def is_known(key: paramiko.PKey, settings: HostSettings, shown: str) -> bool:
    """Whether a host's key is known, or else the host new; HostConnectionError if it must be refused.

    `shown` is what to call the key.  Stricter than ssh: by a damaged line or a certificate authority, too, a host is
    known.
    """
    named, *others = (known_keys(name, settings.files) for name in settings.names)
    plain = [known for known in named if not known.marker]
    same = [known for known in (*named, *(known for more in others for known in more)) if known.blob == key.asbytes()]
    changed = [known.place for known in plain if known.kind == key.get_name() or not known.blob]
    authorities = [known.place for known in named if known.marker == "CA"]
    for known in named:
        if known.marker == "REVOKED" and known in same:
            raise HostConnectionError(f"{shown} is revoked by {known.place}: ask who administers that host")
    if any(known in same for known in plain):
        return True
    if changed:
        raise HostConnectionError(f"{shown} has changed, or someone is in between: if it is right, remove "
                                  f"{', '.join(changed)}")
    if plain:
        raise HostConnectionError(f"{shown} isn't known, only a key of another type is ({plain[0].kind}, "
                                  f"{plain[0].place}), which the host doesn't show: if it is right, add it there")
    if any(not known.marker for known in same):
        return True
    if authorities:
        raise HostConnectionError(f"{shown} would be known by a certificate only ({authorities[0]}), which paramiko "
                                  "can't verify: add the key itself to known_hosts")
    return False


def accept(key: paramiko.PKey, settings: HostSettings) -> None:
    """Lets a known key pass, and records that of a new host, if new ones are accepted; HostConnectionError if not.

    With `no` any key passes: to warn of that is up to the caller.
    """
    from base64 import b64encode
    from hashlib import sha256
    fingerprint = b64encode(sha256(key.asbytes()).digest()).decode().rstrip("=")
    shown = f"{settings.name}: its host key ({key.get_name()} SHA256:{fingerprint})"
    if settings.checking == "no" or is_known(key, settings, shown):
        return
    if settings.checking not in ("accept-new", "ask") or not settings.own_files:
        why = f"StrictHostKeyChecking is {settings.checking}" if settings.own_files else "UserKnownHostsFile is none"
        raise HostConnectionError(f"{shown} is not known, and {why}: connect once with ssh, or see -o "
                                  "StrictHostKeyChecking and -o UserKnownHostsFile")
    try:
        record(settings.own_files[0], key, settings, shown)
    except OSError as error:
        raise HostConnectionError(f"{settings.name}: can't record its host key in {settings.own_files[0]}: "
                                  f"{error.strerror} (-o UserKnownHostsFile=FILE names another one)") from error


def record(path: str, key: paramiko.PKey, settings: HostSettings, shown: str) -> None:
    """Appends one line to a known_hosts file, under a lock: other runs may be doing the same."""
    import fcntl

    from paramiko import HostKeys
    os.makedirs(os.path.dirname(path) or ".", 0o700, exist_ok=True)
    with open(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not is_known(key, settings, shown):       # else another run was quicker
            name = HostKeys.hash_host(settings.names[0]) if settings.hashed else settings.names[0]
            whole = (file.read() or b"\n").endswith(b"\n")
            file.write(f"{'' if whole else chr(10)}{name} {key.get_name()} {key.get_base64()}\n".encode())


def load_key(path: str, ask: Callable[[str], str] | None) -> paramiko.PKey:
    """The private key in a file; HostConnectionError if it can't be used.  `ask` gets its passphrase from a person.

    cryptography, which paramiko brings, reads more formats (PKCS#8), so it reads, and paramiko gets OpenSSH's own.
    """
    import io

    import paramiko
    from cryptography.hazmat.primitives import serialization as formats
    asked, private = False, None                     # type: bool, Any
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_ANSWER)
        if b"PRIVATE KEY-----" not in data:
            public = data.startswith((b"ssh-", b"ecdsa-", b"sk-"))
            raise HostConnectionError(f"can't use the key {path}: it is "
                                      f"{'a public key: give the private one' if public else 'not a private key'}")
        load: Any = formats.load_ssh_private_key if b"BEGIN OPENSSH" in data else formats.load_pem_private_key
        try:
            private = load(data, None)
        except (TypeError, ValueError) as error:     # the versions say in various ways that it is protected
            if "assword" not in str(error) or "may be in an incorrect format" in str(error):
                raise
            if ask is None:
                raise HostConnectionError(f"can't use the key {path}: it is protected by a passphrase: load it into "
                                          "ssh-agent (ssh-add) and leave -k out") from None
            asked = True
            private = load(data, ask(f"Passphrase for {path}: ").encode())
        text = private.private_bytes(formats.Encoding.PEM, formats.PrivateFormat.OpenSSH, formats.NoEncryption())
        kinds: Any = {"RSA": paramiko.RSAKey, "ECP": paramiko.ECDSAKey, "Ell": paramiko.ECDSAKey}
        kind = kinds.get(type(private).__name__.lstrip("_")[:3], paramiko.Ed25519Key)
        key: paramiko.PKey = kind.from_private_key(io.StringIO(text.decode()))
        if os.path.exists(f"{path}-cert.pub"):
            key.load_certificate(f"{path}-cert.pub")
        return key
    except HostConnectionError:
        raise
    except OSError as error:
        why = error.strerror or str(error)
    except Exception as error:                       # whatever cryptography makes of a strange file
        why = "the passphrase is wrong" if asked else (f"{words_of(str(error))[:120]}: if ssh reads it, ssh-keygen -p "
                                                       f"-f {path} writes it anew in OpenSSH's format")
    raise HostConnectionError(f"can't use the key {path}: {why}")


def public_key(path: str) -> bytes:
    """The public key of an identity file; empty if that isn't known without a passphrase."""
    from base64 import b64decode
    for candidate in (f"{path}.pub", path):
        try:
            with open(candidate, "rb") as file:
                return b64decode(file.read(1 << 16).split()[1], validate=True)
        except (OSError, IndexError, ValueError):
            pass
    return b""


class Way:
    """A connection to a host: TCP, or a process that speaks for it, and says on its stderr what goes wrong."""

    def __init__(self, settings: HostSettings, config: str) -> None:
        import socket
        import subprocess
        import tempfile

        import paramiko
        self._said, self._proxy = tempfile.TemporaryFile(), None     # type: Any, subprocess.Popen[bytes] | None
        if settings.jumps or settings.command:
            command = [os.environ.get("SHELL") or "/bin/sh", "-c", f"exec {settings.command}"]
            if settings.jumps:
                before, _, last = settings.jumps.rpartition(",")
                host = f"[{settings.host}]" if ":" in settings.host else settings.host
                command = ["ssh", "-F", config, *(["-J", before] if before else []),
                           "-W", f"{host}:{settings.port}", "--", last if "://" in last else f"ssh://{last}"]
            self._sock, theirs = socket.socketpair()
            with theirs:
                self._proxy = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno(),
                                               stderr=self._said, start_new_session=True)
        else:
            try:
                self._sock = socket.create_connection((settings.host, settings.port), CONNECT_SECONDS)
            except (OSError, UnicodeError) as error:
                why = "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or str(error)
                hint = ("is sshd running there? (XenServer 9 starts without: xe host-enable-ssh)"
                        if isinstance(error, ConnectionRefusedError) else "check the address, the network and sshd")
                raise HostConnectionError(f"{settings.name}: can't reach {settings.place}: {why}: {hint}") from error
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: without it a dead peer is noticed after 15 minutes
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PEER_SECONDS * 1000)
        self.transport = paramiko.Transport(self._sock)

    def words(self) -> str:
        """What the process has said."""
        self._said.seek(0)
        return words_of(self._said.read().decode(errors="replace"))

    def close(self) -> None:
        quietly(self.transport.close)
        quietly(self._sock.close)                    # a transport that hasn't begun leaves it open
        self._said.close()
        if self._proxy:                              # ssh -W would wait for a host that is silent
            self._proxy.kill()
            self._proxy.wait()


class LocalSession:
    """A shell on this machine, with what is used here of a paramiko channel."""
    closed = False

    def exec_command(self, command: str) -> None:
        import selectors
        from subprocess import PIPE, Popen
        self._process = Popen(["/bin/sh", "-c", command], stdin=PIPE, stdout=PIPE, stderr=PIPE, bufsize=0,
                              start_new_session=True)
        self._streams: list[Any] = [self._process.stdout, self._process.stderr]
        self._ended, self._selector = [False, False], selectors.DefaultSelector()
        for number, stream in enumerate(self._streams):
            self._selector.register(stream, selectors.EVENT_READ, number)

    def settimeout(self, seconds: float) -> None:
        """A pipe to a shell on this machine doesn't block."""

    def fileno(self) -> int:
        return self._selector.fileno()

    def sendall(self, data: bytes) -> None:
        if self._process.stdin:
            self._process.stdin.write(data)

    @property
    def eof_received(self) -> bool:
        return all(self._ended)

    def _ready(self, number: int) -> bool:
        return not self.closed and not self._ended[number] and any(
            key.data == number for key, _ in self._selector.select(0))

    def _receive(self, number: int, size: int) -> bytes:
        data: bytes = self._streams[number].read(size)
        self._ended[number] = not data
        return data

    recv_ready, recv = partialmethod(_ready, 0), partialmethod(_receive, 0)
    recv_stderr_ready, recv_stderr = partialmethod(_ready, 1), partialmethod(_receive, 1)

    def get_transport(self) -> LocalSession:
        return self

    def close(self) -> None:
        self.closed = True
        if self._process.stdin:
            self._process.stdin.close()              # which ends the lease
        self._process.poll()


class LocalWay:
    """The way to this machine itself, with what is used here of Way, and of paramiko's Transport and SFTPClient."""
    name, checking = "local", "yes"
    stat, listdir = staticmethod(os.stat), staticmethod(os.listdir)

    def __init__(self) -> None:
        self.transport = self

    def is_active(self) -> bool:
        return True

    def open_session(self, timeout: float) -> LocalSession:
        return LocalSession()

    def getfo(self, path: str, file: BinaryIO, callback: Callable[[int, int], object]) -> None:
        with open(path, "rb") as source:
            while data := source.read(CHUNK):
                file.write(data)
                callback(file.tell(), 0)

    def close(self) -> None:
        """There is nothing to close: each shell ends with its job."""


def import_paramiko() -> None:
    """Imports what logging in needs; NetWeaverError if it can't be imported."""
    import logging
    import warnings
    try:
        with warnings.catch_warnings():              # what paramiko's and cryptography's versions think of each other
            warnings.simplefilter("ignore")
            import paramiko  # noqa: F401
    except Exception as error:
        raise NetWeaverError(f"can't import paramiko ({error}): pip install -U paramiko") from error
    logging.getLogger("paramiko").addHandler(logging.NullHandler())      # else it prints tracebacks


class Access:
    """How to log in: the options as a configuration for ssh, wrapped around the user's own.

    What the `options` say, as `ssh -o` takes them, stands first, and wins; what holds where nobody says anything stands
    last.  The `ssh` of a jump is given the same.  Without `ask`, which gets the passphrase of a key from a person, a
    protected key can't be used.
    """

    def __init__(self, key_path: str | None = None, options: Iterable[str] = (),
                 ask: Callable[[str], str] | None = None) -> None:
        import tempfile
        key = key_path and os.path.abspath(os.path.expanduser(key_path))
        if key and key.endswith(".pub") and os.path.exists(key[:-4]):
            key = key[:-4]
        if key and not os.path.exists(key):
            raise HostConnectionError(f"can't use the key {key}: No such file or directory")
        self._key_path, self._ask, self._lock = key, ask, threading.Lock()           # one question at a time
        self._keys: dict[str, paramiko.PKey | HostConnectionError] = {}
        if any("\n" in text for text in (key or "", *options)) or '"' in (key or ""):
            raise UsageError("ssh_config can't hold a line break, or name a file with a quote (-k, -o)")
        lines = [*options, *([f'IdentityFile "{key.replace("%", "%%")}"'] if key else [])]
        lines += ["BatchMode yes", f"ConnectTimeout {CONNECT_SECONDS}", f"ServerAliveInterval {ALIVE_SECONDS}",
                  f'Include "{home_path("~/.ssh/config")}"',     # its own ~ would be $HOME
                  "Include /etc/ssh/ssh_config", "Host *", "User root", "StrictHostKeyChecking accept-new", ""]
        # A file that ssh can read, and that is gone when this process is.
        memory = hasattr(os, "memfd_create")
        self._file = (open(os.memfd_create("ssh_config"), "wb", buffering=0) if memory else
                      tempfile.NamedTemporaryFile("wb", buffering=0))
        self._config = f"/proc/{os.getpid()}/fd/{self._file.fileno()}" if memory else str(self._file.name)
        self._file.write("\n".join(lines).encode(errors="surrogateescape"))

    def load(self, path: str) -> paramiko.PKey:
        """The private key in a file, for which a person is asked once at the most."""
        with self._lock:
            if path not in self._keys:
                try:
                    self._keys[path] = load_key(path, self._ask)
                except HostConnectionError as error:
                    self._keys[path] = error
            key = self._keys[path]
        if isinstance(key, HostConnectionError):
            raise key
        return key

    def settings(self, target: Target) -> HostSettings | LocalWay:
        """What OpenSSH's configuration says of a target, if it isn't this machine.

        Where the target names no user, a first answer tells only whom the configuration would log in as: `Match user`
        and %r must then mean the same one.
        """
        if (target.user, target.host, target.port) == (None, "local", None):
            return LocalWay()
        values: dict[str, list[str]] = {"user": [target.user] if target.user else []}
        for _ in range(1 if target.user else 2):
            options = [*(f"-l{user}" for user in values["user"]), *([f"-p{target.port}"] if target.port else [])]
            answer = ask_openssh("ssh", "-G", "-T", "-F", self._config, *options, "--", target.host)
            if answer.returncode:
                raise HostConnectionError(f"{target.host}: ssh_config can't be used: {words_of(answer.stderr)}")
            values = {}
            for line in answer.stdout.split("\n"):
                keyword, _, text = line.partition(" ")
                values.setdefault(keyword.lower(), []).append(text)
        return HostSettings(target, values)

    def connect(self, settings: HostSettings | LocalWay, changed: threading.Condition | None = None,
                log: Callable[[str], None] = lambda line: None, sudo: bool = False) -> Host:
        """Logs in to a host; HostConnectionError says where, what failed and what to do."""
        import random

        from paramiko.ssh_exception import IncompatiblePeer, SSHException
        if isinstance(settings, LocalWay):
            return Host(settings.name, settings, changed or threading.Condition(), log, sudo)
        if self._key_path and not self._key_path.endswith(".pub"):
            self.load(self._key_path)                # a question takes its time
        for attempt in range(1, CONNECT_ATTEMPTS + 1):
            begun, way = time.monotonic(), Way(settings, self._config)
            try:
                self._log_in(way.transport, settings)
                return Host(settings.name, way, changed or threading.Condition(), log, sudo)
            except BaseException as error:
                failure, words = error, way.words()
                way.close()
                if not isinstance(error, (SSHException, EOFError, OSError)):
                    raise
            # Of many connections at once sshd drops some.
            dropped = "SSH protocol banner" in str(failure) and (not words or "closed by remote host" in words)
            if not dropped or time.monotonic() - begun > 2:
                break
            time.sleep(random.uniform(0.1, 0.5) * attempt)
        why = (f"no SSH algorithms in common with {settings.place} ({failure}): for an old sshd try pip install "
               "'paramiko<5'" if isinstance(failure, IncompatiblePeer) else
               f"no way to {settings.place} by {settings.way}: {words}" if words else
               f"no SSH session with {settings.place}: {failure or 'it hung up'}: is it sshd that listens there?")
        raise HostConnectionError(f"{settings.name}: {why}") from failure

    def _log_in(self, transport: paramiko.Transport, settings: HostSettings) -> None:
        import paramiko
        security = transport.get_security_options()
        known = {known.kind for known in known_keys(settings.names[0], settings.files) if not known.marker}
        security.key_types = tuple(sorted(           # a server then shows the key that is known, if it still has it
            security.key_types, key=lambda kind: ("ssh-rsa" if kind in RSA_WITH_SHA2 else kind) not in known))
        transport.banner_timeout = transport.auth_timeout = transport.channel_timeout = CONNECT_SECONDS
        transport.start_client(timeout=CONNECT_SECONDS)
        if not transport.initial_kex_done:           # it returns without a word when the time is over
            raise paramiko.SSHException("no answer")
        accept(transport.get_remote_server_key(), settings)
        self._authenticate(transport, settings)
        transport.set_keepalive(DEAD_PEER_SECONDS // 2)      # something to acknowledge

    def _authenticate(self, transport: paramiko.Transport, settings: HostSettings) -> None:
        import paramiko
        tried, unusable, why, advice = [], [], "", ""        # type: list[str], list[str], str, str
        for name, key in self._candidates(settings, unusable):
            tried.append(name)
            # A server of before OpenSSH 7.2 doesn't say what it knows, and may hang up on RSA with anything but SHA-1.
            old = key.get_name() == "ssh-rsa" and "server-sig-algs" not in getattr(transport, "server_extensions", {})
            for disabled in (RSA_WITH_SHA2, ()) if old else ((),):
                transport.disabled_algorithms = {"pubkeys": disabled}
                try:
                    more = transport.auth_publickey(settings.user, key)
                    if not more:
                        return
                    why = f" (it wants {' and '.join(more)} as well)"
                except (paramiko.SSHException, EOFError) as error:
                    why = f" ({error})" if isinstance(error, paramiko.BadAuthenticationType) else ""
            if old:
                advice = "it may know RSA with SHA-1 only: use another key, or pip install 'paramiko<5'"
            if not transport.is_active():            # sshd has had enough of them
                break
        advice = advice or f"add the public key to {settings.user}'s ~/.ssh/authorized_keys there"
        if tried:
            unusable.insert(0, f"refused {', '.join(tried)} for {settings.user}{why}: {advice}")
        unusable = unusable or ["there is no key to log in with: give one with -k, or load one with ssh-add"]
        raise HostConnectionError(f"{settings.name}: {'; '.join(unusable)}")

    def _candidates(self, settings: HostSettings, unusable: list[str]) -> Iterator[tuple[str, paramiko.PKey]]:
        """Keys in ssh's order: those of the agent that are named, the agent's others, then files."""
        import paramiko
        named = {public_key(path): path for path in settings.identities}
        agent = {key.asbytes(): key for key in paramiko.Agent().get_keys()} if settings.agent else {}
        for blob in sorted(agent, key=lambda blob: blob not in named):
            if blob in named or not (settings.only_named or self._key_path):
                yield f"the key {named[blob]}" if blob in named else "a key of ssh-agent", agent[blob]
        for path in filter(os.path.exists, settings.identities):
            try:
                if public_key(path) not in agent:
                    yield f"the key {path}", self.load(path)
            except HostConnectionError as error:
                unusable.append(str(error))


def resolve(name: str) -> str:
    """The IP address of a host given as an address or a name; UsageError if it is neither."""
    import socket
    from ipaddress import ip_address
    try:
        if re.fullmatch(r"[\d.]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*", name, re.ASCII):
            return str(ip_address(name))
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, ValueError) as error:
        raise UsageError(f"{name!r} is neither an IP address nor a name that can be resolved") from error


# ---- Toolstacks: a VM's name in, its interfaces out ----------------------------------------------------------
# For each toolstack there is a function of `run`, the VM's name and the number of its interface, which returns the
# interface's name on the hypervisor.  `run(command, hint)` is NetWeaver.run_command: it returns the output of a shell
# command on the hypervisor, and raises RemoteCommandError, with the hint, if that fails.

UUID = r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"
VM_INTERFACE = (r"(vif|tap|emu)\d+\.\d+(-emu)?|(tap|veth|fwln|fwpr|fwbr)\d+[ip]\d+|vnet\d+|veth[0-9a-f]{6,}"
                r"|(tap|qvb|qvo|qbr)[0-9a-f-]{9,}")
TUNNELS = ("vxlan", "geneve", "gre", "gretap", "ip6gre", "ip6gretap", "stt")


def xe_vif(run: Run, name: str, number: int) -> str:
    """On XenServer and XCP-ng; takes a name-label, or a UUID that is no VM's name."""
    hint = "is xapi up there? systemctl status xapi tells"
    answer = run(xe_dom_id_command(f"name-label={quote(name)}"), hint)
    if not answer.strip() and re.fullmatch(UUID, name):
        answer = run(xe_dom_id_command(f"uuid={name}"), hint)
    return f"vif{parse_xe_dom_id(answer, name)}.{number}"


def xe_dom_id_command(vm: str) -> str:
    """Prints the dom-ids of the VMs for which a filter (name-label=..., quoted) holds, then of those on this host."""
    query = f"xe vm-list {vm} is-control-domain=false params=dom-id --minimal"
    return (f"{query} || exit; INSTALLATION_UUID=; [ ! -r /etc/xensource-inventory ] || . /etc/xensource-inventory; "
            f'[ -z "$INSTALLATION_UUID" ] || {query} resident-on="$INSTALLATION_UUID"')


def parse_xe_dom_id(answer: str, name: str) -> int:
    """The domain id in the answer to `xe_dom_id_command`; RemoteCommandError if no VM, or several, run here.

    `xe --minimal` exits 0 for all of these: a list for several VMs, -1 for a halted one, nothing for none, and
    the domain id on another host of the pool, where a VM of this host may have the same.
    """
    everywhere, here, *_ = [[word for word in line.strip().split(",") if word]
                            for line in (*answer.split("\n"), "", "")]
    running = [word for word in everywhere if word != "-1"]
    if answer.count("\n") == 1:                      # which host this is isn't known
        here = running
    why = ""
    if not all(map(is_number, running + here)):
        why = f"xe answered {answer[:80]!r} for {name!r}, which are no dom-ids"
    elif not everywhere:
        why = f"there is no VM with the name-label {name!r} (names are case-sensitive; xe vm-list shows them)"
    elif not running:
        why = f"the VM {name!r} is not running (halted or suspended): start it first"
    elif not here:
        why = f"the VM {name!r} runs on another host of the pool: give that one as --hv"
    elif len(here) > 1:
        why = (f"{len(here)} VMs have the name-label {name!r} (dom-ids {','.join(here)}): make the name unique, or "
               "give the VM's UUID")
    if why:
        raise (RemoteCommandError if everywhere else UnknownVMError)(why)
    return int(here[0])


def xl_vif(run: Run, name: str, number: int) -> str:
    """On plain Xen; takes a name, or a UUID that `xl vm-list` has."""
    hint, domain = "it isn't running, or has another name: xl list shows them", ""
    if re.fullmatch(UUID, name):
        rows = [line.split() for line in run("xl vm-list", hint).splitlines()]
        domain = next((row[1] for row in rows if len(row) > 1 and row[0].lower() == name.lower()), "")
    if not is_number(domain):
        domain = f"`xl domid {'-- ' if name.startswith('-') else ''}{quote(name)}`"
    answer = run(f"id={domain} || exit; echo $id; xenstore-read /local/domain/0/backend/vif/$id/{number}/vifname "
                 "2>/dev/null || :", hint)
    number_of, vifname, *_ = [*(line.strip() for line in answer.split("\n")), ""]
    if not is_number(number_of):
        raise RemoteCommandError(f"xl answered {answer[:80]!r} for {name!r}, which is no domain id")
    if number_of == "0":
        raise RemoteCommandError(f"{name!r} is the control domain, which has no vif")
    return vifname or f"vif{number_of}.{number}"


def virsh_vif(run: Run, name: str, number: int) -> str:
    """On libvirt, with KVM for example."""
    hint = "virsh list --all shows the names; systemctl status libvirtd whether libvirt runs"
    domain = f"{'--domain ' if name.startswith('-') else ''}{quote(name)}"
    if re.fullmatch(r"\d+", name, re.ASCII):         # most commands take it for an id, domid never does
        domain = quote(run(f"LC_ALL=C virsh -q domid {domain}", hint).strip())
    answer = "" if domain == "-" else run(f"LC_ALL=C virsh -q domiflist {domain}", hint)
    # A domain that is shut off may list a name all the same.
    if domain == "-" or run(f"LC_ALL=C virsh -q domstate {domain} || :").strip() == "shut off":
        raise RemoteCommandError(f"the domain {name!r} is shut off: start it first (virsh start)")
    return parse_virsh_domiflist(answer, name, number)


def parse_virsh_domiflist(answer: str, name: str, number: int) -> str:
    """The interface in row `number` of virsh's table; RemoteCommandError if it has none.

    Old versions print a header and a rule in spite of -q; the interfaces of a domain that is shut off are "-".
    """
    names = [line.split()[0] for line in answer.splitlines()
             if line.strip() and not re.match(r"\s*(Interface\s+Type\s|--+\s*$)", line)]
    if number >= len(names):
        raise RemoteCommandError(f"the domain {name!r} has {len(names)} interfaces, and none of number {number} (--num "
                                 f"counts from 0; there are: {', '.join(names) or 'none'})")
    if names[number] == "-":
        raise RemoteCommandError(f"interface {number} of the domain {name!r} has no device on the host (hostdev, "
                                 "vhost-user, or the domain is shut off): tcpdump can't see it")
    return names[number]


def qm_vif(run: Run, name: str, number: int) -> str:
    """On Proxmox VE."""
    return f"tap{parse_qm_list(run('qm list', 'is this a Proxmox VE host?'), name)}i{number}"


def parse_qm_list(answer: str, name: str) -> int:
    """The VMID of a running VM by its name or, if none has that name, its VMID; RemoteCommandError if it isn't one."""
    rows = [line.split() for line in answer.splitlines()]        # VMID, name, status, memory, disk, PID
    vms = [(row[0], " ".join(row[1:-4]), row[-4]) for row in rows if len(row) >= 6 and is_number(row[0])]
    named = [vm for vm in vms if vm[1] == " ".join(name.split())] or [vm for vm in vms if vm[0] == name]
    running = [vmid for vmid, _, status in named if status == "running"]
    if not named:
        raise UnknownVMError(f"there is no VM {name!r} on this host (qm list shows them; a container's interface is "
                             "given with --vif veth<id>i<n>)")
    if not running:
        vmid, _, status = named[0]
        raise RemoteCommandError(f"the VM {name!r} (VMID {vmid}) is {status}: start it first (qm start {vmid})")
    if len(running) > 1:
        raise RemoteCommandError(f"{len(running)} VMs have the name {name!r} (VMIDs {', '.join(running)}): give the "
                                 "VMID as -n")
    return int(running[0])


TOOLSTACKS = {"xe": xe_vif, "qm": qm_vif, "virsh": virsh_vif, "xl": xl_vif}


def find_toolstack(run: Run, name: str, number: int) -> tuple[str, str]:
    """The first toolstack that is there and knows a VM, and the VM's interface; else raises the first one's error.

    What xe or qm say of a VM that they do know (it is halted, or there are two) is the last word.
    """
    tools = " ".join(TOOLSTACKS)
    there = run(f"for tool in {tools}; do command -v $tool >/dev/null && echo $tool; done; :").split()
    errors = [RemoteCommandError(f"none of {', '.join(TOOLSTACKS)} is there: name the VM's interface with --vif")]
    for toolstack in filter(TOOLSTACKS.__contains__, there):
        try:
            return toolstack, TOOLSTACKS[toolstack](run, name, number)
        except RemoteCommandError as error:
            if toolstack in ("xe", "qm") and not isinstance(error, UnknownVMError):
                raise
            errors.append(error)
    raise [*errors[1:], *errors][0]


LINKS_COMMAND = """\
ip -o -d link || exit; command -v ovs-vsctl >/dev/null || exit 0; ask() { ovs-vsctl --timeout=5 "$@" 2>/dev/null; }
for bridge in `ask list-br`; do
  echo "ovs `ask br-to-parent $bridge` "`ask list-ifaces $bridge`
done; echo "ovs-interfaces `ask -f json --columns=name,type,options list Interface | tr -d '\\n'`\""""


class Links:
    """The network interfaces of a host and how they hang together, from what LINKS_COMMAND printed.

    `kinds` are "" for hardware, `bridges` (or bonds) by port, `peers` the other end, or what an interface is stacked
    on, and `remotes` those of tunnels.
    """

    def __init__(self, answer: str) -> None:
        self.kinds: dict[str, str] = {}
        self.bridges, self.peers, self.remotes = self.kinds.copy(), self.kinds.copy(), self.kinds.copy()
        for line in answer.splitlines():
            word, *words = line.split() or [""]
            if word == "ovs" and words:
                self.bridges.update(dict.fromkeys(words[1:], f"ovs {words[0]}"))
            elif word == "ovs-interfaces":
                self._open_vswitch(line.partition(" ")[2])
            elif found := re.match(r"\d+: ([^\s:@]+)(?:@([^\s:]+))?: ", line):
                self._link(line, *found.groups())

    def _link(self, line: str, name: str, peer: str | None) -> None:
        details = [*line.split("\\"), "", ""][2].split()     # the third of the lines that -o has joined
        self.kinds[name] = details[0] if details and details[0].isalnum() else ""
        words = line.split()
        for key, into in (("master", self.bridges), ("dev", self.peers), ("remote", self.remotes)):
            if key in words[:-1]:
                into.setdefault(name, words[words.index(key) + 1])
        if peer and not re.fullmatch(r"if\d+|NONE", peer):
            self.peers[name] = peer

    def _open_vswitch(self, text: str) -> None:
        import json
        try:
            for name, kind, (_, pairs) in json.loads(text)["data"]:
                options = dict(pairs)
                if kind == "patch" and "peer" in options:
                    self.kinds[name], self.peers[name] = "patch", str(options["peer"])
                if kind in TUNNELS and "remote_ip" in options:
                    self.kinds[name], self.remotes[name] = kind, str(options["remote_ip"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return                                   # Open vSwitch is stopped

    def ports(self, bridge: str) -> list[str]:
        return [port for port, of in self.bridges.items() if of == bridge]

    def uplinks(self, interface: str) -> tuple[set[str], list[str]]:
        """What leads out of the host from the bridge of an interface: physical interfaces, and tunnels' names."""
        devices: set[str] = set()
        tunnels: list[str] = []
        seen, todo = {interface}, [interface]
        while todo:
            bridge = self.bridges.get(todo.pop())
            for port in self.ports(bridge) if bridge else ():
                if port in seen:
                    continue
                seen.add(port)
                kind, peer = self.kinds.get(port, ""), self.peers.get(port, "")
                if kind in TUNNELS:
                    tunnels.append(port)
                elif kind in ("veth", "patch") and peer in self.bridges:     # on to another bridge of this host
                    seen.add(peer)
                    todo.append(peer)
                elif kind not in ("tun", "patch", "openvswitch") and not re.fullmatch(VM_INTERFACE, port):
                    devices |= self.bottom(port)
        return devices, tunnels

    def bottom(self, device: str, depth: int = 8) -> set[str]:
        """The physical interfaces of which a VLAN, a bond or a bridge is made; the device itself if it is none."""
        below = ([self.peers[device]] if self.kinds.get(device) == "vlan" and device in self.peers else
                 self.ports(device) + self.ports(f"ovs {device}"))
        below = [port for port in below if not re.fullmatch(VM_INTERFACE, port) and self.kinds.get(port) != "tun"
                 and port != device]
        return {found for port in below for found in self.bottom(port, depth - 1)} if depth and below else {device}


def bridge_uplinks(run: Run, vif: str, links: Links) -> tuple[list[str], bool]:
    """The physical interfaces behind the bridge (or Open vSwitch) of a vif, and whether it leads into a tunnel."""
    devices, tunnels = links.uplinks(vif)
    for tunnel in tunnels:
        carrier, remote = links.peers.get(tunnel), links.remotes.get(tunnel, "")
        if not carrier and re.fullmatch(r"[0-9A-Fa-f.:]+", remote):
            carrier = word_after("dev", run(f"ip -o route get {quote(remote)}"))
        devices |= links.bottom(carrier) if carrier else set()
    if not devices:
        bridge = links.bridges.get(vif)
        why = (f"its bridge {bridge.removeprefix('ovs ')} has no physical interface" if bridge else
               "it is in no bridge" if vif in links.kinds else "there is no such interface")
        raise RemoteCommandError(f"can't find the physical interface behind {vif}: {why}: give it with -i (there are: "
                                 f"{', '.join(sorted(name for name in links.kinds if name != 'lo'))})")
    return sorted(devices), bool(tunnels)


def physical_interfaces(run: Run, asked: Sequence[str], vif: str, links: Links | None) -> tuple[Sequence[str], bool]:
    """Those to capture on, and whether they carry a tunnel; eth0 if none is asked for, and none leads to the vif.

    Without `links` they are those that are asked for.
    """
    if links is None:
        return asked, False
    try:
        return bridge_uplinks(run, vif, links)
    except RemoteCommandError:
        if asked or vif == "eth0" or "eth0" not in links.kinds:
            raise
        return ["eth0"], False


def word_after(word: str, text: str) -> str:
    """The word that follows another one in what `ip` printed; empty if there is none."""
    words = text.split()
    return words[words.index(word) + 1] if word in words[:-1] else ""


# ---- Measurement: traffic ------------------------------------------------------------------------------------

# What a source runs for each pattern of traffic, and the protocol by which that is told from a load.  hping3 begins a
# new flow, from another port, with each packet, unless it is told to keep the port (-k).
PATTERNS = {
    "syn": ("hping3 -q -c {count} -i u{interval} -S -d {size} -p {port} {destination}", TCP),
    "flow": ("hping3 -q -c {count} -i u{interval} -S -k -d {size} -p {port} {destination}", TCP),
    "udp": ("hping3 -q -c {count} -i u{interval} --udp -k -E /dev/urandom -d {size} -p {port} {destination}", UDP),
    "ping": ("hping3 -q -c {count} -i u{interval} --icmp -d {size} {destination}", ICMP)}
PING6 = "ping -q -c {count} -i {interval}e-6 -s {size} -W 1 {destination}"       # hping3 has no IPv6
RATE, USUAL_SIZE, FASTEST_PING6, ENDLESS = 100, 64, 1000, 999_999_999


class Probes(namedtuple("Probes", "pattern rate size port command load",
                        defaults=("syn", RATE, None, None, None, None))):
    """What the sources send: packets of one of PATTERNS, `rate` a second, with `size` bytes of payload, to a `port`.

    Or what another `command` sends, in which {count}, {interval} (µs), {size} and {destination} are filled in.  A size
    or port of None is the usual one.  Beside it the sources may run another command as a `load`, which isn't measured.
    """

    def template(self, destination: str) -> str:
        """The command before anything is filled in."""
        return self.command or (PING6 if self.pattern == "ping" and ":" in destination else PATTERNS[self.pattern][0])

    def source_command(self, count: int, destination: str) -> str:
        """The command that sends so many packets; UsageError if it can't, or has no place for what is asked for."""
        template = self.template(destination)
        chosen = "--source-command" if self.command else f"--traffic {self.pattern}"
        size = self.size if self.size is not None else 0 if self.pattern in ("syn", "flow") else USUAL_SIZE
        values = {"count": count, "interval": max(1, round(1_000_000 / self.rate)), "size": size,
                  "port": self.port or 0, "destination": destination}
        for option, given in (("rate", self.rate != RATE), ("size", self.size is not None),
                              ("port", self.port is not None)):
            if given and f"{{{'interval' if option == 'rate' else option}}}" not in template:
                raise UsageError(f"--{option} means nothing to {chosen}: {template}")
        if not self.command and self.pattern != "ping" and ":" in destination:
            raise UsageError(f"{chosen}: hping3 has no IPv6: --traffic ping has, or a --source-command")
        if template is PING6 and self.rate > FASTEST_PING6:
            raise UsageError(f"--rate {self.rate}: with IPv6 ping sends at most {FASTEST_PING6} a second")

        def fill(found: re.Match[str]) -> str:
            if found[0] in ("{{", "}}"):
                return found[0][0]
            if found[0][1:-1] not in values:
                raise UsageError(f"--source-command: unknown placeholder {found[0]}; there are "
                                 f"{', '.join(f'{{{name}}}' for name in values)}; write {{{{ or }}}} for a brace")
            return str(values[found[0][1:-1]])

        return re.sub(r"\{\{|}}|\{[^{}]*}?|}", fill, template)

    def account(self) -> dict[str, Any]:
        """The same for the report, in which a command has no pattern."""
        return self._asdict() | ({"pattern": None} if self.command else {})

    def told_by(self) -> tuple[int, int | None] | None:
        """Protocol and port that tell the packets from those of the load; None if there is no load."""
        protocol = PATTERNS[self.pattern][1]
        return (protocol, None if protocol == ICMP else self.port or 0) if self.load else None


SYNS = Probes()


def traffic_name(config: Report) -> str:
    """What the traffic of a run is called, for people and in the name of a saved run."""
    traffic = config.get("traffic")
    if not traffic:
        return "passive" if "traffic" in config else ""
    size = f"-{traffic['size']}B" if traffic["size"] else ""
    return f"{traffic['pattern'] or 'command'}-{traffic['rate']}{size}{'-load' if traffic['load'] else ''}"


# ---- Measurement: planning -----------------------------------------------------------------------------------

SNAPLEN, OVERLAY_SNAPLEN = 128, 448                  # Ethernet, two tags, IPv6, TCP with options; the same in a tunnel
BUFFER_KIB = 16384
STAGES_BUFFER, LARGEST_TRACE = 8192, 1 << 28         # KiB for a processor; bytes for all of a run
SMALLEST_FILE, USUAL_CAPTURE = 1 << 16, 256_000_000  # bytes for which there must be room, and that are enough
OFFLOADS = ("generic-receive-offload", "generic-segmentation-offload", "large-receive-offload", "rx-vlan-offload",
            "tcp-segmentation-offload", "tx-vlan-offload")


class Flows:
    """The traffic to be captured, as pcap-filter(7) expressions, in which `and` binds no stronger than `or`.

    That is all IP packets between the sources (all hosts, if none is given) and the destination, addresses of one IP
    version, in the directions; or those of the `probes` alone, a protocol and a port (None: any).
    """

    def __init__(self, sources: Sequence[str], destination: str, directions: Sequence[Direction],
                 probes: tuple[int, int | None] | None = None) -> None:
        self._sources, self._destination, self._directions = sources, destination, directions
        self._probes = probes
        self._six, self._kind = ":" in destination, "0x86dd" if ":" in destination else "0x0800"

    def _between(self, term: Callable[[bool, str], str]) -> str:
        """The expression made of terms for an address at the beginning (False) or the end (True) of the way."""
        ways = []
        for direction in self._directions:
            near = " or ".join(term(direction is OUT, source) for source in self._sources)
            ways.append(f"({near}) and " * bool(near) + term(direction is IN, self._destination))
        return " or ".join(f"({way})" for way in ways)

    def plain(self) -> str:
        """The traffic itself."""
        between = self._between(lambda end, address: f"{'dst' if end else 'src'} host {address}")
        version = "ip6" if self._six else "ip"
        return f"{version} and {self._probe(version, 0)}({between})"

    def _probe(self, of: str, at: int) -> str:
        """What tells the probes, by bytes, where the IP header begins there."""
        if not self._probes:
            return ""
        protocol, port = self._probes
        ports = "" if port is None else f" and ({of}[{at + 20}:2] = {port} or {of}[{at + 22}:2] = {port})"
        return f"{of}[{at + 6}] = {ICMPV6} and " if self._six else f"{of}[{at + 9}] = {protocol}{ports} and "

    def _bytes(self, of: str, at: int) -> str:
        """The same by bytes of a frame ("ether"), or of what UDP carries, where the IP header begins there."""
        def term(end: bool, address: str) -> str:
            packed, place = _packed(address), at + (8 + 16 * end if self._six else 12 + 4 * end)
            words = (f"{of}[{place + i}:4] = 0x{packed[i:i + 4].hex()}" for i in range(0, len(packed), 4))
            return f"({' and '.join(words)})"

        return f"{of}[{at - 2}:2] = {self._kind} and {self._probe(of, at)}({self._between(term)})"

    def _tunnelled(self) -> str:
        """VXLAN, Geneve and GRE packets that may carry the traffic.

        It looks inside where that is at a fixed place (in VXLAN, and Geneve without options, over IPv4 and without an
        inner tag), and takes all other packets of tunnels.
        """
        ports = " or ".join(f"udp dst port {port}" for port in TUNNEL_PORTS)
        inner = f"udp[28:2] != {self._kind} or ({self._bytes('udp', 30)})"
        return (f"(ip and ({ports}) and ((udp dst port {GENEVE_PORT} and udp[8] & 0x3f != 0) or {inner})) or "
                f"(ip6 and ({ports})) or ip proto {GRE} or ip6 proto {GRE}")

    def _tagged(self, at: int, overlay: bool) -> str:
        """The traffic, also in tunnels (all that they carry), in a frame whose IP header begins there."""
        terms = [f"({self._bytes('ether', at)})"]
        for kind, protocol, port in (("0x0800", at + 9, at + 22), ("0x86dd", at + 6, at + 42)) if overlay else ():
            ports = " or ".join(f"ether[{port}:2] = {number}" for number in TUNNEL_PORTS)
            terms.append(f"(ether[{at - 2}:2] = {kind} and (ether[{protocol}] = {GRE} or (ether[{protocol}] = {UDP} "
                         f"and ({ports}))))")
        return " or ".join(terms)

    def expression(self, ethernet: bool, overlay: bool) -> str:
        """What to capture on a physical interface, also under up to two VLAN tags.

        Of received frames the card has taken the tag away, and the plain expression finds them.  In frames that are
        sent it may still be there: bytes tell, since the keyword `vlan` doesn't look at them before libpcap 1.9.
        """
        plain = f"({self.plain()}) or {self._tunnelled()}" if overlay else self.plain()
        first, second = (f"(ether[{at}:2] = 0x8100 or ether[{at}:2] = 0x88a8)" for at in (12, 16))
        return (f"({plain}) or ({first} and ({self._tagged(18, overlay)} or ({second} and "
                f"({self._tagged(22, overlay)}))))" if ethernet else plain)


def capture_command(interface: str, expression: str, tcpdump: str, snaplen: int, packets: int) -> str:
    """The shell command that writes a pcap of so many packets which pass an interface to its standard output.

    A large buffer and nanosecond stamps where this tcpdump, by its usage message, knows them (since 4.0 and 4.6); -p
    leaves the interface's mode alone.
    """
    options = f" -B {BUFFER_KIB}" if "[ -B size ]" in tcpdump else ""
    options += " --time-stamp-precision=nano" if "--time-stamp-precision" in tcpdump else ""
    return f"exec tcpdump -i {quote(interface)} -p -nn -s {snaplen}{options} -c {packets} -w - -- {quote(expression)}"


# Prints what the hypervisor tells of itself and its interfaces, in sections, and by few processes.
FACTS_COMMAND = r"""{
echo "= kernel"; read -r line </proc/sys/kernel/osrelease; echo "$line"
echo "= load"; read -r line </proc/loadavg; echo "$line"; echo "= cpus"; grep -c ^processor /proc/cpuinfo
echo "= free"; df -Pk "${TMPDIR:-/tmp}"; echo "= link"; ip -o link
echo "= ovs"; ovs-vsctl --version; echo "= backend"; cat /etc/xensource/network.conf
for d in /sys/class/net/*/device; do
  [ ! -e "$d" ] || [ -e "$d/physfn" ] || {
    p=${d%/device} p=${p##*/}; echo "= card $p"; echo `readlink "$d/driver"`; ethtool -k "$p"
  }
done
echo "= tcpdump"; tcpdump --help 2>&1; printf '\n= status\n%s\n' $?
} 2>/dev/null"""


class Facts:
    """What a hypervisor says of itself, by the output of FACTS_COMMAND.

    `tcpdump` is its usage message, `free` the bytes where captures go (None if it doesn't tell), and `links` are by
    name the words of `ip -o link`, of which the first is an index that no other interface gets.
    """

    def __init__(self, text: str) -> None:
        parts = (part.partition("\n") for part in f"\n{text}".split("\n= "))
        self._sections = {name.strip(): body for name, _, body in parts}
        self.tcpdump = self._sections.get("tcpdump", "")
        self.has_tcpdump = self._words("status") not in (["126"], ["127"])
        kib = "".join(self._words("free")[-3:-2])    # available, in percent, mounted on
        self.free = int(kib) * 1024 if re.fullmatch(r"\d{1,15}", kib, re.ASCII) else None
        links = map(str.split, self._sections.get("link", "").splitlines())
        self.links = {words[1].rstrip(":").partition("@")[0]: words for words in links if len(words) > 1}

    def _words(self, section: str) -> list[str]:
        return self._sections.get(section, "").split()

    def platform(self, pifs: Iterable[str], vif: str) -> dict[str, Any]:
        """The platform (RFC 8172), as far as it is known."""
        bridge, backend = word_after("master", " ".join(self.links.get(vif, ()))), "".join(self._words("backend")[:1])
        ovs = [word for word in self._words("ovs") if re.fullmatch(r"\d[\d.]{1,20}", word, re.ASCII)]
        cards = {}
        for pif in pifs:
            if lines := self._sections.get(f"card {pif}", "").splitlines():
                on = [name for line in lines if (name := line.partition(": on")[0]) in OFFLOADS]
                cards[pif] = {"driver": os.path.basename(lines[0]), "offloads": on}
        open_vswitch = bridge == "ovs-system" or (not bridge and backend in ("openvswitch", "vswitch"))
        version = re.search(r"^tcpdump version (\S+)", self.tcpdump, re.MULTILINE)
        cpus, load = "".join(self._words("cpus")), self._words("load")[:3]
        known = {
            "kernel": "".join(self._words("kernel")[:1]), "tcpdump": version and version[1],
            "switch": " ".join(["Open vSwitch", *ovs[:1]]) if open_vswitch else "bridge" if bridge or backend else "",
            "cpus": is_number(cpus) and int(cpus), "pifs": cards,
            "load": [float(word) for word in load if re.fullmatch(r"\d{1,6}\.\d\d", word, re.ASCII)]}
        return {name: value for name, value in known.items() if value}


# What is to be done on the hypervisor.  `captures` are (side, interface, command); each ends after `limit` packets, if
# that isn't None, and its file has `largest_file` bytes at the most.  `facts` are those before the run.
Plan = namedtuple("Plan", "vif pifs overlay facts captures limit largest_file trace")


def trace_command(facts: Facts, kib: int, direction: str, vif: str, pifs: Iterable[str]) -> str:
    """The shell commands that trace the way between interfaces beside the captures, with buffers of so many KiB."""
    most = LARGEST_TRACE if facts.free is None else min(LARGEST_TRACE, facts.free // 4)
    names = " ".join(map(quote, (vif, *pifs)))
    return (f"{TRACING}if stages {kib} {most // 1024} {direction} {names} 2>stages-errors\n"
            'then echo "stages on ${kind:--}" >&2\nelse echo "stages off" `tail -n 1 stages-errors` >&2\nfi')


def make_plan(facts: Facts, vif: str, pifs: Sequence[str], overlay: bool, flows: Flows, expression: str | None,
              own: Mapping[str, str | None], count: int, trace: str) -> Plan:
    """What to capture, and how, while `count` packets are sent; CaptureError if it can't be done.

    `expression` and `own`, by side, are a filter and whole commands instead of ours; `trace` is run beside them.
    """
    if vif in pifs:
        raise UsageError(f"{vif} is the VM's own interface, and can't be the physical one (-i), too")
    if not facts.has_tcpdump:
        raise CaptureError(f"can't run tcpdump: {last_line(facts.tcpdump)} (install it there: apt-get install tcpdump)")
    interfaces = [*(("pif", pif) for pif in (pifs[:1] if own["pif"] else pifs)), ("vif", vif)]
    snaplen = OVERLAY_SNAPLEN if overlay else SNAPLEN
    most = max(USUAL_CAPTURE, 4 * count * (RECORD_HEADER + snaplen))     # of several sources, and both directions
    room = most if facts.free is None else min(most, facts.free // 2 // len(interfaces))
    if room < SMALLEST_FILE:
        raise CaptureError(f"no space left in /tmp (or $TMPDIR) there: {facts.free} bytes free")
    limit, captures = room // (RECORD_HEADER + snaplen), []
    for side, interface in interfaces:
        ethernet = "link/ether" in facts.links.get(interface, ["link/ether"])
        ours = expression or (flows.plain() if side == "vif" else flows.expression(ethernet, overlay))
        command = own[side] or capture_command(interface, ours, facts.tcpdump, snaplen, limit)
        captures.append((side, interface, command))
    ends, largest = (None, most) if any(own.values()) else (limit, PCAP_HEADER + room)
    return Plan(vif, pifs, overlay, facts, captures, ends, largest, trace)


class Hosts:
    """The connections of a run: to the hypervisor, and to those sources that can be used; `failed` are the others."""

    def __init__(self, hypervisor: Host, sources: dict[str, Host], failed: dict[str, NetWeaverError]) -> None:
        self.hypervisor, self.sources, self.failed = hypervisor, sources, failed
        self.fail({})

    def fail(self, errors: Mapping[str, NetWeaverError]) -> None:
        """Leaves out sources that are of no use; raises the first error of all if none is left."""
        self.failed.update(errors)
        for name in errors:
            self.sources.pop(name, None)
        if self.failed and not self.sources:
            raise next(iter(self.failed.values()))

    def close(self, wait: bool) -> None:
        """Ends all that still runs on the hosts; without `wait` they do that by themselves when they notice."""
        hosts = {self.hypervisor, *self.sources.values()}
        try:
            if wait:
                in_parallel(*(host.leave for host in hosts))
        finally:
            for host in hosts:
                host.close()


def attempt_all(call: Callable[[str], Any], names: Iterable[str]) -> tuple[dict[str, Any], dict[str, NetWeaverError]]:
    """Calls a function with each name, all at once; what it returned, and the errors, by name."""
    errors: dict[str, NetWeaverError] = {}

    def attempt(name: str) -> Any:
        try:
            return call(name)
        except NetWeaverError as error:
            errors[name] = error
            return None

    names = list(names)
    found = dict(zip(names, in_parallel(*(lambda name=name: attempt(name) for name in names),
                                        seconds=5 * CONNECT_SECONDS)))
    return {name: found[name] for name in names if name not in errors}, errors


def connect_hosts(settings: Sequence[HostSettings], connect: Callable[[HostSettings], Host]) -> Hosts:
    """Connects to all hosts at once, of which the first is the hypervisor; the others may fail but for one."""
    by_name = {each.name: each for each in settings}
    hosts, failed = attempt_all(lambda name: connect(by_name[name]), by_name)
    first, *others = (each.name for each in settings)
    try:
        if first in failed:
            raise failed[first]
        return Hosts(hosts[first], {name: hosts[name] for name in others if name in hosts}, failed)
    except NetWeaverError:
        for host in hosts.values():
            host.close()
        raise


def addresses_in_traffic(host: Host, destination: str) -> list[str]:
    """The addresses which a source's packets to the destination may carry; RemoteCommandError if none is known.

    That is the one under which it was reached, and the one its routing chooses: management and traffic often have
    networks of their own.
    """
    routed = word_after("src", host.run(f"ip -o route get {destination}").output)
    known = [resolve(address) for address in (host.address, routed) if re.fullmatch(r"[0-9A-Fa-f.:]{2,45}", address)
             and (":" in address) == (":" in destination)]
    if not known:
        raise RemoteCommandError(f"{host.name}: can't tell which address its packets to {destination} carry: say by "
                                 f"--filter what to capture, as 'src host ADDRESS and dst host {destination}'")
    return known


# ---- Measurement: recording ----------------------------------------------------------------------------------

HANDED_OVER_SECONDS, SHORTEST_WAIT = 1.0, 0.1        # the kernel keeps its blocks of packets for up to 1 s
LOAD_SECONDS = 1.0                                   # from the start of the load to that of the probes

# What a run has captured: where it is on the hypervisor, the time that counts, and what is to be said of it.  `counts`
# are by side what tcpdump said at the end.
Recording = namedtuple("Recording", "plan job sftp window config interrupted counts")


def tcpdump_counts(lines: Iterable[str]) -> dict[str, int]:
    """What tcpdump said at its end: packets `captured`, `received` by the filter, `dropped` by kernel and interface.

    Counts that it didn't print are missing.
    """
    names = {"captured": "captured", "received by filter": "received", "dropped by kernel": "dropped",
             "dropped by interface": "dropped_by_interface"}
    counts = {}
    for line in lines:
        number, _, what = line.strip().replace("packets ", "packet ").partition(" packet ")
        if what in names and is_number(number):
            counts[names[what]] = int(number)
    return counts


def transmitted(errors: str) -> int | None:
    """How many packets a source command says it has sent, as hping3 does; None if it doesn't say."""
    found = re.search(r"^(\d{1,9}) packets transmitted", errors, re.MULTILINE | re.ASCII)
    return int(found[1]) if found else None


class Recorder:
    """Records: runs the captures of a plan, and the traffic meanwhile.

    `timeout` bounds the traffic and `wait` is for how long to wait for its last packets (seconds).  `interrupted` says
    whether to end the traffic now, `tick` is called once a second with the seconds so far.
    """

    def __init__(self, hosts: Hosts, plan: Plan, changed: threading.Condition, timeout: float, wait: float,
                 interrupted: Callable[[], bool], tick: Callable[[float], None] | None) -> None:
        self._hosts, self._plan, self._changed, self._timeout, self._wait = hosts, plan, changed, timeout, wait
        self._interrupted, self._tick = interrupted, tick
        commands = [command for _, _, command in plan.captures]
        lines = [f"capture {number} {quote(command)}" for number, command in enumerate(commands, 1)]
        self._job = hosts.hypervisor.start("\n".join([CAPTURES, plan.trace, *lines, "until wait; do :; done"]),
                                           timeout + wait + 6 * ANSWER_SECONDS, private=True, shown=commands)
        self._until(lambda: self._job.ended or (
            all(map(ready, self._said())) and bool(self._stages() or not plan.trace)), ANSWER_SECONDS)
        self._check_captures()
        self._incidents = [f"the {side}'s command didn't say that it is listening: packets at the start may be missing"
                           for (side, _, _), said in zip(plan.captures, self._said()) if not ready(said)]
        if plan.trace and not self._stages().startswith("on"):
            self._incidents.append("the kernel tells no stages: "
                                   f"{self._stages().removeprefix('off').strip() or 'no answer'} (tracefs needs root)")
        version = re.search(r"libpcap version (\d)\.(\d)\b", plan.facts.tcpdump)
        if version and version.groups() < ("1", "9") and any(re.search(r"\bvlan\b", command) for command in commands):
            self._incidents.append(f"by the keyword vlan libpcap {version[1]}.{version[2]} finds no tagged frames that "
                                   "are sent: test bytes instead, such as ether[12:2] = 0x8100")

    def record(self, source_command: str, load: str | None, whole: bool, config: Report,
               after: Callable[[], Any]) -> Recording:
        """Runs the traffic, and stops the captures when the kernel has handed over what they saw.

        The `load` runs from before the traffic until after it.  `whole` says that the traffic should end by itself;
        what the report says of the run is added to the config.
        Meanwhile calls `after`, which returns the session in which the files can be fetched.
        """
        found: dict[str, Any] = {"started": iso_time(time.time_ns())}
        marks = [self._mark()]
        found |= self._generate(source_command, load, whole)
        marks.append(self._mark())
        end = time.monotonic() + HANDED_OVER_SECONDS + max(self._wait, SHORTEST_WAIT)
        sftp = after()
        self._until(lambda: self._job.ended, end - time.monotonic())
        self._check_captures()
        marks.append(self._mark())
        self._job.stop()
        if not self._until(lambda: self._job.ended, ANSWER_SECONDS) and self._job.status is None:
            raise CaptureError(f"{self._job.name}: a capture doesn't end")
        self._hosts.hypervisor.check_job(self._job)
        window = self._window(marks)
        if window is not ALWAYS:
            found["window"] = {name: iso_time(getattr(window, name)) for name in ("start", "end", "watched_until")}
        self._incidents += [f"a source failed, so its traffic is missing or not whole: {error}"
                            for error in self._hosts.failed.values()]
        if self._stages().startswith("on"):
            found["backend"] = {"tap": "tap", "vif": "netback"}.get(self._stages()[3:].strip(), "")
        counts: dict[str, dict[str, int]] = {"pif": {}, "vif": {}}
        for (side, _, _), said in zip(self._plan.captures, self._said()):
            for name, packets in tcpdump_counts(said).items():
                counts[side][name] = counts[side].get(name, 0) + packets
        return Recording(self._plan, self._job, sftp, window, {**config, **found, "incidents": self._incidents},
                         self._interrupted(), counts)

    def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Waits for a condition on the jobs; False if the time is over."""
        with self._changed:
            return self._changed.wait_for(condition, seconds)

    def _said(self) -> list[list[str]]:
        """The lines of each capture; the last one is "exit STATUS" when it has ended."""
        lines = [line.partition(" ") for line in self._job.errors.splitlines()]
        return [[text for number, _, text in lines if number == str(place)]
                for place in range(1, len(self._plan.captures) + 1)]

    def _stages(self) -> str:
        """What the host said of the trace: "on", with what is behind the vif, or "off", and why."""
        return "".join(re.findall(r"^stages (o.*)$", self._job.errors, re.MULTILINE)[:1])

    def _check_captures(self) -> None:
        """Raises CaptureError, in tcpdump's words, if a capture has ended by itself, but for its limit."""
        plan, name = self._plan, self._job.name
        self._hosts.hypervisor.check_job(self._job)
        for (side, interface, _), said in zip(plan.captures, self._said()):
            if not over(said):
                if self._job.ended:
                    raise CaptureError(f"{name}: the captures can't run: {last_line(self._job.errors)}")
            elif said[-1] != "exit 0" or not plan.limit or tcpdump_counts(said).get("captured", 0) < plan.limit:
                if said[-1] == "exit 0":             # somebody has ended it, and maybe all that runs there
                    self._until(lambda: self._job.ended, 2)
                    self._hosts.hypervisor.check_job(self._job)
                words = "; ".join(line.strip() for line in said[:-1] if "listening on" not in line)
                raise CaptureError(f"{name}: the capture on {interface} ended with status {said[-1][5:]}: "
                                   f"{words[-500:] or 'no message'}{self._hint(side, interface, words)}")

    def _hint(self, side: str, interface: str, words: str) -> str:
        if "permi" in words:
            return " (log in as root, or use --sudo)"
        if "No such device" not in words and "doesn't exist" not in words:
            return ""
        names = sorted(self._plan.facts.links, key=lambda name: (bool(re.fullmatch(VM_INTERFACE, name)), name))
        own = [name for name in names if re.sub(r"\d+(-emu)?$", "", name) == re.sub(r"\d+(-emu)?$", "", interface)]
        if side == "vif" and own:
            return f" (the VM has: {', '.join(own)})"
        shown = ", ".join(names[:40]) + (", ..." if len(names) > 40 else "")
        return f" (there are: {shown}): " + ("-i auto finds the physical interface" if side == "pif" else
                                             "a VM's interface that is an SR-IOV function has no device here")

    def _mark(self) -> tuple[int, bool, int] | None:
        """Now, in nanoseconds: the hypervisor's clock, whether that is exact, and ours, which only goes forward."""
        told = re.match(r"(\d{10})(\d{9})?", self._job.time())
        return (int(told[1]) * NANOSECONDS + int(told[2] or 0), bool(told[2]), time.monotonic_ns()) if told else None

    def _window(self, marks: Sequence[tuple[int, bool, int] | None]) -> Window:
        """The window by the times when the traffic began and ended, and when the captures were stopped."""
        known = [mark for mark in marks if mark]
        exact = len(known) == len(marks) and all(mark[1] for mark in known)
        if not exact:
            self._incidents.append("the hypervisor's date doesn't tell nanoseconds (busybox?): other traffic at the "
                                   "beginning and the end may be counted as lost")
        if len(known) < len(marks):
            return ALWAYS
        (start, _, begun), (end, _, _), (stop, _, ended) = known
        step = (stop - start) - (ended - begun)
        if abs(step) > NANOSECONDS * (1 if exact else 2):
            self._incidents.append(f"the hypervisor's clock was set by about {step / NANOSECONDS:.0f} s during the "
                                   "run: delays across that moment are wrong; measure again")
            return ALWAYS
        return Window(start, end + (0 if exact else NANOSECONDS), stop - int(HANDED_OVER_SECONDS * NANOSECONDS),
                      int(self._wait * NANOSECONDS))

    def _start(self, command: str, lead: float = 0) -> dict[str, Job]:
        """Starts a command on all sources, and waits a little, if asked to, for one that fails at once."""
        hosts = self._hosts
        jobs, errors = attempt_all(lambda name: hosts.sources[name].start(
            f"exec >/dev/null\n{command}", self._timeout + 2 * ANSWER_SECONDS, shown=[command]), hosts.sources)
        hosts.fail(errors)
        if lead:
            self._until(lambda: any(job.ended for job in jobs.values()) or self._interrupted(), lead)
            self._check(jobs, command)
        return jobs

    def _check(self, jobs: Mapping[str, Job], command: str) -> None:
        """Leaves out the sources whose jobs have failed."""
        def check(name: str) -> None:
            self._hosts.sources[name].check_job(jobs[name])
            check_generator(jobs[name], command)

        self._hosts.fail(attempt_all(check, [name for name in jobs if name in self._hosts.sources])[1])

    def _stop(self, jobs: Iterable[Job]) -> None:
        running = [job for job in jobs if not job.ended]
        for job in running:
            job.stop()
        if not self._until(lambda: all(job.ended for job in running), ANSWER_SECONDS):
            raise RemoteCommandError(f"{', '.join(job.name for job in running if not job.ended)}: the source command "
                                     "doesn't end")

    def _generate(self, command: str, load: str | None, whole: bool) -> dict[str, Any]:
        """Runs the traffic to its end, to the time-out or to an interruption; returns what the report says of it."""
        hosts = self._hosts
        loads = self._start(load, LOAD_SECONDS) if load else {}
        begun, jobs = time.monotonic(), self._start(command)
        in_time = self._watch(lambda: (
            (bool(jobs) and all(job.ended for job in jobs.values())) or self._interrupted() or self._job.ended
            or any(map(over, self._said()))))
        self._check_captures()
        self._check(jobs, command)
        self._incidents += [f"{job.name}: the load ended before the probes: {last_line(job.errors)}"
                            for job in loads.values() if job.ended]
        running = [job for job in jobs.values() if not job.ended]
        if running and not in_time and whole:
            self._incidents.append(f"the source command was stopped after {self._timeout:g} s (--duration measures for "
                                   "longer)")
        self._stop(running)
        found: dict[str, Any] = {"duration": round(time.monotonic() - begun, 3)}
        self._stop(loads.values())
        sent = [transmitted(job.errors) for job in jobs.values()]
        if sent and None not in sent and not running and not hosts.failed:
            found["transmitted"] = sum(filter(None, sent))
        return found

    def _watch(self, done: Callable[[], bool]) -> bool:
        """Waits for the end of the traffic, telling once a second how far it is; False if the time is over."""
        begun = time.monotonic()
        while (left := begun + self._timeout - time.monotonic()) > 0:
            if self._until(done, min(left, 1) if self._tick else left):
                return True
            if self._tick:
                self._tick(time.monotonic() - begun)
        return self._until(done, 0)


def over(said: Sequence[str]) -> bool:
    """Whether a capture of which these are the lines has ended."""
    return any(line.startswith("exit ") for line in said[-1:])


def ready(said: Sequence[str]) -> bool:
    """Whether it listens, or has ended."""
    return over(said) or any("listening on" in line for line in said)


def check_generator(job: Job, command: str) -> None:
    """Raises what is wrong with a source command that has ended; exit status 1 for "no reply" is no failure."""
    program = os.path.basename((command.split() or [""])[0])
    unanswered = transmitted(job.errors) is not None or program in ("ping", "ping6")
    if not job.ended or job.stopped or job.status == 0 or (job.status == 1 and unanswered):
        return
    hint = (SUDO_HINT if job.status is None and "sudo" in job.errors else
            " (install it there, or choose another --source-command)" if job.status == 127 else "")
    what = ("the source command could not be run" if job.status is None else f"{command}: exit status {job.status}")
    raise RemoteCommandError(f"{job.name}: {what}: {last_line(job.errors)}{hint}")


def check_tools(host: Host, probes: Iterable[Probes], destination: str) -> None:
    """RemoteCommandError if a source lacks the programs that it is to run."""
    commands = [command for each in probes for command in (each.load, each.template(destination))]
    for tool in dict.fromkeys(command.split()[0] for command in commands if command):
        if "=" not in tool and host.run(f"command -v {quote(tool)}").status:
            raise RemoteCommandError(f"{host.name}: {tool}: not found (install it there, or choose another --traffic)")


def fetch_captures(host: Host, recording: Recording, directory: str, paths: dict[str, list[str]]) -> None:
    """Copies the captures into a local directory and removes them there; adds their paths by side."""
    for number, (side, _, _) in enumerate(recording.plan.captures, 1):
        local = os.path.join(directory, f"{side}{len(paths[side]) or ''}.pcap")
        host.fetch(recording.sftp, f"{recording.job.directory}/{number}.pcap", local, recording.plan.largest_file)
        paths[side].append(local)
    left = LARGEST_TRACE
    for name in sorted(recording.sftp.listdir(recording.job.directory)) if "backend" in recording.config else ():
        if re.fullmatch(TRACE_FILE, name):
            host.fetch(recording.sftp, f"{recording.job.directory}/{name}", os.path.join(directory, name), left)
            left -= os.path.getsize(os.path.join(directory, name))
    recording.job.leave()


MOST_PLACES = 1000                                   # in the kernel where packets are freed, of which names are asked
TRACE_FILE = r"trace-(cpu\d{1,4}|formats|stats|offset)"


def find_symbols(run: Run, addresses: Iterable[int]) -> str:
    """The names of the kernel's functions around some addresses: a line "address name" of each."""
    asked = " ".join(f"{address:016x}" for address in addresses)
    return asked and run(
        f"{{ printf '%s ?\\n' {asked}; awk '$2 ~ /[tT]/ {{ print $1, $3 }}' /proc/kallsyms; }} | LC_ALL=C sort | "
        """awk '$2 == "?" { print $1, last; next } { last = $2 }'""")


def check_interface(host: Host, plan: Plan, find_vif: Callable[[], str]) -> None:
    """RemoteCommandError if the VM has another interface now than when the captures began."""
    advice = "the VM was moved, restarted or unplugged during the run: measure again"
    try:
        now = find_vif()
    except RemoteCommandError as error:
        raise RemoteCommandError(f"{error}: {advice}") from None
    index = host.run(f"ip -o link show dev {quote(plan.vif)}").output.split()[:1]
    before = plan.facts.links.get(plan.vif)
    if now != plan.vif or (before and index != before[:1]):
        became = f"is {now} now" if now != plan.vif else "is another one now" if index else "is gone"
        raise RemoteCommandError(f"{host.name}: {plan.vif} {became}: {advice}")


# ---- Measurement: analysing what was captured ----------------------------------------------------------------

# What came of two captures: the result of each direction, by side what was in the files, what was odd, what
# `guest_times` found if both directions were measured, and of each direction what `account` did.
Analysis = namedtuple("Analysis", "results counts warnings guest accounts", defaults=((),))
SavedRun = namedtuple("SavedRun", "report paths selection window limit")


def analyze_captures(paths: Mapping[str, Sequence[str]], selection: Selection, window: Window = ALWAYS,
                     limit: int | None = None) -> Analysis:
    """Analyses pcap or pcapng files, several of one side (pif or vif) as one; "-" is standard input.

    `limit` is the number of packets at which a capture was ended.  CaptureError for a file that can't be read,
    UsageError if both sides have the same one.
    """
    from contextlib import ExitStack
    warnings: list[str] = []
    sides: dict[tuple[int, int], str] = {}           # by what is the same of a file under any name
    captures: dict[str, list[Capture]] = {"pif": [], "vif": []}
    with ExitStack() as stack:
        for side, path in [(point, name) for point in captures for name in paths[point]]:
            file = open_capture(path, stack)
            status = os.fstat(file.fileno())
            known = sides.setdefault((status.st_dev, status.st_ino), "")
            if known not in ("", side):
                raise UsageError(f"{path} is given for the pif and for the vif: two captures are compared")
            sides[status.st_dev, status.st_ino] = side
            captures[side] += [] if known else [Capture(file, path)]
        traffic = read(captures, selection)
    ends = [capture.last for each in captures.values() for capture in each if limit and capture.records >= limit]
    if ends:
        window = window._replace(end=min(window.end, *ends), watched_until=min(window.watched_until, *ends))
        warnings.append(f"a capture has reached its limit of {limit} packets (by --count, or half of the hypervisor's "
                        "free space): what came later is in no count")
    counts = {side: file_counts(side, found, warnings) for side, found in captures.items()}
    pif_unit, vif_unit = (counts[side]["precision"] for side in ("pif", "vif"))
    if pif_unit != vif_unit:
        warnings.append(f"the time stamps of the pif are in {pif_unit}, and those of the vif in {vif_unit}: all were "
                        "brought to the coarser unit")
    matchings = [match(traffic.pop(0), window) for _ in selection.directions]        # its table of identities is large
    results = [classify(matching, window) for matching in matchings]
    return Analysis(results, counts, warnings, guest_times(results[0], matchings[1]) if len(results) > 1 else None)


def trace_streams(directory: str, lost: list[int]) -> Iterator[Event]:
    """The events of a trace in order of time; what is lost is added to `lost`."""
    from heapq import merge
    formats, offset = trace_formats(trace_text(directory, "formats")), trace_text(directory, "offset").split()[:1]
    base = int(offset[0]) if offset and re.fullmatch(r"\d{1,19}", offset[0], re.ASCII) else 0
    streams = []
    for name in sorted(os.listdir(directory)):
        if re.fullmatch(r"trace-cpu\d{1,4}", name):
            with open(os.path.join(directory, name), "rb") as file:
                streams.append(trace_events(file.read(LARGEST_TRACE), formats, base, lost))
    return merge(*streams, key=lambda event: event.when)


def trace_text(directory: str, name: str) -> str:
    try:
        with open(os.path.join(directory, f"trace-{name}"), encoding="utf-8", errors="replace") as file:
            return file.read(LARGEST_TRACE)
    except FileNotFoundError:
        return ""


def trace_locations(directory: str) -> list[int]:
    """Where packets were freed."""
    return sorted({event.end[1] for event in trace_streams(directory, [])} - {0})[:MOST_PLACES]


def with_stages(analysis: Analysis, directory: str, config: Report) -> Analysis:
    """The same with what the kernel's trace in a directory tells of its packets, if there is one."""
    if "backend" not in config:
        return analysis
    symbols = {int(address, 16): name for address, _, name in (
        line.partition(" ") for line in trace_text(directory, "symbols").splitlines())
        if re.fullmatch(r"[0-9a-f]{16}", address) and name}
    results, accounts, warnings = [], [], list(analysis.warnings)
    for result in analysis.results:
        lost: list[int] = []
        direction = result.matching.direction
        found = passages(trace_streams(directory, lost), config["vif"], direction)
        stages, told = account(result, found, symbols, config["backend"] if direction is IN else "")
        results.append(result._replace(stages=stages))
        accounts.append(told)
    counted = map(int, re.findall(r"(?:overrun|dropped events): (\d{1,12})", trace_text(directory, "stats")))
    missing, whole = max(sum(lost), sum(counted)), sum(result.matched + result.lost for result in results)
    unattached = sum(each["unattached"] for each in accounts)
    if missing or unattached > whole / 100:
        warnings.append(f"the trace has lost {missing} events, and {unattached} of {whole} packets have no stages: "
                        f"give it a larger buffer (--stages-buffer {4 * config['stages_buffer']}), or send less")
    offsets = trace_text(directory, "offset").split()
    if len(set(offsets)) > 1:
        warnings.append("the hypervisor's clock was set during the run, so the stages may be wrong")
    return analysis._replace(results=results, accounts=accounts, warnings=warnings)


def open_capture(path: str, stack: ExitStack) -> BinaryIO:
    try:
        if path == "-":
            return os.fdopen(0, "rb", closefd=False)
        file = stack.enter_context(open(path, "rb"))
        file.peek(0)                                 # a directory can be opened
        return file
    except OSError as error:
        raise CaptureError(f"{path}: can't read it: {error.strerror}") from error


def file_counts(side: str, captures: Sequence[Capture], warnings: list[str]) -> dict[str, Any]:
    """What was in the files of a side, for the report; what was odd is added to the warnings."""
    for capture in captures:
        if capture.partial:
            warnings.append(f"{side}: the last record of {os.path.basename(capture.name)} is not whole "
                            f"({capture.partial} bytes); the {capture.records} before it are used")
        if capture.cut:
            warnings.append(f"{side}: {capture.cut} packets were cut by the snap length before what identifies them, "
                            "and are left out of all counts: capture more of each packet (tcpdump -s)")
    resolution = min(capture.resolution for capture in captures)
    units = ((NANOSECONDS, "nanoseconds"), (1_000_000, "microseconds"), (1_000, "milliseconds"))
    return {**{name: sum(getattr(capture, name) for capture in captures)
               for name in ("records", "other", "filtered", "cut")},
            "precision": next((unit for least, unit in units if resolution >= least), "seconds")}


def analyze_text(pif_path: str, vif_path: str, direction: Direction, *columns: Any) -> Analysis:
    """Analyses two text captures by the columns which TextCapture describes."""
    captures = {}
    for side, path in (("pif", pif_path), ("vif", vif_path)):
        with open(path, encoding="utf-8", errors="replace") as file:
            captures[side] = TextCapture(file, *columns)
    sent, seen = captures["pif"].times, captures["vif"].times
    if sent and seen and not any(capture.dated for capture in captures.values()):
        days = round((seen[0] - sent[0]) / DAY)      # midnight was between the first packet's sightings
        for i in range(len(seen) if days else 0):
            seen[i] -= days * DAY
    traffic = Traffic(direction)
    for side, capture in captures.items():
        traffic.add(side, capture.identities, capture.times)
    result = classify(match(traffic))
    warnings = [f"{side}: {capture.skipped} lines without a sequence number or time were left out"
                for side, capture in captures.items() if capture.skipped]
    if len(set(result.matching.numbers)) < len(result.matching.numbers):
        warnings.append("are the sequence numbers really in column seq_no_col?")
    counts = {side: {"records": len(capture.times), "skipped": capture.skipped} for side, capture in captures.items()}
    return Analysis([result], counts, warnings, None)


def selection_of(config: Report) -> Selection:
    """The packets that count, by the report's account of what ran."""
    return Selection(DIRECTIONS[config["direction"]], **config["selection"], translated=config["match_nat"])


def load_run(directory: str) -> SavedRun:
    """A run that `keep_run` has kept: its report, its captures, and how to read them."""
    import json
    try:
        with open(os.path.join(directory, "report.json"), encoding="utf-8") as file:
            report = json.load(file)
        config, window = report["config"], ALWAYS
        if times := config.get("window"):
            start, end, watched_until = (parse_time(times[name]) for name in ("start", "end", "watched_until"))
            window = Window(start, end, watched_until, int(config["wait"] * NANOSECONDS))
        paths = {side: [os.path.join(directory, name) for name in sorted(os.listdir(directory))
                        if re.fullmatch(rf"{side}\d*\.pcap", name)] for side in ("pif", "vif")}
        if not all(paths.values()):
            raise UsageError(f"{directory}: its captures are missing")
        return SavedRun(report, paths, selection_of(config), window, config["capture_limit"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = getattr(error, "strerror", None) or f"it says too little: {error}"
        raise UsageError(f"{directory}: not a directory that --save made: report.json: {why}") from None


def load_runs(directory: str) -> list[SavedRun]:
    """The run in a directory, or those in the directories there, by name."""
    try:
        names = [os.path.join(directory, name) for name in sorted(os.listdir(directory))]
    except OSError as error:
        raise UsageError(f"{directory}: can't read it: {error.strerror}") from error
    runs = [name for name in names if os.path.exists(os.path.join(name, "report.json"))]
    alone = not runs or os.path.exists(os.path.join(directory, "report.json"))
    return list(map(load_run, [directory] if alone else runs))


def kind_of(config: Report) -> dict[str, Any]:
    """What runs that are compared must share: the VM, the direction and the traffic."""
    return {"vm": config.get("name_label") or config.get("vif"), "direction": config["direction"],
            "traffic": config.get("traffic")}


def keep_run(directory: str, name: str, files: Iterable[str], report: Report) -> str:
    """Makes a directory of that name, or one like it, with copies of the files and the report; returns its path."""
    import json
    import shutil
    made = ""
    try:
        os.makedirs(directory, exist_ok=True)
        for number in count(1):
            path = os.path.join(directory, f"{name}{f'-{number}' if number > 1 else ''}")
            try:
                os.mkdir(path)
                made = path
                break
            except FileExistsError:                  # another run of this second
                continue
        for file in files:
            shutil.copyfile(file, os.path.join(made, os.path.basename(file)))
        with open(os.path.join(made, "report.json"), "w", encoding="utf-8") as text:
            json.dump({**report, "saved": made}, text)
        return made
    except BaseException as error:
        if made:
            shutil.rmtree(made, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise UsageError(f"can't save in {directory}: {error.strerror}") from error


def iso_time(nanoseconds: int) -> str:
    """A time as ISO 8601 in UTC, with nanoseconds."""
    seconds, fraction = divmod(nanoseconds, NANOSECONDS)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{fraction:09}Z"


def parse_time(text: str) -> int:
    """The time (ns) that `iso_time` wrote; ValueError if it didn't."""
    from calendar import timegm
    return timegm(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S")) * NANOSECONDS + int(text[20:29])


# ---- Measurement: the whole run ------------------------------------------------------------------------------

class NetWeaver:
    """Measures the time that packets take between a hypervisor's physical interface and a VM's virtual one.

    `source_ip` (one, several or none) and `destination_host_ip` are `[user@]host[:port]`; `destination_name_label` is
    the VM's name in the `toolstack` (one of TOOLSTACKS), `destination_ip` its address.  The other parameters are the
    command line's options, times in seconds; `stages` is the size of the trace's buffers in KiB (0: no trace).
    `progress` and `log` are called with lines for people (the steps, and each command run), `tick` once a second while
    traffic runs with the seconds so far, and `ask` with a question for the passphrase of a key.

    Use it as a context manager, or call `close`.  The methods are meant to be called in the order in which they
    stand here; each raises a NetWeaverError that says what happened and where.  For a hypervisor with another
    toolstack, override `determine_vif_number`.
    """

    def __init__(self, source_ip: str | Sequence[str], destination_name_label: str, destination_ip: str,
                 destination_host_ip: str, ssh_key_path: str | None = None, *,
                 host_interface: str | Sequence[str] = (), vif_number: int = 0, vif: str | None = None,
                 toolstack: str = "auto", direction: str = "in", overlay: bool = False,
                 capture_filter: str | None = None, count: int | None = None, duration: float | None = None,
                 timeout: float | None = None, wait: float = SHORTEST_WAIT, match_nat: bool = False, slowest: int = 0,
                 stages: int = 0, labels: Mapping[str, str] | None = None, sudo: bool = False,
                 ssh_options: Iterable[str] = (),
                 ask: Callable[[str], str] | None = None, progress: Callable[[str], None] = lambda line: None,
                 log: Callable[[str], None] = lambda line: None, tick: Callable[[float], None] | None = None) -> None:
        if toolstack not in ("auto", *TOOLSTACKS) or direction not in DIRECTIONS:
            raise UsageError(f"toolstack must be auto, {', '.join(TOOLSTACKS)}, and direction in, out or both")
        if direction == "both" and match_nat:
            raise UsageError("with address translation the two directions can't be told apart: measure in and out "
                             "one after the other")
        sources, pifs = ([given] if isinstance(given, str) else list(given) for given in (source_ip, host_interface))
        if not sources and not duration:
            raise UsageError("without a source (-s) nothing ends the measurement: give its --duration")
        self.destination_name_label, self.destination_ip = destination_name_label, resolve(destination_ip)
        self.host_interfaces, self.vif, self.vif_number = list(dict.fromkeys(pifs)), vif, vif_number
        self.toolstack, self.direction, self.overlay = toolstack, direction, overlay
        self.capture_filter, self.count, self.duration = capture_filter, count, duration
        self.timeout, self.wait = timeout, wait
        self.match_nat, self.slowest, self.labels, self.interrupted = match_nat, slowest, dict(labels or {}), False
        self.stages = stages
        targets = [Target(text) for text in (destination_host_ip, *sources)]
        access = Access(ssh_key_path, ssh_options, ask)
        self._progress, self._tick, self._changed = progress, tick, threading.Condition()
        self._settings, _ = in_parallel(lambda: [access.settings(target) for target in targets], import_paramiko)
        self._connect = lambda settings: access.connect(settings, self._changed, log, sudo)
        self.unchecked = [settings.name for settings in self._settings if settings.checking == "no"]
        self._reportable, self._directory = False, ""
        self._paths: dict[str, list[str]] = {"pif": [], "vif": []}
        self._hosts: Hosts | None = None
        self._recording: Recording | None = None
        self.results: Sequence[Result] = ()

    def __enter__(self) -> NetWeaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(wait=kind is None or issubclass(kind, Exception))

    # -- the seed's public surface --

    def verify_connections(self) -> bool:
        """Connects to all hosts at once; True, or HostConnectionError if the measurement can't be made.

        Of several sources one that can't be used is left out, and named in the report.
        """
        self._connected()
        return True

    def determine_vif_number(self) -> str:
        """The name of the destination VM's interface on the hypervisor, such as vif5.0.

        Asks the toolstack, after it has found one; override it for another (`run_command` is at hand).
        """
        if self.toolstack == "auto":
            self.toolstack, vif = find_toolstack(self.run_command, self.destination_name_label, self.vif_number)
            return vif
        return TOOLSTACKS[self.toolstack](self.run_command, self.destination_name_label, self.vif_number)

    def plan(self, source_command: str | None = None, dest_pif_cmd: str | None = None, dest_vif_cmd: str | None = None,
             probes: Probes = SYNS) -> tuple[Plan, dict[str, Any]]:
        """What `generate_and_record` would do, and the account of it that the report gives as `config`."""
        rate, template, count = probes.rate, source_command or probes.command, self._count(probes)
        seconds = self.duration or (count / rate if probes.load else None)
        command = source_command or self._source_command(probes)
        hosts = self._connected()

        def find_facts() -> tuple[Facts, Links | None]:
            quietly(hosts.hypervisor.open_sftp().close)      # that there is one should be known before the traffic
            facts = Facts(hosts.hypervisor.run(FACTS_COMMAND).output)
            if self.host_interfaces and "auto" not in self.host_interfaces:
                return facts, None
            return facts, Links(self.run_command(LINKS_COMMAND, "name the physical interface with -i"))

        vif, (facts, links), *found = in_parallel(self._find_vif, find_facts, *(
            lambda host=host: addresses_in_traffic(host, self.destination_ip)
            for host in (() if self.capture_filter else hosts.sources.values())))
        addresses = list(dict.fromkeys(address for each in found for address in each))
        pifs, tunnel = self._located(
            lambda: physical_interfaces(self.run_command, self.host_interfaces, vif, links))
        flows = Flows(addresses, self.destination_ip, DIRECTIONS[self.direction], probes.told_by())
        trace = trace_command(facts, self.stages, self.direction, vif, pifs) if self.stages else ""
        own = {"pif": dest_pif_cmd, "vif": dest_vif_cmd}
        plan = self._located(lambda: make_plan(facts, vif, pifs, self.overlay or tunnel, flows, self.capture_filter,
                                               own, count, trace))
        select = self.direction == "both" or (plan.overlay and not self.match_nat)   # else the filter has done it
        return plan, {
            "version": __version__, "hypervisor": hosts.hypervisor.name,
            "sources": [settings.name for settings in self._settings[1:]], "destination": self.destination_ip,
            "name_label": self.destination_name_label, "toolstack": None if vif == self.vif else self.toolstack,
            "direction": self.direction, "match_nat": self.match_nat, "overlay": plan.overlay,
            "filter": self.capture_filter,
            "selection": {"sources": addresses if select and not self.capture_filter else [],
                          "destinations": [self.destination_ip] if select else [], "probes": probes.told_by()},
            "pif": ",".join(plan.pifs), "vif": vif,
            "traffic": probes._replace(command=template).account() if self._settings[1:] else None,
            "source_command": command if self._settings[1:] else None,
            **{f"{side}_command": "\n".join(command for of, _, command in plan.captures if of == side)
               for side in self._paths},
            "capture_limit": plan.limit, "wait": self.wait,
            "timeout": seconds or self.timeout or max(600, count // 5, 2 * count // rate),
            "stages_buffer": self.stages or None, "labels": self.labels,
            "platform": plan.facts.platform(plan.pifs, vif)}

    def generate_and_record(self, source_command: str | None = None, dest_pif_cmd: str | None = None,
                            dest_vif_cmd: str | None = None, probes: Probes = SYNS) -> None:
        """Runs the source command on all sources while the interfaces are captured.

        The defaults are what sends the probes, and tcpdump.  A command of one's own for a capture writes it to its
        standard output, as pcap (`tcpdump -w -`) or as text, and ends upon SIGTERM; the captures are known to listen
        before any traffic starts, and are stopped once it has ended.
        """
        plan, config = self.plan(source_command, dest_pif_cmd, dest_vif_cmd, probes)
        hosts = self._connected()

        def after() -> Any:
            check_interface(hosts.hypervisor, plan, self._find_vif)
            return hosts.hypervisor.open_sftp()

        self._progress("Spawning packet captures...")
        recorder = Recorder(hosts, plan, self._changed, config["timeout"], self.wait, lambda: self.interrupted,
                            self._tick)
        self._reportable = True
        self._recording = recorder.record(config["source_command"] or "", probes.load,
                                          not self.duration and not probes.load, config, after)
        self._progress("Captures finished, waiting for files to flush.")

    def pull_generated_files(self) -> tuple[str, str]:
        """Fetches the captures into a private local directory and removes them from the hypervisor.

        Returns the paths of the pif's and of the vif's capture (several of one side with commas in between); they stay
        until `close`.
        """
        import tempfile
        recording, host = self._recorded(), self._connected().hypervisor
        self._progress("Transferring files...")
        self._remove_files()
        try:
            self._directory = tempfile.mkdtemp(prefix="netweaver-")
        except OSError as error:
            raise CaptureError(f"can't make a directory on this machine: {error}") from error
        fetch_captures(host, recording, self._directory, self._paths)
        if "backend" in recording.config:
            symbols = find_symbols(self.run_command, trace_locations(self._directory))
            with open(os.path.join(self._directory, "trace-symbols"), "w", encoding="utf-8", errors="replace") as file:
                file.write(symbols)
        return ",".join(self._paths["pif"]), ",".join(self._paths["vif"])

    def analyze(self, seq_no_col: int | None = None, timestamp_col: int | None = None,
                seq_no_split_by: str | None = None, seq_no_split_index: int = 0) -> dict[str, Any]:
        """The report on the captures, as the README describes it; NoMatchError if there is no delay in them.

        Without parameters the captures are pcap files.  With them they are text, one packet a line: columns are
        separated by white space and counted from 0, `timestamp_col` is the time's column and `seq_no_col` the
        sequence number's, of which part `seq_no_split_index` counts after a split by `seq_no_split_by`.
        """
        recording = self._recorded()
        config = recording.config
        if seq_no_col is None or timestamp_col is None:
            self._check_written({side: 0 for side, paths in self._paths.items()
                                 if min(map(os.path.getsize, paths)) < PCAP_HEADER})
            analysis = analyze_captures(self._paths, selection_of(config), recording.window, recording.plan.limit)
            analysis = with_stages(analysis, self._directory, config)
            self._check_written({side: counts["records"] for side, counts in analysis.counts.items()})
        else:
            analysis = analyze_text(self._paths["pif"][0], self._paths["vif"][0], DIRECTIONS[self.direction][0],
                                    seq_no_col, timestamp_col, seq_no_split_by, seq_no_split_index)
        capture = {side: {"interface": config[side], **counts} for side, counts in recording.counts.items()}
        report, self.results = build_report(analysis, config, capture, self.slowest), analysis.results
        if failed := self._connected().failed:
            report["failed_sources"] = {name: str(error) for name, error in failed.items()}
        return {**report, "interrupted": True} if recording.interrupted else report

    def save(self, directory: str, report: Report) -> str:
        """Keeps the captures and the report in a new directory there, whole or not at all; returns its path."""
        config = self._recorded().config
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{self.destination_name_label or config['vif']}-{traffic_name(config)}")
        started = re.sub(r"[-:]|\..*", "", config["started"])
        files = [os.path.join(self._directory, file) for file in sorted(os.listdir(self._directory))]
        return keep_run(directory, f"{started}Z-{name}", files, report)

    def dry_run(self, probes: Sequence[Probes]) -> list[str]:
        """Logs in, looks for all that is needed, and returns lines on what would be run; raises what is missing."""
        hosts, (plan, config) = self._connected(), self.plan(probes=probes[0])
        for host in hosts.sources.values():
            check_tools(host, probes, self.destination_ip)
        for error in hosts.failed.values():
            raise error
        lines = [f"{name}: {config[name]}" for name in ("hypervisor", "toolstack", "vif", "pif") if config[name]]
        lines += [f"{hosts.hypervisor.name}: {command}" for _, _, command in plan.captures]
        commands = dict.fromkeys(command for each in probes for command in (
            each.load, self._source_command(each)) if command)
        return [*lines, *(f"{name}: {command}" for name in hosts.sources for command in commands),
                "All is there; nothing was sent."]

    # -- for subclasses, and for the end --

    def run_command(self, command: str, hint: str = "", seconds: float = ANSWER_SECONDS) -> str:
        """The standard output of a shell command on the hypervisor; RemoteCommandError, with the hint, if it fails."""
        host = self._connected().hypervisor
        job = host.run(command, seconds)
        if job.status == 127:
            hint = "--toolstack says which one this host has; --vif names the interface itself"
        if job.status:
            raise RemoteCommandError(f"{host.name}: {command.split('||')[0].strip()}: exit status {job.status}: "
                                     f"{last_line(job.errors)}{f' ({hint})' if hint else ''}")
        return job.output

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
        hosts, self._hosts = self._hosts, None
        try:
            if hosts:
                hosts.close(wait)
        finally:
            self._remove_files()

    # -- the steps --

    def _remove_files(self) -> None:
        import shutil
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._directory, self._paths = "", {"pif": [], "vif": []}

    def _count(self, probes: Probes) -> int:
        """How many packets each source is expected to send."""
        return self.count or round(probes.rate * self.duration if self.duration else 1000)

    def _source_command(self, probes: Probes) -> str:
        """What sends them, without an end where the time ends it.

        hping3 takes what a load gets for answers to its own, and would end too early.
        """
        endless = probes.load or (self.duration and not self.count)
        return probes.source_command(ENDLESS if endless else self._count(probes), self.destination_ip)

    def _find_vif(self) -> str:
        return self.vif or str(self._located(self.determine_vif_number))

    def _connected(self) -> Hosts:
        with self._changed:
            if self._hosts is None:
                self._hosts = connect_hosts(self._settings, self._connect)
            return self._hosts

    def _recorded(self) -> Recording:
        if self._recording is None:
            raise CaptureError("nothing is recorded yet: generate_and_record does that")
        return self._recording

    def _located(self, look_up: Callable[[], Any]) -> Any:
        """What a look-up returns; its error has the hypervisor's name in front."""
        place = f"{self._settings[0].name}: "
        try:
            return look_up()
        except (RemoteCommandError, CaptureError) as error:
            raise error if str(error).startswith(place) else type(error)(f"{place}{error}") from None

    def _check_written(self, records: Mapping[str, int]) -> None:
        """CaptureError if tcpdump says it has captured more packets of a side than there are."""
        recording = self._recorded()
        for side, number in records.items():
            captured = recording.counts[side].get("captured", 0)
            if captured > number:
                raise CaptureError(f"{recording.job.name}: tcpdump captured {captured} packets on "
                                   f"{recording.config[side]} and {number} are in the file: is the disk under "
                                   f"{recording.job.directory} full?")


# ---- Report: the figures -------------------------------------------------------------------------------------
# Name, where it is in the report (of a direction, or of the guest), unit, and what it is: limits, Prometheus, the
# summary and the README's table come from here.

FIGURES: list[tuple[str, tuple[str, ...], str, str]] = [
    ("average", ("average",), "µs", "mean delay (RFC 7679)"),
    ("minimum", ("minimum",), "µs", "shortest delay"),
    ("maximum", ("maximum",), "µs", "longest delay"),
    ("stdev", ("stdev",), "µs", "standard deviation (the population's)"),
    ("median", ("median",), "µs", "delay that half don't exceed"),
    *((f"p{percent}", ("percentiles", percent), "µs", f"delay that {percent} % don't exceed")
      for percent in ("90", "95", "99", "99.9")),
    ("pdv", ("pdv",), "µs", "delay variation: p99 minus the minimum (RFC 5481)"),
    ("ipdv", ("ipdv",), "µs", "mean absolute difference of successive delays (RFC 3393)"),
    ("matched", ("packets", "matched"), "packets", "seen at both points"),
    ("ambiguous", ("packets", "ambiguous"), "packets", "matched, but alike, so that they have no delay"),
    ("lost", ("packets", "lost"), "packets", "seen at the first point alone"),
    ("undecided", ("packets", "undecided"), "packets", "the same, but watched too short to call them lost"),
    ("duplicated", ("packets", "duplicated"), "packets", "copies that only the second point saw (RFC 5560)"),
    ("reordered", ("packets", "reordered"), "packets", "overtaken by a later one of the same stream (RFC 4737)"),
    ("dropped", ("after_vif", "dropped"), "packets", "seen at the vif, but never given to the guest (--stages)"),
    ("negative", ("negative",), "delays", "delays below zero"),
    ("zero", ("zero",), "delays", "delays of exactly zero"),
    ("loss", ("loss_ratio",), "ratio", "lost / (first point - undecided) (RFC 7680)"),
    ("reordering", ("reordering", "ratio"), "ratio", "reordered / packets with a delay (RFC 4737)"),
]


def figures_in(part: Report | None) -> dict[str, Any]:
    """The figures that the report of a direction has, by name."""
    found = {}
    for name, path, _, _ in FIGURES:
        value: Any = part
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found[name] = value
    return found


def parts_of(report: Report) -> dict[str, Report | None]:
    """The parts of a report that have figures: in or out, or both of them and the guest."""
    if report["config"].get("direction") != "both":
        return {report["config"].get("direction", "in"): report}
    return {"in": report, "out": report.get("outbound"), "guest": report.get("guest")}


def figures_of(result: Result, warnings: list[str]) -> dict[str, Any]:
    """The figures of one direction, of which at least one packet has a delay; what is wrong goes to the warnings."""
    (flows, first, later), reordered = by_flow(result), reordering(result)
    figures = statistics(first + later)
    both = {"first": statistics(first), "later": statistics(later)} if first and later else {}
    ipdv, direction = variation(result.delays), result.matching.direction
    warnings += quality_warnings(result, figures)
    pdv, negative, zero = (figures.pop(name) for name in ("pdv", "negative", "zero"))
    return {
        **figures,
        "unit": "microseconds",
        "packets": {
            direction.first: result.first, direction.second: result.second, "matched": result.matched,
            "ambiguous": result.ambiguous, "lost": result.lost, "undecided": result.undecided,
            "duplicated": result.duplicated, "reordered": len(reordered),
            f"{direction.second}_only": result.second_only},
        **({"flows": {"count": flows, **both}} if flows else {}),
        "loss_ratio": result.lost / (result.first - result.undecided),
        "reordering": {"ratio": len(reordered) / (result.matched - result.ambiguous),
                       "maximum_extent": max(reordered.values(), default=0)},
        "pdv": pdv,
        "ipdv": None if ipdv is None else microseconds(ipdv),
        "negative": negative,
        "zero": zero,
    }


DISTINCT = ("to make packets distinct, send TCP SYNs or pings, or vary the payload, and with --match-nat use one "
            "source at a time")
FEW_FOR_P99_9 = "too few packets matched for p99.9"   # of which nobody hears who doesn't ask for that


def quality_warnings(result: Result, figures: Report) -> list[str]:
    """What speaks against the numbers of a direction, with what to do about it."""
    _, first, second = result.matching.direction
    merged, delays = resized(result), result.matched - result.ambiguous
    absurd = figures["maximum"] * 1000 > LONGEST_WAIT and sum(delay > LONGEST_WAIT for delay in result.delays)
    few = [percent for percent, enough in (("90", 5), ("95", 10), ("99", 50)) if delays < enough]
    warnings = {
        f"{result.ambiguous} matched packets share all that identifies them with others of which some are missing: "
        f"they are counted, but have no delay; {DISTINCT}": result.ambiguous,
        f"{result.undecided} packets were not seen on the {second}, but watched for less time than others took: they "
        "count neither as lost nor as matched; wait longer (--wait)": result.undecided,
        f"{merged} packets have another length on the {second} than on the {first}, so they are in neither's matches: "
        "segments were merged or split (GRO, TSO); measure with small packets, or switch it off (ethtool -K)": merged,
        "most packets of each interface were not seen on the other: is there address translation (--match-nat), a "
        "tunnel of an unknown kind, or other traffic?":
            2 * result.matched < min(result.first, result.second) and not merged,
        f"{figures['negative']} delays are negative (down to {figures['minimum']:g} µs): the stamps of two CPU cores "
        "disagree, or the clock was set": figures["negative"],
        f"{figures['zero']} delays are exactly 0: the time stamps are too coarse for them, or the clock stood still "
        "between two CPUs (Xen's does, where dom0 has several)": figures["zero"],
        f"{absurd} delays are longer than {LONGEST_WAIT / NANOSECONDS:g} s (up to {figures['maximum']:g} µs): was the "
        "clock set meanwhile?": absurd,
        f"too few packets matched ({delays}) for the percentiles {', '.join(few)}, which are hardly more than the "
        "maximum: send more (-c)": few,
        f"{FEW_FOR_P99_9} ({delays}): it is hardly more than the maximum: send more (-c)": delays < 500,
    }
    return [warning for warning, holds in warnings.items() if holds]


def traffic_warnings(result: Result, config: Report) -> list[str]:
    """What the source commands say they have sent against what passed the pif."""
    sent = config.get("transmitted")
    if sent is None or result.matching.direction is not IN or config.get("filter"):
        return []
    probes = result.first - (closing_resets(result) if result.first > sent else 0)
    if probes > sent:
        return [f"{probes} packets were captured on the pif, and this run sent {sent}: other traffic between the same "
                "hosts (another run?) is in the numbers"]
    if probes < sent:
        return [f"{sent} packets were sent, and {probes} of them were seen on the pif: the others were lost before the "
                "hypervisor, or come in by another interface (-i auto, or -i several times)"]
    return []


# ---- Report: the document ------------------------------------------------------------------------------------

def build_report(analysis: Analysis, config: Report, capture: Mapping[str, Report], slowest: int = 0) -> dict[str, Any]:
    """The JSON document on an analysis, as the README describes it; NoMatchError if no packet has a delay.

    `config` is what ran (`pif` and `vif` name the interfaces or files, `incidents` are what went wrong) and `capture`,
    by side, what is known of its captures beside what was in the files.
    """
    result, *back = analysis.results
    captured = {side: {**capture[side], **analysis.counts[side]} for side in analysis.counts}
    if why := no_delay(result, config, sum(counts.get("cut", 0) for counts in captured.values())):
        for loss in (loss for account in analysis.accounts[:1] for loss in account["lost_at"][:1]):
            why += f" By the kernel, {loss['packets']} were lost in {loss['where']} ({loss['reason']}), {loss['stage']}"
        raise NoMatchError(why)
    warnings = [*config.get("incidents", ()), *analysis.warnings, *traffic_warnings(result, config)]
    warnings += [f"{side}: the kernel dropped {counts['dropped']} packets before tcpdump read them, so \"lost\" can't "
                 "be trusted: generate less traffic, or give the hypervisor more CPU"
                 for side, counts in captured.items() if counts.get("dropped")]
    report = figures_of(result, warnings) | stage_fields(result, analysis.accounts[:1], warnings)
    for outbound in back:
        why = no_delay(outbound, config, 0)
        theirs: list[str] = [why] if why else []
        report["outbound"] = None if why else (
            figures_of(outbound, theirs) | stage_fields(outbound, analysis.accounts[1:], theirs))
        warnings += [f"outbound: {warning}" for warning in theirs]
    if analysis.guest:
        times, packets = analysis.guest
        if packets["ambiguous"]:
            warnings.append(f"guest: {packets['ambiguous']} probes were sent more than once (retransmissions?) and are "
                            "left out: which of them was answered is not known")
        unit = {"unit": "microseconds"} if times else {}
        report["guest"] = {**(_of_stage(times.values()) if times else {}), **unit, "packets": packets}
        if own := [times[rank] - result.stages[rank][3] for rank in times if len(result.stages.get(rank, ())) > 3]:
            report["guest"]["own"] = {**_of_stage(own), **unit, "packets": len(own)}
    stamps = {"stamp_error": analysis.accounts[0]["stamp_error"]} if analysis.accounts else {}
    report |= {"capture": captured, "warnings": warnings, "config": {**config, **stamps},
               "schema_version": SCHEMA_VERSION}
    return {**report, "slowest": slowest_packets(result, slowest)} if slowest else report


def stage_fields(result: Result, accounts: Sequence[Report], warnings: list[str]) -> dict[str, Any]:
    """What the report of a direction has of its stages, if they are known."""
    if not accounts:
        return {}
    found, [account] = {}, accounts
    for place, name in enumerate(STAGES):
        if times := [each[place] for each in result.stages.values() if len(each) > place]:
            found[name] = {**_of_stage(times), "packets": len(times)}
    if dropped := (account["after_vif"] or {}).get("dropped"):
        warnings.append(f"{dropped} of the packets that reached the vif never reached the guest: it took them too "
                        "late, or not at all")
    return {"stages": found, "lost_at": account["lost_at"], "after_vif": account["after_vif"]}


def no_delay(result: Result, config: Report, cut: int) -> str:
    """Why two captures have no delay in common, or none that can be true; empty if they have."""
    direction, first, second = result.matching.direction
    pif, vif, outward = str(config["pif"]), str(config["vif"]), direction == "out"
    seen = {first: result.first, second: result.second}
    if result.ambiguous and result.ambiguous == result.matched:
        return (f"{result.matched} packets were seen on both interfaces, and no delay is certain: they share all that "
                f"identifies them with others of which some are missing; {DISTINCT}")
    if result.matched:
        longest = max(result.delays)
        return "" if longest >= 0 else (
            f"all {result.matched} delays are negative ({min(result.samples()) / 1000:g} to {longest / 1000:g} µs): "
            f"are pif and vif swapped? The packets pass {second} before {first}")
    emulated = f"{vif}-emu" if config.get("toolstack") == "xl" else re.sub("^vif", "tap", vif)
    if cut:
        cause = f"{cut} packets were cut by the snap length before what identifies them: capture more (tcpdump -s)"
    elif not any(seen.values()):
        cause = ("the VM sent nothing: is DESTINATION its address, does it answer this traffic?" if outward else
                 "the traffic passes neither: is DESTINATION the address of this VM, do the packets carry SOURCE's "
                 "address, does a firewall drop them earlier?")
    elif not seen["pif"]:
        cause = (f"the traffic doesn't {'go out' if outward else 'come in'} by {pif}: try another -i, or -i auto; "
                 "inside a tunnel it is found with --overlay")
    elif not seen["vif"]:
        cause = (f"none is on {vif}: does a firewall drop them, is the VM's address on another interface (--num), "
                 f"does an HVM guest use its emulated one (--vif {emulated})?")
    elif resized(result):
        cause = "they differ in length: segments were merged or split (GRO, TSO); measure with small packets"
    else:
        cause = "the packets differ: are they translated (--match-nat), or was it other traffic?"
    return f"no packet was seen on both interfaces ({seen['pif']} on {pif}, {seen['vif']} on {vif}): {cause}"


def slowest_packets(result: Result, number: int) -> list[dict[str, Any]]:
    """The packets with the largest delays, the slowest first: times, delay in microseconds, and identity."""
    from heapq import nlargest
    matching, (_, first, second) = result.matching, result.matching.direction
    ranks = nlargest(number, result.arrivals(), key=result.delays.__getitem__)
    return [{f"t_{first}": iso_time(matching.sent[rank]),
             f"t_{second}": iso_time(matching.sent[rank] + result.delays[rank]),
             "delay": result.delays[rank] / 1000, **describe(matching.identity(rank))} for rank in ranks]


# ---- Report: files -------------------------------------------------------------------------------------------

CSV_FIELDS = ("source", "destination", "protocol", "source_port", "destination_port", "sequence", "acknowledgment",
              "icmp_type", "icmp_code", "identifier", "ip_id", "fragment_offset", "length")


def write_csv(result: Result, path: str) -> None:
    """Writes a table of the packets that count: time, identity, delay in µs (empty if there is none) and flags."""
    import csv
    import io
    matching, reordered = result.matching, reordering(result)
    names = {AMBIGUOUS: ["ambiguous"], LOST: ["lost"], UNDECIDED: ["undecided"], MATCHED: []}

    def write(file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="", write_through=True)
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("time", *CSV_FIELDS, "delay_us", "flags"))
        for rank in result.ranks(*names):
            delay, fields = result.delays[rank], describe(matching.identity(rank))
            flags = [*names[result.classes[rank]], *(["reordered"] if rank in reordered else []),
                     *(["duplicated"] if rank in matching.extra_copies else [])]
            table.writerow((iso_time(matching.sent[rank]), *(fields.get(name, "") for name in CSV_FIELDS),
                            "" if delay == NO_DELAY else f"{delay / 1000:.3f}", " ".join(flags)))
        text.detach()

    write_file(path, write)


def real_path(path: str) -> str | int:
    """Where a path leads through links: a file, or the number of an open descriptor ("-" is standard output)."""
    for _ in range(40):
        descriptor = re.fullmatch(r"-|/dev/std(?:out|(err))|(?:/dev|/proc/self)/fd/(\d{1,6})", path)
        if descriptor:
            return int(descriptor[2] or (2 if descriptor[1] else 1))
        if not os.path.islink(path):
            break
        path = os.path.join(os.path.dirname(path), os.readlink(path))
    return path


def write_file(path: str, write: Callable[[Any], object]) -> None:
    """Writes a file, through links; UsageError if it can't be written, ReaderGone if that is a pipe without a reader.

    A plain file is there whole or not at all, with the mode that it had, or else that the umask gives; a device, a pipe
    or an open descriptor is written to.
    """
    place, temporary, shown = real_path(path), "", "standard output" if path == "-" else path
    if place == 1 and sys.stdout is None:            # the number may be another file's by now
        raise UsageError(f"can't write {shown}: it is closed (--output names a file)")
    try:
        if isinstance(place, int) or (os.path.exists(place) and not os.path.isfile(place)):
            with open(os.dup(place) if isinstance(place, int) else place, "wb") as file:
                write(file)
            return
        temporary = os.path.join(os.path.dirname(place), f".netweaver-{os.urandom(6).hex()}")
        with open(temporary, "xb") as file:
            if os.path.exists(place):
                status = os.stat(place)
                os.chmod(temporary, status.st_mode & 0o7777)
                if os.geteuid() == 0:
                    os.chown(temporary, status.st_uid, status.st_gid)
            write(file)
        os.replace(temporary, place)
    except BrokenPipeError:
        raise ReaderGone from None
    except OSError as error:
        raise UsageError(f"can't write {shown}: {error.strerror}") from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def check_writable(path: str) -> None:
    """UsageError if a file can't be written, as far as that is known before a long measurement."""
    place = real_path(path)
    if isinstance(place, int):
        return
    directory = os.path.dirname(place) or "."
    special = os.path.exists(place) and not os.path.isfile(place)
    if os.path.isdir(place) or not os.access(place if special else directory, os.W_OK):
        why = ("it is a directory" if os.path.isdir(place) else "no such directory" if not os.path.isdir(directory)
               else "no permission to write there")
        raise UsageError(f"can't write {path}: {why}")


# ---- People and monitors -------------------------------------------------------------------------------------

WIDTH, HEIGHT = 80, 23                               # of a terminal, with its last line for the prompt
BINS, BAR = 12, 40                                   # of a histogram: lines, and the width of the longest bar


def duration_text(microseconds: float) -> str:
    """A time in a unit that suits it."""
    for unit, size in (("s", 1e6), ("ms", 1e3), ("µs", 1)):
        if abs(microseconds) >= size:
            number = microseconds / size
            return f"{number:.3g} {unit}" if abs(number) < 999.5 else f"{number:.0f} {unit}"
    return f"{microseconds * 1000:.0f} ns"


def histogram(delays: Sequence[int], fancy: bool = True, bins: int = BINS) -> list[str]:
    """Lines that show how the delays (ns) are distributed, up to their 99th percentile, and how many are above it."""
    ranked = sorted(delays)
    low, high = ranked[0], ranked[(len(ranked) - 1) * 99 // 100]
    width = max(1, -(-(high + 1 - low) // bins))
    edges = [low + width * place for place in range(bins + 1) if low + width * (place - 1) <= high]
    below = [bisect_left(ranked, edge) for edge in edges]
    rows = [(duration_text(edge / 1000), after - before)
            for edge, before, after in zip(edges, below, islice(below, 1, None))]
    if len(ranked) > below[-1]:
        rows.append((f"> {duration_text(edges[-1] / 1000)}", len(ranked) - below[-1]))
    most, column = max(number for _, number in rows), max(len(label) for label, _ in rows)
    lines = []
    for label, number in rows:
        eighths = -(-number * BAR * 8 // most)
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip() if fancy else "#" * (eighths // 8)
        lines.append(f"{label:>{column}}  {number:>{len(str(most))}}  {bar}".rstrip())
    return lines


def side_names(config: Report) -> dict[str, str]:
    """The interfaces, or the files' names without their directories, by side."""
    return {side: ",".join(map(os.path.basename, str(config[side]).split(","))) for side in ("pif", "vif")}


# What the kernel's words for a loss mean, and what to look at.
LOSSES = {
    **dict.fromkeys(("NETFILTER_DROP", "nft_do_chain", "nf_hook_slow"),
                    ("dropped by a firewall rule", "nft list ruleset, iptables -vL")),
    **dict.fromkeys(("TC_INGRESS", "TC_EGRESS"), ("dropped by a tc rule", "tc -s filter show dev {pif} ingress")),
    **dict.fromkeys(("QDISC_DROP", "QDISC_OVERLIMIT", "kfree_skb_list_reason"),
                    ("by the vif's queue", "tc -s qdisc show dev {vif}")),
    "NO_TX_TARGET": ("by the bridge", "has the vif a carrier, does the guest run?"),
    "br_handle_frame_finish": ("by the bridge", "bridge -d link: is a port blocked?"),
    "xenvif_kthread_guest_rx": ("by netback", "the guest didn't take them in time")}


def stage_lines(part: Report, config: Report, fancy: bool) -> list[str]:
    """Lines on where the time went, with each stage's share of all of it, and on where packets were lost."""
    stages = part.get("stages", {})
    whole = sum(stage["average"] for stage in stages.values()) or 1
    lines = [f"{'Stages':<14}{'median':>10}{'p99':>8}{'packets':>8}"] if stages else []
    for name, stage in stages.items():
        bar = "#█"[fancy] * round(BAR * stage["average"] / whole)
        lines.append(f" {name:<13}{duration_text(stage['median']):>10}{duration_text(stage['percentiles']['99']):>8}"
                     f"{stage['packets']:>8}  {bar}".rstrip())
    for loss in part.get("lost_at", ()):
        name = next((name for name in (loss["reason"], loss["where"]) if name in LOSSES), loss["where"] or "no end")
        by, look = LOSSES.get(name, ("", f"lost in {loss['stage']}"))
        lines.append(f" {loss['packets']:>7} {by} ({name}): {look.format(**side_names(config))}".replace("  (", " ("))
    if fates := part.get("after_vif"):
        lines.append(" behind the vif: " + ", ".join(f"{number} {fate}" for fate, number in fates.items()))
    if own := (part.get("guest") or {}).get("own"):
        lines.append(f" the guest itself: median {duration_text(own['median'])}, "
                     f"p99 {duration_text(own['percentiles']['99'])}")
    return lines


def cells(label: str, *texts: object) -> str:
    """A row of a table that is as wide as a terminal."""
    return f" {label:<7}" + "".join(f"{text:>8}" for text in texts)


def summary(report: Report, delays: Sequence[int], fancy: bool = True) -> list[str]:
    """Lines for people on what was measured, which fit a terminal; `delays` are the samples (ns)."""
    config, names, parts = report["config"], side_names(report["config"]), parts_of(report)
    shown = ("median", "average", "stdev", "minimum", "p90", "p95", "p99", "p99.9", "maximum")
    what = config.get("name_label") or config.get("destination") or "captures"
    title = ", ".join(filter(None, (what, traffic_name(config))))
    delay = [f"Delay{cells('', *shown)[5:]}"]
    packets = [f"Packets{cells('', 'seen', 'matched', 'lost', '', 'ambig.', 'undec.', 'dupl.', 'reord.', 'extra')[7:]}"]
    for way, part in parts.items():
        rows = {way: part, **{name: (part or {}).get("flows", {}).get(name) for name in ("first", "later")}}
        for label, figures in ((label, figures_in(row)) for label, row in rows.items()):
            if "median" in figures:
                delay.append(cells(label, *(duration_text(figures[name]) for name in shown)))
        numbers = part["packets"] if part else {}
        if way == "guest" and part:
            packets.append(f" guest   {numbers['answered']} probes answered, {numbers['unanswered']} not")
        elif part:
            _, first, second = DIRECTIONS[way][0]
            kinds = (first, "matched", "lost", "", "ambiguous", "undecided", "duplicated", "reordered",
                     f"{second}_only")
            loss = f"{100 * part['loss_ratio']:.3g} %"
            packets.append(cells(way, *(numbers.get(kind, loss) for kind in kinds)))
    title = f"{'Interrupted: ' if report.get('interrupted') else ''}{title}"
    by = f" (by {config['toolstack']})" if config.get("toolstack") else ""
    lines = [title, f" pif {names['pif']}, vif {names['vif']}{by}", *delay, *packets,
             *stage_lines(report, config, fancy), *comparison_lines(report)]
    bins = min(BINS, HEIGHT - len(lines) - 2)
    lines += ["Distribution of the delay", *(f" {line}" for line in histogram(delays, fancy, bins))] if bins > 1 else []
    return [printable(line)[:WIDTH] for line in lines]


def table(reports: Sequence[Report]) -> list[str]:
    """Lines for people on several runs, with their means and standard deviations by kind of traffic."""
    kinds: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for report in reports:
        kinds[traffic_name(report["config"])].append(figures_in(report))
    units = {name: unit for name, _, unit, _ in FIGURES}

    def row(label: str, number: object, figures: Report) -> str:
        texts = (duration_text(figures[name]) if units[name] == "µs" else f"{100 * figures[name]:.3g} %"
                 for name in shown)
        return f" {label:<25.25}{number:>6}" + "".join(f"{text:>8}" for text in texts)

    shown = ("median", "average", "p99", "maximum", "loss")
    lines = [f"{'Traffic':<26}{'run':>6}" + "".join(f"{name:>8}" for name in shown)]
    for kind, runs in kinds.items():
        lines += [row(kind, number, figures) for number, figures in enumerate(runs, 1)]
        columns = {name: [figures[name] for figures in runs] for name in shown}
        if len(runs) > 1:
            from statistics import mean, stdev
            lines += [row(kind, word, {name: spread(column) for name, column in columns.items()})
                      for word, spread in (("mean", mean), ("± s.d.", stdev))]
    return [*lines, *(line for report in reports for line in comparison_lines(report))]


def comparison_lines(report: Report) -> list[str]:
    """Lines on what has changed since the baseline, if there is one."""
    if not (comparison := report.get("comparison")):
        return []
    verdict = {True: "Different", False: "No difference to be seen",
               None: "Too few packets to tell"}[comparison["distinguishable"]]
    numbers = " against ".join(map(str, comparison["numbers"][::-1]))
    of, doubtful = " of ".join(filter(None, (comparison["compared"], traffic_name(report["config"])))), False
    lines = [f"{verdict}: {numbers} {of}, {comparison['path']}"]
    for name, label in (("median", "median"), ("p99", "p99"), ("loss_ratio", "loss")):
        part = comparison[name]
        shift, *ends = [f"{'-' if value < 0 else '+'}{duration_text(abs(value))}" if name != "loss_ratio" else
                        f"{100 * value:+.3g} %" for value in (part["shift"], *(part["interval"] or ()))]
        beyond = bool(part["interval"]) and not part["interval"][0] <= 0 <= part["interval"][1]
        doubtful |= beyond and not part["distinguishable"]
        lines.append(f" {label:<8}{shift:>9}  ({' to '.join(ends) or 'too few packets to tell'})"
                     + (", changed" if part["distinguishable"] else ", as equal runs may differ" if beyond else ""))
    return lines + [" One run doesn't tell what equal runs differ by: --runs 5 on both sides would."] * doubtful


BUCKETS = [digit * 10 ** power for power in range(6) for digit in (1, 2, 5)] + [1_000_000]       # µs


def prometheus(labels: Mapping[str, str], code: int, report: Report | None = None,
               results: Sequence[Result] = ()) -> str:
    """The outcome of a run for node_exporter's textfile collector, in Prometheus' base units (seconds).

    `labels` are those of all series; without a report the run has failed, with that exit code.
    """
    families: dict[str, tuple[str, str]] = {         # type and help
        "success": ("gauge", "Whether something was measured."), "exit_code": ("gauge", "Exit code of netweaver."),
        "info": ("gauge", "What was measured, in labels."), "warnings": ("gauge", "How many warnings there are."),
        "measured_timestamp_seconds": ("gauge", "When the traffic started."),
        "delay_seconds": ("gauge", "Time from one interface to the other; guest: that the VM took to answer."),
        "delay_distribution_seconds": ("histogram", "How the delays of this run are distributed."),
        "packets": ("gauge", "Packets by what became of them."),
        "stage_seconds": ("gauge", "Time in one stage of the way, by the kernel's trace."),
        **{f"{name}_{unit}": ("gauge", f"{text[0].upper()}{text[1:]}.") for name, _, unit, text in FIGURES}}
    samples: defaultdict[str, list[tuple[str, dict[str, str], float]]] = defaultdict(list)

    def add(family: str, value: float, suffix: str = "", **own: str) -> None:
        samples[family].append((suffix, own, value))

    add("success", int(report is not None))
    add("exit_code", code)
    if report:
        config, units = report["config"], {name: unit for name, _, unit, _ in FIGURES}
        add("info", 1, login=str(config.get("hypervisor") or ""), traffic=traffic_name(config),
            **{name: str(config[name]) for name in ("pif", "vif", "version")})
        add("warnings", len(report["warnings"]))
        if "started" in config:
            add("measured_timestamp_seconds", parse_time(config["started"]) // NANOSECONDS)
        for way, part in parts_of(report).items():
            for name, value in figures_in(part).items():
                if units[name] == "µs":
                    add("delay_seconds", value / 1e6, direction=way, statistic=name)
                elif units[name] != "packets":
                    add(f"{name}_{units[name]}", value, direction=way)
            part = part or {}
            for kind, number in {**part.get("packets", {}), **(part.get("after_vif") or {})}.items():
                add("packets", number, direction=way, kind=kind)
            for stage, of in part.get("stages", {}).items():
                for name, value in figures_in(of).items():
                    add("stage_seconds", value / 1e6, direction=way, stage=stage, statistic=name)
    for result in results:
        ranked, way = sorted(result.samples()), result.matching.direction.name
        for bound, most in (*((str(bound / 1e6), 1000 * bound) for bound in BUCKETS), ("+Inf", -NO_DELAY)):
            add("delay_distribution_seconds", bisect(ranked, most), "_bucket", direction=way, le=bound)
        add("delay_distribution_seconds", sum(ranked) / 1e9, "_sum", direction=way)
        add("delay_distribution_seconds", len(ranked), "_count", direction=way)
    lines = []
    for family, (kind, text) in families.items():
        lines += [f"# HELP netweaver_{family} {text}", f"# TYPE netweaver_{family} {kind}"] if samples[family] else []
        for suffix, own, value in samples[family]:
            pairs = ",".join('{}="{}"'.format(key, text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n"))
                             for key, text in {**labels, **own}.items())
            lines.append(f"netweaver_{family}{suffix}{{{pairs}}} {value!r}")
    return "\n".join(lines) + "\n"


def series_labels(config: Report) -> dict[str, str]:
    """What names a VM's series whatever becomes of it: neither its interfaces nor who has logged in."""
    hypervisor, labels = config.get("hypervisor"), config["labels"]
    return {"hypervisor": Target(hypervisor).host if hypervisor else "",
            **{name: config.get(name) or "" for name in ("name_label", "destination")},
            **{re.sub(r"^(?=\d)|[^A-Za-z0-9_]", "_", key): value for key, value in labels.items()}}


# What may have become of the figures since the baseline: which ones, and the least sign of their shift.
CHANGES = {"changed": (("median", "p99", "loss_ratio"), -1), "slower": (("median", "p99"), 1),
           "lossier": (("loss_ratio",), 1)}
LIMIT_ALIASES = {"avg": "average", "mean": "average", "min": "minimum", "max": "maximum", "stddev": "stdev",
                 "p50": "median", "loss_ratio": "loss"}
LIMIT_UNITS = {"µs": {"": 1.0, "ns": 1e-3, "us": 1.0, "µs": 1.0, "ms": 1e3, "s": 1e6}, "ratio": {"": 1.0, "%": 0.01}}


class Limit:
    """A condition such as "p99>200" (µs), "loss>0.1%" or "outbound.median>=50us"; UsageError if it can't be one.

    One of CHANGES is a condition on the comparison with a baseline.
    """

    def __init__(self, text: str, direction: str, stages: bool) -> None:
        self.text, self.compares, self.name = text.strip(), text.strip() in CHANGES, ""
        if self.compares:
            return
        parts = re.fullmatch(r"\s*(?:([a-z_]+)\.)?([a-z_]+[\d.]*)\s*(>=|<=|>|<)\s*(\d+\.?\d*(?:e-?\d+)?)\s*(\S*)\s*",
                             text.replace("\u03bc", "µ"))               # the Greek letter, too
        part, name, self._sign, number, self._unit = parts.groups() if parts else ("", "", "", "0", "")
        self.name, units = LIMIT_ALIASES.get(name, name), {name: unit for name, _, unit, _ in FIGURES}
        unit = units.get(self.name, "")
        self._factors = LIMIT_UNITS.get(unit, {"": 1.0})
        self._number = float(number) * self._factors.get(self._unit, 1.0)
        self._part = {"outbound": "out"}.get(part or "", part)
        mistakes = {
            "give NAME>NUMBER (or >=, <, <=) with a unit if you like, such as 'p99>200us' or 'loss>0.1%', or one of "
            f"{', '.join(CHANGES)}": not parts,
            f"there is no figure {name!r}; there are {', '.join(units)}": not unit,
            f"{self._unit!r} is no unit of {name} ({', '.join(filter(None, self._factors)) or 'it has none'})":
                self._unit not in self._factors,
            f"there is no part {part!r}; there are outbound, guest, {', '.join(STAGES)}":
                part not in (None, "outbound", "guest", *STAGES),
            f"{part} is known with --direction both alone": part in ("outbound", "guest") and direction != "both",
            f"{part or name} is known with --stages alone": not stages and (part in STAGES or name == "dropped"),
            f"the {part} has no {name}": part in ("guest", *STAGES) and (unit != "µs" or name in ("pdv", "ipdv")),
            f"{name} is at most 1, or 100 %" + ("" if self._unit else f": do you mean {number}%?"):
                unit == "ratio" and self._number > 1}
        for mistake, made in mistakes.items():
            if made:
                raise UsageError(f"--fail-if {text!r}: {mistake}")

    def breach(self, report: Report) -> str | None:
        """How the report meets the condition; None if it doesn't.  What isn't known meets every condition."""
        if self.compares:
            names, sign = CHANGES[self.text]
            parts = [report["comparison"][name] for name in names]
            if all(part["distinguishable"] is None for part in parts):
                return f"{self.text}: not known, with too few packets"
            met = any(part["distinguishable"] and (part["shift"] > 0) >= sign for part in parts)
            return f"{self.text}: against {report['comparison']['path']}" if met else None
        of = (report if not self._part else report.get("stages", {}).get(self._part) if self._part in STAGES else
              parts_of(report)[self._part])
        value = figures_in(of).get(self.name)
        if value is None:
            return f"{self.text}: not known"
        met = {">": value > self._number, ">=": value >= self._number, "<": value < self._number,
               "<=": value <= self._number}[self._sign]
        shown = (duration_text(value) if self._factors is LIMIT_UNITS["µs"] and not self._unit else
                 f"{value / self._factors[self._unit]:.6g}{' ' * bool(self._unit)}{self._unit}")
        return f"{self.text}: it is {shown}" if met else None


def figure_class(path: str) -> Any:
    """Matplotlib's Figure, for a picture of that name; UsageError if it can't be made."""
    if isinstance(real_path(path), str) and not path.lower().endswith((".png", ".svg", ".pdf")):
        raise UsageError(f"--plot {path}: the name must end in .png, .svg or .pdf")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"--plot needs matplotlib ({error}): pip install matplotlib") from None
    return Figure


COLOURS = "#0072B2", "#E69F00", "#009E73", "#CC79A7"         # of Okabe and Ito, which everyone tells apart


def plot_runs(path: str, reports: Sequence[Report]) -> None:
    """Draws median and 99th percentile of several runs, by kind of traffic, over the rate, or else from run to run."""
    figure = figure_class(path)(figsize=(10, 4.8), layout="constrained")
    axes, kinds = figure.subplots(), defaultdict(list)       # type: Any, defaultdict[str, list[tuple[int, Report]]]
    traffic = [report["config"].get("traffic") or {} for report in reports]
    rates = sorted({each.get("rate") or 0 for each in traffic})
    for number, (report, each) in enumerate(zip(reports, traffic), 1):
        place = each.get("rate") or 0 if len(rates) > 1 else number
        kinds[each.get("pattern") or ""].append((place, figures_in(report)))
    for color, (kind, runs) in zip(COLOURS * len(kinds), kinds.items()):
        for name, marker, dashes in (("median", "o", "-"), ("p99", "^", "--")):
            values = defaultdict(list)               # type: defaultdict[int, list[float]]
            for place, figures in runs:
                values[place].append(figures[name])
            axes.plot([place for place, _ in runs], [figures[name] for _, figures in runs], marker, color=color)
            axes.plot(sorted(values), [sum(values[place]) / len(values[place]) for place in sorted(values)], dashes,
                      color=color, marker=marker, markersize=0, label=f"{kind} {name}".strip())
    axes.set(xlabel="run", ylabel="delay (µs)", ylim=(0, None))
    if len(rates) > 1:
        axes.set(xlabel="packets a second", xscale="log")
        axes.set_xticks(rates, map(str, rates))
        axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", frameon=False)
    save_figure(figure, path, f"{reports[0]['config'].get('name_label') or 'delay'}: {len(reports)} runs")


def save_figure(figure: Any, path: str, title: str) -> None:
    """Writes a figure in the format that the path's ending names, and takes a name with $ for no formula."""
    from matplotlib.text import Text
    figure.suptitle(printable(title), fontsize="medium")
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_usetex(False)
    kind = path[-3:].lower() if path.lower().endswith((".png", ".svg", ".pdf")) else "png"
    write_file(path, lambda file: figure.savefig(file, format=kind, dpi=150))


def plot(path: str, report: Report, results: Sequence[Result]) -> None:
    """Draws the delay of each packet over time, with the lost ones, beside its distribution; by the path's ending."""
    figure, names = figure_class(path)(figsize=(10, 4.8), layout="constrained"), side_names(report["config"])
    over_time, distribution = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    from matplotlib.ticker import LogFormatter
    start = min(min(result.matching.sent) for result in results if result.first)
    for result, color, (marker, dashes) in zip(results, COLOURS, (("o", "-"), ("^", "--"))):     # also in grey
        _, first, second = result.matching.direction
        times = [(when - start) / NANOSECONDS for when in result.matching.sent]
        seen, lost = result.ranks(MATCHED), [times[rank] for rank in result.ranks(LOST)]
        delays = [result.delays[rank] / 1000 for rank in seen]
        if result.stages and result is results[0]:
            rows = list(result.stages.items())
            most = max(map(len, result.stages.values()))
            over_time.stackplot([times[rank] for rank, _ in rows], *zip(*(
                [part / 1000 for part in (*each, 0)[:most]] for _, each in rows)), labels=STAGES[:most], alpha=0.7)
        else:
            over_time.plot([times[rank] for rank in seen], delays, marker, markersize=3, color=color, alpha=0.6,
                           markeredgewidth=0, rasterized=len(seen) > 5000, label=f"{names[first]} to {names[second]}")
        if lost:
            over_time.plot(lost, [0.02] * len(lost), "x", markersize=6, color="#D55E00", label=f"lost ({len(lost)})",
                           transform=over_time.get_xaxis_transform())
        distribution.plot([100 * rank / len(seen) for rank in range(1, len(seen) + 1)], sorted(delays), color=color,
                          linestyle=dashes)
    everything = [delay for result in results for delay in result.samples()]
    if min(everything) > 0 and max(everything) > 5000 * report["median"]:
        over_time.set_yscale("log")
        over_time.yaxis.set_major_formatter(LogFormatter())          # 200, not 2e2
        over_time.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    over_time.set(xlabel="time since the first packet (s)", ylabel="delay (µs)")
    distribution.set(xlabel="packets that took no longer (%)", xlim=(0, 100))
    for axes in (over_time, distribution):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    what = report["config"].get("name_label") or report["config"].get("destination") or "delay"
    save_figure(figure, path, f"{what}: median {duration_text(report['median'])}, 99 % within "
                f"{duration_text(report['percentiles']['99'])}, {results[0].lost} of {results[0].first} packets lost")


def printable(text: str) -> str:
    """Text whose control characters can't do anything to a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


# ---- Command line --------------------------------------------------------------------------------------------

EPILOG = """\
examples:
  the overhead of a VM's network, by 1000 SYNs at 100 a second:
    netweaver -n instance-<uuid> --hv HV_IP -s SOURCE_IP -d DESTINATION_IP -k KEYFILE
  what would be done, and whether all is there for it:
    netweaver -n web1 --hv root@hv:2222 -s 10.0.0.2 -d 10.0.0.1 --dry-run
  a sweep of rates and kinds of traffic:
    netweaver -n web1 --hv hv -s 10.0.0.2 -d 10.0.0.1 --rate 100,1000,10000 --traffic syn,flow
  keep runs, and compare others with them later:
    netweaver ... --runs 5 --save before
    netweaver ... --runs 5 --baseline before --fail-if slower --fail-if 'loss>0.1%'
  kept runs, or captures that are there already, and a table of their packets:
    netweaver --pcaps before
    netweaver --pcaps pif.pcap vif.pcap -d 10.0.0.1 --csv packets.csv --slowest 5

exit codes:
  0 measured   2 usage, or a file that can't be written   3 connection, authentication or host key
  4 remote command or look-up   5 capture   6 no packet with a delay   7 a limit of --fail-if
  129, 130, 143 interrupted by a signal   141 the reader of standard output went away   1 anything else
"""
# What NetWeaver gets as it stands, and what more makes no sense with --pcaps: another value than the default there is
# an error.
PARAMETERS = ("toolstack", "host_interface", "vif_number", "vif", "overlay", "capture_filter", "count", "duration",
              "wait", "sudo", "ssh_options")
MEASURING = (*PARAMETERS, "stages", "stages_buffer", "name_label", "hv", "key", "traffic", "rate", "size", "port",
             "source_command", "load", "runs", "dry_run", "save")


def build_parser() -> argparse.ArgumentParser:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(f"{message} (see {self.prog} --help)")

        def _print_message(self, message: str, file: object = None) -> None:
            write_file("-", lambda stdout: stdout.write(message.encode()))

    from shutil import get_terminal_size
    from textwrap import fill
    columns = min(get_terminal_size((100, 24)).columns, 120)         # $COLUMNS, or else the terminal's
    parser = Parser(
        prog="netweaver", allow_abbrev=False, add_help=False, epilog=EPILOG,
        description=fill("Measure the time that packets take from a hypervisor's physical interface (pif) to a VM's "
                         "virtual interface (vif), in microseconds, as JSON.", columns),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=columns))
    add_options(parser)
    return parser


def of_kind(pattern: str, convert: Callable[[str], Any], what: str) -> Callable[[str], Any]:
    """A type of arguments: what matches a pattern, converted."""
    def check(text: str) -> Any:
        if re.fullmatch(pattern, text, re.ASCII):
            return convert(text)
        from argparse import ArgumentTypeError
        raise ArgumentTypeError(f"{text!r} is not {what}")
    return check


NUMBER = of_kind(r"0*[1-9]\d{0,8}", int, "a whole number from 1 to 999999999")
SECONDS = of_kind(r"(?=.*[1-9])\d{1,7}(\.\d{0,9})?", float, "a number of seconds above 0 and below 10000000")
NUMBERS = of_kind(r"0*[1-9]\d{0,5}(,0*[1-9]\d{0,5})*", lambda text: [int(number) for number in text.split(",")],
                  "a rate from 1 to 999999, or several with commas in between")
WHAT = of_kind("({0})(,({0}))*".format("|".join(PATTERNS)), lambda text: text.split(","), f"of {', '.join(PATTERNS)}")
INTERFACE = of_kind(r"[^\s/-][^\s/]{0,14}", str, "the name of a network interface")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The table of options."""
    add = parser.add_argument_group("what is measured").add_argument
    add("-n", "--name-label", metavar="NAME", help="the destination VM's name in the toolstack, or its UUID")
    add("--hv", metavar="HOST", help="its hypervisor, as [user@]host[:port], or local: this machine, without SSH")
    add("-s", "--source", metavar="SOURCE", default=[], action="append",
        help="a VM that generates traffic, as [user@]host[:port], or local: this machine; may be repeated")
    add("-d", "--destination", metavar="DESTINATION", help="the destination VM's address")
    add("--toolstack", choices=("auto", *TOOLSTACKS), default="auto",
        help="what the hypervisor is managed with: XenServer's xe, Proxmox's qm, libvirt's virsh or plain Xen's xl "
             "(default: the first of them that is there and knows the VM)")
    add("-i", "--interface", metavar="PIF", dest="host_interface", default=[], action="append", type=INTERFACE,
        help="the hypervisor's physical interface; may be repeated, for the slaves of a bond (default: auto, which "
             "finds what leads to the VM; eth0 where nothing does)")
    add("--num", metavar="N", dest="vif_number", default=0, type=of_kind(r"\d{1,4}", int, "the number of an interface"),
        help="the number of the VM's interface, N in vif5.N (default: %(default)s)")
    add("--vif", metavar="NAME", type=INTERFACE,
        help="the virtual interface itself: the toolstack is not asked, and -n not needed")
    add("--direction", choices=tuple(DIRECTIONS),
        help="from pif to vif, from vif to pif, or both, with the VM's own time in between (default: in)")
    add("--overlay", action="store_true", help="the traffic is inside VXLAN, Geneve or GRE on the physical interface")
    add("--filter", metavar="EXPR", dest="capture_filter",
        help="capture what this pcap-filter(7) expression says, instead of the traffic between SOURCE and DESTINATION")
    add = parser.add_argument_group("traffic").add_argument
    add("--traffic", metavar="WHAT", default=[], action="extend", type=WHAT,
        help="syn: TCP SYNs, each a new flow (the default); flow: SYNs of one flow; udp: datagrams of one flow; ping; "
             "several with commas in between are run one after the other")
    add("-c", "--count", metavar="N", type=NUMBER, help="packets to send (default: 1000)")
    add("--rate", metavar="PPS", default=[], action="extend", type=NUMBERS,
        help=f"packets a second (default: {RATE}); several with commas in between are run one after the other")
    add("--size", metavar="BYTES", type=of_kind(r"\d{1,5}", int, "a number of bytes"),
        help=f"of payload (default: none in SYNs, {USUAL_SIZE} in others)")
    add("--port", metavar="PORT", type=of_kind(r"\d{1,5}", int, "the number of a port"),
        help="of the destination (default: 0)")
    add("--source-command", metavar="TEMPLATE",
        help="a shell command that generates traffic and ends, instead of --traffic; {count}, {interval} (in µs), "
             "{size} and {destination} are filled in, {{ and }} are braces")
    add("--load", metavar="COMMAND",
        help="a shell command that the sources run meanwhile; its packets, with another protocol or port, don't count; "
             "then the probes run for COUNT / RATE seconds")
    add("--runs", metavar="N", default=1, type=NUMBER,
        help="measure N times, a line of JSON each (default: %(default)s)")
    add("--duration", metavar="SECONDS", type=SECONDS,
        help="measure for this many seconds; without -s nothing is generated, and whatever traffic reaches "
             "DESTINATION is measured")
    add("--wait", metavar="SECONDS", type=SECONDS, default=SHORTEST_WAIT,
        help="wait this many seconds for the last packets (default: %(default)s)")
    add("--stages", action="store_true",
        help="also tell by the kernel's trace in which stage the time goes and where packets are lost, which costs all "
             "of the hypervisor's traffic about 1 µs a packet")
    add("--stages-buffer", metavar="KIB", default=STAGES_BUFFER, type=NUMBER,
        help="of the trace, for each processor: 0.2 KiB a packet that passes in a second (default: %(default)s)")
    add("--dry-run", action="store_true",
        help="log in, look for all that is needed, send nothing, and say what would be run")
    add = parser.add_argument_group("analysis").add_argument
    add("--pcaps", nargs="+", metavar="FILE",
        help="analyse what --save has kept (a run's directory, or one of several), or the captures of a PIF and a VIF "
             "(pcap or pcapng; - is standard input), instead of measuring; several files of one side are separated by "
             "commas; -s and -d then select by address")
    add("--match-nat", action="store_true", help="leave addresses out of the matching, where the path translates them")
    add("--slowest", metavar="N", default=0, type=NUMBER, help="list the N slowest packets in the JSON")
    add = parser.add_argument_group("judging").add_argument
    add("--fail-if", metavar="EXPR", default=[], action="append",
        help="exit with status 7 when the condition holds, such as 'p99>200us' or 'loss>0.1%%', or changed, slower or "
             "lossier than the baseline; may be repeated")
    add("--baseline", metavar="DIR",
        help="compare with what --save has kept (a run, or those of this VM, direction and traffic in a directory), or "
             "with two captures given as PIF.pcap,VIF.pcap")
    add = parser.add_argument_group("login").add_argument
    add("-k", "--key", metavar="KEYFILE", help="SSH private key (default: those that ssh would try)")
    add("--sudo", action="store_true", help="run remote commands with sudo -n unless logged in as root")
    add("-o", "--ssh-option", metavar="OPTION", dest="ssh_options", default=[], action="append",
        help="an option in the form of ssh_config, such as StrictHostKeyChecking=yes or UserKnownHostsFile=FILE "
             "(default: what ssh_config says; new hosts' keys are recorded); may be repeated")
    add = parser.add_argument_group("output").add_argument
    add("--csv", metavar="FILE", help="write a table of the packets that came in, a line each")
    add("--output", metavar="FILE", default="-", help="write the result there, whole or not at all, instead of to "
        "standard output")
    add("--format", choices=("json", "prometheus"),
        help="of the result: JSON, or a file for node_exporter's textfile collector (default: a summary at a terminal, "
             "JSON everywhere else)")
    add("--save", metavar="DIR", help="keep the captures and the JSON of each run in a new directory under DIR")
    add("--plot", metavar="FILE", help="draw the delays, of several runs over the rate, as .png, .svg or .pdf (needs "
        "matplotlib)")
    add("--label", metavar="KEY=VALUE", default=[], action="append", help="add this to config.labels; may be repeated",
        type=of_kind(r"(?s)[^=]+=.*", lambda text: tuple(text.split("=", 1)), "KEY=VALUE"))
    add("-q", "--quiet", action="store_true", help="no progress on stderr")
    add("-v", "--verbose", action="store_true", help="show the commands that are run")
    add("-h", "--help", action="help", help="show this help and exit")
    add("--version", action="version", version=f"netweaver {__version__}", help="show the version")


def check_arguments(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """UsageError for what makes no sense, or can't be written, as far as that is known before a long measurement."""
    several = arguments.runs > 1 or len(arguments.rate) > 1 or len(arguments.traffic) > 1
    mistakes = {
        "--source-command is instead of --traffic": arguments.source_command and arguments.traffic,
        "--load needs a --traffic, which tells the probes from it": arguments.source_command and arguments.load,
        "--csv, and --format prometheus, are for one run: with --save all are kept, for --pcaps":
            several and (arguments.csv or arguments.format == "prometheus"),
        "--stages-buffer is that of --stages": arguments.stages_buffer != STAGES_BUFFER and not arguments.stages,
        "--fail-if changed, slower and lossier need a --baseline":
            not arguments.baseline and set(CHANGES) & {text.strip() for text in arguments.fail_if}}
    for mistake, made in mistakes.items():
        if made:
            raise UsageError(mistake)
    if arguments.pcaps:
        options = {"host_interface": "interface", "vif_number": "num", "capture_filter": "filter",
                   "ssh_options": "ssh_option"}
        for name in MEASURING:
            if getattr(arguments, name) != parser.get_default(name):
                raise UsageError(f"--{options.get(name, name).replace('_', '-')} is for measuring, and --pcaps "
                                 "analyses what was captured")
        if len(arguments.pcaps) > 2:
            raise UsageError("--pcaps takes a directory of --save, or two captures: several files of one side are "
                             "separated by commas")
    else:
        needed = {"--hv": arguments.hv, "-s": arguments.source or arguments.duration, "-d": arguments.destination}
        if lacking := [option for option, value in needed.items() if not value]:
            raise UsageError(f"missing: {', '.join(lacking)} (see netweaver --help; instead of -s, --duration measures "
                             "what traffic there is; --pcaps analyses existing captures)")
        if not arguments.name_label and not arguments.vif:
            raise UsageError("the destination VM is missing: give its name with -n, or its interface with --vif")
    if arguments.plot:
        figure_class(arguments.plot)
    for path in filter(None, (arguments.csv, arguments.plot, arguments.output)):
        check_writable(path)
    existing = os.path.abspath(arguments.save or ".")
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if arguments.save and not (os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)):
        raise UsageError(f"can't save in {arguments.save}: {existing} is no directory that can be written to")


def new_weaver(arguments: argparse.Namespace, screen: Screen, alone: bool) -> NetWeaver:
    """What measures as the arguments say; it tells its steps if there is one run alone."""
    from getpass import getpass
    return NetWeaver(
        arguments.source, arguments.name_label or "", arguments.destination, arguments.hv, arguments.key,
        **{name: getattr(arguments, name) for name in PARAMETERS},
        stages=arguments.stages_buffer if arguments.stages else 0, direction=arguments.direction or "in",
        match_nat=arguments.match_nat, slowest=arguments.slowest, labels=dict(arguments.label),
        ask=getpass if sys.stdin is not None and sys.stdin.isatty() else None,
        progress=screen.step if alone else screen.log, log=screen.log, tick=screen.ticking(arguments.duration))


def sweep(arguments: argparse.Namespace) -> list[Probes]:
    """The traffic of each run, in order: all kinds once, and then again."""
    return [Probes(pattern, rate, arguments.size, arguments.port, arguments.source_command, arguments.load)
            for _ in range(arguments.runs)
            for pattern in arguments.traffic or ["syn"] for rate in arguments.rate or [RATE]]


def saved_runs(paths: Sequence[str]) -> list[SavedRun]:
    """The kept runs of which these are the directory, or the captures; none if they are other captures."""
    if len(paths) == 1:
        if not os.path.isdir(paths[0]):
            raise UsageError(f"{paths[0]}: give a directory of --save, or the captures of the pif and of the vif")
        return load_runs(paths[0])
    given = capture_paths(*paths)
    try:
        run = load_run(os.path.dirname(given["pif"][0]) or ".")
    except UsageError:                               # captures alone, or those of another version's run
        return []
    same = all(list(map(os.path.abspath, given[side])) == list(map(os.path.abspath, run.paths[side])) for side in given)
    return [run] if same else []


def capture_paths(pif: str, vif: str) -> dict[str, list[str]]:
    """The files of each side: one, or several with commas in between."""
    return {side: [path] if os.path.exists(path) else path.split(",") for side, path in (("pif", pif), ("vif", vif))}


def analyze_files(arguments: argparse.Namespace, run: SavedRun | None) -> tuple[dict[str, Any], Sequence[Result]]:
    """The report on a kept run, or on existing captures, and the results in it."""
    selection = {"sources": [resolve(Target(source).host) for source in arguments.source],
                 "destinations": [resolve(arguments.destination)] if arguments.destination else []}
    paths = run.paths if run else capture_paths(*arguments.pcaps)
    config: dict[str, Any] = dict(run.report["config"]) if run else {
        **{side: ",".join(names) for side, names in paths.items()}, "sources": selection["sources"],
        "destination": "".join(selection["destinations"]) or None, "direction": "in", "match_nat": False, "labels": {},
        "selection": selection}
    config |= {"version": __version__, "direction": arguments.direction or config["direction"],
               "match_nat": arguments.match_nat or config["match_nat"],
               "labels": {**config["labels"], **dict(arguments.label)},
               "selection": config["selection"] | {ends: given for ends, given in selection.items() if given}}
    if config["direction"] == "both" and (config["match_nat"] or not config["selection"]["destinations"]):
        raise UsageError("--direction both tells the directions apart by the VM's address: give it with -d, and not "
                         "--match-nat")
    analysis = analyze_captures(paths, selection_of(config), run.window if run else ALWAYS, run.limit if run else None)
    analysis = with_stages(analysis, os.path.dirname(paths["pif"][0]), config) if run else analysis
    report = build_report(analysis, config, run.report["capture"] if run else {"pif": {}, "vif": {}}, arguments.slowest)
    if run:
        report |= {name: run.report[name] for name in ("failed_sources", "interrupted") if name in run.report}
    return report, analysis.results


Baseline = namedtuple("Baseline", "path taken left_out runs")        # names, a number, and outcomes


def load_baseline(text: str, direction: Direction, destination: str | None, like: Report | None) -> Baseline:
    """An earlier measurement: what --save has kept, or two captures, "PIF,VIF".

    `like` is the `kind_of` the runs to take where there are several (None: all).
    """
    if os.path.isdir(text):
        runs = load_runs(text)
        taken = [run for run in runs if direction in run.selection.directions
                 and (len(runs) == 1 or like is None or kind_of(run.report["config"]) == like)]
        if not taken:
            raise UsageError(f"--baseline {text}: " + (
                f"none of its {len(runs)} runs is of this VM, direction and traffic" if len(runs) > 1 else
                f"it was measured with --direction {runs[0].report['config']['direction']}"))
        names = [os.path.basename(os.path.dirname(run.paths["pif"][0])) for run in taken]
        analyses = [analyze_captures(run.paths, run.selection, run.window, run.limit) for run in taken]
        left_out = len(runs) - len(taken)
    elif text.count(",") == 1:
        names, left_out = [text], 0
        analyses = [analyze_captures(capture_paths(*text.split(",")), Selection(
            [direction], destinations=[resolve(destination)] if destination else []))]
    else:
        raise UsageError(f"--baseline {text}: give a directory of --save, or two captures as PIF.pcap,VIF.pcap")
    found = [result for analysis in analyses for result in analysis.results if result.matching.direction is direction]
    if not all(result.samples() for result in found):
        raise UsageError(f"--baseline {text}: no packet is in both of its captures")
    return Baseline(text, names, left_out, [result.outcomes() for result in found])


class Signals:
    """The first SIGINT, SIGTERM or SIGHUP ends the traffic, if there is some to report on; another ends all at once."""

    def __init__(self) -> None:
        self.number = 0
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
        again, self.number = self.number != 0, self.number or number
        if again or not self.interrupt():
            raise KeyboardInterrupt
        if os.isatty(2):                             # not by sys.stderr, which may be in the middle of a line
            quietly(os.write, 2, b"\nstopping; again: give up\n")


class Screen:
    """What a person sees on stderr: lines and, at a terminal, the progress, a live line, colours and a summary.

    A terminal that has gone, or a stderr that can't be written, ends nothing.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False) -> None:
        terminal, dumb = sys.stderr is not None and sys.stderr.isatty(), os.environ.get("TERM") == "dumb"
        self._people, self._quiet, self._verbose, self._live = terminal and not quiet, quiet, verbose, False
        self._ticks = self._people and not verbose and not dumb
        self._colours = terminal and not os.environ.get("NO_COLOR") and not dumb
        self.fancy = "utf" in (getattr(sys.stderr, "encoding", None) or "").lower()

    def _print(self, text: str, end: str = "\n") -> None:
        try:
            if sys.stderr is not None:               # else print takes stdout
                print("\r\x1b[K" * self._live + text, end=end, file=sys.stderr, flush=True)
        except (OSError, ValueError):
            pass
        self._live = not end

    def say(self, line: str, colour: str = "") -> None:
        """A line that everyone gets; the colour is an SGR code."""
        line = self._shown(line)
        self._print(f"\x1b[{colour}m{line}\x1b[0m" if colour and self._colours else line)

    def _shown(self, line: str) -> str:
        line = printable(line)
        return line if self.fancy else line.replace("µ", "u").replace("±", "+-").encode("ascii", "replace").decode()

    def warn(self, warning: str) -> None:
        self.say(f"netweaver: warning: {warning}", "33")

    def error(self, error: object) -> None:
        if str(error):                               # with a reader that is gone there is nobody to tell
            self.say(f"netweaver: error: {error}", "31")

    def step(self, line: str) -> None:
        """A line on how far the run is."""
        if self._people or self._verbose:
            self.say(line)

    def log(self, line: str) -> None:
        """A command that is run."""
        if self._verbose:
            self.say(line)

    def ticking(self, duration: float | None) -> Callable[[float], None] | None:
        """What shows the seconds so far in a line that the next one replaces; None if nobody sees that."""
        of = f" of {duration:g}" if duration else ""
        return (lambda elapsed: self._print(f"{elapsed:.0f}{of} s", "")) if self._ticks else None

    def note(self, line: str) -> None:
        """What everyone hears who doesn't ask for quiet."""
        if not self._quiet:
            self.say(f"netweaver: {line}")

    def result(self, lines: Iterable[str], on_stdout: bool) -> None:
        """The numbers for people: on standard output if they are the result, or else on stderr if it is a terminal."""
        if on_stdout:
            if self._live:
                self._print("")
            write_file("-", lambda file: file.write("".join(f"{self._shown(line)}\n" for line in lines).encode()))
        for line in lines if self._people and not on_stdout else ():
            self.say(line, "" if line.startswith(" ") else "1")


class Outcome:
    """What becomes of the runs: documents, files, limits and words for people.  What fails of it ends nothing else."""

    def __init__(self, arguments: argparse.Namespace, limits: Sequence[Limit], screen: Screen,
                 signals: Signals) -> None:
        self._arguments, self._limits, self._screen, self._signals = arguments, limits, screen, signals
        self._on_terminal = arguments.output == "-" and sys.stdout is not None and sys.stdout.isatty()
        self._reports: list[dict[str, Any]] = []
        self._texts: list[str] = []
        self._delays: list[int] = []
        self._breaches: list[str] = []
        self._problems: list[NetWeaverError] = []

    def attempt(self, step: Callable[..., Any], *arguments: object) -> Any:
        """Makes something of the numbers; if that fails, they are not lost, and the error comes at the end."""
        try:
            return step(*arguments)
        except Exception as error:
            self._problems.append(error if isinstance(error, NetWeaverError) else unexpected(error))

    @property
    def exit_code(self) -> int:
        return (128 + self._signals.number if self._signals.number else
                self._problems[0].exit_code if self._problems else 7 if self._breaches else 0)

    def add(self, report: dict[str, Any], results: Sequence[Result]) -> None:
        """One run more; the limits on a comparison are for the run that has one."""
        arguments, limits = self._arguments, self._limits
        self._reports.append(report)
        self._delays = results[0].samples() if len(self._reports) == 1 else []
        self._breaches += [breach for limit in limits if (not limit.compares or "comparison" in report)
                           and (breach := limit.breach(report))]
        self.attempt(self._publish, report, results)
        if arguments.csv:
            self.attempt(write_csv, results[0], arguments.csv)
        if arguments.plot and len(self._reports) == 1:
            self.attempt(plot, arguments.plot, report, results)

    def _publish(self, report: Report, results: Sequence[Result]) -> None:
        import json
        output, place = self._arguments.output, real_path(self._arguments.output)
        if self._arguments.format == "prometheus":
            text = prometheus(series_labels(report["config"]), self.exit_code, report, results)
        elif self._on_terminal and not self._arguments.format:
            return                                   # the summary is the result
        else:
            text = json.dumps(report, indent=2 if self._on_terminal else None) + "\n"
        self._texts.append(text)
        whole = isinstance(place, str) and (os.path.isfile(place) or not os.path.exists(place))
        texts = "".join(self._texts if whole else [text]).encode("utf-8", "replace")
        write_file(output, lambda file: file.write(texts))

    def end(self) -> None:
        """What is said at the end of all runs."""
        reports, screen = self._reports, self._screen
        if len(reports) > 1 and self._arguments.plot:
            self.attempt(plot_runs, self._arguments.plot, reports)
        if reports:
            lines = table(reports) if len(reports) > 1 else summary(reports[0], self._delays, screen.fancy)
            self.attempt(screen.result, lines, self._on_terminal and not self._arguments.format)
        asked = any(limit.name == "p99.9" for limit in self._limits)
        for warning in dict.fromkeys(warning for report in reports for warning in report["warnings"]):
            if asked or FEW_FOR_P99_9 not in warning:
                screen.warn(warning)
        for breach in self._breaches:
            screen.say(f"netweaver: limit: {breach}", "31")
        for problem in dict.fromkeys(map(str, self._problems)):
            screen.error(problem)


def measure(weaver: NetWeaver, probes: Sequence[Probes], outcome: Outcome, screen: Screen,
            save: str | None) -> Iterator[tuple[dict[str, Any], Sequence[Result]]]:
    """The reports and results of runs with this traffic, one after the other, until one is interrupted."""
    for number, each in enumerate(probes, 1):
        if len(probes) > 1:
            screen.step(f"Run {number} of {len(probes)}...")
        weaver.generate_and_record(probes=each)
        weaver.pull_generated_files()
        report = weaver.analyze()
        if save and (directory := outcome.attempt(weaver.save, save, report)):
            report["saved"] = directory
            screen.note(f"saved in {directory}")
        yield report, weaver.results
        if weaver.interrupted:
            break


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser, signals: Signals, screen: Screen) -> int:
    """Does what the arguments say; returns the exit code."""
    from contextlib import ExitStack
    check_arguments(arguments, parser)
    kept = saved_runs(arguments.pcaps) if arguments.pcaps else []
    direction = arguments.direction or (kept[0].report["config"]["direction"] if kept else "in")
    limits = [Limit(text, direction, arguments.stages or bool(arguments.pcaps)) for text in arguments.fail_if]
    outcome = Outcome(arguments, limits, screen, signals)
    probes = [] if arguments.pcaps else sweep(arguments)
    if arguments.pcaps:
        kinds: list[Any] = [kind_of({**run.report["config"], "direction": direction}) for run in kept] or [None]
    else:
        arguments.destination = resolve(arguments.destination)       # once: it may be another address the next time
        for each in probes:
            each.source_command(1, arguments.destination)
        kinds = [kind_of({**vars(arguments), "direction": direction,
                          "traffic": each.account() if arguments.source else None}) for each in probes]
    groups = list(map(kinds.index, kinds))           # the first of the same kind
    baselines = {group: load_baseline(
        arguments.baseline, DIRECTIONS[direction][0], arguments.destination if direction == "both" else None,
        kinds[group]) for group in set(groups) if arguments.baseline}
    for path, taken, left_out, _ in baselines.values():
        if len(taken) + left_out > 1:
            screen.step(f"Baseline: {len(taken)} of {len(taken) + left_out} runs in {path}: {', '.join(taken)}")
    with ExitStack() as stack:
        stack.callback(outcome.end)
        if arguments.pcaps:
            runs: Iterator[Any] = (analyze_files(arguments, saved) for saved in kept or (None,))
        else:
            if not arguments.verbose:                # paramiko's threads end in tracebacks when a connection does
                threading.excepthook = lambda _: None
            weaver = stack.enter_context(new_weaver(arguments, screen, len(probes) == 1))
            for name in weaver.unchecked:
                screen.warn(f"{name}: its host key is not checked: anyone in between can read and change what is sent")
            if arguments.dry_run:
                text = "".join(f"{line}\n" for line in weaver.dry_run(probes))
                write_file("-", lambda file: file.write(text.encode("utf-8", "replace")))
                return 0
            signals.interrupt = weaver.interrupt
            runs = measure(weaver, probes, outcome, screen, arguments.save)
        outcomes: list[Sequence[int]] = []
        for place, (report, results) in enumerate(runs):
            outcomes.append(results[0].outcomes() if arguments.baseline else ())
            if arguments.baseline and groups[place] not in groups[place + 1:]:       # the last of its kind
                path, taken, left_out, before = baselines[groups[place]]
                now = [each for each, group in zip(outcomes, groups) if group == groups[place]]
                report["comparison"] = {"path": path, "taken": taken, "left_out": left_out, **compare(before, now)}
            outcome.add(report, results)
            if outcome.exit_code == ReaderGone.exit_code:
                break
    return outcome.exit_code


def unexpected(error: Exception) -> NetWeaverError:
    return NetWeaverError(f"unexpected {type(error).__name__}: {error} (-v shows where; please report it)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    screen, verbose, arguments, failed = Screen(), False, None, True
    while os.open(os.devnull, os.O_RDWR) <= 2:       # no other file must get the number of a stream that is closed
        pass
    with Signals() as signals:
        try:
            parser = build_parser()
            arguments = parser.parse_args(argv)
            screen, verbose = Screen(arguments.quiet, arguments.verbose), arguments.verbose
            code = run(arguments, parser, signals, screen)
            failed = False
        except KeyboardInterrupt:
            screen.error("interrupted")
            code = 130
        except Exception as error:
            known = isinstance(error, NetWeaverError)
            if verbose and not known:
                raise
            screen.error(error if known else unexpected(error))
            code = getattr(error, "exit_code", 1)
        code = 128 + signals.number if signals.number else code
        if failed and arguments and arguments.format == "prometheus":
            try:
                text = prometheus(series_labels({
                    **vars(arguments), "hypervisor": arguments.hv, "labels": dict(arguments.label)}), code)
                write_file(arguments.output, lambda file: file.write(text.encode("utf-8", "replace")))
            except NetWeaverError:
                pass                                 # what happened before matters more
        return code


if __name__ == "__main__":
    raise SystemExit(main())
