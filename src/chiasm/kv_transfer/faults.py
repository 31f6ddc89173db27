"""What it costs when a connector raises an error that it shouldn't: the KV of the request that it was called for."""

from __future__ import annotations

from chiasm.errors import Code, KVUnavailableError

SETTLE_SECONDS = 30.0
"""How long a connector may still write to the blocks of a load on which it has failed, after its request was dropped."""


def lost_kv(error: Exception) -> KVUnavailableError:
    """Return the error of a request for which the connector has raised one."""
    return KVUnavailableError(
        f"The KV connector failed: {type(error).__name__}. Have the prompt prefilled again.", code=Code.KV_UNAVAILABLE
    )
