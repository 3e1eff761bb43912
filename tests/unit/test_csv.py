"""The table of packets that --csv writes."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

from frames import ipv4, tcp
from helpers import T, analyzed, captures, failure, noisy, offline, pair, save_runs


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_each_packet_with_its_delay_and_flags(tmp_path: Path) -> None:
    pif = [(T + i * 1_000_000, ipv4(tcp(seq=i), ident=i)) for i in range(6)]
    pif.append((T + 6_000_000, ipv4(tcp(seq=99), ident=99)))
    pif.append((T + 7_000_000, ipv4(tcp(seq=99), ident=99)))
    arrivals = [(0, 1001), (2, 2000), (1, 3_000_007), (3, -50), (3, 9), (6, 5)]
    vif = [(pif[rank][0] + delay, pif[rank][1]) for rank, delay in arrivals]
    target = tmp_path / "table.csv"
    target.write_text("old")
    document = analyzed("--pcaps", *captures(tmp_path, pif, sorted(vif)), "--csv", str(target))
    rows = table(target)
    assert (document["packets"]["pif"], document["packets"]["undecided"]) == (7, 1)
    assert len(rows) == 8
    delays = ["1.001", "3000.007", "2.000", "-0.050", "", "", "", ""]
    assert [row["delay_us"] for row in rows] == delays
    flags = ["", "reordered", "", "duplicated", "lost", "lost", "ambiguous", "ambiguous"]
    assert [row["flags"] for row in rows] == flags
    assert rows[1]["time"] == "2023-11-14T22:13:20.124456789Z"
    fields = [rows[1][name] for name in ("source", "protocol", "sequence", "ip_id")]
    assert fields == ["10.0.0.2", "TCP", "1", "1"]


def test_the_directory_of_the_table_is_missing(tmp_path: Path) -> None:
    paths = pair(tmp_path, noisy(20, 1))
    done = offline("--pcaps", *paths, "--csv", str(tmp_path / "none" / "table.csv"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "no such directory" in done.stderr


def test_the_numbers_are_not_lost_with_the_table(tmp_path: Path) -> None:
    paths = pair(tmp_path, noisy(600, 1))
    done = offline("--pcaps", *paths, "--csv", "/dev/full")
    assert done.returncode == 2
    assert json.loads(done.stdout)["packets"]["matched"] == 600
    assert "/dev/full" in done.stderr


def test_several_runs_in_one_table(tmp_path: Path) -> None:
    save_runs(tmp_path / "saved", "web1", runs=3)
    target = tmp_path / "table.csv"
    done = offline("--pcaps", str(tmp_path / "saved"), "--csv", str(target))
    assert done.returncode == 0, done.stderr
    rows = table(target)
    assert list(rows[0])[:2] == ["run", "time"]
    assert Counter(row["run"] for row in rows) == {"1": 600, "2": 600, "3": 600}


def test_a_single_run_has_no_column_for_the_run(tmp_path: Path) -> None:
    save_runs(tmp_path / "saved", "web1", runs=1)
    target = tmp_path / "table.csv"
    assert offline("--pcaps", str(tmp_path / "saved"), "--csv", str(target)).returncode == 0
    assert "run" not in table(target)[0]


def test_table_and_document_can_not_share_standard_output(tmp_path: Path) -> None:
    paths = pair(tmp_path, noisy(20, 1))
    assert "standard output" in failure(offline("--pcaps", *paths, "--csv", "-"), 2)
    elsewhere = ("--output", str(tmp_path / "result.json"))
    assert offline("--pcaps", *paths, "--csv", "-", *elsewhere).stdout.startswith("time,")
