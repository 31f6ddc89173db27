"""The built-in engine: scheduler, block manager, encoder cache manager, model runner, sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.engine.config import EngineConfig
from chiasm.wire import Role

if TYPE_CHECKING:
    from chiasm.engine.base import Engine

__all__ = ["EngineConfig", "create_engine"]


def create_engine(config: EngineConfig) -> Engine:
    """The engine of the config's role, not started. Raises ConfigurationError for a model that can't be served."""
    if config.role is Role.ENCODER:
        from chiasm.engine.encoder import EncoderEngine

        return EncoderEngine(config)
    from chiasm.engine.engine import LanguageEngine

    return LanguageEngine(config)
