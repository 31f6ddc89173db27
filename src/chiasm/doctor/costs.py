"""What work costs instances: as each has measured it at its start, and as the proxy has learned it from answers since."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from chiasm.doctor.observed import Observed
from chiasm.doctor.report import Check, Result
from chiasm.wire import Costs

_COSTS = Check("costs")
_MAX_SIZES = 8


def costs(instances: Sequence[Observed]) -> Iterator[Result]:
    """Show what placement goes by: the times of images by size, of a prompt token, and of a step of decoding."""
    silent = []
    for one in instances:
        if parts := list(_parts(one.health.costs or Costs(), one.learned or Costs())):
            yield _COSTS.ok(f"{one.name}: {'; '.join(parts)}")
        else:
            silent.append(one)
    if silent:
        names = ", ".join(one.name for one in silent)
        yield _COSTS.skipped(
            f"{names} don't report what work costs; the proxy assumes something, and learns from answers"
        )


def _parts(measured: Costs, learned: Costs) -> Iterator[str]:
    by_pixels = {image.pixels: image.encode_seconds for image in learned.images}
    sizes = [
        f"{image.pixels:,} pixels {_both(image.encode_seconds, by_pixels.get(image.pixels, 0.0))}"
        for image in measured.images[:_MAX_SIZES]
        if image.encode_seconds
    ]
    if sizes:
        yield f"to encode {', '.join(sizes)}"
    if measured.prefill_seconds_per_token:
        yield f"a prompt token {_both(measured.prefill_seconds_per_token, learned.prefill_seconds_per_token)}"
    if measured.decode_step_seconds:
        yield f"a step of decoding {_both(measured.decode_step_seconds, learned.decode_step_seconds)}"


def _both(measured: float, learned: float) -> str:
    """Return both times. What is unknown, or equals the measured time because no answer has corrected it, is left out."""
    return _time(measured) + (f" (learned {_time(learned)})" if learned and learned != measured else "")


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
