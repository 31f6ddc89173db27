"""KV that moves between instances: what a prefill engine leaves behind, and what a decode engine continues from.

This is the layer between the engine, which knows requests and sequences, and its KV connector, which knows neither.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from chiasm.engine.request import GenerateRequest, Output
from chiasm.engine.request_state import RequestState
from chiasm.engine.scheduler import Scheduler
from chiasm.engine.sequence import Sequence
from chiasm.engine.step import Step
from chiasm.errors import ChiasmError, Code, InvalidRequestError, KVUnavailableError
from chiasm.kv_transfer import KVConnector, KVLayout
from chiasm.wire import KVTransferParams, TokenLogprob

if TYPE_CHECKING:
    from chiasm.engine.attention import KVCache
    from chiasm.kv_transfer import KVConnectorStats
    from chiasm.models.base import LanguageModel

_REMEMBERED_LEASES = 4096


class KVTransfers:
    """The adapter of the KV connector, both halves. All methods belong to the engine's thread."""

    def __init__(self, scheduler: Scheduler, connectors: tuple[KVConnector, KVConnector]) -> None:
        """``connectors`` are the scheduler role and the worker role."""
        self._scheduler = scheduler
        self._scheduler_role, self._worker_role = connectors
        self._loads: dict[tuple[str, int], Sequence] = {}
        """Loads that have begun and not ended, by request and choice; some outlive their request."""
        self._leases: dict[str, str] = {}
        """The ``lease`` of each request that was left and whose blocks are still held, if it has one."""
        self._given_back: OrderedDict[str, None] = OrderedDict()
        """Leases that were given back lately: what is left under them afterwards is not held."""

    @property
    def stats(self) -> KVConnectorStats:
        """The connector's counters."""
        return self._worker_role.stats

    def start(self, kv_cache: KVCache, language: LanguageModel, wake: Callable[[], None]) -> None:
        """Make the connector ready. It calls ``wake``, from any thread, when there is something for :meth:`collect`.

        Raises ConfigurationError.
        """
        layout = KVLayout(
            num_layers=language.num_layers,
            block_size=kv_cache.block_size,
            num_kv_heads=language.num_kv_heads,
            head_dim=language.head_dim,
            dtype=str(language.dtype).removeprefix("torch."),
            bytes_per_block=kv_cache.blocks.shape[1],
        )
        self._worker_role.register_kv_caches(kv_cache.blocks, layout, wake)
        self._scheduler_role.set_xfer_handshake_metadata(self._worker_role.get_handshake_metadata())

    def stop(self) -> None:
        """Shut the connector down."""
        self._scheduler_role.shutdown()
        self._worker_role.shutdown()

    def flush(self) -> None:
        """Have the worker role begin what was noted. Must be called before the handle leaves the engine."""
        metadata = self._scheduler_role.build_connector_meta()
        if metadata:
            self._worker_role.start_load_kv(metadata)

    # ---- prefill ------------------------------------------------------------------------------------------------------

    def hand_over(self, state: RequestState, sequence: Sequence, output: Output) -> Output:
        """End the sequence here, after its first token, and leave its blocks; return the output with the handle.

        If that token ends the answer, a sender that ``continues`` answers needs no handle and gets none. Other senders, such
        as vLLM's proxies, always expect one.
        """
        params = state.request.kv_transfer_params
        assert params is not None
        if params.continues and output.finish_reason is not None:
            return output
        handle = self._leave(state.request, sequence)
        handle.continues = params.continues
        if output.logprobs is not None:
            before = params.output_logprobs or [TokenLogprob(0.0, (), token) for token in params.output_token_ids]
            handle.output_logprobs = [*before, *output.logprobs]
        state.handed_over = True
        return replace(output, finish_reason=output.finish_reason or "length", kv_transfer_params=handle)

    def _leave(self, request: GenerateRequest, sequence: Sequence) -> KVTransferParams:
        """Have the connector hold the sequence's blocks, and return their handle."""
        params = request.kv_transfer_params
        assert params is not None
        num_blocks = self._scheduler.block_manager.blocks_for(sequence.num_computed)
        handle = self._scheduler_role.leave(request, sequence.block_ids[:num_blocks])
        handle.do_remote_prefill = True
        handle.num_tokens = sequence.num_computed
        handle.digest = sequence.digest(sequence.num_computed)
        handle.output_token_ids = sequence.output_token_ids
        handle.seed = sequence.seed
        handle.cached_tokens = params.cached_tokens if params.output_token_ids else sequence.num_cached
        self._scheduler.finish(sequence, leave_blocks=True)
        if params.lease in self._given_back:
            self._scheduler_role.give_back(request.request_id)
        elif params.lease:
            self._leases[request.request_id] = params.lease
        return handle

    def give_back(self, leases: Collection[str]) -> None:
        """End the leases with these names that no decode instance has claimed, and those that begin later.

        A request may be left while the news that nobody waits for it is on the way.
        """
        for request_id in [request_id for request_id, lease in self._leases.items() if lease in leases]:
            self._scheduler_role.give_back(request_id)
        self._given_back.update(dict.fromkeys(leases))
        while len(self._given_back) > _REMEMBERED_LEASES:
            self._given_back.popitem(last=False)

    # ---- decode -------------------------------------------------------------------------------------------------------

    def admit(self, state: RequestState) -> None:
        """Check that the request's handle is for this prompt, and have the blocks behind it held.

        Raises InvalidRequestError and KVUnavailableError.
        """
        request, blocks = state.request, self._scheduler.block_manager
        handle = request.kv_transfer_params
        assert handle is not None
        for sequence in state.sequences:
            # The last sampled token has no KV yet. If none was sampled, the prompt's last token runs again for its logits.
            if handle.num_tokens != sequence.num_prompt + max(0, sequence.num_output - 1):
                raise InvalidRequestError(
                    f"The handle in kv_transfer_params stands for {handle.num_tokens} tokens, but the request has "
                    f"{sequence.num_prompt} prompt tokens and {sequence.num_output} output tokens. "
                    "Send the same request to the prefill and the decode instance.",
                    param="kv_transfer_params",
                )
            num_blocks, num_given = blocks.blocks_for(handle.num_tokens), len(handle.remote_block_ids or ())
            if num_given != num_blocks:
                raise InvalidRequestError(
                    f"The handle in kv_transfer_params names {num_given} blocks, but its tokens fill {num_blocks} blocks of "
                    f"{blocks.block_size} tokens. Start prefill and decode instances with the same --block-size.",
                    param="kv_transfer_params",
                )
            if sequence.digest(handle.num_tokens) != handle.digest:
                raise InvalidRequestError(
                    "The handle in kv_transfer_params belongs to another prompt. "
                    "Send the same request to the prefill and the decode instance.",
                    param="kv_transfer_params",
                )
            sequence.num_remote = min(handle.num_tokens, sequence.num_tokens - 1)
        self._scheduler_role.claim(request)

    def load(self, step: Step, states: Mapping[str, RequestState]) -> None:
        """Have the blocks filled that the step gave to sequences, except for those that the prefix cache shares."""
        now = time.monotonic()
        blocks = self._scheduler.block_manager
        for sequence in step.load:
            state = states[sequence.request_id]
            state.note_load_started(now)
            handle = state.request.kv_transfer_params
            assert handle is not None
            assert handle.remote_block_ids is not None
            first, end = sequence.num_computed // blocks.block_size, blocks.blocks_for(sequence.num_remote)
            pairs = list(zip(sequence.block_ids[first:end], handle.remote_block_ids[first:end], strict=True))
            self._loads[sequence.request_id, sequence.index] = sequence
            self._scheduler_role.update_state_after_alloc(state.request, sequence.index, pairs)

    # ---- both ---------------------------------------------------------------------------------------------------------

    def collect(self, states: Mapping[str, RequestState]) -> list[tuple[RequestState, ChiasmError]]:
        """Tell the scheduler which transfers have ended, and return the requests whose KV cannot be fetched."""
        finished = self._worker_role.get_finished()
        now = time.monotonic()
        for request_id in finished.sent:
            self._scheduler.blocks_read(request_id)
            self._leases.pop(request_id, None)
        for request_id, index in finished.loaded:
            self._scheduler.loaded(self._loads.pop((request_id, index)))
            if index == 0 and request_id in states:
                states[request_id].note_loaded(now)
        for load in finished.broken_off:
            self._scheduler.not_loaded(self._loads.pop(load))
        return [
            (states[request_id], KVUnavailableError(reason, code=Code.KV_UNAVAILABLE))
            for request_id, reason in finished.failed.items()
            if request_id in states
        ]

    def drop(self, request: GenerateRequest) -> None:
        """Note that the request ended here, for whatever reason."""
        self._scheduler_role.drop(request)
