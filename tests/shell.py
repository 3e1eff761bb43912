"""A hypervisor's shell on this machine, as the functions of the toolstacks use it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laboratory import TESTS

import netweaver


class Shell:
    """Run commands with the stand-ins first in PATH, and libvirt's test driver."""

    def __init__(self, directory: Path, pool: Mapping[str, Any]) -> None:
        path = directory / "pool.json"
        path.write_text(json.dumps(pool))
        self.environment = dict(os.environ)
        self.environment["PATH"] = f"{TESTS / 'standins'}:{os.environ['PATH']}"
        self.environment["POOL"] = str(path)
        self.environment["LIBVIRT_DEFAULT_URI"] = "test:///default"
        self.commands: list[str] = []

    def __call__(self, command: str, hint: str = "") -> str:
        self.commands.append(command)
        done = subprocess.run(
            ["sh", "-c", command],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = netweaver.last_line(done.stderr)
            raise netweaver.RemoteCommandError(f"{reason} ({hint})")
        return done.stdout


def script(path: Path, text: str) -> None:
    """Write an executable shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
