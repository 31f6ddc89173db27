"""The likeliest tokens of many rows of logits, and the weights of all tokens, without sorting a vocabulary.

A vocabulary is read once, in blocks of neighbouring tokens, of which only the maximum is kept. The ``k`` largest logits of a
row are in the ``k`` blocks with the largest maxima: one outside them would have ``k`` larger ones before it. So only those
blocks are looked at again (top-k by block maxima is an old trick of selection; no particular source).

What comes out for a row depends on that row alone, to the last bit: ties go to the lower token id, and weights are integers,
whose sums don't depend on how an operator orders its additions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64
"""Tokens in a block; the last block of a row may have fewer."""
_LOW = 0xFFFFFFFF
_MAGNITUDE = 0x7FFFFFFF


class Largest(NamedTuple):
    """The largest logits of rows, ``[rows, count]`` each, in descending order; equal ones by ascending id."""

    logits: Tensor
    token_ids: Tensor


def best(logits: Tensor) -> list[int]:
    """Return the id of the largest logit of each row of float32 ``[rows, vocab]``: the lowest among equal ones, and that of the
    first NaN if there is any, as ``torch.argmax`` has it.

    NumPy compares as many values at a time as the CPU's registers hold, which torch does only for maxima without their places.
    """
    if logits.device.type == "cpu":
        found: list[int] = logits.numpy().argmax(1).tolist()
    else:
        found = logits.argmax(1).tolist()
    return found


def block_maxima(logits: Tensor) -> Tensor:
    """Return the largest logit of each block: ``[rows, vocab]`` to ``[rows, blocks]``."""
    return _by_block(logits, lambda blocks: blocks.amax(-1))


def largest(logits: Tensor, maxima: Tensor, count: int, rows: Tensor | None = None) -> Largest:
    """Return the ``count`` largest logits of some rows, at most as many as there are tokens.

    ``logits`` is float32 ``[B, vocab]`` and ``maxima`` its :func:`block_maxima`. ``rows`` are indices, int64 ``[R]``; None
    means all rows.
    """
    vocab = logits.shape[1]
    if count * BLOCK < vocab:
        of_rows = maxima if rows is None else maxima[rows]
        blocks = _ids(_keys(of_rows, _counting(of_rows)).topk(count).values)
        token_ids = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
        values = _gather(logits, token_ids, rows)
    else:
        values = logits if rows is None else logits[rows]
        token_ids = _counting(values)
    keys = _keys(values, token_ids).topk(count).values
    return Largest(_values(keys), _ids(keys))


def _gather(logits: Tensor, token_ids: Tensor, rows: Tensor | None) -> Tensor:
    """Return the logits of the ids, or minus infinity for those that the last block lacks."""
    num_rows, vocab = logits.shape
    if rows is None:
        rows = torch.arange(num_rows, device=logits.device)
    inside = token_ids.clamp(max=vocab - 1)
    values = logits.view(-1).take(inside + rows[:, None] * vocab)
    return values if vocab % BLOCK == 0 else values.masked_fill_(token_ids != inside, float("-inf"))


def _counting(values: Tensor) -> Tensor:
    return torch.arange(values.shape[1], device=values.device).expand_as(values)


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    """Return int64 keys in the order of the values; among equal values, a lower id has a larger key."""
    bits = (values + 0.0).view(torch.int32)  # minus zero becomes zero
    ordered = bits ^ ((bits >> 31) & _MAGNITUDE)
    return (ordered.long() << 32) + (_LOW - ids)


def _ids(keys: Tensor) -> Tensor:
    return _LOW - (keys & _LOW)


def _values(keys: Tensor) -> Tensor:
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & _MAGNITUDE)).view(torch.float32)


# ---- weights -------------------------------------------------------------------------------------------------------------


def unit(vocab: int) -> float:
    """Return what the most likely token of a row weighs, so that the sum over the vocabulary fits into 63 bits."""
    return float(1 << (62 - vocab.bit_length()))


def block_weights(
    logits: Tensor, best: Tensor, temperature: Tensor | float = 1.0, min_share: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return float32 weights ``[rows, vocab]``, of which the largest is 1, and int64 weights of blocks, in which that is
    :func:`unit`.

    Tokens with less than ``min_share`` of the largest weigh nothing.
    """
    shares = (logits - best).div_(temperature).exp_()
    if isinstance(min_share, Tensor) or min_share > 0:
        shares.mul_(shares >= min_share)
    of_blocks = _by_block(shares, lambda blocks: blocks.sum(-1))
    return shares, (of_blocks.double() * unit(logits.shape[1])).long()


def take_from_blocks(shares: Tensor, of_blocks: Tensor, uniform: Tensor) -> Tensor:
    """Return the token at the share ``uniform`` (``[rows, 1]``, in [0, 1)) of the cumulative weight, in order of the ids.

    ``shares`` and ``of_blocks`` are from :func:`block_weights`. First the block is chosen, then the token in it by what is
    left, which is inversion of the cumulative distribution.
    """
    vocab = shares.shape[1]
    block, left = _invert(of_blocks, uniform)
    token_ids = block * BLOCK + torch.arange(BLOCK, device=shares.device)
    inside = (token_ids < vocab).long()
    of_tokens = shares.gather(1, token_ids.clamp(max=vocab - 1))
    within, _ = _invert((of_tokens.double() * unit(vocab)).long() * inside, left)
    return (block * BLOCK + within)[:, 0].clamp(max=vocab - 1)


def _invert(of_each: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index ``[rows, 1]`` at that share of the sum, and which share of its own weight lies before the point."""
    cumulative = of_each.cumsum(1)
    point = (uniform * cumulative[:, -1:].double()).long()
    point = torch.minimum(point, cumulative[:, -1:] - 1)
    index = (cumulative <= point).sum(1, keepdim=True).clamp(max=of_each.shape[1] - 1)
    weight = of_each.gather(1, index)
    before = cumulative.gather(1, index) - weight
    return index, (point - before).double() / weight.double()


def _by_block(values: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    vocab = values.shape[1]
    whole = vocab // BLOCK * BLOCK
    reduced = []
    if whole:
        reduced.append(reduce(values[:, :whole].view(values.shape[0], -1, BLOCK)))
    if whole < vocab:
        reduced.append(reduce(values[:, None, whole:]))
    return reduced[0] if len(reduced) == 1 else torch.cat(reduced, dim=1)
