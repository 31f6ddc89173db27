"""What a simulated deployment does, checked by hand and by laws that hold for any."""

from __future__ import annotations

import random

import pytest

from chiasm.bench.traffic import MIXES, Arrival
from chiasm.launch.layout import Layout
from chiasm.plan.devices import parse_devices
from chiasm.plan.layouts import Candidate, aggregated_on_cpu, candidates, colocated_on_cpu, split_on_cpu
from chiasm.plan.search import SameLimits
from chiasm.plan.sharing import Stage
from chiasm.wire import Role
from tests.plan.models import CPU, IMAGE_TOKENS, SimpleCosts, asked, simulate

AGGREGATED = aggregated_on_cpu(CPU, 1)
COLOCATED = colocated_on_cpu(CPU, 2, 2)
SPLIT = split_on_cpu(CPU, 1, 1)
ARMS = [AGGREGATED, aggregated_on_cpu(CPU, 2), COLOCATED, SPLIT]
ON_GPUS = candidates(parse_devices("3xH100"))


def named(candidate: Candidate) -> str:
    return candidate.name


def apart() -> Candidate:
    """An encoder, a prefill and a decode instance."""
    return next(one for one in ON_GPUS if one.layout is Layout.SPLIT and Role.PREFILL in one.counts)


def test_alone_a_text_takes_its_prefill() -> None:
    (outcome,) = simulate(SPLIT, [asked()]).outcomes
    assert outcome.first_token == pytest.approx(0.01 + 20 * 0.001)


def test_alone_each_later_token_takes_a_step() -> None:
    (outcome,) = simulate(SPLIT, [asked(answer=5)]).outcomes
    assert outcome.tpot_seconds == pytest.approx(0.01 + 0.001)


def test_alone_an_image_takes_all_that_happens_to_it() -> None:
    costs = SimpleCosts(prepare=0.05, move=0.03, request=0.02)
    (outcome,) = simulate(SPLIT, [asked(images=1)], costs=costs).outcomes
    # The template's few tokens before the image are prefilled with it.
    after = 0.01 + (IMAGE_TOKENS + 20) * 0.001
    assert outcome.embedded == pytest.approx(0.05 + 0.2 + 0.03)
    assert outcome.first_token == pytest.approx(0.05 + 0.2 + 0.03 + after)


def test_alone_all_cores_encode_and_then_prefill() -> None:
    (outcome,) = simulate(COLOCATED, [asked(images=1)]).outcomes
    split = simulate(SPLIT, [asked(images=1)]).outcomes[0]
    assert outcome.first_token is not None
    assert split.first_token is not None
    assert outcome.first_token < 0.6 * split.first_token


def test_the_second_image_is_encoded_while_the_first_is_prefilled() -> None:
    costs = SimpleCosts(encode=0.2)
    (outcome,) = simulate(SPLIT, [asked(images=3)], costs=costs).outcomes
    assert outcome.first_token == pytest.approx(3 * 0.2 + 0.01 + (IMAGE_TOKENS + 16) * 0.001)


def test_what_serves_requests_takes_cores_from_what_computes() -> None:
    """Ten requests at once take a tenth of a second of a core before they are queued, and the first of them computes then."""
    serving = SimpleCosts(request=0.01)
    first = [simulate(SPLIT, [asked(images=1), *[asked()] * n], costs=serving).outcomes[0].first_token for n in (0, 9)]
    without = [simulate(SPLIT, [asked(images=1), *[asked()] * n]).outcomes[0].first_token for n in (0, 9)]
    assert first[0] == pytest.approx(without[0])
    assert (first[1] or 0) > (without[1] or 0)


def test_tokens_that_are_sent_take_cores_too() -> None:
    ends = [simulate(AGGREGATED, [asked(answer=40)] * 8, costs=SimpleCosts(token=token)) for token in (0.0, 0.005)]
    assert ends[1].outcomes[-1].end > ends[0].outcomes[-1].end  # type: ignore[operator]
    assert ends[1].busy[Stage.SERVE] * ends[1].seconds * 2 == pytest.approx(8 * 40 * 0.005)


def test_p_and_d_apart_hand_over_after_the_first_token() -> None:
    costs = SimpleCosts(move=0.5)
    (outcome,) = simulate(apart(), [asked(answer=3)], costs=costs).outcomes
    assert outcome.first_token == pytest.approx(0.01 + 20 * 0.001)
    assert outcome.end is not None
    assert outcome.end - (outcome.first_token or 0) == pytest.approx(0.5 + 2 * 0.011)


def test_a_single_token_is_not_handed_over() -> None:
    (outcome,) = simulate(apart(), [asked(answer=1)], costs=SimpleCosts(move=0.5)).outcomes
    assert outcome.end == outcome.first_token


def test_an_image_that_is_known_is_not_encoded_again() -> None:
    arrivals = [asked(10.0 * number, images=1, names=("cat",)) for number in range(5)]
    result = simulate(SPLIT, arrivals)
    assert result.busy[Stage.ENCODE] * result.seconds * len(SPLIT.places) == pytest.approx(0.2)


def test_an_image_goes_to_the_encoder_that_has_it() -> None:
    """Embeddings are in the encoders' memories, so any other would encode it again."""
    two = split_on_cpu(CPU, 2, 1)
    arrivals = [asked(10.0 * number, images=1, names=(f"image {number % 3}",)) for number in range(9)]
    result = simulate(two, arrivals)
    assert result.busy[Stage.ENCODE] * result.seconds * len(two.places) == pytest.approx(3 * 0.2)


def test_requests_for_the_same_image_at_once_share_its_encoding() -> None:
    result = simulate(SPLIT, [asked(images=1, names=("cat",)) for _ in range(4)])
    assert result.busy[Stage.ENCODE] * result.seconds * len(SPLIT.places) == pytest.approx(0.2)


@pytest.mark.parametrize("candidate", ARMS + ON_GPUS, ids=named)
@pytest.mark.parametrize("mix", ["mixed", "heavy", "repeats"])
def test_every_request_is_answered_in_the_end(candidate: Candidate, mix: str) -> None:
    result = simulate(candidate, MIXES[mix].pattern(1), rate=20.0)
    assert all(outcome.end is not None and not outcome.refused for outcome in result.outcomes)


@pytest.mark.parametrize("candidate", [COLOCATED, AGGREGATED, apart()], ids=named)
def test_equal_requests_give_equal_results(candidate: Candidate) -> None:
    def found() -> list[tuple[float | None, float | None]]:
        outcomes = simulate(candidate, MIXES["mixed"].pattern(1), rate=5.0).outcomes
        return [(outcome.first_token, outcome.end) for outcome in outcomes]

    assert found() == found()


def test_clients_give_up_what_is_far_too_late() -> None:
    arrivals = [asked(number / 1000, images=2) for number in range(30)]
    result = simulate(SPLIT, arrivals, limits=SameLimits(0.5, 1.0))
    assert any(outcome.given_up for outcome in result.outcomes)
    assert all(outcome.given_up != (outcome.end is not None) for outcome in result.outcomes)


@pytest.mark.parametrize("candidate", ARMS + ON_GPUS, ids=named)
def test_what_was_given_up_leaves_room_for_others(candidate: Candidate) -> None:
    storm = [asked(number / 1000, images=2, answer=40) for number in range(60)]
    result = simulate(candidate, [*storm, asked(100.0, images=1)], limits=SameLimits(0.5, 0.01))
    alone = simulate(candidate, [asked(images=1)]).outcomes[0]
    assert result.outcomes[-1].first_token is not None
    assert alone.first_token is not None
    assert result.outcomes[-1].first_token <= 1.01 * alone.first_token


def test_a_full_stage_does_as_much_as_its_work_allows() -> None:
    arrivals = [asked(number / 1000, images=1, answer=1) for number in range(50)]
    result = simulate(SPLIT, arrivals)
    assert result.seconds == pytest.approx(50 * 0.2, rel=0.05)


def test_waiting_for_an_encoder_is_as_long_as_queueing_theory_says() -> None:
    # M/D/1: with constant work s and utilization r, the mean wait is s r / (2 (1 - r)).
    generator = random.Random(0)
    time, arrivals = 0.0, []
    for _ in range(2000):
        time += generator.expovariate(1.0)
        arrivals.append(asked(time, images=1, answer=1))
    costs = SimpleCosts(step=1e-6, row=1e-9)
    result = simulate(SPLIT, arrivals, rate=3.0, costs=costs)
    waits = [outcome.embedded - 0.2 for outcome in result.outcomes]
    used = 3.0 * 0.2
    assert sum(waits) / len(waits) == pytest.approx(0.2 * used / (2 * (1 - used)), rel=0.15)


def test_instances_that_share_all_cores_do_at_least_as_much_as_the_same_instances_that_divide_them() -> None:
    sharing = colocated_on_cpu(CPU, 1, 1)
    for mix in ("text", "images", "mixed"):
        arrivals = [Arrival(0.0, arrival.shape) for arrival in MIXES[mix].pattern(2)]
        assert simulate(sharing, arrivals).seconds <= 1.02 * simulate(SPLIT, arrivals).seconds


def test_a_second_gpu_answers_earlier() -> None:
    for layout in (Layout.AGGREGATED, Layout.COLOCATED):
        one, two = (
            next(candidate for candidate in candidates(parse_devices(text)) if candidate.layout is layout)
            for text in ("1xH100", "2xH100")
        )
        means = []
        for candidate in (one, two):
            outcomes = simulate(candidate, MIXES["images"].pattern(3), rate=4.0).outcomes
            means.append(sum(outcome.first_token or 0.0 for outcome in outcomes) / len(outcomes))
        assert means[1] <= means[0]
