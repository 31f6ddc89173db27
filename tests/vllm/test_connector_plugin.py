"""vLLM finds the plugin by its entry point, and workers on a CPU then poll for a moment only."""

from __future__ import annotations

import zmq


def test_the_plugin_is_loaded() -> None:
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    condition = SpinCondition(is_reader=True, context=zmq.Context(), notify_address="inproc://nobody")
    assert condition.busy_loop_s <= 0.01
