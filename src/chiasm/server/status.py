"""What an instance says about itself: /health, /v1/models, /metrics, /version."""

from __future__ import annotations

import asyncio
import time

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from chiasm import __version__
from chiasm.cores import allowed_cpus
from chiasm.errors import PathNotFoundError, StorageError
from chiasm.http import json_response
from chiasm.http.fleet_calls import caller_of, check_fleet
from chiasm.http.liveness import ready_response
from chiasm.models.token_bytes import longest_token
from chiasm.server.context import GeneratingEngine, ServerContext
from chiasm.wire import AwaitedEmbeddings, Health, ModelCard, ModelList, Role, model_card


class Status:
    """The endpoints without a body. All but ``awaited`` answer at once, whatever the engine does."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def health(self, request: Request) -> Response:
        """Answer with 200 if requests are taken, otherwise with 503."""
        health = await self._health()
        return json_response(health, 200 if health.status == "ok" else 503)

    async def ready(self, request: Request) -> Response:
        """Answer with the same status, and tell nobody more."""
        health = await self._health()
        return ready_response(health.status, health.status == "ok")

    async def models(self, request: Request) -> Response:
        """List the model."""
        return json_response(ModelList(data=[self._card()]))

    async def model(self, request: Request) -> Response:
        """Describe the model that the path names."""
        self._context.check_model(request.path_params["name"])
        return json_response(self._card())

    async def awaited(self, request: Request) -> Response:
        """Name the embeddings that prompts need next and that don't exist. Waits for the end of the engine's step."""
        check_fleet(caller_of(request.scope), "What embeddings are awaited")
        engine = self._context.loaded_engine  # also while it drains, since its requests wait for embeddings
        if not isinstance(engine, GeneratingEngine):
            raise PathNotFoundError("This instance reads no embeddings of others; PD and prefill instances do.")
        identifiers = await engine.awaited_embeddings()
        return json_response(AwaitedEmbeddings(identifiers=identifiers))

    async def metrics(self, request: Request) -> Response:
        """Answer in Prometheus' text format."""
        return Response(self._context.metrics.expose(), media_type=CONTENT_TYPE_LATEST)

    async def version(self, request: Request) -> Response:
        """Tell the version of chiasm."""
        return json_response({"version": __version__})

    @property
    def _clock_milliseconds(self) -> int | None:
        return int(time.time() * 1000) if self._context.fleet_key else None

    async def _health(self) -> Health:
        context = self._context
        status: str = context.state
        message = ""
        if status == "failed":
            message = context.failure.message if context.failure else "The engine has stopped; see the instance's log."
        engine = context.loaded_engine
        if status == "failed" and engine is not None and engine.trouble:
            message = engine.trouble
        if engine is None:
            progress = context.progress
            return Health(
                status=status,
                message=message,
                incarnation=context.incarnation,
                loaded_tensors=progress.loaded_tensors,
                tensors=progress.tensors,
                clock_milliseconds=self._clock_milliseconds,
            )
        try:
            ec_store = await asyncio.to_thread(engine.store_id)  # not cached: the folder may have been recreated
        except StorageError as error:
            ec_store, message = "", error.message
            if engine.config.role is Role.ENCODER:  # the other roles still answer text
                status = "failed"
        health = Health(
            status=status,
            message=message,
            incarnation=context.incarnation,
            load=context.load,
            role=str(engine.config.role),
            model=context.model,
            fingerprint=engine.model_fingerprint,
            dtype=engine.dtype_name,
            ec_store=ec_store,
            ec_connector=engine.ec_connector,
            ec_faults=engine.ec_faults,
            ec_place=engine.ec_place,
            version=__version__,
            fleet_keys=list(context.fleet_key.names) if context.fleet_key else [],
            clock_milliseconds=self._clock_milliseconds,
            needs_key=context.config.http.needs_key,
            max_model_len=engine.max_model_len,
            longest_token=await asyncio.to_thread(longest_token, engine.processor.tokenizer),
            max_items=engine.config.max_items,
            max_body_bytes=context.config.max_body_bytes,
            device=str(engine.device),
            threads=engine.num_threads,
            cpus=sorted(allowed_cpus()),
            shares_cores=engine.config.core_share is not None,
            device_id=engine.device_id,
            costs=engine.costs,
        )
        if engine.config.ec is not None and engine.config.role in (Role.PD, Role.PREFILL):
            health = msgspec.structs.replace(health, tells_lost=True, reads_stored=bool(engine.config.ec.store))
        if engine.config.kv is None:
            return health
        stats = engine.stats()
        return msgspec.structs.replace(
            health,
            max_num_seqs=engine.config.max_num_seqs,
            kv_connector=engine.config.kv.connector,
            kv_blocks_total=stats.kv_blocks_total,
            kv_blocks_free=stats.kv_blocks_total - stats.kv_blocks_used,
        )

    def _card(self) -> ModelCard:
        context = self._context
        return model_card(context.model, created=context.created, max_model_len=context.engine.max_model_len)
