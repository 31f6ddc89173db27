"""Choosing the next token from logits.

Sampling keeps no state: the random number for an output position is a function of the sequence's seed and that position,
so that a request continues identically after preemption, in another batch, or in another process.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor

from chiasm.engine.grammar import Allowed, GrammarError
from chiasm.engine.logit_changes import LogitChanges
from chiasm.engine.request import SamplingParams
from chiasm.wire import TokenLogprob


@dataclass(frozen=True)
class SamplingInput:
    """What the sampler needs to know about one sequence besides its logits."""

    params: SamplingParams
    seed: int
    output_token_ids: AbstractSequence[int]
    changes: LogitChanges
    """Those of its choice. Tokens that end the answer come early only if its grammar allows nothing else."""
    allowed: Allowed | GrammarError | None = None
    """Tokens that the answer's grammar allows, or why there are none; None without a grammar."""


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
    """Choose one token per row. ``logits`` is float32 ``[B, vocab]`` and is not changed."""
    best = logits.argmax(dim=-1).tolist()
    return [
        Sampled(best[row], None) if _takes_best(sequence, best[row]) else _sample_row(logits[row], sequence, best[row])
        for row, sequence in enumerate(inputs)
    ]


def _takes_best(sequence: SamplingInput, best: int) -> bool:
    """Whether the sequence takes the token with the highest logit, and nothing else is to be known about it."""
    params = sequence.params
    if not params.greedy or params.logprobs is not None or sequence.changes.changes(len(sequence.output_token_ids)):
        return False
    allowed = sequence.allowed
    return allowed is None or (isinstance(allowed, Allowed) and bool(allowed.tokens[best]))


def _sample_row(raw: Tensor, sequence: SamplingInput, best: int) -> Sampled:
    params = sequence.params
    if isinstance(sequence.allowed, GrammarError):
        return Sampled(0, None, str(sequence.allowed))
    is_changed = sequence.allowed is not None or sequence.changes.changes(len(sequence.output_token_ids))
    logits = _adjust(raw.clone(), sequence, best) if is_changed else raw
    token_id = int(logits.argmax()) if params.greedy else _draw(logits, sequence)
    return Sampled(token_id, None if params.logprobs is None else _logprobs(raw, token_id, params.logprobs))


def _adjust(logits: Tensor, sequence: SamplingInput, best: int) -> Tensor:
    """Change ``logits`` in place, and return them. A grammar has the last word, so that no bias allows what it forbids."""
    changes = sequence.changes
    changes.apply(logits, sequence.output_token_ids)
    early = changes.stops if changes.is_early(len(sequence.output_token_ids)) else None
    if isinstance(sequence.allowed, Allowed):
        allowed = _choosable(sequence.allowed, early, best)[: len(logits)]
        logits.masked_fill_(~allowed.to(logits.device), float("-inf"))
    elif early is not None:
        logits[early] = float("-inf")
    return logits


def _choosable(allowed: Allowed, early: Tensor | None, best: int) -> Tensor:
    """Return which tokens to choose from; ``best`` is what the model would choose by itself.

    A model that would end, in the middle of JSON, has nothing more to say: whatever it is made to say instead, it would say for
    ever. So what is open is closed.
    """
    if best in allowed.ends and not allowed.tokens[best] and allowed.closing is not None:
        return allowed.closing
    if early is None:
        return allowed.tokens
    without_stops = allowed.tokens.clone()
    without_stops[early.to(without_stops.device)] = False
    # A complete answer can only end, however short it is.
    return without_stops if without_stops.any() else allowed.tokens


def _draw(logits: Tensor, sequence: SamplingInput) -> int:
    """Draw by inversion of the cumulative distribution, after top-k, top-p (Holtzman et al. 2020) and min-p."""
    params = sequence.params
    probabilities = torch.softmax(logits / params.temperature, dim=-1)
    target = uniform(sequence.seed, len(sequence.output_token_ids))
    order: Tensor | None = None
    if params.top_p < 1 or params.top_k > 0:
        probabilities, order = probabilities.sort(descending=True, stable=True)
        if 0 < params.top_k < len(probabilities):
            probabilities[params.top_k :] = 0
            probabilities /= probabilities.sum()
        if params.top_p < 1:
            before = probabilities.cumsum(0) - probabilities
            probabilities[before >= params.top_p] = 0
    if params.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0)
    cumulative = probabilities.double().cumsum(0)
    index = int(torch.searchsorted(cumulative, cumulative[-1] * target, right=True))
    index = min(index, int(probabilities.nonzero()[-1]))
    return index if order is None else int(order[index])


def _logprobs(raw: Tensor, token_id: int, count: int) -> TokenLogprob:
    logprobs = torch.log_softmax(raw, dim=-1)
    top = logprobs.topk(min(count, len(logprobs))) if count else None
    alternatives = zip(top.indices.tolist(), top.values.tolist(), strict=True) if top else ()
    return TokenLogprob(float(logprobs[token_id]), tuple(alternatives), token_id)
