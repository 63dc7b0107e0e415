"""Guarantees 1 and 2: nothing lost, nothing billed twice, and books that are exact, whenever the process dies."""

import random
import threading
from collections import Counter
from pathlib import Path

import orjson
import pytest

from metershipper.books import Count
from metershipper.traffic import Traffic
from tests.integration.support import FaultyEndpoint, Site, append, expected_ids, stop, wait_until

KILLS = 30


class Writer(threading.Thread):
    """Kong: writes entries at a steady pace and rotates the log now and then, until told to stop."""

    def __init__(self, log: Path, lines_per_second: float) -> None:
        super().__init__(daemon=True)
        self.traffic = Traffic(7, started_at_ms=1_790_000_000_000)
        self.lines: list[bytes] = []
        self.rotations = 0
        self._log = log
        self._pause_seconds = 1 / lines_per_second
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(self._pause_seconds * 20):
            lines = [self.traffic.line() for _ in range(20)]
            append(self._log, *lines)
            self.lines += lines
            if len(self.lines) % 1000 == 0:
                self.rotations += 1
                self._log.rename(f"{self._log}.{self.rotations}")

    def stop(self) -> None:
        self._stopped.set()
        self.join()


@pytest.mark.timeout(240)
def test_kill_nine_loses_nothing_and_bills_nothing_twice(tmp_path: Path) -> None:
    """Thirty SIGKILLs under random 503s and dropped answers: the exact events and exact books (cases 30, 38, 52)."""
    luck = random.Random(3)
    with FaultyEndpoint(rate=0.25) as endpoint:
        site = Site(tmp_path, endpoint.url)
        writer = Writer(site.log, lines_per_second=600)
        writer.start()
        for _ in range(KILLS):
            with site.running() as process:
                site.wait_for_lines(process, site.books()[Count.LINES] + luck.randrange(1, 400))
                process.kill()
        writer.stop()
        endpoint.rate = 0.0
        with site.running() as process:
            site.wait_for_lines(process, len(writer.lines))
            assert stop(process) == 0

        truth, books = writer.traffic.truth, site.books()
        assert Counter(endpoint.ids()) == Counter(expected_ids(writer.lines))
        assert endpoint.store.counts()["events"] == truth.events
        assert endpoint.failed > 0
        assert writer.rotations > 0
        tokens = {
            (row["subject"], row["model"], row["type"]): row["tokens"] for row in endpoint.store.usage() if row["type"]
        }
        assert tokens == +truth.tokens
        assert books.balanced
        assert books[Count.LINES] == truth.entries
        assert books[Count.EVENTS] == truth.events
        assert books.skipped == truth.anonymous


def test_a_clean_stop_and_start_sends_nothing_again(tmp_path: Path) -> None:
    """Guarantee 2: SIGTERM under load, start, SIGTERM, start: the endpoint sees no id twice (case 51)."""
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        writer = Writer(site.log, lines_per_second=2000)
        writer.start()
        for _ in range(3):
            with site.running() as process:
                site.wait_for_lines(process, site.books()[Count.LINES] + 300)
                assert stop(process) == 0
        writer.stop()
        with site.running() as process:
            site.wait_for_lines(process, len(writer.lines))
            assert stop(process) == 0

        assert endpoint.store.counts()["repeats"] == 0
        assert Counter(endpoint.ids()) == Counter(expected_ids(writer.lines))


def test_a_crash_sends_again_only_what_was_in_flight(tmp_path: Path) -> None:
    """Guarantee 2: what was acknowledged and checkpointed before SIGKILL is not sent again."""
    traffic = Traffic(5, started_at_ms=1_790_000_000_000)
    settled = [traffic.line() for _ in range(500)]
    late = [traffic.line() for _ in range(20)]
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        append(site.log, *settled)
        with site.running() as process:
            site.wait_for_lines(process, len(settled))
            endpoint.answering.clear()
            before = endpoint.requests
            append(site.log, *late)
            wait_until(lambda: endpoint.requests > before, lambda: site.story(process))
            process.kill()
        endpoint.answering.set()
        with site.running() as process:
            site.wait_for_lines(process, len(settled) + len(late))
            assert stop(process) == 0

        counts = endpoint.store.counts()
        assert counts["events"] == len(expected_ids(settled + late))
        assert counts["repeats"] <= len(expected_ids(late))


def test_nothing_is_settled_before_it_is_acknowledged(tmp_path: Path) -> None:
    """The order of the world: while the endpoint does not answer, no position moves and no line counts (case 31)."""
    traffic = Traffic(6, started_at_ms=1_790_000_000_000)
    lines = [traffic.line() for _ in range(300)]
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        endpoint.answering.clear()
        append(site.log, *lines)
        with site.running() as process:
            wait_until(lambda: endpoint.requests == 4, lambda: site.story(process))  # all that may be in flight
            assert site.books()[Count.LINES] == 0
            process.kill()
        assert site.books()[Count.LINES] == 0
        endpoint.answering.set()
        with site.running() as process:
            site.wait_for_lines(process, len(lines))
            assert stop(process) == 0
        assert Counter(endpoint.ids()) == Counter(expected_ids(lines))


def test_events_carry_mapped_fields_only(tmp_path: Path) -> None:
    """Guarantee 7: no header, address or query of a client leaves in an event that does not name it (case 71)."""
    traffic = Traffic(8, started_at_ms=1_790_000_000_000)
    lines = [traffic.line() for _ in range(100)]
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        append(site.log, *lines)
        with site.running() as process:
            site.wait_for_lines(process, len(lines))
            assert stop(process) == 0
        sent = b"".join(event.encode() for _, event in endpoint.store.lines(0))
    for line in lines:
        entry = orjson.loads(line)
        assert entry["client_ip"].encode() not in sent
        assert entry["request"]["headers"]["user-agent"].encode() not in sent
