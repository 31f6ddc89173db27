"""The example scripts start their commands, get an answer, and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from chiasm.launch.ports import HeldPort
from tests.cli.running import default_signals
from tests.launch.waiting import alive, eventually

EXAMPLES = Path(__file__).parents[2] / "examples/disaggregated_encoder/shared_storage_connector"
PORTS = {
    "disagg_encoder_example.sh": ("PROXY_PORT", "ENCODER_PORT", "PD_PORT"),
    "disagg_epd_example.sh": ("PROXY_PORT", "ENCODER_PORT", "PREFILL_PORT", "DECODE_PORT"),
}


@pytest.fixture(params=PORTS)
def name(request: pytest.FixtureRequest) -> str:
    """Name of the script."""
    script: str = request.param
    return script


@pytest.fixture
def ports(name: str) -> Iterator[dict[str, str]]:
    """Free ports; when the test ends, nobody may listen on one."""
    held = {variable: HeldPort("127.0.0.1") for variable in PORTS[name]}
    yield {variable: str(port.port) for variable, port in held.items()}
    for port in held.values():
        port.release()
        HeldPort(port.host, port.port).release()  # raises if somebody does


@contextlib.contextmanager
def running(name: str, ports: dict[str, str], tmp_path: Path, **settings: str) -> Iterator[subprocess.Popen[str]]:
    """Run the script, and kill what it leaves."""
    environment = {**os.environ, "PYTHON": sys.executable, "TMPDIR": str(tmp_path), **ports, **settings}
    with subprocess.Popen(
        [EXAMPLES / name],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=default_signals,  # noqa: PLW1509, pytest has no threads that matter
    ) as script:
        try:
            yield script
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)


def test_the_example_prints_an_answer(name: str, ports: dict[str, str], tmp_path: Path) -> None:
    with running(name, ports, tmp_path, MODEL="demo", SHARED_STORAGE_PATH=str(tmp_path / "ec")) as script:
        out, err = script.communicate(timeout=270)
    assert script.returncode == 0, err + out
    assert f"Ready: http://127.0.0.1:{ports['PROXY_PORT']}\n" in out
    answer = next(line for line in out.splitlines() if line.startswith("Answer:"))
    assert "red" in answer
    if "epd" in name:
        assert "1 transfer(s)" in out
    assert any((tmp_path / "ec").iterdir())
    assert not list(tmp_path.glob("tmp.*"))  # what mktemp makes


def test_ctrl_c_ends_all_of_it(name: str, ports: dict[str, str], tmp_path: Path) -> None:
    with running(name, ports, tmp_path, MODEL="demo") as script:
        assert script.stdout is not None
        assert script.stdout.readline().startswith("Starting")
        children = psutil.Process(script.pid).children(recursive=True)
        assert len(children) >= len(ports)
        os.killpg(script.pid, signal.SIGINT)
        _, err = script.communicate(timeout=120)
    assert script.returncode == 128 + signal.SIGINT, err
    assert eventually(lambda: not alive(children))
    assert not list(tmp_path.glob("tmp.*"))


def test_an_interpreter_without_chiasm_is_told_before_anything_is_started(
    name: str, ports: dict[str, str], tmp_path: Path
) -> None:
    with running(name, ports, tmp_path, PYTHON="/bin/false") as script:
        out, err = script.communicate(timeout=60)
    assert (script.returncode, out) == (2, "")
    assert err.startswith("/bin/false has no chiasm installed. Run `make install`")
