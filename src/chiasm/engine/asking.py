"""For which embeddings the EC connector has to be asked: for the one that has arrived, or for all that are needed.

To a connector, the order of asking is the order of need, and that of the last round counts. So a round asks for all that is
needed, in order. It is left out as long as it would tell the connector nothing new: then only what has arrived is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Set


class Asking:
    """What the connector was asked for in vain, and what has happened since."""

    def __init__(self) -> None:
        self._absent: dict[str, None] = {}
        """What the last round asked for in vain, in order; without what has been loaded or has arrived since."""
        self._arrived: set[str] = set()
        self._asks_all = False

    @property
    def is_due(self) -> bool:
        """Whether something has happened because of which the connector has to be asked."""
        return self._asks_all or bool(self._arrived)

    def note_arrival(self, identifier: str) -> None:
        """Note that an embedding has arrived."""
        self._arrived.add(identifier)

    def ask_all(self) -> None:
        """Have the next round ask for all that is needed."""
        self._asks_all = True

    def begin(self, needed: Iterable[str]) -> Set[str] | None:
        """Return which of the ``needed`` embeddings to ask for; None if it is all of them. What has happened is then forgotten.

        ``needed`` are those for which requests wait that aren't in memory, in the order of need.
        """
        arrived, self._arrived = self._arrived, set()
        asks_all, self._asks_all = self._asks_all, False
        names = dict.fromkeys(needed)
        knew = [name for name in self._absent if name in names]
        for identifier in arrived:  # even if it isn't loaded in this round: then it is asked for in a later one
            self._absent.pop(identifier, None)
        if asks_all or list(names) != knew:
            self._absent.clear()
            return None
        return arrived & names.keys()

    def is_absent(self, identifier: str) -> bool:
        """Whether the last round has asked for it in vain."""
        return identifier in self._absent

    def note_absent(self, identifier: str) -> None:
        """Note that a round that asks for all has asked for it in vain."""
        self._absent[identifier] = None

    def note_present(self, identifier: str) -> None:
        """Note that the connector has it. If it isn't loaded all the same, the next round asks for all again."""
        self._absent.pop(identifier, None)
