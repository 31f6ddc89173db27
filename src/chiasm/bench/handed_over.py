"""What handoffs over all connectors share: an embedding, a request that wants it, the step that takes it, and a stopwatch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from chiasm.ec_transfer import ECConnector

if TYPE_CHECKING:
    import torch

_ROW_BYTES = 4096
"""2048 columns of bfloat16."""


@dataclass(frozen=True)
class _Item:
    identifier: str
    offset: int
    length: int


@dataclass(frozen=True)
class WantingRequest:
    """A request whose prompt is the placeholders of one item."""

    request_id: str
    items: tuple[_Item, ...]

    @classmethod
    def of(cls, identifier: str, embedding: torch.Tensor) -> WantingRequest:
        return cls(identifier, (_Item(identifier, 0, embedding.shape[0]),))


def made_embedding(size_bytes: int) -> torch.Tensor:
    """Return an embedding of this size, rounded down to whole rows of 4096 bytes, at least one."""
    import torch

    rows = max(1, size_bytes // _ROW_BYTES)
    return torch.randint(0, 2**15, (rows, _ROW_BYTES // 2), dtype=torch.int16).view(torch.bfloat16)


def bytes_of(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    import torch

    return tensor.view(torch.uint8).numpy().reshape(-1)


def taken_in_step(scheduler: ECConnector, worker: ECConnector) -> dict[str, torch.Tensor]:
    """Return what a consumer's step takes, by identifier, of what its scheduler role has noted."""
    received: dict[str, torch.Tensor] = {}
    worker.bind_connector_metadata(scheduler.build_connector_meta())
    worker.start_load_caches(received)
    worker.clear_connector_metadata()
    return received


def seconds_of(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
