"""Sessions and files on hosts whose sshd is limited, silent or hostile."""

from __future__ import annotations

import json
import shutil
import subprocess
import time

import pytest
from helpers import FAST, failure, finished, report, run_code, sending
from laboratory import NETWEAVER, PYTHON, TESTS, Lab, wait_until

import netweaver

pytestmark = pytest.mark.lab

SLOW = "hping3 -c {count} -S -i u5000 {destination}"


def set_login_shell(lab: Lab, shell: str) -> None:
    """Give root another login shell on the hypervisor."""
    passwd = lab.hv.directory / "etc" / "passwd"
    passwd.write_text(passwd.read_text().replace(":/root:/bin/sh\n", f":/root:{shell}\n"))


# -- connections that stall --


def test_a_login_that_stalls_anywhere(own_lab: Lab) -> None:
    own_lab.configure_sshd(own_lab.hv, "MaxStartups 200")
    script = str(TESTS / "stalls.py")
    done = subprocess.run(
        own_lab.on_client(PYTHON, script, own_lab.hv.address, str(own_lab.key), "50"),
        env={**own_lab.environment, "PYTHONPATH": str(NETWEAVER.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert len(outcomes) > 40
    assert {outcome["exit_code"] for outcome in outcomes} == {3}
    assert max(outcome["seconds"] for outcome in outcomes) < 12
    assert [outcome for outcome in outcomes if "no answer" not in outcome["error"]] == []


@pytest.mark.parametrize("option", ["--hv", "-s"])
@pytest.mark.parametrize("position", [2200, 3000, 4000])
def test_a_run_in_which_a_host_stalls(lab: Lab, option: str, position: int) -> None:
    host = lab.hv if option == "--hv" else lab.source
    proxy = subprocess.Popen(
        lab.on_client(PYTHON, str(TESTS / "stalls.py"), host.address, str(position)),
        env={**lab.environment, "PYTHONPATH": str(NETWEAVER.parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert proxy.stdout is not None
    address = f"root@127.0.0.1:{int(proxy.stdout.readline())}"
    arguments = lab.arguments("-c", "400", "--source-command", SLOW, source=lab.source.address)
    arguments[arguments.index(option) + 1] = address
    done = lab.netweaver(*arguments, seconds=60)
    ended = time.monotonic()
    stalled = float(proxy.communicate()[0])
    line = failure(done, 3)
    assert ended - stalled < netweaver.IDLE_SECONDS + 6
    assert address in line
    assert "no answer" in line


# -- few sessions --


@pytest.mark.parametrize(("sessions", "pifs"), [(2, 1), (3, 4), (10, 8)])
def test_few_sessions_on_a_connection(own_lab: Lab, sessions: int, pifs: int) -> None:
    """All captures share one, and so do all transfers."""
    names = ["eth0", *(f"eth{number}" for number in range(1, pifs))]
    for name in names[1:]:
        own_lab.hv.run("ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}-end")
        own_lab.hv.run("ip", "link", "set", name, "up")
    own_lab.configure_sshd(own_lab.hv, f"MaxSessions {sessions}")
    interfaces = [word for name in names for word in ("-i", name)]
    arguments = own_lab.arguments("-c", "600", "--source-command", FAST, *interfaces)
    document = report(own_lab.netweaver(*arguments))
    assert document["packets"]["matched"] == 600
    assert document["config"]["pif"] == ",".join(names)
    own_lab.wait_clean()


def test_too_few_sessions_on_a_connection(own_lab: Lab) -> None:
    own_lab.configure_sshd(own_lab.hv, "MaxSessions 1")
    arguments = own_lab.arguments("-c", "600", "--source-command", FAST)
    line = failure(own_lab.netweaver(*arguments), 3)
    assert "MaxSessions 2 or more" in line
    output = run_code(
        own_lab,
        """
import threading
netweaver.import_paramiko()
access = netweaver.Access(KEY, ["StrictHostKeyChecking no"])
connection = access.log_in(access.settings(netweaver.Target(f"root@{HV}")))
host = netweaver.Host(connection, threading.Condition(), str, sudo=False)
held = host.start("sleep 60", 60)
_, errors = netweaver.attempt_all(lambda name: host.run("true"), map(str, range(16)))
print(*errors.values(), sep="\\n")
held.leave()
host.close()
""",
    )
    assert output.splitlines() == [line[line.index("root@") :]] * 16  # refused at once, too
    own_lab.wait_clean()


def test_many_runs_leave_no_descriptors_open(own_lab: Lab) -> None:
    """Neither at a host's connection nor at a local source."""
    output = run_code(
        own_lab,
        """
import os, threading
netweaver.import_paramiko()
access = netweaver.Access(KEY, ["StrictHostKeyChecking no"])
hosts = [
    netweaver.Host(
        access.log_in(access.settings(netweaver.Target(name))), threading.Condition(), str, False
    )
    for name in (f"root@{HV}", "local")
]
def work():
    for host in hosts:
        host.run("true")
        host.open_files().close()
        job = host.start("true", 10, private=True)
        while not job.ended:
            pass
        job.leave()
        ended = host.start("true", 10)
        while not ended.has_left:
            pass
work()
before = len(os.listdir("/proc/self/fd"))
for _ in range(30):
    work()
print(len(os.listdir("/proc/self/fd")) - before)
""",
    )
    assert int(output) <= 2


@pytest.mark.parametrize("limit", [10, 12])
def test_too_few_descriptors(lab: Lab, limit: int) -> None:
    arguments = lab.arguments("-c", "1", "--source-command", FAST)
    command = lab.on_client(
        "sh", "-c", 'ulimit -n $0 && exec "$@"', str(limit), PYTHON, str(NETWEAVER), *arguments
    )
    done = subprocess.run(command, env=lab.environment, capture_output=True, text=True, timeout=60)
    assert 1 <= done.returncode <= 5
    assert "unexpected" not in done.stderr
    assert "installed" not in done.stderr
    assert "Too many open files" in done.stderr


# -- files --


@pytest.mark.parametrize("subsystem", ["/nonexistent", "/bin/false", "/bin/echo noise", "/bin/cat"])
def test_a_host_without_sftp(own_lab: Lab, subsystem: str) -> None:
    """It is known before any traffic runs."""
    own_lab.configure_sshd(own_lab.hv, f"Subsystem sftp {subsystem}")
    arguments = own_lab.arguments("--source-command", "sleep 60")
    line = failure(own_lab.netweaver(*arguments, seconds=15), 5)
    assert f"root@{own_lab.hv.address}: can't start SFTP" in line
    assert "Subsystem sftp internal-sftp" in line
    own_lab.wait_clean()


@pytest.mark.parametrize(
    ("manner", "code", "words"),
    [
        ("stall", 3, "no answer"),
        ("stall in a file", 3, "no answer"),
        ("trickle", 3, "no answer"),
        ("hang up", 5, "can't fetch"),
        ("hang up in a file", 5, "can't fetch"),
        ("garbage", 5, "can't fetch"),
        ("short", 3, "no answer"),
        ("words", 5, "oops"),
        ("no text", 5, "can't fetch"),
        ("unasked", 5, "can't fetch"),
        ("more", 5, "can't fetch"),
        ("less", 5, "can't fetch"),
        ("huge", 5, "larger than"),
    ],
)
def test_a_hostile_sftp_server(own_lab: Lab, manner: str, code: int, words: str) -> None:
    server = own_lab.hv.directory / "bin" / "hostile-sftp"
    shutil.copy(TESTS / "hostile_sftp.py", server)
    server.chmod(0o755)
    own_lab.configure_sshd(own_lab.hv, f"Subsystem sftp {server} {manner}")
    arguments = own_lab.arguments("-c", "20", "--source-command", FAST)
    bounded = ["prlimit", "--data=400000000", PYTHON, str(NETWEAVER)]
    process = subprocess.Popen(
        own_lab.on_client(*bounded, *arguments),
        env=own_lab.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = failure(finished(process, 40), code)
    assert words in line
    assert line.isprintable()
    assert "unexpected" not in line
    own_lab.wait_clean()


def test_a_file_that_is_gone(own_lab: Lab) -> None:
    process = own_lab.start(*own_lab.arguments("-c", "200", "--source-command", SLOW))
    wait_until(lambda: sending(own_lab), "the traffic")
    own_lab.hv.run("sh", "-c", "rm -rf /tmp/netweaver.*/1.pcap")
    line = failure(finished(process), 5)
    assert "can't fetch /tmp/netweaver." in line
    assert "No such file" in line
    own_lab.wait_clean()


# -- shells --


@pytest.mark.parametrize("shell", ["/bin/bash", "/bin/tcsh", "/usr/bin/fish"])
def test_login_shells_and_their_greetings(own_lab: Lab, shell: str) -> None:
    """Greetings on both streams, and a /tmp from which nothing can be run."""
    set_login_shell(own_lab, shell)
    root = own_lab.hv.directory / "root"
    greeting = "echo Welcome; printf 'no newline'\n"
    errors = "echo 'Last login: never' >&2\n"
    (root / ".config" / "fish").mkdir(parents=True)
    (root / ".bashrc").write_text(greeting + errors)
    (root / ".config" / "fish" / "config.fish").write_text(greeting + errors)
    (root / ".tcshrc").write_text(greeting)
    own_lab.hv.run("mount", "-o", "remount,bind,noexec", "/tmp")
    done = own_lab.netweaver(*own_lab.arguments("-c", "600", "--source-command", FAST))
    assert report(done)["packets"]["matched"] == 600
    assert "Welcome" not in done.stdout + done.stderr


def test_a_host_whose_errors_come_late(own_lab: Lab) -> None:
    """What tcpdump counted is known only after all else."""
    set_login_shell(own_lab, "/root/shell")
    shell = own_lab.hv.directory / "root" / "shell"
    shell.write_text(
        "#!/bin/bash\n"
        'late() { while IFS= read -r line; do sleep 0.05; echo "$line" >&2; done; }\n'
        'exec /bin/sh "$@" 2> >(late)\n'
    )
    shell.chmod(0o755)
    document = report(own_lab.netweaver(*own_lab.arguments("-c", "100", "--source-command", FAST)))
    for side in ("pif", "vif"):
        assert document["capture"][side]["captured"] == 100
        assert document["capture"][side]["dropped"] == 0


@pytest.mark.parametrize("stream", ["", ">&2"])
def test_a_host_that_prints_without_end(own_lab: Lab, stream: str) -> None:
    own_lab.hv.write_program("xe", f"exec yes 'a long line, again and again' {stream}")
    failure(own_lab.netweaver(*own_lab.arguments("--toolstack", "xe"), seconds=30), 4)
    own_lab.wait_clean()


def test_a_host_that_prints_nothing(own_lab: Lab) -> None:
    own_lab.hv.write_program("xe", "exec sleep 1000")
    seconds = netweaver.ANSWER_SECONDS + 8
    line = failure(own_lab.netweaver(*own_lab.arguments("--toolstack", "xe"), seconds=seconds), 4)
    assert "timed out" in line
    assert len(line) < 200  # the command is named, not printed
    own_lab.wait_clean()


def test_a_look_up_that_takes_too_long_is_not_printed(own_lab: Lab) -> None:
    own_lab.hv.write_program(
        "ip", 'case $* in *"-d link"*) exec sleep 1000 ;; esac; exec /sbin/ip "$@"'
    )
    seconds = netweaver.LONG_ANSWER_SECONDS + 21
    line = failure(own_lab.netweaver(*own_lab.arguments(), seconds=seconds), 4)
    assert "look-up" in line
    assert "interfaces" in line
    assert "timed out" in line
    assert len(line) < 200
    own_lab.wait_clean()


def test_a_busy_host_gets_longer_for_a_look_up_by_many_commands(own_lab: Lab) -> None:
    """A single command that takes as long is taken for one that hangs."""
    seconds = netweaver.ANSWER_SECONDS + 1
    own_lab.hv.write_program("df", f'sleep {seconds}; exec /bin/df "$@"')
    document = report(own_lab.netweaver(*own_lab.arguments("-c", "20", "--source-command", FAST)))
    assert document["packets"]["matched"] == 20
    own_lab.wait_clean()


@pytest.mark.parametrize("redirection", ["2>/dev/null", "2>&-"])
def test_a_start_up_file_that_redirects_errors(own_lab: Lab, redirection: str) -> None:
    set_login_shell(own_lab, "/bin/bash")
    start_up_file = own_lab.hv.directory / "root" / ".bashrc"
    start_up_file.write_text(f"exec {redirection}\n")
    line = failure(own_lab.netweaver(*own_lab.arguments(), seconds=20), 5)
    assert "login shell redirects standard error" in line
    start_up_file.unlink()
    own_lab.wait_clean()


def test_control_characters_of_a_host_reach_no_terminal(own_lab: Lab) -> None:
    own_lab.hv.write_program("xe", r"printf '\033[2J\033]0;x\007oops\n' >&2; exit 1")
    line = failure(own_lab.netweaver(*own_lab.arguments("--toolstack", "xe"), seconds=15), 4)
    assert r"\x1b[2J\x1b]0;x\x07oops" in line


def test_no_argument_and_no_secret_in_process_lists(lab: Lab) -> None:
    command = "hping3 -S -i u20000 {destination}; : secret-word"
    process = lab.start(*lab.arguments("--source-command", command, "-v", "--duration", "2"))
    wait_until(lambda: sending(lab), "the traffic")
    lines = [line for host in lab.hosts for line in host.processes().values()]
    done = finished(process)
    shown = [line for line in lines if "sh -c" not in line]
    assert not [line for line in shown if "TOKEN" in line or "netweaver-" in line]
    secret = lab.key.read_text().splitlines()[1]
    assert secret not in done.stdout + done.stderr


def test_stale_directories_go_with_the_next_run(own_lab: Lab) -> None:
    """After everything on the hypervisor was killed, as by the kernel for lack of memory."""
    process = own_lab.start(*own_lab.arguments("--source-command", SLOW, "-c", "2000"))
    wait_until(lambda: sending(own_lab), "the traffic")
    stop = ["kill", "-STOP", *map(str, own_lab.hv.processes())]  # so that none tidies up meanwhile
    subprocess.run(stop, check=False, capture_output=True)
    while running := own_lab.hv.processes():
        subprocess.run(["kill", "-KILL", *map(str, running)], check=False, capture_output=True)
    failure(finished(process), 3)
    stale = own_lab.hv.files()[0]
    assert stale.startswith("/tmp/netweaver.")
    report(own_lab.netweaver(*own_lab.arguments("-c", "100", "--source-command", FAST)))
    own_lab.wait_clean()
