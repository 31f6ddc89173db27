"""KV that moves between instances: what a prefill engine leaves behind, and what a decode engine continues from.

This is the layer between the engine, which knows requests and sequences, and its KV connector, which knows neither. What is
noted for a request is begun at once and by itself, so an error that the connector raises costs that request alone.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from chiasm.connectors.faults import log_failure, logged
from chiasm.engine.request import GenerateRequest, Output
from chiasm.engine.request_state import RequestState
from chiasm.engine.scheduler import Scheduler
from chiasm.engine.sequence import Sequence
from chiasm.engine.set_aside import SetAside
from chiasm.engine.step import Step
from chiasm.errors import ChiasmError, Code, InvalidRequestError, KVUnavailableError
from chiasm.kv_transfer import KVConnector, KVConnectorMetadata, KVLayout
from chiasm.kv_transfer.faults import SETTLE_SECONDS, lost_kv
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
        self._settling: dict[tuple[str, int], float] = {}
        """Those of them whose end the connector may never tell, and when their blocks are free in any case."""
        self._left: dict[str, str] = {}
        """The requests that were left and whose blocks are still held, each with its ``lease`` if it has one."""
        self._given_back: OrderedDict[str, None] = OrderedDict()
        """Leases that were given back lately: what is left under them afterwards is not held."""
        self._failed: set[str] = set()
        """The requests here on which the connector has failed, which is logged once for each."""
        self._num_failed = 0
        self._set_aside: SetAside | None = None
        self._cannot_tell = False
        """Whether the last ``get_finished`` raised an error."""

    @property
    def stats(self) -> KVConnectorStats:
        """The connector's counters; its errors count as failures."""
        stats = self._worker_role.stats
        return replace(stats, failures=stats.failures + self._num_failed)

    def start(
        self, kv_cache: KVCache, language: LanguageModel, wake: Callable[[], None], *, max_aside_bytes: int
    ) -> None:
        """Make the connector ready. It calls ``wake``, from any thread, when there is something for :meth:`collect`.

        KV that is set aside takes at most ``max_aside_bytes``. Raises ConfigurationError.
        """
        layout = KVLayout(
            num_layers=language.num_layers,
            block_size=kv_cache.block_size,
            num_kv_heads=language.num_kv_heads,
            head_dim=language.head_dim,
            dtype=str(language.dtype).removeprefix("torch."),
            bytes_per_block=kv_cache.blocks.shape[1],
        )
        self._set_aside = SetAside(kv_cache.blocks, max_aside_bytes)
        self._worker_role.register_kv_caches(kv_cache.blocks, layout, wake)
        self._scheduler_role.set_xfer_handshake_metadata(self._worker_role.get_handshake_metadata())

    def stop(self) -> None:
        """Shut the connector down."""
        for role in (self._scheduler_role, self._worker_role):
            with logged(role, "shut down"):
                role.shutdown()

    def _take_noted(self) -> KVConnectorMetadata:
        """Return what the scheduler role has noted, but no load on which it has failed: others may have the blocks by now."""
        metadata = self._scheduler_role.build_connector_meta()
        metadata.loads = [load for load in metadata.loads if load.key in self._loads]
        return metadata

    def _begin(self, metadata: KVConnectorMetadata) -> None:
        if metadata:
            self._worker_role.start_load_kv(metadata)

    def _failure(self, request_id: str, doing: str, error: Exception) -> KVUnavailableError:
        """Note that the connector has failed on a request; return why the request fails."""
        log_failure(self._worker_role, f"{doing} request {request_id}, so its KV counts as lost")
        self._failed.add(request_id)
        self._num_failed += 1
        return lost_kv(error)

    # ---- prefill ------------------------------------------------------------------------------------------------------

    def hand_over(self, state: RequestState, sequence: Sequence, output: Output) -> Output:
        """End the sequence here, after its first token, and leave its blocks; return the output with the handle.

        If that token ends the answer, a sender that ``continues`` answers needs no handle and gets none. Other senders, such
        as vLLM's proxies, always expect one. Raises KVUnavailableError, and then nothing has ended here.
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
        try:
            handle = self._scheduler_role.leave(request, sequence.block_ids[:num_blocks])
            handle.do_remote_prefill = True
            self._begin(self._take_noted())  # before a decode instance can come for the blocks
        except Exception as error:
            raise self._failure(request.request_id, "hold the KV of", error) from error
        handle.num_tokens = sequence.num_computed
        handle.digest = sequence.digest(sequence.num_computed)
        handle.output_token_ids = sequence.output_token_ids
        handle.seed = sequence.seed
        handle.cached_tokens = params.cached_tokens if params.output_token_ids else sequence.num_cached
        self._scheduler.finish(sequence, leave_blocks=True)
        self._left[request.request_id] = params.lease
        if params.lease in self._given_back:
            self._give_back(request.request_id)
        return handle

    def give_back(self, leases: Collection[str]) -> None:
        """End the leases with these names that no decode instance has claimed, and those that begin later.

        A request may be left while the news that nobody waits for it is on the way.
        """
        named = dict.fromkeys(lease for lease in leases if lease)
        for request_id in [request_id for request_id, lease in self._left.items() if lease in named]:
            self._give_back(request_id)
        self._given_back.update(named)
        while len(self._given_back) > _REMEMBERED_LEASES:
            self._given_back.popitem(last=False)

    def _give_back(self, request_id: str) -> None:
        with logged(self._worker_role, f"give back the KV of request {request_id}, which is held until its lease ends"):
            self._scheduler_role.give_back(request_id)
            self._begin(self._take_noted())

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
        try:
            self._scheduler_role.claim(request)
            self._begin(self._take_noted())
        except ChiasmError:
            raise
        except Exception as error:
            raise self._failure(request.request_id, "claim the KV of", error) from error

    def move_aside(self, step: Step, states: Mapping[str, RequestState]) -> list[tuple[RequestState, ChiasmError]]:
        """Keep the KV that the step sets aside, and put back what it has blocks for again.

        Return the requests for which there is no memory.
        """
        assert self._set_aside is not None
        lost = [one for one, block_ids in step.set_aside if not self._set_aside.keep(one, block_ids)]
        for sequence in step.put_back:
            first = sequence.num_computed // self._scheduler.block_manager.block_size
            self._set_aside.put_back(sequence, sequence.block_ids, first)
            self._scheduler.loaded(sequence)
        return [
            (
                states[sequence.request_id],
                KVUnavailableError(
                    "Preempted: this instance ran out of KV blocks and of memory to set KV aside, and a decode instance "
                    "cannot recompute image tokens. Have the prompt prefilled again, or raise --kv-cache-bytes or "
                    "--encoder-cache-bytes of the instance.",
                    code=Code.PREEMPTED,
                ),
            )
            for sequence in lost
        ]

    def load(self, step: Step, states: Mapping[str, RequestState]) -> list[tuple[RequestState, ChiasmError]]:
        """Have the blocks filled that the step gave to sequences, except for those that the prefix cache shares.

        Return the requests on which the connector has failed.
        """
        now = time.monotonic()
        failed: dict[str, ChiasmError] = {}
        for sequence in step.load:
            state = states[sequence.request_id]
            state.note_load_started(now)
            if sequence.request_id in failed:  # on another of its choices
                self._scheduler.not_loaded(sequence)
                continue
            try:
                self._load(state.request, sequence)
            except Exception as error:
                failed[sequence.request_id] = self._failure(sequence.request_id, "load the KV of", error)
        return [(states[request_id], error) for request_id, error in failed.items()]

    def _load(self, request: GenerateRequest, sequence: Sequence) -> None:
        """Begin the load of one sequence. If that fails, free its blocks: at once, unless the worker role was told of it."""
        handle, blocks = request.kv_transfer_params, self._scheduler.block_manager
        assert handle is not None
        assert handle.remote_block_ids is not None
        first, end = sequence.num_computed // blocks.block_size, blocks.blocks_for(sequence.num_remote)
        pairs = list(zip(sequence.block_ids[first:end], handle.remote_block_ids[first:end], strict=True))
        key = sequence.request_id, sequence.index
        self._loads[key] = sequence
        try:
            self._scheduler_role.update_state_after_alloc(request, sequence.index, pairs)
            metadata = self._take_noted()
        except Exception:
            self._scheduler.not_loaded(self._loads.pop(key))
            raise
        try:
            self._begin(metadata)
        except Exception:
            self._settle([key])
            raise

    # ---- both ---------------------------------------------------------------------------------------------------------

    def collect(self, states: Mapping[str, RequestState]) -> list[tuple[RequestState, ChiasmError]]:
        """Tell the scheduler which transfers have ended, and return the requests whose KV cannot be fetched."""
        now = time.monotonic()
        for key in [key for key, until in self._settling.items() if until <= now]:
            self._end_load(key, self._scheduler.not_loaded)
        try:
            finished = self._worker_role.get_finished()
        except Exception as error:
            return self._lose_sight(error, states)
        self._cannot_tell = False
        for request_id in finished.sent:
            self._left.pop(request_id, None)
            self._scheduler.blocks_read(request_id)
        for request_id, index in finished.loaded:
            self._end_load((request_id, index), self._scheduler.loaded)
            if index == 0 and request_id in states:
                states[request_id].note_loaded(now)
        for key in finished.broken_off:
            self._end_load(key, self._scheduler.not_loaded)
        return [
            (states[request_id], KVUnavailableError(reason, code=Code.KV_UNAVAILABLE))
            for request_id, reason in finished.failed.items()
            if request_id in states
        ]

    def drop(self, request: GenerateRequest) -> None:
        """Note that the request ended here, for whatever reason."""
        if self._set_aside is not None:
            self._set_aside.drop(request.request_id)
        doing = f"drop request {request.request_id}"
        is_known = request.request_id in self._failed
        self._failed.discard(request.request_id)
        with suppress(Exception) if is_known else logged(self._worker_role, doing):
            self._scheduler_role.drop(request)
            self._begin(self._take_noted())

    # ---- what ends -----------------------------------------------------------------------------------------------------

    @property
    def is_unsettled(self) -> bool:
        """Whether :meth:`collect` should be called again soon, although the connector may not call ``wake``."""
        return bool(self._settling) or self._cannot_tell

    def _end_load(self, key: tuple[str, int], tell: Callable[[Sequence], None]) -> None:
        """Tell the scheduler how a load has ended, unless it was told before."""
        self._settling.pop(key, None)
        if (sequence := self._loads.pop(key, None)) is not None:
            tell(sequence)

    def _settle(self, keys: Iterable[tuple[str, int]]) -> None:
        """Free the blocks of these loads when the connector tells that they have ended, or in a while."""
        until = time.monotonic() + SETTLE_SECONDS
        for key in keys:
            self._settling.setdefault(key, until)

    def _lose_sight(
        self, error: Exception, states: Mapping[str, RequestState]
    ) -> list[tuple[RequestState, ChiasmError]]:
        """Give up the requests that wait for KV, since the connector may have lost what it had to tell of them."""
        waiting = {
            request_id: state
            for request_id, state in states.items()
            if any(one.num_remote and not one.is_set_aside and not one.finished for one in state.sequences)
        }
        if waiting or not self._cannot_tell:
            lost = f", so the KV of these requests counts as lost: {', '.join(waiting)}" if waiting else ""
            log_failure(self._worker_role, f"tell which transfers have ended{lost}")
        self._cannot_tell = True
        self._failed.update(waiting)
        self._num_failed += len(waiting)
        self._settle(self._loads)
        return [(state, lost_kv(error)) for state in waiting.values()]
