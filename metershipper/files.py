"""The files that are followed: finding them, knowing them again after a rename, and reading them in turn.

All of this blocks; `tailer` calls it off the event loop, one call at a time. Owns the set of open files, whose read
offsets run ahead of the checkpoint's positions. Never parses a line and never decides what is settled.

A file is known by device and inode, and its content by its samples (see `followed`). Content that no longer matches is
other content: it gets a new record and is read from its beginning, while what was read of the old one settles under
the old record.
"""

import fnmatch
import glob
import logging
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from metershipper.config import FileInput
from metershipper.followed import (
    MAX_LINE_BYTES,
    TAIL_BYTES,
    Block,
    FollowedFile,
    end_of_lines,
    holds,
    is_copy,
    read_head,
)
from metershipper.lines import COMPRESSED_SUFFIXES, is_rotated_name
from metershipper.records import Identity, NewFile, Sample, StoredFile

log = logging.getLogger("metershipper.tailer")

# Kong's file-log keeps writing to a renamed file until it reopens it (`reopen` is false by default), so a rotated
# file is let go only after it was quiet for this long, and looked for again as long as it can be found.
ROTATED_IDLE_SECONDS = 300.0
# A directory whose listing did not change is listed again after this, for a released file that grew after all.
LISTING_SECONDS = 30.0
_HISTORY = "rotated before its log was first followed, so it is not read; to bill it too, list it as an input"
FRESH_SECONDS = 2.0


class Registry(Protocol):
    """What is durable about files; the checkpoint's part for this module."""

    def files(self) -> list[StoredFile]: ...
    def inputs(self) -> set[str]: ...
    def register(self, files: Sequence[NewFile], inputs: Iterable[str] = ()) -> list[int]: ...
    def update(self, file: StoredFile) -> None: ...


@dataclass(slots=True)
class _Found:
    """A file seen in a directory, not yet followed. `lineage`: the path of the log that it is part of.

    Not `named`: it has the inode of a part of that log, but a name that rotation does not give.
    """

    path: str
    lineage: str
    status: os.stat_result
    from_end: bool = False
    named: bool = True

    @property
    def identity(self) -> Identity:
        return self.status.st_dev, self.status.st_ino


@dataclass(slots=True)
class _Opened:
    """A file descriptor that is closed again unless it is `kept`."""

    fd: int
    kept: bool = False


@dataclass(slots=True)
class FileSet:
    """All followed files of all inputs. `clock` is monotonic, in seconds."""

    inputs: Sequence[FileInput]
    registry: Registry
    clock: Callable[[], float]
    rotated_idle_seconds: float = ROTATED_IDLE_SECONDS
    max_line_bytes: int = MAX_LINE_BYTES
    _lineages: dict[str, list[FollowedFile]] = field(default_factory=dict)  # oldest file first
    _records: dict[Identity, StoredFile] = field(default_factory=dict)  # of files that are not open
    _superseded: list[StoredFile] = field(default_factory=list)  # of content that is not where it was read
    _known_inputs: set[str] = field(default_factory=set)
    _listed: dict[str, tuple[int, float]] = field(default_factory=dict)  # directory: its mtime, when it was listed
    _complaints: dict[str, str] = field(default_factory=dict)
    _rests: deque[Block] = field(default_factory=deque)
    _turn: int = 0

    def load(self) -> None:
        """Read what is durable. Call once, before `scan`."""
        for file in self.registry.files():
            if file.device is None or file.inode is None:
                self._superseded.append(file)
            else:
                self._records[file.device, file.inode] = file
        self._known_inputs = self.registry.inputs()

    def followed(self) -> list[FollowedFile]:
        """The open files."""
        return [file for files in self._lineages.values() for file in files]

    def close(self) -> None:
        """Let all files go."""
        for file in self.followed():
            file.close()
        self._lineages.clear()

    def directories(self) -> set[str]:
        """Existing directories in which a followed log changes, or a configured one may appear."""
        parents = {os.path.dirname(path) for path in self._lineages}
        parents |= {os.path.dirname(entry.path) for entry in self.inputs if not glob.has_magic(entry.path)}
        return {parent or "." for parent in parents if os.path.isdir(parent or ".")}

    # Reading

    def next_block(self) -> Block | None:
        """Whole lines of the next file that has some, the files in turn, of each log the oldest file first."""
        if self._rests:
            return self._rests.popleft()
        lineages = list(self._lineages.values())
        for step in range(len(lineages)):
            turn = (self._turn + step) % len(lineages)
            for file in lineages[turn]:
                block = self._read(file)
                if block is not None:
                    self._turn = turn + 1
                    return block
        return None

    def _read(self, file: FollowedFile) -> Block | None:
        unread = file.unread_bytes()
        try:
            if file.was_replaced():
                self._begin_again(file)
            if not file.head.length:
                self._identify(file)
            block = file.read_block(self.max_line_bytes)
        except OSError as error:
            self._complain(file.path, f"can't be read: {error.strerror}; trying again")
            return None
        if block is not None or file.unread_bytes() != unread:
            file.active_at = self.clock()
        return block

    def _identify(self, file: FollowedFile) -> None:
        """Record the head once it is there. Before the lines are read: if this fails, nothing was stepped over."""
        head = read_head(file.fd)
        if head.length:
            self.registry.update(replace(file.record(), head=head))
            file.head = head

    def _begin_again(self, file: FollowedFile) -> None:
        """The file holds other content now: that gets a record of its own and is read from its beginning."""
        unread = file.unread_bytes()
        lost = f", {unread} bytes before they were read" if unread else ""
        log.warning("%s: truncated at byte %d%s; reading its new content", file.path, file.offset, lost)
        head, old = read_head(file.fd), file.record()
        new = NewFile(file.path, *file.identity, head, supersedes=file.file_id)
        (file.file_id,) = self.registry.register([new])
        self._superseded.append(replace(old, device=None, inode=None))
        self._listed.clear()  # what was not read may be in a copy that was made before the file was truncated
        file.start_at(0, head)

    # Finding

    def scan(self) -> None:
        """Look for new, renamed, rotated and released files; open what holds something to read."""
        current = self._find_current()
        self._notice_renames(current)
        for found in self._find_rotated(current):
            self._open_rotated(found, current)
        followed = {file.identity for file in self.followed()}
        for identity, found in current.items():
            if identity not in followed:
                self._open_current(found, current)
        new_inputs = [entry.path for entry in self.inputs if entry.path not in self._known_inputs]
        if new_inputs:
            self.registry.register([], new_inputs)
            self._known_inputs.update(new_inputs)
        self._release_quiet()

    def _find_current(self) -> dict[Identity, _Found]:
        """The regular files that the configured paths name now."""
        current: dict[Identity, _Found] = {}
        for entry in self.inputs:
            from_end = entry.read_from == "end" and entry.path not in self._known_inputs
            paths = sorted(glob.glob(entry.path, recursive=True)) if glob.has_magic(entry.path) else [entry.path]
            if not any(map(os.path.lexists, paths)):
                self._complain(entry.path, "no such file yet; it is followed as soon as it appears")
            for path in paths:
                status = self._regular(path)
                if status is not None and path.endswith(COMPRESSED_SUFFIXES):
                    self._complain(path, "compressed, so it is not followed")
                elif status is not None:
                    current.setdefault((status.st_dev, status.st_ino), _Found(path, path, status, from_end))
        return current

    def _regular(self, path: str) -> os.stat_result | None:
        try:
            path.encode()
            status = os.stat(path)
        except FileNotFoundError:
            return None
        except UnicodeEncodeError:
            self._complain(path, "the name is not UTF-8, so it is not followed")
            return None
        except OSError as error:
            self._complain(path, f"can't be looked at: {error.strerror}; trying again")
            return None
        if stat.S_ISREG(status.st_mode):
            return status
        if not stat.S_ISDIR(status.st_mode) or any(path == entry.path for entry in self.inputs):
            self._complain(path, "not a regular file, so it is not followed")
        return None

    def _notice_renames(self, current: dict[Identity, _Found]) -> None:
        for file in self.followed():
            found = current.get(file.identity)
            if found is None and not file.rotated:
                file.rotated, file.active_at = True, self.clock()
                log.info("%s: rotated away; its rest is read first, from byte %d", file.path, file.offset)
            elif found is not None:
                file.rotated = False
                if found.path != file.path:
                    file.path = found.path
                    self.registry.update(file.record())

    def _find_rotated(self, current: dict[Identity, _Found]) -> list[_Found]:
        """Rotated parts of the followed logs that are not open, oldest first."""
        lineages = {found.path for found in current.values()} | set(self._lineages)
        lineages |= {entry.path for entry in self.inputs if not glob.has_magic(entry.path)}
        lineages |= {record.path for record in self._records.values() if self._is_input(record.path)}
        by_directory: dict[str, set[str]] = {}
        for path in lineages:
            by_directory.setdefault(os.path.dirname(path) or ".", set()).add(path)
        skipped = set(current) | {file.identity for file in self.followed()}
        rotated: list[_Found] = []
        for directory, paths in by_directory.items():
            for candidate in self._changed_listing(directory):
                status = self._regular(candidate.path)
                if status is None or (status.st_dev, status.st_ino) in skipped:
                    continue
                named = _lineage_of(candidate.name, paths)
                record = self._records.get((status.st_dev, status.st_ino))
                if named is not None:
                    rotated.append(_Found(candidate.path, named, status))
                elif record is not None and record.path in paths:
                    rotated.append(_Found(candidate.path, record.path, status, named=False))
        return sorted(rotated, key=lambda found: found.status.st_mtime_ns)

    def _is_input(self, path: str) -> bool:
        return any(fnmatch.fnmatchcase(path, entry.path) for entry in self.inputs)

    def _changed_listing(self, directory: str) -> list["os.DirEntry[str]"]:
        """The directory's files, or nothing when it is unchanged since a recent listing."""
        now = self.clock()
        try:
            changed = os.stat(directory).st_mtime_ns
            mtime, listed_at = self._listed.get(directory, (-1, 0.0))
            if changed == mtime and now - listed_at < LISTING_SECONDS:
                return []
            # Within one tick of its clock a directory can change again unseen, so a fresh listing is not relied on.
            fresh = abs(time.time() - changed / 1e9) < FRESH_SECONDS
            self._listed[directory] = (-1 if fresh else changed, now)
            with os.scandir(directory) as entries:
                return [entry for entry in entries if entry.is_file(follow_symlinks=False)]
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                self._complain(directory, f"can't be listed: {error.strerror}; trying again")
            return []

    # Opening

    def _open_rotated(self, found: _Found, current: dict[Identity, _Found]) -> None:
        with self._opened(found) as opened:
            if opened is not None:
                self._place_rotated(opened, found, current)

    def _place_rotated(self, opened: _Opened, found: _Found, current: dict[Identity, _Found]) -> None:
        fd, size = opened.fd, os.fstat(opened.fd).st_size
        record = self._records.get(found.identity)
        head = read_head(fd)
        known = record if record is not None and holds(fd, record) else self._moved(fd, head, current)
        if known is not None:
            if size > known.position:
                self._resume(opened, found, known, rotated=True)
        elif not size or not found.named:
            return
        elif found.lineage not in self._known_inputs and all(
            known.path != found.lineage for known in self._all_records()
        ):
            # There before its log was ever looked for: whether it was billed before, nobody here knows.
            log.warning("%s: %s", found.path, _HISTORY)
            self._record(NewFile(found.path, *found.identity, head, size, history=True))
        elif head.length and any(is_copy(fd, size, head, known) for known in self._all_records()):
            log.info("%s: a copy of content that is followed already; it is not read", found.path)
        else:
            log.info("%s: rotated before it was seen; reading it from its beginning", found.path)
            self._follow_new(opened, found, NewFile(found.lineage, *found.identity, head), rotated=True)

    def _open_current(self, found: _Found, current: dict[Identity, _Found]) -> None:
        with self._opened(found) as opened:
            if opened is not None:
                self._place_current(opened, found, current)

    def _place_current(self, opened: _Opened, found: _Found, current: dict[Identity, _Found]) -> None:
        fd = opened.fd
        record = self._records.get(found.identity)
        listed = record is not None and record.history  # passed over so far, and an input of its own now
        if record is not None and not listed and holds(fd, record):
            self._resume(opened, found, record)
            return
        head = read_head(fd)
        moved = None if record else self._moved(fd, head, current)
        if moved is not None:
            self._resume(opened, found, moved)
            return
        if record is not None and not listed:
            log.warning("%s: holds other content than when it was last read; reading it from its beginning", found.path)
        position = end_of_lines(fd) if found.from_end else 0
        self._follow_new(opened, found, NewFile(found.path, *found.identity, head, position))

    def _moved(self, fd: int, head: Sample, current: dict[Identity, _Found]) -> StoredFile | None:
        """The record of this very content, which was read under another device or inode.

        A remount, a restored volume, or a copy that was made before the log was truncated.
        """
        records = [record for record in (*self._records.values(), *self._superseded) if record.head == head]
        moved = [record for record in records if holds(fd, record) and not self._in_place(record, current)]
        return max(moved, key=lambda record: record.position, default=None) if head.length else None

    def _in_place(self, record: StoredFile, current: dict[Identity, _Found]) -> bool:
        found = current.get((record.device or 0, record.inode or 0))
        if found is None:
            return False
        in_place = True
        with self._opened(found) as opened:
            in_place = opened is None or holds(opened.fd, record)
        return in_place

    @contextmanager
    def _opened(self, found: _Found) -> Iterator[_Opened | None]:
        """The file, opened; None when it can't be. It is closed again unless it was kept."""
        try:
            opened = _Opened(os.open(found.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            self._complain(found.path, f"can't be opened: {error.strerror}; trying again")
            yield None
            return
        try:
            # Another file has the name by now: the next scan sees it as what it is.
            yield opened if os.path.samestat(os.fstat(opened.fd), found.status) else None
            self._complaints.pop(found.path, None)
        except OSError as error:
            self._complain(found.path, f"can't be read: {error.strerror}; trying again")
        finally:
            if not opened.kept:
                os.close(opened.fd)

    def _resume(self, opened: _Opened, found: _Found, record: StoredFile, *, rotated: bool = False) -> None:
        log.info("%s: following from byte %d", found.path, record.position)
        status = os.fstat(opened.fd)
        identity = status.st_dev, status.st_ino
        if (record.path, record.device, record.inode) != (found.lineage, *identity):
            device, inode = identity
            self.registry.update(replace(record, path=found.lineage, device=device, inode=inode, history=False))
        tail = os.pread(opened.fd, record.tail.length, record.position - record.tail.length)
        self._follow(
            opened,
            FollowedFile(
                record.file_id, found.lineage, opened.fd, identity, record.position, tail, record.head, rotated
            ),
        )
        self._records.pop((record.device or 0, record.inode or 0), None)
        self._superseded = [known for known in self._superseded if known.file_id != record.file_id]

    def _follow_new(self, opened: _Opened, found: _Found, new: NewFile, *, rotated: bool = False) -> None:
        log.info("%s: following from byte %d", found.path, new.position)
        file_id = self._record(new).file_id
        del self._records[found.identity]
        tail = os.pread(opened.fd, min(TAIL_BYTES, new.position), max(0, new.position - TAIL_BYTES))
        file = FollowedFile(file_id, new.path, opened.fd, found.identity, new.position, tail, new.head, rotated)
        self._follow(opened, file)

    def _follow(self, opened: _Opened, file: FollowedFile) -> None:
        opened.kept = True
        file.active_at = self.clock()
        files = self._lineages.setdefault(file.path, [])
        files.insert(sum(known.rotated for known in files) if file.rotated else len(files), file)

    def _record(self, new: NewFile) -> StoredFile:
        old = self._records.get((new.device, new.inode))
        (file_id,) = self.registry.register([replace(new, supersedes=old.file_id if old else None)])
        if old is not None:
            self._superseded.append(replace(old, device=None, inode=None))
        place = new.path, new.device, new.inode
        record = StoredFile(file_id, *place, new.head, Sample(), new.position, new.history)
        self._records[new.device, new.inode] = record
        return record

    def _all_records(self) -> list[StoredFile]:
        return [*self._records.values(), *(file.record() for file in self.followed())]

    # Letting go

    def _release_quiet(self) -> None:
        """Let rotated files go that were read to their end and are quiet; `_find_rotated` finds them if they grow."""
        now = self.clock()
        for lineage, files in list(self._lineages.items()):
            for file in list(files):
                if file.rotated and now - file.active_at > self.rotated_idle_seconds and self._release(file):
                    files.remove(file)
            if not files:
                del self._lineages[lineage]

    def _release(self, file: FollowedFile) -> bool:
        try:
            if file.has_unread_lines():
                return False
            rest = file.read_rest(self.max_line_bytes)
        except OSError as error:
            self._complain(file.path, f"can't be read: {error.strerror}; trying again")
            return False
        if rest is not None:
            self._rests.append(rest)
        self._records[file.identity] = file.record()
        file.close()
        return True

    def _complain(self, path: str, problem: str) -> None:
        """Log a problem of a path once, and again only when it changes."""
        if self._complaints.get(path) != problem:
            self._complaints[path] = problem
            log.warning("%s: %s", path, problem)


def _lineage_of(name: str, paths: set[str]) -> str | None:
    """Which of the logs at `paths` rotation gave this name; the longest, as usage-1.log.1 is not of usage.log."""
    by_length = sorted(paths, key=lambda path: (-len(path), path))
    return next((path for path in by_length if is_rotated_name(name, os.path.basename(path))), None)
