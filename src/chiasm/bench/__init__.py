"""``chiasm bench``: starts the topologies that it compares, sends them the same seeded requests, and says what came out.

A run's way: ``run`` (names to measurements, one after the other) → ``measurements/`` (one file each) → ``topology``,
``checkpoints`` and ``alone`` (what is measured), with ``vllm``, ``example`` and ``served`` for what runs over vLLM →
``images``, ``requests``, ``prompts``, ``arrivals`` and ``streams`` (what is sent, and when) → ``client``, ``answers``,
``counting`` and ``handover_gap`` (what is seen) → ``statistics`` → ``outcome`` → ``report`` and ``plot``.
"""
