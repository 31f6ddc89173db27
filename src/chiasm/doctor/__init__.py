"""``chiasm doctor``: checks of a machine, a planned deployment or a running one, and what to do about what they find.

``planned`` checks this machine and a deployment that is to run on it: ``machine``, ``model``, ``storage``, ``store``,
``transports``. It calls the same functions that let a deployment refuse to start. ``running`` asks a proxy and its instances
how they are (``observed``, by ``client``), compares the instances (``fleet``), shows what work costs them (``costs``), and
sends images through them (``end_to_end``, by ``messages``). Each check yields results, which ``report`` prints.
"""

from chiasm.doctor.report import Result, Verdict, has_problem

__all__ = ["Result", "Verdict", "has_problem"]
