"""The command line, as far as it goes without a host."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import failure, noisy, offline, pair, run_main

import netweaver

HOSTS = ["--hv", "hv", "-s", "192.0.2.1", "-d", "192.0.2.2"]
COMPLETE = ["-n", "web1", *HOSTS]
FILES = ["--pcaps", "pif.pcap", "vif.pcap"]


def usage_error(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the error of a command line that is refused: one line, and nothing else."""
    done = run_main(capfd, *arguments)
    assert done.code == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("netweaver: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "missing: --hv, -s, -d"),
        (HOSTS, "Give its name with -n, or its interface with --vif"),
        ([*COMPLETE, "--nonsense"], "unrecognized arguments: --nonsense"),
        ([*COMPLETE, "--stagse"], "did you mean --stages?"),
        ([*COMPLETE, "--name"], "did you mean --name-label?"),
        ([*COMPLETE, "-c", "0"], "'0' is not a whole number"),
        ([*COMPLETE, "-c", "99999999999"], "from 1 to 999999999"),
        ([*COMPLETE, "--runs", "1e9"], "from 1 to 99999"),
        ([*COMPLETE, "-c", "1e9"], "from 1 to 999999999"),
        ([*COMPLETE, "--rate", "100,x"], "'x' is not a whole number"),
        ([*COMPLETE, "--traffic", "syn,sctp"], "'sctp' is not one of syn, flow, udp, ping"),
        ([*COMPLETE, "--toolstack", "vmware"], "'vmware' is not one of auto"),
        ([*COMPLETE, "--direction", "up"], "'up' is not one of in, out, both"),
        ([*COMPLETE, "--num", "x"], "'x' is not a whole number from 0 to 9999"),
        ([*COMPLETE, "--port", "65536"], "0 to 65535"),
        ([*COMPLETE, "--duration", "nan"], "'nan' is not a time"),
        ([*COMPLETE, "--label", "=x"], "'=x' is not KEY=VALUE"),
        ([*COMPLETE, "-i", "eth0; reboot"], "is not the name of a network interface"),
        ([*COMPLETE, "-i", "-w/etc/passwd"], "expected one argument"),
        ([*COMPLETE, "--interface=-w/etc"], "is not the name of a network interface"),
        (["-n", "web1", "--hv", "hv:0", *HOSTS[2:]], "'hv:0' is not [user@]host[:port]"),
        (["-n", "web1", "--hv", "-oProxyCommand=id", *HOSTS[2:]], "expected one argument"),
        (["-n", "web1", "--hv=-oProxyCommand=id", *HOSTS[2:]], "is not [user@]host[:port]"),
        ([*COMPLETE, "--hv", "root@büro.example:22"], "--hv: root@büro.example:22: give the name"),
        ([*COMPLETE, "-s", "büro.example"], "(xn--bro-hoa.example)"),
        ([*COMPLETE, "-o", "ProxyJump=a,b@büro.example:22"], "(xn--bro-hoa.example:22)"),
        ([*COMPLETE, "-s", "10.0.0.0/24"], "-s 10.0.0.0/24: this is a network"),
        ([*COMPLETE, "-s", "a,,b"], "--source is empty"),
        ([*COMPLETE, "-s", "a b"], "-s: 'a b' is not [user@]host[:port]"),
        (["--pcaps", "", "vif.pcap"], "--pcaps is empty"),
        ([*COMPLETE, "-d", "no such host"], "-d: can't resolve 'no such host'"),
        ([*COMPLETE, "-d", "10.0.0"], "-d: can't resolve '10.0.0'"),
        ([*COMPLETE, "-d", "10.0.0.0/24"], "-d 10.0.0.0/24: this is a network"),
        ([*COMPLETE, "-d", "root@10.0.0.2"], "swap -s and -d"),
        ([*COMPLETE, "-d", "büro.example"], "xn--bro-hoa.example"),
        ([*FILES, "-d", "10.0.0.0/24"], "this is a network"),
        ([*FILES, "-d", "büro.example"], "xn--bro-hoa.example"),
        ([*FILES, "-s", "no.such.host.invalid"], "-s: can't resolve 'no.such.host.invalid'"),
        ([*COMPLETE, "--save", ""], "--save is empty"),
        ([*COMPLETE, "--filter", " "], "--filter is empty"),
        ([*COMPLETE, "-d", ""], "--destination is empty"),
        ([*COMPLETE, "--output", "/tmp/a", "--csv", "/tmp/../tmp/a"], "can't both be written"),
        (["--pcaps", "a", "b", "c"], "--pcaps takes a directory made by --save, or two captures"),
        (["--pcaps", "/", "/"], "--pcaps takes one directory"),
        (["--pcaps", "a"], "a: no such directory"),
        ([*COMPLETE, "--save", "/dev/null"], "/dev/null: Not a directory"),
        ([*COMPLETE, "--save", "/dev/null/x"], "/dev/null/x: Not a directory"),
        ([*COMPLETE, "--source-command", ""], "--source-command is empty"),
        ([*COMPLETE, "--source-command", "x", "--traffic", "syn"], "--traffic"),
        ([*COMPLETE, "--source-command", "x", "--load", "y"], "--load"),
        ([*COMPLETE, "--slowest", "5"], "--csv"),
        ([*COMPLETE, "--stages-buffer", "5"], "removed"),
        ([*COMPLETE, "--fail-if", "slower"], "requires --baseline"),
        ([*COMPLETE, "--keep", "5"], "--keep requires --save"),
        (
            ["-n", "a", "--hv", "hv", "-d", "192.0.2.2", "--duration", "5", "--load", "x"],
            "--load requires -s",
        ),
    ],
)
def test_usage_errors_are_one_line(
    capfd: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert words in usage_error(capfd, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--hv", "hv"],
        ["--name-label", "web1"],
        ["--count", "5"],
        ["--duration", "5"],
        ["--sudo"],
        ["--save", "x"],
        ["--wait", "2"],
        ["--interface", "eth1"],
        ["--runs", "1"],
    ],
)
def test_options_of_a_measurement_are_refused_with_pcaps(
    capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    error = usage_error(capfd, "--pcaps", "a", "b", *arguments)
    assert f"{arguments[0]} can't be used with --pcaps" in error


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["-c", "1k"], "count", 1000),
        (["-c", "1e6"], "count", 1_000_000),
        (["--rate", "100, 1k"], "rates", [100, 1000]),
        (["--rate", "100", "--rate", "200"], "rates", [100, 200]),
        (["--duration", "5m"], "duration", 300),
        (["--duration", "1.5h"], "duration", 5400),
        (["--wait", "0.5s"], "wait", 0.5),
        (["--traffic", "tcp, icmp"], "traffic", ["syn", "ping"]),
        (["--traffic", "UDP"], "traffic", ["udp"]),
        (["--direction", "Both"], "direction", "both"),
        (["--output", "/dev/null", "--csv", "/dev/null"], "csv", "/dev/null"),
        (["-i", "eth0, eth1", "-i", "eth2"], "interfaces", ["eth0", "eth1", "eth2"]),
        (["--toolstack", "KVM"], "toolstack", "virsh"),
        (["--toolstack", "proxmox"], "toolstack", "qm"),
        (["--label", "rack=7=8"], "labels", [("rack", "7=8")]),
    ],
)
def test_values_as_people_write_them(arguments: list[str], name: str, value: object) -> None:
    options = netweaver.parse_options([*COMPLETE, *arguments])
    assert getattr(options, name) == value


@pytest.mark.parametrize(
    "arguments",
    [
        ["--load", "iperf3 -c 192.0.2.2"],
        ["--source-command", "hping3 {destination}"],
        ["--traffic", "udp"],
        ["--rate", "1000"],
        ["--size", "0"],
        ["--port", "0"],
    ],
)
def test_options_of_traffic_require_a_source(
    capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    passive = ["-n", "web1", "--hv", "hv1", "-d", "192.0.2.2", "--duration", "5"]
    assert f"{arguments[0]} requires -s" in usage_error(capfd, *passive, *arguments)


def test_existing_ipv6_traffic_can_be_measured() -> None:
    """hping3, which has no IPv6, sends nothing here."""
    done = offline("-n", "web1", "--hv", "127.0.0.1:1", "-d", "::1", "--duration", "5")
    assert "127.0.0.1:1: " in failure(done, 3)


def test_automatic_and_named_interfaces(capfd: pytest.CaptureFixture[str]) -> None:
    """One of the two would be ignored."""
    assert "-i auto can't be used with" in usage_error(capfd, *COMPLETE, "-i", "auto,eth1")


def test_several_sources_in_one_argument() -> None:
    options = netweaver.parse_options([*COMPLETE, "-s", "a, root@b:22"])
    assert options.sources == ["192.0.2.1", "a", "root@b:22"]


def test_a_monitor_sees_a_usage_error(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "web1.prom"
    monitor = ["--format", "prometheus", "--output", str(output), "--label", "rack=7"]
    monitor += ["--direction", "out", "--traffic", "udp", "--rate", "1k", "--size", "99"]
    assert "'x' is not" in usage_error(capfd, *COMPLETE, *monitor, "-c", "x")
    series = output.read_text()
    assert 'traffic="udp-1000-99B"' in series
    assert 'measured="out"' in series
    assert re.search(r'^netweaver_success\{.*rack="7".*\} 0$', series, re.MULTILINE)
    assert re.search(r'^netweaver_exit_code\{.*name_label="web1".*\} 2$', series, re.MULTILINE)


def test_json_is_a_format() -> None:
    assert netweaver.parse_options([*COMPLETE, "--json"]).format == "json"


def test_help_has_groups_examples_and_exit_codes(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        netweaver.main(["--help"])
    assert ended.value.code == 0
    text = capfd.readouterr().out
    for words in ("target:", "traffic:", "examples:", "exit codes:", "-k KEYFILE"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", netweaver.FORMATS)
def test_each_format_writes_the_result(tmp_path: Path, name: str) -> None:
    done = offline("--pcaps", *pair(tmp_path, noisy(100, 1)), "--format", name)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 100


def test_the_help_names_the_choices() -> None:
    text = " ".join(offline("--help").stdout.split())
    assert f"{{{','.join(netweaver.FORMATS)}}}" in text
    for title in (toolstack.title for toolstack in netweaver.TOOLSTACKS.values()):
        assert title in text
