"""Dead letters: what could not be billed, kept until a person acts. Owns their table: all SQL about it is here.

A letter is a raw line, without its secrets, or a usage event that the server refused. Content is bounded in size and
age; the record that there is one, and where in which file, is never dropped but by `purge`. Never maps or delivers:
that is `redelivery`. Never opens a database: the connection and its transactions are the checkpoint's.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from metershipper.books import Books
from metershipper.entry import content_hash
from metershipper.events import DeadLetter, RefusedEvent
from metershipper.pieces import Unbillable, whole_object
from metershipper.redact import redact

# All content together. Above it a letter is kept with its place alone: the line is in the log, as long as that lives.
MAX_CONTENT_BYTES = 64 * 1024 * 1024
# Content is cut away after this long: it is personal data, and older usage is in no open invoice.
MAX_AGE_SECONDS = 90 * 86400.0
# From this share of either bound on there is a warning.
WARN_SHARE = 0.8
# What is read at once: a letter can hold megabytes.
PAGE_ROWS = 100
PAGE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter. Offsets in bytes in the file; `kept_at` in seconds since the epoch.

    `kind` is "line" or "event". `is_cut`: its content is not kept any more. `entry_hash`: of a line from which secrets
    were taken, what the id of its events is made of where Kong wrote no request id. `tries`: how often a retry failed.
    """

    dead_letter_id: int
    kind: str
    path: str | None
    file_id: int
    start_offset: int
    end_offset: int
    reason: str
    detail: str
    subject: str | None
    event_type: str | None
    event_id: str | None
    kept_at: float
    tries: int
    is_wanted: bool
    is_cut: bool
    entry_hash: str | None
    content: bytes

    def as_dict(self) -> dict[str, Any]:
        """The letter for `--json`: times in RFC 3339, content as text."""
        told = asdict(self)
        told["kept_at"] = datetime.fromtimestamp(self.kept_at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        told["content"] = self.content.decode("utf-8", "replace")
        del told["entry_hash"]
        return told


class Filter(NamedTuple):
    """Which letters: all that fit everything given; `since` (inclusive) and `until` in seconds since the epoch."""

    ids: tuple[int, ...] = ()
    reason: str | None = None
    subject: str | None = None
    since: float | None = None
    until: float | None = None
    wanted: bool = False

    def where(self) -> tuple[str, list[Any]]:
        """As a condition of SQL and its parameters."""
        conditions: list[tuple[str, list[Any]]] = [
            (f"dead_letter_id IN ({', '.join('?' * len(self.ids))})", list(self.ids)) if self.ids else ("1", [])
        ]
        for condition, value in (
            ("reason = ?", self.reason),
            ("subject = ?", self.subject),
            ("kept_at >= ?", self.since),
            ("kept_at < ?", self.until),
        ):
            if value is not None:
                conditions.append((condition, [value]))
        if self.wanted:
            conditions.append(("wanted_at IS NOT NULL", []))
        return " AND ".join(text for text, _ in conditions), [each for _, values in conditions for each in values]


class Fill(NamedTuple):
    """How much of the bounds is used: `size` and `age` as shares (1.0: full), and how many letters there are."""

    letters: int
    size: float
    age: float


class Redelivered(NamedTuple):
    """What became of a letter that was tried again.

    `books`: what that adds to the books. `remaining`: what of it is still a dead letter, in its place. When
    `is_unchanged` it stays as it was, with `detail` as the newest words.
    """

    letter: Letter
    books: Books
    remaining: Sequence[DeadLetter | RefusedEvent]
    is_unchanged: bool
    detail: str


class DeadLetterTable:
    """The table over the checkpoint's connection. Whoever changes it opens a transaction around the change."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def keep(self, file_id: int, letters: Iterable[DeadLetter | RefusedEvent], now: float, tries: int = 0) -> None:
        """Add letters of one file; content that is too much is cut away, the record stays."""
        for letter in letters:
            facts: tuple[str | None, ...] = (None, None, None)
            entry_hash = None
            if isinstance(letter, RefusedEvent):
                kind, content = "event", letter.line
                facts = (letter.subject, letter.event_type, letter.event_id)
            else:
                kind = "line"
                content, entry_hash = _without_secrets(letter.line)
            is_cut = bool(content) and self._content_bytes() + len(content) > MAX_CONTENT_BYTES
            self._db.execute(
                "INSERT INTO dead_letters (file_id, start_offset, end_offset, reason, detail, line, kept_at, kind,"
                " subject, event_type, event_id, entry_hash, is_cut, tries)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(file_id, letter.start_offset, letter.end_offset, str(letter.reason), _words(letter.detail)),
                    *(b"" if is_cut else content, now, kind, *facts, entry_hash),
                    *(is_cut, tries),
                ),
            )

    def _content_bytes(self) -> int:
        return int(self._db.execute("SELECT value FROM facts WHERE name = 'dead_letter_bytes'").fetchone()[0])

    def select(self, wanted: Filter, limit: int, after: int = 0) -> list[Letter]:
        """Up to `limit` letters, oldest first, after the one numbered `after`; fewer when they hold much."""
        condition, values = wanted.where()
        rows = self._db.execute(
            "SELECT dead_letter_id, kind, path, dead_letters.file_id, start_offset, end_offset, reason, detail,"
            " subject, event_type, event_id, kept_at, tries, wanted_at IS NOT NULL, is_cut, entry_hash, line"
            f" FROM dead_letters LEFT JOIN files USING (file_id) WHERE {condition} AND dead_letter_id > ?"
            " ORDER BY dead_letter_id LIMIT ?",
            (*values, after, limit),
        )
        found: list[Letter] = []
        held_bytes = 0
        for row in rows:
            found.append(Letter(*(*row[:13], bool(row[13]), bool(row[14]), row[15], bytes(row[16]))))
            held_bytes += len(row[16])
            if held_bytes >= PAGE_BYTES:
                break
        return found

    def count(self, wanted: Filter) -> int:
        """How many letters fit."""
        condition, values = wanted.where()
        return int(self._db.execute(f"SELECT COUNT(*) FROM dead_letters WHERE {condition}", values).fetchone()[0])

    def want(self, wanted: Filter, now: float) -> list[int]:
        """Ask for these to be tried again, by whoever delivers. Returns their numbers; those without content have no
        other chance than their log, and are left out.
        """
        condition, values = wanted.where()
        rows = self._db.execute(
            f"UPDATE dead_letters SET wanted_at = ? WHERE {condition} AND NOT is_cut RETURNING dead_letter_id",
            (now, *values),
        ).fetchall()
        return sorted(number for (number,) in rows)

    def settle(self, outcomes: Iterable[Redelivered], now: float) -> None:
        """Record what became of letters that were tried again, with what it does to the books."""
        for outcome in outcomes:
            letter = outcome.letter
            if outcome.is_unchanged:
                self._db.execute(
                    "UPDATE dead_letters SET tries = tries + 1, wanted_at = NULL, detail = ? WHERE dead_letter_id = ?",
                    (_words(outcome.detail), letter.dead_letter_id),
                )
                continue
            gone = self._db.execute("DELETE FROM dead_letters WHERE dead_letter_id = ?", (letter.dead_letter_id,))
            if not gone.rowcount:
                continue  # settled before, by a commit whose caller was stopped: it counts once
            self.keep(letter.file_id, outcome.remaining, now, letter.tries + 1)
            self._db.executemany(
                "INSERT INTO books VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count",
                [(letter.file_id, str(name), count) for name, count in outcome.books.items() if count],
            )

    def purge(self, wanted: Filter) -> int:
        """Delete letters; the books go on counting them. Returns how many."""
        condition, values = wanted.where()
        return self._db.execute(f"DELETE FROM dead_letters WHERE {condition}", values).rowcount

    def expire(self, now: float) -> int:
        """Cut away the content of letters that are too old. Returns how many."""
        return self._db.execute(
            "UPDATE dead_letters SET line = x'', is_cut = 1, wanted_at = NULL WHERE kept_at < ? AND NOT is_cut",
            (now - MAX_AGE_SECONDS,),
        ).rowcount

    def fill(self, now: float) -> Fill:
        """How far the bounds are reached."""
        count, oldest = self._db.execute(
            "SELECT COUNT(*), MIN(CASE WHEN is_cut THEN NULL ELSE kept_at END) FROM dead_letters"
        ).fetchone()
        age = 0.0 if oldest is None else (now - oldest) / MAX_AGE_SECONDS
        return Fill(count, self._content_bytes() / MAX_CONTENT_BYTES, age)


def _without_secrets(line: bytes) -> tuple[bytes, str | None]:
    """A line as it may be kept; and, if that differs, the hash its ids may be made of (see `Letter.entry_hash`)."""
    kept = redact(line)
    if kept == line:
        return line, None
    entry_hash = None
    with suppress(Unbillable, RecursionError, ValueError):
        entry_hash = content_hash(whole_object(line))
    return kept, entry_hash


def _words(detail: str) -> str:
    return redact(detail.encode("utf-8", "replace")).decode("utf-8", "replace")
