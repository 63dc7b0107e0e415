"""What the checkpoint says, as a report: positions, lag, books, dead letters. Reads only; works while `run` runs."""

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metershipper.books import DEAD_LETTERS, SKIPPED, Books, Count
from metershipper.checkpoint import Checkpoint
from metershipper.errors import StateError
from metershipper.filter import summary
from metershipper.records import StoredFile
from metershipper.state import holder_of


@dataclass(frozen=True, slots=True)
class FileStatus:
    """One followed file. `size_bytes` is None when the file is gone; `unread_bytes`: not settled yet."""

    path: str
    position_bytes: int
    size_bytes: int | None
    unread_bytes: int | None


@dataclass(frozen=True, slots=True)
class Status:
    """The state of one state directory. `process_id`: of the running process, None when there is none."""

    state_directory: str
    process_id: int | None
    files: list[FileStatus]
    books: Books

    def as_dict(self) -> dict[str, Any]:
        """The report for `--json`: counts by name, reasons as nested tables."""
        plain = {str(count): self.books[count] for count in Count}
        return {
            "state_directory": self.state_directory,
            "running": self.process_id is not None,
            "process_id": self.process_id,
            "files": [asdict(file) for file in self.files],
            "books": plain
            | {
                "skipped": self.books.by_reason(SKIPPED),
                "dead_letters": self.books.by_reason(DEAD_LETTERS),
                "balanced": self.books.balanced,
            },
        }


def read_status(directory: Path) -> Status:
    """The status of a state directory. Raises StateError when nothing was recorded there yet."""
    try:
        with Checkpoint(directory, read_only=True) as checkpoint:
            files = [_file_status(file) for file in checkpoint.files() if file.inode is not None and not file.history]
            return Status(str(directory), holder_of(directory), files, checkpoint.books())
    except OSError as error:
        raise StateError(f"{directory}: can't be read: {error.strerror}") from None


def _file_status(file: StoredFile) -> FileStatus:
    path, size = _present(file)
    return FileStatus(path, file.position, size, None if size is None else max(0, size - file.position))


def _present(file: StoredFile) -> tuple[str, int | None]:
    """What the recorded file is called in its directory now, and its size; its last path and None when it is gone."""
    directory = os.path.dirname(file.path)
    try:
        names = [os.path.basename(file.path), *sorted(os.listdir(directory or "."))]
    except OSError:
        return file.path, None
    for name in names:
        path = os.path.join(directory, name)
        with suppress(OSError):
            status = os.stat(path)
            if (status.st_dev, status.st_ino) == (file.device, file.inode):
                return path, status.st_size
    return file.path, None


def render(status: Status) -> None:
    """Print the report for people."""
    console = Console(highlight=False, soft_wrap=True)
    running = f"running as process {status.process_id}" if status.process_id is not None else "not running"
    console.print(f"{status.state_directory}: {running}", markup=False)
    present = [file for file in status.files if file.size_bytes is not None]
    table = Table("file", "position", "size", "unread", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"  # a path is of no use without its end
    for column in table.columns[1:]:
        column.justify = "right"
    for file in present:
        numbers = (file.position_bytes, file.size_bytes, file.unread_bytes)
        table.add_row(escape(file.path), *(f"{number:,}" for number in numbers))
    console.print(table)
    if gone := len(status.files) - len(present):
        console.print(f"and {gone} files that are gone")
    for line in summary(status.books, "dead letters"):
        console.print(line, markup=False)
    if not status.books.balanced:
        console.print("THE BOOKS DO NOT BALANCE: please report this, with a copy of the state directory")
