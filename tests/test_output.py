"""For people and for cron: what is on the terminal and what isn't, files, pictures, limits, comparisons, Prometheus."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from frames import pcap, write
from helpers import FAST, Terminal, analyzed, failure, finished, noisy, offline, pair, report, sending
from lab import DATA, NAME, NETWEAVER, PYTHON, Lab, wait_until
from prometheus_client.parser import text_string_to_metric_families

import netweaver

# -- at a terminal --

def test_a_summary_for_people(tmp_path: Path) -> None:
    delays = noisy(990, 1) + [None] * 10
    paths = pair(tmp_path, delays)
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    shown = Terminal(sys.executable, str(NETWEAVER), "--pcaps", *paths, environment=environment)
    assert shown.returncode == 0
    assert json.loads(shown.stdout)["packets"]["lost"] == 10
    assert shown.text.startswith("captures\n pif pif.pcap, vif vif.pcap\n")
    assert re.search(r"\nPackets +seen matched +lost .*\n in +1000 +990 +10 +1 % +0 +0 +0 +0 +0\n", shown.text)
    assert re.search(r"\nDelay +median average .*\n in +\d+ µs +\d+ µs +[\d.]+ µs ", shown.text)
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


@pytest.mark.lab
def test_progress_at_a_terminal(lab: Lab) -> None:
    arguments = lab.arguments("-c", "1500", "--source-command", FAST, source=lab.source.address)
    shown = Terminal(*lab.on_client(PYTHON, str(NETWEAVER), *arguments), environment=lab.environment)
    assert shown.returncode == 0
    assert "Spawning packet captures...\n" in shown.text
    assert re.search(r"(?m)^1 s", shown.text.replace("\r", "\n"))
    assert re.search(r"\n in +1500 +1500 +0 +0 % ", shown.text)
    assert json.loads(shown.stdout)["packets"]["matched"] == 1500


@pytest.mark.lab
def test_cron_hears_nothing_but_the_numbers(lab: Lab) -> None:
    done = lab.netweaver(*lab.arguments("-c", "600", "--source-command", FAST))
    assert report(done)["warnings"] == []
    assert done.stderr == ""


# -- files --

def kept(found: dict[str, Any]) -> dict[str, Any]:
    """All of a document but where it was kept."""
    return {key: value for key, value in found.items() if key != "saved"}


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
    for one in (found, both, out):
        for paths in ([one["saved"]], saved_pcaps(one["saved"])):
            assert analyzed("--pcaps", *paths, "--slowest", "3") == kept(one)
        assert json.loads(Path(one["saved"], "report.json").read_text()) == one
    assert len(os.listdir(keep)) == 3
    assert Path(found["saved"]).stat().st_mode & 0o777 == 0o777 & ~os.umask(os.umask(0o22))


@pytest.mark.lab
def test_runs_do_not_overwrite_each_other(lab: Lab, tmp_path: Path) -> None:
    processes = [lab.start(*lab.arguments(           # from other ports: hping3s of the same second send the same
        "-c", "100", "--source-command", f"{FAST} -s {10_000 * number}", "--save", str(tmp_path),
        source=lab.source.address)) for number in range(1, 5)]
    found = [report(finished(process, 60)) for process in processes]
    assert len({one["saved"] for one in found}) == 4
    assert sorted(os.listdir(tmp_path)) == sorted(os.path.basename(one["saved"]) for one in found)
    assert all(NAME in one["saved"] for one in found)


@pytest.mark.lab
def test_numbers_are_not_lost_when_they_can_not_be_saved(lab: Lab, tmp_path: Path) -> None:
    """A file takes the directory's place while traffic runs."""
    process = lab.start(*lab.arguments("-c", "1500", "--source-command", FAST, "--save", str(tmp_path / "x" / "y")))
    wait_until(lambda: sending(lab), "the traffic")
    (tmp_path / "x").write_text("")
    done = finished(process)
    assert report(done, 2)["packets"]["matched"] == 3000
    assert done.stderr == f"netweaver: error: can't save in {tmp_path}/x/y: Not a directory\n"


def test_the_result_in_a_file(tmp_path: Path) -> None:
    paths, target = pair(tmp_path, noisy(1000, 1)), tmp_path / "result.json"
    done = offline("--pcaps", *paths, "--output", str(target))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads(target.read_text())["packets"]["matched"] == 1000
    assert target.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o22))
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    full = offline("--pcaps", *paths, "--output", "/dev/full")
    assert (full.returncode, full.stderr) == (2, "netweaver: error: can't write /dev/full: No space left on device\n")


@pytest.mark.parametrize("option", ["--output", "--csv"])
def test_existing_files_links_and_devices(tmp_path: Path, option: str) -> None:
    """What is written goes where the name leads, and a file keeps its mode."""
    paths, real, link = pair(tmp_path, noisy(20, 1)), tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    (tmp_path / "hop").symlink_to("real")
    link.symlink_to(tmp_path / "hop")
    assert offline("--pcaps", *paths, option, str(link)).returncode == 0
    assert link.is_symlink() and real.read_text() != "old" and real.read_text().endswith("\n")
    assert real.stat().st_mode & 0o777 == 0o640
    os.mkfifo(tmp_path / "fifo")
    reader = subprocess.Popen(["cat", str(tmp_path / "fifo")], stdout=subprocess.PIPE, text=True)
    assert offline("--pcaps", *paths, option, str(tmp_path / "fifo")).returncode == 0
    assert reader.communicate(timeout=20)[0] == real.read_text()
    assert (tmp_path / "fifo").is_fifo()


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "-"])
def test_a_table_on_standard_output(tmp_path: Path, name: str) -> None:
    """After the document, be it a pipe or a file; and the device is there afterwards, as it was."""
    paths, before = pair(tmp_path, noisy(20, 1)), os.lstat("/dev/stdout")
    with open(tmp_path / "out", "w") as out:
        done = subprocess.run([sys.executable, str(NETWEAVER), "--pcaps", *paths, "--csv", name], stdout=out,
                              check=False)
    assert done.returncode == 0
    for text in ((tmp_path / "out").read_text(), offline("--pcaps", *paths, "--csv", name).stdout):
        document, head, *rows = text.splitlines()
        assert json.loads(document)["packets"]["pif"] == len(rows) == 20
        assert head.startswith("time,source,")
    assert (os.lstat("/dev/stdout").st_ino, os.lstat("/dev/stdout").st_mode) == (before.st_ino, before.st_mode)


def shell(redirection: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """netweaver with its streams redirected by a shell."""
    return subprocess.run(["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, str(NETWEAVER), *arguments],
                          capture_output=True, text=True, check=False, timeout=60, env={**os.environ, **environment})


def test_standard_output_that_takes_nothing(tmp_path: Path) -> None:
    """One clear line; but for a reader that has gone, who is told nothing."""
    paths = pair(tmp_path, noisy(1000, 1))
    for redirection, words in ((">/dev/full", "No space left on device"),
                               (">&-", "it is closed (--output names a file)")):
        done = shell(redirection, "--pcaps", *paths)
        assert (done.returncode, done.stderr) == (2, f"netweaver: error: can't write standard output: {words}\n")
        target = tmp_path / "result.json"
        assert shell(redirection, "--pcaps", *paths, "--output", str(target)).returncode == 0
        assert json.loads(target.read_text())["packets"]["matched"] == 1000
        target.unlink()
    for arguments in (["--pcaps", *paths], ["--help"]):
        quoted = " ".join(f"'{word}'" for word in (sys.executable, str(NETWEAVER), *arguments))
        done = subprocess.run(["bash", "-c", f"{quoted} | true; echo ${{PIPESTATUS[0]}}"], capture_output=True,
                              text=True, check=False, timeout=60)
        assert done.stderr == ""
        assert done.stdout.strip() in ("0", "141")   # it may have been quicker than the reader


def test_standard_error_that_is_closed(tmp_path: Path) -> None:
    """Errors and warnings don't go to standard output instead."""
    paths = pair(tmp_path, noisy(100, 1))
    for redirection in ("2>&-", "2>/dev/full"):
        done = shell(redirection, "--pcaps", "none", "none")
        assert (done.returncode, done.stdout) == (5, "")
        done = shell(redirection, "--pcaps", *paths, "--fail-if", "median>1")
        assert json.loads(done.stdout)["packets"]["matched"] == 100
        assert done.returncode == 7


@pytest.mark.parametrize("name", ["$a^b_{c", "${x", "é\udcff", "µ", "a$b$c", "x\ny"], ids=range(6))
@pytest.mark.parametrize("locale", ["C", "POSIX", "C.UTF-8"])
def test_names_that_are_hard_to_write(tmp_path: Path, name: str, locale: str) -> None:
    """Neither a locale nor matplotlib's formulas lose the numbers."""
    directory = tmp_path / name.replace("\n", " ")
    directory.mkdir()
    paths = pair(directory, noisy(100, 1, loss=0.05))
    arguments = ("--pcaps", *paths, "--label", f"name={name}", "--plot", str(directory / "x.svg"), "--csv",
                 str(directory / "x.csv"), "--format", "prometheus", "--output", str(directory / "x.prom"))
    plain = {"LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = shell("", *arguments, **plain)
    assert done.returncode == 0, done.stderr
    assert 'statistic="median"' in (directory / "x.prom").read_text(encoding="utf-8")
    assert "delay" in (directory / "x.svg").read_text(encoding="utf-8")
    done = shell("", "--pcaps", *paths, "--label", f"name={name}", **plain)
    found = json.loads(done.stdout)["config"]["labels"]["name"]
    assert found.encode("utf-8", "surrogateescape") == name.encode("utf-8", "surrogateescape")       # as it was typed


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
                           "matplotlib\n")


# -- limits --

@pytest.mark.parametrize(("limit", "breached"), [
    ("p99>200", True), ("p99>0.5ms", False), ("median>100us", False), ("median>=100us", True), ("median<1ms", True),
    ("loss>0.1%", True), ("loss>50%", False), ("loss>0.2", True), ("lost>=250", True), ("lost>250", False),
    ("p99.9 > 299 µs", True), ("p99.9>299\u03bcs", True),
    ("maximum>300000ns", False), ("reordering>0", False), ("negative>0", False),
    ("matched<1000", True), ("ipdv<=1s", True), ("p50>99", True), ("avg>160", True), ("min<99", False),
    ("max>299", True), ("undecided>0", False), ("ambiguous>0", False)])
def test_limits(tmp_path: Path, limit: str, breached: bool) -> None:
    paths = pair(tmp_path, [100_000] * 500 + [None] * 250 + [300_000] * 250)
    done = offline("--pcaps", *paths, "--fail-if", "median>1s", "--fail-if", limit)
    assert json.loads(done.stdout)["packets"]["lost"] == 250
    assert done.returncode == (7 if breached else 0)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("netweaver: warning: ")]
    assert lines == ([lines[0]] if breached else [])
    assert not breached or lines[0].startswith(f"netweaver: limit: {limit}: ")


def test_a_limit_is_told_in_the_unit_that_was_asked_for(tmp_path: Path) -> None:
    paths = pair(tmp_path, [100_000] * 985 + [None] * 15)
    done = offline("--pcaps", *paths, *(word for limit in ("loss>1%", "loss>0.01", "median>50", "median>0.05ms")
                                        for word in ("--fail-if", limit)))
    assert [line.split(": ", 2)[2] for line in done.stderr.splitlines() if "limit" in line] == [
        "loss>1%: it is 1.5 %", "loss>0.01: it is 0.015", "median>50: it is 100 µs", "median>0.05ms: it is 0.1 ms"]


def test_what_is_not_known_meets_every_condition(tmp_path: Path) -> None:
    """A monitor must not be green for it."""
    done = offline("--pcaps", *pair(tmp_path, [1000] * 600), "-d", "10.0.0.1", "--direction", "both", "--fail-if",
                   "outbound.median>1", "--fail-if", "guest.p99<1", "--fail-if", "median>5")
    assert done.returncode == 7
    assert "limit: outbound.median>1: not known\n" in done.stderr
    assert "limit: guest.p99<1: not known\n" in done.stderr
    assert "limit: median" not in done.stderr


@pytest.mark.parametrize(("limit", "words"), [
    ("p98>1", "there is no figure 'p98'; there are average, "), ("p99", "give NAME>NUMBER"), ("p99>", "give NAME>"),
    ("p99>x", "give NAME>NUMBER"), ("p99>1%", "'%' is no unit of p99 (ns, us, µs, ms, s)"),
    ("loss>1ms", "'ms' is no unit of loss (%)"), ("p99=1", "give NAME>"), (">1", "give NAME>"), ("", "give NAME>"),
    ("other.p99>1", "there is no part 'other'"), ("lost>1us", "'us' is no unit of lost (it has none)"),
    ("loss>5", "loss is at most 1, or 100 %: do you mean 5%?"), ("loss>101%", "loss is at most 1, or 100 %"),
    ("guest.p99>1", "guest is known with --direction both alone"), ("outbound.loss>1%", "outbound is known with"),
])
def test_limits_that_are_none(limit: str, words: str) -> None:
    """Known before anything runs, and what is wrong with them."""
    line = failure(offline("--pcaps", "a", "b", "--fail-if", limit), 2)
    assert f"--fail-if {limit!r}: {words}" in line
    assert len(line) < 320


# -- comparing --

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
    assert re.search(r"\nDifferent: 25 against 25 blocks, .*\n median +\+\d+ µs +\(\+\d+ µs to \+\d+ µs\), "
                     r"changed\n", shown.text)


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
    assert all(family.documentation for family in families.values())
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
