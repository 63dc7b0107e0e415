"""The receiver's durable buffer: what was received is on disk before anybody is told so, and is read like any log.

Owns the spool directory: segments, and the digests by which entries that come again are recognised. Blocks, but for
`GroupCommit`, through which the event loop reaches it: what many requests bring meanwhile shares one sync of the disk.
Never looks into a line and never moves a position: to the checkpoint the spool is one file.
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

from metershipper.bodies import Line
from metershipper.content import BLOCK_BYTES, Content
from metershipper.followed import Block, FollowedFile
from metershipper.records import Gap, Identity, Lost, Sample
from metershipper.repeats import DIGEST_BYTES, Repeats, digest_of
from metershipper.segments import SKIPPED_BYTES, Segments, segments_in

log = logging.getLogger("metershipper.spool")

SPOOL_DIRECTORY = "spool"
_DIGESTS_PREFIX = "repeats-"
_DIGESTS_NAME = re.compile(re.escape(_DIGESTS_PREFIX) + "[0-9]{12}")
# From here on it is told that the spool fills up; and again after it was below.
WARN_SHARE = 0.8


class Registry(Protocol):
    """What the checkpoint knows of the spool."""

    def spool(self) -> tuple[int, int | None]: ...
    def report_gap(self, gap: Gap) -> None: ...


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of the lines of one request: all are on disk, but for those that were there already."""

    lines: int
    repeats: int


class NoRoom(Exception):
    """The spool or its disk is full, or the disk fails: nothing of this was kept. The words say which."""


class Spool:
    """One spool in a state directory. `store` is called by one thread, the other methods by any.

    Args: `max_bytes`, the largest size of all segments together; `repeat_window_seconds`, for how long an entry is
    known again.
    """

    def __init__(
        self,
        state_directory: Path,
        registry: Registry,
        *,
        max_bytes: int,
        repeat_window_seconds: float,
        max_line_bytes: int,
    ) -> None:
        self._directory = state_directory / SPOOL_DIRECTORY
        self._registry = registry
        self._max_bytes = max_bytes
        self._max_line_bytes = max_line_bytes
        self._segments = Segments(self._directory, max_bytes)
        self._repeats = Repeats(repeat_window_seconds)
        self._settled_position = 0
        self._warned = False

    @staticmethod
    def holds_something(state_directory: Path) -> bool:
        """Whether there is a spool that may hold entries, of this or an earlier configuration. Raises OSError."""
        return bool(segments_in(state_directory / SPOOL_DIRECTORY))

    def open(self) -> None:
        """Find what there is of it. Raises OSError, StateError, sqlite3.OperationalError."""
        self.file_id, position = self._registry.spool()
        self._segments.open(position or 0)
        self._read_digests()
        self._read_last_segment()
        self.settled(position or 0)  # a crash may have come before it was deleted
        start = self._segments.start if position is None else position
        path = str(self._directory)
        self._file = FollowedFile(self.file_id, path, _Stream(self._segments), start, b"", Sample(), format="ndjson")

    def close(self) -> None:
        """Let it go, once nobody stores or reads."""
        self._segments.close()

    # Writing

    def store(self, requests: Sequence[Sequence[Line]]) -> list[Stored | NoRoom]:
        """Make the lines of several requests durable, with one sync; what became of each request."""
        now = time.time()
        self._remove_digests(self._repeats.expire(now))
        results: list[Stored | NoRoom] = []
        parts: list[bytes] = []
        added: list[tuple[int, bytes]] = []
        room_taken = 0
        for lines in requests:
            new, digests = self._without_repeats(lines, now)
            part = b"\n".join([*new, b""])
            if part and (fault := self._fault_of(room_taken + len(part))):
                self._forget(digests)
                results.append(NoRoom(fault))
                continue
            room_taken += len(part)
            parts.append(part)
            added += digests
            results.append(Stored(len(new), len(lines) - len(new)))
        if room_taken:
            try:
                self._segments.append(parts)
            except OSError as error:
                self._forget(added)
                self.settled(self._settled_position)  # what stayed because it was being written to: that is room
                failed = NoRoom(f"the spool can't be written: {error.strerror}")
                return [result if result == Stored(0, 0) else failed for result in results]
            self._keep_digests(added)
        self._tell_fill()
        return results

    def _fault_of(self, length: int) -> str | None:
        try:
            return self._segments.fault_of(length)
        except OSError as error:
            return f"the spool can't be looked at: {error.strerror}"

    def _without_repeats(self, lines: Sequence[Line], now: float) -> tuple[list[Line], list[tuple[int, bytes]]]:
        """The lines that were not received before, and the digest of each with the number of its table."""
        new: list[Line] = []
        digests: list[tuple[int, bytes]] = []
        for line in lines:
            digest = digest_of(line)
            number = self._repeats.add(digest, now)
            if number is not None:
                new.append(line)
                digests.append((number, digest))
        return new, digests

    def _forget(self, digests: list[tuple[int, bytes]]) -> None:
        for _, digest in digests:
            self._repeats.forget(digest)

    def _tell_fill(self) -> None:
        share = self._segments.size_bytes / self._max_bytes
        if share >= WARN_SHARE and not self._warned:
            log.warning(
                "the spool is %d %% full: when it is full, Kong is told to try again later, and gives up after its "
                "max_retry_time (60 s unless set); is the endpoint reachable?",
                share * 100,
                extra={"spool_bytes": self._segments.size_bytes, "spool_max_bytes": self._max_bytes},
            )
        elif share < WARN_SHARE and self._warned:
            log.info("the spool is below %d %% again", WARN_SHARE * 100)
        self._warned = share >= WARN_SHARE

    # Digests, for the time after a restart. Written after the entries are durable, and not synced: what is lost of them
    # beyond the last segment lets a repeat pass, which the server knows by its id.

    def _keep_digests(self, added: list[tuple[int, bytes]]) -> None:
        for number, digests in groupby(added, key=lambda each: each[0]):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            try:
                fd = os.open(self._digests_path(number), flags, 0o600)
                try:
                    os.write(fd, b"".join(digest for _, digest in digests))
                finally:
                    os.close(fd)
            except OSError as error:
                log.warning("%s: can't be written (%s); repeats may pass", self._digests_path(number), error.strerror)

    def _digests_path(self, number: int) -> Path:
        return self._directory / f"{_DIGESTS_PREFIX}{number:012d}"

    def _remove_digests(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            try:
                self._digests_path(number).unlink(missing_ok=True)
            except OSError as error:  # the next start tries again
                log.warning("%s: can't be deleted (%s)", self._digests_path(number), error.strerror)

    def _read_digests(self) -> None:
        for path in sorted(path for path in self._directory.iterdir() if _DIGESTS_NAME.fullmatch(path.name)):
            number = int(path.name.removeprefix(_DIGESTS_PREFIX))
            written_at = path.stat().st_mtime
            if not self._is_within_window(written_at):
                path.unlink()
                continue
            data = path.read_bytes()
            ends = range(DIGEST_BYTES, len(data) + 1, DIGEST_BYTES)  # the last one may be torn
            self._repeats.restore(number, [data[end - DIGEST_BYTES : end] for end in ends], written_at)

    def _read_last_segment(self) -> None:
        """The digests of what was stored just before a crash, which there was no time to write."""
        segment = self._segments.last
        if segment is None or not self._is_within_window(segment.path.stat().st_mtime):
            return
        now = time.time()
        self._remove_digests(self._repeats.expire(now))
        with segment.path.open("rb") as file:
            while lines := file.readlines(BLOCK_BYTES):
                _, digests = self._without_repeats([line.removesuffix(b"\n") for line in lines], now)
                self._keep_digests(digests)

    def _is_within_window(self, written_at: float) -> bool:
        return 0 <= time.time() - written_at <= self._repeats.window_seconds

    # Reading

    def next_block(self) -> Block | None:
        """The next whole lines. Raises OSError, sqlite3.OperationalError."""
        start = self._segments.next_start(self._file.offset)
        if start is None:
            return None
        if start != self._file.offset:
            self._step_over(start)
        return self._file.read_block(self._max_line_bytes)

    def _step_over(self, start: int) -> None:
        missing = start - self._file.offset
        if missing > SKIPPED_BYTES:
            log.error("%s: %d bytes are missing that were not delivered", self._directory, missing)
            path = str(self._directory)
            self._registry.report_gap(Gap(self.file_id, path, self._file.offset, start, Lost.VANISHED, time.time()))
        self._file.start_at(start, Sample())

    def settled(self, position: int) -> None:
        """Everything before `position` is in the checkpoint: delete what is not needed any more."""
        self._settled_position = max(position, self._settled_position)
        try:
            self._segments.release(position)
        except OSError as error:
            log.warning("%s: what is settled can't be deleted (%s)", self._directory, error.strerror)


class _Stream(Content):
    """All segments as one content. Owns no descriptor."""

    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self.fd = -1
        self.identity: Identity = (0, 0)

    def pread(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes; less at the end, and before what is missing."""
        data = self._segments.pread(size, offset)
        while data and len(data) < size and (more := self._segments.pread(size - len(data), offset + len(data))):
            data += more
        return data

    def state(self) -> tuple[int, int]:
        """Where it ends; nothing in it ever changes."""
        return self._segments.end, 0


class GroupCommit:
    """Stores what several requests bring at once. `on_stored` is called when there is something new to be read."""

    def __init__(self, spool: Spool, on_stored: Callable[[], None]) -> None:
        self._spool = spool
        self._on_stored = on_stored
        self._waiting: list[tuple[Sequence[Line], asyncio.Future[Stored | NoRoom]]] = []
        self._some = asyncio.Event()
        self.is_busy = False  # whether somebody waits for an answer

    async def store(self, lines: Sequence[Line]) -> Stored:
        """Returns once the lines are durable. Raises NoRoom; then none of them was kept."""
        result: asyncio.Future[Stored | NoRoom] = asyncio.get_running_loop().create_future()
        self._waiting.append((lines, result))
        self._some.set()
        stored = await result
        if isinstance(stored, NoRoom):
            raise stored
        return stored

    async def run(self) -> None:
        """Store what comes, until cancelled."""
        loop = asyncio.get_running_loop()
        # A thread of its own: what else blocks must not make Kong wait.
        with ThreadPoolExecutor(1, "spool") as executor:
            while True:
                self.is_busy = bool(self._waiting)
                await self._some.wait()
                self._some.clear()
                self.is_busy = True
                group, self._waiting = self._waiting, []
                results = await loop.run_in_executor(executor, self._spool.store, [lines for lines, _ in group])
                for (_, result), stored in zip(group, results, strict=True):
                    if not result.done():
                        result.set_result(stored)
                self._on_stored()
