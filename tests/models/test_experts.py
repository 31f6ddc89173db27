"""Experts with packed weights are as exact as those of transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

from chiasm.bench import synthetic
from chiasm.models import decoder
from chiasm.models.experts import PackedExperts, pack_experts
from chiasm.models.products import HAS_ONEDNN, Form
from tests.models.conftest import HAS_ONEDNN_BFLOAT16, Loaded, OneDnnProducts, sample_image, use_best_form_for_any_size
from tests.models.driver import Driver

pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason="this PyTorch has no oneDNN")
DTYPES = [
    pytest.param(torch.float32, 3.0, id="float32"),
    pytest.param(
        torch.bfloat16,
        1.05,
        id="bfloat16",
        marks=pytest.mark.skipif(not HAS_ONEDNN_BFLOAT16, reason="oneDNN doesn't compute in bfloat16 on this CPU"),
    ),
]


def mixture(dtype: torch.dtype, *, width: int = 768) -> Any:
    """A layer's experts and what chooses among them, as transformers computes them in the engine."""
    config = Qwen3VLMoeTextConfig(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=width, hidden_size=1024)
    config._experts_implementation = "grouped_mm"
    made: Any = Qwen3VLMoeTextSparseMoeBlock(config)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    return made.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 8, 256])
@pytest.mark.parametrize(("dtype", "factor"), DTYPES)
def test_packed_experts_are_as_exact_as_those_of_transformers(dtype: torch.dtype, factor: float, rows: int) -> None:
    theirs = mixture(dtype)
    hidden = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(1)).to(dtype)
    _, weights, chosen = theirs.gate(hidden)
    in_double = copy.deepcopy(theirs.experts).double()
    in_double.config._experts_implementation = "eager"  # the other has no float64
    exact = in_double(hidden.double(), chosen, weights.double())
    their_error = (theirs.experts(hidden, chosen, weights).double() - exact).abs()
    pack_experts(theirs, Form.PACKED)
    assert isinstance(theirs.experts, PackedExperts)
    error = (theirs.experts(hidden, chosen, weights).double() - exact).abs()
    assert error.mean() <= factor * their_error.mean()
    assert error.max() <= 2 * factor * their_error.max()


@pytest.mark.parametrize("rows", [1, 7])
def test_packed_experts_give_what_those_of_transformers_give(rows: int) -> None:
    theirs = mixture(torch.float32)
    hidden = torch.randn(1, rows, 1024, generator=torch.Generator().manual_seed(1))
    expected = theirs(hidden)
    pack_experts(theirs, Form.PACKED)
    torch.testing.assert_close(theirs(hidden), expected)


def test_packed_experts_keep_no_second_copy_of_their_weights() -> None:
    theirs = mixture(torch.float32)
    experts = theirs.experts
    pack_experts(theirs, Form.PACKED)
    assert not sum(parameter.numel() for parameter in experts.parameters())
    assert {name for name, _ in theirs.named_parameters()} == {"gate.weight"}


@pytest.mark.parametrize("form", [Form.PACKED, Form.STRIPS, Form.PLAIN])
def test_small_experts_and_other_forms_stay_with_transformers(form: Form) -> None:
    theirs = mixture(torch.float32, width=64 if form is Form.PACKED else 768)
    pack_experts(theirs, form)
    assert not isinstance(theirs.experts, PackedExperts)


def test_a_model_with_packed_experts_gives_the_tokens_of_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_best_form_for_any_size(monkeypatch)
    monkeypatch.setattr(decoder, "pack_experts", lambda mlp: pack_experts(mlp, Form.PACKED))
    loaded = Loaded("qwen3_vl_moe", synthetic.make("qwen3_vl_moe", tmp_path))
    pixels = [loaded.processor.preprocess(sample_image(1))]
    prompt, entries = loaded.prompt(pixels), [loaded.vision.encode(item) for item in pixels]
    expected = loaded.reference(prompt, pixels, 8)
    by_onednn = OneDnnProducts()
    with by_onednn:
        assert Driver(loaded.language).generate(prompt, entries, chunk=7, max_tokens=8) == expected
    assert by_onednn.sizes
    assert any(isinstance(module, PackedExperts) for module in loaded.language.module.modules())
