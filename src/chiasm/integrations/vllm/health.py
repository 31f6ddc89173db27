"""What an instance of vLLM reports at /health, in the same format as chiasm's own instances."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import msgspec

from chiasm import __version__
from chiasm.cores import allowed_cpus
from chiasm.ec_transfer.bounded_folder import BoundedFolder
from chiasm.ec_transfer.size_check import check_received_size
from chiasm.engine.calibration import image_tokens
from chiasm.errors import ConfigurationError
from chiasm.integrations.vllm.items import Layout
from chiasm.integrations.vllm.messages import Exchange
from chiasm.integrations.vllm.settings import (
    Settings,
    dtype_name,
    fingerprint_of,
    folder_of,
    processor_settings,
    settings_of,
    store_url,
)
from chiasm.models.base import Processor
from chiasm.models.families.base import SIZE_KEY
from chiasm.models.token_bytes import longest_token
from chiasm.wire import IMAGE_PATHS, Costs, Health, Role

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Description:
    """What the middleware knows about the instance."""

    health: Health
    processor: Processor | None
    """Sizes images; None for a model that chiasm doesn't know, or whose placeholders vLLM doesn't size by a grid."""
    placeholder: str
    """The word that stands for an image in a rendered chat; empty for a model that chiasm doesn't know."""
    has_connector: bool
    """Whether embeddings come through ChiasmECConnector."""
    folder: BoundedFolder | None
    """Folder of the embeddings, if they come through one."""
    max_received_bytes: int | None
    """Size of the largest embedding that can be brought in; None if any can."""
    layout: Layout | None
    """Of embeddings; None if their size doesn't matter."""

    def check_rows(self, rows: int) -> None:
        """Raise InvalidRequestError for the embedding of an image with so many rows that it can never be brought in."""
        if self.layout is not None:
            check_received_size(self.layout.num_bytes(rows), self.max_received_bytes)

    def current_health(self) -> Health:
        """Return ``health`` with the store that there is now: the folder may have been removed and created again.

        Reads a file, so don't call it on an event loop. An instance that cannot reach the folder says so and names no store,
        since it can still answer text; an encoder cannot, and OSError is raised.
        """
        if self.folder is None:
            return self.health
        try:
            return msgspec.structs.replace(self.health, ec_store=self.folder.store_id())
        except OSError as error:
            if self.health.role == Role.ENCODER:
                raise
            return msgspec.structs.replace(self.health, message=f"{self.folder.path}: {error}")


def describe(state: Any, exchanges: Collection[Exchange], costs: Costs, *, resolves_stand_ins: bool) -> Description:
    """Describe the instance from the ``state`` of vLLM's application, and from what its engines say about their connectors.

    ``costs`` are what has been measured; the tokens of images are added. ``resolves_stand_ins`` says whether vLLM's parser of
    chats takes names of images (``named_images.py``).

    Reads the checkpoint's files, so don't call it on an event loop. Raises ConfigurationError if the connector's settings are
    wrong, or if the embeddings of an encoder are in several places.
    """
    config, arguments = state.vllm_config, state.args
    model_config, kv = config.model_config, config.kv_transfer_config
    settings = settings_of(config)
    known = _processor(model_config)
    sizing = known if _sizes_as_the_checkpoint(model_config) else None
    sizes_by_grid = sizing is not None and SIZE_KEY not in sizing.geometry_of_size(64, 64).metadata
    processor = sizing if sizes_by_grid else None
    names = arguments.served_model_name
    exchange, role = _common(exchanges), role_of(config)
    health = Health(
        role=role,
        model=(names[0] if isinstance(names, list) else names) if names else arguments.model,
        fingerprint=_fingerprint(model_config, settings),
        dtype=dtype_name(model_config),
        ec_store=exchange.store,
        ec_connector=settings.connector if settings is not None else "",
        ec_place=exchange.place,
        reads_stored=settings is not None and bool(store_url()) and role in (Role.PD, Role.PREFILL),
        # The connector of a decode instance reads, too.
        tells_lost=settings is not None and role is not Role.ENCODER and config.parallel_config.data_parallel_size == 1,
        version=__version__,
        engine=f"vllm {sys.modules['vllm'].__version__}",
        needs_key=any(vars(arguments).get("api_key") or [os.environ.get("VLLM_API_KEY")]),
        takes_image_size=processor is not None,
        image_paths=list(IMAGE_PATHS) if processor is not None and resolves_stand_ins else [],
        max_model_len=int(model_config.max_model_len),
        longest_token=longest_token(known.tokenizer) if known is not None else None,
        max_items=_max_items(model_config),
        max_num_seqs=int(config.scheduler_config.max_num_seqs),
        kv_connector=kv.kv_connector if kv is not None else None,
        device=_device(config),
        threads=_threads(config),
        cpus=sorted(allowed_cpus()),
        costs=_with_images(costs, sizing),
    )
    placeholder = known.placeholder if known is not None else ""
    limit = exchange.max_received_bytes
    return Description(
        health,
        processor,
        placeholder,
        has_connector=settings is not None,
        folder=_folder(settings),
        max_received_bytes=limit,
        layout=Layout.of(model_config) if limit is not None else None,
    )


def _common(exchanges: Collection[Exchange]) -> Exchange:
    """Return how all engines of the instance exchange embeddings. Raises ConfigurationError if they don't do it alike."""
    found = list(exchanges) or [Exchange()]
    if any(exchange != found[0] for exchange in found):
        raise ConfigurationError(
            "The engines of this instance keep embeddings in different places, but an instance has one: run it without "
            "--data-parallel-size, or use SharedStorageConnector."
        )
    return found[0]


def role_of(config: Any) -> Role:
    """Return the role of an instance with this ``VllmConfig``, from what it does with embeddings and KV."""
    ec, kv = config.ec_transfer_config, config.kv_transfer_config
    if ec is not None and ec.is_ec_producer and not ec.is_ec_consumer:
        return Role.ENCODER
    if kv is not None and kv.kv_role == "kv_producer":
        return Role.PREFILL
    if kv is not None and kv.kv_role == "kv_consumer":
        return Role.DECODE
    return Role.PD if ec is not None and ec.is_ec_consumer and not ec.is_ec_producer else Role.AGGREGATED


def asks_engines(config: Any) -> bool:
    """Return whether only the engines of an instance with this ``VllmConfig`` know how it exchanges embeddings.

    Raises ConfigurationError if the connector's settings are wrong.
    """
    settings = settings_of(config)
    return settings is not None and not settings.uses_folder


def _processor(model_config: Any) -> Processor | None:
    from chiasm.models import load_processor  # takes a second, which vLLM's start needn't wait for

    try:
        return load_processor(folder_of(model_config))
    except (ConfigurationError, OSError) as error:
        _logger.warning("chiasm cannot size the images of this model, so the proxy waits for encoders: %s", error)
        return None


def _sizes_as_the_checkpoint(model_config: Any) -> bool:
    """Return whether vLLM sizes images by the checkpoint's own settings, as chiasm's processor does."""
    if changed := processor_settings(model_config):
        _logger.warning(
            "chiasm does not size images by --mm-processor-kwargs (%s), so the proxy waits for encoders.",
            ", ".join(sorted(changed)),
        )
    return not changed


def _with_images(costs: Costs, known: Processor | None) -> Costs | None:
    """Return the costs with the tokens of images, whose encoding isn't measured; None if nothing is known."""
    images = image_tokens(known) if known is not None else []
    return msgspec.structs.replace(costs, images=images) if images or costs != Costs() else None


def _fingerprint(model_config: Any, settings: Settings | None) -> str:
    try:
        return fingerprint_of(model_config, settings.fingerprint if settings else None)
    except (ConfigurationError, OSError) as error:
        _logger.warning("This instance has no fingerprint; the proxy compares only the model's name: %s", error)
        return ""


def _folder(settings: Settings | None) -> BoundedFolder | None:
    if settings is None or settings.folder is None:
        return None
    return BoundedFolder(settings.folder.resolve(), settings.max_bytes, lambda size_bytes: None)


def _max_items(model_config: Any) -> int | None:
    multimodal = model_config.multimodal_config
    # With a limit of 0 vLLM takes no images, but any number of embeddings.
    return None if multimodal is None else int(multimodal.get_limit_per_prompt("image")) or None


def _device(config: Any) -> str:
    kind = str(config.device_config.device_type)
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "") if kind == "cuda" else ""
    return f"{kind}:{devices}" if devices else kind


def _threads(config: Any) -> int | None:
    """Return how many threads all workers compute with, or None if the environment doesn't say."""
    each = os.environ.get("OMP_NUM_THREADS", "")
    return int(each) * int(config.parallel_config.world_size) if each.isdecimal() else None
