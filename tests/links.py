"""Interfaces as `ip -o -s -d link` and Open vSwitch print them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import count

_indexes = count(1)
NOT_OPTIONS = ("type", "ofport", "mac")
_COUNTERS = (
    "\\    RX:  bytes packets errors dropped  missed   mcast           "
    "\\       8000     100      0       {rx}       0       0 "
    "\\    TX:  bytes packets errors dropped carrier collsns           "
    "\\       9000     110      0       {tx}       0       0 "
)


def link(
    name: str,
    kind: str = "",
    master: str = "",
    *,
    other: str = "",
    mac: str = "02:00:00:00:00:01",
    more: str = "",
) -> str:
    """Return the line of an interface.

    `kind` begins its details ("vlan protocol 802.1Q id 5"), `other` is what follows "@" in its
    name, and `more` follows the hardware's address.
    """
    full_name = f"{name}@{other}" if other else name
    membership = f"master {master} " if master else ""
    medium = "loopback" if name == "lo" else "ether"
    line = (
        f"{next(_indexes)}: {full_name}: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 "
        f"qdisc fq_codel {membership}state UP mode DEFAULT group default qlen 1000"
        f"\\    link/{medium} {mac} brd ff:ff:ff:ff:ff:ff {more}"
        "promiscuity 1  allmulti 1 minmtu 68 maxmtu 9000 "
    )
    if kind:
        line += f"\\    {kind} "
    if master:
        line += "\\    bridge_slave state forwarding priority 32 cost 2 hairpin off "
    return f"{line}addrgenmode none numtxqueues 4 numrxqueues 4 gso_max_size 65536 \n"


def with_counters(line: str, rx_dropped: int = 0, tx_dropped: int = 0) -> str:
    """Return an interface's line as the option -s makes it."""
    return line.rstrip("\n") + _COUNTERS.format(rx=rx_dropped, tx=tx_dropped) + "\n"


def nic(name: str, master: str = "") -> str:
    """Return the line of a network card."""
    return link(name, "", master)


def bridge(name: str, master: str = "") -> str:
    return link(name, "bridge forward_delay 0 hello_time 200 stp_state 0", master)


def tap(name: str, master: str = "") -> str:
    return link(name, "tun type tap pi off vnet_hdr on persist off", master)


def vlan(name: str, lower: str, master: str = "", tag: int = 5) -> str:
    return link(name, f"vlan protocol 802.1Q id {tag} <REORDER_HDR>", master, other=lower)


def veth_pair(first: str, first_master: str, second: str, second_master: str) -> str:
    """Return the lines of both ends of a virtual cable."""
    return link(first, "veth", first_master, other=second) + link(
        second, "veth", second_master, other=first
    )


def container(name: str, master: str) -> str:
    """Return the line of a veth whose other end is in another namespace."""
    return link(name, "veth", master, other="if2", more="link-netnsid 0 ")


def internal(name: str, master: str = "") -> str:
    """Return the line of an internal port of Open vSwitch."""
    return link(name, "openvswitch", master)


def port(name: str, kind: str = "") -> str:
    """Return the line of a port of Open vSwitch's kernel datapath."""
    return link(name, kind, "ovs-system").replace("bridge_slave state", "openvswitch_slave state")


def open_vswitch(
    bridges: Mapping[str, str],
    settings: Mapping[str, Mapping[str, str]],
) -> str:
    """Return what OPEN_VSWITCH_COMMAND prints.

    `bridges` are the ports by bridge ("xapi5=xenbr0" for a fake one and its parent), and `settings`
    the options by interface, with its "type", "ofport" and "mac".
    """
    lines = []
    for name, ports in bridges.items():
        bridge_name, _, parent = name.partition("=")
        lines.append(f"ovs {parent or bridge_name} {bridge_name} {ports}")
    headings = ["name", "type", "options", "external_ids", "ofport"]
    rows = []
    for name, given in settings.items():
        options = [[key, value] for key, value in given.items() if key not in NOT_OPTIONS]
        identifiers = [["attached-mac", given["mac"]]] if "mac" in given else []
        port_number = int(given.get("ofport", "0")) or ["set", []]
        kind = given.get("type", "")
        rows.append([name, kind, ["map", options], ["map", identifiers], port_number])
    lines.append(f"ovs-interfaces {json.dumps({'data': rows, 'headings': headings})}")
    return "\n".join(lines) + "\n"
