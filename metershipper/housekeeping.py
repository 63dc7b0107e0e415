"""What `run` does from time to time beside delivering: dead letters that are to be tried again, their bounds, and a
warning when usage waits for so long that an invoice could close without it.

Never stops or slows delivery: a state that can't be read or written at the moment is looked at again later.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable

from metershipper.books import CUT_OFF, Books
from metershipper.checkpoint import Checkpoint
from metershipper.dead_letters import MAX_AGE_SECONDS, MAX_CONTENT_BYTES, WARN_SHARE, Fill
from metershipper.redelivery import Redelivery

log = logging.getLogger("metershipper")

LOOK_SECONDS = 1.0
# Usage that waits for longer than this waits for something else than its turn.
WAITS_SECONDS = 10.0
BOUNDS_SECONDS = 3600.0
# OpenMeter's invoices take in what is stored up to an hour after their period (billing's collection interval, PT1H).
WARN_AGE_SECONDS = 1800.0
REPEAT_WARNING_SECONDS = 300.0
REPEAT_CUT_OFF_SECONDS = 30.0


class Housekeeping:
    """One task of a run.

    Args: `oldest_seconds`, how long the oldest unsettled lines wait, 0 when none do; `received`, what the receiver
    counts, which is moved to the checkpoint.
    """

    def __init__(
        self, checkpoint: Checkpoint, redelivery: Redelivery, oldest_seconds: Callable[[], float], received: Books
    ) -> None:
        self._checkpoint = checkpoint
        self._redelivery = redelivery
        self._oldest_seconds = oldest_seconds
        self._received = received
        self._cut_off = Books()
        self._tell_cut_off_at = 0.0
        self._warn_again_at = self._look_at_bounds_at = 0.0
        self._told_fault = False
        self._noted_read_at: int | None = 0  # at first, whatever the process before noted

    async def run(self) -> None:
        """Look after things until cancelled."""
        while True:
            try:
                await self._redelivery.step()
                await self._look_at_bounds()
                await self._note_age()
                await self.note_received()
                self._told_fault = False
            except sqlite3.OperationalError as error:
                if not self._told_fault:
                    log.warning("dead letters can't be looked after (%s); nothing is lost, trying again", error)
                    self._told_fault = True
            self._warn_of_age()
            await asyncio.sleep(LOOK_SECONDS)

    async def note_received(self) -> None:
        """Record what was counted since the last time. Raises sqlite3.OperationalError; then it is the next time."""
        if counted := Books(+self._received):
            self._received.subtract(counted)  # before: whoever cancels this does not stop the thread
            try:
                await asyncio.to_thread(self._checkpoint.count, counted)
            except sqlite3.OperationalError:
                self._received.update(counted)
                raise
            self._cut_off.update({name: n for name, n in counted.items() if name.startswith(CUT_OFF)})
        self._tell_cut_off()

    def _tell_cut_off(self) -> None:
        now = time.monotonic()
        if self._cut_off and now >= self._tell_cut_off_at:
            self._tell_cut_off_at = now + REPEAT_CUT_OFF_SECONDS
            counts = ", ".join(f"{n} {reason}" for reason, n in self._cut_off.by_reason(CUT_OFF).items())
            log.warning("http-log: cut off %s; what got a 200 is safe, Kong sends the rest again", counts)
            self._cut_off.clear()

    async def _note_age(self) -> None:
        """Let `status` tell how long usage waits, once it waits for longer than delivery takes."""
        age = self._oldest_seconds()
        read_at = round(time.time() - age) if age >= WAITS_SECONDS else None
        noted = self._noted_read_at
        if read_at is None and noted is None:
            return
        if read_at is None or noted is None or abs(read_at - noted) >= WAITS_SECONDS:
            await asyncio.to_thread(self._checkpoint.note_oldest_unsettled, read_at)
            self._noted_read_at = read_at

    def _warn_of_age(self) -> None:
        now, age = time.monotonic(), self._oldest_seconds()
        if age >= WARN_AGE_SECONDS and now >= self._warn_again_at:
            self._warn_again_at = now + REPEAT_WARNING_SECONDS
            log.warning(
                "the oldest usage that is not delivered was read %d min ago; nothing is lost, but OpenMeter closes an "
                "invoice an hour after its period",
                age // 60,
                extra={"oldest_unsettled_seconds": round(age)},
            )

    async def _look_at_bounds(self) -> None:
        if time.monotonic() >= self._look_at_bounds_at:
            expired, fill = await asyncio.to_thread(self._keep_bounds)
            self._look_at_bounds_at = time.monotonic() + BOUNDS_SECONDS
            tell_bounds(expired, fill)

    def _keep_bounds(self) -> tuple[int, Fill]:
        with self._checkpoint.transaction():
            table, now = self._checkpoint.dead_letters, time.time()
            return table.expire(now), table.fill(now)


def tell_bounds(expired: int, fill: Fill) -> None:
    """Warn before the content of dead letters is cut away, and say so when it was."""
    if expired:
        log.error(
            "%d dead letters are older than %d days: their content was cut away", expired, MAX_AGE_SECONDS / 86400
        )
    if fill.size >= WARN_SHARE or fill.age >= WARN_SHARE:
        log.error(
            "the dead letters fill %d %% of their %d MiB, and the oldest is %d days old: above that, or older than %d "
            "days, only their places are kept; see `metershipper dead-letters list`, then retry or purge",
            fill.size * 100,
            MAX_CONTENT_BYTES // 2**20,
            fill.age * MAX_AGE_SECONDS / 86400,
            MAX_AGE_SECONDS / 86400,
            extra={"dead_letters": fill.letters},
        )
