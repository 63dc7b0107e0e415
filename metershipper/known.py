"""What is known of files that are not open: where their content was last seen, and how far it was read.

Owns the records, and with them every call of the registry but those of an open file. Opens nothing: content is handed
in. A record follows its content, not a name: through renames, copies, remounts and compression.
"""

import fnmatch
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from metershipper.config import FileInput
from metershipper.content import Content
from metershipper.followed import FollowedFile
from metershipper.listing import Found
from metershipper.losses import GapBook, Losses
from metershipper.records import Identity, Lost, NewFile, Sample, Stamp, StoredFile

# Files that are gone for good are forgotten; not at once, as a volume may be mounted later than this is started.
FORGET_FIRST_SECONDS, FORGET_EVERY_SECONDS = 3600.0, 86400.0


class Registry(GapBook, Protocol):
    """What is durable about files; the checkpoint's part for this module."""

    @property
    def starts_over(self) -> bool: ...
    def started_over(self) -> None: ...
    def files(self) -> list[StoredFile]: ...
    def inputs(self) -> set[str]: ...
    def register(self, files: Sequence[NewFile], inputs: Iterable[str] = ()) -> list[int]: ...
    def update(self, file: StoredFile) -> None: ...
    def forget(self, present: Collection[int], now: float) -> list[int]: ...
    def replayed(self, head: Sample) -> list[StoredFile]: ...
    def take_over(self, file: StoredFile) -> bool: ...
    @property
    def replay_is_running(self) -> bool: ...


def stamp_of(found: Found) -> Stamp:
    """The stamp of a file as it was seen in its directory."""
    return Stamp(found.status.st_size, found.status.st_mtime_ns)


@dataclass(slots=True)
class KnownFiles:
    """The records of all files that are not open. `clock` is monotonic, in seconds."""

    inputs: Sequence[FileInput]
    registry: Registry
    clock: Callable[[], float]
    known_inputs: set[str] = field(default_factory=set)  # followed before
    known_logs: dict[str, str | None] = field(default_factory=dict)  # followed before; the input that names each now
    starts_over: bool = False
    losses: Losses = field(init=False)
    _records: dict[Identity, StoredFile] = field(default_factory=dict)
    _superseded: list[StoredFile] = field(default_factory=list)  # of content that is not where it was read
    _present: dict[str, set[int]] = field(default_factory=dict)  # by directory: files whose content is there
    _passed_over: dict[Identity, tuple[Stamp, int | None]] = field(default_factory=dict)  # and what it is a copy of
    _watched_to_end: set[int] = field(default_factory=set)
    _damaged: dict[int, StoredFile] = field(
        default_factory=dict
    )  # what does not unpack any further, and how far it did
    _forget_at: float | None = None

    def __post_init__(self) -> None:
        self.losses = Losses(self.registry, self.clock, time.time)

    def load(self) -> None:
        """Read what is durable."""
        for record in self.registry.files():
            if record.identity is None:
                self._superseded.append(record)
            else:
                self._records[record.identity] = record
        followed = {record.path for record in self.records() if not record.history}
        self.known_logs = {path: self._input_of(path) for path in followed}
        self.known_inputs = self.registry.inputs()
        self.starts_over = self.registry.starts_over
        self.losses.load()

    def records(self) -> list[StoredFile]:
        """All of them."""
        return [*self._records.values(), *self._superseded]

    def at(self, identity: Identity) -> StoredFile | None:
        """What was last read under this device and inode."""
        return self._records.get(identity)

    def log_of(self, identity: Identity) -> str | None:
        """The log that the file of this device and inode is a part of."""
        record = self._records.get(identity)
        return None if record is None else record.path

    def is_known(self, found: Found) -> bool:
        """Whether the log of this file was followed before, so that its rotated files are no history."""
        return self.starts_over or found.input in self.known_inputs or found.log in self.known_logs

    def _input_of(self, path: str) -> str | None:
        return next((entry.path for entry in self.inputs if fnmatch.fnmatchcase(path, entry.path)), None)

    # Knowing content again

    def moved(self, content: Content, head: Sample, in_place: Callable[[StoredFile], bool]) -> StoredFile | None:
        """The record of this very content, which was read under another device or inode, and is not `in_place` there.

        A remount, a restored volume, a compressed file, or a copy that was made before the log was truncated.
        """
        if not head.length:
            return None
        records = sorted(
            (record for record in self.records() if record.head == head), key=lambda each: each.position, reverse=True
        )
        absent = (record for record in records if not self._is_there(record) and not in_place(record))
        return next((record for record in absent if content.holds(record)), None)

    def watched(self, content: Content, head: Sample) -> StoredFile | None:
        """The file that this one was compressed from while it was open here, and that was read to its end.

        It can't hold more than that, so it need not be unpacked; unless it says of itself that it does.
        """
        if not content.compressed or not head.length:
            return None
        records = [record for record in self._records.values() if record.head == head and self.is_watched(record)]
        return next((each for each in records if not self._is_there(each) and content.may_be(each.position)), None)

    def is_watched(self, record: StoredFile) -> bool:
        """Whether a file was open here until it was complete and had no name any more."""
        return record.file_id in self._watched_to_end

    def copied(self, content: Content, head: Sample, *, with_history: bool, but: Identity) -> StoredFile | None:
        """The file, of those that are not open, that this one is a copy of, or the beginning of one.

        Args: `but`, the file itself; `with_history`, whether a copy of what was never read is one, too.
        """
        records = [r for r in self._records.values() if r.head == head and r.identity != but]
        records = [record for record in records if with_history or not record.history]
        records.sort(key=lambda record: record.position, reverse=True)
        whole = (record for record in records if content.holds(record))
        begun = (record for record in records if content.state()[0] < record.position)
        return next(whole, None) or next(begun, None)

    def replayed(self, content: Content, head: Sample) -> tuple[StoredFile | None, frozenset[int]]:
        """What `replay` read of this content, the furthest; and the ids of all that it read of content that begins so.

        Looked up anew each time, as it may be at work at the moment; that is only where something is not known here.
        """
        found = self.registry.replayed(head) if head.length else []
        held = (record for record in found if content.holds(record))
        furthest = max(held, key=lambda record: record.position, default=None)
        return furthest, frozenset(record.file_id for record in found)

    # Where content is

    def listed(self, directories: Iterable[str]) -> None:
        """These directories were listed anew: what is there is told next."""
        self._present |= {directory: set() for directory in directories}

    def mark_present(self, found: Found, file_id: int) -> None:
        """The content of a file is where it was `found`."""
        self._present.setdefault(found.directory, set()).add(file_id)

    def holds_parts(self, directory: str) -> bool:
        """Whether known content was found there."""
        return bool(self._present.get(directory))

    def _is_there(self, record: StoredFile) -> bool:
        return any(record.file_id in there for there in self._present.values())

    def is_settled(self, found: Found, open_ids: Collection[int]) -> bool:
        """Whether a file need not be opened: it is unchanged since it was read to its end, or passed over."""
        record, stamp = self._records.get(found.identity), stamp_of(found)
        if record is not None and record.is_complete and record.stamp == stamp:
            self.mark_present(found, record.file_id)
            return True
        if found.identity not in self._passed_over or self._passed_over[found.identity][0] != stamp:
            return False
        original = self._passed_over[found.identity][1]
        if record is not None:
            self.mark_present(found, record.file_id)
        return original is None or original in open_ids or any(original in there for there in self._present.values())

    def pass_over(self, identity: Identity, stamp: Stamp, copy_of: int | None = None) -> None:
        """Do not open a file again before it changes, or before the file that it is a copy of is gone."""
        self._passed_over[identity] = stamp, copy_of

    def reconsider_copies_of(self, file_id: int) -> None:
        """A file lost its name: what was passed over as its copy may be what is left of it."""
        self._passed_over = {key: each for key, each in self._passed_over.items() if each[1] != file_id}

    # Recording

    def record(self, new: NewFile, stamp: Stamp | None = None) -> StoredFile:
        """Record a file met for the first time; with its `stamp` where it need not be opened while it has that."""
        old = self._records.get((new.device, new.inode))
        (file_id,) = self.registry.register([replace(new, supersedes=old.file_id if old else None)])
        if old is not None:
            self._supersede_stored(old)
        place = new.path, new.device, new.inode
        record = StoredFile(file_id, *place, new.head, Sample(), new.position, new.history, new.compressed)
        record = replace(record, stamp=stamp)
        self._records[new.device, new.inode] = record
        return record

    def supersede(self, record: StoredFile) -> None:
        """Other content took the place of this file."""
        self._superseded.append(replace(record, device=None, inode=None))

    def _supersede_stored(self, record: StoredFile) -> None:
        if record.is_blank:  # what is in its place is what became of it
            record = replace(record, device=None, inode=None, seen_bytes=0)
            self.registry.update(record)
        self.supersede(record)

    def explain_blank(self, log: str) -> None:
        """A rotated file of this log was found: it is what became of a file that was empty when it was last seen."""
        for record in self.records():
            if record.path == log and record.is_blank and not record.is_complete and not self._is_there(record):
                self.taken(record)
                self._supersede_stored(record)

    def resume(self, found: Found, content: Content, record: StoredFile) -> None:
        """The file is opened again, here."""
        self.losses.found(record)  # first: should it fail, nothing has changed
        device, inode = found.identity
        now = replace(record, path=found.log, device=device, inode=inode, compressed=content.compressed, history=False)
        if now != record:
            self._moved_to(now, record)
        else:
            self.taken(record)

    def taken(self, record: StoredFile) -> None:
        """The file is open from now on."""
        there = self._records.get(record.identity) if record.identity is not None else None
        if there is not None and there.file_id == record.file_id:
            del self._records[there.identity or (0, 0)]
        self._superseded = [known for known in self._superseded if known.file_id != record.file_id]
        self._damaged.pop(record.file_id, None)
        self._watched_to_end.discard(record.file_id)

    def _moved_to(self, now: StoredFile, before: StoredFile) -> None:
        """A record's content is elsewhere than before; what was known of that place is other content."""
        self.registry.update(now)
        self.taken(before)
        if now.identity is not None and now.identity in self._records:
            self.supersede(self._records.pop(now.identity))

    def complete(self, found: Found, content: Content, record: StoredFile) -> None:
        """The file holds what was read of a record and nothing more: it need not be opened while it is unchanged."""
        device, inode = found.identity
        now = replace(record, path=found.log, device=device, inode=inode, compressed=content.compressed)
        now = replace(now, seen_bytes=record.position, stamp=stamp_of(found))
        self.losses.found(now, complete=True)
        self._moved_to(now, record)
        self._records[found.identity] = now
        if not now.history:
            self.known_logs[found.log] = found.input
        self.mark_present(found, record.file_id)

    def let_go(self, file: FollowedFile, *, watched_to_end: bool = False) -> None:
        """An open file was closed."""
        self._records[file.identity] = file.record()
        if watched_to_end:
            self._watched_to_end.add(file.file_id)

    def give_up(self, file: FollowedFile) -> None:
        """A compressed file can't be read behind where it was read to; it is let go next."""
        if file.stamp is not None:
            self.pass_over(file.identity, file.stamp)
        self._damaged[file.file_id] = replace(file.record(), path=file.found_at)

    def remember_inputs(self, failed_for: Callable[[str], bool]) -> None:
        """The inputs were looked through, but for those that this `failed_for`."""
        paths = [entry.path for entry in self.inputs if not failed_for(entry.path)]
        new_inputs = [path for path in paths if path not in self.known_inputs]
        if new_inputs:
            self.registry.register([], new_inputs)
            self.known_inputs.update(new_inputs)
        if self.starts_over and len(paths) == len(self.inputs):
            self.registry.started_over()
            self.starts_over = False

    # What is gone

    def judge(self, logs: Mapping[Identity, Found], *, listed: bool) -> None:
        """Tell `losses` what is missing. Only of inputs that name some file now: a volume may be mounted late.

        Args: `listed`, whether a directory was listed; if not there can only be news of what is waited for.
        """
        if not listed and not self.losses.is_waiting and not self._damaged:
            return
        active = {found.input for found in logs.values()}
        missing = [
            (record, Lost.TRUNCATED if record.identity is None else Lost.VANISHED)
            for record in self.records()
            if not record.is_complete and record.file_id not in self._damaged and not self._is_there(record)
            if self._input_of(record.path) in active
        ]
        self.losses.missing([*missing, *((record, Lost.DAMAGED) for record in self._damaged.values())])

    def forget(self, open_ids: Collection[int]) -> None:
        """Once a day, drop what is gone for good; see `Checkpoint.forget`."""
        now = self.clock()
        if self._forget_at is None:
            self._forget_at = now + FORGET_FIRST_SECONDS
        if now < self._forget_at:
            return
        self._forget_at = now + FORGET_EVERY_SECONDS
        # What no input names at the moment was not looked for: that is not being gone.
        unlisted = {record.file_id for record in self.records() if self._input_of(record.path) is None}
        present = unlisted.union(open_ids, *self._present.values())
        gone = set(self.registry.forget(present, time.time()))
        if gone:
            self._records = {key: record for key, record in self._records.items() if record.file_id not in gone}
            self._superseded = [record for record in self._superseded if record.file_id not in gone]
            self._watched_to_end -= gone
