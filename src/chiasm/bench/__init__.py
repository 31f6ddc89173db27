"""``chiasm bench``: starts the topologies that it compares, sends them the same seeded requests, and reports what it measured.

A run passes ``run`` (the chosen measurements, one after the other) → ``measurements/`` (one question each) → ``topology``,
``servers`` and ``checkpoints`` (what is measured) → ``requests`` and ``load`` (what is sent, and when) → ``client`` (what the
client sees) and ``reference`` (what transformers answers) → ``statistics`` → ``measurement`` (the interface and the result)
→ ``report`` and ``plot``. ``goodput`` and ``trace`` pass ``comparison`` (with its ``budget``) → ``arms`` and ``running_arms``
→ ``traffic`` and ``trial`` → ``goodput`` and ``fixed_rate`` (what trials mean). ``synthetic`` makes random checkpoints, for
tests too.
"""
