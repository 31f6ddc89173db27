"""The command ``vllm``, except that its processes are forks: only the first imports vLLM, which takes ten seconds of a core.

On a CPU vLLM has each process import everything again, whatever ``VLLM_WORKER_MULTIPROC_METHOD`` says. The files that test
``chiasm serve`` and the examples run ``vllm`` as it is.
"""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.context import BaseContext

from vllm.utils import system_utils


def _fork() -> BaseContext:
    return multiprocessing.get_context("fork")


if __name__ == "__main__":
    system_utils.get_mp_context = _fork  # before another module imports it
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
