"""An image on its way through encoders, and a call that carries some to one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from chiasm.errors import ChiasmError, Code, EmbeddingUnavailableError
from chiasm.http.timing import TimingEntry
from chiasm.proxy.encode_plan import Entry
from chiasm.proxy.encode_queue import Feed
from chiasm.proxy.job import Job
from chiasm.proxy.media import Item
from chiasm.proxy.records.trail import EncodedAt, EncoderCall
from chiasm.proxy.upstream import RefusedError
from chiasm.proxy.waiting import none_healthy
from chiasm.wire import Role


class Flight:
    """The encoding of one image, for all requests that need it meanwhile. Compared by identity."""

    def __init__(self, item: Item, entry: Entry) -> None:
        self.item = item
        self.entry = entry
        """Its place in the queue."""
        self.waiters: set[Job] = set()
        self.metadata: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        # Marks a failure as seen, also if all waiters have left before it.
        self.metadata.add_done_callback(lambda future: future.cancelled() or future.exception())
        self.encode_seconds: float | None = None
        """The time that the encoder itself reports for its call."""
        self.published_at = 0.0
        """On the clock of ``time.monotonic``."""
        self.calls: list[Call] = []
        """The calls from which it is expected: none while it waits, and two while it is hedged. Language instances are told the
        place of the first one's encoder."""
        self.encoded: EncodedAt | None = None
        """By which call it was encoded."""
        self.attempts = 0
        self.has_met_full = False
        """Whether an encoder has refused it for want of room."""
        self.fault: ChiasmError | None = None
        """What was wrong at the last encoder that failed: its own error, if it has answered with one."""

    @property
    def for_trail(self) -> EncodedAt | None:
        """By which call it was encoded, or by which it is expected; None while it waits."""
        if self.encoded is not None or not self.calls:
            return self.encoded
        call = self.calls[0]
        return EncodedAt(EncoderCall(call.instance.address, call.started_at, None), call.flights.index(self))


class Call:
    """One HTTP request to one encoder. Compared by identity."""

    def __init__(self, feed: Feed, flights: list[Flight], started_at: float, *, is_hedge: bool = False) -> None:
        """``flights`` are in the order of the feed's entries."""
        self.instance = feed.encoder
        self.entries = feed.entries
        self.seconds = feed.seconds
        """What the encoder has to compute until its answer, as was estimated; 0 if it only looks up."""
        self.flights = flights
        self.started_at = started_at
        """On the clock of ``time.monotonic``."""
        self.is_hedge = is_hedge
        self.has_won = False
        """Whether it is a hedge and has answered first."""
        self.has_ended = False
        self.task: asyncio.Task[None] | None = None
        self.watch: asyncio.TimerHandle | None = None
        """Runs until it is late."""

    @property
    def is_needed(self) -> bool:
        """Whether any image is expected from it."""
        return any(self in flight.calls for flight in self.flights)

    def body(self, model: str | None) -> bytes:
        """Return the body of the request; ``model`` is what the client asked for."""
        models = self.instance.models
        if models and model not in models:
            model = models[0]
        pieces = [b'{"model":%b,"messages":[{"role":"user","content":[' % msgspec.json.encode(model)]
        for number, flight in enumerate(self.flights):
            pieces += (b"," if number else b"", *flight.item.image_url_pieces())
        return b"".join([*pieces, b']}],"max_tokens":1,"stream":false}'])

    def found(self, timing: Sequence[TimingEntry]) -> set[str] | None:
        """Return the identifiers of the images whose embeddings the encoder had already; None if it doesn't say."""
        outcomes = {one.name: one.description for one in timing if one.name.startswith("item")}
        names = [flight.item.identifier for flight in self.flights]
        return {name for index, name in enumerate(names) if outcomes.get(f"item{index}") == "hit"} if outcomes else None


def none_left(flight: Flight, waited_seconds: float = 0.0) -> Exception:
    """Return the error for an image that no encoder is left for."""
    if isinstance(flight.fault, RefusedError):
        return flight.fault  # it says why
    if not flight.attempts:
        return none_healthy(Role.ENCODER, waited_seconds)
    attempts = "one attempt" if flight.attempts == 1 else f"{flight.attempts} attempts"
    which = f"no encoder came back within {waited_seconds:g} s" if waited_seconds else "no other encoder is left"
    last = f" The last attempt: {flight.fault.message}" if flight.fault else ""
    return EmbeddingUnavailableError(
        f"An image could not be encoded in {attempts}, and {which}; try again.{last}",
        code=Code.ENCODER_LOST,
    )
