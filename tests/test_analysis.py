"""Analysis: pairing, counts and statistics."""
from __future__ import annotations

import random
from array import array

import numpy
import pytest

import netweaver


def block(*sightings: tuple[str, int]) -> list[tuple[list[bytes], array[int]]]:
    return [([key.encode() for key, _ in sightings], array("q", [time for _, time in sightings]))]


def paired(pif: list[tuple[str, int]], vif: list[tuple[str, int]]) -> netweaver.Matching:
    return netweaver.match(block(*pif), block(*vif))


def test_loss_does_not_end_the_matching() -> None:
    result = paired([("a", 0), ("b", 10), ("c", 20)], [("c", 25)])
    assert (result.first, result.second, result.matched, result.lost) == (3, 1, 1, 2)
    assert list(result.delays) == [netweaver.LOST, netweaver.LOST, 5]


def test_copies_pair_in_order() -> None:
    result = paired([("a", 0), ("a", 10), ("a", 20), ("b", 30)], [("a", 1), ("b", 31), ("a", 12)])
    assert list(result.delays) == [1, 2, netweaver.LOST, 1]
    assert (result.lost, result.duplicated, result.alike) == (1, 0, {0, 1, 2})


def test_more_copies_on_the_vif_are_duplicates() -> None:
    result = paired([("a", 0), ("a", 10), ("b", 20)], [("a", 1), ("a", 11), ("a", 12), ("b", 21), ("b", 22), ("x", 9)])
    assert (result.matched, result.lost, result.duplicated, result.second_only) == (3, 0, 2, 1)
    assert result.first == result.matched + result.lost
    assert result.second == result.matched + result.duplicated + result.second_only


def test_a_delay_of_zero_and_a_negative_one_are_delays() -> None:
    assert list(paired([("a", 5), ("b", 6)], [("a", 5), ("b", 4)]).delays) == [0, -2]


def test_many_copies_take_linear_time() -> None:
    many = [("same", i) for i in range(50_000)]
    assert paired(many, many).matched == 50_000


def test_reordering() -> None:
    """Ranks and extents as RFC 4737 has them, in its example and some more."""
    assert netweaver.reordering([]) == {}
    assert netweaver.reordering([0, 1, 2, 3]) == {}
    assert netweaver.reordering([1, 0, 3, 2]) == {0: 1, 2: 1}
    assert netweaver.reordering([3, 0, 1, 2, 4]) == {0: 1, 1: 2, 2: 3}
    assert netweaver.reordering([0, 1, 2, 6, 7, 3, 4, 5]) == {3: 2, 4: 3, 5: 4}


def test_variation() -> None:
    lost = netweaver.LOST
    assert netweaver.variation([]) is netweaver.variation([7]) is netweaver.variation([7, lost, 9]) is None
    assert netweaver.variation([7, 5, lost, 100, 103, 103]) == (2 + 3 + 0) / 3
    assert netweaver.variation([-7, 5]) == 12


@pytest.mark.parametrize("seed", range(20))
def test_statistics_agree_with_numpy(seed: int) -> None:
    chance = random.Random(seed)
    delays = [chance.randrange(-2000, 10 ** chance.randrange(4, 12)) for _ in range(chance.choice([1, 2, 3, 10, 1001]))]
    found = netweaver.statistics(delays)
    values = numpy.array(delays) / 1000
    nanosecond = pytest.approx
    assert found["average"] == nanosecond(values.mean(), abs=1e-3)
    assert found["minimum"] == values.min()
    assert found["maximum"] == values.max()
    assert found["stdev"] == nanosecond(values.std(), abs=1e-3)
    assert found["median"] == nanosecond(numpy.median(values), abs=1e-3)
    for percent, value in found["percentiles"].items():
        assert value == nanosecond(numpy.percentile(values, float(percent)), abs=1e-3)


def test_what_passed_before_the_window_is_no_stranger() -> None:
    """Not even if it took longer than any packet that counts."""
    early: set[bytes] = set()
    pif = list(netweaver.since(block(("a", 80), ("b", 90), ("c", 110), ("d", 120)), 100, early))
    vif = list(netweaver.since(block(("a", 95), ("c", 115), ("d", 125), ("b", 190), ("x", 195)), 100))
    result = netweaver.match(pif, vif, early)
    assert early == {b"a", b"b"}
    assert (result.first, result.matched, result.second_only) == (2, 2, 1)
