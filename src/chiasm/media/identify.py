"""Names of items: by content, per tenant, per model."""

from __future__ import annotations

import re

from blake3 import blake3

from chiasm.errors import InvalidRequestError

_IDENTIFIER = re.compile(r"[0-9a-f]{64}")
_SHOWN_CHARACTERS = 40


def identifier(media: bytes, *, fingerprint: str, salt: str = "") -> str:
    """The 64 lower-case hex digits that name the embedding of ``media``.

    BLAKE3 over salt, fingerprint and media, each with its length before it, so that no two triples run together.
    ``fingerprint`` names model, processor settings and dtype, as instances report it; ``salt`` keeps tenants apart.
    """
    digest = blake3()
    for part in (salt.encode(errors="surrogatepass"), fingerprint.encode(errors="surrogatepass"), media):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def check_identifier(value: object) -> str:
    """``value`` if it is exactly 64 lower-case hex digits; else InvalidRequestError (it names files: nothing else may)."""
    if isinstance(value, str) and _IDENTIFIER.fullmatch(value):
        return value
    shown = repr(value[:_SHOWN_CHARACTERS]) if isinstance(value, str) else type(value).__name__
    raise InvalidRequestError(
        f"uuid must be exactly 64 lower-case hex digits, not {shown}; leave it out to have the content named",
        param="uuid",
        code="invalid_uuid",
    )
