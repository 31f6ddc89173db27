"""For all tests."""

from __future__ import annotations

import os

# Tiny models run fastest on one thread, above all beside other processes. Read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
