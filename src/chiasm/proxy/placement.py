"""Which language instance gets a request, and which encoder an image and when: where the first token is earliest.

A pure state machine: no clock and no I/O. Instants are seconds on the caller's clock. The proxy drives it with what happens,
``chiasm plan`` with what it simulates:

1. :meth:`Placement.place` chooses the language instance and estimates the time to the first token.
2. :meth:`Placement.queue` lets the images wait for encoders, unless the instance encodes them itself.
3. ``Placement.images.feed`` says which images go to which encoder now. Call it after every event.
4. ``images.finish`` when an encoder has answered; :meth:`Placement.first_token` and :meth:`Placement.end` when the language
   instance has begun and ended its answer. What they report corrects the costs that the next estimates rest on.

:meth:`Placement.note_load` takes what an instance says about its load, by which several proxies know of each other's work.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from chiasm.due import due
from chiasm.proxy.agreement import PROMPT_ROLES
from chiasm.proxy.costs import Correction
from chiasm.proxy.encode_plan import HINDRANCE, Device, Entry
from chiasm.proxy.encode_queue import EncodeQueue
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.hedging import HEDGED_SHARE
from chiasm.proxy.instance import Instance
from chiasm.proxy.prompts import ItemWork, Prompt, Work
from chiasm.wire import Role

_ALIKE = 0.02
"""Among instances whose estimates differ by less than this share, the one with the fewest requests gets the next."""
_ALIKE_SECONDS = 0.0005
_DELAY = 0.05
"""What a second by which a prompt that is due later is delayed counts against a second until a first token."""
_BYTES_PER_TOKEN = 4.0
_REQUEST_TOKENS = 16
"""Tokens that a chat template adds to a prompt."""
_IDLE = Device()
_ENCODES_ITSELF = (Role.AGGREGATED,)


class Placed:
    """A request at a language instance. Compared by identity."""

    def __init__(
        self, instance: Instance, prompt: Prompt, estimate_seconds: float, ready_seconds: Sequence[float]
    ) -> None:
        self.instance = instance
        self.prompt = prompt
        self.estimate_seconds = estimate_seconds
        """From the decision to the first token."""
        self.ready_seconds = ready_seconds
        """From the decision until the embedding of each image is published; empty if the instance encodes them itself."""
        self.cached = 0
        """Images, from the first, whose KV its prefix cache was expected to hold."""
        self.was_alone = False
        """Whether the instance had nothing else to do, and no image to wait for."""


class _Estimate(NamedTuple):
    instance: Instance
    first_token_seconds: float
    """From now."""
    own_seconds: float
    """What the instance computes for it until then."""
    last_seconds: float
    """The part of it that is left when it has all embeddings but the last."""
    hindered_seconds: float
    """What that costs others, as it counts in the choice."""
    ready_seconds: Sequence[float]
    cached_items: int

    @property
    def score(self) -> float:
        return self.first_token_seconds + self.hindered_seconds


class Placement:
    """One for the fleet."""

    def __init__(self, fleet: Fleet, hedged_share: float = HEDGED_SHARE) -> None:
        """``hedged_share`` of the calls to encoders may be hedged."""
        self._fleet = fleet
        self._text = Correction()
        """Tokens per byte of text."""
        self.images = EncodeQueue(fleet, self._devices, hedged_share)

    # ---- decisions -----------------------------------------------------------------------------------------------------

    def due(self, work: Work, now: float) -> float:
        """Return when a request is due, by the work that it is for the fastest instances."""
        language = self._fleet.healthy(*PROMPT_ROLES)
        per_token = min((one.costs.prefill_seconds_per_token(now) for one in language), default=0.0)
        seconds = per_token * self._tokens(language[0], work, now) if language else 0.0
        for item in work.items:
            if self._fleet.healthy(Role.ENCODER):
                seconds += self.images.cost(item, now)
            else:
                seconds += min((one.costs.encode_seconds(item.pixels, now) for one in language), default=0.0)
        return due(work.arrival, seconds)

    def place(
        self,
        work: Work,
        roles: Sequence[Role],
        now: float,
        *,
        model: str | None = None,
        exclude: Collection[Instance] = (),
    ) -> Placed | None:
        """Give a request to the instance of these roles where its first token is earliest; None if none is healthy.

        The caller reports its first token and its end.
        """
        candidates = self._fleet.candidates(*roles, model=model, exclude=exclude)
        if not candidates:
            return None
        due = self.due(work, now)
        plan = self.images.plan(due, now) if work.items else None
        ready = plan.ready_seconds(work.items) if plan else []
        devices = plan.devices if plan else self._devices(now)
        estimates = [self._estimate(instance, work, due, ready, devices, now) for instance in candidates]
        best = min(one.score for one in estimates)
        limit = best + max(_ALIKE * best, _ALIKE_SECONDS) if best < math.inf else best
        alike = [one for one in estimates if one.score <= limit]
        chosen = min(alike, key=lambda one: (len(one.instance.prompts), one.instance.last_taken))
        expected_at = now + chosen.first_token_seconds
        is_seen = work.streams or chosen.instance.role is Role.PREFILL
        prompt = Prompt(work, due, chosen.own_seconds, expected_at, is_seen=is_seen)
        prompt.waits = len(chosen.ready_seconds) > chosen.cached_items
        prompt.last_seconds = chosen.last_seconds
        prompt.ready_at = now + max(chosen.ready_seconds, default=0.0)
        chosen.instance.prompts.add(prompt, now)
        placed = Placed(chosen.instance, prompt, chosen.first_token_seconds, chosen.ready_seconds)
        placed.cached = chosen.cached_items
        placed.was_alone = (
            not work.items and chosen.first_token_seconds == chosen.own_seconds and not chosen.hindered_seconds
        )
        return placed

    def queue(self, placed: Placed, items: Sequence[ItemWork]) -> list[Entry]:
        """Let images of a placed request wait for encoders, and return what :attr:`images` knows them by."""
        entries = [Entry(item, placed.prompt.due, request=placed, language=placed.instance) for item in items]
        for entry in entries:
            self.images.add(entry)
        return entries

    def note_load(self, instance: Instance, now: float) -> None:
        """Take what a language instance has said about its load, by which this proxy knows of the work of others."""
        if instance.said_load is not None and instance.role in PROMPT_ROLES:
            instance.prompts.note_load(instance.said_load.outstanding_seconds, now)

    # ---- outcomes ------------------------------------------------------------------------------------------------------

    def embedded(self, placed: Placed) -> None:
        """Note that all embeddings of a request have been published."""
        placed.prompt.waits = False

    def first_token(
        self,
        placed: Placed,
        now: float,
        *,
        seconds: float | None = None,
        prefill_seconds: float | None = None,
        work_seconds: float | None = None,
        prompt_tokens: int | None = None,
        cached_tokens: int = 0,
    ) -> None:
        """Note that an instance has begun its answer, and what it reports of its work.

        ``work_seconds`` is what computing the prompt has cost. An instance that doesn't know it tells ``prefill_seconds``, how
        long that took beside others. From one that tells neither, ``seconds`` since the decision say it, if it had nothing else
        to do.
        """
        instance, work = placed.instance, placed.prompt.work
        if work_seconds is None and prefill_seconds is not None:
            work_seconds = prefill_seconds / instance.costs.slowdown(instance.prompts.streams)
        instance.prompts.begin_stream(placed.prompt, now)
        if work_seconds is None and seconds is not None and placed.was_alone:
            instance.costs.prefill.learn(seconds, placed.prompt.seconds / instance.costs.prefill.factor(now), now)
        if prompt_tokens is None:
            return
        if placed.cached and not cached_tokens:
            instance.prompts.forget_prefixes(work.prefixes[: placed.cached])
        if not work.items or instance.costs.reported.images:  # else a guess at the tokens of images would count as text
            image_tokens = sum(instance.costs.image_tokens(item.pixels) for item in work.items)
            self._text.learn(prompt_tokens - image_tokens, self._text_tokens(work.text_bytes), now)
        if work_seconds is not None:
            instance.costs.learn_prefill(prompt_tokens - cached_tokens, work_seconds, now)

    def end(self, placed: Placed, now: float) -> None:
        """Note that an answer has ended or failed."""
        placed.instance.prompts.remove(placed.prompt, now)

    # ---- estimates -----------------------------------------------------------------------------------------------------

    def _estimate(
        self,
        instance: Instance,
        work: Work,
        due: float,
        ready_seconds: Sequence[float],
        devices: Mapping[str, Device],
        now: float,
    ) -> _Estimate:
        prompts, costs = instance.prompts, instance.costs
        cached = prompts.cached_items(work.prefixes)
        ready = () if instance.role in _ENCODES_ITSELF else ready_seconds
        text_tokens = self._text.factor(now) / _BYTES_PER_TOKEN
        # vLLM computes prompts in the order in which they come.
        ready_at = now + ready[cached] if cached < len(ready) else now
        ahead = prompts.ahead(math.inf if instance.is_vllm else due, now, ready_at)
        seconds = ahead.seconds + prompts.others_seconds(now)
        per_token = costs.prefill_seconds_per_token(now) * costs.slowdown(prompts.streams + ahead.prompts)
        if ahead.later or not seconds:  # the step that is being computed ends half a step later, on average
            seconds += costs.step_seconds(prompts.streams, ahead.later_seconds, now) / 2
        own = 0.0
        text_bytes = work.prefixes[cached - 1].text_bytes if cached else 0
        for index in range(cached, len(work.items)):
            item = work.items[index]
            before = work.prefixes[index].text_bytes if work.prefixes else 0
            text = (before - text_bytes) * text_tokens * per_token
            text_bytes = before
            seconds += text
            if ready:
                seconds = max(seconds, ready[index] + costs.transfer_seconds)
            else:
                encode = costs.encode_seconds(item.pixels, now)
                seconds += encode
                own += encode
            image = costs.image_tokens(item.pixels) * per_token
            seconds += image
            own += text + image
        last = costs.image_tokens(work.items[-1].pixels) * per_token if work.items else 0.0
        rest = (work.text_bytes - text_bytes) * text_tokens + _REQUEST_TOKENS
        seconds += rest * per_token
        own += rest * per_token
        device = devices.get(instance.device_id)
        if device is not None:
            seconds += device.without(prompts.seconds_computing(now)).delay(own)
        streams = prompts.streams if device is None else device.streams
        hindered = own * (ahead.later * _DELAY + streams * HINDRANCE)
        return _Estimate(instance, seconds, own, last + rest * per_token, hindered, ready, cached)

    def _tokens(self, instance: Instance, work: Work, now: float) -> float:
        images = sum(instance.costs.image_tokens(item.pixels) for item in work.items)
        return images + self._text_tokens(work.text_bytes) * self._text.factor(now) + _REQUEST_TOKENS

    def _text_tokens(self, size_bytes: int) -> float:
        return size_bytes / _BYTES_PER_TOKEN

    def _devices(self, now: float) -> dict[str, Device]:
        """Return what language instances do on each device that is known."""
        devices: dict[str, Device] = {}
        for instance in self._fleet.instances:
            if instance.role in PROMPT_ROLES and (device_id := instance.device_id):
                device, prompts = devices.get(device_id, _IDLE), instance.prompts
                own = prompts.seconds_computing(now)
                devices[device_id] = Device(
                    device.seconds + own, device.streams + prompts.streams, device.computing + (own > 0), instance.cores
                )
        for decode in self._fleet.healthy(Role.DECODE):
            if decode.device_id and decode.in_flight:
                device = devices.get(decode.device_id, _IDLE)
                devices[decode.device_id] = device._replace(streams=device.streams + decode.in_flight)
        return devices
