"""Logging in, as far as it goes without a server that lets anyone in."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import failure, offline
from loopback import generate_key, listen

import netweaver

# -- targets --


@pytest.mark.parametrize(
    ("text", "user", "host", "port", "name"),
    [
        ("hv", None, "hv", None, "root@hv"),
        ("me@hv.example.org:222", "me", "hv.example.org", 222, "me@hv.example.org:222"),
        ("user@domain@hv", "user@domain", "hv", None, "user@domain@hv"),
        ("DOMAIN+user@hv", "DOMAIN+user", "hv", None, "DOMAIN+user@hv"),
        ("user#admin@hv", "user#admin", "hv", None, "user#admin@hv"),
        ("DOMAIN\\user$@hv", "DOMAIN\\user$", "hv", None, "DOMAIN\\user$@hv"),
        ("[fd00::1]:222", None, "fd00::1", 222, "root@[fd00::1]:222"),
        ("root@[fd00::1]", "root", "fd00::1", None, "root@[fd00::1]"),
        ("fd00::1", None, "fd00::1", None, "root@[fd00::1]"),
        ("fe80::1%eth0", None, "fe80::1%eth0", None, "root@[fe80::1%eth0]"),
        ("fe80::1%br-lan", None, "fe80::1%br-lan", None, "root@[fe80::1%br-lan]"),
        ("[fe80::1%br-lan.5]:222", None, "fe80::1%br-lan.5", 222, "root@[fe80::1%br-lan.5]:222"),
    ],
)
def test_targets(text: str, user: str | None, host: str, port: int | None, name: str) -> None:
    target = netweaver.Target(text)
    assert (target.user, target.host, target.port) == (user, host, port)
    assert target.named(user or "root", port or 22) == name


NO_TARGETS = [
    "",
    "@hv",
    "hv:",
    "hv:65536",
    "hv:x",
    "a b",
    "-x",
    "$(id)",
    "hv;id",
    "hv\n",
    "[hv",
    "-oX@hv",
    "hv/../x",
    "`id`@hv",
    "fe80::1%br;id",
    "us'er@hv",
]


@pytest.mark.parametrize("text", NO_TARGETS)
def test_no_targets(text: str) -> None:
    with pytest.raises(netweaver.UsageError):
        netweaver.Target(text)


# -- options --


def read_settings(target: str, *lines: str) -> netweaver.HostSettings:
    """Return the settings for an answer of `ssh -G` with these lines."""
    text = "\n".join([*lines, "hostname hv", "user me", "port 22"])
    options = netweaver.SshOptions(text.encode())
    return netweaver.read_settings(
        netweaver.Target(target), options, str, lambda keyword: (f"/{keyword}",)
    )


def test_the_answer_of_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOCKET", "/a")
    settings = read_settings(
        "hv",
        "identityfile /keys/first",
        "identityfile none",
        "identityfile /keys/two words",
        "connecttimeout none",
        "identityagent $SOCKET",
        "proxycommand nc %h %p %n %r %%",
        "requiredrsasize 3072",
    )
    assert settings.identities == ("/keys/first", "/keys/two words")
    assert settings.known_hosts_files == ("/UserKnownHostsFile", "/GlobalKnownHostsFile")
    assert settings.connect_seconds == netweaver.CONNECT_SECONDS
    assert settings.agent_socket == "/a"
    assert settings.proxy_command == "nc hv 22 hv me %"
    assert settings.smallest_rsa_bits == 3072


def test_names_in_known_hosts() -> None:
    assert read_settings("hv").known_names == ("hv",)
    assert read_settings("hv", "port 2222").known_names == ("[hv]:2222", "hv")
    assert read_settings("hv", "port 2222", "hostkeyalias web").known_names == ("web",)


REFUSED_OPTIONS = [
    "revokedhostkeys /file",
    "knownhostscommand /bin/true",
    "remotecommand tmux",
    "sessiontype none",
    "sessiontype subsystem",
    "proxyusefdpass yes",
    "refuseconnection because",
    "bindinterface eth0",
    "pubkeyauthentication no",
    "pubkeyauthentication false",
    "pubkeyauthentication host-bound",
    "preferredauthentications password,keyboard-interactive",
    "proxycommand nc %h %Z",
    "proxyjump %Z@hv",
]
HARMLESS_OPTIONS = [
    "revokedhostkeys none",
    "remotecommand none",
    "sessiontype default",
    "proxyusefdpass no",
    "pubkeyauthentication unbound",
    "pubkeyauthentication true",
    "preferredauthentications hostbased,publickey",
    "passwordauthentication no",
    "forwardagent yes",
]


def test_options_that_can_not_be_honoured() -> None:
    for line in REFUSED_OPTIONS:
        with pytest.raises(netweaver.HostConnectionError) as caught:
            read_settings("hv", line)
        assert line.split()[1].strip("@hv") in str(caught.value)


def test_options_that_restrict_nothing() -> None:
    for line in HARMLESS_OPTIONS:
        read_settings("hv", line)


FILE_NAMES = [
    ("/a /b", ("/a", "/b")),
    ("a b", ("a", "b")),
    ('"/a" "/b"', ("/a", "/b")),
    ('"/a /b"', None),
    ('/a "/b c"', None),
    ("/a\\ b", None),
    ("'/a b'", None),
    ("/a ${EMPTY}", None),
    ("/a", ("/a",)),
    ('"/a"', ("/a",)),
    ("none", ()),
]


def settings_of(*options: str) -> netweaver.HostSettings:
    settings = netweaver.Access(options=options).settings(netweaver.Target("me@hv"))
    assert isinstance(settings, netweaver.HostSettings)
    return settings


@pytest.mark.parametrize(("value", "names"), FILE_NAMES)
def test_names_of_files(value: str, names: tuple[str, ...] | None) -> None:
    """They are the ones that ssh reads, or refused where `ssh -G` doesn't show where they end."""
    options = [f"UserKnownHostsFile {value}", f"globalknownhostsfile = {value}"]
    if names is not None:
        settings = settings_of(*options)
        assert settings.user_files == settings.system_files == names
        return
    for option in options:
        with pytest.raises(netweaver.HostConnectionError, match="hv"):
            settings_of(option)


def test_a_user_without_an_entry_in_passwd(monkeypatch: pytest.MonkeyPatch) -> None:
    def getpwuid(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", getpwuid)
    with pytest.raises(netweaver.HostConnectionError, match="passwd"):
        settings_of()


def test_tokens_in_names_of_files() -> None:
    assert settings_of("UserKnownHostsFile /a /by/%n-%r").user_files == ("/a", "/by/hv-me")


def test_the_configuration_is_private_and_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("random.uniform", lambda low, high: 0)  # between attempts
    record = tmp_path / "record"
    options = [f"ProxyCommand ls -l {tmp_path} >{record}"]
    access = netweaver.Access(options=options)
    with pytest.raises(netweaver.HostConnectionError) as caught:
        access.log_in(access.settings(netweaver.Target("me@hv")))
    private = [line for line in record.read_text().splitlines() if "ssh_config" in line]
    assert private[0].startswith("-rw------- ")
    del access, caught
    gc.collect()
    assert list(tmp_path.iterdir()) == [record]


def test_no_room_for_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    with pytest.raises(netweaver.NetWeaverError, match="TMPDIR"):
        netweaver.Access().settings(netweaver.Target("hv"))


# -- keys --

KEYS = [
    ("ed25519", []),
    ("rsa", []),
    ("rsa", ["-m", "PEM"]),
    ("ecdsa", ["-b", "256"]),
    ("ecdsa", ["-b", "384"]),
    ("ecdsa", ["-b", "521", "-m", "PEM"]),
]


@pytest.mark.parametrize(("kind", "options"), KEYS)
def test_keys_and_their_certificates(tmp_path: Path, kind: str, options: list[str]) -> None:
    path = tmp_path / "key"
    public = generate_key(path, kind, *options, "-N", "open sesame")
    questions = []

    def ask(question: str) -> str:
        questions.append(question)
        return "open sesame"

    access = netweaver.Access(str(path), ask=ask)
    for _ in range(2):
        key = access.load(str(path))
        assert f"{key.get_name()} {key.get_base64()}" == public
    assert questions == [f"Passphrase for {path}: "]
    blob = netweaver.read_public_key(str(path))
    assert netweaver.key_kind(blob) == public.split()[0]
    assert netweaver.public_half(str(path)) == blob
    assert (netweaver.rsa_bits(blob) is not None) == (kind == "rsa")
    command = ["ssh-keygen", "-q", "-s", str(path), "-P", "open sesame", "-I", "x", "-n", "root"]
    subprocess.run([*command, f"{path}.pub"], check=True)
    certificate = netweaver.read_public_key(f"{path}-cert.pub")
    assert netweaver.certified_key(certificate) == blob
    assert netweaver.is_certificate(certificate)
    assert not netweaver.is_certificate(blob)
    assert netweaver.rsa_bits(certificate) == netweaver.rsa_bits(blob)
    for size in range(len(certificate)):
        assert netweaver.certified_key(certificate[:size]) in (b"", blob)
    # Without the file of the public half, a PEM file shows it only for its passphrase.
    Path(f"{path}.pub").unlink()
    assert netweaver.public_half(str(path)) == (b"" if "PEM" in options else blob)


def problem(path: Path, passphrase: str | None = None) -> str:
    """Return why a key can't be used."""
    ask = (lambda question: passphrase) if passphrase is not None else None
    with pytest.raises(netweaver.HostConnectionError) as caught:
        netweaver.load_key(str(path), ask)
    assert str(path) in str(caught.value)
    return str(caught.value)


def write_key(path: Path, content: str) -> Path:
    path.write_text(content)
    path.chmod(0o600)
    return path


PROBLEMS = {
    "no key": "not a private key",
    "": "not a private key",
    "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n": "ssh-keygen -p -f",
    "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n": "ssh-keygen -p -f",
    "PuTTY-User-Key-File-3: ssh-ed25519\n": "puttygen",
    "-----BEGIN DSA PRIVATE KEY-----\nAAAA\n-----END DSA PRIVATE KEY-----\n": "DSA",
    "-----BEGIN RSA PRIVATE KEY-----\nAAAA\n-----END RSA PRIVATE KEY-----\n": "can't read it",
    "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n": "not a",
}


def test_files_that_are_no_usable_keys(tmp_path: Path) -> None:
    for content, words in PROBLEMS.items():
        assert words in problem(write_key(tmp_path / "key", content)), content


def openssh_key(kind: str) -> str:
    """Return a private key of a kind, without its secret part, as a file has it."""
    import base64

    blob = netweaver.ssh_string(kind) + netweaver.ssh_string("secret")
    parts = [netweaver.ssh_string(text) for text in ("none", "none", "")]
    content = b"openssh-key-v1\0" + b"".join(parts) + struct.pack(">I", 1)
    text = base64.b64encode(content + netweaver.ssh_string(blob)).decode()
    return f"-----BEGIN OPENSSH PRIVATE KEY-----\n{text}\n-----END OPENSSH PRIVATE KEY-----\n"


def test_keys_that_can_not_be_used(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / "key"
    generate_key(path, "ed25519", "-N", "secret", "-Z", "aes256-cbc")
    assert netweaver.load_key(str(path), lambda question: "secret").get_name() == "ssh-ed25519"
    assert "ssh-add" in problem(path)
    assert "passphrase is wrong" in problem(path, "wrong")
    assert "a public one" in problem(tmp_path / "key.pub")
    assert "No such file" in problem(tmp_path / "none")
    path.chmod(0o640)
    assert "0640 are too open" in problem(path, "secret")
    generate_key(tmp_path / "gcm", "ed25519", "-N", "secret", "-Z", "aes256-gcm@openssh.com")
    assert "ssh-keygen -p -Z aes256-ctr" in problem(tmp_path / "gcm", "secret")
    assert "DSA" in problem(write_key(tmp_path / "dsa", openssh_key("ssh-dss")))
    assert "ssh-add" in problem(
        write_key(tmp_path / "sk", openssh_key("sk-ssh-ed25519@openssh.com"))
    )
    assert not recwarn.list


@pytest.mark.parametrize("name", ["a\nb", 'a"b', "${HOME}"])
def test_a_key_whose_name_ssh_config_can_not_have(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(netweaver.UsageError, match="-k"):
        netweaver.Access(str(tmp_path / name))


def test_a_key_that_is_not_there() -> None:
    with pytest.raises(netweaver.HostConnectionError, match="No such file"):
        netweaver.Access("/nowhere/key")
    assert netweaver.read_public_key("/nowhere/key") == b""


SHA2 = ["rsa-sha2-256", "rsa-sha2-512"]
CERTIFICATE = "-cert-v01@openssh.com"


@pytest.mark.parametrize(
    ("kind", "allowed", "server", "algorithm"),
    [
        ("ssh-ed25519", None, None, "ssh-ed25519"),
        ("ssh-ed25519", ["ssh-ed25519"], SHA2, "ssh-ed25519"),
        ("ssh-ed25519", ["ssh-rsa"], SHA2, ""),
        ("ssh-rsa", None, SHA2, "rsa-sha2-512"),
        ("ssh-rsa", ["rsa-sha2-256"], SHA2, "rsa-sha2-256"),
        ("ssh-rsa", ["rsa-sha2-512"], ["rsa-sha2-256"], ""),
        ("ssh-rsa", SHA2, None, ""),
        ("ssh-rsa", [*SHA2, "ssh-rsa"], None, "ssh-rsa"),
        ("ssh-rsa", [*SHA2, "ssh-rsa"], SHA2, "rsa-sha2-512"),
        ("ssh-rsa" + CERTIFICATE, SHA2, SHA2, ""),
        (
            "ssh-rsa" + CERTIFICATE,
            ["rsa-sha2-256" + CERTIFICATE],
            SHA2,
            "rsa-sha2-256" + CERTIFICATE,
        ),
        ("ssh-ed25519" + CERTIFICATE, ["ssh-ed25519"], SHA2, ""),
    ],
)
def test_the_algorithm_of_a_signature(
    kind: str, allowed: list[str] | None, server: list[str] | None, algorithm: str
) -> None:
    assert netweaver.signature_algorithm(kind, allowed, server) == algorithm


def open_gate() -> Any:
    """Return what lets everyone in who offers a key to a server of paramiko's."""
    import paramiko

    class Gate(paramiko.ServerInterface):
        def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
            return paramiko.common.AUTH_SUCCESSFUL

    return Gate()


@contextlib.contextmanager
def serving(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Provide the port at which a function serves one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: serve(listener.accept()[0]), daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(10)


@contextlib.contextmanager
def paramiko_server(version: str, lists_sha2: bool, has_list: bool) -> Iterator[int]:
    """Provide the port of a server that lets everyone in, and lists its signature algorithms."""
    netweaver.import_paramiko()
    import paramiko

    class Server(paramiko.Transport):
        if not has_list:  # it doesn't see that the client asks for it
            _remote_ext_info = property(lambda self: None, lambda self, value: None)

    disabled = {} if lists_sha2 else {"pubkeys": SHA2}

    def serve(client: socket.socket) -> None:
        transport = Server(client, disabled_algorithms=disabled)
        transport.local_version = f"SSH-2.0-{version}"
        transport.add_server_key(paramiko.ECDSAKey.generate())
        transport.start_server(server=open_gate())
        transport.join(10)

    with serving(serve) as port:
        yield port


@pytest.mark.parametrize(
    ("version", "lists_sha2", "has_list", "option", "outcome"),
    [
        ("new", True, True, "IdentitiesOnly yes", "in"),
        ("OpenSSH_7.4", False, True, "IdentitiesOnly yes", "in"),
        ("OpenSSH_7.3", False, True, "IdentitiesOnly yes", "PubkeyAcceptedAlgorithms"),
        ("OpenSSH_7.1", True, False, "IdentitiesOnly yes", "paramiko<5"),
        ("OpenSSH_7.1", True, False, "PubkeyAcceptedAlgorithms +ssh-rsa", "by SHA-1"),
    ],
)
def test_rsa_signatures(
    tmp_path: Path, version: str, lists_sha2: bool, has_list: bool, option: str, outcome: str
) -> None:
    """OpenSSH 7.4 has SHA-2 without listing it; older servers know SHA-1, which must be allowed."""
    key = tmp_path / "key"
    generate_key(key, "rsa")
    if outcome == "by SHA-1":
        import paramiko

        outcome = "in" if int(paramiko.__version__.split(".")[0]) < 5 else "paramiko<5"
    with paramiko_server(version, lists_sha2, has_list) as port:
        access = netweaver.Access(str(key), ["StrictHostKeyChecking no", option])
        settings = access.settings(netweaver.Target(f"root@127.0.0.1:{port}"))
        try:
            access.log_in(settings).close()
            assert outcome == "in"
        except netweaver.HostConnectionError as error:
            assert outcome in str(error)


@contextlib.contextmanager
def careless_server(key_file: Path, signs_otherwise: bool) -> Iterator[int]:
    """Provide the port of a server that lets everyone in, and chooses a small group.

    Its signature can be by another algorithm than the one that was agreed on.
    """
    netweaver.import_paramiko()
    import paramiko

    class Key(paramiko.RSAKey):
        def sign_ssh_data(self, data: bytes, algorithm: str | None = None) -> paramiko.Message:
            return super().sign_ssh_data(data, "rsa-sha2-256" if signs_otherwise else algorithm)

    class Server(paramiko.Transport):
        _modulus_pack = SimpleNamespace(get_modulus=lambda *sizes: (2, (1 << 1023) + 1155))

    def serve(client: socket.socket) -> None:
        transport = Server(client)
        transport.add_server_key(Key(filename=str(key_file)))
        with contextlib.suppress(paramiko.SSHException, EOFError, OSError):  # as it goes
            transport.start_server(server=open_gate())
            transport.join(10)
        transport.close()

    with serving(serve) as port:
        yield port


@pytest.mark.parametrize(
    ("signs_otherwise", "exchange", "words"),
    [
        (False, "diffie-hellman-group14-sha256", ""),
        (False, "diffie-hellman-group-exchange-sha256", "its group has only 1024 bits"),
        (True, "diffie-hellman-group14-sha256", "it signed by rsa-sha2-256"),
    ],
)
def test_an_exchange_of_keys_that_ssh_refuses(
    tmp_path: Path, signs_otherwise: bool, exchange: str, words: str
) -> None:
    key = tmp_path / "key"
    generate_key(key, "rsa")
    options = ["StrictHostKeyChecking no", "UserKnownHostsFile none", "IdentitiesOnly yes"]
    options += [f"KexAlgorithms {exchange}", "HostKeyAlgorithms rsa-sha2-512"]
    with careless_server(key, signs_otherwise) as port:
        access = netweaver.Access(str(key), options)
        settings = access.settings(netweaver.Target(f"root@127.0.0.1:{port}"))
        if not words:
            access.log_in(settings).close()
            return
        with pytest.raises(netweaver.HostConnectionError) as caught:
            access.log_in(settings)
        assert words in str(caught.value)


def test_a_full_disk_can_not_cut_the_answers_of_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer without its end has fewer restrictions, and ssh doesn't notice."""
    monkeypatch.setattr(tempfile, "tempdir", "/proc/no-files-can-be-made-here")
    assert netweaver.run_openssh("ssh", "-V").stderr.startswith(b"OpenSSH")
    assert b"\nhostkeyalgorithms " in netweaver.run_openssh("ssh", "-G", "host").stdout


# -- ssh-agent --


class FakeAgent(threading.Thread):
    """An agent that gives each connection the same answers."""

    def __init__(self, path: Path, *answers: bytes) -> None:
        super().__init__(daemon=True)
        self._answers = answers
        self._listener = listen(path)
        self.start()

    def run(self) -> None:
        while True:
            client, _ = self._listener.accept()
            for answer in self._answers:
                client.recv(4096)
                client.sendall(answer)
            client.close()


def test_an_address_that_this_machine_has_no_sockets_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next address of the name is tried, as where the kernel has no IPv6."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        answers = [(family, socket.SOCK_STREAM, 0, "", address) for family in (99, socket.AF_INET)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: answers)
        with netweaver.open_socket(read_settings("hv")) as client:
            assert client.getpeername() == address
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: answers[:1])
        with pytest.raises(OSError, match="not supported"):
            netweaver.open_socket(read_settings("hv"))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0\0",
        b"\0\0\0\1\x05",
        b"\0\0\0\5\x0c\xff\xff\xff\xff",
        b"\xff\xff\xff\xff\x0c\0\0\0\1",
        b"\0\0\0\x09\x0c\0\0\0\1\0\0\0\xff",
    ],
)
def test_an_agent_that_fails(tmp_path: Path, answer: bytes) -> None:
    FakeAgent(tmp_path / "agent", answer)
    agent = netweaver.Agent(str(tmp_path / "agent"))
    assert agent.keys == []
    agent.close()


@pytest.mark.parametrize("kind", ["ssh-rsa", "rsa-sha2-256", "rsa-sha2-512"])
def test_the_algorithm_of_an_agents_signature(tmp_path: Path, kind: str) -> None:
    """An old agent signs by SHA-1, whatever it is asked for."""
    signature = netweaver.ssh_string(kind.encode()) + netweaver.ssh_string(bytes(256))
    answer = netweaver.ssh_string(b"\x0e" + netweaver.ssh_string(signature))
    no_keys = b"\0\0\0\5\x0c\0\0\0\0"
    FakeAgent(tmp_path / "agent", no_keys, answer)
    agent = netweaver.Agent(str(tmp_path / "agent"))
    if kind == "rsa-sha2-512":
        assert agent.sign(b"key", b"data", kind) == signature
    else:
        with pytest.raises(ValueError, match=f"signed by {kind}"):
            agent.sign(b"key", b"data", "rsa-sha2-512")
    agent.close()


def test_no_agent(tmp_path: Path) -> None:
    for path in ("", str(tmp_path / "none"), str(tmp_path)):
        agent = netweaver.Agent(path)
        assert agent.keys == []
        agent.close()


def identity_titles(
    settings: netweaver.HostSettings, agent: list[bytes], prefers: bool
) -> list[str]:
    identities = netweaver.list_identities(settings, agent, prefers)
    return [Path(identity.title.split()[-1]).name for identity in identities]


def test_the_order_of_keys(tmp_path: Path) -> None:
    """Configured keys of the agent, its other keys, and files, each with its certificate."""
    for name in ("first", "second", "third", "other"):
        generate_key(tmp_path / name, "ed25519")
    shutil.copy(tmp_path / "other.pub", tmp_path / "lone.pub")
    command = ["ssh-keygen", "-q", "-s", str(tmp_path / "other"), "-I", "x", "-n", "root"]
    subprocess.run([*command, str(tmp_path / "third.pub")], check=True)
    paths = [str(tmp_path / name) for name in ("none", "first", "second", "third")]
    lines = [f"identityfile {path}" for path in paths]
    second, other = (
        netweaver.read_public_key(str(tmp_path / name)) for name in ("second", "other")
    )
    settings = read_settings("hv", *lines)
    expected = ["second", "ssh-agent", "first", "third", "third-cert.pub"]
    assert identity_titles(settings, [other, second], False) == expected
    del expected[1]
    assert identity_titles(settings, [other, second], True) == expected
    settings = read_settings("hv", *lines, "identitiesonly yes")
    assert identity_titles(settings, [other, second], False) == expected
    certificate = f"certificatefile {tmp_path}/third-cert.pub"
    settings = read_settings("hv", *lines, certificate)
    expected = ["third-cert.pub", "first", "second", "third"]
    assert identity_titles(settings, [], False) == expected
    (first, *_) = netweaver.list_identities(settings, [], False)
    assert first.path == str(tmp_path / "third")
    # Of a key that only the agent has, a file may have the public half or the certificate.
    lines = [f"identityfile {tmp_path}/lone", "identitiesonly yes"]
    assert identity_titles(read_settings("hv", *lines), [other], False) == ["lone"]
    shutil.copy(tmp_path / "third-cert.pub", tmp_path / "second-cert.pub")
    (tmp_path / "second").unlink()
    lines = [f"identityfile {tmp_path}/{name}" for name in ("second", "third")]
    titles = identity_titles(read_settings("hv", *lines), [second], False)
    assert titles == ["second", "second-cert.pub", "third", "third-cert.pub"]


# -- connections --


def read_all(channel: netweaver.Channel) -> tuple[bytes, bytes]:
    """Return what a shell prints until its end."""
    output = bytearray()
    errors = bytearray()
    while not channel.eof_received:
        select.select([channel.fileno()], [], [], 10)
        while channel.recv_ready():
            output += channel.recv(100)
        while channel.recv_stderr_ready():
            errors += channel.recv_stderr(100)
    return bytes(output), bytes(errors)


def test_a_local_shell_leaves_nothing_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        channel = netweaver.LocalConnection().start_shell(
            "exec sh", "echo out; echo err >&2; exit\n"
        )
        assert read_all(channel) == (b"out\n", b"err\n")
        assert channel.eof_received
        channel.close()
        assert not channel.recv_ready()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_local_shell_that_can_not_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def popen(*arguments: object, **options: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("subprocess.Popen", popen)
    with pytest.raises(netweaver.HostConnectionError, match="Too many open files"):
        netweaver.LocalConnection().start_shell("exec sh", "")


def test_a_proxy_that_can_not_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/nowhere/sh")
    access = netweaver.Access(options=["ProxyCommand true"])
    with pytest.raises(netweaver.HostConnectionError, match="/nowhere/sh"):
        access.log_in(access.settings(netweaver.Target("me@hv")))


def test_a_port_where_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    access = netweaver.Access()
    with pytest.raises(netweaver.HostConnectionError, match="refused"):
        access.log_in(access.settings(netweaver.Target(f"me@127.0.0.1:{port}")))


def test_a_server_that_is_silent() -> None:
    """It accepts connections, and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        access = netweaver.Access(options=["ConnectTimeout 1"])
        with pytest.raises(netweaver.HostConnectionError) as caught:
            access.log_in(access.settings(netweaver.Target(f"me@127.0.0.1:{port}")))
    assert f"port {port}" in str(caught.value)


HOSTILE_BANNERS = [
    b"SSH-2.0-x\r\n",
    b"SSH-2.0-x\r\n" + struct.pack(">IBB", 12, 4, 20) + bytes(30),
    b"SSH-2.0-x\r\n" + struct.pack(">IBB", 12, 4, 1) + bytes(30),
    b"SSH-2.0-x\r\n" + b"\xff" * 100,
    b"SSH-1.5-x\r\n",
    b"\xff\xfe\r\n" * 200,
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b"",
]


def test_a_server_that_does_not_speak_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is an error with words."""
    monkeypatch.setattr("random.uniform", lambda low, high: 0)  # between attempts
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        access = netweaver.Access(options=["ConnectTimeout 1"])
        settings = access.settings(netweaver.Target(f"me@127.0.0.1:{port}"))
        banners: list[bytes] = []

        def serve() -> None:
            with contextlib.suppress(OSError):  # the end of the test
                while True:
                    client, _ = server.accept()
                    with client, contextlib.suppress(OSError):
                        client.sendall(banners[-1])

        threading.Thread(target=serve, daemon=True).start()
        for banner in HOSTILE_BANNERS:
            banners.append(banner)
            with pytest.raises(netweaver.HostConnectionError, match=f"port {port}"):
                access.log_in(settings)


def test_this_machine_needs_no_login() -> None:
    assert isinstance(
        netweaver.Access().settings(netweaver.Target("local")), netweaver.LocalConnection
    )


@pytest.mark.parametrize(
    "greeting", [b"HTTP/1.0 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n" + bytes(99), b""]
)
def test_a_port_that_speaks_no_ssh(
    greeting: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is one line that names the run, as cron mails it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                with peer:
                    peer.sendall(greeting)

        threading.Thread(target=answer, daemon=True).start()
        host = f"127.0.0.1:{server.getsockname()[1]}"
        done = offline("-n", "web1", "--hv", host, "-s", "127.0.0.1:1", "-d", "192.0.2.2")
    assert failure(done, 3).startswith(f"netweaver: error: web1 syn-100: root@{host}: ")


def test_a_name_that_can_not_be_resolved() -> None:
    hosts = ("--hv", "me@no.such.host.invalid", "-s", "local", "-d", "192.0.2.2")
    line = failure(offline("-n", "web1", *hosts), 3)
    assert "me@no.such.host.invalid: can't resolve 'no.such.host.invalid'" in line
