"""What a replay prints: the plan, progress, the books per file, a dry run's totals; as tables or as one JSON document.

Results go to stdout, progress to stderr: a bar on a terminal, else a line in the log from time to time. Only shows.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from metershipper.books import DEAD_LETTERS, SKIPPED, Books, Count
from metershipper.filter import summary
from metershipper.logs import printable
from metershipper.replay import Replay
from metershipper.replay_command import Estimate, Totals
from metershipper.replay_outcome import Outcome
from metershipper.replay_plan import Finding, Plan, PlannedFile
from metershipper.replay_state import ReplayState

log = logging.getLogger("metershipper.replay")

TOLD_EVERY_SECONDS = 10.0
SHOWN_EVERY_SECONDS = 0.2
# How many of the files and groups that are passed over are named.
SHOWN_SKIPPED = 10
_WIDE = 240


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


def show_plan(plan: Plan, estimate: Estimate | None) -> None:
    """The files as a table, what is to be sent, and what speaks against it."""
    console = _console()
    table = _table("file", "first entry (UTC)", "last entry (UTC)", "", "size", "to send", numbers_from=4)
    for file in plan.files:
        looked_at = file.survey
        table.add_row(
            *(escape(printable(looked_at.path)), time_of(looked_at.first_at), time_of(looked_at.last_at)),
            *(_finding_of(file), size_of(looked_at.stamp.size), size_of(file.bytes_to_send)),
        )
    console.print(table)
    for path, reason in plan.skipped[:SHOWN_SKIPPED]:
        console.print(f"passed over: {printable(path)}: {reason}", markup=False)
    if len(plan.skipped) > SHOWN_SKIPPED:
        console.print(f"passed over: {len(plan.skipped) - SHOWN_SKIPPED} more files")
    console.print(_to_send(plan, estimate), markup=False)
    for warning in plan.warnings:
        console.print(f"! {printable(warning)}", markup=False)


def _to_send(plan: Plan, estimate: Estimate | None) -> str:
    if not plan.to_send:
        is_all = all(file.finding in (Finding.DELIVERED, Finding.COPY) for file in plan.files)
        return "nothing to send" + (": all of it is already delivered" if is_all else "")
    text = f"to send: {size_of(plan.bytes_to_send)} of content from {len(plan.to_send)} files, "
    text += f"about {plan.entries_to_send:,} entries"
    if estimate is not None:
        text += f" and {estimate.events:,} events; at least {_duration(estimate.seconds)} of this machine's work"
    return text + (f"; only {_scope_of(plan)}" if plan.scope.canonical else "")


def _scope_of(plan: Plan) -> str:
    scope = plan.scope
    parts = [f"from {scope.since}" if scope.since else "", f"before {scope.until}" if scope.until else ""]
    parts.append(f"of {printable(scope.subject)}" if scope.subject else "")
    return " ".join(filter(None, parts))


def _finding_of(file: PlannedFile) -> str:
    copy = f" of {escape(printable(file.copy_of))}" if file.copy_of else ""
    damaged = ", damaged" if file.survey.damage is not None else ""
    return f"{file.finding}{copy}{damaged}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _console() -> Console:
    """Standard output; what is no terminal is wide enough for any table."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDE)


def _table(*columns: str, numbers_from: int) -> Table:
    """`numbers_from`: the column with which numbers begin, set to the right."""
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"  # a path is of no use without its end
    for column in table.columns[numbers_from:]:
        column.justify = "right"
    return table


# Progress


@contextmanager
def looking() -> Iterator[tuple[Callable[[int, int], None], Callable[[int], None]]]:
    """Progress of looking at the files: what to call at its start, with files and bytes, and with each more bytes."""
    with _bar("looking at the files", DownloadColumn()) as (progress, task):

        def start(files: int, size: int) -> None:
            progress.update(task, total=size, description=f"looking at {files} files")

        yield start, lambda count: progress.advance(task, count)


@contextmanager
def _bar(description: str, *columns: Any, **fields: Any) -> Iterator[tuple[Progress, TaskID]]:
    console = Console(stderr=True)
    progress = Progress(
        *(TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn()),
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
    with _bar("replaying", DownloadColumn(), TextColumn("{task.fields[rates]}"), rates="") as (progress, task):
        progress.update(task, total=replay.tally.total_bytes)
        is_shown = not progress.disable

        def watch() -> None:
            began = told = time.monotonic()
            while not stopped.wait(SHOWN_EVERY_SECONDS):
                now = time.monotonic()
                if is_shown:
                    progress.update(task, completed=replay.tally.read_bytes, rates=_rates(replay, now - began))
                elif now - told >= TOLD_EVERY_SECONDS:
                    told = now
                    _tell(replay, now - began)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()


def _rates(replay: Replay, seconds: float) -> str:
    tally = replay.tally
    return (
        f"{tally.entries / seconds:,.0f} entries/s, {tally.events / seconds:,.0f} events/s, "
        f"{tally.acknowledged:,} acknowledged"
    )


def _tell(replay: Replay, seconds: float) -> None:
    tally = replay.tally
    done = tally.read_bytes / (tally.total_bytes or 1)
    left = "?" if not done else _duration(seconds * (1 - min(1.0, done)) / done)
    log.info(
        "replaying: %d %% of %s read, %s, about %s left",
        *(done * 100, size_of(tally.total_bytes), _rates(replay, seconds), left),
        extra={"read_bytes": tally.read_bytes, "events": tally.events, "acknowledged_events": tally.acknowledged},
    )


# The end


def show_result(replay: Replay, state: ReplayState) -> None:
    """The books per file, and of this replay as a whole."""
    console = _console()
    columns = ("entries", "billed", "skipped", "events", "acknowledged", "dead letters")
    table = _table("file", "", *columns, numbers_from=2)
    for result in replay.results:
        books = state.books_of(result.file_ids)
        numbers = [books[Count.ENTRIES], books[Count.BILLED], books.skipped, books[Count.EVENTS]]
        numbers += [books[Count.ACKNOWLEDGED], books.dead_letters + books[Count.REFUSED]]
        shown = [f"{number:,}" for number in numbers] if result.file_ids else [""] * len(numbers)
        table.add_row(escape(printable(result.planned.survey.path)), str(result.outcome), *shown)
    console.print(table)
    for line in summary(replay.tally.books, "dead letters") if replay.tally.books else ():
        console.print(line, markup=False)
    if refused := replay.tally.books[Count.REFUSED]:
        console.print(f"events refused by the endpoint, kept as dead letters: {refused}")
    for line in remarks(replay):
        console.print(f"! {printable(line)}", markup=False)


def remarks(replay: Replay) -> list[str]:
    """What is left, and what to do about it."""
    found = [f"{each.planned.survey.path}: {each.note}" for each in replay.results if each.note]
    for result in replay.results:
        looked_at = result.planned.survey
        if result.outcome is Outcome.DAMAGED:
            found.append(
                f"{looked_at.path}: does not unpack behind byte {looked_at.content_bytes} of its content "
                f"({looked_at.damage}); replay it again once it is whole"
            )
        elif result.outcome in (Outcome.GREW, Outcome.UNFINISHED):
            found.append(f"{looked_at.path}: {result.outcome}; replay it again once it is complete")
    if replay.was_stopped:
        found.append("stopped: the same command goes on where this one was, and sends nothing twice")
    if replay.tally.books.dead_letters or replay.tally.books[Count.REFUSED]:
        found.append("dead letters: see `metershipper dead-letters list`")
    return found


def show_totals(totals: Totals) -> None:
    """What a dry run found."""
    console = _console()
    table = _table("subject", "day (UTC)", "event type", "model", "direction", "events", "tokens", numbers_from=5)
    for line, events, tokens in totals.lines():
        shown = (printable(line.subject), line.day, line.event_type, printable(line.model or ""), line.direction or "")
        table.add_row(*map(escape, shown), f"{events:,}", "" if tokens is None else f"{tokens:,}")
    console.print(table)
    for text in summary(totals.books):
        console.print(text, markup=False)
    console.print("dry run: nothing was sent, nothing was recorded")


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
        "passed_over": [{"path": path, "reason": reason} for path, reason in plan.skipped],
        "bytes_to_send": plan.bytes_to_send,
        "estimated_entries": plan.entries_to_send,
        "estimated_events": None if estimate is None else estimate.events,
        "warnings": plan.warnings,
    }


def _rfc3339(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def result_as_dict(replay: Replay, state: ReplayState) -> dict[str, Any]:
    """What became of the files, for `--json`."""
    return {
        "files": [
            {
                "path": result.planned.survey.path,
                "outcome": str(result.outcome),
                "books": books_as_dict(state.books_of(result.file_ids)) if result.file_ids else None,
            }
            for result in replay.results
        ],
        "books": books_as_dict(replay.tally.books),
        "remarks": remarks(replay),
        "stopped": replay.was_stopped,
        "exit_code": replay.exit_code,
    }


def totals_as_list(totals: Totals) -> list[dict[str, Any]]:
    """A dry run's totals, for `--json`."""
    return [{**line._asdict(), "events": events, "tokens": tokens} for line, events, tokens in totals.lines()]


def books_as_dict(books: Books) -> dict[str, Any]:
    """Counts by name, reasons as nested tables, as in `status --json`."""
    plain: dict[str, Any] = {str(count): books[count] for count in Count}
    reasons = {"skipped": books.by_reason(SKIPPED), "dead_letters": books.by_reason(DEAD_LETTERS)}
    return plain | reasons | {"balanced": books.balanced}
