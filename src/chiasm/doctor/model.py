"""Checks of the model that a deployment is planned for: whether it is here, complete, and one that the engine can run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from chiasm.doctor.client import Client, NoAnswerError
from chiasm.doctor.report import Check, Result, shown
from chiasm.errors import ChiasmError, ConfigurationError
from chiasm.models.checkpoint import Checkpoint, open_checkpoint, stored_tensors

MODEL = Check("model")

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRUE = frozenset({"1", "on", "yes", "true"})
_IMAGE_SIDE = 1024


@dataclass(frozen=True)
class Weights:
    """Numbers of a checkpoint's parameters."""

    vision: int
    language: int

    def bytes_of(self, item_bytes: int, *, vision: bool, language: bool) -> int:
        """Return the memory that these parts take with ``item_bytes`` for each parameter."""
        return (self.vision * vision + self.language * language) * item_bytes


@dataclass(frozen=True)
class Found:
    """A checkpoint that could be read."""

    checkpoint: Checkpoint
    weights: Weights
    image_numbers: int | None
    """Numbers in the embedding of an image of 1024 × 1024; None if chiasm doesn't know the model."""


async def ask_hub(model: str) -> Result:
    """Return whether a model of the hub that isn't cached could be downloaded."""
    missing = f"{model} is not in the cache"
    why = "it is downloaded at the first start, and nothing is served before that."
    if any(os.environ.get(name, "").lower() in _TRUE for name in _OFFLINE):
        do = "download it where there is a network, or give the path of its folder."
        command = f"HF_HUB_OFFLINE=0 hf download {model}"
        return MODEL.problem(f"{missing}, and HF_HUB_OFFLINE forbids downloading it", why, do, command)
    from huggingface_hub import get_token

    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        async with Client(key=get_token(), goes_outside=True) as client:
            # The page about a model that is gated is for everybody, its files aren't.
            status = (await client.get(f"{hub}/{model}/resolve/main/config.json")).status
    except NoAnswerError as error:
        do = "download it where there is a network, and give the path of its folder."
        command = f"hf download {model} --local-dir FOLDER"
        return MODEL.problem(f"{missing}, and the hub {shown(error)}", why, do, command)
    if status == 200:
        do = "download it beforehand; then its size and type can be checked too."
        return MODEL.warning(f"{missing}; the hub has it", why, do, f"hf download {model}")
    do = "check the name, and log in if access to it is restricted."
    return MODEL.problem(f"{missing}, and the hub answers HTTP {status} for it", why, do, "hf auth login")


def read(folder: Path, *, is_vllm: bool) -> tuple[Found | None, list[Result]]:
    """Read what is in the folder. vLLM also runs models that chiasm itself doesn't know."""
    try:
        checkpoint = open_checkpoint(folder)
        weights = read_weights(checkpoint)
    except ConfigurationError as error:
        return None, [MODEL.refused(error, "download the checkpoint again.", why="no instance can load it.")]
    numbers: int | None = None
    try:
        numbers = _image_numbers(checkpoint, checks_weights=not is_vllm)
    except ChiasmError as error:
        if not is_vllm:
            do = "choose another model, or use --engine vllm for this one."
            return Found(checkpoint, weights, None), [MODEL.refused(error, do)]
    parameters = f"{_count(weights.vision)} parameters for encoders, {_count(weights.language)} for language"
    results = [MODEL.ok(f"{folder.name} ({checkpoint.model_type}) is complete: {parameters}")]
    if numbers is None:
        results.append(
            MODEL.skipped("chiasm can't size this model's images; PDs are called only after the encoder has answered")
        )
    return Found(checkpoint, weights, numbers), results


def read_weights(checkpoint: Checkpoint) -> Weights:
    """Count parameters by the headers of the files; no tensor is read. Raises ConfigurationError if files are damaged."""
    counts = {"vision": 0, "language": 0}
    for file in checkpoint.weight_files():
        for tensor in stored_tensors(file):
            counts[tensor.part] += tensor.numbers
    return Weights(**counts)


def _image_numbers(checkpoint: Checkpoint, *, checks_weights: bool) -> int:
    from chiasm.models import load_processor
    from chiasm.models.support import check_weights, entry_width, load_config

    if checks_weights:
        check_weights(checkpoint)
    width = entry_width(load_config(checkpoint))
    return len(load_processor(checkpoint.folder).geometry_of_size(_IMAGE_SIDE, _IMAGE_SIDE).rows) * width


def _count(number: int) -> str:
    for bound, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= bound:
            return f"{number / bound:.1f} {unit}"
    return str(number)
