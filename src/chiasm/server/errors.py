"""Errors as OpenAI's clients understand them."""

from __future__ import annotations

import logging
from http import HTTPStatus

import msgspec

from chiasm.errors import ChiasmError, DeadlineExceededError, InvalidRequestError, OverloadedError

logger = logging.getLogger(__name__)


class ErrorDetail(msgspec.Struct):
    """What went wrong. ``param`` names the field of the request that is to blame."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """Body of every answer that is not 2xx, and of an error event on a stream."""

    error: ErrorDetail


def body_of(error: ChiasmError) -> bytes:
    """JSON of the error."""
    return msgspec.json.encode(ErrorBody(ErrorDetail(error.message, error.kind, error.param, error.code)))


def headers_of(error: ChiasmError) -> list[tuple[str, str]]:
    """Headers that go with the error: ``Retry-After`` in whole seconds where trying again can help."""
    if isinstance(error, OverloadedError):
        return [("retry-after", str(error.retry_after_seconds))]
    return [("retry-after", "1")] if error.status == HTTPStatus.SERVICE_UNAVAILABLE else []


def as_chiasm_error(error: BaseException) -> ChiasmError:
    """Any exception as one that may be shown to a client; what nobody foresaw is logged and shown without details."""
    if isinstance(error, ChiasmError):
        return error
    if isinstance(error, TimeoutError):
        return DeadlineExceededError("The request's deadline passed before it was answered.", code="deadline_exceeded")
    logger.error("unexpected error while serving a request", exc_info=error)
    return ChiasmError("An unexpected error happened in this instance; its log has the details.")


class MethodNotAllowedError(InvalidRequestError):
    """The path exists, the method does not."""

    status = 405


class PathNotFoundError(InvalidRequestError):
    """Nothing is served under this path."""

    status = 404
