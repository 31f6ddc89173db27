"""One trial, simulated: requests arrive, are placed, encoded, prefilled and decoded, event by event.

The decisions are the product's own: the proxy's placement (``placing``) and the engine's scheduler (``language``). Only the
time that work takes is computed, by a cost model and by how devices are shared. Nothing is random, so equal requests give
equal results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from chiasm.bench.goodput import Limits
from chiasm.bench.traffic import PATIENCE, Arrival
from chiasm.errors import ConfigurationError
from chiasm.models.base import Prompt
from chiasm.plan.costs import CostModel, StepShape
from chiasm.plan.encoder import Encoder, QueuedImage
from chiasm.plan.events import Events
from chiasm.plan.language import Item, LanguageInstance, PlannedStep, made_up_prompt
from chiasm.plan.layouts import Candidate, PlannedInstance, limits_of
from chiasm.plan.outcome import Outcome, Result, tokens_of
from chiasm.plan.placing import Fed, Placing, Proxy, SentImage, reported
from chiasm.plan.shapes import ModelShape
from chiasm.plan.sharing import SharedDevice, Stage, Work
from chiasm.plan.store import Store, Stores
from chiasm.proxy.encode_plan import Entry
from chiasm.wire import Role

MAX_REQUESTS = 100_000
ENCODER_BYTES = 4 << 30
"""Embeddings that each encoder keeps, the default of ``chiasm serve`` where there is memory enough."""
_LOOK_UP_SECONDS = 0.002
"""A call to an encoder for an image whose embedding it has."""
_HOST_CORES = 8
"""Cores of a GPU's host that prepare images for it."""


@dataclass(eq=False)
class _Server:
    """An instance, with what the simulation knows of it."""

    planned: PlannedInstance
    device: SharedDevice
    costs: CostModel
    store: Store
    """What an encoder, or an instance that encodes itself, keeps."""
    language: LanguageInstance | None = None
    encoder: Encoder | None = None
    computing: bool = False


@dataclass(eq=False)
class _Request:
    """A request on its way."""

    name: str
    outcome: Outcome
    images: list[SentImage]
    prompt: Prompt
    limits: Limits | None
    placing: Placing | None = None
    server: int = -1
    """Where its language part is now."""
    missing: set[str] = field(default_factory=set)
    work_seconds: float = 0.0
    """Computing its prompt."""
    prefilled_at: _Server | None = None
    """The prefill instance that holds its KV for a decode instance."""
    tokens: int = 0
    over: bool = False


@dataclass(eq=False)
class _Flight:
    """An image that is waiting for an encoder or being encoded, and the requests that need it."""

    image: SentImage
    waiters: list[_Request] = field(default_factory=list)
    entry: Entry | None = None


class Simulation:
    """One trial with one candidate."""

    def __init__(
        self,
        candidate: Candidate,
        shape: ModelShape,
        costs: Sequence[CostModel],
        arrivals: Sequence[Arrival],
        *,
        limits: Mapping[str, Limits] | None = None,
        forced: Mapping[int, int] | None = None,
    ) -> None:
        """``costs`` are those of the candidate's places. With ``limits``, by size class, clients give up as those of the
        benchmark do. ``forced`` are language instances by the number of a request, to see what another choice would bring.
        Raises DoesNotFitError, and ConfigurationError for too many requests.
        """
        if len(arrivals) > MAX_REQUESTS:
            raise ConfigurationError(
                f"There are {len(arrivals)} requests, and a simulation takes at most {MAX_REQUESTS}; give a part of the trace."
            )
        self._arrivals = arrivals
        self._shape = shape
        self._limits = limits
        self._forced = forced or {}
        self._events = Events()
        self._proxy = Proxy(candidate, shape, costs)
        self._devices = [
            SharedDevice(place.cores, busy_factor=cost.busy_factor)
            for place, cost in zip(candidate.places, costs, strict=True)
        ]
        self._on_gpus = candidate.on_gpus
        self._host = SharedDevice(_HOST_CORES * len(candidate.places))
        self._servers = self._make_servers(candidate, costs)
        self._at_encoders = Stores([one.store for one in self._servers if one.language is None])
        self._requests: dict[str, _Request] = {}
        self._flights: dict[str, _Flight] = {}

    def _make_servers(self, candidate: Candidate, costs: Sequence[CostModel]) -> list[_Server]:
        longest = max((tokens_of(arrival.shape, self._shape) for arrival in self._arrivals), default=1)
        servers: list[_Server] = []
        for planned, limits in zip(candidate.instances, limits_of(candidate, self._shape, longest), strict=True):
            device, cost = self._devices[planned.place], costs[planned.place]
            own = planned.role is Role.AGGREGATED
            server = _Server(planned, device, cost, Store(ENCODER_BYTES))
            if limits is not None:
                known = reported(planned, self._shape, cost, limits.device_type)
                server.language = LanguageInstance(planned.role, limits, known)
                if own:
                    server.store = Store(limits.encoder_cache_bytes)
            if limits is None or own:
                server.encoder = self._make_encoder(planned, device, cost)
            servers.append(server)
        return servers

    def _make_encoder(self, planned: PlannedInstance, device: SharedDevice, cost: CostModel) -> Encoder:
        host = self._host if self._on_gpus else device
        return Encoder(
            cost,
            threads=planned.threads,
            weight=planned.encoder_weight,
            adapts=planned.adapts,
            clock=lambda: self._events.now,
            prepare=lambda work: self._events.begin(host, work),
            begin=lambda work: self._events.begin(device, work),
        )

    # ---- the loop --------------------------------------------------------------------------------------------------------

    def run(self, rate: float) -> Result:
        """Simulate the requests, whose times are scaled to ``rate`` per second. Raises ConfigurationError if it doesn't end."""
        outcomes = [self._schedule_arrival(number, arrival, rate) for number, arrival in enumerate(self._arrivals)]
        self._events.run()
        ends = [outcome.arrival + (outcome.end or outcome.first_token or 0.0) for outcome in outcomes]
        seconds = max(ends, default=0.0) - (outcomes[0].arrival if outcomes else 0.0)
        time = max(seconds, 1e-9) * len(self._devices)
        busy = {stage: sum(device.busy_seconds[stage] for device in self._devices) / time for stage in Stage}
        preemptions = sum(server.language.preemptions for server in self._servers if server.language)
        return Result(outcomes, seconds, busy, preemptions, self._events.count)

    # ---- a request arrives -------------------------------------------------------------------------------------------------

    def _schedule_arrival(self, number: int, arrival: Arrival, rate: float) -> Outcome:
        shape, when = arrival.shape, arrival.time / rate
        outcome = Outcome(shape, when)
        names = shape.image_ids or tuple(f"{number} {place}" for place in range(len(shape.images)))
        images = [SentImage(name, height, width) for name, (width, height) in zip(names, shape.images, strict=True)]
        limits = None if self._limits is None else self._limits[shape.size_class]

        def arrive() -> None:
            items = [Item(image.identifier, self._shape.tokens_of(image.height, image.width)) for image in images]
            prompt = made_up_prompt(number, items, shape.prompt_tokens)
            outcome.prompt_tokens = len(prompt.token_ids)
            self._place(_Request(f"r{number}", outcome, images, prompt, limits), self._forced.get(number))

        self._events.at(when, arrive)
        return outcome

    def _place(self, request: _Request, only: int | None) -> None:
        placing = request.placing = self._proxy.place(
            self._events.now, request.outcome.shape.prompt_tokens, request.images, only=only
        )
        if placing is None:
            self._refuse(request)
            return
        self._requests[request.name] = request
        request.server = request.outcome.instance = placing.server
        if request.limits is not None:
            self._give_up_at(request, self._events.now + PATIENCE * request.limits.ttft_seconds, unless_begun=True)
        if not placing.encodes_itself:
            self._ask_encoders(request, placing)
        server = self._servers[placing.server]
        self._serve(server, server.costs.request_seconds, lambda: self._admit(request))
        self._feed()

    def _serve(self, server: _Server, seconds: float, done: Callable[[], None] = lambda: None) -> None:
        """Do what one core of the machine has to do for requests or tokens."""
        if seconds:
            device = self._host if self._on_gpus else server.device
            self._events.begin(device, Work(lambda threads: seconds, done, Stage.SERVE))
        else:
            self._events.after(0.0, done)

    def _admit(self, request: _Request) -> None:
        """Bring the request to its language instance."""
        server = self._servers[request.server]
        assert server.language is not None
        if request.over:
            return
        if not server.language.add(
            request.name, request.prompt, request.outcome.shape.answer_tokens, now=self._events.now
        ):
            self._refuse(request)
            return
        if server.encoder is not None:
            self._encode_inside(request, server)
        self._step(server)

    # ---- images ------------------------------------------------------------------------------------------------------------

    def _ask_encoders(self, request: _Request, placing: Placing) -> None:
        """Let the images of a request wait for encoders, except those that are on their way already."""
        fresh: list[SentImage] = []
        for image in request.images:
            if image.identifier in request.missing:
                continue
            request.missing.add(image.identifier)
            flight = self._flights.get(image.identifier)
            if flight is None:
                self._flights[image.identifier] = _Flight(image, [request])
                fresh.append(image)
            else:
                flight.waiters.append(request)
                if flight.entry is not None:
                    self._proxy.hasten(flight.entry, placing)
        self._proxy.queue(placing, fresh)
        for image in fresh:
            self._flights[image.identifier].entry = placing.entries[image.identifier]

    def _feed(self) -> None:
        """Give encoders the images that they get now."""
        for fed in self._proxy.feed(self._events.now):
            self._call_encoder(fed)

    def _call_encoder(self, fed: Fed) -> None:
        server = self._servers[fed.server]
        encoder = server.encoder
        assert encoder is not None
        remaining = len(fed.entries)
        computed = 0.0
        found: set[str] = set()

        def answered(entry: Entry, hit: bool, seconds: float) -> None:
            nonlocal remaining, computed
            remaining -= 1
            computed += seconds
            if hit:
                found.add(entry.item.identifier)
            self._published(entry.item.identifier, server, hit=hit)
            if remaining == 0:
                self._proxy.encoded(fed.entries, self._events.now, seconds=computed, found=found)
                for one in fed.entries:
                    self._land(one.item.identifier)
                self._feed()

        for entry in fed.entries:
            identifier = entry.item.identifier
            if identifier in server.store:
                server.store.touch(identifier)
                self._events.after(_LOOK_UP_SECONDS, partial(answered, entry, True, 0.0))
                continue
            image = self._flights[identifier].image
            encoder.add(QueuedImage(identifier, image.height, image.width, partial(answered, entry, False)))

    def _published(self, identifier: str, server: _Server, *, hit: bool) -> None:
        """Let the embedding become usable after its transfer."""
        image = self._flights[identifier].image
        tokens = self._shape.tokens_of(image.height, image.width)
        seconds = 0.0 if hit else server.costs.embedding_seconds(tokens)
        flight = self._flights[identifier]

        def usable() -> None:
            server.store.add(identifier, tokens * self._shape.entry_bytes_per_row)
            for request in flight.waiters:
                request.outcome.moved += seconds
                self._arrived(request, identifier)
                self._step(self._servers[request.server])

        self._events.after(seconds, usable)

    def _land(self, identifier: str) -> None:
        """An encoder's call has ended, so requests that come now ask again."""
        flight = self._flights.pop(identifier)
        for request in flight.waiters:
            placing = request.placing
            if placing is not None and not any(image.identifier in self._flights for image in request.images):
                self._proxy.embedded(placing)

    def _arrived(self, request: _Request, identifier: str) -> None:
        request.missing.discard(identifier)
        if not request.missing and not request.outcome.embedded:
            request.outcome.embedded = self._events.now - request.outcome.arrival

    def _encode_inside(self, request: _Request, server: _Server) -> None:
        """Have an aggregated instance encode what it doesn't have."""
        assert server.encoder is not None
        assert server.language is not None
        for image in request.images:
            if image.identifier in request.missing:
                continue
            if image.identifier in server.store:
                server.store.touch(image.identifier)
                continue
            request.missing.add(image.identifier)
            key = f"{request.server} {image.identifier}"
            flight = self._flights.get(key)
            if flight is not None:
                flight.waiters.append(request)
                continue
            flight = self._flights[key] = _Flight(image, [request])
            done = self._encoded_inside(flight, key, server)
            server.encoder.add(
                QueuedImage(key, image.height, image.width, done, due=server.language.due_of(request.name))
            )

    def _encoded_inside(self, flight: _Flight, key: str, server: _Server) -> Callable[[float], None]:
        def done(seconds: float) -> None:
            image = flight.image
            tokens = self._shape.tokens_of(image.height, image.width)
            server.store.add(image.identifier, tokens * self._shape.entry_bytes_per_row)
            del self._flights[key]
            for request in flight.waiters:
                self._arrived(request, image.identifier)
            self._step(server)

        return done

    # ---- steps -------------------------------------------------------------------------------------------------------------

    def _step(self, server: _Server) -> None:
        """Start the next step of a language instance that computes nothing now."""
        language = server.language
        if language is None or server.computing:
            return
        planned = language.plan(server.store if server.encoder is not None else self._at_encoders, self._events.now)
        for name in planned.load:
            self._pull(self._requests[name], server)
        if not planned.runs:
            return
        server.computing = True
        started = self._events.now

        def ended() -> None:
            server.computing = False
            self._complete(server, planned, self._events.now - started)
            self._step(server)

        stage = Stage.PREFILL if planned.prefills else Stage.DECODE
        work = Work(
            lambda threads: server.costs.step_seconds(planned.shape, threads),
            ended,
            stage,
            max_threads=server.planned.threads if self._pays(server, planned.shape) else 1,
            adapts=server.planned.adapts,
        )
        self._events.begin(server.device, work)

    def _pays(self, server: _Server, shape: StepShape) -> bool:
        """Tell whether a step's layers are large enough for several threads, as the engine does."""
        from chiasm.engine.core_sharing import LEAST_LAYER_SECONDS

        return server.costs.step_seconds(shape, 1) / self._shape.language.layers >= LEAST_LAYER_SECONDS

    def _complete(self, server: _Server, planned: PlannedStep, seconds: float) -> None:
        assert server.language is not None
        outcome = server.language.complete(planned, seconds, self._events.now)
        for name, of_prompt in outcome.prompt_seconds.items():
            if name in self._requests:
                self._requests[name].work_seconds += of_prompt
        if outcome.tokens:
            self._serve(server, len(outcome.tokens) * server.costs.token_seconds)
        for name in outcome.tokens:
            self._token(self._requests[name])
        for name in outcome.ended:
            request = self._requests[name]
            if request.tokens < request.outcome.shape.answer_tokens:
                self._hand_over(request, server)
            else:
                self._end(request)
        if outcome.tokens or outcome.ended:
            self._feed()

    def _token(self, request: _Request) -> None:
        request.tokens += 1
        if request.tokens > 1:
            return
        outcome, placing = request.outcome, request.placing
        assert placing is not None
        outcome.first_token = self._events.now - outcome.arrival
        self._proxy.first_token(
            placing, self._events.now, work_seconds=request.work_seconds, prompt_tokens=outcome.prompt_tokens
        )
        later = outcome.shape.answer_tokens - 1
        if request.limits is not None and later:
            self._give_up_at(request, self._events.now + PATIENCE * request.limits.tpot_seconds * later)

    def _hand_over(self, request: _Request, prefill: _Server) -> None:
        """Bring a request whose prompt was computed to a decode instance."""
        assert request.placing is not None
        self._proxy.end(request.placing, self._events.now)
        chosen = self._proxy.choose_decode(request.placing)
        decode = self._servers[chosen] if chosen is not None else None
        if (
            chosen is None
            or decode is None
            or decode.language is None
            or not decode.language.add(
                request.name, request.prompt, request.outcome.shape.answer_tokens, now=self._events.now, remote=True
            )
        ):
            self._free_prefilled(request, prefill)
            self._refuse(request)
            return
        request.prefilled_at = prefill
        request.server = chosen
        self._step(decode)

    def _pull(self, request: _Request, decode: _Server) -> None:
        """Move the KV of a request to a decode instance that has room for it."""
        prefill = request.prefilled_at
        assert prefill is not None
        seconds = prefill.costs.kv_seconds(len(request.prompt.token_ids))
        request.outcome.moved += seconds

        def moved() -> None:
            assert decode.language is not None
            self._free_prefilled(request, prefill)
            decode.language.loaded(request.name)
            self._step(decode)

        self._events.after(seconds, moved)

    def _free_prefilled(self, request: _Request, prefill: _Server) -> None:
        assert prefill.language is not None
        prefill.language.blocks_read(request.name)
        request.prefilled_at = None
        self._step(prefill)

    # ---- ends --------------------------------------------------------------------------------------------------------------

    def _end(self, request: _Request) -> None:
        outcome = request.outcome
        outcome.end = self._events.now - outcome.arrival
        self._forget(request)

    def _refuse(self, request: _Request) -> None:
        request.outcome.refused = True
        self._forget(request)

    def _give_up_at(self, request: _Request, when: float, *, unless_begun: bool = False) -> None:
        """Let the client leave at a time if the answer isn't complete; ``unless_begun``: if it has no token."""

        def give_up() -> None:
            if request.over or (unless_begun and request.tokens):
                return
            request.outcome.given_up = True
            server = self._servers[request.server]
            self._forget(request)
            assert server.language is not None
            server.language.abort(request.name)
            if request.prefilled_at is not None:
                self._free_prefilled(request, request.prefilled_at)
            self._step(server)
            self._feed()

        self._events.at(when, give_up)

    def _forget(self, request: _Request) -> None:
        request.over = True
        self._requests.pop(request.name, None)
        for identifier in request.missing:
            self._leave(request, identifier)
        if request.placing is not None:
            self._proxy.end(request.placing, self._events.now)

    def _leave(self, request: _Request, identifier: str) -> None:
        """Drop an image that only this request has waited for, unless it is being encoded."""
        server = self._servers[request.server]
        key = f"{request.server} {identifier}" if server.encoder is not None else identifier
        flight = self._flights.get(key)
        if flight is None or request not in flight.waiters:
            return
        flight.waiters.remove(request)
        if flight.waiters:
            return
        if server.encoder is not None:
            if server.encoder.drop(key):
                del self._flights[key]
        elif flight.entry is not None and flight.entry.encoder is None:
            self._proxy.discard(flight.entry, self._events.now)
            del self._flights[key]
