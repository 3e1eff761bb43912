"""Toolstacks and uplinks: from the command line to the interfaces that are captured."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from helpers import FAST, analyzed, failure, report, run_code
from laboratory import OUTER, TESTS, Lab, pool, vm, wait_until
from links import bridge, link, nic, vlan
from shell import script

pytestmark = pytest.mark.lab
IP = shutil.which("ip")
COUNT = ("-c", "500", "--source-command", FAST)


@pytest.fixture
def virtual_pool(lab: Lab) -> Iterator[Lab]:
    """Return the shared lab, whose pool of VMs the test may change."""
    before = (lab.directory / "pool.json").read_text()
    yield lab
    (lab.directory / "pool.json").write_text(before)


@pytest.mark.parametrize("toolstack", ["xe", "xl", "virsh"])
def test_auto_finds_the_pif(lab: Lab, toolstack: str) -> None:
    source = lab.source.address
    arguments = lab.arguments(*COUNT, "-i", "auto", "--toolstack", toolstack, source=source)
    document = report(lab.netweaver(*arguments))
    config = document["config"]
    assert config["pif"] == "eth0"
    assert config["vif"] == "vif5.0"
    assert config["toolstack"] == toolstack
    assert config["overlay"] is False
    assert document["packets"]["matched"] == 500


ROUTED = """
ip link set vif5.0 nomaster
sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.proxy_arp=1
ip addr add 10.83.1.250/24 dev eth0
ip route add {destination} dev vif5.0
ip link set eth0 nomaster
"""


@pytest.mark.parametrize("options", [(), ("-i", "auto")])
def test_routed_vif(own_lab: Lab, options: tuple[str, ...]) -> None:
    """The host routes the packets from the source's network to a vif in no bridge."""
    lab = own_lab
    lab.hv.run("sh", "-ec", ROUTED.format(destination=lab.destination))
    wait_until(lambda: lab.source.answered_by(lab.destination), "an answer by the new way")
    arguments = lab.arguments("-c", "300", "--source-command", FAST, *options)
    document = report(lab.netweaver(*arguments))
    assert document["config"]["pif"] == "eth0"
    assert document["config"]["toolstack"] == "xe"
    assert document["packets"]["pif"] == document["packets"]["matched"] >= 295


FIREWALL = """
ip link add fwbr105i0 type bridge
ip link add fwpr105p0 type veth peer name fwln105i0
ip link set fwpr105p0 master xenbr0 up
ip link set fwln105i0 master fwbr105i0 up
ip link set tap105i0 master fwbr105i0
ip link set fwbr105i0 up
"""


@pytest.mark.parametrize("has_firewall", [False, True])
def test_proxmox(own_lab: Lab, has_firewall: bool) -> None:
    """Its firewall is a bridge more, and a virtual cable."""
    lab = own_lab
    lab.hv.run("ip", "link", "set", "vif5.0", "name", "tap105i0")
    if has_firewall:
        lab.hv.run("sh", "-ec", FIREWALL)
    arguments = lab.arguments(*COUNT, "-i", "auto", "--toolstack", "qm")
    document = report(lab.netweaver(*arguments))
    assert document["config"]["pif"] == "eth0"
    assert document["config"]["vif"] == "tap105i0"
    assert document["packets"]["matched"] == 500


@pytest.fixture
def many_links(lab: Lab) -> Iterator[Lab]:
    """Give the hypervisor 20,000 interfaces, each of which is stacked on the next one."""
    path = lab.hv.directory / "bin" / "ip"
    lines = [nic("eth0"), bridge("br0"), link("vif5.0", "veth", "br0", other="if2")]
    for number in range(20_000):
        master = "br0" if number == 0 else ""
        lines.append(vlan(f"a{number}", f"a{(number + 1) % 20_000}", master))
    (lab.hv.directory / "bin" / "links").write_text("".join(lines))
    script(path, f'case "$*" in *-d*) cat {path.parent}/links ;; *) exec {IP} "$@" ;; esac')
    yield lab
    path.unlink()


def test_cycle_of_many_links(many_links: Lab) -> None:
    start = time.monotonic()
    line = failure(many_links.netweaver(*many_links.arguments("-i", "auto")), 4)
    assert time.monotonic() - start < 40
    assert len(line) < 2000


NEIGHBOUR = """
ip link set vif6.0 master xenbr0
ip link add veth7 type veth peer name vethQ0VXKJ
ip link set vethQ0VXKJ master xenbr0 up
"""


@pytest.mark.parametrize("options", [(), ("-i", "auto")])
def test_source_on_the_same_host(own_lab: Lab, options: tuple[str, ...]) -> None:
    """Its interface is known by the MAC address of its traffic, and is the pif."""
    lab = own_lab
    lab._ip("link", "del", "d-src1", namespace=lab.client)
    address = ["10.83.1.1/24"]
    lab._link(lab.source.namespace, "eth0", lab.hv.namespace, "vif6.0", address)
    lab.hv.run("sh", "-ec", NEIGHBOUR)
    wait_until(lambda: lab.source.answered_by(lab.destination), "an answer on the bridge")
    arguments = lab.arguments("-c", "300", "--source-command", FAST, *options)
    document = report(lab.netweaver(*arguments))
    assert document["config"]["pif"] == "vif6.0"
    assert document["packets"]["pif"] == document["packets"]["matched"] == 300


class VxlanZoneLab(Lab):
    """A hypervisor with a VXLAN zone of Proxmox: the other nodes are in the bridge's table."""

    def _vxlan(self, namespace: str, remote: str, addresses: Sequence[str]) -> None:
        if namespace != self.hv.namespace:
            super()._vxlan(namespace, remote, addresses)
            return
        script = f"""
            ip link add vxlan7 type vxlan id 7 local {OUTER}.250 dstport 4789 noudpcsum
            bridge fdb append 00:00:00:00:00:00 dev vxlan7 dst {remote}
            ip link set vxlan7 up
        """
        self.hv.run("sh", "-ec", script)


def test_vxlan_zone_of_proxmox() -> None:
    with VxlanZoneLab(overlay=True) as lab:
        document = report(lab.netweaver(*lab.arguments(*COUNT, "-i", "auto")))
        assert document["config"]["pif"] == "eth0"
        assert document["config"]["overlay"] is True
        assert document["packets"]["matched"] == 500
        lab.wait_clean()


class OtherPortLab(Lab):
    """A hypervisor whose VXLAN has a port of its own."""

    tunnel_port = 14789


def test_vxlan_on_another_port(tmp_path: Path) -> None:
    """It is known from the tunnel's interface, and later from the saved run."""
    with OtherPortLab(overlay=True) as lab:
        for options in ((), ("-i", "auto", "--direction", "both"), ("-i", "eth0", "--overlay")):
            arguments = lab.arguments(*COUNT, *options, "--save", str(tmp_path))
            document = report(lab.netweaver(*arguments))
            assert document["config"]["overlay"] is True
            assert document["config"]["selection"]["tunnel_ports"]["14789"] == "vxlan"
            assert document["packets"]["pif"] == document["packets"]["matched"] == 500
        lab.wait_clean()
    again = analyzed("--pcaps", document["saved"])
    assert again["packets"] == document["packets"]


SIMPLE_ZONE = """
ip link set eth0 nomaster
ip link set xenbr0 name vnet1
ip addr add 10.83.1.250/24 dev eth0
ip addr add 10.83.7.1/24 dev vnet1
sysctl -qw net.ipv4.ip_forward=1
"""


def test_simple_zone_of_proxmox(own_lab: Lab) -> None:
    """The VM's bridge has an address instead of a physical interface."""
    lab = own_lab
    vm_address = "10.83.7.100"
    lab.hv.run("sh", "-ec", SIMPLE_ZONE)
    guest = f"{lab.prefix}-dst"
    lab._ip("addr", "add", f"{vm_address}/24", "dev", "ens3", namespace=guest)
    lab._ip("route", "add", "default", "via", "10.83.7.1", namespace=guest)
    lab._ip("addr", "del", f"{lab.destination}/24", "dev", "ens3", namespace=guest)
    lab.source.run("ip", "route", "add", "10.83.7.0/24", "via", "10.83.1.250")
    wait_until(lambda: lab.source.answered_by(vm_address), "an answer by the router")
    arguments = lab.arguments(*COUNT, "-d", vm_address, "-i", "auto")
    document = report(lab.netweaver(*arguments))
    assert document["config"]["pif"] == "eth0"
    assert document["config"]["route"] == "routed"
    assert document["packets"]["matched"] == 500


@pytest.mark.parametrize(
    ("options", "advice", "others"),
    [
        (("-i", "mgmt0"), ("-i auto", "--overlay"), ("ESP",)),
        (("-i", "mgmt0", "--overlay"), ("-i auto", "ESP"), ("--overlay",)),
    ],
)
def test_wrong_pif(
    lab: Lab, options: tuple[str, ...], advice: tuple[str, ...], others: tuple[str, ...]
) -> None:
    line = failure(lab.netweaver(*lab.arguments("-c", "20", "--source-command", FAST, *options)), 6)
    assert all(words in line for words in advice)
    assert not any(words in line for words in others)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--toolstack", "xl", "-n", "none"), "maybe this domain does not exist."),
        (("--toolstack", "virsh", "-n", "halted"), "the domain 'halted' is shut off"),
        (("--toolstack", "virsh", "--num", "5"), "has 2 interfaces, but no number 5"),
        (("--toolstack", "qm", "-n", "halted"), "qm start 106"),
        (("-i", "auto", "--num", "1"), "vif5.1 doesn't exist"),
        (("-i", "auto", "--vif", "mgmt0"), "mgmt0 is in no bridge"),
    ],
)
def test_failed_search(lab: Lab, arguments: tuple[str, ...], words: str) -> None:
    line = failure(lab.netweaver(*lab.arguments(*arguments), seconds=15), 4)
    assert f": root@{lab.hv.address}: " in line
    assert words in line


def test_toolstack_that_is_not_installed(lab: Lab) -> None:
    program = lab.hv.directory / "bin" / "xl"
    hidden = program.rename(program.with_name("xl-hidden"))
    try:
        line = failure(lab.netweaver(*lab.arguments("--toolstack", "xl"), seconds=15), 4)
        assert "--toolstack" in line
    finally:
        hidden.rename(program)


def start_measurement(lab: Lab) -> subprocess.Popen[str]:
    """Start netweaver, and wait for its traffic."""
    process = lab.start(*lab.arguments("-c", "1500", "--source-command", FAST))

    def is_sending() -> bool:
        return any("hping3" in line for line in lab.source.processes().values())

    wait_until(is_sending, "the traffic")
    return process


@pytest.mark.parametrize(
    ("dom_id", "words"),
    [(6, "vif5.0 is now vif6.0: the VM was moved"), (-1, "is not running")],
)
def test_vm_that_changes_during_the_run(virtual_pool: Lab, dom_id: int, words: str) -> None:
    process = start_measurement(virtual_pool)
    virtual_pool.set_pool(pool(vm(dom_id=dom_id)))
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 4
    assert output == ""
    assert words in errors


def readme_example() -> str:
    """Return the README's code for another toolstack, Incus."""
    text = (TESTS.parent / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    [example] = [code for code in examples if "determine_vif" in code]
    return str(example)


@pytest.fixture
def incus(lab: Lab) -> Iterator[Path]:
    """Install a stand-in that answers as `incus config get` does."""
    path = lab.hv.directory / "bin" / "incus"
    script(path, '[ "$*" = "config get web1 volatile.eth0.host_name" ] && echo vif5.0')
    yield path
    path.unlink()


@pytest.mark.usefixtures("incus")
def test_readme_example_of_another_toolstack(lab: Lab) -> None:
    example = readme_example()
    for value, replacement in (
        ("192.0.2.1", lab.source.address),
        ("192.0.2.2", lab.destination),
        ("hv.example.org", lab.hv.address),
        ("/root/.ssh/id_ed25519", str(lab.key)),
        ("-c 1000", "-c 20"),
    ):
        assert value in example
        example = example.replace(value, replacement)
    document = json.loads(run_code(lab, example))
    assert document["config"]["vif"] == "vif5.0"
    assert document["packets"]["matched"] == 20


def test_platform(lab: Lab) -> None:
    platform = report(lab.netweaver(*lab.arguments(*COUNT)))["config"]["platform"]
    assert platform["kernel"] == lab.hv.run("uname", "-r").strip()
    assert platform["tcpdump"] in lab.hv.run("sh", "-c", "tcpdump --version 2>&1")
    assert platform["switch"] == "bridge"
    queue = platform["vif"]
    assert queue["qdisc"] == "noqueue"
    assert queue["queue_length"] == 1000
    assert queue["queues"] >= 1
    assert queue["before"] == queue["after"] == {"rx_dropped": 0, "tx_dropped": 0}
