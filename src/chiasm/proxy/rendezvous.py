"""Rendezvous hashing: every proxy prefers the same encoder for the same image, without asking anybody.

After D. Thaler and C. Ravishankar, "Using name-based mappings to increase hit rates" (IEEE/ACM Transactions on Networking 6(1),
1998), with weights as in C. Schindelhauer and G. Schomaker, "Weighted distributed hash tables" (SPAA 2005). Each pair of a node
and a key has a score, and the key prefers the node with the highest. So a node that leaves gives its keys to all others in
proportion to their weights, one that comes takes its share from all, and no other key moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from blake3 import blake3

_PRIME = (1 << 30) - 35
"""Products of two smaller numbers are fast in Python."""


class Rendezvous:
    """The nodes among which keys choose, by index."""

    def __init__(self, names: Sequence[str], weights: Sequence[float]) -> None:
        """A node gets keys in proportion to its weight, which is positive."""
        self._factors = list(map(_number, names))
        self._weights = weights if len(set(weights)) > 1 else None

    def best(self, key: str, nodes: Sequence[int]) -> int:
        """Return the node, one of ``nodes``, that a key prefers."""
        if len(nodes) == 1:
            return nodes[0]
        number = _number(key)
        factors, weights = self._factors, self._weights
        scores: list[float] = [number * factors[node] % _PRIME for node in nodes]
        if weights is not None:
            scores = [-weights[node] / math.log(score / _PRIME) for node, score in zip(nodes, scores, strict=True)]
        return nodes[scores.index(max(scores))]


def _number(name: str) -> int:
    """Return a number from 1 up to the prime, which is equal in all processes."""
    return int.from_bytes(blake3(name.encode()).digest()[:8]) % (_PRIME - 1) + 1
