"""What travels between proxy, P and D about a request's KV: the field ``kv_transfer_params``.

The first group of fields is vLLM's. The second is chiasm's own: it lets D go on from the token that P sampled, and lets an
answer go on elsewhere when an instance dies in the middle of it. A message that has the first group alone is understood as
vLLM understands it.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

MAX_BLOCKS = 1 << 20
Name = Annotated[str, msgspec.Meta(max_length=256)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class TokenLogprob(msgspec.Struct, array_like=True, frozen=True):
    """Log probability of a sampled token, and the likeliest candidates as (token id, log probability), best first."""

    logprob: float
    top: list[tuple[TokenId, float]]


class KVTransferParams(msgspec.Struct, omit_defaults=True, kw_only=True):
    """To P: ``do_remote_decode``, with ``continues`` and what was generated already. From P, and to D: a handle."""

    do_remote_prefill: bool = False
    """To D: the prompt's KV lies at a P."""
    do_remote_decode: bool = False
    """To P: compute the prompt and one token, and hold the KV for whoever comes with the handle."""
    remote_engine_id: Name | None = None
    remote_block_ids: Annotated[list[TokenId], msgspec.Meta(max_length=MAX_BLOCKS)] | None = None
    remote_host: Name | None = None
    remote_port: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)] | None = None
    remote_request_id: Name | None = None
    tp_size: int = 1

    continues: bool = False
    """Whoever sends this relays the answer as part of one longer answer. P: the request's ``max_tokens`` and ``stream`` are the
    client's own, and no handle comes back if the first token ends the answer. D: tokens are announced in the stream."""
    num_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Tokens, from the first of the prompt, whose keys and values are in ``remote_block_ids``."""
    digest: Name = ""
    """Hex; names those tokens and the items among them. D compares it with its own."""
    output_token_ids: list[TokenId] = msgspec.field(default_factory=list)
    """What was sampled so far, the prompt's continuation. Empty where D is to sample the first token itself."""
    output_logprobs: list[TokenLogprob] = msgspec.field(default_factory=list)
    """Of those tokens, where the request asks for them; empty otherwise."""
    num_sent: Annotated[int, msgspec.Meta(ge=0)] = 0
    """How many of ``output_token_ids``, from the first, the client has already."""
    seed: int | None = None
    """Of the sampling: the request's own or the one that P drew."""
    created: int | None = None
    """Unix time of the answer's beginning."""
    cached_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Prompt tokens that the first P found in its prefix cache."""
    prompts: Annotated[list[KVTransferParams], msgspec.Meta(max_length=1024)] = msgspec.field(default_factory=list)
    """Of a request with several prompts: one handle each, in order; all other fields are unset then."""
