"""Runs compared with a baseline, from the command line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers import analyzed, failure, noisy, offline, pair, save_runs


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
