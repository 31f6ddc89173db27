"""For all tests."""

from __future__ import annotations

import os

# Tiny models run fastest on one thread, above all beside other processes. Read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # the environment of vLLM runs only the tests in tests/vllm
    pass
else:
    # How long an example takes says how busy the machine is, not whether the code is right.
    settings.register_profile("chiasm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("chiasm")
