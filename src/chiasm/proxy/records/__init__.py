"""One record of each request: where its time went, at all instances, on one clock.

``trail`` notes instants while a request is answered, which is all that a request pays for; ``record`` is what is kept of it
afterwards, and ``ring`` keeps a bounded number. Only when somebody looks, ``spans`` makes spans of a record, ``critical`` finds
which of them its first token waited for, and ``pages`` and ``trace_file`` show it.
"""
