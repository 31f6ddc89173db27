"""For all tests."""

from __future__ import annotations

import os

import pytest

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
