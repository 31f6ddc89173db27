"""A request of vLLM's, as the scheduler half keeps it in mind."""

from __future__ import annotations

from collections.abc import Callable, Collection
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
    """``needed_at`` says of an identifier in which step the request last counted on it."""

    request_id: str
    items: tuple[TrackedItem, ...]
    end: int
    refusal: str | None
    deferred_since: float | None = None
    needed_at: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, request: Any, metadata_fields: MetadataFields) -> TrackedRequest:
        """Of vLLM's ``Request``."""
        items = tuple(_item(feature, metadata_fields) for feature in request.mm_features)
        refusal = None
        for item in items:
            try:
                check_identifier(item.identifier)
            except InvalidRequestError as error:
                refusal = error.message
        return cls(request.request_id, items, max((item.end for item in items), default=0), refusal)

    def item(self, identifier: str) -> TrackedItem | None:
        return next((item for item in self.items if item.identifier == identifier), None)


def _item(feature: Any, metadata_fields: MetadataFields) -> TrackedItem:
    position, data = feature.mm_position, feature.data
    has_pixels = data is not None and bool(set(data) - set(metadata_fields(feature.modality)))
    return TrackedItem(feature.identifier, position.offset, position.length, position.get_num_embeds(), has_pixels)
