"""Tenants: what one has cached, no other finds, so that no answer or time tells of the others.

A secret of the tenant goes into the salt of its requests. The salt is part of the identifiers of images and of the names of KV
blocks. A tenant is named in the file of API keys, or is whoever has one ``Authorization``.
"""

from __future__ import annotations

import enum
from dataclasses import replace
from typing import Literal

import msgspec
from blake3 import blake3

from chiasm.proxy.request import Request, with_member

_CONTEXTS = {"authorization": "chiasm 0.4 salt of a tenant", "key": "chiasm 0.4 salt of a named tenant"}
"""Make the hash of a secret one that nothing else has."""


class TenantBy(enum.StrEnum):
    """What tells those apart whose API keys name no tenant."""

    SALT = "salt"
    """The ``cache_salt`` that a request gives, and nothing else."""
    AUTHORIZATION = "authorization"
    """The request's ``Authorization`` too."""


def of_tenant(request: Request, secret: str, *, of: Literal["authorization", "key"]) -> Request:
    """Return the request with a salt that only requests with this secret have, made from the one that it gave.

    ``of`` says what the secret is: an ``Authorization``, or that of the tenant to whom an API key belongs.
    """
    key, given = (text.encode(errors="surrogatepass") for text in (secret, request.salt))
    parts = (len(key).to_bytes(8, "big"), key, given)
    salt = blake3(b"".join(parts), derive_key_context=_CONTEXTS[of]).hexdigest()
    return replace(request, body=with_member(request.body, b"cache_salt", msgspec.json.encode(salt)), salt=salt)
