"""Analysis: pairing, classes, statistics and comparison, by what is known of each packet."""
from __future__ import annotations

import random
from collections.abc import Sequence

import numpy
import pytest
from helpers import noisy, paired

import netweaver

NONE = netweaver.NO_DELAY
SECOND = 10**9


# -- pairing --

def test_loss_does_not_end_the_matching() -> None:
    result = paired([("a", 0), ("b", 10), ("c", 20)], [("c", 25)])
    assert (result.first, result.second, result.matched, result.lost) == (3, 1, 1, 2)
    assert list(result.delays) == [NONE, NONE, 5]


def test_copies_pair_in_order_if_none_is_missing() -> None:
    result = paired([("a", 0), ("a", 10), ("b", 30)], [("a", 1), ("b", 31), ("a", 12)])
    assert list(result.delays) == [1, 2, 1]
    assert (result.matched, result.ambiguous, result.lost) == (3, 0, 0)


def test_copies_of_which_some_are_missing_are_counted_and_have_no_delay() -> None:
    result = paired([("a", 0), ("a", 10), ("a", 20), ("b", 30)], [("a", 1), ("b", 31), ("a", 12)])
    assert list(result.delays) == [NONE, NONE, NONE, 1]
    assert (result.matched, result.ambiguous, result.lost, result.duplicated) == (3, 2, 1, 0)
    assert list(result.arrivals()) == [3]


def test_copies_that_are_all_lost_are_lost() -> None:
    result = paired([("a", 0), ("a", 10), ("b", 30)], [("b", 31)])
    assert (result.matched, result.ambiguous, result.lost) == (1, 0, 2)


def test_more_copies_on_the_vif_are_duplicates() -> None:
    result = paired([("a", 0), ("a", 10), ("b", 20)], [("a", 1), ("a", 11), ("a", 12), ("b", 21), ("b", 22), ("x", 9)])
    assert (result.matched, result.ambiguous, result.lost, result.duplicated, result.second_only) == (3, 2, 0, 2, 1)
    assert result.samples() == [1]
    assert result.first == result.matched + result.lost
    assert result.second == result.matched + result.duplicated + result.second_only


def test_a_delay_of_zero_and_a_negative_one_are_delays() -> None:
    assert list(paired([("a", 5), ("b", 6)], [("a", 5), ("b", 4)]).delays) == [0, -2]


def test_many_copies_take_linear_time() -> None:
    many = [("same", i) for i in range(50_000)]
    assert paired(many, many).matched == 50_000


# -- what counts, by the window --

def test_what_passed_before_the_window_is_in_no_count() -> None:
    """Nor are its arrivals, even if it took longer than any packet that counts."""
    result = paired([("a", 80), ("b", 90), ("c", 110), ("d", 120)],
                    [("a", 95), ("c", 115), ("d", 125), ("b", 190), ("x", 195)], netweaver.Window(100, 500, 500))
    assert (result.first, result.matched, result.lost, result.second_only) == (2, 2, 0, 1)


def test_only_what_was_watched_too_short_is_undecided() -> None:
    """Until the longest delay has passed; after the traffic's end such a packet is not even that."""
    pif = [("a", 0), ("lost", 100), ("slow", 200), ("late", 800), ("after", 950), ("matched", 960)]
    vif = [("a", 300), ("slow", 500), ("matched", 970)]
    result = paired(pif, vif, netweaver.Window(0, 900, 1000))
    assert (result.first, result.matched, result.lost, result.undecided) == (5, 3, 1, 1)
    assert result.samples() == [300, 300, 10]


@pytest.mark.parametrize(("wait", "undecided"), [(0, 1), (3 * SECOND, 2)])
def test_one_absurd_delay_decides_nothing(wait: int, undecided: int) -> None:
    """A packet need not be watched for longer than a second, or what the user wanted."""
    pif = [("stray", 0), ("lost", SECOND), ("x", 5 * SECOND), ("y", 9 * SECOND)]
    result = paired(pif, [("stray", 4 * SECOND), ("x", 5 * SECOND + 1)],
                    netweaver.Window(0, 10 * SECOND, 9 * SECOND + 1, wait))
    assert (result.matched, result.undecided, result.lost) == (2, 1, 1)
    result = paired([*pif, ("z", 7 * SECOND)], [("stray", 4 * SECOND), ("x", 5 * SECOND + 1)],
                    netweaver.Window(0, 10 * SECOND, 9 * SECOND + 1, wait))
    assert result.undecided == undecided


ALIKE = [("same", 1000 * i) for i in range(20)]


@pytest.mark.parametrize("delay", [100, 900, 1500, 2500])
@pytest.mark.parametrize("pif_begins", [0, 3500, 6000])
@pytest.mark.parametrize("vif_begins", [0, 3600, 6100])
def test_copies_at_the_edge_of_the_window(delay: int, pif_begins: int, vif_begins: int) -> None:
    """One capture begins before the other: what it saw alone shifts no later packet."""
    pif = [(key, when) for key, when in ALIKE if when >= pif_begins]
    vif = [(key, when + delay) for key, when in ALIKE if when + delay >= vif_begins]
    result = paired(pif, vif, netweaver.Window(10_000, 19_000, 100_000))
    assert (result.first, result.matched, result.lost, result.duplicated) == (10, 10, 0, 0)
    assert set(result.samples()) <= {delay}
    assert len(result.samples()) == 10 or pif_begins == 6000
    missing = vif[:-4] + vif[-3:]
    result = paired(pif, missing, netweaver.Window(10_000, 19_000, 100_000))
    assert result.samples() == []
    assert result.matched + result.lost == 10


def test_copies_that_go_on_when_nobody_watches_any_more() -> None:
    """As many are missing at the end as came early at the start: by their number alone they would be shifted."""
    vif = [(key, when + 2500) for key, when in ALIKE][:-2]
    result = paired(ALIKE, vif, netweaver.Window(9900, 15_000, 17_000))
    assert result.samples() == []
    assert result.matched == result.ambiguous > 0


# -- figures --

def test_reordering() -> None:
    """Ranks and extents as RFC 4737 has them, in its example and some more."""
    def reordered(arrivals: list[int]) -> dict[int, int]:
        sent = [(str(rank), 10 * rank) for rank in range(len(arrivals))]
        return netweaver.reordering(paired(sent, [(str(rank), 1000 + place) for place, rank in enumerate(arrivals)]))

    assert reordered([0, 1, 2, 3]) == {}
    assert reordered([1, 0, 3, 2]) == {0: 1, 2: 1}
    assert reordered([3, 0, 1, 2, 4]) == {0: 1, 1: 2, 2: 3}
    assert reordered([0, 1, 2, 6, 7, 3, 4, 5]) == {3: 2, 4: 3, 5: 4}


def test_variation() -> None:
    assert netweaver.variation([]) is netweaver.variation([7]) is netweaver.variation([7, NONE, 9]) is None
    assert netweaver.variation([7, 5, NONE, 100, 103, 103]) == (2 + 3 + 0) / 3
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
    assert (found["negative"], found["zero"]) == ((values < 0).sum(), (values == 0).sum())
    for percent, value in found["percentiles"].items():
        assert value == nanosecond(numpy.percentile(values, float(percent)), abs=1e-3)


# -- comparing --

def measured(delays: list[int | None]) -> list[Sequence[int]]:
    """One run."""
    sent = [(str(rank), rank * 10**6) for rank in range(len(delays))]
    return [paired(sent, [(key, when + delay) for (key, when), delay in zip(sent, delays)
                          if delay is not None]).outcomes()]


@pytest.mark.parametrize("size", [15, 20, 50, 300, 1000])
def test_equal_runs_are_not_distinguished(size: int) -> None:
    """In at most 5 of 100 tries, of any size."""
    runs = [measured(noisy(size, seed, loss=0.01)) for seed in range(200)]
    verdicts = [netweaver.compare(runs[i], runs[100 + i])["distinguishable"] for i in range(100)]
    assert verdicts.count(True) <= 5
    assert (None in verdicts) == (size < 50)


@pytest.mark.parametrize("packets", [15, 20, 49])
def test_no_verdict_without_blocks(packets: int) -> None:
    found = netweaver.compare(measured([100_000] * packets), measured([900_000] * packets))
    assert found["distinguishable"] is None
    assert found["median"]["interval"] is None
    assert found["median"]["shift"] == 800


def test_a_shift_by_a_fifth_is_found() -> None:
    shifted = [netweaver.compare(measured(noisy(1000, seed, loss=0.01)), measured(noisy(1000, 200 + seed, 1.2, 0.01)))
               for seed in range(20)]
    assert sum(one["median"]["distinguishable"] for one in shifted) >= 19
    for one in shifted:
        low, high = one["median"]["interval"]
        assert low < one["median"]["shift"] < high
        assert one["median"]["shift"] == pytest.approx(one["median"]["current"] - one["median"]["baseline"],
                                                        abs=0.002)
    covering = [one["median"]["interval"][0] <= 43.4 <= one["median"]["interval"][1] for one in shifted]
    assert sum(covering) >= 18                       # the true shift is a fifth of about 217 µs


def test_runs_whose_stamps_are_coarse_are_equal() -> None:
    """All delays of a run are the same microsecond, and of the next one the next."""
    assert netweaver.compare(measured([2000] * 1000), measured([3000] * 1000))["distinguishable"] is False


def test_a_comparison_sees_loss_and_a_longer_tail() -> None:
    base = measured(noisy(5000, 1))
    lossy = netweaver.compare(base, measured(noisy(5000, 2, loss=0.03)))
    assert lossy["loss_ratio"]["distinguishable"] is True
    assert lossy["median"]["distinguishable"] is False
    tail = [delay and delay * (3 if rank % 40 == 0 else 1) for rank, delay in enumerate(noisy(5000, 3))]
    longer = netweaver.compare(base, measured(tail))
    assert longer["p99"]["distinguishable"] is True
    assert longer["median"]["distinguishable"] is False
    assert netweaver.compare(base, measured(tail)) == longer
