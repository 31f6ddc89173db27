"""Where instances come from besides options and leases: the arguments of ``--discover``.

``base`` has the interface. ``file`` and ``dns`` list instances by themselves; ``kubernetes`` watches an API server, and
``endpoint_slices`` reads what it says. ``sources`` makes a source of an argument, and runs them all.
"""
