"""What engines do with an error of a connector that it shouldn't raise: they log it, and go on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from chiasm.connectors.factory import ConnectorConfig

_logger = logging.getLogger(__name__)


class Connector(Protocol):
    """The part of a connector, on either plane, that names it."""

    @property
    def plane(self) -> str:
        """``EC`` or ``KV``."""

    @property
    def config(self) -> ConnectorConfig: ...


def log_failure(connector: Connector, doing: str) -> None:
    """Log the error that is being handled: the connector has failed to do what ``doing`` says."""
    _logger.exception("The %s connector %s failed to %s.", connector.plane, connector.config.connector, doing)


@contextmanager
def logged(connector: Connector, doing: str) -> Iterator[None]:
    """A block that calls a connector. If that raises an error, log that it failed to do what ``doing`` says, and go on."""
    try:
        yield
    except Exception:
        log_failure(connector, doing)
