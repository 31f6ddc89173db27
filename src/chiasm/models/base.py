"""What chiasm needs of a checkpoint: a processor, a vision encoder, a language model.

A checkpoint is a folder in the Hugging Face layout. Its three parts are loaded separately, because an instance holds only
what its role needs. Every instance has the processor, which needs no weights: tokenizer, chat template, sizes of items and
preprocessing. Encoders have the vision encoder; PD, prefill and decode instances have the language model.

An *entry* is the encoder's output for one item: ``[rows, entry_width]``, where ``entry_width = (1 + deepstack_levels) *
hidden_size``. The first ``hidden_size`` columns replace the embeddings of the placeholders; the others are the DeepStack
levels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from tokenizers import Tokenizer
    from torch import Tensor

    from chiasm.models.tool_format import ToolFormat

Message = dict[str, Any]
"""One chat message with ``role`` and ``content``; content is a string or parts ``{"type": "text", "text": …}`` and
``{"type": "image"}``."""

Metadata = dict[str, list[int]]
"""The size of an item on the wire: ``{"image_grid_thw": [t, h, w]}``, or ``{"image_size": [height, width]}`` in pixels."""


@dataclass
class LoadProgress:
    """How much of its weights a process has loaded; read by other threads."""

    loaded_tensors: int = 0
    tensors: int = 0
    """Of the parts that have begun to load."""


@dataclass(frozen=True)
class ItemGeometry:
    """What the prompt needs to know about an item. It follows from the size of the image, without its pixels."""

    token_ids: tuple[int, ...]
    """The tokens that replace the one placeholder that the chat template wrote."""
    rows: tuple[int, ...]
    """Ascending indices in ``token_ids`` of the tokens that embeddings replace; row ``i`` of the entry goes to ``rows[i]``."""
    metadata: Metadata
    """What an encoder says about the item on the wire, such as ``{"image_grid_thw": [1, 32, 32]}``."""


@dataclass(frozen=True)
class PromptItem:
    """One item at its place in a prompt."""

    identifier: str
    offset: int
    """Prompt index of the item's first token."""
    length: int
    """Number of prompt tokens of the item: ``len(geometry.token_ids)``."""
    geometry: ItemGeometry

    @property
    def positions(self) -> list[int]:
        """Prompt indices of the tokens that the rows of the entry replace."""
        return [self.offset + row for row in self.geometry.rows]


@dataclass(frozen=True)
class Prompt:
    """Token ids with all placeholders expanded, and the items in prompt order. The same item may occur twice."""

    token_ids: list[int]
    items: list[PromptItem] = field(default_factory=list)


class Pixels(NamedTuple):
    """One preprocessed item: the keyword arguments for the vision model, and the geometry."""

    inputs: dict[str, Tensor]
    geometry: ItemGeometry


class Positions(NamedTuple):
    """Rotary positions of a prompt."""

    ids: Tensor
    """int64, ``[3, tokens]`` for M-RoPE, otherwise ``[1, tokens]``."""
    delta: int
    """After the prompt, the position of token ``i`` is ``i + delta`` on all axes."""


class Processor(ABC):
    """Tokenizer, chat template and image processor of one checkpoint. Thread-safe; needs no weights."""

    tokenizer: Tokenizer
    """The tokenizer of the ``tokenizers`` library."""
    eos_token_ids: frozenset[int]
    """Tokens that end an answer, from generation_config.json, config.json and the tokenizer."""
    placeholder: str
    """The word of the token that stands for an image in a rendered chat."""
    vocab_size: int
    """Number of logits per token."""
    max_model_len: int
    """The longest sequence that the model supports, in tokens."""
    tool_format: ToolFormat | None
    """How answers call tools; None if the chat template calls them in a form that isn't supported."""
    default_sampling: Mapping[str, float | int]
    """Temperature, top_p, top_k, min_p and repetition_penalty as generation_config.json has them, as far as it sets them."""

    @abstractmethod
    def build_chat(
        self,
        messages: Sequence[Message],
        items: Sequence[tuple[str, ItemGeometry]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Render the chat template, tokenize, and put ``items`` (identifier, geometry) in the places of the image parts.

        ``tools`` are what the model may call, as OpenAI's API describes them. In messages, the arguments of calls are objects.
        Special words that occur in the messages and the tools are text; only the template writes special tokens. Raises
        InvalidRequestError if the template refuses the messages, or if the number of items differs from the number of places.
        """

    @abstractmethod
    def build_text(self, text: str, *, add_special_tokens: bool = True) -> Prompt:
        """Tokenize a plain prompt (``/v1/completions``), in which special words are special tokens, except for the placeholder
        of images, which is text. With ``add_special_tokens``, the tokenizer adds those of its own, such as BOS."""

    @abstractmethod
    def build_tokens(self, token_ids: Sequence[int]) -> Prompt:
        """Make a prompt of token ids. Raises InvalidRequestError if one is outside the vocabulary or is a placeholder."""

    @abstractmethod
    def geometry_of_size(self, height: int, width: int) -> ItemGeometry:
        """Return the geometry of an image of this size in pixels, after EXIF rotation.

        Raises InvalidRequestError if the image processor refuses the size.
        """

    @abstractmethod
    def geometry_of_metadata(self, metadata: Metadata) -> ItemGeometry:
        """Return the geometry for metadata from the wire: ``image_size``, or the family's own key.

        The metadata is not trusted: raises InvalidRequestError for unknown keys, wrong types and sizes out of bounds.
        """

    @abstractmethod
    def preprocess(self, image: Image) -> Pixels:
        """Turn an image into float32 inputs of the vision model, on the CPU; the geometry equals ``geometry_of_size``."""


class VisionModel(ABC):
    """The vision tower with its projector."""

    entry_width: int
    dtype: torch.dtype
    device: torch.device
    module: torch.nn.Module

    @abstractmethod
    def encode(self, pixels: Pixels) -> Tensor:
        """Return the entry of one item: ``[rows, entry_width]``, contiguous, in ``dtype`` on ``device``.

        Takes one item per call, because entries are cached by content and must not depend on their neighbours in a batch.
        """


class Attention(Protocol):
    """The engine's attention over the keys and values that it keeps: one for each step."""

    def attend(self, layer: int, query: Tensor, fresh: Tensor, *, scaling: float, window: int | None) -> Tensor:
        """Keep the step's keys and values, and return what its rows see: ``[T, query heads * head_dim]``.

        ``query`` is ``[T, query heads, head_dim]``, after rotation. ``fresh`` has the keys, after rotation, and then the
        values: ``[T, 2 * KV heads, head_dim]``. A row sees its request's tokens up to itself, the last ``window`` of them if
        it isn't None. Called once in each layer.
        """


class LanguageModel(ABC):
    """The decoder with its head, run over the concatenated rows of many requests."""

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
        """Return the rotary positions of a whole prompt. Called once per request; needs only token ids and geometries."""

    @abstractmethod
    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        attention: Attention,
        entry_rows: Tensor | None = None,
        entry_index: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states ``[T, hidden_size]`` after the last norm.

        ``token_ids`` is int64 ``[T]``, ``position_ids`` int64 ``[3 or 1, T]``, one axis also where all are alike.
        ``entry_rows`` ``[R, entry_width]`` replace the embeddings of the placeholders at ``entry_index`` (int64 ``[R]``,
        ascending); both are None if the step has no placeholders.
        """

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Turn hidden states ``[B, hidden_size]`` into float32 logits ``[B, vocab_size]``."""
