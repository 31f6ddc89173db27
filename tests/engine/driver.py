"""Drives the scheduler step by step, as the engine does, with numbers for tokens and without tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from chiasm.engine.block_manager import BlockManager
from chiasm.engine.encoder_cache_manager import EncoderCacheManager
from chiasm.engine.local_encoder import choose
from chiasm.engine.request import SamplingParams
from chiasm.engine.scheduler import Scheduler, SchedulerConfig
from chiasm.engine.sequence import Sequence
from chiasm.engine.step import Step
from chiasm.models.base import ItemGeometry, Prompt, PromptItem

BYTES_PER_ROW = 10
PLACEHOLDER = 9


def prompt(*parts: int | tuple[str, int]) -> Prompt:
    """``prompt(3, ("a", 4), 2)``: three text tokens, image ``a`` of four rows, two text tokens."""
    token_ids: list[int] = []
    items: list[PromptItem] = []
    for part in parts:
        if isinstance(part, int):
            token_ids += range(100 + len(token_ids), 100 + len(token_ids) + part)
        else:
            identifier, rows = part
            geometry = ItemGeometry((PLACEHOLDER,) * rows, tuple(range(rows)), {"rows": [rows]})
            items.append(PromptItem(identifier, len(token_ids), rows, geometry))
            token_ids += geometry.token_ids
    return Prompt(token_ids, items)


class Driver:
    """A scheduler, the embeddings in its store, and requests that run to ``max_tokens``."""

    def __init__(
        self,
        *,
        budget: int = 64,
        max_prefill: int = 64,
        max_rest: int = 0,
        mixed: int = 64,
        min_text_before_item: int = 0,
        blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 16,
        max_queued: int = 64,
        cache_rows: int = 1000,
        max_finished: int = 0,
        recomputes_items: bool = True,
    ) -> None:
        self.block_size = block_size
        self.mixed = mixed
        """Maximum prefill rows of a step that also decodes."""
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_batched_tokens=budget,
                max_prefill_tokens=max_prefill,
                max_rest_tokens=max_rest,
                min_text_before_item=min_text_before_item,
                max_num_seqs=max_num_seqs,
                max_queued_requests=max_queued,
                entry_bytes_per_row=BYTES_PER_ROW,
                recomputes_items=recomputes_items,
            ),
            BlockManager(blocks, block_size),
            EncoderCacheManager(cache_rows * BYTES_PER_ROW),
        )
        self.stored: set[str] = set()
        """Identifiers of the embeddings that exist by now."""
        self.max_finished = max_finished
        """If not 0, an encoder beside the scheduler makes one item per step, and keeps so many for which there is no room."""
        self.encoded: list[str] = []
        self.looks = 0
        """How often embeddings were looked for."""
        self._seen: tuple[int, set[str]] | None = None
        self._wanted: list[str] = []
        self._wanted_at = -1
        self.sequences: list[Sequence] = []
        self._tokens = itertools.count(1000)
        self._arrivals = itertools.count()

    def add(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 4,
        choices: int = 1,
        salt: str = "",
        outputs: tuple[int, ...] = (),
        remote: int = 0,
        due: float = 0.0,
        part_of: str = "",
        key: str = "",
    ) -> Sequence:
        """Add a request, and return its first choice.

        ``outputs`` were sampled on another instance, which holds the KV of the first ``remote`` tokens. Requests that are due
        at the same time go in order of arrival.
        """
        added: list[Sequence] = []
        for index in range(choices):
            arrival = next(self._arrivals)
            added.append(
                Sequence(
                    request_id=f"r{arrival - index}",
                    index=index,
                    arrival=arrival,
                    part_of=part_of,
                    key=key,
                    due=due,
                    prompt=prompt,
                    sampling=SamplingParams(max_tokens=max_tokens),
                    seed=0,
                    block_size=self.block_size,
                    cache_salt=salt,
                    leader=added[0] if added else None,
                    output_token_ids=outputs,
                    num_remote=remote,
                )
            )
        self.scheduler.add(added)
        self.sequences += added
        return added[0]

    def load(self) -> None:
        """Load the wanted embeddings that exist. Like the engine, look for them only if something has changed."""
        seen = (self.scheduler.items.changes, set(self.stored))
        if seen == self._seen:
            return
        self._seen = seen
        self.looks += 1
        for sequence, items in self.scheduler.wanted_items():
            for item in items:
                here = item.identifier in self.scheduler.encoder_cache
                if not here and (
                    item.identifier not in self.stored or not self.scheduler.items.make_room(sequence, item)
                ):
                    break
                self.scheduler.item_arrived(sequence, item)

    def encode(self) -> None:
        """Do what the encoder does: drop what is not wanted, and make the first item that is."""
        if self._wanted_at != self.scheduler.items.changes:
            self._wanted_at = self.scheduler.items.changes
            self._wanted = [item.identifier for _, item in self.scheduler.items_to_encode()]
        wanted = self._wanted
        self.stored.intersection_update(wanted)
        item, dropped = choose(wanted, self.stored, self.max_finished)
        if dropped is not None:
            self.stored.remove(dropped)
        if item is not None:
            self.stored.add(item)
            self.encoded.append(item)

    def step(self) -> Step:
        """Load, plan and run a step in which every sampled token is new, and end the sequences that have all their tokens."""
        self.load()
        self.check_what_is_known()
        if self.max_finished:
            self.encode()
        step = self.scheduler.schedule(self.mixed)
        self.check(step)
        for sequence in step.put_back:
            self.scheduler.loaded(sequence)
        samples = [part.sequence for part in step.scheduled if part.samples]
        self.scheduler.complete(step, {sequence.sequence_id: next(self._tokens) for sequence in samples})
        for sequence in samples:
            if sequence.num_output == sequence.sampling.max_tokens:
                self.scheduler.finish(sequence)
        self.check_what_is_known()
        return step

    def run(self, limit: int = 1000) -> None:
        """Step until all have ended."""
        for _ in range(limit):
            if not self.scheduler.running and not self.scheduler.waiting:
                return
            encoded = len(self.encoded)
            step = self.step()
            assert step.scheduled or len(self.encoded) > encoded, "no step can be made, and not all have ended"
        raise AssertionError(f"not finished after {limit} steps")

    def run_until(self, condition: Callable[[], bool], limit: int = 1000) -> None:
        """Step until the condition holds."""
        for _ in range(limit):
            if condition():
                return
            self.step()
        raise AssertionError(f"the condition does not hold after {limit} steps")

    def check(self, step: Step) -> None:
        """Assert what must hold for every step."""
        scheduler = self.scheduler
        assert sum(part.num_tokens for part in step.scheduled) <= scheduler.config.max_num_batched_tokens
        rows = sum(part.num_tokens for part in step.prefills)
        config = scheduler.config
        most = self.mixed if step.decodes else config.max_prefill_tokens + config.max_rest_tokens
        assert rows <= most
        assert len(step.scheduled) <= config.max_num_seqs
        names = [part.sequence.sequence_id for part in step.scheduled]
        assert len(names) == len(set(names))
        for part in step.scheduled:
            assert part.start == part.sequence.num_computed
            assert part.num_tokens > 0
            assert len(part.sequence.block_ids) * self.block_size >= part.end
            assert part.samples == (part.end == part.sequence.num_tokens)
            for item in part.sequence.items_between(part.start, part.end):
                assert item.identifier in scheduler.encoder_cache, "a chunk reaches into an item that is not there"
        assert scheduler.encoder_cache.used_bytes <= scheduler.encoder_cache.capacity_bytes
        blocks = scheduler.block_manager
        for sequence in step.load + step.put_back:
            assert sequence in scheduler.loading
            assert len(sequence.block_ids) == blocks.blocks_for(sequence.num_tokens)
        held = {block for sequence in scheduler.running + scheduler.loading for block in sequence.block_ids}
        left = [block for blocks in scheduler._left_behind.values() for block in blocks]
        held.update(left)
        assert len(held) == blocks.num_blocks - blocks.num_free
        assert all(sequence.is_running for sequence in scheduler.running)
        assert not any(sequence.is_running for sequence in scheduler.waiting + scheduler.loading)
        for queue in (scheduler.running, scheduler.waiting):
            assert [sequence.order for sequence in queue] == sorted(sequence.order for sequence in queue)

    def check_what_is_known(self) -> None:
        """Assert that what is kept about sequences with items still holds."""
        scheduler, items = self.scheduler, self.scheduler.items
        for sequence in scheduler.running + scheduler.waiting:
            if not sequence.items or sequence.prompt_computed or sequence.num_remote:
                continue
            start = sequence.num_computed if sequence.is_running else items.num_cached_tokens(sequence)
            assert items._of(sequence).start == start
            is_stalled = items.runnable_end(sequence, start, sequence.num_tokens) == start
            assert is_stalled or not items.is_stalled(sequence), "a sequence that could run is held back"
            needed = [item.identifier for item in items._next_items(sequence)]
            here = list(itertools.takewhile(lambda name: name in scheduler.encoder_cache, needed))
            for _, missing in items.wanted([sequence]):
                assert [item.identifier for item in missing] == needed[len(here) :]
                assert sequence.held >= set(here)

    def nothing_is_left(self) -> bool:
        scheduler = self.scheduler
        return (
            not scheduler.running
            and not scheduler.waiting
            and not scheduler.loading
            and scheduler.block_manager.num_free == scheduler.block_manager.num_blocks
            and not any(sequence.held or sequence.block_ids for sequence in self.sequences)
            and not scheduler.items._known
            and not scheduler.items._known_by_item
            and not scheduler.items._known_by_next_block
        )


def chunks(step: Step) -> list[tuple[int, int]]:
    """``(start, end)`` of the step's prefill chunks."""
    return [(part.start, part.end) for part in step.prefills]
