"""The decoder computes what the layers of transformers compute, over the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from chiasm.bench import synthetic
from chiasm.errors import UnsupportedModelError
from chiasm.models import load_language, load_vision, products
from chiasm.models.decoder import RMSNorm, Rotary, take_layers
from chiasm.models.products import PackedLinear, Packing, pack_linears, packing_of, product
from tests.models.conftest import CPU, Loaded, sample_image
from tests.models.driver import Driver

AVX2, AVX512, NATIVE = {"avx2"}, {"avx2", "avx512f"}, {"avx2", "avx512f", "avx512_bf16"}


def test_rotations_are_those_of_transformers(loaded: Loaded) -> None:
    module: Any = loaded.whole.get_decoder().rotary_emb
    head_dim = loaded.language.head_dim
    axes = 3 if loaded.family.startswith("qwen") else 1
    positions = torch.randint(0, 4000, (axes, 50), generator=torch.Generator().manual_seed(0))
    cos, sin = module(torch.zeros(1), positions[:, None] if axes == 3 else positions)
    rotation = Rotary(module, head_dim, torch.float32)(positions)
    half = head_dim // 2
    assert torch.equal(rotation.cos[:, 0], cos[0])
    assert torch.equal(rotation.sin[:, 0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_that_of_transformers(loaded: Loaded, dtype: torch.dtype) -> None:
    module: Any = type(loaded.whole.get_decoder().norm)(64, eps=1e-5).to(dtype)
    module.weight.data.normal_(1, 0.2, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch.testing.assert_close(RMSNorm.of(module)(rows), module(rows).detach())


def test_fused_weights_take_no_more_memory(loaded: Loaded) -> None:
    layer: Any = loaded.language.module.get_decoder().layers[0]  # type: ignore[operator]
    attention = layer.self_attn
    pieces = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    (address,) = {piece.untyped_storage().data_ptr() for piece in pieces}
    assert address
    assert pieces[0].untyped_storage().nbytes() == sum(piece.numel() for piece in pieces) * 4


@pytest.mark.parametrize(("path", "name"), [("", "extra"), ("self_attn", "extra"), ("mlp", "extra")])
def test_a_layer_with_a_part_that_is_not_known_is_refused(tmp_path: Path, path: str, name: str) -> None:
    whole = Loaded("llava", synthetic.make("llava", tmp_path)).whole
    decoder = whole.get_decoder()
    decoder.layers[1].get_submodule(path).add_module(name, nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="extra"):
        take_layers(decoder)


def test_packing_follows_from_cpu_and_dtype() -> None:
    chosen = {
        (torch.float32, "avx2"): packing_of(torch.float32, CPU, AVX2),
        (torch.float32, "avx512"): packing_of(torch.float32, CPU, AVX512),
        (torch.float32, "none"): packing_of(torch.float32, CPU, set()),
        (torch.bfloat16, "avx512"): packing_of(torch.bfloat16, CPU, AVX512),
        (torch.bfloat16, "native"): packing_of(torch.bfloat16, CPU, NATIVE),
        (torch.float16, "native"): packing_of(torch.float16, CPU, NATIVE),
        (torch.float32, "cuda"): packing_of(torch.float32, torch.device("cuda"), NATIVE),
    }
    assert {case for case, packing in chosen.items() if packing is Packing.ALL} == {
        (torch.float32, "avx512"),
        (torch.bfloat16, "native"),
    }
    assert {case for case, packing in chosen.items() if packing is Packing.WIDE} == {(torch.float32, "avx2")}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_packed_weights_give_the_same_product(rows: int) -> None:
    torch.manual_seed(0)
    weight, bias, inputs = torch.randn(700, 512), torch.randn(700), torch.randn(rows, 512)
    with torch.inference_mode():
        packed, is_packed = product(weight, bias, Packing.ALL)
        plain, is_plain_packed = product(weight, bias, Packing.NONE)
        assert (is_packed, is_plain_packed) == (True, False)
        torch.testing.assert_close(packed(inputs), plain(inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("outputs", "inputs", "packing", "packs"),
    [
        (1024, 512, Packing.WIDE, True),
        (512, 1024, Packing.WIDE, False),
        (512, 1024, Packing.ALL, True),
        (256, 256, Packing.ALL, False),
    ],
)
def test_tall_and_small_weights_stay_as_they_are(outputs: int, inputs: int, packing: Packing, packs: bool) -> None:
    if packs and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    assert product(torch.zeros(outputs, inputs), None, packing)[1] is packs


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_a_tower_keeps_its_results_when_its_linears_are_packed() -> None:
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Linear(512, 768), nn.GELU(), nn.Linear(768, 512), nn.Linear(512, 4))
    rows = torch.randn(2, 30, 512)
    with torch.inference_mode():
        expected = tower(rows)
        pack_linears(tower, AVX2)
        assert not [one for one in tower if isinstance(one, PackedLinear)]
        pack_linears(tower, AVX512)
        assert [isinstance(one, PackedLinear) for one in tower] == [True, False, True, False]
        torch.testing.assert_close(tower(rows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_answers_stay_the_same_if_every_weight_is_packed(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "cpu_flags", lambda: frozenset(AVX512))
    monkeypatch.setattr(products, "LEAST_BYTES", 0)
    pixels = loaded.processor.preprocess(sample_image(1))
    prompt = loaded.prompt([pixels])
    expected = loaded.reference(prompt, [pixels], max_tokens=6)
    vision = load_vision(loaded.folder, dtype=torch.float32, device=CPU)
    language = load_language(loaded.folder, dtype=torch.float32, device=CPU)
    assert any(isinstance(module, PackedLinear) for module in vision.module.modules())
    assert not language.module.get_decoder().layers[0].self_attn.q_proj.weight.numel()  # type: ignore[operator]
    assert Driver(language).generate(prompt, [vision.encode(pixels)], chunk=16, max_tokens=6) == expected
