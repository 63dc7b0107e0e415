"""What the checkpoint says, as a report: positions, lag, books, dead letters. Reads only; works while `run` runs."""

import glob
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metershipper.books import RECEIVED, Books, Count, Received
from metershipper.checkpoint import Checkpoint
from metershipper.errors import StateError
from metershipper.filter import summary
from metershipper.losses import describe
from metershipper.records import Gap, Identity, StoredFile
from metershipper.rotation import logs_of
from metershipper.segments import segments_in
from metershipper.spool import SPOOL_DIRECTORY
from metershipper.state import REPLAY_LOCK_NAME, holder_of


@dataclass(frozen=True, slots=True)
class FileStatus:
    """One followed file. `size_bytes` is None when the file is gone; `unread_bytes`: not settled yet.

    Of a compressed file the position is one in its content, and how much of that is left is not known before its end.
    """

    path: str
    position_bytes: int
    size_bytes: int | None
    unread_bytes: int | None


@dataclass(frozen=True, slots=True)
class SpoolStatus:
    """What the http-log receiver took in that is still on the disk; `unread_bytes` of it are not settled yet."""

    size_bytes: int
    unread_bytes: int


@dataclass(frozen=True, slots=True)
class Status:
    """The state of one state directory. `process_id`: of the running process, None when there is none.

    `replaying`: likewise of the replay that is at work.
    """

    state_directory: str
    process_id: int | None
    files: list[FileStatus]
    gaps: list[Gap]
    books: Books
    oldest_unsettled_seconds: int = 0  # how long the oldest lines wait for delivery, if that is 10 s or more
    spool: SpoolStatus | None = None  # None where nothing was ever received
    replaying: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report for `--json`: counts by name, reasons as nested tables."""
        return {
            "state_directory": self.state_directory,
            "running": self.process_id is not None,
            "process_id": self.process_id,
            "replaying": self.replaying,
            "oldest_unsettled_seconds": self.oldest_unsettled_seconds,
            "files": [asdict(file) for file in self.files],
            "spool": None if self.spool is None else asdict(self.spool),
            "gaps": [_plain_gap(gap) for gap in self.gaps],
            "books": self.books.as_dict()
            | {
                "received": {count.removeprefix(RECEIVED): self.books[count] for count in Received},
                "balanced": self.books.balanced and self.books.events_balanced,
            },
        }


def _plain_gap(gap: Gap) -> dict[str, Any]:
    found_at = datetime.fromtimestamp(gap.found_at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    place = {"path": gap.path, "start_offset": gap.start_offset, "end_offset": gap.end_offset}
    return place | {"reason": str(gap.reason), "found_at": found_at}


def read_status(directory: Path) -> Status:
    """The status of a state directory. Raises StateError when nothing was recorded there yet."""
    try:
        with Checkpoint(directory, read_only=True) as checkpoint:
            stored = [file for file in checkpoint.files() if file.identity is not None and not file.history]
            there = _files_in({os.path.dirname(file.path) or "." for file in stored})
            files = [_file_status(file, there) for file in stored]
            holder, replaying = holder_of(directory), holder_of(directory, REPLAY_LOCK_NAME)
            holder = None if holder == replaying else holder  # which keeps `run` off what that began
            since = checkpoint.oldest_unsettled_at()
            waits = 0 if holder is None or since is None else max(0, round(time.time()) - since)
            spool = _spool_status(directory, checkpoint.spool_position())
            return Status(str(directory), holder, files, checkpoint.gaps(), checkpoint.books(), waits, spool, replaying)
    except OSError as error:
        raise StateError(f"{directory}: can't be read: {error.strerror}") from None


def _spool_status(directory: Path, position: int | None) -> SpoolStatus | None:
    if position is None:
        return None
    segments = segments_in(directory / SPOOL_DIRECTORY)
    size = sum(segment.end - segment.start for segment in segments)
    return SpoolStatus(size, sum(max(0, segment.end - max(position, segment.start)) for segment in segments))


def _files_in(directories: Iterable[str]) -> dict[Identity, tuple[str, int]]:
    """Path and size of each file in these directories, and in those beneath."""
    found: dict[Identity, tuple[str, int]] = {}
    for directory in directories:
        here = "" if directory == "." else glob.escape(directory)
        for pattern in (os.path.join(here, "*", "*"), os.path.join(here, "*")):
            for path in sorted(glob.glob(pattern), reverse=True):
                with suppress(OSError):
                    status = os.stat(path)
                    found[status.st_dev, status.st_ino] = path, status.st_size
    return found


def _may_be_part(path: str, log: str) -> bool:
    """Whether a file beneath a log's directory is called as a part of that log would be; beside it, anything is."""
    is_beside = (os.path.dirname(path) or ".") == (os.path.dirname(log) or ".")
    return is_beside or os.path.basename(log) in logs_of(os.path.basename(path))


def _file_status(file: StoredFile, there: Mapping[Identity, tuple[str, int]]) -> FileStatus:
    path, size = there.get(file.identity or (0, 0), (file.path, None))
    if size is None or not _may_be_part(path, file.path):
        return FileStatus(file.path, file.position, None, None)
    if file.compressed:
        unread = None if file.seen_bytes is None else max(0, file.seen_bytes - file.position)
        return FileStatus(path, file.position, size, unread)
    if size < file.position:  # other content took its place
        return FileStatus(file.path, file.position, None, None)
    return FileStatus(path, file.position, size, size - file.position)


def render(status: Status) -> None:
    """Print the report for people."""
    console = Console(highlight=False, soft_wrap=True)
    running = f"running as process {status.process_id}" if status.process_id is not None else "not running"
    if status.replaying is not None:
        running += f"; process {status.replaying} is replaying"
    console.print(f"{status.state_directory}: {running}", markup=False)
    present = [file for file in status.files if file.size_bytes is not None]
    table = Table("file", "position", "size", "unread", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"  # a path is of no use without its end
    for column in table.columns[1:]:
        column.justify = "right"
    for file in present:
        numbers = (file.position_bytes, file.size_bytes, file.unread_bytes)
        table.add_row(escape(file.path), *("?" if number is None else f"{number:,}" for number in numbers))
    if present:
        console.print(table)
    if gone := len(status.files) - len(present):
        console.print(f"and {gone} file{' that is' if gone == 1 else 's that are'} gone")
    if status.spool is not None:
        sizes = f"{status.spool.size_bytes:,} bytes, {status.spool.unread_bytes:,} unread"
        received = [f"{reason} {count:,}" for reason, count in status.books.by_reason(RECEIVED).items()]
        console.print(f"received by http-log: {', '.join(received) or 'nothing yet'}; spool: {sizes}")
    if waits := status.oldest_unsettled_seconds:
        console.print(f"the oldest usage that is not delivered was read {waits:,} s ago")
    for gap in status.gaps:
        console.print(f"LOST: {describe(gap)}", markup=False)
    for line in summary(status.books, "dead letters"):
        console.print(line, markup=False)
    if refused := status.books[Count.REFUSED]:
        console.print(f"events refused by the endpoint, kept as dead letters: {refused}")
    if not (status.books.balanced and status.books.events_balanced):
        console.print("THE BOOKS DO NOT BALANCE: please report this, with a copy of the state directory")
