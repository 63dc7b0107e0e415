"""The `files` table as rows, and what `replay` and `run` tell each other by it. Holds SQL, opens no transaction.

Content is claimed in the same transaction in which it was looked up last: so of two processes that meet the same
content at the same instant one reads it, and the other sees that.
"""

import sqlite3
from collections.abc import Collection
from typing import Any

from metershipper.books import Books
from metershipper.records import Identity, NewFile, Sample, Stamp, StoredFile

FILE_COLUMNS = (
    "file_id, path, device, inode, head_bytes, head_hash, tail_bytes, tail_hash, position, history, compressed,"
    " seen_bytes, stamp_bytes, stamp_mtime_ns, begin_offset, origin, scope, replaying"
)
_WHOLE_REPLAYS = "FROM files WHERE head_hash = ? AND head_bytes = ? AND origin = 'replay' AND scope IS NULL"


class ReplayedMeanwhile(Exception):
    """A replay took the same content since it was looked up."""


def stored_file(row: Any) -> StoredFile:
    """One row of `FILE_COLUMNS`."""
    return StoredFile(
        *(row[0], row[1], row[2], row[3], Sample(row[4], row[5]), Sample(row[6], row[7]), row[8]),
        *(bool(row[9]), bool(row[10]), row[11], None if row[12] is None else Stamp(row[12], row[13])),
        *row[14:],
    )


def insert_file(db: sqlite3.Connection, new: NewFile, now: float) -> int:
    """A row for a file of `run`; returns its id."""
    cursor = db.execute(
        "INSERT INTO files (path, device, inode, compressed, head_bytes, head_hash, position, begin_offset, history,"
        " seen_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(new.path, new.device, new.inode, new.compressed, new.head.length, new.head.digest),
            *(new.position, new.position, new.history, now),
        ),
    )
    return int(cursor.lastrowid or 0)


class ReplayTable:
    """What is known of content. Reads within `Checkpoint.reading`, changes within a `transaction` of it."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def about(self, heads: Collection[Sample], place: Identity) -> list[StoredFile]:
        """Whatever was read of content with one of these heads; and what was seen in this place while it was empty."""
        found: list[StoredFile] = []
        for head in heads:
            found += self._select("head_hash = ? AND head_bytes = ?", (head.digest, head.length))
        return found + self._select("head_hash = '' AND device = ? AND inode = ? AND position = 0", place)

    def _select(self, condition: str, values: tuple[Any, ...]) -> list[StoredFile]:
        rows = self._db.execute(f"SELECT {FILE_COLUMNS} FROM files WHERE {condition} ORDER BY file_id", values)
        return [stored_file(row) for row in rows]

    def books_of(self, file_id: int) -> Books:
        """What was ever settled of one file."""
        return Books(dict(self._db.execute("SELECT name, count FROM books WHERE file_id = ?", (file_id,)).fetchall()))

    # By `replay`

    def claim(self, new: NewFile, scope: str | None, replay: int, known: Collection[int], now: float) -> int | None:
        """A record for content that nobody reads; None when somebody does who was not `known` when it was looked up."""
        found = self._db.execute(
            "SELECT file_id FROM files WHERE head_hash = ? AND head_bytes = ?", (new.head.digest, new.head.length)
        )
        if not {file_id for (file_id,) in found} <= set(known):
            return None
        cursor = self._db.execute(
            "INSERT INTO files (path, compressed, head_bytes, head_hash, position, begin_offset, history, seen_at,"
            " origin, scope, replaying) VALUES (?, ?, ?, ?, ?, ?, 0, ?, 'replay', ?, ?)",
            (
                *(new.path, new.compressed, new.head.length, new.head.digest, new.position, new.position, now),
                *(scope, replay),
            ),
        )
        return int(cursor.lastrowid or 0)

    def resume(self, file: StoredFile, head: Sample, replay: int) -> bool:
        """Go on with a record, which held not all then; False when something happened to it since it was looked up."""
        cursor = self._db.execute(
            "UPDATE files SET replaying = ?, head_bytes = ?, head_hash = ?,"
            " seen_bytes = CASE origin WHEN 'replay' THEN NULL ELSE seen_bytes END"
            " WHERE file_id = ? AND origin = ? AND position = ?",
            (replay, head.length, head.digest, file.file_id, file.origin, file.position),
        )
        return cursor.rowcount == 1

    def leave(self, file_id: int, *, is_whole: bool) -> None:
        """A replay reads this no more; `is_whole`: it holds nothing more than was settled."""
        self._db.execute("UPDATE files SET replaying = NULL WHERE file_id = ?", (file_id,))
        if is_whole:
            self._db.execute(
                "UPDATE files SET seen_bytes = position WHERE file_id = ? AND origin = 'replay'", (file_id,)
            )

    def abandon(self) -> None:
        """What replays were at work on when they were killed is nobody's: they can't be at work any more."""
        self._db.execute("UPDATE files SET replaying = NULL WHERE replaying IS NOT NULL")

    def seen(self, file_ids: Collection[int], now: float) -> None:
        """What these are records of is still there: they are not forgotten for now."""
        self._db.executemany("UPDATE files SET seen_at = ? WHERE file_id = ?", [(now, each) for each in file_ids])

    # By `run`

    def whole(self, head: Sample) -> list[StoredFile]:
        """What was replayed, without a filter, of content with this head."""
        rows = self._db.execute(f"SELECT {FILE_COLUMNS} {_WHOLE_REPLAYS}", (head.digest, head.length))
        return [stored_file(row) for row in rows]

    def refuse_changed(self, new: NewFile) -> None:
        """Raises: ReplayedMeanwhile."""
        if new.known_replays is None:
            return
        rows = self._db.execute(f"SELECT file_id {_WHOLE_REPLAYS}", (new.head.digest, new.head.length))
        if {file_id for (file_id,) in rows} != new.known_replays:
            raise ReplayedMeanwhile

    def take_over(self, file: StoredFile) -> bool:
        """From now on a file of `run`; False when something happened to it since it was looked up."""
        cursor = self._db.execute(
            "UPDATE files SET origin = 'run', replaying = NULL"
            " WHERE file_id = ? AND origin = 'replay' AND position = ? AND replaying IS ?",
            (file.file_id, file.position, file.replaying),
        )
        return cursor.rowcount == 1
