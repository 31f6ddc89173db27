"""The built-in engine's decode step beside plain transformers."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from chiasm.bench.load import turns
from chiasm.bench.measurement import Bench, Measurement, Outcome

_PROMPT_TOKENS = 32
_STEPS = 24


class DecodeStep(Measurement):
    """Both in this process and in turns, on one core, counted in CPU time, without HTTP."""

    name = "step"
    _at_most = 0.4
    purpose = "A decode step of the built-in engine / a token of plain transformers' generate, one request"
    target = f"at most {_at_most:g} times"

    async def run(self, bench: Bench) -> Outcome:
        outcome = Outcome()
        rounds = bench.samples(20, quick=2)
        samples = await asyncio.to_thread(self._take, bench, rounds)
        outcome.compare(
            f"{bench.model_name}, decode step", samples, title="step: a token", seed=bench.seed, at_most=self._at_most
        )
        outcome.notes.append(
            f"Answers of {_STEPS} tokens to {_PROMPT_TOKENS} tokens, in float32; per token, without the first. On a GPU, and "
            "with a checkpoint of billions of parameters, the time of a step is not that of calling its operators."
        )
        return outcome

    def _take(self, bench: Bench, rounds: int) -> dict[str, list[float]]:
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._compare(bench, rounds)
        finally:
            torch.set_num_threads(threads)

    def _compare(self, bench: Bench, rounds: int) -> dict[str, list[float]]:
        import torch
        from transformers import AutoModelForImageTextToText

        from chiasm.engine.attention import KVCache
        from chiasm.engine.calibration import step_seconds
        from chiasm.engine.model_runner import ModelRunner
        from chiasm.models import load_language, load_processor
        from chiasm.models.checkpoint import resolve_folder

        folder: Path = resolve_folder(bench.model)
        processor = load_processor(folder)
        language = load_language(folder, dtype=torch.float32, device=torch.device("cpu"))
        runner = ModelRunner(language, KVCache(language, num_blocks=16, block_size=16), processor.eos_token_ids)
        whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        ids = torch.full((1, _PROMPT_TOKENS), min(processor.eos_token_ids))

        def generate(tokens: int) -> float:
            started = time.thread_time()
            with torch.inference_mode():
                whole.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    min_new_tokens=tokens,
                    max_new_tokens=tokens,
                )
            return time.thread_time() - started

        def of_transformers() -> float:
            return (generate(_STEPS) - generate(1)) / (_STEPS - 1)

        def of_engine() -> float:
            return sum(step_seconds(processor, runner, _PROMPT_TOKENS, _STEPS)[1:]) / (_STEPS - 1)

        bench.phase("decode steps", rounds)
        samples: dict[str, list[float]] = {"generate of transformers": [], "built-in": []}
        takers = [of_transformers, of_engine]
        for taker in takers:
            taker()
        for index in range(rounds):
            for which in turns(index, 2):
                list(samples.values())[which].append(1000 * takers[which]())
            bench.advance()
        return samples
