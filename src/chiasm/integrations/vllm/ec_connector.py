"""The class that vLLM loads: ``--ec-transfer-config`` names it as ``ChiasmECConnector`` of this module.

It is SharedStorageConnector in vLLM's clothes. What vLLM asks its scheduler's object goes to SchedulerHalf, what it asks
the workers' objects to WorkerHalf; this file only translates between vLLM's types and theirs.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
import vllm

from chiasm.integrations.vllm.versions import check_version

check_version(vllm.__version__)  # before the imports that another version might not have

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

from chiasm import ec_transfer  # noqa: E402
from chiasm.ec_transfer.shared_storage import SharedStorageConnector  # noqa: E402
from chiasm.errors import ConfigurationError  # noqa: E402
from chiasm.integrations.vllm.identity import fingerprint_of  # noqa: E402
from chiasm.integrations.vllm.layout import Layout  # noqa: E402
from chiasm.integrations.vllm.scheduler_half import Reach, SchedulerHalf  # noqa: E402
from chiasm.integrations.vllm.settings import Settings  # noqa: E402
from chiasm.integrations.vllm.stats import ChiasmECPromMetrics, ChiasmECStats  # noqa: E402
from chiasm.integrations.vllm.step import StepMetadata, StepReport  # noqa: E402
from chiasm.integrations.vllm.worker_half import WorkerHalf  # noqa: E402

ECConnectorMetadata.register(StepMetadata)
ECConnectorWorkerMetadata.register(StepReport)


class ChiasmECConnector(ECConnectorBase):  # type: ignore[misc]
    """Moves encoder output between vLLM instances, and between them and chiasm's own, through a shared folder."""

    def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        model_config = vllm_config.model_config
        settings = Settings.read(vllm_config.ec_transfer_config.ec_connector_extra_config)
        _check(vllm_config)
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        if role is ECConnectorRole.SCHEDULER:
            # They need vLLM's engine, which workers do without.
            from chiasm.integrations.vllm import encoder_cache, patience

            self._store = self._make_store(settings, ec_transfer.ECConnectorRole.SCHEDULER, "cpu")
            self._fields = PlaceholderMetadataResolver(model_config)
            self._fields.fields_for("image")  # takes a while: better now than when a request waits
            self._scheduler = SchedulerHalf(
                self._store,
                settings,
                Layout.of(model_config),
                self._fields.fields_for,
                reach=_reach_of(vllm_config),
                is_producer=self.is_producer,
                is_reader=self.is_consumer,
            )
            encoder_cache.install(vllm_config, self._scheduler)
            patience.install()
        else:
            self._store = self._make_store(settings, ec_transfer.ECConnectorRole.WORKER, _device())
            self._worker = WorkerHalf(self._store, model_config.dtype, is_writer=_is_writer)

    def _make_store(self, settings: Settings, role: ec_transfer.ECConnectorRole, device: str) -> SharedStorageConnector:
        transfer = self._vllm_config.ec_transfer_config
        config = ec_transfer.ECTransferConfig(
            role=ec_transfer.ECTransferRole(transfer.ec_role),
            shared_storage_path=settings.shared_storage_path,
            max_bytes=settings.max_bytes,
            fingerprint=fingerprint_of(self._vllm_config.model_config, settings.fingerprint),
            device=device,
            separate_processes=True,
        )
        return SharedStorageConnector(config, role)

    def shutdown(self) -> None:
        if self._scheduler is not None:
            self._scheduler.shutdown()
        self._store.shutdown()

    # ---- scheduler ------------------------------------------------------------------------------------------------

    @property
    def half(self) -> SchedulerHalf:
        assert self._scheduler is not None, "this is the workers' half"
        return self._scheduler

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        return self.half.ensure_cache_available(request, num_computed_tokens)

    def has_cache_item(self, identifier: str) -> bool:
        return self.half.has_cache_item(identifier)

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        self.half.update_state_after_alloc(request, index)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        return self.half.build_connector_meta()

    def update_connector_output(self, connector_output: Any) -> None:
        report = connector_output.ec_connector_worker_meta
        if isinstance(report, StepReport):
            self.half.update_connector_output(report)

    def take_unavailable_requests(self) -> set[str]:
        return self.half.take_unavailable_requests()

    def request_finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        """What the request's answer says of its items, for those that a consumer will find; nothing is kept back."""
        self.half.request_finished(request)
        if not self.is_producer:
            return False, None
        items = {
            identifier: entry
            for identifier, entry in collect_ec_item_metadata(request.mm_features, self._fields).items()
            if self.half.is_published(identifier)
        }
        return False, items or None

    # ---- worker ---------------------------------------------------------------------------------------------------

    @property
    def _working(self) -> WorkerHalf:
        assert self._worker is not None, "this is the scheduler's half"
        return self._worker

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._working.bind(connector_metadata)

    def clear_connector_metadata(self) -> None:
        super().clear_connector_metadata()
        self._working.clear()

    def start_save_caches(self, **kwargs: Any) -> None:
        with _syncing():
            self._working.start_save_caches(kwargs["encoder_cache"])

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        with _syncing():
            self._working.start_load_caches(encoder_cache)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        if self.is_producer:
            with _syncing():
                self._working.save_caches(encoder_cache, mm_hash)

    def build_connector_worker_meta(self) -> StepReport | None:
        return self._working.report()

    # ---- statistics -----------------------------------------------------------------------------------------------

    def get_ec_connector_stats(self) -> ChiasmECStats | None:
        """The scheduler's object answers for the workers too; see counters.py."""
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
    """Raises ConfigurationError for what would fail at the first request, or end the start without a reason."""
    model_config = vllm_config.model_config
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if ranks > 1 and vllm_config.ec_transfer_config.is_ec_producer and not _has_hash_seed():
        # vLLM has each rank encode a sample of each modality, in the order of a set: they wait for each other in vain.
        raise ConfigurationError(
            f"an encoder over {ranks} ranks needs the same order of Python's sets in all of them: set PYTHONHASHSEED in its "
            "environment to a number, such as 1 (`chiasm serve` does)"
        )
    if model_config.is_encoder_decoder:
        raise ConfigurationError("ChiasmECConnector cannot serve encoder-decoder models")
    if model_config.multimodal_config is None:
        raise ConfigurationError(f"ChiasmECConnector has nothing to do for {model_config.model}, which takes text only")
    if model_config.multimodal_config.mm_processor_cache_type == "shm":
        # The scheduler then sees where items lie, and not what they are.
        raise ConfigurationError("ChiasmECConnector needs --mm-processor-cache-type lru")


def _has_hash_seed() -> bool:
    return os.environ.get("PYTHONHASHSEED", "random") not in ("", "random")


def _reach_of(vllm_config: Any) -> Reach:
    scheduler, speculative = vllm_config.scheduler_config, vllm_config.speculative_config
    lookahead = int(speculative.num_speculative_tokens or 0) + 1 if speculative is not None else 0
    # Chunks of a hybrid model end where its state can be kept.
    ends_anywhere = scheduler.enable_chunked_prefill and not vllm_config.model_config.is_hybrid
    return Reach(
        window_tokens=int(scheduler.max_num_batched_tokens) + lookahead,
        max_ahead=max(1, int(scheduler.max_num_seqs) // 4) if ends_anywhere else 0,
        lookahead_tokens=lookahead,
    )


def _is_writer() -> bool:
    """One rank saves for all, since all have the same embeddings."""
    return bool(get_tensor_model_parallel_rank() == 0)


def _device() -> str:
    """The worker's own: a bare "cuda" would be the first GPU, whatever the rank."""
    kind = str(current_platform.device_type)
    return f"{kind}:{current_platform.current_device()}" if current_platform.is_cuda_alike() else kind


def _syncing() -> contextlib.AbstractContextManager[Any]:
    """vLLM can be told to complain of code that waits for the GPU; copying an embedding does."""
    try:
        from vllm.utils.gpu_sync_debug import gpu_sync_allowed
    except ImportError:
        return contextlib.nullcontext()
    return gpu_sync_allowed()  # type: ignore[no-any-return]
