"""What chiasm needs of a checkpoint: its processor, its vision encoder and its language model, each loaded separately.

``base`` holds the interfaces. ``checkpoint`` finds the files, ``support`` refuses what would run wrongly, ``loading`` reads the
weights of one part. ``processor`` (with ``chat`` and ``tool_format``) and ``adapter`` implement the interfaces on top of
transformers, with ``special_words`` and ``token_bytes`` (what tokens mean), and ``families`` holds what differs between
families of models. ``identity`` names everything that embeddings depend on.

``decoder`` and ``tower`` compute the two parts faster than transformers does on a CPU: with ``products`` of fixed weights, by
oneDNN or ``zendnn``, with ``experts`` of mixtures, and with ``dot_product_attention``.

Names are imported when they are first used, so that ``chiasm.models.base`` and the fingerprint don't load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.lazy import names_from

if TYPE_CHECKING:
    from chiasm.models.adapter import load_language, load_vision
    from chiasm.models.checkpoint import resolve_folder
    from chiasm.models.identity import fingerprint
    from chiasm.models.processor import load_processor

__all__ = ["fingerprint", "load_language", "load_processor", "load_vision", "resolve_folder"]

__getattr__ = names_from(
    __name__,
    {
        "fingerprint": "identity",
        "load_language": "adapter",
        "load_processor": "processor",
        "load_vision": "adapter",
        "resolve_folder": "checkpoint",
    },
)
