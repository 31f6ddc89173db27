"""docs/limits.md lists the limits of the code, with their options and defaults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chiasm.cli.parser import Parser
from chiasm.engine import grammar, grammar_process
from chiasm.engine import request as engine_request
from chiasm.http import json_size
from chiasm.http.config import HttpConfig
from chiasm.http.limits import Limit
from chiasm.launch.process import INSTANCE_OPTIONS, PROXY_OPTIONS
from chiasm.media import url as media_url
from chiasm.media.headers import steps
from chiasm.options import NamedOption, options_of
from chiasm.server import json_schema, sampling, structured_output, tools

CONSTANTS = (
    engine_request,
    grammar,
    grammar_process,
    sampling,
    tools,
    structured_output,
    json_schema,
    json_size,
    media_url,
    steps,
)
"""Modules whose public ``MAX_…`` bound what a request may have."""
IN_WORDS = {
    "url_characters": "length of a URL",
    "steps": "parts of a header",
    "scans": "scans of a JPEG",
    "exif_bytes": "EXIF data, data of Photoshop, comments and extensions of a GIF",
}
"""What the page calls them that it doesn't call by their names."""
PAGE = (Path(__file__).parents[1] / "docs/limits.md").read_text()


class Row(NamedTuple):
    """One limit as the page has it."""

    name: str
    options: list[tuple[str, list[str]]]
    """Flags with their defaults."""
    protects: str
    seen: str
    metric: str


def rows() -> list[Row]:
    found = []
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("| ") else ["limit"]
        if cells[0] != "limit":
            name, options, protects, seen, *others = cells
            metric = others[0] if others else ""
            given = [
                (flag, re.findall(r"[\w.]+", values)) for flag, values in re.findall(r"`(--[\w-]+)`([^`]*)", options)
            ]
            found.append(Row(name.strip("`"), given, protects, seen, metric.strip("`")))
    return found


def options() -> dict[str, list[NamedOption]]:
    """The options of the proxy and of instances by their flags; the proxy's come first."""
    found: dict[str, list[NamedOption]] = {}
    for config in dict.fromkeys((*PROXY_OPTIONS, *INSTANCE_OPTIONS)):
        for option in options_of(config):
            found.setdefault(option.flag, []).append(option)
    return found


def read(option: NamedOption, text: str) -> Any:
    """Return the value of an option that is written like this."""
    parser = Parser("test", "", "")
    parser.add_option(option, parser.add_argument_group("all"))
    return vars(parser.parse_args([option.flag, text]))[option.name]


def test_each_limit_of_http_has_a_row_and_a_metric() -> None:
    metrics = [row.metric for row in rows() if row.metric in set(Limit)]
    assert metrics == list(Limit)
    assert [row.name for row in rows() if row.metric in set(Limit)] == metrics


def test_each_limit_has_its_options_with_their_defaults() -> None:
    known = options()
    for row in rows():
        for flag, defaults in row.options:
            assert flag in known, f"{row.name}: {flag} is no option"
            if row.metric not in set(Limit):  # what stands there are words
                continue
            assert [read(known[flag][0], text) for text in defaults] == [one.default for one in known[flag]], row.name


def test_each_option_that_limits_http_is_in_a_row() -> None:
    listed = {flag for row in rows() for flag, _ in row.options}
    limits = [one.flag for one in options_of(HttpConfig) if re.search("max_|min_|small_|discard_|_seconds", one.name)]
    assert set(limits) <= listed


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_each_row_says_what_it_protects_and_what_a_client_sees(row: Row) -> None:
    assert row.protects
    assert row.seen


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        (name, limit)
        for module in CONSTANTS
        for name, limit in vars(module).items()
        if name.startswith("MAX_") and isinstance(limit, int)
    ],
)
def test_each_constant_that_limits_a_request_has_a_row_with_its_value(name: str, limit: int) -> None:
    unit = f"{limit >> 20} ?MiB" if limit % (1 << 20) == 0 else f"{limit >> 10} ?KiB"
    written = unit if name.endswith("_BYTES") else f"{limit:,}"
    called = name.removeprefix("MAX_").lower()
    lines = [line for line in PAGE.splitlines() if line.startswith(f"| {IN_WORDS.get(called, f'`{called}`')} |")]
    assert len(lines) == 1, f"{name} has {len(lines)} rows"
    assert re.search(rf"(?<![\d,.]){written}(?![\d,])", lines[0].split(" | ")[1]), (
        f"{name}: its row doesn't say {written}"
    )
