"""Blocks of the KV cache: how many hold each, and which can be shared by prefix."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from copy import copy

from blake3 import blake3

from chiasm.models.base import PromptItem

BlockHash = bytes


class BlockManager:
    """Allocates blocks and remembers what full ones contain.

    A full block is named by a hash chained over everything before it: token ids, and for each item that reaches into
    the block its identifier, place and geometry, since all images share one placeholder token. A released block can
    still be found until it is allocated again, least recently released first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._holders = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._block_of: dict[BlockHash, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks ``num_tokens`` tokens need."""
        return -(-num_tokens // self.block_size)

    def find(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Return the blocks of the longest known prefix of ``hashes``, without taking them."""
        found: list[int] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_after_sharing(self, blocks: Sequence[int]) -> int:
        """Return how many blocks would be free once ``blocks`` are shared: free ones among them leave the free list."""
        return self.num_free - sum(1 for block in blocks if self._holders[block] == 0)

    def share(self, blocks: Sequence[int]) -> None:
        """Take one more hold on each of ``blocks``, as found by :meth:`find`."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._free[block]
            self._holders[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` free blocks and forget their content. The caller has checked :attr:`num_free`."""
        taken: list[int] = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one hold on each block. The last is reused first, since the beginning of a prompt is shared more often."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None

    def remember(self, block: int, block_hash: BlockHash) -> None:
        """Make a full, computed block findable by its hash. The caller holds it."""
        if self._hash_of[block] is None and block_hash not in self._block_of:
            self._hash_of[block] = block_hash
            self._block_of[block_hash] = block

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block] = None


class BlockHasher:
    """Names the tokens of one growing sequence, its full blocks and whole beginnings, each once."""

    def __init__(self, block_size: int, items: Sequence[PromptItem], salt: str) -> None:
        self._block_size = block_size
        self._items = items
        self._hashes: list[BlockHash] = []
        self._digest: tuple[int, str] = 0, ""
        """Number of tokens that were named last, and their name."""
        self._root = blake3(salt.encode()).digest()

    def copy(self) -> BlockHasher:
        """Return a hasher of another sequence that begins with the same tokens."""
        copied = copy(self)
        copied._hashes = list(self._hashes)
        return copied

    def hashes(self, token_ids: Sequence[int]) -> list[BlockHash]:
        """Return the hashes of all full blocks of ``token_ids``, which may only have grown since the last call."""
        for index in range(len(self._hashes), len(token_ids) // self._block_size):
            start = index * self._block_size
            before = self._hashes[-1] if self._hashes else self._root
            self._hashes.append(self._chained(before, start, token_ids[start : start + self._block_size]))
        return self._hashes

    def digest(self, token_ids: Sequence[int]) -> str:
        """Return hex that names ``token_ids`` and the items among them, independent of the block size.

        As everywhere here, they are the first tokens of one sequence.
        """
        if self._digest[0] != len(token_ids):
            self._digest = len(token_ids), self._chained(self._root, 0, token_ids).hex()
        return self._digest[1]

    def _chained(self, before: BlockHash, start: int, token_ids: Sequence[int]) -> BlockHash:
        """Return the hash of the tokens from ``start`` on and, through ``before``, of all that precede them."""
        end = start + len(token_ids)
        content = blake3(before)
        content.update(array("q", token_ids).tobytes())
        for item in self._items:
            if item.offset < end and item.offset + item.length > start:
                content.update(f"{item.identifier} {item.offset} {item.geometry.metadata}".encode())
        return content.digest()
