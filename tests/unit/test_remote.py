"""The wrapper under which every remote command runs, in each shell that a host may have."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote

import pytest
from laboratory import wait_until

import netweaver

SHELLS = [
    shell
    for shell in (["dash"], ["bash"], ["bash", "--posix"], ["busybox", "ash"])
    if shutil.which(shell[0])
]
ENDLESS = "exec sleep 60"


class Wrapped:
    """A command under the wrapper in a local shell; the test holds its lease."""

    def __init__(
        self,
        shell: list[str],
        directory: Path,
        command: str,
        private: bool = False,
        limit: int = 60,
        idle: int = 60,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.shell = " ".join(shell)
        self.directory = directory
        self.output_path = directory.parent / f"{directory.name}.output"
        self.errors_path = directory.parent / f"{directory.name}.errors"
        with open(self.output_path, "wb") as output, open(self.errors_path, "wb") as errors:
            self.process = subprocess.Popen(
                shell,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=errors,
                start_new_session=True,
                bufsize=0,
                env={**os.environ, "MARK": str(directory), **(environment or {})},
            )
        variables = {
            "TOKEN": "token",
            "COMMAND": command,
            "PRIVATE": "yes" if private else "",
            "LIMIT": str(limit),
            "IDLE": str(idle),
            "KILL": str(netweaver.KILL_SECONDS),
            "TMPDIR": str(directory),
        }
        for name, value in variables.items():
            self.say(f"{name}={quote(value)}\n")
        self.say(netweaver.WRAPPER)

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())

    def hang_up(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def output(self) -> str:
        return self.output_path.read_text()

    def errors(self) -> str:
        return self.errors_path.read_text()

    def private_directory(self) -> Path:
        """Return the command's directory, of which there must be one."""
        [private] = self.directory.iterdir()
        return private

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.output(), f"{text} in {self.shell}")

    def wait_for_error(self, *texts: str) -> None:
        wait_until(lambda: all(text in self.errors() for text in texts), f"{texts} in {self.shell}")

    def wait_for_file(self, path: Path, text: str) -> None:
        wait_until(
            lambda: path.exists() and path.read_text() == text, f"{path.name} in {self.shell}"
        )

    def processes(self) -> dict[int, str]:
        """Return pid and command line of all that it started and that still runs.

        They are recognised by a mark in their environment.
        """
        mark = f"MARK={self.directory}".encode()
        running = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (path / "cmdline").read_bytes()
                variables = (path / "environ").read_bytes().split(b"\0")
                if line and mark in variables:
                    running[int(path.name)] = line.replace(b"\0", b" ").decode()
        return running

    def watchers(self) -> list[int]:
        """Return the pids of the wrapper's own shells: itself, its lease and its watchdog."""
        return [pid for pid, line in self.processes().items() if line.strip() == self.shell.strip()]

    def is_clean(self) -> bool:
        """Return whether nothing is left; a watchdog's last `sleep 1` ends by itself."""
        return not list(self.directory.iterdir()) and not self.processes()

    def wait_clean(self) -> None:
        try:
            wait_until(self.is_clean, "no process and no file", 30)
        except TimeoutError:
            left = [*self.processes().values(), *self.directory.iterdir()]
            raise AssertionError(left) from None


class Shells:
    """Starts a command under the wrapper in every shell at once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.wrapped: list[Wrapped] = []

    def start(
        self,
        command: str,
        private: bool = False,
        limit: int = 60,
        idle: int = 60,
        environment: Mapping[str, str] | None = None,
    ) -> list[Wrapped]:
        """Start the command, and return each shell's once it has begun."""
        started = []
        for shell in SHELLS:
            directory = self._directory / "-".join(shell)
            directory.mkdir(exist_ok=True)
            started.append(Wrapped(shell, directory, command, private, limit, idle, environment))
        self.wrapped += started
        for wrapped in started:
            wrapped.wait_for("token begin")
        return started

    def wait_clean(self) -> None:
        for wrapped in self.wrapped:
            wrapped.process.wait(30)  # a stopped one is ended after 11 s
        for wrapped in self.wrapped:
            wrapped.wait_clean()


@pytest.fixture
def shells(tmp_path: Path) -> Iterator[Shells]:
    """Provide commands under the wrapper in every shell; they leave nothing once it hangs up."""
    shells = Shells(tmp_path)
    yield shells
    for wrapped in shells.wrapped:
        wrapped.hang_up()
    shells.wait_clean()


def captures(*commands: str) -> str:
    """Return the shell text that runs capture commands in one session."""
    lines = [f"capture {rank} {quote(command)}" for rank, command in enumerate(commands, 1)]
    return "\n".join([netweaver.CAPTURES, *lines, "until wait; do :; done"])


def write_program(directory: Path, name: str, script: str) -> dict[str, str]:
    """Write a program that hides another one, and return the environment in which it does."""
    directory.mkdir(exist_ok=True)
    program = directory / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


# -- a command and its end --


def test_output_and_status_are_reported(shells: Shells) -> None:
    for wrapped in shells.start("printf 'no newline'; echo oops >&2; exit 3"):
        assert wrapped.process.wait(30) == 0
        _, begin, output, end = wrapped.output().split("\n", 3)
        assert begin == "token begin -"
        assert output == "no newline"
        assert end == "token end 3\n"
        assert wrapped.errors() == "oops\n\ntoken end 3\n"


def test_files_stay_until_bye(shells: Shells) -> None:
    for wrapped in shells.start("echo content >c.pcap", private=True):
        wrapped.wait_for("token end 0")
        private = wrapped.private_directory()
        capture = private / "c.pcap"
        assert capture.read_text() == "content\n"
        assert private.stat().st_mode & 0o777 == 0o700
        assert capture.stat().st_mode & 0o777 == 0o600
        wrapped.say("bye\n")
        wrapped.process.wait(30)


def test_stop_ends_the_command_and_keeps_its_file(shells: Shells) -> None:
    command = "exec >c; trap 'echo flushed; exit 7' TERM; echo started; while :; do sleep 0.1; done"
    for wrapped in shells.start(command, private=True):
        file = wrapped.private_directory() / "c"
        wrapped.wait_for_file(file, "started\n")
        wrapped.say("stop\n")
        wrapped.wait_for("token end 7")
        assert file.read_text() == "started\nflushed\n"


def test_kill_ends_a_command_that_ignores_stop(shells: Shells) -> None:
    command = "exec >c; trap '' TERM; echo started; while :; do sleep 0.1; done"
    for wrapped in shells.start(command, private=True):
        file = wrapped.private_directory() / "c"
        wrapped.wait_for_file(file, "started\n")
        wrapped.say("stop\nkill\n")
        wrapped.wait_for("token end 137")
        assert file.read_text() == "started\n"


@pytest.mark.parametrize(
    "command",
    [
        ENDLESS,
        "sleep 60 | sleep 60",
        "sleep 60 & wait",
        "trap '' TERM; while :; do sleep 1; done",
    ],
)
def test_the_end_of_the_lease_ends_everything(shells: Shells, command: str) -> None:
    for wrapped in shells.start(command, private=True):
        wrapped.hang_up()
    shells.wait_clean()


def test_a_lease_that_ends_at_once_ends_everything(tmp_path: Path) -> None:
    started = []
    for shell in SHELLS:
        directory = tmp_path / "-".join(shell)
        directory.mkdir()
        started.append(Wrapped(shell, directory, ENDLESS, private=True))
        started[-1].hang_up()
    for wrapped in started:
        wrapped.process.wait(30)
        wrapped.wait_clean()


@pytest.mark.parametrize(("limit", "idle"), [(2, 60), (60, 2)])
def test_an_expired_lease_ends_everything(shells: Shells, limit: int, idle: int) -> None:
    shells.start(ENDLESS, private=True, limit=limit, idle=idle)
    shells.wait_clean()


def test_files_stay_beyond_the_limit_of_their_command(shells: Shells) -> None:
    """A client that fetches them over a slow line renews the lease."""
    started = shells.start("echo packets >1.pcap", private=True, limit=1)
    for wrapped in started:
        wrapped.wait_for("token end 0")
    until = time.monotonic() + 3
    while time.monotonic() < until:  # the watchdogs count whole seconds
        time.sleep(0.1)
        assert all((wrapped.private_directory() / "1.pcap").exists() for wrapped in started)
    assert all(wrapped.process.poll() is None for wrapped in started)


def test_a_stopped_wrapper_is_ended_with_its_lease(shells: Shells) -> None:
    for wrapped in shells.start(ENDLESS, private=True, idle=2):
        os.kill(wrapped.process.pid, signal.SIGSTOP)
        wrapped.hang_up()
    shells.wait_clean()


def test_a_renewed_lease_goes_on(shells: Shells) -> None:
    started = shells.start("exec sleep 5", idle=3)
    while any(wrapped.process.poll() is None for wrapped in started):
        time.sleep(0.5)  # between two renewals
        for wrapped in started:
            with contextlib.suppress(BrokenPipeError):
                wrapped.say("alive\n")
    for wrapped in started:
        assert "token end 0" in wrapped.output()
        assert wrapped.output().count("token alive\n") >= 4
        # Each answer is one line, of which no part can be read as a line of the command.
        assert "\n\ntoken alive" not in wrapped.output()


def test_a_time_out_of_bash_ends_neither_the_lease_nor_a_capture(shells: Shells) -> None:
    """A profile may export TMOUT, which `read` heeds, too."""
    commands = captures("echo listening >&2; sleep 3; echo packets >&2; exec sleep 60")
    for wrapped in shells.start(commands, private=True, environment={"TMOUT": "1"}):
        wrapped.wait_for_error("1 listening\n", "1 packets\n")
        assert wrapped.process.poll() is None


@pytest.mark.parametrize("name", ["two words", "."])
def test_odd_temporary_directories(shells: Shells, tmp_path: Path, name: str) -> None:
    """With a blank, or not absolute: the path is reported whole, and removed at the end."""
    (tmp_path / name).mkdir(exist_ok=True)
    environment = {"TMPDIR": str(tmp_path / name) if name != "." else name}
    for wrapped in shells.start("exec sleep 60", private=True, environment=environment):
        [line] = re.findall("^token begin (.*)$", wrapped.output(), re.MULTILINE)
        assert Path(line).is_absolute()
        assert (Path(line) / "pid").exists()
        wrapped.say("bye\n")
        wrapped.process.wait(30)
        assert not Path(line).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize(("command", "event"), [(ENDLESS, "begin"), ("true", "end")])
def test_a_killed_wrapper_leaves_nothing(
    shells: Shells, number: signal.Signals, command: str, event: str
) -> None:
    for wrapped in shells.start(command, private=True):
        wrapped.wait_for(f"token {event}")
        wait_until(lambda: len(wrapped.watchers()) == 3, "lease and watchdog")  # noqa: B023
        wrapped.process.send_signal(number)
        wrapped.hang_up()
    shells.wait_clean()


def test_nothing_in_a_command_is_expanded_twice(shells: Shells) -> None:
    for wrapped in shells.start("printf '%s|' \"it's\" '$(id)' '`id`' '\\n'"):
        wrapped.process.wait(30)
        assert "it's|$(id)|`id`|\\n|" in wrapped.output()


# -- captures --


def test_several_captures_in_one_session(shells: Shells) -> None:
    """Each has a file and reports of its own, and one that fails harms no other."""
    commands = captures(
        "echo one; echo listening >&2; exec sleep 60",
        "echo oops >&2; exit 3",
        "trap 'trap \"\" TERM; echo flushed; echo counts >&2; exit 7' TERM; "
        "echo listening >&2; while :; do sleep 0.1; done",
    )
    for wrapped in shells.start(commands, private=True):
        wrapped.wait_for_error("1 listening\n", "2 oops\n", "2 exit 3\n", "3 listening\n")
        private = wrapped.private_directory()
        wrapped.wait_for_file(private / "1.pcap", "one\n")
        wrapped.say("stop\n")
        wrapped.wait_for("token end 0")
        wrapped.wait_for_error("token end")
        lines = wrapped.errors().splitlines()
        first = [line for line in lines if line.startswith("1 ")]
        third = [line for line in lines if line.startswith("3 ")]
        assert first[-1] == "1 exit 143"
        assert third[-2:] == ["3 counts", "3 exit 7"]
        assert (private / "1.pcap").read_text() == "one\n"
        assert (private / "2.pcap").read_text() == ""
        assert (private / "3.pcap").read_text() == "flushed\n"
        wrapped.say("bye\n")


def test_captures_answer_with_the_time(shells: Shells) -> None:
    """In nanoseconds, if the shell's `date` knows them: busybox's may not."""
    before = time.time_ns()
    for wrapped in shells.start(captures("echo listening >&2; exec sleep 60"), private=True):
        wrapped.wait_for_error("1 listening\n")
        answers: list[re.Match[str]] = []
        while len(answers) < 2:
            wrapped.say("mark\n")
            known = len(answers)
            pattern = re.compile(r"^(\d{10})(\d{9})?\S*$", re.MULTILINE)
            wait_until(lambda: len(pattern.findall(wrapped.output())) > known, "an answer")  # noqa: B023
            answers = list(pattern.finditer(wrapped.output()))
        seconds = [int(answer[1]) for answer in answers]
        assert before // 10**9 <= seconds[0] <= seconds[1] <= time.time() + 1
        if "busybox" not in wrapped.shell:
            first, second = (int(answer[1] + answer[2]) for answer in answers)
            assert before < first < second < time.time_ns()


def test_a_date_that_hangs_is_ended_with_the_rest(shells: Shells, tmp_path: Path) -> None:
    environment = write_program(tmp_path / "bin", "date", "exec sleep 1000")
    commands = captures("echo listening >&2; exec sleep 60")
    started = shells.start(commands, private=True, environment=environment)
    for wrapped in started:
        if "busybox" in wrapped.shell:  # it prefers its own date
            continue
        wrapped.wait_for_error("1 listening\n")
        wrapped.say("mark\n")
        wait_until(
            lambda: any("sleep 1000" in line for line in wrapped.processes().values()),  # noqa: B023
            "the host's date",
        )
        wrapped.say("bye\n")
    for wrapped in started:
        wrapped.hang_up()
        wrapped.process.wait(30)
        lines = wrapped.processes().values()
        assert not any("sleep 1000" in line for line in lines)


# -- directories that others have left --


def test_the_next_run_removes_the_directory_of_a_killed_one(shells: Shells) -> None:
    killed = shells.start("echo content >c; exec sleep 60", private=True)
    for wrapped in killed:
        wrapped.wait_for_file(wrapped.private_directory() / "c", "content\n")
        while running := wrapped.processes():
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        assert (wrapped.private_directory() / "c").exists()
        wrapped.process.wait(30)
    for wrapped in shells.start("true", private=True):
        assert (wrapped.private_directory() / "pid").exists()


def test_the_next_run_removes_directories_that_no_process_uses(shells: Shells) -> None:
    """Another process has got the wrapper's pid since, or it was killed before it wrote its own."""
    two_days_ago = time.time() - 2 * 86400
    for wrapped in shells.start(ENDLESS, private=True):
        make_directory(wrapped.directory / "netweaver.reused0000", str(os.getpid()))
        make_directory(wrapped.directory / "netweaver.early00000", "")
        os.utime(wrapped.directory / "netweaver.early00000", (two_days_ago, two_days_ago))
    for wrapped in shells.start("true", private=True):
        wrapped.wait_for("token end 0")
        names = {path.name for path in wrapped.directory.iterdir()}
        assert not names & {"netweaver.reused0000", "netweaver.early00000"}
        assert len(names) == 2  # of both runs


def make_directory(path: Path, pid: str, owner: int = 0) -> None:
    path.mkdir()
    (path / "pid").write_text(f"{pid}\n")
    if owner:
        os.chown(path, owner, owner)


def test_the_next_run_leaves_all_other_directories(shells: Shells) -> None:
    """Those of runs that go on, of other users, without a pid, and what only links there."""
    with subprocess.Popen(["true"]) as process:
        pass
    gone = str(process.pid)
    strangers = [
        "netweaver.nonumber00",
        "netweaver.withoutpid",
        "elsewhere",
        "netweaver.link000000",
    ]
    if os.geteuid() == 0:
        strangers.append("netweaver.others0000")
    for wrapped in shells.start(ENDLESS, private=True):
        make_directory(wrapped.directory / "netweaver.nonumber00", "; touch OWNED")
        make_directory(wrapped.directory / "elsewhere", gone)
        (wrapped.directory / "netweaver.withoutpid").mkdir()
        (wrapped.directory / "netweaver.link000000").symlink_to("elsewhere")
        if os.geteuid() == 0:
            make_directory(wrapped.directory / "netweaver.others0000", gone, owner=1)
    for wrapped in shells.start("true", private=True):
        wrapped.wait_for("token end 0")
        names = {path.name for path in wrapped.directory.iterdir()}
        assert names >= set(strangers)
        assert len(names) == len(strangers) + 2  # of both runs
        assert (wrapped.directory / "elsewhere" / "pid").exists()
        for name in strangers:
            subprocess.run(["rm", "-r", str(wrapped.directory / name)], check=True)
