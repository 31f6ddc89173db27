"""Requests with one value replaced by something that no client should send."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

VALUES = {
    "400 digits": "9" * 400,
    "minus 400 digits": "-" + "9" * 400,
    "5000 digits": "9" * 5000,
    "just beyond 64 bits": str(1 << 64),
    "9e400": "9e400",
    "1e308": "1e308",
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "minus zero": "-0.0",
    "negative": "-1",
    "zero": "0",
    "fraction": "1.5",
    "bool": "true",
    "null": "null",
    "empty string": '""',
    "NUL": '"\\u0000"',
    "half a pair": '"\\ud800"',
    "half a pair in a text": '"abc \\udfff abc abc"',
    "not UTF-8": '"\\xff"',
    "not UTF-8, with an escape": '"\\n\\xff"',
    "a name that is not UTF-8": '{"\\xff": 1}',
    "a megabyte": '"' + "x" * 300_000 + '"',
    "empty list": "[]",
    "empty object": "{}",
    "list of numbers": "[" + ",".join(["-1"] * 300) + "]",
    "deep": "[" * 700 + "]" * 700,
    "deep object": '{"a":' * 700 + "1" + "}" * 700,
}
"""JSON, or nearly; ``\\xff`` stands for a byte that is no UTF-8."""
_HERE = "a value to be replaced"


class Mutation(NamedTuple):
    """A body, and the names on the way to the value that was replaced in it."""

    body: bytes
    names: tuple[str, ...]


def mutations(request: dict[str, Any]) -> Iterator[Mutation]:
    """Yield the request with each of its values, at any depth, replaced by each of VALUES."""
    for path in _paths(request):
        marked = json.dumps(_with(request, path, _HERE))
        for value in VALUES.values():
            body = marked.replace(f'"{_HERE}"', value, 1).encode().replace(b"\\xff", b"\xff")
            yield Mutation(body, tuple(part for part in path if isinstance(part, str)))


def _paths(value: Any) -> Iterator[tuple[str | int, ...]]:
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, member in members:
        yield (name,)
        yield from ((name, *path) for path in _paths(member))


def _with(value: Any, path: tuple[str | int, ...], replacement: Any) -> Any:
    if not path:
        return replacement
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _with(value[path[0]], path[1:], replacement)
    return copy
