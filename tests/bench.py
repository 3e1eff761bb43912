#!/usr/bin/env python3
"""Compares netweaver's analysis with other ways to get the same delays: whole processes, side by side, in one run.

    .venv/bin/python tests/bench.py [--packets N ...] [--rounds N]

Run by hand; needs dpkt (pip install '.[bench]'), tshark and tcpdump.  Each round runs every program once, so that
what else the machine does falls on all of them; the medians are printed, with the ratio to netweaver.  `netweaver` is
the installed command, whose bytecode is cached; `netweaver.py` is compiled in each run.  `cat` is the floor.
"""
from __future__ import annotations

import argparse
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from frames import ethernet, ipv4, pcap, tcp, udp

ROOT = Path(__file__).resolve().parent.parent
DPKT = """
import sys, dpkt
def read(path):
    with open(path, 'rb') as file:
        return {%s: time for time, frame in dpkt.pcap.Reader(file)}
pif, vif = map(read, sys.argv[1:3])
delays = [float(vif[key] - pif[key]) for key in pif if key in vif]
print(sum(delays) / len(delays))
"""
TEXT = """
import subprocess, sys
def read(path):
    out = subprocess.run(%s, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return {key: float(time) for time, key in (%s for line in out.splitlines())}
pif, vif = map(read, sys.argv[1:3])
delays = [vif[key] - pif[key] for key in pif if key in vif]
print(sum(delays) / len(delays))
"""
TSHARK = TEXT % ("['tshark', '-n', '-r', path, '-T', 'fields', '-e', 'frame.time_epoch', '-e', 'tcp.seq_raw']",
                 "line.split('\\t')")
TCPDUMP = TEXT % ("['tcpdump', '-tt', '-nnr', path]", "(line.split()[0], line.split()[8])")


def make(directory: Path, name: str, count: int, mixed: bool) -> tuple[str, str]:
    """A pair of captures: SYNs as hping3 sends them, or TCP and UDP of many sizes; one in a hundred is lost."""
    chance = random.Random(count)
    pif, vif = [], []
    for i in range(count):
        when = 1_700_000_000 * 10**9 + i * 10_000
        if not mixed:
            packet = ipv4(tcp(1024 + i % 60000, 0, chance.getrandbits(32)), ident=chance.getrandbits(16))
        elif i % 2:
            packet = ipv4(tcp(80, 9000, i, 7, 16, payload=bytes(chance.randrange(1400))), ident=i & 0xFFFF)
        else:
            packet = ipv4(udp(53, 9000, i.to_bytes(4, "big") + bytes(chance.randrange(1400))), 17, ident=i & 0xFFFF)
        frame = ethernet(packet, pad=False)
        pif.append((when, frame))
        if chance.random() > 0.01:
            vif.append((when + 20_000 + chance.randrange(20_000), frame))
    paths = directory / f"{name}-pif.pcap", directory / f"{name}-vif.pcap"
    for path, records in zip(paths, (pif, vif)):
        path.write_bytes(pcap(records))
    return str(paths[0]), str(paths[1])


def run(command: list[str]) -> tuple[float, float]:
    """(seconds, MB at the most) of a process."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    took = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit status {process.returncode}: {' '.join(command)[:200]}")
    return took, usage.ru_maxrss / 1024


def compare(title: str, pair: tuple[str, str], programs: dict[str, list[str]], rounds: int) -> None:
    took: dict[str, list[float]] = {name: [] for name in programs}
    memory: dict[str, float] = {}
    for _ in range(rounds):
        for name, command in programs.items():
            seconds, megabytes = run([*command, *pair])
            took[name].append(seconds)
            memory[name] = max(megabytes, memory.get(name, 0))
    unit = statistics.median(took["netweaver"])
    print(f"\n{title}\n\n| program | seconds | ratio | MB |\n|---|---|---|---|")
    for name, times in took.items():
        median = statistics.median(times)
        print(f"| {name} | {median:.3f} | {median / unit:.2f} | {memory[name]:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packets", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)      # the installed command's bytecode is cached where users are
    python, installed = sys.executable, str(Path(sys.executable).parent / "netweaver")
    programs = {
        "cat": ["cat"],
        "netweaver": [installed, "--pcaps"],
        "netweaver.py": [python, str(ROOT / "netweaver.py"), "--pcaps"],
        "dpkt, sliced": [python, "-c", DPKT % "frame[18:20] + frame[26:42]"],
        "dpkt, dissected": [python, "-c", DPKT % "dpkt.ethernet.Ethernet(frame).data.data.seq"],
        "tcpdump, text + split": [python, "-c", TCPDUMP],
        "tcpdump, text alone": ["sh", "-c", 'tcpdump -tt -nnr "$0" && tcpdump -tt -nnr "$1"'],
        "tshark, fields + join": [python, "-c", TSHARK],
    }
    with tempfile.TemporaryDirectory(prefix="netweaver-bench-") as place:
        for count in options.packets:
            rounds = options.rounds if count > 100_000 else 3 * options.rounds
            few = {name: command for name, command in programs.items() if count <= 100_000 or "tshark" not in name}
            compare(f"{count:,} SYNs a side", make(Path(place), f"syn{count}", count, False), few, rounds)
            few = {name: few[name] for name in ("cat", "netweaver", "netweaver.py", "dpkt, sliced")}
            compare(f"{count:,} packets of mixed sizes a side", make(Path(place), f"mix{count}", count, True), few,
                    rounds)
    print(f"\n{os.cpu_count()} cores, Python {sys.version.split()[0]}; "
          f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MB at the most")


if __name__ == "__main__":
    main()
