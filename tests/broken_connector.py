"""Connectors that raise errors, and what is logged of that."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from chiasm.ec_transfer import ECConnector
from chiasm.kv_transfer import KVConnector


def break_for(
    patch: pytest.MonkeyPatch,
    connector: ECConnector | KVConnector,
    identifier: str,
    method: str,
    identifiers_in: Callable[[object], set[str]],
) -> None:
    """Have each call of ``method`` for this item or request raise an error: also one for several of them.

    ``identifiers_in`` returns what something is about that is given to the connector or returned by it.
    """
    whole = getattr(connector, method)

    def broken(*given: Any) -> Any:
        bound = getattr(connector, "_metadata", None)
        if any(identifier in identifiers_in(each) for each in (*given, bound)):
            raise OSError("the connector is broken")
        result = whole(*given)
        if identifier in identifiers_in(result):
            raise OSError("the connector is broken")
        return result

    patch.setattr(connector, method, broken)


def faults(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the errors that were logged."""
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
