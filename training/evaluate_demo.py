"""Measure the demo checkpoint on held-out images: ``python training/evaluate_demo.py``.

Every answer is generated greedily, token by token, from the saved folder: images go through the image
processor one by one, the chat template through the tokenizer, and each placeholder is repeated to its
image's number of tokens. An answer counts only if it equals the expected one exactly.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "src")]

from recipe import CHECKPOINT  # noqa: E402
from workers import die_with_parent  # noqa: E402

from chiasm.bench.reference import Reference  # noqa: E402
from chiasm.demo import images  # noqa: E402

FIRST_SEED = 500_000
"""First held-out seed that is measured; the package's tests draw from other held-out seeds."""


@dataclass(frozen=True)
class Result:
    """The result of one kind in one setting."""

    kind: str
    setting: str
    n: int
    right: int
    wrong: tuple[str, ...]

    @property
    def share(self) -> float:
        """Accuracy in percent."""
        return 100 * self.right / self.n


@dataclass(frozen=True)
class Job:
    """One kind to measure in one setting: float32, bfloat16 or zeroed (float32, image features zeroed)."""

    checkpoint: Path
    kind: str
    setting: str
    n: int


def examples(kind: str, n: int) -> Iterator[images.Example]:
    """Draw the examples of a kind; ``upload`` is a 512 x 512 drawing of a single-image kind."""
    for seed in range(FIRST_SEED, FIRST_SEED + n):
        if kind == "upload":
            single = [k for k in images.SINGLE_KINDS if k != "describe"]
            yield images.draw_example(seed, single[seed % len(single)], size=(512, 512))
        else:
            yield images.draw_example(seed, kind)


def measure(job: Job) -> Result:
    """Generate the answers of one job on one thread, and compare them with the expected ones."""
    import torch

    torch.set_num_threads(1)
    reference = Reference(job.checkpoint, dtype=torch.bfloat16 if job.setting == "bfloat16" else torch.float32)
    right, wrong = 0, []
    for example in examples(job.kind, job.n):
        answer = reference.answer(example.images, example.question, zero_embeddings=job.setting == "zeroed")
        right += answer == example.answer
        if answer != example.answer:
            wrong.append(f"{example.question} {example.answer!r}, not {answer!r}")
    return Result(job.kind, job.setting, job.n, right, tuple(wrong))


def chance(kind: str) -> float:
    """Return the accuracy in percent of always giving the most frequent answer, over many drawn scenes."""
    import random
    from collections import Counter

    topic = {"which-picture": "describe"}.get(kind, kind.removeprefix("which-"))
    rng = random.Random(0)
    drawn: Counter[str] = Counter()
    for _ in range(20_000):
        if kind == "upload":
            topic = rng.choice([k for k in images.SINGLE_KINDS if k != "describe"])
        content = images.content_for(rng, topic)
        # The best guess from the question alone is the most common answer to it.
        scene = images.draw_scene(rng, content, held_out=True, many=topic == "describe")
        drawn[f"{topic}: {images.answer_for(scene, topic)}"] += 1
    best: dict[str, int] = {}
    for key, count in drawn.items():
        best[key.split(":")[0]] = max(best.get(key.split(":")[0], 0), count)
    return 100 * sum(best.values()) / drawn.total()


def main() -> None:
    """Measure, print a table, and write the numbers for the model card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--kinds", nargs="*", default=[*images.KINDS, "upload"])
    parser.add_argument("--n", type=int, default=200, help="examples of each kind")
    parser.add_argument("--zero-embeddings", action="store_true", help="measure with zeroed image features only")
    parser.add_argument("--settings", nargs="*", default=["float32", "zeroed", "bfloat16"])
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print for each kind")
    parser.add_argument("--json", type=Path, help="file to write the numbers to, for write_card.py")
    options = parser.parse_args()
    settings = ["zeroed"] if options.zero_embeddings else options.settings
    jobs = [Job(options.checkpoint, kind, s, options.n) for s in settings for kind in options.kinds]
    started = time.monotonic()
    found: dict[tuple[str, str], Result] = {}
    with ProcessPoolExecutor(options.processes, get_context("spawn"), initializer=die_with_parent) as pool:
        for result in pool.map(measure, jobs):
            found[result.kind, result.setting] = result
            print(f"{result.kind:14} {result.setting:9} {result.share:5.1f} % of {result.n}", flush=True)
            for line in result.wrong[: options.show]:
                print("   ", line)
    print(f"\n{'kind':14} {'n':>4} " + " ".join(f"{s:>9}" for s in settings) + f" {'chance':>7}")
    for kind in options.kinds:
        row = " ".join(f"{found[kind, s].share:9.1f}" for s in settings)
        print(f"{kind:14} {options.n:4} {row} {chance(kind):7.1f}")
    print(f"{time.monotonic() - started:.0f} s")
    if options.json:
        rows = [asdict(r) | {"chance": chance(r.kind)} for r in found.values()]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
