"""The command line: one file per command, none of which imports torch before it needs it.

``app`` finds the command, ``parser`` makes its options of the configurations' fields, and the command's own file runs it.
"""

from chiasm.cli.app import main

__all__ = ["main"]
