"""A model of everything that can happen to logs, in any order: no line is lost untold, none is counted twice.

Files, checkpoint and ledger are real; the mapper and the endpoint are not there: a span is settled when the test says
so. Every line is a number, so that the model knows which lines were written, read, settled and committed. A line may
be lost only where its last copy was cut off or deleted before it was read, and then a gap must tell so.
"""

import gzip
import os
import shutil
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import zstandard
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
from metershipper.losses import PATIENCE_SECONDS
from metershipper.state import make_private_directory

SUFFIXES = ("", ".gz", ".zst")


@dataclass
class Log:
    """One log, its writer, and its rotated files; `written`: the numbers of its lines."""

    path: Path
    number: int
    written: list[int] = field(default_factory=list)
    seen: int = 0  # how many of them were there when the follower last looked
    writer: int | None = None  # Kong's descriptor
    partial: bytes = b""  # what of a begun line is still to be written
    mtime: int = 1000

    def write(self, data: bytes) -> None:
        if self.writer is None:
            self.writer = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(self.writer, data)
        self.touch()

    def touch(self) -> None:
        """A modification time of its own for each change, however coarse the clock of the file system is."""
        self.mtime += 1
        assert self.writer is not None
        os.utime(self.writer, (self.mtime, self.mtime))

    def next_line(self) -> bytes:
        number = self.number * 1_000_000 + len(self.written)
        self.written.append(number)
        return b"%d %s\n" % (number, b"x" * (number * 7 % 41))

    def reopen(self) -> None:
        if self.writer is not None:
            os.close(self.writer)
        self.writer = None

    def rotated(self) -> list[Path]:
        """Oldest last."""
        return sorted(self.path.parent.glob(f"{self.path.name}.*"), key=_age)

    def shift(self) -> Path:
        """Make room for a new usage.log.1."""
        for path in reversed(self.rotated()):
            suffix = path.suffix if path.suffix in SUFFIXES else ""
            path.rename(f"{self.path}.{_age(path) + 1}{suffix}")
        return Path(f"{self.path}.1")

    def is_written(self) -> bool:
        """Whether the writer's file still has the log's name."""
        if self.writer is None or not self.path.exists():
            return False
        return os.path.samestat(os.fstat(self.writer), self.path.stat())

    def lines_in(self, path: Path) -> set[int]:
        """The numbers of the whole lines in one of its files."""
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        elif path.suffix == ".zst":
            data = zstandard.ZstdDecompressor().decompress(data)
        return {int(line.split()[0]) for line in data.splitlines(keepends=True) if line.endswith(b"\n")}


def _age(path: Path) -> int:
    return int(path.name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2])


class LogModel(RuleBasedStateMachine):
    """Some logs, their writers, their rotation, and a follower that crashes now and then."""

    logs_count: ClassVar[int] = 1
    glob: ClassVar[str | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.cleanup = ExitStack()
        root = Path(self.cleanup.enter_context(tempfile.TemporaryDirectory()))
        self.directory, self.state = root / "logs", root / "state"
        self.directory.mkdir()
        make_private_directory(self.state)
        self.logs = [Log(self.directory / f"usage{letters(n)}.log", n) for n in range(self.logs_count)]
        self.now = 1000
        self.reads: Counter[int] = Counter()
        self.read_in_this_life: set[int] = set()
        self.spans: list[tuple[Span, list[int]]] = []  # read and not committed, in the order of reading
        self.committed: set[int] = set()
        self.commits = 0
        self.endangered: set[int] = set()  # lines of which the last copy was destroyed before they were committed
        self.seen_endangered: set[int] = set()  # those which the follower knew of
        self.crashes = 0
        self._reopen()
        self._look()

    # Kong

    def _any_log(self, data: st.DataObject) -> Log:
        return data.draw(st.sampled_from(self.logs))

    @rule(data=st.data(), count=st.integers(1, 12))
    def write_lines(self, data: st.DataObject, count: int) -> None:
        log = self._any_log(data)
        if not log.partial:
            log.write(b"".join(log.next_line() for _ in range(count)))

    @rule(data=st.data())
    def tear_a_line(self, data: st.DataObject) -> None:
        log = self._any_log(data)
        if log.partial:
            log.write(log.partial)
            log.partial = b""
        else:
            line = log.next_line()
            log.write(line[: len(line) // 2])
            log.partial = line[len(line) // 2 :]

    # Rotation

    @rule(data=st.data(), create=st.booleans())
    def rotate(self, data: st.DataObject, create: bool) -> None:
        log = self._any_log(data)
        if log.path.exists() and not log.partial:
            log.path.rename(log.shift())
            log.reopen()
            if create:
                log.write(b"")

    @rule(data=st.data(), create=st.booleans())
    def rotate_and_stay_on_the_old_file(self, data: st.DataObject, create: bool) -> None:
        """Kong with `reopen = false`."""
        log = self._any_log(data)
        if log.is_written():
            log.path.rename(log.shift())
            if create:
                log.path.touch()

    @rule(data=st.data())
    def reopen_the_log(self, data: st.DataObject) -> None:
        log = self._any_log(data)
        if not log.partial:
            log.reopen()

    @rule(data=st.data(), suffix=st.sampled_from(SUFFIXES[1:]), keep=st.booleans())
    def compress(self, data: st.DataObject, suffix: str, keep: bool) -> None:
        """Any rotated file to which nobody writes any more; `keep`: the original stays for a while."""
        log = self._any_log(data)
        plain = [path for path in log.rotated() if path.suffix not in SUFFIXES[1:]]
        plain = [p for p in plain if log.writer is None or not os.path.samestat(p.stat(), os.fstat(log.writer))]
        if plain:
            path = data.draw(st.sampled_from(plain))
            packed = Path(f"{path}{suffix}")
            pack = gzip.compress if suffix == ".gz" else zstandard.compress
            packed.write_bytes(pack(path.read_bytes()))
            shutil.copystat(path, packed)
            if keep:
                self._look()
            path.unlink()

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        """Without a copy: what was not read is lost, and must be told."""
        log = self._any_log(data)
        if log.is_written() and not log.partial:
            self._endanger(log, log.path)
            assert log.writer is not None
            os.ftruncate(log.writer, 0)
            log.touch()

    @rule(data=st.data())
    def copytruncate(self, data: st.DataObject) -> None:
        """At any time: what was not read is in the copy."""
        log = self._any_log(data)
        if log.is_written() and not log.partial:
            assert log.writer is not None
            shutil.copyfile(log.path, log.shift())
            os.ftruncate(log.writer, 0)
            log.touch()

    @rule(data=st.data(), oldest=st.booleans())
    def delete(self, data: st.DataObject, oldest: bool) -> None:
        """The log itself, or the oldest rotated file."""
        log = self._any_log(data)
        rotated = log.rotated()
        path = rotated[-1] if oldest and rotated else log.path
        if path.exists() and not log.partial:
            self._endanger(log, path)
            if log.writer is not None and os.path.samestat(path.stat(), os.fstat(log.writer)):
                log.reopen()
            path.unlink()

    def _endanger(self, log: Log, path: Path) -> None:
        """Lines that are nowhere else, and may not be settled before they are gone."""
        elsewhere = set().union(
            *(log.lines_in(each) for each in (log.path, *log.rotated()) if each != path and each.exists())
        )
        endangered = log.lines_in(path) - elsewhere - self.committed
        self.endangered |= endangered
        self.seen_endangered |= endangered & set(log.written[: log.seen])

    # The follower

    def _look(self) -> None:
        self.files.scan()
        for log in self.logs:
            log.seen = len(log.written) - bool(log.partial)

    def _reopen(self) -> None:
        self.process = ExitStack()
        self.checkpoint = self.process.enter_context(Checkpoint(self.state))
        self.ledger = Ledger()
        paths = [self.glob] if self.glob else [log.path.name for log in self.logs]
        inputs = [FileInput(path=str(self.directory / path)) for path in paths]
        self.files = FileSet(inputs, self.checkpoint, lambda: self.now, max_line_bytes=4096)
        self.process.callback(self.files.close)
        self.files.load()

    @rule()
    def scan(self) -> None:
        self._look()

    @rule(blocks=st.integers(1, 5))
    def read(self, blocks: int) -> None:
        for _ in range(blocks):
            if not self._read_block():
                return

    def _read_block(self) -> bool:
        block = self.files.next_block()
        if block is None:
            return False
        assert block.data.endswith(b"\n") and not block.overlong and not block.nul_bytes
        numbers = [int(line.split()[0]) for line in block.data.splitlines()]
        assert not set(numbers) & self.committed, "read again though it was committed"
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
                self.committed.update(numbers)
                self.commits += len(numbers)
        self.spans = left

    @precondition(lambda self: not any(log.partial for log in self.logs))
    @rule(seconds=st.sampled_from([3, int(PATIENCE_SECONDS) + 1, int(ROTATED_IDLE_SECONDS) + 1]))
    def pass_time(self, seconds: int) -> None:
        """Quiet rotated files are let go. Not while a line is begun: its beginning would be delivered as a rest."""
        self.now += seconds

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
        assert self.checkpoint.books()[Count.LINES] == len(self.committed) == self.commits

    @invariant()
    def no_position_is_past_an_unsettled_span(self) -> None:
        positions = {file.file_id: file.position for file in self.checkpoint.files()}
        for span, _ in self.spans:
            assert positions[span.file_id] < span.end_offset

    def teardown(self) -> None:
        """A last drain: every line was read or is told to be lost, and once only when nothing crashed."""
        try:
            for log in self.logs:
                if log.partial:
                    log.write(log.partial)
                if not log.path.exists():
                    log.reopen()
                    log.write(b"")  # a log that is gone for good may still come back with its volume: no alarm
            for _ in range(4):
                self.now += int(LISTING_SECONDS) + 1
                self._look()
                while self._read_block():
                    pass
            for span, _ in self.spans:
                span.unsettled = 0
            self._commit()
            self.books_count_exactly_what_was_committed()
            written = {number for log in self.logs for number in log.written}
            lost = written - self.committed
            assert lost <= self.endangered, "lost though it was there"
            self._check_that_it_was_told({number // 1_000_000 for number in lost & self.seen_endangered})
            if not self.crashes:
                assert set(self.reads.values()) <= {1}
        finally:
            for log in self.logs:
                log.reopen()
            self.process.close()
            self.cleanup.close()

    def _check_that_it_was_told(self, numbers: set[int]) -> None:
        told = {Path(gap.path).name for gap in self.checkpoint.gaps()}
        assert {self.logs[number].path.name for number in numbers} <= told, "lost without a word"


def letters(number: int) -> str:
    """A name without digits, which no rotation could have given."""
    return f"-{chr(ord('a') + number // 26)}{chr(ord('a') + number % 26)}" if number else ""


class SeveralInputs(LogModel):
    """As many logs as two gateways' sidecars follow."""

    logs_count = 4


class ManyUnderOneGlob(LogModel):
    """500 files, of which any may be written, rotated, compressed or deleted at any time."""

    logs_count = 500
    glob = "*.log"

    def __init__(self) -> None:
        super().__init__()
        for log in self.logs:
            log.write(log.next_line())
        self._look()
        assert len(self.files.followed()) == self.logs_count


@pytest.mark.parametrize(
    ("model", "examples", "steps"), [(LogModel, 100, 50), (SeveralInputs, 40, 80), (ManyUnderOneGlob, 2, 40)]
)
@pytest.mark.timeout(240)
def test_no_line_is_lost_untold_and_none_is_counted_twice(
    monkeypatch: pytest.MonkeyPatch, model: type[LogModel], examples: int, steps: int
) -> None:
    """Whatever Kong, rotation, compression, acknowledgements and crashes do (cases 2, 5 to 14, 17, 19, 27 to 31)."""
    for module in (content, followed):
        monkeypatch.setattr(module, "BLOCK_BYTES", 128)  # so that there are many blocks
    run_state_machine_as_test(
        model,
        settings=settings(
            max_examples=examples * int(os.environ.get("MODEL_RUNS", "1")),
            stateful_step_count=steps,
            deadline=None,
            derandomize="MODEL_RUNS" not in os.environ,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
