"""Small real servers that play instances: they speak the wire, and count what a test has them count."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

MODEL = "tiny"
METADATA = {"image_grid_thw": [1, 4, 4]}


class Played:
    """An instance on a port of its own. Its attributes say how it behaves."""

    def __init__(self, role: str, **health: Any) -> None:
        self.role = role
        self.url = ""
        self.health: dict[str, Any] = {
            "status": "ok",
            "role": role,
            "model": MODEL,
            "fingerprint": "f" * 64,
            "dtype": "float32",
            "ec_store": "s" * 32,
            "version": "0.1.0",
            "max_model_len": 512,
        } | health
        self.counts: dict[str, float] = {
            "chiasm_images_encoded_total": 0,
            "chiasm_ec_loads_total": 0,
            "chiasm_kv_transfers_total": 0,
        }
        self.adds: dict[str, float] = {}
        """To its counters, with each chat completion."""
        self.status = 200
        self.outcome = ""
        """Of the first image, as the answers' Server-Timing says."""
        self.reply: object = None
        """Instead of the answer to a chat completion."""
        self.bodies: list[dict[str, Any]] = []
        self.counts_are_shown = True
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Played:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response(self.health)

    async def _metrics(self, request: web.Request) -> web.Response:
        if not self.counts_are_shown:
            return web.Response(status=404)
        return web.Response(text="".join(f"{name} {value}\n" for name, value in self.counts.items()))

    async def _chat(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        self.bodies.append(body)
        if self.status != 200:
            return web.json_response({"error": {"message": "no embedding came within 2 s"}}, status=self.status)
        for name, value in self.adds.items():
            self.counts[name] += value
        if self.reply is not None:
            return web.json_response(self.reply)
        answer: dict[str, Any] = {"choices": [{"message": {"content": "red"}}]}
        parts = body["messages"][0]["content"]
        if self.role == "encoder":
            answer["ec_transfer_params"] = {
                part["uuid"]: {"item_indices": [index], "metadata": METADATA} for index, part in enumerate(parts)
            }
        if self.role == "prefill":
            answer["kv_transfer_params"] = {"do_remote_prefill": True, "remote_engine_id": "p", "remote_block_ids": [1]}
        timing = {"server-timing": f'total;dur=1, item0;desc="{self.outcome}";dur=1.000'} if self.outcome else {}
        return web.json_response(answer, headers=timing)


def encoder(**health: Any) -> Played:
    played = Played("encoder", **health)
    played.adds = {"chiasm_images_encoded_total": 1}
    return played


def reader(role: str = "pd", **health: Any) -> Played:
    played = Played(role, **health)
    played.adds = {"chiasm_ec_loads_total": 1}
    return played


def decode(**health: Any) -> Played:
    played = Played("decode", **health)
    played.adds = {"chiasm_kv_transfers_total": 1}
    return played
