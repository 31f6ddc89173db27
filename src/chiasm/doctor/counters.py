"""What instances count of embeddings and KV, by which a journey can be proven."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from chiasm.doctor.client import Client, NoAnswerError

_CHIASM = {
    "encoded": "chiasm_images_encoded_total",
    "loaded": "chiasm_ec_loads_total",
    "kv_transfers": "chiasm_kv_transfers_total",
}
_VLLM = {
    # An item that its connector doesn't find is encoded by the instance itself.
    "encoded": "vllm:chiasm_ec_misses_total",
    "loaded": "vllm:chiasm_ec_loads_total",
    "kv_transfers": "vllm:nixl_xfer_time_seconds_count",
}
_MAX_LINES = 200_000


@dataclass(frozen=True)
class Counters:
    """Since an instance has started; None: it doesn't count that, or it couldn't be read."""

    encoded: float | None = None
    """Images that the instance itself has encoded."""
    loaded: float | None = None
    """Embeddings that it has taken from where encoders put them."""
    kv_transfers: float | None = None
    """Prompts whose KV it has fetched."""

    def since(self, before: Counters) -> Counters:
        return Counters(
            _difference(self.encoded, before.encoded),
            _difference(self.loaded, before.loaded),
            _difference(self.kv_transfers, before.kv_transfers),
        )


async def read_counters(client: Client, url: str) -> Counters:
    """Of the instance at base URL ``url``: all None where its /metrics can't be read."""
    try:
        answer = await client.get(f"{url}/metrics")
    except NoAnswerError:
        return Counters()
    return counters_of(answer.text()) if answer.status == 200 else Counters()


def counters_of(page: str) -> Counters:
    """Of a page in Prometheus' text format."""
    totals = _totals(page)
    names = _VLLM if any(name.startswith("vllm:") for name in totals) else _CHIASM
    return Counters(**{field: totals.get(name) for field, name in names.items()})


def _totals(page: str) -> dict[str, float]:
    """Each sample's name, with the sum over its labels."""
    wanted = {*_CHIASM.values(), *_VLLM.values()}
    totals: defaultdict[str, float] = defaultdict(float)
    for line in page.split("\n", _MAX_LINES)[:_MAX_LINES]:
        name = line.partition("{")[0].partition(" ")[0]
        if name not in wanted:
            if name.startswith("vllm:"):
                totals.setdefault(name, 0.0)
            continue
        try:
            value = float(line.rpartition("}")[2].split()[0] if "}" in line else line.split()[1])
        except (ValueError, IndexError):
            continue
        if math.isfinite(value):
            totals[name] += value
    return dict(totals)


def _difference(now: float | None, before: float | None) -> float | None:
    return None if now is None or before is None else now - before
