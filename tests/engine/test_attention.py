"""The memory of the KV cache."""

from __future__ import annotations

import psutil
import torch

from chiasm.engine.attention import zeroed


def test_memory_that_nobody_has_used_takes_none_of_the_machine() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    memory = zeroed(512 << 20, torch.device("cpu"))
    assert not memory[:: 1 << 20].any()
    memory[-1] = 7
    assert memory[-1] == 7
    assert process.memory_info().rss < before + (64 << 20)
