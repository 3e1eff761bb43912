"""Runs of netweaver, their documents and errors, and pairs of captures, for several modules."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import random
import re
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
from frames import ethernet, icmp, ipv4, ipv6, pcap, tcp, udp, write
from laboratory import NAME, NETWEAVER, PYTHON, Lab, Network, wait_until

import netweaver

T = 1_700_000_000_123_456_789
FAST = "hping3 -c {count} -S -L 0 -Q -i u1000 {destination}"
ENDLESS = "hping3 -S -i u5000 {destination}"


# -- running netweaver --


class Done(NamedTuple):
    """What a command has left behind."""

    code: int
    stdout: str
    stderr: str


def run_main(capfd: pytest.CaptureFixture[str], *arguments: str) -> Done:
    """Run the command line in this process."""
    capfd.readouterr()
    code = netweaver.main(arguments)
    captured = capfd.readouterr()
    return Done(code, captured.out, captured.err)


def offline(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run netweaver in this process, and return its exit code and what it printed."""
    errors = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="surrogateescape")
    terminal = os.dup(1)
    with (
        tempfile.TemporaryFile() as output,
        contextlib.redirect_stdout(io.StringIO()),  # which is not a terminal
        contextlib.redirect_stderr(errors),
    ):
        os.dup2(output.fileno(), 1)
        try:
            code = netweaver.main(arguments)
        except SystemExit as end:  # of --help and --version
            code = int(end.code or 0)
        finally:
            os.dup2(terminal, 1)
            os.close(terminal)
        output.seek(0)
        text = output.read().decode()
    errors.seek(0)
    return subprocess.CompletedProcess(arguments, code, text, errors.read())


def in_a_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run netweaver in a process of its own."""
    return subprocess.run(
        [sys.executable, str(NETWEAVER), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **options,
    )


def analyzed(*arguments: str) -> dict[str, Any]:
    """Return the document of a run that succeeds, which must be all of stdout and one line."""
    return report(offline(*arguments))


def report(done: subprocess.CompletedProcess[str], code: int = 0) -> dict[str, Any]:
    assert done.returncode == code, done.stderr
    assert done.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def failure(done: subprocess.CompletedProcess[str], code: int) -> str:
    """Return the error of a failed run: the only line that a person sees beside the progress."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.endswith(("...", "flush."))]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("netweaver: error: ")
    assert "Traceback" not in done.stderr
    return lines[0]


def finished(
    process: subprocess.Popen[str], seconds: float = 30
) -> subprocess.CompletedProcess[str]:
    try:
        out, errors = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert "Traceback" not in errors, errors
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def sending(lab: Network) -> bool:
    return all(any("hping3" in line for line in host.processes().values()) for host in lab.sources)


def received(lab: Network) -> int:
    """How many packets the hypervisor's eth0 has got so far."""
    return int(lab.hv.run("cat", "/sys/class/net/eth0/statistics/rx_packets"))


def wait_for_packets(lab: Network) -> None:
    """Wait until some packets of a run's traffic have passed."""
    wait_until(lambda: sending(lab), "the traffic")
    enough = received(lab) + 50
    wait_until(lambda: received(lab) > enough, "some packets")


def run_code(lab: Lab, code: str) -> str:
    """Return the output of Python code on the lab's client.

    The seed's five arguments are at hand.
    """
    names = {
        "SOURCE": lab.source.address,
        "NAME": NAME,
        "DESTINATION": lab.destination,
        "HV": lab.hv.address,
        "KEY": str(lab.key),
    }
    head = "import json, netweaver\n" + "".join(
        f"{name} = {value!r}\n" for name, value in names.items()
    )
    done = subprocess.run(
        lab.on_client(PYTHON, "-c", head + code),
        env={**lab.environment, "PYTHONPATH": str(Path(netweaver.__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


RUN_ALL = """
import json, os, sys, netweaver
directory, lines = sys.argv[1], json.loads(sys.argv[2])
for number, arguments in enumerate(lines):
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{directory}/{number}.{stream}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, descriptor)
        os.close(file)
    code = netweaver.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    with open(f"{directory}/{number}.code", "w") as file:
        file.write(str(code))
"""


def run_all(
    lab: Network, lines: Sequence[Sequence[str]], seconds: float = 120
) -> list[subprocess.CompletedProcess[str]]:
    """Run several command lines one after the other, in one process on the lab's client."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(
            lab.on_client(PYTHON, "-c", RUN_ALL, directory, json.dumps(lines)),
            env={**lab.environment, "PYTHONPATH": str(NETWEAVER.parent)},
            stdin=subprocess.DEVNULL,
            check=True,
            timeout=seconds,
        )
        outcomes = []
        for number, arguments in enumerate(lines):
            code, output, errors = [
                Path(directory, f"{number}.{name}").read_text()
                for name in ("code", "stdout", "stderr")
            ]
            outcomes.append(subprocess.CompletedProcess(arguments, int(code), output, errors))
    return outcomes


def check_failures(lab: Network, cases: Sequence[tuple[Sequence[str], int, str]]) -> None:
    """Run command lines that fail, and check their exit codes and a part of their errors."""
    lines = [lab.arguments(*more) for more, _, _ in cases]
    for done, (more, code, words) in zip(run_all(lab, lines), cases):
        assert words in failure(done, code) + "\n", more


class Terminal:
    """Runs a command whose stderr is a terminal, or all of it; keeps what a person saw.

    `meanwhile` is called with what was seen so far and the process, whenever there is more.
    """

    def __init__(
        self,
        *command: str,
        environment: dict[str, str],
        columns: int = 100,
        whole: bool = False,
        meanwhile: Callable[[bytes, subprocess.Popen[bytes]], object] = lambda seen, process: None,
    ) -> None:
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=slave if whole else subprocess.PIPE,
            stderr=slave,
            env={**environment, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"},
        )
        os.close(slave)
        seen = bytearray()
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while data := os.read(master, 65536):
                seen += data
                meanwhile(bytes(seen), process)
        os.close(master)
        self.stdout = (process.communicate(timeout=60)[0] or b"").decode()
        self.returncode = process.returncode
        self.raw = seen.decode().replace("\r\n", "\n")
        self.text = re.sub(r"\x1b\[[\d;]*[mK]", "", self.raw)


# -- captures --

Packets = list[tuple[int, bytes]]  # times (ns), and IP packets


def captures(
    directory: Path, pif: Packets, vif: Packets, name: str = "", **options: Any
) -> list[str]:
    """Return the paths of two captures; the options are those of the vif's file."""
    return [
        write(
            directory / f"{name}pif.pcap",
            pcap([(when, ethernet(content)) for when, content in pif]),
        ),
        write(
            directory / f"{name}vif.pcap",
            pcap([(when, ethernet(content)) for when, content in vif], **options),
        ),
    ]


def distinct(count: int, gap: int = 1_000_000, **options: Any) -> Packets:
    """SYNs that differ, one each `gap` nanoseconds."""
    return [(T + i * gap, ipv4(tcp(seq=i), ident=i % 65536, **options)) for i in range(count)]


def answers(count: int, later: int) -> Packets:
    """Packets of the VM, each so many nanoseconds after one of `distinct(count)`."""
    packets = distinct(count, source="10.0.0.1", destination="10.0.0.2")
    return [(when + later, content) for when, content in packets]


def through(packets: Packets, delays: Sequence[int | None]) -> Packets:
    """Return the packets at the other end of a path, in their order there.

    Delays are in ns; None: lost.
    """
    return sorted(
        (
            (when + delay, content)
            for (when, content), delay in zip(packets, delays)
            if delay is not None
        ),
        key=lambda item: item[0],
    )


def pair(
    directory: Path, delays: Sequence[int | None], name: str = "", gap: int = 1_000_000
) -> list[str]:
    """Return captures of one packet a millisecond, with these delays in ns (None: lost)."""
    packets = distinct(len(delays), gap)
    return captures(directory, packets, through(packets, delays), name)


def noisy(size: int, seed: int, factor: float = 1.0, loss: float = 0.0) -> list[int | None]:
    """Delays of about 200 µs with a long tail, of which neighbours resemble each other."""
    chance, drift = random.Random(seed), 0.0
    found: list[int | None] = []
    for _ in range(size):
        drift = 0.8 * drift + 0.6 * chance.gauss(0, 1)
        delay = factor * (200_000 + 10_000 * drift + chance.expovariate(1) * 20_000)
        found.append(None if chance.random() < loss else int(delay))
    return found


def save_runs(
    directory: Path,
    name: str,
    factor: float = 1.0,
    runs: int = 5,
    seed: int = 0,
    loss: float = 0.0,
    **config: Any,
) -> None:
    """Save runs as --save does; they differ from one another by some percent, as real ones do."""
    for number in range(runs):
        run = directory / f"20260101T0000{number:02}Z-{name}"
        run.mkdir(parents=True)
        shift = 1 + (seed * 7 + number * 3) % 5 / 200
        delays = noisy(600, 100 * seed + number, factor * shift, loss)
        document = analyzed("--pcaps", *pair(run, delays))
        document["config"] |= {
            "name_label": "web1",
            "capture_limit": None,
            "wait": 0.1,
            "traffic": netweaver.Traffic("syn", 100).to_json(),
            **config,
        }
        (run / "report.json").write_text(json.dumps(document))


def block(*sightings: tuple[str, int]) -> tuple[list[bytes], list[int]]:
    return [b"\0" + key.encode() for key, _ in sightings], [time for _, time in sightings]


def sightings(
    pif: Sequence[tuple[str, int]], vif: Sequence[tuple[str, int]]
) -> netweaver.Sightings:
    """Return sightings of packets that are known by a text, and their times."""
    found = netweaver.Sightings(netweaver.IN)
    found.add("pif", *block(*pif))
    found.add("vif", *block(*vif))
    return found


def paired(
    pif: Sequence[tuple[str, int]],
    vif: Sequence[tuple[str, int]],
    window: netweaver.Window = netweaver.ALWAYS,
) -> netweaver.DirectionResult:
    """Match packets that are known by a text, and their times."""
    return netweaver.match(sightings(pif, vif), window)


def ip_version(packet: bytes) -> int:
    return packet[0] >> 4


def reordering_extents(ranks: Sequence[int]) -> dict[int, int]:
    """Return the extents (RFC 4737) of the packets that a later one has overtaken, by rank."""
    extents = {}
    highest = -1
    for position, rank in enumerate(ranks):
        if rank < highest:
            overtaker = next(index for index, other in enumerate(ranks) if other > rank)
            extents[rank] = position - overtaker
        highest = max(highest, rank)
    return extents


class SeededPath:
    """A path from pif to vif with seeded faults, and its truth."""

    def __init__(
        self,
        packets: Packets,
        seed: int,
        loss: float = 0.03,
        duplicate: float = 0.02,
        jitter: int = 60_000,
    ) -> None:
        chance = random.Random(seed)
        arrived = []  # times, ranks and packets
        self.delays: dict[int, int] = {}
        self.duplicated = 0
        last = len(packets) - 1
        for rank, (time, content) in enumerate(packets):
            # A packet that is missing before the first arrival or after the last is undecided.
            can_be_lost = packets[0][0] + 1000 + jitter < time and rank < last
            if chance.random() < loss and can_be_lost:
                continue
            delay = chance.randrange(1000, 1000 + jitter)
            self.delays[rank] = delay
            arrived.append((time + delay, rank, content))
            if chance.random() < duplicate:
                arrived.append((time + delay + 1 + chance.randrange(jitter), rank, content))
                self.duplicated += 1
        arrived.sort(key=lambda item: item[0])
        self.vif = [(time, content) for time, _, content in arrived]
        self.pif = packets
        first_arrivals = list(dict.fromkeys(rank for _, rank, _ in arrived))
        self.extents: dict[int, int] = {}
        for version in (4, 6):  # the packets of each are a stream of their own
            self.extents |= reordering_extents(
                [rank for rank in first_arrivals if ip_version(packets[rank][1]) == version]
            )

    def check(self, document: dict[str, Any]) -> None:
        delays = numpy.array(list(self.delays.values())) / 1000
        assert document["packets"] == {
            "pif": len(self.pif),
            "vif": len(self.vif),
            "matched": len(delays),
            "ambiguous": 0,
            "lost": len(self.pif) - len(delays),
            "undecided": 0,
            "duplicated": self.duplicated,
            "reordered": len(self.extents),
            "vif_only": 0,
        }
        assert document["loss_ratio"] == (len(self.pif) - len(delays)) / len(self.pif)
        assert document["reordering"] == {
            "ratio": len(self.extents) / len(delays),
            "maximum_extent": max(self.extents.values(), default=0),
        }
        steps = [
            abs(delay - self.delays[rank - 1]) / 1000
            for rank, delay in self.delays.items()
            if rank - 1 in self.delays
        ]
        for name, value in (
            ("average", delays.mean()),
            ("minimum", delays.min()),
            ("maximum", delays.max()),
            ("stdev", delays.std()),
            ("median", numpy.median(delays)),
            ("pdv", numpy.percentile(delays, 99) - delays.min()),
        ):
            assert document[name] == pytest.approx(value, abs=1e-3), name
        assert document["ipdv"] == (pytest.approx(numpy.mean(steps), abs=1e-3) if steps else None)
        for percent, value in document["percentiles"].items():
            assert value == pytest.approx(numpy.percentile(delays, float(percent)), abs=1e-3)


def traffic(count: int, seed: int = 1) -> Packets:
    """Return a mixture of IP packets of many sizes, and their times."""
    chance = random.Random(seed)
    kinds: list[Callable[[int], bytes]] = [
        lambda i: ipv4(
            tcp(1024 + i % 60000, 0, chance.getrandbits(32)), ident=chance.getrandbits(16)
        ),
        lambda i: ipv4(
            tcp(80, 9000, i, 7, 24, payload=bytes(chance.randrange(1400))), ident=i & 0xFFFF
        ),
        lambda i: ipv4(
            udp(53, 9000, chance.randbytes(chance.randrange(1200))), 17, ident=i & 0xFFFF
        ),
        lambda i: ipv4(icmp(8, 0, 77, i & 0xFFFF, bytes(56)), 1, ident=chance.getrandbits(16)),
        lambda i: ipv6(udp(53, 9000, chance.randbytes(16 + chance.randrange(1200))), 17),
        lambda i: ipv6(tcp(80, 9000, i, 7, 16, b"\1\1\x08\x0a" + i.to_bytes(8, "big"), bytes(100))),
    ]
    return [(T + i * 9973, chance.choice(kinds)(i)) for i in range(count)]
