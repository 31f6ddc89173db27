"""What is compared over vLLM, as far as it can be tested without vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from chiasm.bench.client import opened
from chiasm.bench.measurement import Bench
from chiasm.bench.measurements.reuse import judge
from chiasm.bench.measurements.vllm_example import Mix, VllmExample, as_stock, can_forward_images, proxy_file
from chiasm.bench.topology import aggregated, encoder_and_pds, on_vllm, prefill_and_decode
from chiasm.launch import DeploymentConfig
from chiasm.launch.config import EngineKind
from chiasm.launch.devices import Placement
from chiasm.launch.ports import HeldPort
from chiasm.launch.vllm import Installed, Site, instance_command
from chiasm.wire import Role


@pytest.mark.parametrize("topology", [aggregated, encoder_and_pds, prefill_and_decode])
def test_topologies_over_vllm_have_the_same_instances(topology: Callable[[str], DeploymentConfig]) -> None:
    built_in = topology("demo")
    config = on_vllm(built_in)
    assert config.engine is EngineKind.VLLM
    assert {role: config.count(role) for role in config.roles} == {
        role: built_in.count(role) for role in built_in.roles
    }
    assert {role: one.threads for role, one in config.roles.items()} == {
        role: one.threads for role, one in built_in.roles.items()
    }
    assert config.served_model_name == built_in.served_model_name
    assert config.kv_connector is None
    assert config.settings["dtype"] == built_in.settings["dtype"] == "float32"
    for role, one in config.roles.items():
        assert ("--kv-cache-memory-bytes" in one.vllm_flags) is (role is not Role.ENCODER)
        assert ("--limit-mm-per-prompt" in one.vllm_flags) is (role in (Role.ENCODER, Role.AGGREGATED))


def test_the_example_differs_only_in_connector_and_middleware(tmp_path: Path) -> None:
    config = on_vllm(encoder_and_pds("demo"))
    address = HeldPort("127.0.0.1")
    site = Site(address, Placement(), tmp_path / "ours", 1 << 30, None, None)
    ours = instance_command(
        config, tmp_path, Role.PD, site, found=Installed(Path("vllm"), "0.32.0+cpu"), kv_bytes=1 << 30
    )
    theirs = as_stock(ours, tmp_path / "theirs")
    address.release()
    middleware, transfer = ours.index("--middleware"), ours.index("--ec-transfer-config")
    assert json.loads(theirs[theirs.index("--ec-transfer-config") + 1]) == {
        "ec_connector": "ECExampleConnector",
        "ec_role": "ec_consumer",
        "ec_connector_extra_config": {"shared_storage_path": str(tmp_path / "theirs")},
    }
    left = {middleware, middleware + 1, transfer + 1}
    same = [argument for place, argument in enumerate(ours) if place not in left]
    place = theirs.index("--ec-transfer-config") + 1
    assert theirs[:place] + theirs[place + 1 :] == same


def test_the_example_proxy_is_found_beside_vllm_or_by_a_variable(tmp_path: Path) -> None:
    assert proxy_file({}, str(tmp_path)) is None
    beside = tmp_path / "share" / "vllm" / "disagg_epd_proxy.py"
    beside.parent.mkdir(parents=True)
    beside.touch()
    assert proxy_file({}, str(tmp_path)) == beside
    elsewhere = tmp_path / "proxy.py"
    assert proxy_file({"CHIASM_VLLM_EXAMPLE_PROXY": str(elsewhere)}, str(tmp_path)) is None
    elsewhere.touch()
    assert proxy_file({"CHIASM_VLLM_EXAMPLE_PROXY": str(elsewhere)}, str(tmp_path)) == elsewhere


def test_a_proxy_that_can_forward_images_is_recognized_by_its_flag(tmp_path: Path) -> None:
    file = tmp_path / "proxy.py"
    file.write_text('parser.add_argument("--no-rewrite", action="store_true")')
    assert can_forward_images(file)
    file.write_text('parser.add_argument("--port")')
    assert not can_forward_images(file)


async def test_without_the_example_proxy_the_outcome_is_one_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHIASM_VLLM_EXAMPLE_PROXY", str(tmp_path / "none.py"))
    async with opened() as client:
        outcome = await VllmExample().run(Bench("demo", tmp_path, client))
    assert not outcome.figures
    assert outcome.met is None
    (note,) = outcome.notes
    assert note.startswith("Not measured: vLLM's example proxy is not in this environment")


async def test_a_mix_is_half_images_and_new_in_every_round(checkpoint: Path) -> None:
    async with opened() as client:
        bench = Bench("m", checkpoint, client)
        mix, again = Mix(bench, checkpoint), Mix(bench, checkpoint)
        first, second = mix.draw(), mix.draw()
        assert [first, second] == [again.draw(), again.draw()]
    assert len(set(first + second)) == 48
    with_image = [body for body in first if b"image_url" in body]
    assert len(with_image) == 12
    assert with_image != first[:12]


def test_reuse_meets_its_target_if_each_image_is_encoded_once_and_loaded_by_both_pds() -> None:
    times: list[list[float]] = [[30.0, 31.0, 32.0], [20.0, 21.0, 22.0], []]
    assert judge(*times, encoded=3, loaded=[3, 3], seed=0).met is True
    assert judge(*times, encoded=4, loaded=[3, 3], seed=0).met is False
    one_pd_had_all = judge(*times, encoded=3, loaded=[3, 0], seed=0)
    assert one_pd_had_all.met is False
    assert {figure.name: figure.value for figure in one_pd_had_all.figures}["images that a PD did not load"] == 3


def test_reuse_with_texts_compares_the_second_request_with_them() -> None:
    outcome = judge([30.0, 31.0], [20.0, 21.0], [20.0, 21.0], encoded=2, loaded=[1, 1], seed=0)
    assert outcome.met is True
    figures = {figure.name: figure for figure in outcome.figures}
    assert figures["second request / text of the same length"].value == 1
    assert "images that a PD did not load" not in figures
    assert judge([30.0], [30.0], [20.0], encoded=1, loaded=[0, 0], seed=0).met is False
