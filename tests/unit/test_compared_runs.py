"""Runs compared with a baseline, from the command line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers import analyzed, failure, noisy, offline, pair, save_runs

import netweaver


def lines_of(done: subprocess.CompletedProcess[str], code: int = 0) -> list[dict[str, Any]]:
    """Return the documents of several runs."""
    assert done.returncode == code, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_unit_of_comparison_is_the_run(tmp_path: Path) -> None:
    save_runs(tmp_path / "a", "web1-syn-100")
    save_runs(tmp_path / "b", "web1-syn-100", 1.1, seed=1)
    save_runs(tmp_path / "c", "web1-syn-100", seed=2)
    slow = lines_of(
        offline(
            "--pcaps", str(tmp_path / "b"), "--baseline", str(tmp_path / "a"), "--fail-if", "slower"
        ),
        7,
    )
    assert [("comparison" in one) for one in slow] == [False] * 4 + [True]
    comparison = slow[-1]["comparison"]
    assert (comparison["runs"], comparison["left_out"]) == ([5, 5], 0)
    assert comparison["distinguishable"] is True
    assert (
        0.5 < comparison["median"]["run_to_run"] < 5
    )  # of levels that differ by half a percent of 217 µs
    medians = [one["median"] for one in slow]
    assert comparison["median"]["current"] == pytest.approx(sum(medians) / 5, abs=0.001)
    done = offline(
        "--pcaps",
        str(tmp_path / "c"),
        "--baseline",
        str(tmp_path / "a"),
        "--fail-if",
        "changed",
        "--fail-if",
        "slower",
        "--fail-if",
        "lossier",
    )
    assert lines_of(done)[-1]["comparison"]["distinguishable"] is False


def test_runs_of_something_else_are_left_out(tmp_path: Path) -> None:
    save_runs(tmp_path / "all", "web1-syn-100", runs=3)
    save_runs(tmp_path / "all", "web2-syn-100", runs=2, name_label="web2")
    save_runs(tmp_path / "all", "web1-udp-100", runs=1, traffic={"pattern": "udp"})
    save_runs(tmp_path / "now", "web1-syn-100", runs=3, seed=1)
    [*_, last] = lines_of(
        offline("--pcaps", str(tmp_path / "now"), "--baseline", str(tmp_path / "all"))
    )
    comparison = last["comparison"]
    assert comparison["taken"] == {"runs": 3}
    assert (comparison["left_out"], comparison["runs"]) == (3, [3, 3])
    now = ("--pcaps", str(tmp_path / "now"))
    shown = offline(*now, "--baseline", str(tmp_path / "all"), "-v")
    assert shown.stderr.startswith("Baseline: 3 of 6 runs in ")
    save_runs(tmp_path / "none", "web3-syn-100", runs=2, name_label="web3")
    line = failure(
        offline("--pcaps", str(tmp_path / "now"), "--baseline", str(tmp_path / "none")), 2
    )
    assert "none of its 2 runs has this VM, direction and traffic" in line


def test_lossier(tmp_path: Path) -> None:
    save_runs(tmp_path / "good", "web1")
    save_runs(tmp_path / "bad", "web1", loss=0.2)
    good = str(tmp_path / "good")
    bad = str(tmp_path / "bad")
    for now, before, breached in (
        (bad, good, ("lossier", "changed")),
        (good, bad, ("changed",)),
    ):
        for name in ("lossier", "changed", "slower"):
            done = offline("--pcaps", now, "--baseline", before, "--fail-if", name)
            assert done.returncode == (7 if name in breached else 0), name


def numbers_in(value: Any, name: str = "") -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [found for key, more in value.items() for found in numbers_in(more, key)]
    if isinstance(value, list):
        return [found for more in value for found in numbers_in(more, name)]
    return [(name, value)] if isinstance(value, float) else []


def test_numbers_have_three_decimals(tmp_path: Path) -> None:
    """Those of a delay: nothing knows more than nanoseconds."""
    document = analyzed(
        "--pcaps",
        *pair(tmp_path, noisy(997, 1)),
        "--baseline",
        ",".join(pair(tmp_path, noisy(991, 2), "b-")),
    )
    numbers = [
        (name, value) for name, value in numbers_in(document) if name not in ("loss_ratio", "ratio")
    ]
    assert len(numbers) > 20
    assert [(name, value) for name, value in numbers if round(value, 3) != value] == []


def damage(directory: Path) -> None:
    capture = directory / "vif.pcap"
    capture.write_bytes(b"XXXX" + capture.read_bytes()[4:])


@pytest.mark.parametrize("damaged", [0, 2, 3])
def test_a_damaged_run_among_compared_ones(tmp_path: Path, damaged: int) -> None:
    """The others are compared, also if the one that would have told of it is left out."""
    save_runs(tmp_path / "before", "web1", runs=4)
    save_runs(tmp_path / "now", "web1", 10.0, runs=4, seed=1)
    damage(sorted((tmp_path / "now").iterdir())[damaged])
    arguments = ("--pcaps", str(tmp_path / "now"), "--baseline", str(tmp_path / "before"))
    done = offline(*arguments, "--fail-if", "slower")
    documents = lines_of(done, 7)
    assert [("comparison" in document) for document in documents] == [False, False, True]
    assert documents[-1]["comparison"]["runs"] == [4, 3]
    assert done.stderr.count("left out") == 1


def test_too_few_intact_runs_decide_nothing(tmp_path: Path) -> None:
    save_runs(tmp_path / "before", "web1", runs=3)
    save_runs(tmp_path / "now", "web1", runs=3, seed=1)
    damage(min((tmp_path / "now").iterdir()))
    arguments = ("--pcaps", str(tmp_path / "now"), "--baseline", str(tmp_path / "before"))
    done = offline(*arguments, "--fail-if", "slower")
    assert lines_of(done, 7)[-1]["comparison"]["distinguishable"] is None
    assert "can't be decided" in done.stderr


def test_a_damaged_run_among_those_of_two_kinds(tmp_path: Path) -> None:
    for side, seed in (("before", 0), ("now", 1)):
        save_runs(tmp_path / side, "a", runs=4, seed=seed)
        flow = netweaver.Traffic("flow", 100).to_json()
        save_runs(tmp_path / side, "b", 10.0, runs=4, seed=seed, traffic=flow)
    damage(min((tmp_path / "now").iterdir()))
    arguments = ("--pcaps", str(tmp_path / "now"), "--baseline", str(tmp_path / "before"))
    *_, syn, flow = lines_of(offline(*arguments, "--fail-if", "changed"))
    for document, runs in ((syn, [4, 3]), (flow, [4, 4])):
        assert document["comparison"]["runs"] == runs
        assert document["comparison"]["median"]["current"] == pytest.approx(
            document["median"], rel=0.1
        )


def save_runs_of_two_directions(directory: Path, seed: int = 0) -> None:
    """Save three runs of each; those on the way out are ten times as slow."""
    save_runs(directory, "in", runs=3, seed=seed)
    save_runs(directory, "out", 10.0, runs=3, seed=seed, direction="out")
    for run in directory.glob("*-out"):
        (run / "vif.pcap").rename(run / "first.pcap")
        (run / "pif.pcap").rename(run / "vif.pcap")
        (run / "first.pcap").rename(run / "pif.pcap")


def test_runs_of_two_directions(tmp_path: Path) -> None:
    for side, seed in (("before", 0), ("now", 1)):
        save_runs_of_two_directions(tmp_path / side, seed)
    arguments = ("--pcaps", str(tmp_path / "now"), "--baseline", str(tmp_path / "before"))
    documents = lines_of(offline(*arguments))
    compared = [document for document in documents if "comparison" in document]
    assert [document["config"]["direction"] for document in compared] == ["in", "out"]
    for document in compared:
        assert document["comparison"]["runs"] == [3, 3]
        assert document["comparison"]["median"]["current"] == pytest.approx(
            document["median"], rel=0.1
        )


def test_limits_on_runs_of_two_directions(tmp_path: Path) -> None:
    """A limit that the runs of one direction can't have is refused, whichever comes first."""
    save_runs_of_two_directions(tmp_path / "runs")
    for limit, code in (("in.p99>1s", 2), ("out.p99>1s", 2), ("p99>1s", 0)):
        done = offline("--pcaps", str(tmp_path / "runs"), "--fail-if", limit)
        assert done.returncode == code, done.stderr


def test_a_kind_of_which_no_run_is_left(tmp_path: Path) -> None:
    """The others don't decide for it."""
    flow = netweaver.Traffic("flow", 100).to_json()
    for side in ("before", "now"):
        save_runs(tmp_path / side, "a", runs=3)
        save_runs(tmp_path / side, "b", runs=3, traffic=flow)
    for run in (tmp_path / "now").glob("*-b"):
        damage(run)
    arguments = ("--pcaps", str(tmp_path / "now"), "--baseline", str(tmp_path / "before"))
    assert len(lines_of(offline(*arguments))) == 3
    done = offline(*arguments, "--fail-if", "slower")
    assert done.returncode == 5
    assert "no run of web1 flow-100 is left" in done.stderr
