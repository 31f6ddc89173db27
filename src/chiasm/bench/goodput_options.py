"""What a person chooses for ``goodput`` and ``trace``, and the deployments that are always compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from chiasm.launch import DeploymentConfig
from chiasm.options import Option

AGGREGATED, REPLICAS, SPLIT, COLOCATED = STANDARD = ("aggregated", "replicas", "split", "colocated")
"""The deployments that are always compared; see ``arms``."""
MOST_REPLICAS = 4
"""Aggregated instances on a CPU."""


@dataclass(frozen=True)
class GoodputOptions:
    """What a person chooses for ``goodput`` and ``trace``."""

    arms: Annotated[
        tuple[str, ...],
        Option(
            "Deployments to compare: aggregated, replicas, split, colocated, and the names given with --arm.",
            metavar="ARMS",
            separator=",",
            unset="all",
        ),
    ] = ()
    mixes: Annotated[
        tuple[str, ...],
        Option(
            "Mixes of requests: text, mixed, images, heavy, repeats, burst.",
            metavar="MIXES",
            separator=",",
            unset="all; with --quick, mixed and heavy",
        ),
    ] = ()
    ttft_slo_factor: Annotated[
        float, Option("Limit of the time to first token, as a multiple of that on an idle machine.", min=1)
    ] = 5.0
    tpot_slo_factor: Annotated[
        float, Option("Limit of the time per output token, as a multiple of that on an idle machine.", min=1)
    ] = 3.0
    ttft_slo: Annotated[
        float | None,
        Option(
            "Limit of the time to first token of every request.", metavar="SECONDS", min=0.001, unset="by the factor"
        ),
    ] = None
    tpot_slo: Annotated[
        float | None,
        Option(
            "Limit of the time per output token of every request.", metavar="SECONDS", min=0.001, unset="by the factor"
        ),
    ] = None
    rate: Annotated[
        float | None,
        Option(
            "Requests per second at which all deployments are tried, in place of a search for the highest rate.",
            metavar="RATE",
            min=0.001,
            unset="searched",
        ),
    ] = None
    budget: Annotated[
        float | None,
        Option(
            "Longest time of the measurement; rounds that don't fit are left out.",
            metavar="SECONDS",
            min=60,
            unset="2400, with --quick 180; over vLLM 4800 and 900",
        ),
    ] = None
    model: str | None = None
    """The checkpoint that a person asked for; None: a synthetic one."""
    more_arms: Mapping[str, DeploymentConfig] = field(default_factory=dict)
    """Other deployments by name. Their model is replaced by the one that is measured."""
