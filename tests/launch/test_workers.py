"""A proxy of several processes on one port."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest

from chiasm.launch.workers import _pass_on as workers_log
from chiasm.wire import MEMBERS_PATH, WORKER_HEADER
from tests.cli.running import Running, run
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


def test_workers_need_no_short_path_of_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    with Running(tmp_path, "proxy", "--workers", "2", "--port", "0") as one:
        one.wait_ready()


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


@contextmanager
def frozen(process: psutil.Process) -> Iterator[None]:
    """A process that stands still meanwhile."""
    process.suspend()
    try:
        assert eventually(lambda: process.status() == psutil.STATUS_STOPPED)
        yield
    finally:
        process.resume()


def ask_each(running: Running) -> None:
    """Have each of two workers answer one request, which is named after it."""
    for number in range(2):
        ask(running, number)


def ask(running: Running, number: int) -> None:
    """Have one of two workers answer a request."""
    with frozen(workers(running)[f"worker-{1 - number}"]):
        url = f"{running.wait_ready()}/v1/chat/completions"
        answer = httpx.post(url, content=b"{nothing", headers={"X-Request-Id": f"of-{number}"}, timeout=60)
        assert answer.status_code == 400


def told(url: str, headers: dict[str, str]) -> Any:
    """What a page says, as soon as no worker is too busy to tell its part of it."""
    answers: list[httpx.Response] = []

    def is_whole() -> bool:
        answers.append(httpx.get(url, headers=headers, timeout=60))
        return answers[-1].status_code == 200 and "silent_workers" not in answers[-1].json()

    assert eventually(is_whole), answers[-1].text
    return answers[-1].json()


def test_the_metrics_are_those_of_all(running: Running) -> None:
    assert shows(running, "chiasm_proxy_requests_in_flight", {"0": 0, "1": 0})


def test_the_records_are_those_of_all(running: Running) -> None:
    url = f"{running.wait_ready()}/requests"

    def are_kept(count: int) -> bool:
        return len(told(url, ADMIN)["requests"]) == count

    for number in range(2):
        ask(running, number)
        # A record is kept a moment after its answer; the second one has to end later.
        assert eventually(partial(are_kept, number + 1))
    for _ in range(4):  # each look is a connection of its own, which either of them may take
        assert [one["id"] for one in told(url, ADMIN)["requests"]] == ["of-1", "of-0"]
        for name in ("of-0", "of-1"):
            one = told(f"{url}/{name}", ADMIN)
            assert (one["id"], one["status"]) == (name, 400)
            assert told(f"{url}/{name}/trace.json", ADMIN)["otherData"]["id"] == name
    assert httpx.get(f"{url}/of-2", headers=ADMIN, timeout=60).status_code == 404
    assert len(httpx.get(f"{url}?limit=1", headers=ADMIN, timeout=60).json()["requests"]) == 1
    with frozen(workers(running)["worker-1"]):
        page = httpx.get(url, headers=ADMIN, timeout=60).json()
        assert ([one["id"] for one in page["requests"]], page["silent_workers"]) == (["of-0"], [1])
        answer = httpx.get(f"{url}/of-1", headers=ADMIN, timeout=60)
        assert (answer.status_code, "Worker 1 of the proxy" in answer.text) == (404, True)


def test_without_an_admin_key_they_are_for_their_machine_alone(tmp_path: Path) -> None:
    with Running(tmp_path, "proxy", "--workers", "2", "--port", "0", "--shutdown-timeout-seconds", "1") as one:
        url = f"{one.wait_ready()}/requests"
        ask_each(one)
        assert eventually(lambda: {found["id"] for found in told(url, {})["requests"]} == {"of-0", "of-1"})
        assert httpx.get(url, headers={"X-Forwarded-For": "192.0.2.1"}, timeout=60).status_code == 401


def test_the_limits_of_a_key_are_those_of_all_together(tmp_path: Path) -> None:
    """No more than 4 a minute, although each worker counts by itself."""
    keys = tmp_path / "keys"
    keys.touch(0o600)
    keys.write_text(f"keys: [{{key: {KEY}, max_requests_per_minute: 4}}]")
    arguments = ("--workers", "2", "--port", "0", "--api-key-file", str(keys), "--shutdown-timeout-seconds", "1")
    with Running(tmp_path, "proxy", *arguments) as one:
        url = f"{one.wait_ready()}/v1/chat/completions"
        found = []
        for number in range(2):
            with frozen(workers(one)[f"worker-{number}"]):
                found += [httpx.post(url, content=b"{nothing", headers=ADMIN, timeout=60).status_code for _ in range(3)]
        assert found == [400, 400, 429] * 2
    refused = run("proxy", "--workers", "5", "--port", "0", "--api-key-file", str(keys))
    assert (refused.returncode, "can't be divided among 5 workers" in refused.stderr) == (2, True)


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


def test_a_line_that_cannot_be_written_does_not_end_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as full, open("/dev/full", "w", buffering=1) as disk:
        full.setattr(sys, "stderr", disk)
        workers_log("worker-0", "one")
        os.dup2(os.open(os.devnull, os.O_WRONLY), disk.fileno())
        workers_log("worker-0", "two")
