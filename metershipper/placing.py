"""Opening what was found: whether it is content that is known, a copy of it, or new, and where to read on in it.

Blocks while it reads. Owns the decision alone: what stands on the disk is told by `listing`, what is known by `known`,
what a file holds by `content`. Never reads a line for its own sake.
"""

import glob
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from metershipper.config import FileInput
from metershipper.content import Content, end_of_lines, open_content
from metershipper.file_table import ReplayedMeanwhile
from metershipper.followed import FollowedFile
from metershipper.known import KnownFiles, Registry, stamp_of
from metershipper.lineages import Lineages
from metershipper.listing import Found, Listing
from metershipper.records import Identity, NewFile, Sample, Stamp, StoredFile
from metershipper.rotation import is_compressed_name

log = logging.getLogger("metershipper.tailer")

_HISTORY = (
    "rotated before its log was first followed, so it is not read; "
    "to bill it too, list it as an input, or `metershipper replay` it"
)

Logs = Mapping[Identity, Found]


@dataclass(slots=True)
class _Opened:
    """Content that is closed again unless it is `kept`."""

    content: Content
    kept: bool = False


@dataclass(slots=True)
class Placing:
    """Opens files and puts them among the open ones. `clock` is monotonic; `wait_seconds`: see `_is_begun`."""

    inputs: Sequence[FileInput]
    registry: Registry
    clock: Callable[[], float]
    wait_seconds: float
    listing: Listing
    known: KnownFiles
    lineages: Lineages
    _begun: dict[Identity, tuple[Stamp, float]] = field(default_factory=dict)  # parts without a whole line: since when

    def logs_to_look_for(self, logs: Logs) -> dict[str, str]:
        """The logs whose rotated parts are of interest, and the inputs that name them."""
        wanted = {path: named_by for path, named_by in self.known.known_logs.items() if named_by is not None}
        wanted |= {entry.path: entry.path for entry in self.inputs if not glob.has_magic(entry.path)}
        return wanted | {found.log: found.input for found in logs.values()}

    def recognise(self, found: Iterable[Found]) -> None:
        """Know a log again whose path changed, by any part of it: what was rotated beside it is no history."""
        followed = self.lineages.ids()
        strange = [each for each in found if not self.known.is_known(each) and each.identity not in followed]
        if not strange:
            return  # as ever but for a start: nothing is worth going through all records for
        heads = {record.head for record in self.known.records() if record.head.length and not record.history}
        for each in strange if heads else ():
            with self._opened(each) as opened:
                if opened is not None and opened.content.head() in heads:
                    self.known.known_logs[each.log] = each.input

    def open_parts(self, parts: Mapping[str, list[Found]], compressed: Iterable[Found], logs: Logs) -> None:
        """Open what is rotated and holds more to read.

        First what is still where it was: what holds the same content elsewhere is a copy then. Of those the oldest
        first, and a file before what it was compressed to.
        """
        found = {part.identity: part for directory in parts.values() for part in directory}
        found |= {part.identity: part for part in compressed if part.directory in parts}
        self.known.listed(parts)
        followed = self.lineages.ids()
        for part in sorted(found.values(), key=self._known_and_oldest_first):
            if part.identity in followed:
                self.known.mark_present(part, followed[part.identity])
            elif part.identity in logs or self.known.is_settled(part, followed.values()):
                continue
            elif self._open(part, logs, self._place_part):
                followed = self.lineages.ids()

    def open_logs(self, logs: Logs) -> None:
        """Open the logs that are not open yet."""
        followed = self.lineages.ids()
        for found in sorted(logs.values(), key=lambda each: self.known.at(each.identity) is None):
            if found.identity in followed or (found.whole and self.known.is_settled(found, followed.values())):
                continue
            self._open(found, logs, self._place_log)

    def _known_and_oldest_first(self, part: Found) -> tuple[bool, int, bool]:
        unknown = self.known.at(part.identity) is None
        return unknown, part.status.st_mtime_ns, is_compressed_name(part.path)

    # Opening

    def _open(self, found: Found, logs: Logs, place: "Callable[[_Opened, Found, Logs], None]") -> bool:
        """Whether the file is among the open ones from now on."""
        with self._opened(found) as opened:
            if opened is not None:
                place(opened, found, logs)
        return opened is not None and opened.kept

    @contextmanager
    def _opened(self, found: Found) -> Iterator[_Opened | None]:
        """The file's content; None when it can't be opened. It is closed again unless it was kept."""
        try:
            fd = os.open(found.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            self.listing.complain(found.path, f"can't be opened: {error.strerror}; trying again")
            yield None
            return
        opened = None
        try:
            opened = self._content_of(fd, found)
            yield opened
            if opened is not None:
                self.listing.forgive(found.path)
        except OSError as error:
            self.listing.complain(found.path, f"can't be read: {error.strerror}; trying again")
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
            self.listing.complain(found.path, f"can't be read: {error.strerror}; trying again")
            return None

    # Rotated parts

    def _place_part(self, opened: _Opened, found: Found, logs: Logs) -> None:
        content = opened.content
        record, head = self.known.at(found.identity), content.head()
        if record is not None and (record.is_blank or not content.holds(record)):
            record = None
        known = record or self.known.watched(content, head) or self._moved(content, head, logs)
        if known is None:
            self._place_unseen(opened, found, head, logs)
        elif known.history and found.listed and not found.from_end:
            self._follow_new(opened, found, _new(found, content, head, 0), rotated=True)
        elif (
            (known.history and (content.compressed or found.from_end))
            or self.known.is_watched(known)
            or not content.has_more_than(known.position)
        ):
            self.known.complete(found, content, known)
        else:
            self._resume(opened, found, known, rotated=True)

    def _place_unseen(self, opened: _Opened, found: Found, head: Sample, logs: Logs) -> None:
        content, record = opened.content, self.known.at(found.identity)
        was_blank = record is not None and record.is_blank  # of our own log, when it was last seen
        if not found.status.st_size or not found.named:
            return
        if not self.known.is_known(found) and (found.from_end or not found.listed):
            # There before its log was ever looked for: whether it was billed before, only a replay may know.
            if self.known.replayed(content, head)[0] is None:
                log.warning("%s: %s", found.path, _HISTORY)
            size = 0 if content.compressed else found.status.st_size
            self.known.record(replace(_new(found, content, head, size), path=found.path, history=True), stamp_of(found))
        elif not head.length and not was_blank and self._is_begun(found):
            return
        elif (position := self._copied_up_to(content, found, head, logs)) is None:
            log.info("%s: a copy of content that is followed already; it is not read", found.path)
        elif found.beneath and not was_blank and not self.known.holds_parts(found.directory):
            self.listing.complain(found.path, f"may be a part of {found.log}; it is not read", failed=False)
        else:
            log.info("%s: rotated before it was seen", found.path)
            self.known.explain_blank(found.log)
            self._follow_new(opened, found, _new(found, content, head, position), rotated=True)

    def _is_begun(self, found: Found) -> bool:
        """Whether a file without a whole line may be a copy that was just begun: its content can't be known yet."""
        stamp, since = self._begun.get(found.identity, (None, 0.0))
        if stamp != stamp_of(found):
            self._begun[found.identity] = stamp_of(found), self.clock()
            return True
        return self.clock() - since < self.wait_seconds

    def _copied_up_to(self, content: Content, found: Found, head: Sample, logs: Logs) -> int | None:
        """Up to where a file holds what another known one holds: 0 for new content, None when that is all."""
        if not head.length:
            return 0
        twin = next((file for file in self.lineages if file.head == head and _is_copy(content, file)), None)
        if twin is not None:
            end = max(twin.size_seen, twin.content.state()[0])
            goes_on = not content.compressed and content.has_more_than(end) and _continues(content, twin, end)
            if not goes_on or not twin.rotated or not twin.is_read:
                self.known.pass_over(found.identity, stamp_of(found), twin.file_id)
                return None
            return twin.offset  # the end of its last whole line: what it has of the next one is only a beginning
        known = self.known.copied(content, head, with_history=not found.listed, but=found.identity)
        if known is None:
            return 0
        is_log = known.identity in logs  # opened next, or as soon as it can be
        if not is_log and not known.history and content.holds(known) and content.has_more_than(known.position):
            return known.position
        self.known.pass_over(found.identity, stamp_of(found), known.file_id)
        return None

    # Logs

    def _place_log(self, opened: _Opened, found: Found, logs: Logs) -> None:
        content, record = opened.content, self.known.at(found.identity)
        if content.compressed:
            self.listing.complain(found.path, "compressed, so it is not followed", failed=False)
            return
        passed_over = record is not None and record.history  # so far, and an input of its own now
        if record is not None and not passed_over and content.holds(record):
            self._resume(opened, found, record)
            return
        head = content.head()
        moved = None if passed_over else self._moved(content, head, logs)
        if moved is not None:
            self._resume(opened, found, moved)
            return
        if self._take_over(opened, found, head):
            return
        position = 0
        if found.whole is not None:
            copied_up_to = self._copied_up_to(content, found, head, logs)
            if copied_up_to is None:
                return
            position = copied_up_to
        if record is not None and not passed_over and not record.is_blank:
            log.warning("%s: holds other content than when it was last read; reading it from its beginning", found.path)
        if found.from_end and not self.known.starts_over and found.log not in self.known.known_logs:
            position = end_of_lines(content)
        self._follow_new(opened, found, _new(found, content, head, position))

    def _take_over(self, opened: _Opened, found: Found, head: Sample) -> bool:
        """Go on in a new file with the content of one that is open and has no name any more: a remount, a rewrite."""
        for file in self.lineages.of(found.log):
            alike = file.rotated and head.length and file.head == head and opened.content.holds(file.record())
            if alike and not file.has_a_name():
                log.info("%s: the same content in another file; following that from %d", found.path, file.offset)
                device, inode = found.identity
                self.registry.update(replace(file.record(), device=device, inode=inode, seen_bytes=None))
                file.content.close()
                file.go_on_in(opened.content)
                opened.kept = True
                return True
        return False

    # What both have in common

    def _moved(self, content: Content, head: Sample, logs: Logs) -> StoredFile | None:
        return self.known.moved(content, head, lambda record: self._is_in_place(record, logs))

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
        self.known.resume(found, opened.content, record)
        file = FollowedFile(record.file_id, found.log, opened.content, record.position, tail, record.head, rotated)
        file.seen_bytes = record.seen_bytes
        self._follow(opened, found, file)

    def _follow_new(self, opened: _Opened, found: Found, new: NewFile, *, rotated: bool = False) -> None:
        """Follow content that `run` does not know; what `replay` delivered of it is not read again."""
        replayed, known_replays = self.known.replayed(opened.content, new.head)
        is_left_out = found.from_end and new.position  # whoever reads what is before
        if replayed is not None and not is_left_out and replayed.position >= new.position:
            self._follow_replayed(opened, found, replayed, rotated=rotated)
            return
        tail = opened.content.tail(new.position)
        try:
            record = self.known.record(replace(new, known_replays=known_replays))
        except ReplayedMeanwhile:
            return  # the next look sees it
        log.info("%s: following from byte %d", found.path, new.position)
        self.known.taken(record)
        file = FollowedFile(record.file_id, found.log, opened.content, new.position, tail, new.head, rotated)
        self._follow(opened, found, file)

    def _follow_replayed(self, opened: _Opened, found: Found, replayed: StoredFile, *, rotated: bool) -> None:
        """Take over what `replay` delivered; while it does, it is left alone, and looked at again."""
        if replayed.replaying is not None and self.registry.replay_is_running:
            self.listing.complain(found.path, "is being replayed; followed as soon as that is done", failed=False)
            self.listing.look_again()
            return
        if not self.registry.take_over(replayed):
            self.listing.look_again()
            return
        self.known.supersede(replayed)  # from here on it is known: should what follows fail, it is tried again
        if rotated and not opened.content.has_more_than(replayed.position):
            log.info("%s: was replayed; it is not read again", found.path)
            self.known.complete(found, opened.content, replayed)
        else:
            self._resume(opened, found, replayed, rotated=rotated)

    def _follow(self, opened: _Opened, found: Found, file: FollowedFile) -> None:
        opened.kept = True
        file.active_at = file.rotated_at = self.clock()
        file.found_at, file.stamp = found.path, stamp_of(found)
        file.format = next(entry.format for entry in self.inputs if entry.path == found.input)
        file.size_bytes = 0 if opened.content.compressed else found.status.st_size
        self.known.known_logs[found.log] = found.input
        self.known.mark_present(found, file.file_id)
        self.lineages.add(file)


def _new(found: Found, content: Content, head: Sample, position: int) -> NewFile:
    return NewFile(found.log, *found.identity, head, position, compressed=content.compressed)


def _is_copy(content: Content, file: FollowedFile) -> bool:
    """Whether a file holds what an open one with the same head holds, as far as that was read, or its beginning."""
    if content.compressed and not file.content.compressed and content.may_be(file.size_seen):
        return True  # compressed from what is open here; it is not unpacked to see that
    size = content.state()[0]
    return content.holds(file.record()) or (size < file.offset and _continues(content, file, size))


def _continues(content: Content, file: FollowedFile, end: int) -> bool:
    """Whether a file holds what an open one holds just before `end`."""
    return content.tail(end) == file.content.tail(end)
