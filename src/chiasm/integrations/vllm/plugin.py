"""A plugin of vLLM's (entry point ``vllm.general_plugins``): what several instances on one CPU machine need.

vLLM's workers poll for one second after each step before they sleep. On a machine with a GPU that saves a wake-up; where
encoder, prefill and decode share a few CPU cores, it takes the core that the next instance needs.

A reader that sleeps is woken by a message, and vLLM's may get lost when two are sent at nearly the same time (its sockets drop
what they have no room for). It then looks again by itself, after five seconds: a running answer stands still for as long.
Since readers sleep much more often here, they look again much sooner.
"""

from __future__ import annotations

import logging

from chiasm.integrations.vllm import nixl_patience

_logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.001
_LOOK_AGAIN_MILLISECONDS = 20


def register() -> None:
    """Called by vLLM once in each of its processes, before it makes anything."""
    try:
        from vllm.distributed.device_communicators import shm_broadcast
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            condition = shm_broadcast.SpinCondition
            make = condition.__init__

            def make_patient(self: object, *args: object, **kwargs: object) -> None:
                make(self, *args, **kwargs)
                if hasattr(self, "busy_loop_s"):
                    self.busy_loop_s = _POLL_SECONDS

            condition.__init__ = make_patient
            shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = _LOOK_AGAIN_MILLISECONDS
            nixl_patience.install()
    except (ImportError, AttributeError) as error:
        _logger.warning("vLLM's workers keep polling: %s", error)
