"""What it costs when a connector raises an error that it shouldn't: the items that it was called for, and no others.

Engines call connectors through these functions, or catch what they raise, where one call could affect other requests.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from chiasm.connectors.faults import logged
from chiasm.ec_transfer.base import ECConnector
from chiasm.errors import ChiasmError
from chiasm.wire import ECPlace


def connector_error(error: Exception) -> ChiasmError:
    """Return the error of a request for which the connector has raised one."""
    return ChiasmError(f"The EC connector failed: {type(error).__name__}.")


def not_coming(connector: ECConnector, identifiers: Iterable[str]) -> list[str]:
    """Return those of the wanted entries that the connector neither has nor is about to get, as far as it can tell.

    What it can't tell counts as not coming, so that it is encoded again and doesn't leave its requests waiting.
    """
    awaited: list[str] = []
    for identifier in identifiers:
        is_coming = False
        with logged(connector, f"tell whether the embedding of item {identifier} is coming"):
            is_coming = connector.is_coming(identifier)
        if not is_coming:
            awaited.append(identifier)
    return awaited


def expect(connector: ECConnector, places: Mapping[str, ECPlace], stored: Collection[str]) -> None:
    """Tell the connector where embeddings are or will be: all at once or, if it fails on some, one by one."""
    try:
        connector.expect(places, stored)
    except Exception:
        for identifier, place in places.items():
            with logged(connector, f"note where the embedding of item {identifier} is"):
                connector.expect({identifier: place}, ())
        for identifier in stored:
            with logged(connector, f"note that the embedding of item {identifier} is stored"):
                connector.expect({}, (identifier,))
