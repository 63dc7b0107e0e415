"""Tries dead letters again that a person asked for: raw lines are mapped anew, refused events are sent as they were.

Owns what is on its way again, one page of letters at a time. Its batches go through the same shipper as all others.
The order of things is that of the ledger: accepted, then acknowledged, then recorded; so a crash repeats a delivery
with the same ids, and counts nothing twice. Holds no SQL (`dead_letters`) and no mapping rules (`mapper`).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass

import msgspec

from metershipper.batcher import Batch, Span
from metershipper.books import DEAD_LETTERS, Books, Count, Dead
from metershipper.checkpoint import Checkpoint
from metershipper.config import Batch as BatchSettings
from metershipper.dead_letters import PAGE_ROWS, Filter, Letter, Redelivered
from metershipper.entry import content_hash
from metershipper.events import DeadLetter, UsageEvent
from metershipper.ledger import refused_books
from metershipper.mapper import Mapper
from metershipper.pieces import Unbillable, whole_object
from metershipper.redact import MARK

_NEEDS_ITS_SECRET = (
    "what it is billed by was taken out of this copy as a secret; the whole line is in the log, at its offsets"
)


@dataclass(slots=True, eq=False)
class _Attempt:
    """A letter on its way: its span waits for its events. `fault`: why there is nothing to send."""

    letter: Letter
    span: Span
    events: list[bytes]
    remaining: list[DeadLetter]
    fault: str | None = None

    def outcome(self) -> Redelivered:
        """What became of it, now that all its events are settled."""
        letter, span = self.letter, self.span
        if self.fault is not None:
            return Redelivered(letter, Books(), [], True, self.fault)
        if letter.kind == "event":
            if span.refused:
                return Redelivered(letter, Books(), [], True, span.refused[0].detail)
            books = Books({Count.ACKNOWLEDGED: 1})
            books.subtract(refused_books(msgspec.json.decode(letter.content)))
            return Redelivered(letter, books, [], False, "")
        books = Books(span.books)
        books[Count.LINES] = 0  # the line was counted when it was read
        books[Count.ENTRIES] -= 1
        books[DEAD_LETTERS + letter.reason] -= 1
        return Redelivered(letter, books, [*self.remaining, *span.refused], False, "")


class Redelivery:
    """Letters wanted in the database become batches, and their acknowledgements changes of the database.

    Args: `put`, takes a batch for delivery; whoever delivers reports to the spans in it, as for any other.
    """

    def __init__(
        self, checkpoint: Checkpoint, mapper: Mapper, settings: BatchSettings, put: Callable[[Batch], Awaitable[None]]
    ) -> None:
        self._checkpoint = checkpoint
        self._mapper = mapper
        self._settings = settings
        self._put = put
        self._open: list[_Attempt] = []

    async def step(self) -> None:
        """Record what was settled; when nothing is on its way, send the next page.

        Raises: sqlite3.OperationalError when the state can't be read or written; nothing is lost, and `step` may be
        called again.
        """
        await self.record()
        if not self._open:
            self._open = await asyncio.to_thread(self._next_page)
            for batch in self._batches():
                await self._put(batch)

    async def record(self) -> None:
        """Record what was settled, in one transaction. Raises as `step` does."""
        done = [attempt for attempt in self._open if attempt.span.unsettled == 0]
        if done:
            # Counted here and not in the thread: acknowledgements change the books on this side.
            await asyncio.to_thread(self._settle, [attempt.outcome() for attempt in done])
            self._open = [attempt for attempt in self._open if attempt not in done]

    def _settle(self, outcomes: list[Redelivered]) -> None:
        with self._checkpoint.transaction():
            self._checkpoint.dead_letters.settle(outcomes, time.time())

    def _next_page(self) -> list[_Attempt]:
        with self._checkpoint.reading():
            letters = self._checkpoint.dead_letters.select(Filter(wanted=True), PAGE_ROWS)
        return [_event_again(each) if each.kind == "event" else _line_again(each, self._mapper) for each in letters]

    def _batches(self) -> Iterator[Batch]:
        waiting: list[tuple[bytes, Span]] = []
        size = 0
        for attempt in self._open:
            for event in attempt.events:
                full = len(waiting) == self._settings.max_events or size + len(event) >= self._settings.max_bytes
                if waiting and full:
                    yield _batch(waiting)
                    waiting, size = [], 0
                waiting.append((event, attempt.span))
                size += len(event) + 1
        if waiting:
            yield _batch(waiting)


def _batch(events: Iterable[tuple[bytes, Span]]) -> Batch:
    bodies, spans = zip(*events, strict=True)
    return Batch(b"[" + b",".join(bodies) + b"]", len(bodies), [(span, 1) for span in spans])


def _event_again(letter: Letter) -> _Attempt:
    return _Attempt(letter, _span(letter, Books(), 1), [letter.content], [])


def _line_again(letter: Letter, mapper: Mapper) -> _Attempt:
    """Map a kept line with today's configuration; where that changes nothing, the letter stays."""

    def stays(why: str) -> _Attempt:
        return _Attempt(letter, _span(letter, Books(), 0), [], [], why)

    if letter.reason == Dead.LINE_TOO_LONG:
        return stays(letter.detail)  # only its beginning is kept
    mapped = mapper.map_lines(letter.content, letter.start_offset)
    if not mapped.events and not mapped.books.skipped:
        return stays(mapped.dead_letters[0].detail if mapped.dead_letters else letter.detail)
    events = [msgspec.json.encode(event) for event in _with_first_ids(mapped.events, letter)]
    if any(MARK in event for event in events):
        return stays(_NEEDS_ITS_SECRET)
    remaining = [
        each._replace(start_offset=letter.start_offset, end_offset=letter.end_offset) for each in mapped.dead_letters
    ]
    return _Attempt(letter, _span(letter, mapped.books, len(events)), events, remaining)


def _span(letter: Letter, books: Books, events: int) -> Span:
    return Span(letter.file_id, letter.end_offset, b"", books, [], events, letter.start_offset)


def _with_first_ids(events: list[UsageEvent], letter: Letter) -> list[UsageEvent]:
    """The events with the ids they would have had at first: where an id is made of a hash, taking out secrets changed
    what was hashed.
    """
    if letter.entry_hash is not None:
        try:
            own_hash = content_hash(whole_object(letter.content))
        except Unbillable:
            return events
        for event in events:
            if event.id.startswith(f"{own_hash}:"):
                event.id = letter.entry_hash + event.id.removeprefix(own_hash)
    return events
