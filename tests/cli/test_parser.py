"""Sizes and sets of CPUs as a person writes them, and the options that the fields of configurations become."""

from __future__ import annotations

import argparse

import pytest

from chiasm.cli import proxy, serve
from chiasm.cli.parser import Parser, option, parse_cpus, parse_size, show_size
from chiasm.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 1 << 20),
        ("512MiB", 512 << 20),
        ("512M", 512 << 20),
        ("1.5 gib", 3 << 29),
        ("2TiB", 2 << 40),
        ("10MB", 10_000_000),
        ("4kB", 4000),
        ("7b", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(("size", "text"), [(4 << 30, "4GiB"), (3 << 20, "3MiB"), (1000, "1000"), (0, "0")])
def test_sizes_are_shown_as_a_person_writes_them(size: int, text: str) -> None:
    assert show_size(size) == text


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1 mile", "0x10", "1e9", "1,5GB"])
def test_other_texts_are_not_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(("text", "cpus"), [("0", (0,)), ("2,0", (0, 2)), ("0,2-4, 3", (0, 2, 3, 4))])
def test_cpus(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "3-1"])
def test_other_texts_are_not_sets_of_cpus(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a set of CPUs"):
        parse_cpus(text)


@pytest.mark.parametrize(("text", "ends"), [("1..4", (1, 4)), ("3", (3, 3)), (" 2..2 ", (2, 2)), ("0..1", (0, 1))])
def test_ranges(text: str, ends: tuple[int, int]) -> None:
    assert serve.parser().parse(["demo", "--encoders", text], {})["encoders"] == ends


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4..1", "is no range, since it ends before it begins; write 1..4"),
        ("1..2147483648", "is more than the limit"),
        *((text, "nor a range of them, such as 1..4") for text in ("", "1..", "..4", "a..b", "-1..2", "1...4", "1-4")),
    ],
)
def test_other_texts_are_not_ranges(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        serve.parser().parse(["demo", "--encoders", text], {})


@pytest.mark.parametrize(("text", "values"), [("[]", ()), ('["*"]', ("*",)), ('["a", "b,c"]', ("a", "b,c"))])
def test_lists_in_json(text: str, values: tuple[str, ...]) -> None:
    assert proxy.parser().parse(["--allowed-origins", text], {}) == {"allowed_origins": values}


@pytest.mark.parametrize("text", ["", "*", "https://a", '"*"', "[1]", '{"a": 1}', "[" * 50_000])
def test_other_texts_are_not_lists_in_json(text: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r'not a JSON list of strings; write for example \["https://example.com"\]'
    ) as refused:
        proxy.parser().parse(["--allowed-origins", text], {})
    assert len(str(refused.value)) < 500


def test_the_environment_has_one_value_of_an_option_that_can_be_repeated() -> None:
    environment = {"CHIASM_API_KEY": "a"}
    assert proxy.parser().parse([], environment) == {"api_key": ("a",)}
    assert proxy.parser().parse([], {"CHIASM_API_KEY": ""}) == {"api_key": ("",)}, "it is refused, not left out"
    assert proxy.parser().parse(["--api-key", "b", "--api-key", "c"], environment) == {"api_key": ("b", "c")}


@pytest.mark.parametrize("size", ["9" * 400, "9" * 30 + "TiB"])
def test_absurd_sizes_are_refused(size: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="larger than any memory"):
        parse_size(size)


@pytest.mark.parametrize("kind", [int, float])
@pytest.mark.parametrize(
    "text", ["9" * 400, "9" * 5000, "9e400", "1e308", "nan", "inf", "-inf", "", "1_000_000_000_000", "٣" * 30]
)
def test_absurd_numbers_are_refused(kind: type, text: str) -> None:
    parser = Parser("x", "", "")
    parser.add_option(option("number", kind, "A number."))
    with pytest.raises(ConfigurationError, match="--number"):
        parser.parse(["--number", text])


@pytest.mark.parametrize("option", ["--api-key-file", "--allowed-local-media-path"])
def test_an_empty_path_is_refused(option: str) -> None:
    name = option.removeprefix("--").replace("-", "_")
    with pytest.raises(ConfigurationError, match=f"{option}: the path is empty"):
        proxy.parser().parse([option, ""], {})
    with pytest.raises(ConfigurationError, match="in the environment: the path is empty"):
        proxy.parser().parse([], {f"CHIASM_{name.upper()}": ""})
