"""The front door: speaks the OpenAI API to clients, and sends text to PD and pixels to encoders.

A request passes the files in this order: ``app`` (routes), ``exchange`` (one request and its answer), ``admission``
(bounds), ``request`` (parse), ``items`` (fetch, inspect, name), ``fleet`` (choose), ``encode`` (pixels to encoders),
``language`` (text to PD), ``relay`` (the answer back). ``gateway`` is the way itself, from one to the next.
"""

from chiasm.proxy.app import create_app
from chiasm.proxy.config import ProxyConfig
from chiasm.proxy.serve import run

__all__ = ["ProxyConfig", "create_app", "run"]
