"""The decoder computes what the layers of transformers compute, over the same weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from chiasm.bench import synthetic
from chiasm.errors import UnsupportedModelError
from chiasm.models import dot_product_attention, load_language, load_vision, products, tower
from chiasm.models.decoder import RMSNorm, Rotary, take_layers
from chiasm.models.products import HAS_ONEDNN, Form, best_form, product
from chiasm.models.tower import speed_up
from tests.models.conftest import (
    CPU,
    HAS_ONEDNN_BFLOAT16,
    Loaded,
    OneDnnProducts,
    sample_image,
    use_best_form_for_any_size,
)
from tests.models.driver import Driver

NEEDS_ONEDNN = pytest.mark.skipif(not HAS_ONEDNN, reason="this PyTorch has no oneDNN")
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


def test_the_form_of_products_follows_from_cpu_and_dtype() -> None:
    packed = Form.PACKED if HAS_ONEDNN else Form.STRIPS
    assert best_form(torch.float32, CPU, AVX512) is packed
    assert best_form(torch.bfloat16, CPU, NATIVE) is (Form.PACKED if HAS_ONEDNN else Form.PLAIN)
    assert best_form(torch.float32, CPU, AVX2) is Form.STRIPS
    for dtype, device, flags in (
        (torch.float32, CPU, set()),
        (torch.bfloat16, CPU, AVX512),
        (torch.float16, CPU, NATIVE),
        (torch.float32, torch.device("cuda"), NATIVE),
    ):
        assert best_form(dtype, device, flags) is Form.PLAIN


@NEEDS_ONEDNN
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("has_bias", [True, False])
def test_every_form_gives_the_same_product(rows: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    weight, bias, inputs = torch.randn(700, 512), torch.randn(700) if has_bias else None, torch.randn(rows, 512)
    onto = torch.randn(rows, 700)
    with torch.inference_mode():
        computed = {form: product(weight, bias, form) for form in Form}
        expected = nn.functional.linear(inputs, weight, bias)
        for compute, _ in computed.values():
            torch.testing.assert_close(compute(inputs), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(compute(inputs, onto.clone()), onto + expected, rtol=1e-4, atol=1e-4)


@NEEDS_ONEDNN
@pytest.mark.parametrize(
    ("shape", "dtype", "is_kept", "rows_by_mkl"),
    [
        ((64, 64), torch.float32, True, 1000),
        ((256, 256), torch.float32, True, 7),
        ((500, 512), torch.float32, True, 2),
        ((1024, 512), torch.float32, False, 0),
        ((64, 64), torch.bfloat16, True, 1000),
        pytest.param(
            (256, 256),
            torch.bfloat16,
            False,
            0,
            marks=pytest.mark.skipif(not HAS_ONEDNN_BFLOAT16, reason="oneDNN doesn't compute in bfloat16 on this CPU"),
        ),
    ],
)
def test_few_rows_of_small_weights_are_left_to_mkl(
    shape: tuple[int, int], dtype: torch.dtype, is_kept: bool, rows_by_mkl: int
) -> None:
    compute, is_packed = product(torch.randn(shape, dtype=dtype), None, Form.PACKED)
    assert is_packed != is_kept
    for rows in {1, rows_by_mkl, rows_by_mkl + 1} - {0}:
        by_onednn = OneDnnProducts()
        with torch.inference_mode(), by_onednn:
            compute(torch.randn(rows, shape[1], dtype=dtype))
        assert len(by_onednn.sizes) == (rows > rows_by_mkl and shape != (64, 64)), rows


@NEEDS_ONEDNN
@pytest.mark.parametrize("flags", [AVX2, AVX512], ids=["strips", "packed"])
def test_a_tower_keeps_its_results_in_every_form(flags: set[str]) -> None:
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Linear(512, 768), nn.GELU(), nn.Linear(768, 512), nn.Linear(512, 4))
    rows = torch.randn(2, 30, 512)
    with torch.inference_mode():
        expected = tower(rows)
        speed_up(tower, flags)
        torch.testing.assert_close(tower(rows), expected, rtol=1e-4, atol=1e-4)


@NEEDS_ONEDNN
@pytest.mark.parametrize("flags", [AVX2, AVX512], ids=["strips", "packed"])
def test_answers_stay_the_same_in_every_form_of_the_weights(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, flags: set[str]
) -> None:
    _play_cpu(monkeypatch, flags)
    pixels = loaded.processor.preprocess(sample_image(1))
    prompt = loaded.prompt([pixels])
    expected = loaded.reference(prompt, [pixels], max_tokens=6)
    vision = load_vision(loaded.folder, dtype=torch.float32, device=CPU)
    language = load_language(loaded.folder, dtype=torch.float32, device=CPU)
    weight = language.module.get_decoder().layers[0].self_attn.q_proj.weight  # type: ignore[operator]
    assert (weight.numel() > 0) == (flags is AVX2)
    assert Driver(language).generate(prompt, [vision.encode(pixels)], chunk=16, max_tokens=6) == expected


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A checkpoint in bfloat16 whose head has the weights of the table of embeddings."""
    size = synthetic.SyntheticSize(tie_word_embeddings=True)
    folder = synthetic.make("qwen3_vl", tmp_path_factory.mktemp("tied"), size=size, dtype_name="bfloat16")
    return Loaded("qwen3_vl", folder)


@NEEDS_ONEDNN
@pytest.mark.parametrize("flags", [AVX2, AVX512], ids=["strips", "packed"])
def test_answers_stay_the_same_in_every_form_of_tied_weights(
    tied: Loaded, monkeypatch: pytest.MonkeyPatch, flags: set[str]
) -> None:
    _play_cpu(monkeypatch, flags)
    prompt = tied.prompt([])
    language = load_language(tied.folder, dtype=torch.float32, device=CPU)
    assert Driver(language).generate(prompt, [], chunk=16, max_tokens=6) == tied.reference(prompt, [], max_tokens=6)


@NEEDS_ONEDNN
@pytest.mark.parametrize(
    ("dtype", "flags"),
    [
        (torch.float32, AVX512),
        pytest.param(
            torch.bfloat16,
            NATIVE,
            marks=pytest.mark.skipif(not HAS_ONEDNN_BFLOAT16, reason="oneDNN doesn't compute in bfloat16 on this CPU"),
        ),
    ],
)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_packed_head_leaves_tied_weights_to_the_file(
    tied: Loaded, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, flags: set[str], rows: int
) -> None:
    _play_cpu(monkeypatch, flags)
    language = load_language(tied.folder, dtype=dtype, device=CPU)
    module: Any = language.module
    table = module.get_input_embeddings().weight
    assert table.dtype == torch.bfloat16
    assert module.get_output_embeddings().weight.numel() == 0
    if sys.platform == "linux":
        assert _mapped_file(table.data_ptr()) == str(tied.folder / "model.safetensors")
    hidden = torch.randn(rows, language.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    by_onednn = OneDnnProducts()
    with by_onednn:
        logits = language.logits(hidden)
    assert by_onednn.sizes == [rows * language.vocab_size]
    precision = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(logits, hidden.float() @ table.float().t(), rtol=precision, atol=precision * 10)


@pytest.mark.parametrize("flags", [set(), AVX2], ids=["plain", "strips"])
def test_tied_weights_that_are_not_packed_are_there_once(
    tied: Loaded, monkeypatch: pytest.MonkeyPatch, flags: set[str]
) -> None:
    _play_cpu(monkeypatch, flags)
    module: Any = load_language(tied.folder, dtype=torch.float32, device=CPU).module
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight


def _play_cpu(monkeypatch: pytest.MonkeyPatch, flags: set[str]) -> None:
    """Have models be loaded as on a CPU with these flags, with products of any size in the form of large ones."""
    for module in (products, tower, dot_product_attention):
        monkeypatch.setattr(module, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(dot_product_attention, "FEW_SCORES", 0)
    use_best_form_for_any_size(monkeypatch)
    monkeypatch.setattr(products, "_STRIP", 24)


def _mapped_file(address: int) -> str:
    """Return the file in whose mapping an address of this process is; empty if it is in none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        places, *_, file = line.split(maxsplit=5) if line.count("/") else (line.split()[0], "")
        begin, end = (int(place, 16) for place in places.split("-"))
        if begin <= address < end:
            return file
    return ""
