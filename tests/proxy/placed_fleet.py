"""Fleets whose instances report what work costs them, for tests of placement without a proxy."""

from __future__ import annotations

from typing import Any

from chiasm.proxy.fleet import Fleet
from chiasm.proxy.instance import Instance
from chiasm.proxy.prompts import ItemWork, Prefix, Work
from chiasm.wire import Costs, Health, ImageCost, Role

PER_TOKEN = 0.001
"""Seconds to prefill a token."""
PIXELS = 512 * 512
IMAGE_TOKENS = 256
ENCODE = 0.5
"""Seconds to encode an image of PIXELS."""


def costs(*, speed: float = 1.0, encode: float = ENCODE) -> Costs:
    """Return the costs of an instance that is ``speed`` times as fast as the usual one."""
    return Costs(
        prefill_seconds_per_token=PER_TOKEN / speed,
        decode_step_seconds=0.02 / speed,
        images=[
            ImageCost(pixels=PIXELS // 4, tokens=IMAGE_TOKENS // 4, encode_seconds=encode / 4 / speed),
            ImageCost(pixels=PIXELS, tokens=IMAGE_TOKENS, encode_seconds=encode / speed),
            ImageCost(pixels=4 * PIXELS, tokens=4 * IMAGE_TOKENS, encode_seconds=4 * encode / speed),
        ],
    )


def add(
    fleet: Fleet, name: str, role: Role = Role.PD, /, *, known: Costs | None = None, device: str = "", **health: Any
) -> Instance:
    """Add a healthy instance."""
    instance = fleet.add(f"http://{name}", role)
    base: dict[str, Any] = {"model": "tiny", "fingerprint": "f" * 64, "ec_store": "store", "role": role.value}
    base["device"] = "cpu"
    fleet.succeed(instance, Health(**(base | health), costs=known, device_id=device))
    return instance


def text(tokens: int, arrival: float = 0.0) -> Work:
    """Return a prompt of text."""
    return Work(arrival, 4 * tokens)


def images(*names: str, pixels: int = PIXELS, tokens: int = 40, arrival: float = 0.0) -> Work:
    """Return a prompt of these images, followed by text."""
    items = [ItemWork(name, pixels) for name in names]
    prefixes = [Prefix(hash(names[: count + 1]), 0) for count in range(len(names))]
    return Work(arrival, 4 * tokens, items, prefixes)
