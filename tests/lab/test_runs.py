"""Traffic patterns, several runs and what is compared, sources and hypervisors without SSH.

And what newcomers see.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    Terminal,
    analyzed,
    failure,
    finished,
    offline,
    received,
    report,
    run_all,
)
from laboratory import DATA6, NAME, NETWEAVER, PYTHON, Lab, wait_until

QUICK = ("--rate", "1000", "-c", "60")


def lines_of(done: subprocess.CompletedProcess[str], code: int = 0) -> list[dict[str, Any]]:
    """Return the documents of several runs."""
    assert done.returncode == code, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def one_source(lab: Lab, *more: str) -> list[str]:
    return lab.arguments(*more, source=lab.source.address)


def lengths(document: dict[str, Any], directory: Path) -> set[int]:
    """Those of the IP packets of a saved run."""
    analyzed("--pcaps", document["saved"], "--csv", str(directory / "x.csv"))
    with open(directory / "x.csv", newline="") as file:
        return {int(row["length"]) for row in csv.DictReader(file)}


# -- traffic --


PATTERNS: list[tuple[str, list[str], int, int]] = [  # options, flows, length of a packet
    ("syn", [], 200, 40),
    ("syn", ["--size", "100", "--port", "80"], 200, 140),
    ("flow", ["--port", "22"], 1, 40),
    ("udp", [], 1, 92),
    ("udp", ["--size", "1000", "--port", "53"], 1, 1028),
    ("ping", [], 1, 92),
    ("ping", ["--size", "1400"], 1, 1428),
]


def test_patterns(lab: Lab, tmp_path: Path) -> None:
    common = ["-c", "200", "--rate", "1000", "--save", str(tmp_path), "-q"]
    lines = [one_source(lab, *common, "--traffic", row[0], *row[1]) for row in PATTERNS]
    for (pattern, more, flows, length), done in zip(PATTERNS, run_all(lab, lines)):
        document = report(done)
        assert document["packets"]["pif"] == document["packets"]["matched"] == 200
        assert document["packets"]["ambiguous"] == 0
        check_flows(document, flows)
        assert lengths(document, tmp_path) == {length}
        traffic = document["config"]["traffic"]
        assert (traffic["pattern"], traffic["rate"], traffic["load"]) == (pattern, 1000, None)
        name = f"Z-{NAME}-{pattern}-1000"
        if "--size" in more:
            name += f"-{more[1]}B"
        assert document["saved"].endswith(name)


def check_flows(document: dict[str, Any], flows: int) -> None:
    """Check the delays of the first and the later packets of 200, which are one flow or many."""
    assert document["flows"]["count"] == flows
    assert ("first" in document["flows"]) == (flows == 1)
    if flows == 1:
        first, later = document["flows"]["first"], document["flows"]["later"]
        assert first["minimum"] == first["maximum"] == first["median"]
        assert min(first["minimum"], later["minimum"]) == document["minimum"]
        assert max(first["maximum"], later["maximum"]) == document["maximum"]
        total = first["average"] + 199 * later["average"]
        assert total == pytest.approx(200 * document["average"], abs=0.5)


def test_ping_with_ipv6_and_the_rate(lab: Lab, tmp_path: Path) -> None:
    document = report(
        lab.netweaver(
            *one_source(
                lab,
                "-d",
                f"{DATA6}:100",
                "--traffic",
                "ping",
                "-c",
                "50",
                "--rate",
                "20",
                "--csv",
                str(tmp_path / "x.csv"),
            )
        )
    )
    assert 50 <= document["packets"]["matched"] < 60  # and its neighbour discovery
    with open(tmp_path / "x.csv", newline="") as file:
        times = [
            float(row["time"][-13:-1]) for row in csv.DictReader(file) if row["icmp_type"] == "128"
        ]
    gaps = sorted((after - before) % 60 for before, after in itertools.pairwise(times))
    assert gaps[len(gaps) // 2] == pytest.approx(0.05, rel=0.2)


def test_a_command_of_ones_own_and_its_placeholders(lab: Lab, tmp_path: Path) -> None:
    template = "hping3 -c {count} -S -i u{interval} -d {size} {destination}"
    document = report(
        lab.netweaver(
            *one_source(
                lab,
                "-c",
                "30",
                "--rate",
                "500",
                "--size",
                "10",
                "--source-command",
                template,
                "--save",
                str(tmp_path),
            )
        )
    )
    assert (
        document["config"]["source_command"] == f"hping3 -c 30 -S -i u2000 -d 10 {lab.destination}"
    )
    assert document["config"]["traffic"] == {
        "pattern": None,
        "rate": 500,
        "size": 10,
        "port": None,
        "command": template,
        "load": None,
        "achieved": None,
    }
    assert lengths(document, tmp_path) == {50}


@pytest.mark.parametrize(
    ("pattern", "load", "protocol"),
    [
        ("syn", "ping -q -i 0.002 -s 1000 {}", "TCP"),
        ("syn", "hping3 -S -i u300 -p 9 {}", "TCP"),
        ("udp", "ping -q -i 0.002 -s 1000 {}", "UDP"),
        ("ping", "hping3 -S -i u300 {}", "ICMP"),
    ],
)
def test_a_load_is_not_counted(
    lab: Lab, tmp_path: Path, pattern: str, load: str, protocol: str
) -> None:
    """It runs from before the probes until after them, and is gone then."""
    before = received(lab)
    load = load.format(lab.destination)
    document = report(
        lab.netweaver(
            *one_source(
                lab,
                "--rate",
                "200",
                "-c",
                "200",
                "--traffic",
                pattern,
                "--load",
                load,
                "--direction",
                "both",
                "--csv",
                str(tmp_path / "x.csv"),
            )
        )
    )
    assert received(lab) - before > 700
    assert 1 <= document["config"]["duration"]
    assert (
        100
        < document["packets"]["pif"]
        == document["packets"]["matched"]
        <= 200 * document["config"]["duration"] + 2
    )
    with open(tmp_path / "x.csv", newline="") as file:
        assert {(row["protocol"], row["destination_port"]) for row in csv.DictReader(file)} == {
            (protocol, "" if pattern == "ping" else "0")
        }
    if pattern != "udp":
        assert (
            document["outbound"]["packets"]["matched"] == document["guest"]["packets"]["answered"]
        )
    assert document["config"]["traffic"]["load"] == load
    assert not [text for text in document["warnings"] if "load" in text]


def test_loads_that_end_or_fail(lab: Lab) -> None:
    line = failure(lab.netweaver(*one_source(lab, *QUICK, "--load", "no-such-tool")), 4)
    assert f"root@{lab.source.address}: no-such-tool: exit status 127" in line
    document = report(
        lab.netweaver(
            *one_source(
                lab,
                "--rate",
                "1000",
                "-c",
                "1000",
                "--load",
                "ping -c 3 -i 0.01 " + lab.destination,
            )
        )
    )
    assert 400 < document["packets"]["matched"] <= 1000 * document["config"]["duration"] + 2
    assert (
        f"root@{lab.source.address}: the load ended before the probes: no message"
        in document["warnings"]
    )


# -- this machine, without SSH --


def on_host(lab: Lab, name: str, *arguments: str) -> subprocess.Popen[str]:
    """netweaver on a host of the lab."""
    host = {"hv": lab.hv, "src": lab.source}[name]
    return subprocess.Popen(
        lab.inside(
            host.namespace,
            PYTHON,
            str(NETWEAVER),
            "-k",
            str(lab.key),
            "-n",
            NAME,
            "-d",
            lab.destination,
            *arguments,
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
        env={
            **lab.environment,
            "PATH": f"{host.directory / 'bin'}:{os.environ['PATH']}",
            "POOL": str(lab.directory / "pool.json"),
        },
    )


@pytest.mark.parametrize("host", ["hv", "src"])
def test_this_machine_as_a_source_or_as_the_hypervisor(lab: Lab, host: str) -> None:
    ends = {
        "hv": ["--hv", "local", "-s", lab.source.address],
        "src": ["--hv", lab.hv.address, "-s", "local"],
    }[host]
    document = report(finished(on_host(lab, host, *ends, *QUICK, "--direction", "both")))
    assert (
        document["packets"]["pif"]
        == document["packets"]["matched"]
        == document["guest"]["packets"]["answered"]
        == 60
    )
    assert "local" in (document["config"]["hypervisor"], *document["config"]["sources"])
    assert (document["config"]["pif"], document["config"]["vif"]) == ("eth0", "vif5.0")
    assert document["config"]["transmitted"] == 60


def test_a_local_run_that_is_killed_or_goes_wrong(lab: Lab) -> None:
    """Nothing stays, and what a shell here says is told as another host's."""
    ends = ("--hv", "local", "-s", lab.source.address)
    process = on_host(lab, "hv", *ends)
    wait_until(
        lambda: any("hping3" in line for line in lab.source.processes().values()), "the traffic"
    )
    process.kill()
    process.communicate()
    lab.wait_clean()
    done = finished(on_host(lab, "hv", *ends, "--toolstack", "xe", "-n", "nobody"))
    assert ": local: there is no VM with the name-label 'nobody'" in failure(done, 4)
    done = finished(on_host(lab, "src", "--hv", "local", "-s", "local", "--vif", "vif5.0"))
    assert (
        "local: the capture on vif5.0 ended with status 1: tcpdump: vif5.0: No such device"
        in failure(done, 5)
    )


# -- several runs --


def test_runs_share_their_connections_and_are_a_line_each(own_lab: Lab, tmp_path: Path) -> None:
    lab, target = own_lab, tmp_path / "all.json"
    document = lines_of(
        lab.netweaver(*lab.arguments(*QUICK, "--runs", "3", "--save", str(tmp_path / "kept")))
    )
    assert [one["packets"]["matched"] for one in document] == [60, 60, 60]
    assert (
        len({one["config"]["started"] for one in document})
        == len({one["saved"] for one in document})
        == 3
    )
    for host in lab.hosts:
        log = (host.directory / "sshd.log").read_text()
        assert log.count("Accepted publickey") == 1
    assert lines_of(offline("--pcaps", str(tmp_path / "kept"))) == [
        {key: value for key, value in one.items() if key != "saved"} for one in document
    ]
    shown = Terminal(
        *lab.on_client(
            PYTHON, str(NETWEAVER), *lab.arguments(*QUICK, "--runs", "2", "--output", str(target))
        ),
        environment=lab.environment,
    )
    assert shown.returncode == 0
    assert len(target.read_text().splitlines()) == 2
    lines = shown.text.splitlines()
    assert any(line.startswith("Traffic ") for line in lines)
    for word in ("1", "2", "mean", "s.d."):
        assert any(line.split()[:3] == ["syn-1000", word, "in"] for line in lines)
    lab.wait_clean()


def test_a_sweep(lab: Lab, tmp_path: Path) -> None:
    """All combinations once, and then again."""
    kept = str(tmp_path / "kept")
    sweep = ["--rate", "500,1000", "--traffic", "syn", "--traffic", "ping", "--runs", "2"]
    files = ["--plot", str(tmp_path / "x.png"), "--save", kept]
    done = lab.netweaver(*one_source(lab, "-c", "30", *sweep, *files))
    document = lines_of(done)
    traffic = [one["config"]["traffic"] for one in document]
    order = [("syn", 500), ("syn", 1000), ("ping", 500), ("ping", 1000)] * 2
    assert [(kind["pattern"], kind["rate"]) for kind in traffic] == order
    assert all(one["packets"]["matched"] == 30 for one in document)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    notes = [line for line in done.stderr.splitlines() if "saved in" in line]
    assert notes == [f"netweaver: saved in {one['saved']}" for one in document]
    plot = str(tmp_path / "y.svg")
    pictures = offline("--pcaps", kept, "--plot", plot, "--output", str(tmp_path / "y.json"))
    assert pictures.returncode == 0, pictures.stderr
    assert Path(plot).read_text().count("<use xlink:href") >= 16


def test_runs_before_an_error_and_before_an_interruption_are_not_lost(
    own_lab: Lab, tmp_path: Path
) -> None:
    lab, target = own_lab, tmp_path / "all.json"
    process = lab.start(*lab.arguments(*QUICK, "--runs", "9", "--output", str(target)))
    wait_until(target.exists, "the first run")
    lab.hv.run("ip", "link", "del", "vif5.0")
    assert finished(process).returncode in (4, 5)
    assert json.loads(target.read_text().splitlines()[0])["packets"]["matched"] == 60
    lab.wait_clean()


def test_a_reader_that_goes_away_ends_all_runs(lab: Lab) -> None:
    process = lab.start(*lab.arguments(*QUICK, "--runs", "20"))
    assert process.stdout is not None and process.stderr is not None
    assert json.loads(process.stdout.readline())["packets"]["matched"] == 120
    process.stdout.close()
    assert process.wait(20) == 141
    lines = process.stderr.read().splitlines()
    assert all("each source reached less than 95 %" in line for line in lines)  # on a busy machine
    process.stderr.close()


def test_an_interruption_ends_all_runs(lab: Lab) -> None:
    def passed() -> int:
        return int(lab.hv.run("cat", "/sys/class/net/vif5.0/statistics/tx_packets"))

    before = passed()
    process = lab.start(*lab.arguments("-c", "1000", "--rate", "200", "--runs", "9"))
    wait_until(lambda: passed() > before + 50, "the traffic")
    process.send_signal(signal.SIGTERM)
    done = finished(process)
    [found] = lines_of(done, 143)
    assert found["interrupted"] is True


def test_an_interruption_between_two_runs(lab: Lab) -> None:
    """The next one has sent nothing, and the finished one is not lost."""
    first = lab.hv.directory / "first"
    script = f"""[ ! -e {first} ] || sleep 7; : >{first}; exec /bin/df "$@\""""
    with lab.hv.program("df", script):
        process = lab.start(*one_source(lab, *QUICK, "--runs", "3"))
        wait_until(lambda: "sleep 7" in lab.hv.processes().values(), "the second run")
        process.send_signal(signal.SIGINT)
        done = finished(process)
    first.unlink()
    [found] = lines_of(done, 130)
    assert "interrupted" not in found
    assert done.stderr.splitlines()[-1].endswith(": interrupted")


# -- newcomers --


def test_a_dry_run(lab: Lab) -> None:
    """Nothing is sent, and what isn't there is named."""

    def received() -> list[str]:
        """Return what the VM has counted of TCP and ICMP."""
        done = subprocess.run(
            ["ip", "netns", "exec", f"{lab.prefix}-dst", "cat", "/proc/net/snmp"],
            check=True,
            capture_output=True,
            text=True,
        )
        return [line for line in done.stdout.splitlines() if line.startswith(("Tcp:", "Icmp:"))]

    before = received()
    done = lab.netweaver(*lab.arguments("--dry-run", "--traffic", "syn,ping"))
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        f"hypervisor: root@{lab.hv.address}",
        "toolstack: xe",
        "vif: vif5.0",
        "pif: eth0",
        f"root@{lab.hv.address}: exec tcpdump -i eth0 ",
        f"root@{lab.hv.address}: exec tcpdump -i vif5.0 ",
        *(
            f"root@{lab.source.address}: hping3 -q -c 1000 -i u10000 {kind}"
            for kind in ("-S", "--icmp")
        ),
    ):
        assert words in done.stdout
    assert "the VM was sent no traffic" in done.stdout.splitlines()[-1]
    assert received() == before
    load = f"ping -q {lab.destination}"
    shown = lab.netweaver(*lab.arguments("--dry-run", "--load", load)).stdout
    sent = report(lab.netweaver(*lab.arguments("--rate", "100", "-c", "20", "--load", load)))[
        "config"
    ]
    assert f": {sent['source_command']}\n" in shown and f": {load}\n" in shown
    missing = ("--dry-run", "--source-command", "iperf9 -c {destination}")
    line = failure(lab.netweaver(*one_source(lab, *missing)), 4)
    assert f"root@{lab.source.address}: iperf9: not found" in line


def test_an_interruption_is_answered_at_once(lab: Lab) -> None:
    """And the summary says that the run was interrupted."""

    def interrupt(seen: bytes, process: subprocess.Popen[bytes]) -> None:
        if re.search(rb"[2-9] of \d+ s", seen) and not sent:
            process.send_signal(signal.SIGINT)
            sent.append(True)

    sent: list[bool] = []
    shown = Terminal(
        *lab.on_client(PYTHON, str(NETWEAVER), *lab.arguments("--rate", "200", "-c", "9999")),
        environment=lab.environment,
        whole=True,
        meanwhile=interrupt,
    )
    assert shown.returncode == 130
    assert "\nstopping" in shown.text
    headings = [line for line in shown.text.splitlines() if line.startswith(f"{NAME}, syn-200")]
    assert ["interrupted" in line for line in headings] == [True]


@pytest.mark.lab
def test_only_the_newest_runs_are_kept(lab: Lab, tmp_path: Path) -> None:
    saved = tmp_path / "runs"
    stranger = saved / "notes"
    stranger.mkdir(parents=True)
    arguments = one_source(lab, *QUICK, "--runs", "3", "--save", str(saved), "--keep", "2")
    documents = lines_of(lab.netweaver(*arguments))
    newest = [Path(document["saved"]) for document in documents[1:]]
    assert sorted(saved.iterdir()) == sorted([*newest, stranger])
