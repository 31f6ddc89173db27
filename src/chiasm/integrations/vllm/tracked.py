"""A request of vLLM's, as the scheduler half keeps it in mind."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from chiasm.ec_transfer import check_identifier
from chiasm.errors import InvalidRequestError

MetadataFields = Callable[[str], Collection[str]]
"""Of a modality: which of an item's fields say how many places it needs, and nothing of what fills them."""


@dataclass(frozen=True)
class TrackedItem:
    """One item of a request. ``rows`` counts its embeddings, ``length`` the prompt tokens from its first to its last.

    ``has_pixels`` says that vLLM could encode it here.
    """

    identifier: str
    offset: int
    length: int
    rows: int
    has_pixels: bool

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass
class TrackedRequest:
    """``items`` in the order of their places.

    ``stop`` is the index of the item that prefill may not reach in this step, if there is one. ``missing`` names the item
    that a deferred request waits for. ``counted_on`` says of an identifier in which step the request last made use of its
    embedding.
    """

    request_id: str
    items: tuple[TrackedItem, ...]
    end: int
    refusal: str | None
    stop: int | None = None
    deferred_since: float | None = None
    missing: str = ""
    counted_on: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, request: Any, metadata_fields: MetadataFields) -> TrackedRequest:
        """Of vLLM's ``Request``."""
        items = tuple(_item(feature, metadata_fields) for feature in request.mm_features)
        end = max((item.end for item in items), default=0)
        return cls(request.request_id, items, end, _refusal(item.identifier for item in items))

    def item(self, identifier: str) -> TrackedItem | None:
        return next((item for item in self.items if item.identifier == identifier), None)

    def between(self, begin: int, end: int) -> Iterator[tuple[int, TrackedItem]]:
        """The items that reach into these prompt tokens, with their indices."""
        return ((index, item) for index, item in enumerate(self.items) if item.end > begin and item.offset < end)


def _item(feature: Any, metadata_fields: MetadataFields) -> TrackedItem:
    position, data = feature.mm_position, feature.data
    has_pixels = data is not None and bool(set(data) - set(metadata_fields(feature.modality)))
    return TrackedItem(feature.identifier, position.offset, position.length, position.get_num_embeds(), has_pixels)


def _refusal(identifiers: Iterable[str]) -> str | None:
    for identifier in identifiers:
        try:
            check_identifier(identifier)
        except InvalidRequestError as error:
            return error.message
    return None
