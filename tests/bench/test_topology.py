"""Which deployments are compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from chiasm.bench.client import opened
from chiasm.bench.measurement import Bench
from chiasm.bench.topology import (
    NIXL,
    SHARED_MEMORY,
    aggregated,
    colocated,
    encoder_and_pds,
    kv_connectors,
    pd_alone,
    prefill_and_decode,
    running,
)
from chiasm.cores import usable_cores
from chiasm.errors import ConfigurationError
from chiasm.launch.arrangement import arrange
from chiasm.wire import Role


def test_prefill_and_decode_have_an_encoder_and_the_same_number_of_threads() -> None:
    config = prefill_and_decode("demo")
    assert {role: config.count(role) for role in config.roles} == {Role.ENCODER: 1, Role.PREFILL: 1, Role.DECODE: 1}
    assert len({one.threads for one in config.roles.values()}) == 1
    assert config.kv_connector == SHARED_MEMORY


def test_pinned_instances_have_one_thread_per_core() -> None:
    config = prefill_and_decode("demo", encoders=0, prefill_cpus=(0,), decode_cpus=(1,))
    assert config.count(Role.ENCODER) == 0
    assert [config.roles[role].cpus for role in (Role.PREFILL, Role.DECODE)] == [(0,), (1,)]
    assert [config.roles[role].threads for role in (Role.PREFILL, Role.DECODE)] == [1, 1]
    whole = pd_alone("demo", cpus=(0, 1))
    assert (whole.count(Role.PD), whole.count(Role.ENCODER), whole.roles[Role.PD].threads) == (1, 0, 2)


@pytest.mark.parametrize("counts", [None, {Role.ENCODER: 1, Role.PD: 2}])
def test_colocated_instances_have_all_cores_each_and_the_same_share_file(counts: dict[Role, int] | None) -> None:
    arranged = arrange(colocated("demo", counts), None)
    found = {role: arranged.config.count(role) for role in arranged.config.roles}
    assert set(found) == {Role.ENCODER, Role.PD}
    assert counts in (None, found)
    assert {one.threads for one in arranged.placements.values()} == {usable_cores()}
    assert len({one.core_share for one in arranged.placements.values()}) == 1
    assert not any(one.cpus for one in arranged.placements.values())


def test_the_aggregated_baseline_has_the_cores_of_colocated_instances() -> None:
    arranged = arrange(aggregated("demo", threads=usable_cores()), None)
    (placement,) = arranged.placements.values()
    assert (placement.threads, placement.cpus) == (usable_cores(), ())


def test_nixl_is_measured_if_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert kv_connectors() == (SHARED_MEMORY,)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert kv_connectors() == (SHARED_MEMORY, NIXL)


async def test_an_instance_that_cannot_start_is_named_with_its_model(checkpoint: Path, tmp_path: Path) -> None:
    config = replace(encoder_and_pds(str(checkpoint)), settings={"kv_cache_bytes": 1})
    async with opened() as client:
        with pytest.raises(ConfigurationError, match=f"^pd-0 of {checkpoint}: .*--kv-cache-bytes"):
            async with running(Bench(str(checkpoint), tmp_path, client), config):
                pytest.fail("it was never ready")
