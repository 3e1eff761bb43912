"""The README's commands and tables, against the program."""

from __future__ import annotations

import re
import shlex

import pytest
from laboratory import NETWEAVER

import netweaver

README = NETWEAVER.with_name("README.md").read_text(encoding="utf-8")
TARGET = "-n web1 --hv hv1 -s 192.0.2.1 -d 192.0.2.2"


def code_lines() -> list[str]:
    """Return the indented lines and the code spans that run netweaver."""
    indented = re.findall(r"^    (.*netweaver(?:\.py)? .*)$", README, re.MULTILINE)
    spans = re.findall(r"`(netweaver [^`]+)`", README)
    return [line for line in indented + spans if not line.startswith(("#", "pip", "apt"))]


def arguments(command: str) -> list[str]:
    """Return the arguments of a netweaver command in the README."""
    words = shlex.split(command.replace("...", TARGET))
    position = next(
        index for index, word in enumerate(words) if re.search(r"netweaver(\.py)?$", word)
    )
    return words[position + 1 :]


def crontab_command(line: str) -> str:
    """Return what cron gives to the shell of a line in /etc/cron.d: % ends it, \\% is a %."""
    command = line.split(maxsplit=6)[6]
    return re.split(r"(?<!\\)%", command)[0].replace("\\%", "%")


MEASURING = [line for line in code_lines() if "-n " in line or "..." in line or "--pcaps" in line]


def test_the_readme_has_commands() -> None:
    assert len(MEASURING) >= 15


@pytest.mark.parametrize("command", MEASURING)
def test_commands_are_accepted(
    command: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("readme"))
    monkeypatch.setattr(netweaver, "check_writable", lambda path: None)
    options = netweaver.parse_options(arguments(command))
    for text in options.limits:
        netweaver.parse_limit(text, options.direction or "in", options.stages)


def test_the_crontab_line_survives_cron() -> None:
    lines = [line for line in code_lines() if re.match(r"\S+ \* \* \* \* root ", line)]
    assert lines
    for line in lines:
        command = crontab_command(line)
        assert command == line.split(maxsplit=6)[6]
        options = netweaver.parse_options(
            [word for word in arguments(command) if not word.startswith("/var/")][:0]
            + arguments(command.replace("/var/lib/", "/tmp/"))
        )
        assert len(options.limits) == 2


def test_the_table_of_figures() -> None:
    for figure in netweaver.FIGURES:
        row = f"| `{figure.name}` | `{'.'.join(figure.path)}` | {figure.unit.value} |"
        assert f"{row} {figure.help} |\n" in README


def test_every_exit_code_is_explained() -> None:
    codes = {
        error.exit_code
        for error in vars(netweaver).values()
        if isinstance(error, type) and issubclass(error, netweaver.NetWeaverError)
    }
    table = README.split("### Exit codes")[1].split("\n## ")[0]
    for code in codes | {0, 7, 130, 143, 129}:
        assert re.search(rf"\b{code}\b", table), code


def test_the_example_of_a_subclass_compiles() -> None:
    example = README.split("```python\n")[1].split("```")[0]
    names = {"__name__": "example"}
    exec(compile(example.split("\nwith ")[0], "README.md", "exec"), names)
    assert issubclass(names["Incus"], netweaver.NetWeaver)  # type: ignore[arg-type]


def test_the_readme_is_short() -> None:
    assert len(README.encode()) <= 16 * 1024


def test_the_toolstacks_are_named_as_requirements() -> None:
    (requirements,) = re.findall(r"^The hypervisor \(.*?SFTP", README, re.MULTILINE | re.DOTALL)
    for toolstack in netweaver.TOOLSTACKS.values():
        for title in toolstack.title.split(", "):
            assert title.removeprefix("plain ") in requirements


def test_the_time_after_which_a_silent_host_is_given_up() -> None:
    assert f"silent for {netweaver.IDLE_SECONDS} seconds" in README
