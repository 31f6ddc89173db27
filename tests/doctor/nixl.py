"""Whether NIXL is installed here."""

from __future__ import annotations

import importlib.util

from chiasm.transfer.nixl import MODULES

HAS_NIXL = any(importlib.util.find_spec(name) for name in MODULES)
