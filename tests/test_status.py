"""`status`: what the checkpoint says, in words and as JSON, beside a running process or without one."""

import json
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from metershipper.books import Books, Count, Received
from metershipper.checkpoint import Checkpoint
from metershipper.errors import StateError
from metershipper.ledger import Settled
from metershipper.records import Gap, Lost, NewFile, Sample
from metershipper.spool import Spool
from metershipper.state import REPLAY_LOCK_NAME, StateLock, make_private_directory
from metershipper.status import FileStatus, SpoolStatus, read_status, render


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_private_directory(tmp_path / "state")
    return tmp_path / "state"


def record(checkpoint: Checkpoint, path: Path, position: int = 0, *, history: bool = False) -> int:
    found = path.stat()
    new = NewFile(str(path), found.st_dev, found.st_ino, Sample.of(b"head"), position, history=history)
    return checkpoint.register([new])[0]


def test_positions_and_lag_of_every_followed_file(directory: Path, tmp_path: Path) -> None:
    """Under the name that a file has now; without history and without content that is gone from its place."""
    names = ("usage.log", "usage.log.1", "usage.log.2", "gone.log")
    log, rotated, history, gone = paths = [tmp_path / name for name in names]
    for path in paths:
        path.write_bytes(b"x" * 100)
    with Checkpoint(directory) as checkpoint:
        old = record(checkpoint, log, 90)
        found = log.stat()
        checkpoint.register([NewFile(str(log), found.st_dev, found.st_ino, Sample(), 60, supersedes=old)])
        record(checkpoint, rotated, 100)
        record(checkpoint, history, 100, history=True)
        record(checkpoint, gone, 7)
    rotated.rename(tmp_path / "usage.log.9")
    gone.unlink()
    assert read_status(directory).files == [
        FileStatus(str(log), 60, 100, 40),
        FileStatus(str(tmp_path / "usage.log.9"), 100, 100, 0),
        FileStatus(str(gone), 7, None, None),
    ]


def test_a_file_whose_directory_is_gone_is_gone(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "usage.log").write_bytes(b"x")
    with Checkpoint(directory) as checkpoint:
        record(checkpoint, tmp_path / "logs" / "usage.log", 1)
    (tmp_path / "logs").rename(tmp_path / "elsewhere")
    (file,) = read_status(directory).files
    assert (file.path, file.size_bytes) == (str(tmp_path / "logs" / "usage.log"), None)


def test_a_relative_path_is_looked_for_where_the_process_is(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("usage.log").write_bytes(b"xyz")
    with Checkpoint(directory) as checkpoint:
        record(checkpoint, Path("usage.log"), 1)
    assert read_status(directory).files == [FileStatus("usage.log", 1, 3, 2)]


def test_the_running_process_is_named(directory: Path) -> None:
    with StateLock(directory), Checkpoint(directory):
        assert read_status(directory).process_id == os.getpid()
        assert read_status(directory).as_dict()["running"] is True
    status = read_status(directory)
    assert (status.process_id, status.as_dict()["running"]) == (None, False)


def test_a_replay_is_named_whether_or_not_it_keeps_run_off(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StateLock(directory, REPLAY_LOCK_NAME), Checkpoint(directory):
        for is_held in (False, True):
            with StateLock(directory) if is_held else nullcontext():
                status = read_status(directory)
                assert (status.process_id, status.as_dict()["replaying"]) == (None, os.getpid())
                render(status)
                assert f"not running; process {os.getpid()} is replaying" in capsys.readouterr().out
    assert read_status(directory).replaying is None


def test_the_report_as_json_counts_every_name_and_balances(directory: Path, tmp_path: Path) -> None:
    """lines = billed + skipped + dead-lettered, and every count is there also when it is zero."""
    (tmp_path / "usage.log").write_bytes(b"x" * 100)
    books = Books(
        {
            Count.LINES: 6,
            Count.ENTRIES: 6,
            Count.BILLED: 2,
            Count.EVENTS: 5,
            Count.ACKNOWLEDGED: 4,
            Count.REFUSED: 1,
            "skipped.no_subject": 3,
            "dead_letters.not_json": 1,
        }
    )
    with Checkpoint(directory) as checkpoint:
        file_id = record(checkpoint, tmp_path / "usage.log")
        checkpoint.commit([Settled(file_id, 80, b"x", books)])
    report = json.loads(json.dumps(read_status(directory).as_dict()))
    assert report == {
        "state_directory": str(directory),
        "running": False,
        "process_id": None,
        "replaying": None,
        "gaps": [],
        "oldest_unsettled_seconds": 0,
        "files": [
            {"path": str(tmp_path / "usage.log"), "position_bytes": 80, "size_bytes": 100, "unread_bytes": 20},
        ],
        "books": dict.fromkeys(map(str, Count), 0)
        | {"lines": 6, "entries": 6, "billed": 2, "events": 5, "events.acknowledged": 4, "events.refused": 1}
        | {"skipped": {"no_subject": 3}, "dead_letters": {"not_json": 1}, "balanced": True}
        | {"received": {count.removeprefix("received."): 0 for count in Received}},
        "spool": None,
    }


def test_what_http_log_brought_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Checkpoint(tmp_path) as checkpoint:
        spool = Spool(tmp_path, checkpoint, max_bytes=10_000, repeat_window_seconds=60, max_line_bytes=10_000)
        spool.open()
        spool.store([[b'{"a":1}', b'{"b":2}']])
        checkpoint.commit([Settled(spool.file_id, 8, b"x")])
        checkpoint.count(Books({Received.REQUESTS: 1200, Received.UNAUTHORIZED: 2}))
        spool.close()
    status = read_status(tmp_path)
    assert status.spool == SpoolStatus(size_bytes=16, unread_bytes=8)
    assert status.files == []
    render(status)
    shown = capsys.readouterr().out
    assert "received by http-log: requests 1,200, refused.unauthorized 2; spool: 16 bytes, 8 unread" in shown


def test_the_report_for_people(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file that is there with its numbers, the books, and no markup from a file's name."""
    odd = tmp_path / ("[red]usage" + "-long" * 20 + ".log")
    gone = tmp_path / "gone.log"
    odd.write_bytes(b"x" * 5000)
    gone.write_bytes(b"x")
    with Checkpoint(directory) as checkpoint:
        file_id = record(checkpoint, odd)
        record(checkpoint, gone)
        checkpoint.commit([Settled(file_id, 4000, b"x", Books({Count.LINES: 3, Count.ENTRIES: 3, Count.BILLED: 3}))])
    gone.unlink()
    render(read_status(directory))
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"{directory}: not running"
    rows = out.splitlines()[2:]
    assert {"4,000", "5,000", "1,000"} <= set(" ".join(rows).split())
    assert str(odd) in "".join(row.split(" ")[0] for row in rows)
    assert "and 1 file that is gone" in out
    assert "DO NOT BALANCE" not in out


def test_books_that_do_not_balance_are_shouted(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "usage.log").write_bytes(b"x")
    with StateLock(directory), Checkpoint(directory) as checkpoint:
        file_id = record(checkpoint, tmp_path / "usage.log")
        checkpoint.commit([Settled(file_id, 1, b"x", Books({Count.LINES: 3, Count.ENTRIES: 3, Count.BILLED: 2}))])
        render(read_status(directory))
    out = capsys.readouterr().out
    assert f"running as process {os.getpid()}" in out
    assert "THE BOOKS DO NOT BALANCE" in out


def test_a_directory_where_nothing_was_recorded_is_told(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="nothing was recorded yet"):
        read_status(tmp_path / "state")


def test_a_directory_that_can_not_be_looked_into_is_told(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="can't be read: File name too long"):
        read_status(tmp_path / ("x" * 300))


def test_what_is_lost_is_told_until_it_is_found(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """(case 9)"""
    log = str(tmp_path / "usage.log")
    with Checkpoint(directory) as checkpoint:
        checkpoint.report_gap(Gap(1, log, 40, 100, Lost.VANISHED, 1_790_000_000.5))
        checkpoint.report_gap(Gap(2, f"{log}.2.gz", 7, None, Lost.DAMAGED, 1_790_000_001.0))
        checkpoint.report_gap(Gap(3, log, 1, 2, Lost.TRUNCATED, 1_790_000_002.0))
        checkpoint.withdraw_gap(3)
    status = read_status(directory)
    assert status.as_dict()["gaps"] == [
        {"path": log, "start_offset": 40, "end_offset": 100, "reason": "vanished", "found_at": "2026-09-21T14:13:20Z"},
        {
            "path": f"{log}.2.gz",
            "start_offset": 7,
            "end_offset": None,
            "reason": "damaged",
            "found_at": "2026-09-21T14:13:21Z",
        },
    ]
    render(status)
    out = capsys.readouterr().out
    assert f"LOST: {log}: 60 bytes from byte 40 on can't be read any more: the file is gone" in out
    assert f"LOST: {log}.2.gz: whatever came after byte 7 can't be read any more: the compressed file does" in out


def test_a_compressed_file_has_a_position_in_its_content(directory: Path, tmp_path: Path) -> None:
    """How much of it is left is known once it was read to its end (case 27)."""
    packed = tmp_path / "usage.log.1.gz"
    packed.write_bytes(b"x" * 10)
    with Checkpoint(directory) as checkpoint:
        record(checkpoint, packed, 500)
        (stored,) = checkpoint.files()
        stored = replace(stored, path=str(tmp_path / "usage.log"), compressed=True)
        checkpoint.update(stored)
        assert read_status(directory).files == [FileStatus(str(packed), 500, 10, None)]
        checkpoint.update(replace(stored, seen_bytes=620))
        assert read_status(directory).files == [FileStatus(str(packed), 500, 10, 120)]


def test_a_file_that_was_rotated_into_a_directory_beneath_is_found(directory: Path, tmp_path: Path) -> None:
    """logrotate's `olddir`; a file of another name there only has the inode."""
    log, old = tmp_path / "usage.log", tmp_path / "old"
    old.mkdir()
    log.write_bytes(b"x" * 9)
    with Checkpoint(directory) as checkpoint:
        record(checkpoint, log, 4)
    log.rename(old / "usage.log.1")
    assert read_status(directory).files == [FileStatus(str(old / "usage.log.1"), 4, 9, 5)]
    (old / "usage.log.1").rename(old / "other")
    assert read_status(directory).files == [FileStatus(str(log), 4, None, None)]


def test_how_long_usage_waits_is_told_while_somebody_delivers(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """(case 39)"""
    with StateLock(directory), Checkpoint(directory) as checkpoint:
        checkpoint.note_oldest_unsettled(round(time.time()) - 3600)
        status = read_status(directory)
        assert 3600 <= status.as_dict()["oldest_unsettled_seconds"] <= 3605
        render(status)
        assert "the oldest usage that is not delivered was read 3,60" in capsys.readouterr().out
    assert read_status(directory).oldest_unsettled_seconds == 0
    with StateLock(directory), Checkpoint(directory) as checkpoint:
        assert checkpoint.oldest_unsettled_at() is not None  # a replay, or a retry, opens it too, beside `run`
        checkpoint.note_oldest_unsettled(None)
        assert checkpoint.oldest_unsettled_at() is None
