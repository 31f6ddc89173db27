"""A request in the trace event format of Chrome, which Perfetto and chrome://tracing open."""

from __future__ import annotations

from chiasm.proxy.records.info import RecordInfo
from chiasm.proxy.records.spans import PROXY

_MICROSECONDS = 1e6


def trace_of(record: RecordInfo) -> dict[str, object]:
    """Return the trace: each instance is a process, and each image a thread of it, so that spans of a thread don't overlap."""
    processes = {PROXY: 1}
    threads: set[tuple[int, int]] = set()
    events: list[dict[str, object]] = []
    rows = [("", 1, span) for span in record.spans] + [("critical", 0, span) for span in record.critical_path]
    for category, shift, span in rows:
        process = processes.setdefault(span.where, len(processes) + 1) if shift else 0
        thread = 0 if span.item is None or not shift else span.item + 1
        threads.add((process, thread))
        events.append(
            {
                "name": span.name,
                "cat": category or ("wait" if span.is_wait else "work"),
                "ph": "X",
                "ts": (record.arrived + span.start) * _MICROSECONDS,
                "dur": (span.end - span.start) * _MICROSECONDS,
                "pid": process,
                "tid": thread,
                "args": {} if span.item is None else {"item": span.item},
            }
        )
    names = {number: where for where, number in processes.items()} | {0: "critical path"}
    labels: list[dict[str, object]] = [
        _label("process_name", number, 0, name) for number, name in sorted(names.items())
    ]
    labels += [
        _label("thread_name", process, thread, f"image {thread}" if thread else "request")
        for process, thread in sorted(threads)
    ]
    return {
        "traceEvents": labels + events,
        "displayTimeUnit": "ms",
        "otherData": {"id": record.id, "path": record.path, "status": record.status},
    }


def _label(kind: str, process: int, thread: int, name: str) -> dict[str, object]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
