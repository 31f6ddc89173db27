"""What all requests share."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

from chiasm.media import Fetcher
from chiasm.proxy.config import ProxyConfig
from chiasm.proxy.encode import Encoders
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.language import LanguageInstances
from chiasm.proxy.metrics import Metrics


@dataclass(frozen=True)
class Services:
    """The parts of a running proxy that a request's way leads through."""

    config: ProxyConfig
    fleet: Fleet
    metrics: Metrics
    fetcher: Fetcher
    executor: Executor
    encoders: Encoders
    language: LanguageInstances
