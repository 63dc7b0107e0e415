"""The disk of the state directory: full, read-only, slow to be written to. Nothing is lost or sent twice (case 33)."""

import errno
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from metershipper.books import Books, Count
from metershipper.checkpoint import DATABASE_NAME, Checkpoint
from metershipper.traffic import Traffic
from tests.integration.support import (
    FaultyEndpoint,
    Site,
    TimedStore,
    append,
    expected_ids,
    stop,
    unmeasured,
    wait_until,
)

CANT_COMMIT, CANT_REGISTER = "positions can't be written (", "files can't be recorded ("
LAG_SECONDS = 1.0


def lines_of(seed: int, count: int) -> list[bytes]:
    traffic = Traffic(seed, started_at_ms=1_790_000_000_000)
    return [traffic.line() for _ in range(count)]


def run_command(site: Site) -> list[str]:
    return [sys.executable, "-m", "metershipper", "run", "-c", str(site.config)]


@contextmanager
def may_not_write_beyond(process: "subprocess.Popen[bytes]", size: int) -> Iterator[None]:
    """Files of the process can't grow beyond this: to SQLite, a disk that fails to write."""
    before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        if process.poll() is None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before)


def test_a_state_that_can_not_grow_costs_nothing_and_recovers_by_itself(tmp_path: Path) -> None:
    """It stays alive, positions stop, and once there is room everything is recorded, without a restart (case 33)."""
    lines, junk = lines_of(1, 400), [b"x" * 60_000 + b"\n"] * 5  # so that the state is larger than the messages
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url, environment=unmeasured())
        append(site.log, *junk, *lines[:100])
        with site.running() as process:
            site.wait_for_lines(process, 105)
            with may_not_write_beyond(process, Path(f"{site.state / DATABASE_NAME}-wal").stat().st_size):
                append(site.log, *lines[100:200])
                wait_until(lambda: CANT_COMMIT in site.errors.read_text(), lambda: site.story(process))
                wait_until(lambda: len(endpoint.ids()) == len(expected_ids(lines[:200])), lambda: site.story(process))
                site.log.rename(f"{site.log}.1")
                append(site.log, *lines[200:300])
                wait_until(lambda: CANT_REGISTER in site.errors.read_text(), lambda: site.story(process))
                time.sleep(1.5)
                assert process.poll() is None
                assert site.books()[Count.LINES] == 105
            site.wait_for_lines(process, 305)
            append(site.log, *lines[300:])
            site.wait_for_lines(process, 405)
            assert stop(process) == 0
        assert Counter(endpoint.ids()) == Counter(expected_ids(lines))
        assert endpoint.store.counts()["repeats"] == 0
        assert "Traceback" not in site.errors.read_text()
        books = site.books()
        assert books.balanced
        assert (books[Count.LINES], books[Count.EVENTS]) == (405, len(expected_ids(lines)))


def test_a_stop_while_nothing_can_be_written_ends_and_loses_nothing(tmp_path: Path) -> None:
    """SIGTERM on a full disk: it ends, and the next start sends again only what was not recorded (cases 33, 51)."""
    lines, junk = lines_of(2, 200), [b"x" * 60_000 + b"\n"] * 5
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url, environment=unmeasured())
        append(site.log, *junk, *lines[:100])
        with site.running() as process:
            site.wait_for_lines(process, 105)
            with may_not_write_beyond(process, Path(f"{site.state / DATABASE_NAME}-wal").stat().st_size):
                append(site.log, *lines[100:])
                wait_until(lambda: CANT_COMMIT in site.errors.read_text(), lambda: site.story(process))
                stop(process)
        with site.running() as process:
            site.wait_for_lines(process, 205)
            assert stop(process) == 0
        assert Counter(endpoint.ids()) == Counter(expected_ids(lines))
        assert endpoint.store.counts()["repeats"] <= len(expected_ids(lines[100:]))
        assert site.books().balanced
        assert site.books()[Count.LINES] == 205


@pytest.mark.parametrize("used", [False, True], ids=["first start", "later start"])
@pytest.mark.parametrize("blocks", [0, 1], ids=["nothing", "but a few bytes"])
def test_a_start_with_a_full_disk_is_refused_before_anything_is_read(tmp_path: Path, used: bool, blocks: int) -> None:
    """One line that names the state, exit code 1, nothing sent; with room again it starts (case 33)."""
    lines = lines_of(3, 40)
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        if used:
            append(site.log, *lines[:20])
            with site.running() as process:
                site.wait_for_lines(process, 20)
                assert stop(process) == 0
        sent = endpoint.requests
        append(site.log, *lines[20 if used else 0 :])
        limited = ["sh", "-c", f'ulimit -f {blocks}; exec "$@"', "sh", *run_command(site)]
        refused = subprocess.run(limited, capture_output=True, text=True, env=unmeasured())
        assert (refused.returncode, refused.stdout) == (1, ""), refused.stderr
        assert refused.stderr.startswith(f"metershipper: {site.state}/")
        assert refused.stderr.count("\n") == 1
        assert endpoint.requests == sent
        with site.running() as process:
            site.wait_for_lines(process, 40)
            assert stop(process) == 0
        assert Counter(endpoint.ids()) == Counter(expected_ids(lines))
        assert endpoint.store.counts()["repeats"] == 0


# A small file system of its own


@contextmanager
def running_on_tmpfs(site: Site, prepare: str = "true") -> Iterator["subprocess.Popen[bytes]"]:
    """`run` with the state directory on a file system of 2 MB that only this process sees, `prepare`d by a command."""
    script = f'mount -t tmpfs -o size=2m,mode=700 tmpfs "$0" && {prepare} && exec "$@"'
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, str(site.state)]
    with (
        site.errors.open("ab") as errors,
        subprocess.Popen([*namespace, *run_command(site)], stderr=errors, env=unmeasured()) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def tmpfs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where no file system can be mounted."""
    command = [
        "unshare",
        "--map-root-user",
        "--mount",
        "mount",
        "-t",
        "tmpfs",
        "tmpfs",
        str(tmp_path_factory.mktemp("t")),
    ]
    if shutil.which("unshare") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no user namespaces here: no file system to fill can be mounted")


def fill(directory: Path) -> Path:
    """Write until there is no space left."""
    with (directory / "filler").open("wb", buffering=0) as filler:
        for size in (65536, 4096, 1):
            while True:
                try:
                    filler.write(bytes(size))
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    break
    return directory / "filler"


def books_in(state: Path, directory: Path) -> Books:
    """The committed books of a directory that SQLite itself can't find: it resolves /proc/PID/root to our own root."""
    with tempfile.TemporaryDirectory(dir=directory) as copy:
        for name in (DATABASE_NAME, f"{DATABASE_NAME}-wal"):
            shutil.copy(state / name, copy)
        with Checkpoint(Path(copy), read_only=True) as checkpoint:
            return checkpoint.books()


@pytest.mark.usefixtures("tmpfs")
def test_a_full_file_system_costs_nothing_and_recovers_by_itself(tmp_path: Path) -> None:
    """The real ENOSPC (case 33): positions stop, the process stays, and goes on when there is space again."""
    lines = lines_of(4, 300)
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        site.state.mkdir()
        append(site.log, *lines[:100])
        with running_on_tmpfs(site) as process:
            wait_until(lambda: len(endpoint.ids()) == len(expected_ids(lines[:100])), site.errors.read_text)
            state = Path(f"/proc/{process.pid}/root{site.state}")  # as the process sees it
            wait_until(lambda: books_in(state, tmp_path)[Count.LINES] == 100, site.errors.read_text)
            filler = fill(state)
            append(site.log, *lines[100:200])
            wait_until(lambda: CANT_COMMIT in site.errors.read_text(), lambda: site.story(process))
            site.log.rename(f"{site.log}.1")
            append(site.log, *lines[200:])
            wait_until(lambda: CANT_REGISTER in site.errors.read_text(), lambda: site.story(process))
            assert "disk is full" in site.errors.read_text()
            assert process.poll() is None
            assert books_in(state, tmp_path)[Count.LINES] == 100
            filler.unlink()
            wait_until(lambda: books_in(state, tmp_path)[Count.LINES] == 300, site.errors.read_text)
            books = books_in(state, tmp_path)
            assert stop(process) == 0
        assert Counter(endpoint.ids()) == Counter(expected_ids(lines))
        assert endpoint.store.counts()["repeats"] == 0
        assert books.balanced
        assert books[Count.EVENTS] == len(expected_ids(lines))


@pytest.mark.usefixtures("tmpfs")
@pytest.mark.parametrize(
    "prepare",
    ['! dd if=/dev/zero of="$0/filler" bs=4096 2>/dev/null', 'mount -o remount,ro "$0"'],
    ids=["full", "read-only"],
)
def test_a_start_on_such_a_file_system_is_refused_before_anything_is_read(tmp_path: Path, prepare: str) -> None:
    """One line that names the state directory, exit code 1, nothing sent (case 33)."""
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        site.state.mkdir()
        append(site.log, *lines_of(5, 20))
        with running_on_tmpfs(site, prepare) as process:
            assert process.wait(30) == 1
        told = site.errors.read_text()
        assert told.startswith(f"metershipper: {site.state}")
        assert told.count("\n") == 1
        assert endpoint.requests == 0


def test_what_was_acknowledged_is_soon_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The most that a crash sends again is what was acknowledged within the time that a commit takes (case 30)."""
    lines = lines_of(6, 40)
    store, lags = TimedStore(), []
    with FaultyEndpoint(store=store) as endpoint:
        site = Site(tmp_path, endpoint.url)
        with site.running() as process:
            for number, line in enumerate(lines, 1):
                append(site.log, line)
                site.wait_for_lines(process, number)
                if ids := expected_ids([line]):
                    lags.append((time.monotonic_ns() - max(store.accepted[each] for each in ids)) / 1e9)
            assert stop(process) == 0
    with capsys.disabled():
        print(f"\nacknowledged to recorded: median {statistics.median(lags):.3f} s, longest {max(lags):.3f} s")
    assert max(lags) < LAG_SECONDS
