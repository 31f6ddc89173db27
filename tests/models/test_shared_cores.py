"""A thread looks at its part of shared cores before each operator that takes long."""

from __future__ import annotations

import pytest
import torch

from chiasm import cores
from chiasm.models.dot_product_attention import attend_in_blocks
from chiasm.models.products import HAS_ONEDNN, Form, product, product_with_gelu
from tests.models.conftest import Loaded, use_best_form_for_any_size
from tests.models.driver import Driver

_NEEDS_ONEDNN = pytest.mark.skipif(not HAS_ONEDNN, reason="this PyTorch has no oneDNN")


@pytest.mark.parametrize(
    "form", [Form.PLAIN, Form.STRIPS, pytest.param(Form.PACKED, marks=_NEEDS_ONEDNN)], ids=lambda form: form.name
)
@pytest.mark.parametrize("rows", [1, 40])
def test_before_each_product(form: Form, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_best_form_for_any_size(monkeypatch)
    compute, _ = product(torch.randn(600, 32), None, form)
    looks: list[None] = []
    with cores.adapting(lambda: looks.append(None)):
        compute(torch.randn(rows, 32))
        once = len(looks)
        compute(torch.randn(rows, 32), torch.randn(rows, 600))
    compute(torch.randn(rows, 32))
    assert len(looks) == 2 * once > 0


@_NEEDS_ONEDNN
def test_before_a_product_with_an_activation() -> None:
    looks: list[None] = []
    with cores.adapting(lambda: looks.append(None)):
        product_with_gelu(torch.randn(64, 32), None)(torch.randn(3, 32))
    assert len(looks) == 1


@_NEEDS_ONEDNN
def test_before_each_block_of_attention() -> None:
    query, key = torch.randn(300, 4, 16), torch.randn(300, 2, 16)
    looks: list[None] = []
    with cores.adapting(lambda: looks.append(None)):
        attend_in_blocks(query, key, key, scaling=0.25, is_causal=True)
    assert len(looks) == 2 * 3  # heads and blocks of 128 rows


def test_in_every_layer_of_a_decoder(loaded: Loaded) -> None:
    driver = Driver(loaded.language)
    request = driver.add(loaded.prompt([]), [])
    looks: list[None] = []
    with cores.adapting(lambda: looks.append(None)):
        driver.step([request], chunk=4)
    assert len(looks) >= 2 * loaded.language.num_layers
