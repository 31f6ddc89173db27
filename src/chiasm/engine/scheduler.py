"""Which tokens of which requests run in the next step.

A pure state machine: no clock, no I/O, no tensors. What happens outside comes in as events (``add``, ``item_arrived``,
``finish``), and ``schedule`` is a function of the state. Prefill is chunked under a token budget (Sarathi-Serve, Agrawal
et al. 2024), preemption is by recomputation (vLLM, Kwon et al. 2023). What is new here are late embeddings: a prompt is
prefilled up to the first item whose embedding is missing, and goes on from there when it comes. A sequence whose KV another
instance holds gets its blocks when there is room for all of them, and runs when they are filled; one that goes on elsewhere
leaves its blocks behind, held until nobody reads them.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Set
from dataclasses import dataclass, field

from chiasm.engine.block_manager import BlockManager
from chiasm.engine.encoder_cache_manager import EncoderCacheManager
from chiasm.engine.sequence import Sequence
from chiasm.errors import InvalidRequestError, OverloadedError
from chiasm.models.base import PromptItem

_AFTER_ALL_RUNNING = 1 << 62


@dataclass(frozen=True)
class SchedulerConfig:
    """Bounds of one engine. Tokens are rows of a step; bytes are those of embeddings in the encoder cache."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_queued_requests: int
    max_model_len: int
    max_mixed_prefill_tokens: int
    """Prefill rows of a step that decodes as well: running streams wait for them, so they are fewer."""
    entry_bytes_per_row: int
    local_encoder: bool = False
    """Whether missing embeddings are made in the step itself (aggregated) instead of waited for."""
    recomputes_items: bool = True
    """Whether a preempted sequence with items can begin anew here. Where it can't (decode) it waits for a block as long as
    any other sequence goes on."""


@dataclass(frozen=True)
class ScheduledSequence:
    """Tokens ``[start, start + num_tokens)`` of a sequence; ``samples`` if a new token follows from the last of them."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass
class Step:
    """One step: decodes first, then prefill chunks."""

    decodes: list[ScheduledSequence] = field(default_factory=list)
    prefills: list[ScheduledSequence] = field(default_factory=list)
    encode: list[tuple[Sequence, PromptItem]] = field(default_factory=list)
    """Items to encode before the language model runs (aggregated), each identifier once."""
    preempted: list[Sequence] = field(default_factory=list)
    load: list[Sequence] = field(default_factory=list)
    """Sequences that have blocks now for the KV that is elsewhere."""

    @property
    def scheduled(self) -> list[ScheduledSequence]:
        return self.decodes + self.prefills


class Scheduler:
    """Waiting and running sequences of one engine, both in order of arrival."""

    def __init__(
        self, config: SchedulerConfig, block_manager: BlockManager, encoder_cache: EncoderCacheManager
    ) -> None:
        self.config = config
        self.block_manager = block_manager
        self.encoder_cache = encoder_cache
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.loading: list[Sequence] = []
        """Those whose blocks are being filled from elsewhere; finished ones stay until that has ended."""
        self._left_behind: dict[str, list[int]] = {}
        """Blocks of finished sequences that others still read, by request."""
        self.num_preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    # ---- events -----------------------------------------------------------------------------------------------------

    def check(self, num_prompt: int, items: list[PromptItem]) -> None:
        """Raise InvalidRequestError for a prompt that could never run here."""
        limit = self.config.max_model_len
        if num_prompt == 0:
            raise InvalidRequestError("the prompt is empty; send at least one token", param="messages")
        if num_prompt >= limit:
            raise InvalidRequestError(
                f"the prompt has {num_prompt} tokens and the context of this model is {limit}, answer included; "
                "shorten the prompt, or send fewer or smaller images",
                param="messages",
                code="context_length_exceeded",
            )
        for item in items:
            if self.entry_bytes(item) > self.encoder_cache.capacity_bytes:
                raise InvalidRequestError(
                    f"an image of {len(item.geometry.rows)} tokens does not fit the encoder cache of "
                    f"{self.encoder_cache.capacity_bytes} bytes; send a smaller image",
                    param="messages",
                )

    def add(self, sequences: list[Sequence]) -> None:
        """Queue the choices of one request. Raises OverloadedError when too many wait already, for whatever reason."""
        queued = len(self.waiting) + sum(1 for sequence in self.running if self.is_stalled(sequence))
        if queued + len(sequences) > self.config.max_queued_requests:
            raise OverloadedError(
                f"{queued} requests are queued here and {self.config.max_queued_requests} is the limit; try again later"
            )
        self.waiting.extend(sequences)

    def finish(self, sequence: Sequence, *, leave_blocks: bool = False) -> None:
        """The sequence ended, for whatever reason, at whatever point; all that it holds is free.

        With ``leave_blocks`` its blocks stay as they are until ``blocks_read``. Blocks that are being filled are free when
        that has ended (``loaded`` or ``not_loaded``).
        """
        if sequence.finished:
            return
        sequence.finished = True
        if sequence in self.loading:
            return
        queue = self.running if sequence in self.running else self.waiting
        queue.remove(sequence)
        if leave_blocks:
            self._left_behind.setdefault(sequence.request_id, []).extend(sequence.block_ids)
            sequence.block_ids = []
        self._let_go(sequence)

    def blocks_read(self, request_id: str) -> None:
        """Nobody reads any more what the request left behind."""
        self.block_manager.release(self._left_behind.pop(request_id, []))

    def loaded(self, sequence: Sequence) -> None:
        """The sequence's blocks hold the KV of its first ``num_remote`` tokens; it can go on."""
        self.loading.remove(sequence)
        if sequence.finished:
            self._let_go(sequence)
            return
        sequence.num_computed, sequence.num_remote = sequence.num_remote, 0
        hashes = sequence.block_hashes()
        for index in range(sequence.num_computed // self.block_manager.block_size):
            self.block_manager.remember(sequence.block_ids[index], hashes[index])
        insort(self.running, sequence, key=lambda other: other.arrival)

    def not_loaded(self, sequence: Sequence) -> None:
        """Nothing writes into the sequence's blocks any more, and they are not all filled; the sequence has ended."""
        self.loading.remove(sequence)
        sequence.finished = True
        self._let_go(sequence)

    def item_arrived(self, sequence: Sequence, item: PromptItem) -> None:
        """The embedding is in memory, in room that ``make_room`` gave; sequences that want it can go on."""
        assert item.identifier in self.encoder_cache
        self._hold(sequence, item)

    def item_lost(self, identifier: str) -> None:
        """The embedding could not be loaded after all; it is missing again."""
        self.encoder_cache.remove(identifier)

    # ---- what is missing --------------------------------------------------------------------------------------------

    def wanted_items(self) -> list[tuple[Sequence, list[PromptItem]]]:
        """Items that the next chunks need and that are not in memory, in the order in which each sequence needs them.

        The caller goes through a sequence's items and stops at the first that doesn't exist yet or finds no room, so that
        what a sequence holds in memory is always what it needs next.
        """
        wanted: list[tuple[Sequence, list[PromptItem]]] = []
        for sequence in [*self.running, *self.waiting[: self.config.max_num_seqs]]:
            if not sequence.items or sequence.prompt_computed or self._follows(sequence):
                continue
            start = self._next_token(sequence)
            missing: list[PromptItem] = []
            for item in sequence.items_between(start, start + self.config.max_num_batched_tokens):
                if missing or item.identifier not in self.encoder_cache:
                    missing.append(item)
                else:
                    self._hold(sequence, item)
            if missing:
                wanted.append((sequence, missing))
        return wanted

    def num_cached_tokens(self, sequence: Sequence) -> int:
        """Tokens of a waiting sequence that the prefix cache holds now."""
        return len(self._cached_prefix(sequence)) * self.block_manager.block_size

    def _next_token(self, sequence: Sequence) -> int:
        """The first token that is still to compute, were the sequence scheduled now."""
        return sequence.num_computed or self.num_cached_tokens(sequence)

    def make_room(self, sequence: Sequence, item: PromptItem, keep: Set[str] = frozenset()) -> bool:
        """Reserve room in the encoder cache for an embedding that exists and is about to be loaded or made."""
        before = sequence.items_between(self._next_token(sequence), item.offset)
        needed_before = {other.identifier for other in before}
        return self.encoder_cache.allocate(
            item.identifier, self.entry_bytes(item), arrival=self._rank(sequence), keep=needed_before | keep
        )

    def entry_bytes(self, item: PromptItem) -> int:
        return len(item.geometry.rows) * self.config.entry_bytes_per_row

    def is_stalled(self, sequence: Sequence) -> bool:
        """Whether the sequence cannot go on for want of an embedding."""
        if self.config.local_encoder or sequence.prompt_computed:
            return False
        return self._runnable_end(sequence, sequence.num_computed, sequence.num_tokens) == sequence.num_computed

    # ---- the policy -------------------------------------------------------------------------------------------------

    def schedule(self) -> Step:
        """Plan one step: every decode first, then prefills in order of arrival, all under one token budget."""
        step = Step()
        budget = self.config.max_num_batched_tokens

        for sequence in [sequence for sequence in self.running if sequence.is_decoding]:
            if budget > 0 and sequence in self.running and self._reserve(sequence, sequence.num_tokens, step):
                step.decodes.append(ScheduledSequence(sequence, sequence.num_computed, 1, samples=True))
                budget -= 1
        if step.decodes:
            budget = min(budget, self.config.max_mixed_prefill_tokens)

        for sequence in [sequence for sequence in self.running if not sequence.is_decoding]:
            if budget > 0 and sequence in self.running:
                budget -= self._schedule_prefill(sequence, budget, step)

        # Those that wait for an embedding compute nothing, so they take no one's place.
        computing = sum(1 for sequence in self.running if not self.is_stalled(sequence))
        places = self.config.max_num_seqs - computing - len(self.loading)
        for sequence in list(self.waiting):
            if budget == 0 or places <= 0:
                break
            if sequence in step.preempted or self._follows(sequence):
                continue
            if sequence.num_remote:
                if not self._receive(sequence, step):
                    break
                places -= 1
                continue
            admitted = self._admit(sequence, budget, step)
            if admitted is None:
                break
            if admitted:
                places -= 1
                budget -= self._schedule_prefill(sequence, budget, step)
        if not self.config.recomputes_items and self._is_stuck(step):
            self._preempt(self.running[-1], step)
        step.encode = [(sequence, item) for sequence, item in step.encode if item.identifier in self.encoder_cache]
        return step

    def complete(self, step: Step, sampled: dict[str, int]) -> None:
        """The step ran: ``sampled`` has the new token of each sequence (by ``sequence_id``) that samples."""
        for part in step.scheduled:
            sequence = part.sequence
            if sequence.finished:
                continue
            sequence.num_computed = part.end
            hashes = sequence.block_hashes()
            first_changed = part.start // self.block_manager.block_size
            for index in range(first_changed, part.end // self.block_manager.block_size):
                self.block_manager.remember(sequence.block_ids[index], hashes[index])
            for item in sequence.items:
                if item.offset + item.length <= sequence.num_computed:
                    self._release_unless_needed(sequence, item)
            if part.samples:
                sequence.token_ids.append(sampled[sequence.sequence_id])

    # ---- steps of the policy ----------------------------------------------------------------------------------------

    def _admit(self, sequence: Sequence, budget: int, step: Step) -> bool | None:
        """Move a waiting sequence to running if its first chunk can run now. None: no room, and nobody passes it."""
        prefix = self._cached_prefix(sequence)
        start = len(prefix) * self.block_manager.block_size
        end = min(sequence.num_tokens, start + budget)
        if not self.config.local_encoder:
            end = self._runnable_end(sequence, start, end)
        if end == start:
            return False
        needed = self.block_manager.blocks_for(end) - len(prefix)
        while self.block_manager.num_free_after_sharing(prefix) < needed:
            stalled = next(
                (other for other in reversed(self.running) if other.block_ids and self.is_stalled(other)), None
            )
            if stalled is None:
                return None
            self._preempt(stalled, step)
        self.block_manager.share(prefix)
        sequence.block_ids = list(prefix)
        sequence.num_computed = start
        self._note_prefix(sequence, start)
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=lambda other: other.arrival)
        return True

    def _receive(self, sequence: Sequence, step: Step) -> bool:
        """Give a waiting sequence all blocks that it needs to go on from KV that is elsewhere, if there are as many.

        One more stays free for each sequence that runs: what was brought here should not be thrown out again at once.
        """
        prefix = self.block_manager.find(
            sequence.block_hashes()[: sequence.num_remote // self.block_manager.block_size]
        )
        needed = self.block_manager.blocks_for(sequence.num_remote + 1) - len(prefix)
        if self.block_manager.num_free_after_sharing(prefix) < needed + len(self.running):
            return False
        self.block_manager.share(prefix)
        sequence.block_ids = prefix + self.block_manager.allocate(needed)
        sequence.num_computed = len(prefix) * self.block_manager.block_size
        self._note_prefix(sequence, sequence.num_computed)
        self.waiting.remove(sequence)
        self.loading.append(sequence)
        step.load.append(sequence)
        return True

    def _note_prefix(self, sequence: Sequence, num_tokens: int) -> None:
        if not sequence.was_scheduled:
            sequence.was_scheduled = True
            sequence.num_cached = num_tokens
            self.prefix_query_tokens += sequence.num_prompt
            self.prefix_hit_tokens += num_tokens

    def _schedule_prefill(self, sequence: Sequence, budget: int, step: Step) -> int:
        """Add the sequence's next chunk to the step; returns its tokens, 0 if it cannot go on now."""
        start = sequence.num_computed
        end = min(sequence.num_tokens, start + budget)
        if self.config.local_encoder:
            end = self._plan_encoding(sequence, start, end, step)
        end = self._runnable_end(sequence, start, end)
        if end == start or not self._reserve(sequence, end, step):
            return 0
        step.prefills.append(ScheduledSequence(sequence, start, end - start, samples=end == sequence.num_tokens))
        return end - start

    def _plan_encoding(self, sequence: Sequence, start: int, end: int, step: Step) -> int:
        """Have the step encode what the chunk needs, as far as room and the step's budget of rows go."""
        planned = sum(len(item.geometry.rows) for _, item in step.encode)
        for item in sequence.items_between(start, end):
            if item.identifier in self.encoder_cache:
                self._hold(sequence, item)
                continue
            rows = len(item.geometry.rows)
            if planned and planned + rows > self.config.max_num_batched_tokens:
                return max(start, item.offset)
            if not self.make_room(sequence, item, keep=self._used_by(step)):
                return max(start, item.offset)
            self._hold(sequence, item)
            step.encode.append((sequence, item))
            planned += rows
        return end

    @staticmethod
    def _used_by(step: Step) -> set[str]:
        """Identifiers of the embeddings that the chunks planned so far read."""
        return {item.identifier for part in step.prefills for item in part.sequence.items_between(part.start, part.end)}

    def _runnable_end(self, sequence: Sequence, start: int, end: int) -> int:
        """The furthest that tokens from ``start`` can run: ``end``, or the first item whose embedding is missing."""
        for item in sequence.items_between(start, end):
            if item.identifier not in self.encoder_cache:
                return max(start, item.offset)
        return end

    def _reserve(self, sequence: Sequence, num_tokens: int, step: Step) -> bool:
        """See that the sequence has blocks for ``num_tokens`` tokens, at the cost of others if need be."""
        needed = self.block_manager.blocks_for(num_tokens) - len(sequence.block_ids)
        while self.block_manager.num_free < needed:
            victim = self._victim(sequence, step)
            if victim is None:
                return False
            self._preempt(victim, step)
        if needed > 0:
            sequence.block_ids.extend(self.block_manager.allocate(needed))
        return True

    def _is_stuck(self, step: Step) -> bool:
        """Whether all that run wait for blocks that only one of them could give."""
        return bool(self.running) and not (step.scheduled or step.load or step.preempted or self.loading)

    def _victim(self, sequence: Sequence, step: Step) -> Sequence | None:
        """Whose blocks go: the youngest that waits for an embedding, else the youngest that came after ``sequence``."""
        scheduled = {part.sequence.sequence_id for part in step.scheduled}
        others = [
            other
            for other in reversed(self.running)
            if other is not sequence and other.sequence_id not in scheduled and other.block_ids
        ]
        if not self.config.recomputes_items:
            others = [other for other in others if not other.items]
        for other in others:
            if self.is_stalled(other):
                return other
        return next((other for other in others if other.arrival > sequence.arrival), None)

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        self.running.remove(sequence)
        insort(self.waiting, sequence, key=lambda other: other.arrival)
        self._let_go(sequence)
        step.preempted.append(sequence)
        self.num_preemptions += 1

    def _let_go(self, sequence: Sequence) -> None:
        self.block_manager.release(sequence.block_ids)
        sequence.block_ids = []
        sequence.num_computed = 0
        for identifier in sequence.held:
            self.encoder_cache.release(identifier, sequence.sequence_id)
        sequence.held.clear()

    def _hold(self, sequence: Sequence, item: PromptItem) -> None:
        self.encoder_cache.hold(item.identifier, sequence.sequence_id, self._rank(sequence))
        sequence.held.add(item.identifier)

    def _rank(self, sequence: Sequence) -> int:
        """Who may take room in the encoder cache from whom: lower from higher. All that run come before all that wait."""
        return sequence.arrival + (0 if sequence in self.running else _AFTER_ALL_RUNNING)

    def _release_unless_needed(self, sequence: Sequence, item: PromptItem) -> None:
        """Give up an entry whose place is computed, unless the same image comes again further on."""
        if item.identifier in sequence.held and not any(
            other.identifier == item.identifier and other.offset + other.length > sequence.num_computed
            for other in sequence.items
        ):
            sequence.held.discard(item.identifier)
            self.encoder_cache.release(item.identifier, sequence.sequence_id)

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks of the prefix cache that serve the sequence; its last token always runs, since it makes the logits."""
        usable = (sequence.num_tokens - 1) // self.block_manager.block_size
        return self.block_manager.find(sequence.block_hashes()[:usable])

    @staticmethod
    def _follows(sequence: Sequence) -> bool:
        leader = sequence.leader
        return leader is not None and not leader.finished and not leader.prompt_computed
