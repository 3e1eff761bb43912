"""Traffic patterns, several runs and what is compared, sources and hypervisors without SSH, and what newcomers see."""
from __future__ import annotations

import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import FAST, FEW_FOR_P99_9, Terminal, analyzed, failure, finished, noisy, offline, pair, received, report
from lab import DATA6, NAME, NETWEAVER, PYTHON, Lab, wait_until

import netweaver

QUICK = ("--rate", "1000", "-c", "60")


def lines_of(done: subprocess.CompletedProcess[str], code: int = 0) -> list[dict[str, Any]]:
    """The documents of several runs."""
    assert done.returncode == code, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def one_source(lab: Lab, *more: str) -> list[str]:
    return lab.arguments(*more, source=lab.source.address)


def lengths(found: dict[str, Any], directory: Path) -> set[int]:
    """Those of the IP packets of a saved run."""
    analyzed("--pcaps", found["saved"], "--csv", str(directory / "x.csv"))
    with open(directory / "x.csv", newline="") as file:
        return {int(row["length"]) for row in csv.DictReader(file)}


# -- traffic --

@pytest.mark.lab
@pytest.mark.parametrize(("pattern", "more", "flows", "length"), [
    ("syn", (), 200, 40), ("syn", ("--size", "100", "--port", "80"), 200, 140), ("flow", ("--port", "22"), 1, 40),
    ("udp", (), 1, 92), ("udp", ("--size", "1000", "--port", "53"), 1, 1028), ("ping", (), 1, 92),
    ("ping", ("--size", "1400"), 1, 1428)])
def test_patterns(lab: Lab, tmp_path: Path, pattern: str, more: tuple[str, ...], flows: int, length: int) -> None:
    found = report(lab.netweaver(*one_source(
        lab, "-c", "200", "--rate", "1000", "--traffic", pattern, *more, "--save", str(tmp_path), "-q")))
    assert found["packets"]["pif"] == found["packets"]["matched"] == 200
    assert found["packets"]["ambiguous"] == 0
    assert found["flows"]["count"] == flows
    if flows == 1:
        first, later = found["flows"]["first"], found["flows"]["later"]
        assert first["minimum"] == first["maximum"] == first["median"]
        assert min(first["minimum"], later["minimum"]) == found["minimum"]
        assert max(first["maximum"], later["maximum"]) == found["maximum"]
        assert first["average"] + 199 * later["average"] == pytest.approx(200 * found["average"], abs=0.5)
    else:
        assert "first" not in found["flows"]
    assert lengths(found, tmp_path) == {length}
    traffic = found["config"]["traffic"]
    assert (traffic["pattern"], traffic["rate"], traffic["load"]) == (pattern, 1000, None)
    assert os.path.basename(found["saved"]).endswith(f"Z-{NAME}-{pattern}-1000" + (
        f"-{more[1]}B" if "--size" in more else ""))


@pytest.mark.lab
def test_ping_with_ipv6_and_the_rate(lab: Lab, tmp_path: Path) -> None:
    found = report(lab.netweaver(*one_source(lab, "-d", f"{DATA6}:100", "--traffic", "ping", "-c", "50", "--rate", "20",
                                             "--csv", str(tmp_path / "x.csv"))))
    assert 50 <= found["packets"]["matched"] < 60    # and its neighbour discovery
    with open(tmp_path / "x.csv", newline="") as file:
        times = [float(row["time"][-13:-1]) for row in csv.DictReader(file) if row["icmp_type"] == "128"]
    gaps = sorted((after - before) % 60 for before, after in itertools.pairwise(times))
    assert gaps[len(gaps) // 2] == pytest.approx(0.05, rel=0.2)


@pytest.mark.lab
def test_a_command_of_ones_own_and_its_placeholders(lab: Lab, tmp_path: Path) -> None:
    template = "hping3 -c {count} -S -i u{interval} -d {size} {destination}"
    found = report(lab.netweaver(*one_source(lab, "-c", "30", "--rate", "500", "--size", "10", "--source-command",
                                             template, "--save", str(tmp_path))))
    assert found["config"]["source_command"] == f"hping3 -c 30 -S -i u2000 -d 10 {lab.destination}"
    assert found["config"]["traffic"] == {"pattern": None, "rate": 500, "size": 10, "port": None, "command": template,
                                          "load": None}
    assert lengths(found, tmp_path) == {50}


LIVE = ("-n", "web1", "--hv", "hv", "-s", "192.0.2.1", "-d", "192.0.2.2")


@pytest.mark.parametrize(("arguments", "words"), [
    (("--traffic", "sctp"), "'sctp' is not of syn, flow, udp, ping"),
    (("-d", "fd00::1"), "--traffic syn: hping3 has no IPv6: --traffic ping has"),
    (("-d", "fd00::1", "--traffic", "ping,udp"), "--traffic udp: hping3 has no IPv6"),
    (("-d", "fd00::1", "--traffic", "ping", "--rate", "2000"), "--rate 2000: with IPv6 ping sends at most 1000"),
    (("--traffic", "ping", "--port", "80"), "--port means nothing to --traffic ping"),
    (("--source-command", FAST, "--traffic", "udp"), "--source-command is instead of --traffic"),
    (("--source-command", FAST, "--rate", "5"), "--rate means nothing to --source-command"),
    (("--source-command", FAST, "--size", "5"), "--size means nothing to --source-command"),
    (("--source-command", FAST, "--port", "5"), "--port means nothing to --source-command"),
    (("--source-command", FAST, "--load", "x"), "--load needs a --traffic, which tells the probes from it"),
    (("--rate", "0"), "'0' is not a rate"), (("--rate", "5,"), "'5,' is not a rate"),
    (("--runs", "2", "--csv", "x.csv"), "--csv, and --format prometheus, are for one run"),
    (("--rate", "5,6", "--format", "prometheus", "--output", "/dev/null"), "--format prometheus, are for one run"),
    (("--stages-buffer", "100"), "--stages-buffer is that of --stages"),
    (("--fail-if", "changed"), "--fail-if changed, slower and lossier need a --baseline"),
    (("--fail-if", "to_guest.p99>1ms"), "--fail-if 'to_guest.p99>1ms': to_guest is known with --stages alone"),
    (("--fail-if", "dropped>0"), "--fail-if 'dropped>0': dropped is known with --stages alone"),
    (("--fail-if", "quicker"), "or one of changed, slower, lossier"),
])
def test_what_does_not_fit_is_a_usage_error(arguments: tuple[str, ...], words: str) -> None:
    assert words in failure(offline(*LIVE, *arguments), 2)


@pytest.mark.lab
@pytest.mark.parametrize(("pattern", "load", "protocol"), [
    ("syn", "hping3 --udp -i u300 -p 9 {}", "TCP"), ("syn", "hping3 -S -i u300 -p 9 {}", "TCP"),
    ("udp", "ping -q -i 0.002 -s 1000 {}", "UDP"), ("ping", "hping3 -S -i u300 {}", "ICMP")])
def test_a_load_is_not_counted(lab: Lab, tmp_path: Path, pattern: str, load: str, protocol: str) -> None:
    """It runs from before the probes until after them, and is gone then."""
    before = received(lab)
    load = load.format(lab.destination)
    found = report(lab.netweaver(*one_source(lab, "--rate", "200", "-c", "200", "--traffic", pattern, "--load", load,
                                             "--direction", "both", "--csv", str(tmp_path / "x.csv"))))
    assert received(lab) - before > 700
    assert 1 <= found["config"]["duration"]
    assert 100 < found["packets"]["pif"] == found["packets"]["matched"] <= 200 * found["config"]["duration"] + 2
    with open(tmp_path / "x.csv", newline="") as file:
        assert {(row["protocol"], row["destination_port"]) for row in csv.DictReader(file)} == {
            (protocol, "" if pattern == "ping" else "0")}
    if pattern != "udp":
        assert found["outbound"]["packets"]["matched"] == found["guest"]["packets"]["answered"]
    assert found["config"]["traffic"]["load"] == load
    assert not [text for text in found["warnings"] if "load" in text]


@pytest.mark.lab
def test_loads_that_end_or_fail(lab: Lab) -> None:
    line = failure(lab.netweaver(*one_source(lab, *QUICK, "--load", "no-such-tool")), 4)
    assert f"root@{lab.source.address}: no-such-tool: exit status 127" in line
    found = report(lab.netweaver(*one_source(lab, "--rate", "1000", "-c", "1000", "--load",
                                             "ping -c 3 -i 0.01 " + lab.destination)))
    assert 400 < found["packets"]["matched"] <= 1000 * found["config"]["duration"] + 2
    assert f"root@{lab.source.address}: the load ended before the probes: no message" in found["warnings"]


# -- this machine, without SSH --

def on_host(lab: Lab, name: str, *arguments: str) -> subprocess.Popen[str]:
    """netweaver on a host of the lab."""
    host = {"hv": lab.hv, "src": lab.source}[name]
    return subprocess.Popen(
        lab.inside(host.namespace, PYTHON, str(NETWEAVER), "-k", str(lab.key), "-n", NAME, "-d", lab.destination,
                   *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
        env={**lab.environment, "PATH": f"{host.directory / 'bin'}:{os.environ['PATH']}",
             "POOL": str(lab.directory / "pool.json")})


@pytest.mark.lab
@pytest.mark.parametrize("host", ["hv", "src"])
def test_this_machine_as_a_source_or_as_the_hypervisor(lab: Lab, host: str) -> None:
    ends = {"hv": ["--hv", "local", "-s", lab.source.address], "src": ["--hv", lab.hv.address, "-s", "local"]}[host]
    found = report(finished(on_host(lab, host, *ends, *QUICK, "--direction", "both")))
    assert found["packets"]["pif"] == found["packets"]["matched"] == found["guest"]["packets"]["answered"] == 60
    assert "local" in (found["config"]["hypervisor"], *found["config"]["sources"])
    assert (found["config"]["pif"], found["config"]["vif"]) == ("eth0", "vif5.0")
    assert found["config"]["transmitted"] == 60


@pytest.mark.lab
def test_a_local_run_that_is_killed_or_goes_wrong(lab: Lab) -> None:
    """Nothing stays, and what a shell here says is told as another host's."""
    ends = ("--hv", "local", "-s", lab.source.address)
    process = on_host(lab, "hv", *ends)
    wait_until(lambda: any("hping3" in line for line in lab.source.processes().values()), "the traffic")
    process.kill()
    process.communicate()
    lab.wait_clean()
    done = finished(on_host(lab, "hv", *ends, "--toolstack", "xe", "-n", "nobody"))
    assert "netweaver: error: local: there is no VM with the name-label 'nobody'" in failure(done, 4)
    done = finished(on_host(lab, "src", "--hv", "local", "-s", "local", "--vif", "vif5.0"))
    assert "local: the capture on vif5.0 ended with status 1: tcpdump: vif5.0: No such device" in failure(done, 5)


# -- several runs --

@pytest.mark.lab
def test_runs_share_their_connections_and_are_a_line_each(own_lab: Lab, tmp_path: Path) -> None:
    lab, target = own_lab, tmp_path / "all.json"
    found = lines_of(lab.netweaver(*lab.arguments(*QUICK, "--runs", "3", "--save", str(tmp_path / "kept"))))
    assert [one["packets"]["matched"] for one in found] == [60, 60, 60]
    assert len({one["config"]["started"] for one in found}) == len({one["saved"] for one in found}) == 3
    for host in lab.hosts:
        log = (host.directory / "sshd.log").read_text()
        assert log.count("Accepted publickey") == 1
    assert lines_of(offline("--pcaps", str(tmp_path / "kept"))) == [
        {key: value for key, value in one.items() if key != "saved"} for one in found]
    shown = Terminal(*lab.on_client(PYTHON, str(NETWEAVER), *lab.arguments(*QUICK, "--runs", "2", "--output",
                                                                            str(target))),
                     environment=lab.environment)
    assert shown.returncode == 0
    assert len(target.read_text().splitlines()) == 2
    for words in ("Traffic", "syn-1000                      1", "syn-1000                      2", "mean", "± s.d."):
        assert f"\n{words}" in shown.text or f"\n {words}" in shown.text or f" {words} " in shown.text
    lab.wait_clean()


@pytest.mark.lab
def test_a_sweep(lab: Lab, tmp_path: Path) -> None:
    done = lab.netweaver(*one_source(
        lab, "-c", "60", "--rate", "500,1000", "--traffic", "syn,flow", "--traffic", "ping", "--runs", "2", "--plot",
        str(tmp_path / "x.png"), "--save", str(tmp_path / "kept")))
    found = lines_of(done)
    order = [(pattern, rate) for pattern in ("syn", "flow", "ping") for rate in (500, 1000)] * 2
    assert [(one["config"]["traffic"]["pattern"], one["config"]["traffic"]["rate"]) for one in found] == order
    assert all(one["packets"]["matched"] == 60 for one in found)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert done.stderr.splitlines() == [f"netweaver: saved in {one['saved']}" for one in found]
    pictures = offline("--pcaps", str(tmp_path / "kept"), "--plot", str(tmp_path / "y.svg"), "--output",
                       str(tmp_path / "y.json"))
    assert pictures.returncode == 0, pictures.stderr
    assert (tmp_path / "y.svg").read_text().count("<use xlink:href") >= 24


@pytest.mark.lab
def test_runs_before_an_error_and_before_an_interruption_are_not_lost(own_lab: Lab, tmp_path: Path) -> None:
    lab, target = own_lab, tmp_path / "all.json"
    process = lab.start(*lab.arguments(*QUICK, "--runs", "9", "--output", str(target)))
    wait_until(target.exists, "the first run")
    lab.hv.run("ip", "link", "del", "vif5.0")
    assert finished(process).returncode in (4, 5)
    assert json.loads(target.read_text().splitlines()[0])["packets"]["matched"] == 60
    lab.wait_clean()


@pytest.mark.lab
def test_a_reader_that_goes_away_ends_all_runs(lab: Lab) -> None:
    process = lab.start(*lab.arguments(*QUICK, "--runs", "20"))
    assert process.stdout is not None and process.stderr is not None
    assert json.loads(process.stdout.readline())["packets"]["matched"] == 120
    process.stdout.close()
    assert process.wait(20) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.lab
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


# -- comparing --

def kept(directory: Path, name: str, factor: float = 1.0, runs: int = 5, seed: int = 0, **config: Any) -> None:
    """Runs as --save keeps them, which differ from one another by some percent, as real ones do."""
    for number in range(runs):
        place = directory / f"20260101T0000{number:02}Z-{name}"
        place.mkdir(parents=True)
        shift = 1 + (seed * 7 + number * 3) % 5 / 200
        found = analyzed("--pcaps", *pair(place, noisy(600, 100 * seed + number, factor * shift)))
        found["config"] |= {"name_label": "web1", "capture_limit": None, "wait": 0.1, "traffic": {
            "pattern": "syn", "rate": 100, "size": None, "port": None, "command": None, "load": None}, **config}
        (place / "report.json").write_text(json.dumps(found))


def test_the_unit_of_comparison_is_the_run(tmp_path: Path) -> None:
    kept(tmp_path / "a", "web1-syn-100")
    kept(tmp_path / "b", "web1-syn-100", 1.1, seed=1)
    kept(tmp_path / "c", "web1-syn-100", seed=2)
    slow = lines_of(offline("--pcaps", str(tmp_path / "b"), "--baseline", str(tmp_path / "a"), "--fail-if",
                            "slower"), 7)
    assert [("comparison" in one) for one in slow] == [False] * 4 + [True]
    comparison = slow[-1]["comparison"]
    assert (comparison["compared"], comparison["numbers"], comparison["left_out"]) == ("runs", [5, 5], 0)
    assert comparison["distinguishable"] is True
    assert 0.5 < comparison["median"]["run_to_run"] < 5          # of levels that differ by half a percent of 217 µs
    medians = [one["median"] for one in slow]
    assert comparison["median"]["current"] == pytest.approx(sum(medians) / 5, abs=0.001)
    done = offline("--pcaps", str(tmp_path / "c"), "--baseline", str(tmp_path / "a"), "--fail-if", "changed",
                   "--fail-if", "slower", "--fail-if", "lossier")
    assert lines_of(done)[-1]["comparison"]["distinguishable"] is False


def test_runs_of_something_else_are_left_out(tmp_path: Path) -> None:
    kept(tmp_path / "all", "web1-syn-100", runs=3)
    kept(tmp_path / "all", "web2-syn-100", runs=2, name_label="web2")
    kept(tmp_path / "all", "web1-udp-100", runs=1, traffic={"pattern": "udp"})
    kept(tmp_path / "now", "web1-syn-100", runs=3, seed=1)
    [*_, last] = lines_of(offline("--pcaps", str(tmp_path / "now"), "--baseline", str(tmp_path / "all")))
    comparison = last["comparison"]
    assert comparison["taken"] == [f"20260101T0000{number:02}Z-web1-syn-100" for number in range(3)]
    assert (comparison["left_out"], comparison["numbers"]) == (3, [3, 3])
    shown = Terminal(sys.executable, str(NETWEAVER), "--pcaps", str(tmp_path / "now"), "--baseline",
                     str(tmp_path / "all"), environment=dict(os.environ))
    assert shown.text.startswith("Baseline: 3 of 6 runs in ")
    kept(tmp_path / "none", "web3-syn-100", runs=2, name_label="web3")
    line = failure(offline("--pcaps", str(tmp_path / "now"), "--baseline", str(tmp_path / "none")), 2)
    assert "none of its 2 runs is of this VM, direction and traffic" in line


def test_one_run_is_not_enough_and_the_summary_says_why(tmp_path: Path) -> None:
    """A shift of 8 % is certain within these two runs, and may be nothing but the difference of any two runs."""
    before, after = pair(tmp_path, noisy(2000, 1), "a-"), pair(tmp_path, noisy(2000, 2, 1.08), "b-")
    shown = Terminal(sys.executable, str(NETWEAVER), "--pcaps", *after, "--baseline", ",".join(before), "--fail-if",
                     "slower", environment=dict(os.environ), columns=80)
    assert shown.returncode == 0
    assert ", as equal runs may differ\n" in shown.text
    assert "--runs 5 on both sides would" in shown.text
    done = offline("--pcaps", *pair(tmp_path, noisy(30, 1), "c-"), "--baseline", ",".join(before), "--fail-if",
                   "changed")
    assert done.returncode == 7
    assert "netweaver: limit: changed: not known, with too few packets\n" in done.stderr


def test_lossier(tmp_path: Path) -> None:
    before, after = pair(tmp_path, noisy(3000, 1), "a-"), pair(tmp_path, noisy(3000, 2, loss=0.05), "b-")
    for name, code in (("lossier", 7), ("changed", 7), ("slower", 0)):
        assert offline("--pcaps", *after, "--baseline", ",".join(before), "--fail-if", name).returncode == code
    for name, code in (("lossier", 0), ("changed", 7), ("slower", 0)):
        assert offline("--pcaps", *before, "--baseline", ",".join(after), "--fail-if", name).returncode == code


def made_runs(seed: int, factor: float) -> list[Any]:
    """The outcomes of five runs whose levels differ by about 2 % from one to the next."""
    import random
    chance = random.Random(seed)
    return [[delay if delay is not None else netweaver.NO_DELAY for delay in noisy(
        600, chance.getrandbits(30), factor * (1 + chance.gauss(0, 0.015)), 0.01)] for _ in range(5)]


def test_five_against_five_runs() -> None:
    """Of 20 shifts by a tenth all are found, and of 40 equal sets at most one is called different."""
    shifted = [netweaver.compare(made_runs(seed, 1), made_runs(100 + seed, 1.1)) for seed in range(20)]
    assert [one["median"]["distinguishable"] for one in shifted] == [True] * 20
    equal = [netweaver.compare(made_runs(200 + seed, 1), made_runs(300 + seed, 1)) for seed in range(40)]
    assert sum(one["distinguishable"] for one in equal) <= 1


# -- newcomers --

@pytest.mark.lab
def test_a_dry_run(own_lab: Lab) -> None:
    """Nothing is sent, and what isn't there is named."""
    lab = own_lab

    def received() -> list[str]:
        """What the VM has counted of TCP and ICMP."""
        done = subprocess.run(["ip", "netns", "exec", f"{lab.prefix}-dst", "cat", "/proc/net/snmp"], check=True,
                              capture_output=True, text=True)
        return [line for line in done.stdout.splitlines() if line.startswith(("Tcp:", "Icmp:"))]

    before = received()
    done = lab.netweaver(*lab.arguments("--dry-run", "--traffic", "syn,ping"))
    assert (done.returncode, done.stderr) == (0, "")
    for words in (f"hypervisor: root@{lab.hv.address}", "toolstack: xe", "vif: vif5.0", "pif: eth0",
                  f"root@{lab.hv.address}: exec tcpdump -i eth0 ", f"root@{lab.hv.address}: exec tcpdump -i vif5.0 ",
                  *(f"root@{lab.source.address}: hping3 -q -c 1000 -i u10000 {kind}" for kind in ("-S", "--icmp"))):
        assert words in done.stdout
    assert done.stdout.splitlines()[-1] == "All is there; nothing was sent."
    assert received() == before
    load = f"ping -q {lab.destination}"
    shown = lab.netweaver(*lab.arguments("--dry-run", "--load", load)).stdout
    sent = report(lab.netweaver(*lab.arguments("--rate", "100", "-c", "100", "--load", load)))["config"]
    assert f": {sent['source_command']}\n" in shown and f": {load}\n" in shown
    line = failure(lab.netweaver(*lab.arguments("--dry-run", "--source-command", "iperf9 -c {destination}")), 4)
    assert f"root@{lab.source.address}: iperf9: not found" in line
    lab.wait_clean()


@pytest.mark.parametrize(("direction", "more"), [("in", ()), ("both", ()), ("both", ("--baseline", "{}"))])
def test_the_summary_is_the_result_at_a_terminal(tmp_path: Path, direction: str, more: tuple[str, ...]) -> None:
    """It fits 80 columns and 24 lines, of which one is the prompt's."""
    paths = pair(tmp_path, [*noisy(900, 1), *[None] * 100])
    arguments = ("--pcaps", *paths, "-d", "10.0.0.1", "--direction", direction,
                 *(word.format(",".join(paths)) for word in more))
    shown = Terminal(sys.executable, str(NETWEAVER), *arguments, environment=dict(os.environ), columns=80, whole=True)
    assert shown.returncode == 0
    lines = [line for line in shown.text.splitlines() if not line.startswith("netweaver: warning")]
    assert not shown.text.startswith("{")
    assert len(lines) <= 23
    assert max(map(len, lines)) <= 80
    titles = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert titles == ["10.0.0.1", "Delay", "Packets", *(["No"] if more else []), "Distribution"]
    whole = Terminal(sys.executable, str(NETWEAVER), *arguments, "--format", "json", environment=dict(os.environ),
                     whole=True)
    text = whole.text[:whole.text.rindex("}") + 1]
    assert json.loads(text)["packets"]["lost"] == 100
    assert text.count("\n") > 50


@pytest.mark.lab
def test_an_interruption_is_answered_at_once(lab: Lab) -> None:
    """And the summary says that the run was interrupted."""
    def interrupt(seen: bytes, process: subprocess.Popen[bytes]) -> None:
        if re.search(rb"\r\x1b\[K2 s|\r2 s", seen) and not sent:
            process.send_signal(signal.SIGINT)
            sent.append(True)

    sent: list[bool] = []
    shown = Terminal(*lab.on_client(PYTHON, str(NETWEAVER), *lab.arguments("--rate", "200", "-c", "9999")),
                     environment=lab.environment, whole=True, meanwhile=interrupt)
    assert shown.returncode == 130
    assert "\nstopping; again: give up\n" in shown.text
    assert f"\nInterrupted: {NAME}, syn-200\n pif eth0, vif vif5.0 (by xe)\n" in shown.text


def numbers_in(value: Any, name: str = "") -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [found for key, more in value.items() for found in numbers_in(more, key)]
    if isinstance(value, list):
        return [found for more in value for found in numbers_in(more, name)]
    return [(name, value)] if isinstance(value, float) else []


def test_numbers_have_three_decimals(tmp_path: Path) -> None:
    """Those of a delay: nothing knows more than nanoseconds."""
    found = analyzed("--pcaps", *pair(tmp_path, noisy(997, 1)), "--baseline",
                     ",".join(pair(tmp_path, noisy(991, 2), "b-")))
    numbers = [(name, value) for name, value in numbers_in(found) if name not in ("loss_ratio", "ratio")]
    assert len(numbers) > 20
    assert [(name, value) for name, value in numbers if round(value, 3) != value] == []


def test_too_few_for_the_last_percentile_is_no_mail(tmp_path: Path) -> None:
    """Only who asks for that one hears of it."""
    paths = pair(tmp_path, noisy(100, 1))
    done = offline("--pcaps", *paths)
    assert report(done)["warnings"] == [FEW_FOR_P99_9.format(100)]
    assert done.stderr == ""
    done = offline("--pcaps", *paths, "--fail-if", "p99.9>1s")
    assert done.stderr == f"netweaver: warning: {FEW_FOR_P99_9.format(100)}\n"


@pytest.mark.parametrize("columns", [60, 100])
def test_help_follows_columns(columns: int) -> None:
    done = offline("--help", env={**os.environ, "COLUMNS": str(columns)})
    options = done.stdout.split("examples:")[0].splitlines()
    assert columns - 12 < max(map(len, options)) <= columns


# -- Prometheus --

def series(text: str) -> dict[str, list[Any]]:
    from prometheus_client.parser import text_string_to_metric_families
    found: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def test_series_survive_a_restart_and_a_failure(tmp_path: Path) -> None:
    """Interfaces, login names and domain ids are in netweaver_info alone; a failure has the same labels."""
    kept(tmp_path, "web1", runs=1, hypervisor="root@hv:2222", vif="vif7.0", pif="eth0", destination="192.0.2.2")
    target = tmp_path / "web1.prom"
    [run] = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert offline("--pcaps", str(run), "--format", "prometheus", "--output", str(target), "--fail-if",
                   "median>1us").returncode == 7
    measured = series(target.read_text())
    common = {"hypervisor": "hv", "name_label": "web1", "destination": "192.0.2.2"}
    for name, samples in measured.items():
        for sample in samples:
            assert common.items() <= sample.labels.items()
            assert name == "netweaver_info" or not {"vif", "pif", "login"} & set(sample.labels)
    [info] = measured["netweaver_info"]
    assert (info.labels["vif"], info.labels["pif"], info.labels["login"]) == ("vif7.0", "eth0", "root@hv:2222")
    assert [measured[f"netweaver_{name}"][0].value for name in ("success", "exit_code")] == [1, 7]
    buckets = measured["netweaver_delay_distribution_seconds_bucket"]
    counts = [sample.value for sample in buckets]
    assert counts == sorted(counts)
    assert counts[-1] == measured["netweaver_delay_distribution_seconds_count"][0].value == 600
    delays = [value for value in noisy(600, 0) if value is not None]
    [below] = [sample.value for sample in buckets if sample.labels["le"] == "0.0002"]
    assert below == sum(value <= 200_000 for value in delays)
    assert measured["netweaver_delay_distribution_seconds_sum"][0].value == pytest.approx(sum(delays) / 1e9, rel=1e-6)
    done = offline("-n", "web1", "--hv", "root@hv:2222", "-s", "192.0.2.1", "-d", "192.0.2.2", "-k", "/none",
                   "--format", "prometheus", "--output", str(target))
    assert done.returncode == 3
    failed = series(target.read_text())
    assert {name: samples[0].value for name, samples in failed.items()} == {
        "netweaver_success": 0, "netweaver_exit_code": 3}
    assert failed["netweaver_success"][0].labels == common
