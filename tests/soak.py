#!/usr/bin/env python3
"""Hundreds of runs with random faults: how each ends is checked, and that nothing is left.

    .venv/bin/python tests/soak.py [--runs N] [--seed N]

Run by hand, as root. Each run suffers one fault at a random moment, or none: the client is killed
or signalled, the network is cut for good or for a while, or a process on a host is killed. Some
packets are always lost.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

from laboratory import Lab, wait_until

TRAFFIC = "hping3 -c {count} -S -i u2000 {destination}"
# The exit codes with which each fault may end; a signal may come before Python can catch it.
EXIT_CODES = {
    "none": {0},
    "kill -9": {-9},
    "interrupt": {130, -2},
    "terminate": {143, -15},
    "interrupt twice": {130, -2},
    "cut": {3},
    "cut for a second": {0, 3},
    "kill tcpdump": {0, 5},
    "kill hping3": {0, 4, 6},
    "kill sh": {0, 3, 4, 5, 6},
    "kill sshd": {0, 3, 4, 5, 6},
}
SIGNALS = {
    "kill -9": [signal.SIGKILL],
    "interrupt": [signal.SIGINT],
    "terminate": [signal.SIGTERM],
    "interrupt twice": [signal.SIGINT, signal.SIGINT],
}
PROGRAMS = {
    "kill tcpdump": "tcpdump",
    "kill hping3": "hping3",
    "kill sh": "sh",
    "kill sshd": "sshd: root",
}


def strike(fault: str, lab: Lab, process: subprocess.Popen[str], chance: random.Random) -> None:
    """Make a fault happen, if the run still goes on."""
    if process.poll() is not None:
        return
    if fault in SIGNALS:
        for number in SIGNALS[fault]:
            process.send_signal(number)
            time.sleep(0.2)
    elif fault in PROGRAMS:
        kill_one(lab, PROGRAMS[fault], chance)
    elif fault != "none":
        cut(lab, fault, process, chance)


def cut(lab: Lab, fault: str, process: subprocess.Popen[str], chance: random.Random) -> None:
    """Cut the cable of a host: for a second, or until the run has ended."""
    cable = ["ip", "-n", lab.client, "link", "set", chance.choice(["m-hv", "m-src1"])]
    subprocess.run([*cable, "down"], check=True)
    if fault == "cut":
        process.wait(60)
    else:
        time.sleep(1)
    subprocess.run([*cable, "up"], check=True)


def kill_one(lab: Lab, program: str, chance: random.Random) -> None:
    """Kill one of the processes of a program on any host."""
    pids = []
    for host in lab.hosts:
        for pid, line in host.processes().items():
            if program in line.split("/")[-1]:
                pids.append(pid)
    if pids:
        victim = str(chance.choice(pids))
        subprocess.run(["kill", "-KILL", victim], check=False, stderr=subprocess.DEVNULL)


def run_once(lab: Lab, fault: str, chance: random.Random) -> str:
    """Make one run with a fault, and return how it ended; raise AssertionError if that is wrong."""
    count = str(chance.randrange(50, 800))
    arguments = ["-q", "-c", count, "--source-command", TRAFFIC, "--duration", "10"]
    process = lab.start(*lab.arguments(*arguments))
    striker = threading.Timer(chance.uniform(0.1, 4), strike, (fault, lab, process, chance))
    striker.start()
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        striker.join()
    check_end(fault, process.returncode, output, errors)
    if process.returncode < 0:
        return f"{fault}: killed"
    return f"{fault}: exit {process.returncode}"


def check_end(fault: str, code: int, output: str, errors: str) -> None:
    expected = EXIT_CODES[fault] | {0}  # the run may be over before the fault
    assert code in expected, f"{fault}: exit {code}: {errors}"
    assert "Traceback" not in errors, errors
    assert "unexpected" not in errors, errors
    if code == 0:
        packets = json.loads(output)["packets"]
        assert packets["matched"] + packets["lost"] == packets["pif"], packets
        assert packets["vif_only"] == 0, packets
    elif code not in (130, 143) and code > 0:
        assert output == "", output
        assert errors, "no error"


def is_clean(lab: Lab) -> bool:
    """Return whether no host has anything of netweaver; a sshd may wait for a lost peer."""
    for host in lab.hosts:
        lines = host.processes().values()
        foreign = [line for line in lines if "sshd" not in line and "forwarder.py" not in line]
        if foreign or host.files():
            return False
    return True


def check_clean(lab: Lab, fault: str) -> None:
    wait_until(lambda: is_clean(lab), f"clean hosts after {fault}", 20)
    for path in (lab.directory / "client-tmp").iterdir():
        assert fault == "kill -9", f"{fault}: {path} is left on the client"
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    ends: Counter[str] = Counter()
    failures = 0
    with Lab(forwarder=["--delay", "200", "--loss", "0.02"]) as lab:
        for number in range(1, options.runs + 1):
            fault = chance.choice(list(EXIT_CODES))
            try:
                ends[run_once(lab, fault, chance)] += 1
                check_clean(lab, fault)
            except (AssertionError, TimeoutError, subprocess.TimeoutExpired) as error:
                failures += 1
                print(f"run {number}: {error}", file=sys.stderr)
            if number % 25 == 0:
                print(f"{number} runs, {failures} failures", file=sys.stderr, flush=True)
    for end, times in sorted(ends.items()):
        print(f"{times:5} {end}")
    print(f"{sum(ends.values())} of {options.runs} runs ended as they should")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
