"""What can't be read any more is told, and nothing else is. Numbers are those of the cases."""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from metershipper.books import Count
from metershipper.checkpoint import FORGET_AFTER_SECONDS
from metershipper.files import QUIET_SECONDS, ROTATED_IDLE_SECONDS
from metershipper.known import FORGET_EVERY_SECONDS
from metershipper.listing import LISTING_SECONDS
from metershipper.losses import PATIENCE_SECONDS
from metershipper.records import Gap, Lost
from tests.test_files import Site, append, copytruncate, lines, rewrite, rotate

lives = pytest.mark.parametrize("stopped", [False, True], ids=["live", "stopped"])


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.stop()


def old(site: Site, number: int = 1) -> Path:
    return Path(f"{site.log}.{number}")


def look_for_a_while(site: Site) -> bytes:
    """Longer than any rotation takes."""
    got = site.read()
    for _ in range(3):
        site.pass_time(PATIENCE_SECONDS)
        got += site.read()
    return got


def gaps(site: Site) -> list[tuple[int, int | None, Lost]]:
    return [(gap.start_offset, gap.end_offset, gap.reason) for gap in site.checkpoint.gaps()]


def started(site: Site, count: int = 3) -> None:
    """Some lines were read."""
    append(site.log, lines(0, count))
    site.start()
    assert site.read() == lines(0, count)


# Vanished


def test_a_log_that_vanished_while_we_were_stopped_is_told(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Rotated and deleted: nobody knows how much it held, but everybody learns that it is missing (case 9)."""
    started(site)
    site.stop()
    append(site.log, lines(3, 2))
    site.log.rename(site.root / "deleted")
    append(site.log, lines(5))
    site.start()
    assert site.read() == lines(5)
    assert gaps(site) == []
    assert look_for_a_while(site) == b""
    assert gaps(site) == [(len(lines(0, 3)), None, Lost.VANISHED)]
    (told,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert told.message.startswith(f"{site.log}: whatever came after byte {len(lines(0, 3))} can't be read any more")


def test_of_a_rotated_file_it_is_known_how_much_was_lost(site: Site) -> None:
    """Read, but not settled, when the process died; deleted before the next start (cases 9, 30)."""
    append(site.log, lines(0, 3))
    site.start()
    site.files.scan()
    block = site.files.next_block()
    assert block is not None
    site.read(settle=False)
    rotate(site.log)
    append(site.log, lines(10))
    site.read(settle=False)
    site.pass_time(QUIET_SECONDS)
    site.read(settle=False)
    site.stop()
    old(site).unlink()
    site.start()
    assert look_for_a_while(site) == lines(10)
    assert gaps(site) == [(0, len(lines(0, 3)), Lost.VANISHED)]


def test_a_file_deleted_while_it_is_open_is_drained_and_no_loss(site: Site) -> None:
    """(case 17)"""
    started(site)
    with site.log.open("ab") as kong:
        site.log.unlink()
        kong.write(lines(3))
    append(site.log, lines(4))
    assert site.read() == lines(3, 2)
    site.pass_time(QUIET_SECONDS)
    site.read()
    site.restart()
    assert look_for_a_while(site) == b""
    assert gaps(site) == []


def test_a_deleted_file_whose_tail_is_not_settled_is_lost_with_the_process(site: Site) -> None:
    """Its descriptor was the last thing that held it (cases 17, 30)."""
    started(site)
    with site.log.open("ab") as kong:
        kong.write(lines(3))
        kong.flush()
        assert site.read(settle=False) == lines(3)
        site.log.unlink()
        append(site.log, lines(4))
    site.restart()
    assert look_for_a_while(site) == lines(4)
    ((start, _, reason),) = gaps(site)
    assert (start, reason) in {(len(lines(0, 3)), Lost.VANISHED), (len(lines(0, 3)), Lost.TRUNCATED)}


@pytest.mark.parametrize("way", ["volume", "file"])
def test_what_is_found_again_is_taken_back_and_read_on(site: Site, way: str) -> None:
    """A volume that is restored, a file that was only moved away (cases 9, 19, 26)."""
    started(site)
    site.stop()
    append(site.log, lines(3, 2))
    aside = site.root / "aside"
    site.log.rename(aside)
    append(site.log, lines(5))
    site.start()
    assert look_for_a_while(site) == lines(5)
    assert len(gaps(site)) == 1
    if way == "volume":
        shutil.copyfile(aside, old(site))
    else:
        aside.rename(old(site))
    site.pass_time(LISTING_SECONDS)
    assert site.read() == lines(3, 2)
    assert gaps(site) == []
    site.restart()
    assert look_for_a_while(site) == b""
    assert gaps(site) == []


@lives
def test_an_absent_directory_is_no_loss(site: Site, stopped: bool) -> None:
    """A volume that is mounted late, or not there for a while (case 19)."""
    started(site)
    rotate(site.log)
    append(site.log, lines(3))
    assert site.read() == lines(3)
    if stopped:
        site.stop()
    site.logs.rename(site.root / "unmounted")
    if stopped:
        site.start()
    assert look_for_a_while(site) == b""
    site.logs.mkdir()  # the mount point
    assert look_for_a_while(site) == b""
    assert gaps(site) == []
    site.logs.rmdir()
    (site.root / "unmounted").rename(site.logs)
    append(site.log, lines(4))
    assert look_for_a_while(site) == lines(4)
    assert gaps(site) == []


def test_complete_files_and_history_may_be_deleted(site: Site) -> None:
    """That is what rotation is for (cases 9, 17)."""
    append(old(site, 5), lines(100, 3))
    started(site)
    rotate(site.log)
    append(site.log, lines(3))
    assert site.read() == lines(3)
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    site.read()
    old(site, 6).unlink()
    old(site).unlink()
    assert look_for_a_while(site) == b""
    site.restart()
    assert look_for_a_while(site) == b""
    assert gaps(site) == []


def test_a_quiet_rotated_file_may_be_deleted_before_it_is_let_go(site: Site) -> None:
    """`rotate 0`: read to its end and quiet for some seconds is complete (case 17)."""
    started(site)
    rotate(site.log)
    append(site.log, lines(3))
    assert site.read() == lines(3)
    site.pass_time(QUIET_SECONDS)
    site.read()
    site.stop()
    old(site).unlink()
    site.start()
    assert look_for_a_while(site) == b""
    assert gaps(site) == []


def test_a_file_that_is_nowhere_for_a_moment_is_no_loss(site: Site) -> None:
    """Between a rotation's steps (case 27)."""
    started(site)
    site.stop()
    append(site.log, lines(3))
    site.log.rename(site.root / "in-between")
    append(site.log, lines(4))
    site.start()
    assert site.read() == lines(4)
    site.pass_time(PATIENCE_SECONDS - 1)
    assert site.read() == b""
    (site.root / "in-between").rename(old(site))
    assert look_for_a_while(site) == lines(3)
    assert gaps(site) == []


def test_an_unfinished_line_of_a_file_that_vanished_is_a_loss(site: Site) -> None:
    """It was never completed, and never settled (cases 3, 9)."""
    append(site.log, lines(0) + b"torn")
    site.start()
    assert site.read() == lines(0)
    rotate(site.log)
    append(site.log, lines(1))
    assert site.read() == lines(1)
    site.pass_time(QUIET_SECONDS)
    site.read()
    site.stop()
    old(site).unlink()
    site.start()
    assert look_for_a_while(site) == b""
    assert gaps(site) == [(len(lines(0)), len(lines(0)) + 4, Lost.VANISHED)]


def test_a_file_beside_a_directory_that_can_not_be_listed_is_not_missed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be looked at is not known to be gone (case 20)."""
    started(site)
    site.stop()
    site.log.rename(site.root / "aside")
    append(site.log, lines(3))
    scandir = os.scandir

    def refuse(path: str) -> "os._ScandirIterator[str]":
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    site.start()
    assert look_for_a_while(site) == lines(3)
    assert gaps(site) == []
    monkeypatch.setattr(os, "scandir", scandir)
    site.pass_time(LISTING_SECONDS)
    assert look_for_a_while(site) == b""
    assert len(gaps(site)) == 1


def test_a_gap_survives_a_restart_and_is_told_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """(case 9)"""
    started(site)
    site.stop()
    site.log.rename(site.root / "deleted")
    append(site.log, lines(5))
    site.start()
    look_for_a_while(site)
    before = site.checkpoint.gaps()
    assert len(before) == 1
    for _ in range(3):
        site.restart()
        look_for_a_while(site)
        append(old(site, 9), b"")  # the directory changes
        look_for_a_while(site)
    assert site.checkpoint.gaps() == before
    assert len([message for message in caplog.messages if "can't be read any more" in message]) == 1


# Truncated


@lives
def test_a_truncation_with_unread_bytes_and_no_copy_is_told(site: Site, stopped: bool) -> None:
    """(cases 11, 13)"""
    append(site.log, lines(0, 3) + b"begun")
    site.start()
    assert site.read() == lines(0, 3)
    if stopped:
        site.stop()
    rewrite(site.log, lines(50, 9))
    if stopped:
        site.start()
    assert look_for_a_while(site) == lines(50, 9)
    end = None if stopped else len(lines(0, 3)) + 5  # what a process that is gone saw of it, nobody knows
    assert gaps(site) == [(len(lines(0, 3)), end, Lost.TRUNCATED)]


@lives
def test_a_truncation_with_a_copy_is_no_loss(site: Site, stopped: bool) -> None:
    """copytruncate, while we were behind (cases 10, 11)."""
    append(site.log, lines(0, 3) + lines(3)[:5])
    site.start()
    assert site.read() == lines(0, 3)
    if stopped:
        site.stop()
    append(site.log, lines(3)[5:] + lines(4))
    copytruncate(site.log, old(site), lines(50, 9))
    if stopped:
        site.start()
    got = look_for_a_while(site)
    assert sorted(got.splitlines()) == sorted((lines(3, 2) + lines(50, 9)).splitlines())
    assert gaps(site) == []
    site.restart()
    assert look_for_a_while(site) == b""
    assert gaps(site) == []


def test_a_truncation_of_a_log_that_was_read_to_its_end_is_no_loss(site: Site) -> None:
    """As far as anybody can know (case 13)."""
    started(site)
    rewrite(site.log, lines(50, 2))
    assert look_for_a_while(site) == lines(50, 2)
    site.restart()
    assert look_for_a_while(site) == b""
    assert gaps(site) == []


def test_what_was_in_flight_at_a_truncation_without_a_copy_is_lost_with_the_process(site: Site) -> None:
    """Read and not acknowledged, then a crash: the books must not balance over it (cases 11, 30)."""
    started(site)
    append(site.log, lines(3, 2))
    assert site.read(settle=False) == lines(3, 2)
    rewrite(site.log, lines(50))
    assert site.read(settle=False) == lines(50)
    site.restart()
    assert look_for_a_while(site) == lines(50)
    assert gaps(site) == [(len(lines(0, 3)), len(lines(0, 5)), Lost.TRUNCATED)]


# Forgetting


@pytest.fixture
def days(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How many days have passed since everything was written; the test says it."""
    passed = [0.0]
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + passed[0] * 86400)
    return passed


def test_a_file_that_is_gone_for_long_is_forgotten_and_its_books_are_kept(site: Site, days: list[float]) -> None:
    """As long as a server would still know its events again, it is remembered (cases 14, 52)."""
    started(site)
    rotate(site.log)
    append(site.log, lines(3))
    site.read()
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    site.read()
    old(site).unlink()
    site.read()
    days[0] = FORGET_AFTER_SECONDS / 86400 - 1
    append(site.log, lines(4))
    site.pass_time(FORGET_EVERY_SECONDS)
    assert site.read() == lines(4)
    assert len(site.checkpoint.files()) == 2
    days[0] += 2
    site.pass_time(FORGET_EVERY_SECONDS)
    site.read()
    assert [file.position for file in site.checkpoint.files()] == [len(lines(3, 2))]
    assert site.checkpoint.books()[Count.LINES] == 5
    site.restart()
    assert site.read() == b""


def test_what_is_still_there_is_never_forgotten(site: Site, days: list[float]) -> None:
    """Rotated files that are kept for a year, and a log without traffic (case 14)."""
    started(site)
    rotate(site.log)
    append(site.log, lines(3))
    site.read()
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    site.read()
    for _ in range(3):
        days[0] += 100
        site.pass_time(FORGET_EVERY_SECONDS)
        assert site.read() == b""
    site.restart()
    assert site.read() == b""
    assert len(site.checkpoint.files()) == 2


def test_a_log_without_traffic_is_remembered_though_its_volume_is_mounted_late(site: Site, days: list[float]) -> None:
    """It was there all the time: 45 days count from when it was last seen, not from its last line (cases 14, 19)."""
    started(site)
    for _ in range(10):
        days[0] += 5
        site.pass_time(FORGET_EVERY_SECONDS)
        assert site.read() == b""
    site.stop()
    site.logs.rename(site.root / "unmounted")
    site.start()
    assert site.read() == b""
    (site.root / "unmounted").rename(site.logs)
    assert site.read() == b""


def test_gaps_are_kept_longer_than_files(site: Site, days: list[float]) -> None:
    """They are evidence about invoices (case 9)."""
    started(site)
    site.stop()
    site.log.rename(site.root / "deleted")
    append(site.log, lines(5))
    site.start()
    look_for_a_while(site)
    days[0] = 60
    site.pass_time(FORGET_EVERY_SECONDS)
    site.read()
    assert len(site.checkpoint.files()) == 1
    (gap,) = site.checkpoint.gaps()
    assert isinstance(gap, Gap) and gap.reason is Lost.VANISHED
    look_for_a_while(site)
    days[0] = 401
    site.pass_time(FORGET_EVERY_SECONDS)
    site.read()
    assert site.checkpoint.gaps() == []
