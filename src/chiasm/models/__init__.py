"""What chiasm needs of a checkpoint: processor, vision encoder, language model, each loaded apart.

Names are imported when they are first used, so that ``chiasm.models.base`` and the fingerprint need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chiasm.models.folder import resolve_folder
    from chiasm.models.identity import fingerprint
    from chiasm.models.language import load_language
    from chiasm.models.processor import load_processor
    from chiasm.models.vision import load_vision

__all__ = ["fingerprint", "load_language", "load_processor", "load_vision", "resolve_folder"]

_MODULES = {
    "fingerprint": "identity",
    "load_language": "language",
    "load_processor": "processor",
    "load_vision": "vision",
    "resolve_folder": "folder",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
