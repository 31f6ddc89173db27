"""The example script starts three commands, gets an answer, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from chiasm.launch.ports import HeldPort

SCRIPT = Path(__file__).parents[2] / "examples/disaggregated_encoder/shared_storage_connector/disagg_encoder_example.sh"


def test_the_example_prints_an_answer(checkpoint: Path, tmp_path: Path) -> None:
    ports = [HeldPort("127.0.0.1") for _ in range(3)]
    proxy, encoder, pd = (str(held.port) for held in ports)
    environment = dict(
        os.environ,
        PYTHON=sys.executable,
        MODEL=str(checkpoint),
        PROXY_PORT=proxy,
        ENCODER_PORT=encoder,
        PD_PORT=pd,
        SHARED_STORAGE_PATH=str(tmp_path / "ec"),
        TMPDIR=str(tmp_path),
    )
    with subprocess.Popen(
        [SCRIPT], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as script:
        try:
            out, err = script.communicate(timeout=270)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)
    assert script.returncode == 0, err + out
    assert f"Ready: http://127.0.0.1:{proxy}\n" in out
    answer = next(line for line in out.splitlines() if line.startswith("Answer:"))
    assert answer.removeprefix("Answer:").strip()
    assert any((tmp_path / "ec").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["ec"]
    for held in ports:  # nobody listens on them any more, or this would raise
        held.release()
        HeldPort(held.host, held.port).release()
