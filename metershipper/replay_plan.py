"""What is to be sent of the files that were looked at, and what speaks against it. Pure; the clock is an argument.

What was settled is known as stretches of content, each by the record of whoever read it. What lies between them is
still to be sent, each gap by exactly one reader: by the record that ends where the gap begins, else by a new one.
Never reads a file or a record (`replay_survey`), never prints (`replay_report`).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from metershipper.records import Sample, StoredFile
from metershipper.replay_survey import Survey
from metershipper.scope import Scope

# A file that was written to this short a while ago may be in the middle of a line.
FRESH_SECONDS = 60.0


class Finding(StrEnum):
    """What a file is to a replay."""

    NEW = "new"
    PARTLY_DELIVERED = "partly delivered"
    DELIVERED = "delivered"
    COPY = "copy"  # of another one in the same plan
    LEFT_TO_RUN = "left to run"  # its rest is that of `run`
    EMPTY = "empty"


@dataclass(frozen=True, slots=True)
class Step:
    """One stretch to be sent. `record`: the one to go on with; None: a new one. `others`: what was delivered of it."""

    start: int
    end: int
    record: StoredFile | None = None
    others: tuple[StoredFile, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be sent of a file: the first step, with what follows told anew once that is done.

    `left_to_run_bytes`: what only `run` may send. `unfinished`: a last line that may still be being written is left.
    """

    finding: Finding
    steps: tuple[Step, ...] = ()
    left_to_run_bytes: int = 0
    unfinished: bool = False

    @property
    def bytes_to_send(self) -> int:
        """How much content there is to be sent."""
        return sum(step.end - step.start for step in self.steps)


def decide(survey: Survey, scope: Scope, *, may_resume_run: bool, now: float) -> Decision:
    """What to do about a file. `may_resume_run`: `run` is not running, and can't start meanwhile."""
    is_fresh = abs(now - survey.stamp.mtime_ns / 1e9) < FRESH_SECONDS
    unfinished = survey.unfinished_bytes > 0 and is_fresh and survey.damage is None
    end = survey.lines_end if unfinished or survey.damage is not None else survey.content_bytes
    wanted = (None, scope.canonical)
    own = [record for record in survey.records if record.scope in wanted and not record.history]
    others = tuple(record for record in survey.records if record.scope not in wanted and not record.history)
    steps: list[Step] = []
    left_bytes = 0
    for start, stop in _gaps(own, end):
        record = _reader_of(start, own, scope)
        if record is not None and record.origin == "run" and not (may_resume_run and scope.canonical is None):
            left_bytes += stop - start
        else:
            steps.append(Step(start, stop, record, others))
    if end == 0 and not steps:
        finding = Finding.EMPTY
    elif left_bytes and not steps:
        finding = Finding.LEFT_TO_RUN
    elif not steps:
        finding = Finding.DELIVERED
    else:
        is_new = not any(record.position for record in own)
        finding = Finding.NEW if is_new else Finding.PARTLY_DELIVERED
    return Decision(finding, tuple(steps), left_bytes, unfinished)


def _gaps(records: Sequence[StoredFile], end: int) -> list[tuple[int, int]]:
    """What none of these records covers."""
    gaps: list[tuple[int, int]] = []
    covered = 0
    for begin, position in sorted((record.start_offset, record.position) for record in records):
        if min(begin, end) > covered:
            gaps.append((covered, min(begin, end)))
        covered = max(covered, position)
    if covered < end:
        gaps.append((covered, end))
    return gaps


def _reader_of(start: int, records: Sequence[StoredFile], scope: Scope) -> StoredFile | None:
    """Whose record ends where a gap begins. What `run` may go on with is its own; a filter needs a record of its own.

    A blank record of `run` is one that ends at the beginning.
    """
    ending = [record for record in records if record.position == start]
    ending = [record for record in ending if record.origin == "run" or record.scope == scope.canonical]
    return min(ending, key=lambda record: (record.origin != "run", record.file_id), default=None)


@dataclass(slots=True)
class PlannedFile:
    """One file of a plan. `copy_of`: an earlier file that holds the same."""

    survey: Survey
    decision: Decision
    copy_of: str | None = None

    @property
    def finding(self) -> Finding:
        """What it is to this replay."""
        return Finding.COPY if self.copy_of is not None else self.decision.finding

    @property
    def bytes_to_send(self) -> int:
        """How much of its content is to be sent."""
        return 0 if self.copy_of is not None else self.decision.bytes_to_send

    @property
    def entries_to_send(self) -> int:
        """About how many entries that is."""
        return round(self.survey.lines * self.bytes_to_send / (self.survey.content_bytes or 1))


@dataclass(slots=True)
class Plan:
    """All files, in the order in which they are sent: the oldest first."""

    files: list[PlannedFile]
    scope: Scope
    skipped: list[tuple[str, str]] = field(default_factory=list)
    run_process_id: int | None = None
    warnings: list[str] = field(default_factory=list)
    doubtful: list[PlannedFile] = field(default_factory=list)  # of which nobody knows whether they were billed before
    window_days: float = 0.0

    @property
    def to_send(self) -> list[PlannedFile]:
        """The files of which something is to be sent."""
        return [file for file in self.files if file.bytes_to_send]

    @property
    def bytes_to_send(self) -> int:
        """How much content that is."""
        return sum(file.bytes_to_send for file in self.files)

    @property
    def entries_to_send(self) -> int:
        """About how many entries that is."""
        return sum(file.entries_to_send for file in self.files)


def make_plan(surveys: Sequence[Survey], scope: Scope, *, window_days: float, may_resume_run: bool, now: float) -> Plan:
    """Put files in order, decide about each, and say what to consider before they are sent."""
    files: list[PlannedFile] = []
    first_with: dict[tuple[Sample, int, Sample], str] = {}
    for survey in sorted(surveys, key=_age):
        planned = PlannedFile(survey, decide(survey, scope, may_resume_run=may_resume_run, now=now))
        key = survey.head, survey.content_bytes, survey.end
        if survey.head.length and planned.decision.steps:
            planned.copy_of = first_with.get(key)
            first_with.setdefault(key, survey.path)
        files.append(planned)
    plan = Plan(files, scope, window_days=window_days)
    plan.doubtful = [file for file in plan.to_send if _is_doubtful(file, scope, now - window_days * 86400)]
    plan.warnings = list(_warnings(plan, now))
    return plan


def _age(survey: Survey) -> tuple[float, str]:
    return survey.first_at or survey.stamp.mtime_ns / 1e9, survey.path


def _is_doubtful(file: PlannedFile, scope: Scope, known_since: float) -> bool:
    """Whether something else may have billed it, longer ago than any server would know.

    What is gone on with was asked about when it was begun; what nobody here ever began to read is not known.
    """
    is_begun = all(step.record is not None and step.record.position for step in file.decision.steps)
    return not is_begun and not file.survey.has_no_entry and _earliest(file, scope) < known_since


def _earliest(file: PlannedFile, scope: Scope) -> float:
    """The earliest event that a file can become; where no entry was found, nothing is known of its age."""
    since = 0.0 if scope.since is None else datetime.fromisoformat(scope.since).timestamp()
    return max(file.survey.first_at or 0.0, since)


def _warnings(plan: Plan, now: float) -> list[str]:
    found: list[str] = []
    if plan.doubtful:
        content_bytes = sum(file.bytes_to_send for file in plan.doubtful)
        entries = sum(file.entries_to_send for file in plan.doubtful)
        found.append(
            f"{_files(plan.doubtful, 'new ')}, up to {content_bytes:,} bytes and about {entries:,} entries, with usage "
            f"older than {plan.window_days:g} days (openmeter.dedupe_window_days). If anything else billed it before, "
            "the server no longer knows its events, and it is billed twice"
        )
    month = datetime.fromtimestamp(now, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp()
    with_entries = [file for file in plan.to_send if not file.survey.has_no_entry]
    if earlier := [file for file in with_entries if _earliest(file, plan.scope) < month]:
        found.append(
            f"{_files(earlier)} with usage from before {_day(month)}, whose invoices may be closed: OpenMeter takes "
            "into an invoice what is stored up to an hour after its period"
        )
        found.append(
            "OpenMeter counts events from before a meter was created, unless the meter says from when on; usage from "
            "before a customer's subscription began bills nobody"
        )
    if left := [file for file in plan.files if file.decision.left_to_run_bytes]:
        reason = (
            "what a filter leaves of them would be sent again"
            if plan.scope.canonical is not None
            else f"process {plan.run_process_id or '?'}"
        )
        found.append(
            f"{_files(left)} begun by `run` and left to it ({reason}). What it does not read on by itself: put it "
            "beside its log, or stop `run` and replay without a filter"
        )
    for file in plan.files:
        if file.survey.damage is not None:
            found.append(
                f"{file.survey.path}: does not unpack behind byte {file.survey.content_bytes} of its content "
                f"({file.survey.damage}); what does is sent, up to byte {file.survey.lines_end}"
            )
        if file.decision.unfinished:
            found.append(
                f"{file.survey.path}: is being written; its unfinished last line is left for a later replay, or for run"
            )
    return found


def _files(files: Sequence[PlannedFile], kind: str = "") -> str:
    return f"{len(files)} {kind}file{'' if len(files) == 1 else 's'}"


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
