"""Delivers what a plan says: wires reading, batching, shipping and the checkpoint, and ends in order.

The flow is that of `sidecar`, over files that have an end: a block is read and mapped to a span, batched, shipped; the
acknowledgement settles spans, and what is settled is committed. With several workers as many files are read at a time,
each by a process of its own; posting and committing is done here alone. Never interprets a line or an answer.
"""

import asyncio
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field

from metershipper.archive import Damaged
from metershipper.batcher import Batch, Span
from metershipper.books import Count
from metershipper.committer import Committer
from metershipper.config import Config
from metershipper.errors import MeterShipperError, StateError, UsageError
from metershipper.ledger import Ledger, Settled
from metershipper.mapper import Mapper
from metershipper.openmeter import Endpoint
from metershipper.replay_outcome import (
    FAULTS,
    WHOLE,
    FileResult,
    Outcome,
    Tally,
    outcome_after,
    outcome_before,
    outcome_of,
    tell_copies,
)
from metershipper.replay_plan import Decision, Plan, Step, decide, so_many_files
from metershipper.replay_reading import FAULTY_READING, BatchLimits, Changed, Reading, Task
from metershipper.replay_state import ReplayState
from metershipper.replay_survey import Survey, survey
from metershipper.replay_workers import Spans, Worker, WorkerDied
from metershipper.retry import Answer
from metershipper.scope import Scope
from metershipper.shipper import EMPTY_BATCH, Shipper
from metershipper.throttle import Throttle

log = logging.getLogger("metershipper.replay")

# When only events are left that fail again and again: how often the endpoint is asked whether it takes anything.
CANARY_SECONDS = 0.3
_CHANGED = "its content is not what it was when it was looked at; replay it again"
# Files that hold no entries at all must not fill the disk with dead letters.
BOUNDS_SECONDS = 10.0


@dataclass(slots=True, eq=False)
class _Claim:
    """A step on its way. `end`: of what was read of it; once that is `committed`, and no more is read, it is `done`.

    `is_whole`: whether all of it was read; None while it is being read. `is_last`: nothing of its file is behind it.
    """

    file_id: int
    end: int
    committed: int
    is_whole: bool | None = None
    is_last: bool = False
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Replay:
    """One delivery of one plan. `stop` ends it in order; `stop_now` does not wait for what is in flight.

    Args: `workers`, processes that read and map; 1: this one. `grace_seconds`, how long `stop` lets posts finish.
    """

    def __init__(
        self,
        config: Config,
        url: str,
        state: ReplayState,
        plan: Plan,
        *,
        workers: int = 1,
        events_per_second: float | None = None,
        grace_seconds: float = 8.0,
    ) -> None:
        self._config = config
        self._url = url
        self._state = state
        self._scope = plan.scope
        self.unreadable = plan.unreadable
        self._workers = workers
        self._grace_seconds = grace_seconds
        self._throttle = None if events_per_second is None else Throttle(events_per_second)
        batch = config.openmeter.batch
        most = batch.max_events if events_per_second is None else max(1, min(batch.max_events, int(events_per_second)))
        self._limits = BatchLimits(most, batch.max_bytes)
        self._mapper = Mapper(config.metering)
        self._ledger = Ledger()
        self._batches: asyncio.Queue[Batch] = asyncio.Queue(maxsize=config.openmeter.max_in_flight)
        self.results = [FileResult(file, outcome_before(file)) for file in plan.files]
        self._waiting = [result for result in reversed(self.results) if result.planned.decision.steps]
        kinds = Counter(file.survey.kind for file in plan.files)
        self._turns = {kind: asyncio.Lock() for kind, count in kinds.items() if count > 1}
        self.tally = Tally(plan.bytes_to_send)
        self._claims: dict[int, _Claim] = {}
        self._committer = Committer(self._ledger, self._write)
        self._delivered = asyncio.Event()
        self._bounds_at = 0.0
        self._died: WorkerDied | None = None
        self.failure: MeterShipperError | sqlite3.DatabaseError | None = None
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()

    def stop(self) -> None:
        """Read nothing more, finish what is in flight within the grace period, checkpoint."""
        self._stop.set()

    def stop_now(self) -> None:
        """Leave what is in flight for the next replay; what was acknowledged is still checkpointed."""
        self._stop.set()
        self._stop_now.set()

    @property
    def was_stopped(self) -> bool:
        """Whether something is left because it was stopped."""
        return self._stop.is_set() and any(
            result.outcome in (Outcome.WAITING, Outcome.INTERRUPTED) for result in self.results
        )

    @property
    def exit_code(self) -> int:
        """0 all is delivered, 3 something is left, else that of the failure."""
        if self.failure is not None:
            return getattr(self.failure, "exit_code", 1)
        is_whole = all(result.outcome in WHOLE for result in self.results) and not self.unreadable
        return 0 if is_whole and not self.tally.books.dead_letters and not self.tally.books[Count.REFUSED] else 3

    async def run(self) -> None:
        """Deliver. Raises: what becomes `failure`; what was acknowledged is committed before, if that is possible."""
        try:
            await self._run()
        except (sqlite3.DatabaseError, MeterShipperError) as error:
            self.failure = error
            raise
        finally:
            for result in self.results:
                if not self._claims.keys().isdisjoint(result.file_ids) and result.outcome not in FAULTS:
                    result.outcome = Outcome.INTERRUPTED

    async def _run(self) -> None:
        try:
            async with Endpoint(self._url, self._config.openmeter) as endpoint, asyncio.TaskGroup() as tasks:
                tasks.create_task(self._committer.run())
                await self._read_and_ship(endpoint)
                self._committer.finish()
        except* (sqlite3.DatabaseError, MeterShipperError) as errors:
            raise _first_of(errors) from None
        tell_copies(self.results)
        if self._committer.uncommitted:
            raise StateError(f"{self._config.state.directory}: positions could not be written; see the log")
        with suppress(sqlite3.OperationalError):  # nobody takes the claims of a replay that ended for those of another
            await asyncio.to_thread(self._state.commit, [], dict.fromkeys(self._claims, False))
        if self._died is not None:
            raise self._died

    async def _read_and_ship(self, endpoint: Endpoint) -> None:
        settings = self._config.openmeter
        if self._waiting:
            log.info("replaying %s: events go to %s", so_many_files(len(self._waiting)), self._url)
        shipper = Shipper(
            endpoint, settings.retry, self._batches, self._accepted, self._refused, settings.max_in_flight
        )
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
            shipping = [tasks.create_task(shipper.work()) for _ in range(settings.max_in_flight)]
            shipping.append(tasks.create_task(shipper.work_aside()))
            readers = [tasks.create_task(self._read_files(each)) for each in await self._started(stack)]
            drained = tasks.create_task(self._drain(readers))
            stopped = tasks.create_task(self._stop.wait())
            await asyncio.wait({drained, stopped}, return_when=asyncio.FIRST_COMPLETED)
            forced = tasks.create_task(self._stop_now.wait())
            await asyncio.wait({drained, forced}, timeout=self._grace_seconds, return_when=asyncio.FIRST_COMPLETED)
            for task in (*readers, drained, stopped, forced, *shipping):
                task.cancel()

    async def _started(self, stack: AsyncExitStack) -> Sequence[Worker | None]:
        """Who reads: processes, or None for this one."""
        if self._workers == 1:
            return [None]
        metering, count = self._config.metering, min(self._workers, max(1, len(self._waiting)))
        return [await stack.enter_async_context(Worker(metering, self._limits)) for _ in range(count)]

    async def _drain(self, readers: "Sequence[asyncio.Task[None]]") -> None:
        await asyncio.wait(readers)
        await self._batches.join()
        while self._ledger.unsettled_events and not self._stop.is_set():
            # Only what fails while nothing else is sent: whether the endpoint takes anything at all must be known.
            self._delivered.clear()
            try:
                async with asyncio.timeout(CANARY_SECONDS):
                    await self._delivered.wait()
            except TimeoutError:
                await self._batches.put(Batch(EMPTY_BATCH, 0, []))
                await self._batches.join()

    # Reading: file after file

    async def _read_files(self, worker: Worker | None) -> None:
        while self._waiting and not self._stop.is_set():
            result = self._waiting.pop()
            turn = self._turns.get(result.planned.survey.kind)
            try:
                if turn is None:
                    await self._replay_file(result, worker, is_alone=True)
                else:
                    async with turn:
                        await self._replay_file(result, worker, is_alone=False)
            except WorkerDied as died:
                result.outcome, result.note = Outcome.INTERRUPTED, str(died)
                self._died = died
                self._stop.set()

    async def _replay_file(self, result: FileResult, worker: Worker | None, *, is_alone: bool) -> None:
        """Send a file, step by step; what is known of it is looked up before each, as others may read it, too."""
        looked_at = result.planned.survey
        sent = False
        while not self._stop.is_set():
            try:
                looked_at = await asyncio.to_thread(self._surveyed, looked_at)
            except UsageError as error:
                result.outcome, result.note = Outcome.UNREADABLE, str(error)
                return
            if looked_at.kind != result.planned.survey.kind:
                result.outcome, result.note = Outcome.CHANGED, _CHANGED
                return
            decision = decide(looked_at, self._scope, may_resume_run=self._state.holds_run_off, now=time.time())
            if not decision.steps:
                result.outcome = outcome_of(looked_at, decision, sent=sent)
                return
            step = decision.steps[0]
            file_id = await asyncio.to_thread(self._state.claim, looked_at, step, self._scope)
            if file_id is None:
                continue
            result.file_ids.append(file_id)
            result.outcome = Outcome.INTERRUPTED
            limit = self._config.inputs.max_line_bytes
            task = task_of(looked_at, decision, step, file_id, self._scope, limit)
            claim = self._claims[file_id] = _Claim(file_id, step.start, step.start)
            claim.is_whole = sent = await self._send(result, task, claim, worker)
            claim.is_last = task.may_end_torn and claim.end == task.end
            self._committer.wake()
            if sent and len(decision.steps) == 1 and claim.end > step.start:
                result.outcome = await asyncio.to_thread(outcome_after, looked_at, decision)
                if is_alone:
                    return
            if not is_alone or sent:
                await self._until_done(claim)  # also of what can't be read on: a copy goes on behind it
            if not sent:
                return
            if claim.end == step.start:
                result.outcome = Outcome.UNFINISHED  # all that is there is the beginning of a record
                return

    def _surveyed(self, before: Survey) -> Survey:
        if self._state.still_holds(before):
            return before
        return survey(before.path, self._state.look_up)

    async def _until_done(self, claim: _Claim) -> None:
        done, stopped = asyncio.ensure_future(claim.done.wait()), asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({done, stopped}, return_when=asyncio.FIRST_COMPLETED)
        done.cancel()
        stopped.cancel()

    async def _send(self, result: FileResult, task: Task, claim: _Claim, worker: Worker | None) -> bool:
        """One step, to the end of its reading. Returns whether all of it was read."""
        try:
            async for spans, batches in self._made_of(task, worker):
                await self._ship(claim, spans, batches)
        except (Changed, Damaged):
            result.outcome, result.note = Outcome.CHANGED, _CHANGED
            return False
        except OSError as error:
            result.outcome, result.note = Outcome.UNREADABLE, f"can't be read: {error.strerror}"
            return False
        return not self._stop.is_set() or claim.end >= task.end

    async def _made_of(self, task: Task, worker: Worker | None) -> AsyncIterator[tuple[list[Span], list[Batch]]]:
        if worker is None:
            async for made in self._made_here(task):
                yield made
            return
        known = Spans()
        async for message in worker.messages(task):
            # What a process is ahead is much more than what is in flight: after a stop none of it is begun.
            is_over = self._stop.is_set()
            yield ([], known.take_rest(message)) if is_over else (message.spans, known.take(message))
            if message.fault is not None:
                raise message.fault
            if self._stop.is_set():
                if not known.waits:
                    return
                worker.stop()

    async def _made_here(self, task: Task) -> AsyncIterator[tuple[list[Span], list[Batch]]]:
        reading = Reading(task, self._mapper, self._limits)
        await asyncio.to_thread(reading.__enter__)
        fault: Exception | None = None
        try:
            while not self._stop.is_set() and (block := await asyncio.to_thread(reading.next_block)) is not None:
                yield reading.take(block)
        except FAULTY_READING as error:
            fault = error
        finally:
            reading.__exit__()
        yield [], reading.rest()  # whatever ended the reading: what was taken of it waits for all its events
        if fault is not None:
            raise fault

    async def _ship(self, claim: _Claim, spans: Sequence[Span], batches: Sequence[Batch]) -> None:
        now = time.monotonic()
        for span in spans:
            span.read_at = now
            self._ledger.opened(span)
            claim.end = span.end_offset
            self.tally.read_bytes += span.end_offset - span.start_offset
            self.tally.entries += span.books[Count.ENTRIES]
            self.tally.events += span.unsettled
            if not span.unsettled:
                self._committer.wake()
        for batch in batches:
            await self._throttled(batch)
            self.tally.posted(batch.events, time.time())
            await self._batches.put(batch)  # the bound of this queue is what stops reading during an outage

    async def _throttled(self, batch: Batch) -> None:
        if self._throttle is None:
            return
        # Also after a stop, for as long as that waits: what is in flight is no reason to go beyond the limit.
        await asyncio.sleep(self._throttle.wait_seconds(batch.events, time.monotonic()))

    # Settling: acknowledgements become commits

    def _accepted(self, batch: Batch) -> None:
        self._ledger.acknowledged(batch)
        self.tally.acknowledged += batch.events
        self.tally.answered(batch.events, time.time())
        self._delivered.set()
        self._committer.wake()

    def _refused(self, batch: Batch, answer: Answer) -> None:
        if batch.events:
            self._ledger.refused(batch, answer)
            self.tally.answered(batch.events, time.time())
        self._delivered.set()
        self._committer.wake()

    async def _write(self, settled: list[Settled]) -> None:
        """Positions, and in the same transaction the end of the claims that are reached by them."""
        reached = {ground.file_id: ground.end_offset for ground in settled}
        over = [
            claim
            for claim in self._claims.values()
            if claim.is_whole is not None and reached.get(claim.file_id, claim.committed) >= claim.end
        ]
        if settled or over:
            left = {claim.file_id: claim.is_whole is True and claim.is_last for claim in over}
            await asyncio.to_thread(self._state.commit, settled, left)
        for ground in settled:
            self.tally.settled(ground.file_id, ground.books)
            self._claims[ground.file_id].committed = ground.end_offset
        for claim in over:
            del self._claims[claim.file_id]
            claim.done.set()
        if any(ground.dead_letters or ground.refused for ground in settled) and time.monotonic() >= self._bounds_at:
            self._bounds_at = time.monotonic() + BOUNDS_SECONDS
            with suppress(sqlite3.OperationalError):  # the next time, then, or by `run`
                await asyncio.to_thread(self._state.keep_bounds)


def _first_of(errors: BaseExceptionGroup[Exception]) -> Exception:
    """One of what tasks, and tasks of tasks, ended with."""
    first = errors.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first


def task_of(looked_at: Survey, decision: Decision, step: Step, file_id: int, scope: Scope, max_line_bytes: int) -> Task:
    """A step as what is to be read for it."""
    passed = [(record.start_offset, record.position, Scope.parse(record.scope)) for record in step.others]
    ends_whole = looked_at.damage is None and not decision.unfinished and step.end == looked_at.content_bytes
    return Task(
        *(looked_at.path, file_id, step.start, step.end, looked_at.head, looked_at.stamp, scope),
        tuple(each for each in passed if each[0] < step.end and each[1] > step.start),
        ends_whole,
        max_line_bytes,
    )
