"""Follows the configured files and the spool and yields blocks of whole lines: the async face of `files` and `spool`.

Owns the waiting: for changes that the kernel reports (watchfiles), and a poll for file systems that report none. All
blocking file work goes to a thread here. Never maps a line and never moves a position.
"""

import asyncio
import logging
import sqlite3
from collections import deque
from typing import Protocol

from watchfiles import awatch

from metershipper.files import FileSet
from metershipper.followed import Block

log = logging.getLogger("metershipper.tailer")

# New, renamed and rotated files are found within this: a second is what is promised.
POLL_SECONDS = 0.75
# Where the kernel reports no changes, the open files are looked at this often.
UNWATCHED_SECONDS = 0.2
# Kernel events are gathered for this long before they wake the reader: a busy log would report every line.
WATCH_STEP_MS = 50
WATCH_DEBOUNCE_MS = 100


class Source(Protocol):
    """What is read in turn."""

    def next_block(self) -> Block | None: ...


class Tailer:
    """Blocks of lines from a `FileSet`, and a spool, as they appear. One reader at a time, beside `look_around` and
    `watch`.
    """

    def __init__(self, files: FileSet, spool: Source | None = None, *, poll_seconds: float = POLL_SECONDS) -> None:
        self._files = files
        self._sources: deque[Source] = deque((files,) if spool is None else (files, spool))
        self._poll_seconds = poll_seconds
        self._wait_seconds: float | None = None
        self._wake = asyncio.Event()
        self._directories: set[str] = set()
        self._directories_changed = asyncio.Event()
        self._stopped = False

    async def start(self) -> None:
        """Find the files and where to read on. Raises what the checkpoint raises."""
        await asyncio.to_thread(self._files.load)
        await self._scan()

    def stop(self) -> None:
        """Read nothing more: a waiting `next_block` returns."""
        self._stopped = True
        self._wake.set()

    def wake(self) -> None:
        """There is something new to read."""
        self._wake.set()

    async def next_block(self, wait_seconds: float | None) -> Block | None:
        """The next block; None when there is none after `wait_seconds`, or when something else than lines came up."""
        self._wake.clear()
        if self._stopped:
            return None
        block = await self._read()
        if block is not None:
            return block
        waits = [seconds for seconds in (wait_seconds, self._wait_seconds) if seconds is not None]
        try:
            async with asyncio.timeout(min(waits, default=None)):
                await self._wake.wait()
        except TimeoutError:
            return None
        return None if self._stopped else await self._read()

    async def _read(self) -> Block | None:
        try:
            return await asyncio.to_thread(self._next_in_turn)
        except OSError as error:
            log.error("the spool can't be read (%s); nothing is lost, trying again", error.strerror)
            await asyncio.sleep(self._poll_seconds)
            return None
        except sqlite3.OperationalError as error:
            self._complain(error)
            await asyncio.sleep(self._poll_seconds)
            return None

    def _next_in_turn(self) -> Block | None:
        for _ in range(len(self._sources)):
            self._sources.rotate(-1)
            if (block := self._sources[0].next_block()) is not None:
                return block
        return None

    async def look_around(self) -> None:
        """Look for new and rotated files, also while nothing is read: what is open can't be deleted unread.

        Until cancelled.
        """
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                await self._scan()
            except sqlite3.OperationalError as error:
                self._complain(error)
            self._wake.set()

    def _complain(self, error: sqlite3.OperationalError) -> None:
        # What is read must be known to the checkpoint first: nothing was stepped over.
        log.error("files can't be recorded (%s); nothing is lost, trying again", error)

    async def _scan(self) -> None:
        await asyncio.to_thread(self._files.scan)
        directories = await asyncio.to_thread(self._files.directories)
        if directories != self._directories:
            self._directories = directories
            self._directories_changed.set()

    async def watch(self) -> None:
        """Wake the reader on every change in the followed directories, until cancelled."""
        while True:
            self._directories_changed.clear()
            if not self._directories:
                await self._directories_changed.wait()
                continue
            try:
                await self._watch(sorted(self._directories))
            except (OSError, RuntimeError) as error:
                # No inotify here, or no watches left: polling does it, and a change of directories tries again.
                self._wait_seconds = UNWATCHED_SECONDS
                log.warning("the kernel reports no changes (%s); looking every %g s", error, UNWATCHED_SECONDS)
                await self._directories_changed.wait()

    async def _watch(self, directories: list[str]) -> None:
        changes = awatch(
            *directories,
            watch_filter=None,
            debounce=WATCH_DEBOUNCE_MS,
            step=WATCH_STEP_MS,
            stop_event=self._directories_changed,
            recursive=False,
            ignore_permission_denied=True,
        )
        async for _ in changes:
            self._wake.set()
