"""The OpenAI-compatible HTTP API of one instance.

``process`` runs it from its ``config``, ``app`` has its routes, ``context`` what all requests share. A request passes these
files in order: ``completions`` (the two handlers), ``protocol`` (its body), ``prefill_decode`` (which part of the answer is
made here), ``tools``, ``json_schema`` and ``structured_output`` (what the answer must look like), ``images`` and ``prompt``
(what the engine reads), ``sampling``, ``generation`` (the engine's outputs), ``answer`` (one body or a stream),
``answer_format`` (its JSON), and ``tool_answer`` with ``tool_calls`` (the same with calls of tools). On an encoder, ``encode``
does all of it. ``status`` and ``metrics`` are the other endpoints; the proxy says with ``places`` where embeddings are, and
hears from ``losses`` which are lost; it says with ``kv_release`` that nobody will come for KV. ``joining`` keeps the instance
in the fleets of its proxies, under the URL that ``advertise`` finds, and ``drain`` takes it down.
"""

from typing import TYPE_CHECKING

from chiasm.lazy import names_from
from chiasm.server.config import ServerConfig

if TYPE_CHECKING:
    from chiasm.server.app import create_app
    from chiasm.server.process import run

__all__ = ["ServerConfig", "create_app", "run"]
__getattr__ = names_from(__name__, {"create_app": "app", "run": "process"})
