#!/usr/bin/env python3
"""Hundreds of runs with random faults; at the end every run is accounted for, and nothing is left anywhere.

    .venv/bin/python tests/soak.py [--runs N] [--seed N]

Run by hand, as root.  Each run suffers one fault at a random moment, or none: the client is killed or signalled, the
network is cut for good or for a while, or a process on a host is killed; and always some packets are lost.  What may
come of it is known for each.
"""
from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

from lab import Lab, wait_until

TRAFFIC = "hping3 -c {count} -S -i u2000 {destination}"
# The exit codes with which each fault may end; a signal may come before Python can catch it.
ENDS = {
    "none": {0}, "kill -9": {-9}, "interrupt": {130, -2}, "terminate": {143, -15},
    "interrupt twice": {130, -2}, "cut": {3}, "cut for a second": {0, 3}, "kill tcpdump": {0, 5},
    "kill hping3": {0, 4, 6}, "kill sh": {0, 3, 4, 5, 6}, "kill sshd": {0, 3, 4, 5, 6},
}


def strike(fault: str, lab: Lab, process: subprocess.Popen[str], chance: random.Random) -> None:
    """Makes a fault happen, if the run still goes on."""
    if process.poll() is not None:
        return
    numbers = {"kill -9": [signal.SIGKILL], "interrupt": [signal.SIGINT], "terminate": [signal.SIGTERM],
               "interrupt twice": [signal.SIGINT, signal.SIGINT]}
    for number in numbers.get(fault, []):
        process.send_signal(number)
        time.sleep(0.2)
    if fault.startswith("cut"):
        cable = chance.choice(["m-hv", "m-src1"])
        subprocess.run(["ip", "-n", lab.client, "link", "set", cable, "down"], check=True)
        if fault == "cut":
            process.wait(60)
        else:
            time.sleep(1)
        subprocess.run(["ip", "-n", lab.client, "link", "set", cable, "up"], check=True)
    elif fault.startswith("kill ") and fault != "kill -9":
        program = fault.split()[1]
        victims = [pid for host in lab.hosts for pid, line in host.processes().items()
                   if (f"{program}: root" if program == "sshd" else program) in line.split("/")[-1]]
        if victims:
            subprocess.run(["kill", "-KILL", str(chance.choice(victims))], check=False, stderr=subprocess.DEVNULL)


def one(lab: Lab, fault: str, chance: random.Random) -> str:
    """One run under a fault; how it ended, or an AssertionError."""
    count = chance.randrange(50, 800)
    process = lab.start(*lab.arguments("-q", "-c", str(count), "--source-command", TRAFFIC, "--duration", "10"))
    striker = threading.Timer(chance.uniform(0.1, 4), strike, (fault, lab, process, chance))
    striker.start()
    try:
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        striker.join()
    code = process.returncode
    missed = {0} if fault != "none" else set()           # it was over before the fault came
    assert code in ENDS[fault] | missed, f"{fault}: exit {code}: {errors}"
    assert "Traceback" not in errors and "unexpected" not in errors, errors
    if code == 0:
        found = json.loads(out)["packets"]
        assert found["matched"] + found["lost"] == found["pif"], found
        assert found["vif_only"] == 0, found
    elif code not in (130, 143) and code >= 0:
        assert out == "", out
        assert errors.count("\n") >= 1, errors
    return f"{fault}: {'killed' if code < 0 else f'exit {code}'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    ends: collections.Counter[str] = collections.Counter()
    failures = 0
    with Lab(forwarder=["--delay", "200", "--loss", "0.02"]) as lab:
        for number in range(1, options.runs + 1):
            fault = chance.choice(list(ENDS))
            try:
                ends[one(lab, fault, chance)] += 1
                wait_until(lambda: not any(host.files() for host in lab.hosts) and not any(
                    "sshd" not in line for host in lab.hosts for line in host.processes().values()
                    if "forwarder.py" not in line), f"clean hosts after {fault}", 20)
                for path in (lab.directory / "client-tmp").iterdir():
                    assert fault == "kill -9", f"{fault}: {path} is left on the client"
                    shutil.rmtree(path)
            except (AssertionError, TimeoutError, subprocess.TimeoutExpired) as error:
                failures += 1
                print(f"run {number}: {error}", file=sys.stderr)
            if number % 25 == 0:
                print(f"{number} runs, {failures} failures", file=sys.stderr, flush=True)
        sessions = [line for host in lab.hosts for line in host.processes().values() if "sshd" in line]
    for end, times in sorted(ends.items()):
        print(f"{times:5} {end}")
    print(f"{sum(ends.values())} of {options.runs} runs accounted for; {len(sessions)} sshd sessions still open")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
