"""The connector, with faults where a test wants them: entries are harmed at a chosen point of a step.

A test puts a file ``<identifier>.<point>.<harm>`` into the folder of ``FAULTS``; it is taken away when the fault has happened.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from chiasm.ec_transfer.shared_storage import SharedStorageMetadata
from chiasm.integrations.vllm.ec_connector import ChiasmECConnector

FAULTS = "CHIASM_TEST_FAULTS"
ASKED = "asked"
"""A file there, as long as the number of times that vLLM has asked whether a request can run."""
POINTS = ("seen", "promised", "allocated", "planned", "loading")
HARMS = ("removed", "empty", "cut-off")


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
            # As for a worker on another host, which cannot open what the scheduler keeps.
            return replace(metadata, loads=SharedStorageMetadata(loads))
        return metadata

    def start_load_caches(self, encoder_cache: Any, **kwargs: Any) -> None:
        self._harm("loading")
        super().start_load_caches(encoder_cache, **kwargs)

    def _harm(self, point: str, among: Collection[str] | None = None) -> bool:
        """Do what was ordered for this point, to one of these entries; whether there was anything to do."""
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
