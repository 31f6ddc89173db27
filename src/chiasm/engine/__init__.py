"""The built-in engine: what schedules requests, runs the model and samples tokens. It knows no HTTP.

``base`` is what servers see of an engine, and ``request`` what goes into one and comes out; ``config`` is what one is made
from.

A request to the language model passes ``engine`` (LanguageEngine.generate), ``inbox``, ``step_loop``, ``request_state``,
``embeddings`` with ``asking`` and ``local_encoder``, and ``kv_transfers`` with ``set_aside`` (what it has to wait for),
``scheduler`` with ``waiting``, ``late_items``, ``fluency``, ``shares``, ``preemption``, ``sequence``, ``block_manager`` and
``encoder_cache_manager``, ``step``, ``step_faults``, ``model_runner`` with ``attention``, ``grammar`` (which a
``grammar_process`` has tried), ``logit_changes`` and ``sampler`` with ``candidates``, and ``outputs``. An encoder's request
passes ``encoder`` alone. The connectors themselves are in :mod:`chiasm.ec_transfer` and :mod:`chiasm.kv_transfer`.

``device`` has the parts of the machine that an engine uses, and ``core_sharing`` the cores that it shares with others.
``calibration`` measures at start what work costs, and ``pace`` follows it from then on.
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
