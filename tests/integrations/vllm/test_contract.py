from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from chiasm.ec_transfer import ECTransferRole
from chiasm.integrations.vllm.scheduler import Reach

from .contract import MAX_AHEAD, STEP_TOKENS, EngineContract, Instance, Outcome, Start
from .engine import LAYOUT, Engine, Request, far, identifier_of, request


class StandIn(Instance):
    """The stand-in of these tests, with the requests that it serves."""

    width = LAYOUT.width

    def __init__(self, folder: Path, role: ECTransferRole) -> None:
        super().__init__()
        self._engine = Engine(folder, role, Reach(STEP_TOKENS, max_ahead=MAX_AHEAD))
        self._engine.embeddings = {identifier_of(name): self.embedding_of(name) for name in "ab"}
        self._requests: list[Request] = []
        self._cached_tokens = 0
        self.record(self._engine.scheduler)
        self.record(self._engine.worker)

    def begin(
        self,
        *places: tuple[str, int],
        of: str = "request",
        tokens: int = 0,
        pixels: bool = False,
        cached_tokens: int = 0,
    ) -> None:
        one = request(*places, of=of, tokens=tokens, pixels=pixels)
        one.ends_with_prompt = True
        self._requests.append(one)
        self._cached_tokens = cached_tokens

    def pass_time(self, seconds: float) -> None:
        self._engine.clock.now += seconds

    def step(self, meanwhile: Callable[[], object] = lambda: None, *, is_far: bool = False) -> Outcome:
        self.calls.clear()
        engine, requests = self._engine, list(self._requests)
        step = engine.schedule(*requests, cached_tokens=self._cached_tokens)
        if is_far:
            step.metadata = far(step.metadata)
        meanwhile()
        report = engine.run(step) if step.tokens else None
        failed = engine.update(*requests, report=report)
        self._requests = [
            one for one in requests if one.request_id not in failed and one.num_computed_tokens < one.num_tokens
        ]
        return Outcome(step.tokens, step.encoded, failed, list(self.calls))


class TestStandIn(EngineContract):
    @pytest.fixture
    def start(self, folder: Path) -> Start:
        return lambda role: StandIn(folder, role)
