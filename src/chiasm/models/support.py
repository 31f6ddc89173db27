"""Which checkpoints chiasm can run, and why it refuses the others.

The engine replaces a model's attention with attention over a paged cache, which is causal and takes no mask. A model that
needs any other attention would run and give wrong answers, so everything that is not known to be right is refused at load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chiasm.errors import UnsupportedModelError
from chiasm.models.checkpoint import AS_FILES, told
from chiasm.models.families import FAMILIES, Family

if TYPE_CHECKING:
    from chiasm.models.checkpoint import Checkpoint

_BIDIRECTIONAL = "its image tokens attend to each other in both directions"
_LINEAR = "it mixes linear attention with softmax attention, and the state of linear attention does not fit a KV cache"
_CONVERTED = "choose the checkpoint in the format of transformers, whose name on the hub ends in -hf or -HF"
_REASONS = {
    "deepseek_ocr2": _BIDIRECTIONAL,
    "gemma3": _BIDIRECTIONAL,
    "gemma3n": _BIDIRECTIONAL,
    "gemma4": _BIDIRECTIONAL,
    "internvl_chat": f"it is in InternVL's own format; {_CONVERTED}",
    "llava_onevision": "an image's embedding depends on how many images the request has",
    "mllama": "its text layers see images through cross-attention, not through placeholder tokens",
    "paligemma": _BIDIRECTIONAL,
    "qwen3_5": _LINEAR,
    "qwen3_5_moe": _LINEAR,
}

TEXT_TYPES = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen2_vl_text",
        "qwen2_5_vl_text",
        "qwen3",
        "qwen3_moe",
        "qwen3_vl_text",
        "qwen3_vl_moe_text",
    }
)
"""Decoders that need only causal attention, with or without a sliding window."""

_QUANTIZATION = ("quantization_config", "compression_config", "quantization")
"""Keys of a config whose weights are quantized. The last one is MLX's."""
_ADAPTER = "adapter_config.json"
_ROPE_TYPES = frozenset({"default", "dynamic", "linear", "llama3", "mrope", "yarn"})
"""Dynamic scaling has no effect up to ``max_position_embeddings``, which is ``max_model_len``."""


def load_config(checkpoint: Checkpoint) -> Any:
    """Return the checkpoint's PreTrainedConfig. Raises ConfigurationError, or UnsupportedModelError with the reason."""
    _check_model_type(checkpoint)
    from transformers import AutoConfig

    with told(f"{checkpoint.folder / 'config.json'} is not a valid config"):
        config = AutoConfig.from_pretrained(checkpoint.folder, **AS_FILES)
        _check_vision(checkpoint, config)
        _check_text(checkpoint, config.get_text_config())
    return config


def family_of(config: Any) -> type[Family]:
    """Return the family of a config that ``load_config`` has accepted."""
    return FAMILIES[config.model_type]


def entry_width(config: Any) -> int:
    """Return the number of columns of an entry: the embedding of the placeholders, then the DeepStack levels."""
    levels = len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())
    return (1 + levels) * int(config.get_text_config().hidden_size)


def _check_model_type(checkpoint: Checkpoint) -> None:
    model_type = checkpoint.model_type
    if reason := _REASONS.get(model_type):
        raise _refusal(checkpoint, reason)
    if "vision_config" not in checkpoint.config:
        lacking = "its config.json has no vision_config"
        known = model_type in FAMILIES
        reason = f"{lacking}; {_CONVERTED}" if known else f"it is not a vision-language model, since {lacking}"
        raise _refusal(checkpoint, reason)
    if model_type not in FAMILIES:
        raise _refusal(checkpoint, f"chiasm supports {', '.join(sorted(FAMILIES))}")


def check_weights(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedModelError for weights that have to be changed before they are computed with.

    A processor has no use for weights: those of a model that vLLM runs may be quantized.
    """
    parts = (checkpoint.config, checkpoint.config.get("text_config"), checkpoint.config.get("vision_config"))
    if any(isinstance(part, dict) and part.get(name) is not None for part in parts for name in _QUANTIZATION):
        raise _refusal(checkpoint, "its weights are quantized; use the same model in bfloat16 or float32")
    if (checkpoint.folder / _ADAPTER).is_file():
        raise _refusal(
            checkpoint,
            f"{_ADAPTER} says that an adapter, such as LoRA, changes its weights; merge the adapter into them, and leave out "
            "that file",
        )


def _check_vision(checkpoint: Checkpoint, config: Any) -> None:
    vision_type = type(config.vision_config).model_type  # published files may name the whole model here
    vision_types = family_of(config).vision_types
    if vision_type not in vision_types:
        raise _refusal(checkpoint, f"its vision tower is {vision_type!r}, not one of {', '.join(vision_types)}")


def _check_text(checkpoint: Checkpoint, text: Any) -> None:
    layer_types = set(getattr(text, "layer_types", None) or ())
    if "linear_attention" in layer_types:
        raise _refusal(checkpoint, _LINEAR)
    if getattr(text, "attn_logit_softcapping", None):
        raise _refusal(checkpoint, "its attention scores are soft-capped")
    if getattr(text, "use_bidirectional_attention", None):
        raise _refusal(checkpoint, "its attention is bidirectional")
    text_type = type(text).model_type
    if text_type == "gpt_oss":
        raise _refusal(checkpoint, "its attention has sinks")
    if text_type not in TEXT_TYPES:
        raise _refusal(checkpoint, f"its language model {text_type!r} is not one of {', '.join(sorted(TEXT_TYPES))}")
    if unknown := layer_types - {"full_attention", "sliding_attention"}:
        raise _refusal(checkpoint, f"it has layers of type {', '.join(sorted(map(str, unknown)))}")
    rope = getattr(text, "rope_parameters", None) or {}
    if (rope_type := rope.get("rope_type", "default")) not in _ROPE_TYPES:
        raise _refusal(checkpoint, f"its rotary embedding of type {rope_type!r} depends on the length of the sequence")


def _refusal(checkpoint: Checkpoint, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"chiasm cannot run {checkpoint.folder} ({checkpoint.model_type}): {reason}.")
