"""What became of the files of a replay, and what was counted of it. Decides what counts as left; never prints."""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from metershipper.books import Books
from metershipper.replay_plan import Decision, Finding, PlannedFile
from metershipper.replay_survey import Survey


class Outcome(StrEnum):
    """What became of a file."""

    DELIVERED = "delivered"
    ALREADY_DELIVERED = "already delivered"
    COPY = "copy"  # of another file, which is delivered
    OUTSIDE = "outside the period"
    EMPTY = "empty"
    DAMAGED = "damaged"  # delivered as far as it unpacks
    UNFINISHED = "unfinished last line"
    GREW = "written to meanwhile"
    CHANGED = "changed meanwhile"
    UNREADABLE = "unreadable"
    LEFT_TO_RUN = "left to run"
    INTERRUPTED = "interrupted"
    WAITING = "not begun"


WHOLE = (Outcome.DELIVERED, Outcome.ALREADY_DELIVERED, Outcome.COPY, Outcome.OUTSIDE, Outcome.EMPTY)
FAULTS = (Outcome.CHANGED, Outcome.UNREADABLE)
# For so long an endpoint may think about what it was sent before people are told that it is waited for.
SILENT_SECONDS = 5.0


@dataclass(slots=True)
class FileResult:
    """One file: what became of it, under which records, and what to say about it."""

    planned: PlannedFile
    outcome: Outcome = Outcome.WAITING
    file_ids: list[int] = field(default_factory=list)
    note: str = ""


@dataclass(slots=True)
class Tally:
    """How far a replay is. Bytes are those of content. `books`, and `books_of` each file id, of what was committed."""

    total_bytes: int
    read_bytes: int = 0
    entries: int = 0
    events: int = 0
    acknowledged: int = 0
    books: Books = field(default_factory=Books)
    books_of: defaultdict[int, Books] = field(default_factory=lambda: defaultdict(Books))
    _in_flight: int = 0
    _heard_at: float = 0.0

    def settled(self, file_id: int, books: Books) -> None:
        """So much more of a file was committed."""
        self.books.update(books)
        self.books_of[file_id].update(books)

    def posted(self, events: int, now: float) -> None:
        """The endpoint is to answer for these; `now` in seconds since the epoch."""
        if not self._in_flight:
            self._heard_at = now
        self._in_flight += events

    def answered(self, events: int, now: float) -> None:
        """The endpoint took these, or told that it never will."""
        self._in_flight -= events
        self._heard_at = now

    def silent_since(self, now: float) -> float | None:
        """Since when the endpoint is being waited for; None while it answers, or has nothing to answer."""
        return self._heard_at if self._in_flight and now - self._heard_at >= SILENT_SECONDS else None


def outcome_before(planned: PlannedFile) -> Outcome:
    """What is to be said of a file that was not begun."""
    return Outcome.WAITING if planned.decision.steps else outcome_of(planned.survey, planned.decision, sent=False)


def outcome_of(looked_at: Survey, decision: Decision, *, sent: bool) -> Outcome:
    """What is to be said of a file of which nothing more is to be sent."""
    if looked_at.damage is not None:
        return Outcome.DAMAGED
    if decision.unfinished:
        return Outcome.UNFINISHED
    if decision.left_to_run_bytes:
        return Outcome.LEFT_TO_RUN
    if decision.finding is Finding.EMPTY:
        return Outcome.EMPTY
    if decision.finding is Finding.OUTSIDE:
        return Outcome.OUTSIDE
    return Outcome.DELIVERED if sent else Outcome.ALREADY_DELIVERED


def outcome_after(looked_at: Survey, decision: Decision) -> Outcome:
    """What is to be said of a file that was read to the end that it had when its turn came."""
    outcome = outcome_of(looked_at, decision, sent=True)
    try:
        grew = os.stat(looked_at.path).st_size > looked_at.stamp.size
    except OSError:
        grew = False  # gone, with all that was in it sent
    return Outcome.GREW if grew and outcome in WHOLE else outcome


def tell_copies(results: Sequence[FileResult]) -> None:
    """A copy whose turn did not come is not left where the file that it is one of was delivered."""
    delivered = {result.planned.survey.path for result in results if result.outcome is Outcome.DELIVERED}
    for result in results:
        if result.outcome is Outcome.WAITING and result.planned.copy_of in delivered:
            result.outcome = Outcome.COPY
