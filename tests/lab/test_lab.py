"""The main job, end to end, on real components.

Sshd, tcpdump, hping3 and the kernel's own interfaces.
"""

from __future__ import annotations

import json
from ipaddress import ip_address
from pathlib import Path

import pytest
from helpers import FAST, check_failures, failure, report, run_code
from laboratory import NAME, Lab, generate_key, pool, vm, wait_until

pytestmark = pytest.mark.lab


def test_the_seeds_command_line(lab: Lab) -> None:
    done = lab.netweaver(
        *lab.arguments("-i", "eth0", "--num", "0", "-c", "20", source=lab.source.address)
    )
    document = report(done)
    figures = ("average", "minimum", "maximum", "stdev", "median", "percentiles")
    assert tuple(document)[:6] == figures
    assert document["schema_version"] == 3
    assert list(document["percentiles"]) == ["90", "95", "99", "99.9"]
    assert document["unit"] == "microseconds"
    assert document["packets"] == {
        "pif": 20,
        "vif": 20,
        "matched": 20,
        "ambiguous": 0,
        "lost": 0,
        "undecided": 0,
        "duplicated": 0,
        "reordered": 0,
        "vif_only": 0,
    }
    assert 0 < document["minimum"] <= document["median"] <= document["maximum"] < 1e6
    for side, interface in (("pif", "eth0"), ("vif", "vif5.0")):
        assert document["capture"][side]["interface"] == interface
        assert document["capture"][side]["captured"] == 20
        assert document["capture"][side]["dropped"] == 0
        assert document["config"][side] == interface
    assert document["warnings"] == []
    assert document["config"]["hypervisor"] == f"root@{lab.hv.address}"
    assert document["config"]["source_command"] == (
        f"hping3 -q -c 20 -i u10000 -S -d 0 -p 0 {lab.destination}"
    )
    assert document["flows"] == {"count": 20}
    assert document["config"]["started"].endswith("Z")
    assert document["config"]["duration"] > 0.19
    assert done.stderr == ""


def test_quiet_and_verbose(lab: Lab) -> None:
    more = ("-c", "50", "--source-command", FAST)
    assert lab.netweaver(*lab.arguments(*more, "-q")).stderr == ""
    done = lab.netweaver(*lab.arguments(*more, "-v"))
    for step in (
        "Spawning packet captures",
        "Captures finished, waiting for files to flush",
        "Transferring files",
    ):
        assert f"\n{step}." in done.stderr
    assert f"root@{lab.source.address}: hping3 -c 50 " in done.stderr
    assert f"root@{lab.hv.address}: exec tcpdump -i eth0" in done.stderr
    assert str(lab.key.read_text().splitlines()[1]) not in done.stderr


def test_two_sources_that_send_identical_sequences(lab: Lab) -> None:
    """hping3 seeds its generator with the second in which it starts: both send the same numbers."""
    document = report(lab.netweaver(*lab.arguments("-c", "500", "--source-command", FAST)))
    assert document["packets"]["pif"] == document["packets"]["matched"] == 1000
    assert document["warnings"] == []


@pytest.mark.alone
def test_the_truth_under_delay_loss_duplication_and_reordering() -> None:
    options = [
        "--delay",
        "2000",
        "--jitter",
        "400",
        "--loss",
        "0.03",
        "--duplicate",
        "0.02",
        "--reorder",
        "0.05",
    ]
    with Lab(forwarder=options) as lab:
        document = report(lab.netweaver(*lab.arguments("-c", "3000", "--source-command", FAST)))
        lab.wait_clean()
        truth = lab.truth()
    arrived = sorted(
        (packet["sent"][0], rank) for rank, packet in enumerate(truth) if packet["sent"]
    )
    late = sum(
        any(later > rank for _, later in arrived[max(0, place - 50) : place])
        for place, (_, rank) in enumerate(arrived)
    )
    assert document["packets"] == {
        "pif": 3000,
        "vif": sum(len(packet["sent"]) for packet in truth),
        "matched": len(arrived),
        "ambiguous": 0,
        "undecided": 0,
        "lost": sum(not packet["sent"] for packet in truth),
        "duplicated": sum(len(packet["sent"]) - 1 for packet in truth if packet["sent"]),
        "reordered": late,
        "vif_only": 0,
    }
    assert document["packets"]["lost"] > 0
    assert document["packets"]["duplicated"] > 0
    assert document["packets"]["reordered"] > 0
    delays = [(packet["sent"][0] - packet["seen"]) / 1000 for packet in truth if packet["sent"]]
    average = sum(delays) / len(delays)
    assert (
        average <= document["average"] < average + 100
    )  # the forwarder's stamp is before its send, the vif's inside
    assert min(delays) <= document["minimum"] < min(delays) + 200


def test_a_name_that_is_no_vm_here(lab: Lab) -> None:
    cases = [
        ("halted", "the VM 'halted' is not running"),
        ("unknown", "there is no VM with the name-label 'unknown'"),
        ("twins", "2 VMs have the name-label 'twins'"),
        ("elsewhere", "the VM 'elsewhere' runs on another host of the pool"),
        ("dom0", "there is no VM with the name-label 'dom0'"),
        ("x'; touch /tmp/owned; '", "there is no VM with the name-label"),
        ("$(touch /tmp/owned)\n", "there is no VM with the name-label"),
    ]
    prefix = f"root@{lab.hv.address}: "
    check_failures(lab, [(["-n", name], 4, prefix + words) for name, words in cases])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("down", "Error: Connection refused (calling connect )"),
        ("starting", "The host toolstack is still initialising. Please wait."),
    ],
)
def test_a_toolstack_that_does_not_answer(lab: Lab, fault: str, words: str) -> None:
    before = json.loads((lab.directory / "pool.json").read_text())
    lab.set_pool(pool(vm(), fault=fault))
    try:
        assert words in failure(lab.netweaver(*lab.arguments("--toolstack", "xe"), seconds=15), 4)
    finally:
        lab.set_pool(before)


def test_an_interface_that_can_not_be_used(lab: Lab) -> None:
    there = "(there are: eth0, lo, mgmt0, xenbr0, vif5.0)"
    function = "): the hypervisor can't see an SR-IOV function that was given to a VM\n"
    cases: list[tuple[list[str], int, str]] = [
        (["-i", "vif5.0"], 2, "-i vif5.0: this is the VM's own interface"),
        (["-i", "nope0"], 5, "nope0: No such device exists"),
        (["-i", "nope0"], 5, f"{there}: -i auto finds the physical interface"),
        (["--num", "7"], 5, "vif5.7: No such device exists"),
        (["--num", "7"], 5, "(similar names: vif5.0)\n"),
        (["--vif", "enp9s0v1"], 5, function),
    ]
    check_failures(lab, cases)


def test_hosts_that_can_not_be_used(lab: Lab, tmp_path: Path) -> None:
    other = tmp_path / "other"
    generate_key(other)
    (tmp_path / "text").write_text("no key")
    refused = (
        "Connection refused: is sshd running there? "
        "(XenServer 9 has it off by default: xe host-enable-ssh)"
    )
    cases = [
        (["-k", str(other)], 3, f"refused the key {other} for root: add the public key"),
        (["-k", str(tmp_path / "none")], 3, "No such file"),
        (["-k", str(tmp_path / "text")], 3, "not a private key"),
        (["--hv", "10.83.0.99"], 3, "root@10.83.0.99: can't reach port 22: "),
        (["--hv", f"{lab.hv.address}:2222"], 3, f"{refused}\n"),
    ]
    check_failures(lab, cases)


def test_a_changed_host_key_is_refused(lab: Lab) -> None:
    report(lab.netweaver(*lab.arguments("-c", "3", "--source-command", FAST)))
    known_hosts = lab.home / ".ssh" / "known_hosts"
    before = known_hosts.read_text()
    assert known_hosts.stat().st_mode & 0o777 == 0o600
    assert sorted(line.split()[0] for line in before.splitlines()) == sorted(
        host.address for host in lab.hosts
    )
    [hv] = [line for line in before.splitlines() if line.startswith(f"{lab.hv.address} ")]
    [source] = [line for line in before.splitlines() if line.startswith(f"{lab.source.address} ")]
    known_hosts.write_text(before.replace(hv, f"{lab.hv.address} {source.split(' ', 1)[1]}"))
    try:
        line = failure(lab.netweaver(*lab.arguments(), seconds=15), 3)
        assert "its host key (ssh-ed25519 SHA256:" in line
        assert "man-in-the-middle attack" in line
        assert "remove line " in line
        assert line.endswith(f" of {known_hosts}")
    finally:
        known_hosts.write_text(before)


def test_a_source_command_that_fails(lab: Lab) -> None:
    missing = f"hping4 {lab.destination}: exit status 127: "
    cases = [
        (["--source-command", "hping4 {destination}"], 4, missing),
        (["--source-command", "hping4"], 4, "not found"),
        (["--source-command", "echo 'no\x1b[31m luck' >&2; exit 3"], 4, "3: no\\x1b[31m luck"),
    ]
    check_failures(lab, cases)


def test_a_destination_that_does_not_answer_is_no_failure(lab: Lab) -> None:
    """hping3 then exits with 1.

    Nothing arrives at this VM's vif, which is another one's address.
    """
    done = lab.netweaver(
        *lab.arguments("-c", "5", "--source-command", FAST, "-d", "10.83.1.200"), seconds=30
    )
    line = failure(done, 6)
    assert "no packet was seen on both interfaces (0 on eth0, 0 on vif5.0)" in line


def test_traffic_that_outlives_the_timeout_is_stopped(lab: Lab) -> None:
    document = json.loads(
        run_code(
            lab,
            """
with netweaver.NetWeaver(SOURCE, NAME, DESTINATION, HV, KEY, timeout=2) as weaver:
    weaver.generate_and_record(f"hping3 -S -i u10000 {DESTINATION}")
    weaver.pull_generated_files()
    print(json.dumps(weaver.analyze()))
""",
        )
    )
    assert (
        document["warnings"][0]
        == "the source command was stopped after 2 s. Use --duration to measure longer"
    )
    assert document["packets"]["matched"] > 100
    assert document["packets"]["lost"] == 0


def test_a_client_that_is_killed_leaves_nothing(lab: Lab) -> None:
    process = lab.start(*lab.arguments("--source-command", "hping3 -S -i u10000 {destination}"))
    wait_until(
        lambda: any("hping3" in line for line in lab.source.processes().values()), "the traffic"
    )
    process.kill()
    process.communicate()
    wait_until(
        lambda: not any(host.processes() or host.files() for host in lab.hosts), "nothing left", 15
    )
    for path in (lab.directory / "client-tmp").iterdir():
        path.rmdir()  # of a client that was killed only an empty directory may stay


def test_ipv6_and_ping(lab: Lab) -> None:
    document = report(
        lab.netweaver(
            *lab.arguments(
                "-d",
                "fd83:1::100",
                "-c",
                "20",
                "--source-command",
                "ping -c {count} -i 0.02 {destination}",
                source=lab.source.address,
            )
        )
    )
    assert document["packets"]["pif"] == document["packets"]["matched"]
    assert 20 <= document["packets"]["pif"] <= 22  # neighbour discovery is IPv6, too


def test_hosts_by_their_ipv6_addresses(lab: Lab) -> None:
    document = report(
        lab.netweaver(
            "-n",
            NAME,
            "--hv",
            f"root@[{lab.hv.address6}]:22",
            "-s",
            lab.source.address6,
            "-d",
            lab.destination,
            "-k",
            str(lab.key),
            "-c",
            "60",
            "--source-command",
            FAST,
            "-o",
            f"UserKnownHostsFile={lab.directory}/known6",
        )
    )
    assert document["packets"]["matched"] == 60
    assert document["config"]["hypervisor"] == f"root@[{lab.hv.address6}]"
    names = {line.split()[0] for line in (lab.directory / "known6").read_text().splitlines()}
    assert names == {str(ip_address(host.address6)) for host in (lab.hv, lab.source)}


def test_a_whole_run_by_one_method(lab: Lab) -> None:
    out = run_code(
        lab,
        """
with netweaver.NetWeaver(SOURCE, NAME, DESTINATION, HV, KEY, count=50, wait=0.2) as weaver:
    print(json.dumps(weaver.measure(netweaver.Traffic("udp", rate=500))))
try:
    netweaver.NetWeaver(SOURCE, NAME, DESTINATION, HV, KEY, cuont=50)
except TypeError as error:
    print(error)
""",
    )
    document, error = out.splitlines()
    report = json.loads(document)
    assert report["packets"]["matched"] == 50
    assert report["config"]["traffic"]["pattern"] == "udp"
    assert report["config"]["wait"] == 0.2
    assert "cuont" in error


def test_another_toolstack_by_overriding(lab: Lab) -> None:
    out = run_code(
        lab,
        """
class ByMac(netweaver.NetWeaver):
    def determine_vif_number(self):
        return self.run_command("ls /sys/class/net | grep '^vif'").strip()

with ByMac(SOURCE, NAME, DESTINATION, HV, KEY, count=5) as weaver:
    assert weaver.verify_connections() is True
    weaver.generate_and_record("hping3 -c 5 -S -i u1000 " + DESTINATION)
    print(weaver.pull_generated_files())
    print(json.dumps(weaver.analyze()))
""",
    )
    paths, found = out.splitlines()
    assert json.loads(found)["config"]["vif"] == "vif5.0"
    assert json.loads(found)["packets"]["matched"] == 5
    assert "pif.pcap" in paths


def test_text_captures_by_column(lab: Lab) -> None:
    out = run_code(
        lab,
        """
with netweaver.NetWeaver(SOURCE, NAME, DESTINATION, HV, KEY) as weaver:
    options = "--time-stamp-precision=nano -tttt -nnl"
    capture = f"exec tcpdump {options} -i %s tcp and dst host {DESTINATION}"
    traffic = "hping3 -c 500 -S -L 0 -i u1000 " + DESTINATION
    weaver.generate_and_record(traffic, capture % "eth0", capture % "vif5.0")
    weaver.pull_generated_files()
    columns = dict(seq_no_col=9, timestamp_col=1, seq_no_split_by=",", seq_no_split_index=0)
    print(json.dumps(weaver.analyze(**columns)))
    try:
        weaver.analyze(7, 1, ",", 0)
    except netweaver.NoMatchError as error:
        print(error)
""",
    )
    document, error = out.splitlines()
    report = json.loads(document)
    assert "flows" not in report
    assert report["packets"]["pif"] == report["packets"]["matched"] == 500
    assert report["warnings"] == []
    assert 0 < report["average"] < 1e5
    assert "seq_no_col" in error
