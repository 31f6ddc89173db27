"""Tests with the real vLLM, which has an environment of its own: `make test-vllm`. Without vLLM none of them is collected.

Instances start when a test first asks for them. Those of this file serve all tests of the session and are stopped at its end;
those that one file of tests asks for are stopped with its last test, to leave memory for the next.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from .processes import Server, transfer_config, vllm

HAS_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]

WAIT_SECONDS = 5.0
"""After which the PDs here give up a request whose embedding doesn't come."""

Launch = Callable[[Server], Server]


def pytest_report_header() -> str | None:
    return None if HAS_VLLM else "tests/vllm: skipped, vLLM is not installed here; run make test-vllm"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test of a session waits for instances to start."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where processes write what they say."""
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def launch_for_all() -> Iterator[Launch]:
    """Stops at the session's end what a fixture hands to it."""
    with _stopping() as launch:
        yield launch


@pytest.fixture(scope="module")
def launch() -> Iterator[Launch]:
    """Stops after the last test of a file what a test or fixture hands to it."""
    with _stopping() as launch:
        yield launch


@contextmanager
def _stopping() -> Iterator[Launch]:
    with ExitStack() as stack:

        def keep(server: Server) -> Server:
            stack.callback(server.stop)
            return server

        yield keep


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that encoder and PDs share."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def _split(launch_for_all: Launch, logs: Path, store: Path) -> tuple[Server, Server]:
    """Started at the same time, since nearly every test wants both."""
    encoder = launch_for_all(vllm(logs, "encoder", transfer_config("ec_producer", store)))
    pd = launch_for_all(vllm(logs, "pd", transfer_config("ec_consumer", store, wait_seconds=WAIT_SECONDS)))
    encoder.wait_ready()
    pd.wait_ready()
    return encoder, pd


@pytest.fixture(scope="session")
def encoder(_split: tuple[Server, Server]) -> Server:
    """A vLLM instance that encodes images into ``store``."""
    return _split[0]


@pytest.fixture(scope="session")
def pd(_split: tuple[Server, Server]) -> Server:
    """A vLLM instance that reads embeddings from ``store`` and waits ``WAIT_SECONDS`` for one."""
    return _split[1]


@pytest.fixture(scope="session")
def other_pd(launch_for_all: Launch, logs: Path, store: Path) -> Server:
    """Another one like ``pd``."""
    server = launch_for_all(vllm(logs, "other-pd", transfer_config("ec_consumer", store, wait_seconds=WAIT_SECONDS)))
    server.wait_ready()
    return server


@pytest.fixture(scope="session")
def aggregated(launch_for_all: Launch, logs: Path) -> Server:
    """A vLLM instance that does everything itself: what the others' answers are compared with."""
    server = launch_for_all(vllm(logs, "aggregated"))
    server.wait_ready()
    return server
