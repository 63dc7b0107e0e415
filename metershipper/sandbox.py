"""An ingest endpoint that answers like OpenMeter's, for evaluation and tests.

Owns the wire rules of ingesting and listing events (statuses, content types, validation, problem documents, dedupe by
source and id), a SQLite store behind them, and three paths under /sandbox/ of its own, which OpenMeter does not have.

Never more than that: no authentication, meters, customers or filters, and an event it answers 2xx for is always kept.
A real OpenMeter's sink drops some accepted events later without a trace (`time` in 1970 or earlier, for one) and
forgets ids after its dedupe window; neither is imitated, so passing here is necessary and not sufficient.
"""

import asyncio
import re
import socket
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from errno import EINVAL
from http import HTTPStatus
from math import isfinite
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Version = Literal["v1", "v3"]
Json = dict[str, Any]

ONE_EVENT = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"
EITHER = "application/json"
ACCEPTED: dict[Version, int] = {"v1": 204, "v3": 202}
REQUIRED = ("specversion", "id", "source", "type", "subject")
OPTIONAL = ("datacontenttype", "dataschema", "time", "data")  # each may also be null
ATTRIBUTES = REQUIRED + OPTIONAL
ALLOWED = {"specversion": ("1.0", "0.3"), "datacontenttype": ("application/json",)}
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT([01]\d|2[0-3]):\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", re.ASCII)
NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
MAX_INTEGER = 2**63 - 1  # SQLite's
NDJSON_ROWS = 2000  # per read: listing a large store neither holds the lock for long nor fills memory
SHUTDOWN_SECONDS = 5  # for requests under way at SIGTERM: a client that stops reading must not keep the process

SCHEMA = """
PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS events (
  source TEXT NOT NULL, id TEXT NOT NULL, time REAL NOT NULL, ingested_at TEXT NOT NULL, type TEXT NOT NULL,
  subject TEXT NOT NULL, model TEXT, token_type TEXT, tokens INTEGER NOT NULL, event TEXT NOT NULL,
  PRIMARY KEY (source, id)
);
CREATE INDEX IF NOT EXISTS events_by_time ON events (time);
CREATE TABLE IF NOT EXISTS books (requests INTEGER NOT NULL, refused INTEGER NOT NULL, received INTEGER NOT NULL);
INSERT INTO books SELECT 0, 0, 0 WHERE NOT EXISTS (SELECT * FROM books);
"""
INSERT = "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (source, id) DO NOTHING"
# sum() fails beyond 64 bits, so the halves are summed apart and joined in Python.
USAGE = """
SELECT type, subject, model, token_type, count(*), sum(tokens >> 32), sum(tokens & 0xffffffff)
FROM events GROUP BY type, subject, model, token_type ORDER BY type, subject, model, token_type
"""


class Fault(NamedTuple):
    """One thing wrong with a request: OpenMeter's words, its name of the broken rule, and the way from the body."""

    reason: str
    rule: str = ""
    path: tuple[str, ...] = ()


class RefusedError(Exception):
    """The request is answered with 400, and nothing of it is kept."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__(faults[0].reason)
        self.faults = faults


def parse_time(text: str) -> float | None:
    """Seconds since the epoch, or None when `text` is not RFC 3339 or not on the calendar."""
    if not RFC3339.fullmatch(text):
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def value_fault(name: str, value: object) -> Fault | None:
    """What is wrong with the value, not null, of one attribute."""
    if name == "data":
        return None if isinstance(value, dict) else Fault("value must be an object", "type", (name,))
    if not isinstance(value, str):
        return Fault("value must be a string", "type", (name,))
    if value == "":
        return Fault("minimum string length is 1", "min_length", (name,))
    if name in ALLOWED and value not in ALLOWED[name]:
        return Fault(f"value is not one of the allowed values {list(ALLOWED[name])}", "enum", (name,))
    if name == "time" and parse_time(value) is None:
        return Fault('string doesn\'t match the format "date-time"', "format", (name,))
    return None


def event_faults(event: object, version: Version) -> Iterator[Fault]:
    """Everything wrong with one event, with paths from the event."""
    if not isinstance(event, dict):
        yield Fault("value must be an object", "type")
        return
    for name in ATTRIBUTES:
        value = event.get(name)
        if value is not None:
            if fault := value_fault(name, value):
                yield fault
        elif name not in event and name in REQUIRED:
            yield Fault(f'property "{name}" is missing', "required", (name,))
        elif name in REQUIRED:
            yield Fault("Value is not nullable", "nullable", (name,))
    if version == "v3":
        for name in event.keys() - ATTRIBUTES:  # OpenMeter points at the event here and not at the property
            yield Fault(f'property "{name}" is unsupported', "properties")


def parse_body(body: bytes, content_type: str, version: Version) -> Any:
    """The document of one request, of the shape its content type asks for."""
    media_type = content_type if version == "v1" else content_type.partition(";")[0].strip().lower()
    if media_type not in (ONE_EVENT, BATCH, EITHER):
        raise RefusedError(Fault(f"invalid content type: {content_type}"))
    try:
        document = orjson.loads(body)  # refuses NaN and numbers beyond a double
    except orjson.JSONDecodeError as error:
        raise RefusedError(Fault(f"failed to decode request body: {error}")) from None
    if media_type == BATCH and not isinstance(document, list):
        raise RefusedError(Fault("value must be an array", "type"))
    if media_type == ONE_EVENT and isinstance(document, list):
        raise RefusedError(Fault("value must be an object", "type"))
    if media_type == EITHER and document == []:
        raise RefusedError(Fault("no events found"))
    return document


def parse_events(body: bytes, content_type: str, version: Version) -> list[Json]:
    """The events of one request. Raises: RefusedError with every fault found, so one bad event refuses them all."""
    document = parse_body(body, content_type, version)
    is_batch = isinstance(document, list)
    events = document if is_batch else [document]
    faults = [
        fault._replace(path=(str(index), *fault.path)) if is_batch else fault
        for index, event in enumerate(events)
        for fault in event_faults(event, version)
    ]
    if faults:
        raise RefusedError(*faults)
    return events


def parse_positive(request: Request, name: str, default: int, most: int) -> int:
    """The query parameter `name`, a whole number from 1 to `most`."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"\d{1,19}", text, re.ASCII) or not 1 <= int(text) <= most:
        raise RefusedError(Fault(f"{name} must be a number from 1 to {most}"))
    return int(text)


def token_count(value: object) -> int:
    """`data.tokens` as a whole number of 64 bits; what is not a number counts 0."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = int(value) if len(value) < 20 and value.lstrip("-").isdigit() else float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        return 0
    return min(max(int(value), -MAX_INTEGER), MAX_INTEGER)


def to_row(event: Json, now: str) -> tuple[object, ...]:
    """The columns of one valid event; extension attributes are dropped, a missing time is `now`."""
    kept = {name: event[name] for name in ATTRIBUTES if name in event}
    kept["time"] = time = event.get("time") or now
    data = event.get("data") or {}
    source, event_id, event_type, subject = (event[name] for name in ("source", "id", "type", "subject"))
    model, token_type = (value if isinstance(value := data.get(name), str) else None for name in ("model", "type"))
    columns = (source, event_id, parse_time(time), now, event_type, subject, model, token_type)
    return *columns, token_count(data.get("tokens")), orjson.dumps(kept).decode()


class Store:
    """The events kept and the requests counted, in one SQLite file or in memory; safe to call from any thread."""

    def __init__(self, database: Path | None = None) -> None:
        """Raises: OSError when the file, created when missing, can't be opened or is no database."""
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(database or ":memory:", check_same_thread=False)
        except sqlite3.Error as error:
            raise OSError(f"{database}: {error}") from error
        try:
            self._connection.executescript(SCHEMA)
        except sqlite3.Error as error:
            self._connection.close()
            raise OSError(f"{database}: {error}") from error

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def add(self, events: list[Json], now: str) -> None:
        """Keep the events of one accepted request in one transaction; of those with one (source, id), the first."""
        rows = [to_row(event, now) for event in events]
        with self._lock, self._connection as connection:
            connection.executemany(INSERT, rows)
            connection.execute("UPDATE books SET requests = requests + 1, received = received + ?", (len(rows),))

    def count_refused(self) -> None:
        with self._lock, self._connection as connection:
            connection.execute("UPDATE books SET requests = requests + 1, refused = refused + 1")

    def counts(self) -> dict[str, int]:
        query = "SELECT requests, refused, received, (SELECT count(*) FROM events) FROM books"
        requests, refused, received, events = self._select(query)[0]
        books = dict(requests=requests, refused=refused, received=received)
        return books | dict(events=events, repeats=received - events)

    def usage(self) -> list[Json]:
        """Events and tokens summed by event type, subject, model and token type."""
        names = ("event_type", "subject", "model", "type", "events", "tokens")
        rows = self._select(USAGE)
        return [dict(zip(names, (*row, (high << 32) + low), strict=True)) for *row, high, low in rows]

    def page(self, limit: int, after: int = 0) -> list[Any]:
        """Up to `limit` (rowid, ingested_at, event), newest first by their own time, after the rowid `after`."""
        where = "WHERE (time, rowid) < (SELECT time, rowid FROM events WHERE rowid = ?1)" if after else ""
        query = f"SELECT rowid, ingested_at, event FROM events {where} ORDER BY time DESC, rowid DESC LIMIT ?2"
        return self._select(query, after, limit)

    def lines(self, after: int) -> list[Any]:
        """Some (rowid, event) in the order they came, after the rowid `after`."""
        query = "SELECT rowid, event FROM events WHERE rowid > ? ORDER BY rowid LIMIT ?"
        return self._select(query, after, NDJSON_ROWS)

    def _select(self, query: str, *parameters: int) -> list[Any]:
        with self._lock:
            return self._connection.execute(query, parameters).fetchall()


def json_response(document: object) -> Response:
    return Response(orjson.dumps(document), media_type=EITHER)


def problem(status: int, document: Json, headers: Any = None) -> Response:
    base = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    return Response(orjson.dumps(base | document), status, headers, "application/problem+json")


def refuse(error: RefusedError, version: Version) -> Response:
    """400: v1 tells the first fault, v3 all of them."""
    first = error.faults[0]
    if version == "v1":
        return problem(400, {"detail": f"/{'/'.join(first.path)}: {first.reason}" if first.path else first.reason})
    document: Json = {"type": "https://kongapi.info/konnect/bad-request", "detail": f"Bad Request: {first.reason}"}
    if first.rule:
        document["invalid_parameters"] = [
            {"field": ".".join(path), "rule": rule, "reason": reason, "source": "body"}
            for reason, rule, path in error.faults
        ]
    return problem(400, document)


def accept(store: Store, version: Version, body: bytes, content_type: str) -> Response:
    try:
        events = parse_events(body, content_type, version)
    except RefusedError:
        store.count_refused()
        raise
    store.add(events, datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"))
    return Response(status_code=ACCEPTED[version])


async def ingest(store: Store, version: Version, request: Request) -> Response:
    content_type = request.headers.get("content-type", "")
    return await asyncio.to_thread(accept, store, version, await request.body(), content_type)


async def list_v1(store: Store, request: Request) -> Response:
    rows = await asyncio.to_thread(store.page, parse_positive(request, "limit", 100, 100))
    return json_response([{"event": orjson.Fragment(event), "ingestedAt": at} for _, at, event in rows])


async def list_v3(store: Store, request: Request) -> Response:
    size = parse_positive(request, "page[size]", 20, 100)
    after = parse_positive(request, "page[after]", 0, MAX_INTEGER)
    rows = await asyncio.to_thread(store.page, size + 1, after)  # one more tells whether a page follows
    following = str(rows[size - 1][0]) if len(rows) > size else None
    data = [{"event": orjson.Fragment(event), "ingested_at": at, "stored_at": at} for _, at, event in rows[:size]]
    return json_response({"data": data, "meta": {"page": {"next": following, "size": size}}})


def events_route(path: str, store: Store, version: Version) -> Route:
    """Ingest and list on one route, so that a 405 names both methods in Allow."""

    async def endpoint(request: Request) -> Response:
        try:
            if request.method == "POST":
                return await ingest(store, version, request)
            return await (list_v1 if version == "v1" else list_v3)(store, request)
        except RefusedError as error:
            return refuse(error, version)
        except ClientDisconnect:  # in the middle of its body: nothing was kept, and a stack trace would only alarm
            return Response(status_code=400)

    return Route(path, endpoint, methods=["GET", "POST"])


def own_routes(store: Store) -> list[Route]:
    """What OpenMeter does not have: sums, counts and the whole store, for tests and the demo."""

    async def usage(_request: Request) -> Response:
        return JSONResponse({"usage": await asyncio.to_thread(store.usage)})  # sums may be beyond orjson's 64 bits

    async def counts(_request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(store.counts))

    async def events(_request: Request) -> Response:
        return StreamingResponse(ndjson(store), media_type="application/x-ndjson")

    return [Route("/sandbox/usage", usage), Route("/sandbox/counts", counts), Route("/sandbox/events.ndjson", events)]


async def ndjson(store: Store) -> AsyncIterator[str]:
    """All events as lines, in the order they came."""
    after = 0
    while rows := await asyncio.to_thread(store.lines, after):
        yield "".join(f"{event}\n" for _, event in rows)
        after = rows[-1][0]


async def answer_http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # the router's 404 and 405
    return problem(error.status_code, {"detail": error.detail}, error.headers)


def build_app(store: Store) -> Starlette:
    """The ASGI application over `store`, which stays the caller's to close."""
    routes = [
        events_route("/api/v1/events", store, "v1"),
        events_route("/api/v3/openmeter/events", store, "v3"),
        events_route("/v3/openmeter/events", store, "v3"),  # Konnect's path
        *own_routes(store),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: answer_http_error})
    app.router.redirect_slashes = False  # OpenMeter never redirects
    return app


class _Server(uvicorn.Server):
    """uvicorn that says when it accepts, and whose signals end in a return instead of being raised again."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit  # a second signal does not wait for clients
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises: OSError, also for what can't be a host or a port."""
    if not 0 <= port <= 65535:
        raise OSError(EINVAL, f"port must be from 0 to 65535, not {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except ValueError as error:  # a name that IDNA can't encode
        raise OSError(EINVAL, f"not a host: {host!r}") from error
    return socket.create_server(address, family=family)


def serve(host: str, port: int, database: Path | None, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then return.

    Args: port, 0 for a free one; database, None for memory; announce, called with the base URL once it accepts.
    Raises: OSError before announcing, when the address or the database can't be had.
    """
    with closing(bind(host, port)) as listener, closing(Store(database)) as store:
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        config = uvicorn.Config(build_app(store), access_log=False, log_level="warning", lifespan="off", ws="none")
        config.timeout_graceful_shutdown = SHUTDOWN_SECONDS
        _Server(config, lambda: announce(url)).run([listener])
