"""What work costs an instance of vLLM: measured once, before it gets requests, by a few prompts of text.

The figures mean the same as those that the built-in engine measures (``engine/calibration.py``): proxies begin with them, and
what requests take corrects them. Times are those that vLLM's engine notes, on all of its threads and devices.
"""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import aclosing
from typing import Any, NamedTuple

from chiasm.engine.calibration import ENOUGH_SECONDS
from chiasm.wire import Costs

_logger = logging.getLogger(__name__)
_TEXTS = (256, 1024, 4096, 16384)
"""Bytes of the texts that are prefilled. A token has at least one."""
_RUNS = 2
_ANSWER_TOKENS = 9
_SPARE_TOKENS = 16
"""Of the longest prompt, for the tokens that vLLM adds."""
_LONGEST_SECONDS = 20.0
_KV_CONNECTOR = "NixlConnector"
"""Other connectors of vLLM for KV may need more of a request: MoRIIOConnector reads addresses in its id."""


class _Run(NamedTuple):
    """What one prompt took; seconds."""

    tokens: int
    prefill: float
    step: float
    """A step of decoding."""


async def measure_costs(state: Any) -> Costs:
    """Return what prefill and decode cost the engine of vLLM's application with this ``state``, which has nothing else to do.

    Nothing is known of what couldn't be measured, and the log says why.
    """
    costs, step = Costs(), math.inf
    kv = state.vllm_config.kv_transfer_config
    if kv is not None and kv.kv_connector != _KV_CONNECTOR:
        return costs
    step_tokens = int(state.vllm_config.scheduler_config.max_num_batched_tokens)
    longest = min(step_tokens, int(state.vllm_config.model_config.max_model_len)) - _ANSWER_TOKENS - _SPARE_TOKENS
    try:
        async with asyncio.timeout(_LONGEST_SECONDS):
            for text_bytes in (min(size, longest) for size in _TEXTS):
                runs = [await _run(state, text_bytes, f"chiasm-{text_bytes}-{number}") for number in range(_RUNS)]
                prefill, step = min(run.prefill for run in runs), min(step, *(run.step for run in runs))
                per_token = prefill / runs[0].tokens
                costs = Costs(
                    prefill_seconds_per_token=per_token,
                    decode_step_seconds=step,
                    beside_streams=1 + step / (step_tokens * per_token),
                )
                if text_bytes == longest or prefill > ENOUGH_SECONDS:
                    break
    except TimeoutError:
        if costs == Costs():
            _logger.warning("This instance doesn't tell proxies what work costs it: %d bytes took too long", _TEXTS[0])
    except Exception as error:  # vLLM's own
        _logger.warning("This instance doesn't tell proxies what work costs it: %r", error)
    return costs


async def _run(state: Any, text_bytes: int, name: str) -> _Run:
    from vllm import SamplingParams

    # Its salt keeps this prompt from being answered by the prefix cache, and others from finding it there.
    prompt = {"prompt": "".join(f"{number} " for number in range(text_bytes))[:text_bytes], "cache_salt": name}
    params = SamplingParams(temperature=0.0, max_tokens=_ANSWER_TOKENS, ignore_eos=True, detokenize=False)
    async with aclosing(state.engine_client.generate(prompt, params, name)) as outputs:
        output = [one async for one in outputs][-1]
    times = output.metrics
    return _Run(
        tokens=len(output.prompt_token_ids),
        prefill=times.first_token_ts - times.scheduled_ts,
        step=(times.last_token_ts - times.first_token_ts) / (_ANSWER_TOKENS - 1),
    )
