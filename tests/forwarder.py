#!/usr/bin/env python3
"""Forwards frames between two interfaces as a bad network would, and logs exactly what it did.

IP packets for the destination that come in by the first interface (pif) are delayed, dropped, duplicated and
reordered by a seeded generator; all other frames, and the other direction, pass at once.  At SIGTERM it writes the
truth as JSON: one record for each of these packets, `seen` (the kernel's stamp on the pif) and `sent` (when each
copy was handed to the vif), in nanoseconds of the same clock.
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
from ipaddress import ip_address
from typing import Any

PACKET_IGNORE_OUTGOING = 23
SOL_PACKET = 263
SO_TIMESTAMPNS = 35
ETH_P_ALL = 3


def tap(interface: str) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    sock.bind((interface, 0))
    sock.setblocking(False)
    return sock


def receive(sock: socket.socket) -> tuple[bytes, int] | None:
    """(frame, time stamp) of the next frame; None if there is none."""
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
    """The frame under VLAN tags, the outermost of several being 802.1ad's."""
    kinds = [0x88A8] * (len(tags) > 1) + [0x8100] * len(tags)
    return frame[:12] + b"".join(struct.pack(">HH", kind, tag) for kind, tag in zip(kinds, tags)) + frame[12:]


def untagged(frame: bytes) -> bytes:
    """The frame without the tags which the kernel has left in it."""
    while frame[12:14] in (b"\x81\x00", b"\x88\xa8"):
        frame = frame[:12] + frame[16:]
    return frame


def destination(frame: bytes) -> bytes:
    """The packed destination address of an untagged IP packet; nothing for other frames."""
    kind = frame[12:14]
    return frame[30:34] if kind == b"\x08\x00" else frame[38:54] if kind == b"\x86\xdd" else b""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pif")
    parser.add_argument("vif")
    parser.add_argument("destination", type=lambda text: ip_address(text).packed)
    parser.add_argument("log")
    parser.add_argument("--delay", type=float, default=0, help="microseconds")
    parser.add_argument("--jitter", type=float, default=0, help="microseconds, uniform around the delay")
    parser.add_argument("--loss", type=float, default=0)
    parser.add_argument("--duplicate", type=float, default=0)
    parser.add_argument("--reorder", type=float, default=0, help="share of the packets that wait 3 delays longer")
    parser.add_argument("--back", type=float, default=0, help="delay of the other direction, microseconds")
    parser.add_argument("--tags", type=int, nargs="*", default=[], help="VLANs on the pif's side, outermost first")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    pif, vif = tap(options.pif), tap(options.vif)
    packets: list[dict[str, Any]] = []
    queue: list[tuple[int, int, socket.socket, bytes, list[int] | None]] = []
    number = 0

    def stop(*_: object) -> None:
        raise SystemExit

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("ready", flush=True)
    try:
        while True:
            wait = max(0, queue[0][0] - time.monotonic_ns()) / 1e9 if queue else None
            readable, _, _ = select.select([pif, vif], [], [], wait)
            while queue and queue[0][0] <= time.monotonic_ns():
                _, _, sock, frame, sent = heapq.heappop(queue)
                now = time.time_ns()
                try:
                    sock.send(tagged(frame, options.tags) if sock is pif else frame)
                except OSError:
                    continue
                if sent is not None:
                    sent.append(now)
            for source, target in ((pif, vif), (vif, pif)):
                while source in readable and (got := receive(source)):
                    frame, stamp = untagged(got[0]), got[1]
                    number += 1
                    if source is vif:
                        due = time.monotonic_ns() + int(options.back * 1000)
                        heapq.heappush(queue, (due, number, target, frame, None))
                    elif destination(frame) != options.destination:
                        heapq.heappush(queue, (0, number, target, frame, None))
                    else:
                        sent = []
                        packets.append({"seen": stamp, "sent": sent})
                        if chance.random() < options.loss:
                            continue
                        wait_us = options.delay + chance.uniform(-options.jitter, options.jitter)
                        if chance.random() < options.reorder:
                            wait_us += 3 * options.delay
                        due = time.monotonic_ns() - (time.time_ns() - stamp) + int(wait_us * 1000)
                        heapq.heappush(queue, (due, number, target, frame, sent))
                        if chance.random() < options.duplicate:
                            number += 1
                            heapq.heappush(queue, (due + 300_000, number, target, frame, sent))
    finally:
        with open(options.log, "w") as file:
            json.dump({"packets": packets}, file)


if __name__ == "__main__":
    main()
