"""Any network and any traffic.

Tags, tunnels, bonds, both directions, several sources, and what is there anyway.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import FAST, check_failures, failure, report, run_all
from laboratory import DATA, Lab, wait_until

import netweaver

pytestmark = pytest.mark.lab


@pytest.mark.parametrize("tags", [[7], [100, 200]], ids=len)
def test_a_tagged_pif_against_a_plain_vif(tags: list[int]) -> None:
    with Lab(forwarder=[], tags=tags) as lab:
        document = report(
            lab.netweaver(
                *lab.arguments("-c", "60", "--source-command", FAST, "--direction", "both")
            )
        )
        lab.wait_clean()
    assert (
        document["packets"]["pif"]
        == document["packets"]["vif"]
        == document["packets"]["matched"]
        == 60
    )
    assert (
        document["outbound"]["packets"]["vif"] == document["outbound"]["packets"]["matched"] == 60
    )


def test_a_vxlan_pif_against_a_plain_vif() -> None:
    """With --overlay, and found by the bridge of the vif; without, the error says what to do."""
    command = ("-c", "60", "--source-command", FAST)
    ping = ("--source-command", "ping -c {count} -i 0.02 {destination}")
    with Lab(overlay=True) as lab:
        own_filter = f"udp port 4789 or dst host {lab.destination}"
        cases = [
            (*command, "-i", "eth0", "--overlay", "--direction", "both"),
            command,
            ("-c", "20", "-d", "fd83:1::100", *ping),
            (*command, "-i", "eth0", "--filter", own_filter),
            (*command, "-i", "eth0"),
        ]
        *measured, failed = run_all(lab, [lab.arguments(*words) for words in cases])
        lab.wait_clean()
    asked, automatic, ipv6, filtered = [report(done) for done in measured]
    for found in (asked, automatic):
        packets = found["packets"]
        assert packets["pif"] == packets["vif"] == packets["matched"] == 60
        assert found["config"]["overlay"] is True
        assert found["config"]["pif"] == "eth0"
    assert ipv6["packets"]["pif"] == ipv6["packets"]["matched"] >= 20
    assert filtered["packets"]["matched"] == 60
    assert "--overlay" in failure(failed, 6)


ROUTED = f"""
ip link set eth0 nomaster; ip link set vif5.0 nomaster; ip link del xenbr0
ip addr add {DATA}.250/24 dev eth0; ip addr add 10.86.0.1/24 dev vif5.0
echo 1 >/proc/sys/net/ipv4/ip_forward
nft 'table ip t {{
  chain c {{ type nat hook prerouting priority -100; ip daddr {DATA}.250 dnat to 10.86.0.2; }}
}}'
"""
GUEST = """
ip addr flush dev ens3; ip addr add 10.86.0.2/24 dev ens3; ip route add default via 10.86.0.1
"""


def test_a_guest_behind_nat() -> None:
    """The source knows the host's address only, and the vif has the guest's."""
    with Lab() as lab:
        lab.hv.run("sh", "-ec", ROUTED)
        subprocess.run(lab.inside(lab._dst, "sh", "-ec", GUEST), check=True)
        options = ("-d", f"{DATA}.250", "-c", "60", "--source-command", FAST)
        cases = [
            [*options, "--match-nat"],
            [*options, "--match-nat", "--direction", "out"],
            list(options),
        ]
        *measured, failed = run_all(lab, [lab.arguments(*words) for words in cases])
        lab.wait_clean()
    for done in measured:
        packets = report(done)["packets"]
        assert packets["pif"] == packets["vif"] == packets["matched"] == 60
    assert "on eth0, 0 on vif5.0" in failure(failed, 6)
    assert "(--match-nat)" in failed.stderr


def test_the_slaves_of_a_bond() -> None:
    """Two sources come in by one physical interface each."""
    with Lab(sources=2) as lab:
        lab._link(lab.hv.namespace, "eth1", lab.client, "d-hv1")
        lab._ip("link", "set", "eth1", "master", "xenbr0", namespace=lab.hv.namespace)
        lab._bridge(lab.client, "data1", "d-hv1", "d-src2")
        command = ("-c", "60", "--source-command", FAST)
        cases = [
            (*command, "-i", "eth0", "-i", "eth1"),
            command,
            (*command, "-i", "eth0"),
            ("-i", "eth0", "-i", "eth7"),
        ]
        *measured, failed = run_all(lab, [lab.arguments(*words) for words in cases])
        lab.wait_clean()
    asked, automatic, half = [report(done) for done in measured]
    assert asked["packets"]["pif"] == asked["packets"]["matched"] == 120
    assert asked["capture"]["pif"]["interface"] == asked["config"]["pif"] == "eth0,eth1"
    assert asked["capture"]["pif"]["captured"] == asked["capture"]["pif"]["records"] == 120
    assert automatic["packets"]["pif"] == automatic["packets"]["matched"] == 120
    assert (half["packets"]["matched"], half["packets"]["vif_only"]) == (60, 60)
    [warning] = [text for text in half["warnings"] if "of 120 packets sent" in text]
    assert "60" in warning
    assert "-i" in warning
    line = failure(failed, 5)
    assert "eth7: No such device exists" in line
    assert "(there are: eth0, eth1, lo, mgmt0, xenbr0, vif5.0)" in line


@pytest.mark.alone
def test_three_sources_at_once() -> None:
    """hping3 seeds its generator with the second.

    Started in the same one, all send the same numbers.
    """
    with Lab(sources=3) as lab:
        document = report(
            lab.netweaver(
                *lab.arguments(
                    "-c",
                    "1000",
                    "--source-command",
                    FAST,
                    "--csv",
                    str(lab.directory / "table.csv"),
                )
            )
        )
        table = (lab.directory / "table.csv").read_text().splitlines()[1:]
        planned = lab.netweaver(*lab.arguments("-c", "200000", "--dry-run"))
        lab.wait_clean()
    # An open port has three packets in both directions, SYN, SYN-ACK and RST; one is a reserve.
    limits = map(int, re.findall(r"tcpdump .* -c (\d+) ", planned.stdout))
    assert [limit >= 3 * 4 * 200_000 for limit in limits] == [True, True], planned.stdout
    assert (
        document["packets"]["pif"]
        == document["packets"]["vif"]
        == document["packets"]["matched"]
        == 3000
    )
    assert document["warnings"] == []
    assert len({line.split(",")[1] for line in table}) == 3


@pytest.mark.alone
def test_each_directions_delay_and_the_guest_between() -> None:
    with Lab(forwarder=["--delay", "3000", "--back", "1000"]) as lab:
        document = report(
            lab.netweaver(
                *lab.arguments("-c", "1000", "--source-command", FAST, "--direction", "both")
            )
        )
        out = report(
            lab.netweaver(
                *lab.arguments("-c", "1000", "--source-command", FAST, "--direction", "out")
            )
        )
        lab.wait_clean()
    assert 3000 <= document["median"] < 3300
    assert 1000 <= document["outbound"]["median"] < 1300
    assert 0 < document["guest"]["median"] < 300
    assert document["guest"]["packets"] == {
        "answered": 1000,
        "unanswered": 0,
        "undecided": 0,
        "ambiguous": 0,
    }
    assert 1000 <= out["median"] < 1300
    assert out["packets"]["vif"] == out["packets"]["matched"] == 1000


# Ends by itself, a second after its last packet.
ENDS = "hping3 -c 1000 -S -i u100 {destination}"
ENDS_AT_ONCE = """
sent=/sys/class/net/eth0/statistics/tx_packets
end=$((`cat $sent` + 1020))
hping3 -S -i u1000 {destination} &
until [ `cat $sent` -ge $end ]; do sleep 0.01; done
kill -KILL $!
wait $! || :
"""


@pytest.mark.alone
@pytest.mark.parametrize(
    ("command", "wait", "undecided"),
    [(ENDS, "0.1", False), (ENDS_AT_ONCE, "0.1", True), (ENDS_AT_ONCE, "1.5", False)],
)
def test_packets_that_take_long(command: str, wait: str, undecided: bool) -> None:
    """All that matched counts, and of the lost ones those that were watched for long enough."""
    with Lab(forwarder=["--delay", "500000", "--loss", "0.05"]) as lab:
        document = report(
            lab.netweaver(*lab.arguments("--wait", wait, "--source-command", command))
        )
        truth = lab.truth()
        lab.wait_clean()
    packets = document["packets"]
    assert packets["pif"] + packets["undecided"] == len(truth) >= 1000
    counted = truth[: packets["pif"]]  # the set ends before the first undecided packet
    assert packets["matched"] == sum(bool(packet["sent"]) for packet in counted)
    assert packets["lost"] == len(counted) - packets["matched"] > 0
    assert document["loss_ratio"] == packets["lost"] / len(counted)
    assert document["config"]["wait"] == float(wait)
    assert (packets["undecided"] > 0) == undecided
    warnings = [text for text in document["warnings"] if "--wait" in text]
    assert len(warnings) == undecided
    assert all(str(packets["undecided"]) in re.findall(r"\d+", text) for text in warnings)
    assert 5e5 <= document["median"] < 5.2e5


def test_an_open_port(lab: Lab) -> None:
    """The source's kernel answers each answer with a RST; that is no other traffic."""
    code = (
        "import socket, time; server = socket.create_server(('', 7777), backlog=4096); "
        "print(flush=True); time.sleep(60)"
    )
    server = subprocess.Popen(
        ["ip", "netns", "exec", lab._dst, sys.executable, "-c", code], stdout=subprocess.PIPE
    )
    try:
        assert server.stdout is not None
        server.stdout.readline()
        document = report(
            lab.netweaver(
                *lab.arguments(
                    "-c",
                    "500",
                    "--direction",
                    "both",
                    "--source-command",
                    FAST.replace("-S", "-S -p 7777"),
                    source=lab.source.address,
                )
            )
        )
    finally:
        server.kill()
        server.communicate()
    assert document["packets"]["pif"] == document["packets"]["matched"] == 1000
    assert document["guest"]["packets"]["answered"] == 500
    assert document["warnings"] == []


def test_traffic_that_is_there_anyway(lab: Lab) -> None:
    """No source, no command of ours; TCP, UDP and ping of somebody else's."""
    foreign = [
        subprocess.Popen(
            lab.source.command(*command.split()),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for command in (
            f"hping3 -S -i u2000 {lab.destination}",
            f"hping3 -q --udp -i u3000 {lab.destination}",
            f"ping -i 0.01 {lab.destination}",
            f"hping3 -S -i u2000 {DATA}.200",
        )
    ]
    arguments = lab.passive_arguments("2")
    try:
        document = report(lab.netweaver(*arguments))
        both = report(lab.netweaver(*arguments, "--direction", "both"))
    finally:
        for process in foreign:
            process.kill()
            process.wait()
    for one in (document, both, both["outbound"]):
        assert one["packets"]["matched"] > 500
        assert one["packets"]["lost"] == 0
    assert (
        document["packets"]["vif_only"]
        == both["packets"]["vif_only"]
        == both["outbound"]["packets"]["pif_only"]
        == 0
    )
    assert both["guest"]["packets"]["answered"] > 500
    assert 2 <= document["config"]["duration"] < 3
    assert document["config"]["source_command"] is None
    assert document["config"]["sources"] == []


@pytest.mark.parametrize("size", [0, 1, 1400])
def test_hping3_accepts_the_sizes(lab: Lab, size: int) -> None:
    for pattern in netweaver.PATTERNS:
        traffic = netweaver.Traffic(pattern, size=size)
        command = f"{traffic.source_command(1, lab.destination)} 2>&1 || :"
        assert re.search("1 packets tra(ns)?mitted", lab.source.run("sh", "-c", command)), pattern


def test_a_dry_run_of_existing_ipv6_traffic(lab: Lab) -> None:
    """hping3, which has no IPv6, sends nothing here."""
    arguments = [*lab.passive_arguments("1"), "-d", "fd83:1::100", "--dry-run"]
    done = lab.netweaver(*arguments)
    assert done.returncode == 0, done.stderr
    assert "tcpdump -i vif5.0 " in done.stdout
    assert "hping3" not in done.stdout


def test_no_traffic_at_all(lab: Lab) -> None:
    line = failure(lab.netweaver(*lab.passive_arguments("0.5", "10.83.1.77")), 6)
    assert "(0 on eth0, 0 on vif5.0)" in line


def test_a_passive_run_can_be_interrupted(lab: Lab) -> None:
    process = lab.start(*lab.passive_arguments("60"))
    wait_until(
        lambda: sum("tcpdump" in line for line in lab.hv.processes().values()) >= 2, "the captures"
    )
    lab.source.run(
        "ping", "-c", "100", "-i", "0.01", lab.destination
    )  # so that most come in their time
    process.terminate()
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 143, errors
    assert json.loads(out)["interrupted"] is True
    assert 20 < json.loads(out)["packets"]["matched"] <= 100
    assert json.loads(out)["packets"]["lost"] == 0


def test_a_duration_ends_traffic_without_an_end(lab: Lab) -> None:
    document = report(
        lab.netweaver(
            *lab.arguments(
                "--duration", "1.5", "--source-command", "hping3 -S -i u5000 {destination}"
            )
        )
    )
    assert 1.5 <= document["config"]["duration"] < 5
    assert not [warning for warning in document["warnings"] if "stopped" in warning]


def test_filters_of_ones_own(lab: Lab) -> None:
    expression = f"tcp and dst host {lab.destination} and src host {DATA}.1"
    words = ("-c", "60", "--source-command", FAST, "--filter", expression)
    document = report(lab.netweaver(*lab.arguments(*words)))
    assert document["packets"]["matched"] == 60  # of two sources
    assert "-- 'tcp and dst host" in document["config"]["pif_command"]
    assert document["warnings"] == []
    cases = [
        (["--filter", "tcp and and"], 5, "syntax error"),
        (["--filter", "; touch /tmp/owned"], 5, "the capture on "),
    ]
    check_failures(lab, cases)


@pytest.mark.parametrize(("direction", "first"), [("in", "pif"), ("out", "vif")])
def test_a_filter_that_captures_answers_too(lab: Lab, direction: str, first: str) -> None:
    """Only packets of the direction that is measured count."""
    words = ("-c", "60", "--source-command", FAST, "--direction", direction)
    document = report(
        lab.netweaver(*lab.arguments(*words, "--filter", f"tcp and host {lab.destination}"))
    )
    sent = 60 * len(lab.sources)
    assert document["packets"][first] == document["packets"]["matched"] == sent
    assert document["negative"] == 0
    assert document["capture"]["pif"]["filtered"] >= sent


def test_the_keyword_vlan_with_an_old_libpcap(own_lab: Lab) -> None:
    real = shutil.which("tcpdump", path=f"{os.environ['PATH']}:/usr/sbin")
    words = ["-c", "60", "--source-command", FAST]
    words += ["--filter", f"tcp and dst host {own_lab.destination} or vlan"]
    for version, warns in (("1.5.3", True), ("1.8.1", True), ("1.9.1", False), ("1.10.3", False)):
        own_lab.hv.write_program(
            "tcpdump",
            f"case $* in *--help*) echo 'libpcap version {version}' >&2; exit 1 ;; esac\n"
            f'exec {real} "$@"',
        )
        document = report(own_lab.netweaver(*own_lab.arguments(*words)))
        assert document["packets"]["matched"] == 60
        warnings = [text for text in document["warnings"] if "keyword vlan" in text]
        assert len(warnings) == warns, version
        assert all(version.rpartition(".")[0] in text for text in warnings)


@pytest.mark.parametrize(
    "command",
    [
        "hping3 -q -c {count} --udp -p 7 -d 64 -i u1000 {destination}",
        "hping3 -c {count} -1 -i u1000 {destination}",
        "hping3 -c {count} -S -p 80 -d 1400 -i u1000 {destination}",
        "ping -c {count} -i 0.002 -s 1400 {destination}",
    ],
)
def test_usual_source_commands(lab: Lab, command: str) -> None:
    document = report(
        lab.netweaver(
            *lab.arguments("-c", "500", "--source-command", command, source=lab.source.address)
        )
    )
    assert document["packets"]["pif"] == document["packets"]["matched"] >= 500
    assert document["warnings"] == []


def test_bulk_tcp_by_iperf3(lab: Lab) -> None:
    server = subprocess.Popen(
        ["ip", "netns", "exec", lab._dst, "iperf3", "-s", "-1", "--forceflush"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        assert server.stdout is not None
        assert any(b"Server listening" in line for line in iter(server.stdout.readline, b""))
        document = report(
            lab.netweaver(
                *lab.arguments(
                    "--source-command",
                    "iperf3 -c {destination} -t 1 -b 50M",
                    "--direction",
                    "both",
                    source=lab.source.address,
                )
            )
        )
    finally:
        server.kill()
        server.communicate()
    assert document["packets"]["pif"] == document["packets"]["matched"] > 100
    assert document["outbound"]["packets"]["vif"] == document["outbound"]["packets"]["matched"] > 10
    assert document["guest"]["packets"]["answered"] == 2  # its two connections


def test_labels(lab: Lab) -> None:
    labels = ("--label", "rack=7", "--label", "note=a=b c")
    document = report(lab.netweaver(*lab.arguments("-c", "3", "--source-command", FAST, *labels)))
    assert document["config"]["labels"] == {"rack": "7", "note": "a=b c"}
