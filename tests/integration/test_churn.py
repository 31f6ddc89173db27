"""Instances that join a running fleet and leave it, as processes, while clients ask."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.bench.churn import churning
from chiasm.bench.client import opened
from chiasm.bench.measurements.churn import FLEETS, bodies
from chiasm.wire import Role
from tests.fleet import FORKS


@pytest.mark.parametrize("roles", FLEETS, ids="-".join)
async def test_instances_of_all_roles_join_and_drain_and_no_request_fails(
    checkpoint: Path, roles: tuple[Role, ...]
) -> None:
    async with opened() as client, churning(checkpoint, client, FORKS, roles=roles, proxies=2) as churn:
        found = await churn.run(6, bodies(seed=0), clients=2, advance=lambda: None)
    assert found.failures == []
    assert found.differences == []
    assert found.exit_codes == [0] * 6
    assert found.answers
