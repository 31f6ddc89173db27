"""The life of an instance's process."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from chiasm.bench import synthetic
from chiasm.ec_transfer import ECTransferConfig
from chiasm.engine import EngineConfig
from chiasm.errors import ConfigurationError
from chiasm.server import ServerConfig, run
from chiasm.server.process import bind
from chiasm.wire import Role
from tests.server.images import chat
from tests.server.serving import get, post

ROOT = Path(__file__).parents[2]
STOP_SECONDS = 10
"""Far more than the 3 s that are promised, for a machine that is busy with other tests."""


@contextlib.contextmanager
def instance(folder: Path, port: int = 0) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.server.instance_process", str(folder), str(port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def free_port() -> int:
    with bind("127.0.0.1", 0) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_serves_until_told_to_stop_and_ends_open_streams_with_an_error(tmp_path: Path) -> None:
    with instance(synthetic.make("qwen3_vl", tmp_path / "tiny")) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert get(f"{url}/health").json["model"] == "tiny"
        assert post(f"{url}/v1/chat/completions", chat("Hi", max_tokens=3)).status == 200
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        endless = chat("Hi", max_tokens=4000, ignore_eos=True, stream=True)
        connection.request("POST", "/v1/chat/completions", json.dumps(endless))
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        process.send_signal(signal.SIGTERM)
        rest = response.read()
        assert b'"code":"stopping"' in rest
        assert b"[DONE]" not in rest
        assert process.wait(STOP_SECONDS) == 0


def test_answers_health_and_stops_while_the_model_loads(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")  # whoever opens it to read waits until someone writes
    port = free_port()
    with instance(tmp_path, port) as process:
        health = None
        give_up = time.monotonic() + 60
        while health is None:
            assert time.monotonic() < give_up
            with contextlib.suppress(ConnectionRefusedError):
                health = get(f"http://127.0.0.1:{port}/health")
        assert health.status == 503
        assert health.json == {"status": "starting"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_SECONDS) == 0


def test_port_in_use_is_one_clear_error() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"Port {port} on 127.0.0.1 is in use"):
            run(EngineConfig(Path("/nowhere"), Role.AGGREGATED), ServerConfig(port=port))


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("no.such.host.invalid", 0)])
def test_address_that_cannot_be_had_is_one_clear_error(host: str, port: int) -> None:
    with pytest.raises(ConfigurationError):
        bind(host, port)


def test_model_that_cannot_be_loaded_is_one_clear_error(tmp_path: Path) -> None:
    ec = ECTransferConfig(shared_storage_path=tmp_path)
    with pytest.raises(ConfigurationError):
        run(EngineConfig(tmp_path / "none", Role.PD, ec=ec), ServerConfig(port=0))
