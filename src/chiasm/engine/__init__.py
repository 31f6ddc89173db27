"""The built-in engine: what schedules requests, runs the model and samples tokens. It knows no HTTP.

A request to the language model passes ``engine`` (LanguageEngine.generate), ``inbox``, ``step_loop``, ``request_state``,
``embeddings`` with ``local_encoder`` and ``kv_transfers`` with ``set_aside`` (what it has to wait for), ``scheduler`` with
``late_items``, ``due``, ``shares``, ``preemption``, ``sequence``, ``block_manager`` and ``encoder_cache_manager``, ``step``,
``step_faults``, ``model_runner`` with ``attention``, ``grammar``, ``logit_changes`` and ``sampler`` with ``candidates``, and
``outputs``. An encoder's request passes ``encoder`` alone. The connectors themselves are in :mod:`chiasm.ec_transfer` and
:mod:`chiasm.kv_transfer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.engine.config import EngineConfig
from chiasm.wire import Role

if TYPE_CHECKING:
    from chiasm.engine.base import Engine

__all__ = ["EngineConfig", "create_engine"]


def create_engine(config: EngineConfig) -> Engine:
    """Return the engine for the config's role, not started. Raises ConfigurationError for a model that can't be served."""
    if config.role is Role.ENCODER:
        from chiasm.engine.encoder import EncoderEngine

        return EncoderEngine(config)
    from chiasm.engine.engine import LanguageEngine

    return LanguageEngine(config)
