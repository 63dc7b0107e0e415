"""What became of the files of a replay, and what was counted of it. Decides what counts as left; never prints."""

import os
from dataclasses import dataclass, field
from enum import StrEnum

from metershipper.books import Books
from metershipper.replay_plan import Decision, Finding, PlannedFile
from metershipper.replay_survey import Survey


class Outcome(StrEnum):
    """What became of a file."""

    DELIVERED = "delivered"
    ALREADY_DELIVERED = "already delivered"
    EMPTY = "empty"
    DAMAGED = "damaged"  # delivered as far as it unpacks
    UNFINISHED = "unfinished last line"
    GREW = "written to meanwhile"
    CHANGED = "changed meanwhile"
    UNREADABLE = "unreadable"
    LEFT_TO_RUN = "left to run"
    INTERRUPTED = "interrupted"
    WAITING = "not begun"


WHOLE = (Outcome.DELIVERED, Outcome.ALREADY_DELIVERED, Outcome.EMPTY)
FAULTS = (Outcome.CHANGED, Outcome.UNREADABLE)


@dataclass(slots=True)
class FileResult:
    """One file: what became of it, under which records, and what to say about it."""

    planned: PlannedFile
    outcome: Outcome = Outcome.WAITING
    file_ids: list[int] = field(default_factory=list)
    note: str = ""


@dataclass(slots=True)
class Tally:
    """How far a replay is. Bytes are those of content."""

    total_bytes: int
    read_bytes: int = 0
    entries: int = 0
    events: int = 0
    acknowledged: int = 0
    books: Books = field(default_factory=Books)  # of what was committed


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
    return Outcome.DELIVERED if sent else Outcome.ALREADY_DELIVERED


def outcome_after(looked_at: Survey, decision: Decision) -> Outcome:
    """What is to be said of a file that was read to the end that it had when its turn came."""
    outcome = outcome_of(looked_at, decision, sent=True)
    try:
        grew = os.stat(looked_at.path).st_size > looked_at.stamp.size
    except OSError:
        grew = False  # gone, with all that was in it sent
    return Outcome.GREW if grew and outcome in WHOLE else outcome
