"""Instances that join a running fleet and leave it, as processes, while clients ask."""

from __future__ import annotations

import json
import signal
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


@pytest.mark.parametrize("roles", FLEETS, ids="-".join)
async def test_what_a_draining_instance_of_any_role_had_goes_elsewhere_when_it_is_killed(
    checkpoint: Path, roles: tuple[Role, ...]
) -> None:
    """Whole answers, since a stream ends with its instance. One that has ended before it was killed is followed by another."""
    asked = [json.dumps(json.loads(body) | {"stream": False, "max_tokens": 200}).encode() for body in bodies(seed=1)]
    async with opened() as client, churning(checkpoint, client, FORKS, roles=roles, proxies=1) as churn:
        expected = {body: await churn.answer(churn.proxies[0], body) for body in asked}
        async with churn.asking(churn.proxies, expected, clients=4) as found:
            for role in roles:
                code = 0
                while code == 0:
                    await churn.join(role)
                    code = await churn.kill_while_draining(role)
                assert code == -signal.SIGKILL
    assert found.failures == []
    assert found.differences == []
    assert found.answers
