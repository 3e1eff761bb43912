"""The kernel's own account: pages of its trace, which packet an event is of, and real causes of delay and loss."""
from __future__ import annotations

import contextlib
import os
import random
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Terminal, analyzed, failure, finished, offline, report, sending
from lab import NETWEAVER, Lab, wait_until
from openvswitch import OpenVSwitchLab

import netweaver

# -- pages of the trace, as kernels write them --

COMMON = """\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

"""
def fields(**places: tuple[str, int]) -> str:
    """The lines of a `format` file: of each field its type and place."""
    return "".join(f"\tfield:{kind} {name};\toffset:{at};\tsize:8;\tsigned:0;\n"
                   for name, (kind, at) in places.items())


TEMPLATE = fields(skbaddr=("void *", 8), len=("unsigned int", 16), name=("__data_loc char[]", 20))
EVENTS_4_19 = (
    (1001, "netif_receive_skb", TEMPLATE), (1002, "net_dev_queue", TEMPLATE),
    (1003, "net_dev_start_xmit", fields(name=("__data_loc char[]", 8), skbaddr=("const void *", 16),
                                        len=("unsigned int", 36))),
    (1004, "kfree_skb", fields(skbaddr=("void *", 8), location=("void *", 16), protocol=("unsigned short", 24))))
FORMATS_4_19 = "".join(f"name: {name}\nID: {number}\nformat:\n{COMMON}{text}\nprint fmt: x\n"
                       for number, name, text in EVENTS_4_19)


def device_event(number: int, skb: int, name: str, size: int) -> bytes:
    text = name.encode() + b"\0"
    if number == 1003:
        return struct.pack("<HHiIxxxxQ12xI", number, 0, 1, len(text) << 16 | 40, skb, size) + text
    return struct.pack("<HHiQII", number, 0, 1, skb, size, len(text) << 16 | 24) + text


def freed(skb: int, location: int) -> bytes:
    return struct.pack("<HHiQQH6x", 1004, 0, 1, skb, location, 8)


def page(events: list[tuple[int, bytes]], start: int, flags: int = 0, tail: bytes = b"") -> bytes:
    """A page of the ring buffer with events at these times."""
    body, now = b"", start
    for when, event in events:
        event += bytes(-len(event) % 4)
        delta, now = when - now, when
        if delta >= 1 << 27:
            body += struct.pack("<II", 30 | (delta & 0x7FFFFFF) << 5, delta >> 27)
            delta = 0
        body += (struct.pack("<I", len(event) // 4 | delta << 5) if len(event) <= 112 else
                 struct.pack("<II", delta << 5, len(event) + 4)) + event
    return (struct.pack("<QQ", start, len(body) | flags) + body + tail).ljust(4096, b"\0")


def events_of(data: bytes, lost: list[int]) -> list[netweaver.Event]:
    return list(netweaver.trace_events(data, netweaver.trace_formats(FORMATS_4_19), 0, lost))


def test_pages_of_4_19() -> None:
    """There a freed packet has a location and no reason; times are extended, and pages tell of lost events."""
    first = page([(1000, device_event(1001, 7, "eth0", 46)), (1500, device_event(1002, 7, "vif5.0", 60)),
                  (1900, device_event(1003, 7, "vif5.0", 60)), (5_000_000_000, freed(7, 0xFFFFFFFFC0441107))], 900)
    lost: list[int] = []
    found = events_of(first + page([(6_000_000_000, freed(8, 1))], 6_000_000_000, 3 << 30, struct.pack("<Q", 41)), lost)
    assert [(event.when, event.name, event.device, event.size) for event in found] == [
        (1000, "netif_receive_skb", "eth0", 46), (1500, "net_dev_queue", "vif5.0", 60),
        (1900, "net_dev_start_xmit", "vif5.0", 60), (5_000_000_000, "kfree_skb", "", 0),
        (6_000_000_000, "kfree_skb", "", 0)]
    assert found[3].end == ("kfree_skb", 0xFFFFFFFFC0441107, None)
    assert lost == [41]
    [one, *_] = netweaver.passages(found, "vif5.0", netweaver.IN)
    assert (one.received, one.queued, one.sent, one.freed) == (1000, 1500, 1900, 5_000_000_000)


def test_a_hostile_trace() -> None:
    """It neither loops nor takes more memory than its size allows, and what can't be is left out."""
    chance, whole = random.Random(1), page([(1000 + i, device_event(1001, i, "eth0", 46)) for i in range(80)], 900)
    for _ in range(300):
        data = bytearray(whole * 2)
        for _ in range(chance.randrange(1, 200)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        found = events_of(bytes(data[:chance.randrange(len(data))]), [])
        assert len(found) <= len(data) // 4
        netweaver.passages(found, "vif5.0", netweaver.IN)
    for text in ("", "name: x", "name: x\nID: 99999999999\n", "\0" * 1000, FORMATS_4_19.replace("skbaddr", "skb")):
        assert not list(netweaver.trace_events(whole, netweaver.trace_formats(text), 0, []))


# -- on this machine's kernel --

def stages(lab: Lab, *more: str, code: int = 0) -> dict[str, Any]:
    done = lab.netweaver(*lab.arguments("--stages", *more))
    return report(done, code)


def adds_up(found: dict[str, Any]) -> None:
    """The stages of a packet are its delay, but for what lies between a stamp and its event."""
    parts = found["stages"]
    whole = sum(parts[name]["average"] for name in ("before_stack", "forwarding", "queueing"))
    assert found["average"] <= whole + 0.2
    assert whole - found["average"] < 5
    assert parts["forwarding"]["packets"] >= 0.99 * found["packets"]["matched"]


@contextlib.contextmanager
def traced() -> Iterator[Path]:
    """Where the kernel's trace is, mounted for the test alone if it isn't."""
    place = Path("/sys/kernel/tracing")
    mounted = not (place / "instances").exists()
    if mounted:
        subprocess.run(["mount", "-t", "tracefs", "nodev", str(place)], check=True)
    try:
        yield place / "instances"
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def instances(place: Path) -> list[str]:
    return [name for name in os.listdir(place) if name.startswith("netweaver-")]


@pytest.mark.lab
@pytest.mark.alone
def test_a_bridge_both_ways() -> None:
    with Lab() as lab:
        found = stages(lab, "--direction", "both", "-c", "1000", "--rate", "1000")
        for part in (found, found["outbound"]):
            adds_up(part)
            assert list(part["stages"]) == ["before_stack", "forwarding", "queueing"]
            assert (part["lost_at"], part["after_vif"]) == ([], None)
        assert (found["config"]["stages_buffer"], found["config"]["backend"]) == (8192, "")
        assert all(0 < found["config"]["stamp_error"][side] < 20 for side in ("pif", "vif"))
        lab.wait_clean()
    with traced() as place:
        assert instances(place) == []


@pytest.mark.lab
@pytest.mark.alone
def test_causes_of_delay_and_loss(tmp_path: Path) -> None:
    """Each is found in its stage, and counted to the last packet."""
    with Lab() as lab:
        lab.hv.run(*"tc qdisc add dev vif5.0 root tbf rate 1mbit burst 2000 limit 3000".split())
        found = stages(lab, "--traffic", "udp", "--size", "200", "--rate", "1000", "-c", "1500", "--save",
                       str(tmp_path))
        told = re.search(r"dropped (\d+)", lab.hv.run("tc", "-s", "qdisc", "show", "dev", "vif5.0"))
        assert told
        [loss] = found["lost_at"]
        assert (loss["stage"], loss["reason"]) == ("queueing", "QDISC_DROP")
        assert loss["packets"] == found["packets"]["lost"] <= int(told[1]) <= loss["packets"] + 20       # ARP, and such
        assert found["stages"]["queueing"]["median"] > 0.9 * found["median"]
        adds_up(found)
        again = analyzed("--pcaps", found["saved"])
        assert [again[name] for name in ("stages", "lost_at")] == [found[name] for name in ("stages", "lost_at")]
        shown = Terminal(sys.executable, str(NETWEAVER), "--pcaps", found["saved"], "--plot", str(tmp_path / "x.png"),
                         environment=dict(os.environ), columns=80, whole=True)
        assert re.search(r"\n queueing .* ms .* █{35,40}\n", shown.text)
        assert f"\n {loss['packets']:>7} by the vif's queue (QDISC_DROP): tc -s qdisc show dev vif5.0\n" in shown.text
        assert (tmp_path / "x.png").exists()
        for limit, code in (("queueing.p99>1ms", 7), ("forwarding.median>1s", 0), ("dropped>0", 7)):
            assert offline("--pcaps", found["saved"], "--fail-if", limit).returncode == code
        series = offline("--pcaps", found["saved"], "--format", "prometheus").stdout
        assert re.search(r'netweaver_stage_seconds\{.*stage="queueing",statistic="median"} 0\.0\d+\n', series)
        lab.hv.run("tc", "qdisc", "del", "dev", "vif5.0", "root")

        rules = "table bridge t { chain c { type filter hook forward priority 0; tcp dport 7 counter drop; }; }"
        lab.hv.run("nft", rules)
        command = "hping3 -c 40 -S -p 7 -i u2000 {destination} & hping3 -c 60 -S -p 8 -i u2000 {destination} & wait"
        found = stages(lab, "--source-command", command)
        counted = re.search(r"counter packets (\d+)", lab.hv.run("nft", "list", "ruleset"))
        assert counted and int(counted[1]) == 40
        assert found["packets"]["matched"] == 60
        assert found["lost_at"] == [
            {"stage": "forwarding", "where": "nft_do_chain", "reason": "NETFILTER_DROP", "packets": 40}]
        line = failure(lab.netweaver(*lab.arguments("--stages", "-c", "30", "--rate", "500", "--port", "7")), 6)
        assert "By the kernel, 30 were lost in nft_do_chain (NETFILTER_DROP), forwarding" in line
        lab.wait_clean()


@pytest.mark.lab
@pytest.mark.alone
@pytest.mark.openvswitch
def test_open_vswitch_in_userspace() -> None:
    """Its packets are in other skbs on each side, and are told all the same."""
    with OpenVSwitchLab("patch") as lab:
        found = stages(lab, "-c", "500", "--rate", "500", "--traffic", "flow")
        assert found["packets"]["matched"] > 450
        assert found["stages"]["forwarding"]["packets"] >= 0.98 * found["packets"]["matched"]
        assert 0.8 < found["stages"]["forwarding"]["median"] / found["median"] < 1.2
        lab.wait_clean()


@pytest.mark.lab
@pytest.mark.alone
def test_the_trace_goes_whatever_is_killed() -> None:
    """Also a trace of a run that left one: the next run removes it.  The host's own tracing stays as it is."""
    with Lab() as lab, traced() as place:
        own = {name: (place.parent / name).read_text() for name in ("current_tracer", "trace_clock", "set_event")}
        for victim in ("netweaver.py", "keep /sys", "capture 1 ", "tcpdump"):
            process = lab.start(*lab.arguments("--stages", "--rate", "100", "-c", "3000"))
            wait_until(lambda: sending(lab), "the traffic")
            assert len(instances(place)) == 1
            for host in lab.hosts:
                for pid, line in host.processes().items():
                    if victim in line and "sshd" not in line:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, 9)
            if victim == "netweaver.py":
                process.kill()
            begun = time.monotonic()
            wait_until(lambda: not instances(place), f"the trace to go after {victim}", 15)
            assert time.monotonic() - begun < 4
            if process.poll() is None:
                process.terminate()
            finished(process)
            lab.wait_clean()
        (place / "netweaver-99999999").mkdir()
        lab.hv.run("mount", "-t", "tracefs", "netweaver", "/sys/kernel/tracing")
        assert stages(lab, "-c", "20", "--rate", "1000")["stages"]["forwarding"]["packets"] == 20
        assert instances(place) == []
        assert "netweaver /sys/kernel/tracing" not in lab.hv.run("cat", "/proc/mounts")
        assert {name: (place.parent / name).read_text() for name in own} == own
        lab.wait_clean()


@pytest.mark.lab
def test_a_host_that_does_not_let_trace(own_lab: Lab) -> None:
    """The host's words are a warning, and the result is there without stages."""
    for program in ("mount", "mkdir"):
        path = own_lab.hv.directory / "bin" / program
        path.write_text("#!/bin/sh\n"
                        f"case \"$*\" in *trac*) echo '{program}: Operation not permitted' >&2; exit 32;; esac\n"
                        f"exec /bin/{program} \"$@\"\n")
        path.chmod(0o755)
    found = report(own_lab.netweaver(*own_lab.arguments("--stages", "-c", "600", "--rate", "1000")))
    assert found["packets"]["matched"] == 600
    assert "stages" not in found
    [warning] = found["warnings"]
    assert re.match(r"the kernel tells no stages: m\w+: Operation not permitted", warning)
    own_lab.wait_clean()


