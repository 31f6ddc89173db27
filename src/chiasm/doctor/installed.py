"""Checks of what is installed in the environment that chiasm runs in."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

from chiasm import __version__
from chiasm.doctor.base import Check, Finding
from chiasm.doctor.fleet import vllm_refusal
from chiasm.errors import ConfigurationError

_VERSIONS = Check("versions")
_VLLM = Check("vLLM")
_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers")


def version_of(package: str) -> str:
    """Empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def versions() -> Iterator[Finding]:
    found = {name: version_of(name) for name in _PACKAGES}
    if missing := [name for name, version in found.items() if not version]:
        yield _VERSIONS.problem(
            f"{', '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed",
            why="instances of the built-in engine cannot start.",
            do="install chiasm with what it needs.",
            command="pip install --upgrade chiasm",
        )
    named = [f"{name} {version}" for name, version in found.items() if version]
    yield _VERSIONS.ok(", ".join([f"chiasm {__version__}", f"python {platform.python_version()}", *named]))


def vllm(wanted: bool) -> Iterator[Finding]:
    """``wanted``: whether a planned deployment runs it."""
    version = version_of("vllm")
    if not version and not wanted:
        yield _VLLM.skipped("it is not installed; only --engine vllm needs it")
        return
    if version and (refused := vllm_refusal(version)):
        make = _VLLM.problem if wanted else _VLLM.warning
        yield make(
            f"version {version} is installed",
            why=refused,
            do="install a version that is supported.",
            command="make vllm",
        )
        return
    if wanted:
        from chiasm.launch.vllm import installed

        try:
            installed()
        except ConfigurationError as error:
            yield _VLLM.problem(
                "it is not to be found beside chiasm", why=error.message, do="install it there.", command="make vllm"
            )
            return
    yield _VLLM.ok(f"version {version}, which chiasm's connector is made for")
