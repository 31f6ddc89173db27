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
    encoder_and_pds,
    kv_connectors,
    pd_alone,
    prefill_and_decode,
    running,
)
from chiasm.errors import ConfigurationError
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


def test_nixl_is_measured_if_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert kv_connectors() == (SHARED_MEMORY,)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert kv_connectors() == (SHARED_MEMORY, NIXL)


async def test_an_instance_that_cannot_start_is_named_with_its_model(checkpoint: Path, tmp_path: Path) -> None:
    config = replace(encoder_and_pds(str(checkpoint)), settings={"dtype": "int3"})
    async with opened() as client:
        with pytest.raises(ConfigurationError, match=f"^(encoder-0|pd-0|encoder-0, pd-0) of {checkpoint}: .*int3"):
            async with running(Bench(str(checkpoint), tmp_path, client), config):
                pytest.fail("it was never ready")
