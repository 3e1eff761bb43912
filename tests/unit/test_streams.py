"""Standard streams that are files, pipes and terminals, closed or full."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import in_a_process, noisy, pair, save_runs
from laboratory import NETWEAVER

import netweaver


def shell(
    redirection: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run netweaver with its streams redirected by a shell."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, str(NETWEAVER), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, **environment},
    )


def test_a_table_after_the_document_in_one_file(tmp_path: Path) -> None:
    paths = pair(tmp_path, noisy(20, 1))
    output = tmp_path / "out"
    files = ("--output", "/proc/self/fd/1", "--csv", f"{tmp_path}/csv")
    done = shell(f">{output}", "--pcaps", *paths, *files)
    assert done.returncode == 0
    assert json.loads(output.read_text())["packets"]["pif"] == 20


def test_a_table_to_dev_stdout(tmp_path: Path) -> None:
    """It goes into the pipe; files are replaced, but this link is not."""
    paths = pair(tmp_path, noisy(20, 1))
    before = os.lstat("/dev/stdout")
    done = in_a_process("--pcaps", *paths, "--csv", "/dev/stdout", "--output", f"{tmp_path}/json")
    heading, *rows = done.stdout.splitlines()
    assert heading.startswith("time,source,")
    assert len(rows) == 20
    after = os.lstat("/dev/stdout")
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


@pytest.mark.parametrize(
    ("redirection", "words"),
    [(">/dev/full", "No space left on device"), (">&-", "it is closed. Name a file with --output")],
)
def test_standard_output_that_can_not_be_written(
    redirection: str, words: str, tmp_path: Path
) -> None:
    paths = pair(tmp_path, noisy(600, 1))
    done = shell(redirection, "--pcaps", *paths)
    assert done.returncode == 2
    assert done.stderr == f"netweaver: error: can't write standard output: {words}\n"


def test_a_result_in_a_file_while_standard_output_is_closed(tmp_path: Path) -> None:
    paths = pair(tmp_path, noisy(600, 1))
    target = tmp_path / "result.json"
    assert shell(">&-", "--pcaps", *paths, "--output", str(target)).returncode == 0
    assert json.loads(target.read_text())["packets"]["matched"] == 600


@pytest.mark.parametrize("option", ["--pcaps", "--help"])
def test_a_reader_that_has_gone(option: str, tmp_path: Path) -> None:
    arguments = [option]
    if option == "--pcaps":
        arguments += pair(tmp_path, noisy(1000, 1))
    quoted = " ".join(f"'{word}'" for word in (sys.executable, str(NETWEAVER), *arguments))
    done = subprocess.run(
        ["bash", "-c", f"{quoted} | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "141")  # 0 if the reader has outlived netweaver


def test_a_reader_that_has_gone_after_another_error(tmp_path: Path) -> None:
    """No further run is looked at: the last one is damaged, and nobody learns that."""
    save_runs(tmp_path, "web1", runs=3)
    last = max(tmp_path.iterdir())
    (last / "vif.pcap").write_text("damaged")
    # A document doesn't fit a pipe, so that the second run's waits until the reader has gone.
    label = f"note={'x' * 100_000}"
    command = [sys.executable, str(NETWEAVER), "--pcaps", str(tmp_path), "--label", label]
    with subprocess.Popen(
        [*command, "--csv", "/dev/full"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()
    assert process.returncode == 2
    assert "No space left" in errors
    assert "left out" not in errors


def test_an_error_while_standard_error_is_closed() -> None:
    """It doesn't go to standard output instead."""
    done = shell("2>&-", "--pcaps", "none", "none")
    assert (done.returncode, done.stdout) == (5, "")


def test_a_broken_limit_while_standard_error_is_full(tmp_path: Path) -> None:
    paths = pair(tmp_path, noisy(20, 1))
    done = shell("2>/dev/full", "--pcaps", *paths, "--fail-if", "median>1")
    assert done.returncode == 7
    assert json.loads(done.stdout)["packets"]["matched"] == 20


def test_a_name_that_is_hard_to_write_in_an_old_locale(tmp_path: Path) -> None:
    name = "$a^b_{c ${x \udcff µ x\ny"
    paths = pair(tmp_path, noisy(100, 1, loss=0.05))
    done = shell(
        "",
        *("--pcaps", *paths, "--label", f"name={name}"),
        *("--csv", str(tmp_path / "x.csv"), "--plot", str(tmp_path / f"{name} x.svg")),
        LC_ALL="C",
        PYTHONCOERCECLOCALE="0",
        PYTHONUTF8="0",
    )
    assert done.returncode == 0, done.stderr
    label = json.loads(done.stdout)["config"]["labels"]["name"]
    assert os.fsencode(label) == os.fsencode(name)


class Shown(NamedTuple):
    """What a run has written to a terminal and to its standard output."""

    code: int
    raw: str
    text: str  # without colours and erased lines
    stdout: str


def at_a_terminal(*arguments: str, whole: bool = False, encoding: str = "utf-8") -> Shown:
    """Run netweaver in this process, its standard error, or all of it, at a terminal."""
    master, slave = os.openpty()
    before = os.dup(1)
    with tempfile.TemporaryFile() as output, open(slave, "w", encoding=encoding) as terminal:
        os.dup2(slave if whole else output.fileno(), 1)
        try:
            with (
                contextlib.redirect_stderr(terminal),
                contextlib.redirect_stdout(terminal if whole else io.StringIO()),
            ):
                code = netweaver.main(arguments)
        finally:
            os.dup2(before, 1)
            os.close(before)
        output.seek(0)
        stdout = output.read().decode()
    seen = bytearray()
    with contextlib.suppress(OSError):  # EIO: all has been read
        while data := os.read(master, 65536):
            seen += data
    os.close(master)
    raw = seen.decode().replace("\r\n", "\n")
    return Shown(code, raw, re.sub(r"\x1b\[[\d;]*[mK]", "", raw), stdout)


@pytest.fixture(autouse=True)
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a terminal with colours, wherever the tests run."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_a_summary_beside_a_document_in_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = pair(tmp_path, noisy(600, 1))
    shown = at_a_terminal("--pcaps", *paths)
    assert json.loads(shown.stdout)["packets"]["matched"] == 600
    assert "Distribution" in shown.text
    assert "\x1b[1m" in shown.raw
    monkeypatch.setenv("NO_COLOR", "1")
    plain = at_a_terminal("--pcaps", *paths)
    assert plain.text == shown.text
    assert "\x1b[" not in plain.raw
    assert at_a_terminal("--pcaps", *paths, "-q").text == ""


def test_a_summary_is_the_result_at_a_terminal(tmp_path: Path) -> None:
    paths = pair(tmp_path, noisy(600, 1))
    shown = at_a_terminal("--pcaps", *paths, whole=True)
    assert shown.text.count("Distribution") == 1
    assert "{" not in shown.text
    document = at_a_terminal("--pcaps", *paths, "--format", "json", "-q", whole=True)
    assert json.loads(document.text)["packets"]["matched"] == 600


def test_a_terminal_without_unicode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    shown = at_a_terminal("--pcaps", *pair(tmp_path, noisy(600, 1)), encoding="ascii")
    assert shown.raw.isascii()
    assert "\x1b" not in shown.raw
    assert " us " in shown.text
    assert "###" in shown.text


def test_lines_from_hosts_do_nothing_to_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    netweaver.print_lines(["pif: eth0\x1b[2J\x07", "vif: \u202ex"])
    assert capfd.readouterr().out == "pif: eth0\\x1b[2J\\x07\nvif: \\u202ex\n"


def test_names_from_hosts_do_nothing_to_a_terminal(tmp_path: Path) -> None:
    save_runs(tmp_path, "web1", runs=1, name_label="a\x1b[2J", incidents=["b\x1b[3J"])
    shown = at_a_terminal("--pcaps", str(tmp_path), "--fail-if", "median>1us", whole=True)
    assert shown.code == 7
    assert "\x1b[2J" not in shown.raw
    assert "\x1b[3J" not in shown.raw
    # In the heading, the warning on the incident, and the limit:
    assert shown.text.count("a\\x1b[2J") == 3
    assert "b\\x1b[3J" in shown.text
