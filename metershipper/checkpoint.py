"""The checkpoint: one SQLite file with positions, books and dead letters.

Owns all SQL and all fsyncs of the state. `commit` writes position, counts and dead letters of settled ground in one
transaction, which is what makes the books exact. Never decides what is settled: that is `ledger`. Never deletes what
it can't read.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from metershipper.books import Books
from metershipper.dead_letters import DeadLetterTable
from metershipper.errors import StateError
from metershipper.file_table import FILE_COLUMNS, ReplayTable, insert_file, stored_file
from metershipper.ledger import Settled
from metershipper.records import Gap, Lost, NewFile, Sample, StoredFile
from metershipper.schema import MIGRATIONS, SCHEMA_VERSION
from metershipper.state import REPLAY_LOCK_NAME, holder_of, sync_directory

DATABASE_NAME = "checkpoint.sqlite"
# A file that is gone is forgotten after this long: as long as a server would still know its events again (OpenMeter's
# quickstart remembers ids for 32 days), plus a reserve for volumes that come back late.
FORGET_AFTER_SECONDS = 45 * 86400.0
# Gaps are evidence about invoices: they are kept for longer. So is what was replayed: it is all that keeps months that
# no server knows again from being billed a second time.
FORGET_GAPS_AFTER_SECONDS = FORGET_REPLAYS_AFTER_SECONDS = 400 * 86400.0
# Where the books of forgotten files are kept, and what belongs to none.
_NO_FILE_ID = 0
# What the spool is called among the files: one log without end, whatever segments there are of it.
SPOOL_PATH = "(http-log)"


class Checkpoint:
    """Durable positions, books and dead letters. Methods may be called from any thread, one at a time.

    Use as a context manager; with `read_only` beside a running process. `expected`: there was a checkpoint before, so
    that a missing one is lost and not a first start. `start_over`: what is damaged or lost is set aside, and everything
    that is still there is read again.

    Raises: StateError when the file is damaged, lost, newer than this version, or can't be written.
    """

    def __init__(
        self, directory: Path, *, read_only: bool = False, expected: bool = False, start_over: bool = False
    ) -> None:
        self._path = directory / DATABASE_NAME
        self._read_only = read_only
        self._expected = expected
        self._start_over = start_over
        self._lock = threading.Lock()
        self.set_aside: list[Path] = []

    def __enter__(self) -> "Checkpoint":
        try:
            self._inspect()
            self._db = self._opened()
        except sqlite3.OperationalError as error:
            # The disk, permissions, another process: nothing says that the file is damaged.
            raise StateError(f"{self._path}: can't be used: {error}") from None
        except sqlite3.DatabaseError as error:
            if not self._start_over:
                raise StateError(
                    f"{self._path}: can't be read ({error}). Restore it, or start with `metershipper run "
                    "--start-over`: it keeps the damaged files beside the new ones, and reads every log and its "
                    "rotated files from the beginning; events keep their ids, so the server bills none of them twice "
                    "within its dedupe window"
                ) from None
            self._set_aside()
            self._db = self._opened()
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def _set_aside(self) -> None:
        """Rename the damaged files: they may be all that is left of the books."""
        number = next(n for n in range(1, 1000) if not Path(f"{self._path}.damaged-{n}").exists())
        for suffix in ("-wal", "-shm", ""):
            part = Path(f"{self._path}{suffix}")
            if part.exists():
                self.set_aside.append(part.rename(f"{self._path}.damaged-{number}{suffix}"))
        sync_directory(self._path.parent)

    def _inspect(self) -> None:
        """Look for damage without leave to write: closing a connection that may write would mend, and lose, the log."""
        if os.path.lexists(self._path) and not self._read_only:
            self._open_file(os.O_RDWR)
        if self._path.exists() and self._path.stat().st_size:
            try:
                with closing(self._open(read_only=True)) as db:
                    _refuse_damage(db)
            except sqlite3.OperationalError as error:
                if self._read_only or error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_READONLY:
                    raise
                # A power cut while the file was made: SQLite must undo what was begun before anybody can look.
                with closing(self._open(read_only=False)) as db:
                    _refuse_damage(db)
        elif self._expected and not self._start_over:
            raise StateError(
                f"{self._path}: gone or empty, though this directory was in use. Restore it, or start with "
                "`metershipper run --start-over`: it reads every log and its rotated files from the beginning; events "
                "keep their ids, so the server bills none of them twice within its dedupe window"
            )

    def _opened(self) -> sqlite3.Connection:
        db = self._open(read_only=self._read_only)
        try:
            self._db = db
            self._prepare()
        except BaseException:
            db.close()
            raise
        return db

    def _open(self, *, read_only: bool) -> sqlite3.Connection:
        if read_only:
            if not self._path.exists():
                raise self._nothing_recorded()
            uri = f"{self._path.absolute().as_uri()}?mode=ro"
            return sqlite3.connect(uri, uri=True, timeout=5, isolation_level=None, check_same_thread=False)
        self._open_file(os.O_RDWR | os.O_CREAT)
        return sqlite3.connect(self._path, timeout=5, isolation_level=None, check_same_thread=False)

    def _open_file(self, flags: int) -> None:
        try:
            os.close(os.open(self._path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            sync_directory(self._path.parent)
        except OSError as error:
            raise StateError(f"{self._path}: can't be opened: {error.strerror}") from None

    def _prepare(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise StateError(
                f"{self._path}: written by a newer metershipper (schema {version}, this one knows {SCHEMA_VERSION}); "
                "run that version"
            )
        if self._read_only:
            if version == 0:  # just being created
                raise self._nothing_recorded()
            if version < SCHEMA_VERSION:
                raise StateError(f"{self._path}: of an older metershipper; `metershipper run` brings it up to date")
            return
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        with self.transaction():
            for migration in MIGRATIONS[version:]:
                for statement in migration.split(";\n"):
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            if version == 0 and self._start_over:
                self._db.execute("INSERT OR REPLACE INTO facts VALUES ('start_over', 1)")
            # Also where there is nothing to bring up to date: a disk that is full is noticed before a line is read.
            self._db.execute(
                "INSERT OR REPLACE INTO facts VALUES ('starts', 1 + ifnull("
                "(SELECT value FROM facts WHERE name = 'starts'), 0))"
            )

    def _nothing_recorded(self) -> StateError:
        return StateError(f"{self._path}: nothing was recorded yet; start `metershipper run` first")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything within is recorded, durably, or nothing is."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def commit(self, settled: Iterable[Settled], left: Mapping[int, bool] | None = None) -> None:
        """Record settled ground: positions, counts and dead letters, all or nothing. Durable on return.

        Args: `left`, what a replay reads no more, by file id: whether it holds nothing more than is settled.
        Raises: sqlite3.OperationalError (disk full, read-only); then nothing was recorded and it may be tried again.
        """
        now = time.time()
        with self.transaction():
            for ground in settled:
                tail = Sample.of(ground.tail)
                self._db.execute(
                    "UPDATE files SET position = ?, tail_bytes = ?, tail_hash = ?, seen_at = ? WHERE file_id = ?",
                    (ground.end_offset, tail.length, tail.digest, now, ground.file_id),
                )
                self._add(ground.file_id, ground.books)
                self.dead_letters.keep(ground.file_id, [*ground.dead_letters, *ground.refused], now)
            for file_id, is_whole in (left or {}).items():
                self.replays.leave(file_id, is_whole=is_whole)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """No transaction of another thread goes on within."""
        with self._lock:
            yield

    @property
    def dead_letters(self) -> DeadLetterTable:
        """What could not be billed; to be used within `reading`, and for changes within a `transaction`."""
        return DeadLetterTable(self._db)

    @property
    def replays(self) -> ReplayTable:
        """What is known of content, whoever read it; to be used like `dead_letters`."""
        return ReplayTable(self._db)

    # Files

    def register(self, files: Sequence[NewFile], inputs: Iterable[str] = ()) -> list[int]:
        """Give each new file its `file_id`, and remember `inputs` as seen, in one transaction.

        Raises: ReplayedMeanwhile where a replay took the same content since it was looked up; then nothing is recorded.
        """
        ids: list[int] = []
        with self.transaction():
            self._db.executemany("INSERT OR IGNORE INTO inputs VALUES (?)", [(path,) for path in inputs])
            for new in files:
                if new.supersedes is not None:
                    self._db.execute(
                        "UPDATE files SET device = NULL, inode = NULL WHERE file_id = ?", (new.supersedes,)
                    )
                self.replays.refuse_changed(new)
                ids.append(insert_file(self._db, new, time.time()))
        return ids

    def update(self, file: StoredFile) -> None:
        """Record where a file is seen now and what is known of it; its position and its tail are the commits' alone."""
        stamp = file.stamp or (None, None)
        with self.transaction():
            # Two files are never in one place: whatever else was there has gone.
            self._db.execute(
                "UPDATE files SET device = NULL, inode = NULL WHERE device = ? AND inode = ? AND file_id <> ?",
                (file.device, file.inode, file.file_id),
            )
            self._db.execute(
                "UPDATE files SET path = ?, device = ?, inode = ?, compressed = ?, head_bytes = ?, head_hash = ?,"
                " history = ?, seen_bytes = ?, stamp_bytes = ?, stamp_mtime_ns = ?, seen_at = ? WHERE file_id = ?",
                (
                    *(file.path, file.device, file.inode, file.compressed, file.head.length, file.head.digest),
                    *(file.history, file.seen_bytes, *stamp, time.time(), file.file_id),
                ),
            )

    def spool(self) -> tuple[int, int | None]:
        """The spool as one file: its id, and its position; None before anything was read of it."""
        with self.transaction():
            if self._spool() is None:
                self._db.execute(
                    "INSERT INTO files (path, position, history, seen_at, origin) VALUES (?, -1, 0, ?, 'http-log')",
                    (SPOOL_PATH, time.time()),
                )
            file_id, position = self._spool() or (0, -1)
        return file_id, None if position < 0 else position

    def spool_position(self) -> int | None:
        """Up to where the spool is settled; None where nothing was ever received."""
        with self._lock:
            row = self._spool()
        return None if row is None else max(0, row[1])

    def _spool(self) -> tuple[int, int] | None:
        row = self._db.execute("SELECT file_id, position FROM files WHERE origin = 'http-log'").fetchone()
        return None if row is None else (int(row[0]), int(row[1]))

    def count(self, books: Books) -> None:
        """Add counts that belong to no file. Raises sqlite3.OperationalError; then nothing was added."""
        with self.transaction():
            self._add(_NO_FILE_ID, books)

    def _add(self, file_id: int, books: Books) -> None:
        self._db.executemany(
            "INSERT INTO books VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count",
            [(file_id, str(name), count) for name, count in books.items() if count],
        )

    def files(self) -> list[StoredFile]:
        """Every file that `run` remembers, in the order in which they were met."""
        with self._lock:
            rows = self._db.execute(f"SELECT {FILE_COLUMNS} FROM files WHERE origin = 'run' ORDER BY file_id")
            return [stored_file(row) for row in rows]

    def replayed(self, head: Sample) -> list[StoredFile]:
        """What `replay` read, without a filter, of content that begins with `head`."""
        with self._lock:
            return self.replays.whole(head)

    def take_over(self, file: StoredFile) -> bool:
        """Make what `replay` read a file of `run`; False when something happened to it since it was looked up."""
        with self.transaction():
            return self.replays.take_over(file)

    @property
    def replay_is_running(self) -> bool:
        """Whether a replay is at work on this state directory."""
        return holder_of(self._path.parent, REPLAY_LOCK_NAME) is not None

    def forget(self, present: Collection[int], now: float) -> list[int]:
        """Drop the files that are gone for longer than a server would know their events again; their books are kept.

        Args: `present`, the ids of files that still are there; `now`, seconds since the epoch.
        Returns: the ids of the dropped files.
        """
        with self.transaction():
            self._db.executemany("UPDATE files SET seen_at = ? WHERE file_id = ?", [(now, each) for each in present])
            old = self._db.execute(
                "SELECT file_id FROM files WHERE origin <> 'http-log'"
                " AND seen_at < CASE origin WHEN 'run' THEN ? ELSE ? END",
                (now - FORGET_AFTER_SECONDS, now - FORGET_REPLAYS_AFTER_SECONDS),
            ).fetchall()
            gone = [file_id for (file_id,) in old if file_id not in present]
            for file_id in gone:
                self._db.execute(
                    "INSERT INTO books SELECT ?, name, count FROM books WHERE file_id = ?"
                    " ON CONFLICT DO UPDATE SET count = count + excluded.count",
                    (_NO_FILE_ID, file_id),
                )
                self._db.execute("DELETE FROM books WHERE file_id = ?", (file_id,))
                self._db.execute("DELETE FROM files WHERE file_id = ?", (file_id,))
            self._db.execute("DELETE FROM gaps WHERE found_at < ?", (now - FORGET_GAPS_AFTER_SECONDS,))
        return gone

    def inputs(self) -> set[str]:
        """The configured paths that were followed before."""
        with self._lock:
            return {path for (path,) in self._db.execute("SELECT path FROM inputs")}

    @property
    def starts_over(self) -> bool:
        """Whether everything that is still there is to be read, until `started_over`."""
        with self._lock:
            return bool(self._db.execute("SELECT value FROM facts WHERE name = 'start_over'").fetchone())

    def started_over(self) -> None:
        """Everything that is still there was found and is followed."""
        with self.transaction():
            self._db.execute("DELETE FROM facts WHERE name = 'start_over'")

    # How delivery fares

    def note_oldest_unsettled(self, read_at: int | None) -> None:
        """Record when the oldest lines that wait for delivery were read, in seconds since the epoch; None: none do."""
        with self.transaction():
            if read_at is None:
                self._db.execute("DELETE FROM facts WHERE name = 'oldest_unsettled_at'")
            else:
                self._db.execute("INSERT OR REPLACE INTO facts VALUES ('oldest_unsettled_at', ?)", (read_at,))

    def oldest_unsettled_at(self) -> int | None:
        """What was last noted; true while the process runs that noted it."""
        with self._lock:
            row = self._db.execute("SELECT value FROM facts WHERE name = 'oldest_unsettled_at'").fetchone()
        return None if row is None else int(row[0])

    # What is lost

    def report_gap(self, gap: Gap) -> None:
        """Remember a part of a log that can't be read any more."""
        with self.transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO gaps VALUES (?, ?, ?, ?, ?, ?)",
                (gap.file_id, gap.path, gap.start_offset, gap.end_offset, str(gap.reason), gap.found_at),
            )

    def withdraw_gap(self, file_id: int) -> None:
        """What was reported as lost was found after all."""
        with self.transaction():
            self._db.execute("DELETE FROM gaps WHERE file_id = ?", (file_id,))

    def gaps(self) -> list[Gap]:
        """What is known to be lost, oldest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT file_id, path, start_offset, end_offset, reason, found_at FROM gaps ORDER BY found_at, file_id"
            ).fetchall()
        return [Gap(row[0], row[1], row[2], row[3], Lost(row[4]), row[5]) for row in rows]

    def books(self) -> Books:
        """The sum of all that was ever settled."""
        with self._lock:
            return Books(dict(self._db.execute("SELECT name, SUM(count) FROM books GROUP BY name").fetchall()))


def _refuse_damage(db: sqlite3.Connection) -> None:
    """Look where positions and books are; the dead letters may be too many to read. Raises sqlite3.DatabaseError."""
    if db.execute("PRAGMA user_version").fetchone() == (0,):
        return
    for table in ("files", "inputs", "books"):
        (answer,) = db.execute(f"PRAGMA quick_check('{table}')").fetchone()
        if answer != "ok":
            raise sqlite3.DatabaseError(answer)
