"""Recording: captures that end otherwise than they should, generators of all kinds.

And their rates.
"""

from __future__ import annotations

import contextlib
import csv
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from helpers import check_failures, failure, report
from laboratory import DATA6, Host, Lab

pytestmark = pytest.mark.lab

TCPDUMP = shutil.which("tcpdump", path="/usr/bin:/usr/sbin")
HPING3 = shutil.which("hping3", path="/usr/bin:/usr/sbin")
BRIEF = ("-c", "200", "--rate", "500")


@contextlib.contextmanager
def hidden(host: Host, path: str | None) -> Iterator[None]:
    """Hide a program of a host."""
    assert path
    host.run("mount", "--bind", "/dev/null", path)
    try:
        yield
    finally:
        host.run("umount", path)


def one_source(lab: Lab, *more: str) -> list[str]:
    return lab.arguments(*more, source=lab.source.address)


def measured(lab: Lab, *more: str) -> dict[str, Any]:
    """Return the document of a measurement from one source."""
    return report(lab.netweaver(*one_source(lab, *more)))


def warnings_with(document: dict[str, Any], word: str) -> list[str]:
    return [warning for warning in document["warnings"] if word in warning]


# -- captures --


def test_a_capture_that_is_killed_when_it_is_stopped(lab: Lab) -> None:
    """That of the vif: SIGTERM kills it, and also interrupts `wait`, which is repeated."""
    script = f"""case "$*" in *vif5.0*) ;; *) exec {TCPDUMP} "$@" ;; esac
{TCPDUMP} "$@" & child=$!
trap 'kill -KILL $child' TERM
until wait $child; status=$?; [ $status -gt 128 ] && ! kill -0 $child 2>/dev/null; do :; done
exit $status"""
    with lab.hv.program("tcpdump", script):
        line = failure(lab.netweaver(*one_source(lab, *BRIEF)), 5)
    assert "vif5.0" in line
    assert "137" in line  # 128 + SIGKILL


# -- generators --


@contextlib.contextmanager
def silent_vm(lab: Lab) -> Iterator[None]:
    """Make the VM drop all TCP packets."""
    rule = ["INPUT", "-p", "tcp", "-j", "DROP"]
    inside = ["ip", "netns", "exec", lab._dst, "iptables"]
    subprocess.run([*inside, "-A", *rule], check=True)
    try:
        yield
    finally:
        subprocess.run([*inside, "-D", *rule], check=True)


def test_hping3_as_its_authors_spell_it(lab: Lab) -> None:
    script = f"""exec 3>&1
{{ {HPING3} "$@" 2>&1 >&3; echo "status $?"; }} |
while read -r line; do
  case $line in
    "status "*) exit ${{line#status }} ;;
    *) echo "$line" | sed s/transmitted/tramitted/ >&2 ;;
  esac
done"""
    with lab.source.program("hping3", script):
        document = measured(lab, *BRIEF)
        assert document["config"]["transmitted"] == 200
        with silent_vm(lab):
            document = measured(lab, *BRIEF)
    assert document["packets"]["matched"] == 200
    assert document["config"]["transmitted"] == 200


@pytest.mark.parametrize("program", ["busybox ping", "/bin/ping"])
def test_all_pings_send_where_hping3_is_missing(lab: Lab, program: str) -> None:
    more = ("--traffic", "ping", "-c", "30", "--rate", "50", "-d")
    with hidden(lab.source, HPING3), lab.source.program("ping", f'exec {program} "$@"'):
        for destination in (lab.destination, f"{DATA6}:100"):
            document = measured(lab, *more, destination)
            assert document["config"]["transmitted"] == 30
            assert 30 <= document["packets"]["matched"] < 40  # and neighbour discovery


def test_a_ping_that_sends_nothing_is_an_error(lab: Lab) -> None:
    with lab.source.program("ping", "echo 'ping: invalid number' >&2; exit 1"):
        done = lab.netweaver(*one_source(lab, "--traffic", "ping", "-d", f"{DATA6}:100"))
    assert "invalid number" in failure(done, 4)


# -- numbers of packets --


def captured_rate(table: Path) -> float:
    """Return how many packets a second the pif has seen, by the times in a CSV file."""
    with open(table, newline="") as file:
        times = [datetime.fromisoformat(row["time"][:26]) for row in csv.DictReader(file)]
    return (len(times) - 1) / (max(times) - min(times)).total_seconds()


@pytest.mark.parametrize("rate", [50, 900_000])
def test_the_achieved_rate_is_that_of_the_captured_packets(
    lab: Lab, rate: int, tmp_path: Path
) -> None:
    table = tmp_path / "packets.csv"
    document = measured(lab, "-c", "200", "--rate", str(rate), "--csv", str(table))
    achieved = document["config"]["traffic"]["achieved"]
    assert achieved == pytest.approx(captured_rate(table), rel=0.01)
    warnings = warnings_with(document, f"less than 95 % of --rate {rate}")
    assert len(warnings) == (achieved < 0.95 * rate)


def test_a_rate_that_the_source_does_not_reach(lab: Lab) -> None:
    document = measured(lab, "-c", "2000", "--rate", "900000")
    assert 100 < document["config"]["traffic"]["achieved"] < 500_000
    assert warnings_with(document, "less than 95 % of --rate 900000")


@pytest.mark.parametrize("pattern", ["syn", "ping"])
def test_a_packet_a_second(lab: Lab, pattern: str) -> None:
    document = measured(lab, "-c", "3", "--rate", "1", "--traffic", pattern)
    assert document["packets"]["matched"] == 3
    assert document["config"]["duration"] < 10


def test_fewer_packets_than_asked_for(lab: Lab) -> None:
    """hping3 takes the answers to another one from this source for its own."""
    other = subprocess.Popen(
        lab.source.command("hping3", "-q", "-S", "-i", "u2000", lab.destination),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        document = measured(lab, "-c", "300", "--rate", "100")
    finally:
        other.kill()
        other.wait()
    [warning] = warnings_with(document, "of 300")
    assert str(document["config"]["transmitted"]) in warning
    assert document["config"]["transmitted"] < 300


def test_a_load_that_counts_as_probes(lab: Lab) -> None:
    load = f"hping3 -q -S -i u500 {lab.destination}"
    assert "--load" in failure(lab.netweaver(*one_source(lab, *BRIEF, "--load", load)), 2)
    hidden_load = f"sh -c 'exec {load}'"
    document = measured(lab, *BRIEF, "--load", hidden_load)
    assert warnings_with(document, "--load")
    document = measured(lab, *BRIEF, "--load", f"{load} -p 9")
    assert not warnings_with(document, "--load")


# -- tags --

SWITCH_OFF_TAGGING = """
import array, fcntl, socket, struct, sys
value = array.array("I", [0x26, 0])  # ETHTOOL_SFLAGS, without ETH_FLAG_TXVLAN and _RXVLAN
address = value.buffer_info()[0]
request = struct.pack("16sP", sys.argv[1].encode(), address)
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8946, request)
"""


class TrunkLab(Lab):
    """A lab whose VM tags its frames itself, behind a vif that doesn't, as Xen's."""

    def _guest(self) -> None:
        self._link(self._dst, "trunk", self.hv.namespace, "vif5.0")
        self._link(self._dst, "eth0", self._dst, "plain", [f"{self.destination}/24"])
        log = self.directory / "guest.json"
        self._forward(self._dst, "trunk", "plain", "0.0.0.0", log, [])


def test_a_guest_that_is_a_vlan_trunk() -> None:
    with TrunkLab(tags=[7]) as lab:
        for interface in ("vif5.0", "eth0"):
            inside = ["ip", "netns", "exec", lab.hv.namespace]
            code = [sys.executable, "-c", SWITCH_OFF_TAGGING, interface]
            subprocess.run([*inside, *code], check=True)
        for direction in ("in", "both"):
            document = measured(lab, *BRIEF, "--direction", direction)
            assert document["packets"]["pif"] == document["packets"]["matched"] == 200


# -- dry runs --


def test_a_dry_run_finds_what_a_run_would_find(lab: Lab) -> None:
    cases = [
        (["--dry-run", "-i", "nope0"], 5, "nope0"),
        (["--dry-run", "--filter", "tcp and and"], 5, "syntax error"),
        (["--dry-run", "-d", "198.51.100.7"], 4, "unreachable"),
        (["--dry-run", "--save", "/proc/runs"], 2, "/proc/runs"),
    ]
    check_failures(lab, cases)
    assert lab.netweaver(*one_source(lab, "--dry-run")).returncode == 0


def test_a_dry_run_before_the_vm_is_started(lab: Lab) -> None:
    done = lab.netweaver(*one_source(lab, "--dry-run", "--vif", "vif9.9", "-i", "eth0"))
    assert done.returncode == 0
    assert "warning: vif9.9 doesn't exist yet" in done.stdout
    assert "everything needed was found" not in done.stdout


def test_a_dry_run_tries_programs(lab: Lab) -> None:
    refused = "echo 'you are not allowed' >&2; exit 1"
    with lab.source.program("hping3", refused):
        assert "not allowed" in failure(lab.netweaver(*one_source(lab, "--dry-run")), 4)
    script = f'case "$*" in *--help*) exec {TCPDUMP} "$@" ;; esac\n{refused}'
    with lab.hv.program("tcpdump", script):
        assert "not allowed" in failure(lab.netweaver(*one_source(lab, "--dry-run")), 5)
