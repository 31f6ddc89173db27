"""API keys: which paths need one, and whether a request has it."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from chiasm.errors import AuthenticationError, Code
from chiasm.http.config import HttpConfig
from chiasm.http.errors import error_response
from chiasm.http.key_rules import check_key, read_key_file

_NAME_CHARACTERS = 16
_GUARDED = "/v1"
"""As in vLLM, all paths that begin with it. /health and /metrics are open."""


def key_name(headers: Headers) -> str:
    """Return what names the key of a request, without telling it; empty if it has none."""
    given = headers.get("authorization", "")
    return hashlib.sha256(given.encode()).hexdigest()[:_NAME_CHARACTERS] if given else ""


def read_keys(config: HttpConfig) -> tuple[str, ...]:
    """Return all keys that a request may have; empty if it needs none.

    Raises ConfigurationError for a file that cannot be read or holds no key, and for a key that isn't fit.
    """
    keys = list(config.api_key)
    if config.api_key_file is not None:
        found = read_key_file("--api-key-file", config.api_key_file)
        for key in found:
            check_key("--api-key-file", key)
        keys += found
    return (*keys, *config.keys_of_instances)


def bearer(headers: Headers) -> str:
    """Return the bearer token of a request; empty if it has none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def is_one_of(given: str, digests: Iterable[bytes]) -> bool:
    """Return whether a key has one of these digests, in a time that doesn't depend on the key."""
    digest = digest_of(given)
    found = False
    for known in digests:
        found |= hmac.compare_digest(digest, known)
    return found


def digest_of(key: str) -> bytes:
    """Return what a key is compared by."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class KeyGuard:
    """Refuses requests below /v1 that have no valid key, before anything of their body is read."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [digest_of(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] != "OPTIONS" and scope["path"].startswith(_GUARDED):
            given = bearer(Headers(scope=scope))
            if not is_one_of(given, self._digests):
                await error_response(wrong_key(given))(scope, receive, send)
                return
        await self._app(scope, receive, send)


def wrong_key(given: str) -> AuthenticationError:
    """Return the error for a request whose key is ``given``, which the message doesn't repeat."""
    fault = "The API key of the request is wrong" if given else "The request has no API key"
    return AuthenticationError(f"{fault}; send a valid one as `Authorization: Bearer KEY`.", code=Code.INVALID_API_KEY)
