"""What the scheduler half remembers: requests, their items, and what happens to each item."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from chiasm.ec_transfer import check_identifier
from chiasm.errors import InvalidRequestError
from chiasm.integrations.vllm.settings import dtype_name

MetadataFields = Callable[[str], Collection[str]]
"""Returns which fields of an item of a modality only say how many placeholders it needs, not what fills them."""

# ---- requests ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One item of a request."""

    identifier: str
    offset: int
    length: int
    """Prompt tokens from the first placeholder to the last."""
    rows: int
    """Rows of its embedding: the placeholders among those tokens."""
    has_pixels: bool
    """Whether vLLM could encode it here."""

    @property
    def end(self) -> int:
        return self.offset + self.length


class Wanted(NamedTuple):
    """What a request wants from the connector: the items that can't be encoded here."""

    request_id: str
    items: tuple[Item, ...]


@dataclass
class TrackedRequest:
    """A request of vLLM's, from when its scheduler first looks at it until it is finished."""

    request_id: str
    items: tuple[Item, ...]
    """In the order of their offsets."""
    end: int
    """Index of the first prompt token after all items."""
    refusal: str | None
    """Why the request can never run: an item has a name that is not an identifier, or an embedding that is too large."""
    is_new: bool = True
    """Whether the connector has yet to be told what it wants."""
    stop: int | None = None
    """Index of the item before which prefill has to stop in the step that is being scheduled."""
    waiting_since: float | None = None
    """When the request was first deferred for the item that it still waits for."""
    missing: str = ""
    """The identifier of that item."""
    rejected: set[str] = field(default_factory=set)
    """Identifiers of entries that didn't fit the request and were removed for that."""
    counted_on: dict[str, int] = field(default_factory=dict)
    """The last step in which the request used an embedding, by identifier."""

    @classmethod
    def of(cls, request: Any, metadata_fields: MetadataFields) -> TrackedRequest:
        """Return the record of a vLLM ``Request``."""
        items = tuple(_item(feature, metadata_fields) for feature in request.mm_features)
        end = max((item.end for item in items), default=0)
        return cls(request.request_id, items, end, _refusal(item.identifier for item in items))

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.request_id, tuple(item for item in self.items if not item.has_pixels))

    def item(self, identifier: str) -> Item | None:
        """Return the first item of this name."""
        return next((item for item in self.items if item.identifier == identifier), None)

    def missing_item(self, *, is_ahead: bool) -> Item | None:
        """Return the first item that keeps the request from going on; ``is_ahead`` if it has run up to the item."""
        if self.waiting_since is not None:
            return self.item(self.missing)
        return self.items[self.stop] if is_ahead and self.stop is not None else None

    def between(self, begin: int, end: int) -> Iterator[tuple[int, Item]]:
        """Return the items that reach into these prompt tokens, with their indices."""
        return ((index, item) for index, item in enumerate(self.items) if item.end > begin and item.offset < end)


def _item(feature: Any, metadata_fields: MetadataFields) -> Item:
    position, data = feature.mm_position, feature.data
    has_pixels = data is not None and bool(set(data) - set(metadata_fields(feature.modality)))
    return Item(feature.identifier, position.offset, position.length, position.get_num_embeds(), has_pixels)


def _refusal(identifiers: Iterable[str]) -> str | None:
    for identifier in identifiers:
        try:
            check_identifier(identifier)
        except InvalidRequestError as error:
            return error.message
    return None


# ---- items -------------------------------------------------------------------------------------------------------------


class Content(enum.Enum):
    """What the workers really have for an item that vLLM believes to be in their encoder cache."""

    EMBEDDING = enum.auto()
    ZEROS = enum.auto()
    """It could not be loaded: zeros took its place."""
    NOTHING = enum.auto()
    """It is published, and this instance, which only encodes, did not load it."""


@dataclass
class ItemState:
    """What is known about one identifier.

    In a step it goes from top to bottom through the fields: the connector promises it, vLLM is asked to load it (or else
    encodes it), and once vLLM has made room, the workers are expected to have it. At the end of the step all of this is
    forgotten, and the state is kept only if the content is not the embedding. ``Content`` then returns to EMBEDDING when the
    last request that uses the item has released it (vLLM forgets the item) or when it is loaded or encoded again.
    """

    promised: tuple[int, int] | None = None
    """Shape of the entry that the connector keeps loadable until the step's end; the one that is needed if it can't tell."""
    has_failed: bool = False
    """Whether the connector has failed when it was asked for the item; it is not asked again in this step."""
    is_loaded: bool = False
    """Whether vLLM loads it, rather than encodes it."""
    expected: tuple[int, int] | None = None
    """Shape that the workers must have after the step."""
    is_republished: bool = False
    """Whether the workers publish it again, since consumers don't find it any more."""
    content: Content = Content.EMBEDDING


class SpoiledItems:
    """Items for which vLLM's prefix cache may hold blocks that were computed from zeros.

    Nothing reads such blocks, so vLLM reuses them in the order in which they became free: when it has computed as many tokens
    as the KV cache holds, none is left, and the items are forgotten. That also bounds their number.
    """

    def __init__(self, kv_cache_tokens: int) -> None:
        self._kv_cache_tokens = kv_cache_tokens
        self._computed_tokens = 0
        self._spoiled_at: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._spoiled_at)

    def __contains__(self, identifier: str) -> bool:
        return identifier in self._spoiled_at

    def add(self, identifier: str) -> None:
        """Remember an item that could not be loaded."""
        self._spoiled_at.pop(identifier, None)
        self._spoiled_at[identifier] = self._computed_tokens

    def advance(self, num_tokens: int) -> None:
        """Count the tokens of a step, and forget the items whose blocks must have been reused by now."""
        self._computed_tokens += num_tokens
        while self._spoiled_at:
            identifier, at = next(iter(self._spoiled_at.items()))  # the oldest
            if self._computed_tokens - at < self._kv_cache_tokens:
                break
            del self._spoiled_at[identifier]


# ---- entries -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What a model's entries look like: ``[rows, width]``, one row for each placeholder, DeepStack levels side by side.

    Audio has no levels; its rows have ``hidden`` values. An entry that doesn't fit would stop vLLM's engine inside the model,
    so what the connector says about it is checked before anything is promised.
    """

    hidden: int
    levels: int
    """Number of DeepStack levels."""
    dtype: str
    """The model's, by torch's name (``bfloat16``)."""

    @property
    def width(self) -> int:
        return self.hidden * (1 + self.levels)

    def num_bytes(self, rows: int, *, has_levels: bool = True) -> int:
        """Return the size of an entry."""
        width = self.width if has_levels else self.hidden
        return rows * width * int(getattr(torch, self.dtype).itemsize)

    @classmethod
    def of(cls, model_config: Any) -> Layout:
        """Return the layout for a vLLM ``ModelConfig``."""
        vision = getattr(model_config.hf_config, "vision_config", None)
        levels = getattr(vision, "deepstack_visual_indexes", None) or ()
        return cls(int(model_config.get_inputs_embeds_size()), len(levels), dtype_name(model_config))

    def misfit(self, shape: tuple[int, ...], dtype: torch.dtype, rows: int) -> str | None:
        """Return why an entry cannot stand for ``rows`` placeholders of this model, or None if it can."""
        if len(shape) != 2 or shape[0] != rows:
            return f"its entry has shape {list(shape)}, but the prompt has {rows} placeholders for it"
        if shape[1] not in (self.width, self.hidden):
            return f"the rows of its entry have {shape[1]} values, but the model's have {self.width}"
        name = str(dtype).removeprefix("torch.")
        return None if name == self.dtype else f"its entry is {name}, but the model is {self.dtype}"
