"""The checkpoint: one SQLite file with positions, books and dead letters, and the lock on its directory.

Owns all SQL and all fsyncs of the state. `commit` writes position, counts and dead letters of settled ground in one
transaction, which is what makes the books exact. Never decides what is settled: that is `ledger`.
"""

import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from metershipper.books import Books
from metershipper.errors import StateError, StateInUse
from metershipper.ledger import Settled

DATABASE_NAME = "checkpoint.sqlite"
LOCK_NAME = "lock"
SCHEMA_VERSION = 1
ID_RECIPE_VERSION = 1
# How long a second process tries: `status` holds the lock for an instant to see whether it is free.
LOCK_PATIENCE_SECONDS = 0.5

_SCHEMA = f"""
CREATE TABLE inputs (path TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE files (
    file_id INTEGER PRIMARY KEY,
    path TEXT NOT NULL,              -- where it was last seen
    device INTEGER, inode INTEGER,   -- both NULL once other content took its place
    head_bytes INTEGER NOT NULL DEFAULT 0, head_hash TEXT NOT NULL DEFAULT '',
    tail_bytes INTEGER NOT NULL DEFAULT 0, tail_hash TEXT NOT NULL DEFAULT '',
    position INTEGER NOT NULL,       -- in bytes: everything before it is settled
    history INTEGER NOT NULL         -- 1: there before its log was followed, and never read
);
CREATE TABLE books (file_id INTEGER NOT NULL, name TEXT NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (file_id, name)) WITHOUT ROWID;
CREATE TABLE dead_letters (
    dead_letter_id INTEGER PRIMARY KEY,
    file_id INTEGER NOT NULL, start_offset INTEGER NOT NULL, end_offset INTEGER NOT NULL,
    reason TEXT NOT NULL, detail TEXT NOT NULL, line BLOB NOT NULL, kept_at REAL NOT NULL
);
CREATE TABLE recipes (name TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO recipes VALUES ('event_id', {ID_RECIPE_VERSION});
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """A stretch of a file by which its content is known again: length in bytes and SHA-256. Empty: not known yet."""

    length: int = 0
    digest: str = ""

    @classmethod
    def of(cls, data: bytes) -> "Sample":
        """The sample of `data`."""
        return cls(len(data), sha256(data).hexdigest()) if data else cls()


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as the checkpoint knows it. `position`: bytes from its start, all of them settled."""

    file_id: int
    path: str
    device: int | None
    inode: int | None
    head: Sample
    tail: Sample
    position: int
    history: bool = False


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file met for the first time. `supersedes`: the stored file whose place its content took."""

    path: str
    device: int
    inode: int
    head: Sample
    position: int = 0
    supersedes: int | None = None
    history: bool = False


class StateLock:
    """A kernel lock on the state directory: nothing stale is left behind by a kill."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK_NAME
        self._directory = directory

    def __enter__(self) -> "StateLock":
        """Take the lock. Raises StateInUse when a process holds it, StateError when the directory can't be used."""
        make_private_directory(self._directory)
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StateError(f"{self._path}: can't be opened: {error.strerror}") from None
        try:
            self._take()
        except OSError as error:
            os.close(self._fd)
            raise StateError(f"{self._path}: can't be written: {error.strerror}") from None
        except StateInUse:
            os.close(self._fd)
            raise
        return self

    def _take(self) -> None:
        deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
        while not _try_lock(self._fd, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
                raise StateInUse(
                    f"{self._directory}: in use by process {holder}; one state directory serves one process: "
                    "stop that one, or give this one its own state.directory"
                )
            time.sleep(0.05)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def holder_of(directory: Path) -> int | None:
    """The id of the process that holds the state directory, or None."""
    try:
        fd = os.open(directory / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if _try_lock(fd, fcntl.LOCK_SH):
            return None
        text = os.pread(fd, 32, 0).strip()
        return int(text) if text.isdigit() else 0
    finally:
        os.close(fd)


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def make_private_directory(directory: Path) -> None:
    """Create the state directory for this user alone. Raises StateError, naming what to do."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(directory, os.W_OK | os.X_OK)
    except OSError as error:
        raise StateError(
            f"{directory}: can't be created: {error.strerror}; create it for this user or set state.directory"
        ) from None
    if not writable:
        raise StateError(f"{directory}: not writable by this user; change its owner or set state.directory")


def state_problem(directory: Path) -> str | None:
    """Why the state directory could not be used by this user; None when nothing speaks against it. Changes nothing."""
    existing = next((path for path in (directory, *directory.absolute().parents) if path.exists()), directory)
    if not existing.is_dir():
        return f"{directory}: can't be created: {existing} is not a directory"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{directory}: {existing} is not writable by this user; create it for this user or set state.directory"
    return None


class Checkpoint:
    """Durable positions, books and dead letters. Methods may be called from any thread, one at a time.

    Use as a context manager; with `read_only` beside a running process.
    Raises: StateError when the file is damaged, newer than this version, or can't be written.
    """

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        self._path = directory / DATABASE_NAME
        self._read_only = read_only
        self._lock = threading.Lock()

    def __enter__(self) -> "Checkpoint":
        try:
            self._db = self._open()
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise
        except sqlite3.OperationalError as error:
            # The disk, permissions, another process: nothing says that the file is damaged.
            raise StateError(f"{self._path}: can't be used: {error}") from None
        except sqlite3.DatabaseError as error:
            raise StateError(
                f"{self._path}: can't be read ({error}). Keep it for inquiry: move it away together with its -wal and "
                "-shm files. The next start then reads the logs again from their beginning, and names rotated "
                "files that it does not read; events keep their ids, so the server bills none of them twice within its "
                "dedupe window"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def _open(self) -> sqlite3.Connection:
        if self._read_only:
            if not self._path.exists():
                raise self._nothing_recorded()
            uri = f"{self._path.absolute().as_uri()}?mode=ro"
            return sqlite3.connect(uri, uri=True, timeout=5, isolation_level=None, check_same_thread=False)
        try:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        except OSError as error:
            raise StateError(f"{self._path}: can't be opened: {error.strerror}") from None
        return sqlite3.connect(self._path, timeout=5, isolation_level=None, check_same_thread=False)

    def _prepare(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise StateError(
                f"{self._path}: written by a newer metershipper (schema {version}, this one knows {SCHEMA_VERSION}); "
                "run that version"
            )
        if version:
            self._check()
        if self._read_only:
            if version == 0:  # just being created
                raise self._nothing_recorded()
            return
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        if version == 0:
            with self._transaction():
                for statement in _SCHEMA.split(";\n"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def _nothing_recorded(self) -> StateError:
        return StateError(f"{self._path}: nothing was recorded yet; start `metershipper run` first")

    def _check(self) -> None:
        """Look for damage where positions and books are; the dead letters may be too many to read."""
        for table in ("files", "inputs", "books"):
            (answer,) = self._db.execute(f"PRAGMA quick_check('{table}')").fetchone()
            if answer != "ok":
                raise sqlite3.DatabaseError(answer)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def commit(self, settled: Iterable[Settled]) -> None:
        """Record settled ground: positions, counts and dead letters, all or nothing. Durable on return.

        Raises: sqlite3.OperationalError (disk full, read-only); then nothing was recorded and it may be tried again.
        """
        now = time.time()
        with self._transaction():
            for ground in settled:
                tail = Sample.of(ground.tail)
                self._db.execute(
                    "UPDATE files SET position = ?, tail_bytes = ?, tail_hash = ? WHERE file_id = ?",
                    (ground.end_offset, tail.length, tail.digest, ground.file_id),
                )
                self._db.executemany(
                    "INSERT INTO books VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count",
                    [(ground.file_id, str(name), count) for name, count in ground.books.items() if count],
                )
                self._db.executemany(
                    "INSERT INTO dead_letters (file_id, start_offset, end_offset, reason, detail, line, kept_at)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    [(ground.file_id, d[0], d[1], str(d.reason), d.detail, d.line, now) for d in ground.dead_letters],
                )

    def register(self, files: Sequence[NewFile], inputs: Iterable[str] = ()) -> list[int]:
        """Give each new file its `file_id`, and remember `inputs` as seen, in one transaction."""
        ids: list[int] = []
        with self._transaction():
            self._db.executemany("INSERT OR IGNORE INTO inputs VALUES (?)", [(path,) for path in inputs])
            for file in files:
                if file.supersedes is not None:
                    self._db.execute(
                        "UPDATE files SET device = NULL, inode = NULL WHERE file_id = ?", (file.supersedes,)
                    )
                cursor = self._db.execute(
                    "INSERT INTO files (path, device, inode, head_bytes, head_hash, position, history)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        file.path,
                        file.device,
                        file.inode,
                        file.head.length,
                        file.head.digest,
                        file.position,
                        file.history,
                    ),
                )
                ids.append(int(cursor.lastrowid or 0))
        return ids

    def identify(self, file_id: int, path: str, device: int, inode: int, head: Sample) -> None:
        """Record where a file is seen now, and by what its beginning is known."""
        with self._transaction():
            self._db.execute(
                "UPDATE files SET path = ?, device = ?, inode = ?, head_bytes = ?, head_hash = ?, history = 0"
                " WHERE file_id = ?",
                (path, device, inode, head.length, head.digest, file_id),
            )

    def files(self) -> list[StoredFile]:
        """Every file ever followed, in the order in which they were met."""
        with self._lock:
            rows = self._db.execute(
                "SELECT file_id, path, device, inode, head_bytes, head_hash, tail_bytes, tail_hash, position, history"
                " FROM files ORDER BY file_id"
            ).fetchall()
        return [
            StoredFile(r[0], r[1], r[2], r[3], Sample(r[4], r[5]), Sample(r[6], r[7]), r[8], bool(r[9])) for r in rows
        ]

    def inputs(self) -> set[str]:
        """The configured paths that were followed before."""
        with self._lock:
            return {path for (path,) in self._db.execute("SELECT path FROM inputs")}

    def books(self) -> Books:
        """The sum of all that was ever settled."""
        with self._lock:
            return Books(dict(self._db.execute("SELECT name, SUM(count) FROM books GROUP BY name").fetchall()))
