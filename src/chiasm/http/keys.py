"""API keys at the front door: which paths need one, and whether a request has it and may go on."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from chiasm.errors import AuthenticationError, Code, RateLimitError
from chiasm.http.errors import error_response
from chiasm.http.key_ring import KeyRing
from chiasm.http.limits import Refusals
from chiasm.http.visit import visit_of

_GUARDED = "/v1"
"""As in vLLM, all paths that begin with it."""
_FREE_METHODS = ("GET", "HEAD")
"""What these ask for costs nearly nothing, so it doesn't count towards the limits of a key."""


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
    """Refuses requests that have no valid key, or one whose limits are reached, before anything of their body is read."""

    def __init__(self, app: ASGIApp, keys: KeyRing, paths: Collection[str], refusals: Refusals | None) -> None:
        """``paths`` need a key besides those below /v1; ``refusals`` counts who was refused on account of a limit."""
        self._app = app
        self._keys = keys
        self._paths = paths
        self._refusals = refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or not self._is_guarded(scope["path"]):
            await self._app(scope, receive, send)
            return
        visit = visit_of(scope)
        given = bearer(visit.headers)
        holder = self._keys.holder_of(given)
        if holder is None:
            await error_response(wrong_key(given))(scope, receive, send)
            return
        visit.key = holder
        if scope["method"] in _FREE_METHODS:
            await self._app(scope, receive, send)
            return
        try:
            holder.enter()
        except RateLimitError as error:
            if self._refusals is not None and error.limit is not None:
                self._refusals.note(error.limit)
            await error_response(error)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            holder.leave()

    def _is_guarded(self, path: str) -> bool:
        return path.startswith(_GUARDED) or path in self._paths


def wrong_key(given: str) -> AuthenticationError:
    """Return the error for a request whose key is ``given``, which the message doesn't repeat."""
    fault = "The API key of the request is wrong" if given else "The request has no API key"
    return AuthenticationError(f"{fault}; send a valid one as `Authorization: Bearer KEY`.", code=Code.INVALID_API_KEY)
