"""vLLM's own scheduler and encoder cache manager, and what calls the connector in each of its two model runners, pass the cases
that the stand-in of tests/integrations passes.

No model and no process is started: what the model would compute is left out. So the second model runner's part runs without a
GPU, too.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.distributed.ec_transfer import get_ec_transfer
from vllm.distributed.ec_transfer.ec_transfer_state import ensure_ec_transfer_initialized, ensure_ec_transfer_shutdown
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.ec_connector_model_runner_mixin import ECConnectorModelRunnerMixin
from vllm.v1.worker.gpu.ec_connector import ActiveECConnector

from chiasm.ec_transfer import ECTransferRole
from chiasm.integrations.vllm import ec_connector
from chiasm.integrations.vllm.outputs import WAITS
from tests.integrations.vllm.conftest import Encoder
from tests.integrations.vllm.contract import (
    BLOCK_TOKENS,
    MAX_AHEAD,
    STEP_TOKENS,
    EngineContract,
    Instance,
    Outcome,
    Start,
    store_in,
)
from tests.integrations.vllm.engine import ROWS, far, identifier_of, wait_for_arrivals

from .processes import CHECKPOINT

_BLOCKS = 200
_TOKEN = 7


class RealVLLM(Instance):
    """vLLM's classes, called as its engine core and its model runner call them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.width = config.model_config.get_inputs_embeds_size()
        self.outputs: list[Any] = []
        """vLLM's ``EngineCoreOutput`` of the last step."""
        self._embeddings = {identifier_of(name): self.embedding_of(name) for name in "ab"}
        spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32)
        self._scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(_BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_TOKENS,
        )
        self.half = self._scheduler.get_ec_connector().scheduler_half
        ensure_ec_transfer_initialized(config)
        self.record(self.half)
        self.record(get_ec_transfer().worker_half)
        self._encoder_cache: dict[str, torch.Tensor] = {}
        self._second_runner = ActiveECConnector(config, self._encoder_cache) if config.use_v2_model_runner else None
        self._folder = Path(config.ec_transfer_config.ec_connector_extra_config["shared_storage_path"])
        init_none_hash(sha256)
        self._block_hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)

    def begin(
        self,
        *places: tuple[str, int],
        of: str = "request",
        tokens: int = 0,
        pixels: bool = False,
        cached_tokens: int = 0,
        first_token: int = _TOKEN,
        max_tokens: int = 1,
    ) -> None:
        features = [_feature(name, offset, pixels) for name, offset in places]
        tokens = tokens or max(offset for _, offset in places) + ROWS + 2
        prompt = [first_token, *[_TOKEN] * (tokens - 1)]
        self._scheduler.add_request(
            Request(
                of,
                prompt,
                SamplingParams(max_tokens=max_tokens),
                None,
                mm_features=features,
                block_hasher=self._block_hasher,
            )
        )

    def pass_time(self, seconds: float) -> None:
        clock = self.half.clock
        self.half.clock = lambda: clock() + seconds

    def step(self, meanwhile: Callable[[], object] = lambda: None, *, is_far: bool = False) -> Outcome:
        self.calls.clear()
        scheduler = self._scheduler
        for name, one in scheduler.requests.items():
            wanted = [feature.identifier for feature in one.mm_features if "pixel_values" not in feature.data]
            missing = [each for each in wanted if each not in scheduler.encoder_cache_manager.cached]
            wait_for_arrivals(scheduler.get_ec_connector()._store, self._folder, name, missing)
        planned = scheduler.schedule()
        features = {name: one.mm_features for name, one in scheduler.requests.items()}
        metadata = planned.ec_connector_metadata
        planned.ec_connector_metadata = pickle.loads(pickle.dumps(far(metadata) if is_far else metadata))
        meanwhile()
        encoded = [
            features[name][index].identifier
            for name, indices in planned.scheduled_encoder_inputs.items()
            for index in indices
        ]
        done = scheduler.update_from_output(planned, self._run(planned, encoded))
        self.outputs = [each for outputs in done.values() for each in outputs.outputs]
        failed = {each.request_id for each in self.outputs if str(each.finish_reason) == "error"}
        return Outcome(dict(planned.num_scheduled_tokens), encoded, failed, list(self.calls))

    def _run(self, planned: Any, encoded: list[str]) -> Any:
        """Do what the model runner does, without the model."""
        for identifier in planned.free_encoder_mm_hashes:
            self._encoder_cache.pop(identifier, None)
        names = list(planned.num_scheduled_tokens)
        output = ModelRunnerOutput(names, {name: index for index, name in enumerate(names)})
        if not names:
            return output
        mixin, second = ECConnectorModelRunnerMixin, self._second_runner
        with (
            second.maybe_get_output(planned)
            if second is not None
            else mixin.maybe_get_ec_connector_output(planned, self._encoder_cache)
        ) as ec_output:
            for identifier in encoded:
                self._encoder_cache[identifier] = self._embeddings[identifier]
                if second is None:  # the second runner saves by itself, at the end
                    mixin.maybe_save_ec_to_connector(self._encoder_cache, identifier)
            for name, num_tokens in planned.num_scheduled_tokens.items():
                self._read_embeddings(self._scheduler.requests[name], num_tokens)
        output.ec_connector_output = ec_output
        requests = [self._scheduler.requests[name] for name in names]
        output.sampled_token_ids = [
            [_TOKEN] if one.num_computed_tokens >= one.num_prompt_tokens else [] for one in requests
        ]
        return output

    def _read_embeddings(self, request: Any, num_tokens: int) -> None:
        end = request.num_computed_tokens  # planning has moved it on
        for feature in request.mm_features:
            place = feature.mm_position
            if place.offset + place.length > end - num_tokens and place.offset < end:
                assert self._encoder_cache[feature.identifier].shape == (ROWS, self.width)


@pytest.fixture(scope="module")
def configs() -> dict[ECTransferRole, Any]:
    """vLLM's configuration by role; making one takes seconds."""
    return {role: _config(role) for role in (ECTransferRole.CONSUMER, ECTransferRole.BOTH)}


def _config(role: ECTransferRole) -> Any:
    transfer = {
        "ec_connector": "ChiasmECConnector",
        "ec_connector_module_path": ec_connector.__name__,
        "ec_role": role.value,
    }
    arguments = EngineArgs(
        model=str(CHECKPOINT),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=4 * MAX_AHEAD,
        max_num_batched_tokens=512,
        block_size=BLOCK_TOKENS,
        ec_transfer_config=transfer,
    )
    config = arguments.create_engine_config()
    config.scheduler_config.max_num_batched_tokens = STEP_TOKENS
    config.scheduler_config.max_num_scheduled_tokens = None
    config.cache_config.num_gpu_blocks = _BLOCKS
    return config


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    return Encoder(tmp_path / "store")


@pytest.fixture(params=["0", "1"], ids=["first runner", "second runner"])
def start(
    request: pytest.FixtureRequest,
    configs: dict[ECTransferRole, Any],
    tmp_path: Path,
    encoder: Encoder,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Start]:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", request.param)
    monkeypatch.setattr(ec_connector, "get_tensor_model_parallel_rank", lambda: 0)  # there is no worker process

    def start(role: ECTransferRole) -> RealVLLM:
        config = copy.deepcopy(configs[role])
        config.ec_transfer_config.ec_connector_extra_config = store_in(tmp_path / "store")
        assert config.use_v2_model_runner == bool(int(request.param))
        return RealVLLM(config)

    yield start
    ensure_ec_transfer_shutdown()


class TestRealVLLM(EngineContract):
    def test_the_prefix_cache_holds_no_block_from_before_once_the_kv_cache_has_been_overwritten(
        self, encoder: Encoder, start: Callable[[ECTransferRole], RealVLLM], configs: dict[ECTransferRole, Any]
    ) -> None:
        """Only then the connector forgets which items may have blocks that were computed from zeros."""
        pd = start(ECTransferRole.CONSUMER)
        path = encoder.publish("a", pd.embedding_of("a"))
        pd.begin(("a", 2), of="lost", tokens=200)
        pd.step(path.unlink, is_far=True)
        pd.step()
        encoder.publish("a", pd.embedding_of("a"))
        kv_cache_tokens = ec_connector._kv_cache_tokens(configs[ECTransferRole.CONSUMER])
        for index in range(kv_cache_tokens // STEP_TOKENS):
            pd.begin(of=f"text {index}", tokens=STEP_TOKENS, first_token=1000 + index)
            assert pd.step().tokens == {f"text {index}": STEP_TOKENS}
        pd.begin(("a", 2), of="again", tokens=100)
        assert pd.step().tokens == {"again": 100}

    def test_a_request_that_finds_no_place_among_those_that_run_does_not_fail_for_an_embedding_that_has_arrived(
        self, encoder: Encoder, start: Callable[[ECTransferRole], RealVLLM]
    ) -> None:
        pd = start(ECTransferRole.CONSUMER)
        pd.begin(("a", 2), of="waiting")
        pd.step()
        for index in range(4 * MAX_AHEAD):
            pd.begin(of=f"text {index}", tokens=4, max_tokens=100)
        pd.step()
        encoder.publish("a", pd.embedding_of("a"))
        pd.step()
        pd.pass_time(100)
        outcome = pd.step()
        assert "waiting" not in outcome.tokens
        assert outcome.failed == set()

    def test_a_wait_is_told_with_the_first_output_and_with_the_last(
        self, encoder: Encoder, start: Callable[[ECTransferRole], RealVLLM]
    ) -> None:
        pd = start(ECTransferRole.CONSUMER)
        pd.half.waits.are_wanted = True
        pd.begin(("a", 2), max_tokens=3)
        pd.step()
        pd.pass_time(100)
        encoder.publish("a", pd.embedding_of("a"))
        told = []
        for _ in range(3):
            pd.step()
            (output,) = pd.outputs
            told.append(output.ec_transfer_params)
        assert told[1] is None
        assert told[0] == told[2]
        ((began, ended, item),) = told[0][WAITS]
        assert ended - began >= 100
        assert item == 0


def _feature(name: str, offset: int, pixels: bool) -> MultiModalFeatureSpec:
    fields = {"image_grid_thw": torch.tensor([1, 4, 4]), **({"pixel_values": torch.zeros(1)} if pixels else {})}
    data = {key: MultiModalFieldElem(data=value, field=MultiModalBatchedField()) for key, value in fields.items()}
    return MultiModalFeatureSpec(
        data=MultiModalKwargsItem(data),
        modality="image",
        identifier=identifier_of(name),
        mm_position=PlaceholderRange(offset=offset, length=ROWS),
    )
