"""The tensors of embeddings in memory, and the room that is accounted for them."""

from __future__ import annotations

import torch

from chiasm.engine.embeddings import Embeddings
from tests.engine.driver import BYTES_PER_ROW, Driver


def test_tensors_are_freed_also_while_every_step_fails() -> None:
    scheduler = Driver(cache_rows=4).scheduler
    embeddings = Embeddings(scheduler, entry_width=1)
    for number in range(10):
        name = f"image {number}"
        assert scheduler.encoder_cache.allocate(name, 4 * BYTES_PER_ROW, rank=(False, 0.0, number))
        embeddings.entries[name] = torch.empty(4, 1)
        embeddings.forget_unfilled()
    assert embeddings.entries.keys() == {"image 9"}
    assert not scheduler.encoder_cache.take_evicted()
