"""A step that fails: which sequences fail with it."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch

from chiasm.engine.sampler import Sampled
from chiasm.engine.sequence import Sequence
from chiasm.engine.step import Step
from chiasm.engine.step_faults import run_step
from tests.engine.driver import Driver, prompt


class Runner:
    """Samples 7 for each sequence, unless one has too many tokens, or all of them together."""

    def __init__(self, *, longest: int = 1000, together: int = 1000, error: type[Exception] = MemoryError) -> None:
        self.longest = longest
        self.together = together
        self.error = error
        self.runs: list[int] = []

    def __call__(self, step: Step) -> dict[str, Sampled]:
        self.runs.append(len(step.scheduled))
        ends = [part.end for part in step.scheduled]
        if max(ends) > self.longest or len(ends) * max(ends) > self.together:
            raise self.error("no memory")
        return {part.sequence.sequence_id: Sampled(7, None) for part in step.scheduled}


def planned(*lengths: int) -> tuple[Step, list[Sequence]]:
    """A step that decodes a sequence and prefills prompts of these lengths."""
    driver = Driver(budget=1000, max_prefill=1000, mixed=1000, blocks=300)
    sequences = [driver.add(prompt(2), salt="decodes")]
    driver.step()
    sequences += [driver.add(prompt(length), salt=str(number)) for number, length in enumerate(lengths)]
    return driver.scheduler.schedule(), sequences


def names(sequences: Collection[Sequence]) -> set[str]:
    return {sequence.sequence_id for sequence in sequences}


def test_a_step_that_succeeds_runs_once() -> None:
    step, sequences = planned(5, 6)
    runner = Runner()
    result = run_step(runner, step)
    assert runner.runs == [3]
    assert result.sampled.keys() == names(sequences)
    assert not result.failed


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, ValueError])
def test_only_the_sequence_that_fails_by_itself_fails(error: type[Exception]) -> None:
    step, sequences = planned(5, 50, 6, 7)
    result = run_step(Runner(longest=49, error=error), step)
    ((failed, _),) = result.failed
    assert failed.sequence is sequences[2]
    assert result.sampled.keys() == names(sequences) - names([failed.sequence])


def test_sequences_that_only_fail_together_all_succeed() -> None:
    step, sequences = planned(5, 50, 6, 7, 20)
    result = run_step(Runner(together=50), step)
    assert not result.failed
    assert result.sampled.keys() == names(sequences)


def test_a_model_that_always_fails_is_run_at_most_twice_for_each_sequence() -> None:
    step, sequences = planned(5, 6, 7, 8)
    runner = Runner(longest=0)
    assert names([part.sequence for part, _ in run_step(runner, step).failed]) == names(sequences)
    assert len(runner.runs) < 2 * len(sequences)


def test_a_request_that_needs_too_much_memory_is_told_so() -> None:
    step, _ = planned(50)
    for error in (MemoryError, torch.OutOfMemoryError):
        ((_, reason),) = run_step(Runner(longest=49, error=error), step).failed
        assert "too little memory" in reason.message
