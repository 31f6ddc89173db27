"""The scheduler: which tokens of which requests run in the next step.

A pure state machine: no clock, no I/O, no tensors. Everything that happens outside is an event (``add``, ``item_arrived``,
``finish``, …), and ``schedule`` is a function of the state. Prefill is chunked under a token budget (Sarathi-Serve, Agrawal
et al. 2024), preemption is by recomputation (vLLM, Kwon et al. 2023). All sequences have one order, which never changes: when
their work is due (:mod:`chiasm.due`). Of the places among those that run and those that wait, a request has a bounded share
(:mod:`chiasm.engine.shares`). Late embeddings are new here: a prompt is prefilled up to the first item whose
embedding is missing, and continues when it arrives. A sequence whose KV is on another instance gets blocks when there is room
for all of it, and runs once they are filled; a sequence that is handed over leaves its blocks behind until they have been
read.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import takewhile

from chiasm.engine.block_manager import BlockManager
from chiasm.engine.encoder_cache_manager import EncoderCacheManager
from chiasm.engine.late_items import LateItems
from chiasm.engine.preemption import Preemption
from chiasm.engine.sequence import Sequence
from chiasm.engine.shares import check_queue, may_take
from chiasm.engine.step import ScheduledSequence, Step
from chiasm.engine.waiting import Place, in_turn, place_of
from chiasm.models.base import PromptItem


@dataclass(frozen=True)
class SchedulerConfig:
    """The limits of one engine. A token is a row of a step."""

    max_num_batched_tokens: int
    max_num_seqs: int
    """Maximum sequences of a step. More may have begun: those that wait for an embedding take no place."""
    max_queued_requests: int
    max_prefill_tokens: int
    """Maximum prefill rows of a step: a request that arrives meanwhile waits for the step's end."""
    max_rest_tokens: int
    """So many more rows a step without decodes may have, if that leaves no rest of what can run of a prompt: a step of its own
    would read all weights again for few rows."""
    min_text_before_item: int
    """Fewest tokens of text that run by themselves before a missing embedding has arrived: a step costs as much for fewer."""
    entry_bytes_per_row: int
    """Size of one row of an embedding in the encoder cache."""
    recomputes_items: bool = True
    """Whether a preempted sequence with items can be recomputed here. If not (decode), it is not preempted while any other
    sequence can continue, and the KV of its prompt is set aside."""


class Scheduler:
    """Waiting and running sequences of one engine, both in order of due."""

    def __init__(
        self, config: SchedulerConfig, block_manager: BlockManager, encoder_cache: EncoderCacheManager
    ) -> None:
        self.config = config
        self.block_manager = block_manager
        self.encoder_cache = encoder_cache
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.loading: list[Sequence] = []
        """Sequences whose blocks are being filled from another instance; finished ones stay until that has ended."""
        self._left_behind: dict[str, list[int]] = {}
        """Blocks of finished sequences that decode instances still read, by request."""
        self.items = LateItems(
            block_manager,
            encoder_cache,
            max_num_batched_tokens=config.max_num_batched_tokens,
            min_text_before_item=config.min_text_before_item,
            entry_bytes_per_row=config.entry_bytes_per_row,
        )
        self._preemption = Preemption(self.items, recomputes_items=config.recomputes_items)
        self._moves = 0
        """Grows whenever a sequence begins or ends to wait or to run, or no longer follows another."""
        self._computing: list[Sequence] = []
        """What ``_not_stalled`` has answered."""
        self._computing_at = (-1, -1)
        """``_moves`` and ``items.changes`` at that time: it holds until one of them grows."""
        self._order: list[tuple[Place, bool, Sequence]] = []
        """What ``_waiting_order`` has answered."""
        self._order_at = (-1, -1)
        """Likewise."""
        self.num_preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    # ---- events -----------------------------------------------------------------------------------------------------

    def add(self, sequences: list[Sequence]) -> None:
        """Queue the choices of one prompt.

        Raises OverloadedError if too many wait already, for whatever reason, or too many of the same request or key.
        """
        queued = [*self.waiting, *(sequence for sequence in self.running if self.items.is_stalled(sequence))]
        check_queue(queued, sequences, self.config.max_queued_requests)
        for sequence in sequences:
            _insert(self.waiting, sequence)
        self._moves += 1
        self.items.note_change(sequences[0])

    def finish(self, sequence: Sequence, *, leave_blocks: bool = False) -> None:
        """End the sequence, for whatever reason and at whatever point, and free all that it holds.

        With ``leave_blocks`` its blocks stay as they are until ``blocks_read``. Blocks that are being filled become free when
        the transfer has ended (``loaded`` or ``not_loaded``).
        """
        if sequence.finished:
            return
        sequence.finished = True
        self._moves += 1
        if sequence in self.loading:
            return
        if sequence.is_running:
            self._leave_running(sequence)
        else:
            self.waiting.remove(sequence)
        self.items.note_change(sequence)
        if leave_blocks:
            self._left_behind.setdefault(sequence.request_id, []).extend(sequence.block_ids)
            sequence.block_ids = []
        self._let_go(sequence)

    def blocks_read(self, request_id: str) -> None:
        """Free the blocks that the request left behind: nobody reads them any more."""
        self.block_manager.release(self._left_behind.pop(request_id, []))

    def loaded(self, sequence: Sequence) -> None:
        """Let the sequence continue: its blocks hold the KV of its first ``num_remote`` tokens."""
        self.loading.remove(sequence)
        self._moves += 1
        if sequence.finished:
            self._let_go(sequence)
            return
        sequence.num_computed, sequence.num_remote, sequence.is_set_aside = sequence.num_remote, 0, False
        self._remember_blocks(sequence, 0)
        self._join_running(sequence)

    def not_loaded(self, sequence: Sequence) -> None:
        """End the sequence: the transfer into its blocks was broken off, and nothing writes into them any more."""
        self.loading.remove(sequence)
        sequence.finished = True
        self._moves += 1
        self._let_go(sequence)

    def item_arrived(self, sequence: Sequence, item: PromptItem) -> None:
        """Note that an embedding is in memory, in room made by ``make_room``; the sequence holds it."""
        assert item.identifier in self.encoder_cache
        self.items.hold(sequence, item)

    def item_lost(self, identifier: str) -> None:
        """Note that an embedding could not be loaded or made after all; it is missing again."""
        self.encoder_cache.remove(identifier)

    # ---- what is missing --------------------------------------------------------------------------------------------

    def wanted_items(self) -> Iterator[tuple[Sequence, list[PromptItem]]]:
        """Yield the items that the next chunks need and that are not in memory, in the order in which they are needed.

        The caller goes through a sequence's items and stops at the first that doesn't exist yet or finds no room, so that
        a sequence only holds entries that it needs next. Sequences that wait are left out behind so many of their key as can
        run at once and have all that they need: what these wait for isn't an embedding.
        """
        running = [sequence for sequence in self.running if not self._follows(sequence)]
        waiting = [sequence for sequence in self.waiting if sequence.items and not self._follows(sequence)]
        have_all: Counter[str] = Counter()
        for sequence, missing in self.items.wanted([*running, *waiting]):
            if missing and (sequence.is_running or have_all[sequence.key] < self.config.max_num_seqs):
                yield sequence, missing
            if not sequence.is_running and all(item.identifier in self.encoder_cache for item in missing):
                have_all[sequence.key] += 1

    def items_to_encode(self) -> list[tuple[Sequence, PromptItem]]:
        """Return the missing items that an encoder of the engine's own should make, first come first, each once.

        They are in order of due, but the item that the first in rank needs comes before all, since for that one there will be
        room: so entries that find no room never keep the encoder from the one that does.
        """
        wanted = [
            (sequence, item)
            for sequence, items in self.wanted_items()
            for item in items
            if item.identifier not in self.encoder_cache
        ]
        found: dict[str, tuple[Sequence, PromptItem]] = {}
        for sequence, item in wanted[:1] + sorted(wanted, key=lambda pair: pair[0].order):
            found.setdefault(item.identifier, (sequence, item))
        return list(found.values())

    # ---- the policy -------------------------------------------------------------------------------------------------

    def schedule(self, mixed_prefill_tokens: int | None = None) -> Step:
        """Plan one step: every decode first, then prefills in order of due, all under one token budget.

        If it decodes, it has at most ``mixed_prefill_tokens`` rows of prompts, since running streams wait for them; None: as
        many as another step.

        Prompts that can run to their end come before those that would stop at a missing embedding: they get the rows that are
        left.
        """
        step = Step()
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self._not_stalled():
            (decoding if sequence.is_decoding else prefilling).append(sequence)
        self._schedule_decodes(decoding, step)
        budget = min(self.config.max_num_batched_tokens - len(step.decodes), self.config.max_prefill_tokens)
        if step.decodes and mixed_prefill_tokens is not None:
            budget = min(budget, mixed_prefill_tokens)
        self._schedule_prefills(prefilling, budget, step)
        if not self.config.recomputes_items and self._is_stuck(step):
            self._preempt(self.running[-1], step)
        return step

    def complete(self, step: Step, sampled: dict[str, int]) -> None:
        """Note that the step ran; ``sampled`` has the new token of each sequence that samples, by ``sequence_id``."""
        for part in step.scheduled:
            sequence = part.sequence
            if sequence.finished:
                continue
            sequence.num_computed = part.end
            if part.start < sequence.num_prompt:
                self.items.note_change(sequence)
                self._moves += sequence.prompt_computed
            self._remember_blocks(sequence, part.start)
            self.items.release_computed(sequence)
            if part.samples:
                sequence.token_ids.append(sampled[sequence.sequence_id])

    # ---- steps of the policy ----------------------------------------------------------------------------------------

    def _schedule_decodes(self, decoding: list[Sequence], step: Step) -> None:
        """Add decodes to the step."""
        most = min(self.config.max_num_batched_tokens, self.config.max_num_seqs)
        for sequence in decoding:
            if len(step.decodes) == most:
                break
            if sequence.is_running and self._reserve(sequence, sequence.num_tokens, step):
                step.decodes.append(ScheduledSequence(sequence, sequence.num_computed, 1, samples=True))

    def _schedule_prefills(self, prefilling: list[Sequence], budget: int, step: Step) -> None:
        """Add chunks of prompts to the step, and admit sequences that wait, as far as ``budget`` rows, places and blocks go."""
        room = self.config.max_num_seqs - len(step.decodes)
        if budget <= 0 or room == 0:
            return
        extra = 0 if step.decodes else min(self.config.max_rest_tokens, self.config.max_num_batched_tokens - budget)
        # Sequences that wait for an embedding compute nothing, so they take no place.
        placed = [*self._not_stalled(), *self.loading]
        places = self.config.max_num_seqs - len(placed)
        running = [(place_of(one, self.items), False, one) for one in prefilling if one.is_running]
        blocks_are_short = False
        held: Counter[str] = Counter()
        waiting: Iterable[tuple[Place, bool, Sequence]] = ()
        if places > 0 and self.waiting:
            held.update(sequence.part_of for sequence in placed)
            # Nobody is admitted after one that needs blocks: later sequences must not overtake it.
            waiting = takewhile(lambda _: places > 0 and not blocks_are_short, self._waiting_order(placed))
        for _, waits, sequence in merge(sorted(running), waiting):
            if budget <= 0 or room == 0:
                break
            if sequence in step.preempted:
                continue
            if waits:
                if places <= 0 or blocks_are_short or not may_take(held[sequence.part_of], places):
                    continue
                admitted = (
                    self._receive(sequence, step) if sequence.num_remote else self._admit(sequence, budget, extra, step)
                )
                blocks_are_short = admitted is None
                if admitted:
                    places -= 1
                    held[sequence.part_of] += 1
                if not admitted or sequence.num_remote:
                    continue
            num_tokens = self._schedule_prefill(sequence, budget, extra, step)
            blocks_are_short = blocks_are_short or num_tokens is None
            budget -= num_tokens or 0
            room -= 1 if num_tokens else 0

    def _not_stalled(self) -> list[Sequence]:
        """Return the running sequences that wait for no embedding. Each step asks, so the answer is kept."""
        if self._computing_at != (now := (self._moves, self.items.changes)):
            self._computing_at = now
            self._computing = [sequence for sequence in self.running if not self.items.is_stalled(sequence)]
        return self._computing

    def _waiting_order(self, placed: list[Sequence]) -> list[tuple[Place, bool, Sequence]]:
        """Return what waits and could run, in the order in which it takes places. Steps ask often, so the answer is kept."""
        if self._order_at != (now := (self._moves, self.items.changes)):
            self._order_at = now
            waiting = [one for one in self.waiting if not self._follows(one) and not self.items.is_stalled(one)]
            self._order = in_turn(waiting, self.items, placed)
        return self._order

    def _chunk_end(self, sequence: Sequence, start: int, budget: int, extra: int) -> int:
        """Return where the chunk from ``start`` ends: after ``budget`` tokens, or where nothing more can run.

        It has up to ``extra`` tokens more if it then ends where nothing more can run.
        """
        end = self.items.runnable_end(sequence, start, min(sequence.num_tokens, start + budget + extra + 1))
        if end <= start + budget + extra:
            return end
        return self.items.runnable_end(sequence, start, start + budget)

    def _admit(self, sequence: Sequence, budget: int, extra: int, step: Step) -> bool | None:
        """Move a waiting sequence to running if its first chunk can run now; return whether, and None if blocks are short."""
        prefix = self.items.cached_prefix(sequence)
        start = len(prefix) * self.block_manager.block_size
        end = self._chunk_end(sequence, start, budget, extra)
        if end == start:  # blocks of its prefix were given away in this step
            return False
        needed = self.block_manager.blocks_for(end) - len(prefix)
        while self.block_manager.num_free_after_sharing(prefix) < needed:
            victim = self._preemption.waiting_victim(sequence, self.running, step)
            if victim is None:
                return None
            self._preempt(victim, step)
        self._take_prefix(sequence, prefix)
        self._join_running(sequence)
        return True

    def _receive(self, sequence: Sequence, step: Step) -> bool | None:
        """Give a waiting sequence all blocks that it needs beside its KV from elsewhere; return None if they are short.

        One block stays free for each running sequence, so that KV is not preempted as soon as it has arrived.
        """
        prefix = self.block_manager.find(
            sequence.block_hashes()[: sequence.num_remote // self.block_manager.block_size]
        )
        needed = self.block_manager.blocks_for(sequence.num_tokens) - len(prefix)
        if self.block_manager.num_free_after_sharing(prefix) < needed + len(self.running):
            return None
        self._take_prefix(sequence, prefix)
        sequence.block_ids += self._allocate(needed)
        self.loading.append(sequence)
        (step.put_back if sequence.is_set_aside else step.load).append(sequence)
        return True

    def _take_prefix(self, sequence: Sequence, prefix: list[int]) -> None:
        """Take the sequence out of the waiting ones and give it the blocks of its cached prefix."""
        self.waiting.remove(sequence)
        self._moves += 1
        self.items.note_change(sequence)
        self.block_manager.share(prefix)
        sequence.block_ids = list(prefix)
        sequence.num_computed = len(prefix) * self.block_manager.block_size
        if not sequence.was_scheduled:
            sequence.was_scheduled = True
            sequence.num_cached = sequence.num_computed
            self.prefix_query_tokens += sequence.num_prompt
            self.prefix_hit_tokens += sequence.num_computed

    def _remember_blocks(self, sequence: Sequence, start: int) -> None:
        """Make the sequence's full blocks findable, from the one that holds token ``start``."""
        block_size = self.block_manager.block_size
        full = range(start // block_size, sequence.num_computed // block_size)
        if full:
            hashes = sequence.block_hashes()
            for index in full:
                self.block_manager.remember(sequence.block_ids[index], hashes[index])
            self.items.note_remembered(hashes[full.start : full.stop])

    def _schedule_prefill(self, sequence: Sequence, budget: int, extra: int, step: Step) -> int | None:
        """Add the sequence's next chunk to the step; return its number of tokens.

        It is 0 if the sequence cannot continue because an embedding is missing, and None if blocks are short.
        """
        start = sequence.num_computed
        end = self._chunk_end(sequence, start, budget, extra)
        if end == start:
            return 0
        if not self._reserve(sequence, end, step):
            return None
        step.prefills.append(ScheduledSequence(sequence, start, end - start, samples=end == sequence.num_tokens))
        return end - start

    def _reserve(self, sequence: Sequence, num_tokens: int, step: Step) -> bool:
        """Give the sequence blocks for ``num_tokens`` tokens, preempting others if necessary; return whether it has them."""
        needed = self.block_manager.blocks_for(num_tokens) - len(sequence.block_ids)
        if needed <= 0:
            return True
        while self.block_manager.num_free < needed:
            victim = self._preemption.victim(sequence, self.running, step)
            if victim is None:
                return False
            self._preempt(victim, step)
        sequence.block_ids.extend(self._allocate(needed))
        return True

    def _allocate(self, count: int) -> list[int]:
        """Take free blocks; what was in them is no longer in the prefix cache."""
        blocks = self.block_manager.allocate(count)
        self.items.note_overwritten(blocks)
        return blocks

    def _is_stuck(self, step: Step) -> bool:
        """Return whether nothing can continue until a running sequence gives up its blocks."""
        return bool(self.running) and not (step.scheduled or step.preempted or self.loading)

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        self._leave_running(sequence)
        _insert(self.waiting, sequence)
        self.items.note_change(sequence)
        if sequence.items and not self.config.recomputes_items:
            sequence.is_set_aside, sequence.num_remote = True, min(sequence.num_computed, sequence.num_prompt)
            num_blocks = self.block_manager.blocks_for(sequence.num_remote)
            step.set_aside.append((sequence, sequence.block_ids[:num_blocks]))
        self._let_go(sequence)
        step.preempted.append(sequence)
        self.num_preemptions += 1

    def _join_running(self, sequence: Sequence) -> None:
        _insert(self.running, sequence)
        sequence.is_running = True
        self._moves += 1

    def _leave_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.is_running = False
        self._moves += 1

    def _let_go(self, sequence: Sequence) -> None:
        self.block_manager.release(sequence.block_ids)
        sequence.block_ids = []
        sequence.num_computed = 0
        self.items.release_all(sequence)

    @staticmethod
    def _follows(sequence: Sequence) -> bool:
        leader = sequence.leader
        return leader is not None and not leader.finished and not leader.prompt_computed


def _insert(queue: list[Sequence], sequence: Sequence) -> None:
    """Insert the sequence in order of due."""
    insort(queue, sequence, key=lambda other: other.order)
