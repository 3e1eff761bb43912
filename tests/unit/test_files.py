"""Files that netweaver writes: regular ones, links, pipes, devices, and what can't be written."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import failure, in_a_process, noisy, offline, pair, paired, save_runs
from laboratory import NETWEAVER

import netweaver


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def usual_mode() -> int:
    mask = os.umask(0o22)
    os.umask(mask)
    return 0o666 & ~mask


def write(path: Path, text: bytes = b"new", append: bool = False) -> None:
    netweaver.write_file(str(path), lambda file: file.write(text), append)


def test_a_new_file_has_the_usual_mode(tmp_path: Path) -> None:
    write(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert mode(tmp_path / "file") == usual_mode()
    assert os.listdir(tmp_path) == ["file"]


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    target.chmod(0o640)
    write(target)
    assert target.read_bytes() == b"new"
    assert mode(target) == 0o640


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    seen = []

    def write_slowly(file: object) -> None:
        seen.append(target.read_text())

    netweaver.write_file(str(target), write_slowly)
    assert seen == ["old"]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def fail(file: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(netweaver.UsageError, match="No space left"):
        netweaver.write_file(str(target), fail)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_appending(tmp_path: Path) -> None:
    write(tmp_path / "file", b"one\n")
    write(tmp_path / "file", b"two\n", append=True)
    assert (tmp_path / "file").read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_a_run_that_could_not_be_written_leaves_no_old_results(kind: str, tmp_path: Path) -> None:
    """The next run replaces the file, and doesn't add to what was there before."""
    target = tmp_path / "new" / "file"
    result = paired([("a", 1000)], [("a", 2000)])
    output: netweaver.Output = netweaver.JsonOutput(str(target))
    if kind == "csv":
        output = netweaver.CsvOutput(str(target), several=False)
    with pytest.raises(netweaver.UsageError):
        output.add({}, [result])
    target.parent.mkdir()
    target.write_text("old\n")
    output.add({}, [result])
    output.add({}, [result])
    lines = target.read_text().splitlines()
    assert "old" not in lines
    assert len(lines) == (3 if kind == "csv" else 2)


@pytest.mark.parametrize("exists", [True, False])
def test_links_are_followed(exists: bool, tmp_path: Path) -> None:
    target = tmp_path / "file"
    link = tmp_path / "link"
    (tmp_path / "hop").symlink_to("file")
    link.symlink_to(tmp_path / "hop")
    if exists:
        target.write_text("old")
    write(link)
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_failure_to_append_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write(target, b"one\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(netweaver.UsageError, match="File too large"):
            write(target, bytes(2000), append=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write(target, b"two\n", append=True)
    assert target.read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize("format_name", ["json", "text", "prometheus"])
def test_a_result_that_can_not_be_written_is_printed(format_name: str, tmp_path: Path) -> None:
    captures = pair(tmp_path, noisy(20, 1))
    arguments = ("--pcaps", *captures, "--format", format_name)
    printed = in_a_process(*arguments).stdout
    target = str(tmp_path / "result")
    done = in_a_process(
        *arguments,
        "--output",
        target,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )
    assert done.returncode == 2
    assert "File too large. The result is on standard output instead" in done.stderr
    assert len(done.stdout) > len(printed) - 50
    assert not os.path.exists(target)
    if format_name == "prometheus":
        assert re.search(r"^netweaver_exit_code{.*} 2$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("owner", "mode", "follows"), [(1, 0o1777, False), (1, 0o755, True), (0, 0o1777, True)]
)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_link_of_another_user_in_a_shared_directory(
    owner: int, mode: int, follows: bool, tmp_path: Path
) -> None:
    """It is followed where the kernel would (fs.protected_symlinks)."""
    target = tmp_path / "target"
    target.write_text("old")
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    link = shared / "link"
    link.symlink_to(target)
    os.lchown(link, owner, owner)
    if follows:
        write(link)
        assert target.read_bytes() == b"new"
        return
    (tmp_path / "own").symlink_to(link)
    for path in (link, tmp_path / "own"):
        for append in (False, True):
            with pytest.raises(netweaver.UsageError, match="link of another user"):
                write(path, append=append)
    with pytest.raises(netweaver.UsageError, match="link of another user"):
        netweaver.check_writable(str(link))
    assert target.read_text() == "old"


@pytest.mark.parametrize("flag", ["--output", "--csv", "--plot"])
def test_an_input_is_never_replaced(flag: str, tmp_path: Path) -> None:
    (tmp_path / "captures").mkdir()
    captures = pair(tmp_path / "captures", noisy(20, 1))
    (tmp_path / "link.png").symlink_to(captures[1])
    before = [Path(path).read_bytes() for path in captures]
    for output in (*captures, str(tmp_path / "link.png")):
        if flag == "--plot" and not output.endswith(".png"):
            continue
        assert "replace an input" in failure(offline("--pcaps", *captures, flag, output), 2)
    assert [Path(path).read_bytes() for path in captures] == before


def test_a_directory_that_a_link_of_another_user_leads_to(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "link").symlink_to(tmp_path / "target")
    write(shared / "link" / "file")
    if os.geteuid() == 0:
        os.lchown(shared / "link", 1, 1)
        with pytest.raises(netweaver.UsageError, match="link of another user"):
            write(shared / "link" / "other")
    assert os.listdir(tmp_path / "target") == ["file"]


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    with pytest.raises(netweaver.UsageError, match="symbolic links"):
        write(tmp_path / "one")


def test_outputs_beside_saved_runs(tmp_path: Path) -> None:
    """Only what a run consists of is an input."""
    save_runs(tmp_path, "web1", runs=1)
    table = tmp_path / "packets.csv"
    for _ in range(2):
        assert offline("--pcaps", str(tmp_path), "--csv", str(table)).returncode == 0
    [document] = tmp_path.glob("*/report.json")
    done = offline("--pcaps", str(tmp_path), "--output", str(document))
    assert "replace an input" in failure(done, 2)


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE) as reader:
        write(pipe)
        assert reader.communicate(timeout=20)[0] == b"new"
    assert pipe.is_fifo()


def test_a_full_device(tmp_path: Path) -> None:
    done = offline("--pcaps", *pair(tmp_path, noisy(20, 1)), "--output", "/dev/full")
    assert done.returncode == 2
    assert "can't write /dev/full: No space left on device" in done.stderr


def test_a_pipe_without_a_reader(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    def write_after_the_reader(file: object) -> None:
        os.close(reader)
        raise BrokenPipeError

    with pytest.raises(netweaver.ReaderGone):
        netweaver.write_file(str(pipe), write_after_the_reader)


def test_a_pipe_that_nobody_reads(tmp_path: Path) -> None:
    """The error comes in time, and doesn't wait for a reader that may be dead."""
    os.mkfifo(tmp_path / "pipe")
    code = (
        "import netweaver, sys; netweaver.ANSWER_SECONDS = 0.2; netweaver.write_text(*sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "pipe"), "text"],
        env={**os.environ, "PYTHONPATH": str(NETWEAVER.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert "UsageError: can't write" in done.stderr
    assert "nobody has opened it" in done.stderr


def test_a_link_in_place_of_the_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may write to the directory gets neither the mode nor the owner of another file."""
    victim = tmp_path / "victim"
    victim.write_text("secret")
    victim.chmod(0o600)
    target = tmp_path / "file"
    target.write_text("old")
    target.chmod(0o666)
    stat = os.stat

    def stat_after_an_attack(path: str, **options: Any) -> os.stat_result:
        for name in os.listdir(tmp_path):
            if name.startswith(".netweaver-"):
                os.unlink(tmp_path / name)
                os.symlink(victim, tmp_path / name)
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", stat_after_an_attack)
    write(target)
    monkeypatch.undo()
    assert target.is_symlink()  # the attack went on until the end
    assert victim.read_text() == "secret"
    assert mode(victim) == 0o600


def test_a_link_in_place_of_a_file_to_append_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("secret")
    (tmp_path / "file").symlink_to(victim)
    monkeypatch.setattr(os.path, "islink", lambda path: False)  # as if it came a moment later
    with pytest.raises(netweaver.UsageError, match="can't write"):
        write(tmp_path / "file", append=True)
    assert victim.read_text() == "secret"


@pytest.mark.parametrize("option", ["--output", "--csv"])
def test_results_go_where_a_link_leads(option: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    paths = pair(tmp_path, noisy(20, 1))
    assert offline("--pcaps", *paths, option, str(tmp_path / "link")).returncode == 0
    assert (tmp_path / "file").read_text().endswith("\n")


def test_a_result_in_a_file_is_nowhere_else(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    done = offline("--pcaps", *pair(tmp_path, noisy(600, 1)), "--output", str(target))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads(target.read_text())["packets"]["matched"] == 600


@pytest.mark.parametrize("option", ["--output", "--csv", "--plot"])
@pytest.mark.parametrize(
    ("path", "words"), [("none/x.png", "no such directory"), ("directory.png", "a directory")]
)
def test_what_can_not_be_written_is_known_before(
    option: str, path: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "directory.png").mkdir()
    done = offline("--pcaps", "none.pcap", "none.pcap", option, str(tmp_path / path))
    assert done.returncode == 2
    assert f"can't write {tmp_path / path}: " in done.stderr
    assert words in done.stderr


def test_a_directory_that_may_not_be_written_to(tmp_path: Path) -> None:
    """It is read-only by its mode or, as root may write everywhere, by its mount."""
    tmp_path.chmod(0o500)
    code = f"import netweaver; netweaver.check_writable({str(tmp_path / 'file')!r})"
    command = [sys.executable, "-c", code]
    if os.geteuid() == 0:
        mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
        command = ["unshare", "-m", "sh", "-c", mount, str(tmp_path), *command]
    done = subprocess.run(
        command, cwd=NETWEAVER.parent, capture_output=True, text=True, check=False, timeout=60
    )
    assert "UsageError" in done.stderr
    assert "no permission" in done.stderr


def test_a_fault_in_an_output_is_located(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("nothing to divide")

    monkeypatch.setattr(netweaver.CsvOutput, "add", broken)
    arguments = ["--pcaps", *pair(tmp_path, noisy(100, 1)), "--csv", str(tmp_path / "a.csv")]
    for verbose in ([], ["-v"]):
        assert netweaver.main(arguments + verbose) == 1
        errors = capfd.readouterr().err
        assert "unexpected ZeroDivisionError: nothing to divide" in errors
        assert ("Traceback" in errors) == bool(verbose)
