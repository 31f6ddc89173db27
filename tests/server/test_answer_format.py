"""A whole answer is written in small steps."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models

from chiasm.server.answer_format import AnswerFormat, ChatFormat, CompletionFormat
from chiasm.server.generation import ChoiceState
from chiasm.server.protocol import PromptTokensDetails, Usage
from chiasm.wire import TokenLogprob


@pytest.mark.parametrize("kind", [ChatFormat, CompletionFormat])
@pytest.mark.parametrize("tokens", [0, 1, 32, 33, 100])
def test_log_probabilities_written_in_steps_are_those_written_at_once(kind: type[AnswerFormat], tokens: int) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{token}": token for token in range(200)}, unk_token="w0"))
    written = kind(
        "id", 1, "m", tokenizer, num_choices=2, has_logprobs=True, skip_special_tokens=True, announces_usage=False
    )
    logprobs = [TokenLogprob(-index / 7, ((index, -0.1), (index + 1, -0.2)), index) for index in range(tokens)]
    choice = ChoiceState(['a"logprobs":null'], logprobs, list(range(tokens)), "stop")
    answer = json.loads(written.body([choice, choice], Usage(1, 2, 3, PromptTokensDetails(0)), None))
    at_once = json.loads(written.written_logprobs(logprobs, choice.text_offsets))
    assert [one["logprobs"] for one in answer["choices"]] == [at_once] * 2
