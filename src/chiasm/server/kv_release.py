"""KV that nobody will come for: what a prefill instance still holds for a decode instance is given back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from chiasm.errors import PathNotFoundError
from chiasm.http import read_body
from chiasm.http.fleet_calls import caller_of, check_fleet
from chiasm.http.untrusted import read_json
from chiasm.server.context import GeneratingEngine, ServerContext
from chiasm.wire import KVRelease, KVTransferParams, Role

_MAX_BODY_BYTES = 1 << 20
_decoder = msgspec.json.Decoder(KVRelease)


async def release_kv(context: ServerContext, request: Request) -> Response:
    """End the leases that the body names; also while the instance stops, which waits for them."""
    check_fleet(caller_of(request.scope), "Giving KV back")
    engine = context.loaded_engine
    if not isinstance(engine, GeneratingEngine) or engine.config.role is not Role.PREFILL:
        raise PathNotFoundError("This instance holds no KV for others; prefill instances do.")
    body = await read_body(request.receive, request.headers, _MAX_BODY_BYTES)
    engine.give_back_kv(read_json(_decoder, body).leases)
    return Response(status_code=HTTPStatus.NO_CONTENT)


@contextmanager
def held_for_sender(engine: GeneratingEngine, given: Sequence[KVTransferParams]) -> Iterator[None]:
    """A block that sends an answer with handles: if it fails, nobody has the handles, and the KV is given back."""
    try:
        yield
    except BaseException:
        leases = {params.lease for params in given if params.lease}
        if leases and engine.config.role is Role.PREFILL:
            engine.give_back_kv(leases)
        raise
