"""A proxy of several processes on one port."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator

import httpx2 as httpx
import psutil
import pytest

from chiasm.wire import MEMBERS_PATH, WORKER_HEADER
from tests.cli.running import Running
from tests.launch.waiting import alive, command_line, eventually

KEY = "operator" * 2
ADMIN = {"Authorization": f"Bearer {KEY}"}
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two workers; the tests of this file share them, and the last of these ends them."""
    arguments = ("--workers", "2", "--port", "0", "--admin-key", KEY, "--shutdown-timeout-seconds", "1")
    with Running(tmp_path_factory.mktemp("workers"), "proxy", *arguments) as one:
        one.wait_ready()
        yield one


def workers(running: Running) -> dict[str, psutil.Process]:
    named = {" ".join(command_line(one)[-1:]): one for one in running.children}
    return {name: one for name, one in named.items() if name.startswith("worker-")}


def metric(running: Running, name: str) -> dict[str, float]:
    """Return a metric by worker."""
    page = httpx.get(f"{running.wait_ready()}/metrics", headers=ADMIN, timeout=60).text
    found = re.findall(rf'^{name}{{worker="(\d)"[^}}]*}} (\S+)$', page, re.MULTILINE)
    return {worker: float(value) for worker, value in found}


def shows(running: Running, name: str, values: dict[str, float]) -> bool:
    """Whether a metric gets these values: a worker that is too busy to tell its own is left out of a page."""
    return eventually(lambda: metric(running, name) == values)


def test_the_metrics_are_those_of_all(running: Running) -> None:
    assert shows(running, "chiasm_proxy_requests_in_flight", {"0": 0, "1": 0})


def test_an_instance_is_added_to_all_and_removed_from_all(running: Running) -> None:
    url = f"{running.wait_ready()}/instances"
    order = {"url": NOBODY, "role": "pd"}
    assert httpx.post(url, json=order, timeout=60).status_code == 401
    assert shows(running, "chiasm_proxy_instance_healthy", {})
    assert httpx.post(url, json=order, headers=ADMIN, timeout=60).status_code == 201
    assert shows(running, "chiasm_proxy_instance_healthy", {"0": 0, "1": 0})
    assert httpx.request("DELETE", url, json=order, headers=ADMIN, timeout=60).status_code == 202
    assert shows(running, "chiasm_proxy_instance_healthy", {})


def test_a_worker_that_dies_is_started_again_and_knows_what_was_added(running: Running) -> None:
    url, order = f"{running.wait_ready()}/instances", {"url": NOBODY, "role": "pd"}
    assert httpx.post(url, json=order, headers=ADMIN, timeout=60).status_code == 201
    killed = workers(running)["worker-0"]
    killed.kill()
    assert eventually(lambda: workers(running).get("worker-0") not in (None, killed))
    assert httpx.get(f"{running.wait_ready()}/livez", timeout=60).status_code == 200
    assert shows(running, "chiasm_proxy_instance_healthy", {"0": 0, "1": 0})


def test_what_workers_tell_each_other_is_for_nobody_else(running: Running) -> None:
    url, named = f"{running.wait_ready()}{MEMBERS_PATH}", {WORKER_HEADER: ""}
    assert httpx.get(url, headers=ADMIN | named, timeout=60).status_code == 404


def test_sigterm_ends_all_of_them(running: Running) -> None:
    children = running.children
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(60) == 0
    assert not alive(children)
    assert running.stdout == f"ready {running.wait_ready()}\n"
