"""The state directory as a replay uses it: its locks, the same checkpoint as `run`, and the claims on content.

`run` may run at the same time, but for what it was reading itself: to go on with that it is kept from starting.
A dry run holds no lock, changes nothing, and remembers what it would have sent. Never reads a log.
"""

import os
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from metershipper.books import Books
from metershipper.checkpoint import DATABASE_NAME, Checkpoint
from metershipper.errors import StateError, StateInUse
from metershipper.housekeeping import tell_bounds
from metershipper.ledger import Settled
from metershipper.records import Identity, NewFile, Sample, StoredFile
from metershipper.replay_plan import Step
from metershipper.replay_survey import Survey, states_of
from metershipper.scope import Scope
from metershipper.state import REPLAY_HELD, REPLAY_LOCK_NAME, StateLock, holder_of


class ReplayState:
    """One replay over one state directory. Use as a context manager. Methods may be called from any thread.

    Raises: StateInUse while another replay is at work; StateError when the checkpoint can't be used.
    """

    def __init__(self, directory: Path, *, dry_run: bool = False) -> None:
        self._directory = directory
        self._dry_run = dry_run
        self._checkpoint: Checkpoint | None = None
        self._imagined: list[StoredFile] = []
        self._replay = time.time_ns()  # names this replay in the records that it is at work on
        self.holds_run_off = False

    def __enter__(self) -> "ReplayState":
        with ExitStack() as stack:
            if self._dry_run:
                if (self._directory / DATABASE_NAME).exists():
                    self._checkpoint = stack.enter_context(Checkpoint(self._directory, read_only=True))
            else:
                stack.enter_context(StateLock(self._directory, REPLAY_LOCK_NAME, REPLAY_HELD))
                self._checkpoint = stack.enter_context(self._brought_up_to_date())
                self._abandon(self._checkpoint)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if isinstance(error, sqlite3.DatabaseError):
            raise self._told(error) from None

    def _told(self, error: sqlite3.DatabaseError) -> StateError:
        return StateError(f"{self._directory}: {error}; nothing is lost, the same command resumes")

    def _abandon(self, checkpoint: Checkpoint) -> None:
        try:
            with checkpoint.transaction():
                checkpoint.replays.abandon()
        except sqlite3.DatabaseError as error:
            raise self._told(error) from None

    def _brought_up_to_date(self) -> Checkpoint:
        """The checkpoint: of today's schema, made so if nobody uses it, or as the process that uses it made it."""
        try:
            with StateLock(self._directory) as lock, Checkpoint(self._directory, expected=lock.was_used):
                lock.mark_used()
        except StateInUse:
            try:
                with Checkpoint(self._directory, read_only=True):
                    pass
            except StateError as error:
                raise StateError(
                    f"{error}; `run` is at work there: `run` and `replay` must be of one version"
                ) from None
        return Checkpoint(self._directory)

    def hold_run_off(self) -> bool:
        """Keep `run` from starting while this replay goes on; False when it runs already."""
        if not self.holds_run_off and not self._dry_run:
            try:
                self._stack.enter_context(StateLock(self._directory))
            except StateInUse:
                return False
            self.holds_run_off = True
        return True

    @property
    def run_process_id(self) -> int | None:
        """Of the process that holds the state directory; None when none does, or this one."""
        return None if self.holds_run_off else holder_of(self._directory)

    # What is known

    def look_up(self, heads: Sequence[Sample], place: Identity) -> list[StoredFile]:
        """Whatever is known of content that begins so."""
        imagined = [record for record in self._imagined if record.head in heads]
        if self._checkpoint is None:
            return imagined
        with self._checkpoint.reading():
            return self._checkpoint.replays.about(heads, place) + imagined

    def still_holds(self, survey: Survey) -> bool:
        """Whether a survey tells what is so now."""
        try:
            status = os.stat(survey.path)
        except OSError:
            return False
        place = (status.st_dev, status.st_ino)
        found = states_of(self.look_up(survey.heads, place))
        stamp = status.st_size, status.st_mtime_ns
        return (place, stamp, found) == (survey.identity, tuple(survey.stamp), survey.candidates)

    def seen(self, records: Iterable[StoredFile]) -> None:
        """The content of these is still there."""
        if self._checkpoint is not None and not self._dry_run:
            with self._checkpoint.transaction():
                self._checkpoint.replays.seen([record.file_id for record in records], time.time())

    def books_of(self, file_ids: Iterable[int]) -> Books:
        """What was ever settled of these files."""
        books = Books()
        if self._checkpoint is not None:
            with self._checkpoint.reading():
                for file_id in file_ids:
                    books.update(self._checkpoint.replays.books_of(file_id))
        return books

    # What changes

    def claim(self, survey: Survey, step: Step, scope: Scope) -> int | None:
        """The id of the record under which a step settles; None when the content is another one's by now."""
        if self._checkpoint is None or self._dry_run:
            return -len(self._imagined) - 1
        table = self._checkpoint.replays
        with self._checkpoint.transaction():
            if step.record is not None:
                head = step.record.head if step.record.head.length else survey.head
                resumed = table.resume(step.record, head, self._replay)
                return step.record.file_id if resumed else None
            path = os.path.abspath(survey.path)
            new = NewFile(path, 0, 0, survey.head, step.start, compressed=survey.compressed)
            known = [file_id for file_id, *_ in survey.candidates]
            return table.claim(new, scope.canonical, self._replay, known, time.time())

    def imagine(self, survey: Survey, step: Step, file_id: int, scope: Scope, end: int, tail: bytes) -> None:
        """Take a step for done, up to `end`, in a dry run."""
        new = StoredFile(file_id, survey.path, None, None, survey.head, Sample.of(tail), end)
        start = step.start if step.record is None else step.record.start_offset
        self._imagined.append(replace(new, start_offset=start, origin="replay", scope=scope.canonical))

    def commit(self, settled: Sequence[Settled], left: Mapping[int, bool]) -> None:
        """See `Checkpoint.commit`."""
        assert self._checkpoint is not None
        self._checkpoint.commit(settled, left)

    def keep_bounds(self) -> None:
        """Bound the dead letters, as `run` does from time to time."""
        if self._checkpoint is not None and not self._dry_run:
            with self._checkpoint.transaction():
                table, now = self._checkpoint.dead_letters, time.time()
                expired, fill = table.expire(now), table.fill(now)
            tell_bounds(expired, fill)
