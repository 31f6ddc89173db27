"""Fuzzers: whatever bytes come, they are taken or refused by name.

``targets/`` has one file for each kind of bytes, each with ``seeds()``, inputs to begin with, and ``take(data)``, which says
whether they were understood and raises only for a fault. ``__main__.py`` runs one of them, ``test_targets.py`` all of them for
seconds. ``test_http.py`` sends random requests to a server and to a proxy in front of it.
"""
