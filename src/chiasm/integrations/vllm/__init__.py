"""chiasm inside vLLM: what vLLM loads by name. Nothing of chiasm imports this package, and importing chiasm no vLLM.

``ec_connector.py`` is the class that vLLM asks for, ``scheduler_half.py`` and ``worker_half.py`` what it does in the two
processes, ``step.py`` what passes between them. ``encoder_cache.py`` and ``patience.py`` are the scheduler half's say in vLLM's
engine. ``middleware.py`` is what vLLM's HTTP server gets, ``plugin.py`` what each of vLLM's processes runs first.
"""
