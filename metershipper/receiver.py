"""Takes in what Kong's http-log posts: an ASGI application that answers 200 once the entries are on disk.

Owns what is refused, and that is little: Kong sends a refused batch again for a while, then drops it and what queued
behind it. Only wrong credentials, a body that is too large, and a spool without room are; what can't be understood is
accepted and becomes a dead letter where it is read. Never looks into an entry; nothing of a request reaches a path.
"""

import asyncio
import base64
import binascii
import hmac
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from metershipper.archive import MAGIC_BYTES, Damaged, Unpacker, compression_of
from metershipper.bodies import Body, Line
from metershipper.books import Books, Received
from metershipper.config import HttpLog
from metershipper.credentials import TokenFile
from metershipper.errors import ConfigError
from metershipper.listener import listening
from metershipper.spool import NoRoom, Stored

log = logging.getLogger("metershipper.receiver")

# Bodies that are on their way, all together: beyond this those that came later wait, but for small ones: whoever stalls
# in the middle of a large body does not make others wait for its deadline.
MEMORY_BYTES = 32 * 1024 * 1024
SMALL_BYTES = 64 * 1024
# So many entries are stored at once; what others send is stored between.
STORED_AT_ONCE = 10_000
RETRY_AFTER_SECONDS = 5
# The same trouble is repeated in the log at most this often.
REPEAT_LOG_SECONDS = 30.0
# A wrong token is a reason to look whether it was replaced, but not for every request of a flood.
TOKEN_LOOK_SECONDS = 1.0
# So much of a body is looked through in one go; others are served between.
SLICE_BYTES = 256 * 1024

_ACCEPTED = Response(status_code=200)
_WORDS = {
    Received.UNAUTHORIZED: "requests without the right token (401): Kong's http-log needs it in `headers`, as "
    "Authorization: Bearer, or as the password in http_endpoint",
    Received.WRONG_ADDRESS: "requests that are none of http-log's (404, 405): its http_endpoint must have the path of "
    "inputs.http_log.path",
    Received.TOO_LARGE: "bodies over inputs.http_log.max_body_bytes (413): Kong drops such a batch; lower its "
    "queue.max_batch_size or raise the limit",
    Received.NO_ROOM: "requests without room in the spool (503): Kong tries again for its queue.max_retry_time",
}
_Store = Callable[[Sequence[Line]], Awaitable[Stored]]


class Receiver:
    """One listening address. `store` returns once lines are durable; `counts` says what came, until it is taken."""

    def __init__(self, settings: HttpLog, store: _Store) -> None:
        self._settings = settings
        self._store = store
        self._token_file = TokenFile(settings.token_file) if settings.token_file else None
        self._token: bytes | None = None
        self._look_again_at = 0.0
        self._memory = Memory(MEMORY_BYTES)
        self.counts = Books()
        self._untold: Counter[Received] = Counter()
        self._told_at: dict[Received, float] = {}

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Receive within. Raises ConfigError when the token, the address or a certificate can't be used."""
        if self._token_file is not None:
            self._token = (await self._token_file.read()).encode()
            if warning := self._token_file.warning:
                log.warning(warning)
        async with listening(self._settings, self, self.counts) as url:
            log.info("receiving Kong's http-log on %s", url, extra={"url": url})
            yield

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        answer = await self._refusal(scope) or await self._take_in(scope, receive)
        if answer is not None:
            await answer(scope, receive, send)

    # What is refused

    async def _refusal(self, scope: Scope) -> Response | None:
        """Why a request is not worth reading its body."""
        if not await self._is_authorized(_header(scope, b"authorization")):
            text = "a bearer token, or the same as a Basic password, is needed"
            return self._refuse(Received.UNAUTHORIZED, 401, text, {"WWW-Authenticate": "Bearer"})
        if scope["path"].rstrip("/") != self._settings.path.rstrip("/"):
            return self._refuse(Received.WRONG_ADDRESS, 404, f"Kong's http-log is received on {self._settings.path}")
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            text = "Kong's http-log sends POST, PUT or PATCH"
            return self._refuse(Received.WRONG_ADDRESS, 405, text, {"Allow": "POST, PUT, PATCH"})
        length = _header(scope, b"content-length")
        return self._too_large() if length.isdigit() and int(length) > self._settings.max_body_bytes else None

    def _too_large(self) -> Response:
        text = f"the body is over max_body_bytes = {self._settings.max_body_bytes}"
        return self._refuse(Received.TOO_LARGE, 413, text)

    def _refuse(self, reason: Received, status: int, text: str, headers: dict[str, str] | None = None) -> Response:
        self.counts[reason] += 1
        self._untold[reason] += 1
        now = time.monotonic()
        if now - self._told_at.get(reason, -REPEAT_LOG_SECONDS) >= REPEAT_LOG_SECONDS:
            self._told_at[reason] = now
            count = self._untold.pop(reason)
            log.error("refused %d %s; %s", count, _WORDS[reason], text, extra={"reason": reason, "requests": count})
        return PlainTextResponse(f"{text}\n", status, headers)

    async def _is_authorized(self, authorization: bytes) -> bool:
        if self._token_file is None:
            return True
        given = _secret_in(authorization)
        if self._token is not None and hmac.compare_digest(given, self._token):
            return True
        now = time.monotonic()
        if now < self._look_again_at:
            return False
        self._look_again_at = now + TOKEN_LOOK_SECONDS
        try:
            self._token = (await self._token_file.read()).encode()
        except ConfigError as error:
            log.error("%s; the one that was read before is still valid", error)
        return self._token is not None and hmac.compare_digest(given, self._token)

    # What is taken in

    async def _take_in(self, scope: Scope, receive: Receive) -> Response | None:
        """Store the entries of a request; None when its sender went away."""
        unpacked = _Unpacked()
        body = Body()
        repeats = length = 0
        try:
            with self._memory.claim() as claim:
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        self.counts[Received.BROKEN_OFF] += 1
                        return None
                    more = message.get("more_body", False)
                    for piece in unpacked.feed(message.get("body", b""), more):
                        length += len(piece)
                        if length > self._settings.max_body_bytes:
                            return self._too_large()
                        repeats += await self._keep(body.add(piece))
                        await self._memory.hold(claim, body.held_bytes)
                repeats += await self._keep(body.end())
        except NoRoom as full:
            return self._refuse(Received.NO_ROOM, 503, str(full), {"Retry-After": str(RETRY_AFTER_SECONDS)})
        self.counts[Received.REQUESTS] += 1
        self.counts[Received.REPEATS] += repeats
        scope["state"]["connection"].is_known = True
        return _ACCEPTED

    async def _keep(self, lines: Sequence[Line]) -> int:
        """Store lines; how many of them were repeats. Raises NoRoom; then some may be stored, and be repeats later."""
        repeats = 0
        for begin in range(0, len(lines), STORED_AT_ONCE):
            repeats += (await self._store(lines[begin : begin + STORED_AT_ONCE])).repeats
        return repeats


class _Unpacked:
    """A body as it is meant: unpacked, where it is compressed. That is told by how it begins, not by Content-Encoding,
    which may be false. From where it does not unpack on, it is taken as it is: what can't be understood is kept as a
    dead letter.
    """

    def __init__(self) -> None:
        self._beginning: bytes | None = b""  # until there is enough of it
        self._unpacker: Unpacker | None = None

    def feed(self, data: bytes, more: bool) -> Iterator[bytes]:
        """What the next piece is, in slices."""
        if self._beginning is not None:
            data = self._beginning + data
            self._beginning = data if more and len(data) < MAGIC_BYTES else None
            if self._beginning is not None:
                return
            compression = compression_of(data[:MAGIC_BYTES])
            self._unpacker = Unpacker(compression) if compression else None
        for piece in self._unpacked(data):
            for begin in range(0, len(piece), SLICE_BYTES):
                yield piece[begin : begin + SLICE_BYTES]

    def _unpacked(self, data: bytes) -> Iterator[bytes]:
        if self._unpacker is None:
            yield data
            return
        try:
            yield from self._unpacker.feed(data)
        except Damaged:
            self._unpacker = None
            yield data


class Memory:
    """What requests hold of their bodies, all together. Who would go beyond the limit waits, but for who came first and
    who holds little.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held: dict[object, int] = {}
        self._total_bytes = 0
        self._freed = asyncio.Event()

    @contextmanager
    def claim(self) -> Iterator[object]:
        """What is held for a request is free again at the end."""
        claim = object()
        self._held[claim] = 0
        try:
            yield claim
        finally:
            self._total_bytes -= self._held.pop(claim)
            self._free()

    async def hold(self, claim: object, held_bytes: int) -> None:
        """The request holds so many bytes now; returns when it may hold more."""
        growth = held_bytes - self._held[claim]
        self._total_bytes += growth
        self._held[claim] = held_bytes
        if growth < 0:
            self._free()
        if held_bytes <= SMALL_BYTES:
            return
        while self._total_bytes > self._limit_bytes and next(iter(self._held)) is not claim:
            await self._freed.wait()

    def _free(self) -> None:
        self._freed.set()
        self._freed = asyncio.Event()


def _header(scope: Scope, name: bytes) -> bytes:
    """The first header of this name; empty when there is none."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    return next((value for key, value in headers if key == name), b"")


def _secret_in(authorization: bytes) -> bytes:
    """The bearer token or the Basic password of an Authorization header; empty when there is none."""
    scheme, _, given = authorization.partition(b" ")
    match scheme.lower():
        case b"bearer":
            return given.strip()
        case b"basic":
            try:
                return base64.b64decode(given.strip(), validate=True).partition(b":")[2]
            except binascii.Error:
                return b""
    return b""
