"""The front door: speaks the OpenAI API to clients, and sends text to PD, or to P and D, and pixels to encoders.

A request passes the files in this order: ``app`` (routes), ``gateway`` (bounds), ``exchange`` (its body in, its answer
out), ``request`` (parse), ``way`` (what happens to it, from here to the end), ``items`` (fetch, inspect, name), ``fleet``
(choose), ``encode`` (pixels to encoders), ``language`` (text to PD), ``handover`` (text to P, and what comes of it to D),
``relay`` (a stream back).
"""

from typing import TYPE_CHECKING

from chiasm.lazy import names_from
from chiasm.proxy.config import ProxyConfig

if TYPE_CHECKING:
    from chiasm.proxy.app import create_app
    from chiasm.proxy.serve import run

__all__ = ["ProxyConfig", "create_app", "run"]
__getattr__ = names_from(__name__, {"create_app": "app", "run": "serve"})
