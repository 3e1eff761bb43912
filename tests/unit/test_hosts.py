"""Jobs and hosts: commands on this machine, and connections that don't answer."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from laboratory import NETWEAVER, wait_until

import netweaver


class SilentChannel:
    """A channel on which nothing comes."""

    closed = False
    eof_received = False

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe()

    def fileno(self) -> int:
        return self._reading

    def sendall(self, data: bytes, /) -> None:
        pass

    def recv_ready(self) -> bool:
        return False

    def recv(self, size: int, /) -> bytes:
        return b""

    def recv_stderr_ready(self) -> bool:
        return False

    def recv_stderr(self, size: int, /) -> bytes:
        return b""

    def close(self) -> None:
        self.closed = True


class SilentConnection(netweaver.LocalConnection):
    """A connection whose shell never starts, or starts and then prints nothing."""

    name = "silent"

    def __init__(self, shell_starts: bool) -> None:
        self._shell_starts = shell_starts
        self._reason = ""

    def is_active(self) -> bool:
        return not self._reason

    def error(self) -> str:
        return self._reason

    def start_shell(self, command: str, script: str) -> netweaver.Channel:
        if not self._shell_starts:
            threading.Event().wait()
        return SilentChannel()

    def open_files(self) -> netweaver.LocalConnection:
        threading.Event().wait()
        return self

    def give_up(self, reason: str) -> None:
        self._reason = reason


def make_host(
    connection: netweaver.Connection, log: Callable[[str], None] = lambda line: None
) -> netweaver.Host:
    return netweaver.Host(connection, threading.Condition(), log, sudo=False)


@pytest.fixture
def host() -> Iterator[netweaver.Host]:
    """Provide this machine; all that runs there must have ended when it is left."""
    local = make_host(netweaver.LocalConnection())
    yield local
    local.leave()


# -- this machine --


def test_a_command_is_run_to_its_end(host: netweaver.Host) -> None:
    job = host.run("echo output; echo oops >&2; exit 3")
    assert job.status == 3
    assert job.output == "output\n"
    assert job.errors == "oops\n"


def test_a_job_goes_on_until_it_is_stopped(host: netweaver.Host) -> None:
    job = host.start("exec sleep 60", 60)
    assert not job.wait(0.2)
    job.stop()
    assert job.wait(20)
    assert job.status == 143


def test_a_job_that_ignores_stop_is_killed(host: netweaver.Host) -> None:
    job = host.start("trap '' TERM; echo ready; while :; do sleep 0.1; done", 60)
    wait_until(lambda: job.output == "ready\n", "its start")
    job.stop()
    assert not job.wait(0.5)
    job.kill()
    assert job.wait(20)
    assert job.status == 137


def test_files_are_fetched(host: netweaver.Host, tmp_path: Path) -> None:
    job = host.start("head -c 100000 /dev/zero >file", 60, private=True)
    assert job.wait(20)
    copy = tmp_path / "copy"
    files = host.open_files()
    host.fetch(files, f"{job.directory}/file", str(copy), 100_000)
    files.close()
    assert copy.read_bytes() == bytes(100_000)
    with pytest.raises(netweaver.CaptureError, match="larger than"):
        host.fetch(files, f"{job.directory}/file", str(copy), 99_999)
    job.leave()
    assert not Path(job.directory).exists()


def test_what_is_run_is_logged() -> None:
    lines: list[str] = []
    local = make_host(netweaver.LocalConnection(), lines.append)
    local.run("echo one")
    job = local.start("echo 2", 60, shown=["two"])
    job.wait(20)
    assert lines == ["local: echo one", "local: two"]


def test_output_without_end(host: netweaver.Host) -> None:
    with pytest.raises(netweaver.RemoteCommandError, match="larger than 8388608 bytes"):
        host.run("exec yes")


def test_the_interfaces_of_a_large_host(host: netweaver.Host) -> None:
    """`ip` prints 1.5 KB for each, and a VM of Proxmox has four."""
    assert len(host.run("head -c 6000000 /dev/zero | tr '\\0' x").output) == 6_000_000


def test_a_trace_that_ends_later_than_the_captures(host: netweaver.Host) -> None:
    """It has time for that, and the captures were not killed."""
    capture = netweaver.CaptureCommand("pif", "lo", "echo listening on >&2; exec sleep 60")
    trace = """(trap 'sleep 4; exit' TERM; while :; do sleep 0.1; done) & all="$all $!" """
    info = SimpleNamespace(timeout=5, wait=0, capture_limit=None)
    plan = SimpleNamespace(captures=[capture], trace=trace, info=info)
    control = netweaver.RunControl(lambda seconds: None)
    running = netweaver.RunningCaptures(host, cast(netweaver.Plan, plan), control)
    wait_until(lambda: netweaver.is_listening(running.messages()[0]), "the capture")
    assert running.stop()


@pytest.mark.parametrize(
    ("command", "is_found"),
    [
        ("~/bin/gen {destination}", True),
        ('"$HOME/x/gen" 1', True),
        ("(ping -c 1 x; ping -c 1 y)", True),
        ("true;true", True),
        (">/dev/null ping", True),
        ("A=1 gen", True),
        ("sh -c true", True),
        ("/bin/sh -c true", True),
        ("no-such-generator -c 5", False),
        ("/no/such/generator", False),
    ],
)
def test_the_program_of_a_source_command(
    host: netweaver.Host, command: str, is_found: bool
) -> None:
    """The shell's own syntax is no program's name."""
    traffic = netweaver.Traffic(command=command)
    if is_found:
        netweaver.try_traffic(traffic, "192.0.2.1", True, host)
        return
    with pytest.raises(netweaver.RemoteCommandError, match="not found"):
        netweaver.try_traffic(traffic, "192.0.2.1", True, host)


def test_a_source_that_fails_is_disconnected() -> None:
    """At the end, as the others are: a series of runs would collect their connections."""
    closed = []

    class Connection(netweaver.LocalConnection):
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            closed.append(self.name)

    hypervisor, one, other = (make_host(Connection(name)) for name in ("hv", "one", "other"))
    hosts = netweaver.Hosts(hypervisor, {"one": one, "other": other}, {})
    hosts.exclude({"one": netweaver.RemoteCommandError("hping3: not found")})
    hosts.close(wait=True)
    assert sorted(closed) == ["hv", "one", "other"]


def test_a_command_that_takes_too_long(host: netweaver.Host) -> None:
    with pytest.raises(netweaver.RemoteCommandError, match="sleep 60: timed out"):
        host.run("sleep 60", 0.5)


def test_a_command_that_takes_too_long_and_prints(
    host: netweaver.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its output is read while its channel is closed, which is an error in neither thread."""
    errors: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    for _ in range(30):
        with pytest.raises(netweaver.RemoteCommandError, match="timed out"):
            host.run("for i in 1 2 3 4 5 6 7 8 9; do seq 1000; sleep 0.01; done; sleep 60", 0.03)
    host.leave()
    assert errors == []


def test_a_script_is_never_printed(host: netweaver.Host) -> None:
    script = "{\necho secret\nsleep 60\n}"
    with pytest.raises(netweaver.RemoteCommandError) as caught:
        host.run(script, 0.5)
    assert "secret" not in str(caught.value)
    with pytest.raises(netweaver.RemoteCommandError, match="local: the search: timed out"):
        host.run(script, 0.5, name="the search")


def test_jobs_leave_no_descriptors_open(host: netweaver.Host) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        host.run("true")
        job = host.start("true", 60, private=True)
        job.wait(20)
        job.leave()
        host.start("true", 60).wait(20)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, "closed descriptors", 20)


def test_too_few_descriptors(host: netweaver.Host) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd")))
    for free in range(8):
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + free, limits[1]))
        try:
            host.run("true")
        except netweaver.HostConnectionError as error:
            assert "Too many open files" in str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert host.run("true").status == 0


# -- connections that don't answer --


def test_a_start_that_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netweaver, "CONNECT_SECONDS", 0.3)
    host = make_host(SilentConnection(shell_starts=False))
    with pytest.raises(netweaver.HostConnectionError, match="silent is lost: no answer for"):
        host.run("true")


def test_files_that_are_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netweaver, "CONNECT_SECONDS", 0.3)
    host = make_host(SilentConnection(shell_starts=False))
    with pytest.raises(netweaver.HostConnectionError, match="silent is lost: no answer for"):
        host.open_files()


def test_silence_ends_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netweaver, "IDLE_SECONDS", 0.5)
    host = make_host(SilentConnection(shell_starts=True))
    begun = time.monotonic()
    with pytest.raises(netweaver.HostConnectionError, match="silent is lost: no answer for"):
        host.run("true")
    assert 0.4 < time.monotonic() - begun < 5


class CutConnection(SilentConnection):
    """A connection that is lost while SFTP starts."""

    def open_files(self) -> netweaver.LocalConnection:
        self._reason = "it was cut"
        raise netweaver.CaptureError("can't start SFTP")


def test_a_connection_that_is_lost_while_sftp_starts() -> None:
    with pytest.raises(netweaver.HostConnectionError, match="is lost: it was cut"):
        make_host(CutConnection(shell_starts=True)).open_files()


# -- clocks --


@pytest.mark.parametrize(
    ("passed", "step"), [(7, 0), (4, 0), (3, -1), (12, 0), (15, 3), (3600, 3588)]
)
def test_an_answer_that_comes_late_is_no_step_of_the_clock(passed: int, step: int) -> None:
    """Between 4 and 12 s passed: both answers took up to 4 s."""
    start = netweaver.ClockReading(wall=1000, asked=0, answered=4, exact=True)
    stop = netweaver.ClockReading(wall=1000 + passed, asked=8, answered=12, exact=True)
    assert netweaver.clock_step(start, stop) == step


@pytest.mark.parametrize(
    ("hours", "parts_per_million", "is_step"),
    [(24, 20, False), (24, 150, False), (0.01, 100_000, True), (24, 300, True)],
)
def test_the_clocks_of_a_long_run(hours: float, parts_per_million: int, is_step: bool) -> None:
    """Two clocks drift apart: that is no step of one of them."""
    seconds = round(3600 * hours)
    passed = seconds * (1_000_000 + parts_per_million) // 1_000_000
    start = netweaver.ClockReading(wall=10**9, asked=0, answered=0, exact=True)
    stop = netweaver.ClockReading(
        wall=(1 + passed) * 10**9, asked=seconds * 10**9, answered=seconds * 10**9, exact=True
    )
    info = netweaver.RunInfo()
    window = netweaver.measured_window(start, stop, stop, info)
    assert (window is None) == is_step
    assert any("jumped" in incident for incident in info.incidents) == is_step


# -- calls at once --


def test_results_come_in_the_order_of_the_calls() -> None:
    slow = threading.Event()
    calls = [lambda: slow.wait(0.2), lambda: "fast"]
    assert netweaver.in_parallel(*calls) == [False, "fast"]


def test_the_first_error_is_raised_when_all_calls_have_ended() -> None:
    ended = threading.Event()

    def fail() -> None:
        raise netweaver.UsageError("first")

    def end_later() -> None:
        time.sleep(0.2)
        ended.set()

    with pytest.raises(netweaver.UsageError, match="first"):
        netweaver.in_parallel(fail, end_later)
    assert ended.is_set()


def test_calls_that_take_too_long() -> None:
    with pytest.raises(netweaver.NoAnswerError):
        netweaver.in_parallel(threading.Event().wait, seconds=0.2)


def test_times_fit_each_other() -> None:
    """A lost connection is noticed by heartbeats before a command is overdue."""
    assert 2 * netweaver.HEARTBEAT_SECONDS < netweaver.IDLE_SECONDS
    assert netweaver.DEAD_PEER_SECONDS < netweaver.IDLE_SECONDS
    assert netweaver.IDLE_SECONDS + 1 < netweaver.ANSWER_SECONDS
    assert netweaver.CONNECT_SECONDS + 1 < netweaver.ANSWER_SECONDS
    assert 2 * netweaver.KILL_SECONDS < netweaver.ANSWER_SECONDS


def test_paramiko_is_loaded_without_what_it_does_not_need() -> None:
    code = (
        "import sys, netweaver; netweaver.import_paramiko(); "
        "assert 'paramiko' in sys.modules and 'invoke' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=NETWEAVER.parent, check=True)
