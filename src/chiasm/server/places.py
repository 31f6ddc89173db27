"""Where embeddings are or will be: what the proxy tells a PD or prefill instance as soon as it has chosen an encoder."""

from __future__ import annotations

from http import HTTPStatus

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from chiasm.errors import InvalidRequestError
from chiasm.http import read_body
from chiasm.http.fleet_calls import caller_of, check_fleet
from chiasm.http.untrusted import read_json
from chiasm.server.context import ServerContext
from chiasm.wire import EmbeddingPlaces

MAX_PLACES_BYTES = 1 << 20
_decoder = msgspec.json.Decoder(EmbeddingPlaces)


async def note_places(context: ServerContext, request: Request) -> Response:
    """Pass on what the body says; also while the instance stops, since its requests still wait for embeddings."""
    check_fleet(caller_of(request.scope), "Saying where embeddings are")
    engine = context.reading_engine
    told = read_places(await read_body(request.receive, request.headers, MAX_PLACES_BYTES))
    engine.expect_embeddings(told.places, told.stored)
    return Response(status_code=HTTPStatus.NO_CONTENT)


def read_places(body: bytes) -> EmbeddingPlaces:
    """Return what a body says. Raises InvalidRequestError."""
    told = read_json(_decoder, body)
    for identifier, place in told.places.items():
        if not place:
            raise InvalidRequestError(
                f"The place of embedding {identifier[:12]}… needs a host, a port and an engine_id.", param="places"
            )
    return told
