"""The command line, as far as it goes without a network; and the parts that are pure text."""
from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import paramiko
import pytest
from lab import NETWEAVER

import netweaver

COMPLETE = ["-n", "web1", "--hv", "hv", "-s", "192.0.2.1", "-d", "192.0.2.2"]


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(NETWEAVER), *arguments], capture_output=True, text=True, check=False,
                          timeout=60, **options)


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "missing: --hv, -s, -d"),
    (["--hv", "hv", "-s", "192.0.2.1", "-d", "192.0.2.2"], "give its name with -n, or its interface with --vif"),
    ([*COMPLETE, "--nonsense"], "unrecognized arguments: --nonsense"),
    ([*COMPLETE, "-c", "0"], "'0' is not a whole number above 0"),
    ([*COMPLETE, "--num", "x"], "'x' is not the number of an interface"),
    ([*COMPLETE, "--timeout", "nan"], "'nan' is not a number of seconds"),
    ([*COMPLETE, "-i", "eth0; reboot"], "can't be the name of a network interface"),
    ([*COMPLETE, "-i", "-w/etc/passwd"], "expected one argument"),
    ([*COMPLETE, "--interface=-w/etc"], "can't be the name of a network interface"),
    ([*COMPLETE, "--source-command", "ping {host}"], "unknown placeholder {host}"),
    ([*COMPLETE, "--source-command", "ping {count.__class__}"], "unknown placeholder {count.__class__}"),
    ([*COMPLETE, "--source-command", "ping {"], "--source-command"),
    (["-n", "web1", "--hv", "hv:0", "-s", "192.0.2.1", "-d", "192.0.2.2"], "'hv:0' is not [user@]host[:port]"),
    (["-n", "web1", "--hv", "-oProxyCommand=id", "-s", "192.0.2.1", "-d", "192.0.2.2"], "expected one argument"),
    (["-n", "web1", "--hv=-oProxyCommand=id", "-s", "192.0.2.1", "-d", "192.0.2.2"], "is not [user@]host[:port]"),
    (["-n", "web1", "--hv", "hv", "-s", "192.0.2.1", "-d", "no such host"], "neither an IP address nor a name"),
])
def test_usage_errors_are_one_line(arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("netweaver: error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_has_groups_examples_and_exit_codes() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for words in ("what is measured:", "traffic:", "examples:", "exit codes:", "130, 143", "-k KEYFILE"):
        assert words in done.stdout
    assert run("--version").stdout == f"netweaver {netweaver.__version__}\n"


def test_help_and_readme_know_the_same_options() -> None:
    found = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", run("--help").stdout.split("examples:")[0]))
    table = NETWEAVER.with_name("README.md").read_text().split("\n## Options")[1].split("\n## ")[0]
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", table))
    assert found - {"-h", "--help", "--version"} - known == set()
    assert {option for option in known if option.startswith("--")} - found == set()


@pytest.mark.parametrize(("text", "parts", "shown"), [
    ("hv", (None, "hv", None), "root@hv"),
    ("admin@hv.example.org:2222", ("admin", "hv.example.org", 2222), "admin@hv.example.org:2222"),
    ("user@domain@hv", ("user@domain", "hv", None), "user@domain@hv"),
    ("[fd00::1]:2222", (None, "fd00::1", 2222), "root@[fd00::1]:2222"),
    ("root@[fd00::1]", ("root", "fd00::1", None), "root@[fd00::1]"),
    ("fd00::1", (None, "fd00::1", None), "root@[fd00::1]"),
    ("fe80::1%eth0", (None, "fe80::1%eth0", None), "root@[fe80::1%eth0]"),
])
def test_targets(text: str, parts: tuple[str | None, str, int | None], shown: str) -> None:
    target = netweaver.Target(text)
    assert (target.user, target.host, target.port) == parts
    assert str(target) == shown


@pytest.mark.parametrize("text", ["", "@hv", "hv:", "hv:65536", "hv:x", "a b", "-x", "$(id)", "hv;id", "hv\n", "[hv",
                                  "-oX@hv", "hv/../x", "`id`@hv"])
def test_no_targets(text: str) -> None:
    with pytest.raises(netweaver.UsageError):
        netweaver.Target(text)


@pytest.mark.parametrize(("answer", "words"), [
    ("\n\n", "there is no VM with the name-label 'web1'"),
    ("-1\n\n", "is not running"),
    ("5,-1\n5\n", "2 VMs have the name-label 'web1' (dom-ids 5,-1)"),
    ("5,6\n5,6\n", "2 VMs have the name-label 'web1' (dom-ids 5,6)"), ("5,-1\n", "2 VMs have"),
    ("5\n\n", "runs on another host of the pool"), ("5,6\n\n", "runs on another host of the pool"),
    ("<not in database>\n\n", "which are no dom-ids"),
])
def test_xe_answers_that_are_no_domain(answer: str, words: str) -> None:
    with pytest.raises(netweaver.RemoteCommandError) as caught:
        netweaver.parse_xe_dom_id(answer, "web1")
    assert words in str(caught.value)


@pytest.mark.parametrize("answer", ["5\n5\n", "5\n", "7,5,5\n5\n"])
def test_xe_answers_that_are_a_domain(answer: str) -> None:
    assert netweaver.parse_xe_dom_id(answer, "web1") == 5


def test_filters() -> None:
    assert netweaver.capture_filter(["10.0.0.2"], "10.0.0.1") == "ip and src host 10.0.0.2 and dst host 10.0.0.1"
    assert netweaver.capture_filter(["fd00::2", "fd00::3"], "fd00::1") == (
        "ip6 and (src host fd00::2 or src host fd00::3) and dst host fd00::1")
    assert netweaver.capture_filter([], "fd00::1") == "ip6 and dst host fd00::1"
    assert netweaver.capture_filter([], "10.0.0.1", "out") == "ip and src host 10.0.0.1"
    assert netweaver.capture_filter(["10.0.0.2"], "10.0.0.1", "both") == (
        "ip and ((src host 10.0.0.2 and dst host 10.0.0.1) or (dst host 10.0.0.2 and src host 10.0.0.1))")


def test_an_old_tcpdump_gets_no_option_that_it_does_not_know() -> None:
    assert "precision" not in netweaver.capture_command("eth0", "ip", "[ -B size ] [ -c count ]")
    old = netweaver.capture_command("eth0", "ip", "tcpdump [-aAdDeflLnNOpqRStuUvxX] [ -c count ]")
    assert old == "exec tcpdump -i eth0 -p -nn -s 128 -w - -- ip"


def test_what_tcpdump_says_at_its_end() -> None:
    text = ("tcpdump: listening on eth0, link-type EN10MB (Ethernet), snapshot length 128 bytes\n1 packet captured\n"
            "30 packets received by filter\n4 packets dropped by kernel\n2 packets dropped by interface\n")
    assert netweaver.tcpdump_counts(text) == {"captured": 1, "received": 30, "dropped": 4, "dropped_by_interface": 2}
    assert netweaver.tcpdump_counts("tcpdump: eth9: No such device exists\n") == {}


def test_nothing_reaches_a_terminal_unquoted() -> None:
    assert netweaver.printable("a\x1b[2Jb\nc\r\x9b\u202eé") == "a\\x1b[2Jb\\nc\\r\\x9b\\u202eé"


@pytest.mark.parametrize("greeting", [b"HTTP/1.0 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n" + bytes(99), b""])
def test_a_port_that_speaks_no_ssh(greeting: bytes, tmp_path: Path) -> None:
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
        done = run("-n", "web1", "--hv", f"127.0.0.1:{server.getsockname()[1]}", "-s", "127.0.0.1:1", "-d", "192.0.2.2",
                   env={**os.environ, "HOME": str(tmp_path)})
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("netweaver: error: root@127.0.0.1:")
    assert done.stderr.count("\n") == 1


def test_known_hosts(tmp_path: Path) -> None:
    """Patterns, hashes, ports, revoked keys and lines of other kinds, as OpenSSH reads them."""
    old, new = paramiko.ECDSAKey.generate(), paramiko.ECDSAKey.generate()
    line = f"{old.get_name()} {old.get_base64()}"
    path = tmp_path / "known_hosts"
    name = "[hv.example.org]:2222"

    def known() -> netweaver.KnownHosts:
        return netweaver.KnownHosts([str(path), str(tmp_path / "other")], "hv.example.org", 2222, "hv")

    for hosts in (name, "other,*.EXAMPLE.*", "*", "[h?.example.org]:2222", paramiko.HostKeys.hash_host(name)):
        path.write_text(f"# comment\nnonsense\n@cert-authority * {line}\n{name} sk-unknown AAAA\n{hosts} {line}\n")
        known().check(old)
        with pytest.raises(netweaver.HostConnectionError, match=f"remove line 5 of {path}"):
            known().check(new)
    path.write_text(f"hv.example.org {line}\n*,!* {line}")
    with pytest.raises(netweaver.HostConnectionError, match="is not in"):
        known().check(new, record=False)
    known().check(new)
    assert path.read_text().splitlines()[2] == f"{name} {new.get_name()} {new.get_base64()}"
    path.write_text(f"@revoked * {line}\n")
    with pytest.raises(netweaver.HostConnectionError, match=f"revoked: see line 1 of {path}"):
        known().check(old)
    path.write_text(f"{paramiko.HostKeys.hash_host('other')} {line}\n")
    known().check(new)
    assert path.read_text().splitlines()[1].startswith("|1|")
    known().check(new)
    (tmp_path / "other").write_text(f"{name} {line}\n")
    path.write_text("")
    known().check(old)
    assert path.read_text() == ""


def test_runs_that_meet_a_host_for_the_first_time_at_once(tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    path.write_text("# kept, though it ends without a newline")
    key = paramiko.ECDSAKey.generate()
    runs = [netweaver.KnownHosts([str(path)], "hv", 22, "hv") for _ in range(16)]
    netweaver.in_parallel(*(lambda run=run: run.check(key) for run in runs))
    assert path.read_text() == ("# kept, though it ends without a newline\n"
                                f"hv {key.get_name()} {key.get_base64()}\n")
    with pytest.raises(netweaver.HostConnectionError, match="has changed"):
        runs[0].known.clear()
        runs[0]._record(paramiko.ECDSAKey.generate())
