"""What an engine chooses by the machine that it is on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chiasm.engine.device import choose_dtype


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"avx2"}, torch.float32),
        ({"avx2", "avx512f", "avx512_vnni"}, torch.float32),
        ({"avx2", "avx512f", "avx512_bf16"}, torch.bfloat16),
        ({"avx512f", "amx_tile", "amx_bf16"}, torch.bfloat16),
        (set(), torch.float32),
    ],
)
def test_auto_is_bfloat16_on_cpus_that_have_instructions_for_it(flags: set[str], dtype: torch.dtype) -> None:
    assert choose_dtype("auto", Path("/nowhere"), torch.device("cpu"), flags) == dtype


def test_a_dtype_that_is_asked_for_is_taken_whatever_the_cpu() -> None:
    device = torch.device("cpu")
    assert choose_dtype("float32", Path("/nowhere"), device, {"avx512_bf16"}) == torch.float32
    assert choose_dtype("bfloat16", Path("/nowhere"), device, set()) == torch.bfloat16
