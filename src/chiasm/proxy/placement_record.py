"""The record of one decision of placement: what was estimated, and what came of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from chiasm.http.timing import TimingEntry
from chiasm.proxy.job import Job
from chiasm.proxy.metrics import Metrics
from chiasm.proxy.placement import Placed, Placement

_log = logging.getLogger(__name__)
_LONGEST_ESTIMATE_SECONDS = 3600.0


class PlacementRecord:
    """One request at one language instance."""

    def __init__(self, placement: Placement, metrics: Metrics, job: Job, placed: Placed, now: float) -> None:
        """``now`` is the time of the decision."""
        self._placement = placement
        self._metrics = metrics
        self._job = job
        self._placed = placed
        self._decided_at = now
        job.instance, job.due = placed.instance, placed.prompt.due
        job.timing.placement = f"{placed.instance.role} {placed.instance.number}"
        known = placed.estimate_seconds < _LONGEST_ESTIMATE_SECONDS
        job.timing.estimate = placed.estimate_seconds if known else None

    def embedded(self) -> None:
        """Note that all embeddings of the request have been published."""
        placed = self._placed
        self._placement.embedded(placed)
        for item, estimate in zip(placed.prompt.work.items, placed.ready_seconds, strict=False):
            published_at = self._job.published_at.get(item.identifier)
            if published_at is not None and 0 < estimate < _LONGEST_ESTIMATE_SECONDS:
                self._metrics.estimate_ratio_of("embedding").observe((published_at - self._decided_at) / estimate)

    def note_answer(self, entries: Sequence[TimingEntry], *, is_whole: bool, is_understood: bool = True) -> None:
        """Note that the first token has come, and learn from what the instance reports.

        Of an answer that isn't ``is_understood``, only what the instance tells of a prompt counts.
        """
        now = time.monotonic()
        told = {one.name: one for one in reversed(entries)}
        if not is_understood and "prompt_tokens" not in told:
            self._placement.first_token(self._placed, now)
            return
        seconds = _duration(told, "ttft") if is_whole else now - self._decided_at
        self._placement.first_token(
            self._placed,
            now,
            seconds=seconds,
            prefill_seconds=_duration(told, "prefill"),
            work_seconds=_duration(told, "prefill_work"),
            prompt_tokens=_count(told, "prompt_tokens"),
            cached_tokens=_count(told, "cached_tokens") or 0,
        )
        self._learn_transfers(entries)
        estimate = self._job.timing.estimate
        if seconds is None or not estimate:
            return
        self._metrics.estimate_ratio_of("first_token").observe(seconds / estimate)
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug(
                "%s: %s, first token after %.0f ms, estimated %.0f ms",
                self._job.exchange.request_id,
                self._job.timing.placement,
                seconds * 1000,
                estimate * 1000,
            )

    def end(self) -> None:
        """Note that the answer has ended, or was given up."""
        self._placement.end(self._placed, time.monotonic())

    def _learn_transfers(self, entries: Sequence[TimingEntry]) -> None:
        """Learn how long after the encoders' answers the instance had the embeddings that it waited for."""
        waits = {one.name: one.seconds for one in entries if one.description == "waited" and one.seconds is not None}
        for index, name in enumerate(self._job.identifiers if waits else ()):
            wait, published_at = waits.get(f"item{index}"), self._job.published_at.get(name)
            if wait is not None and published_at is not None:
                self._placed.instance.costs.learn_transfer(max(0.0, self._decided_at + wait - published_at))


def _duration(told: Mapping[str, TimingEntry], name: str) -> float | None:
    return told[name].seconds if name in told else None


def _count(told: Mapping[str, TimingEntry], name: str) -> int | None:
    text = told[name].description if name in told else ""
    return int(text) if text.isdecimal() and len(text) < 10 else None
