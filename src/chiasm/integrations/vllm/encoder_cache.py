"""vLLM's account of the workers' encoder cache, with a say of the connector in it.

vLLM asks it right before it decides to load or to encode an item whether there is room; a no makes prefill stop before the
item. So prefill can go as far as there are embeddings, and nothing is decided on that has gone in the meantime.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

from chiasm.errors import ConfigurationError
from chiasm.integrations.vllm.scheduler_half import SchedulerHalf

_halves: WeakValueDictionary[str, SchedulerHalf] = WeakValueDictionary()
"""By the id that vLLM gives to an engine; the scheduler's connector is made before the account."""


def install(vllm_config: Any, half: SchedulerHalf) -> None:
    """Have the scheduler that is being made use ChiasmEncoderCacheManager. Raises ConfigurationError."""
    config, name = vllm_config.ec_manager_config, f"{__name__}.{ChiasmEncoderCacheManager.__name__}"
    if config.encoder_cache_manager_cls not in (None, name):
        raise ConfigurationError("ChiasmECConnector brings an encoder cache manager: leave out --ec-manager-config")
    config.encoder_cache_manager_cls = name
    _halves[vllm_config.ec_transfer_config.engine_id] = half


class ChiasmEncoderCacheManager(EncoderCacheManager):  # type: ignore[misc]
    """Has room for an item only if the connector lets prefill reach it."""

    def __init__(self, cache_size: int, half: SchedulerHalf) -> None:
        super().__init__(cache_size)
        self._half = half
        half.attach(self)

    @classmethod
    def create_manager(cls, *, cache_size: int, vllm_config: Any) -> ChiasmEncoderCacheManager:
        return cls(cache_size, _halves[vllm_config.ec_transfer_config.engine_id])

    def can_allocate(
        self, request: Any, input_id: int, encoder_compute_budget: int, num_embeds_to_schedule: int
    ) -> bool:
        half, request_id = self._half, request.request_id
        if half.is_out_of_reach(request_id, input_id):
            return False
        has_room = super().can_allocate(request, input_id, encoder_compute_budget, num_embeds_to_schedule)
        return has_room and half.can_get(request_id, input_id)

    def free_encoder_input(self, request: Any, input_id: int) -> None:
        super().free_encoder_input(request, input_id)
        self._half.released(request.mm_features[input_id].identifier)

    def holds(self, identifier: str) -> bool:
        return identifier in self.cached

    def forget(self, identifier: str) -> bool:
        rows = self.freeable.pop(identifier, None)
        if rows is None:
            return identifier not in self.cached
        del self.cached[identifier]
        del self.num_embeds_by_hash[identifier]
        self.freed.append(identifier)
        self.num_free_slots += rows
        return True
