"""Where a request's time went, as a ``Server-Timing`` header. Durations are milliseconds there, seconds everywhere else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chiasm.engine.request import EncodedItem, RequestTiming


@dataclass
class ServerTiming:
    """What the server itself measures of a request. Instants are ``time.monotonic()``; None: it did not happen (yet)."""

    arrival: float = field(default_factory=time.monotonic)
    fetch_seconds: float | None = None
    """Getting the bytes of all images."""
    preprocess_seconds: float | None = None
    """Decoding and preprocessing them."""
    first_output: float | None = None

    def header(self, engine: RequestTiming | None, *, ended: bool = False) -> str:
        """As far as known; complete, with ``total``, when the request has ended."""
        entries = [_entry("fetch", self.fetch_seconds), _entry("preprocess", self.preprocess_seconds)]
        if engine is not None:
            entries += [
                _entry("queue", engine.queue_seconds),
                _entry("wait", engine.wait_seconds),
                _entry("transfer", engine.transfer_seconds),
                _entry("kv", engine.kv_seconds),
                _entry("encode", engine.encode_seconds or None),
                _entry("prefill", engine.prefill_seconds),
            ]
        if self.first_output is not None:
            entries.append(_entry("ttft", self.first_output - self.arrival))
        if ended:
            entries.append(_entry("total", time.monotonic() - self.arrival))
        if engine is not None:
            entries += [
                _entry(f"item{index}", item.wait_seconds, item.outcome) for index, item in enumerate(engine.items)
            ]
        return ", ".join(entry for entry in entries if entry)

    def encoder_header(self, items: Sequence[EncodedItem]) -> str:
        """Of an encoder's answer; ``items`` in the order of the request's parts, one may occur twice."""
        distinct = {item.identifier: item for item in items}.values()
        entries = [
            _entry("fetch", self.fetch_seconds),
            _entry("queue", max((item.queue_seconds for item in distinct), default=0.0)),
            _entry("preprocess", sum(item.preprocess_seconds for item in distinct)),
            _entry("encode", sum(item.encode_seconds for item in distinct)),
            _entry("publish", sum(item.publish_seconds for item in distinct)),
            _entry("total", time.monotonic() - self.arrival),
        ]
        entries += [
            _entry(
                f"item{index}",
                item.queue_seconds + item.preprocess_seconds + item.encode_seconds + item.publish_seconds,
                item.outcome,
            )
            for index, item in enumerate(items)
        ]
        return ", ".join(entry for entry in entries if entry)


def _entry(name: str, seconds: float | None, description: str | None = None) -> str:
    if seconds is None:
        return ""
    quoted = f';desc="{description}"' if description else ""
    return f"{name}{quoted};dur={seconds * 1000:.3f}"
