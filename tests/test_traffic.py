"""Any network and any traffic: tags, tunnels, bonds, both directions, several sources, and what is there anyway."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from frames import ethernet, geneve, gre, icmp, ipv4, ipv6, pcap, tcp, udp, vxlan, write
from helpers import FAST, T, analyzed, failure, offline, report
from lab import DATA, NAME, Lab, wait_until

import netweaver

SOURCES, DESTINATION = ["10.0.0.2", "10.0.0.3"], "10.0.0.1"
SOURCES6, DESTINATION6 = ["fd00::2", "fd00::3"], "fd00::1"


# -- filters, as tcpdump understands them --

def kept(expression: str, frames: list[bytes], tmp_path: Path) -> list[int]:
    """The numbers of the frames that tcpdump's filter lets through."""
    path = write(tmp_path / "all.pcap", pcap((T + number * 1000, frame) for number, frame in enumerate(frames)))
    done = subprocess.run(["tcpdump", "-r", path, "-w", "-", "--", expression], capture_output=True, check=True)
    with open(tmp_path / "kept.pcap", "wb") as file:
        file.write(done.stdout)
    found, at = [], 24
    while at < len(done.stdout):
        size = int.from_bytes(done.stdout[at + 8:at + 12], "little")
        found.append(int.from_bytes(done.stdout[at + 4:at + 8], "little") - T % 10**9 // 1000)
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
    return ([make(tcp(), source=a, destination=b) for a, b in pairs],
            [make(tcp(), source=b, destination=a) for a, b in pairs],
            [make(tcp(), source=a, destination=b) for a, b in others])


TAGS: list[list[tuple[int, int]]] = [[], [(0x8100, 7)], [(0x88A8, 9), (0x8100, 7)]]


@pytest.mark.parametrize("direction", ["in", "out", "both"])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("tags", TAGS, ids=len)
def test_the_filter_finds_the_traffic_alone_under_any_tags(tmp_path: Path, tags: list[tuple[int, int]], version: int,
                                                           direction: str) -> None:
    inward, outward, others = flows(version)
    packets = [*inward, *outward, *others]
    frames = [ethernet(packet, tags=tags) for packet in packets] + [ethernet(bytes(28), 0x0806, tags=tags)]
    ends = (SOURCES, DESTINATION) if version == 4 else (SOURCES6, DESTINATION6)
    expression = netweaver.Flows(*ends, netweaver.DIRECTIONS[direction]).expression(True, False)
    assert "vlan" not in expression                  # libpcap before 1.9 looks for it at the wrong place
    assert kept(expression, frames, tmp_path) == {"in": [0, 1], "out": [2, 3], "both": [0, 1, 2, 3]}[direction]


def tunnels(frame: bytes, packet: bytes) -> dict[str, bytes]:
    """IP packets of tunnels around a frame or its packet."""
    kind = 0x0800 if packet[0] >> 4 == 4 else 0x86DD
    ends: dict[str, Any] = {"source": "192.0.2.2", "destination": "192.0.2.1"}
    ends6: dict[str, Any] = {"source": "2001:db8::2", "destination": "2001:db8::1"}
    return {
        "vxlan": ipv4(udp(*vxlan(frame)), 17, **ends), "vxlan 8472": ipv4(udp(*vxlan(frame, 8472)), 17, **ends),
        "geneve": ipv4(udp(*geneve(frame)), 17, **ends),
        "geneve with options": ipv4(udp(*geneve(frame, options=b"\0" * 8)), 17, **ends),
        "geneve with IP": ipv4(udp(*geneve(packet, kind)), 17, **ends),
        "vxlan over IPv6": ipv6(udp(*vxlan(frame)), 17, **ends6),
        "vxlan of a tagged frame": ipv4(udp(*vxlan(ethernet(packet, tags=[(0x8100, 3)]))), 17, **ends),
        "gre": ipv4(gre(packet, kind), 47, **ends), "gre with a key": ipv4(gre(frame, 0x6558, 0x2000), 47, **ends),
        "gre over IPv6": ipv6(gre(packet, kind), 47, **ends6),
    }


@pytest.mark.parametrize("direction", ["in", "out", "both"])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("tags", TAGS, ids=len)
def test_the_filter_finds_the_traffic_in_tunnels(tmp_path: Path, tags: list[tuple[int, int]], version: int,
                                                 direction: str) -> None:
    """All of it; and nothing of others in VXLAN, where a filter can know (and there are no tags)."""
    inward, outward, others = flows(version)
    wanted = {"in": inward, "out": outward, "both": [*inward, *outward]}[direction]
    ends = (SOURCES, DESTINATION) if version == 4 else (SOURCES6, DESTINATION6)
    expression = netweaver.Flows(*ends, netweaver.DIRECTIONS[direction]).expression(True, True)
    inside = [ethernet(outer, tags=tags)
              for packet in wanted for outer in tunnels(ethernet(packet), packet).values()]
    assert kept(expression, inside, tmp_path) == list(range(len(inside)))
    foreign = [packet for packet in [*inward, *outward, *others] if packet not in wanted]
    outside = [ethernet(tunnels(ethernet(packet), packet)[name], tags=tags) for packet in foreign if not tags
               for name in ("vxlan", "vxlan 8472", "geneve")]
    outside += [ethernet(ipv4(udp(payload=bytes(80)), 17, source="192.0.2.1"), tags=tags),
                ethernet(bytes(28), 0x0806, tags=tags)]
    assert kept(expression, outside, tmp_path) == []


def test_a_filter_for_traffic_from_anywhere(tmp_path: Path) -> None:
    inward, outward, others = flows(4)
    frames = [ethernet(packet) for packet in (*inward, *outward, *others)]
    inside = [ethernet(tunnels(frame, b"\x45")["vxlan"]) for frame in frames]
    assert kept(netweaver.Flows([], DESTINATION, [netweaver.IN]).plain(), frames, tmp_path) == [0, 1, 4]
    both = netweaver.Flows([], DESTINATION, netweaver.DIRECTIONS["both"])
    assert kept(both.expression(True, True), inside, tmp_path) == [0, 1, 2, 3, 4]


def test_a_filter_for_many_sources(tmp_path: Path) -> None:
    """libpcap takes it, with both directions and under tags."""
    sources = [f"10.0.1.{number}" for number in range(30)]
    packets = [ethernet(ipv4(tcp(), source=source), tags=[(0x8100, 7)]) for source in (*sources, "10.0.2.1")]
    expression = netweaver.Flows(sources, DESTINATION, netweaver.DIRECTIONS["both"]).expression(True, True)
    assert kept(expression, packets, tmp_path) == list(range(30))


# -- both directions, from files --

def conversation(tmp_path: Path, probes: list[tuple[bytes, bytes | None]], *, into: int = 5000, guest: int = 20_000,
                 out: int = 3000) -> list[str]:
    """Captures of probes (packets) and the VM's answers, with constant times in ns."""
    pif, vif = [], []
    for number, (probe, answer) in enumerate(probes):
        start = T + number * 1_000_000
        pif.append((start, ethernet(probe)))
        vif.append((start + into, ethernet(probe)))
        if answer:
            vif.append((start + into + guest, ethernet(answer)))
            pif.append((start + into + guest + out, ethernet(answer)))
    return [write(tmp_path / f"{name}.pcap", pcap(sorted(records))) for name, records in (("pif", pif), ("vif", vif))]


BACK: dict[str, Any] = {"source": "10.0.0.1", "destination": "10.0.0.2"}


def test_both_directions_and_the_guest(tmp_path: Path) -> None:
    probes: list[tuple[bytes, bytes | None]] = []
    for n in range(8):
        syn = ipv4(tcp(1000 + n, 80, seq=0xFFFFFFFF - n), ident=n)
        probes.append((syn, ipv4(tcp(80, 1000 + n, seq=7, ack=-n % 2**32, flags=0x12), ident=50 + n, **BACK)))
        data = ipv4(tcp(2000 + n, 81, seq=100, payload=bytes(n)), ident=100 + n)
        probes.append((data, ipv4(tcp(81, 2000 + n, ack=101 + n, flags=0x14), ident=150 + n, **BACK)))
        echo = ipv4(icmp(8, 0, 77, n, bytes(20)), 1, 200 + n)
        probes.append((echo, ipv4(icmp(0, 0, 77, n, bytes(20)), 1, 250 + n, **BACK)))
    probes.append((ipv4(tcp(3000, 82), ident=300), None))                # no answer
    probes.append((ipv4(tcp(3001, 82, flags=0x10), ident=301), None))    # no probe
    probes.append((ipv4(b"", 132, ident=302), None))                     # nothing but a header
    found = analyzed("--pcaps", *conversation(tmp_path, probes), "-d", "10.0.0.1", "--direction", "both")
    assert found["config"]["direction"] == "both"
    assert found["packets"] == {"pif": 27, "vif": 27, "matched": 27, "ambiguous": 0, "lost": 0, "undecided": 0,
                                "duplicated": 0, "reordered": 0, "vif_only": 0}
    assert found["minimum"] == found["maximum"] == 5
    assert found["outbound"]["packets"] == {"vif": 24, "pif": 24, "matched": 24, "ambiguous": 0, "lost": 0,
                                            "undecided": 0, "duplicated": 0, "reordered": 0, "pif_only": 0}
    assert found["outbound"]["minimum"] == found["outbound"]["maximum"] == 3
    assert found["outbound"]["unit"] == found["guest"]["unit"] == "microseconds"
    assert found["guest"]["minimum"] == found["guest"]["maximum"] == 20
    assert found["guest"]["packets"] == {"answered": 24, "unanswered": 1, "ambiguous": 0}
    assert found["capture"]["pif"]["filtered"] == 0


def test_the_guest_over_ipv6(tmp_path: Path) -> None:
    back: dict[str, Any] = {"source": "fd00::1", "destination": "fd00::2"}
    probes: list[tuple[bytes, bytes | None]] = [
        (ipv6(icmp(128, 0, 9, n), 58), ipv6(icmp(129, 0, 9, n), 58, **back)) for n in range(4)]
    probes += [(ipv6(tcp(n + 1, 80, seq=5, payload=b"x")), ipv6(tcp(80, n + 1, ack=6, flags=0x12), **back))
               for n in range(4)]
    found = analyzed("--pcaps", *conversation(tmp_path, probes), "-d", "fd00::1", "--direction", "both")
    assert found["guest"]["packets"] == {"answered": 8, "unanswered": 0, "ambiguous": 0}
    assert found["guest"]["average"] == 20


def test_what_only_looks_like_an_answer(tmp_path: Path) -> None:
    """Another port, another number, a plain ACK, an answer from before, and a probe that was sent twice."""
    probe = ipv4(tcp(1000, 80, seq=100), ident=1)
    again = ipv4(tcp(1001, 80, seq=100), ident=2), ipv4(tcp(1001, 80, seq=100), ident=3)
    wrong = [tcp(80, 1002, ack=101, flags=0x12), tcp(80, 1000, ack=102, flags=0x12), tcp(80, 1000, ack=101, flags=0x10),
             tcp(80, 1001, ack=101, flags=0x12)]
    answers = [ipv4(content, ident=10 + n, **BACK) for n, content in enumerate(wrong)]
    early = ipv4(tcp(80, 1000, ack=101, flags=0x12), ident=30, **BACK)
    vif = [(T - 50, early), (T + 100, probe), (T + 200, again[0]), (T + 300, again[1]),
           *((T + 1000 + n, answer) for n, answer in enumerate(answers))]
    pif = [(time + (50 if packet in (early, *answers) else -50), packet) for time, packet in vif]
    paths = [write(tmp_path / f"{name}.pcap", pcap(sorted((time, ethernet(packet)) for time, packet in records)))
             for name, records in (("pif", pif), ("vif", vif))]
    found = analyzed("--pcaps", *paths, "-d", "10.0.0.1", "--direction", "both")
    assert found["guest"] == {"packets": {"answered": 0, "unanswered": 1, "ambiguous": 2}}
    assert [text for text in found["warnings"] if text.startswith("guest: 2 probes were sent more than once")]


def test_a_vm_that_never_answers(tmp_path: Path) -> None:
    paths = conversation(tmp_path, [(ipv4(tcp(1000 + n), ident=n), None) for n in range(5)])
    found = analyzed("--pcaps", *paths, "-d", "10.0.0.1", "--direction", "both")
    assert found["outbound"] is None
    assert found["guest"] == {"packets": {"answered": 0, "unanswered": 5, "ambiguous": 0}}
    assert any(text.startswith("outbound: no packet was seen on both interfaces (0 on ") for text in found["warnings"])
    assert offline("--pcaps", *paths, "-d", "10.0.0.1", "--direction", "out").returncode == 6


def test_out_alone(tmp_path: Path) -> None:
    pairs: list[tuple[bytes, bytes | None]] = [
        (ipv4(tcp(1000 + n), ident=n), ipv4(tcp(80, 1000 + n, ack=1, flags=0x14), ident=50 + n, **BACK))
        for n in range(5)]
    paths = conversation(tmp_path, pairs)
    found = analyzed("--pcaps", *paths, "-d", "10.0.0.1", "--direction", "out", "--slowest", "1")
    assert found["packets"] == {"vif": 5, "pif": 5, "matched": 5, "ambiguous": 0, "lost": 0, "undecided": 0,
                                "duplicated": 0, "reordered": 0, "pif_only": 0}
    assert found["average"] == 3
    assert found["slowest"][0]["t_vif"] < found["slowest"][0]["t_pif"]
    assert found["capture"]["vif"]["filtered"] == 5
    done = offline("--pcaps", *paths, "--direction", "both")
    assert done.returncode == 2
    assert "give it with -d" in done.stderr


# -- in the lab --

@pytest.mark.lab
@pytest.mark.parametrize("tags", [[7], [100, 200]], ids=len)
def test_a_tagged_pif_against_a_plain_vif(tags: list[int]) -> None:
    with Lab(forwarder=[], tags=tags) as lab:
        found = report(lab.netweaver(*lab.arguments("-c", "600", "--source-command", FAST, "--direction", "both")))
        lab.wait_clean()
    assert found["packets"]["pif"] == found["packets"]["vif"] == found["packets"]["matched"] == 600
    assert found["outbound"]["packets"]["vif"] == found["outbound"]["packets"]["matched"] == 600


@pytest.mark.lab
def test_a_vxlan_pif_against_a_plain_vif() -> None:
    """With --overlay, and found by the bridge of the vif; without, the error says what to do."""
    command = ("-c", "600", "--source-command", FAST)
    with Lab(overlay=True) as lab:
        for more in (("-i", "eth0", "--overlay", "--direction", "both"), ()):
            found = report(lab.netweaver(*lab.arguments(*command, *more)))
            assert found["packets"]["pif"] == found["packets"]["vif"] == found["packets"]["matched"] == 600
            assert found["config"]["overlay"] is True
            assert found["config"]["pif"] == "eth0"
        found = report(lab.netweaver(*lab.arguments(
            "-c", "20", "-d", "fd83:1::100", "--source-command", "ping -c {count} -i 0.02 {destination}")))
        assert found["packets"]["pif"] == found["packets"]["matched"] >= 20
        assert "--overlay" in failure(lab.netweaver(*lab.arguments(*command, "-i", "eth0")), 6)
        found = report(lab.netweaver(*lab.arguments(*command, "-i", "eth0", "--filter",
                                                     f"udp port 4789 or dst host {lab.destination}")))
        assert found["packets"]["matched"] == 600
        lab.wait_clean()


@pytest.mark.lab
def test_the_slaves_of_a_bond() -> None:
    """Two sources come in by one physical interface each."""
    with Lab(sources=2) as lab:
        lab._link(lab.hv.namespace, "eth1", lab.client, "d-hv1")
        lab._ip("link", "set", "eth1", "master", "xenbr0", namespace=lab.hv.namespace)
        lab._bridge(lab.client, "data1", "d-hv1", "d-src2")
        command = ("-c", "600", "--source-command", FAST)
        found = report(lab.netweaver(*lab.arguments(*command, "-i", "eth0", "-i", "eth1")))
        assert found["packets"]["pif"] == found["packets"]["matched"] == 1200
        assert found["capture"]["pif"]["interface"] == found["config"]["pif"] == "eth0,eth1"
        assert found["capture"]["pif"]["captured"] == found["capture"]["pif"]["records"] == 1200
        found = report(lab.netweaver(*lab.arguments(*command)))
        assert found["packets"]["pif"] == found["packets"]["matched"] == 1200
        found = report(lab.netweaver(*lab.arguments(*command, "-i", "eth0")))
        assert (found["packets"]["matched"], found["packets"]["vif_only"]) == (600, 600)
        assert any(text.startswith("1200 packets were sent, and 600 of them were seen on the pif") and "-i auto" in text
                   for text in found["warnings"])
        line = failure(lab.netweaver(*lab.arguments("-i", "eth0", "-i", "eth7"), seconds=20), 5)
        assert "eth7: No such device exists" in line
        assert "(there are: eth0, eth1, lo, mgmt0, xenbr0, vif5.0)" in line
        lab.wait_clean()


@pytest.mark.lab
@pytest.mark.alone
def test_three_sources_at_once() -> None:
    """hping3 seeds its generator with the second: started in the same one, all send the same numbers."""
    with Lab(sources=3) as lab:
        found = report(lab.netweaver(*lab.arguments("-c", "1000", "--source-command", FAST, "--csv",
                                                    str(lab.directory / "table.csv"))))
        table = (lab.directory / "table.csv").read_text().splitlines()[1:]
        lab.wait_clean()
    assert found["packets"]["pif"] == found["packets"]["vif"] == found["packets"]["matched"] == 3000
    assert found["warnings"] == []
    assert len({line.split(",")[1] for line in table}) == 3


@pytest.mark.lab
@pytest.mark.alone
def test_each_directions_delay_and_the_guest_between() -> None:
    with Lab(forwarder=["--delay", "3000", "--back", "1000"]) as lab:
        found = report(lab.netweaver(*lab.arguments("-c", "1000", "--source-command", FAST, "--direction", "both")))
        out = report(lab.netweaver(*lab.arguments("-c", "1000", "--source-command", FAST, "--direction", "out")))
        lab.wait_clean()
    assert 3000 <= found["median"] < 3300
    assert 1000 <= found["outbound"]["median"] < 1300
    assert 0 < found["guest"]["median"] < 300
    assert found["guest"]["packets"] == {"answered": 1000, "unanswered": 0, "ambiguous": 0}
    assert 1000 <= out["median"] < 1300
    assert out["packets"]["vif"] == out["packets"]["matched"] == 1000


@pytest.mark.lab
@pytest.mark.alone
@pytest.mark.parametrize(("interval", "seconds", "wait", "undecided"), [
    ("u100", 1, "0.1", False), ("u1000", 0.5, "0.1", True), ("u1000", 0.5, "0.5", False)])
def test_packets_that_take_long(interval: str, seconds: float, wait: str, undecided: bool) -> None:
    """All that matched counts, and of the lost ones those that were watched for long enough.

    hping3 would wait for a second after its last packet.
    """
    command = f"timeout -s KILL {seconds} hping3 -c 1000 -S -i {interval} {{destination}}; true"
    with Lab(forwarder=["--delay", "300000", "--loss", "0.05"]) as lab:
        found = report(lab.netweaver(*lab.arguments("--wait", wait, "--source-command", command)))
        truth = lab.truth()
        lab.wait_clean()
    packets = found["packets"]
    assert packets["pif"] == len(truth) > 300
    assert packets["matched"] == sum(bool(packet["sent"]) for packet in truth)
    assert packets["lost"] + packets["undecided"] == len(truth) - packets["matched"] > 0
    assert found["loss_ratio"] == packets["lost"] / (len(truth) - packets["undecided"])
    assert found["config"]["wait"] == float(wait)
    assert (packets["undecided"] > 0) == undecided
    assert any(f"{packets['undecided']} packets were not seen on the vif" in text and "(--wait)" in text
               for text in found["warnings"]) == undecided
    assert 3e5 <= found["median"] < 3.1e5


@pytest.mark.lab
def test_an_open_port(lab: Lab) -> None:
    """The source's kernel answers each answer with a RST; that is no other traffic."""
    code = "import socket, time; s = socket.create_server(('', 7777), backlog=4096); print(flush=True); time.sleep(60)"
    server = subprocess.Popen(["ip", "netns", "exec", lab._dst, sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        server.stdout.readline()
        found = report(lab.netweaver(*lab.arguments("-c", "500", "--direction", "both", "--source-command",
                                                    FAST.replace("-S", "-S -p 7777"), source=lab.source.address)))
    finally:
        server.kill()
        server.communicate()
    assert found["packets"]["pif"] == found["packets"]["matched"] == 1000
    assert found["guest"]["packets"]["answered"] == 500
    assert found["warnings"] == []


@pytest.mark.lab
def test_traffic_that_is_there_anyway(lab: Lab) -> None:
    """No source, no command of ours; TCP, UDP and ping of somebody else's."""
    foreign = [subprocess.Popen(lab.source.command(*command.split()), stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)
               for command in (f"hping3 -S -i u2000 {lab.destination}", f"hping3 --udp -i u3000 {lab.destination}",
                               f"ping -i 0.01 {lab.destination}", f"hping3 -S -i u2000 {DATA}.200")]
    arguments = ["-n", NAME, "--hv", lab.hv.address, "-d", lab.destination, "-k", str(lab.key), "--duration", "2"]
    try:
        found = report(lab.netweaver(*arguments))
        both = report(lab.netweaver(*arguments, "--direction", "both"))
    finally:
        for process in foreign:
            process.kill()
            process.wait()
    for one in (found, both, both["outbound"]):
        assert one["packets"]["matched"] > 500
        assert one["packets"]["lost"] == 0
    assert found["packets"]["vif_only"] == both["packets"]["vif_only"] == both["outbound"]["packets"]["pif_only"] == 0
    assert both["guest"]["packets"]["answered"] > 500
    assert 2 <= found["config"]["duration"] < 3
    assert found["config"]["source_command"] is None
    assert found["config"]["sources"] == []


@pytest.mark.lab
def test_no_traffic_at_all(lab: Lab) -> None:
    line = failure(lab.netweaver("-n", NAME, "--hv", lab.hv.address, "-d", "10.83.1.77", "-k", str(lab.key),
                                 "--duration", "0.5"), 6)
    assert "(0 on eth0, 0 on vif5.0)" in line


@pytest.mark.lab
def test_a_passive_run_can_be_interrupted(lab: Lab) -> None:
    process = lab.start("-n", NAME, "--hv", lab.hv.address, "-d", lab.destination, "-k", str(lab.key),
                        "--duration", "60")
    wait_until(lambda: sum("tcpdump" in line for line in lab.hv.processes().values()) >= 2, "the captures")
    lab.source.run("ping", "-c", "100", "-i", "0.01", lab.destination)       # so that most come in their time
    process.terminate()
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 143, errors
    assert json.loads(out)["interrupted"] is True
    assert 20 < json.loads(out)["packets"]["matched"] <= 100
    assert json.loads(out)["packets"]["lost"] == 0


@pytest.mark.lab
def test_a_duration_ends_traffic_without_an_end(lab: Lab) -> None:
    found = report(lab.netweaver(*lab.arguments("--duration", "1.5", "--source-command",
                                                "hping3 -S -i u5000 {destination}")))
    assert 1.5 <= found["config"]["duration"] < 5
    assert not [warning for warning in found["warnings"] if "stopped" in warning]


@pytest.mark.lab
def test_filters_of_ones_own(lab: Lab) -> None:
    more = ("-c", "600", "--source-command", FAST)
    found = report(lab.netweaver(*lab.arguments(*more, "--filter", f"tcp and dst host {lab.destination} and "
                                                                   f"src host {DATA}.1")))
    assert found["packets"]["matched"] == 600            # of two sources
    assert "-- 'tcp and dst host" in found["config"]["pif_command"]
    assert found["warnings"] == []
    line = failure(lab.netweaver(*lab.arguments("--filter", "tcp and and"), seconds=20), 5)
    assert "syntax error" in line
    line = failure(lab.netweaver(*lab.arguments("--filter", "; touch /tmp/owned"), seconds=20), 5)
    assert "the capture on " in line


@pytest.mark.lab
@pytest.mark.parametrize(("version", "warns"), [("1.5.3", True), ("1.8.1", True), ("1.9.1", False), ("1.10.3", False)])
def test_the_keyword_vlan_with_an_old_libpcap(own_lab: Lab, version: str, warns: bool) -> None:
    real = shutil.which("tcpdump", path=f"{os.environ['PATH']}:/usr/sbin")
    stub = own_lab.hv.directory / "bin" / "tcpdump"
    stub.write_text(f"#!/bin/sh\ncase $* in *--help*) echo 'libpcap version {version}' >&2; exit 1 ;; esac\n"
                    f'exec {real} "$@"\n')
    stub.chmod(0o755)
    found = report(own_lab.netweaver(*own_lab.arguments("-c", "600", "--source-command", FAST, "--filter",
                                                        f"tcp and dst host {own_lab.destination} or vlan")))
    assert found["packets"]["matched"] == 600
    assert any(f"by the keyword vlan libpcap {version.rpartition('.')[0]} finds" in text
               for text in found["warnings"]) == warns


@pytest.mark.lab
@pytest.mark.parametrize(("command", "at_least"), [
    ("hping3 -c {count} --udp -p 7 -d 64 -i u1000 {destination}", 500),
    ("hping3 -c {count} -1 -i u1000 {destination}", 500),
    ("hping3 -c {count} -S -p 80 -d 1400 -i u1000 {destination}", 500),
    ("ping -c {count} -i 0.002 -s 1400 {destination}", 500),
])
def test_ready_source_commands(lab: Lab, command: str, at_least: int) -> None:
    found = report(lab.netweaver(*lab.arguments("-c", "500", "--source-command", command, source=lab.source.address)))
    assert found["packets"]["pif"] == found["packets"]["matched"] >= at_least
    assert found["warnings"] == []


@pytest.mark.lab
def test_bulk_tcp_by_iperf3(lab: Lab) -> None:
    server = subprocess.Popen(["ip", "netns", "exec", lab._dst, "iperf3", "-s", "-1", "--forceflush"],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert server.stdout is not None
        assert any(b"Server listening" in line for line in iter(server.stdout.readline, b""))
        found = report(lab.netweaver(*lab.arguments(
            "--source-command", "iperf3 -c {destination} -t 1 -b 50M", "--direction", "both",
            source=lab.source.address)))
    finally:
        server.kill()
        server.communicate()
    assert found["packets"]["pif"] == found["packets"]["matched"] > 100
    assert found["outbound"]["packets"]["vif"] == found["outbound"]["packets"]["matched"] > 10
    assert found["guest"]["packets"]["answered"] == 2    # its two connections


@pytest.mark.lab
def test_labels_and_the_platform(lab: Lab) -> None:
    found = report(lab.netweaver(*lab.arguments("-c", "3", "--source-command", FAST, "--label", "rack=7", "--label",
                                                "note=a=b c")))
    assert found["config"]["labels"] == {"rack": "7", "note": "a=b c"}
    known = found["config"]["platform"]
    assert known["kernel"] == lab.hv.run("uname", "-r").strip()
    assert known["tcpdump"] in lab.hv.run("sh", "-c", "tcpdump --version 2>&1")
    assert known["switch"] == "bridge"
    assert known["cpus"] > 0
    assert len(known["load"]) == 3


def test_platforms_of_other_kinds() -> None:
    facts = """= kernel
4.19.0+1
= load
0.50 0.40 0.30 1/400 123
= cpus
16
= free
Filesystem     1024-blocks    Used Available Capacity Mounted on
/dev/sda1         18000000 9000000   8000000      53% /
= link
9: vif5.0: <UP> mtu 1500 qdisc mq state UP
2: eth0@if3: <UP> mtu 1500 link/ether 02::
= ovs
ovs-vsctl (Open vSwitch) 2.5.3
= backend
openvswitch
= card eth0
../../../../bus/pci/drivers/ixgbe
Features for eth0:
generic-receive-offload: on
highdma: on [fixed]
tcp-segmentation-offload: off
\ttx-tcp-segmentation: off
= tcpdump
tcpdump version 4.9.2
libpcap version 1.5.3

= status
1
"""
    found = netweaver.Facts(facts)
    assert found.platform(["eth0"], "vif5.0") == {
        "kernel": "4.19.0+1", "tcpdump": "4.9.2", "switch": "Open vSwitch 2.5.3", "cpus": 16, "load": [0.5, 0.4, 0.3],
        "pifs": {"eth0": {"driver": "ixgbe", "offloads": ["generic-receive-offload"]}}}
    assert (found.free, found.has_tcpdump, found.links["vif5.0"][0]) == (8_000_000 * 1024, True, "9:")
    assert sorted(found.links) == ["eth0", "vif5.0"]
    assert netweaver.Facts("").platform(["eth0"], "vif5.0") == {}


@pytest.mark.lab
def test_logins_without_root() -> None:
    """With --sudo; without, and without a rule for it, the error says what to do."""
    with Lab() as lab:
        for host in lab.hosts:
            for name, line in (("passwd", "op:x:4711:4711::/tmp:/bin/sh\n"), ("shadow", "op:*:19000:0:99999:7:::\n"),
                               ("group", "op:x:4711:\n")):
                with open(host.directory / "etc" / name, "a") as file:
                    file.write(line)
            (host.directory / "tmp").chmod(0o1777)
        lab.key.with_suffix(".pub").chmod(0o644)
        lab.directory.chmod(0o755)
        arguments = ["-n", NAME, "--hv", f"op@{lab.hv.address}", "-s", f"op@{lab.source.address}",
                     "-d", lab.destination, "-k", str(lab.key), "-c", "300", "--source-command", FAST]
        line = failure(lab.netweaver(*arguments), 5)
        assert "(log in as root, or use --sudo)" in line
        line = failure(lab.netweaver(*arguments, "--sudo"), 4)
        assert "sudo: " in line
        assert "(--sudo needs a rule with NOPASSWD in that host's sudoers)" in line
        for host in lab.hosts:
            (host.directory / "etc" / "sudoers.d" / "op").write_text("op ALL=(ALL) NOPASSWD: ALL\n")
            (host.directory / "etc" / "sudoers.d" / "op").chmod(0o440)
        with open(lab.hv.directory / "etc" / "sudoers", "a") as file:
            file.write(f"Defaults secure_path={lab.hv.directory / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin\n"
                       "Defaults env_keep+=POOL\n")
        found = report(lab.netweaver(*arguments, "--sudo", "--stages"))
        assert found["packets"]["matched"] == found["stages"]["forwarding"]["packets"] == 300
        assert found["config"]["hypervisor"] == f"op@{lab.hv.address}"
        found = report(lab.netweaver(*arguments, "--sudo", "--hv", lab.hv.address))
        assert found["packets"]["matched"] == 300
        process = lab.start(*arguments[:-1], "hping3 -S -i u10000 {destination}", "--sudo")
        wait_until(lambda: any("hping3" in line for line in lab.source.processes().values()), "the traffic")
        process.kill()
        process.communicate()
        wait_until(lambda: not any(host.processes() or host.files() for host in lab.hosts), "nothing left", 15)
