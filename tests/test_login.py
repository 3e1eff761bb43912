"""Logging in: what ssh itself would decide, keys of all kinds, and what a person is told."""
from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import FAST, failure, report
from lab import MANAGEMENT, NAME, NETWEAVER, PYTHON, Lab, passwd_with_home, wait_until

import netweaver

CONNECT = """
import sys, netweaver
try:
    netweaver.import_paramiko()
    access = netweaver.Access(*(sys.argv[2:] or [None]))
    access.connect(access.settings(netweaver.Target(sys.argv[1]))).close()
except netweaver.NetWeaverError as error:
    sys.exit(str(error))
"""


@functools.cache
def rsa_key() -> list[str]:
    """The two files of one RSA key, which takes long to make."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", f"{directory}/key"], check=True)
        return [Path(directory, name).read_text() for name in ("key", "key.pub")]


# -- side by side with ssh, on a real sshd --

class Server:
    """A sshd on this machine's loopback, and a home directory in which both ssh and netweaver look for their files."""

    def __init__(self, directory: Path, kinds: tuple[str, ...] = ("ed25519", "ecdsa")) -> None:
        self.directory, self.home = directory, directory / "home"
        self.ssh = self.home / ".ssh"
        self.ssh.mkdir(parents=True, mode=0o700)
        self.keys = {kind: self.generate(directory / kind, kind) for kind in kinds}
        self.others = {kind: self.generate(directory / f"other-{kind}", kind) for kind in (*kinds, "rsa")}
        self.generate(directory / "key", "ed25519")
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = server.getsockname()[1]
        self.name = f"[127.0.0.1]:{self.port}"
        config = directory / "sshd_config"
        config.write_text("\n".join([
            f"ListenAddress 127.0.0.1:{self.port}", "PidFile none", "UsePAM no", "StrictModes no",
            "PasswordAuthentication no", "KbdInteractiveAuthentication no", "PermitRootLogin prohibit-password",
            f"AuthorizedKeysFile {directory}/key.pub", *(f"HostKey {directory}/{kind}" for kind in kinds), ""]))
        (directory / "passwd").write_text(passwd_with_home(self.home))
        (directory / "ssh_config").write_text("")
        Path("/run/sshd").mkdir(exist_ok=True)
        with open(directory / "sshd.log", "ab") as log:
            self.process = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", str(config)], stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=log)
        wait_until(lambda: b"Server listening" in (directory / "sshd.log").read_bytes(), "sshd")

    @staticmethod
    def generate(path: Path, kind: str) -> str:
        """Makes a key; returns its type and its public half, as known_hosts has them."""
        if kind == "rsa":
            for name, content in zip((path.name, f"{path.name}.pub"), rsa_key()):
                path.with_name(name).write_text(content)
            path.chmod(0o600)
        else:
            subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(path)], check=True)
        return " ".join(path.with_name(f"{path.name}.pub").read_text().split()[:2])

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command for which the home is /root, whatever HOME says."""
        own = ('mount --bind "$0/passwd" /etc/passwd && mount --bind "$0/ssh_config" /etc/ssh/ssh_config && '
               'cd "$0" && exec "$@"')
        clean = {key: value for key, value in os.environ.items() if not key.startswith("SSH_")}
        return subprocess.run(["unshare", "--mount", "--propagation", "private", "sh", "-c", own, str(self.directory),
                               *words], env={**clean, "PYTHONPATH": str(NETWEAVER.parent), **environment},
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)

    def connect(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run(PYTHON, "-c", CONNECT, *arguments, **environment)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = Server(tmp_path)
    yield started
    started.process.terminate()
    started.process.wait(10)


HOST = """
Host hv
  HostName 127.0.0.1
  Port {port}
  IdentityFile {directory}/key
"""
# Name: what ~/.ssh/config says before the host's own lines, and the lines of known_hosts, in which {name} is the host,
# {key} and {ecdsa} are its keys, {other} is another key of the first type, {rsa} one of a type that it hasn't.
VARIANTS = {
    "new": ("", ""), "known": ("", "{name} {key}"), "changed": ("", "{name} {other}"),
    "known by its second key": ("", "{name} {ecdsa}"), "another type only": ("", "{name} {rsa}"),
    "another type too": ("", "{name} {rsa}\n{name} {key}"), "changed and known": ("", "{name} {other}\n{name} {key}"),
    "a leading blank": ("", " {name} {other}"), "two blanks": ("", "{name}  {other}"), "a tab": ("", "{name}\t{other}"),
    "a leading blank, known": ("", "  {name} {key}"), "blanks at the end": ("", "{name} {other}   comment  "),
    "revoked": ("", "@revoked {name} {key}"), "revoked, two blanks": ("", "@revoked  {name} {key}"),
    "revoked for all": ("", "@revoked * {key}"), "revoked for all, two blanks": ("", "@revoked  * {key}"),
    "revoked and known": ("", "{name} {key}\n@revoked * {key}"), "another is revoked": ("", "@revoked * {other}"),
    "a pattern": ("", "[127.0.0.?]:* {other}"), "a pattern, known": ("", "[127.*]:{port} {key}"),
    "negated": ("", "*,!{name} {other}"), "several names": ("", "other,{name} {other}"),
    "a comment": ("", "# {name} {other}"), "nonsense": ("", "nonsense\n\n{name} {key}"),
    "without its port": ("", "127.0.0.1 {key}"), "changed without its port": ("", "127.0.0.1 {other}"),
    "another port": ("", "[127.0.0.1]:1 {other}"), "upper case": ("", "{NAME} {other}"),
    "no newline at the end": ("", "other {other}\n{name} {key}!"),
    "an authority and known": ("", "@cert-authority * {other}\n{name} {key}"),
    "an alias": ("HostKeyAlias web", "web {other}"), "an alias, known": ("HostKeyAlias web", "web {key}"),
    "an alias, new": ("HostKeyAlias web", "{name} {other}"),
    "checking yes, new": ("StrictHostKeyChecking yes", ""), "yes, known": ("StrictHostKeyChecking yes", "{name} {key}"),
    "checking no, changed": ("StrictHostKeyChecking no", "{name} {other}"),
    "checking off": ("StrictHostKeyChecking off", "{name} {rsa}"),
    "another file": ("UserKnownHostsFile {directory}/second", ""),
    "two files": ("UserKnownHostsFile ~/.ssh/known_hosts {directory}/second", ""),
    "a token": ("UserKnownHostsFile %d/.ssh/by_%n", ""), "a file of tokens": ("UserKnownHostsFile ~/.ssh/%k_%p", ""),
    "quotes": ('UserKnownHostsFile "{directory}/second"', ""),
    "no file": ("UserKnownHostsFile none", "{name} {other}"), "/dev/null": ("UserKnownHostsFile /dev/null", ""),
    "hashed names": ("HashKnownHosts yes", ""), "an Include": ("Include {directory}/included", ""),
    "a relative Include": ("Include more", ""), "a Match": ("Match host 127.0.0.1\nStrictHostKeyChecking yes", ""),
    "a Match of a user": ("Match user root\nHostKeyAlias web", "web {other}"),
    "a bad option": ("Nonsense yes", ""), "the global file": ("GlobalKnownHostsFile {directory}/second", ""),
}
FILES = {"second": "{name} {other}\n", "included": "StrictHostKeyChecking yes\n",
         "home/.ssh/more": "HostKeyAlias web\n", "home/.ssh/by_hv": "{name} {other}\n"}


@pytest.mark.lab
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_decides_as_ssh_does(server: Server, variant: str) -> None:
    """Both log in or neither, and both record the same names."""
    words = {"name": server.name, "NAME": server.name.upper(), "port": server.port, "directory": server.directory,
             "key": server.keys["ed25519"], "ecdsa": server.keys["ecdsa"], "other": server.others["ed25519"],
             "rsa": server.others["rsa"]}
    config, known = VARIANTS[variant]
    known = known.format(**words) + "\n"
    default = "\nHost *\n  StrictHostKeyChecking accept-new\n"
    outcomes: dict[str, tuple[bool, dict[str, int]]] = {}
    said = ""
    for program in ("ssh", "netweaver"):
        shutil.rmtree(server.ssh)
        server.ssh.mkdir(mode=0o700)
        for name, text in FILES.items():
            (server.directory / name).write_text(text.format(**words))
        (server.ssh / "config").write_text(f"{config.format(**words)}\n{HOST.format(**words)}{default}")
        (server.ssh / "known_hosts").write_text(known.replace("!\n", ""))
        done = (server.run("ssh", "-lroot", "-oBatchMode=yes", "-oUpdateHostKeys=no", "hv", "true")
                if program == "ssh" else server.connect("hv"))
        said += f"{program}: {done.returncode} {done.stderr}\n"
        assert "Traceback" not in done.stderr, done.stderr
        lines = {str(path): len(path.read_text().splitlines()) for path in (*server.ssh.iterdir(),
                                                                          server.directory / "second")}
        outcomes[program] = done.returncode == 0, lines
    assert outcomes["ssh"] == outcomes["netweaver"], said


@pytest.mark.lab
@pytest.mark.parametrize(("config", "known", "words"), [
    ("", "@cert-authority * {other}", "would be known by a certificate only (line 1 of {ssh}/known_hosts)"),
    ("RevokedHostKeys /dev/null", "", "ssh_config sets revokedhostkeys, which netweaver can't honour"),
    ("KnownHostsCommand /bin/true", "", "ssh_config sets knownhostscommand, which netweaver can't honour"),
    ("", "{name} {rsa}", "only a key of another type is (ssh-rsa, line 1 of {ssh}/known_hosts), which the host"),
    ("", "\n{name} {other}", "has changed, or someone is in between: if it is right, remove line 2 of {ssh}/known_"),
    ("", "@revoked  * {key}", "is revoked by line 1 of {ssh}/known_hosts"),
    ("StrictHostKeyChecking yes", "", "is not known, and StrictHostKeyChecking is yes"),
    ("UserKnownHostsFile none", "", "is not known, and UserKnownHostsFile is none"),
])
def test_what_is_refused_is_said_in_its_own_words(server: Server, config: str, known: str, words: str) -> None:
    values = {"name": server.name, "key": server.keys["ed25519"], "other": server.others["ed25519"],
              "rsa": server.others["rsa"], "ssh": server.ssh, "port": server.port, "directory": server.directory}
    (server.ssh / "config").write_text(f"{config}\n{HOST.format(**values)}")
    (server.ssh / "known_hosts").write_text(known.format(**values) + "\n")
    done = server.connect("hv")
    assert done.returncode == 1
    assert words.format(**values) in done.stderr
    assert done.stderr.startswith(f"root@hv:{server.port}: ")


@pytest.mark.lab
def test_runs_that_meet_a_host_for_the_first_time_at_once(server: Server) -> None:
    (server.ssh / "known_hosts").write_text("# kept, though it ends without a newline")
    code = CONNECT + "\n" * 2
    processes = [threading.Thread(target=lambda: results.append(server.run(
        sys.executable, "-c", code, f"root@127.0.0.1:{server.port}", f"{server.directory}/key"))) for _ in range(8)]
    results: list[subprocess.CompletedProcess[str]] = []
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [result.stderr for result in results] == [""] * 8
    lines = (server.ssh / "known_hosts").read_text().splitlines()
    assert lines == ["# kept, though it ends without a newline", f"{server.name} {lines[1].split(' ', 1)[1]}"]


# -- keys --

def convert(path: Path, form: str) -> Path:
    """A key's private half in another format."""
    from cryptography.hazmat.primitives import serialization as formats
    key = formats.load_ssh_private_key(path.read_bytes(), None)
    kind = {"pkcs8": formats.PrivateFormat.PKCS8, "pem": formats.PrivateFormat.TraditionalOpenSSL,
            "protected pkcs8": formats.PrivateFormat.PKCS8}[form]
    lock: Any = formats.BestAvailableEncryption(b"open sesame") if "protected" in form else formats.NoEncryption()
    path.write_bytes(key.private_bytes(formats.Encoding.PEM, kind, lock))
    path.chmod(0o600)
    return path


@pytest.mark.lab
@pytest.mark.parametrize(("kind", "form"), [("rsa", "pkcs8"), ("ecdsa", "pkcs8"), ("ed25519", "pkcs8"), ("rsa", "pem"),
                                            ("ecdsa", "pem")])
def test_keys_of_all_formats(server: Server, kind: str, form: str) -> None:
    key = server.directory / f"other-{kind}"
    shutil.copy(f"{key}.pub", server.directory / "key.pub")
    done = server.connect(f"127.0.0.1:{server.port}", str(convert(key, form)))
    assert done.returncode == 0, done.stderr


def test_keys_that_can_not_be_used(tmp_path: Path) -> None:
    """Each case has its own words."""
    def error(path: Path, ask: Any = None) -> str:
        with pytest.raises(netweaver.HostConnectionError) as caught:
            access = netweaver.Access(str(path), ask=ask)
            access.load(str(path))
        return str(caught.value)

    Server.generate(tmp_path / "key", "rsa")
    protected = convert(tmp_path / "key", "protected pkcs8")
    assert "it is protected by a passphrase: load it into ssh-agent" in error(protected)
    assert "the passphrase is wrong" in error(protected, lambda _: "wrong")
    assert netweaver.load_key(str(protected), lambda _: "open sesame").get_name() == "ssh-rsa"
    (tmp_path / "key").rename(tmp_path / "moved")
    assert "it is a public key: give the private one" in error(tmp_path / "key.pub")
    assert "No such file or directory" in error(tmp_path / "none")
    (tmp_path / "text").write_text("no key")
    assert "it is not a private key" in error(tmp_path / "text")
    (tmp_path / "half").write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    assert f"ssh-keygen -p -f {tmp_path}/half" in error(tmp_path / "half")


@pytest.mark.lab
def test_no_key_at_all_and_a_key_that_is_refused(server: Server) -> None:
    done = server.connect(f"127.0.0.1:{server.port}")
    assert "there is no key to log in with: give one with -k, or load one with ssh-add" in done.stderr
    done = server.connect(f"127.0.0.1:{server.port}", f"{server.directory}/other-rsa")
    assert f"refused the key {server.directory}/other-rsa for root: add the public key to root's" in done.stderr


OLD_SERVER = """
import contextlib, socket, sys, threading, netweaver
netweaver.import_paramiko()
import paramiko

class Gate(paramiko.ServerInterface):
    def check_auth_publickey(self, username, key):
        return paramiko.common.AUTH_SUCCESSFUL

class OldTransport(paramiko.Transport):
    _remote_ext_info = property(lambda self: None, lambda self, value: None)         # says nothing of what it knows

def serve(listener):
    while True:
        transport = OldTransport(listener.accept()[0],
                                 disabled_algorithms={"pubkeys": ["rsa-sha2-512", "rsa-sha2-256"]})
        transport.add_server_key(paramiko.ECDSAKey.generate())
        with contextlib.suppress(paramiko.SSHException, EOFError):
            transport.start_server(server=Gate())

listener = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=serve, args=[listener], daemon=True).start()
access = netweaver.Access(sys.argv[1], ["StrictHostKeyChecking no"])
print(paramiko.__version__, flush=True)
try:
    access.connect(access.settings(netweaver.Target(f"root@127.0.0.1:{listener.getsockname()[1]}"))).close()
    print("in")
except netweaver.NetWeaverError as error:
    print(error)
"""


def test_an_old_server(tmp_path: Path) -> None:
    """Of before OpenSSH 7.2: it knows RSA with SHA-1 alone, and doesn't say so.

    It is tried again as it wants it; paramiko 5 knows no SHA-1 any more, and then the error says what to do.
    """
    Server.generate(tmp_path / "key", "rsa")
    done = subprocess.run([PYTHON, "-c", OLD_SERVER, str(tmp_path / "key")], capture_output=True, text=True, timeout=60,
                          check=False, env={**os.environ, "PYTHONPATH": str(NETWEAVER.parent)})
    version, outcome = done.stdout.splitlines()
    if int(version.split(".")[0]) < 5:
        assert outcome == "in", outcome
    else:
        assert "it may know RSA with SHA-1 only: use another key, or pip install 'paramiko<5'" in outcome


# -- in the lab --

@pytest.mark.lab
def test_host_key_checking(own_lab: Lab) -> None:
    quick = ("-c", "3", "--source-command", FAST)
    known = own_lab.directory / "known"
    own = ("-o", f"UserKnownHostsFile={known}")
    strict = ("-o", "StrictHostKeyChecking=yes")
    line = failure(own_lab.netweaver(*own_lab.arguments(*quick, *own, *strict), seconds=15), 3)
    assert "is not known, and StrictHostKeyChecking is yes" in line
    assert not known.exists()
    done = own_lab.netweaver(*own_lab.arguments(*quick, *own, "-o", "StrictHostKeyChecking=no"))
    assert f"root@{own_lab.hv.address}: its host key is not checked" in done.stderr.splitlines()[0]
    assert report(done)["packets"]["matched"] == 3
    assert not known.exists()
    report(own_lab.netweaver(*own_lab.arguments(*quick, *own)))
    report(own_lab.netweaver(*own_lab.arguments(*quick, *own, *strict)))
    assert not (own_lab.home / ".ssh").exists()


@pytest.mark.lab
def test_ssh_config_jumps_and_the_agent(own_lab: Lab) -> None:
    lab = own_lab
    ssh = lab.home / ".ssh"
    ssh.mkdir(0o700)
    (ssh / "config").write_text(f"""
Host xen
    HostName {lab.hv.address}
    User root
    IdentityFile {lab.key}
    UserKnownHostsFile {lab.directory}/known
    ProxyJump vm
Host vm
    HostName {lab.source.address}
    Port 22
    IdentityFile {lab.key}
    UserKnownHostsFile {lab.directory}/known
Host directly
    HostName {lab.source.address}
    IdentityFile {lab.key}
    UserKnownHostsFile {lab.directory}/known-directly
""")
    arguments = ["-n", lab.arguments()[1], "--hv", "xen", "-s", "directly", "-d", lab.destination, "-c", "5",
                 "--source-command", FAST]
    assert report(lab.netweaver(*arguments))["packets"]["matched"] == 5
    assert len((lab.directory / "known").read_text().splitlines()) == 2          # of the jump by ssh itself
    assert len((lab.directory / "known-directly").read_text().splitlines()) == 1
    text = (ssh / "config").read_text()
    (ssh / "config").write_text(text.replace("ProxyJump vm", "ProxyCommand ssh -W %h:%p vm"))
    assert report(lab.netweaver(*arguments))["packets"]["matched"] == 5
    (ssh / "config").write_text(text.replace("ProxyJump vm", "ProxyCommand echo no way >&2; false"))
    assert "by ProxyCommand echo no way >&2; false: no way" in failure(lab.netweaver(*arguments, seconds=20), 3)
    (ssh / "config").write_text(re.sub(r"(?m)^    (IdentityFile|ProxyJump).*\n", "", text))
    agent = subprocess.run(["ssh-agent", "-s"], check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"(SSH_\w+)=([^;]+);", agent))
    try:
        subprocess.run(["ssh-add", "-q", str(lab.key)], check=True, env={**os.environ, **found})
        done = subprocess.run(lab.on_client(sys.executable, str(NETWEAVER), *arguments), text=True, timeout=60,
                              env={**lab.environment, **found}, capture_output=True, check=False)
        assert report(done)["packets"]["matched"] == 5
    finally:
        os.kill(int(found["SSH_AGENT_PID"]), signal.SIGTERM)
    assert "there is no key to log in with" in failure(lab.netweaver(*arguments, seconds=15), 3)


@pytest.mark.lab
def test_a_way_through_several_hosts() -> None:
    """The second is reached from the first alone, as the way says; -k holds for each of them."""
    with Lab(sources=2) as lab:
        first, second = lab.sources
        (lab.home / ".ssh").mkdir(0o700)
        (lab.home / ".ssh" / "config").write_text("".join(
            f"Host {name}\n    HostName {host.address}\n{more}" for name, host, more in (
                ("xen", lab.hv, "    ProxyJump one,two\n"), ("one", first, ""), ("two", second, ""))))
        second.run("ip", "route", "add", "blackhole", f"{MANAGEMENT}.1/32")
        arguments = ("-n", NAME, "-s", "one", "-d", lab.destination, "-k", str(lab.key))
        found = report(lab.netweaver(*arguments, "--hv", "xen", "-c", "5", "--source-command", FAST))
        assert found["packets"]["matched"] == 5
        assert "root@two: " in failure(lab.netweaver(*arguments, "--hv", "two"), 3)
        lab.wait_clean()


@pytest.mark.lab
def test_a_source_whose_traffic_address_is_not_known(own_lab: Lab) -> None:
    """Behind a jump, and without `ip`: nothing runs, and the error names --filter."""
    lab = own_lab
    stub = lab.source.directory / "bin" / "ip"
    stub.write_text("#!/bin/sh\nexit 127\n")
    stub.chmod(0o755)
    (lab.home / ".ssh").mkdir(0o700)
    (lab.home / ".ssh" / "config").write_text(
        f"Host src\n    HostName {lab.source.address}\n    ProxyJump {lab.hv.address}\n")
    arguments = ("-n", NAME, "--hv", lab.hv.address, "-d", lab.destination, "-k", str(lab.key), "-c", "50",
                 "--source-command", FAST)
    for source in ("src", lab.source.address6):
        line = failure(lab.netweaver(*arguments, "-s", source), 4)
        assert f"can't tell which address its packets to {lab.destination} carry" in line
        assert "--filter" in line
    found = report(lab.netweaver(*arguments, "-s", "src", "--filter", f"tcp and dst host {lab.destination}"))
    assert found["packets"]["matched"] == 50


