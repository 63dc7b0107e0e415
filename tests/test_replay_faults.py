"""A replay whose files, or whose checkpoint, fail at the worst instant: nothing is lost, and the books stay exact."""

import asyncio
import gzip
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metershipper.books import Books, Count
from metershipper.checkpoint import Checkpoint
from metershipper.config import Config, load_config
from metershipper.errors import StateError
from metershipper.followed import Block
from metershipper.ledger import Settled
from metershipper.records import NewFile, Sample
from metershipper.replay import Replay
from metershipper.replay_command import dry_run, look_around
from metershipper.replay_outcome import Outcome
from metershipper.replay_plan import Step
from metershipper.replay_reading import Reading
from metershipper.replay_state import ReplayState
from metershipper.scope import Scope
from metershipper.state import StateLock
from metershipper.traffic import Traffic
from tests.integration.support import FaultyEndpoint, Site, expected_ids


def lines_of(count: int, seed: int = 1) -> list[bytes]:
    traffic = Traffic(seed, started_at_ms=1_790_000_000_000)
    return [traffic.line() for _ in range(count)]


class _Failing:
    """A connection of which the n-th statement that begins with `word` fails."""

    def __init__(self, db: Any, word: str, at: int) -> None:
        self._db, self._word, self.left = db, word, at

    def execute(self, statement: str, *values: Any) -> Any:
        if statement.startswith(self._word):
            self.left -= 1
            if self.left == 0:
                raise sqlite3.OperationalError("disk I/O error")
        return self._db.execute(statement, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)


class Bench:
    """Replays within this process, to an endpoint on loopback."""

    def __init__(self, directory: Path, endpoint: FaultyEndpoint) -> None:
        self.endpoint = endpoint
        self.site = Site(directory, endpoint.url)
        self.config: Config = load_config(self.site.config)

    def replay(self, *paths: Path, failing: tuple[str, int] | None = None) -> Replay:
        """`failing`: which statement of the checkpoint fails, and at which time."""
        with ReplayState(self.config.state.directory) as state:
            if failing is not None:
                checkpoint: Any = state._checkpoint
                checkpoint._db = _Failing(checkpoint._db, *failing)
            plan = look_around(self.config, state, [str(path) for path in paths], Scope())
            done = Replay(self.config, self.endpoint.url, state, plan)
            asyncio.run(asyncio.wait_for(done.run(), 20))
            return done

    def assert_exact(self, lines: list[bytes], *, repeats: bool = False) -> None:
        """Everything is there once, and counted once."""
        assert Counter(self.endpoint.ids()) == Counter(expected_ids(lines))
        assert repeats or not self.endpoint.store.counts()["repeats"]
        books: Books = self.site.books()
        assert books[Count.LINES] == len(lines)
        assert books.balanced and books.events_balanced


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with FaultyEndpoint() as endpoint:
        yield Bench(tmp_path, endpoint)


def test_a_copy_goes_on_behind_what_is_in_flight_of_one_that_fails(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two copies can't be read to its end: the other one waits for what was taken of the first."""
    lines = lines_of(2000)
    for name in ("a.log", "b.log"):
        (tmp_path / name).write_bytes(b"".join(lines))
    next_block = Reading.next_block

    def failing(reading: Any) -> Block | None:
        if reading._task.path.endswith("a.log") and reading._file.offset > 0:
            raise OSError(5, "Input/output error")
        return next_block(reading)

    monkeypatch.setattr(Reading, "next_block", failing)
    done = bench.replay(tmp_path / "a.log", tmp_path / "b.log")
    assert [result.outcome for result in done.results] == [Outcome.UNREADABLE, Outcome.DELIVERED]
    bench.assert_exact(lines)


def test_a_copy_is_not_waited_for_by_one_that_can_not_be_begun(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = lines_of(300)
    (tmp_path / "a.log").write_bytes(b"".join(lines[:100]))
    bench.replay(tmp_path / "a.log")
    for name in ("a.log", "b.log"):
        (tmp_path / name).write_bytes(b"".join(lines))
    begin = Reading.__enter__

    def failing(reading: Any) -> Reading:
        if reading._task.path.endswith("a.log"):
            raise OSError(5, "Input/output error")
        return begin(reading)

    monkeypatch.setattr(Reading, "__enter__", failing)
    done = bench.replay(tmp_path / "a.log", tmp_path / "b.log")
    assert [result.outcome for result in done.results] == [Outcome.UNREADABLE, Outcome.DELIVERED]
    bench.assert_exact(lines)


def test_files_that_begin_alike_are_not_taken_for_parts_of_each_other(bench: Bench, tmp_path: Path) -> None:
    """Two pods that started in the same second have the same first line; the shorter output is no part of the other."""
    banner = b'2026/09/21 10:00:00 [notice] 1#0: using the "epoll" event method, and other things that are said once\n'
    first, second = lines_of(100, seed=1), lines_of(40, seed=2)
    (tmp_path / "pod-a.log").write_bytes(banner + b"".join(first))
    (tmp_path / "pod-b.log").write_bytes(banner + b"".join(second))
    (tmp_path / "pod-a.part").write_bytes(banner + b"".join(first[:30]))
    paths = [tmp_path / name for name in ("pod-a.log", "pod-b.log", "pod-a.part")]
    done = [bench.replay(path).results[0].outcome for path in paths]
    assert done == [Outcome.DELIVERED, Outcome.DELIVERED, Outcome.ALREADY_DELIVERED]
    assert Counter(bench.endpoint.ids()) == Counter(expected_ids(first + second))
    (tmp_path / "pod-a.log").unlink()  # whatever else is known: it is not read again for that
    assert bench.replay(tmp_path / "pod-b.log").results[0].outcome is Outcome.ALREADY_DELIVERED


def test_a_file_that_is_cut_behind_what_was_read_of_it_is_not_called_delivered(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, path = lines_of(1500), tmp_path / "a.log"
    path.write_bytes(b"".join(lines))
    next_block = Reading.next_block

    def cutting(reading: Any) -> Block | None:
        block = next_block(reading)
        if block is not None:
            with path.open("r+b") as file:
                file.truncate(block.end_offset)
        return block

    monkeypatch.setattr(Reading, "next_block", cutting)
    done = bench.replay(path)
    assert done.results[0].outcome is Outcome.CHANGED and done.exit_code == 3


@pytest.mark.parametrize("word", ["BEGIN", "COMMIT"])
def test_wherever_a_transaction_fails_the_same_command_resumes(tmp_path: Path, word: str) -> None:
    """A full disk, for instance. It is told, or it passes; what was counted of it is what was settled."""
    lines, others = lines_of(120), [b"bad\n", *lines_of(20, seed=2)]
    ended: list[bool] = []
    for at in range(1, 7):
        place = tmp_path / str(at)
        place.mkdir()
        (place / "a.gz").write_bytes(gzip.compress(b"".join(lines)))
        (place / "a.log").write_bytes(b"".join(lines))
        (place / "b.log").write_bytes(b"".join(others))
        paths = [place / name for name in ("a.gz", "a.log", "b.log")]
        with FaultyEndpoint() as endpoint:
            bench = Bench(place, endpoint)
            try:
                bench.replay(*paths, failing=(word, at))
                ended.append(True)
            except StateError:
                ended.append(False)
            bench.replay(*paths)
            bench.assert_exact(lines + others, repeats=True)
    assert True in ended and False in ended


def test_what_waits_for_delivery_is_told_also_while_something_is_replayed(bench: Bench, tmp_path: Path) -> None:
    """The first thing a replay does to the checkpoint of a `run` is not to forget what `status` is to tell."""
    (tmp_path / "a.log").write_bytes(b"".join(lines_of(3)))
    with StateLock(bench.site.state), Checkpoint(bench.site.state) as checkpoint:
        checkpoint.note_oldest_unsettled(1_790_000_000)
        bench.replay(tmp_path / "a.log")
        assert checkpoint.oldest_unsettled_at() == 1_790_000_000


def test_a_record_that_is_being_written_is_not_torn(bench: Bench, tmp_path: Path) -> None:
    """A container runtime cuts what is long into lines: one that goes on behind the last is left, like a torn line."""
    lines, path = lines_of(3), tmp_path / "0.log"
    cri = b"2026-11-21T10:00:00.1Z stdout %c "
    data = b"".join(cri % b"F" + line for line in lines[:2]) + cri % b"P" + lines[2][:900] + b"\n"
    path.write_bytes(data)
    assert bench.replay(path).results[0].outcome is Outcome.UNFINISHED
    path.write_bytes(data + cri % b"F" + lines[2][900:])
    assert bench.replay(path).results[0].outcome is Outcome.DELIVERED
    assert Counter(bench.endpoint.ids()) == Counter(expected_ids(lines))


def test_a_dry_run_of_copies_that_end_within_a_record_ends(bench: Bench, tmp_path: Path) -> None:
    begun = b"2026-11-21T10:00:00.1Z stdout P " + lines_of(1)[0]
    for name in ("a.gz", "b.gz"):
        (tmp_path / name).write_bytes(gzip.compress(begun * 400, 1)[:-4])
    with ReplayState(bench.site.state, dry_run=True) as state:
        plan = look_around(bench.config, state, [str(tmp_path / "*.gz")], Scope())
        assert not dry_run(bench.config, state, plan, lambda _: None).events


def test_claims_of_a_replay_that_was_killed_hold_up_nobody(bench: Bench, tmp_path: Path) -> None:
    """Another one, of other files, begins: what the killed one was at work on is no more being replayed."""
    (tmp_path / "a.log").write_bytes(b"".join(lines_of(3)))
    with ReplayState(bench.site.state) as state:
        (seen,) = (file.survey for file in look_around(bench.config, state, [str(tmp_path / "a.log")], Scope()).files)
        assert state.claim(seen, Step(0, seen.content_bytes), Scope()) is not None
        assert [each.replaying is None for each in state.look_up(seen.heads, seen.identity)] == [False]
    with ReplayState(bench.site.state) as state:
        assert [each.replaying is None for each in state.look_up(seen.heads, seen.identity)] == [True]


def test_what_run_takes_over_between_plan_and_claim_is_left_to_it(bench: Bench, tmp_path: Path) -> None:
    """Also while it does not get on with it."""
    lines, path = lines_of(40), tmp_path / "a.log"
    path.write_bytes(b"".join(lines[:20]))
    bench.replay(path)
    path.write_bytes(b"".join(lines))
    with ReplayState(bench.site.state) as state, Checkpoint(bench.site.state) as of_run:
        plan = look_around(bench.config, state, [str(path)], Scope())
        (record,) = plan.files[0].survey.records
        assert plan.to_send and of_run.take_over(record)
        done = Replay(bench.config, bench.endpoint.url, state, plan)
        asyncio.run(asyncio.wait_for(done.run(), 5))
    assert done.results[0].outcome is Outcome.LEFT_TO_RUN
    bench.assert_exact(lines[:20])


def test_a_copy_of_the_beginning_of_what_was_rotated_is_known(bench: Bench, tmp_path: Path) -> None:
    lines, path = lines_of(40), tmp_path / "a.log"
    path.write_bytes(b"".join(lines))
    with StateLock(bench.site.state), Checkpoint(bench.site.state) as checkpoint:
        (file_id,) = checkpoint.register(
            [NewFile(str(path), path.stat().st_dev, path.stat().st_ino, Sample.of(lines[0]))]
        )
        checkpoint.commit([Settled(file_id, path.stat().st_size, path.read_bytes()[-256:])])
    path.rename(tmp_path / "a.log.1")
    path.write_bytes(b"")
    (tmp_path / "copy.gz").write_bytes(gzip.compress(b"".join(lines[:10])))
    assert bench.replay(tmp_path / "copy.gz").results[0].outcome is Outcome.ALREADY_DELIVERED


def test_what_takes_the_place_of_a_file_is_not_sent_for_it(bench: Bench, tmp_path: Path) -> None:
    """A rotation between plan and reading: nobody looked at that file, and nobody was asked about it."""
    (tmp_path / "a.log").write_bytes(b"".join(lines_of(20)))
    with ReplayState(bench.site.state) as state:
        plan = look_around(bench.config, state, [str(tmp_path / "a.log")], Scope())
        (tmp_path / "a.log").write_bytes(b"".join(lines_of(30, seed=2)))
        done = Replay(bench.config, bench.endpoint.url, state, plan)
        asyncio.run(asyncio.wait_for(done.run(), 5))
    assert done.results[0].outcome is Outcome.CHANGED and done.exit_code == 3
    assert not bench.endpoint.ids()
