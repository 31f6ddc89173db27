"""What an instance of vLLM is, in the words of chiasm's own instances."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from typing import Any

from chiasm import __version__
from chiasm.cores import allowed_cpus
from chiasm.ec_transfer.bounded_folder import BoundedFolder
from chiasm.errors import ConfigurationError
from chiasm.integrations.vllm.identity import dtype_name, fingerprint_of, folder_of
from chiasm.integrations.vllm.settings import Settings
from chiasm.models.base import Processor
from chiasm.models.families.base import SIZE_KEY

_logger = logging.getLogger(__name__)
_IMAGE = "image"
_ENCODER = "encoder"


@dataclass(frozen=True)
class Description:
    """``health`` is what /health says; ``processor`` sizes images, if chiasm knows the model as vLLM wants it known.

    ``has_connector``: whether embeddings come by chiasm's connector; ``folder`` is then where they lie.
    """

    health: dict[str, Any]
    processor: Processor | None
    has_connector: bool
    folder: BoundedFolder | None

    def current_health(self) -> dict[str, Any]:
        """``health`` with the store as it is now: the folder may have been removed and made anew since.

        Reads a file: not to be called on an event loop. Raises OSError where an encoder cannot reach the folder; the others
        still answer text, and say why they name no store.
        """
        if self.folder is None:
            return self.health
        try:
            return self.health | {"ec_store": self.folder.store_id()}
        except OSError as error:
            if self.health["role"] == _ENCODER:
                raise
            return self.health | {"message": f"{self.folder.path}: {error}"}


def describe(state: Any) -> Description:
    """Of the ``state`` of vLLM's application. Reads the checkpoint's files: not to be called on an event loop.

    Raises ChiasmError, OSError where the checkpoint or the store cannot be read.
    """
    config, arguments = state.vllm_config, state.args
    settings = _settings(config)
    processor = _processor(config.model_config)
    names = arguments.served_model_name
    health: dict[str, Any] = {
        "status": "ok",
        "role": role_of(config),
        "model": (names[0] if isinstance(names, list) else names) if names else arguments.model,
        "fingerprint": _fingerprint(config.model_config, settings),
        "dtype": dtype_name(config.model_config),
        "ec_store": "",
        "version": __version__,
        "engine": f"vllm {sys.modules['vllm'].__version__}",
        "max_model_len": int(config.model_config.max_model_len),
        "max_items": _max_items(config.model_config),
        "max_num_seqs": int(config.scheduler_config.max_num_seqs),
        "takes_image_size": processor is not None,
        "device": _device(config),
        "threads": _threads(config),
        "cpus": sorted(allowed_cpus()),
    }
    if config.kv_transfer_config is not None:
        health["kv_connector"] = config.kv_transfer_config.kv_connector
    return Description(health, processor, settings is not None, _folder(settings))


def role_of(config: Any) -> str:
    """Of a ``VllmConfig``, from what it does with embeddings and with KV."""
    ec, kv = config.ec_transfer_config, config.kv_transfer_config
    if ec is not None and ec.is_ec_producer and not ec.is_ec_consumer:
        return _ENCODER
    if kv is not None and kv.kv_role == "kv_producer":
        return "prefill"
    if kv is not None and kv.kv_role == "kv_consumer":
        return "decode"
    return "pd" if ec is not None and ec.is_ec_consumer and not ec.is_ec_producer else "aggregated"


def _device(config: Any) -> str:
    """``cpu``, or the kind of device and, where the environment says it, which ones."""
    kind = str(config.device_config.device_type)
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "") if kind == "cuda" else ""
    return f"{kind}:{devices}" if devices else kind


def _threads(config: Any) -> int | None:
    """That the workers compute with together; None if nobody has said how many they are to use."""
    each = os.environ.get("OMP_NUM_THREADS", "")
    return int(each) * int(config.parallel_config.world_size) if each.isdecimal() else None


def _settings(config: Any) -> Settings | None:
    """Of chiasm's connector, if the instance has it."""
    ec = config.ec_transfer_config
    if ec is None or not str(ec.ec_connector_module_path or "").startswith("chiasm."):
        return None
    return Settings.read(ec.ec_connector_extra_config)


def _fingerprint(model_config: Any, settings: Settings | None) -> str:
    try:
        return fingerprint_of(model_config, settings.fingerprint if settings else None)
    except (ConfigurationError, OSError) as error:
        _logger.warning("this instance has no fingerprint, and is known by the model's name alone: %s", error)
        return ""


def _folder(settings: Settings | None) -> BoundedFolder | None:
    if settings is None:
        return None
    return BoundedFolder(settings.shared_storage_path.resolve(), settings.max_bytes, lambda size_bytes: None)


def _processor(model_config: Any) -> Processor | None:
    """None for a model that chiasm doesn't know, and for one whose placeholders vLLM does not size by a grid."""
    from chiasm.models import load_processor

    try:
        processor = load_processor(folder_of(model_config))
    except (ConfigurationError, OSError) as error:
        _logger.warning("chiasm does not know the sizes of this model's images: %s", error)
        return None
    return None if SIZE_KEY in processor.geometry_of_size(64, 64).metadata else processor


def _max_items(model_config: Any) -> int | None:
    multimodal = model_config.multimodal_config
    # With 0, no image is let in, and any number of embeddings.
    return None if multimodal is None else int(multimodal.get_limit_per_prompt(_IMAGE)) or None
