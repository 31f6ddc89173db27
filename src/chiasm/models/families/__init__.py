"""The model families that chiasm supports, one file each; ``base`` says what a family has to define."""

from __future__ import annotations

from chiasm.models.families.base import Family, ProcessorParts
from chiasm.models.families.idefics3 import Idefics3
from chiasm.models.families.internvl import InternVL
from chiasm.models.families.llava import Llava
from chiasm.models.families.qwen_vl import QwenVL

__all__ = ["FAMILIES", "Family", "ProcessorParts"]

FAMILIES: dict[str, type[Family]] = {
    name: family for family in (QwenVL, Idefics3, InternVL, Llava) for name in family.model_types
}
"""By ``model_type``."""
