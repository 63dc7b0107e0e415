"""One stretch of one file on its way from bytes to batches: reading, mapping, sieving, encoding.

`next_block` blocks while it reads and unpacks; `take` only computes. The same for one process and for several, which is
why nothing here knows the ledger, the checkpoint or an endpoint. Never decides what a stretch is (`replay_plan`).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from metershipper.archive import Damaged
from metershipper.batcher import Batch, Batcher, Span
from metershipper.books import DEAD_LETTERS, Dead, Skip
from metershipper.content import TAIL_BYTES, open_content
from metershipper.events import Mapped
from metershipper.followed import Block, FollowedFile
from metershipper.mapper import Mapper
from metershipper.records import Sample, Stamp
from metershipper.scope import Scope, Sieve


@dataclass(frozen=True, slots=True)
class Task:
    """What to read. `stamp`: of the file when it was looked at; `passed`: what earlier replays took, from where to
    where; `may_end_torn`: its last line may lack its newline.
    """

    path: str
    file_id: int
    start: int
    end: int
    head: Sample
    stamp: Stamp
    scope: Scope
    passed: tuple[tuple[int, int, Scope], ...]
    may_end_torn: bool
    max_line_bytes: int


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one POST may carry."""

    max_events: int
    max_bytes: int


class Changed(Exception):
    """A file is not what it was when it was looked at."""


# What can go wrong with a file while it is read.
FAULTY_READING = (OSError, Changed, Damaged)


class Reading:
    """Reads one task to its end. Use as a context manager. Raises: one of FAULTY_READING."""

    def __init__(self, task: Task, mapper: Mapper, limits: BatchLimits) -> None:
        self._task = task
        self._mapper = mapper
        self._batcher = Batcher(limits.max_events, limits.max_bytes, 0.0)
        self._cuts = sorted({at for begin, stop, _ in task.passed for at in (begin, stop)} | {task.end})

    def __enter__(self) -> "Reading":
        task = self._task
        fd = os.open(task.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            content = open_content(fd)
            if content.stamp() != task.stamp and (content.compressed or content.state()[0] < task.end):
                raise Changed
            if Sample.of(content.pread(task.head.length, 0)) != task.head:
                raise Changed
            tail = content.tail(task.start)
        except BaseException:
            os.close(fd)
            raise
        self._file = FollowedFile(task.file_id, task.path, content, task.start, tail, task.head)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.content.close()

    def next_block(self) -> Block | None:
        """The next lines; None at the end of the task. Raises: Damaged, OSError, Changed."""
        file, task = self._file, self._task
        if file.offset >= task.end:
            return None
        if file.was_replaced():
            raise Changed
        try:
            block = file.read_block(task.max_line_bytes)
        except Damaged:
            if task.may_end_torn:
                raise  # it was whole when it was looked at
            return None
        if block is None and task.may_end_torn:
            block = file.read_rest(task.max_line_bytes)
            if block is None:
                raise Changed  # it was longer
        return block

    def map(self, block: Block) -> Iterator[tuple[Block, Mapped]]:
        """What the lines of a block become; in parts where it is not the same for all of them."""
        for part in self._parts(block):
            delivered = [scope for begin, stop, scope in self._task.passed if begin <= part.start_offset < stop]
            scope = self._task.scope
            sieve = Sieve(scope, delivered) if delivered or scope.canonical is not None else None
            mapped = self._mapper.map_block(part, sieve)
            if delivered and mapped.dead_letters:
                _leave_out_known(mapped)
            yield part, mapped

    def _parts(self, block: Block) -> Iterator[Block]:
        """A block, cut where an earlier replay began or ended; what is behind the task's end is left out."""
        start, before = block.start_offset, b""
        inside = [at for at in self._cuts if start < at < block.end_offset]
        if not inside or not block.data:
            yield block
            return
        if self._task.end in inside and not block.data[: self._task.end - start].endswith(b"\n"):
            raise Changed  # what was its last line was written on
        for at in (*inside, block.end_offset):
            data = block.data[start - block.start_offset : at - block.start_offset]
            # Not exact only for the first TAIL_BYTES of a block, whose tail is then shorter: no less true.
            before = (before + data)[-TAIL_BYTES:]
            yield Block(block.file_id, start, at, data, before, format=block.format)
            if at == self._task.end:
                return
            start = at

    def take(self, block: Block) -> tuple[list[Span], list[Batch]]:
        """Its spans, and the batches that became full."""
        spans: list[Span] = []
        for part, mapped in self.map(block):
            span = Span.of(part.file_id, part.end_offset, part.tail, mapped, part.start_offset)
            self._batcher.add(span, mapped.events, 0.0)
            spans.append(span)
        return spans, self._full()

    def _full(self) -> list[Batch]:
        return self._batcher.take_due(-1.0)  # before any age: only what is full

    def rest(self) -> list[Batch]:
        """What was not enough for a full batch."""
        return self._batcher.take_due(0.0, all_of_it=True)


def _leave_out_known(mapped: Mapped) -> None:
    """Lines that nobody could bill are dead letters since an earlier replay passed over them, whatever it took.

    But not those whose entry was in no earlier scope: what is in them was looked at only now.
    """
    kept = [letter for letter in mapped.dead_letters if letter.reason is Dead.BAD_TOKEN_COUNT]
    for letter in mapped.dead_letters:
        if letter.reason is not Dead.BAD_TOKEN_COUNT:
            mapped.books[DEAD_LETTERS + letter.reason] -= 1
            mapped.books.skip(Skip.ALREADY_DELIVERED)
    mapped.dead_letters = kept
