"""The files that are followed: reading them in turn, noticing what happens to them, and letting them go.

All of this blocks; `tailer` calls it off the event loop. Owns the open files, whose read offsets run ahead of the
checkpoint's positions. What is opened, and where it is read on, is decided by `placing`. Never parses a line and never
decides what is settled.

A file is known by device and inode, and its content by its samples. Content that no longer matches is other content:
it gets a new record and is read from its beginning, while what was read of the old one settles under the old record.
"""

import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from metershipper.archive import Damaged
from metershipper.config import FileInput
from metershipper.followed import Block, FollowedFile
from metershipper.known import KnownFiles, Registry
from metershipper.lineages import Lineages
from metershipper.lines import MAX_LINE_BYTES
from metershipper.listing import Listing
from metershipper.placing import Logs, Placing
from metershipper.records import NewFile

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
_STILL_WRITTEN = (
    "%s: Kong still writes to the file that was rotated away. Everything is read, but the new file stays empty and the "
    "old one keeps its disk space: set reopen = true in Kong's file-log plugin (its default is false)"
)


@dataclass(slots=True)
class FileSet:
    """All followed files of all inputs. `clock` is monotonic, in seconds. Methods may be called from any thread."""

    inputs: Sequence[FileInput]
    registry: Registry
    clock: Callable[[], float]
    max_line_bytes: int = MAX_LINE_BYTES
    rotated_idle_seconds: float = ROTATED_IDLE_SECONDS
    _lineages: Lineages = field(default_factory=Lineages)
    _listing: Listing = field(init=False)
    _known: KnownFiles = field(init=False)
    _placing: Placing = field(init=False)
    _warned: set[str] = field(default_factory=set)  # logs whose rotated file is still written
    _rests: deque[Block] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._listing = Listing(self.inputs, self.clock)
        self._known = KnownFiles(self.inputs, self.registry, self.clock)
        wait = self.rotated_idle_seconds
        self._placing = Placing(
            self.inputs, self.registry, self.clock, wait, self._listing, self._known, self._lineages
        )

    def load(self) -> None:
        """Read what is durable. Call once, before `scan`."""
        self._known.load()

    def followed(self) -> list[FollowedFile]:
        """The open files."""
        return list(self._lineages)

    def close(self) -> None:
        """Let all files go, once nobody reads them."""
        with self._lock:
            for file in self._lineages:
                file.content.close()
            self._lineages.clear()

    def directories(self) -> set[str]:
        """Existing directories in which a followed log changes, or a configured one may appear."""
        paths = self._lineages.logs() | {entry.path for entry in self.inputs}
        return set(filter(os.path.isdir, {os.path.dirname(path) or "." for path in paths}))

    # Reading

    def next_block(self) -> Block | None:
        """Whole lines of the next file that has some, the logs in turn, of each log the oldest file first."""
        with self._lock:
            if self._rests:
                return self._rests.popleft()
            for file in self._lineages.in_turn():
                block = self._read(file)
                if block is not None:
                    self._lineages.had_its_turn(file)
                    return block
            return None

    def _read(self, file: FollowedFile) -> Block | None:
        size = file.size_seen
        try:
            if not self._is_known(file):
                return None
            block = file.read_block(self.max_line_bytes)
        except OSError as error:
            self._fail(file, error)
            return None
        except Damaged as damaged:
            self._give_up(file, damaged)
            return None
        self._notice_growth(file, size, grew=block is not None)
        return block

    def _is_known(self, file: FollowedFile) -> bool:
        """Whether it can be told what the file holds: what was read of it, other content from now on, or neither."""
        if file.was_replaced():
            if file.shrank() and not self._waited_for_size(file):
                return False
            self._begin_again(file)
        file.shrunk_at = None
        if not file.head.length:
            self._identify(file)
        return True

    def _notice_growth(self, file: FollowedFile, size: int, *, grew: bool = False) -> None:
        if not grew and file.size_seen == size:
            return
        file.active_at = self.clock()
        if file.came_to_rest and file.path not in self._warned:
            self._warned.add(file.path)
            log.warning(_STILL_WRITTEN, file.path)

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

    def _fail(self, file: FollowedFile, error: OSError) -> None:
        self._listing.complain(file.path, f"can't be read: {error.strerror}; trying again")
        if error.errno == errno.ESTALE:  # of a network file system: the next look opens it by its name
            self._let_go(file)

    def _give_up(self, file: FollowedFile, damaged: Damaged) -> None:
        """A compressed file does not unpack any further. Should it change, it is tried again."""
        log.warning("%s: does not unpack behind byte %d of its content (%s)", file.found_at, file.offset, damaged)
        self._known.give_up(file)
        self._let_go(file)

    def _let_go(self, file: FollowedFile, *, watched_to_end: bool = False) -> None:
        self._known.let_go(file, watched_to_end=watched_to_end)
        self._lineages.remove(file)
        file.content.close()

    # Looking around

    def scan(self) -> None:
        """Look for new, renamed, rotated and released files; open what holds something to read."""
        with self._lock:
            self._listing.failures.clear()
            logs, compressed = self._listing.logs(self._known.known_inputs)
            self._notice_renames(logs)
            for file in self._lineages:
                self._look_at(file)
            parts = self._listing.beside(self._placing.logs_to_look_for(logs), self._known.log_of)
            self._placing.recognise([*logs.values(), *(part for found in parts.values() for part in found)])
            self._placing.open_parts(parts, compressed, logs)
            self._placing.open_logs(logs)
            self._known.remember_inputs(self._listing.failed_for)
            if not self._listing.failures:
                self._known.judge(logs, listed=bool(parts))
                self._known.forget(self._lineages.ids().values())

    def _notice_renames(self, logs: Logs) -> None:
        for file in self._lineages:
            found = logs.get(file.identity)
            if found is None and self._listing.failed_for(file.path) and file.has_a_name():
                continue  # where it is now is not known
            if found is None and not file.rotated:
                file.rotated, file.rotated_at, file.active_at = True, self.clock(), self.clock()
                gone = "rotated away"
                if not file.has_a_name():
                    gone = "deleted"
                    self._known.reconsider_copies_of(file.file_id)
                    self._listing.look_again()
                log.info("%s: %s; its rest is read first, from byte %d", file.path, gone, file.offset)
            elif found is not None and (file.rotated or file.path != found.log):
                self.registry.update(replace(file.record(), path=found.log, seen_bytes=None))
                self._lineages.remove(file)
                file.path, file.rotated, file.came_to_rest, file.seen_bytes = found.log, False, False, None
                self._lineages.add(file)

    def _look_at(self, file: FollowedFile) -> None:
        """Also while nothing is read, as in an outage, know what there is: should it vanish, it can be told."""
        size = file.size_seen
        try:
            if not self._is_known(file):
                return
            at_its_end = file.rotated and file.is_read and not file.grew()
        except OSError as error:
            self._fail(file, error)
            return
        self._notice_growth(file, size)
        if at_its_end:
            self._note_end(file)

    def _note_end(self, file: FollowedFile) -> None:
        """A rotated file is read to its end: let it go once it was quiet for long enough."""
        now = self.clock()
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
            self._fail(file, error)
            return
        if rest is not None:
            self._rests.append(rest)
        file.seen_bytes, file.stamp = file.offset, stamp
        self.registry.update(file.record())
        self._known.losses.found(file.record(), complete=True)
        self._let_go(file, watched_to_end=not file.content.compressed and not file.has_a_name())
