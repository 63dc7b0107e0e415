"""The endpoint, over real HTTP on loopback: what each answer means, what is sent, and that no failure of a server or a
network is ever an exception, a lost token or unbounded memory (CASES 38, 44-48, 70).
"""

import asyncio
import contextlib
import gzip
import logging
import random
import socket
import ssl
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import httpx
import pytest
import trustme

from metershipper import __version__
from metershipper.config import OpenMeter
from metershipper.errors import ConfigError
from metershipper.openmeter import Endpoint, Token, describe
from metershipper.retry import Answer, Verdict

SECRET = "spat_V3ryS3cret"
BODY = b'[{"id":"1"}]'
ACCEPTED = b"HTTP/1.1 204 No Content\r\n\r\n"
SHORT_SECONDS = 0.3

# Does with the connection what it likes, after the head of a request and before its body.
Act: TypeAlias = Callable[["Server", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def reply(status: int, body: bytes = b"", content_type: str | None = None, **headers: str) -> bytes:
    named = {"Content-Length": str(len(body))} | ({"Content-Type": content_type} if content_type else {}) | headers
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in named.items()), "", ""]
    return "\r\n".join(lines).encode() + body


class Server:
    """Answers each request with the next of `replies`, and from the last one on with that; keeps what it was sent."""

    def __init__(self, *replies: bytes | Act) -> None:
        self._replies = replies
        self._tasks: set[asyncio.Task[Any]] = set()
        self.connections = 0
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.hung_up = asyncio.Event()  # a client has left
        self.got_one = asyncio.Event()
        self.closing = asyncio.Event()

    async def __aenter__(self) -> "Server":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/api/v1/events"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.close()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                answer = self._replies[min(len(self.heads), len(self._replies)) - 1]
                if not isinstance(answer, bytes):
                    return await answer(self, reader, writer)
                await self.read_body(reader)
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            self.hung_up.set()
        finally:
            writer.close()

    async def read_body(self, reader: asyncio.StreamReader) -> None:
        length = int(self.header(-1)["content-length"])
        self.bodies.append(await reader.readexactly(length))
        self.got_one.set()

    def header(self, number: int) -> dict[str, str]:
        lines = self.heads[number].decode().split("\r\n")[1:-2]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


async def never(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Take the batch and never answer."""
    await server.read_body(reader)
    await server.closing.wait()


async def reset(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Take the batch, then reset the connection."""
    await server.read_body(reader)
    writer.transport.abort()


async def reset_in_the_body(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reset the connection while the batch is still coming."""
    await reader.read(1)
    writer.transport.abort()


async def cut_off(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close the connection in the middle of an answer."""
    await server.read_body(reader)
    writer.write(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"a":')
    await writer.drain()


async def drip(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one byte at a time, for ever."""
    await server.read_body(reader)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    while not server.closing.is_set():
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.02)


def flood(head: bytes) -> Act:
    """Answer with a body that has no end."""

    async def act(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.read_body(reader)
        writer.write(head)
        while not server.closing.is_set():
            writer.write(b"x" * 65536)
            await writer.drain()

    return act


def settings(**changes: Any) -> OpenMeter:
    return OpenMeter.model_validate({"timeout_seconds": 5, "api_token": SECRET} | changes)


def post_to(*replies: bytes | Act, body: bytes = BODY, **changes: Any) -> tuple[Answer, Server]:
    """The answer of one post to a server with these replies."""

    async def run() -> tuple[Answer, Server]:
        async with Server(*replies) as server, Endpoint(server.url, settings(**changes)) as endpoint:
            return await endpoint.post(body), server

    return asyncio.run(run())


def post(url: str, **changes: Any) -> Answer:
    async def run() -> Answer:
        async with Endpoint(url, settings(**changes)) as endpoint:
            return await endpoint.post(BODY)

    return asyncio.run(run())


# --- what is sent


def test_a_batch_is_sent_with_exactly_these_headers() -> None:
    """v1 compares the content type letter by letter and unpacks nothing (OPENMETER 2)."""
    answer, server = post_to(ACCEPTED)
    assert answer == Answer(Verdict.ACCEPTED, "HTTP 204", 204)
    assert server.heads[0].startswith(b"POST /api/v1/events HTTP/1.1\r\n")
    assert server.bodies == [BODY]
    headers = server.header(0)
    assert headers.pop("host").startswith("127.0.0.1:")
    assert headers == {
        "accept": "*/*",
        "accept-encoding": "identity",
        "authorization": f"Bearer {SECRET}",
        "connection": "keep-alive",
        "content-length": str(len(BODY)),
        "content-type": "application/cloudevents-batch+json",
        "user-agent": f"metershipper/{__version__}",
    }


def test_without_a_token_no_authorization_is_sent() -> None:
    answer, server = post_to(ACCEPTED, api_token=None)
    assert answer.verdict is Verdict.ACCEPTED
    assert "authorization" not in server.header(0)


def test_batches_share_connections_and_are_in_flight_together() -> None:
    async def run() -> Server:
        async with Server(ACCEPTED) as server, Endpoint(server.url, settings(max_in_flight=3)) as endpoint:
            for _ in range(5):
                assert (await endpoint.post(BODY)).verdict is Verdict.ACCEPTED
            assert server.connections == 1
            together = await asyncio.gather(*(endpoint.post(BODY) for _ in range(30)))
            assert {answer.verdict for answer in together} == {Verdict.ACCEPTED}
            return server

    server = asyncio.run(run())
    assert len(server.bodies) == 35
    assert server.connections <= 3


# --- what an answer means (CASES 44, 45)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (ACCEPTED, "HTTP 204"),
        (reply(202), "HTTP 202"),
        (reply(200, b'{"ok": true}', "application/json"), "HTTP 200"),
        (reply(200, b"{}", "application/problem+json; charset=utf-8"), "HTTP 200"),
        (reply(200, b" \n", "text/html"), "HTTP 200"),
        (reply(202, b"\x1f\x8b broken", "application/json", **{"Content-Encoding": "gzip"}), "HTTP 202"),
    ],
)
def test_200_202_and_204_with_an_empty_or_json_body_are_accepted(answer: bytes, reason: str) -> None:
    assert post_to(answer)[0] == Answer(Verdict.ACCEPTED, reason, int(reason[-3:]))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (
            reply(200, b"<html>Sign in</html>", "text/html; charset=utf-8"),
            "HTTP 200 with a text/html; charset=utf-8 that OpenMeter does not send: "
            "something else answers at ingest_endpoint",
        ),
        (
            reply(200, b"ok"),
            "HTTP 200 with a body that OpenMeter does not send: something else answers at ingest_endpoint",
        ),
        (reply(201), "HTTP 201: not understood"),
        (
            reply(403),
            "HTTP 403: the token may not ingest events: replace the token file, it is read again at every try",
        ),
        (reply(404), "HTTP 404: there is no ingest endpoint at this path: correct ingest_endpoint"),
        (reply(405), "HTTP 405: there is no ingest endpoint at this path: correct ingest_endpoint"),
    ],
)
def test_what_a_person_must_look_into_is_never_accepted(answer: bytes, reason: str) -> None:
    assert post_to(answer)[0] == Answer(Verdict.NEEDS_A_PERSON, reason, int(reason[5:8]))


def test_a_refusal_tells_which_events_it_is_about() -> None:
    """CASES 42, 43: the server's pointer and words come along, for the dead letter."""
    body = b'{"detail":\n "/2/subject: too short"}'
    answer, _ = post_to(reply(400, body, "application/problem+json"))
    words = '{"detail": "/2/subject: too short"}'
    reason = f"HTTP 400: the endpoint refuses an event of this batch ({words})"
    assert answer == Answer(Verdict.REFUSED, reason, 400, words, None, (2,))
    assert answer.refusal == f"HTTP 400: {words}"
    assert post_to(reply(413))[0].verdict is Verdict.TOO_LARGE


@pytest.mark.parametrize("status", [408, 425, 500, 502, 504, 599])
def test_what_passes_by_itself_is_tried_again(status: int) -> None:
    assert post_to(reply(status, b"later"))[0] == Answer(Verdict.RETRY, f"HTTP {status} (later)", status, "later")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "86400"}, 300.0),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:30 GMT", "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30.0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"Retry-After": "soon"}, None),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_an_overloaded_server_says_when_to_come_back(
    status: int, headers: dict[str, str], seconds: float | None
) -> None:
    """CASES 41: both forms, by the server's clock, within bounds."""
    answer, _ = post_to(reply(status, b"later", **headers))
    assert answer == Answer(Verdict.SLOW_DOWN, f"HTTP {status} (later)", status, "later", seconds)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_never_followed_and_the_token_never_goes_there(status: int) -> None:
    """Followed, a 301 turns the POST into a GET that answers 200 with a list: every event lost (CASES 45)."""

    async def run() -> tuple[Answer, Server]:
        async with Server(ACCEPTED) as target, Server(reply(status, Location=target.url)) as server:
            async with Endpoint(server.url, settings()) as endpoint:
                answer = await endpoint.post(BODY)
            assert server.connections == 1
            return answer, target

    answer, target = asyncio.run(run())
    assert answer == Answer(
        Verdict.NEEDS_A_PERSON,
        f"HTTP {status}: a redirect, which is never followed: write the final URL into ingest_endpoint",
        status,
    )
    assert (target.connections, target.heads) == (0, [])


@pytest.mark.parametrize("location", ["http://[bad", "//", "javascript:1", "http://h:99999/", "\x7f", "http://xn--a/"])
def test_a_redirect_to_nonsense_is_an_answer_and_no_exception(location: str) -> None:
    assert post_to(reply(301, Location=location))[0].verdict is not Verdict.ACCEPTED


# --- the token (CASES 44, 70)


@pytest.mark.parametrize("status", [401, 403])
def test_a_rotated_token_file_is_read_again_after_a_refusal(status: int, tmp_path: Path) -> None:
    """CASES 44: it resumes by itself."""
    file = tmp_path / "token"
    file.write_text("old-token\n")

    async def run() -> list[str]:
        async with (
            Server(ACCEPTED, reply(status), ACCEPTED) as server,
            Endpoint(server.url, settings(api_token=None, api_token_file=file)) as endpoint,
        ):
            assert (await endpoint.post(BODY)).verdict is Verdict.ACCEPTED
            file.write_text("new-token\r\n")
            assert (await endpoint.post(BODY)).verdict is Verdict.NEEDS_A_PERSON
            assert (await endpoint.post(BODY)).verdict is Verdict.ACCEPTED
            return [server.header(number)["authorization"] for number in range(3)]

    assert asyncio.run(run()) == ["Bearer old-token", "Bearer old-token", "Bearer new-token"]


@pytest.mark.parametrize("broken", [None, "", "two words", "ünicode"])
def test_a_token_file_that_is_broken_for_a_moment_changes_nothing(broken: str | None, tmp_path: Path) -> None:
    """A rotation that is not atomic is met half-way; the next try looks again, and uses what it finds (case 44)."""
    file = tmp_path / "token"
    file.write_text("old-token")

    async def run() -> list[str]:
        async with (
            Server(reply(401)) as server,
            Endpoint(server.url, settings(api_token=None, api_token_file=file)) as endpoint,
        ):
            file.unlink()
            if broken is not None:
                file.write_text(broken)
            for _ in range(2):
                assert (await endpoint.post(BODY)).verdict is Verdict.NEEDS_A_PERSON
            file.write_text("new-token")
            for _ in range(2):
                await endpoint.post(BODY)
            return [server.header(number)["authorization"] for number in range(4)]

    assert asyncio.run(run()) == ["Bearer old-token"] * 2 + ["Bearer new-token"] * 2


@pytest.mark.parametrize("content", ["", "\n", "two words", "ünicode", "a\nb", "a\0b"])
def test_a_file_without_a_token_is_refused_by_its_name_alone(content: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        asyncio.run(Token(OpenMeter(api_token_file=file)).read())
    assert str(caught.value) == f"{file}: holds no token; it must be one line of printable ASCII without spaces"


def test_a_token_file_that_can_not_be_read_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the token can't be read: No such file or directory"):
        post("http://127.0.0.1:1/events", api_token=None, api_token_file=tmp_path / "none")


def test_a_token_comes_from_the_configuration_or_not_at_all() -> None:
    assert asyncio.run(Token(settings()).read()) == SECRET
    assert asyncio.run(Token(OpenMeter()).read()) is None
    assert Token(OpenMeter()).warning is None


def test_a_token_file_that_others_can_read_is_warned_of(tmp_path: Path) -> None:
    """CASES 75."""
    file = tmp_path / "token"
    token = Token(OpenMeter(api_token_file=file))
    assert token.warning is None  # there is none: reading it says so
    file.write_text(SECRET)
    file.chmod(0o600)
    assert token.warning is None
    file.chmod(0o644)
    assert token.warning == f"{file}: readable by every user of this machine; chmod 600 it"
    assert Token(OpenMeter(api_token_file=tmp_path / ("x" * 300))).warning is None


async def echo(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer with the request itself, as an echo service does."""
    writer.write(server.heads[-1].split(b"\r\n", 1)[1])


@pytest.mark.parametrize(
    "answer",
    [
        reply(401, f"the key {SECRET} is not known".encode()),
        reply(500, f"{' ' * 70_000}{SECRET}".encode()),
        reply(500, ("x" * 190 + SECRET).encode()),
        reply(200, b"x", f"text/{SECRET}"),
        reply(301, Location=f"http://h/?token={SECRET}"),
        reply(301, Location=f"http://[{SECRET}"),
        f"HTTP/1.1 {SECRET}\r\n\r\n".encode(),
        f"{SECRET}\r\n\r\n".encode(),
        f"HTTP/1.1 200 OK\r\n{SECRET}\r\n\r\n".encode(),
        f"HTTP/1.1 200 OK\r\nContent-Length: {SECRET}\r\n\r\n".encode(),
        f"HTTP/1.1 200 OK\r\nTransfer-Encoding: {SECRET}\r\n\r\n".encode(),
        echo,
        never,
        reset,
    ],
    ids=lambda answer: answer.__name__ if callable(answer) else answer[:40].decode(),
)
def test_the_token_is_in_no_answer_even_when_the_server_repeats_it(answer: bytes | Act) -> None:
    """CASES 70. Half a token would be half a leak: what is cut must not start with one."""
    got, server = post_to(answer, timeout_seconds=SHORT_SECONDS)
    assert server.header(0)["authorization"] == f"Bearer {SECRET}"
    assert got.verdict is not Verdict.ACCEPTED
    assert SECRET[:6] not in got.reason


def test_the_token_is_in_no_log_record_whatever_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """CASES 70: with everything at DEBUG, also httpx and httpcore, through a refusal, a reset and a timeout."""
    for name in ("", "httpx", "httpcore", "metershipper"):
        caplog.set_level(logging.DEBUG, logger=name)
    for answer in (ACCEPTED, reply(401), reset, never):
        post_to(answer, timeout_seconds=SHORT_SECONDS)
    assert "httpcore" in {record.name.partition(".")[0] for record in caplog.records}
    assert SECRET not in "".join(f"{record.getMessage()} {record.__dict__}" for record in caplog.records)


# --- failures of a network (CASES 38, 46, 47, 48)


@pytest.mark.parametrize("act", [reset, reset_in_the_body, cut_off])
def test_a_connection_lost_half_way_is_tried_again(act: Act) -> None:
    """CASES 38, 48: the server may have kept the batch; the same one comes again, with the same ids."""

    async def run() -> tuple[Answer, Answer, Server]:
        async with Server(act, ACCEPTED) as server, Endpoint(server.url, settings()) as endpoint:
            return await endpoint.post(b"x" * 8_000_000), await endpoint.post(BODY), server

    lost, after, server = asyncio.run(run())
    assert lost.verdict is Verdict.RETRY
    assert lost.reason.startswith("the exchange failed: ")
    assert after.verdict is Verdict.ACCEPTED
    assert server.connections == 2


@pytest.mark.parametrize("act", [never, drip])
def test_the_whole_exchange_has_one_deadline(act: Act) -> None:
    """CASES 48: a black hole and a slow drip both end at `timeout_seconds`, and cost no connection for ever."""

    async def run() -> tuple[list[Answer], float, Answer]:
        async with (
            Server(*[act] * 4, ACCEPTED) as server,
            Endpoint(server.url, settings(timeout_seconds=SHORT_SECONDS, max_in_flight=2)) as endpoint,
        ):
            started = time.monotonic()
            answers = list(await asyncio.gather(*(endpoint.post(BODY) for _ in range(2))))
            answers += await asyncio.gather(*(endpoint.post(BODY) for _ in range(2)))
            return answers, time.monotonic() - started, await endpoint.post(BODY)

    answers, seconds, after = asyncio.run(run())
    assert answers == [Answer(Verdict.RETRY, "no answer within 0.3 s")] * 4
    assert 2 * SHORT_SECONDS <= seconds < 2 * SHORT_SECONDS + 1
    assert after.verdict is Verdict.ACCEPTED


def test_a_host_that_drops_packets_meets_the_deadline() -> None:
    """CASES 48: nobody takes the connection, and nobody refuses it."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        waiting = [socket.socket() for _ in range(2)]  # these fill the queue of the listener
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(address)
        try:
            answer = post(f"http://127.0.0.1:{address[1]}/events", timeout_seconds=SHORT_SECONDS)
        finally:
            for each in waiting:
                each.close()
    assert answer == Answer(Verdict.RETRY, "no answer within 0.3 s")


def test_a_batch_the_server_does_not_read_meets_the_deadline() -> None:
    async def stall(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.closing.wait()

    answer, _ = post_to(stall, body=b"x" * 20_000_000, timeout_seconds=SHORT_SECONDS)
    assert answer == Answer(Verdict.RETRY, "no answer within 0.3 s")


def test_a_cancellation_is_not_taken_for_a_failure() -> None:
    async def run() -> None:
        async with Server(never) as server, Endpoint(server.url, settings()) as endpoint:
            task = asyncio.create_task(endpoint.post(BODY))
            await server.got_one.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())


def test_a_name_that_does_not_resolve_is_told_from_a_port_nobody_listens_on() -> None:
    """CASES 46."""
    unknown = post("http://nonexistent.invalid/api/v1/events")
    assert unknown == Answer(Verdict.RETRY, "the host name can't be resolved (DNS)")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    refused = post(f"http://127.0.0.1:{port}/api/v1/events")
    assert refused == Answer(Verdict.RETRY, "the connection was refused: nothing listens there")


def test_the_certificate_is_checked_unless_the_configuration_says_otherwise(tmp_path: Path) -> None:
    """CASES 47: unknown CA, wrong host; no fallback."""
    ca, other = trustme.CA(), trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    other.cert_pem.write_to_path(tmp_path / "other.pem")

    async def answers(host: str, *changes: dict[str, Any]) -> list[Answer]:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        ca.issue_cert(host).configure_cert(context)

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(BODY)
            writer.write(b"HTTP/1.1 204 X\r\nConnection: close\r\n\r\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
        async with server:
            url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/api/v1/events"
            got = []
            for change in changes:
                async with Endpoint(url, settings(**change)) as endpoint:
                    got.append(await endpoint.post(BODY))
            return got

    ours = {"ca_file": tmp_path / "ca.pem"}
    right = asyncio.run(answers("127.0.0.1", {}, ours, {"ca_file": tmp_path / "other.pem"}, {"ssl_verify": False}))
    assert right[1] == right[3] == Answer(Verdict.ACCEPTED, "HTTP 204", 204)
    assert right[0].verdict is right[2].verdict is Verdict.RETRY
    assert "TLS failed: unable to get local issuer certificate" in (right[0].reason, right[2].reason)
    (wrong,) = asyncio.run(answers("other.example", ours))
    assert wrong.verdict is Verdict.RETRY
    assert wrong.reason.startswith("TLS failed: IP address mismatch")


def test_a_name_is_resolved_again_at_every_new_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """CASES 46: a name that fails for a while, or moves to another address, is nothing to restart for."""
    addresses: list[str | None] = [None, "127.0.0.2", "127.0.0.1"]
    resolve = socket.getaddrinfo

    def moving(host: Any, *rest: Any, **more: Any) -> Any:
        if host not in ("openmeter.test", b"openmeter.test"):
            return resolve(host, *rest, **more)
        address = addresses.pop(0)
        if address is None:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return resolve(address, *rest, **more)

    async def run() -> list[Answer]:
        async with Server(ACCEPTED) as server:
            monkeypatch.setattr(socket, "getaddrinfo", moving)
            async with Endpoint(server.url.replace("127.0.0.1", "openmeter.test"), settings()) as endpoint:
                return [await endpoint.post(BODY) for _ in range(3)]

    unknown, refused, accepted = asyncio.run(run())
    assert unknown == Answer(Verdict.RETRY, "the host name can't be resolved (DNS)")
    assert refused == Answer(Verdict.RETRY, "the connection was refused: nothing listens there")
    assert accepted.verdict is Verdict.ACCEPTED
    assert addresses == []


def test_a_certificate_that_expired_is_told_and_its_successor_taken_up(tmp_path: Path) -> None:
    """CASES 47: also during a run."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1", not_after=datetime(2020, 1, 1, tzinfo=UTC)).configure_cert(context)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(BODY)
            writer.write(b"HTTP/1.1 204 X\r\nConnection: close\r\n\r\n")
            await writer.drain()
        writer.close()

    async def run() -> list[Answer]:
        async with await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context) as server:
            url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/api/v1/events"
            async with Endpoint(url, settings(ca_file=tmp_path / "ca.pem")) as endpoint:
                expired = await endpoint.post(BODY)
                ca.issue_cert("127.0.0.1").configure_cert(context)
                return [expired, await endpoint.post(BODY)]

    expired, renewed = asyncio.run(run())
    assert (expired.verdict, expired.reason) == (Verdict.RETRY, "TLS failed: certificate has expired")
    assert renewed.verdict is Verdict.ACCEPTED


def test_tls_to_a_port_that_speaks_http_is_told() -> None:
    async def run() -> Answer:
        async def answer_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(reply(400))
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(answer_at_once, "127.0.0.1", 0) as server:
            url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/api/v1/events"
            async with Endpoint(url, settings()) as endpoint:
                return await endpoint.post(BODY)

    answer = asyncio.run(run())
    assert answer.verdict is Verdict.RETRY
    assert answer.reason.startswith("TLS failed: ")


def test_a_tls_handshake_nobody_answers_leaves_no_connection_behind() -> None:
    """CASES 48: an outage of hours must not use up all file descriptors."""

    async def run() -> list[Answer]:
        left: asyncio.Queue[None] = asyncio.Queue()

        async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                await reader.read()
            left.put_nowait(None)
            writer.close()

        async with await asyncio.start_server(wait, "127.0.0.1", 0) as server:
            url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/api/v1/events"
            async with Endpoint(url, settings(timeout_seconds=0.05)) as endpoint:
                answers = [await endpoint.post(BODY) for _ in range(5)]
                async with asyncio.timeout(5):
                    for _ in answers:
                        await left.get()  # while the endpoint is still in use
                return answers

    assert asyncio.run(run()) == [Answer(Verdict.RETRY, "no answer within 0.05 s")] * 5


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (httpx.ConnectTimeout("x"), "the connection timed out"),
        (httpx.ReadError(""), "the exchange failed: ReadError"),
        (httpx.ReadError("why"), "the exchange failed: ReadError (why)"),
        (ExceptionGroup("all", [OSError(1, "x"), ConnectionRefusedError(111, "no")]), "the connection was refused"),
        (OSError("all attempts failed"), "the exchange failed: OSError (all attempts failed)"),
    ],
)
def test_every_failure_has_words(error: Exception, words: str) -> None:
    error.__context__ = error  # a circle must not hang it
    assert describe(error).startswith(words)


@pytest.mark.parametrize("seed", range(40))
def test_no_bytes_of_a_server_are_an_exception(seed: int) -> None:
    """Noise, and cut or damaged answers, give an answer; and none is taken for accepted that was no 2xx."""
    random_ = random.Random(seed)
    good = reply(503, b"{}" * 20, "application/json", **{"Transfer-Encoding": "chunked"} if seed % 2 else {})
    noise = bytearray(good)
    for _ in range(seed % 8):
        noise[random_.randrange(len(noise))] = random_.randrange(256)
    data = bytes(noise) if seed % 4 else random_.randbytes(seed * 10)

    async def act(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.read_body(reader)
        writer.write(data)

    answer, _ = post_to(act, timeout_seconds=SHORT_SECONDS)
    assert answer.verdict is not Verdict.ACCEPTED or data.startswith(b"HTTP/1.1 20")
    assert answer.reason.isprintable()
    assert len(answer.reason) < 500


# --- bounds


@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_without_an_end_is_not_read_to_its_end(status: int) -> None:
    async def run() -> Answer:
        act = flood(f"HTTP/1.1 {status} X\r\nContent-Type: text/plain\r\n\r\n".encode())
        async with Server(act) as server, Endpoint(server.url, settings(timeout_seconds=60)) as endpoint:
            answer = await endpoint.post(BODY)
            await server.hung_up.wait()  # the client has let go of it
            return answer

    answer = asyncio.run(run())
    assert answer.verdict is (Verdict.NEEDS_A_PERSON if status == 200 else Verdict.RETRY)
    assert len(answer.reason) < 500


def test_a_packed_answer_is_not_unpacked() -> None:
    """100 KB of gzip may hold 100 MB, and the memory of a sidecar is bounded."""
    bomb = gzip.compress(bytes(100_000_000), 1)
    tracemalloc.start()
    answer, server = post_to(reply(500, bomb, "text/plain", **{"Content-Encoding": "gzip"}))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert answer.verdict is Verdict.RETRY
    assert answer.reason.isprintable()
    assert peak_bytes < 20_000_000
    assert server.header(0)["accept-encoding"] == "identity"


def test_what_a_server_says_comes_out_on_one_short_line() -> None:
    """CASES 74: no line break and no escape sequence of a server gets into the log."""
    said, _ = post_to(reply(500, b"a\nb\x1b[31m\r\xe2\x80\xa8c" + b"d" * 1000))
    typed, _ = post_to(reply(200, b"x", "text/\x1b[31m" + "d" * 1000))
    assert said.reason.startswith("HTTP 500 (a b [31m cdd")
    for answer in (said, typed):
        assert answer.reason.isprintable()
        assert len(answer.reason) < 400


# --- what can't be set up is a mistake of the configuration


@pytest.mark.parametrize("url", ["http://h\n/events", "http://mü..ller/events", "http://xn--a/events", "http://h:x/"])
def test_an_address_no_client_can_use_is_refused_at_the_start(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^openmeter\.ingest_endpoint: not a usable URL: "):
        post(url)


def test_a_file_that_holds_no_ca_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name, words in {"none": "No such file or directory", "empty": "", ".": "Is a directory"}.items():
        with pytest.raises(ConfigError, match=f"no usable CA certificates: .*{words}"):
            post("https://127.0.0.1:1/events", ca_file=tmp_path / name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", f"socks5://user:{SECRET}@127.0.0.1:1"),
        ("HTTP_PROXY", f"gopher://user:{SECRET}@127.0.0.1:1"),
        ("HTTPS_PROXY", f"http://user:{SECRET}@[::1::]"),
        ("SSL_CERT_FILE", "/nonexistent.pem"),
    ],
)
def test_a_broken_proxy_or_certificate_variable_is_refused_unseen(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy's URL holds a password as often as not."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"^environment: no HTTP client with these") as caught:
        post("https://127.0.0.1:1/events")
    assert SECRET not in str(caught.value)


def test_a_replaced_ca_file_is_taken_up_without_a_restart(tmp_path: Path) -> None:
    """CASES 47: the CA bundle is rotated, and a certificate of the new one is trusted; what is in neither never is."""
    old, new, stranger = trustme.CA(), trustme.CA(), trustme.CA()
    file = tmp_path / "ca.pem"
    old.cert_pem.write_to_path(str(file))

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(len(BODY) if head else 0)
            writer.write(b"HTTP/1.1 204 X\r\nConnection: close\r\n\r\n")
            await writer.drain()
        writer.close()

    def context(ca: trustme.CA) -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert("127.0.0.1").configure_cert(made)
        return made

    async def run() -> list[Verdict]:
        serving = context(new)
        async with await asyncio.start_server(accept, "127.0.0.1", 0, ssl=serving) as server:
            url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/api/v1/events"
            async with Endpoint(url, settings(ca_file=file)) as endpoint:
                verdicts = [(await endpoint.post(BODY)).verdict]
                stranger.cert_pem.write_to_path(str(file))
                verdicts += [(await endpoint.post(BODY)).verdict for _ in range(2)]
                file.write_text("")
                verdicts.append((await endpoint.post(BODY)).verdict)
                new.cert_pem.write_to_path(str(file))
                verdicts += [(await endpoint.post(BODY)).verdict for _ in range(2)]
            return verdicts

    assert asyncio.run(run()) == [Verdict.RETRY] * 5 + [Verdict.ACCEPTED]


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy gets the request with the endpoint's full URL; one that wants credentials is told as such."""

    async def run() -> tuple[list[Answer], Server]:
        async with Server(ACCEPTED, reply(407)) as proxy:
            monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/api/v1/events"))
            async with Endpoint("http://openmeter.invalid/api/v1/events", settings()) as endpoint:
                return [await endpoint.post(BODY), await endpoint.post(BODY)], proxy

    (through, refused), proxy = asyncio.run(run())
    assert through.verdict is Verdict.ACCEPTED
    assert proxy.heads[0].startswith(b"POST http://openmeter.invalid/api/v1/events HTTP/1.1\r\n")
    assert refused.verdict is Verdict.NEEDS_A_PERSON and "the proxy wants credentials" in refused.reason
