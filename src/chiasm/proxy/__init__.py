"""The front door: speaks the OpenAI API to clients, and sends text to language instances and images to encoders.

A request passes the files in this order: ``app`` (routes), ``service`` (from the first byte to the last), ``request`` (parse),
``job`` (what it carries from here on), ``routing`` (what happens to it), ``request_images`` (what happens to its images),
``media`` (fetch, inspect, name), ``stored_embeddings`` (what the shared cache has), ``encoders`` (images to encoders) with
``flights`` and ``hedging`` (a second encoder for a late image), ``balancing`` (which instance gets the text), ``handover`` and
``handover_engines`` (from prefill to decode), ``kv_releases`` (KV that nobody will come for), ``relay`` (a stream back).
``key_check`` asks instances about the client's key before any of this, and ``tenants`` keeps clients apart. All calls of
instances go through ``upstream``; ``waiting`` holds requests whose instances are away or full. Beside it run ``probe``, which
asks instances how they are, and ``fleet``, which holds what each ``instance`` said; ``agreement`` decides which of them fit
together. ``membership`` decides who belongs to the fleet, from what the options, an administrator, ``leases`` (instances that
join) and ``discovery`` (files, DNS, Kubernetes) say. ``drain`` takes an instance down.

Requests that the proxy doesn't understand and passes on are in ``other_paths``. ``siblings`` are the other workers of a proxy
that has several. ``process`` runs one, ``config`` is what it is made from, and ``metrics`` counts.

``placement`` decides which instance gets a request or an image, from ``costs`` (what work costs each), ``prompts`` (what a
language instance has to do) and ``encode_queue`` (the images that wait); ``placement_record`` compares with the outcome.
``encode_plan`` has the rule by which an encoder is chosen, with ``rendezvous`` (which one an image prefers) and ``published``
(which ones have it); ``encoder_demand`` says how many encoders there should be. ``places`` tells language instances where
embeddings are; ``lost_embeddings`` finds those that are gone, and ``loss_news`` has the instances say when. ``memory`` gives
back the memory of requests that have ended. ``records`` keeps where the time of each request went, and shows it.
"""

from typing import TYPE_CHECKING

from chiasm.lazy import names_from
from chiasm.proxy.config import ProxyConfig

if TYPE_CHECKING:
    from chiasm.proxy.app import create_app
    from chiasm.proxy.process import run

__all__ = ["ProxyConfig", "create_app", "run"]
__getattr__ = names_from(__name__, {"create_app": "app", "run": "process"})
