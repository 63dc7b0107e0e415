"""What `run` makes of content that `replay` delivered, or is delivering: it is read by one of them alone (case 62)."""

import gzip
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from metershipper.file_table import ReplayedMeanwhile
from metershipper.ledger import Settled
from metershipper.listing import LISTING_SECONDS
from metershipper.records import NewFile, Sample
from metershipper.state import REPLAY_LOCK_NAME, StateLock
from tests.test_files import Site, append, lines

DATA = lines(0, 10, width=200)
HEAD = Sample.of(lines(0, 1, width=200))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path).start()
    yield site
    site.stop()


def replayed(site: Site, position: int, *, done: bool = True, scope: str | None = None) -> int:
    """A replay that delivered the beginning of DATA, under whatever name."""
    with site.checkpoint.transaction():
        table = site.checkpoint.replays
        file_id = table.claim(NewFile("/archive/x.gz", 0, 0, HEAD), scope, 4711, [], 0.0)
    assert file_id is not None
    site.checkpoint.commit([Settled(file_id, position, DATA[max(0, position - 256) : position])])
    if done:
        with site.checkpoint.transaction():
            site.checkpoint.replays.leave(file_id, is_whole=True)
    return file_id


def test_a_log_that_was_replayed_is_read_on_behind_it(site: Site) -> None:
    replayed(site, len(DATA))
    append(site.log, DATA + lines(10))
    assert site.read() == lines(10)
    site.restart()
    assert site.read() == b""
    assert site.positions() == {str(site.log): len(DATA + lines(10))}


def test_a_rotated_file_that_was_replayed_is_not_read(site: Site) -> None:
    """Also compressed; and it does not become a reason to read what else was rotated before the log was followed."""
    append(site.log, lines(500))
    assert site.read() == lines(500)
    replayed(site, len(DATA))
    Path(f"{site.log}.2.gz").write_bytes(gzip.compress(DATA))
    site.pass_time(LISTING_SECONDS + 1)
    assert site.read() == b""
    site.log.rename(f"{site.log}.1")
    append(site.log, lines(501))
    assert site.read() == lines(501)
    site.restart()
    assert site.read() == b""


def test_history_stays_history_whatever_was_replayed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of two files from before the log was followed one was replayed: neither is read, one is told."""
    site = Site(tmp_path).start()
    replayed(site, len(DATA))
    append(Path(f"{site.log}.2"), DATA)
    append(Path(f"{site.log}.1"), lines(300))
    append(site.log, lines(500))
    assert site.read() == lines(500)
    told = [record.getMessage() for record in caplog.records if "before its log was first followed" in record.message]
    assert len(told) == 1 and told[0].startswith(f"{site.log}.1: ")
    assert "`metershipper replay` it" in told[0]
    site.stop()


def test_the_end_of_a_log_is_where_it_is_read_from_all_the_same(tmp_path: Path) -> None:
    """`read_from = "end"` leaves out what stands there, replayed or not."""
    site = Site(tmp_path, read_from="end").start()
    replayed(site, len(lines(0, 4, width=200)))
    append(site.log, DATA)
    assert site.read() == b""
    append(site.log, lines(10))
    assert site.read() == lines(10)
    site.stop()


def test_what_is_being_replayed_is_left_alone_until_that_is_done(site: Site) -> None:
    part = len(lines(0, 4, width=200))
    file_id = replayed(site, part, done=False)
    append(site.log, DATA)
    with StateLock(site.state, REPLAY_LOCK_NAME):
        assert site.read() == b""
        site.pass_time(LISTING_SECONDS + 1)
        assert site.read() == b""
        site.checkpoint.commit([Settled(file_id, len(DATA), DATA[-256:])])
        with site.checkpoint.transaction():
            site.checkpoint.replays.leave(file_id, is_whole=True)
        append(site.log, lines(10))
        assert site.read() == lines(10)


def test_what_a_killed_replay_left_is_taken_over(site: Site) -> None:
    """Its lock is free: `run` goes on where it was; the replay, started again, sees that it is its own no more."""
    part = len(lines(0, 4, width=200))
    file_id = replayed(site, part, done=False)
    (before,) = site.checkpoint.replayed(HEAD)
    append(site.log, DATA)
    assert site.read() == DATA[part:]
    assert site.checkpoint.replayed(HEAD) == []
    with site.checkpoint.transaction():
        assert not site.checkpoint.replays.resume(before, HEAD, 4712)
        assert site.checkpoint.replays.claim(NewFile("/a", 0, 0, HEAD), None, 4712, [], 0.0) is None
        assert site.checkpoint.replays.claim(NewFile("/a", 0, 0, HEAD), None, 4712, [file_id], 0.0) is not None


@pytest.mark.parametrize("behind", [b"", lines(10)])
def test_what_was_taken_over_is_known_also_if_it_can_not_be_followed_at_once(
    site: Site, behind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full for a moment, between two transactions: it is not read from its beginning for that."""
    append(site.log, lines(500))
    assert site.read() == lines(500)
    replayed(site, len(DATA))
    Path(f"{site.log}.1").write_bytes(DATA + behind)
    site.pass_time(LISTING_SECONDS + 1)

    def full(_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(site.checkpoint, "update", full)
        with pytest.raises(sqlite3.OperationalError):
            site.read()
    site.pass_time(LISTING_SECONDS + 1)
    assert site.read() == behind


def test_of_two_that_meet_the_same_content_one_reads_it(site: Site) -> None:
    """The replay claims it between the look of `run` and its record; and the other way round."""
    append(site.log, DATA)
    registry = site.checkpoint
    looked_up = registry.replayed(HEAD)
    assert looked_up == []
    file_id = replayed(site, 0, done=False)
    new = NewFile(str(site.log), 1, 2, HEAD, known_replays=frozenset())
    with pytest.raises(ReplayedMeanwhile):
        registry.register([new])
    assert registry.files() == []
    registry.register([replace(new, known_replays=frozenset({file_id}))])
    (record,) = registry.replayed(HEAD)
    assert registry.take_over(record) and not registry.take_over(record)


def test_a_filtered_replay_is_nothing_that_run_knows(site: Site) -> None:
    replayed(site, len(DATA), scope='{"subject": "acme"}')
    append(site.log, DATA)
    assert site.read() == DATA


def test_what_was_replayed_is_no_gap_and_no_followed_log(site: Site) -> None:
    replayed(site, 100, done=False)
    append(site.log, lines(500))
    site.read()
    for _ in range(5):
        site.pass_time(LISTING_SECONDS + 1)
        site.read()
    assert site.checkpoint.gaps() == []
    site.restart()
    assert site.checkpoint.files()[0].path == str(site.log) and len(site.checkpoint.files()) == 1


def test_what_was_replayed_is_remembered_for_longer(site: Site) -> None:
    """It is all that keeps months that no server knows any more from being sent again."""
    replayed(site, len(DATA))
    now = os.stat(site.state).st_mtime
    site.checkpoint.forget([], now + 300 * 86400)
    assert len(site.checkpoint.replayed(HEAD)) == 1
    site.checkpoint.forget([], now + 402 * 86400)
    assert site.checkpoint.replayed(HEAD) == []
