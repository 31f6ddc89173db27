"""chiasm over vLLM against what vLLM itself ships for separate encoders: ECExampleConnector and its example proxy.

vLLM's example proxy is not part of vLLM's packages, nor of chiasm's: it is used if it has been put beside vLLM.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chiasm.bench.load import at_most, stream_in_turns, turns
from chiasm.bench.measurement import Bench, Figure, Measurement, Outcome, Panel, Series
from chiasm.bench.requests import Texts, ask, chat, photo
from chiasm.bench.servers import PROXY_READY_SECONDS, Command, chiasm_proxy, counting, served, supervised
from chiasm.bench.statistics import median, paired_ratio
from chiasm.bench.topology import IMAGES, VLLM_READY_SECONDS, on_vllm, pinned, running
from chiasm.launch import Deployment, DeploymentConfig
from chiasm.launch.folders import StorageFolder
from chiasm.launch.plan import Surroundings, plan_instances
from chiasm.launch.ports import HeldPort
from chiasm.wire import Role

CONNECTOR = "ECExampleConnector"
_VARIABLE = "CHIASM_VLLM_EXAMPLE_PROXY"
_FILE = Path("share") / "vllm" / "disagg_epd_proxy.py"
_LOOPBACK = "127.0.0.1"
_NO_REWRITE = "--no-rewrite"
NOT_THERE = (
    f"Not measured: vLLM's example proxy is not in this environment ({_FILE}), and {_VARIABLE} names no such file. Of what "
    "vLLM publishes, only the source distribution contains it; `make vllm` and scripts/vllm/example_proxy.sh fetch it from "
    "there."
)

_TTFT_AT_MOST = 0.9
_RATE_AT_LEAST = 1.1
_BYTES_AT_MOST = 0.1
_WARM_UP = 3
_AT_ONCE = 8
_TEXT_TOKENS = 64
_ANSWER_TOKENS = 16
_MIXED = 24
_QUICK_MIXED = 4
_LABELS = ("vLLM's example", "chiasm")


class VllmExample(Measurement):
    """Both sides have an encoder and a PD of the same vLLM; their flags differ only in the connector. They take turns."""

    name = "vllm-example"
    purpose = "chiasm over vLLM against vLLM's ECExampleConnector behind vLLM's example proxy"
    target = (
        f"first token of a 512 x 512 image at most {_TTFT_AT_MOST} times theirs; requests per second with texts and images at "
        f"least {_RATE_AT_LEAST} times theirs; bytes of request bodies at PD at most {_BYTES_AT_MOST} times theirs"
    )

    async def run(self, bench: Bench) -> Outcome:
        file = proxy_file()
        if file is None:
            return Outcome(notes=[NOT_THERE])
        outcome = Outcome()
        async with (
            running(bench, on_vllm(pinned(bench.model))) as (deployment,),
            example_instances(bench, deployment) as example,
        ):
            mix = Mix(bench, deployment.folder)
            async with example_proxy(bench, file, example.encoder, example.pd) as theirs:
                urls = (theirs, deployment.url)
                await _first_token(bench, outcome, urls)
                await _rate(bench, outcome, urls, mix)
            await _bytes_at_pd(bench, outcome, deployment, example, file, mix)
        return outcome


class Mix:
    """Half texts and half images, in a shuffled order, all of them new."""

    def __init__(self, bench: Bench, checkpoint: Path) -> None:
        self._texts = Texts(checkpoint, bench.seed)
        self._random = random.Random(f"mix {bench.seed}")
        self._size = _QUICK_MIXED if bench.quick else _MIXED
        self._seed = bench.seed
        self._drawn = 0

    def draw(self) -> list[bytes]:
        """Return the bodies of the next round."""
        images = [photo(f"mix {self._seed} {self._drawn + index}") for index in range(self._size // 2)]
        self._drawn += len(images)
        fields: dict[str, Any] = {"max_tokens": _ANSWER_TOKENS, "ignore_eos": True}
        bodies = [ask([image], **fields) for image in images]
        bodies += [chat(self._texts.of(_TEXT_TOKENS), **fields) for _ in range(self._size - len(images))]
        self._random.shuffle(bodies)
        return bodies


async def _first_token(bench: Bench, outcome: Outcome, urls: tuple[str, str]) -> None:
    pairs = bench.samples(60, quick=3)
    bench.phase("first token", pairs + _WARM_UP)

    def body_of(index: int) -> bytes:
        image = photo(f"vllm-example {bench.seed} {index}")
        return ask([image], max_tokens=2, stream=True, ignore_eos=True, logprobs=True)

    found = await stream_in_turns(bench, urls, body_of, rounds=pairs, warm_up=_WARM_UP)
    outcome.compare(
        "image, first token",
        {label: [1000 * one.ttft_seconds for one in answers] for label, answers in zip(_LABELS, found, strict=True)},
        title="vllm-example: image, first token",
        seed=bench.seed,
        at_most=_TTFT_AT_MOST,
    )


async def _rate(bench: Bench, outcome: Outcome, urls: tuple[str, str], mix: Mix) -> None:
    rounds = min(20, bench.samples(10, quick=2))
    bench.phase("texts and images", rounds + 1)
    seconds: list[list[float]] = [[], []]
    sent = 0
    for index in range(-1, rounds):
        bodies = mix.draw()
        for which in turns(index, 2):
            taken = await _seconds_for_all(bench, urls[which], bodies)
            if index >= 0:
                seconds[which].append(taken)
        sent = len(bodies)
        bench.advance()
    ratio = paired_ratio(seconds[1], seconds[0], seed=bench.seed)
    outcome.figures.append(
        Figure.of("texts and images, requests per second: chiasm / vLLM's example", ratio, "x", at_least=_RATE_AT_LEAST)
    )
    outcome.figures += [
        Figure(f"texts and images: {label}, median", sent / median(taken), "a second")
        for label, taken in zip(_LABELS, seconds, strict=True)
    ]
    series = [Series(label, taken) for label, taken in zip(_LABELS, seconds, strict=True)]
    outcome.panels.append(Panel(f"vllm-example: {sent} texts and images, {_AT_ONCE} at a time", "s", series))
    outcome.notes.append(
        f"{rounds} rounds of {sent} requests, half of them with one image of 512 x 512 pixels, {_AT_ONCE} at a time, with "
        f"answers of {_ANSWER_TOKENS} tokens."
    )


async def _seconds_for_all(bench: Bench, url: str, bodies: list[bytes]) -> float:
    """Send all requests, and return the seconds until the last is answered."""

    async def send(index: int) -> None:
        await bench.client.post(url, bodies[index])

    started = time.perf_counter()
    await at_most(_AT_ONCE, len(bodies), send)
    return time.perf_counter() - started


async def _bytes_at_pd(
    bench: Bench, outcome: Outcome, deployment: Deployment, example: Example, file: Path, mix: Mix
) -> None:
    """Send one more round through proxies whose PD is behind a counter."""
    bench.phase("bytes of bodies at PD")
    bodies = mix.draw()
    (pd,) = deployment.urls(Role.PD)
    async with counting(pd) as ours, chiasm_proxy(bench, deployment, ours.url) as url:
        await _seconds_for_all(bench, url, bodies)
    async with (
        counting(example.pd) as theirs,
        example_proxy(bench, file, example.encoder, theirs.url) as url,
    ):
        await _seconds_for_all(bench, url, bodies)
    counters = {"chiasm": ours, "vLLM's example": theirs}
    if can_forward_images(file):
        async with (
            pd_for_images(bench, deployment, example) as other_pd,
            counting(other_pd) as unwritten,
            example_proxy(bench, file, example.encoder, unwritten.url, forward_images=True) as url,
        ):
            await _seconds_for_all(bench, url, bodies)
        counters["vLLM's example with --no-rewrite"] = unwritten
    for label, counter in counters.items():
        if counter is not ours:
            ratio = ours.body_bytes / counter.body_bytes
            limit = _BYTES_AT_MOST if counter is theirs else None
            outcome.figures.append(Figure(f"bytes of bodies at PD: chiasm / {label}", ratio, "x", limit))
    for label, counter in counters.items():
        outcome.figures.append(
            Figure(f"bytes of bodies at PD: {label}", counter.body_bytes / counter.requests / 1000, "kB per request")
        )
        if counter.requests != len(bodies):
            outcome.notes.append(f"The PD of {label} got {counter.requests} requests for {len(bodies)} of the client.")
    sent = sum(map(len, bodies)) / len(bodies)
    outcome.figures.append(Figure("bytes of bodies from the client", sent / 1000, "kB per request"))


# ---- vLLM's example -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """Two ``vllm serve`` with ECExampleConnector; ``encoder`` and ``pd`` are their base URLs."""

    encoder: str
    pd: str
    storage: StorageFolder


def proxy_file(environment: Mapping[str, str] = os.environ, prefix: str = sys.prefix) -> Path | None:
    """Return the file of vLLM's example proxy; None if it isn't there."""
    path = Path(environment.get(_VARIABLE) or Path(prefix) / _FILE)
    return path if path.is_file() else None


def can_forward_images(file: Path) -> bool:
    """Tell whether this version of the proxy has a flag to send PD the images themselves instead of descriptions."""
    return f'"{_NO_REWRITE}"' in file.read_text(encoding="utf-8")


def as_stock(command: Sequence[str], storage: Path) -> list[str]:
    """Turn the command of an instance over vLLM into one with vLLM's connector and without chiasm's middleware."""
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
    """An encoder and a PD that differ from those of ``deployment`` only in their connector. Raises ChiasmError."""
    storage = StorageFolder()
    try:
        async with _instances(bench, deployment, deployment.config, storage) as urls:
            yield Example(urls[Role.ENCODER], urls[Role.PD], storage)
    finally:
        storage.remove()


@asynccontextmanager
async def pd_for_images(bench: Bench, deployment: Deployment, example: Example) -> AsyncIterator[str]:
    """One more PD of the example, which also accepts images; gives its URL. Raises ChiasmError."""
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
    """vLLM's proxy in front of an encoder and a PD; gives its URL."""
    address = HeldPort(_LOOPBACK)
    arguments = [sys.executable, str(file), "--host", address.host, "--port", str(address.port)]
    arguments += ["--encode-servers-urls", encoder, "--prefill-servers-urls", "disable", "--decode-servers-urls", pd]
    arguments += [_NO_REWRITE] if forward_images else []
    command = Command("vLLM's example proxy", supervised(address.url, arguments), os.environ)
    try:
        async with served(bench, command, ready_seconds=PROXY_READY_SECONDS):
            yield address.url
    finally:
        address.release()
