"""Signals that ask a command to end."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

_ASKED_TO_END = ("SIGINT", "SIGTERM", "SIGHUP")


class EndSignals:
    """While entered, records the signals that ask for an end instead of letting them end the process.

    A loop checks ``received``: an exception, which a signal could raise anywhere, would interrupt the clean-up too.
    """

    def __init__(self, *, has_parent: bool = False) -> None:
        """With ``has_parent`` SIGTERM counts once, as it does for :class:`chiasm.http.serve.HttpServer`."""
        self._has_parent = has_parent
        self.received: signal.Signals | None = None
        """The first one that arrived."""
        self.are_repeated = False
        """Whether more than one has arrived."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> EndSignals:
        for name in _ASKED_TO_END:
            number = getattr(signal, name, None)
            if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):  # nohup
                continue
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and not (self._has_parent and number == signal.SIGTERM):
            self.are_repeated = True
        self.received = self.received or signal.Signals(number)
