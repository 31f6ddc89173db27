"""vLLM finds the plugin by its entry point, and workers on a CPU then poll for a moment only."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import os
import zmq
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.plugins import load_general_plugins

load_general_plugins()
condition = SpinCondition(is_reader=True, context=zmq.Context(), notify_address="inproc://nobody")
print(condition.busy_loop_s, flush=True)
os._exit(0)  # its sockets are open
"""


def test_the_plugin_is_loaded() -> None:
    run = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    assert float(run.stdout.split()[-1]) <= 0.01
