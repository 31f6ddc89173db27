"""Loads one part of a checkpoint through transformers, without the weights of the other part."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from torch import nn

from chiasm.errors import ConfigurationError, UnsupportedModelError
from chiasm.models.base import LoadProgress
from chiasm.models.support import check_weights

if TYPE_CHECKING:
    from torch import Tensor

    from chiasm.models.checkpoint import Checkpoint, Part

_WEIGHTS_BAR = "Loading weights"
"""What transformers calls its progress bar."""
_ROWS_AT_A_TIME = 4096


def load_part(
    checkpoint: Checkpoint,
    config: Any,
    part: Part,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: LoadProgress | None,
) -> nn.Module:
    """Return the checkpoint's model with only the modules of ``part``, in eval mode and without gradients.

    Only the tensors of this part are read. Raises ConfigurationError if one of them is missing, UnsupportedModelError if
    the checkpoint holds tensors that belong to neither part, or weights that chiasm can't compute with.
    """
    from chiasm.models.tower import ATTENTION

    check_weights(checkpoint)
    checkpoint.weight_files()
    part_class = _part_class(model_class(config), part)
    try:
        with quiet(), counted(progress or LoadProgress()):
            model, info = part_class.from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=dtype,
                # Also where the config names another. That of the decoder isn't used: the engine has its own.
                attn_implementation={"": "eager", "text_config": "eager", "vision_config": ATTENTION},
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are told below
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises anything for a config that it can't follow
        raise ConfigurationError(f"The weights of {checkpoint.folder} cannot be loaded: {error}") from error
    if mismatched := sorted(info["mismatched_keys"]):
        shapes = [f"{name} is {list(stored)}, not {list(expected)}" for name, stored, expected in mismatched]
        raise ConfigurationError(
            f"{checkpoint.folder} holds {len(shapes)} weights of the {part} model in other shapes than its config.json says: "
            f"{_few(shapes)}. Choose a checkpoint in the format of transformers."
        )
    if missing := sorted(info["missing_keys"]):
        raise ConfigurationError(
            f"{checkpoint.folder} lacks {len(missing)} weights of the {part} model: {_few(missing)}. "
            "Download the checkpoint again."
        )
    if unexpected := sorted(info["unexpected_keys"]):
        raise UnsupportedModelError(
            f"{checkpoint.folder} holds {len(unexpected)} weights that transformers' {config.model_type} doesn't use: "
            f"{_few(unexpected)}. Without them the model would give wrong answers."
        )
    model.requires_grad_(False)
    return cast("nn.Module", model.eval().to(device))


def as_stored(checkpoint: Checkpoint, weight: Tensor) -> Tensor:
    """Return the tensor of the files that a weight on the CPU was loaded from, in the dtype that it has there.

    It is a mapping of the file, so it takes only the memory of the pages that are in use, which the system can read again.
    If no tensor of the files has the weight's numbers, it is the weight itself.
    """
    for file in checkpoint.weight_files():
        name = _name_in_file(file, weight)
        if name is not None:
            with safe_open(file, framework="pt") as stored:  # another mapping, of which no page has been read yet
                return cast("Tensor", stored.get_tensor(name))
    return weight


def _name_in_file(file: Path, weight: Tensor) -> str | None:
    """Return the name of the tensor that gives ``weight`` when it is converted to its dtype; None if there is none."""
    parts = torch.split(weight, _ROWS_AT_A_TIME)  # so that conversions take little memory
    with safe_open(file, framework="pt") as stored:
        for name in list(stored.keys()):
            if stored.get_slice(name).get_shape() == list(weight.shape):
                others = torch.split(stored.get_tensor(name), _ROWS_AT_A_TIME)
                if all(torch.equal(other.to(weight.dtype), part) for other, part in zip(others, parts, strict=True)):
                    return str(name)
    return None


def model_class(config: Any) -> Any:
    """Return transformers' class for a checkpoint with this config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]


def _part_class(whole_class: Any, part: Part) -> Any:
    """Return a subclass that drops the other part's modules before storage is allocated for them."""

    def __init__(self: Any, config: Any) -> None:
        whole_class.__init__(self, config)
        decoder, head = self.get_decoder(), self.get_output_embeddings()
        if part == "vision":
            dropped = [name for name, module in self.named_modules() if module is decoder or module is head]
            self.all_tied_weights_keys = {}
        else:
            dropped = [f"model.{name}" for name, module in self.model.named_children() if module is not decoder]
            dropped += [f"model.{name}" for name, _ in self.model.named_parameters(recurse=False)]
        for path in dropped:
            parent, _, name = path.rpartition(".")
            delattr(self.get_submodule(parent), name)
        other_part = "|".join(re.escape(path) for path in dropped)
        ignored = set(self._keys_to_ignore_on_load_unexpected or ())
        self._keys_to_ignore_on_load_unexpected = ignored | {rf"^(?:{other_part})(?:\.|$)"}

    # transformers looks up the renamed tensors of older checkpoints by the name of the class.
    return type(whole_class.__name__, (whole_class,), {"__init__": __init__, "__module__": whole_class.__module__})


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' load report and progress bar: chiasm checks the result itself."""
    from transformers.utils import logging

    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()


@contextmanager
def counted(progress: LoadProgress) -> Iterator[None]:
    """Count the tensors that transformers loads, where it would show a progress bar."""
    from transformers.utils import logging

    def make(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bar = factory(*args, **kwargs)
        if kwargs.get("desc") != _WEIGHTS_BAR:
            return bar
        progress.tensors += len(args[0])
        return count(bar)

    def count(bar: Iterable[Any]) -> Iterator[Any]:
        for tensor in bar:
            yield tensor
            progress.loaded_tensors += 1

    before = logging.set_tqdm_hook(make)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
