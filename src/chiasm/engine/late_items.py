"""Which embeddings prompts need next, which of them are missing, and how far a prompt can run without those."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Set
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeVar

from chiasm.engine.block_manager import BlockHash, BlockManager
from chiasm.engine.encoder_cache_manager import EncoderCacheManager, Rank
from chiasm.engine.sequence import Sequence
from chiasm.errors import Code, InvalidRequestError
from chiasm.models.base import PromptItem

_K = TypeVar("_K")


@dataclass
class _Known:
    """What was found out about a sequence that has items."""

    identifiers: frozenset[str]
    """Those of all its items."""
    start: int
    """The first token that would be computed if it were scheduled now."""
    blocks: frozenset[int]
    """Blocks of the prefix cache on which that rests."""
    next_block: BlockHash | None
    """The block after those, on whose absence it rests; None if there is none that could be used."""
    stalled: bool | None = None
    """What ``is_stalled`` has answered."""
    will_stall: bool | None = None
    """What ``will_stall`` has answered."""
    wanted: list[PromptItem] | None = None
    """What ``wanted`` has answered."""
    wants_any: bool = False
    """Whether the next chunks need any items, here or not."""


class LateItems:
    """What the scheduler asks about embeddings. It is pure, as the scheduler is.

    What is known of a sequence holds until it moves on, one of its items comes or goes, or the prefix cache has more or less
    of it; whenever that may be, ``changes`` grows. So what waits costs a step nothing while nothing changes, and little while
    the embeddings of others come.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        encoder_cache: EncoderCacheManager,
        *,
        max_num_batched_tokens: int,
        min_text_before_item: int,
        entry_bytes_per_row: int,
    ) -> None:
        """The limits are those of the scheduler's configuration."""
        self._max_num_batched_tokens = max_num_batched_tokens
        self._min_text_before_item = min_text_before_item
        self._entry_bytes_per_row = entry_bytes_per_row
        self._block_manager = block_manager
        self._encoder_cache = encoder_cache
        self._changes = 0
        self._known: dict[str, _Known] = {}
        """By sequence. Of one that has ended nothing is kept."""
        self._known_by_item: dict[str, set[str]] = {}
        """The sequences in ``_known`` that have an item, by its identifier."""
        self._known_by_next_block: dict[BlockHash, set[str]] = {}
        """The sequences in ``_known`` whose ``next_block`` this is."""
        self._found_blocks: set[int] = set()
        """All blocks on which something known rests, and perhaps others."""

    # ---- changes ----------------------------------------------------------------------------------------------------

    @property
    def changes(self) -> int:
        """Grows whenever ``wanted``, or whether there is room for an item, may have changed."""
        return self._changes + self._encoder_cache.changes

    def note_change(self, sequence: Sequence) -> None:
        """Note that a sequence has come, gone or moved on; it counts if it has any items."""
        if sequence.items:
            self._changes += 1
            self._forget(sequence.sequence_id)

    def note_remembered(self, blocks: Iterable[BlockHash]) -> None:
        """Note that blocks are in the prefix cache."""
        for block in blocks:
            if names := self._known_by_next_block.get(block):
                self._changes += 1
                for name in list(names):
                    self._forget(name)

    def note_overwritten(self, blocks: Collection[int]) -> None:
        """Note that blocks are no longer in the prefix cache."""
        if self._found_blocks.isdisjoint(blocks):
            return
        self._changes += 1
        for name in [name for name, known in self._known.items() if not known.blocks.isdisjoint(blocks)]:
            self._forget(name)
        self._found_blocks = {block for known in self._known.values() for block in known.blocks}

    def _of(self, sequence: Sequence) -> _Known:
        """Return what is known of a sequence with items."""
        if moved := self._encoder_cache.moved:
            for identifier in moved:
                self._forget_item(identifier)
            moved.clear()
        return self._known.get(sequence.sequence_id) or self._find_out(sequence)

    def _find_out(self, sequence: Sequence) -> _Known:
        identifiers = frozenset(item.identifier for item in sequence.items)
        if sequence.is_running:
            known = _Known(identifiers, sequence.num_computed, frozenset(), None)
        else:
            usable = self._usable_prefix(sequence)
            prefix = self._block_manager.find(usable)
            next_block = usable[len(prefix)] if len(prefix) < len(usable) else None
            known = _Known(identifiers, len(prefix) * self._block_manager.block_size, frozenset(prefix), next_block)
        if not sequence.finished:
            self._known[sequence.sequence_id] = known
            self._found_blocks |= known.blocks
            for identifier in identifiers:
                self._known_by_item.setdefault(identifier, set()).add(sequence.sequence_id)
            if known.next_block is not None:
                self._known_by_next_block.setdefault(known.next_block, set()).add(sequence.sequence_id)
        return known

    def _forget_item(self, identifier: str) -> None:
        for name in list(self._known_by_item.get(identifier, ())):
            self._forget(name)

    def _forget(self, sequence_id: str) -> None:
        known = self._known.pop(sequence_id, None)
        if known is None:
            return
        for identifier in known.identifiers:
            _leave(self._known_by_item, identifier, sequence_id)
        if known.next_block is not None:
            _leave(self._known_by_next_block, known.next_block, sequence_id)

    # ---- what is needed ---------------------------------------------------------------------------------------------

    def check(self, items: Iterable[PromptItem]) -> None:
        """Raise InvalidRequestError for an item that can never fit the encoder cache."""
        for item in items:
            if self.entry_bytes(item) > self._encoder_cache.capacity_bytes:
                raise InvalidRequestError(
                    f"The embedding of an image takes {self.entry_bytes(item)} bytes, but the encoder cache has "
                    f"{self._encoder_cache.capacity_bytes} bytes. Send a smaller image, or raise --encoder-cache-bytes of the "
                    "instance.",
                    param="messages",
                    code=Code.EMBEDDING_TOO_LARGE,
                )

    def entry_bytes(self, item: PromptItem) -> int:
        """Return the size of an item's embedding in the encoder cache."""
        return len(item.geometry.rows) * self._entry_bytes_per_row

    def cached_prefix(self, sequence: Sequence) -> list[int]:
        """Return the prefix cache's blocks for the sequence."""
        return self._block_manager.find(self._usable_prefix(sequence))

    def _usable_prefix(self, sequence: Sequence) -> list[BlockHash]:
        """Return the sequence's full blocks without its last token, which must run to make the logits."""
        return sequence.block_hashes()[: (sequence.num_tokens - 1) // self._block_manager.block_size]

    def num_cached_tokens(self, sequence: Sequence) -> int:
        """Return how many tokens of a waiting sequence the prefix cache holds now."""
        return len(self.cached_prefix(sequence)) * self._block_manager.block_size

    def wanted(self, sequences: Iterable[Sequence]) -> list[tuple[Sequence, list[PromptItem]]]:
        """Return what the next chunks of these need and have to wait for: from the first item that is not in memory.

        Sequences whose next chunks need no items are left out. The others hold what they need before that item, no more.
        """
        wanted: list[tuple[Sequence, list[PromptItem]]] = []
        for sequence in sequences:
            if not sequence.items or sequence.prompt_computed:
                continue
            known = self._of(sequence)
            if known.wanted is None:
                items = self._next_items(sequence)
                here = list(takewhile(lambda item: item.identifier in self._encoder_cache, items))
                self._release(sequence, sequence.held - {item.identifier for item in here})
                for item in here:
                    self.hold(sequence, item)
                known.wanted, known.wants_any = items[len(here) :], bool(items)
            if known.wants_any:
                wanted.append((sequence, known.wanted))
        return wanted

    def _next_items(self, sequence: Sequence) -> list[PromptItem]:
        """Return the items that the next chunks of a prompt need, or for which little text before them waits."""
        start = self._of(sequence).start
        return sequence.items_between(start, start + self._max_num_batched_tokens + self._min_text_before_item)

    # ---- what is missing --------------------------------------------------------------------------------------------

    def runnable_end(self, sequence: Sequence, start: int, end: int) -> int:
        """Return how far tokens from ``start`` can run: to ``end``, or to the first item whose embedding is missing.

        Little text before a missing item doesn't run without it. (A chunk with items always runs, however small: the entries
        that it holds may fill the encoder cache, and then no others could come.)
        """
        items = sequence.items_between(start, end)
        for item in items:
            if item.identifier not in self._encoder_cache:
                is_little = item is items[0] and item.offset - start < self._min_text_before_item
                return start if is_little else max(start, item.offset)
        return end

    def is_stalled(self, sequence: Sequence) -> bool:
        """Return whether the sequence cannot continue because an embedding is missing."""
        if sequence.prompt_computed or not sequence.items or sequence.num_remote:
            return False
        known = self._of(sequence)
        if known.stalled is None:
            known.stalled = self.runnable_end(sequence, known.start, sequence.num_tokens) == known.start
        return known.stalled

    def will_stall(self, sequence: Sequence) -> bool:
        """Return whether an embedding is missing that the rest of the prompt needs, now or further on.

        Only so many are looked for as the encoder cache can hold at once, since no prompt ever finds more there.
        """
        if not sequence.items or sequence.prompt_computed or sequence.num_remote:
            return False
        known = self._of(sequence)
        if known.will_stall is None:
            known.will_stall = self._lacks_any(self._next_items(sequence))
        return known.will_stall

    def _lacks_any(self, items: Iterable[PromptItem]) -> bool:
        room = self._encoder_cache.capacity_bytes
        for identifier, num_bytes in {item.identifier: self.entry_bytes(item) for item in items}.items():
            room -= num_bytes
            if room < 0:
                return False
            if identifier not in self._encoder_cache:
                return True
        return False

    def can_finish(self, sequence: Sequence) -> bool:
        """Return whether all embeddings are in memory that the rest of the prompt needs."""
        if not sequence.items or sequence.prompt_computed or sequence.num_remote:
            return True
        return self.runnable_end(sequence, self._of(sequence).start, sequence.num_tokens) == sequence.num_tokens

    def exceeds_cache(self, sequence: Sequence) -> bool:
        """Return whether the rest of the prompt needs more embeddings than can be in memory at once.

        Then it has to wait on its way, since some can be loaded or made only after it has passed others.
        """
        if not sequence.items or sequence.prompt_computed or sequence.num_remote:
            return False
        rest = sequence.items_between(self._of(sequence).start, sequence.num_prompt)
        needed = {item.identifier: self.entry_bytes(item) for item in rest}
        return sum(needed.values()) > self._encoder_cache.capacity_bytes

    # ---- room -------------------------------------------------------------------------------------------------------

    def make_room(self, sequence: Sequence, item: PromptItem) -> bool:
        """Reserve room in the encoder cache for an embedding that is about to be loaded or made; return whether there is."""
        before = sequence.items_between(self._of(sequence).start, item.offset)
        needed_before = {other.identifier for other in before}
        return self._encoder_cache.allocate(
            item.identifier, self.entry_bytes(item), rank=_rank(sequence), keep=needed_before
        )

    def hold(self, sequence: Sequence, item: PromptItem) -> None:
        """Note that the sequence needs the entry of an item, which is in memory."""
        self._encoder_cache.hold(item.identifier, sequence.sequence_id, _rank(sequence))
        sequence.held.add(item.identifier)

    def release_computed(self, sequence: Sequence) -> None:
        """Release the entries whose places are all computed."""
        if not sequence.held:
            return
        needed = {item.identifier for item in sequence.items if item.offset + item.length > sequence.num_computed}
        self._release(sequence, sequence.held - needed)

    def release_all(self, sequence: Sequence) -> None:
        """Release all that the sequence holds."""
        self._release(sequence, set(sequence.held))

    def _release(self, sequence: Sequence, identifiers: Set[str]) -> None:
        for identifier in identifiers:
            sequence.held.discard(identifier)
            self._encoder_cache.release(identifier, sequence.sequence_id)


def _rank(sequence: Sequence) -> Rank:
    """Return the rank for room in the encoder cache: lower evicts higher, and running comes before waiting."""
    return not sequence.is_running, *sequence.order


def _leave(index: dict[_K, set[str]], key: _K, name: str) -> None:
    """Take a name out of an index, and the key with its last one."""
    index[key].remove(name)
    if not index[key]:
        del index[key]
