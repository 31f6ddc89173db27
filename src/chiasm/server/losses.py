"""Tells the proxy at once when an embedding is lost: a question waits until one of those that it names is."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from chiasm.http import json_response, read_body
from chiasm.http.fleet_calls import caller_of, check_fleet
from chiasm.http.untrusted import read_json
from chiasm.server.context import ServerContext
from chiasm.tasks import end_tasks
from chiasm.wire import AwaitedEmbeddings, LossQuestion

MAX_QUESTION_BYTES = 128 << 10
_decoder = msgspec.json.Decoder(LossQuestion)


async def tell_lost(context: ServerContext, request: Request) -> Response:
    """Answer when some of the embeddings are lost, at the end of the time, or when this instance is told to end."""
    check_fleet(caller_of(request.scope), "What embeddings are lost")
    engine = context.reading_engine
    question = read_question(await read_body(request.receive, request.headers, MAX_QUESTION_BYTES))
    told = engine.lost_embeddings(question.asker, question.published)
    lost = await until_told(told, question.seconds, receive=request.receive, ends=context.drains)
    return json_response(AwaitedEmbeddings(identifiers=lost))


def read_question(body: bytes) -> LossQuestion:
    """Return what a body asks. Raises InvalidRequestError."""
    return read_json(_decoder, body)


async def until_told(
    told: Coroutine[Any, Any, list[str]], seconds: float, *, receive: Receive, ends: asyncio.Event
) -> list[str]:
    """Return what ``told`` gives; nothing if the time is over, the client leaves or the instance ends before it.

    ``receive`` is that of the request, whose body has been read.
    """
    if ends.is_set():
        told.close()
        return []
    telling = asyncio.ensure_future(told)
    others = [asyncio.ensure_future(receive()), asyncio.ensure_future(ends.wait())]
    try:
        await asyncio.wait((telling, *others), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return telling.result() if telling.done() else []
    finally:
        await end_tasks(telling, *others)
