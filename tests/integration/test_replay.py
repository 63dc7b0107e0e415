"""Replay: archives are delivered once and only once, whatever interrupts it, and whatever else reads the same content.

Real files, real processes, real HTTP over loopback. Numbers are those of the cases.
"""

import asyncio
import gzip
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import zstandard

from metershipper.books import Books, Count
from metershipper.config import Config, load_config
from metershipper.replay import Replay
from metershipper.replay_command import deliver, look_around
from metershipper.replay_plan import Plan
from metershipper.replay_report import result_as_dict
from metershipper.replay_state import ReplayState
from metershipper.scope import Scope
from metershipper.traffic import Traffic
from tests.integration.support import (
    FaultyEndpoint,
    Received,
    Reply,
    Site,
    append,
    expected_ids,
    stop,
    unmeasured,
    wait_until,
)

DAY_MS = 86_400_000


def lines_of(seed: int, count: int, days_ago: float = 10) -> list[bytes]:
    """Entries of some days ago, within any dedupe window unless they are to be older."""
    traffic = Traffic(seed, started_at_ms=int(time.time() * 1000 - days_ago * DAY_MS))
    return [traffic.line() for _ in range(count)]


def joined(months: list[list[bytes]]) -> list[bytes]:
    return list(chain.from_iterable(months))


def replay(site: Site, *words: str | Path, code: int = 0) -> dict[str, Any]:
    """A replay to its end, as its JSON document."""
    done = site.command("replay", "--json", *map(str, words))
    assert done.returncode == code, (done.returncode, done.stdout[-2000:], done.stderr[-3000:])
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def findings(document: dict[str, Any]) -> list[str]:
    return [file["finding"] for file in document["plan"]["files"]]


def outcomes(document: dict[str, Any]) -> list[str]:
    return [file["outcome"] for file in document["result"]["files"]]


def contents(site: Site) -> dict[str, bytes]:
    """The state directory, but for the empty files that SQLite makes for a reader."""
    return {each.name: each.read_bytes() for each in site.state.iterdir() if not each.name.endswith(("-wal", "-shm"))}


def assert_exact(endpoint: FaultyEndpoint, lines: list[bytes], repeats: int = 0) -> None:
    assert Counter(endpoint.ids()) == Counter(expected_ids(lines))
    assert endpoint.store.counts()["repeats"] == repeats


def assert_balanced(books: Books, lines: int) -> None:
    assert books[Count.LINES] == lines
    assert books.balanced and books.events_balanced


def wait_for_requests(endpoint: FaultyEndpoint, count: int, site: Site, process: "Popen[bytes]") -> None:
    wait_until(lambda: endpoint.requests >= count or process.poll() is not None, lambda: site.story(process))


def test_archives_are_delivered_once_and_a_second_run_says_so(tmp_path: Path) -> None:
    """Case 62: plain, multi-member gzip, zstd, and a copy in the same list; then again, renamed and compressed anew."""
    archive = tmp_path / "archive"
    archive.mkdir()
    months = [lines_of(seed, 300, 25 - 5 * seed) for seed in range(3)]
    members = [gzip.compress(b"".join(months[0][at : at + 100])) for at in range(0, 300, 100)]
    (archive / "zz-oldest.gz").write_bytes(b"".join(members))
    (archive / "b.zst").write_bytes(zstandard.compress(b"".join(months[1])))
    (archive / "a.log").write_bytes(b"".join(months[2]))
    (archive / "copy.log.gz").write_bytes(gzip.compress(b"".join(months[2])))
    (archive / ".hidden").write_bytes(b"x")
    (archive / "notes.txt").write_bytes(b"no log\n")
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        first = replay(site, archive)
        assert findings(first) == ["new", "new", "new", "copy"]
        assert [Path(file["path"]).name for file in first["plan"]["files"]] == [
            *("zz-oldest.gz", "b.zst", "a.log", "copy.log.gz")
        ]
        assert {Path(each["path"]).name for each in first["plan"]["passed_over"]} == {".hidden", "notes.txt"}
        assert outcomes(first) == ["delivered"] * 3 + ["already delivered"]
        assert first["result"]["books"]["lines"] == 900
        assert first["result"]["exit_code"] == 0
        assert_exact(endpoint, joined(months))
        assert set(endpoint.ids()[:300]) <= set(expected_ids(months[0]))  # the oldest first
        assert_balanced(site.books(), 900)

        requests = endpoint.requests
        again = site.command("replay", str(archive))
        assert again.returncode == 0
        assert "already delivered" in again.stdout
        (archive / "b.zst").write_bytes(gzip.compress(b"".join(months[1])))
        (archive / "a.log").rename(archive / "renamed")
        document = replay(site, str(archive / "[!n]*"))
        assert findings(document) == ["delivered"] * 4
        assert endpoint.requests == requests
        assert_balanced(site.books(), 900)


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_nine_inside_a_gz_resumes_there(tmp_path: Path, workers: int) -> None:
    """Cases 28, 30, 65: SIGKILL at random instants under faults: every event, exact books, from where it was."""
    luck = random.Random(workers)
    archive = [tmp_path / f"usage.log.{number}.gz" for number in range(3)]
    months = [lines_of(seed, 1000) for seed in range(3)]
    for path, lines in zip(archive, months, strict=True):
        path.write_bytes(gzip.compress(b"".join(lines), 1))
    words = [*map(str, archive), "--workers", str(workers)]
    with FaultyEndpoint(rate=0.1) as endpoint:
        site = Site(tmp_path, endpoint.url, environment=unmeasured())
        for _ in range(4):
            with site.replaying(*words) as process:
                wait_for_requests(endpoint, endpoint.requests + luck.randrange(1, 40), site, process)
                time.sleep(luck.uniform(0, 0.2))
                process.kill()
        done = replay(site, *words)
        assert set(outcomes(done)) <= {"delivered", "already delivered"}
        assert Counter(endpoint.ids()) == Counter(expected_ids(joined(months)))
        assert_balanced(site.books(), 3000)
        assert endpoint.requests < 5 * len(endpoint.ids()) / 50  # it did not begin anew each time
        requests = endpoint.requests
        assert set(findings(replay(site, *words))) == {"delivered"}
        assert endpoint.requests == requests


def test_what_run_shipped_live_is_not_sent_again(tmp_path: Path) -> None:
    """Case 62: moved to an archive under another name and compressed; `run` may have been stopped in the middle."""
    lines = lines_of(1, 400)
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        append(site.log, *lines[:200])
        with site.running() as process:
            site.wait_for_lines(process, 200)
            assert stop(process) == 0
        archive = tmp_path / "archive"
        archive.mkdir()
        append(site.log, *lines[200:])
        (archive / "kong-may.zst").write_bytes(zstandard.compress(b"".join(lines)))
        (archive / "kong-may-begun.gz").write_bytes(gzip.compress(b"".join(lines[:150])))
        planned = replay(site, archive)
        assert sorted(findings(planned)) == ["delivered", "partly delivered"]
        assert_exact(endpoint, lines)
        # The other way round: `run` knows what was replayed of its log, and reads on behind it.
        more = lines_of(2, 50)
        append(site.log, *more)
        with site.running() as process:
            site.wait_for_lines(process, 450)
            assert stop(process) == 0
        assert_exact(endpoint, lines + more)
        assert_balanced(site.books(), 450)


def test_replay_and_run_side_by_side_send_nothing_twice(tmp_path: Path) -> None:
    """Replay beside a running sidecar: same state, and what either has read the other leaves alone."""
    live, old, unread = lines_of(1, 200), lines_of(2, 2000), lines_of(3, 100)
    late, later = lines_of(4, 10), lines_of(5, 10)
    archive = tmp_path / "archive"
    archive.mkdir()
    (archive / "old.gz").write_bytes(gzip.compress(b"".join(old)))
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        append(site.log, *live)
        with site.running() as process:
            site.wait_for_lines(process, 200)
            # Slow enough for another one to be started meanwhile, also on a busy machine.
            with site.replaying(str(archive), "--limit-events-per-second", "500") as replaying:
                wait_for_requests(endpoint, endpoint.requests + 5, site, replaying)
                # `run` meets, as rotated files of its log, what is being replayed: it leaves that alone.
                (tmp_path / "usage.log.1").write_bytes(b"".join(old))
                refused = site.command("replay", str(archive))
                assert refused.returncode == 2 and "one replay at a time" in refused.stderr
                assert replaying.wait(60) == 0, site.errors.read_text()[-3000:]
            endpoint.answering.clear()
            append(site.log, *unread)
            wait_until(lambda: endpoint.requests > 0 and not endpoint.answering.is_set())
            left = replay(site, site.log, code=3)
            assert findings(left) == ["left to run"]
            assert "left to it" in " ".join(left["plan"]["warnings"])
            endpoint.answering.set()
            site.wait_for_lines(process, 2300)
            shutil.copy(archive / "old.gz", tmp_path / "usage.log.2.gz")
            append(site.log, *late)
            site.wait_for_lines(process, 2310)
            assert stop(process) == 0
        assert_exact(endpoint, live + old + unread + late)
        with site.running() as process:  # a new process, which looks at all of them again
            append(site.log, *later)
            site.wait_for_lines(process, 2320)
            assert stop(process) == 0
        assert_exact(endpoint, live + old + unread + late + later)
        assert_balanced(site.books(), 2320)


def test_overlapping_filters_send_each_event_once(tmp_path: Path) -> None:
    """By subject, by overlapping periods, and then everything: each event once, bad lines are one dead letter."""
    lines = lines_of(1, 600)
    lines.insert(300, b'{"torn": \n')
    path = tmp_path / "old.log"
    path.write_bytes(b"".join(lines))
    first, last = (json.loads(line)["started_at"] for line in (lines[0], lines[-1]))
    middle = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime((first + last) / 2000))
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        acme = replay(site, path, "--subject", "acme", code=3)  # the torn line is a dead letter
        assert acme["result"]["books"]["skipped"]["other_subject"] > 0
        assert acme["result"]["books"]["dead_letters"] == {"not_json": 1}
        assert findings(replay(site, path, "--subject", "acme")) == ["delivered"]
        early = replay(site, path, "--until", middle)
        assert findings(early) == ["new"]
        assert early["result"]["books"]["skipped"]["outside_period"] > 0
        assert early["result"]["books"]["skipped"]["already_delivered"] > 1
        rest = replay(site, path)
        assert rest["result"]["books"]["balanced"]
        assert_exact(endpoint, lines)
        assert len(site.letters()) == 1
        requests = endpoint.requests
        assert findings(replay(site, path, "--since", middle)) == ["delivered"]
        assert endpoint.requests == requests


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_damaged_archive_ships_what_unpacks_and_resumes_when_mended(tmp_path: Path, compression: str) -> None:
    """Case 29: truncated, or corrupt in the middle: exit 3, file and offset named, not complete."""
    traffic = Traffic(1, started_at_ms=1_790_000_000_000)  # the same in every test: so is what the damage does
    lines = [traffic.line() for _ in range(600)]
    whole = b"".join(lines)
    packed = gzip.compress(whole, 1) if compression == "gzip" else zstandard.ZstdCompressor(level=1).compress(whole)
    path = tmp_path / "usage.log.9"
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        path.write_bytes(packed[: len(packed) * 2 // 3])
        document = replay(site, path, "--yes", code=3)
        assert outcomes(document) == ["damaged"]
        (remark,) = document["result"]["remarks"]
        assert f"{path}: damaged (" in remark and "from byte " in remark
        corrupt, at = bytearray(packed), len(packed) * 5 // 6
        corrupt[at : at + 64] = bytes(64)
        path.write_bytes(bytes(corrupt))
        assert outcomes(replay(site, path, "--yes", code=3)) == ["damaged"]
        path.write_bytes(packed)
        assert findings(replay(site, path)) == ["partly delivered"]  # the rest of what was begun: nobody is asked
        assert_exact(endpoint, lines)
        assert site.books()[Count.LINES] == 600


def test_a_bomb_does_not_exhaust_memory(tmp_path: Path) -> None:
    """Case 29: what unpacks to hundreds of megabytes without a newline is stepped over in bounded memory."""
    lines = lines_of(1, 20)
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    packed = [packer.compress(b"".join(lines[:10]))]
    packed += [packer.compress(b"x" * 2**20) for _ in range(400)]
    (tmp_path / "bomb.zst").write_bytes(
        b"".join([*packed, packer.compress(b"\n" + b"".join(lines[10:])), packer.flush()])
    )
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        with site.replaying(str(tmp_path / "bomb.zst"), "--yes") as process:
            largest = 0  # of what was ever resident, in kilobytes; what wait4 tells has the parent's in it
            while process.poll() is None:
                if found := re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text()):
                    largest = int(found[1])
        assert process.returncode == 3, site.errors.read_text()[-3000:]
        assert 0 < largest < 250_000
        assert_exact(endpoint, lines)
        assert [letter.reason for letter in site.letters()] == ["line_too_long"]


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_stops_cleanly_and_the_same_command_resumes(tmp_path: Path, workers: int) -> None:
    """Case 65: what is in flight finishes, nothing is sent twice, and it says how to go on."""
    lines = lines_of(1, 4000)
    path = tmp_path / "old.gz"
    path.write_bytes(gzip.compress(b"".join(lines), 1))
    words = (str(path), "--workers", str(workers))
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        with site.replaying(*words, "--limit-events-per-second", "3000") as process:
            wait_for_requests(endpoint, 20, site, process)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 3, site.errors.read_text()[-3000:]
        told = site.errors.read_text()
        assert "the same command goes on where this one was" in told and "Traceback" not in told
        position = site.books()[Count.LINES]
        assert 0 < position < 4000
        done = replay(site, *words)
        assert findings(done) == ["partly delivered"]
        assert done["result"]["books"]["lines"] == 4000 - position
        assert_exact(endpoint, lines)
        assert_balanced(site.books(), 4000)


@pytest.mark.parametrize("force", [False, True])
def test_a_stop_ends_also_while_the_endpoint_is_down_and_processes_wait(tmp_path: Path, *, force: bool) -> None:
    """Case 65: their pipes are full then. The grace is what a first signal takes, a second one ends it at once."""
    (tmp_path / "old.log").write_bytes(b"".join(lines_of(1, 6000)))
    site = Site(tmp_path, "http://127.0.0.1:9/api/v1/events")

    async def stopped(replay: Replay) -> float:
        running = asyncio.create_task(replay.run())
        entries = -1
        while entries < replay.tally.entries or not entries:  # until the pipes are full
            entries = replay.tally.entries
            await asyncio.sleep(0.5)
        assert entries < 6000
        began = time.monotonic()
        (replay.stop_now if force else replay.stop)()
        await asyncio.wait_for(running, 10)
        assert replay.was_stopped
        return time.monotonic() - began

    with planned(site, tmp_path / "old.log") as (config, state, plan):
        replay = Replay(config, site.url, state, plan, workers=2, grace_seconds=60.0 if force else 0.2)
        assert asyncio.run(asyncio.wait_for(stopped(replay), 30)) < 5


@pytest.mark.parametrize("workers", [1, 2])
def test_after_a_stop_the_limit_holds_and_only_what_is_in_flight_is_sent(tmp_path: Path, workers: int) -> None:
    """However far the processes are ahead; and nothing of it is sent twice by the same command."""
    lines = lines_of(1, 4000)
    (tmp_path / "old.log").write_bytes(b"".join(lines))
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)

        async def sent_after_stop(replay: Replay) -> tuple[int, float]:
            running = asyncio.create_task(replay.run())
            while replay.tally.acknowledged < 200 and not running.done():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)  # for the processes to be ahead
            before, began = replay.tally.acknowledged, time.monotonic()
            replay.stop()
            await asyncio.wait_for(running, 20)
            return replay.tally.acknowledged - before, time.monotonic() - began

        with planned(site, tmp_path / "old.log") as (config, state, plan):
            done = Replay(config, site.url, state, plan, workers=workers, events_per_second=500)
            events, seconds = asyncio.run(asyncio.wait_for(sent_after_stop(done), 30))
            assert done.was_stopped
            batches = config.openmeter.batch.max_events * (2 * config.openmeter.max_in_flight + 1)
            assert events <= 500 * seconds + batches and seconds < 7
        replay(site, tmp_path / "old.log")
        assert_exact(endpoint, lines)
        assert_balanced(site.books(), 4000)


@contextmanager
def planned(site: Site, path: Path) -> Iterator[tuple[Config, ReplayState, Plan]]:
    """What a replay within this process needs."""
    config = load_config(site.config)
    with ReplayState(site.state) as state:
        yield config, state, look_around(config, state, [str(path)], Scope())


def test_a_dry_run_sends_nothing_and_changes_nothing(tmp_path: Path) -> None:
    """Case 65: totals per type, subject, model and day, of what is not delivered yet; also before there is a state."""
    lines = lines_of(1, 200)
    path, twin = tmp_path / "old.log", tmp_path / "twin.gz"
    path.write_bytes(b"".join(lines))
    twin.write_bytes(gzip.compress(b"".join(lines)))
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        document = replay(site, path, twin, "--dry-run")
        assert sum(row["events"] for row in document["totals"]) == len(expected_ids(lines))
        assert {"day", "event_type", "subject", "model", "direction", "events", "tokens"} == set(document["totals"][0])
        assert not site.state.exists()
        path.write_bytes(b"".join(lines[:80]))
        replay(site, path)
        path.write_bytes(b"".join(lines))
        before = contents(site)
        requests = endpoint.requests
        document = replay(site, path, "--dry-run")
        assert document["books"]["lines"] == 120
        shown = site.command("replay", str(path), "--dry-run")
        assert "nothing was sent, nothing was recorded" in shown.stdout
        assert contents(site) == before
        assert endpoint.requests == requests


def test_what_could_be_billed_twice_is_not_sent_without_being_asked(tmp_path: Path) -> None:
    """Case 63: new content, older than the server's window: refused, and what it would be is told; `--yes` sends it."""
    old, young = lines_of(1, 100, days_ago=60), lines_of(2, 100, days_ago=2)
    paths = [tmp_path / "old.log", tmp_path / "young.log"]
    for path, lines in zip(paths, (old, young), strict=True):
        path.write_bytes(b"".join(lines))
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        refused = site.command("replay", *map(str, paths))
        assert refused.returncode == 2
        assert "older than 32 days" in refused.stderr and str(paths[0]) in refused.stderr
        assert str(paths[1]) not in refused.stderr and "--yes" in refused.stderr
        assert endpoint.requests == 0
        replay(site, *paths, "--since", time.strftime("%Y-%m-%d", time.gmtime(time.time() - 5 * 86400)))
        assert_exact(endpoint, young)
        warned = replay(site, *paths, "--yes")
        assert "invoices may be closed" in " ".join(warned["plan"]["warnings"])
        assert "from before a customer's subscription" in " ".join(warned["plan"]["warnings"])
        assert_exact(endpoint, old + young)
        replay(site, *paths)  # delivered by us: nobody is asked
        # Behind what was delivered whole stands what nobody here knows.
        (tmp_path / "both.log").write_bytes(b"".join([*old, *lines_of(3, 50, days_ago=50)]))
        asked = site.command("replay", str(tmp_path / "both.log"))
        assert asked.returncode == 2 and "with content that is not known here" in asked.stderr
        assert "partly delivered" in asked.stdout
        (tmp_path / "both.log").write_bytes(b"".join([*young, *(later := lines_of(4, 50, days_ago=1))]))
        replay(site, tmp_path / "both.log")  # what is younger the server knows
        assert_exact(endpoint, old + young + later)


def test_a_state_that_can_not_be_written_is_told_with_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 1, and the same document as always: the files, what was recorded of them, and why it ended."""
    (tmp_path / "old.log").write_bytes(b"".join(lines_of(1, 50)))

    def commit(*_: Any) -> None:
        raise sqlite3.DatabaseError("disk I/O error")

    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        with planned(site, tmp_path / "old.log") as (config, state, plan):
            monkeypatch.setattr(state, "commit", commit)
            options: dict[str, Any] = {"workers": 1, "events_per_second": None, "grace_seconds": 5.0}
            done = deliver(config, "", state, plan, **options, watch=lambda _: nullcontext())
            result = result_as_dict(done, state)
        assert result["failure"] == "disk I/O error" and result["exit_code"] == 1
        assert [file["outcome"] for file in result["files"]] == ["interrupted"]
        assert result["books"]["lines"] == result["files"][0]["books"]["lines"] == 0


def test_a_worker_that_is_killed_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    """Out of memory, for instance: exit 1, resumable; and no process outlives the parent."""
    months = [lines_of(seed, 3500) for seed in range(2)]
    paths = [tmp_path / f"{number}.gz" for number in range(2)]
    for path, lines in zip(paths, months, strict=True):
        path.write_bytes(gzip.compress(b"".join(lines), 1))
    words = (*map(str, paths), "--workers", "2", "--limit-events-per-second", "4000")
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url, environment=unmeasured())
        with site.replaying(*words, "--json") as process:
            wait_for_requests(endpoint, 2, site, process)
            children = children_of(process.pid)
            assert len(children) == 2
            os.kill(children[0], signal.SIGKILL)
            assert process.wait(60) == 1, site.errors.read_text()[-3000:]
        told = site.errors.read_text()
        assert "SIGKILL: perhaps out of memory" in told.splitlines()[-1]
        document, _ = json.JSONDecoder().raw_decode(told, told.index('{\n  "plan"'))
        assert "SIGKILL" in document["result"]["failure"] and document["result"]["exit_code"] == 1
        assert "interrupted" in outcomes(document) and document["result"]["books"]["lines"] == site.books()[Count.LINES]
        wait_until(lambda: not any(map(is_alive, children)))
        with site.replaying(*words) as process:
            wait_for_requests(endpoint, endpoint.requests + 10, site, process)
            children = children_of(process.pid)
            process.kill()
        wait_until(lambda: not any(map(is_alive, children)))
        done = replay(site, *words[:4])
        assert set(outcomes(done)) <= {"delivered", "already delivered"}
        assert Counter(endpoint.ids()) == Counter(expected_ids(joined(months)))
        assert_balanced(site.books(), 7000)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_changes_while_it_is_read_is_told_and_holds_nothing_up(tmp_path: Path, workers: int) -> None:
    """Cut to nothing in the middle: what was read of it is settled, the other file is delivered, exit 3."""
    cut, other = lines_of(1, 6000, days_ago=3), lines_of(2, 50, days_ago=2)
    (tmp_path / "cut.log").write_bytes(b"".join(cut))
    (tmp_path / "other.log").write_bytes(b"".join(other))
    words = (str(tmp_path / "*.log"), "--workers", str(workers), "--limit-events-per-second", "5000")
    (tmp_path / "site").mkdir()
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path / "site", endpoint.url)
        with site.replaying(*words) as process:
            wait_for_requests(endpoint, 5, site, process)
            os.truncate(tmp_path / "cut.log", 0)
            assert process.wait(60) == 3, site.errors.read_text()[-3000:]
        assert "cut.log: its content is not what it was" in site.errors.read_text()
        assert set(expected_ids(other)) <= set(endpoint.ids())
        assert 0 < site.books()[Count.LINES] < 6050
        assert endpoint.store.counts()["repeats"] == 0
        assert site.books()[Count.ACKNOWLEDGED] == len(endpoint.ids())


def test_an_event_that_fails_to_the_very_end_is_a_dead_letter(tmp_path: Path) -> None:
    """Case 40: when all others are delivered nothing passes any more that would convict it; an empty batch does."""
    lines = lines_of(1, 60)
    poison = expected_ids(lines)[-1]

    def behaviour(request: Received) -> Reply | None:
        return Reply(500, b"too large") if any(event["id"] == poison for event in request.events) else None

    path = tmp_path / "old.log"
    path.write_bytes(b"".join(lines))
    with FaultyEndpoint(behaviour=behaviour) as endpoint:
        site = Site(tmp_path, endpoint.url)
        done = replay(site, path, code=3)
        assert done["result"]["books"]["events.refused"] == 1
        assert outcomes(done) == ["delivered"]
        assert Counter(endpoint.ids()) == Counter(expected_ids(lines)[:-1])
        assert findings(replay(site, path)) == ["delivered"]


def test_on_a_terminal_it_asks_and_shows_how_far_it_is(tmp_path: Path) -> None:
    """Case 63: no is no; and with yes a bar tells of bytes, rates, what is acknowledged, and the time that is left."""
    lines = lines_of(1, 1500, days_ago=90)
    path = tmp_path / "old.log"
    path.write_bytes(b"".join(lines))
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        code, shown = on_a_terminal(site, b"n\n", str(path))
        assert code == 2 and "shall they be sent?" in shown and "nothing was sent" in shown
        assert endpoint.requests == 0
        code, shown = on_a_terminal(site, b"y\n", str(path), "--limit-events-per-second", "3000")
        assert code == 0, shown
        assert "entries/s" in shown and "acknowledged" in shown and "Traceback" not in shown
        assert_exact(endpoint, lines)


@pytest.mark.parametrize("answer", [b"n\n", b"\x03", b"\x04"])
def test_whoever_does_not_say_yes_says_no(tmp_path: Path, answer: bytes) -> None:
    """Ctrl-C and Ctrl-D at the question are a no; and with `--json` it stands below the plan, too."""
    (tmp_path / "old.log").write_bytes(b"".join(lines_of(1, 20, days_ago=90)))
    site = Site(tmp_path, "http://127.0.0.1:9/api/v1/events")
    code, shown = on_a_terminal(site, answer, str(tmp_path / "old.log"), "--json", asked=b"shall they be sent?")
    assert code == 2 and "metershipper: nothing was sent" in shown and "Aborted" not in shown
    plan, _, rest = shown.partition("shall they be sent?")
    assert "old.log" in plan and "to send: " in plan
    assert '"asked": "' in rest


def test_what_is_refused_without_yes_is_a_document_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "old.log").write_bytes(b"".join(lines_of(1, 20, days_ago=90)))
    document = replay(Site(tmp_path, "http://127.0.0.1:9/api/v1/events"), tmp_path / "old.log", code=2)
    assert findings(document) == ["new"] and document["result"] is None
    assert "older than 32 days" in document["asked"] and document["asked"].endswith("shall they be sent?")


@pytest.mark.parametrize("as_json", [False, True])
def test_output_that_nobody_reads_does_not_stop_what_was_agreed_to(tmp_path: Path, *, as_json: bool) -> None:
    """`replay --yes ... | head -n 1`: delivered, and said so; without `--yes` nothing is sent, and that is said."""
    lines, words = lines_of(1, 50, days_ago=90), (["--json"] if as_json else [])
    (tmp_path / "old.log").write_bytes(b"".join(lines))
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        if not as_json:
            code, errors = to_a_closed_pipe(site, str(tmp_path / "old.log"))
            assert code == 1 and "can't be written: Broken pipe; nothing was sent" in errors
        code, errors = to_a_closed_pipe(site, str(tmp_path / "old.log"), "--yes", *words)
        assert code == 0, errors
        assert "can't be written: Broken pipe" in errors and "metershipper status" in errors
        assert "Traceback" not in errors and "Exception ignored" not in errors
        assert_exact(endpoint, lines)


@pytest.mark.parametrize("words", [("--yes",), ("--dry-run",), ("--yes", "--json")])
def test_output_that_can_not_be_written_is_told_in_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    lines = lines_of(1, 50)
    (tmp_path / "old.log").write_bytes(b"".join(lines))
    with FaultyEndpoint() as endpoint, open("/dev/full", "wb") as full:
        site = Site(tmp_path, endpoint.url)
        code, errors = replay_to(full.fileno(), site, str(tmp_path / "old.log"), *words)
        assert code == 1
        (told,) = [line for line in errors.splitlines() if not line.startswith("{")]
        assert told.startswith("metershipper: standard output can't be written: No space left on device; ")
        assert told.endswith("nothing was sent") == (not endpoint.requests) == ("--json" not in words)


def to_a_closed_pipe(site: Site, *words: str) -> tuple[int, str]:
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        return replay_to(theirs, site, *words)
    finally:
        os.close(theirs)


def replay_to(output: int, site: Site, *words: str) -> tuple[int, str]:
    """A replay that prints there: its exit code, and what it said on standard error."""
    command = [sys.executable, "-m", "metershipper", "replay", "-c", str(site.config), *words]
    done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


def on_a_terminal(site: Site, answer: bytes, *words: str, asked: bytes = b"") -> tuple[int, str]:
    """A replay on a terminal of its own; what it showed there. `asked`: what the answer waits for."""
    ours, theirs = os.openpty()
    os.set_blocking(ours, True)
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "150"}
    command = [sys.executable, "-m", "metershipper", "replay", "-c", str(site.config), *words]
    shown = b""
    with Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        try:
            while asked not in shown:
                shown += os.read(ours, 65536)
            time.sleep(0.1 if asked else 0)  # until it reads
            if answer == b"\x03":
                process.send_signal(signal.SIGINT)  # it has no terminal that would
            else:
                os.write(ours, answer)
            while data := os.read(ours, 65536):
                shown += data
        except OSError:
            pass  # the terminal is gone with its last process
        code = process.wait(60)
    os.close(ours)
    return code, shown.decode("utf-8", "replace")


def children_of(process_id: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]


def is_alive(process_id: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process_id}/status").read_text()
    except OSError:
        return False
