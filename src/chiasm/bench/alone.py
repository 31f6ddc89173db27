"""What encoding and prefilling one image take by themselves, and a checkpoint on which both take about the same."""

from __future__ import annotations

from dataclasses import dataclass

from chiasm.bench import prompts
from chiasm.bench.checkpoints import TEXT_LAYERS, synthetic
from chiasm.bench.measurement import Bench
from chiasm.bench.statistics import median
from chiasm.bench.topology import pinned, running
from chiasm.launch import Deployment
from chiasm.wire import Role

SIDE = 512
QUESTION = "What is shown?"
_ROUNDS = 5
_ENOUGH_ALIKE = 0.15
_MOST_LAYERS = 32
_ATTEMPTS = 3


@dataclass(frozen=True)
class Alone:
    """Seconds of one image with nothing else to do, as the instances themselves measure it."""

    encode_seconds: float
    """Decoding its file, preprocessing, the vision tower and publishing."""
    prefill_seconds: float
    """Prefill of a prompt with that image, whose embedding is there, up to the first token."""


def embeds_part(identifier: str) -> dict[str, object]:
    """The part by which a PD is told of an image of ``SIDE`` squared pixels that an encoder publishes."""
    return {"type": "image_embeds", "image_embeds": {"image_size": [SIDE, SIDE]}, "uuid": identifier}


def pixels_body(data: bytes, identifier: str) -> bytes:
    """The body by which an encoder is told to publish an image under an identifier."""
    return prompts.chat([{**prompts.image_part(data), "uuid": identifier}], max_tokens=1)


async def measure_alone(bench: Bench, deployment: Deployment, data: bytes, identifier: str) -> Alone:
    """Encode an image that was never seen, then prefill it, by the instances' own addresses."""
    (encoder,), (pd, *_) = deployment.urls(Role.ENCODER), deployment.urls(Role.PD)
    _, encoding, _ = await bench.client.post(encoder, pixels_body(data, identifier))
    body = prompts.chat([embeds_part(identifier), prompts.text_part(QUESTION)], max_tokens=1)
    _, prefilling, _ = await bench.client.post(pd, body)
    return Alone(encoding["preprocess"] + encoding["encode"] + encoding["publish"], prefilling["prefill"])


async def balanced_checkpoint(bench: Bench) -> str:
    """A synthetic checkpoint with as many decoder layers as make prefill of an image as slow as its encoding.

    Both are measured on a core of their own each.
    """
    from chiasm.bench.images import photo

    layers = TEXT_LAYERS
    for attempt in range(_ATTEMPTS):
        model = await synthetic(bench, layers)
        async with running(bench, pinned(model)) as (deployment,):
            bench.step("balancing encode and prefill")
            found = []
            for index in range(_ROUNDS):
                name = f"balance {bench.seed} {attempt} {index}"
                found.append(await measure_alone(bench, deployment, photo(name, SIDE), identifier_of(name)))
        encode = median([one.encode_seconds for one in found[1:]])
        prefill = median([one.prefill_seconds for one in found[1:]])
        better = max(1, min(_MOST_LAYERS, round(layers * encode / prefill)))
        if abs(prefill / encode - 1) <= _ENOUGH_ALIKE or better == layers:
            break
        layers = better
    return model


def identifier_of(name: str) -> str:
    """64 hex digits."""
    import hashlib

    return hashlib.sha256(name.encode()).hexdigest()
