#!/usr/bin/env python3
"""A real Xen in QEMU: dom0 is a Debian, and a paravirtual guest has two netback interfaces.

    python tests/xen.py                     a shell on the client, in the lab
    python tests/xen.py COMMAND [ARG...]    a command there

      client 10.85.0.1 ---+
      src1   10.85.0.3 ---+-- lan0 -- eth0 - xenbr0 (Linux)        - vif<n>.0 -- 10.85.0.100 guest
             10.85.1.3 ------ lan1 -- eth1 - ovsbr0 (Open vSwitch) - web1net  -- 10.85.1.100
                                      `------- dom0 10.85.0.2 --------'

Open vSwitch has the kernel's datapath there.  dom0 has one processor: with two, Xen's clock stands
still between them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import machines
from laboratory import Host, Network, missing, run_in, wait_until

NAME = "instance-3b1f6c1e-52f4-4c55-8f4e-8f0c5d0a7a11"
VIFNAME = "web1net"  # of the guest's second interface, as xl.cfg may say
LAN = ("10.85.0", "10.85.1")
LAN6 = "fd85:0:"
QEMU = (
    "qemu-system-x86_64 -machine pc -accel tcg,thread=multi -cpu qemu64 -smp 1 -m 2048 "
    "-nodefaults -no-reboot -display none"
).split()
VIFS = (
    "mac=00:16:3e:85:00:64,bridge=xenbr0",
    f"mac=00:16:3e:85:01:64,bridge=ovsbr0,script=vif-openvswitch,vifname={VIFNAME}",
)
GUEST = f"""name = "{NAME}"
type = "pv"
kernel = "/guest/vmlinux"
ramdisk = "/guest/guest.initrd"
memory = 192
vcpus = 1
on_crash = "preserve"
vif = ["{VIFS[0]}", "{VIFS[1]}"]
extra = "{{extra}}"
"""


SSH_OPTIONS = (
    "StrictHostKeyChecking=no",
    "UserKnownHostsFile=/dev/null",
    "LogLevel=ERROR",
    "BatchMode=yes",
    "ConnectTimeout=5",
    "ControlMaster=auto",
    "ControlPersist=600",
)
# Processes of the kernel, of sshd, and of xl, which leaves one for each guest.
USUAL_PROCESSES = r"\[|sshd:|ps -e|(/usr/lib/xen-[\d.]+/bin/)?xl "


class Dom0(Host):
    """The control domain, by SSH."""

    def __init__(self, client: str, address: str, directory: Path, key: Path) -> None:
        super().__init__("dom0", "", address, directory)
        self._client = client
        self._key = key
        self._usual: set[str] = set()

    def command(self, *words: str) -> list[str]:
        command = ["ip", "netns", "exec", self._client, "ssh", "-F", "none", "-i", str(self._key)]
        for option in (*SSH_OPTIONS, f"ControlPath={self.directory}/ssh"):
            command.append(f"-o{option}")
        return [*command, f"root@{self.address}", *words]

    def settle(self) -> None:
        """Take all that runs and is there now for no leftover."""
        self._usual = set(self._all_processes().values()) | set(self._all_files())

    def processes(self) -> dict[int, str]:
        return {pid: line for pid, line in self._all_processes().items() if line not in self._usual}

    def files(self) -> list[str]:
        return [path for path in self._all_files() if path not in self._usual]

    def _all_processes(self) -> dict[int, str]:
        processes = {}
        for line in self.run("ps", "-e", "-o", "pid=,args=").splitlines():
            pid, _, command = line.strip().partition(" ")
            command = command.strip()
            if not re.match(USUAL_PROCESSES, command):
                processes[int(pid)] = command
        return processes

    def _all_files(self) -> list[str]:
        return self.run("find", "/tmp", "/root", "-mindepth", "1").split()


class XenLab(Network):
    """The lab, booted, with the guest running."""

    name = NAME
    hv: Dom0

    def _build(self) -> None:
        images = machines.images()
        for name in ("key", "key.pub"):
            shutil.copy(images / name, self.directory / name)
        self._console = self.directory / "console.log"
        self.destinations = [f"{lan}.100" for lan in LAN]
        self.destination = self.destinations[0]
        self.destination6 = f"{LAN6}:100"
        self.hv = Dom0(self.client, f"{LAN[0]}.2", self.directory, self.key)
        self.sources = [self._host("src1", f"{LAN[0]}.3")]
        for namespace in (self.client, self.source.namespace):
            self._ip("netns", "add", namespace)
            self._ip("link", "set", "lo", "up", namespace=namespace)
        for number, lan in enumerate(LAN):
            addresses = [f"{lan}.3/24"]
            if number == 0:
                addresses.append(f"{LAN6}:3/64")
            interface = f"eth{number}"
            self._link(self.source.namespace, interface, self.client, f"src{number}", addresses)
            self._ip("tuntap", "add", f"tap{number}", "mode", "tap", namespace=self.client)
            self._ip("link", "set", f"tap{number}", "up", namespace=self.client)
            self._bridge(self.client, f"lan{number}", f"src{number}", f"tap{number}")
        self._ip("addr", "add", f"{LAN[0]}.1/24", "dev", "lan0", namespace=self.client)
        self._start_sshd(self.source)
        self._boot(images)
        self.create_guest()
        self.wait_for_guest()
        self.hv.settle()

    def _boot(self, images: Path) -> None:
        dom0 = (
            f"{images}/vmlinux console=hvc0 root=/dev/vda ro quiet loglevel=4 net.ifnames=0 "
            f"mitigations=off lab.address={self.hv.address}/24,{images}/dom0.initrd"
        )
        xen = "dom0_mem=1024M,max:1024M dom0_max_vcpus=1 console=com1 com1=115200,8n1 loglvl=info"
        command = ["ip", "netns", "exec", self.client, *QEMU]
        command += ["-serial", f"file:{self._console}"]
        command += ["-kernel", str(images / "xen"), "-append", xen, "-initrd", dom0]
        command += ["-drive", f"file={images / 'dom0.disk'},if=virtio,format=raw,snapshot=on"]
        for number in range(len(LAN)):
            tap = f"tap,id=n{number},ifname=tap{number},script=no,downscript=no"
            card = f"e1000,netdev=n{number},mac=52:54:00:85:0{number}:02"
            command += ["-netdev", tap, "-device", card]
        with open(self.directory / "qemu.log", "wb") as log:
            self._qemu = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": str(self.directory)},
            )
        try:
            wait_until(self._is_up, "dom0", 120)
        except TimeoutError:
            console = self._console.read_text(errors="replace").splitlines()
            end = "\n".join(console[-20:])
            raise RuntimeError(f"Xen doesn't boot; the end of its console:\n{end}") from None

    def _is_up(self) -> bool:
        if self._qemu.poll() is not None:
            raise RuntimeError(f"QEMU ended: {(self.directory / 'qemu.log').read_text()}")
        return self.hv.succeeds("test", "-e", "/run/is-up")

    # -- the guest --

    def ensure_guest(self) -> None:
        """Make a new guest, unless there is one that answers."""
        domains = [line.split()[0] for line in self.hv.run("xl", "list").splitlines()[2:]]
        with contextlib.suppress(TimeoutError):
            if domains == [NAME]:
                self.wait_for_guest(30)
                return
        for domain in domains:
            self.hv.run("xl", "destroy", domain)
        self.create_guest()
        self.wait_for_guest()

    def create_guest(self, paused: bool = False) -> None:
        """Start a guest; a paused one does nothing yet."""
        first, second = self.destinations
        extra = f"console=hvc0 quiet mitigations=off address0={first}/24 address1={second}/24"
        config = GUEST.format(extra=f"{extra} address6={self.destination6}/64")
        option = "-p" if paused else ""
        file = "/guest/xl.cfg"
        self.hv.run(f"cat >{file} <<'END'\n{config}END\nxl create {option} {file}")

    def wait_for_guest(self, seconds: float = 60) -> None:
        for address in (*self.destinations, self.destination6):
            wait_until(
                partial(self.source.answered_by, address),
                f"the guest's answer from {address}",
                seconds,
            )

    def domain(self, name: str = NAME) -> int:
        return int(self.hv.run("xl", "domid", name))

    def counters(self) -> dict[str, int]:
        """Return the guest's counters of /proc/net/snmp and snmp6, by names as Ip.InReceives."""
        text = self.source.run("sh", "-c", f"busybox nc {self.destination} 5003 </dev/null")
        counters = {}
        names: list[str] = []
        for line in text.splitlines():
            words = line.split()
            if len(words) == 2 and not words[0].endswith(":"):  # of snmp6
                counters[words[0]] = int(words[1])
            elif names and words[:1] == names[:1]:
                for name, value in zip(names[1:], words[1:]):
                    counters[f"{words[0].removesuffix(':')}.{name}"] = int(value)
            else:
                names = words
        return counters


def main() -> int:
    reason = missing() or machines.missing()
    if reason:
        print(f"xen: {reason}", file=sys.stderr)
        return 1
    print(
        "Xen boots: that takes a minute, and another one when its image must be built.",
        file=sys.stderr,
    )
    with XenLab() as lab:
        return run_in(lab, sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
