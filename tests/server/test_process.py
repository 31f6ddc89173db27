"""The life of an instance's process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from chiasm.bench import synthetic
from chiasm.bench.synthetic import SyntheticSize
from chiasm.cli import drain
from chiasm.ec_transfer import ECTransferConfig
from chiasm.engine import EngineConfig
from chiasm.errors import ConfigurationError
from chiasm.http.listen import bind
from chiasm.server import ServerConfig, run
from chiasm.wire import Role
from tests.free_ports import free_port
from tests.server.images import chat
from tests.server.serving import begun, get, post

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


@pytest.fixture(scope="module")
def patient_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers may take longer than any pause of the machine."""
    size = SyntheticSize(max_position_embeddings=16_384)
    return synthetic.make("qwen3_vl", tmp_path_factory.mktemp("patient"), size=size)


def stream_of(max_tokens: int) -> dict[str, Any]:
    return chat("Hi", max_tokens=max_tokens, ignore_eos=True, stream=True)


def test_after_a_signal_it_refuses_what_is_new_and_a_stream_ends_whole(model: Path) -> None:
    with instance(model) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert get(f"{url}/health").json["model"] == "tiny"
        assert post(f"{url}/v1/chat/completions", chat("Hi", max_tokens=3)).status == 200
        response = begun(f"{url}/v1/chat/completions", stream_of(1500), stands_still=True)
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
    with ThreadPoolExecutor(1) as pool, instance(model) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        response = begun(f"{url}/v1/chat/completions", stream_of(1500), stands_still=True)
        drained = pool.submit(drain.run, drain.parser().parse([url, "--wait"]))
        while get(f"{url}/health").json["status"] != "draining":
            assert not drained.done()
        assert response.read().endswith(b"data: [DONE]\n\n")
        assert drained.result() == 0
        left = "1 requests, 0 prompts and 0 embeddings to be fetched"
        assert capsys.readouterr().out == f"{url} drains: {left}.\n{url} has ended.\n"
        assert process.wait(STOP_SECONDS) == 0


def test_a_second_signal_ends_open_streams_with_an_error(patient_model: Path) -> None:
    with instance(patient_model) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        response = begun(f"{url}/v1/chat/completions", stream_of(16_000))
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
