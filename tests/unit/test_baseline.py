"""Comparison with a baseline that is given as captures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from frames import pcap, write
from helpers import (
    analyzed,
    answers,
    captures,
    distinct,
    failure,
    noisy,
    offline,
    pair,
    save_runs,
    through,
)


def test_two_runs_are_compared_without_a_verdict(tmp_path: Path) -> None:
    """The path, which may be long, is wrapped behind all else."""
    before = pair(tmp_path, noisy(1000, 1), "before-")
    after = pair(tmp_path, noisy(1000, 2, 1.5), "after-")
    baseline = ",".join(before)
    comparison = analyzed("--pcaps", *after, "--baseline", baseline)["comparison"]
    assert comparison["path"] == baseline
    for side, paths in (("baseline", before), ("current", after)):
        alone = analyzed("--pcaps", *paths)
        assert comparison["median"][side] == alone["median"]
        assert comparison["p99"][side] == alone["percentiles"]["99"]
        assert comparison["loss_ratio"][side] == alone["loss_ratio"]
    assert comparison["distinguishable"] is None
    shown = offline("--pcaps", *after, "--baseline", baseline, "--format", "text").stdout
    assert "too few runs for a verdict" in shown
    assert re.search(r"\n median \+\d+ µs, p99 .*points \(1 run before, 1 now\)\n", shown)


def test_a_verdict_on_too_few_runs_is_refused(tmp_path: Path) -> None:
    """The advice never names --runs where it can't be used, or is not what is missing."""
    paths = pair(tmp_path, noisy(100, 1))
    save_runs(tmp_path / "three", "web1", runs=3)
    saved = str(tmp_path / "three")
    measuring = ("-n", "web1", "--hv", "192.0.2.9", "-s", "192.0.2.1", "-d", "192.0.2.2")
    series = ("--format", "prometheus", "--output", str(tmp_path / "web1.prom"))
    for arguments, baseline, advice in (
        (("--pcaps", *paths), ",".join(paths), "Give a baseline of 3 saved runs"),
        (("--pcaps", *paths), saved, "Give more saved runs"),
        (measuring, saved, "Use --runs 3"),
        ((*measuring, *series), saved, "Use --runs 3 and another --format"),
        ((*measuring, "--runs", "3"), ",".join(paths), "Give a baseline of 3 saved runs"),
    ):
        done = offline(*arguments, "--baseline", baseline, "--fail-if", "slower")
        line = failure(done, 2)
        assert "3 runs on each side" in line
        assert line.strip().endswith(advice)


@pytest.mark.parametrize(
    ("baseline", "code", "words"),
    [
        ("{0}", 2, "not a saved run"),
        ("nothing", 2, "give a directory made by --save, or two captures"),
        ("{0}/none.pcap,{0}/vif.pcap", 5, "none.pcap: can't read it"),
        ("{0}/pif.pcap,{0}/empty.pcap", 2, "no packet has a delay"),
    ],
)
def test_baselines_that_are_none(tmp_path: Path, baseline: str, code: int, words: str) -> None:
    paths = pair(tmp_path, noisy(100, 1))
    write(tmp_path / "empty.pcap", pcap([]))
    done = offline("--pcaps", *paths, "--baseline", baseline.format(tmp_path))
    assert done.returncode == code
    assert words in done.stderr


def test_many_runs_are_a_line_and_a_period(tmp_path: Path) -> None:
    first = "2026-01-01T00:00:00.000000000Z"
    last = "2026-01-03T00:00:00.000000000Z"
    save_runs(tmp_path / "old", "web1", runs=3, started=first)
    save_runs(tmp_path / "old", "web1-later", runs=2, started=last)
    save_runs(tmp_path / "now", "web1", runs=1)
    arguments = ("--pcaps", str(tmp_path / "now"), "--baseline", str(tmp_path / "old"))
    taken = analyzed(*arguments)["comparison"]["taken"]
    assert taken == {"runs": 5, "first": first, "last": last}
    shown = offline(*arguments, "-v").stderr.splitlines()
    assert "Baseline: 5 of 5 runs in" in shown[0]
    assert "from 2026-01-01 00:00 UTC to 2026-01-03 00:00 UTC" in shown[0]
    assert len(shown) == 6
    assert sum(line.endswith("web1-later") for line in shown) == 2


def with_answers(directory: Path, name: str) -> list[str]:
    """Return captures of SYNs that take 5 µs, and of their answers, which take 0.5 µs."""
    syns = distinct(200)
    answered = answers(200, later=100_000)
    arrived = through(syns, [5000] * 200)
    pif = sorted([*syns, *through(answered, [500] * 200)])
    return captures(directory, pif, sorted([*arrived, *answered]), name)


@pytest.mark.parametrize("selection", [("-d", "10.0.0.1"), ("-s", "10.0.0.2")])
def test_captures_are_compared_by_the_same_packets(
    tmp_path: Path, selection: tuple[str, str]
) -> None:
    paths = with_answers(tmp_path, "")
    arguments = ("--pcaps", *paths, *selection, "--baseline", ",".join(paths))
    assert analyzed(*arguments)["comparison"]["median"] == {
        "baseline": 5,
        "current": 5,
        "shift": 0,
        "interval": None,
        "run_to_run": None,
        "distinguishable": None,
    }


def test_captures_of_translated_packets_are_compared(tmp_path: Path) -> None:
    sent = distinct(100, destination="192.0.2.1")
    arrived = [(time + 5000, content) for time, content in distinct(100)]
    paths = captures(tmp_path, sent, arrived)
    arguments = ("--pcaps", *paths, "--match-nat", "--baseline", ",".join(paths))
    assert analyzed(*arguments)["comparison"]["median"]["shift"] == 0


def test_a_baseline_whose_captures_are_swapped(tmp_path: Path) -> None:
    paths = pair(tmp_path, [5000] * 100)
    done = offline("--pcaps", *paths, "--baseline", ",".join(reversed(paths)))
    assert "every delay is negative" in failure(done, 2)
