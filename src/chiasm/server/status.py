"""What an instance says of itself: /health, /v1/models, /metrics, /version."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from chiasm import __version__
from chiasm.cores import allowed_cpus
from chiasm.errors import StorageError
from chiasm.server.instance import Instance
from chiasm.server.protocol import ModelCard, ModelList
from chiasm.wire import Role


class Status:
    """The endpoints that take no body; all answer at once, whatever the engine does."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance

    async def health(self, request: Request) -> Response:
        """200 when requests are taken, else 503."""
        instance = self._instance
        state: str = instance.state
        answer: dict[str, Any] = {}
        reason = instance.failure.message if instance.failure else "the engine has stopped; its log says why"
        if instance.loaded_engine is not None:
            engine = instance.loaded_engine
            answer |= {
                "role": str(engine.config.role),
                "model": instance.model,
                "fingerprint": engine.model_fingerprint,
                "dtype": engine.dtype_name,
                "version": __version__,
                "max_model_len": engine.max_model_len,
                "max_items": engine.config.max_items,
                "device": str(engine.device),
                "threads": engine.num_threads,
                "cpus": sorted(allowed_cpus()),
            }
            try:
                # As it is now: the folder may have been removed and made anew since.
                answer["ec_store"] = await asyncio.to_thread(engine.store_id)
            except StorageError as error:
                answer |= {"ec_store": "", "message": error.message}
                if engine.config.role is Role.ENCODER:  # the others still answer text
                    state = "failed"
            if engine.config.kv is not None:
                stats = engine.stats()
                answer |= {
                    "kv_connector": engine.config.kv.connector,
                    "kv_blocks_total": stats.kv_blocks_total,
                    "kv_blocks_free": stats.kv_blocks_total - stats.kv_blocks_used,
                    "max_num_seqs": engine.config.max_num_seqs,
                }
        if state == "failed":
            answer.setdefault("message", reason)
        return _json({"status": state, **answer}, 200 if state == "ok" else 503)

    async def models(self, request: Request) -> Response:
        """The one model, as a list."""
        return _json(ModelList([self._card()]))

    async def model(self, request: Request) -> Response:
        """The one model, if that is its name."""
        self._instance.check_model(request.path_params["name"])
        return _json(self._card())

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format."""
        return Response(self._instance.metrics.expose(), media_type=CONTENT_TYPE_LATEST)

    async def version(self, request: Request) -> Response:
        return _json({"version": __version__})

    def _card(self) -> ModelCard:
        engine = self._instance.engine
        return ModelCard(self._instance.model, self._instance.created, self._instance.model, engine.max_model_len)


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
