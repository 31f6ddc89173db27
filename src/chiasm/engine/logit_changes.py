"""How logits are changed before a token is chosen: biases, penalties, and stops that come too early.

The changes of one choice are kept as a table of the tokens that they touch, which grows by a token a step. One step writes
the tables of all its rows into the logits together, so it takes the same few operators however many rows there are and however
many tokens are biased, stop the answer, or have been said.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chiasm.engine.request import SamplingParams

_FIRST_CAPACITY = 64


class LogitChanges:
    """The changes for one choice. They are a function of the tokens so far, so they can be made anew anywhere.

    Presence and frequency penalties count the output, as OpenAI's do; the repetition penalty (Keskar et al. 2019) counts
    prompt and output.
    """

    def __init__(
        self, params: SamplingParams, prompt_token_ids: Sequence[int], stop_token_ids: Collection[int]
    ) -> None:
        """``stop_token_ids`` end the answer; they are kept out before there are ``min_tokens``."""
        self._params = params
        self.stops: list[int] = sorted(stop_token_ids) if params.min_tokens else []
        """The tokens that end the answer; empty if it may end at once."""
        self._counts_output = bool(params.presence_penalty or params.frequency_penalty)
        self._repels = params.repetition_penalty != 1
        seen = np.unique(np.asarray(prompt_token_ids, dtype=np.int64)) if self._repels else np.empty(0, np.int64)
        biased = np.setdiff1d(np.fromiter(params.logit_bias, np.int64), seen)
        self._size = len(seen) + len(biased)
        self._token_ids: npt.NDArray[np.int64] = np.concatenate([seen, biased])
        self._divisors = np.ones(self._size, np.float32)
        """The repetition penalty of each token in the table."""
        self._divisors[: len(seen)] = params.repetition_penalty
        self._addends = np.zeros(self._size, np.float32)
        """Its bias, less what presence and frequency take off."""
        self._places = {token_id: place for place, token_id in enumerate(self._token_ids.tolist())}
        for token_id, bias in params.logit_bias.items():
            self._addends[self._places[token_id]] = bias
        self._counts: dict[int, int] = {}
        """How often each token occurs in the output, if a penalty counts it."""
        self._num_said = 0

    @property
    def changes_nothing(self) -> bool:
        """Whether no logit is ever divided or added to."""
        return not self._size and not self._repels and not self._counts_output

    def is_early(self, num_output: int) -> bool:
        """Whether tokens that end the answer are still kept out."""
        return bool(self.stops) and num_output < self._params.min_tokens

    def note(self, token_ids: Sequence[int], num_prompt: int) -> None:
        """Take note of the output so far: what follows the first ``num_prompt`` of all tokens. It only grows."""
        if self._repels or self._counts_output:
            for token_id in token_ids[num_prompt + self._num_said :]:
                self._say(token_id)
        self._num_said = len(token_ids) - num_prompt

    def _say(self, token_id: int) -> None:
        place = self._places.get(token_id)
        if place is None:
            place = self._places[token_id] = self._size
            self._make_room()
            self._token_ids[place], self._divisors[place], self._addends[place] = token_id, 1, 0
            self._size += 1
        params = self._params
        self._divisors[place] = params.repetition_penalty
        if self._counts_output:
            count = self._counts[token_id] = self._counts.get(token_id, 0) + 1
            penalty = params.presence_penalty + count * params.frequency_penalty
            self._addends[place] = params.logit_bias.get(token_id, 0.0) - penalty

    def _make_room(self) -> None:
        if self._size == len(self._token_ids):
            capacity = max(_FIRST_CAPACITY, 2 * self._size)
            self._token_ids, self._divisors, self._addends = (
                np.resize(self._token_ids, capacity),
                np.resize(self._divisors, capacity),
                np.resize(self._addends, capacity),
            )

    def table(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return ids of the tokens whose logits change, each once; divisors of their logits; and what is added after that."""
        size = self._size
        return self._token_ids[:size], self._divisors[:size], self._addends[:size]


def change(logits: Tensor, rows: Sequence[tuple[int, LogitChanges]]) -> None:
    """Divide by penalties (a negative logit is multiplied) and add what is to be added, in ``logits`` ``[B, vocab]``."""
    vocab = logits.shape[1]
    tables = [(row, *changes.table()) for row, changes in rows]
    places = np.concatenate([token_ids + row * vocab for row, token_ids, _, _ in tables] or [np.empty(0, np.int64)])
    if not len(places):
        return
    index = torch.from_numpy(places).to(logits.device)
    divisors = torch.from_numpy(np.concatenate([of_row for _, _, of_row, _ in tables])).to(logits.device)
    addends = torch.from_numpy(np.concatenate([of_row for _, _, _, of_row in tables])).to(logits.device)
    flat = logits.view(-1)
    values = flat.take(index)
    values = torch.where(values > 0, values / divisors, values * divisors).add_(addends)
    flat.index_copy_(0, index, values)


def keep_out(logits: Tensor, rows: Sequence[tuple[int, LogitChanges]]) -> None:
    """Give the tokens that end these rows' answers no chance, in ``logits`` ``[B, vocab]``."""
    vocab = logits.shape[1]
    places = [row * vocab + token_id for row, changes in rows for token_id in changes.stops]
    if places:
        logits.view(-1).index_fill_(0, torch.tensor(places, device=logits.device), float("-inf"))
