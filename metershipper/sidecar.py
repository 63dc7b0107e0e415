"""`run`: wires tailer, mapper, batcher, shipper and checkpoint into one process, and ends it in order.

The flow goes one way: a block of lines is read, mapped to a span, batched, shipped; the acknowledgement settles spans,
and what is settled is committed. Owns every task. Never interprets a line, an answer or a file.

What settles, and when: `ledger`. What one transaction holds: `Checkpoint.commit`.
"""

import asyncio
import logging
import sqlite3
import time
from collections import Counter
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

from metershipper.batcher import Batch, Batcher, Span
from metershipper.books import Books, Dead
from metershipper.checkpoint import Checkpoint
from metershipper.committer import Committer
from metershipper.config import Config, HttpLog, endpoint_of
from metershipper.errors import StateError
from metershipper.events import Mapped
from metershipper.files import FileSet
from metershipper.followed import Block
from metershipper.housekeeping import Housekeeping
from metershipper.ledger import Ledger, Settled
from metershipper.mapper import Mapper
from metershipper.openmeter import Endpoint
from metershipper.redelivery import Redelivery
from metershipper.retry import Answer
from metershipper.shipper import REPEAT_LOG_SECONDS, Shipper
from metershipper.spool import SPOOL_DIRECTORY, GroupCommit, Spool
from metershipper.state import StateLock
from metershipper.tailer import Tailer

log = logging.getLogger("metershipper")

# While Kong waits for an answer, reading pauses for this long after each block: what is on disk can wait, what Kong
# still has can be lost.
RECEIVING_FIRST_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Stopped:
    """How a run ended. `in_flight_events`: were on their way when the stop began; `finished_events` of them were still
    accepted or refused. `unsettled_events`: left for the next start, which reads them again.
    """

    in_flight_events: int
    finished_events: int
    unsettled_events: int
    forced: bool


class Sidecar:
    """One run over one state directory. `stop` ends it in order; `stop_now` does not wait for what is in flight.

    Args: `grace_seconds`, how long `stop` lets the batches in flight finish; `start_over`, whether a checkpoint that is
    damaged or lost is replaced, and everything that is still there read again.
    """

    def __init__(self, config: Config, where: str, grace_seconds: float, *, start_over: bool = False) -> None:
        self._config = config
        self._start_over = start_over
        self._url = endpoint_of(config, where)
        self._grace_seconds = grace_seconds
        settings = config.openmeter
        self._mapper = Mapper(config.metering)
        self._batcher = Batcher(settings.batch.max_events, settings.batch.max_bytes, settings.batch.max_wait_seconds)
        self._ledger = Ledger()
        self._batches: asyncio.Queue[Batch] = asyncio.Queue(maxsize=settings.max_in_flight)
        self._committer = Committer(self._ledger, self._write)
        self._untold: Counter[Dead] = Counter()
        self._tell_again_at = 0.0
        self._in_flight_at_stop = 0
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()

    def stop(self) -> None:
        """Stop reading, finish what is in flight within the grace period, checkpoint."""
        self._stop.set()

    def stop_now(self) -> None:
        """Leave what is in flight for the next start; what was acknowledged is still checkpointed."""
        self._stop.set()
        self._stop_now.set()

    async def run(self) -> Stopped:
        """Run until stopped.

        Raises: StateInUse, StateError, ConfigError before anything is read.
        """
        async with AsyncExitStack() as stack:
            checkpoint = self._checkpoint = self._open_state(stack)
            endpoint = await stack.enter_async_context(Endpoint(self._url, self._config.openmeter))
            inputs = self._config.inputs
            files = FileSet(inputs.files, checkpoint, time.monotonic, inputs.max_line_bytes)
            stack.callback(files.close)
            self._spool = self._open_spool(stack, checkpoint)
            tailer = Tailer(files, self._spool)
            received = await self._start_receiving(stack, tailer)
            settings = self._config.openmeter
            shipper = Shipper(
                endpoint, settings.retry, self._batches, self._accepted, self._refused, settings.max_in_flight
            )
            redelivery = Redelivery(checkpoint, Mapper(self._config.metering), settings.batch, self._batches.put)
            housekeeping = Housekeeping(checkpoint, redelivery, self.oldest_unsettled_seconds, received)
            log.info("started: events go to %s", self._url)
            try:
                await tailer.start()
            except sqlite3.OperationalError as error:
                raise StateError(f"{self._config.state.directory}: can't be written: {error}") from None
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._committer.run())
                    await self._read_and_ship(tailer, shipper, housekeeping)
                    self._committer.finish()
            except* sqlite3.DatabaseError as errors:
                raise StateError(f"{self._config.state.directory}: {errors.exceptions[0]}; nothing is lost") from None
            with suppress(sqlite3.OperationalError):  # recorded at the next start: it sends them with the same ids
                await redelivery.record()
                await housekeeping.note_received()
            return self._tell_stop()

    def oldest_unsettled_seconds(self) -> float:
        """How long ago the oldest lines were read that are not settled; 0 when all are."""
        return self._ledger.oldest_unsettled_seconds(time.monotonic())

    def _tell_stop(self) -> Stopped:
        left = self._ledger.unsettled_events
        in_flight = max(self._in_flight_at_stop, left)  # a block may have been read meanwhile
        stopped = Stopped(in_flight, in_flight - left, left, self._stop_now.is_set())
        log.info(
            "stopped%s: %d events were in flight, %d finished, %d events left for the next start",
            *(_how(stopped), in_flight, in_flight - left, left),
            extra={"in_flight_events": in_flight, "finished_events": in_flight - left, "left_events": left},
        )
        return stopped

    def _open_state(self, stack: AsyncExitStack) -> Checkpoint:
        directory = self._config.state.directory
        lock = stack.enter_context(StateLock(directory))
        checkpoint = Checkpoint(directory, expected=lock.was_used, start_over=self._start_over)
        stack.enter_context(checkpoint)
        lock.mark_used()
        for path in checkpoint.set_aside:
            log.warning("%s: was damaged; kept for inquiry as %s", directory, path.name)
        if checkpoint.starts_over:
            log.warning("starting over: every log and its rotated files are read from the beginning")
        return checkpoint

    def _open_spool(self, stack: AsyncExitStack, checkpoint: Checkpoint) -> Spool | None:
        """The spool, also where nothing is received any more but something waits in it."""
        directory, inputs = self._config.state.directory, self._config.inputs
        try:
            if inputs.http_log is None and not Spool.holds_something(directory):
                return None
            settings = inputs.http_log or HttpLog()
            spool = Spool(
                directory,
                checkpoint,
                max_bytes=settings.spool_max_bytes,
                repeat_window_seconds=settings.repeat_window_seconds,
                max_line_bytes=inputs.max_line_bytes,
            )
            spool.open()
        except (OSError, sqlite3.OperationalError) as error:
            raise StateError(f"{directory / SPOOL_DIRECTORY}: can't be used: {error}") from None
        stack.callback(spool.close)
        return spool

    async def _start_receiving(self, stack: AsyncExitStack, tailer: Tailer) -> Books:
        """Receive what Kong posts, until `_receiving` is closed. Returns what is counted of it."""
        self._receiving = await stack.enter_async_context(AsyncExitStack())
        self._storing: GroupCommit | None = None
        settings = self._config.inputs.http_log
        if settings is None or self._spool is None:
            return Books()
        from metershipper.receiver import Receiver  # a web server: only who receives pays for it

        self._storing = GroupCommit(self._spool, tailer.wake)
        receiver = Receiver(settings, self._storing.store)
        await self._receiving.enter_async_context(receiver.serving())
        return receiver.counts

    async def _read_and_ship(self, tailer: Tailer, shipper: Shipper, housekeeping: Housekeeping) -> None:
        async with asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(self._read(tailer))
            workers = [tasks.create_task(shipper.work()) for _ in range(self._config.openmeter.max_in_flight)]
            workers.append(tasks.create_task(shipper.work_aside()))
            keeper = tasks.create_task(housekeeping.run())
            watchers = [tasks.create_task(tailer.watch()), tasks.create_task(tailer.look_around())]
            if self._storing is not None:
                watchers.append(tasks.create_task(self._storing.run()))
            await self._stop.wait()
            self._in_flight_at_stop = self._ledger.unsettled_events
            keeper.cancel()
            tailer.stop()
            drained = tasks.create_task(self._drain(reader))
            forced = tasks.create_task(self._stop_now.wait())
            await asyncio.wait({drained, forced}, timeout=self._grace_seconds, return_when=asyncio.FIRST_COMPLETED)
            for task in (reader, drained, forced, *watchers, *workers):
                task.cancel()

    async def _drain(self, reader: "asyncio.Task[None]") -> None:
        await self._receiving.aclose()
        await asyncio.wait({reader})
        await self._batches.join()

    # Reading: lines become spans, spans become batches

    async def _read(self, tailer: Tailer) -> None:
        while not self._stop.is_set():
            block = await tailer.next_block(self._batcher.wait_seconds(time.monotonic()))
            if block is not None:
                self._take(block)
            if self._storing is not None and self._storing.is_busy:
                await asyncio.sleep(RECEIVING_FIRST_SECONDS)
            for batch in self._batcher.take_due(time.monotonic()):
                await self._batches.put(batch)  # the bound of this queue is what stops reading during an outage
        for batch in self._batcher.take_due(time.monotonic(), all_of_it=True):
            await self._batches.put(batch)

    def _take(self, block: Block) -> None:
        mapped = self._mapper.map_block(block)
        place = (block.file_id, block.end_offset, block.tail)
        span = Span.of(*place, mapped, block.start_offset, time.monotonic())
        self._tell_dead_letters(mapped)
        self._ledger.opened(span)
        self._batcher.add(span, mapped.events, time.monotonic())
        if not mapped.events:
            self._committer.wake()

    def _tell_dead_letters(self, mapped: Mapped) -> None:
        """Say that a person is needed; a flood of bad lines is summed up from time to time."""
        self._untold.update(letter.reason for letter in mapped.dead_letters)
        now = time.monotonic()
        if self._untold and now >= self._tell_again_at:
            self._tell_again_at = now + REPEAT_LOG_SECONDS
            counts = ", ".join(f"{count} {reason}" for reason, count in self._untold.most_common())
            log.error("kept as dead letters: %s; nothing is lost, see `metershipper dead-letters list`", counts)
            self._untold.clear()

    # Settling: acknowledgements become commits

    def _accepted(self, batch: Batch) -> None:
        self._ledger.acknowledged(batch)
        self._committer.wake()

    def _refused(self, batch: Batch, answer: Answer) -> None:
        self._ledger.refused(batch, answer)
        self._committer.wake()

    async def _write(self, settled: list[Settled]) -> None:
        if settled:
            await asyncio.to_thread(self._write_durably, settled)

    def _write_durably(self, settled: list[Settled]) -> None:
        self._checkpoint.commit(settled)
        for ground in settled:
            if self._spool is not None and ground.file_id == self._spool.file_id:
                self._spool.settled(ground.end_offset)


def _how(stopped: Stopped) -> str:
    if stopped.forced:
        return " at once"
    return " before the endpoint took everything" if stopped.unsettled_events else ""
