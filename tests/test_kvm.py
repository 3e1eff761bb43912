"""Real libvirt: a domain behind a bridge, what virsh says of it, and what may happen to it."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers import ENDLESS, failure, finished, report, sending
from kvm import NAME, KvmLab
from lab import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.hypervisor]
VIRSH = ("--toolstack", "virsh")


@pytest.fixture(scope="module")
def shared_kvm() -> Iterator[KvmLab]:
    with KvmLab() as built:
        yield built


@pytest.fixture
def kvm(shared_kvm: KvmLab) -> Iterator[KvmLab]:
    yield shared_kvm
    shared_kvm.wait_clean()


def test_a_domain_behind_a_bridge(kvm: KvmLab) -> None:
    """Its name has a blank; the source and the guest count what netweaver counts."""
    found = report(kvm.netweaver(*kvm.arguments(
        "-c", "300", "--source-command", "hping3 -c {count} -S -L 0 -Q -i u4000 {destination}", "-i", "auto",
        "--direction", "both", "--stages", *VIRSH)))
    assert (found["config"]["pif"], found["config"]["vif"]) == ("eth0", "vnet0")
    assert found["packets"]["pif"] == found["packets"]["vif"] == found["packets"]["matched"] == 300
    assert found["outbound"]["packets"]["matched"] == found["guest"]["packets"]["answered"] == 300
    assert found["after_vif"] == {"delivered": 300, "dropped": 0, "stuck": 0}
    assert found["stages"]["to_guest"]["packets"] == found["guest"]["own"]["packets"] == 300
    assert found["stages"]["to_guest"]["average"] + found["guest"]["own"]["average"] == pytest.approx(
        found["guest"]["average"], abs=0.01)


@pytest.mark.parametrize(("arguments", "words"), [
    (("-n", "halted"), "the domain 'halted' is shut off: start it first (virsh start)"),
    (("-n", "none"), "error: failed to get domain 'none'"),
    (("-i", "auto", "--num", "1"), "its bridge br1 has no physical interface"),
    (("--num", "2"), "has 2 interfaces, and none of number 2 (--num counts from 0; there are: vnet0, vnet1)"),
])
def test_a_look_up_that_fails(kvm: KvmLab, arguments: tuple[str, ...], words: str) -> None:
    assert words in failure(kvm.netweaver(*kvm.arguments(*VIRSH, *arguments)), 4)


def test_a_domain_that_was_renamed(kvm: KvmLab) -> None:
    kvm.virsh("domrename", "halted", "another")
    assert "failed to get domain 'halted'" in failure(kvm.netweaver(*kvm.arguments(*VIRSH, "-n", "halted")), 4)
    assert "'another' is shut off" in failure(kvm.netweaver(*kvm.arguments(*VIRSH, "-n", "another")), 4)
    kvm.virsh("domrename", "another", "halted")


def test_a_domain_that_is_destroyed_meanwhile(kvm: KvmLab) -> None:
    """Also if it starts again at once: its interface is another one then."""
    process = kvm.start(*kvm.arguments("--source-command", ENDLESS, *VIRSH))
    wait_until(lambda: sending(kvm), "the traffic")
    vif, *_ = kvm.virsh("domiflist", NAME).split()
    kvm.virsh("destroy", NAME)
    kvm.virsh("start", NAME)
    assert f"the capture on {vif} ended with status" in failure(finished(process), 5)
