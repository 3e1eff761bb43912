"""The platform: the kernel, tcpdump, the switch and the queue of a VM's interface."""

from __future__ import annotations

import pytest
from links import link, nic, with_counters

import netweaver
from netweaver import RouteKind

DENIED = "You don't have permission to capture on that device"
ABSENT = "eth0: No such device exists"
VIF = with_counters(nic("vif5.0"), rx_dropped=3, tx_dropped=7)
ANSWER = f"""= kernel
4.19.0+1
= free
Filesystem     1024-blocks    Used Available Capacity Mounted on
/dev/sda1         18000000 9000000   8000000      53% /
= link
{VIF}{with_counters(link("eth0", other="if3"))}
= ovs
ovs-vsctl (Open vSwitch) 2.5.3
= backend
openvswitch
= offloads eth0
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


def test_platform() -> None:
    facts = netweaver.Facts(ANSWER)
    assert facts.platform("vif5.0") == {
        "kernel": "4.19.0+1",
        "tcpdump": "4.9.2",
        "switch": "Open vSwitch 2.5.3",
        "vif": {
            "qdisc": "fq_codel",
            "queue_length": 1000,
            "queues": 4,
            "before": {"rx_dropped": 3, "tx_dropped": 7},
        },
    }


def test_facts() -> None:
    facts = netweaver.Facts(ANSWER)
    assert facts.has_tcpdump
    assert facts.free_bytes == 8_000_000 * 1024
    assert sorted(facts.links) == ["eth0", "vif5.0"]
    assert facts.offloads("eth0") == ["generic-receive-offload"]


def test_a_host_that_answers_nothing() -> None:
    facts = netweaver.Facts("")
    assert facts.platform("vif5.0") == {}
    assert facts.free_bytes is None
    assert facts.offloads("eth0") == []


def test_tcpdump_is_missing() -> None:
    facts = netweaver.Facts("= tcpdump\nsh: tcpdump: not found\n= status\n127\n")
    assert not facts.has_tcpdump


def test_counters_of_an_old_ip() -> None:
    """Before iproute2 5.0 there is another heading, and no number of queues."""
    line = (
        "3: vif1.0: <UP> mtu 1500 qdisc pfifo_fast master xenbr0 state UP mode DEFAULT qlen 32"
        "\\    link/ether fe:ff:ff:ff:ff:ff brd ff:ff:ff:ff:ff:ff promiscuity 1 "
        "\\    RX: bytes  packets  errors  dropped overrun mcast   "
        "\\    648        8        0       0       0       0       "
        "\\    TX: bytes  packets  errors  dropped carrier collsns "
        "\\    1224       21       0       5       0       0       "
    )
    link = netweaver.parse_link(line)
    assert link
    assert link.queue_length == 32
    assert link.queues is None
    assert netweaver.drop_counters(link) == {"rx_dropped": 0, "tx_dropped": 5}


@pytest.mark.parametrize(
    ("why", "sudo", "route", "words"),
    [
        (DENIED, False, RouteKind.GIVEN, "--sudo"),
        (DENIED, True, RouteKind.GIVEN, ""),
        (ABSENT, False, RouteKind.GIVEN, "-i auto"),
        (ABSENT, False, RouteKind.ASSUMED, "interface with -i"),
    ],
)
def test_no_hint_recommends_what_is_in_use(
    why: str, sudo: bool, route: RouteKind, words: str
) -> None:
    capture = netweaver.CaptureCommand("pif", "eth0", "tcpdump -i eth0")
    hint = netweaver.capture_hint(netweaver.Facts(""), capture, why, sudo, route)
    assert words in hint
    assert bool(words) == bool(hint)
    assert "-i auto" not in hint or "-i auto" in words
