"""When vLLM's engine began with a prompt that is pooled, and when it had it.

vLLM notes this for each request, and hands it out with the outputs of those that generate, but not of those that pool.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def keep_times() -> bool:
    """Let the outputs of requests that pool have ``metrics`` too (vLLM's ``RequestStateStats``); return whether they can."""
    try:
        from vllm.outputs import PoolingRequestOutput
        from vllm.v1.engine.output_processor import RequestState

        make = RequestState.make_request_output
    except (ImportError, AttributeError):
        return False

    @functools.wraps(make)
    def make_with_times(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = make(self, *args, **kwargs)
        if isinstance(output, PoolingRequestOutput):
            output.metrics = self.stats
        return output

    RequestState.make_request_output = make_with_times
    return True
