"""The filter of the captures, as tcpdump understands it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from frames import ethernet, geneve, gre, ipv4, ipv6, pcap, tcp, udp, vxlan, write
from helpers import T

import netweaver

SOURCES, DESTINATION = ["10.0.0.2", "10.0.0.3"], "10.0.0.1"
SOURCES6, DESTINATION6 = ["fd00::2", "fd00::3"], "fd00::1"


def kept(expression: str, frames: list[bytes], tmp_path: Path) -> list[int]:
    """Return the numbers of the frames that tcpdump's filter lets through."""
    path = write(
        tmp_path / "all.pcap",
        pcap((T + number * 1000, frame) for number, frame in enumerate(frames)),
    )
    done = subprocess.run(
        ["tcpdump", "-r", path, "-w", "-", "--", expression], capture_output=True, check=True
    )
    with open(tmp_path / "kept.pcap", "wb") as file:
        file.write(done.stdout)
    found, at = [], 24
    while at < len(done.stdout):
        size = int.from_bytes(done.stdout[at + 8 : at + 12], "little")
        found.append(int.from_bytes(done.stdout[at + 4 : at + 8], "little") - T % 10**9 // 1000)
        at += 16 + size
    return found


def flows(version: int) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """IP packets that come in, those that go out, and those of others."""
    if version == 4:
        pairs = [("10.0.0.2", "10.0.0.1"), ("10.0.0.3", "10.0.0.1")]
        others = [("10.0.0.4", "10.0.0.1"), ("10.0.0.2", "10.0.0.9"), ("10.0.0.2", "10.0.0.3")]
        make: Any = ipv4
    else:
        pairs = [("fd00::2", "fd00::1"), ("fd00::3", "fd00::1")]
        others = [("fd00::4", "fd00::1"), ("fd00::2", "fd00::9"), ("fd00::2", "fd00::3")]
        make = ipv6
    return (
        [make(tcp(), source=a, destination=b) for a, b in pairs],
        [make(tcp(), source=b, destination=a) for a, b in pairs],
        [make(tcp(), source=a, destination=b) for a, b in others],
    )


def selection(sources: list[str], destination: str, direction: str) -> netweaver.Selection:
    return netweaver.Selection(netweaver.DIRECTIONS[direction], sources, [destination])


TAGS: list[list[tuple[int, int]]] = [[], [(0x8100, 7)], [(0x88A8, 9), (0x8100, 7)]]


@pytest.mark.parametrize("direction", ["in", "out", "both"])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("tags", TAGS, ids=len)
def test_the_filter_finds_the_traffic_alone_under_any_tags(
    tmp_path: Path, tags: list[tuple[int, int]], version: int, direction: str
) -> None:
    inward, outward, others = flows(version)
    packets = [*inward, *outward, *others]
    frames = [ethernet(packet, tags=tags) for packet in packets] + [
        ethernet(bytes(28), 0x0806, tags=tags)
    ]
    ends = (SOURCES, DESTINATION) if version == 4 else (SOURCES6, DESTINATION6)
    expression = selection(*ends, direction).pif_filter(ethernet=True, overlay=False)
    assert "vlan" not in expression  # libpcap before 1.9 looks for it at the wrong place
    assert (
        kept(expression, frames, tmp_path)
        == {"in": [0, 1], "out": [2, 3], "both": [0, 1, 2, 3]}[direction]
    )


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("tags", TAGS, ids=len)
def test_a_translated_address_is_captured_on_the_vif(
    tmp_path: Path, tags: list[tuple[int, int]], version: int
) -> None:
    """The source or the destination is still the one that is given."""
    inward, _, others = flows(version)
    frames = [ethernet(packet, tags=tags) for packet in [*inward, *others]]
    ends = (SOURCES, DESTINATION) if version == 4 else (SOURCES6, DESTINATION6)
    for translated, wanted in ((False, [0, 1]), (True, [0, 1, 2, 3, 4])):
        selected = netweaver.Selection([netweaver.IN], ends[0], [ends[1]], translated)
        assert kept(selected.vif_filter(ethernet=True), frames, tmp_path) == wanted
        assert kept(selected.pif_filter(ethernet=True, overlay=False), frames, tmp_path) == [0, 1]


@pytest.mark.parametrize("tags", TAGS, ids=len)
def test_fragments_of_probes_beside_a_load(tmp_path: Path, tags: list[tuple[int, int]]) -> None:
    """Over IPv6 the header of a fragment names the protocol."""
    echo = [ipv6(bytes([58, 0, 0, 1]) + bytes(60), 44), ipv6(bytes([58, 0, 0, 96]) + bytes(60), 44)]
    load = [ipv6(bytes([6, 0, 0, 1]) + bytes(60), 44), ipv6(tcp())]
    frames = [ethernet(packet, tags=tags) for packet in [*echo, *load]]
    probes = netweaver.ProbeFilter(1, None)
    selected = netweaver.Selection(sources=["fd00::2"], destinations=["fd00::1"], probes=probes)
    assert kept(selected.vif_filter(ethernet=True), frames, tmp_path) == [0, 1]


def tunnels(frame: bytes, packet: bytes) -> dict[str, bytes]:
    """IP packets of tunnels around a frame or its packet."""
    kind = 0x0800 if packet[0] >> 4 == 4 else 0x86DD
    ends: dict[str, Any] = {"source": "192.0.2.2", "destination": "192.0.2.1"}
    ends6: dict[str, Any] = {"source": "2001:db8::2", "destination": "2001:db8::1"}
    return {
        "vxlan": ipv4(udp(*vxlan(frame)), 17, **ends),
        "vxlan 8472": ipv4(udp(*vxlan(frame, 8472)), 17, **ends),
        "geneve": ipv4(udp(*geneve(frame)), 17, **ends),
        "geneve with options": ipv4(udp(*geneve(frame, options=b"\0" * 8)), 17, **ends),
        "geneve with IP": ipv4(udp(*geneve(packet, kind)), 17, **ends),
        "vxlan over IPv6": ipv6(udp(*vxlan(frame)), 17, **ends6),
        "vxlan of a tagged frame": ipv4(
            udp(*vxlan(ethernet(packet, tags=[(0x8100, 3)]))), 17, **ends
        ),
        "gre": ipv4(gre(packet, kind), 47, **ends),
        "gre with a key": ipv4(gre(frame, 0x6558, 0x2000), 47, **ends),
        "gre over IPv6": ipv6(gre(packet, kind), 47, **ends6),
    }


@pytest.mark.parametrize("direction", ["in", "out", "both"])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("tags", TAGS, ids=len)
def test_the_filter_finds_the_traffic_in_tunnels(
    tmp_path: Path, tags: list[tuple[int, int]], version: int, direction: str
) -> None:
    """All of it; and nothing of others in VXLAN.

    Where a filter can know (and there are no tags).
    """
    inward, outward, others = flows(version)
    wanted = {"in": inward, "out": outward, "both": [*inward, *outward]}[direction]
    ends = (SOURCES, DESTINATION) if version == 4 else (SOURCES6, DESTINATION6)
    expression = selection(*ends, direction).pif_filter(ethernet=True, overlay=True)
    inside = [
        ethernet(outer, tags=tags)
        for packet in wanted
        for outer in tunnels(ethernet(packet), packet).values()
    ]
    assert kept(expression, inside, tmp_path) == list(range(len(inside)))
    foreign = [packet for packet in [*inward, *outward, *others] if packet not in wanted]
    outside = [
        ethernet(tunnels(ethernet(packet), packet)[name], tags=tags)
        for packet in foreign
        if not tags
        for name in ("vxlan", "vxlan 8472", "geneve")
    ]
    outside += [
        ethernet(ipv4(udp(payload=bytes(80)), 17, source="192.0.2.1"), tags=tags),
        ethernet(bytes(28), 0x0806, tags=tags),
    ]
    assert kept(expression, outside, tmp_path) == []


def test_a_filter_for_traffic_from_anywhere(tmp_path: Path) -> None:
    inward, outward, others = flows(4)
    frames = [ethernet(packet) for packet in (*inward, *outward, *others)]
    inside = [ethernet(tunnels(frame, b"\x45")["vxlan"]) for frame in frames]
    assert kept(selection([], DESTINATION, "in").vif_filter(ethernet=True), frames, tmp_path) == [
        0,
        1,
        4,
    ]
    both = selection([], DESTINATION, "both")
    assert kept(both.pif_filter(ethernet=True, overlay=True), inside, tmp_path) == [0, 1, 2, 3, 4]


def test_a_filter_for_many_sources(tmp_path: Path) -> None:
    """libpcap takes it, with both directions and under tags."""
    sources = [f"10.0.1.{number}" for number in range(30)]
    packets = [
        ethernet(ipv4(tcp(), source=source), tags=[(0x8100, 7)])
        for source in (*sources, "10.0.2.1")
    ]
    expression = selection(sources, DESTINATION, "both").pif_filter(ethernet=True, overlay=True)
    assert kept(expression, packets, tmp_path) == list(range(30))
