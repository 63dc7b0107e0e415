"""What the `dead-letters` commands do, over one state directory: list, show, retry, purge.

Reading works beside a running process. A retry is done by that process, which finds the request in the database; where
none runs, here. Never prints: it returns or yields what is to be shown.
"""

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from metershipper.batcher import Batch
from metershipper.checkpoint import Checkpoint
from metershipper.config import Config, endpoint_of
from metershipper.dead_letters import PAGE_ROWS, Filter, Letter
from metershipper.errors import StateError, StateInUse, UsageError
from metershipper.ledger import Ledger
from metershipper.mapper import Mapper
from metershipper.openmeter import Endpoint
from metershipper.redelivery import Redelivery
from metershipper.retry import one_line
from metershipper.shipper import Shipper
from metershipper.state import StateLock

POLL_SECONDS = 0.1
# A retry that has not come to an end after this long is left to `run`.
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Retried:
    """How a retry ended, in letters: `kept` ones failed again, `waiting` ones are left to `run`."""

    asked: int
    settled: int
    kept: int
    waiting: int

    @property
    def exit_code(self) -> int:
        """0 done, 3 partial."""
        return 3 if self.kept or self.waiting else 0


def parse_instant(text: str) -> float:
    """Seconds since the epoch of a date or a time in ISO 8601; UTC unless it says otherwise. Raises: UsageError."""
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{text}: not a date or time like 2026-05-01 or 2026-05-01T12:00:00Z") from None
    return (instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp()


def letters(directory: Path, wanted: Filter, limit: int) -> Iterator[Letter]:
    """Up to `limit` letters, oldest first. Raises: StateError when nothing was recorded there yet."""
    with Checkpoint(directory, read_only=True) as checkpoint:
        after = 0
        while limit > 0:
            with checkpoint.reading():
                page = checkpoint.dead_letters.select(wanted, min(limit, PAGE_ROWS), after)
            if not page:
                return
            yield from page
            limit -= len(page)
            after = page[-1].dead_letter_id


def line_of(letter: Letter) -> str:
    """A letter on one line: number, when, where, why."""
    kept_at = datetime.fromtimestamp(letter.kept_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    who = f" {one_line(letter.subject)}" if letter.subject else ""
    tries = f", tried again {letter.tries} times" if letter.tries else ""
    place = f"{letter.path or 'a file that was forgotten'}, bytes {letter.start_offset}-{letter.end_offset}"
    return f"{letter.dead_letter_id} {kept_at} {letter.reason}{who} ({place}{tries}): {one_line(letter.detail)}"


def count(directory: Path, wanted: Filter) -> int:
    """How many letters fit."""
    with Checkpoint(directory, read_only=True) as checkpoint, checkpoint.reading():
        return checkpoint.dead_letters.count(wanted)


def purge(directory: Path, wanted: Filter) -> int:
    """Delete letters for good; returns how many. The books go on counting them."""
    with _writable(directory) as checkpoint, checkpoint.transaction():
        return checkpoint.dead_letters.purge(wanted)


def retry(config: Config, where: str, wanted: Filter) -> Retried:
    """Try letters again: by the running process, else here.

    Raises: StateError, ConfigError. After a stop half-way what was asked for is done by the next `run`.
    """
    directory = config.state.directory
    endpoint_of(config, where)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(_writable(directory))
        try:
            stack.enter_context(StateLock(directory))
            runs_elsewhere = False
        except StateInUse:
            runs_elsewhere = True
        with checkpoint.transaction():
            asked = checkpoint.dead_letters.want(wanted, time.time())
        if not asked:
            return Retried(0, 0, 0, 0)
        waiting = asyncio.run(_watch(checkpoint, asked) if runs_elsewhere else _deliver(config, where, checkpoint))
        left = _in_parts(checkpoint, asked)
        return Retried(len(asked), len(asked) - left, left - waiting, waiting)


def _writable(directory: Path) -> Checkpoint:
    """The checkpoint, also beside a running process. Raises: StateError when it is not of this version."""
    with Checkpoint(directory, read_only=True):
        return Checkpoint(directory)


def _in_parts(checkpoint: Checkpoint, ids: list[int]) -> int:
    """How many of these are still there; SQLite bounds how many may be named at once."""
    with checkpoint.reading():
        parts = [tuple(ids[start : start + PAGE_ROWS]) for start in range(0, len(ids), PAGE_ROWS)]
        return sum(checkpoint.dead_letters.count(Filter(ids=part)) for part in parts)


def _waiting(checkpoint: Checkpoint) -> int:
    with checkpoint.reading():
        return checkpoint.dead_letters.count(Filter(wanted=True))


async def _watch(checkpoint: Checkpoint, asked: list[int]) -> int:
    """Wait while the running process does it. Returns how many letters still wait."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (waiting := await asyncio.to_thread(_waiting, checkpoint)) and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(POLL_SECONDS)  # another process does it: there is no event to wait for
    return min(waiting, len(asked))


async def _deliver(config: Config, where: str, checkpoint: Checkpoint) -> int:
    """Do it in this process. Returns how many letters still wait."""
    settings, ledger = config.openmeter, Ledger()
    batches: asyncio.Queue[Batch] = asyncio.Queue()
    redelivery = Redelivery(checkpoint, Mapper(config.metering), settings.batch, batches.put)
    async with Endpoint(endpoint_of(config, where), settings) as endpoint:
        shipper = Shipper(
            endpoint, settings.retry, batches, ledger.acknowledged, ledger.refused, settings.max_in_flight
        )
        async with asyncio.TaskGroup() as tasks:
            working = [tasks.create_task(shipper.work()) for _ in range(settings.max_in_flight)]
            working.append(tasks.create_task(shipper.work_aside()))
            deadline = time.monotonic() + PATIENCE_SECONDS
            try:
                await redelivery.step()
                while (waiting := await asyncio.to_thread(_waiting, checkpoint)) and time.monotonic() < deadline:
                    await asyncio.sleep(POLL_SECONDS)
                    await redelivery.step()
            except sqlite3.OperationalError as error:
                raise StateError(f"{config.state.directory}: can't be written: {error}") from None
            finally:
                for task in working:
                    task.cancel()
    return waiting
