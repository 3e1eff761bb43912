"""Real Xen: a Debian dom0 with netback, a guest behind a Linux bridge and one behind Open vSwitch's kernel datapath."""
from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import analyzed, failure, finished, report, sending
from lab import wait_until
from xen import NAME, VIFNAME, XenLab

pytestmark = [pytest.mark.lab, pytest.mark.hypervisor]
STEADY = "hping3 -c {count} -S -L 0 -Q -i u4000 {destination}"
ENDLESS = "hping3 -S -i u10000 {destination}"


@pytest.fixture
def xen(shared_xen: XenLab) -> Iterator[XenLab]:
    """The shared lab with its guest, whatever another test has done to that."""
    shared_xen.ensure_guest()
    yield shared_xen
    shared_xen.wait_clean(30)


@pytest.mark.parametrize(("toolstack", "number", "vif"), [("xe", 0, "vif{}.0"), ("xl", 1, VIFNAME)])
def test_both_toolstacks_and_both_switches(xen: XenLab, toolstack: str, number: int, vif: str) -> None:
    """Every count is what the source has sent and the guest has answered, by the guest's own counters."""
    before = xen.counters()["Tcp.OutRsts"]
    found = report(xen.netweaver(*xen.arguments(
        "-c", "300", "--source-command", STEADY, "--direction", "both", "--num", str(number), "--toolstack", toolstack,
        "-d", xen.destinations[number])))
    assert xen.counters()["Tcp.OutRsts"] - before == 300 == found["config"]["transmitted"]
    assert (found["config"]["pif"], found["config"]["vif"]) == (f"eth{number}", vif.format(xen.domain()))
    assert found["config"]["platform"]["switch"].split(" 3")[0] == ("bridge", "Open vSwitch")[number]
    for part, first, second in ((found, "pif", "vif"), (found["outbound"], "vif", "pif")):
        reordered = part["packets"].pop("reordered")     # Open vSwitch does that: each SYN is a new flow
        assert number or not reordered
        assert part["packets"] == {first: 300, second: 300, "matched": 300, "ambiguous": 0, "lost": 0, "undecided": 0,
                                   "duplicated": 0, f"{second}_only": 0}
        assert part["minimum"] > 0
    assert found["guest"]["packets"] == {"answered": 300, "unanswered": 0, "ambiguous": 0}
    assert found["guest"]["minimum"] > 0


def test_kinds_of_traffic(xen: XenLab) -> None:
    """Ping, fragments (three a packet) and UDP at once; each is what the guest has counted."""
    kinds = {"Icmp.InEchos": "ping -c {count} -i 0.01 -s 1400", "Ip.ReasmOKs": "ping -c {count} -i 0.02 -s 3000",
             "Udp.NoPorts": "hping3 -c {count} --udp -p 7 -d 64 -i u5000"}
    before = xen.counters()
    found = report(xen.netweaver(*xen.arguments(
        "-c", "150", "--source-command", " & ".join(f"{command} {{destination}}" for command in kinds.values())
        + " & wait", "--toolstack", "xl", "--direction", "both")))
    after = xen.counters()
    assert [after[name] - before[name] for name in kinds] == [300, 150, 150]         # a reassembled one is an echo, too
    assert found["packets"]["pif"] == found["packets"]["vif"] == found["packets"]["matched"] == 150 * (1 + 3 + 1)
    assert found["outbound"]["packets"]["lost"] == found["outbound"]["packets"]["pif_only"] == 0


def test_ipv6(xen: XenLab) -> None:
    before = xen.counters()["Icmp6InEchos"]
    found = report(xen.netweaver(*xen.arguments(
        "-c", "200", "--source-command", "ping -c {count} -i 0.01 {destination}", "--toolstack", "xl", "-d",
        xen.destination6)))
    assert xen.counters()["Icmp6InEchos"] - before == 200
    assert found["packets"]["pif"] == found["packets"]["vif"] == found["packets"]["matched"]
    assert 200 <= found["packets"]["pif"] < 210      # IPv6 asks for its neighbours by ICMP, too


def test_bulk_tcp_with_real_gro_and_tso(xen: XenLab, tmp_path: Path) -> None:
    """Both ways: aggregates of many segments pass as one, and all of what was sent is in packets that matched."""
    command = ("dd if=/dev/zero bs=65536 count=100 2>/dev/null | busybox nc {destination} 5001 & "
               "busybox nc {destination} 5002 </dev/null >/dev/null & wait")
    found = report(xen.netweaver(*xen.arguments(
        "--source-command", command, "--toolstack", "xl", "--direction", "both", "--save", str(tmp_path))))
    for part, field, port, size, direction in (
            (found, "destination_port", "5001", 100 * 65_536, "in"),
            (found["outbound"], "source_port", "5002", 300 * 65_536, "out")):
        assert part["packets"]["matched"] == part["packets"]["pif"] == part["packets"]["vif"] > 100
        analyzed("--pcaps", found["saved"], "--direction", direction, "--csv", str(tmp_path / "x.csv"))
        with open(tmp_path / "x.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row[field] == port]
        assert max(int(row["length"]) for row in rows) > 1500
        payload = [(int(row["sequence"]), int(row["length"]) - 52) for row in rows if int(row["length"]) > 60]
        first = min(sequence for sequence, _ in payload)
        assert max(sequence + length for sequence, length in payload) - first == size


def test_a_client_that_is_killed_leaves_nothing(xen: XenLab) -> None:
    process = xen.start(*xen.arguments("--source-command", ENDLESS, "--toolstack", "xl"))
    wait_until(lambda: sending(xen), "the traffic", 40)
    process.kill()
    process.communicate()
    xen.wait_clean(30)
    for path in (xen.directory / "client-tmp").iterdir():
        path.rmdir()


def test_a_guest_that_is_paused(xen: XenLab) -> None:
    """What the captures saw is true: it waits behind both of them, as the kernel's own account says.

    For 256 packets netback has buffers, and doesn't wait.
    """
    before = xen.counters()["Tcp.OutRsts"]
    process = xen.start(*xen.arguments("-c", "900", "--source-command", STEADY, "--toolstack", "xl", "--stages"))
    wait_until(lambda: sending(xen), "the traffic", 40)
    xen.hv.run("xl", "pause", NAME)
    try:
        subprocess.run(xen.source.command("ping", "-c", "40", "-i", "0.05", "-W", "1", xen.destination),
                       capture_output=True, check=False)
    finally:
        xen.hv.run("xl", "unpause", NAME)
    found = report(finished(process, 60))
    xen.wait_for_guest()
    assert found["packets"]["pif"] == found["packets"]["vif"] == found["packets"]["matched"] >= 900
    assert found["packets"]["lost"] == 0
    fates = found["after_vif"]
    assert sum(fates.values()) == found["packets"]["matched"]
    assert fates["delivered"] >= 900 == xen.counters()["Tcp.OutRsts"] - before
    assert found["stages"]["to_guest"]["maximum"] > 300_000 > found["maximum"]


def test_open_vswitchs_database_hangs(xen: XenLab) -> None:
    """The interfaces are found by the kernel's own account, and what is measured is true."""
    xen.hv.run("kill -STOP `pidof ovsdb-server`")
    try:
        found = report(xen.netweaver(*xen.arguments(
            "-c", "100", "--source-command", STEADY, "-i", "auto", "--num", "1", "--toolstack", "xl", "-d",
            xen.destinations[1])))
    finally:
        xen.hv.run("kill -CONT `pidof ovsdb-server`")
    assert (found["config"]["pif"], found["config"]["vif"]) == ("eth1", VIFNAME)
    assert found["packets"]["matched"] == 100


def save_and_restore(lab: XenLab) -> None:
    lab.hv.run(f"xl save {NAME} /var/tmp/saved && xl restore /var/tmp/saved; rm /var/tmp/saved")


def detach(lab: XenLab) -> None:
    lab.hv.run("xl", "network-detach", NAME, "0")


def rename(lab: XenLab) -> None:
    lab.hv.run("xl", "rename", NAME, "another")


@pytest.mark.parametrize(("act", "code", "words"), [
    (save_and_restore, 5, "the capture on vif{}.0 ended with status"),
    (rename, 4, "the VM was moved, restarted or unplugged during the run: measure again"),
    (detach, 5, "the capture on vif{}.0 ended with status"),
])
def test_what_happens_to_the_vm_meanwhile(xen: XenLab, act: Callable[[XenLab], None], code: int, words: str) -> None:
    """An error, and never the numbers of another VM."""
    domain = xen.domain()
    process = xen.start(*xen.arguments("-c", "600", "--source-command", ENDLESS.replace("-S", "-c {count} -S"),
                                       "--toolstack", "xl"))
    wait_until(lambda: sending(xen), "the traffic", 40)
    act(xen)
    assert words.format(domain) in failure(finished(process, 60), code)
    if act is rename:
        xen.hv.run("xl", "rename", "another", NAME)


def test_a_guest_that_is_restarted_and_does_not_run_yet(shared_xen: XenLab) -> None:
    """Its new interface has the old one's name, but no carrier, so that nothing can pass."""
    xen = shared_xen
    process = xen.start(*xen.arguments("--source-command", ENDLESS, "--num", "1", "-d", xen.destinations[1],
                                       "--toolstack", "xl"))
    wait_until(lambda: sending(xen), "the traffic", 40)
    xen.hv.run("xl", "destroy", NAME)
    xen.create_guest(paused=True)
    assert f"the capture on {VIFNAME} ended with status" in failure(finished(process, 60), 5)
    xen.source.run("ip", "neigh", "replace", xen.destination, "lladdr", "00:16:3e:85:00:64", "dev", "eth0")
    line = failure(xen.netweaver(*xen.arguments("-c", "20", "--source-command", STEADY, "--toolstack", "xl")), 6)
    vif = f"vif{xen.domain()}.0"
    assert f"(20 on eth0, 0 on {vif}): none is on {vif}" in line
    xen.source.run("ip", "neigh", "del", xen.destination, "dev", "eth0")
    xen.wait_clean(30)
