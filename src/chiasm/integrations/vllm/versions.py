"""Which versions of vLLM the connector is written for."""

from __future__ import annotations

import re

from chiasm.errors import ConfigurationError

_SUPPORTED = ("0.32", "0.33")


def check_version(version: str) -> None:
    """Raise ConfigurationError for a version whose connector interface is not known to be the one used here."""
    match = re.match(r"\d+\.\d+(?=\.|$)", version)
    if match is None or match[0] not in _SUPPORTED:
        raise ConfigurationError(
            f"ChiasmECConnector works with vLLM {' and '.join(_SUPPORTED)}, and this is {version}. The interface of EC "
            "connectors changes from release to release: install one of those, or a newer chiasm."
        )
