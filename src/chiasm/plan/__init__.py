"""``chiasm plan``: how many instances of which role, and which layout, by simulating candidates before anything is bought.

A plan passes ``run`` (what is asked), ``devices`` and ``shapes`` (what there is), ``costs`` with ``roofline`` or
``calibration`` (what work takes), ``layouts`` (what could be started), ``search`` (how each does) and ``report`` with ``plot``.
``simulation`` is one trial: ``placing`` is the proxy in it, ``language`` and ``encoder`` are the instances, ``sharing`` the
devices, ``store`` the embeddings, ``events`` the clock and ``outcome`` the result. ``check`` compares simulated rates with
measured ones, for a machine as fast as ``speed`` finds it was.
"""
