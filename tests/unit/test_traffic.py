"""Traffic: the commands of its patterns, what they can't do, and the addresses they go to."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from helpers import FAST, failure, offline

import netweaver
from netweaver import Traffic

LIVE = ("-n", "web1", "--hv", "hv", "-s", "192.0.2.1", "-d", "192.0.2.2")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-d", "fd00::1"), "--traffic syn: hping3 has no IPv6"),
        (("-d", "fd00::1", "--traffic", "ping,udp"), "--traffic udp: hping3 has no IPv6"),
        (("-d", "fd00::1", "--traffic", "ping", "--rate", "2000"), "at most 1000 packets a second"),
        (("--traffic", "ping", "--port", "80"), "--port has no effect with --traffic ping"),
        (("--source-command", FAST, "--rate", "5"), "--rate has no effect with --source-command"),
        (("--source-command", FAST, "--size", "5"), "--size has no effect with --source-command"),
        (("--source-command", FAST, "--port", "5"), "--port has no effect with --source-command"),
        (("--fail-if", "dropped>0"), "--stages"),
    ],
)
def test_what_does_not_fit_is_a_usage_error(arguments: tuple[str, ...], words: str) -> None:
    assert words in failure(offline(*LIVE, *arguments), 2)


@pytest.mark.parametrize(
    ("pattern", "largest"), [("syn", 65495), ("flow", 65495), ("udp", 65507), ("ping", 65507)]
)
def test_sizes_are_bounded_by_what_a_packet_can_carry(pattern: str, largest: int) -> None:
    command = Traffic(pattern, size=largest).source_command(1, "10.0.0.1")
    assert f" {largest} " in command
    with pytest.raises(netweaver.UsageError, match=str(largest)):
        Traffic(pattern, size=largest + 1).source_command(1, "10.0.0.1")


def test_the_largest_echoes_are_sent_by_ping() -> None:
    """hping3 refuses them."""
    assert Traffic("ping", size=65495).source_command(1, "10.0.0.1").startswith("hping3 ")
    assert Traffic("ping", size=65496).source_command(1, "10.0.0.1").startswith("ping ")


@pytest.mark.parametrize(
    ("command", "sent"),
    [
        ("iperf3 -c {destination} -b {rate}", "iperf3 -c 10.0.0.1 -b {rate}"),
        ("awk '{ print {count} }'", "awk '{ print 7 }'"),
        ("echo {{count}} {seconds} ${PATH} {}", "echo {7} {seconds} ${PATH} {}"),
        ("x {interval} {size} {port}", "x 10000 0 0"),
    ],
)
def test_known_placeholders_are_replaced_and_other_braces_stay(command: str, sent: str) -> None:
    assert Traffic(command=command).source_command(7, "10.0.0.1") == sent


@pytest.mark.parametrize(
    ("rate", "interval"), [(1, "1"), (20, "0.05"), (300, "0.003333"), (1000, "0.001")]
)
def test_ping_gets_its_interval_in_plain_seconds(rate: int, interval: str) -> None:
    command = Traffic("ping", rate).source_command(5, "fd00::1")
    assert f" -i {interval} " in command


def test_hping3_gets_an_interval_below_a_second() -> None:
    """With a second it sends one packet, and waits for ever."""
    for traffic in (Traffic("syn", 1), Traffic(rate=1, command="hping3 -i u{interval} {count}")):
        assert " -i u999999 " in traffic.source_command(5, "10.0.0.1")


@pytest.mark.parametrize(
    ("pattern", "port", "load"),
    [
        ("syn", None, "hping3 -q -S -i u500 10.0.0.1"),
        ("flow", 80, "hping3 -S --destport 80 10.0.0.1"),
        ("syn", 80, "timeout 5 /usr/sbin/hping3 -A -p 80 10.0.0.1"),
        ("udp", 53, "hping3 --udp -p 53 10.0.0.1"),
        ("ping", None, "hping3 -1 10.0.0.1"),
        ("ping", None, "ping -f 10.0.0.1"),
    ],
)
def test_a_load_that_looks_like_the_probes(pattern: str, port: int | None, load: str) -> None:
    with pytest.raises(netweaver.UsageError, match="--load"):
        Traffic(pattern, port=port, load=load).source_command(1, "10.0.0.1")


@pytest.mark.parametrize(
    ("pattern", "load"),
    [
        ("syn", "hping3 -S -p 9 10.0.0.1"),
        ("syn", "hping3 --udp 10.0.0.1"),
        ("syn", "ping -f 10.0.0.1"),
        ("udp", "hping3 -S 10.0.0.1"),
        ("syn", "iperf3 -c 10.0.0.1 'unfinished"),
    ],
)
def test_a_load_that_can_be_told_from_the_probes(pattern: str, load: str) -> None:
    Traffic(pattern, load=load).source_command(1, "10.0.0.1")


@pytest.mark.parametrize(
    ("sources", "traffic", "address"),
    [
        (["10.0.0.2"], Traffic(), "10.0.0.1"),
        (["fd00::2"], Traffic("udp"), "10.0.0.1"),
        (["10.0.0.2"], Traffic("ping"), "10.0.0.1"),
        (["fd00::2"], Traffic("ping"), "fd00::1"),
        (["root@10.0.0.2:22"], Traffic(command="x {destination}"), "10.0.0.1"),
        ([], Traffic(command="x {destination}"), "fd00::1"),
    ],
)
def test_a_destination_with_addresses_of_both_versions(
    monkeypatch: pytest.MonkeyPatch, sources: list[str], traffic: Traffic, address: str
) -> None:
    def look_up(name: str, *_: object, **__: object) -> list[Any]:
        addresses = ["fd00::1", "10.0.0.1"] if name == "web" else [name]
        return [(0, 0, 0, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert netweaver.resolve_destination("web", sources, [traffic]) == address


@pytest.mark.parametrize(
    ("errors", "packets"),
    [
        ("20 packets transmitted, 20 packets received", 20),
        ("\n--- hping statistic ---\n7 packets tramitted, 0 packets received", 7),
        ("5 packets transmitted, 0 received, 100% packet loss", 5),
        ("50 packets transmitted, 0 received\n\n40 packets tramitted, 0 packets received", 90),
        ("no such host", None),
        ("", None),
    ],
)
def test_transmitted_packets(errors: str, packets: int | None) -> None:
    assert netweaver.transmitted_packets(errors) == packets
