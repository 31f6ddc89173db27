"""A planned deployment: what `chiasm serve` would run into is found beforehand."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from chiasm.cores import cpu_flags, has_native_bfloat16
from chiasm.doctor import Result
from chiasm.doctor.planned import examine_plan
from chiasm.launch import DeploymentConfig, EngineKind, RoleConfig
from chiasm.wire import Role
from tests.doctor.nixl import HAS_NIXL
from tests.doctor.results import collected, problem, verdicts, warning


async def examined(config: DeploymentConfig, **settings: Any) -> list[Result]:
    return await collected(examine_plan(replace(config, settings=settings)))


async def test_a_plan_that_works_is_ok(checkpoint: Path, tmp_path: Path) -> None:
    config = DeploymentConfig(str(checkpoint), shared_storage_path=tmp_path / "store", ec_max_bytes=64 << 20)
    found = await examined(config)
    assert "problem" not in verdicts(found)
    for check in ("plan", "versions", "port", "model", "storage folder", "storage space"):
        assert verdicts(found, check) == ["ok"], check
    (layout,) = [one for one in found if one.check == "layout"]
    assert layout.says.startswith("colocated: ")
    (space,) = [one for one in found if one.check == "storage space"]
    assert "1024 × 1024 takes" in space.says


async def test_a_port_in_use_is_a_problem(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        assert f"Port {number}" in problem(await examined(DeploymentConfig(str(checkpoint), port=number))).says


async def test_a_missing_model_is_a_problem() -> None:
    found = await examined(DeploymentConfig("/nowhere/at/all"))
    assert "no model '/nowhere/at/all'" in problem(found).says
    assert verdicts(found, "memory") == ["skipped"]


async def test_an_incomplete_model_is_a_problem(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "part"
    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors").unlink()
    assert "are missing" in problem(await examined(DeploymentConfig(str(folder)))).says


async def test_an_unsupported_model_is_a_problem(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gemma"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "gemma3"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "attend to each other in both directions" in problem(await examined(DeploymentConfig(str(folder)))).says


async def test_an_uncached_hub_name_is_a_problem_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = problem(await examined(DeploymentConfig("nobody/has-this")))
    assert "not in the cache" in found.says
    assert found.command == "HF_HUB_OFFLINE=0 hf download nobody/has-this"


async def test_an_unreachable_hub_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "the hub cannot be reached" in problem(await examined(DeploymentConfig("nobody/has-this"))).says


async def examined_model(name: str) -> list[Result]:
    return [one for one in await examined(DeploymentConfig(name)) if one.check == "model"]


@pytest.fixture
async def hub(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """A hub that is reached through a proxy alone, and has moved a model, which only some may download."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if str(request.url) == "http://hub.invalid/old/name/resolve/main/config.json":
            raise web.HTTPTemporaryRedirect("/new/name/resolve/main/config.json")
        if request.headers.get("Authorization") != "Bearer hf_mine":
            return web.Response(status=401)
        return web.Response(text="{}", status=200 if request.path.startswith("/new/name/resolve/") else 404)

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{runner.addresses[0][1]}")
    yield
    await runner.cleanup()


@pytest.mark.usefixtures("hub")
async def test_the_hub_is_asked_as_a_download_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert "the hub has it" in warning(await examined_model("old/name")).says
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "the hub answers HTTP 401" in problem(await examined_model("old/name")).says


async def test_a_plan_larger_than_the_memory_is_warned_about(checkpoint: Path) -> None:
    found = await examined(DeploymentConfig(str(checkpoint)), device="cpu", kv_cache_bytes=1 << 50)
    assert "for caches and processes" in warning([one for one in found if one.check == "memory"]).says


APART = {Role.ENCODER: RoleConfig(), Role.PD: RoleConfig()}


@pytest.mark.parametrize(
    ("connector", "megabytes"),
    [
        ("SharedMemoryConnector", 2 * 400 + 64),
        ("TcpConnector", 2 * 400 + 64 + 2 * 32),
        ("SharedStorageConnector", 2 * 400),
    ],
)
async def test_memory_for_embeddings_belongs_to_what_a_plan_takes(
    checkpoint: Path, connector: str, megabytes: int
) -> None:
    config = DeploymentConfig(
        str(checkpoint), APART, connector=connector, ec_max_bytes=64 << 20, ec_receive_bytes=32 << 20
    )
    (memory,) = [one for one in await examined(config, device="cpu") if one.check == "memory"]
    assert f"about {megabytes}.0 MiB for caches and processes" in memory.says


async def test_shared_memory_is_checked_only_if_embeddings_are_kept_there(checkpoint: Path) -> None:
    from_memory = await examined(DeploymentConfig(str(checkpoint), APART))
    assert verdicts(from_memory, "shared memory") == []
    assert verdicts(from_memory, "storage folder") == ["skipped"]
    through_folder = await examined(DeploymentConfig(str(checkpoint), APART, connector="SharedStorageConnector"))
    assert len(verdicts(through_folder, "shared memory")) == 1


async def test_nixl_is_checked_if_embeddings_move_by_it(checkpoint: Path) -> None:
    assert verdicts(await examined(DeploymentConfig(str(checkpoint), APART)), "NIXL") == []
    found = await examined(DeploymentConfig(str(checkpoint), APART, connector="NixlConnector"))
    assert verdicts(found, "NIXL") == ["ok" if HAS_NIXL else "problem"]


async def test_a_device_that_does_not_exist_is_a_problem(checkpoint: Path) -> None:
    found = await examined(DeploymentConfig(str(checkpoint)), device="cuda:99")
    assert "'cuda:99' does not exist" in problem(found).says


async def test_an_option_that_an_instance_refuses_is_a_problem(checkpoint: Path) -> None:
    roles = {Role.ENCODER: RoleConfig(), Role.PD: RoleConfig(settings={"kv_host": "127.0.0.1"})}
    found = problem(await examined(DeploymentConfig(str(checkpoint), roles)))
    assert "--kv-host: only prefill and decode instances exchange KV" in found.says


async def test_a_fleet_key_that_the_start_refuses_is_a_problem(checkpoint: Path, tmp_path: Path) -> None:
    key = tmp_path / "fleet.key"
    key.write_text("too short")
    key.chmod(0o600)
    found = problem(await examined(DeploymentConfig(str(checkpoint), fleet_key_file=key)))
    assert "--fleet-key-file" in found.says


async def image_size(config: DeploymentConfig, dtype: str) -> str:
    """The size of one image's embedding, as the room for it is checked."""
    (space,) = [one for one in await examined(config, dtype=dtype) if one.check == "storage space"]
    return space.says.rpartition(" takes ")[2]


async def test_auto_is_what_the_cpu_is_best_at_and_the_dtype_of_the_checkpoint_for_vllm(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "half"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    built_in = DeploymentConfig(str(folder), shared_storage_path=tmp_path)
    for_vllm = replace(built_in, engine=EngineKind.VLLM)
    best = "bfloat16" if has_native_bfloat16(cpu_flags()) else "float32"
    assert await image_size(built_in, "auto") == await image_size(built_in, best)
    assert await image_size(for_vllm, "auto") == await image_size(built_in, "float16")
    assert await image_size(built_in, "float16") != await image_size(built_in, "float32")


async def test_cpus_that_do_not_exist_are_a_problem(checkpoint: Path) -> None:
    roles = {Role.AGGREGATED: RoleConfig(cpus=(4096,))}
    assert "CPU 4096 cannot be used" in problem(await examined(DeploymentConfig(str(checkpoint), roles))).says


async def test_missing_vllm_is_a_problem(checkpoint: Path) -> None:
    found = await examined(DeploymentConfig(str(checkpoint), engine=EngineKind.VLLM))
    if "ok" in verdicts(found, "vLLM"):
        pytest.skip("vLLM is installed here")
    assert "make vllm" in problem(found).says
    assert verdicts(found, "devices") == ["skipped"]
