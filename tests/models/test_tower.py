"""Vision towers keep their results when they are made fast."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from chiasm.models import dot_product_attention, load_vision, products, tower
from chiasm.models.products import HAS_ONEDNN
from chiasm.models.tower import speed_up
from tests.models.conftest import CPU, Loaded, sample_image, use_best_form_for_any_size

NEEDS_ONEDNN = pytest.mark.skipif(not HAS_ONEDNN, reason="this PyTorch has no oneDNN")
AVX2, AVX512 = frozenset({"avx2"}), frozenset({"avx2", "avx512f", "avx512_bf16"})
GELU_WITH_TANH = {"qwen3_vl", "qwen3_vl_moe", "idefics3", "smolvlm"}


class _Calls(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.overloadpacket.__name__] += 1
        if function is torch.ops.mkldnn._linear_pointwise.default:
            self.counts[f"product, {args[3]}"] += 1
        return function(*args, **(kwargs or {}))


@NEEDS_ONEDNN
def test_a_tower_of_each_family_computes_by_products_alone(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (products, tower, dot_product_attention):
        monkeypatch.setattr(module, "cpu_flags", lambda: AVX512)
    use_best_form_for_any_size(monkeypatch)
    monkeypatch.setattr(dot_product_attention, "FEW_SCORES", 0)
    pixels = loaded.processor.preprocess(sample_image(1))
    vision = load_vision(loaded.folder, dtype=torch.float32, device=CPU)
    calls = _Calls()
    with calls:
        entry = vision.encode(pixels)
    torch.testing.assert_close(entry, loaded.vision.encode(pixels), rtol=1e-4, atol=1e-4)
    counts = calls.counts
    assert not {"conv2d", "conv3d", "linear", "scaled_dot_product_attention"} & counts.keys()
    assert counts["softmax"] > 0
    assert (counts["product, gelu"] > 0) == (loaded.family in GELU_WITH_TANH)


@pytest.mark.parametrize("flags", [AVX2, pytest.param(AVX512, marks=NEEDS_ONEDNN)], ids=["strips", "packed"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "size", "shape"),
    [
        (nn.Conv2d, (4, 4), (2, 3, 8, 12)),
        (nn.Conv2d, (4, 3), (1, 3, 11, 10)),
        (nn.Conv3d, (2, 4, 4), (5, 3, 2, 4, 4)),
        (nn.Conv3d, (2, 4, 4), (1, 3, 4, 8, 4)),
    ],
)
def test_a_convolution_of_patches(
    kind: Any,
    size: tuple[int, ...],
    shape: tuple[int, ...],
    has_bias: bool,
    flags: frozenset[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_best_form_for_any_size(monkeypatch)
    torch.manual_seed(0)
    convolution = kind(3, 16, kernel_size=size, stride=size, bias=has_bias)
    inputs = torch.randn(shape)
    calls = _Calls()
    with torch.inference_mode():
        expected = convolution(inputs)
        speed_up(convolution, flags)
        with calls:
            torch.testing.assert_close(convolution(inputs), expected, rtol=1e-4, atol=1e-4)
    assert not {"conv2d", "conv3d"} & calls.counts.keys()
    assert (convolution.weight.numel() == 0) == (flags is AVX512)


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"stride": 4, "padding": 1}, {"stride": 4, "dilation": 2}, {"stride": 4, "groups": 2}]
)
def test_other_convolutions_stay(options: dict[str, Any]) -> None:
    convolution = nn.Conv2d(4, 16, kernel_size=4, **options)
    inputs = torch.randn(1, 4, 16, 16)
    calls = _Calls()
    with torch.inference_mode():
        expected = convolution(inputs)
        speed_up(convolution, AVX512)
        with calls:
            assert torch.equal(convolution(inputs), expected)
    assert calls.counts["conv2d"] == 1
