"""What a step costs, counted in operators."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chiasm import checkpoints
from chiasm.engine.attention import KVCache
from chiasm.engine.model_runner import ModelRunner
from chiasm.engine.request import SamplingParams
from chiasm.engine.sequence import Sequence
from chiasm.engine.step import ScheduledSequence, Step
from chiasm.models import load_language
from chiasm.models.base import Prompt

MOST_OPERATORS = 158
"""Of the model in a step that decodes, with the demo checkpoint's four layers."""
WAITS = ("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.is_nonzero", "aten.masked_select")
"""Operators after which a GPU has to be waited for."""
_NUMBERS = itertools.count()


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators[str(function).rpartition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    language = load_language(checkpoints.folder("demo"), dtype=torch.float32, device=torch.device("cpu"))
    return ModelRunner(language, KVCache(language, num_blocks=64, block_size=16), frozenset())


def _sequence(index: int, tokens: int, blocks: list[int]) -> Sequence:
    sequence = Sequence(
        request_id=f"request-{next(_NUMBERS)}",
        index=0,
        arrival=index,
        prompt=Prompt([5 + (index + token) % 200 for token in range(tokens)]),
        sampling=SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True),
        seed=0,
        block_size=16,
    )
    sequence.block_ids = blocks
    return sequence


def _run(runner: ModelRunner, sequences: list[Sequence], *, prefill: bool = False) -> list[int]:
    parts = [
        ScheduledSequence(one, 0, one.num_tokens, samples=True)
        if prefill
        else ScheduledSequence(one, one.num_tokens - 1, 1, samples=True)
        for one in sequences
    ]
    sampled = runner.execute(Step(decodes=[] if prefill else parts, prefills=parts if prefill else []), {})
    found = [sampled[one.sequence_id].token_id for one in sequences]
    for one, token in zip(sequences, found, strict=True):
        one.token_ids.append(token)
    return found


@pytest.fixture
def counted(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> _Counted:
    """Counts what the model calls, sampling and the preparation of steps left out."""
    mode, language = _Counted(), runner.language

    def watched(compute: Any) -> Any:
        def call(*args: Any) -> Any:
            with mode:
                return compute(*args)

        return call

    monkeypatch.setattr(language, "forward", watched(language.forward))
    monkeypatch.setattr(language, "logits", watched(language.logits))
    return mode


def test_a_decode_step_calls_few_operators(runner: ModelRunner, counted: _Counted) -> None:
    sequence = _sequence(0, 40, [3, 1, 7, 2])
    _run(runner, [sequence], prefill=True)
    counted.operators.clear()
    _run(runner, [sequence])
    assert sum(counted.operators.values()) <= MOST_OPERATORS, counted.operators.most_common()


def test_the_operators_of_a_step_do_not_grow_with_its_requests(runner: ModelRunner, counted: _Counted) -> None:
    sequences = [_sequence(index, 40, [4 * index, 4 * index + 1, 4 * index + 2]) for index in range(8)]
    _run(runner, sequences, prefill=True)
    counted.operators.clear()
    _run(runner, sequences)
    assert sum(counted.operators.values()) <= MOST_OPERATORS, counted.operators.most_common()


def test_nothing_in_the_model_waits_for_the_device(runner: ModelRunner, counted: _Counted) -> None:
    sequences = [_sequence(index, 20 + 9 * index, [3 * index, 3 * index + 1, 3 * index + 2]) for index in range(3)]
    _run(runner, sequences, prefill=True)
    _run(runner, sequences)
    assert counted.operators
    assert not counted.operators.keys() & set(WAITS)


def test_requests_are_decoded_together_as_they_are_alone(runner: ModelRunner) -> None:
    lengths = [7, 40, 21]
    blocks = [[0], [5, 3, 4], [9, 8]]
    alone = []
    for index, (length, ids) in enumerate(zip(lengths, blocks, strict=True)):
        sequence = _sequence(index, length, ids)
        _run(runner, [sequence], prefill=True)
        alone.append([_run(runner, [sequence])[0] for _ in range(3)])
        runner.forget(sequence.request_id)
    sequences = [_sequence(index, length, ids) for index, (length, ids) in enumerate(zip(lengths, blocks, strict=True))]
    _run(runner, sequences, prefill=True)
    together = [_run(runner, sequences) for _ in range(3)]
    assert [list(tokens) for tokens in zip(*together, strict=True)] == alone


def test_a_sequence_that_gets_other_blocks_is_read_from_them(runner: ModelRunner) -> None:
    sequence = _sequence(0, 40, [3, 1, 7, 2])
    _run(runner, [sequence], prefill=True)
    expected = [_run(runner, [sequence])[0] for _ in range(2)]
    del sequence.token_ids[40:]
    sequence.block_ids = [9, 8, 12, 11]  # as after a preemption
    _run(runner, [sequence], prefill=True)
    assert [_run(runner, [sequence])[0] for _ in range(2)] == expected
    runner.forget(sequence.request_id)
