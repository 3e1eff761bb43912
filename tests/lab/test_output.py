"""What people, cron and files get of runs in the lab."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers import FAST, Terminal, analyzed, finished, report, sending
from laboratory import DATA, NAME, NETWEAVER, PYTHON, Lab, wait_until
from prometheus_client.parser import text_string_to_metric_families


@pytest.mark.lab
def test_progress_at_a_terminal(lab: Lab) -> None:
    arguments = lab.arguments("-c", "1500", "--source-command", FAST, source=lab.source.address)
    shown = Terminal(
        *lab.on_client(PYTHON, str(NETWEAVER), *arguments), environment=lab.environment
    )
    assert shown.returncode == 0
    assert "Spawning packet captures...\n" in shown.text
    assert re.search(r"(?m)^1 of \d+ s", shown.text.replace("\r", "\n"))
    assert "1500 on the pif, 1500 matched, 0 lost (0 %)" in shown.text
    assert json.loads(shown.stdout)["packets"]["matched"] == 1500


@pytest.mark.lab
def test_cron_hears_nothing_but_the_numbers(lab: Lab) -> None:
    done = lab.netweaver(*lab.arguments("-c", "600", "--source-command", FAST))
    assert report(done)["warnings"] == []
    assert done.stderr == ""


def kept(document: dict[str, Any]) -> dict[str, Any]:
    """All of a document but where it was kept."""
    return {key: value for key, value in document.items() if key != "saved"}


def saved_pcaps(directory: str) -> list[str]:
    names = sorted(os.listdir(directory))
    return [
        ",".join(os.path.join(directory, name) for name in names if name.startswith(side))
        for side in ("pif", "vif")
    ]


@pytest.mark.lab
def test_a_saved_run_gives_the_same_numbers_again(lab: Lab, tmp_path: Path) -> None:
    """Also when other traffic came before and after the time in which both captures ran.

    And in both directions.
    """
    keep = str(tmp_path / "kept" / "runs")
    foreign = [
        subprocess.Popen(
            lab.source.command("hping3", "-S", "-i", "u300", address),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for address in (lab.destination, f"{DATA}.200")
    ]
    try:
        passive = [*lab.passive_arguments("1"), "--save", keep]
        document = report(lab.netweaver(*passive))
        both = report(lab.netweaver(*passive, "--direction", "both"))
        out = report(lab.netweaver(*passive, "--direction", "out"))
    finally:
        for process in foreign:
            process.kill()
            process.wait()
    assert document["packets"]["matched"] > 500
    for one in (document, both, out):
        for paths in ([one["saved"]], saved_pcaps(one["saved"])):
            assert analyzed("--pcaps", *paths) == kept(one)
        assert json.loads(Path(one["saved"], "report.json").read_text()) == one
    assert len(os.listdir(keep)) == 3
    assert Path(document["saved"]).stat().st_mode & 0o777 == 0o777 & ~os.umask(os.umask(0o22))


@pytest.mark.lab
def test_runs_do_not_overwrite_each_other(lab: Lab, tmp_path: Path) -> None:
    processes = [
        lab.start(
            *lab.arguments(  # from other ports: hping3s of the same second send the same
                "-c",
                "100",
                "--source-command",
                f"{FAST} -s {10_000 * number}",
                "--save",
                str(tmp_path),
                source=lab.source.address,
            )
        )
        for number in range(1, 5)
    ]
    document = [report(finished(process, 60)) for process in processes]
    assert len({one["saved"] for one in document}) == 4
    assert sorted(os.listdir(tmp_path)) == sorted(
        os.path.basename(one["saved"]) for one in document
    )
    assert all(NAME in one["saved"] for one in document)


@pytest.mark.lab
def test_numbers_are_not_lost_when_they_can_not_be_saved(lab: Lab, tmp_path: Path) -> None:
    """A file takes the directory's place while traffic runs."""
    process = lab.start(
        *lab.arguments("-c", "1500", "--source-command", FAST, "--save", str(tmp_path / "x" / "y"))
    )
    wait_until(lambda: sending(lab), "the traffic")
    (tmp_path / "x").write_text("")
    done = finished(process)
    assert report(done, 2)["packets"]["matched"] == 3000
    assert done.stderr.startswith(f"netweaver: error: {NAME} ")
    assert done.stderr.endswith(f": can't save in {tmp_path}/x/y: Not a directory\n")


@pytest.mark.lab
@pytest.mark.alone
def test_a_shift_of_a_fifth_in_the_lab(tmp_path: Path) -> None:
    command = ("-c", "1000", "--source-command", FAST)
    with Lab(forwarder=["--delay", "2000", "--jitter", "400"]) as lab:
        runs = lab.arguments(*command, "--runs", "5")
        assert lab.netweaver(*runs, "--save", str(tmp_path)).returncode == 0
        lab.truth()
        lab.start_forwarder(["--delay", "2400", "--jitter", "400"])
        done = lab.netweaver(*runs, "--baseline", str(tmp_path))
        lab.wait_clean()
    median = json.loads(done.stdout.splitlines()[-1])["comparison"]["median"]
    assert median["distinguishable"] is True
    assert median["shift"] == pytest.approx(400, abs=200)


@pytest.mark.lab
def test_prometheus_of_a_whole_run(lab: Lab) -> None:
    done = lab.netweaver(
        *lab.arguments(
            "-c", "600", "--source-command", FAST, "--direction", "both", "--format", "prometheus"
        )
    )
    assert done.returncode == 0, done.stderr
    families = {family.name: family for family in text_string_to_metric_families(done.stdout)}
    ways = {sample.labels["direction"] for sample in families["netweaver_delay_seconds"].samples}
    assert ways == {"in", "out", "guest"}
    [started] = families["netweaver_measured_timestamp_seconds"].samples
    assert started.value > 1.7e9
    assert started.labels["name_label"] == NAME
