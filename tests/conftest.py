"""For all tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny models run fastest on one thread, above all beside other processes."""
    import torch

    torch.set_num_threads(1)
