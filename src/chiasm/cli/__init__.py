"""The command line: one file per command, none of which imports torch before it needs it."""

from __future__ import annotations

from chiasm.cli.app import main

__all__ = ["main"]
