"""Saved runs: which can be read, which are left out, and which --keep deletes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import analyzed, failure, noisy, offline, pair, save_runs
from laboratory import NETWEAVER

import netweaver


def document(run: Path) -> dict[str, Any]:
    """Return the document of a saved run."""
    found: dict[str, Any] = json.loads((run / "report.json").read_text())
    return found


def change(run: Path, **values: Any) -> None:
    """Change values of a saved run's document."""
    (run / "report.json").write_text(json.dumps(document(run) | values))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the directory of a saved run."""
    save_runs(tmp_path, "web1", runs=1)
    [directory] = tmp_path.iterdir()
    return directory


@pytest.mark.parametrize("version", [2, 3])
def test_runs_of_versions_2_and_3_are_read(run: Path, version: int) -> None:
    change(run, schema_version=version)
    assert analyzed("--pcaps", str(run))["packets"]["matched"] == 600


@pytest.mark.parametrize(
    ("version", "word"), [(1, "pif.pcap"), (4, "newer"), ("3", "damaged"), (0, "damaged")]
)
def test_other_versions_are_refused(run: Path, version: object, word: str) -> None:
    change(run, schema_version=version)
    assert word in failure(offline("--pcaps", str(run)), 2)


def test_the_advice_for_version_1_works(run: Path) -> None:
    change(run, schema_version=1)
    line = failure(offline("--pcaps", str(run)), 2)
    document = analyzed("--pcaps", *line.split()[-2:])
    assert document["packets"]["matched"] == 600


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"config": 5}',
        '{"config": {"direction": "up"}}',
        '{"config": {"labels": 3}}',
        '{"config": {"window": {}}}',
        '{"config": {"selection": {"sources": ["x"]}}}',
        '{"config": {"traffic": {"rate": "fast"}}}',
        f'{{"config": {{"wait": {"9" * 400}}}}}',
        '{"config": {}}',
        '{"config": {}, "capture": {}}',
        '{"config": {}, "capture": {"pif": {}}}',
        '{"config": {}, "capture": {"pif": {}, "vif": []}}',
        "[" * 100_000,
    ],
)
def test_damaged_documents_are_usage_errors(run: Path, text: str) -> None:
    (run / "report.json").write_text(text)
    assert str(run) in failure(offline("--pcaps", str(run)), 2)


def test_a_pipe_in_place_of_a_document_does_not_block(run: Path) -> None:
    (run / "report.json").unlink()
    os.mkfifo(run / "report.json")
    assert "not a regular file" in failure(offline("--pcaps", str(run)), 2)


@pytest.mark.parametrize(
    ("file", "part", "garbage"),
    [("report.json", 0, "{"), ("vif.pcap", 0, ""), ("pif.pcap", 0.5, "\xff" * 500)],
)
def test_a_damaged_run_among_good_ones_is_left_out(
    file: str, part: float, garbage: str, tmp_path: Path
) -> None:
    save_runs(tmp_path, "web1", runs=3)
    damaged, *_ = sorted(tmp_path.iterdir())
    content = (damaged / file).read_bytes()
    (damaged / file).write_bytes(content[: int(len(content) * part)] + garbage.encode("latin1"))
    for arguments in (
        ["--pcaps", str(tmp_path)],
        ["--pcaps", *pair(tmp_path, noisy(50, 1)), "--baseline", str(tmp_path)],
    ):
        done = offline(*arguments)
        assert done.returncode == 0
        [warning] = [line for line in done.stderr.splitlines() if damaged.name in line]
        assert "warning" in warning


def test_all_values_of_a_run_survive_its_document() -> None:
    traffic = netweaver.Traffic("udp", 500, size=100, port=53, load="ping 10.0.0.1")
    info = netweaver.RunInfo(
        pif="eth0,eth1",
        vif="vif5.0",
        selection=netweaver.Selection(
            netweaver.DIRECTIONS["both"],
            ["10.0.0.2"],
            ["10.0.0.1"],
            probes=netweaver.ProbeFilter(17, 53),
        ),
        sources=["root@source"],
        destination="10.0.0.1",
        labels={"rack": "7"},
        measured=True,
        hypervisor="root@hv",
        name_label="web1",
        toolstack="xe",
        overlay=True,
        filter="udp",
        traffic=traffic,
        source_command="hping3",
        pif_command="tcpdump",
        vif_command="tcpdump",
        capture_limit=1000,
        wait=0.5,
        timeout=60.0,
        platform={"kernel": "6.1"},
        started=1_700_000_000_123_456_789,
        duration=2.5,
        transmitted=99,
        achieved_rate=480.5,
        window=netweaver.Window(10**18, 10**18 + 1, 10**18 + 2, 500_000_000),
        backend="tap",
        incidents=["one"],
    )
    text = json.dumps(info.to_json())
    assert netweaver.RunInfo.from_json(json.loads(text)) == info


def test_the_newest_runs_of_a_kind_are_kept(tmp_path: Path) -> None:
    save_runs(tmp_path, "web1", runs=5)
    others = tmp_path / "others"
    save_runs(others, "web2", runs=1, name_label="web2")
    [other] = others.iterdir()
    os.rename(other, tmp_path / "20200101T000000Z-web2")
    others.rmdir()
    annotated, *_ = sorted(tmp_path.glob("2026*"))
    (annotated / "notes.txt").write_text("the first one")
    (tmp_path / "20200101T000000Z-unrelated").mkdir()
    (tmp_path / "copy").mkdir()
    (tmp_path / "20200101T000000Z-link").symlink_to(annotated)
    newest = sorted(tmp_path.glob("2026*"))[-1]
    kind = netweaver.load_run(str(newest)).info.kind
    before = set(tmp_path.iterdir())
    deleted = netweaver.delete_old_runs(str(tmp_path), kind, keep=2)
    assert set(map(Path, deleted)) == before - set(tmp_path.iterdir())
    left = sorted(path.name for path in tmp_path.glob("2026*"))
    assert [name[:16] for name in left] == [
        "20260101T000000Z",  # with a file of the user's
        "20260101T000003Z",
        "20260101T000004Z",
    ]
    assert len(list(tmp_path.glob("2020*"))) == 3


def test_the_run_that_was_just_saved_is_kept(tmp_path: Path) -> None:
    """The others were saved while the clock was wrong: they seem to be newer."""
    save_runs(tmp_path, "web1", runs=4)
    just_saved, *others = sorted(tmp_path.iterdir())
    kind = netweaver.load_run(str(just_saved)).info.kind
    deleted = netweaver.delete_old_runs(str(tmp_path), kind, 2, str(just_saved))
    assert deleted == [str(others[1]), str(others[0])]
    assert just_saved.exists()


def test_runs_that_try_a_new_directory_at_once(tmp_path: Path) -> None:
    """Each removes what it has made, also from under the others."""
    code = (
        f"import netweaver\nfor _ in range(200): netweaver.check_can_save({str(tmp_path / 'd')!r})"
    )
    environment = {**os.environ, "PYTHONPATH": str(NETWEAVER.parent)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert list((tmp_path / "d").glob("*")) == []


def test_trying_a_directory_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    netweaver.check_can_save(str(tmp_path / "there" / "a" / "b"))
    netweaver.check_can_save(str(tmp_path / "there"))
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


@pytest.mark.parametrize("path", ["/proc/runs", "{}/file/runs", "{}/" + "x" * 300])
def test_a_directory_that_can_not_be_made(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(netweaver.UsageError, match="can't save in"):
        netweaver.check_can_save(path.format(tmp_path))
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
