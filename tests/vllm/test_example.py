"""The example script with the most processes starts them, gets a response, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.free_ports import free_ports

from .processes import ROOT, START_SECONDS

SCRIPT = ROOT / "examples/disaggregated_encoder/vllm/disagg_epd_example.sh"
PORTS = 6
"""The script uses the proxy's port and the ones after it."""


def test_it_answers(tmp_path: Path) -> None:
    first = free_ports(PORTS)
    environment = {**os.environ, "PYTHON": sys.executable, "PROXY_PORT": str(first), "TMPDIR": str(tmp_path)}
    environment |= {"LOG_PATH": str(tmp_path / "logs"), "SHARED_STORAGE_PATH": str(tmp_path / "ec")}
    with subprocess.Popen(
        [SCRIPT], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as script:
        try:
            out, err = script.communicate(timeout=START_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)
    assert script.returncode == 0, err + out
    assert f"Ready: http://127.0.0.1:{first}\n" in out
    assert "red" in next(line for line in out.splitlines() if line.startswith("Answer:"))
    assert list((tmp_path / "ec").glob("*.safetensors"))
    assert not list(tmp_path.glob("tmp.*"))  # what mktemp makes
