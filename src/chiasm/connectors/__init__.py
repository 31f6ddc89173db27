"""What the connectors of both planes, embeddings (EC) and KV, have in common. Importing this loads no connector.

``factory.py`` finds them by name, ``extra_config.py`` reads the settings that only one of them understands, and ``faults.py``
is for engines: it logs what a connector raises that it shouldn't.
"""
