"""KV of prompts that a decode engine can't compute again, kept outside of the KV cache while blocks are short."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence

import torch
from torch import Tensor

from chiasm.engine.sequence import Sequence


class SetAside:
    """Copies in the host's memory, of bounded size. Choices of one request share theirs."""

    def __init__(self, blocks: Tensor, max_bytes: int) -> None:
        """``blocks`` are those of the KV cache, one for each row; ``max_bytes`` is what the copies may take together."""
        self._blocks = blocks
        self._max_blocks = max_bytes // blocks.shape[1]
        self._copies: dict[str, dict[int, tuple[int, Tensor]]] = {}
        """By request and choice: how many tokens are in a copy, and its blocks."""

    def keep(self, sequence: Sequence, block_ids: AbstractSequence[int]) -> bool:
        """Copy these blocks, which have the sequence's first ``num_remote`` tokens; return False if there is no memory."""
        of_request = self._copies.setdefault(sequence.request_id, {})
        copy = next((copy for copy in of_request.values() if copy[0] >= sequence.num_remote), None)
        if copy is None:
            if self._num_blocks + len(block_ids) > self._max_blocks:
                return False
            try:
                blocks = torch.empty(len(block_ids), self._blocks.shape[1], dtype=self._blocks.dtype)
            except RuntimeError:  # torch's for a lack of memory
                return False
            for block, block_id in zip(blocks, block_ids, strict=True):
                block.copy_(self._blocks[block_id])
            copy = sequence.num_remote, blocks
        of_request[sequence.index] = copy
        return True

    @property
    def _num_blocks(self) -> int:
        copies = {id(blocks): len(blocks) for of_request in self._copies.values() for _, blocks in of_request.values()}
        return sum(copies.values())

    def put_back(self, sequence: Sequence, block_ids: AbstractSequence[int], first: int) -> None:
        """Fill the sequence's blocks from number ``first`` on, and keep the copy no longer."""
        _, blocks = self._copies[sequence.request_id].pop(sequence.index)
        for block_id, block in zip(block_ids[first:], blocks[first:], strict=False):
            self._blocks[block_id].copy_(block)

    def drop(self, request_id: str) -> None:
        """Keep nothing of the request."""
        self._copies.pop(request_id, None)
