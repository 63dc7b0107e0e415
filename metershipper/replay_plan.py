"""What is to be sent of the files that were looked at, and what speaks against it. Pure; the clock is an argument.

What was settled is known as stretches of content, each by the record of whoever read it. What lies between them is
still to be sent, each gap by exactly one reader: by the record that ends where the gap begins, else by a new one.
Never reads a file or a record (`replay_survey`), never prints (`replay_report`).
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from metershipper.records import Sample, StoredFile
from metershipper.replay_paths import Named
from metershipper.replay_survey import DISORDER_SECONDS, Survey
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
    OUTSIDE = "outside the period"  # all its entries are
    EMPTY = "empty"


@dataclass(frozen=True, slots=True)
class Step:
    """One stretch to be sent. `record`: the one to go on with; None: a new one. `others`: what was delivered of it."""

    start: int
    end: int
    record: StoredFile | None = None
    others: tuple[StoredFile, ...] = ()

    @property
    def is_begun(self) -> bool:
        """Whether it is the rest of what was being read; not so where that had come to its end."""
        return self.record is not None and self.record.position > 0 and not self.record.is_complete


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
    if (steps or left_bytes) and _is_outside(survey, scope):
        return Decision(Finding.OUTSIDE)
    return Decision(finding, tuple(steps), left_bytes, unfinished)


def _is_outside(survey: Survey, scope: Scope) -> bool:
    """Whether none of its entries is of the period, as far as the times seen tell, which have to be in order."""
    if survey.first_at is None or survey.last_at is None or not survey.in_order or survey.damage is not None:
        return False
    ends_before = scope.since is not None and survey.last_at + DISORDER_SECONDS < _seconds(scope.since)
    begins_after = scope.until is not None and survey.first_at - DISORDER_SECONDS >= _seconds(scope.until)
    return ends_before or begins_after


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


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
        return self.survey.entries_in(self.bytes_to_send)


@dataclass(slots=True)
class Plan:
    """All files, in the order in which they are sent: the oldest first.

    `unreadable`: what directories hold that could not be looked into, with why, by path: it is left. `doubtful`: of
    which nobody knows whether they were billed before, or that are no logs; `doubts` says why, as `warnings` do.
    """

    files: list[PlannedFile]
    scope: Scope
    skipped: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    run_process_id: int | None = None
    doubtful: list[PlannedFile] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
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


def make_plan(
    surveys: Sequence[Survey],
    scope: Scope,
    named: Named | None = None,
    *,
    window_days: float,
    may_resume_run: bool,
    now: float,
    run_process_id: int | None = None,
) -> Plan:
    """Put files in order, decide about each, and say what to consider before they are sent.

    Args: `named`, what else was found where these files are; `run_process_id`, that of `run`, if it runs.
    """
    planned_files: list[PlannedFile] = []
    first_with: dict[tuple[Sample, int, Sample], str] = {}
    for survey in sorted(surveys, key=_age):
        planned = PlannedFile(survey, decide(survey, scope, may_resume_run=may_resume_run, now=now))
        key = survey.head, survey.content_bytes, survey.end
        if survey.head.length and planned.decision.steps:
            planned.copy_of = first_with.get(key)
            first_with.setdefault(key, survey.path)
        planned_files.append(planned)
    plan = Plan(planned_files, scope, window_days=window_days, run_process_id=run_process_id)
    if named is not None:
        plan.skipped, plan.unreadable = named.skipped, named.unreadable
    known_since = now - window_days * 86400
    plan.doubtful = [file for file in plan.to_send if _is_no_log(file) or _unknown_bytes(file, scope, known_since)]
    plan.doubts = list(_doubts(plan, known_since))
    plan.warnings = [*plan.doubts, *_warnings(plan, now)]
    return plan


def _age(survey: Survey) -> tuple[float, str]:
    return survey.first_at or survey.stamp.mtime_ns / 1e9, survey.path


def _unknown_bytes(file: PlannedFile, scope: Scope, known_since: float) -> int:
    """How much of it something else may have billed, longer ago than any server would know.

    What is gone on with was asked about when it was begun. What nobody here ever began to read is not known; nor is
    what stands behind a record of all there was: it may be another file, put together with that one.
    """
    if file.survey.shows_no_entry:
        return 0
    return sum(
        step.end - step.start
        for step in file.decision.steps
        if not step.is_begun
        if max(file.survey.first_from(step.start) or 0.0, _beginning_of(scope)) < known_since
    )


def _is_no_log(file: PlannedFile) -> bool:
    return file.survey.shows_no_entry and not all(step.is_begun for step in file.decision.steps)


def _beginning_of(scope: Scope) -> float:
    return 0.0 if scope.since is None else _seconds(scope.since)


def _doubts(plan: Plan, known_since: float) -> Iterator[str]:
    unknown = [(file.survey, _unknown_bytes(file, plan.scope, known_since)) for file in plan.doubtful]
    if with_unknown := [each for each in unknown if each[1]]:
        content_bytes = sum(count for _, count in with_unknown)
        entries = sum(survey.entries_in(count) for survey, count in with_unknown)
        yield (
            f"{so_many_files(len(with_unknown))} with content that is not known here, up to {content_bytes:,} bytes "
            f"and about {entries:,} entries, with usage older than {plan.window_days:g} days "
            "(openmeter.dedupe_window_days). If it was billed before, by anything else or from an archive that was "
            "merged, split or converted since, the server no longer knows its events, and it is billed twice"
        )
    if no_logs := [file for file in plan.doubtful if _is_no_log(file)]:
        names = ", ".join(file.survey.path for file in no_logs[:3]) + (" and others" if len(no_logs) > 3 else "")
        yield (
            f"{so_many_files(len(no_logs))} without any entry of Kong's among the lines that were looked at: {names}. "
            "What is no log becomes dead letters"
        )


def _warnings(plan: Plan, now: float) -> list[str]:
    found: list[str] = []
    month = datetime.fromtimestamp(now, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp()
    with_entries = [file for file in plan.to_send if not file.survey.shows_no_entry]
    since = _beginning_of(plan.scope)
    if earlier := [file for file in with_entries if max(file.survey.first_at or 0.0, since) < month]:
        found.append(
            f"{so_many_files(len(earlier))} with usage from before {_day(month)}, whose invoices may be closed: "
            "OpenMeter takes into an invoice what is stored up to an hour after its period, and bills nobody for usage "
            "from before a customer's subscription, or before a meter's `eventFrom`"
        )
    if left := [file for file in plan.files if file.decision.left_to_run_bytes]:
        whose = "" if plan.run_process_id is None else f" (process {plan.run_process_id})"
        what = "for what a filter leaves of it would be sent again" if plan.scope.canonical else "which reads it on"
        remedy = ", without --since, --until or --subject" if plan.scope.canonical else ""
        found.append(
            f"{so_many_files(len(left))} begun by `run`{whose} and left to it, {what}. What stands no more where `run` "
            f"looks: put it back beside its log, or stop `run` and give this command again{remedy}"
        )
    found += [f"{path}: {reason}; it is left" for path, reason in plan.unreadable.items()]
    for file in plan.files:
        if file.survey.damage is not None:
            found.append(f"{file.survey.path}: {damage_of(file.survey)}")
        if file.decision.unfinished:
            found.append(
                f"{file.survey.path}: is being written; its unfinished last line is left for a later replay, or for run"
            )
    return found


def damage_of(survey: Survey) -> str:
    """What is wrong with a damaged file, and what becomes of it."""
    return (
        f"damaged ({survey.damage}): from byte {survey.lines_end:,} of its content on its lines are torn, or not to be "
        "trusted; everything before that is sent"
    )


def so_many_files(count: int) -> str:
    """So many files, in words."""
    return f"{count:,} file{'' if count == 1 else 's'}"


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
