"""The sandbox keeps OpenMeter's wire rules: what it accepts, refuses, keeps once, lists and sums."""

import asyncio
import contextlib
import gzip
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from metershipper import sandbox
from metershipper.sandbox import Store, build_app, parse_time, serve, token_count

ROOT = Path(__file__).parents[1]
V1, V3, KONNECT = "/api/v1/events", "/api/v3/openmeter/events", "/v3/openmeter/events"
BATCH, ONE, EITHER = "application/cloudevents-batch+json", "application/cloudevents+json", "application/json"
IN_MEMORY = """
import sys
from metershipper.sandbox import serve
serve(sys.argv[1], 0, None, lambda url: print(url, flush=True))
"""

Event = dict[str, Any]


def event(**changes: Any) -> Event:
    """A valid usage event; a change to `...` removes the attribute."""
    base = {
        "specversion": "1.0",
        "id": "req-1:input",
        "source": "kong",
        "type": "kong.llm_request",
        "subject": "consumer:alice",
        "time": "2026-08-18T10:00:00.000Z",
        "data": {"tokens": 12, "type": "request", "model": "gpt-4o"},
    }
    return {name: value for name, value in (base | changes).items() if value is not ...}


def numbered(count: int) -> list[Event]:
    start = datetime(2026, 8, 18, tzinfo=UTC)
    return [event(id=f"req-{n}", time=(start + timedelta(seconds=n)).isoformat()) for n in range(count)]


class Client:
    """Calls the application without a network, one event loop per call."""

    def __init__(self, store: Store) -> None:
        self.app = build_app(store)

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://sandbox") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def get(self, path: str, **params: Any) -> Any:
        answer = self.call("GET", path, params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post_raw(self, path: str, body: bytes, content_type: str = BATCH) -> httpx.Response:
        return self.call("POST", path, content=body, headers={"content-type": content_type})

    def post(self, path: str, document: Any, content_type: str = BATCH) -> httpx.Response:
        return self.post_raw(path, orjson.dumps(document), content_type)

    def stored(self) -> list[Event]:
        answer = self.call("GET", "/sandbox/events.ndjson")
        assert answer.headers["content-type"].startswith("application/x-ndjson")
        return [orjson.loads(line) for line in answer.text.splitlines()]


@pytest.fixture
def client() -> Iterator[Client]:
    with contextlib.closing(Store()) as store:
        yield Client(store)


def assert_refused(answer: httpx.Response) -> Any:
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert (document["status"], document["title"]) == (400, "Bad Request")
    return document


# --- ingest: what is accepted


@pytest.mark.parametrize(("path", "status"), [(V1, 204), (V3, 202), (KONNECT, 202)])
@pytest.mark.parametrize(
    ("content_type", "document"),
    [(ONE, event()), (BATCH, [event()]), (EITHER, event()), (EITHER, [event()])],
    ids=["one", "batch", "json-one", "json-batch"],
)
def test_every_content_type_is_accepted_on_every_path_with_an_empty_body(
    client: Client, path: str, status: int, content_type: str, document: object
) -> None:
    answer = client.post(path, document, content_type)
    assert (answer.status_code, answer.content) == (status, b"")
    assert client.stored() == [event()]


@pytest.mark.parametrize(
    ("content_type", "v1_status", "v3_status"),
    [
        ("application/json", 204, 202),
        ("application/json; charset=utf-8", 400, 202),
        ("application/cloudevents+json;charset=utf-8", 400, 202),
        ("Application/JSON", 400, 202),
        ("text/plain", 400, 400),
        ("application/x-ndjson", 400, 400),
        ("", 400, 400),
    ],
)
def test_v1_compares_the_content_type_exactly_and_v3_parses_it(
    client: Client, content_type: str, v1_status: int, v3_status: int
) -> None:
    assert client.post(V1, event(), content_type).status_code == v1_status
    assert client.post(V3, event(), content_type).status_code == v3_status


def test_a_request_without_a_content_type_is_refused(client: Client) -> None:
    assert_refused(client.call("POST", V1, content=orjson.dumps(event())))


@pytest.mark.parametrize(("path", "status"), [(V1, 204), (V3, 202)])
def test_an_empty_batch_is_accepted_only_with_the_batch_type(client: Client, path: str, status: int) -> None:
    assert client.post(path, [], BATCH).status_code == status
    assert "no events found" in assert_refused(client.post(path, [], EITHER))["detail"]
    assert client.get("/sandbox/counts") == dict(requests=2, refused=1, received=0, events=0, repeats=0)


@pytest.mark.parametrize("path", [V1, V3])
@pytest.mark.parametrize(
    "changes",
    [
        {"specversion": "0.3"},
        {"data": None},
        {"data": ...},
        {"data": {}},
        {"data": {"deep": [{"er": None}]}},
        {"time": None},
        {"time": ...},
        {"time": "2026-08-18T10:00:00+05:30"},
        {"time": "1969-12-31T23:59:59.123456789-01:00"},
        {"time": "9999-12-31T23:59:59Z"},
        {"datacontenttype": "application/json"},
        {"datacontenttype": None},
        {"dataschema": "https://example.com/schema"},
        {"dataschema": None},
        {"subject": "x" * 100_000},
        {"subject": "\u0000 \U0001f980"},
    ],
)
def test_every_form_the_schema_allows_is_accepted(client: Client, path: str, changes: Event) -> None:
    assert client.post(path, [event(**changes)]).is_success
    assert len(client.stored()) == 1


@pytest.mark.parametrize("changes", [{"time": None}, {"time": ...}])
def test_an_event_without_a_time_gets_the_servers(client: Client, changes: Event) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    client.post(V1, [event(**changes)])
    (stored,) = client.stored()
    assert before <= datetime.fromisoformat(stored["time"]) <= datetime.now(UTC)


def test_v1_drops_extension_attributes_and_v3_refuses_them(client: Client) -> None:
    extended = event(traceparent="00-a-b-01", zone="eu")
    document = assert_refused(client.post(V3, [event(id="good"), extended]))
    reasons = {(found["field"], found["rule"], found["reason"]) for found in document["invalid_parameters"]}
    assert reasons == {
        ("1", "properties", 'property "traceparent" is unsupported'),
        ("1", "properties", 'property "zone" is unsupported'),
    }
    assert client.stored() == []
    assert client.post(V1, [extended]).status_code == 204
    assert client.stored() == [event()]


# --- ingest: what is refused

FAULTS: list[tuple[object, str, str, str]] = [
    *((event(**{name: ...}), name, "required", f'property "{name}" is missing') for name in sandbox.REQUIRED),
    *((event(**{name: ""}), name, "min_length", "minimum string length is 1") for name in sandbox.REQUIRED),
    *((event(**{name: 7}), name, "type", "value must be a string") for name in sandbox.REQUIRED),
    *((event(**{name: None}), name, "nullable", "Value is not nullable") for name in sandbox.REQUIRED),
    (event(specversion="2.0"), "specversion", "enum", "value is not one of the allowed values ['1.0', '0.3']"),
    (event(datacontenttype="text/plain"), "datacontenttype", "enum", "value is not one of the allowed values "),
    (event(datacontenttype=1), "datacontenttype", "type", "value must be a string"),
    (event(dataschema=""), "dataschema", "min_length", "minimum string length is 1"),
    (event(data="text"), "data", "type", "value must be an object"),
    (event(data=[]), "data", "type", "value must be an object"),
    (event(data=0), "data", "type", "value must be an object"),
    (event(time=1755511200), "time", "type", "value must be a string"),
    (event(time="yesterday"), "time", "format", 'string doesn\'t match the format "date-time"'),
    ("text", "", "type", "value must be an object"),
    ([], "", "type", "value must be an object"),
    (None, "", "type", "value must be an object"),
]


@pytest.mark.parametrize(("bad", "attribute", "rule", "reason"), FAULTS)
def test_one_bad_event_refuses_its_batch_and_is_pointed_at(
    client: Client, bad: object, attribute: str, rule: str, reason: str
) -> None:
    batch = [*numbered(3), bad, event(id="after")]
    v1 = assert_refused(client.post(V1, batch))
    assert v1["type"] == "about:blank"
    assert v1["detail"].startswith(f"/3{'/' if attribute else ''}{attribute}: {reason}")
    v3 = assert_refused(client.post(V3, batch))
    (found,) = v3["invalid_parameters"]
    assert found["reason"].startswith(reason)
    assert found | {"reason": ""} == {
        "field": f"3.{attribute}".rstrip("."),
        "rule": rule,
        "reason": "",
        "source": "body",
    }
    assert client.get("/sandbox/counts") == dict(requests=2, refused=2, received=0, events=0, repeats=0)


def test_a_single_event_is_pointed_at_without_an_index(client: Client) -> None:
    assert assert_refused(client.post(V1, event(id=""), ONE))["detail"] == "/id: minimum string length is 1"
    document = assert_refused(client.post(V3, event(id=""), ONE))
    assert [found["field"] for found in document["invalid_parameters"]] == ["id"]


def test_v1_tells_the_first_fault_and_v3_all_of_them(client: Client) -> None:
    batch = [event(), event(subject="", data=3), event(), event(id=...)]
    assert assert_refused(client.post(V1, batch))["detail"] == "/1/subject: minimum string length is 1"
    document = assert_refused(client.post(V3, batch))
    assert [found["field"] for found in document["invalid_parameters"]] == ["1.subject", "1.data", "3.id"]


@pytest.mark.parametrize("path", [V1, V3])
@pytest.mark.parametrize("content_type", [ONE, BATCH, EITHER])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"NaN",
        b"\xff\xfe",
        b'"text"',
        b"7",
        b"null",
        gzip.compress(orjson.dumps([event()])),
        orjson.dumps(event()).replace(b"12", b"1e400"),
        orjson.dumps(event()).replace(b"12", b"NaN"),
        b"[" + orjson.dumps(event()).replace(b"12", b"-1e400") + b"]",
        orjson.dumps([event()]) + b"x",
    ],
)
def test_what_is_not_json_of_events_is_refused(client: Client, path: str, content_type: str, body: bytes) -> None:
    assert_refused(client.post_raw(path, body, content_type))
    assert client.stored() == []


@pytest.mark.parametrize("path", [V1, V3])
@pytest.mark.parametrize(
    ("content_type", "document", "reason"),
    [(ONE, [event()], "value must be an object"), (BATCH, event(), "value must be an array")],
)
def test_the_shape_must_be_the_one_the_content_type_names(
    client: Client, path: str, content_type: str, document: object, reason: str
) -> None:
    assert reason in assert_refused(client.post(path, document, content_type))["detail"]


def test_v3_lists_no_parameters_when_the_body_is_not_json(client: Client) -> None:
    document = assert_refused(client.post_raw(V3, b"{"))
    assert "invalid_parameters" not in document
    assert document["type"] == "https://kongapi.info/konnect/bad-request"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-01T00:00:00Z", 0.0),
        ("1970-01-01T00:00:01.5Z", 1.5),
        ("1970-01-01T01:00:00+01:00", 0.0),
        ("1969-12-31T23:59:59Z", -1.0),
        ("2024-02-29T00:00:00Z", 1709164800.0),
        ("2023-02-29T00:00:00Z", None),
        ("2023-13-01T00:00:00Z", None),
        ("2023-01-01T24:00:00Z", None),
        ("2023-01-01T00:60:00Z", None),
        ("2023-01-01T00:00:60Z", None),
        ("2023-01-01T00:00:00+24:00", None),
        ("2023-01-01T00:00:00", None),
        ("2023-01-01 00:00:00Z", None),
        ("2023-01-01t00:00:00z", None),
        ("2023-01-01", None),
        ("20230101T000000Z", None),
        ("2023-01-01T00:00:00.Z", None),
        ("2023-01-01T00:00:00Z\n", None),
        ("٢٠٢٣-01-01T00:00:00Z", None),
    ],
)
def test_a_time_is_rfc_3339_or_nothing(text: str, seconds: float | None) -> None:
    assert parse_time(text) == seconds


def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing_behind(client: Client) -> None:
    sent: list[Message] = []
    scope = {
        "type": "http",
        "method": "POST",
        "path": V1,
        "query_string": b"",
        "headers": [(b"content-type", BATCH.encode())],
    }

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(client.app(scope, receive, send))
    assert sent[0]["status"] == 400
    assert client.get("/sandbox/counts") == dict(requests=0, refused=0, received=0, events=0, repeats=0)


# --- dedupe


def test_of_events_with_one_source_and_id_the_first_is_kept(client: Client) -> None:
    first, other = event(), event(data={"tokens": 99}, subject="consumer:bob", type="other")
    assert client.post(V1, [first]).status_code == 204
    assert client.post(V1, [other]).status_code == 204
    assert client.post(V3, other, ONE).status_code == 202
    assert client.stored() == [first]
    assert client.get("/sandbox/counts") == dict(requests=3, refused=0, received=3, events=1, repeats=2)


def test_a_repeat_inside_one_batch_is_counted_too(client: Client) -> None:
    client.post(V1, [event(), event(), event(source="other"), event(id="other")])
    assert client.stored() == [event(), event(source="other"), event(id="other")]
    assert client.get("/sandbox/counts") == dict(requests=1, refused=0, received=4, events=3, repeats=1)


def test_source_and_id_are_never_joined_into_one_key(client: Client) -> None:
    client.post(V1, [event(source="a-b", id="c"), event(source="a", id="b-c")])
    assert len(client.stored()) == 2


def test_requests_at_the_same_time_keep_the_books_exact(client: Client) -> None:
    batches = [numbered(n + 1) for n in range(20)] * 2
    with ThreadPoolExecutor(8) as pool:
        statuses = {answer.status_code for answer in pool.map(lambda batch: client.post(V1, batch), batches)}
    assert statuses == {204}
    assert client.get("/sandbox/counts") == dict(requests=40, refused=0, received=420, events=20, repeats=400)


# --- listing


def ids(rows: list[Any]) -> list[str]:
    return [row["event"]["id"] for row in rows]


def test_v1_lists_the_newest_events_first(client: Client) -> None:
    events = numbered(120)
    client.post(V1, [*events[60:], *events[:60]])
    rows = client.get(V1)
    assert ids(rows) == [f"req-{n}" for n in range(119, 19, -1)]
    assert rows[0]["event"] == events[119]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", rows[0]["ingestedAt"])
    assert ids(client.get(V1, limit=1)) == ["req-119"]
    assert len(client.get(V1, limit="100")) == 100


@pytest.mark.parametrize("path", [V3, KONNECT])
def test_v3_pages_through_every_event_once(client: Client, path: str) -> None:
    client.post(V3, numbered(45) + [event(id=f"same-second-{n}") for n in range(5)])
    seen: list[str] = []
    sizes: list[int] = []
    cursor: dict[str, str] = {}
    while True:
        page = client.get(path, **cursor)
        seen += ids(page["data"])
        sizes.append(len(page["data"]))
        assert page["meta"]["page"]["size"] == 20
        if page["meta"]["page"]["next"] is None:
            break
        cursor = {"page[after]": page["meta"]["page"]["next"]}
    assert sizes == [20, 20, 10]
    assert seen == [f"same-second-{n}" for n in range(4, -1, -1)] + [f"req-{n}" for n in range(44, -1, -1)]


def test_a_full_last_page_has_no_next(client: Client) -> None:
    client.post(V3, numbered(3))
    page = client.get(V3, **{"page[size]": 3})
    assert page["meta"] == {"page": {"next": None, "size": 3}}
    assert set(page["data"][0]) == {"event", "ingested_at", "stored_at"}


def test_a_cursor_of_no_event_leads_to_an_empty_page(client: Client) -> None:
    client.post(V3, numbered(3))
    assert client.get(V3, **{"page[after]": "999"})["data"] == []


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        *((V1, "limit", value) for value in ("0", "101", "-1", "ten", "", "1_0", "1.0", "٣", "9" * 30)),
        *((V3, "page[size]", value) for value in ("0", "101", "x")),
        *((V3, "page[after]", value) for value in ("x", "0", "9" * 19, "")),
    ],
)
def test_a_bad_page_is_refused(client: Client, path: str, name: str, value: str) -> None:
    assert name in assert_refused(client.call("GET", path, params={name: value}))["detail"]
    assert client.get("/sandbox/counts")["refused"] == 0  # the counts are those of ingest requests


# --- the sandbox's own paths


def test_usage_is_summed_by_event_type_subject_model_and_token_type(client: Client) -> None:
    rows: list[tuple[str, str, Event]] = [
        ("kong.llm_request", "bob", {"tokens": 5, "type": "request", "model": "m1"}),
        ("kong.llm_request", "alice", {"tokens": 1, "type": "request", "model": "m1"}),
        ("kong.llm_request", "alice", {"tokens": "20", "type": "request", "model": "m1"}),
        ("kong.llm_request", "alice", {"tokens": 7, "type": "response", "model": "m1"}),
        ("kong.llm_request", "alice", {"tokens": 9, "type": "request", "model": "m0"}),
        ("kong.api_request", "alice", {"request_method": "GET", "model": 4}),
        ("kong.api_request", "alice", {"request_method": "PUT"}),
    ]
    client.post(V1, [event(id=str(n), type=t, subject=s, data=d) for n, (t, s, d) in enumerate(rows)])
    names = ("event_type", "subject", "model", "type", "events", "tokens")
    expected = [
        ("kong.api_request", "alice", None, None, 2, 0),
        ("kong.llm_request", "alice", "m0", "request", 1, 9),
        ("kong.llm_request", "alice", "m1", "request", 2, 21),
        ("kong.llm_request", "alice", "m1", "response", 1, 7),
        ("kong.llm_request", "bob", "m1", "request", 1, 5),
    ]
    assert client.get("/sandbox/usage") == {"usage": [dict(zip(names, row, strict=True)) for row in expected]}


def test_a_refused_batch_and_a_repeat_add_no_usage(client: Client) -> None:
    client.post(V1, [event()])
    client.post(V1, [event(), event(id="")])
    client.post(V1, [event()])
    (row,) = client.get("/sandbox/usage")["usage"]
    assert (row["events"], row["tokens"]) == (1, 12)


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_beyond_64_bits_are_exact(client: Client, sign: int) -> None:
    big = sign * (2**63 - 1)
    client.post(
        V1, [event(id=str(n), data={"tokens": tokens}) for n, tokens in enumerate((big, big, big, str(big), 5))]
    )
    assert client.get("/sandbox/usage")["usage"][0]["tokens"] == 4 * big + 5


@pytest.mark.parametrize(
    ("value", "tokens"),
    [
        (12, 12),
        (-3, -3),
        (2.9, 2),
        ("12", 12),
        ("-12", -12),
        ("1.5e3", 1500),
        ("9007199254740993", 2**53 + 1),
        (2**64, 2**63 - 1),
        ("-1e30", 1 - 2**63),
        ("1e400", 0),
        ("nan", 0),
        ("inf", 0),
        ("1_000", 0),
        (" 12", 0),
        ("", 0),
        ("many", 0),
        (True, 0),
        (None, 0),
        ([1], 0),
        ({}, 0),
    ],
)
def test_tokens_are_whole_numbers_and_the_rest_counts_nothing(value: object, tokens: int) -> None:
    assert token_count(value) == tokens


@given(st.integers() | st.floats() | st.text("0123456789.-+eE", max_size=30) | st.text())
def test_any_value_of_tokens_fits_the_store(value: float | str) -> None:
    assert -(2**63) <= token_count(value) < 2**63


def test_all_events_are_streamed_in_the_order_they_came(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "NDJSON_ROWS", 4)
    assert client.stored() == []
    events = numbered(9)[::-1]
    client.post(V1, events)
    assert client.stored() == events


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("POST", "/api/v1/events/", 404),
        ("POST", "/api/v3/events", 404),
        ("GET", "/api/v1/meters", 404),
        ("PUT", V1, 405),
        ("DELETE", V3, 405),
        ("POST", "/sandbox/usage", 405),
    ],
)
def test_anything_else_is_a_problem_and_never_a_redirect(client: Client, method: str, path: str, status: int) -> None:
    answer = client.call(method, path, content=b"[]", headers={"content-type": BATCH})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status


def test_a_wrong_method_is_told_the_right_ones(client: Client) -> None:
    allowed = client.call("PUT", V1).headers["allow"]
    assert {"GET", "POST"} <= set(allowed.split(", "))


# --- the store on disk


def test_a_file_keeps_events_and_books_across_restarts(tmp_path: Path) -> None:
    database = tmp_path / "sandbox.db"
    for _ in range(2):
        with contextlib.closing(Store(database)) as store:
            Client(store).post(V1, [event()])
    with contextlib.closing(Store(database)) as store:
        client = Client(store)
        assert client.stored() == [event()]
        assert client.get("/sandbox/counts") == dict(requests=2, refused=0, received=2, events=1, repeats=1)


def test_a_file_that_is_no_database_is_an_os_error(tmp_path: Path) -> None:
    readme = tmp_path / "readme.txt"
    readme.write_text("not a database " * 100)
    with pytest.raises(OSError, match=r"readme\.txt"):
        Store(readme)
    with pytest.raises(OSError, match=r"missing"):
        Store(tmp_path / "missing" / "sandbox.db")


# --- the server


Start = Callable[..., tuple["subprocess.Popen[str]", str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a sandbox in a process of its own and gives it with its announced URL."""
    with contextlib.ExitStack() as processes:

        def run(host: str = "127.0.0.1") -> tuple["subprocess.Popen[str]", str]:
            command = [sys.executable, "-c", IN_MEMORY, host]
            process = processes.enter_context(
                subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            )
            processes.callback(process.kill)
            assert process.stdout is not None
            return process, process.stdout.readline().strip()

        yield run


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_with_exit_status_0(start: Start, stop: signal.Signals) -> None:
    process, url = start()
    with httpx.Client(base_url=url) as client:
        body = orjson.dumps(numbered(1000))
        assert client.post(V1, content=body, headers={"content-type": BATCH}).status_code == 204
        assert client.get("/sandbox/counts").json()["events"] == 1000
        process.send_signal(stop)  # while the client keeps its connection
        assert process.wait(10) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_a_second_signal_does_not_wait_for_a_client(start: Start) -> None:
    process, url = start()
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port or 0), 10) as connection:
        head = f"POST {V1} HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\nexpect: 100-continue\r\n\r\n"
        connection.sendall(head.encode())
        assert b"100 Continue" in connection.recv(100)  # so the server waits for a body that never comes
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert process.wait(sandbox.SHUTDOWN_SECONDS - 1) == 0


def test_the_announced_url_has_the_host_asked_for(start: Start) -> None:
    _, url = start("localhost")
    assert re.fullmatch(r"http://localhost:\d+", url)
    assert httpx.get(f"{url}/sandbox/counts").status_code == 200


def test_an_ipv6_address_is_announced_in_brackets(start: Start) -> None:
    try:
        sandbox.bind("::1", 0).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    _, url = start("::1")
    assert httpx.get(f"{url}/sandbox/counts").status_code == 200


def test_an_address_that_cannot_be_had_is_an_os_error_before_announcing() -> None:
    announced: list[str] = []
    with contextlib.closing(sandbox.bind("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        serve("127.0.0.1", taken.getsockname()[1], None, announced.append)
    # 203.0.113.1 is for documentation only, so no machine has it; IDNA can't encode an empty label
    for host, port in (("203.0.113.1", 0), ("a..b", 0), ("127.0.0.1", -1), ("127.0.0.1", 65536)):
        with pytest.raises(OSError):
            serve(host, port, None, announced.append)
    assert announced == []


def test_a_database_that_cannot_be_had_is_an_os_error_before_announcing(tmp_path: Path) -> None:
    announced: list[str] = []
    with pytest.raises(OSError):
        serve("127.0.0.1", 0, tmp_path / "missing" / "sandbox.db", announced.append)
    assert announced == []
