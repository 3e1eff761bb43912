"""Tunnels at other UDP ports than the usual ones."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest
from frames import WRAPPINGS, ethernet, geneve, ipv4, ipv6, pcap, tcp, udp, vxlan, write
from helpers import T

import netweaver

PORTS = {**netweaver.TUNNEL_PORTS, 14789: "vxlan", 16081: "geneve"}
SOURCE = "10.0.0.1"
DESTINATION = "10.0.0.2"
INNER = ipv4(tcp(seq=7), source=SOURCE, destination=DESTINATION)
FOREIGN = ipv4(tcp(seq=7), source="10.0.0.9", destination=DESTINATION)


def carriers(packet: bytes) -> list[bytes]:
    """Return IP packets of tunnels at other ports around a packet."""
    frame = ethernet(packet)
    return [
        ipv4(udp(*vxlan(frame, 14789)), 17),
        ipv4(udp(*geneve(frame, port=16081)), 17),
        ipv4(udp(*geneve(frame, port=16081, options=bytes(8))), 17),
    ]


@pytest.mark.parametrize("carrier", carriers(INNER))
def test_identify(carrier: bytes) -> None:
    frame = ethernet(carrier)
    plain = netweaver.identify(ethernet(INNER), netweaver.EN10MB)
    assert netweaver.identify(frame, netweaver.EN10MB, PORTS)[1:] == plain
    assert len(netweaver.identify(frame, netweaver.EN10MB)) == 1


def test_capture() -> None:
    file = io.BytesIO(pcap([(T, ethernet(carrier)) for carrier in carriers(INNER)]))
    capture = netweaver.Capture(file, "", PORTS)
    identities = [identity for block in capture for identity in block.identities]
    assert identities == netweaver.identify(ethernet(INNER), netweaver.EN10MB) * 3


def filtered(expression: str, frames: list[bytes], directory: Path) -> list[bool]:
    """Return which frames real tcpdump lets through."""
    path = directory / "frames.pcap"
    results = []
    for frame in frames:
        write(path, pcap([(T, frame)]))
        command = ["tcpdump", "-nn", "-r", str(path), "-w", "-", "--", expression]
        done = subprocess.run(command, capture_output=True, check=True)
        results.append(len(done.stdout) > 24)
    return results


@pytest.mark.parametrize("tags", [[], [(0x8100, 5)], [(0x88A8, 5), (0x8100, 6)]])
def test_filter(tmp_path: Path, tags: list[tuple[int, int]]) -> None:
    selection = netweaver.Selection(
        sources=[SOURCE], destinations=[DESTINATION], tunnel_ports=PORTS
    )
    expression = selection.pif_filter(ethernet=True, overlay=True)
    frames = [ethernet(carrier, tags=tags) for carrier in carriers(INNER)]
    frames.append(ethernet(ipv6(udp(*vxlan(ethernet(INNER), 14789)), 17), tags=tags))
    assert all(filtered(expression, frames, tmp_path))
    if not tags:
        foreign = [ethernet(carrier) for carrier in carriers(FOREIGN)[:2]]
        assert not any(filtered(expression, foreign, tmp_path))


def test_filter_of_many_ports_and_sources(tmp_path: Path) -> None:
    """The kernel takes at most 4096 instructions."""
    lines = [
        f"{number}: vx{number}: <UP> mtu 1\\    link/ether 0\\    vxlan dstport {number}"
        for number in range(20_000, 20_500)
    ]
    ports = netweaver.Links("\n".join(lines)).tunnel_ports()
    sources = [f"10.0.1.{number}" for number in range(30)]
    selection = netweaver.Selection(
        netweaver.DIRECTIONS["both"], sources, [DESTINATION], tunnel_ports=ports
    )
    expression = selection.pif_filter(ethernet=True, overlay=True)
    path = write(tmp_path / "one.pcap", pcap([(T, ethernet(INNER))]))
    command = ["tcpdump", "-ddd", "-r", str(path), "--", expression]
    program = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(program.split()[0]) < 4096


def test_ports_in_a_saved_run() -> None:
    selection = netweaver.Selection(tunnel_ports=PORTS)
    info = netweaver.RunInfo(pif="eth0", vif="vif5.0", selection=selection)
    document = info.to_json()
    assert netweaver.RunInfo.from_json(document).selection.tunnel_ports == PORTS
    del document["selection"]["tunnel_ports"]  # as of version 2
    usual = netweaver.RunInfo.from_json(document).selection.tunnel_ports
    assert usual == netweaver.TUNNEL_PORTS


@pytest.mark.parametrize("kind", sorted(set(netweaver.TUNNEL_PORTS.values())))
def test_each_kind_of_tunnel_is_looked_into(kind: str) -> None:
    wrap = {name.lower(): wrap for name, wrap in WRAPPINGS.items()}[kind]
    plain = netweaver.identify(ethernet(INNER), netweaver.EN10MB)
    assert netweaver.identify(wrap(INNER), netweaver.EN10MB)[1:] == plain
