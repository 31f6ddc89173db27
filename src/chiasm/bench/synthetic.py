"""Small random checkpoints of every family that chiasm runs, made offline in about a second, for tests and measurements.

Their answers mean nothing, but depend on every token and pixel, and so clearly that two correct computations agree on each
greedy token.
"""

from __future__ import annotations

import itertools
import json
import math
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

JsonObject = dict[str, Any]


@dataclass(frozen=True)
class SyntheticSize:
    """The size of a synthetic checkpoint. The default has 0.2 million parameters."""

    text_hidden: int = 64
    text_intermediate: int = 128
    text_layers: int = 3
    text_heads: int = 4
    text_kv_heads: int = 2
    head_dim: int = 16
    """Width of a text head, a multiple of 8."""
    vision_hidden: int = 32
    """A multiple of 4 x ``vision_heads``."""
    vision_intermediate: int = 64
    vision_depth: int = 3
    vision_heads: int = 2
    deepstack_levels: int = 2
    """Qwen3-VL: number of vision layers, from the first, that feed the decoder's first layers; below ``vision_depth``."""
    patch_pixels: int = 8
    tile_pixels: int = 32
    """Side of a tile, for families that cut images into squares; a multiple of 2 x ``patch_pixels``."""
    max_tiles: int = 4
    """Largest number of tiles of an image, without its overview; a square number."""
    max_pixels: int = 128 * 128
    """Qwen: the area to which larger images are scaled down."""
    vocab_size: int = 512
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class _Recipe:
    """How to make a checkpoint of one family."""

    specials: tuple[str, ...]
    end: str
    template: str
    config: Callable[[SyntheticSize, Callable[[str], int]], JsonObject]
    preprocessor: Callable[[SyntheticSize], JsonObject]
    processor: Callable[[SyntheticSize], JsonObject] | None = None
    begin: str | None = None
    adds_begin: bool = False
    """Whether the tokenizer adds ``begin`` before every text, as LLaMA's does."""


def make(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    size: SyntheticSize | None = None,
    dtype_name: str = "float32",
    text_config: Mapping[str, object] | None = None,
) -> Path:
    """Write a random checkpoint to ``folder``, and return the folder.

    ``family`` is a ``model_type``, one of ``FAMILIES``. ``text_config`` adds to the language model's configuration, for
    example another decoder or a sliding window. The same arguments give the same weights. Greedy answers are printable
    ASCII and never end by themselves, unless the embeddings are tied.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from chiasm.models.loading import quiet

    size = size or SyntheticSize()
    recipe = _RECIPES[family]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(recipe, size.vocab_size)
    tokenizer.save_pretrained(folder)

    values = recipe.config(size, tokenizer.convert_tokens_to_ids)
    values["text_config"] |= dict(text_config or {})
    config = AutoConfig.for_model(family, **values)
    model = AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                _randomize(name, module, parameter, generator)
        if not size.tie_word_embeddings:
            model.get_output_embeddings().weight[_unprintable(tokenizer, size.vocab_size)] = 0
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(recipe.end)
    model.generation_config.pad_token_id = 0
    with quiet():
        model.to(getattr(torch, dtype_name)).save_pretrained(folder)

    _write(folder / "preprocessor_config.json", recipe.preprocessor(size))
    if recipe.processor is not None:
        _write(folder / "processor_config.json", recipe.processor(size))
    return folder


def _write(path: Path, value: JsonObject) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _tokenizer(recipe: _Recipe, vocab_size: int) -> Any:
    """Return a byte-level BPE of all bytes and as many short words of lower-case letters as the vocabulary has room for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = list(itertools.islice(_words(), vocab_size - len(pieces) - len(recipe.specials)))
    vocabulary = {piece: index for index, piece in enumerate(pieces + words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(word[:-1], word[-1]) for word in words]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if recipe.adds_begin:
        begin_id = vocab_size - len(recipe.specials) + recipe.specials.index(str(recipe.begin))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{recipe.begin} $A", special_tokens=[(str(recipe.begin), begin_id)]
        )
    tokenizer.add_special_tokens(list(recipe.specials))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=recipe.begin,
        eos_token=recipe.end,
        additional_special_tokens=[token for token in recipe.specials if token not in (recipe.begin, recipe.end)],
    )
    fast.chat_template = recipe.template
    assert len(fast) == vocab_size, f"vocab_size must be at least {len(fast)}"
    return fast


def _words() -> Iterator[str]:
    """Yield aa, ab, …, zz, aaa, …; the prefix of each word comes before it."""
    for length in itertools.count(2):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            yield "".join(letters)


def _unprintable(tokenizer: Any, vocab_size: int) -> list[int]:
    """Return the tokens that aren't printable ASCII."""
    special = set(tokenizer.all_special_ids)
    texts = ((token, tokenizer.decode([token])) for token in range(vocab_size))
    return [token for token, text in texts if token in special or not (text.isascii() and text.isprintable())]


def _randomize(name: str, module: nn.Module, parameter: Tensor, generator: Any) -> None:
    """Draw weights of a size that keeps activations near one; with the usual 0.02, answers would depend on rounding.

    Queries and keys are larger, so that attention selects tokens instead of averaging over all of them.
    """
    from torch import nn

    is_weight = parameter is getattr(module, "weight", None)
    picks = 2 if name.endswith(("q_proj", "k_proj", "q_norm", "k_norm")) else 1
    if isinstance(module, nn.Embedding):
        parameter.normal_(0, 1, generator=generator)
    elif "norm" in type(module).__name__.lower():
        parameter.normal_(picks if is_weight else 0, 0.1, generator=generator)
    elif is_weight and parameter.dim() >= 2:
        gain = 3 if name.endswith("lm_head") else picks
        parameter.normal_(0, gain / math.sqrt(math.prod(parameter.shape[1:])), generator=generator)
    else:
        parameter.normal_(0, 0.3, generator=generator)


def _text(size: SyntheticSize) -> JsonObject:
    return {
        "vocab_size": size.vocab_size,
        "hidden_size": size.text_hidden,
        "intermediate_size": size.text_intermediate,
        "num_hidden_layers": size.text_layers,
        "num_attention_heads": size.text_heads,
        "num_key_value_heads": size.text_kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": size.max_position_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": size.tie_word_embeddings,
    }


_QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN3_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    + _QWEN_TEMPLATE.replace(
        "{% endif %}<|im_end|>",
        "{% endif %}{% for call in message.tool_calls %}"
        "{% if not loop.first or message.content %}{{ '\\n' }}{% endif %}"
        """<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n"""
        "</tool_call>"
        "{% endfor %}<|im_end|>",
        1,
    )
)
"""Knows tools, as that of Qwen3-VL, which describes them with more words."""


def _qwen(
    vision: Callable[[SyntheticSize], JsonObject],
    *,
    interleaved: bool = False,
    experts: Callable[[SyntheticSize], JsonObject] = lambda size: {},
) -> _Recipe:
    def config(size: SyntheticSize, token_id: Callable[[str], int]) -> JsonObject:
        half = size.head_dim // 2
        sections = [half - 2 * (half // 4), half // 4, half // 4]
        parameters: JsonObject = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections}
        if interleaved:
            parameters["mrope_interleaved"] = True
        shared = {
            "patch_size": size.patch_pixels,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "depth": size.vision_depth,
            "num_heads": size.vision_heads,
        }
        return {
            "text_config": {**_text(size), "rope_parameters": parameters, **experts(size)},
            "vision_config": {**shared, **vision(size)},
            "image_token_id": token_id("<|image_pad|>"),
            "video_token_id": token_id("<|video_pad|>"),
            "vision_start_token_id": token_id("<|vision_start|>"),
            "vision_end_token_id": token_id("<|vision_end|>"),
            "tie_word_embeddings": size.tie_word_embeddings,
        }

    def preprocessor(size: SyntheticSize) -> JsonObject:
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": (2 * size.patch_pixels) ** 2, "longest_edge": size.max_pixels},
            "patch_size": size.patch_pixels,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }

    template = _QWEN3_TEMPLATE if interleaved else _QWEN_TEMPLATE
    return _Recipe(_QWEN_SPECIALS, "<|im_end|>", template, config, preprocessor)


def _qwen2_vision(size: SyntheticSize) -> JsonObject:
    return {
        "embed_dim": size.vision_hidden,
        "mlp_ratio": size.vision_intermediate // size.vision_hidden,
        "hidden_size": size.text_hidden,
    }


def _qwen2_5_vision(size: SyntheticSize) -> JsonObject:
    return {
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_intermediate,
        "out_hidden_size": size.text_hidden,
        "window_size": 4 * size.patch_pixels,
        "fullatt_block_indexes": [size.vision_depth - 1],
    }


def _qwen3_vision(size: SyntheticSize) -> JsonObject:
    return {
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_intermediate,
        "out_hidden_size": size.text_hidden,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": list(range(size.deepstack_levels)),
    }


def _experts(size: SyntheticSize) -> JsonObject:
    """Use as many parameters for a token as the dense model has."""
    return {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": size.text_intermediate // 2}


_PARTS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}:"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% elif part.type == 'text' %} {{ part.text }}"
    "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def _idefics3(image_processor: str) -> _Recipe:
    def config(size: SyntheticSize, token_id: Callable[[str], int]) -> JsonObject:
        return {
            "text_config": {"model_type": "llama", **_text(size)},
            "vision_config": _square_vision(size),
            "scale_factor": 2,
            "image_token_id": token_id("<image>"),
            "tie_word_embeddings": size.tie_word_embeddings,
        }

    def preprocessor(size: SyntheticSize) -> JsonObject:
        return {
            "image_processor_type": image_processor,
            "do_image_splitting": True,
            "size": {"longest_edge": size.tile_pixels * math.isqrt(size.max_tiles)},
            "max_image_size": {"longest_edge": size.tile_pixels},
        }

    tiles = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    named = ("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>")
    return _Recipe(
        specials=(*named, *tiles),
        begin="<|im_start|>",
        end="<end_of_utterance>",
        template=_PARTS_TEMPLATE,
        config=config,
        preprocessor=preprocessor,
        processor=lambda size: {"image_seq_len": (size.tile_pixels // size.patch_pixels // 2) ** 2},
    )


def _internvl() -> _Recipe:
    def config(size: SyntheticSize, token_id: Callable[[str], int]) -> JsonObject:
        tokens = (size.tile_pixels // size.patch_pixels // 2) ** 2
        return {
            "text_config": {"model_type": "qwen2", **_text(size)},
            "vision_config": {**_square_vision(size), "layer_scale_init_value": 1.0},
            "downsample_ratio": 0.5,
            "image_seq_length": tokens,
            "image_token_id": token_id("<IMG_CONTEXT>"),
            "tie_word_embeddings": size.tie_word_embeddings,
        }

    def preprocessor(size: SyntheticSize) -> JsonObject:
        return {
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": size.tile_pixels, "width": size.tile_pixels},
            "crop_to_patches": False,
            "min_patches": 1,
            "max_patches": size.max_tiles,
        }

    return _Recipe(
        specials=("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"),
        end="<|im_end|>",
        template=_QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n"),
        config=config,
        preprocessor=preprocessor,
    )


_IMAGES_FIRST_TEMPLATE = (
    "{% for message in messages %}{{ message.role | upper }}: "
    "{% for part in message.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part.text }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def _llava() -> _Recipe:
    def config(size: SyntheticSize, token_id: Callable[[str], int]) -> JsonObject:
        return {
            "text_config": {"model_type": "llama", **_text(size)},
            "vision_config": {"model_type": "clip_vision_model", **_square_vision(size)},
            "image_token_index": token_id("<image>"),
            "image_seq_length": (size.tile_pixels // size.patch_pixels) ** 2,
            "tie_word_embeddings": size.tie_word_embeddings,
        }

    def preprocessor(size: SyntheticSize) -> JsonObject:
        return {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": size.tile_pixels},
            "crop_size": {"height": size.tile_pixels, "width": size.tile_pixels},
        }

    return _Recipe(
        specials=("<s>", "</s>", "<image>"),
        begin="<s>",
        adds_begin=True,
        end="</s>",
        template=_IMAGES_FIRST_TEMPLATE,
        config=config,
        preprocessor=preprocessor,
        processor=lambda size: {
            "patch_size": size.patch_pixels,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    )


def _square_vision(size: SyntheticSize) -> JsonObject:
    """Return the configuration of a plain vision transformer over one square."""
    return {
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_intermediate,
        "num_hidden_layers": size.vision_depth,
        "num_attention_heads": size.vision_heads,
        "image_size": size.tile_pixels,
        "patch_size": size.patch_pixels,
    }


_RECIPES = {
    "qwen2_vl": _qwen(_qwen2_vision),
    "qwen2_5_vl": _qwen(_qwen2_5_vision),
    "qwen3_vl": _qwen(_qwen3_vision, interleaved=True),
    "qwen3_vl_moe": _qwen(_qwen3_vision, interleaved=True, experts=_experts),
    "idefics3": _idefics3("Idefics3ImageProcessor"),
    "smolvlm": _idefics3("SmolVLMImageProcessor"),
    "internvl": _internvl(),
    "llava": _llava(),
}

FAMILIES = tuple(_RECIPES)
"""The families that ``make`` can make."""
