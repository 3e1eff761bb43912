from __future__ import annotations

import os
from collections.abc import Iterator

import lab as laboratory
import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = laboratory.missing()
    if reason and os.environ.get("NETWEAVER_REQUIRE_LAB") == "1":
        pytest.exit(f"NETWEAVER_REQUIRE_LAB=1, and the lab can't be built: {reason}", returncode=1)
    for item in items:
        if reason and item.get_closest_marker("lab"):
            item.add_marker(pytest.mark.skip(reason=f"the lab can't be built: {reason}"))


@pytest.fixture(scope="session")
def shared_lab() -> Iterator[laboratory.Lab]:
    """A lab with a bridge and two sources, for all tests that leave it as it was."""
    with laboratory.Lab(sources=2) as built:
        yield built


@pytest.fixture
def lab(shared_lab: laboratory.Lab) -> Iterator[laboratory.Lab]:
    """The shared lab; the test must leave nothing on its hosts."""
    yield shared_lab
    shared_lab.wait_clean()


@pytest.fixture
def own_lab() -> Iterator[laboratory.Lab]:
    """A lab of the test's own, which it may break."""
    with laboratory.Lab() as built:
        yield built
