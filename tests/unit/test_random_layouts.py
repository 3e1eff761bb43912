"""Random ways from a VM's interface out of the host, among switches that don't belong to them."""

from __future__ import annotations

import random

from links import bridge, container, internal, link, nic, open_vswitch

import netweaver


class Layout:
    """A host that grows from the VM's interface outwards, to its `pifs`."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.lines: list[str] = []
        self.switch_ports: dict[str, list[str]] = {}  # of Open vSwitch
        self.settings: dict[str, dict[str, str]] = {}
        self.pifs: list[str] = []
        self._count = 0
        switch = self.add_switch()
        self.attach(switch, "vnet0", "tun type tap")
        for _ in range(self.chance.randrange(5)):
            switch = self.connect(switch)
        self.add_uplink(switch)
        self.add_uplink(self.add_switch(), is_ours=False)
        self.chance.shuffle(self.lines)

    def name(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}{self._count}"

    def add_switch(self) -> str:
        """Add a switch of some kind, with other guests."""
        if self.chance.random() < 0.5:
            switch = self.name("br")
            self.lines.append(bridge(switch))
        else:
            switch = self.name("ovs")
            self.lines.append(internal(switch))
            self.switch_ports[switch] = []
        for _ in range(self.chance.randrange(3)):
            self.attach(switch, self.name("guest"), "tun type tap")
            if switch not in self.switch_ports:
                self.lines.append(container(self.name("vethQ"), switch))
        return switch

    def attach(self, switch: str, name: str, kind: str = "", other: str = "") -> None:
        """Add an interface that is a port of a switch."""
        if switch in self.switch_ports:
            self.switch_ports[switch].append(name)
            self.lines.append(link(name, kind, "ovs-system", other=other))
        else:
            self.lines.append(link(name, kind, switch, other=other))

    def connect(self, inner: str) -> str:
        """Add another switch, and connect it with one; return it."""
        outer = self.add_switch()
        first = self.name("x")
        second = self.name("y")
        kinds = ["cable", "vlan"]
        if outer in self.switch_ports:
            kinds.append("internal" if inner not in self.switch_ports else "patch")
        kind = self.chance.choice(kinds)
        if kind == "cable":
            self.attach(inner, first, "veth", second)
            self.attach(outer, second, "veth", first)
        elif kind == "vlan":
            self.attach(inner, first, "vlan protocol 802.1Q id 7", outer)
        elif kind == "internal":
            self.attach(inner, first, "openvswitch")
            self.switch_ports[outer].append(first)
            self.settings[first] = {"type": "internal"}
        else:
            for end, peer, switch in ((first, second, inner), (second, first, outer)):
                self.switch_ports[switch].append(end)
                self.settings[end] = {"type": "patch", "peer": peer}
        return outer

    def add_uplink(self, switch: str, is_ours: bool = True) -> None:
        """Add a card, a bond, or a VLAN of one, as a port of a switch."""
        lower = self.name("eno")
        cards = [lower]
        is_bond = self.chance.random() < 0.5
        if is_bond:
            lower = self.name("bond")
            cards.append(self.name("eno"))
        is_tagged = self.chance.random() < 0.5
        for card in cards:
            if is_bond:
                self.lines.append(nic(card, lower))
            elif is_tagged:
                self.lines.append(nic(card))
            else:
                self.attach(switch, card)
        if is_tagged:
            self.attach(switch, f"{lower}.8", "vlan protocol 802.1Q id 8", lower)
        if is_bond and is_tagged:
            self.lines.append(link(lower, "bond mode 802.3ad"))
        elif is_bond:
            self.attach(switch, lower, "bond mode 802.3ad")
        if is_ours:
            self.pifs = cards

    def text(self) -> str:
        bridges = {switch: " ".join(ports) for switch, ports in self.switch_ports.items()}
        return "".join(self.lines) + open_vswitch(bridges, self.settings)


def test_random_layouts() -> None:
    for seed in range(100):
        layout = Layout(seed)
        links = netweaver.Links(layout.text())
        pifs, route = netweaver.find_uplinks(lambda command, hint="": "", "vnet0", links, {})
        assert (seed, pifs) == (seed, sorted(layout.pifs))
        assert route == netweaver.Route(netweaver.RouteKind.SWITCHED)
