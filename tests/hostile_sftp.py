#!/usr/bin/env python3
"""An SFTP server that misbehaves when a file is asked for, in the manner that its argument names.

sshd starts it in place of its own. It speaks version 3 of the protocol.
"""

from __future__ import annotations

import os
import sys
import time
from struct import pack, unpack
from typing import NoReturn

INIT, VERSION, OPEN, CLOSE, READ, FSTAT = 1, 2, 3, 4, 5, 8
STATUS, HANDLE, DATA, ATTRIBUTES = 101, 102, 103, 105
SIZE = 100_000  # of every file


def receive(size: int) -> bytes:
    data = b""
    while len(data) < size:
        block = os.read(0, size - len(data))
        if not block:
            raise SystemExit
        data += block
    return data


def wait_for_the_end() -> NoReturn:
    """Answer nothing until the client has closed the session."""
    while os.read(0, 65536):
        pass
    raise SystemExit


def send(kind: int, content: bytes) -> None:
    packet = pack(">IB", len(content) + 1, kind) + content
    while packet:
        packet = packet[os.write(1, packet) :]


def text(content: bytes) -> bytes:
    return pack(">I", len(content)) + content


def status(request: bytes, code: int, message: bytes) -> None:
    send(STATUS, request + pack(">I", code) + text(message) + text(b""))


def answer_open(manner: str, request: bytes) -> None:
    if manner == "stall":
        wait_for_the_end()
    if manner == "hang up":
        raise SystemExit
    if manner == "garbage":
        os.write(1, b"Welcome to this host!\n" * 10)
    elif manner == "short":
        send(HANDLE, b"\0")
    elif manner == "words":
        status(request, 4, b"\x1b[2J\x1b]0;title\x07oops")
    elif manner == "no text":
        status(request, 4, b"\xff\xfe")
    elif manner == "unasked":
        while True:
            status(pack(">I", 4_000_000), 0, bytes(30_000))
    else:
        send(HANDLE, request + text(b"handle"))


def answer_read(manner: str, request: bytes, size: int) -> None:
    if manner == "stall in a file":
        wait_for_the_end()
    if manner == "hang up in a file":
        raise SystemExit
    if manner == "more":
        send(DATA, request + text(bytes(10_000_000)))
    elif manner == "less":
        status(request, 1, b"end of file")
    elif manner == "trickle":
        for byte in pack(">IB", size + 9, DATA) + request + text(bytes(size)):
            os.write(1, bytes([byte]))
            time.sleep(1)
    else:
        send(DATA, request + text(bytes(size)))


def main(manner: str) -> None:
    while True:
        packet = receive(unpack(">I", receive(4))[0])
        kind = packet[0]
        request = packet[1:5]
        if kind == INIT:
            send(VERSION, pack(">I", 3))
        elif kind == OPEN:
            answer_open(manner, request)
        elif kind == FSTAT:
            size = 1 << 62 if manner == "huge" else SIZE
            send(ATTRIBUTES, request + pack(">IQ", 1, size))
        elif kind == READ:
            answer_read(manner, request, unpack(">I", packet[-4:])[0])
        elif kind == CLOSE:
            status(request, 0, b"")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]))
