"""The vision tower of an aggregated engine: it encodes beside the engine's steps, in a thread of its own that gives way.

To the engine's thread, an embedding made here is late like one that comes from an encoder instance: prompts are prefilled up
to it, and continue when it is there. So running streams don't wait for images.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chiasm.cores import ENCODER_NICE, lower_priority
from chiasm.engine.calibration import encode_seconds
from chiasm.models.base import Pixels, VisionModel

if TYPE_CHECKING:
    from chiasm.engine.core_sharing import Worker
    from chiasm.wire import Costs

logger = logging.getLogger(__name__)

MAX_FINISHED = 8
"""Maximum entries that wait for room in the encoder cache."""
LOW_PRIORITY, HIGH_PRIORITY = 0, -1
"""Priorities of CUDA streams: kernels of the engine's steps go before those that encode."""


@dataclass(frozen=True)
class Encoded:
    """What came of an item: its entry ``[rows, entry_width]``, empty if there was an error."""

    entry: Tensor
    seconds: float
    error: Exception | None = None


class LocalEncoder:
    """Encodes the items that the engine wants, one by one, the first first.

    A finished entry waits here until the engine takes it into its encoder cache, or doesn't want it any more.
    """

    def __init__(self, vision: VisionModel, worker: Worker, notify: Callable[[], None]) -> None:
        """``worker`` says how many cores the thread computes on. ``notify`` is called in the thread after each item."""
        self._vision = vision
        self._worker = worker
        self._worker.follow(vision.module)
        self._notify = notify
        self._changed = threading.Condition()
        self._wanted: Mapping[str, Pixels] = {}
        self._encoded: dict[str, Encoded] = {}
        self._stopping = False
        self._costs: Costs | None = None
        self._thread = threading.Thread(target=self._run, name="chiasm-encode", daemon=True)

    def start(self, costs: Costs) -> None:
        """Start the thread; ``costs`` has those of images."""
        self._costs = costs
        self._thread.start()

    def encode(self, pixels: Pixels) -> Tensor:
        """Return the entry of an item. Called in the thread, and before ``start`` to measure what images cost."""
        entry = self._vision.encode(pixels)
        if entry.is_cuda:
            torch.cuda.current_stream(entry.device).synchronize()
        return entry

    def stop(self) -> None:
        """End the thread after the item that it encodes."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    # ---- the engine's side ----------------------------------------------------------------------------------------------

    def want(self, pixels: Mapping[str, Pixels]) -> None:
        """Encode these items, in this order, instead of those wanted so far. Entries of other items are dropped."""
        with self._changed:
            if list(pixels) == list(self._wanted):
                return
            self._wanted = pixels
            for identifier in self._encoded.keys() - pixels.keys():
                del self._encoded[identifier]
            self._changed.notify()

    def __contains__(self, identifier: str) -> bool:
        """Return whether the item is encoded, or failed. The thread may drop it right after, for one that is more urgent."""
        return identifier in self._encoded

    def take(self, identifier: str) -> Encoded | None:
        """Return what came of an item, and forget it; None if it has been dropped.

        The entry is usable on the caller's CUDA stream.
        """
        with self._changed:
            encoded = self._encoded.pop(identifier, None)
            if encoded is None:
                return None
            self._wanted = {name: pixels for name, pixels in self._wanted.items() if name != identifier}
            self._changed.notify()  # there may have been too many to go on
        if encoded.entry.is_cuda:
            # Its memory belongs to the stream that encodes, which must not use it again before the caller's is done with it.
            encoded.entry.record_stream(torch.cuda.current_stream(encoded.entry.device))
        return encoded

    # ---- the thread -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        lower_priority(ENCODER_NICE)
        with on_stream(self._vision.device, LOW_PRIORITY):
            while (item := self._next()) is not None:
                identifier, pixels = item
                encoded = self._result(pixels)
                with self._changed:
                    if identifier in self._wanted:
                        self._encoded[identifier] = encoded
                self._notify()

    def _next(self) -> tuple[str, Pixels] | None:
        """Wait for an item to encode; return None when the thread has to end."""
        with self._changed:
            while not self._stopping:
                item, dropped = choose(list(self._wanted), self._encoded.keys())
                if dropped is not None:
                    del self._encoded[dropped]
                if item is not None:
                    return item, self._wanted[item]
                self._worker.rest()
                self._changed.wait()
            return None

    def _result(self, pixels: Pixels) -> Encoded:
        started = time.monotonic()
        try:
            with self._worker.computing(encode_seconds(self._costs, len(pixels.geometry.rows))):
                entry = self.encode(pixels)
        except Exception as error:
            logger.exception("Encoding an image failed.")
            return Encoded(torch.empty(0), time.monotonic() - started, error)
        return Encoded(entry, time.monotonic() - started)


def choose(wanted: Sequence[str], finished: Set[str], limit: int = MAX_FINISHED) -> tuple[str | None, str | None]:
    """Return the item to encode next, and the finished one to drop to make place for it; None where there is none.

    ``wanted`` has all items in order, also the finished ones, of which at most ``limit`` are kept.
    """
    item = next((name for name in wanted if name not in finished), None)
    if item is None or len(finished) < limit:
        return item, None
    last = max(finished, key=wanted.index)
    return (item, last) if wanted.index(item) < wanted.index(last) else (None, None)


def on_stream(device: torch.device, priority: int) -> AbstractContextManager[object]:
    """Return a block whose kernels run on a CUDA stream of this priority, after those queued so far; on CPU, a plain block."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)
