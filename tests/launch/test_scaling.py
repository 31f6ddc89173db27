"""Encoders that come and go as the proxy says. The encoders are small processes; the tests say what the proxy says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from chiasm.launch.child import Child, ProcessState
from chiasm.launch.deployment import _status
from chiasm.launch.plan import ProcessPlan
from chiasm.launch.ports import HeldPort
from chiasm.launch.scaling import FIRST_PAUSE_SECONDS, EncoderNumber, ProxySays, Scaling
from chiasm.wire import Role
from tests.launch.waiting import eventually

SERVES = "echo ready here; exec sleep 600"
STAYS = "trap '' TERM; echo ready here; while :; do sleep 1; done"
FAILS = "echo 'Error: No room.' >&2; exit 2"
END_SECONDS = 30.0
STEP = 60.0
MUTE = ProxySays(None, ())


class Crew:
    """Up to three encoders, and the proxy's part."""

    def __init__(self, folder: Path, least: int, most: int) -> None:
        self.scripts: dict[str, str] = {}
        """What encoders run, by name, if it isn't ``SERVES``."""
        self.children: dict[str, Child] = {}
        """Those that run."""
        self.said: list[str] = []
        self.questions: list[bool] = []
        """For each question to the proxy, whether it was also for the instances that it knows."""
        self.file = folder / "encoders.json"
        self._plans = [
            ProcessPlan(f"encoder-{index}", Role.ENCODER, index, HeldPort("127.0.0.1"), [], {}) for index in range(most)
        ]
        self.scaling = Scaling(
            self._plans,
            EncoderNumber(least, most, STEP),
            self.file,
            end_seconds=END_SECONDS,
            begin=self._begin,
            forget=lambda plan: self._forget(plan.name),
            ask=self._ask,
            say=self.said.append,
        )

    def _ask(self, wants_known: bool) -> ProxySays:
        self.questions.append(wants_known)
        return ProxySays(0.0, self.urls(*self.listed)) if wants_known else ProxySays(0.0, ())

    def _begin(self, plan: ProcessPlan) -> Child:
        assert plan.name not in self.children
        command = ["sh", "-c", self.scripts.get(plan.name, SERVES)]
        child = Child(plan.name, command, os.environ, on_change=lambda child: None, on_line=lambda name, line: None)
        self.children[plan.name] = child
        child.start()
        return child

    def _forget(self, name: str) -> None:
        assert self.children[name].join(0.0)
        del self.children[name]

    def says(self, desired: float, now: float) -> None:
        """The proxy desires so many, and knows those that are listed; all of these get ready."""
        self.scaling.look(ProxySays(desired, self.urls(*self.listed)), now)
        self.wait_ready()

    def wait_ready(self) -> None:
        assert eventually(lambda: all(self.is_in(ProcessState.READY, name) for name in self.listed))

    def is_in(self, state: ProcessState, name: str) -> bool:
        return name in self.children and self.children[name].state is state

    def progress(self, name: str) -> str:
        """What the operator sees beside the name."""
        (plan,) = [one for one in self._plans if one.name == name]
        return _status(plan, self.children[name]).progress

    def urls(self, *names: str) -> list[str]:
        return [plan.address.url for plan in self._plans if plan.name in names]

    @property
    def listed(self) -> list[str]:
        """The names of the encoders that the proxy finds."""
        found = json.loads(self.file.read_text()) if self.file.exists() else []
        assert all(one["role"] == "encoder" for one in found)
        return [plan.name for plan in self._plans if plan.address.url in [one["url"] for one in found]]

    def end(self) -> None:
        for child in self.children.values():
            child.kill()
            child.join(60.0)
        for plan in self._plans:
            plan.address.release()


Make = Callable[[int, int], Crew]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes encoders, from so many to so many, of which none runs yet."""
    made: list[Crew] = []

    def make(least: int, most: int) -> Crew:
        made.append(Crew(tmp_path, least, most))
        return made[-1]

    yield make
    for one in made:
        one.end()


def scaled_up(make: Make, most: int = 2) -> Crew:
    """All of 1 to ``most`` encoders run, and the last one isn't needed any more."""
    crew = make(1, most)
    crew.says(most, 0.0)
    assert crew.listed == [f"encoder-{index}" for index in range(most)]
    crew.says(0.0, 1.0)
    crew.says(0.0, 1.0 + STEP)
    assert crew.listed == [f"encoder-{index}" for index in range(most - 1)]
    return crew


def test_at_first_the_least_number_starts_and_is_listed(make: Make) -> None:
    crew = make(2, 3)
    crew.scaling.start()
    assert list(crew.children) == crew.listed == ["encoder-0", "encoder-1"]
    assert crew.said == []
    crew.scaling.close()
    crew.scaling.close()
    assert list(crew.children) == ["encoder-0", "encoder-1"]


def test_all_that_are_desired_start_at_once(make: Make) -> None:
    crew = make(1, 3)
    crew.says(0.2, 0.0)
    crew.says(2.4, 1.0)
    assert crew.listed == ["encoder-0", "encoder-1", "encoder-2"]
    assert crew.said == ["encoders needed: 3; starting encoder-1, encoder-2"]


def test_one_that_is_not_needed_ends_when_the_proxy_has_given_it_up(make: Make) -> None:
    crew = scaled_up(make)
    crew.scaling.look(ProxySays(0.0, crew.urls("encoder-0", "encoder-1")), 62.0)  # calls are under way
    assert crew.progress("encoder-1") == ""
    assert crew.is_in(ProcessState.READY, "encoder-1")
    assert not crew.children["encoder-1"].is_ending
    crew.scaling.look(ProxySays(0.0, crew.urls("encoder-0")), 63.0)
    assert crew.children["encoder-1"].join(60.0)
    crew.says(0.0, 64.0)
    assert list(crew.children) == ["encoder-0"]
    assert crew.said[-1] == "encoders needed: 1; encoder-1 drains"


def test_the_proxy_is_asked_for_its_instances_only_while_one_is_to_leave_it(make: Make) -> None:
    crew = make(1, 2)
    crew.says(2.0, 0.0)
    for now in (1.0, 1.0 + STEP, 2.0 + STEP):
        crew.scaling.follow(partial(float, now))  # the second time, an encoder begins to leave
    assert crew.questions == [False, False, True]
    assert crew.children["encoder-1"].join(60.0)
    crew.scaling.follow(partial(float, 3.0 + STEP))
    assert crew.questions[-1] is False


def test_a_proxy_that_does_not_answer_changes_nothing(make: Make) -> None:
    crew = scaled_up(make)
    crew.scaling.look(MUTE, 10 * STEP)
    assert not crew.children["encoder-1"].is_ending
    assert crew.listed == ["encoder-0"]


def test_one_that_drains_is_taken_back_if_it_is_needed_again(make: Make) -> None:
    crew = scaled_up(make)
    process = crew.children["encoder-1"].pid
    crew.says(2.0, 62.0)
    assert crew.listed == ["encoder-0", "encoder-1"]
    assert crew.children["encoder-1"].pid == process
    assert crew.said[-1] == "encoders needed: 2; encoder-1 won't drain"


def test_one_that_has_ended_starts_again_when_it_is_needed(make: Make) -> None:
    crew = scaled_up(make)
    crew.scaling.look(ProxySays(0.0, crew.urls("encoder-0")), 62.0)
    assert crew.children["encoder-1"].join(60.0)
    crew.says(2.0, 63.0)
    assert crew.listed == ["encoder-0", "encoder-1"]


def test_one_that_was_asked_to_end_and_does_not_is_killed(make: Make) -> None:
    crew = make(1, 2)
    crew.scripts["encoder-1"] = STAYS
    crew.says(2.0, 0.0)
    crew.says(0.0, 1.0)
    crew.says(0.0, 1.0 + STEP)
    crew.scaling.look(ProxySays(0.0, crew.urls("encoder-0")), 100.0)
    child = crew.children["encoder-1"]
    assert crew.progress("encoder-1") == "draining"
    crew.says(0.0, 100.0 + END_SECONDS)
    assert not child.join(0.0)
    crew.says(0.0, 200.0)
    assert child.join(60.0)


def test_one_that_dies_while_it_is_needed_is_started_again_and_stays_listed(make: Make) -> None:
    crew = make(1, 2)
    crew.says(2.0, 0.0)
    child = crew.children["encoder-1"]
    assert child.pid is not None
    os.kill(child.pid, 9)
    assert eventually(lambda: child.restarts == 1)
    crew.says(2.0, 1.0)
    assert crew.listed == ["encoder-0", "encoder-1"]


def test_after_a_start_that_failed_there_is_a_pause_and_then_another_one_is_tried_first(make: Make) -> None:
    crew = make(1, 3)
    crew.scripts["encoder-1"] = FAILS
    crew.scaling.look(ProxySays(2.0, ()), 0.0)
    failed = crew.children["encoder-1"]
    assert failed.join(60.0)
    crew.says(2.0, 1.0)
    assert crew.said[-1] == "encoder-1 can't be started; the next start is in 5 s. No room."
    assert list(crew.children) == crew.listed == ["encoder-0"]
    crew.says(2.0, FIRST_PAUSE_SECONDS)
    assert list(crew.children) == ["encoder-0"]
    crew.says(2.0, 1.0 + FIRST_PAUSE_SECONDS)
    assert crew.listed == ["encoder-0", "encoder-2"]


def test_for_one_of_the_first_that_cannot_start_another_one_does(make: Make) -> None:
    crew = make(1, 2)
    crew.scripts["encoder-0"] = FAILS
    crew.scaling.look(MUTE, 0.0)
    assert crew.children["encoder-0"].join(60.0)
    crew.says(0.0, 1.0)
    assert crew.listed == ["encoder-1"]
    assert crew.children["encoder-0"].failure is not None  # who started it has it, and decides


def test_a_list_that_could_not_be_written_is_written_later(make: Make, tmp_path: Path) -> None:
    crew = make(1, 2)
    crew.file.with_suffix(".new").mkdir()
    crew.says(2.0, 0.0)
    crew.says(2.0, 1.0)
    assert crew.listed == []
    assert [line for line in crew.said if "can't be written" in line] == [
        f"{crew.file} can't be written, so the proxy doesn't hear of changes: Is a directory"
    ]
    crew.file.with_suffix(".new").rmdir()
    crew.says(2.0, 2.0)
    assert crew.listed == ["encoder-0", "encoder-1"]
