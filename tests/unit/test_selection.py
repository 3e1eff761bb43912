"""Packets that are selected by address, and inside of tunnels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from frames import ethernet, ipv4, pcap, tcp, udp, vxlan
from helpers import T, analyzed, captures, offline, through

import netweaver


def test_selecting_by_address(tmp_path: Path) -> None:
    flows = [(T + i, ipv4(tcp(seq=i), source=f"10.0.0.{2 + i % 3}")) for i in range(90)]
    arguments = (
        "--pcaps",
        *captures(tmp_path, flows, [(time + 5000, content) for time, content in flows]),
    )
    assert analyzed(*arguments)["packets"]["matched"] == 90
    assert analyzed(*arguments, "-s", "10.0.0.2")["packets"]["matched"] == 30
    assert analyzed(*arguments, "-s", "10.0.0.2", "-s", "root@10.0.0.3")["packets"]["matched"] == 60
    assert analyzed(*arguments, "-d", "10.0.0.1")["packets"]["matched"] == 90
    assert offline(*arguments, "-d", "10.0.0.2").returncode == 6
    assert offline(*arguments, "-d", "10.0.0").returncode == 2


def test_translated_addresses(tmp_path: Path) -> None:
    pif = [(T + i * 1000, ipv4(tcp(seq=i), destination="192.0.2.1")) for i in range(60)]
    vif = [(T + i * 1000 + 5, ipv4(tcp(seq=i), destination="10.0.0.1")) for i in range(60)]
    arguments = "--pcaps", *captures(tmp_path, pif, vif)
    done = offline(*arguments)
    assert done.returncode == 6
    assert "--match-nat" in done.stderr
    assert analyzed(*arguments, "--match-nat")["packets"]["matched"] == 60


def test_sources_that_send_the_same_numbers_are_not_taken_for_copies(tmp_path: Path) -> None:
    """If addresses are ignored, their packets are identical, although each was captured once."""
    pif: list[tuple[int, bytes]] = []
    for number in range(60):
        for source in ("10.0.0.2", "10.0.0.3"):
            time = T + number * 1_000_000 + len(pif) % 2
            pif.append((time, ipv4(tcp(seq=number), source=source, destination="192.0.2.1")))
    vif = [(time + 5000, content) for time, content in pif]
    done = offline("--pcaps", *captures(tmp_path, pif, vif), "--match-nat")
    assert done.returncode == 6
    assert "no delay is certain" in done.stderr
    assert "twice" not in done.stderr


@pytest.mark.parametrize("port", [4789, 8472, 6081])
@pytest.mark.parametrize(
    "payload", [bytes(64), b"\x08" * 64, b"\xff" * 64, b"\x08" + bytes(7), b"x"], ids=len
)
def test_udp_to_a_tunnels_port_that_is_no_tunnel(port: int, payload: bytes, tmp_path: Path) -> None:
    packets = [(T + i * 1000, ipv4(udp(1024 + i, port, payload), 17, ident=i)) for i in range(100)]
    document = analyzed("--pcaps", *captures(tmp_path, packets, through(packets, [700] * 100)))
    assert (document["packets"]["matched"], document["capture"]["pif"]["other"]) == (100, 0)


@pytest.mark.parametrize("direction", ["in", "both"])
def test_a_tunnel_that_the_guest_terminates(direction: str, tmp_path: Path) -> None:
    """The innermost packet that has the addresses counts: here that is the tunnel's own."""

    def outer(i: int, source: str, destination: str) -> bytes:
        inner = ethernet(ipv4(tcp(seq=i), source="172.16.0.1", destination="172.16.0.2"))
        return ipv4(udp(*vxlan(inner)), 17, ident=i, source=source, destination=destination)

    inward = [(T + i * 1000, outer(i, "10.0.0.2", "10.0.0.1")) for i in range(100)]
    outward = [(T + i * 1000 + 300, outer(i, "10.0.0.1", "10.0.0.2")) for i in range(100)]
    vif = [
        *((when + 100, content) for when, content in inward),
        *((when - 50, content) for when, content in outward),
    ]
    document = analyzed(
        "--pcaps",
        *captures(tmp_path, sorted([*inward, *outward]), sorted(vif)),
        "-d",
        "10.0.0.1",
        "--direction",
        direction,
    )
    assert (document["packets"]["matched"], document["minimum"], document["maximum"]) == (
        100,
        0.1,
        0.1,
    )
    if direction == "both":
        assert (document["outbound"]["packets"]["matched"], document["outbound"]["maximum"]) == (
            100,
            0.05,
        )


def a_run_with_a_filter(**changes: Any) -> netweaver.Selection:
    """Return the selection of captures by a filter that captures answers of 10.0.0.1, too."""
    selection = netweaver.Selection(sources=["10.0.0.2"], destinations=["10.0.0.1"], **changes)
    interfaces = netweaver.Interfaces(
        "vif5.0", ("eth0",), False, {}, netweaver.RouteKind.GIVEN, None
    )
    return netweaver.captured_selection(selection, interfaces, "tcp")


def test_answers_that_a_filter_captures_are_left_out() -> None:
    request = bytes([10, 0, 0, 2, 10, 0, 0, 1])
    answer = request[4:] + request[:4]
    inbound = a_run_with_a_filter()
    assert inbound.direction_of(request) is netweaver.IN
    assert inbound.direction_of(answer) is None
    outbound = a_run_with_a_filter(directions=(netweaver.OUT,))
    assert outbound.direction_of(request) is None
    assert outbound.direction_of(answer) is netweaver.OUT


def test_nat_changes_the_address_of_answers() -> None:
    """The VM has another address on the vif, so that they can't be left out on both sides."""
    for direction in (netweaver.IN, netweaver.OUT):
        selection = a_run_with_a_filter(directions=(direction,), translated=True)
        assert selection.direction_of(bytes([10, 0, 0, 1, 10, 0, 0, 2])) is direction


def test_a_tunnel_has_packets_of_other_vms_too() -> None:
    """The capture's filter lets all of a tunnel through, also if addresses are translated."""
    selection = netweaver.Selection(
        sources=["10.0.0.2"], destinations=["10.0.0.1"], translated=True
    )
    interfaces = netweaver.Interfaces(
        "tap1", ("eth0",), True, {}, netweaver.RouteKind.SWITCHED, None
    )
    captured = netweaver.captured_selection(selection, interfaces, None)
    source, vm, other, private = (bytes([10, 0, 0, n]) for n in (2, 1, 9, 77))
    assert captured.direction_of(source + vm) is netweaver.IN
    for packet in (source + other, other + vm, other + private):
        assert captured.direction_of(packet) is None
    on_vif = captured.on_vif()
    assert on_vif.direction_of(source + private) is netweaver.IN
    assert on_vif.direction_of(other + private) is None


def test_translated_packets_beside_others(tmp_path: Path) -> None:
    """On the pif both addresses are known, on the vif one of them."""
    flows = {"10.0.0.1": "10.0.0.2", "10.0.0.8": "10.0.0.2", "10.0.0.7": "10.0.0.9"}
    pif = []
    for number in range(60):
        for shift, (destination, source) in enumerate(flows.items()):
            content = ipv4(tcp(seq=number), ident=number, source=source, destination=destination)
            pif.append((T + number * 1000 + shift, content))
    vif = [
        (T + n * 1000 + 500, ipv4(tcp(seq=n), ident=n, destination="10.0.0.77")) for n in range(60)
    ]
    arguments = ("--pcaps", *captures(tmp_path, pif, vif), "--match-nat")
    document = analyzed(*arguments, "-s", "10.0.0.2", "-d", "10.0.0.1")
    assert (document["packets"]["matched"], document["packets"]["lost"]) == (60, 0)


def test_a_tunnel_around_an_answer_is_left_out_with_it() -> None:
    answer = ipv4(tcp(), source="10.0.0.1", destination="10.0.0.2")
    frame = ethernet(ipv4(udp(*vxlan(ethernet(answer))), 17, source="10.9.0.1"))
    capture = netweaver.Capture(io.BytesIO(pcap([(T, frame)])), "pif")
    [sightings] = netweaver.collect({"pif": [capture], "vif": []}, a_run_with_a_filter())
    assert len(sightings.points["pif"].ids) == 0
    assert capture.filtered == 1
