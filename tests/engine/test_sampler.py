"""Choosing tokens: greedy, filters, penalties, seeds, log probabilities."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of_examples
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from chiasm.engine.grammar import Allowed, GrammarError
from chiasm.engine.logit_changes import LogitChanges, change
from chiasm.engine.request import MAX_BIASED_TOKENS, MAX_STOP_TOKENS, SamplingParams
from chiasm.engine.sampler import Sampled, SamplingInput, sample, uniform
from chiasm.errors import InvalidRequestError

LOGITS = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])


def inputs_of(
    params: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    stops: Sequence[int] = (),
    *,
    seed: int = 0,
    allowed: Allowed | GrammarError | None = None,
) -> SamplingInput:
    return SamplingInput(params, seed, [*prompt, *output], len(prompt), LogitChanges(params, prompt, stops), allowed)


def choose(
    logits: torch.Tensor = LOGITS,
    *,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    seed: int = 0,
    stops: Sequence[int] = (),
    **params: Any,
) -> Sampled:
    return sample(logits[None].clone(), [inputs_of(SamplingParams(**params), prompt, output, stops, seed=seed)])[0]


def draws(count: int = 400, **params: Any) -> Counter[int]:
    inputs = [inputs_of(SamplingParams(**params), seed=seed) for seed in range(count)]
    return Counter(one.token_id for one in sample(LOGITS.repeat(count, 1), inputs))


def test_temperature_zero_takes_the_most_likely() -> None:
    assert choose(temperature=0).token_id == 4


def test_frequencies_follow_the_probabilities() -> None:
    seen = draws(4000, temperature=1.0)
    expected = torch.softmax(LOGITS, 0)
    for token in range(5):
        assert seen[token] / 4000 == pytest.approx(float(expected[token]), abs=0.03)


def test_a_higher_temperature_flattens() -> None:
    assert draws(temperature=2.0)[0] > draws(temperature=0.5)[0]


def test_top_k_keeps_the_k_most_likely() -> None:
    assert set(draws(temperature=2.0, top_k=2)) == {3, 4}


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    probabilities = torch.softmax(LOGITS / 2.0, 0)
    assert float(probabilities[4]) < 0.6 < float(probabilities[3:].sum())
    assert set(draws(temperature=2.0, top_p=0.6)) == {3, 4}


def test_top_p_always_keeps_one() -> None:
    assert set(draws(temperature=1.0, top_p=1e-6)) == {4}


def test_min_p_drops_tokens_that_are_unlikely_relative_to_the_best() -> None:
    probabilities = torch.softmax(LOGITS, 0)
    limit = float(probabilities[3] / probabilities[4]) - 0.01
    assert set(draws(temperature=1.0, min_p=limit)) == {3, 4}


def test_a_seed_gives_the_same_token_in_any_batch() -> None:
    inputs = [inputs_of(SamplingParams(temperature=1.0), seed=seed) for seed in range(8)]
    together = [token.token_id for token in sample(LOGITS.repeat(8, 1), inputs)]
    alone = [choose(seed=seed, temperature=1.0).token_id for seed in range(8)]
    assert together == alone


def test_a_draw_depends_on_the_position_not_on_what_was_drawn_before() -> None:
    numbers = [uniform(7, position) for position in range(1000)]
    assert len(set(numbers)) == 1000
    assert all(0 <= number < 1 for number in numbers)
    assert sum(numbers) / 1000 == pytest.approx(0.5, abs=0.05)


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([float("-inf"), 0.0, float("-inf")])
    assert {choose(logits, seed=seed, temperature=1.0).token_id for seed in range(200)} == {1}


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    assert choose(temperature=0, prompt=[4, 4], presence_penalty=2.0).token_id == 4
    assert choose(temperature=0, output=[4], presence_penalty=2.0).token_id == 3
    assert choose(temperature=0, output=[4], frequency_penalty=0.9).token_id == 4
    assert choose(temperature=0, output=[4, 4], frequency_penalty=0.9).token_id == 3


def test_repetition_penalty_counts_prompt_and_output() -> None:
    assert choose(temperature=0, prompt=[4], repetition_penalty=2.0).token_id == 3
    assert choose(temperature=0, prompt=[4], output=[3], repetition_penalty=3.0).token_id == 2


def test_repetition_penalty_pushes_negative_logits_down() -> None:
    assert choose(torch.tensor([-1.0, -1.5]), temperature=0, prompt=[0], repetition_penalty=2.0).token_id == 1


def test_logit_bias_is_added() -> None:
    assert choose(temperature=0, logit_bias={0: 10.0}).token_id == 0


def test_stop_tokens_are_kept_out_until_min_tokens() -> None:
    assert choose(temperature=0, stops=[4], min_tokens=2, output=[1]).token_id == 3
    assert choose(temperature=0, stops=[4], min_tokens=2, output=[1, 1]).token_id == 4


def test_logprobs_are_those_of_the_raw_logits_and_sum_to_one() -> None:
    token = choose(temperature=0, logprobs=5, logit_bias={0: 10.0})
    assert token.logprobs is not None
    assert token.logprobs.token_id == 0
    assert token.logprobs.logprob == pytest.approx(float(torch.log_softmax(LOGITS, 0)[0]))
    assert [token_id for token_id, _ in token.logprobs.top] == [4, 3, 2, 1, 0]
    assert sum(torch.tensor(value).exp() for _, value in token.logprobs.top) == pytest.approx(1.0)


def test_no_logprobs_unless_asked_for() -> None:
    assert choose(temperature=0).logprobs is None
    asked = choose(temperature=0, logprobs=0).logprobs
    assert asked is not None
    assert asked.top == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -3.0),
        ("repetition_penalty", 0.0),
        ("logprobs", 21),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", dict.fromkeys(range(301), 1.0)),
        ("stop_token_ids", tuple(range(301))),
        ("min_tokens", 17),
        ("temperature", float("nan")),
        ("repetition_penalty", float("nan")),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


# ---- what a token costs --------------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators_of_a_step(rows: int, tokens: int, **params: Any) -> int:
    """Count the operators of one step, when so many tokens are biased, stop the answer, are in the prompt, and were said."""
    ids = list(range(tokens))
    sampling = SamplingParams(
        logit_bias=dict.fromkeys(ids[:MAX_BIASED_TOKENS], 1.0),
        stop_token_ids=tuple(ids[:MAX_STOP_TOKENS]),
        max_tokens=3000,
        min_tokens=3000,
        presence_penalty=1.0,
        frequency_penalty=1.0,
        repetition_penalty=1.5,
        **params,
    )
    inputs = [inputs_of(sampling, ids, ids, sampling.stop_token_ids, seed=row) for row in range(rows)]
    sample(torch.zeros(rows, 3000), inputs)
    with Operators() as operators:
        sample(torch.zeros(rows, 3000), [replace(one, token_ids=[*one.token_ids, 0]) for one in inputs])
    count: int = operators.count
    return count


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0}, {"top_k": 20, "top_p": 0.8}, {"top_p": 0.9}, {"logprobs": 3}]
)
def test_a_step_takes_the_same_operators_however_many_rows_it_has_and_however_much_changes(
    params: dict[str, Any],
) -> None:
    assert operators_of_a_step(1, 1, **params) == operators_of_a_step(16, 2000, **params) < 200


class CopiesToHost(TorchFunctionMode):
    """Counts the calls that wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.__name__ in {
            "tolist",
            "item",
            "cpu",
            "numpy",
            "nonzero",
            "__bool__",
            "__int__",
            "__float__",
            "__index__",
        }:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def copies_of_a_step(every: Sequence[dict[str, Any]]) -> int:
    inputs = [inputs_of(SamplingParams(**params), [1, 2], [3]) for params in every]
    inputs.append(inputs_of(SamplingParams(), allowed=Allowed(torch.ones(3000).bool(), None, frozenset())))
    with CopiesToHost() as copies:
        sample(torch.stack([random_logits(row, 3000) for row in range(len(inputs))]), inputs)
    assert set(copies.names) <= {"cpu", "numpy", "tolist"}
    count: int = copies.names.count("cpu")
    return count


def test_a_step_copies_to_the_host_once_and_once_more_for_log_probabilities() -> None:
    every: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
        {"top_p": 0.9},
        {"min_p": 0.1, "logit_bias": {3: 1.0}},
        {"presence_penalty": 1.0},
    ]
    assert copies_of_a_step(every) == 1
    assert copies_of_a_step([*every, {"logprobs": 5}, {"temperature": 0, "logprobs": 0}]) == 2


@pytest.mark.parametrize(("logprobs", "most"), [(None, 1), (0, 38)])
def test_greedy_rows_take_few_operators(logprobs: int | None, most: int) -> None:
    inputs = [inputs_of(SamplingParams(temperature=0, logprobs=logprobs), [1, 2], [3]) for _ in range(16)]
    logits = torch.randn(16, 3000)
    with Operators() as operators:
        sample(logits, inputs)
    assert operators.count == most


def test_changes_made_anew_are_those_that_grew_with_the_answer() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.5, logit_bias={2: 3.0})
    said = [4, 3, 4, 1]
    grown, anew = LogitChanges(params, [0], ()), LogitChanges(params, [0], ())
    for count in range(len(said) + 1):
        grown.note([0, *said[:count]], 1)
    anew.note([0, *said], 1)
    changed = LOGITS.repeat(2, 1)
    change(changed, [(0, grown), (1, anew)])
    assert torch.equal(changed[0], changed[1])
    assert changed[0].tolist() == pytest.approx([0.0, 1 / 1.5 - 0.75, 5.0, 3 / 1.5 - 0.75, 4 / 1.5 - 1.0])


def calls_to_make_changes(num_biased: int) -> int:
    """How many functions are called to make the changes of a choice."""
    params = SamplingParams(repetition_penalty=1.5, logit_bias=dict.fromkeys(range(num_biased), 1.0))
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        LogitChanges(params, range(1000), ())
    finally:
        sys.setprofile(None)
    return calls


def test_a_long_prompt_is_gone_through_once_for_all_biases() -> None:
    assert calls_to_make_changes(MAX_BIASED_TOKENS) == calls_to_make_changes(1)


# ---- against a plain implementation --------------------------------------------------------------------------------------

_NARROW = 1e-6
"""How near to a limit the two may differ, because one rounds to float32."""


def plain(logits: Sequence[float], params: SamplingParams, number: float, narrow: float = _NARROW) -> int | None:
    """Return the token by definition, in plain Python; None if a limit is so near that rounding decides."""
    ids = sorted(range(len(logits)), key=lambda token_id: (-logits[token_id], token_id))
    if params.greedy:
        return ids[0]
    if 0 < params.top_k < len(ids):
        ids = ids[: params.top_k]
    weights = {token_id: math.exp((logits[token_id] - logits[ids[0]]) / params.temperature) for token_id in ids}
    total = sum(weights.values())
    before, kept = 0.0, []
    for token_id in ids:
        share = before / total
        if params.top_p < 1 and abs(share - params.top_p) < narrow:
            return None
        if params.top_p == 1 or share < params.top_p:
            kept.append(token_id)
        before += weights[token_id]
    if any(weights[token_id] != 1 and abs(weights[token_id] - params.min_p) < narrow for token_id in kept):
        return None
    kept = [token_id for token_id in kept if weights[token_id] >= params.min_p]
    if params.top_p == 1 and not 0 < params.top_k < len(logits):
        kept.sort()
    total, before = sum(weights[token_id] for token_id in kept), 0.0
    for token_id in kept:
        before += weights[token_id]
        if abs(before / total - number) < narrow:
            return None
        if number < before / total:
            return token_id
    return None


def random_logits(seed: int, size: int, spread: float = 3.0) -> torch.Tensor:
    """Logits as coarse as those of bfloat16, so that many are equal."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread
    return (values * 8).round() / 8


settings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 20, 64, 65, 700, 1 << 20]),
    top_p=st.sampled_from([1.0, 0.01, 0.3, 0.8, 0.95, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.5, 1.0]),
    logprobs=st.sampled_from([None, None, 0, 3, 20]),
)


@given(
    requests=st.lists(settings, min_size=1, max_size=6),
    size=st.sampled_from([1, 2, 63, 64, 65, 130, 1000, 5003]),
    seed=st.integers(0, 1 << 32),
)
@settings_of_examples(max_examples=40, deadline=None)
def test_each_row_of_any_batch_is_drawn_by_definition(requests: list[SamplingParams], size: int, seed: int) -> None:
    logits = torch.stack([random_logits(seed + row, size) for row in range(len(requests))])
    inputs = [inputs_of(params, seed=seed + row) for row, params in enumerate(requests)]
    together = sample(logits.clone(), inputs)
    for row, (params, one) in enumerate(zip(requests, inputs, strict=True)):
        assert sample(logits[row : row + 1].clone(), [one]) == [together[row]]
        expected = plain(logits[row].tolist(), params, uniform(one.seed, 0))
        assert expected in (None, together[row].token_id)


@pytest.mark.parametrize("top_p", [0.6, 0.99])
def test_top_p_is_exact_also_if_it_leaves_most_of_a_vocabulary(top_p: float) -> None:
    logits = random_logits(0, 20_000, spread=0.3)
    params = SamplingParams(top_p=top_p)
    inputs = [inputs_of(params, seed=seed) for seed in range(4)]
    drawn = [one.token_id for one in sample(logits.repeat(4, 1), inputs)]
    assert drawn == [plain(logits.tolist(), params, uniform(seed, 0), 1e-7) for seed in range(4)]


def test_a_row_is_the_same_alone_and_in_a_batch_of_a_large_vocabulary() -> None:
    logits = torch.randn(4, 152_000 - 1, generator=torch.Generator().manual_seed(1)) * 3
    every: list[dict[str, Any]] = [
        {},
        {"top_k": 20, "top_p": 0.8},
        {"top_p": 0.95, "temperature": 0.5},
        {"min_p": 0.01},
    ]
    inputs = [inputs_of(SamplingParams(logprobs=20, **params), seed=7) for params in every]
    alone = [sample(logits[row : row + 1].clone(), [one])[0] for row, one in enumerate(inputs)]
    assert sample(logits.clone(), inputs) == alone


def test_of_equal_logits_the_lower_token_goes_first() -> None:
    equal = torch.zeros(1000)
    assert choose(equal, temperature=0).token_id == 0
    assert {choose(equal, seed=seed, top_k=3).token_id for seed in range(50)} == {0, 1, 2}
    signs = torch.zeros(1000)
    signs[:500] = -0.0
    assert choose(signs, temperature=0).token_id == 0


# ---- grammars ------------------------------------------------------------------------------------------------------------


def held(*tokens: int, closing: Sequence[int] = (), size: int = 5) -> Allowed:
    """A grammar that allows these tokens; token 4 ends an answer."""
    masks = [torch.tensor([token in chosen for token in range(size)]) for chosen in (tokens, closing)]
    return Allowed(masks[0], masks[1] if closing else None, frozenset({4}))


def constrained(allowed: Allowed | GrammarError, **options: Any) -> Sampled:
    params = SamplingParams(**{"temperature": 0, **options})
    return sample(LOGITS[None].clone(), [inputs_of(params, stops=[4], allowed=allowed)])[0]


def test_only_what_a_grammar_allows_is_chosen() -> None:
    assert constrained(held(0, 2)).token_id == 2
    assert {constrained(held(0, 2), temperature=2.0, seed=seed).token_id for seed in range(5)} <= {0, 2}
    assert constrained(held(1), top_k=1, top_p=0.1, min_p=0.9, temperature=1.0).token_id == 1


def test_a_mask_may_be_longer_than_the_logits() -> None:
    assert constrained(held(2, 6, size=8)).token_id == 2


def test_no_bias_allows_what_a_grammar_forbids() -> None:
    assert constrained(held(0, 1), logit_bias={3: 100.0, 0: 50.0}).token_id == 0


def test_min_tokens_keep_the_end_out_unless_nothing_else_is_allowed() -> None:
    assert constrained(held(1, 4), min_tokens=3).token_id == 1
    assert constrained(held(4), min_tokens=3).token_id == 4


def test_a_model_that_wants_to_end_closes_what_is_open() -> None:
    assert constrained(held(1, 3, closing=[1])).token_id == 1
    assert constrained(held(1, 3, 4, closing=[1])).token_id == 4
    assert constrained(held(1, 3)).token_id == 3


def test_log_probabilities_are_those_of_the_model_with_a_grammar_too() -> None:
    sampled = constrained(held(1), logprobs=2)
    assert sampled.logprobs is not None
    assert sampled.logprobs.logprob == pytest.approx(float(torch.log_softmax(LOGITS, 0)[1]))
    assert [token for token, _ in sampled.logprobs.top] == [4, 3]


def test_a_grammar_that_allows_nothing_says_why() -> None:
    assert constrained(GrammarError("Too complex.")).failure == "Too complex."
