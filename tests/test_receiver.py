"""The receiver over real connections: takes all that Kong can send, in any wrapping, and refuses little.

Requests are raw bytes, as Kong's HTTP client (lua-resty-http) writes them. In the place of the spool is a list.
"""

import asyncio
import base64
import gzip
import json
import logging
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zstandard

from metershipper import listener, receiver
from metershipper.bodies import Line
from metershipper.books import Received
from metershipper.config import HttpLog
from metershipper.errors import ConfigError
from metershipper.receiver import Memory, Receiver
from metershipper.spool import NoRoom, Stored
from tests.integration.support import Answer

PATIENCE_SECONDS = 10.0
USER_AGENT = "lua-resty-http/0.17.1 (Lua) ngx_lua/10026"
TOKEN = "s3cr3t"
ENTRY = b'{"request":{"id":"1","uri":"/"},"started_at":1700000000000}'
OTHER = b'{"request":{"id":"2","uri":"/"},"started_at":1700000000001}'
BOTH = b"[" + ENTRY + b"," + OTHER + b"]"


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def answer(self) -> Answer:
        async with asyncio.timeout(PATIENCE_SECONDS):
            first, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
            headers = dict(line.lower().split(": ", 1) for line in lines)
            body = await self._reader.readexactly(int(headers.get("content-length", 0)))
        return Answer(int(first.split()[1]), headers, body)

    async def post(self, body: bytes, headers: dict[str, str] | None = None, **options: str) -> Answer:
        await self.send(request(body, headers, **options))
        return await self.answer()

    async def is_closed(self) -> bool:
        """Whether nothing more comes."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            try:
                return await self._reader.read() == b""
            except ConnectionResetError:
                return True

    def close(self) -> None:
        self._writer.close()


class Kong:
    """A receiver, what it stored, and connections to it."""

    def __init__(self, settings: HttpLog) -> None:
        self.lines: list[bytes] = []
        self.fault: NoRoom | None = None
        self.repeats = 0
        self.storing = asyncio.Event()
        self.may_store = asyncio.Event()
        self.may_store.set()
        self.receiver = Receiver(settings, self.store)
        self.port = 0

    async def store(self, lines: Sequence[Line]) -> Stored:
        self.storing.set()
        await self.may_store.wait()
        if self.fault:
            raise self.fault
        self.lines += map(bytes, lines)
        return Stored(len(lines) - self.repeats, self.repeats)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Client]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield Client(reader, writer)
        finally:
            writer.close()

    async def post(self, body: bytes, headers: dict[str, str] | None = None, **options: str) -> Answer:
        async with self.connected() as client:
            return await client.post(body, headers, **options)

    @property
    def counts(self) -> dict[str, int]:
        return {name: count for name, count in self.receiver.counts.items() if count}


def request(
    body: bytes = b"", headers: dict[str, str] | None = None, *, method: str = "POST", path: str = "/"
) -> bytes:
    """With a length, unless the headers say that it is chunked."""
    named = {"User-Agent": USER_AGENT, "Host": "127.0.0.1:8090", "Content-Type": "application/json"}
    named |= headers or {}
    if "Transfer-Encoding" not in named:
        named.setdefault("Content-Length", str(len(body)))
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def in_chunks(body: bytes, size: int) -> bytes:
    pieces = [body[begin : begin + size] for begin in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


async def serve(use: Callable[[Kong], Awaitable[None]], **settings: Any) -> Kong:
    """Use a receiver while it receives."""
    kong = Kong(HttpLog(**{"listen": "127.0.0.1:0", **settings}))
    urls: list[str] = []

    def keep_url(record: logging.LogRecord) -> bool:
        urls.append(getattr(record, "url", ""))
        return True

    log = logging.getLogger("metershipper.receiver")
    level = log.level
    log.addFilter(keep_url)
    log.setLevel(logging.INFO)
    try:
        async with kong.receiver.serving():
            kong.port = int(urls[-1].split("/")[2].rpartition(":")[2])
            await use(kong)
    finally:
        log.removeFilter(keep_url)
        log.setLevel(level)
    return kong


def with_kong(use: Callable[[Kong], Awaitable[None]], **settings: Any) -> Kong:
    return asyncio.run(serve(use, **settings))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110  # of what is counted nobody tells
            await asyncio.sleep(0.005)


# --- what Kong sends (case 57)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/json; charset=utf-8", "application/json;charset=UTF-8", "text/plain", ""],
)
@pytest.mark.parametrize(
    ("body", "lines"),
    [(ENTRY, [ENTRY]), (b"[" + ENTRY + b"]", [ENTRY]), (BOTH, [ENTRY, OTHER]), (b"[]", []), (b"", [])],
    ids=["object", "array of one", "array", "empty array", "nothing"],
)
def test_every_shape_is_taken(body: bytes, lines: list[bytes], content_type: str, method: str) -> None:
    async def use(kong: Kong) -> None:
        answer = await kong.post(body, {"Content-Type": content_type}, method=method)
        assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "0")

    kong = with_kong(use)
    assert (kong.lines, kong.counts) == (lines, {Received.REQUESTS: 1})


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_a_chunked_body_is_taken(size: int) -> None:
    async def use(kong: Kong) -> None:
        answer = await kong.post(in_chunks(BOTH, size), {"Transfer-Encoding": "chunked"})
        assert answer.status == 200

    assert with_kong(use).lines == [ENTRY, OTHER]


def test_who_expects_to_be_asked_for_the_body_is_asked() -> None:
    async def use(kong: Kong) -> None:
        async with kong.connected() as client:
            await client.send(request(b"", {"Expect": "100-continue", "Content-Length": str(len(BOTH))}))
            assert (await client.answer()).status == 100
            await client.send(BOTH)
            assert (await client.answer()).status == 200

    assert with_kong(use).lines == [ENTRY, OTHER]


@pytest.mark.parametrize(
    "pack", [gzip.compress, zstandard.compress, lambda data: gzip.compress(data[:50]) + gzip.compress(data[50:])]
)
@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip", "zstd", "identity", None])
def test_a_compressed_body_is_unpacked_whatever_it_is_called(
    pack: Callable[[bytes], bytes], encoding: str | None
) -> None:
    """By how it begins: also one whose header a proxy took away."""

    async def use(kong: Kong) -> None:
        headers = {} if encoding is None else {"Content-Encoding": encoding}
        assert (await kong.post(pack(BOTH), headers)).status == 200
        answer = await kong.post(in_chunks(pack(BOTH), 1), {**headers, "Transfer-Encoding": "chunked"})
        assert answer.status == 200

    assert with_kong(use).lines == [ENTRY, OTHER] * 2


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br", "deflate", "x"])
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_a_body_that_is_not_compressed_as_it_says_is_taken_as_it_is(encoding: str, size: int) -> None:
    """(case 55)"""

    async def use(kong: Kong) -> None:
        async with kong.connected() as client:
            body = in_chunks(BOTH, size)
            await client.send(request(b"", {"Content-Encoding": encoding, "Transfer-Encoding": "chunked"}))
            for byte in range(12):  # bytes that come one by one, as a slow network brings them
                await client.send(body[byte : byte + 1])
                await asyncio.sleep(0)
            await client.send(body[12:])
            assert (await client.answer()).status == 200

    assert with_kong(use).lines == [ENTRY, OTHER]


def test_a_large_array_is_stored_as_it_comes_and_answered_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [b'{"request":{"id":"%d"},"x":"%s"}' % (number, b"x" * 500) for number in range(8000)]

    async def use(kong: Kong) -> None:
        assert (await kong.post(b"[" + b",".join(entries) + b"]")).status == 200
        plain = kong.lines
        kong.lines = []
        assert (await kong.post(gzip.compress(b"[" + b",".join(entries) + b"]"))).status == 200
        assert plain == kong.lines == entries

    with_kong(use)


# --- what can't be understood is taken all the same (case 55)


@pytest.mark.parametrize(
    "body", [b"not JSON", b"\xff\xfe\x00", b'{"torn":', b"a=b&c=d", b"null", b"[1,{},]", b"\n\nx\n"]
)
def test_what_can_not_be_parsed_is_kept(body: bytes) -> None:
    async def use(kong: Kong) -> None:
        assert (await kong.post(body)).status == 200

    lines = with_kong(use).lines
    assert b"".join(lines).strip(b"\n") == body.strip(b"\n[],").replace(b",", b"") or b"".join(lines) in (b"1{}",)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_of_a_compressed_body_that_ends_too_early_everything_that_unpacks_is_kept(
    pack: Callable[[bytes], bytes],
) -> None:
    entries = [b'{"request":{"id":"%08x"}}' % zlib.crc32(b"%d" % number) for number in range(40_000)]

    async def use(kong: Kong) -> None:
        packed = pack(b"[" + b",".join(entries) + b"]")
        assert (await kong.post(packed[: len(packed) * 3 // 4])).status == 200

    lines = with_kong(use).lines
    assert len(lines) > 15_000
    assert lines[:-1] == entries[: len(lines) - 1]


def test_of_a_compressed_body_that_is_damaged_what_stands_before_is_kept() -> None:
    async def use(kong: Kong) -> None:
        assert (await kong.post(gzip.compress(BOTH)[:-8] + b"\0\1\2\3\4\5\6\7")).status == 200

    assert with_kong(use).lines[:2] == [ENTRY, OTHER]


# --- repeats


def test_repeats_are_counted_and_answered_as_if_they_came_first() -> None:
    """(case 56)"""

    async def use(kong: Kong) -> None:
        kong.repeats = 2
        assert (await kong.post(BOTH)).status == 200

    assert with_kong(use).counts == {Received.REQUESTS: 1, Received.REPEATS: 2}


def test_an_answer_waits_for_the_disk() -> None:
    """(case 54)"""

    async def use(kong: Kong) -> None:
        kong.may_store.clear()
        async with kong.connected() as client:
            await client.send(request(ENTRY))
            await kong.storing.wait()
            answering = asyncio.create_task(client.answer())
            await asyncio.wait({answering}, timeout=0.05)
            assert not answering.done()
            kong.may_store.set()
            assert (await answering).status == 200

    with_kong(use)


# --- connections (case 59)


def test_many_requests_come_on_one_connection() -> None:
    async def use(kong: Kong) -> None:
        async with kong.connected() as client:
            for number in range(50):
                answer = await client.post(b'{"n":%d}' % number, {"Connection": "keep-alive"})
                assert answer.status == 200
                assert answer.headers.get("connection") != "close"

    assert with_kong(use).lines == [b'{"n":%d}' % number for number in range(50)]


def test_an_idle_connection_is_kept_for_longer_than_kong_keeps_it() -> None:
    """60 s, http-log's `keepalive`."""
    assert listener.KEEP_ALIVE_SECONDS > 60


def test_an_idle_connection_is_closed_in_the_end_and_that_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "KEEP_ALIVE_SECONDS", 0.05)

    async def use(kong: Kong) -> None:
        async with kong.connected() as client:
            assert (await client.post(ENTRY)).status == 200
            assert await client.is_closed()
        async with kong.connected() as client:
            assert (await client.post(b"x", path="/other")).status == 404
            assert await client.is_closed()

    assert with_kong(use).counts == {Received.REQUESTS: 1, Received.WRONG_ADDRESS: 1}


@pytest.mark.parametrize("parts", [1, 3, 1000])
def test_requests_that_do_not_wait_for_the_answer_before_are_answered_in_order(parts: int) -> None:
    async def use(kong: Kong) -> None:
        async with kong.connected() as client:
            data = b"".join(request(b'{"n":%d}' % number) for number in range(20)) + request(b"x", path="/wrong")
            size = len(data) // parts + 1
            for begin in range(0, len(data), size):
                await client.send(data[begin : begin + size])
                await asyncio.sleep(0)
            statuses = [(await client.answer()).status for _ in range(21)]
        assert statuses == [200] * 20 + [404]

    assert with_kong(use).lines == [b'{"n":%d}' % number for number in range(20)]


def test_a_header_that_comes_with_the_end_of_a_large_body_is_not_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MAX_HEADER_BYTES", 500)

    async def use(kong: Kong) -> None:
        async with kong.connected() as client:
            second = request(OTHER)
            await client.send(request(ENTRY + b" " * 2000) + second[:30])
            assert (await client.answer()).status == 200
            await client.send(second[30:])
            assert (await client.answer()).status == 200

    assert with_kong(use).lines == [ENTRY, OTHER]


def test_empty_lines_before_a_request_are_skipped() -> None:
    async def use(kong: Kong) -> None:
        async with kong.connected() as client:
            for _ in range(2):
                await client.send(b"\r\n\r\n")
                assert (await client.post(ENTRY)).status == 200

    with_kong(use)


@pytest.mark.parametrize(
    "sent",
    [b"", b"\r\n", b"POST / HT", request(BOTH)[:-200]],
    ids=["nothing", "empty line", "half a line", "half a header"],
)
def test_a_header_that_does_not_come_in_time_is_cut_off(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HEADER_SECONDS", 0.05)

    async def use(kong: Kong) -> None:
        async with kong.connected() as slow, kong.connected() as other:
            await slow.send(sent)
            assert (await other.post(ENTRY)).status == 200
            assert await slow.is_closed()

    assert with_kong(use).counts == {Received.REQUESTS: 1, Received.TOO_SLOW: 1}


def test_a_header_that_comes_byte_by_byte_is_cut_off_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HEADER_SECONDS", 0.1)

    async def use(kong: Kong) -> None:
        async with kong.connected() as client:
            closed = asyncio.create_task(client.is_closed())
            await client.send(b"POST / HTTP/1.1\r\nX: ")
            while not closed.done():
                try:
                    await client.send(b"x")
                except ConnectionError:
                    break
                await asyncio.wait({closed}, timeout=0.01)
            assert await closed

    assert with_kong(use).counts == {Received.TOO_SLOW: 1}


@pytest.mark.parametrize("sent", [BOTH[:20], b""])
def test_a_body_that_does_not_come_in_time_is_cut_off(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what came of it, nothing is lost: it was never answered."""
    monkeypatch.setattr(listener, "BODY_SECONDS", 0.05)

    async def use(kong: Kong) -> None:
        async with kong.connected() as client:
            await client.send(request(sent, {"Content-Length": str(len(BOTH))}))
            assert await client.is_closed()
            await until(lambda: Received.BROKEN_OFF in kong.receiver.counts)

    kong = with_kong(use)
    assert (kong.lines, kong.counts) == ([], {Received.TOO_SLOW: 1, Received.BROKEN_OFF: 1})


def test_an_answer_that_takes_too_long_gives_its_place_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the client does not read what it is answered: a connection never stays for good."""
    monkeypatch.setattr(listener, "ANSWER_SECONDS", 0.05)

    async def use(kong: Kong) -> None:
        kong.may_store.clear()
        async with kong.connected() as client:
            await client.send(request(ENTRY))
            assert await client.is_closed()
            kong.may_store.set()
            await until(lambda: kong.lines != [])

    assert with_kong(use).counts[Received.TOO_SLOW] == 1


@pytest.mark.parametrize("name", ["X", "x" * 70_000])
def test_a_header_without_end_is_cut_off(name: str) -> None:
    async def use(kong: Kong) -> None:
        async with kong.connected() as client:
            closed = asyncio.create_task(client.is_closed())
            try:
                await client.send(b"POST / HTTP/1.1\r\n")
                for number in range(10_000):
                    await client.send(f"{name}-{number}: {'y' * 1000}\r\n".encode())
                    await asyncio.sleep(0)
            except ConnectionError:
                pass
            assert await closed

    assert with_kong(use).counts == {Received.TOO_SLOW: 1}


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS on a port without
        b"GARBAGE\r\n\r\n",
        request(ENTRY, {"Content-Length": "-5"}),
        request(ENTRY, {"Content-Length": "9" * 5000}),
        request(ENTRY, {"Transfer-Encoding": "chunked"}),
        b"CONNECT x:80 HTTP/1.1\r\n\r\n",
        b"POST http:// HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_not_http_is_answered_and_closed(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def use(kong: Kong) -> None:
        async with kong.connected() as client:
            await client.send(sent)
            assert (await client.answer()).status == 400
            assert await client.is_closed()

    counts = with_kong(use).counts
    assert counts[Received.MALFORMED] == 1
    assert Received.REQUESTS not in counts
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_sender_that_goes_away_in_the_middle_is_counted() -> None:
    async def use(kong: Kong) -> None:
        async with kong.connected() as client:
            await client.send(request(BOTH[:20], {"Content-Length": str(len(BOTH))}))
            await asyncio.sleep(0.01)
        await until(lambda: Received.BROKEN_OFF in kong.receiver.counts)

    kong = with_kong(use)
    assert (kong.lines, kong.counts) == ([], {Received.BROKEN_OFF: 1})


def test_with_too_many_connections_those_that_are_of_use_are_still_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_max_connections", lambda: 5)

    async def use(kong: Kong) -> None:
        async with kong.connected() as client:
            assert (await client.post(ENTRY)).status == 200
            idle = [await asyncio.open_connection("127.0.0.1", kong.port) for _ in range(20)]
            await until(lambda: kong.receiver.counts[Received.CROWDED_OUT] == 16)
            assert (await client.post(OTHER)).status == 200
            assert (await kong.post(ENTRY)).status == 200
            for _, writer in idle:
                writer.close()

    with_kong(use)


def test_at_the_end_complete_requests_are_answered_and_others_are_cut_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Kong sends those again to the next process; nothing of it looks like a fault in the log."""
    monkeypatch.setattr(listener, "STOP_SECONDS", 0.1)
    answers: list[Answer] = []
    tasks: list[asyncio.Task[Any]] = []

    async def use(kong: Kong) -> None:
        async def wait_for_answer() -> None:
            async with kong.connected() as client:
                answers.append(await client.post(ENTRY))

        async def stay_idle_and_incomplete() -> None:
            async with kong.connected() as client, kong.connected() as idle, kong.connected() as half:
                await half.send(b"POST")
                await client.send(request(BOTH[:20], {"Content-Length": str(len(BOTH))}))
                assert [await each.is_closed() for each in (client, idle, half)] == [True] * 3

        kong.may_store.clear()
        tasks.extend([asyncio.create_task(wait_for_answer()), asyncio.create_task(stay_idle_and_incomplete())])
        await kong.storing.wait()
        await asyncio.sleep(0.02)
        asyncio.get_running_loop().call_later(0.02, kong.may_store.set)

    async def run() -> Kong:
        kong = await serve(use)
        await asyncio.gather(*tasks)
        return kong

    kong = asyncio.run(run())
    assert [answer.status for answer in answers] == [200]
    assert kong.lines == [ENTRY]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


# --- what is refused


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    "authorization",
    [
        f"Bearer {TOKEN}",
        f"bearer  {TOKEN} ",
        basic("kong", TOKEN),
        basic("", TOKEN),
        basic("kong", TOKEN).replace("Basic", "basic"),
    ],
)
def test_the_right_token_is_a_bearer_or_a_basic_password(authorization: str, token_file: Path) -> None:
    """Basic is what Kong makes of http_endpoint = "https://kong:token@..." (case 61)."""

    async def use(kong: Kong) -> None:
        assert (await kong.post(ENTRY, {"Authorization": authorization})).status == 200

    assert with_kong(use, token_file=token_file).lines == [ENTRY]


@pytest.mark.parametrize(
    "authorization",
    [
        *(
            None,
            "",
            "Bearer",
            "Bearer ",
            "Bearer wrong",
            f"Bearer {TOKEN}x",
            f"Bearer {TOKEN[:-1]}",
            TOKEN,
            f"Digest {TOKEN}",
        ),
        *(basic("kong", "wrong"), basic(TOKEN, ""), "Basic", "Basic !!!", f"Basic {TOKEN}", "Bearer \xff"),
    ],
)
def test_anything_else_is_refused_before_its_body_is_looked_at(
    authorization: str | None, token_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """(case 61)"""

    async def use(kong: Kong) -> None:
        headers = {} if authorization is None else {"Authorization": authorization}
        answer = await kong.post(ENTRY, headers)
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "bearer"

    kong = with_kong(use, token_file=token_file)
    assert (kong.lines, kong.counts) == ([], {Received.UNAUTHORIZED: 1})
    assert "refused 1 requests without the right token (401)" in caplog.text
    assert TOKEN not in caplog.text


def test_a_refused_connection_is_still_of_use(token_file: Path) -> None:
    """The body of what was refused may still come."""

    async def use(kong: Kong) -> None:
        async with kong.connected() as client:
            await client.send(request(b"", {"Content-Length": "100000"}))
            assert (await client.answer()).status == 401
            await client.send(b"x" * 100_000)
            assert (await client.post(ENTRY, {"Authorization": f"Bearer {TOKEN}"})).status == 200

    with_kong(use, token_file=token_file)


def test_a_token_that_is_replaced_counts_at_once_and_the_old_one_no_more(
    token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "TOKEN_LOOK_SECONDS", 0.0)

    async def use(kong: Kong) -> None:
        async def status(token: str) -> int:
            return (await kong.post(ENTRY, {"Authorization": f"Bearer {token}"})).status

        assert await status(TOKEN) == 200
        await asyncio.to_thread(token_file.write_text, "new")
        assert [await status("new"), await status(TOKEN), await status("new")] == [200, 401, 200]
        await asyncio.to_thread(token_file.unlink)
        assert [await status("new"), await status("other"), await status("new")] == [200, 401, 200]

    with_kong(use, token_file=token_file)


def test_a_flood_of_wrong_tokens_does_not_read_the_file_each_time(
    token_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the log tells of it once in a while (case 61)."""
    reads: list[None] = []

    async def read(self: object) -> str:
        reads.append(None)
        return TOKEN

    monkeypatch.setattr("metershipper.credentials.TokenFile.read", read)

    async def use(kong: Kong) -> None:
        async with kong.connected() as client:
            for _ in range(100):
                assert (await client.post(ENTRY, {"Authorization": "Bearer wrong"})).status == 401
            monkeypatch.setattr(receiver, "REPEAT_LOG_SECONDS", 0.0)
            assert (await client.post(ENTRY)).status == 401

    assert with_kong(use, token_file=token_file).counts == {Received.UNAUTHORIZED: 101}
    assert len(reads) <= 4
    assert [message.split()[1] for message in caplog.messages if message.startswith("refused")] == ["1", "100"]


@pytest.mark.parametrize("content", [None, "", "two words"])
def test_without_a_token_in_the_file_nothing_is_received(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)

    async def use(kong: Kong) -> None:
        raise AssertionError

    with pytest.raises(ConfigError, match=str(path)):
        with_kong(use, token_file=path)


@pytest.mark.parametrize("path", ["/kong", "/kong/", "/kong?x=y", "/%6bong"])
def test_the_path_is_the_configured_one(path: str) -> None:
    async def use(kong: Kong) -> None:
        assert (await kong.post(ENTRY, path=path)).status == 200

    assert with_kong(use, path="/kong").lines == [ENTRY]


@pytest.mark.parametrize("path", ["/", "/kong/x", "/KONG", "/../kong", "//kong", "/kong/../../etc/passwd", "/kong%00"])
def test_another_path_is_refused(path: str) -> None:
    async def use(kong: Kong) -> None:
        answer = await kong.post(ENTRY, path=path)
        assert (answer.status, answer.body) == (404, b"Kong's http-log is received on /kong\n")

    kong = with_kong(use, path="/kong")
    assert (kong.lines, kong.counts) == ([], {Received.WRONG_ADDRESS: 1})


@pytest.mark.parametrize("method", ["GET", "DELETE", "OPTIONS", "PROPFIND"])
def test_another_method_is_refused(method: str) -> None:
    async def use(kong: Kong) -> None:
        answer = await kong.post(ENTRY, method=method)
        assert (answer.status, answer.headers["allow"]) == (405, "post, put, patch")

    assert with_kong(use).counts == {Received.WRONG_ADDRESS: 1}


# --- what is too large (case 58)


LIMIT = 5000


def too_large(kong: Kong, answer: Answer) -> None:
    assert (answer.status, answer.body) == (413, b"the body is over max_body_bytes = 5000\n")
    assert kong.counts == {Received.TOO_LARGE: 1}


@pytest.mark.parametrize("over", [False, True])
def test_a_body_over_the_limit_is_refused_by_its_length(over: bool) -> None:
    async def use(kong: Kong) -> None:
        async with kong.connected() as client:
            await client.send(request(b"", {"Content-Length": str(LIMIT + over)}))
            if over:
                too_large(kong, await client.answer())
            else:
                await client.send(b"x" * LIMIT)
                assert (await client.answer()).status == 200

    with_kong(use, max_body_bytes=LIMIT)


def test_a_client_that_expects_to_be_asked_is_not_asked_for_a_body_over_the_limit() -> None:
    async def use(kong: Kong) -> None:
        async with kong.connected() as client:
            await client.send(request(b"", {"Content-Length": str(LIMIT + 1), "Expect": "100-continue"}))
            too_large(kong, await client.answer())

    with_kong(use, max_body_bytes=LIMIT)


def test_a_chunked_body_is_refused_once_it_is_over_the_limit() -> None:
    async def use(kong: Kong) -> None:
        async with kong.connected() as client:
            await client.send(request(b"", {"Transfer-Encoding": "chunked"}))
            for _ in range(6):
                await client.send(b"%x\r\n%b\r\n" % (1000, b"x" * 1000))
            too_large(kong, await client.answer())

    with_kong(use, max_body_bytes=LIMIT)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_bomb_is_refused_by_what_it_holds(pack: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture) -> None:
    async def use(kong: Kong) -> None:
        bomb = pack(b"[" + b" " * 10_000_000)
        too_large(kong, await kong.post(bomb, {"Content-Encoding": "gzip"}))

    with_kong(use, max_body_bytes=LIMIT)
    assert "refused 1 bodies over inputs.http_log.max_body_bytes (413): Kong drops such a batch" in caplog.text


# --- a spool without room (case 60)


def test_without_room_the_sender_is_told_to_come_again(caplog: pytest.LogCaptureFixture) -> None:
    async def use(kong: Kong) -> None:
        kong.fault = NoRoom("the spool can't be written: No space left on device")
        answer = await kong.post(BOTH)
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        assert answer.body == b"the spool can't be written: No space left on device\n"
        kong.fault = None
        assert (await kong.post(BOTH)).status == 200

    kong = with_kong(use)
    assert (kong.lines, kong.counts) == ([ENTRY, OTHER], {Received.NO_ROOM: 1, Received.REQUESTS: 1})
    assert "refused 1 requests without room in the spool (503)" in caplog.text


def test_nothing_of_a_request_reaches_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """(case 71)"""
    caplog.set_level(logging.DEBUG)
    secret = "S3cretOfACustomer"

    async def use(kong: Kong) -> None:
        await kong.post(json.dumps({"x": secret}).encode(), {"X-Key": secret}, path=f"/{secret}")
        await kong.post(json.dumps({"x": secret}).encode(), {"X-Key": secret}, path=f"/?{secret}")
        async with kong.connected() as client:
            await client.send(f"{secret} / HTTP/9\r\n\r\n".encode())
            await client.answer()

    with_kong(use)
    assert secret not in caplog.text


# --- memory


def test_who_came_first_may_go_beyond_the_limit_and_others_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "SMALL_BYTES", 0)

    async def run() -> None:
        memory = Memory(100)
        with memory.claim() as first:
            await memory.hold(first, 90)
            with memory.claim() as second:
                await memory.hold(second, 10)
                waiting = asyncio.create_task(memory.hold(second, 11))
                await asyncio.sleep(0)
                assert not waiting.done()
                await memory.hold(first, 500)
                await memory.hold(first, 89)
                await asyncio.wait_for(waiting, PATIENCE_SECONDS)
                await memory.hold(first, 90)
                late = asyncio.create_task(memory.hold(second, 12))
                await asyncio.sleep(0)
                assert not late.done()
                late.cancel()
        assert memory._total_bytes == 0

    asyncio.run(run())


def test_who_holds_little_waits_for_nobody() -> None:
    async def run() -> None:
        memory = Memory(100)
        with memory.claim() as large, memory.claim() as small:
            await memory.hold(large, 10**9)
            await asyncio.wait_for(memory.hold(small, receiver.SMALL_BYTES), PATIENCE_SECONDS)

    asyncio.run(run())


def test_memory_is_free_again_at_the_end_however_that_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "SMALL_BYTES", 0)

    async def run() -> None:
        memory = Memory(100)

        async def fail() -> None:
            with memory.claim() as claim:
                await memory.hold(claim, 1000)
                raise NoRoom("full")

        for _ in range(3):
            with pytest.raises(NoRoom):
                await fail()
        async with asyncio.timeout(PATIENCE_SECONDS):
            with memory.claim() as first, memory.claim() as second:
                await memory.hold(first, 50)
                await memory.hold(second, 50)

    asyncio.run(run())


def test_when_the_first_one_ends_the_next_one_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "SMALL_BYTES", 0)

    async def run() -> list[int]:
        memory, order = Memory(10), list[int]()

        async def take(number: int) -> None:
            with memory.claim() as claim:
                await memory.hold(claim, 1)
                await asyncio.sleep(0)
                await memory.hold(claim, 100)
                order.append(number)

        await asyncio.wait_for(asyncio.gather(*map(take, range(5))), PATIENCE_SECONDS)
        return order

    assert asyncio.run(run()) == [0, 1, 2, 3, 4]
