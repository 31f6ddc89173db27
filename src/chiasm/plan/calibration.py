"""Measures what steps and images cost on this machine's cores, with the engine's own parts."""

from __future__ import annotations

import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from chiasm.cores import share_cores
from chiasm.plan.costs import MeasuredFile, ThreadCosts

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event, Semaphore

    from chiasm.engine.model_runner import ModelRunner
    from chiasm.engine.step import ScheduledSequence, Step
    from chiasm.models.base import Pixels, Processor, VisionModel

DECODE_ROWS = (1, 2, 4, 8, 16)
PREFILL_ROWS = (32, 64, 128, 256, 512)
SIDES = (224, 448, 768, 1024, 1536)
"""Sides of the square images that are encoded; a size that takes the tokens of another is left out."""
_BLOCK_SIZE = 16
_SHORT, _LONG = 32, 1024
"""Tokens before the measured ones, to see what attention to them costs."""
_REPEATS = 9
_MOST_SECONDS = 2.0
"""After this time a measurement ends with the repeats that it has."""
_STORE_SECONDS_PER_BYTE = 1 / 1.5e9
"""Writing an entry to shared memory and mapping it, and reading KV from a neighbour's memory."""
_REQUEST_SECONDS = 0.008
"""Proxy, two HTTP servers, chat template and tokenizer of one request on a CPU."""


def calibrate(folder: Path, model: str, cores: int, note: Callable[[str], None]) -> MeasuredFile:
    """Measure the checkpoint in ``folder`` with 1, 2, 4, … and all of ``cores`` threads; ``note`` is told what is measured.

    Raises ConfigurationError, UnsupportedModelError. It takes some seconds for each number of threads. Other work on the
    machine makes the costs too high: run it when the machine is idle.
    """
    share_cores(None)
    import torch

    from chiasm.bench.report import machine

    before = torch.get_num_threads()
    try:
        with torch.inference_mode():
            bed = Bed(folder)
            threads: dict[int, ThreadCosts] = {}
            for number in thread_counts(cores):
                note(f"measuring steps and images with {number} thread{'s' * (number > 1)}")
                torch.set_num_threads(number)
                threads[number] = bed.measure()
            torch.set_num_threads(1)
            note("measuring how much cores disturb each other")
            busy = _busy_factor(bed, folder, cores)
            prepare = bed.measure_prepare()
    finally:
        torch.set_num_threads(before)
    return MeasuredFile(
        model=model,
        cpu=str(machine()["cpu"]),
        cores=cores,
        threads=threads,
        prepare=prepare,
        image_tokens=bed.image_tokens,
        embedding_seconds_per_token=bed.entry_bytes_per_row * _STORE_SECONDS_PER_BYTE,
        kv_seconds_per_token=bed.kv_bytes_per_token * _STORE_SECONDS_PER_BYTE,
        request_seconds=_REQUEST_SECONDS,
        busy_factor=busy,
    )


def thread_counts(cores: int) -> list[int]:
    """Return 1, 2, 4, … below ``cores``, and ``cores``."""
    powers = [1 << power for power in range(cores.bit_length()) if 1 << power < cores]
    return [*powers, cores]


class Bed:
    """The parts of an instance with everything to measure them."""

    def __init__(self, folder: Path) -> None:
        import torch

        from chiasm.engine.attention import KVCache
        from chiasm.engine.device import choose_dtype
        from chiasm.engine.model_runner import ModelRunner
        from chiasm.models import load_language, load_processor, load_vision

        device = torch.device("cpu")
        dtype = choose_dtype("auto", folder, device)  # as instances of `chiasm serve` compute
        self.processor: Processor = load_processor(folder)
        self.vision: VisionModel = load_vision(folder, dtype=dtype, device=device)
        language = load_language(folder, dtype=dtype, device=device)
        self.longest = min(_LONG, self.processor.max_model_len // 2)
        tokens = max(self.longest + PREFILL_ROWS[-1], DECODE_ROWS[-1] * (self.longest + _BLOCK_SIZE))
        num_blocks = -(-tokens // _BLOCK_SIZE) + DECODE_ROWS[-1]
        cache = KVCache(language, num_blocks=num_blocks, block_size=_BLOCK_SIZE)
        self._vocab_size = language.vocab_size
        self._runner: ModelRunner = ModelRunner(language, cache, frozenset())
        self._names = count()
        self.entry_bytes_per_row = language.entry_width * dtype.itemsize
        self.kv_bytes_per_token = cache.bytes_per_block(language, _BLOCK_SIZE) // _BLOCK_SIZE
        self.images: list[tuple[int, Pixels]] = []
        self.image_tokens: dict[str, int] = {}
        self._files = {side: _jpeg(side) for side in SIDES}
        for side in SIDES:
            tokens = len(self.processor.geometry_of_size(side, side).token_ids)
            self.image_tokens[f"{side}x{side}"] = tokens
            if all(tokens != known for known, _ in self.images):
                self.images.append((tokens, self._preprocess(side)))
        self.images.sort(key=lambda image: image[0])

    def measure(self) -> ThreadCosts:
        """Measure with the current number of threads."""
        decodes = {(rows, keys): self.step(self._decode(rows, keys)) for rows in DECODE_ROWS for keys in (_SHORT,)}
        widest = DECODE_ROWS[-1]
        decodes[widest, self.longest] = self.step(self._decode(widest, self.longest))
        key_seconds = _slope(decodes[widest, _SHORT], decodes[widest, self.longest], widest * (self.longest - _SHORT))
        most = min(PREFILL_ROWS[-1], self.longest)
        prefills = {rows: self.step(self._prefill(rows, 0)) for rows in PREFILL_ROWS if rows <= most}
        late = self.step(self._prefill(most, self.longest))
        pair_seconds = _slope(prefills[most], late, most * self.longest)
        rows = [(rows, max(0.0, seconds - rows * keys * key_seconds)) for (rows, keys), seconds in decodes.items()]
        points = [*rows[:-1], *((rows, seconds - rows**2 / 2 * pair_seconds) for rows, seconds in prefills.items())]
        images = [(tokens, _time(partial(self.vision.encode, pixels))) for tokens, pixels in self.images]
        return ThreadCosts(_ascending(points), pair_seconds, key_seconds, _ascending(images))

    def measure_prepare(self) -> list[tuple[int, float]]:
        """Measure decoding and preprocessing of files, by pixels."""
        return [(side * side, _time(partial(self._preprocess, side))) for side in SIDES]

    def one_step(self) -> float:
        """Return the seconds of one prefill, as a probe of how fast the machine is now."""
        return self.step(self._prefill(PREFILL_ROWS[2], 0))

    def step(self, step: Step) -> float:
        """Return the seconds of a step."""

        def run() -> None:
            self._runner.execute(step, {})
            for part in step.scheduled:
                self._runner.forget(part.sequence.request_id)

        return _time(run)

    def _decode(self, rows: int, keys: int) -> Step:
        from chiasm.engine.step import Step

        return Step(decodes=[self._part(keys, 1, index) for index in range(rows)])

    def _prefill(self, rows: int, before: int) -> Step:
        from chiasm.engine.step import Step

        return Step(prefills=[self._part(before, rows, 0)])

    def _part(self, start: int, rows: int, place: int) -> ScheduledSequence:
        from chiasm.engine.request import SamplingParams
        from chiasm.engine.sequence import Sequence
        from chiasm.engine.step import ScheduledSequence
        from chiasm.models.base import Prompt

        sequence = Sequence(
            request_id=f"r{next(self._names)}",
            index=0,
            arrival=0,
            prompt=Prompt([index % self._vocab_size for index in range(start + rows)]),
            sampling=SamplingParams(temperature=0.0),
            seed=0,
            block_size=_BLOCK_SIZE,
        )
        blocks = -(-(start + rows) // _BLOCK_SIZE)
        sequence.block_ids = list(range(place * blocks, (place + 1) * blocks))
        return ScheduledSequence(sequence, start, rows, samples=True)

    def _preprocess(self, side: int) -> Pixels:
        from chiasm.media.config import MediaConfig
        from chiasm.media.image import decode

        return self.processor.preprocess(decode(self._files[side], MediaConfig(max_image_pixels=side * side)))


def _busy_factor(bed: Bed, folder: Path, cores: int) -> float:
    """Return how much longer a step takes on one core while all others run steps too."""
    if cores == 1:
        return 1.0
    alone = bed.one_step()
    with _neighbours(folder, cores - 1):
        beside = bed.one_step()
    return max(1.0, beside / alone)


@contextmanager
def _neighbours(folder: Path, number: int) -> Iterator[None]:
    """Processes that run steps, all the time, on one core each."""
    context = multiprocessing.get_context("spawn")
    ready, done = context.Semaphore(0), context.Event()
    processes = [context.Process(target=_run_steps, args=(folder, ready, done), daemon=True) for _ in range(number)]
    # Ctrl-C is for this process, which ends the others.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for process in processes:
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        for process in processes:
            while not ready.acquire(timeout=0.2):
                if not process.is_alive():
                    break
        yield
    finally:
        done.set()
        for process in processes:
            process.join()


def _run_steps(folder: Path, ready: Semaphore, done: Event) -> None:
    """Run steps until ``done`` is set or the parent is gone; ``ready`` is released before the first."""
    share_cores(1)
    import torch

    torch.set_num_threads(1)
    with torch.inference_mode():
        bed = Bed(folder)
        ready.release()
        parent = multiprocessing.parent_process()
        while not done.is_set() and (parent is None or parent.is_alive()):
            bed.one_step()


def _time(work: Callable[[], object]) -> float:
    """Return the median of some runs, after one that doesn't count.

    One thread is timed by the CPU time that it uses, so that it doesn't matter how often others take its core.
    """
    import torch

    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    work()
    found: list[float] = []
    begun = time.perf_counter()
    while len(found) < _REPEATS and (not found or time.perf_counter() - begun < _MOST_SECONDS):
        started = clock()
        work()
        found.append(clock() - started)
    return statistics.median(found)


def _slope(first: float, second: float, difference: float) -> float:
    return max(0.0, (second - first) / difference)


def _ascending(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the points sorted, and never falling: more work doesn't take less time, whatever noise says."""
    ordered: list[tuple[int, float]] = []
    for size, seconds in sorted(points):
        ordered.append((size, max(seconds, ordered[-1][1] if ordered else 0.0, 1e-6)))
    return ordered


def _jpeg(side: int) -> bytes:
    from chiasm.bench.requests import photo

    return photo("calibration", side)
