"""Real libvirt: a domain behind a bridge, what virsh prints of it, and what may happen to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers import ENDLESS, failure, finished, report, sending
from kvm import NAME, KvmLab
from laboratory import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.hypervisor]
VIRSH = ("--toolstack", "virsh")
STEADY = "hping3 -c {count} -S -L 0 -Q -i u4000 {destination}"


@pytest.fixture(scope="module")
def shared_kvm() -> Iterator[KvmLab]:
    with KvmLab() as built:
        yield built


@pytest.fixture
def kvm(shared_kvm: KvmLab) -> Iterator[KvmLab]:
    yield shared_kvm
    shared_kvm.wait_clean()


def test_domain_behind_a_bridge(kvm: KvmLab) -> None:
    """All 300 probes to a domain with a blank in its name are matched, delivered and answered."""
    options = ("-i", "auto", "--direction", "both", "--stages", *VIRSH)
    arguments = kvm.arguments("-c", "300", "--source-command", STEADY, *options)
    document = report(kvm.netweaver(*arguments))
    assert document["config"]["pif"] == "eth0"
    assert document["config"]["vif"] == "vnet0"
    packets = document["packets"]
    assert packets["pif"] == packets["vif"] == packets["matched"] == 300
    guest = document["guest"]
    assert document["outbound"]["packets"]["matched"] == guest["packets"]["answered"] == 300
    assert document["after_vif"] == {"delivered": 300, "dropped": 0, "stuck": 0}
    to_guest = document["stages"]["to_guest"]
    assert to_guest["packets"] == guest["own"]["packets"] == 300
    total = to_guest["average"] + guest["own"]["average"]
    assert total == pytest.approx(guest["average"], abs=0.01)


def test_queue_of_the_vif(kvm: KvmLab) -> None:
    """It is what the host itself shows."""
    arguments = kvm.arguments("-c", "20", "--source-command", STEADY, *VIRSH)
    queue = report(kvm.netweaver(*arguments))["config"]["platform"]["vif"]
    shown = kvm.hv.run("ip", "-d", "link", "show", "vnet0").split()
    assert queue["qdisc"] == shown[shown.index("qdisc") + 1]
    assert queue["queue_length"] == int(shown[shown.index("qlen") + 1])
    assert queue["queues"] == int(shown[shown.index("numtxqueues") + 1])
    counter = "/sys/class/net/vnet0/statistics/tx_dropped"
    assert queue["after"]["tx_dropped"] == int(kvm.hv.run("cat", counter))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-n", "halted"), "the domain 'halted' is shut off"),
        (("-n", "none"), "failed to get domain 'none'"),
        (("-i", "auto", "--num", "1"), "the bridge br1 of vnet"),
        (("--num", "2"), "(--num counts from 0; there are: vnet0, vnet1)"),
    ],
)
def test_failed_search(kvm: KvmLab, arguments: tuple[str, ...], words: str) -> None:
    assert words in failure(kvm.netweaver(*kvm.arguments(*VIRSH, *arguments)), 4)


def test_renamed_domain(kvm: KvmLab) -> None:
    kvm.virsh("domrename", "halted", "another")
    try:
        line = failure(kvm.netweaver(*kvm.arguments(*VIRSH, "-n", "halted")), 4)
        assert "failed to get domain 'halted'" in line
        line = failure(kvm.netweaver(*kvm.arguments(*VIRSH, "-n", "another")), 4)
        assert "'another' is shut off" in line
    finally:
        kvm.virsh("domrename", "another", "halted")


def test_domain_by_its_uuid(kvm: KvmLab) -> None:
    uuid = kvm.virsh("domuuid", "halted").strip().upper()
    line = failure(kvm.netweaver(*kvm.arguments(*VIRSH, "-n", uuid)), 4)
    assert f"'{uuid}' is shut off" in line


def test_domain_that_is_destroyed_during_the_run(kvm: KvmLab) -> None:
    """Also if it starts again at once: its interface is another one then."""
    process = kvm.start(*kvm.arguments("--source-command", ENDLESS, *VIRSH))
    wait_until(lambda: sending(kvm), "the traffic")
    vif = kvm.virsh("domiflist", NAME).split()[0]
    kvm.virsh("destroy", NAME)
    kvm.virsh("start", NAME)
    assert f"the capture on {vif} ended with status" in failure(finished(process), 5)
