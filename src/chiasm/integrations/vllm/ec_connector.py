"""The class that vLLM loads: ``--ec-transfer-config`` names it as ``ChiasmECConnector`` of this module.

It is an adapter around one of chiasm's connectors, or one that a user wrote. vLLM's scheduler has one object, whose calls go
to SchedulerHalf, and each worker has one, whose calls go to WorkerHalf; this file only translates between vLLM's types and
theirs. If vLLM runs its only worker in the scheduler's process, the two are introduced to each other.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any
from weakref import WeakValueDictionary

import torch
import vllm

from chiasm.integrations.vllm import check_version

check_version(vllm.__version__)  # before imports that another version might not have

from vllm.distributed.ec_transfer.ec_connector.base import (  # noqa: E402
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
    ECConnectorWorkerMetadata,
)
from vllm.distributed.ec_transfer.ec_connector.utils import (  # noqa: E402
    PlaceholderMetadataResolver,
    collect_ec_item_metadata,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.executor.abstract import Executor  # noqa: E402
from vllm.v1.executor.uniproc_executor import UniProcExecutor  # noqa: E402

from chiasm import ec_transfer  # noqa: E402
from chiasm.errors import ConfigurationError  # noqa: E402
from chiasm.fleet_key import read_fleet_key  # noqa: E402
from chiasm.integrations.vllm.items import Layout  # noqa: E402
from chiasm.integrations.vllm.messages import Exchange, StepMetadata, StepReport  # noqa: E402
from chiasm.integrations.vllm.metrics import ChiasmECPromMetrics, ChiasmECStats  # noqa: E402
from chiasm.integrations.vllm.outputs import WAITS, with_told  # noqa: E402
from chiasm.integrations.vllm.scheduler import Reach, SchedulerHalf  # noqa: E402
from chiasm.integrations.vllm.settings import Settings, fingerprint_of, store_url  # noqa: E402
from chiasm.integrations.vllm.worker import WorkerHalf  # noqa: E402

ECConnectorMetadata.register(StepMetadata)
ECConnectorWorkerMetadata.register(StepReport)

_alone: WeakValueDictionary[tuple[str, ECConnectorRole], ChiasmECConnector] = WeakValueDictionary()
"""The halves that have yet to meet the other one, by vLLM's id of their engine."""


class ChiasmECConnector(ECConnectorBase):  # type: ignore[misc]
    """Moves encoder output between vLLM instances, and between them and chiasm's own."""

    def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        model_config = vllm_config.model_config
        settings = Settings.read(vllm_config.ec_transfer_config.ec_connector_extra_config)
        _check(vllm_config)
        if settings.moves_from_memory:
            _check_workers(vllm_config.parallel_config, settings.connector)
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        if role is ECConnectorRole.SCHEDULER:
            from chiasm.integrations.vllm import engine_hooks  # needs vLLM's engine, which workers do without

            self._store = self._make_store(settings, ec_transfer.ECConnectorRole.SCHEDULER)
            self._meet()
            self._fields = PlaceholderMetadataResolver(model_config)
            self._fields.fields_for("image")  # takes a while, so not when a request waits
            self._scheduler = SchedulerHalf(
                self._store,
                settings,
                Layout.of(model_config),
                self._fields.fields_for,
                reach=_reach_of(vllm_config),
                kv_cache_tokens=_kv_cache_tokens(vllm_config),
                is_producer=self.is_producer,
                is_reader=self.is_consumer,
            )
            engine_hooks.install(vllm_config, self._scheduler)
        else:
            self._store = self._make_store(settings, ec_transfer.ECConnectorRole.WORKER)
            self._meet()
            self._worker = WorkerHalf(self._store, model_config.dtype, is_writer=_is_writer)

    def _make_store(self, settings: Settings, role: ec_transfer.ECConnectorRole) -> ec_transfer.ECConnector:
        transfer, layout = self._vllm_config.ec_transfer_config, Layout.of(self._vllm_config.model_config)
        config = settings.transfer_config(
            ec_transfer.ECTransferRole(transfer.ec_role),
            fingerprint=fingerprint_of(self._vllm_config.model_config, settings.fingerprint),
            device=_device() if role is ec_transfer.ECConnectorRole.WORKER or self._shares_process else "cpu",
            in_one_process=self._shares_process,
            fleet_key=read_fleet_key(),
            store=store_url(),
            dtype=layout.dtype,
            entry_width=layout.width,
        )
        return ec_transfer.ECConnectorFactory.create_connector(config, role)

    @property
    def _shares_process(self) -> bool:
        """Whether there is one worker, and it runs in the scheduler's process."""
        is_one = self._vllm_config.parallel_config.world_size == 1
        return is_one and issubclass(Executor.get_class(self._vllm_config), UniProcExecutor)

    def _meet(self) -> None:
        """Introduce the two halves to each other when the second one is made."""
        self._other_store: ec_transfer.ECConnector | None = None
        if not self._shares_process:
            return
        engine_id = self._vllm_config.ec_transfer_config.engine_id
        mine, others = ECConnectorRole.SCHEDULER, ECConnectorRole.WORKER
        if self.role is others:
            mine, others = others, mine
        other = _alone.pop((engine_id, others), None)
        if other is None:
            _alone[engine_id, mine] = self
            return
        self._other_store, other._other_store = other._store, self._store
        self._store.meet(other._store)
        other._store.meet(self._store)

    def exchange(self) -> Exchange:
        """Return how embeddings are exchanged, as far as the scheduler's half knows."""
        places = [
            store.place() for store in (self._store, self._other_store) if store is not None and store.is_producer
        ]
        place = next((place for place in places if place is not None), None)
        return Exchange(self._store.store_id(), place, self._store.max_received_bytes if self.is_consumer else None)

    def num_unfetched(self) -> int:
        """Return how many embeddings others have yet to fetch, as far as this process knows."""
        return sum(store.num_unfetched() for store in (self._store, self._other_store) if store is not None)

    def shutdown(self) -> None:
        if self._scheduler is not None:
            self._scheduler.shutdown()
        self._store.shutdown()

    # ---- scheduler ------------------------------------------------------------------------------------------------

    @property
    def scheduler_half(self) -> SchedulerHalf:
        assert self._scheduler is not None, "this is a worker's connector"
        return self._scheduler

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        return self.scheduler_half.ensure_cache_available(request, num_computed_tokens)

    def has_cache_item(self, identifier: str) -> bool:
        return self.scheduler_half.has_cache_item(identifier)

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        self.scheduler_half.update_state_after_alloc(request, index)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        return self.scheduler_half.build_connector_meta(scheduler_output.total_num_scheduled_tokens)

    def update_connector_output(self, connector_output: Any) -> None:
        report = connector_output.ec_connector_worker_meta
        if isinstance(report, StepReport):
            self.scheduler_half.update_connector_output(report)

    def take_unavailable_requests(self) -> set[str]:
        return self.scheduler_half.take_unavailable_requests()

    def request_finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        """Return False, since nothing is kept back, and the ``ec_transfer_params`` of the answer: the published items.

        vLLM's HTTP server gets the request's waits there, too, if it has asked for them.
        """
        waits = self.scheduler_half.request_finished(request)
        if not self.is_producer:
            return False, with_told(None, WAITS, waits) if waits else None
        items = {
            identifier: entry
            for identifier, entry in collect_ec_item_metadata(request.mm_features, self._fields).items()
            if self.scheduler_half.is_published(identifier)
        }
        return False, with_told(items, WAITS, waits) if waits else items or None

    # ---- worker ---------------------------------------------------------------------------------------------------

    @property
    def worker_half(self) -> WorkerHalf:
        assert self._worker is not None, "this is the scheduler's connector"
        return self._worker

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        self.worker_half.bind(connector_metadata)

    def clear_connector_metadata(self) -> None:
        super().clear_connector_metadata()
        self.worker_half.clear()

    def start_save_caches(self, **kwargs: Any) -> None:
        with _syncing():
            self.worker_half.start_save_caches(kwargs["encoder_cache"])

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        with _syncing():
            self.worker_half.start_load_caches(encoder_cache)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        if self.is_producer:
            with _syncing():
                self.worker_half.save_caches(encoder_cache, mm_hash)

    def build_connector_worker_meta(self) -> StepReport | None:
        return self.worker_half.report()

    # ---- statistics -----------------------------------------------------------------------------------------------

    def get_ec_connector_stats(self) -> ChiasmECStats | None:
        """Return what has been counted since the last call; the scheduler's object answers for the workers too."""
        if self._scheduler is None:
            return None
        counts = self._scheduler.take_counts()
        return ChiasmECStats(data=counts) if counts else None

    @classmethod
    def build_ec_connector_stats(cls, data: dict[str, Any] | None = None) -> ChiasmECStats:
        return ChiasmECStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> ChiasmECPromMetrics:
        return ChiasmECPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _check(vllm_config: Any) -> None:
    """Raise ConfigurationError for what would fail at the first request, or end the start without a reason."""
    model_config = vllm_config.model_config
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if ranks > 1 and vllm_config.ec_transfer_config.is_ec_producer and not _has_hash_seed():
        # At start each rank encodes a sample of each modality, in the order of a set; in different orders they deadlock.
        raise ConfigurationError(
            f"An encoder on {ranks} ranks needs the same order of Python's sets in all of them: set PYTHONHASHSEED in its "
            "environment to a number, such as 1 (`chiasm serve` does this)."
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1 and vllm_config.ec_transfer_config.is_ec_consumer:
        # The first rank loads, and vLLM takes the report of the last one.
        raise ConfigurationError(
            "ChiasmECConnector cannot load embeddings with --pipeline-parallel-size, since nobody would hear of a load that "
            "failed; use --tensor-parallel-size."
        )
    if model_config.is_encoder_decoder:
        raise ConfigurationError("ChiasmECConnector cannot serve encoder-decoder models.")
    if model_config.multimodal_config is None:
        raise ConfigurationError(f"{model_config.model} takes text only; run it without ChiasmECConnector.")
    if model_config.multimodal_config.mm_processor_cache_type == "shm":
        # The scheduler would see where items are, but not what they are.
        raise ConfigurationError("ChiasmECConnector needs --mm-processor-cache-type lru.")


def _check_workers(parallel_config: Any, connector: str) -> None:
    """Raise ConfigurationError if workers may run on other hosts, whose processes can't map the scheduler's memory."""
    if parallel_config.use_ray or parallel_config.nnodes_within_dp > 1:
        raise ConfigurationError(
            f"{connector} needs all workers of an instance on the host of its scheduler, and with Ray or several --nnodes they "
            "may be on others: use SharedStorageConnector, or --distributed-executor-backend mp on one host."
        )


def _has_hash_seed() -> bool:
    return os.environ.get("PYTHONHASHSEED", "random") not in ("", "random")


def _lookahead_tokens(vllm_config: Any) -> int:
    """Return how many tokens of a sequence a step computes beyond those that it keeps."""
    speculative = vllm_config.speculative_config
    return int(speculative.num_speculative_tokens or 0) + 1 if speculative is not None else 0


def _reach_of(vllm_config: Any) -> Reach:
    scheduler, lookahead = vllm_config.scheduler_config, _lookahead_tokens(vllm_config)
    # The state of a hybrid model can be kept only at certain positions, so its chunks cannot end anywhere.
    ends_anywhere = scheduler.enable_chunked_prefill and not vllm_config.model_config.is_hybrid
    return Reach(
        window_tokens=int(scheduler.max_num_batched_tokens) + lookahead,
        max_ahead=max(1, int(scheduler.max_num_seqs) // 4) if ends_anywhere else 0,
        lookahead_tokens=lookahead,
    )


def _kv_cache_tokens(vllm_config: Any) -> int:
    """Return after how many computed tokens each block of the KV cache that was free has been reused.

    That is twice its size, since the first tokens may fill blocks that requests had already, and more if drafts are computed
    and rejected.
    """
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    block_tokens = cache.block_size * parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size
    return int(2 * cache.num_gpu_blocks * block_tokens * (1 + _lookahead_tokens(vllm_config)))


def _is_writer() -> bool:
    """Return whether this rank saves: one does for all, since all have the same embeddings."""
    return bool(get_tensor_model_parallel_rank() == 0)


def _device() -> str:
    """Return the worker's own device: a bare ``cuda`` would be the first GPU, whatever the rank."""
    kind = str(current_platform.device_type)
    return f"{kind}:{current_platform.current_device()}" if current_platform.is_cuda_alike() else kind


def _syncing() -> contextlib.AbstractContextManager[Any]:
    """A block that may wait for the GPU, as copying an embedding does; vLLM can be set to complain about all others."""
    try:
        from vllm.utils.gpu_sync_debug import gpu_sync_allowed
    except ImportError:
        return contextlib.nullcontext()
    return gpu_sync_allowed()  # type: ignore[no-any-return]
