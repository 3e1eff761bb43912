from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import kvm
import laboratory
import machines
import openvswitch
import pytest
import xen as xen_laboratory

REQUIRED = os.environ.get("NETWEAVER_REQUIRE_LAB") == "1"
# A shell's background jobs, and theirs, would ignore these, and so would those of nohup.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what can't be built here, and select the tests of a phase.

    Some tests need the machine for themselves.
    """
    for marker, reason in (
        ("lab", laboratory.missing()),
        ("openvswitch", openvswitch.missing()),
        ("hypervisor", machines.missing() or kvm.missing()),
    ):
        wanted = [item for item in items if item.get_closest_marker(marker)]
        if reason and wanted and REQUIRED:
            pytest.exit(
                f"NETWEAVER_REQUIRE_LAB=1, and the lab can't be built: {reason}", returncode=1
            )
        for item in wanted if reason else ():
            item.add_marker(pytest.mark.skip(reason=f"the lab can't be built: {reason}"))
    if wanted_phase := os.environ.get("NETWEAVER_PHASE"):
        config.hook.pytest_deselected(items=[item for item in items if phase(item) != wanted_phase])
        items[:] = [item for item in items if phase(item) == wanted_phase]


def phase(item: pytest.Item) -> str:
    """Return the part of run.sh in which a test runs."""
    return next(
        (marker for marker in ("hypervisor", "alone") if item.get_closest_marker(marker)),
        "together",
    )


@pytest.fixture(scope="session")
def shared_lab() -> Iterator[laboratory.Lab]:
    """Return a lab with a bridge and two sources, for all tests that leave it as it was."""
    with laboratory.Lab(sources=2) as built:
        yield built


@pytest.fixture
def lab(shared_lab: laboratory.Lab) -> Iterator[laboratory.Lab]:
    """Return the shared lab; the test must leave nothing on its hosts."""
    yield shared_lab
    shared_lab.wait_clean()


@pytest.fixture
def own_lab() -> Iterator[laboratory.Lab]:
    """Return a lab of the test's own, which it may break."""
    with laboratory.Lab() as built:
        yield built


@pytest.fixture(scope="session")
def shared_xen() -> Iterator[xen_laboratory.XenLab]:
    """Xen, booted once."""
    with xen_laboratory.XenLab() as built:
        yield built
