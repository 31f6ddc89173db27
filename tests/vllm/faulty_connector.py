"""The connector with faults: it harms an entry at a chosen point of a step.

A test orders a fault by a file ``<identifier>.<point>.<harm>`` in the folder that the variable ``FAULTS`` names; the file is
removed when the fault has happened.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from chiasm.integrations.vllm.ec_connector import ChiasmECConnector
from tests.integrations.vllm.engine import far

from .processes import ASKED, FAULTS


class FaultyECConnector(ChiasmECConnector):
    """Named through ``ec_connector_module_path`` in place of ChiasmECConnector."""

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        with (Path(os.environ[FAULTS]) / ASKED).open("ab") as asked:
            asked.write(b".")
        available = super().ensure_cache_available(request, num_computed_tokens)
        if available:
            self._harm("seen")
        return available

    def has_cache_item(self, identifier: str) -> bool:
        found = super().has_cache_item(identifier)
        self._harm("promised")
        return found

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        super().update_state_after_alloc(request, index)
        self._harm("allocated")

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        metadata = super().build_connector_meta(scheduler_output)
        loads = metadata.loads.loads
        self._harm("planned", among=loads)
        if self._harm("out-of-reach", among=loads):
            return far(metadata)
        return metadata

    def start_load_caches(self, encoder_cache: Any, **kwargs: Any) -> None:
        self._harm("loading")
        super().start_load_caches(encoder_cache, **kwargs)

    def _harm(self, point: str, among: Collection[str] | None = None) -> bool:
        """Do what was ordered for this point to one of these entries; return whether anything was."""
        folder = self._vllm_config.ec_transfer_config.ec_connector_extra_config["shared_storage_path"]
        for fault in Path(os.environ[FAULTS]).glob(f"*.{point}.*"):
            identifier, _, harm = fault.name.split(".")
            entry = Path(folder) / f"{identifier}.safetensors"
            if entry.exists() and (among is None or identifier in among):
                fault.unlink()
                do_harm(entry, harm)
                return True
        return False


def do_harm(entry: Path, harm: str) -> None:
    if harm == "removed":
        entry.unlink()
    else:
        os.truncate(entry, 0 if harm == "empty" else 4096 + 64)
