"""Commits what is settled, as it becomes settled: the last step of every delivery, of `run` as of `replay`.

Owns when that is done, and that what could not be written is kept and tried again. What settles is told by `ledger`;
what one transaction holds, by `Checkpoint.commit`.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable

from metershipper.ledger import Ledger, Settled, merge

log = logging.getLogger("metershipper")

# Commits are gathered for this long, so that fsync does not limit throughput.
COMMIT_INTERVAL_SECONDS = 0.1
COMMIT_RETRY_SECONDS = 1.0


class Committer:
    """One task. `write` makes settled ground durable, all of it or nothing, and may be called with none.

    Run it outside the tasks that a stop cancels: a commit is never cut off half-way.
    """

    def __init__(self, ledger: Ledger, write: Callable[[list[Settled]], Awaitable[None]]) -> None:
        self._ledger = ledger
        self._write = write
        self._woken = asyncio.Event()
        self._is_last = False
        self.uncommitted: list[Settled] = []

    def wake(self) -> None:
        """Something may be settled."""
        self._woken.set()

    def finish(self) -> None:
        """Nothing more will settle: commit what did, and end."""
        self._is_last = True
        self._woken.set()

    async def run(self) -> None:
        """Until `finish`; what could not be written by then is left in `uncommitted`."""
        while True:
            await self._woken.wait()
            self._woken.clear()
            last = self._is_last
            committed = await self._commit()
            if last:
                return
            await asyncio.sleep(COMMIT_INTERVAL_SECONDS if committed else COMMIT_RETRY_SECONDS)

    async def _commit(self) -> bool:
        self.uncommitted = merge(self.uncommitted, self._ledger.take_settled())
        try:
            await self._write(self.uncommitted)
        except sqlite3.OperationalError as error:
            log.error("positions can't be written (%s); nothing is lost, trying again", error)
            self._woken.set()
            return False
        self.uncommitted = []
        return True
