"""The wrapper under which every remote command runs, in each shell that a host may have."""
from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote

import pytest
from lab import wait_until

import netweaver

SHELLS = [shell for shell in (["dash"], ["bash"], ["bash", "--posix"], ["busybox", "ash"]) if shutil.which(shell[0])]
Start = Callable[..., "list[Wrapped]"]


class Wrapped:
    """A command under the wrapper in a local shell, with the lease in the test's hand."""

    def __init__(self, shell: list[str], directory: Path, command: str, private: bool = False, limit: int = 60,
                 idle: int = 60) -> None:
        self.shell, self.directory = " ".join(shell), directory
        values = {"TOKEN": "token", "COMMAND": command, "PRIVATE": "yes" if private else "", "LIMIT": str(limit),
                  "IDLE": str(idle), "TMPDIR": str(directory)}
        script = "".join(f"{name}={quote(value)}\n" for name, value in values.items()) + netweaver.WRAPPER
        self.out = directory.parent / f"{directory.name}.out"
        self.errors = directory.parent / f"{directory.name}.errors"
        with open(self.out, "wb") as out, open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=out, stderr=errors,
                                            start_new_session=True, bufsize=0,
                                            env={**os.environ, "MARK": str(directory)})
        self.say(script)

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def hang_up(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def text(self) -> str:
        return self.out.read_text()

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.text(), f"{text} in {self.shell}")

    def wait_for_error(self, *texts: str) -> None:
        wait_until(lambda: all(text in self.errors.read_text() for text in texts), f"{texts} in {self.shell}")

    def processes(self) -> list[str]:
        """What still runs of all that was started, recognised by a mark in its environment."""
        mark, found = f"MARK={self.directory}".encode(), []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                line = (place / "cmdline").read_bytes()
                if line and mark in (place / "environ").read_bytes().split(b"\0"):
                    found.append(line.replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found

    def watchers(self) -> list[str]:
        """The wrapper's own shells: itself, its lease and its watchdog."""
        return [line for line in self.processes() if line.split()[:len(self.shell.split())] == self.shell.split()
                and " -c " not in line]

    def clean(self) -> bool:
        """Whether nothing is left; a watchdog's last `sleep 1` ends by itself."""
        return not list(self.directory.iterdir()) and not self.processes()

    def wait_clean(self, seconds: float = 12) -> None:
        try:
            wait_until(self.clean, "no process and no file", seconds)
        except TimeoutError:
            raise AssertionError([*self.processes(), *self.directory.iterdir()]) from None


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a command under the wrapper, in all shells at once."""
    started: list[Wrapped] = []

    def begin(command: str, private: bool = False, limit: int = 60, idle: int = 60) -> list[Wrapped]:
        for shell in SHELLS:
            directory = tmp_path / f"{'-'.join(shell)}"
            directory.mkdir()
            started.append(Wrapped(shell, directory, command, private, limit, idle))
        return started

    yield begin
    for wrapped in started:
        wrapped.hang_up()
    for wrapped in started:
        wrapped.process.wait(12)
        wrapped.wait_clean()


def begun(started: list[Wrapped]) -> list[Wrapped]:
    for wrapped in started:
        wrapped.wait_for("token begin")
    return started


def has_text(file: Path, text: str) -> bool:
    return file.exists() and file.read_text() == text


def all_clean(started: list[Wrapped]) -> None:
    for wrapped in started:
        wrapped.process.wait(12)
    for wrapped in started:
        wrapped.wait_clean()


def test_output_and_status_are_reported_and_it_ends_by_itself(start: Start) -> None:
    for wrapped in start("printf 'no newline'; echo oops >&2; exit 3"):
        assert wrapped.process.wait(10) == 0
        begin, output, end = wrapped.text().split("\n", 3)[1:]
        assert begin == "token begin -"
        assert (output, end) == ("no newline", "token end 3\n")
        assert wrapped.errors.read_text() == "oops\n\ntoken end 3\n"


def test_a_file_stays_until_bye(start: Start) -> None:
    for wrapped in start("echo content >c.pcap", True):
        wrapped.wait_for("token end 0")
        [private] = wrapped.directory.iterdir()
        assert (private / "c.pcap").read_text() == "content\n"
        assert private.stat().st_mode & 0o777 == 0o700
        assert (private / "c.pcap").stat().st_mode & 0o777 == 0o600
        wrapped.say("bye\n")
        wrapped.process.wait(10)


def test_stop_ends_the_command_and_keeps_its_file(start: Start) -> None:
    for wrapped in begun(start("exec >c; trap 'echo flushed; exit 7' TERM; echo started; while :; do sleep 0.1; done",
                               True)):
        [private] = wrapped.directory.iterdir()
        file = private / "c"
        wait_until(functools.partial(has_text, file, "started\n"), "its start")
        wrapped.say("stop\n")
        wrapped.wait_for("token end 7")
        assert file.read_text() == "started\nflushed\n"


@pytest.mark.parametrize("command", ["exec sleep 60", "sleep 60 | sleep 60", "sleep 60 & wait",
                                     "trap '' TERM; while :; do sleep 1; done"])
def test_the_end_of_the_lease_ends_everything(start: Start, command: str) -> None:
    started = begun(start(command, True))
    for wrapped in started:
        wrapped.hang_up()
    all_clean(started)


def test_a_lease_that_ends_at_once_ends_everything(start: Start) -> None:
    started = start("exec sleep 60", True)
    for wrapped in started:
        wrapped.hang_up()
    all_clean(started)


@pytest.mark.parametrize(("limit", "idle"), [(2, 60), (60, 2)])
def test_a_lease_that_is_over_or_not_renewed_ends_everything(start: Start, limit: int, idle: int) -> None:
    all_clean(start("exec sleep 60", True, limit, idle))


def test_a_lease_that_is_renewed_goes_on(start: Start) -> None:
    started = begun(start("exec sleep 5", idle=3))
    while any(wrapped.process.poll() is None for wrapped in started):
        time.sleep(0.5)
        for wrapped in started:
            with contextlib.suppress(BrokenPipeError):
                wrapped.say("alive\n")
    assert all("token end 0" in wrapped.text() for wrapped in started)
    assert all(wrapped.text().count("\ntoken alive\n") >= 4 for wrapped in started)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("wait", ["begin", "end"])
def test_a_killed_wrapper_leaves_nothing(start: Start, number: int, wait: str) -> None:
    started = start("exec sleep 60" if wait == "begin" else "true", True)
    for wrapped in started:
        wrapped.wait_for(f"token {wait}")
        wait_until(lambda wrapped=wrapped: len(wrapped.watchers()) == 3, "lease and watchdog")       # type: ignore[misc]
        wrapped.process.send_signal(number)
        wrapped.hang_up()
    all_clean(started)


def test_several_captures_in_one_session(start: Start) -> None:
    """Each has its file; what it says, and how it ends, comes with its number; and one that fails harms no other."""
    lines = [*(f"capture {number} {quote(command)}" for number, command in enumerate((
        "echo one; echo listening >&2; exec sleep 60", "echo oops >&2; exit 3",
        "trap 'trap \"\" TERM; echo flushed; echo counts >&2; exit 7' TERM; echo listening >&2; "
        "while :; do sleep 0.1; done"), 1))]
    started = begun(start("\n".join([netweaver.CAPTURES, *lines, "until wait; do :; done"]), True))
    for wrapped in started:
        wrapped.wait_for_error("1 listening\n", "2 oops\n", "2 exit 3\n", "3 listening\n")
        [private] = wrapped.directory.iterdir()
        wait_until(functools.partial(has_text, private / "1.pcap", "one\n"), "the first one's output")
        wrapped.say("stop\n")
        wrapped.wait_for("token end 0")
        wrapped.wait_for_error("token end")
        said = wrapped.errors.read_text().splitlines()
        assert [line for line in said if line.startswith("1 ")][-1] == "1 exit 143"
        assert [line for line in said if line.startswith("3 ")][-2:] == ["3 counts", "3 exit 7"]
        assert [(private / f"{number}.pcap").read_text() for number in (1, 2, 3)] == ["one\n", "", "flushed\n"]
        wrapped.say("bye\n")


def test_the_time_is_told_when_asked(start: Start) -> None:
    """In nanoseconds, if the shell's `date` knows them: busybox's own may not."""
    before = time.time_ns()
    for wrapped in begun(start("exec sleep 60", True)):
        wrapped.say("mark\nmark\nstop\n")
        wrapped.wait_for("token end")
        told = re.findall(r"token mark (\d{10})(\d{9})?\S*\n", wrapped.text())
        assert len(told) == 2
        assert before // 10**9 <= int(told[0][0]) <= int(told[1][0]) <= time.time() + 1
        assert "busybox" in wrapped.shell or before < int("".join(told[0])) < int("".join(told[1])) < time.time_ns()


def test_nothing_in_a_command_is_expanded_twice(start: Start) -> None:
    for wrapped in start("printf '%s|' \"it's\" '$(id)' '`id`' '\\n'"):
        wrapped.process.wait(10)
        assert "it's|$(id)|`id`|\\n|" in wrapped.text()
