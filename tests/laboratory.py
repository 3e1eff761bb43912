#!/usr/bin/env python3
"""A hypervisor, its VMs and their network on one machine: namespaces, and a real sshd in each.

    python tests/laboratory.py                     a shell on the client, in the lab
    python tests/laboratory.py COMMAND [ARG...]    a command there

                 client 10.83.0.1
                 |  management network 10.83.0.0/24, sshd on each host
        +--------+------------+----------------------+
     src1 .3 (src2 .4 ...)   hv .2                   |
        | eth0               | eth0 (pif)            |
        +---- data network --+    |                  |
          10.83.1.1, .2 ...       bridge or forwarder
                                  | vif5.0           |
                                  +--------- ens3 --dst 10.83.1.100

Each host has a /tmp, /root and /etc of its own.  Whatever happens to this process, a guard outlives
it, and removes namespaces, processes and files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

TESTS = Path(__file__).resolve().parent
NETWEAVER = TESTS.parent / "netweaver.py"
PYTHON = os.path.abspath(
    os.environ.get("NETWEAVER_PYTHON", sys.executable)
)  # of netweaver: another paramiko, say
MANAGEMENT, MANAGEMENT6, DATA, DATA6, OUTER = "10.83.0", "fd83:0:", "10.83.1", "fd83:1:", "10.83.2"
HV_UUID, OTHER_HV_UUID = (
    "5fb5a5a8-8a3b-4d5c-9d60-3a1a6d5b1f01",
    "0d1f7c52-6d7e-4d0c-8f5f-0f0c4d3e2b02",
)
NAME = "instance-7c0ee45a-7a3c-4a0f-a8f4-3b7c5f7d1e90"
LINKS = [
    name for name in ("alternatives", "ssl") if Path("/etc", name).is_dir()
]  # with hundreds of links
COPIED = {
    "iproute2",
    "ld.so.conf.d",
    "libvirt",
    "pam.d",
    "profile.d",
    "security",
    "ssh",
    "sudoers.d",
}
NEEDED = ("ip", "tcpdump", "hping3", "unshare", "nsenter", "setsid", "/usr/sbin/sshd", "ssh-keygen")


def missing() -> str | None:
    """Why the lab can't be built here; None if it can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    return not_installed(NEEDED)


def not_installed(tools: Sequence[str]) -> str | None:
    """Which of the tools are missing, in words; None if all are there."""
    lacking = [
        tool
        for tool in tools
        if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    ]
    return f"not installed: {', '.join(lacking)}" if lacking else None


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 20) -> Any:
    """Return the first true value of a condition that is asked again and again."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s in vain for: {what}")
        time.sleep(0.02)
    return value


def passwd_with_home(home: Path) -> str:
    """Return the machine's /etc/passwd, in which root has another home directory."""
    lines = Path("/etc/passwd").read_text().splitlines()
    mine = [line.split(":")[:5] for line in lines if line.startswith("root:")]
    return "\n".join(
        [
            *(":".join([*fields, str(home), "/bin/sh"]) for fields in mine),
            *(line for line in lines if not line.startswith("root:")),
            "",
        ]
    )


def pool(*vms: Mapping[str, str], fault: str | None = None) -> dict[str, Any]:
    """Return the VMs that the stand-ins for xe, xl and qm know."""
    return {"fault": fault, "vms": list(vms)}


def vm(name: str = NAME, dom_id: int = 5, host: str = HV_UUID, **more: str) -> dict[str, str]:
    """Return a VM's record in xapi; a halted one has dom-id -1 and no host."""
    state = (
        {"power-state": "halted", "resident-on": "<not in database>"}
        if dom_id < 0
        else {"resident-on": host}
    )
    return {"uuid": f"vm-{name}", "name-label": name, "dom-id": str(dom_id), **state, **more}


def generate_key(path: Path) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(path)], check=True
    )


def libvirt_domain(name: str, *interfaces: str, running: bool = True) -> str:
    """Return a domain for the test driver of libvirt, in its XML."""
    schema = "http://libvirt.org/schemas/domain/test/1.0"
    state = "" if running else "<test:runstate>5</test:runstate>"
    devices = "".join(
        '<interface type="bridge"><source bridge="xenbr0"/>'
        + (f'<target dev="{interface}"/>' if interface else "")
        + "</interface>"
        for interface in interfaces
    )
    return (
        f'<domain type="test" xmlns:test="{schema}">{state}<name>{name}</name>'
        "<memory>1048576</memory>"
        f"<vcpu>1</vcpu><os><type>hvm</type></os><devices>{devices}</devices></domain>"
    )


@dataclasses.dataclass
class Host:
    """A namespace with its own network, /tmp, /root and /etc, and a sshd."""

    name: str
    namespace: str
    address: str
    directory: Path
    address6: str = ""
    sshd: subprocess.Popen[bytes] | None = None

    def command(self, *words: str) -> list[str]:
        """Return the words that run a command on the host."""
        assert self.sshd is not None
        return ["nsenter", "-t", str(self.sshd.pid), "-m", "-n", *words]

    def run(self, *words: str) -> str:
        """Return the output of a command that succeeds."""
        done = subprocess.run(self.command(*words), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"{self.name}: {' '.join(words)}: status {done.returncode}: {done.stderr.strip()}"
            )
        return done.stdout

    def succeeds(self, *words: str) -> bool:
        return (
            subprocess.run(self.command(*words), capture_output=True, check=False).returncode == 0
        )

    def answered_by(self, address: str) -> bool:
        """Whether a ping from there is answered."""
        return self.succeeds("ping", "-c", "1", "-W", "1", address)

    def processes(self) -> dict[int, str]:
        """pid and command line of what runs there beside sshd itself."""
        found = {}
        for pid in subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False
        ).stdout.split():
            with contextlib.suppress(OSError):
                line = (
                    Path(f"/proc/{pid}/cmdline")
                    .read_bytes()
                    .replace(b"\0", b" ")
                    .decode(errors="replace")
                    .strip()
                )
                if line and (self.sshd is None or int(pid) != self.sshd.pid):
                    found[int(pid)] = line
        return found

    def files(self) -> list[str]:
        """Return the paths in /tmp and /root.  A file that goes meanwhile makes find fail."""
        return self.run("sh", "-c", "find /tmp /root -mindepth 1 2>/dev/null || :").split()

    def write_program(self, name: str, script: str) -> Path:
        """Write a program that runs in place of another one of the host, and return its path."""
        path = self.directory / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    @contextlib.contextmanager
    def program(self, name: str, script: str) -> Iterator[None]:
        """Run a script in place of a program of the host for some time."""
        path = self.write_program(name, script)
        try:
            yield
        finally:
            path.unlink()

    @contextlib.contextmanager
    def temporary_files(self, options: str) -> Iterator[None]:
        """Mount a file system over /tmp for some time, with options of tmpfs."""
        self.run("mount", "-t", "tmpfs", "-o", options, "none", "/tmp")
        try:
            yield
        finally:
            self.run("umount", "-l", "/tmp")


class Network:
    """A client, hosts with a sshd, and a guard that removes it all: the base of all labs.

    A lab sets `hv`, `sources`, `destination` and `name`, and builds itself in `_build`.
    """

    hv: Host
    sources: list[Host]
    destination: str
    name = NAME

    def __init__(self) -> None:
        self.prefix = f"nw{os.getpid() % 100000:x}{os.urandom(2).hex()}"
        self.directory = Path(tempfile.mkdtemp(prefix="netweaver-lab-", dir="/var/tmp"))
        self.home = self.directory / "home"
        self.key = self.directory / "key"
        self.client = f"{self.prefix}-client"
        self._guard = self._start_guard()
        try:
            self.home.mkdir()
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End and remove everything, by letting the guard do its work."""
        self._guard.communicate()
        if self._guard.returncode:
            raise RuntimeError(f"the lab's guard failed with status {self._guard.returncode}")

    @property
    def source(self) -> Host:
        return self.sources[0]

    @property
    def hosts(self) -> list[Host]:
        return [self.hv, *self.sources]

    def _start_guard(self) -> subprocess.Popen[bytes]:
        script = r"""
            cat >/dev/null
            names=`ip netns list | sed -n "s/^\($1-[a-z0-9]*\).*/\1/p"`
            for name in $names; do
              tries=0
              while pids=`ip netns pids "$name"` && [ -n "$pids" ] && [ $tries -lt 100 ]; do
                kill -KILL $pids 2>/dev/null; tries=$((tries + 1)); sleep 0.05
              done
            done
            for name in $names; do ip netns del "$name" || exit 1; done
            rm -rf "$2"
        """
        return subprocess.Popen(
            ["sh", "-c", script, "guard", self.prefix, str(self.directory)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def _host(self, name: str, address: str, address6: str = "") -> Host:
        return Host(name, f"{self.prefix}-{name}", address, self.directory / name, address6)

    def _ip(self, *words: str, namespace: str | None = None) -> None:
        where = ["-n", namespace] if namespace else []
        subprocess.run(["ip", *where, *words], check=True)

    def _link(
        self,
        namespace: str,
        name: str,
        peer_namespace: str,
        peer: str,
        addresses: Sequence[str] = (),
    ) -> None:
        """Add a cable: an interface in each of two namespaces, up."""
        self._ip(
            "link",
            "add",
            "name",
            name,
            "netns",
            namespace,
            "type",
            "veth",
            "peer",
            "name",
            peer,
            "netns",
            peer_namespace,
        )
        for address in addresses:
            usable_at_once = ["nodad"] if ":" in address else []
            self._ip("addr", "add", address, "dev", name, *usable_at_once, namespace=namespace)
        for space, interface in ((namespace, name), (peer_namespace, peer)):
            self._ip("link", "set", interface, "up", namespace=space)

    def _bridge(self, namespace: str, name: str, *ports: str) -> None:
        self._ip(
            "link",
            "add",
            "name",
            name,
            "type",
            "bridge",
            "mcast_snooping",
            "0",
            namespace=namespace,
        )
        for port in ports:
            self._ip("link", "set", port, "master", name, namespace=namespace)
        self._ip("link", "set", name, "up", namespace=namespace)

    def _start_sshd(self, host: Host, *environment: str) -> None:
        host.directory.mkdir()
        self._copy_etc(host.directory / "etc")
        for name in ("tmp", "root", "bin", *(f"etc/{name}" for name in LINKS)):
            (host.directory / name).mkdir()
        for name in ("passwd", "shadow"):
            path = host.directory / "etc" / name
            lines = path.read_text().splitlines(keepends=True)
            fields = {
                "passwd": "root:x:0:0:root:/root:/bin/sh\n",
                "shadow": "root:*:19000:0:99999:7:::\n",
            }
            path.write_text(
                "".join(fields[name] if line.startswith("root:") else line for line in lines)
            )
        generate_key(host.directory / "host_key")
        addresses = [host.address, *([host.address6] if host.address6 else [])]
        (host.directory / "sshd_config").write_text(
            "\n".join(
                [
                    *(f"ListenAddress {address}" for address in addresses),
                    f"HostKey {host.directory / 'host_key'}",
                    "PidFile none",
                    "UsePAM no",
                    "StrictModes no",
                    f"AuthorizedKeysFile {self.key}.pub",
                    "PasswordAuthentication no",
                    "KbdInteractiveAuthentication no",
                    "PermitRootLogin prohibit-password",
                    "UseDNS no",
                    "Subsystem sftp internal-sftp",
                    " ".join(
                        [f"SetEnv PATH={host.directory / 'bin'}:{os.environ['PATH']}", *environment]
                    ),
                    "",
                ]
            )
        )
        self.restart_sshd(host)

    def _copy_etc(self, copy: Path) -> None:
        """Copy of /etc what a host's programs read: all of it would take longer than most tests."""
        copy.mkdir()
        for path in Path("/etc").iterdir():
            if path.is_dir() and path.name in COPIED:
                shutil.copytree(path, copy / path.name, symlinks=True)
            elif path.is_symlink() or path.is_file():
                shutil.copy2(path, copy / path.name, follow_symlinks=False)

    def restart_sshd(self, host: Host) -> None:
        """Start a host's sshd, in a mount namespace of its own."""
        directory = shlex.quote(str(host.directory))
        own = "\n".join(
            [
                *(
                    f"mount -o bind,ro /etc/{name} {directory}/etc/{name} || exit 1"
                    for name in LINKS
                ),
                *(
                    f"mount --rbind {directory}/{name} /{name} || exit 1"
                    for name in ("tmp", "root", "etc")
                ),
            ]
        )
        config = shlex.quote(str(host.directory / "sshd_config"))
        script = (
            f"{own}\nmount -t tmpfs none /run && mkdir /run/sshd && "
            f"exec /usr/sbin/sshd -D -e -f {config}"
        )
        with open(host.directory / "sshd.log", "ab") as log:
            host.sshd = subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    host.namespace,
                    "unshare",
                    "--mount",
                    "--propagation",
                    "private",
                    "sh",
                    "-c",
                    script,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(
            lambda: b"Server listening" in (host.directory / "sshd.log").read_bytes(),
            f"sshd on {host.name}",
        )

    def configure_sshd(self, host: Host, *lines: str) -> None:
        """Restart a host's sshd with these lines in place of those with the same keywords."""
        assert host.sshd is not None
        host.sshd.kill()
        host.sshd.wait()
        config = host.directory / "sshd_config"
        keywords = {line.split()[0] for line in lines}
        others = [
            line
            for line in config.read_text().splitlines()
            if line and line.split()[0] not in keywords
        ]
        config.write_text("\n".join([*lines, *others, ""]))
        (host.directory / "sshd.log").write_text("")
        self.restart_sshd(host)

    @property
    def environment(self) -> dict[str, str]:
        (self.directory / "client-tmp").mkdir(exist_ok=True)
        return {
            **{key: value for key, value in os.environ.items() if not key.startswith("SSH_")},
            "HOME": str(self.home),
            "TMPDIR": str(self.directory / "client-tmp"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def on_client(self, *words: str) -> list[str]:
        """Return the words that run a command on the client.

        There ssh finds its own files in the lab's home, and nowhere else.

        ssh takes the home directory from /etc/passwd, and not from HOME.
        """
        return self.inside(self.client, *words)

    def inside(self, namespace: str, *words: str) -> list[str]:
        """Return the words that run a command in a namespace, with the machine's own files."""
        passwd = self.directory / "client-passwd"
        if not passwd.exists():
            passwd.write_text(passwd_with_home(self.home))
            passwd.with_name("client-ssh_config").write_text("")
        own = (
            'mount --bind "$0" /etc/passwd && '
            'mount --bind "${0%passwd}ssh_config" /etc/ssh/ssh_config && exec "$@"'
        )
        return ["ip", "netns", "exec", namespace, "sh", "-c", own, str(passwd), *words]

    def passive_arguments(self, seconds: str, destination: str | None = None) -> list[str]:
        """Return the command line that measures traffic which is there anyway."""
        target = ["-n", self.name, "--hv", self.hv.address, "-d", destination or self.destination]
        return [*target, "-k", str(self.key), "--duration", seconds]

    def arguments(
        self, *more: str, name: str | None = None, source: str | None = None
    ) -> list[str]:
        """Return the seed's command line for this lab."""
        sources = [source] if source else [host.address for host in self.sources]
        return [
            "-n",
            name or self.name,
            "--hv",
            self.hv.address,
            *(word for host in sources for word in ("-s", host)),
            "-d",
            self.destination,
            "-k",
            str(self.key),
            *more,
        ]

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """netweaver on the client."""
        return subprocess.Popen(
            self.on_client(PYTHON, "-m", "netweaver", *arguments),  # which is compiled once
            env={**self.environment, "PYTHONPATH": str(NETWEAVER.parent)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def netweaver(self, *arguments: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """netweaver on the client, to its end."""
        process = self.start(*arguments)
        try:
            out, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        return subprocess.CompletedProcess(arguments, process.returncode, out, errors)

    def leftovers(self) -> list[str]:
        """Return the processes and files that a run has left, on the hosts and on the client.

        A watchdog that was killed leaves its `sleep 1`, which ends by itself.
        """
        found = [
            f"{host.name}: process {pid}: {line}"
            for host in self.hosts
            for pid, line in host.processes().items()
            if pid not in self._ours() and line != "sleep 1"
        ]
        found += [f"{host.name}: file {path}" for host in self.hosts for path in host.files()]
        temporary = self.directory / "client-tmp"
        return found + [
            f"client: file {path}" for path in (temporary.rglob("*") if temporary.exists() else ())
        ]

    def _ours(self) -> list[int]:
        """Return the ids of the lab's own processes on the hosts."""
        return []

    def wait_clean(self, seconds: float = 30) -> None:
        """Wait until a run has left nothing."""
        try:
            wait_until(lambda: not self.leftovers(), "no leftovers", seconds)
        except TimeoutError:
            raise AssertionError("left behind:\n" + "\n".join(self.leftovers())) from None


class Lab(Network):
    """A lab of namespaces alone, where the hypervisor is one, too.

    `forwarder` are the options of tests/forwarder.py, which then stands between pif and vif; None
    for the kernel's bridge.  `sources` is the number of source VMs.  With `tags` (VLANs, outermost
    first; needs a forwarder) the frames on the pif are tagged, and with `overlay` they are inside
    VXLAN there.
    """

    tunnel_port = 4789  # of VXLAN
    libvirt_uri = ""  # a made pool of domains

    def __init__(
        self,
        forwarder: Sequence[str] | None = None,
        sources: int = 1,
        *,
        tags: Sequence[int] = (),
        overlay: bool = False,
    ) -> None:
        self._tags, self._overlay = [str(tag) for tag in tags], overlay
        self._tagger: subprocess.Popen[bytes] | None = None
        self._forwarder_options, self._number = forwarder, sources
        self._forwarder: subprocess.Popen[bytes] | None = None
        self.destination = f"{DATA}.100"
        super().__init__()

    def _ours(self) -> list[int]:
        return [self._forwarder.pid] if self._forwarder else []

    def _build(self) -> None:
        self.log, self._dst = self.directory / "truth.json", f"{self.prefix}-dst"
        self.hv = self._host("hv", f"{MANAGEMENT}.2", f"{MANAGEMENT6}:2")
        self.sources = [
            self._host(f"src{number}", f"{MANAGEMENT}.{2 + number}", f"{MANAGEMENT6}:{2 + number}")
            for number in range(1, self._number + 1)
        ]
        for namespace in (self.client, self._dst, *(host.namespace for host in self.hosts)):
            self._ip("netns", "add", namespace)
            self._ip("link", "set", "lo", "up", namespace=namespace)
        self._bridge(self.client, "mgmt")
        self._bridge(self.client, "data")
        self._ip("addr", "add", f"{MANAGEMENT}.1/24", "dev", "mgmt", namespace=self.client)
        self._ip(
            "addr", "add", f"{MANAGEMENT6}:1/64", "dev", "mgmt", "nodad", namespace=self.client
        )
        for host in self.hosts:
            self._link(
                host.namespace,
                "mgmt0",
                self.client,
                f"m-{host.name}",
                [f"{host.address}/24", f"{host.address6}/64"],
            )
            self._ip("link", "set", f"m-{host.name}", "master", "mgmt", namespace=self.client)
        for number, host in enumerate(self.sources, 1):
            inner = [f"{DATA}.{number}/24", f"{DATA6}:{number}/64"]
            self._link(
                host.namespace,
                "eth0",
                self.client,
                f"d-{host.name}",
                [f"{OUTER}.{number}/24"] if self._overlay else inner,
            )
            self._ip("link", "set", f"d-{host.name}", "master", "data", namespace=self.client)
            if self._overlay:
                self._vxlan(host.namespace, f"{OUTER}.250", inner)
        self._link(
            self.hv.namespace,
            "eth0",
            self.client,
            "d-hv",
            [f"{OUTER}.250/24"] if self._overlay else [],
        )
        if self._tags:
            self._link(self.client, "t-data", self.client, "t-hv")
            self._tagger = self._forward(
                self.client, "d-hv", "t-hv", "0.0.0.0", self.directory / "tagger.json", []
            )
        self._ip(
            "link",
            "set",
            "t-data" if self._tags else "d-hv",
            "master",
            "data",
            namespace=self.client,
        )
        self._guest()
        generate_key(self.key)
        for host in self.sources:
            self._start_sshd(host)
        self._start_sshd(
            self.hv,
            f"POOL={self.directory / 'pool.json'}",
            f"LIBVIRT_DEFAULT_URI={self.libvirt_uri or f'test://{self.directory}/libvirt.xml'}",
        )
        for toolstack in ("xe", "xl", "qm", "xenstore-read"):
            shutil.copy(TESTS / "standins" / toolstack, self.hv.directory / "bin" / toolstack)
        (self.directory / "libvirt.xml").write_text(
            "<node>"
            + libvirt_domain(NAME, "vif5.0", "vif5.1")
            + libvirt_domain("halted", "", running=False)
            + libvirt_domain("1")
            + "</node>"
        )
        (self.hv.directory / "etc" / "xensource-inventory").write_text(
            f"PRODUCT_BRAND='XCP-ng'\nINSTALLATION_UUID='{HV_UUID}'\n"
        )
        self.set_pool(
            pool(
                vm(vmid="105"),
                vm("halted", -1, vmid="106"),
                vm("twins", 5, vmid="107"),
                vm("twins", 6, vmid="108"),
                vm("elsewhere", 5, OTHER_HV_UUID),
                vm("dom0", 0, **{"is-control-domain": "true"}),
            )
        )
        self._switch()

    def _guest(self) -> None:
        """Connect the destination VM, whose interface has no name of the hypervisor's.

        Both are of one kernel here.
        """
        self._link(
            self._dst,
            "ens3",
            self.hv.namespace,
            "vif5.0",
            [f"{self.destination}/24", f"{DATA6}:100/64"],
        )

    def _switch(self) -> None:
        """Connect the VM's interface with the physical one."""
        if self._overlay:
            self._vxlan(self.hv.namespace, f"{OUTER}.1", [])
            self._bridge(self.hv.namespace, "xenbr0", "vxlan7", "vif5.0")
        elif self._forwarder_options is None:
            self._bridge(self.hv.namespace, "xenbr0", "eth0", "vif5.0")
        else:
            self.start_forwarder(self._forwarder_options)

    def _vxlan(self, namespace: str, remote: str, addresses: Sequence[str]) -> None:
        # veth leaves checksums to a card that isn't there, and Open vSwitch's own datapath checks
        # that of UDP.
        self._ip(
            "link",
            "add",
            "vxlan7",
            "type",
            "vxlan",
            "id",
            "7",
            "remote",
            remote,
            "dstport",
            str(self.tunnel_port),
            "noudpcsum",
            "dev",
            "eth0",
            namespace=namespace,
        )
        for address in addresses:
            usable_at_once = ["nodad"] if ":" in address else []
            self._ip("addr", "add", address, "dev", "vxlan7", *usable_at_once, namespace=namespace)
        self._ip("link", "set", "vxlan7", "up", namespace=namespace)

    def _forward(
        self,
        namespace: str,
        pif: str,
        vif: str,
        destination: str,
        log: Path,
        options: Sequence[str],
    ) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                namespace,
                sys.executable,
                str(TESTS / "forwarder.py"),
                pif,
                vif,
                destination,
                str(log),
                *options,
                "--tags",
                *self._tags,
            ],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError("the forwarder doesn't start")
        return process

    def start_forwarder(self, options: Sequence[str]) -> None:
        self._forwarder = self._forward(
            self.hv.namespace, "eth0", "vif5.0", self.destination, self.log, options
        )

    def set_pool(self, description: Mapping[str, Any]) -> None:
        (self.directory / "pool.json").write_text(json.dumps(description))

    def truth(self) -> list[dict[str, Any]]:
        """End the forwarder, and return what it did to each IP packet."""
        assert self._forwarder is not None and self._forwarder.stdout is not None
        self._forwarder.terminate()
        self._forwarder.wait(20)
        self._forwarder.stdout.close()
        self._forwarder = None
        packets: list[dict[str, Any]] = json.loads(self.log.read_text())["packets"]
        return packets


def run_in(lab: Network, words: Sequence[str]) -> int:
    """Run a command, or a shell, on a lab's client, with the lab's addresses in its environment."""
    variables = {
        **lab.environment,
        "LAB_NAME": lab.name,
        "LAB_HV": lab.hv.address,
        "LAB_SOURCE": lab.source.address,
        "LAB_DESTINATION": lab.destination,
        "LAB_KEY": str(lab.key),
    }
    if not words:
        print(
            "In the lab, on the client. For example:\n  "
            f"python {NETWEAVER} -n $LAB_NAME --hv $LAB_HV -s $LAB_SOURCE -d $LAB_DESTINATION "
            "-k $LAB_KEY",
            file=sys.stderr,
        )
        words = [os.environ.get("SHELL", "/bin/sh")]
    return subprocess.run(lab.on_client(*words), env=variables, check=False).returncode


def main() -> int:
    if reason := missing():
        print(f"lab: {reason}", file=sys.stderr)
        return 1
    with Lab() as built:
        return run_in(built, sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
