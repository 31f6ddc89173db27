"""Checks of the model that a deployment is planned for: whether it is here, whole, and one that can be run."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from chiasm.doctor.base import Check, Finding, shown
from chiasm.doctor.client import Client, NoAnswerError
from chiasm.doctor.weights import Weights, read_weights
from chiasm.errors import ChiasmError, ConfigurationError
from chiasm.models.checkpoint import Checkpoint, open_checkpoint

_MODEL = Check("model")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRUE = frozenset({"1", "on", "yes", "true"})
_IMAGE_SIDE = 1024


@dataclass(frozen=True)
class Found:
    """A checkpoint that could be read."""

    checkpoint: Checkpoint
    weights: Weights
    image_numbers: int | None
    """Of the embedding of an image of 1024 × 1024; None if chiasm doesn't know the model."""


def locate(model: str) -> Path | None:
    """The checkpoint's folder, as far as it can be had without the network: None for a hub name that isn't cached.

    Raises ConfigurationError for what is no model.
    """
    from chiasm.models import resolve_folder

    if not _is_hub_name(model):
        return resolve_folder(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return None


async def ask_hub(model: str) -> Finding:
    """Of a hub name that isn't cached: whether it could be downloaded."""
    why = "it is downloaded at the first start, and before that nothing is served."
    if any(os.environ.get(name, "").lower() in _TRUE for name in _OFFLINE):
        return _MODEL.problem(
            f"{model} is not in the cache, and HF_HUB_OFFLINE forbids to download it",
            why=why,
            do="download it where there is a network, or give the path of its folder.",
            command=f"HF_HUB_OFFLINE=0 hf download {model}",
        )
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        async with Client() as client:
            status = (await client.get(f"{hub}/api/models/{model}")).status
    except NoAnswerError as error:
        return _MODEL.problem(
            f"{model} is not in the cache, and the hub {shown(error)}",
            why=why,
            do="download it where there is a network, and give the path of its folder.",
            command=f"hf download {model} --local-dir FOLDER",
        )
    if status == 200:
        return _MODEL.warning(
            f"{model} is not in the cache; the hub has it",
            why=why,
            do="download it beforehand; then its size and kind can be checked too.",
            command=f"hf download {model}",
        )
    return _MODEL.problem(
        f"{model} is not in the cache, and the hub answers HTTP {status} for it",
        why=why,
        do="check the name, and log in if access to it is restricted.",
        command="hf auth login",
    )


def read(folder: Path, *, is_vllm: bool) -> tuple[Found | None, list[Finding]]:
    """What is in the folder. vLLM runs models too that chiasm itself doesn't know."""
    try:
        checkpoint = open_checkpoint(folder)
        weights = read_weights(checkpoint)
    except ConfigurationError as error:
        return None, [
            _MODEL.problem(
                error.message,
                why="no instance can load it.",
                do="download the checkpoint again.",
            )
        ]
    try:
        numbers: int | None = _image_numbers(checkpoint)
    except ChiasmError as error:
        if not is_vllm:
            return Found(checkpoint, weights, None), [
                _MODEL.problem(
                    error.message,
                    why="instances refuse to start.",
                    do="take another model, or --engine vllm for this one.",
                )
            ]
        numbers = None
    parameters = f"{_count(weights.vision)} parameters for encoders, {_count(weights.language)} for language"
    findings = [_MODEL.ok(f"{folder.name} ({checkpoint.model_type}) is whole: {parameters}")]
    if numbers is None:
        findings.append(
            _MODEL.skipped("chiasm doesn't know this model's images; PDs are called when the encoder has answered")
        )
    return Found(checkpoint, weights, numbers), findings


def _image_numbers(checkpoint: Checkpoint) -> int:
    from chiasm.models import load_processor
    from chiasm.models.support import entry_width, load_config

    width = entry_width(load_config(checkpoint))
    return len(load_processor(checkpoint.folder).geometry_of_size(_IMAGE_SIDE, _IMAGE_SIDE).rows) * width


def _is_hub_name(model: str) -> bool:
    from chiasm import checkpoints

    return (
        bool(_HUB_NAME.fullmatch(model)) and not Path(model).expanduser().exists() and model not in checkpoints.names()
    )


def _count(number: int) -> str:
    for bound, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= bound:
            return f"{number / bound:.1f} {unit}"
    return str(number)
