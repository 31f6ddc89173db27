"""What goes into the engine and what comes out of it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from chiasm.errors import InvalidRequestError

if TYPE_CHECKING:
    from chiasm.models.base import Metadata, Pixels, Prompt
    from chiasm.wire import KVTransferParams

MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 16
MAX_STOP_STRINGS = 16


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, with OpenAI's meanings and vLLM's extensions. Raises InvalidRequestError when out of range.

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``seed`` None switch those off. ``logprobs`` is None (none wanted) or
    the number of alternatives to report beside the chosen token. Log probabilities are those of the model's raw logits.
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
                raise InvalidRequestError(f"{name} must be between {low} and {high}, got {value}", param=name)
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequestError(f"top_p must be above 0 and at most 1, got {self.top_p}", param="top_p")
        if not 0.0 < self.repetition_penalty <= 10.0:
            raise InvalidRequestError(
                f"repetition_penalty must be above 0 and at most 10, got {self.repetition_penalty}",
                param="repetition_penalty",
            )
        if len(self.stop) > MAX_STOP_STRINGS or any(not stop for stop in self.stop):
            raise InvalidRequestError(f"stop takes at most {MAX_STOP_STRINGS} strings, none empty", param="stop")
        if any(not -100 <= bias <= 100 for bias in self.logit_bias.values()):
            raise InvalidRequestError("logit_bias values must be between -100 and 100", param="logit_bias")

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


@dataclass(frozen=True)
class GenerateRequest:
    """One request to the language model."""

    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    deadline: float
    """``time.monotonic()`` at which it fails if it has not ended; the wait for embeddings counts towards it."""
    num_choices: int = 1
    """Independent continuations (OpenAI's ``n``); choice ``i`` samples with ``seed + i`` where a seed is given."""
    pixels: Mapping[str, Pixels] = field(default_factory=dict)
    """Preprocessed items by identifier; an aggregated engine encodes them, a PD takes none."""
    cache_salt: str = ""
    """Requests of different salts share no KV blocks."""
    kv_transfer_params: KVTransferParams | None = None
    """What a prefill instance is to do, or the handle that a decode instance goes on from; None for the other roles.

    Its ``output_token_ids`` are part of the answer: they count towards ``max_tokens`` and every limit, as if sampled here.
    """


class ItemOutcome(enum.StrEnum):
    """How an item's embedding became usable."""

    HIT = "hit"
    """It was there when the request was admitted: in memory, in the connector, or its KV in the prefix cache."""
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


@dataclass
class RequestTiming:
    """Where the time to the first token went. Seconds; None where it did not happen (yet)."""

    queue_seconds: float | None = None
    """From arrival to the first scheduled chunk, time spent waiting for embeddings aside."""
    wait_seconds: float = 0.0
    """In which the request could not go on for want of an embedding."""
    transfer_seconds: float = 0.0
    """Loading embeddings through the connector."""
    kv_seconds: float | None = None
    """From arrival at a decode instance until the prompt's KV was in its blocks, time in the queue aside."""
    encode_seconds: float = 0.0
    """Encoding here (aggregated role)."""
    prefill_seconds: float | None = None
    """From the first scheduled chunk to the first token, waits and encoding aside."""
    first_token_seconds: float | None = None
    """From arrival to the first token."""
    items: list[ItemTiming] = field(default_factory=list)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probability of one chosen token and of the most likely alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Output:
    """What one step added to one choice of a request."""

    index: int
    """Which choice."""
    token_ids: tuple[int, ...]
    text: str
    """Text that became certain in this step: whole characters, and nothing that may still turn into a stop string."""
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    """The stop string or stop token that ended the choice; None for the model's own end of answer."""
    timing: RequestTiming
    """Of the whole request, filled in as far as known."""
    num_cached_tokens: int
    """Prompt tokens taken from the prefix cache."""
    already_sent: bool = False
    """These tokens came with the request, and the client has them: they count, and are not sent again."""
    kv_transfer_params: KVTransferParams | None = None
    """The handle with which the answer goes on at a decode instance; only with a choice's last output (prefill role).

    ``finish_reason`` is ``length`` then, as in vLLM, and ``text`` leaves out what may still become a stop string.
    """


@dataclass(frozen=True)
class EncodeItem:
    """One image for an encoder: the identifier to publish under, and a file that was found to be an image.

    ``height`` and ``width`` are what ``chiasm.media.image.inspect`` says of it, in pixels after rotation by EXIF.
    """

    identifier: str
    data: bytes
    height: int
    width: int


@dataclass(frozen=True)
class EncodedItem:
    """What an encoder answers for one item."""

    identifier: str
    metadata: Metadata
    outcome: ItemOutcome
    """HIT or ENCODED."""
    preprocess_seconds: float
    encode_seconds: float
    publish_seconds: float
    queue_seconds: float
