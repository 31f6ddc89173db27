"""Tries kinds of traffic on deployments, with the same requests for all of them.

All deployments run at the same time where memory allows, and are tried in turns: the machine's speed drifts, and an idle
deployment needs next to nothing. What has been found is kept after each kind of traffic, so an early end loses none of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from chiasm.bench import arms as arms_module
from chiasm.bench.alone import UNLOADED_TOKENS, Alone, Unloaded, limits_of, meets, serial_seconds, typical
from chiasm.bench.arms import Arm
from chiasm.bench.budget import Budget
from chiasm.bench.checkpoints import GOODPUT, GOODPUT_NAME, make_once
from chiasm.bench.client import RequestFailedError
from chiasm.bench.fixed_rate import FixedRate, outcome_at
from chiasm.bench.goodput import Limits, RateSearch, Trials
from chiasm.bench.goodput_options import AGGREGATED
from chiasm.bench.goodput_outcome import outcome_of
from chiasm.bench.load import turns
from chiasm.bench.measurement import Bench, Outcome
from chiasm.bench.requests import Texts
from chiasm.bench.running_arms import RunningArms, running_arms
from chiasm.bench.traffic import LEAST_REQUESTS, LONGEST_SECONDS, Arrival, Shape, Traffic, within
from chiasm.bench.trial import Prepared, prepare
from chiasm.errors import ConfigurationError
from chiasm.launch.config import EngineKind
from chiasm.memory import free_memory
from chiasm.models.checkpoint import stored_bytes

_ROUNDS, _QUICK_ROUNDS = 10, 3
_UNLOADED_ROUNDS, _QUICK_UNLOADED_ROUNDS = 5, 3
_FIRST_SHARE, _LOWEST_SHARE = 0.4, 0.05
"""Rates, relative to that at which requests that are answered one after the other take all of the time."""
_QUICK_REQUESTS = 4
"""Fewest of a trial in a quick run."""
_BUDGETS = {EngineKind.CHIASM: (2400.0, 180.0), EngineKind.VLLM: (4800.0, 900.0)}
"""Seconds of a whole and of a quick run."""
_TAIL_REQUESTS = 3.0
"""How long a trial is expected to take after its last request, relative to a request alone, until trials have shown it."""
_ENDING_SECONDS = 20.0
"""Part of the budget in which deployments end and results are written."""
_INSTANCE_BYTES = {EngineKind.CHIASM: 600 << 20, EngineKind.VLLM: 2500 << 20}
"""Memory of an instance without its weights."""


class Comparison:
    """One measurement: its deployments, its limits, and what has been found so far."""

    def __init__(self, bench: Bench, engine: EngineKind, notes: Sequence[str] = ()) -> None:
        """``notes`` are sentences about what is measured, for the reader."""
        self._bench = bench
        self._engine = engine
        base = bench.seed * 1000
        self._seeds = range(base, base + bench.samples(_ROUNDS, quick=_QUICK_ROUNDS))
        self._seconds = bench.goodput.budget or _BUDGETS[engine][bench.quick]
        self._budget = Budget(self._seconds - _ENDING_SECONDS)
        self._model = ""
        self._arms: list[Arm] = []
        self._limits: dict[str, Limits] = {}
        self._alone: dict[str, Alone] = {}
        """By deployment."""
        self._serial: dict[str, float] = {}
        """Mean seconds of a request of each traffic, answered alone by one aggregated instance."""
        self._found: dict[str, Trials] = {}
        """By the traffic's name."""
        self._notes = list(notes)

    async def run(self, traffics: Sequence[Traffic]) -> Outcome:
        """Measure until all rounds are made or the time is up. Raises ChiasmError; what has been found is kept by then."""
        options = self._bench.goodput
        # Fail before anything is made or started:
        arms_module.choose("", self._engine, options.arms, options.more_arms)
        self._model = options.model or await make_once(self._bench, GOODPUT_NAME, GOODPUT)
        self._arms = arms_module.choose(self._model, self._engine, options.arms, options.more_arms)
        try:
            async with asyncio.timeout(self._budget.left) as limit:
                await self._measure(traffics)
        except TimeoutError:
            if not limit.expired():
                raise
            self._notes.append(
                f"The measurement ended early, since its time was up ({self._seconds:g} s; --budget allows more)."
            )
        except BaseException:
            self._keep(traffics)
            raise
        if not self._has_found:
            raise ConfigurationError(
                f"The time was up before any trial was made ({self._seconds:g} s); allow more with --budget SECONDS."
            )
        return self._outcome(traffics)

    async def _measure(self, traffics: Sequence[Traffic]) -> None:
        groups = [self._arms] if self._fit_together() else [[arm] for arm in self._arms]
        if AGGREGATED not in [arm.name for arm in groups[0]]:
            await self._reference(traffics)
        if (reason := arms_module.left_out(self._engine)) is not None:
            self._notes.append(reason)
        if len(groups) > 1:
            self._notes.append("The deployments ran one after the other, since they don't fit beside each other.")
        parts = len(groups) * len(traffics)
        for group in groups:
            async with running_arms(self._bench, group) as running:
                texts = self._texts(running)
                self._alone |= await self._unloaded(running.urls, texts, traffics)
                if not self._limits:
                    self._take_reference(self._alone[AGGREGATED], traffics)
                for traffic in traffics:
                    await self._try(traffic, running, texts, parts)
                    parts -= 1
                    self._keep(traffics)

    def _fit_together(self) -> bool:
        """Tell whether all deployments can run at the same time: on CPU, if there is memory for all."""
        if any(arm.on_gpus for arm in self._arms):
            return False
        weights = stored_bytes(Path(self._model))
        instances = sum(arm.instances for arm in self._arms)
        need = instances * (2 * weights + _INSTANCE_BYTES[self._engine])
        return need < free_memory()

    # ---- alone --------------------------------------------------------------------------------------------------------

    async def _reference(self, traffics: Sequence[Traffic]) -> None:
        """Measure one aggregated instance with everything, which is none of the arms, for the limits."""
        async with running_arms(self._bench, [arms_module.reference(self._model, self._engine)]) as running:
            alone = await self._unloaded(running.urls, self._texts(running), traffics)
            self._take_reference(alone[AGGREGATED], traffics)

    def _texts(self, running: RunningArms) -> Texts:
        return Texts(running.folder, self._bench.seed)

    async def _unloaded(self, urls: Mapping[str, str], texts: Texts, traffics: Sequence[Traffic]) -> dict[str, Alone]:
        """Return what a typical request of each size class takes each deployment; all are warm afterwards."""
        shapes = typical(traffics, self._seeds)
        rounds = _QUICK_UNLOADED_ROUNDS if self._bench.quick else _UNLOADED_ROUNDS
        self._bench.phase("one request at a time", len(shapes) * (rounds + 1))
        found: dict[str, Alone] = {name: {} for name in urls}
        for size_class, shape in shapes.items():
            taken: dict[str, list[Unloaded]] = {name: [] for name in urls}
            for index in range(rounds + 1):
                for name, one in (await self._send_alone(urls, texts, shape, f"{size_class} {index}")).items():
                    taken[name].append(one)
                self._bench.advance()
            for name, several in taken.items():
                found[name][size_class] = Unloaded.of(several[1:])
        return found

    async def _send_alone(self, urls: Mapping[str, str], texts: Texts, shape: Shape, name: str) -> dict[str, Unloaded]:
        """Send one request to each deployment, one after the other."""
        (request,) = await self._prepare(texts, [Arrival(0.0, shape)], f"alone {name}")
        found = {}
        for arm, url in urls.items():
            answer = await self._bench.client.chat(url, request.body)
            tpot = (answer.token_times[-1] - answer.token_times[0]) / (UNLOADED_TOKENS - 1)
            found[arm] = Unloaded(answer.ttft_seconds, tpot)
        return found

    async def _prepare(self, texts: Texts, pattern: Sequence[Arrival], name: str) -> list[Prepared]:
        return await asyncio.to_thread(prepare, texts, pattern, f"{self._bench.seed} {name}")

    def _take_reference(self, alone: Alone, traffics: Sequence[Traffic]) -> None:
        self._limits = limits_of(alone, self._bench.goodput)
        self._serial = {traffic.name: serial_seconds(traffic, self._seeds, alone) for traffic in traffics}

    # ---- under load ---------------------------------------------------------------------------------------------------

    async def _try(self, traffic: Traffic, running: RunningArms, texts: Texts, parts: int) -> None:
        """Try what runs, all with the same requests in each round, in one of ``parts`` parts of the time that is left."""
        trials = self._found.setdefault(traffic.name, Trials([arm.name for arm in self._arms]))
        search = self._search(traffic, list(running.urls), trials)
        part = self._budget.part(parts, len(self._seeds), _TAIL_REQUESTS * self._serial[traffic.name])
        least = _QUICK_REQUESTS if self._bench.quick else LEAST_REQUESTS
        for index, seed in enumerate(self._seeds):
            if search.over:
                break
            rate = search.next_rate()
            if not (names := search.names_at(rate)):
                part.end_round()
                continue
            seconds = min(LONGEST_SECONDS, part.sending_seconds(len(names)))
            arrivals = within(traffic.pattern(seed), rate, seconds, least=least)
            sending = arrivals[-1].time / rate
            if not part.has_room(len(names), sending):
                self._notes.append(
                    f"{traffic.name}: {index} of {len(self._seeds)} rounds were made in its part of {self._seconds:g} s; "
                    "--budget allows more."
                )
                break
            self._bench.phase(f"{traffic.name}, round {index + 1} of {len(self._seeds)}", len(names))
            requests = await self._prepare(texts, arrivals, f"{traffic.name} {seed}")
            for which in turns(index, len(names)):
                name, began = names[which], time.monotonic()
                try:
                    trial = await running.play(name, requests, rate=rate, seed=seed, limits=self._limits)
                except RequestFailedError as error:
                    await self._start_again(
                        running, name, texts, traffic, f"at {rate:.3g} per second, seed {seed}", error
                    )
                else:
                    search.trials.add(name, trial)
                    trials.add(name, trial)
                    part.took(time.monotonic() - began, sending)
                self._bench.advance()
            part.end_round()

    def _search(self, traffic: Traffic, names: Sequence[str], trials: Trials) -> RateSearch | FixedRate:
        """Return what chooses the rates, and note in ``trials`` which deployments need not be tried at any."""
        if (rate := self._bench.goodput.rate) is not None:
            return FixedRate(names, rate)
        able = [name for name in names if meets(traffic, self._seeds, self._alone[name], self._limits)]
        trials.unable.update(name for name in names if name not in able)
        serial = self._serial[traffic.name]
        return RateSearch(able, _FIRST_SHARE / serial, _LOWEST_SHARE / serial)

    async def _start_again(
        self, running: RunningArms, name: str, texts: Texts, traffic: Traffic, trial: str, error: RequestFailedError
    ) -> None:
        """Start a deployment again that hasn't become idle, and warm it up. Its trial isn't counted."""
        self._notes.append(
            f"{traffic.name}: the trial of {name} {trial} is left out, and {name} was started again: {error.message}"
        )
        await running.start_again(name)
        for size_class, shape in typical([traffic], self._seeds).items():
            await self._send_alone({name: running.urls[name]}, texts, shape, f"{size_class} {trial}")

    # ---- what was found -----------------------------------------------------------------------------------------------

    @property
    def _has_found(self) -> bool:
        return any(trials.rounds or trials.unable for trials in self._found.values())

    def _keep(self, traffics: Sequence[Traffic]) -> None:
        if self._has_found:
            self._bench.keep(self._outcome(traffics))

    def _outcome(self, traffics: Sequence[Traffic]) -> Outcome:
        found = {name: trials for name, trials in self._found.items() if trials.rounds or trials.unable}
        if (rate := self._bench.goodput.rate) is not None:
            outcome = outcome_at(rate, found, self._limits, self._alone, seed=self._bench.seed)
        else:
            outcome = outcome_of(found, self._limits, seed=self._bench.seed)
        outcome.parameters["model"] = Path(self._model).name
        outcome.parameters["budget_seconds"] = self._seconds
        outcome.parameters["alone"] = {
            name: {size_class: asdict(one) for size_class, one in alone.items()} for name, alone in self._alone.items()
        }
        what_to_do = outcome.notes.pop(0)
        outcome.notes += [f"{arm.name}: {arm.description}." for arm in self._arms]
        outcome.notes += self._notes
        if missing := [traffic.name for traffic in traffics if traffic.name not in found]:
            outcome.notes.append(f"Not measured: {', '.join(missing)}.")
        outcome.notes.append(what_to_do)
        return outcome
