"""Requests that go on in another instance: what a prefill engine leaves behind, and what a decode engine takes over.

Between the engine, which knows requests and sequences, and the two halves of its KV connector, which know neither.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from chiasm.engine.request import GenerateRequest, TokenLogprobs
from chiasm.errors import InvalidRequestError
from chiasm.kv_transfer import (
    FinishedTransfers,
    KVConnectorFactory,
    KVConnectorRole,
    KVLayout,
    KVTransferConfig,
    KVTransferRole,
)
from chiasm.wire import KVTransferParams, TokenLogprob

if TYPE_CHECKING:
    import torch

    from chiasm.engine.scheduler import Scheduler
    from chiasm.engine.sequence import Sequence
    from chiasm.kv_transfer import KVConnectorStats


class Handover:
    """The KV connector of one engine. All methods belong to the engine's thread."""

    def __init__(self, config: KVTransferConfig, role: KVTransferRole, *, fingerprint: str, device: str) -> None:
        config = replace(config, role=role, engine_id=uuid.uuid4().hex, fingerprint=fingerprint, device=device)
        self._scheduler_role = KVConnectorFactory.create_connector(config, KVConnectorRole.SCHEDULER)
        self._worker_role = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER)
        self._loads: dict[tuple[str, int], Sequence] = {}
        """Loads that have begun and not ended, also those of requests that have."""

    def allocate(self, num_bytes: int) -> torch.Tensor | None:
        """Memory for the KV cache, where the connector wants it somewhere special."""
        return self._worker_role.allocate_kv_cache(num_bytes)

    def start(self, blocks: torch.Tensor, layout: KVLayout, wake: Callable[[], None]) -> None:
        """``wake`` is called, from any thread, when there is something for ``collect``. Raises ConfigurationError."""
        self._worker_role.register_kv_caches(blocks, layout, wake)
        self._scheduler_role.set_xfer_handshake_metadata(self._worker_role.get_handshake_metadata())

    def stop(self) -> None:
        self._scheduler_role.shutdown()
        self._worker_role.shutdown()

    @property
    def stats(self) -> KVConnectorStats:
        return self._worker_role.stats

    def flush(self) -> None:
        """Have the worker role begin what was noted. Before anybody outside hears of it."""
        metadata = self._scheduler_role.build_connector_meta()
        if metadata:
            self._worker_role.start_load_kv(metadata)

    # ---- prefill ------------------------------------------------------------------------------------------------------

    def leave(self, request: GenerateRequest, sequence: Sequence, scheduler: Scheduler) -> KVTransferParams:
        """The sequence has its first token and goes on elsewhere; its blocks stay. Returns the handle."""
        params = request.kv_transfer_params
        assert params is not None
        num_blocks = scheduler.block_manager.blocks_for(sequence.num_computed)
        handle = self._scheduler_role.leave(request, sequence.block_ids[:num_blocks])
        handle.do_remote_prefill = True
        handle.num_tokens = sequence.num_computed
        handle.digest = sequence.digest(sequence.num_computed)
        handle.output_token_ids = sequence.output_token_ids
        handle.seed = sequence.seed
        handle.cached_tokens = params.cached_tokens if params.output_token_ids else sequence.num_cached
        scheduler.finish(sequence, leave_blocks=True)
        return handle

    # ---- decode -------------------------------------------------------------------------------------------------------

    def take(self, request: GenerateRequest, sequences: Iterable[Sequence], scheduler: Scheduler) -> None:
        """A request came with a handle: see that it is this request's, and have its blocks held.

        Raises InvalidRequestError, KVUnavailableError.
        """
        handle = request.kv_transfer_params
        assert handle is not None
        for sequence in sequences:
            # The token that was sampled last has no KV yet. Without any, the prompt's last runs again, to make the logits.
            if handle.num_tokens != sequence.num_prompt + max(0, sequence.num_output - 1):
                raise InvalidRequestError(
                    f"the handle in kv_transfer_params is of {handle.num_tokens} tokens, and the request has "
                    f"{sequence.num_prompt} in its prompt and {sequence.num_output} after it; send P and D the same request",
                    param="kv_transfer_params",
                )
            num_blocks = scheduler.block_manager.blocks_for(handle.num_tokens)
            if len(handle.remote_block_ids or ()) != num_blocks:
                raise InvalidRequestError(
                    f"the handle in kv_transfer_params names {len(handle.remote_block_ids or ())} blocks, and its tokens "
                    f"fill {num_blocks} of {scheduler.block_manager.block_size}; P and D must have the same --block-size",
                    param="kv_transfer_params",
                )
            if sequence.digest(handle.num_tokens) != handle.digest:
                raise InvalidRequestError(
                    "the handle in kv_transfer_params is of another prompt; send P and D the same request",
                    param="kv_transfer_params",
                )
            sequence.num_remote = min(handle.num_tokens, sequence.num_tokens - 1)
        self._scheduler_role.claim(request)

    def load(self, request: GenerateRequest, sequence: Sequence, scheduler: Scheduler) -> None:
        """The sequence has its blocks: have those filled that the prefix cache did not."""
        handle = request.kv_transfer_params
        assert handle is not None
        assert handle.remote_block_ids is not None
        block_size = scheduler.block_manager.block_size
        first, end = sequence.num_computed // block_size, scheduler.block_manager.blocks_for(sequence.num_remote)
        pairs = list(zip(sequence.block_ids[first:end], handle.remote_block_ids[first:end], strict=True))
        self._loads[sequence.request_id, sequence.index] = sequence
        self._scheduler_role.update_state_after_alloc(request, sequence.index, pairs)

    def drop(self, request: GenerateRequest) -> None:
        """The request ended here, for whatever reason."""
        self._scheduler_role.drop(request)

    # ---- both ---------------------------------------------------------------------------------------------------------

    def collect(self, scheduler: Scheduler) -> FinishedTransfers:
        """Tell the scheduler which transfers have ended; returns them, for the requests' sake."""
        finished = self._worker_role.get_finished()
        for request_id in finished.sent:
            scheduler.blocks_read(request_id)
        for load in finished.loaded:
            scheduler.loaded(self._loads.pop(load))
        for load in finished.broken_off:
            scheduler.not_loaded(self._loads.pop(load))
        return finished


def wire_logprobs(logprobs: TokenLogprobs) -> TokenLogprob:
    """As a handle carries them."""
    return TokenLogprob(logprobs.logprob, list(logprobs.top))


def given_logprobs(params: KVTransferParams) -> tuple[TokenLogprobs, ...] | None:
    """Of the tokens that came with a handle and that the client doesn't have; None if it carries none."""
    if not params.output_logprobs:
        return None
    pairs = zip(params.output_token_ids, params.output_logprobs, strict=True)
    return tuple(TokenLogprobs(token_id, given.logprob, tuple(given.top)) for token_id, given in pairs)[
        params.num_sent :
    ]
