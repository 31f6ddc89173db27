"""One record of each request: where its time went, at all instances, on one clock.

``trail`` notes instants while a request is answered, which is all that a request pays for; ``record`` is what is kept of it
afterwards, ``stages`` sums up if somebody asks, and ``ring`` keeps a bounded number. Only when somebody looks, ``spans``
makes spans of a record, ``critical`` finds which of them its first token waited for, ``info`` is all of it, and ``pages`` and
``trace_file`` show it.

``trace_context`` reads of which trace a client says that its request is part, and tells instances. If ``tracing`` is given a
collector, ``otlp`` exports there what ``otel_spans`` makes of the spans of requests that have ended.
"""
