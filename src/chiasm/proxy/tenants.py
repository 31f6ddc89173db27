"""Tenants, told apart by their keys: what one has cached, no other finds, so that no answer or time tells of the others.

A tenant's key goes into the salt of its requests. The salt is part of the identifiers of images and of the names of KV blocks.
"""

from __future__ import annotations

import enum
from dataclasses import replace

import msgspec
from blake3 import blake3

from chiasm.proxy.request import Request, with_member

_CONTEXT = "chiasm 0.4 salt of a tenant"
"""Makes the hash of a key one that nothing else has."""


class TenantBy(enum.StrEnum):
    """What tells tenants apart."""

    SALT = "salt"
    """The ``cache_salt`` that a request gives, and nothing else."""
    AUTHORIZATION = "authorization"
    """The request's ``Authorization`` too."""


def of_tenant(request: Request, authorization: str) -> Request:
    """Return the request with a salt that only the holder of this ``Authorization`` has, made from the one that it gave."""
    key, given = (text.encode(errors="surrogatepass") for text in (authorization, request.salt))
    parts = (len(key).to_bytes(8, "big"), key, given)
    salt = blake3(b"".join(parts), derive_key_context=_CONTEXT).hexdigest()
    return replace(request, body=with_member(request.body, b"cache_salt", msgspec.json.encode(salt)), salt=salt)
