"""Comparisons of real deployments of a tiny checkpoint, in which something goes wrong."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from chiasm.bench import trial
from chiasm.bench.client import opened
from chiasm.bench.comparison import Comparison
from chiasm.bench.goodput_options import GoodputOptions
from chiasm.bench.measurement import Bench, Outcome
from chiasm.bench.traffic import Mix, Shape
from chiasm.errors import ConfigurationError
from chiasm.launch.config import EngineKind
from chiasm.launch.fork_server import ForkServer
from tests.launch.waiting import command_line

_EASY = GoodputOptions(arms=("aggregated",), ttft_slo=60.0, tpot_slo=60.0)


def _short(_: random.Random) -> Shape:
    return Shape(4, (), 2)


_MIXES = [Mix(name, "short texts", 8, _short) for name in ("first", "second")]


class _Comparer:
    """Compares, and calls a function when a phase with a certain name begins."""

    def __init__(self, checkpoint: Path, scratch: Path, forks: ForkServer) -> None:
        self.kept: list[Outcome] = []
        self.at: dict[str, Callable[[], None]] = {}
        self._checkpoint = checkpoint
        self._scratch = scratch
        self._forks = forks

    async def run(self, options: GoodputOptions, mixes: list[Mix]) -> Outcome:
        def on_phase(text: str, _: int | None) -> None:
            self.at.get(text, lambda: None)()

        options = replace(options, model=str(self._checkpoint))
        async with opened() as client:
            bench = Bench(
                str(self._checkpoint),
                self._scratch,
                client,
                quick=True,
                repeat=3,
                goodput=options,
                forks=self._forks,
                keep=self.kept.append,
                on_phase=on_phase,
            )
            return await Comparison(bench, EngineKind.CHIASM).run(mixes)


@pytest.fixture
def comparer(checkpoint: Path, tmp_path: Path) -> Iterator[_Comparer]:
    with closing(ForkServer()) as forks:
        yield _Comparer(checkpoint, tmp_path, forks)


def _freeze_proxy() -> None:
    proxies = [child for child in psutil.Process().children() if command_line(child)[-2:] == ["child", "proxy"]]
    newest = max(proxies, key=psutil.Process.create_time)  # others may be those of other tests
    newest.send_signal(signal.SIGSTOP)


async def test_a_proxy_that_hangs_costs_a_trial_and_not_the_run(
    comparer: _Comparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient_seconds = trial._DRAIN_SECONDS

    def freeze() -> None:
        monkeypatch.setattr(trial, "_DRAIN_SECONDS", 0.5)  # of this trial alone: others end when they do
        _freeze_proxy()

    comparer.at["first, round 2 of 3"] = freeze
    comparer.at["first, round 3 of 3"] = lambda: monkeypatch.setattr(trial, "_DRAIN_SECONDS", patient_seconds)
    # The requests of the frozen proxy are given up after a second.
    outcome = await comparer.run(replace(_EASY, ttft_slo=0.5, rate=20.0), _MIXES)
    assert {(one["traffic"], one["seed"]) for one in outcome.trials} == {
        ("first", 0),
        ("first", 2),
        ("second", 0),
        ("second", 1),
        ("second", 2),
    }
    (note,) = [note for note in outcome.notes if "started again" in note]
    assert note.startswith("first: the trial of aggregated at 20 per second, seed 1 is left out")


async def test_what_was_found_is_kept_when_a_later_mix_fails(comparer: _Comparer) -> None:
    def fail() -> None:
        raise RuntimeError("the disk is full")

    comparer.at["second, round 2 of 3"] = fail
    with pytest.raises(RuntimeError):
        await comparer.run(_EASY, _MIXES)
    first, last = comparer.kept
    assert "Not measured: second." in first.notes
    assert {figure.name for figure in first.figures if figure.unit == "requests/s"} == {"first: aggregated"}
    assert [one["seed"] for one in last.trials if one["traffic"] == "second"] == [0]


async def test_limits_that_nothing_meets_end_with_a_sentence(comparer: _Comparer) -> None:
    outcome = await comparer.run(replace(_EASY, ttft_slo=1e-6), _MIXES[:1])
    assert outcome.trials == []
    assert "first: aggregated misses the limits even with one request at a time, so no rate was tried." in outcome.notes
    assert outcome.notes[-1].startswith("No deployment meets the limits of time at any rate")


async def test_one_rate_shows_the_cpu_time_of_each_process(comparer: _Comparer) -> None:
    outcome = await comparer.run(replace(_EASY, rate=20.0), _MIXES[:1])
    figures = {figure.name: figure for figure in outcome.figures}
    assert figures["first: aggregated, in time"].value == 100.0
    prefix = "first: aggregated, CPU time per request of "
    assert {name.removeprefix(prefix) for name in figures if name.startswith(prefix)} == {"proxy", "aggregated-0"}
    assert {one["rate"] for one in outcome.trials} == {20.0}


async def test_a_time_that_is_too_short_for_any_trial_is_an_error(comparer: _Comparer) -> None:
    with pytest.raises(ConfigurationError, match="The time was up before any trial was made"):
        await comparer.run(replace(_EASY, budget=20.1), _MIXES)
    assert comparer.kept == []
