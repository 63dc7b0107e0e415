"""What the `replay` command does, in order: look at the files, plan, ask, deliver, report. Also the dry run.

Results go to the `out` console or, as JSON, to its caller; progress and logs to stderr. What is decided, sent and
printed is the business of the `replay_*` modules; here they are put together.
"""

import asyncio
import logging
import os
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from metershipper.archive import Damaged
from metershipper.books import Books
from metershipper.config import Config, endpoint_of
from metershipper.errors import MeterShipperError, UsageError
from metershipper.events import LLM_REQUEST, UsageEvent
from metershipper.mapper import Mapper
from metershipper.replay import Replay, task_of
from metershipper.replay_paths import Named, named_by
from metershipper.replay_plan import Plan, decide, make_plan
from metershipper.replay_reading import BatchLimits, Changed, Reading, Task
from metershipper.replay_state import ReplayState
from metershipper.replay_survey import Survey, survey
from metershipper.scope import Scope

log = logging.getLogger("metershipper.replay")

NO_ENTRY = "no entry of Kong's among the lines that were looked at"


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the beginning of the first file says about the whole: `seconds` of this machine's mapping alone."""

    events: int
    seconds: float


def look_around(
    config: Config,
    state: ReplayState,
    paths: Sequence[str],
    scope: Scope,
    *,
    on_start: Callable[[int, int], None] = lambda files, size: None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Plan:
    """The plan for what these paths name; `on_start` gets the number of files and their bytes. Raises: UsageError."""
    named = named_by(paths)
    on_start(len(named.paths), sum(os.stat(path).st_size for path in named.paths))
    surveys: list[Survey] = []
    for path in named.paths:
        try:
            looked_at = survey(path, state.look_up, on_bytes)
        except UsageError as error:
            if path not in named.sought:
                raise
            named.unreadable[path] = str(error).removeprefix(f"{path}: ")
            continue
        if looked_at.shows_no_entry and path in named.sought:
            named.skipped[path] = NO_ENTRY
        else:
            surveys.append(looked_at)
    if not surveys:
        raise UsageError(f"{', '.join(paths)}: no log in there{_because(named.unreadable | named.skipped)}")
    plan = _plan(config, state, surveys, scope, named)
    state.seen(record for looked_at in surveys for record in looked_at.records)
    return plan


def _because(reasons: Mapping[str, str]) -> str:
    return "".join(f"; {path}: {reason}" for path, reason in islice(reasons.items(), 3))


def _plan(config: Config, state: ReplayState, surveys: Sequence[Survey], scope: Scope, named: Named) -> Plan:
    def made(*, may_resume_run: bool, run: int | None) -> Plan:
        return make_plan(
            *(surveys, scope, named),
            window_days=config.openmeter.dedupe_window_days,
            may_resume_run=may_resume_run,
            now=time.time(),
            run_process_id=run,
        )

    run = state.run_process_id
    plan = made(may_resume_run=run is None, run=run)
    steps = [step for file in plan.files for step in file.decision.steps]
    if any(step.record is not None and step.record.origin == "run" for step in steps) and not state.hold_run_off():
        plan = made(may_resume_run=False, run=state.run_process_id)  # it was started just now
    return plan


def estimate(config: Config, plan: Plan) -> Estimate | None:
    """What the first lines that are to be sent become, as a measure for all; None where nothing is to be sent."""
    for file in plan.to_send:
        step = file.decision.steps[0]
        task = task_of(file.survey, file.decision, step, 0, plan.scope, config.inputs.max_line_bytes)
        try:
            with Reading(task, Mapper(config.metering), _NO_LIMITS) as reading:
                block = reading.next_block()
                began = time.perf_counter()
                if block is None:
                    continue
                events = sum(len(mapped.events) for _, mapped in reading.map(block))
        except (OSError, Damaged, Changed):
            continue
        share = plan.bytes_to_send / ((block.end_offset - block.start_offset) or 1)
        return Estimate(round(events * share), (time.perf_counter() - began) * share)
    return None


_NO_LIMITS = BatchLimits(1_000_000, 1 << 40)


def deliver(
    config: Config,
    where: str,
    state: ReplayState,
    plan: Plan,
    *,
    workers: int,
    events_per_second: float | None,
    grace_seconds: float,
    watch: Callable[[Replay], Any],
) -> Replay:
    """Send what the plan says; whether that failed is told by `failure`. `watch`: a context that shows progress."""
    replay = Replay(
        *(config, endpoint_of(config, where), state, plan),
        workers=workers,
        events_per_second=events_per_second,
        grace_seconds=grace_seconds,
    )
    with watch(replay), suppress(sqlite3.DatabaseError, MeterShipperError):
        asyncio.run(_until_signalled(replay))
    return replay


async def _until_signalled(replay: Replay) -> None:
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        log.info("%s: stopping; a second one stops at once", number.name)
        replay.stop()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, replay.stop_now)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    await replay.run()


# A dry run


class Line(NamedTuple):
    """What totals are told by. `model` and `direction` are None but for AI usage."""

    day: str
    event_type: str
    subject: str
    model: str | None
    direction: str | None


@dataclass(slots=True)
class Totals:
    """What would be sent: events and tokens of each line; and the books of it, were everything acknowledged."""

    events: Counter[Line]
    tokens: Counter[Line]
    books: Books

    def add(self, events: Sequence[UsageEvent]) -> None:
        """Count some events."""
        for event in events:
            model = getattr(event.data, "model", None) if event.type == LLM_REQUEST else None
            direction = event.data.type if event.type == LLM_REQUEST else None
            line = Line(event.time[:10], event.type, event.subject, model, direction)
            self.events[line] += 1
            if direction is not None:
                self.tokens[line] += event.data.tokens

    def lines(self) -> list[tuple[Line, int, int | None]]:
        """Each line with its events and, of AI usage, its tokens; in order of days."""
        ordered = sorted(self.events, key=lambda line: tuple(each or "" for each in line))
        return [(line, self.events[line], self.tokens[line] if line.direction else None) for line in ordered]


def dry_run(config: Config, state: ReplayState, plan: Plan, on_bytes: Callable[[int], None]) -> Totals:
    """Map all that would be sent, and send nothing."""
    totals = Totals(Counter(), Counter(), Books())
    mapper = Mapper(config.metering)
    may_resume_run = state.run_process_id is None
    kinds = Counter(file.survey.kind for file in plan.files)
    for file in plan.files:
        looked_at = file.survey
        while True:
            if not state.still_holds(looked_at):
                looked_at = survey(looked_at.path, state.look_up)
            decision = decide(looked_at, plan.scope, may_resume_run=may_resume_run, now=time.time())
            if not decision.steps:
                break
            step = decision.steps[0]
            file_id = state.claim(looked_at, step, plan.scope)
            assert file_id is not None
            task = task_of(looked_at, decision, step, file_id, plan.scope, config.inputs.max_line_bytes)
            end, tail = _add_up(task, mapper, totals, on_bytes)
            state.imagine(looked_at, step, file_id, plan.scope, end, tail)
            is_alone = kinds[looked_at.kind] == 1 and len(decision.steps) == 1
            if is_alone or end == step.start:
                break  # nothing more can be in it: it need not be unpacked again
    return totals


def _add_up(task: Task, mapper: Mapper, totals: Totals, on_bytes: Callable[[int], None]) -> tuple[int, bytes]:
    """Map one step. Returns how far that went, and the bytes before it. Raises: UsageError naming the file."""
    end, tail = task.start, b""
    try:
        with Reading(task, mapper, _NO_LIMITS) as reading:
            while (block := reading.next_block()) is not None:
                for part, mapped in reading.map(block):
                    totals.add(mapped.events)
                    totals.books.update(mapped.books)
                    end, tail = part.end_offset, part.tail
                on_bytes(block.end_offset - block.start_offset)
    except (Changed, Damaged):
        raise UsageError(f"{task.path}: changed while it was read") from None
    except OSError as error:
        raise UsageError(f"{task.path}: can't be read: {error.strerror}") from None
    return end, tail
