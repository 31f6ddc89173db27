"""The thread of an engine with a language model: it plans a step, runs it, and sends what it sampled."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

from chiasm.cores import lower_priority
from chiasm.ec_transfer.faults import connector_error
from chiasm.engine.device import use_threads
from chiasm.engine.fluency import Fluency
from chiasm.engine.inbox import Abort, Arrival, GiveBack, Inbox, Question, Signal
from chiasm.engine.local_encoder import HIGH_PRIORITY, on_stream
from chiasm.engine.pace import Pace
from chiasm.engine.request import ItemOutcome, Output
from chiasm.engine.request_state import RequestState, deliver
from chiasm.engine.sampler import Sampled
from chiasm.engine.step_faults import run_step
from chiasm.errors import ChiasmError, Code, InvalidRequestError, KVUnavailableError
from chiasm.wire import Role

if TYPE_CHECKING:
    import torch

    from chiasm.engine.config import EngineConfig
    from chiasm.engine.core_sharing import Worker
    from chiasm.engine.embeddings import Embeddings
    from chiasm.engine.kv_transfers import KVTransfers
    from chiasm.engine.model_runner import ModelRunner
    from chiasm.engine.scheduler import Scheduler
    from chiasm.engine.step import Step
    from chiasm.models.base import Processor
    from chiasm.wire import Costs

logger = logging.getLogger(__name__)

DEADLINE_CHECK_SECONDS = 0.02


class StepLoop:
    """What runs on the engine's thread: all of a request but its parsing, its hashing and the queue of its outputs.

    It is told through the inbox what to do. Only ``run`` is called, on the thread that it then is; other threads may read the
    counters and :meth:`unfinished_seconds`.
    """

    def __init__(
        self,
        config: EngineConfig,
        inbox: Inbox,
        *,
        processor: Processor,
        max_model_len: int,
        device: torch.device,
        costs: Costs,
        scheduler: Scheduler,
        embeddings: Embeddings,
        kv_transfers: KVTransfers | None,
        runner: ModelRunner,
        worker: Worker,
    ) -> None:
        """``kv_transfers`` are those of a prefill or decode engine; ``worker`` is the thread's part of the cores."""
        self.states: dict[str, RequestState] = {}
        """The requests that are here, by id."""
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self._config = config
        self._inbox = inbox
        self._processor = processor
        self._max_model_len = max_model_len
        self._device = device
        self._costs = costs
        self._scheduler = scheduler
        self._embeddings = embeddings
        self._kv_transfers = kv_transfers
        self._runner = runner
        self._worker = worker
        self._pace = Pace(costs.prefill_seconds_per_token)
        self._fluency = Fluency(device.type, costs)
        self._questions: list[Question] = []
        self._arrivals = itertools.count()
        self._next_deadline_check = 0.0
        self._stalls_measured_at = self._told_at = -1
        self._decode_seconds, self._decoded_at = 0.0, -math.inf
        """How long the last step that only decoded took, and when it ended."""

    def unfinished_seconds(self) -> float:
        """Return about how long the prompts take that are not computed, of a CPU on one core. Any thread."""
        sequences = [one for state in list(self.states.values()) for one in state.sequences]
        tokens = sum(max(0, one.num_prompt - one.num_computed) for one in sequences if not one.finished)
        return tokens * self._pace.seconds_per_token

    def run(self) -> None:
        """Run steps until the inbox says that the engine stops; then end the requests that run with an error."""
        lower_priority(self._config.nice)
        use_threads(self._config.threads)
        # Only where this process encodes too: the threads that move KV rely on the default stream.
        encodes = self._config.role is Role.AGGREGATED
        try:
            with on_stream(self._device, HIGH_PRIORITY) if encodes else nullcontext():
                self._serve()
        finally:
            self._worker.rest()
            self._fail_all(list(self.states.values()), "The engine of this instance stopped while the request ran.")
            self._answer_questions()

    def _serve(self) -> None:
        """Run steps until the engine has to stop."""
        idle = True
        while True:
            try:
                if not self._take_inbox(wait=idle):
                    return
                self._check_deadlines()
                self._collect_transfers()
                for state, failure in self._embeddings.update(self.states):
                    self._fail(state, failure)
                self._embeddings.encode(self.states)
                self._answer_questions()
                self._measure_stalls()
                idle = not self._step()
            except Exception as error:
                # An error that is not handled where it occurs costs the requests that are here, not the instance.
                logger.exception("The engine's thread failed; its %d requests fail with it.", len(self.states))
                self._fail_all(list(self.states.values()), f"The engine failed: {type(error).__name__}.")
                self._embeddings.forget_unfilled()
                idle = True

    def _take_inbox(self, *, wait: bool) -> bool:
        """Handle some of the inbox; with ``wait``, sleep until a message comes, a request is overdue, or a lost item is wanted.

        Return False if the engine has to stop.
        """
        if wait:
            self._worker.rest()
        for message in self._inbox.take(self._idle_seconds() if wait else 0.0):
            match message:
                case Signal.STOP:
                    return False
                case Abort(request_id) if request_id in self.states:
                    self._forget(self.states[request_id])
                case Signal.ITEM:
                    self._embeddings.look_again()
                case Arrival(identifier):
                    self._embeddings.look_again(identifier)
                case Question():
                    self._questions.append(message)
                case GiveBack(leases) if self._kv_transfers is not None:
                    self._kv_transfers.give_back(leases)
                case RequestState():
                    self._add(message)
        return True

    def _idle_seconds(self) -> float | None:
        """Return how long there is nothing to do if no message comes; None if there is no end to it."""
        deadlines = [state.request.deadline for state in self.states.values()]
        to_check = max(min(deadlines), self._next_deadline_check) - time.monotonic() if deadlines else None
        if self._kv_transfers is not None and (to_check is not None or self._kv_transfers.is_unsettled):
            # KV connectors may wake the engine, but need not.
            to_check = DEADLINE_CHECK_SECONDS if to_check is None else min(to_check, DEADLINE_CHECK_SECONDS)
        ends = [seconds for seconds in (to_check, self._embeddings.seconds_to_update) if seconds is not None]
        return max(0.0, min(ends)) if ends else None

    def _add(self, state: RequestState) -> None:
        request, params = state.request, state.request.kv_transfer_params
        try:
            state.make_choices(
                self._arrivals,
                processor=self._processor,
                block_size=self._config.block_size,
                max_model_len=self._max_model_len,
                seconds_per_token=self._pace.seconds_per_token,
            )
            if self._config.role is Role.DECODE:
                assert self._kv_transfers is not None
                self._kv_transfers.admit(state)
            self._scheduler.add(state.sequences)
        except Exception as error:
            if self._kv_transfers is not None:
                self._kv_transfers.drop(request)
            if not isinstance(error, ChiasmError):
                logger.exception("A request can't be queued, and fails.")
                error = ChiasmError(f"The engine failed on this request: {type(error).__name__}.")
            deliver([(state, error)])
            return
        self.states[request.request_id] = state
        if self._config.role is not Role.DECODE:
            self.prompt_tokens += len(request.prompt.token_ids)
            try:
                self._embeddings.admit(state)
            except Exception as error:
                logger.exception("The EC connector failed on a request, which fails with it.")
                self._fail(state, connector_error(error))
                return
        if params is not None and params.output_token_ids:
            outputs = state.choices[0].resume()
            deliver((state, output) for output in outputs)
            if outputs[-1].finish_reason is not None:
                self._forget(state)

    def _answer_questions(self) -> None:
        """Say what is wanted and not in memory: to whom has asked, and if it may have changed to who waits for losses."""
        losses, changes = self._embeddings.losses, self._scheduler.items.changes
        if not self._questions and not (losses.is_asked and changes != self._told_at):
            return
        self._told_at = changes
        questions, self._questions = self._questions, []
        missing = self._embeddings.missing()
        losses.note_missing(missing)
        for loop, answer in questions:
            with suppress(RuntimeError):  # the event loop was closed
                loop.call_soon_threadsafe(_settle, answer, missing)

    def _collect_transfers(self) -> None:
        """See which KV transfers have ended."""
        if self._kv_transfers is not None:
            for state, error in self._kv_transfers.collect(self.states):
                self._fail(state, error)

    def _measure_stalls(self) -> None:
        if self._stalls_measured_at == self._scheduler.items.changes:
            return
        self._stalls_measured_at = self._scheduler.items.changes
        now = time.monotonic()
        for state in self.states.values():
            if state.timing.items and state.timing.first_token_seconds is None:
                state.note_stalled(self._scheduler.items.is_stalled(state.sequences[0]), now)

    # ---- a step -------------------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Plan a step, run it, and send what it sampled. Return False if there was nothing to run."""
        step = self._scheduler.schedule(self._fluency.prefill_rows(time.monotonic()))
        self._embeddings.drop_evicted()
        self._start_loads(step)
        if not step.scheduled:
            return bool(step.preempted or step.put_back)
        self._fail_in(step, self._embeddings.unusable(step, self.states))
        self._note_scheduled(step)
        if not step.scheduled:
            return True
        started = time.monotonic()
        result = run_step(self._execute, step)
        ended = time.monotonic()
        if step.prefills:
            self._pace.note(step.num_rows, ended - started)
            for name, seconds in self._fluency.prompt_seconds(step, ended - started).items():
                self.states[name].note_prefill(seconds)
        else:
            self._decode_seconds, self._decoded_at = ended - started, ended
        self._fail_in(step, [(self.states[part.sequence.request_id], error) for part, error in result.failed])
        self._scheduler.complete(step, {name: token.token_id for name, token in result.sampled.items()})
        self._send(step, result.sampled)
        self._fluency.note(step, ended - started, ended)
        return True

    def _execute(self, step: Step) -> dict[str, Sampled]:
        with self._worker.computing(self._seconds_of(step), steady=bool(step.decodes)):
            return self._runner.execute(step, self._embeddings.entries)

    def _seconds_of(self, step: Step) -> float:
        """Return about what the step takes on one core."""
        rows = step.num_rows * self._costs.prefill_seconds_per_token
        return max(rows, self._costs.decode_step_seconds) if rows else math.inf

    def _start_loads(self, step: Step) -> None:
        """Have the blocks filled that the step gave to sequences whose KV is elsewhere (decode role)."""
        if self._kv_transfers is None:
            return
        self._fail_in(step, self._kv_transfers.move_aside(step, self.states))
        self._fail_in(step, self._kv_transfers.load(step, self.states))

    def _note_scheduled(self, step: Step) -> None:
        now = time.monotonic()
        for part in step.prefills:
            state = self.states[part.sequence.request_id]
            if state.missing:
                for item in part.sequence.items_between(part.start, part.end):
                    self._embeddings.note(state, item.identifier, ItemOutcome.WAITED)
            state.note_scheduled(now)

    def _send(self, step: Step, sampled: dict[str, Sampled]) -> None:
        """Make outputs of the new tokens, end the choices that end with them, and deliver all outputs at once."""
        outputs: list[tuple[RequestState, Output]] = []
        now = time.monotonic()
        for part in step.scheduled:
            if not part.samples:
                continue
            state = self.states.get(part.sequence.request_id)
            if state is None:
                continue  # another of its choices has just failed
            token = sampled[part.sequence.sequence_id]
            if token.failure is not None:
                self._fail(state, InvalidRequestError(token.failure, code=Code.INVALID_GRAMMAR))
                continue
            choice = state.choices[part.sequence.index]
            self.generation_tokens += 1
            state.note_token(now)
            if self._decoded_at >= state.arrived:
                state.timing.step_seconds = self._decode_seconds
            output = choice.output(token)
            if self._config.role is Role.PREFILL:
                assert self._kv_transfers is not None
                try:
                    output = self._kv_transfers.hand_over(state, choice.sequence, output)
                except KVUnavailableError as error:
                    self._fail(state, error)
                    continue
            outputs.append((state, output))
            if output.finish_reason is not None:
                choice.done = True
                self._scheduler.finish(part.sequence)
                if state.done:
                    self._forget(state)
        deliver(outputs)

    # ---- ends ---------------------------------------------------------------------------------------------------------

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        if now >= self._next_deadline_check:
            self._next_deadline_check = now + DEADLINE_CHECK_SECONDS
            for state in [state for state in self.states.values() if state.request.deadline <= now]:
                self._fail(state, state.overdue_error(now))

    def _fail_all(self, states: Iterable[RequestState], message: str) -> None:
        for state in states:
            self._fail(state, ChiasmError(message))

    def _fail_in(self, step: Step, failures: Iterable[tuple[RequestState, ChiasmError]]) -> None:
        """Fail these requests and take them out of the step, which continues without them."""
        for state, error in failures:
            self._fail(state, error)
        step.drop_finished()

    def _fail(self, state: RequestState, error: ChiasmError) -> None:
        """End a request with an error, unless it has ended already."""
        if self.states.get(state.request.request_id) is state:
            for identifier in list(state.missing):
                self._embeddings.note(state, identifier, ItemOutcome.MISSED)
            self._forget(state)
            deliver([(state, error)])

    def _forget(self, state: RequestState) -> None:
        """Free all that a request holds, however it ended."""
        request_id = state.request.request_id
        for sequence in state.sequences:
            self._scheduler.finish(sequence)
        del self.states[request_id]
        self._embeddings.forget(state)
        if self._kv_transfers is not None and not state.handed_over:
            self._kv_transfers.drop(state.request)
        self._runner.forget(request_id)


def _settle(answer: asyncio.Future[list[str]], missing: list[str]) -> None:
    if not answer.done():
        answer.set_result(missing)
