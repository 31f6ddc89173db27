"""The fleet key: a secret by which the processes of one fleet know each other.

Whoever has it may do what only other parts of the fleet may: fetch embeddings and KV from memory, tell an encoder how to name
an image, tell an instance where embeddings are. Nothing here knows sockets, HTTP or clocks; what is proven how often, and what
a refusal looks like, is the caller's.

A connection (``Handshake``) is opened like this, so that each side knows the other before it tells or believes anything::

    caller -> listener    nonce                     (make_nonce())
    listener -> caller    nonce, engine_id, proof   (key.prove(Side.LISTENER, handshake))
    caller -> listener    proof                     (key.prove(Side.CALLER, handshake))

Both sides make the same :class:`Handshake` of what they have sent and received, and each asks :meth:`FleetKey.accepts` about
the other's proof. The nonces are new for every connection, so a proof that somebody has recorded proves nothing on another one;
each side has its own kind of proof, so none can be sent back to the one that made it. The proofs stand for who opened the
connection: they don't encrypt what follows, and don't protect it from somebody who can change packets on the way.

While a key is being changed, a process has two: it proves with the first and accepts both (docs/security.md).
"""

from __future__ import annotations

import enum
import hmac
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from chiasm.errors import ConfigurationError
from chiasm.options import Option
from chiasm.ownership import other_readers, other_writers

FLEET_KEY_VARIABLE = "CHIASM_FLEET_KEY"
"""The variable of the environment that holds the key, or two while it is changed, with a comma or a blank between them."""
LEAST_FLEET_KEY_CHARACTERS = 32
"""``openssl rand -hex 32`` writes 64. The text is the secret as it stands; hex and base64 aren't decoded."""
MAX_FLEET_KEYS = 4
FleetKeyFile = Annotated[
    Path | None,
    Option(
        "File with the fleet key, the secret by which proxies and instances know each other: at least 32 characters, readable "
        "by this user alone. A second line may hold the key that is being replaced.",
        unset="the variable CHIASM_FLEET_KEY",
    ),
]
"""The field of a configuration that says where :func:`read_fleet_key` reads."""
NONCE_BYTES = 32
PROOF_BYTES = 32
_MAX_FILE_BYTES = 64 << 10
_DERIVED_FROM = b"chiasm fleet key 1"
_SHA256 = "sha256"


class Side(enum.StrEnum):
    """Who makes a proof."""

    CALLER = "caller"
    """Opened the connection."""
    LISTENER = "listener"


@dataclass(frozen=True, kw_only=True)
class Handshake:
    """What both sides of one connection know when they prove that they belong to the fleet."""

    protocol: str
    """Names what is spoken on the connection, such as ``kv``: a proof for one protocol is none for another."""
    version: int
    """Of that protocol."""
    engine_id: str
    """The listener's, which is new at every start."""
    caller_nonce: bytes
    listener_nonce: bytes


class FleetKey:
    """Proves that this process belongs to the fleet, and checks that others do. Any thread.

    Each use has a key of its own, derived from the secret (HKDF, RFC 5869), so nothing that is proven for one use counts for
    another. A proof is HMAC-SHA256, 32 bytes, and is compared in constant time.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        """The first of ``keys`` proves, and all of them are accepted. Raises ConfigurationError for keys that aren't fit."""
        _check(keys)
        self._keys = tuple(keys)
        # HKDF-Extract, with the name of the scheme as the salt.
        self._secrets = tuple(hmac.digest(_DERIVED_FROM, key.encode(), _SHA256) for key in keys)
        self._derived: dict[str, tuple[bytes, ...]] = {}
        self.names: tuple[str, ...] = tuple(key.hex()[:16] for key in self._keys_of("name"))
        """What names each key without telling it, the one that proves first."""

    def __repr__(self) -> str:
        return f"FleetKey({', '.join(self.names)})"

    def environment(self) -> dict[str, str]:
        """Return the variable from which a process that this one starts reads the same key."""
        return {FLEET_KEY_VARIABLE: ",".join(self._keys)}

    def prove(self, side: Side, handshake: Handshake) -> bytes:
        """Return the proof that ``side`` sends."""
        return self.mac(*_statement(side, handshake))

    def accepts(self, proof: bytes, side: Side, handshake: Handshake) -> bool:
        """Return whether ``side`` has shown by ``proof`` that it has the fleet key. Both nonces must have NONCE_BYTES."""
        nonces = (handshake.caller_nonce, handshake.listener_nonce)
        return all(len(nonce) == NONCE_BYTES for nonce in nonces) and self.is_mac(proof, *_statement(side, handshake))

    def mac(self, use: str, *parts: bytes) -> bytes:
        """Return a proof of ``parts``, in this order and with these boundaries, for one ``use``."""
        return hmac.digest(self._keys_of(use)[0], _joined(parts), _SHA256)

    def is_mac(self, proof: bytes, use: str, *parts: bytes) -> bool:
        """Return whether ``proof`` is what a holder of one of the keys makes of these."""
        message, found = _joined(parts), False
        for key in self._keys_of(use):
            found |= hmac.compare_digest(proof, hmac.digest(key, message, _SHA256))
        return found

    def _keys_of(self, use: str) -> tuple[bytes, ...]:
        derived = self._derived.get(use)
        if derived is None:  # HKDF-Expand of one block
            info = use.encode() + b"\x01"
            derived = self._derived[use] = tuple(hmac.digest(secret, info, _SHA256) for secret in self._secrets)
        return derived


def make_nonce() -> bytes:
    """Return NONCE_BYTES that nobody could foresee."""
    return secrets.token_bytes(NONCE_BYTES)


def make_fleet_key() -> str:
    """Return a new secret, for processes that one parent starts."""
    return secrets.token_hex(32)


def read_fleet_key(file: Path | None = None, environment: Mapping[str, str] = os.environ) -> FleetKey | None:
    """Return the key in ``file``, one a line, or else in CHIASM_FLEET_KEY; None if there is neither.

    Raises ConfigurationError for a key that isn't fit, and for a file that other users may read or write.
    """
    if file is not None:
        return FleetKey(_read(file))
    given = environment.get(FLEET_KEY_VARIABLE, "")
    try:
        return FleetKey(re.split(r"[\s,]+", given.strip())) if given else None
    except ConfigurationError as error:
        raise ConfigurationError(f"{FLEET_KEY_VARIABLE}: {error.message}") from None


def _read(file: Path) -> list[str]:
    try:
        with file.open("rb") as opened:
            status, content = os.fstat(opened.fileno()), opened.read(_MAX_FILE_BYTES)
        lines = content.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or "it is not a text"
        raise ConfigurationError(f"--fleet-key-file: {file} cannot be read: {reason}.") from None
    if others := other_writers(status) or other_readers(status):
        raise ConfigurationError(
            f"--fleet-key-file: {file} {others}, who would belong to the fleet; make it yours alone (chmod 600 {file})."
        )
    keys = [line.strip() for line in lines if line.strip()]
    try:
        _check(keys)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"--fleet-key-file: in {file}, {error.message[:1].lower()}{error.message[1:]}"
        ) from None
    return keys


def _check(keys: Sequence[str]) -> None:
    """Raise ConfigurationError unless the keys are fit. The message doesn't repeat them."""
    if not keys:
        fault = "There is no fleet key"
    elif len(keys) > MAX_FLEET_KEYS:
        fault = f"There are {len(keys)} fleet keys, and at most {MAX_FLEET_KEYS} are accepted at the same time"
    elif (shortest := min(map(len, keys))) < LEAST_FLEET_KEY_CHARACTERS:
        fault = f"A fleet key must have at least {LEAST_FLEET_KEY_CHARACTERS} characters, and one has {shortest}"
    elif not all(key.isascii() and key.isprintable() and not {" ", ","} & set(key) for key in keys):
        fault = "A fleet key must be of letters, digits and signs of ASCII, without blanks and commas"
    else:
        return
    raise ConfigurationError(f"{fault}; `openssl rand -hex 32` makes a good one.")


def _statement(side: Side, handshake: Handshake) -> tuple[str, bytes, bytes, bytes, bytes]:
    return (
        f"channel {handshake.protocol} {side}",
        b"%d" % handshake.version,
        handshake.engine_id.encode(),
        handshake.caller_nonce,
        handshake.listener_nonce,
    )


def _joined(parts: Sequence[bytes]) -> bytes:
    """Return the parts in one message, each behind its length, so that no other parts give the same one."""
    return b"".join(piece for part in parts for piece in (len(part).to_bytes(8), part))
