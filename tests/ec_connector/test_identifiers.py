"""Every method checks that an identifier is 64 lower-case hex digits before it uses it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chiasm.ec_transfer import ECConnectorMetadata, check_identifier
from chiasm.errors import Code, InvalidRequestError

from .instance import Instance, Item, Request

GOOD = "0123456789abcdef" * 4
BAD: list[Any] = [
    "",
    "/",
    "..",
    "../escaped",
    "/etc/passwd",
    "a" * 61 + "/..",
    "\0" * 64,
    GOOD[:63] + "\0",
    GOOD[:63],
    GOOD + "0",
    GOOD + "\n",
    GOOD.upper(),
    "g" * 64,
    "é" * 64,
    "\u0663" * 64,  # digits, but not ASCII
    "a" * 10_000,
    GOOD.encode(),
    None,
    7,
    [GOOD],
]


@given(st.text())
def test_other_text_is_not_an_identifier(text: str) -> None:
    hexadecimal = len(text) == 64 and set(text) <= set("0123456789abcdef")
    if hexadecimal:
        assert check_identifier(text) == text
    else:
        with pytest.raises(InvalidRequestError):
            check_identifier(text)


@given(st.text(alphabet="0123456789abcdef", min_size=64, max_size=64))
def test_64_lower_case_hex_digits_are_an_identifier(text: str) -> None:
    assert check_identifier(text) == text


@pytest.mark.parametrize("identifier", BAD, ids=lambda bad: repr(bad)[:20])
def test_every_method_refuses_a_malformed_identifier_and_touches_no_file(
    encoder: Instance, pd: Instance, folder: Path, identifier: Any
) -> None:
    before = sorted(os.walk(folder.parent))
    request = Request((Item(identifier),))
    cache = {identifier: torch.zeros(1, 1)} if not isinstance(identifier, list) else {}
    calls: list[Callable[[], object]] = [
        lambda: pd.scheduler.has_cache_item(identifier),
        lambda: pd.scheduler.ensure_cache_available(request, 0),
        lambda: pd.scheduler.update_state_after_alloc(request, 0),
        lambda: pd.worker.bind_connector_metadata(ECConnectorMetadata((identifier,))),
        lambda: pd.worker.save_caches(cache, identifier),
        lambda: encoder.scheduler.has_cache_item(identifier),
        lambda: encoder.scheduler.update_state_after_alloc(request, 0),
        lambda: encoder.worker.save_caches(cache, identifier),
    ]
    for call in calls:
        with pytest.raises(InvalidRequestError, match="64 lower-case hex digits") as raised:
            call()
        assert len(raised.value.message) < 200
        assert raised.value.code is Code.INVALID_UUID
    assert sorted(os.walk(folder.parent)) == before
