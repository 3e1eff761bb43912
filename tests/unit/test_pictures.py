"""Pictures: what is drawn in them, in which formats, and what can't be drawn."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers import failure, noisy, offline, pair, save_runs

import netweaver


def words(picture: Path) -> list[str]:
    """Return the texts of a picture, which matplotlib keeps as comments."""
    return re.findall(r"<!-- (.*?) -->", picture.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_formats(ending: str, magic: bytes, tmp_path: Path) -> None:
    target = tmp_path / f"picture.{ending}"
    done = offline("--pcaps", *pair(tmp_path, noisy(500, 1)), "--plot", str(target))
    assert done.returncode == 0, done.stderr
    assert target.read_bytes().startswith(magic)


def test_each_packet_is_drawn(tmp_path: Path) -> None:
    target = tmp_path / "x.svg"
    paths = pair(tmp_path, noisy(500, 1, loss=0.02))
    assert offline("--pcaps", *paths, "-d", "10.0.0.1", "--plot", str(target)).returncode == 0
    assert target.read_text().count("<use xlink:href") > 500
    text = " ".join(words(target))
    assert "10.0.0.1, direction in, 2023-11-14 22:13 UTC" in text
    assert "lost" in text
    assert {"99", "99.9"} <= set(words(target))


def test_nothing_went_out(tmp_path: Path) -> None:
    arguments = ("-d", "10.0.0.1", "--direction", "both", "--plot", str(tmp_path / "x.png"))
    done = offline("--pcaps", *pair(tmp_path, noisy(50, 1)), *arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").exists()


def test_several_runs_in_both_directions(tmp_path: Path) -> None:
    """Each run is drawn over its rate, with a curve for each direction and the guest."""
    save_runs(tmp_path / "runs", "a", runs=2)
    fast = netweaver.Traffic("udp", 10_000).to_json()
    save_runs(tmp_path / "runs", "b", runs=2, loss=0.1, traffic=fast)
    reports = [
        json.loads((run / "report.json").read_text()) for run in sorted(tmp_path.glob("runs/*"))
    ]
    for report in reports:
        report["config"]["direction"] = "both"
        report["guest"] = {"median": 5, "percentiles": {"99": 9}}
    curves = netweaver.run_curves(reports)
    assert set(curves) == {"syn in", "syn guest", "udp in", "udp guest"}
    assert [point.position for point in curves["udp in"]] == [10_000, 10_000]
    netweaver.plot_runs(str(tmp_path / "x.svg"), reports)
    text = " ".join(words(tmp_path / "x.svg"))
    assert "4 runs" in text
    assert "packets a second" in text
    assert "%" in text


def test_runs_of_two_vms_in_one_picture(tmp_path: Path) -> None:
    save_runs(tmp_path / "runs", "a", runs=2)
    save_runs(tmp_path / "runs", "b", runs=2, name_label="db1")
    reports = [
        json.loads((run / "report.json").read_text()) for run in sorted(tmp_path.glob("runs/*"))
    ]
    assert set(netweaver.run_curves(reports)) == {"web1 syn in", "db1 syn in"}
    netweaver.plot_runs(str(tmp_path / "x.svg"), reports)
    assert "web1, db1, 4 runs" in " ".join(words(tmp_path / "x.svg"))


def test_names_in_a_picture(tmp_path: Path) -> None:
    """They are no formulas, and their control characters are escaped."""
    name = "$a^b_{c a$b$c ${x "
    target = tmp_path / "x.svg"
    done = offline("--pcaps", *pair(tmp_path, noisy(50, 1), f"{name}\x1b"), "--plot", str(target))
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in target.read_text()
    assert f"{name}\\x1bpif.pcap" in " ".join(words(target))
    ElementTree.parse(target)


def test_another_format_is_refused() -> None:
    line = failure(offline("--pcaps", "a", "b", "--plot", "x.gif"), 2)
    assert "x.gif" in line
    assert ".png, .svg or .pdf" in line


def test_matplotlib_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = failure(offline("--pcaps", "a", "b", "--plot", "x.png"), 2)
    assert "pip install matplotlib" in line


def test_colours_of_directions_are_no_stages_colours() -> None:
    assert not set(netweaver.STAGE_COLOURS) & set(netweaver.PART_COLOURS.values())
