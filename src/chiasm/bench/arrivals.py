"""A text stream of a PD's engine while large embeddings arrive at it, each as soon as the one before it is there.

The engine is in a process of its own, on one core; an encoder's half of the same connector is in another, on another core.
Nobody prefills what arrives: each embedding is the second of a request whose first never comes, and the request ends when the
embedding is in the engine's memory, verified. So all that the stream can feel is the arrival.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import secrets
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from chiasm.bench.handed_over import made_embedding
from chiasm.cores import pin_to
from chiasm.ec_transfer import (
    ECConnectorFactory,
    ECConnectorRole,
    ECTransferConfig,
    ECTransferRole,
    Wake,
    shared_memory,
    tcp,
)
from chiasm.engine.config import EngineConfig
from chiasm.engine.engine import LanguageEngine
from chiasm.engine.request import GenerateRequest, SamplingParams
from chiasm.tasks import end_tasks
from chiasm.wire import ECPlace, Role

_PATIENCE_SECONDS = 60.0
_SIDE = 64
"""Of the images whose places embeddings take; it doesn't matter here."""
_SENT_ROOM, _RECEIVED_ROOM = 16, 4
"""Embeddings for which there is memory on either side. A quarter of what the encoder has may be used in place."""
_KV_CACHE_BYTES = 256 << 20
_END = b""
_arrived = threading.Event()
"""Of this process's connector."""


class Rounds(msgspec.Struct):
    """Seconds between the tokens of a stream, by round."""

    calm: list[list[float]] = []
    """Without arrivals."""
    arriving: list[list[float]] = []
    arrivals: list[int] = []
    """Embeddings that came in each round of ``arriving``."""


class SharedMemoryConnector(shared_memory.SharedMemoryConnector):
    """Notes arrivals. It has the name of the other side's connector, which has to be the same."""

    def set_wake(self, wake: Wake) -> None:
        super().set_wake(_noted(wake))


class TcpConnector(tcp.TcpConnector):
    """The same over TCP."""

    def set_wake(self, wake: Wake) -> None:
        super().set_wake(_noted(wake))


def _noted(wake: Wake) -> Wake:
    def noted(arrived: str = "", /) -> None:
        _arrived.set()
        wake(arrived)

    return noted


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    folder: Path
    """Of the checkpoint."""
    connector: str
    size_bytes: int
    rounds: int
    tokens: int
    """Of the stream in each round."""
    language_core: int
    encoder_core: int


def measure_arrivals(plan: Plan) -> Rounds:
    """Return the gaps of streams with and without arrivals, in turns. Raises TimeoutError if nothing arrives."""
    context = multiprocessing.get_context("spawn")
    of_language, from_language = context.Pipe()
    of_encoder, from_encoder = context.Pipe()
    children = [
        context.Process(target=_language, args=(plan, from_language, of_encoder), daemon=True),
        context.Process(target=_encoder, args=(plan, from_encoder), daemon=True),
    ]
    try:
        for child in children:
            child.start()
        for end in (from_language, from_encoder, of_encoder):
            end.close()
        return msgspec.json.decode(of_language.recv_bytes(), type=Rounds)
    except EOFError:
        raise TimeoutError("the engine's process ended without a result; its output says why") from None
    finally:
        for child in children:
            child.kill()
            child.join()


# ---- the encoder's process ---------------------------------------------------------------------------------------------


def _encoder(plan: Plan, commands: Connection) -> None:
    """Say where embeddings are, and publish one under each name that comes."""
    pin_to((plan.encoder_core,))
    fingerprint = commands.recv_bytes().decode()
    config = _config(plan, ECTransferRole.PRODUCER, fingerprint)
    worker = ECConnectorFactory.create_connector(config, ECConnectorRole.WORKER)
    commands.send_bytes(msgspec.json.encode(worker.place()))
    embedding = made_embedding(plan.size_bytes)
    while (name := commands.recv_bytes()) != _END:
        worker.save_caches({name.decode(): embedding}, name.decode())
    worker.shutdown()


def _config(plan: Plan, role: ECTransferRole, fingerprint: str = "", module: str | None = None) -> ECTransferConfig:
    each = plan.size_bytes + (1 << 20)
    return ECTransferConfig(
        connector=plan.connector,
        connector_module_path=module,
        role=role,
        max_bytes=_SENT_ROOM * each,
        receive_bytes=_RECEIVED_ROOM * each,
        fingerprint=fingerprint,
    )


# ---- the engine's process ----------------------------------------------------------------------------------------------


def _language(plan: Plan, results: Connection, encoder: Connection) -> None:
    pin_to((plan.language_core,))
    config = EngineConfig(
        plan.folder,
        Role.PD,
        ec=_config(plan, ECTransferRole.CONSUMER, module=__name__),
        threads=1,
        kv_cache_bytes=_KV_CACHE_BYTES,
        dtype="float32",
    )
    engine = LanguageEngine(config)
    engine.start()
    try:
        encoder.send_bytes(engine.model_fingerprint.encode())
        place = msgspec.json.decode(encoder.recv_bytes(), type=ECPlace)
        results.send_bytes(msgspec.json.encode(asyncio.run(_rounds(plan, engine, encoder, place))))
        encoder.send_bytes(_END)
    finally:
        engine.stop()


async def _rounds(plan: Plan, engine: LanguageEngine, encoder: Connection, place: ECPlace) -> Rounds:
    arrivals = _Arrivals(engine, encoder, place)
    await arrivals.one()  # the first touch of memory takes longer
    await _gaps(engine, plan.tokens // 4)
    rounds = Rounds()
    for number in range(plan.rounds):
        for arriving in ((False, True), (True, False))[number % 2]:
            if not arriving:
                rounds.calm.append(await _gaps(engine, plan.tokens))
                continue
            before = arrivals.count
            task = asyncio.create_task(arrivals.forever())
            rounds.arriving.append(await _gaps(engine, plan.tokens))
            rounds.arrivals.append(arrivals.count - before)
            await end_tasks(task)
    return rounds


async def _gaps(engine: LanguageEngine, tokens: int) -> list[float]:
    """Return the seconds between the tokens of a stream."""
    prompt = engine.processor.build_text("who is there? " + secrets.token_hex(8))
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    request = GenerateRequest(f"stream {secrets.token_hex(8)}", prompt, sampling, time.monotonic() + 3600)
    times = [time.perf_counter() async for _ in engine.generate(request)]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


class _Arrivals:
    """Has embeddings come, one after the other."""

    def __init__(self, engine: LanguageEngine, encoder: Connection, place: ECPlace) -> None:
        self._engine = engine
        self._encoder = encoder
        self._place = place
        self.count = 0

    async def forever(self) -> None:
        while True:
            await self.one()

    async def one(self) -> None:
        """Want an embedding, have it published, and return when it is here."""
        name, never = secrets.token_hex(32), secrets.token_hex(32)
        geometry = self._engine.processor.geometry_of_size(_SIDE, _SIDE)
        content = [{"type": "image"}, {"type": "image"}]
        prompt = self._engine.processor.build_chat(
            [{"role": "user", "content": content}], [(never, geometry), (name, geometry)]
        )
        request = GenerateRequest(name, prompt, SamplingParams(max_tokens=1), time.monotonic() + _PATIENCE_SECONDS)
        _arrived.clear()
        waiting = asyncio.create_task(self._wait(request))
        try:
            self._engine.expect_embeddings({name: self._place}, ())
            self._encoder.send_bytes(name.encode())
            if not await asyncio.to_thread(_arrived.wait, _PATIENCE_SECONDS):
                raise TimeoutError("an embedding did not arrive")
            self.count += 1
        finally:
            _arrived.set()  # if this was cancelled, nothing will arrive, and the thread would wait for it
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting

    async def _wait(self, request: GenerateRequest) -> None:
        async for _ in self._engine.generate(request):
            pass
