"""Tests with the real vLLM, which needs an environment of its own: `make test-vllm`. Without vLLM none of them is collected.

A start of vLLM takes a quarter of a minute of a core, so the fixtures of this file serve all tests of the session: the first
test that asks for one starts all that any test wants, at the same time. Instances that only one file needs are stopped after
its last test, to leave memory for the next.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from .fleet import prefill_and_decode
from .processes import FAULTS, ROOT, Server, transfer_config, vllm

HAS_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]

WAIT_SECONDS = 300.0
"""After which ``pd`` fails a request whose embedding doesn't come: longer than any test takes to have one made."""
OTHER_WAIT_SECONDS = 5.0
"""The same of ``other_pd``, by which tests wait for that; what has been published arrives before."""

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
    """The folder of the processes' output."""
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def launch_for_all() -> Iterator[Launch]:
    """Keeps a server until the session's end."""
    with _stopping() as launch:
        yield launch


@pytest.fixture(scope="module")
def launch() -> Iterator[Launch]:
    """Keeps a server until the last test of a file."""
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
    """The folder of embeddings that encoder and PDs share."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a test orders a fault of ``other_pd``, see faulty_connector.py."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def shared_instances(
    request: pytest.FixtureRequest, launch_for_all: Launch, logs: Path, store: Path, faults: Path
) -> SharedInstances:
    faulty = transfer_config("ec_consumer", store, wait_seconds=OTHER_WAIT_SECONDS)
    faulty |= {"ec_connector": "FaultyECConnector", "ec_connector_module_path": "tests.vllm.faulty_connector"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {FAULTS: str(faults), "PYTHONPATH": path}
    make: dict[str, Callable[[], tuple[Server, ...]]] = {
        "encoder": lambda: (vllm(logs, "encoder", transfer_config("ec_producer", store)),),
        "pd": lambda: (vllm(logs, "pd", transfer_config("ec_consumer", store, wait_seconds=WAIT_SECONDS)),),
        "aggregated": lambda: (vllm(logs, "aggregated"),),
        "other_pd": lambda: (vllm(logs, "other-pd", faulty, environment=environment),),
        "prefill_decode": lambda: prefill_and_decode(logs, "demo", store),
    }
    wanted = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    return SharedInstances(make, launch_for_all, wanted)


class SharedInstances:
    """Instances of vLLM by the fixture that gives them."""

    def __init__(
        self, make: Mapping[str, Callable[[], tuple[Server, ...]]], launch: Launch, wanted: Collection[str]
    ) -> None:
        self._make = make
        self._launch = launch
        self._wanted = wanted
        self._started: dict[str, tuple[Server, ...]] = {}

    def get(self, *names: str) -> list[Server]:
        """Return those of the fixtures ``names`` once they are ready. The first call starts all that any test wants."""
        for name, make in self._make.items():
            if name not in self._started and (name in names or name in self._wanted):
                self._started[name] = tuple(map(self._launch, make()))
        found = [server for name in names for server in self._started[name]]
        for server in found:
            server.wait_ready()
        return found


@pytest.fixture(scope="session")
def encoder(shared_instances: SharedInstances) -> Server:
    """A vLLM instance that encodes images into ``store``."""
    return shared_instances.get("encoder")[0]


@pytest.fixture(scope="session")
def pd(shared_instances: SharedInstances) -> Server:
    """A vLLM instance that reads embeddings from ``store`` and waits ``WAIT_SECONDS`` for one."""
    return shared_instances.get("pd")[0]


@pytest.fixture(scope="session")
def aggregated(shared_instances: SharedInstances) -> Server:
    """A vLLM instance that does everything itself; the others' responses are compared with its own."""
    return shared_instances.get("aggregated")[0]


@pytest.fixture(scope="session")
def other_pd(shared_instances: SharedInstances) -> Server:
    """Another one like ``pd``, which waits ``OTHER_WAIT_SECONDS`` and harms entries if a test orders it."""
    return shared_instances.get("other_pd")[0]


@pytest.fixture(scope="session")
def prefill_decode(shared_instances: SharedInstances) -> tuple[Server, Server]:
    """A prefill and a decode instance of vLLM on ``store``, for no file after test_identity.py, which ends the first."""
    prefill, decode = shared_instances.get("prefill_decode")
    return prefill, decode
