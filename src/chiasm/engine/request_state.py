"""A request while the engine's thread works on it: its choices, where its time goes, and who waits for its outputs."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from chiasm.due import BEFORE_ALL_NEW, due
from chiasm.engine.block_manager import BlockHasher
from chiasm.engine.outputs import Choice
from chiasm.engine.pace import prompt_work
from chiasm.engine.request import GenerateRequest, ItemTiming, Output, RequestTiming, Stall
from chiasm.engine.sequence import Sequence
from chiasm.errors import ChiasmError, Code, DeadlineExceededError, EmbeddingUnavailableError
from chiasm.models.base import Processor

logger = logging.getLogger(__name__)

_STALLS_KEPT = 16


@dataclass(eq=False)
class RequestState:
    """One request. ``loop`` and ``outputs`` belong to the coroutine that waits for its outputs."""

    request: GenerateRequest
    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[Output | BaseException]
    arrived: float
    hasher: BlockHasher
    """Has hashed the tokens that came with the request, once for all choices and not on the engine's thread."""
    choices: list[Choice] = field(default_factory=list)
    timing: RequestTiming = field(default_factory=RequestTiming)
    missing: dict[str, ItemTiming] = field(default_factory=dict)
    """Items that count neither as hit nor as waited for yet, by identifier."""
    rejected: set[str] = field(default_factory=set)
    """Identifiers of embeddings that had another shape than the request needs, and were removed for that."""
    first_scheduled: float | None = None
    load_started: float | None = None
    handed_over: bool = False
    """Whether its blocks were left for a decode instance."""
    stalled_since: float | None = None
    waited_before_start: float = 0.0

    def make_choices(
        self,
        arrivals: Iterator[int],
        *,
        processor: Processor,
        block_size: int,
        max_model_len: int,
        seconds_per_token: float,
    ) -> None:
        """Make the request's choices and their sequences.

        ``arrivals`` numbers all sequences of the engine; ``seconds_per_token`` is what a prompt token costs it now.
        """
        request, params = self.request, self.request.kv_transfer_params
        seed = request.sampling.seed if params is None or params.seed is None else params.seed
        if seed is None:
            seed = secrets.randbits(62)
        resumed = params is not None and params.num_sent > 1
        work_tokens = request.work_tokens or prompt_work(request.prompt)
        due_at = BEFORE_ALL_NEW if resumed else due(self.arrived, work_tokens * seconds_per_token)
        for index in range(request.num_choices):
            sequence = Sequence(
                request_id=request.request_id,
                index=index,
                arrival=next(arrivals),
                part_of=request.part_of,
                key=request.key,
                due=due_at,
                prompt=request.prompt,
                sampling=request.sampling,
                seed=seed + index,
                block_size=block_size,
                cache_salt=request.cache_salt,
                hasher=self.hasher.copy(),
                leader=self.choices[0].sequence if self.choices else None,
                output_token_ids=() if params is None else params.output_token_ids,
            )
            choice = Choice(request, sequence, self.timing, processor=processor, max_model_len=max_model_len)
            self.choices.append(choice)

    @property
    def sequences(self) -> list[Sequence]:
        return [choice.sequence for choice in self.choices]

    @property
    def done(self) -> bool:
        return all(choice.done for choice in self.choices)

    def overdue_error(self, now: float) -> ChiasmError:
        """Return the error for a request whose deadline has passed."""
        seconds = now - self.arrived
        if self.stalled_since is None or self.request.pixels:
            return DeadlineExceededError(
                f"The request did not end within its deadline of {seconds:.1f} s.", code=Code.DEADLINE_EXCEEDED
            )
        missing = ", ".join(f"{identifier[:12]}…" for identifier in self.missing) or "evicted since"
        return EmbeddingUnavailableError(
            f"No embedding came within {seconds:.1f} s for {len(self.missing)} image(s) of the request ({missing}). "
            "Check that an encoder is alive and writes to the same store."
        )

    # ---- where its time goes ------------------------------------------------------------------------------------------

    def note_scheduled(self, now: float) -> None:
        """Note that a chunk of its prompt is in the step that begins."""
        if self.first_scheduled is None:
            self.first_scheduled = now
            self.timing.prefill_at = now - self.arrived
            self.timing.queue_seconds = now - self.arrived - self.waited_before_start

    def note_stalled(self, stalled: bool, now: float) -> None:
        """Note whether it waits for an embedding."""
        if stalled and self.stalled_since is None:
            self.stalled_since = now
        elif not stalled and self.stalled_since is not None:
            self.timing.wait_seconds += now - self.stalled_since
            if len(self.timing.stalls) < _STALLS_KEPT:
                self.timing.stalls.append(Stall(self.stalled_since - self.arrived, now - self.stalled_since))
            if self.first_scheduled is None:
                self.waited_before_start += now - self.stalled_since
            self.stalled_since = None

    def note_load_started(self, now: float) -> None:
        """Note that it has blocks for the KV that another instance holds."""
        if self.load_started is None:
            self.load_started = now
            self.timing.queue_seconds = now - self.arrived

    def note_loaded(self, now: float) -> None:
        """Note that the KV is in its blocks."""
        if self.load_started is not None and self.timing.kv_seconds is None:
            self.timing.kv_seconds = now - self.load_started

    def note_prefill(self, seconds: float) -> None:
        """Note what a step took for the rows of its prompt; what is computed again after the first token doesn't count."""
        if self.timing.first_token_seconds is None:
            self.timing.prefill_work_seconds += seconds

    def note_token(self, now: float) -> None:
        """Note that a token was sampled."""
        timing = self.timing
        if timing.first_token_seconds is None:
            timing.first_token_seconds = now - self.arrived
            if self.first_scheduled is not None:
                waited_since_start = timing.wait_seconds - self.waited_before_start
                timing.prefill_seconds = now - self.first_scheduled - waited_since_start - timing.transfer_seconds


def hash_tokens(request: GenerateRequest, block_size: int) -> BlockHasher:
    """Hash the tokens that come with a request. It takes a millisecond for four thousand of them."""
    params = request.kv_transfer_params
    token_ids = [*request.prompt.token_ids, *(() if params is None else params.output_token_ids)]
    hasher = BlockHasher(block_size, request.prompt.items, request.cache_salt)
    hasher.hashes(token_ids)
    if params is not None:  # a prefill instance leaves all of them, and a decode instance gets those of the handle
        hasher.digest(token_ids[: params.num_tokens or None])
    return hasher


def deliver(outputs: Iterable[tuple[RequestState, Output | BaseException]]) -> None:
    """Pass outputs and errors to the coroutines that wait for them, waking each event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[RequestState, Output | BaseException]]] = {}
    for state, output in outputs:
        by_loop.setdefault(state.loop, []).append((state, output))
    for loop, batch in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, batch)
        except RuntimeError:
            logger.debug("An event loop was closed before its outputs came.")


def _put(batch: list[tuple[RequestState, Output | BaseException]]) -> None:
    for state, output in batch:
        state.outputs.put_nowait(output)
