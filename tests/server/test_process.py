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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from chiasm.cli import drain
from chiasm.ec_transfer import ECTransferConfig
from chiasm.engine import EngineConfig
from chiasm.errors import ConfigurationError
from chiasm.http.listen import bind
from chiasm.server import ServerConfig, run
from chiasm.wire import Role
from tests.free_ports import free_port
from tests.server.images import chat
from tests.server.serving import get, post

ROOT = Path(__file__).parents[2]
STOP_SECONDS = 60
"""Far more than it takes, because other tests may keep the machine busy."""


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


def stream(url: str, max_tokens: int) -> http.client.HTTPResponse:
    """A stream that has begun."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    asked = chat("Hi", max_tokens=max_tokens, ignore_eos=True, stream=True)
    connection.request("POST", "/v1/chat/completions", json.dumps(asked))
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    return response


def test_after_a_signal_it_refuses_what_is_new_and_a_stream_ends_whole(model: Path) -> None:
    with instance(model) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert get(f"{url}/health").json["model"] == "tiny"
        assert post(f"{url}/v1/chat/completions", chat("Hi", max_tokens=3)).status == 200
        response = stream(url, max_tokens=1500)
        process.send_signal(signal.SIGTERM)
        while (health := get(f"{url}/health")).status == 200:
            pass
        assert health.json["status"] == "draining"
        refused = post(f"{url}/v1/chat/completions", chat("Hi", max_tokens=3))
        assert (refused.status, refused.json["error"]["code"]) == (503, "stopping")
        rest = response.read()
        assert b'"error"' not in rest
        assert rest.endswith(b"data: [DONE]\n\n")
        assert process.wait(STOP_SECONDS) == 0


def test_chiasm_drain_waits_until_a_stream_has_ended_whole_and_the_instance_with_exit_code_0(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with instance(model) as process, ThreadPoolExecutor(1) as pool:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        rest = pool.submit(stream(url, max_tokens=1500).read)
        # A process of its own would take seconds to begin, in which the stream may end.
        assert drain.run(drain.parser().parse([url, "--wait"])) == 0
        left = "1 requests, 0 prompts and 0 embeddings to be fetched"
        assert capsys.readouterr().out == f"{url} drains: {left}.\n{url} has ended.\n"
        assert rest.result().endswith(b"data: [DONE]\n\n")
        assert process.wait(STOP_SECONDS) == 0


def test_a_second_signal_ends_open_streams_with_an_error(model: Path) -> None:
    with instance(model) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        response = stream(url, max_tokens=4000)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        rest = response.read()
        assert b'"code":"stopping"' in rest
        assert b"[DONE]" not in rest
        assert process.wait(STOP_SECONDS) == 0


def test_answers_health_and_stops_while_the_model_loads(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")  # whoever opens it to read waits until someone writes
    port = free_port()
    with instance(tmp_path, port) as process:
        health = None
        give_up = time.monotonic() + 300
        while health is None:
            assert time.monotonic() < give_up
            with contextlib.suppress(ConnectionRefusedError):
                health = get(f"http://127.0.0.1:{port}/health")
        assert health.status == 503
        assert health.json.keys() == {"status", "incarnation"}
        assert health.json["status"] == "starting"
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_SECONDS) == 0


def test_port_in_use_is_one_clear_error() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"Port {port} on 127.0.0.1 is in use"):
            run(EngineConfig(Path("/nowhere"), Role.AGGREGATED), ServerConfig(port=port))


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("no.such.host.invalid", 0)])
def test_an_address_that_cannot_be_bound_is_one_clear_error(host: str, port: int) -> None:
    with pytest.raises(ConfigurationError):
        bind(host, port)


def test_model_that_cannot_be_loaded_is_one_clear_error(tmp_path: Path) -> None:
    ec = ECTransferConfig(connector_extra_config={"shared_storage_path": tmp_path})
    with pytest.raises(ConfigurationError):
        run(EngineConfig(tmp_path / "none", Role.PD, ec=ec), ServerConfig(port=0))
