"""Web pages: which of them may use a server.

CORS keeps pages of other origins from reading answers, unless they are allowed. A server that listens on loopback alone also
refuses what a page sends without being allowed to read the answer, since the browsers of its machine reach it and nobody else
protects it. Such a request comes from another site, or, with DNS rebinding, from a page whose own name was made to lead here:
it names a host that is neither ``localhost`` nor an address. Only browsers send the headers by which this is recognized.
"""

from __future__ import annotations

from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from chiasm.errors import Code, ForbiddenError, InvalidRequestError
from chiasm.http.config import HttpConfig
from chiasm.http.errors import error_response
from chiasm.http.listen import is_address
from chiasm.http.visit import visit_of

_SHOWN_CHARACTERS = 100
_ANY = "*"


class Origins(CORSMiddleware):
    """Starlette's CORS, whose refusals have the shape of all errors."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_closed = not self.allow_origins and not self.allow_all_origins and scope["type"] == "http"
        if is_closed and "origin" not in visit_of(scope).headers:
            await self.app(scope, receive, send)  # nothing would be added to any answer
        else:
            await super().__call__(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == HTTPStatus.OK:
            return response
        text = bytes(response.body).decode()
        refusal = error_response(
            InvalidRequestError(
                f"{text}; the server's options --allowed-origins, -methods and -headers say what is allowed."
            )
        )
        for name, value in response.headers.items():
            refusal.headers.setdefault(name, value)
        return refusal


class LocalOnly:
    """Refuses what web pages of other sites send to a server that listens on loopback alone."""

    def __init__(self, app: ASGIApp, config: HttpConfig) -> None:
        self._app = app
        self._origins = frozenset(config.allowed_origins)
        self._hosts = frozenset(name.lower() for name in config.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (fault := self._fault(visit_of(scope).headers)):
            refusal = ForbiddenError(
                f"{fault}, and this server is for its own machine; --allowed-origins lets web pages in, and --allowed-hosts "
                "names under which the server is reached.",
                code=Code.ORIGIN_NOT_ALLOWED,
            )
            await error_response(refusal)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _fault(self, headers: Headers) -> str:
        """Return what shows that a request comes from a page that isn't allowed; empty if nothing does."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        is_from_page = origin is not None or site not in (None, "none")  # none: a person has typed the address
        if not is_from_page or origin in self._origins or _ANY in self._origins:
            return ""
        host = headers.get("host", "")
        if not self._is_known(_name_of(f"//{host}")):
            return f"A web page asks for the host {host[:_SHOWN_CHARACTERS]!r}"
        if origin is not None and site == "cross-site":
            return f"The request comes from a web page of {origin[:_SHOWN_CHARACTERS]!r}"
        return ""

    def _is_known(self, name: str) -> bool:
        is_named = name in self._hosts or _ANY in self._hosts or name == "localhost" or name.endswith(".localhost")
        return is_named or is_address(name)


def _name_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
