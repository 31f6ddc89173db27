"""vLLM finds the plugin by its entry point; workers on a CPU then poll only for a moment, and soon look again."""

from __future__ import annotations

import subprocess
import sys

from .processes import START_SECONDS

_PROGRAM = """
import os
import zmq
from vllm.distributed.device_communicators import shm_broadcast
from vllm.plugins import load_general_plugins

load_general_plugins()
waiting = shm_broadcast.MessageQueue.ReadTimeoutWithWarnings(None, False)
condition = shm_broadcast.SpinCondition(is_reader=True, context=zmq.Context(), notify_address="inproc://nobody")
print(condition.busy_loop_s, waiting.timeout_ms(), flush=True)
os._exit(0)  # its sockets are open
"""


def test_the_plugin_is_loaded() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=START_SECONDS, check=True
    )
    poll_seconds, look_again_milliseconds = run.stdout.split()[-2:]
    assert float(poll_seconds) <= 0.01
    assert int(look_again_milliseconds) <= 20
