"""How many rows of prompts a step computes beside decodes."""

from __future__ import annotations

import pytest

from chiasm.engine.fluency import Fluency, slowdown_beside_streams
from chiasm.engine.request import SamplingParams
from chiasm.engine.sequence import Sequence
from chiasm.engine.step import ScheduledSequence, Step
from chiasm.models.base import Prompt
from chiasm.wire import Costs

DECODE, ROW = 0.010, 0.0004
COSTS = Costs(prefill_seconds_per_token=ROW, decode_step_seconds=DECODE)
FEWEST, MOST = 16, 38
"""On a CPU, with these costs: a step may take 2.5 times one that only decodes."""


def stream(name: str) -> Sequence:
    return Sequence(
        request_id=name,
        index=0,
        arrival=0,
        prompt=Prompt([1]),
        sampling=SamplingParams(max_tokens=1000),
        seed=0,
        block_size=4,
    )


class Device:
    """Runs steps that take what their rows cost, ``slowness`` times."""

    def __init__(self, costs: Costs = COSTS, slowness: float = 1.0, row_seconds: float = ROW) -> None:
        self.fluency = Fluency("cpu", costs)
        self.slowness = slowness
        self.row_seconds = row_seconds
        self.now = 100.0

    def begin(self, *sequences: Sequence) -> None:
        """Let the streams have their first token."""
        self.step(first=sequences)

    def step(self, *decodes: Sequence, rows: int = 0, first: tuple[Sequence, ...] = ()) -> float:
        """Run a step with rows of prompts of which none ends, but those of ``first``; return how long it took."""
        step = Step(decodes=[ScheduledSequence(one, 1, 1, samples=True) for one in decodes])
        if rows:
            step.prefills.append(ScheduledSequence(stream("prompt"), 0, rows, samples=False))
        step.prefills += [ScheduledSequence(one, 0, 1, samples=True) for one in first]
        first_row = DECODE if decodes else self.row_seconds
        seconds = self.slowness * (first_row + (step.num_rows - 1) * self.row_seconds)
        self.now += seconds
        self.fluency.note(step, seconds, self.now)
        return seconds

    def mixed(self, *decodes: Sequence) -> tuple[int, float]:
        """Run a step with as many rows of prompts as there may be; return how many, and how long it took."""
        rows = self.fluency.prefill_rows(self.now)
        return rows, self.step(*decodes, rows=rows)


def test_without_streams_a_step_that_decodes_has_the_most_rows() -> None:
    assert Device().fluency.prefill_rows(100.0) == MOST


def test_a_short_answer_beside_prompts_keeps_to_the_mean() -> None:
    device, one = Device(), stream("one")
    device.begin(one)
    times = [device.mixed(one)[1] for _ in range(4)]
    assert 2.1 * DECODE < sum(times) / len(times) < 2.3 * DECODE


def test_a_stream_that_has_decoded_alone_leaves_room_for_the_most_rows() -> None:
    device, one = Device(), stream("one")
    device.begin(one)
    for _ in range(5):
        device.step(one)
    assert device.mixed(one)[0] == MOST


def test_the_stream_that_is_the_furthest_behind_decides() -> None:
    device, old, new = Device(), stream("old"), stream("new")
    device.begin(old)
    for _ in range(20):
        device.step(old)
    assert device.fluency.prefill_rows(device.now) == MOST
    device.step(old, first=(new,))
    assert device.fluency.prefill_rows(device.now) < MOST


def test_on_a_device_that_others_use_too_there_are_fewer_rows() -> None:
    """The calibration at start doesn't know of them, the clock does."""
    device, one = Device(slowness=1.4), stream("one")
    device.begin(one)
    found = [device.mixed(one) for _ in range(6)]
    assert found[-1][0] < 0.7 * found[0][0]
    assert sum(seconds for _, seconds in found[1:]) / 5 < 2.5 * DECODE


def test_prompts_go_on_however_slow_the_streams_are() -> None:
    device, one = Device(slowness=10.0), stream("one")
    device.begin(one)
    assert [device.mixed(one)[0] for _ in range(5)][-3:] == [FEWEST] * 3


def test_a_pause_of_the_machine_is_soon_forgotten() -> None:
    device, one = Device(), stream("one")
    device.begin(one)
    device.slowness = 1000.0
    device.step(one)
    assert device.fluency.prefill_rows(device.now) == FEWEST
    device.slowness = 1.0
    for _ in range(10):
        device.step(one)
    assert device.fluency.prefill_rows(device.now) > FEWEST


def test_a_stream_that_ends_no_longer_counts() -> None:
    device, slow = Device(), stream("slow")
    device.begin(slow)
    for _ in range(10):
        device.step(slow, rows=200)
    assert device.fluency.prefill_rows(device.now) == FEWEST
    fast = stream("fast")
    slow.finished = True
    device.step(first=(fast,))
    for _ in range(3):
        device.step(fast)
    assert device.fluency.prefill_rows(device.now) == MOST


def test_longer_texts_are_learned_from_steps_that_only_decode() -> None:
    """They take longer than at start, and what a step may take grows with them."""
    device, one = Device(slowness=3.0), stream("one")
    device.begin(one)
    for _ in range(400):
        device.step(one)
    assert device.fluency.prefill_rows(device.now) > FEWEST


def test_where_rows_cost_nothing_there_are_the_most() -> None:
    device, one = Device(row_seconds=0.0), stream("one")
    device.begin(one)
    for _ in range(10_000):  # until the mean is so small that it is 0
        device.step(one, rows=30)
    assert device.fluency.prefill_rows(device.now) == MOST


def test_without_measured_costs_the_most_rows_are_taken() -> None:
    device, one = Device(Costs()), stream("one")
    device.begin(one)
    for _ in range(5):
        device.step(one, rows=200)
    assert device.fluency.prefill_rows(device.now) == 64


# ---- what is told of it ------------------------------------------------------------------------------------------------------


def test_prompts_take_as_much_longer_beside_streams_as_the_engine_says() -> None:
    device, one = Device(), stream("one")
    device.begin(one)
    steps = [device.mixed(one) for _ in range(50)]
    rows, seconds = map(sum, zip(*steps, strict=True))
    assert seconds / (rows * ROW) == pytest.approx(slowdown_beside_streams("cpu", COSTS), rel=0.05)


def test_where_the_fewest_rows_take_long_prompts_are_slowed_down_less() -> None:
    costs = Costs(prefill_seconds_per_token=0.1, decode_step_seconds=0.1)
    assert slowdown_beside_streams("cpu", costs) == pytest.approx(1 + 1 / FEWEST)


def test_without_measured_costs_nothing_is_said_of_it() -> None:
    assert slowdown_beside_streams("cpu", Costs()) == 0


@pytest.mark.parametrize("decodes", [0, 1])
def test_a_step_is_divided_among_its_prompts_by_their_rows(decodes: int) -> None:
    parts = [ScheduledSequence(stream(name), 0, rows, samples=False) for name, rows in (("a", 10), ("b", 30))]
    step = Step(decodes=[ScheduledSequence(stream("s"), 1, 1, samples=True)] * decodes, prefills=parts)
    found = Device().fluency.prompt_seconds(step, decodes * DECODE + 40 * ROW)
    assert found == {"a": pytest.approx(10 * ROW), "b": pytest.approx(30 * ROW)}


def test_several_answers_to_one_prompt_share_what_it_took() -> None:
    parts = [ScheduledSequence(stream("a"), 0, rows, samples=True) for rows in (10, 1, 1)]
    assert Device().fluency.prompt_seconds(Step(prefills=parts), 12 * ROW) == {"a": pytest.approx(12 * ROW)}
