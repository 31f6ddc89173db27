"""The shapes of models, from which memory and computed costs follow: of well-known ones, and of a checkpoint's folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from chiasm.errors import ConfigurationError


@dataclass(frozen=True)
class LanguageShape:
    """A decoder with gated MLPs and grouped-query attention."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    """Whether the head is the embedding matrix."""

    @cached_property
    def layer_parameters(self) -> int:
        """Matrix parameters of all layers: the work of a row is two FLOPs for each."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_parameters(self) -> int:
        return self.hidden * self.vocab

    @property
    def parameters(self) -> int:
        return self.layer_parameters + self.head_parameters * (1 if self.tied else 2)

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class VisionShape:
    """A vision transformer, and the projector behind it."""

    layers: int
    hidden: int
    intermediate: int
    gated: bool
    """Whether its MLPs have three matrices instead of two."""
    patches_per_token: int
    """Patches that become one token of the prompt."""
    window_patches: int = 0
    """Patches of one attention window; 0 if all layers attend to the whole image or tile."""
    full_layers: int = 0
    """Layers that attend to the whole image, if the others attend to windows."""
    tile_patches: int = 0
    """Patches of one tile, if attention stays within tiles; 0 if the image is one piece."""
    projector_parameters: int = 0

    @property
    def parameters(self) -> int:
        matrices = 4 * self.hidden**2 + (3 if self.gated else 2) * self.hidden * self.intermediate
        return self.layers * matrices + self.projector_parameters

    def flops(self, tokens: int) -> float:
        """Return the FLOPs to encode an image of that many tokens."""
        patches = tokens * self.patches_per_token
        whole = min(patches, self.tile_patches) if self.tile_patches else patches
        window = min(whole, self.window_patches) if self.window_patches else whole
        full = self.full_layers if self.window_patches else self.layers
        keys = full * whole + (self.layers - full) * window
        towers = 2.0 * patches * (self.parameters - self.projector_parameters)
        return towers + 4.0 * patches * keys * self.hidden + 2.0 * tokens * self.projector_parameters


@dataclass(frozen=True)
class ModelShape:
    """What a plan knows about a model."""

    name: str
    language: LanguageShape
    vision: VisionShape
    entry_width: int
    """Values in one row of an embedding."""
    max_model_len: int
    tokens_of: Callable[[int, int], int]
    """Tokens in the prompt of an image, by height and width in pixels."""
    bytes_per_value: int = 2
    """Size of a weight, and of a value in KV and embeddings."""

    @property
    def language_bytes(self) -> int:
        return self.language.parameters * self.bytes_per_value

    @property
    def vision_bytes(self) -> int:
        return self.vision.parameters * self.bytes_per_value

    @property
    def kv_bytes_per_token(self) -> int:
        return self.language.kv_values_per_token * self.bytes_per_value

    @property
    def entry_bytes_per_row(self) -> int:
        return self.entry_width * self.bytes_per_value


# ---- how many tokens an image takes --------------------------------------------------------------------------------------


def cells(cell: int, min_pixels: int, max_pixels: int) -> Callable[[int, int], int]:
    """Qwen-VL: one token for each cell of the image, once it is scaled to an area between the two (``smart_resize``)."""

    @lru_cache(maxsize=4096)
    def tokens(height: int, width: int) -> int:
        rows, columns = max(1, round(height / cell)), max(1, round(width / cell))
        area = rows * columns * cell**2
        if area > max_pixels:
            scale = math.sqrt(height * width / max_pixels)
            rows, columns = (max(1, math.floor(side / scale / cell)) for side in (height, width))
        elif area < min_pixels:
            scale = math.sqrt(min_pixels / (height * width))
            rows, columns = (math.ceil(side * scale / cell) for side in (height, width))
        return rows * columns

    return tokens


def tiles(tile: int, tokens_per_tile: int, max_tiles: int) -> Callable[[int, int], int]:
    """InternVL: the grid of at most ``max_tiles`` tiles with the nearest aspect ratio, an overview, and two tokens around."""
    grids = sorted(
        {
            (columns, rows)
            for columns in range(1, max_tiles + 1)
            for rows in range(1, max_tiles + 1)
            if columns * rows <= max_tiles
        },
        key=lambda grid: grid[0] * grid[1],
    )

    @lru_cache(maxsize=4096)
    def tokens(height: int, width: int) -> int:
        best, least = (1, 1), math.inf
        for columns, rows in grids:
            difference = abs(width / height - columns / rows)
            larger = difference == least and height * width > 0.5 * tile**2 * columns * rows
            if difference < least or larger:
                best, least = (columns, rows), difference
        count = best[0] * best[1]
        return tokens_per_tile * (count + (count > 1)) + 2

    return tokens


def fixed(tokens: int) -> Callable[[int, int], int]:
    """LLaVA-1.5: every image is cropped to the same square."""
    return lambda height, width: tokens


# ---- well-known models: config.json and preprocessor_config.json of each on the Hugging Face hub ---------------------------


def _qwen2_5(name: str, language: LanguageShape) -> ModelShape:
    vision = VisionShape(
        layers=32,
        hidden=1280,
        intermediate=3420,
        gated=True,
        patches_per_token=4,
        window_patches=64,
        full_layers=4,
        projector_parameters=5120 * (5120 + language.hidden),
    )
    return ModelShape(name, language, vision, language.hidden, 128_000, cells(28, 3136, 12_845_056))


def _qwen3(name: str, language: LanguageShape, layers: int, hidden: int, intermediate: int) -> ModelShape:
    # Three levels of DeepStack, each with a merger of its own beside the last one's.
    projectors = 4 * 4 * hidden * (4 * hidden + language.hidden)
    vision = VisionShape(layers, hidden, intermediate, False, 4, projector_parameters=projectors)
    return ModelShape(name, language, vision, 4 * language.hidden, 262_144, cells(32, 65_536, 16_777_216))


def _internvl3(name: str, language: LanguageShape) -> ModelShape:
    projector = 4096 * language.hidden + language.hidden**2
    vision = VisionShape(24, 1024, 4096, False, 4, tile_patches=1024, projector_parameters=projector)
    return ModelShape(name, language, vision, language.hidden, 32_768, tiles(448, 256, 12))


def _llava(name: str, language: LanguageShape) -> ModelShape:
    # 23 of the tower's 24 layers run: the features are those before the last one.
    projector = 1024 * language.hidden + language.hidden**2
    vision = VisionShape(23, 1024, 4096, False, 1, projector_parameters=projector)
    return ModelShape(name, language, vision, language.hidden, 4096, fixed(576))


MODELS = {
    shape.name.rpartition("/")[2].lower(): shape
    for shape in (
        _qwen2_5("Qwen/Qwen2.5-VL-3B-Instruct", LanguageShape(36, 2048, 16, 2, 128, 11_008, 151_936, tied=True)),
        _qwen2_5("Qwen/Qwen2.5-VL-7B-Instruct", LanguageShape(28, 3584, 28, 4, 128, 18_944, 152_064)),
        _qwen3(
            "Qwen/Qwen3-VL-2B-Instruct",
            LanguageShape(28, 2048, 16, 8, 128, 6144, 151_936, tied=True),
            24,
            1024,
            4096,
        ),
        _qwen3("Qwen/Qwen3-VL-8B-Instruct", LanguageShape(36, 4096, 32, 8, 128, 12_288, 151_936), 27, 1152, 4304),
        _internvl3("OpenGVLab/InternVL3-2B-hf", LanguageShape(28, 1536, 12, 2, 128, 8960, 151_674)),
        _internvl3("OpenGVLab/InternVL3-8B-hf", LanguageShape(28, 3584, 28, 4, 128, 18_944, 151_674)),
        _llava("llava-hf/llava-1.5-7b-hf", LanguageShape(32, 4096, 32, 32, 128, 11_008, 32_064)),
    )
}


def well_known(model: str) -> ModelShape | None:
    """Return the shape of a model of the table, by its name with or without the owner's and ``-Instruct`` or ``-hf``."""
    key = model.rpartition("/")[2].lower()
    return next((MODELS[name] for name in (key, f"{key}-instruct", f"{key}-hf") if name in MODELS), None)


# ---- a checkpoint's folder ---------------------------------------------------------------------------------------------


def of_folder(folder: Path, name: str, bytes_per_value: int) -> ModelShape:
    """Return the shape of a checkpoint, whose weights are not read.

    Raises ConfigurationError for a mixture of experts, whose costs depend on which experts the tokens choose.
    """
    from chiasm.models import load_processor
    from chiasm.models.checkpoint import open_checkpoint
    from chiasm.models.support import entry_width, load_config

    config = load_config(open_checkpoint(folder))
    text = config.get_text_config()
    if getattr(text, "num_experts", None):
        raise ConfigurationError(
            f"{name} is a mixture of experts, for which there is no cost model; plan for a dense model."
        )
    processor = load_processor(folder)

    @lru_cache(maxsize=4096)
    def tokens_of(height: int, width: int) -> int:
        return len(processor.geometry_of_size(height, width).token_ids)

    heads = int(text.num_attention_heads)
    language = LanguageShape(
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        heads=heads,
        kv_heads=int(text.num_key_value_heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        intermediate=int(text.intermediate_size),
        vocab=int(text.vocab_size),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
    )
    width = entry_width(config)
    vision = _vision_of(config, width // language.hidden, language.hidden)
    return ModelShape(name, language, vision, width, processor.max_model_len, tokens_of, bytes_per_value)


def _vision_of(config: Any, levels: int, text_hidden: int) -> VisionShape:
    """Return the shape of a tower, whose configuration has other names in each family."""
    vision = config.vision_config
    qwen = hasattr(vision, "spatial_merge_size")
    hidden = int(getattr(vision, "embed_dim", None) or vision.hidden_size)
    intermediate = int(getattr(vision, "intermediate_size", None) or hidden * vision.mlp_ratio)
    layers = int(getattr(vision, "depth", None) or vision.num_hidden_layers)
    patch = _side(vision.patch_size)
    if qwen:
        merged = int(vision.spatial_merge_size) ** 2
    elif hasattr(config, "scale_factor"):
        merged = int(config.scale_factor) ** 2
    else:
        merged = round(1 / float(getattr(config, "downsample_ratio", 1.0))) ** 2
    full = getattr(vision, "fullatt_block_indexes", None)
    return VisionShape(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        gated=full is not None,
        patches_per_token=merged,
        window_patches=0 if full is None else (int(vision.window_size) // patch) ** 2,
        full_layers=0 if full is None else len(full),
        tile_patches=0 if qwen else (_side(vision.image_size) // patch) ** 2,
        projector_parameters=levels * merged * hidden * (merged * hidden + text_hidden),
    )


def _side(value: Any) -> int:
    return int(value[0] if isinstance(value, (list, tuple)) else value)
