"""Guarantees 1 and 2: nothing lost, nothing billed twice, and books that are exact, whenever the process dies.

KILLS in the environment says how often it is killed: KILLS=1000 for the proof before a release.
"""

import gzip
import os
import random
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import orjson
import pytest

from metershipper.books import Count
from metershipper.checkpoint import Checkpoint
from metershipper.errors import StateError
from metershipper.traffic import Traffic
from tests.integration.support import FaultyEndpoint, Site, append, expected_ids, stop, unmeasured, wait_until

KILLS = int(os.environ.get("KILLS", "200"))
SITES = 2  # side by side, each killed its share of times
# From a process's start: it is read in, opens the state, looks around and delivers its first batches. At least this
# long; how long it is on a busy machine is seen by those that are waited for.
START_SECONDS = 0.7
LINES_AT_ONCE = 20


class Writer(threading.Thread):
    """Kong and logrotate: writes entries at a steady pace, and rotates the log now and then, until told to stop.

    Args: `moves`, how it rotates: "rename", "copytruncate", and perhaps "gzip" of what was rotated before.
    """

    def __init__(
        self, log: Path, lines_per_second: float, *, seed: int = 7, moves: tuple[str, ...] = ("rename",)
    ) -> None:
        super().__init__(daemon=True)
        self.traffic = Traffic(seed, started_at_ms=1_790_000_000_000 + seed * 86_400_000)
        self.lines: list[bytes] = []
        self.rotated: Counter[str] = Counter()
        self.rotates_itself = threading.Event()
        self._luck = random.Random(seed)
        self._moves = moves
        self._log = log
        self._pause_seconds = LINES_AT_ONCE / lines_per_second
        self._stopped = threading.Event()
        self._at_work = threading.Lock()
        self._rotate_at = 0

    def run(self) -> None:
        while not self._stopped.wait(self._pause_seconds):
            with self._at_work:
                lines = [self.traffic.line() for _ in range(LINES_AT_ONCE)]
                append(self._log, *lines)
                self.lines += lines
            if self.rotates_itself.is_set() and len(self.lines) >= self._rotate_at:
                self._rotate_at = len(self.lines) + self._luck.randrange(100, 1500)
                self.rotate()

    def rotate(self) -> None:
        """Rotate now. Nothing is written meanwhile: what falls between logrotate's copy and its truncation is lost."""
        with self._at_work:
            if not self._log.exists():
                return
            move = self._luck.choice(self._moves)
            if move == "gzip":
                self._compress()
            else:
                self._move(move, Path(f"{self._log}.{self.rotated.total() + 1}"))
            self.rotated[move] += 1

    def _move(self, move: str, rotated: Path) -> None:
        if move == "rename":
            self._log.rename(rotated)
        else:
            shutil.copyfile(self._log, rotated)
            os.truncate(self._log, 0)

    def _compress(self) -> None:
        """As gzip does: the compressed file grows beside the other one, which is deleted at the end."""
        plain = [path for path in self._log.parent.glob(f"{self._log.name}.*") if path.suffix != ".gz"]
        if plain:
            path = self._luck.choice(sorted(plain))
            with path.open("rb") as source, gzip.open(f"{path}.gz", "wb", compresslevel=1) as target:
                shutil.copyfileobj(source, target)
            path.unlink()

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def follows_its_log(site: Site) -> bool:
    """Whether what is rotated from now on is no history (it never is read, see `read_from`)."""
    try:
        with Checkpoint(site.state, read_only=True) as checkpoint:
            return bool(checkpoint.inputs())
    except StateError:
        return False


def kill_again_and_again(directory: Path, seed: int, kills: int) -> None:
    """Kill, start, and in the end compare everything with what was written."""
    luck = random.Random(seed)
    with FaultyEndpoint(rate=0.25, seed=seed) as endpoint:
        site = Site(directory, endpoint.url, environment=unmeasured())
        moves = ("rename", "rename", "copytruncate", "gzip")
        writer = Writer(site.log, lines_per_second=400, seed=seed, moves=moves)
        writer.start()
        start_seconds = START_SECONDS
        for _ in range(kills):
            with site.running() as process:
                if luck.random() < 0.7:
                    time.sleep(luck.uniform(0.0, start_seconds))
                else:
                    began = time.monotonic()
                    site.wait_for_lines(process, site.books()[Count.LINES] + luck.randrange(1, 300))
                    start_seconds = max(START_SECONDS, time.monotonic() - began)
                assert process.poll() is None, site.story(process)
                process.kill()
                process.wait()
            if follows_its_log(site):
                writer.rotates_itself.set()
                if luck.random() < 0.1:
                    writer.rotate()
        writer.stop()
        endpoint.rate = 0.0
        with site.running() as process:
            site.wait_for_lines(process, len(writer.lines))
            assert stop(process) == 0

        truth, books = writer.traffic.truth, site.books()
        assert Counter(endpoint.ids()) == Counter(expected_ids(writer.lines))
        assert endpoint.store.counts()["events"] == truth.events
        assert endpoint.failed > 0
        assert set(writer.rotated) == set(moves)
        tokens = {
            (row["subject"], row["model"], row["type"]): row["tokens"] for row in endpoint.store.usage() if row["type"]
        }
        assert tokens == +truth.tokens
        assert books.balanced
        assert books[Count.LINES] == truth.entries
        assert books[Count.EVENTS] == truth.events
        assert books.skipped == truth.anonymous
        assert books.dead_letters == 0
        with Checkpoint(site.state, read_only=True) as checkpoint:
            assert checkpoint.gaps() == []


@pytest.mark.timeout(240 + 2 * KILLS)
def test_kill_nine_loses_nothing_and_bills_nothing_twice(tmp_path: Path) -> None:
    """SIGKILL at any instant under random 503s, dropped answers, rotation and compression: the exact events and exact
    books (cases 30, 38, 52)."""
    with ThreadPoolExecutor(SITES) as threads:
        rounds = []
        for seed in range(SITES):
            directory = tmp_path / f"site{seed}"
            directory.mkdir()
            rounds.append(threads.submit(kill_again_and_again, directory, seed + 3, KILLS // SITES))
        for each in rounds:
            each.result()


def test_a_clean_stop_and_start_sends_nothing_again(tmp_path: Path) -> None:
    """Guarantee 2: SIGTERM under load, start, SIGTERM, start: the endpoint sees no id twice (case 51)."""
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        writer = Writer(site.log, lines_per_second=2000)
        writer.start()
        for _ in range(3):
            with site.running() as process:
                site.wait_for_lines(process, site.books()[Count.LINES] + 300)
                writer.rotates_itself.set()
                assert stop(process) == 0
        writer.stop()
        with site.running() as process:
            site.wait_for_lines(process, len(writer.lines))
            assert stop(process) == 0

        assert writer.rotated.total() > 0
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
