"""For all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import privileges

# Tiny models run fastest on one thread, above all beside other processes. Read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # the environment of vLLM runs only the tests in tests/vllm
    pass
else:
    # How long an example takes says how busy the machine is, not whether the code is right.
    settings.register_profile("chiasm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("chiasm")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name binary parameters by their argument and number: compressed ones hold the time, and nobody can read them."""
    return argname if isinstance(val, bytes) and not val.isascii() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Several processes share the tests by name, so a test has the same name in all of them."""
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid} has an address in its name; give its parameters ids.")


@pytest.fixture
def ordinary_user() -> Iterator[None]:
    """Modes of files and folders count for the test and for commands that it starts, also where root runs it."""
    with privileges.ordinary_user():
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_in_the_repository() -> Iterator[None]:
    """A test writes into folders of its own, not into the one in which it was started."""
    before = _visible_names()
    yield
    assert _visible_names() <= before, "A test left these behind in the repository."


def _visible_names() -> set[str]:
    return {path.name for path in Path(__file__).parents[1].iterdir() if not path.name.startswith(".")}
