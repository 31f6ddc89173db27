"""The optional parts of an installation: extras in pyproject.toml, the packages that each brings, and how to install them.

The base runs the proxy and what watches it. Everything else says in one line, from here, what is missing.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from importlib.util import find_spec

from chiasm.errors import ConfigurationError


class Extra(enum.StrEnum):
    """The name of an extra."""

    ENGINE = "engine"
    """The built-in engine, its models and the demo."""
    BENCH = "bench"
    """Plots."""
    NIXL = "nixl"
    """NixlConnector."""
    ZEN = "zen"
    """ZenDNN, for AMD's CPUs."""
    VLLM = "vllm"
    """vLLM, for its instances; they need the engine, too."""
    OTEL = "otel"
    """Export of spans by OpenTelemetry."""


MODULES: Mapping[Extra, tuple[str, ...]] = {
    Extra.ENGINE: ("torch", "transformers", "tokenizers", "safetensors", "jinja2", "numpy", "xxhash", "llguidance"),
    Extra.BENCH: ("matplotlib",),
    Extra.NIXL: ("nixl",),
    Extra.ZEN: ("zentorch",),
    Extra.VLLM: ("vllm",),
    Extra.OTEL: ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"),
}
"""The modules that an extra brings and the base lacks. Those that include another's packages don't repeat them."""


def install_command(extra: Extra) -> str:
    """Return the command that installs an extra; it is run in a clone of chiasm, since chiasm is on no package index."""
    # In one step pip would find no llguidance that is new enough for the engine and old enough for vLLM's metadata.
    steps = (extra, Extra.ENGINE) if extra is Extra.VLLM else (extra,)
    return " && ".join(f"pip install '.[{step}]'" for step in steps)


def missing_modules(extra: Extra) -> list[str]:
    """Return the modules of an extra that are not installed."""
    return [name for name in MODULES[extra] if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False


def require(extra: Extra, user: str) -> None:
    """Raise ConfigurationError unless the modules of an extra are installed. ``user`` is what needs them."""
    if missing := missing_modules(extra):
        raise missing_error(extra, user, ", ".join(missing))


def missing_error(extra: Extra, user: str, names: str) -> ConfigurationError:
    """Return the error that says what to install. ``names`` are the missing modules."""
    verb = "are" if ", " in names else "is"
    return ConfigurationError(
        f"{user} needs {names}, which {verb} not installed. Run {install_command(extra)} in a clone of chiasm."
    )


def explained(error: ImportError, user: str) -> ConfigurationError | None:
    """Return the error for an import that failed because an extra is not installed; None for every other."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    missing = error.name or ""
    for extra, names in MODULES.items():
        for name in names:
            if missing == name or missing.startswith(f"{name}."):
                return missing_error(extra, user, name)
    return None
