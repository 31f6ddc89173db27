"""The fleet key: how it is read, and what it proves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from chiasm.errors import ConfigurationError
from chiasm.fleet_key import (
    FLEET_KEY_VARIABLE,
    NONCE_BYTES,
    PROOF_BYTES,
    FleetKey,
    Handshake,
    Side,
    make_fleet_key,
    make_nonce,
    read_fleet_key,
)

OLD, NEW = make_fleet_key(), make_fleet_key()
KEY = FleetKey([OLD])


def handshake(**changed: Any) -> Handshake:
    made = Handshake(
        protocol="kv", version=2, engine_id="engine", caller_nonce=b"c" * NONCE_BYTES, listener_nonce=b"l" * NONCE_BYTES
    )
    return dataclasses.replace(made, **changed)


def key_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    file = folder / "fleet.key"
    file.write_text(text)
    file.chmod(mode)
    return file


@pytest.mark.parametrize("side", Side)
def test_a_process_of_the_same_fleet_accepts_a_proof(side: Side) -> None:
    proof = KEY.prove(side, handshake())
    assert len(proof) == PROOF_BYTES
    assert FleetKey([OLD]).accepts(proof, side, handshake())


def test_a_process_of_another_fleet_does_not() -> None:
    assert not FleetKey([NEW]).accepts(KEY.prove(Side.CALLER, handshake()), Side.CALLER, handshake())


def test_a_proof_sent_back_to_its_maker_proves_nothing() -> None:
    assert not KEY.accepts(KEY.prove(Side.LISTENER, handshake()), Side.CALLER, handshake())


@pytest.mark.parametrize(
    "changed",
    [
        {"protocol": "ec"},
        {"version": 3},
        {"engine_id": "restarted"},
        {"caller_nonce": make_nonce()},
        {"listener_nonce": make_nonce()},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_proof_counts_for_one_handshake_only(changed: dict[str, Any]) -> None:
    assert not KEY.accepts(KEY.prove(Side.CALLER, handshake()), Side.CALLER, handshake(**changed))


@pytest.mark.parametrize("nonce", [b"", b"c" * (NONCE_BYTES - 1)])
def test_a_short_nonce_is_never_accepted(nonce: bytes) -> None:
    weak = handshake(caller_nonce=nonce)
    assert not KEY.accepts(KEY.prove(Side.LISTENER, weak), Side.LISTENER, weak)


@pytest.mark.parametrize("proof", [b"", b"x", b"x" * 33])
def test_a_proof_of_the_wrong_length_is_refused(proof: bytes) -> None:
    assert not KEY.accepts(proof, Side.CALLER, handshake())


def test_uses_have_keys_of_their_own() -> None:
    assert not KEY.is_mac(KEY.mac("one", b"x"), "another", b"x")


def test_where_a_part_ends_is_proven_too() -> None:
    assert not KEY.is_mac(KEY.mac("use", b"ab", b"c"), "use", b"a", b"bc")


def test_while_a_key_is_changed_the_first_proves_and_both_are_accepted() -> None:
    both = FleetKey([NEW, OLD])
    assert both.accepts(KEY.prove(Side.CALLER, handshake()), Side.CALLER, handshake())
    assert FleetKey([NEW]).accepts(both.prove(Side.CALLER, handshake()), Side.CALLER, handshake())
    assert not KEY.accepts(both.prove(Side.CALLER, handshake()), Side.CALLER, handshake())
    assert both.names == (*FleetKey([NEW]).names, *KEY.names)


def test_neither_names_nor_repr_tell_the_secret() -> None:
    assert OLD[:8] not in repr(KEY)


def test_it_is_read_from_a_file(tmp_path: Path) -> None:
    key = read_fleet_key(key_file(tmp_path, f"{NEW}\n\n{OLD}\n"), {FLEET_KEY_VARIABLE: "not read"})
    assert key is not None
    assert key.names == FleetKey([NEW, OLD]).names


@pytest.mark.parametrize("separator", [",", " ", ", ", "\n"])
def test_it_is_read_from_the_environment(separator: str) -> None:
    key = read_fleet_key(None, {FLEET_KEY_VARIABLE: f"{NEW}{separator}{OLD}"})
    assert key is not None
    assert key.names == FleetKey([NEW, OLD]).names


def test_a_process_that_is_started_gets_it_by_the_environment() -> None:
    key = FleetKey([NEW, OLD])
    read = read_fleet_key(None, key.environment())
    assert read is not None
    assert read.names == key.names


@pytest.mark.parametrize("environment", [{}, {FLEET_KEY_VARIABLE: ""}])
def test_there_may_be_none(environment: dict[str, str]) -> None:
    assert read_fleet_key(None, environment) is None


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o602])
def test_a_file_of_this_user_that_others_may_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    file = key_file(tmp_path, OLD, mode)
    with pytest.raises(ConfigurationError, match=r"chmod 600") as raised:
        read_fleet_key(file)
    assert OLD not in str(raised.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot be read: No such file"):
        read_fleet_key(tmp_path / "missing")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "no fleet key"),
        ("x" * 31, "at least 32 characters, and one has 31"),
        ("ö" * 40, "ASCII"),
        ("x" * 20 + " " + "x" * 20, "without blanks"),
        ("x" * 20 + "," + "x" * 20, "and commas"),
        ("\n".join("x" * 32 for _ in range(5)), "at most 4"),
    ],
)
def test_a_key_that_is_not_fit_is_refused_by_a_sentence_without_it(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(ConfigurationError, match=fault) as raised:
        read_fleet_key(key_file(tmp_path, text))
    assert "openssl rand" in str(raised.value)
    assert not text or text not in str(raised.value)


def test_a_key_in_the_environment_that_is_not_fit_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=rf"{FLEET_KEY_VARIABLE}: A fleet key must have at least 32"):
        read_fleet_key(None, {FLEET_KEY_VARIABLE: "short"})
