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

Sections, each of which uses those before it, and the main name of each:

    Times              ANSWER_SECONDS       times that depend on each other
    Model              DirectionResult      the values that the phases of an analysis exchange
    Packets            identify             a frame in, the identities of its packets out
    Selection          Selection            which packets are measured; writes the capture filter
    Capture files      Capture              a file in, blocks of identities and times out
    Matching           collect, match       the packets seen at both points, and when
    Statistics         delay_statistics     delays, flows, reordering, the guest's time
    Comparison         compare_runs         two sets of runs
    Kernel trace       attach_stages        --stages: recording, reading, attribution, report
    Remote shell       Host, Job            commands that end, whatever happens
    Login              Access               SSH as OpenSSH does it, and the local machine
    Toolstacks         TOOLSTACKS           a VM's name in, its interface out
    Uplinks            physical_interfaces  a VM's interface in, the physical ones out
    Platform           Facts                the hypervisor's kernel, links and tcpdump
    Traffic            Traffic              the packets that the sources send
    Run information    RunInfo              the document's `config`, in both directions
    Planning           make_plan            all commands, before anything is sent
    Recording          make_recording       captures, traffic, the measured period
    Analysis           analyze_captures     files in, results out; no SSH from here on
    Saved runs         save_run, load_run   directories of --save
    NetWeaver          NetWeaver            a whole run, and its steps
    Report             FIGURES, build_report, warnings; Limits: parse_limit
    Outputs            Output, Outcome      text, JSON, CSV, Prometheus, pictures
    Options, Files     Options              the command line; saved runs and captures as input
    Main               main                 the only place that exits

To add              change                                               guarded by
    a toolstack     a function (UnknownVMError lets the next one try),   unit/test_toolstacks.py
                    a row of TOOLSTACKS (whose order is that of auto),   unit/test_readme.py
                    VM_INTERFACE if it names interfaces in its own way;
                    README: requirements, tested on
    a header        TAG_SIZES, or _after_header; its frame in TAGS of    unit/test_packets.py
                    the test. The filter of a live capture knows only
                    VLAN tags and tunnels
    a tunnel        TUNNEL_PORTS, _udp_tunnel_content; unless its        unit/test_tunnel_ports.py
                    header has 8 bytes, _tunnel_expression; TUNNEL_KINDS unit/test_capture_filter.py
                    finds it by itself; --overlay's help; WRAPPINGS
    a figure        a row of FIGURES; its value: of delays in            unit/test_statistics.py
                    DelayStatistics and delay_statistics, others in      unit/test_report.py
                    direction_report; README's table. The summary shows  unit/test_readme.py
                    DELAY_COLUMNS. PROMETHEUS_HELP if it is no time;     unit/test_prometheus.py
                    a ratio is a share, at most 1
    ... to compare  COMPARED, run_figures, STUDENT_T, CHANGE_LIMITS      unit/test_comparison.py
    an output       a subclass of Output; of the result: in FORMATS,     unit/test_options.py
                    with `for_result`; --format's help
    an option       a field of Options (with_pcaps=True, or a field of   unit/test_options.py
                    Settings and new_weaver if it is for measuring)
    a time-out      in Times; those after it follow                      unit/test_hosts.py
"""

from __future__ import annotations

import argparse
import atexit
import csv
import difflib
import errno
import fcntl
import glob
import io
import json
import math
import os
import pwd
import random
import re
import select
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
from array import array
from base64 import b64decode
from bisect import bisect, bisect_left
from calendar import timegm
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import Field, asdict, dataclass, field, fields, replace
from decimal import Decimal
from enum import Enum, IntEnum
from functools import cached_property, partial
from getpass import getpass
from heapq import merge
from ipaddress import ip_address
from itertools import accumulate, count, cycle, islice, pairwise
from operator import attrgetter, ge, gt, itemgetter, le, lt, mul
from queue import Empty, SimpleQueue
from shlex import quote
from shlex import split as split_words
from struct import Struct, unpack_from
from struct import error as StructError
from textwrap import shorten, wrap
from types import MappingProxyType, ModuleType
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NoReturn, Protocol, TypeVar, cast

# paramiko and matplotlib take long to import, and are not needed by every run.
if TYPE_CHECKING:
    import paramiko
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure as Picture

Report = Mapping[str, Any]
Term = Callable[[str], str]  # an address in, a part of a pcap-filter(7) expression out
T = TypeVar("T")

__version__ = "3.0.0"
__all__ = [
    "NetWeaver",
    "Settings",
    "Traffic",
    "main",
    "NetWeaverError",
    "UsageError",
    "HostConnectionError",
    "RemoteCommandError",
    "UnknownVMError",
    "CaptureError",
    "NoMatchError",
]

SCHEMA_VERSION = 3
NANOSECONDS = 1_000_000_000
DAY = 86_400 * NANOSECONDS


class NetWeaverError(Exception):
    """An error that a user can do something about; only `main` turns it into an exit code."""

    exit_code = 1


class UsageError(NetWeaverError):
    """An argument that can't be used, or a file that can't be written."""

    exit_code = 2


class HostConnectionError(NetWeaverError):
    """A host can't be reached, its key or ours was refused, or the connection broke."""

    exit_code = 3


class NoAnswerError(HostConnectionError):
    """No answer came in time."""


class RemoteCommandError(NetWeaverError):
    """A remote command failed, or its answer can't be used."""

    exit_code = 4


class UnknownVMError(RemoteCommandError):
    """A toolstack has no VM of that name: another one may have it."""


class CaptureError(NetWeaverError):
    """A capture could not be made, fetched or read."""

    exit_code = 5


class NoMatchError(NetWeaverError):
    """Both captures can be read, but contain no delay."""

    exit_code = 6


class ReaderGone(NetWeaverError):
    """The reader of standard output has closed the pipe."""

    exit_code = 141


@contextmanager
def naming(subject: str) -> Iterator[None]:
    """Begin the message of an error with the option or the run that it is about."""
    try:
        yield
    except NetWeaverError as error:
        name_error(error, subject)
        raise


def name_error(error: NetWeaverError, subject: str) -> None:
    """Begin the message of an error with its subject; one without words stays so."""
    message = str(error)
    if subject and message and not message.startswith(subject):
        error.args = (f"{subject}: {message}",)


def counted(number: int, singular: str, plural: str = "") -> str:
    """Return a number with a noun, which may be followed by its verb: "1 run is", "2 runs are"."""
    if number == 1:
        return f"1 {singular}"
    return f"{number} {plural or singular + 's'}"


# ---- Times -----------------------------------------------------------------------------------
# In seconds.  The comment of a value that is computed from others begins with the result.

HEARTBEAT_SECONDS = 2  # between two renewals of a job's lease, each of which the host answers
# Without a sign of life for five heartbeats, either end gives the other up.
IDLE_SECONDS = 5 * HEARTBEAT_SECONDS  # 10, which README names
CONNECT_SECONDS = IDLE_SECONDS  # 10, for each step of a connection and each block of a file
# The kernel gives up a silent peer a heartbeat earlier, since the kernel's error names the reason.
DEAD_PEER_SECONDS = IDLE_SECONDS - HEARTBEAT_SECONDS  # 8
# An answer is overdue a heartbeat after IDLE_SECONDS, so that a lost connection is not reported as
# a slow command. Wherever a connection stalls, the run ends within this time.
ANSWER_SECONDS = IDLE_SECONDS + HEARTBEAT_SECONDS  # 12, for a look-up, or a tool's start or end
LONG_ANSWER_SECONDS = 2 * ANSWER_SECONDS  # 24, for a look-up by many commands, on a busy host
KILL_SECONDS = ANSWER_SECONDS // 4  # 3, from TERM to KILL
PERSON_SECONDS = 600  # for a person who is asked for a passphrase
GRACE_SECONDS = 0.5  # after a signal, for the calls in other threads to remove their files

# ---- Model -----------------------------------------------------------------------------------
# The values that the phases of an analysis exchange.  All times and delays are integer nanoseconds.

FOREVER = 1 << 62  # later than any time stamp; -FOREVER is earlier than any
NO_DELAY = -(1 << 63)  # in place of a delay: the lowest value of an array("q")


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: there are just two
class Direction:
    """A direction of traffic: the capture points ("pif" and "vif") in the order of passage."""

    name: str
    first: str
    second: str


IN = Direction("in", first="pif", second="vif")
OUT = Direction("out", first="vif", second="pif")
DIRECTIONS = {"in": (IN,), "out": (OUT,), "both": (IN, OUT)}


@dataclass(frozen=True)
class Window:
    """The period that is measured, by the clock of the captures; without arguments, all time.

    If `is_live`, packets may still be under way at `watched_until`: these are undecided, and so
    are all packets that were sent after the first of them.
    """

    start: int = -FOREVER  # earlier packets and arrivals are in no count
    end: int = FOREVER  # of the traffic, or of the first point's capture
    watched_until: int = FOREVER  # at the second point; later packets may not have been captured
    wait: int = 0  # how long the user is willing to wait for a packet
    watched_from: int = -FOREVER  # at the second point
    is_live: bool = True

    def decided(self, longest: int) -> tuple[int, int]:
        """Return the first and the last time of sending at which a missing packet counts as lost.

        A missing packet that was sent earlier or later is undecided.  In live traffic the second
        point must have been watched for `longest`, the delay of the slowest packet, after sending.
        Of given captures, which mostly hold all of their traffic, only the time of sending counts.
        """
        if self.is_live:
            return self.watched_from, self.watched_until - longest
        return self.watched_from, self.watched_until


ALWAYS = Window()


@dataclass
class PointSightings:
    """The packets that were seen at one capture point; after `sort`, in order of time."""

    ids: array[int] = field(default_factory=lambda: array("I"))
    times: array[int] = field(default_factory=lambda: array("q"))
    in_order: bool = True

    def add(self, ids: list[int], times: list[int]) -> None:
        """Add the packets that were seen next."""
        if times != sorted(times) or (self.times and times and times[0] < self.times[-1]):
            self.in_order = False
        self.ids.fromlist(ids)
        self.times.fromlist(times)

    def sort(self) -> None:
        """Restore the order of time, which several captures or queues may have mixed up."""
        if self.in_order:
            return
        order = sorted(range(len(self.times)), key=self.times.__getitem__)
        self.ids = array("I", [self.ids[index] for index in order])
        self.times = array("q", [self.times[index] for index in order])
        self.in_order = True

    def since(self, start: int) -> PointSightings:
        """Return the sightings from a time on, which must be in order of time."""
        begin = bisect_left(self.times, start)
        if begin == 0:
            return self
        return PointSightings(self.ids[begin:], self.times[begin:])

    def ranks_between(self, earliest: int, latest: int) -> range:
        """Return the ranks (positions) of the sightings from `earliest` to `latest`, inclusive."""
        return range(bisect_left(self.times, earliest), bisect(self.times, latest))

    def truncate(self, size: int) -> None:
        """Forget the sightings after the first `size` ones."""
        del self.ids[size:]
        del self.times[size:]


class Sightings:
    """The packets of one direction that were seen at each capture point.

    Packets with the same identity share an id: ids count distinct identities from 0.  If
    `translated`, addresses are ignored: packets that differ only in them share an id, too.
    """

    def __init__(self, direction: Direction, translated: bool = False) -> None:
        self.direction = direction
        self.points = {direction.first: PointSightings(), direction.second: PointSightings()}
        self.translated = translated
        # By identity; looking up a new one adds it, with the next number as its id.
        self._ids: defaultdict[bytes, int] = defaultdict(count().__next__)
        self._sequence: list[bytes] = []  # identities by id, of the points that have been read
        self._expected_id = 0  # of the packet that the second point probably sees next
        self._originals: list[bytes] = []  # if `translated`: by id, an identity with addresses

    def take_identities(self) -> list[bytes]:
        """Return the identity of each id, and free the memory of the table from identity to id.

        If addresses are ignored, an id has the identity of its first sighting.  No packets can be
        added afterwards.
        """
        if self.translated:
            identities = self._originals
        else:
            self._complete_sequence()
            identities = self._sequence
        self._ids.clear()
        return identities

    def add(self, point: str, identities: Sequence[bytes], times: list[int]) -> None:
        """Add the packets that were seen next at a point."""
        if not self.translated:
            self.points[point].add(self._look_up(identities), times)
            return
        without_addresses = (
            identity[:ADDRESSES] + _transport_of(identity) for identity in identities
        )
        ids = self._look_up(without_addresses)
        self.points[point].add(ids, times)
        for packet_id, identity in zip(ids, identities):
            if packet_id == len(self._originals):  # its first sighting
                self._originals.append(identity)

    def end(self, point: str) -> None:
        """Note that all packets of a point have been added."""
        self.points[point].sort()
        self._complete_sequence()

    def _complete_sequence(self) -> None:
        if len(self._sequence) < len(self._ids):
            self._sequence = list(self._ids)  # a dict keeps the order in which ids were given

    def _look_up(self, identities: Iterable[bytes]) -> list[int]:
        """Return the ids of packets; an identity that is new gets the next id.

        The second point sees most packets in the order of the first: a comparison with the packet
        that is expected next is faster than a look-up.
        """
        sequence = self._sequence
        if not sequence:  # the first point is being read
            return list(map(self._ids.__getitem__, identities))
        expected = self._expected_id
        ids = []
        for identity in identities:
            if expected < len(sequence) and identity == sequence[expected]:
                packet_id = expected
            else:
                packet_id = self._ids[identity]
            ids.append(packet_id)
            expected = packet_id + 1
        self._expected_id = expected
        return ids


class PacketClass(IntEnum):
    """The fate of a packet that passed the first point."""

    MATCHED = 0
    AMBIGUOUS = 1  # shares its identity with other packets sent: counted, but never timed
    LOST = 2
    UNDECIDED = 3  # missing at the second point, which may not have been watched: not counted
    # Until `match` makes them AMBIGUOUS: of packets that share an identity, as many as are missing.
    AMBIGUOUS_LOST = 4
    AMBIGUOUS_UNDECIDED = 5


@dataclass
class Undecided:
    """The numbers of packets that are in no other count, by the reason."""

    under_way: int = 0  # when the captures were stopped, and all that were sent later
    unwatched: int = 0  # missing at the second point, which was not captured at that time
    unwatched_first: int = 0  # missing at the first point, which was not captured at that time
    uncaptured: int = 0  # missing, up to the number that the second point's capture dropped or cut

    @property
    def sent(self) -> int:
        """The number of packets that passed the first point."""
        return self.under_way + self.unwatched + self.uncaptured

    @property
    def total(self) -> int:
        return self.sent + self.unwatched_first


@dataclass
class Counts:
    """The numbers of packets of one direction; the undecided ones are only in `undecided`."""

    matched: int  # seen at both points, ambiguous ones included
    ambiguous: int
    lost: int
    duplicated: int  # further arrivals of packets that had arrived already
    second_only: int  # arrivals of packets that the first point has not seen
    strays: int  # packets with an arrival too long before or after they were sent
    undecided: Undecided

    @property
    def first(self) -> int:
        """The number of packets that passed the first point."""
        return self.matched + self.lost

    @property
    def second(self) -> int:
        """The number of packets that passed the second point."""
        return self.matched + self.duplicated + self.second_only

    @property
    def timed(self) -> int:
        """The number of packets with a delay."""
        return self.matched - self.ambiguous

    @property
    def loss_ratio(self) -> float:
        """The share of lost packets (RFC 7680), given that at least one passed the first point."""
        return self.lost / self.first


@dataclass
class DirectionResult:
    """The fates and delays of the packets of one direction.

    Packets are referred to by rank, their position in the order in which they passed the first
    point, from the first that counts to the last.
    """

    direction: Direction
    identities: list[bytes]  # by id
    ids: array[int]  # by rank
    sent: array[int]  # time at the first point, by rank
    delays: array[int]  # by rank; NO_DELAY if there is none
    classes: bytearray  # PacketClass by rank
    arrivals: array[int]  # ranks of the packets with a delay, in the order of the second point
    duplicates: Counter[int]  # number of further arrivals, by rank
    unsent_ids: array[int]  # packets that only the second point saw
    counts: Counts
    until: int  # the first point was watched until then; later packets are undecided
    translated: bool = False  # packets of different addresses may share their identity
    trace: TraceAccount | None = None  # what the kernel's trace shows

    @cached_property
    def kinds(self) -> dict[bytes, bytes]:
        """One identity of each kind, by its first two bytes: IP version and protocol."""
        return {identity[:2]: identity for identity in self.identities}

    def identity(self, rank: int) -> bytes:
        return self.identities[self.ids[rank]]

    def ranks(self, *classes: PacketClass) -> list[int]:
        """Return the ranks of the packets of these classes, in order."""
        return [rank for rank, kind in enumerate(self.classes) if kind in classes]

    def samples(self) -> list[int]:
        """Return the delays that are known, in the order of the first point."""
        return [delay for delay in self.delays if delay != NO_DELAY]


@dataclass
class GuestTimes:
    """The VM's times to answer probes, and the numbers of answered and unanswered ones."""

    times: dict[int, int]  # by a probe's rank: from its arrival at the vif until its answer leaves
    unanswered: int
    undecided: int  # not answered, but not watched for as long as the slowest answer took
    ambiguous: int  # sent several times, so that it is unknown which of them was answered

    @property
    def answered(self) -> int:
        return len(self.times)


@dataclass
class Analysis:
    """The comparison of two captures, or of two sets of captures."""

    results: Sequence[DirectionResult]
    counts: Mapping[str, Report]  # what was in the files, by point, for the report
    warnings: list[str]
    guest: GuestTimes | None = None  # if both directions were measured


# ---- Packets ---------------------------------------------------------------------------------
# An identity distinguishes a packet from all others wherever it is captured.  It consists of:
#   1 byte         version of IP, with NOT_FIRST for all fragments of a datagram but the first;
#                  TEXT for a line of a text capture
#   1 byte         protocol
#   2 bytes        length field of the IP header
#   2 bytes        identification of the datagram; 0 in IPv6 without a fragment header
#   8 or 32 bytes  source and destination address
#   the rest       what no router changes of the transport header and the first bytes of payload;
#                  the offset of a later fragment; the text of a line

TEXT = 0
NOT_FIRST = 0x80
ADDRESSES = 6  # offset of the addresses in an identity
PAYLOAD = 32  # bytes of payload in an identity
MOST_HEADERS = 32  # in one frame; real traffic has fewer

# Ethertypes, and two values that stand in for one.
UNKNOWN = 0  # no IP packet follows
ANY_IP = -1  # an IP header follows, whose first byte has the version
IPV4 = 0x0800
ARP = 0x0806
TRANSPARENT_ETHERNET = 0x6558
IPV6 = 0x86DD
MPLS = (0x8847, 0x8848)
PPPOE_SESSION = 0x8864
MACSEC = 0x88E5
LARGEST_LENGTH = 1500  # up to this, a field is no ethertype, but the length of a frame with LLC
# By ethertype: the bytes after it, in headers whose last field is the ethertype of what follows.
TAG_SIZES = {
    0x8100: 4,  # VLAN (802.1Q)
    0x88A8: 4,  # service VLAN (802.1ad)
    0x9100: 4,  # service VLANs of older switches
    0x9200: 4,
    0x8926: 6,  # VN-Tag
    0x892F: 6,  # HSR (IEC 62439-3)
    0xF1C1: 6,  # redundancy tag (802.1CB)
    0x8909: 8,  # Cisco's security group tag
    0x893F: 8,  # E-Tag (802.1BR)
    0xDADA: 8,  # Marvell's DSA tag
    0x8903: 16,  # FabricPath, with an Ethernet header
    0x88E7: 18,  # provider backbone bridge (802.1ah), with an Ethernet header
    TRANSPARENT_ETHERNET: 14,
}
LLC_SNAP = b"\xaa\xaa\x03\0\0\0"  # an ethertype follows
PPP_IP = (0x0021, 0x0057)  # protocols of PPP

# Link types.
EN10MB = 1
LINUX_SLL = 113  # of tcpdump -i any
LINUX_SLL2 = 276
IP_OFFSETS = {  # of link types that have only IP packets, after a header of this size
    0: 4,  # BSD's loopback
    12: 0,  # raw IP
    14: 0,  # raw IP of OpenBSD
    101: 0,  # raw IP, as pcap files have it
    108: 4,  # OpenBSD's loopback
    228: 0,  # raw IPv4
    229: 0,  # raw IPv6
}
LINK_TYPES = {EN10MB, LINUX_SLL, LINUX_SLL2, *IP_OFFSETS}

# Protocols.
HOP_BY_HOP_OPTIONS = 0
ICMP = 1
IP_IN_IP = 4
TCP = 6
UDP = 17
IPV6_IN_IP = 41
ROUTING = 43
FRAGMENT = 44
GRE = 47
AUTHENTICATION = 51
ICMPV6 = 58
DESTINATION_OPTIONS = 60
EXTENSION_HEADERS = (
    HOP_BY_HOP_OPTIONS,
    ROUTING,
    FRAGMENT,
    AUTHENTICATION,
    DESTINATION_OPTIONS,
)
PROTOCOL_NAMES = {ICMP: "ICMP", ICMPV6: "ICMPv6", TCP: "TCP", UDP: "UDP"}

# The kinds of tunnels in UDP, by their usual ports.
VXLAN = "vxlan"
GENEVE = "geneve"
TUNNEL_PORTS = {4789: VXLAN, 8472: VXLAN, 6081: GENEVE}

# Flags of TCP.
FIN = 0x01
SYN = 0x02
RST = 0x04
PSH = 0x08
ACK = 0x10
CWR = 0x80

# A plain frame is Ethernet, with one VLAN tag at most, and contains a TCP segment or UDP datagram
# in an IPv4 packet without options.
PLAIN_FRAME = (
    "12x3s"  # skips MAC addresses; ethertype, version and size of the IP header
    "x4s"  # skips the type of service; length and identification
    "2s"  # flags and offset of fragmentation
    "xB"  # skips the time to live; protocol
    "2x22s"  # skips the checksum; addresses (8), transport header up to TCP's flags (14)
)
PLAIN_FIELDS_SIZE = 48  # up to TCP's flags
PLAIN_SIZE = 54  # up to the end of TCP's header without options
TAGGED = b"\x81\x00"
PLAIN_IPV4 = b"\x08\x00\x45"
UNFRAGMENTED = (b"\0\0", b"\x40\0")  # without and with the flag "don't fragment"
NO_TCP_OPTIONS = 0x50  # the byte of TCP's header that has its size: 5 words
PLAIN_TCP = bytes([4, TCP])
PLAIN_UDP = bytes([4, UDP])

TOO_SHORT = (IndexError, StructError)  # raised by reading beyond the end of a frame

_plain_fields = Struct(">" + PLAIN_FRAME).unpack_from
_plain_udp_fields = Struct(">H18xHH").unpack_from  # from the length of the IP packet on
_ipv4_fields = Struct(">Bx4sHxB2x8s").unpack_from
_ipv6_fields = Struct(">4x2sBx32s").unpack_from


def identify(
    frame: bytes, linktype: int, tunnel_ports: Mapping[int, str] = TUNNEL_PORTS
) -> list[bytes]:
    """Return the identities of the IP packets in a frame, the outermost first.

    A frame with ARP has none, even if that is in a tunnel.  `linktype` is one of LINK_TYPES, and
    `tunnel_ports` are the kinds of UDP tunnels by port.
    Raises one of TOO_SHORT if the frame ends before the innermost packet is identified.  But if the
    packet around that is whole, its content is malformed, and is ignored.
    """
    if linktype == EN10MB:
        identity = _identify_plain(frame, 0, len(frame), tunnel_ports)
        if identity:
            return [identity]
    return _dissect(frame, linktype, tunnel_ports)


def _dissect(frame: bytes, linktype: int, tunnel_ports: Mapping[int, str]) -> list[bytes]:
    """Identify the packets in a frame of any kind, as `identify` does."""
    packets: list[bytes] = []
    packet_end = 0
    try:
        ethertype, offset = _link_header(frame, linktype)
        for _ in range(MOST_HEADERS):
            if ethertype in (IPV4, IPV6, ANY_IP):
                version = frame[offset] >> 4
                if version == 4 and frame[offset] >= 0x45:  # a header of 5 words or more
                    identity, transport, size = _identify_ipv4(frame, offset)
                elif version == 6:
                    identity, transport, size = _identify_ipv6(frame, offset)
                else:
                    break
                packets.append(identity)
                packet_end = transport + size
                ethertype, offset = _tunnel_content(frame, identity, transport, tunnel_ports)
            elif ethertype == ARP:
                return []
            elif ethertype == UNKNOWN:
                break
            else:
                ethertype, offset = _after_header(frame, ethertype, offset)
    except TOO_SHORT:
        if not packets or packet_end > len(frame):  # else the last packet's content is malformed
            raise
    return packets


def _identify_plain(data: bytes, start: int, end: int, tunnel_ports: Mapping[int, str]) -> bytes:
    """Return the identity of the packet in a plain frame, or b"" if it needs full dissection.

    `start` and `end` are where the frame is in the data.
    """
    if end - start < PLAIN_SIZE:
        return b""
    # `header` begins with the addresses (8 bytes): [20] is TCP's header size, and [21] its flags.
    kind, length_and_id, fragmentation, protocol, header = _plain_fields(data, start)
    if kind != PLAIN_IPV4 and kind[:2] == TAGGED and end - start >= PLAIN_SIZE + 4:
        start += 4  # from here on, offsets are those of a frame without a tag
        kind, length_and_id, fragmentation, protocol, header = _plain_fields(data, start)
    if kind != PLAIN_IPV4 or fragmentation not in UNFRAGMENTED:
        return b""
    if protocol == TCP:
        segment: bytes = PLAIN_TCP + length_and_id + header
        if header[20] == NO_TCP_OPTIONS or header[21] & SYN:  # routers edit the options of a SYN
            return segment
        options_end = start + 34 + (header[20] >> 4) * 4  # 14 bytes of Ethernet, 20 of IPv4
        if options_end <= end:
            return segment + data[start + PLAIN_SIZE : options_end]
    elif protocol == UDP:
        headers: bytes = PLAIN_UDP + length_and_id + header[:14]  # up to UDP's length
        return _identify_plain_udp(data, start, end, headers, tunnel_ports)
    return b""


def _identify_plain_udp(
    data: bytes, start: int, end: int, headers: bytes, tunnel_ports: Mapping[int, str]
) -> bytes:
    """Return the identity of a plain UDP datagram, or b"" if it needs full dissection.

    `headers` is the part of the identity that comes from the headers.
    """
    # From the IP packet's length on, after 14 bytes of Ethernet and 2 of IPv4:
    ip_length, destination_port, udp_length = _plain_udp_fields(data, start + 16)
    payload = start + 42  # after the headers: 14 bytes of Ethernet, 20 of IPv4, 8 of UDP
    payload_end = payload + udp_length - 8
    if payload_end > payload + PAYLOAD:
        payload_end = payload + PAYLOAD
    if ip_length != 20 + udp_length or destination_port in tunnel_ports:
        return b""
    if payload_end < payload or payload_end > end:  # an impossible length, or a truncated frame
        return b""
    return headers + data[payload:payload_end]


def _u16(data: bytes, offset: int) -> int:
    return data[offset] << 8 | data[offset + 1]


def _part(data: bytes, offset: int, size: int) -> bytes:
    """Return a part of the data; raises IndexError if it is not empty, and the data end earlier."""
    if size and offset + size > len(data):
        raise IndexError
    return data[offset : offset + size]


def _link_header(frame: bytes, linktype: int) -> tuple[int, int]:
    """Return the ethertype of what a frame carries, and where that begins."""
    if linktype == EN10MB:
        return _u16(frame, 12), 14
    if linktype == LINUX_SLL:  # its header has 16 bytes, the ethertype at the end
        return _u16(frame, 14), 16
    if linktype == LINUX_SLL2:  # its header has 20 bytes, the ethertype at the beginning
        return _u16(frame, 0), 20
    return ANY_IP, IP_OFFSETS[linktype]


def _after_header(frame: bytes, ethertype: int, offset: int) -> tuple[int, int]:
    """Return the ethertype of what follows a header other than IP's, and where that begins.

    `ethertype` is the header's own, and `offset` where the bytes after it begin.
    """
    if ethertype in TAG_SIZES:
        offset += TAG_SIZES[ethertype]
        return _u16(frame, offset - 2), offset
    if ethertype in MPLS:
        is_last_label = frame[offset + 2] & 1
        if not is_last_label:
            return ethertype, offset + 4
        if frame[offset + 4] >> 4 == 0:  # control word of a pseudowire (RFC 4385)
            return TRANSPARENT_ETHERNET, offset + 8
        return ANY_IP, offset + 4
    if ethertype == PPPOE_SESSION and _u16(frame, offset + 6) in PPP_IP:
        return ANY_IP, offset + 8  # 6 bytes of PPPoE, 2 of PPP
    if ethertype == MACSEC:
        flags = frame[offset]
        is_encrypted = flags & 0x0C
        size = 8  # with the ethertype of what follows
        if flags & 0x20:  # with the secure channel's identifier
            size = 16
        if not is_encrypted:
            return _u16(frame, offset + size - 2), offset + size
    if ethertype <= LARGEST_LENGTH and frame.startswith(LLC_SNAP, offset):
        return _u16(frame, offset + 6), offset + 8
    return UNKNOWN, offset


def _tunnel_content(
    frame: bytes, identity: bytes, transport: int, tunnel_ports: Mapping[int, str]
) -> tuple[int, int]:
    """Return the ethertype of what a tunnel's packet carries, and where that begins.

    The ethertype is UNKNOWN if the packet belongs to no tunnel.  `transport` is where the header
    after that of IP begins.
    """
    protocol = identity[1]
    if identity[0] & NOT_FIRST:
        return UNKNOWN, transport
    if protocol == UDP:
        destination_port = _u16(frame, transport + 2)
        return _udp_tunnel_content(frame, tunnel_ports.get(destination_port), transport)
    if protocol == GRE:
        content = transport + 4
        for optional_field in (0x80, 0x20, 0x10):  # checksum, key, sequence number
            if frame[transport] & optional_field:
                content += 4
        return _u16(frame, transport + 2), content
    if protocol == IP_IN_IP:
        return IPV4, transport
    if protocol == IPV6_IN_IP:
        return IPV6, transport
    return UNKNOWN, transport


def _udp_tunnel_content(frame: bytes, kind: str | None, udp: int) -> tuple[int, int]:
    """Return what `_tunnel_content` does, for a UDP datagram; `kind` is None outside of tunnels."""
    if kind is None:
        return UNKNOWN, udp
    header = udp + 8
    first_byte = frame[header]
    if kind == GENEVE:
        version = first_byte >> 6
        options_size = (first_byte & 0x3F) * 4
        if version == 0:
            return _u16(frame, header + 2), header + 8 + options_size
    if kind == VXLAN and first_byte & 0x08:  # the flag that its network identifier is valid
        return TRANSPARENT_ETHERNET, header + 8
    return UNKNOWN, udp


def _identify_ipv4(frame: bytes, offset: int) -> tuple[bytes, int, int]:
    """Return a packet's identity, where its payload begins, and the payload's size."""
    version_and_size, length_and_id, fragmentation, protocol, addresses = _ipv4_fields(
        frame, offset
    )
    header_size = (version_and_size & 0x0F) * 4
    payload_size = _u16(length_and_id, 0) - header_size
    payload = offset + header_size
    if fragmentation & 0x1FFF:  # an offset: it is not the first fragment
        identity = bytes([4 | NOT_FIRST, protocol]) + length_and_id + addresses
        identity += fragmentation.to_bytes(2, "big")
    else:
        identity = bytes([4, protocol]) + length_and_id + addresses
        identity += _transport_identity(frame, protocol, payload, payload_size)
    return identity, payload, payload_size


def _identify_ipv6(frame: bytes, offset: int) -> tuple[bytes, int, int]:
    """Return a packet's identity, where its payload begins, and the payload's size.

    Extension headers do not belong to the payload.
    """
    length, protocol, addresses = _ipv6_fields(frame, offset)
    offset += 40
    end = offset + _u16(length, 0)
    ip_id = b"\0\0"
    while protocol in EXTENSION_HEADERS:
        extension = protocol
        protocol = frame[offset]
        extension_size = (frame[offset + 1] + 1) * 8  # RFC 8200
        if extension == AUTHENTICATION:
            extension_size = (frame[offset + 1] + 2) * 4  # RFC 4302
        elif extension == FRAGMENT:
            extension_size = 8
            fragment = _part(frame, offset + 2, 6)  # offset and flags, identification
            ip_id = fragment[4:]
            if _u16(fragment, 0) & 0xFFF8:  # an offset: it is not the first fragment
                identity = bytes([6 | NOT_FIRST, protocol]) + length + ip_id + addresses + fragment
                return identity, offset + 8, end - offset - 8
        offset += extension_size
    identity = bytes([6, protocol]) + length + ip_id + addresses
    identity += _transport_identity(frame, protocol, offset, end - offset)
    return identity, offset, end - offset


def _transport_identity(frame: bytes, protocol: int, offset: int, size: int) -> bytes:
    """Return the part of an identity that comes from the payload of the IP packet.

    `offset` is where the payload begins, and `size` its size by the IP header.  `_identify_plain`
    and `_read_equal_records` do this for plain frames, only faster, and must return the same.
    """
    if protocol == TCP:
        header = _part(frame, offset, 14)  # ports, numbers, size of the header [12], flags [13]
        if header[13] & SYN:  # routers edit its options
            return header
        # The time stamps in the options distinguish a segment from its retransmission.
        options_size = (header[12] >> 4) * 4 - 20
        return header + _part(frame, offset + 20, max(options_size, 0))
    if protocol == UDP:
        header = _part(frame, offset, 6)  # ports and length
        udp_length = _u16(header, 4)
        if udp_length == 0:  # a jumbogram (RFC 2675)
            udp_length = size
        payload_size = min(udp_length, size) - 8
        return header + _part(frame, offset + 8, min(max(payload_size, 0), PAYLOAD))
    if protocol in (ICMP, ICMPV6):
        type_and_code = _part(frame, offset, 2)
        return type_and_code + _part(frame, offset + 4, 4)  # identifier and sequence number
    return _part(frame, offset, min(max(size, 0), PAYLOAD))


def addresses_of(identity: bytes) -> bytes:
    """Return source and destination as they are encoded in packets; b"" for a line of text."""
    version = identity[0] & ~NOT_FIRST
    if version == 4:
        return identity[ADDRESSES : ADDRESSES + 8]
    if version == 6:
        return identity[ADDRESSES : ADDRESSES + 32]
    return b""


def _transport_of(identity: bytes) -> bytes:
    """Return the part of an identity after the addresses."""
    return identity[ADDRESSES + len(addresses_of(identity)) :]


def flow_of(identity: bytes) -> bytes:
    """Return what identifies a packet's flow: IP version, protocol, addresses, and any ports."""
    return identity[:2] + identity[ADDRESSES : _flow_end(identity)]


def _flow_end(identity: bytes) -> int:
    """Return where the addresses and ports in an identity end."""
    end = ADDRESSES + len(addresses_of(identity))
    # The first byte of a later fragment, which has no ports, is neither 4 nor 6.
    if identity[0] in (4, 6) and identity[1] in (TCP, UDP):
        end += 4
    return end


@dataclass
class PacketFields:
    """The fields of a packet as people read them; None for those that it does not have.

    Their names and order are those of the columns of CSV files.
    """

    source: str | None = None
    destination: str | None = None
    protocol: str | None = None
    source_port: int | None = None
    destination_port: int | None = None
    sequence: int | str | None = None  # of TCP or ICMP; the text of a line
    acknowledgment: int | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None
    identifier: int | None = None
    ip_id: int | None = None
    fragment_offset: int | None = None  # in bytes
    length: int | None = None  # of the IP packet, in bytes


def describe(identity: bytes) -> PacketFields:
    """Return the fields that an identity contains."""
    if identity[0] == TEXT:
        return PacketFields(sequence=identity[1:].decode())
    protocol = identity[1]
    addresses = addresses_of(identity)
    transport = _transport_of(identity)
    half = len(addresses) // 2
    is_ipv6 = half == 16
    length = _u16(identity, 2)
    if is_ipv6:
        length += 40  # of the header, which IPv6's length field leaves out
    packet = PacketFields(
        source=str(ip_address(addresses[:half])),
        destination=str(ip_address(addresses[half:])),
        protocol=PROTOCOL_NAMES.get(protocol, str(protocol)),
        length=length,
    )
    ip_id = _u16(identity, 4)
    if ip_id or not is_ipv6:  # in IPv6 only fragments have one
        packet.ip_id = ip_id
    if identity[0] & NOT_FIRST:
        if is_ipv6:  # the lowest three bits are not of the offset
            packet.fragment_offset = _u16(transport, 0) & 0xFFF8
        else:  # in units of 8 bytes; the highest three bits are flags
            packet.fragment_offset = (_u16(transport, 0) & 0x1FFF) * 8
    elif protocol in (TCP, UDP):
        packet.source_port, packet.destination_port = unpack_from(">HH", transport)
        if protocol == TCP:
            packet.sequence, packet.acknowledgment = unpack_from(">II", transport, 4)
    elif protocol in (ICMP, ICMPV6):
        packet.icmp_type, packet.icmp_code = transport[:2]
        packet.identifier, packet.sequence = unpack_from(">HH", transport, 2)
    return packet


# ---- Selection -------------------------------------------------------------------------------


@dataclass
class ProbeFilter:
    """The protocol and port that distinguish probes and their answers from other traffic."""

    protocol: int
    port: int | None  # None: any port

    def accepts(self, identity: bytes) -> bool:
        """Return whether the packet with this identity is a probe or an answer to one."""
        if self.protocol == ICMP:
            return identity[1] in (ICMP, ICMPV6)
        if identity[1] != self.protocol:
            return False
        if self.port is None:
            return True
        if identity[0] & NOT_FIRST:
            return False  # only the first fragment has ports
        return self.port in unpack_from(">HH", _transport_of(identity))

    def expression(self, header: str, offset: int, ipv6: bool) -> str:
        """Return the pcap-filter(7) expression for probes and their answers.

        Their IP header begins `offset` bytes after the beginning of `header`, such as "ether".
        Over IPv6 all of ICMPv6 is captured, which is the only protocol of probes there.
        """
        if ipv6:
            protocol = f"{header}[{offset + 6}]"
            in_fragment = f"{header}[{offset + 40}]"  # in the header after the first one
            fragment = f"{protocol} = {FRAGMENT} and {in_fragment} = {ICMPV6}"
            return f"({protocol} = {ICMPV6} or ({fragment}))"
        expression = f"{header}[{offset + 9}] = {self.protocol}"
        if self.port is not None:  # the ports come after 20 bytes, a header without options
            source = f"{header}[{offset + 20}:2] = {self.port}"
            destination = f"{header}[{offset + 22}:2] = {self.port}"
            expression += f" and ({source} or {destination})"
        return expression


@dataclass
class Selection:
    """The packets that are measured, and the direction in which they go.

    Packets from a source to a destination go IN, and their answers OUT.  An empty list stands for
    all addresses.  Without any criterion all packets count and go in the first direction.
    """

    directions: Sequence[Direction] = (IN,)
    sources: Sequence[str] = ()
    destinations: Sequence[str] = ()
    translated: bool = False  # addresses change on the way, so that matching has to ignore them
    probes: ProbeFilter | None = None
    tunnel_ports: Mapping[int, str] = field(default_factory=TUNNEL_PORTS.copy)
    captures_either: bool = False  # one of a packet's two addresses suffices
    excluded_sources: Sequence[str] = ()  # no packet from these goes IN, and none to them OUT

    def __post_init__(self) -> None:
        self._sources = frozenset(map(_packed, self.sources))
        self._destinations = frozenset(map(_packed, self.destinations))
        self._excluded_sources = frozenset(map(_packed, self.excluded_sources))

    @property
    def direction(self) -> str:
        """The name of the direction, or "both"."""
        return "both" if len(self.directions) > 1 else self.directions[0].name

    @property
    def selects_everything(self) -> bool:
        criteria = (self.sources, self.destinations, self.excluded_sources, self.probes)
        return not any(criteria) and not self.translated

    def direction_of(self, addresses: bytes) -> Direction | None:
        """Return the direction of a packet by its packed source and destination.

        Returns None for a packet that is not measured.
        """
        half = len(addresses) // 2
        source = addresses[:half]
        destination = addresses[half:]
        for direction in self.directions:
            if direction is IN and self._is_inbound(source, destination):
                return direction
            if direction is OUT and self._is_inbound(destination, source):
                return direction
        return None

    def excludes(self, addresses: bytes) -> bool:
        """Return whether `excluded_sources` reject a packet, by its packed addresses."""
        half = len(addresses) // 2
        inbound_source = addresses[:half] if IN in self.directions else addresses[half:]
        return inbound_source in self._excluded_sources

    def _is_inbound(self, source: bytes, destination: bytes) -> bool:
        if source in self._excluded_sources:
            return False
        from_source = not self._sources or source in self._sources
        to_destination = not self._destinations or destination in self._destinations
        if self.captures_either and self._sources and self._destinations:
            return from_source or to_destination
        return from_source and to_destination

    def vif_filter(self, ethernet: bool) -> str:
        """Return the pcap-filter(7) expression that captures the packets on the vif.

        The vif of a guest that uses VLANs itself carries tagged frames, too.  If addresses are
        translated, only one of a packet's two addresses is unchanged on the vif: either suffices.
        """
        return self.on_vif().pif_filter(ethernet, overlay=False)

    def on_vif(self) -> Selection:
        """Return the selection of the same packets on the vif."""
        return replace(self, captures_either=self.translated)

    def pif_filter(self, ethernet: bool, overlay: bool) -> str:
        """Return the expression that captures the packets on a pif, under up to two VLAN tags.

        With `overlay` it also captures tunnels that may carry them.  Frames that are received have
        lost their tag to the card, but those that are sent may still have it.  The expression finds
        it by testing bytes, since the keyword `vlan` doesn't look at bytes before libpcap 1.9.
        """
        expression = self._plain_expression()
        if overlay:
            expression = f"({expression}) or {self._tunnel_expression()}"
        if not ethernet:
            return expression
        outer = "(ether[12:2] = 0x8100 or ether[12:2] = 0x88a8)"
        inner = "(ether[16:2] = 0x8100 or ether[16:2] = 0x88a8)"
        # Each tag moves the IP header, which is at 14 without tags, by 4 bytes.
        once = self._tagged_expression(18, overlay)
        twice = self._tagged_expression(22, overlay)
        return f"({expression}) or ({outer} and ({once} or ({inner} and ({twice}))))"

    @property
    def _ipv6(self) -> bool:
        """Whether filters are for IPv6: they require at least one destination."""
        return ":" in self.destinations[0]

    @property
    def _ethertype(self) -> str:
        return "0x86dd" if self._ipv6 else "0x0800"

    def _addresses_expression(self, as_source: Term, as_destination: Term) -> str:
        """Combine the terms for addresses as source and as destination of a packet.

        Every list is in parentheses, since in pcap-filter(7) `and` binds no stronger than `or`.
        """
        alternatives = []
        for direction in self.directions:
            source_term, destination_term = as_source, as_destination
            if direction is OUT:
                source_term, destination_term = as_destination, as_source
            terms = []
            if self.sources:
                terms.append(f"({' or '.join(map(source_term, self.sources))})")
            terms.append(f"({' or '.join(map(destination_term, self.destinations))})")
            operator = " or " if self.captures_either else " and "
            alternatives.append(f"({operator.join(terms)})")
        return f"({' or '.join(alternatives)})"

    def _plain_expression(self) -> str:
        """Return an expression for the traffic in frames without tags and tunnels."""
        header = "ip6" if self._ipv6 else "ip"
        terms = [header]
        if self.probes:
            terms.append(self.probes.expression(header, 0, self._ipv6))
        terms.append(self._addresses_expression("src host {}".format, "dst host {}".format))
        return " and ".join(terms)

    def _bytes_expression(self, header: str, offset: int) -> str:
        """Return an expression for the traffic that only tests bytes.

        Its IP header begins `offset` bytes after the beginning of `header`, which is one that
        pcap-filter(7) knows, such as "ether".
        """
        source_at, destination_at = (8, 24) if self._ipv6 else (12, 16)  # in the IP header
        terms = [f"{header}[{offset - 2}:2] = {self._ethertype}"]
        if self.probes:
            terms.append(self.probes.expression(header, offset, self._ipv6))
        terms.append(
            self._addresses_expression(
                partial(_address_at, header, offset + source_at),
                partial(_address_at, header, offset + destination_at),
            )
        )
        return " and ".join(terms)

    def _tunnel_expression(self) -> str:
        """Return an expression for VXLAN, Geneve and GRE packets that may carry the traffic.

        Their content is tested in VXLAN, and Geneve without options, over IPv4 and without an inner
        tag: there it is at a fixed offset.  All other packets of tunnels are captured.
        """
        ports = " or ".join(f"udp dst port {port}" for port in self.tunnel_ports)
        geneve = [port for port, kind in self.tunnel_ports.items() if kind == GENEVE]
        geneve_ports = " or ".join(f"udp dst port {port}" for port in geneve)
        geneve_with_options = f"(({geneve_ports}) and udp[8] & 0x3f != 0)"
        # After UDP (8 bytes), the tunnel (8) and MAC addresses (12): ethertype at 28, IP at 30.
        other_content = f"udp[28:2] != {self._ethertype}"
        carried = f"({self._bytes_expression('udp', 30)})"
        return (
            f"(ip and ({ports}) and ({geneve_with_options} or {other_content} or {carried}))"
            f" or (ip6 and ({ports})) or ip proto {GRE} or ip6 proto {GRE}"
        )

    def _tagged_expression(self, offset: int, overlay: bool) -> str:
        """Return an expression for traffic in a tagged frame whose IP header is at the offset.

        With `overlay` it finds all tunnels, too.
        """
        terms = [f"({self._bytes_expression('ether', offset)})"]
        if overlay:
            terms.append(self._tunnel_at(offset, "0x0800", protocol_at=9, header_size=20))
            terms.append(self._tunnel_at(offset, "0x86dd", protocol_at=6, header_size=40))
        return " or ".join(terms)

    def _tunnel_at(self, offset: int, ethertype: str, protocol_at: int, header_size: int) -> str:
        """Return an expression for GRE and UDP tunnels in frames whose IP header is at an offset.

        `ethertype` is that of the IP version, in whose header, of so many bytes, the protocol is at
        `protocol_at`.
        """
        protocol = f"ether[{offset + protocol_at}]"
        port = f"ether[{offset + header_size + 2}:2]"  # UDP's destination port
        ports = " or ".join(f"{port} = {tunnel_port}" for tunnel_port in self.tunnel_ports)
        return (
            f"(ether[{offset - 2}:2] = {ethertype} and"
            f" ({protocol} = {GRE} or ({protocol} = {UDP} and ({ports}))))"
        )


def _packed(address: str) -> bytes:
    """Return an IP address as it is encoded in packets."""
    return ip_address(address).packed


def _address_at(header: str, offset: int, address: str) -> str:
    """Return the expression for an address at an offset, four bytes (the most) at a time."""
    packed = _packed(address)
    words = []
    for index in range(0, len(packed), 4):
        words.append(f"{header}[{offset + index}:4] = 0x{packed[index : index + 4].hex()}")
    return f"({' and '.join(words)})"


# ---- Capture files ---------------------------------------------------------------------------

CHUNK = 1 << 17  # bytes that are read at once; more would fit no cache, fewer take more steps
LARGEST_RECORD = 1 << 18  # bytes; libpcap's limits
LARGEST_BLOCK = 1 << 24
PCAP_HEADER = 24  # bytes
RECORD_HEADER = 16


@dataclass(frozen=True)
class PcapFormat:
    """A variant of the pcap format."""

    resolution: int  # ticks per second
    file_header: int = PCAP_HEADER  # sizes in bytes
    record_header: int = RECORD_HEADER


PCAP_FORMATS = {  # by magic number
    0xA1B2C3D4: PcapFormat(1_000_000),
    0xA1B23C4D: PcapFormat(NANOSECONDS),
    0xA1B2CD34: PcapFormat(1_000_000, record_header=24),  # of an old libpcap for Linux
    0x1C0001AB: PcapFormat(1_000_000, file_header=28),  # IXIA
    0x1C0001AC: PcapFormat(NANOSECONDS, file_header=28),
}
PCAP_VERSION = (2, 4)
BYTE_ORDERS = "<>"  # of `struct`: little-endian, big-endian
OTHER_FORMATS = {  # by the bytes at their beginning
    b"snoop\0": "snoop",
    b"GMBU": "Network Monitor",
    b"RTSS": "Network Monitor",
    b"XCP\0": "NetXRay",
    b"TRSNIFF data": "Sniffer",
    b"iptrace": "iptrace",
    b"\xa1\x2b\x3c\x4d": "Navtel pcap",
    b"\x4d\x3c\x2b\xa1": "Navtel pcap",
    b"\xa1\xb2\x34\xcd": "Mesquita's pcap",
    b"\xcd\x34\xb2\xa1": "Mesquita's pcap",
}
DECOMPRESSION = {  # commands, by the bytes at a file's beginning
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\0": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"\x04\x22\x4d\x18": "unlz4",
}
CONVERT = "If Wireshark can read it, convert it: editcap -F pcap FILE NEWFILE"
VARIANT = f"damaged, or a variant of pcap. {CONVERT}"

# Types of pcapng's blocks and options.
SECTION_HEADER = b"\n\r\r\n"  # in both byte orders
INTERFACE_DESCRIPTION = 1
OBSOLETE_PACKET = 2
SIMPLE_PACKET = 3
ENHANCED_PACKET = 6
IF_TSRESOL = 9
IF_TSOFFSET = 14
END_OF_TIME = NANOSECONDS << 32  # ns; pcap has 32 bits for the seconds


@dataclass
class Block:
    """The packets of a part of a capture file, in the order of the file."""

    identities: list[bytes] = field(default_factory=list)  # of the innermost packets
    times: list[int] = field(default_factory=list)  # in nanoseconds since 1970
    # The identities of the packets around, by index of the innermost one.
    outer: dict[int, list[bytes]] = field(default_factory=dict)


class Capture:
    """The packets in a pcap or pcapng file, which may be a pipe, as an iterable of blocks.

    Iterating raises CaptureError for another kind of file, and for a damaged one.  After it the
    counts are complete.
    """

    def __init__(
        self, file: BinaryIO, name: str, tunnel_ports: Mapping[int, str] = TUNNEL_PORTS
    ) -> None:
        self.name = name
        self.tunnel_ports = tunnel_ports
        self.other = 0  # records without an IP packet, or without a time
        self.cut = 0  # records too short to identify the packet
        self.filtered = 0  # frames without a selected packet, which `collect` counts
        self.span: tuple[int, int] | None = None  # earliest and latest time of any record
        self.resolutions: set[int] = set()  # of time stamps, in ticks per second
        self._file = file
        self._packets = 0
        self._untimed = 0
        self._unsupported: Counter[int] = Counter()  # records by link type
        self._incomplete = 0  # bytes of the last record, if its end is missing
        self._zeros = 0  # bytes after the last record

    @property
    def records(self) -> int:
        """The number of records in the file."""
        return self._packets + self.other + self.cut

    @property
    def resolution(self) -> int:
        """The resolution of the coarsest time stamps, in ticks per second."""
        return min(self.resolutions, default=NANOSECONDS)

    def __iter__(self) -> Iterator[Block]:
        data = self._read(CHUNK)
        reader = self._choose_reader(data)
        offset = reader.file_header  # of the data in the file
        data = data[offset:]
        while data:
            block = Block()
            size = reader.read(data, offset, block)  # of the complete records
            self._packets += len(block.identities)
            if block.times:
                self._extend_span(min(block.times), max(block.times))
            yield block
            data = data[size:]
            offset += size
            if data.startswith(reader.zeros):
                self._skip_zeros(data, offset)
                break
            chunk = self._read(CHUNK)
            if not chunk:
                self._incomplete = len(data)
                break
            data += chunk
        if self._untimed > self._packets:
            raise self.error(f"most packets have no time, or an impossible one: {VARIANT}")
        if self._unsupported and not self._packets:
            raise self.error(_unsupported_link_type(next(iter(self._unsupported))))

    def warnings(self) -> list[str]:
        """Return warnings on parts of the file that could not be read."""
        name = os.path.basename(self.name)
        warnings = []
        if self._incomplete:
            warnings.append(
                f"the last record of {name} is incomplete ({counted(self._incomplete, 'byte')}) "
                f"and ignored, after {counted(self.records, 'complete record')}"
            )
        if self._zeros:
            warnings.append(
                f"{name} ends with {counted(self._zeros, 'byte')} of zeros, which are ignored, "
                f"after {counted(self.records, 'complete record')}"
            )
        if self._untimed:
            warnings.append(
                f"{counted(self._untimed, 'packet')} of {name} left out: no time stamp, or an "
                "impossible one"
            )
        units = [resolution_unit(resolution) for resolution in sorted(self.resolutions)]
        if len(set(units)) > 1:
            warnings.append(
                f"the time stamps of {name} are partly in {units[0]}, partly in {units[-1]}: "
                "delays are only as precise as the coarser ones"
            )
        for linktype, records in self._unsupported.items():
            warnings.append(
                f"{counted(records, 'packet')} of {name} left out: "
                f"{_unsupported_link_type(linktype)}"
            )
        if self.cut:
            warnings.append(
                f"the snap length was too short to identify {counted(self.cut, 'packet')}, left "
                "out of all counts. Capture more of each packet (tcpdump -s)"
            )
        return warnings

    def add_frame(
        self, block: Block, frame: bytes, length: int, linktype: int, time_ns: int
    ) -> None:
        """Add the innermost packet of a frame, `length` bytes when uncut, or count the frame."""
        try:
            packets = identify(frame, linktype, self.tunnel_ports)
        except TOO_SHORT:
            self._extend_span(time_ns, time_ns)
            if len(frame) < length:  # by the capture's snap length
                self.cut += 1
            else:  # its headers announce more than there is
                self.other += 1
            return
        if not packets:
            self._extend_span(time_ns, time_ns)
            self.other += 1
            return
        innermost = packets.pop()
        if packets:
            block.outer[len(block.identities)] = packets
        block.identities.append(innermost)
        block.times.append(time_ns)

    def count_untimed(self) -> None:
        """Count a record without a time, or with an impossible one."""
        self._untimed += 1
        self.other += 1

    def count_unsupported(self, linktype: int) -> None:
        """Count a record of a link type that is not supported."""
        self._unsupported[linktype] += 1
        self.other += 1

    def error(self, reason: str) -> CaptureError:
        """Return the error of this file with a reason."""
        return CaptureError(f"{self.name}: {reason}")

    def _extend_span(self, earliest: int, latest: int) -> None:
        if self.span:
            earliest = min(earliest, self.span[0])
            latest = max(latest, self.span[1])
        self.span = earliest, latest

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            raise self.error(f"can't read it: {error.strerror}") from error

    def _choose_reader(self, data: bytes) -> _PcapReader | _PcapngReader:
        """Return the reader for a file that begins with these data."""
        for magic, command in DECOMPRESSION.items():
            if data.startswith(magic):
                raise self.error(f"compressed. Use {command} first")
        for magic, name in OTHER_FORMATS.items():
            if data.startswith(magic):
                raise self.error(f"the format {name} is not supported. {CONVERT}")
        if len(data) < PCAP_HEADER:
            raise self.error(f"too short for a capture file (it ends at byte {len(data)})")
        if data.startswith(SECTION_HEADER):
            return _PcapngReader(self)
        for order in BYTE_ORDERS:
            magic_number, major, minor, linktype = unpack_from(order + "IHH12xI", data)
            if magic_number in PCAP_FORMATS:
                if (major, minor) != PCAP_VERSION:
                    raise self.error(f"pcap version {major}.{minor} is not supported. {CONVERT}")
                linktype &= 0xFFFF  # the upper half describes the frame check sequence
                return _PcapReader(self, PCAP_FORMATS[magic_number], order, linktype)
        raise self.error(f"not a capture file (byte 0: {data[:4].hex()}). {CONVERT}")

    def _skip_zeros(self, data: bytes, offset: int) -> None:
        """Read zeros to the end of the file, as a file system leaves them after a crash."""
        while data:
            if any(data):
                raise self.error(f"zeros instead of a record at byte {offset}, but more data later")
            self._zeros += len(data)
            data = self._read(CHUNK)


def _unsupported_link_type(linktype: int) -> str:
    return f"link type {linktype} is not supported: capture on an Ethernet interface"


class _PcapReader:
    """A reader of the records of a pcap file."""

    def __init__(self, capture: Capture, variant: PcapFormat, order: str, linktype: int) -> None:
        if linktype not in LINK_TYPES:
            raise capture.error(f"{_unsupported_link_type(linktype)} (byte 20)")
        self.file_header = variant.file_header
        self.zeros = bytes(variant.record_header)  # what a crash leaves in place of a record
        self._capture = capture
        self._linktype = linktype
        self._order = order
        self._header = Struct(order + "4I")
        self._resolution = variant.resolution
        self._tick = NANOSECONDS // variant.resolution
        self._header_size = variant.record_header
        capture.resolutions.add(variant.resolution)

    def read(self, data: bytes, file_offset: int, block: Block) -> int:
        """Add the packets of the complete records to a block, and return these records' size."""
        capture = self._capture
        header = self._header.unpack_from
        header_size = self._header_size
        resolution = self._resolution
        tick = self._tick
        is_ethernet = self._linktype == EN10MB
        tunnel_ports = capture.tunnel_ports
        add_identity = block.identities.append
        add_time = block.times.append
        record = self._read_equal_records(data, block)
        data_size = len(data)
        last_header = data_size - header_size
        while record <= last_header:
            seconds, fraction, size, length = header(data, record)
            frame = record + header_size
            end = frame + size
            if end > data_size:
                self._check_size(size, file_offset + record + 8)  # after seconds and fraction
                break
            if size == 0 and data.startswith(self.zeros, record):
                break
            record = end
            if fraction >= resolution:
                capture.count_untimed()
                continue
            time_ns = seconds * NANOSECONDS + fraction * tick
            identity = b""
            if is_ethernet:
                identity = _identify_plain(data, frame, end, tunnel_ports)
            if identity:
                add_identity(identity)
                add_time(time_ns)
            else:
                capture.add_frame(block, data[frame:end], length, self._linktype, time_ns)
        return record

    def _check_size(self, size: int, byte: int) -> None:
        if size > LARGEST_RECORD:
            raise self._capture.error(f"impossible record length {size} at byte {byte}: {VARIANT}")

    def _read_equal_records(self, data: bytes, block: Block) -> int:
        """Add the packets of the plain TCP segments of one size that the data begin with.

        Generators send mostly these, which makes a loop of their own worthwhile.
        Returns the total size of their records.
        """
        if self._linktype != EN10MB or len(data) < self._header_size:
            return 0
        _, _, size, _ = self._header.unpack_from(data)
        if size < PLAIN_SIZE:
            return 0
        rest_of_header = self._header_size - 12  # after seconds, fraction and captured size
        record = Struct(f"{self._order}3I{rest_of_header}x{PLAIN_FRAME}{size - PLAIN_FIELDS_SIZE}x")
        whole_records = memoryview(data)[: len(data) // record.size * record.size]
        resolution = self._resolution
        tick = self._tick
        add_identity = block.identities.append
        add_time = block.times.append
        for (
            seconds,
            fraction,
            captured,
            kind,
            length_and_id,
            fragmentation,
            protocol,
            header,
        ) in record.iter_unpack(whole_records):
            if (
                captured != size
                or kind != PLAIN_IPV4
                or protocol != TCP
                or fragmentation not in UNFRAGMENTED
                # The size and the flags of TCP's header, as in `_identify_plain`.
                or (header[20] != NO_TCP_OPTIONS and not header[21] & SYN)
                or fraction >= resolution
            ):
                break
            add_identity(PLAIN_TCP + length_and_id + header)
            add_time(seconds * NANOSECONDS + fraction * tick)
        return len(block.identities) * record.size  # the block was empty before


@dataclass(frozen=True)
class _Interface:
    """An interface of a pcapng file, by its description block."""

    linktype: int
    resolution: int = 1_000_000  # ticks per second
    offset: int = 0  # seconds that are added to all times


class _PcapngReader:
    """A reader of the blocks of a pcapng file."""

    file_header = 0
    zeros = bytes(12)  # what a crash leaves in place of a block

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._order = BYTE_ORDERS[0]
        self._interfaces: list[_Interface] = []  # of the current section

    def read(self, data: bytes, file_offset: int, block: Block) -> int:
        """Add the packets of the complete blocks in `data` to `block`; return where they end."""
        position = 0
        # A block has its type and size (4 bytes each) before its body, and the size again after it.
        while position + 12 <= len(data) and not data.startswith(self.zeros, position):
            byte = file_offset + position
            if data.startswith(SECTION_HEADER, position):
                self._begin_section(data[position + 8 : position + 12], byte)
            kind, size = unpack_from(self._order + "II", data, position)
            if size < 12 or size % 4 or size > LARGEST_BLOCK:
                raise self._capture.error(f"impossible block length {size} at byte {byte + 4}")
            if position + size > len(data):
                break
            body = data[position + 8 : position + size - 4]
            if kind == INTERFACE_DESCRIPTION:
                self._interfaces.append(self._read_interface(body))
            elif kind in (ENHANCED_PACKET, OBSOLETE_PACKET) and len(body) >= 20:
                self._read_packet(kind, body, byte, block)
            elif kind == SIMPLE_PACKET:  # it has no time
                self._capture.count_untimed()
            position += size
        return position

    def _begin_section(self, byte_order_magic: bytes, byte: int) -> None:
        """Adopt the byte order of a section, and forget the interfaces of the one before."""
        for order in BYTE_ORDERS:
            if unpack_from(order + "I", byte_order_magic) == (0x1A2B3C4D,):
                self._order = order
                self._interfaces = []
                return
        raise self._capture.error(f"damaged section header at byte {byte}")

    def _read_interface(self, body: bytes) -> _Interface:
        """Return the interface that a block describes; a body that is cut short has few fields."""
        (linktype,) = unpack_from(self._order + "H", body.ljust(2, b"\0"))
        interface = _Interface(linktype)
        position = 8  # of the options, after the link type (2), unused bytes (2), snap length (4)
        while position + 4 <= len(body):
            code, size = unpack_from(self._order + "HH", body, position)
            value = body[position + 4 : position + 4 + size]
            if code == IF_TSRESOL and value:
                interface = replace(interface, resolution=_ticks_per_second(value[0]))
            elif code == IF_TSOFFSET and len(value) == 8:
                (offset,) = unpack_from(self._order + "q", value)
                interface = replace(interface, offset=offset)
            elif code == 0:  # the end of the options
                break
            position += 4 + size + -size % 4  # a value is padded to a multiple of 4 bytes
        return interface

    def _read_packet(self, kind: int, body: bytes, byte: int, block: Block) -> None:
        """Add the packet in a block at a byte of the file, or count what can't be used."""
        capture = self._capture
        layout = "5I"
        if kind == OBSOLETE_PACKET:
            layout = "H2x4I"  # a counter of drops follows the interface
        interface_id, high, low, size, length = unpack_from(self._order + layout, body)
        if interface_id >= len(self._interfaces) or 20 + size > len(body):
            raise capture.error(f"damaged packet block at byte {byte}")
        interface = self._interfaces[interface_id]
        ticks = high << 32 | low
        time_ns = ticks * NANOSECONDS // interface.resolution + interface.offset * NANOSECONDS
        if interface.linktype not in LINK_TYPES:
            capture.count_unsupported(interface.linktype)
        elif not 0 <= time_ns < END_OF_TIME:
            capture.count_untimed()
        else:
            capture.resolutions.add(interface.resolution)
            frame = body[20 : 20 + size]
            capture.add_frame(block, frame, length, interface.linktype, time_ns)


PRECISIONS = {  # units of time stamps in nanoseconds, the shortest first
    "nanoseconds": 1,
    "microseconds": 1_000,
    "milliseconds": 1_000_000,
    "seconds": NANOSECONDS,
}


def resolution_unit(resolution: int) -> str:
    """Return the shortest unit that is no shorter than a tick, given the ticks per second."""
    for name, unit_ns in PRECISIONS.items():
        if resolution * unit_ns >= NANOSECONDS:
            return name
    return "seconds"


def _ticks_per_second(resolution: int) -> int:
    """Return the ticks that the option if_tsresol encodes: a power of 2 or of 10."""
    if resolution & 0x80:
        return 1 << (resolution & 0x7F)
    return int(10**resolution)


@dataclass(frozen=True)
class TextColumns:
    """The columns of the sequence numbers and times in a text capture, counted from 0.

    Columns are separated by white space.  If a `separator` is given, it splits the column of the
    sequence number, which is the one at the index `part` of its parts.
    """

    sequence: int
    time: int
    separator: str | None = None
    part: int = 0


class TextCapture:
    """The packets of a text capture, one a line: their identities and times, in order.

    A time is HH:MM:SS[.fraction], or seconds since 1970, in any time zone.  Only the time of day
    is used: each packet is dated on the day that brings it closest to the one before, and the
    first one to `reference`, so that midnight can fall between any two packets.
    """

    def __init__(
        self, lines: Iterable[str], columns: TextColumns, reference: int | None = None
    ) -> None:
        self.identities: list[bytes] = []
        self.times: list[int] = []  # nanoseconds
        self.skipped = 0  # lines without a sequence number or time
        for line in lines:
            words = line.split()
            if not words:
                continue
            try:
                sequence = words[columns.sequence]
                if columns.separator:
                    sequence = sequence.split(columns.separator)[columns.part]
                time_ns = _time_of_day(words[columns.time])
            except (IndexError, ValueError):
                self.skipped += 1
                continue
            if reference is not None:
                time_ns += round((reference - time_ns) / DAY) * DAY
            reference = time_ns
            self.identities.append(bytes([TEXT]) + sequence.encode(errors="replace"))
            self.times.append(time_ns)


def _time_of_day(text: str) -> int:
    """Return the nanoseconds since midnight; raises ValueError if the text is not a time."""
    parts = re.fullmatch(r"(?:(\d\d?):(\d\d):)?(\d{1,10})(?:[.,](\d{1,9}))?", text, re.ASCII)
    if not parts:
        raise ValueError(text)
    hours, minutes, seconds, fraction = parts.groups(default="0")
    total = (int(hours) * 60 + int(minutes)) * 60 + int(seconds)
    return (total * NANOSECONDS + int(fraction.ljust(9, "0"))) % DAY


# ---- Matching --------------------------------------------------------------------------------
# RFC 7679 and its relatives: the one-way delay of a packet between two points, its loss (RFC 7680)
# and its duplication (RFC 5560).

# In nanoseconds:
LONGEST_WAIT = NANOSECONDS  # later arrivals are of another packet, unless the user waits longer
CLOCK_ERROR = 10_000  # by so much the clocks of two processors may disagree

# In place of a rank:
UNSENT = -1  # the first point has not seen the packet
REPEATED = -2  # the first point has seen several packets of this identity
EARLY = -3  # the packet was sent before the period that is measured


def collect(captures: Mapping[str, Sequence[Capture]], selection: Selection) -> list[Sightings]:
    """Read the captures of each point, once, and return the sightings of each direction."""
    sightings = [Sightings(direction, selection.translated) for direction in selection.directions]
    for point, files in captures.items():
        selector = _Selector(selection.on_vif() if point == "vif" else selection)
        for capture in files:
            for block in capture:
                if selection.selects_everything:
                    sightings[0].add(point, block.identities, block.times)
                    continue
                capture.filtered += selector.select(block)
                for one_direction in sightings:
                    part = selector.parts[one_direction.direction]
                    one_direction.add(point, part.identities, part.times)
        for one_direction in sightings:
            one_direction.end(point)
    return sightings


class _Selector:
    """A filter of blocks: `parts` has the selected packets of the last one, by direction."""

    def __init__(self, selection: Selection) -> None:
        self.parts = {direction: Block() for direction in selection.directions}
        self._selection = selection
        # By addresses, of which there are few; None for those that are not selected.
        self._part_of: dict[bytes, Block | None] = {}

    def select(self, block: Block) -> int:
        """Select the packets of a block; return the number of frames without a selected packet."""
        for part in self.parts.values():
            part.identities.clear()
            part.times.clear()
        if block.outer or self._selection.probes:
            return self._select_each(block)
        rejected = 0
        part_of = self._part_of
        for identity, time_ns in zip(block.identities, block.times):
            if identity[0] == 4:  # the usual case, in which a call would take longer
                addresses = identity[ADDRESSES : ADDRESSES + 8]
            else:
                addresses = addresses_of(identity)
            if addresses not in part_of:
                self._add_addresses(addresses)
            selected = part_of[addresses]
            if selected is None:
                rejected += 1
            else:
                selected.identities.append(identity)
                selected.times.append(time_ns)
        return rejected

    def _select_each(self, block: Block) -> int:
        """Do the same as `select` where tunnels or probes must be looked at."""
        rejected = 0
        for index, innermost in enumerate(block.identities):
            from_inside = (innermost, *reversed(block.outer.get(index, ())))
            for packet in from_inside:
                addresses = addresses_of(packet)
                if addresses not in self._part_of:
                    self._add_addresses(addresses)
                selected = self._part_of[addresses]
                if selected is not None and self._is_probe(packet):
                    selected.identities.append(packet)
                    selected.times.append(block.times[index])
                    break
                if self._selection.excludes(addresses):  # then what carries it is rejected, too
                    rejected += 1
                    break
            else:
                rejected += 1
        return rejected

    def _add_addresses(self, addresses: bytes) -> None:
        direction = self._selection.direction_of(addresses)
        self._part_of[addresses] = self.parts[direction] if direction else None

    def _is_probe(self, packet: bytes) -> bool:
        probes = self._selection.probes
        return probes is None or probes.accepts(packet)


def watched_span(captures: Iterable[Capture]) -> tuple[int, int] | None:
    """Return the earliest and the latest time of a point's records, or None without records."""
    spans = [capture.span for capture in captures if capture.span]
    if not spans:
        return None
    return min(span[0] for span in spans), max(span[1] for span in spans)


def files_window(direction: Direction, captures: Mapping[str, Sequence[Capture]]) -> Window:
    """Return the window of captures of which only the files are known.

    Each point was watched from its first to its last record of any kind.  If one of them has no
    records, the window is ALWAYS.
    """
    first = watched_span(captures[direction.first])
    second = watched_span(captures[direction.second])
    if not first or not second:
        return ALWAYS
    return Window(
        start=first[0] - CLOCK_ERROR,  # the first packet may seem to arrive before it was sent
        end=first[1],
        watched_from=second[0],
        watched_until=second[1],
        is_live=False,
    )


def match(sightings: Sightings, window: Window = ALWAYS, uncaptured: int = 0) -> DirectionResult:
    """Match the packets of the first point with those of the second, and classify them.

    If a packet arrives several times, the first arrival gives its delay and the others are
    duplicates.  Packets that share their identity with another packet sent are counted but not
    timed, since it is unknown which arrival belongs to which of them.

    `uncaptured` is the number of packets that passed the second point, but were dropped before
    they were captured, or were cut so short that they can't be identified.
    """
    direction = sightings.direction
    identities = sightings.take_identities()
    all_sent = sightings.points[direction.first]
    sent = all_sent.since(window.start)
    seen = sightings.points[direction.second].since(window.start)
    early_ids = all_sent.ids[: len(all_sent.ids) - len(sent.ids)]
    rank_of, copies = _index_ranks(sent.ids, early_ids, len(identities))
    arrivals = _find_arrivals(sent, seen, rank_of, window)
    longest = max(0, max(arrivals.delays, default=0))
    decided = sent.ranks_between(*window.decided(longest))
    classes = _classify(arrivals, decided)
    _classify_copies(classes, copies, Counter(early_ids), arrivals, sent, window, longest)

    until = window.end
    under_way = 0
    if window.is_live:
        until = window.watched_until
        first_undecided = _find_undecided(classes)
        under_way = len(classes) - first_undecided
        if under_way:
            until = min(until, sent.times[first_undecided] - 1)
            _truncate(first_undecided, classes, sent, arrivals)
    counts = _count(classes, arrivals)
    counts.undecided.under_way = under_way
    _count_unsent(counts, arrivals, window, until, longest)
    _explain_missing(counts, classes, uncaptured)
    return DirectionResult(
        direction=direction,
        identities=identities,
        ids=sent.ids,
        sent=sent.times,
        delays=arrivals.delays,
        classes=_merge_ambiguous(classes),
        arrivals=arrivals.ranks,
        duplicates=arrivals.duplicates,
        unsent_ids=arrivals.unsent.ids,
        counts=counts,
        until=until,
        translated=sightings.translated,
    )


def _truncate(size: int, classes: bytearray, sent: PointSightings, arrivals: _Arrivals) -> None:
    """Forget all but the first `size` packets, so that the others are in no count."""
    sent.truncate(size)
    arrivals.truncate(size)
    del classes[size:]


def _index_ranks(
    ids: Sequence[int], early_ids: Iterable[int], id_count: int
) -> tuple[array[int], dict[int, list[int]]]:
    """Return the rank of each id, or UNSENT, EARLY or REPEATED, and the ranks of repeated ids."""
    rank_of = array("i", [UNSENT]) * id_count
    for packet_id in early_ids:
        rank_of[packet_id] = EARLY
    copies: dict[int, list[int]] = {}
    for rank, packet_id in enumerate(ids):
        known = rank_of[packet_id]
        if known == UNSENT:
            rank_of[packet_id] = rank
        elif known == REPEATED:
            copies[packet_id].append(rank)
        elif known == EARLY:
            rank_of[packet_id] = REPEATED
            copies[packet_id] = [rank]
        else:
            rank_of[packet_id] = REPEATED
            copies[packet_id] = [known, rank]
    return rank_of, copies


@dataclass
class _Arrivals:
    """The arrivals at the second point, from the window's start on."""

    delays: array[int]  # by rank
    missing: bytearray  # by rank, whether a packet has no delay
    ranks: array[int] = field(default_factory=lambda: array("I"))  # in order of arrival
    duplicates: Counter[int] = field(default_factory=Counter)  # by rank
    repeated: defaultdict[int, list[int]] = field(
        default_factory=lambda: defaultdict(list)
    )  # times of arrival, by id
    # By the rank of the first packet of a repeated identity: its arrivals beyond the packets sent.
    surplus: Counter[int] = field(default_factory=Counter)
    unwatched: int = 0  # arrivals of repeated identities after the first point's capture had ended
    unsent: PointSightings = field(default_factory=PointSightings)  # not seen at the first point
    strays: dict[int, int] = field(default_factory=dict)  # delays that can't be true, by rank

    def truncate(self, size: int) -> None:
        """Forget all but the first `size` packets.

        The repeated arrivals have been assigned by then, and the unsent ones have no rank.
        """
        del self.delays[size:]
        del self.missing[size:]
        self.ranks = array("I", [rank for rank in self.ranks if rank < size])
        for by_rank in (self.duplicates, self.surplus, self.strays):
            for rank in [rank for rank in by_rank if rank >= size]:
                del by_rank[rank]


def _find_arrivals(
    sent: PointSightings, seen: PointSightings, rank_of: Sequence[int], window: Window
) -> _Arrivals:
    """Return the arrivals of the packets seen; `rank_of` is the rank of each id, or UNSENT etc."""
    lowest_delay = -LONGEST_WAIT
    highest_delay = max(LONGEST_WAIT, window.wait)
    last_duplicate = window.watched_until if window.is_live else FOREVER
    sent_times = sent.times
    delays = array("q", [NO_DELAY]) * len(sent_times)
    missing = bytearray([True]) * len(sent_times)
    arrivals = _Arrivals(delays, missing)
    add_rank = arrivals.ranks.append
    for packet_id, time_ns in zip(seen.ids, seen.times):
        rank = rank_of[packet_id]
        if rank >= 0:
            delay = time_ns - sent_times[rank]
            if not missing[rank]:
                if time_ns <= last_duplicate:
                    arrivals.duplicates[rank] += 1
            elif lowest_delay <= delay <= highest_delay:
                delays[rank] = delay
                missing[rank] = False
                add_rank(rank)
            else:
                arrivals.strays[rank] = delay
        elif rank == UNSENT:
            arrivals.unsent.ids.append(packet_id)
            arrivals.unsent.times.append(time_ns)
        elif rank == REPEATED:
            arrivals.repeated[packet_id].append(time_ns)
    arrived_too = [rank for rank in arrivals.strays if not missing[rank]]
    for rank in arrived_too:
        del arrivals.strays[rank]
    return arrivals


def _classify(arrivals: _Arrivals, decided: range) -> bytearray:
    """Return the PacketClass of each packet, by rank, as if there were no identical packets."""
    classes = bytearray([PacketClass.MATCHED]) * len(arrivals.delays)
    rank = arrivals.missing.find(True)
    while rank >= 0:
        # A stray that came too late (its delay is positive) shows that the wait was long enough.
        if rank in decided or arrivals.strays.get(rank, 0) > 0:
            classes[rank] = PacketClass.LOST
        else:
            classes[rank] = PacketClass.UNDECIDED
        rank = arrivals.missing.find(True, rank + 1)
    return classes


def _classify_copies(
    classes: bytearray,
    copies: Mapping[int, Sequence[int]],
    early_copies: Counter[int],
    arrivals: _Arrivals,
    sent: PointSightings,
    window: Window,
    longest: int,
) -> None:
    """Classify the packets of each repeated identity of which at least one has arrived.

    It is unknown which of them are missing.  Those that may be undecided are the first to be taken
    as missing, then the last ones.  `copies` has their ranks by id, and `early_copies` the number
    of packets by id that were sent before the window.
    """
    decided_from, decided_until = window.decided(longest)
    # Copies that were sent shortly before the second point was watched may have been seen, too.
    decided = sent.ranks_between(decided_from - longest, decided_until)
    for packet_id, times in arrivals.repeated.items():
        ranks = copies[packet_id]
        arrived = len(times)
        if not window.is_live:  # later arrivals may be of packets that the first point has not seen
            arrived = bisect(times, window.end + longest)
            arrivals.unwatched += len(times) - arrived
        if not arrived:
            continue
        certain = [rank for rank in ranks if rank in decided]
        uncertain = [rank for rank in ranks if rank not in decided]
        # As if they had arrived in this order:
        for position, rank in enumerate(certain + uncertain):
            if position < arrived:
                classes[rank] = PacketClass.AMBIGUOUS
            elif rank in decided:
                classes[rank] = PacketClass.AMBIGUOUS_LOST
            else:
                classes[rank] = PacketClass.AMBIGUOUS_UNDECIDED
        surplus = arrived - len(ranks) - early_copies[packet_id]
        if surplus > 0:
            arrivals.surplus[ranks[0]] = surplus


def _find_undecided(classes: bytearray) -> int:
    """Return the rank of the first undecided packet; the number of packets if there is none."""
    first = len(classes)
    for kind in (PacketClass.UNDECIDED, PacketClass.AMBIGUOUS_UNDECIDED):
        rank = classes.find(kind)
        if rank >= 0:
            first = min(first, rank)
    return first


def _merge_ambiguous(classes: bytearray) -> bytearray:
    """Return the classes with AMBIGUOUS for all packets that share an identity."""
    ambiguous = bytes([PacketClass.AMBIGUOUS])
    for kind in (PacketClass.AMBIGUOUS_LOST, PacketClass.AMBIGUOUS_UNDECIDED):
        classes = classes.replace(bytes([kind]), ambiguous)
    return classes


def _count(classes: bytearray, arrivals: _Arrivals) -> Counts:
    """Return the numbers of the packets that were sent, and of their further arrivals."""
    number_of = classes.count
    return Counts(
        matched=number_of(PacketClass.MATCHED) + number_of(PacketClass.AMBIGUOUS),
        ambiguous=number_of(PacketClass.AMBIGUOUS),
        lost=number_of(PacketClass.LOST) + number_of(PacketClass.AMBIGUOUS_LOST),
        duplicated=sum(arrivals.duplicates.values()) + sum(arrivals.surplus.values()),
        second_only=0,  # until `_count_unsent`
        strays=len(arrivals.strays),
        undecided=Undecided(
            unwatched=number_of(PacketClass.UNDECIDED) + number_of(PacketClass.AMBIGUOUS_UNDECIDED),
            unwatched_first=arrivals.unwatched,
        ),
    )


def _count_unsent(
    counts: Counts, arrivals: _Arrivals, window: Window, until: int, longest: int
) -> None:
    """Count the packets that only the second point saw, if the first was watched when they left."""
    earliest = window.start
    if window.is_live:  # what arrives earlier may have been sent before the window
        earliest += longest
    for time_ns in arrivals.unsent.times:
        if earliest <= time_ns <= until:
            counts.second_only += 1
        elif not window.is_live:
            counts.undecided.unwatched_first += 1


def _explain_missing(counts: Counts, classes: bytearray, uncaptured: int) -> None:
    """Count missing packets as uncaptured, up to `uncaptured`: first lost, then unwatched ones.

    In the classes the last lost packets become undecided.
    """
    explained = min(counts.lost, uncaptured)
    counts.lost -= explained
    unwatched = min(counts.undecided.unwatched, uncaptured - explained)
    counts.undecided.unwatched -= unwatched
    counts.undecided.uncaptured = explained + unwatched
    last = len(classes)
    for _ in range(min(explained, classes.count(PacketClass.LOST))):
        last = classes.rindex(PacketClass.LOST, 0, last)
        classes[last] = PacketClass.UNDECIDED


# ---- Statistics ------------------------------------------------------------------------------


@dataclass
class DelayStatistics:
    """Statistics of at least one delay, in microseconds."""

    average: float
    minimum: float
    maximum: float
    stdev: float  # of the population
    median: float
    percentiles: dict[str, float]  # by percent: "90", "95", "99" and "99.9"
    pdv: float  # delay variation: p99 - minimum (RFC 5481)
    negative: int  # delays below zero
    zero: int


class RankedDelays:
    """At least one delay in order of size, where equal ones are stored once."""

    def __init__(self, delays: Iterable[int]) -> None:
        """Rank delays, which may be counted already (a Counter)."""
        counts = Counter(delays)
        self.values = sorted(counts)
        self.counts = [counts[value] for value in self.values]
        self._end_ranks = list(accumulate(self.counts))  # first rank after each value's delays

    def __len__(self) -> int:
        return self._end_ranks[-1]

    def __getitem__(self, rank: int) -> int:
        return self.values[bisect(self._end_ranks, rank)]


def delay_statistics(delays: Iterable[int]) -> DelayStatistics:
    """Return the statistics of at least one delay (ns), which are exact but for the final rounding.

    The delays may be counted already (a Counter).
    """
    ranked = RankedDelays(delays)
    size = len(ranked)
    # These sums are integers, since floats would lose digits of large squares.
    sums_by_value = list(map(mul, ranked.values, ranked.counts))
    total = sum(sums_by_value)
    total_of_squares = sum(map(mul, sums_by_value, ranked.values))
    minimum = ranked.values[0]
    p99 = percentile(ranked, permille=990)
    below_zero = bisect_left(ranked.values, 0)
    up_to_zero = bisect(ranked.values, 0)
    return DelayStatistics(
        average=microseconds(total / size),
        minimum=microseconds(minimum),
        maximum=microseconds(ranked.values[-1]),
        stdev=microseconds(math.sqrt(size * total_of_squares - total * total) / size),
        median=microseconds(percentile(ranked, permille=500)),
        percentiles={
            "90": microseconds(percentile(ranked, permille=900)),
            "95": microseconds(percentile(ranked, permille=950)),
            "99": microseconds(p99),
            "99.9": microseconds(percentile(ranked, permille=999)),
        },
        pdv=microseconds(p99 - minimum),
        negative=sum(ranked.counts[:below_zero]),
        zero=sum(ranked.counts[below_zero:up_to_zero]),
    )


def microseconds(nanoseconds: float) -> float:
    """Convert to microseconds, rounded to the nanosecond that time stamps are accurate to."""
    return round(nanoseconds) / 1000


def percentile(ranked: Sequence[int] | RankedDelays, permille: int) -> float:
    """Return a percentile of sorted values, interpolated between the two nearest ranks.

    `permille` is 990 for the 99th percentile.
    """
    rank, remainder = divmod(permille * (len(ranked) - 1), 1000)
    if remainder == 0:
        return ranked[rank]
    return (ranked[rank] * (1000 - remainder) + ranked[rank + 1] * remainder) / 1000


def mean_ipdv(delays: Sequence[int]) -> float | None:
    """Return the mean absolute difference of consecutive delays (RFC 3393), in microseconds.

    `delays` are in nanoseconds, or NO_DELAY.  Return None if no two consecutive packets have a
    delay.
    """
    differences = [
        abs(later - earlier)
        for earlier, later in pairwise(delays)
        if earlier != NO_DELAY and later != NO_DELAY
    ]
    if not differences:
        return None
    return microseconds(sum(differences) / len(differences))


def reordering(result: DirectionResult) -> dict[int, int]:
    """Return the extent (in packets) of each reordered packet (RFC 4737), by rank.

    Only packets of one stream, from one address to another, can overtake each other.
    """
    in_order = all(map(le, result.arrivals, islice(result.arrivals, 1, None)))
    if in_order:
        return {}
    ends = {
        kind: ADDRESSES + len(addresses_of(identity)) for kind, identity in result.kinds.items()
    }
    addresses = list(_endpoints(result, ends))
    streams: defaultdict[bytes, list[int]] = defaultdict(list)
    for rank in result.arrivals:
        streams[addresses[rank]].append(rank)
    extents: dict[int, int] = {}
    for ranks in streams.values():
        extents |= _reordering_extents(ranks)
    return extents


def _reordering_extents(ranks: Sequence[int]) -> dict[int, int]:
    """Return the extent of each reordered packet of a stream whose ranks are in order of arrival.

    The extent is the distance back to the first arrival that was sent later.
    """
    late_positions: list[int] = []
    highest = -1
    highest_so_far = array("I")  # by position; sorted, since it never falls
    for position, rank in enumerate(ranks):
        if rank > highest:
            highest = rank
        else:
            late_positions.append(position)
        highest_so_far.append(highest)
    extents = {}
    for position in late_positions:
        rank = ranks[position]
        first_sent_later = bisect(highest_so_far, rank)
        extents[rank] = position - first_sent_later
    return extents


def _endpoints(result: DirectionResult, ends: Mapping[bytes, int]) -> Iterator[bytes]:
    """Return the addresses in each packet's identity, with or without the ports, by rank.

    `ends` are the offsets at which that part of an identity ends, by the kind of identity (its
    first two bytes): after the addresses for streams, or after the ports for flows.
    """
    identities = map(result.identities.__getitem__, result.ids)
    if len(ends) == 1:  # the usual case, in which the same slice of all is faster
        [end] = ends.values()
        return map(itemgetter(slice(ADDRESSES, end)), identities)
    return (identity[ADDRESSES : ends[identity[:2]]] for identity in identities)


@dataclass
class FlowDelays:
    """The delays (ns) of all packets, and those of the first packets of flows, counted by value."""

    flows: int  # the number of flows
    whole: Counter[int]  # all packets
    first: Counter[int]  # the first packet of each flow

    @property
    def later(self) -> Counter[int]:
        """The delays of all packets that are not the first of their flows."""
        later = self.whole.copy()
        for delay, packets in self.first.items():  # faster than a difference of Counters
            if later[delay] == packets:
                del later[delay]
            else:
                later[delay] -= packets
        return later


def delays_by_flow(result: DirectionResult) -> FlowDelays:
    """Separate the first packet of each flow, which may take a slow path in a switch or firewall.

    Text captures have no flows; then all packets are later ones.
    """
    whole = Counter(result.delays)
    del whole[NO_DELAY]
    if result.identities[0][0] == TEXT:
        return FlowDelays(flows=0, whole=whole, first=Counter())
    first_delays: dict[bytes, int] = {}  # by flow; NO_DELAY if its first packet has none
    for flow, delay, packet_class in zip(_flows(result), result.delays, result.classes):
        # No count includes undecided packets, so none of them is the first of its flow.
        if flow not in first_delays and packet_class != PacketClass.UNDECIDED:
            first_delays[flow] = delay
    first_delays.pop(b"", None)  # fragments of unknown flows
    first = Counter(first_delays.values())
    del first[NO_DELAY]
    return FlowDelays(flows=len(first_delays), whole=whole, first=first)


def _flows(result: DirectionResult) -> Iterable[bytes]:
    """Return the flow of each packet, by rank, as bytes that distinguish it from other flows.

    A later fragment has no ports: its flow is that of the datagram's first fragment, or b"" if that
    wasn't seen.  If all packets are later fragments, their flows differ by address only.
    """
    ends = {kind: _flow_end(identity) for kind, identity in result.kinds.items()}
    endpoints = _endpoints(result, ends)
    if len(ends) == 1:  # all packets have the same version and protocol
        return endpoints
    flow_by_datagram = _flow_by_datagram(result)
    flows = []
    for packet_id, addresses_and_ports in zip(result.ids, endpoints):
        identity = result.identities[packet_id]
        if identity[0] & NOT_FIRST:
            flows.append(flow_by_datagram.get(_datagram_key(identity), b""))
            continue
        flow = identity[:2] + addresses_and_ports
        flows.append(flow)
        if flow_by_datagram:
            datagram = _datagram_key(identity)
            if datagram in flow_by_datagram:
                # The fragments that follow are of this one, even if an earlier one had its IP id.
                flow_by_datagram[datagram] = flow
    return flows


def _flow_by_datagram(result: DirectionResult) -> dict[bytes, bytes]:
    """Return the flow of each datagram of which there are later fragments, by `_datagram_key`.

    If several datagrams have the same key, it is the flow of the first.
    """
    if not any(kind[0] & NOT_FIRST for kind in result.kinds):
        return {}
    fragmented = {
        _datagram_key(identity) for identity in result.identities if identity[0] & NOT_FIRST
    }
    return {
        _datagram_key(identity): flow_of(identity)
        for identity in reversed(result.identities)  # so that the first one of a key prevails
        if not identity[0] & NOT_FIRST and _datagram_key(identity) in fragmented
    }


def _datagram_key(identity: bytes, translated: bool = False) -> bytes:
    """Return the parts that the fragments of a datagram share: protocol, IP id and addresses.

    With `translated` it has no addresses, so that both points have the same key.
    """
    protocol = identity[1:2]
    ip_id = identity[4:ADDRESSES]
    return protocol + ip_id + (b"" if translated else addresses_of(identity))


# ---- Statistics: relations between packets ---------------------------------------------------

# Where the part of the transport header begins in an identity, by IP version: that of TCP is whole
# up to the flags, that of ICMP lacks the checksum.  Later fragments and text have none.
TRANSPORT_OFFSETS = {4: ADDRESSES + 8, 6: ADDRESSES + 32}
# Addresses, ports and sequence number of a TCP segment, by IP version.
SEGMENT_FIELDS = {4: Struct(">4s4s2s2sI"), 6: Struct(">16s16s2s2sI")}
TCP_FLAGS = 13  # offset in the TCP header
UDP_LENGTH = slice(4, 6)  # in the UDP header
HANDSHAKE_FLAGS = FIN | SYN | RST | ACK
SYN_ACK = SYN | ACK
# Protocol and type of ICMP messages.
ECHO_REQUESTS = (bytes((ICMP, 8)), bytes((ICMPV6, 128)))
ECHO_REPLIES = (bytes((ICMP, 0)), bytes((ICMPV6, 129)))


def _is_tcp(identity: bytes) -> bool:
    """Return whether this is a TCP segment whose header is known (not a later fragment)."""
    return identity[0] in (4, 6) and identity[1] == TCP


def resized(result: DirectionResult) -> int:
    """Return how many packets that only the second point saw are lost ones of another length.

    Segments or datagrams were merged (GRO) or split (TSO, USO) between the points.
    """
    if not result.unsent_ids:
        return 0
    lost = [result.identity(rank) for rank in result.ranks(PacketClass.LOST)]
    unsent = [result.identities[packet_id] for packet_id in result.unsent_ids]
    translated = result.translated
    fragmented = _fragmented(lost, translated) | _fragmented(unsent, translated)

    def key_of(identity: bytes) -> bytes:
        if _datagram_key(identity, translated) in fragmented:
            return b""
        return _segment_key(identity, translated)

    lost_keys = set(map(key_of, lost)) - {b""}
    return sum(key_of(identity) in lost_keys for identity in unsent)


def _fragmented(identities: Iterable[bytes], translated: bool) -> set[bytes]:
    """Return the `_datagram_key` of each datagram that has later fragments among some packets."""
    later = (identity for identity in identities if identity[0] & NOT_FIRST)
    return {_datagram_key(identity, translated) for identity in later}


def fragmented_on_the_way(result: DirectionResult) -> int:
    """Return how many lost packets only the second point saw, as fragments."""
    unsent = (result.identities[packet_id] for packet_id in result.unsent_ids)
    fragmented = _fragmented(unsent, result.translated)
    if not fragmented:
        return 0
    lost = [result.identity(rank) for rank in result.ranks(PacketClass.LOST)]
    return sum(_datagram_key(identity, result.translated) in fragmented for identity in lost)


def _segment_key(identity: bytes, translated: bool) -> bytes:
    """Return what a packet of TCP or UDP shares with the first of its parts; b"" for others.

    Parts are what it was split into, or merged from; the others have other sequence numbers, or
    other data.  With `translated` addresses are ignored.
    """
    header = bytearray(_transport_of(identity))
    ip_id = identity[4:ADDRESSES]  # without one, datagrams that begin alike may differ
    if _is_tcp(identity):
        # These flags can differ: only the last part has PSH and FIN, and only the first one CWR.
        header[TCP_FLAGS] &= ~(PSH | FIN | CWR)
    elif identity[0] in TRANSPORT_OFFSETS and identity[1] == UDP and any(ip_id):
        del header[UDP_LENGTH]
    else:
        return b""
    addresses = b"" if translated else addresses_of(identity)
    return identity[:2] + ip_id + addresses + header


def sent_datagrams(result: DirectionResult) -> int:
    """Return how many packets passed the first point, fragments of one datagram counted once."""
    later = sum(1 for packet_id in result.ids if result.identities[packet_id][0] & NOT_FIRST)
    return len(result.ids) - later


def are_later_fragments(result: DirectionResult, kind: PacketClass) -> bool:
    """Return whether all packets of a class are fragments other than the first of a datagram."""
    return all(result.identity(rank)[0] & NOT_FIRST for rank in result.ranks(kind))


def resets_of_own_syns(result: DirectionResult) -> int:
    """Return how many packets are RSTs by which a source rejects the answers to its own SYNs."""
    opened_flows: set[bytes] = set()
    resets = 0
    for packet_id in result.ids:
        identity = result.identities[packet_id]
        if not _is_tcp(identity):
            continue
        flags = _transport_of(identity)[TCP_FLAGS] & HANDSHAKE_FLAGS
        if flags == SYN:
            opened_flows.add(flow_of(identity))
        elif flags == RST and flow_of(identity) in opened_flows:
            resets += 1
    return resets


def guest_times(inbound: DirectionResult, outbound: DirectionResult) -> GuestTimes:
    """Return how long the VM took to answer the probes that came in.

    Probes are TCP SYNs, whose answers acknowledge their sequence number, and ICMP echo requests,
    whose answers have their identifier and sequence number.  A probe is unanswered only if the vif
    was watched for as long as the slowest answer took.
    """
    probes: list[int] = []  # ranks
    rank_by_answer_key: dict[bytes, int] = {}  # of the probe
    ambiguous: set[int] = set()  # ranks
    fragment_sizes = _sizes_of_later_fragments(inbound)
    for rank in inbound.ranks(PacketClass.MATCHED, PacketClass.AMBIGUOUS):
        identity = inbound.identity(rank)
        later_size = fragment_sizes[_datagram_key(identity)] if fragment_sizes else 0
        answer_keys = _expected_answer_keys(identity, later_size)
        if not answer_keys:
            continue
        probes.append(rank)
        if inbound.delays[rank] == NO_DELAY:  # its time at the vif is unknown
            ambiguous.add(rank)
        for key in answer_keys:
            earlier_probe = rank_by_answer_key.setdefault(key, rank)
            if earlier_probe != rank:
                ambiguous.update((rank, earlier_probe))

    times = _answer_times(inbound, outbound, rank_by_answer_key, ambiguous)
    slowest = max(times.values(), default=0)
    decided_until = outbound.until - slowest
    missing = [rank for rank in probes if rank not in ambiguous and rank not in times]
    undecided = sum(inbound.sent[rank] + inbound.delays[rank] > decided_until for rank in missing)
    unanswered = len(missing) - undecided
    return GuestTimes(times, unanswered, undecided, len(ambiguous))


def _answer_times(
    inbound: DirectionResult,
    outbound: DirectionResult,
    rank_by_answer_key: Mapping[bytes, int],
    ambiguous: Container[int],
) -> dict[int, int]:
    """Return the time (ns) from a probe's arrival at the vif to its first answer there, by rank."""
    times: dict[int, int] = {}
    for packet_id, time_ns in zip(outbound.ids, outbound.sent):
        rank = rank_by_answer_key.get(_answer_key(outbound.identities[packet_id]))
        if rank is None or rank in ambiguous or rank in times:
            continue
        guest_time = time_ns - inbound.sent[rank] - inbound.delays[rank]
        if guest_time >= 0:  # what left before the probe came can't answer it
            times[rank] = guest_time
    return times


def _sizes_of_later_fragments(result: DirectionResult) -> Counter[bytes]:
    """Return how many bytes of IPv4 datagrams the later fragments have, by `_datagram_key`."""
    sizes: Counter[bytes] = Counter()
    if any(kind[0] == 4 | NOT_FIRST for kind in result.kinds):
        for identity in result.identities:
            if identity[0] == 4 | NOT_FIRST:
                sizes[_datagram_key(identity)] += _u16(identity, 2) - 20  # the header
    return sizes


def _expected_answer_keys(identity: bytes, later_size: int = 0) -> list[bytes]:
    """Return the keys that the answer to a probe may have; an empty list for other packets.

    They are those of `_answer_key`: the answer's addresses with its ports and acknowledgment
    number, or with its identifier and sequence number.  `later_size` are the bytes in the later
    fragments of a probe.
    """
    transport = TRANSPORT_OFFSETS.get(identity[0])
    if transport is None:
        return []
    if identity[1] != TCP:
        if identity[1:2] + identity[transport : transport + 1] not in ECHO_REQUESTS:
            return []
        half = (ADDRESSES + transport) // 2
        source = identity[ADDRESSES:half]
        destination = identity[half:transport]
        identifier_and_sequence = identity[transport + 2 : transport + 6]
        return [destination + source + identifier_and_sequence]
    if identity[transport + TCP_FLAGS] & HANDSHAKE_FLAGS != SYN:
        return []
    fields = SEGMENT_FIELDS[identity[0]]
    source, destination, sport, dport, sequence = fields.unpack_from(identity, ADDRESSES)
    acknowledgment = sequence + 1  # a SYN counts like a byte of data
    keys = [fields.pack(destination, source, dport, sport, acknowledgment % (1 << 32))]
    ip_length = identity[2] << 8 | identity[3]
    ip_header = 20 if identity[0] == 4 else 0  # the length of an IPv6 packet is without its header
    tcp_header = (identity[transport + 12] >> 4) * 4
    payload = ip_length - ip_header - tcp_header + later_size
    if payload > 0:  # the answer may acknowledge the data that the SYN carries, or the SYN only
        acknowledgment += payload
        keys.append(fields.pack(destination, source, dport, sport, acknowledgment % (1 << 32)))
    return keys


def _answer_key(identity: bytes) -> bytes:
    """Return the key that links an answer to its probe; b"" for a packet that answers no probe."""
    transport = TRANSPORT_OFFSETS.get(identity[0])
    if transport is None:
        return b""
    if identity[1] == TCP:
        flags = identity[transport + TCP_FLAGS]
        if flags & RST or flags & SYN_ACK == SYN_ACK:
            addresses_and_ports = identity[ADDRESSES : transport + 4]
            acknowledgment = identity[transport + 8 : transport + 12]
            return addresses_and_ports + acknowledgment
    elif identity[1:2] + identity[transport : transport + 1] in ECHO_REPLIES:
        identifier_and_sequence = identity[transport + 2 : transport + 6]
        return identity[ADDRESSES:transport] + identifier_and_sequence
    return b""


# ---- Comparison ------------------------------------------------------------------------------

COMPARED = {"median": 3, "p99": 3, "loss_ratio": 6}  # figures, and the decimals to report them with
FEWEST_RUNS = 3  # on each side, to know how much equal runs vary
CONFIDENCE = 0.99  # that the intervals of all COMPARED figures contain the true shifts
EQUAL_RUNS = "the runs on each side are equal, so run-to-run variation is unknown"
# Student's t for CONFIDENCE, by degrees of freedom: two-sided, and with the probability of an error
# divided among the COMPARED figures (Bonferroni).
STUDENT_T = {
    2: 17.277,
    3: 8.575,
    4: 6.254,
    5: 5.247,
    6: 4.698,
    7: 4.355,
    8: 4.122,
    9: 3.954,
    10: 3.827,
    12: 3.649,
    15: 3.484,
    20: 3.331,
    30: 3.189,
    60: 3.057,
}


@dataclass
class Shift:
    """The shift of a figure's mean between two sets of runs.

    What depends on the variation of runs is None if there are too few of them.
    """

    baseline: float  # mean
    current: float  # mean
    shift: float
    interval: list[float] | None = None  # confidence interval of the shift: its two ends
    run_to_run: float | None = None  # standard deviation of the runs within a set
    distinguishable: bool | None = None  # None, too, if the sets differ and each has equal runs


def run_figures(result: DirectionResult) -> dict[str, float]:
    """Return the COMPARED figures of a run with at least one delay; delays in microseconds."""
    delays = delay_statistics(result.samples())
    return {
        "median": delays.median,
        "p99": delays.percentiles["99"],
        "loss_ratio": result.counts.loss_ratio,
    }


def compare_runs(
    baseline: Sequence[Mapping[str, float]], current: Sequence[Mapping[str, float]]
) -> Report:
    """Return the report's comparison of two sets of runs, by the means of their figures."""
    shifts = {
        name: _shift([run[name] for run in baseline], [run[name] for run in current], decimals)
        for name, decimals in COMPARED.items()
    }
    verdicts = [shift.distinguishable for shift in shifts.values()]
    verdict: bool | None = any(verdicts)
    if not verdict and None in verdicts:  # a figure that can't be decided may have changed
        verdict = None
    return {
        **{name: asdict(shift) for name, shift in shifts.items()},
        "distinguishable": verdict,
        "confidence": CONFIDENCE,
        "runs": [len(baseline), len(current)],
    }


def _shift(baseline: Sequence[float], current: Sequence[float], decimals: int) -> Shift:
    """Return the shift of one figure, of which the runs of each set have these values."""
    before = _mean(baseline)
    after = _mean(current)
    shift = Shift(round(before, decimals), round(after, decimals), round(after - before, decimals))
    if min(len(baseline), len(current)) >= FEWEST_RUNS:
        margin = _welch_margin(baseline, current)
        low = round(after - before - margin, decimals)
        high = round(after - before + margin, decimals)
        shift.interval = [low, high]
        # An interval without width comes from sets of equal runs, which don't show how much runs
        # vary: any shift may be such variation.
        if low < high or low == high == 0:
            shift.distinguishable = low > 0 or high < 0
        run_to_run = math.sqrt((_variance(baseline) + _variance(current)) / 2)
        shift.run_to_run = round(run_to_run, decimals)
    return shift


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    """Return the variance of a sample."""
    mean = _mean(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _welch_margin(baseline: Sequence[float], current: Sequence[float]) -> float:
    """Return half the width of Welch's confidence interval for the difference of two means."""
    baseline_error = _variance(baseline) / len(baseline)  # squared standard error of the mean
    current_error = _variance(current) / len(current)
    error = baseline_error + current_error
    if error == 0:
        return 0.0
    freedom = error**2 / (  # degrees of freedom, by Welch and Satterthwaite
        baseline_error**2 / (len(baseline) - 1) + current_error**2 / (len(current) - 1)
    )
    return _student_t(freedom) * math.sqrt(error)


def _student_t(freedom: float) -> float:
    """Return Student's t for at least two degrees of freedom.

    Between two rows of the table it is that of fewer degrees, which makes intervals wider.
    """
    known = [degrees for degrees in STUDENT_T if degrees <= freedom]
    return STUDENT_T[max(known, default=2)]  # rounding can yield slightly less than 2


# ---- Kernel trace ----------------------------------------------------------------------------
# With --stages the hypervisor's kernel traces when its stack receives a packet on the first
# interface, when the packet enters the queue of the second one and then its driver, and where it
# is freed.  The events of one packet have the address of its sk_buff (skb) in common; they are a
# Passage.  It belongs to the packet in the captures whose time stamps and size fit.

# The stages of a packet end when the stack receives it, when it enters the queue, when the driver
# gets it, and when the guest has it.
STAGES = ("before_stack", "forwarding", "queueing", "to_guest")
NOT_TRACED = -1  # in place of the time of a stage

LARGEST_TRACE = 1 << 28  # bytes of the events of all processors
MOST_RECORDS = 2_000_000  # of the trace, that are read
MOST_PROCESSORS = 512
LARGEST_TEXT = 1 << 20  # bytes of a text file of the trace
MOST_SYMBOLS = 1000  # of the kernel's functions, whose names are looked up
EVENTS_KIB = 0.2  # size of the events of one packet in one direction
BUFFER_MARGIN = 4  # seconds of events; a busy hypervisor drains the buffers late
SMALLEST_BUFFER_KIB = 8192  # for a processor: all other traffic of the pif is traced, too

# Beside the captures: a trace in an instance for this run only, drained into files each second.
# It is certainly removed: by a keeper outside of the process group, else by the guard that watches
# the keeper, else by the next run.  The functions in $tracing, which must be free of single quotes,
# are those that the keeper's shell needs, too.
TRACING = r"""
tracing='
remove() {  # INSTANCE: tries again, as rmdir fails while a process reads it
  echo 0 >"$1/tracing_on"
  echo 0 >"$1/events/enable"
  n=0
  until rmdir "$1" || [ ! -d "$1" ] || [ $n = 9 ]; do
    n=$((n + 1))
    sleep 0.2 || sleep 1
  done
  release
} >/dev/null 2>&1

release() {  # unmounts what a run has mounted, once no run traces
  grep -q "^netweaver /sys/kernel/tracing " /proc/mounts || return 0
  ls -d /sys/kernel/tracing/instances/netweaver-* || umount /sys/kernel/tracing
} >/dev/null 2>&1

online() {  # prints the processors of instance $i that run: others may have a directory, too
  for c in "$i"/per_cpu/cpu*; do
    c=${c##*/} on=0
    [ ! -d "/sys/devices/system/cpu/$c" ] || on=1
    [ ! -r "/sys/devices/system/cpu/$c/online" ] || read -r on <"/sys/devices/system/cpu/$c/online"
    [ "$on" = 0 ] || echo "$c"
  done
}

copy() {  # FROM TO PAGES: appends; some versions of dd open standard output again, to overwrite it
  dd if="$1" bs=4096 count="$3" iflag=nonblock oflag=append conv=notrunc >>"$2"
}

drain() {  # MOST_KIB: moves the events of instance $i to files; fails once these are so large
  used=`du -ck trace-cpu* | tail -n 1 | cut -f 1`
  [ "${used:-0}" -lt "$1" ] || return
  for c in `online`; do
    copy "$i/per_cpu/$c/trace_pipe_raw" "trace-$c" $((($1 - ${used:-0}) / 4 + 1))
  done
  :
}

offset() {  # saves the ns from the clock of the trace to the time of day (clock 1: CLOCK_REALTIME)
  awk "/^ clock 1:/ { real = 1 } real && /offset/ { print \$2; exit }" /proc/timer_list \
    >>trace-offset
}

keep() {  # INSTANCE SHELL PARENT MOST_KIB: until one of the processes ends, or the trace is full
  trap "" HUP INT PIPE
  trap stop=1 TERM
  stop= i=$1
  while [ -z "$stop" ] && kill -s 0 "$2" && kill -s 0 "$3" && drain "$4"; do sleep 1 & wait $!; done
  echo 0 >"$i/tracing_on"
  drain "$4" || echo full >>trace-stats
  cat "$i"/per_cpu/cpu*/stats >>trace-stats
  offset
  remove "$i"
}'

trace() {  # BUFFER_KIB MOST_KIB DIRECTION VIF PIF...
  kib=$1 most=$2 direction=$3 vif=$4
  shift 4
  eval "$tracing"
  hint="install GNU coreutils there"
  problem=`copy /dev/null trace-none 1 2>&1` || { echo "$problem" | head -n 1 >&2; return 1; }
  hint="tracefs needs root"
  for t in /sys/kernel/tracing /sys/kernel/debug/tracing; do [ ! -d $t/instances ] || break; done
  for i in $t/instances/netweaver-*; do  # of runs that could not remove them
    grep -q netweaver "/proc/${i##*-}/cmdline" 2>/dev/null || [ ! -d "$i" ] || remove "$i"
  done
  [ -d $t/instances ] || { t=/sys/kernel/tracing; mount -t tracefs netweaver $t || return; }
  i=$t/instances/netweaver-$$
  mkdir $i || { release; return 1; }
  hint=
  start_events "$@" || { remove $i; return 1; }
  `command -v setsid` sh -c "$tracing; keep $i $$ $PPID $most 2>/dev/null" 3<&- >/dev/null 2>&1 &
  k=$!
  guard >/dev/null 2>&1 &
  all="$all $k $!"
}

guard() {  # kills a keeper that takes more than 8 s to end after TERM
  left=  # in tenths of a second; empty before TERM
  trap 'left=80' TERM
  while kill -s 0 $k && [ "$left" != 0 ]; do
    if [ -z "$left" ]; then
      sleep 1 & wait $!
    else
      left=$((left - 1))
      sleep 0.1 || { sleep 1; left=$((left - left % 10)); }  # some sleep for whole seconds only
    fi
  done
  [ "$left" != 0 ] || kill -s KILL $k
  remove $i
}

start_events() {  # PIF...: sets up instance $i for packets between these and $vif, and starts it
  processors=`online`
  n=`echo "$processors" | wc -l`
  # An eighth of the free memory: MemAvailable follows MemFree, and is missing before Linux 3.14.
  room=`awk '/^Mem(Free|Available):/ { kib = $2 } END { print int(kib / 8) }' /proc/meminfo`
  [ $kib -le $((room / n)) ] || kib=$((room / n))
  [ $kib -ge 64 ] || { echo "too little memory is free" >&2; return 1; }
  echo 0 >$i/tracing_on && echo mono >$i/trace_clock && echo 0 >$i/options/overwrite &&
    echo $kib >$i/buffer_size_kb || return
  # The kernel sees packets on the interfaces below a bond or a VLAN, which may be nested: three
  # times, each interface is replaced by those below it.
  for n in 1 2 3; do
    for p; do
      shift
      set -- "$@" `ls -d /sys/class/net/$p/lower_* 2>/dev/null | sed "s/.*lower_//" | grep . ||
        echo "$p"`
    done
  done
  # Filters of the events of the interfaces that receive packets (from) and that send them (to):
  to="name == \"$vif\"" from=
  for p; do from="$from || name == \"$p\""; done
  from=${from# || }
  case $direction in
    out) p=$to to=$from from=$p ;;
    both) to="$to || $from" from=$to ;;
  esac
  events='net/netif_receive_skb net/net_dev_queue net/net_dev_start_xmit skb/kfree_skb'
  kind=`readlink "/sys/class/net/$vif/device/driver"`
  kind=${kind##*/}
  if [ -e "/sys/class/net/$vif/tun_flags" ]; then
    # The process that reads a tap for the guest consumes the packets: vhost, or QEMU.
    kind=tap events="$events skb/consume_skb"
    echo 'comm ~ "vhost*" || comm ~ "qemu*" || comm ~ "kvm*" || comm ~ "CPU *"' \
      >$i/events/skb/consume_skb/filter
  fi
  for e in $events; do
    case $e in
      net/netif*) echo "$from" >$i/events/$e/filter ;;
      net/*) echo "$to" >$i/events/$e/filter ;;
    esac
    cat $i/events/$e/format >>trace-formats && echo 1 >$i/events/$e/enable || return
  done
  offset && echo 1 >$i/tracing_on
}

start_trace() {
  if trace "$@" 2>trace-errors; then
    echo trace on ${kind:--} $processors >&2
  else
    echo trace off `tail -n 1 trace-errors` "${hint:+($hint)}" >&2
  fi
}
"""


def trace_command(
    direction: str,
    vif: str,
    pifs: Iterable[str],
    packets_per_second: float,
    free_bytes: int | None,
) -> str:
    """Return the shell commands that start a trace beside the captures, and report its status.

    `direction` is a key of DIRECTIONS, `packets_per_second` are those to expect in one direction,
    and `free_bytes` is the disk space, or None if that is unknown.
    """
    directions = len(DIRECTIONS[direction])
    expected_kib = math.ceil(packets_per_second * directions * EVENTS_KIB * BUFFER_MARGIN)
    buffer_kib = max(SMALLEST_BUFFER_KIB, expected_kib)
    most_bytes = LARGEST_TRACE // 2  # half of it, since the last drain may exceed this
    if free_bytes is not None:
        most_bytes = min(most_bytes, free_bytes // 4)
    interfaces = " ".join(map(quote, (vif, *pifs)))
    return f"{TRACING}start_trace {buffer_kib} {most_bytes // 1024} {direction} {interfaces}"


@dataclass(frozen=True)
class TraceStatus:
    """The status of the trace by the hypervisor's kernel."""

    running: bool
    backend: str = ""  # what takes packets from the vif: "tap", "netback", or "" if unknown
    processors: tuple[str, ...] = ()  # "cpu0" ...
    problem: str = ""  # why it isn't running; "" if its commands haven't reported anything

    @property
    def warning(self) -> str:
        """A sentence on why there is no trace, or an empty text."""
        if self.running:
            return ""
        return f"kernel trace unavailable: {self.problem or 'no answer'}"


def trace_status(messages: str) -> TraceStatus | None:
    """Return the status of the trace by its commands' messages, or None before there is one.

    The message is "trace on DRIVER PROCESSOR...", or "trace off PROBLEM".
    """
    status = re.search(r"^trace (on|off)(?: (.*))?$", messages, re.MULTILINE)
    if not status:
        return None
    details = status[2] or ""
    if status[1] == "off":
        return TraceStatus(running=False, problem=details.strip())
    driver, _, processors = details.partition(" ")
    backend = {"tap": "tap", "vif": "netback"}.get(driver, "")  # netback's driver is named vif
    valid = [name for name in processors.split() if re.fullmatch(r"cpu\d{1,4}", name, re.ASCII)]
    return TraceStatus(True, backend, tuple(valid[:MOST_PROCESSORS]))


def fetch_trace(
    host: Host, files: FileSource, source: str, directory: str, processors: Iterable[str]
) -> str:
    """Copy the trace from a directory on the hypervisor.

    Return a warning if it isn't whole, or "".
    """
    bytes_left = LARGEST_TRACE
    for name in ("formats", "offset", "stats", *processors):
        path = os.path.join(directory, f"trace-{name}")
        try:
            host.fetch(files, f"{source}/trace-{name}", path, bytes_left)
        except NetWeaverError as error:
            return f"part of the kernel trace is left out: {error}"
        bytes_left -= os.path.getsize(path)
    return ""


def fetch_symbols(run: RunCommand, directory: str, trace: KernelTrace) -> None:
    """Add the names of the kernel's functions where packets were freed, and keep them in a file.

    If that fails, the report has the functions' addresses instead.
    """
    addresses = [f"{location:016x}" for location in trace.locations()[:MOST_SYMBOLS]]
    if not addresses:
        return
    # Sorted among the kernel's symbols, an address follows the function that contains it.  If the
    # kernel hides its addresses (kptr_restrict), they are all 0.
    command = (
        f"{{ printf '%s ?\\n' {' '.join(addresses)}; "
        "awk '$2 ~ /[tT]/ && $1 !~ /^0+$/ { print $1, $3 }' /proc/kallsyms; } | LC_ALL=C sort | "
        """awk '$2 == "?" { print $1, last; next } { last = $2 }'"""
    )
    path = os.path.join(directory, "trace-symbols")
    with suppress(NetWeaverError, OSError):
        symbols = run(command)
        trace.symbols = parse_symbols(symbols)
        with open(path, "w", encoding="utf-8", errors="replace") as file:
            file.write(symbols)


class EventKind(Enum):
    """The events of the kernel that are traced, by their names there."""

    RECEIVED = "netif_receive_skb"
    QUEUED = "net_dev_queue"
    SENT = "net_dev_start_xmit"  # to the driver
    DROPPED = "kfree_skb"  # netback frees delivered packets in this way, too
    CONSUMED = "consume_skb"


@dataclass(frozen=True)
class End:
    """The event by which the kernel freed a packet."""

    kind: EventKind
    location: int  # address in the kernel; 0 if it isn't traced
    reason: str | None  # the kernel's, from Linux 5.17 on


@dataclass(slots=True)
class Event:
    """An event of the kernel's trace."""

    time: int  # ns since 1970
    processor: int
    kind: EventKind
    skb: int  # address of the packet's sk_buff
    device: bytes = b""  # name of the interface; empty if the packet was freed
    size: int = 0  # of the packet in bytes
    end: End | None = None  # if the packet was freed


@dataclass(eq=False, slots=True)
class Passage:
    """The events of one packet on its way; times are 0 where the trace doesn't show them."""

    direction: Direction
    processor: int  # of the first event
    continued: bool = False  # perhaps of a packet that was sent in an earlier passage
    received: int = 0
    received_size: int = 0  # without the Ethernet header
    queued: int = 0
    sent: int = 0  # to the driver
    sent_size: int = 0
    earliest: int = 0  # time at which the second point's capture may have seen it
    freed: int = 0
    end: End | None = None
    stamp: int = 0  # at the first point, of the packet that the passage belongs to; 0 if unknown
    stamp_from: int = 0  # bounds of the stamp while it is unknown
    stamp_until: int = 0

    @property
    def lost_in(self) -> str:
        """The stage in which a packet that never reached the driver was lost."""
        if self.queued:
            return "queueing"
        return "forwarding"


@dataclass
class EventFormat:
    """The offsets of the fields of an event, in bytes from its start."""

    kind: EventKind
    offsets: dict[str, int]  # by the names of the fields
    reasons: dict[int, str]  # why packets are dropped, by number
    ends: dict[tuple[int, int], End] = field(default_factory=dict)  # by location and reason number

    def decode(self, time_ns: int, page: bytes, start: int, processor: int) -> Event:
        """Return the event at `start`; raise struct.error or KeyError if it isn't whole."""
        offsets = self.offsets
        (skb,) = unpack_from("<Q", page, start + offsets["skbaddr"])
        if "name" not in offsets:  # events of freed packets have no interface
            return Event(time_ns, processor, self.kind, skb, end=self._decode_end(page, start))
        (size,) = unpack_from("<I", page, start + offsets["len"])
        # The kernel's __data_loc: offset of the name in the lower 16 bits, size in the upper ones.
        (offset_and_size,) = unpack_from("<I", page, start + offsets["name"])
        name_start = start + (offset_and_size & 0xFFFF)
        device = page[name_start : name_start + (offset_and_size >> 16)].rstrip(b"\0")
        return Event(time_ns, processor, self.kind, skb, device, size)

    def _decode_end(self, page: bytes, start: int) -> End:
        """Return how a packet was freed; old kernels don't trace the location or the reason."""
        location = reason = 0
        if "location" in self.offsets:
            (location,) = unpack_from("<Q", page, start + self.offsets["location"])
        if "reason" in self.offsets:
            (reason,) = unpack_from("<I", page, start + self.offsets["reason"])
        end = self.ends.get((location, reason))
        if end is None:
            end = End(self.kind, location, self.reasons.get(reason))
            self.ends[location, reason] = end
        return end


# In the kernel's `format` files: "field:unsigned int len;\toffset:16;" and { 6, "NETFILTER_DROP" }.
FORMAT_FIELD = re.compile(r"^\tfield:[^;\n]*\b(\w+)(?:\[\w*\])?;\toffset:(\d{1,5});", re.MULTILINE)
FORMAT_REASON = re.compile(r'\{ (\d{1,5}), "(\w{1,64})" \}')


def parse_formats(text: str) -> dict[int, EventFormat]:
    """Return the event formats in the kernel's `format` files, by event id."""
    kinds = {kind.value: kind for kind in EventKind}
    formats = {}
    for block in text.split("name: ")[1:]:
        kind = kinds.get(block.partition("\n")[0])
        event_id = re.search(r"^ID: (\d{1,5})$", block, re.MULTILINE)
        if kind and event_id:
            offsets = {name: int(offset) for name, offset in FORMAT_FIELD.findall(block)}
            reasons = {int(reason): name for reason, name in FORMAT_REASON.findall(block)}
            formats[int(event_id[1])] = EventFormat(kind, offsets, reasons)
    return formats


# The ring buffer's pages begin with a time (64 bits), the size of the records that follow (20 bits)
# and flags.  A record begins with its kind (5 bits) and the time since the record before (27 bits).
# Kinds 1 to 28 are events of so many words (32 bits); an event of kind 0 has its size, with that
# word, in the next word (the kernel's include/linux/ring_buffer.h).
PAGE = 4096
PAGE_HEADER = 16
RECORDS_SIZE = 0xFFFFF
LOST_BEFORE = 1 << 31  # flag: events were lost
LOST_COUNTED = 1 << 30  # flag: the number of these follows the records
PADDING = 29
TIME_EXTEND = 30
ABSOLUTE_TIME = 31


@dataclass
class TraceReader:
    """Reads the events of a trace, within bounds that a damaged or hostile one can't exceed."""

    formats: Mapping[int, EventFormat]
    clock_offset: int  # ns from the clock of the trace to the time of day
    bytes_left: int
    records_left: int
    lost: int = 0  # events that pages report as lost

    @property
    def exhausted(self) -> bool:
        """Return whether the trace is larger than the part of it that is read."""
        return self.bytes_left < 0 or self.records_left < 0

    def read(self, file: BinaryIO, processor: int) -> Iterator[Event]:
        """Yield the events in a processor's file, which are in order of time."""
        while not self.exhausted:
            page = file.read(PAGE)
            if len(page) < PAGE_HEADER:
                return
            self.bytes_left -= len(page)
            records = page_records(page)
            self.records_left -= len(records)
            self.lost += lost_before(page)
            for time_ns, start in records:
                try:
                    (event_id,) = unpack_from("<H", page, start)
                    decode = self.formats[event_id].decode
                    yield decode(time_ns + self.clock_offset, page, start, processor)
                except (KeyError, StructError):  # an event of another kind, or a damaged one
                    continue


def lost_before(page: bytes) -> int:
    """Return the number of events that the kernel lost before a page; 1 if that isn't stored."""
    (header,) = unpack_from("<Q", page, 8)
    if not header & LOST_BEFORE:
        return 0
    end = PAGE_HEADER + (header & RECORDS_SIZE)
    if not header & LOST_COUNTED or end + 8 > len(page):
        return 1
    events: int
    (events,) = unpack_from("<Q", page, end)
    return min(events, LARGEST_TRACE)  # on a damaged page, it may be anything


def page_records(page: bytes) -> list[tuple[int, int]]:
    """Return the time (ns) of each event on a page, and the offset of its data.

    The layout is that of the kernel's include/linux/ring_buffer.h.
    """
    time_ns, header = unpack_from("<QQ", page)
    # A record is read with the word that follows its first one: 8 bytes.
    last_start = min(PAGE_HEADER + (header & RECORDS_SIZE), len(page)) - 8
    records = []
    position = PAGE_HEADER
    while position <= last_start:
        head, word = unpack_from("<II", page, position)
        kind = head & 31
        delta = head >> 5
        if kind == ABSOLUTE_TIME:  # its lower 59 bits; the others don't change
            time_ns = time_ns >> 59 << 59 | word << 27 | delta
            position += 8
        elif kind == TIME_EXTEND:
            time_ns += word << 27 | delta
            position += 8
        elif kind == PADDING:
            if not delta:  # nothing more on this page
                break
            time_ns += delta
            position += 4 + word
        elif kind:  # an event of so many words
            time_ns += delta
            records.append((time_ns, position + 4))
            position += 4 + 4 * kind
        else:  # a longer event: `word` is its size, itself included
            time_ns += delta
            records.append((time_ns, position + 8))
            position += 4 + word
    return records


class PassageCollector:
    """Joins the events of both directions, in order of time, to the passages of packets."""

    def __init__(self, vif: str, pifs: Iterable[str]) -> None:
        self.passages: dict[Direction, list[Passage]] = {IN: [], OUT: []}
        self.devices: set[bytes] = set()  # names of interfaces with events
        self._vif = vif.encode()
        self._captured = {self._vif, *(pif.encode() for pif in pifs)}
        self._current: dict[int, Passage] = {}  # of packets that aren't freed, by skb
        self._previous: dict[int, int] = {}  # time of the last event of an interface, by processor

    def add(self, event: Event) -> None:
        """Add the next event."""
        if event.end:
            passage = self._current.pop(event.skb, None)
            if passage:
                passage.freed = event.time
                passage.end = event.end
            return
        self.devices.add(event.device)
        if event.kind is EventKind.RECEIVED:
            self._receive(event)
        elif event.kind is EventKind.QUEUED:
            self._queue(event)
        else:
            self._send(event)
        self._previous[event.processor] = event.time

    def _receive(self, event: Event) -> None:
        direction = IN
        if event.device == self._vif:
            direction = OUT
        previous = self._current.get(event.skb)
        passage = self._begin(event, direction)
        if previous and previous.sent and previous.direction is direction:
            # The packet wasn't freed after it had been sent, but was received again, perhaps by an
            # interface of this name in another network namespace.
            passage.continued = True
        passage.received = event.time
        passage.received_size = event.size

    def _queue(self, event: Event) -> None:
        direction = self._direction_to(event.device)
        passage = self._current.get(event.skb)
        if passage is None or passage.direction is not direction or passage.queued or passage.sent:
            # The passage of this skb, if any, is that of an earlier hop or of another packet.
            passage = self._begin(event, direction)
        passage.queued = event.time

    def _send(self, event: Event) -> None:
        direction = self._direction_to(event.device)
        passage = self._current.get(event.skb)
        if passage is None or passage.sent or passage.direction is not direction:
            return
        passage.sent = event.time
        passage.sent_size = event.size
        passage.earliest = max(event.time - LATEST, passage.received)
        if event.device in self._captured:  # else the capture is on an interface above this one
            # The processor traces nothing between the capture's stamp and this event, so that the
            # stamp is later than its previous event.
            previous = self._previous.get(event.processor, 0)
            passage.earliest = max(passage.earliest, passage.queued, previous)

    def _direction_to(self, device: bytes) -> Direction:
        """Return the direction of packets that leave by an interface."""
        if device == self._vif:
            return IN
        return OUT

    def _begin(self, event: Event, direction: Direction) -> Passage:
        passage = Passage(direction, event.processor)
        self._current[event.skb] = passage
        self.passages[direction].append(passage)
        return passage


@dataclass
class KernelTrace:
    """The content of the kernel's trace of a run, and the gaps in it."""

    passages: dict[Direction, list[Passage]]
    symbols: dict[int, str]  # names of the kernel's functions by the addresses in them
    devices: set[bytes]  # interfaces with events
    lost: int  # events for which the buffers had no room
    ended_early: bool  # as the files had reached their limit
    partly_read: bool  # as it is larger than LARGEST_TRACE or MOST_RECORDS
    clock_set: bool  # whether the time of day was changed during the run

    def locations(self) -> list[int]:
        """Return the known addresses in the kernel where packets were freed, in order."""
        ends = {
            passage.end.location
            for passages in self.passages.values()
            for passage in passages
            if passage.end
        }
        return sorted(ends - {0})


def read_trace(directory: str, vif: str, pifs: Iterable[str]) -> KernelTrace:
    """Read the trace in a run's directory, in which files may be missing."""
    offsets = _read_text(directory, "offset").split()  # at the start and at the end of the trace
    clock_offset = 0
    if offsets and re.fullmatch(r"\d{1,19}", offsets[0], re.ASCII):
        clock_offset = int(offsets[0])
    reader = TraceReader(
        formats=parse_formats(_read_text(directory, "formats")),
        clock_offset=clock_offset,
        bytes_left=LARGEST_TRACE,
        records_left=MOST_RECORDS,
    )
    collector = PassageCollector(vif, pifs)
    with ExitStack() as stack:
        streams = []
        for processor in range(MOST_PROCESSORS):
            file = _open_trace(directory, f"cpu{processor}")
            if file:
                streams.append(reader.read(stack.enter_context(file), processor))
        for event in merge(*streams, key=attrgetter("time")):
            collector.add(event)
    statistics = _read_text(directory, "stats")
    unrecorded = re.findall(r"(?:overrun|dropped events): (\d{1,12})", statistics)
    return KernelTrace(
        passages=collector.passages,
        symbols=parse_symbols(_read_text(directory, "symbols")),
        devices=collector.devices,
        lost=max(reader.lost, sum(map(int, unrecorded))),  # both may count the same events
        ended_early="full" in statistics.split(),
        partly_read=reader.exhausted,
        clock_set=len(set(offsets)) > 1,
    )


def open_regular(path: str) -> BinaryIO:
    """Open a regular file; raise OSError for another kind, such as a pipe, which would block."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(descriptor, "rb")


def _open_trace(directory: str, name: str) -> BinaryIO | None:
    """Open a file of the trace; return None if it can't be opened."""
    try:
        return open_regular(os.path.join(directory, f"trace-{name}"))
    except OSError:
        return None


def _read_text(directory: str, name: str) -> str:
    """Return a text file of the trace, up to LARGEST_TEXT; "" if it can't be opened."""
    file = _open_trace(directory, name)
    if file is None:
        return ""
    with file:
        return file.read(LARGEST_TEXT).decode(errors="replace")


def parse_symbols(text: str) -> dict[int, str]:
    """Return the names of functions by the addresses in them, from lines of "ADDRESS NAME"."""
    symbols = {}
    for line in text.splitlines():
        address, _, name = line.partition(" ")
        if re.fullmatch(r"[0-9a-f]{16}", address) and name:
            symbols[int(address, 16)] = name
    return symbols


# How packets of the captures and passages belong together.  A stamp comes before its event, and
# the stages of a packet follow each other.  Where several packets or passages fit, none is used.

LATEST = 10_000_000  # ns from a packet's stamp to its event
LONGEST_STAMP_ERROR = 100_000  # ns; or the packet's delay, if that is longer
NEAREST = 50  # candidates, at most, for a passage or for a packet
ETHERNET_HEADER = 14
VLAN_TAG = 4
SMALLEST_PAYLOAD = 46  # of Ethernet: shorter ones are padded
IPV6_HEADER = 40
# The kernel's functions in which netback frees what it has given to the guest.
DELIVERED = ("xenvif_rx_copy", "xenvif_rx_action", "xenvif_rx_skb", "xenvif_rx_next")
# A switch in userspace gets a copy of each packet; the kernel drops the original for this reason.
NOT_FOR_THE_HOST = "OTHERHOST"


class Attachment:
    """The passages of the packets of one direction, `arrived` and `lost`, by rank.

    A passage is free until it has the `stamp` of a packet.
    """

    def __init__(self, result: DirectionResult, trace: KernelTrace, unit_ns: int) -> None:
        """Attach the passages to packets; `unit_ns` is the resolution of the captures' stamps."""
        self._result = result
        self._symbols = trace.symbols
        self._events_lost = trace.lost > 0
        self._rounding = unit_ns - 1  # by so much a stamp may be too early
        self._passages = trace.passages[result.direction]
        self.arrived = self._attach_arrived()
        if not self._events_lost:  # else the only passage that fits may be another packet's
            self._attach_received()
        self._bound_stamps()
        self.lost = self._attach_lost()

    def _attach_arrived(self) -> dict[int, Passage]:
        """Return the passages of packets that arrived, by rank.

        The second point's capture takes its stamp just before the driver gets the packet.
        """
        sent_times = self._result.sent
        arrivals = sorted(
            (sent_times[rank] + delay, rank)
            for rank, delay in enumerate(self._result.delays)
            if delay != NO_DELAY
        )
        arrival_times = [time_ns for time_ns, _ in arrivals]
        attached: dict[int, Passage] = {}
        contested: set[int] = set()
        passages = [passage for passage in self._passages if passage.sent]
        for passage in sorted(passages, key=attrgetter("sent")):
            begin = bisect_left(arrival_times, passage.earliest - self._rounding)
            end = bisect(arrival_times, passage.sent)
            candidates = [
                rank
                for time_ns, rank in arrivals[max(begin, end - NEAREST) : end]
                if self._can_have_arrived(rank, time_ns, passage)
            ]
            unattached = [rank for rank in candidates if rank not in attached]
            if len(unattached) == 1:
                attached[unattached[0]] = passage
            elif unattached:
                contested.update(unattached)
            else:  # all that fit have a passage already, and this one may be theirs
                contested.update(candidates)
        for rank in contested:
            attached.pop(rank, None)
        self._drop_inversions(attached)
        for rank, passage in attached.items():
            passage.stamp = sent_times[rank]
        return attached

    def _drop_inversions(self, attached: dict[int, Passage]) -> None:
        """Remove packets that a processor would have received in another order than stamped."""
        sent_times = self._result.sent
        ranks = {passage: rank for rank, passage in attached.items()}
        last_ranks: dict[int, int] = {}  # by processor
        for passage in self._passages:
            if passage not in ranks or not passage.received:
                continue
            rank = ranks[passage]
            last_rank = last_ranks.get(passage.processor)
            if last_rank is not None and sent_times[last_rank] > sent_times[rank]:
                attached.pop(last_rank, None)  # it may have been removed already
                attached.pop(rank)
            last_ranks[passage.processor] = rank

    def _can_have_arrived(self, rank: int, arrival_time: int, passage: Passage) -> bool:
        """Return whether a passage can be that of a packet, by its time and its size."""
        first_event = passage.received or passage.queued  # the first is 0 if it wasn't traced
        if not self._result.sent[rank] <= first_event <= arrival_time + self._rounding:
            return False
        return self._has_size(rank, passage.sent_size, header_size=ETHERNET_HEADER)

    def _attach_received(self) -> None:
        """Add the time of reception to passages of packets that a switch in userspace copied.

        It receives the packet and queues a copy of it: two passages.  The original is the only
        free passage of the packet's size that was received between the packet's stamp and the
        queueing of the copy.  That is not certain if events were lost: don't call it then.
        """
        originals = self._free_passages(lambda passage: not passage.queued)
        ranks_by_original: defaultdict[Passage, list[int]] = defaultdict(list)
        for rank, copy in self.arrived.items():
            if not copy.received:
                candidates = self._candidates(originals, rank, latest=copy.queued)
                if len(candidates) == 1:
                    ranks_by_original[candidates[0]].append(rank)
        for original, ranks in ranks_by_original.items():
            if len(ranks) == 1:
                rank = ranks[0]
                self.arrived[rank].received = original.received
                original.stamp = self._result.sent[rank]  # no lost packet can have it any more

    def _candidates(self, passages: Sequence[Passage], rank: int, latest: int) -> list[Passage]:
        """Return the passages of a packet's size that were received from its stamp to `latest`.

        `passages` must be in order of reception.
        """
        received = attrgetter("received")
        begin = bisect_left(passages, self._result.sent[rank], key=received)
        end = min(bisect(passages, latest, key=received), begin + NEAREST)
        return [
            passage
            for passage in passages[begin:end]
            if self._has_size(rank, passage.received_size, header_size=0)
        ]

    def _bound_stamps(self) -> None:
        """Bound unknown stamps, since each processor receives packets in the order of stamps."""
        # A copy may have its original's time of reception, but only the original has the size.
        received = [passage for passage in self._passages if passage.received_size]
        stamps_before: dict[int, int] = {}  # by processor
        for passage in received:
            if passage.stamp:
                stamps_before[passage.processor] = passage.stamp
            passage.stamp_from = stamps_before.get(passage.processor, 0)
        stamps_after: dict[int, int] = {}  # by processor
        for passage in reversed(received):
            if passage.stamp:
                stamps_after[passage.processor] = passage.stamp
            passage.stamp_until = stamps_after.get(passage.processor, passage.received)

    def _attach_lost(self) -> dict[int, Passage]:
        """Return the passages of lost packets, by rank.

        If all passages that a packet may have end in the same place, it doesn't matter which it is.
        Those that end where mostly uncaptured packets do only count if there are no others.
        """
        candidates = self._candidates_of_lost()
        uncaptured_ends = self._uncaptured_ends(candidates)
        lost: dict[int, Passage] = {}
        for rank, passages in candidates.items():
            # Packets earlier in this loop may have taken some.
            free = [passage for passage in passages if not passage.stamp]
            likely = [passage for passage in free if passage.end not in uncaptured_ends]
            if not likely and not self._events_lost:  # all are known, so one is the packet's
                likely = free
            places = {(passage.lost_in, passage.end) for passage in likely}
            if len(places) == 1:
                lost[rank] = likely[0]
                likely[0].stamp = self._result.sent[rank]
        return lost

    def _candidates_of_lost(self) -> dict[int, list[Passage]]:
        """Return the passages that each lost packet may have."""
        drops = self._free_passages(self._is_loss)
        candidates: dict[int, list[Passage]] = {}
        for rank in self._result.ranks(PacketClass.LOST):
            sent = self._result.sent[rank]
            candidates[rank] = [
                passage
                for passage in self._candidates(drops, rank, latest=sent + LATEST)
                if passage.stamp_from <= sent <= passage.stamp_until
            ]
        return candidates

    def _uncaptured_ends(self, candidates: Mapping[int, Iterable[Passage]]) -> set[End | None]:
        """Return the ends that are mostly those of packets that weren't captured.

        `candidates` are the passages that each lost packet may have.
        """
        drops = self._free_passages(self._is_loss)
        possible = {passage for passages in candidates.values() for passage in passages}
        captured = Counter(passage.end for passage in possible)
        uncaptured = Counter(passage.end for passage in drops if passage not in possible)
        return {end for end, passages in uncaptured.items() if passages > captured[end]}

    def _free_passages(self, condition: Callable[[Passage], bool]) -> list[Passage]:
        """Return the free passages that begin at the first point and meet a condition, in order."""
        return [
            passage
            for passage in self._passages
            if passage.received
            and not passage.stamp
            and not passage.continued
            and condition(passage)
        ]

    def _is_loss(self, passage: Passage) -> bool:
        """Return whether a packet of this passage was dropped before the second point."""
        end = passage.end
        return (
            end is not None
            and end.kind is EventKind.DROPPED
            and not passage.sent
            and end.reason != NOT_FOR_THE_HOST
            and not self.is_delivery(end)
        )

    def is_delivery(self, end: End) -> bool:
        """Return whether the backend freed a packet because the guest had received it."""
        if end.kind is EventKind.CONSUMED:  # traced for taps only
            return True
        return self._symbols.get(end.location, "").startswith(DELIVERED)

    def _has_size(self, rank: int, size: int, header_size: int) -> bool:
        """Return whether an event's size can be that of a packet, which may be tagged or padded.

        `header_size` is the part of the event's size that comes before the IP header.
        """
        identity = self._result.identity(rank)
        ip_length = identity[2] << 8 | identity[3]
        length = header_size + ip_length
        version = identity[0] & ~NOT_FIRST
        if version == 6:  # its length field does not include the header
            length += IPV6_HEADER
        if size == length:
            return True
        padded = max(length, header_size + SMALLEST_PAYLOAD)
        return size in (length + VLAN_TAG, padded, padded + VLAN_TAG)


@dataclass
class PlaceOfLoss:
    """A place in the kernel where packets were lost."""

    stage: str
    where: str  # function of the kernel, or an address
    reason: str | None  # the kernel's, from Linux 5.17 on
    packets: int


@dataclass
class AfterVif:
    """The fates of the packets that passed the vif towards the guest."""

    delivered: int = 0
    dropped: int = 0
    stuck: int = 0  # neither delivered nor dropped during the run


@dataclass
class TraceAccount:
    """The kernel trace's account of the packets of one direction."""

    stages: dict[str, array[int]]  # ns by rank, or NOT_TRACED; by the names in STAGES
    stamp_errors: dict[str, list[int]]  # ns from the stamps of a point to their events
    losses: list[PlaceOfLoss] = field(default_factory=list)  # the most frequent ones first
    after_vif: AfterVif | None = None  # if it is known what takes packets from the vif
    unattached: int = 0  # packets of which neither all stages nor the place of loss are known

    def times(self, stage: str) -> list[int]:
        """Return the known times of a stage (ns)."""
        return [time_ns for time_ns in self.stages[stage] if time_ns != NOT_TRACED]

    def traced_packets(self) -> tuple[list[int], dict[str, list[int]]]:
        """Return the ranks of the packets with stages, and their times (ns) by stage.

        Stages without any known time are left out.  Of `to_guest`, unknown times are 0; so are
        times that would be negative because stamps are rounded.
        """
        ranks = [
            rank for rank, time_ns in enumerate(self.stages["forwarding"]) if time_ns != NOT_TRACED
        ]
        times = {
            name: [max(0, stage[rank]) for rank in ranks]
            for name, stage in self.stages.items()
            if self.times(name)
        }
        return ranks, times


def account_for(
    result: DirectionResult, trace: KernelTrace, backend: str, unit_ns: int
) -> TraceAccount:
    """Return the trace's account of the packets of one direction.

    `backend` is what takes them from the second point, "" if unknown; `unit_ns` is the resolution
    of the captures' stamps in ns.
    """
    attachment = Attachment(result, trace, unit_ns)
    account = TraceAccount(
        stages={name: array("q", [NOT_TRACED]) * len(result.sent) for name in STAGES},
        stamp_errors={result.direction.first: [], result.direction.second: []},
    )
    losses = Counter((passage.lost_in, passage.end) for passage in attachment.lost.values())
    if backend:
        account.after_vif = AfterVif()
    for rank in result.ranks(PacketClass.MATCHED):
        passage = attachment.arrived.get(rank)
        if passage is None:
            continue
        _add_stages(account, result, rank, passage)
        if account.after_vif is None:
            continue
        if passage.end is None:
            account.after_vif.stuck += 1
        elif attachment.is_delivery(passage.end):
            account.after_vif.delivered += 1
            account.stages["to_guest"][rank] = passage.freed - passage.sent
        else:
            account.after_vif.dropped += 1
            losses["to_guest", passage.end] += 1
    for (stage, end), packets in losses.most_common():
        if end:
            where = trace.symbols.get(end.location, hex(end.location))
            account.losses.append(PlaceOfLoss(stage, where, end.reason, packets))
    # Exactly the packets with all stages up to the driver have a stamp error at the first point.
    explained = len(account.stamp_errors[result.direction.first]) + len(attachment.lost)
    account.unattached = result.counts.timed + result.counts.lost - explained
    return account


def _add_stages(
    account: TraceAccount, result: DirectionResult, rank: int, passage: Passage
) -> None:
    """Add the stages that a passage shows of a packet that arrived, and the stamp errors."""
    first_stamp = result.sent[rank]
    delay = result.delays[rank]
    second_stamp = first_stamp + delay
    stamp_error = passage.sent - second_stamp
    if stamp_error > max(delay, LONGEST_STAMP_ERROR):  # the driver's event may be another packet's
        return
    account.stamp_errors[result.direction.second].append(stamp_error)
    if not passage.queued:
        return
    account.stages["queueing"][rank] = passage.sent - passage.queued
    if not passage.received:
        return
    account.stages["before_stack"][rank] = passage.received - first_stamp
    account.stages["forwarding"][rank] = passage.queued - passage.received
    account.stamp_errors[result.direction.first].append(passage.received - first_stamp)


def attach_stages(analysis: Analysis, trace: KernelTrace, info: RunInfo) -> None:
    """Add the kernel trace's account of the packets to the analysis of a run."""
    # The coarser capture limits how exactly stamps and events can be compared.
    unit_ns = max(PRECISIONS[counts["precision"]] for counts in analysis.counts.values())
    for result in analysis.results:
        backend = ""
        if result.direction is IN:  # the way out ends at the pif, which has no backend
            backend = info.backend or ""
        result.trace = account_for(result, trace, backend, unit_ns)
    analysis.warnings += trace_warnings(trace, analysis.results, info.vif, info.pif)


def trace_warnings(
    trace: KernelTrace, results: Sequence[DirectionResult], vif: str, pif: str
) -> list[str]:
    """Return warnings on gaps in the trace, and on packets without stages."""
    packets = sum(result.counts.timed + result.counts.lost for result in results)
    unattached = sum(result.trace.unattached for result in results if result.trace)
    causes = _limits_reached(trace)
    if not causes and unattached > packets / 100:  # a few don't fit in complete traces, either
        causes.append(_cause_of_no_fit(trace, vif, pif))
    warnings = []
    if causes:
        warnings.append(
            f"{unattached} of {counted(packets, 'packet')} have no known stages or place of loss: "
            f"{'; '.join(causes)}"
        )
    if trace.clock_set:
        warnings.append("the hypervisor's clock was set during the run, so the stages may be wrong")
    return warnings


def _limits_reached(trace: KernelTrace) -> list[str]:
    causes = []
    if trace.lost:
        causes.append(
            f"the kernel's trace lost {counted(trace.lost, 'event')}, since its buffers were full "
            "(send less, or free memory on the hypervisor)"
        )
    if trace.ended_early:
        causes.append(
            "the kernel's trace ended early, at its limit of 128 MiB or a quarter of the free disk "
            "space (measure for a shorter time, or send less)"
        )
    if trace.partly_read:
        causes.append(f"only the first {MOST_RECORDS} events of the kernel's trace were read")
    return causes


def _cause_of_no_fit(trace: KernelTrace, vif: str, pif: str) -> str:
    if not trace.devices:
        return "the kernel's trace is empty"
    if trace.devices == {vif.encode()}:
        return f"the kernel's trace has no events from {pif}"
    if vif.encode() not in trace.devices:
        return f"the kernel's trace has no events from {vif}"
    return (
        "no events match (is the switch in userspace?), or packets of equal length can't be told "
        "apart"
    )


def stages_warnings(account: TraceAccount) -> list[str]:
    """Return a warning on packets that the vif saw but the guest did not get."""
    if not account.after_vif or not account.after_vif.dropped:
        return []
    return [
        f"{account.after_vif.dropped} of the packets that reached the vif never reached the guest: "
        "it was too slow to accept packets, or accepted none"
    ]


def stages_report(account: TraceAccount) -> Report:
    """Return the part of a direction's report that comes from the kernel's trace."""
    stages = {}
    for name in STAGES:
        times = account.times(name)
        if times:
            stages[name] = {**asdict(delay_statistics(times)), "packets": len(times)}
    after_vif = None
    if account.after_vif:
        after_vif = asdict(account.after_vif)
    return {
        "stages": stages,
        "lost_at": [asdict(place) for place in account.losses],
        "after_vif": after_vif,
    }


def stamp_error_report(account: TraceAccount) -> dict[str, float | None]:
    """Return the median time from the stamps of each point to their events, in microseconds.

    It is None for a point without such times.
    """
    return {
        point: microseconds(percentile(sorted(errors), permille=500)) if errors else None
        for point, errors in account.stamp_errors.items()
    }


def main_loss(account: TraceAccount | None) -> str:
    """Return a note on where most packets were lost, or "" if the trace doesn't show it."""
    if not account or not account.losses:
        return ""
    loss = account.losses[0]
    place = loss.where
    if loss.reason:
        place += f" ({loss.reason})"
    return f" (kernel trace: {counted(loss.packets, 'packet')} lost in {place}, stage {loss.stage})"


def processing_times(guest_times: Mapping[int, int], account: TraceAccount | None) -> list[int]:
    """Return the times (ns) from a probe's delivery to the guest to its answer at the vif.

    `guest_times` are those from the probe at the vif to its answer there, by rank.  Probes whose
    delivery wasn't traced are left out.
    """
    if not account:
        return []
    to_guest = account.stages["to_guest"]
    return [
        guest_time - to_guest[rank]
        for rank, guest_time in guest_times.items()
        if to_guest[rank] != NOT_TRACED
    ]


# Where packets were lost, by the kernel's {name} for it, and what shows more.  They were on their
# way from the interface {first} to {second}.
FIREWALL_RULE = "the firewall ({name}): nft list ruleset, iptables -vL"
RULE_OF_ARRIVALS = "tc ({name}): tc -s filter show ingress dev {first}"
RULE_OF_DEPARTURES = "tc ({name}): tc -s filter show egress dev {second}"
FULL_QUEUE = "the queue ({name}): tc -s qdisc show dev {second}"
LOSS_ADVICE = {  # by the kernel's reason or function
    "NETFILTER_DROP": FIREWALL_RULE,
    "nft_do_chain": FIREWALL_RULE,
    "nf_hook_slow": FIREWALL_RULE,
    "TC_INGRESS": RULE_OF_ARRIVALS,
    "TC_EGRESS": RULE_OF_DEPARTURES,
    "QDISC_DROP": FULL_QUEUE,
    "QDISC_OVERLIMIT": FULL_QUEUE,
    "kfree_skb_list_reason": FULL_QUEUE,
    "NO_TX_TARGET": "the bridge ({name}): is the guest up, and its link?",
    "br_handle_frame_finish": "the bridge ({name}): bridge -d link",
    "xenvif_kthread_guest_rx": "netback ({name}): the guest is too slow",
}
NO_REASON = "NOT_SPECIFIED"  # in place of a reason that the kernel doesn't know
STAGE_BAR = 38  # columns that the bars of all stages share: the rest of 80 after the figures


def stage_lines(part: Report, fancy: bool) -> list[str]:
    """Return a table of the stages of a direction, or nothing if they are unknown."""
    stages = part.get("stages", {})
    if not stages:
        return []
    total = sum(stage["average"] for stage in stages.values()) or 1  # not 0: it is a divisor
    mark = "█" if fancy else "#"
    lines = [f"{'Stages':<14}{'median':>10}{'p99':>8}{'packets':>8}"]
    if "queueing" in stages:
        lines[0] += " (queueing ends after the vif's stamp)"
    for name, stage in stages.items():
        median = duration_text(stage["median"])
        p99 = duration_text(stage["percentiles"]["99"])
        bar = mark * round(STAGE_BAR * stage["average"] / total)
        lines.append(f" {name:<13}{median:>10}{p99:>8}{stage['packets']:>8}  {bar}".rstrip())
    return lines


def loss_lines(name: str, part: Report, info: RunInfo, most: int | None = None) -> list[str]:
    """Return lines on where packets were lost, and what happened behind the vif and in the guest.

    They begin with `name`.  At most `most` lines are on places of loss; if that is 2 or more, the
    last one sums up the rest.  None: each place has a line.
    """
    places = part.get("lost_at", [])
    shown = places[:most]
    others = []
    if most and 1 < most < len(places):
        shown = places[: most - 1]
        others = places[most - 1 :]
    texts = [_loss_text(loss, info, DIRECTIONS[name][0]) for loss in shown]  # never the guest's
    if others:
        packets = sum(loss["packets"] for loss in others)
        texts.append(f"{packets:>5} lost in {len(others)} other places")
    fates = part.get("after_vif")
    if fates:
        counts = ", ".join(f"{packets} {fate}" for fate, packets in fates.items())
        texts.append(f"behind the vif: {counts}")
    processing = part.get("own")
    if processing:  # of the guest only, whose `name` fills its column: a blank must follow
        median = duration_text(processing["median"])
        p99 = duration_text(processing["percentiles"]["99"])
        texts.append(f" without delivery to it: median {median}, p99 {p99}")
    return [f" {name:<4}{text}" for text in texts]


def _loss_text(loss: Report, info: RunInfo, direction: Direction) -> str:
    """Return how many packets of a direction were lost in a place, and why."""
    lost = f"{loss['packets']:>5} lost in"
    reason = loss["reason"]
    interfaces = {"pif": info.pif, "vif": info.vif}
    if "," in info.pif:  # the trace doesn't show which of them
        interfaces["pif"] = "PIF"
    first = interfaces[direction.first]
    second = interfaces[direction.second]
    for name in (reason, loss["where"]):
        if name in LOSS_ADVICE:
            return f"{lost} {LOSS_ADVICE[name].format(name=name, first=first, second=second)}"
    stage = loss["stage"]
    if reason and reason != NO_REASON:
        stage += f" ({reason})"
    function = loss["where"].partition(".")[0]  # without the compiler's suffixes
    return f"{lost} {stage}, at {function or 'an unknown place'}"


# ---- Remote shell ----------------------------------------------------------------------------
# Every remote command runs under WRAPPER, which is fed to `sh` on its standard input: login shells
# see only "exec sh", and process lists show no arguments. The rest of standard input is a lease, of
# one word a line: "alive" (which is answered), "mark" (send the command USR1), "stop" and "kill"
# (end the command) or "bye" (end everything).
#
# The command ends, and its private directory is removed, when the lease ends because the client
# died, when it is not renewed for IDLE seconds because the network failed, and once the command has
# run for LIMIT seconds. If all processes are killed at once, the next wrapper removes the
# directory. Only POSIX sh and coreutils are used: dom0s have no Python, and some no timeout(1).

WRAPPER = r"""
unset TMOUT  # bash's `read` would end after so many seconds
umask 077
LC_ALL=C; export LC_ALL
directory= job= lease= watchdog= detach= group= signalled=
command -v setsid >/dev/null 2>&1 && detach=setsid group=-

# With setsid the job leads a process group, which a "-" before its pid addresses. Without setsid,
# or until it has made the group, only the job gets the signal.
signal_job() { kill -s "$1" -- "$group$job" || kill -s "$1" "$job"; } 2>/dev/null

# Wait up to KILL seconds for the rest of the job's process group to end, then kill it.
end_group() {
  seconds=0
  while [ $seconds -lt "$KILL" ]; do
    signal_job 0 || return 0
    sleep 1
    seconds=$((seconds + 1))
  done
  signal_job KILL
}

finish() {
  trap '' HUP INT TERM PIPE
  trap - EXIT
  exec 2>/dev/null  # standard output stays open: its end shows the client that all is done
  # Wait only for a job that still gets signals: bash could wait for ever for one that it has seen
  # end. `wait` has no limit of time, so the job is killed from the background.
  if [ -n "$job" ] && signal_job TERM; then
    end_group 3<&- 4>&- >/dev/null &
    killer=$!
    wait "$job"
    kill -s KILL $killer
    end_group
  fi
  # A subshell that has only just started can lose any signal but KILL.
  for i in $lease $watchdog; do kill -s KILL $i; done
  [ -z "$directory" ] || rm -rf "$directory"
}

# Succeed if all users may enter a directory of this absolute path. The TMPDIR that root has under
# sudo can be closed to the user, who has to fetch the files.
open_to_all() {
  path=$1
  case $path in ""|/*) ;; *) return 1 ;; esac
  while [ -n "$path" ]; do
    case `ls -ldL "$path"` in  # the last letter of drwxr-xr-x is x or t if others may enter
      d????????[xt]*) path=${path%/*} ;;
      *) return 1 ;;
    esac
  done
} 2>/dev/null

# Remove the directories of earlier wrappers of this user that were killed with all processes.
# Others can use such names in /tmp as well: both the pid and the directory, which is no link, must
# be this user's. Under sudo the first is root's and the second is the user's, see make_directory.
remove_stale() {
  for stale in "${directory%/*}"/netweaver.??????????; do
    [ -f "$stale/pid" ] && [ -O "$stale/pid" ] && [ "$stale" != "$directory" ] || continue
    [ -n "`find "$stale" -prune -type d -user "${SUDO_UID:-$(id -u)}"`" ] || continue
    pid=
    read -r pid <"$stale/pid"
    is_in_use "$stale" "$pid" || rm -rf "$stale"
  done
} 2>/dev/null

# Succeed if the wrapper with the pid $2 still runs in the directory $1; another process may have
# got that pid since. Without a pid (not yet written?) assume for a day that it runs.
is_in_use() {
  case $2 in ''|*[!0-9]*) [ -z "`find "$1" -prune -mtime +0`" ]; return ;; esac
  kill -s 0 "$2" || return
  [ -e "/proc/$2/cwd" ] || return 0  # it can't be known: assume that it does
  [ "/proc/$2/cwd" -ef "$1" ]
  [ $? != 1 ]  # 1: it runs elsewhere, 2: this shell has no -ef
}

make_directory() {
  directory=`mktemp -d "${TMPDIR:-/tmp}/netweaver.XXXXXXXXXX"` && cd "$directory" &&
    directory=`pwd -P` && echo $$ >pid && : >running || exit 70  # EX_SOFTWARE
  if [ -n "$SUDO_UID" ]; then  # SFTP reads the files with the rights of the user, not of root
    chown "$SUDO_UID" "$directory"
    umask 022
  fi
  remove_stale
}

# Succeed if the command has ended, and its directory is still needed.
has_ended() { [ -n "$directory" ] && [ ! -e "$directory/running" ]; }

# End the wrapper after LIMIT seconds, or IDLE seconds after the last "alive" of the lease. Once the
# command has ended, only the lease counts: fetching large files can take long.
watch() {
  trap 'idle=0' USR1
  seconds=0 idle=0
  while [ $idle -lt "$IDLE" ] && { [ $seconds -lt "$LIMIT" ] || has_ended; }; do
    sleep 1
    seconds=$((seconds + 1)) idle=$((idle + 1))
    kill -s 0 $$ || break
  done
  kill -s TERM $$
  seconds=0
  while kill -s 0 $$; do
    sleep 1
    seconds=$((seconds + 1))
    # `finish` takes at most KILL seconds twice, unless the wrapper is stopped (SIGSTOP).
    if [ $seconds -gt $((2 * KILL + 2)) ]; then
      kill -s KILL $$
      break
    fi
  done
  # Reached only if the wrapper was killed, since `finish` ends this watchdog.
  signal_job KILL
  rm -rf "$directory"
}

# The answer to "alive" is one line: bash writes each line by itself, and a reader could take one
# of several for the command's.
read_lease() {
  while read -r line; do
    case $line in
      alive) kill -s USR1 $watchdog; printf '%s alive\n' "$TOKEN" >&4 ;;
      mark) kill -s USR1 "$job" ;;
      stop) signal_job TERM ;;
      kill) signal_job KILL ;;
      bye) break ;;
    esac
  done
  kill -s TERM $$ || { signal_job KILL; rm -rf "$directory"; }  # || the wrapper was killed
}

main() {
  # 3 is the lease, and 4 standard output, for the answers to "alive". Standard input can be moved
  # only here, at the end of the script, since shells read their script bit by bit.
  exec 3<&0 </dev/null 4>&1
  trap finish EXIT
  trap 'signalled=1' HUP INT TERM PIPE
  [ -z "$SUDO_UID" ] || open_to_all "$TMPDIR" || { TMPDIR=/tmp; export TMPDIR; }
  [ -z "$PRIVATE" ] || make_directory
  printf '\n%s begin %s\n' "$TOKEN" "${directory:--}"
  $detach sh -c "$COMMAND" 3<&- 4>&- &
  job=$!
  watch 3<&- 4>&- >/dev/null 2>&1 &
  watchdog=$!
  read_lease <&3 >/dev/null 2>&1 &
  lease=$!
  # `finish` can end the children only from here on, where all their pids are known.
  trap 'exit 143' HUP INT TERM PIPE  # 128 + SIGTERM
  [ -z "$signalled" ] || exit 143
  wait "$job"
  status=$?
  end_group
  job=  # nothing remains for `finish` to end
  [ -z "$directory" ] || rm -f "$directory/running"
  printf '\n%s end %s\n' "$TOKEN" "$status"
  printf '\n%s end %s\n' "$TOKEN" "$status" >&2
  [ -z "$directory" ] || wait "$lease"  # the client fetches the files, then says "bye"
  exit 0
}
main
"""

# Several captures in one session, since sshd counts sessions (MaxSessions). Each writes a file of
# its own; the lines that it prints on standard error, and its end, come with its number. All of
# them end upon one TERM. Upon USR1 the time is printed: by the command rather than by the wrapper,
# so that a `date` that hangs is ended with it.
CAPTURES = r"""
capture() {
  mkfifo "$1.err"
  (trap '' TERM  # to pass on what the capture prints while it ends
   while IFS= read -r line; do printf '%s %s\n' "$1" "$line"; done) <"$1.err" >&2 &
  run_capture "$1" "$2" 2>"$1.err" &
  all="$all $!"
}
run_capture() {
  trap 'kill -s TERM $pid 2>/dev/null' TERM
  pid=
  sh -c "$2" >"$1.pcap" &
  pid=$!
  # A signal cuts a wait short, and its status is then that of the signal. If the command has ended
  # meanwhile, its own status comes from one more wait; 127 means that the last wait had it already.
  until wait $pid; status=$?; ! kill -s 0 $pid 2>/dev/null; do :; done
  wait $pid 2>/dev/null
  last=$?
  [ $last = 127 ] || status=$last
  echo "exit $status" >&2
}
all=
trap 'kill -s TERM $all 2>/dev/null' TERM
trap 'date +%s%N' USR1
"""

CONNECT_ATTEMPTS = 5  # a busy sshd drops new connections
# Run `sh` as root. sudo can read more than its command does, and so lose some of the script: it is
# tried without input. If it fails, a line is read before the end, as the script is on its way, and
# data that cross with the closing of a channel make sshd end the whole connection.
SUDO_SHELL = (
    """exec sh -c 'if [ "$(id -u)" = 0 ]; then exec sh; """
    "elif sudo -n sh </dev/null; then exec sudo -n sh; else read line; exit 1; fi'"
)
LARGEST_OUTPUT = 8 << 20  # bytes of a command's output; `ip` prints 1.5 KB for an interface
LARGEST_ANSWER = 1 << 20  # bytes of a command's errors, of ssh-agent, or of a file of ssh
SFTP_BLOCK = 32768  # bytes that every SFTP server can send at once (draft-ietf-secsh-filexfer, 3)


class Channel(Protocol):
    """A shell's streams on a host, with the names that paramiko's Channel has for them.

    `fileno` is readable when there is something to receive, or the shell's output has ended.
    """

    @property
    def closed(self) -> bool: ...
    @property
    def eof_received(self) -> bool | int: ...
    def fileno(self) -> int: ...
    def sendall(self, data: bytes, /) -> None: ...
    def recv_ready(self) -> bool: ...
    def recv(self, size: int, /) -> bytes: ...
    def recv_stderr_ready(self) -> bool: ...
    def recv_stderr(self, size: int, /) -> bytes: ...
    def close(self) -> None: ...


class FileSource(Protocol):
    """A session in which files of a host are read."""

    def read(self, path: str, largest: int) -> Iterator[bytes]:
        """Yield a file's blocks; raise CaptureError if unreadable or over `largest` bytes."""

    def close(self) -> None: ...


class Connection(Protocol):
    """A connection to a host, whose sessions run shells and read files."""

    @property
    def name(self) -> str:
        """The name of the host in messages and in the report."""

    @property
    def address(self) -> str:
        """The IP address under which the host was reached; "" behind a jump."""

    def is_active(self) -> bool: ...

    def error(self) -> str:
        """Return why the connection was lost, or "" if that isn't known."""

    def start_shell(self, command: str, script: str) -> Channel:
        """Start a command in a session of its own, and send it a script.

        Raises HostConnectionError if there can't be another session.
        """

    def open_files(self) -> FileSource:
        """Open the session in which files are read; raise CaptureError if the host has none."""

    def give_up(self, reason: str) -> None:
        """Close the connection even if calls wait for it; `error` then returns the reason."""

    def close(self) -> None: ...


class Job:
    """A command that runs on a host under WRAPPER.

    `ended` is set when the command has ended there or the connection is lost, `flooded` when its
    output was too long. `changed` is notified of every change.
    """

    def __init__(
        self, connection: Connection, channel: Channel, token: str, changed: threading.Condition
    ) -> None:
        self.name = connection.name
        self.ended = False
        self.stopped = False
        self.flooded = False
        self._connection = connection
        self._channel = channel
        self._token = token.encode()
        self._changed = changed
        self._output = bytearray()
        self._errors = bytearray()
        self._sending = threading.Lock()
        self._is_leaving = False
        self._poller = select.poll()
        self._poller.register(channel.fileno(), select.POLLIN)
        self._finished = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        threading.Thread(target=self._renew, daemon=True).start()

    def _message(self, word: bytes) -> str:
        """Return what follows a word in the wrapper's message, or "" if it hasn't come."""
        match = re.search(rb"\n%b %b ([^\n]*)\n" % (self._token, word), self._output)
        return match[1].decode(errors="replace") if match else ""

    @property
    def has_all_errors(self) -> bool:
        """Return whether standard error has ended; never if the account's shell redirects it."""
        return b"\n%b end " % self._token in self._errors

    @property
    def directory(self) -> str:
        """The job's private directory; "-" if it has none, and "" before it has begun."""
        return self._message(b"begin")

    @property
    def status(self) -> int | None:
        """The command's exit status; None if its end wasn't reported (yet)."""
        status = self._message(b"end")
        return int(status) if is_number(status) else None

    @property
    def output(self) -> str:
        """The command's standard output so far, without the greetings of login shells."""
        _, _, after_begin = self._output.partition(b"\n%b begin " % self._token)
        _, _, output = after_begin.partition(b"\n")
        return output.partition(b"\n%b end " % self._token)[0].decode(errors="replace")

    @property
    def greeting(self) -> str:
        """The text that a login shell prints before the command."""
        return self._output.partition(self._token)[0].decode(errors="replace")

    @property
    def errors(self) -> str:
        """The last LARGEST_ANSWER bytes of the command's standard error, at most."""
        return self._errors.partition(b"\n%b end " % self._token)[0].decode(errors="replace")

    @property
    def has_left(self) -> bool:
        """Return whether the job has ended on the host, files and all, or its connection has."""
        return self._finished.is_set()

    def time(self) -> str:
        """Return the host's time, as its `date +%s%N` prints it; "" if it doesn't answer.

        Only the script CAPTURES answers.
        """
        earlier_lines = self.output.count("\n")
        self.say("mark")
        with self._changed:
            self._changed.wait_for(
                lambda: self.ended or self.output.count("\n") > earlier_lines, ANSWER_SECONDS
            )
        new_lines = self.output.split("\n")[earlier_lines:-1]  # the last one isn't complete
        return new_lines[0] if new_lines else ""

    def say(self, word: str) -> None:
        """Send a word of the lease, unless the host is about to close the channel.

        Data that cross with the closing of a channel make sshd end the whole connection. A failure
        is ignored, since a lost connection has ended the lease by itself.
        """
        with self._sending:
            # With a private directory the wrapper waits for "bye", else it ends with its command.
            waits_for_bye = self.directory not in ("", "-")
            is_closing = not waits_for_bye and (self.ended or self.has_all_errors)
            if not self._is_leaving and not is_closing:
                self._is_leaving = word == "bye"
                quietly(self._channel.sendall, word.encode() + b"\n")

    def stop(self) -> None:
        """Ask the command to end; its files stay until `leave`."""
        self.stopped = True
        self.say("stop")

    def kill(self) -> None:
        """End a command that doesn't end when it is asked to; its files stay until `leave`."""
        self.say("kill")

    def wait(self, seconds: float) -> bool:
        """Wait for the command's end, and return whether it came in so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self.ended, seconds)

    def leave(self, seconds: float = ANSWER_SECONDS) -> None:
        """End the job on the host with all its files; wait for that so many seconds at most."""
        self.say("bye")
        self._reader.join(seconds)
        quietly(self._channel.close)

    def _renew(self) -> None:
        """Renew the lease until the job has left the host."""
        while not self._finished.wait(HEARTBEAT_SECONDS):
            self.say("alive")

    def _read(self) -> None:
        """Read both streams until they end, or the host has been silent for too long."""
        try:
            self._read_streams()
        finally:
            with self._changed:
                self.ended = True
                self._finished.set()
                self._changed.notify_all()
            quietly(self._channel.close)

    def _read_streams(self) -> None:
        # The wrapper answers each "alive": silence means that the host can't be reached.
        last_heard = time.monotonic()
        at_end = False
        while not at_end:
            silence = time.monotonic() - last_heard
            self._poller.poll(1000 * max(0.0, IDLE_SECONDS - silence))
            # Look for the end before receiving, so that the last data are not missed.
            at_end = bool(self._channel.closed or self._channel.eof_received)
            if self._receive():
                last_heard = time.monotonic()
            elif time.monotonic() - last_heard >= IDLE_SECONDS:
                self._connection.give_up(f"no answer for {IDLE_SECONDS} s")
                at_end = True

    def _receive(self) -> bool:
        """Receive the data available on both streams; return whether there were any."""
        received = False
        while self._channel.recv_ready():
            self._store(self._output, self._channel.recv(65536))
            received = True
        while self._channel.recv_stderr_ready():
            self._store(self._errors, self._channel.recv_stderr(65536))
            received = True
        return received

    def _store(self, stream: bytearray, data: bytes) -> None:
        """Append data to a stream, and note whether the command has ended or printed too much."""
        with self._changed:
            stream += data
            # The answers to "alive" are no output of the command.
            self._output[:] = self._output.replace(b"%b alive\n" % self._token, b"")
            # Of standard error only the end is needed; too much standard output ends the job.
            del self._errors[:-LARGEST_ANSWER]
            if len(self._output) > LARGEST_OUTPUT:
                self.flooded = True
            # The command has ended when both streams report it: they can come in any order.
            if self.has_all_errors and self.status is not None:
                self.ended = True
            self._changed.notify_all()
        if self.flooded:
            # After "bye", `say` sends nothing more that could cross with the channel's closing.
            self.say("bye")
            quietly(self._channel.close)


def quietly(call: Callable[..., object], *arguments: object) -> None:
    """Call something that may fail because a connection is lost, which is reported elsewhere."""
    with suppress(Exception):  # paramiko raises many kinds of them
        call(*arguments)


def last_line(text: str) -> str:
    """Return the last line of a text that isn't blank, for an error message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def is_number(text: str) -> bool:
    """Return whether a host's answer is a decimal number, of nine digits at most."""
    return re.fullmatch(r"\d{1,9}", text, re.ASCII) is not None


def short_name(command: str) -> str:
    """Return the first simple command of a script, to name the script in an error message."""
    first_command = re.split(r"[|;\n]", command)[0].strip("{ ")
    if not first_command or not first_command.isprintable() or len(first_command) > 80:
        return "a look-up"
    return first_command


def sudo_hint(errors: str) -> str:
    """Return what to do about an error that sudo printed, or "" if it has printed none."""
    if "sudo" not in errors:
        return ""
    if "tty" in errors:
        return " (--sudo requires 'Defaults:USER !requiretty' in that host's sudoers)"
    return " (--sudo requires a NOPASSWD rule in that host's sudoers)"


class Host:
    """A host that is logged in to: runs commands under WRAPPER, and fetches files.

    `changed` is notified of every change of its jobs; `log` is called with each command.
    """

    def __init__(
        self,
        connection: Connection,
        changed: threading.Condition,
        log: Callable[[str], None],
        sudo: bool,
    ) -> None:
        self.name = connection.name
        self._connection = connection
        self._changed = changed
        self._log = log
        self.sudo = sudo  # whether commands run as root by sudo
        self._shell = SUDO_SHELL if sudo else "exec sh"
        self._jobs: list[Job] = []

    @property
    def address(self) -> str:
        """The IP address under which the host was reached; "" behind a jump."""
        return self._connection.address

    def check(self) -> None:
        """Raise HostConnectionError if the connection is lost."""
        if not self._connection.is_active():
            message = f"the connection to {self.name} is lost"
            if reason := self._connection.error():
                message += f": {reason}"
            raise HostConnectionError(message)

    def start(
        self, command: str, seconds: float, *, private: bool = False, shown: Iterable[str] = ()
    ) -> Job:
        """Start a shell command that is ended after so many seconds at the latest.

        With `private` it runs in a directory of its own, which stays until `Job.leave`. The log
        shows the lines of `shown`, or the command if there are none.
        """
        for line in shown or [command]:
            self._log(f"{self.name}: {line}")
        job = self._start(command, seconds, private)
        with self._changed:
            self._jobs = [earlier for earlier in self._jobs if not earlier.has_left]
            self._jobs.append(job)
        return job

    def _start(self, command: str, seconds: float, private: bool) -> Job:
        self.check()
        token = f"netweaver-{os.urandom(12).hex()}"
        variables = {
            "TOKEN": token,
            "COMMAND": command,
            "PRIVATE": "yes" if private else "",
            "LIMIT": str(int(seconds) + 1),
            "IDLE": str(IDLE_SECONDS),
            "KILL": str(KILL_SECONDS),
        }
        assignments = [f"{name}={quote(value)}\n" for name, value in variables.items()]
        script = "".join(assignments) + WRAPPER

        def begin() -> Job:
            channel = self._connection.start_shell(self._shell, script)
            return Job(self._connection, channel, token, self._changed)

        return self._open_in_time(begin)

    def _open_in_time(self, call: Callable[[], T]) -> T:
        """Return the result of a call that opens a session, whose time paramiko doesn't limit.

        Raises HostConnectionError after CONNECT_SECONDS, or if there are too few resources.
        """
        try:
            results: list[T] = in_parallel(call, seconds=CONNECT_SECONDS)
        except NoAnswerError:
            self._connection.give_up(f"no answer for {CONNECT_SECONDS} s")
            self.check()  # raises the error with this reason, except on this machine
            raise
        except (OSError, RuntimeError) as error:  # as for too many open files, or threads
            raise HostConnectionError(f"{self.name}: can't start a session: {error}") from error
        return results[0]

    def check_job(self, job: Job) -> None:
        """Raise HostConnectionError if a job ended because its connection or its shell did.

        Raises it as well if the account can't run commands, unless standard error says why.
        """
        if not job.ended or job.status is not None or job.flooded:
            return
        self.check()
        if job.directory:
            raise HostConnectionError(
                f"the connection to {self.name} is lost (or its shell there was killed)"
            )
        if not job.errors.strip():
            raise HostConnectionError(
                f"{self.name}: the account can't run commands (a forced command, or a login shell "
                f"such as nologin): {last_line(job.greeting)}"
            )

    def run(self, command: str, seconds: float = ANSWER_SECONDS, name: str = "") -> Job:
        """Run a shell command to its end, and return it; `name` is what to call it in errors.

        Raises RemoteCommandError if it doesn't end by itself in so many seconds.
        """
        self._log(f"{self.name}: {command}")
        job = self._start(command, seconds, private=False)
        job.wait(seconds)
        if job.status is None:
            self.check_job(job)
            reason = self._failure(job)
            job.leave(0)
            raise RemoteCommandError(f"{self.name}: {name or short_name(command)}: {reason}")
        return job

    def _failure(self, job: Job) -> str:
        if not job.ended:
            return "timed out"
        if job.flooded:
            return f"its output is larger than {LARGEST_OUTPUT} bytes"
        return f"could not be run: {last_line(job.errors)}{sudo_hint(job.errors)}"

    def open_files(self) -> FileSource:
        """Open the session in which files are fetched; raise CaptureError if the host has none."""
        self.check()
        try:
            return self._open_in_time(self._connection.open_files)
        except CaptureError:
            self.check()  # report a lost connection as such, not as a fault of SFTP
            raise

    def fetch(self, files: FileSource, path: str, local: str, largest: int) -> None:
        """Copy the file `path` of the host to the file `local` of this machine.

        Raises CaptureError if it has more than `largest` bytes, or can't be copied whole.
        """
        try:
            with open(local, "wb") as file:
                for block in files.read(path, largest):
                    file.write(block)
        except OSError as error:
            raise CaptureError(f"can't write {local} on this machine: {error.strerror}") from error

    def leave(self) -> None:
        """End all jobs that `start` has started, and remove their files from the host."""
        in_parallel(*(job.leave for job in self._jobs))

    def close(self) -> None:
        self._connection.close()


class SftpFiles:
    """A session in which files of a host are read by SFTP; its answers are not trusted.

    paramiko's client gets this object for its channel: `get_name`, `send`, `recv` and `close` are
    all that it calls. `recv` bounds the size of all answers, and the time that each takes.
    """

    def __init__(self, connection: Connection, channel: paramiko.Channel) -> None:
        from paramiko import SFTPClient

        self._connection = connection
        self._channel = channel
        self._deadline = time.monotonic() + CONNECT_SECONDS
        self._bytes_allowed = LARGEST_ANSWER  # which the server may still send
        self._client = SFTPClient(cast("paramiko.Channel", self))

    def get_name(self) -> str:
        return self._channel.get_name()

    def send(self, data: bytes) -> int:
        return self._channel.send(data)

    def recv(self, size: int) -> bytes:
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        self._channel.settimeout(seconds)
        data = self._channel.recv(size)
        self._bytes_allowed -= len(data)
        if self._bytes_allowed < 0:
            raise EOFError("the server sent more data than the file has")
        return data

    def close(self) -> None:
        quietly(self._channel.close)

    def read(self, path: str, largest: int) -> Iterator[bytes]:
        """Yield the blocks of a file.

        Raises CaptureError if it can't be read or has more than `largest` bytes,
        HostConnectionError if the server doesn't answer.
        """
        name = self._connection.name
        try:
            yield from self._blocks(path, largest)
        except TimeoutError as error:
            self._connection.give_up(f"no answer for {CONNECT_SECONDS} s")
            raise HostConnectionError(
                f"the connection to {name} is lost: no answer for {CONNECT_SECONDS} s"
            ) from error
        except CaptureError as error:
            raise CaptureError(f"{name}: {error}") from error
        except Exception as error:  # a strange answer can make paramiko raise anything
            if not self._connection.is_active():
                raise HostConnectionError(f"the connection to {name} is lost") from error
            reason = str(error) or "the transfer was cut off"
            raise CaptureError(f"{name}: can't fetch {path}: {reason}") from error

    def _blocks(self, path: str, largest: int) -> Iterator[bytes]:
        """Yield the blocks of a file, as `read` does; let paramiko's own errors pass."""
        self._deadline = time.monotonic() + CONNECT_SECONDS
        with self._client.open(path, "rb") as file:
            missing = file.stat().st_size or 0
            if missing > largest:
                raise CaptureError(f"{path} is larger than its limit of {largest} bytes")
            self._bytes_allowed = 2 * missing + LARGEST_ANSWER  # ample for what SFTP adds
            file.prefetch(missing)
            while missing > 0:
                self._deadline = time.monotonic() + CONNECT_SECONDS
                block = file.read(min(missing, SFTP_BLOCK))
                if not block:
                    raise EOFError(f"{counted(missing, 'byte is', 'bytes are')} missing")
                missing -= len(block)
                yield block


def in_parallel(*calls: Callable[[], object], seconds: float | None = None) -> list[Any]:
    """Make calls in threads of their own, and return their results in the order of the calls.

    Raises the first error once all have ended, or so many seconds have passed (None: no limit);
    NoAnswerError if some had not ended then, and none had failed.
    """
    # `join` refuses more than TIMEOUT_MAX seconds.
    deadline = time.monotonic() + (seconds or threading.TIMEOUT_MAX / 2)
    results: dict[int, object] = {}
    errors: list[BaseException] = []

    def run(index: int, call: Callable[[], object]) -> None:
        try:
            results[index] = call()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(index, call), daemon=True)
        for index, call in enumerate(calls)
    ]
    try:
        for thread in threads:
            thread.start()
        join_all(threads, deadline)
    except KeyboardInterrupt:
        join_all(threads, time.monotonic() + GRACE_SECONDS)
        raise
    if errors:
        raise errors[0]
    if len(results) < len(calls):
        raise NoAnswerError(
            f"--hv or a source did not answer within {seconds} s: "
            "check addresses, name resolution and network"
        )
    return [results[index] for index in range(len(calls))]


def join_all(threads: Iterable[threading.Thread], deadline: float) -> None:
    """Wait for the ends of threads until a deadline on the clock of time.monotonic."""
    for thread in threads:
        if thread.is_alive():  # `join` refuses a thread that was never started
            thread.join(max(0, deadline - time.monotonic()))


# ---- Login -----------------------------------------------------------------------------------
# OpenSSH's own programs answer what OpenSSH would do: `ssh -G` resolves its configuration,
# `ssh-keygen -F` finds lines in known_hosts, and `ssh -W` connects through a jump.  paramiko
# carries the connection.  An option that restricts logins is honoured, or the login is refused.

CERTIFICATE = "-cert-v01@openssh.com"  # ends a certificate's kind, and the algorithms' names
# The number of strings that follow the kind in the encoding of a public key, by kind.
PUBLIC_KEY_STRINGS = {
    "ssh-ed25519": 1,
    "ssh-rsa": 2,
    "ssh-dss": 4,
    "ecdsa-sha2-nistp256": 2,
    "ecdsa-sha2-nistp384": 2,
    "ecdsa-sha2-nistp521": 2,
    "sk-ssh-ed25519@openssh.com": 2,
    "sk-ecdsa-sha2-nistp256@openssh.com": 3,
}
# paramiko's classes, by the kind of a key in OpenSSH's format, or by XX in the older format's first
# line, "BEGIN XX PRIVATE KEY".
PRIVATE_KEY_CLASSES = {
    "ssh-ed25519": "Ed25519Key",
    "ssh-rsa": "RSAKey",
    "RSA": "RSAKey",
    "ecdsa-sha2-nistp256": "ECDSAKey",
    "ecdsa-sha2-nistp384": "ECDSAKey",
    "ecdsa-sha2-nistp521": "ECDSAKey",
    "EC": "ECDSAKey",
}
PRIVATE_KEY_CIPHERS = ("none", "aes256-ctr", "aes256-cbc")  # that paramiko can read
RSA_SIGNATURES = ("rsa-sha2-512", "rsa-sha2-256", "ssh-rsa")  # in the order of preference
USE_AGENT = "load it into ssh-agent (ssh-add), and use it without -k"
OLD_SERVER_ADVICE = (
    "is an RSA key, and this old server supports SHA-1 only: use "
    "-o PubkeyAcceptedAlgorithms=+ssh-rsa with pip install 'paramiko<5', or, from OpenSSH 6.5 on, "
    "an ed25519 key"
)
# What to do about keys that paramiko can't read, by kind or XX as above; XX is "" for PKCS#8.
KEY_ADVICE = {
    "": "it is in PKCS#8 format: convert it with ssh-keygen -p -f FILE",
    "ENCRYPTED": "it is in PKCS#8 format: convert it with ssh-keygen -p -f FILE",
    "PuTTY": "it is in PuTTY's format: convert it with puttygen FILE -O private-openssh -o NEWFILE",
    "DSA": "DSA keys are not supported: use an ed25519 key",
    "ssh-dss": "DSA keys are not supported: use an ed25519 key",
    "sk-ssh-ed25519@openssh.com": f"it is a security key: {USE_AGENT}",
    "sk-ecdsa-sha2-nistp256@openssh.com": f"it is a security key: {USE_AGENT}",
}
SYSTEM_DIRECTORY = "/etc/ssh"
VENDOR_DIRECTORY = "/usr/etc/ssh"  # of openSUSE, for an ssh_config that isn't in /etc/ssh
# Options that restrict algorithms, and paramiko's names for them.
ALGORITHM_OPTIONS = {
    "KexAlgorithms": "kex",
    "HostKeyAlgorithms": "key_types",
    "Ciphers": "ciphers",
    "MACs": "digests",
}
# Options that paramiko can't honour, unless they have one of these values.
UNSUPPORTED_OPTIONS = {
    "bindinterface": ("", "none"),
    "knownhostscommand": ("", "none"),
    "preferredauthentications": ("", "publickey"),
    "proxyusefdpass": ("", "no"),
    "pubkeyauthentication": ("", "yes", "true", "unbound"),
    "refuseconnection": ("", "none"),
    "remotecommand": ("", "none"),
    "revokedhostkeys": ("", "none"),
    "sessiontype": ("", "default"),
}
# Algorithms that paramiko has before version 5 only.
OUTDATED_ALGORITHMS = (
    "ssh-rsa",
    "diffie-hellman-group14-sha1",
    "diffie-hellman-group-exchange-sha1",
    "diffie-hellman-group1-sha1",
)
# paramiko knows this algorithm by its older name only.
OLDER_NAMES = {"curve25519-sha256": "curve25519-sha256@libssh.org"}
AGENT_SIGNATURE_FLAGS = {"rsa-sha2-256": 2, "rsa-sha2-512": 4}  # SSH_AGENT_RSA_SHA2_...
AGENT_KEY = "a key of ssh-agent"  # in messages
AGENT_SIGN_SECONDS = 60  # a person may have to confirm, or to touch a security key


class Target:
    """A user and a host to log in to, given as `[user@]host[:port]`.

    An IPv6 address with a port stands in brackets.  `user` and `port` are None where the text
    does not name them.  "local" is this machine, without SSH.  Raises UsageError if the text is
    not of that form.
    """

    def __init__(self, text: str) -> None:
        user, at_sign, address = text.rpartition("@")
        self.user = user if at_sign else None
        self.host, port = split_address(address)
        self.port = int(port) if port else None
        is_user_valid = not at_sign or re.fullmatch(r"[\w.+#][\w.@\\$+#-]*", user)
        is_host_valid = re.fullmatch(r"[\w.:%][\w.:%-]*", self.host, re.ASCII)
        is_port_valid = self.port is None or 1 <= self.port <= 65535
        if not (is_user_valid and is_host_valid and is_port_valid):
            raise UsageError(
                f"{text!r} is not [user@]host[:port] (an IPv6 address with a port goes in brackets)"
            )

    @property
    def is_local(self) -> bool:
        return self.host == "local" and self.user is None and self.port is None

    def named(self, user: str, port: int) -> str:
        """Return the name of the host in messages and in the report."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        if port == 22:
            return f"{user}@{host}"
        return f"{user}@{host}:{port}"


def split_address(address: str) -> tuple[str, str]:
    """Return the parts of HOST[:PORT] as they are given; "" for no port, for both if malformed."""
    # Two colons or more, without brackets: an IPv6 address that has no port.
    if re.fullmatch(r"[\dA-Fa-f.]*:[\dA-Fa-f.]*:[\dA-Fa-f:.]*(%[\w.-]+)?", address):
        return address, ""
    match = re.fullmatch(r"(?:\[([^]]+)]|([^]:[]+))(?::(\d{1,5}))?", address)
    if not match:
        return "", ""
    return match[1] or match[2], match[3] or ""


def check_ascii(text: str) -> None:
    """Raise UsageError for a host whose internationalized name is not in its ASCII form."""
    name = text.rpartition("@")[2]
    if name.isascii():
        return
    hint = ""
    with suppress(UnicodeError):
        hint = f" ({name.encode('idna').decode()})"
    raise UsageError(f"{text}: give the name in its ASCII form{hint}")


class SshOptions:
    """The options that `ssh -G -v` printed for a host.

    `files_read` are the files of configuration that its log names, without `own_file`, in which
    netweaver has put its options for ssh.
    """

    def __init__(self, output: bytes, log: bytes = b"", own_file: str = "") -> None:
        self._values: dict[str, list[str]] = {}
        for line in os.fsdecode(output).split("\n"):
            keyword, _, value = line.partition(" ")
            self._values.setdefault(keyword.lower(), []).append(value)
        # ssh ends the lines of its log by CR and LF.
        files = re.findall(r"Reading configuration data (.*?)\r?\n", os.fsdecode(log))
        self.is_read_twice = files.count(own_file) > 1  # "Match final" and the like ask for that
        self.files_read = [name for name in files if name != own_file]

    def every(self, keyword: str) -> list[str]:
        """Return the values of an option that may be given several times, without "none"."""
        return [value for value in self._values.get(keyword, []) if value.lower() != "none"]

    def text(self, keyword: str, default: str = "") -> str:
        """Return an option's value as it is; `default` if ssh printed none."""
        return self._values.get(keyword, [default])[0]

    def is_on(self, keyword: str) -> bool:
        return self.text(keyword) in ("yes", "true")

    def number(self, keyword: str, default: int) -> int:
        text = self.text(keyword)
        return int(text) if text.isdecimal() else default

    def algorithms(self, keyword: str) -> list[str] | None:
        """Return a list of algorithms; None if this version of ssh has no such option."""
        text = self.text(keyword)
        return text.split(",") if text else None


@dataclass(frozen=True)
class HostSettings:
    """OpenSSH's configuration for a host, as far as it matters to a login without its `ssh`."""

    options: SshOptions
    name: str  # in messages and in the report
    host: str
    port: int
    user: str
    place: str  # in messages: the port, and the host if it isn't the one in the name
    known_names: tuple[str, ...]  # in known_hosts; others than the first can only confirm a key
    user_files: tuple[str, ...]  # the user's known_hosts files, of which the first gets new keys
    system_files: tuple[str, ...]
    identities: tuple[str, ...]  # paths of private keys
    certificates: tuple[str, ...]  # paths of certificates; those beside the keys if it is empty
    agent_socket: str  # "" for none
    jumps: str  # the value of ProxyJump; "" for none
    proxy_command: str  # "" for none

    @property
    def known_hosts_files(self) -> tuple[str, ...]:
        return self.user_files + self.system_files

    @property
    def accepts_any_key(self) -> bool:
        """Return whether ssh_config lets every host key pass, even one that has changed."""
        return self.options.text("stricthostkeychecking") in ("no", "off", "false")

    @property
    def connect_seconds(self) -> int:
        return self.options.number("connecttimeout", 0) or CONNECT_SECONDS

    @property
    def smallest_rsa_bits(self) -> int:
        # RSAMinSize is an older name of RequiredRSASize, and 1024 OpenSSH's default.
        return self.options.number("requiredrsasize", self.options.number("rsaminsize", 1024))

    @property
    def proxy(self) -> str:
        """The option that makes the connection go through something else; "" for none."""
        if self.jumps:
            return f"ProxyJump {self.jumps}"
        if self.proxy_command:
            return f"ProxyCommand {self.proxy_command}"
        return ""


def read_settings(
    target: Target,
    options: SshOptions,
    expand: Callable[[str], str],
    split_files: Callable[[str], tuple[str, ...]],
) -> HostSettings:
    """Return the settings for a target from the answer of `ssh -G`.

    `expand` replaces ~, tokens and variables in a path, and `split_files` splits the value of a
    keyword into names of files.  Raises HostConnectionError if an option can't be honoured.
    """
    host = options.text("hostname")
    port = options.number("port", 22)
    user = options.text("user")
    alias = options.text("hostkeyalias")
    name = target.named(user, port)
    check_options(name, options)
    place = f"port {port}"
    if host != target.host:
        place = f"port {port} of {host}"
    known_names: tuple[str, ...] = (host,)
    if alias:
        known_names = (alias,)
    elif port != 22:
        known_names = (f"[{host}]:{port}", host)
    # TOKENS of ssh_config(5) that ProxyJump and ProxyCommand accept.
    tokens = {
        "%": "%",
        "h": host,
        "k": alias or target.host,
        "n": target.host,
        "p": str(port),
        "r": user,
    }

    return HostSettings(
        options=options,
        name=name,
        host=host,
        port=port,
        user=user,
        place=place,
        known_names=known_names,
        user_files=split_files("UserKnownHostsFile"),
        system_files=split_files("GlobalKnownHostsFile"),
        identities=tuple(map(expand, options.every("identityfile"))),
        certificates=tuple(map(expand, options.every("certificatefile"))),
        agent_socket=find_agent(options),
        jumps=expand_tokens(name, options.text("proxyjump"), tokens),
        proxy_command=expand_tokens(name, options.text("proxycommand"), tokens),
    )


def check_options(name: str, options: SshOptions) -> None:
    """Raise HostConnectionError if an option asks for something that paramiko can't do."""
    for keyword, accepted in UNSUPPORTED_OPTIONS.items():
        value = options.text(keyword)
        # PreferredAuthentications is a list, of which one method is enough.
        if set(value.split(",")).isdisjoint(accepted):
            raise HostConnectionError(
                f"{name}: ssh_config sets {keyword} {value}, which is not supported: "
                "netweaver needs public-key login and a shell. Override it with -o"
            )
    for jump in options.text("proxyjump").split(","):
        with naming(f"{name}: ProxyJump"):
            check_ascii(jump)


def expand_tokens(name: str, text: str, tokens: Mapping[str, str]) -> str:
    """Return a proxy's option with `tokens` replaced; raise HostConnectionError for any other."""

    def replacement(match: re.Match[str]) -> str:
        if match[1] not in tokens:
            raise HostConnectionError(
                f"{name}: ProxyCommand or ProxyJump {text!r} has the unknown token {match[0]}"
            )
        return tokens[match[1]]

    return re.sub(r"%(.?)", replacement, text)


def find_agent(options: SshOptions) -> str:
    """Return the path of ssh-agent's socket; "" if there is none or it must not be used."""
    path = options.text("identityagent", "SSH_AUTH_SOCK")
    if path == "none":
        return ""
    if path == "SSH_AUTH_SOCK" or path.startswith("$"):  # names a variable
        return os.environ.get(path.lstrip("$"), "")
    return home_path(path)  # older versions of `ssh -G` leave a ~ as it is


def home_path(path: str) -> str:
    """Return a path with ~ replaced as ssh does, which doesn't look at $HOME."""
    if path == "~" or path.startswith("~/"):
        try:
            return pwd.getpwuid(os.getuid()).pw_dir + path[1:]
        except KeyError as error:
            raise HostConnectionError(
                f"no user exists for uid {os.getuid()}: ssh needs an entry in /etc/passwd"
            ) from error
    return os.path.expanduser(path)


def run_openssh(*command: str) -> subprocess.CompletedProcess[bytes]:
    """Run one of OpenSSH's programs to its end; raise HostConnectionError if it can't be run.

    What it starts (Match exec) may hold a pipe open after its end, and a full disk would cut its
    answer without an error.  So it writes into memory, where the system has files there.
    """
    words = [os.fsencode(word) for word in command]
    nothing = subprocess.DEVNULL
    seconds = CONNECT_SECONDS
    try:
        if not hasattr(os, "memfd_create"):  # Linux has it
            return subprocess.run(words, stdin=nothing, capture_output=True, timeout=seconds)
        with (
            os.fdopen(os.memfd_create("output"), "w+b") as output,
            os.fdopen(os.memfd_create("errors"), "w+b") as errors,
        ):
            done = subprocess.run(
                words, stdin=nothing, stdout=output, stderr=errors, timeout=seconds
            )
            output.seek(0)
            errors.seek(0)
            return subprocess.CompletedProcess(words, done.returncode, output.read(), errors.read())
    except FileNotFoundError as error:
        raise HostConnectionError(f"can't find {command[0]}: install OpenSSH's client") from error
    except subprocess.TimeoutExpired as error:
        raise HostConnectionError(
            f"{command[0]} took more than {CONNECT_SECONDS} s: does ssh_config run a command "
            "(Match exec), or look up a name?"
        ) from error
    except OSError as error:
        raise HostConnectionError(f"can't run {command[0]}: {error}") from error


def one_line(text: str) -> str:
    """Return what OpenSSH printed as one line, without "@@@" and lines that explain no failure."""
    lines = []
    for line in text.split("\n"):
        line = line.strip(" @\r")
        if line and not line.startswith(("Warning: Permanently added", "debug", "OpenSSH_")):
            lines.append(line)
    changed_key = [line for line in lines if line.startswith(("Host key for ", "Offending "))]
    return "; ".join(changed_key or lines)[-400:]


# -- host keys --


@dataclass(frozen=True)
class KnownKey:
    """A line of a known_hosts file that applies to a host."""

    place: str  # line and file, in messages
    marker: str  # "REVOKED", "CA" or ""
    kind: str  # such as ssh-ed25519
    blob: bytes  # empty if the line is damaged


def find_known_keys(name: str, files: Iterable[str]) -> list[KnownKey]:
    """Return the keys that known_hosts files have for a name.

    `ssh-keygen -F` knows patterns, negation, hashed names and markers.
    """
    keys = []
    for file in filter(os.path.exists, files):
        answer = run_openssh("ssh-keygen", "-F", name, "-f", file)
        if answer.returncode > 1 or not os.access(file, os.R_OK):  # 1: the name isn't there
            reason = one_line(os.fsdecode(answer.stderr)) or "no permission"
            raise HostConnectionError(f"can't read {file}: {reason}")
        lines = os.fsdecode(answer.stdout).split("\n")
        for header, line in zip(lines[::2], lines[1::2]):  # two lines for each key
            keys.append(parse_known_key(header, line, file))
    return keys


def parse_known_key(header: str, line: str, file: str) -> KnownKey:
    """Parse an answer of ssh-keygen: "# Host NAME found: line 3 REVOKED", and the line itself."""
    line_number, marker = re.findall(r" found: line (\d+) ?(\w*)\r?$", header)[0]
    fields = line.split()  # [@MARKER] NAMES KIND BASE64
    if marker:
        fields = fields[1:]
    place = f"line {line_number} of {file}"
    if len(fields) < 3:
        return KnownKey(place, marker, "", b"")
    blob = decode_base64(fields[2])
    if marker != "REVOKED" and not blob.startswith(ssh_string(fields[1])):
        blob = b""  # another kind of key than the line says, which ssh ignores
    return KnownKey(place, marker, fields[1], blob)


def has_own_order(algorithms: Sequence[str] | None, default: Sequence[str] | None) -> bool:
    """Return whether ssh_config replaces the `default` list of HostKeyAlgorithms by its own.

    Either list is None if this version of ssh has no such option.  ssh keeps to the order of its
    own list, but in the default list, also with algorithms appended or removed, it prefers those of
    known keys.  `ssh -G` doesn't print which list it is: one with less than a third of the
    default's algorithms, or in another order, is taken for its own.
    """
    if algorithms is None or default is None:
        return False
    shared = [name for name in default if name in algorithms]
    return len(shared) < len(default) / 3 or algorithms[: len(shared)] != shared


def decode_base64(text: str) -> bytes:
    """Return the decoded text, or b"" if it is not base64."""
    try:
        return b64decode(text, validate=True)
    except ValueError:
        return b""


def is_known(key: paramiko.PKey, settings: HostSettings, title: str) -> bool:
    """Return whether a host's key is known; False if the host is new.

    Raises HostConnectionError if the key must be refused.  `title` is the key in messages.  In
    contrast to ssh, a host that has a damaged line or only a certificate authority is not new: its
    key is refused.
    """
    first, *others = settings.known_names
    known_keys = find_known_keys(first, settings.known_hosts_files)
    if is_among(known_keys, key, title):
        return True
    for name in others:
        with suppress(HostConnectionError):  # the sshd of another port may have another key
            if is_among(find_known_keys(name, settings.known_hosts_files), key, title):
                return True
    for known in known_keys:
        if known.marker == "CA":
            raise HostConnectionError(
                f"{title} can only be verified by a certificate ({known.place}), which paramiko "
                "doesn't support: add the key itself to known_hosts"
            )
    return False


def is_among(known_keys: Sequence[KnownKey], key: paramiko.PKey, title: str) -> bool:
    """Return whether a key is among those known for a name; False if no key is known for it.

    Raises HostConnectionError if the key is revoked, or if only other keys are known.
    """
    for known in known_keys:
        if known.marker == "REVOKED" and known.blob == key.asbytes():
            raise HostConnectionError(
                f"{title} is revoked by {known.place}: ask the administrator of that host"
            )
    unmarked = [known for known in known_keys if not known.marker]
    if any(known.blob == key.asbytes() for known in unmarked):
        return True
    if unmarked:
        raise HostConnectionError(
            f"{title} does not match the known key (possible man-in-the-middle attack). If the "
            f"new key is genuine, remove {', '.join(known.place for known in unmarked)}"
        )
    return False


def check_host_key(
    key: paramiko.PKey,
    settings: HostSettings,
    connection: SshConnection,
    warn: Callable[[str], None],
) -> None:
    """Check a host's key as ssh does, and record that of a new host.

    Raises HostConnectionError if the key must be refused.
    """
    address = connection.peer
    title = f"{settings.name}: its host key ({key.get_name()} {key.fingerprint})"
    smallest = settings.smallest_rsa_bits
    if key.get_name() == "ssh-rsa" and key.get_bits() < smallest:
        raise HostConnectionError(
            f"{title} has only {key.get_bits()} bits: RequiredRSASize is {smallest}"
        )
    if settings.accepts_any_key or is_trusted_loopback(settings, address):
        return
    known = is_known(key, settings, title)
    if connection.offers_certificate:
        check_authorities(settings, title)
    if settings.options.is_on("checkhostip") and address not in ("", settings.host):
        check_key_of_address(key, settings, address, title)
    if not known:
        accept_new_host(key, settings, title, warn)


def is_trusted_loopback(settings: HostSettings, address: str) -> bool:
    """Return whether NoHostAuthenticationForLocalhost lets any key pass."""
    options = settings.options
    if not options.is_on("nohostauthenticationforlocalhost") or options.text("hostkeyalias"):
        return False
    return is_loopback(address)


def is_loopback(address: str) -> bool:
    """Return whether an address is one of loopback for ssh: not if it is IPv4 within IPv6."""
    return address == "::1" or address.startswith("127.")


def check_authorities(settings: HostSettings, title: str) -> None:
    """Raise HostConnectionError if the certificate of a host may be by a revoked authority.

    paramiko gets the plain key of the host, and doesn't see who has signed it.
    """
    for name in settings.known_names:
        for known in find_known_keys(name, settings.known_hosts_files):
            if known.marker == "REVOKED":
                raise HostConnectionError(
                    f"{title} has a certificate, which paramiko can't check, and {known.place} "
                    "revokes a key that may be its authority's: if that line is about another "
                    "host, remove it; else remove the certificate algorithms from HostKeyAlgorithms"
                )


def check_key_of_address(
    key: paramiko.PKey, settings: HostSettings, address: str, title: str
) -> None:
    """Raise HostConnectionError if another key is known for the address (CheckHostIP)."""
    if is_loopback(address):
        return
    name = address if settings.port == 22 else f"[{address}]:{settings.port}"
    known_keys = find_known_keys(name, settings.known_hosts_files)
    is_among(known_keys, key, f"{title}, of {address},")


def accept_new_host(
    key: paramiko.PKey, settings: HostSettings, title: str, warn: Callable[[str], None]
) -> None:
    """Record the key of a new host; raise HostConnectionError if ssh_config forbids that."""
    # `ssh -G` prints "true" where the user wrote "yes".
    checking = settings.options.text("stricthostkeychecking").replace("true", "yes")
    if checking != "accept-new":
        raise HostConnectionError(
            f"{title} is not known, and StrictHostKeyChecking is {checking}: "
            "add its key to known_hosts, or use -o StrictHostKeyChecking=accept-new"
        )
    if not settings.user_files:
        raise HostConnectionError(
            f"{title} is not known, and UserKnownHostsFile is none: use -o UserKnownHostsFile=FILE"
        )
    path = settings.user_files[0]
    try:
        record_host_key(path, key, settings, title)
    except OSError as error:
        warn(f"{settings.name}: can't record its host key in {path}: {error.strerror}")


def record_host_key(path: str, key: paramiko.PKey, settings: HostSettings, title: str) -> None:
    """Append a host's key, which messages call `title`, to a known_hosts file.

    The file is locked meanwhile, since another run may be recording the same key.
    """
    from paramiko import HostKeys

    ssh_directory = home_path("~/.ssh")
    if path.startswith(ssh_directory + "/"):
        os.makedirs(ssh_directory, 0o700, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    with open(descriptor, "r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if is_known(key, settings, title):
            return  # another run has just recorded it
        name = settings.known_names[0]
        if settings.options.is_on("hashknownhosts"):
            name = HostKeys.hash_host(name)
        line = f"{name} {key.get_name()} {key.get_base64()}\n"
        content = file.read()
        if content and not content.endswith(b"\n"):
            line = "\n" + line
        file.write(line.encode())


# -- keys to log in with --


class SshReader:
    """A reader of numbers and strings in SSH's encoding (RFC 4251).

    Raises ValueError if the data ends early.
    """

    def __init__(self, data: bytes, offset: int = 0) -> None:
        self._data = data
        self._offset = offset

    def number(self) -> int:
        return int.from_bytes(self._next(4), "big")

    def string(self) -> bytes:
        return self._next(self.number())

    def strings(self, count: int) -> list[bytes]:
        return [self.string() for _ in range(count)]

    def _next(self, size: int) -> bytes:
        data = self._data[self._offset : self._offset + size]
        if len(data) < size:
            raise ValueError("the data ends early")
        self._offset += size
        return data


def ssh_string(data: bytes | str) -> bytes:
    """Encode a string for SSH (RFC 4251)."""
    if isinstance(data, str):
        data = data.encode()
    return len(data).to_bytes(4, "big") + data


def key_kind(blob: bytes) -> str:
    """Return the kind of a public key or certificate, such as ssh-ed25519."""
    return SshReader(blob).string().decode(errors="replace")


def is_certificate(blob: bytes) -> bool:
    return bool(certified_key(blob))


def certified_key(certificate: bytes) -> bytes:
    """Return the public key in a certificate; b"" if the data are no certificate."""
    try:
        reader = SshReader(certificate)
        kind, suffix, _ = reader.string().decode(errors="replace").partition(CERTIFICATE)
        if kind.startswith("sk-"):  # a security key, in whose kind CERTIFICATE replaces this suffix
            kind += "@openssh.com"
        if not suffix or kind not in PUBLIC_KEY_STRINGS:
            return b""
        reader.string()  # the nonce, after which come the strings of the key
        strings = reader.strings(PUBLIC_KEY_STRINGS[kind])
    except ValueError:
        return b""
    return ssh_string(kind) + b"".join(map(ssh_string, strings))


def rsa_bits(blob: bytes) -> int | None:
    """Return the size of an RSA key or certificate in bits; None for other kinds."""
    kind = key_kind(blob)
    if kind == "ssh-rsa" + CERTIFICATE:
        blob = certified_key(blob)
    elif kind != "ssh-rsa":
        return None
    _, _, modulus = SshReader(blob).strings(3)  # after kind and exponent (RFC 4253, 6.6)
    return int.from_bytes(modulus, "big").bit_length()


def read_start(path: str) -> bytes:
    """Return the first LARGEST_ANSWER bytes of a file; b"" if it can't be read."""
    try:
        with open(path, "rb") as file:
            return file.read(LARGEST_ANSWER)
    except OSError:
        return b""


def read_public_key(path: str) -> bytes:
    """Return the public key or certificate in a file, or in the .pub file beside it, else b""."""
    for candidate in (path, f"{path}.pub"):
        for line in read_start(candidate).split(b"\n"):
            fields = line.split()
            if len(fields) >= 2:
                blob = decode_base64(fields[1].decode("latin-1"))
                # In a line "KIND BASE64 COMMENT" the encoded key begins with its kind as well.
                if blob.startswith(ssh_string(fields[0])):
                    return blob
    return b""


def public_half(path: str) -> bytes:
    """Return the public key of an identity file; b"" if only loading the private key shows it."""
    blob = read_public_key(path)
    if blob:
        return blob
    try:
        return parse_openssh_key(read_start(path))[1]
    except ValueError:
        return b""


def parse_openssh_key(data: bytes) -> tuple[str, bytes]:
    """Return the cipher and the public key of a private key in OpenSSH's format.

    Raises ValueError if the data has another format.
    """
    content = b""
    match = re.search(rb"BEGIN OPENSSH PRIVATE KEY-----(.*)-----END", data, re.DOTALL)
    if match:
        content = decode_base64(re.sub(r"\s", "", match[1].decode("latin-1")))
    magic = b"openssh-key-v1\0"
    if not content.startswith(magic):
        raise ValueError("not OpenSSH's format")
    reader = SshReader(content, len(magic))
    cipher, _, _ = reader.strings(3)  # and the key derivation function, with its options
    reader.number()  # of keys, which is 1
    public_key = reader.string()
    return cipher.decode(errors="replace"), public_key


def load_key(path: str, ask: Callable[[str], str] | None) -> paramiko.PKey:
    """Return the private key in a file; raise HostConnectionError if the key can't be used.

    `ask` gets the passphrase of an encrypted key from a person; it is None if nobody is there.
    """
    import paramiko

    passphrase = None
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_ANSWER)
            status = os.fstat(file.fileno())
        kind, is_encrypted = identify_private_key(data)
        key_class: type[paramiko.PKey] = getattr(paramiko, PRIVATE_KEY_CLASSES[kind])
        if status.st_uid == os.getuid() and status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise ValueError(f"its permissions {mode:04o} are too open: chmod 600 {path}")
        if is_encrypted:
            passphrase = ask_passphrase(path, ask)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise HostConnectionError(f"can't use the key {path}: {reason}") from error
    try:
        return key_class.from_private_key_file(path, passphrase)
    except Exception as error:  # whatever paramiko and cryptography make of a damaged file
        reason = f"paramiko can't read it ({one_line(str(error))[:120]}): {USE_AGENT}"
        if is_encrypted and "cipher" not in str(error):  # paramiko names one that it lacks
            reason = "the passphrase is wrong"
        raise HostConnectionError(f"can't use the key {path}: {reason}") from error


def ask_passphrase(path: str, ask: Callable[[str], str] | None) -> str:
    """Ask a person for the passphrase of a key; raise ValueError if there is nobody."""
    if ask is None:
        raise ValueError(f"it is protected by a passphrase: {USE_AGENT}")
    return ask(f"Passphrase for {path}: ")


def identify_private_key(data: bytes) -> tuple[str, bool]:
    """Return the kind of a private key, as in PRIVATE_KEY_CLASSES, and whether it is encrypted.

    Raises ValueError if paramiko can't read keys of this kind, or with this cipher.
    """
    cipher = "none"
    try:
        cipher, blob = parse_openssh_key(data)
        kind = key_kind(blob)
        is_encrypted = cipher != "none"
    except ValueError:
        pattern = rb"^(?:-----BEGIN (.*?) ?PRIVATE KEY-----|(PuTTY)-User-Key-File)"
        match = re.search(pattern, data, re.MULTILINE)
        kind = "not a private key"
        if match:
            kind = (match[1] or match[2] or b"").decode(errors="replace")
        is_encrypted = b"ENCRYPTED" in data
    if kind not in PRIVATE_KEY_CLASSES:
        raise ValueError(
            KEY_ADVICE.get(kind, "it is not a private key (a public one?), or damaged")
        )
    if cipher not in PRIVATE_KEY_CIPHERS:
        raise ValueError(
            f"it is encrypted with {cipher}, which paramiko lacks: "
            "convert it with ssh-keygen -p -Z aes256-ctr -f FILE"
        )
    return kind, is_encrypted


class Agent:
    """A client of ssh-agent; without keys if there is no agent."""

    # Types of messages (draft-ietf-sshm-ssh-agent).
    REQUEST_IDENTITIES = 11
    IDENTITIES_ANSWER = 12
    SIGN_REQUEST = 13
    SIGN_RESPONSE = 14

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(CONNECT_SECONDS)
        self.keys: list[bytes] = []  # public keys and certificates that it signs for
        try:
            if path:
                self._socket.connect(path)
                self.keys = self._list_keys()
        except (OSError, ValueError):
            self.keys = []
        self._socket.settimeout(AGENT_SIGN_SECONDS)

    def _list_keys(self) -> list[bytes]:
        reader = self._exchange(bytes([self.REQUEST_IDENTITIES]), self.IDENTITIES_ANSWER)
        keys = []
        for _ in range(reader.number()):
            keys.append(reader.string())
            reader.string()  # the comment
        return keys

    def sign(self, blob: bytes, data: bytes, algorithm: str) -> bytes:
        """Return a signature in SSH's encoding; raise OSError or ValueError if it is refused."""
        flags = AGENT_SIGNATURE_FLAGS.get(algorithm.replace(CERTIFICATE, ""), 0)
        request = bytes([self.SIGN_REQUEST]) + ssh_string(blob) + ssh_string(data)
        request += flags.to_bytes(4, "big")
        signature = self._exchange(request, self.SIGN_RESPONSE).string()
        kind = key_kind(signature)
        if algorithm.startswith("rsa-") and kind != algorithm.replace(CERTIFICATE, ""):
            raise ValueError(f"ssh-agent signed by {kind}")  # by SHA-1
        return signature

    def _exchange(self, request: bytes, answer_type: int) -> SshReader:
        """Return a reader of the answer after its type; raise OSError or ValueError for another."""
        self._socket.sendall(ssh_string(request))
        with self._socket.makefile("rb") as stream:
            size = int.from_bytes(stream.read(4), "big")
            answer = stream.read(min(size, LARGEST_ANSWER))
        if answer[:1] != bytes([answer_type]):
            raise ValueError("ssh-agent refused")
        return SshReader(answer, 1)

    def close(self) -> None:
        self._socket.close()


@dataclass(frozen=True)
class Identity:
    """A public key or certificate to log in with, and the private key that signs for it."""

    title: str  # in messages
    blob: bytes  # b"" if it isn't known before the private key is loaded
    path: str  # of the private key; "" if ssh-agent signs
    agent_blob: bytes = b""  # the key by which ssh-agent signs; b"" if the private key does


def list_identities(
    settings: HostSettings, agent_keys: Sequence[bytes], key_given: bool
) -> list[Identity]:
    """Return the identities in the order in which ssh tries them.

    These are certificates from ssh_config, keys of ssh-agent that are configured, ssh-agent's
    other keys, and keys in files.  If the user has given a key, ssh-agent's others are left out.
    """
    files = list_file_identities(settings)
    titles = {identity.blob: identity.title for identity in files}
    leaves_others_out = key_given or settings.options.is_on("identitiesonly")
    configured = []
    others = []
    for blob in agent_keys:
        if blob in titles:
            configured.append(Identity(titles[blob], blob, "", blob))
        elif not leaves_others_out:
            others.append(Identity(AGENT_KEY, blob, "", blob))
    files = [identity for identity in files if identity.blob not in agent_keys]
    certificates = []
    for path in settings.certificates:
        certificates += read_certificate(path)
    keys = configured + others + files
    return [find_signer(identity, keys) for identity in certificates + keys]


def list_file_identities(settings: HostSettings) -> list[Identity]:
    """Return the identities of the configured keys that have a file, private or public.

    Unless certificates are configured, a certificate in a file beside a key follows the key.
    """
    files = []
    for path in settings.identities:
        blob = public_half(path)
        if blob or os.path.exists(path):
            files.append(Identity(f"the key {path}", blob, path))
        if not settings.certificates:
            certificate = read_certificate(f"{path}-cert.pub", path)
            files += certificate or read_certificate(f"{path}-cert", path)
    return files


def read_certificate(path: str, key_path: str = "") -> list[Identity]:
    """Return the identity of the certificate in a file, in a list that is empty if it has none."""
    blob = read_public_key(path)
    if not is_certificate(blob):
        return []
    return [Identity(f"the certificate {path}", blob, key_path)]


def find_signer(identity: Identity, keys: Sequence[Identity]) -> Identity:
    """Complete a certificate's identity by its key among `keys`; return others unchanged."""
    if is_certificate(identity.blob) and not identity.agent_blob:
        key = certified_key(identity.blob)
        for signer in keys:
            if signer.blob == key:
                return replace(identity, path=signer.path, agent_blob=signer.agent_blob)
    return identity


def signature_algorithm(
    kind: str, allowed: Sequence[str] | None, server: Sequence[str] | None
) -> str:
    """Return the algorithm to sign with by a key of some kind, as ssh chooses it; "" for none.

    `allowed` are the client's algorithms, and `server` those of the server; None if not known.
    Only an RSA key has a choice; other kinds are left to the server to refuse.
    """
    if kind.replace(CERTIFICATE, "") != "ssh-rsa":
        if allowed is None or kind in allowed:
            return kind
        return ""
    suffix = kind.removeprefix("ssh-rsa")  # CERTIFICATE, or ""
    if server is None:
        server = ["ssh-rsa"]  # all that OpenSSH before 7.2 has, which lists none
    for signature in RSA_SIGNATURES:
        algorithm = signature + suffix
        if signature in server and (allowed is None or algorithm in allowed):
            return algorithm
    return ""


# -- connections --


SMALLEST_GROUP_BITS = 2048  # of Diffie-Hellman


def new_transport(sock: socket.socket) -> Any:
    """Return a paramiko.Transport that records what the server offers and why it disconnects.

    It refuses two answers in the exchange of keys that ssh refuses, too.
    """
    import paramiko

    class Transport(paramiko.Transport):
        farewell = ""  # the server's reason for disconnecting
        offers: dict[str, list[str]]  # names of the server's algorithms, by option of ssh_config

        def _parse_kex_init(self, message: paramiko.Message) -> None:
            # RFC 4253, 7.1: a cookie of 16 bytes, then lists; ciphers have one for each direction.
            options = ("KexAlgorithms", "HostKeyAlgorithms", "Ciphers", "Ciphers", "MACs")
            reader = SshReader(message.asbytes(), 16)
            for option, names in zip(options, reader.strings(len(options))):
                self.offers[option] = names.decode(errors="replace").split(",")
            super()._parse_kex_init(message)  # type: ignore[misc]

        def _parse_disconnect(self, message: paramiko.Message) -> None:
            reader = SshReader(message.asbytes())
            reader.number()  # a code for the reason, which follows in words (RFC 4253, 11.1)
            self.farewell = reader.string().decode(errors="replace")
            super()._parse_disconnect(message)  # type: ignore[misc]

        def _set_K_H(self, k: int, h: bytes) -> None:
            # Of a group that the server has chosen; paramiko accepts 1024 bits.
            prime = getattr(self.kex_engine, "p", None)
            if prime and prime.bit_length() < SMALLEST_GROUP_BITS:
                raise paramiko.SSHException(f"its group has only {prime.bit_length()} bits")
            super()._set_K_H(k, h)  # type: ignore[misc]

        def _verify_key(self, host_key: bytes, sig: bytes) -> None:
            agreed = str(self.host_key_type).replace(CERTIFICATE, "")
            if key_kind(sig) != agreed:  # such as one by SHA-1
                raise paramiko.SSHException(f"it signed by {key_kind(sig)}")
            super()._verify_key(host_key, sig)  # type: ignore[misc]

    transport = Transport(sock)
    transport.offers = {}
    return transport


class LoginEnded(Exception):
    """The server has ended a login before it was decided."""


class LoginTimedOut(Exception):
    """The server has not answered a request of PublicKeyLogin in time."""


class PublicKeyLogin:
    """Authentication by public keys (RFC 4252), as ssh does it: offer a key, then sign.

    paramiko's own class signs at once, so it needs every passphrase, and knows few kinds of keys.
    In its place as `auth_handler`, this one gets messages from paramiko's thread, by the functions
    in `_handler_table`, and a call of `abort` when the thread ends.
    """

    # Types of messages (RFC 4253, 12 and RFC 4252, 6); KEY_WANTED is USERAUTH_PK_OK.
    SERVICE_REQUEST = 5
    SERVICE_ACCEPT = 6
    REQUEST = 50
    FAILURE = 51
    SUCCESS = 52
    BANNER = 53
    KEY_WANTED = 60
    CUT_OFF = 0  # no message's type: the connection has ended
    banner = None  # for paramiko, which reads this of its auth_handler

    def __init__(self, transport: Any, user: str, seconds: float) -> None:
        self.methods: list[str] = []  # with which the server would go on
        self.is_partial = False  # a key was accepted, and the server wants more
        self._transport = transport  # a paramiko.Transport, with its internals
        self._user = user
        self._seconds = seconds
        self._authenticated = False
        self._answers: SimpleQueue[tuple[int, bytes]] = SimpleQueue()
        kinds = (self.SERVICE_ACCEPT, self.FAILURE, self.SUCCESS, self.BANNER, self.KEY_WANTED)
        self._handler_table = {kind: partial(self._receive, kind) for kind in kinds}
        self._transport.auth_handler = self
        if not transport.is_active():
            raise LoginEnded  # before paramiko could call `abort`
        self._exchange(bytes([self.SERVICE_REQUEST]) + ssh_string("ssh-userauth"))

    def is_authenticated(self) -> bool:
        return self._authenticated

    def abort(self) -> None:
        """Wake up the thread that waits for an answer: none will come any more."""
        self._answers.put((self.CUT_OFF, b""))

    def _receive(self, kind: int, message: paramiko.Message) -> None:
        if kind == self.SUCCESS:
            self._authenticated = True
            self._transport._auth_trigger()  # begins to compress, if that was agreed on
        if kind != self.BANNER:
            self._answers.put((kind, message.asbytes()))

    def server_algorithms(self) -> list[str] | None:
        """Return the server's signature algorithms; None if it lists none (RFC 8308, 3.1)."""
        text = self._transport.server_extensions.get("server-sig-algs")
        if not text:
            return None
        algorithms: list[str] = text.decode(errors="replace").split(",")
        if "OpenSSH_7.4" in self._transport.remote_version:  # it has them, but doesn't list them
            algorithms += ["rsa-sha2-256", "rsa-sha2-512"]
        return algorithms

    def offer(self, algorithm: str, blob: bytes) -> bool:
        """Return whether the server would accept a signature by a key."""
        return self._exchange(self._request(algorithm, blob, signed=False)) == self.KEY_WANTED

    def sign(self, algorithm: str, blob: bytes, signer: Callable[[bytes], bytes]) -> bool:
        """Return whether the server lets the user in by a key; `signer` makes its signatures."""
        request = self._request(algorithm, blob, signed=True)
        signature = signer(ssh_string(self._transport.session_id) + request)
        return self._exchange(request + ssh_string(signature)) == self.SUCCESS

    def _request(self, algorithm: str, blob: bytes, signed: bool) -> bytes:
        """Return the request of RFC 4252, 7, to which the signature is appended if `signed`."""
        start = [self._user, "ssh-connection", "publickey"]
        return b"".join(
            [
                bytes([self.REQUEST]),
                *map(ssh_string, start),
                bytes([signed]),
                ssh_string(algorithm),
                ssh_string(blob),
            ]
        )

    def _exchange(self, request: bytes) -> int:
        """Send a request, and return the type of the answer; a failure sets `methods`.

        Raises LoginTimedOut, or LoginEnded if the connection ends.
        """
        from paramiko import Message

        try:
            self._transport._send_message(Message(request))
            kind, answer = self._answers.get(timeout=self._seconds)
        except Empty as error:
            raise LoginTimedOut from error
        except (OSError, EOFError) as error:
            raise LoginEnded from error
        if kind == self.CUT_OFF:
            raise LoginEnded
        if kind == self.FAILURE:  # RFC 4252, 5.1: a length of 4 bytes, a list, a flag of 1 byte
            self.methods = answer[4:-1].decode(errors="replace").split(",")
            self.is_partial = answer[-1:] != b"\0"
        return kind


def connect_tcp(settings: HostSettings) -> socket.socket:
    """Connect to a host as ssh_config says; raise HostConnectionError if it can't be reached."""
    failure: Exception | None = None
    for attempt in range(settings.options.number("connectionattempts", 1)):
        if attempt:
            time.sleep(1)  # as ssh
        try:
            return open_socket(settings)
        except OSError as error:
            failure = error
    reason = getattr(failure, "strerror", None) or str(failure)
    advice = "check the address, the network and sshd"
    if isinstance(failure, TimeoutError):
        reason = "no answer"
    elif isinstance(failure, ConnectionRefusedError):
        advice = "is sshd running there? (XenServer 9 has it off by default: xe host-enable-ssh)"
    raise HostConnectionError(
        f"{settings.name}: can't reach {settings.place}: {reason}: {advice}"
    ) from failure


ADDRESS_FAMILIES = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}


def open_socket(settings: HostSettings) -> socket.socket:
    """Connect to the first of a host's addresses that answers; raise the last one's OSError.

    Raises HostConnectionError if its name can't be resolved.
    """
    wanted = ADDRESS_FAMILIES.get(settings.options.text("addressfamily"), socket.AF_UNSPEC)
    try:
        answers = socket.getaddrinfo(settings.host, settings.port, wanted, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise HostConnectionError(
            f"{settings.name}: can't resolve {settings.host!r}: {reason}"
        ) from error
    failure = OSError("it has no address")
    for family, _, _, _, address in answers:
        try:
            return connect_socket(settings, family, address)
        except OSError as error:
            failure = error
    raise failure


def connect_socket(
    settings: HostSettings, family: int, address: tuple[object, ...]
) -> socket.socket:
    """Return a socket that is connected to an address; raise OSError if that fails."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(settings.connect_seconds)
        if bind_address := settings.options.text("bindaddress"):
            answers = socket.getaddrinfo(bind_address, 0, family, socket.SOCK_STREAM)
            sock.bind(answers[0][4])
        sock.connect(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # else a dead peer is noticed after 15 minutes
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PEER_SECONDS * 1000)
    except OSError:
        sock.close()
        raise
    return sock


class DroppedConnectionError(HostConnectionError):
    """A connection that ended, and that may be tried again."""


class SshConnection:
    """A connection by SSH: over TCP, or over a process that reports on its stderr what failed."""

    def __init__(self, settings: HostSettings, proxy_command: Sequence[str]) -> None:
        self.name = settings.name
        self._settings = settings
        self._reason = ""
        self._proxy: subprocess.Popen[bytes] | None = None
        self._proxy_errors: IO[bytes] = io.BytesIO()
        if proxy_command:
            self._proxy_errors = tempfile.TemporaryFile()
            self._socket, theirs = socket.socketpair()
            with theirs:
                self._proxy = subprocess.Popen(
                    proxy_command,
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=self._proxy_errors,
                    start_new_session=True,
                )
        else:
            self._socket = connect_tcp(settings)
        self.transport = new_transport(self._socket)
        security = self.transport.get_security_options()
        # paramiko's algorithms by option, before `_restrict`.
        self._supported: dict[str, tuple[str, ...]] = {
            option: tuple(getattr(security, attribute))
            for option, attribute in ALGORITHM_OPTIONS.items()
        }

    def negotiate(self, known_kinds: Collection[str]) -> paramiko.PKey:
        """Agree on keys with the server, and return its host key.

        A host key of a known kind is preferred.  Raises HostConnectionError.
        """
        import paramiko

        started = time.monotonic()
        seconds = self._settings.connect_seconds
        self._restrict(known_kinds)
        # Longer than start_client's timeout, so that this comes first.
        self.transport.banner_timeout = seconds + HEARTBEAT_SECONDS
        self.transport.handshake_timeout = seconds + HEARTBEAT_SECONDS
        self.transport.channel_timeout = CONNECT_SECONDS
        try:
            self.transport.start_client(timeout=seconds)
            if not self.transport.initial_kex_done:  # it returns silently when the time is over
                raise paramiko.SSHException(f"no answer within {seconds} s")
            host_key: paramiko.PKey = self.transport.get_remote_server_key()
            return host_key
        except paramiko.ssh_exception.IncompatiblePeer as error:
            raise HostConnectionError(self._explain_incompatible(error)) from error
        except Exception as error:  # whatever paramiko's thread has died of
            proxy_errors = self._read_proxy_errors()
            message = self._explain_failure(error, proxy_errors)
            # Of many connections sshd drops some (MaxStartups): at once, before its banner.
            is_dropped = "SSH protocol banner" in str(error) and time.monotonic() - started < 2
            if is_dropped and (not proxy_errors or "closed by remote host" in proxy_errors):
                raise DroppedConnectionError(message) from error
            raise HostConnectionError(message) from error

    def _restrict(self, known_kinds: Collection[str]) -> None:
        """Leave only ssh_config's algorithms, in its order, but known kinds of host keys first."""

        def is_unknown(algorithm: str) -> bool:
            kind = "ssh-rsa" if algorithm in RSA_SIGNATURES else algorithm
            return kind not in known_kinds

        security = self.transport.get_security_options()
        for option, attribute in ALGORITHM_OPTIONS.items():
            allowed = self._settings.options.algorithms(option.lower())
            if allowed is None:
                continue
            names = dict.fromkeys(OLDER_NAMES.get(name, name) for name in allowed)
            usable = tuple(name for name in names if name in self._supported[option])
            if not usable:
                raise HostConnectionError(
                    f"{self.name}: ssh_config's {option} has no algorithm that paramiko supports"
                )
            setattr(security, attribute, usable)
        security.key_types = tuple(sorted(security.key_types, key=is_unknown))

    def _explain_incompatible(self, error: Exception) -> str:
        """Return a message that names the algorithms of a server that has none in common."""
        place = self._settings.place
        security = self.transport.get_security_options()
        for option, offers in self.transport.offers.items():
            usable = getattr(security, ALGORITHM_OPTIONS[option])
            extensions = ("ext-info-", "kex-strict-")  # listed among KexAlgorithms
            offered = [name for name in offers if not name.startswith(extensions)]
            if not set(offered).isdisjoint(usable):
                continue  # this option is not the one that failed
            allowable = [name for name in offered if name in self._supported[option]]
            outdated = [name for name in offered if name in OUTDATED_ALGORITHMS]
            if allowable:
                advice = f"ssh_config allows none of them: use -o {option}=+{allowable[0]}"
            elif outdated:
                advice = f"use pip install 'paramiko<5' and -o {option}=+{outdated[0]}"
            else:
                advice = f"paramiko supports none of them: allow {usable[0]} in that sshd_config"
            names = ", ".join(offered)
            return f"{self.name}: {place} offers only {names} ({option}): {advice}"
        return f"{self.name}: no algorithms in common with {place}: {error}"

    def _explain_failure(self, error: Exception, proxy_errors: str) -> str:
        place = self._settings.place
        if proxy_errors:
            proxy = self._settings.proxy
            return f"{self.name}: can't reach {place} through {proxy}: {proxy_errors}"
        reason = str(error) or self.transport.farewell or "connection closed"
        problem = f"{self.name}: can't start an SSH session on {place}: {reason}"
        return f"{problem}: is sshd listening there?"

    def _read_proxy_errors(self) -> str:
        """Return what the process that carries the connection reported; "" for none."""
        self._proxy_errors.seek(0)
        return one_line(self._proxy_errors.read().decode(errors="replace"))

    @property
    def signs_by_sha1(self) -> bool:
        """Return whether this version of paramiko signs by RSA with SHA-1."""
        # It then verifies such signatures of hosts, too.
        return "ssh-rsa" in self._supported["HostKeyAlgorithms"]

    @property
    def offers_certificate(self) -> bool:
        """Whether ssh might ask for a certificate of the server, and get one."""
        offered = self.transport.offers.get("HostKeyAlgorithms", [])
        allowed = self._settings.options.algorithms("hostkeyalgorithms") or offered
        return any(CERTIFICATE in name and name in allowed for name in offered)

    @property
    def peer(self) -> str:
        """The address under which the host was reached, as getpeername(2) gives it."""
        try:
            return str(self._socket.getpeername()[0])
        except (OSError, IndexError):  # the other end of a socket pair has no name
            return ""

    @property
    def address(self) -> str:
        """The IP address under which the host was reached; "" behind a jump."""
        return self.peer.split("%")[0].removeprefix("::ffff:")  # no scope, no IPv4 within IPv6

    def is_active(self) -> bool:
        return bool(self.transport.is_active())

    def error(self) -> str:
        """Return why the connection was lost, or "" if that isn't known."""
        return self._reason or str(self.transport.get_exception() or "")  # "" for an EOFError

    def _open_session(self) -> paramiko.Channel:
        """Open a session; ask again if refused, as sshd still counts one that has just ended."""
        from paramiko import SSHException

        for attempt in range(6):
            try:
                channel: paramiko.Channel = self.transport.open_session(timeout=CONNECT_SECONDS)
                channel.settimeout(CONNECT_SECONDS)
                return channel
            except (SSHException, EOFError, OSError) as error:
                # All else is a refusal, but its type can't be tested: when several threads are
                # refused at once, paramiko gives the right exception to one of them only.
                reason = ""
                if not self.is_active():
                    reason = self.transport.farewell or self.error() or "connection closed"
                elif str(error).startswith("Timeout"):
                    reason = "no answer"
                if reason:
                    raise HostConnectionError(
                        f"{self.name}: can't start a session: {reason}"
                    ) from error
            time.sleep(0.02 * 2**attempt)  # 1.26 s in all
        raise HostConnectionError(
            f"{self.name}: sshd allows too few sessions per connection: its sshd_config needs "
            "MaxSessions 2 or more"
        )

    def start_shell(self, command: str, script: str) -> Channel:
        """Start a command in a session of its own, and send it a script."""
        channel = self._open_session()
        # If these fail, the channel or the connection has ended, as the job's reader will notice.
        quietly(channel.exec_command, command)
        quietly(channel.sendall, script.encode(errors="surrogateescape"))
        return channel

    def open_files(self) -> SftpFiles:
        """Open the session in which files are read; raise CaptureError if the host has none."""
        channel = self._open_session()
        try:
            channel.invoke_subsystem("sftp")
            return SftpFiles(self, channel)
        except Exception as error:  # a strange answer can make paramiko raise anything
            raise CaptureError(
                f"{self.name}: can't start SFTP ({str(error) or 'it ended at once'}): its "
                "sshd_config needs a line such as 'Subsystem sftp internal-sftp'"
            ) from error

    def give_up(self, reason: str) -> None:
        """Close the connection even if calls wait for it; `error` then returns the reason."""
        self._reason = reason
        self.close()

    def close(self) -> None:
        quietly(self.transport.close)
        quietly(self._socket.close)  # a transport that hasn't begun leaves it open
        self._proxy_errors.close()
        if self._proxy:  # it is killed, since ssh -W would wait for a host that is silent
            quietly(os.killpg, self._proxy.pid, signal.SIGKILL)  # also what it has started
            self._proxy.wait()


class LocalChannel:
    """A shell on this machine, which one thread may close while another reads."""

    def __init__(self, command: str) -> None:
        self.closed = False
        self._reading = threading.Lock()  # held while the descriptors must stay open
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
            self._selector = selectors.DefaultSelector()
        except OSError as error:
            raise HostConnectionError(
                f"local: can't start a shell: {error.strerror or error}"
            ) from error
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._input = self._process.stdin
        self._output = self._process.stdout
        self._errors = self._process.stderr
        self._open = {self._output, self._errors}  # without those that have ended
        # Registered until `close`, also after their ends, which make `fileno` readable.
        for stream in self._open:
            self._selector.register(stream, selectors.EVENT_READ)

    def fileno(self) -> int:
        return self._selector.fileno()

    def sendall(self, data: bytes) -> None:
        self._input.write(data)

    @property
    def eof_received(self) -> bool:
        return not self._open

    def recv_ready(self) -> bool:
        return self._is_ready(self._output)

    def recv_stderr_ready(self) -> bool:
        return self._is_ready(self._errors)

    def recv(self, size: int) -> bytes:
        return self._receive(self._output, size)

    def recv_stderr(self, size: int) -> bytes:
        return self._receive(self._errors, size)

    def _is_ready(self, stream: IO[bytes]) -> bool:
        with self._reading:
            if self.closed or stream not in self._open:
                return False
            return any(key.fileobj is stream for key, _ in self._selector.select(0))

    def _receive(self, stream: IO[bytes], size: int) -> bytes:
        with self._reading:
            if self.closed:
                return b""
            data = os.read(stream.fileno(), size)
        if not data:
            self._open.discard(stream)
        return data

    def close(self) -> None:
        """End the lease by closing the shell's input, and free everything."""
        with self._reading:
            self.closed = True
            for stream in (self._input, self._output, self._errors):
                quietly(stream.close)
            self._selector.close()
        self._process.poll()  # leave no zombie, if it has ended


class LocalConnection:
    """This machine itself: its settings, a connection to it, and the source of its files."""

    name = "local"
    accepts_any_key = False  # as in HostSettings
    address = ""

    def is_active(self) -> bool:
        return True

    def error(self) -> str:
        return ""

    def start_shell(self, command: str, script: str) -> Channel:
        channel = LocalChannel(command)
        quietly(channel.sendall, script.encode(errors="surrogateescape"))
        return channel

    def open_files(self) -> LocalConnection:
        return self

    def read(self, path: str, largest: int) -> Iterator[bytes]:
        """Yield a file's blocks; raise CaptureError if unreadable or over `largest` bytes."""
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size > largest:
                    raise CaptureError(f"{path} is larger than its limit of {largest} bytes")
                while block := file.read(CHUNK):
                    yield block
        except OSError as error:
            raise CaptureError(f"can't read {path}: {error.strerror}") from error

    def give_up(self, reason: str) -> None:
        """Do nothing: a shell ends with its job."""

    def close(self) -> None:
        """Do nothing: a shell ends with its job."""


@contextmanager
def without_module(name: str) -> Iterator[None]:
    """Keep imports from loading a module.

    paramiko loads invoke, which takes 0.1 s, for its reader of ssh_config, which isn't used here.
    """
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    hidden = name not in modules
    if hidden:
        modules[name] = None  # makes its import fail, which paramiko expects
    try:
        yield
    finally:
        if hidden:
            del modules[name]


def import_paramiko() -> None:
    """Import paramiko and silence its log; raise NetWeaverError if that fails."""
    import logging
    import warnings

    try:
        with warnings.catch_warnings(), without_module("invoke"):
            warnings.simplefilter("ignore")  # those about the version of cryptography
            import paramiko  # noqa: F401
    except Exception as error:
        raise NetWeaverError(f"can't import paramiko ({error}): pip install -U paramiko") from error
    logging.getLogger("paramiko").addHandler(logging.NullHandler())  # else it prints tracebacks


NO_USER = "netweaver-has-no-user"  # the user of a host for which ssh_config names none


class Access:
    """The options of logins, as a configuration for ssh that is wrapped around the user's own.

    ssh keeps the first value that it reads: `options`, which it gets by -o, have precedence over
    the user's configuration, and this over defaults that differ from ssh's.  The `ssh` of a jump
    gets the same configuration and, as with ssh, no options of -o.  `key_path` is the key to try
    first.  `ask` gets a passphrase from a person; without it a protected key can't be used.  `warn`
    gets warnings.
    """

    def __init__(
        self,
        key_path: str | None = None,
        options: Iterable[str] = (),
        ask: Callable[[str], str] | None = None,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._key_path = find_key(key_path) if key_path else ""
        self._options = list(options)
        self._ask = ask
        self._warn = warn
        self._keys: dict[str, paramiko.PKey | HostConnectionError] = {}  # by path
        self._lock = threading.Lock()  # one question at a time

    @cached_property
    def _config(self) -> str:
        """The configuration for ssh, to which `_config_file` adds the defaults."""
        lines = [
            "BatchMode yes",
            f"ServerAliveInterval {HEARTBEAT_SECONDS}",
            f'Include "{home_path("~/.ssh/config")}"',  # its own ~ would be $HOME
            *system_configuration(),
            "",
        ]
        if self._key_path:
            lines.insert(0, 'IdentityFile "{}"'.format(self._key_path.replace("%", "%%")))
        return "\n".join(lines)

    @cached_property
    def _defaults(self) -> SshOptions:
        """ssh's options without any configuration."""
        return SshOptions(run_openssh("ssh", "-G", "-F", "/dev/null", "host").stdout)

    @contextmanager
    def _config_file(self, default_user: str = "root", read_twice: bool = False) -> Iterator[str]:
        """Write the configuration into a private file that exists only while ssh needs it.

        The first value of an option counts, and netweaver's defaults come last.  If ssh reads the
        file twice, they must not count in its first reading: "Match canonical" is for the second.
        """
        defaults = [
            "Match canonical all" if read_twice else "Host *",
            "StrictHostKeyChecking accept-new",
            f"ConnectTimeout {CONNECT_SECONDS}",
            f"User {default_user}",
            "",
        ]
        try:
            file = tempfile.NamedTemporaryFile(prefix="netweaver.", suffix=".ssh_config")
            file.write(os.fsencode(self._config + "\n".join(defaults)))
            file.flush()
        except OSError as error:
            raise NetWeaverError(
                f"can't write a temporary file for ssh: {error.strerror or error}: see TMPDIR"
            ) from error
        remove = partial(quietly, os.unlink, file.name)
        atexit.register(remove)  # a signal can end the program while a thread still needs the file
        try:
            with file:
                yield file.name
        finally:
            atexit.unregister(remove)

    def load(self, path: str) -> paramiko.PKey:
        """Return the private key in a file; a person is asked for its passphrase at most once."""
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

    def settings(self, target: Target) -> HostSettings | LocalConnection:
        """Return OpenSSH's configuration for a target, or a LocalConnection for this machine.

        Raises HostConnectionError if ssh refuses it, or if netweaver can't honour it.
        """
        if target.is_local:
            return LocalConnection()
        user = target.user or ""
        options = self._ask_ssh(target, user, default_user=NO_USER)
        # "Match user" must see the default user, root, from the first line on: as given by -l.
        # A User line of the configuration counts only for the lines after it.
        if options.text("user") == NO_USER:
            user = "root"
            options = self._ask_ssh(target, user)
        check_includes(target.host, options.files_read)

        def expand(path: str) -> str:
            if "%" not in path and "${" not in path:
                return home_path(path)
            # ssh -G prints ControlPath expanded, so this path is given as one.
            return self._ask_ssh(target, user, f'ControlPath="{path}"').text("controlpath")

        return read_settings(target, options, expand, partial(self._split_files, target, options))

    def _ask_ssh(
        self, target: Target, user: str, *first_options: str, default_user: str = "root"
    ) -> SshOptions:
        """Return the options that ssh would use for a target; "" is the configured user."""
        words = []
        for option in (*first_options, *self._options):
            words += ["-o", option]
        if user:
            words.append(f"-l{user}")
        if target.port:
            words.append(f"-p{target.port}")
        words += ["--", target.host]
        for read_twice in (False, True):
            answer, ssh_options = self._run_ssh(words, default_user, read_twice)
            if answer.returncode:
                reason = one_line(os.fsdecode(answer.stderr))
                raise HostConnectionError(f"{target.host}: ssh_config can't be used: {reason}")
            if not ssh_options.is_read_twice:
                break
        return ssh_options

    def _run_ssh(
        self, words: Sequence[str], default_user: str = "root", read_twice: bool = False
    ) -> tuple[subprocess.CompletedProcess[bytes], SshOptions]:
        """Run `ssh -G` with these words for a host, and return its answer and the options in it."""
        with self._config_file(default_user, read_twice) as path:
            answer = run_openssh("ssh", "-G", "-T", "-v", "-F", path, *words)
        return answer, SshOptions(answer.stdout, answer.stderr, own_file=path)

    def _split_files(self, target: Target, options: SshOptions, keyword: str) -> tuple[str, ...]:
        """Return the names of files in a keyword's value, which `ssh -G` printed joined by blanks.

        Raises HostConnectionError if the lines that set the keyword allow of blanks in a name.
        """
        joined = options.text(keyword.lower())
        if joined == "none":
            return ()
        home = home_path("~")
        names = joined.replace(home, "\0").split()  # blanks in the home's path don't separate
        lines = [*self._options, *self._config.split("\n")]
        for path in options.files_read:
            if not os.access(path, os.R_OK):
                raise HostConnectionError(f"{target.host}: can't read ssh_config {path}")
            lines += os.fsdecode(read_start(path)).split("\n")
        blank_makers = r"[\"'\\#$]"
        if " " in options.text("hostkeyalias") + options.text("user"):  # of the tokens %k and %r
            blank_makers = r"[\"'\\#$%]"

        def may_make_blanks(line: str) -> bool:
            if keyword.lower() not in line.lower() or line.strip().startswith("#"):
                return False
            # Quotes around a word are harmless; any other of these characters can make a blank.
            if not re.search(blank_makers, re.sub(r'"[^"\s]*"', "", line)):
                return False
            # A line that has neither the first default name nor a variable did not set the default.
            may_set_default = "$" in line or os.path.basename(names[0]) in line
            return may_set_default or joined != self._defaults.text(keyword.lower())

        if len(names) > 1 and any(map(may_make_blanks, lines)):
            raise HostConnectionError(
                f"{target.host}: the file names in {keyword} {joined} are ambiguous: avoid quotes "
                "and blanks in them"
            )
        # `ssh -G` leaves some ~ as they are.
        return tuple(home_path(name.replace("\0", home)) for name in names)

    def log_in(self, settings: HostSettings | LocalConnection) -> Connection:
        """Log in; try again if sshd drops the connection. Raise HostConnectionError on failure."""
        if isinstance(settings, LocalConnection):
            return settings
        for attempt in range(1, CONNECT_ATTEMPTS):
            try:
                return self._log_in(settings)
            except DroppedConnectionError:
                time.sleep(random.uniform(0.1, 0.5) * attempt)
        return self._log_in(settings)

    def _log_in(self, settings: HostSettings) -> SshConnection:
        """Connect and authenticate once."""
        known_keys = find_known_keys(settings.known_names[0], settings.known_hosts_files)
        known_kinds = {known.kind for known in known_keys if not known.marker}
        if known_kinds:
            algorithms = settings.options.algorithms("hostkeyalgorithms")
            default_algorithms = self._defaults.algorithms("hostkeyalgorithms")
            if has_own_order(algorithms, default_algorithms):
                known_kinds = set()  # known keys don't change that order
        try:
            read_twice = any(map(self._is_read_twice, filter(None, settings.jumps.split(","))))
            with self._config_file(read_twice=read_twice) as config:
                connection = SshConnection(settings, self._proxy_command(settings, config))
                try:
                    host_key = connection.negotiate(known_kinds)
                    check_host_key(host_key, settings, connection, self._warn)
                    key_given = bool(self._key_path)
                    Authentication(settings, connection, self.load, key_given).run()
                    connection.transport.set_keepalive(DEAD_PEER_SECONDS // 2)
                except BaseException:
                    connection.close()
                    raise
        except OSError as error:  # too few descriptors, or no such shell
            raise HostConnectionError(f"{settings.name}: can't log in: {error}") from error
        return connection

    def _is_read_twice(self, jump: str) -> bool:
        """Return whether ssh reads its configuration twice for a host of ProxyJump."""
        _, options = self._run_ssh(jump_words(jump))
        return options.is_read_twice

    def _proxy_command(self, settings: HostSettings, config: str) -> list[str]:
        """Return the command that a connection goes through; empty for a direct one."""
        if settings.jumps:
            earlier_jumps, _, last_jump = settings.jumps.rpartition(",")
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            command = ["ssh", "-F", config, "-W", f"{host}:{settings.port}"]
            if earlier_jumps:
                command += ["-J", earlier_jumps]
            return [*command, *jump_words(last_jump)]
        if settings.proxy_command:
            return [os.environ.get("SHELL") or "/bin/sh", "-c", f"exec {settings.proxy_command}"]
        return []


INCLUDE = re.compile(r'^(\s*"?Include"?(?:\s*=\s*|\s+))(.*)$', re.IGNORECASE | re.MULTILINE)
# The empty start of a relative name, or the quote before it: no / and no ~ follows.
RELATIVE_NAME_START = re.compile(r"""^["']?(?![/"'~])""")


def included_names(text: str) -> list[str]:
    """Return the names of files in an Include line, in their quotes, without a comment."""
    names: list[str] = re.findall(r"""#.*|"[^"]*"|'[^']*'|\S+""", text)
    if names and names[-1].startswith("#"):
        names.pop()
    return names


def check_includes(host: str, paths: Iterable[str]) -> None:
    """Raise HostConnectionError if a file of the system's configuration includes relative names.

    Only those in ssh_config itself are made absolute, by `system_configuration`.
    """
    for path in paths:
        if not path.startswith((f"{SYSTEM_DIRECTORY}/", f"{VENDOR_DIRECTORY}/")):
            continue
        for _, names in INCLUDE.findall(os.fsdecode(read_start(path))):
            if any(map(RELATIVE_NAME_START.match, included_names(names))):
                raise HostConnectionError(
                    f"{host}: {path} includes {names} by a relative name, which only "
                    f"{SYSTEM_DIRECTORY}/ssh_config may: make it absolute"
                )


def system_configuration() -> list[str]:
    """Return the lines of the system's ssh_config, with absolute names of included files.

    They become part of another file, from which ssh would look for relative names in ~/.ssh.
    """

    def with_absolute_names(match: re.Match[str]) -> str:
        """Return an Include line that has SYSTEM_DIRECTORY in front of each relative name."""
        keyword = match[1]  # with the blanks or "=" that follow it
        names = []
        for name in included_names(match[2]):
            names.append(RELATIVE_NAME_START.sub(rf"\g<0>{SYSTEM_DIRECTORY}/", name))
        return keyword + " ".join(names)

    path = f"{SYSTEM_DIRECTORY}/ssh_config"
    if not os.path.exists(path):
        path = f"{VENDOR_DIRECTORY}/ssh_config"
    text = os.fsdecode(read_start(path))
    return INCLUDE.sub(with_absolute_names, text).split("\n")


def jump_words(jump: str) -> list[str]:
    """Return ssh's arguments for a host of ProxyJump: a URI, or [USER@]HOST[:PORT]."""
    user, _, address = jump.rpartition("@")
    host, port = split_address(address)
    if "://" in jump or not host:
        return ["--", jump]
    words = []
    if user:
        words.append(f"-l{user}")
    if port:
        words.append(f"-p{port}")
    return [*words, "--", host]


def find_key(path: str) -> str:
    """Return the absolute path of a private key, which can be given by its .pub file as well."""
    path = os.path.abspath(os.path.expanduser(path))
    private_path = path.removesuffix(".pub")
    if os.path.exists(private_path):
        path = private_path
    if not os.path.exists(path):
        raise HostConnectionError(f"can't use the key {path}: No such file or directory")
    if re.search(r'[\n"]|\$\{', path):
        raise UsageError(
            f"-k {path}: ssh_config can't express a name with a line break, a quote or ${{"
        )
    return path


class Authentication:
    """A login by public keys over a connection."""

    def __init__(
        self,
        settings: HostSettings,
        connection: SshConnection,
        load: Callable[[str], paramiko.PKey],
        key_given: bool,
    ) -> None:
        self._settings = settings
        self._connection = connection
        self._load = load
        self._agent = Agent(settings.agent_socket)
        self._key_given = key_given  # then ssh-agent's other keys are not tried
        self._refused: list[str] = []  # titles of keys that the server did not want
        self._unusable: list[str] = []  # why other keys were not tried

    def run(self) -> None:
        """Log in by one of the user's keys; raise HostConnectionError if that fails."""
        name = self._settings.name
        seconds = self._settings.connect_seconds
        try:
            login = PublicKeyLogin(self._connection.transport, self._settings.user, seconds)
            for identity in list_identities(self._settings, self._agent.keys, self._key_given):
                if self._try(login, identity):
                    return
                if login.methods and "publickey" not in login.methods:
                    break
            raise HostConnectionError(f"{name}: {self._explain(login)}")
        except LoginTimedOut as error:
            raise HostConnectionError(
                f"{name}: no answer within {seconds} s during authentication: "
                f"-o ConnectTimeout={4 * seconds} waits longer"
            ) from error
        except LoginEnded as error:
            raise HostConnectionError(f"{name}: {self._explain_end()}") from error
        finally:
            self._agent.close()

    def _try(self, login: PublicKeyLogin, identity: Identity) -> bool:
        """Return whether the server lets the user in by an identity; if not, record why."""
        try:
            blob = identity.blob or self._load_key(identity.path).asbytes()
            algorithm = self._choose_algorithm(login, identity, blob)
            if not algorithm:
                return False
            # An offer saves loading a private key in vain. Without a blob, it is loaded already.
            if not identity.blob or login.offer(algorithm, blob):
                if login.sign(algorithm, blob, self._signer(identity, blob, algorithm)):
                    return True
                if login.is_partial:  # the key was accepted, but isn't enough
                    return False
                if identity.blob:  # the offer was accepted before
                    raise HostConnectionError(
                        f"{identity.title} is authorized for {self._settings.user}, but the login "
                        "was refused: see sshd's log (PermitRootLogin no?)"
                    )
            self._refused.append(identity.title)
        except DroppedConnectionError:  # which `log_in` tries again
            raise
        except HostConnectionError as error:
            self._unusable.append(str(error))
        except (OSError, ValueError, KeyError) as error:  # of ssh-agent, or an unknown algorithm
            self._unusable.append(f"{identity.title} can't sign: {error}")
        return False

    def _load_key(self, path: str) -> paramiko.PKey:
        """Return the private key in a file.

        Raises DroppedConnectionError if the server did not wait for its passphrase.
        """
        key = self._load(path)
        if not self._connection.is_active():
            raise DroppedConnectionError(f"{self._settings.name}: {self._explain_end()}")
        return key

    def _choose_algorithm(self, login: PublicKeyLogin, identity: Identity, blob: bytes) -> str:
        """Return the algorithm for signatures by a key; if there is none, record why, return ""."""
        options = self._settings.options
        kind = key_kind(blob)
        bits = rsa_bits(blob)  # None if it is no RSA key
        smallest = self._settings.smallest_rsa_bits
        # PubkeyAcceptedKeyTypes is the older name of the option.
        allowed = options.algorithms("pubkeyacceptedalgorithms") or options.algorithms(
            "pubkeyacceptedkeytypes"
        )
        offered = login.server_algorithms()
        algorithm = signature_algorithm(kind, allowed, offered)
        if algorithm:
            lacks_sha1 = algorithm.startswith("ssh-rsa") and not self._can_sign_by_sha1(identity)
        else:
            # A server that lists no algorithms is an old one with SHA-1 only: ssh_config excludes
            # that, since there is no algorithm.
            lacks_sha1 = not offered
        if bits is not None and bits < smallest:
            reason = f"has only {bits} bits: RequiredRSASize is {smallest}"
        elif bits is not None and lacks_sha1:
            reason = OLD_SERVER_ADVICE
        elif not algorithm:
            reason = f"is of type {kind}, which PubkeyAcceptedAlgorithms or the server excludes"
        else:
            return algorithm
        self._unusable.append(f"{identity.title} {reason}")
        return ""

    def _can_sign_by_sha1(self, identity: Identity) -> bool:
        return bool(identity.agent_blob) or self._connection.signs_by_sha1

    def _signer(self, identity: Identity, blob: bytes, algorithm: str) -> Callable[[bytes], bytes]:
        """Return what signs for an identity; raise HostConnectionError if it has no usable key."""
        if identity.agent_blob:
            return lambda data: self._agent.sign(identity.agent_blob, data, algorithm)
        if not identity.path:
            raise HostConnectionError(f"{identity.title} has no private key here")
        key = self._load_key(identity.path)
        public_key = certified_key(blob) or blob  # the latter if it is no certificate
        if key.asbytes() != public_key:
            raise HostConnectionError(f"{identity.title} does not match the public key beside it")
        return lambda data: key.sign_ssh_data(data, algorithm.replace(CERTIFICATE, "")).asbytes()

    def _explain(self, login: PublicKeyLogin) -> str:
        """Return why the server did not let the user in."""
        user = self._settings.user
        methods = login.methods
        reasons = []
        if login.is_partial:
            reasons = [
                f"requires {' and '.join(methods)} in addition to the key of {user}, which is not "
                "supported: let sshd accept publickey alone"
            ]
        elif methods and "publickey" not in methods:
            reasons = [
                f"accepts no keys for {user}, only {', '.join(methods)}: its sshd_config needs "
                "PubkeyAuthentication yes"
            ]
        elif self._refused:
            reasons = [f"refused {self._refused_titles()} for {user}: {self._authorize()}"]
        reasons += self._unusable
        if not reasons:
            return "there is no key to log in with: give one with -k, or load one with ssh-add"
        return "; ".join(reasons)

    def _explain_end(self) -> str:
        """Return why the server ended the login."""
        farewell = self._connection.transport.farewell or "connection closed"
        if not self._refused:
            return f"the server ended the login: {farewell}"
        advice = "name the right key with -k, or set IdentitiesOnly"
        if self._key_given:
            advice = self._authorize()
        return (
            f"refused {self._refused_titles()} for {self._settings.user}, and ended the login: "
            f"{farewell}: {advice}"
        )

    def _authorize(self) -> str:
        return f"add the public key to {self._settings.user}'s ~/.ssh/authorized_keys there"

    def _refused_titles(self) -> str:
        """Return the titles of the refused keys; those of ssh-agent share one, with their count."""
        titles = list(dict.fromkeys(self._refused))
        count = self._refused.count(AGENT_KEY)
        return ", ".join(titles).replace(AGENT_KEY, f"{counted(count, 'key')} of ssh-agent")


def resolve(name: str) -> str:
    """Return the IP address of a host given as an address or a name; raise UsageError if none."""
    try:
        if re.fullmatch(r"[\d.]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*", name, re.ASCII):
            return str(ip_address(name))
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"can't resolve {name!r}: {reason}") from error


# ---- Toolstacks ------------------------------------------------------------------------------


class RunCommand(Protocol):
    """A function that runs a shell command on the hypervisor, such as NetWeaver.run_command."""

    def __call__(self, command: str, hint: str = "") -> str:
        """Return the command's output; raise RemoteCommandError, with the hint, if it fails."""


NAME_THE_VIF = "name the VM's interface with --vif"
UUID = r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"


def xe_vif(run: RunCommand, name: str, vif_number: int) -> str:
    """Return a VM's interface on XenServer or XCP-ng, by the VM's name-label or else its UUID."""
    hint = "is xapi running there? (systemctl status xapi)"
    answer = run(xe_dom_id_command(f"name-label={quote(name)}"), hint)
    if not answer.strip() and re.fullmatch(UUID, name):
        answer = run(xe_dom_id_command(f"uuid={name.lower()}"), hint)
    return f"vif{parse_xe_dom_id(answer, name)}.{vif_number}"


def xe_dom_id_command(condition: str) -> str:
    """Return the command that prints the dom-ids of the VMs that meet a condition.

    It prints two lines: the VMs of the whole pool, and of these the ones that run on this host. The
    second line is missing where the host doesn't know its own UUID.
    """
    query = f"xe vm-list {condition} is-control-domain=false params=dom-id --minimal"
    return (
        f"{query} || exit; INSTALLATION_UUID=; "
        "[ ! -r /etc/xensource-inventory ] || . /etc/xensource-inventory; "
        f'[ -z "$INSTALLATION_UUID" ] || {query} resident-on="$INSTALLATION_UUID"'
    )


def parse_xe_dom_id(answer: str, name: str) -> int:
    """Return the domain id in the answer to `xe_dom_id_command`.

    xe succeeds whether it prints one dom-id, several, -1 for a halted VM, nothing if there is no
    VM, or a dom-id on another host of the pool, where a VM of this host may have the same one.
    Raises RemoteCommandError unless exactly one VM runs on this host.
    """
    lines = answer.split("\n")
    in_pool = _split_dom_ids(lines[0])
    running = [dom_id for dom_id in in_pool if dom_id != "-1"]
    local = running  # unless the host knows its own UUID
    if len(lines) > 2:  # two lines, and the empty text after the last newline
        local = _split_dom_ids(lines[1])
    if not in_pool:
        raise UnknownVMError(
            f"there is no VM with the name-label {name!r} (names are case-sensitive; xe vm-list "
            "shows them)"
        )
    if not all(map(is_number, running + local)):
        raise RemoteCommandError(f"xe answered {answer[:80]!r} for {name!r} instead of dom-ids")
    if not running:
        raise RemoteCommandError(
            f"the VM {name!r} is not running (halted or suspended): start it first"
        )
    if not local:
        raise RemoteCommandError(
            f"the VM {name!r} runs on another host of the pool: give that host as --hv"
        )
    if len(local) > 1:
        raise RemoteCommandError(
            f"{len(local)} VMs have the name-label {name!r} (dom-ids {','.join(local)}): make the "
            "name unique, or give the VM's UUID"
        )
    return int(local[0])


def _split_dom_ids(line: str) -> list[str]:
    return [word for word in line.strip().split(",") if word]


def xl_vif(run: RunCommand, name: str, vif_number: int) -> str:
    """Return a domain's interface on Xen without xapi, by the domain's name or UUID."""
    hint = "the VM isn't running, or has another name: xl list shows the running domains"
    listed_id = ""
    if re.fullmatch(UUID, name):
        listed_id = parse_xl_vm_list(run("xl vm-list", hint), name)
    id_in_shell = listed_id or f"`xl domid {_operand(name, '--')}`"
    # xenstore has a vifname only where the domain's configuration names the interface.
    answer = run(
        f"id={id_in_shell} || exit; echo $id; "
        f"xenstore-read /local/domain/0/backend/vif/$id/{vif_number}/vifname 2>/dev/null || :",
        hint,
    )
    domain_id, _, vifname = answer.partition("\n")
    domain_id = domain_id.strip()
    vifname = vifname.strip()
    if not is_number(domain_id):
        raise RemoteCommandError(f"xl answered {answer[:80]!r} for {name!r} instead of a domain ID")
    if domain_id == "0":
        raise RemoteCommandError(f"{name!r} is the control domain, which has no vif")
    return vifname or f"vif{domain_id}.{vif_number}"


def parse_xl_vm_list(answer: str, uuid: str) -> str:
    """Return the domain id of the VM with a UUID, or "" if `xl vm-list` doesn't have it."""
    for line in answer.splitlines():
        words = line.split()  # UUID, id, name
        if len(words) > 1 and words[0].lower() == uuid.lower() and is_number(words[1]):
            return words[1]
    return ""


def _operand(name: str, prefix: str) -> str:
    """Quote a VM's name, with a prefix if it would be taken for an option."""
    if name.startswith("-"):
        return f"{prefix} {quote(name)}"
    return quote(name)


def virsh_vif(run: RunCommand, name: str, vif_number: int) -> str:
    """Return a domain's interface on libvirt, by the domain's name or UUID."""
    hint = (
        "virsh list --all shows the names; systemctl status libvirtd shows whether libvirt is "
        f"running. If it runs in a container, {NAME_THE_VIF}"
    )
    virsh = "LC_ALL=C virsh -r -q"  # read only, and oVirt allows nothing else
    domain = _operand(name, "--domain")
    if re.fullmatch(r"\d+", name, re.ASCII):
        # domiflist would take such a name for an id. domid doesn't, and prints the real id.
        domain = quote(run(f"{virsh} domid {domain}", hint).strip())
    state = "shut off"
    answer = ""
    if domain != "-":  # which domid prints for a domain that is shut off
        answer = run(f"{virsh} domiflist {domain}", hint)
        # A domain that is shut off may list an interface, too.
        state = run(f"{virsh} domstate {domain} || :").strip()
    if state in ("shut off", "crashed"):
        raise RemoteCommandError(f"the domain {name!r} is {state}: start it first (virsh start)")
    return parse_virsh_domiflist(answer, name, vif_number)


def parse_virsh_domiflist(answer: str, name: str, vif_number: int) -> str:
    """Return the name of the interface in a row of virsh's table; rows count from 0.

    Raises RemoteCommandError if there is no such row, or if the interface has no device on the
    host.
    """
    # Old versions print a header and a rule in spite of -q.
    rows = [
        line.split()
        for line in answer.splitlines()
        if line.strip() and not re.match(r"\s*(Interface\s+Type\s|--+\s*$)", line)
    ]
    if vif_number >= len(rows):
        names = ", ".join(row[0] for row in rows) or "none"
        raise RemoteCommandError(
            f"the domain {name!r} has {counted(len(rows), 'interface')}, but no number "
            f"{vif_number} (--num counts from 0; there are: {names})"
        )
    columns = rows[vif_number]  # interface, type, source, model, MAC
    interface = columns[0]
    is_vhost_user = columns[1:2] == ["vhostuser"]  # may have a name, but never a device
    if interface == "-" or is_vhost_user:
        raise RemoteCommandError(
            f"interface {vif_number} of the domain {name!r} has no device on the host (hostdev, "
            "vhost-user, or the domain is shut off): tcpdump can't see it"
        )
    return interface


def qm_vif(run: RunCommand, name: str, vif_number: int) -> str:
    """Return a VM's interface on Proxmox VE, by the VM's name, VMID or UUID."""
    answer = run("qm list", "is this a Proxmox VE host?")
    vmids = [name]
    if re.fullmatch(UUID, name):
        # A VM's configuration is the file VMID.conf, and has the UUID in its line smbios1.
        paths = run(f"grep -il '^smbios1:.*uuid={name}' /etc/pve/qemu-server/*.conf || :").split()
        vmids = [os.path.basename(path).removesuffix(".conf") for path in paths]
    return f"tap{parse_qm_list(answer, name, vmids)}i{vif_number}"


def parse_qm_list(answer: str, name: str, vmids: Iterable[str]) -> int:
    """Return the VMID of the running VM that has this name or, if none has, one of these VMIDs.

    Raises UnknownVMError if this host has no such VM, and RemoteCommandError if none of them is
    running, or several are.
    """
    states: dict[str, str] = {}  # by VMID
    named: defaultdict[str, list[str]] = defaultdict(list)  # VMIDs by name
    for line in answer.splitlines():
        words = line.split()  # VMID, name (which may have blanks), status, memory, disk, PID
        if len(words) >= 6 and is_number(words[0]):
            states[words[0]] = words[-4]
            named[" ".join(words[1:-4])].append(words[0])
    candidates = named[" ".join(name.split())]  # blanks as in the keys
    if not candidates:
        candidates = [vmid for vmid in vmids if vmid in states]
    if not candidates:
        raise UnknownVMError(
            f"there is no VM {name!r} on this host (qm list shows them; a container's interface is "
            "given with --vif veth<id>i<n>)"
        )
    running = [vmid for vmid in candidates if states[vmid] == "running"]
    if not running:
        vmid = candidates[0]
        raise RemoteCommandError(
            f"the VM {name!r} (VMID {vmid}) is {states[vmid]}: start it first (qm start {vmid})"
        )
    if len(running) > 1:
        raise RemoteCommandError(
            f"{len(running)} VMs have the name or UUID {name!r} (VMIDs {', '.join(running)}): "
            "give the VMID as -n"
        )
    return int(running[0])


@dataclass(frozen=True)
class Toolstack:
    """A program that manages VMs, and how to find a VM's interface with it."""

    name: str  # of the program, and as --toolstack
    title: str  # what it manages
    find_vif: Callable[[RunCommand, str, int], str]  # by the VM's name and the vif_number
    # Whether an error of find_vif ends a search through all toolstacks. An UnknownVMError never
    # does, nor does any error of a tool that may be installed where it manages nothing.
    is_final: bool


TOOLSTACKS = {
    toolstack.name: toolstack
    for toolstack in (
        Toolstack("xe", "XenServer, XCP-ng", xe_vif, is_final=True),
        Toolstack("qm", "Proxmox VE", qm_vif, is_final=True),
        Toolstack("virsh", "libvirt", virsh_vif, is_final=False),
        Toolstack("xl", "plain Xen", xl_vif, is_final=False),
    )
}


def describe_toolstacks() -> str:
    """Return the names of all toolstacks and what they manage, for the help."""
    return ", ".join(f"{each.name} ({each.title})" for each in TOOLSTACKS.values())


def find_toolstack(run: RunCommand, name: str, vif_number: int) -> tuple[str, str]:
    """Return the name of the first toolstack that knows a VM, and the VM's interface.

    If no toolstack knows it, raises the error of the first one that is installed.
    """
    names = " ".join(TOOLSTACKS)
    answer = run(f"for tool in {names}; do command -v $tool >/dev/null && echo $tool; done; :")
    installed = answer.split()
    errors: list[RemoteCommandError] = []
    for toolstack in TOOLSTACKS.values():
        if toolstack.name not in installed:
            continue
        try:
            return toolstack.name, toolstack.find_vif(run, name, vif_number)
        except UnknownVMError as error:
            errors.append(error)
        except RemoteCommandError as error:
            if toolstack.is_final:
                raise
            errors.append(error)
    if errors:
        raise errors[0]
    raise RemoteCommandError(
        f"none of {', '.join(TOOLSTACKS)} was found (in a container?): {NAME_THE_VIF}"
    )


# ---- Uplinks ---------------------------------------------------------------------------------

# Names that toolstacks give to the interfaces of VMs and containers.
VM_INTERFACE = (
    r"(vif|tap|emu)\d+\.\d+(-emu)?"  # Xen
    r"|(tap|veth|fwln|fwpr|fwbr)\d+[ip]\d+"  # Proxmox VE
    r"|vnet\d+"  # libvirt
    r"|veth[0-9a-f]{6,}"  # Docker
    r"|(tap|qvb|qvo|qbr)[0-9a-f-]{9,}"  # OpenStack
)
CARD_NAME = r"(eth\d|en[opsxP]|em\d|p\d+p\d|ib\d|wl)\S*"
CONTAINER_NAME = r"veth|v[ebz]-|mac[0-9a-f]{4}|lxc|cali"  # how such names begin
NETBACK_ADDRESS = "fe:ff:ff:ff:ff:ff"  # of all vifs of Xen
# The port name of a VM's function (SR-IOV) on a card that switches by itself.
REPRESENTED_FUNCTION = r"(c\d+)?pf\d+[vs]f\d+"
TUNNEL_KINDS = ("vxlan", "geneve", "gre", "gretap", "ip6gre", "ip6gretap", "stt")
STACKED_KINDS = ("vlan", "macvlan", "macvtap", "ipvlan", "ipvtap", "macsec")
# Stacked on the same interface, those of one group reach each other, except in separate modes.
SIBLING_KINDS = (("macvlan", "macvtap"), ("ipvlan", "ipvtap"))
SEPARATE_MODES = ("vepa", "private", "source")
HOST_KINDS = ("bridge", "openvswitch")  # by these the host takes part in a switch
# Ports of a switch behind which is neither a network card nor a guest.
DEAD_END_KINDS = (*HOST_KINDS, "patch", "ifb")
ETH0_ASSUMED = (
    "the VM's interface is in no bridge, and no route to it was found: eth0 is assumed to be the "
    "physical interface. If it isn't, give the right one with -i"
)
MOST_INTERFACES = 16  # to be captured at once
MOST_TUNNEL_PORTS = 16  # in a filter
MOST_LOOKUPS = 64  # in one command
MOST_NAMES = 40  # in a message
# Prints a line "ovs PARENT BRIDGE PORT..." for each bridge of Open vSwitch, and the settings of all
# interfaces as a line "ovs-interfaces JSON". A bridge is its own parent, unless it is a "fake" one,
# which is a VLAN of its parent. Its local port has its name.
OPEN_VSWITCH_COMMAND = r"""
command -v ovs-vsctl >/dev/null || exit 0
echo "= ovs-interfaces"
ask() { ovs-vsctl --timeout=5 "$@" 2>/dev/null; }
bridges=`ask list-br` || exit 0
for bridge in $bridges; do
  echo "ovs `ask br-to-parent $bridge` $bridge "`ask list-ifaces $bridge`
done
columns=name,type,options,external_ids,ofport
# Not echo, which changes backslashes in some shells.
printf 'ovs-interfaces %s\n' "`ask -f json --columns=$columns list Interface | tr -d '\n'`"
"""


@dataclass(frozen=True)
class Link:
    """A network interface of the hypervisor."""

    name: str
    index: str = ""  # no other interface ever gets it; empty if only Open vSwitch knows this one
    kind: str = ""  # "bridge", "veth", "tun" ...; empty for hardware
    medium: str = ""  # "ether", "loopback" ...
    is_up: bool = True  # by the administrator, with or without a carrier
    address: str = ""  # MAC
    master: str = ""  # the bridge or bond that it belongs to
    switch: str = ""  # the bridge of Open vSwitch that it belongs to, as "ovs NAME"
    lower: str = ""  # the interface on which it is stacked, or the other end of a veth or patch
    remote: str = ""  # the IP address where a tunnel ends
    local: str = ""  # the IP address where it begins
    mode: str = ""  # by which a macvlan or a bond works
    encrypts: bool = False  # MACsec: its frames are encrypted on the interface below
    tunnel_port: int | None = None  # UDP
    function: str = ""  # the port name of a card's function that it represents, as "pf0vf1"
    guest_address: str = ""  # MAC of the VM behind it
    switch_port: int | None = None  # its number in Open vSwitch
    qdisc: str = ""
    queue_length: int | None = None  # in packets
    queues: int | None = None  # for transmission
    rx_dropped: int | None = None
    tx_dropped: int | None = None

    @property
    def is_guest(self) -> bool:
        """Return whether it looks like a VM's interface, or a container's; so does a VPN's tun."""
        return (
            self.kind == "tun"
            or self.address == NETBACK_ADDRESS
            or re.fullmatch(VM_INTERFACE, self.name) is not None
            or re.fullmatch(REPRESENTED_FUNCTION, self.function) is not None
        )

    def leads_to(self, mac: str) -> bool:
        """Return whether the VM behind the interface is known to have a MAC address.

        A macvtap has the VM's address, and a tap of libvirt has it with fe as its first byte.
        """
        return mac in (self.guest_address, self.address) or self.address == f"fe{mac[2:]}"


def parse_links(answer: str) -> dict[str, Link]:
    """Return the interfaces in the output of `ip -o -s -d link`, by name."""
    links = {}
    for line in answer.splitlines():
        link = parse_link(line)
        if link is not None:
            links[link.name] = link
    return links


# -o joins the lines of an interface by backslashes: a general one, the hardware's, and details:
# 5: vif1.0@if2: <UP> mtu 1500 master br0\    link/ether fe:ff:... brd ff:...\    veth numtxqueues 4
LINK_LINE = re.compile(
    r"(?P<index>\d+): (?P<name>[^\s:@]+)(@(?P<lower>[^\s:]+))?: (?P<state>[^\\]*)"
    r"(\\ +link/(?P<medium>\w+) *(?P<address>[0-9a-f:]*)[^\\]*"
    r"(\\ +(?P<kind>[a-z0-9]+)(?=[ \\]|$))?)?"
)
# Lines with words of the user's (alias, altname), or about other interfaces (vf).
FREE_TEXT = re.compile(r"\\ +(alias|altname|vf) [^\\]*")


def parse_link(line: str) -> Link | None:
    """Return the interface in a line of `ip -o -s -d link`; None for any other line."""
    line = FREE_TEXT.sub("", line)
    match = LINK_LINE.match(line)
    if match is None:
        return None
    parts = match.groupdict("")
    state = words_after(parts["state"])
    details = words_after(line[match.end("state") :].replace("\\", " "))
    lower = parts["lower"] or details.get("dev", "")
    if re.fullmatch(r"if\d+|NONE", lower) or "link-netnsid" in details:
        lower = ""  # in another namespace
    switch = ""
    if parts["kind"] == "openvswitch":  # Its bridge is unknown until Open vSwitch is asked.
        switch = "ovs-system"
    return Link(
        name=parts["name"],
        index=parts["index"],
        kind=parts["kind"],
        medium=parts["medium"],
        is_up="UP" in re.split("[<,>]", parts["state"]),
        address=parts["address"],
        master=state.get("master", ""),
        switch=switch,
        lower=lower,
        remote=details.get("remote", ""),
        local=details.get("local", ""),
        mode=details.get("mode", ""),
        encrypts=details.get("encrypt") == "on",
        tunnel_port=whole_number(details.get("dstport")),
        function=details.get("portname", ""),
        qdisc=state.get("qdisc", ""),
        queue_length=whole_number(state.get("qlen")),
        queues=whole_number(details.get("numtxqueues")),
        rx_dropped=_dropped(line, "RX:"),
        tx_dropped=_dropped(line, "TX:"),
    )


def _dropped(line: str, heading: str) -> int | None:
    """Return the dropped packets in the statistics under "RX:" or "TX:"; None if not printed."""
    _, _, table = line.partition(heading)
    names, _, values = table.partition("\\")  # the numbers are in the next line
    counters = dict(zip(names.split(), values.split()))
    return whole_number(counters.get("dropped"))


def words_after(text: str) -> dict[str, str]:
    """Return the word that follows each word, by that word; its first occurrence counts."""
    following: dict[str, str] = {}
    for word, next_word in pairwise(text.split()):
        following.setdefault(word, next_word)
    return following


def whole_number(text: str | None) -> int | None:
    """Return the number in a text; None if it is not a number, or too long for a counter."""
    if text is None or not re.fullmatch(r"\d{1,20}", text, re.ASCII):
        return None
    return int(text)


class Links:
    """The network interfaces of a host, and how they are connected.

    A switch is a bridge of Linux, by its name, or one of Open vSwitch, as "ovs NAME".
    """

    def __init__(self, answer: str) -> None:
        """Read the output of `ip -o -d link`, and of OPEN_VSWITCH_COMMAND if it was run."""
        self.by_name = parse_links(answer)
        for line in answer.splitlines():
            kind, _, words = line.partition(" ")
            if kind == "ovs":
                self._add_open_vswitch(words.split())
            elif kind == "ovs-interfaces":
                self._add_settings(words)
        self._ports: defaultdict[str, list[str]] = defaultdict(list)  # by switch
        self._stacked: defaultdict[str, list[str]] = defaultdict(list)  # by the interface below
        for name, link in self.by_name.items():
            for switch in self.switches(name):
                self._ports[switch].append(name)
            if link.lower and link.kind in STACKED_KINDS:
                self._stacked[link.lower].append(name)

    @cached_property
    def has_hardware(self) -> bool:
        """Return whether the host has a network card, which no container has."""
        return any(
            not link.kind and link.medium == "ether" and not link.is_guest
            for link in self.by_name.values()
        )

    def names(self) -> str:
        """Return the names of the kernel's interfaces, for a message."""
        names = sorted(link.name for link in self.by_name.values() if link.index)
        return shortened([name for name in names if name != "lo"])

    def get(self, name: str) -> Link:
        """Return an interface; one that isn't there has only its name."""
        return self.by_name.get(name, Link(name))

    def switches(self, name: str) -> list[str]:
        """Return the switches, or the bond, that an interface belongs to; a VRF is neither."""
        link = self.get(name)
        switches = [switch for switch in (link.switch, link.master) if switch]
        return [switch for switch in switches if self.get(switch).kind != "vrf"]

    def leads_out(self, name: str) -> bool:
        """Return whether an interface may lead out of the host: not a loopback or dummy one."""
        link = self.get(name)
        return bool(name) and link.medium != "loopback" and link.kind != "dummy"

    def vrf(self, names: Iterable[str]) -> str:
        """Return the first VRF that one of these interfaces belongs to, or ""."""
        for name in names:
            master = self.get(name).master
            if self.get(master).kind == "vrf":
                return master
        return ""

    def stacked_on(self, name: str) -> list[Link]:
        """Return the VLANs and the like on an interface."""
        return [self.by_name[stacked] for stacked in self._stacked[name]]

    def siblings(self, name: str) -> list[Link]:
        """Return the interfaces stacked beside an interface that it reaches within the host."""
        start = self.get(name)
        for kinds in SIBLING_KINDS:
            if start.lower and start.kind in kinds and start.mode not in SEPARATE_MODES:
                return [
                    link
                    for link in self.stacked_on(start.lower)
                    if link.kind in kinds and link.mode not in SEPARATE_MODES and link.name != name
                ]
        return []

    def is_cable_end(self, name: str) -> bool:
        """Return whether an interface is one of the two ends of a veth or patch on this host."""
        lower = self.get(name).lower
        return bool(lower) and self.get(lower).lower == name

    def next_hops(self, name: str) -> list[str]:
        """Return the next hops of frames that leave a switch by an interface, or enter a switch.

        There are none if the frames go no further within the host.
        """
        link = self.get(name)
        if self.is_cable_end(name):
            return self.switches(link.lower)
        if link.encrypts:  # The VM's packets can't be recognised on the interface below.
            return []
        if link.lower and link.kind in ("", *STACKED_KINDS):  # busybox prints no kinds
            return [link.lower]
        if link.kind == "openvswitch" and name != "ovs-system":  # the host's port of a bridge
            return self.switches(name)
        return self._ports[name]

    def tunnel_ports(self) -> dict[int, str]:
        """Return the UDP ports at which the host receives tunnels, with their kinds."""
        ports = dict(TUNNEL_PORTS)
        for link in self.by_name.values():
            is_udp = link.kind in (VXLAN, GENEVE)
            if is_udp and link.tunnel_port and len(ports) < MOST_TUNNEL_PORTS:
                ports[link.tunnel_port] = link.kind
        return ports

    def _add_open_vswitch(self, names: Sequence[str]) -> None:
        """Add a bridge; `names` are those of its parent, of the bridge, and of its other ports."""
        if not names:
            return
        parent = names[0]
        for port in names:
            link = replace(self.get(port), switch=f"ovs {parent}")
            if link.master == "ovs-system":  # the kernel's single switch behind all bridges
                link = replace(link, master="")
            self.by_name[port] = link
        self.by_name[parent] = replace(self.get(parent), kind="openvswitch")

    def _add_settings(self, text: str) -> None:
        """Read the table of Open vSwitch's interfaces; the text is empty if that is stopped."""
        try:
            table = json.loads(text)
            for values in table["data"]:
                self._add_setting(dict(zip(table["headings"], values)))
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            return

    def _add_setting(self, row: Report) -> None:
        link = self.get(str(row["name"]))
        kind = str(row["type"])
        # A map is ["map", [[name, value], ...]] (RFC 7047, section 5.1).
        options = {name: str(value) for name, value in row["options"][1]}
        identifiers = {name: str(value) for name, value in row["external_ids"][1]}
        if kind == "internal":  # for the kernel a "tun" where Open vSwitch doesn't use its module
            kind = "openvswitch"
        elif kind.startswith("dpdk"):
            kind = "dpdk"
        elif kind not in ("patch", *TUNNEL_KINDS):
            kind = link.kind
        self.by_name[link.name] = replace(
            link,
            kind=kind,
            lower=options.get("peer", link.lower),
            remote=options.get("remote_ip", link.remote),
            local=options.get("local_ip", link.local),
            tunnel_port=whole_number(options.get("dst_port")) or link.tunnel_port,
            guest_address=identifiers.get("attached-mac", "").lower(),
            switch_port=whole_number(str(row["ofport"])),
        )


def shortened(names: Sequence[str]) -> str:
    """Join names for a message, which gives only the first ones of many."""
    if len(names) > MOST_NAMES:
        return f"{', '.join(names[:MOST_NAMES])}, ..."
    return ", ".join(names)


class Ways:
    """The ways that the frames of a VM may take through a host, and out of it."""

    def __init__(self, links: Links, vif: str) -> None:
        """Follow the frames from a VM's interface through all switches."""
        self.tunnels: list[Link] = []
        self.guests: list[Link] = []  # interfaces of other VMs and containers
        self.dpdk: list[str] = []
        self.down: list[str] = []  # interfaces by which packets could come in if they were up
        self._links = links
        self._cards: set[str] = set()
        self._substitutes: set[str] = set()  # what may lead out of a host without cards
        self._visited = {vif}  # interfaces and switches
        self._follow(links.switches(vif) or links.next_hops(vif))
        for link in links.stacked_on(vif):  # the host may take apart what a VM has tagged itself
            self._follow(links.switches(link.name))
        self.guests += links.siblings(vif)

    @property
    def pifs(self) -> set[str]:
        """The physical interfaces or, in a host without cards, what most likely leads out of it."""
        likely = {name for name in self._substitutes if not re.match(CONTAINER_NAME, name)}
        return self._cards or likely or self._substitutes

    @property
    def gateways(self) -> list[str]:
        """The host's own interfaces in the visited switches, and on them: it may route there."""
        links = self._links.by_name.values()
        return sorted(link.name for link in links if link.index and self._is_gateway(link))

    def _is_gateway(self, link: Link) -> bool:
        if link.name in self._visited:
            return link.kind in HOST_KINDS
        lower = self._links.get(link.lower)
        if lower.name not in self._visited or self._links.switches(link.name):
            return False
        # The VM's frames came by another VLAN on the switch, since this one wasn't visited.
        if link.kind == "vlan" and self._has_entered_vlan(lower.name):
            return False
        return link.kind == "veth" or lower.kind in HOST_KINDS

    def _has_entered_vlan(self, switch: str) -> bool:
        """Return whether the VM's frames get to a switch by a VLAN interface on it."""
        stacked = self._links.stacked_on(switch)
        return any(link.kind == "vlan" and link.name in self._visited for link in stacked)

    @property
    def open_vswitches(self) -> list[str]:
        """The names of the bridges of Open vSwitch that were visited."""
        names = (name.removeprefix("ovs ") for name in self._visited if name.startswith("ovs "))
        return sorted(names)

    def follow_host(self, names: Iterable[str]) -> None:
        """Follow the packets that the host itself sends by interfaces."""
        for name in names:
            link = self._links.get(name)
            if name in self._visited or link.medium == "loopback":
                continue
            if link.kind == "vrf":
                self._visited.add(name)
                members = self._links.by_name.values()
                self._follow([member.name for member in members if member.master == name])
            elif link.is_guest and not self._links.next_hops(name):
                # The host doesn't route by a guest's interface: it is a VPN's tun.
                self._visited.add(name)
                self._cards.add(name)
            else:
                self._follow([name])

    def _follow(self, names: Iterable[str]) -> None:
        """Follow frames from interfaces and switches to all tunnels, cards and guests."""
        todo = list(names)
        while todo:
            name = todo.pop()
            if name in self._visited:
                continue
            self._visited.add(name)
            link = self._links.get(name)
            hops = self._links.next_hops(name)
            if link.kind in TUNNEL_KINDS:
                self.tunnels.append(link)
            elif hops:
                todo += hops
            elif link.kind == "dpdk":
                self.dpdk.append(name)
            elif link.kind not in DEAD_END_KINDS and not self._links.is_cable_end(name):
                self._end(link)

    def _end(self, link: Link) -> None:
        """Decide whether an interface leads out of the host or to a guest.

        A host without hardware is a container or a namespace: veths lead out of it, too.  By an
        interface that is down nothing comes in, and tcpdump can't capture there.
        """
        if not link.is_up and not link.is_guest:
            self.down.append(link.name)
            return
        is_virtual = link.kind in ("veth", "dummy")
        if link.is_guest or (is_virtual and self._links.has_hardware):
            self.guests.append(link)
        elif is_virtual and not re.fullmatch(CARD_NAME, link.name):  # It may lead to either.
            self._substitutes.add(link.name)
            self.guests.append(link)
        elif link.index:  # Open vSwitch also lists interfaces that are gone.
            self._cards.add(link.name)


class RouteKind(Enum):
    """The ways in which packets get from the physical interfaces to a VM."""

    GIVEN = "given"  # by interfaces that the user chose
    SWITCHED = "switched"
    ROUTED = "routed"  # by the host, which may translate addresses
    ASSUMED = "assumed"  # nothing is known


@dataclass(frozen=True)
class Route:
    """The way from the physical interfaces to a VM."""

    kind: RouteKind
    is_tunnelled: bool = False


def find_uplinks(
    run: RunCommand, vif: str, links: Links, sources: Mapping[str, str]
) -> tuple[list[str], Route]:
    """Return the interfaces by which packets for a VM come in, and their route.

    `sources` are the MAC addresses ("" if unknown) by IP address. The packets of a source that is a
    VM of this host come in by that VM's interface. Raises RemoteCommandError if the interfaces
    can't be found.
    """
    ways = Ways(links, vif)
    kind = RouteKind.SWITCHED
    local = local_sources(run, links, ways, sources)
    all_local = bool(sources) and len(local) == len(sources)
    follow_tunnels(run, links, ways)
    # If nothing leads out of the VM's switches, the host may route packets by one of these.
    host_interfaces = [vif, *ways.gateways]
    if not all_local and not ways.pifs and is_gateway(run, host_interfaces):
        kind = RouteKind.ROUTED
        ways.follow_host(route_interfaces(run, sources, links.vrf(host_interfaces)))
        follow_tunnels(run, links, ways)
        local = local_sources(run, links, ways, neighbours(run, sources))
        all_local = bool(sources) and len(local) == len(sources)
    pifs = set(local.values())
    if not all_local:
        pifs |= ways.pifs
    problem = ""
    if not pifs:
        reason = _why_no_uplink(vif, links, ways, kind)
        problem = f"can't find the physical interface: {reason}"
    elif len(pifs) > MOST_INTERFACES:
        problem = f"{len(pifs)} interfaces lead to {vif}: give with -i those that the traffic uses"
    if problem:
        raise RemoteCommandError(f"{problem} (there are: {links.names()})")
    return sorted(pifs), Route(kind, bool(ways.tunnels) and not all_local)


def _why_no_uplink(vif: str, links: Links, ways: Ways, kind: RouteKind) -> str:
    if vif not in links.by_name:
        return f"{vif} doesn't exist. Check --num or --vif"
    switches = links.switches(vif)
    reason = f"{vif} is in no bridge"
    if switches:
        bridge = switches[0].removeprefix("ovs ")
        reason = f"the bridge {bridge} of {vif} has no physical interface"
    if ways.dpdk:
        reason = f"the bridge of {vif} uses DPDK ({shortened(ways.dpdk)}), which tcpdump can't see"
    elif ways.tunnels:
        names = [tunnel.name for tunnel in ways.tunnels]
        reason = f"the interface that carries the tunnel {shortened(names)} isn't known"
    elif ways.down:
        reason = f"{vif} is connected to {shortened(ways.down)}, which is down"
    if kind is RouteKind.ROUTED:
        reason += " (the host routes its packets)"
    if ways.guests:
        names = [guest.name for guest in ways.guests]
        reason += f" (if the source is a VM of this host, give its interface: {shortened(names)})"
    return f"{reason}. Give the physical interface with -i"


def neighbours(run: RunCommand, sources: Mapping[str, str]) -> dict[str, str]:
    """Return the MAC addresses of sources, with unknown ones from the host's neighbour table."""
    macs = dict(sources)
    for line in _ask_each(run, "ip neigh show to {}", sorted(sources)):
        address = line.partition(" ")[0]
        if not macs.get(address):
            macs[address] = words_after(line).get("lladdr", "")
    return macs


def local_sources(
    run: RunCommand, links: Links, ways: Ways, sources: Mapping[str, str]
) -> dict[str, str]:
    """Return the interfaces of the sources that are on the VM's switches, by IP address.

    These are guests, or the host itself.
    """
    macs = {address: mac.lower() for address, mac in sources.items() if mac}
    local = host_sources(run, links, ways, macs)
    if not macs or not ways.guests:
        return local
    learned = learned_addresses(run, links, ways, sorted(set(macs.values())))
    for address, mac in macs.items():
        for guest in ways.guests:
            if guest.leads_to(mac) or (guest.name, mac) in learned:
                local[address] = guest.name
    return local


def host_sources(
    run: RunCommand, links: Links, ways: Ways, macs: Mapping[str, str]
) -> dict[str, str]:
    """Return the host's interfaces on the VM's switches for sources that are the host itself."""
    gateways = {links.get(name).address: name for name in ways.gateways}
    local = {}
    for address, mac in macs.items():
        if mac in gateways:  # which interfaces of other switches may share
            for name in interfaces_with(run, [address]):
                local[address] = name if name in ways.gateways else gateways[mac]
    return local


def learned_addresses(
    run: RunCommand, links: Links, ways: Ways, macs: Sequence[str]
) -> set[tuple[str, str]]:
    """Return pairs (interface, MAC address): where switches have learned these MAC addresses."""
    pattern = " ".join(f"-e {quote(mac)}" for mac in macs[:MOST_LOOKUPS])
    bridges = " ".join(quote(name) for name in ways.open_vswitches)
    show = 'ovs-appctl --timeout=5 fdb/show "$bridge" | sed "s/^/ovs $bridge /"'
    answer = run(
        f"{{ bridge fdb show; for bridge in {bridges}; do {show}; done; }} 2>/dev/null "
        f"| grep -iF {pattern} || :"
    )
    ports = {}  # the guests' interfaces in Open vSwitch, by "ovs BRIDGE NUMBER"
    for guest in ways.guests:
        for switch in links.switches(guest.name):
            ports[f"{switch} {guest.switch_port}"] = guest.name
    learned = set()
    for line in answer.splitlines():
        words = line.split()
        if words[1:2] == ["dev"] and len(words) > 2:  # MAC dev NAME ...
            learned.add((words[2], words[0].lower()))
        elif len(words) > 4:  # ovs, bridge, port, VLAN, MAC, age
            learned.add((ports.get(" ".join(words[:3]), ""), words[4].lower()))
    return learned


def follow_tunnels(run: RunCommand, links: Links, ways: Ways) -> None:
    """Follow all tunnels to the interfaces that carry them, also tunnels in tunnels."""
    followed = 0
    while followed < len(ways.tunnels):
        tunnels = ways.tunnels[followed:]
        followed = len(ways.tunnels)
        ways.follow_host(tunnel_carriers(run, links, tunnels))


def tunnel_carriers(run: RunCommand, links: Links, tunnels: Sequence[Link]) -> list[str]:
    """Return the interfaces by which the host sends the packets of tunnels.

    The forwarding table of a tunnel with many remote ends has their addresses. If no route to them
    is known, the interfaces with the tunnels' local addresses are returned.
    """
    carriers = [tunnel.lower for tunnel in tunnels if links.leads_out(tunnel.lower)]
    unbound = [tunnel for tunnel in tunnels if not links.leads_out(tunnel.lower)]
    remotes = {tunnel.remote for tunnel in unbound}
    multipoint = [tunnel for tunnel in unbound if not is_address(tunnel.remote)]
    names = [tunnel.name for tunnel in multipoint]
    for line in _ask_each(run, "bridge fdb show dev {}", names):
        entry = words_after(line)
        remotes.add(entry.get("dst", ""))
        if "via" in entry:
            carriers.append(entry["via"])
    carriers += route_interfaces(run, remotes)
    if not carriers:
        addresses = sorted({tunnel.local for tunnel in multipoint if is_address(tunnel.local)})
        carriers += interfaces_with(run, addresses)
    return carriers


def interfaces_with(run: RunCommand, addresses: Sequence[str]) -> list[str]:
    """Return the host's interfaces that have one of these IP addresses."""
    lines = [line.split() for line in _ask_each(run, "ip -o addr show to {}", addresses)]
    return [words[1] for words in lines if len(words) > 1]  # index, interface, address ...


def is_address(text: str) -> bool:
    """Return whether a text looks like an IP address, unlike "" or "any"."""
    return re.fullmatch(r"[0-9A-Fa-f.:]{2,45}", text) is not None


def is_gateway(run: RunCommand, names: Sequence[str]) -> bool:
    """Return whether the host has routes to networks by any of these interfaces."""
    routes = _ask_each(run, "ip -4 -o route show table all dev {}", names)
    routes += _ask_each(run, "ip -6 -o route show table all dev {}", names)
    # Every interface that is up has routes to fe80::/64 (link-local) and "multicast ff00::/8".
    return any(not re.match(r"(\w+ )?(fe80:|ff00:)", route) for route in routes if route)


def route_interfaces(run: RunCommand, addresses: Iterable[str], vrf: str = "") -> list[str]:
    """Return the interfaces by which the host sends packets to IP addresses, in a VRF if given.

    `fibmatch`, which old kernels don't know, shows all interfaces of a route with several.
    """
    look_up = "ip -o route get {0}"
    if vrf:
        look_up += f" vrf {quote(vrf)}"
    command = "{{ " + f"{look_up} fibmatch || {look_up}" + "; }}"  # doubled for str.format
    lines = _ask_each(run, command, sorted(filter(is_address, addresses)))
    routes = [line for line in lines if not line.startswith("local ")]  # to the host itself
    hops = [hop.split() for route in routes for hop in route.split("\\")]
    names: list[str] = []
    for hop in hops:
        if "dead" not in hop:
            names += [name for word, name in pairwise(hop) if word == "dev"]
    return list(dict.fromkeys(names))


def _ask_each(run: RunCommand, command: str, subjects: Sequence[str]) -> list[str]:
    """Return the lines that a command prints for several subjects, each in place of its {}.

    Subjects for which it fails, and those after the first MOST_LOOKUPS, have no lines.
    """
    if not subjects:
        return []
    commands = [command.format(quote(subject)) for subject in subjects[:MOST_LOOKUPS]]
    return run(f"{{ {'; '.join(commands)}; }} 2>/dev/null || :").splitlines()


def physical_interfaces(
    run: RunCommand,
    asked: Sequence[str],
    vif: str,
    links: Links | None,
    sources: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Sequence[str], Route]:
    """Return the physical interfaces to capture on, and the route from them to the vif.

    `asked` is what the user gives as -i: interfaces, "auto", or nothing. Without `links` these are
    the interfaces; otherwise they are found. If that fails, the user gave nothing, and the vif is
    connected to no other interface, eth0 is assumed.
    """
    if links is None:
        return asked, Route(RouteKind.GIVEN)
    try:
        return find_uplinks(run, vif, links, sources)
    except RemoteCommandError:
        link = links.get(vif)
        is_connected = links.switches(vif) or link.lower or link.kind in STACKED_KINDS
        if asked or vif == "eth0" or is_connected or "eth0" not in links.by_name:
            raise
        return ["eth0"], Route(RouteKind.ASSUMED)


# ---- Platform --------------------------------------------------------------------------------

MERGING_OFFLOADS = (
    "generic-receive-offload",
    "generic-segmentation-offload",
    "large-receive-offload",
    "rx-gro-hw",
    "tcp-segmentation-offload",
)
# Prints sections headed by "= NAME", and starts few processes. Offloads are those of cards, but not
# of their virtual functions (which have a physfn). The last status is that of tcpdump.
FACTS_COMMAND = r"""{
echo "= kernel"; read -r line </proc/sys/kernel/osrelease; echo "$line"
echo "= directory"; echo "${TMPDIR:-/tmp}"
echo "= free"; df -Pk "${TMPDIR:-/tmp}"
echo "= link"; ip -o -s -d link || ip -o link
echo "= ovs"; ovs-vsctl --version
echo "= backend"; cat /etc/xensource/network.conf
for d in /sys/class/net/*/device; do
  [ ! -e "$d" ] || [ -e "$d/physfn" ] || {
    p=${d%/device} p=${p##*/}; echo "= offloads $p"; ethtool -k "$p"
  }
done
echo "= tcpdump"; tcpdump --help 2>&1; printf '\n= status\n%s\n' $?
} 2>/dev/null"""


class Facts:
    """The state of a hypervisor before a run.

    Attributes:
        tcpdump: the usage message of its tcpdump
        has_tcpdump: whether tcpdump can be run
        directory: where captures are written
        free_bytes: the free space there; None if it isn't known
        links: the network interfaces by name
        interfaces: the text on all interfaces, for `Links`
    """

    def __init__(self, answer: str) -> None:
        """Read the output of FACTS_COMMAND, and of OPEN_VSWITCH_COMMAND if it was run."""
        self._sections: defaultdict[str, str] = defaultdict(str)
        for section in f"\n{answer}".split("\n= "):
            name, _, body = section.partition("\n")
            self._sections[name.strip()] = body
        self.tcpdump = self._sections["tcpdump"]
        # The shell's status 126 means that a command can't be executed, and 127 that it is missing.
        self.has_tcpdump = self._sections["status"].split() not in (["126"], ["127"])
        self.links = parse_links(self._sections["link"])
        self.interfaces = self._sections["link"] + "\n" + self._sections["ovs-interfaces"]
        self.directory = self._sections["directory"].strip()
        self.free_bytes: int | None = None
        table = self._sections["free"].split()
        if len(table) > 2:  # the last words: available KiB, use in percent, mounted on
            kib = whole_number(table[-3])
            self.free_bytes = None if kib is None else kib * 1024

    def platform(self, vif: str) -> dict[str, object]:
        """Return what is known of the platform (RFC 8172), for the report."""
        version = re.search(r"^tcpdump version (\S+)", self.tcpdump, re.MULTILINE)
        known = {
            "kernel": self._sections["kernel"].partition("\n")[0],
            "tcpdump": version[1] if version else "",
            "switch": self._switch(vif),
            "vif": self._queue(vif),
        }
        return {name: value for name, value in known.items() if value}

    def offloads(self, pif: str) -> list[str]:
        """Return the offloads of a physical interface that merge or split segments and are on."""
        lines = self._sections[f"offloads {pif}"].splitlines()
        active = {line.partition(": on")[0] for line in lines if ": on" in line}
        return [name for name in MERGING_OFFLOADS if name in active]

    def _switch(self, vif: str) -> str:
        """Return the kind and version of the switch of a VM's interface; "" if that isn't known."""
        master = self.links[vif].master if vif in self.links else ""
        backend = self._sections["backend"].strip()  # of XenServer and XCP-ng, for all interfaces
        if master == "ovs-system" or (not master and backend in ("openvswitch", "vswitch")):
            # The line is: ovs-vsctl (Open vSwitch) 2.17.7
            version = re.search(r"\) (\d[\d.]{1,20})(?:\s|$)", self._sections["ovs"], re.ASCII)
            return f"Open vSwitch {version[1]}" if version else "Open vSwitch"
        return "bridge" if master or backend else ""

    def _queue(self, vif: str) -> dict[str, object]:
        """Return the queue of a VM's interface, and what it has dropped before the run."""
        link = self.links.get(vif, Link(vif))
        known: dict[str, object] = {
            "qdisc": link.qdisc or None,
            "queue_length": link.queue_length,
            "queues": link.queues,
            "before": drop_counters(link),
        }
        return {name: value for name, value in known.items() if value is not None}


def drop_counters(link: Link) -> dict[str, int] | None:
    """Return the packets that an interface has dropped, for the report; None if that isn't known.

    "tx" is towards the VM.
    """
    if link.rx_dropped is None or link.tx_dropped is None:
        return None
    return {"rx_dropped": link.rx_dropped, "tx_dropped": link.tx_dropped}


# ---- Traffic ---------------------------------------------------------------------------------

USUAL_COUNT = 1000  # packets
USUAL_RATE = 100  # packets a second
LONGEST_INTERVAL = 999_999  # µs; hping3 waits for ever where it is a second or longer
ENDLESS = 999_999_999  # packets, for a source that is stopped before it has sent them all


@dataclass(frozen=True)
class Pattern:
    """A kind of traffic that a program generates on the sources.

    hping3 sends each packet from another port, as a new flow, unless -k keeps the port.
    """

    command: str  # with placeholders, see Traffic.source_command
    protocol: int  # distinguishes the probes from a load
    usual_size: int  # bytes of payload
    largest_size: int  # bytes of payload: 65,535 without the headers of IPv4 and of the protocol


PATTERNS = {
    "syn": Pattern(
        command="hping3 -q -c {count} -i u{interval} -S -d {size} -p {port} {destination}",
        protocol=TCP,
        usual_size=0,
        largest_size=65495,
    ),
    "flow": Pattern(
        command="hping3 -q -c {count} -i u{interval} -S -k -d {size} -p {port} {destination}",
        protocol=TCP,
        usual_size=0,
        largest_size=65495,
    ),
    "udp": Pattern(
        command="hping3 -q -c {count} -i u{interval} --udp -k -E /dev/urandom -d {size} -p {port}"
        " {destination}",
        protocol=UDP,
        usual_size=64,
        largest_size=65507,
    ),
    "ping": Pattern(
        command="hping3 -q -c {count} -i u{interval} --icmp -d {size} {destination}",
        protocol=ICMP,
        usual_size=64,
        largest_size=65507,
    ),
}
# For IPv6, which hping3 lacks, for the largest echoes, and for sources without hping3.  All
# versions of ping understand an interval in seconds.  The summary goes to standard error, as
# hping3's does.
PING_COMMAND = "ping -q -c {count} -i {seconds} -s {size} -W 1 {destination} >&2"
# -1 stands for a protocol that no pattern has.
HPING3_PROTOCOLS = {
    "-0": -1,
    "--rawip": -1,
    "-1": ICMP,
    "--icmp": ICMP,
    "-2": UDP,
    "--udp": UDP,
}
FASTEST_PING = 1000  # packets a second
LARGEST_ECHO_OF_HPING3 = 65495  # bytes of payload


@dataclass(frozen=True)
class Traffic:
    """The packets that the sources send: those of a pattern, or of a command of the user's."""

    pattern: str = "syn"  # one of PATTERNS; without meaning if there is a command
    rate: int = USUAL_RATE  # packets a second
    size: int | None = None  # bytes of payload; None for the usual size
    port: int | None = None  # of the destination; None for port 0
    command: str | None = None  # a shell command that sends the packets, with placeholders
    load: str | None = None  # a shell command that the sources run meanwhile; it is not measured

    @property
    def name(self) -> str:
        """The name for people and for the directory of a saved run, such as "syn-100"."""
        kind = "command" if self.command else self.pattern
        name = f"{kind}-{self.rate}"
        if self.size:
            name += f"-{self.size}B"
        if self.load:
            name += "-load"
        return name

    @property
    def probe_filter(self) -> ProbeFilter | None:
        """The filter that separates the packets from the load's; None if there is no load."""
        if not self.load:
            return None
        protocol = PATTERNS[self.pattern].protocol
        if protocol == ICMP:
            return ProbeFilter(protocol, None)
        return ProbeFilter(protocol, self.port or 0)

    def template(self, destination: str, has_hping3: bool = True) -> str:
        """Return the command that sends the packets, with placeholders as {count}."""
        if self.command:
            return self.command
        if self.pattern == "ping":
            is_too_large = (self.size or 0) > LARGEST_ECHO_OF_HPING3
            if ":" in destination or is_too_large or not has_hping3:
                return PING_COMMAND
        return PATTERNS[self.pattern].command

    def source_command(self, count: int, destination: str, has_hping3: bool = True) -> str:
        """Return the shell command that sends `count` packets.

        Raises UsageError if it ignores an option, or can't send such packets.
        """
        template = self.template(destination, has_hping3)
        self._check_effects(template)
        if not self.command:
            self._check_bounds(template, destination)
        size = self.size
        if size is None:
            size = PATTERNS[self.pattern].usual_size
        interval = max(1, round(1_000_000 / self.rate))  # microseconds
        values = {
            "count": str(count),
            "interval": str(min(interval, LONGEST_INTERVAL)),
            "size": str(size),
            "port": str(self.port or 0),
            "destination": destination,
        }
        if template == PING_COMMAND:  # A user's command has no such placeholder.
            values["seconds"] = f"{interval / 1_000_000:.6f}".rstrip("0").rstrip(".")
        command = template
        if not size and not self.command:  # hping3 refuses a file for data without a size
            command = command.replace(" -E /dev/urandom", "")
        for name, value in values.items():
            command = command.replace(f"{{{name}}}", value)
        return command

    def _check_effects(self, template: str) -> None:
        """Raise UsageError for an option that the command doesn't use."""
        chosen = f"--traffic {self.pattern}"
        uses_rate = "{interval}" in template or "{seconds}" in template
        if self.command:
            chosen = "--source-command"
            uses_rate = "{interval}" in template
        unused = []
        if self.rate != USUAL_RATE and not uses_rate:
            unused.append("--rate")
        if self.size is not None and "{size}" not in template:
            unused.append("--size")
        if self.port is not None and "{port}" not in template:
            unused.append("--port")
        if unused:
            raise UsageError(
                f"{unused[0]} has no effect with {chosen}, whose command has no placeholder for "
                f"it: {template}"
            )

    def _check_bounds(self, template: str, destination: str) -> None:
        """Raise UsageError if the pattern's program or protocol can't do what is asked for."""
        chosen = f"--traffic {self.pattern}"
        if ":" in destination and template != PING_COMMAND:
            others = "--traffic ping" if self.load else "--traffic ping or --source-command"
            raise UsageError(f"{chosen}: hping3 has no IPv6. Use {others}")
        if template == PING_COMMAND and self.rate > FASTEST_PING:
            raise UsageError(
                f"--rate {self.rate}: ping (used over IPv6, for large sizes, and where hping3 is "
                f"missing) sends at most {FASTEST_PING} packets a second"
            )
        largest = PATTERNS[self.pattern].largest_size
        if self.size is not None and self.size > largest:
            raise UsageError(
                f"--size {self.size}: a packet of {chosen} has at most {largest} bytes of payload"
            )
        if self.load and self._looks_like(self.load):
            raise UsageError(
                f"--load {self.load!r} sends packets of the same protocol and port as {chosen}, "
                "so they can't be told apart: choose another protocol or port"
            )

    def _looks_like(self, load: str) -> bool:
        """Return whether a load's packets certainly look like those of the pattern."""
        sent = protocol_and_port(load)
        if sent is None:
            return False
        load_protocol, load_port = sent
        if load_protocol != PATTERNS[self.pattern].protocol:
            return False
        return load_protocol == ICMP or load_port == str(self.port or 0)

    def to_json(self) -> Report:
        """Return the traffic for the document, in which a command has no pattern."""
        document = asdict(self)
        if self.command:
            document["pattern"] = None
        return document

    @classmethod
    def from_json(cls, document: Report) -> Traffic:
        """Return the traffic that a document describes; ValueError if it describes none."""
        return cls(
            pattern=json_value(document, "pattern", str, None) or "syn",
            rate=json_value(document, "rate", int, USUAL_RATE),
            size=json_value(document, "size", int, None),
            port=json_value(document, "port", int, None),
            command=json_value(document, "command", str, None),
            load=json_value(document, "load", str, None),
        )


USUAL_TRAFFIC = Traffic()


def protocol_and_port(command: str) -> tuple[int, str] | None:
    """Return the protocol and port of the packets that a command sends by hping3 or ping.

    The port is text, which is empty for ping. Returns None for other commands.
    """
    try:
        words = split_words(command)
    except ValueError:
        return None
    programs = [os.path.basename(word) for word in words]
    if "ping" in programs:
        return ICMP, ""
    if "hping3" not in programs:
        return None
    options = words[programs.index("hping3") :]
    protocol = TCP
    for option in options:
        protocol = HPING3_PROTOCOLS.get(option, protocol)
    port = "0"
    for option, value in pairwise(options):
        if option in ("-p", "--destport"):
            port = value
    return protocol, port


def resolve_destination(name: str, sources: Sequence[str], traffic: Sequence[Traffic]) -> str:
    """Return the address of a VM that the traffic and the sources can reach.

    A name may have several addresses: its first IPv4 address is returned if hping3, which has no
    IPv6, sends the traffic, or if a source has an IPv4 address; otherwise its first address. Raises
    UsageError if it has none.
    """
    first = resolve(name)
    try:
        entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return first
    addresses = [str(socket_address[0]) for _, _, _, _, socket_address in entries]
    ipv4 = [address for address in addresses if ":" not in address]
    uses_hping3 = any(not kind.command and kind.pattern != "ping" for kind in traffic)
    if ipv4 and (uses_hping3 or has_ipv4_address(sources)):
        return ipv4[0]
    return first


def has_ipv4_address(sources: Iterable[str]) -> bool:
    """Return whether the first address of any source is IPv4."""
    for source in sources:
        try:
            address = resolve(Target(source).host)
        except UsageError:  # It may be a name that only ssh_config knows.
            continue
        if ":" not in address:
            return True
    return False


def json_value(document: Report, name: str, kind: type, default: Any) -> Any:
    """Return a value of a JSON document, or the default if it has none of that name.

    Raises ValueError if the value is of another kind. An integer is accepted as a float, and a list
    only if all its items are strings.
    """
    value = document.get(name, default)
    if value is default:
        return value
    if kind is float and type(value) is int:
        return float(value)
    # To isinstance a bool is an int, too.
    valid = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if valid and isinstance(value, list):
        valid = all(isinstance(item, str) for item in value)
    if not valid:
        raise ValueError(f"{name} is {value!r}")
    return value


# ---- Run information -------------------------------------------------------------------------


@dataclass(frozen=True)
class RunKind:
    """The properties that compared runs must share."""

    vm: str  # RunInfo.subject
    direction: str
    traffic: Traffic | None


WINDOW_TIMES = ("start", "end", "watched_until")  # in the document


def iso_time(nanoseconds: int) -> str:
    """Return a time as ISO 8601 in UTC, with nanoseconds."""
    seconds, fraction = divmod(nanoseconds, NANOSECONDS)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{fraction:09}Z"


def parse_time(text: str) -> int:
    """Return the time (ns) in a text of `iso_time`; ValueError for another text."""
    seconds = timegm(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S"))
    return seconds * NANOSECONDS + int(text[20:29])  # the nine digits after the point


def window_to_json(window: Window) -> dict[str, str]:
    """Return a window for the document, without the wait, which stands beside it."""
    return {name: iso_time(getattr(window, name)) for name in WINDOW_TIMES}


def window_from_json(document: Mapping[str, str]) -> Window:
    """Return a document's window, without the wait; ValueError or KeyError if it is damaged."""
    start, end, watched_until = [parse_time(document[name]) for name in WINDOW_TIMES]
    return Window(start, end, watched_until)


def in_config(
    json_type: type,
    default: Any = None,
    *,
    with_files: bool = False,
    optional: bool = False,
    encode: Callable[[Any], Any] = lambda value: value,
    decode: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """Return a field of RunInfo whose value the document's `config` has under the same name.

    In the document the value is of the type `json_type`, which `encode` returns and `decode` takes.
    If the captures were given as files, only fields `with_files` are written.  An `optional` field
    isn't written if it is None.
    """
    metadata = {
        "json_type": json_type,
        "with_files": with_files,
        "optional": optional,
        "encode": encode,
        "decode": decode,
    }
    if isinstance(default, (list, dict)):  # empty: a new one for each RunInfo
        return field(default_factory=json_type, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunInfo:
    """The description of a run: the document's `config`.

    With files instead of a measurement only the first fields are known.
    """

    pif: str = in_config(str, "", with_files=True)  # interfaces or files, separated by commas
    vif: str = in_config(str, "", with_files=True)
    selection: Selection = field(default_factory=Selection)  # of the packets in the captures
    sources: list[str] = in_config(list, [], with_files=True)
    destination: str | None = in_config(str, with_files=True)
    labels: dict[str, str] = in_config(dict, {}, with_files=True)
    version: str = in_config(str, __version__, with_files=True)
    measured: bool = False
    hypervisor: str | None = in_config(str)
    name_label: str | None = in_config(str)
    toolstack: str | None = in_config(str)  # None: the vif was given
    overlay: bool = in_config(bool, False)
    # From the pif to the vif:
    route: RouteKind | None = in_config(str, encode=attrgetter("value"), decode=RouteKind)
    filter: str | None = in_config(str)  # that replaces the selection's
    # None: nothing was sent, and whatever passed was measured
    traffic: Traffic | None = in_config(dict, encode=Traffic.to_json, decode=Traffic.from_json)
    source_command: str | None = in_config(str)
    pif_command: str = in_config(str, "")
    vif_command: str = in_config(str, "")
    capture_limit: int | None = in_config(int)  # packets in each capture
    wait: float = in_config(float, 0.0)  # seconds for the last packets
    timeout: float = in_config(float, 0.0)  # seconds for the traffic
    platform: Report = in_config(dict, {})
    # In ns since 1970; None: unknown, as of captures that were made elsewhere.
    started: int | None = in_config(str, optional=True, encode=iso_time, decode=parse_time)
    duration: float | None = in_config(float, optional=True)  # of the traffic, in seconds
    # Packets, if all sources report it:
    transmitted: int | None = in_config(int, optional=True)
    # Sources that have sent to the end; 0 if one failed meanwhile, so that it is unknown:
    senders: int | None = in_config(int, optional=True)
    achieved_rate: float | None = None  # packets a second of each source, as the pif has seen them
    # None: only the files tell when the points were watched
    window: Window | None = in_config(
        dict, optional=True, encode=window_to_json, decode=window_from_json
    )
    # Behind the vif, if the kernel's trace is there:
    backend: str | None = in_config(str, optional=True)
    incidents: list[str] = in_config(list, [])

    @property
    def direction(self) -> str:
        """The direction's name, or "both"."""
        return self.selection.direction

    @property
    def subject(self) -> str:
        """The VM's name or, if that isn't known, another name for what was measured."""
        if self.name_label:
            return self.name_label
        if self.measured:
            return self.vif
        return self.destination or "captures"

    @property
    def traffic_name(self) -> str:
        """The name of the traffic; empty if it isn't known."""
        if self.traffic:
            return self.traffic.name
        return "passive" if self.measured else ""

    @property
    def kind(self) -> RunKind:
        """The properties that runs compared with this one must share."""
        return RunKind(self.subject, self.direction, self.traffic)

    def to_json(self) -> Report:
        """Return the document's `config`."""
        document = dict(_selection_to_json(self.selection))
        for info_field in fields(self):
            value = getattr(self, info_field.name)
            metadata = info_field.metadata
            if not metadata or (metadata["optional"] and value is None):
                continue
            if self.measured or metadata["with_files"]:
                if value is not None:
                    value = metadata["encode"](value)
                document[info_field.name] = value
        if document.get("traffic"):
            document["traffic"]["achieved"] = self.achieved_rate
        return document

    @classmethod
    def from_json(cls, config: Report) -> RunInfo:
        """Return the run that a document's `config` describes.

        Raises ValueError, KeyError, TypeError or AttributeError if it is damaged.
        """
        values = {}
        for info_field in fields(cls):
            name = info_field.name
            metadata = info_field.metadata
            if metadata and config.get(name) is not None:
                value = json_value(config, name, metadata["json_type"], None)
                values[name] = metadata["decode"](value)
        selection = _selection_from_json(config)
        # Only a measurement has traffic in its `config`, which is null if it sent nothing.
        info = cls(**values, selection=selection, measured="traffic" in config)
        if not all(isinstance(value, str) for value in info.labels.values()):
            raise ValueError("labels are not strings")
        if info.traffic:
            info.achieved_rate = json_value(config["traffic"], "achieved", float, None)
        if info.window:
            info.window = replace(info.window, wait=int(info.wait * NANOSECONDS))
        return info


def _selection_to_json(selection: Selection) -> Report:
    probes = selection.probes
    return {
        "direction": selection.direction,
        "match_nat": selection.translated,
        "selection": {
            "sources": list(selection.sources),
            "destinations": list(selection.destinations),
            "excluded_sources": list(selection.excluded_sources),
            "probes": [probes.protocol, probes.port] if probes else None,
            "tunnel_ports": {str(port): kind for port, kind in selection.tunnel_ports.items()},
        },
    }


def _selection_from_json(config: Report) -> Selection:
    document = json_value(config, "selection", dict, {})
    direction = json_value(config, "direction", str, "in")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}")
    probe_filter = None
    if document.get("probes"):
        protocol, port = document["probes"]
        probe_filter = ProbeFilter(int(protocol), None if port is None else int(port))
    tunnel_ports = dict(TUNNEL_PORTS)
    for port_number, kind in json_value(document, "tunnel_ports", dict, {}).items():
        if kind not in TUNNEL_PORTS.values():
            raise ValueError(f"tunnel_ports: {kind!r}")
        tunnel_ports[int(port_number)] = kind
    return Selection(
        directions=DIRECTIONS[direction],
        sources=json_value(document, "sources", list, []),
        destinations=json_value(document, "destinations", list, []),
        excluded_sources=tuple(json_value(document, "excluded_sources", list, [])),
        translated=json_value(config, "match_nat", bool, False),
        probes=probe_filter,
        tunnel_ports=tunnel_ports,
    )


# ---- Planning --------------------------------------------------------------------------------

SNAPLEN = 192  # bytes of a frame: Ethernet, two tags, IPv6, and TCP, also in a tunnel of the VM's
OVERLAY_SNAPLEN = 448  # the same inside a tunnel
BUFFER_KIB = 16384  # of tcpdump
LARGEST_PACKET_LIMIT = (1 << 31) - 1  # that tcpdump accepts
SMALLEST_FILE = 1 << 16  # bytes for which there must be room
USUAL_FILE = 256_000_000  # bytes that a capture may have however few packets are sent
SHORTEST_WAIT = 0.1  # seconds to wait for the last packets


@dataclass(frozen=True)
class Interfaces:
    """The hypervisor's interfaces between which the delay is measured."""

    vif: str
    pifs: tuple[str, ...]  # several for the members of a bond
    tunnelled: bool  # on the pifs the traffic is inside a tunnel
    tunnel_ports: Mapping[int, str]  # UDP ports at which the host receives tunnels, by kind
    route: RouteKind
    toolstack: str | None  # that named the vif; None if the user did


@dataclass(frozen=True)
class CaptureCommand:
    """A shell command that writes a capture of an interface to its standard output."""

    point: str  # "pif" or "vif"
    interface: str
    command: str


@dataclass(frozen=True)
class Plan:
    """Everything that will run, decided before any traffic is sent."""

    info: RunInfo  # of the run, as far as it is known before
    interfaces: Interfaces
    facts: Facts
    captures: tuple[CaptureCommand, ...]  # those of the pifs, and then that of the vif
    largest_file: int  # bytes
    trace: str  # shell commands that trace the kernel beside the captures, or ""
    expected: int | None  # packets that each source sends; None if that isn't known
    load: str | None  # a shell command that the sources run beside the source command
    ends_itself: bool  # the source command ends, rather than being stopped

    def lines(self) -> list[str]:
        """Return lines for people on what would run on the hypervisor."""
        lines = [f"hypervisor: {self.info.hypervisor}"]
        if self.info.toolstack:
            lines.append(f"toolstack: {self.info.toolstack}")
        lines += [f"vif: {self.info.vif}", f"pif: {self.info.pif}"]
        return lines + [f"{self.info.hypervisor}: {capture.command}" for capture in self.captures]


def make_captures(
    facts: Facts,
    interfaces: Interfaces,
    selection: Selection,
    expression: str | None,
    commands: Mapping[str, str | None],
    count: int,
) -> tuple[tuple[CaptureCommand, ...], int | None, int]:
    """Return the capture commands, their packet limit, and the size (bytes) of the largest file.

    `expression` replaces the filter; `commands` are the user's own capture commands by point, or
    None. With one of these there is no packet limit (None).  `count` is the number of packets that
    all sources send.
    """
    pifs = interfaces.pifs
    if commands["pif"]:
        pifs = pifs[:1]  # the user's command runs once, whatever it captures on
    points = [("pif", pif) for pif in pifs]
    points.append(("vif", interfaces.vif))
    snaplen = OVERLAY_SNAPLEN if interfaces.tunnelled else SNAPLEN
    largest_record = RECORD_HEADER + snaplen
    # Four times the packets leave room for both directions, and for an open port's handshakes.
    wanted = max(USUAL_FILE, 4 * count * largest_record)
    room = capture_room(facts, wanted, len(points))
    packet_limit = min(room // largest_record, LARGEST_PACKET_LIMIT)
    captures = []
    for point, interface in points:
        command = commands[point]
        if not command:
            pcap_filter = expression or capture_filter(
                facts, interfaces, selection, point, interface
            )
            command = tcpdump_command(interface, pcap_filter, facts, snaplen, packet_limit)
        captures.append(CaptureCommand(point, interface, command))
    if any(commands.values()):
        return tuple(captures), None, wanted
    return tuple(captures), packet_limit, PCAP_HEADER + room


def check_can_capture(facts: Facts, interfaces: Interfaces) -> None:
    """Raise UsageError if the VM's interface is among the pifs, CaptureError without tcpdump."""
    if interfaces.vif in interfaces.pifs:
        if interfaces.route is RouteKind.GIVEN:
            raise UsageError(
                f"-i {interfaces.vif}: this is the VM's own interface. Give the physical one, or "
                "-i auto"
            )
        raise UsageError(
            f"the packets come in by {interfaces.vif}, which is the VM's own interface. Give the "
            "physical one with -i"
        )
    if not facts.has_tcpdump:
        raise CaptureError(
            f"can't run tcpdump: {last_line(facts.tcpdump)}. Install it: apt-get install tcpdump, "
            "or yum install tcpdump"
        )


def capture_room(facts: Facts, wanted: int, captures: int) -> int:
    """Return how many bytes of half the free space a capture may use; CaptureError if too few."""
    if facts.free_bytes is None:
        return wanted
    room = min(wanted, facts.free_bytes // 2 // captures)
    if room < SMALLEST_FILE:
        raise CaptureError(
            f"no space left in {facts.directory} ({counted(facts.free_bytes, 'byte')} free). Make "
            "room there"
        )
    return room


def capture_filter(
    facts: Facts, interfaces: Interfaces, selection: Selection, point: str, interface: str
) -> str:
    """Return the pcap-filter(7) expression for the selected packets on an interface."""
    link = facts.links.get(interface)
    ethernet = link is None or link.medium == "ether"
    if point == "vif":
        return selection.vif_filter(ethernet)
    return selection.pif_filter(ethernet, interfaces.tunnelled)


def tcpdump_command(
    interface: str, expression: str, facts: Facts, snaplen: int, packet_limit: int
) -> str:
    """Return the shell command that writes a pcap of an interface to its standard output.

    The large buffer and the nanosecond stamps need tcpdump 4.0 and 4.6; -p leaves the interface's
    mode alone.
    """
    words = ["exec tcpdump -i", quote(interface), "-p -nn -s", str(snaplen)]
    if "[ -B size ]" in facts.tcpdump:
        words.append(f"-B {BUFFER_KIB}")
    if "--time-stamp-precision" in facts.tcpdump:
        words.append("--time-stamp-precision=nano")
    words.append(f"-c {packet_limit} -w - -- {quote(expression)}")
    return " ".join(words)


class Hosts:
    """The connections of a run: to the hypervisor, and to the sources that can be used."""

    def __init__(
        self, hypervisor: Host, sources: dict[str, Host], failed: dict[str, NetWeaverError]
    ) -> None:
        self.hypervisor = hypervisor
        self.sources = sources
        self.failed = failed  # the errors of the other sources, by name
        self._all = {hypervisor, *sources.values()}  # also sources that fail later
        self.exclude({})  # raises an error if no source is left

    def exclude(self, errors: Mapping[str, NetWeaverError]) -> None:
        """Remove failed sources; raise the first error of all if none is left."""
        self.failed.update(errors)
        for name in errors:
            del self.sources[name]
        if self.failed and not self.sources:
            raise next(iter(self.failed.values()))

    def on_sources(self, call: Callable[[Host], T]) -> dict[str, T]:
        """Call a function with all sources at once, and exclude those for which it fails."""
        answers, errors = attempt_all(lambda name: call(self.sources[name]), self.sources)
        self.exclude(errors)
        return answers

    def close(self, wait: bool) -> None:
        """End all that still runs; without `wait` the hosts do so when the connections are gone."""
        try:
            if wait:
                in_parallel(*(host.leave for host in self._all))
        finally:
            for host in self._all:
                host.close()


def attempt_all(
    call: Callable[[str], T], names: Iterable[str], seconds: float = 5 * CONNECT_SECONDS
) -> tuple[dict[str, T], dict[str, NetWeaverError]]:
    """Call a function with each name, all in parallel; return its answers and errors by name.

    Raises NoAnswerError if a call doesn't end within so many seconds.
    """
    answers: dict[str, T] = {}
    errors: dict[str, NetWeaverError] = {}

    def attempt(name: str) -> None:
        try:
            answers[name] = call(name)
        except NetWeaverError as error:
            errors[name] = error

    names = list(names)
    calls = [partial(attempt, name) for name in names]
    in_parallel(*calls, seconds=seconds)
    in_order = {name: answers[name] for name in names if name in answers}
    return in_order, errors


def connect_hosts(
    settings: Sequence[HostSettings], connect: Callable[[HostSettings], Host], asks: bool
) -> Hosts:
    """Connect to all hosts at once: the hypervisor, which is the first, and the sources.

    Sources that can't be reached are left out, unless none is left.  With `asks` there is time for
    a person who is asked for a passphrase.
    """
    by_name = {host_settings.name: host_settings for host_settings in settings}
    slowest = max(
        (host.connect_seconds for host in settings if isinstance(host, HostSettings)), default=0
    )
    seconds = 5 * max(CONNECT_SECONDS, slowest)
    if asks:
        seconds += PERSON_SECONDS
    hosts, failed = attempt_all(lambda name: connect(by_name[name]), by_name, seconds)
    hypervisor, *sources = [host_settings.name for host_settings in settings]
    try:
        if hypervisor in failed:
            raise failed[hypervisor]
        connected = {name: hosts[name] for name in sources if name in hosts}
        return Hosts(hosts[hypervisor], connected, failed)
    except NetWeaverError:
        for host in hosts.values():
            host.close()
        raise


def addresses_in_traffic(host: Host, destination: str, is_needed: bool) -> dict[str, str]:
    """Return the IP addresses that a source's packets to the destination may come from.

    These are the one under which the source was reached, and the one that its routing chooses:
    management and traffic often have networks of their own. The value of each is the MAC address,
    or "" if the packets go by a router. Raises RemoteCommandError if the destination can't be
    reached, or if an address is needed and none is known.
    """
    job = host.run(f"ip -o route get {destination}; ip -o link")
    if "unreachable" in job.errors:
        raise RemoteCommandError(f"{host.name}: can't reach {destination}: {last_line(job.errors)}")
    route = words_after(job.output.partition("\n")[0])
    link = parse_links(job.output).get(route.get("dev", ""), Link(""))
    mac = "" if "via" in route else link.address
    known = {}
    for address in (host.address, route.get("src", "")):
        is_same_version = (":" in address) == (":" in destination)
        if is_address(address) and is_same_version:
            known[resolve(address)] = mac
    if is_needed and not known:
        raise RemoteCommandError(
            f"{host.name}: can't find the source address of its packets to {destination}: use "
            f"--filter, such as 'src host ADDRESS and dst host {destination}'"
        )
    return known


def try_traffic(traffic: Traffic, destination: str, has_hping3: bool, host: Host) -> None:
    """Raise RemoteCommandError if a source can't send the traffic.

    A pattern is tried with one packet that the source sends to itself.  What else a command of the
    user's would do is unknown: only its program is looked for.
    """
    commands = [traffic.template(destination, has_hping3)]
    if traffic.load:
        commands.append(traffic.load)
    for command in commands:
        program = command.split()[0]
        is_plain = re.fullmatch(r"[\w./+-]+", program, re.ASCII)  # not the shell's own syntax
        if is_plain and host.run(f"command -v {program}").status:
            raise RemoteCommandError(
                f"{host.name}: {program}: not found. Install it there, or send other traffic"
            )
    if not traffic.command:
        loopback = "::1" if ":" in destination else "127.0.0.1"
        command = traffic.source_command(1, loopback, has_hping3)
        check_generator(host.run(f"exec >/dev/null\n{command}"), command, host.sudo)


def without_absent_vif(plan: Plan, settings: Settings) -> tuple[Plan, list[str]]:
    """Return the plan without the capture of a vif that isn't there, and a warning about that.

    A vif exists only while its VM runs.  If the user names it, no toolstack has been asked whether
    the VM runs, and a dry run may come before the VM's start.
    """
    vif = plan.interfaces.vif
    links = plan.facts.links
    if settings.vif != vif or not links or vif in links:
        return plan, []
    names = ", ".join(sorted(links)[:MOST_NAMES])
    warning = f"{vif} doesn't exist yet (there are: {names}). Start the VM, or check --vif"
    captures = tuple(capture for capture in plan.captures if capture.point == "pif")
    return replace(plan, captures=captures), [warning]


def try_captures(host: Host, plan: Plan, control: RunControl) -> list[str]:
    """Start the captures of a plan and end them; return the warnings for a report.

    Raises CaptureError if one of them can't run.
    """
    captures = RunningCaptures(host, plan, control)
    captures.wait_until_listening()
    incidents = captures.incidents()
    captures.stop()
    captures.job.leave()
    return incidents


def traffic_seconds(settings: Settings, traffic: Traffic, ends_itself: bool) -> float:
    """Return the time after which the sources are stopped."""
    count = settings.packets(traffic)
    if ends_itself:  # At least 10 minutes, time for 5 packets a second, and twice what is planned.
        return settings.timeout or max(600, count // 5, 2 * count // traffic.rate)
    return settings.duration or count / traffic.rate


def make_plan(
    settings: Settings,
    traffic: Traffic,
    info: RunInfo,
    interfaces: Interfaces,
    facts: Facts,
    commands: Mapping[str, str | None],
) -> Plan:
    """Decide everything that will run.

    `info` describes the run as far as it is known, and its selection the traffic.  `commands` are
    the user's own capture commands by point, or None.
    """
    selection = info.selection
    count = settings.packets(traffic)
    check_can_capture(facts, interfaces)
    captures, packet_limit, largest_file = make_captures(
        facts,
        interfaces,
        selection,
        settings.capture_filter,
        commands,
        count * max(1, len(info.sources)),
    )
    trace = ""
    if settings.stages:
        trace = trace_command(
            settings.direction,
            interfaces.vif,
            interfaces.pifs,
            packets_per_second=traffic.rate * max(1, len(selection.sources)),
            free_bytes=facts.free_bytes,
        )
    ends_itself = not settings.duration and not traffic.load
    expected = None
    if ends_itself and "{count}" in traffic.template(selection.destinations[0]):
        expected = count
    info = replace(
        info,
        selection=captured_selection(selection, interfaces, settings.capture_filter),
        pif_command="\n".join(capture.command for capture in captures[:-1]),
        vif_command=captures[-1].command,
        capture_limit=packet_limit,
        timeout=traffic_seconds(settings, traffic, ends_itself),
    )
    return Plan(
        info=info,
        interfaces=interfaces,
        facts=facts,
        captures=captures,
        largest_file=largest_file,
        trace=trace,
        expected=expected,
        load=traffic.load,
        ends_itself=ends_itself,
    )


def captured_selection(
    selection: Selection, interfaces: Interfaces, capture_filter: str | None
) -> Selection:
    """Return the selection that the analysis applies to the captured packets.

    It leaves out the addresses that the captures' filter has tested already. `capture_filter` is
    the user's filter, if there is one: it may capture packets of any source.
    """
    both = len(selection.directions) > 1
    # Under NAT a packet can only be recognised by the address of its source.
    recognisable = not selection.translated or (selection.sources and not capture_filter)
    if both or (interfaces.tunnelled and recognisable):
        # The filter doesn't distinguish directions, and can't always look into a tunnel.
        sources = [] if capture_filter else selection.sources
        return replace(selection, sources=sources)
    answering: Sequence[str] = ()
    # A user's filter may capture answers, too. Under NAT the VM has another address on the vif.
    if capture_filter and not selection.translated:
        answering = tuple(selection.destinations)
    return replace(selection, sources=[], destinations=[], excluded_sources=answering)


# ---- Recording -------------------------------------------------------------------------------

CLOCK_DRIFT = 200e-6  # by which the rates of two clocks may differ, if one is free-running
HANDED_OVER_SECONDS = 1.0  # for which the kernel keeps blocks of captured packets at most
LOAD_SECONDS = 1.0  # from the start of the load to that of the probes
SIGTERM_STATUS = "143"  # the exit status that shells report of a command that SIGTERM has ended
# What tcpdump prints at its end, and what the document calls it.
TCPDUMP_COUNTS = {
    "captured": "captured",
    "received by filter": "received",
    "dropped by kernel": "dropped",
    "dropped by interface": "dropped_by_interface",
}


@dataclass
class Recording:
    """The captures of a run, which are still on the hypervisor."""

    plan: Plan
    info: RunInfo
    job: Job  # whose directory has the files
    files: FileSource  # the session in which they can be fetched
    counts: dict[str, Counter[str]]  # what tcpdump printed at its end, by point
    trace: TraceStatus
    interrupted: bool


@dataclass(frozen=True)
class CaptureFiles:
    """The captures of a run in a directory of this machine."""

    directory: str
    paths: dict[str, list[str]] = field(default_factory=lambda: {"pif": [], "vif": []})  # by point


@dataclass
class RunControl:
    """The connection of a run with its caller: waiting for jobs, and the end by a signal."""

    tick: Callable[[float], None]  # called each second of the traffic
    changed: threading.Condition = field(default_factory=threading.Condition)
    reportable: bool = False  # an interruption now leaves something to report on
    interrupted: bool = False

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait for a condition on the jobs; return whether it came true in time."""
        with self.changed:
            return self.changed.wait_for(condition, seconds)

    def interrupt(self) -> bool:
        """End the traffic if there is something to report on; return whether there is."""
        with self.changed:
            self.interrupted = self.reportable
            self.changed.notify_all()
            return self.reportable

    def watch(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait as `wait_until` does, and call `tick` each second with the seconds so far."""
        start = time.monotonic()
        elapsed = 0.0
        while elapsed < seconds:
            if self.wait_until(condition, min(1, seconds - elapsed)):
                return True
            elapsed = time.monotonic() - start
            self.tick(elapsed)
        return False


class RunningCaptures:
    """The captures of a plan, and the kernel's trace, as one job on the hypervisor.

    Creating it starts the job.  Each line of the job's standard error begins with the capture's
    number, from 1.
    """

    def __init__(self, host: Host, plan: Plan, control: RunControl) -> None:
        self.host = host
        self._plan = plan
        self._control = control
        commands = [capture.command for capture in plan.captures]
        script = [CAPTURES, plan.trace]
        for number, command in enumerate(commands, 1):
            script.append(f"capture {number} {quote(command)}")
        script.append("until wait; do :; done")  # a trapped signal ends a wait
        # Captures also run while the sources start and end: there is time for six answers.
        seconds = plan.info.timeout + plan.info.wait + 6 * ANSWER_SECONDS
        self.job = host.start("\n".join(script), seconds, private=True, shown=commands)

    def wait_until_listening(self) -> None:
        """Wait for all captures and for the trace; raise CaptureError if a capture has ended."""
        self._control.wait_until(self._is_ready, ANSWER_SECONDS)
        self.check()

    def _is_ready(self) -> bool:
        if self.job.ended:
            return True
        if self._plan.trace and not trace_status(self.job.errors):
            return False
        return all(map(is_listening, self.messages()))

    @property
    def trace(self) -> TraceStatus:
        """The status of the kernel's trace."""
        return trace_status(self.job.errors) or TraceStatus(running=False)

    def messages(self) -> list[list[str]]:
        """Return the lines that each capture has printed; after its end, the last is its status."""
        messages: list[list[str]] = [[] for _ in self._plan.captures]
        for line in self.job.errors.splitlines():
            number, _, text = line.partition(" ")
            if is_number(number) and 1 <= int(number) <= len(messages):
                messages[int(number) - 1].append(text)
        return messages

    @property
    def has_ended(self) -> bool:
        """Return whether any of the captures has ended."""
        return self.job.ended or any(map(exit_status, self.messages()))

    def _have_all_ended(self) -> bool:
        return self.job.ended or all(map(exit_status, self.messages()))

    def check(self) -> None:
        """Raise CaptureError if a capture has ended unexpectedly."""
        self.host.check_job(self.job)
        for capture, lines in zip(self._plan.captures, self.messages()):
            status = exit_status(lines)
            if status is None:
                if self.job.ended:
                    why = last_line(self.job.errors)
                    raise CaptureError(f"{self.job.name}: the captures can't run: {why}")
            elif not self._has_ended_well(status, lines):
                self._raise_ended(capture, lines, status)

    def _has_ended_well(self, status: str, lines: Sequence[str]) -> bool:
        """Return whether a capture has ended as it was asked to, or at its packet limit."""
        limit = self._plan.info.capture_limit
        if limit is None:  # a command of the user's, which needn't handle SIGTERM
            return self.job.stopped and status in ("0", SIGTERM_STATUS)
        is_full = tcpdump_counts(lines).get("captured", 0) >= limit
        return status == "0" and (self.job.stopped or is_full)

    def _raise_ended(self, capture: CaptureCommand, lines: Sequence[str], status: str) -> NoReturn:
        """Raise CaptureError for a capture that has ended, with its messages and what to do.

        Raises HostConnectionError instead if the whole job ends as its connection or shell does.
        """
        if not self.job.stopped:  # Captures may end shortly before the job that they belong to.
            self._control.wait_until(lambda: self.job.ended, HEARTBEAT_SECONDS)
            self.host.check_job(self.job)
        messages = [line.strip() for line in lines[:-1] if "listening on" not in line]
        why = "; ".join(messages)[-500:] or "no message"
        raise CaptureError(
            f"{self.job.name}: the capture on {capture.interface} ended with status {status}: {why}"
            f"{self._hint(capture, why)}"
        )

    def _hint(self, capture: CaptureCommand, why: str) -> str:
        route = self._plan.interfaces.route
        return capture_hint(self._plan.facts, capture, why, self.host.sudo, route)

    def stop(self) -> bool:
        """End the captures, and check their ends; return False if one had to be killed."""
        self.job.stop()
        # The trace may take longer to end, see `guard`; the job ends with it.
        seconds = ANSWER_SECONDS if self._plan.trace else KILL_SECONDS
        have_stopped = self._control.wait_until(self._have_all_ended, KILL_SECONDS)
        if have_stopped and self._control.wait_until(lambda: self.job.ended, seconds):
            self.check()
            return True
        self.job.kill()
        if not self._control.wait_until(lambda: self.job.ended, ANSWER_SECONDS):
            raise CaptureError(f"{self.job.name}: a capture could not be stopped")
        self.host.check_job(self.job)
        return False

    def uncounted(self) -> list[str]:
        """Return a warning if our tcpdump did not print what it dropped."""
        names = [
            capture.interface
            for capture, lines in zip(self._plan.captures, self.messages())
            if "dropped" not in tcpdump_counts(lines)
        ]
        if not names or self._plan.info.capture_limit is None:  # a command of the user's
            return []
        return [
            f"tcpdump on {', '.join(names)} reported no counts: packets that it dropped may be "
            "counted as lost"
        ]

    def counts(self) -> dict[str, Counter[str]]:
        """Return what tcpdump printed at its end, by point."""
        totals: dict[str, Counter[str]] = {"pif": Counter(), "vif": Counter()}
        for capture, lines in zip(self._plan.captures, self.messages()):
            totals[capture.point].update(tcpdump_counts(lines))
        return totals

    def incidents(self) -> list[str]:
        """Return warnings about what impairs the measurement, as far as known at its start."""
        incidents = []
        for capture, lines in zip(self._plan.captures, self.messages()):
            if not is_listening(lines):
                incidents.append(
                    f"the {capture.point}'s capture command didn't report that it was listening: "
                    "packets at the start may be missing"
                )
        if self._plan.trace and not self.trace.running:
            incidents.append(self.trace.warning)
        commands = " ".join(capture.command for capture in self._plan.captures)
        outdated = re.search(r"libpcap version (0\.\d|1\.[0-8])\b", self._plan.facts.tcpdump)
        if outdated and re.search(r"\bvlan\b", commands):
            incidents.append(
                f"with libpcap {outdated[1]} the keyword vlan in --filter matches no outgoing "
                "frames: test the bytes instead, such as ether[12:2] = 0x8100"
            )
        return incidents


def exit_status(lines: Sequence[str]) -> str | None:
    """Return the exit status of a capture that has printed these lines; None while it runs."""
    if lines and lines[-1].startswith("exit "):
        return lines[-1].removeprefix("exit ")
    return None


def is_listening(lines: Sequence[str]) -> bool:
    """Return whether a capture that has printed these lines listens, or has ended."""
    return exit_status(lines) is not None or any("listening on" in line for line in lines)


def tcpdump_counts(lines: Iterable[str]) -> dict[str, int]:
    """Return the numbers of packets that tcpdump prints at its end, as far as it did."""
    counts = {}
    for line in lines:
        singular = line.strip().replace("packets ", "packet ")  # as tcpdump prints it for 1 packet
        number, _, words = singular.partition(" packet ")
        if words in TCPDUMP_COUNTS and is_number(number):
            counts[TCPDUMP_COUNTS[words]] = int(number)
    return counts


def capture_hint(
    facts: Facts, capture: CaptureCommand, why: str, sudo: bool, route: RouteKind
) -> str:
    """Return what to do about a capture that can't run, for the end of its error.

    `why` is what tcpdump printed.  Returns "" if nothing can be advised.
    """
    if "permi" in why:  # "permission", "not permitted"
        return "" if sudo else " (log in as root, or use --sudo)"
    if "No such device" not in why and "doesn't exist" not in why:
        return ""
    names = sorted(facts.links, key=lambda name: (facts.links[name].is_guest, name))
    advice = "give the physical interface with -i"
    if route is RouteKind.GIVEN:
        advice = "-i auto finds the physical interface"
    if capture.point == "vif":
        siblings = [name for name in names if _stem(name) == _stem(capture.interface)]
        if siblings:
            return f" (similar names: {', '.join(siblings)})"
        advice = "the hypervisor can't see an SR-IOV function that was given to a VM"
    return f" (there are: {shorten(', '.join(names), 400, placeholder=' ...')}): {advice}"


def _stem(interface: str) -> str:
    """Return the name of a VM's interface without its number."""
    return re.sub(r"\d+(-emu)?$", "", interface)


class RunningCommand:
    """A shell command that runs on all sources."""

    def __init__(self, hosts: Hosts, command: str, seconds: float) -> None:
        self.command = command
        self._hosts = hosts
        script = f"exec >/dev/null\n{command}"
        self.jobs = hosts.on_sources(lambda host: host.start(script, seconds, shown=[command]))

    @property
    def running(self) -> list[Job]:
        return [job for job in self.jobs.values() if not job.ended]

    @property
    def ended(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.ended]

    @property
    def has_ended(self) -> bool:
        """Return whether the command has ended on all sources, and there is at least one."""
        return bool(self.jobs) and not self.running

    def transmitted_packets(self) -> int | None:
        """Return how many packets the sources report as sent; None if one doesn't."""
        total = 0
        for job in self.jobs.values():
            packets = transmitted_packets(job.errors)
            if packets is None:
                return None
            total += packets
        return total

    def check(self) -> None:
        """Exclude the sources where the command has failed."""

        def check_source(host: Host) -> None:
            host.check_job(self.jobs[host.name])
            check_generator(self.jobs[host.name], self.command, host.sudo)

        self._hosts.on_sources(check_source)

    def stop(self, control: RunControl) -> None:
        """End the command where it still runs."""
        for job in self.running:
            job.stop()
        control.wait_until(lambda: not self.running, KILL_SECONDS)
        for job in self.running:
            job.kill()
        if not control.wait_until(lambda: not self.running, ANSWER_SECONDS):
            names = ", ".join(job.name for job in self.running)
            raise RemoteCommandError(f"{names}: the source command could not be stopped")


def check_generator(job: Job, command: str, sudo: bool) -> None:
    """Raise RemoteCommandError if a source command has failed."""
    if not job.ended or job.stopped or job.status == 0 or is_unanswered(job, command):
        return
    what = f"{command}: exit status {job.status}"
    hint = ""
    if job.status is None:
        what = "the source command could not be run"
        hint = sudo_hint(job.errors)
    elif job.status == 127:
        hint = ". Install it there, or send other traffic"
    elif "sendto: Operation not permitted" in job.errors:  # in the path of output
        hint = (
            ". A firewall on the source drops the packets, or its conntrack table is full (dmesg)"
        )
    elif re.search("not permitted|raw socket", job.errors) and not sudo:
        hint = ". Log in as root, or use --sudo"
    raise RemoteCommandError(f"{job.name}: {what}: {last_line(job.errors)}{hint}")


def is_unanswered(job: Job, command: str) -> bool:
    """Return whether a generator has sent packets, and failed only as nothing has answered.

    A ping command of the user's reports the packets on its standard output, which isn't read.
    """
    if job.status != 1:  # that of hping3 and ping without any answer
        return False
    words = command.split() or [""]
    is_silent_ping = os.path.basename(words[0]) in ("ping", "ping6") and not job.errors.strip()
    return is_silent_ping or bool(transmitted_packets(job.errors))


def transmitted_packets(errors: str) -> int | None:
    """Return how many packets hping3 and ping report as sent, together; None if they don't.

    hping3's authors spell it "tramitted".
    """
    reports = re.findall(r"^(\d{1,9}) packets tra(?:ns)?mitted", errors, re.MULTILINE | re.ASCII)
    return sum(map(int, reports)) if reports else None


def start_load(
    plan: Plan, hosts: Hosts, seconds: float, control: RunControl
) -> RunningCommand | None:
    """Start the load of a plan, if it has one, and exclude sources on which it fails at once."""
    if not plan.load:
        return None
    load = RunningCommand(hosts, plan.load, seconds)
    control.wait_until(lambda: bool(load.ended), LOAD_SECONDS)
    load.check()
    return load


def generate(
    plan: Plan, info: RunInfo, hosts: Hosts, captures: RunningCaptures, control: RunControl
) -> None:
    """Run the traffic of a plan to its end, to its time-out or to an interruption.

    Completes the description of the run.  Raises CaptureError if a capture ends meanwhile.
    """
    seconds = info.timeout + 2 * ANSWER_SECONDS
    load = start_load(plan, hosts, seconds, control)
    control.reportable = True
    start = time.monotonic()
    probes = RunningCommand(hosts, info.source_command or "", seconds)
    in_time = control.watch(
        lambda: probes.has_ended or control.interrupted or captures.has_ended, info.timeout
    )
    captures.check()
    probes.check()
    info.senders = len(probes.jobs)
    if probes.jobs.keys() & hosts.failed.keys():
        info.senders = 0
    info.incidents += load_warnings(load)
    if plan.ends_itself and not in_time:
        info.incidents.append(
            f"the source command was stopped after {info.timeout:g} s. Use --duration to measure "
            "longer"
        )
    ended_itself = probes.has_ended
    probes.stop(control)
    info.duration = round(time.monotonic() - start, 3)
    if load:
        load.stop(control)
    if ended_itself and not hosts.failed:
        info.transmitted = probes.transmitted_packets()
        info.incidents += missing_packets(info, plan.expected, len(probes.jobs))


def load_warnings(load: RunningCommand | None) -> list[str]:
    """Return warnings about sources where the load, which should outlast the probes, has ended."""
    if load is None:
        return []
    return [
        f"{job.name}: the load ended before the probes: {last_line(job.errors)}"
        for job in load.ended
    ]


def missing_packets(info: RunInfo, expected: int | None, sources: int) -> list[str]:
    """Return a warning if the sources have sent fewer packets than each was expected to."""
    sent = info.transmitted
    if sent is None or expected is None or sent >= expected * sources:
        return []
    warning = f"the sources sent only {sent} of {counted(expected * sources, 'packet')}"
    if "hping3" in (info.source_command or ""):
        warning += (
            ". Does another run use the same source (two hping3s count each other's replies)? "
            "Run one at a time"
        )
    return [warning]


@dataclass(frozen=True)
class ClockReading:
    """A reading of the hypervisor's clock, and when it was made by our monotonic clock (ns)."""

    wall: int  # the hypervisor's time since 1970
    asked: int  # our time before the reading
    answered: int  # our time after the reading
    exact: bool  # wall is in nanoseconds, rather than in whole seconds


def read_clock(job: Job) -> ClockReading | None:
    """Return the clock of the host on which the captures run; None if it doesn't answer."""
    asked = time.monotonic_ns()
    answer = re.match(r"(\d{10})(\d{9})?", job.time())  # seconds since 1970, nanoseconds
    if not answer:
        return None
    wall = int(answer[1]) * NANOSECONDS + int(answer[2] or 0)
    return ClockReading(wall, asked, time.monotonic_ns(), answer[2] is not None)


def read_clock_again(job: Job, start: ClockReading | None) -> ClockReading | None:
    """Return the clock later in a run; None if it doesn't answer, or hasn't at the start.

    Captures that have reached their limit don't answer any more. The time that our own clock has
    measured since the start is added to the first reading then.
    """
    if start is None:
        return None
    if job.ended:
        now = time.monotonic_ns()
        return ClockReading(start.wall + now - start.answered, now, now, start.exact)
    return read_clock(job)


def clock_step(start: ClockReading, stop: ClockReading) -> int:
    """Return the least step (ns) of a clock between two readings: negative if back, 0 if none."""
    passed = stop.wall - start.wall
    shortest = stop.asked - start.answered
    longest = stop.answered - start.asked
    if passed < shortest:
        return passed - shortest
    return max(0, passed - longest)


def measured_window(
    start: ClockReading | None,
    end: ClockReading | None,
    stop: ClockReading | None,
    info: RunInfo,
) -> Window | None:
    """Return the window of a run by the clock at its start, at its end and when captures stop.

    Problems of the clock are added to the incidents; returns None if it can't be used.
    """
    effect = "other traffic at the start and end of the run may be counted as lost"
    if not start or not end or not stop:
        info.incidents.append(f"the hypervisor's clock could not be read: {effect}")
        return None
    rounding = 0
    if not (start.exact and end.exact and stop.exact):
        info.incidents.append(
            f"the hypervisor's date command prints no nanoseconds (busybox?): {effect}"
        )
        rounding = NANOSECONDS
    step = clock_step(start, stop)
    drift = CLOCK_DRIFT * (stop.answered - start.asked)
    if abs(step) > NANOSECONDS + rounding + drift:
        info.incidents.append(
            f"the hypervisor's clock jumped by about {step / NANOSECONDS:.0f} s during the run: "
            "delays across that moment are wrong. Measure again"
        )
        return None
    # Packets of the last second may not have been handed over to tcpdump.
    return Window(
        start=start.wall,
        end=end.wall + rounding,
        watched_until=stop.wall - int(HANDED_OVER_SECONDS * NANOSECONDS),
        wait=int(info.wait * NANOSECONDS),
    )


def make_recording(
    plan: Plan, hosts: Hosts, control: RunControl, find_vif: Callable[[], str]
) -> Recording:
    """Capture while the traffic of a plan runs, until the kernel has handed over all packets.

    `find_vif` returns the VM's interface, which must still be the same one after the traffic.
    """
    hypervisor = hosts.hypervisor
    captures = RunningCaptures(hypervisor, plan, control)
    captures.wait_until_listening()
    info = replace(
        plan.info,
        started=time.time_ns(),
        incidents=plan.info.incidents + captures.incidents(),
    )
    start = read_clock(captures.job)
    generate(plan, info, hosts, captures, control)
    end = read_clock_again(captures.job, start)
    handed_over = time.monotonic() + HANDED_OVER_SECONDS  # to tcpdump, if no packet comes later
    link = check_interface(hypervisor, plan, find_vif)
    queue = {**info.platform.get("vif", {}), "after": drop_counters(link)}
    info.platform = {**info.platform, "vif": queue}
    files = hypervisor.open_files()
    # An interruption shortens the wait for the last packets, but not below SHORTEST_WAIT.
    wait = handed_over + max(info.wait, SHORTEST_WAIT) - time.monotonic()
    control.wait_until(lambda: captures.job.ended or control.interrupted, wait)
    shortest_wait = handed_over + SHORTEST_WAIT - time.monotonic()
    control.wait_until(lambda: captures.job.ended, shortest_wait)
    captures.check()
    stop = read_clock_again(captures.job, start)
    info.window = measured_window(start, end, stop, info)
    if captures.stop():
        info.incidents += captures.uncounted()
    else:
        info.window = None  # until when the captures have seen packets is unknown
        info.incidents.append(
            f"a capture didn't stop within {KILL_SECONDS} s and was killed: packets at the end of "
            "the run may be missing"
        )
    for error in hosts.failed.values():
        info.incidents.append(f"a source failed, so its traffic is missing or incomplete: {error}")
    trace = captures.trace
    if trace.running:
        info.backend = trace.backend
    return Recording(plan, info, captures.job, files, captures.counts(), trace, control.interrupted)


def check_interface(host: Host, plan: Plan, find_vif: Callable[[], str]) -> Link:
    """Return the VM's interface as it is after the run.

    Raises RemoteCommandError if it is a different one than before the run.
    """
    vif = plan.interfaces.vif
    advice = "the VM was moved, restarted or unplugged during the run. Measure again"
    try:
        vif_now = find_vif()
    except RemoteCommandError as error:
        raise RemoteCommandError(
            f"{error}. Was the VM moved, restarted or unplugged during the run? Measure again"
        ) from None
    if vif_now != vif:
        raise RemoteCommandError(f"{host.name}: {vif} is now {vif_now}: {advice}")
    before = plan.facts.links.get(vif, Link(vif))
    show = f"link show dev {quote(vif)}"
    after = parse_link(host.run(f"ip -o -s -d {show} || ip -o {show}").output)
    if before.index and (after is None or after.index != before.index):
        raise RemoteCommandError(
            f"{host.name}: {vif} is gone, or is now a different interface: {advice}"
        )
    return after or before


def fetch_captures(host: Host, recording: Recording, files: CaptureFiles) -> None:
    """Copy the captures, and the trace, into a local directory; remove them on the hypervisor."""
    remote = recording.job.directory
    for number, capture in enumerate(recording.plan.captures, 1):
        paths = files.paths[capture.point]
        suffix = str(len(paths)) if paths else ""  # pif.pcap, pif1.pcap, pif2.pcap ...
        path = os.path.join(files.directory, f"{capture.point}{suffix}.pcap")
        host.fetch(recording.files, f"{remote}/{number}.pcap", path, recording.plan.largest_file)
        paths.append(path)
    if recording.trace.running:
        processors = recording.trace.processors
        warning = fetch_trace(host, recording.files, remote, files.directory, processors)
        if warning:
            recording.info.incidents.append(warning)
    recording.files.close()
    recording.job.leave()


def analyze_recording(
    recording: Recording, files: CaptureFiles, trace: KernelTrace | None
) -> Analysis:
    """Analyse the captures of a run; CaptureError if the files lack captured packets."""
    info = recording.info
    for point, paths in files.paths.items():
        # A file without a whole header can't be analysed: report first that packets are missing.
        if min(map(os.path.getsize, paths)) < PCAP_HEADER:
            check_captured(recording, point, 0)
    analysis = analyze_measured(info, files, recording.counts)
    if trace:
        attach_stages(analysis, trace, info)
    for point, counts in analysis.counts.items():
        check_captured(recording, point, counts["records"])
    return analysis


def analyze_measured(info: RunInfo, files: CaptureFiles, capture: Mapping[str, Report]) -> Analysis:
    """Return the analysis of the captures of a run; `capture` is what tcpdump counted, by point."""
    dropped = {point: counts.get("dropped", 0) for point, counts in capture.items()}
    return analyze_captures(files.paths, info.selection, info.window, info.capture_limit, dropped)


def check_captured(recording: Recording, point: str, records: int) -> None:
    """Raise CaptureError if tcpdump captured more of a point than its files have: `records`."""
    captured = recording.counts[point]["captured"]
    if captured > records:
        raise CaptureError(
            f"{recording.job.name}: tcpdump captured {counted(captured, 'packet')} on "
            f"{getattr(recording.info, point)}, but only {records} are in the file: is the disk "
            f"under {recording.job.directory} full?"
        )


# ---- Analysis --------------------------------------------------------------------------------


def analyze_captures(
    paths: Mapping[str, Sequence[str]],
    selection: Selection,
    window: Window | None = None,
    packet_limit: int | None = None,
    dropped: Mapping[str, int] | None = None,
) -> Analysis:
    """Analyse pcap or pcapng files, by point ("pif" and "vif"); "-" is standard input.

    Without a window each point was watched from its first to its last record.  `packet_limit` is
    the number of packets at which a capture was ended, and `dropped` how many the kernel dropped at
    each point before they were captured.  Raises CaptureError for a file that can't be read, and
    UsageError if both points are given the same file.
    """
    warnings: list[str] = []
    with ExitStack() as stack:
        captures = _open_captures(paths, stack, selection.tunnel_ports)
        sightings = collect(captures, selection)
    counts = {point: file_counts(point, files, warnings) for point, files in captures.items()}
    warnings += _precision_warnings(counts)
    if window and packet_limit:
        window = _limit_window(window, captures, packet_limit, warnings)
    results = []
    while sightings:
        one_direction = sightings.pop(0)  # frees the previous direction's sightings
        direction = one_direction.direction
        uncaptured = counts[direction.second]["cut"]  # records too short to identify a packet
        if dropped:
            uncaptured += dropped[direction.second]
        period = window or files_window(direction, captures)
        results.append(match(one_direction, period, uncaptured))
    warnings += _overlap_warnings(results, captures)
    guest = None
    if len(results) > 1:
        guest = guest_times(results[0], results[1])
    return Analysis(results, counts, warnings, guest)


def _precision_warnings(counts: Mapping[str, Report]) -> list[str]:
    pif_unit = counts["pif"]["precision"]
    vif_unit = counts["vif"]["precision"]
    if pif_unit == vif_unit:
        return []
    return [
        f"the time stamps of the pif are in {pif_unit}, and those of the vif in {vif_unit}: delays "
        "are only as precise as the coarser ones"
    ]


def _limit_window(
    window: Window,
    captures: Mapping[str, Sequence[Capture]],
    packet_limit: int,
    warnings: list[str],
) -> Window:
    """Return the window, ended where the first capture reached its limit; add to the warnings."""
    limit_times = [
        capture.span[1]
        for files in captures.values()
        for capture in files
        if capture.span and capture.records >= packet_limit
    ]
    if not limit_times:
        return window
    warnings.append(
        f"a capture has reached its limit of {counted(packet_limit, 'packet')} (from --count, or "
        "half of the hypervisor's free space): later packets are not counted"
    )
    return replace(
        window,
        end=min(window.end, *limit_times),
        watched_until=min(window.watched_until, *limit_times),
    )


def _overlap_warnings(
    results: Iterable[DirectionResult], captures: Mapping[str, Sequence[Capture]]
) -> list[str]:
    """Return a warning if packets passed one point while the other one was not captured."""
    unwatched = 0
    for result in results:
        undecided = result.counts.undecided
        unwatched += undecided.unwatched + undecided.unwatched_first
    pif_span = watched_span(captures["pif"])
    vif_span = watched_span(captures["vif"])
    if not unwatched or not pif_span or not vif_span:
        return []
    pif_start, pif_end = pif_span
    vif_start, vif_end = vif_span
    overlap = max(0, min(pif_end, vif_end) - max(pif_start, vif_start)) / NANOSECONDS
    pif_seconds = (pif_end - pif_start) / NANOSECONDS
    vif_seconds = (vif_end - vif_start) / NANOSECONDS
    return [
        f"{counted(unwatched, 'packet')} passed one interface while the other was not captured: "
        f"counted only as undecided. The captures last {pif_seconds:.6g} s (pif) and "
        f"{vif_seconds:.6g} s (vif), and overlap for {overlap:.6g} s"
    ]


def _open_captures(
    paths: Mapping[str, Sequence[str]], stack: ExitStack, tunnel_ports: Mapping[int, str]
) -> dict[str, list[Capture]]:
    """Open the captures of each point; a file that is given twice for a point is read once."""
    point_of: dict[tuple[int, int], str] = {}  # by device and inode, whatever the file's name
    captures: dict[str, list[Capture]] = {"pif": [], "vif": []}
    for point, files in captures.items():
        for path in paths[point]:
            file = open_capture(path, stack)
            status = os.fstat(file.fileno())
            inode = status.st_dev, status.st_ino
            if inode not in point_of:
                point_of[inode] = point
                files.append(Capture(file, path, tunnel_ports))
            elif point_of[inode] != point:
                raise UsageError(
                    f"{path} is given for both the pif and the vif: give two different captures"
                )
    return captures


def open_capture(path: str, stack: ExitStack) -> BinaryIO:
    """Open a capture until the stack is closed; "-" is standard input, which stays open."""
    try:
        if path == "-":
            os.set_blocking(0, True)  # another process may have changed that
            return os.fdopen(0, "rb", closefd=False)
        file = stack.enter_context(open(path, "rb"))
        file.peek(0)  # some files, such as /proc/self/mem, can be opened, but not read
        return file
    except OSError as error:
        raise CaptureError(f"{path}: can't read it: {error.strerror}") from error


def file_counts(point: str, captures: Sequence[Capture], warnings: list[str]) -> Report:
    """Return what the files of a point contain, for the report, and add to the warnings."""
    for capture in captures:
        warnings += [f"{point}: {warning}" for warning in capture.warnings()]
    resolution = min(capture.resolution for capture in captures)
    return {
        "records": sum(capture.records for capture in captures),
        "other": sum(capture.other for capture in captures),
        "filtered": sum(capture.filtered for capture in captures),
        "cut": sum(capture.cut for capture in captures),
        "precision": resolution_unit(resolution),
    }


def analyze_text(
    pif_path: str, vif_path: str, direction: Direction, columns: TextColumns
) -> Analysis:
    """Return the analysis of two text captures; NoMatchError if no packet can be timed."""
    captures = {}
    # Times of day have no date: the vif's first packet is dated close to the pif's first one.
    reference = None
    for point, path in (("pif", pif_path), ("vif", vif_path)):
        with open(path, encoding="utf-8", errors="replace") as file:
            capture = TextCapture(file, columns, reference)
        captures[point] = capture
        if capture.times:
            reference = capture.times[0]
    sightings = Sightings(direction)
    for point, capture in captures.items():
        sightings.add(point, capture.identities, capture.times)
        sightings.end(point)
    result = match(sightings)
    warnings = [
        f"{point}: left out {counted(capture.skipped, 'line')} without a sequence number or time"
        for point, capture in captures.items()
        if capture.skipped
    ]
    if result.counts.matched and not result.counts.timed:
        raise NoMatchError(
            "no delay is certain: each sequence number on both interfaces was sent more than once. "
            "Is seq_no_col the right column?"
        )
    if result.counts.ambiguous:
        warnings.append(
            f"{counted(result.counts.ambiguous, 'packet has', 'packets have')} a sequence number "
            "that was sent more than once: is seq_no_col the right column?"
        )
    counts = {
        point: {"records": len(capture.times), "skipped": capture.skipped}
        for point, capture in captures.items()
    }
    return Analysis([result], counts, warnings)


# ---- Saved runs ------------------------------------------------------------------------------

LARGEST_REPORT = 1 << 26  # bytes
OLDEST_SCHEMA = 2  # schema_version of the oldest runs that can be read
# Regular expressions for names that --save gives to:
SAVED_NAME = r"\d{8}T\d{6}Z-.+"  # the directory of a run
SAVED_CAPTURE = r"(?P<point>pif|vif)\d*\.pcap"
SAVED_FILE = rf"report\.json|{SAVED_CAPTURE}|trace-\w+"


@dataclass
class SavedRun:
    """A run that --save has saved."""

    report: Report
    info: RunInfo
    files: CaptureFiles


def load_run(directory: str) -> SavedRun:
    """Return the run that `save_run` has saved in a directory; UsageError if there is none."""
    try:
        with open_regular(os.path.join(directory, "report.json")) as file:
            report = json.loads(file.read(LARGEST_REPORT))
        check_schema(directory, report.get("schema_version", OLDEST_SCHEMA))
        info = RunInfo.from_json(report["config"])
        for point in ("pif", "vif"):
            if not isinstance(report["capture"][point], dict):
                raise ValueError(f"capture.{point} is not an object")
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise UsageError(f"{directory}: not a saved run: report.json: {error.strerror}") from None
    # JSON that is no report, is nested too deep, or has a number that is too large.
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise UsageError(
            f"{directory}: can't read the saved run: report.json is damaged: {error}"
        ) from None
    files = CaptureFiles(directory)
    for name in names:
        capture_name = re.fullmatch(SAVED_CAPTURE, name)
        if capture_name:
            files.paths[capture_name["point"]].append(os.path.join(directory, name))
    captures = files.paths["pif"] + files.paths["vif"]
    if not all(files.paths.values()) or not all(map(_has_content, captures)):
        raise UsageError(f"{directory}: its captures are missing or empty")
    return SavedRun(report, info, files)


def _has_content(path: str) -> bool:
    try:
        return os.path.getsize(path) > 0
    except OSError:  # as of a run that is deleted just now
        return False


def check_schema(directory: str, version: object) -> None:
    """Raise UsageError if the schema_version of a saved run's document is too old or too new.

    Raises ValueError for a value that no version of netweaver has written.
    """
    if version == 1:
        captures = [os.path.join(directory, name) for name in ("pif.pcap", "vif.pcap")]
        raise UsageError(
            f"{directory}: saved by version 1. Give its captures instead: {' '.join(captures)}"
        )
    if not isinstance(version, int) or version < OLDEST_SCHEMA:
        raise ValueError(f"schema_version is {version!r}")
    if version > SCHEMA_VERSION:
        raise UsageError(
            f"{directory}: saved by a newer version of netweaver (schema_version {version}, and "
            f"this one reads up to {SCHEMA_VERSION}). Update netweaver"
        )


def load_runs(directory: str, warn: Callable[[str], None]) -> list[SavedRun]:
    """Return the saved run in a directory, or those in its subdirectories, in order of name.

    Subdirectories with a run that can't be read are left out, with a warning.  Raises UsageError
    if no run can be read.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise UsageError(f"{directory}: can't read it: {error.strerror}") from error
    paths = [os.path.join(directory, name) for name in names]
    run_paths = [path for path in paths if os.path.exists(os.path.join(path, "report.json"))]
    if "report.json" in names or not run_paths:  # without any run, this raises the error
        return [load_run(directory)]
    runs = []
    problems = []
    for path in run_paths:
        try:
            runs.append(load_run(path))
        except UsageError as error:
            problems.append(error)
    if not runs:
        raise problems[0]
    for problem in problems:
        warn(f"left out: {problem}")
    return runs


def delete_old_runs(directory: str, kind: RunKind, keep: int, newest: str = "") -> list[str]:
    """Delete all but the `keep` newest saved runs of a kind; return the paths of those deleted.

    `newest` is the one that was just saved: others seem newer if the clock has been wrong.
    Directories that --save didn't make, or that have other files, stay.
    """

    def age(run: SavedRun) -> tuple[bool, int, str]:
        path = run.files.directory
        return path == newest, run.info.started or 0, path

    runs = [run for run in load_runs(directory, lambda _: None) if run.info.kind == kind]
    runs.sort(key=age, reverse=True)
    deleted = []
    for run in runs[keep:]:
        path = run.files.directory
        if is_made_by_save(path):
            try:
                shutil.rmtree(path)
            except FileNotFoundError:  # another run has deleted it meanwhile
                continue
            except OSError as error:
                raise UsageError(f"can't delete {path}: {error.strerror}") from error
            deleted.append(path)
    return deleted


def is_made_by_save(path: str) -> bool:
    """Return whether a directory has the name and the files of a saved run, and no others."""
    if os.path.islink(path) or not re.fullmatch(SAVED_NAME, os.path.basename(path)):
        return False
    try:
        return all(re.fullmatch(SAVED_FILE, name) for name in os.listdir(path))
    except OSError:  # another run has deleted it meanwhile
        return False


def save_run(directory: str, info: RunInfo, files: CaptureFiles, report: Report) -> str:
    """Save captures and report, or nothing, in a new directory under `directory`; return that."""
    # Such as 20240131T235959Z: without punctuation, and to the second.
    started = re.sub(r"[-:]|\..*", "", iso_time(info.started or 0))
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{started}Z-{info.subject}-{info.traffic_name}")
    try:
        with ExitStack() as undo:
            os.makedirs(directory, exist_ok=True)
            made = _make_directory(os.path.join(directory, name))
            undo.callback(shutil.rmtree, made, ignore_errors=True)
            for file in os.listdir(files.directory):
                shutil.copyfile(os.path.join(files.directory, file), os.path.join(made, file))
            with open(os.path.join(made, "report.json"), "w", encoding="utf-8") as text:
                json.dump({**report, "saved": made}, text)
            undo.pop_all()  # keeps what is complete now
    except OSError as error:
        raise UsageError(f"can't save in {directory}: {error.strerror}") from error
    return made


SAVE_ATTEMPTS = 10


def check_can_save(directory: str) -> None:
    """Raise UsageError if --save can't make directories in a directory; leave none behind."""
    missing = []  # directories that don't exist yet, the deepest one first
    ancestor = os.path.abspath(directory)
    while not os.path.exists(ancestor):
        missing.append(ancestor)
        ancestor = os.path.dirname(ancestor)
    try:
        for attempt in range(1, SAVE_ATTEMPTS + 1):
            try:
                if not os.path.exists(directory):
                    os.makedirs(directory, exist_ok=True)
                os.rmdir(tempfile.mkdtemp(dir=directory))
                break
            # Another run, which tries the same, has made it or removed it meanwhile.
            except (FileNotFoundError, FileExistsError):
                if attempt == SAVE_ATTEMPTS:
                    raise
    except OSError as error:
        raise UsageError(f"can't save in {directory}: {error.strerror}") from error
    finally:
        for path in missing:
            with suppress(OSError):  # another run uses it by now
                os.rmdir(path)


def _make_directory(path: str) -> str:
    """Make a directory at `path` or, if that exists, at `path`-2, `path`-3 ...; return its path."""
    free_path = path
    for number in count(2):
        try:
            os.mkdir(free_path)
            break
        except FileExistsError:  # made by another run that started in the same second
            free_path = f"{path}-{number}"
    return free_path


# ---- NetWeaver -------------------------------------------------------------------------------


def no_output(line: object) -> None:
    """Ignore what is reported: the default of the callbacks in Settings."""


@dataclass(frozen=True)
class Settings:
    """The settings of a measurement: NetWeaver's keyword parameters.  Times are in seconds."""

    host_interface: str | Sequence[str] = ()  # the pifs; "auto" or none to find them
    vif_number: int = 0  # N in vif5.N, the VM's interface
    vif: str | None = None  # the name of the VM's interface; None to ask the toolstack for it
    toolstack: str = "auto"  # or one of TOOLSTACKS
    direction: str = "in"  # one of DIRECTIONS
    overlay: bool = False  # the traffic is inside a tunnel where it passes the pif
    capture_filter: str | None = None  # pcap-filter(7); None to filter by the traffic's addresses
    count: int | None = None  # packets that each source sends; see `packets` for None
    duration: float | None = None  # of the traffic; None: until each source has sent its packets
    timeout: float | None = None  # stops traffic that lasts longer; None: by packets and rate
    wait: float = SHORTEST_WAIT  # how long to wait for the last packets
    match_nat: bool = False  # addresses are translated between pif and vif
    stages: bool = False  # trace the kernel
    labels: Mapping[str, str] = field(default_factory=dict)  # for the report
    sudo: bool = False  # run remote commands with sudo -n
    ssh_options: Sequence[str] = ()  # as ssh -o takes them
    ask: Callable[[str], str] | None = None  # called with a question for a passphrase
    progress: Callable[[str], None] = no_output  # called with each step, for people
    log: Callable[[str], None] = no_output  # called with each remote command
    tick: Callable[[float], None] = no_output  # called each second with the seconds of traffic

    def __post_init__(self) -> None:
        if self.toolstack not in ("auto", *TOOLSTACKS):
            raise UsageError(f"toolstack must be one of auto, {', '.join(TOOLSTACKS)}")
        if self.direction not in DIRECTIONS:
            raise UsageError(f"direction must be one of {', '.join(DIRECTIONS)}")
        if "auto" in self.pifs and len(self.pifs) > 1:
            raise UsageError("-i auto can't be used with other interfaces: name them all, or none")
        if self.direction == "both" and self.match_nat:
            raise UsageError(
                "--direction both can't be used with --match-nat: translated addresses don't tell "
                "the directions apart. Measure in and out one after the other"
            )

    @property
    def pifs(self) -> tuple[str, ...]:
        """The physical interfaces as they were given, each once; "auto" may be among them."""
        if isinstance(self.host_interface, str):
            return (self.host_interface,)
        return tuple(dict.fromkeys(self.host_interface))

    def packets(self, traffic: Traffic) -> int:
        """Return how many packets each source is expected to send."""
        if self.count:
            return self.count
        if self.duration:
            return round(traffic.rate * self.duration)
        return USUAL_COUNT

    def source_command(self, traffic: Traffic, destination: str, has_hping3: bool = True) -> str:
        """Return the shell command by which a source sends the packets.

        It doesn't end by itself if a duration ends it, nor beside a load: hping3 would count the
        answers to the load as its own, and end too early.
        """
        packets = self.packets(traffic)
        if traffic.load or (self.duration and not self.count):
            packets = ENDLESS
        return traffic.source_command(packets, destination, has_hping3)


class NetWeaver:
    """A measurement of the time that packets take between a hypervisor's pif and a VM's vif.

    `source_ip` (one, several or none) and `destination_host_ip` (the hypervisor) are
    `[user@]host[:port]`; `destination_name_label` is the VM's name in its toolstack, and
    `destination_ip` its address.  The options are the fields of Settings.

    Use it as a context manager, or call `close`.  `measure` makes a whole run; the methods before
    it are its steps, in their order.  All raise a NetWeaverError if they fail.  For another
    toolstack, override `determine_vif_number`.
    """

    def __init__(
        self,
        source_ip: str | Sequence[str],
        destination_name_label: str,
        destination_ip: str,
        destination_host_ip: str,
        ssh_key_path: str | None = None,
        **options: Any,
    ) -> None:
        self.settings = Settings(**options)
        sources = [source_ip] if isinstance(source_ip, str) else list(source_ip)
        if not sources and not self.settings.duration:
            raise UsageError("without a source (-s) nothing ends the measurement. Give --duration")
        self.destination_name_label = destination_name_label
        self.destination_ip = resolve_destination(destination_ip, sources, [USUAL_TRAFFIC])
        self.toolstack = self.settings.toolstack
        self.results: Sequence[DirectionResult] = ()
        self._control = RunControl(self.settings.tick)
        self._access = Access(
            ssh_key_path, self.settings.ssh_options, self.settings.ask, self.settings.progress
        )
        targets = [Target(text) for text in (destination_host_ip, *sources)]
        # The hypervisor's settings and then the sources'; importing paramiko takes long, too.
        self._host_settings, _ = in_parallel(
            lambda: [self._access.settings(target) for target in targets], import_paramiko
        )
        self._hosts: Hosts | None = None
        self._recording: Recording | None = None
        self._files: CaptureFiles | None = None
        self._trace: KernelTrace | None = None

    def __enter__(self) -> NetWeaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Whoever presses Ctrl-C (KeyboardInterrupt is no Exception) doesn't want to wait.
        self.close(wait=kind is None or issubclass(kind, Exception))

    @property
    def vif_number(self) -> int:
        """The number of the VM's interface."""
        return self.settings.vif_number

    @property
    def unchecked(self) -> list[str]:
        """The hosts whose key is not checked."""
        return [host.name for host in self._host_settings if host.accepts_any_key]

    @property
    def interrupted(self) -> bool:
        """Return whether the traffic was ended by `interrupt`."""
        return self._control.interrupted

    # -- the steps of a run --

    def verify_connections(self) -> bool:
        """Connect to all hosts at once, and return True; HostConnectionError if that fails.

        Sources that can't be reached are left out, and named in the report, unless none is left.
        """
        self._connected()
        return True

    def determine_vif_number(self) -> str:
        """Return the name of the VM's interface on the hypervisor, such as vif5.0.

        The toolstack is asked for it; if that is "auto", `toolstack` is set to the first installed
        one that knows the VM.  To support another toolstack, override this method; it can use
        `run_command`.
        """
        name = self.destination_name_label
        if self.toolstack == "auto":
            self.toolstack, vif = find_toolstack(self.run_command, name, self.vif_number)
            return vif
        return TOOLSTACKS[self.toolstack].find_vif(self.run_command, name, self.vif_number)

    def plan(
        self,
        source_command: str | None = None,
        dest_pif_cmd: str | None = None,
        dest_vif_cmd: str | None = None,
        probes: Traffic = USUAL_TRAFFIC,
    ) -> Plan:
        """Return what `generate_and_record` would do with the same parameters."""
        settings = self.settings
        hosts = self._connected()
        traffic = probes
        command = source_command
        has_sources = len(self._host_settings) > 1  # the first is the hypervisor
        if source_command:
            traffic = replace(probes, command=source_command)
        elif has_sources:
            has_hping3 = self._has_hping3(probes)
            command = settings.source_command(traffic, self.destination_ip, has_hping3)
        interfaces, facts, addresses = self._locate(hosts)
        selection = Selection(
            directions=DIRECTIONS[settings.direction],
            sources=addresses,
            destinations=[self.destination_ip],
            translated=settings.match_nat,
            probes=probes.probe_filter,
            tunnel_ports=interfaces.tunnel_ports,
        )
        info = self._describe(traffic, command, selection, interfaces, facts)
        capture_commands = {"pif": dest_pif_cmd, "vif": dest_vif_cmd}
        return self._name_hypervisor_in_error(
            lambda: make_plan(settings, traffic, info, interfaces, facts, capture_commands)
        )

    def _describe(
        self,
        traffic: Traffic,
        command: str | None,
        selection: Selection,
        interfaces: Interfaces,
        facts: Facts,
    ) -> RunInfo:
        """Return what is known of a run before its captures are planned."""
        settings = self.settings
        hypervisor, *sources = [host.name for host in self._host_settings]
        return RunInfo(
            pif=",".join(interfaces.pifs),
            vif=interfaces.vif,
            selection=selection,
            sources=sources,
            destination=self.destination_ip,
            labels=dict(settings.labels),
            measured=True,
            hypervisor=hypervisor,
            name_label=self.destination_name_label,
            toolstack=interfaces.toolstack,
            overlay=interfaces.tunnelled,
            route=interfaces.route,
            filter=settings.capture_filter,
            traffic=traffic if command else None,
            source_command=command,
            wait=settings.wait,
            platform=facts.platform(interfaces.vif),
            incidents=[ETH0_ASSUMED] if interfaces.route is RouteKind.ASSUMED else [],
        )

    def generate_and_record(
        self,
        source_command: str | None = None,
        dest_pif_cmd: str | None = None,
        dest_vif_cmd: str | None = None,
        probes: Traffic = USUAL_TRAFFIC,
    ) -> None:
        """Run the source command on all sources while the interfaces are captured.

        By default the sources send the probes, and tcpdump captures.  A capture command of the
        user's writes pcap (`tcpdump -w -`) or text to its standard output, and ends upon SIGTERM.
        No traffic starts before the captures listen, and they are stopped once it has ended.
        """
        self._control.reportable = False  # until the traffic starts
        plan = self.plan(source_command, dest_pif_cmd, dest_vif_cmd, probes)
        self.settings.progress("Spawning packet captures...")
        self._recording = make_recording(plan, self._connected(), self._control, self._find_vif)
        self.settings.progress("Captures finished, waiting for files to flush.")

    def pull_generated_files(self) -> tuple[str, str]:
        """Fetch the captures into a private directory, and remove them from the hypervisor.

        Returns the paths of the pif's and of the vif's captures, several with commas in between.
        The files stay until `close` or the next call.
        """
        recording = self._recorded()
        self.settings.progress("Transferring files...")
        self._remove_files()
        try:
            directory = tempfile.mkdtemp(prefix="netweaver-")
        except OSError as error:
            raise CaptureError(f"can't make a directory on this machine: {error}") from error
        self._files = CaptureFiles(directory)
        fetch_captures(self._connected().hypervisor, recording, self._files)
        self._trace = None
        if recording.trace.running:
            interfaces = recording.plan.interfaces
            self._trace = read_trace(directory, interfaces.vif, interfaces.pifs)
            fetch_symbols(self.run_command, directory, self._trace)
        return ",".join(self._files.paths["pif"]), ",".join(self._files.paths["vif"])

    def analyze(
        self,
        seq_no_col: int | None = None,
        timestamp_col: int | None = None,
        seq_no_split_by: str | None = None,
        seq_no_split_index: int = 0,
    ) -> dict[str, Any]:
        """Return the report on the captures; NoMatchError if they have no delay.

        Without parameters the captures are pcap files.  With them they are text, one packet a line,
        with columns separated by white space and counted from 0: the time in `timestamp_col` and
        the sequence number in `seq_no_col`.  With `seq_no_split_by` that column is split, and only
        the part at `seq_no_split_index` is the sequence number.
        """
        recording = self._recorded()
        files = self._fetched()
        info = recording.info
        self.settings.progress("Analysing...")
        if seq_no_col is None or timestamp_col is None:
            analysis = analyze_recording(recording, files, self._trace)
        else:
            analysis = analyze_text(
                files.paths["pif"][0],
                files.paths["vif"][0],
                DIRECTIONS[self.settings.direction][0],
                TextColumns(seq_no_col, timestamp_col, seq_no_split_by, seq_no_split_index),
            )
        self.results = analysis.results
        if any(map(resized, analysis.results)):  # report which offloads may merge or split segments
            plan = recording.plan
            offloads = {pif: plan.facts.offloads(pif) for pif in plan.interfaces.pifs}
            info.platform = {**info.platform, "offloads": offloads}
        capture = {
            point: {"interface": getattr(info, point), **counts}
            for point, counts in recording.counts.items()
        }
        report = build_report(analysis, info, capture)
        failed = self._connected().failed
        if failed:
            report["failed_sources"] = {name: str(error) for name, error in failed.items()}
        if recording.interrupted:
            report["interrupted"] = True
        return report

    def measure(self, probes: Traffic = USUAL_TRAFFIC) -> dict[str, Any]:
        """Make a whole run: connect, record, fetch and analyse; return its report."""
        self.generate_and_record(probes=probes)
        self.pull_generated_files()
        return self.analyze()

    def save(self, directory: str, report: Report) -> str:
        """Save captures and report in a new directory under `directory`; return its path."""
        return save_run(directory, self._recorded().info, self._fetched(), report)

    def dry_run(self, probes: Sequence[Traffic]) -> list[str]:
        """Try everything that is needed to measure with this traffic; return what would run.

        Captures are started and ended, and each source sends single packets, but only to itself.
        Raises a NetWeaverError for what is missing.
        """
        plan = self.plan(probes=probes[0])
        hosts = self._connected()
        destination = self.destination_ip
        has_hping3 = all(self._has_hping3(traffic) for traffic in probes)
        tried_plan, warnings = without_absent_vif(plan, self.settings)
        warnings += plan.info.incidents + try_captures(hosts.hypervisor, tried_plan, self._control)
        commands: list[str] = []
        for traffic in dict.fromkeys(probes if hosts.sources else []):
            hosts.on_sources(partial(try_traffic, traffic, destination, has_hping3))
            if traffic.load:
                commands.append(traffic.load)
            commands.append(self.settings.source_command(traffic, destination, has_hping3))
        if hosts.failed:  # a run would go on with the other sources
            raise next(iter(hosts.failed.values()))
        lines = plan.lines()
        for name in hosts.sources:
            lines += [f"{name}: {command}" for command in dict.fromkeys(commands)]
        lines += [f"warning: {warning}" for warning in warnings]
        found = "everything needed"
        if tried_plan is not plan:  # it lacks the vif, which doesn't exist yet
            found += f" but {plan.info.vif}"
        lines.append(f"Dry run: {found} was found; the VM was sent no traffic.")
        return lines

    # -- for subclasses and callers --

    def run_command(self, command: str, hint: str = "", seconds: float = ANSWER_SECONDS) -> str:
        """Return the output of a shell command on the hypervisor, which may take so many seconds.

        Raises RemoteCommandError if the command fails, with the hint, or with a more specific one
        if it isn't installed.
        """
        host = self._connected().hypervisor
        job = host.run(command, seconds)
        if job.status == 127:  # by POSIX, the shell hasn't found the command
            hint = f"is it installed there? If it runs in a container, {NAME_THE_VIF}"
            if self.settings.toolstack != "auto":
                hint += "; --toolstack auto takes one that is installed"
        if job.status:
            name = short_name(command)
            error = f"{host.name}: {name}: exit status {job.status}: {last_line(job.errors)}"
            if hint:
                error += f" ({hint})"
            raise RemoteCommandError(error)
        return job.output

    def interrupt(self) -> bool:
        """End the traffic now, and let the run go on to its report.

        Returns False if there is nothing yet to report on.
        """
        return self._control.interrupt()

    def close(self, wait: bool = True) -> None:
        """End whatever still runs on the hosts, and remove all files, there and on this machine.

        Without `wait` it only drops the connections: the hosts then clean up by themselves.
        """
        hosts = self._hosts
        self._hosts = None
        try:
            if hosts:
                hosts.close(wait)
        finally:
            self._remove_files()

    # -- private --

    def _connected(self) -> Hosts:
        """Return the hosts, which the first call connects to."""
        settings = self.settings
        with self._control.changed:
            if self._hosts is None:
                settings.progress("Connecting...")
                self._hosts = connect_hosts(
                    self._host_settings,
                    lambda host: Host(
                        self._access.log_in(host),
                        self._control.changed,
                        settings.log,
                        settings.sudo,
                    ),
                    asks=settings.ask is not None,
                )
            return self._hosts

    def _recorded(self) -> Recording:
        if self._recording is None:
            raise CaptureError("nothing was recorded yet. Call generate_and_record first")
        return self._recording

    def _fetched(self) -> CaptureFiles:
        if self._files is None:
            raise CaptureError("nothing was fetched yet. Call pull_generated_files first")
        return self._files

    def _remove_files(self) -> None:
        if self._files:
            shutil.rmtree(self._files.directory, ignore_errors=True)
        self._files = None

    def _has_hping3(self, traffic: Traffic) -> bool:
        """Return False if a source lacks hping3, and ping can send this traffic instead.

        Only the pattern "ping" can be sent so: for other traffic the sources are not asked.
        """
        if traffic.command or traffic.pattern != "ping":
            return True
        jobs = self._connected().on_sources(lambda host: host.run("command -v hping3"))
        return all(job.status == 0 for job in jobs.values())

    def _find_vif(self) -> str:
        return self.settings.vif or self._name_hypervisor_in_error(self.determine_vif_number)

    def _locate(self, hosts: Hosts) -> tuple[Interfaces, Facts, list[str]]:
        """Return the interfaces, facts of the hypervisor, and addresses of the sources' packets.

        There are no addresses if the user's filter selects the packets instead.
        """
        given_pifs = self.settings.pifs
        finds_pifs = not given_pifs or "auto" in given_pifs
        needs_addresses = not self.settings.capture_filter
        needs_links = finds_pifs or self.settings.overlay  # they know the tunnels' ports, too
        vif, (facts, links), macs_by_source = in_parallel(
            self._find_vif,
            lambda: self._find_facts(needs_links),
            lambda: hosts.on_sources(
                lambda host: addresses_in_traffic(host, self.destination_ip, needs_addresses)
            ),
        )
        mac_of: dict[str, str] = {}  # by IP address; "" if a router is in between
        for macs in macs_by_source.values():
            mac_of |= macs
        addresses = list(mac_of) if needs_addresses else []
        pifs, route = self._name_hypervisor_in_error(
            lambda: physical_interfaces(
                self.run_command, given_pifs, vif, links if finds_pifs else None, mac_of
            )
        )
        interfaces = Interfaces(
            vif=vif,
            pifs=tuple(pifs),
            tunnelled=self.settings.overlay or route.is_tunnelled,
            tunnel_ports=links.tunnel_ports() if links else TUNNEL_PORTS,
            route=route.kind,
            toolstack=None if self.settings.vif else self.toolstack,
        )
        return interfaces, facts, addresses

    def _find_facts(self, needs_links: bool) -> tuple[Facts, Links | None]:
        """Return facts of the hypervisor and, if needed, its interfaces, or None."""
        hypervisor = self._connected().hypervisor
        # Whether files can be fetched should be known before the traffic.
        quietly(hypervisor.open_files().close)
        name = "look-up of tcpdump, interfaces and free space"
        command = FACTS_COMMAND
        if needs_links:
            command += OPEN_VSWITCH_COMMAND
        job = hypervisor.run(command, LONG_ANSWER_SECONDS, name)
        if not job.has_all_errors:
            hypervisor.check()
            raise CaptureError(
                f"{hypervisor.name}: a start-up file of the login shell redirects standard error, "
                "on which tcpdump reports: remove its 'exec 2>'"
            )
        facts = Facts(job.output)
        if not needs_links:
            return facts, None
        if not facts.links:  # run the failed command again, for an error that says why
            self.run_command("ip -o link", "name the physical interface with -i")
        return facts, Links(facts.interfaces)

    def _name_hypervisor_in_error(self, call: Callable[[], T]) -> T:
        """Return the answer of a call; an error that it raises gets the hypervisor's name first."""
        prefix = f"{self._host_settings[0].name}: "
        try:
            return call()
        except (RemoteCommandError, CaptureError) as error:
            if str(error).startswith(prefix):
                raise
            raise type(error)(f"{prefix}{error}") from None


# ---- Report: figures -------------------------------------------------------------------------


class Unit(Enum):
    """The unit of a figure."""

    MICROSECONDS = "µs"
    PACKETS = "packets"
    DELAYS = "delays"
    RATIO = "ratio"


class Scope(Enum):
    """The parts of the document that have a figure."""

    DELAYS = "directions, first and later packets of flows, stages, guest"
    DIRECTION = "directions"
    TRACE = "directions, with --stages"


@dataclass(frozen=True)
class Figure:
    """A figure of the document, as limits, Prometheus, the summary and the README know it."""

    name: str
    path: tuple[str, ...]  # the keys that lead to it in a part of the document
    unit: Unit
    scope: Scope
    help: str

    def find(self, part: Report) -> float | None:
        """Return the figure's value in a part of the document, or None if that lacks it."""
        return value_at(part, self.path)


def value_at(document: Report, path: Iterable[str]) -> float | None:
    """Return the number at a path in a document, or None if there is none."""
    value: Any = document
    for key in path:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    number: float | None = value
    return number


def _delay(name: str, description: str) -> Figure:
    return Figure(name, (name,), Unit.MICROSECONDS, Scope.DELAYS, description)


def _packets(name: str, description: str) -> Figure:
    return Figure(name, ("packets", name), Unit.PACKETS, Scope.DIRECTION, description)


def _percentile(percent: str) -> Figure:
    description = f"delay that {percent} % of the packets do not exceed"
    path = ("percentiles", percent)
    return Figure(f"p{percent}", path, Unit.MICROSECONDS, Scope.DELAYS, description)


FIGURES = (
    _delay("average", "mean delay (RFC 7679)"),
    _delay("minimum", "shortest delay"),
    _delay("maximum", "longest delay"),
    _delay("stdev", "standard deviation (of the population)"),
    _delay("median", "delay that half of the packets do not exceed"),
    _percentile("90"),
    _percentile("95"),
    _percentile("99"),
    _percentile("99.9"),
    _delay("pdv", "delay variation: p99 minus the minimum (RFC 5481)"),
    Figure(
        "ipdv",
        ("ipdv",),
        Unit.MICROSECONDS,
        Scope.DIRECTION,
        "mean absolute difference of successive delays (RFC 3393)",
    ),
    _packets("matched", "seen at both points"),
    _packets("ambiguous", "matched, but not timed: identical packets were sent"),
    _packets("lost", "seen at the first point only"),
    _packets(
        "undecided",
        "fate unknown: a capture ended too soon or missed some",
    ),
    _packets("duplicated", "copies that only the second point saw (RFC 5560)"),
    _packets("reordered", "overtaken by a later packet of the same stream (RFC 4737)"),
    Figure(
        "dropped",
        ("after_vif", "dropped"),
        Unit.PACKETS,
        Scope.TRACE,
        "seen at the vif, but never given to the guest (--stages)",
    ),
    Figure("negative", ("negative",), Unit.DELAYS, Scope.DELAYS, "delays below zero"),
    Figure("zero", ("zero",), Unit.DELAYS, Scope.DELAYS, "delays of exactly zero"),
    Figure(
        "loss",
        ("loss_ratio",),
        Unit.RATIO,
        Scope.DIRECTION,
        "lost / packets of the first point (RFC 7680)",
    ),
    Figure(
        "reordering",
        ("reordering", "ratio"),
        Unit.RATIO,
        Scope.DIRECTION,
        "reordered / packets with a delay (RFC 4737)",
    ),
)
UNITS = {figure.name: figure.unit for figure in FIGURES}


def figures_in(part: Report) -> dict[str, float]:
    """Return the values of the figures that a part of the report has, by name."""
    values = {figure.name: figure.find(part) for figure in FIGURES}
    return {name: value for name, value in values.items() if value is not None}


def info_of(report: Report) -> RunInfo:
    """Return the description of the run in a document."""
    return RunInfo.from_json(report["config"])


def parts_of(report: Report) -> dict[str, Report]:
    """Return the parts of a report that have figures, by name: "in", "out" and "guest"."""
    direction = info_of(report).direction
    if direction != "both":
        return {direction: report}
    # The top level of the report is about the way in.
    parts = {"in": report, "out": report.get("outbound"), "guest": report.get("guest")}
    return {name: part for name, part in parts.items() if part}


# ---- Report: the document --------------------------------------------------------------------


def build_report(
    analysis: Analysis, info: RunInfo, capture: Mapping[str, Report], files: bool = False
) -> dict[str, Any]:
    """Return the JSON document on an analysis, as the README describes it.

    `capture` is what is known about the captures of each point but isn't in their files.
    With `files` the user has given existing captures, and gets advice on these.
    Raises NoMatchError if no packet has a delay.
    """
    result, *outbound_results = analysis.results  # there is one of these with --direction both
    captured = {point: {**capture[point], **analysis.counts[point]} for point in analysis.counts}
    advice = file_advice(info) if files else measuring_advice(info)
    cut = {point: counts.get("cut", 0) for point, counts in captured.items()}
    problem = no_delay(result, info, advice, cut)
    if problem:
        raise NoMatchError(problem + main_loss(result.trace))

    warnings = [*info.incidents, *analysis.warnings]
    info = replace(info, achieved_rate=measure_rate(result, info))
    warnings += rate_warnings(result, info)
    warnings += traffic_warnings(result, info, captured, advice)
    warnings += capture_warnings(analysis.results, captured)
    report = direction_report(result, advice, warnings)
    for outbound in outbound_results:
        report["outbound"] = outbound_report(outbound, info, advice, warnings)
    if analysis.guest:
        report["guest"] = guest_report(analysis.guest, result)
        warnings += guest_warnings(analysis.guest)
    report["capture"] = captured
    report["warnings"] = warnings
    report["config"] = info.to_json()
    if result.trace:
        report["config"]["stamp_error"] = stamp_error_report(result.trace)
    report["schema_version"] = SCHEMA_VERSION
    return report


def direction_report(
    result: DirectionResult, advice: Advice, warnings: list[str]
) -> dict[str, Any]:
    """Return the report of a direction with at least one delay, and add to the warnings."""
    by_flow = delays_by_flow(result)
    delays = delay_statistics(by_flow.whole)
    extents = reordering(result)  # of the reordered packets
    ipdv = mean_ipdv(result.delays)
    warnings += matching_warnings(result, advice)
    warnings += delay_warnings(result, delays, advice)
    report: dict[str, Any] = {
        **asdict(delays),
        "unit": "microseconds",
        "packets": packets_report(result, len(extents)),
    }
    if by_flow.flows:
        report["flows"] = flows_report(by_flow)
    report |= {
        "loss_ratio": result.counts.loss_ratio,
        "reordering": {
            "ratio": len(extents) / result.counts.timed,
            "maximum_extent": max(extents.values(), default=0),
        },
        "ipdv": ipdv,
    }
    if result.trace:
        report |= stages_report(result.trace)
        warnings += stages_warnings(result.trace)
    return report


def outbound_report(
    outbound: DirectionResult, info: RunInfo, advice: Advice, warnings: list[str]
) -> Report | None:
    """Return the report of the way out, None if no packet has a delay; add to the warnings."""
    # The VM's packets may leave by another interface than those of the way in, which were seen.
    other_pif = "Does a firewall drop them, or do they leave by another interface (-i)?"
    if not info.measured:
        other_pif = "Does a firewall drop them, or do they leave by another interface?"
    advice = replace(advice, other_pif=other_pif)
    problem = no_delay(outbound, info, advice, cut={})
    if problem:
        warnings.append(f"outbound: {problem}{main_loss(outbound.trace)}")
        return None
    outbound_warnings: list[str] = []
    report = direction_report(outbound, advice, outbound_warnings)
    warnings += [f"outbound: {warning}" for warning in outbound_warnings]
    return report


def packets_report(result: DirectionResult, reordered: int) -> dict[str, int]:
    """Return the numbers of packets of a direction."""
    counts = result.counts
    return {
        result.direction.first: counts.first,
        result.direction.second: counts.second,
        "matched": counts.matched,
        "ambiguous": counts.ambiguous,
        "lost": counts.lost,
        "undecided": counts.undecided.total,
        "duplicated": counts.duplicated,
        "reordered": reordered,
        f"{result.direction.second}_only": counts.second_only,
    }


def flows_report(by_flow: FlowDelays) -> Report:
    """Return the number of flows, and the delays of first and later packets if both are known."""
    report: dict[str, object] = {"count": by_flow.flows}
    later = by_flow.later
    if by_flow.first and later:
        report["first"] = asdict(delay_statistics(by_flow.first))
        report["later"] = asdict(delay_statistics(later))
    return report


def guest_report(guest: GuestTimes, inbound: DirectionResult) -> Report:
    """Return the report on the time that the VM took to answer."""
    report: dict[str, object] = {}
    if guest.times:
        report = {**asdict(delay_statistics(guest.times.values())), "unit": "microseconds"}
    report["packets"] = {
        "answered": guest.answered,
        "unanswered": guest.unanswered,
        "undecided": guest.undecided,
        "ambiguous": guest.ambiguous,
    }
    # Only of probes whose delivery to the guest was traced, and without that delivery.
    own_times = processing_times(guest.times, inbound.trace)
    if own_times:
        report["own"] = {
            **asdict(delay_statistics(own_times)),
            "unit": "microseconds",
            "packets": len(own_times),
        }
    return report


# ---- Report: warnings ------------------------------------------------------------------------

COPY_GAP = 10_000_000  # ns; copies of one packet are captured within this time
MOST_COPIES = 8  # of one packet; where there are more, different packets look alike
COPIED_SHARE = 0.9  # of the packets, to warn that "each packet was captured twice"


@dataclass
class Advice:
    """Advice on packets that aren't measured; it names only options that are accepted."""

    distinct: str  # where packets can't be told apart
    undecided: str  # where the captures ended too early
    late: str  # where packets were not waited for long enough
    translation: str  # where most packets are seen on one interface only
    other_pif: str  # where the pif has no packets
    other_vif: str  # where the vif has no packets
    backwards: str  # where all packets pass the second point before the first
    one_way: str  # where some do
    no_traffic: str  # where neither has packets
    no_answers: str  # where neither has packets from the VM


# On packets that passed the vif, but not the pif, by how the pif was chosen.
ROUTE_ADVICE = {
    RouteKind.GIVEN: "Try -i auto, or the interface of the source if that is a VM of this host",
    RouteKind.SWITCHED: "If the source is a VM of this host, give its interface as -i; if this "
    "host routes the VM's packets, the interface that leads to the source",
    RouteKind.ROUTED: "The host routes the VM's packets: try another interface as -i",
    RouteKind.ASSUMED: "Give the interface that leads to the VM's network as -i",
}


def _other_pif_advice(info: RunInfo) -> str:
    """Return advice on a measurement where the pif has no packets."""
    other_pif = ROUTE_ADVICE[info.route or RouteKind.GIVEN]
    if info.route is RouteKind.ROUTED and not info.selection.translated:
        other_pif += f", and {match_nat_option(info)} if it translates addresses"
    if info.filter:
        return f"{other_pif}; does --filter match the packets there?"
    if info.overlay:
        return f"{other_pif}; traffic inside an encrypted tunnel (ESP) can't be found"
    return f"{other_pif}; traffic inside a tunnel is found with --overlay, unless it is encrypted"


def _other_vif_advice(info: RunInfo) -> str:
    """Return advice on a measurement where the vif has no packets."""
    other_vif = "Does a firewall drop them?"
    if info.toolstack:
        other_vif += " Is the VM's address on another interface (--num)?"
    if re.fullmatch(r"vif\d+\.\d+", info.vif):
        # A VM without Xen's drivers uses a card that QEMU emulates.
        emulated = info.vif.replace("vif", "tap")
        if info.toolstack == "xl":
            emulated = f"{info.vif}-emu"
        other_vif += f" If the VM is HVM, does it use its emulated interface (--vif {emulated})?"
    if info.filter:
        other_vif += " Does --filter match them there?"
    elif info.selection.translated:
        which = "both addresses are" if info.sources else "the address given as -d is"
        other_vif += f" If {which} translated, give --filter."
    elif info.route is RouteKind.ROUTED:
        other_vif += f" Are addresses translated ({match_nat_option(info)})?"
    return other_vif


def measuring_advice(info: RunInfo) -> Advice:
    """Return advice on a measurement; it leaves out the options that are in use."""
    distinct = "Send TCP SYNs or pings, or vary the payload"
    if info.selection.translated:
        distinct = "Use one source at a time (because of --match-nat)"
    elif info.traffic and not info.traffic.command:  # the packets of a pattern differ
        distinct = "Are they retransmissions, or packets of another run?"
    backwards = "Is -d the VM's address"
    if info.sources:
        backwards = "Are -s and -d swapped"
    if info.direction == "in":
        backwards += ", or is --direction out wanted"
    return Advice(
        distinct=distinct,
        undecided="Increase --wait",
        late="Packets match if they are at most 1 s apart, or --wait if that is longer",
        translation=translation_advice(info),
        other_pif=_other_pif_advice(info),
        other_vif=_other_vif_advice(info),
        backwards=f"{backwards}?",
        one_way="Let --filter select one direction, such as 'src host ...'",
        no_traffic="Is the destination the address of this VM? Do the packets come from the "
        "source's address? Does a firewall drop them earlier?",
        no_answers="Is the destination the VM's address? Does it answer this traffic?",
    )


def file_advice(info: RunInfo) -> Advice:
    """Return advice on existing captures."""
    no_traffic = "Do they contain IP packets?"
    has_addresses = bool(info.selection.sources or info.selection.destinations)
    if has_addresses:
        no_traffic = "Give other addresses with -s and -d, or swap them"
    or_destination = ""
    if not info.selection.destinations:
        or_destination = ", or the VM's address with -d"
    # The addresses of a measurement are in its description, and can't be left out.
    if info.measured or not has_addresses:
        nat_advice = ""
    elif info.selection.translated:
        nat_advice = ". With --match-nat leave out -s and -d, which apply to both interfaces"
    else:
        nat_advice = f". Are addresses translated ({match_nat_option(info)}, without -s and -d)?"
    return Advice(
        distinct="Capture packets that differ, such as TCP SYNs or pings",
        undecided="Capture for longer after the traffic",
        late="Do the captures overlap in time?",
        translation=translation_advice(info),
        other_pif="Give the capture of the interface that the packets pass"
        f"{or_destination}{nat_advice}",
        other_vif="Does a firewall drop the packets? Give the capture of the VM's interface"
        f"{or_destination}{nat_advice}",
        backwards="Are pif and vif swapped, or -s and -d, or is another --direction wanted?",
        one_way="Give the VM's address (-d)",
        no_traffic=no_traffic,
        no_answers="Is the address after -d the VM's?",
    )


def match_nat_option(info: RunInfo) -> str:
    """Return --match-nat with the direction it requires: it can't be used with --direction both."""
    if info.direction == "both":
        return "--match-nat with --direction in"
    return "--match-nat"


def translation_advice(info: RunInfo) -> str:
    """Return address translation as the first of several causes; "" if --match-nat is used."""
    if info.selection.translated:
        return ""
    return f"address translation ({match_nat_option(info)}), "


# With fewer delays than these a percentile is hardly more than the maximum by another name.
ENOUGH_DELAYS = {"p90": 5, "p95": 10, "p99": 50, "p99.9": 500}


def matching_warnings(result: DirectionResult, advice: Advice) -> list[str]:
    """Return warnings on packets that could not be matched or timed, with what to do."""
    counts = result.counts
    first = result.direction.first
    second = result.direction.second
    warnings: list[str] = []
    captured_twice_warning = captured_twice(result)
    if captured_twice_warning:
        warnings.append(captured_twice_warning)
    elif counts.ambiguous:
        warnings.append(_ambiguous_packets(result, advice))
    if counts.strays:
        warnings.append(_stray_arrivals(result, advice))
    fragmented = fragmented_on_the_way(result)
    if fragmented:
        warnings.append(
            f"{counted(fragmented, 'packet counts', 'packets count')} as lost, but arrived on the "
            f"{second} as fragments: its MTU is smaller than that of the {first}. Send smaller "
            "packets"
        )
    resized_packets = resized(result)
    if resized_packets:
        warnings.append(
            f"{counted(resized_packets, 'packet is', 'packets are')} not matched: segments were "
            f"merged or split (GRO, TSO, USO), so lengths on the {second} differ from those on the "
            f"{first}. Measure with small packets, or switch that off (ethtool -K)"
        )
    mostly_fragmented = 2 * fragmented >= counts.lost > 0
    is_explained = captured_twice_warning or resized_packets or mostly_fragmented
    if 2 * counts.matched < min(counts.first, counts.second) and not is_explained:
        warnings.append(
            "most packets of each interface were not seen on the other. Is there "
            f"{advice.translation}a tunnel of an unknown kind, or other traffic?"
        )
    return warnings


def _ambiguous_packets(result: DirectionResult, advice: Advice) -> str:
    explanation = advice.distinct  # how to send packets that can be told apart
    if are_later_fragments(result, PacketClass.AMBIGUOUS):
        explanation = (
            "They are later fragments of datagrams with the same IP id, as hping3 sends them"
        )
    return (
        f"{counted(result.counts.ambiguous, 'matched packet')} can't be told apart from others "
        f"that were sent: counted, but not timed. {explanation}"
    )


def _stray_arrivals(result: DirectionResult, advice: Advice) -> str:
    return (
        f"{counted(result.counts.strays, 'packet is', 'packets are')} not matched: the times on "
        f"the {result.direction.first} and the {result.direction.second} differ too much. Were "
        "packets sent again, did they take another path, or was the clock set? "
        f"{advice.late}"
    )


def captured_twice(result: DirectionResult) -> str:
    """Return a warning if the pif's capture has most packets several times, or ""."""
    times = _times_on_pif(result)
    if times < 2:
        return ""
    text = "twice" if times == 2 else f"{times} times"
    return (
        f"each packet was captured {text} on the pif, as with a SPAN port, -i any or a bridge that "
        "floods. Capture on an interface that each packet passes once, or remove the copies "
        "(editcap -d)"
    )


def _times_on_pif(result: DirectionResult) -> int:
    """Return how many copies of nearly every packet the pif has captured; 1 if that is unclear."""
    if result.direction.second == "pif":
        return _usual_arrivals(result)
    counts = result.counts
    # Copies are ambiguous. If addresses are translated, different packets may be, too.
    if counts.ambiguous < counts.matched / 2 or not counts.matched or result.translated:
        return 1
    times_by_id: defaultdict[int, list[int]] = defaultdict(list)
    for packet_id, time_ns in zip(result.ids, result.sent):
        times_by_id[packet_id].append(time_ns)
    [(copies, _)] = Counter(map(len, times_by_id.values())).most_common(1)
    copied_packets = sum(
        len(times) == copies and times[-1] - times[0] < COPY_GAP for times in times_by_id.values()
    )
    if copies > MOST_COPIES or copies * copied_packets < COPIED_SHARE * counts.first:
        return 1
    return copies


def _usual_arrivals(result: DirectionResult) -> int:
    """Return how many copies of most packets the second point has captured."""
    if result.counts.duplicated < COPIED_SHARE * result.counts.matched or not result.duplicates:
        return 1
    [(usual_duplicates, _)] = Counter(result.duplicates.values()).most_common(1)
    return 1 + usual_duplicates


def delay_warnings(result: DirectionResult, delays: DelayStatistics, advice: Advice) -> list[str]:
    """Return warnings on delays that can't be right: negative, zero or very long ones."""
    warnings: list[str] = []
    if delays.negative:
        cause = "the time stamps of two CPUs disagree, or the clock was set"
        if has_both_directions(result):
            cause = f"they are answers, or other packets on the way back. {advice.one_way}"
        warnings.append(
            f"{counted(delays.negative, 'delay is', 'delays are')} negative (down to "
            f"{delays.minimum:g} µs): {cause}"
        )
    if delays.zero:
        warnings.append(
            f"{counted(delays.zero, 'delay is', 'delays are')} exactly 0: the time stamps are too "
            "coarse, or the clock did not advance from one CPU to the next (as on Xen with "
            "several CPUs of dom0)"
        )
    if delays.maximum * 1000 > LONGEST_WAIT:  # in ns
        outliers = [delay for delay in result.delays if delay > LONGEST_WAIT]
        warnings.append(
            f"{counted(len(outliers), 'delay is', 'delays are')} longer than "
            f"{LONGEST_WAIT / NANOSECONDS:g} s (up to {delays.maximum:g} µs): was the clock set?"
        )
    return warnings


def has_both_directions(result: DirectionResult) -> bool:
    """Return whether the packets with negative delays go another way than the others.

    They do if the two groups have no source and no destination in common.  The caller knows that
    there are packets in both.
    """
    if result.identities[0][0] == TEXT:  # without addresses
        return False
    forwards: set[bytes] = set()  # b"s" and a source, or b"d" and a destination
    backwards: set[bytes] = set()  # those of the packets with negative delays
    for rank in result.ranks(PacketClass.MATCHED):
        addresses = addresses_of(result.identity(rank))
        half = len(addresses) // 2
        ends = backwards if result.delays[rank] < 0 else forwards
        ends.update((b"s" + addresses[:half], b"d" + addresses[half:]))
    return backwards.isdisjoint(forwards)


FEWEST_FOR_RATE = 50  # packets of a source


def captured_probes(result: DirectionResult, info: RunInfo) -> int:
    """Return how many packets of the sources' traffic the pif has seen."""
    # hping3's SYNs open no socket, so the source's kernel answers each SYN-ACK with an RST.
    packets = sent_datagrams(result) - resets_of_own_syns(result)
    if info.transmitted is not None:
        return min(packets, info.transmitted)  # any more are of other traffic
    return packets


def measure_rate(result: DirectionResult, info: RunInfo) -> float | None:
    """Return how many packets a second each source has sent, by the stamps at the pif.

    It is None where others have generated the traffic, or a source has sent too few packets.
    """
    if info.traffic is None or not info.sources or result.direction is not IN:
        return None
    senders = len(info.sources) if info.senders is None else info.senders
    if not senders:
        return None
    packets = captured_probes(result, info) / senders  # of each
    if packets < FEWEST_FOR_RATE:
        return None
    seconds = (result.sent[-1] - result.sent[0]) / NANOSECONDS
    intervals = packets - 1
    return round(intervals / seconds, 1) if seconds > 0 else None


def rate_warnings(result: DirectionResult, info: RunInfo) -> list[str]:
    """Return warnings if the probes were fewer a second than asked for, or more."""
    traffic = info.traffic
    if traffic is None or result.direction is not IN:
        return []
    warnings = []
    if is_too_slow(result, info):
        warnings.append(
            f"each source reached less than 95 % of --rate {traffic.rate}. Use a lower one, "
            "or more sources"
        )
    if traffic.load and info.duration:
        # Both rate and duration are only kept approximately; each source sends one at the start.
        most_sent = (1.1 * traffic.rate * info.duration + 1) * len(info.sources)
        packets = captured_probes(result, info)
        if packets > most_sent:
            warnings.append(
                f"{counted(packets, 'packet was', 'packets were')} captured as probes, but the "
                f"sources sent at most {most_sent:.0f}: other packets, such as the load's, are "
                "counted. Give --load another protocol or port"
            )
    return warnings


def is_too_slow(result: DirectionResult, info: RunInfo) -> bool:
    """Return whether the sources sent less than 95 % of the rate that they were asked for."""
    traffic = info.traffic
    if traffic is None or not info.achieved_rate:
        return False
    is_paced = not traffic.command or "{interval}" in traffic.command  # by --rate
    if not is_paced or info.filter:  # which may select fewer packets than those of the sources
        return False
    rate = info.achieved_rate  # at the pif
    if info.transmitted:  # what was lost before the pif was sent, too
        rate *= info.transmitted / captured_probes(result, info)
    return rate < 0.95 * traffic.rate


def traffic_warnings(
    result: DirectionResult, info: RunInfo, captured: Mapping[str, Report], advice: Advice
) -> list[str]:
    """Return warnings if packets were under way at the end, or were not as many as were sent.

    `captured` has the counts of each point's captures, as the report has them.
    """
    warnings = []
    under_way = result.counts.undecided.under_way
    if under_way and info.sources:
        warnings.append(
            f"{counted(under_way, 'packet at the end is', 'packets at the end are')} counted only "
            "as undecided: the captures may have stopped before all of them reached the "
            f"{result.direction.second}. {advice.undecided}"
        )
    sent = info.transmitted
    # The user's own filter may select other packets than those of the sources.
    if sent is None or result.direction is not IN or info.filter:
        return warnings
    # The sources' kernels send RSTs, which hping3 doesn't count.
    resets = resets_of_own_syns(result)
    if resets and under_way:  # it isn't known how many of those under way are RSTs, too
        return warnings
    seen = sent_datagrams(result) - resets + under_way
    if seen > sent:
        warnings.append(
            f"{counted(seen, 'packet was', 'packets were')} captured on the pif, but this run sent "
            f"{sent}: other traffic between the same hosts (another run?) is counted, too"
        )
    pif = captured["pif"]
    if seen + pif.get("cut", 0) + pif.get("dropped", 0) < sent:
        warnings.append(
            f"only {seen} of {counted(sent, 'packet')} sent reached the pif: the rest was lost "
            f"before the hypervisor, or came in by another interface. {advice.other_pif}"
        )
    return warnings


def capture_warnings(
    results: Iterable[DirectionResult], captured: Mapping[str, Report]
) -> list[str]:
    """Return warnings on packets that captures have missed or truncated."""
    warnings = []
    for point, counts in captured.items():
        dropped = counts.get("dropped")
        if dropped:
            warnings.append(
                f"{point}: the kernel dropped {counted(dropped, 'packet')} before tcpdump could "
                "read them: generate less traffic, or give the hypervisor more CPU"
            )
    for result in results:
        uncaptured = result.counts.undecided.uncaptured
        if uncaptured:
            warnings.append(
                f"{counted(uncaptured, 'packet')} may or may not be lost, since the capture on the "
                f"{result.direction.second} missed or truncated packets: counted only as undecided"
            )
    return warnings


def guest_warnings(guest: GuestTimes) -> list[str]:
    """Return a warning on probes whose answers are ambiguous."""
    if not guest.ambiguous:
        return []
    return [
        f"guest: left out {counted(guest.ambiguous, 'probe')} that were sent more than once "
        "(retransmissions?), since it isn't clear which copy was answered"
    ]


def percentile_warning(reports: Iterable[Report], percentiles: Iterable[str]) -> str:
    """Return a warning on those percentiles for which a run has too few packets, or ""."""
    timed_packets = [
        part["packets"]["matched"] - part["packets"]["ambiguous"]
        for report in reports
        for name, part in parts_of(report).items()
        if name != "guest"
    ]
    if not timed_packets:
        return ""
    fewest = min(timed_packets)
    close = [name for name in ENOUGH_DELAYS if name in percentiles and fewest < ENOUGH_DELAYS[name]]
    if not close:
        return ""
    subject = f"{close[0]} is"
    if len(close) > 1:
        subject = f"the percentiles {', '.join(close)} are"
    return f"with {counted(fewest, 'packet')} {subject} close to the maximum"


def no_delay(result: DirectionResult, info: RunInfo, advice: Advice, cut: Mapping[str, int]) -> str:
    """Return why no packet has a delay that can be true, or "" if one has.

    `cut` is the number of packets, by point, that were captured too short to identify them.
    """
    counts = result.counts
    if not counts.matched:
        return _no_match(result, info, advice, cut)
    if not counts.timed:
        return captured_twice(result) or (
            f"{counted(counts.matched, 'packet was', 'packets were')} seen on both interfaces, but "
            "no delay is certain: others that were sent can't be told apart from them. "
            f"{advice.distinct}"
        )
    longest = max(result.delays)
    if longest >= 0:
        return ""
    return (
        f"every delay is negative ({counted(counts.timed, 'packet')}, "
        f"{min(result.samples()) / 1000:g} to {longest / 1000:g} µs): the packets pass the "
        f"{result.direction.second} before the {result.direction.first}. {advice.backwards}"
    )


def _no_match(
    result: DirectionResult, info: RunInfo, advice: Advice, cut: Mapping[str, int]
) -> str:
    """Return why no packet was seen at both points."""
    direction = result.direction
    counts = result.counts
    seen = {
        direction.first: counts.first + counts.undecided.sent,
        direction.second: counts.second + counts.undecided.unwatched_first,
    }
    if any(cut.get(point, 0) > packets for point, packets in seen.items()):
        cause = (
            f"The snap length was too short to identify {counted(sum(cut.values()), 'packet')}. "
            "Capture more of each packet (tcpdump -s)"
        )
    elif counts.strays:
        cause = _stray_arrivals(result, advice)
    elif counts.undecided.total and not counts.first and not counts.second:
        cause = "The captures don't overlap in time"
    elif seen["pif"] and seen["vif"]:
        cause = _cause_of_no_match(result, advice)
    elif seen["pif"]:
        cause = advice.other_vif
    elif seen["vif"]:
        cause = advice.other_pif
    elif direction is IN:
        cause = advice.no_traffic
    else:
        cause = advice.no_answers
    on_pif = f"{seen['pif']} on {info.pif}"
    on_vif = f"{seen['vif']} on {info.vif}"
    return f"no packet was seen on both interfaces ({on_pif}, {on_vif}). {cause}"


def _cause_of_no_match(result: DirectionResult, advice: Advice) -> str:
    """Return why packets of both points don't match."""
    if 2 * fragmented_on_the_way(result) >= result.counts.lost > 0:
        return (
            f"They arrive on the {result.direction.second} as fragments: its MTU is smaller. "
            "Send smaller packets"
        )
    if resized(result):
        return (
            "They differ in length, since segments were merged or split (GRO, TSO, USO). Measure "
            "with small packets"
        )
    if not advice.translation:
        return "The packets differ. Is there other traffic?"
    return f"The packets differ. Is there {advice.translation}or other traffic?"


# ---- Limits ----------------------------------------------------------------------------------

COMPARATORS: dict[str, Callable[[float, float], bool]] = {">": gt, ">=": ge, "<": lt, "<=": le}
LIMIT_ALIASES = {
    "avg": "average",
    "mean": "average",
    "min": "minimum",
    "max": "maximum",
    "stddev": "stdev",
    "p50": "median",
    "loss_ratio": "loss",
}
# The units that a limit may be given in, and their size in the figure's own unit; exact, since
# figures may equal the limit.
LIMIT_UNITS = {
    Unit.MICROSECONDS: {
        "": Decimal(1),
        "ns": Decimal("0.001"),
        "µs": Decimal(1),
        "ms": Decimal(1000),
        "s": Decimal(1_000_000),
    },
    Unit.RATIO: {"": Decimal(1), "%": Decimal("0.01")},
    Unit.PACKETS: {"": Decimal(1)},
    Unit.DELAYS: {"": Decimal(1)},
}
LIMIT_PARTS = ("in", "out", "outbound", "guest", *STAGES)


@dataclass(frozen=True)
class FigureLimit:
    """A condition that a figure should not meet, such as "p99>200us" or "outbound.loss>=0.1%"."""

    text: str
    name: str  # of the figure, with its part
    figure: Figure
    path: tuple[str, ...]  # of the figure in the document
    comparator: str
    threshold: float  # in the unit of the figure
    unit: str  # in which the user gave the threshold, or ""

    def breach(self, report: Report) -> str | None:
        """Return how the report meets the condition, for people; None if it doesn't.

        A value that is unknown meets every condition: a monitor must not take it for a good one.
        """
        value = value_at(report, self.path)
        if value is None:
            return f"{self.name} is not known (limit {self.text})"
        if not COMPARATORS[self.comparator](value, self.threshold):
            return None
        return f"{self.name} is {self._show(value)} (limit {self.text})"

    def _show(self, value: float) -> str:
        """Return a value in the unit that the limit was given in."""
        unit = self.unit
        if self.figure.unit is Unit.MICROSECONDS:
            unit = unit or "µs"
        converted = value / float(LIMIT_UNITS[self.figure.unit][unit])
        # Delays and counts are shown in full, since they may be very close to the limit.
        digits = 6 if self.figure.unit is Unit.RATIO else 12
        return f"{converted:.{digits}g} {unit}".strip()


@dataclass(frozen=True)
class ChangeLimit:
    """A limit on the change from a baseline, such as "slower", which a slower run breaches.

    All compared figures are the worse the greater they are.
    """

    text: str
    preposition: str  # between the text and the baseline's name
    figures: tuple[str, ...]  # of the comparison; a change of one of them breaches the limit
    either_way: bool  # improvements breach it, too

    def breach(self, report: Report) -> str | None:
        """Return how a run breaches the limit, or why that is unknown; None if it doesn't."""
        comparison = report.get("comparison")
        if comparison is None:  # only the last run of its kind has a comparison
            return None
        if min(comparison["runs"]) < FEWEST_RUNS:
            return f"{self.text!r} can't be decided: it requires {FEWEST_RUNS} runs on each side"
        relevant = {
            name: comparison[name]
            for name in self.figures
            if self.either_way or comparison[name]["shift"] > 0
        }
        changes = [
            self._show(name, change)
            for name, change in relevant.items()
            if change["distinguishable"]
        ]
        if changes:
            return f"{self.text} {self.preposition} {comparison['path']}: {'; '.join(changes)}"
        if any(change["distinguishable"] is None for change in relevant.values()):
            return f"{self.text!r} can't be decided: {EQUAL_RUNS}"
        return None

    def _show(self, name: str, change: Report) -> str:
        """Return a figure before and now, and the factor if it has at least doubled."""
        show: Callable[[float], str] = duration_text
        if name == "loss_ratio":
            name = "loss"
            show = percent_text
        before = change["baseline"]
        now = change["current"]
        text = f"{name} {show(now)}, was {show(before)}"
        if 0 < 2 * before <= now:
            text += f", {now / before:.2g} times"
        return text


Limit = FigureLimit | ChangeLimit
CHANGE_LIMITS = {
    "changed": ChangeLimit("changed", "from", tuple(COMPARED), either_way=True),
    "slower": ChangeLimit("slower", "than", ("median", "p99"), either_way=False),
    "lossier": ChangeLimit("lossier", "than", ("loss_ratio",), either_way=False),
}


def is_on_change(text: str) -> bool:
    """Return whether the text of a limit is one on the change from a baseline."""
    return text.strip().lower() in CHANGE_LIMITS


def parse_limits(
    texts: Sequence[str], directions: Iterable[str], stages: bool
) -> dict[str, list[Limit]]:
    """Return, by direction, the limits for runs of that direction, as `parse_limit` does."""
    return {
        direction: [parse_limit(text, direction, stages) for text in texts]
        for direction in dict.fromkeys(directions)
    }


def parse_limit(text: str, direction: str, stages: bool) -> Limit:
    """Return the limit that a text describes.

    `direction` and `stages` are what is measured.  Raises UsageError if the text is not a limit,
    or if its figure will not be known.
    """
    name = text.strip().lower()
    if name in CHANGE_LIMITS:
        return CHANGE_LIMITS[name]
    with naming(f"--fail-if {text!r}"):
        return _parse_figure_limit(name, direction, stages)


LIMIT_SYNTAX = (
    r"(?:([a-z_]+)\.)?"  # the part of the document
    r"([a-z_]+[\d.]*)\s*"  # the figure
    r"(>=|<=|>|<)\s*"
    r"(\d+\.?\d*(?:e-?\d{1,2})?)\s*"  # the threshold
    r"(\S*)"  # its unit
)


def _parse_figure_limit(text: str, direction: str, stages: bool) -> FigureLimit:
    limit = re.fullmatch(LIMIT_SYNTAX, text)
    if not limit:
        raise UsageError(
            "not a limit. Give NAME>NUMBER (or >=, <, <=) with an optional unit, such as "
            f"'p99>200us' or 'loss>0.1%', or one of {', '.join(CHANGE_LIMITS)}"
        )
    part, name, comparator, threshold, unit = limit.groups(default="")
    figures = {figure.name: figure for figure in FIGURES}
    figure = figures.get(LIMIT_ALIASES.get(name, name))
    if figure is None:
        raise UsageError(f"there is no figure {name!r}. Use one of {', '.join(figures)}")
    path = _part_path(part, direction, stages) + figure.path
    _check_figure(part, name, figure.scope, direction, stages)
    unit = re.sub("us|\u03bcs", "µs", unit)  # U+03BC is the Greek letter mu, not the micro sign
    value = _threshold(name, figure.unit, threshold, unit)
    if figure.unit is Unit.RATIO and value >= 1 and (value > 1 or comparator == ">"):
        hint = "" if unit else f". Did you mean {threshold}%?"
        raise UsageError(f"{name} is at most 1, or 100 %{hint}")
    full_name = f"{part}.{name}" if part else name
    return FigureLimit(text, full_name, figure, path, comparator, value, unit)


def _check_figure(part: str, name: str, scope: Scope, direction: str, stages: bool) -> None:
    """Raise UsageError if a figure of this scope will not be known of a part."""
    if part in ("guest", *STAGES) and scope is not Scope.DELAYS:
        raise UsageError(f"{part} has no figure {name!r}")
    if scope is Scope.TRACE and not stages:
        raise UsageError(f"{name} requires --stages")
    is_outbound = direction == "out" or part in ("out", "outbound")
    if is_outbound and (part == "to_guest" or scope is Scope.TRACE):
        raise UsageError(f"{part or name} is only known of packets to the VM")


def _threshold(name: str, figure_unit: Unit, number: str, unit: str) -> float:
    """Return a number of some unit in the figure's own unit; UsageError for another unit."""
    units = LIMIT_UNITS[figure_unit]
    if unit not in units:
        accepted = ", ".join(symbol for symbol in units if symbol) or "none"
        raise UsageError(f"{unit!r} is not a unit of {name} (units: {accepted})")
    return float(Decimal(number) * units[unit])


def _part_path(part: str, direction: str, stages: bool) -> tuple[str, ...]:
    """Return where a part is in the document; UsageError if it will not be there."""
    if part in STAGES:
        if not stages:
            raise UsageError(f"{part} requires --stages")
        return ("stages", part)
    # The top level is about the only direction or, of both, about the way in.
    if part in ("", direction) or (part, direction) in (("outbound", "out"), ("in", "both")):
        return ()
    if part not in LIMIT_PARTS:
        raise UsageError(f"there is no part {part!r}. Use one of {', '.join(LIMIT_PARTS)}")
    if direction != "both":
        raise UsageError(f"{part} requires --direction both")
    if part == "guest":
        return ("guest",)
    return ("outbound",)  # "out" is another name for it


# ---- Outputs: files --------------------------------------------------------------------------

MOST_LINKS = 40  # symbolic links in a path; the kernel follows no more either


def is_standard_output(path: str) -> bool:
    """Return whether a path, such as "-" or /dev/stdout, leads to the standard output."""
    if path == "-":
        return True
    try:
        return sys.stdout is not None and os.path.samestat(os.stat(path), os.fstat(1))
    except OSError:
        return False


def is_special(path: str) -> bool:
    """Return whether a path is something that can't be replaced, such as a device or a pipe."""
    return os.path.exists(path) and not os.path.isfile(path)


def write_file(path: str, write: Callable[[BinaryIO], object], append: bool = False) -> None:
    """Open a file for the function `write`, which writes it; "-" is the standard output.

    A regular file is replaced as a whole, unless `append` is set; anything else is written to.
    Raises UsageError if that fails, and ReaderGone for a pipe without a reader.
    """
    name = "standard output" if path == "-" else path
    if path == "-" and sys.stdout is None:
        raise UsageError(f"can't write {name}: it is closed. Name a file with --output")
    try:
        if is_standard_output(path):
            with open(os.dup(1), "wb") as file:  # a duplicate, since the file is closed
                write(file)
        elif is_special(path):
            with open(path, "ab", opener=_open_special) as file:
                write(file)
        elif append:
            _append_file(_target(path), write)
        else:
            _replace_file(_target(path), write)
    except BrokenPipeError:
        raise ReaderGone from None
    except OSError as error:
        raise UsageError(f"can't write {name}: {error.strerror}") from error


def _target(path: str) -> str:
    """Return the path of a file to write with all symbolic links resolved.

    Raises PermissionError for a link on the way that somebody else may have planted, in /tmp for
    example: the kernel refuses these, too (fs.protected_symlinks).
    """
    unresolved = os.path.abspath(path).split("/")[::-1]  # names; the last one is the next
    resolved = "/"
    links = 0
    while unresolved:
        entry = os.path.normpath(os.path.join(resolved, unresolved.pop()))
        if not os.path.islink(entry):
            resolved = entry
            continue
        links += 1
        if links > MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        directory = os.stat(resolved)
        is_shared = directory.st_mode & stat.S_ISVTX and directory.st_mode & stat.S_IWOTH
        if is_shared and os.lstat(entry).st_uid not in (os.geteuid(), directory.st_uid):
            raise PermissionError(
                errno.EACCES, "a link of another user in a shared directory leads there"
            )
        target = os.readlink(entry)
        unresolved += target.split("/")[::-1]
        if target.startswith("/"):
            resolved = "/"
    return resolved


def _replace_file(path: str, write: Callable[[BinaryIO], object]) -> None:
    """Write a new file, and put it in place of the one at a path once it is complete.

    The new file gets the mode of the one that was there, and its owner if root writes it.
    """
    temporary = os.path.join(os.path.dirname(path), f".netweaver-{os.urandom(6).hex()}")
    try:
        with open(temporary, "xb") as file:
            if os.path.exists(path):
                before = os.stat(path)
                # By the descriptor: another user of the directory may have put a link in its place.
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode) & 0o777)
                if os.geteuid() == 0:
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
            write(file)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _open_without_links(path: str, flags: int) -> int:
    """Open a file whose path has no links; OSError if another user has put one there."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _open_special(path: str, flags: int) -> int:
    """Open a device or a pipe; OSError if nobody opens the pipe to read within ANSWER_SECONDS."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            descriptor = os.open(path, flags & ~os.O_CREAT | os.O_NONBLOCK)
            break
        except OSError as error:
            if error.errno != errno.ENXIO or not stat.S_ISFIFO(os.stat(path).st_mode):
                raise
        if time.monotonic() > deadline:
            raise OSError(errno.ENXIO, f"nobody has opened it to read within {ANSWER_SECONDS} s")
        time.sleep(0.05)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EBUSY, "somebody has just replaced it")
    os.set_blocking(descriptor, True)
    return descriptor


def _append_file(path: str, write: Callable[[BinaryIO], object]) -> None:
    """Write at the end of a file; if that fails, leave the file as it was."""
    content = io.BytesIO()
    write(content)
    unwritten = content.getbuffer()
    with open(path, "ab", buffering=0, opener=_open_without_links) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            while unwritten:
                unwritten = unwritten[file.write(unwritten) :]
        except BaseException:  # a signal, too
            os.ftruncate(file.fileno(), size)
            raise


def write_result(
    path: str, text: str, append: bool = False, after_failure: str | None = None
) -> None:
    """Write a result to a file, as write_file does.

    If that fails, the text (or `after_failure`, unless it is None) goes to the standard output, and
    the error is raised all the same.
    """
    try:
        write_text(path, text, append)
    except UsageError as error:
        if is_standard_output(path):
            raise
        try:
            write_text("-", text if after_failure is None else after_failure)
        except NetWeaverError:
            raise error from None
        raise UsageError(f"{error}. The result is on standard output instead") from error


def write_text(path: str, text: str, append: bool = False) -> None:
    """Write a text to a file, as write_file does."""
    data = text.encode("utf-8", "replace")
    write_file(path, lambda file: file.write(data), append)


def check_writable(path: str) -> None:
    """Raise UsageError if a file can't be written, as far as that is known beforehand."""
    if is_standard_output(path):
        return
    if os.path.isdir(path):
        raise UsageError(f"can't write {path}: it is a directory")
    try:
        directory = os.path.dirname(_target(path))
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}") from error
    if is_special(path):
        written = path
    elif os.path.isdir(directory):
        written = directory  # which gets a new file in place of the old one
    else:
        raise UsageError(f"can't write {path}: no such directory")
    if not os.access(written, os.W_OK):
        raise UsageError(f"can't write {path}: no permission to write there")


def is_terminal(stream: IO[str] | None) -> bool:
    """Return whether a standard stream is a terminal; a stream closed at the start is None."""
    return stream is not None and stream.isatty()


@dataclass
class RunResult:
    """The result of a run, and its position in a series."""

    position: int  # from 0
    report: Report
    results: Sequence[DirectionResult]
    ends_series: bool = False  # since it was interrupted


class Output:
    """A form in which the results of runs are published."""

    takes_several_runs = True
    has_exit_code = False  # it publishes the exit code, so all other outputs are completed first

    @classmethod
    def for_result(cls, path: str, screen: Screen, exit_code: Callable[[], int]) -> Output:
        """Return the output that writes the result in this form, if --format can choose it.

        `exit_code` returns the exit code as all other outputs leave it, once they are complete.
        """
        raise NotImplementedError

    @staticmethod
    def check(labels: Iterable[str]) -> None:
        """Raise UsageError if results with these --label names can't be published."""

    @staticmethod
    def write_failure(path: str, describe: Callable[[], RunInfo], exit_code: int) -> None:
        """Publish that a run, which `describe` returns, has failed, if this form can show that."""

    def add(self, report: Report, results: Sequence[DirectionResult]) -> None:
        """Take the result of the next run."""
        raise NotImplementedError

    def finish(self) -> None:
        """Complete the output after the last run."""


class JsonOutput(Output):
    """A JSON document on each run, a line each; at a terminal it is indented."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._indent = 2 if path == "-" and is_terminal(sys.stdout) else None
        self._written = False

    @classmethod
    def for_result(cls, path: str, screen: Screen, exit_code: Callable[[], int]) -> Output:
        """Return the output that writes the result in this form."""
        return cls(path)

    def add(self, report: Report, results: Sequence[DirectionResult]) -> None:
        """Write the document on the next run, so that it is there whatever happens later."""
        text = json.dumps(report, indent=self._indent)
        write_result(self._path, f"{text}\n", append=self._written)
        self._written = True


# ---- Outputs: text for people ----------------------------------------------------------------

WIDTH = 80  # of a terminal
HEIGHT = 23  # of a terminal, without the line of the prompt
BINS = 12  # lines of a histogram
BAR = 40  # width of a histogram's longest bar
# A histogram's scale is logarithmic where its ends differ by more than this factor.
LOGARITHMIC_HISTOGRAM = 4
DURATION_UNITS = (("s", 1e6), ("ms", 1e3), ("µs", 1.0))  # with their sizes in microseconds
# Nine columns fill the width: with a tenth each row would be wrapped.
DELAY_COLUMNS = ("median", "average", "stdev", "minimum", "p90", "p95", "p99", "p99.9", "maximum")
RUN_COLUMNS = ("median", "average", "p99", "maximum", "loss")
# Codes of SGR, the terminals' escape sequence for colours:
BOLD = "1"
RED = "31"
YELLOW = "33"


def printable(text: str) -> str:
    """Return a text with its control characters escaped, so that no terminal obeys them."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def duration_text(microseconds: float, digits: int = 3) -> str:
    """Return a time in the largest unit in which it is at least 1, else in ns.

    `digits` limits the significant ones of values below 1000.
    """
    for unit, size in DURATION_UNITS:
        value = microseconds / size
        if abs(value) >= 999.5:  # rounded to three digits, it would be shown as 1e+03
            return f"{value:.0f} {unit}"
        if abs(value) >= 1:
            return f"{value:.{digits}g} {unit}"
    return f"{microseconds * 1000:.0f} ns"


def percent_text(ratio: float) -> str:
    """Return a ratio in percent, in at most eight characters: a table has no room for more."""
    if 0 < ratio < 1e-5:
        return "<0.001 %"
    digits = 3 if ratio >= 1e-3 else 2
    return f"{100 * ratio:.{digits}g} %"


def histogram(delays: Iterable[int], fancy: bool = True, bins: int = BINS) -> list[str]:
    """Return lines that show how delays (ns), which may be counted already, are distributed.

    There are at most so many bins, up to the 99th percentile; a last line counts the delays above
    it.  The bars are made of blocks if `fancy`, else of ASCII characters.
    """
    ranked = RankedDelays(delays)
    edges = _bin_edges(ranked, bins)
    labels = _edge_labels(edges)
    labels[-1] = f"> {labels[-1]}"
    ranks = [bisect_left(ranked, edge) for edge in edges]  # of the first delay of each line
    sizes = [end - start for start, end in pairwise([*ranks, len(ranked)])]
    if not sizes[-1]:
        del labels[-1], sizes[-1]
    largest = max(sizes)
    label_width = max(map(len, labels))
    size_width = len(str(largest))
    return [
        f"{label:>{label_width}}  {size:>{size_width}}  {_bar(size / largest, fancy)}".rstrip()
        for label, size in zip(labels, sizes)
    ]


def _bin_edges(ranked: RankedDelays, bins: int) -> list[int]:
    """Return the lower edges (ns) of at most so many bins, and the end of the last one."""
    # From percentile 1 to 99: single delays must not stretch the scale.
    low = ranked[len(ranked) // 100]
    end = ranked[(len(ranked) - 1) * 99 // 100] + 1  # a bin is without its end
    if low > 0 and end > LOGARITHMIC_HISTOGRAM * low:
        inner = [round(low * (end / low) ** (i / bins)) for i in range(1, bins)]
    else:
        inner = [low + (end - low) * i // bins for i in range(1, bins)]
    # A narrow scale has fewer edges than bins: some are rounded to the same ns, or to an end.
    return sorted({ranked[0], end, *(edge for edge in inner if low < edge < end)})


def _edge_labels(edges: Sequence[int]) -> list[str]:
    """Return the edges (ns) as durations, with as many digits as it takes to tell them apart."""
    labels: list[str] = []
    for digits in range(3, 10):
        labels = [duration_text(edge / 1000, digits) for edge in edges]
        if len(set(labels)) == len(labels):
            break
    return labels


def _bar(share: float, fancy: bool) -> str:
    """Return a bar that is as long as this share of the longest one."""
    character = "█" if fancy else "#"
    return character * math.ceil(share * BAR)  # rounded up: a single packet has a bar, too


def date_text(nanoseconds: int) -> str:
    """Return a time (ns since 1970) to the minute, in UTC."""
    return f"{iso_time(nanoseconds)[:16].replace('T', ' ')} UTC"


def side_names(info: RunInfo) -> dict[str, str]:
    """Return the interfaces, or the files' names without their directories, by point."""
    names = {"pif": info.pif, "vif": info.vif}
    return {
        point: ",".join(map(os.path.basename, text.split(","))) for point, text in names.items()
    }


def vm_names(reports: Iterable[Report]) -> str:
    """Return the VMs of several runs, each once."""
    return ", ".join(dict.fromkeys(info_of(report).subject for report in reports))


def run_name(info: RunInfo) -> str:
    """Return the VM and the traffic of a run, as its messages name it."""
    return f"{info.subject} {info.traffic_name}".strip()


def run_label(name: str, numbers: Sequence[int]) -> str:
    """Return the name of runs with their numbers, from 1: "web1 syn runs 1, 3"."""
    word = "run" if len(numbers) == 1 else "runs"
    return f"{name} {word} {', '.join(map(str, numbers))}"


def rate_of(info: RunInfo) -> float | None:
    """Return the packets a second that each source sent or, if that is unknown, was to send.

    Returns None if the run generated no traffic, or if that is unknown.
    """
    if info.traffic is None:
        return None
    if info.achieved_rate:
        return info.achieved_rate
    command = info.traffic.command
    if command and "{interval}" not in command:  # it has a rate of its own
        return None
    return info.traffic.rate


def rate_text(info: RunInfo) -> str:
    """Return the rate at which packets were sent, or "" if it is unknown."""
    rate = rate_of(info)
    if rate is None:
        return ""
    return f"{rate:.0f}/s"


def _cells(texts: Iterable[str]) -> str:
    """Return the cells of a row of a table."""
    return "".join(f" {text:>7}" for text in texts)


# ---- Outputs: summary and table --------------------------------------------------------------


def summary(report: Report, delays: Iterable[int], fancy: bool = True) -> list[str]:
    """Return lines for people on a run, which fit a terminal.

    `delays` are its samples (ns), which may be counted already.  See `histogram` for `fancy`.
    """
    for loss_places in (3, 2, 1, 0):  # as many as fit
        lines = wrap_for_terminal(_summary_lines(report, fancy, loss_places))
        if len(lines) <= HEIGHT:
            break
    # The histogram also has a title, and a line for the delays above its bins.
    bins = min(BINS, HEIGHT - len(lines) - 2 - _rows_of_warnings(report))
    if bins > 1:
        title = "Distribution of the delay"
        if info_of(report).direction == "both":
            title += " (in)"
        lines.append(title)
        lines += wrap_for_terminal(f" {line}" for line in histogram(delays, fancy, bins))
    return lines


def _rows_of_warnings(report: Report) -> int:
    """Return how many rows of a terminal the warnings take that follow the summary."""
    name = run_name(info_of(report))
    texts = [f"netweaver: warning: {name}: {warning}" for warning in report["warnings"]]
    return sum(math.ceil(len(text) / WIDTH) for text in texts)


def _summary_lines(report: Report, fancy: bool, loss_places: int) -> list[str]:
    """Return the lines of a summary without the histogram; see `summarized_losses`."""
    return [
        *heading_lines(report),
        *delay_lines(report),
        *packet_lines(report),
        *stage_lines(report, fancy),
        *summarized_losses(report, loss_places),
        *queue_lines(report),
        *comparison_lines(report, "this run"),
    ]


def wrap_for_terminal(lines: Iterable[str]) -> list[str]:
    """Return lines without control characters, wrapped if they are too long for a terminal."""
    fitted = []
    for line in map(printable, lines):
        if len(line) <= WIDTH:
            fitted.append(line)
        else:
            # Indented more than any first line, so that it isn't taken for one.
            fitted += _wrapped(line, " " * 13)
    return fitted


def heading_lines(report: Report) -> list[str]:
    """Return lines on what was measured, the VM's name first."""
    info = info_of(report)
    title = info.subject
    if info.traffic_name:
        title += f", {info.traffic_name}"
    if report.get("interrupted"):
        title += ", interrupted"
    rate = rate_of(info)
    if rate is not None:
        title += f" ({counted(round(rate), 'packet')} a second)"
    return _wrapped(f"{title}; {_interfaces(info)}", " ")


def _interfaces(info: RunInfo) -> str:
    """Return the interfaces, and how the vif was found."""
    names = side_names(info)
    text = f"pif {names['pif']}, vif {names['vif']}"
    if info.toolstack:
        text += f" (found by {info.toolstack})"
    return text


def _wrapped(text: str, indent: str) -> list[str]:
    """Return a text in lines that fit a terminal, all but the first of them indented."""
    return wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def delay_lines(report: Report) -> list[str]:
    """Return a table of the delays of each direction and of the guest, and lines on flows."""
    lines = [f"{'Delay':<8}{_cells(DELAY_COLUMNS)}"]
    parts = parts_of(report)
    for name, part in parts.items():
        figures = figures_in(part)
        if "median" in figures:
            cells = _cells(duration_text(figures[column]) for column in DELAY_COLUMNS)
            lines.append(f" {name:<7}{cells}")
    for name, part in parts.items():
        flows = part.get("flows", {})
        if "first" in flows:
            first = duration_text(flows["first"]["median"])
            later = duration_text(flows["later"]["median"])
            lines.append(f" {name:<9}first packet of a flow {first}, later ones {later} (medians)")
    return lines


def packet_lines(report: Report) -> list[str]:
    """Return lines on the fates of the packets of each direction."""
    lines = ["Packets"]
    for name, part in parts_of(report).items():
        lines += _wrapped(f" {name:<9}{packet_text(name, part)}", " " * 10)
    return lines


def packet_text(name: str, part: Report) -> str:
    """Return the counts of packets of a direction or of the guest, without needless zeros."""
    packets = part["packets"]
    if name == "guest":
        counts = [
            f"{counted(packets['answered'], 'probe')} answered",
            f"{packets['unanswered']} unanswered",
        ]
        kinds = [kind for kind in packets if kind not in ("answered", "unanswered")]
    else:
        [direction] = DIRECTIONS[name]
        second_only = packets[f"{direction.second}_only"]
        counts = [
            f"{packets[direction.first]} on the {direction.first}",
            f"{packets['matched']} matched",
            f"{packets['lost']} lost ({percent_text(part['loss_ratio'])})",
        ]
        kinds = ["ambiguous", "undecided", "duplicated", "reordered"]
        if second_only:
            counts.append(f"{second_only} only on the {direction.second}")
    counts += [f"{packets[kind]} {kind}" for kind in kinds if packets[kind]]
    return ", ".join(counts)


def summarized_losses(report: Report, loss_places: int) -> list[str]:
    """Return lines on where packets were lost, or on how to learn that.

    They show at most `loss_places` places, but at least one of the way in, and at most one of the
    way out.
    """
    lost = any(part.get("loss_ratio") for part in parts_of(report).values())
    if lost and info_of(report).measured and "stages" not in report:
        return [" --stages shows where packets are lost"]
    lines: list[str] = []
    for name, part in parts_of(report).items():
        most = max(1, loss_places)
        if name == "out":
            most = min(1, loss_places)
        lines += loss_lines(name, part, info_of(report), most)
    return lines


def queue_lines(report: Report) -> list[str]:
    """Return a line on the vif's queue, if packets were lost or dropped, or else none."""
    info = info_of(report)
    queue = info.platform.get("vif")
    if not queue:
        return []
    is_relevant = any(part.get("loss_ratio") for part in parts_of(report).values())
    line = f" {info.vif}: {_queue_text(queue)}"
    before = queue.get("before")
    after = queue.get("after")
    if before and after:
        to_guest = after["tx_dropped"] - before["tx_dropped"]
        from_guest = after["rx_dropped"] - before["rx_dropped"]
        line += f", dropped {to_guest} to the guest, {from_guest} from it"
        # The interface's counters leave out what its queueing discipline drops.
        if queue.get("qdisc") != "noqueue" and "stages" not in report:
            line += " (not by tc)"
        is_relevant = is_relevant or to_guest > 0 or from_guest > 0
    return [line] if is_relevant else []


def _queue_text(queue: Report) -> str:
    """Return the queueing discipline of an interface, and its length if it has one."""
    text = queue.get("qdisc") or "unknown queue"
    length = queue.get("queue_length")
    return text if length is None else f"{text}, length {length}"


def table(reports: Sequence[Report]) -> list[str]:
    """Return lines for people on several runs, with the means of those of one kind."""
    info = info_of(reports[0])
    lines = [
        *_wrapped(f"{vm_names(reports)}, {counted(len(reports), 'run')}; {_interfaces(info)}", " "),
        f"{'Traffic':<19}{'run':>5}{'rate':>15}{_cells(RUN_COLUMNS)}",
    ]
    runs: defaultdict[RunKind, list[tuple[int, Report]]] = defaultdict(list)
    for number, report in enumerate(reports, 1):
        runs[info_of(report).kind].append((number, report))
    vm = info.subject  # whose interfaces the lines above name
    for kind, numbered_reports in runs.items():
        info = info_of(numbered_reports[0][1])
        if kind.vm != vm:
            vm = kind.vm
            lines += _wrapped(f"{vm}; {_interfaces(info)}", " ")
        label = f" {info.traffic_name}"
        for number, report in numbered_reports:
            lines += _run_rows(label, number, report)
        if len(numbered_reports) > 1:
            lines += _mean_rows(label, [report for _, report in numbered_reports])
    lines += [
        f" run {number} was interrupted"
        for number, report in enumerate(reports, 1)
        if report.get("interrupted")
    ]
    for report in reports:
        lines += comparison_lines(report, run_name(info_of(report)))
    return wrap_for_terminal(lines)


def _run_rows(label: str, number: int, report: Report) -> list[str]:
    """Return a run's rows for each direction and the guest, their stages, and losses."""
    info = info_of(report)
    rows = []
    for name, part in parts_of(report).items():
        if "median" in part:
            rows.append(_table_row(label, str(number), name, rate_text(info), figures_in(part)))
        for stage, stage_part in part.get("stages", {}).items():
            rows.append(_table_row(f"   {stage}", str(number), name, "", figures_in(stage_part)))
        rows += loss_lines(name, part, info)
    return rows


def _mean_rows(label: str, reports: Sequence[Report]) -> list[str]:
    """Return the rows of the means and standard deviations of several runs, by part."""
    runs_of_part: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    for report in reports:
        for name, part in parts_of(report).items():
            if "median" in part:
                runs_of_part[name].append(figures_in(part))
    rows = []
    for name, runs in runs_of_part.items():
        if len(runs) < 2:
            continue
        means = {}
        deviations = {}
        for column in RUN_COLUMNS:
            if column in runs[0]:  # the guest has no loss
                values = [figures[column] for figures in runs]
                means[column] = _mean(values)
                deviations[column] = math.sqrt(_variance(values))
        rows.append(_table_row(label, "mean", name, "", means))
        rows.append(_table_row(label, "s.d.", name, "", deviations))
    return rows


def _table_row(
    label: str, run: str, direction: str, rate: str, figures: Mapping[str, float]
) -> str:
    cells = _cells(_figure_text(column, figures) for column in RUN_COLUMNS)
    return f"{label:<19.19}{run:>5} {direction:<6}{rate:>8}{cells}".rstrip()


def _figure_text(name: str, figures: Mapping[str, float]) -> str:
    if name not in figures:
        return ""
    if UNITS[name] is Unit.MICROSECONDS:
        return duration_text(figures[name])
    return percent_text(figures[name])


def comparison_lines(report: Report, subject: str) -> list[str]:
    """Return lines on what has changed since the baseline, or none without a comparison.

    `subject` is the name of what is compared with it.
    """
    comparison = report.get("comparison")
    if not comparison:
        return []
    before, now = comparison["runs"]
    runs = f"({counted(before, 'run')} before, {now} now)"
    texts = [_change_text(name, comparison[name]) for name in COMPARED]
    if min(before, now) < FEWEST_RUNS:
        shifts = ", ".join(" ".join(text.split()) for text in texts)  # without padding
        too_few = f"too few runs for a verdict ({FEWEST_RUNS} needed on each side)"
        return [f"{subject}: {too_few}; baseline {comparison['path']}", f" {shifts} {runs}"]
    heading = f"{subject} compared with {comparison['path']}"
    return [heading, f" {_verdict(comparison)} {runs}", *(f" {text}" for text in texts)]


def _change_text(name: str, change: Report) -> str:
    """Return the shift of a figure, with its interval if there is one."""
    text = f"{_figure_label(name):<8}{_shift_text(name, change['shift'])}"
    if change["interval"]:
        text += f" (99 %: {_interval_text(name, *change['interval'])})"
    return text


def _verdict(comparison: Report) -> str:
    """Return which figures of enough runs differ, or why none is known to."""
    differences = []
    for name in COMPARED:
        change = comparison[name]
        if change["distinguishable"]:
            word = "higher" if change["shift"] > 0 else "lower"
            differences.append(f"{_figure_label(name)} is {word}")
    if differences:
        return f"significant difference: {', '.join(differences)}"
    if comparison["distinguishable"] is None:
        return f"no verdict: {EQUAL_RUNS}"
    return "no significant difference; within run-to-run variation"


def _figure_label(name: str) -> str:
    return name.removesuffix("_ratio")


def _shift_text(name: str, shift: float) -> str:
    if name == "loss_ratio":
        return f"{100 * shift:+.3g} percentage points"
    sign = "-" if shift < 0 else "+"
    return f"{sign}{duration_text(abs(shift))}"


def _interval_text(name: str, low: float, high: float) -> str:
    if name == "loss_ratio":  # the text of the shift, which comes first, has the unit
        return f"{100 * low:+.3g} to {100 * high:+.3g}"
    return f"{_shift_text(name, low)} to {_shift_text(name, high)}"


class TextOutput(Output):
    """A summary of one run, or a table of several, for people."""

    def __init__(self, screen: Screen, path: str | None) -> None:
        self._screen = screen
        self._path = path  # None: stderr
        self._reports: list[Report] = []
        self._delays: Counter[int] = Counter()

    @classmethod
    def for_result(cls, path: str, screen: Screen, exit_code: Callable[[], int]) -> Output:
        """Return the output that writes the result in this form."""
        return cls(screen, path)

    def add(self, report: Report, results: Sequence[DirectionResult]) -> None:
        """Take the report of the next run."""
        self._reports.append(report)
        if len(self._reports) == 1:  # only a single run is shown with a histogram
            self._delays = Counter(results[0].samples())

    def finish(self) -> None:
        """Show the runs."""
        if not self._reports:
            return
        if len(self._reports) > 1:
            lines = table(self._reports)
        else:
            lines = summary(self._reports[0], self._delays, self._screen.unicode)
        if self._path is not None:
            self._screen.end_live()
            shown = map(self._screen.shown, lines)
            write_result(self._path, "".join(f"{line}\n" for line in shown))
        else:
            for line in lines:
                is_heading = not line.startswith(" ")
                self._screen.say(line, colour=BOLD if is_heading else "")


# ---- Outputs: CSV ----------------------------------------------------------------------------

CSV_FIELDS = [column.name for column in fields(PacketFields)]
# The first flag of a row, by its packet's class: these are all classes after matching.
CSV_FLAGS = {
    PacketClass.MATCHED: "",
    PacketClass.AMBIGUOUS: "ambiguous",
    PacketClass.LOST: "lost",
    PacketClass.UNDECIDED: "undecided",
}


def csv_rows(result: DirectionResult) -> Iterator[list[object]]:
    """Yield a row for each packet of the first point: time, fields, delay in µs and flags."""
    reordered = reordering(result)
    for rank, kind in enumerate(result.classes):
        flags = [CSV_FLAGS[PacketClass(kind)]]
        if rank in reordered:
            flags.append("reordered")
        if rank in result.duplicates:
            flags.append("duplicated")
        delay = ""
        if result.delays[rank] != NO_DELAY:
            delay = f"{result.delays[rank] / 1000:.3f}"
        yield [
            iso_time(result.sent[rank]),
            *vars(describe(result.identity(rank))).values(),
            delay,
            " ".join(filter(None, flags)),
        ]


class CsvOutput(Output):
    """A table of the packets of each run's first direction.

    That of several runs has a column with the number of the run.
    """

    def __init__(self, path: str, several: bool) -> None:
        self._path = path
        self._several = several
        self._run_number = 0  # from 1
        self._written = False

    def add(self, report: Report, results: Sequence[DirectionResult]) -> None:
        """Write the packets of the next run."""
        self._run_number += 1
        write_file(self._path, lambda file: self._write(file, results[0]), append=self._written)
        self._written = True

    def _write(self, file: BinaryIO, result: DirectionResult) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="")
        writer = csv.writer(text, lineterminator="\n")
        if not self._written:
            heading = ["run"] if self._several else []
            writer.writerow([*heading, "time", *CSV_FIELDS, "delay_us", "flags"])
        run = [self._run_number] if self._several else []
        writer.writerows([*run, *row] for row in csv_rows(result))
        text.flush()
        text.detach()  # so that `text` leaves the file open: the caller closes it


# ---- Outputs: Prometheus ---------------------------------------------------------------------

PROMETHEUS_HELP = {
    "success": "1 if the measurement succeeded, else 0.",
    "exit_code": "Exit code of netweaver.",
    "info": "The measurement, described by labels.",
    "warnings": "Number of warnings.",
    "measured_timestamp_seconds": "Time at which the traffic started.",
    "delay_seconds": "Time from one interface to the other; guest: the VM's time to answer.",
    "packets": "Packets by outcome.",
    "stage_seconds": "Time in a stage between the interfaces, by the kernel's trace.",
    "negative_delays": "Delays below zero.",
    "zero_delays": "Delays of exactly zero.",
    "loss_ratio": "Lost packets / packets at the first point (both without undecided ones).",
    "reordering_ratio": "Reordered packets / packets with a delay.",
}
# Labels that netweaver sets itself, or to which Prometheus gives a meaning.
RESERVED_LABELS = frozenset(
    "hypervisor name_label destination source traffic traffic_port traffic_command traffic_load"
    " measured direction statistic kind stage login pif vif version le quantile".split()
)


@dataclass
class Sample:
    """A value of a series, with the labels that it doesn't share with all others."""

    family: str  # in PROMETHEUS_HELP
    value: float
    labels: dict[str, str] = field(default_factory=dict)


def prometheus(info: RunInfo, code: int, report: Report | None = None) -> str:
    """Return the outcome of a run for node_exporter's textfile collector, in base units.

    `info` names what was, or should have been, measured; without a report the run has failed.
    """
    samples = [Sample("success", int(report is not None)), Sample("exit_code", code)]
    if report:
        samples += run_samples(info, report)
        for name, part in parts_of(report).items():
            samples += part_samples(name, part)
    common = series_labels(info)
    lines = []
    for family, description in PROMETHEUS_HELP.items():
        family_samples = [sample for sample in samples if sample.family == family]
        if family_samples:
            lines.append(f"# HELP netweaver_{family} {description}")
            lines.append(f"# TYPE netweaver_{family} gauge")
        for sample in family_samples:
            labels = _label_text({**common, **sample.labels})
            lines.append(f"netweaver_{family}{{{labels}}} {sample.value!r}")
    return "\n".join(lines) + "\n"


def run_samples(info: RunInfo, report: Report) -> list[Sample]:
    """Return the samples of a run as a whole."""
    login = info.hypervisor or ""
    about = {"pif": info.pif, "vif": info.vif, "version": info.version, "login": login}
    samples = [Sample("info", 1, about), Sample("warnings", len(report["warnings"]))]
    if info.started is not None:
        samples.append(Sample("measured_timestamp_seconds", info.started // NANOSECONDS))
    return samples


def part_samples(name: str, part: Report) -> list[Sample]:
    """Return the samples of a direction or of the guest."""
    direction = {"direction": name}
    samples = []
    for figure in FIGURES:
        value = figure.find(part)
        if value is None or figure.unit is Unit.PACKETS:  # packets are counted below
            continue
        if figure.unit is Unit.MICROSECONDS:
            labels = {**direction, "statistic": figure.name}
            samples.append(Sample("delay_seconds", value / 1e6, labels))
        else:
            # negative_delays, zero_delays, loss_ratio or reordering_ratio
            samples.append(Sample(f"{figure.name}_{figure.unit.value}", value, direction))
    counts = {**part["packets"], **(part.get("after_vif") or {})}
    for kind, number in counts.items():
        samples.append(Sample("packets", number, {**direction, "kind": kind}))
    for stage, stage_part in part.get("stages", {}).items():
        for statistic, value in figures_in(stage_part).items():
            if UNITS[statistic] is Unit.MICROSECONDS:
                labels = {**direction, "stage": stage, "statistic": statistic}
                samples.append(Sample("stage_seconds", value / 1e6, labels))
    return samples


def series_labels(info: RunInfo) -> dict[str, str]:
    """Return the labels that all series of a measurement have, even if it fails.

    They distinguish all measurements of a VM: the traffic's port, command and load are not in its
    name.  Only the series `info` has the interfaces, which may be unknown after a failure, and the
    login.
    """
    labels = {prometheus_name(key): value for key, value in info.labels.items()}
    labels |= {
        "hypervisor": "",
        "name_label": info.name_label or "",
        "destination": info.destination or "",
        "source": ",".join(map(_host_of, info.sources)),
        "traffic": info.traffic_name,
        "measured": info.direction,
        "direction": info.direction,  # series on one part have its name instead
    }
    if info.hypervisor:
        labels["hypervisor"] = _host_of(info.hypervisor)
    if info.traffic:
        details = {
            "traffic_port": info.traffic.port,
            "traffic_command": info.traffic.command,
            "traffic_load": info.traffic.load,
        }
        labels |= {name: str(value) for name, value in details.items() if value}
    return labels


def _host_of(text: str) -> str:
    """Return the host in [user@]host[:port], or all of a text that isn't that, as in a failure."""
    try:
        return Target(text).host
    except UsageError:
        return text


def prometheus_name(key: str) -> str:
    """Return a key as the name of a label, with "_" for invalid characters and before a digit."""
    name = re.sub(r"[^A-Za-z0-9_]", "_", key)
    if key[:1].isdecimal():
        return f"_{name}"
    return name


def check_labels(keys: Iterable[str]) -> None:
    """Raise UsageError for a label whose name in Prometheus is another label's, too."""
    names: set[str] = set()
    for key in keys:
        name = prometheus_name(key)
        if name in RESERVED_LABELS or name.startswith("__"):
            raise UsageError(f"--label {key}: netweaver uses the label {name} itself")
        if name in names:
            raise UsageError(f"--label {key}: another label becomes {name} in Prometheus, too")
        names.add(name)


def _label_text(labels: Mapping[str, str]) -> str:
    """Return labels in Prometheus' text format."""
    pairs = []
    for name, value in labels.items():
        # Line breaks stay, since the format has an escape for them.
        lines = "\n".join(map(printable, value.split("\n")))
        escaped = lines.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        pairs.append(f'{name}="{escaped}"')
    return ",".join(pairs)


class PrometheusOutput(Output):
    """A file of series for node_exporter's textfile collector, on one run."""

    takes_several_runs = False
    has_exit_code = True

    @staticmethod
    def check(labels: Iterable[str]) -> None:
        """Raise UsageError if these --label names can't be those of a series."""
        check_labels(labels)

    @staticmethod
    def write_failure(path: str, describe: Callable[[], RunInfo], exit_code: int) -> None:
        """Write the series of a run that has failed."""
        write_text(path, prometheus(describe(), exit_code))

    def __init__(self, path: str, exit_code: Callable[[], int]) -> None:
        self._path = path
        self._exit_code = exit_code
        self._report: Report | None = None

    @classmethod
    def for_result(cls, path: str, screen: Screen, exit_code: Callable[[], int]) -> Output:
        """Return the output that writes the result in this form."""
        return cls(path, exit_code)

    def add(self, report: Report, results: Sequence[DirectionResult]) -> None:
        """Take the report of the run."""
        check_labels(info_of(report).labels)
        self._report = report

    def finish(self) -> None:
        """Write the file, with the exit code that all other outputs have led to."""
        if self._report:
            info = info_of(self._report)
            text = prometheus(info, self._exit_code(), self._report)
            # For standard output, if the file can't be written: that is an error with this code.
            failed = prometheus(info, UsageError.exit_code, self._report)
            write_result(self._path, text, after_failure=failed)


# ---- Outputs: pictures -----------------------------------------------------------------------

# Of Okabe and Ito's colours, which everyone can tell apart; parts and stages share none.
PART_COLOURS = {"in": "#0072B2", "out": "#D55E00", "guest": "#000000"}
STAGE_COLOURS = ("#F0E442", "#009E73", "#CC79A7", "#999999")
CURVE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
CURVE_STYLES = {"median": "o-", "p99": "^--", "loss": "x-"}  # a marker, then a line
PART_MARKERS = {"in": "o", "out": "^"}
PART_LINES = {"in": "-", "out": "--"}
PICTURE_ENDINGS = (".png", ".svg", ".pdf")
# Where delays differ by more than this factor from the median, their axis is logarithmic.
LOGARITHMIC_PICTURE = 20
POINTS_TO_RASTERIZE = 5000  # more would make .svg and .pdf files large


@dataclass
class RunPoint:
    """A direction's figures of one run, in a picture of several."""

    position: float  # on the horizontal axis: the achieved rate, or the number of the run
    group: float  # equal for the runs whose mean is drawn: the intended rate, or the number
    figures: dict[str, float]


def check_picture(path: str) -> None:
    """Raise UsageError if a picture of that name can't be made."""
    if not is_standard_output(path) and not path.lower().endswith(PICTURE_ENDINGS):
        raise UsageError(f"--plot {path}: the name must end in .png, .svg or .pdf")
    new_figure()  # fails without matplotlib


def new_figure() -> Picture:
    """Return a new figure of matplotlib; UsageError if that isn't installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"--plot requires matplotlib ({error}): pip install matplotlib") from None
    return Figure(figsize=(10, 5.4), layout="constrained")


def save_figure(figure: Picture, path: str, *title: str) -> None:
    """Write a figure with a title of several lines in the format that the path's ending names."""
    from matplotlib.text import Text

    figure.suptitle("\n".join(map(printable, title)), fontsize="medium")
    for text in figure.findobj(Text):  # a name with $ is no formula
        text.set_parse_math(False)
        text.set_usetex(False)
    file_format = "png"  # of standard output
    if path.lower().endswith(PICTURE_ENDINGS):
        file_format = path.lower().rpartition(".")[2]
    write_file(path, lambda file: figure.savefig(file, format=file_format, dpi=150))


def plot(path: str, report: Report, results: Sequence[DirectionResult]) -> None:
    """Draw the delay of each packet over time, and how the delays are distributed."""
    figure = new_figure()
    over_time, distribution = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    names = side_names(info_of(report))
    start = min(result.sent[0] for result in results if result.sent)
    delays_us = [delay / 1000 for result in results for delay in result.samples()]
    logarithmic = min(delays_us) > 0 and max(delays_us) > LOGARITHMIC_PICTURE * report["median"]
    if logarithmic:
        over_time.set_yscale("log")
        _label_plainly(over_time.yaxis)
    _draw_stages(over_time, results[0], start, logarithmic)
    for result in results:
        _draw_delays(over_time, result, start, names)
        _draw_distribution(distribution, result)
    over_time.set(xlabel="time since the first packet (s)", ylabel="delay (µs)")
    _label_percentiles(distribution, max(result.counts.timed for result in results))
    for axes in (over_time, distribution):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    save_figure(figure, path, _picture_heading(report, start), _picture_figures(report, results))


def _picture_heading(report: Report, start: int) -> str:
    """Return the VM, the traffic with its rate, the direction and the start (ns) of a run."""
    info = info_of(report)
    title = run_name(info)
    if rate_text(info):
        title += f" at {rate_text(info)}"
    directions = " and ".join(direction.name for direction in info.selection.directions)
    return f"{title}, direction {directions}, {date_text(start)}"


def _picture_figures(report: Report, results: Sequence[DirectionResult]) -> str:
    """Return the main figures of a run's first direction."""
    counts = results[0].counts
    figures = [
        f"{name} {duration_text(value)}"
        for name, value in figures_in(report).items()
        if name in ("median", "p99", "p99.9")
    ]
    figures.append(f"{counts.lost} of {counted(counts.first, 'packet')} lost")
    text = ", ".join(figures)
    if len(results) > 1:
        text = f"{results[0].direction.name}: {text}"
    return text


def _label_plainly(axis: Axis) -> None:
    """Label a logarithmic axis with numbers such as 200 or 0.1, not as powers of ten."""
    from matplotlib.ticker import LogFormatter

    class PlainFormatter(LogFormatter):
        def __call__(self, value: float, position: int | None = None) -> str:
            if not super().__call__(value, position):  # a tick that is to have no label
                return ""
            return f"{value:g}"

    axis.set_major_formatter(PlainFormatter())
    # Label some minor ticks on an axis of up to two powers of ten, and all on half of one.
    axis.set_minor_formatter(PlainFormatter(minor_thresholds=(2, 0.5)))


def _seconds(result: DirectionResult, ranks: Iterable[int], start: int) -> list[float]:
    """Return when packets were sent, in seconds since `start` (ns)."""
    return [(result.sent[rank] - start) / NANOSECONDS for rank in ranks]


def _draw_stages(axes: Axes, result: DirectionResult, start: int, logarithmic: bool) -> None:
    """Draw how long each stage took, if that was traced.

    The stages are stacked, unless the axis is logarithmic: there heights don't add up.
    """
    if not result.trace:
        return
    ranks, stages = result.trace.traced_packets()
    seconds = _seconds(result, ranks, start)
    durations = {name: [time_ns / 1000 for time_ns in times] for name, times in stages.items()}
    if logarithmic:
        for colour, (name, values) in zip(STAGE_COLOURS, durations.items()):
            axes.plot(seconds, values, ".", markersize=2, color=colour, label=name)
    elif durations:  # stackplot fails without any
        axes.stackplot(
            seconds,
            *durations.values(),
            labels=list(durations),
            colors=STAGE_COLOURS,
            alpha=0.6,
        )


def _draw_delays(axes: Axes, result: DirectionResult, start: int, names: Mapping[str, str]) -> None:
    """Draw the delay of each packet over time, and at the lower edge the lost ones."""
    direction = result.direction
    colour = PART_COLOURS[direction.name]
    label = f"{direction.name}: {names[direction.first]} to {names[direction.second]}"
    timed = result.ranks(PacketClass.MATCHED)
    axes.plot(
        _seconds(result, timed, start),
        [result.delays[rank] / 1000 for rank in timed],
        PART_MARKERS[direction.name],
        markersize=3,
        color=colour,
        alpha=0.6,
        markeredgewidth=0,
        rasterized=len(timed) > POINTS_TO_RASTERIZE,
        label=printable(label),
    )
    lost = result.ranks(PacketClass.LOST)
    if lost:
        axes.plot(
            _seconds(result, lost, start),
            [0.02] * len(lost),  # of the height of the axes: see `transform`
            "x",
            markersize=6,
            color=colour,
            label=f"{direction.name}: {result.counts.lost} lost",
            transform=axes.get_xaxis_transform(),
        )


def _draw_distribution(axes: Axes, result: DirectionResult) -> None:
    """Draw the share of packets that took no longer than a delay.

    The axis shows 1 / (1 - share), which on a logarithmic scale puts p99 and p99.9 apart.
    """
    delays_us = sorted(delay / 1000 for delay in result.samples())
    size = len(delays_us)
    positions = [size / (size - rank) for rank in range(size)]  # with a share of rank / size
    axes.plot(
        positions,
        delays_us,
        color=PART_COLOURS[result.direction.name],
        linestyle=PART_LINES[result.direction.name],
        rasterized=size > POINTS_TO_RASTERIZE,
    )


def _label_percentiles(axes: Axes, size: int) -> None:
    """Label the axis of a distribution of at most so many packets in percent.

    It ends at p99.9, or beyond if there are more than 1000 packets.
    """
    end = max(size, 1000)
    # By position: 1 / (1 - share), see _draw_distribution.
    labels = {1: "0", 2: "50", 10: "90", 100: "99", 1000: "99.9", 10_000: "99.99"}
    positions = [position for position in labels if position <= end]
    axes.set(xscale="log", xlabel="packets within this delay (%)", xlim=(1, end))
    axes.set_xticks(positions, [labels[position] for position in positions])
    axes.minorticks_off()


def run_curves(reports: Sequence[Report]) -> dict[str, list[RunPoint]]:
    """Return the figures of several runs by curve, such as "syn in": the traffic and the part.

    If the runs are of several VMs, a curve's name begins with the VM's.
    """
    over_rates = is_sweep(reports)
    several_vms = len({info_of(report).subject for report in reports}) > 1
    curves: defaultdict[str, list[RunPoint]] = defaultdict(list)
    for number, report in enumerate(reports, 1):
        info = info_of(report)
        prefix = ""
        position = float(number)
        group = position
        if several_vms:
            prefix = f"{info.subject} "
        if info.traffic:
            prefix += "command " if info.traffic.command else f"{info.traffic.pattern} "
            if over_rates:
                group = info.traffic.rate
                position = rate_of(info) or group
        for name, part in parts_of(report).items():
            figures = figures_in(part)
            if "median" in figures:
                curves[prefix + name].append(RunPoint(position, group, figures))
    return curves


def is_sweep(reports: Sequence[Report]) -> bool:
    """Return whether the runs' traffic was sent at different rates."""
    traffics = [info_of(report).traffic for report in reports]
    return len({traffic.rate for traffic in traffics if traffic}) > 1


def plot_runs(path: str, reports: Sequence[Report]) -> None:
    """Draw median, 99th percentile and loss of several runs, over their rates or one by one."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = new_figure()
    delay_axes, loss_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for colour, (label, points) in zip(cycle(CURVE_COLOURS), run_curves(reports).items()):
        _draw_curve(delay_axes, points, "median", colour)
        _draw_curve(delay_axes, points, "p99", colour)
        _draw_curve(loss_axes, points, "loss", colour)
        delay_axes.plot([], [], color=colour, label=label)  # for the legend
    for name in ("median", "p99"):
        delay_axes.plot([], [], CURVE_STYLES[name], color="grey", label=name)
    figure.legend(loc="outside lower center", ncols=6, fontsize="small", frameon=False)
    if is_sweep(reports):
        delay_axes.set(xscale="log", yscale="log")
        _label_plainly(delay_axes.yaxis)
        _label_plainly(loss_axes.xaxis)
        loss_axes.set_xlabel("packets a second (achieved)")
    else:
        delay_axes.set_ylim(bottom=0)
        loss_axes.set_xlabel("run")
        loss_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    delay_axes.set_ylabel("delay (µs)")
    loss_axes.set(ylabel="loss", ylim=(0, None))
    loss_axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    for axes in (delay_axes, loss_axes):
        axes.grid(alpha=0.3)
    save_figure(figure, path, *_runs_title(reports))


def _runs_title(reports: Sequence[Report]) -> list[str]:
    """Return the VMs, the number of runs and their time, and the traffic and directions."""
    infos = [info_of(report) for report in reports]
    heading = f"{shorten(vm_names(reports), 60)}, {counted(len(reports), 'run')}"
    if infos[0].started is not None:
        heading += f", {date_text(infos[0].started)}"
    names = ", ".join(dict.fromkeys(info.traffic_name for info in infos))
    directions = dict.fromkeys(part for report in reports for part in parts_of(report))
    return [heading, f"{shorten(names, 100)}; {', '.join(directions)}"]


def _draw_curve(axes: Axes, points: Sequence[RunPoint], name: str, colour: str) -> None:
    """Draw one figure of all runs: a marker for each, and a line through the means of groups."""
    marker = CURVE_STYLES[name][0]
    line = CURVE_STYLES[name][1:]
    groups: defaultdict[float, list[tuple[float, float]]] = defaultdict(list)
    for point in points:
        if name in point.figures:
            groups[point.group].append((point.position, point.figures[name]))
    means = []
    for group in groups.values():
        positions, values = zip(*group)
        axes.plot(positions, values, marker, color=colour)
        means.append((_mean(positions), _mean(values)))
    if means:  # the guest has no loss
        positions, values = zip(*sorted(means))
        axes.plot(positions, values, line, color=colour)


class PictureOutput(Output):
    """A picture of the packets of a run, or of the figures of several."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._reports: list[Report] = []

    def add(self, report: Report, results: Sequence[DirectionResult]) -> None:
        """Draw the first run, in case it stays the only one."""
        self._reports.append(report)
        if len(self._reports) == 1:
            plot(self._path, report, results)

    def finish(self) -> None:
        """Draw the runs, if there are several."""
        if len(self._reports) > 1:
            plot_runs(self._path, self._reports)


# ---- Outputs: all of them --------------------------------------------------------------------

# Those that --format chooses from; a table and pictures have options of their own.
FORMATS: dict[str, type[Output]] = {
    "text": TextOutput,
    "json": JsonOutput,
    "prometheus": PrometheusOutput,
}


LIMIT_EXCEEDED = 7  # exit code, beside those of errors


class Outcome:
    """The outputs of all runs, the limits that they break, and the messages at the end.

    An output that fails stops neither the runs nor another output.  `subject` names what is
    measured in the errors of outputs.
    """

    def __init__(
        self,
        options: Options,
        limits: Mapping[str, Sequence[Limit]],
        screen: Screen,
        signals: Signals,
        several: bool,
        subject: str = "",
    ) -> None:
        self._limits = limits  # by the direction of a run
        self._screen = screen
        self._signals = signals
        self._several = several
        self._subject = subject
        self._more_advice = "send more (-c)"  # if there are too few packets
        if options.pcaps:
            self._more_advice = "capture more of them"
        elif options.duration:
            self._more_advice = "measure for longer (--duration)"
        elif options.source_command and "{count}" not in options.source_command:
            self._more_advice = "send more"  # -c has no effect
        self._outputs = self._make_outputs(options)
        self._reports: list[Report] = []
        self._breaches: list[str] = []
        self._problems: list[NetWeaverError] = []

    def _make_outputs(self, options: Options) -> list[Output]:
        """Return the outputs that are asked for, the result first."""
        path = options.output
        result_format = options.result_format
        if options.format is None and path == "-" and is_terminal(sys.stdout):
            result_format = TextOutput
        outputs = [result_format.for_result(path, self._screen, lambda: self.exit_code)]
        if self._screen.has_people and result_format is not TextOutput:
            outputs.append(TextOutput(self._screen, None))
        if options.csv:
            outputs.append(CsvOutput(options.csv, self._several))
        if options.plot:
            outputs.append(PictureOutput(options.plot))
        return outputs

    def attempt(self, step: Callable[..., T], *arguments: object) -> T | None:
        """Return what a step returns, or None if it fails; its error is reported at the end."""
        try:
            with naming(self._subject):
                return step(*arguments)
        except NetWeaverError as error:
            self._problems.append(error)
        except Exception as error:
            self._screen.locate(error)
            self._problems.append(unexpected(error))
        return None

    @property
    def reader_is_gone(self) -> bool:
        """Whether nobody reads one of the outputs any more."""
        return any(isinstance(problem, ReaderGone) for problem in self._problems)

    @property
    def exit_code(self) -> int:
        """The exit code that signals, problems and limits have led to so far."""
        if self._signals.exit_code:
            return self._signals.exit_code
        if self._problems:
            return self._problems[0].exit_code
        if self._breaches:
            return LIMIT_EXCEEDED
        return 0

    def add(self, report: Report, results: Sequence[DirectionResult]) -> None:
        """Check and publish the result of the next run."""
        self._reports.append(report)
        info = info_of(report)
        label = self._label(run_name(info), [len(self._reports)])
        for limit in self._limits[info.direction]:
            breach = limit.breach(report)
            if breach:
                self._breaches.append(f"{label}: {breach}")
        for output in self._outputs:
            self.attempt(output.add, report, results)

    def end(self) -> None:
        """Complete the outputs, and show warnings, broken limits and errors."""
        # Those with the exit code are last: it depends on whether the others fail.
        for output in sorted(self._outputs, key=attrgetter("has_exit_code")):
            self.attempt(output.finish)
        for warning in self._warnings():
            self._screen.warn(warning)
        for breach in self._breaches:
            self._screen.say(f"netweaver: limit: {breach}", RED)
        for problem in dict.fromkeys(map(str, self._problems)):
            self._screen.error(problem)

    def _warnings(self) -> list[str]:
        """Return the warnings of all runs; each one says which runs it is about."""
        runs: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
        for number, report in enumerate(self._reports, 1):
            for warning in report["warnings"]:
                runs[run_name(info_of(report)), warning].append(number)
        warnings = [
            f"{self._label(name, numbers)}: {warning}" for (name, warning), numbers in runs.items()
        ]
        percentiles = [
            limit.figure.name
            for limits in self._limits.values()
            for limit in limits
            if isinstance(limit, FigureLimit)
        ]
        if self._screen.has_people:  # the summary shows these
            percentiles += ["p90", "p95", "p99"]
        too_few = percentile_warning(self._reports, percentiles)
        if too_few:
            warnings.append(f"{too_few}: {self._more_advice}")
        return warnings

    def _label(self, name: str, numbers: Sequence[int]) -> str:
        """Return the beginning of a message on some runs of this name."""
        return run_label(name, numbers) if self._several else name


# ---- Options ---------------------------------------------------------------------------------

EPILOG = """\
examples:
  to measure a VM's network with 1000 SYNs at 100 a second:
    netweaver -n web1 --hv HV_IP -s SOURCE_IP -d VM_IP -k KEYFILE
  to check that everything needed is there, and see what would run:
    netweaver -n web1 --hv root@hv:2222 -s 10.0.0.2 -d 10.0.0.1 --dry-run
  to sweep rates and kinds of traffic:
    netweaver ... --rate 100,1000,10000 --traffic syn,flow
  to save runs, and compare others with them later:
    netweaver ... --runs 5 --save before
    netweaver ... --runs 5 --baseline before --fail-if slower
  to analyse saved runs, or existing captures:
    netweaver --pcaps before
    netweaver --pcaps pif.pcap vif.pcap -d 10.0.0.1 --csv packets.csv

exit codes:
  0              measured
  2              usage, or a file that can't be written
  3              connection, authentication or host key
  4              remote command or look-up
  5              capture
  6              no packet with a delay
  7              a limit of --fail-if is exceeded
  129, 130, 143  interrupted by a signal
  141            the reader of standard output has gone
  1              anything else
"""


def option(
    group: str,
    usage: str,
    help: str,
    default: object = None,
    with_pcaps: bool = False,
    **details: Any,
) -> Any:
    """Return the field of Options for one option, which the help text shows in its group.

    `usage` is its flags and its argument, as in "-d,--destination DESTINATION"; an option without
    an argument is a switch, which is off by default.  `with_pcaps` marks options that can be used
    with --pcaps.  The `details` go to argparse's add_argument.
    """
    flags, _, metavar = usage.partition(" ")
    if metavar:
        details["metavar"] = metavar
    else:
        details["action"] = "store_true"
        default = False
    details["help"] = help.replace("%", "%%")  # argparse formats it with %
    metadata = {
        "group": group,
        "flags": flags.split(","),
        "with_pcaps": with_pcaps,
        "details": details,
    }
    return field(default=default, metadata=metadata)


target_option = partial(option, "target")
traffic_option = partial(option, "traffic")
analysis_option = partial(option, "analysis")
judging_option = partial(option, "limits and comparison")
login_option = partial(option, "login")
output_option = partial(option, "output")

NUMBER_SUFFIXES = {"": 1, "k": 1000, "m": 1_000_000}
TIME_UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}  # in seconds
TRAFFIC_ALIASES = {"icmp": "ping", "tcp": "syn"}
TOOLSTACK_ALIASES = {
    "xenserver": "xe",
    "xcp-ng": "xe",
    "xen": "xl",
    "kvm": "virsh",
    "libvirt": "virsh",
    "proxmox": "qm",
}


def list_of(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Return an argparse type for a list whose items are separated by commas."""
    return lambda text: [parse(item.strip()) for item in text.split(",")]


def word_of(words: Iterable[str], aliases: Mapping[str, str]) -> Callable[[str], str]:
    """Return an argparse type for one of some words, or of their aliases, in any case."""

    def parse(text: str) -> str:
        word = aliases.get(text.lower(), text.lower())
        if word not in words:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(words)}")
        return word

    return parse


def number_in(smallest: int, largest: int) -> Callable[[str], int]:
    """Return an argparse type for whole numbers, which may be written as 1k or 1e6."""

    def parse(text: str) -> int:
        parts = re.fullmatch(r"(\d{1,10})(?:e(\d))?([km]?)", text.lower(), re.ASCII)
        number = -1  # below any range
        if parts:
            digits, exponent, suffix = parts.groups()
            number = int(digits) * 10 ** int(exponent or 0) * NUMBER_SUFFIXES[suffix]
        if not smallest <= number <= largest:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from {smallest} to {largest}"
            )
        return number

    return parse


def parse_seconds(text: str) -> float:
    """Return the seconds of a positive time, which may have a unit: 90, 1.5m, 2h."""
    parts = re.fullmatch(r"(\d{1,7}(?:\.\d{0,9})?)(|s|m|min|h)", text.lower(), re.ASCII)
    seconds = 0.0  # which is refused
    if parts:
        seconds = float(parts[1]) * TIME_UNITS[parts[2]]
    if not 0 < seconds < 10_000_000:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time above 0 and below 10000000 seconds"
        )
    return seconds


def parse_interface(text: str) -> str:
    """Return a name that a network interface may have."""
    # Linux allows 15 bytes. Commands would take one that begins with "-" for an option.
    if not re.fullmatch(r"[^\s/-][^\s/]{0,14}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a network interface")
    return text


def parse_label(text: str) -> tuple[str, str]:
    """Return the two parts of KEY=VALUE."""
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


parse_count = number_in(1, 999_999_999)
parse_rate = number_in(1, 999_999)
parse_pattern = word_of(PATTERNS, TRAFFIC_ALIASES)
parse_toolstack = word_of(("auto", *TOOLSTACKS), TOOLSTACK_ALIASES)


@dataclass(frozen=True)
class Options:
    """The command line: one field per option, from which the parser is made."""

    name_label: str | None = target_option(
        "-n,--name-label NAME", "the destination VM's name in the toolstack, or its UUID"
    )
    hypervisor: str | None = target_option(
        "--hv HOST",
        "the VM's hypervisor, as [user@]host[:port], or 'local' for this machine, without SSH",
    )
    sources: Sequence[str] = target_option(
        "-s,--source SOURCE",
        "a VM that generates traffic, as [user@]host[:port], or 'local' for this machine; "
        "may be repeated",
        action="extend",
        type=list_of(str),
        default=(),
        with_pcaps=True,
    )
    destination: str | None = target_option(
        "-d,--destination DESTINATION", "the destination VM's address", with_pcaps=True
    )
    toolstack: str = target_option(
        "--toolstack TOOLSTACK",
        f"the hypervisor's management tool: {describe_toolstacks()} (default: the first of them "
        "that is installed and knows the VM)",
        type=parse_toolstack,
        default="auto",
    )
    interfaces: Sequence[str] = target_option(
        "-i,--interface PIF",
        "the hypervisor's physical interface; may be repeated, for the members of a bond "
        "(default: auto, which finds the interfaces that lead to the VM; without -i, eth0 is "
        "assumed if the VM's interface is connected to none)",
        action="extend",
        type=list_of(parse_interface),
        default=(),
    )
    vif_number: int = target_option(
        "--num N",
        "the number of the VM's interface, N in vif5.N (default: 0)",
        type=number_in(0, 9999),
        default=0,
    )
    vif: str | None = target_option(
        "--vif NAME",
        "the name of the virtual interface; -n is then optional, and no toolstack is used",
        type=parse_interface,
    )
    direction: str | None = target_option(
        "--direction {in,out,both}",
        "from pif to vif, from vif to pif, or both, with the VM's own time in between "
        "(default: in)",
        type=word_of(DIRECTIONS, {}),
        with_pcaps=True,
    )
    overlay: bool = target_option(
        "--overlay", "the traffic is inside VXLAN, Geneve or GRE on the physical interface"
    )
    capture_filter: str | None = target_option(
        "--filter EXPR",
        "capture the packets of this pcap-filter(7) expression, instead of the traffic "
        "between SOURCE and DESTINATION",
    )

    traffic: Sequence[str] = traffic_option(
        "--traffic PATTERN",
        "syn: TCP SYNs, each a new flow (the default); flow: SYNs of one flow; udp: datagrams "
        "of one flow; ping: ICMP echoes; several, separated by commas, run one after the other",
        action="extend",
        type=list_of(parse_pattern),
        default=(),
    )
    count: int | None = traffic_option(
        "-c,--count N",
        "packets that each source sends (default: 1000, or RATE x SECONDS with --duration)",
        type=parse_count,
    )
    rates: Sequence[int] = traffic_option(
        "--rate PPS",
        f"packets a second from each source (default: {USUAL_RATE}); several, separated by commas, "
        "run one after the other",
        action="extend",
        type=list_of(parse_rate),
        default=(),
    )
    size: int | None = traffic_option(
        "--size BYTES",
        f"bytes of payload (default: none in SYNs, {PATTERNS['udp'].usual_size} in others)",
        type=number_in(0, 65507),
    )
    port: int | None = traffic_option(
        "--port PORT", "the destination's port (default: 0)", type=number_in(0, 65535)
    )
    source_command: str | None = traffic_option(
        "--source-command TEMPLATE",
        "a shell command that sends traffic and exits, instead of --traffic; {count}, "
        "{interval} (in µs), {size}, {port} and {destination} are filled in",
    )
    load: str | None = traffic_option(
        "--load COMMAND",
        "a shell command that the sources run at the same time, until the measured traffic ends "
        "(after --duration, or COUNT / RATE seconds); the load's packets must use another protocol "
        "or port, and are not counted",
    )
    runs: int = traffic_option(
        "--runs N",
        "measure N times (default: 1)",
        type=number_in(1, 99_999),
        default=1,
    )
    duration: float | None = traffic_option(
        "--duration SECONDS",
        "measure for this many seconds; without -s nothing is generated, and whatever traffic "
        "reaches DESTINATION is measured",
        type=parse_seconds,
    )
    wait: float = traffic_option(
        "--wait SECONDS",
        f"wait this many seconds for the last packets (default: {SHORTEST_WAIT})",
        type=parse_seconds,
        default=SHORTEST_WAIT,
    )
    stages: bool = traffic_option(
        "--stages",
        "trace the packets in the hypervisor's kernel, too: show the time in each stage and "
        "where packets are lost; this costs all of the host's traffic about 1 µs a packet",
    )
    dry_run: bool = traffic_option(
        "--dry-run",
        "log in, check everything that is needed, and show what would run; send the VM no traffic",
    )

    pcaps: Sequence[str] = analysis_option(
        "--pcaps FILE",
        "instead of measuring, analyse runs saved with --save (the directory of a run, or "
        "the one above it), or the captures of a PIF and a VIF (pcap or pcapng; - is standard "
        "input; several files of one interface are separated by commas); -s and -d then select "
        "packets by address",
        nargs="+",
        default=(),
        with_pcaps=True,
    )
    match_nat: bool = analysis_option(
        "--match-nat",
        "match packets regardless of their addresses, for a path that translates them; DESTINATION "
        "is the address that the sources send to (with --pcaps leave out -s and -d)",
        with_pcaps=True,
    )

    limits: Sequence[str] = judging_option(
        "--fail-if EXPR",
        "exit with status 7 if this is met: a figure beyond a limit, such as 'p99>200us' or "
        "'loss>0.1%', or a change from the baseline: changed, slower or lossier (requires three "
        "runs on each side); may be repeated",
        action="append",
        default=(),
        with_pcaps=True,
    )
    baseline: str | None = judging_option(
        "--baseline DIR",
        "compare with a saved run, with all saved runs in a directory that are of the same VM, "
        "direction and traffic, or with two captures, given as PIF.pcap,VIF.pcap",
        with_pcaps=True,
    )

    key: str | None = login_option(
        "-k,--key KEYFILE", "SSH private key (default: those that ssh would try)"
    )
    sudo: bool = login_option("--sudo", "run remote commands with sudo -n unless logged in as root")
    ssh_options: Sequence[str] = login_option(
        "-o,--ssh-option OPTION",
        "an option in the form of ssh_config, such as StrictHostKeyChecking=yes or "
        "UserKnownHostsFile=FILE (default: as in ssh_config, but new hosts' keys are "
        "accepted and recorded); may be repeated",
        action="append",
        default=(),
    )

    csv: str | None = output_option(
        "--csv FILE",
        "write a table with a line for each packet (with --direction both, of the way in only)",
        with_pcaps=True,
    )
    output: str = output_option(
        "--output FILE",
        "write the result to this file, completely or not at all, instead of standard output",
        default="-",
        with_pcaps=True,
    )
    format: str | None = output_option(
        f"--format {{{','.join(FORMATS)}}}",
        "the format of the result: text for people, JSON, or a file for node_exporter's "
        "textfile collector (default: text at a terminal, JSON elsewhere)",
        type=word_of(FORMATS, {}),
        with_pcaps=True,
    )
    save: str | None = output_option(
        "--save DIR",
        "save the captures and the JSON of each run in a new directory under DIR",
    )
    keep: int | None = output_option(
        "--keep N",
        "after --save, delete all but the newest N saved runs of this VM, direction and traffic "
        "in DIR",
        type=parse_count,
    )
    plot: str | None = output_option(
        "--plot FILE",
        "draw the delays of one run, or median, p99 and loss of several (by rate, or one by one), "
        "as .png, .svg or .pdf (requires matplotlib)",
        with_pcaps=True,
    )
    labels: Sequence[tuple[str, str]] = output_option(
        "--label KEY=VALUE",
        "add this to the result's config.labels; may be repeated",
        action="append",
        type=parse_label,
        default=(),
        with_pcaps=True,
    )
    quiet: bool = output_option(
        "-q,--quiet", "no progress or summary on stderr, only warnings and errors", with_pcaps=True
    )
    verbose: bool = output_option("-v,--verbose", "show the commands that are run", with_pcaps=True)

    @property
    def result_format(self) -> type[Output]:
        """The class of the result's output; without --format it is JsonOutput.

        For a terminal Outcome chooses TextOutput instead.
        """
        return FORMATS[self.format or "json"]


REMOVED_OPTIONS = {
    "--slowest": "--csv has every packet: sort it by its column delay_us",
    "--stages-buffer": "the buffer is sized from the rate and the free memory",
}


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError, and prints to standard output in the same way as results."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, with advice on options that are unknown."""
        unknown = re.match(r"unrecognized arguments: (-[^\s=]*)", message)
        if not unknown:
            raise UsageError(f"{message} (see {self.prog} --help)")
        flag = unknown[1]
        if flag in REMOVED_OPTIONS:
            raise UsageError(f"{flag} was removed in version 3: {REMOVED_OPTIONS[flag]}")
        known = list(self._option_string_actions)
        similar = [name for name in known if name.startswith(flag)]
        similar += difflib.get_close_matches(flag, known, 1, cutoff=0.75)
        if similar:
            raise UsageError(f"unknown option {flag}: did you mean {similar[0]}?")
        raise UsageError(f"{message} (see {self.prog} --help)")

    def _print_message(self, message: str, file: object = None) -> None:
        write_file("-", lambda stdout: stdout.write(message.encode()))


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser; what the user doesn't give is absent from its result."""
    columns = min(shutil.get_terminal_size((100, 24)).columns, 120)
    description = (
        "Measure the time that packets take from a hypervisor's physical interface (pif) to a VM's "
        "virtual interface (vif), in microseconds."
    )
    parser = Parser(
        prog="netweaver",
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
        description=textwrap.fill(description, columns),
        epilog=EPILOG,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=32, width=columns
        ),
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for row in fields(Options):
        title = row.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        add_option(groups[title], row)
    output = groups["output"]
    output.add_argument(
        "--json", dest="format", action="store_const", const="json", help="same as --format json"
    )
    output.add_argument("-h", "--help", action="help", help="show this help and exit")
    version = f"netweaver {__version__}"
    output.add_argument("--version", action="version", version=version, help="show the version")
    return parser


def add_option(group: argparse._ActionsContainer, row: Field[object]) -> None:
    """Add the option of a field of Options to a parser, or to a group of it."""
    group.add_argument(*row.metadata["flags"], dest=row.name, **row.metadata["details"])


def valid_options(argv: Sequence[str] | None) -> Options:
    """Return those options of an invalid command line that are valid by themselves.

    They give the VM that its error names, and the file and the labels for its failure.
    """
    valid: dict[str, Any] = {}
    for row in fields(Options):  # one parser each, since a parser stops at the first error
        parser = Parser(allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
        add_option(parser, row)
        with suppress(UsageError):
            known, _ = parser.parse_known_args(argv)
            valid |= vars(known)
    return Options(**valid)


def parse_options(argv: Sequence[str] | None) -> Options:
    """Return the options of a command line; raise UsageError if they make no sense together."""
    given = vars(build_parser().parse_args(argv))
    options = Options(**given)
    _check_empty(given)
    with naming(planned_subject(options)):
        if options.pcaps:
            _check_pcaps(options, given)
        else:
            _check_measurement(options)
        _check_hosts(options)
        _check_traffic(options)
        _check_requirements(options)
        _check_outputs(options)
    return options


def _check_empty(given: Mapping[str, object]) -> None:
    """Raise UsageError for a blank value, such as an unset variable of a shell leaves."""
    for row in fields(Options):
        values = given.get(row.name)
        if not isinstance(values, list):
            values = [values]
        for value in values:
            if isinstance(value, str) and not value.strip():
                raise UsageError(f"{row.metadata['flags'][-1]} is empty")


def _check_pcaps(options: Options, given: Container[str]) -> None:
    for row in fields(Options):
        if row.name in given and not row.metadata["with_pcaps"]:
            raise UsageError(f"{row.metadata['flags'][-1]} can't be used with --pcaps")
    if len(options.pcaps) > 1 and all(map(os.path.isdir, options.pcaps)):
        raise UsageError("--pcaps takes one directory: give the one that holds the runs")
    if len(options.pcaps) > 2:
        raise UsageError(
            "--pcaps takes a directory made by --save, or two captures; separate several files of "
            "one interface by commas"
        )


def _check_measurement(options: Options) -> None:
    missing = []
    if not options.hypervisor:
        missing.append("--hv")
    if not options.sources and not options.duration:
        missing.append("-s")
    if not options.destination:
        missing.append("-d")
    if missing:
        raise UsageError(
            f"missing: {', '.join(missing)} (see netweaver --help; without -s, --duration measures "
            "existing traffic; --pcaps analyses existing captures)"
        )
    if not options.name_label and not options.vif:
        raise UsageError(
            "missing: the destination VM. Give its name with -n, or its interface with --vif"
        )


def _check_hosts(options: Options) -> None:
    """Raise UsageError, with a hint, for what can't be a host or a VM's address."""
    hosts = [("-s", source) for source in options.sources]
    if options.hypervisor:
        hosts.append(("--hv", options.hypervisor))
    for flag, host in hosts:
        _check_host(flag, host)
        with naming(flag):
            Target(host)  # raises UsageError if this is no [user@]host[:port]
    if options.destination:
        _check_host("-d", options.destination)
        if "@" in options.destination:
            raise UsageError(
                f"-d {options.destination}: give the VM's address without a user (or swap -s and "
                "-d?)"
            )


def _check_host(flag: str, text: str) -> None:
    """Raise UsageError for a network, and for a name that needs its ASCII form."""
    if "/" in text:
        raise UsageError(f"{flag} {text}: this is a network: give the address of one host")
    with naming(flag):
        check_ascii(text)


def _check_traffic(options: Options) -> None:
    """Raise UsageError for options of the traffic that contradict each other."""
    needs_sources = {
        "--load": options.load,
        "--source-command": options.source_command,
        "--traffic": options.traffic,
        "--rate": options.rates,
        "--size": options.size,
        "--port": options.port,
    }
    for flag, value in needs_sources.items():
        if not options.sources and value not in (None, ()):
            raise UsageError(f"{flag} requires -s: without sources, existing traffic is measured")
    if options.source_command is None:
        return
    if options.traffic:
        raise UsageError("--source-command can't be used with --traffic")
    if options.load:
        raise UsageError(
            "--load can't be used with --source-command. Start the load in the source command"
        )


def _check_requirements(options: Options) -> None:
    """Raise UsageError for options that require others."""
    check_number_of_runs(options, len(sweep(options)))
    if options.keep and not options.save:
        raise UsageError("--keep requires --save")
    change_limits = list(filter(is_on_change, options.limits))
    if change_limits and not options.baseline:
        raise UsageError(f"--fail-if {change_limits[0]} requires --baseline")


def input_files(options: Options) -> set[str]:
    """Return the real paths of the files that may be read: captures, and those of saved runs."""
    inputs: list[str] = []
    for name in filter(None, [*options.pcaps, options.baseline]):
        if os.path.isdir(name):
            for pattern in ("*", "*/*"):  # the directory of a run, or of several
                files = glob.glob(os.path.join(glob.escape(name), pattern))
                inputs += [
                    path for path in files if re.fullmatch(SAVED_FILE, os.path.basename(path))
                ]
        else:
            inputs += name.split(",")
    return set(map(os.path.realpath, inputs))


def check_number_of_runs(options: Options, number: int) -> None:
    """Raise UsageError if there are more runs than the format of the result takes."""
    if number > 1 and not options.result_format.takes_several_runs:
        raise UsageError(f"--format {options.format} can't be used with several runs")


def _check_outputs(options: Options) -> None:
    """Raise UsageError for files that can't be written, as far as that is known in advance."""
    if options.plot:
        check_picture(options.plot)
    options.result_format.check(key for key, _ in options.labels)
    _check_files(options)
    if options.save:
        check_can_save(options.save)


def _check_files(options: Options) -> None:
    """Raise UsageError for files that can't be written, or of which one would replace another."""
    flag_of: dict[str, str] = {}
    outputs = {"--output": options.output, "--csv": options.csv, "--plot": options.plot}
    inputs = input_files(options)
    for flag, path in outputs.items():
        if not path:
            continue
        check_writable(path)
        target = "standard output" if is_standard_output(path) else os.path.realpath(path)
        if target in inputs:
            raise UsageError(f"{flag} {path}: it would replace an input. Name another file")
        if target in flag_of and not is_special(target):  # a device, such as /dev/null, takes both
            raise UsageError(
                f"{flag_of[target]} and {flag} can't both be written to {target}: name different "
                "files"
            )
        flag_of[target] = flag


def ask_person(question: str) -> str:
    """Return a person's answer, which the terminal doesn't show.

    The program may end while a thread waits here: the terminal's echo is restored then, too.
    """
    restore = partial(quietly, termios.tcsetattr, 0, termios.TCSADRAIN, termios.tcgetattr(0))
    atexit.register(restore)
    try:
        return getpass(question)
    finally:
        atexit.unregister(restore)


def new_weaver(options: Options, screen: Screen, progress: Progress) -> NetWeaver:
    """Return a NetWeaver that measures as the options say, and reports its progress."""
    if not options.verbose:
        # paramiko's threads print tracebacks when a connection ends.
        threading.excepthook = lambda _: None
    on_terminal = is_terminal(sys.stdin)
    weaver = NetWeaver(
        options.sources,
        options.name_label or "",
        options.destination or "",
        options.hypervisor or "",
        options.key,
        toolstack=options.toolstack,
        host_interface=options.interfaces,
        vif_number=options.vif_number,
        vif=options.vif,
        overlay=options.overlay,
        capture_filter=options.capture_filter,
        count=options.count,
        duration=options.duration,
        wait=options.wait,
        stages=options.stages,
        direction=options.direction or "in",
        match_nat=options.match_nat,
        labels=dict(options.labels),
        sudo=options.sudo,
        ssh_options=options.ssh_options,
        ask=ask_person if on_terminal else None,
        progress=progress.step,
        log=screen.log,
        tick=progress.tick,
    )
    for name in weaver.unchecked:
        screen.warn(
            f"{name}: its host key is not checked: a man-in-the-middle attack would go unnoticed"
        )
    return weaver


def sweep(options: Options) -> list[Traffic]:
    """Return the traffic of each run: all combinations of pattern and rate, --runs times over."""
    combinations = [
        Traffic(pattern, rate, options.size, options.port, options.source_command, options.load)
        for pattern in options.traffic or ["syn"]
        for rate in options.rates or [USUAL_RATE]
    ]
    return combinations * options.runs


# ---- Files: saved runs, captures and baselines -----------------------------------------------


def capture_paths(pif: str, vif: str) -> dict[str, list[str]]:
    """Return the capture files of each point; several are separated by commas.

    Raises UsageError if the name of one is empty.
    """
    paths = {"pif": split_paths(pif), "vif": split_paths(vif)}
    for text, names in ((pif, paths["pif"]), (vif, paths["vif"])):
        if "" in names:
            raise UsageError(f"{text!r} has a comma too many: the name of a file is empty")
    return paths


def split_paths(text: str) -> list[str]:
    """Return the paths of a comma-separated list, or the whole text if it is an existing path."""
    return [text] if os.path.exists(text) else text.split(",")


def saved_runs(paths: Sequence[str], warn: Callable[[str], None]) -> list[SavedRun]:
    """Return the saved runs that --pcaps names, or nothing if it names other captures.

    Two captures are a saved run if they are the ones in its directory.
    """
    if len(paths) == 1:
        if not os.path.exists(paths[0]):
            raise UsageError(f"{paths[0]}: no such directory")
        if not os.path.isdir(paths[0]):
            raise UsageError(
                f"{paths[0]}: give a directory made by --save, or the captures of the pif and of "
                "the vif"
            )
        return load_runs(paths[0], warn)
    pif, vif = paths
    paths_of_point = capture_paths(pif, vif)
    try:
        run = load_run(os.path.dirname(paths_of_point["pif"][0]) or ".")
    except UsageError:  # these captures were not saved by --save
        return []
    for point, given in paths_of_point.items():
        saved = run.files.paths[point]
        if list(map(os.path.abspath, given)) != list(map(os.path.abspath, saved)):
            return []
    return [run]


def select_packets(info: RunInfo, options: Options) -> RunInfo:
    """Return the description of captures, with the packets and labels that the options give.

    What they leave open stays as it is.  Raises UsageError for a name without an address, and for
    --direction both if the VM's address isn't known or is translated.
    """
    selection = info.selection
    with naming("-s"):
        sources = [resolve(Target(source).host) for source in options.sources]
    destinations = list(selection.destinations)
    excluded_sources = selection.excluded_sources
    if options.destination:
        with naming("-d"):
            destinations = [resolve(options.destination)]
        excluded_sources = ()  # they tell answers apart only if no destination is known
    selection = replace(
        selection,
        excluded_sources=excluded_sources,
        directions=DIRECTIONS[options.direction or info.direction],
        sources=sources or selection.sources,
        destinations=destinations,
        translated=options.match_nat or selection.translated,
    )
    if selection.direction == "both" and (selection.translated or not destinations):
        raise UsageError(
            "--direction both requires the VM's address (-d), and can't be used with --match-nat"
        )
    labels = {**info.labels, **dict(options.labels)}
    return replace(info, version=__version__, labels=labels, selection=selection)


def analyze_run(options: Options, run: SavedRun) -> tuple[Report, Sequence[DirectionResult]]:
    """Return the report on a saved run, and the result of each direction."""
    info = select_packets(run.info, options)
    if options.sources and len(info.sources) > 1:  # nobody knows how much each of them has sent
        info = replace(info, transmitted=None, senders=0)
    analysis = analyze_measured(info, run.files, run.report["capture"])
    if info.backend is not None:  # the run was made with --stages
        trace = read_trace(run.files.directory, info.vif, info.pif.split(","))
        attach_stages(analysis, trace, info)
    report = build_report(analysis, info, run.report["capture"], files=True)
    for name in ("failed_sources", "interrupted"):  # which the captures don't show
        if name in run.report:
            report[name] = run.report[name]
    return report, analysis.results


def analyze_each(
    runs: Sequence[SavedRun], analyze: Callable[[SavedRun], T], warn: Callable[[str], None]
) -> Iterator[tuple[int, T]]:
    """Yield the position and the analysis of each run, but leave damaged ones out, with a warning.

    Errors name the directory of the run.  Raises CaptureError if no run is left.
    """
    remaining = len(runs)
    for position, run in enumerate(runs):
        try:
            with naming(run.files.directory):
                analysis = analyze(run)
        except CaptureError as error:
            remaining -= 1
            if not remaining:
                raise
            warn(f"left out: {error}")
        else:
            yield position, analysis


def analyze_files(options: Options) -> tuple[Report, Sequence[DirectionResult]]:
    """Return the report on the captures that --pcaps names, and the result of each direction."""
    pif, vif = options.pcaps
    paths = capture_paths(pif, vif)
    info = RunInfo(pif=",".join(paths["pif"]), vif=",".join(paths["vif"]))
    info = select_packets(info, options)
    info.sources = list(info.selection.sources)
    if info.selection.destinations:
        [info.destination] = info.selection.destinations
    analysis = analyze_captures(paths, info.selection)
    nothing_known: dict[str, Report] = {"pif": {}, "vif": {}}  # of how they were captured
    report = build_report(analysis, info, nothing_known, files=True)
    return report, analysis.results


@dataclass
class Baseline:
    """An earlier measurement that others are compared with."""

    path: str
    names: list[str]  # of the runs
    left_out: int  # number of runs that are damaged, or of another VM, direction or traffic
    runs: list[dict[str, float]]  # COMPARED figures
    starts: list[int] = field(default_factory=list)  # of the runs (ns), as far as they are known

    def to_json(self) -> Report:
        """Return the document's description of the baseline."""
        taken: dict[str, object] = {"runs": len(self.runs)}
        if self.starts:
            taken |= {"first": iso_time(min(self.starts)), "last": iso_time(max(self.starts))}
        return {"path": self.path, "taken": taken, "left_out": self.left_out}

    def __str__(self) -> str:
        """Return a line for people."""
        total = len(self.runs) + self.left_out
        text = f"Baseline: {len(self.runs)} of {total} runs in {self.path}"
        if self.starts:
            text += f", from {date_text(min(self.starts))} to {date_text(max(self.starts))}"
        return text


def baseline_selection(options: Options, direction: Direction) -> Selection:
    """Return the packets of one direction to compare, where the baseline is a pair of captures."""
    if options.pcaps:  # the same packets as in those captures
        return replace(select_packets(RunInfo(), options).selection, directions=[direction])
    selection = Selection([direction], translated=options.match_nat)
    # In captures of both directions, only the VM's address tells their packets apart.
    if options.direction == "both" and options.destination:
        selection = replace(selection, destinations=[resolve(options.destination)])
    return selection


def load_baseline(
    path: str,
    selection: Selection,
    kind: RunKind | None,
    warn: Callable[[str], None],
) -> Baseline:
    """Return the figures of a baseline: of saved runs, or of two captures given as PIF,VIF.

    If there are several saved runs, it has those of the `kind`; None stands for any.  The
    `selection`, which has one direction, selects packets of captures.
    """
    [direction] = selection.directions
    if os.path.isdir(path):
        return _baseline_of_runs(path, direction, kind, warn)
    if path.count(",") != 1:
        raise UsageError(
            f"--baseline {path}: give a directory made by --save, or two captures as "
            "PIF.pcap,VIF.pcap"
        )
    pif, vif = path.split(",")
    analysis = analyze_captures(capture_paths(pif, vif), selection)
    figures = _baseline_figures(path, direction, analysis)
    return Baseline(path, names=[path], left_out=0, runs=[figures])


def _baseline_of_runs(
    path: str, direction: Direction, kind: RunKind | None, warn: Callable[[str], None]
) -> Baseline:
    saved = load_runs(path, warn)
    runs = [run for run in saved if direction in run.info.selection.directions]
    if len(saved) > 1 and kind is not None:  # a single run was chosen by the user
        runs = [run for run in runs if run.info.kind == kind]
    if not runs and len(saved) == 1:
        raise UsageError(
            f"--baseline {path}: its direction is {saved[0].info.direction}, not {direction.name}"
        )
    if not runs:
        raise UsageError(
            f"--baseline {path}: none of its {len(saved)} runs has this VM, direction and traffic"
        )
    names = []
    starts = []
    figures = []
    for position, analysis in analyze_each(runs, _analyze_saved, warn):
        run = runs[position]
        names.append(os.path.basename(run.files.directory.rstrip("/")))
        if run.info.started is not None:
            starts.append(run.info.started)
        figures.append(_baseline_figures(path, direction, analysis))
    return Baseline(path, names, len(saved) - len(names), figures, starts)


def _analyze_saved(run: SavedRun) -> Analysis:
    return analyze_measured(run.info, run.files, run.report["capture"])


def _baseline_figures(path: str, direction: Direction, analysis: Analysis) -> dict[str, float]:
    """Return the COMPARED figures of a direction; UsageError if no delay can be true."""
    [result] = [result for result in analysis.results if result.direction is direction]
    if not result.counts.timed:
        raise UsageError(f"--baseline {path}: no packet has a delay in its captures")
    if max(result.delays) < 0:
        raise UsageError(f"--baseline {path}: every delay is negative in its captures")
    return run_figures(result)


# ---- Main ------------------------------------------------------------------------------------


class Signals:
    """A handler of SIGINT, SIGTERM and SIGHUP.

    The first signal ends the traffic, if there is something to report; the next one ends
    everything at once.
    """

    def __init__(self) -> None:
        self.number = 0  # of the first signal
        # Ends the traffic, and returns whether there is something to report.
        self.interrupt: Callable[[], bool] = lambda: False
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """The exit code for the first signal, as a shell has it; 0 without a signal."""
        return 128 + self.number if self.number else 0

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP: leave that
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        if not self.interrupt():
            raise KeyboardInterrupt
        if os.isatty(2):
            # Not by sys.stderr: the signal may have interrupted a write to it.
            quietly(os.write, 2, b"\nstopping, report follows (interrupt again to quit at once)\n")


class Screen:
    """The messages on stderr: lines and, at a terminal, progress, colours and a summary.

    A terminal that has gone, or a stderr that can't be written, ends nothing.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False) -> None:
        terminal = is_terminal(sys.stderr)
        dumb = os.environ.get("TERM") == "dumb"
        encoding = getattr(sys.stderr, "encoding", None) or ""
        self.unicode = "utf" in encoding.lower()
        self.has_people = terminal and not quiet  # somebody watches, and hasn't asked for quiet
        self._quiet = quiet
        self._verbose = verbose
        self._live_allowed = self.has_people and not verbose and not dumb
        self._colours = terminal and not dumb and not os.environ.get("NO_COLOR")
        self._live = False  # the last line is one that the next one replaces

    def say(self, line: str, colour: str = "") -> None:
        """Print a line, in a colour given as an SGR code."""
        line = self.shown(line)
        if colour and self._colours:
            line = f"\x1b[{colour}m{line}\x1b[0m"
        self._print(line)

    def warn(self, warning: str) -> None:
        """Print a warning."""
        self.say(f"netweaver: warning: {warning}", YELLOW)

    def error(self, error: object) -> None:
        """Print an error; one without words, as that of a reader that has gone, is not shown."""
        if str(error):
            self.say(f"netweaver: error: {error}", RED)

    def step(self, line: str) -> None:
        """Print a line on the progress of the run, for people only."""
        if self.has_people or self._verbose:
            self.say(line)

    def log(self, line: str) -> None:
        """Print a command that is run, if the user asks for these."""
        if self._verbose:
            self.say(line)

    def locate(self, error: Exception) -> None:
        """Print where an unexpected error was raised, if the user asks for details."""
        if self._verbose:
            sys.excepthook(type(error), error, error.__traceback__)

    def note(self, line: str) -> None:
        """Print a line for everyone who has not asked for quiet."""
        if not self._quiet:
            self.say(f"netweaver: {line}")

    def live(self, line: str) -> None:
        """Print a line that the next one replaces, at a terminal."""
        if self._live_allowed:
            self._print(self.shown(line), end="")
            self._live = True

    def end_live(self) -> None:
        """Remove the live line, if there is one, so that something else can be printed."""
        if self._live:
            self._print("", end="")  # which first erases the live line

    def shown(self, line: str) -> str:
        """Return a line as this screen can show it."""
        line = printable(line)
        if self.unicode:
            return line
        return line.replace("µ", "u").encode("ascii", "replace").decode()

    def _print(self, text: str, end: str = "\n") -> None:
        if self._live:
            text = "\r\x1b[K" + text  # back to the start of the line, and erase it
            self._live = False
        if sys.stderr is None:  # print would then write to stdout
            return
        try:
            print(text, end=end, file=sys.stderr, flush=True)
        except (OSError, ValueError):
            pass


def measure(
    weaver: NetWeaver,
    traffic_by_run: Sequence[Traffic],
    outcome: Outcome,
    progress: Progress,
    options: Options,
    screen: Screen,
) -> Iterator[RunResult]:
    """Make one run after the other, until one is interrupted, and yield the result of each."""
    for index, traffic in enumerate(traffic_by_run):
        progress.begin(index)
        name = kind_name(planned_kind(options, traffic))
        if len(traffic_by_run) > 1:
            name = run_label(name, [index + 1])
        with naming(name):
            report = weaver.measure(traffic)
        if options.save:
            directory = outcome.attempt(weaver.save, options.save, report)
            if directory:
                report["saved"] = directory
                screen.note(f"saved in {directory}")
            if directory and options.keep:  # a run that isn't saved replaces no other
                kind = info_of(report).kind
                outcome.attempt(delete_old_runs, options.save, kind, options.keep, directory)
        yield RunResult(index, report, weaver.results, ends_series=weaver.interrupted)
        if weaver.interrupted:
            break


OVERHEAD_SECONDS = 1.5  # that a run usually takes besides its traffic


class Progress:
    """The progress of one or several runs: steps for people, and a live line at a terminal."""

    def __init__(self, screen: Screen, names: Sequence[str], seconds: Sequence[float]) -> None:
        self._screen = screen
        self._names = names  # of the runs
        self._seconds = seconds  # that the traffic of each run is expected to take
        self._index = 0  # of the current run

    def begin(self, index: int) -> None:
        """Begin a run."""
        self._index = index

    def step(self, line: str) -> None:
        """Show what a run does now: in a line of its own, or in the live line of several runs."""
        if len(self._names) == 1:
            self._screen.step(line)
        else:
            self._screen.live(f"{self._prefix()}{line}")

    def tick(self, elapsed: float) -> None:
        """Show how long the traffic has run."""
        expected = self._seconds[self._index]
        line = f"{self._prefix()}{elapsed:.0f} of {expected:.0f} s"
        if len(self._names) > 1:
            later = self._seconds[self._index + 1 :]
            left = max(0, expected - elapsed) + sum(later) + OVERHEAD_SECONDS * (len(later) + 1)
            minutes, seconds = divmod(round(left), 60)
            line += f", about {minutes}:{seconds:02} left"
        self._screen.live(line)

    def _prefix(self) -> str:
        if len(self._names) == 1:
            return ""
        return f"Run {self._index + 1} of {len(self._names)} ({self._names[self._index]}): "


class Comparer:
    """Comparisons of the runs of each kind with the runs of the same kind in a baseline.

    The kind None stands for runs of any kind.  Creating a Comparer loads the baseline.
    """

    def __init__(self, options: Options, kinds: Sequence[RunKind | None], screen: Screen) -> None:
        self._kinds = kinds  # of the runs, by position
        # The position of the last run of each kind:
        self._last = {kind: position for position, kind in enumerate(kinds)}
        # Of the runs so far:
        self._figures: defaultdict[RunKind | None, list[dict[str, float]]] = defaultdict(list)
        self._baselines: dict[RunKind | None, Baseline] = {}
        self._too_few_advice = f"Use --runs {FEWEST_RUNS}"
        if not options.result_format.takes_several_runs:
            self._too_few_advice += " and another --format"
        if options.pcaps:
            self._too_few_advice = "Give more saved runs"
        if options.baseline is None:
            return
        for kind in self._last:
            direction = options.direction or "in"
            if kind:
                direction = kind.direction
            compared = DIRECTIONS[direction][0]  # of "both", the packets to the VM
            selection = baseline_selection(options, compared)
            baseline = load_baseline(options.baseline, selection, kind, screen.warn)
            self._baselines[kind] = baseline
            # A single run is named by the option.
            if len(baseline.runs) + baseline.left_out > 1:
                screen.step(str(baseline))
                for name in baseline.names:
                    screen.log(f"  {name}")

    def check(self, limits: Iterable[str]) -> None:
        """Raise UsageError if a limit needs a verdict, and there will be too few runs for one."""
        if not any(map(is_on_change, limits)):
            return
        for kind, baseline in self._baselines.items():
            before = len(baseline.runs)
            now = self._kinds.count(kind)
            if before < FEWEST_RUNS:
                advice = f"Give a baseline of {FEWEST_RUNS} saved runs"
            elif now < FEWEST_RUNS:
                advice = self._too_few_advice
            else:
                continue
            raise UsageError(
                f"--fail-if {' or '.join(CHANGE_LIMITS)} requires {FEWEST_RUNS} runs on each side: "
                f"the baseline has {before}, this measurement {now}. {advice}"
            )

    def compared(self, run: RunResult) -> Report:
        """Take the next run, and return its report, with a comparison if it is its kind's last.

        A run that ends the series early counts as the last of its kind.  Another kind whose last
        run is thus never made gets no comparison.
        """
        if not self._baselines:
            return run.report
        kind = self._kinds[run.position]
        self._figures[kind].append(run_figures(run.results[0]))
        if run.position != self._last[kind] and not run.ends_series:
            return run.report
        baseline = self._baselines[kind]
        comparison = compare_runs(baseline.runs, self._figures[kind])
        return {**run.report, "comparison": {**baseline.to_json(), **comparison}}


def run(options: Options, signals: Signals, screen: Screen) -> int:
    """Measure, or analyse captures, as the options say, and return the exit code."""
    if options.pcaps:
        return run_analysis(options, signals, screen)
    with naming("-d"):
        destination = resolve_vm(options)
    for traffic in generated_traffic(options):
        traffic.source_command(1, destination)  # raises UsageError if it can't be sent
    # Resolved once: another look-up may give another address.
    return run_measurement(replace(options, destination=destination), signals, screen)


def generated_traffic(options: Options) -> list[Traffic]:
    """Return the traffic of each run that sources send: none without sources."""
    return sweep(options) if options.sources else []


def resolve_vm(options: Options) -> str:
    """Return the VM's address, as the traffic needs it; UsageError if it has none."""
    traffic = generated_traffic(options)
    return resolve_destination(options.destination or "", options.sources, traffic)


def run_analysis(options: Options, signals: Signals, screen: Screen) -> int:
    """Analyse saved runs or existing captures, and return the exit code."""
    saved = saved_runs(options.pcaps, screen.warn)
    if saved and options.baseline:
        saved = without_damaged_ends(saved, options, screen.warn)
    kinds: list[RunKind | None] = [saved_kind(options, run) for run in saved]
    directions = [options.direction or run.info.direction for run in saved]
    if not saved:
        kinds = [None]
        directions = [options.direction or "in"]
    limits = parse_limits(options.limits, directions, stages=True)
    check_number_of_runs(options, len(saved))
    outcome = Outcome(options, limits, screen, signals, several=len(saved) > 1)
    comparer = Comparer(options, kinds, screen)
    comparer.check(options.limits)
    try:
        publish(analyze_inputs(options, saved, screen.warn), comparer, outcome)
    finally:
        outcome.end()
    return outcome.exit_code


def analyze_inputs(
    options: Options, saved: Sequence[SavedRun], warn: Callable[[str], None]
) -> Iterator[RunResult]:
    """Yield the results of the saved runs or, if there are none, of the captures in --pcaps."""
    if not saved:
        report, results = analyze_files(options)
        yield RunResult(0, report, results)
    for position, (report, results) in analyze_each(saved, partial(analyze_run, options), warn):
        yield RunResult(position, report, results)


def saved_kind(options: Options, run: SavedRun) -> RunKind:
    """Return the kind of a saved run, with the direction that the options select, if any."""
    return replace(run.info.kind, direction=options.direction or run.info.direction)


def without_damaged_ends(
    runs: Sequence[SavedRun], options: Options, warn: Callable[[str], None]
) -> list[SavedRun]:
    """Return the runs without damaged ones at the end of a kind, with a warning for each.

    The report of the last run of a kind gets the comparison: it must not be left out later.  Raises
    CaptureError if no run is left at all, or none of a kind that --fail-if requires.
    """
    intact: set[RunKind] = set()
    damaged: list[str] = []
    for run in reversed(runs):
        kind = saved_kind(options, run)
        if kind in intact:
            continue
        try:
            with naming(run.files.directory):
                _analyze_saved(run)
            intact.add(kind)
        except CaptureError as error:
            if len(damaged) == len(runs) - 1:  # no run is left
                raise
            damaged.append(run.files.directory)
            warn(f"left out: {error}")
    needs_all_kinds = any(map(is_on_change, options.limits))
    for kind in {saved_kind(options, run) for run in runs} - intact:
        if needs_all_kinds:
            raise CaptureError(f"no run of {kind_name(kind)} is left for --fail-if")
    return [run for run in runs if run.files.directory not in damaged]


def publish(runs: Iterable[RunResult], comparer: Comparer, outcome: Outcome) -> None:
    """Compare and publish runs as they come, until nobody reads the result any more."""
    for run in runs:
        outcome.add(comparer.compared(run), run.results)
        if outcome.reader_is_gone:
            break


def run_measurement(options: Options, signals: Signals, screen: Screen) -> int:
    """Measure, or show what would be measured, and return the exit code."""
    direction = options.direction or "in"
    limits = parse_limits(options.limits, [direction], options.stages)
    traffic_by_run = sweep(options)
    kinds = [planned_kind(options, traffic) for traffic in traffic_by_run]
    several = len(traffic_by_run) > 1
    outcome = Outcome(options, limits, screen, signals, several, planned_subject(options))
    comparer = Comparer(options, kinds, screen)
    comparer.check(options.limits)
    packets = options.count or USUAL_COUNT
    seconds = [options.duration or packets / traffic.rate for traffic in traffic_by_run]
    progress = Progress(screen, [traffic.name for traffic in traffic_by_run], seconds)
    with ExitStack() as stack:
        stack.callback(outcome.end)
        weaver = stack.enter_context(new_weaver(options, screen, progress))
        if options.dry_run:
            print_lines(weaver.dry_run(traffic_by_run))
            return 0
        signals.interrupt = weaver.interrupt
        runs = measure(weaver, traffic_by_run, outcome, progress, options, screen)
        publish(runs, comparer, outcome)
    return outcome.exit_code


def planned_kind(options: Options, traffic: Traffic) -> RunKind:
    """Return the kind of a run that is about to be measured."""
    vm = options.name_label or options.vif or ""
    return RunKind(vm, options.direction or "in", traffic if options.sources else None)


def kind_name(kind: RunKind) -> str:
    """Return the VM and the traffic of runs of a kind, as their messages name them."""
    traffic = kind.traffic.name if kind.traffic else "passive"
    return f"{kind.vm} {traffic}"


def planned_subject(options: Options) -> str:
    """Return the VM and the traffic of the only run, or the VM of several; "" with --pcaps."""
    if options.pcaps:
        return ""
    traffic_by_run = sweep(options)
    kind = planned_kind(options, traffic_by_run[0])
    # An incomplete command line, which is an error, may have neither a VM nor traffic.
    if len(traffic_by_run) == 1 and kind.vm and (options.sources or options.duration):
        return kind_name(kind)
    return kind.vm


def print_lines(lines: Iterable[str]) -> None:
    """Write lines to standard output, without control characters that hosts may have sent."""
    write_text("-", "".join(f"{printable(line)}\n" for line in lines))


def unexpected(error: Exception) -> NetWeaverError:
    """Return the error that a user sees of a fault in this program."""
    return NetWeaverError(
        f"unexpected {type(error).__name__}: {error} (please report it, with the output of -v)"
    )


def occupy_standard_streams() -> None:
    """Open /dev/null in place of closed standard streams, so that no file gets their number."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    occupy_standard_streams()
    screen = Screen()
    options: Options | None = None
    with Signals() as signals:
        try:
            options = parse_options(argv)
            screen = Screen(options.quiet, options.verbose)
            code = run(options, signals, screen)
            return signals.exit_code or code
        except KeyboardInterrupt:
            error = NetWeaverError("interrupted")
        except NetWeaverError as raised:
            error = raised
        except Exception as unknown:
            if options and options.verbose:
                raise  # for its traceback
            error = unexpected(unknown)
        exit_code = signals.exit_code or error.exit_code
        if options:
            name_error(error, planned_subject(options))
            screen.error(error)
            publish_failure(options, exit_code)
        else:  # the command line is wrong
            valid = valid_options(argv)
            name_error(error, valid.name_label or "")
            screen.error(error)
            if valid.output != "-":  # a file would go on showing the last success
                publish_failure(valid, exit_code)
        return exit_code


def publish_failure(options: Options, exit_code: int) -> None:
    """Publish that a run has failed, where its result would be published."""
    if options.dry_run:  # its success isn't published, either
        return
    with suppress(NetWeaverError):  # the first error is the one that matters
        options.result_format.write_failure(
            options.output, partial(describe_failed, options), exit_code
        )


def describe_failed(options: Options) -> RunInfo:
    """Return the description of a run that has failed, perhaps before it was planned."""
    destination = options.destination or ""
    with suppress(UsageError):  # as in the series of a run that succeeds
        destination = resolve_vm(options)
    return RunInfo(
        selection=Selection(DIRECTIONS[options.direction or "in"]),
        sources=list(options.sources),
        destination=destination,
        labels=dict(options.labels),
        measured=not options.pcaps,
        hypervisor=options.hypervisor,
        name_label=options.name_label,
        traffic=sweep(options)[0] if options.sources else None,
    )


if __name__ == "__main__":
    raise SystemExit(main())
