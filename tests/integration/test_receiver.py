"""The http-log receiver as a process: what was answered with 200 arrives, whatever happens then (cases 54 to 61)."""

import gzip
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import orjson
import pytest
import trustme

from metershipper.books import Count, Received
from metershipper.traffic import Traffic
from tests.integration.support import (
    DEADLINE_SECONDS,
    FaultyEndpoint,
    Reply,
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

HTTP_LOG = '[inputs.http_log]\nlisten = "127.0.0.1:0"\n'
KILLS = 25
SENDERS = 4
# From a process's start: some are killed while they open the state, most while they take batches.
LIFE_SECONDS = (0.3, 0.8)


def lines_of(seed: int, count: int) -> list[bytes]:
    traffic = Traffic(seed, started_at_ms=1_790_000_000_000 + seed * 86_400_000)
    return [traffic.line() for _ in range(count)]


def is_down(_: object) -> Reply:
    """What an endpoint does that is down for hours."""
    return Reply(503)


def is_up(_: object) -> None:
    """What it does afterwards."""


def received(site: Site) -> dict[str, int]:
    """What the receiver counted."""
    return {name: count for name, count in site.books().items() if name in list(Received) and count}


def assert_exact(site: Site, endpoint: FaultyEndpoint, lines: list[bytes], *, lines_read: int | None = None) -> None:
    """Stored is what was sent, each event once; the books say so; nothing is left in the spool."""
    assert Counter(endpoint.ids()) == Counter(expected_ids(lines))
    books = site.books()
    assert books.balanced and books.events_balanced
    assert books[Count.LINES] == (len(lines) if lines_read is None else lines_read)
    assert site.segments() == []
    assert "Traceback" not in site.errors.read_text()


# --- On disk before the answer (case 54)


def test_a_200_means_on_disk(tmp_path: Path) -> None:
    """Case 54: SIGKILL right after the answer, again and again while the endpoint is down: every entry arrives."""
    lines, rounds = lines_of(1, 240), 3
    with FaultyEndpoint(behaviour=is_down) as endpoint:
        site = Site(tmp_path, endpoint.url, HTTP_LOG, unmeasured())
        for round_ in range(rounds):
            started_at = time.monotonic()
            mine = lines[round_::rounds]
            with site.receiving() as (process, port), Sender(port) as kong:
                assert kong.post(mine[0]).status == 200
                assert time.monotonic() - started_at < 5
                for begin in range(1, len(mine), 7):
                    assert kong.post(array_of(mine[begin : begin + 7])).status == 200
                process.kill()
        assert site.books()[Count.LINES] == 0
        endpoint.behaviour = is_up
        with site.running() as process:
            site.wait_for_lines(process, len(lines))
            assert stop(process) == 0
        assert_exact(site, endpoint, lines)


class Kong(threading.Thread):
    """A worker of Kong: sends entries batch by batch, and each until it is taken, by the same bytes."""

    def __init__(self, port: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.port = port
        self.acknowledged: list[bytes] = []
        self.seconds: list[float] = []
        self.repeated = 0
        self._traffic = Traffic(seed, started_at_ms=1_790_000_000_000 + seed * 86_400_000)
        self._luck = random.Random(seed)
        self._stopped = threading.Event()
        self._connection: Sender | None = None
        self._gave_up = False

    def run(self) -> None:
        while not self._stopped.is_set():
            batch = [self._traffic.line() for _ in range(self._luck.choice((1, 1, 2, 5, 20)))]
            body = array_of(batch) if len(batch) > 1 else batch[0]
            while not (taken := self._is_taken(body)) and not self._gave_up:
                self.repeated += 1
                time.sleep(0.02)
            self.acknowledged += batch if taken else []
            time.sleep(0.005)

    def _is_taken(self, body: bytes) -> bool:
        try:
            if self._connection is None:
                self._connection = Sender(self.port)
            began_at = time.monotonic()
            answer = self._connection.post(body)
            self.seconds.append(time.monotonic() - began_at)
            return answer.status == 200
        except OSError:
            self._hang_up()
            return False

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def stop(self) -> None:
        """End after the batch that is on its way."""
        self._stopped.set()
        self.join(DEADLINE_SECONDS)
        assert not self.is_alive()
        self._hang_up()

    def give_up(self) -> None:
        """End, and leave the batch that is on its way."""
        self._gave_up = True
        self.stop()


def free_port() -> int:
    """A port to listen on again after each start; none that outgoing connections get."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def test_kill_nine_at_any_moment_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    """Case 54: SIGKILL at random under load and a failing endpoint; senders retry as Kong does."""
    luck, port = random.Random(54), free_port()
    with FaultyEndpoint(rate=0.25, seed=54) as endpoint:
        site = Site(tmp_path, endpoint.url, HTTP_LOG.replace(":0", f":{port}"), unmeasured())
        kongs = [Kong(port, 100 + number) for number in range(SENDERS)]
        for kong in kongs:
            kong.start()
        for _ in range(KILLS):
            with site.running() as process:
                time.sleep(luck.uniform(*LIFE_SECONDS))
                assert process.poll() is None, site.story(process)
                process.kill()
                process.wait()
        endpoint.rate = 0.0
        with site.receiving() as (process, _):
            for kong in kongs:
                kong.stop()
            lines = [line for kong in kongs for line in kong.acknowledged]
            site.wait_for_lines(process, len(lines))
            wait_until(lambda: not site.segments(), lambda: site.story(process))
            assert stop(process) == 0
        assert_exact(site, endpoint, lines)
        assert endpoint.failed > 0
        assert sum(kong.repeated for kong in kongs) > KILLS


def test_what_is_settled_goes_while_more_comes_and_nothing_goes_with_it(tmp_path: Path) -> None:
    """Case 54: segments are deleted under load, also the one that is written to, and let go of on the disk."""
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url, HTTP_LOG)
        with site.receiving() as (process, port):
            kongs = [Kong(port, 200 + number) for number in range(SENDERS)]
            for kong in kongs:
                kong.start()
            wait_until(lambda: sum(len(kong.acknowledged) for kong in kongs) > 2500, lambda: site.story(process))
            for kong in kongs:
                kong.stop()
            lines = [line for kong in kongs for line in kong.acknowledged]
            assert sum(kong.repeated for kong in kongs) == 0
            site.wait_for_lines(process, len(lines))
            wait_until(lambda: not site.segments(), lambda: site.story(process))
            assert not [link for link in open_files(process.pid) if "ndjson" in link]
            assert stop(process) == 0
        assert_exact(site, endpoint, lines)
        assert received(site) == {Received.REQUESTS: sum(len(kong.seconds) for kong in kongs)}


def open_files(pid: int) -> list[str]:
    return [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()]


# --- Repeats, and other inputs (cases 52, 56)


def test_a_batch_that_is_sent_again_is_billed_once(tmp_path: Path) -> None:
    """Case 56: the answer was slow, or lost with a crash: the entries are known again and counted as repeats."""
    lines = lines_of(3, 30)
    batch = array_of(lines[:20])
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url, HTTP_LOG)
        with site.receiving() as (process, port), Sender(port) as kong:
            for _ in range(3):
                assert kong.post(batch).status == 200
            assert kong.post(lines[3]).status == 200  # by itself, from another worker
            site.wait_for_lines(process, 20)
            wait_until(lambda: received(site).get(Received.REPEATS) == 41, lambda: site.story(process))
            assert kong.post(array_of(lines[18:25])).status == 200
            process.kill()
        with site.receiving() as (process, port), Sender(port) as kong:
            assert kong.post(array_of(lines[18:25])).status == 200
            assert kong.post(batch).status == 200
            assert kong.post(array_of(lines)).status == 200
            site.wait_for_lines(process, 30)
            assert stop(process) == 0
        assert_exact(site, endpoint, lines)
        assert received(site)[Received.REPEATS] == 41 + 7 + 20 + 25
        assert endpoint.store.counts()["repeats"] == 0


def test_http_log_and_file_log_of_the_same_requests_bill_each_once(tmp_path: Path) -> None:
    """Case 56: both plugins on: both give an entry the same ids, with and without a request id of Kong's."""
    lines = lines_of(4, 100)
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url, HTTP_LOG)
        append(site.log, *lines)
        with site.receiving() as (process, port), Sender(port) as kong:
            assert kong.post(lines[0].rstrip()).status == 200
            assert kong.post(array_of(lines[1:])).status == 200
            site.wait_for_lines(process, 200)
            assert stop(process) == 0
        assert_exact(site, endpoint, lines, lines_read=200)
        assert site.books()[Count.HASHED_IDS] > 0
        assert endpoint.store.counts()["repeats"] == len(expected_ids(lines))


def test_what_is_left_in_the_spool_is_delivered_when_nothing_is_received_any_more(tmp_path: Path) -> None:
    """[inputs.http_log] is taken out of the configuration: what was received before arrives."""
    lines = lines_of(5, 50)
    with FaultyEndpoint(behaviour=is_down) as endpoint:
        site = Site(tmp_path, endpoint.url, HTTP_LOG)
        with site.receiving() as (process, port), Sender(port) as kong:
            assert kong.post(array_of(lines)).status == 200
            process.kill()
        assert site.segments()
        endpoint.behaviour = is_up
        site.config.write_text(site.config.read_text().replace(HTTP_LOG, ""))
        with site.running() as process:
            site.wait_for_lines(process, len(lines))
            assert stop(process) == 0
        assert_exact(site, endpoint, lines)


# --- What Kong can send (cases 55, 57, 58)


def test_all_that_kong_can_send_is_accepted_and_what_is_no_entry_costs_no_other(tmp_path: Path) -> None:
    """Cases 55, 57, 58: every shape is a 200; what can't be understood is a dead letter, its neighbours are billed."""
    lines = lines_of(6, 40)
    good = iter(lines)
    bare = (line.rstrip() for line in good)
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url, HTTP_LOG)
        with site.receiving() as (process, port), Sender(port) as kong:

            def posted(body: bytes, headers: dict[str, str] | None = None, method: str = "POST") -> None:
                answer = kong.post(body, headers, method=method)
                assert (answer.status, answer.body) == (200, b""), body

            posted(next(bare))
            for method in ("POST", "PUT", "PATCH"):
                posted(array_of([next(good), next(good)]), method=method)
            for content_type in ("application/json; charset=utf-8", "application/vnd.kong+json", "text/plain", ""):
                posted(next(bare), {"Content-Type": content_type})
            posted(b"[]")
            posted(b" [\n] ")
            posted(b"")
            posted(b"\xef\xbb\xbf[\r\n " + next(bare) + b",\n\t" + next(bare) + b"\n]\n")
            posted(orjson.dumps([orjson.loads(next(good))], option=orjson.OPT_INDENT_2))
            posted(gzip.compress(array_of([next(good), next(good)])), {"Content-Encoding": "gzip"})
            posted(next(bare), {"Content-Encoding": "identity"})

            kong.write(kong.head(None, {"Transfer-Encoding": "chunked"}))
            body = array_of([next(good), next(good)])
            for begin in range(0, len(body), 777):
                chunk = body[begin : begin + 777]
                kong.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            kong.write(b"0\r\n\r\n")
            assert kong.answer().status == 200

            body = next(bare)
            kong.write(kong.head(len(body), {"Expect": "100-continue"}))
            assert kong.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            kong.write(body)
            assert kong.answer().status == 200

            body = next(bare)
            for byte in kong.head(len(body)) + body:  # as slow as a network may be
                kong.write(bytes((byte,)))
            assert kong.answer().status == 200
            billed = lines[: lines.index(body + b"\n") + 1]
            site.wait_for_lines(process, len(billed))
            assert site.books().dead_letters == 0

            faulty = [b"hello", b'{"request":', b"\x00\xff\xfe", b"<html>", b"17", b'"text"', b"{}", b'{"a":[}']
            for body in faulty:
                posted(body)
            posted(b"not gzip at all", {"Content-Encoding": "gzip"})
            bad_time = next(bare).replace(b'"started_at":', b'"started_at":-', 1)
            posted(b"[" + b",".join([next(bare), b"18", bad_time, b'{"no":"entry"}', next(bare)]) + b"]")
            posted(array_of([next(good), next(good)])[:-1])  # torn behind the last entry
            billed = [line for line in lines[: lines.index(next(good))] if b'"started_at":-' not in line]
            billed.remove(bad_time.replace(b'"started_at":-', b'"started_at":', 1) + b"\n")
            wait_until(lambda: len(endpoint.ids()) >= len(expected_ids(billed)), lambda: site.story(process))
            wait_until(lambda: not site.segments(), lambda: site.story(process))
            assert stop(process) == 0
        letters = site.letters()
        assert Counter(endpoint.ids()) == Counter(expected_ids(billed))
        assert len(letters) == site.books().dead_letters == len(faulty) + 1 + 3
        assert {letter.path for letter in letters} == {"(http-log)"}
        assert site.books().balanced
        shown = site.command("dead-letters", "list").stdout
        assert "(http-log)" in shown


# --- No room (case 60)


def test_a_full_spool_asks_kong_to_come_again_and_recovers_by_itself(tmp_path: Path) -> None:
    """Case 60: a warning at 80 %, 503 with Retry-After when it is full, 200 again once the endpoint takes; no loss."""
    limits = "max_body_bytes = 65_536\nspool_max_bytes = 262_144\n"
    lines = lines_of(7, 400)
    unsent = [lines[begin : begin + 5] for begin in range(0, len(lines), 5)]
    accepted: list[bytes] = []
    with FaultyEndpoint(behaviour=is_down) as endpoint:
        site = Site(tmp_path, endpoint.url, HTTP_LOG + limits)
        with site.receiving() as (process, port), Sender(port) as kong:
            while (answer := kong.post(array_of(unsent[0]))).status == 200:
                accepted += unsent.pop(0)
            assert answer.status == 503
            assert int(answer.headers["retry-after"]) > 0
            assert b"spool_max_bytes" in answer.body
            assert len(accepted) > 50
            assert sum(path.stat().st_size for path in site.segments()) <= 262_144
            assert kong.post(b"[]").status == 200
            told = site.errors.read_text()
            assert told.count("the spool is 8") == 1
            assert told.count("requests without room in the spool (503)") == 1
            endpoint.behaviour = is_up
            for batch in unsent:
                wait_until(lambda batch=batch: kong.post(array_of(batch)).status == 200, lambda: site.story(process))  # type: ignore[misc]
            site.wait_for_lines(process, len(lines))
            wait_until(lambda: "the spool is below 80 % again" in site.errors.read_text(), lambda: site.story(process))
            assert stop(process) == 0
        assert_exact(site, endpoint, lines)
        assert received(site)[Received.NO_ROOM] >= 1
        assert received(site)[Received.REQUESTS] == len(lines) // 5 + 1


@contextmanager
def on_a_small_disk(site: Site) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """`run` with its state on a file system of 2 MB that only this process sees."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here: no file system to fill can be mounted")
    script = 'mount -t tmpfs -o size=2m,mode=700 tmpfs "$0" && exec "$@"'
    command = [sys.executable, "-m", "metershipper", "run", "-c", str(site.config)]
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, str(site.state)]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here: no file system to fill can be mounted")
    with (
        site.errors.open("ab") as errors,
        subprocess.Popen([*namespace, *command], stderr=errors, env=unmeasured()) as process,
    ):
        try:
            yield process, site.wait_for_port(process, 0)
        finally:
            process.kill()


def test_a_full_disk_asks_kong_to_come_again_and_recovers_by_itself(tmp_path: Path) -> None:
    """Case 60: the real ENOSPC: 503, never a 200 for what is not kept; with space again it goes on by itself."""
    lines = lines_of(8, 300)
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url, HTTP_LOG)
        site.state.mkdir()
        with on_a_small_disk(site) as (process, port), Sender(port) as kong:
            assert kong.post(array_of(lines[:50])).status == 200
            wait_until(lambda: len(endpoint.ids()) == len(expected_ids(lines[:50])), lambda: site.story(process))
            state = Path(f"/proc/{process.pid}/root{site.state}")  # as the process sees it
            filler = fill(state)
            unsent = [lines[begin : begin + 10] for begin in range(50, 300, 10)]
            while (answer := kong.post(array_of(unsent[0]))).status == 200:  # what fits into the last page
                unsent.pop(0)
            assert (answer.status, int(answer.headers["retry-after"]) > 0) == (503, True)
            assert b"the disk of the spool is full" in answer.body
            assert kong.post(array_of(unsent[0])).status == 503
            assert kong.post(array_of(lines[:50])).status == 200  # received before: that needs no room
            assert process.poll() is None
            filler.unlink()
            for batch in unsent:
                assert kong.post(array_of(batch)).status == 200
            wait_until(lambda: len(endpoint.ids()) == len(expected_ids(lines)), lambda: site.story(process))
            wait_until(lambda: not list((state / "spool").glob("*.ndjson")), lambda: site.story(process))
            assert stop(process) == 0
        assert Counter(endpoint.ids()) == Counter(expected_ids(lines))
        assert endpoint.store.counts()["repeats"] == 0
        assert "requests without room in the spool (503)" in site.errors.read_text()
        assert "Traceback" not in site.errors.read_text()


def is_taken(kong: Sender, batch: list[bytes]) -> bool:
    return kong.post(array_of(batch)).status == 200


def test_a_disk_that_the_spool_filled_is_freed_by_delivering(tmp_path: Path) -> None:
    """Cases 33, 60: an outage fills the disk. The checkpoint on it must still be written, or nothing ever is freed."""
    lines = lines_of(9, 1200)
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url, HTTP_LOG)
        site.state.mkdir()
        endpoint.answering.clear()
        with on_a_small_disk(site) as (process, port), Sender(port) as kong:
            unsent = [lines[begin : begin + 10] for begin in range(0, 1200, 10)]
            while kong.post(array_of(unsent[0])).status == 200:
                unsent.pop(0)
            assert len(unsent) > 20
            endpoint.answering.set()
            for batch in unsent:
                wait_until(partial(is_taken, kong, batch), lambda: site.story(process))
            wait_until(lambda: len(endpoint.ids()) == len(expected_ids(lines)), lambda: site.story(process))
            state = Path(f"/proc/{process.pid}/root{site.state}")
            wait_until(lambda: not list((state / "spool").glob("*.ndjson")), lambda: site.story(process))
            assert stop(process) == 0
        assert Counter(endpoint.ids()) == Counter(expected_ids(lines))


def fill(directory: Path) -> Path:
    """Write until there is no space left."""
    with (directory / "filler").open("wb", buffering=0) as filler:
        for size in (65536, 4096, 1):
            with suppress(OSError):
                while True:
                    filler.write(bytes(size))
    return directory / "filler"


# --- Who may send (cases 61, 70, 71)


TOKEN, NEXT_TOKEN = "kong-OldAndSecret-4711", "kong-NewAndSecret-0815"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + b64encode(f"{user}:{password}".encode()).decode()}


def test_only_who_has_the_token_may_send_and_it_is_written_nowhere(tmp_path: Path) -> None:
    """Cases 61, 70, 71: Bearer or the password of the URL; replaced while it runs; private files; no trace of it."""
    lines = lines_of(9, 60)
    token_file = tmp_path / "token"
    token_file.write_text(f"{TOKEN}\n")
    token_file.chmod(0o600)
    with FaultyEndpoint(behaviour=is_down) as endpoint:
        site = Site(tmp_path, endpoint.url, f'{HTTP_LOG}token_file = "{token_file}"\n')
        with site.receiving() as (process, port), Sender(port) as kong:
            body = array_of(lines[:10])
            for headers in ({}, bearer("wrong"), bearer(""), basic(TOKEN, "wrong"), {"Authorization": TOKEN}):
                answer = kong.post(body, headers)
                assert (answer.status, "www-authenticate" in answer.headers) == (401, True)
            assert not site.segments()
            assert kong.post(body, bearer(TOKEN)).status == 200
            assert kong.post(array_of(lines[10:20]), basic("kong", TOKEN)).status == 200
            assert kong.post(array_of(lines[20:30]), {"authorization": f"bearer {TOKEN}"}).status == 200

            token_file.write_text(NEXT_TOKEN)
            wait_until(
                lambda: kong.post(array_of(lines[30:40]), bearer(NEXT_TOKEN)).status == 200, lambda: site.story(process)
            )
            assert kong.post(array_of(lines[40:50]), bearer(TOKEN)).status == 401
            token_file.unlink()
            time.sleep(1.1)  # it is looked for again at most once in a second
            assert kong.post(array_of(lines[40:50]), bearer(TOKEN)).status == 401
            assert kong.post(array_of(lines[40:50]), bearer(NEXT_TOKEN)).status == 200
            poison = lines[50].replace(b'"started_at":', b'"started_at":-', 1)
            poison = poison.replace(b'"headers":{', b'"headers":{"apikey":"k-OfAConsumer",', 1)
            assert kong.post(poison, bearer(NEXT_TOKEN)).status == 200

            for path in (site.state / "spool").iterdir():
                assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
            assert site.segments()
            for directory in (site.state, site.state / "spool"):
                assert stat.S_IMODE(directory.stat().st_mode) == 0o700
            for shown in ("cmdline", "environ"):
                assert_kept_secret(site, Path(f"/proc/{process.pid}/{shown}").read_bytes())
            endpoint.behaviour = is_up
            site.wait_for_lines(process, 51)
            assert stop(process) == 0
        assert_exact(site, endpoint, lines[:50], lines_read=51)
        assert_kept_secret(site, b"".join(event.encode() for _, event in endpoint.store.lines(0)))
        (letter,) = site.letters()
        assert b"k-OfAConsumer" not in letter.content
        refused = received(site)[Received.UNAUTHORIZED]
        assert refused >= 7
        told = site.errors.read_text().count("requests without the right token (401)")
        assert told == 1  # however often


def assert_kept_secret(site: Site, more: bytes) -> None:
    texts = [path.read_bytes() for path in site.state.rglob("*") if path.is_file()]
    names = b"\n".join(os.fsencode(path) for path in site.directory.rglob("*"))
    for text in (*texts, names, site.errors.read_bytes(), more):
        for token in (TOKEN, NEXT_TOKEN):
            assert token.encode() not in text
            assert basic("kong", token)["Authorization"].split()[1].encode() not in text


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.7:8090"])
def test_it_refuses_to_be_reached_by_others_without_a_secret(listen: str, tmp_path: Path) -> None:
    """Case 61: exit code 2, and what to do, before anything listens."""
    site = Site(tmp_path, "http://127.0.0.1:9/api/v1/events", HTTP_LOG.replace("127.0.0.1:0", listen))
    with site.running() as process:
        assert process.wait(DEADLINE_SECONDS) == 2
    told = site.errors.read_text()
    assert "token_file" in told and "client_ca_file" in told and listen in told
    assert not site.state.exists()


def test_a_port_that_is_taken_is_one_clear_line(tmp_path: Path) -> None:
    """Exit code 2, the address, and nothing is read or lost."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        site = Site(tmp_path, "http://127.0.0.1:9/api/v1/events", HTTP_LOG.replace(":0", f":{port}"))
        with site.running() as process:
            assert process.wait(DEADLINE_SECONDS) == 2
    told = site.errors.read_text()
    assert told == f"metershipper: inputs.http_log.listen: 127.0.0.1:{port} can't be used: Address already in use\n"


def test_with_a_client_ca_only_its_clients_may_send(tmp_path: Path) -> None:
    """Case 61: TLS, and no handshake without a certificate of that CA; plain HTTP gets nowhere."""
    lines = lines_of(10, 20)
    ca, stranger = trustme.CA(), trustme.CA()
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url, HTTP_LOG + tls_settings(tmp_path, ca))
        with site.receiving() as (process, port):
            with Sender(port, tls=tls_client(ca, ca)) as kong:
                assert kong.post(array_of(lines[:10])).status == 200
                assert kong.post(array_of(lines[10:])).status == 200
            for tls in (tls_client(ca, None), tls_client(ca, stranger)):
                with pytest.raises(OSError), Sender(port, tls=tls) as kong:  # TLS 1.3 tells it at the first read
                    kong.post(array_of(lines[10:]))
            with Sender(port) as kong, pytest.raises(OSError):
                kong.post(array_of(lines[10:]))
            site.wait_for_lines(process, len(lines))
            assert stop(process) == 0
        assert_exact(site, endpoint, lines)
        assert received(site) == {Received.REQUESTS: 2}
        assert "https://127.0.0.1:" in site.errors.read_text()


# --- The end (case 51)


def test_a_stop_answers_what_is_complete_and_keeps_what_it_answered(tmp_path: Path) -> None:
    """SIGTERM under load: an answer or a closed connection for each request, also for one that stalls; no 200 lost."""
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url, HTTP_LOG)
        with site.receiving() as (process, port), Sender(port) as idle, Sender(port) as stalled:
            kongs = [Kong(port, 300 + number) for number in range(SENDERS)]
            for kong in kongs:
                kong.start()
            stalled.write(stalled.head(1000) + b'[{"request":')
            wait_until(lambda: all(kong.acknowledged for kong in kongs), lambda: site.story(process))
            began_at = time.monotonic()
            assert stop(process) == 0
            assert time.monotonic() - began_at < 6
            for connection in (idle, stalled):
                with pytest.raises(OSError):
                    connection.answer()
            for kong in kongs:
                kong.give_up()
        acknowledged = [line for kong in kongs for line in kong.acknowledged]
        with site.receiving() as (process, _):
            site.wait_for_lines(process, len(acknowledged))
            wait_until(lambda: not site.segments(), lambda: site.story(process))
            assert stop(process) == 0
        assert set(expected_ids(acknowledged)) <= set(endpoint.ids())
        assert site.books().balanced
        assert site.books()[Count.LINES] <= len(acknowledged) + SENDERS * 20  # stored, the answer cut off
        assert "Traceback" not in site.errors.read_text()
