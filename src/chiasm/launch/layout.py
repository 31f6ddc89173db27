"""Layouts: whether the instances of a deployment share devices or divide them. ``arrangement`` applies them to a machine."""

from __future__ import annotations

import enum
from collections.abc import Mapping

from chiasm.errors import ConfigurationError
from chiasm.wire import Role

_MOST_COPIES = 2
_COPY_BYTES = 1 << 30
"""What an encoder and a language model take besides weights: two processes of 400 MiB, and the smallest useful caches."""
_LANGUAGE = (Role.PD, Role.PREFILL, Role.DECODE)


class Layout(enum.StrEnum):
    """How instances are put on devices. A device is a GPU, or the CPU, or a set of its cores."""

    AUTO = "auto"
    """Split if instances are counted or placed by role, or if the GPUs differ; otherwise colocated."""
    COLOCATED = "colocated"
    """On each device an encoder beside a language model; each of them may use all of the device."""
    SPLIT = "split"
    """The devices are divided among the roles."""
    AGGREGATED = "aggregated"
    """On each device instances that do everything."""


def cpu_copies(cores: int, memory_bytes: int, model_bytes: int) -> int:
    """Return how many copies of a model share a CPU with this many cores unless a person says how many.

    A copy is an encoder with a PD, or an aggregated instance. ``memory_bytes`` is what is free there, ``model_bytes`` the size
    of all weights of the model in the instances' dtype.
    """
    fitting = memory_bytes // (model_bytes + _COPY_BYTES)
    return max(1, min(_MOST_COPIES, cores, fitting))


def even_shares(cores: int, number: int) -> list[int]:
    """Return how many cores each of ``number`` instances gets; those that are left over go to the first ones, one each."""
    each, rest = divmod(cores, number)
    return [each + (place < rest) for place in range(number)]


def check_counts(layout: Layout, counts: Mapping[Role, int]) -> None:
    """Raise ConfigurationError if a layout cannot hold instances that a person has counted."""
    given = {role for role, count in counts.items() if count}
    if layout is Layout.AGGREGATED and given != {Role.AGGREGATED}:
        others = ", ".join(sorted(given - {Role.AGGREGATED})) or "no"
        raise ConfigurationError(
            f"--layout aggregated runs aggregated instances only, but {others} instances are asked for; leave out their "
            "counts, or choose another layout."
        )
    if layout is Layout.COLOCATED and Role.AGGREGATED in given:
        raise ConfigurationError(
            "--layout colocated puts encoders beside language models, and an aggregated instance is both; leave out "
            "--aggregated, or choose --layout aggregated."
        )
    if layout is Layout.COLOCATED and (Role.ENCODER not in given or given.isdisjoint(_LANGUAGE)):
        raise ConfigurationError(
            "--layout colocated puts encoders beside language models; ask for at least one of each, or choose --layout split."
        )


def in_words(counts: Mapping[Role, int], least_encoders: int | None = None) -> str:
    """Return numbers of instances, such as ``2 encoders and 1 PD``, or ``1 to 4 encoders`` if there may be fewer."""
    parts = [_counted(role, count, least_encoders) for role, count in counts.items() if count]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _counted(role: Role, count: int, least_encoders: int | None) -> str:
    if role is Role.ENCODER:
        range_ = "" if least_encoders in (None, count) else f"{least_encoders} to "
        return f"{range_}{count} encoder{'s' if count > 1 else ''}"
    if role is Role.PD:
        return f"{count} PD{'s' if count > 1 else ''}"
    return f"{count} {role} instance{'s' if count > 1 else ''}"
