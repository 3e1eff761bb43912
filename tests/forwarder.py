#!/usr/bin/env python3
"""Forwards frames between two interfaces as a bad network would, and logs exactly what it did.

IP packets for the destination that come in by the first interface (pif) are delayed, dropped,
duplicated and reordered by a seeded generator; all other frames, and the other direction, pass at
once.  At SIGTERM it writes the truth as JSON: one record for each of these packets, `seen` (the
kernel's stamp on the pif) and `sent` (when each copy was handed to the vif), in nanoseconds of the
same clock.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from ipaddress import ip_address

PACKET_IGNORE_OUTGOING = 23
SOL_PACKET = 263
SO_TIMESTAMPNS = 35
ETH_P_ALL = 3
DUPLICATE_DELAY = 300_000  # ns
Forward = Callable[[bytes, int], None]  # takes a frame and its time stamp


@dataclass
class Packet:
    """What became of a packet for the destination."""

    seen: int  # ns
    sent: list[int] = field(default_factory=list)  # ns, of each copy


@dataclass(order=True)
class Waiting:
    """A frame that is sent later."""

    due: int  # ns, of the monotonic clock
    number: int  # frames that are due at the same time keep their order
    target: socket.socket = field(compare=False)
    frame: bytes = field(compare=False)
    packet: Packet | None = field(compare=False)


def tap(interface: str) -> socket.socket:
    """Return a socket that receives and sends all frames of an interface."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    sock.bind((interface, 0))
    sock.setblocking(False)
    return sock


def receive(sock: socket.socket) -> tuple[bytes, int] | None:
    """Return the next frame and its time stamp; None if there is none."""
    try:
        frame, ancillary, _, _ = sock.recvmsg(1 << 16, 64)
    except BlockingIOError:
        return None
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
            seconds, nanoseconds = struct.unpack("qq", data[:16])
            return frame, seconds * 1_000_000_000 + nanoseconds
    return frame, time.time_ns()


def tagged(frame: bytes, tags: list[int]) -> bytes:
    """Return the frame under VLAN tags, the outermost of several being 802.1ad's."""
    header = b""
    for index, tag in enumerate(tags):
        outer = index == 0 and len(tags) > 1
        header += struct.pack(">HH", 0x88A8 if outer else 0x8100, tag)
    return frame[:12] + header + frame[12:]


def untagged(frame: bytes) -> bytes:
    """Return the frame without the tags that the kernel has left in it."""
    while frame[12:14] in (b"\x81\x00", b"\x88\xa8"):
        frame = frame[:12] + frame[16:]
    return frame


def destination(frame: bytes) -> bytes:
    """Return the packed destination of an untagged IP packet; nothing for other frames."""
    if frame[12:14] == b"\x08\x00":
        return frame[30:34]
    if frame[12:14] == b"\x86\xdd":
        return frame[38:54]
    return b""


class Forwarder:
    """A path between two interfaces, with faults."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.packets: list[Packet] = []
        self._options = options
        self._chance = random.Random(options.seed)
        self._pif = tap(options.pif)
        self._vif = tap(options.vif)
        self._queue: list[Waiting] = []
        self._count = 0

    def run(self) -> None:
        """Forward frames until a signal ends the process."""
        while True:
            wait = None
            if self._queue:
                wait = max(0, self._queue[0].due - time.monotonic_ns()) / 1e9
            readable, _, _ = select.select([self._pif, self._vif], [], [], wait)
            self._send_due()
            if self._pif in readable:
                self._receive_all(self._pif, self._from_pif)
            if self._vif in readable:
                self._receive_all(self._vif, self._from_vif)

    def _send_due(self) -> None:
        while self._queue and self._queue[0].due <= time.monotonic_ns():
            waiting = heapq.heappop(self._queue)
            frame = waiting.frame
            if waiting.target is self._pif:
                frame = tagged(frame, self._options.tags)
            now = time.time_ns()
            try:
                waiting.target.send(frame)
            except OSError:
                continue
            if waiting.packet:
                waiting.packet.sent.append(now)

    def _receive_all(self, sock: socket.socket, forward: Forward) -> None:
        received = receive(sock)
        while received:
            frame, stamp = received
            forward(untagged(frame), stamp)
            received = receive(sock)

    def _add(
        self, due: int, target: socket.socket, frame: bytes, packet: Packet | None = None
    ) -> None:
        self._count += 1
        heapq.heappush(self._queue, Waiting(due, self._count, target, frame, packet))

    def _from_vif(self, frame: bytes, stamp: int) -> None:
        self._add(time.monotonic_ns() + int(self._options.back * 1000), self._pif, frame)

    def _from_pif(self, frame: bytes, stamp: int) -> None:
        options = self._options
        if destination(frame) != options.destination:
            self._add(0, self._vif, frame)
            return
        packet = Packet(stamp)
        self.packets.append(packet)
        if self._chance.random() < options.loss:
            return
        delay_us = options.delay + self._chance.uniform(-options.jitter, options.jitter)
        if self._chance.random() < options.reorder:
            delay_us += 3 * options.delay
        age = time.time_ns() - stamp
        due = time.monotonic_ns() - age + int(delay_us * 1000)
        self._add(due, self._vif, frame, packet)
        if self._chance.random() < options.duplicate:
            self._add(due + DUPLICATE_DELAY, self._vif, frame, packet)


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pif")
    parser.add_argument("vif")
    parser.add_argument("destination", type=lambda text: ip_address(text).packed)
    parser.add_argument("log")
    parser.add_argument("--delay", type=float, default=0, help="microseconds")
    parser.add_argument("--jitter", type=float, default=0, help="microseconds around the delay")
    parser.add_argument("--loss", type=float, default=0)
    parser.add_argument("--duplicate", type=float, default=0)
    parser.add_argument(
        "--reorder", type=float, default=0, help="share of the packets that wait 3 delays longer"
    )
    parser.add_argument(
        "--back", type=float, default=0, help="delay of the other direction, microseconds"
    )
    parser.add_argument(
        "--tags", type=int, nargs="*", default=[], help="VLANs on the pif's side, outermost first"
    )
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def stop(*_: object) -> None:
    """End the process."""
    raise SystemExit


def main() -> None:
    options = parse_options()
    forwarder = Forwarder(options)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("ready", flush=True)
    try:
        forwarder.run()
    finally:
        with open(options.log, "w") as file:
            json.dump({"packets": [asdict(packet) for packet in forwarder.packets]}, file)


if __name__ == "__main__":
    main()
