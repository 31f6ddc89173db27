"""What is different for the first process of a container."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.cli.running import CHIASM, default_signals

CONTAINER = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_start_ends_the_first_process(number: signal.Signals, tmp_path: Path) -> None:
    if subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("may not make a namespace for processes here")
    options = tmp_path / "options.yaml"
    os.mkfifo(options)
    command = [*CONTAINER, *CHIASM, "proxy", "--config", str(options)]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        preexec_fn=default_signals,  # noqa: PLW1509 - it only sets signals
    ) as container:
        try:
            with options.open("w"):  # the command reads its options now, and goes on reading
                (first,) = psutil.Process(container.pid).children()
                first.send_signal(number)
                container.communicate(timeout=60)
        finally:
            container.kill()
    assert container.returncode == 128 + number
