"""Starts vLLM's and chiasm's processes with the options that a person would give, and talks to them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import msgspec
import psutil

from chiasm.checkpoints import folder
from chiasm.launch.vllm import ONE_PROCESS
from chiasm.wire import DRAIN_PATH, Health
from tests.free_ports import free_port

MODEL = "demo"
CHECKPOINT = folder(MODEL)
ROOT = Path(__file__).resolve().parents[2]
_VLLM = Path(__file__).with_name("forking.py")
MIDDLEWARE = "chiasm.integrations.vllm.middleware.ChiasmMiddleware"
START_SECONDS = 400
"""The longest that several processes take to start at the same time on two slow cores."""
CALL_SECONDS = 120
"""The longest that an answer takes on a machine that is busy with all of them."""

_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOG_STATS_INTERVAL": "1",
}
_UNTIL_SECONDS = 120

FAULTS = "CHIASM_TEST_FAULTS"
"""The variable that names the folder in which faults are ordered, see faulty_connector.py."""
ASKED = "asked"
"""A file in it with one byte for each time that vLLM has asked whether a request can run."""
POINTS = ("seen", "promised", "allocated", "planned", "loading")
HARMS = ("removed", "empty", "cut-off")

_SHARED = re.compile(r"/dev/shm/(?:psm_|vllm_dist_).+")
"""What vLLM's processes have in shared memory, and leave there when they are killed, as vLLM also does by itself."""

CLIENT = httpx.Client(limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))
"""Shared, since making a client takes 50 ms of a core. It keeps no connection open, since tests kill servers."""


def _shared_by(leader: int) -> set[Path]:
    """Return the files in shared memory that the processes of a group have mapped."""
    found: set[Path] = set()
    for pid in psutil.pids():
        with contextlib.suppress(OSError):  # it has just ended
            if os.getpgid(pid) == leader:
                found.update(map(Path, _SHARED.findall(Path(f"/proc/{pid}/maps").read_text())))
    return found


@dataclass
class Server:
    """A process that serves HTTP, with its output in ``log``."""

    command: list[str]
    port: int
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    address: str = "127.0.0.1"
    """Where it is reached."""
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_ENVIRONMENT, **self.environment},
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}"

    def wait_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while True:
            assert self.process.poll() is None, f"the server has ended:\n{self.text()[-4000:]}"
            assert time.monotonic() < end, f"the server is not ready:\n{self.text()[-4000:]}"
            try:
                if CLIENT.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that is bound to happen, such as a counter that grows."""
        end = time.monotonic() + _UNTIL_SECONDS
        while not condition():
            assert time.monotonic() < end, f"it did not happen; the server's log ends with\n{self.text()[-2000:]}"
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill the process and all its children."""
        self._end(signal.SIGKILL)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def drain(self) -> None:
        """Ask it to end when others have all that they need from it, as ``chiasm drain`` does."""
        response = CLIENT.post(f"{self.url}{DRAIN_PATH}", timeout=CALL_SECONDS)
        assert response.status_code == 202, response.text

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        left = _shared_by(self.process.pid)
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        # The process group outlives its leader if a child does.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for path in left:
            path.unlink(missing_ok=True)

    def post(self, body: dict[str, Any], timeout: float = CALL_SECONDS) -> httpx.Response:
        return CLIENT.post(f"{self.url}/v1/chat/completions", json=body, timeout=timeout)

    def answer(self, body: dict[str, Any]) -> str:
        response = self.post(body)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        lines = CLIENT.get(f"{self.url}/metrics", timeout=CALL_SECONDS).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def count(self, name: str) -> float:
        """Return one of the connector's own counters."""
        return self.metric(f"vllm:chiasm_ec_{name}_total")

    def health(self) -> Health:
        response = CLIENT.get(f"{self.url}/health", timeout=CALL_SECONDS)
        assert response.status_code == 200, response.text
        return msgspec.json.decode(response.content, type=Health)


def transfer_config(role: str, through: Path | str, **extra: Any) -> dict[str, Any]:
    """Return the value of --ec-transfer-config. Embeddings go through a folder, or through the connector of this name."""
    name = "connector" if isinstance(through, str) else "shared_storage_path"
    return {
        "ec_connector": "ChiasmECConnector",
        "ec_connector_module_path": "chiasm.integrations.vllm.ec_connector",
        "ec_role": role,
        "ec_connector_extra_config": {name: str(through), **extra},
    }


def vllm(
    logs: Path,
    name: str,
    transfer: dict[str, Any] | None = None,
    *flags: str,
    environment: dict[str, str] | None = None,
    checkpoint: Path = CHECKPOINT,
    address: str = "127.0.0.1",
) -> Server:
    """Start `vllm serve` of a checkpoint with chiasm's middleware, and with its connector if ``transfer`` is given."""
    port = free_port()
    command = [sys.executable, "-P", str(_VLLM), "serve", str(checkpoint), "--host", address, "--port", str(port)]
    command += ["--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "2048", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "256M"]
    command += ["--middleware", MIDDLEWARE, *flags]
    if transfer is not None:
        command += ["--ec-transfer-config", json.dumps(transfer)]
        if "connector" in transfer["ec_connector_extra_config"] and "--distributed-executor-backend" not in flags:
            command += ["--distributed-executor-backend", ONE_PROCESS]
    return Server(command, port, logs / f"{name}.log", environment or {}, address)


def chiasm(logs: Path, name: str, *arguments: str) -> Server:
    port = free_port()
    command = [sys.executable, "-m", "chiasm", *arguments, "--port", str(port)]
    return Server(command, port, logs / f"{name}.log")


def chiasm_instance(
    logs: Path, role: str, through: Path | str, dtype: str = "float32", checkpoint: Path = CHECKPOINT
) -> Server:
    flags = [
        "--role",
        role,
        "--served-model-name",
        MODEL,
        "--dtype",
        dtype,
        "--threads",
        "1",
        "--max-model-len",
        "2048",
    ]
    if role in ("encoder", "pd", "prefill"):
        flags += ["--connector" if isinstance(through, str) else "--shared-storage-path", str(through)]
    return chiasm(logs, f"chiasm-{checkpoint.name}-{role}-{dtype}", "instance", str(checkpoint), *flags)
