"""``python -m tests.fuzz TARGET``: runs one target until Ctrl-C, or for ``--seconds``; what it finds is kept in ``--corpus``.

An input that fails is written to the corpus folder as ``crash-…``, and runs again with ``--input``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

import atheris

TARGETS = ("image_header", "entry_file", "channel")
_INSTRUMENTED = ["chiasm.media", "chiasm.ec_transfer.entry_file", "chiasm.transfer", "chiasm.kv_transfer.messages"]
_LONGEST_BYTES = 16384
_SLOW_SECONDS = 30
"""An input that takes longer is a fault, on a busy machine too."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=0)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--input", type=Path)
    options = parser.parse_args()
    with atheris.instrument_imports(include=_INSTRUMENTED):
        target = importlib.import_module(f"tests.fuzz.targets.{options.target}")
    corpus = options.corpus or Path(tempfile.mkdtemp(prefix=f"chiasm-fuzz-{options.target}-"))
    corpus.mkdir(parents=True, exist_ok=True)
    for index, data in enumerate(target.seeds()):
        target.take(data)
        (corpus / f"seed-{index}").write_bytes(data)
    flags = [f"-max_len={_LONGEST_BYTES}", f"-timeout={_SLOW_SECONDS}", f"-artifact_prefix={corpus}/"]
    if options.seconds:
        flags.append(f"-max_total_time={options.seconds}")

    def one(data: bytes) -> None:
        target.take(data)

    atheris.Setup([sys.argv[0], *flags, str(options.input or corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
