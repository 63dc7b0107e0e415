"""The files that are followed: opening them, knowing them again, and reading them in turn.

All of this blocks; `tailer` calls it off the event loop. Owns the set of open files, whose read offsets run ahead of
the checkpoint's positions. What stands on the disk is `listing`, what a file holds `content`, what is known of the
others `known`. Never parses a line and never decides what is settled.

A file is known by device and inode, and its content by its samples. Content that no longer matches is other content:
it gets a new record and is read from its beginning, while what was read of the old one settles under the old record.
"""

import errno
import glob
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from metershipper.archive import Damaged
from metershipper.config import FileInput
from metershipper.content import Content, end_of_lines, open_content
from metershipper.followed import Block, FollowedFile
from metershipper.known import KnownFiles, Registry, stamp_of
from metershipper.lines import MAX_LINE_BYTES
from metershipper.listing import Found, Listing
from metershipper.records import Identity, Lost, NewFile, Sample, StoredFile
from metershipper.rotation import is_compressed_name

log = logging.getLogger("metershipper.tailer")

# Kong's file-log keeps writing to a renamed file until it reopens it (`reopen` is false by default), so a rotated
# file is let go only after it was quiet for this long, and looked for again as long as it can be found.
ROTATED_IDLE_SECONDS = 300.0
# A rotated file that was read to its end, and is quiet for this long, is taken for complete as far as gaps go.
QUIET_SECONDS = 2.0
# What is written to a rotated file this long after its rotation comes from a Kong that did not reopen its log.
REOPENED_WITHIN_SECONDS = 5.0
# A file that shrank but begins as before is waited for: a network file system's size may be stale (acregmax is 60 s).
STALE_SIZE_SECONDS = 60.0
_HISTORY = "rotated before its log was first followed, so it is not read; to bill it too, list it as an input"
_STILL_WRITTEN = (
    "%s: Kong still writes to the file that was rotated away. Everything is read, but the new file stays empty and the "
    "old one keeps its disk space: set reopen = true in Kong's file-log plugin (its default is false)"
)


@dataclass(slots=True)
class _Opened:
    """Content that is closed again unless it is `kept`."""

    content: Content
    kept: bool = False


Logs = Mapping[Identity, Found]


@dataclass(slots=True)
class FileSet:
    """All followed files of all inputs. `clock` is monotonic, in seconds. Methods may be called from any thread."""

    inputs: Sequence[FileInput]
    registry: Registry
    clock: Callable[[], float]
    max_line_bytes: int = MAX_LINE_BYTES
    rotated_idle_seconds: float = ROTATED_IDLE_SECONDS
    _listing: Listing = field(init=False)
    _known: KnownFiles = field(init=False)
    _lineages: dict[str, list[FollowedFile]] = field(default_factory=dict)  # by log, oldest file first
    _warned: set[str] = field(default_factory=set)  # logs whose rotated file is still written
    _rests: deque[Block] = field(default_factory=deque)
    _turn: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._listing = Listing(self.inputs, self.clock)
        self._known = KnownFiles(self.inputs, self.registry, self.clock)

    def load(self) -> None:
        """Read what is durable. Call once, before `scan`."""
        self._known.load()

    def followed(self) -> list[FollowedFile]:
        """The open files."""
        return [file for files in self._lineages.values() for file in files]

    def close(self) -> None:
        """Let all files go, once nobody reads them."""
        with self._lock:
            for file in self.followed():
                file.content.close()
            self._lineages.clear()

    def directories(self) -> set[str]:
        """Existing directories in which a followed log changes, or a configured one may appear."""
        parents = {os.path.dirname(path) or "." for path in (*self._lineages, *(entry.path for entry in self.inputs))}
        return {parent for parent in parents if os.path.isdir(parent)}

    # Reading

    def next_block(self) -> Block | None:
        """Whole lines of the next file that has some, the files in turn, of each log the oldest file first."""
        with self._lock:
            if self._rests:
                return self._rests.popleft()
            lineages = list(self._lineages.values())
            for step in range(len(lineages)):
                turn = (self._turn + step) % len(lineages)
                for file in list(lineages[turn]):
                    block = self._read(file)
                    if block is not None:
                        self._turn = turn + 1
                        return block
            return None

    def _read(self, file: FollowedFile) -> Block | None:
        size = file.size_seen
        try:
            if file.was_replaced():
                if file.shrank() and not self._waited_for_size(file):
                    return None
                self._begin_again(file)
            file.shrunk_at = None
            if not file.head.length:
                self._identify(file)
            block = file.read_block(self.max_line_bytes)
        except OSError as error:
            self._listing.complain(file.path, f"can't be read: {error.strerror}; trying again")
            if error.errno == errno.ESTALE:  # of a network file system: the next look opens it by its name
                self._let_go(file)
            return None
        except Damaged as damaged:
            self._give_up(file, damaged)
            return None
        if block is not None or file.size_seen != size:
            file.active_at = self.clock()
            if file.came_to_rest and file.path not in self._warned:
                self._warned.add(file.path)
                log.warning(_STILL_WRITTEN, file.path)
        return block

    def _waited_for_size(self, file: FollowedFile) -> bool:
        """Whether a file that shrank was given time enough to show that its size was only stale."""
        if file.shrunk_at is None:
            file.shrunk_at = self.clock()
            log.warning("%s: shorter than what was read of it, but it begins as before; waiting", file.path)
        return self.clock() - file.shrunk_at >= STALE_SIZE_SECONDS

    def _identify(self, file: FollowedFile) -> None:
        """Record the head once it is there. Before the lines are read: if this fails, nothing was stepped over."""
        head = file.content.head()
        if head.length:
            self.registry.update(replace(file.record(), head=head))
            file.head = head

    def _begin_again(self, file: FollowedFile) -> None:
        """The file holds other content now. What was read of the old one settles under its old record."""
        unread = file.size_seen - file.offset
        lost = f", {unread} bytes before they were read" if unread else ""
        log.warning("%s: truncated at byte %d%s; reading its new content", file.path, file.offset, lost)
        head, old = file.content.head(), replace(file.record(), seen_bytes=file.size_seen)
        self.registry.update(old)
        new = NewFile(file.path, *file.identity, head, supersedes=file.file_id)
        (file.file_id,) = self.registry.register([new])
        self._known.supersede(old)
        self._listing.look_again()  # what was not read may be in a copy that was made before the file was truncated
        file.start_at(0, head)

    def _give_up(self, file: FollowedFile, damaged: Damaged) -> None:
        """A compressed file does not unpack any further. Should it change, it is tried again."""
        log.error("%s: damaged (%s) behind byte %d of its content", file.found_at, damaged, file.offset)
        self._known.losses.report(replace(file.record(), path=file.found_at), Lost.DAMAGED)
        if file.stamp is not None:
            self._known.pass_over(file.identity, file.stamp)
        self._let_go(file)

    def _let_go(self, file: FollowedFile, *, watched_to_end: bool = False) -> None:
        self._known.let_go(file, watched_to_end=watched_to_end)
        self._remove(file)
        file.content.close()

    # Looking around

    def scan(self) -> None:
        """Look for new, renamed, rotated and released files; open what holds something to read."""
        with self._lock:
            self._listing.failed = False
            logs, compressed = self._listing.logs(self._known.known_inputs)
            self._notice_renames(logs)
            self._recognise(logs)
            parts = self._listing.beside(self._logs_to_look_for(logs), self._known.log_of)
            self._open_parts(parts, compressed, logs)
            self._open_logs(logs)
            self._known.remember_inputs(complete=not self._listing.failed)
            self._note_ends()
            if not self._listing.failed:
                if parts or self._known.losses.is_waiting:
                    self._known.judge(logs)
                self._known.forget({file.file_id for file in self.followed()})

    def _notice_renames(self, logs: Logs) -> None:
        for file in self.followed():
            found = logs.get(file.identity)
            if found is None and not file.rotated:
                file.rotated, file.rotated_at, file.active_at = True, self.clock(), self.clock()
                gone = "deleted" if os.fstat(file.content.fd).st_nlink == 0 else "rotated away"
                log.info("%s: %s; its rest is read first, from byte %d", file.path, gone, file.offset)
            elif found is not None and (file.rotated or file.path != found.log):
                self.registry.update(replace(file.record(), path=found.log, seen_bytes=None))
                self._remove(file)
                file.path, file.rotated, file.came_to_rest, file.seen_bytes = found.log, False, False, None
                self._add(file)

    def _recognise(self, logs: Logs) -> None:
        """Know a log again whose path changed: what was rotated beside it is no history."""
        followed = {file.identity for file in self.followed()}
        for identity, found in logs.items():
            if self._known.is_known(found) or identity in followed:
                continue
            with self._opened(found) as opened:
                head = opened.content.head() if opened is not None else Sample()
                if head.length and any(record.head == head for record in self._known.records()):
                    self._known.known_logs[found.log] = found.input

    def _logs_to_look_for(self, logs: Logs) -> dict[str, str]:
        """The logs whose rotated parts are of interest, and the inputs that name them."""
        wanted = {path: named_by for path, named_by in self._known.known_logs.items() if named_by is not None}
        wanted |= {entry.path: entry.path for entry in self.inputs if not glob.has_magic(entry.path)}
        return wanted | {found.log: found.input for found in logs.values()}

    def _open_parts(self, parts: Mapping[str, list[Found]], compressed: Iterable[Found], logs: Logs) -> None:
        """Open what is rotated and holds more to read: the oldest first, a file before what it was compressed to."""
        found = {part.identity: part for directory in parts.values() for part in directory}
        found |= {part.identity: part for part in compressed if part.directory in parts}
        self._known.listed(parts)
        followed = {file.identity: file.file_id for file in self.followed()}
        for part in sorted(found.values(), key=_by_age):
            if part.identity in followed:
                self._known.mark_present(part, followed[part.identity])
            elif part.identity not in logs and not self._known.is_settled(part, followed.values()):
                self._open(part, logs, self._place_part)

    def _open_logs(self, logs: Logs) -> None:
        followed = {file.identity: file.file_id for file in self.followed()}
        for identity, found in logs.items():
            if identity not in followed and not (found.whole and self._known.is_settled(found, followed.values())):
                self._open(found, logs, self._place_log)

    # Opening

    def _open(self, found: Found, logs: Logs, place: "Callable[[_Opened, Found, Logs], None]") -> None:
        with self._opened(found) as opened:
            if opened is not None:
                place(opened, found, logs)

    @contextmanager
    def _opened(self, found: Found) -> Iterator[_Opened | None]:
        """The file's content; None when it can't be opened. It is closed again unless it was kept."""
        try:
            fd = os.open(found.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            self._listing.complain(found.path, f"can't be opened: {error.strerror}; trying again")
            yield None
            return
        opened = None
        try:
            opened = self._content_of(fd, found)
            yield opened
            if opened is not None:
                self._listing.forgive(found.path)
        except OSError as error:
            self._listing.complain(found.path, f"can't be read: {error.strerror}; trying again")
        finally:
            if opened is None or not opened.kept:
                os.close(fd)

    def _content_of(self, fd: int, found: Found) -> _Opened | None:
        try:
            # Another file may have the name by now: the next scan sees it as what it is.
            if not os.path.samestat(os.fstat(fd), found.status):
                return None
            return _Opened(open_content(fd))
        except OSError as error:
            self._listing.complain(found.path, f"can't be read: {error.strerror}; trying again")
            return None

    def _place_part(self, opened: _Opened, found: Found, logs: Logs) -> None:
        content = opened.content
        record, head = self._known.at(found.identity), content.head()
        watched = self._known.watched(content, head)
        if watched is not None:
            self._known.complete(found, content, watched)
            return
        known = record if record is not None and content.holds(record) else self._moved(content, head, logs)
        if known is None:
            self._place_unseen(opened, found, head)
        elif content.has_more_than(known.position) and not (known.history and content.compressed):
            self._resume(opened, found, known, rotated=True)
        else:
            self._known.complete(found, content, known)

    def _place_unseen(self, opened: _Opened, found: Found, head: Sample) -> None:
        if not found.status.st_size or not found.named:
            return
        content = opened.content
        if not self._known.is_known(found) and not found.listed:
            # There before its log was ever looked for: whether it was billed before, nobody here knows.
            log.warning("%s: %s", found.path, _HISTORY)
            size = 0 if content.compressed else found.status.st_size
            self._known.record(replace(_new(found, content, head, size), path=found.path, history=True))
        elif (copied := self._known.copied(content, head, self.followed())) is not None:
            log.info("%s: a copy of content that is followed already; it is not read", found.path)
            self._known.pass_over(found.identity, stamp_of(found), copied.file_id)
        elif found.beneath and not self._known.holds_parts(found.directory):
            self._listing.complain(found.path, f"may be a part of {found.log}; it is not read", failed=False)
        else:
            log.info("%s: rotated before it was seen; reading it from its beginning", found.path)
            self._follow_new(opened, found, _new(found, content, head, 0), rotated=True)

    def _place_log(self, opened: _Opened, found: Found, logs: Logs) -> None:
        content, record = opened.content, self._known.at(found.identity)
        if content.compressed:
            self._listing.complain(found.path, "compressed, so it is not followed", failed=False)
            return
        passed_over = record is not None and record.history  # so far, and an input of its own now
        if record is not None and not passed_over and content.holds(record):
            self._resume(opened, found, record)
            return
        head = content.head()
        moved = None if record else self._moved(content, head, logs)
        if moved is not None:
            self._resume(opened, found, moved)
            return
        if self._take_over(opened, found, head):
            return
        copied = self._known.copied(content, head, self.followed()) if found.whole is not None else None
        if copied is not None:
            self._known.pass_over(found.identity, stamp_of(found), copied.file_id)
            return
        if record is not None and not passed_over:
            log.warning("%s: holds other content than when it was last read; reading it from its beginning", found.path)
        position = end_of_lines(content) if found.from_end and not self._known.starts_over else 0
        self._follow_new(opened, found, _new(found, content, head, position))

    def _take_over(self, opened: _Opened, found: Found, head: Sample) -> bool:
        """Go on in a new file with the content of one that is open and lost its name: a remount, or a rewrite."""
        for file in self._lineages.get(found.log, ()):
            if file.rotated and head.length and file.head == head and opened.content.holds(file.record()):
                log.info("%s: the same content in another file; following that from byte %d", found.path, file.offset)
                device, inode = found.identity
                self.registry.update(replace(file.record(), device=device, inode=inode, seen_bytes=None))
                file.content.close()
                file.go_on_in(opened.content)
                opened.kept = True
                return True
        return False

    def _moved(self, content: Content, head: Sample, logs: Logs) -> StoredFile | None:
        return self._known.moved(content, head, lambda record: self._is_in_place(record, logs))

    def _is_in_place(self, record: StoredFile, logs: Logs) -> bool:
        """Whether the log that was read is still there, so that another file can only be a copy of it."""
        found = logs.get(record.identity) if record.identity is not None else None
        if found is None:
            return False
        in_place = True
        with self._opened(found) as opened:
            in_place = opened is None or opened.content.holds(record)
        return in_place

    def _resume(self, opened: _Opened, found: Found, record: StoredFile, *, rotated: bool = False) -> None:
        log.info("%s: following from byte %d", found.path, record.position)
        tail = opened.content.tail(record.position)
        self._known.resume(found, opened.content, record)
        file = FollowedFile(record.file_id, found.log, opened.content, record.position, tail, record.head, rotated)
        file.seen_bytes = record.seen_bytes
        self._follow(opened, found, file)

    def _follow_new(self, opened: _Opened, found: Found, new: NewFile, *, rotated: bool = False) -> None:
        log.info("%s: following from byte %d", found.path, new.position)
        tail = opened.content.tail(new.position)
        record = self._known.record(new)
        self._known.taken(record)
        file = FollowedFile(record.file_id, found.log, opened.content, new.position, tail, new.head, rotated)
        self._follow(opened, found, file)

    def _follow(self, opened: _Opened, found: Found, file: FollowedFile) -> None:
        opened.kept = True
        file.active_at = file.rotated_at = self.clock()
        file.found_at, file.stamp = found.path, stamp_of(found)
        self._known.known_logs[found.log] = found.input
        self._known.mark_present(found, file.file_id)
        self._add(file)

    def _add(self, file: FollowedFile) -> None:
        files = self._lineages.setdefault(file.path, [])
        files.insert(sum(known.rotated for known in files) if file.rotated else len(files), file)

    def _remove(self, file: FollowedFile) -> None:
        self._lineages[file.path].remove(file)
        if not self._lineages[file.path]:
            del self._lineages[file.path]

    # Letting go

    def _note_ends(self) -> None:
        """Note which rotated files are read to their end, and let those go that were quiet for long enough."""
        now = self.clock()
        for file in self.followed():
            try:
                if not file.rotated or not file.is_read or file.grew():
                    continue
            except OSError as error:
                self._listing.complain(file.path, f"can't be read: {error.strerror}; trying again")
                continue
            file.came_to_rest |= now - file.rotated_at >= REOPENED_WITHIN_SECONDS and not file.content.compressed
            if file.content.compressed or now - file.active_at > self.rotated_idle_seconds:
                self._release(file)
            elif now - file.active_at >= QUIET_SECONDS and file.seen_bytes != file.size_seen:
                self.registry.update(replace(file.record(), seen_bytes=file.size_seen))
                file.seen_bytes = file.size_seen

    def _release(self, file: FollowedFile) -> None:
        """Let a file go that will not grow any more; should it grow after all, it is found again."""
        try:
            # First: what is written from here on makes it differ.
            stamp = file.stamp if file.content.compressed else file.content.stamp()
            rest = file.read_rest(self.max_line_bytes)
        except OSError as error:
            self._listing.complain(file.path, f"can't be read: {error.strerror}; trying again")
            return
        if rest is not None:
            self._rests.append(rest)
        file.seen_bytes, file.stamp = file.offset, stamp
        self.registry.update(file.record())
        self._let_go(file, watched_to_end=True)


def _new(found: Found, content: Content, head: Sample, position: int) -> NewFile:
    return NewFile(found.log, *found.identity, head, position, compressed=content.compressed)


def _by_age(part: Found) -> tuple[int, bool]:
    return part.status.st_mtime_ns, is_compressed_name(part.path)
