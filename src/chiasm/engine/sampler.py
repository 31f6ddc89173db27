"""Choosing the next tokens of many sequences from their logits.

Sampling keeps no state: the random number for an output position is a function of the sequence's seed and that position,
so that a request continues identically after preemption, in another batch, or in another process. Nor does a row's token
depend on the other rows (:mod:`chiasm.engine.candidates`).

A token is drawn by inversion of the cumulative distribution, over what top-k, top-p (Holtzman et al. 2020) and min-p leave, in
that order. With top-k or top-p the candidates are in order of their logits, otherwise in that of their ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from torch import Tensor

from chiasm.engine import candidates
from chiasm.engine.grammar import Allowed, GrammarError
from chiasm.engine.logit_changes import LogitChanges, change, keep_out
from chiasm.engine.request import SamplingParams
from chiasm.wire import TokenLogprob

_SIZES = (1, 64, 512, 8192)
"""Rows with about as many candidates are drawn together. Top-p alone begins with the third: a model that has learned something
seldom leaves more. If it does, more candidates are taken for that row until they are enough."""
_FIRST_OF_TOP_P = 512


@dataclass(frozen=True)
class SamplingInput:
    """What the sampler needs to know about one sequence besides its logits."""

    params: SamplingParams
    seed: int
    token_ids: AbstractSequence[int]
    """Prompt and output so far."""
    num_prompt: int
    changes: LogitChanges
    """Those of its choice. Tokens that end the answer come early only if its grammar allows nothing else."""
    allowed: Allowed | GrammarError | None = None
    """Tokens that the answer's grammar allows, or why there are none; None without a grammar."""

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt


@dataclass(frozen=True)
class Sampled:
    """The chosen token, and its log probability if the request asks for it."""

    token_id: int
    logprobs: TokenLogprob | None
    failure: str | None = None
    """Why the answer cannot go on; the token means nothing then."""


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) for output token ``position`` of a sequence: 53 bits of BLAKE3 over both."""
    digest = blake3(seed.to_bytes(9, "little", signed=True) + position.to_bytes(8, "little")).digest(8)
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def sample(logits: Tensor, inputs: AbstractSequence[SamplingInput]) -> list[Sampled]:
    """Choose one token per row. ``logits`` is float32 ``[B, vocab]``, contiguous, and is overwritten.

    The candidates come to the host in one copy, where tokens are drawn. Another follows if top-p needs unusually many
    candidates, and one if log probabilities are wanted; they are those of the logits as they were.
    """
    report = _Report.of(logits, inputs)
    if all(_takes_the_best(one) for one in inputs):
        token_ids = candidates.best(logits)
    else:
        _change(logits, inputs)
        token_ids = _drawn(logits, inputs)
    logprobs = report.read(token_ids)
    return [_sampled(one, token_ids[row], logprobs.get(row)) for row, one in enumerate(inputs)]


def _drawn(logits: Tensor, inputs: AbstractSequence[SamplingInput]) -> list[int]:
    """Return the token of each row by its sampling parameters."""
    draws = _Draws(logits, inputs)
    token_ids = [0] * len(inputs)
    groups = draws.first()
    while groups:
        seen = [draws.look_at(group) for group in groups]
        values = _to_host(torch.cat([one.flatten() for one in seen]))
        more: list[_Group] = []
        for group, one in zip(groups, seen, strict=True):
            of_group, values = values[: one.numel()].reshape(one.shape), values[one.numel() :]
            doubtful = []
            for row, (token_id, is_enough) in zip(group.rows, draws.draw(group, of_group), strict=True):
                token_ids[row] = token_id
                if not is_enough:
                    doubtful.append(row)
            if doubtful:
                more.append(draws.larger(group, doubtful))
        groups = more
    return token_ids


def _takes_the_best(one: SamplingInput) -> bool:
    """Whether the token is the one with the largest logit of the model."""
    params = one.params
    return (
        params.greedy
        and one.allowed is None
        and one.changes.changes_nothing
        and not one.changes.is_early(one.num_output)
    )


def _to_host(values: Tensor) -> npt.NDArray[np.float64]:
    """Copy to the host; on a GPU, this waits until the values are there."""
    found: npt.NDArray[np.float64] = values.cpu().numpy()
    return found


def _sampled(sequence: SamplingInput, token_id: int, logprobs: TokenLogprob | None) -> Sampled:
    if isinstance(sequence.allowed, GrammarError):
        return Sampled(0, None, str(sequence.allowed))
    return Sampled(token_id, logprobs)


# ---- what the request and the grammar change -----------------------------------------------------------------------------


def _change(logits: Tensor, inputs: AbstractSequence[SamplingInput]) -> None:
    """Change ``logits`` in place. A grammar has the last word, so that no bias allows what it forbids."""
    masked = [(row, one.allowed) for row, one in enumerate(inputs) if isinstance(one.allowed, Allowed)]
    masks = _masks(logits, masked, inputs) if masked else None
    for one in inputs:
        one.changes.note(one.token_ids, one.num_prompt)
    changes = [(row, one.changes) for row, one in enumerate(inputs)]
    change(logits, changes)
    keep_out(
        logits,
        [
            (row, of_row)
            for row, of_row in changes
            if inputs[row].allowed is None and of_row.is_early(inputs[row].num_output)
        ],
    )
    if masks is not None:
        rows = torch.tensor([row for row, _ in masked], device=logits.device)
        logits[rows] = logits[rows].masked_fill_(~masks, float("-inf"))


def _masks(
    logits: Tensor, masked: AbstractSequence[tuple[int, Allowed]], inputs: AbstractSequence[SamplingInput]
) -> Tensor:
    """Return which tokens the rows with a grammar choose from: bool ``[rows, vocab]``. ``logits`` are the model's own.

    A model that would end, in the middle of JSON, has nothing more to say: whatever it is made to say instead, it would say for
    ever. So what is open is closed.
    """
    device, vocab = logits.device, logits.shape[1]
    masks = torch.stack([_without_early_stops(allowed, inputs[row])[:vocab] for row, allowed in masked]).to(device)
    closing = [(place, row, one, one.closing) for place, (row, one) in enumerate(masked) if one.closing is not None]
    if not closing:
        return masks
    rows = torch.tensor([row for _, row, _, _ in closing], device=device)
    of_rows = logits[rows]
    best = candidates.largest(of_rows, candidates.block_maxima(of_rows), 1).token_ids
    most = max(len(one.ends) for _, _, one, _ in closing)
    ends = torch.tensor([[*one.ends, *[-1] * (most - len(one.ends))] for _, _, one, _ in closing], device=device)
    grammatical = torch.stack([one.tokens[:vocab] for _, _, one, _ in closing]).to(device)
    wants_to_end = (best == ends).any(1, keepdim=True) & ~grammatical.gather(1, best)
    places = torch.tensor([place for place, _, _, _ in closing], device=device)
    closers = torch.stack([tokens[:vocab] for _, _, _, tokens in closing]).to(device)
    masks[places] = torch.where(wants_to_end, closers, masks[places])
    return masks


def _without_early_stops(allowed: Allowed, sequence: SamplingInput) -> Tensor:
    if not sequence.changes.is_early(sequence.num_output):
        return allowed.tokens
    without_stops = allowed.tokens.clone()
    without_stops[sequence.changes.stops] = False
    # A complete answer can only end, however short it is.
    return without_stops if without_stops.any() else allowed.tokens


# ---- drawing -------------------------------------------------------------------------------------------------------------


class _Group(NamedTuple):
    """Rows that are drawn together."""

    rows: AbstractSequence[int]
    size: int
    """Number of candidates; 0 for all tokens, in order of their ids."""
    by_top_p: bool
    """Whether top-p alone says how many candidates a row has, which may be more than ``size``."""


class _Draws:
    """Draws for the rows of one step."""

    def __init__(self, logits: Tensor, inputs: AbstractSequence[SamplingInput]) -> None:
        self._logits = logits
        self._inputs = inputs
        self._vocab = logits.shape[1]
        self._unit = candidates.unit(self._vocab)
        self._maxima = candidates.block_maxima(logits)

    def first(self) -> list[_Group]:
        """Return groups of all rows."""
        found: dict[tuple[int, bool], list[int]] = {}
        counts: dict[tuple[int, bool], int] = {}
        for row, one in enumerate(self._inputs):
            count, by_top_p = self._candidates_of(one.params)
            kind = next((size for size in _SIZES if count <= size), self._vocab) if count else 0, by_top_p
            found.setdefault(kind, []).append(row)
            counts[kind] = max(counts.get(kind, 0), count)
        return [_Group(rows, counts[kind], kind[1]) for kind, rows in found.items()]

    def larger(self, group: _Group, rows: AbstractSequence[int]) -> _Group:
        """Return a group of some of its rows with more candidates."""
        return _Group(rows, next((size for size in _SIZES if group.size < size < self._vocab), self._vocab), True)

    def _candidates_of(self, params: SamplingParams) -> tuple[int, bool]:
        if params.greedy:
            return 1, False
        if 0 < params.top_k < self._vocab:
            return params.top_k, False
        return (min(_FIRST_OF_TOP_P, self._vocab), True) if params.top_p < 1 else (0, False)

    # ---- on the device ----

    def look_at(self, group: _Group) -> Tensor:
        """Return what has to come to the host to draw for a group: float64 ``[rows, columns]``.

        That is the token if it is certain already; otherwise the candidates' ids, their logits, and with top-p alone the weight
        of all tokens.
        """
        rows = None if len(group.rows) == len(self._inputs) else torch.tensor(group.rows, device=self._logits.device)
        if group.size == 0:
            return self._draw_from_all(group, rows)
        top = candidates.largest(self._logits, self._maxima, group.size, rows)
        if group.size == 1:
            return top.token_ids.double()
        columns = [top.token_ids.double(), top.logits.double()]
        if group.by_top_p:
            of_rows = self._logits if rows is None else self._logits[rows]
            temperature = self._column([self._inputs[row].params.temperature for row in group.rows])
            _, of_blocks = candidates.block_weights(of_rows, top.logits[:, :1], temperature.float())
            columns.append(of_blocks.sum(1, keepdim=True).double())
        return torch.cat(columns, dim=1)

    def _draw_from_all(self, group: _Group, rows: Tensor | None) -> Tensor:
        params = [self._inputs[row].params for row in group.rows]
        temperature = self._column([one.temperature for one in params]).float()
        min_p = self._column([one.min_p for one in params]).float() if any(one.min_p > 0 for one in params) else 0.0
        number = self._column([self._number(row) for row in group.rows])
        of_rows, maxima = (self._logits, self._maxima) if rows is None else (self._logits[rows], self._maxima[rows])
        shares, of_blocks = candidates.block_weights(of_rows, maxima.amax(1, keepdim=True), temperature, min_p)
        return candidates.take_from_blocks(shares, of_blocks, number)[:, None].double()

    def _column(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self._logits.device)[:, None]

    def _number(self, row: int) -> float:
        one = self._inputs[row]
        return uniform(one.seed, one.num_output)

    # ---- on the host ----

    def draw(self, group: _Group, seen: npt.NDArray[np.float64]) -> Iterator[tuple[int, bool]]:
        """Yield for each row of the group its token, and whether the row has no more candidates than were looked at."""
        if group.size <= 1:
            yield from ((int(token_id), True) for token_id in seen[:, 0])
            return
        size = group.size
        for row, values in zip(group.rows, seen, strict=True):
            token_ids, logits = values[:size], values[size : 2 * size]
            params = self._inputs[row].params
            weights = (np.exp((logits - logits[0]) / params.temperature) * self._unit).astype(np.int64)
            cumulative = weights.cumsum()
            within = size if group.by_top_p else params.top_k
            total = float(values[-1]) if group.by_top_p else float(cumulative[within - 1])
            # All three keep the first of the candidates, since weights descend.
            probable = int(np.count_nonzero(cumulative - weights < params.top_p * total))
            likely = int(np.count_nonzero(weights >= params.min_p * self._unit))
            kept = max(1, min(probable, likely, within))
            point = int(self._number(row) * float(cumulative[kept - 1]))
            place = min(int(np.searchsorted(cumulative, point, side="right")), kept - 1)
            known = not group.by_top_p or size == self._vocab or kept < size
            yield min(int(token_ids[place]), self._vocab - 1), known


# ---- log probabilities ---------------------------------------------------------------------------------------------------


class _Report:
    """Log probabilities of the model's own logits, for the rows whose requests ask for them."""

    def __init__(self, logits: Tensor, wanted: dict[int, int]) -> None:
        self._wanted = wanted
        """How many candidates to report, by row."""
        if not wanted:
            return
        self._rows = torch.tensor(list(wanted), device=logits.device)
        self._logits = logits[self._rows]
        maxima = candidates.block_maxima(self._logits)
        best = maxima.amax(1, keepdim=True)
        _, of_blocks = candidates.block_weights(self._logits, best)
        of_all = of_blocks.sum(1, keepdim=True).double() / candidates.unit(logits.shape[1])
        self._normalizer = best.double() + of_all.log()
        self._count = min(max(wanted.values()), logits.shape[1])
        self._top: list[Tensor] = []
        if self._count:
            top = candidates.largest(self._logits, maxima, self._count)
            self._top = [top.token_ids.double().flatten(), (top.logits.double() - self._normalizer).flatten()]

    @classmethod
    def of(cls, logits: Tensor, inputs: AbstractSequence[SamplingInput]) -> _Report:
        counts = ((row, one.params.logprobs) for row, one in enumerate(inputs))
        return cls(logits, {row: count for row, count in counts if count is not None})

    def read(self, token_ids: AbstractSequence[int]) -> dict[int, TokenLogprob]:
        """Return what is to be told of the chosen tokens ``[B]``, by row; takes a copy to the host if it is anything."""
        if not self._wanted:
            return {}
        chosen = torch.tensor([token_ids[row] for row in self._wanted], device=self._logits.device)[:, None]
        of_chosen = self._logits.gather(1, chosen).double() - self._normalizer
        values = _to_host(torch.cat([of_chosen.flatten(), *self._top])).tolist()
        found: dict[int, TokenLogprob] = {}
        number = len(self._wanted)
        for place, (row, wanted) in enumerate(self._wanted.items()):
            count = min(wanted, self._count)  # a vocabulary may have fewer
            first = number + place * self._count
            ids = values[first : first + count]
            logprobs = values[first + number * self._count :][:count]
            top = tuple((int(token), logprob) for token, logprob in zip(ids, logprobs, strict=True))
            found[row] = TokenLogprob(values[place], top, token_ids[row])
        return found
