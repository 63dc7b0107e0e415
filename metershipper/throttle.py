"""How many events a second may go out. Pure: a bucket of tokens; the time is an argument."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Throttle:
    """At most `events_per_second` on average. Times are seconds of a monotonic clock.

    A batch may be larger than what has gathered: it goes, and those after it wait until that is made up for. So no
    rate is too low for a batch, and no burst is above one second's worth and a batch.
    """

    events_per_second: float
    _tokens: float = field(init=False)
    _filled_at: float | None = None

    def __post_init__(self) -> None:
        self._tokens = 0.0

    def wait_seconds(self, events: int, now: float) -> float:
        """Take `events` out of the bucket; how long to wait before they may go."""
        since = now if self._filled_at is None else self._filled_at
        self._tokens = min(self.events_per_second, self._tokens + (now - since) * self.events_per_second)
        self._filled_at = now
        wait = max(0.0, -self._tokens / self.events_per_second)
        self._tokens -= events
        return wait
