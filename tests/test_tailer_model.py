"""A model of everything that can happen to a log, in any order: no line is lost, none is counted twice.

Files, checkpoint and ledger are real; the mapper and the endpoint are not there: a span is settled when the test says
so. Every line is a number, so that the model knows which lines were written, read, settled and committed.
"""

import os
import shutil
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from metershipper import content, followed
from metershipper.batcher import Batch, Span
from metershipper.books import Books, Count
from metershipper.checkpoint import Checkpoint
from metershipper.config import FileInput
from metershipper.files import ROTATED_IDLE_SECONDS, FileSet
from metershipper.ledger import Ledger
from metershipper.listing import LISTING_SECONDS
from metershipper.state import make_private_directory


class LogModel(RuleBasedStateMachine):
    """One log, its writer, its rotation, and a follower that crashes now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.cleanup = ExitStack()
        root = Path(self.cleanup.enter_context(tempfile.TemporaryDirectory()))
        self.logs, self.state = root / "logs", root / "state"
        self.logs.mkdir()
        make_private_directory(self.state)
        self.log = self.logs / "usage.log"
        self.writer: int | None = None  # Kong's descriptor
        self.partial = b""  # what of a begun line is still to be written
        self.written: list[int] = []
        self.now = self.mtime = 1000
        self.reads: Counter[int] = Counter()
        self.read_in_this_life: set[int] = set()
        self.spans: list[tuple[Span, list[int]]] = []  # read and not committed, in the order of reading
        self.committed: list[int] = []
        self.crashes = 0
        self._reopen()
        self.files.scan()

    # Kong

    def _write(self, data: bytes) -> None:
        if self.writer is None:
            self.writer = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(self.writer, data)
        self._touch()

    def _touch(self) -> None:
        """A modification time of its own for each change, however coarse the clock of the file system is."""
        self.mtime += 1
        assert self.writer is not None
        os.utime(self.writer, (self.mtime, self.mtime))

    def _next_line(self) -> bytes:
        number = self.written[-1] + 1 if self.written else 0
        self.written.append(number)
        return b"%d %s\n" % (number, b"x" * (number * 7 % 41))

    @precondition(lambda self: not self.partial)
    @rule(count=st.integers(1, 12))
    def write_lines(self, count: int) -> None:
        self._write(b"".join(self._next_line() for _ in range(count)))

    @precondition(lambda self: not self.partial)
    @rule()
    def begin_a_line(self) -> None:
        line = self._next_line()
        self._write(line[: len(line) // 2])
        self.partial = line[len(line) // 2 :]

    @precondition(lambda self: self.partial)
    @rule()
    def finish_the_line(self) -> None:
        self._write(self.partial)
        self.partial = b""

    # Rotation

    def _shift(self) -> Path:
        """Make room for a new usage.log.1."""
        for number in sorted((int(path.suffix[1:]) for path in self.logs.glob("usage.log.*")), reverse=True):
            Path(f"{self.log}.{number}").rename(f"{self.log}.{number + 1}")
        return Path(f"{self.log}.1")

    def _close_writer(self) -> None:
        if self.writer is not None:
            os.close(self.writer)
        self.writer = None

    def _everything_was_read(self) -> bool:
        return not self.partial and set(self.written) == set(self.reads)

    def _writes_to_the_log(self) -> bool:
        """Whether the writer's file still has the log's name."""
        if self.writer is None or not self.log.exists():
            return False
        return os.path.samestat(os.fstat(self.writer), self.log.stat())

    @precondition(lambda self: self.log.exists() and not self.partial)
    @rule(create=st.booleans())
    def rotate(self, create: bool) -> None:
        self.log.rename(self._shift())
        self._close_writer()
        if create:
            self._write(b"")

    @precondition(lambda self: self._writes_to_the_log())
    @rule(create=st.booleans())
    def rotate_and_stay_on_the_old_file(self, create: bool) -> None:
        """Kong with `reopen = false`."""
        self.log.rename(self._shift())
        if create:
            self.log.touch()

    @precondition(lambda self: not self.partial)
    @rule()
    def reopen_the_log(self) -> None:
        self._close_writer()

    @precondition(lambda self: self._writes_to_the_log() and self._everything_was_read())
    @rule()
    def truncate(self) -> None:
        assert self.writer is not None
        os.ftruncate(self.writer, 0)
        self._touch()

    @precondition(lambda self: self._writes_to_the_log() and not self.partial)
    @rule()
    def copytruncate(self) -> None:
        """At any time: what was not read is in the copy."""
        assert self.writer is not None
        shutil.copyfile(self.log, self._shift())
        os.ftruncate(self.writer, 0)
        self._touch()

    @precondition(lambda self: self._everything_was_read())
    @rule(oldest=st.booleans())
    def delete(self, oldest: bool) -> None:
        """The log itself, or the oldest rotated file."""
        rotated = sorted(self.logs.glob("usage.log.*"), key=lambda path: int(path.suffix[1:]))
        path = rotated[-1] if oldest and rotated else self.log
        self._close_writer()
        path.unlink(missing_ok=True)

    # The follower

    def _reopen(self) -> None:
        self.process = ExitStack()
        self.checkpoint = self.process.enter_context(Checkpoint(self.state))
        self.ledger = Ledger()
        inputs = [FileInput(path=str(self.log))]
        self.files = FileSet(inputs, self.checkpoint, lambda: self.now, max_line_bytes=4096)
        self.process.callback(self.files.close)
        self.files.load()

    @rule()
    def scan(self) -> None:
        self.files.scan()

    @rule(blocks=st.integers(1, 5))
    def read(self, blocks: int) -> None:
        for _ in range(blocks):
            if not self._read_block():
                return

    def _read_block(self) -> bool:
        block = self.files.next_block()
        if block is None:
            return False
        assert block.data.endswith(b"\n") and not block.overlong
        numbers = [int(line.split()[0]) for line in block.data.splitlines()]
        assert not set(numbers) & set(self.committed), "read again though it was committed"
        assert not set(numbers) & self.read_in_this_life, "read twice by one process"
        self.read_in_this_life.update(numbers)
        self.reads.update(numbers)
        books = Books({Count.LINES: len(numbers)})
        span = Span(block.file_id, block.end_offset, block.tail, books, [], len(numbers))
        self.ledger.opened(span)
        self.spans.append((span, numbers))
        return True

    @precondition(lambda self: self.spans)
    @rule(data=st.data(), commit=st.booleans())
    def settle(self, data: st.DataObject, commit: bool) -> None:
        """Acknowledgements in any order, and in parts."""
        for span, _ in data.draw(st.lists(st.sampled_from(self.spans), max_size=6)):
            if span.unsettled:
                part = data.draw(st.integers(1, span.unsettled))
                self.ledger.acknowledged(Batch(b"", part, [(span, part)]))
        if commit:
            self._commit()

    def _commit(self) -> None:
        self.checkpoint.commit(self.ledger.take_settled())
        waiting: set[int] = set()
        left = []
        for span, numbers in self.spans:
            if span.unsettled or span.file_id in waiting:
                waiting.add(span.file_id)
                left.append((span, numbers))
            else:
                self.committed += numbers
        self.spans = left

    @precondition(lambda self: not self.partial)
    @rule()
    def pass_time(self) -> None:
        """Quiet rotated files are let go. Not while a line is begun: its beginning would be delivered as a rest."""
        self.now += int(ROTATED_IDLE_SECONDS) + 1

    @rule()
    def crash(self) -> None:
        """Also a clean restart, when everything was committed before."""
        self.process.close()
        self.spans.clear()
        self.read_in_this_life.clear()
        self.crashes += 1
        self._reopen()

    # What always holds

    @invariant()
    def books_count_exactly_what_was_committed(self) -> None:
        assert self.checkpoint.books()[Count.LINES] == len(self.committed) == len(set(self.committed))

    @invariant()
    def no_position_is_past_an_unsettled_span(self) -> None:
        positions = {file.file_id: file.position for file in self.checkpoint.files()}
        for span, _ in self.spans:
            assert positions[span.file_id] < span.end_offset

    def teardown(self) -> None:
        """A last drain: every line was read, and once only when nothing crashed."""
        try:
            if self.partial:
                self.finish_the_line()
            for _ in range(4):
                self.now += int(LISTING_SECONDS) + 1
                self.files.scan()
                while self._read_block():
                    pass
            assert set(self.reads) == set(self.written)
            for span, _ in self.spans:
                span.unsettled = 0
            self._commit()
            self.books_count_exactly_what_was_committed()
            if not self.crashes:
                assert sorted(self.committed) == self.written
                assert set(self.reads.values()) <= {1}
        finally:
            self._close_writer()
            self.process.close()
            self.cleanup.close()


def test_no_line_is_lost_and_none_is_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Kong, rotation, acknowledgements and crashes do (cases 2, 5 to 14, 17, 30, 31)."""
    for module in (content, followed):
        monkeypatch.setattr(module, "BLOCK_BYTES", 128)  # so that there are many blocks
    run_state_machine_as_test(
        LogModel,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
