"""Commands that record: tcpdump's options and its report, and generators that fail."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

import netweaver


def test_an_old_tcpdump_gets_no_option_that_it_does_not_know() -> None:
    def command(usage: str) -> str:
        facts = netweaver.Facts(f"= tcpdump\n{usage}")
        return netweaver.tcpdump_command("eth0", "ip", facts, 128, 9)

    assert "precision" not in command("[ -B size ] [ -c count ]")
    old = command("tcpdump [-aAdDeflLnNOpqRStuUvxX] [ -c count ]")
    assert old == "exec tcpdump -i eth0 -p -nn -s 128 -c 9 -w - -- ip"


def test_what_tcpdump_says_at_its_end() -> None:
    text = (
        "tcpdump: listening on eth0, link-type EN10MB (Ethernet), snapshot length 128 bytes\n"
        "1 packet captured\n30 packets received by filter\n4 packets dropped by kernel\n"
        "2 packets dropped by interface\n"
    )
    assert netweaver.tcpdump_counts(text.splitlines()) == {
        "captured": 1,
        "received": 30,
        "dropped": 4,
        "dropped_by_interface": 2,
    }
    assert netweaver.tcpdump_counts(["tcpdump: eth9: No such device exists"]) == {}


@pytest.mark.parametrize("count", [1000, 999_999_999])
def test_a_packet_limit_that_tcpdump_accepts(count: int) -> None:
    facts = netweaver.Facts("= free\n9999999999 1% /tmp\n")
    interfaces = netweaver.Interfaces(
        "vif5.0", ("eth0",), False, {}, netweaver.RouteKind.GIVEN, None
    )
    commands = {"pif": None, "vif": None}
    selection = netweaver.Selection()
    captures, limit, _ = netweaver.make_captures(
        facts, interfaces, selection, "tcp", commands, count
    )
    assert limit is not None
    assert count < limit < 1 << 31
    for capture in captures:
        assert f" -c {limit} " in capture.command


def test_a_firewall_on_the_source() -> None:
    """The packets that it drops are refused to root, too."""
    errors = "[send_ip] sendto: Operation not permitted\n"
    job = SimpleNamespace(name="root@source", ended=True, stopped=False, status=1, errors=errors)
    with pytest.raises(netweaver.RemoteCommandError) as failure:
        netweaver.check_generator(cast(netweaver.Job, job), "hping3 -S 192.0.2.2", False)
    assert "firewall" in str(failure.value)
    assert "--sudo" not in str(failure.value)


@pytest.mark.parametrize(
    ("errors", "hint"),
    [
        ("[open_sockraw] socket(): Operation not permitted\n[main] can't open raw socket\n", True),
        ("ping: socket: Operation not permitted\n", True),
        ("no such device\n", False),
    ],
)
@pytest.mark.parametrize("sudo", [False, True])
def test_a_source_that_is_not_root(errors: str, hint: bool, sudo: bool) -> None:
    job = SimpleNamespace(name="user@source", ended=True, stopped=False, status=1, errors=errors)
    with pytest.raises(netweaver.RemoteCommandError) as failure:
        netweaver.check_generator(cast(netweaver.Job, job), "hping3 -S 192.0.2.2", sudo)
    assert ("Log in as root, or use --sudo" in str(failure.value)) == (hint and not sudo)
