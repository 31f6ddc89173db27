"""What an engine tells vLLM's HTTP server with the outputs of a request.

It stands under names of its own in ``ec_transfer_params``, and the server takes it out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

WAITS = "chiasm_waits"
"""How long the request has waited for embeddings (``waits.py``)."""
PREFILL_WORK = "chiasm_prefill_work"
"""What computing its prompt has cost, in seconds (``work.py``)."""
_NAMES = (WAITS, PREFILL_WORK)


def with_told(params: dict[str, Any] | None, name: str, told: Any) -> dict[str, Any]:
    """Return the ``ec_transfer_params`` of an output that tells this."""
    return {**(params or {}), name: told}


def tell(outputs: Iterable[Any], name: str, told_of: Callable[[Any], Any]) -> None:
    """Put into each output (of vLLM's ``EngineCoreOutputs``) what ``told_of`` returns for it, unless that is None."""
    for of_client in outputs:
        for output in of_client.outputs:
            if (told := told_of(output)) is not None:
                output.ec_transfer_params = with_told(output.ec_transfer_params, name, told)


def take_told(output: Any) -> dict[str, Any]:
    """Take what the engine tells out of an output (vLLM's ``RequestOutput``), and return it by name."""
    params = getattr(output, "ec_transfer_params", None) or {}
    told = {name: params[name] for name in _NAMES if name in params}
    if told:
        output.ec_transfer_params = {name: value for name, value in params.items() if name not in told} or None
    return told
