"""The main job, end to end, on real components: sshd, tcpdump, hping3 and the kernel's own interfaces."""
from __future__ import annotations

import json
import subprocess
from ipaddress import ip_address
from pathlib import Path

import pytest
from helpers import FAST, FEW, FEW_FOR_P99_9, failure, report, run_code
from lab import NAME, Lab, pool, vm, wait_until

pytestmark = pytest.mark.lab

def test_the_seeds_command_line(lab: Lab) -> None:
    done = lab.netweaver(*lab.arguments("-i", "eth0", "--num", "0", "-c", "20", source=lab.source.address))
    found = report(done)
    assert list(found) == ["average", "minimum", "maximum", "stdev", "median", "percentiles", "unit", "packets",
                           "flows", "loss_ratio", "reordering", "pdv", "ipdv", "negative", "zero", "capture",
                           "warnings", "config", "schema_version"]
    assert list(found["percentiles"]) == ["90", "95", "99", "99.9"]
    assert found["unit"] == "microseconds"
    assert found["packets"] == {"pif": 20, "vif": 20, "matched": 20, "ambiguous": 0, "lost": 0, "undecided": 0,
                                "duplicated": 0, "reordered": 0, "vif_only": 0}
    assert 0 < found["minimum"] <= found["median"] <= found["maximum"] < 1e6
    for side, interface in (("pif", "eth0"), ("vif", "vif5.0")):
        assert found["capture"][side]["interface"] == interface
        assert found["capture"][side]["captured"] == 20
        assert found["capture"][side]["dropped"] == 0
        assert found["config"][side] == interface
    assert found["warnings"] == [FEW.format(20, "99"), FEW_FOR_P99_9.format(20)]
    assert found["config"]["hypervisor"] == f"root@{lab.hv.address}"
    assert found["config"]["source_command"] == (
        f"hping3 -q -c 20 -i u10000 -S -d 0 -p 0 {lab.destination}")
    assert found["flows"] == {"count": 20}
    assert found["config"]["started"].endswith("Z")
    assert found["config"]["duration"] > 0.19
    assert done.stderr == f"netweaver: warning: {found['warnings'][0]}\n"


def test_quiet_and_verbose(lab: Lab) -> None:
    more = ("-c", "500", "--source-command", FAST)
    assert lab.netweaver(*lab.arguments(*more, "-q")).stderr == ""
    done = lab.netweaver(*lab.arguments(*more, "-v"))
    for step in ("Spawning packet captures", "Captures finished, waiting for files to flush", "Transferring files"):
        assert f"\n{step}." in done.stderr
    assert f"root@{lab.source.address}: hping3 -c 500" in done.stderr
    assert f"root@{lab.hv.address}: exec tcpdump -i eth0" in done.stderr
    assert str(lab.key.read_text().splitlines()[1]) not in done.stderr


def test_two_sources_that_send_identical_sequences(lab: Lab) -> None:
    """hping3 seeds its generator with the second in which it starts: both send the same numbers."""
    found = report(lab.netweaver(*lab.arguments("-c", "500", "--source-command", FAST)))
    assert found["packets"]["pif"] == found["packets"]["matched"] == 1000
    assert found["warnings"] == []


@pytest.mark.alone
def test_the_truth_under_delay_loss_duplication_and_reordering() -> None:
    options = ["--delay", "2000", "--jitter", "400", "--loss", "0.03", "--duplicate", "0.02", "--reorder", "0.05"]
    with Lab(forwarder=options) as lab:
        found = report(lab.netweaver(*lab.arguments("-c", "3000", "--source-command", FAST)))
        lab.wait_clean()
        truth = lab.truth()
    arrived = sorted((packet["sent"][0], rank) for rank, packet in enumerate(truth) if packet["sent"])
    late = sum(any(later > rank for _, later in arrived[max(0, place - 50):place])
               for place, (_, rank) in enumerate(arrived))
    assert found["packets"] == {
        "pif": 3000, "vif": sum(len(packet["sent"]) for packet in truth), "matched": len(arrived),
        "ambiguous": 0, "undecided": 0, "lost": sum(not packet["sent"] for packet in truth),
        "duplicated": sum(len(packet["sent"]) - 1 for packet in truth if packet["sent"]),
        "reordered": late, "vif_only": 0}
    assert found["packets"]["lost"] > 0
    assert found["packets"]["duplicated"] > 0
    assert found["packets"]["reordered"] > 0
    delays = [(packet["sent"][0] - packet["seen"]) / 1000 for packet in truth if packet["sent"]]
    average = sum(delays) / len(delays)
    assert average <= found["average"] < average + 100   # the forwarder's stamp is before its send, the vif's inside
    assert min(delays) <= found["minimum"] < min(delays) + 200


@pytest.mark.parametrize(("name", "words"), [
    ("halted", "the VM 'halted' is not running"),
    ("unknown", "there is no VM with the name-label 'unknown'"),
    ("twins", "2 VMs have the name-label 'twins'"),
    ("elsewhere", "the VM 'elsewhere' runs on another host of the pool"),
    ("dom0", "there is no VM with the name-label 'dom0'"),
    ("x'; touch /tmp/owned; '", "there is no VM with the name-label"),
    ("$(touch /tmp/owned)\n", "there is no VM with the name-label"),
])
def test_a_name_that_is_no_vm_here(lab: Lab, name: str, words: str) -> None:
    line = failure(lab.netweaver(*lab.arguments(name=name), seconds=15), 4)
    assert words in line
    assert f"root@{lab.hv.address}: " in line


@pytest.mark.parametrize(("fault", "words"), [
    ("down", "Error: Connection refused (calling connect )"),
    ("starting", "The host toolstack is still initialising. Please wait."),
])
def test_a_toolstack_that_does_not_answer(lab: Lab, fault: str, words: str) -> None:
    before = json.loads((lab.directory / "pool.json").read_text())
    lab.set_pool(pool(vm(), fault=fault))
    try:
        assert words in failure(lab.netweaver(*lab.arguments("--toolstack", "xe"), seconds=15), 4)
    finally:
        lab.set_pool(before)


def test_an_interface_that_does_not_exist(lab: Lab) -> None:
    line = failure(lab.netweaver(*lab.arguments("-i", "nope0"), seconds=15), 5)
    assert "nope0: No such device exists" in line
    assert "(there are: eth0, lo, mgmt0, xenbr0, vif5.0): -i auto finds the physical interface" in line
    line = failure(lab.netweaver(*lab.arguments("--num", "7"), seconds=15), 5)
    assert "vif5.7: No such device exists" in line
    assert line.endswith("(the VM has: vif5.0)")
    line = failure(lab.netweaver(*lab.arguments("--vif", "enp9s0v1"), seconds=15), 5)
    assert line.endswith("): a VM's interface that is an SR-IOV function has no device here")


def test_hosts_that_can_not_be_used(lab: Lab, tmp_path: Path) -> None:
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    line = failure(lab.netweaver(*lab.arguments("-k", str(other)), seconds=15), 3)
    assert f"refused the key {other} for root: add the public key" in line
    secret = tmp_path / "secret"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "phrase", "-f", str(secret)], check=True)
    assert "protected by a passphrase" in failure(lab.netweaver(*lab.arguments("-k", str(secret)), seconds=15), 3)
    assert "No such file" in failure(lab.netweaver(*lab.arguments("-k", str(tmp_path / "none")), seconds=15), 3)
    (tmp_path / "text").write_text("no key")
    assert "not a private key" in failure(lab.netweaver(*lab.arguments("-k", str(tmp_path / "text")), seconds=15), 3)
    line = failure(lab.netweaver(*lab.arguments("--hv", "10.83.0.99"), seconds=15), 3)
    assert "root@10.83.0.99: can't reach port 22: " in line
    line = failure(lab.netweaver(*lab.arguments("--hv", f"{lab.hv.address}:2222"), seconds=15), 3)
    assert line.endswith("Connection refused: is sshd running there? (XenServer 9 starts without: xe host-enable-ssh)")
    assert "Connection refused" in failure(lab.netweaver(*lab.arguments("--hv", f"{lab.hv.address}:23"), seconds=15), 3)


def test_a_changed_host_key_is_refused(lab: Lab) -> None:
    report(lab.netweaver(*lab.arguments("-c", "3", "--source-command", FAST)))
    known_hosts = lab.home / ".ssh" / "known_hosts"
    before = known_hosts.read_text()
    assert known_hosts.stat().st_mode & 0o777 == 0o600
    assert sorted(line.split()[0] for line in before.splitlines()) == sorted(host.address for host in lab.hosts)
    [hv] = [line for line in before.splitlines() if line.startswith(f"{lab.hv.address} ")]
    [source] = [line for line in before.splitlines() if line.startswith(f"{lab.source.address} ")]
    known_hosts.write_text(before.replace(hv, f"{lab.hv.address} {source.split(' ', 1)[1]}"))
    try:
        line = failure(lab.netweaver(*lab.arguments(), seconds=15), 3)
        assert "its host key (ssh-ed25519 SHA256:" in line
        assert "has changed, or someone is in between: if it is right, remove line " in line
        assert line.endswith(f" of {known_hosts}")
    finally:
        known_hosts.write_text(before)


def test_a_source_command_that_fails(lab: Lab) -> None:
    line = failure(lab.netweaver(*lab.arguments("--source-command", "hping4 {destination}", source=lab.source.address),
                                 seconds=15), 4)
    assert f"{lab.source.address}: hping4 {lab.destination}: exit status 127: " in line
    assert "not found" in line
    command = "echo 'no\x1b[31m luck' >&2; exit 3"
    line = failure(lab.netweaver(*lab.arguments("--source-command", command), seconds=15), 4)
    assert "exit status 3: no\\x1b[31m luck" in line


def test_a_destination_that_does_not_answer_is_no_failure(lab: Lab) -> None:
    """hping3 then exits with 1; nothing arrives at this VM's vif, which is another one's address."""
    done = lab.netweaver(*lab.arguments("-c", "5", "--source-command", FAST, "-d", "10.83.1.200"), seconds=30)
    line = failure(done, 6)
    assert "no packet was seen on both interfaces (0 on eth0, 0 on vif5.0)" in line


def test_traffic_that_outlives_the_timeout_is_stopped(lab: Lab) -> None:
    found = json.loads(run_code(lab, """
with netweaver.NetWeaver(SOURCE, NAME, DESTINATION, HV, KEY, timeout=2) as weaver:
    weaver.generate_and_record(f"hping3 -S -i u10000 {DESTINATION}")
    weaver.pull_generated_files()
    print(json.dumps(weaver.analyze()))
"""))
    assert found["warnings"][0] == "the source command was stopped after 2 s (--duration measures for longer)"
    assert found["packets"]["matched"] > 100
    assert found["packets"]["lost"] == 0


def test_a_client_that_is_killed_leaves_nothing(lab: Lab) -> None:
    process = lab.start(*lab.arguments("--source-command", "hping3 -S -i u10000 {destination}"))
    wait_until(lambda: any("hping3" in line for line in lab.source.processes().values()), "the traffic")
    process.kill()
    process.communicate()
    wait_until(lambda: not any(host.processes() or host.files() for host in lab.hosts), "nothing left", 15)
    for path in (lab.directory / "client-tmp").iterdir():
        path.rmdir()                                 # of a client that was killed only an empty directory may stay


def test_ipv6_and_ping(lab: Lab) -> None:
    found = report(lab.netweaver(*lab.arguments("-d", "fd83:1::100", "-c", "20", "--source-command",
                                                "ping -c {count} -i 0.02 {destination}",
                                                source=lab.source.address)))
    assert found["packets"]["pif"] == found["packets"]["matched"]
    assert 20 <= found["packets"]["pif"] <= 22           # neighbour discovery is IPv6, too


def test_hosts_by_their_ipv6_addresses(lab: Lab) -> None:
    found = report(lab.netweaver(
        "-n", NAME, "--hv", f"root@[{lab.hv.address6}]:22", "-s", lab.source.address6, "-d", lab.destination, "-k",
        str(lab.key), "-c", "600", "--source-command", FAST, "-o", f"UserKnownHostsFile={lab.directory}/known6"))
    assert found["packets"]["matched"] == 600
    assert found["config"]["hypervisor"] == f"root@[{lab.hv.address6}]"
    names = {line.split()[0] for line in (lab.directory / "known6").read_text().splitlines()}
    assert names == {str(ip_address(host.address6)) for host in (lab.hv, lab.source)}


def test_another_toolstack_by_overriding(lab: Lab) -> None:
    out = run_code(lab, """
class ByMac(netweaver.NetWeaver):
    def determine_vif_number(self):
        return self.run_command("ls /sys/class/net | grep '^vif'").strip()

with ByMac(SOURCE, NAME, DESTINATION, HV, KEY, count=5) as weaver:
    assert weaver.verify_connections() is True
    weaver.generate_and_record("hping3 -c 5 -S -i u1000 " + DESTINATION)
    print(weaver.pull_generated_files())
    print(json.dumps(weaver.analyze()))
""")
    paths, found = out.splitlines()
    assert json.loads(found)["config"]["vif"] == "vif5.0"
    assert json.loads(found)["packets"]["matched"] == 5
    assert "pif.pcap" in paths


def test_text_captures_by_column(lab: Lab) -> None:
    out = run_code(lab, """
with netweaver.NetWeaver(SOURCE, NAME, DESTINATION, HV, KEY) as weaver:
    command = "exec tcpdump --time-stamp-precision=nano -tttt -nnli %s tcp and dst host " + DESTINATION
    weaver.generate_and_record("hping3 -c 500 -S -L 0 -i u1000 " + DESTINATION, command % "eth0", command % "vif5.0")
    weaver.pull_generated_files()
    print(json.dumps(weaver.analyze(seq_no_col=9, timestamp_col=1, seq_no_split_by=",", seq_no_split_index=0)))
    print(json.dumps(weaver.analyze(7, 1, ",", 0)["warnings"]))
""")
    found, wrong = map(json.loads, out.splitlines())
    assert "flows" not in found
    assert found["packets"]["pif"] == found["packets"]["matched"] == 500
    assert found["warnings"] == []
    assert 0 < found["average"] < 1e5
    assert wrong == ["are the sequence numbers really in column seq_no_col?"]
