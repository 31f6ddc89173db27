"""How lines of a log look: for people, or as one JSON object each. A line that a request causes has the request's id."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextvars import ContextVar

import msgspec

TEXT, JSON = LOG_FORMATS = ("text", "json")
request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request at hand."""
_FIELDS = "chiasm_fields"


def fields(values: Mapping[str, object]) -> dict[str, object]:
    """Return the ``extra`` of a log record whose message says these values in words: in JSON they are members instead."""
    return {_FIELDS: values}


class TextFormatter(logging.Formatter):
    """Time, level, logger and message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(of_request)s%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        own = request_id.get()
        record.of_request = f"id={own} " if own and not hasattr(record, _FIELDS) else ""
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, ``logger``, ``message``, ``id`` of a request, and its values."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{second}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        values: Mapping[str, object] | None = getattr(record, _FIELDS, None)
        if values is not None:
            line.update(values)
        else:
            line["message"] = record.getMessage()
            if own := request_id.get():
                line["id"] = own
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def formatter(name: str) -> logging.Formatter:
    """Return the formatter of ``LOG_FORMATS`` with this name."""
    return JsonFormatter() if name == JSON else TextFormatter()
