"""What chiasm needs of a checkpoint: a processor, a vision encoder, a language model.

A checkpoint is a folder in the Hugging Face layout. The three parts load apart, since an instance holds only what its
role needs: the processor (no weights: tokenizer, chat template, sizes of items, preprocessing) is in all, the vision
encoder in encoders, the language model in PD, prefill and decode.

*Entry*: the encoder's output for one item, ``[rows, entry_width]`` where ``entry_width = (1 + deepstack_levels) *
hidden_size``. The first ``hidden_size`` columns replace the placeholders' embeddings, the rest are the DeepStack levels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from tokenizers import Tokenizer
    from torch import Tensor

ATTENTION_NAME = "chiasm_paged"
"""Name under which the engine registers its attention with transformers, and which language models are loaded with."""

Message = dict[str, Any]
"""One chat message with ``role`` and ``content``; content is a string or parts ``{"type": "text", "text": …}`` and
``{"type": "image"}``."""

Metadata = dict[str, list[int]]
"""What sizes an item's placeholders on the wire: ``{"image_grid_thw": [t, h, w]}``, or ``{"image_size": [height, width]}``."""


@dataclass(frozen=True)
class ItemGeometry:
    """What the prompt needs to know of an item, without its pixels."""

    token_ids: tuple[int, ...]
    """The tokens that stand in the prompt for the one placeholder that the chat template wrote."""
    rows: tuple[int, ...]
    """Indices in ``token_ids`` that embedding rows replace, ascending; row ``i`` of the entry goes to ``rows[i]``."""
    metadata: Metadata
    """What the encoder answers on the wire, e.g. ``{"image_grid_thw": [1, 32, 32]}``."""


@dataclass(frozen=True)
class PromptItem:
    """One item in its place in a prompt."""

    identifier: str
    offset: int
    """Prompt index of the item's first token."""
    length: int
    """Prompt tokens of the item, from the first to the last that ``geometry.token_ids`` holds."""
    geometry: ItemGeometry

    @property
    def positions(self) -> list[int]:
        """Prompt indices of the embedding rows."""
        return [self.offset + row for row in self.geometry.rows]


@dataclass(frozen=True)
class Prompt:
    """Token ids with all placeholders expanded, and the items in order of their places (one may occur twice)."""

    token_ids: list[int]
    items: list[PromptItem] = field(default_factory=list)


class Pixels(NamedTuple):
    """One preprocessed item: the keyword arguments of the vision model, and its geometry."""

    inputs: dict[str, Tensor]
    geometry: ItemGeometry


class Positions(NamedTuple):
    """Rotary positions of a prompt."""

    ids: Tensor
    """int64 ``[3, tokens]`` for M-RoPE, else ``[1, tokens]``."""
    delta: int
    """The position of token ``i`` past the prompt is ``i + delta``, on all axes."""


class Processor(ABC):
    """Tokenizer, chat template and image processor of one checkpoint. Thread-safe; loads no weights."""

    tokenizer: Tokenizer
    """The fast tokenizer behind it."""
    eos_token_ids: frozenset[int]
    """Tokens that end an answer (from generation_config, config and tokenizer)."""
    vocab_size: int
    """Size of the logits."""
    max_model_len: int
    """The longest sequence that the model was made for, in tokens."""
    default_sampling: Mapping[str, float | int]
    """temperature, top_p, top_k, repetition_penalty where generation_config.json sets them."""

    @abstractmethod
    def build_chat(
        self,
        messages: Sequence[Message],
        items: Sequence[tuple[str, ItemGeometry]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Render with the chat template, tokenize, and put ``items`` (identifier, geometry) into the image parts' places.

        Raises InvalidRequestError where the template refuses the messages, or where text of the client holds the
        placeholder token, so that the places don't match the items.
        """

    @abstractmethod
    def build_text(self, text: str) -> Prompt:
        """Tokenize a plain prompt (``/v1/completions``). Raises InvalidRequestError if it holds a placeholder token."""

    @abstractmethod
    def build_tokens(self, token_ids: Sequence[int]) -> Prompt:
        """A prompt given as token ids. Raises InvalidRequestError if one isn't in the vocabulary or is a placeholder."""

    @abstractmethod
    def geometry_of_size(self, height: int, width: int) -> ItemGeometry:
        """The geometry of an image of this size in pixels, after rotation by EXIF.

        Raises InvalidRequestError for a size that the image processor refuses.
        """

    @abstractmethod
    def geometry_of_metadata(self, metadata: Metadata) -> ItemGeometry:
        """The geometry from what came on the wire: ``image_size``, or the family's own key.

        Hostile until checked: raises InvalidRequestError for unknown keys, wrong types, or sizes out of bounds.
        """

    @abstractmethod
    def preprocess(self, image: Image) -> Pixels:
        """An RGB image as the vision model's inputs, float32 on CPU; its geometry equals ``geometry_of_size``."""


class VisionModel(ABC):
    """The vision tower with its projector."""

    entry_width: int
    dtype: torch.dtype
    device: torch.device
    module: torch.nn.Module

    @abstractmethod
    def encode(self, pixels: Pixels) -> Tensor:
        """The entry of one item, ``[rows, entry_width]``, contiguous, in ``dtype`` on ``device``.

        One item a call, so that its bytes don't depend on its neighbours: entries are cached by content.
        """


class LanguageModel(ABC):
    """The decoder with its head, run over flattened rows of many requests."""

    hidden_size: int
    entry_width: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    dtype: torch.dtype
    device: torch.device
    module: torch.nn.Module

    @abstractmethod
    def positions(self, prompt: Prompt) -> Positions:
        """Rotary positions of the whole prompt, computed once a request, from token ids and geometries alone."""

    @abstractmethod
    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        attention: object,
        entry_rows: Tensor | None = None,
        entry_index: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``[T, hidden_size]`` after the last norm.

        ``token_ids`` int64 [T] (placeholders in it are replaced), ``position_ids`` int64 [3 or 1, T]; ``entry_rows``
        [R, entry_width] are the embedding rows of this step and ``entry_index`` int64 [R], ascending, the rows of the
        step that they replace; both None where the step has none. ``attention`` reaches the attention function of
        ``ATTENTION_NAME`` as the keyword ``paged``.
        """

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """``[B, hidden_size]`` → float32 ``[B, vocab_size]``."""
