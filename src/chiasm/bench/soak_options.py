"""What a person chooses for ``soak``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from chiasm.options import Option


@dataclass(frozen=True)
class SoakOptions:
    """What a person chooses for ``soak``."""

    minutes: Annotated[
        float | None, Option("How long clients of all kinds ask.", min=0.1, unset="5; with --quick, 0.2")
    ] = None
    url: Annotated[
        str | None,
        Option(
            "A proxy that runs on this machine; its instances are watched as far as they run here too.",
            metavar="URL",
            unset="a deployment of its own",
        ),
    ] = None
