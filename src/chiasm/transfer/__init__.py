"""The transfer plane: bounded memory that one process offers and others read, under both the EC and the KV plane.

``memory.py`` is the interface of data planes, which move bytes and decide nothing: ``shared_memory.py``, ``tcp.py`` and
``nixl.py``. ``memory_file.py`` is memory that other processes can map, and ``arena.py`` allocates pieces of it. ``channel.py``
carries the messages by which a reader asks for permission; which messages these are is the matter of each plane.
``listener.py`` is where a holder takes readers, ``greeting.py`` what both check of each other first, and ``errors.py`` what
goes wrong between them. Nothing here knows of embeddings, KV or engines, and nothing loads torch.
"""
