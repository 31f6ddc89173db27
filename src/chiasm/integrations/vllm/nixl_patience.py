"""NIXL's progress thread, on a machine without a GPU.

NIXL's Python package starts the thread without a pause between two looks at the network, and so each instance that exchanges
KV keeps a core busy, also when it is idle. Where instances share a few cores, those are the cores that they compute on.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

_PAUSE_MICROSECONDS = 100


@functools.cache
def install() -> None:
    """Give the progress threads that this process will start a pause. NIXL itself is loaded when vLLM asks for it."""
    from vllm.distributed import nixl_utils

    load = nixl_utils._load_nixl_attr

    @functools.wraps(load)
    def load_patiently(name: str) -> Any:
        loaded = load(name)
        if name == "NixlWrapper" and loaded is not None:
            _pause(importlib.import_module("nixl._bindings"))
        return loaded

    nixl_utils._load_nixl_attr = load_patiently


@functools.cache
def _pause(bindings: Any) -> None:
    make = bindings.nixlAgent

    @functools.wraps(make, updated=())
    def with_pause(name: str, config: Any) -> Any:
        if config.pthrDelay == 0:
            config.pthrDelay = _PAUSE_MICROSECONDS
        return make(name, config)

    bindings.nixlAgent = with_pause
