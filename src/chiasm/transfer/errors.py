"""What goes wrong between a holder and a reader."""

from __future__ import annotations


class TransferError(Exception):
    """Bytes could not be transferred. ``str(error)`` is a clause without full stop that can follow "Could not fetch KV: "."""
