"""Statistics of delays, reordering and flows, by what is known of each packet."""

from __future__ import annotations

import dataclasses
import random

import numpy
import pytest
from frames import ethernet, ipv4, udp
from helpers import paired

import netweaver
from netweaver import NO_DELAY


def reordered(arrivals: list[int]) -> dict[int, int]:
    """Return the extents of packets that arrive in this order."""
    sent = [(str(rank), 10 * rank) for rank in range(len(arrivals))]
    seen = [(str(rank), 1000 + position) for position, rank in enumerate(arrivals)]
    return netweaver.reordering(paired(sent, seen))


def test_reordering() -> None:
    """Ranks and extents as in RFC 4737's example, and some more."""
    assert reordered([0, 1, 2, 3]) == {}
    assert reordered([1, 0, 3, 2]) == {0: 1, 2: 1}
    assert reordered([3, 0, 1, 2, 4]) == {0: 1, 1: 2, 2: 3}
    assert reordered([0, 1, 2, 6, 7, 3, 4, 5]) == {3: 2, 4: 3, 5: 4}


@pytest.mark.parametrize("delays", [[], [7], [7, NO_DELAY, 9]])
def test_no_delay_variation_without_neighbours(delays: list[int]) -> None:
    assert netweaver.mean_ipdv(delays) is None


def test_delay_variation() -> None:
    delays = [7000, 5000, NO_DELAY, 100_000, 103_000, 104_000]
    assert netweaver.mean_ipdv(delays) == 2
    assert netweaver.mean_ipdv([-7000, 5000]) == 12


@pytest.mark.parametrize("seed", range(20))
def test_statistics_agree_with_numpy(seed: int) -> None:
    chance = random.Random(seed)
    size = chance.choice([1, 2, 3, 10, 1001])
    delays = [chance.randrange(-2000, 10 ** chance.randrange(4, 12)) for _ in range(size)]
    statistics = netweaver.delay_statistics(delays)
    values = numpy.array(delays) / 1000
    assert statistics.average == pytest.approx(values.mean(), abs=1e-3)
    assert statistics.minimum == values.min()
    assert statistics.maximum == values.max()
    assert statistics.stdev == pytest.approx(values.std(), abs=1e-3)
    assert statistics.median == pytest.approx(numpy.median(values), abs=1e-3)
    assert statistics.negative == (values < 0).sum()
    assert statistics.zero == (values == 0).sum()
    for percent, value in statistics.percentiles.items():
        assert value == pytest.approx(numpy.percentile(values, float(percent)), abs=1e-3)


def fragments(number: int) -> list[tuple[bytes, int]]:
    """Return the identities of a datagram's fragments, and the time at which it was sent."""
    whole = udp(4000, 53, payload=bytes(40))
    frames = [
        ethernet(ipv4(whole[:24], 17, number, fragment=0x2000)),
        ethernet(ipv4(whole[24:], 17, number, fragment=3)),
    ]
    return [(netweaver.identify(frame, 1)[-1], number) for frame in frames]


@pytest.mark.parametrize("missing", [0, 1])
def test_fragments_are_no_flow_of_their_own(missing: int) -> None:
    """Nor are those of a datagram of which the captures lack the beginning."""
    sent = [*fragments(1), *fragments(2)][missing:]
    found = netweaver.Sightings(netweaver.IN)
    for point in ("pif", "vif"):
        found.add(point, [identity for identity, _ in sent], [time for _, time in sent])
    by_flow = netweaver.delays_by_flow(netweaver.match(found))
    assert by_flow.flows == 1
    assert by_flow.whole.total() == len(sent)


def test_a_fragment_belongs_to_the_last_datagram_with_its_ip_id() -> None:
    whole = netweaver.identify(ethernet(ipv4(udp(2001, 53), 17, 1)), 1)[-1]
    first, later = [identity for identity, _ in fragments(1)]
    other_first = netweaver.identify(
        ethernet(ipv4(udp(4001, 53, payload=bytes(16)), 17, 1, fragment=0x2000)), 1
    )[-1]
    for sent, delays in (
        ([first, later, whole], [10, 12]),
        ([whole, first, later], [10, 11]),
        ([whole, other_first, later, first], [10, 11, 13]),
    ):
        seen = netweaver.Sightings(netweaver.IN)
        seen.add("pif", sent, [100 * rank for rank in range(len(sent))])
        seen.add("vif", sent, [100 * rank + 10 + rank for rank in range(len(sent))])
        by_flow = netweaver.delays_by_flow(netweaver.match(seen))
        assert sorted(by_flow.first) == delays


def test_each_statistic_is_a_figure() -> None:
    """Limits, README's table and Prometheus have it then."""
    paths = {figure.path[0] for figure in netweaver.FIGURES}
    assert {row.name for row in dataclasses.fields(netweaver.DelayStatistics)} <= paths
