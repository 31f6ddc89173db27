"""The number of weights of each part, by names and shapes alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chiasm.bench import synthetic
from chiasm.doctor.model import Weights, read, read_weights
from chiasm.doctor.report import Verdict
from chiasm.errors import ConfigurationError
from chiasm.models import load_vision
from chiasm.models.checkpoint import open_checkpoint


def in_files(folder: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("family", synthetic.FAMILIES)
def test_parameters_are_counted_for_the_part_that_loads_them(family: str, tmp_path: Path) -> None:
    folder = synthetic.make(family, tmp_path / family)
    vision = load_vision(folder, dtype=torch.float32, device=torch.device("cpu"))
    assert read_weights(open_checkpoint(folder)) == Weights(
        parameters(vision.module), in_files(folder) - parameters(vision.module)
    )


def test_the_size_of_a_part() -> None:
    weights = Weights(10, 100)
    assert weights.bytes_of(2, vision=True, language=False) == 20
    assert weights.bytes_of(4, vision=True, language=True) == 440


@pytest.mark.parametrize("damage", ["cut", "garbage", "endless header"])
def test_damaged_files_are_refused(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    damaged = {"cut": data[:-100], "garbage": b"\x08" + bytes(200), "endless header": b"\xff" * 100}
    file.write_bytes(damaged[damage])
    with pytest.raises(ConfigurationError, match="not a complete safetensors file"):
        read_weights(open_checkpoint(folder))


def test_quantized_weights_are_for_vllm(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    found, (result,) = read(folder, is_vllm=False)
    assert result.verdict is Verdict.PROBLEM
    assert "quantized" in result.says
    found, _ = read(folder, is_vllm=True)
    assert found is not None
    assert found.image_numbers
