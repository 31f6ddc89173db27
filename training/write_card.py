"""Write the checkpoint's model card from the results of ``evaluate_demo.py --json`` and the training log.

``python training/write_card.py build/demo/results.json build/demo/train.log --whole-minutes 58``
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "src")]

from recipe import CHECKPOINT, MAX_PIXELS, MIN_PIXELS  # noqa: E402

from chiasm.demo import images  # noqa: E402

_CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: image-text-to-text
library_name: transformers
tags: [demo, qwen3_vl]
---

# The demo checkpoint

A very small Qwen3-VL, trained from scratch on generated drawings, so that a whole serving stack can be tried and tested with
real answers on a CPU. It has the same parts as the large models of its family: a vision tower with dynamic resolution,
DeepStack levels, interleaved M-RoPE, grouped-query attention, tied embeddings and the same chat format. It understands only
its own kind of images.

|  |  |
|---|---|
| parameters | {parameters} |
| weights on disk | {megabytes:.1f} MB, bfloat16 |
| vision tower | 4 layers, hidden size 128, 2 heads of 64, patches of 16, merge 2, DeepStack after layers 0 and 1 |
| language model | 4 layers, hidden size 192, 4 query and 2 key-value heads of 64 |
| vocabulary | 640, byte-level, digits one by one |
| image tokens | 9 to 20 per image, which is scaled to between {low} and {high} pixels, aspect ratio kept |

## What it answers

Requests have one to four images. Each is in one of {colours} colours ({colour_names}),
and shows one of {shapes} shapes ({shape_names}) at one of nine positions, or
one to {most} shapes of a kind, or one of {words} words, or a number of two or three digits.
Questions ask for the colour, the shape, the count, the position, the word, the number or a description, either of the only
image or of the first to fourth. Answers are short and in lower case. A question about an image that was not sent is answered
by saying so. `chiasm.demo.images` draws images and questions.

## How well

Held-out images, n = {n} for each kind, drawn from seeds that training never uses; their numbers never occur in training.
Answers are generated greedily with plain transformers from the files in this folder, and count only if they equal the
expected text. Canvases have mixed sizes and aspect ratios; `upload` is a 512 x 512 canvas with the kinds of single images in
turn. *Zeroed* replaces all image features, DeepStack levels included, by zeros; the answer is then nearly always that there
is no picture. *Chance* is the share of the most common answer to the same question.

{table}

Measured with `python training/evaluate_demo.py`.

## How it was made

`python training/train_demo.py --whole-minutes {asked}` draws the images and trains from scratch in one go, on two CPU
cores, with two processes of one thread each. It made this checkpoint in {minutes:.0f} minutes, on a machine shared with
other work: {vision},
then {whole}. The second stage ends by the clock, so a faster or
less busy machine takes more steps in the same time. A run gives a checkpoint like this one, not the same bytes.

## Limits

One font, lower case, plain shapes on plain backgrounds. It cannot read words that it was not trained on, nor understand
photographs or drawings in other styles, nor hold a free conversation. The configuration accepts videos, but the model was
never trained on them.
"""


def table(rows: list[dict[str, Any]]) -> str:
    """Return the accuracy table in Markdown, with one line for each kind."""
    titles = {"float32": "float32", "bfloat16": "bfloat16", "zeroed": "zeroed"}
    settings = [s for s in titles if any(r["setting"] == s for r in rows)]
    kinds = list(dict.fromkeys(r["kind"] for r in rows))
    share = {(r["kind"], r["setting"]): f"{100 * r['right'] / r['n']:.1f}" for r in rows}
    chance = {r["kind"]: f"{r['chance']:.1f}" for r in rows}
    lines = ["| kind | " + " | ".join(f"{titles[s]} %" for s in settings) + " | chance % |"]
    lines.append("|---|" + "---:|" * (len(settings) + 1))
    for kind in kinds:
        lines.append(f"| {kind} | " + " | ".join(share.get((kind, s), "") for s in settings) + f" | {chance[kind]} |")
    return "\n".join(lines)


def stages(log: str) -> tuple[dict[str, str], float]:
    """Return a phrase for each stage, and the minutes of both, from the last line that each stage logged."""

    def last(stage: str) -> tuple[int, float]:
        steps, spent = re.findall(rf"^{stage} step (\d+) [^,]*, (\d+) s", log, re.M)[-1]
        return int(steps), int(spent) / 60

    vision, whole = last("vision"), last("whole")
    said = {
        "vision": f"{vision[0]} steps of the vision tower alone in {vision[1]:.0f} minutes",
        "whole": f"{whole[0]} steps of the whole model in {whole[1]:.0f}",
    }
    return said, vision[1] + whole[1]


def main() -> None:
    """Fill in the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("log", type=Path, help="log of the training")
    parser.add_argument("--whole-minutes", type=int, required=True, help="the --whole-minutes of the training")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    options = parser.parse_args()
    rows = json.loads(options.results.read_text())
    log = options.log.read_text()
    said, minutes = stages(log)
    weights = (options.checkpoint / "model.safetensors").stat().st_size
    parameters = re.findall(r"^(\d+) parameters", log, re.M)[-1]
    card = _CARD.format(
        parameters=f"{int(parameters):,}",
        megabytes=weights / 1e6,
        most=images.COUNTS[-1],
        low=f"{MIN_PIXELS:,}",
        high=f"{MAX_PIXELS:,}",
        shapes=len(images.SHAPES),
        shape_names=", ".join(images.SHAPES),
        colours=len(images.COLOURS),
        colour_names=", ".join(images.COLOURS),
        words=len(images.WORDS),
        n=min(r["n"] for r in rows),
        table=table(rows),
        minutes=minutes,
        asked=options.whole_minutes,
        **said,
    )
    (options.checkpoint / "README.md").write_text(card)


if __name__ == "__main__":
    main()
