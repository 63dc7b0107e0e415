"""The spool on disk: what was appended is there, also after a restart; what failed is not, whatever failed."""

import errno
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from metershipper import segments
from metershipper.errors import StateError
from metershipper.segments import SKIPPED_BYTES, Segments

MAX_BYTES = 8000  # so a segment takes 1000 bytes before the next one begins
LINE = b"x" * 99 + b"\n"


def line(number: int) -> bytes:
    return b"%099d\n" % number


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@contextmanager
def opened(directory: Path, position: int = 0, max_bytes: int = MAX_BYTES) -> Iterator[Segments]:
    spool = Segments(directory, max_bytes)
    spool.open(position)
    try:
        yield spool
    finally:
        spool.close()


def content(spool: Segments, position: int = 0) -> bytes:
    """All that can be read, over holes."""
    found = b""
    while (start := spool.next_start(position)) is not None:
        data = spool.pread(50, start)
        found += data
        position = start + len(data)
    return found


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def segment_name(start: int) -> str:
    return f"{start:020d}.ndjson"


def failing(function: Callable[..., object], times: int = 1, code: int = errno.ENOSPC) -> Callable[..., object]:
    """Fails so many times, then works again."""
    left = [times]

    def fails(*arguments: object, **options: object) -> object:
        if left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return function(*arguments, **options)

    return fails


def fail(monkeypatch: pytest.MonkeyPatch, name: str, times: int = 1) -> None:
    monkeypatch.setattr(os, name, failing(getattr(os, name), times))


# --- writing, reading, deleting


def test_what_is_appended_is_read_in_order_over_all_segments(directory: Path) -> None:
    lines = [line(number) for number in range(45)]
    with opened(directory) as spool:
        for begin in range(0, 45, 3):
            spool.append(lines[begin : begin + 3])
        assert content(spool) == b"".join(lines)
        assert (spool.start, spool.end, spool.size_bytes) == (0, 4500, 4500)
        assert names(directory) == [segment_name(start) for start in (0, 1200, 2400, 3600)]
    with opened(directory) as spool:
        assert content(spool) == b"".join(lines)
        spool.append([line(45)])
        assert content(spool, 4400) == lines[44] + line(45)
        assert names(directory)[-1] == segment_name(4500)  # what was closed is never appended to


def test_files_are_for_this_user_alone(directory: Path) -> None:
    """Whatever the umask (case 71)."""
    before = os.umask(0)
    try:
        with opened(directory) as spool:
            spool.append([LINE])
    finally:
        os.umask(before)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / segment_name(0)).stat().st_mode & 0o777 == 0o600


def test_the_data_and_the_name_of_a_segment_are_synced_before_it_counts(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(case 54)"""
    steps: list[str] = []

    def write(fd: int, data: bytes) -> int:
        steps.append("write")
        return real_write(fd, data[:60])  # as a signal may cut it

    def fdatasync(fd: int) -> None:
        steps.append(f"sync of {os.fstat(fd).st_size} bytes, {spool.end} counted")

    real_write = os.write
    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(segments, "sync_directory", lambda path: steps.append(f"name in {path.name}"))
    with opened(directory) as spool:
        spool.append([LINE])
        spool.append([LINE])
        assert spool.end == 200
    assert steps == [
        *("name in spool", "write", "write", "sync of 100 bytes, 0 counted"),
        *("write", "write", "sync of 200 bytes, 100 counted"),
    ]


def test_what_is_settled_is_deleted_and_nothing_else(directory: Path) -> None:
    with opened(directory) as spool:
        for number in range(25):
            spool.append([line(number)])
        spool.release(999)
        assert spool.size_bytes == 2500
        spool.release(1050)
        assert names(directory) == [segment_name(1000), segment_name(2000)]
        assert (spool.start, spool.size_bytes) == (1000, 1500)
        spool.release(2500)
        assert names(directory) == []
        assert (spool.start, spool.end, spool.size_bytes, spool.next_start(2500)) == (2500, 2500, 0, None)
        spool.append([LINE])
        assert names(directory) == [segment_name(2500)]
        assert content(spool, 2500) == LINE
    with opened(directory, position=2500) as spool:
        assert content(spool, 2500) == LINE


def test_what_is_deleted_takes_no_room_on_the_disk(directory: Path) -> None:
    """No descriptor holds it."""
    with opened(directory) as spool:
        spool.append([LINE])
        assert content(spool) == LINE
        spool.release(100)
        held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd)]
        assert not [path for path in held if path.startswith(str(directory)) and path != str(directory)]


def _is_link(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_what_can_not_be_deleted_is_tried_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(directory) as spool:
        for number in range(25):
            spool.append([line(number)])
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", failing(Path.unlink, code=errno.EROFS))
            with pytest.raises(OSError, match="Read-only"):
                spool.release(2000)
        assert spool.size_bytes == 2500
        spool.release(2000)
        assert names(directory) == [segment_name(2000)]
        assert content(spool, 2000) == b"".join(map(line, range(20, 25)))


def test_a_segment_that_is_being_written_to_is_not_deleted(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in it so far may be settled while more is on its way to the disk: that would go with it (case 54)."""
    reached, go_on = threading.Event(), threading.Event()

    def fdatasync(fd: int) -> None:
        reached.set()
        assert go_on.wait(10)

    with opened(directory) as spool:
        spool.append([line(1)])
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        appending = threading.Thread(target=spool.append, args=([line(2)],))
        appending.start()
        assert reached.wait(10)
        spool.release(100)
        go_on.set()
        appending.join()
        assert content(spool, 100) == line(2)
        spool.append([line(3)])
        spool.release(300)
        assert names(directory) == []
    with opened(directory) as spool:
        assert spool.size_bytes == 0


def test_there_is_room_up_to_the_limit(directory: Path) -> None:
    with opened(directory, max_bytes=1000) as spool:
        spool.append([LINE] * 9)
        assert spool.fault_of(100) is None
        assert spool.fault_of(101) == "the spool holds inputs.http_log.spool_max_bytes = 1000"
        spool.append([LINE])
        assert spool.fault_of(1)
        spool.release(1000)
        assert spool.fault_of(1000) is None


def test_the_disk_is_not_filled_to_its_end(directory: Path) -> None:
    """The checkpoint is on the same one, and without it nothing of the spool can ever be deleted."""
    with opened(directory, max_bytes=2**60) as spool:
        disk = os.statvfs(directory)
        free = disk.f_bavail * disk.f_frsize
        assert spool.fault_of(free // 2) is None
        assert "the disk of the spool is full, but for " in str(spool.fault_of(free - 100))


# --- writes that fail


@pytest.mark.parametrize("call", ["write", "fdatasync"])
def test_of_a_write_that_failed_nothing_stays(call: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sender is told so, and sends it again (case 60)."""
    with opened(directory) as spool:
        spool.append([line(1)])
        fail(monkeypatch, call)
        with pytest.raises(OSError, match="No space left"):
            spool.append([line(2), line(3)])
        assert content(spool) == line(1)
        assert (directory / segment_name(0)).read_bytes() == line(1)
        spool.append([line(4)])
        assert content(spool) == line(1) + line(4)
    with opened(directory) as spool:
        assert content(spool) == line(1) + line(4)


def test_of_a_write_that_got_half_way_nothing_stays(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write, calls = os.write, iter(range(9))

    def write(fd: int, data: bytes) -> int:
        if next(calls):
            raise OSError(errno.EIO, "Input/output error")
        return real_write(fd, data[:130])

    with opened(directory) as spool:
        monkeypatch.setattr(os, "write", write)
        with pytest.raises(OSError, match="Input/output error"):
            spool.append([line(1), line(2)])
        monkeypatch.undo()
        assert (content(spool), spool.end) == (b"", 0)
        spool.append([line(3)])
        assert content(spool) == line(3)


@pytest.mark.parametrize("before", [0, 1])
def test_what_failed_and_stays_is_never_read(
    before: int, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it can't be taken back, what comes next begins behind it, in a file of its own."""
    with opened(directory) as spool:
        good = b"".join(map(line, range(before)))
        if good:
            spool.append([good])
        fail(monkeypatch, "fdatasync")
        fail(monkeypatch, "ftruncate")
        monkeypatch.setattr(Path, "unlink", failing(Path.unlink))
        with pytest.raises(OSError, match="No space left"):
            spool.append([line(8), line(9)])
        monkeypatch.undo()
        (told,) = caplog.records
        assert "could not be written to its end stays in it" in told.getMessage()
        spool.append([line(5)])
        assert content(spool) == good + line(5)
        assert spool.next_start(len(good)) == len(good) + SKIPPED_BYTES
    assert (directory / segment_name(0)).stat().st_size == len(good) + 200
    with opened(directory) as spool:
        assert content(spool) == good + line(5)
        assert content(spool, len(good)) == line(5)
    with opened(directory) as spool:  # the first start has mended it
        assert content(spool) == good + line(5)


def test_a_segment_of_which_nothing_became_durable_leaves_no_hole(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often that happens: a hole would be told as lost usage."""
    with opened(directory) as spool:
        for _ in range(3):
            fail(monkeypatch, "fdatasync")
            with pytest.raises(OSError, match="No space left"):
                spool.append([line(1)])
            assert names(directory) == []
        spool.append([line(2)])
        assert spool.next_start(0) == 0
        assert content(spool) == line(2)


@pytest.mark.parametrize("times", [1, 2])
def test_a_segment_that_can_not_be_begun_leaves_nothing_behind(
    times: int, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(directory) as spool:
        with monkeypatch.context() as patch:
            patch.setattr(segments, "sync_directory", failing(lambda _: None, times))
            for _ in range(times):
                with pytest.raises(OSError, match="No space left"):
                    spool.append([line(1)])
        assert names(directory) == []
        spool.append([line(2)])
        assert content(spool) == line(2)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from metershipper.segments import Segments
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
spool = Segments(Path(sys.argv[1]), 10_000)
spool.open(0)
spool.append([b"a" * 99 + b"\\n"])
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (250, limits[1]))
try:
    spool.append([b"b" * 99 + b"\\n", b"c" * 99 + b"\\n"])
except OSError as error:
    print(error.strerror)
spool.append([b"d" * 99 + b"\\n"])
print(spool.pread(1000, 0).decode(), end="")
"""


def test_a_real_file_that_may_not_grow_keeps_what_was_in_it(directory: Path) -> None:
    """The kernel writes what still fits (case 60)."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(directory)], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.splitlines() == ["File too large", "a" * 99, "d" * 99]


# --- what a crash, or somebody else, leaves


@pytest.mark.parametrize("torn", [b"x", b"x" * 99, b'{"a":1}\n{"b"'])
def test_a_torn_end_is_cut_off(torn: bytes, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody was told that it was received (case 54)."""
    caplog.set_level(logging.INFO)
    with opened(directory) as spool:
        spool.append([line(1)])
    with (directory / segment_name(0)).open("ab") as file:
        file.write(torn)
    whole = line(1) + torn[: torn.rfind(b"\n") + 1]
    with opened(directory) as spool:
        assert content(spool) == whole
        spool.append([line(2)])
        assert content(spool) == whole + line(2)
    assert f"its last {len(torn) - len(whole) + 100} bytes were not received to their end" in caplog.text
    assert (directory / segment_name(0)).read_bytes() == whole


@pytest.mark.parametrize("data", [b"", b"torn"])
def test_a_segment_without_a_line_goes(data: bytes, directory: Path) -> None:
    directory.mkdir(mode=0o700)
    (directory / segment_name(0)).write_bytes(data)
    (directory / segment_name(500)).write_bytes(data)
    with opened(directory, position=500) as spool:
        assert names(directory) == []
        spool.append([LINE])
        assert names(directory) == [segment_name(500)]


def test_positions_go_on_where_everything_was_settled_or_is_gone(directory: Path) -> None:
    """A position that was reached once is never used for other lines."""
    with opened(directory, position=12345) as spool:
        assert (spool.start, spool.end) == (12345, 12345)
        spool.append([LINE])
        assert spool.next_start(12345) == 12345
        assert names(directory) == [segment_name(12345)]


def test_a_symbolic_link_in_the_place_of_a_segment_is_refused(directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"something without a line")
    directory.mkdir(mode=0o700)
    (directory / segment_name(0)).symlink_to(other)
    with pytest.raises(OSError, match="symbolic links"), opened(directory):
        pass
    assert other.read_bytes() == b"something without a line"


def test_a_link_where_the_next_segment_begins_is_not_followed(directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with opened(directory) as spool:
        (directory / segment_name(0)).symlink_to(other)
        with pytest.raises(FileExistsError):
            spool.append([LINE])
    assert not other.exists()


def test_foreign_files_are_left_alone(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    foreign = ["0.ndjson", f"{segment_name(0)}.bak", f".{segment_name(0)}", "repeats-1~", "lost+found"]
    for name in foreign:
        (directory / name).write_bytes(b"torn")
    with opened(directory) as spool:
        assert (spool.size_bytes, spool.next_start(0)) == (0, None)
        spool.append([LINE])
        spool.release(100)
    assert names(directory) == sorted(foreign)


def test_a_file_in_the_place_of_the_directory_is_told(directory: Path) -> None:
    directory.write_bytes(b"")
    with pytest.raises(StateError, match="can't be created"), opened(directory):
        pass


def test_a_segment_that_somebody_else_deleted_is_a_hole(directory: Path) -> None:
    with opened(directory) as spool:
        for number in range(25):
            spool.append([line(number)])
        (directory / segment_name(1000)).unlink()
        assert content(spool) == b"".join(map(line, [*range(10), *range(20, 25)]))
        spool.release(2500)
        assert spool.size_bytes == 0


def test_what_comes_after_somebody_else_deleted_the_last_segment_is_kept(directory: Path) -> None:
    """Not appended to a file without a name, which would be gone with the process (case 54)."""
    with opened(directory) as spool:
        spool.append([line(1)])
        (directory / segment_name(0)).unlink()
        spool.append([line(2)])
        assert content(spool) == line(2)
    with opened(directory, position=0) as spool:
        assert content(spool) == line(2)


def test_threads_may_append_read_and_release_at_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read and released by one thread, as fast as it can, was appended by another one: each line once."""
    monkeypatch.setattr(os, "fdatasync", lambda _: os.sched_yield())
    monkeypatch.setattr(segments, "sync_directory", lambda _: os.sched_yield())
    total, found, position = 600, b"", 0
    with opened(directory) as spool:

        def append_all() -> None:
            for number in range(total):
                spool.append([line(number)])

        appending = threading.Thread(target=append_all)
        appending.start()
        while position < total * 100:
            data = spool.pread(777, position)
            data = data[: data.rfind(b"\n") + 1]
            found, position = found + data, position + len(data)
            spool.release(position)
        appending.join()
        spool.release(position)
        assert found == b"".join(map(line, range(total)))
        assert names(directory) == []
