"""How many requests per second each deployment answers in time, all of them on the same cores or GPUs.

All deployments run at the same time where memory allows, and are tried in turns: the machine's speed drifts, and an idle
deployment needs next to nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from chiasm.bench import arms as arms_module
from chiasm.bench.arms import Arm
from chiasm.bench.checkpoints import GOODPUT, GOODPUT_NAME, make_once
from chiasm.bench.goodput import Limits, RateSearch, Trials
from chiasm.bench.goodput_options import AGGREGATED
from chiasm.bench.goodput_outcome import outcome_of
from chiasm.bench.load import turns
from chiasm.bench.measurement import Bench, Measurement, Outcome
from chiasm.bench.requests import Texts
from chiasm.bench.statistics import median
from chiasm.bench.topology import cpu_seconds, running
from chiasm.bench.trace import Trace
from chiasm.bench.traffic import LONGEST_SECONDS, MIXES, Arrival, Shape, Traffic, within
from chiasm.bench.trial import Prepared, play, prepare
from chiasm.errors import ChiasmError, ConfigurationError
from chiasm.launch import Deployment
from chiasm.launch.config import EngineKind

_ROUNDS = 10
_UNLOADED_ROUNDS = 5
_UNLOADED_TOKENS = 8
_LEAST_TPOT_SECONDS = 0.01
"""No lower limit is set by a factor, since tokens that are faster arrive several at a time."""
_FIRST_SHARE, _LOWEST_SHARE = 0.4, 0.05
"""Rates, relative to that at which requests that are answered one after the other take all of the time."""
_QUICK_MIXES = ("mixed", "heavy")
_INSTANCE_BYTES = {EngineKind.CHIASM: 600 << 20, EngineKind.VLLM: 2500 << 20}
"""Memory of an instance without its weights."""


@dataclass(frozen=True)
class Unloaded:
    """What a request takes when nothing else runs."""

    ttft_seconds: float
    tpot_seconds: float


Alone = dict[str, Unloaded]
"""By size class."""


class GoodputMeasurement(Measurement):
    """All mixes, on all arms."""

    name = "goodput"
    purpose = "Requests per second of which 90 % get their first token and all others in time, at equal cores or GPUs"
    target = "colocated at least 1.0 times the best other deployment on every mix"
    only_by_name = True

    def __init__(self, engine: EngineKind) -> None:
        self._engine = engine

    async def run(self, bench: Bench) -> Outcome:
        chosen = bench.goodput.mixes or (_QUICK_MIXES if bench.quick else tuple(MIXES))
        if unknown := [name for name in chosen if name not in MIXES]:
            raise ConfigurationError(f"There is no mix {unknown[0]!r}; the mixes are {', '.join(MIXES)}.")
        return await Comparison(bench, self._engine).run([mix for name, mix in MIXES.items() if name in chosen])


class TraceMeasurement(Measurement):
    """A person's own arrivals and sizes, on all arms."""

    name = "trace"
    purpose = "Requests per second of a trace of which 90 % get their first token and all others in time"
    target = GoodputMeasurement.target.replace("every mix", "the trace")

    def __init__(self, engine: EngineKind, trace: Trace) -> None:
        self._engine = engine
        self._trace = trace

    async def run(self, bench: Bench) -> Outcome:
        outcome = await Comparison(bench, self._engine).run([self._trace])
        outcome.notes.insert(-1, f"The trace has {self._trace.rate:.3g} requests per second itself.")
        return outcome


class Comparison:
    """Tries kinds of traffic on deployments."""

    def __init__(self, bench: Bench, engine: EngineKind) -> None:
        self._bench = bench
        self._engine = engine
        base = bench.seed * 1000
        self._seeds = range(base, base + bench.samples(_ROUNDS, quick=3))
        self._limits: dict[str, Limits] = {}
        self._serial: dict[str, float] = {}
        """Mean seconds of a request of each traffic, answered alone by one aggregated instance."""

    async def run(self, traffics: Sequence[Traffic]) -> Outcome:
        """Raises ChiasmError."""
        options = self._bench.goodput
        # Fail before anything is made or started:
        arms_module.choose("", self._engine, options.arms, options.more_arms)
        model = options.model or await make_once(self._bench, GOODPUT_NAME, GOODPUT)
        arms = arms_module.choose(model, self._engine, options.arms, options.more_arms)
        groups = [arms] if self._fit_together(model, arms) else [[arm] for arm in arms]
        if AGGREGATED not in [arm.name for arm in groups[0]]:
            await self._reference(model, traffics)
        found = {traffic.name: Trials([arm.name for arm in arms]) for traffic in traffics}
        for group in groups:
            async with running(self._bench, *(arm.config for arm in group)) as deployments:
                by_name = {arm.name: one for arm, one in zip(group, deployments, strict=True)}
                urls = {name: one.url for name, one in by_name.items()}
                texts = Texts(deployments[0].folder, self._bench.seed)
                alone = await self._unloaded(urls, texts, traffics)
                if AGGREGATED in alone:
                    self._take_reference(alone[AGGREGATED], traffics)
                for traffic in traffics:
                    await self._try(traffic, by_name, texts, alone, found[traffic.name])
        outcome = outcome_of(found, self._limits, seed=self._bench.seed)
        outcome.parameters["model"] = Path(model).name
        outcome.notes += [f"{arm.name}: {arm.description}." for arm in arms]
        if (reason := arms_module.left_out(self._engine)) is not None:
            outcome.notes.append(reason)
        if len(groups) > 1:
            outcome.notes.append("The deployments ran one after the other, since they don't fit beside each other.")
        # What to do comes last.
        outcome.notes.append(outcome.notes.pop(0))
        return outcome

    def _fit_together(self, model: str, arms: Sequence[Arm]) -> bool:
        """Tell whether all deployments can run at the same time: on CPU, if there is memory for all."""
        import psutil

        if any(role.devices for arm in arms for role in arm.config.roles.values()):
            return False
        weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) if Path(model).is_dir() else 0
        instances = sum(arm.instances for arm in arms)
        need = instances * (2 * weights + _INSTANCE_BYTES[self._engine])
        return need < int(psutil.virtual_memory().available)

    # ---- alone --------------------------------------------------------------------------------------------------------

    async def _reference(self, model: str, traffics: Sequence[Traffic]) -> None:
        """Measure one aggregated instance with everything, which is none of the arms, for the limits."""
        arm = arms_module.reference(model, self._engine)
        async with running(self._bench, arm.config) as (deployment,):
            alone = await self._unloaded({arm.name: deployment.url}, self._texts(deployment), traffics)
            self._take_reference(alone[AGGREGATED], traffics)

    def _texts(self, deployment: Deployment) -> Texts:
        return Texts(deployment.folder, self._bench.seed)

    async def _unloaded(self, urls: Mapping[str, str], texts: Texts, traffics: Sequence[Traffic]) -> dict[str, Alone]:
        """Return what a typical request of each size class takes each deployment; all are warm afterwards."""
        shapes = _typical([one.shape for traffic in traffics for seed in self._seeds for one in traffic.pattern(seed)])
        rounds = 3 if self._bench.quick else _UNLOADED_ROUNDS
        self._bench.phase("one request at a time", len(shapes) * (rounds + 1))
        found: dict[str, Alone] = {name: {} for name in urls}
        for size_class, shape in shapes.items():
            taken: dict[str, list[Unloaded]] = {name: [] for name in urls}
            for index in range(rounds + 1):
                (request,) = await self._prepare(texts, [Arrival(0.0, shape)], f"alone {size_class} {index}")
                for name, url in urls.items():
                    answer = await self._bench.client.chat(url, request.body)
                    tpot = (answer.token_times[-1] - answer.token_times[0]) / (_UNLOADED_TOKENS - 1)
                    taken[name].append(Unloaded(answer.ttft_seconds, tpot))
                self._bench.advance()
            for name, several in taken.items():
                ttft = median([one.ttft_seconds for one in several[1:]])
                found[name][size_class] = Unloaded(ttft, median([one.tpot_seconds for one in several[1:]]))
        return found

    async def _prepare(self, texts: Texts, pattern: Sequence[Arrival], name: str) -> list[Prepared]:
        return await asyncio.to_thread(prepare, texts, pattern, f"{self._bench.seed} {name}")

    def _take_reference(self, alone: Alone, traffics: Sequence[Traffic]) -> None:
        """Set the limits of each size class, and the time that requests take one after the other."""
        options = self._bench.goodput
        # The time per token hardly depends on the class, and a class has few samples.
        usual = median([one.tpot_seconds for one in alone.values()])
        for size_class, one in alone.items():
            self._limits[size_class] = Limits(
                options.ttft_slo or options.ttft_slo_factor * one.ttft_seconds,
                options.tpot_slo or max(_LEAST_TPOT_SECONDS, options.tpot_slo_factor * max(usual, one.tpot_seconds)),
            )
        for traffic in traffics:
            shapes = [arrival.shape for seed in self._seeds for arrival in traffic.pattern(seed)]
            seconds = [
                alone[shape.size_class].ttft_seconds + (shape.answer_tokens - 1) * alone[shape.size_class].tpot_seconds
                for shape in shapes
            ]
            self._serial[traffic.name] = sum(seconds) / len(seconds)

    # ---- under load ---------------------------------------------------------------------------------------------------

    async def _try(
        self,
        traffic: Traffic,
        deployments: Mapping[str, Deployment],
        texts: Texts,
        alone: Mapping[str, Alone],
        trials: Trials,
    ) -> None:
        """Try the deployments, which are given by name, all with the same requests in each round, and add to ``trials``."""
        serial = self._serial[traffic.name]
        able = [name for name in deployments if self._can_meet(traffic, alone[name])]
        trials.unable.update(name for name in deployments if name not in able)
        search = RateSearch(able, _FIRST_SHARE / serial, _LOWEST_SHARE / serial)
        for index, seed in enumerate(self._seeds):
            if search.over:
                break
            rate = search.next_rate()
            names = search.names_at(rate)
            self._bench.phase(f"{traffic.name}, round {index + 1} of {len(self._seeds)}", len(names))
            requests = await self._prepare(texts, traffic.pattern(seed), f"{traffic.name} {seed}")
            sent = within(requests, rate, LONGEST_SECONDS)
            for which in turns(index, len(names)):
                name = names[which]
                before = _cpu_seconds(deployments[name])
                trial = await play(self._bench, deployments[name].url, sent, rate=rate, seed=seed, limits=self._limits)
                used = _used(before, _cpu_seconds(deployments[name]))
                search.trials.add(name, replace(trial, cpu_seconds=used))
                self._bench.advance()
        for name in able:
            for trial in search.trials.of[name]:
                trials.add(name, trial)

    def _can_meet(self, traffic: Traffic, alone: Alone) -> bool:
        """Tell whether a deployment meets the limits at least when nothing else runs."""
        shapes = [arrival.shape for seed in self._seeds for arrival in traffic.pattern(seed)]
        good = 0
        for shape in shapes:
            one, limits = alone[shape.size_class], self._limits[shape.size_class]
            good += one.ttft_seconds <= limits.ttft_seconds and one.tpot_seconds <= limits.tpot_seconds
        return good >= 0.9 * len(shapes)


def _cpu_seconds(deployment: Deployment) -> dict[str, float]:
    """Return the CPU time so far of each process; nothing while one is being started again."""
    try:
        return cpu_seconds(deployment)
    except ChiasmError:
        return {}


def _used(before: Mapping[str, float], after: Mapping[str, float]) -> float | None:
    """Return the CPU time of a trial; None if it isn't known because a process was started again."""
    used = [after.get(name, 0.0) - seconds for name, seconds in before.items()]
    return sum(used) if used and min(used) >= 0 else None


def _typical(shapes: Sequence[Shape]) -> dict[str, Shape]:
    """Return the request of median size of each class, with an answer long enough to time its tokens."""
    by_class: dict[str, list[Shape]] = {}
    for shape in shapes:
        by_class.setdefault(shape.size_class, []).append(shape)
    ordered = {name: sorted(several, key=lambda shape: shape.size) for name, several in sorted(by_class.items())}
    return {
        name: replace(several[len(several) // 2], answer_tokens=_UNLOADED_TOKENS, image_ids=())
        for name, several in ordered.items()
    }
