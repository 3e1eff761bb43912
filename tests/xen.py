#!/usr/bin/env python3
"""A real Xen in QEMU, without hardware's help: dom0 is a Debian, and a paravirtual guest has two netback interfaces.

    python tests/xen.py                     a shell on the client, in the lab
    python tests/xen.py COMMAND [ARG...]    a command there

      client 10.85.0.1 ---+
      src1   10.85.0.3 ---+-- lan0 -- eth0 - xenbr0 (Linux)        - vif<n>.0 -- 10.85.0.100 guest
             10.85.1.3 ------ lan1 -- eth1 - ovsbr0 (Open vSwitch) - web1net  -- 10.85.1.100
                                      `------- dom0 10.85.0.2 --------'

Open vSwitch has the kernel's datapath there.  dom0 has one processor: with two, Xen's clock stands still between them.
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
from lab import Host, Network, missing, run_in, wait_until

NAME = "instance-3b1f6c1e-52f4-4c55-8f4e-8f0c5d0a7a11"
VIFNAME = "web1net"                                  # of the guest's second interface, as xl.cfg may say
LAN, LAN6 = ("10.85.0", "10.85.1"), "fd85:0:"


class Dom0(Host):
    """The control domain, by SSH."""

    def __init__(self, client: str, address: str, directory: Path, key: Path) -> None:
        super().__init__("dom0", "", address, directory)
        self._client, self._key = client, key
        self._usual: set[str] = set()

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self._client, "ssh", "-F", "none", "-i", str(self._key), *(
            f"-o{option}" for option in (
                "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes",
                "ConnectTimeout=5", "ControlMaster=auto", f"ControlPath={self.directory}/ssh", "ControlPersist=600")),
            f"root@{self.address}", *words]

    def settle(self) -> None:
        """What runs and is there now is no leftover."""
        self._usual = set(self._all_processes().values()) | set(self._all_files())

    def processes(self) -> dict[int, str]:
        return {pid: line for pid, line in self._all_processes().items() if line not in self._usual}

    def files(self) -> list[str]:
        return [path for path in self._all_files() if path not in self._usual]

    def _all_processes(self) -> dict[int, str]:
        """Without the kernel's own, those of sshd, and xl's, one of which stays for each guest."""
        lines = [line.strip().partition(" ") for line in self.run("ps", "-e", "-o", "pid=,args=").splitlines()]
        return {int(pid): text.strip() for pid, _, text in lines
                if not re.match(r"\[|sshd:|ps -e|(/usr/lib/xen-[\d.]+/bin/)?xl ", text.strip())}

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
        self.destination, self.destination6 = self.destinations[0], f"{LAN6}:100"
        self.hv = Dom0(self.client, f"{LAN[0]}.2", self.directory, self.key)
        self.sources = [self._host("src1", f"{LAN[0]}.3")]
        for namespace in (self.client, self.source.namespace):
            self._ip("netns", "add", namespace)
            self._ip("link", "set", "lo", "up", namespace=namespace)
        for number, lan in enumerate(LAN):
            self._link(self.source.namespace, f"eth{number}", self.client, f"src{number}",
                       [f"{lan}.3/24", *([f"{LAN6}:3/64"] if number == 0 else [])])
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
        cards = (word for number in range(2) for word in (
            "-netdev", f"tap,id=n{number},ifname=tap{number},script=no,downscript=no",
            "-device", f"e1000,netdev=n{number},mac=52:54:00:85:0{number}:02"))
        dom0 = (f"{images}/vmlinux console=hvc0 root=/dev/vda ro quiet loglevel=4 net.ifnames=0 mitigations=off "
                f"lab.address={self.hv.address}/24,{images}/dom0.initrd")
        with open(self.directory / "qemu.log", "wb") as log:
            self._qemu = subprocess.Popen(
                ["ip", "netns", "exec", self.client, "qemu-system-x86_64", "-machine", "pc", "-accel",
                 "tcg,thread=multi", "-cpu", "qemu64", "-smp", "1", "-m", "2048", "-nodefaults", "-no-reboot",
                 "-display", "none", "-serial", f"file:{self._console}", "-kernel", str(images / "xen"),
                 "-append", "dom0_mem=1024M,max:1024M dom0_max_vcpus=1 console=com1 com1=115200,8n1 loglvl=info",
                 "-initrd", dom0, "-drive", f"file={images / 'dom0.disk'},if=virtio,format=raw,snapshot=on", *cards],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(self.directory)})
        try:
            wait_until(self._is_up, "dom0", 120)
        except TimeoutError:
            raise RuntimeError("Xen doesn't boot; the end of its console:\n"
                               + "\n".join(self._console.read_text(errors="replace").splitlines()[-20:])) from None

    def _is_up(self) -> bool:
        if self._qemu.poll() is not None:
            raise RuntimeError(f"QEMU ended: {(self.directory / 'qemu.log').read_text()}")
        return self.hv.succeeds("test", "-e", "/run/is-up")

    # -- the guest --

    def ensure_guest(self) -> None:
        """Makes a new guest, unless there is one as it should be."""
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
        """Starts a guest; `paused` is before it does anything."""
        vifs = ", ".join(f'"mac=00:16:3e:85:0{number}:64,{words}"' for number, words in enumerate(
            ("bridge=xenbr0", f"bridge=ovsbr0,script=vif-openvswitch,vifname={VIFNAME}")))
        config = (f'name = "{NAME}"\ntype = "pv"\nkernel = "/guest/vmlinux"\nramdisk = "/guest/guest.initrd"\n'
                  f'memory = 192\nvcpus = 1\non_crash = "preserve"\nvif = [{vifs}]\nextra = "console=hvc0 quiet '
                  f"mitigations=off address0={self.destinations[0]}/24 address1={self.destinations[1]}/24 "
                  f'address6={self.destination6}/64"\n')
        self.hv.run(f"cat >/guest/xl.cfg <<'END'\n{config}END\nxl create {'-p' if paused else ''} /guest/xl.cfg")

    def wait_for_guest(self, seconds: float = 60) -> None:
        for address in (*self.destinations, self.destination6):
            wait_until(partial(self.source.answered_by, address), f"the guest's answer from {address}", seconds)

    def domain(self, name: str = NAME) -> int:
        return int(self.hv.run("xl", "domid", name))

    def counters(self) -> dict[str, int]:
        """The guest's own: those of /proc/net/snmp and snmp6, as Ip.InReceives or Icmp6InEchos."""
        text = self.source.run("sh", "-c", f"busybox nc {self.destination} 5003 </dev/null")
        lines = [line.split() for line in text.splitlines()]
        rows = [line for line in lines if line and line[0].endswith(":")]
        found = {f"{names[0][:-1]}.{name}": int(value) for names, values in zip(rows[::2], rows[1::2])
                 for name, value in zip(names[1:], values[1:])}
        return found | {line[0]: int(line[1]) for line in lines if len(line) == 2 and not line[0].endswith(":")}


def main() -> int:
    reason = missing() or machines.missing()
    if reason:
        print(f"xen: {reason}", file=sys.stderr)
        return 1
    print("Xen boots: that takes a minute, and another one when its image must be built.", file=sys.stderr)
    with XenLab() as lab:
        return run_in(lab, sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
