"""Traces of a Linux kernel, made byte by byte, and saved runs with such a trace."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

from frames import ethernet, ipv4, pcap, tcp, write

START = 1_700_000_000_000_000_000  # ns since 1970
CLOCK_OFFSET = START - 5_000_000_000  # from the clock of the trace
SIZE = 40  # of the packets in bytes
PAGE = 4096
COMMON = """\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

"""
RECEIVED = 1001
QUEUED = 1002
SENT = 1003
DROPPED = 1004
CONSUMED = 1005
REASONS = {2: "NOT_SPECIFIED", 6: "NETFILTER_DROP", 51: "QDISC_DROP"}
NFT = 0xFFFF_FFFF_8100_1000  # addresses of functions
QDISC = 0xFFFF_FFFF_8100_2000
TCP = 0xFFFF_FFFF_8100_3000
NETBACK = 0xFFFF_FFFF_8100_4000
SYMBOLS = {
    NFT: "nft_do_chain",
    QDISC: "kfree_skb_list_reason",
    TCP: "tcp_v4_rcv",
    NETBACK: "xenvif_rx_copy_flush",
}


def format_file(name: str, number: int, fields: dict[str, tuple[str, int]], end: str = "x") -> str:
    """Return what the kernel's `format` file of an event says; fields have a type and an offset."""
    lines = "".join(
        f"\tfield:{kind} {field};\toffset:{offset};\tsize:8;\tsigned:0;\n"
        for field, (kind, offset) in fields.items()
    )
    return f"name: {name}\nID: {number}\nformat:\n{COMMON}{lines}\nprint fmt: {end}\n"


INTERFACE_FIELDS = {
    "skbaddr": ("void *", 8),
    "len": ("unsigned int", 16),
    "name": ("__data_loc char[]", 20),
}
SENT_FIELDS = {
    "name": ("__data_loc char[]", 8),
    "skbaddr": ("const void *", 16),
    "len": ("unsigned int", 36),
}
FREE_FIELDS = {"skbaddr": ("void *", 8), "location": ("void *", 16)}
REASON_FIELDS = {**FREE_FIELDS, "reason": ("enum skb_drop_reason", 28)}
REASON_NAMES = ", ".join(f'{{ {number}, "{name}" }}' for number, name in REASONS.items())
INTERFACE_FORMATS = (
    format_file("netif_receive_skb", RECEIVED, INTERFACE_FIELDS)
    + format_file("net_dev_queue", QUEUED, INTERFACE_FIELDS)
    + format_file("net_dev_start_xmit", SENT, SENT_FIELDS)
)
FORMATS_4_19 = INTERFACE_FORMATS + format_file("kfree_skb", DROPPED, FREE_FIELDS)
FORMATS = (
    INTERFACE_FORMATS
    + format_file("kfree_skb", DROPPED, REASON_FIELDS, f"__print_symbolic({REASON_NAMES})")
    + format_file("consume_skb", CONSUMED, FREE_FIELDS)
)


def interface_event(number: int, skb: int, device: str, size: int) -> bytes:
    """Return the record of a packet at an interface."""
    name = device.encode() + b"\0"
    if number == SENT:
        head = struct.pack("<HHiIxxxxQ12xI", number, 0, 1, len(name) << 16 | 40, skb, size)
    else:
        head = struct.pack("<HHiQII", number, 0, 1, skb, size, len(name) << 16 | 24)
    return head + name


def free_event(number: int, skb: int, location: int, reason: int = 0) -> bytes:
    """Return the record of a packet that is freed."""
    return struct.pack("<HHiQQHxxI", number, 0, 1, skb, location, 8, reason)


def page(records: list[tuple[int, bytes]], start: int, flags: int = 0, tail: bytes = b"") -> bytes:
    """Return a page of the kernel's ring buffer with records at these times."""
    body = b""
    now = start
    for time_ns, record in records:
        record += bytes(-len(record) % 4)
        delta = time_ns - now
        now = time_ns
        if delta >= 1 << 27:
            body += struct.pack("<II", 30 | (delta & 0x7FFFFFF) << 5, delta >> 27)
            delta = 0
        if len(record) <= 112:
            body += struct.pack("<I", len(record) // 4 | delta << 5)
        else:
            body += struct.pack("<II", delta << 5, len(record) + 4)
        body += record
    header = struct.pack("<QQ", start, len(body) | flags)
    return (header + body + tail).ljust(PAGE, b"\0")


class SavedTrace:
    """A saved run of packets from eth0 to vif5.0, with the events that its hypervisor traced.

    Times are nanoseconds from the start of the run.
    """

    def __init__(self) -> None:
        self.events: defaultdict[int, list[tuple[int, bytes]]] = defaultdict(list)  # by processor
        self.seen: dict[str, list[tuple[int, int]]] = {"pif": [], "vif": []}
        self.formats = FORMATS
        self.stats = ""
        self.backend = ""
        self.resolution = 1_000_000_000

    def seen_at(self, point: str, packet: int, time_ns: int) -> None:
        self.seen[point].append((time_ns, packet))

    def received(self, processor: int, time_ns: int, skb: int, size: int = SIZE) -> None:
        self._add(processor, time_ns, interface_event(RECEIVED, skb, "eth0", size))

    def queued(self, processor: int, time_ns: int, skb: int, size: int = SIZE + 14) -> None:
        self._add(processor, time_ns, interface_event(QUEUED, skb, "vif5.0", size))

    def sent(self, processor: int, time_ns: int, skb: int, size: int = SIZE + 14) -> None:
        self._add(processor, time_ns, interface_event(SENT, skb, "vif5.0", size))

    def dropped(
        self, processor: int, time_ns: int, skb: int, location: int, reason: int = 0
    ) -> None:
        self._add(processor, time_ns, free_event(DROPPED, skb, location, reason))

    def consumed(self, processor: int, time_ns: int, skb: int, location: int) -> None:
        self._add(processor, time_ns, free_event(CONSUMED, skb, location))

    def _add(self, processor: int, time_ns: int, record: bytes) -> None:
        self.events[processor].append((START - CLOCK_OFFSET + time_ns, record))

    def save(self, directory: Path) -> str:
        """Write the run as --save does, and return its path."""
        directory.mkdir(exist_ok=True)
        for processor, events in self.events.items():
            pages = b""
            ordered = sorted(events, key=lambda event: event[0])
            for first in range(0, len(ordered), 60):
                records = ordered[first : first + 60]
                pages += page(records, records[0][0])
            (directory / f"trace-cpu{processor}").write_bytes(pages)
        (directory / "trace-formats").write_text(self.formats)
        (directory / "trace-offset").write_text(f"{CLOCK_OFFSET}\n{CLOCK_OFFSET}\n")
        (directory / "trace-stats").write_text(self.stats)
        symbols = "".join(f"{address:016x} {name}\n" for address, name in SYMBOLS.items())
        (directory / "trace-symbols").write_text(symbols)
        for point, sightings in self.seen.items():
            records = [
                (START + time_ns, ethernet(ipv4(tcp(seq=packet), ident=packet % 65536)))
                for time_ns, packet in sorted(sightings)
            ]
            write(directory / f"{point}.pcap", pcap(records))
        (directory / "report.json").write_text(json.dumps(self._report()))
        return str(directory)

    def _report(self) -> dict[str, Any]:
        config = {
            "version": "2.0.0",
            "direction": "in",
            "match_nat": False,
            "selection": {"sources": [], "destinations": [], "probes": None},
            "pif": "eth0",
            "vif": "vif5.0",
            "backend": self.backend,
            "capture_limit": None,
            "wait": 0.1,
            "name_label": "web1",
            "traffic": None,
            "labels": {},
            "platform": {},
        }
        return {
            "config": config,
            "capture": {"pif": {}, "vif": {}},
            "schema_version": 2,
            "warnings": [],
        }
