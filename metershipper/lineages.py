"""The open files, by the log that they are parts of, and whose turn it is to be read. No I/O but their times."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from metershipper.followed import FollowedFile
from metershipper.records import Identity


@dataclass(slots=True)
class Lineages:
    """Each log's open files, the oldest first, the log itself last."""

    _files: dict[str, list[FollowedFile]] = field(default_factory=dict)
    _turn: int = 0

    def __iter__(self) -> Iterator[FollowedFile]:
        """All of them; they may be added and removed meanwhile."""
        return iter([file for files in self._files.values() for file in files])

    def logs(self) -> set[str]:
        """The logs with open files."""
        return set(self._files)

    def of(self, log: str) -> list[FollowedFile]:
        """The open files of one log."""
        return list(self._files.get(log, ()))

    def ids(self) -> dict[Identity, int]:
        """The id of each open file by device and inode."""
        return {file.identity: file.file_id for file in self}

    def in_turn(self) -> Iterator[FollowedFile]:
        """All files, log after log, beginning with the log after the one that had the last turn."""
        lineages = list(self._files.values())
        for step in range(len(lineages)):
            turn = (self._turn + step) % len(lineages)
            yield from list(lineages[turn])

    def had_its_turn(self, file: FollowedFile) -> None:
        """The next turn is another log's."""
        self._turn = list(self._files).index(file.path) + 1

    def add(self, file: FollowedFile) -> None:
        """Put a file where its age belongs."""
        files = self._files.setdefault(file.path, [])
        if not file.rotated:
            files.append(file)
            return
        age = _written_at(file)
        younger = (at for at, known in enumerate(files) if not known.rotated or _written_at(known) > age)
        files.insert(next(younger, len(files)), file)

    def remove(self, file: FollowedFile) -> None:
        """The file is not open, or a part of another log, from now on."""
        self._files[file.path].remove(file)
        if not self._files[file.path]:
            del self._files[file.path]

    def clear(self) -> None:
        """Nothing is open from now on."""
        self._files.clear()


def _written_at(file: FollowedFile) -> int:
    with suppress(OSError):
        return file.content.stamp().mtime_ns
    return 0
