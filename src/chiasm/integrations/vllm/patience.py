"""How vLLM's engine waits when everything that it could run waits for embeddings.

vLLM itself then goes round once a millisecond, through scheduler, workers and statistics, and takes most of a core for that.
Here it looks for the entries alone, twice a millisecond at first and less often the longer the wait has been, and goes on
at once when one has come or a client sends something.
"""

from __future__ import annotations

import functools
import logging
import queue
import time
from typing import Any

from vllm.v1.engine.core import EngineCoreProc

from chiasm.integrations.vllm.scheduler_half import SchedulerHalf

_logger = logging.getLogger(__name__)
_MAX_WAIT_SECONDS = 0.1
"""After which vLLM goes round once: its watchdog wants to see that it lives."""


@functools.cache
def install() -> None:
    """Make the engine of this process wait so; called where its scheduler is made, before it has run a step."""
    step = getattr(EngineCoreProc, "_process_engine_step", None)
    if step is None:
        _logger.warning("vLLM's engine keeps a core busy while requests wait for embeddings: it is not the one known")
        return

    @functools.wraps(step)
    def patient(engine: Any) -> Any:
        executed = step(engine)
        # Engines in lockstep wait for each other's steps.
        if not executed and type(engine) is EngineCoreProc:
            _wait(engine)
        return executed

    EngineCoreProc._process_engine_step = patient


def _wait(engine: Any) -> None:
    scheduler = engine.scheduler
    half = getattr(scheduler.get_ec_connector(), "half", None)
    has_work = engine.batch_queue or scheduler.has_finished_requests()
    if has_work or not isinstance(half, SchedulerHalf) or not half.num_deferred:
        return
    if half.num_deferred != sum(scheduler.get_request_counts()):
        return
    end = time.monotonic() + _MAX_WAIT_SECONDS
    while not half.has_news() and time.monotonic() < end and not _has_input(engine.input_queue, half.poll_seconds()):
        pass


def _has_input(inbox: queue.Queue[Any], timeout_seconds: float) -> bool:
    with inbox.not_empty:
        return bool(inbox.queue) or inbox.not_empty.wait(timeout_seconds)
