"""Decides what may be committed: positions only over settled spans, counts only of settled spans. Pure; no I/O.

The order of the world is accepted, then acknowledged, then checkpointed. This is its middle: acknowledgements come in
any order, and what leaves here is, file by file, the highest contiguous settled position together with the sum of
exactly the spans below it. The checkpoint writes each `Settled` in one transaction. So a crash can only lose what was
never counted, and what is counted is settled.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from metershipper.batcher import Batch, Span
from metershipper.books import Books, Count, Dead
from metershipper.events import LLM_REQUEST, DeadLetter, RefusedEvent
from metershipper.retry import Answer

# Behind a span that waits for long, what is settled is kept as one: so that waiting costs no memory.
COMPACT_ABOVE_SPANS = 256


@dataclass(slots=True)
class Settled:
    """New ground of one file: everything before `end_offset` is settled; books and dead letters are what that adds."""

    file_id: int
    end_offset: int
    tail: bytes
    books: Books = field(default_factory=Books)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    refused: list[RefusedEvent] = field(default_factory=list)


@dataclass(slots=True)
class Ledger:
    """The spans on their way, file by file, in the order in which they were read."""

    _open: dict[int, deque[Span]] = field(default_factory=dict)

    def opened(self, span: Span) -> None:
        """A span was read: its file's position waits for it from now on."""
        self._open.setdefault(span.file_id, deque()).append(span)

    def acknowledged(self, batch: Batch) -> None:
        """The server accepted `batch`."""
        for span, events in batch.shares:
            span.unsettled -= events
            span.books[Count.ACKNOWLEDGED] += events

    def refused(self, batch: Batch, answer: Answer) -> None:
        """The server does not take the one event of `batch`.

        The event is settled as a dead letter of its span: it is written together with the position that passes it.
        """
        ((span, _),) = batch.shares
        span.unsettled -= 1
        letter, books = refused_event(batch.body, span, answer.refusal)
        span.refused.append(letter)
        span.books.update(books)

    def take_settled(self) -> list[Settled]:
        """What became settled since the last call, one item a file; the caller must commit it."""
        settled = [ground for file_id, spans in self._open.items() if (ground := _settled_ground(file_id, spans))]
        for spans in self._open.values():
            _compact(spans)
        self._open = {file_id: spans for file_id, spans in self._open.items() if spans}
        return settled

    @property
    def unsettled_events(self) -> int:
        """Events read and mapped, but not yet acknowledged."""
        return sum(span.unsettled for spans in self._open.values() for span in spans)

    def oldest_unsettled_seconds(self, now: float) -> float:
        """How long ago, on the monotonic clock, the oldest lines were read that are not settled; 0 when all are.

        They can't be older than their reading in any way that matters: while they wait, nothing after them is read.
        """
        return max((now - spans[0].read_at for spans in self._open.values() if spans), default=0.0)


def refused_event(body: bytes, span: Span, detail: str) -> tuple[RefusedEvent, Books]:
    """The dead letter of a batch of one event, and what it counts."""
    (raw,) = msgspec.json.decode(body, type=list[msgspec.Raw])
    event = msgspec.json.decode(raw)
    place = (span.start_offset, span.end_offset, Dead.REFUSED, detail)
    letter = RefusedEvent(*place, bytes(raw), event["subject"], event["type"], event["id"])
    return letter, refused_books(event)


def refused_books(event: dict[str, Any]) -> Books:
    """What one refused event counts."""
    books = Books({Count.REFUSED: 1})
    if event["type"] == LLM_REQUEST:
        is_output = event["data"]["type"] == "response"
        books[Count.REFUSED_TOKENS_RESPONSE if is_output else Count.REFUSED_TOKENS_REQUEST] = event["data"]["tokens"]
    return books


def _extend(ground: Span | Settled, further: Span | Settled) -> None:
    """Add the settled ground that follows in the same file: its end is the new one, its counts come on top."""
    ground.end_offset, ground.tail = further.end_offset, further.tail
    ground.books.update(further.books)
    ground.dead_letters += further.dead_letters
    ground.refused += further.refused


def _compact(spans: deque[Span]) -> None:
    """Make one of settled spans that follow each other: they are committed together."""
    if len(spans) <= COMPACT_ABOVE_SPANS:
        return
    kept: list[Span] = []
    for span in spans:
        if kept and kept[-1].unsettled == 0 and span.unsettled == 0:
            _extend(kept[-1], span)
        else:
            kept.append(span)
    spans.clear()
    spans.extend(kept)


def _settled_ground(file_id: int, spans: deque[Span]) -> Settled | None:
    ground: Settled | None = None
    while spans and spans[0].unsettled == 0:
        ground = ground or Settled(file_id, 0, b"")
        _extend(ground, spans.popleft())
    return ground


def merge(earlier: Iterable[Settled], later: Iterable[Settled]) -> list[Settled]:
    """Two lots of settled ground as one, for a commit that could not be written yet."""
    merged: dict[int, Settled] = {}
    for ground in (*earlier, *later):
        _extend(merged.setdefault(ground.file_id, Settled(ground.file_id, 0, b"")), ground)
    return list(merged.values())
