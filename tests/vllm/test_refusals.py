"""What vLLM answers to a request that it can't take now, as the proxy understands it."""

from __future__ import annotations

from http import HTTPStatus

import pytest
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GracefulHTTPError, MaxQueuedTokensError, QueueOverflowError

from chiasm.proxy.upstream import RefusedError, UpstreamResponse


@pytest.mark.parametrize("limit", [QueueOverflowError, MaxQueuedTokensError])
def test_an_instance_at_its_limit_is_full(limit: type[GracefulHTTPError]) -> None:
    body = create_error_response(limit()).model_dump_json().encode()
    assert RefusedError(UpstreamResponse(HTTPStatus.SERVICE_UNAVAILABLE, {}, body, ())).is_full
