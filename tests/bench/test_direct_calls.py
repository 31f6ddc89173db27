"""Instances that the bench calls as the proxy does, without the proxy; the default connector is in use."""

from __future__ import annotations

import asyncio
from pathlib import Path

from chiasm.bench.checkpoints import measure_alone
from chiasm.bench.client import opened
from chiasm.bench.measurement import Bench
from chiasm.bench.measurements.proxy import Proxy
from chiasm.bench.topology import encoder_and_pds, running

_SECONDS = 280.0
"""Nothing here takes as long; an embedding of which a PD isn't told would."""


async def test_an_image_is_encoded_and_prefilled_alone(checkpoint: Path, tmp_path: Path) -> None:
    async with opened() as client, asyncio.timeout(_SECONDS):
        bench = Bench(str(checkpoint), tmp_path, client)
        async with running(bench, encoder_and_pds(str(checkpoint))) as (deployment,):
            found = [await measure_alone(bench, deployment, f"image {number}") for number in range(2)]
    assert all(one.encode_seconds > 0 and one.prefill_seconds > 0 for one in found)


async def test_the_proxy_is_compared_with_direct_calls(checkpoint: Path, tmp_path: Path) -> None:
    async with opened() as client, asyncio.timeout(_SECONDS):
        outcome = await Proxy().run(Bench(str(checkpoint), tmp_path, client, quick=True))
    assert {"text", "1 MB image"} <= {figure.name.partition(",")[0].partition(":")[0] for figure in outcome.figures}
