"""chiasm inside vLLM: what vLLM loads by name.

- ``plugin.py`` runs first in each of vLLM's processes.
- ``middleware.py`` wraps vLLM's HTTP server. A completion passes it first; ``bodies.py`` is what it does to its body, with
  ``named_images.py`` for APIs that can't name an image, ``health.py`` what it answers to /health, ``membership.py`` how it
  joins proxies, ``shutdown.py`` how the server ends, and ``engines.py`` what it asks vLLM's engines, and ``load.py`` what they
  have to do. ``work.py`` counts that in the engines. ``stages.py`` tells where a request's time went, with ``pooling_times.py``
  for prompts that are pooled. The engines add how long it waited for embeddings (``waits.py``) and what its prompt cost
  (``prompt_work.py``) to its outputs (``outputs.py``). ``calibration.py`` measures at start what work costs.
- ``ec_connector.py`` is the EC connector. vLLM makes one beside its scheduler, which passes calls on to ``scheduler.py``, and
  one in each worker, which passes them on to ``worker.py``. ``messages.py`` is what the two send each other with each step.
- ``items.py`` is what the scheduler half remembers of requests and their items, ``engine_hooks.py`` where it takes part in
  decisions of vLLM's that the connector's interface doesn't cover. ``settings.py`` is the configuration, ``metrics.py`` the
  counters.

Only ``ec_connector.py``, ``engine_hooks.py`` and ``metrics.py`` need vLLM in order to be imported. The rest of chiasm names
these modules on vLLM's command line, and imports nothing from here but ``check_version``.
"""

from __future__ import annotations

import re

from chiasm.errors import ConfigurationError

__all__ = ["check_version"]

_SUPPORTED = ("0.32", "0.33")


def check_version(version: str) -> None:
    """Raise ConfigurationError unless this version of vLLM has the connector interface that is used here."""
    match = re.match(r"\d+\.\d+(?=\.|$)", version)
    if match is None or match[0] not in _SUPPORTED:
        raise ConfigurationError(
            f"ChiasmECConnector works with vLLM {' and '.join(_SUPPORTED)}, but vLLM {version} is installed. The interface of "
            "EC connectors changes from release to release: install one of those, or a newer chiasm."
        )
