"""``chiasm bench``: starts the topologies that it compares, sends them the same seeded requests, and reports what it measured.

A run passes ``run`` (the chosen measurements, one after the other) → ``measurements/`` (one question each) → ``topology``,
``servers`` and ``checkpoints`` (what is measured) → ``requests`` and ``load`` (what is sent, and when) → ``client`` (what the
client sees) and ``reference`` (what transformers answers) → ``statistics`` → ``measurement`` (the interface and the result) →
``report`` and ``plot``. ``synthetic`` makes random checkpoints, for tests too.

``goodput`` and ``trace`` pass ``goodput_options`` (what is compared) → ``comparison`` (with its ``budget``) → ``arms`` and
``running_arms`` → ``traffic`` and ``trial`` → ``alone`` (the limits), ``goodput`` and ``fixed_rate`` (what trials mean) →
``goodput_outcome`` and ``goodput_curves``. ``soak`` has ``soak_options``, clients that are ``strangers``, and ``holdings``
whose ``trend`` it watches; ``churn`` and ``burst`` are requests to fleets that change. ``arrivals`` and ``memory_handoff``
measure connectors with what is in ``handed_over``. ``routing``, ``scaling`` and ``several_proxies`` are simulations, in
``simulated_time``.
"""
