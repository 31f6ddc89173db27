"""What is wrong with a deployment, in plain words, and what to do about it. ``chiasm doctor`` shows it.

``planned`` looks at this machine and at a deployment that is to run on it, by ``installed``, ``machine``, ``checkpoint`` with
``weights``, ``storage`` and ``transports``. ``running`` asks a proxy and its instances (``instances``, by ``client``), compares
them (``fleet``), and sends an image on its way (``travel``, by ``wire`` and ``counters``). All of them yield the findings of
``base``, which ``report`` shows.
"""

from chiasm.doctor.base import Finding, Verdict, has_problem

__all__ = ["Finding", "Verdict", "has_problem"]
