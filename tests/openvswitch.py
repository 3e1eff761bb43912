"""A lab with a real Open vSwitch, whose datapath runs in its own process.

It needs no kernel module.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field

from laboratory import OUTER, Lab, not_installed, wait_until

NEEDED = ("ovs-vsctl", "ovs-appctl", "ovsdb-tool", "ovsdb-server", "ovs-vswitchd")


def missing() -> str | None:
    """Return why the lab can't be built here; None if it can."""
    return not_installed(NEEDED)


@dataclass(frozen=True)
class Layout:
    """The switches between eth0 and vif5.0."""

    bridges: dict[str, tuple[str, ...]]  # of Open vSwitch: their ports, with settings
    settings: tuple[str, ...] = ()  # further commands of ovs-vsctl
    commands: str = ""  # of the shell, at the end
    linux_bridges: dict[str, tuple[str, ...]] = field(default_factory=dict)
    pifs: tuple[str, ...] = ("eth0",)
    tag: int | None = None  # of the VLAN on eth0
    tunnel_port: int | None = None  # of VXLAN


INTERNAL = "-- set interface {0} type=internal"
PATCH = "-- set interface {0} type=patch options:peer={1}"
TUNNEL = (
    "vxlan0 -- set interface vxlan0 type=vxlan "
    f"options:remote_ip={OUTER}.1 options:key=7 options:dst_port={{}}"
)
CARRIER = f"ip addr flush dev eth0; ip addr add {OUTER}.250/24 dev br-phy; ip link set br-phy up"
LAYOUTS = {
    "patch ports": Layout(
        {
            "br-ex": ("eth0", "to-int " + PATCH.format("to-int", "to-ex")),
            "br-int": ("vif5.0", "to-ex " + PATCH.format("to-ex", "to-int")),
        },
    ),
    "bond": Layout(
        {"br0": ("vif5.0",)},
        settings=("add-bond br0 bond0 eth0 eth1 bond_mode=active-backup",),
        pifs=("eth0", "eth1"),
    ),
    "access port": Layout({"br0": ("eth0", "vif5.0 tag=7")}, tag=7),
    "tunnel": Layout(
        {"br-phy": ("eth0",), "br-int": ("vif5.0", TUNNEL.format(4789))},
        commands=CARRIER,
        tunnel_port=4789,
    ),
    "tunnel on another port": Layout(
        {"br-phy": ("eth0",), "br-int": ("vif5.0", TUNNEL.format(14790))},
        commands=CARRIER,
        tunnel_port=14790,
    ),
    "firewall of Proxmox": Layout(
        {"vmbr0": ("eth0", "fwln105o0 " + INTERNAL.format("fwln105o0"))},
        linux_bridges={"fwbr105i0": ("fwln105o0", "vif5.0")},
    ),
    "VLAN zone of Proxmox": Layout(
        {"vmbr0": ("eth0", "ln_vnet1 tag=7 " + INTERNAL.format("ln_vnet1"))},
        linux_bridges={"vnet1": ("ln_vnet1", "vif5.0")},
        tag=7,
    ),
}


class OpenVSwitchLab(Lab):
    """The lab with one of these layouts."""

    def __init__(self, layout: str) -> None:
        self.layout = LAYOUTS[layout]
        self._daemons: list[subprocess.Popen[bytes]] = []
        tags = [] if self.layout.tag is None else [self.layout.tag]
        if self.layout.tunnel_port is not None:
            self.tunnel_port = self.layout.tunnel_port
        super().__init__(tags=tags, overlay=self.layout.tunnel_port is not None)

    def _ours(self) -> list[int]:
        return [*super()._ours(), *(process.pid for process in self._daemons)]

    def _switch(self) -> None:
        self._start_open_vswitch()
        if "eth1" in self.layout.pifs:
            self._link(self.hv.namespace, "eth1", self.client, "d-hv1")
            self._ip("link", "set", "d-hv1", "master", "data", namespace=self.client)
        for bridge, ports in self.layout.bridges.items():
            words = f"add-br {bridge} -- set bridge {bridge} datapath_type=netdev"
            for port in ports:
                words += f" -- add-port {bridge} {port}"
            self._configure(words)
        for words in self.layout.settings:
            self._configure(words)
        for bridge, ports in self.layout.linux_bridges.items():
            self._bridge(self.hv.namespace, bridge, *ports)
            for port in ports:
                self.hv.run("ip", "link", "set", port, "up")
        if self.layout.commands:
            self.hv.run("sh", "-ec", self.layout.commands)

    def _configure(self, words: str) -> None:
        self.hv.run("ovs-vsctl", "--timeout=20", *words.split())

    def _start_open_vswitch(self) -> None:
        self._daemon(
            "ovsdb-tool create /run/openvswitch/conf.db && "
            "exec ovsdb-server /run/openvswitch/conf.db "
            "--remote=punix:/run/openvswitch/db.sock --pidfile"
        )
        initialize = ("ovs-vsctl", "--timeout=5", "--no-wait", "init")
        wait_until(lambda: self.hv.succeeds(*initialize), "ovsdb-server")
        self._daemon("exec ovs-vswitchd --disable-system --pidfile")

    def _daemon(self, script: str) -> None:
        command = self.hv.command("sh", "-c", f"mkdir -p /run/openvswitch && {script}")
        with open(self.directory / "openvswitch.log", "ab") as log:
            daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._daemons.append(daemon)
