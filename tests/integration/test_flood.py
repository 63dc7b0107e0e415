"""The http-log receiver under what is meant to hurt: its memory stays flat and others are served (cases 58, 59)."""

import gzip
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import trustme

from metershipper.books import Received
from metershipper.listener import MAX_CONNECTIONS
from metershipper.traffic import Traffic
from tests.integration.support import (
    DEADLINE_SECONDS,
    FaultyEndpoint,
    Sender,
    Site,
    append,
    array_of,
    expected_ids,
    stop,
    tls_client,
    tls_settings,
    unmeasured,
    wait_until,
)

CONNECTIONS, WAVE = 10_000, 1_250
SERVED_WITHIN_SECONDS = 2.0
MOST_MB, MOST_GROWTH_MB = 200.0, 40.0
MB = 1024 * 1024
HTTP_LOG = '[inputs.http_log]\nlisten = "127.0.0.1:0"\n'


def resident_mb(process: "subprocess.Popen[bytes]", field: str = "VmRSS") -> float:
    """What it holds in memory; `VmHWM`: what it held at most."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) / 1024


class Honest(threading.Thread):
    """A worker of Kong that sends an entry at a time, each over a connection of its own or kept alive."""

    def __init__(self, port: int, seed: int, *, keeps_alive: bool) -> None:
        super().__init__(daemon=True)
        self.lines: list[bytes] = []
        self.seconds: list[float] = []
        self.failed: list[str] = []
        self._port = port
        self._keeps_alive = keeps_alive
        self._traffic = Traffic(seed, started_at_ms=1_790_000_000_000 + seed * 86_400_000)
        self._stopped = threading.Event()

    def run(self) -> None:
        connection: Sender | None = None
        while not self._stopped.wait(0.02):
            line = self._traffic.line()
            began_at = time.monotonic()
            try:
                connection = connection or Sender(self._port)
                assert connection.post(line).status == 200
            except OSError as error:
                self.failed.append(repr(error))
                connection = None
                continue
            self.seconds.append(time.monotonic() - began_at)
            self.lines.append(line)
            if not self._keeps_alive:
                connection.close()
                connection = None
        if connection is not None:
            connection.close()

    def stop(self) -> None:
        """End after the request that is on its way."""
        self._stopped.set()
        self.join(DEADLINE_SECONDS)


@contextmanager
def many_descriptors() -> Iterator[None]:
    """So that a test can hold as many connections as it needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4 * WAVE:
        pytest.skip(f"only {hard} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4 * WAVE), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def flood(port: int) -> None:
    """Thousands of connections, wave after wave: silent ones, some with a header that never ends, some with a body."""
    beginnings = (b"", b"POST / HTTP/1.1\r\nX-Slow: ", b"POST / HTTP/1.1\r\nContent-Length: 999999\r\n\r\n[{")
    waves: list[list[socket.socket]] = []
    for _ in range(CONNECTIONS // WAVE):
        wave = []
        for number in range(WAVE):
            connection = socket.socket()
            connection.settimeout(DEADLINE_SECONDS)
            wave.append(connection)
            with suppress(OSError):  # cut off already
                connection.connect(("127.0.0.1", port))
                connection.send(beginnings[number % 3])
        waves.append(wave)
        if len(waves) == 2:  # so that a wave comes while the one before it is still there
            for connection in waves.pop(0):
                connection.close()
    for connection in waves.pop():
        connection.close()


def test_a_flood_of_connections_costs_no_memory_and_no_other_sender(tmp_path: Path) -> None:
    """Case 59: 10,000 connections that send nothing of use; others are served at once, and it is counted."""
    with FaultyEndpoint() as endpoint, many_descriptors():
        site = Site(tmp_path, endpoint.url, HTTP_LOG, unmeasured())
        with site.receiving() as (process, port):
            honest = [Honest(port, 1, keeps_alive=True), Honest(port, 2, keeps_alive=False)]
            for each in honest:
                each.start()
            wait_until(lambda: all(len(each.lines) > 5 for each in honest), lambda: site.story(process))
            before_mb = resident_mb(process)
            flood(port)
            for each in honest:
                each.stop()
            most_mb = resident_mb(process, "VmHWM")
            lines = [line for each in honest for line in each.lines]
            site.wait_for_lines(process, len(lines))
            assert stop(process) == 0
        assert [each.failed for each in honest] == [[], []]
        assert max(max(each.seconds) for each in honest) < SERVED_WITHIN_SECONDS
        assert most_mb < MOST_MB and most_mb - before_mb < MOST_GROWTH_MB
        assert sorted(endpoint.ids()) == sorted(expected_ids(lines))
        assert site.books()[Received.CROWDED_OUT] > 0
        assert "Traceback" not in site.errors.read_text()


def test_a_flood_over_tls_is_bounded_before_the_handshake(tmp_path: Path) -> None:
    """Case 59: who connects and never shakes hands takes no descriptor that files, the spool or a sender need."""
    traffic, ca = Traffic(6, started_at_ms=1_790_000_000_000), trustme.CA()
    with FaultyEndpoint() as endpoint, many_descriptors(), ExitStack() as stack:
        site = Site(tmp_path, endpoint.url, HTTP_LOG + tls_settings(tmp_path, ca), unmeasured())
        process, port = stack.enter_context(site.receiving())
        known = stack.enter_context(Sender(port, tls=tls_client(ca, ca)))
        assert known.post(traffic.line()).status == 200
        for _ in range(2 * WAVE):
            connection = stack.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex(("127.0.0.1", port))
        began_at = time.monotonic()
        assert known.post(traffic.line()).status == 200
        with Sender(port, tls=tls_client(ca, ca)) as new:
            assert new.post(traffic.line()).status == 200
        assert time.monotonic() - began_at < SERVED_WITHIN_SECONDS
        append(site.log, traffic.line())
        site.wait_for_lines(process, 4)
        assert len(list(Path(f"/proc/{process.pid}/fd").iterdir())) < MAX_CONNECTIONS + 100
        assert resident_mb(process, "VmHWM") < MOST_MB
        assert stop(process) == 0
        assert site.books()[Received.CROWDED_OUT] > 0
        assert "Traceback" not in site.errors.read_text()


def test_senders_that_stall_in_large_bodies_do_not_stop_others(tmp_path: Path) -> None:
    """Case 59: what is begun and not ended may hold all memory that there is for bodies; small ones still pass."""
    line = Traffic(3, started_at_ms=1_790_000_000_000).line()
    with FaultyEndpoint() as endpoint, ExitStack() as stack:
        site = Site(tmp_path, endpoint.url, HTTP_LOG, unmeasured())
        process, port = stack.enter_context(site.receiving())
        for _ in range(50):
            stalling = stack.enter_context(Sender(port))
            stalling.write(stalling.head(60 * MB) + b'{"request":"' + b"x" * MB)
        kong = stack.enter_context(Sender(port))
        began_at = time.monotonic()
        assert kong.post(line).status == 200
        assert time.monotonic() - began_at < SERVED_WITHIN_SECONDS
        assert resident_mb(process, "VmHWM") < MOST_MB
        site.wait_for_lines(process, 1)
        assert endpoint.ids() == expected_ids([line])


def test_huge_bodies_are_taken_in_bounded_memory_while_others_are_served(tmp_path: Path) -> None:
    """Case 58: 64 MB of entries, what unpacks to more than is allowed, a million items in one array."""
    traffic = Traffic(4, started_at_ms=1_790_000_000_000)
    padding = b'"headers":{"x-padding":"' + b"x" * 64_000 + b'",'
    lines = [traffic.line().replace(b'"headers":{', padding, 1) for _ in range(1000)]
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url, f"{HTTP_LOG}max_body_bytes = {len(array_of(lines))}\n", unmeasured())
        with site.receiving() as (process, port), Sender(port) as kong:
            honest = Honest(port, 5, keeps_alive=True)
            honest.start()
            assert kong.post(array_of(lines)).status == 200
            assert kong.post(gzip.compress(b"[" + bytes(100 * MB)), {"Content-Encoding": "gzip"}).status == 413
            assert kong.post(b"[" + b"1," * 999_999 + b"1]").status == 200
            honest.stop()
            site.wait_for_lines(process, len(honest.lines) + len(lines) + 1)
            assert resident_mb(process, "VmHWM") < MOST_MB
            assert stop(process) == 0
        assert honest.failed == []
        assert max(honest.seconds) < SERVED_WITHIN_SECONDS
        assert sorted(endpoint.ids()) == sorted(expected_ids(lines + honest.lines))
        books = site.books()
        assert (books[Received.REPEATS], books.dead_letters, books[Received.TOO_LARGE]) == (999_999, 1, 1)
        assert books.balanced
