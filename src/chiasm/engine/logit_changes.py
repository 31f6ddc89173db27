"""How the logits of one choice are changed before a token is chosen: biases, penalties, and stops that come too early.

What the request fixes is in tensors that are made once. What the answer has said so far is counted token by token, so a
change takes the same few operators however many tokens are biased, stop the answer, or have been said.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from chiasm.engine.request import SamplingParams


class LogitChanges:
    """The changes for one choice. They are a function of the tokens so far, so they can be made anew anywhere."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        stop_token_ids: Collection[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        """``stop_token_ids`` end the answer; they are kept out before there are ``min_tokens``."""
        self._params = params
        self._bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            token_ids, values = zip(*params.logit_bias.items(), strict=True)
            self._bias = (
                torch.tensor(token_ids, device=device),
                torch.tensor(values, dtype=torch.float32, device=device),
            )
        self.stops: Tensor | None = None
        """Indices of the tokens that end the answer; None if it may end at once."""
        if params.min_tokens and stop_token_ids:
            self.stops = torch.tensor(sorted(stop_token_ids), device=device)
        self._seen: Tensor | None = None
        """``[vocab]``, bool: which tokens occur in prompt or answer; None without a repetition penalty."""
        if params.repetition_penalty != 1:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[torch.tensor(prompt_token_ids, dtype=torch.long, device=device)] = True
        self._counts: Tensor | None = None
        """``[vocab]``: how often each token occurs in the answer; None without the penalties that count it."""
        if params.presence_penalty or params.frequency_penalty:
            self._counts = torch.zeros(vocab_size, device=device)
        self._num_counted = 0

    def is_early(self, num_output: int) -> bool:
        """Whether tokens that end the answer are still kept out."""
        return self.stops is not None and num_output < self._params.min_tokens

    def changes(self, num_output: int) -> bool:
        """Whether the logits of the next token are changed at all."""
        return not (self._bias is None and self._seen is None and self._counts is None) or self.is_early(num_output)

    def apply(self, logits: Tensor, output_token_ids: Sequence[int]) -> None:
        """Add penalties and biases to ``logits``, ``[vocab]``, in place.

        Presence and frequency penalties count the output, as OpenAI's do; the repetition penalty (Keskar et al. 2019) counts
        prompt and output.
        """
        params = self._params
        self._count(output_token_ids)
        if self._seen is not None:
            penalty = params.repetition_penalty
            penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits.copy_(torch.where(self._seen, penalized, logits))
        if self._counts is not None:
            said = self._counts > 0
            logits -= said * params.presence_penalty + self._counts * params.frequency_penalty
        if self._bias is not None:
            token_ids, values = self._bias
            logits.index_add_(0, token_ids, values)

    def _count(self, output_token_ids: Sequence[int]) -> None:
        """Take note of the tokens that were said since the last call."""
        if self._seen is None and self._counts is None:
            return
        new = output_token_ids[self._num_counted :]
        self._num_counted += len(new)
        if not new:
            return
        indices = torch.tensor(new, device=self._device)
        if self._seen is not None:
            self._seen[indices] = True
        if self._counts is not None:
            self._counts.index_add_(0, indices, torch.ones(len(new), device=self._device))

    @property
    def _device(self) -> torch.device:
        counted = self._seen if self._seen is not None else self._counts
        assert counted is not None
        return counted.device
