"""Second stage: the whole model learns to answer; the vision tower has a lower learning rate."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from conversations import IGNORE, Batch, Encoded, Encoder, Writer, collate
from parallel import Clock, Optimizers, Part, forward_precision
from recipe import ID
from samples import draw_grid
from things import LocalHead, local_loss, local_score, local_truth
from torch import Tensor, nn
from towers import BatchedVision, Grid, to_patches
from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration

_POOL = 3  # batches that are drawn at a time
_LOCAL_WEIGHT = 0.5
_FADE = 0.8  # share of the steps after which the local loss is zero


def encode_images(tower: BatchedVision, batch: Batch) -> list[Tensor]:
    """Encode all images; those of the same grid are encoded together.

    Returns the merged output and each DeepStack level as [tokens, H], in order of appearance.
    """
    by_grid: dict[Grid, list[int]] = defaultdict(list)
    for i, image in enumerate(batch.images):
        by_grid[image.grid].append(i)
    sizes = [image.grid[0] * image.grid[1] for image in batch.images]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    parts: list[list[Tensor]] = []
    places: list[np.ndarray] = []
    for grid, members in by_grid.items():
        pixels = np.stack([batch.images[i].pixels for i in members])
        parts.append([level.flatten(0, 1) for level in tower(to_patches(pixels), grid)])
        places += [np.arange(starts[i], starts[i] + sizes[i]) for i in members]
    order = torch.from_numpy(np.argsort(np.concatenate(places)))
    return [torch.cat(level)[order] for level in zip(*parts, strict=True)]


def logits(
    model: Qwen3VLForConditionalGeneration, tower: BatchedVision, batch: Batch
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return logits [n, V] and targets [n] of all answer tokens, row by row, and the levels of the images."""
    inputs = model.get_input_embeddings()(batch.ids)
    deep: dict[str, object] = {}
    seen: list[Tensor] = []
    if batch.images:
        visible = batch.ids == ID["<|image_pad|>"]
        seen = encode_images(tower, batch)
        merged, *levels = seen
        inputs = inputs.masked_scatter(visible[:, :, None], merged.to(inputs.dtype))
        deep = {"visual_pos_masks": visible, "deepstack_visual_embeds": levels}
    hidden = model.model.language_model(
        inputs_embeds=inputs, position_ids=batch.positions, use_cache=False, **deep
    ).last_hidden_state
    targets = batch.targets[:, 1:]
    answered = targets != IGNORE
    return model.lm_head(hidden[:, :-1][answered]), targets[answered], seen


def _right(batch: Batch, guesses: Tensor, targets: Tensor, tally: dict[str, list[int]]) -> None:
    """Count, by kind, the answers of which every token was guessed under teacher forcing."""
    hits = (guesses == targets).tolist()
    at = 0
    for _, start, end, kind in batch.spans:
        tally[kind][0] += all(hits[at : at + end - start])
        tally[kind][1] += 1
        at += end - start


def train_whole(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: Qwen2Tokenizer,
    *,
    clock: Clock,
    batch: int,
    seed: int,
    rank: int,
    log: Callable[[str], None],
    save: Callable[[], None],
    longer: bool = False,
    longer_rate: float = 0.6,
) -> None:
    """Train ``model`` in place with ``batch`` conversations per process and step, until ``clock`` reaches 1.

    ``longer`` continues with a model that this stage has trained: with other images, and rates times ``longer_rate``.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"{'longer' if longer else 'whole'} {seed} {rank}")
    rate = longer_rate if longer else 1.0
    tower, encode = BatchedVision(model.model.visual), Encoder(tokenizer)
    local_head = LocalHead(3 * model.config.vision_config.out_hidden_size)
    vision, language = model.model.visual, model.model.language_model
    optimizers = Optimizers(
        [
            Part(vision, adam=6e-4 * rate, muon=2e-3 * rate),
            Part(language, adam=1.5e-3 * rate, muon=4e-3 * rate),
            Part(local_head, adam=1.5e-3),
        ]
    )
    ready: list[list[Encoded]] = []
    tally: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    started, drawing, total = time.monotonic(), 0.0, 0.0
    step = 0
    while (progress := clock(step)) < 1:
        before = time.monotonic()
        # One image per request at first: it is easier to learn which of several is meant once images can be read.
        most = 1 if progress < 0.08 and not longer else 4
        if not ready:
            # Conversations of similar length share a batch: with mixed lengths, two fifths of a batch were padding.
            writer = Writer(rng, [draw_grid(rng) for _ in range(3)])
            pool = sorted((encode(writer.draw(most)) for _ in range(_POOL * batch)), key=lambda e: len(e.ids))
            ready = [pool[i * batch : (i + 1) * batch] for i in range(_POOL)]
        data = collate(ready.pop())
        drawing += time.monotonic() - before
        with forward_precision():
            scores, targets, seen = logits(model, tower, data)
            local = local_head(seen) if seen else None
        loss = nn.functional.cross_entropy(scores.float(), targets)
        total += loss.item()
        if local is not None:
            # The local loss continues for a while, because answers alone teach the tower little about each image.
            truth = local_truth([(p.marks, p.grid) for p in data.images])
            things = local_score(local, truth)
            tally["thing"][0] += things[0]
            tally["thing"][1] += things[1]
            fade = max(0.0, 1 - progress / _FADE)
            loss = loss + _LOCAL_WEIGHT * fade * local_loss(local, truth) / things[1]
        torch.autograd.backward(loss)
        optimizers.step(step, progress)
        _right(data, scores.argmax(-1), targets, tally)
        step += 1
        if step % 100 == 0:
            share = [f"{kind} {100 * a / b:.0f}" for kind, (a, b) in sorted(tally.items())]
            spent = time.monotonic() - started
            log(
                f"whole step {step} ({progress:.0%}), {spent:.0f} s ({drawing:.0f} drawing), loss {total / 100:.3f}: "
                + ", ".join(share)
            )
            tally.clear()
            total = 0.0
        if step % 200 == 0:
            save()
    log(f"whole step {step} (100%), {time.monotonic() - started:.0f} s, the end")
