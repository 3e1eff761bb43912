"""Toolstacks: what they answer, the odd answers too, and the way from a vif to the physical interfaces behind it."""
from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import FAST, failure, report, run_code
from lab import TESTS, Lab, libvirt_domain, pool, vm, wait_until

import netweaver


class Shell:
    """A hypervisor's shell with the stand-ins first in its PATH; can be called as netweaver calls run_command."""

    def __init__(self, directory: Path, description: Mapping[str, Any]) -> None:
        self.environment = {**os.environ, "PATH": f"{TESTS / 'standins'}:{os.environ['PATH']}",
                            "POOL": str(directory / "pool.json"), "LIBVIRT_DEFAULT_URI": "test:///default"}
        (directory / "pool.json").write_text(json.dumps(description))

    def __call__(self, command: str, hint: str = "") -> str:
        done = subprocess.run(["sh", "-c", command], env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise netweaver.RemoteCommandError(f"{netweaver.last_line(done.stderr)} ({hint})")
        return done.stdout


UUID = "0e3f6f1c-6c59-4b0e-9d0b-2f1d6a3c8b77"


# -- names --

@pytest.mark.parametrize(("toolstack", "name", "number", "found"), [
    ("xl", "web 1", 0, "vif5.0"), ("xl", "-n", 2, "vif6.2"), ("qm", "web 1", 0, "tap105i0"),
    ("qm", "106", 1, "tap106i1"), ("qm", "107", 0, "tap109i0"), ("xe", "web 1", 1, "vif5.1"),
    *((toolstack, "twin", 0, found) for toolstack, found in (("xe", "vif8.0"), ("xl", "vif8.0"), ("qm", "tap110i0"))),
    ("xe", UUID, 0, "vif8.0"), ("xl", UUID, 2, "vif8.2"), ("xl", "named", 0, "web1net"), ("xl", "named", 1, "vif9.1"),
])
def test_a_vm_that_runs(tmp_path: Path, toolstack: str, name: str, number: int, found: str) -> None:
    """On Proxmox a name comes before a VMID; of namesakes the running one is meant."""
    run = Shell(tmp_path, pool(vm("web 1", 5, vmid="105"), vm("-n", 6, vmid="106"), vm("x", -1, vmid="107"),
                               vm("107", 7, vmid="109"), vm("twin", -1, vmid="108"),
                               vm("twin", 8, vmid="110", uuid=UUID), vm("named", 9, vifname0="web1net")))
    assert netweaver.TOOLSTACKS[toolstack](run, name, number) == found


@pytest.mark.parametrize(("toolstack", "name", "fault", "words"), [
    ("xl", "none", None, "Can't get domid of domain name 'none'"), ("xl", "none", None, "xl list shows them"),
    ("xl", "halted", None, "it isn't running, or has another name"),
    ("xl", "Domain-0", None, "'Domain-0' is the control domain"), ("xl", "web1", "down", "cannot init xl context"),
    ("qm", "none", None, "there is no VM 'none' on this host (qm list shows them"),
    ("qm", "halted", None, "the VM 'halted' (VMID 106) is stopped: start it first (qm start 106)"),
    ("qm", "twins", None, "2 VMs have the name 'twins' (VMIDs 107, 108): give the VMID as -n"),
    ("qm", "web1", "down", "Connection refused"),
    ("virsh", "none", None, "error: failed to get domain 'none' (virsh list --all shows the names"),
    ("virsh", "1", None, "error: failed to get domain '1'"),
    ("xe", "web1", "starting", "still initialising. Please wait. (is xapi up there?"),
])
def test_odd_answers(tmp_path: Path, toolstack: str, name: str, fault: str | None, words: str) -> None:
    run = Shell(tmp_path, pool(vm("web1", vmid="105"), vm("halted", -1, vmid="106"), vm("twins", 7, vmid="107"),
                               vm("twins", 8, vmid="108"), vm("twin", -1, vmid="109"), vm("Domain-0", 0), fault=fault))
    with pytest.raises(netweaver.RemoteCommandError) as caught:
        netweaver.TOOLSTACKS[toolstack](run, name, 0)
    assert words in str(caught.value)


@pytest.mark.parametrize(("answer", "words"), [
    ("\n\n", "there is no VM with the name-label 'web1'"), ("-1\n\n", "is not running"),
    ("-1,-1\n\n", "is not running"), ("5,6\n5,6\n", "2 VMs have the name-label 'web1' (dom-ids 5,6)"),
    ("5,6\n", "2 VMs have"), ("5\n\n", "runs on another host of the pool"), ("5,-1\n\n", "runs on another host"),
    ("<not in database>\n\n", "which are no dom-ids"),
])
def test_xe_answers_that_are_no_domain(answer: str, words: str) -> None:
    with pytest.raises(netweaver.RemoteCommandError) as caught:
        netweaver.parse_xe_dom_id(answer, "web1")
    assert words in str(caught.value)


@pytest.mark.parametrize("answer", ["5\n5\n", "5\n", "7,5,5\n5\n", "5,-1\n5\n", "-1,5\n"])
def test_xe_answers_that_are_a_domain(answer: str) -> None:
    assert netweaver.parse_xe_dom_id(answer, "web1") == 5


HOSTILE = ["", " " * 64_000, "9" * 5000, "²" * 500, "1 " * 30_000, ", " * 30_000, "\\ " * 30_000, "\t\n" * 9999,
           "-1," * 9999, "[" * 30_000, '{"data":' * 9999, "1: a@b: \\ link/ \\ " * 3000, "ovs", "ovs ",
           "ovs-interfaces", "\x00\x1b[2J",
           "ovs-interfaces {\"data\":[1]}", 'ovs-interfaces {"data":[["a","patch",["map",[["peer",{}]]]]]}',
           "é" * 999, "5000000000000 web1 running 1 1 1", "100 web1 running 2048 32.00 " + " " * 64_000,
           "free 1 2 3 " + "9" * 5000,
           "vnet0\n" * 9999, "cpus ²", "load 1e999 nan inf", "link 1: " + "a" * 64_000, "1 packet captured " * 999]


def test_hostile_answers_take_no_time_and_are_no_more_than_errors() -> None:
    """Every parser of an answer raises NetWeaverError alone; mixtures of odd answers, cut anywhere."""
    parsers: list[Any] = [
        lambda text: netweaver.parse_xe_dom_id(text, "web1"),
        lambda text: netweaver.parse_virsh_domiflist(text, "web1", 0),
        lambda text: netweaver.parse_qm_list(text, "web1"),
        lambda text: netweaver.Links(text).uplinks("vif5.0"), lambda text: netweaver.Facts(text).platform(["a"], "a"),
        lambda text: netweaver.tcpdump_counts(text.splitlines()), netweaver.transmitted,
        *(lambda text, toolstack=toolstack: toolstack(lambda command, hint="": text, "web1", 0)
          for toolstack in netweaver.TOOLSTACKS.values()),
        lambda text: netweaver.bridge_uplinks(lambda command, hint="": text, "vif5.0", netweaver.Links(text))]
    chance = random.Random(1)
    texts = HOSTILE + ["".join(chance.choice(HOSTILE)[:chance.randrange(3000)] for _ in range(4)) for _ in range(200)]
    for parse in parsers:
        begun = time.process_time()
        for text in texts:
            try:
                json.dumps(parse(text), default=str, allow_nan=False)
            except netweaver.NetWeaverError as error:
                assert len(str(error)) < 200_000
        assert time.process_time() - begun < 10      # where time grows with the square it is minutes


def test_open_vswitch_is_stopped(tmp_path: Path) -> None:
    """Its tools are there, and answer nothing but an error; a bridge's uplink is found all the same."""
    (tmp_path / "ovs-vsctl").write_text("#!/bin/sh\necho 'database connection failed (No such file)' >&2; exit 1\n")
    (tmp_path / "ip").write_text(f"#!/bin/sh\nprintf '%s' '{BRIDGED}'\n")
    for name in ("ovs-vsctl", "ip"):
        (tmp_path / name).chmod(0o755)
    run = Shell(tmp_path, {})
    run.environment["PATH"] = f"{tmp_path}:{run.environment['PATH']}"
    links = netweaver.Links(run(netweaver.LINKS_COMMAND))
    assert netweaver.bridge_uplinks(run, "vif5.0", links) == (["eth0"], False)


def test_a_proxmox_host_without_vms(tmp_path: Path) -> None:
    with pytest.raises(netweaver.RemoteCommandError, match="there is no VM 'x'"):
        netweaver.qm_vif(Shell(tmp_path, pool()), "x", 0)


def test_the_real_virsh(tmp_path: Path) -> None:
    run = Shell(tmp_path, {})
    assert re.fullmatch(r"testnet\d+", netweaver.virsh_vif(run, "test", 0))
    (tmp_path / "node.xml").write_text("<node>" + libvirt_domain("off", "", running=False)
                                       + libvirt_domain("two words", "lan4", "lan7")
                                       + libvirt_domain("1", "lan8") + libvirt_domain("2", "lan9", running=False)
                                       + "</node>")
    run.environment["LIBVIRT_DEFAULT_URI"] = f"test://{tmp_path / 'node.xml'}"
    assert netweaver.virsh_vif(run, "two words", 1) == "lan7"
    assert netweaver.virsh_vif(run, "1", 0) == "lan8"       # which is also the id of another one
    for name, number, words in (("two words", 2, "has 2 interfaces, and none of number 2"), ("off", 0, "is shut off"),
                                ("2", 0, "the domain '2' is shut off")):
        with pytest.raises(netweaver.RemoteCommandError, match=words):
            netweaver.virsh_vif(run, name, number)
    run.environment["LIBVIRT_DEFAULT_URI"] = f"test://{tmp_path / 'none.xml'}"
    with pytest.raises(netweaver.RemoteCommandError, match="systemctl status libvirtd"):
        netweaver.virsh_vif(run, "off", 0)


def test_an_old_virsh_prints_its_header_in_spite_of_q() -> None:
    old = ("Interface  Type       Source     Model       MAC\n-------------------------------------------------------\n"
           "vnet0      network    default    virtio      52:54:00:01:1d:d0\n")
    assert netweaver.parse_virsh_domiflist(old, "x", 0) == "vnet0"
    with pytest.raises(netweaver.RemoteCommandError, match="interface 0 of the domain 'x' has no device"):
        netweaver.parse_virsh_domiflist(old.replace("vnet0", "-    "), "x", 0)


# -- the bridge behind a vif --

def link(number: int, name: str, kind: str = "", master: str = "") -> str:
    """A line as `ip -o -d link` prints it."""
    details = f"\\    {kind} addrgenmode eui64" if kind else "addrgenmode eui64"
    return (f"{number}: {name}: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 qdisc noqueue "
            f"{f'master {master} ' if master else ''}state UP mode DEFAULT group default qlen 1000\\    link/ether "
            f"02:00:00:00:00:01 brd ff:ff:ff:ff:ff:ff promiscuity 1  minmtu 68 maxmtu 65535 {details}\n")


BRIDGED = link(1, "eth0", master="br0") + link(2, "br0", "bridge forward_delay 1500") + link(3, "vif5.0", master="br0")
PROXMOX = (link(1, "eno1", master="bond0") + link(2, "eno2", master="bond0") + link(3, "bond0", "bond mode 802.3ad")
           + link(4, "bond0.20@bond0", "vlan protocol 802.1Q id 20 <REORDER_HDR>", "vmbr0")
           + link(5, "vmbr0", "bridge forward_delay 0") + link(6, "tap100i0", "tun type tap", "fwbr100i0")
           + link(7, "fwbr100i0", "bridge forward_delay 0") + link(8, "fwpr100p0@fwln100i0", "veth", "vmbr0")
           + link(9, "fwln100i0@fwpr100p0", "veth", "fwbr100i0") + link(10, "tap101i0", "tun type tap", "vmbr0")
           + link(11, "veth102i0@if2", "veth", "vmbr0"))
ROUTED_TUNNEL = (link(1, "eth0") + link(2, "vxlan9", "vxlan id 9 remote 127.0.0.1 srcport 0 0 dstport 4789", "br0")
                 + link(3, "br0", "bridge forward_delay 1500") + link(4, "vnet0", "tun type tap", "br0"))
TUNNEL = ROUTED_TUNNEL.replace("srcport", "dev eth0.5 srcport") + link(5, "eth0.5@eth0", "vlan protocol 802.1Q id 5")
OPEN_VSWITCH = (
    link(1, "eth0", "openvswitch_slave", "ovs-system") + link(2, "ovs-system", "openvswitch")
    + link(3, "br-ex", "openvswitch") + link(4, "qvoabcdef01-23@qvbabcdef01-23", "veth", "ovs-system")
    + link(5, "qvbabcdef01-23@qvoabcdef01-23", "veth", "qbrabcdef01-23") + link(6, "qbrabcdef01-23", "bridge")
    + link(7, "tapabcdef01-23", "tun type tap", "qbrabcdef01-23") + link(8, "br-int", "openvswitch")
    + "ovs br-ex br-ex eth0 phy-br-ex\novs br-int br-int int-br-ex qvoabcdef01-23\n"
    + 'ovs-interfaces {"data":[["eth0","",["map",[]]],["phy-br-ex","patch",["map",[["peer","int-br-ex"]]]],'
      '["int-br-ex","patch",["map",[["peer","phy-br-ex"]]]],["qvoabcdef01-23","",["map",[]]]],'
      '"headings":["name","type","options"]}\n')
# XenServer's: a bond is no device, and a VLAN a bridge within a bridge.
XENSERVER = (link(1, "eth0", "openvswitch_slave", "ovs-system") + link(2, "eth1", "openvswitch_slave", "ovs-system")
             + link(3, "ovs-system", "openvswitch") + link(4, "xapi1", "openvswitch") + link(5, "xapi2", "openvswitch")
             + link(6, "vif5.0", "", "ovs-system") + link(7, "vif6.1", "", "ovs-system")
             + "ovs xapi1 eth0 eth1 vif6.1\novs xapi1 vif5.0\novs-interfaces {\"data\":[]}\n")
LINUX_BRIDGES = (link(1, "eth0", master="bond0") + link(2, "eth1", master="bond0")
                 + link(3, "bond0", "bond mode active-backup", "xapi1") + link(4, "xapi1", "bridge forward_delay 0")
                 + link(5, "bond0.8@bond0", "vlan protocol 802.1Q id 8", "xapi2")
                 + link(6, "xapi2", "bridge forward_delay 0") + link(7, "vif5.0", master="xapi2"))


@pytest.mark.parametrize(("answer", "vif", "devices", "overlay"), [
    (BRIDGED, "vif5.0", ["eth0"], False), (PROXMOX, "tap100i0", ["eno1", "eno2"], False),
    (PROXMOX, "tap101i0", ["eno1", "eno2"], False), (TUNNEL, "vnet0", ["eth0"], True),
    (ROUTED_TUNNEL, "vnet0", ["lo"], True), (OPEN_VSWITCH, "tapabcdef01-23", ["eth0"], False),
    (XENSERVER, "vif5.0", ["eth0", "eth1"], False),
    (XENSERVER, "vif6.1", ["eth0", "eth1"], False), (LINUX_BRIDGES, "vif5.0", ["eth0", "eth1"], False),
])
def test_the_uplinks_of_a_bridge(answer: str, vif: str, devices: list[str], overlay: bool) -> None:
    def run(command: str, hint: str = "") -> str:
        return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout

    assert netweaver.bridge_uplinks(run, vif, netweaver.Links(answer)) == (devices, overlay)


@pytest.mark.parametrize(("vif", "words"), [
    ("vif9.0", "there is no such interface"), ("eth1", "it is in no bridge"),
    ("vif5.1", "its bridge br1 has no physical"),
])
def test_a_bridge_without_an_uplink(vif: str, words: str) -> None:
    answer = BRIDGED + link(4, "eth1") + link(5, "vif5.1", master="br1") + link(6, "tap5.1", "tun", master="br1")
    with pytest.raises(netweaver.RemoteCommandError) as caught:
        netweaver.bridge_uplinks(lambda command, hint="": answer, vif, netweaver.Links(answer))
    assert words in str(caught.value)
    assert "(there are: br0, eth0, eth1, tap5.1, vif5.0, vif5.1)" in str(caught.value)


# -- in the lab --

@pytest.fixture
def virtual_pool(lab: Lab) -> Iterator[Lab]:
    before = (lab.directory / "pool.json").read_text()
    yield lab
    (lab.directory / "pool.json").write_text(before)


@pytest.mark.lab
@pytest.mark.parametrize("toolstack", ["xe", "xl", "virsh"])
def test_auto_finds_the_pif(lab: Lab, toolstack: str) -> None:
    found = report(lab.netweaver(*lab.arguments("-c", "500", "--source-command", FAST, "-i", "auto", "--toolstack",
                                                toolstack, source=lab.source.address)))
    assert (found["config"]["pif"], found["config"]["vif"]) == ("eth0", "vif5.0")
    assert (found["config"]["toolstack"], found["config"]["overlay"]) == (toolstack, False)
    assert found["packets"]["matched"] == 500


@pytest.mark.parametrize(("vms", "there", "found"), [
    ([vm()], ["xe", "qm", "xl"], "xe"), ([vm("web1", vmid="105")], ["qm", "xl"], "qm"), ([vm("web1")], ["xl"], "xl"),
    ([vm("web1", 5), vm("web1", 6)], ["xe", "xl"], None), ([], ["xl", "qm"], None), ([], [], None)])
def test_the_toolstack_is_found(tmp_path: Path, vms: list[dict[str, str]], there: list[str], found: str | None) -> None:
    """The first that is there and knows the VM; else the error of the first that is there.

    What xe says of a VM that it knows is the last word, whatever xl would make of the name.
    """
    run, name = Shell(tmp_path, pool(*vms)), vms[0]["name-label"] if vms else "web1"
    (tmp_path / "bin").mkdir()
    for tool in (*there, "xenstore-read"):
        (tmp_path / "bin" / tool).symlink_to(TESTS / "standins" / tool)
    for tool, program in (("sh", shutil.which("sh")), ("env", shutil.which("env")), ("python3", sys.executable)):
        (tmp_path / "bin" / tool).symlink_to(os.path.realpath(str(program)))
    run.environment["PATH"] = str(tmp_path / "bin")
    if found:
        assert netweaver.find_toolstack(run, name, 0)[0] == found
        return
    words = {"xe": "2 VMs have the name-label", "xl": "there is no VM 'web1' on this host (qm list",
             "": "none of xe, qm, virsh, xl is there: name the VM's interface with --vif"}
    with pytest.raises(netweaver.RemoteCommandError) as caught:
        netweaver.find_toolstack(run, name, 0)
    assert words[there[0] if there else ""] in str(caught.value)


@pytest.mark.lab
def test_nothing_leads_to_the_vm_but_eth0_is_there(own_lab: Lab) -> None:
    """As with a switch that isn't known: then it is measured from eth0, unless what leads there was asked for."""
    own_lab.hv.run("sh", "-ec", "ip link set vif5.0 nomaster; sysctl -qw net.ipv4.ip_forward=1 "
                                "net.ipv4.conf.all.proxy_arp=1; ip addr add 10.83.1.250/24 dev eth0; "
                                f"ip route add {own_lab.destination} dev vif5.0; ip link set eth0 nomaster")
    wait_until(lambda: own_lab.source.answered_by(own_lab.destination), "an answer by the new way")
    found = report(own_lab.netweaver(*own_lab.arguments("-c", "300", "--source-command", FAST)))
    assert (found["config"]["pif"], found["config"]["toolstack"]) == ("eth0", "xe")
    assert found["packets"]["pif"] == found["packets"]["matched"] >= 295
    assert "it is in no bridge" in failure(own_lab.netweaver(*own_lab.arguments("-i", "auto")), 4)


@pytest.mark.lab
@pytest.mark.parametrize("firewall", [False, True])
def test_proxmox_by_its_stable_names(own_lab: Lab, firewall: bool) -> None:
    """With its firewall there is a bridge more, and a pair of virtual cables in between."""
    lab = own_lab
    lab.hv.run("ip", "link", "set", "vif5.0", "name", "tap105i0")
    if firewall:
        lab.hv.run("sh", "-ec", """ip link add fwbr105i0 type bridge
            ip link add fwpr105p0 type veth peer name fwln105i0
            ip link set fwpr105p0 master xenbr0 up
            ip link set fwln105i0 master fwbr105i0 up
            ip link set tap105i0 master fwbr105i0
            ip link set fwbr105i0 up""")
    found = report(lab.netweaver(*lab.arguments("-c", "500", "--source-command", FAST, "-i", "auto", "--toolstack",
                                                "qm")))
    assert (found["config"]["pif"], found["config"]["vif"]) == ("eth0", "tap105i0")
    assert found["packets"]["matched"] == 500


@pytest.mark.lab
@pytest.mark.parametrize(("arguments", "words"), [
    (("--toolstack", "xl", "-n", "none"), "maybe this domain does not exist. (it isn't running, or has another name"),
    (("--toolstack", "virsh", "-n", "halted"), "the domain 'halted' is shut off"),
    (("--toolstack", "virsh", "--num", "5"), "has 2 interfaces, and none of number 5"),
    (("--toolstack", "qm", "-n", "halted"), "is stopped: start it first (qm start 106)"),
    (("-i", "auto", "--num", "1"), "behind vif5.1: there is no such interface: give it with -i (there are: eth0, "),
    (("-i", "auto", "--vif", "mgmt0"), "it is in no bridge: give it with -i (there are: "),
])
def test_a_look_up_that_fails(lab: Lab, arguments: tuple[str, ...], words: str) -> None:
    line = failure(lab.netweaver(*lab.arguments(*arguments), seconds=15), 4)
    assert line.startswith(f"netweaver: error: root@{lab.hv.address}: ")
    assert words in line


@pytest.mark.lab
def test_a_toolstack_that_is_not_there(lab: Lab) -> None:
    (lab.hv.directory / "bin" / "xl").rename(lab.hv.directory / "bin" / "xl-away")
    try:
        line = failure(lab.netweaver(*lab.arguments("--toolstack", "xl"), seconds=15), 4)
        assert "--toolstack says which one this host has" in line
    finally:
        (lab.hv.directory / "bin" / "xl-away").rename(lab.hv.directory / "bin" / "xl")


@pytest.mark.lab
def test_a_vm_that_restarts_meanwhile(virtual_pool: Lab) -> None:
    lab = virtual_pool
    process = lab.start(*lab.arguments("-c", "1500", "--source-command", FAST))
    wait_until(lambda: any("hping3" in line for line in lab.source.processes().values()), "the traffic")
    lab.set_pool(pool(vm(dom_id=6)))
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 4
    assert out == ""
    assert "vif5.0 is vif6.0 now: the VM was moved, restarted or unplugged during the run: measure again" in errors


@pytest.mark.lab
def test_a_vm_that_is_halted_meanwhile(virtual_pool: Lab) -> None:
    lab = virtual_pool
    process = lab.start(*lab.arguments("-c", "1500", "--source-command", FAST))
    wait_until(lambda: any("hping3" in line for line in lab.source.processes().values()), "the traffic")
    lab.set_pool(pool(vm(dom_id=-1)))
    assert "is not running (halted or suspended)" in process.communicate(timeout=30)[1]
    assert process.returncode == 4


@pytest.mark.lab
def test_the_readmes_example_of_another_toolstack(lab: Lab, tmp_path: Path) -> None:
    """It asks Incus; here a stand-in answers as `incus config get` does."""
    readme = (TESTS.parent / "README.md").read_text()
    [example] = [code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "determine_vif" in code]
    incus = lab.hv.directory / "bin" / "incus"
    incus.write_text('#!/bin/sh\n[ "$*" = "config get web1 volatile.eth0.host_name" ] && echo vif5.0\n')
    incus.chmod(0o755)
    try:
        for theirs, ours in (("192.0.2.1", lab.source.address), ("192.0.2.2", lab.destination),
                             ("hv.example.org", lab.hv.address), ("/root/.ssh/id_ed25519", str(lab.key)),
                             ("-c 1000", "-c 20")):
            assert theirs in example
            example = example.replace(theirs, ours)
        found = json.loads(run_code(lab, example))
        assert found["config"]["vif"] == "vif5.0"
        assert found["packets"]["matched"] == 20
    finally:
        incus.unlink()
