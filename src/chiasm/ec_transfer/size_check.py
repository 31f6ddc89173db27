"""Refuses requests for embeddings that can never be brought in; otherwise they would be encoded again and again in vain."""

from __future__ import annotations

from chiasm.errors import Code, InvalidRequestError


def check_received_size(num_bytes: int, max_received_bytes: int | None) -> None:
    """Raise InvalidRequestError for an embedding of more than ``ECConnector.max_received_bytes``."""
    if max_received_bytes is not None and num_bytes > max_received_bytes:
        raise InvalidRequestError(
            f"The embedding of an image takes {num_bytes} bytes, but this instance can receive none of more than "
            f"{max_received_bytes} bytes. Send a smaller image, or raise receive_bytes (--ec-receive-bytes) of the "
            "instance's connector.",
            param="messages",
            code=Code.EMBEDDING_TOO_LARGE,
        )
