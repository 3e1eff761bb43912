"""A sshd in a network of its own on this machine, and a home directory for ssh and netweaver."""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from laboratory import NETWEAVER, PYTHON, passwd_with_home, wait_until

PORT = 2222
NOTHING: Mapping[str, str] = {}
ADDRESS = "192.0.2.77"  # not a loopback address, as ssh sees it
# Logs in, in a process for each request that a socket gets: the arguments and the environment are
# read, and the exit status, the output and the errors are sent, as JSON.  The output is that of
# `echo hello`, with the passphrases' questions and the warnings before it.
LOGINS = """
import gc, io, json, os, socketserver, sys, threading, time, netweaver

netweaver.import_paramiko()

def login(target, key, seconds, answers, *options):
    questions, warnings = [], []
    def ask(question):
        questions.append(question)
        time.sleep(seconds)
        return answers.pop(0)
    output = ""
    try:
        key = key and os.fsdecode(key.encode())
        access = netweaver.Access(key, options, ask if answers else None, warnings.append)
        connection = access.log_in(access.settings(netweaver.Target(target)))
        host = netweaver.Host(connection, threading.Condition(), str, sudo=False)
        output = host.run("echo hello").output
        host.close()
        return 0, ""
    except netweaver.NetWeaverError as error:
        return 1, str(error) + "\\n"
    finally:
        print(json.dumps([questions, warnings, output]))

class Request(socketserver.StreamRequestHandler):
    def handle(self):
        line = self.rfile.readline()
        if not line:
            return  # somebody has looked whether this runs
        arguments, environment = json.loads(line)
        os.environ.update(environment)
        sys.stdout = io.StringIO()
        sys.stderr = io.StringIO()
        status, message = login(*arguments)
        gc.collect()  # removes the configuration's file
        answer = status, sys.stdout.getvalue(), sys.stderr.getvalue() + message
        self.wfile.write(json.dumps(answer).encode())

class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    request_queue_size = 100

if len(sys.argv) == 2:
    Server(sys.argv[1], Request).serve_forever()
status, message = login(*json.loads(sys.argv[2]))
print(message, end="", file=sys.stderr)
sys.exit(status)
"""


@functools.cache
def rsa_key() -> tuple[str, str]:
    """Return the two halves of an RSA key, which takes long to make."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "key")
        command = ["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", str(path)]
        subprocess.run(command, check=True)
        return path.read_text(), Path(f"{path}.pub").read_text()


def generate_key(path: Path, kind: str, *options: str) -> str:
    """Make a key, and return its public half as known_hosts has it.

    The options are ssh-keygen's for a passphrase, a format or a size.
    """
    command = ["ssh-keygen", "-q", "-a", "1", "-f", str(path), *(options or ("-N", ""))]
    if kind == "rsa" and "-b" not in options:
        private, public = rsa_key()
        path.write_text(private)
        path.chmod(0o600)
        Path(f"{path}.pub").write_text(public)
        command += ["-p", "-P", ""]
    else:
        command += ["-t", kind]
    if options or kind != "rsa":
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return " ".join(Path(f"{path}.pub").read_text().split()[:2])


def listen(path: Path) -> socket.socket:
    """Return a socket that listens at a path, as an ssh-agent's does."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


class Loopback:
    """A sshd, whose host keys and users' keys are known here, and what logs in to it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.home = directory / "home"
        self.ssh = self.home / ".ssh"
        self.ssh.mkdir(parents=True, mode=0o700)
        directory.chmod(0o755)
        self.host_keys = {
            kind: generate_key(directory / f"host-{kind}", kind) for kind in ("ed25519", "ecdsa")
        }
        self.other_keys = {
            kind: generate_key(directory / f"other-{kind}", kind)
            for kind in ("ed25519", "ecdsa", "rsa")
        }
        generate_key(directory / "key", "ed25519")
        self.key = directory / "key"
        self.name = f"[127.0.0.1]:{PORT}"
        (directory / "passwd").write_text(passwd_with_home(self.home))
        (directory / "hosts").write_text(f"127.0.0.1 localhost\n{ADDRESS} web\n")
        (directory / "ssh_config").write_text("")
        network = "ip link set lo up && ip addr add $0/32 dev lo && exec sleep infinity"
        self._network = subprocess.Popen(["unshare", "--net", "sh", "-c", network, ADDRESS])
        self._sshd: subprocess.Popen[bytes] | None = None
        self._agents: list[subprocess.Popen[bytes]] = []
        self._logins: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()
        wait_until(self._is_up, "a network")
        self.start()

    def _is_up(self) -> bool:
        command = [*self._inside(), "ip", "-o", "addr", "show", "dev", "lo"]
        return ADDRESS in subprocess.run(command, capture_output=True, text=True).stdout

    def _inside(self) -> list[str]:
        return ["nsenter", "--net", "-t", str(self._network.pid)]

    @property
    def log(self) -> str:
        return (self.directory / "sshd.log").read_text(errors="replace")

    def start(self, *lines: str) -> None:
        """Start sshd anew; the lines come first in its configuration, and win."""
        self.stop()
        config = [
            *lines,
            f"ListenAddress 127.0.0.1:{PORT}",
            f"ListenAddress {ADDRESS}:22",
            "PidFile none",
            "UsePAM no",
            "UseDNS no",
            "StrictModes no",
            "LogLevel VERBOSE",
            "MaxStartups 100",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin prohibit-password",
            "Subsystem sftp internal-sftp",
            f"AuthorizedKeysFile {self.key}.pub",
            *(f"HostKey {self.directory}/host-{kind}" for kind in self.host_keys),
        ]
        path = self.directory / "sshd_config"
        path.write_text("\n".join(config) + "\n")
        Path("/run/sshd").mkdir(exist_ok=True)
        with open(self.directory / "sshd.log", "wb") as log:
            self._sshd = subprocess.Popen(
                [*self._inside(), "/usr/sbin/sshd", "-D", "-e", "-f", str(path)],
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        wait_until(lambda: self.log.count("Server listening") == 2, "sshd")

    def stop(self) -> None:
        if self._sshd:
            self._sshd.terminate()
            self._sshd.wait(10)

    def close(self) -> None:
        self.stop()
        for process in (*self._agents, self._logins, self._network):
            if process:
                process.kill()
                process.wait()

    def reset(self) -> None:
        """Restore an empty configuration of the client."""
        shutil.rmtree(self.ssh, ignore_errors=True)
        self.ssh.mkdir(mode=0o700)

    def configure(self, *lines: str, before: str = "") -> None:
        """Write ~/.ssh/config: the host hv, with more lines; new hosts are accepted."""
        host = ["Host hv", "HostName 127.0.0.1", f"Port {PORT}", "User root", *lines]
        text = "\n".join([before, *host, "Host *", "StrictHostKeyChecking accept-new", ""])
        (self.ssh / "config").write_text(text)

    def agent(self, *keys: Path) -> str:
        """Start an ssh-agent with keys, and return the path of its socket."""
        path = self.directory / f"agent{len(self._agents)}"
        command = ["ssh-agent", "-D", "-a", str(path)]
        self._agents.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        wait_until(functools.partial(is_listening, path), "ssh-agent")
        for key in keys:
            environment = {**os.environ, "SSH_AUTH_SOCK": str(path)}
            subprocess.run(["ssh-add", "-q", str(key)], env=environment, check=True)
        return str(path)

    def _command(self, *words: str, prepare: str = ":") -> list[str]:
        """Return a command whose home, as passwd tells it, is that of this object.

        `prepare` are shell commands that come first.
        """
        mounts = "".join(
            f'mount --bind "$0/{name}" /etc/{path} && '
            for name, path in (
                ("passwd", "passwd"),
                ("hosts", "hosts"),
                ("ssh_config", "ssh/ssh_config"),
            )
        )
        script = f'{mounts} cd "$0" && {prepare} && exec "$@"'
        own_mounts = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
        return [*self._inside(), *own_mounts, str(self.directory), *words]

    @staticmethod
    def _environment(more: Mapping[str, str]) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SSH_")}
        return {**clean, "PYTHONPATH": str(NETWEAVER.parent), **more}

    def run(
        self, *words: str, prepare: str = ":", environment: Mapping[str, str] = NOTHING
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in this object's network, with its home."""
        return subprocess.run(
            self._command(*words, prepare=prepare),
            env=self._environment(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def by_ssh(
        self,
        *options: str,
        target: str = "hv",
        prepare: str = ":",
        environment: Mapping[str, str] = NOTHING,
    ) -> subprocess.CompletedProcess[str]:
        """Log in by ssh itself, with options of its -o."""
        words = ["ssh", "-lroot", "-oBatchMode=yes", "-oUpdateHostKeys=no"]
        for option in options:
            words += ["-o", option]
        return self.run(*words, target, "echo hello", prepare=prepare, environment=environment)

    def login(
        self,
        *options: str,
        target: str = "hv",
        key: Path | None = None,
        answers: tuple[str, ...] = (),
        answer_seconds: float = 0,
        prepare: str = ":",
        environment: Mapping[str, str] = NOTHING,
    ) -> subprocess.CompletedProcess[str]:
        """Log in by netweaver; `answers` are passphrases, which take so long."""
        path = str(key) if key else None
        arguments = [target, path, answer_seconds, answers, *options]
        if prepare != ":" or "LC_ALL" in environment:  # needs a Python of its own
            words = (PYTHON, "-c", LOGINS, "once", json.dumps(arguments))
            return self.run(*words, prepare=prepare, environment=environment)
        requests = self._request_socket()
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(requests)
            client.sendall(json.dumps([arguments, dict(environment)]).encode() + b"\n")
            with client.makefile("rb") as stream:
                status, output, errors = json.loads(stream.read())
        return subprocess.CompletedProcess([target], status, output, errors)

    def _request_socket(self) -> str:
        """Return the socket of a process that logs in, which is started once."""
        path = self.directory / "home" / "logins"
        with self._starting:
            if not self._logins:
                self._logins = subprocess.Popen(
                    self._command(PYTHON, "-c", LOGINS, str(path)),
                    env=self._environment(NOTHING),
                    stdin=subprocess.DEVNULL,
                )
                wait_until(lambda: is_listening(path), "logins")
        return str(path)

    def both(
        self,
        *options: str,
        target: str = "hv",
        prepare: str = ":",
        environment: Mapping[str, str] = NOTHING,
    ) -> tuple[bool, bool]:
        """Return whether ssh and netweaver log in."""
        by_ssh = self.by_ssh(*options, target=target, prepare=prepare, environment=environment)
        by_netweaver = self.login(*options, target=target, prepare=prepare, environment=environment)
        print(f"ssh: {by_ssh.returncode} {by_ssh.stderr}")
        print(f"netweaver: {by_netweaver.returncode} {by_netweaver.stderr}")
        assert "Traceback" not in by_netweaver.stderr
        return by_ssh.returncode == 0, by_netweaver.returncode == 0
