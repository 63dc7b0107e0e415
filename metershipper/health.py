"""Whether usage is being delivered, as one object that others may ask: ready or not, why not, and since when.

Only keeps what it is told; never decides, logs or waits.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Health:
    """Ready until told otherwise. `since`: seconds of a monotonic clock, when the state began; `reason`: in words."""

    reason: str | None = None
    since: float = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether nothing is known that keeps usage from being delivered."""
        return self.reason is None

    def trouble(self, reason: str, now: float) -> None:
        """Usage can't be delivered; the time is that of the first such word in a row, the reason the latest."""
        if self.reason is None:
            self.since = now
        self.reason = reason

    def recovered(self, now: float) -> None:
        """Usage is delivered again."""
        if self.reason is not None:
            self.reason, self.since = None, now
