"""A lab whose hypervisor has a real libvirt, with a guest that QEMU emulates."""

from __future__ import annotations

import subprocess

import machines
from laboratory import DATA6, Lab, not_installed, wait_until

NEEDED = ("libvirtd", "virsh")
NAME = "web 1"
# libvirtd's own directories, which are the machine's otherwise, and a driver that needs none of
# its services.
LIBVIRTD = """
for directory in /run/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt; do
  mkdir -p $directory && mount -t tmpfs none $directory || exit
done
cat >/etc/libvirt/qemu.conf <<'END'
security_driver = "none"
user = "root"
group = "root"
cgroup_controllers = []
stdio_handler = "file"
namespaces = []
END
echo 'auth_unix_rw = "none"' >/etc/libvirt/libvirtd.conf
exec libvirtd -f /etc/libvirt/libvirtd.conf -p /run/libvirt/libvirtd.pid
"""


def missing() -> str | None:
    """Return why the lab can't be built here; None if it can."""
    return not_installed(NEEDED)


class KvmLab(Lab):
    """The lab with a domain on br0, in which eth0 is.

    Its second interface is on br1, which leads nowhere.
    """

    name = NAME
    libvirt_uri = "qemu:///system"

    def _ours(self) -> list[int]:
        return [
            pid
            for pid, line in self.hv.processes().items()
            if "libvirtd" in line or "qemu-system" in line
        ]

    def _guest(self) -> None:
        """Do nothing: the bridge comes with the switch."""

    def _switch(self) -> None:
        self._bridge(self.hv.namespace, "br0", "eth0")
        self._bridge(self.hv.namespace, "br1")
        with open(self.directory / "libvirtd.log", "ab") as log:
            subprocess.Popen(
                self.hv.command("sh", "-c", LIBVIRTD),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(lambda: self.hv.succeeds("virsh", "-c", self.libvirt_uri, "list"), "libvirtd")
        for name in (NAME, "halted"):
            (self.hv.directory / "tmp" / "domain.xml").write_text(self._domain(name))
            self.virsh("define", "/tmp/domain.xml")
        (self.hv.directory / "tmp" / "domain.xml").unlink()
        self.start_guest()

    def virsh(self, *words: str) -> str:
        return self.hv.run("virsh", "-c", self.libvirt_uri, "-q", *words)

    def _domain(self, name: str) -> str:
        images = machines.images()
        interfaces = "".join(
            f"<interface type='bridge'><source bridge='{bridge}'/><model type='virtio'/>"
            "</interface>"
            for bridge in ("br0", "br1")
        )
        return (
            f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>192</memory>"
            "<vcpu>1</vcpu><os>"
            f"<type arch='x86_64' machine='pc'>hvm</type><kernel>{images}/vmlinuz</kernel>"
            f"<initrd>{images}/guest.initrd</initrd><cmdline>console=ttyS0 quiet mitigations=off "
            f"address0={self.destination}/24 address6={DATA6}:100/64</cmdline></os><devices>"
            f"<emulator>/usr/bin/qemu-system-x86_64</emulator>{interfaces}"
            "<serial type='file'><source path='/run/libvirt/serial.log'/></serial>"
            "</devices></domain>"
        )

    def start_guest(self) -> None:
        self.virsh("start", NAME)
        wait_until(lambda: self.source.answered_by(self.destination), "the guest's answer", 60)
