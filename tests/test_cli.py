"""The command line, as far as it goes without a network; and the parts that are pure text."""
from __future__ import annotations

import os
import re
import socket
import threading
from pathlib import Path

import pytest
from helpers import offline
from lab import NETWEAVER

import netweaver

COMPLETE = ["-n", "web1", "--hv", "hv", "-s", "192.0.2.1", "-d", "192.0.2.2"]


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "missing: --hv, -s, -d"),
    (["--hv", "hv", "-s", "192.0.2.1", "-d", "192.0.2.2"], "give its name with -n, or its interface with --vif"),
    ([*COMPLETE, "--nonsense"], "unrecognized arguments: --nonsense"),
    ([*COMPLETE, "-c", "0"], "'0' is not a whole number from 1 to 999999999"),
    ([*COMPLETE, "-c", "99999999999"], "'99999999999' is not a whole number from 1 to 999999999"),
    ([*COMPLETE, "--num", "x"], "'x' is not the number of an interface"),
    ([*COMPLETE, "--duration", "nan"], "'nan' is not a number of seconds"),
    ([*COMPLETE, "-i", "eth0; reboot"], "is not the name of a network interface"),
    ([*COMPLETE, "-i", "-w/etc/passwd"], "expected one argument"),
    ([*COMPLETE, "--interface=-w/etc"], "is not the name of a network interface"),
    ([*COMPLETE, "--source-command", "ping {host}"], "unknown placeholder {host}"),
    ([*COMPLETE, "--source-command", "ping {count.__class__}"], "unknown placeholder {count.__class__}"),
    ([*COMPLETE, "--source-command", "ping {"], "--source-command"),
    (["-n", "web1", "--hv", "hv:0", "-s", "192.0.2.1", "-d", "192.0.2.2"], "'hv:0' is not [user@]host[:port]"),
    (["-n", "web1", "--hv", "-oProxyCommand=id", "-s", "192.0.2.1", "-d", "192.0.2.2"], "expected one argument"),
    (["-n", "web1", "--hv=-oProxyCommand=id", "-s", "192.0.2.1", "-d", "192.0.2.2"], "is not [user@]host[:port]"),
    (["-n", "web1", "--hv", "hv", "-s", "192.0.2.1", "-d", "no such host"], "neither an IP address nor a name"),
    (["-n", "web1", "--hv", "hv", "-s", "192.0.2.1", "-d", "10.0.0"], "'10.0.0' is neither an IP address nor a name"),
    *((["--pcaps", "a", "b", *given], f"{given[0]} is for measuring, and --pcaps analyses what was captured")
      for given in (["--hv", "hv"], ["--name-label", "web1"], ["--count", "5"], ["--duration", "5"], ["--sudo"],
                    ["--save", "x"], ["--wait", "2"], ["--interface", "eth1"])),
    (["--pcaps", "a", "b", "c"], "--pcaps takes a directory of --save, or two captures"),
    (["--pcaps", "a"], "a: give a directory of --save, or the captures of the pif and of the vif"),
    ([*COMPLETE, "--save", "/dev/null"], "can't save in /dev/null: /dev/null is no directory"),
    ([*COMPLETE, "--save", "/dev/null/x"], "can't save in /dev/null/x: /dev/null is no directory"),
])
def test_usage_errors_are_one_line(arguments: list[str], words: str) -> None:
    done = offline(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("netweaver: error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_has_groups_examples_and_exit_codes() -> None:
    done = offline("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for words in ("what is measured:", "traffic:", "examples:", "exit codes:", "130, 143", "-k KEYFILE"):
        assert words in done.stdout
    assert offline("--version").stdout == f"netweaver {netweaver.__version__}\n"


def test_help_and_readme_know_the_same_options() -> None:
    found = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", offline("--help").stdout.split("examples:")[0]))
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
    assert target.named(target.user or "root", target.port or 22) == shown


@pytest.mark.parametrize("text", ["", "@hv", "hv:", "hv:65536", "hv:x", "a b", "-x", "$(id)", "hv;id", "hv\n", "[hv",
                                  "-oX@hv", "hv/../x", "`id`@hv"])
def test_no_targets(text: str) -> None:
    with pytest.raises(netweaver.UsageError):
        netweaver.Target(text)


def test_an_old_tcpdump_gets_no_option_that_it_does_not_know() -> None:
    assert "precision" not in netweaver.capture_command("eth0", "ip", "[ -B size ] [ -c count ]", 128, 9)
    old = netweaver.capture_command("eth0", "ip", "tcpdump [-aAdDeflLnNOpqRStuUvxX] [ -c count ]", 128, 9)
    assert old == "exec tcpdump -i eth0 -p -nn -s 128 -c 9 -w - -- ip"


def test_what_tcpdump_says_at_its_end() -> None:
    text = ("tcpdump: listening on eth0, link-type EN10MB (Ethernet), snapshot length 128 bytes\n1 packet captured\n"
            "30 packets received by filter\n4 packets dropped by kernel\n2 packets dropped by interface\n")
    assert netweaver.tcpdump_counts(text.splitlines()) == {
        "captured": 1, "received": 30, "dropped": 4, "dropped_by_interface": 2}
    assert netweaver.tcpdump_counts(["tcpdump: eth9: No such device exists"]) == {}


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
        done = offline("-n", "web1", "--hv", f"127.0.0.1:{server.getsockname()[1]}", "-s", "127.0.0.1:1",
                       "-d", "192.0.2.2", env={**os.environ, "HOME": str(tmp_path)})
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("netweaver: error: root@127.0.0.1:")
    assert done.stderr.count("\n") == 1


def test_the_readmes_table_of_figures() -> None:
    """Limits, Prometheus, the summary and the README have their figures from the same table."""
    readme = NETWEAVER.with_name("README.md").read_text()
    for name, path, unit, text in netweaver.FIGURES:
        assert f"| `{name}` | `{'.'.join(path)}` | {unit} | {text} |\n" in readme
