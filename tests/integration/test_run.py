"""`run` as its user knows it: signals, outages, rotation, status, and the lock."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

from metershipper.books import Count
from metershipper.traffic import Traffic
from tests.integration.support import FaultyEndpoint, Site, TimedStore, append, expected_ids, stop, wait_until


def lines_of(seed: int, count: int) -> list[bytes]:
    traffic = Traffic(seed, started_at_ms=1_790_000_000_000)
    return [traffic.line() for _ in range(count)]


def test_an_outage_loses_nothing_and_recovers_by_itself(tmp_path: Path) -> None:
    """No endpoint at all, then one (case 39): everything arrives without a restart."""
    lines = lines_of(1, 400)
    with FaultyEndpoint() as endpoint:
        port, url = endpoint.port, endpoint.url
    site = Site(tmp_path, url)
    append(site.log, *lines)
    with site.running() as process:
        wait_until(lambda: "nothing listens there" in site.errors.read_text(), lambda: site.story(process))
        with FaultyEndpoint(port=port) as endpoint:
            site.wait_for_lines(process, len(lines))
            assert stop(process) == 0
            assert Counter(endpoint.ids()) == Counter(expected_ids(lines))


def test_a_stop_during_an_outage_ends_within_grace_and_leaves_the_rest_for_next_time(tmp_path: Path) -> None:
    """SIGTERM with a dead endpoint: exit 0 after the grace period, and the next start delivers (case 51)."""
    lines = lines_of(2, 200)
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        endpoint.answering.clear()
        append(site.log, *lines)
        with site.running("--grace-seconds", "0.2") as process:
            wait_until(lambda: endpoint.requests > 0, lambda: site.story(process))
            assert stop(process) == 0
        assert f"{len(expected_ids(lines))} events left for the next start" in site.errors.read_text()
        endpoint.answering.set()
        with site.running() as process:
            site.wait_for_lines(process, len(lines))
            assert stop(process) == 0
        assert Counter(endpoint.ids()) == Counter(expected_ids(lines))


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    """The second SIGTERM does not wait for the endpoint; exit code 1 tells that something was left (case 51)."""
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        endpoint.answering.clear()
        append(site.log, *lines_of(3, 50))
        with site.running("--grace-seconds", "3000") as process:
            wait_until(lambda: endpoint.requests > 0, lambda: site.story(process))
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: "SIGTERM: stopping" in site.errors.read_text(), lambda: site.story(process))
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 1
        assert "stopped at once" in site.errors.read_text()
        endpoint.answering.set()


def test_rotation_finishes_the_old_file_first(tmp_path: Path) -> None:
    """Rename-rotation live and while stopped: every line once, in the order in which Kong wrote them (cases 5-8)."""
    lines = lines_of(4, 900)
    with FaultyEndpoint() as endpoint:
        # One batch in flight at a time: the order of arrival is the order of reading.
        site = Site(tmp_path, endpoint.url)
        site.config.write_text(site.config.read_text().replace("[openmeter]\n", "[openmeter]\nmax_in_flight = 1\n", 1))
        append(site.log, *lines[:300])
        with site.running() as process:
            site.wait_for_lines(process, 100)
            site.log.rename(f"{site.log}.1")
            append(Path(f"{site.log}.1"), *lines[300:400])  # Kong still has the old file open
            append(site.log, *lines[400:500])
            site.wait_for_lines(process, 500)
            assert stop(process) == 0
        append(site.log, *lines[500:600])
        Path(f"{site.log}.1").rename(f"{site.log}.2")
        site.log.rename(f"{site.log}.1")
        append(site.log, *lines[600:700])
        Path(f"{site.log}.2").rename(f"{site.log}.3")
        Path(f"{site.log}.1").rename(f"{site.log}.2")
        site.log.rename(f"{site.log}.1")
        append(site.log, *lines[700:])
        for age, path in enumerate(sorted(tmp_path.glob("usage.log*"), reverse=True)):
            os.utime(path, (1_790_000_000 + age, 1_790_000_000 + age))
        with site.running() as process:
            site.wait_for_lines(process, len(lines))
            assert stop(process) == 0
        assert endpoint.ids() == expected_ids(lines)
        assert endpoint.store.counts()["repeats"] == 0


def test_globs_follow_many_files_and_new_ones(tmp_path: Path) -> None:
    """Several logs under one glob, one of them created while running (case 19)."""
    lines = lines_of(5, 300)
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        site.config.write_text(site.config.read_text().replace("usage.log", "*.log"))
        site.errors = tmp_path / "errors.txt"
        append(tmp_path / "a.log", *lines[:100])
        append(tmp_path / "b.log", *lines[100:200])
        with site.running() as process:
            site.wait_for_lines(process, 200)
            append(tmp_path / "c.log", *lines[200:])
            site.wait_for_lines(process, 300)
            assert stop(process) == 0
        assert Counter(endpoint.ids()) == Counter(expected_ids(lines))


def test_bad_lines_become_dead_letters_and_cost_no_good_one(tmp_path: Path) -> None:
    """Guarantee 3, for lines: what is no entry is kept aside, the entries around it are billed (case 4)."""
    lines = lines_of(6, 20)
    bad = [b"not json\n", b'{"no":"entry"}\n', b"\xff\xfe\n", b"[" * 5000 + b"\n", lines[0][:200] + b"\n", b"\n"]
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        append(site.log, *[line for pair in zip(lines, bad, strict=False) for line in pair], *lines[len(bad) :])
        with site.running() as process:
            site.wait_for_lines(process, len(lines) + len(bad))
            assert stop(process) == 0
        books = site.books()
        assert Counter(endpoint.ids()) == Counter(expected_ids(lines))
        assert books.balanced
        assert books.by_reason("dead_letters.") == {"not_json": 4, "not_an_entry": 1}
        assert books.by_reason("skipped.")["blank_line"] == 1


def test_status_reads_the_state_while_run_runs(tmp_path: Path) -> None:
    """`status` beside a running process: its id, positions, lag and balanced books."""
    lines = lines_of(7, 120)
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        append(site.log, *lines)
        command = [sys.executable, "-m", "metershipper", "status", "-c", str(site.config)]
        with site.running() as process:
            site.wait_for_lines(process, len(lines))
            append(site.log, b'{"request":')  # not a line yet
            report = json.loads(subprocess.check_output([*command, "--json"]))
            assert report["running"] is True
            assert report["process_id"] == process.pid
            (file,) = report["files"]
            written = sum(map(len, lines))
            assert file == {
                "path": str(site.log),
                "position_bytes": written,
                "size_bytes": written + 11,
                "unread_bytes": 11,
            }
            assert report["books"]["lines"] == len(lines)
            assert report["books"]["balanced"] is True
            assert stop(process) == 0
        text = subprocess.check_output(command, text=True)
        assert "not running" in text
        assert f"{len(lines)} lines: " in text


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    """One state directory, one process: the second exits 2 and names both; a kill leaves no lock (case 34)."""
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        append(site.log, *lines_of(8, 10))
        with site.running() as process:
            site.wait_for_lines(process, 10)
            second = subprocess.run(
                [sys.executable, "-m", "metershipper", "run", "-c", str(site.config)], capture_output=True, text=True
            )
            assert second.returncode == 2
            assert f"{site.state}: in use by process {process.pid}" in second.stderr
            assert "Traceback" not in second.stderr
            process.kill()
            process.wait()
        with site.running() as process:
            append(site.log, *lines_of(9, 10))
            site.wait_for_lines(process, 20)
            assert stop(process) == 0


def test_the_token_is_found_nowhere_but_in_its_header(tmp_path: Path) -> None:
    """Case 70: not in the log, the state, the process list, nor in what `check` and `status` print."""
    token = "spat_not-for-anyone-else"
    with FaultyEndpoint(rate=0.5) as endpoint:
        site = Site(tmp_path, endpoint.url)
        (tmp_path / "token").write_text(token + "\n")
        (tmp_path / "token").chmod(0o600)
        site.config.write_text(
            site.config.read_text().replace("[openmeter]\n", f'[openmeter]\napi_token_file = "{tmp_path}/token"\n', 1)
        )
        append(site.log, *lines_of(10, 100), b"not json\n")
        with site.running() as process:
            site.wait_for_lines(process, 101)
            assert token not in Path(f"/proc/{process.pid}/cmdline").read_text()
            assert stop(process) == 0
        for command in ("check", "status"):
            shown = subprocess.run(
                [sys.executable, "-m", "metershipper", command, "-c", str(site.config)], capture_output=True
            )
            assert shown.returncode == 0
            assert token.encode() not in shown.stdout + shown.stderr
    assert token not in site.errors.read_text()
    for path in site.state.iterdir():
        assert token.encode() not in path.read_bytes()
        assert path.stat().st_mode & 0o077 == 0, path
    assert site.state.stat().st_mode & 0o077 == 0


def test_a_state_that_can_not_be_written_for_a_while_costs_nothing(tmp_path: Path) -> None:
    """Case 33, by a lock in place of a full disk: it says so, goes on delivering, and records everything afterwards."""
    lines = lines_of(11, 60)
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        append(site.log, *lines[:30])
        with site.running() as process:
            site.wait_for_lines(process, 30)
            with closing(sqlite3.connect(site.state / "checkpoint.sqlite", isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                append(site.log, *lines[30:])
                words = "positions can't be written (database is locked); nothing is lost, trying again"
                wait_until(lambda: words in site.errors.read_text(), lambda: site.story(process))
                assert site.books()[Count.LINES] == 30
                assert len(endpoint.ids()) == len(expected_ids(lines))
                other.execute("ROLLBACK")
            site.wait_for_lines(process, 60)
            assert stop(process) == 0
        assert site.books().balanced
        assert endpoint.store.counts()["repeats"] == 0


def test_new_lines_and_new_files_are_acknowledged_soon(tmp_path: Path) -> None:
    """Promised are 0.3 s beyond `max_wait_seconds`, and 1 s for a file that is new under a glob (cases 1, 19).

    What is asserted leaves room for a busy machine; `tests/benchmarks/idle.py` measures.
    """
    traffic, store = Traffic(9, started_at_ms=1_790_000_000_000), TimedStore()
    with FaultyEndpoint(store=store) as endpoint:
        site = Site(tmp_path, endpoint.url)
        site.config.write_text(site.config.read_text().replace(str(site.log), f"{tmp_path}/usage*.log"))
        append(site.log, traffic.line())
        with site.running() as process:
            site.wait_for_lines(process, 1)
            for number in range(10):
                lines = [traffic.line() for _ in range(5)]
                written = time.monotonic_ns()
                append(tmp_path / f"usage{'-new' if number == 5 else ''}.log", *lines)
                site.wait_for_lines(process, 1 + 5 * (number + 1))
                accepted = max(store.accepted[each] for each in expected_ids(lines))
                assert (accepted - written) / 1e9 < 2.5
            assert stop(process) == 0
