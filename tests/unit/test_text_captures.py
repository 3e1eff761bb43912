"""Text captures: sequence numbers and times by columns."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from frames import write

import netweaver
from netweaver import TextCapture, TextColumns

SECOND = 10**9
DAY = 86_400 * SECOND
EVENING = 75_236 * SECOND + 421_831_000  # 20:53:56.421831


def times_of(lines: Iterable[str], sequence: int, time: int) -> list[int]:
    return list(TextCapture(lines, TextColumns(sequence, time)).times)


def test_text_of_old_tcpdump() -> None:
    line = (
        "2013-05-21 20:53:56.421831 IP 10.0.0.2.2911 > 10.0.0.1.0: S 36550021:36550021(0) win 512"
    )
    capture = TextCapture([line, "\n", "reading from file\n"], TextColumns(7, 1, ":", 0))
    assert capture.identities == [b"\x0036550021"]
    assert list(capture.times) == [EVENING]
    assert capture.skipped == 1


def test_text_of_new_tcpdump() -> None:
    line = "2026-11-23 20:53:56.421831 IP 10.0.0.2.1 > 10.0.0.1.0: Flags [S], seq 36550021, win 512"
    capture = TextCapture([line], TextColumns(9, 1, ",", 0))
    assert capture.identities == [b"\x0036550021"]
    assert list(capture.times) == [EVENING]


@pytest.mark.parametrize(
    "time", ["20:53:56.421831", "20:53:56,421831000", "1369169636.421831", "75236.421831"]
)
def test_formats_of_time(time: str) -> None:
    assert times_of([f"7 {time}"], 0, 1) == [EVENING]


@pytest.mark.parametrize("time", ["20:53", "20.53.56", "x", "-1", "1" * 11, "\u0662:00:00"])
def test_lines_without_a_time_are_counted(time: str) -> None:
    assert TextCapture([f"7 {time}"], TextColumns(0, 1)).skipped == 1


def test_times_continue_after_midnight() -> None:
    lines = ["1 23:59:59.9", "2 00:00:00.1", "3 23:59:59", "4 00:00:01"]
    tenth = SECOND // 10
    assert times_of(lines[:2], 0, 1) == [DAY - tenth, DAY + tenth]
    assert times_of(lines[1:2] + lines[3:], 0, 1) == [tenth, SECOND]
    assert times_of([lines[1], lines[0]], 0, 1) == [tenth, -tenth]


@pytest.mark.parametrize("reverse", [False, True])
def test_midnight_between_two_captures(reverse: bool, tmp_path: Path) -> None:
    before = write(tmp_path / "before", b"7 23:59:59.999999\n8 00:00:00.5\n")
    after = write(tmp_path / "after", b"7 00:00:00.000001\n8 00:00:00.6\n")
    paths = [before, after]
    delays = [2000, 100_000_000]
    if reverse:
        paths = [after, before]
        delays = [-2000, -100_000_000]
    analysis = netweaver.analyze_text(paths[0], paths[1], netweaver.IN, TextColumns(0, 1))
    assert list(analysis.results[0].delays) == delays
