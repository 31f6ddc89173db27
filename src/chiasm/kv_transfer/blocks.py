"""Where blocks are: which ranges of bytes a list of blocks stands for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from chiasm.transfer.memory import Range, Run


def ranges_of(block_ids: Iterable[int], block_bytes: int) -> list[Range]:
    """Return the bytes of these blocks, with those of adjacent blocks joined, in ascending order."""
    ranges: list[Range] = []
    for block in sorted(set(block_ids)):
        offset = block * block_bytes
        if ranges and sum(ranges[-1]) == offset:
            ranges[-1] = Range(ranges[-1].offset, ranges[-1].num_bytes + block_bytes)
        else:
            ranges.append(Range(offset, block_bytes))
    return ranges


def runs_of(local: Sequence[int], remote: Sequence[int], block_bytes: int) -> list[Run]:
    """Return what copies block ``remote[i]`` to block ``local[i]``, in order, with neighbours joined that are adjacent on both
    sides.
    """
    runs: list[Run] = []
    start = 0
    for end in range(1, len(local) + 1):
        length = end - start
        if end == len(local) or local[end] != local[start] + length or remote[end] != remote[start] + length:
            runs.append(Run(local[start] * block_bytes, remote[start] * block_bytes, length * block_bytes))
            start = end
    return runs
