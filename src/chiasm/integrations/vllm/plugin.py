"""A vLLM plugin (entry point ``vllm.general_plugins``): has engines count their work (``work.py``), and lets several instances
share one machine without a GPU.

Three things in vLLM keep a CPU core busy, or lose time, when encoder, prefill and decode share a few cores:

- Workers poll for one second after each step before they sleep. That saves a wake-up on a GPU machine, but here it takes the
  core that the next instance needs. They now poll for a millisecond.
- The message that wakes a sleeping reader can be lost when two are sent at nearly the same time, since a socket drops what it
  has no room for. The reader looks again after five seconds, for which a running answer stands still. Readers that poll less
  sleep more often, so they now look again after 20 ms.
- NIXL's progress thread looks at the network without a pause, also while idle. It now pauses for 0.1 ms.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

from chiasm.errors import ConfigurationError
from chiasm.integrations.vllm.work import watch

_logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.001
_LOOK_AGAIN_MILLISECONDS = 20
_NIXL_PAUSE_MICROSECONDS = 100


def register() -> None:
    """Change what is described above; vLLM calls this once in each of its processes, before it makes anything."""
    try:
        watch()
    except (ConfigurationError, ImportError, AttributeError) as error:
        _logger.warning("Engines don't count their work, because chiasm doesn't know this version of vLLM: %s", error)
    try:
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            _shorten_polling()
            _pause_nixl()
    except (ImportError, AttributeError) as error:
        _logger.warning("vLLM's workers keep polling, because chiasm doesn't know this version of vLLM: %s", error)


def _shorten_polling() -> None:
    from vllm.distributed.device_communicators import shm_broadcast

    condition = shm_broadcast.SpinCondition
    make = condition.__init__

    def make_patient(self: object, *args: object, **kwargs: object) -> None:
        make(self, *args, **kwargs)
        if hasattr(self, "busy_loop_s"):
            self.busy_loop_s = _POLL_SECONDS

    condition.__init__ = make_patient
    shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = _LOOK_AGAIN_MILLISECONDS


@functools.cache
def _pause_nixl() -> None:
    """Give a pause to the progress threads that this process will start. NIXL itself is loaded only when vLLM asks for it."""
    from vllm.distributed import nixl_utils

    load = nixl_utils._load_nixl_attr

    @functools.wraps(load)
    def load_patiently(name: str) -> Any:
        loaded = load(name)
        if name == "NixlWrapper" and loaded is not None:
            _pause_agents(importlib.import_module("nixl._bindings"))
        return loaded

    nixl_utils._load_nixl_attr = load_patiently


@functools.cache
def _pause_agents(bindings: Any) -> None:
    make = bindings.nixlAgent

    @functools.wraps(make, updated=())
    def with_pause(name: str, config: Any) -> Any:
        if config.pthrDelay == 0:
            config.pthrDelay = _NIXL_PAUSE_MICROSECONDS
        return make(name, config)

    bindings.nixlAgent = with_pause
