"""The OpenAI-compatible HTTP API of one instance.

A request's way: ``app`` (path) → ``exchange`` (identity, deadline, body, disconnect) → ``chat`` or ``completions``
(``protocol``: fields; ``media`` and ``prompts``: the prompt; ``sampling``; ``stages``: which part of the answer is made
here) → ``answer`` → ``generation`` (the engine) → ``streaming`` and ``chunks``, or one body. On an encoder ``chat`` leads to
``encode``.
"""

from typing import TYPE_CHECKING

from chiasm.lazy import names_from
from chiasm.server.config import ServerConfig

if TYPE_CHECKING:
    from chiasm.server.app import create_app
    from chiasm.server.process import run

__all__ = ["ServerConfig", "create_app", "run"]
__getattr__ = names_from(__name__, {"create_app": "app", "run": "process"})
