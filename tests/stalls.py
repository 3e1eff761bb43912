"""Log in through a proxy that stops to deliver after some bytes, and see how that ends.

    python tests/stalls.py HOST KEY STEP     try it from the start, and after every STEP bytes
                                            of a login and a session
    python tests/stalls.py HOST POSITION     serve one connection; prints the port,
                                            and at the end the time of the stall

The former prints a JSON list: of each attempt the position, the error, its exit code, and the
seconds from the stall to the error.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import netweaver

ATTEMPTS_AT_ONCE = 24
ENDING = 250  # bytes that a server sends when all is done


@dataclass
class Outcome:
    """How an attempt ended."""

    position: int  # bytes that the server's side delivered before it stalled
    error: str
    exit_code: int
    seconds: float  # from the stall to the error


class StallingProxy:
    """Forwards one TCP connection, but only so many bytes from the server."""

    def __init__(self, host: str, port: int, limit: int | None) -> None:
        self.delivered = 0
        self.last_delivery = time.monotonic()
        self._limit = limit
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._server = socket.create_connection((host, port))
        self._client = self._server
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            self._client, _ = self._listener.accept()
            threading.Thread(target=self._deliver, daemon=True).start()
            while data := self._client.recv(65536):
                self._server.sendall(data)

    def _deliver(self) -> None:
        with contextlib.suppress(OSError):
            while self._limit is None or self.delivered < self._limit:
                wanted = 65536
                if self._limit is not None:
                    wanted = self._limit - self.delivered
                data = self._server.recv(wanted)
                if not data:
                    return
                self._client.sendall(data)
                self.delivered += len(data)
                self.last_delivery = time.monotonic()

    def close(self) -> None:
        for sock in (self._client, self._server, self._listener):
            with contextlib.suppress(OSError):  # not connected any more
                sock.shutdown(socket.SHUT_RDWR)  # which ends a thread that waits for it
            sock.close()


def log_in(port: int, key: str) -> None:
    """Log in, and run a command."""
    weaver = netweaver.NetWeaver(
        (),
        "",
        "192.0.2.1",
        f"root@127.0.0.1:{port}",
        key,
        duration=1,
        ssh_options=["StrictHostKeyChecking no", "UserKnownHostsFile none"],
    )
    with weaver:
        weaver.verify_connections()
        weaver.run_command("true")


def attempt(host: str, key: str, position: int) -> Outcome:
    """Log in through a proxy that stalls at a position."""
    proxy = StallingProxy(host, 22, position)
    try:
        log_in(proxy.port, key)
    except netweaver.NetWeaverError as error:
        seconds = time.monotonic() - proxy.last_delivery
        return Outcome(position, str(error), error.exit_code, seconds)
    finally:
        proxy.close()
    return Outcome(position, "", 0, 0.0)


def try_all(host: str, key: str, step: int) -> list[Outcome]:
    """Stall at once, and after every so many bytes of a login and a session."""
    whole = StallingProxy(host, 22, None)
    log_in(whole.port, key)
    whole.close()
    positions = range(0, whole.delivered - ENDING, step)
    with ThreadPoolExecutor(ATTEMPTS_AT_ONCE) as pool:
        return list(pool.map(lambda position: attempt(host, key, position), positions))


def main(host: str, *arguments: str) -> None:
    threading.excepthook = lambda _: None  # paramiko's threads end in errors
    if len(arguments) == 2:
        key, step = arguments
        outcomes = try_all(host, key, int(step))
        print(json.dumps([asdict(outcome) for outcome in outcomes]))
    else:
        proxy = StallingProxy(host, 22, int(arguments[0]))
        print(proxy.port, flush=True)
        sys.stdin.read()
        print(proxy.last_delivery)


if __name__ == "__main__":
    main(*sys.argv[1:])
