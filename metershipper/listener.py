"""Connections of the http-log receiver: who may stay, and for how long; TLS; and the end of all of them.

uvicorn speaks HTTP. It has no deadline for a header or a body and no bound of connections that keeps others served, so
those are here. Never looks into a request (`receiver` does).
"""

import asyncio
import logging
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from metershipper.books import Books, Received
from metershipper.config import HttpLog
from metershipper.errors import ConfigError

log = logging.getLogger("metershipper.receiver")

MAX_CONNECTIONS = 1000
# For files, the endpoint and everything else that is no connection.
_OTHER_DESCRIPTORS = 256
# Kong keeps an idle connection for 60 s (http-log's `keepalive`): the one that listens must not close first.
KEEP_ALIVE_SECONDS = 75
HEADER_SECONDS = 10.0
BODY_SECONDS = 60.0
# Longer than Kong waits for an answer; who does not read what is answered is cut off as well.
ANSWER_SECONDS = 60.0
HANDSHAKE_SECONDS = 10.0
BACKLOG = 1024
ACCEPT_AGAIN_SECONDS = 0.5
MAX_HEADER_BYTES = 64 * 1024
# How long requests that are complete may take to be answered when we stop.
STOP_SECONDS = 3.0
CANCEL_SECONDS = 0.5
CERTIFICATE_LOOK_SECONDS = 60.0


class Guest(Protocol):
    """A connection, as `Guests` sees it. `is_known`: a request of its was accepted before."""

    is_known: bool

    def crowd_out(self) -> None: ...


class Guests:
    """The connections that wait for their client, and which of them makes room for another one. No I/O.

    First goes who never sent anything of use, then who is idle for longest; never who waits for us.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._strangers: dict[Guest, None] = {}
        self._known: dict[Guest, None] = {}
        self._served: set[Guest] = set()

    def __len__(self) -> int:
        return len(self._strangers) + len(self._known) + len(self._served)

    def enter(self, guest: Guest) -> None:
        """A new connection; if it is one too many, another one is crowded out, or else it is itself."""
        self._strangers[guest] = None
        if len(self) > self._limit:
            waiting = self._strangers if len(self._strangers) > 1 or not self._known else self._known
            next(iter(waiting)).crowd_out()

    def leave(self, guest: Guest) -> None:
        """A connection ended."""
        self._strangers.pop(guest, None)
        self._known.pop(guest, None)
        self._served.discard(guest)

    def waits_for_us(self, guest: Guest) -> None:
        """Its request is complete and not answered yet."""
        self.leave(guest)
        self._served.add(guest)

    def we_wait(self, guest: Guest) -> None:
        """It was answered."""
        self.leave(guest)
        (self._known if guest.is_known else self._strangers)[guest] = None


class Connection(HttpToolsProtocol):
    """One connection, with deadlines. In `scope["state"]["connection"]` a request finds its own."""

    def __init__(self, config: uvicorn.Config, state: ServerState, guests: Guests, counts: Books) -> None:
        super().__init__(config, state, {"connection": self})
        self.is_known = False
        self._guests = guests
        self._counts = counts
        self.arrival: Guest | None = None  # in whose place it comes
        self._deadline: asyncio.TimerHandle | None = None
        self._header_bytes: int | None = None  # None between the end of a header and the next request

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Wait for a request, if there is room."""
        super().connection_made(transport)
        self._set_deadline(HEADER_SECONDS)
        if self.arrival is not None:
            self._guests.leave(self.arrival)
        self._guests.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        self._set_deadline(None)
        self._guests.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came; a header without end is cut off."""
        if self._header_bytes is not None:  # not of the bytes in which it begins: the end of a body may be before it
            self._header_bytes += len(data)
        super().data_received(data)
        if self._header_bytes is not None and self._header_bytes > MAX_HEADER_BYTES:
            self._cut_off(Received.TOO_SLOW)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._header_bytes = 0
        self._set_deadline(HEADER_SECONDS)

    def on_headers_complete(self) -> None:
        """The body follows."""
        self._header_bytes = None
        self._set_deadline(BODY_SECONDS)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is complete."""
        if self.cycle.response_complete:  # it was refused by its header
            self._set_deadline(KEEP_ALIVE_SECONDS, None)
        else:
            self._set_deadline(ANSWER_SECONDS)
            self._guests.waits_for_us(self)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The request is answered; if it was refused by its header, the body may still come."""
        if not self.pipeline:
            self._guests.we_wait(self)
            if not self.cycle.more_body:
                self._set_deadline(KEEP_ALIVE_SECONDS, None)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Not HTTP."""
        self._counts[Received.MALFORMED] += 1
        super().send_400_response(msg)

    def crowd_out(self) -> None:
        """Make room for another connection."""
        self._cut_off(Received.CROWDED_OUT)

    def _set_deadline(self, seconds: float | None, reason: Received | None = Received.TOO_SLOW) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._cut_off, reason)

    def _cut_off(self, reason: Received | None) -> None:
        if reason is not None:
            self._counts[reason] += 1
        self._guests.leave(self)
        self.transport.abort()


@asynccontextmanager
async def listening(settings: HttpLog, app: Callable[..., Any], counts: Books) -> AsyncIterator[str]:
    """Serve `app` on the configured address; yields its URL. At the end, requests that are complete are answered.

    Raises: ConfigError when the address or a certificate can't be used.
    """
    for name in ("uvicorn.error", "uvicorn.asgi"):
        logging.getLogger(name).setLevel(logging.ERROR)  # at WARNING it tells of every malformed request
    config = uvicorn.Config(
        app,
        interface="asgi3",
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        proxy_headers=False,
    )
    config.load()
    context = _tls_context(settings)
    state, guests = ServerState(), Guests(_max_connections())
    with _bound_socket(settings) as listener:

        def new_connection() -> Connection:
            return Connection(config, state, guests, counts)

        tasks: list[asyncio.Task[None]] = []
        server = None
        if context is None:
            server = await asyncio.get_running_loop().create_server(new_connection, sock=listener, backlog=BACKLOG)
        else:
            listener.listen(BACKLOG)
            tasks.append(asyncio.create_task(_accept(listener, context, new_connection, guests, counts)))
            tasks.append(asyncio.create_task(_renew_certificate(settings, context)))
        try:
            host, port = settings.address[0], listener.getsockname()[1]
            yield f"{'https' if context else 'http'}://{f'[{host}]' if ':' in host else host}:{port}{settings.path}"
        finally:
            for task in tasks:
                task.cancel()
            if server is not None:
                server.close()
            await _end(state)


async def _accept(
    listener: socket.socket,
    context: ssl.SSLContext,
    new_connection: Callable[[], Connection],
    guests: Guests,
    counts: Books,
) -> None:
    """Let in who comes over TLS, until cancelled."""
    arrivals: set[_Arrival] = set()
    try:
        while True:
            try:
                accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as error:
                log.error("connections can't be accepted (%s); trying again", error.strerror)
                await asyncio.sleep(ACCEPT_AGAIN_SECONDS)
                continue
            arrival = _Arrival(guests, counts)
            arrivals.add(arrival)
            arrival.task = asyncio.create_task(arrival.shake_hands(accepted, context, new_connection))
            arrival.task.add_done_callback(lambda _, arrival=arrival: arrivals.discard(arrival))  # type: ignore[misc]
            guests.enter(arrival)
    finally:
        for arrival in arrivals:
            arrival.task.cancel()


class _Arrival:
    """A connection during its TLS handshake: uvicorn does not know it yet, but it counts among the strangers."""

    is_known = False
    task: "asyncio.Task[None]"

    def __init__(self, guests: Guests, counts: Books) -> None:
        self._guests = guests
        self._counts = counts

    async def shake_hands(
        self, accepted: socket.socket, context: ssl.SSLContext, new_connection: Callable[[], Connection]
    ) -> None:
        """To the end of the handshake, or of the connection."""

        def connection() -> Connection:
            made = new_connection()
            made.arrival = self
            return made

        with suppress(OSError):  # no handshake; ssl.SSLError is one, and TimeoutError
            await asyncio.get_running_loop().connect_accepted_socket(
                connection, accepted, ssl=context, ssl_handshake_timeout=HANDSHAKE_SECONDS
            )
        self._guests.leave(self)

    def crowd_out(self) -> None:
        """Make room for another connection."""
        self._counts[Received.CROWDED_OUT] += 1
        self._guests.leave(self)
        self.task.cancel()


async def _end(state: ServerState) -> None:
    for connection in list(state.connections):
        connection.shutdown()
    if state.tasks:
        await asyncio.wait(state.tasks, timeout=STOP_SECONDS)
    for connection in list(state.connections):
        with suppress(AttributeError):  # of a connection that has just ended
            connection.transport.abort()
    if state.tasks:  # who still waits for a body learns that it does not come
        await asyncio.wait(state.tasks, timeout=CANCEL_SECONDS)
    for task in list(state.tasks):
        task.cancel()


def _max_connections() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + _OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return (
        MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(16, min(MAX_CONNECTIONS, soft - _OTHER_DESCRIPTORS))
    )


def _bound_socket(settings: HttpLog) -> socket.socket:
    host, port = settings.address
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, ValueError) as error:  # a name that can't be one is no OSError
        reason = error.strerror if isinstance(error, OSError) else "not a name"
        raise ConfigError(f"inputs.http_log.listen: {settings.listen} can't be used: {reason}") from None
    listener.setblocking(False)
    return listener


def _tls_context(settings: HttpLog) -> ssl.SSLContext | None:
    if settings.cert_file is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load_certificate(settings, context)
    if settings.client_ca_file is not None:
        try:
            context.load_verify_locations(settings.client_ca_file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{settings.client_ca_file}: no CA certificates can be read: {error}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load_certificate(settings: HttpLog, context: ssl.SSLContext) -> None:
    assert settings.cert_file is not None
    try:
        context.load_cert_chain(settings.cert_file, settings.key_file, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        names = f"{settings.cert_file}, {settings.key_file}"
        raise ConfigError(f"{names}: no certificate with its key can be read: {error}") from None


async def _renew_certificate(settings: HttpLog, context: ssl.SSLContext) -> None:
    """Read a certificate that was replaced, for the connections to come, until cancelled."""

    def stamps() -> list[int]:
        return [path.stat().st_mtime_ns for path in (settings.cert_file, settings.key_file) if path]

    loaded = stamps()
    while True:
        await asyncio.sleep(CERTIFICATE_LOOK_SECONDS)
        try:
            now = await asyncio.to_thread(stamps)
            if now != loaded:
                await asyncio.to_thread(_load_certificate, settings, context)
                loaded = now
                log.info("the renewed certificate is used from now on")
        except (OSError, ConfigError) as error:
            log.error("the certificate can't be read again; the old one is still used: %s", error)
