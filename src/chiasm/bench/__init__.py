"""``chiasm bench``: starts the topologies that it compares, sends them the same seeded requests, and says what came out.

A run's way: ``run`` (names to measurements, one after the other) → ``measurements/`` (one file each) → ``topology`` and
``balance`` (what is measured), ``pictures``, ``prompts`` and ``arrivals`` (what is sent, and when), ``client`` (what is
seen) → ``statistics`` → ``outcome`` → ``report`` and ``plot``.
"""
