"""Choosing the next tokens of many sequences from their logits.

Sampling keeps no state: the random number for an output position is a function of the sequence's seed and that position,
so that a request continues identically after preemption, in another batch, or in another process. Nor does a row's token
depend on the other rows (:mod:`chiasm.engine.candidates`).

A token is drawn by inversion of the cumulative distribution, over what top-k, top-p (Holtzman et al. 2020) and min-p leave, in
that order. With top-k or top-p the candidates are in order of their logits, otherwise in that of their ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import NamedTuple

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

    Tokens, and log probabilities of the logits as they were, come to the host in one copy. Another follows if top-p needs
    unusually many candidates.
    """
    report = _Report.of(logits, inputs)
    _change(logits, inputs)
    draws = _Draws(logits, inputs)
    tokens = torch.zeros(len(inputs), dtype=torch.long, device=logits.device)
    drawn = draws.first()
    while True:
        doubtful: list[_Group] = []
        columns: list[Tensor] = []
        for group in drawn:
            of_group = draws.draw(group)
            if group.rows is None:
                tokens = of_group.token_ids
            else:
                tokens.index_copy_(0, draws.index(group.rows), of_group.token_ids)
            if of_group.enough is not None:
                doubtful.append(group)
                columns.append(of_group.enough.double())
        values = torch.cat([tokens.double(), *columns, *report.columns(tokens)]).tolist()  # the copy to the host
        token_ids, values = values[: len(inputs)], values[len(inputs) :]
        drawn = []
        for group in doubtful:
            rows = range(len(inputs)) if group.rows is None else group.rows
            enough, values = values[: len(rows)], values[len(rows) :]
            more = [row for row, is_enough in zip(rows, enough, strict=True) if not is_enough]
            if more:
                drawn.append(draws.larger(group, more))
        if not drawn:
            logprobs = report.read(values, token_ids)
            return [
                _sampled(one, int(token), logprobs.get(row))
                for row, (one, token) in enumerate(zip(inputs, token_ids, strict=True))
            ]


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

    rows: AbstractSequence[int] | None
    """None for all rows."""
    size: int
    """Number of candidates; 0 for all tokens, in order of their ids."""
    by_top_p: bool
    """Whether top-p alone says how many candidates a row has, which may be more than ``size``."""


class _Drawn(NamedTuple):
    token_ids: Tensor
    """int64 ``[rows]``."""
    enough: Tensor | None
    """bool ``[rows]``: whether the row had no more candidates than were looked at; None if that is known."""


class _Draws:
    """Draws for the rows of one step."""

    def __init__(self, logits: Tensor, inputs: AbstractSequence[SamplingInput]) -> None:
        self._logits = logits
        self._inputs = inputs
        self._vocab = logits.shape[1]
        self._unit = candidates.unit(self._vocab)
        self._maxima = candidates.block_maxima(logits)
        self._settings: Tensor | None = None

    def first(self) -> list[_Group]:
        """Return groups of all rows."""
        found: dict[tuple[int, bool], list[int]] = {}
        counts: dict[tuple[int, bool], int] = {}
        for row, one in enumerate(self._inputs):
            count, by_top_p = self._candidates_of(one.params)
            kind = next((size for size in _SIZES if count <= size), self._vocab) if count else 0, by_top_p
            found.setdefault(kind, []).append(row)
            counts[kind] = max(counts.get(kind, 0), count)
        return [self._group(rows, counts[kind], kind[1]) for kind, rows in found.items()]

    def larger(self, group: _Group, rows: AbstractSequence[int]) -> _Group:
        """Return a group of some of its rows with more candidates."""
        return self._group(rows, next((size for size in _SIZES if group.size < size < self._vocab), self._vocab), True)

    def _candidates_of(self, params: SamplingParams) -> tuple[int, bool]:
        if params.greedy:
            return 1, False
        if 0 < params.top_k < self._vocab:
            return params.top_k, False
        return (min(_FIRST_OF_TOP_P, self._vocab), True) if params.top_p < 1 else (0, False)

    def _group(self, rows: AbstractSequence[int], count: int, by_top_p: bool) -> _Group:
        return _Group(None if len(rows) == len(self._inputs) else rows, count, by_top_p)

    def index(self, rows: Iterable[int]) -> Tensor:
        """Return the indices of rows as a tensor."""
        return torch.tensor(list(rows), device=self._logits.device)

    def draw(self, group: _Group) -> _Drawn:
        """Draw a token for each row of the group."""
        rows = None if group.rows is None else self.index(group.rows)
        if group.size == 0:
            return self._draw_from_all(rows)
        top = candidates.largest(self._logits, self._maxima, group.size, rows)
        if group.size == 1:
            return _Drawn(top.token_ids[:, 0], None)
        temperature, top_p, min_p, number, top_k = self._settings_of(rows)
        best = top.logits[:, :1]
        weights = candidates.weights(top.logits, best, temperature, self._unit)
        cumulative = weights.cumsum(1)
        if group.by_top_p:
            of_rows = self._logits if rows is None else self._logits[rows]
            _, of_blocks = candidates.block_weights(of_rows, best, temperature.float())
            total = of_blocks.sum(1, keepdim=True)
            within = torch.full_like(total, group.size)
        else:
            within = top_k.long()
            total = cumulative.gather(1, within - 1)
        # All three keep the first of the candidates, since weights descend.
        probable = (cumulative - weights).double() < top_p * total.double()
        likely = weights.double() >= min_p * self._unit
        kept = torch.minimum((probable & likely).sum(1, keepdim=True), within).clamp(min=1)
        point = (number * cumulative.gather(1, kept - 1).double()).long()
        place = torch.minimum((cumulative <= point).sum(1, keepdim=True), kept - 1)
        token_ids = top.token_ids.gather(1, place)[:, 0].clamp(max=self._vocab - 1)
        known = not group.by_top_p or group.size == self._vocab
        return _Drawn(token_ids, None if known else (kept < group.size)[:, 0])

    def _draw_from_all(self, rows: Tensor | None) -> _Drawn:
        temperature, _, min_p, number, _ = self._settings_of(rows)
        has_min_p = any(one.params.min_p > 0 for one in self._inputs)
        of_rows, maxima = (self._logits, self._maxima) if rows is None else (self._logits[rows], self._maxima[rows])
        best = maxima.amax(1, keepdim=True)
        shares, of_blocks = candidates.block_weights(
            of_rows, best, temperature.float(), min_p.float() if has_min_p else 0.0
        )
        return _Drawn(candidates.take_from_blocks(shares, of_blocks, number), None)

    def _settings_of(self, rows: Tensor | None) -> AbstractSequence[Tensor]:
        """Return temperature, top-p, min-p, random number and top-k of rows, float64 ``[rows, 1]`` each."""
        if self._settings is None:
            settings = [
                (
                    one.params.temperature,
                    one.params.top_p,
                    one.params.min_p,
                    uniform(one.seed, one.num_output),
                    one.params.top_k,
                )
                for one in self._inputs
            ]
            self._settings = torch.tensor(settings, dtype=torch.float64, device=self._logits.device)
        of_rows = self._settings if rows is None else self._settings[rows]
        return [of_rows[:, place : place + 1] for place in range(of_rows.shape[1])]


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

    def columns(self, tokens: Tensor) -> list[Tensor]:
        """Return everything that is to be copied to the host, when ``tokens`` ``[B]`` were chosen."""
        if not self._wanted:
            return []
        chosen = self._logits.gather(1, tokens[self._rows][:, None]).double() - self._normalizer
        return [chosen[:, 0], *self._top]

    def read(self, values: AbstractSequence[float], token_ids: AbstractSequence[float]) -> dict[int, TokenLogprob]:
        """Return what the columns say, by row."""
        found: dict[int, TokenLogprob] = {}
        number = len(self._wanted)
        for place, (row, wanted) in enumerate(self._wanted.items()):
            count = min(wanted, self._count)  # a vocabulary may have fewer
            first = number + place * self._count
            ids = values[first : first + count]
            logprobs = values[first + number * self._count :][:count]
            top = tuple((int(token), logprob) for token, logprob in zip(ids, logprobs, strict=True))
            found[row] = TokenLogprob(values[place], top, int(token_ids[row]))
        return found
