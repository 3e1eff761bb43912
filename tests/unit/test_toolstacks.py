"""Toolstacks: a VM's name in, its interface out, whatever they answer."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from laboratory import TESTS, libvirt_domain, pool, vm
from shell import Shell

import netweaver
from netweaver import RemoteCommandError

DOMAIN_UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"  # in libvirt's test driver
UUID = "0e3f6f1c-6c59-4b0e-9d0b-2f1d6a3c8b77"


def find_vif(run: netweaver.RunCommand, toolstack: str, name: str, number: int = 0) -> str:
    return netweaver.TOOLSTACKS[toolstack].find_vif(run, name, number)


# -- VMs that run --

RUNNING = pool(
    vm("web 1", 5, vmid="105"),
    vm("-n", 6, vmid="106"),
    vm("x", -1, vmid="107"),
    vm("107", 7, vmid="109"),
    vm("twin", -1, vmid="108"),
    vm("twin", 8, vmid="110", uuid=UUID),
    vm("named", 9, vifname0="web1net"),
)


@pytest.mark.parametrize(
    ("toolstack", "name", "number", "vif"),
    [
        ("xe", "web 1", 1, "vif5.1"),
        ("xe", "twin", 0, "vif8.0"),
        ("xe", UUID, 0, "vif8.0"),
        ("xe", UUID.upper(), 0, "vif8.0"),
        ("xl", "web 1", 0, "vif5.0"),
        ("xl", "-n", 2, "vif6.2"),
        ("xl", "twin", 0, "vif8.0"),
        ("xl", UUID, 2, "vif8.2"),
        ("xl", UUID.upper(), 2, "vif8.2"),
        ("xl", "named", 0, "web1net"),
        ("xl", "named", 1, "vif9.1"),
        ("qm", "web 1", 0, "tap105i0"),
        ("qm", "106", 1, "tap106i1"),
        ("qm", "107", 0, "tap109i0"),  # a name comes before a VMID
        ("qm", "twin", 0, "tap110i0"),
    ],
)
def test_running_vm(tmp_path: Path, toolstack: str, name: str, number: int, vif: str) -> None:
    assert find_vif(Shell(tmp_path, RUNNING), toolstack, name, number) == vif


LIBVIRT = (
    "<node>"
    + libvirt_domain("off", "", running=False)
    + libvirt_domain("two words", "lan4", "lan7")
    + libvirt_domain("1", "lan8")
    + libvirt_domain("2", "lan9", running=False)
    + "</node>"
)


@pytest.fixture
def virsh(tmp_path: Path) -> Shell:
    """Return the real virsh, whose test driver has made-up domains."""
    run = Shell(tmp_path, {})
    (tmp_path / "node.xml").write_text(LIBVIRT)
    run.environment["LIBVIRT_DEFAULT_URI"] = f"test://{tmp_path / 'node.xml'}"
    return run


@pytest.mark.parametrize(
    ("name", "number", "vif"),
    [("two words", 0, "lan4"), ("two words", 1, "lan7"), ("1", 0, "lan8")],
)
def test_running_domain(virsh: Shell, name: str, number: int, vif: str) -> None:
    """A name that is a number is the id of another domain, too."""
    assert find_vif(virsh, "virsh", name, number) == vif


@pytest.mark.parametrize("uuid", [DOMAIN_UUID, DOMAIN_UUID.upper()])
def test_domain_by_uuid(tmp_path: Path, uuid: str) -> None:
    vif = find_vif(Shell(tmp_path, {}), "virsh", uuid)
    assert re.fullmatch(r"testnet\d+", vif)


def test_virsh_never_writes(virsh: Shell) -> None:
    """All that it needs is a read-only connection, the only one that oVirt allows."""
    find_vif(virsh, "virsh", "1")
    assert virsh.commands
    assert all("virsh -r " in command for command in virsh.commands)


class ProxmoxHost:
    """A host with VMs whose UUIDs are in their configurations."""

    def __init__(self, config: Path, *others: tuple[str, str, str]) -> None:
        """Make a host; `others` are the VMID, the name and the UUID of further running VMs."""
        self.directory = config
        self.listing = "  105 web1 running 2048 32.00 4242\n  106 db stopped 2048 32.00 0\n"
        self._add("105", UUID)
        self._add("106", DOMAIN_UUID)
        for vmid, name, uuid in others:
            self.listing += f"  {vmid} {name} running 2048 32.00 4243\n"
            self._add(vmid, uuid)

    def _add(self, vmid: str, uuid: str) -> None:
        text = f"smbios1: uuid={uuid}\n\n[snapshot]\nsmbios1: uuid={uuid}\n"
        (self.directory / f"{vmid}.conf").write_text(text)

    def __call__(self, command: str, hint: str = "") -> str:
        if command == "qm list":
            return self.listing
        command = command.replace("/etc/pve/qemu-server", str(self.directory))
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
        return done.stdout


@pytest.mark.parametrize("uuid", [UUID, UUID.upper()])
def test_proxmox_vm_by_uuid(tmp_path: Path, uuid: str) -> None:
    assert find_vif(ProxmoxHost(tmp_path), "qm", uuid) == "tap105i0"


@pytest.mark.parametrize(
    ("uuid", "words"),
    [
        (UUID.replace("0", "1"), f"there is no VM '{UUID.replace('0', '1')}'"),
        (DOMAIN_UUID, "qm start 106"),
    ],
)
def test_proxmox_vm_by_uuid_that_cannot_be_measured(tmp_path: Path, uuid: str, words: str) -> None:
    with pytest.raises(RemoteCommandError) as caught:
        find_vif(ProxmoxHost(tmp_path), "qm", uuid)
    assert words in str(caught.value)


def test_uuid_of_a_proxmox_vm_whose_vmid_is_a_name(tmp_path: Path) -> None:
    host = ProxmoxHost(tmp_path, ("107", "105", UUID.replace("0", "1")))
    assert find_vif(host, "qm", UUID) == "tap105i0"


def test_uuid_of_two_proxmox_vms(tmp_path: Path) -> None:
    """As after a backup was restored under another VMID."""
    host = ProxmoxHost(tmp_path, ("107", "copy", UUID))
    with pytest.raises(RemoteCommandError) as caught:
        find_vif(host, "qm", UUID)
    assert "105, 107" in str(caught.value)


def test_uuid_of_two_proxmox_vms_of_which_one_runs(tmp_path: Path) -> None:
    host = ProxmoxHost(tmp_path, ("107", "copy", DOMAIN_UUID))
    assert find_vif(host, "qm", DOMAIN_UUID) == "tap107i0"


def test_domain_without_a_chosen_device_name(tmp_path: Path) -> None:
    vif = find_vif(Shell(tmp_path, {}), "virsh", "test")
    assert re.fullmatch(r"testnet\d+", vif)


def test_old_virsh_prints_a_header_in_spite_of_q() -> None:
    answer = (
        "Interface  Type       Source     Model       MAC\n"
        "-------------------------------------------------------\n"
        "vnet0      network    default    virtio      52:54:00:01:1d:d0\n"
    )
    assert netweaver.parse_virsh_domiflist(answer, "x", 0) == "vnet0"


# -- VMs that can't be measured --

FAULTY = (
    vm("web1", vmid="105"),
    vm("halted", -1, vmid="106"),
    vm("twins", 7, vmid="107"),
    vm("twins", 8, vmid="108"),
    vm("Domain-0", 0),
)


@pytest.mark.parametrize(
    ("toolstack", "name", "words"),
    [
        ("xl", "none", "Can't get domid of domain name 'none'"),
        ("xl", "none", "xl list"),
        ("xl", "halted", "the VM isn't running"),
        ("xl", "Domain-0", "control domain"),
        ("qm", "none", "there is no VM 'none'"),
        ("qm", "halted", "qm start 106"),
        ("qm", "twins", "VMIDs 107, 108"),
        ("virsh", "none", "failed to get domain 'none' (virsh list"),
        ("virsh", "1", "failed to get domain '1'"),
    ],
)
def test_vm_that_cannot_be_measured(tmp_path: Path, toolstack: str, name: str, words: str) -> None:
    with pytest.raises(RemoteCommandError) as caught:
        find_vif(Shell(tmp_path, pool(*FAULTY)), toolstack, name)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("toolstack", "fault", "words"),
    [
        ("xl", "down", "cannot init xl context"),
        ("qm", "down", "Connection refused"),
        ("xe", "starting", "still initialising. Please wait. (is xapi running there?"),
    ],
)
def test_toolstack_that_is_down(tmp_path: Path, toolstack: str, fault: str, words: str) -> None:
    with pytest.raises(RemoteCommandError) as caught:
        find_vif(Shell(tmp_path, pool(*FAULTY, fault=fault)), toolstack, "web1")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [
        ("two words", 2, "has 2 interfaces, but no number 2"),
        ("off", 0, "is shut off"),
        ("2", 0, "'2' is shut off"),
    ],
)
def test_domain_that_cannot_be_measured(virsh: Shell, name: str, number: int, words: str) -> None:
    with pytest.raises(RemoteCommandError, match=words):
        find_vif(virsh, "virsh", name, number)


def test_libvirt_is_down(virsh: Shell) -> None:
    virsh.environment["LIBVIRT_DEFAULT_URI"] = "test:///nonexistent/node.xml"
    with pytest.raises(RemoteCommandError, match=r"systemctl status libvirtd.*--vif"):
        find_vif(virsh, "virsh", "off")


def test_crashed_domain(virsh: Shell, tmp_path: Path) -> None:
    crashed = "<test:runstate>6</test:runstate>"
    path = tmp_path / "node.xml"
    path.write_text(path.read_text().replace("<test:runstate>5</test:runstate>", crashed))
    with pytest.raises(RemoteCommandError, match="'2' is crashed"):
        find_vif(virsh, "virsh", "2")


@pytest.mark.parametrize(
    "row",
    [
        " -        hostdev     default     virtio   52:54:00:01:1d:d0",
        " vhu0e3f  vhostuser   /tmp/vhu1   virtio   52:54:00:01:1d:d0",
    ],
)
def test_interface_without_a_device(row: str) -> None:
    answer = f"{row}\n"
    with pytest.raises(RemoteCommandError, match="interface 0 of the domain 'x' has no device"):
        netweaver.parse_virsh_domiflist(answer, "x", 0)


@pytest.mark.parametrize("answer", ["5\n5\n", "5\n", "7,5,5\n5\n", "5,-1\n5\n", "-1,5\n"])
def test_xe_answers_with_one_local_domain(answer: str) -> None:
    assert netweaver.parse_xe_dom_id(answer, "web1") == 5


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("\n\n", "there is no VM with the name-label 'web1'"),
        ("-1\n\n", "is not running"),
        ("-1,-1\n\n", "is not running"),
        ("5,6\n5,6\n", "2 VMs have the name-label 'web1' (dom-ids 5,6)"),
        ("5,6\n", "2 VMs have"),
        ("5\n\n", "another host of the pool"),
        ("5,-1\n\n", "another host of the pool"),
        ("<not in database>\n\n", "instead of dom-ids"),
    ],
)
def test_xe_answers_without_one_local_domain(answer: str, words: str) -> None:
    with pytest.raises(RemoteCommandError) as caught:
        netweaver.parse_xe_dom_id(answer, "web1")
    assert words in str(caught.value)


def test_a_proxmox_host_without_vms(tmp_path: Path) -> None:
    with pytest.raises(RemoteCommandError, match="there is no VM 'x'"):
        find_vif(Shell(tmp_path, pool()), "qm", "x")


# -- which toolstack --


def install(directory: Path, *toolstacks: str) -> str:
    """Install stand-ins for toolstacks and what they need; return the directory for PATH."""
    directory.mkdir()
    for toolstack in (*toolstacks, "xenstore-read"):
        (directory / toolstack).symlink_to(TESTS / "standins" / toolstack)
    for tool in ("sh", "env"):
        (directory / tool).symlink_to(os.path.realpath(str(shutil.which(tool))))
    (directory / "python3").symlink_to(os.path.realpath(sys.executable))
    return str(directory)


@pytest.mark.parametrize(
    ("installed", "vms", "toolstack"),
    [
        (["xe", "qm", "xl"], [vm("web1")], "xe"),
        (["qm", "xl"], [vm("web1", vmid="105")], "qm"),
        (["qm", "xl"], [vm("web1")], "xl"),
        (["xl"], [vm("web1")], "xl"),
    ],
)
def test_first_toolstack_that_knows_the_vm(
    tmp_path: Path, installed: list[str], vms: list[dict[str, str]], toolstack: str
) -> None:
    run = Shell(tmp_path, pool(*vms))
    run.environment["PATH"] = install(tmp_path / "bin", *installed)
    assert netweaver.find_toolstack(run, "web1", 0)[0] == toolstack


@pytest.mark.parametrize(
    ("installed", "vms", "words"),
    [
        (["xe", "xl"], [vm("web1", 5), vm("web1", 6)], "2 VMs have the name-label"),
        (["qm", "xl"], [vm("web1", -1, vmid="105")], "qm start 105"),
        (["qm", "xl"], [], "there is no VM 'web1' on this host (qm list"),
        ([], [], "--vif"),
    ],
)
def test_no_toolstack_finds_the_vm(
    tmp_path: Path, installed: list[str], vms: list[dict[str, str]], words: str
) -> None:
    """An error of xe or qm about a VM that they know is final, whatever xl would answer."""
    run = Shell(tmp_path, pool(*vms))
    run.environment["PATH"] = install(tmp_path / "bin", *installed)
    with pytest.raises(RemoteCommandError) as caught:
        netweaver.find_toolstack(run, "web1", 0)
    assert words in str(caught.value)


# -- hostile answers --

HOSTILE = [
    "",
    " " * 64_000,
    "9" * 5000,
    "²" * 500,
    "1 " * 30_000,
    ", " * 30_000,
    "\\ " * 30_000,
    "\t\n" * 9999,
    "-1," * 9999,
    "[" * 30_000,
    '{"data":' * 9999,
    "1: a@b: \\ link/ \\ " * 3000,
    "ovs",
    "ovs ",
    "ovs-interfaces",
    "\x00\x1b[2J",
    'ovs-interfaces {"data":[1]}',
    'ovs-interfaces {"data":[["a","patch",["map",[["peer",{}]]]]]}',
    "é" * 999,
    "5000000000000 web1 running 1 1 1",
    "100 web1 running 2048 32.00 " + " " * 64_000,
    "free 1 2 3 " + "9" * 5000,
    "vnet0\n" * 9999,
    "link 1: " + "a" * 64_000,
    "1 packet captured " * 999,
]


def mixtures(chance: random.Random, count: int) -> list[str]:
    """Return texts that are made of pieces of the hostile ones."""
    texts = []
    for _ in range(count):
        pieces = [chance.choice(HOSTILE)[: chance.randrange(3000)] for _ in range(4)]
        texts.append("".join(pieces))
    return texts


def parsers() -> dict[str, Callable[[str], Any]]:
    """Return the parsers of the hypervisor's answers, by name."""
    by_name: dict[str, Callable[[str], Any]] = {
        "xe": lambda text: netweaver.parse_xe_dom_id(text, "web1"),
        "virsh": lambda text: netweaver.parse_virsh_domiflist(text, "web1", 0),
        "qm": lambda text: netweaver.parse_qm_list(text, "web1", ["105"]),
        "platform": lambda text: netweaver.Facts(text).platform("a"),
        "uplinks": lambda text: netweaver.find_uplinks(
            lambda command, hint="": text, "vif5.0", netweaver.Links(text), {}
        ),
        "tcpdump": lambda text: netweaver.tcpdump_counts(text.splitlines()),
        "transmitted": netweaver.transmitted_packets,
    }
    for name in netweaver.TOOLSTACKS:
        by_name[f"{name} by name"] = partial(find_vif_in, name)
    return by_name


def find_vif_in(toolstack: str, text: str) -> str:
    """Find a VM's interface where all commands print the same text."""
    return find_vif(lambda command, hint="": text, toolstack, "web1")


@pytest.mark.parametrize("name", parsers())
def test_hostile_answers_are_only_errors(name: str) -> None:
    """Where time grows with the square of the size, this takes minutes."""
    parse = parsers()[name]
    start = time.process_time()
    for text in HOSTILE + mixtures(random.Random(1), 200):
        try:
            json.dumps(parse(text), default=str, allow_nan=False)
        except netweaver.NetWeaverError as error:
            assert len(str(error)) < 200_000
    assert time.process_time() - start < 10
