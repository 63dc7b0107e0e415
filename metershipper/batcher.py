"""Spans, batches, and when a batch is due. Pure: no I/O; the time is an argument, in seconds of a monotonic clock."""

from collections import deque
from dataclasses import dataclass, field

import msgspec

from metershipper.books import Books
from metershipper.events import DeadLetter, Mapped, RefusedEvent, UsageEvent

_encode = msgspec.json.Encoder().encode


@dataclass(slots=True, eq=False)
class Span:
    """A contiguous range of one file's lines, mapped together: the unit of settling.

    It is settled when none of its events is unsettled. `end_offset`: bytes, after the last line, safe to resume at.
    """

    file_id: int
    end_offset: int
    tail: bytes  # the bytes just before `end_offset`: what a file must still hold there to be the same file
    books: Books
    dead_letters: list[DeadLetter]
    unsettled: int
    start_offset: int = 0
    read_at: float = 0.0  # seconds of a monotonic clock
    refused: list[RefusedEvent] = field(default_factory=list)

    @classmethod
    def of(
        cls, file_id: int, end_offset: int, tail: bytes, mapped: Mapped, start_offset: int = 0, read_at: float = 0.0
    ) -> "Span":
        """The span of lines that were mapped to `mapped`."""
        return cls(
            *(file_id, end_offset, tail, mapped.books, mapped.dead_letters, len(mapped.events), start_offset, read_at)
        )


@dataclass(slots=True, frozen=True)
class Batch:
    """What one POST carries: the encoded events, and how many of them each span waits for."""

    body: bytes
    events: int
    shares: list[tuple[Span, int]]


@dataclass(slots=True)
class Batcher:
    """Collects events until a batch is due: `max_events` reached, or the oldest one `max_wait_seconds` old.

    `max_bytes` bounds the encoded batch; a single event above it travels alone.
    """

    max_events: int
    max_bytes: int
    max_wait_seconds: float
    _events: list[UsageEvent] = field(default_factory=list)
    _shares: deque[tuple[Span, int]] = field(default_factory=deque)
    _due_at: float | None = None

    def add(self, span: Span, events: list[UsageEvent], now: float) -> None:
        """Take in the events of a span, in the order of its lines."""
        if not events:
            return
        self._events += events
        self._shares.append((span, len(events)))
        if self._due_at is None:
            self._due_at = now + self.max_wait_seconds

    def wait_seconds(self, now: float) -> float | None:
        """How long until the next batch is due by age; None when nothing waits."""
        return None if self._due_at is None else max(0.0, self._due_at - now)

    def take_due(self, now: float, *, all_of_it: bool = False) -> list[Batch]:
        """The batches that are due, oldest first; with `all_of_it` also what is neither full nor old."""
        aged = self._due_at is not None and now >= self._due_at
        batches: list[Batch] = []
        while len(self._events) >= self.max_events or (self._events and (aged or all_of_it)):
            events, self._events = self._events[: self.max_events], self._events[self.max_events :]
            batches += encode_batches(events, self._take_shares(len(events)), self.max_bytes)
        if not self._events:
            self._due_at = None
        elif batches:
            self._due_at = now + self.max_wait_seconds
        return batches

    def _take_shares(self, count: int) -> list[tuple[Span, int]]:
        taken: list[tuple[Span, int]] = []
        while count:
            span, waiting = self._shares.popleft()
            part = min(waiting, count)
            taken.append((span, part))
            count -= part
            if part < waiting:
                self._shares.appendleft((span, waiting - part))
        return taken


def encode_batches(events: list[UsageEvent], shares: list[tuple[Span, int]], max_bytes: int) -> list[Batch]:
    """`events` as batches of at most `max_bytes` encoded, halved as often as it takes; one event is never cut.

    One encode for a batch, not one for each event: that is a third of the cost of shipping. Halving is the rare case.
    """
    body = _encode(events)
    if len(body) <= max_bytes or len(events) == 1:
        return [Batch(body, len(events), shares)]
    half = len(events) // 2
    first, second = split_shares(shares, half)
    return encode_batches(events[:half], first, max_bytes) + encode_batches(events[half:], second, max_bytes)


def split_shares(shares: list[tuple[Span, int]], count: int) -> tuple[list[tuple[Span, int]], list[tuple[Span, int]]]:
    """The shares of the first `count` events, and those of the others."""
    first: list[tuple[Span, int]] = []
    second: list[tuple[Span, int]] = []
    for span, waiting in shares:
        part = min(waiting, count)
        count -= part
        if part:
            first.append((span, part))
        if waiting > part:
            second.append((span, waiting - part))
    return first, second
