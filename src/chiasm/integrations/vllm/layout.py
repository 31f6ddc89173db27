"""What a model's entries look like, and whether one fits the place that a prompt has for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chiasm.ec_transfer.entry_file import EntryHeader, dtype_of
from chiasm.integrations.vllm.identity import dtype_name


@dataclass(frozen=True)
class Layout:
    """Entries are ``[rows, width]``: one row for each embedding in the prompt, DeepStack levels side by side.

    Sounds have no levels, and are ``hidden`` wide. ``dtype`` is the model's, by torch's name (``"bfloat16"``). An entry that
    does not fit would stop vLLM's engine where the model takes it in, so it is looked at before it is promised.
    """

    hidden: int
    levels: int
    dtype: str

    @property
    def width(self) -> int:
        return self.hidden * (1 + self.levels)

    @classmethod
    def of(cls, model_config: Any) -> Layout:
        """Of vLLM's ``ModelConfig``."""
        vision = getattr(model_config.hf_config, "vision_config", None)
        levels = getattr(vision, "deepstack_visual_indexes", None) or ()
        return cls(int(model_config.get_inputs_embeds_size()), len(levels), dtype_name(model_config))

    def misfit(self, header: EntryHeader, rows: int) -> str | None:
        """Why the entry cannot stand for ``rows`` embeddings of this model; None if it can."""
        if len(header.shape) != 2 or header.shape[0] != rows:
            return f"its entry has the shape {list(header.shape)}, and the prompt has places for {rows} rows"
        if header.shape[1] not in (self.width, self.hidden):
            return f"its entry's rows have {header.shape[1]} values, and the model's {self.width}"
        dtype = str(dtype_of(header)).removeprefix("torch.")
        return None if dtype == self.dtype else f"its entry is {dtype}, and the model {self.dtype}"
