"""Limits: conditions of --fail-if, those that are met, and those that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import analyzed, failure, offline, pair

import netweaver


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the document on 500 packets of 100 µs, 250 of 300 µs and 250 lost ones."""
    delays: list[int | None] = [100_000] * 500
    delays += [None] * 250
    delays += [300_000] * 250
    return analyzed("--pcaps", *pair(tmp_path_factory.mktemp("limits"), delays))


def breach(text: str, document: dict[str, Any]) -> str | None:
    return netweaver.parse_limit(text, "in", stages=False).breach(document)


MET = [
    "p99>200",
    "median>=100us",
    "median<1ms",
    "MEDIAN<1MS",
    "in.median<1ms",
    "loss>0.1%",
    "loss>0.2",
    "lost>=250",
    "p99.9 > 299 µs",
    "p99.9>299\u03bcs",
    "matched<1000",
    "ipdv<=1s",
    "p50>99",
    "avg>160",
    "max>299",
]
NOT_MET = [
    "p99>0.5ms",
    "median>100us",
    "loss>50%",
    "lost>250",
    "maximum>300000ns",
    "reordering>0",
    "negative>0",
    "min<99",
    "undecided>0",
    "ambiguous>0",
]


@pytest.mark.parametrize("text", MET)
def test_limits_that_are_met(text: str, document: dict[str, Any]) -> None:
    message = breach(text, document)
    assert message is not None
    assert message.endswith(f"(limit {text.lower()})")


@pytest.mark.parametrize("text", NOT_MET)
def test_limits_that_are_not_met(text: str, document: dict[str, Any]) -> None:
    assert breach(text, document) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("loss>1%", "loss is 33.3333 %"),
        ("loss>0.01", "loss is 0.333333"),
        ("median>50", "median is 100 µs"),
        ("median>0.05ms", "median is 0.1 ms"),
    ],
)
def test_the_unit_of_a_limit_is_that_of_its_message(text: str, value: str, tmp_path: Path) -> None:
    delays: list[int | None] = [100_000] * 300
    delays += [None] * 300
    delays += [100_000] * 300
    document = analyzed("--pcaps", *pair(tmp_path, delays))
    assert breach(text, document) == f"{value} (limit {text})"


@pytest.mark.parametrize("limit", ["median>1us", "median>1s"])
def test_the_exit_code(limit: str, tmp_path: Path) -> None:
    arguments = ("--pcaps", *pair(tmp_path, [100_000] * 600), "-d", "10.0.0.1")
    done = offline(*arguments, "--fail-if", "lost>5", "--fail-if", limit)
    assert done.returncode == (7 if limit == "median>1us" else 0)
    lines = done.stderr.splitlines()
    assert len(lines) == (done.returncode == 7)
    if lines:
        assert lines[0] == "netweaver: limit: 10.0.0.1: median is 100 µs (limit median>1us)"


@pytest.mark.parametrize("limit", ["outbound.median>1", "out.loss>50%", "guest.p99<1"])
def test_an_unknown_value_meets_every_limit(limit: str, tmp_path: Path) -> None:
    """A monitor must not be green for it."""
    paths = pair(tmp_path, [1000] * 600)
    arguments = ("-d", "10.0.0.1", "--direction", "both", "--fail-if", limit)
    done = offline("--pcaps", *paths, *arguments)
    assert done.returncode == 7
    assert f"is not known (limit {limit})" in done.stderr


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("p98>1", "no figure 'p98'"),
        ("p99", "give NAME>NUMBER"),
        ("p99>", "give NAME>NUMBER"),
        ("p99>x", "give NAME>NUMBER"),
        ("p99=1", "give NAME>NUMBER"),
        (">1", "give NAME>NUMBER"),
        ("p99>1%", "ns, µs, ms, s"),
        ("loss>1ms", "units: %"),
        ("lost>1us", "units: none"),
        ("other.p99>1", "no part 'other'"),
        ("loss>5", "did you mean 5%?"),
        ("loss>101%", "at most 1, or 100 %"),
        ("loss>1", "did you mean 1%?"),
        ("loss > 100%", "at most 1, or 100 %"),
        ("guest.p99>1", "requires --direction both"),
        ("outbound.loss>1%", "requires --direction both"),
        ("out.loss>1%", "requires --direction both"),
    ],
)
def test_limits_that_are_refused(limit: str, words: str) -> None:
    """The error is known before anything runs."""
    line = failure(offline("--pcaps", "a", "b", "--fail-if", limit), 2)
    assert f"--fail-if {limit!r}: " in line
    assert words.lower() in line.lower()
    assert len(line) < 340


@pytest.mark.parametrize(
    ("limit", "direction", "words"),
    [
        ("in.p99>1", "out", "requires --direction both"),
        ("guest.loss>1%", "both", "guest has no figure"),
        ("queueing.p99>1", "in", "requires --stages"),
        ("dropped>0", "in", "requires --stages"),
    ],
)
def test_parts_that_will_not_be_there(limit: str, direction: str, words: str) -> None:
    with pytest.raises(netweaver.UsageError, match=words):
        netweaver.parse_limit(limit, direction, stages=False)


@pytest.mark.parametrize(
    ("limit", "direction"),
    [
        ("dropped>5", "out"),
        ("to_guest.p99>5us", "out"),
        ("outbound.dropped>5", "both"),
        ("out.dropped>5", "both"),
    ],
)
def test_what_no_packet_from_the_vm_has(limit: str, direction: str) -> None:
    with pytest.raises(netweaver.UsageError, match="only known of packets to the VM"):
        netweaver.parse_limit(limit, direction, stages=True)


def test_all_packets_lost_is_a_limit() -> None:
    assert netweaver.parse_limit("loss>=100%", "in", stages=False)


@pytest.mark.parametrize(
    ("limit", "direction", "path"),
    [
        ("out.p99>1", "out", ("percentiles", "99")),
        ("outbound.p99>1", "out", ("percentiles", "99")),
        ("outbound.p99>1", "both", ("outbound", "percentiles", "99")),
        ("in.zero>1", "both", ("zero",)),
        ("guest.median>1", "both", ("guest", "median")),
        ("queueing.median>1", "in", ("stages", "queueing", "median")),
        ("queueing.median>1", "out", ("stages", "queueing", "median")),
        ("dropped>5", "both", ("after_vif", "dropped")),
    ],
)
def test_the_path_of_a_limit(limit: str, direction: str, path: tuple[str, ...]) -> None:
    parsed = netweaver.parse_limit(limit, direction, stages=True)
    assert isinstance(parsed, netweaver.FigureLimit)
    assert parsed.path == path


def shift(before: float, now: float, distinguishable: bool | None) -> dict[str, Any]:
    values = {"baseline": before, "current": now, "shift": now - before}
    return {**values, "distinguishable": distinguishable}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slower", "slower than before: median 414 µs, was 7.9 µs, 52 times"),
        ("lossier", None),
        ("changed", "changed from before: median 414 µs, was 7.9 µs, 52 times; loss 1 %, was 3 %"),
    ],
)
def test_limits_on_a_comparison(text: str, message: str | None) -> None:
    comparison = {
        "path": "before",
        "runs": [3, 3],
        "median": shift(7.9, 414, True),
        "p99": shift(20, 500, False),
        "loss_ratio": shift(0.03, 0.01, True),
    }
    assert breach(text, {"comparison": comparison}) == message
    assert breach(text, {}) is None


@pytest.mark.parametrize("runs", [[2, 3], [3, 1]])
def test_a_comparison_of_few_runs_breaches_every_limit(runs: list[int]) -> None:
    message = breach("slower", {"comparison": {"runs": runs}})
    assert message is not None
    assert "can't be decided" in message


@pytest.mark.parametrize(("text", "decided"), [("slower", False), ("lossier", True)])
def test_equal_runs_decide_nothing(text: str, decided: bool) -> None:
    comparison = {
        "runs": [3, 3],
        "median": shift(5, 500, None),
        "p99": shift(9, 9, False),
        "loss_ratio": shift(0.5, 0, None),
    }
    message = breach(text, {"comparison": comparison})
    assert (message is None) == decided
    assert message is None or "can't be decided" in message


@pytest.mark.parametrize("loss", ["0.007", "0.7%", "1.4%", "2.8%", "5.8%", "35%", "57%", "95%"])
def test_a_figure_that_equals_its_limit(loss: str) -> None:
    share = float(loss.rstrip("%"))
    lost = round(10 * share) if "%" in loss else 7
    document = {"loss_ratio": lost / 1000, "percentiles": {"99": 0.009}}
    assert breach(f"loss>{loss}", document) is None
    assert breach(f"loss>={loss}", document) is not None
    assert breach("p99>9ns", document) is None
    assert breach("p99>=9ns", document) is not None


def test_a_value_near_its_limit_is_shown_with_all_digits() -> None:
    for value in ("200.4", "1234567.8"):
        message = breach("p99>200", {"percentiles": {"99": float(value)}})
        assert message == f"p99 is {value} µs (limit p99>200)"
