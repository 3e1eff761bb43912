"""Real Xen: a dom0, and a guest behind a Linux bridge and the kernel's Open vSwitch."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import analyzed, failure, finished, report, sending
from laboratory import wait_until
from xen import NAME, VIFNAME, XenLab

pytestmark = [pytest.mark.lab, pytest.mark.hypervisor]
STEADY = "hping3 -c {count} -S -L 0 -Q -i u4000 {destination}"
SLOW = "hping3 -c {count} -S -L 0 -Q -i u10000 {destination}"  # for as long as xl takes to pause
ENDLESS = "hping3 -S -i u10000 {destination}"
BOOT_SECONDS = 40  # emulated machines are slow
XL = ("--toolstack", "xl")


@pytest.fixture
def xen(shared_xen: XenLab) -> Iterator[XenLab]:
    """Return the shared lab with its guest, whatever another test has done to that."""
    shared_xen.ensure_guest()
    yield shared_xen
    shared_xen.wait_clean(30)


def measure(xen: XenLab, count: int, command: str, *options: str) -> dict[str, Any]:
    """Return the document of a run whose sources send `count` packets, or of each kind as many."""
    arguments = xen.arguments("-c", str(count), "--source-command", command, *options)
    return report(xen.netweaver(*arguments))


def wait_for_traffic(xen: XenLab) -> None:
    wait_until(lambda: sending(xen), "the traffic", BOOT_SECONDS)


def all_of(count: int, second: str) -> dict[str, int]:
    """Return a direction's packets if all arrived at the second point."""
    return {
        "pif": count,
        "vif": count,
        "matched": count,
        "ambiguous": 0,
        "lost": 0,
        "undecided": 0,
        "duplicated": 0,
        f"{second}_only": 0,
    }


@pytest.mark.parametrize(
    ("toolstack", "number", "vif", "switch"),
    [("xe", 0, "vif{}.0", "bridge"), ("xl", 1, VIFNAME, "Open vSwitch")],
)
def test_toolstacks_and_switches(
    xen: XenLab, toolstack: str, number: int, vif: str, switch: str
) -> None:
    """Every count is what the source has sent, and what the guest's own counters show."""
    before = xen.counters()["Tcp.OutRsts"]
    options = ["--direction", "both", "--toolstack", toolstack]
    options += ["--num", str(number), "-d", xen.destinations[number]]
    document = measure(xen, 300, STEADY, *options)
    config = document["config"]
    assert xen.counters()["Tcp.OutRsts"] - before == 300 == config["transmitted"]
    assert config["pif"] == f"eth{number}"
    assert config["vif"] == vif.format(xen.domain())
    assert config["platform"]["switch"].startswith(switch)
    for part, second in ((document, "vif"), (document["outbound"], "pif")):
        packets = dict(part["packets"])
        reordered = packets.pop("reordered")
        if switch == "bridge":  # Open vSwitch does that: each SYN is a new flow
            assert reordered == 0
        assert packets == all_of(300, second)
        assert part["minimum"] > 0
    guest = document["guest"]
    assert guest["packets"]["answered"] == 300
    assert sum(guest["packets"].values()) == 300
    assert guest["minimum"] > 0


def test_queue_of_the_vif(xen: XenLab) -> None:
    platform = measure(xen, 20, STEADY, *XL)["config"]["platform"]
    shown = xen.hv.run("ip", "-d", "link", "show", f"vif{xen.domain()}.0").split()
    queue = platform["vif"]
    assert queue["qdisc"] == shown[shown.index("qdisc") + 1]
    assert queue["queue_length"] == int(shown[shown.index("qlen") + 1])
    assert set(queue["before"]) == set(queue["after"]) == {"rx_dropped", "tx_dropped"}


KINDS = {  # by the counter of the guest
    "Icmp.InEchos": "ping -c {count} -i 0.01 -s 1400",
    "Ip.ReasmOKs": "ping -c {count} -i 0.02 -s 3000",
    # Without -q hping3 looks up the name of what answers "port unreachable", and can hang in that.
    "Udp.NoPorts": "hping3 -q -c {count} --udp -p 7 -d 64 -i u5000",
}


def test_kinds_of_traffic(xen: XenLab) -> None:
    """Ping, fragments (three a packet) and UDP at once; the guest counts all of them."""
    before = xen.counters()
    command = " & ".join(f"{kind} {{destination}}" for kind in KINDS.values())
    document = measure(xen, 150, f"{command} & wait", *XL, "--direction", "both")
    after = xen.counters()
    counted = {name: after[name] - before[name] for name in KINDS}
    fragmented = counted["Ip.ReasmOKs"]
    whole = counted["Icmp.InEchos"] - fragmented  # a reassembled packet is an echo, too
    datagrams = counted["Udp.NoPorts"]
    assert whole == fragmented == 150
    assert datagrams > 0
    packets = document["packets"]
    assert packets["pif"] == packets["vif"] == packets["matched"]
    assert packets["matched"] == whole + 3 * fragmented + datagrams
    outbound = document["outbound"]["packets"]
    assert outbound["lost"] == outbound["pif_only"] == 0


def test_ipv6(xen: XenLab) -> None:
    before = xen.counters()["Icmp6InEchos"]
    command = "ping -c {count} -i 0.01 {destination}"
    packets = measure(xen, 200, command, *XL, "-d", xen.destination6)["packets"]
    assert xen.counters()["Icmp6InEchos"] - before == 200
    assert packets["pif"] == packets["vif"] == packets["matched"]
    assert 200 <= packets["pif"] < 210  # IPv6 asks for its neighbours by ICMP, too


BULK = (
    "dd if=/dev/zero bs=65536 count=100 2>/dev/null | busybox nc {destination} 5001 & "
    "busybox nc {destination} 5002 </dev/null >/dev/null & wait"
)


def rows_of(run: str, direction: str, field: str, port: str, path: Path) -> list[dict[str, str]]:
    """Return the rows of a saved run's packets with a port."""
    analyzed("--pcaps", run, "--direction", direction, "--csv", str(path))
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if row[field] == port]


def payload_size(rows: list[dict[str, str]]) -> int:
    """Return the bytes between the first and the last sequence number, which may begin again at 0.

    A row whose packet has no payload doesn't count.
    """
    origin = int(rows[0]["sequence"])
    segments = []
    for row in rows:
        length = int(row["length"])
        if length > 60:
            distance = (int(row["sequence"]) - origin + 2**31) % 2**32 - 2**31
            segments.append((distance, length - 52))
    first = min(start for start, _ in segments)
    return max(start + size for start, size in segments) - first


def test_bulk_tcp_with_real_gro_and_tso(xen: XenLab, tmp_path: Path) -> None:
    """Aggregates of many segments pass as one; all that was sent is in packets that matched."""
    options = (*XL, "--direction", "both", "--save", str(tmp_path))
    document = report(xen.netweaver(*xen.arguments("--source-command", BULK, *options)))
    for part in (document, document["outbound"]):
        packets = part["packets"]
        assert packets["matched"] == packets["pif"] == packets["vif"] > 100
    run = document["saved"]
    received = rows_of(run, "in", "destination_port", "5001", tmp_path / "in.csv")
    sent = rows_of(run, "out", "source_port", "5002", tmp_path / "out.csv")
    for rows, blocks in ((received, 100), (sent, 300)):
        assert max(int(row["length"]) for row in rows) > 1500
        assert payload_size(rows) == blocks * 65_536


def test_a_client_that_is_killed_leaves_nothing(xen: XenLab) -> None:
    process = xen.start(*xen.arguments("--source-command", ENDLESS, *XL))
    wait_for_traffic(xen)
    process.kill()
    process.communicate()
    xen.wait_clean(30)
    for path in (xen.directory / "client-tmp").iterdir():
        path.rmdir()


def test_paused_guest(xen: XenLab) -> None:
    """Its packets wait behind both captures, as the kernel's trace shows.

    For 256 packets netback has buffers, and doesn't wait.
    """
    before = xen.counters()["Tcp.OutRsts"]
    process = xen.start(*xen.arguments("-c", "900", "--source-command", SLOW, *XL, "--stages"))
    wait_for_traffic(xen)
    xen.hv.run("xl", "pause", NAME)
    try:
        fill = ("ping", "-c", "250", "-i", "0.01", "-W", "1", xen.destination)
        subprocess.run(xen.source.command(*fill), capture_output=True, check=False)
    finally:
        xen.hv.run("xl", "unpause", NAME)
    document = report(finished(process, 60))
    xen.wait_for_guest()
    packets = document["packets"]
    assert packets["pif"] == packets["vif"] == packets["matched"] >= 900
    assert packets["lost"] == 0
    fates = document["after_vif"]
    # The fate of a packet is unknown where dom0 was held up after its stamp.
    assert 0.99 * packets["matched"] <= sum(fates.values()) <= packets["matched"]
    assert fates["delivered"] >= 900
    assert xen.counters()["Tcp.OutRsts"] - before == 900
    assert document["stages"]["to_guest"]["maximum"] > 300_000 > document["maximum"]


def test_database_of_open_vswitch_hangs(xen: XenLab) -> None:
    """The interfaces are found by what the kernel shows, and the numbers are true."""
    xen.hv.run("kill -STOP `pidof ovsdb-server`")
    try:
        options = (*XL, "-i", "auto", "--num", "1", "-d", xen.destinations[1])
        document = measure(xen, 100, STEADY, *options)
    finally:
        xen.hv.run("kill -CONT `pidof ovsdb-server`")
    assert document["config"]["pif"] == "eth1"
    assert document["config"]["vif"] == VIFNAME
    assert document["packets"]["matched"] == 100


def save_and_restore(xen: XenLab) -> None:
    xen.hv.run(f"xl save {NAME} /var/tmp/saved && xl restore /var/tmp/saved; rm /var/tmp/saved")


def detach(xen: XenLab) -> None:
    xen.hv.run("xl", "network-detach", NAME, "0")


def rename(xen: XenLab) -> None:
    xen.hv.run("xl", "rename", NAME, "another")


@pytest.mark.parametrize(
    ("act", "seconds", "code", "words"),
    [
        (save_and_restore, 60, 5, "the capture on vif{}.0 ended with status"),
        (rename, 6, 4, "VM moved, restarted or unplugged during the run"),
        (detach, 60, 5, "the capture on vif{}.0 ended with status"),
    ],
)
def test_guest_that_changes_during_the_run(
    xen: XenLab, act: Callable[[XenLab], None], seconds: int, code: int, words: str
) -> None:
    """An error, and never the numbers of another VM.

    The traffic goes on for so many seconds: until the interface has gone, or the name has changed.
    """
    domain = xen.domain()
    command = f"{ENDLESS} -c {{count}}"
    count = str(100 * seconds)
    process = xen.start(*xen.arguments("-c", count, "--source-command", command, *XL))
    wait_for_traffic(xen)
    act(xen)
    assert words.format(domain) in failure(finished(process, 60), code)
    if act is rename:
        xen.hv.run("xl", "rename", "another", NAME)


def test_restarted_guest_that_does_not_run_yet(shared_xen: XenLab) -> None:
    """Its new interface has the old one's name, but no carrier, so that nothing can pass."""
    xen = shared_xen
    options = (*XL, "--num", "1", "-d", xen.destinations[1])
    process = xen.start(*xen.arguments("--source-command", ENDLESS, *options))
    wait_for_traffic(xen)
    xen.hv.run("xl", "destroy", NAME)
    xen.create_guest(paused=True)
    assert f"the capture on {VIFNAME} ended with status" in failure(finished(process, 60), 5)
    neighbour = [xen.destination, "lladdr", "00:16:3e:85:00:64", "dev", "eth0"]
    xen.source.run("ip", "neigh", "replace", *neighbour)
    try:
        arguments = xen.arguments("-c", "20", "--source-command", STEADY, *XL)
        line = failure(xen.netweaver(*arguments), 6)
    finally:
        xen.source.run("ip", "neigh", "del", xen.destination, "dev", "eth0")
    assert f"20 on eth0, 0 on vif{xen.domain()}.0" in line
    xen.wait_clean(30)
