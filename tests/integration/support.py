"""An endpoint that fails on purpose, and the sidecar as a process: what the guarantees are tested with."""

import asyncio
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson
import trustme

from metershipper.books import Books, Count
from metershipper.checkpoint import Checkpoint
from metershipper.dead_letters import Filter, Letter
from metershipper.errors import StateError
from metershipper.mapper import Mapper
from metershipper.metering import Metering, Subject
from metershipper.sandbox import Json, Store, accept

DEADLINE_SECONDS = 60.0

# What the endpoint does with a request: store it or not, and answer, answer 503, or close without an answer.
Fault = str
FAULTS: tuple[Fault, ...] = ("503 before", "503 after", "closed before", "closed after")


@dataclass(frozen=True)
class Received:
    """One request as it came: header names in lower case, and the events of its body."""

    headers: dict[str, str]
    body: bytes
    events: list[dict[str, Any]]


@dataclass(frozen=True)
class Reply:
    """What the endpoint does in place of accepting: answer this, having stored the events or not; or never answer."""

    status: int = 204
    body: bytes = b""
    content_type: str = "application/problem+json"
    headers: dict[str, str] = field(default_factory=dict)
    stores: bool = False
    hangs: bool = False

    def encoded(self) -> bytes:
        named = {"Content-Length": str(len(self.body)), "Content-Type": self.content_type} | self.headers
        lines = [f"HTTP/1.1 {self.status} X", *(f"{name}: {value}" for name, value in named.items()), "", ""]
        return "\r\n".join(lines).encode() + self.body


@dataclass
class FaultyEndpoint:
    """A v1 ingest endpoint on loopback that stores events as the sandbox does, and fails at the given rate.

    Used as a context manager; it serves from a thread of its own. `rate` may be changed at any time.
    """

    rate: float = 0.0
    seed: int = 1
    faults: tuple[Fault, ...] = FAULTS
    store: Store = field(default_factory=Store)
    requests: int = 0
    failed: int = 0
    answering: threading.Event = field(default_factory=threading.Event)  # while clear, requests wait for an answer
    port: int = 0
    # Asked about each request: what to do with it, None for what the endpoint does by itself.
    behaviour: Callable[[Received], Reply | None] = lambda _: None
    received: list[Received] = field(default_factory=list)
    keeps_received: bool = False

    def __enter__(self) -> "FaultyEndpoint":
        self.answering.set()
        self._random = random.Random(self.seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._ready = threading.Event()
        self._thread.start()
        assert self._ready.wait(DEADLINE_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.answering.set()  # or a failed test would never end
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(DEADLINE_SECONDS)
        self._loop.close()
        self.store.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api/v1/events"

    def ids(self) -> list[str]:
        """The ids of the stored events, in the order in which they came."""
        ids: list[str] = []
        after = 0
        while rows := self.store.lines(after):
            ids += [orjson.loads(event)["id"] for _, event in rows]
            after = rows[-1][0]
        return ids

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._main())

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        async with server:
            await self._stop.wait()
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        lines = (line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        headers = {name.lower(): value for name, value in lines}
        body = await reader.readexactly(int(headers["content-length"]))
        self.requests += 1
        request = Received(headers, body, orjson.loads(body))
        if self.keeps_received:
            self.received.append(request)
        if (reply := self.behaviour(request)) is not None:
            if reply.stores:
                accept(self.store, "v1", body, headers["content-type"])
            if reply.hangs:
                await self._stop.wait()
            writer.write(reply.encoded())
            await writer.drain()
            return True
        await asyncio.to_thread(self.answering.wait)
        fault = self._random.choice(self.faults) if self._random.random() < self.rate else ""
        if not fault.endswith("before"):
            accept(self.store, "v1", body, headers["content-type"])
        if fault:
            self.failed += 1
            if fault.startswith("closed"):
                return False
            writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
        else:
            writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await writer.drain()
        return True


@dataclass
class Site:
    """A directory with a log, a state directory and a configuration, and the sidecar run over it."""

    directory: Path
    url: str
    extra: str = ""
    environment: dict[str, str] | None = None  # of the process; None: that of the test

    def __post_init__(self) -> None:
        self.log = self.directory / "usage.log"
        self.state = self.directory / "state"
        self.config = self.directory / "config.toml"
        self.errors = self.directory / "run.log"
        self.config.write_text(
            f"""
[openmeter]
ingest_endpoint = "{self.url}"
timeout_seconds = 2.0
[openmeter.batch]
max_events = 50
max_wait_seconds = 0.05
[openmeter.retry]
initial_delay_seconds = 0.02
max_delay_seconds = 0.2
[[inputs.files]]
path = "{self.log}"
[state]
directory = "{self.state}"
[metering.subject]
field = "username"
{self.extra}
""",
            encoding="utf-8",
        )

    @contextmanager
    def running(self, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
        """`metershipper run` as a process; it does not outlive the block."""
        with self.errors.open("ab") as errors:
            command = [sys.executable, "-m", "metershipper", "run", "-c", str(self.config), *options]
            with subprocess.Popen(command, stderr=errors, env=self.environment) as process:
                try:
                    yield process
                finally:
                    process.kill()

    @contextmanager
    def receiving(self, *options: str) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
        """`metershipper run`, once it listens for Kong's http-log: the process and its port."""
        told = self.told()
        with self.running(*options) as process:
            yield process, self.wait_for_port(process, told)

    def wait_for_port(self, process: "subprocess.Popen[bytes]", told: int) -> int:
        """Wait until it says, behind the first `told` characters of the log, on which port it listens."""

        listening = re.compile(r"receiving Kong's http-log on https?://[^ \"]+:([0-9]+)/")

        def found() -> "re.Match[str] | None":
            return listening.search(self.errors.read_text(), told)

        wait_until(lambda: found() is not None or process.poll() is not None, lambda: self.story(process))
        port = found()
        assert port is not None, self.story(process)
        return int(port[1])

    def told(self) -> int:
        """How long the log is by now, in characters."""
        return len(self.errors.read_text()) if self.errors.exists() else 0

    def segments(self) -> list[Path]:
        """The segments of the spool, the oldest first."""
        return sorted((self.state / "spool").glob("*.ndjson"))

    def books(self) -> Books:
        """The committed books; empty before there is a checkpoint."""
        try:
            with Checkpoint(self.state, read_only=True) as checkpoint:
                return checkpoint.books()
        except StateError:
            return Books()

    def letters(self) -> list[Letter]:
        """The committed dead letters."""
        with Checkpoint(self.state, read_only=True) as checkpoint:
            return checkpoint.dead_letters.select(Filter(), 1_000_000)

    def command(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Another of our commands over the same configuration, to its end."""
        command = [sys.executable, "-m", "metershipper", *words, "-c", str(self.config)]
        return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS)

    @contextmanager
    def replaying(self, *words: str) -> Iterator["subprocess.Popen[bytes]"]:
        """`metershipper replay` as a process; it does not outlive the block."""
        with self.errors.open("ab") as errors:
            command = [sys.executable, "-m", "metershipper", "replay", "-c", str(self.config), *words]
            with subprocess.Popen(command, stdout=errors, stderr=errors, env=self.environment) as process:
                try:
                    yield process
                finally:
                    process.kill()

    def configure(self, section: str, *lines: str) -> None:
        """Add lines to a section of the configuration."""
        text = self.config.read_text(encoding="utf-8")
        assert f"[{section}]\n" in text
        added = "".join(f"{line}\n" for line in lines)
        self.config.write_text(text.replace(f"[{section}]\n", f"[{section}]\n{added}", 1), encoding="utf-8")

    def wait_for_words(self, process: "subprocess.Popen[bytes]", words: str) -> None:
        """Wait until the log holds these words."""
        wait_until(lambda: words in self.errors.read_text(), lambda: self.story(process))

    def wait_for_lines(self, process: "subprocess.Popen[bytes]", lines: int) -> None:
        """Wait until that many lines are settled."""
        wait_until(lambda: self.books()[Count.LINES] >= lines, lambda: self.story(process))

    def story(self, process: "subprocess.Popen[bytes]") -> str:
        """What to print when a wait was in vain."""
        return f"exit code {process.poll()}, {dict(self.books())}\n{self.errors.read_text()[-3000:]}"


@dataclass(frozen=True)
class Answer:
    """What the receiver says to one request; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class Sender:
    """A connection of Kong's http-log: kept alive, with the bytes that its HTTP client (lua-resty-http) writes.

    Used as a context manager. Args: `headers`, of every request, as in the plugin's configuration; `tls`, for https.
    """

    def __init__(
        self, port: int, headers: dict[str, str] | None = None, *, path: str = "/", tls: ssl.SSLContext | None = None
    ) -> None:
        self._headers = headers or {}
        self._path = path
        self._connection = socket.create_connection(("127.0.0.1", port), DEADLINE_SECONDS)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            self._connection = tls.wrap_socket(self._connection, server_hostname="localhost")
        self._received = b""

    def __enter__(self) -> "Sender":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def post(self, body: bytes, headers: dict[str, str] | None = None, *, method: str = "POST") -> Answer:
        """One request to its answer. Raises ConnectionError when there is none."""
        self.write(self.head(len(body), headers, method=method) + body)
        return self.answer()

    def head(self, length: int | None, headers: dict[str, str] | None = None, *, method: str = "POST") -> bytes:
        """The header of a request; `length` None: of one that tells it otherwise."""
        named = {
            "User-Agent": "lua-resty-http/0.17.2 (Lua) ngx_lua/10026",
            "Host": "127.0.0.1",
            "Content-Type": "application/json",
            **({} if length is None else {"Content-Length": str(length)}),
            **self._headers,
            **(headers or {}),
        }
        lines = [f"{method} {self._path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items()), "", ""]
        return "\r\n".join(lines).encode()

    def write(self, data: bytes) -> None:
        """Raw bytes."""
        self._connection.sendall(data)

    def answer(self) -> Answer:
        """The next answer. Raises ConnectionError when the connection ends before it does."""
        head = self.read_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
        length = int(headers.get("content-length", "0"))
        while len(self._received) < length:
            self._read()
        body, self._received = self._received[:length], self._received[length:]
        return Answer(int(head[0].split()[1]), headers, body)

    def read_until(self, end: bytes) -> bytes:
        """What comes up to `end`, and with it."""
        while end not in self._received:
            self._read()
        before, found, self._received = self._received.partition(end)
        return before + found

    def _read(self) -> None:
        data = self._connection.recv(65536)
        if not data:
            raise ConnectionResetError("closed without an answer")
        self._received += data


def tls_settings(directory: Path, ca: trustme.CA) -> str:
    """What [inputs.http_log] needs to be `localhost` by a certificate of `ca`, and to ask clients for one."""
    server = ca.issue_cert("localhost")
    server.private_key_pem.write_to_path(directory / "key.pem")
    server.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    ca.cert_pem.write_to_path(directory / "ca.pem")
    files = {"cert_file": "cert.pem", "key_file": "key.pem", "client_ca_file": "ca.pem"}
    return "".join(f'{key} = "{directory / name}"\n' for key, name in files.items())


def tls_client(ca: trustme.CA, issuer: trustme.CA | None) -> ssl.SSLContext:
    """A client that trusts `ca`, with a certificate of `issuer`."""
    context = ssl.create_default_context()
    ca.configure_trust(context)
    if issuer is not None:
        issuer.issue_cert("kong.internal").configure_cert(context)
    return context


def array_of(lines: list[bytes]) -> bytes:
    """Entries as http-log sends several of them."""
    return b"[" + b",".join(line.rstrip(b"\n") for line in lines) + b"]"


def stop(process: "subprocess.Popen[bytes]") -> int:
    """SIGTERM, and the exit code."""
    process.send_signal(signal.SIGTERM)
    return process.wait(DEADLINE_SECONDS)


def wait_until(condition: Callable[[], bool], story: Callable[[], str] = str) -> None:
    """Poll for a condition of another process, which has no event to wait for."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, story()
        time.sleep(0.01)


def append(path: Path, *lines: bytes) -> None:
    """Append lines as Kong's file-log does: one write for each, to a file opened for appending."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        for line in lines:
            os.write(fd, line)
    finally:
        os.close(fd)


def expected_ids(lines: list[bytes]) -> list[str]:
    """The ids of the events that these lines must become, in order."""
    return [event.id for event in Mapper(Metering(subject=Subject(field="username"))).map_lines(b"".join(lines)).events]


class TimedStore(Store):
    """Remembers when each event was accepted (`time.monotonic_ns`), and every id in the order in which it came."""

    def __init__(self) -> None:
        super().__init__()
        self.accepted: dict[str, int] = {}
        self.received: list[str] = []

    def add(self, events: list[Json], now: str) -> None:
        super().add(events, now)
        ids = [event["id"] for event in events]
        self.received += ids
        for each in ids:
            self.accepted.setdefault(each, time.monotonic_ns())


def unmeasured() -> dict[str, str]:
    """An environment in which coverage does not measure the process: one that is killed reports nothing anyway."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
