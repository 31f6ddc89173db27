"""What goes into an engine and what comes out of it: requests, outputs, their costs, and counters."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from chiasm.errors import InvalidRequestError

if TYPE_CHECKING:
    from chiasm.ec_transfer import ECConnectorStats
    from chiasm.ec_transfer.stores.reader import StoreReads
    from chiasm.ec_transfer.stores.writer import StoreWrites
    from chiasm.engine.grammar import Grammar
    from chiasm.kv_transfer import KVConnectorStats
    from chiasm.models.base import Metadata, Pixels, Prompt
    from chiasm.wire import KVTransferParams, TokenLogprob

MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 16
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
"""In one stop string: what could become one is looked for with each token."""
MAX_BIASED_TOKENS = 300
"""Tokens in ``logit_bias``, as in OpenAI's API."""
MAX_STOP_TOKENS = 300
"""Tokens in ``stop_token_ids``."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; fields mean what they mean in OpenAI's API and in vLLM's extensions of it.

    Raises InvalidRequestError for a value out of range. ``temperature`` 0 is greedy; ``top_k`` 0 and -1 and ``seed`` None
    switch the feature off. ``logprobs`` is None (none wanted) or the number of candidates to report beside the chosen
    token; log probabilities are those of the model's raw logits.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    grammar: Grammar | None = None
    """What the answer must follow; it may end only where the grammar allows it. None if there is nothing to follow."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_tokens", 1, 1 << 31),
            ("min_tokens", 0, self.max_tokens),
            ("temperature", 0.0, 2.0),
            ("top_k", -1, 1 << 31),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("seed", -(1 << 63), (1 << 63) - 1),
            ("logprobs", 0, MAX_TOP_LOGPROBS),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InvalidRequestError(f"{name} must be between {low} and {high}, got {value}.", param=name)
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequestError(f"top_p must be above 0 and at most 1, got {self.top_p}.", param="top_p")
        if not 0.0 < self.repetition_penalty <= 10.0:
            raise InvalidRequestError(
                f"repetition_penalty must be above 0 and at most 10, got {self.repetition_penalty}.",
                param="repetition_penalty",
            )
        if len(self.stop) > MAX_STOP_STRINGS or any(not stop for stop in self.stop):
            raise InvalidRequestError(
                f"stop must have at most {MAX_STOP_STRINGS} strings, none of them empty.", param="stop"
            )
        if any(len(stop) > MAX_STOP_CHARACTERS for stop in self.stop):
            raise InvalidRequestError(f"A stop string may have at most {MAX_STOP_CHARACTERS} characters.", param="stop")
        if len(self.logit_bias) > MAX_BIASED_TOKENS:
            raise InvalidRequestError(f"logit_bias may have at most {MAX_BIASED_TOKENS} tokens.", param="logit_bias")
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise InvalidRequestError(
                f"stop_token_ids may have at most {MAX_STOP_TOKENS} tokens.", param="stop_token_ids"
            )
        if any(not -100 <= bias <= 100 for bias in self.logit_bias.values()):
            raise InvalidRequestError("logit_bias values must be between -100 and 100.", param="logit_bias")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InvalidRequestError for a token id that the vocabulary doesn't have."""
        for name in ("logit_bias", "stop_token_ids"):
            for token_id in getattr(self, name):
                if not 0 <= token_id < vocab_size:
                    raise InvalidRequestError(
                        f"{name}: token id {token_id} is not in the vocabulary of {vocab_size} tokens.", param=name
                    )

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


@dataclass(frozen=True)
class GenerateRequest:
    """One request to a language engine. The server has checked it; an engine asserts what it relies on."""

    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    deadline: float
    """``time.monotonic()`` at which it fails if it has not ended; includes the wait for embeddings."""
    part_of: str = ""
    """Names the client's request, whose prompts share its places; empty if this is all of it."""
    key: str = ""
    """Names the client's key: keys take turns. Empty if there are none."""
    work_tokens: float = 0.0
    """Work of all prompts of the client's request (:mod:`chiasm.engine.pace`), by which it is due; 0 if this is all of it."""
    num_choices: int = 1
    """Independent continuations (OpenAI's ``n``); choice ``i`` samples with ``seed + i``."""
    pixels: Mapping[str, Pixels] = field(default_factory=dict)
    """Preprocessed items by identifier, which an aggregated engine encodes; empty for the other roles."""
    cache_salt: str = ""
    """Requests with different salts share no KV blocks."""
    kv_transfer_params: KVTransferParams | None = None
    """What a prefill instance is asked to do, or the handle with which a decode instance continues; None in other roles.

    Its ``output_token_ids`` are part of the answer: they count towards ``max_tokens`` and every limit, as if sampled here.
    """


class ItemOutcome(enum.StrEnum):
    """How a request got the embedding of an item."""

    HIT = "hit"
    """It existed when the request was admitted: in memory, in the store, or as KV in the prefix cache."""
    WAITED = "waited"
    """It came later, within the deadline."""
    MISSED = "missed"
    """It never came; the request failed."""
    ENCODED = "encoded"
    """This instance encoded it (encoder and aggregated roles only)."""


@dataclass
class ItemTiming:
    """What one item of a request cost. Seconds."""

    identifier: str
    outcome: ItemOutcome
    wait_seconds: float = 0.0
    """From admission until the embedding was usable."""
    encode_seconds: float = 0.0


class Stall(NamedTuple):
    """A time during which a request could not continue."""

    at: float
    """From arrival."""
    seconds: float


@dataclass
class RequestTiming:
    """Where the time to the first token went. Seconds; None for what has not happened."""

    queue_seconds: float | None = None
    """From arrival to the first scheduled chunk, without waits for embeddings."""
    wait_seconds: float = 0.0
    """Time during which the request could not continue because an embedding was missing."""
    transfer_seconds: float = 0.0
    """Loading embeddings through the connector."""
    kv_seconds: float | None = None
    """From the allocation of blocks on a decode instance until the prompt's KV was in them."""
    encode_seconds: float = 0.0
    """Encoding on this instance (aggregated role), beside the prefill of what comes before the image, and within the waits."""
    prefill_seconds: float | None = None
    """From the first scheduled chunk to the first token, without waits and loads."""
    prefill_work_seconds: float = 0.0
    """Computing the prompt: of each step the part that belongs to its rows."""
    first_token_seconds: float | None = None
    """From arrival to the first token."""
    items: list[ItemTiming] = field(default_factory=list)
    prefill_at: float | None = None
    """From arrival to the first scheduled chunk."""
    stalls: list[Stall] = field(default_factory=list)
    """The first waits for embeddings, of which ``wait_seconds`` is the sum."""
    step_seconds: float | None = None
    """The engine's last step that only decoded, whatever sequences, if it ended while the request was here."""


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Output:
    """What one step added to one choice of a request."""

    index: int
    """Index of the choice."""
    token_ids: tuple[int, ...]
    text: str
    """Text that became certain in this step: whole characters, and nothing that may still become a stop string."""
    logprobs: tuple[TokenLogprob, ...] | None
    """One for each of ``token_ids``; None if the request asks for none."""
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    """The stop string or stop token that ended the choice; None for the model's own end of answer."""
    timing: RequestTiming
    """The timing of the whole request, filled in as it becomes known."""
    num_cached_tokens: int
    """Prompt tokens taken from the prefix cache."""
    already_sent: bool = False
    """Whether these tokens came with the request because the client has them: they count, but are not sent again."""
    kv_transfer_params: KVTransferParams | None = None
    """The handle with which a decode instance continues; only in a choice's last output (prefill role).

    ``finish_reason`` is then ``length``, as in vLLM, and ``text`` leaves out what may still become a stop string.
    """


@dataclass(frozen=True)
class EncodeItem:
    """One image for an encoder: the identifier to publish it under, and the image file.

    ``height`` and ``width`` are in pixels after rotation by EXIF, as :func:`chiasm.media.image.inspect` reports them.
    """

    identifier: str
    data: bytes
    height: int
    width: int


class StageStarts(NamedTuple):
    """When the stages of an image began, on the clock of ``time.monotonic``."""

    preprocess: float
    encode: float
    publish: float


@dataclass(frozen=True)
class EncodedItem:
    """The result of encoding one image."""

    identifier: str
    metadata: Metadata
    outcome: ItemOutcome
    """HIT or ENCODED."""
    preprocess_seconds: float
    encode_seconds: float
    publish_seconds: float
    queue_seconds: float
    began: StageStarts | None = None
    """When its stages began; None for a hit."""


@dataclass(frozen=True)
class EngineStats:
    """Counters since start and gauges of an engine, for the server's metrics. What does not apply to a role stays 0."""

    num_running: int = 0
    num_waiting: int = 0
    num_stalled: int = 0
    """Requests that wait for an embedding."""
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    prefix_cache_query_tokens: int = 0
    prefix_cache_hit_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    items: dict[ItemOutcome, int] = field(default_factory=dict)
    item_wait_seconds: float = 0.0
    encoder_cache_bytes: int = 0
    images_encoded: int = 0
    encode_seconds: float = 0.0
    ec: ECConnectorStats | None = None
    ec_store: StoreReads | StoreWrites | None = None
    """Of the store beside the connector."""
    kv: KVConnectorStats | None = None
