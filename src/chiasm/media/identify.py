"""Names of items: by content, per tenant, per model."""

from __future__ import annotations

from blake3 import blake3


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
