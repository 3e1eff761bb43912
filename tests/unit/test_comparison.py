"""Comparison of two sets of runs."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy
import pytest
from helpers import noisy, paired

import netweaver

Run = dict[str, float]


def run(delays: Sequence[int | None]) -> Run:
    """Return the compared figures of a run with these delays (None: lost)."""
    pif = [(str(rank), rank * 10**6) for rank in range(len(delays))]
    vif = [(key, time + delay) for (key, time), delay in zip(pif, delays) if delay is not None]
    return netweaver.run_figures(paired(pif, vif))


def varied(count: int, seed: int, factor: float = 1.0, loss: float = 0.0) -> list[Run]:
    """Return runs whose medians vary by 2 %."""
    chance = random.Random(seed)
    return [
        run(noisy(200, chance.randrange(10**9), factor * chance.gauss(1, 0.02), loss))
        for _ in range(count)
    ]


def figures(*medians: float) -> list[Run]:
    return [{"median": median, "p99": 2 * median, "loss_ratio": 0.0} for median in medians]


@pytest.mark.parametrize("count", [3, 5])
def test_equal_sets_are_not_distinguished(count: int) -> None:
    verdicts = [
        netweaver.compare_runs(varied(count, seed), varied(count, 1000 + seed))["distinguishable"]
        for seed in range(30)
    ]
    assert verdicts.count(True) <= 1
    assert None not in verdicts


@pytest.mark.parametrize("counts", [(1, 1), (2, 3), (5, 2)])
def test_fewer_than_three_runs_get_no_verdict(counts: tuple[int, int]) -> None:
    comparison = netweaver.compare_runs(varied(counts[0], 1), varied(counts[1], 2, 5.0))
    assert comparison["distinguishable"] is None
    assert comparison["runs"] == list(counts)
    assert comparison["median"]["interval"] is None
    assert comparison["median"]["distinguishable"] is None
    assert comparison["median"]["shift"] > 500


def test_a_shift_by_a_fifth_is_distinguished() -> None:
    shifted = [
        netweaver.compare_runs(varied(5, seed), varied(5, 1000 + seed, 1.2))["median"]
        for seed in range(20)
    ]
    assert sum(shift["distinguishable"] for shift in shifted) >= 19
    covering = 0
    for shift in shifted:
        low, high = shift["interval"]
        assert low < shift["shift"] < high
        difference = shift["current"] - shift["baseline"]
        assert shift["shift"] == pytest.approx(difference, abs=0.002)
        covering += low <= 43.4 <= high  # a fifth of about 217 µs
    assert covering >= 18


def test_loss_and_a_longer_tail_are_distinguished() -> None:
    before = varied(5, 1)
    lossy = netweaver.compare_runs(before, varied(5, 2, loss=0.2))
    assert lossy["loss_ratio"]["distinguishable"] is True
    assert lossy["median"]["distinguishable"] is False
    tail = [{**each, "p99": each["p99"] * 3} for each in varied(5, 3)]
    longer = netweaver.compare_runs(before, tail)
    assert longer["p99"]["distinguishable"] is True
    assert longer["median"]["distinguishable"] is False


def test_an_interval_without_width_decides_nothing() -> None:
    same = netweaver.compare_runs(figures(2, 2, 2), figures(3, 3, 3))
    assert same["median"]["interval"] == [1, 1]
    assert same["median"]["distinguishable"] is None
    assert same["distinguishable"] is None
    assert same["loss_ratio"]["distinguishable"] is False


def test_equal_runs_without_a_shift_are_not_distinguished() -> None:
    same = netweaver.compare_runs(figures(2, 2, 2), figures(2, 2, 2))
    assert same["distinguishable"] is False


def test_the_interval_is_welchs() -> None:
    """Against a formula of its own, for samples whose quantile is in the table."""
    before = [10.0, 12.0, 11.0, 13.0, 9.0, 12.5]
    after = [20.0, 22.5, 21.0, 19.0, 20.5, 23.0]
    shift = netweaver.compare_runs(figures(*before), figures(*after))["median"]
    errors = [numpy.var(side, ddof=1) / 6 for side in (before, after)]
    freedom = sum(errors) ** 2 / sum(error**2 / 5 for error in errors)
    assert 9 <= freedom < 10
    margin = 3.954 * numpy.sqrt(sum(errors))
    difference = numpy.mean(after) - numpy.mean(before)
    assert shift["interval"] == pytest.approx([difference - margin, difference + margin], abs=2e-3)


@pytest.mark.parametrize("freedom", netweaver.STUDENT_T)
def test_the_error_is_divided_among_the_compared_figures(freedom: int) -> None:
    """The table's values leave that part of the error outside, by the integral of Student's t."""
    step = netweaver.STUDENT_T[freedom] / 10_000
    factor = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
    height = factor / math.sqrt(math.pi * freedom)
    densities = []
    for index in range(10_000):
        middle = (index + 0.5) * step
        densities.append(height * (1 + middle**2 / freedom) ** (-(freedom + 1) / 2))
    inside = 2 * step * sum(densities)
    error = (1 - netweaver.CONFIDENCE) / len(netweaver.COMPARED)
    assert 1 - inside == pytest.approx(error, rel=0.01)


def test_each_compared_figure_has_a_limit() -> None:
    parts = [netweaver.CHANGE_LIMITS[name].figures for name in ("slower", "lossier")]
    assert {name for part in parts for name in part} == set(netweaver.COMPARED)
