"""How many posts may be under way at the same time, and from when on. Pure; the time is an argument.

Additive increase, multiplicative decrease (as TCP does it): a server that says it is overloaded is asked half as much
at once, and more again only as it accepts. So one that recovers is not run over by all that has waited.
"""

from dataclasses import dataclass, field

# Refusals of what was sent together count once: a server can't tell those apart that it got at the same time.
HALVE_AT_MOST_EVERY_SECONDS = 1.0


@dataclass(slots=True)
class Pace:
    """The limit of posts under way: at most `ceiling`, at least 1. Times are seconds of a monotonic clock."""

    ceiling: int
    hold_until: float = 0.0
    _limit: float = field(init=False)
    _may_halve_at: float = 0.0

    def __post_init__(self) -> None:
        self._limit = float(self.ceiling)

    @property
    def limit(self) -> int:
        """How many posts may be under way now."""
        return int(self._limit)

    def accepted(self) -> None:
        """A post was accepted: the limit grows by one for as many of them as it allows at a time."""
        self._limit = min(float(self.ceiling), self._limit + 1 / self._limit)

    def overloaded(self, now: float, wait_seconds: float) -> None:
        """The server said that it is overloaded; nobody sends for `wait_seconds`."""
        self.hold_until = max(self.hold_until, now + wait_seconds)
        if now >= self._may_halve_at:
            self._limit = max(1.0, self._limit / 2)
            self._may_halve_at = now + HALVE_AT_MOST_EVERY_SECONDS
