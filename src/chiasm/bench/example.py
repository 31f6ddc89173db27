"""vLLM's own example of encoder and PD apart: its ECExampleConnector, and the proxy that is among its examples.

The proxy is no part of vLLM's packages, and none of chiasm's: it is used where somebody has put it beside vLLM.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from chiasm.bench.measurement import Bench
from chiasm.bench.served import Command, served, supervised
from chiasm.bench.topology import VLLM_READY_SECONDS
from chiasm.bench.vllm import IMAGES
from chiasm.launch import Deployment, DeploymentConfig
from chiasm.launch.folders import StorageFolder
from chiasm.launch.plan import Surroundings, plan_instances, plan_proxy
from chiasm.launch.ports import HeldPort
from chiasm.wire import Role

CONNECTOR = "ECExampleConnector"
_VARIABLE = "CHIASM_VLLM_EXAMPLE_PROXY"
_FILE = Path("share") / "vllm" / "disagg_epd_proxy.py"
_LOOPBACK = "127.0.0.1"
_PROXY_READY_SECONDS = 60.0
_NO_REWRITE = "--no-rewrite"
NOT_THERE = (
    f"Not measured: vLLM's example proxy is not in this environment ({_FILE}), and {_VARIABLE} names no such file. Of what "
    "vLLM publishes, only the source distribution has it; `make vllm` fetches it from there, and so does "
    "scripts/vllm/example_proxy.sh."
)


@dataclass(frozen=True)
class Example:
    """Two ``vllm serve`` with ECExampleConnector."""

    encoder: str
    pd: str
    """Both are base URLs."""
    storage: StorageFolder


def proxy_file(environment: Mapping[str, str] = os.environ, prefix: str = sys.prefix) -> Path | None:
    """vLLM's example proxy, or None where there is none."""
    path = Path(environment.get(_VARIABLE) or Path(prefix) / _FILE)
    return path if path.is_file() else None


def can_forward_images(file: Path) -> bool:
    """Whether this version of the proxy can be told to send PD the images themselves, in place of what describes them."""
    return f'"{_NO_REWRITE}"' in file.read_text(encoding="utf-8")


def as_stock(command: Sequence[str], storage: Path) -> list[str]:
    """The command of one of chiasm's instances over vLLM, with vLLM's connector and without chiasm's middleware."""
    stock = list(command)
    place = stock.index("--middleware")
    del stock[place : place + 2]
    place = stock.index("--ec-transfer-config") + 1
    transfer = {
        "ec_connector": CONNECTOR,
        "ec_role": json.loads(stock[place])["ec_role"],
        "ec_connector_extra_config": {"shared_storage_path": str(storage)},
    }
    stock[place] = json.dumps(transfer)
    return stock


@asynccontextmanager
async def example_instances(bench: Bench, deployment: Deployment) -> AsyncIterator[Example]:
    """An encoder and a PD as ``deployment`` has them, but for their connector. Raises ChiasmError."""
    storage = StorageFolder()
    try:
        async with _instances(bench, deployment, deployment.config, storage) as urls:
            yield Example(urls[Role.ENCODER], urls[Role.PD], storage)
    finally:
        storage.remove()


@asynccontextmanager
async def pd_for_images(bench: Bench, deployment: Deployment, example: Example) -> AsyncIterator[str]:
    """One more PD of the example, which is let have images themselves; its URL. Raises ChiasmError."""
    role = deployment.config.roles[Role.PD]
    config = replace(deployment.config, roles={Role.PD: replace(role, vllm_flags=(*role.vllm_flags, *IMAGES))})
    async with _instances(bench, deployment, config, example.storage) as urls:
        yield urls[Role.PD]


@asynccontextmanager
async def _instances(
    bench: Bench, deployment: Deployment, config: DeploymentConfig, storage: StorageFolder
) -> AsyncIterator[dict[Role, str]]:
    placements = {place: one for place, one in deployment.placements.items() if place[0] in config.roles}
    held: list[HeldPort] = []
    try:
        surroundings = Surroundings(storage.path, storage.max_bytes, None)
        plans = plan_instances(config, deployment.folder, placements, surroundings, held)
        commands = [
            Command(f"vLLM's {plan.name}", as_stock(plan.command, storage.path), plan.environment) for plan in plans
        ]
        async with served(bench, *commands, ready_seconds=VLLM_READY_SECONDS):
            yield {plan.role: plan.address.url for plan in plans if plan.role is not None}
    finally:
        for address in held:
            address.release()


@asynccontextmanager
async def example_proxy(
    bench: Bench, file: Path, encoder: str, pd: str, *, forward_images: bool = False
) -> AsyncIterator[str]:
    """vLLM's proxy in front of an encoder and a PD; its URL."""
    address = HeldPort(_LOOPBACK)
    arguments = [sys.executable, str(file), "--host", address.host, "--port", str(address.port)]
    arguments += ["--encode-servers-urls", encoder, "--prefill-servers-urls", "disable", "--decode-servers-urls", pd]
    arguments += [_NO_REWRITE] if forward_images else []
    command = Command("vLLM's example proxy", supervised(address.url, arguments), os.environ)
    try:
        async with served(bench, command, ready_seconds=_PROXY_READY_SECONDS):
            yield address.url
    finally:
        address.release()


@asynccontextmanager
async def chiasm_proxy(bench: Bench, deployment: Deployment, pd: str) -> AsyncIterator[str]:
    """One more of chiasm's proxies in front of a deployment's encoders, and of ``pd`` in place of its PD; its URL."""
    address = HeldPort(_LOOPBACK)
    urls = [*((Role.ENCODER, url) for url in deployment.urls(Role.ENCODER)), (Role.PD, pd)]
    plan = plan_proxy(deployment.config, address, urls)
    command = Command("chiasm's proxy", plan.command, plan.environment, plan.configuration)
    try:
        async with served(bench, command, ready_seconds=_PROXY_READY_SECONDS):
            yield address.url
    finally:
        address.release()
