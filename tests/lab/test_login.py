"""Logging in, side by side with ssh, on a real sshd."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import FAST, failure, report
from laboratory import MANAGEMENT, NAME, PYTHON, Lab
from loopback import PORT, Loopback, generate_key, listen

pytestmark = pytest.mark.lab
# Logs in and runs a command through a proxy that stops after so many bytes from the server, for
# more and more bytes until the command succeeds; prints the bytes, the seconds and the error.
STALL = """
import json, socket, sys, threading, time, netweaver
from concurrent.futures import ThreadPoolExecutor

key, port = sys.argv[1], int(sys.argv[2])
netweaver.CONNECT_SECONDS = netweaver.ANSWER_SECONDS = 3
netweaver.import_paramiko()

def forward(source, target, most):
    while most > 0 and (data := source.recv(min(most, 65536))):
        target.sendall(data)
        most -= len(data)
    if most > 0:
        target.shutdown(socket.SHUT_WR)

def serve(listener, most):
    client, _ = listener.accept()
    server = socket.create_connection(("127.0.0.1", port))
    for arguments in ((client, server, 1 << 30), (server, client, most)):
        threading.Thread(target=forward, args=arguments, daemon=True).start()

def attempt(most):
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, args=(listener, most), daemon=True).start()
    options = ["StrictHostKeyChecking no", "ConnectTimeout 3", "IdentitiesOnly yes"]
    access = netweaver.Access(key, options)
    target = netweaver.Target(f"root@127.0.0.1:{listener.getsockname()[1]}")
    settings = access.settings(target)
    started = time.monotonic()
    error = ""
    try:
        connection = access.log_in(settings)
        host = netweaver.Host(connection, threading.Condition(), str, sudo=False)
        host.run("echo hello")
        host.close()
    except netweaver.NetWeaverError as failure:
        error = str(failure)
    return most, time.monotonic() - started, error

with ThreadPoolExecutor(10) as pool:
    for outcome in pool.map(attempt, range(0, 2600, 50)):
        if not outcome[2]:
            break
        print(json.dumps(outcome))
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """Give all tests one sshd, which they leave as it was."""
    built = Loopback(tmp_path_factory.mktemp("loopback"))
    yield built
    built.close()


@pytest.fixture
def server(shared: Loopback) -> Loopback:
    """Give a test the shared sshd, and the client an empty configuration."""
    shared.reset()
    shared.configure(f"IdentityFile {shared.key}")
    return shared


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Loopback]:
    """Give a test a sshd that it may break."""
    built = Loopback(tmp_path)
    built.configure(f"IdentityFile {built.key}")
    yield built
    built.close()


def words_for(server: Loopback) -> dict[str, object]:
    """Return what stands for the names in braces in the tests' tables."""
    return {
        "name": server.name,
        "NAME": server.name.upper(),
        "port": PORT,
        "directory": server.directory,
        "ssh": server.ssh,
        "key": server.host_keys["ed25519"],
        "ecdsa": server.host_keys["ecdsa"],
        "other": server.other_keys["ed25519"],
        "mislabelled": server.host_keys["ed25519"].replace("ssh-ed25519", "ssh-rsa", 1),
        "rsa": server.other_keys["rsa"],
        "relay": "bash -c 'exec 3<>/dev/tcp/%h/%p; cat <&3 & cat >&3'",
    }


# -- host keys --

# What ~/.ssh/config has before the host's lines, and the lines of known_hosts, in which {name} is
# the host, {key} and {ecdsa} are its keys, {other} is another key of the first type, and {rsa} a
# key of a type that it has not.
KNOWN_HOSTS = {
    "new": ("", ""),
    "known": ("", "{name} {key}"),
    "changed": ("", "{name} {other}"),
    "known by its second key": ("", "{name} {ecdsa}"),
    "another type only": ("", "{name} {rsa}"),
    "another type too": ("", "{name} {rsa}\n{name} {key}"),
    "changed and known": ("", "{name} {other}\n{name} {key}"),
    "a leading blank": ("", " {name} {other}"),
    "two blanks": ("", "{name}  {other}"),
    "a tab": ("", "{name}\t{other}"),
    "a leading blank, known": ("", "  {name} {key}"),
    "blanks at the end": ("", "{name} {other}   comment  "),
    "revoked": ("", "@revoked {name} {key}"),
    "revoked, two blanks": ("", "@revoked  {name} {key}"),
    "revoked for all": ("", "@revoked * {key}"),
    "revoked for all, two blanks": ("", "@revoked  * {key}"),
    "revoked and known": ("", "{name} {key}\n@revoked * {key}"),
    "another is revoked": ("", "@revoked * {other}"),
    "a pattern": ("", "[127.0.0.?]:* {other}"),
    "a pattern, known": ("", "[127.*]:{port} {key}"),
    "negated": ("", "*,!{name} {other}"),
    "several names": ("", "other,{name} {other}"),
    "a comment": ("", "# {name} {other}"),
    "nonsense": ("", "nonsense\n\n{name} {key}"),
    "without its port": ("", "127.0.0.1 {key}"),
    "changed without its port": ("", "127.0.0.1 {other}"),
    "revoked without its port": (
        "StrictHostKeyChecking yes",
        "127.0.0.1 {key}\n@revoked 127.0.0.1 {key}",
    ),
    "another port": ("", "[127.0.0.1]:1 {other}"),
    "upper case": ("", "{NAME} {other}"),
    "no newline at the end": ("", "other {other}\n{name} {key}!"),
    "an authority and known": ("", "@cert-authority * {other}\n{name} {key}"),
    "an alias": ("HostKeyAlias web", "web {other}"),
    "an alias, known": ("HostKeyAlias web", "web {key}"),
    "an alias, new": ("HostKeyAlias web", "{name} {other}"),
    "yes, new": ("StrictHostKeyChecking yes", ""),
    "yes, known": ("StrictHostKeyChecking yes", "{name} {key}"),
    "ask, new": ("StrictHostKeyChecking ask", ""),
    "ask, known": ("StrictHostKeyChecking ask", "{name} {key}"),
    "no, changed": ("StrictHostKeyChecking no", "{name} {other}"),
    "off": ("StrictHostKeyChecking off", "{name} {rsa}"),
    "another file": ("UserKnownHostsFile {directory}/second", ""),
    "two files": ("UserKnownHostsFile ~/.ssh/known_hosts {directory}/second", ""),
    "two relative files": ("UserKnownHostsFile none_yet second", ""),
    "a file and a relative one": ("UserKnownHostsFile {directory}/none_yet second", ""),
    "two global files": ("GlobalKnownHostsFile {directory}/none_yet second", ""),
    "the second of two is right": ("UserKnownHostsFile ~/.ssh/none_yet right", ""),
    "both in quotes": ('UserKnownHostsFile "{directory}/none_yet" "second"', ""),
    "a relative file": ("UserKnownHostsFile second", ""),
    "a token": ("UserKnownHostsFile %d/.ssh/by_%n", ""),
    "a file of tokens": ("UserKnownHostsFile ~/.ssh/%k_%p", ""),
    "tokens and a second": ("UserKnownHostsFile ~/.ssh/%k_%p ~/.ssh/by_%n", ""),
    "quotes": ('UserKnownHostsFile "{directory}/second"', ""),
    "no file": ("UserKnownHostsFile none", "{name} {other}"),
    "/dev/null": ("UserKnownHostsFile /dev/null", ""),
    "hashed names": ("HashKnownHosts yes", ""),
    "an Include": ("Include {directory}/included", ""),
    "a relative Include": ("Include more", ""),
    "a Match": ("Match host 127.0.0.1\nStrictHostKeyChecking yes", ""),
    "a Match of a user": ("Match user root\nHostKeyAlias web", "web {other}"),
    "a bad option": ("Nonsense yes", ""),
    "the global file": ("GlobalKnownHostsFile {directory}/second", ""),
    "no host key on loopback": ("NoHostAuthenticationForLocalhost yes", "{name} {other}"),
    "an alias on loopback": (
        "NoHostAuthenticationForLocalhost yes\nHostKeyAlias web",
        "web {other}",
    ),
    "another key algorithm": ("HostKeyAlgorithms ecdsa-sha2-nistp256", "{name} {ecdsa}"),
    "no key algorithm": ("HostKeyAlgorithms rsa-sha2-512", ""),
    "algorithms in an order": ("HostKeyAlgorithms ecdsa-sha2-nistp256,ssh-ed25519", "{name} {key}"),
    "two algorithms": ("HostKeyAlgorithms ssh-ed25519,ecdsa-sha2-nistp256", "{name} {ecdsa}"),
    "an algorithm first": ("HostKeyAlgorithms ^ecdsa-sha2-nistp256", "{name} {key}"),
    "an algorithm first, known": ("HostKeyAlgorithms ^ecdsa-sha2-nistp256", "{name} {ecdsa}"),
    "an algorithm more": ("HostKeyAlgorithms +ssh-rsa", "{name} {ecdsa}"),
    "a key of another type than its line says": (
        "StrictHostKeyChecking yes",
        "{name} {mislabelled}",
    ),
    "IPv4 within IPv6": (
        "NoHostAuthenticationForLocalhost yes\nStrictHostKeyChecking yes\n"
        "Host hv\nHostName ::ffff:127.0.0.1",
        "",
    ),
    "a blank in an alias that names a file": (
        'HostKeyAlias "a b"\nUserKnownHostsFile ~/.ssh/by_%k',
        "",
    ),
    "no certificates": ("HostKeyAlgorithms -*-cert-v01@openssh.com", "{name} {ecdsa}"),
    "an algorithm less": ("HostKeyAlgorithms -ecdsa-sha2-nistp384", "{name} {ecdsa}"),
}
FILES = {
    "second": "{name} {other}\n",
    "right": "{name} {key}\n",
    "included": "StrictHostKeyChecking yes\n",
    "home/.ssh/more": "HostKeyAlias web\n",
    "home/.ssh/by_hv": "{name} {other}\n",
    "home/.ssh/by_a b": "@revoked * {key}\n",
}


def write_files(server: Loopback, config: str, known: str) -> None:
    """Write ~/.ssh/config, known_hosts and the files that they name."""
    words = words_for(server)
    server.reset()
    for name, text in FILES.items():
        (server.directory / name).write_text(text.format(**words))
    (server.directory / "none_yet").unlink(missing_ok=True)
    server.configure(f"IdentityFile {server.key}", before=config.format(**words))
    text = known.format(**words) + "\n"
    (server.ssh / "known_hosts").write_text(text.replace("!\n", ""))


def recorded(server: Loopback) -> dict[str, int]:
    """Return the number of lines in all files with host keys."""
    paths = [*server.ssh.iterdir(), *server.directory.glob("*")]
    return {
        str(path): len(path.read_bytes().splitlines())
        for path in paths
        if path.is_file() and path.name != "sshd.log"
    }


@pytest.mark.parametrize("case", KNOWN_HOSTS)
def test_known_hosts_decides_as_for_ssh(server: Loopback, case: str) -> None:
    """Both log in or neither, and both record the same names."""
    write_files(server, *KNOWN_HOSTS[case])
    by_ssh = server.by_ssh()
    recorded_by_ssh = recorded(server)
    write_files(server, *KNOWN_HOSTS[case])
    done = server.login()
    assert (done.returncode == 0) == (by_ssh.returncode == 0), by_ssh.stderr + done.stderr
    assert recorded(server) == recorded_by_ssh


@pytest.mark.parametrize(
    ("config", "known", "words"),
    [
        ("", "@cert-authority * {other}", "by a certificate (line 1 of {ssh}/known_hosts)"),
        ("RevokedHostKeys /dev/null", "", "revokedhostkeys"),
        ("KnownHostsCommand /bin/true", "", "knownhostscommand"),
        ("", "{name} {rsa}", "remove line 1 of {ssh}/known_hosts"),
        ("", "\n{name} {other}", "man-in-the-middle attack"),
        ("", "\n{name} {other}", "remove line 2 of {ssh}/known_hosts"),
        ("", "@revoked  * {key}", "is revoked by line 1 of {ssh}/known_hosts"),
        ("StrictHostKeyChecking yes", "", "StrictHostKeyChecking is yes"),
        ("StrictHostKeyChecking ask", "", "StrictHostKeyChecking is ask"),
        ("UserKnownHostsFile none", "", "UserKnownHostsFile is none"),
        ('UserKnownHostsFile "{directory}/a b"', "", "UserKnownHostsFile {directory}/a b"),
    ],
)
def test_a_host_key_is_refused_with_the_reason(
    server: Loopback, config: str, known: str, words: str
) -> None:
    write_files(server, config, known)
    done = server.login()
    assert done.returncode == 1
    assert words.format(**words_for(server)) in done.stderr
    assert "hv" in done.stderr.partition(": ")[0]


def test_a_home_with_a_blank(server: Loopback) -> None:
    """ssh's answer doesn't show that the blank ends no name of a file."""
    prepare = (
        f'sed "s|{server.home}|$PWD/a home|" passwd >passwd2 && '
        'mount --bind passwd2 /etc/passwd && ln -sfn home "a home"'
    )
    key = f"IdentityFile {server.key}"
    for last, succeeds in (("other", False), ("key", True)):
        text = f"{{name}} {{{last}}}\n".format(**words_for(server))
        (server.ssh / last).write_text(text)
        server.configure(key, f"UserKnownHostsFile ~/.ssh/none ~/.ssh/{last}")
        outcome = server.both("StrictHostKeyChecking=yes", prepare=prepare)
        assert outcome == (succeeds, succeeds)


@pytest.mark.parametrize(
    ("checking", "known", "succeeds"),
    [
        ("yes", "web {key}\n192.0.2.77 {other}\n", False),
        ("yes", "web {key}\n192.0.2.77 {key}\n", True),
        ("yes", "web {key}\n", True),
        ("yes", "web {other}\n192.0.2.77 {key}\n", False),
        ("no", "web {key}\n192.0.2.77 {other}\n", True),
    ],
)
def test_the_key_of_the_address(
    server: Loopback, checking: str, known: str, succeeds: bool
) -> None:
    """CheckHostIP compares the keys of a name and of its address."""
    (server.ssh / "known_hosts").write_text(known.format(**words_for(server)))
    options = (f"CheckHostIP {checking}", f"IdentityFile {server.key}")
    assert server.both(*options, target="web") == (succeeds, succeeds)


@pytest.mark.parametrize(
    "prepare",
    [
        "ln -s /nowhere/at/all home/.ssh/known_hosts",
        "mount --bind -o ro home/.ssh home/.ssh",
        "mkdir -p away && rm -f away/* && ln -s $PWD/away/known home/.ssh/known_hosts",
    ],
)
def test_a_new_host_that_can_not_be_recorded(server: Loopback, prepare: str) -> None:
    """Logs in with a warning, as ssh does."""
    assert server.by_ssh(prepare=prepare).returncode == 0
    server.reset()
    server.configure(f"IdentityFile {server.key}")
    done = server.login(prepare=prepare)
    assert done.returncode == 0, done.stderr
    _, warnings, _ = json.loads(done.stdout)
    if "away" in prepare:
        assert server.name in (server.directory / "away/known").read_text()
    else:
        assert "known_hosts" in warnings[0]


def test_runs_that_meet_a_host_for_the_first_time_at_once(server: Loopback) -> None:
    (server.ssh / "known_hosts").write_text("# stays, though it ends without a newline")
    results: list[subprocess.CompletedProcess[str]] = []
    threads = [threading.Thread(target=lambda: results.append(server.login())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.stderr for result in results] == [""] * 8
    first, second = (server.ssh / "known_hosts").read_text().splitlines()
    assert first == "# stays, though it ends without a newline"
    assert second.startswith(f"{server.name} ")


@pytest.mark.parametrize("option", ["GlobalKnownHostsFile", "UserKnownHostsFile"])
def test_a_changed_key_in_a_file_below_the_home_directory(server: Loopback, option: str) -> None:
    """`ssh -G` may print its name with the ~."""
    (server.ssh / "site").write_text(f"{server.name} {server.other_keys['ed25519']}\n")
    server.configure(f"IdentityFile {server.key}", f"{option} ~/.ssh/site")
    assert server.both() == (False, False)
    assert "does not match the known key" in server.login().stderr
    (server.ssh / "site").write_text(f"{server.name} {server.host_keys['ed25519']}\n")
    assert server.both() == (True, True)


SECOND_READINGS = {
    "the name of the host that is meant": """Host 127.0.0.*
 StrictHostKeyChecking yes
Match final all
 ForwardX11 no""",
    "Match final": """Match final host 127.0.0.1
 StrictHostKeyChecking yes""",
    "Match canonical": """CanonicalizeHostname always
Match canonical all
 StrictHostKeyChecking yes""",
}


@pytest.mark.parametrize("case", SECOND_READINGS)
def test_a_configuration_that_ssh_reads_twice(server: Loopback, case: str) -> None:
    """What its second reading sets comes before netweaver's defaults."""
    host = f"Host hv\n HostName 127.0.0.1\n Port {PORT}\n IdentityFile {server.key}\n"
    (server.ssh / "config").write_text(host + SECOND_READINGS[case] + "\n")
    assert server.both() == (False, False)
    assert not (server.ssh / "known_hosts").exists()
    (server.ssh / "known_hosts").write_text(f"{server.name} {server.host_keys['ed25519']}\n")
    assert server.both() == (True, True)


def test_a_user_of_the_second_reading(server: Loopback) -> None:
    config = "Host hv\n HostName 127.0.0.1\nHost 127.*\n User admin\nMatch final all\n"
    (server.ssh / "config").write_text(config)
    code = "import netweaver; access = netweaver.Access('', []); target = netweaver.Target('hv')"
    done = server.run(PYTHON, "-c", f"{code}; print(access.settings(target).user)")
    assert done.stdout == "admin\n", done.stderr


# -- options --

# Lines of sshd_config, lines of ssh_config for the host, and whether the login succeeds by both.
OPTIONS = {
    "a cipher": ([], ["Ciphers aes256-ctr"], True),
    "no common cipher": (["Ciphers aes128-ctr"], ["Ciphers aes256-ctr"], False),
    "a key exchange": ([], ["KexAlgorithms ecdh-sha2-nistp256"], True),
    "a key exchange by its newer name": ([], ["KexAlgorithms curve25519-sha256"], True),
    "no common key exchange": (
        ["KexAlgorithms diffie-hellman-group14-sha256"],
        ["KexAlgorithms curve25519-sha256@libssh.org,ecdh-sha2-nistp256"],
        False,
    ),
    "an outdated key exchange": (["KexAlgorithms diffie-hellman-group14-sha1"], [], False),
    "no common MAC": (
        ["MACs hmac-sha2-256", "Ciphers aes128-ctr"],
        ["MACs hmac-sha2-512", "Ciphers aes128-ctr"],
        False,
    ),
    "user keys of another kind": ([], ["PubkeyAcceptedAlgorithms rsa-sha2-512"], False),
    "user keys of this kind": ([], ["PubkeyAcceptedAlgorithms ssh-ed25519"], True),
    "user keys but this kind": ([], ["PubkeyAcceptedAlgorithms -ssh-ed25519"], False),
    "no user keys": ([], ["PubkeyAuthentication no"], False),
    "other methods": ([], ["PreferredAuthentications password"], False),
    "other methods too": ([], ["PreferredAuthentications password,publickey"], True),
    "IPv4": ([], ["AddressFamily inet"], True),
    "IPv6": ([], ["AddressFamily inet6"], False),
    "an address of this machine": ([], ["BindAddress 127.0.0.9"], True),
    "an address of another machine": ([], ["BindAddress 198.51.100.1"], False),
    "a remote command": ([], ["RemoteCommand true"], False),
    "no session": ([], ["SessionType subsystem"], False),
    "a token in the key's path": ([], ["IdentityFile {directory}/%L%%/../key"], False),
    "the user in the key's path": ([], ["IdentityFile {directory}/%r/../key"], False),
    "the port in the key's path": ([], ["IdentityFile {directory}/key-%p"], True),
    "a variable in the key's path": ([], ["IdentityFile {directory}/key-${{MY_PORT}}"], True),
    "a hash in the key's path": ([], ["IdentityFile {directory}/%C"], True),
    "the home in the key's path": ([], ["IdentityFile ~/../key"], True),
    "a key that others can read": ([], ["IdentityFile {directory}/readable"], False),
    "a key with a passphrase": ([], ["IdentityFile {directory}/locked"], False),
    "a pair that doesn't match": ([], ["IdentityFile {directory}/mismatched"], False),
    "two keys, the first unknown": (
        [],
        ["IdentityFile {directory}/other-ecdsa", "IdentityFile {directory}/key"],
        True,
    ),
    "a proxy": ([], ["ProxyCommand {relay}"], True),
    "a proxy by the name of the host": (
        [],
        ["ProxyCommand bash -c 'test %k = hv && exec 3<>/dev/tcp/%h/%p; cat <&3 & cat >&3'"],
        True,
    ),
    "a proxy with an unknown token": ([], ["ProxyCommand {relay} %Z"], False),
    "two keys required": (
        ["AuthenticationMethods publickey,publickey"],
        ["IdentityFile {directory}/key", "IdentityFile {directory}/other-ecdsa"],
        True,
    ),
    "a password required": (
        ["AuthenticationMethods publickey,password", "PasswordAuthentication yes"],
        [],
        False,
    ),
}


@pytest.fixture
def keys(server: Loopback) -> None:
    """Put more files with keys beside the user's key."""
    directory = server.directory
    connection_hash = server.run("ssh", "-G", "-oControlPath=/%C", "hv").stdout
    name = re.search(r"controlpath /(\w+)", connection_hash)
    assert name
    for copy in (name[1], f"key-{PORT}", "readable", "mismatched"):
        shutil.copy(server.key, directory / copy)
    (directory / "readable").chmod(0o644)
    shutil.copy(directory / "other-ecdsa.pub", directory / "mismatched.pub")
    if not (directory / "locked").exists():
        generate_key(directory / "locked", "ed25519", "-N", "secret")


@pytest.mark.parametrize("case", OPTIONS)
def test_options_hold_as_for_ssh(server: Loopback, keys: None, case: str) -> None:
    sshd_lines, lines, succeeds = OPTIONS[case]
    words = words_for(server)
    authorized = server.directory / "authorized"
    public = [server.directory / f"{name}.pub" for name in ("key", "other-ecdsa", "locked")]
    if case == "two keys, the first unknown":
        public = public[:1]
    authorized.write_text("".join(path.read_text() for path in public))
    lines = [line.format(**words) for line in lines]
    if not any(line.startswith("IdentityFile") for line in lines):
        lines.append(f"IdentityFile {server.key}")
    server.configure("IdentitiesOnly yes", *lines)
    server.start(*sshd_lines, f"AuthorizedKeysFile {authorized}")
    try:
        assert server.both(environment={"MY_PORT": str(PORT)}) == (succeeds, succeeds)
        if "BindAddress 127.0.0.9" in lines:
            assert server.log.count("Connection from 127.0.0.9 ") == 2
    finally:
        server.start()


def test_a_proxy_command_ends_with_what_it_has_started(server: Loopback) -> None:
    started = f"sleep 300.{os.getpid()}"
    relay = str(words_for(server)["relay"]).replace("exec", f"{started} & exec", 1)
    server.configure(f"IdentityFile {server.key}", f"ProxyCommand {relay}")
    done = server.login()
    assert done.returncode == 0, done.stderr
    assert subprocess.run(["pgrep", "-fx", started], capture_output=True).stdout == b""


@pytest.mark.parametrize(
    "option",
    [
        "Match exec 'touch {directory}/ran'",
        "Host *",
        "Include {ssh}/config",
        "Nonsense yes",
        "User",
    ],
)
def test_options_that_ssh_refuses(server: Loopback, option: str) -> None:
    assert server.both(option.format(**words_for(server))) == (False, False)
    assert not (server.directory / "ran").exists()


@pytest.mark.parametrize(
    "option",
    ["User=nobody", "user nobody", "Port = 1", "HostName=192.0.2.1", "IdentityFile=/none"],
)
def test_options_come_before_the_configuration(server: Loopback, option: str) -> None:
    assert server.both() == (True, True)
    server.configure()
    assert server.both(option, "ConnectTimeout=2") == (False, False)


@pytest.mark.parametrize(
    "line",
    [
        "Include {directory}/conf.d/*",
        "Include ssh_config.d/*",
        "include=ssh_config.d/strict.conf",
        "Include '{directory}/conf.d/strict.conf'",
        "Include 'ssh_config.d/strict.conf' # of this site",
    ],
)
def test_the_configuration_of_the_system(server: Loopback, line: str) -> None:
    """Relative names there are in /etc/ssh."""
    system = server.directory / "ssh_config"
    included = server.directory / "conf.d"
    included.mkdir(exist_ok=True)
    (included / "strict.conf").write_text("Host hv\n  PubkeyAuthentication no\n")
    system.write_text(line.format(directory=server.directory) + "\n")
    prepare = 'mount --bind "$0/conf.d" /etc/ssh/ssh_config.d'
    try:
        assert server.both(prepare=prepare) == (False, False)
        (included / "strict.conf").write_text("Host hv\n  AddressFamily inet\n")
        assert server.both(prepare=prepare) == (True, True)
    finally:
        system.write_text("")


def test_a_relative_name_in_an_included_file_of_the_system(server: Loopback) -> None:
    """It can't be followed, and is refused rather than left out."""
    (server.directory / "ssh_config").write_text("Include ssh_config.d/*.conf\n")
    included = server.directory / "conf.d"
    included.mkdir(exist_ok=True)
    (included / "more.conf").write_text("Include ssh_config.d/nested\n")
    (included / "nested").write_text("PubkeyAuthentication no\n")
    prepare = 'mount --bind "$0/conf.d" /etc/ssh/ssh_config.d'
    try:
        assert server.by_ssh(prepare=prepare).returncode != 0
        done = server.login(prepare=prepare)
        assert done.returncode == 1
        assert "make it absolute" in done.stderr
    finally:
        (server.directory / "ssh_config").write_text("")
        shutil.rmtree(included)


def test_a_revoked_authority_of_the_hosts_certificate(server: Loopback) -> None:
    authority = server.directory / "authority"
    public = generate_key(authority, "ed25519")
    host_key = server.directory / "host-ed25519"
    command = ["ssh-keygen", "-q", "-s", str(authority), "-I", "hv", "-h", f"{host_key}.pub"]
    subprocess.run(command, check=True)
    server.start(f"HostCertificate {host_key}-cert.pub")
    known = server.ssh / "known_hosts"
    try:
        for lines in (["@revoked * {}"], ["@revoked * {}", f"{server.name} {{}}"]):
            text = "\n".join(lines)
            known.write_text(text.format(public, server.host_keys["ed25519"]) + "\n")
            assert server.both() == (False, False)
        known.write_text(f"{server.name} {server.host_keys['ed25519']}\n")
        assert server.both() == (True, True)
    finally:
        server.start()


@pytest.mark.parametrize(
    "line",
    [
        "UserKnownHostsFile /dev/null # throwaway VMs",
        "UserKnownHostsFile '/dev/null'",
        "GlobalKnownHostsFile '/dev/null'",
    ],
)
def test_known_hosts_files_of_other_hosts(server: Loopback, line: str) -> None:
    """A line whose names are hard to read has not set the names of all hosts."""
    server.configure(f"IdentityFile {server.key}", before=f"Host lab-*\n {line}\n")
    assert server.both() == (True, True)


def test_a_match_that_leaves_something_running(server: Loopback) -> None:
    """It holds ssh's standard error open, and ssh has ended all the same."""
    pids = server.directory / "pids"
    line = f'Match exec "sleep 60 & echo $! >>{pids}"'
    server.configure(f"IdentityFile {server.key}", before=f"{line}\n")
    try:
        assert server.login().returncode == 0
    finally:
        for pid in pids.read_text().split():
            os.kill(int(pid), signal.SIGKILL)


def test_a_server_with_certificates_alone(server: Loopback) -> None:
    """Its signature has the name of the plain algorithm."""
    authority = server.directory / "authority-of-hosts"
    generate_key(authority, "ed25519")
    host_key = server.directory / "host-ed25519"
    command = ["ssh-keygen", "-q", "-s", str(authority), "-I", "hv", "-h", f"{host_key}.pub"]
    subprocess.run(command, check=True)
    server.start(
        f"HostCertificate {host_key}-cert.pub",
        "HostKeyAlgorithms ssh-ed25519-cert-v01@openssh.com",
    )
    try:
        assert server.both() == (True, True)
    finally:
        server.start()


def test_a_jump_whose_configuration_is_read_once(server: Loopback) -> None:
    """netweaver's defaults hold for it, although that of the host behind it is read twice."""
    (server.ssh / "config").write_text(
        f"IdentityFile {server.key}\n"
        f"Host hv\n HostName 127.0.0.1\n Port {PORT}\n ProxyJump web\n"
        " CanonicalizeHostname always\n"
    )
    done = server.login()
    assert done.returncode == 0, done.stderr


def test_a_jump_whose_configuration_is_read_twice(server: Loopback) -> None:
    (server.ssh / "config").write_text(
        f"IdentityFile {server.key}\n"
        "Match final host 192.0.2.77\n StrictHostKeyChecking yes\n"
        f"Host hv\n HostName 127.0.0.1\n Port {PORT}\n ProxyJump web\n"
        "Host web\n HostName 192.0.2.77\n"
    )
    assert server.login().returncode == 1
    assert server.by_ssh().returncode == 255


def test_a_match_of_a_user_who_is_configured_later(server: Loopback) -> None:
    """At that line he isn't the user yet."""
    config = "Match user admin\nStrictHostKeyChecking no\nHost hv\nUser admin"
    server.configure(f"IdentityFile {server.key}", before=config)
    (server.ssh / "known_hosts").write_text(f"{server.name} {server.other_keys['ed25519']}\n")
    by_ssh = server.run("ssh", "-oBatchMode=yes", "hv", "true")
    assert "Host key verification failed" in by_ssh.stderr
    assert "does not match the known key" in server.login().stderr


def test_options_are_not_for_a_jump(server: Loopback) -> None:
    """They would switch off the check of its changed key."""
    server.configure(f"IdentityFile {server.key}", "Host web", f"IdentityFile {server.key}")
    known = f"web {server.other_keys['ed25519']}\n"
    options = ("ProxyJump=web", "UserKnownHostsFile=/dev/null")
    (server.ssh / "known_hosts").write_text(known)
    assert server.both(*options) == (False, False)
    (server.ssh / "known_hosts").write_text(known)
    done = server.login(*options)
    assert "Host key for web has changed" in done.stderr


def test_a_configuration_that_others_can_write(server: Loopback) -> None:
    (server.ssh / "config").chmod(0o666)
    assert server.both() == (False, False)


@pytest.mark.parametrize(
    "option",
    [
        "ProxyJump=web",
        "ProxyJump=%r@web",
        "ProxyJump=web:22",
        "ProxyJump=root@[web]:22",
        "ProxyCommand=ssh -W %h:%p web",
    ],
)
def test_a_jump_in_an_option(server: Loopback, option: str) -> None:
    server.configure(f"IdentityFile {server.key}", "Host web", f"IdentityFile {server.key}")
    before = server.log.count("Accepted publickey")
    assert server.both(option) == (True, True)
    assert server.log.count("Accepted publickey") == before + 4


def test_a_cipher_that_paramiko_lacks(server: Loopback) -> None:
    """ssh logs in; netweaver refuses, since it must not use another one."""
    option = "Ciphers chacha20-poly1305@openssh.com"
    done = server.login(option)
    assert server.by_ssh(option).returncode == 0
    assert done.returncode == 1
    assert "Ciphers" in done.stderr


def test_a_second_attempt_to_connect(server: Loopback) -> None:
    """ConnectionAttempts 2 waits a second, and tries again."""
    done = server.login(
        f"Port {PORT + 1}",
        "ConnectionAttempts 2",
        prepare="date +%s.%N >started",
    )
    started = float((server.directory / "started").read_text())
    assert "refused" in done.stderr
    assert (server.directory / "started").stat().st_mtime - started < 1
    seconds = float(server.run("date", "+%s.%N").stdout) - started
    assert seconds > 1


@pytest.mark.parametrize("name", ["schlüssel", "two words", "100%", "a#b", "$HOME"])
def test_a_key_in_a_file_of_any_name(server: Loopback, name: str) -> None:
    path = server.directory / name
    shutil.copy(server.key, path)
    server.configure("IdentitiesOnly yes")
    plain = {"LC_ALL": "C", "LANG": "", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = server.login(key=path, environment=plain)
    assert done.returncode == 0, done.stderr
    escaped = name.replace("%", "%%")
    server.configure(f'IdentityFile "{server.directory}/{escaped}"')
    assert server.both(environment=plain) == (True, True)


# -- keys and ssh-agent --


class FrontAgent(threading.Thread):
    """An agent that lists a security key before the keys of another agent."""

    SECURITY_KEY = b"".join(
        struct.pack(">I", len(part)) + part
        for part in (b"sk-ssh-ed25519@openssh.com", bytes(range(32)), b"ssh:")
    )

    def __init__(self, path: Path, agent: str, comment: bytes = b"token") -> None:
        super().__init__(daemon=True)
        self._agent = agent
        self._comment = comment
        self._listener = listen(path)
        self.start()

    def run(self) -> None:
        while True:
            client, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        while request := self._receive(client):
            with socket.socket(socket.AF_UNIX) as agent:
                agent.connect(self._agent)
                self._send(agent, request)
                answer = self._receive(agent)
            if request[:1] == b"\x0b":
                (count,) = struct.unpack_from(">I", answer, 1)
                key = self._string(self.SECURITY_KEY) + self._string(self._comment)
                answer = b"\x0c" + struct.pack(">I", count + 1) + key + answer[5:]
            self._send(client, answer)

    @staticmethod
    def _string(data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + data

    def _send(self, sock: socket.socket, message: bytes) -> None:
        sock.sendall(self._string(message))

    @staticmethod
    def _receive(sock: socket.socket) -> bytes:
        head = sock.recv(4, socket.MSG_WAITALL)
        if len(head) < 4:
            return b""
        return sock.recv(struct.unpack(">I", head)[0], socket.MSG_WAITALL)


@pytest.mark.parametrize("comment", [b"token", b"\xff\xfe"])
def test_an_agent_with_a_security_key(server: Loopback, tmp_path: Path, comment: bytes) -> None:
    server.configure()
    FrontAgent(tmp_path / "front", server.agent(server.key), comment)
    assert server.both(environment={"SSH_AUTH_SOCK": str(tmp_path / "front")}) == (True, True)


@pytest.mark.parametrize(
    ("line", "variable", "succeeds"),
    [
        ("IdentityAgent {agent}", "", True),
        ("IdentityAgent $MY_AGENT", "MY_AGENT", True),
        ("IdentityAgent ${{MY_AGENT}}", "MY_AGENT", True),
        ("IdentityAgent SSH_AUTH_SOCK", "SSH_AUTH_SOCK", True),
        ("IdentityAgent none", "SSH_AUTH_SOCK", False),
        ("IdentityAgent /nowhere", "SSH_AUTH_SOCK", False),
        ("IdentityAgent $MY_AGENT", "SSH_AUTH_SOCK", False),
        ("IdentitiesOnly yes", "SSH_AUTH_SOCK", False),
        ("IdentitiesOnly yes\nIdentityFile {directory}/key.pub", "SSH_AUTH_SOCK", True),
        ("", "SSH_AUTH_SOCK", True),
        ("", "", False),
    ],
)
def test_the_agent_is_that_of_ssh(
    server: Loopback, line: str, variable: str, succeeds: bool
) -> None:
    agent = server.agent(server.key)
    server.configure(line.format(agent=agent, directory=server.directory))
    environment = {variable: agent} if variable else {}
    assert server.both(environment=environment) == (succeeds, succeeds)


CERTIFICATES = {
    # Options of ssh-keygen for the certificate; lines of sshd_config; whether the key itself is
    # authorized; and whether the login succeeds.
    "not trusted": (["-n", "root"], [], True, True),
    "expired": (["-n", "root", "-V", "20200101:20200201"], ["TrustedUserCAKeys"], True, True),
    "expired only": (
        ["-n", "root", "-V", "20200101:20200201"],
        ["TrustedUserCAKeys"],
        False,
        False,
    ),
    "valid": (["-n", "root"], ["TrustedUserCAKeys"], False, True),
    "for another user": (["-n", "nobody"], ["TrustedUserCAKeys"], False, False),
}


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
@pytest.mark.parametrize("case", CERTIFICATES)
def test_a_certificate_beside_the_key(server: Loopback, case: str, kind: str) -> None:
    options, lines, is_authorized, succeeds = CERTIFICATES[case]
    key = certified_key(server, kind, *options)
    authorized = f"{key}.pub" if is_authorized else "none"
    trusted = [f"{line} {server.directory}/ca.pub" for line in lines]
    server.start(f"AuthorizedKeysFile {authorized}", *trusted)
    try:
        server.configure(f"IdentityFile {key}", "IdentitiesOnly yes")
        assert server.both() == (succeeds, succeeds)
    finally:
        server.start()


def certified_key(server: Loopback, kind: str, *options: str) -> Path:
    """Return the path of a key with a certificate."""
    authority = server.directory / "ca"
    if not authority.exists():
        generate_key(authority, "ed25519")
    key = server.directory / f"user-{kind}"
    if not key.exists():
        generate_key(key, kind)
    command = ["ssh-keygen", "-q", "-s", str(authority), "-I", "x", *options, f"{key}.pub"]
    subprocess.run(command, check=True)
    return key


def test_a_certificate_without_an_ending(server: Loopback) -> None:
    """ssh looks for KEY-cert, too."""
    key = certified_key(server, "ed25519", "-n", "root")
    Path(f"{key}-cert.pub").replace(f"{key}-cert")
    server.start("AuthorizedKeysFile none", f"TrustedUserCAKeys {server.directory}/ca.pub")
    try:
        server.configure(f"IdentityFile {key}")
        assert server.both() == (True, True)
    finally:
        server.start()
        Path(f"{key}-cert").unlink()


@pytest.mark.parametrize("content", ["", "nonsense", "ssh-ed25519-cert-v01@openssh.com AAAA"])
def test_a_damaged_certificate(server: Loopback, content: str) -> None:
    key = certified_key(server, "ed25519", "-n", "root")
    Path(f"{key}-cert.pub").write_text(content)
    server.start(f"AuthorizedKeysFile {key}.pub")
    try:
        server.configure(f"IdentityFile {key}")
        assert server.both() == (True, True)
    finally:
        server.start()


@pytest.mark.parametrize("by_agent", [False, True])
def test_a_certificate_in_a_file_of_any_name(server: Loopback, by_agent: bool) -> None:
    key = certified_key(server, "ed25519", "-n", "root")
    certificate = server.directory / f"certificate-{PORT}"
    Path(f"{key}-cert.pub").replace(certificate)
    server.start("AuthorizedKeysFile none", f"TrustedUserCAKeys {server.directory}/ca.pub")
    try:
        line = f"CertificateFile {server.directory}/certificate-%p"
        if by_agent:
            server.configure(line)
            assert server.both(environment={"SSH_AUTH_SOCK": server.agent(key)}) == (True, True)
        else:
            server.configure(line, f"IdentityFile {key}")
            assert server.both() == (True, True)
            server.configure(line)
            assert server.both() == (False, False)
    finally:
        server.start()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("rsa", ["-m", "PEM"]),
        ("ecdsa", ["-m", "PEM"]),
        ("ed25519", []),
        ("ecdsa", ["-b", "521"]),
        ("rsa", ["-b", "2048"]),
    ],
)
@pytest.mark.parametrize("passphrase", ["", "open sesame"])
def test_keys_in_all_formats(
    server: Loopback, tmp_path: Path, kind: str, options: list[str], passphrase: str
) -> None:
    """Whether or not the public half lies beside it; its passphrase is asked for once."""
    key = tmp_path / "key"
    generate_key(key, kind, "-N", passphrase, *options)
    server.start(f"AuthorizedKeysFile {tmp_path}/authorized")
    shutil.copy(f"{key}.pub", tmp_path / "authorized")
    tmp_path.chmod(0o755)
    try:
        for _ in range(2):
            done = server.login(key=key, answers=(passphrase,))
            assert done.returncode == 0, done.stderr
            questions, _, _ = json.loads(done.stdout)
            assert len(questions) == bool(passphrase)
            Path(f"{key}.pub").unlink(missing_ok=True)
    finally:
        server.start()


def test_a_passphrase_that_nobody_needs(server: Loopback, keys: None) -> None:
    locked = server.directory / "locked"
    server.configure(f"IdentityFile {locked}", f"IdentityFile {server.key}")
    done = server.login(answers=("secret",))
    assert done.returncode == 0
    assert json.loads(done.stdout)[0] == []
    server.configure()
    done = server.login(key=locked, answers=("secret",))
    assert "refused" in done.stderr
    assert json.loads(done.stdout)[0] == []


def test_a_passphrase_that_takes_longer_than_the_server_waits(own_server: Loopback) -> None:
    """Logs in by a second connection, without a second question."""
    locked = own_server.directory / "locked"
    generate_key(locked, "ed25519", "-N", "secret")
    own_server.start(f"AuthorizedKeysFile {locked}.pub", "LoginGraceTime 1")
    done = own_server.login(key=locked, answers=("secret",), answer_seconds=3)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)[0]) == 1


# -- words for what fails --


@pytest.mark.parametrize(
    ("sshd_lines", "words"),
    [
        (["ForceCommand internal-sftp"], "can't run commands"),
        (["ForceCommand /usr/sbin/nologin"], "can't run commands"),
        (["ForceCommand /bin/false"], "can't run commands"),
        (["PubkeyAuthentication no", "KbdInteractiveAuthentication yes"], "accepts no keys"),
        (["PubkeyAuthentication no", "PasswordAuthentication yes"], "only password"),
        (
            ["AuthenticationMethods publickey,password", "PasswordAuthentication yes"],
            "password in addition",
        ),
        (["AuthorizedKeysFile none"], "add the public key to root's"),
        (["DenyUsers root"], "add the public key to root's"),
        (["PermitRootLogin no"], "is authorized for root, but the login was refused"),
        (["Ciphers chacha20-poly1305@openssh.com"], "offers only chacha20-poly1305"),
        (["KexAlgorithms sntrup761x25519-sha512@openssh.com"], "only sntrup761x25519-sha512"),
        (["MACs umac-64@openssh.com", "Ciphers aes128-ctr"], "only umac-64@openssh.com"),
        (["KexAlgorithms diffie-hellman-group14-sha1"], "-o KexAlgorithms=+diffie-hellman-group14"),
        (["RequiredRSASize 8192", "AuthorizedKeysFile none"], "add the public key"),
        (["MaxSessions 0"], "MaxSessions"),
    ],
)
def test_the_reason_of_a_failure(server: Loopback, sshd_lines: list[str], words: str) -> None:
    server.start(*sshd_lines)
    try:
        done = server.login()
        assert done.returncode == 1
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1
    finally:
        server.start()


def test_too_many_keys(server: Loopback, tmp_path: Path) -> None:
    keys = [tmp_path / f"key{number}" for number in range(8)]
    for key in keys:
        generate_key(key, "ed25519")
    done = server.login(environment={"SSH_AUTH_SOCK": server.agent(*keys)})
    assert "keys of ssh-agent" in done.stderr
    assert "Too many authentication failures" in done.stderr
    assert "IdentitiesOnly" in done.stderr
    server.configure(*(f"IdentityFile {key}" for key in keys))
    server.start("MaxAuthTries 3")
    try:
        done = server.login(key=keys[0])
        assert "Too many authentication failures" in done.stderr
        assert "add the public key to root's" in done.stderr
        assert "IdentitiesOnly" not in done.stderr
    finally:
        server.start()


def test_no_key_and_a_key_that_is_refused(server: Loopback) -> None:
    server.configure()
    assert "no key to log in with" in server.login().stderr
    done = server.login(key=server.directory / "other-rsa")
    assert f"refused the key {server.directory}/other-rsa for root" in done.stderr
    assert "add the public key to root's" in done.stderr


def test_a_server_that_takes_its_time(server: Loopback) -> None:
    """Waits for ConnectTimeout, and doesn't call that a refusal."""
    command = Path(f"/usr/local/sbin/slow-keys-{server.directory.parent.name}")
    command.write_text(f"#!/bin/sh\nsleep 3\ncat {server.key}.pub\n")
    command.chmod(0o755)
    server.start(
        "AuthorizedKeysFile none",
        f"AuthorizedKeysCommand {command}",
        "AuthorizedKeysCommandUser root",
    )
    try:
        assert server.login().returncode == 0
        done = server.login("ConnectTimeout 1")
        assert "no answer within 1 s" in done.stderr
        assert "refused" not in done.stderr
    finally:
        command.unlink()
        server.start()


def test_a_connection_that_stalls_anywhere(server: Loopback) -> None:
    """After every 50 bytes of a login the server falls silent: each is an error in time."""
    server.configure(f"IdentityFile {server.key}", "ConnectTimeout 2")
    done = server.run(PYTHON, "-c", STALL, str(server.key), str(PORT))
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcomes) > 40
    for size, seconds, error in outcomes:
        assert seconds < 8, (size, error)
        assert "127.0.0.1" in error, size
        assert "refused" not in error, size


# -- in the lab --


@pytest.mark.lab
def test_host_key_checking(own_lab: Lab) -> None:
    lab = own_lab
    few = ("-c", "3", "--source-command", FAST)
    known = lab.directory / "known"
    own = ("-o", f"UserKnownHostsFile={known}")
    strict = ("-o", "StrictHostKeyChecking=yes")
    line = failure(lab.netweaver(*lab.arguments(*few, *own, *strict), seconds=15), 3)
    assert "StrictHostKeyChecking is yes" in line
    assert not known.exists()
    done = lab.netweaver(*lab.arguments(*few, *own, "-o", "StrictHostKeyChecking=no"))
    assert f"root@{lab.hv.address}: its host key is not checked" in done.stderr
    assert report(done)["packets"]["matched"] == 3
    assert not known.exists()
    report(lab.netweaver(*lab.arguments(*few, *own)))
    report(lab.netweaver(*lab.arguments(*few, *own, *strict)))
    assert not (lab.home / ".ssh").exists()


JUMPS = """
Host xen
    HostName {hypervisor}
    User root
    IdentityFile {key}
    UserKnownHostsFile {directory}/known
    ProxyJump vm
Host vm
    HostName {source}
    Port 22
    IdentityFile {key}
    UserKnownHostsFile {directory}/known
Host directly
    HostName {source}
    IdentityFile {key}
    UserKnownHostsFile {directory}/known-directly
"""


def test_jumps_and_proxies(own_lab: Lab) -> None:
    lab = own_lab
    config = lab.home / ".ssh" / "config"
    config.parent.mkdir(0o700)
    text = JUMPS.format(
        hypervisor=lab.hv.address,
        source=lab.source.address,
        key=lab.key,
        directory=lab.directory,
    )
    config.write_text(text)
    hosts = ("--hv", "xen", "-s", "directly", "-d", lab.destination)
    arguments = ("-n", NAME, *hosts, "-c", "5", "--source-command", FAST)
    assert report(lab.netweaver(*arguments))["packets"]["matched"] == 5
    # ssh itself records the jump's key.
    assert len((lab.directory / "known").read_text().splitlines()) == 2
    assert len((lab.directory / "known-directly").read_text().splitlines()) == 1
    config.write_text(text.replace("ProxyJump vm", "ProxyCommand ssh -W %h:%p vm"))
    assert report(lab.netweaver(*arguments))["packets"]["matched"] == 5
    config.write_text(text.replace("ProxyJump vm", "ProxyCommand echo no way >&2; false"))
    line = failure(lab.netweaver(*arguments, seconds=20), 3)
    assert "through ProxyCommand echo no way >&2; false: no way" in line


def test_several_jumps() -> None:
    """The hypervisor is reached through two hosts; -k holds for each of them."""
    with Lab(sources=2) as lab:
        first, second = lab.sources
        hosts = {"xen": lab.hv, "one": first, "two": second}
        lines = [f"Host {name}\n  HostName {host.address}" for name, host in hosts.items()]
        lines.insert(1, "  ProxyJump one,two")
        (lab.home / ".ssh").mkdir(0o700)
        (lab.home / ".ssh" / "config").write_text("\n".join(lines))
        second.run("ip", "route", "add", "blackhole", f"{MANAGEMENT}.1/32")
        arguments = ("-n", NAME, "-s", "one", "-d", lab.destination, "-k", str(lab.key))
        few = ("-c", "5", "--source-command", FAST)
        document = report(lab.netweaver(*arguments, "--hv", "xen", *few))
        assert document["packets"]["matched"] == 5
        assert "root@two: " in failure(lab.netweaver(*arguments, "--hv", "two"), 3)
        lab.wait_clean()


def test_a_source_whose_traffic_address_is_unknown(own_lab: Lab) -> None:
    """Behind a jump, and without `ip`: nothing runs, and the error names --filter."""
    lab = own_lab
    stub = lab.source.directory / "bin" / "ip"
    stub.write_text("#!/bin/sh\nexit 127\n")
    stub.chmod(0o755)
    (lab.home / ".ssh").mkdir(0o700)
    config = f"Host src\n  HostName {lab.source.address}\n  ProxyJump {lab.hv.address}\n"
    (lab.home / ".ssh" / "config").write_text(config)
    hosts = ("--hv", lab.hv.address, "-d", lab.destination, "-k", str(lab.key))
    arguments = ("-n", NAME, *hosts, "-c", "50", "--source-command", FAST)
    for source in ("src", lab.source.address6):
        line = failure(lab.netweaver(*arguments, "-s", source), 4)
        assert lab.destination in line
        assert "--filter" in line
    selection = f"tcp and dst host {lab.destination}"
    document = report(lab.netweaver(*arguments, "-s", "src", "--filter", selection))
    assert document["packets"]["matched"] == 50
