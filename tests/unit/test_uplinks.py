"""From a VM's interface to the physical ones: the layouts that the platforms make."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from links import (
    bridge,
    container,
    internal,
    link,
    nic,
    open_vswitch,
    port,
    tap,
    veth_pair,
    vlan,
)
from shell import Shell, script

import netweaver
from netweaver import RemoteCommandError, RouteKind

LOOPBACK = link("lo")
SOURCE = "198.51.100.7"
SOURCE_MAC = "52:54:00:aa:bb:cc"


class Host(Shell):
    """A hypervisor with some interfaces, whose ip, bridge and ovs-appctl give prepared answers."""

    def __init__(self, directory: Path, interfaces: str, answers: Mapping[str, str]) -> None:
        super().__init__(directory, {})
        self.links = netweaver.Links(interfaces)
        self.environment["PATH"] = f"{directory}:{self.environment['PATH']}"
        for program in ("ip", "bridge", "ovs-appctl"):
            cases = ""
            for command, answer in answers.items():
                name, _, arguments = command.partition(" ")
                if name == program:
                    cases += f"'{arguments}') printf '%s\\n' '{answer}' ;;\n"
            script(directory / program, f'case "$*" in\n{cases}*) exit 1 ;;\nesac')

    def find(
        self, vif: str, sources: Mapping[str, str] | None = None
    ) -> tuple[list[str], netweaver.Route]:
        return netweaver.find_uplinks(self, vif, self.links, sources or {SOURCE: ""})


# -- XenServer and XCP-ng --

BRIDGED = nic("eth0", "xenbr0") + bridge("xenbr0") + nic("vif5.0", "xenbr0")
# A bond is no device, and the bridge of a VLAN is a fake one.
XENSERVER = "".join(
    [
        LOOPBACK,
        port("eth0"),
        port("eth1"),
        port("eth2"),
        internal("ovs-system"),
        internal("xapi1"),
        internal("xapi2"),
        internal("xenbr2"),
        port("vif5.0"),
        port("vif6.1"),
        port("vif7.0"),
        open_vswitch({"xapi1": "eth0 eth1 vif6.1", "xapi2=xapi1": "vif5.0"}, {}),
        open_vswitch({"xenbr2": "eth2 vif7.0"}, {"xapi2": {"type": "internal"}}),
    ]
)
XENSERVER_BRIDGES = "".join(
    [
        nic("eth0", "bond0"),
        nic("eth1", "bond0"),
        link("bond0", "bond mode active-backup", "xapi1"),
        bridge("xapi1"),
        vlan("bond0.8", "bond0", "xapi2"),
        bridge("xapi2"),
        nic("vif5.0", "xapi2"),
    ]
)
# xl gives a vif any name; all have one address.
NAMED_VIF = BRIDGED + link("db-net", "", "xenbr0", mac="fe:ff:ff:ff:ff:ff")

# -- Proxmox VE --

PROXMOX = "".join(
    [
        nic("eno1", "bond0"),
        nic("eno2", "bond0"),
        link("bond0", "bond mode 802.3ad"),
        vlan("bond0.20", "bond0", "vmbr0"),
        bridge("vmbr0"),
        tap("tap100i0", "fwbr100i0"),
        bridge("fwbr100i0"),
        veth_pair("fwpr100p0", "vmbr0", "fwln100i0", "fwbr100i0"),
        tap("tap101i0", "vmbr0"),
        container("veth102i0", "vmbr0"),
    ]
)
PROXMOX_OVS = "".join(
    [
        port("eno1"),
        internal("ovs-system"),
        internal("vmbr0"),
        bridge("fwbr100i0"),
        tap("tap100i0", "fwbr100i0"),
        internal("fwln100o0", "fwbr100i0"),
        port("tap101i0", "tun type tap"),
        internal("ln_vnet1", "vnet1"),
        bridge("vnet1"),
        tap("tap102i0", "vnet1"),
        open_vswitch(
            {"vmbr0": "eno1 fwln100o0 ln_vnet1 tap101i0"},
            {"fwln100o0": {"type": "internal"}, "ln_vnet1": {"type": "internal"}},
        ),
    ]
)
# Open vSwitch in its own process has tap devices instead of internal ports.
PROXMOX_OVS_IN_PROCESS = "".join(
    [
        link("eno1"),
        tap("ovs-netdev"),
        tap("vmbr0"),
        bridge("fwbr100i0"),
        tap("tap100i0", "fwbr100i0"),
        tap("fwln100o0", "fwbr100i0"),
        open_vswitch({"vmbr0": "eno1 fwln100o0"}, {"fwln100o0": {"type": "internal"}}),
    ]
)
PROXMOX_VLAN_ZONE = "".join(
    [
        nic("eno1", "vmbr0"),
        bridge("vmbr0"),
        vlan("eno1.10", "eno1", "vmbr0v10"),
        bridge("vmbr0v10"),
        veth_pair("ln_vnet1", "vmbr0v10", "pr_vnet1", "vnet1"),
        bridge("vnet1"),
        tap("tap100i0", "vnet1"),
    ]
)
# The end of the cable for untagged networks is in no bridge.
PROXMOX_QINQ_ZONE = "".join(
    [
        nic("eno1", "vmbr0"),
        bridge("vmbr0"),
        tap("tap200i0", "vmbr0"),
        vlan("vmbr0.100", "vmbr0", "z_zone1"),
        bridge("z_zone1"),
        veth_pair("ln_zone1", "z_zone1", "pr_zone1", ""),
        vlan("z_zone1.20", "z_zone1", "vnet1"),
        bridge("vnet1"),
        tap("tap100i0", "vnet1"),
    ]
)
PROXMOX_VXLAN_ZONE = "".join(
    [
        nic("eno1", "vmbr0"),
        bridge("vmbr0"),
        nic("eno2"),
        link("vxlan_vnet1", "vxlan id 9 local 10.0.0.1 srcport 0 0 dstport 4789", "vnet1"),
        bridge("vnet1"),
        tap("tap100i0", "vnet1"),
    ]
)
FLOODED = (
    "00:00:00:00:00:00 dst 10.0.0.2 self permanent\n00:00:00:00:00:00 dst 10.0.0.3 self permanent"
)
VXLAN_ANSWERS = {
    "bridge fdb show dev vxlan_vnet1": FLOODED,
    "ip -o route get 10.0.0.2": "10.0.0.2 dev vmbr0 src 10.0.0.1 uid 0 \\    cache ",
    "ip -o route get 10.0.0.3": "10.0.0.3 via 10.0.0.254 dev vmbr0 src 10.0.0.1 uid 0 \\    cache ",
}
# In an EVPN zone nothing is known of the other nodes before they send.
EVPN_ANSWERS = {
    "ip -o addr show to 10.0.0.1": "2: eno2    inet 10.0.0.1/24 scope global eno2\\  ",
}
# The tunnel begins at an address of the host that is on no card.
VXLAN_OF_LOOPBACK = (
    nic("eno1")
    + LOOPBACK
    + link("lo1", "dummy")
    + link("vxlan1", "vxlan id 1 local 10.0.0.1 dev {} srcport 0 0 dstport 4789", "vnet1")
    + bridge("vnet1")
    + tap("tap100i0", "vnet1")
)
VXLAN_OF_LOOPBACK_ANSWERS = {
    "bridge fdb show dev vxlan1": FLOODED,
    "ip -o route get 10.0.0.2 fibmatch": "10.0.0.2 via 192.0.2.1 dev eno1 proto bgp",
}
# Two equal routes, of which `ip route get` alone chooses one.
ECMP = (
    "default proto static \\\tnexthop via 10.0.1.1 dev eno1 weight 1 "
    "\\\tnexthop via 10.0.2.1 dev eno2 weight 1 "
)
PROXMOX_SIMPLE_ZONE = "".join(
    [
        nic("eno1", "vmbr0"),
        bridge("vmbr0"),
        tap("tap200i0", "vmbr0"),
        bridge("vnet1"),
        tap("tap100i0", "vnet1"),
    ]
)

# -- OpenStack and OVN --

HYBRID = "".join(
    [
        port("eth0"),
        internal("ovs-system"),
        internal("br-ex"),
        internal("br-int"),
        veth_pair("qvo01234567-89", "ovs-system", "qvb01234567-89", "qbr01234567-89"),
        bridge("qbr01234567-89"),
        tap("tap01234567-89", "qbr01234567-89"),
        open_vswitch(
            {"br-ex": "eth0 phy-br-ex", "br-int": "int-br-ex qvo01234567-89"},
            {
                "phy-br-ex": {"type": "patch", "peer": "int-br-ex"},
                "int-br-ex": {"type": "patch", "peer": "phy-br-ex"},
                "eth0": {},
            },
        ),
    ]
)
NATIVE = "".join(
    [
        nic("ens3"),
        vlan("ens3.30", "ens3"),
        internal("ovs-system"),
        internal("br-int"),
        internal("br-tun"),
        port("tap01234567-89", "tun type tap"),
        port("vxlan_sys_4789", "vxlan external id 0 srcport 0 0 dstport 4789"),
        open_vswitch(
            {"br-int": "patch-tun tap01234567-89", "br-tun": "patch-int vxlan-0a000002"},
            {
                "patch-tun": {"type": "patch", "peer": "patch-int"},
                "patch-int": {"type": "patch", "peer": "patch-tun"},
                "vxlan-0a000002": {
                    "type": "vxlan",
                    "remote_ip": "10.0.0.2",
                    "local_ip": "10.0.0.1",
                },
            },
        ),
    ]
)
OVN = "".join(
    [
        nic("ens3", "br0"),
        bridge("br0"),
        internal("ovs-system"),
        internal("br-int"),
        port("tap01234567-89", "tun type tap"),
        port("genev_sys_6081", "geneve external id 0 ttl auto dstport 6081"),
        open_vswitch(
            {"br-int": "ovn-a1b2c3-0 tap01234567-89"},
            {"ovn-a1b2c3-0": {"type": "geneve", "remote_ip": "10.0.0.2", "key": "flow"}},
        ),
    ]
)
LINUXBRIDGE_AGENT = "".join(
    [
        nic("eth1"),
        link("vxlan-77", "vxlan id 77 group 224.0.0.1 dev eth1 srcport 0 0 dstport 8472", "brq1"),
        bridge("brq1"),
        tap("tap01234567-89", "brq1"),
    ]
)
ROUTE_TO_TUNNEL = {
    "ip -o route get 10.0.0.2": "10.0.0.2 dev {} src 10.0.0.1 uid 0 \\    cache ",
}


def route_by(device: str) -> dict[str, str]:
    """Return the answer that the other end of a tunnel is reached by a device."""
    return {key: answer.format(device) for key, answer in ROUTE_TO_TUNNEL.items()}


# -- libvirt, Incus and containers --

MACVTAP = nic("eno1") + nic("eth0") + link("macvtap0", "macvtap mode bridge", other="eno1")
MACVTAP_ON_BOND = "".join(
    [
        nic("eno1", "bond0"),
        nic("eno2", "bond0"),
        link("bond0", "bond mode 802.3ad"),
        vlan("bond0.7", "bond0"),
        link("macvtap0", "macvtap mode vepa", other="bond0.7"),
    ]
)
GUESTS = "".join(
    [
        bridge("br0"),
        tap("vnet0", "br0"),
        container("vethQ0VXKJ", "br0"),  # LXC
        container("veth0", "br0"),  # podman
        container("ve-web", "br0"),  # nspawn
        container("vb-db", "br0"),
        container("mac00163e000001", "br0"),  # Incus
        tap("db-net", "br0"),  # a VM's, by a name of its own
    ]
)
CONTAINERS = nic("eno1", "br0") + GUESTS
# Where the hypervisor is a container itself, its card is a veth.
NESTED = container("eth0", "br0") + GUESTS
NESTED_UPLINK = GUESTS + container("uplink", "br0")
NESTED_VETH = bridge("br0") + tap("vnet0", "br0") + container("veth0", "br0")
SWITCHDEV = "".join(
    [
        port("enp3s0f0np0").replace("numtxqueues", "portname p0 switchid 0c42 numtxqueues"),
        port("enp3s0f0npf0vf0").replace("numtxqueues", "portname pf0vf0 numtxqueues"),
        port("rep1").replace("numtxqueues", "portname c1pf0vf1 numtxqueues"),
        open_vswitch({"br0": "enp3s0f0np0 enp3s0f0npf0vf0 rep1"}, {}),
    ]
)
# Open vSwitch remembers the ports of guests that are gone.
STALE_PORTS = "".join(
    [
        port("eno1"),
        internal("br0"),
        port("vnet0", "tun type tap"),
        open_vswitch({"br0": "eno1 vnet0 1b2c3d_l gone"}, {"1b2c3d_l": {}, "gone": {}}),
    ]
)
CABLE_TO_A_BRIDGE = (
    nic("eno1", "br0") + bridge("br0") + nic("eth0") + veth_pair("web0", "", "port0", "br0")
)
# The host takes apart what a VM has tagged itself.
TRUNK = "".join(
    [
        nic("eno1"),
        vlan("eno1.10", "eno1", "br10"),
        bridge("br10"),
        tap("vnet0"),
        vlan("vnet0.10", "vnet0", "br10"),
    ]
)
MACSEC = (
    nic("eno1")
    + link("macsec0", "macsec sci 1 protect on encrypt {} send_sci on", "br0", other="eno1")
    + bridge("br0")
    + tap("vnet0", "br0")
)
ALIASES = BRIDGED.replace(
    "numtxqueues", "numtxqueues 1 \\    alias to the master br9 dev eth9 \\    altname enp3s0", 1
)


@pytest.mark.parametrize(
    ("interfaces", "vif", "pifs"),
    [
        (BRIDGED, "vif5.0", "eth0"),
        (XENSERVER, "vif5.0", "eth0 eth1"),
        (XENSERVER, "vif6.1", "eth0 eth1"),
        (XENSERVER, "vif7.0", "eth2"),
        (XENSERVER_BRIDGES, "vif5.0", "eth0 eth1"),
        (NAMED_VIF, "vif5.0", "eth0"),
        (PROXMOX, "tap100i0", "eno1 eno2"),
        (PROXMOX, "tap101i0", "eno1 eno2"),
        (PROXMOX_OVS, "tap100i0", "eno1"),
        (PROXMOX_OVS, "tap101i0", "eno1"),
        (PROXMOX_OVS, "tap102i0", "eno1"),
        (PROXMOX_OVS_IN_PROCESS, "tap100i0", "eno1"),
        (PROXMOX_VLAN_ZONE, "tap100i0", "eno1"),
        (PROXMOX_QINQ_ZONE, "tap100i0", "eno1"),
        (HYBRID, "tap01234567-89", "eth0"),
        (MACVTAP, "macvtap0", "eno1"),
        (MACVTAP_ON_BOND, "macvtap0", "eno1 eno2"),
        (CONTAINERS, "vnet0", "eno1"),
        (NESTED, "vnet0", "eth0"),
        (NESTED_UPLINK, "vnet0", "uplink"),
        (NESTED_VETH, "vnet0", "veth0"),
        (SWITCHDEV, "rep1", "enp3s0f0np0"),
        (ALIASES, "vif5.0", "eth0"),
        (STALE_PORTS, "vnet0", "eno1"),
        (CABLE_TO_A_BRIDGE, "web0", "eno1"),
        (TRUNK, "vnet0", "eno1"),
        (MACSEC.format("off"), "vnet0", "eno1"),
        (MACSEC.format("on"), "vnet0", "macsec0"),
    ],
)
def test_layouts(tmp_path: Path, interfaces: str, vif: str, pifs: str) -> None:
    found, route = Host(tmp_path, interfaces, {}).find(vif)
    assert found == pifs.split()
    assert not route.is_tunnelled
    assert route.kind is RouteKind.SWITCHED


@pytest.mark.parametrize(
    ("interfaces", "vif", "answers", "pifs"),
    [
        (PROXMOX_VXLAN_ZONE, "tap100i0", VXLAN_ANSWERS, "eno1"),
        (PROXMOX_VXLAN_ZONE, "tap100i0", EVPN_ANSWERS, "eno2"),
        (NATIVE, "tap01234567-89", route_by("ens3.30"), "ens3"),
        (OVN, "tap01234567-89", route_by("br0"), "ens3"),
        (LINUXBRIDGE_AGENT, "tap01234567-89", {}, "eth1"),
        (VXLAN_OF_LOOPBACK.format("lo"), "tap100i0", VXLAN_OF_LOOPBACK_ANSWERS, "eno1"),
        (VXLAN_OF_LOOPBACK.format("lo1"), "tap100i0", VXLAN_OF_LOOPBACK_ANSWERS, "eno1"),
    ],
)
def test_tunnels(
    tmp_path: Path, interfaces: str, vif: str, answers: dict[str, str], pifs: str
) -> None:
    found, route = Host(tmp_path, interfaces, answers).find(vif)
    assert found == pifs.split()
    assert route.is_tunnelled


@pytest.mark.parametrize(
    ("interface", "ports"),
    [
        (link("vx0", "vxlan id 7 local 10.0.0.1 srcport 0 0 dstport 14789"), {14789: "vxlan"}),
        (link("gn0", "geneve id 7 remote 10.0.0.2 ttl auto dstport 16081"), {16081: "geneve"}),
        (
            open_vswitch({}, {"gn0": {"type": "geneve", "dst_port": "16081"}}),
            {16081: "geneve"},
        ),
        (open_vswitch({}, {"vx0": {"type": "vxlan", "dst_port": "4790"}}), {4790: "vxlan"}),
        (nic("eth0"), {}),
    ],
)
def test_tunnel_ports(interface: str, ports: dict[int, str]) -> None:
    usual = {4789: "vxlan", 8472: "vxlan", 6081: "geneve"}
    assert netweaver.Links(interface).tunnel_ports() == usual | ports


# -- the host routes the VM's packets --

CONNECTED = "192.168.122.0/24 proto kernel scope link src 192.168.122.1 "
LIBVIRT_NAT = nic("eno1") + bridge("virbr0") + tap("vnet0", "virbr0")
XEN_ROUTED = nic("eth0") + nic("vif5.0")


# The host's own interface is on the VM's bridge, or behind a cable from there.
GATEWAY_ON_A_BRIDGE = (
    nic("eno1") + bridge("vmbr1") + vlan("vmbr1.10", "vmbr1") + tap("tap100i0", "vmbr1")
)
GATEWAY_BEHIND_A_CABLE = (
    nic("eno1") + bridge("br1") + veth_pair("host0", "", "host0-br", "br1") + tap("vnet0", "br1")
)
VRF = (
    nic("eno1")
    + nic("eno2", "vrf1")
    + link("vrf1", "vrf table 11")
    + bridge("vnet1", "vrf1")
    + tap("tap100i0", "vnet1")
)
IN_VRF = {
    "ip -4 -o route show table all dev vnet1": CONNECTED,
    f"ip -o route get {SOURCE}": f"{SOURCE} via 192.0.2.1 dev eno1 src 192.0.2.9 uid 0 ",
    f"ip -o route get {SOURCE} vrf vrf1": f"{SOURCE} via 10.0.0.1 dev eno2 table 11 uid 0 ",
}
LEAKED = {
    "ip -4 -o route show table all dev vnet2": CONNECTED,
    f"ip -o route get {SOURCE}": f"{SOURCE} dev vrf1 src 192.0.2.9 uid 0 ",
}
IPV6_ONLY = {
    "ip -6 -o route show table all dev virbr0": "2001:db8:ff00::/64 proto kernel metric 256",
    f"ip -o route get {SOURCE}": f"{SOURCE} via 192.0.2.1 dev eno1 src 192.0.2.9 uid 0 ",
}


def routed(gateway: str, device: str) -> dict[str, str]:
    """Return the answers of a host that routes between a gateway and the source's interface."""
    return {
        f"ip -4 -o route show table all dev {gateway}": CONNECTED,
        f"ip -o route get {SOURCE}": f"{SOURCE} via 192.0.2.1 dev {device} src 192.0.2.9 uid 0 ",
    }


@pytest.mark.parametrize(
    ("interfaces", "vif", "answers", "pifs"),
    [
        (LIBVIRT_NAT, "vnet0", routed("virbr0", "eno1"), "eno1"),
        (PROXMOX_SIMPLE_ZONE, "tap100i0", routed("vnet1", "vmbr0"), "eno1"),
        (XEN_ROUTED, "vif5.0", routed("vif5.0", "eth0"), "eth0"),
        (GATEWAY_ON_A_BRIDGE, "tap100i0", routed("vmbr1.10", "eno1"), "eno1"),
        (GATEWAY_BEHIND_A_CABLE, "vnet0", routed("host0", "eno1"), "eno1"),
        (VRF, "tap100i0", IN_VRF, "eno2"),
        (VRF + bridge("vnet2") + tap("tap200i0", "vnet2"), "tap200i0", LEAKED, "eno2"),
        (LIBVIRT_NAT, "vnet0", IPV6_ONLY, "eno1"),
        (
            LIBVIRT_NAT + nic("eno2"),
            "vnet0",
            {**routed("virbr0", "eno1"), f"ip -o route get {SOURCE} fibmatch": ECMP},
            "eno1 eno2",
        ),
        (
            LIBVIRT_NAT + nic("eno2"),
            "vnet0",
            {**routed("virbr0", "eno1"), f"ip -o route get {SOURCE} fibmatch": ECMP + "dead"},
            "eno1",
        ),
    ],
)
def test_routed(
    tmp_path: Path, interfaces: str, vif: str, answers: dict[str, str], pifs: str
) -> None:
    found, route = Host(tmp_path, interfaces, answers).find(vif)
    assert found == pifs.split()
    assert route.kind is RouteKind.ROUTED


def test_the_hypervisor_as_source_of_a_routed_vm(tmp_path: Path) -> None:
    """Its packets pass none of its cards."""
    answers = routed("vif5.0", "eth0")
    answers[f"ip -o route get {SOURCE} fibmatch"] = f"local {SOURCE} dev eth0 src {SOURCE} "
    with pytest.raises(RemoteCommandError, match="routes its packets"):
        Host(tmp_path, XEN_ROUTED, answers).find("vif5.0")


def test_route_to_an_unknown_source(tmp_path: Path) -> None:
    host = Host(tmp_path, LIBVIRT_NAT, routed("virbr0", "eno1"))
    with pytest.raises(RemoteCommandError, match="routes its packets"):
        netweaver.find_uplinks(host, "vnet0", host.links, {})


def test_isolated_bridge(tmp_path: Path) -> None:
    """A bridge without an address isn't routed, whatever leads to the source."""
    answers = routed("virbr0", "eno1")
    link_local = "fe80::/64 proto kernel metric 256 pref medium"
    answers["ip -6 -o route show table all dev virbr0"] = link_local
    del answers["ip -4 -o route show table all dev virbr0"]
    with pytest.raises(RemoteCommandError, match="virbr0 of vnet0 has no physical interface"):
        Host(tmp_path, LIBVIRT_NAT, answers).find("vnet0")


# -- the source is a VM of this host --

LEARNED = {"bridge fdb show": f"{SOURCE_MAC} dev {{}} master br0 "}
NEIGHBOURS = (
    nic("eno1", "br0")
    + bridge("br0")
    + tap("vnet0", "br0")
    + tap("vnet1", "br0")
    + container("vethQ0VXKJ", "br0")
)
LIBVIRT_TAP = NEIGHBOURS + link(
    "vnet2", "tun type tap", "br0", mac=SOURCE_MAC.replace("52:", "fe:", 1)
)
OVS_NEIGHBOURS = "".join(
    [
        port("eno1"),
        port("tap100i0", "tun type tap"),
        port("tap101i0", "tun type tap"),
        open_vswitch(
            {"vmbr0": "eno1 tap100i0 tap101i0"},
            {"eno1": {"ofport": "1"}, "tap100i0": {"ofport": "2"}, "tap101i0": {"ofport": "3"}},
        ),
    ]
)
OVS_ATTACHED = OVS_NEIGHBOURS.replace(
    '["map", []], 3]', f'["map", [["attached-mac", "{SOURCE_MAC}"]]], 3]'
)
OVS_LEARNED = {
    "ovs-appctl --timeout=5 fdb/show vmbr0": (
        f" port  VLAN  MAC                Age\n    3     0  {SOURCE_MAC}    4"
    )
}
MACVTAPS = MACVTAP + link("macvtap1", "macvtap mode bridge", other="eno1", mac=SOURCE_MAC)
MACVLAN = MACVTAP + link("web0", "macvlan mode bridge", other="eno1", mac=SOURCE_MAC)
# Through the external switch, by the card.
VEPA = MACVTAPS.replace("mode bridge", "mode vepa")
VLAN_ZONE = "".join(
    [
        nic("eno1", "vmbr0"),
        bridge("vmbr0"),
        vlan("vmbr0.10", "vmbr0", "vnet1"),
        bridge("vnet1"),
        tap("tap100i0", "vnet1"),
        tap("tap200i0", "vmbr0"),
    ]
)
HYPERVISOR_AS_SOURCE = (
    nic("eno1", "br0")
    + link("br0", "bridge forward_delay 0", mac=SOURCE_MAC)
    + tap("vnet0", "br0")
    + tap("vnet1", "br0")
)
VLAN_ZONES = (
    VLAN_ZONE + vlan("vmbr0.20", "vmbr0", "vnet2") + bridge("vnet2") + tap("tap300i0", "vnet2")
)
OWN_ADDRESS = {f"ip -o addr show to {SOURCE}": f"3: br0    inet {SOURCE}/24 scope global br0"}
OTHER_OWN_ADDRESS = {key: answer.replace("br0", "eno1") for key, answer in OWN_ADDRESS.items()}


def learned_on(device: str) -> dict[str, str]:
    return {key: answer.format(device) for key, answer in LEARNED.items()}


@pytest.mark.parametrize(
    ("interfaces", "vif", "answers", "pifs"),
    [
        (NEIGHBOURS, "vnet0", learned_on("vnet1"), "vnet1"),
        (NEIGHBOURS, "vnet0", learned_on("vethQ0VXKJ"), "vethQ0VXKJ"),
        (NEIGHBOURS, "vnet0", learned_on("eno1"), "eno1"),
        (NEIGHBOURS, "vnet0", {}, "eno1"),
        (LIBVIRT_TAP, "vnet0", {}, "vnet2"),
        (OVS_NEIGHBOURS, "tap100i0", OVS_LEARNED, "tap101i0"),
        (OVS_NEIGHBOURS, "tap100i0", {}, "eno1"),
        (OVS_ATTACHED, "tap100i0", {}, "tap101i0"),
        (MACVTAPS, "macvtap0", {}, "macvtap1"),
        (MACVLAN, "macvtap0", {}, "web0"),
        (VEPA, "macvtap0", {}, "eno1"),
        (VLAN_ZONES, "tap100i0", learned_on("tap300i0"), "eno1"),
        (VLAN_ZONE, "tap100i0", learned_on("tap200i0"), "tap200i0"),
        (HYPERVISOR_AS_SOURCE, "vnet0", OWN_ADDRESS, "br0"),
        (HYPERVISOR_AS_SOURCE, "vnet0", OTHER_OWN_ADDRESS, "br0"),
    ],
)
def test_source_on_the_same_host(
    tmp_path: Path, interfaces: str, vif: str, answers: dict[str, str], pifs: str
) -> None:
    host = Host(tmp_path, interfaces, answers)
    assert host.find(vif, {SOURCE: SOURCE_MAC.upper()})[0] == pifs.split()


@pytest.mark.parametrize("neighbour", ["", f"{SOURCE} dev virbr1 lladdr {SOURCE_MAC} REACHABLE "])
def test_source_on_another_bridge_of_the_same_host(tmp_path: Path, neighbour: str) -> None:
    """The host routes between them, and knows the source as a neighbour."""
    answers = {
        **routed("virbr0", "virbr1"),
        "bridge fdb show": f"{SOURCE_MAC} dev vnet5 master virbr1 ",
        f"ip neigh show to {SOURCE}": neighbour,
    }
    host = Host(tmp_path, LIBVIRT_NAT + bridge("virbr1") + tap("vnet5", "virbr1"), answers)
    if neighbour:
        assert host.find("vnet0") == (["vnet5"], netweaver.Route(RouteKind.ROUTED))
    else:
        with pytest.raises(RemoteCommandError, match=r"source is a VM of this host.*: vnet5"):
            host.find("vnet0")


def test_one_of_two_sources_on_the_same_host(tmp_path: Path) -> None:
    host = Host(tmp_path, NEIGHBOURS, learned_on("vnet1"))
    sources = {SOURCE: SOURCE_MAC, "198.51.100.8": "52:54:00:00:00:01"}
    assert host.find("vnet0", sources)[0] == ["eno1", "vnet1"]


# -- nothing is found --


@pytest.mark.parametrize(
    ("vif", "reason"),
    [
        ("vif9.0", "vif9.0 doesn't exist"),
        ("eth1", "eth1 is in no bridge"),
        ("vif5.1", "the bridge br1 of vif5.1 has no physical"),
    ],
)
def test_vif_without_an_uplink(tmp_path: Path, vif: str, reason: str) -> None:
    isolated = bridge("br1") + nic("vif5.1", "br1") + tap("tap5.1", "br1")
    with pytest.raises(RemoteCommandError) as caught:
        Host(tmp_path, BRIDGED + nic("eth1") + isolated, {}).find(vif)
    assert reason in str(caught.value)
    assert "br1, eth0, eth1, tap5.1, vif5.0, vif5.1, xenbr0" in str(caught.value)


def test_the_message_names_other_vms(tmp_path: Path) -> None:
    interfaces = bridge("br1") + tap("vnet0", "br1") + tap("vnet1", "br1")
    with pytest.raises(RemoteCommandError, match=r"source is a VM of this host.*: vnet1"):
        Host(tmp_path, interfaces, {}).find("vnet0")


def test_uplink_of_dpdk(tmp_path: Path) -> None:
    switch = open_vswitch({"br0": "dpdk0 tap100i0"}, {"dpdk0": {"type": "dpdk"}})
    with pytest.raises(RemoteCommandError, match=r"DPDK \(dpdk0\)"):
        Host(tmp_path, tap("tap100i0") + switch, {}).find("tap100i0")


def test_tunnel_without_a_known_carrier(tmp_path: Path) -> None:
    with pytest.raises(RemoteCommandError, match="carries the tunnel vxlan_vnet1"):
        Host(tmp_path, PROXMOX_VXLAN_ZONE, {}).find("tap100i0")


@pytest.mark.parametrize(
    ("interfaces", "vif"),
    [
        (nic("eth0") + bridge("br0") + tap("vnet0", "br0"), "vnet0"),
        (nic("eth0") + bridge("br0") + veth_pair("vnet0", "", "vnet1", "br0"), "vnet0"),
        (nic("eth0"), "eth0"),
        (tap("vnet0"), "vnet0"),
        (nic("eth0") + link("macvtap0", "macvtap mode bridge", other="if9"), "macvtap0"),
        (nic("eth0") + STALE_PORTS.replace("eno1", "eno9", 1), "vnet0"),
    ],
)
def test_eth0_is_not_assumed(tmp_path: Path, interfaces: str, vif: str) -> None:
    host = Host(tmp_path, interfaces, {})
    with pytest.raises(RemoteCommandError):
        netweaver.physical_interfaces(host, (), vif, host.links)


@pytest.mark.parametrize("flags", ["BROADCAST,MULTICAST", "BROADCAST,MULTICAST,DOWN"])
def test_a_port_that_is_down(tmp_path: Path, flags: str) -> None:
    """No packet comes in by it, and tcpdump can't capture there."""
    spare = nic("eno2", "br0").replace("BROADCAST,MULTICAST,UP,LOWER_UP", flags)
    host = Host(tmp_path, nic("eno1", "br0") + spare + bridge("br0") + tap("vnet0", "br0"), {})
    assert host.find("vnet0")[0] == ["eno1"]


def test_the_only_port_is_down(tmp_path: Path) -> None:
    card = nic("eno1", "br0").replace("UP,LOWER_UP", "DOWN")
    host = Host(tmp_path, card + bridge("br0") + tap("vnet0", "br0"), {})
    with pytest.raises(RemoteCommandError, match="eno1, which is down"):
        host.find("vnet0")


def test_a_port_without_a_carrier(tmp_path: Path) -> None:
    flags = "NO-CARRIER,BROADCAST,MULTICAST,UP"
    spare = nic("eno2", "br0").replace("BROADCAST,MULTICAST,UP,LOWER_UP", flags)
    host = Host(tmp_path, nic("eno1", "br0") + spare + bridge("br0") + tap("vnet0", "br0"), {})
    assert host.find("vnet0")[0] == ["eno1", "eno2"]


def test_eth0_is_assumed(tmp_path: Path) -> None:
    """Nothing is known of the way."""
    host = Host(tmp_path, nic("eth0") + nic("eth1") + tap("vnet0"), {})
    pifs, route = netweaver.physical_interfaces(host, (), "vnet0", host.links)
    assert pifs == ["eth0"]
    assert route.kind is RouteKind.ASSUMED
    with pytest.raises(RemoteCommandError):
        netweaver.physical_interfaces(host, ("auto",), "vnet0", host.links)


GENERAL = "2: web0@if3: <UP> mtu 1500 master br0 state UP\\    link/ether 02:00:00:00:00:02 brd ff"


@pytest.mark.parametrize(
    ("details", "kind"),
    [
        ("", ""),
        ("\\    veth", "veth"),
        ("\\    veth ", "veth"),
        ("\\    veth addrgenmode eui64", "veth"),
        ("\\    veth\\    bridge_slave state forwarding", "veth"),
        ("\\    bridge_slave state forwarding", ""),
        ("\\    alias veth 3\\    vxlan id 7", "vxlan"),
        ("\\    vf 0 link/ether 02:00:00:00:00:03", ""),
        ("\\    prog/xdp id 40", ""),
        ("\\    RX:  bytes packets", ""),
    ],
)
def test_kind_of_an_interface(details: str, kind: str) -> None:
    found = netweaver.parse_link(GENERAL + details)
    assert found
    assert found.kind == kind
    assert found.master == "br0"
    assert found.address == "02:00:00:00:00:02"


def test_open_vswitch_is_stopped(tmp_path: Path) -> None:
    """A bridge's uplink is found although ovs-vsctl answers only by an error."""
    host = Host(tmp_path, "", {"ip -o -s -d link": BRIDGED})
    script(tmp_path / "ovs-vsctl", "echo 'database connection failed' >&2; exit 1")
    facts = netweaver.Facts(host(netweaver.FACTS_COMMAND + netweaver.OPEN_VSWITCH_COMMAND))
    links = netweaver.Links(facts.interfaces)
    assert netweaver.find_uplinks(host, "vif5.0", links, {})[0] == ["eth0"]


BUSYBOX = """2: eth0: <UP> mtu 1500 qdisc mq qlen 1000\\    link/ether 02:00:00:00:00:02
3: br0: <UP> mtu 1500 qdisc noqueue qlen 1000\\    link/ether 02:00:00:00:00:02
4: vif5.0: <UP> mtu 1500 qdisc mq master br0 qlen 32\\    link/ether fe:ff:ff:ff:ff:ff
"""


@pytest.mark.parametrize(
    "uplink",
    [
        BUSYBOX.replace("mq qlen", "mq master br0 qlen"),
        BUSYBOX + "5: eth0.5@eth0: <UP> mtu 1500 master br0\\    link/ether 02:00:00:00:00:02\n",
        BUSYBOX.replace("mq qlen", "mq master br1 qlen")
        + "5: br1: <UP> mtu 1500\\    link/ether 02:00:00:00:00:05\n"
        + "6: a@b: <UP> mtu 1500 master br0\\    link/ether 02:00:00:00:00:06\n"
        + "7: b@a: <UP> mtu 1500 master br1\\    link/ether 02:00:00:00:00:07\n",
    ],
)
def test_ip_of_busybox(tmp_path: Path, uplink: str) -> None:
    """It has no option -d, and prints no kinds of interfaces."""
    host = Host(tmp_path, "", {"ip -o link": uplink})
    script(tmp_path / "ovs-vsctl", "exit 1")
    facts = netweaver.Facts(host(netweaver.FACTS_COMMAND + netweaver.OPEN_VSWITCH_COMMAND))
    links = netweaver.Links(facts.interfaces)
    assert netweaver.find_uplinks(host, "vif5.0", links, {})[0] == ["eth0"]
    assert facts.links["vif5.0"].queue_length == 32


# -- hostile and huge answers --

SIZE = 5000


def cycle(kind: str) -> str:
    """Return interfaces of which the last one is stacked on the first one."""
    lines = []
    for number in range(SIZE):
        below = (number + 1) % SIZE
        lines.append(link(f"a{number}", kind, "br0" if number == 0 else "", other=f"a{below}"))
    return "".join(lines)


def ring_of_bridges() -> str:
    """Return bridges that are connected in a ring by cables."""
    lines = []
    for number in range(SIZE // 3):
        following = (number + 1) % (SIZE // 3)
        lines.append(bridge(f"b{number}"))
        lines.append(veth_pair(f"l{number}", f"b{number}", f"r{number}", f"b{following}"))
    return "".join(lines)


@pytest.mark.parametrize(
    "interfaces",
    [
        cycle("vlan protocol 802.1Q id 5") + bridge("br0") + tap("vnet0", "br0"),
        cycle("macvlan mode bridge") + bridge("br0") + tap("vnet0", "br0"),
        ring_of_bridges() + tap("vnet0", "b0"),
        "".join(nic(f"a{number}", f"a{(number + 1) % SIZE}") for number in range(SIZE))
        + tap("vnet0", "a0"),
        "".join(nic(f"a{number}", "br0") for number in range(SIZE)) + tap("vnet0", "br0"),
    ],
)
def test_many_links(tmp_path: Path, interfaces: str) -> None:
    """They take linear time, and end in an error of bounded size."""
    start = time.process_time()
    host = Host(tmp_path, interfaces, {})
    with pytest.raises(RemoteCommandError) as caught:
        host.find("vnet0")
    assert time.process_time() - start < 2.5
    assert len(str(caught.value)) < 2000
    assert max(map(len, host.commands), default=0) < 10_000


def test_many_tunnels(tmp_path: Path) -> None:
    """Check that they are looked up by few commands, none of which this host answers."""
    names = [f"vx{number}" for number in range(2000)]
    lines = [
        link(name, f"vxlan id 7 remote 10.0.{number // 250}.{number % 250} dstport 4789", "br0")
        for number, name in enumerate(names)
    ]
    host = Host(tmp_path, "".join(lines) + bridge("br0") + tap("vnet0", "br0"), {})
    with pytest.raises(RemoteCommandError, match="tunnel"):
        host.find("vnet0")
    assert len(host.commands) < 10


@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_backslashes_in_open_vswitch(tmp_path: Path, shell: str) -> None:
    """The settings are JSON also where the shell's echo knows escapes."""
    rows = [
        ["eth0", "", ["map", []], ["map", [["note", "CORP\\web1"]]], 1],
        ["patch1", "patch", ["map", [["peer", "patch2"]]], ["map", []], 2],
        ["patch2", "patch", ["map", [["peer", "patch1"]]], ["map", []], 1],
    ]
    headings = ["name", "type", "options", "external_ids", "ofport"]
    (tmp_path / "settings").write_text(json.dumps({"headings": headings, "data": rows}))
    bridges = "br-int) echo tap1 patch1 ;; br-ex) echo patch2 eth0 ;;"
    script(
        tmp_path / "ovs-vsctl",
        f"""case "$*" in
*list-br*) echo br-int br-ex ;;
*br-to-parent*) for name; do :; done; echo $name ;;
*list-ifaces*) for name; do :; done; case $name in {bridges} esac ;;
*) cat {tmp_path}/settings ;; esac""",
    )
    done = subprocess.run(
        [shell, "-c", netweaver.OPEN_VSWITCH_COMMAND],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    answer = port("eth0") + port("tap1") + done.stdout.partition("\n")[2]
    found, _ = Host(tmp_path, answer, {}).find("tap1")
    assert found == ["eth0"]


@pytest.mark.parametrize("options", ["[]", "5", '["map"]', '["map", 5]'])
def test_damaged_settings_of_open_vswitch(options: str) -> None:
    headings = '["name", "type", "options", "external_ids", "ofport"]'
    data = f'[["eth0", "", {options}, ["map", []], 1]]'
    answer = f'{BRIDGED}ovs-interfaces {{"headings": {headings}, "data": {data}}}\n'
    assert "eth0" in netweaver.Links(answer).by_name


def test_open_vswitch_does_not_answer() -> None:
    """The kernel shows which interfaces belong to it, but not to which of its bridges."""
    links = netweaver.Links(port("eth1") + internal("ovs-system") + port("vif5.0"))
    assert netweaver.find_uplinks(lambda *words: "", "vif5.0", links, {})[0] == ["eth1"]
