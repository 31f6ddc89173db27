"""Whether a series of samples grows, in spite of noise and single peaks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from chiasm.bench.statistics import median

_WINDOWS = 10
_CLEAR = 27
"""Of the 45 pairs of ten windows, rises minus falls. Without a trend it is reached in less than one of 100 series
(M. G. Kendall, Biometrika 30, 1938)."""


def growth(values: Sequence[float]) -> float | None:
    """Return by how much a series has grown from its beginning to its end, 0 if that isn't clear, None if there are too few.

    Samples depend on the ones before them, so the medians of ten windows are compared, by Kendall's test, and the slope is
    the median of the slopes of all pairs (P. K. Sen, J. Am. Stat. Assoc. 63, 1968).
    """
    if len(values) < _WINDOWS:
        return None
    edges = [index * len(values) // _WINDOWS for index in range(_WINDOWS + 1)]
    windows = [median(values[start:end]) for start, end in itertools.pairwise(edges)]
    pairs = list(itertools.combinations(enumerate(windows), 2))
    rises = sum((later > earlier) - (later < earlier) for (_, earlier), (_, later) in pairs)
    if rises < _CLEAR:
        return 0.0
    return (_WINDOWS - 1) * median([(later - earlier) / (j - i) for (i, earlier), (j, later) in pairs])
