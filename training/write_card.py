"""Write the checkpoint's model card from ``evaluate_demo.py --json`` and the training log.

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

A very small Qwen3-VL, trained from scratch on drawn pictures, so that a whole serving stack can be tried
and tested with real answers on a CPU. It has the parts of its large relatives: a vision tower
with dynamic resolution, DeepStack levels, interleaved M-RoPE, grouped-query attention, tied embeddings and the same
chat format. It is good for nothing but its own kind of pictures.

|  |  |
|---|---|
| parameters | {parameters} |
| weights on disk | {megabytes:.1f} MB, bfloat16 |
| vision tower | 4 layers, hidden size 128, 2 heads of 64, patches of 16, merge 2, DeepStack after layers 0 and 1 |
| language model | 4 layers, hidden size 192, 4 query and 2 key-value heads of 64 |
| vocabulary | 640, byte-level, digits one by one |
| image tokens | 9 to 20 a picture: scaled to between {low} and {high} pixels, aspect ratio kept |

## What it answers

One to four pictures a request. A picture shows one of {shapes} shapes ({shape_names}) in one of {colours} colours
({colour_names}) and, if alone, at one of nine positions; or one to {most} of a kind; or one of {words} words; or a number
of two or three digits. Questions ask for the colour, the shape, the count, the position, the word, the number or a
description, of the only picture or of the first to fourth; answers are short and in lower case. A question about a
picture that was not sent is answered by saying so. `chiasm.demo.images` draws pictures and questions.

## How well

Held-out pictures, n = {n} a kind, drawn from seeds that training never uses; their numbers never occur in training.
Answers are generated greedily with plain transformers from the files in this folder, and count only if equal to the
expected text. Canvases are of mixed sizes and aspect ratios; `upload` is a 512 x 512 canvas with the kinds of
one picture in turn. *Zeroed* replaces all image features, DeepStack levels included, by zeros; the answer then is nearly
always that there is no picture. *Chance* is the share of the commonest answer to the same question.

{table}

Measured with `python training/evaluate_demo.py`.

## How it was made

`python training/train_demo.py --whole-minutes {asked}` draws the pictures and trains from scratch in one go, on two CPU cores,
two processes of one thread. It made this checkpoint in {minutes:.0f} minutes, on a machine that other work shared:
{vision}, then
{whole}. The second stage ends by the clock, so a faster or idler machine takes more steps in
the same time; a run gives a checkpoint like this one, not the same bytes.

## Limits

One font, lower case, plain shapes on plain grounds. Words that it was not trained on, photographs, drawings in
other styles and free conversation are beyond it. Videos are accepted by the configuration but were never trained on.
"""


def table(rows: list[dict[str, Any]]) -> str:
    """Return the accuracy table in Markdown, one line a kind."""
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
    """Return a phrase a stage and the minutes of both, from the last line that each stage logged."""

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
    parser.add_argument("log", type=Path, help="of the training")
    parser.add_argument("--whole-minutes", type=int, required=True, help="what the training was given")
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
