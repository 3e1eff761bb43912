"""For people and for cron: what is on the terminal and what isn't, files, pictures, limits, comparisons, Prometheus."""
from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import random
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from frames import ethernet, ipv4, pcap, tcp, write
from lab import DATA, NAME, NETWEAVER, PYTHON, Lab
from prometheus_client.parser import text_string_to_metric_families
from test_lab import FAST, report
from test_offline import T, analyzed, offline

import netweaver


def pair(directory: Path, delays: Sequence[int | None], name: str = "") -> list[str]:
    """Captures of one packet a millisecond, with these delays in ns (None: lost)."""
    frames = [ethernet(ipv4(tcp(seq=rank), ident=rank % 65536)) for rank in range(len(delays))]
    pif = [(T + rank * 1_000_000, frame) for rank, frame in enumerate(frames)]
    vif = sorted((time + delay, frame) for (time, frame), delay in zip(pif, delays) if delay is not None)
    return [write(directory / f"{name}{side}.pcap", pcap(records)) for side, records in (("pif", pif), ("vif", vif))]


def noisy(size: int, seed: int, factor: float = 1.0, loss: float = 0.0) -> list[int | None]:
    """Delays of about 200 µs with a long tail, of which neighbours resemble each other."""
    chance, drift = random.Random(seed), 0.0
    found: list[int | None] = []
    for _ in range(size):
        drift = 0.8 * drift + 0.6 * chance.gauss(0, 1)
        delay = factor * (200_000 + 10_000 * drift + chance.expovariate(1) * 20_000)
        found.append(None if chance.random() < loss else int(delay))
    return found


class Terminal:
    """Runs a command whose stderr is a terminal of 100 columns; keeps what a person saw."""

    def __init__(self, *command: str, environment: dict[str, str], stdout: int = subprocess.PIPE) -> None:
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=slave,
                                   env={**environment, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"})
        os.close(slave)
        seen = bytearray()
        with contextlib.suppress(OSError):           # EIO: the other end is closed
            while data := os.read(master, 65536):
                seen += data
        os.close(master)
        self.stdout = process.communicate(timeout=60)[0].decode()
        self.returncode = process.returncode
        self.raw = seen.decode().replace("\r\n", "\n")
        self.text = re.sub(r"\x1b\[[\d;]*[mK]", "", self.raw)


# -- at a terminal --

def test_a_summary_for_people(tmp_path: Path) -> None:
    delays = noisy(990, 1) + [None] * 10
    paths = pair(tmp_path, delays)
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    shown = Terminal(sys.executable, str(NETWEAVER), "--pcaps", *paths, environment=environment)
    assert shown.returncode == 0
    assert json.loads(shown.stdout)["packets"]["lost"] == 10
    assert "\npif.pcap -> vif.pcap: 990 packets matched of 1000\n" in f"\n{shown.text}"
    assert "lost 10 (1 %)" in shown.text
    assert re.search(r"median +\d+ µs +average +\d+ µs +stdev", shown.text)
    assert "█" in shown.text
    assert "\x1b[1m" in shown.raw
    bars = [line for line in shown.text.splitlines() if re.match(r" +(> )?[\d.]+ [µm]s +\d+  ", line)]
    assert len(bars) == netweaver.BINS + 1
    assert sum(int(re.split(r" [µm]s +", line)[1].split()[0]) for line in bars) == 990
    plain = Terminal(sys.executable, str(NETWEAVER), "--pcaps", *paths, environment={**environment, "NO_COLOR": "1"})
    assert plain.text == shown.text
    assert "\x1b[" not in plain.raw
    quiet = Terminal(sys.executable, str(NETWEAVER), "--pcaps", *paths, "-q", environment=environment)
    assert (quiet.text, quiet.returncode) == ("", 0)


def test_a_terminal_without_unicode(tmp_path: Path) -> None:
    paths = pair(tmp_path, noisy(1000, 1))
    shown = Terminal("env", "PYTHONIOENCODING=ascii", "TERM=dumb", sys.executable, str(NETWEAVER), "--pcaps", *paths,
                     environment=dict(os.environ))
    assert shown.raw.isascii()
    assert "\x1b" not in shown.raw
    assert re.search(r"\d us +\d+  #+", shown.text)


@pytest.mark.parametrize(("microseconds", "text"), [
    (0.0004, "0 ns"), (0.25, "250 ns"), (1, "1 µs"), (12.345, "12.3 µs"), (999.4, "999 µs"), (999.7, "1000 µs"),
    (1234, "1.23 ms"), (-1500, "-1.5 ms"), (2_500_000, "2.5 s"), (3.6e9, "3600 s")])
def test_times_for_people(microseconds: float, text: str) -> None:
    assert netweaver.duration_text(microseconds) == text


@pytest.mark.parametrize("delays", [[5], [5, 5, 5], [-3, 0, 4], list(range(1000)), [1] * 500 + [10**9],
                                    [-10**9, 10**9]])
def test_a_histogram_shows_every_packet_once(delays: list[int]) -> None:
    lines = netweaver.histogram(delays, fancy=False)
    assert 1 <= len(lines) <= netweaver.BINS + 1
    assert sum(int(re.split(r" (?:[mµn]?s) +", line)[1].split()[0]) for line in lines) == len(delays)


@pytest.mark.parametrize(("command", "seconds"), [
    ("hping3 -c 1000 -S -L 0 -Q --fast 10.0.0.1", 101), ("hping3 -c 500 -S -i u2000 x", 2), ("hping3 -c 9 -1 x", 10),
    ("/usr/sbin/hping3 -c 10 -i 2 x", 21), ("ping -c 20 -i 0.01 x", 1.2), ("hping3 --faster -c 1000 x", 1.001),
    ("hping3 -c 5 --flood x", None), ("iperf3 -c 10.0.0.1", None), ("hping3 -S x", None)])
def test_how_long_a_command_takes(command: str, seconds: float | None) -> None:
    found = netweaver.expected_seconds(command)
    assert found == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.lab
def test_progress_at_a_terminal(lab: Lab) -> None:
    arguments = lab.arguments("-c", "1500", "--source-command", FAST, source=lab.source.address)
    shown = Terminal(*lab.on_client(PYTHON, str(NETWEAVER), *arguments), environment=lab.environment)
    assert shown.returncode == 0
    assert "Spawning packet captures...\n" in shown.text
    live = re.findall(r"(\d+) of about 2 s, (\d+) packets through the vif", shown.text)
    assert [int(seconds) for seconds, _ in live][:1] == [1]
    assert 200 < int(live[0][1]) < 1600
    assert "1500 packets matched of 1500" in shown.text
    assert json.loads(shown.stdout)["packets"]["matched"] == 1500


@pytest.mark.lab
def test_cron_hears_nothing_but_the_numbers(lab: Lab) -> None:
    done = lab.netweaver(*lab.arguments("-c", "600", "--source-command", FAST))
    assert report(done)["warnings"] == []
    assert done.stderr == ""


# -- files --

def numbers(found: dict[str, Any]) -> dict[str, Any]:
    """What must be the same again."""
    return {key: value for key, value in found.items() if key not in ("capture", "config", "saved", "warnings")}


def saved_pcaps(directory: str) -> list[str]:
    names = sorted(os.listdir(directory))
    return [",".join(os.path.join(directory, name) for name in names if name.startswith(side))
            for side in ("pif", "vif")]


@pytest.mark.lab
def test_a_saved_run_gives_the_same_numbers_again(lab: Lab, tmp_path: Path) -> None:
    """Also when other traffic came before and after the time in which both captures ran, and in both directions."""
    keep = str(tmp_path / "kept" / "runs")
    foreign = [subprocess.Popen(lab.source.command("hping3", "-S", "-i", "u300", address), stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL) for address in (lab.destination, f"{DATA}.200")]
    try:
        passive = ["-n", NAME, "--hv", lab.hv.address, "-d", lab.destination, "-k", str(lab.key), "--duration", "1",
                   "--save", keep, "--slowest", "3"]
        found = report(lab.netweaver(*passive))
        both = report(lab.netweaver(*passive, "--direction", "both"))
        out = report(lab.netweaver(*passive, "--direction", "out"))
    finally:
        for process in foreign:
            process.kill()
            process.wait()
    assert found["packets"]["matched"] > 500
    for one, more in ((found, []), (both, ["--direction", "both", "-d", lab.destination]),
                      (out, ["--direction", "out"])):
        again = analyzed("--pcaps", *saved_pcaps(one["saved"]), "--slowest", "3", *more)
        assert numbers(again) == numbers(one)
        assert json.loads(Path(one["saved"], "report.json").read_text()) == one
    assert len(os.listdir(keep)) == 3
    assert Path(found["saved"]).stat().st_mode & 0o777 == 0o777 & ~os.umask(os.umask(0o22))


@pytest.mark.lab
def test_runs_do_not_overwrite_each_other(lab: Lab, tmp_path: Path) -> None:
    arguments = lab.arguments("-c", "100", "--source-command", FAST, "--save", str(tmp_path), source=lab.source.address)
    processes = [lab.start(*arguments) for _ in range(4)]
    found = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert len({one["saved"] for one in found}) == 4
    assert sorted(os.listdir(tmp_path)) == sorted(os.path.basename(one["saved"]) for one in found)
    assert all(NAME in one["saved"] for one in found)


@pytest.mark.lab
def test_numbers_are_not_lost_when_they_can_not_be_saved(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = lab.netweaver(*lab.arguments("-c", "600", "--source-command", FAST, "--save", str(tmp_path / "file" / "x")))
    assert done.returncode == 2
    assert json.loads(done.stdout)["packets"]["matched"] == 1200
    assert done.stderr == f"netweaver: error: can't save in {tmp_path / 'file' / 'x'}: Not a directory\n"


def test_the_result_in_a_file(tmp_path: Path) -> None:
    paths, target = pair(tmp_path, noisy(1000, 1)), tmp_path / "result.json"
    done = offline("--pcaps", *paths, "--output", str(target))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads(target.read_text())["packets"]["matched"] == 1000
    assert target.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o22))
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    full = offline("--pcaps", *paths, "--output", "/dev/full")
    assert (full.returncode, full.stderr) == (2, "netweaver: error: can't write /dev/full: No space left on device\n")


@pytest.mark.parametrize("option", ["--output", "--csv", "--plot"])
def test_what_can_not_be_written_is_known_before(tmp_path: Path, option: str) -> None:
    done = offline("--pcaps", "none.pcap", "none.pcap", option, str(tmp_path / "none" / "x.png"))
    assert done.returncode == 2
    assert done.stderr.endswith(f"can't write {tmp_path}/none/x.png: no such directory\n")


# -- pictures --

@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture(tmp_path: Path, ending: str, magic: bytes) -> None:
    paths = pair(tmp_path, noisy(500, 1, loss=0.02))
    target = tmp_path / f"picture.{ending}"
    done = offline("--pcaps", *paths, "-d", "10.0.0.1", "--plot", str(target))
    assert done.returncode == 0, done.stderr
    assert target.read_bytes().startswith(magic)
    if ending == "svg":
        lost = json.loads(done.stdout)["packets"]["lost"]
        assert target.read_text().count("<use xlink:href") > 500
        assert lost > 0


def test_a_picture_of_both_directions(tmp_path: Path) -> None:
    paths = pair(tmp_path, noisy(50, 1))
    done = offline("--pcaps", *paths, "-d", "10.0.0.1", "--direction", "both", "--plot", str(tmp_path / "x.png"))
    assert done.returncode == 0, done.stderr         # though nothing went out
    assert (tmp_path / "x.png").exists()


def test_no_picture_of_another_kind_or_without_matplotlib(tmp_path: Path) -> None:
    done = offline("--pcaps", "a", "b", "--plot", "x.gif")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--plot x.gif: the name must end in .png, .svg or .pdf" in done.stderr
    (tmp_path / "matplotlib.py").write_text("raise ImportError(\"No module named 'matplotlib'\")")
    done = subprocess.run([sys.executable, str(NETWEAVER), "--pcaps", "a", "b", "--plot", "x.png"], capture_output=True,
                          text=True, check=False, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr == ("netweaver: error: --plot needs matplotlib (No module named 'matplotlib'): pip install "
                           "'netweaver[plot]', or pip install matplotlib\n")


# -- limits --

@pytest.mark.parametrize(("limit", "breached"), [
    ("p99>200", True), ("p99>0.5ms", False), ("median>100us", False), ("median>=100us", True), ("median<1ms", True),
    ("loss>0.1%", True), ("loss>50%", False), ("loss>0.2", True), ("lost>=250", True), ("lost>250", False),
    ("p99.9 > 299 µs", True), ("p99.9>299\u03bcs", True),
    ("maximum>300000ns", False), ("reordering>0", False), ("negative>0", False),
    ("matched<1000", True), ("ipdv<=1s", True), ("outbound.median>1", True), ("guest.p99<1", True)])
def test_limits(tmp_path: Path, limit: str, breached: bool) -> None:
    """What isn't known (here outbound and guest) meets every condition: a monitor must not be green for it."""
    paths = pair(tmp_path, [100_000] * 500 + [None] * 250 + [300_000] * 250)
    done = offline("--pcaps", *paths, "--fail-if", "median>1s", "--fail-if", limit)
    assert json.loads(done.stdout)["packets"]["lost"] == 250
    assert done.returncode == (7 if breached else 0)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("netweaver: warning: ")]
    assert lines == ([lines[0]] if breached else [])
    assert not breached or lines[0].startswith(f"netweaver: limit: {limit}: ")


@pytest.mark.parametrize("limit", ["p98>1", "p99", "p99>", "p99>x", "p99>1%", "loss>1ms", "p99=1", ">1", "p99>-1", "",
                                   "other.p99>1", "lost>1us", "p99>1e400x"])
def test_limits_that_are_none(limit: str) -> None:
    done = offline("--pcaps", "a", "b", "--fail-if", limit)
    assert done.returncode == 2
    assert f"--fail-if {limit!r}: give NAME>NUMBER" in done.stderr


# -- comparing --

def matching(delays: Sequence[int | None]) -> netweaver.Matching:
    made = netweaver.Matching()
    for rank, delay in enumerate(delays):
        made.sent.append(rank)
        made.delays.append(netweaver.LOST if delay is None else delay)
        if delay is not None:
            made.arrivals.append(rank)
    return made


@pytest.mark.parametrize(("size", "tries"), [(300, 5), (1000, 20), (10_000, 5)])
def test_equal_runs_are_not_distinguished_and_shifted_ones_are(size: int, tries: int) -> None:
    base = [matching(noisy(size, seed, loss=0.01)) for seed in range(tries)]
    equal = [netweaver.compare(base[i], matching(noisy(size, 100 + i, loss=0.01))) for i in range(tries)]
    shifted = [netweaver.compare(base[i], matching(noisy(size, 200 + i, 1.2, loss=0.01))) for i in range(tries)]
    assert sum(one["distinguishable"] for one in equal) <= tries // 20
    assert sum(one["median"]["distinguishable"] for one in shifted) >= tries - tries // 20
    for one in shifted:
        low, high = one["median"]["interval"]
        assert low < one["median"]["shift"] < high
        assert one["median"]["shift"] == pytest.approx(one["median"]["current"] - one["median"]["baseline"])
        assert (one["p99"]["interval"] is None) == (size < netweaver.ENOUGH_FOR_P99)
    covering = [one["median"]["interval"][0] <= 43.4 <= one["median"]["interval"][1] for one in shifted]
    assert sum(covering) >= tries - tries // 10      # the true shift is a fifth of about 217 µs


def test_a_comparison_sees_loss_and_a_longer_tail() -> None:
    base = matching(noisy(5000, 1))
    lossy = netweaver.compare(base, matching(noisy(5000, 2, loss=0.03)))
    assert lossy["loss_ratio"]["distinguishable"] is True
    assert lossy["median"]["distinguishable"] is False
    tail = [delay and delay * (3 if rank % 40 == 0 else 1) for rank, delay in enumerate(noisy(5000, 3))]
    longer = netweaver.compare(base, matching(tail))
    assert longer["p99"]["distinguishable"] is True
    assert longer["median"]["distinguishable"] is False
    assert netweaver.compare(base, matching(tail)) == longer


@pytest.mark.parametrize("size", [1, 2, 15])
def test_a_comparison_of_hardly_anything(size: int) -> None:
    found = netweaver.compare(matching([100] * size), matching([100] * size))
    assert found["distinguishable"] is False


def test_a_comparison_in_the_report(tmp_path: Path) -> None:
    before, after = pair(tmp_path, noisy(1000, 1), "before-"), pair(tmp_path, noisy(1000, 2, 1.5), "after-")
    found = analyzed("--pcaps", *after, "--baseline", ",".join(before))
    alone = [analyzed("--pcaps", *paths) for paths in (before, after)]
    comparison = found["comparison"]
    assert comparison["path"] == ",".join(before)
    assert [comparison["median"][side] for side in ("baseline", "current")] == [one["median"] for one in alone]
    assert [comparison["p99"][side] for side in ("baseline", "current")] == [
        one["percentiles"]["99"] for one in alone]
    assert comparison["distinguishable"] is True
    shown = Terminal(sys.executable, str(NETWEAVER), "--pcaps", *after, "--baseline", ",".join(before),
                     environment=dict(os.environ))
    assert re.search(r"different from .*: median \+\d+ µs \(\+\d+ µs to \+\d+ µs, changed\)", shown.text)


@pytest.mark.parametrize(("baseline", "code", "words"), [
    ("{0}", 2, "not a directory that --save made"), ("nothing", 2, "give a directory of --save, or two captures"),
    ("{0}/none.pcap,{0}/vif.pcap", 5, "none.pcap: can't read it"),
    ("{0}/pif.pcap,{0}/empty.pcap", 2, "no packet is in"),
])
def test_baselines_that_are_none(tmp_path: Path, baseline: str, code: int, words: str) -> None:
    paths = pair(tmp_path, noisy(100, 1))
    write(tmp_path / "empty.pcap", pcap([]))
    done = offline("--pcaps", *paths, "--baseline", baseline.format(tmp_path))
    assert done.returncode == code
    assert words in done.stderr


@pytest.mark.lab
@pytest.mark.alone
def test_a_shift_of_a_fifth_in_the_lab(tmp_path: Path) -> None:
    command = ("-c", "1000", "--source-command", FAST)
    with Lab(forwarder=["--delay", "2000", "--jitter", "400"]) as lab:
        base = report(lab.netweaver(*lab.arguments(*command, "--save", str(tmp_path))))["saved"]
        lab.truth()
        lab.start_forwarder(["--delay", "2400", "--jitter", "400"])
        found = report(lab.netweaver(*lab.arguments(*command, "--baseline", base)))
        lab.wait_clean()
    assert found["comparison"]["median"]["distinguishable"] is True
    assert found["comparison"]["median"]["shift"] == pytest.approx(400, abs=200)


# -- Prometheus --

def test_a_file_for_the_textfile_collector(tmp_path: Path) -> None:
    paths = pair(tmp_path, noisy(1000, 1, loss=0.01))
    found = analyzed("--pcaps", *paths)
    target = tmp_path / "netweaver.prom"
    done = offline("--pcaps", *paths, "--format", "prometheus", "--output", str(target), "--label", "rack=a\"b\\c\n",
                   "--label", "7 x=y")
    assert done.returncode == 0, done.stderr
    families = {family.name: family for family in text_string_to_metric_families(target.read_text())}
    assert all(family.type == "gauge" and family.documentation for family in families.values())
    samples = {(sample.name, sample.labels.get("statistic") or sample.labels.get("kind")): sample
               for family in families.values() for sample in family.samples}
    for name in ("average", "minimum", "maximum", "stdev", "median", "pdv", "ipdv"):
        assert samples["netweaver_delay_seconds", name].value == pytest.approx(found[name] / 1e6, rel=1e-12)
    for name, value in found["percentiles"].items():
        assert samples["netweaver_delay_seconds", f"p{name}"].value == pytest.approx(value / 1e6, rel=1e-12)
    for name, value in found["packets"].items():
        assert samples["netweaver_packets", name].value == value
    assert samples["netweaver_loss_ratio", None].value == found["loss_ratio"]
    labels = samples["netweaver_loss_ratio", None].labels
    assert (labels["rack"], labels["_7_x"], labels["direction"]) == ("a\"b\\c\n", "y", "in")


@pytest.mark.lab
def test_prometheus_of_a_whole_run(lab: Lab) -> None:
    done = lab.netweaver(*lab.arguments("-c", "600", "--source-command", FAST, "--direction", "both", "--format",
                                        "prometheus"))
    assert done.returncode == 0, done.stderr
    families = {family.name: family for family in text_string_to_metric_families(done.stdout)}
    ways = {sample.labels["direction"] for sample in families["netweaver_delay_seconds"].samples}
    assert ways == {"in", "out", "guest"}
    [started] = families["netweaver_measured_timestamp_seconds"].samples
    assert started.value > 1.7e9
    assert started.labels["name_label"] == NAME
