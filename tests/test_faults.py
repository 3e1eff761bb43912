"""Faults, made to happen in the lab: what must come of each, and that nothing stays on any host."""
from __future__ import annotations

import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import ENDLESS, FAST, failure, finished, report, run_code, sending, wait_for_packets
from lab import NETWEAVER, Lab, wait_until

pytestmark = pytest.mark.lab
def hosts_clean(lab: Lab) -> bool:
    """Nothing of netweaver's is left on the hosts; sshd itself may still wait for a peer that is gone."""
    return not any(host.files() for host in lab.hosts) and not any(
        "sshd" not in line for host in lab.hosts for line in host.processes().values())


def remove_client_leftovers(lab: Lab) -> None:
    """A client that was killed leaves its own private directory."""
    for path in (lab.directory / "client-tmp").iterdir():
        shutil.rmtree(path)


# -- the client, and its connection ----------------------------------------------------------------------------

def test_killed_at_any_moment(lab: Lab) -> None:
    chance = random.Random(1)
    for _ in range(4):
        process = lab.start(*lab.arguments("--source-command", ENDLESS, "--duration", "2"))
        time.sleep(chance.uniform(0.2, 4.5))         # the moment itself is what varies here
        process.kill()
        process.communicate()
        wait_until(lambda: hosts_clean(lab), "clean hosts", 15)
    remove_client_leftovers(lab)


@pytest.mark.parametrize("side", ["hv", "src1"])
def test_a_connection_cut_without_a_word(side: str) -> None:
    with Lab() as lab:
        process = lab.start(*lab.arguments("--source-command", ENDLESS))
        wait_until(lambda: sending(lab), "the traffic")
        subprocess.run(["ip", "-n", lab.client, "link", "set", f"m-{side}", "down"], check=True)
        line = failure(finished(process, 25), 3)
        assert f"the connection to root@{lab.hv.address if side == 'hv' else lab.source.address} is lost" in line
        wait_until(lambda: hosts_clean(lab), "clean hosts", 15)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_one_signal_ends_the_traffic_and_gives_a_report(lab: Lab, number: signal.Signals, code: int) -> None:
    process = lab.start(*lab.arguments("--source-command", ENDLESS))
    wait_for_packets(lab)
    process.send_signal(number)
    done = finished(process)
    assert done.returncode == code, done.stderr
    found = json.loads(done.stdout)
    assert found["interrupted"] is True
    assert found["packets"]["matched"] > 10
    assert found["packets"]["lost"] == 0
    lab.wait_clean(2)


def test_a_signal_before_there_is_anything_to_report(lab: Lab) -> None:
    process = lab.start(*lab.arguments("--hv", "10.83.0.99"))
    wait_until(lambda: Path(f"/proc/{process.pid}/task").exists() and len(os.listdir(f"/proc/{process.pid}/task")) > 1,
               "its threads")
    process.send_signal(signal.SIGINT)
    assert "interrupted" in failure(finished(process, 5), 130)


def test_a_second_signal_ends_at_once(lab: Lab) -> None:
    process = lab.start(*lab.arguments("--source-command", ENDLESS))
    wait_until(lambda: sending(lab), "the traffic")
    process.send_signal(signal.SIGINT)
    wait_until(lambda: not sending(lab), "the end of the traffic")
    process.send_signal(signal.SIGINT)
    done = finished(process, 5)
    assert (done.returncode, done.stdout) == (130, "")
    wait_until(lambda: hosts_clean(lab), "clean hosts", 15)
    assert not list((lab.directory / "client-tmp").iterdir())


def test_the_terminal_closes(lab: Lab, tmp_path: Path) -> None:
    """SIGHUP comes, and both streams are dead: the result is written where it should be."""
    pid, terminal = pty.fork()
    if pid == 0:
        words = lab.on_client(sys.executable, str(NETWEAVER), *lab.arguments(
            "--source-command", ENDLESS, "--output", str(tmp_path / "result.json"), "--save", str(tmp_path / "runs")))
        os.execvpe(words[0], words, lab.environment)
    wait_for_packets(lab)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["packets"]["matched"] > 10
    assert json.loads(Path(found["saved"], "report.json").read_text()) == found
    lab.wait_clean()


@pytest.mark.parametrize(("program", "number", "words"), [
    ("sh", signal.SIGTERM, "is lost (or its shell there was killed)"),
    (r"sshd(-session)?: root@notty", signal.SIGKILL, "is lost")])
def test_what_holds_a_session_is_killed(lab: Lab, program: str, number: signal.Signals, words: str) -> None:
    """The captures end with it, and by themselves without an error."""
    process = lab.start(*lab.arguments("--source-command", ENDLESS))
    wait_until(lambda: sending(lab), "the traffic")
    os.kill(min(pid for pid, line in lab.hv.processes().items() if re.fullmatch(program, line)), number)
    line = failure(finished(process), 3)
    assert line.endswith(f"the connection to root@{lab.hv.address} {words}")
    wait_until(lambda: hosts_clean(lab), "clean hosts", 15)


def test_a_host_behind_a_jump_dies(own_lab: Lab) -> None:
    """By heartbeats it is known within 12 s, and the jump, which lives, needn't say so."""
    lab = own_lab
    (lab.home / ".ssh").mkdir(0o700)
    (lab.home / ".ssh" / "config").write_text(
        f"Host hv\n    HostName {lab.hv.address}\n    ProxyJump {lab.source.address}\n    IdentityFile {lab.key}\n")
    process = lab.start(*lab.arguments("--hv", "hv", "--source-command", ENDLESS, "--duration", "60"))
    wait_until(lambda: sending(lab), "the traffic")
    begun = time.monotonic()
    subprocess.run(["ip", "-n", lab.client, "link", "set", "m-hv", "down"], check=True)
    line = failure(finished(process, 25), 3)
    assert time.monotonic() - begun < 16             # and what the connections' ends take
    assert "the connection to root@hv is lost" in line
    wait_until(lambda: hosts_clean(lab), "clean hosts", 15)


def test_a_client_that_is_suspended(lab: Lab) -> None:
    """For a moment that does nothing; for longer than a host waits it ends the run there, and an error here says so."""
    process = lab.start(*lab.arguments("--source-command", ENDLESS, "--duration", "5"))
    wait_until(lambda: sending(lab), "the traffic")
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)                                    # how long it is suspended is what this is about
    process.send_signal(signal.SIGCONT)
    assert report(finished(process))["packets"]["matched"] > 100
    process = lab.start(*lab.arguments("--source-command", ENDLESS))
    wait_until(lambda: sending(lab), "the traffic")
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: hosts_clean(lab), "clean hosts", 20)
    process.send_signal(signal.SIGCONT)
    assert "is lost" in failure(finished(process), 3)


# -- traffic ---------------------------------------------------------------------------------------------------

@pytest.mark.alone
def test_a_flood_is_bounded_and_captured_without_a_drop(lab: Lab) -> None:
    found = report(lab.netweaver(*lab.arguments("--duration", "2", "--source-command",
                                                "hping3 -S --flood {destination}",
                                                source=lab.source.address)))
    assert found["packets"]["pif"] > 10_000
    assert [found["capture"][side]["dropped"] for side in ("pif", "vif")] == [0, 0]
    assert found["packets"]["lost"] == 0


def test_the_size_of_a_capture_is_bounded(lab: Lab) -> None:
    """By half of the free space; what came after the limit is neither lost nor seen on the vif only."""
    lab.hv.run("mount", "-t", "tmpfs", "-o", "size=4m", "none", "/tmp")
    try:
        found = report(lab.netweaver(*lab.arguments("--duration", "2", "--source-command",
                                                    "hping3 -S -i u50 {destination}")))
    finally:
        lab.hv.run("umount", "-l", "/tmp")
    limit = 4 * 1024 ** 2 // 4 // (16 + 128)
    assert any(f"a capture has reached its limit of {limit} packets (by --count, or half of the" in text
               for text in found["warnings"]), found["warnings"]
    assert found["packets"]["lost"] == found["packets"]["vif_only"] == 0
    assert 5000 < found["packets"]["matched"] <= limit == found["capture"]["pif"]["records"]


def test_one_of_several_sources_fails(lab: Lab) -> None:
    """It is named, and what the others sent is measured."""
    second = lab.sources[1].address
    command = f"ip -o addr | grep -q {second} && exit 9; {FAST.format(count=300, destination=lab.destination)}"
    found = report(lab.netweaver(*lab.arguments("--source-command", command.replace("{", "{{"))))
    assert list(found["failed_sources"]) == [f"root@{second}"]
    assert "exit status 9" in found["failed_sources"][f"root@{second}"]
    assert found["warnings"][0].startswith(f"a source failed, so its traffic is missing or not whole: root@{second}: ")
    assert found["packets"]["pif"] == found["packets"]["matched"] == 300


def test_one_of_several_sources_can_not_be_reached(lab: Lab) -> None:
    found = report(lab.netweaver(*lab.arguments("-c", "600", "--source-command", FAST, "-s", "10.83.0.99",
                                                source=lab.source.address)))
    assert list(found["failed_sources"]) == ["root@10.83.0.99"]
    assert "can't reach port 22" in found["warnings"][0]
    assert found["packets"]["matched"] == 600


def test_all_of_several_sources_fail(lab: Lab) -> None:
    line = failure(lab.netweaver(*lab.arguments("--source-command", "exit 9"), seconds=15), 4)
    assert f"root@{lab.sources[0].address}: exit 9: exit status 9" in line


def test_no_reply_and_all_lost(lab: Lab) -> None:
    """A destination that doesn't answer; its packets reach the pif and are dropped before the vif."""
    lab.hv.run("ip", "link", "set", "vif5.0", "nomaster")
    try:
        for host in lab.sources:
            host.run("ip", "neigh", "replace", lab.destination, "lladdr", "02:00:00:00:00:99", "dev", "eth0")
        line = failure(lab.netweaver(*lab.arguments("-c", "20", "--source-command", FAST), seconds=30), 6)
        assert "(40 on eth0, 0 on vif5.0)" in line
    finally:
        for host in lab.sources:
            host.run("ip", "neigh", "del", lab.destination, "dev", "eth0")
        lab.hv.run("ip", "link", "set", "vif5.0", "master", "xenbr0")
    line = failure(lab.netweaver(*lab.arguments("--source-command", "true"), seconds=30), 6)
    assert "(0 on eth0, 0 on vif5.0)" in line


def test_many_runs_at_once_keep_apart(lab: Lab) -> None:
    """Each one's numbers are true; those that saw another's packets say so (hping3 may send more than it counts)."""
    processes = [lab.start(*lab.arguments(           # from other ports: hping3s of the same second send the same
        "-c", "300", "--source-command", f"{FAST} -s {5000 * number}", source=lab.source.address))
        for number in range(1, 9)]
    found = [report(finished(process, 100)) for process in processes]
    for one in found:
        assert one["packets"]["pif"] >= one["config"]["transmitted"] > 0
        assert one["packets"]["lost"] == one["packets"]["vif_only"] == 0
        sent = one["config"]["transmitted"]
        other = any(f"this run sent {sent}: other traffic" in warning for warning in one["warnings"])
        assert other == (one["packets"]["pif"] > sent)
    assert any(one["packets"]["pif"] > one["config"]["transmitted"] for one in found)


def test_foreign_traffic_at_the_edges_counts_for_nothing() -> None:
    """Packets on their way while the captures start and stop, which they never do at the same instant."""
    with Lab(forwarder=["--delay", "30000"]) as lab:
        background = subprocess.Popen(lab.source.command("hping3", "-q", "-S", "-i", "u2000", lab.destination),
                                      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            for _ in range(3):
                found = report(lab.netweaver(*lab.arguments("-c", "100", "--source-command", FAST)))
                assert found["packets"]["lost"] == found["packets"]["vif_only"] == 0
                assert found["packets"]["pif"] > 100
                assert found["capture"]["pif"]["captured"] > found["packets"]["pif"]
                assert any("other traffic between the same hosts" in warning for warning in found["warnings"]), found
        finally:
            background.kill()
            background.wait()


# -- the hypervisor --------------------------------------------------------------------------------------------

def test_the_vms_own_interface_as_the_physical_one(own_lab: Lab) -> None:
    line = failure(own_lab.netweaver(*own_lab.arguments("-i", "vif5.0"), seconds=15), 2)
    assert "vif5.0 is the VM's own interface, and can't be the physical one (-i), too" in line
    found = report(own_lab.netweaver(*own_lab.arguments("-c", "600", "--source-command", FAST, "-i", "eth0",
                                                        "-i", "eth0")))
    assert (found["packets"]["pif"], found["packets"]["matched"], found["config"]["pif"]) == (600, 600, "eth0")


def test_an_interface_that_goes_away(own_lab: Lab) -> None:
    process = own_lab.start(*own_lab.arguments("--source-command", ENDLESS))
    wait_until(lambda: sending(own_lab), "the traffic")
    own_lab.hv.run("ip", "link", "del", "vif5.0")
    line = failure(finished(process, 20), 5)
    assert re.search(r"the capture on vif5\.0 ended with status \d+: tcpdump: .*(disappeared|went down|No such)", line)
    own_lab.wait_clean()


def test_a_full_disk(own_lab: Lab) -> None:
    """tcpdump exits with 0 and counts what it couldn't write."""
    own_lab.hv.run("mount", "-t", "tmpfs", "-o", "size=600k", "none", "/tmp")
    own_lab.hv.run("mkdir", "/tmp/other")
    process = own_lab.start(*own_lab.arguments("--source-command", "hping3 -S -i u500 {destination}", "--duration",
                                               "4"))
    wait_until(lambda: sending(own_lab), "the traffic")
    own_lab.hv.run("sh", "-c", "dd if=/dev/zero of=/tmp/other/ballast bs=1k count=700 2>/dev/null; true")
    line = failure(finished(process), 5)
    assert re.search(r"packets on (eth0|vif5\.0) and \d+ are in the file: is the disk under /tmp/netweaver\.", line)
    assert own_lab.hv.run("ls", "/tmp").split() == ["other"]
    assert not list((own_lab.directory / "client-tmp").iterdir())
    line = failure(own_lab.netweaver(*own_lab.arguments(), seconds=15), 5)
    assert "no space left in /tmp" in line


def test_a_directory_that_can_not_be_written(own_lab: Lab) -> None:
    own_lab.hv.run("mount", "-t", "tmpfs", "-o", "ro", "none", "/tmp")
    line = failure(own_lab.netweaver(*own_lab.arguments(), seconds=15), 5)
    assert "mktemp: " in line and "Read-only file system" in line


def test_no_tcpdump(own_lab: Lab) -> None:
    (own_lab.hv.directory / "bin" / "tcpdump").write_text("#!/bin/sh\necho 'sh: tcpdump: not found' >&2; exit 127\n")
    (own_lab.hv.directory / "bin" / "tcpdump").chmod(0o755)
    line = failure(own_lab.netweaver(*own_lab.arguments(), seconds=15), 5)
    assert "tcpdump: not found (install it there: apt-get install tcpdump)" in line


def test_an_old_tcpdump_and_one_without_permission(own_lab: Lab) -> None:
    """Without an option for nanoseconds the stamps are microseconds, which is said."""
    real = shutil.which("tcpdump", path=f"{os.environ['PATH']}:/usr/sbin")
    stub = own_lab.hv.directory / "bin" / "tcpdump"
    stub.write_text(f"""#!/bin/sh
case "$*" in
  *--help*) echo 'Usage: tcpdump [-aAdDeflLnNOpqRStuUvxX] [ -c count ] [ -s snaplen ]' >&2; exit 1 ;;
  *--time-stamp-precision*|*-B*) echo "tcpdump: invalid option" >&2; exit 1 ;;
esac
exec {real} "$@"
""")
    stub.chmod(0o755)
    found = report(own_lab.netweaver(*own_lab.arguments("-c", "600", "--source-command", FAST)))
    assert found["packets"]["matched"] == 600
    assert found["capture"]["pif"]["precision"] == "microseconds"
    message = "tcpdump: eth0: You don't have permission to capture on that device"
    stub.write_text(f"#!/bin/sh\ncase $1 in --help) ;; *) echo \"{message}\" >&2; exit 1 ;; esac\n")
    assert message in failure(own_lab.netweaver(*own_lab.arguments(), seconds=15), 5)


def test_a_clock_that_is_set_during_the_run(own_lab: Lab) -> None:
    """Namespaces share the machine's clock, so the hypervisor's date(1) jumps by an hour from its second answer on."""
    mark = own_lab.hv.directory / "asked"
    (own_lab.hv.directory / "bin" / "date").write_text(
        f"#!/bin/sh\nif [ -e {mark} ]; then exec /bin/date -d '+1 hour' \"$@\"; fi\n: >{mark}; exec /bin/date \"$@\"\n")
    (own_lab.hv.directory / "bin" / "date").chmod(0o755)
    found = report(own_lab.netweaver(*own_lab.arguments("-c", "600", "--source-command", FAST)))
    assert "the hypervisor's clock was set by about 3600 s during the run" in found["warnings"][0]
    assert found["packets"]["matched"] == 600
    assert "window" not in found["config"]


def test_a_host_whose_date_knows_no_nanoseconds(own_lab: Lab) -> None:
    """busybox prints %N as it stands: then the window is whole seconds, and a warning says so."""
    (own_lab.hv.directory / "bin" / "date").write_text("#!/bin/sh\necho \"`/bin/date +%s`%N\"\n")
    (own_lab.hv.directory / "bin" / "date").chmod(0o755)
    found = report(own_lab.netweaver(*own_lab.arguments("-c", "600", "--source-command", FAST)))
    assert "the hypervisor's date doesn't tell nanoseconds" in found["warnings"][0]
    assert found["packets"]["matched"] == found["packets"]["pif"] == 600
    assert found["config"]["window"]["start"].endswith(".000000000Z")


def test_the_local_disk_is_full(own_lab: Lab) -> None:
    """It is not the connection that fails."""
    full = own_lab.directory / "client-tmp"
    full.mkdir()
    process = subprocess.Popen(own_lab.on_client(
        "sh", "-c", 'mount -t tmpfs -o size=32k none "$0" && exec "$@"', str(full), sys.executable, str(NETWEAVER),
        *own_lab.arguments("-c", "2000", "--source-command", FAST)), env=own_lab.environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True)
    line = failure(finished(process), 5)
    assert re.search(r"can't write \S+/pif\.pcap on this machine: No space left on device", line)
    own_lab.wait_clean()


def change_sshd(lab: Lab, old: str, new: str) -> None:
    """Starts the hypervisor's sshd again with another configuration."""
    assert lab.hv.sshd is not None
    lab.hv.sshd.kill()
    lab.hv.sshd.wait()
    config = lab.hv.directory / "sshd_config"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    (lab.hv.directory / "sshd.log").write_text("")
    lab.restart_sshd(lab.hv)


@pytest.mark.parametrize(("sessions", "pifs"), [(2, 1), (3, 4), (10, 8)])
def test_few_sessions_on_a_connection(own_lab: Lab, sessions: int, pifs: int) -> None:
    """All captures share one, and so do all transfers."""
    names = ["eth0", *(f"eth{number}" for number in range(1, pifs))]
    for name in names[1:]:
        own_lab.hv.run("ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}-end")
        own_lab.hv.run("ip", "link", "set", name, "up")
    change_sshd(own_lab, "UseDNS no", f"UseDNS no\nMaxSessions {sessions}")
    found = report(own_lab.netweaver(*own_lab.arguments("-c", "600", "--source-command", FAST, *(
        word for name in names for word in ("-i", name)))))
    assert found["packets"]["matched"] == 600
    assert found["config"]["pif"] == ",".join(names)
    own_lab.wait_clean()


def test_too_few_sessions_on_a_connection(own_lab: Lab) -> None:
    change_sshd(own_lab, "UseDNS no", "UseDNS no\nMaxSessions 1")
    line = failure(own_lab.netweaver(*own_lab.arguments("-c", "600", "--source-command", FAST)), 3)
    assert "its sshd_config needs MaxSessions 2 or more" in line
    said = run_code(own_lab, """
netweaver.import_paramiko()
access = netweaver.Access(KEY, ["StrictHostKeyChecking no"])
host = access.connect(access.settings(netweaver.Target(f"root@{HV}")))
held = host.start("sleep 60", 60)
print(*netweaver.attempt_all(lambda name: host.run("true"), map(str, range(16)))[1].values(), sep="\\n")
held.leave()
host.close()
""")
    assert said.splitlines() == [line.partition("error: ")[2]] * 16                      # refused at once, too
    own_lab.wait_clean()


@pytest.mark.parametrize("subsystem", ["", "Subsystem sftp /bin/false", "Subsystem sftp /bin/echo noise",
                                       "Subsystem sftp /bin/cat"])
def test_a_host_without_sftp(own_lab: Lab, subsystem: str) -> None:
    """It is known before any traffic runs, and what to do."""
    change_sshd(own_lab, "Subsystem sftp internal-sftp", subsystem)
    line = failure(own_lab.netweaver(*own_lab.arguments("--source-command", "sleep 60"), seconds=15), 5)
    assert f"root@{own_lab.hv.address}: has no SFTP (" in line
    assert "its sshd_config needs a line such as 'Subsystem sftp internal-sftp'" in line
    own_lab.wait_clean()


def test_a_transfer_that_breaks_off(own_lab: Lab) -> None:
    """The file is gone when it is fetched, and nothing of it stays here."""
    process = own_lab.start(*own_lab.arguments("-c", "100", "--source-command", FAST))
    wait_until(lambda: sending(own_lab), "the traffic")
    own_lab.hv.run("sh", "-c", "rm -rf /tmp/netweaver.*/1.pcap")
    line = failure(finished(process), 5)
    assert "can't fetch /tmp/netweaver." in line and "No such file" in line
    own_lab.wait_clean()


def change_shell(lab: Lab, shell: str) -> None:
    """Gives root another login shell on the hypervisor."""
    passwd = lab.hv.directory / "etc" / "passwd"
    passwd.write_text(passwd.read_text().replace(":/root:/bin/sh\n", f":/root:{shell}\n"))


@pytest.mark.parametrize("shell", ["/bin/bash", "/bin/tcsh", "/usr/bin/fish"])
def test_login_shells_and_their_noise(own_lab: Lab, shell: str) -> None:
    """bash, csh and fish as root's shell, with banners on both streams, and a /tmp from which nothing can be run."""
    change_shell(own_lab, shell)
    root = own_lab.hv.directory / "root"
    noise = "echo Welcome; echo 'Last login: never' >&2; printf 'no newline'\n"
    (root / ".config" / "fish").mkdir(parents=True)
    for name in (".bashrc", ".tcshrc", ".config/fish/config.fish"):
        (root / name).write_text(noise if name != ".tcshrc" else "echo Welcome; printf 'no newline'\n")
    own_lab.hv.run("mount", "-o", "remount,bind,noexec", "/tmp")
    done = own_lab.netweaver(*own_lab.arguments("-c", "600", "--source-command", FAST))
    assert report(done)["packets"]["matched"] == 600
    assert "Welcome" not in done.stdout + done.stderr


def test_a_host_whose_stderr_comes_late(own_lab: Lab) -> None:
    """What tcpdump counted is told there, after all else."""
    change_shell(own_lab, "/root/shell")
    shell = own_lab.hv.directory / "root" / "shell"
    shell.write_text("#!/bin/bash\nlate() { while IFS= read -r line; do sleep 0.05; echo \"$line\" >&2; done; }\n"
                     'exec /bin/sh "$@" 2> >(late)\n')
    shell.chmod(0o755)
    found = report(own_lab.netweaver(*own_lab.arguments("-c", "100", "--source-command", FAST)))
    assert found["capture"]["pif"]["captured"] == found["capture"]["vif"]["captured"] == 100
    assert found["capture"]["pif"]["dropped"] == found["capture"]["vif"]["dropped"] == 0


# -- security --------------------------------------------------------------------------------------------------

EVIL = ["x; touch OWNED", "$(touch OWNED)", "`touch OWNED`", "'; touch OWNED; '", "\"; touch OWNED; \"",
        "| touch OWNED", "-oProxyCommand=touch OWNED", "../../../OWNED", "x\ntouch OWNED\n", "\x1b]0;OWNED\x07\x1b[2J",
        "x && touch OWNED", "{0.__class__}", "%n%s", "*", "~root", "é\udcff"]
COMMAND_LINES = """
import json, sys, netweaver
for arguments in json.loads(sys.argv[1]):
    try:
        print(netweaver.main(arguments))
    except SystemExit as end:
        print(end.code)
"""


@pytest.mark.parametrize("place", ["-n", "-d", "-s", "--hv", "-i", "--vif", "-k", "-o", "--num",
                                   "--source-command"])
def test_no_argument_gets_out_of_its_place(lab: Lab, place: str, tmp_path: Path) -> None:
    """Whatever stands in an argument, no shell, path or terminal takes it for more than a name."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    inside = tmp_path / "a" / "b" / "c"
    inside.mkdir()
    texts = [text for text in EVIL if place != "--source-command" or "touch" not in text]       # a shell command may
    lines = [lab.arguments("-c", "1", "--source-command", "true",
                           *([f"{place}={text}"] if place[1] == "-" else [place + text])) for text in texts]
    process = subprocess.run(lab.on_client(sys.executable, "-c", COMMAND_LINES, json.dumps(lines)), cwd=inside,
                             env={**lab.environment, "PYTHONPATH": str(NETWEAVER.parent)}, capture_output=True,
                             timeout=120, check=False)
    codes = process.stdout.split()
    assert len(codes) == len(texts) and set(codes) <= {b"2", b"3", b"4", b"5", b"6"}, process
    assert b"\x1b" not in process.stderr
    assert b"Traceback" not in process.stderr
    assert b"unexpected" not in process.stderr, process.stderr
    assert process.stderr.count(b"netweaver: error: ") == len(texts)
    assert not [path for path in tmp_path.rglob("*") if path not in (inside, *inside.parents)]
    assert not [path for path in map(Path, ("/OWNED", "/root/OWNED", "/tmp/OWNED")) if path.exists()]
    assert not [path for host in lab.hosts for path in host.files() if "OWNED" in path]


def test_what_a_host_says_reaches_no_terminal(own_lab: Lab) -> None:
    (own_lab.hv.directory / "bin" / "xe").write_text("#!/bin/sh\nprintf '\\033[2J\\033]0;x\\007oops\\n' >&2; exit 1\n")
    line = failure(own_lab.netweaver(*own_lab.arguments("--toolstack", "xe"), seconds=15), 4)
    assert "\\x1b[2J\\x1b]0;x\\x07oops" in line
    (own_lab.hv.directory / "bin" / "xe").write_text("#!/bin/sh\nprintf '\\033[2J7'\n")
    assert "which are no dom-ids" in failure(own_lab.netweaver(*own_lab.arguments("--toolstack", "xe"), seconds=15), 4)


@pytest.mark.parametrize("stream", ["", ">&2"])
def test_a_host_that_talks_without_end(own_lab: Lab, stream: str) -> None:
    (own_lab.hv.directory / "bin" / "xe").write_text(f"#!/bin/sh\nexec yes 'a long line, again and again' {stream}\n")
    failure(own_lab.netweaver(*own_lab.arguments("--toolstack", "xe"), seconds=30), 4)
    own_lab.wait_clean()


def test_a_host_that_says_nothing(own_lab: Lab) -> None:
    (own_lab.hv.directory / "bin" / "xe").write_text("#!/bin/sh\nexec sleep 1000\n")
    line = failure(own_lab.netweaver(*own_lab.arguments("--toolstack", "xe"), seconds=20), 4)
    assert "did not answer in time" in line
    own_lab.wait_clean()


@pytest.mark.parametrize(("phrase", "code"), [("open sesame", 0), ("wrong", 3)])
def test_a_passphrase_is_asked_for_at_a_terminal(lab: Lab, tmp_path: Path, phrase: str, code: int) -> None:
    secret = tmp_path / "secret"
    shutil.copy(lab.key, secret)
    secret.chmod(0o600)
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "open sesame", "-f", str(secret)], check=True,
                   capture_output=True)
    pid, terminal = pty.fork()
    if pid == 0:
        words = lab.on_client(sys.executable, str(NETWEAVER), *lab.arguments(
            "-q", "-c", "3", "--source-command", FAST, "-k", str(secret)))
        os.execvpe(words[0], words, lab.environment)
    seen = b""
    while b"Passphrase for" not in seen:
        seen += os.read(terminal, 1000)
    os.write(terminal, phrase.encode() + b"\n")
    try:
        while more := os.read(terminal, 1000):
            seen += more
    except OSError:                                  # that is how a terminal ends
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code, seen
    assert b"secret: " + phrase.encode() not in seen     # no echo
    assert (b" matched " if code == 0 else b"the passphrase is wrong") in seen


def test_no_secret_and_no_argument_in_process_lists(lab: Lab) -> None:
    process = lab.start(*lab.arguments("--source-command", "hping3 -S -i u20000 {destination}; : secret-word", "-v"))
    wait_until(lambda: sending(lab), "the traffic")
    lists: list[Any] = [line for host in lab.hosts for line in host.processes().values() if "sh -c" not in line]
    process.send_signal(signal.SIGINT)
    done = finished(process)
    assert not [line for line in lists if "TOKEN" in line or "netweaver-" in line]
    secret = lab.key.read_text().splitlines()[1]
    assert secret not in done.stdout + done.stderr
