"""Products of ZenDNN: the numbers are those of PyTorch, and where it can't be used, an error says why."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from chiasm import cores
from chiasm.errors import ConfigurationError
from chiasm.models import load_language, zendnn
from chiasm.models.zendnn import product_of_zendnn
from tests.models.conftest import CPU, Loaded, use_best_form_for_any_size
from tests.models.driver import Driver

IS_USABLE = cores.cpu_vendor() == "AMD" and "avx512f" in cores.cpu_flags() and find_spec("zentorch") is not None
usable = pytest.mark.skipif(not IS_USABLE, reason="needs zentorch, and a CPU of AMD with AVX-512")


@usable
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(768, 512), (1000, 896), (512, 1536)])
@pytest.mark.parametrize("rows", [1, 2, 7, 33, 256])
def test_products_are_those_of_pytorch(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    given, weight, bias, onto = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    )
    make = product_of_zendnn("the test")
    expected = linear(given.double(), weight.double(), bias.double())
    rtol, atol = (1e-2, 0.3) if dtype == torch.bfloat16 else (1e-4, 1e-3)
    with torch.inference_mode():
        compute, _ = make(weight, bias)
        torch.testing.assert_close(compute(given).double(), expected, rtol=rtol, atol=atol)
        added = compute(given, onto.clone())
        torch.testing.assert_close(added.double(), expected + onto.double(), rtol=rtol, atol=atol)
        without_bias, _ = make(weight, None)
        torch.testing.assert_close(without_bias(given).double(), expected - bias.double(), rtol=rtol, atol=atol)


@usable
def test_a_model_answers_as_it_does_without(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = loaded.language
    use_best_form_for_any_size(monkeypatch)
    language = load_language(loaded.folder, dtype=torch.float32, device=CPU, make_product=product_of_zendnn("the test"))
    prompt = loaded.processor.build_text("What is this?")
    answers = [Driver(one).generate(prompt, [], chunk=64, max_tokens=16) for one in (language, expected)]
    assert answers[0] == answers[1]


def test_it_has_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zentorch", None)
    with pytest.raises(ConfigurationError, match=r"--zendnn needs zentorch, .* Run pip install '\.\[zen\]'"):
        product_of_zendnn("--zendnn")


@pytest.mark.parametrize(("vendor", "flags"), [("Intel", {"avx512f"}), ("AMD", {"avx2"})])
def test_other_cpus_have_no_use_for_it(monkeypatch: pytest.MonkeyPatch, vendor: str, flags: set[str]) -> None:
    monkeypatch.setattr(zendnn, "require", lambda *_: None)
    monkeypatch.setattr(cores, "cpu_vendor", lambda: vendor)
    monkeypatch.setattr(cores, "cpu_flags", lambda: flags)
    with pytest.raises(ConfigurationError, match="--zendnn is for AMD's CPUs with AVX-512"):
        product_of_zendnn("--zendnn")


@usable
def test_a_build_for_another_pytorch_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "damaged").write_bytes(b"no library")
    monkeypatch.setattr(zendnn, "_LIBRARY", tmp_path / "damaged")
    zendnn._load.cache_clear()
    with pytest.raises(
        ConfigurationError, match=r"can't be loaded with PyTorch .* pip install 'zentorch==\d+\.\d+\.\*'"
    ):
        product_of_zendnn("--zendnn")
