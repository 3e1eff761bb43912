"""Files for node_exporter's textfile collector."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import analyzed, failure, noisy, offline, pair, save_runs
from laboratory import wait_until
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

import netweaver

NODE_EXPORTER = shutil.which("prometheus-node-exporter") or shutil.which("node_exporter")


def samples(text: str) -> list[Sample]:
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation for family in families)
    return [sample for family in families for sample in family.samples]


def prometheus(*arguments: str) -> list[Sample]:
    """Return the series of a run that succeeds."""
    done = offline(*arguments, "--format", "prometheus")
    assert done.returncode == 0, done.stderr
    return samples(done.stdout)


def named(found: list[Sample], name: str, label: str) -> dict[str, float]:
    """Return the values of a family by one of its labels."""
    return {
        sample.labels[label]: sample.value for sample in found if sample.name == f"netweaver_{name}"
    }


def test_the_figures_of_the_document(tmp_path: Path) -> None:
    paths = pair(tmp_path, noisy(1000, 1, loss=0.01))
    document = analyzed("--pcaps", *paths)
    found = prometheus("--pcaps", *paths)
    delays = named(found, "delay_seconds", "statistic")
    for name in ("average", "minimum", "maximum", "stdev", "median", "pdv", "ipdv"):
        assert delays[name] == pytest.approx(document[name] / 1e6, rel=1e-12)
    for percent, value in document["percentiles"].items():
        assert delays[f"p{percent}"] == pytest.approx(value / 1e6, rel=1e-12)
    packets = named(found, "packets", "kind")
    assert packets == document["packets"]
    assert named(found, "loss_ratio", "direction") == {"in": document["loss_ratio"]}


def test_each_figure_has_a_series(tmp_path: Path) -> None:
    """A sample whose family has no help text would be left out."""
    found = prometheus("--pcaps", *pair(tmp_path, noisy(1000, 1, loss=0.01)))
    families = {sample.name for sample in found}
    for figure in netweaver.FIGURES:
        if figure.unit not in (netweaver.Unit.MICROSECONDS, netweaver.Unit.PACKETS):
            assert f"netweaver_{figure.name}_{figure.unit.value}" in families


def test_labels_of_every_series(tmp_path: Path) -> None:
    paths = pair(tmp_path, noisy(600, 1))
    label = 'a"b\\c\nd\x1b'
    found = prometheus("--pcaps", *paths, "--label", f"rack={label}", "--label", "7 x=y")
    for sample in found:
        assert sample.labels["direction"] == "in"
        assert sample.labels["traffic"] == ""
        assert sample.labels["_7_x"] == "y"
        assert sample.labels["rack"] == 'a"b\\c\nd\\x1b'


def test_no_series_twice(tmp_path: Path) -> None:
    paths = pair(tmp_path, noisy(600, 1))
    found = prometheus("--pcaps", *paths, "-d", "10.0.0.1", "--direction", "both")
    series = [(sample.name, *sorted(sample.labels.items())) for sample in found]
    assert len(set(series)) == len(series)


def run_info(direction: str = "in", **changes: Any) -> netweaver.RunInfo:
    selection = netweaver.Selection(netweaver.DIRECTIONS[direction])
    info = netweaver.RunInfo(pif="eth0", vif="vif5.0", selection=selection, measured=True)
    info.hypervisor = "root@hv1:2222"
    info.name_label = "web1"
    info.destination = "10.0.0.1"
    info.sources = ["root@10.0.0.2"]
    return replace(info, **changes)


SYN = netweaver.Traffic("syn")
UDP = netweaver.Traffic("udp")


def test_two_measurements_of_a_vm_share_no_series() -> None:
    measurements = [
        run_info(traffic=SYN),
        run_info(traffic=UDP),
        run_info(traffic=None),
        run_info("out", traffic=SYN),
        run_info("both", traffic=SYN),
        run_info(traffic=SYN, sources=["10.0.0.3"]),
        run_info(traffic=replace(SYN, port=80)),
        run_info(traffic=replace(SYN, port=443)),
        run_info(traffic=replace(SYN, command="hping3 -S {destination}")),
        run_info(traffic=replace(SYN, command="hping3 -A {destination}")),
        run_info(traffic=replace(SYN, load="iperf3 -c 10.0.0.1")),
        run_info(traffic=replace(SYN, load="iperf3 -u -c 10.0.0.1")),
    ]
    series: list[frozenset[tuple[str, str]]] = []
    for measurement in measurements:
        for sample in samples(netweaver.prometheus(measurement, 3)):
            series.append(frozenset({("name", sample.name), *sample.labels.items()}))
    assert len(set(series)) == len(series) == 2 * len(measurements)


@pytest.fixture
def exporter(tmp_path: Path) -> Iterator[str]:
    """Return the address of a node_exporter that serves the files in a directory."""
    if not NODE_EXPORTER and os.environ.get("NETWEAVER_REQUIRE_LAB") != "1":
        pytest.skip("prometheus-node-exporter is not installed")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    command = [
        NODE_EXPORTER or "prometheus-node-exporter",
        f"--web.listen-address={address}",
        "--collector.disable-defaults",
        "--collector.textfile",
        f"--collector.textfile.directory={tmp_path}",
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: answers(address), "node_exporter")
            yield address
        finally:
            process.kill()


def answers(address: str) -> bool:
    host, _, port = address.partition(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) == 0


def test_node_exporter_serves_two_measurements_of_a_vm(exporter: str, tmp_path: Path) -> None:
    directory = tmp_path / "captures"
    directory.mkdir()
    paths = pair(directory, noisy(600, 1, loss=0.1))
    inward = analyzed("--pcaps", *paths)
    both = analyzed("--pcaps", *paths, "-d", "10.0.0.1", "--direction", "both")
    texts = [
        netweaver.prometheus(run_info(traffic=SYN), 0, inward),
        netweaver.prometheus(run_info(traffic=UDP), 0, inward),
        netweaver.prometheus(run_info(traffic=None), 0, inward),
        netweaver.prometheus(run_info("both", traffic=SYN), 7, both),
        netweaver.prometheus(run_info("out", traffic=SYN), 3),
        netweaver.prometheus(run_info(traffic=replace(SYN, port=80)), 0, inward),
        netweaver.prometheus(run_info(traffic=replace(SYN, port=443)), 3),
    ]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.prom").write_text(text)
    with urllib.request.urlopen(f"http://{exporter}/metrics", timeout=10) as answer:
        served = samples(answer.read().decode())
    [error] = [sample.value for sample in served if sample.name == "node_textfile_scrape_error"]
    assert error == 0
    assert values(served) == values(samples("".join(texts)))


def values(found: list[Sample]) -> dict[frozenset[tuple[str, str]], float]:
    """Return the values of netweaver's series; node_exporter adds empty labels to some."""
    return {
        frozenset({("name", sample.name), *((k, v) for k, v in sample.labels.items() if v)}): (
            sample.value
        )
        for sample in found
        if sample.name.startswith("netweaver_")
    }


def test_a_failure_has_the_labels_of_a_success(tmp_path: Path) -> None:
    target = tmp_path / "x.prom"
    done = offline(
        *("-n", "web1", "--hv", "127.0.0.1:1", "-s", "root@127.0.0.1:1", "-d", "localhost"),
        *("--format", "prometheus", "--output", str(target), "--traffic", "udp"),
    )
    assert done.returncode == 3
    [success] = [s for s in samples(target.read_text()) if s.name == "netweaver_success"]
    assert success.value == 0
    assert success.labels == {
        "hypervisor": "127.0.0.1",
        "name_label": "web1",
        "destination": "127.0.0.1",
        "source": "127.0.0.1",
        "traffic": "udp-100",
        "measured": "in",
        "direction": "in",
    }


@pytest.mark.parametrize("source", ["", "root@", "10.0.0.2:99999", "10.0.0.2 10.0.0.3"])
def test_a_source_that_is_no_host_is_a_failure(source: str, tmp_path: Path) -> None:
    """Such as an unset variable of a script: the file must not go on showing a success."""
    target = tmp_path / "x.prom"
    target.write_text("netweaver_success 1\n")
    done = offline(
        *("-n", "web1", "--hv", "127.0.0.1:1", "-s", source, "-d", "10.0.0.1"),
        *("--format", "prometheus", "--output", str(target)),
    )
    assert done.returncode == 2
    [success] = [s for s in samples(target.read_text()) if s.name == "netweaver_success"]
    assert success.value == 0


def test_a_dry_run_that_fails_is_no_failed_measurement(tmp_path: Path) -> None:
    target = tmp_path / "x.prom"
    target.write_text("netweaver_success 1\n")
    done = offline(
        *("-n", "web1", "--hv", "127.0.0.1:1", "-s", "127.0.0.1:1", "-d", "10.0.0.1"),
        *("--format", "prometheus", "--output", str(target), "--dry-run"),
    )
    assert done.returncode == 3
    assert target.read_text() == "netweaver_success 1\n"


def test_only_one_series_knows_interfaces_and_logins(tmp_path: Path) -> None:
    """After a restart the VM has other interfaces, and its series go on."""
    document = analyzed("--pcaps", *pair(tmp_path, noisy(600, 1)))
    found = samples(netweaver.prometheus(run_info(traffic=SYN), 0, document))
    [info] = [sample for sample in found if sample.name == "netweaver_info"]
    assert (info.labels["vif"], info.labels["pif"]) == ("vif5.0", "eth0")
    assert info.labels["login"] == "root@hv1:2222"
    for sample in found:
        assert sample.labels["hypervisor"] == "hv1"
        assert sample is info or not {"vif", "pif", "login"} & set(sample.labels)


@pytest.mark.parametrize("label", ["le", "direction", "hypervisor", "traffic", "kind", "__x"])
def test_labels_that_collide(label: str, tmp_path: Path) -> None:
    paths = pair(tmp_path, noisy(20, 1))
    arguments = ("--pcaps", *paths, "--label", f"{label}=x")
    assert f"--label {label}" in failure(offline(*arguments, "--format", "prometheus"), 2)
    assert offline(*arguments).returncode == 0


def test_labels_of_one_name_in_prometheus() -> None:
    arguments = ("--pcaps", "a", "b", "--label", "a-b=1", "--label", "a.b=2")
    assert "a_b" in failure(offline(*arguments, "--format", "prometheus"), 2)


def test_the_exit_code_of_a_broken_limit(tmp_path: Path) -> None:
    paths = pair(tmp_path, noisy(600, 1))
    done = offline("--pcaps", *paths, "--format", "prometheus", "--fail-if", "median>1")
    assert done.returncode == 7
    found = samples(done.stdout)
    assert named(found, "exit_code", "direction") == {"in": 7}
    assert named(found, "success", "direction") == {"in": 1}


def test_the_exit_code_of_another_output_that_fails(tmp_path: Path) -> None:
    paths = pair(tmp_path, noisy(600, 1))
    done = offline("--pcaps", *paths, "--format", "prometheus", "--csv", "/dev/full")
    assert done.returncode == 2
    assert named(samples(done.stdout), "exit_code", "direction") == {"in": 2}


def test_several_runs_are_refused(tmp_path: Path) -> None:
    save_runs(tmp_path, "web1", runs=2)
    done = offline("--pcaps", str(tmp_path), "--format", "prometheus")
    assert done.returncode == 2
    assert "several runs" in done.stderr
    live = ("-n", "web1", "--hv", "hv", "-s", "local", "-d", "192.0.2.1", "--runs", "2")
    done = offline(*live, "--format", "prometheus")
    assert done.returncode == 2
    assert "several runs" in done.stderr
