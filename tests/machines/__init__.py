"""Machines that QEMU emulates for the labs with real hypervisors.

Their images, and running them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from laboratory import not_installed

HERE = Path(__file__).resolve().parent
NEEDED = ("qemu-system-x86_64", "mmdebstrap", "cpio", "modprobe", "mke2fs", "apt-get", "dpkg")


def missing() -> str | None:
    """Return why the machines can't be built here; None if they can."""
    busybox = Path("/bin/busybox")
    if (
        not busybox.exists() or b"/ld-linux" in busybox.read_bytes()[:4096]
    ):  # where its interpreter stands
        return "not installed: busybox-static"
    return not_installed(NEEDED)


def images() -> Path:
    """Return the directory of what build.sh makes, once for all sessions, outside the tree.

    Its name is a hash of what goes into it; directories with other names are removed.
    """
    sources = [path for path in sorted(HERE.iterdir()) if path.is_file() and path.suffix != ".py"]
    sources.append(Path("/etc/os-release"))
    contents = b"\0".join(path.read_bytes() for path in sources)
    key = hashlib.sha256(contents).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "/var/cache") / "netweaver-tests"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / key).exists():
            for old in cache.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
            new = cache / f"{key}.new"
            new.mkdir()
            with open(cache / "build.log", "w") as log:
                done = subprocess.run(
                    ["sh", str(HERE / "build.sh"), str(new)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    check=False,
                )
            if done.returncode:
                lines = (cache / "build.log").read_text().splitlines()[-10:]
                raise RuntimeError("the machines' images can't be built:\n" + "\n".join(lines))
            new.rename(cache / key)
    return cache / key
