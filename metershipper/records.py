"""What is durable about followed files: the types between `files`, which finds them, and `checkpoint`, which keeps it.

Pure values; all lengths and offsets are bytes, of a compressed file those of its content.
"""

from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Literal, NamedTuple

Identity = tuple[int, int]  # device, inode
Origin = Literal["run", "replay"]


@dataclass(frozen=True, slots=True)
class Sample:
    """A stretch of a file by which its content is known again: length in bytes and SHA-256. Empty: not known yet."""

    length: int = 0
    digest: str = ""

    @classmethod
    def of(cls, data: bytes) -> "Sample":
        """The sample of `data`."""
        return cls(len(data), sha256(data).hexdigest()) if data else cls()


class Stamp(NamedTuple):
    """A file as it was when it was read to its end: its size in bytes, compressed or not, and when it was written."""

    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as the checkpoint knows it. `position`: everything before it is settled.

    `device` and `inode` are None once other content took its place. `seen_bytes`: how long the file was when it was
    rotated and read to its end; None while more may come. `history`: there before its log was followed, and never read.
    `stamp`: while the file has it, there is nothing more in it. `start_offset`: where reading began; what is before was
    left out (`read_from`), or is settled under another record.

    `origin`: who read it. What `replay` read has no place, only content. `scope`: what a filtered replay took of it, as
    `scope.Scope` writes it; None for everything. `replaying`: the replay that delivers it, or did when it was killed.
    """

    file_id: int
    path: str
    device: int | None
    inode: int | None
    head: Sample
    tail: Sample
    position: int
    history: bool = False
    compressed: bool = False
    seen_bytes: int | None = None
    stamp: Stamp | None = None
    start_offset: int = 0
    origin: Origin = "run"
    scope: str | None = None
    replaying: int | None = None

    @property
    def identity(self) -> Identity | None:
        """Where the content was last seen."""
        return None if self.device is None or self.inode is None else (self.device, self.inode)

    @property
    def is_blank(self) -> bool:
        """Whether nothing was ever seen in it, so that its content can't be known again."""
        return not self.head.length and not self.position

    @property
    def is_complete(self) -> bool:
        """Whether all that it will ever hold is settled, as far as anybody can know."""
        return self.history or (self.seen_bytes is not None and self.position >= self.seen_bytes)


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file met for the first time. `supersedes`: the stored file whose place its content took.

    `known_replays`: what `replay` had read of this content when it was looked up; None where that does not matter.
    """

    path: str
    device: int
    inode: int
    head: Sample
    position: int = 0
    supersedes: int | None = None
    history: bool = False
    compressed: bool = False
    known_replays: frozenset[int] | None = None


class Lost(StrEnum):
    """Why a part of a log can't be read any more."""

    VANISHED = "vanished"  # rotated or deleted unread, and its content is nowhere to be found
    TRUNCATED = "truncated"  # cut before it was read, and no copy of it was found
    DAMAGED = "damaged"  # a compressed file that unpacks up to here only


@dataclass(frozen=True, slots=True)
class Gap:
    """A part of a log that was not read and can't be any more. `end_offset` is None where nobody knows how much it was.

    `found_at`: seconds since the epoch.
    """

    file_id: int
    path: str
    start_offset: int
    end_offset: int | None
    reason: Lost
    found_at: float
