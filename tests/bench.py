#!/usr/bin/env python3
"""Compare netweaver's CPU time and memory with those of other programs, on the same captures.

    .venv/bin/python tests/bench.py [--baseline OLD/netweaver.py] [--packets N ...] [--rounds N]

Whole processes are measured, with their children.  Each round runs every program once, so that
other load on the machine falls on all of them.  A program that is not installed is left out: dpkt
(pip install '.[bench]'), tshark, tcpdump.  `netweaver` is the installed command, whose bytecode is
cached; `netweaver.py` is compiled in each run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from frames import ethernet, ipv4, pcap, tcp, udp

ROOT = Path(__file__).resolve().parent.parent
SECOND = 10**9
START = 1_700_000_000 * SECOND
SPACING = 10_000  # nanoseconds between packets
LOSS = 0.01
SLOW_PROGRAMS = ("dpkt", "tshark")  # they take minutes for a million packets
SLOW_PACKETS = 100_000

DPKT = """
import sys
import dpkt

def read(path):
    packets = {}
    with open(path, "rb") as file:
        for time, frame in dpkt.pcap.Reader(file):
            ip = dpkt.ethernet.Ethernet(frame).data
            packets[ip.id, bytes(ip.data)[:20]] = time
    return packets

pif = read(sys.argv[1])
vif = read(sys.argv[2])
delays = [float(vif[key] - pif[key]) for key in pif if key in vif]
print(sum(delays) / len(delays))
"""
TSHARK = (
    "for file; do"
    " tshark -n -r $file -T fields -e frame.time_epoch -e ip.src -e ip.id -e tcp.seq_raw; "
    "done"
)
TCPDUMP = "for file; do tcpdump -tt -n -r $file; done"


@dataclass
class Captures:
    """A pair of captures of the same packets."""

    title: str
    packets: int
    pif: Path
    vif: Path


@dataclass
class Program:
    """A program that reads two captures, and what it took."""

    name: str
    command: list[str]
    seconds: list[float] = field(default_factory=list)  # of CPU, user and system
    megabytes: float = 0.0  # at the most

    def run(self, captures: Captures) -> None:
        """Run the program once."""
        process = subprocess.Popen(
            [*self.command, str(captures.pif), str(captures.vif)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{self.name}: exit status {process.returncode}")
        self.seconds.append(usage.ru_utime + usage.ru_stime)
        self.megabytes = max(self.megabytes, usage.ru_maxrss / 1024)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def syns(count: int) -> Iterator[bytes]:
    """Yield SYNs as hping3 sends them."""
    chance = random.Random(count)
    for index in range(count):
        segment = tcp(1024 + index % 60_000, 0, chance.getrandbits(32))
        yield ethernet(ipv4(segment, ident=chance.getrandbits(16)))


def mixed_packets(count: int) -> Iterator[bytes]:
    """Yield segments and datagrams of many sizes."""
    chance = random.Random(count)
    for index in range(count):
        payload = index.to_bytes(4, "big") + bytes(chance.randrange(1400))
        ident = index & 0xFFFF
        if index % 2:
            yield ethernet(ipv4(tcp(80, 9000, index, 7, 16, payload=payload), ident=ident))
        else:
            yield ethernet(ipv4(udp(53, 9000, payload), 17, ident=ident))


def write_captures(directory: Path, title: str, count: int, frames: Iterable[bytes]) -> Captures:
    """Write a pair of captures, record by record; packets arrive in the order of sending."""
    chance = random.Random(count)
    pif = directory / f"{title}-pif.pcap"
    vif = directory / f"{title}-vif.pcap"
    with pif.open("wb") as pif_file, vif.open("wb") as vif_file:
        pif_file.write(pcap([]))
        vif_file.write(pcap([]))
        for index, frame in enumerate(frames):
            time = START + index * SPACING
            pif_file.write(record(time, frame))
            if chance.random() > LOSS:
                vif_file.write(record(time + 20_000 + chance.randrange(SPACING), frame))
    return Captures(f"{count:,} {title}", count, pif, vif)


def record(time: int, frame: bytes) -> bytes:
    seconds, nanoseconds = divmod(time, SECOND)
    return struct.pack("<4I", seconds, nanoseconds, len(frame), len(frame)) + frame


def programs(captures: Captures, baseline: str | None) -> list[Program]:
    """Return the programs to compare, netweaver first."""
    python = sys.executable
    installed = Path(python).parent / "netweaver"
    compared = [Program("netweaver.py", [python, str(ROOT / "netweaver.py"), "--pcaps"])]
    if installed.exists():
        compared.append(Program("netweaver", [str(installed), "--pcaps"]))
    if baseline:
        compared.append(Program("baseline", [python, baseline, "--pcaps"]))
    if shutil.which("tcpdump"):
        compared.append(Program("tcpdump -tt", ["sh", "-c", TCPDUMP, "sh"]))
    if shutil.which("tshark"):
        compared.append(Program("tshark, fields", ["sh", "-c", TSHARK, "sh"]))
    if importlib.util.find_spec("dpkt"):
        compared.append(Program("dpkt, dissecting", [python, "-c", DPKT]))
    if captures.packets > SLOW_PACKETS:
        compared = [one for one in compared if not one.name.startswith(SLOW_PROGRAMS)]
    return compared


def compare(captures: Captures, baseline: str | None, rounds: int) -> Program:
    """Print what each program takes for a pair of captures, and return netweaver's figures."""
    compared = programs(captures, baseline)
    for _ in range(rounds):
        for program in compared:
            program.run(captures)
    netweaver = compared[0]
    for program in compared:
        ratio = netweaver.median / program.median
        print(
            f"| {captures.title} | {program.name} | {program.median:.3f} | {ratio:.2f} "
            f"| {program.megabytes:.0f} |",
            flush=True,
        )
    return netweaver


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--baseline", help="netweaver.py of another version")
    parser.add_argument("--packets", type=int, nargs="+", default=[10_000, 1_000_000, 4_000_000])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    # The installed command's bytecode is cached, as it is for users.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    print("| packets a side | program | CPU s | netweaver.py / program | MB |")
    print("|---|---|---|---|---|")
    figures: dict[int, Program] = {}
    for count in options.packets:
        with tempfile.TemporaryDirectory(prefix="netweaver-bench-") as name:
            captures = write_captures(Path(name), "SYNs", count, syns(count))
            figures[count] = compare(captures, options.baseline, options.rounds)
        if count == 1_000_000:
            with tempfile.TemporaryDirectory(prefix="netweaver-bench-") as name:
                captures = write_captures(Path(name), "mixed", count, mixed_packets(count))
                compare(captures, options.baseline, options.rounds)
    few = figures.get(1_000_000)
    many = figures.get(4_000_000)
    if few and many:
        time = many.median / few.median
        memory = many.megabytes / few.megabytes
        print(
            f"\n4,000,000 SYNs take {time:.2f} times the CPU time and {memory:.2f} times the memory"
        )
    print(f"\n{os.cpu_count()} cores, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
