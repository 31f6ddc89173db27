"""The clock of the simulation: what happens next, and the work on devices, whose end moves with what else runs there."""

from __future__ import annotations

from collections.abc import Callable

from chiasm.bench.simulated_time import SimulatedTime
from chiasm.errors import ConfigurationError
from chiasm.plan.sharing import SharedDevice, Work

MAX_EVENTS = 50_000_000


class Events(SimulatedTime):
    """Simulated time, and the devices that work in it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        """Events so far."""
        self._versions: dict[SharedDevice, int] = {}

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        """Call ``event`` when so much time has passed."""
        self.at(self.now + seconds, event)

    def begin(self, device: SharedDevice, work: Work) -> None:
        """Start work on a device, now."""
        self._settle(device)
        device.start(work, self.now)
        self._watch(device)

    def run(self) -> None:
        """Let everything happen. Raises ConfigurationError if that doesn't end."""
        while self.step():
            self.count += 1
            if self.count > MAX_EVENTS:
                raise ConfigurationError(
                    f"The simulation has not ended after {MAX_EVENTS} events; give fewer requests, or shorter answers."
                )

    def _settle(self, device: SharedDevice) -> None:
        """End the work of a device that is done by now."""
        while ended := device.advance(self.now):
            for work in ended:
                work.ended()

    def _watch(self, device: SharedDevice) -> None:
        """Come back when the next work of a device will be done, unless something else changes that before."""
        version = self._versions[device] = self._versions.get(device, 0) + 1
        end = device.next_end()
        if end is None:
            return

        def come_back() -> None:
            if self._versions[device] == version:
                self._settle(device)
                self._watch(device)

        self.at(end, come_back)
