"""What the HTTP front of every server of chiasm can be told: who may use it, and what it logs and adds to streams."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from chiasm.options import Option


@dataclass(frozen=True)
class HttpConfig:
    """The settings of a front door. Those of CORS and of API keys have vLLM's names, forms and defaults."""

    allowed_origins: Annotated[
        tuple[str, ...],
        Option("Origins whose web pages may use the API.", json_list='["https://example.com"]', unset="none"),
    ] = ()
    allowed_methods: Annotated[
        tuple[str, ...],
        Option("Methods that these web pages may use.", json_list='["GET","POST"]'),
    ] = ("*",)
    allowed_headers: Annotated[
        tuple[str, ...],
        Option("Headers that these web pages may send.", json_list='["Authorization"]'),
    ] = ("*",)
    allow_credentials: Annotated[bool, Option("Let these web pages send cookies and the like.")] = False
    api_key: Annotated[
        tuple[str, ...],
        Option(
            "Bearer token that requests below /v1 must have; can be repeated, and each is enough.",
            metavar="KEY",
            environment="CHIASM_API_KEY",
        ),
    ] = field(default=(), repr=False)
    api_key_file: Annotated[
        Path | None, Option("File with such keys, one a line; other users of the machine don't see them there.")
    ] = None
    access_log: Annotated[bool, Option("Log one line for every request.")] = False
    timing_comments: Annotated[
        str,
        Option(
            "Whether streams contain timing, in lines that begin with a colon; the header X-Timing-Comments of a request "
            "overrides it.",
            choices=("on", "off"),
        ),
    ] = "on"

    @property
    def needs_key(self) -> bool:
        """Whether requests need an API key."""
        return bool(self.api_key) or self.api_key_file is not None
