"""Names of items."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.ec_transfer import check_identifier
from chiasm.errors import InvalidRequestError
from chiasm.media import identifier

PRINT = "f" * 64


def test_a_name_is_64_lower_case_hex_digits() -> None:
    name = identifier(b"image", fingerprint=PRINT)
    assert check_identifier(name) == name
    assert name == identifier(b"image", fingerprint=PRINT, salt="")


def test_media_model_and_tenant_each_change_the_name() -> None:
    names = {
        identifier(b"image", fingerprint=PRINT),
        identifier(b"another", fingerprint=PRINT),
        identifier(b"image", fingerprint="e" * 64),
        identifier(b"image", fingerprint=PRINT, salt="tenant"),
    }
    assert len(names) == 4


@settings(deadline=None)
@given(st.binary(), st.text(), st.text(), st.binary(), st.text(), st.text())
def test_two_triples_never_run_together(m1: bytes, f1: str, s1: str, m2: bytes, f2: str, s2: str) -> None:
    one, other = identifier(m1, fingerprint=f1, salt=s1), identifier(m2, fingerprint=f2, salt=s2)
    assert (one == other) == ((m1, f1, s1) == (m2, f2, s2))


def test_what_moves_from_one_field_to_the_next_changes_the_name() -> None:
    assert identifier(b"c", fingerprint="b", salt="a") != identifier(b"bc", fingerprint="", salt="a")
    assert identifier(b"c", fingerprint="ab") != identifier(b"c", fingerprint="b", salt="a")


@pytest.mark.parametrize(
    "value",
    [
        "",
        "a" * 63,
        "a" * 65,
        "A" * 64,
        "g" * 64,
        "a" * 64 + "\n",
        "../" * 21 + "a",
        "a/" * 32,
        "\0" * 64,
        "a" * 10_000,
        "é" * 64,
        None,
        1,
        b"a" * 64,
        ["a" * 64],
    ],
)
def test_anything_else_is_refused(value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_identifier(value)
    assert len(str(caught.value)) < 300
    assert caught.value.code == "invalid_uuid"
