"""A lab whose hypervisor has a real Open vSwitch, with the datapath in its own process: that takes no kernel module."""
from __future__ import annotations

import subprocess

from lab import OUTER, Lab, not_installed, wait_until

NEEDED = ("ovs-vsctl", "ovs-appctl", "ovsdb-tool", "ovsdb-server", "ovs-vswitchd")


def missing() -> str | None:
    """Why the lab can't be built here; None if it can."""
    return not_installed(NEEDED)


class OpenVSwitchLab(Lab):
    """The lab with one of these layouts.

    patch: the vif in br-int, eth0 in br-ex, and patch ports between; bond: eth0 and eth1 are one; tag: the vif is an
    access port, so that its traffic is tagged on eth0; vxlan: a tunnel over br-phy, which has eth0 and its address.
    """

    def __init__(self, layout: str) -> None:
        self._layout = layout
        self._daemons: list[subprocess.Popen[bytes]] = []
        super().__init__(tags=[7] if layout == "tag" else [], overlay=layout == "vxlan")

    def _ours(self) -> list[int]:
        return [*super()._ours(), *(process.pid for process in self._daemons)]

    def _switch(self) -> None:
        self._daemon("ovsdb-tool create /run/openvswitch/conf.db && exec ovsdb-server /run/openvswitch/conf.db "
                     "--remote=punix:/run/openvswitch/db.sock --pidfile")
        wait_until(lambda: self.hv.succeeds("ovs-vsctl", "--timeout=5", "--no-wait", "init"), "ovsdb-server")
        self._daemon("exec ovs-vswitchd --disable-system --pidfile")
        for commands in {
            "patch": ["br-ex eth0", "br-int vif5.0", "add-port br-ex to-int -- set interface to-int type=patch "
                      "options:peer=to-ex -- add-port br-int to-ex -- set interface to-ex type=patch "
                      "options:peer=to-int"],
            "bond": ["br0 vif5.0", "add-bond br0 bond0 eth0 eth1 bond_mode=active-backup"],
            "tag": ["br0 eth0", "add-port br0 vif5.0 tag=7"],
            "vxlan": ["br-phy eth0", "br-int vif5.0", "add-port br-int vxlan0 -- set interface vxlan0 type=vxlan "
                      f"options:remote_ip={OUTER}.1 options:key=7"],
        }[self._layout]:
            words = commands.split()
            if not words[0].startswith("add-"):      # a bridge with a port
                words = ["add-br", words[0], "--", "set", "bridge", words[0], "datapath_type=netdev", "--", "add-port",
                         *words]
            self._before(words)
            self.hv.run("ovs-vsctl", "--timeout=20", *words)
        if self._layout == "vxlan":
            self.hv.run("sh", "-ec", f"ip addr flush dev eth0; ip addr add {OUTER}.250/24 dev br-phy; "
                                     "ip link set br-phy up")

    def _before(self, words: list[str]) -> None:
        if "bond0" in words:
            self._link(self.hv.namespace, "eth1", self.client, "d-hv1")
            self._ip("link", "set", "d-hv1", "master", "data", namespace=self.client)

    def _daemon(self, script: str) -> None:
        with open(self.directory / "openvswitch.log", "ab") as log:
            self._daemons.append(subprocess.Popen(
                self.hv.command("sh", "-c", f"mkdir -p /run/openvswitch && {script}"), stdin=subprocess.DEVNULL,
                stdout=log, stderr=log))
