"""What chiasm needs of a checkpoint: processor, vision encoder, language model, each loaded apart.

Names are imported when they are first used, so that ``chiasm.models.base`` and the fingerprint need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.lazy import names_from

if TYPE_CHECKING:
    from chiasm.models.folder import resolve_folder
    from chiasm.models.identity import fingerprint
    from chiasm.models.language import load_language
    from chiasm.models.processor import load_processor
    from chiasm.models.vision import load_vision

__all__ = ["fingerprint", "load_language", "load_processor", "load_vision", "resolve_folder"]

__getattr__ = names_from(
    __name__,
    {
        "fingerprint": "identity",
        "load_language": "language",
        "load_processor": "processor",
        "load_vision": "vision",
        "resolve_folder": "folder",
    },
)
