"""A person's own arrivals and sizes."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from chiasm.bench.trace import MAX_LINES, read_trace
from chiasm.bench.traffic import Shape
from chiasm.errors import ConfigurationError

_GOOD: dict[str, Any] = {"time": 0, "prompt_tokens": 8, "answer_tokens": 4}


def _file(folder: Path, *lines: object) -> Path:
    file = folder / "trace.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def test_a_trace_is_read(tmp_path: Path) -> None:
    second = _GOOD | {"time": 2.0, "images": [[640, 480], 512], "image_ids": ["a", "b"]}
    trace = read_trace(_file(tmp_path, _GOOD, "", second))
    assert [arrival.shape for arrival in trace.requests] == [
        Shape(8, (), 4),
        Shape(8, ((640, 480), (512, 512)), 4, ("a", "b")),
    ]
    assert trace.rate == 0.5


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "malformed"),
        ("[]", "Expected `object`"),
        ({"time": 1}, "missing required field `prompt_tokens`"),
        (_GOOD | {"time": "soon"}, "Expected `float`"),
        (_GOOD | {"time": -1}, "time"),
        (_GOOD | {"prompt_tokens": 0}, "prompt_tokens"),
        (_GOOD | {"prompt_tokens": 1 << 21}, "prompt_tokens"),
        (_GOOD | {"answer_tokens": 1.5}, "answer_tokens"),
        (_GOOD | {"images": 3}, "images"),
        (_GOOD | {"images": [[1, 2, 3]]}, "images"),
        (_GOOD | {"images": [1 << 20]}, "images"),
        (_GOOD | {"images": [1] * 65}, "images"),
        (_GOOD | {"images": [1], "image_ids": []}, "there are 1 images and 0 image_ids"),
        (_GOOD | {"tokens": 1}, "unknown field `tokens`"),
        pytest.param("[" * 50_000, "line 2", id="nested"),
        pytest.param('"' + "a" * 70_000 + '"', "at most 65536 bytes", id="long"),
    ],
)
def test_nonsense_is_refused_with_its_line_and_the_reason(tmp_path: Path, line: object, reason: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_trace(_file(tmp_path, _GOOD, line, _GOOD | {"time": 5}))
    assert "trace.jsonl, line 2: " in caught.value.message
    assert reason in caught.value.message


def test_time_must_not_go_back(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="line 3: the time 1 is before that of the request before it, 2"):
        read_trace(_file(tmp_path, _GOOD, _GOOD | {"time": 2}, _GOOD | {"time": 1}))


def test_requests_need_different_times(tmp_path: Path) -> None:
    for lines in ((), (_GOOD,), (_GOOD, _GOOD)):
        with pytest.raises(ConfigurationError, match="at least two requests at different times"):
            read_trace(_file(tmp_path, *lines))


@pytest.mark.parametrize("last", [1e-310, 1e-9])
def test_requests_need_times_that_can_be_told_apart(tmp_path: Path, last: float) -> None:
    with pytest.raises(ConfigurationError, match="at least two requests at different times"):
        read_trace(_file(tmp_path, _GOOD, _GOOD | {"time": last}))


def test_times_may_be_unix_times(tmp_path: Path) -> None:
    trace = read_trace(_file(tmp_path, _GOOD | {"time": 1_780_000_000.5}, _GOOD | {"time": 1_780_000_002.5}))
    assert trace.rate == 0.5
    assert [one.time for one in trace.pattern(0)] == [0.0, 1.0]


def test_a_trace_has_a_largest_length(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"line {MAX_LINES + 1}: "):
        read_trace(_file(tmp_path, *[json.dumps(_GOOD)] * (MAX_LINES + 1)))


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Cannot read the trace"):
        read_trace(tmp_path / "none.jsonl")


def test_random_bytes_raise_no_other_error(tmp_path: Path) -> None:
    generator = random.Random(0)
    file = tmp_path / "trace.jsonl"
    for _ in range(200):
        line = bytearray(json.dumps(_GOOD | {"images": [1, [2, 3]]}).encode())
        for _ in range(generator.randint(1, 8)):
            line[generator.randrange(len(line))] = generator.randrange(256)
        file.write_bytes(bytes(line) * generator.randint(1, 3))
        with contextlib.suppress(ConfigurationError):
            read_trace(file)


def test_seeds_are_windows_of_the_trace(tmp_path: Path) -> None:
    trace = read_trace(_file(tmp_path, *({**_GOOD, "time": place, "prompt_tokens": place + 1} for place in range(100))))
    first, second = trace.pattern(0), trace.pattern(1)
    assert [arrival.shape.prompt_tokens for arrival in first] == list(range(1, 61))
    assert [arrival.shape.prompt_tokens for arrival in second] == [*range(61, 101), *range(1, 21)]
    assert [arrival.time for arrival in first] == pytest.approx(list(range(60)))
    assert [arrival.time for arrival in second] == pytest.approx(list(range(60)))
