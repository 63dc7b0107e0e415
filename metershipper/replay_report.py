"""What a replay prints: the plan, progress, the books per file, a dry run's totals; as tables or as one JSON document.

Results go to stdout, progress to stderr: a bar on a terminal, else a line in the log from time to time. Only shows.
"""

import errno
import logging
import os
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime
from itertools import islice
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from metershipper.books import Books, Count
from metershipper.filter import summary
from metershipper.logs import printable
from metershipper.replay import Replay
from metershipper.replay_command import Estimate, Line, Totals
from metershipper.replay_outcome import FileResult, Outcome, Tally
from metershipper.replay_plan import Finding, Plan, PlannedFile, damage_of, so_many_files
from metershipper.replay_state import ReplayState

log = logging.getLogger("metershipper.replay")

TOLD_EVERY_SECONDS = 10.0
SHOWN_EVERY_SECONDS = 0.2
# How many of the files and groups that are passed over are named.
SHOWN_SKIPPED = 10
_WIDE = 240
_UNBOUNDED = 100_000
# Totals of more days than these are told by month.
_SHOWN_DAYS = 31
_BAR_WIDTH = 20  # what stands beside it has to fit on a terminal, too


def time_of(seconds: float | None) -> str:
    """A time for people, in UTC; "?" when it is not known."""
    return "?" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def size_of(count: int) -> str:
    """Bytes for people."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


# The plan


def show_plan(plan: Plan, estimate: Estimate | None, *, to_stderr: bool = False) -> None:
    """The files as a table, what is to be sent, and what speaks against it. Raises: OSError."""
    console = _console(to_stderr=to_stderr)
    table = _table("file", "first entry (UTC)", "last entry (UTC)", "", "size", "to send", numbers_from=4)
    listed: list[Sequence[str]] = []
    for file in plan.files:
        looked_at = file.survey
        path, first_at, last_at = printable(looked_at.path), time_of(looked_at.first_at), time_of(looked_at.last_at)
        finding, sizes = _finding_of(file), (size_of(looked_at.stamp.size), size_of(file.bytes_to_send))
        table.add_row(*map(escape, (path, first_at, last_at, finding)), *sizes)
        listed.append((path, f"{finding}: {sizes[0]}, to send {sizes[1]}", f"from {first_at} to {last_at} UTC"))
    _print(console, table, listed)
    for path, reason in islice(plan.skipped.items(), SHOWN_SKIPPED):
        console.print(f"passed over: {printable(path)}: {reason}", markup=False)
    if (more := len(plan.skipped) - SHOWN_SKIPPED) > 0:
        console.print(f"passed over: {so_many_files(more)} more")
    console.print(_to_send(plan, estimate), markup=False)
    for warning in plan.warnings:
        console.print(f"! {printable(warning)}", markup=False)


def _to_send(plan: Plan, estimate: Estimate | None) -> str:
    if not plan.to_send:
        findings = {file.finding for file in plan.files}
        if findings <= {Finding.DELIVERED, Finding.COPY}:
            return "nothing to send: all of it is already delivered"
        is_outside = findings <= {Finding.DELIVERED, Finding.COPY, Finding.OUTSIDE}
        return "nothing to send" + (": nothing is left of the period" if is_outside else "")
    is_part = plan.scope.canonical is not None
    text = f"{'to go through' if is_part else 'to send'}: {size_of(plan.bytes_to_send)} of content from "
    text += f"{so_many_files(len(plan.to_send))}, about {plan.entries_to_send:,} entries"
    if (events := _events_of(plan, estimate)) is not None:
        text += f" and {events:,} events"
    if estimate is not None:
        text += f"; at least {_duration(estimate.seconds)} of this machine's work"
    return text + (f"; only what is {_scope_of(plan)} is sent" if is_part else "")


def _events_of(plan: Plan, estimate: Estimate | None) -> int | None:
    """The estimate of events; None where what it was made from says nothing of all."""
    is_period = plan.scope.since is not None or plan.scope.until is not None
    return None if estimate is None or is_period else estimate.events or None


def _scope_of(plan: Plan) -> str:
    scope = plan.scope
    parts = [f"from {scope.since}" if scope.since else "", f"before {scope.until}" if scope.until else ""]
    parts.append(f"of {printable(scope.subject)}" if scope.subject else "")
    return " ".join(filter(None, parts))


def _finding_of(file: PlannedFile) -> str:
    copy = f" of {printable(file.copy_of)}" if file.copy_of else ""
    damaged = ", damaged" if file.survey.damage is not None else ""
    return f"{file.finding}{copy}{damaged}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _Console(Console):
    """What can't be written is told to the caller, also where nobody reads any more: rich would end the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def _console(*, to_stderr: bool = False) -> Console:
    """Standard output, or error; what is no terminal is wide enough for any table."""
    console = _Console(highlight=False, stderr=to_stderr)
    return console if console.is_terminal else _Console(highlight=False, stderr=to_stderr, width=_WIDE)


def _table(*columns: str, numbers_from: int) -> Table:
    """`numbers_from`: the column with which numbers begin, set to the right."""
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[numbers_from:]:
        column.justify = "right"
    return table


def _print(console: Console, table: Table, listed: Iterable[Sequence[str]]) -> None:
    """The table; on a terminal that is too narrow for it the rows as they are `listed`: a name, and lines about it."""
    width = Measurement.get(console, console.options.update(width=_UNBOUNDED), table).maximum
    if width <= console.width or not console.is_terminal:
        console.width = max(width, console.width)
        console.print(table)
        return
    for name, *lines in listed:
        console.print(name, markup=False, soft_wrap=True)
        for line in lines:
            console.print(Padding(Text(line), (0, 0, 0, 2)))


# Progress


@contextmanager
def looking() -> Iterator[tuple[Callable[[int, int], None], Callable[[int], None]]]:
    """Progress of looking at the files: what to call at its start, with files and bytes, and with each more bytes."""
    with _bar("looking at the files", DownloadColumn(), TimeRemainingColumn()) as (progress, task):

        def start(files: int, size: int) -> None:
            progress.update(task, total=size, description=f"looking at {so_many_files(files)}")

        yield start, lambda count: progress.advance(task, count)


@contextmanager
def _bar(description: str, *columns: Any, **fields: Any) -> Iterator[tuple[Progress, TaskID]]:
    console = Console(stderr=True)
    progress = Progress(
        *(TextColumn("{task.description}"), BarColumn(_BAR_WIDTH), *columns),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    handlers = [each for each in logging.getLogger().handlers if isinstance(each, logging.StreamHandler)]
    with progress:
        streams = [each.setStream(sys.stderr) for each in handlers]  # which is above the bar now
        try:
            yield progress, progress.add_task(description, total=None, **fields)
        finally:
            for handler, stream in zip(handlers, streams, strict=True):
                if stream is not None:
                    handler.setStream(stream)


@contextmanager
def watching(replay: Replay) -> Iterator[None]:
    """Progress of a delivery: of bytes, entries, events, what is acknowledged, and the time that is left."""
    stopped = threading.Event()
    with _bar("replaying", DownloadColumn(), TextColumn("{task.fields[pace]}"), pace="") as (progress, task):
        progress.update(task, total=replay.tally.total_bytes)
        is_shown = not progress.disable

        def watch() -> None:
            began = told = time.monotonic()
            while not stopped.wait(SHOWN_EVERY_SECONDS):
                now = time.monotonic()
                if is_shown:
                    pace = pace_of(replay.tally, now - began, time.time())
                    progress.update(task, completed=replay.tally.read_bytes, pace=pace)
                elif now - told >= TOLD_EVERY_SECONDS:
                    told = now
                    _tell(replay.tally, now - began)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()


def pace_of(tally: Tally, seconds: float, now: float) -> str:
    """How fast it goes, and how long that takes from here; or since when the endpoint is waited for."""
    if (since := tally.silent_since(now)) is not None:
        return f"waiting for the endpoint since {time_of(since)} UTC, {tally.acknowledged:,} acknowledged"
    done = min(1.0, tally.read_bytes / (tally.total_bytes or 1))
    left = "?" if not done else _duration(seconds * (1 - done) / done)
    return (
        f"about {left} left, {tally.acknowledged:,} acknowledged, {tally.entries / seconds:,.0f} entries/s, "
        f"{tally.events / seconds:,.0f} events/s"
    )


def _tell(tally: Tally, seconds: float) -> None:
    done = tally.read_bytes / (tally.total_bytes or 1)
    log.info(
        "replaying: %d %% of %s read, %s",
        *(done * 100, size_of(tally.total_bytes), pace_of(tally, seconds, time.time())),
        extra={"read_bytes": tally.read_bytes, "events": tally.events, "acknowledged_events": tally.acknowledged},
    )


# The end


def show_result(replay: Replay, state: ReplayState) -> None:
    """What this replay did, per file and as a whole; beside it what earlier ones, or `run`, had done of a file."""
    console = _console()
    columns = ("entries", "billed", "skipped", "events", "acknowledged", "dead letters", "acknowledged in all")
    rows: list[tuple[FileResult, list[int]]] = []
    for result in replay.results:
        numbers: list[int] = []
        if result.file_ids:
            books = _books_of(result, replay)
            numbers = [books[Count.ENTRIES], books[Count.BILLED], books.skipped, books[Count.EVENTS]]
            numbers += [books[Count.ACKNOWLEDGED], books.dead_letters + books[Count.REFUSED]]
            in_all = _books_in_all(result, state)
            numbers.append(numbers[4] if in_all is None else in_all[Count.ACKNOWLEDGED])
        rows.append((result, numbers))
    shown = len(columns) if any(numbers and numbers[4] != numbers[6] for _, numbers in rows) else len(columns) - 1
    table = _table("file", "by this replay", *columns[:shown], numbers_from=2)
    listed: list[Sequence[str]] = []
    for result, numbers in rows:
        path, texts = printable(result.planned.survey.path), [f"{number:,}" for number in numbers[:shown]]
        table.add_row(escape(path), str(result.outcome), *texts)
        told = ", ".join(f"{text} {column}" for text, column in zip(texts, columns, strict=False))
        listed.append((path, f"{result.outcome}; by this replay {told}" if told else str(result.outcome)))
    _print(console, table, listed)
    if replay.tally.books:
        console.print("all files, by this replay:")
    for line in summary(replay.tally.books, "dead letters") if replay.tally.books else ():
        console.print(line, markup=False)
    if refused := replay.tally.books[Count.REFUSED]:
        console.print(f"events refused by the endpoint, kept as dead letters: {refused}")
    for line in remarks(replay):
        console.print(f"! {printable(line)}", markup=False)


def _books_of(result: FileResult, replay: Replay) -> Books:
    """What this replay settled of a file."""
    books = Books()
    for file_id in result.file_ids:
        books.update(replay.tally.books_of.get(file_id, {}))
    return books


def _books_in_all(result: FileResult, state: ReplayState) -> Books | None:
    """What was ever settled under its records; None where nothing was begun, or the state can't be read any more."""
    try:
        return state.books_of(result.file_ids) if result.file_ids else None
    except sqlite3.DatabaseError:
        return None


def remarks(replay: Replay) -> list[str]:
    """What is left, and what to do about it."""
    found = [f"{each.planned.survey.path}: {each.note}" for each in replay.results if each.note]
    for result in replay.results:
        looked_at = result.planned.survey
        if result.outcome is Outcome.DAMAGED:
            found.append(f"{looked_at.path}: {damage_of(looked_at)}; replay it again once it is whole")
        elif result.outcome in (Outcome.GREW, Outcome.UNFINISHED):
            found.append(f"{looked_at.path}: {result.outcome}; replay it again once it is complete")
    found += [f"{path}: {reason}; it is left" for path, reason in replay.unreadable.items()]
    if replay.was_stopped:
        found.append("stopped: the same command goes on where this one was, and nothing is billed twice")
    if replay.tally.books.dead_letters or replay.tally.books[Count.REFUSED]:
        found.append("dead letters: see `metershipper dead-letters list`")
    return found


def show_totals(totals: Totals) -> None:
    """What a dry run found: by day, or by month where these are too many."""
    console = _console()
    length, unit = (10, "day") if _days_of(totals) <= _SHOWN_DAYS else (7, "month")
    events, tokens = Counter[Line](), Counter[Line]()
    for line, count, tokens_of_it in totals.lines():
        events[line._replace(day=line.day[:length])] += count
        tokens[line._replace(day=line.day[:length])] += tokens_of_it or 0
    names = ("subject", f"{unit} (UTC)", "event type", "model", "direction")
    table = _table(*names, "events", "tokens", numbers_from=5)
    listed: list[Sequence[str]] = []
    for line, count in events.items():
        subject, model, direction = printable(line.subject), printable(line.model or ""), line.direction or ""
        counted = f"{tokens[line]:,}" if line.direction else ""
        table.add_row(*map(escape, (subject, line.day, line.event_type, model, direction)), f"{count:,}", counted)
        what = " ".join(filter(None, (line.day, line.event_type, model, direction)))
        listed.append((subject, f"{what}: {count:,} events" + (f", {counted} tokens" if counted else "")))
    _print(console, table, listed)
    if unit == "month":
        console.print(f"by day: with --json, or with --since and --until of at most {_SHOWN_DAYS} days")
    for text in summary(totals.books):
        console.print(text, markup=False)
    console.print("dry run: nothing was sent, nothing was recorded")


def _days_of(totals: Totals) -> int:
    """How many days there are from the first to the last one."""
    days = [date.fromisoformat(line.day) for line in totals.events]
    return (max(days) - min(days)).days + 1 if days else 0


# JSON


def plan_as_dict(plan: Plan, estimate: Estimate | None) -> dict[str, Any]:
    """The plan for `--json`."""
    return {
        "scope": {"since": plan.scope.since, "until": plan.scope.until, "subject": plan.scope.subject},
        "files": [
            {
                "path": file.survey.path,
                "size_bytes": file.survey.stamp.size,
                "content_bytes": file.survey.content_bytes,
                "first_entry": _rfc3339(file.survey.first_at),
                "last_entry": _rfc3339(file.survey.last_at),
                "finding": str(file.finding),
                "copy_of": file.copy_of,
                "bytes_to_send": file.bytes_to_send,
                "damage": file.survey.damage,
            }
            for file in plan.files
        ],
        "passed_over": [{"path": printable(path), "reason": why} for path, why in plan.skipped.items()],
        "unreadable": [{"path": printable(path), "reason": why} for path, why in plan.unreadable.items()],
        "bytes_to_send": plan.bytes_to_send,
        "estimated_entries": plan.entries_to_send,
        "estimated_events": _events_of(plan, estimate),
        "warnings": plan.warnings,
    }


def _rfc3339(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def result_as_dict(replay: Replay, state: ReplayState) -> dict[str, Any]:
    """What became of the files, for `--json`. `books` are those of this replay, `books_in_all` all of a file."""
    return {
        "files": [
            {
                "path": result.planned.survey.path,
                "outcome": str(result.outcome),
                "books": books_as_dict(_books_of(result, replay)) if result.file_ids else None,
                "books_in_all": None if (in_all := _books_in_all(result, state)) is None else books_as_dict(in_all),
            }
            for result in replay.results
        ],
        "books": books_as_dict(replay.tally.books),
        "remarks": remarks(replay),
        "stopped": replay.was_stopped,
        "failure": None if replay.failure is None else str(replay.failure),
        "exit_code": replay.exit_code,
    }


def totals_as_list(totals: Totals) -> list[dict[str, Any]]:
    """A dry run's totals, for `--json`."""
    return [{**line._asdict(), "events": events, "tokens": tokens} for line, events, tokens in totals.lines()]


def books_as_dict(books: Books) -> dict[str, Any]:
    """Counts by name, reasons as nested tables, as in `status --json`."""
    return books.as_dict() | {"balanced": books.balanced}
