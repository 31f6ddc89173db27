"""What sampling costs at a vocabulary of real size: a step of the model that samples, beside one that takes the best token."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiasm.bench.checkpoints import LARGE_VOCABULARY, make_once
from chiasm.bench.load import turns
from chiasm.bench.measurement import Bench, Measurement, Outcome

if TYPE_CHECKING:
    from chiasm.models.base import LanguageModel

_AT_MOST = 1.3
_BATCHES = (1, 8, 32)
_PROMPT_TOKENS = 128
_BLOCK_SIZE = 16
_WARM_UP = 1
_KINDS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
}
"""The second is what Qwen's checkpoints ask for in generation_config.json, for requests that say nothing else."""


class Vocabulary(Measurement):
    """Both kinds of steps belong to one engine in this process, on one thread, and take turns."""

    name = "vocabulary"
    purpose = (
        "A decode step that samples as Qwen's checkpoints ask, beside a greedy one, at a vocabulary of 152 000 tokens"
    )
    target = f"a batch of 32: at most {_AT_MOST} times greedy's step"

    async def run(self, bench: Bench) -> Outcome:
        steps = bench.samples(15, quick=2)
        model = await make_once(bench, "vocabulary", LARGE_VOCABULARY, "qwen2_5_vl")
        bench.phase("decode steps", None)
        taken = await asyncio.to_thread(measure_steps, Path(model), _BATCHES, steps)
        outcome = Outcome()
        for batch, samples in taken.items():
            at_most = _AT_MOST if batch == max(_BATCHES) else None
            outcome.compare(
                f"batch {batch}", samples, title=f"vocabulary: step of {batch}", seed=bench.seed, at_most=at_most
            )
        return outcome


def measure_steps(model: Path, batches: Sequence[int], steps: int) -> dict[int, dict[str, list[float]]]:
    """Return milliseconds of decode steps by batch, then by kind: ``greedy`` and ``sampled``, in pairs.

    A step is all that a model runner does: the forward pass, the head, and choosing tokens. The first of each kind is left out.
    """
    import torch

    from chiasm.models import load_language

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        language = load_language(model, dtype=torch.float32, device=torch.device("cpu"))
        found: dict[int, dict[str, list[float]]] = {}
        for batch in batches:
            kinds = {name: _Answers(language, batch, steps, params) for name, params in _KINDS.items()}
            found[batch] = {name: [] for name in kinds}
            for index in range(-_WARM_UP, steps):
                for which in turns(index, len(kinds)):
                    name = list(kinds)[which]
                    seconds = kinds[name].step()
                    if index >= 0:
                        found[batch][name].append(1000 * seconds)
        return found
    finally:
        torch.set_num_threads(threads)


class _Answers:
    """Answers that grow together, by a token a step, on a model that others use too."""

    def __init__(self, language: LanguageModel, batch: int, steps: int, params: Mapping[str, Any]) -> None:
        """Prefill the prompts. There is room for so many steps."""
        from chiasm.engine.attention import KVCache
        from chiasm.engine.block_manager import BlockManager
        from chiasm.engine.encoder_cache_manager import EncoderCacheManager
        from chiasm.engine.model_runner import ModelRunner
        from chiasm.engine.request import SamplingParams
        from chiasm.engine.scheduler import Scheduler, SchedulerConfig
        from chiasm.engine.sequence import Sequence as Answer
        from chiasm.models.base import Prompt

        prompt_rows = batch * _PROMPT_TOKENS
        num_blocks = batch * -(-(_PROMPT_TOKENS + steps + _WARM_UP + 2) // _BLOCK_SIZE)
        self._runner = ModelRunner(
            language, KVCache(language, num_blocks=num_blocks, block_size=_BLOCK_SIZE), frozenset()
        )
        self._scheduler = Scheduler(
            SchedulerConfig(
                max_num_batched_tokens=prompt_rows,
                min_text_before_item=0,
                max_num_seqs=batch,
                max_queued_requests=batch,
                max_prefill_tokens=prompt_rows,
                max_rest_tokens=0,
                entry_bytes_per_row=1,
            ),
            BlockManager(num_blocks, _BLOCK_SIZE),
            EncoderCacheManager(0),
        )
        generator = random.Random(batch)
        # Special tokens, which stand for images, are at the end of the vocabulary.
        for index in range(batch):
            prompt = Prompt([generator.randrange(language.vocab_size // 2) for _ in range(_PROMPT_TOKENS)])
            sequence = Answer(
                request_id=str(index),
                index=0,
                arrival=index,
                prompt=prompt,
                sampling=SamplingParams(**params, max_tokens=_PROMPT_TOKENS + steps),
                seed=index,
                block_size=_BLOCK_SIZE,
            )
            self._scheduler.add([sequence])
        while self._scheduler.waiting:
            self.step()

    def step(self) -> float:
        """Run a step, and return the seconds that the model runner took."""
        planned = self._scheduler.schedule()
        started = time.perf_counter()
        sampled = self._runner.execute(planned, {})
        seconds = time.perf_counter() - started
        self._scheduler.complete(planned, {name: token.token_id for name, token in sampled.items()})
        return seconds
