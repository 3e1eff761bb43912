"""Logins without root's rights, which sudo gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers import FAST, failure, report
from laboratory import Host, Lab, wait_until

pytestmark = pytest.mark.lab

USER = "op"
ENTRIES = {
    "passwd": f"{USER}:x:4711:4711::/tmp:/bin/sh\n",
    "shadow": f"{USER}:*:19000:0:99999:7:::\n",
    "group": f"{USER}:x:4711:\n",
}
RULE = f"{USER} ALL=(ALL) NOPASSWD: ALL"


def write_rules(lab: Lab, *lines: str) -> None:
    """Write the sudoers of all hosts, on which the stand-ins for toolstacks are found, too."""
    for host in lab.hosts:
        path = f"{host.directory}/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        defaults = [f"Defaults secure_path={path}", "Defaults env_keep+=POOL"]
        rules = host.directory / "etc" / "sudoers.d" / USER
        rules.write_text("\n".join([*defaults, *lines, ""]))
        rules.chmod(0o440)


def add_user(host: Host) -> None:
    for name, line in ENTRIES.items():
        path = host.directory / "etc" / name
        path.write_text(path.read_text() + line)
    (host.directory / "tmp").chmod(0o1777)


@pytest.fixture(scope="module")
def sudo_lab() -> Iterator[Lab]:
    """Provide a lab whose hosts have a user without rights."""
    with Lab() as lab:
        for host in lab.hosts:
            add_user(host)
        lab.key.with_suffix(".pub").chmod(0o644)
        lab.directory.chmod(0o755)
        yield lab


def arguments(lab: Lab, *more: str) -> list[str]:
    hosts = ["--hv", f"{USER}@{lab.hv.address}", "-s", f"{USER}@{lab.source.address}"]
    traffic = ["-d", lab.destination, "-c", "300", "--source-command", FAST]
    return ["-n", lab.name, "-k", str(lab.key), *hosts, *traffic, *more]


def test_without_sudo(sudo_lab: Lab) -> None:
    write_rules(sudo_lab)
    line = failure(sudo_lab.netweaver(*arguments(sudo_lab)), 5)
    assert "(log in as root, or use --sudo)" in line


def test_without_a_rule(sudo_lab: Lab) -> None:
    write_rules(sudo_lab)
    line = failure(sudo_lab.netweaver(*arguments(sudo_lab, "--sudo")), 4)
    assert "sudo: " in line
    assert "NOPASSWD" in line
    assert len(line) < 300  # what was run is named, not printed


def test_a_rule_that_requires_a_terminal(sudo_lab: Lab) -> None:
    write_rules(sudo_lab, RULE, f"Defaults:{USER} requiretty")
    line = failure(sudo_lab.netweaver(*arguments(sudo_lab, "--sudo")), 4)
    assert "!requiretty" in line


@pytest.mark.parametrize("defaults", ["", "log_input", "log_output", "use_pty"])
def test_sudo_and_its_logs(sudo_lab: Lab, defaults: str) -> None:
    lines = [RULE]
    if defaults:
        lines.append(f"Defaults:{USER} {defaults}, iolog_dir=/tmp/log")
    write_rules(sudo_lab, *lines)
    document = report(sudo_lab.netweaver(*arguments(sudo_lab, "--sudo")))
    assert document["packets"]["matched"] == 300
    assert document["config"]["hypervisor"] == f"{USER}@{sudo_lab.hv.address}"
    for host in sudo_lab.hosts:
        host.run("rm", "-rf", "/tmp/log")
    sudo_lab.wait_clean()


def test_one_host_with_sudo_and_one_with_root(sudo_lab: Lab) -> None:
    write_rules(sudo_lab, RULE)
    root = ["--hv", sudo_lab.hv.address]
    document = report(sudo_lab.netweaver(*arguments(sudo_lab, "--sudo", *root)))
    assert document["packets"]["matched"] == 300


@pytest.mark.alone
def test_the_trace_with_sudo(sudo_lab: Lab) -> None:
    """The trace's files are fetched by a user who isn't root."""
    write_rules(sudo_lab, RULE)
    document = report(sudo_lab.netweaver(*arguments(sudo_lab, "--sudo", "--stages")))
    assert document["stages"]["forwarding"]["packets"] == 300


@pytest.mark.parametrize("directory", ["/root/private", "."])
def test_a_temporary_directory_that_can_not_be_used(sudo_lab: Lab, directory: str) -> None:
    """The user who fetches the files couldn't enter one of root, as pam_tmpdir gives."""
    for host in sudo_lab.hosts:
        (host.directory / "root" / "private").mkdir(mode=0o700)
        (host.directory / "etc" / "sudo-environment").write_text(f"TMPDIR={directory}\n")
    write_rules(sudo_lab, RULE, "Defaults env_file=/etc/sudo-environment")
    try:
        document = report(sudo_lab.netweaver(*arguments(sudo_lab, "--sudo")))
    finally:
        for host in sudo_lab.hosts:
            (host.directory / "root" / "private").rmdir()
    assert document["packets"]["matched"] == 300
    sudo_lab.wait_clean()


def test_a_killed_client_leaves_nothing_of_root(sudo_lab: Lab) -> None:
    write_rules(sudo_lab, RULE)
    command = "hping3 -S -i u10000 {destination}"
    process = sudo_lab.start(*arguments(sudo_lab, "--sudo", "--source-command", command))
    wait_until(
        lambda: any("hping3" in line for line in sudo_lab.source.processes().values()),
        "the traffic",
    )
    process.kill()
    process.communicate()
    wait_until(
        lambda: not any(host.processes() or host.files() for host in sudo_lab.hosts),
        "nothing left",
        15,
    )
