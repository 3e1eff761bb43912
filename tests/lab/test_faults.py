"""Faults, made to happen in the lab: how a run ends, and that nothing stays on any host."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import termios
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import ENDLESS, FAST, failure, finished, report, sending, wait_for_packets
from laboratory import NETWEAVER, PYTHON, Lab, wait_until

import netweaver

pytestmark = pytest.mark.lab


def are_clean(lab: Lab) -> bool:
    """Return whether no host has anything of netweaver; a sshd may wait for a lost peer."""
    for host in lab.hosts:
        if host.files() or any("sshd" not in line for line in host.processes().values()):
            return False
    return True


def wait_for_clean_hosts(lab: Lab) -> None:
    wait_until(lambda: are_clean(lab), "clean hosts", 30)


def client_files(lab: Lab) -> list[Path]:
    return list((lab.directory / "client-tmp").iterdir())


def remove_client_files(lab: Lab) -> None:
    """Remove what a killed client has left."""
    for path in client_files(lab):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def start_endless(lab: Lab, *arguments: str) -> subprocess.Popen[str]:
    """Start a run, and return once its traffic runs."""
    process = lab.start(*lab.arguments("--source-command", ENDLESS, *arguments))
    wait_until(lambda: sending(lab), "the traffic")
    return process


def fast(lab: Lab, count: int, *arguments: str) -> list[str]:
    """Return the command line of a run that sends so many packets."""
    return lab.arguments("-c", str(count), "--source-command", FAST, *arguments)


def fork_on_client(lab: Lab, arguments: Sequence[str]) -> tuple[int, int]:
    """Start netweaver in a terminal of its own; return its pid and the terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        words = lab.on_client(PYTHON, str(NETWEAVER), *arguments)
        os.execvpe(words[0], words, lab.environment)
    return pid, terminal


def exit_code(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


# -- the client, and its connections --


def test_killed_at_any_moment(lab: Lab) -> None:
    chance = random.Random(1)
    for _ in range(4):
        process = lab.start(*lab.arguments("--source-command", ENDLESS, "--duration", "2"))
        time.sleep(chance.uniform(0.2, 4.5))  # the moment itself is what varies here
        process.kill()
        process.communicate()
        wait_for_clean_hosts(lab)
    remove_client_files(lab)


@pytest.mark.parametrize("side", ["hv", "src1"])
def test_a_cut_cable(side: str) -> None:
    with Lab() as lab:
        process = start_endless(lab)
        subprocess.run(["ip", "-n", lab.client, "link", "set", f"m-{side}", "down"], check=True)
        line = failure(finished(process, 25), 3)
        address = lab.hv.address if side == "hv" else lab.source.address
        assert f"the connection to root@{address} is lost" in line
        wait_for_clean_hosts(lab)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_one_signal_ends_the_traffic_and_gives_a_report(
    lab: Lab, number: signal.Signals, code: int
) -> None:
    process = lab.start(*lab.arguments("--source-command", ENDLESS))
    wait_for_packets(lab)
    process.send_signal(number)
    document = report(finished(process), code)
    assert document["interrupted"] is True
    assert document["packets"]["matched"] > 10
    assert document["packets"]["lost"] == 0
    lab.wait_clean(2)


def test_a_signal_ends_the_wait_for_the_last_packets(lab: Lab) -> None:
    """The kernel's blocks are waited for all the same, so that no packet is lost."""
    process = lab.start(*lab.arguments("--source-command", ENDLESS, "--wait", "100"))
    wait_for_packets(lab)
    process.send_signal(signal.SIGINT)
    document = report(finished(process), 130)
    assert document["packets"]["matched"] > 10
    assert document["packets"]["lost"] == 0
    lab.wait_clean(2)


def test_a_signal_before_there_is_anything_to_report(lab: Lab) -> None:
    process = lab.start(*lab.arguments("--hv", "10.83.0.99"))
    threads = Path(f"/proc/{process.pid}/task")
    wait_until(lambda: threads.exists() and len(list(threads.iterdir())) > 1, "its threads")
    process.send_signal(signal.SIGINT)
    assert "interrupted" in failure(finished(process, 5), 130)


def test_a_signal_while_the_load_starts(lab: Lab) -> None:
    """There is nothing to report, and no advice on missing packets."""
    process = lab.start(*lab.arguments("-c", "100", "--load", "exec sleep 77"))
    wait_until(
        lambda: any("sleep 77" in line for line in lab.source.processes().values()), "the load"
    )
    process.send_signal(signal.SIGINT)
    assert "interrupted" in failure(finished(process, 10), 130)
    lab.wait_clean()


def test_a_second_signal_ends_at_once(lab: Lab) -> None:
    process = start_endless(lab)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: not sending(lab), "the end of the traffic")
    process.send_signal(signal.SIGINT)
    done = finished(process, 5)
    assert done.returncode == 130
    assert done.stdout == ""
    wait_for_clean_hosts(lab)
    assert client_files(lab) == []


def test_the_terminal_closes(lab: Lab, tmp_path: Path) -> None:
    """SIGHUP comes, and both streams are dead: the report goes to its file."""
    output = tmp_path / "report.json"
    files = ["--output", str(output), "--save", str(tmp_path / "runs")]
    pid, terminal = fork_on_client(lab, lab.arguments("--source-command", ENDLESS, *files))
    wait_for_packets(lab)
    os.close(terminal)
    assert exit_code(pid) == 129
    document = json.loads(output.read_text())
    assert document["packets"]["matched"] > 10
    assert json.loads(Path(document["saved"], "report.json").read_text()) == document
    lab.wait_clean()


@pytest.mark.parametrize(
    ("program", "number"),
    [("sh", signal.SIGTERM), (r"sshd(-session)?: root@notty", signal.SIGKILL)],
)
def test_a_killed_session(lab: Lab, program: str, number: signal.Signals) -> None:
    """The captures end with it, by themselves and without an error."""
    process = start_endless(lab)
    lines = lab.hv.processes().items()
    os.kill(min(pid for pid, line in lines if re.fullmatch(program, line)), number)
    line = failure(finished(process), 3)
    assert f"the connection to root@{lab.hv.address} is lost" in line
    wait_for_clean_hosts(lab)


def test_a_host_behind_a_jump_dies(own_lab: Lab) -> None:
    """Heartbeats notice it, and the jump, which lives, need not report it."""
    lab = own_lab
    (lab.home / ".ssh").mkdir(0o700)
    (lab.home / ".ssh" / "config").write_text(
        f"Host hv\n HostName {lab.hv.address}\n ProxyJump {lab.source.address}\n"
        f" IdentityFile {lab.key}\n"
    )
    process = start_endless(lab, "--hv", "hv", "--duration", "60")
    begun = time.monotonic()
    subprocess.run(["ip", "-n", lab.client, "link", "set", "m-hv", "down"], check=True)
    line = failure(finished(process, 25), 3)
    assert time.monotonic() - begun < 16  # with the ends of all connections
    assert "the connection to root@hv is lost" in line
    wait_for_clean_hosts(lab)


def test_a_client_that_is_suspended_for_a_moment(lab: Lab) -> None:
    process = start_endless(lab, "--duration", "5")
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)  # less than a host waits
    process.send_signal(signal.SIGCONT)
    assert report(finished(process))["packets"]["matched"] > 100


def test_a_client_that_is_suspended_for_long(lab: Lab) -> None:
    process = start_endless(lab)
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: are_clean(lab), "clean hosts", 30)
    process.send_signal(signal.SIGCONT)
    assert "is lost" in failure(finished(process), 3)


# -- traffic --


@pytest.mark.alone
def test_a_flood_is_bounded_and_captured_without_drops(lab: Lab) -> None:
    flood = "hping3 -S --flood {destination}"
    arguments = ["--duration", "2", "--source-command", flood]
    document = report(lab.netweaver(*lab.arguments(*arguments, source=lab.source.address)))
    assert document["packets"]["pif"] > 10_000
    assert document["packets"]["lost"] == 0
    for point in ("pif", "vif"):
        assert document["capture"][point]["dropped"] == 0


def test_the_size_of_a_capture_is_bounded(lab: Lab) -> None:
    """It is half of the free space; what came later is neither lost nor extra."""
    source_command = "hping3 -S -i u50 {destination}"
    with lab.hv.temporary_files("size=4m"):
        arguments = lab.arguments("--duration", "1.5", "--source-command", source_command)
        document = report(lab.netweaver(*arguments))
    limit = 4 * 1024**2 // 4 // (16 + netweaver.SNAPLEN)
    assert any(f"limit of {limit} packets" in warning for warning in document["warnings"])
    assert document["packets"]["lost"] == 0
    assert document["packets"]["vif_only"] == 0
    assert document["capture"]["pif"]["records"] == limit
    assert 0.9 * limit < document["packets"]["matched"] <= limit


def test_one_of_several_sources_fails(lab: Lab) -> None:
    """It is named, and the packets of the others are measured."""
    second = lab.sources[1].address
    traffic = FAST.format(count=300, destination=lab.destination)
    command = f"ip -o addr | grep -q {second} && exit 9; {traffic}"
    document = report(lab.netweaver(*lab.arguments("--source-command", command)))
    assert list(document["failed_sources"]) == [f"root@{second}"]
    assert "exit status 9" in document["failed_sources"][f"root@{second}"]
    assert f"root@{second}" in document["warnings"][0]
    assert document["packets"]["pif"] == document["packets"]["matched"] == 300


def test_one_of_several_sources_can_not_be_reached(lab: Lab) -> None:
    arguments = ["-c", "600", "--source-command", FAST, "-s", "10.83.0.99"]
    document = report(lab.netweaver(*lab.arguments(*arguments, source=lab.source.address)))
    assert list(document["failed_sources"]) == ["root@10.83.0.99"]
    assert "can't reach port 22" in document["warnings"][0]
    assert document["packets"]["matched"] == 600


def test_all_of_several_sources_fail(lab: Lab) -> None:
    line = failure(lab.netweaver(*lab.arguments("--source-command", "exit 9"), seconds=15), 4)
    assert f"root@{lab.sources[0].address}: exit 9: exit status 9" in line


def test_no_traffic_arrives(lab: Lab) -> None:
    line = failure(lab.netweaver(*lab.arguments("--source-command", "true"), seconds=30), 6)
    assert "(0 on eth0, 0 on vif5.0)" in line


def test_all_packets_are_lost(lab: Lab) -> None:
    """They reach the pif and are dropped before the vif, and nothing answers."""
    neighbour = ["ip", "neigh", "replace", lab.destination, "dev", "eth0"]
    lab.hv.run("ip", "link", "set", "vif5.0", "nomaster")
    try:
        for host in lab.sources:
            host.run(*neighbour, "lladdr", "02:00:00:00:00:99")
        line = failure(lab.netweaver(*fast(lab, 20), seconds=30), 6)
    finally:
        for host in lab.sources:
            host.run("ip", "neigh", "del", lab.destination, "dev", "eth0")
        lab.hv.run("ip", "link", "set", "vif5.0", "master", "xenbr0")
    assert "(40 on eth0, 0 on vif5.0)" in line


def test_many_runs_at_once_keep_apart(lab: Lab) -> None:
    """Those that saw the packets of another warn; hping3 may send more than it counts."""
    processes = []
    for number in range(1, 9):
        # From other ports, since all hping3 of the same second send the same packets.
        arguments = ["-c", "300", "--source-command", f"{FAST} -s {5000 * number}"]
        processes.append(lab.start(*lab.arguments(*arguments, source=lab.source.address)))
    reports = [report(finished(process, 100)) for process in processes]
    for found in reports:
        sent = found["config"]["transmitted"]
        seen = found["packets"]["pif"]
        assert seen >= sent > 0
        assert found["packets"]["lost"] == 0
        assert found["packets"]["vif_only"] == 0
        warned = any(f"this run sent {sent}" in warning for warning in found["warnings"])
        assert warned == (seen > sent)
    assert any(found["packets"]["pif"] > found["config"]["transmitted"] for found in reports)


def test_other_traffic_at_the_edges_counts_for_nothing() -> None:
    """Packets are on their way while the captures start and stop, never at one instant.

    A busy machine may hold the forwarder up for longer than the usual wait.
    """
    with Lab(forwarder=["--delay", "30000"]) as lab:
        background = subprocess.Popen(
            lab.source.command("hping3", "-q", "-S", "-i", "u2000", lab.destination),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            for _ in range(2):
                document = report(lab.netweaver(*fast(lab, 100, "--wait", "1")))
                assert document["packets"]["lost"] == 0
                assert document["packets"]["vif_only"] == 0
                assert document["packets"]["pif"] > 100
                assert document["capture"]["pif"]["captured"] > document["packets"]["pif"]
                assert any("other traffic" in warning for warning in document["warnings"])
        finally:
            background.kill()
            background.wait()


# -- captures --


def test_a_physical_interface_that_is_named_twice(lab: Lab) -> None:
    document = report(lab.netweaver(*fast(lab, 60, "-i", "eth0", "-i", "eth0")))
    assert document["packets"]["pif"] == document["packets"]["matched"] == 120
    assert document["config"]["pif"] == "eth0"


def test_an_interface_that_goes_away(own_lab: Lab) -> None:
    process = start_endless(own_lab)
    own_lab.hv.run("ip", "link", "del", "vif5.0")
    line = failure(finished(process, 20), 5)
    assert "the capture on vif5.0 ended" in line
    assert re.search("disappeared|went down|No such", line)
    own_lab.wait_clean()


TCPDUMP = shutil.which("tcpdump", path=f"{os.environ['PATH']}:/usr/sbin")


def test_a_capture_that_ignores_the_request_to_end(lab: Lab) -> None:
    """It is killed, and its packets are measured."""
    script = f"""case "$*" in *vif5.0*) ;; *) exec {TCPDUMP} "$@" ;; esac
trap '' TERM
{TCPDUMP} "$@"
while :; do sleep 1; done"""
    begun = time.monotonic()
    with lab.hv.program("tcpdump", script):
        document = report(lab.netweaver(*fast(lab, 60)))
    assert time.monotonic() - begun < 15
    assert document["packets"]["matched"] == 120
    assert document["packets"]["lost"] == 0
    assert any("killed" in warning for warning in document["warnings"])


def test_a_capture_that_does_not_say_what_it_dropped(lab: Lab) -> None:
    script = f"""case "$*" in *vif5.0*) ;; *) exec {TCPDUMP} "$@" ;; esac
trap 'kill $!' TERM
{TCPDUMP} "$@" 2>errors &
while ! grep -q listening errors; do sleep 0.1; done
cat errors >&2
until wait; do :; done"""
    with lab.hv.program("tcpdump", script):
        document = report(lab.netweaver(*fast(lab, 60)))
    assert document["packets"]["matched"] == 120
    assert any("vif5.0 reported no counts" in warning for warning in document["warnings"])


def test_a_full_disk(lab: Lab) -> None:
    """There tcpdump exits with 0, and counts packets that it couldn't write."""
    traffic = ["--source-command", "hping3 -S -i u500 {destination}", "--duration", "2"]
    ballast = "dd if=/dev/zero of=/tmp/other/ballast bs=1k count=700 2>/dev/null; true"
    with lab.hv.temporary_files("size=600k"):
        lab.hv.run("mkdir", "/tmp/other")
        process = lab.start(*lab.arguments(*traffic))
        wait_until(lambda: sending(lab), "the traffic")
        lab.hv.run("sh", "-c", ballast)
        line = failure(finished(process), 5)
        assert "full?" in line
        assert lab.hv.run("ls", "/tmp").split() == ["other"]
        assert client_files(lab) == []
        line = failure(lab.netweaver(*lab.arguments(), seconds=15), 5)
        assert "no space left in /tmp" in line


def test_a_directory_that_can_not_be_written(lab: Lab) -> None:
    with lab.hv.temporary_files("ro"):
        line = failure(lab.netweaver(*lab.arguments(), seconds=15), 5)
    assert "Read-only file system" in line


def test_no_tcpdump(lab: Lab) -> None:
    with lab.hv.program("tcpdump", "echo 'sh: tcpdump: not found' >&2; exit 127"):
        line = failure(lab.netweaver(*lab.arguments(), seconds=15), 5)
    assert "tcpdump: not found" in line
    assert "apt-get install tcpdump" in line


def test_an_old_tcpdump(lab: Lab) -> None:
    """Without an option for nanoseconds the stamps are microseconds, which the report shows."""
    script = f"""case "$*" in
  *--help*) echo 'Usage: tcpdump [-aAdDeflLnNOpqRStuUvxX] [ -c count ]' >&2; exit 1 ;;
  *--time-stamp-precision*|*-B*) echo "tcpdump: invalid option" >&2; exit 1 ;;
esac
exec {TCPDUMP} "$@\""""
    with lab.hv.program("tcpdump", script):
        document = report(lab.netweaver(*fast(lab, 60)))
    assert document["packets"]["matched"] == 120
    assert document["capture"]["pif"]["precision"] == "microseconds"


def test_a_tcpdump_without_permission(lab: Lab) -> None:
    message = "tcpdump: eth0: You don't have permission to capture on that device"
    script = f'case $1 in --help) ;; *) echo "{message}" >&2; exit 1 ;; esac'
    with lab.hv.program("tcpdump", script):
        line = failure(lab.netweaver(*lab.arguments(), seconds=15), 5)
    assert message in line
    assert "--sudo" in line


def test_a_clock_that_is_set_during_the_run(lab: Lab, tmp_path: Path) -> None:
    """Hosts share the machine's clock, so date(1) jumps by an hour after its first answer."""
    asked = lab.hv.directory / "asked"
    script = f"""if [ -e {asked} ]; then exec /bin/date -d '+1 hour' "$@"; fi
: >{asked}; exec /bin/date "$@\""""
    with lab.hv.program("date", script):
        document = report(lab.netweaver(*fast(lab, 60)))
    asked.unlink()
    assert "clock jumped by about 3600 s" in document["warnings"][0]
    assert document["packets"]["matched"] == 120
    assert "window" not in document["config"]


def test_a_host_whose_date_has_no_nanoseconds(lab: Lab) -> None:
    """busybox prints %N as it stands: the window is whole seconds then."""
    with lab.hv.program("date", 'echo "`/bin/date +%s`%N"'):
        document = report(lab.netweaver(*fast(lab, 60)))
    assert "nanoseconds" in document["warnings"][0]
    assert document["packets"]["matched"] == document["packets"]["pif"] == 120
    assert document["config"]["window"]["start"].endswith(".000000000Z")


def test_a_date_that_hangs(lab: Lab) -> None:
    """It is asked once, the run ends without a window, and nothing stays on the host."""
    begun = time.monotonic()
    with lab.hv.program("date", "exec sleep 1000"):
        document = report(lab.netweaver(*fast(lab, 20)))
    assert time.monotonic() - begun < 30
    assert document["packets"]["matched"] == 40
    assert any("could not be read" in warning for warning in document["warnings"])
    assert "window" not in document["config"]


def test_the_local_disk_is_full(lab: Lab) -> None:
    """It is not the connection that fails."""
    directory = lab.directory / "client-tmp"
    directory.mkdir(exist_ok=True)
    mount = 'mount -t tmpfs -o size=32k none "$0" && exec "$@"'
    words = [PYTHON, str(NETWEAVER), *fast(lab, 1000)]
    process = subprocess.Popen(
        lab.on_client("sh", "-c", mount, str(directory), *words),
        env=lab.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = failure(finished(process), 5)
    assert "can't write" in line
    assert "on this machine: No space left on device" in line


# -- security --

EVIL = [
    "x; touch OWNED",
    "$(touch OWNED)",
    "`touch OWNED`",
    "'; touch OWNED; '",
    '"; touch OWNED; "',
    "| touch OWNED",
    "-oProxyCommand=touch OWNED",
    "../../../OWNED",
    "x\ntouch OWNED\n",
    "\x1b]0;OWNED\x07\x1b[2J",
    "x && touch OWNED",
    "{0.__class__}",
    "%n%s",
    "*",
    "~root",
    "é\udcff",
]
COMMAND_LINES = """
import json, sys, netweaver
for arguments in json.loads(sys.argv[1]):
    try:
        print(netweaver.main(arguments))
    except SystemExit as end:
        print(end.code)
"""


@pytest.mark.parametrize(
    "option", ["-n", "-d", "-s", "--hv", "-i", "--vif", "-k", "-o", "--num", "--source-command"]
)
def test_arguments_are_no_code(lab: Lab, option: str, tmp_path: Path) -> None:
    """No shell, path or terminal takes any text of an argument for more than a name."""
    inside = tmp_path / "a" / "b" / "c"
    inside.mkdir(parents=True)
    texts = EVIL
    if option == "--source-command":  # which is a shell command
        texts = [text for text in EVIL if "touch" not in text]
    separator = "=" if option.startswith("--") else ""
    lines = []
    for text in texts:
        evil = f"{option}{separator}{text}"
        words = ("-c", "1", "--source-command", "true", evil)
        lines.append(lab.arguments(*words, source=lab.source.address))
    process = subprocess.run(
        lab.on_client(PYTHON, "-c", COMMAND_LINES, json.dumps(lines)),
        cwd=inside,
        env={**lab.environment, "PYTHONPATH": str(NETWEAVER.parent)},
        capture_output=True,
        timeout=120,
        check=False,
    )
    codes = process.stdout.split()
    assert len(codes) == len(texts), process
    assert set(codes) <= {b"2", b"3", b"4", b"5", b"6"}, process
    assert b"\x1b" not in process.stderr
    assert b"Traceback" not in process.stderr
    assert b"unexpected" not in process.stderr, process.stderr
    assert process.stderr.count(b"netweaver: error: ") == len(texts)
    assert set(tmp_path.rglob("*")) == {tmp_path / "a", tmp_path / "a" / "b", inside}
    for root in ("/", "/root", "/tmp"):
        assert not Path(root, "OWNED").exists()
    assert not [path for host in lab.hosts for path in host.files() if "OWNED" in path]


def wait_for_prompt(lab: Lab, directory: Path) -> tuple[int, int, bytes]:
    """Start netweaver with an encrypted key; return pid, terminal and what is shown."""
    secret = directory / "secret"
    shutil.copy(lab.key, secret)
    secret.chmod(0o600)
    change = ["ssh-keygen", "-q", "-p", "-P", "", "-N", "open sesame", "-f", str(secret)]
    subprocess.run(change, check=True, capture_output=True)
    pid, terminal = fork_on_client(lab, fast(lab, 3, "-q", "-k", str(secret)))
    seen = b""
    while b"Passphrase for" not in seen:
        seen += os.read(terminal, 1000)
    return pid, terminal, seen


def read_to_its_end(terminal: int) -> bytes:
    """Return what a terminal shows until its program has ended."""
    seen = b""
    try:
        while more := os.read(terminal, 1000):
            seen += more
    except OSError:  # that is how a terminal ends
        pass
    return seen


def test_an_interrupt_at_the_prompt_for_a_passphrase(lab: Lab, tmp_path: Path) -> None:
    """The terminal shows again what is typed."""
    pid, terminal, _ = wait_for_prompt(lab, tmp_path)
    assert not termios.tcgetattr(terminal)[3] & termios.ECHO
    os.write(terminal, b"\x03")
    read_to_its_end(terminal)
    assert exit_code(pid) == 130
    assert termios.tcgetattr(terminal)[3] & termios.ECHO
    os.close(terminal)


@pytest.mark.parametrize(("phrase", "code"), [("open sesame", 0), ("wrong", 3)])
def test_a_passphrase_is_asked_for_at_a_terminal(
    lab: Lab, tmp_path: Path, phrase: str, code: int
) -> None:
    pid, terminal, seen = wait_for_prompt(lab, tmp_path)
    os.write(terminal, phrase.encode() + b"\n")
    seen += read_to_its_end(terminal)
    os.close(terminal)
    assert exit_code(pid) == code, seen
    assert b"secret: " + phrase.encode() not in seen  # no echo
    assert (b"6 matched" in seen) == (code == 0)
    assert (b"passphrase is wrong" in seen) == (code == 3)
