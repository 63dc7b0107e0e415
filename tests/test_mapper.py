"""Mapping lines to usage events: exact events by Kong version, ids that never change, and every line accounted for."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from metershipper.books import DEAD_LETTERS, SKIPPED, Books, Count, Dead, Skip
from metershipper.events import Mapped
from metershipper.formats import Format
from metershipper.lines import Overlong
from metershipper.mapper import Explained, Mapper, nuls, overlong_line
from metershipper.meter import as_bytes_count
from metershipper.metering import API_FIELDS, LLM_FIELDS, Attribute, Metering, Rule, Subject
from metershipper.pieces import Unbillable, pieces
from metershipper.sandbox import BATCH, Version, event_faults, parse_events
from metershipper.traffic import Traffic

Json = dict[str, Any]

ID = "2b02608e258d41732acbbe7e4933f722"
STARTED_AT = 1782907200015
TIME = "2026-07-01T12:00:00.015Z"
BASE = f"{ID}-{STARTED_AT}"
BOM = b"\xef\xbb\xbf"
VERSIONS: tuple[Version, ...] = ("v1", "v3")

REQUEST: Json = {
    "id": ID,
    "method": "POST",
    "uri": "/llm/v1/chat/completions?stream",
    "size": 1197,
    "headers": {
        "host": "ai.example.test",
        "user-agent": "OpenAI/Python 1.58.1",
        "x-department": ["research", "shared"],
    },
    "querystring": {"stream": True, "team": "blue"},
}
ENTRY: Json = {
    "request": REQUEST,
    "response": {"status": 200, "size": 4349, "headers": {}},
    "started_at": STARTED_AT,
    "client_ip": "10.31.0.34",
    "consumer": {"id": "97d42fdf", "username": "initech"},
    "route": {"id": "route-1", "name": "llm-route"},
    "service": {"id": "service-1", "name": "llm-service", "port": 443, "protocol": "https"},
    "upstream_status": "502, 200",
    "latencies": {"request": 189},
}
API_DATA: Json = {
    "request_method": "POST",
    "request_host": "ai.example.test",
    "request_size_bytes": 1197,
    "response_http_status": 200,
    "response_size_bytes": 4349,
    "upstream_status": "502, 200",
    "route_id": "route-1",
    "route_name": "llm-route",
    "service_id": "service-1",
    "service_name": "llm-service",
    "service_port": 443,
    "service_protocol": "https",
    "subject_type": "consumer",
}
META: Json = {"request_model": "gpt-4o", "response_model": "gpt-4o-2024-11-20", "provider_name": "azure"}
META_WITH_ID = META | {"plugin_id": "plugin-1"}


def line_of(entry: Json) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass")


def logged(**changes: Any) -> bytes:
    """The line of an entry with these changes; `...` removes a key."""
    return line_of({name: value for name, value in (ENTRY | changes).items() if value is not ...})


def mapped_by(line: bytes, **metering: Any) -> Mapped:
    return Mapper(Metering(**metering)).map_lines(line)


def events_of(mapped: Mapped) -> list[Json]:
    """The events as the server reads them."""
    events: list[Json] = orjson.loads(msgspec.json.encode(mapped.events))
    return events


def api_event(event_id: str = BASE, **data: Any) -> Json:
    return {
        "specversion": "1.0", "id": f"{event_id}:api_request", "source": "kong", "type": "kong.api_request",
        "subject": "consumer:97d42fdf", "time": TIME,
        "data": {name: value for name, value in (API_DATA | data).items() if value is not ...},
    }  # fmt: skip


def llm_event(kind: str, **data: Any) -> Json:
    """A whole event; `data` beside what every AI event of ENTRY holds."""
    common = {
        "api_request_id": ID, "http_status": 200, "route_id": "route-1", "route_name": "llm-route",
        "service_id": "service-1", "service_name": "llm-service", "subject_type": "consumer",
    }  # fmt: skip
    return {
        "specversion": "1.0", "id": f"{BASE}:{kind}", "source": "kong", "type": "kong.llm_request",
        "subject": "consumer:97d42fdf", "time": TIME,
        "data": {name: value for name, value in (common | data).items() if value is not ...},
    }  # fmt: skip


def pair(asked: int, answered: int, **data: Any) -> list[Json]:
    """The two events of one call with META."""
    models = {"request_model": "gpt-4o", "response_model": "gpt-4o-2024-11-20", "provider": "azure"}
    return [
        llm_event("input", tokens=asked, type="request", model="gpt-4o", **models, **data),
        llm_event("output", tokens=answered, type="response", model="gpt-4o-2024-11-20", **models, **data),
    ]


def check_books(mapped: Mapped, lines: int, entries: int | None = None) -> None:
    """What must hold for any lines at all (ground rule 1). `entries`: None where each line is one."""
    books = mapped.books
    assert books.balanced and books[Count.LINES] == lines
    assert books[Count.ENTRIES] == (lines if entries is None else entries)
    assert books[Count.EVENTS] == len(mapped.events)
    assert books.dead_letters == len(mapped.dead_letters)
    assert Counter(letter.reason for letter in mapped.dead_letters) == Counter(books.by_reason(DEAD_LETTERS))
    assert books[Count.BILLED] <= len(mapped.events)
    tokens = Counter[str]()
    for event in events_of(mapped):
        if event["type"] == "kong.llm_request":
            tokens[event["data"]["type"]] += event["data"]["tokens"]
    assert books[Count.TOKENS_REQUEST] == tokens["request"] + tokens["request_cached"]
    assert books[Count.TOKENS_RESPONSE] == tokens["response"]


def check_accepted(mapped: Mapped) -> None:
    """OpenMeter accepts every event, in both versions of its interface."""
    body = msgspec.json.encode(mapped.events)
    body.decode("utf-8")
    for version in VERSIONS:
        assert parse_events(body, BATCH, version) == events_of(mapped)
        assert [fault for event in events_of(mapped) for fault in event_faults(event, version)] == []


def test_a_request_becomes_one_event_with_the_fields_of_the_contract() -> None:
    assert events_of(mapped_by(logged())) == [api_event()]


def test_absent_values_are_omitted_and_never_null() -> None:
    bare = {"request": {"id": ID}, "started_at": STARTED_AT, "consumer": {"id": "97d42fdf"}}
    (event,) = events_of(mapped_by(line_of(bare)))
    assert event["data"] == {"subject_type": "consumer"}
    bare["ai"] = {"proxy": {"usage": {"prompt_tokens": 1}}}
    (_, event) = events_of(mapped_by(line_of(bare)))
    data = {"tokens": 1, "type": "request", "ai_plugin_name": "proxy", "api_request_id": ID, "subject_type": "consumer"}
    assert event["data"] == data
    emptied = {"upstream_status": "", "route": None, "service": None, "response": None}
    absent = [name for name in API_FIELDS if name.startswith(("route", "service", "response", "upstream"))]
    removed: Json = dict.fromkeys(absent, ...)
    assert events_of(mapped_by(logged(**emptied))) == [api_event(**removed)]


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("1197", 1197),
        (1197.0, 1197),
        ("", ...),
        ("big", ...),
        ("1_197", ...),
        ("9" * 19, ...),
        (None, ...),
        ("-5", ...),
    ],
    ids=str,
)
def test_sizes_are_numbers_also_where_kong_wrote_text(size: Any, count: Any) -> None:
    """Before 2.2 Kong logged sizes as text; a BOM before the line makes no difference."""
    line = logged(request=REQUEST | {"size": size})
    assert events_of(mapped_by(line)) == [api_event(request_size_bytes=count)]
    assert events_of(mapped_by(BOM + line)) == [api_event(request_size_bytes=count)]
    assert as_bytes_count(None) is None


@pytest.mark.parametrize(
    "number", [b"9" * 400, b"-" + b"9" * 400, b"1e300", b"9" * 5000, b"1e400"], ids=lambda n: n[:6]
)
@pytest.mark.parametrize("field", ["size", "status", "port"])
def test_a_number_that_no_server_takes_is_left_out(field: str, number: bytes) -> None:
    """Case 25: one such event would be refused together with the whole batch, for ever; the request is billed."""
    changes: Json = {
        "size": {"request": REQUEST | {"size": 12345}},
        "status": {"response": ENTRY["response"] | {"status": 12345}},
        "port": {"service": ENTRY["service"] | {"port": 12345}},
    }
    names = {"size": "request_size_bytes", "status": "response_http_status", "port": "service_port"}
    removed: Json = {names[field]: ...}
    line = logged(**changes[field]).replace(b"12345", number)
    for form in (line, BOM + line):
        mapped = mapped_by(form)
        assert events_of(mapped) == [api_event(**removed)]
        check_accepted(mapped)


ATTRIBUTES = (
    Attribute(source="header", look_up_value_in="X-Department", event_property_name="department"),
    Attribute(source="query", look_up_value_in="team", event_property_name="team"),
    Attribute(source="query", look_up_value_in="stream", event_property_name="no_value"),
    Attribute(source="header", look_up_value_in="x-none", event_property_name="missing"),
)


def test_attributes_stand_on_both_kinds_of_event() -> None:
    line = logged(ai={"proxy": {"usage": {"prompt_tokens": 3, "completion_tokens": 4}, "meta": META}})
    extra = {"department": "research", "team": "blue"}
    assert events_of(mapped_by(line, attributes=ATTRIBUTES)) == [
        api_event(**extra),
        *pair(3, 4, ai_plugin_name="proxy", **extra),
    ]


def test_personal_fields_are_given_only_when_listed() -> None:
    """Case 71."""
    personal = {
        "client_ip": "10.31.0.34", "request_uri": "/llm/v1/chat/completions?stream",
        "request_user_agent": "OpenAI/Python 1.58.1",
    }  # fmt: skip
    assert events_of(mapped_by(logged(), personal_fields=frozenset(personal))) == [api_event(**personal)]
    for name, value in personal.items():
        assert events_of(mapped_by(logged(), personal_fields=frozenset({name}))) == [api_event(**{name: value})]


def test_every_field_of_the_contract_can_be_filled() -> None:
    line = logged(ai={"proxy": {"usage": {"prompt_tokens": 3}, "meta": META_WITH_ID, "cache": {"cache_status": "Hit"}}})
    personal = frozenset({"client_ip", "request_uri", "request_user_agent"})
    api, llm = events_of(mapped_by(line, personal_fields=personal))
    assert set(api["data"]) == set(API_FIELDS) and set(llm["data"]) == set(LLM_FIELDS)


def test_source_and_subject_are_those_of_the_configuration() -> None:
    subject = Subject(look_up_value_in="header", field="X-Department")
    (event,) = events_of(mapped_by(logged(), source="kong-eu", subject=subject))
    assert (event["source"], event["subject"], event["data"]["subject_type"]) == ("kong-eu", "research", "header")
    subject = Subject(look_up_value_in="query", field="team")
    assert events_of(mapped_by(logged(), subject=subject))[0]["subject"] == "blue"


USAGE_3_12 = {
    "prompt_tokens": 12, "completion_tokens": 34, "total_tokens": 46, "cost": 0.00037, "time_to_first_token": 85,
    "time_per_token": 30.142857142857, "prompt_tokens_details": {"cached_tokens": 3}, "completion_tokens_details": {},
}  # fmt: skip
TRANSFORMER = {
    "meta": {
        "request_model": "UNSPECIFIED", "response_model": "gpt-4o-mini", "provider_name": "openai", "plugin_id": "p2",
    },
    "usage": {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}, "cache": {},
}  # fmt: skip
TRANSFORMED = {
    "request_model": "UNSPECIFIED", "response_model": "gpt-4o-mini", "provider": "openai", "ai_plugin_id": "p2",
    "ai_plugin_name": "ai-request-transformer", "model": "gpt-4o-mini",
}  # fmt: skip
TRANSFORMER_BESIDE = [
    llm_event("input.ai-request-transformer", tokens=5, type="request", **TRANSFORMED),
    llm_event("output.ai-request-transformer", tokens=6, type="response", **TRANSFORMED),
]
TRANSFORMER_ALONE = [
    llm_event("input", tokens=5, type="request", **TRANSFORMED),
    llm_event("output", tokens=6, type="response", **TRANSFORMED),
]
FLAT = {
    "usage": {"prompt_tokens": 12, "completion_tokens": 34, "total_tokens": 46, "processing_time": 9},
    "meta": META,
    "payload": {"request": "{}", "response": "{}"},
}
IN_3_7 = {"usage": {"prompt_token": 12, "completion_token": 34, "total_tokens": 46}, "meta": META_WITH_ID}
IN_3_8 = {
    "usage": {"prompt_tokens": 12, "completion_tokens": 34, "total_tokens": 46, "cost": 0},
    "meta": META_WITH_ID | {"llm_latency": 300},
    "cache": {},
}
PROXY = {"ai_plugin_id": "plugin-1", "ai_plugin_name": "proxy"}
AI_PROXY = {"ai_plugin_id": "plugin-1", "ai_plugin_name": "ai-proxy"}

SHAPES: dict[str, tuple[Json, list[Json]]] = {
    "3.6 flat": (FLAT, pair(12, 34)),
    "3.6 flat without meta": (
        {"usage": FLAT["usage"]},
        [llm_event("input", tokens=12, type="request"), llm_event("output", tokens=34, type="response")],
    ),
    "3.7 ai-proxy, singular": ({"ai-proxy": IN_3_7}, pair(12, 34, **AI_PROXY)),
    "3.8 ai-proxy, plural": ({"ai-proxy": IN_3_8}, pair(12, 34, **AI_PROXY)),
    "3.8 without usage from the provider": ({"ai-proxy": IN_3_8 | {"usage": {}}}, []),
    "3.9 proxy": ({"proxy": {"usage": IN_3_8["usage"], "meta": META_WITH_ID}}, pair(12, 34, **PROXY)),
    "3.9 proxy and a transformer": (
        {"ai-request-transformer": TRANSFORMER, "proxy": {"usage": IN_3_8["usage"], "meta": META_WITH_ID}},
        pair(12, 34, **PROXY) + TRANSFORMER_BESIDE,
    ),
    "3.9 a transformer alone": ({"ai-request-transformer": TRANSFORMER}, TRANSFORMER_ALONE),
    "3.12 proxy with details": ({"proxy": {"usage": USAGE_3_12, "meta": META_WITH_ID}}, pair(12, 34, **PROXY)),
    "3.11 input and output tokens of other media": (
        {"proxy": {"usage": {"prompt_tokens": 0, "input_tokens": 12, "output_tokens": 34}, "meta": META_WITH_ID}},
        pair(12, 34, **PROXY),
    ),
    "3.12 answered by the semantic cache": (
        {"proxy": {"usage": USAGE_3_12, "meta": META_WITH_ID, "cache": {"cache_status": "Hit", "fetch_latency": 1}}},
        pair(12, 34, **PROXY, cache_status="Hit"),
    ),
    "3.12 tool calls beside": (
        {"mcp": {"mcp_session_id": "s", "rpc": []}, "proxy": {"usage": USAGE_3_12, "meta": META_WITH_ID}},
        pair(12, 34, **PROXY),
    ),
    "3.12 printed flat in its cookbooks": ({"usage": USAGE_3_12, "meta": META_WITH_ID},
                                           pair(12, 34, ai_plugin_id="plugin-1")),
    "flat beside a container is billed once": (
        FLAT | {"ai-proxy": IN_3_8},
        pair(12, 34, **AI_PROXY),
    ),
    "flat beside two containers is billed once": (
        FLAT | {"proxy": IN_3_8, "ai-request-transformer": TRANSFORMER},
        pair(12, 34, **PROXY) + TRANSFORMER_BESIDE,
    ),
    "an embedding: no output": (
        {"proxy": {"usage": {"prompt_tokens": 12, "completion_tokens": 0}, "meta": META_WITH_ID}},
        pair(12, 0, **PROXY)[:1],
    ),
    "a streamed answer without its input": (
        {"proxy": {"usage": {"completion_tokens": 34}, "meta": META_WITH_ID}},
        pair(0, 34, **PROXY)[1:],
    ),
    "counts as floats": (
        {"proxy": {"usage": {"prompt_tokens": 12.0, "completion_tokens": 3.4e1}, "meta": META_WITH_ID}},
        pair(12, 34, **PROXY),
    ),
    "missing meta": (
        {"proxy": {"usage": {"prompt_tokens": 12, "completion_tokens": 34}}},
        [
            llm_event("input", tokens=12, type="request", ai_plugin_name="proxy"),
            llm_event("output", tokens=34, type="response", ai_plugin_name="proxy"),
        ],
    ),
    "both models unspecified": (
        {"proxy": {"usage": {"prompt_tokens": 1}, "meta": {"request_model": "UNSPECIFIED"}}},
        [llm_event("input", tokens=1, type="request", model="UNSPECIFIED", request_model="UNSPECIFIED",
                   ai_plugin_name="proxy")],
    ),
    "the answering model unspecified": (
        {"proxy": {"usage": {"completion_tokens": 1},
                   "meta": {"request_model": "gpt-4o", "response_model": "UNSPECIFIED"}}},
        [llm_event("output", tokens=1, type="response", model="gpt-4o", request_model="gpt-4o",
                   response_model="UNSPECIFIED", ai_plugin_name="proxy")],
    ),
    "usage not logged": ({"proxy": {"meta": META_WITH_ID}}, []),
    "no ai": ({}, []),
}  # fmt: skip


@pytest.mark.parametrize(("ai", "expected"), SHAPES.values(), ids=SHAPES)
def test_ai_usage_of_every_kong_is_billed_exactly(ai: Json, expected: list[Json]) -> None:
    line = logged(ai=ai)
    for form in (line, BOM + line, line.replace(b"/", b"\\/")):
        mapped = mapped_by(form)
        assert events_of(mapped) == [api_event(), *expected]
        check_books(mapped, 1)
        check_accepted(mapped)
    mapped = mapped_by(line, meter_api_requests=False)
    assert events_of(mapped) == expected
    assert mapped.books.by_reason(SKIPPED) == ({} if expected else {"no_usage": 1})
    assert events_of(mapped_by(line, meter_ai_token_usage=False)) == [api_event()]


# Whole entries, as each Kong writes them.

DETAILED = {
    "prompt_tokens": 12, "completion_tokens": 34, "total_tokens": 46, "cost": 0, "time_per_token": 30.142857142857,
    "time_to_first_token": 631, "prompt_tokens_details": {"cached_tokens": 3, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 5, "audio_tokens": 0, "accepted_prediction_tokens": 0,
                                  "rejected_prediction_tokens": 0},
}  # fmt: skip
MEDIA = {
    "prompt_tokens": 0, "completion_tokens": 0, "input_tokens": 12, "output_tokens": 34,
    "input_tokens_details": {"text_tokens": 2, "image_tokens": 10, "cached_tokens_details": {"image_tokens_count": 1}},
    "output_tokens_details": {"audio_tokens_count": 34},
}  # fmt: skip
JUDGE = {"usage": {"prompt_tokens": 7, "completion_tokens": 1}, "meta": {"request_model": "judge"}, "llm_accuracy": 80}
JUDGED = {"request_model": "judge", "ai_plugin_name": "ai-llm-as-judge", "model": "judge"}
JUDGE_EVENTS = [
    llm_event("input.ai-llm-as-judge", tokens=7, type="request", **JUDGED),
    llm_event("output.ai-llm-as-judge", tokens=1, type="response", **JUDGED),
]
MCP = {
    "mcp_session_id": "8b2d1534",
    "rpc": [
        {"id": "1", "method": "tools/list", "latency": 2},
        {"id": "2", "method": "tools/call", "tool_name": "get-orders", "latency": 15, "response_body_size": 2175},
    ],
    "audit": [{"primitive_name": "get-orders", "action": "allow"}],
}
MCP_EVENT: Json = {
    "specversion": "1.0", "id": f"{BASE}:mcp_tool_call.1", "source": "kong", "type": "kong.mcp_tool_call",
    "subject": "consumer:97d42fdf", "time": TIME,
    "data": {
        "tool_name": "get-orders", "method": "tools/call", "latency_ms": 15, "api_request_id": ID, "http_status": 200,
        "route_id": "route-1", "route_name": "llm-route", "service_id": "service-1", "service_name": "llm-service",
        "subject_type": "consumer",
    },
}  # fmt: skip
NEW_METERS: Json = {"meter_mcp_tool_calls": True, "token_details": True, "split_cached_input": True}


def detailed(container: str) -> list[Json]:
    """The three events of DETAILED with all the newer meters on."""
    asked, answered = pair(9, 34, ai_plugin_id="plugin-1", ai_plugin_name=container)
    cached = json.loads(json.dumps(asked)) | {"id": f"{BASE}:input_cached"}
    cached["data"] |= {"tokens": 3, "type": "request_cached"}
    asked["data"] |= {"audio_tokens": 0}  # cached_tokens is the event beside it
    answered["data"] |= DETAILED["completion_tokens_details"]
    return [asked, cached, answered]


MEDIA_EVENTS = pair(12, 34, **PROXY)
MEDIA_EVENTS[0]["data"] |= {"text_tokens": 2, "image_tokens": 10}
MEDIA_EVENTS[1]["data"] |= {"audio_tokens": 34}
IN_3_9 = {"usage": {"prompt_tokens": 12, "completion_tokens": 34, "total_tokens": 46}, "meta": META_WITH_ID}
KONGS: dict[str, tuple[Json, list[Json]]] = {
    # what an entry of this Kong has other than ENTRY; the events
    "2.x: no request id, sizes as text, no upstream_status": (
        {
            "request": {name: value for name, value in REQUEST.items() if name != "id"} | {"size": "1197"},
            "response": {"status": 200, "size": "4349"}, "upstream_status": ...,
        },
        [api_event("65466c0357573451be36c3ec8bb5f7bd", upstream_status=...)],
    ),
    "3.5 without AI": ({"workspace": "w"}, [api_event()]),
    "3.6 flat": ({"ai": FLAT}, [api_event(), *pair(12, 34)]),
    "3.6 flat, an estimate of nothing": (
        {"ai": {"usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, "meta": META}}, [api_event()],
    ),
    "3.7 ai-proxy, singular": ({"ai": {"ai-proxy": IN_3_7}}, [api_event(), *pair(12, 34, **AI_PROXY)]),
    "3.8 ai-proxy": ({"ai": {"ai-proxy": IN_3_8}}, [api_event(), *pair(12, 34, **AI_PROXY)]),
    "EE 3.9.0.1 ai-proxy": ({"ai": {"ai-proxy": IN_3_9}}, [api_event(), *pair(12, 34, **AI_PROXY)]),
    "3.9 OSS and 3.10 proxy": ({"ai": {"proxy": IN_3_9}}, [api_event(), *pair(12, 34, **PROXY)]),
    "3.10 with what is no call": (
        {"ai": {"proxy": IN_3_9, "rag-inject": {"vector_db": "x"}, "sanitizer": {"duration": 5}, "audit": {}}},
        [api_event(), *pair(12, 34, **PROXY)],
    ),
    "3.11 details": ({"ai": {"proxy": {"usage": DETAILED, "meta": META_WITH_ID}}}, [api_event(), *detailed("proxy")]),
    "3.11 input and output tokens": (
        {"ai": {"proxy": {"usage": MEDIA, "meta": META_WITH_ID}}}, [api_event(), *MEDIA_EVENTS],
    ),
    "3.12 mcp and ai-llm-as-judge beside proxy": (
        {"ai": {"mcp": MCP, "ai-llm-as-judge": JUDGE, "proxy": {"usage": DETAILED, "meta": META_WITH_ID}}},
        [api_event(), *detailed("proxy"), *JUDGE_EVENTS, MCP_EVENT],
    ),
    "3.12 flat, as its cookbooks print it": (
        {"ai": {"usage": DETAILED, "meta": META_WITH_ID | {"request_mode": "oneshot"}}},
        [
            api_event(),
            *(event | {"data": {k: v for k, v in event["data"].items() if k != "ai_plugin_name"}}
              for event in detailed("")),
        ],
    ),
    "3.13 tool calls alone": ({"ai": {"mcp": MCP}}, [api_event(), MCP_EVENT]),
    "3.14 with everything at its side": (
        {
            "ai": {
                "payload": {"request": "x"}, "compressor": {"save_token_count": 360}, "a2a": {"rpc": [MCP["rpc"][1]]},
                "proxy": {"usage": DETAILED, "meta": META_WITH_ID, "cache": {}, "payload": {"response": "x"},
                          "rag-inject": {"embeddings_tokens": 62}},
            },
        },
        [api_event(), *detailed("proxy")],
    ),
    "AI Gateway 2.x": (
        {"ai": {"proxy": {"usage": DETAILED, "meta": META_WITH_ID | {"operation_name": "chat"}}}},
        [api_event(), *detailed("proxy")],
    ),
    "AI Gateway 2.x, tool calls": (
        {"ai": {"mcp": MCP}, "tries": [], "source": "service", "latencies": {"proxy": -1, "third_party": 5.936128}},
        [api_event(), MCP_EVENT],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), KONGS.values(), ids=KONGS)
def test_an_entry_of_every_kong_is_billed_exactly(changes: Json, expected: list[Json]) -> None:
    """With all the newer meters on, in any form of the line; a flat sum beside containers adds nothing."""
    line = logged(**changes)
    forms = (line, BOM + line, b"[" + line + b"]", b'{"message":' + line + b"}", line + b"\r", b"\0\0" + line)
    for form in forms:
        mapped = mapped_by(form, **NEW_METERS)
        assert events_of(mapped) == expected
        check_books(mapped, 1)
        check_accepted(mapped)
    ai = changes.get("ai", {})
    if isinstance(ai, dict) and any("usage" in part for part in ai.values() if isinstance(part, dict)):
        flat = {"usage": {"prompt_tokens": 999, "completion_tokens": 999}, "meta": META}
        assert events_of(mapped_by(logged(**changes | {"ai": ai | flat}), **NEW_METERS)) == expected


def test_zero_tokens_are_emitted_on_request_and_missing_ones_never() -> None:
    """Case 67: 0 and missing are told apart."""
    zero = logged(ai={"proxy": {"usage": {"prompt_tokens": 0, "completion_tokens": 0}, "meta": META_WITH_ID}})
    assert events_of(mapped_by(zero)) == [api_event()]
    assert events_of(mapped_by(zero, emit_zero_tokens=True)) == [api_event(), *pair(0, 0, **PROXY)]
    missing = logged(ai={"proxy": {"usage": {"prompt_tokens": 0}, "meta": META_WITH_ID}})
    assert events_of(mapped_by(missing, emit_zero_tokens=True)) == [api_event(), pair(0, 0, **PROXY)[0]]


def call(prompt: Any, completion: Any) -> Json:
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": completion}, "meta": META}


FAILED: dict[str, tuple[int | None, Json, Json, list[tuple[str, int]], int]] = {
    # status, ai, metering; the (kind, tokens) billed, and the calls counted as failed
    "an estimate of a failed call": (429, {"proxy": call(12, 0)}, {}, [], 1),
    "the same without a count of its output": (502, {"proxy": call(12, None)}, {}, [], 1),
    "at the border": (400, {"proxy": call(12, 0)}, {}, [], 1),
    "below the border": (399, {"proxy": call(12, 0)}, {}, [("input", 12)], 0),
    "a failed call that gave an answer": (500, {"proxy": call(12, 1)}, {}, [("input", 12), ("output", 1)], 0),
    "a failed call without an estimate": (500, {"proxy": call(0, 0)}, {}, [], 0),
    "zeros of a failed call are not emitted": (500, {"proxy": call(0, 0)}, {"emit_zero_tokens": True}, [], 0),
    "failed calls metered": (429, {"proxy": call(12, 0)}, {"meter_failed_ai_calls": True}, [("input", 12)], 0),
    "flat": (429, {"usage": {"prompt_tokens": 12, "completion_tokens": 0}, "meta": META}, {}, [], 1),
    "two failed calls": (429, {"proxy": call(12, 0), "ai-b": call(3, 0)}, {}, [], 2),
    "one of two calls failed": (
        429, {"proxy": call(12, 0), "ai-b": call(3, 4)}, {}, [("input.ai-b", 3), ("output.ai-b", 4)], 1,
    ),
    "no status": (None, {"proxy": call(12, 0)}, {}, [("input", 12)], 0),
}  # fmt: skip


@pytest.mark.parametrize(("status", "ai", "metering", "billed", "failed"), FAILED.values(), ids=FAILED)
def test_the_estimate_of_a_failed_call_is_not_billed(
    status: int | None, ai: Json, metering: Json, billed: list[tuple[str, int]], failed: int
) -> None:
    line = logged(ai=ai, response={"status": status})
    mapped = mapped_by(line, **metering)
    found = [(event["id"].partition(":")[2], event["data"].get("tokens")) for event in events_of(mapped)]
    assert found == [("api_request", None), *billed]
    assert mapped.books[Count.FAILED_AI_CALLS] == failed
    check_books(mapped, 1)
    mapped = mapped_by(line, meter_api_requests=False, **metering)
    assert mapped.books[Count.BILLED] == (1 if billed else 0)
    reason = "failed_ai_call" if failed else "no_usage"
    assert mapped.books.by_reason(SKIPPED) == ({} if billed else {reason: 1})


@pytest.mark.parametrize("status_missing", [..., None, {}, []], ids=str)
def test_a_call_without_a_response_is_not_taken_for_failed(status_missing: Any) -> None:
    mapped = mapped_by(logged(ai={"proxy": call(12, 0)}, response=status_missing))
    assert mapped.books[Count.TOKENS_REQUEST] == 12 and mapped.books[Count.FAILED_AI_CALLS] == 0


# Ids.

WITHOUT_ID: Json = {
    "request": {"method": "GET", "uri": "/a/b", "size": 12},
    "started_at": STARTED_AT,
    "consumer": {"id": "97d42fdf"},
    "ai": {"proxy": {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}, "ai-b": {"usage": {"prompt_tokens": 1}}},
}
HASH = "a707b733aa854b6d7803137ca29825b4"
KINDS = ["api_request", "input", "output", "input.ai-b"]


def reordered(value: Any) -> Any:
    return {key: reordered(value[key]) for key in reversed(value)} if isinstance(value, dict) else value


FORMS: dict[str, Callable[[Json], bytes]] = {
    "as it is": line_of,
    "keys in another order": lambda entry: line_of(reordered(entry)),
    "slashes escaped": lambda entry: line_of(entry).replace(b"/", b"\\/"),
    "numbers as floats": lambda entry: line_of(entry).replace(b"0015", b"0015.0").replace(b": 12", b": 12.0"),
    "no white space": lambda entry: orjson.dumps(entry),
    "a BOM": lambda entry: BOM + line_of(entry),
    "CRLF": lambda entry: line_of(entry) + b"\r\n",
    "leading spaces": lambda entry: b" \t " + line_of(entry),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_ids_of_an_entry_are_pinned_in_any_form(form: Callable[[Json], bytes]) -> None:
    """Recipe 1 (cases 24, 36, 62 and 68): whoever writes or reads the entry again, its ids are these, for ever."""
    with_id = WITHOUT_ID | {"request": WITHOUT_ID["request"] | {"id": ID}}
    found = [event.id for event in mapped_by(form(with_id)).events]
    assert found == [f"2b02608e258d41732acbbe7e4933f722-1782907200015:{kind}" for kind in KINDS]
    mapped = mapped_by(form(WITHOUT_ID))
    assert [event.id for event in mapped.events] == [f"{HASH}:{kind}" for kind in KINDS]
    assert mapped.books[Count.HASHED_IDS] == 1


@pytest.mark.parametrize("empty", ["", None, True, [], {}], ids=str)
def test_an_empty_request_id_is_a_missing_one(empty: Any) -> None:
    """Case 68: else every such line would share one id, and a day of traffic bill as one request."""
    request = WITHOUT_ID["request"] | {"id": empty}
    lines = [line_of(WITHOUT_ID | {"request": request, "started_at": STARTED_AT + n}) for n in range(3)]
    mapped = mapped_by(b"\n".join(lines))
    assert mapped.books[Count.BILLED] == mapped.books[Count.HASHED_IDS] == 3
    assert len({event.id for event in mapped.events}) == len(mapped.events) == 12
    assert not any(event.id.startswith("-") for event in mapped.events)
    assert "api_request_id" not in events_of(mapped)[1]["data"]


def test_a_request_id_that_repeats_across_pods_is_told_apart_by_its_time() -> None:
    mapped = mapped_by(logged() + b"\n" + logged(started_at=STARTED_AT + 1))
    assert [event.id for event in mapped.events] == [f"{BASE}:api_request", f"{ID}-{STARTED_AT + 1}:api_request"]


def test_ids_do_not_depend_on_the_configuration_or_the_place_of_the_line() -> None:
    """Cases 8-14, 26-28 and 62: a copy, a rotation or another reader bills nothing new."""
    line = logged(ai={"proxy": call(3, 4), "ai-b": call(5, 6)})
    alone = [event.id for event in mapped_by(line).events]
    mapper = Mapper(Metering(attributes=ATTRIBUTES, emit_zero_tokens=True, subject=Subject(field="username")))
    assert [event.id for event in mapper.map_lines(b"\n" + line + b"\n", 10**9).events] == alone


def test_distinct_entries_have_distinct_ids() -> None:
    traffic = Traffic(3, started_at_ms=STARTED_AT)
    mapped = mapped_by(b"".join(traffic.line() for _ in range(2_000)))
    assert mapped.books[Count.HASHED_IDS] > 300
    assert len({event.id for event in mapped.events}) == len(mapped.events) == traffic.truth.events


# Times.


@pytest.mark.parametrize(
    ("started_at", "time"),
    [
        (1_000_000_000_000, "2001-09-09T01:46:40.000Z"),
        (1_000_000_000_001.0, "2001-09-09T01:46:40.001Z"),
        (1_709_164_799_999, "2024-02-28T23:59:59.999Z"),
        (4_294_967_295_999, "2106-02-07T06:28:15.999Z"),
    ],
)
def test_the_time_of_an_event_is_that_of_the_log_in_utc(started_at: int | float, time: str) -> None:
    (event,) = events_of(mapped_by(logged(started_at=started_at)))
    assert event["time"] == time
    assert event["id"] == f"{ID}-{int(started_at)}:api_request"


@pytest.mark.parametrize(
    "started_at",
    [..., None, 0, -1, 1_782_907_200, 999_999_999_999, 4_294_967_296_000, 7_258_118_400_000, STARTED_AT + 0.5, 1e300,
     float("nan"), float("inf"), 10**400, True, str(STARTED_AT), [STARTED_AT], {}],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_a_time_that_openmeter_would_lose_is_kept_aside(started_at: Any) -> None:
    """Case 69: 0, missing, seconds in place of milliseconds, year 2200."""
    mapped = mapped_by(logged(started_at=started_at))
    (letter,) = mapped.dead_letters
    assert letter.reason is Dead.BAD_STARTED_AT and mapped.events == []
    assert "not milliseconds between 2001 and 2106" in letter.detail and len(letter.detail) < 120
    check_books(mapped, 1)


# Every line has one outcome.

ONE_BAD_CALL = {"proxy": call(5, 6), "ai-request-transformer": call(7, -8)}
OUTCOMES: dict[str, tuple[Skip | Dead | None, bytes, Json]] = {
    "billed": (None, logged(), {}),
    "billed, an object in a header": (None, logged(request=REQUEST | {"headers": {"host": {"a": 1}}}), {}),
    "empty line": (Skip.BLANK_LINE, b"", {}),
    "white space": (Skip.BLANK_LINE, b" \t\r", {}),
    "no consumer": (Skip.NO_SUBJECT, logged(consumer=...), {}),
    "header not sent": (
        Skip.NO_SUBJECT, logged(), {"subject": Subject(look_up_value_in="header", field="x-none")},
    ),
    "a parameter without value": (
        Skip.NO_SUBJECT, logged(), {"subject": Subject(look_up_value_in="query", field="stream")},
    ),
    "a plain request where AI is metered": (Skip.NO_USAGE, logged(), {"meter_api_requests": False}),
    "a failed AI call": (
        Skip.FAILED_AI_CALL, logged(ai={"proxy": call(5, 0)}, response={"status": 500}), {"meter_api_requests": False},
    ),
    "a stream session": (Skip.STREAM_SESSION, b'{"session":{"sent":1},"started_at":1}', {}),
    "cut": (Dead.NOT_JSON, logged()[:-1], {}),
    "a line of nginx": (Skip.NOT_AN_ENTRY, b'2026/07/01 12:00:00 [notice] 1#0: signal process started', {}),
    "a line that only begins like nginx's": (Dead.NOT_JSON, b'10.0.0.1 - - [x] "GET / HTTP/1.1" 200', {}),
    "nested 100,000 deep": (Dead.NOT_JSON, b"[" * 100_000, {}),
    "nested 100,000 deep in an entry": (
        Dead.NOT_JSON, logged()[:-1] + b',"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", {},
    ),
    "nested too deep to be hashed": (
        Dead.NOT_JSON, line_of(WITHOUT_ID)[:-1] + b',"x":' + b"[" * 800 + b"]" * 800 + b"}", {},
    ),
    "NUL bytes": (Skip.BLANK_LINE, b"\0" * 4096, {}),
    "NUL bytes within": (Dead.NOT_JSON, logged().replace(b",", b"\0,", 1), {}),
    "invalid UTF-8 outside of text": (Dead.NOT_JSON, b"\xff\xfe", {}),
    "top-level array of an entry": (None, b"[" + logged() + b"]", {}),
    "top-level array of something else": (Dead.NOT_AN_ENTRY, b"[1,[2],null]", {}),
    "top-level array of objects that are no entries": (Dead.NOT_AN_ENTRY, b'[{"a":1},{"b":2}]', {}),
    "top-level string": (Dead.NOT_AN_ENTRY, b'"request"', {}),
    "top-level number": (Dead.NOT_AN_ENTRY, b"12", {}),
    "top-level 5,000 digits": (Dead.NOT_AN_ENTRY, b"9" * 5000, {}),
    "top-level NaN": (Dead.NOT_AN_ENTRY, b"NaN", {}),
    "top-level null": (Dead.NOT_AN_ENTRY, b"null", {}),
    "another program's log": (Dead.NOT_AN_ENTRY, b'{"level":"info","msg":"started"}', {}),
    "started_at missing": (Dead.BAD_STARTED_AT, logged(started_at=...), {}),
    "started_at of 5,000 digits": (Dead.BAD_STARTED_AT, logged().replace(b"1782907200015", b"9" * 5000), {}),
    "started_at 1e400": (Dead.BAD_STARTED_AT, logged().replace(b"1782907200015", b"1e400"), {}),
    "started_at nested": (Dead.BAD_STARTED_AT, BOM + logged(started_at=json.loads("[" * 600 + "]" * 600)), {}),
    "negative tokens": (Dead.BAD_TOKEN_COUNT, logged(ai={"proxy": call(-1, 1)}), {}),
    "tokens NaN": (Dead.BAD_TOKEN_COUNT, logged(ai={"proxy": call(float("nan"), 1)}), {}),
    "tokens infinite": (Dead.BAD_TOKEN_COUNT, logged(ai={"proxy": call(1, float("inf"))}), {}),
    "tokens text": (Dead.BAD_TOKEN_COUNT, logged(ai={"proxy": call("12abc", 1)}), {}),
    "tokens true": (Dead.BAD_TOKEN_COUNT, logged(ai={"proxy": call(True, 1)}), {}),
    "tokens of 5,000 digits": (
        Dead.BAD_TOKEN_COUNT, logged(ai={"proxy": call(12345, 1)}).replace(b"12345", b"9" * 5000), {},
    ),
    "tokens above 2^53": (Dead.BAD_TOKEN_COUNT, logged(ai={"proxy": call(2**53 + 1, 1)}), {}),
    "a bad count after a good one": (Dead.BAD_TOKEN_COUNT, logged(ai=ONE_BAD_CALL), {}),
    "a subject of 10 KB": (Dead.BAD_SUBJECT, logged(consumer={"id": "a" * 10_240}), {}),
    "a subject with control characters": (Dead.BAD_SUBJECT, logged(consumer={"id": "a\x1b[2J"}), {}),
    "no subject, kept aside": (Dead.NO_SUBJECT, logged(consumer=...), {"on_missing_subject": "dead_letter"}),
    "more cached than asked": (
        None,
        logged(ai={"proxy": {"usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}}}),
        {"split_cached_input": True},
    ),
    "a method not metered": (Skip.FILTERED_METHOD, logged(request=REQUEST | {"method": "PUT"}), {"methods": ("post",)}),
    "a status not metered": (Skip.FILTERED_STATUS, logged(response={"status": 301}), {"statuses": ("2xx",)}),
    "a path not metered": (Skip.FILTERED_PATH, logged(request=REQUEST | {"uri": "/health"}), {"paths": ("/llm",)}),
    "a workspace not metered": (
        Skip.FILTERED_WORKSPACE, logged(workspace_name="other"), {"workspaces": ("default", "w-1")},
    ),
    "a rule switched off": (
        Skip.RULE_DISABLED, logged(service={"name": "off"}), {"rules": (Rule(service="off", enabled=False),)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("outcome", "line", "metering"), OUTCOMES.values(), ids=OUTCOMES)
def test_every_line_has_exactly_one_outcome(outcome: Skip | Dead | None, line: bytes, metering: Json) -> None:
    """Cases 25, 66, 67 and 69; the good lines around a bad one are billed as ever."""
    good = logged(
        workspace="w-1",
        request=REQUEST | {"id": "good", "headers": {"x-none": "good"}, "querystring": {"stream": "good"}},
        ai={"proxy": call(1, 1)},
    )
    data = good + b"\n" + line + b"\n" + good
    mapped = mapped_by(data, **metering)
    check_books(mapped, 3)
    check_accepted(mapped)
    books = mapped.books
    assert books[Count.BILLED] == (3 if outcome is None else 2)
    assert books.by_reason(SKIPPED) == ({outcome: 1} if isinstance(outcome, Skip) else {})
    assert books.by_reason(DEAD_LETTERS) == ({outcome: 1} if isinstance(outcome, Dead) else {})
    for letter in mapped.dead_letters:
        assert letter.line == line
        assert data[letter.start_offset : letter.end_offset] == line + b"\n"


def test_the_outcomes_above_are_all_there_are() -> None:
    """Every reason of the closed lists is reached; LINE_TOO_LONG by the readers, through `overlong_line`."""
    reached = {outcome for outcome, _, _ in OUTCOMES.values()} - {None}
    reached |= {
        letter.reason for letter in overlong_line(Overlong(20_000_000, "ab" * 32, b"{"), 0, 20_000_000).dead_letters
    }
    by_others = {Dead.REFUSED, Skip.OUTSIDE_PERIOD, Skip.OTHER_SUBJECT, Skip.ALREADY_DELIVERED}  # a server, a replay
    assert reached == {*Skip, *Dead} - by_others


def test_a_line_above_the_limit_is_one_dead_letter_with_its_beginning() -> None:
    """Case 21."""
    mapped = overlong_line(Overlong(19_999_999, "ab" * 32, b'{"request":'), 100, 20_000_100)
    check_books(mapped, 1)
    (letter,) = mapped.dead_letters
    assert letter == (
        100,
        20_000_100,
        Dead.LINE_TOO_LONG,
        f"a line of 19999999 bytes, SHA-256 {'ab' * 32}; its beginning is kept",
        b'{"request":',
    )


def test_nuls_where_lines_should_be_are_counted() -> None:
    """Case 23."""
    mapped = nuls(4096)
    assert mapped.books == Books({Count.NUL_BYTES: 4096})
    assert (mapped.events, mapped.dead_letters, mapped.books.balanced) == ([], [], True)


@pytest.mark.parametrize(
    ("data", "spans"),
    [
        (b"", []),
        (b"x", [(50, 51)]),
        (b"x\n", [(50, 52)]),
        (b"x\r\ny", [(50, 53), (53, 54)]),
        (b"\nx\n\ny\n", [(51, 53), (54, 56)]),
    ],
    ids=repr,
)
def test_dead_letters_know_where_their_lines_are(data: bytes, spans: list[tuple[int, int]]) -> None:
    mapped = Mapper(Metering()).map_lines(data, 50)
    assert [(letter.start_offset, letter.end_offset) for letter in mapped.dead_letters] == spans
    check_books(mapped, len(data.splitlines()))


def test_a_bad_count_leaves_no_tokens_in_the_books() -> None:
    """Case 67: the call before it was good, but the line as a whole is kept aside, to be billed once it is mended."""
    mapped = mapped_by(logged(ai=ONE_BAD_CALL))
    assert +mapped.books == {"lines": 1, "entries": 1, "dead_letters.bad_token_count": 1}
    assert mapped.events == []


def test_of_a_key_twice_the_last_one_counts() -> None:
    """Case 25, as other JSON readers do, with and without the lenient path."""
    line = logged()[:-1] + b',"consumer":{"id":"last"}}'
    for form in (line, BOM + line):
        assert [event.subject for event in mapped_by(form).events] == ["consumer:last"]


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff",
        b"\xc3",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\\ud800",
        b"\\udc00\\ud800",
        b"\\u0000",
        b"\t",
        b"\x00",
        b"\x7f",
    ],
    ids=repr,
)
@pytest.mark.parametrize("where", ["user-agent", "header", "method", "model", "elsewhere", "key"])
def test_nobody_escapes_billing_with_one_byte(where: str, garbage: bytes) -> None:
    """Case 22: invalid UTF-8 and lone surrogates are billed, and what we send is valid all the same."""
    changes: Json = {
        "user-agent": {"request": REQUEST | {"headers": {"user-agent": "G"}}},
        "header": {"request": REQUEST | {"headers": {"x-department": ["G"]}}},
        "method": {"request": REQUEST | {"method": "G"}},
        "model": {},
        "elsewhere": {"upstream_uri": "/G"},
        "key": {"latencies": {"G": 1}},
    }
    ai = {"proxy": call(3, 4) | {"meta": META | {"request_model": "G"} if where == "model" else META}}
    line = logged(**changes[where], ai=ai).replace(b'G"', garbage + b'"')
    assert garbage in line
    mapped = mapped_by(line, attributes=ATTRIBUTES)
    assert [event.id for event in mapped.events] == [f"{BASE}:{kind}" for kind in KINDS[:3]]
    check_accepted(mapped)


@pytest.mark.parametrize("garbage", [b"\xff", b"\\ud800", b"\xed\xa0\x80"], ids=repr)
@pytest.mark.parametrize("field", ["id", "username"])
def test_invalid_text_in_the_consumer_is_billed_to_its_cleaned_name(field: str, garbage: bytes) -> None:
    """Case 22."""
    line = logged(consumer={"id": "acme-G", "username": "acme-G"}).replace(b"G", garbage)
    mapped = mapped_by(line, subject=Subject(field=field))
    assert {event.subject.rstrip("\ufffd") for event in mapped.events} == {"acme-"}
    check_accepted(mapped)


def test_mapping_is_pure() -> None:
    """The same bytes give the same result, whatever was mapped before."""
    mapper = Mapper(Metering())
    data = b"\n".join(line for _, line, _ in OUTCOMES.values())
    first, second = mapper.map_lines(data, 7), mapper.map_lines(data, 7)
    assert events_of(first) == events_of(second)
    assert first.books == second.books and first.dead_letters == second.dead_letters


# Several entries on a line, and what is left of some.

GOOD = logged()
SECOND = logged(request=REQUEST | {"id": "second"})
BAD_TIME = logged(started_at=0)
SESSION = b'{"session":{"sent":1},"started_at":1}'
NO_CONSUMER = logged(consumer=...)
LINES: dict[str, tuple[bytes, int, list[Skip], list[tuple[Dead, bytes]]]] = {
    # the line; how many entries are billed, what is skipped, what is kept aside with which bytes
    "glued": (GOOD + SECOND, 2, [], []),
    "glued with NULs between": (GOOD + b"\0\0" + SECOND, 2, [], []),
    "torn, then whole": (GOOD[:100] + SECOND, 1, [], [(Dead.NOT_JSON, GOOD[:100])]),
    "whole, then torn": (SECOND + GOOD[:100], 1, [], [(Dead.NOT_JSON, GOOD[:100])]),
    "without its beginning": (GOOD[-60:] + SECOND, 1, [], [(Dead.NOT_JSON, GOOD[-60:])]),
    "an array": (b"[" + GOOD + b"," + SECOND + b"]", 2, [], []),
    "an array with all outcomes": (
        b"[" + b",".join([GOOD, SESSION, b"5", BAD_TIME, NO_CONSUMER, b'{"a":1}']) + b"]", 1,
        [Skip.STREAM_SESSION, Skip.NO_SUBJECT],
        [(Dead.NOT_AN_ENTRY, b"5"), (Dead.BAD_STARTED_AT, orjson.dumps(json.loads(BAD_TIME))),
         (Dead.NOT_AN_ENTRY, b'{"a":1}')],
    ),
    "glued with a bad one": (
        GOOD + BAD_TIME + SECOND, 2, [], [(Dead.BAD_STARTED_AT, orjson.dumps(json.loads(BAD_TIME)))],
    ),
    "a bad one alone in its array": (
        b"[" + BAD_TIME + b"]", 0, [], [(Dead.BAD_STARTED_AT, b"[" + BAD_TIME + b"]")],
    ),
    "a session before an entry": (SESSION + GOOD, 1, [Skip.STREAM_SESSION], []),
    "under message": (b'{"message":' + GOOD + b',"level":"info"}', 1, [], []),
    "two of them under message": ((b'{"message":' + GOOD + b"}") + (b'{"message":' + SECOND + b"}"), 2, [], []),
    "a bad one under message": (
        b'{"message":' + BAD_TIME + b"}", 0, [], [(Dead.BAD_STARTED_AT, b'{"message":' + BAD_TIME + b"}")],
    ),
    "nothing of it an entry": (b'{"a":1}{"b":2}', 0, [], [(Dead.NOT_AN_ENTRY, b'{"a":1}{"b":2}')]),
    "objects and a torn one": (b'{"a":1}' + GOOD[:100], 0, [], [(Dead.NOT_JSON, b'{"a":1}' + GOOD[:100])]),
    "an empty array": (b"[]", 0, [], [(Dead.NOT_AN_ENTRY, b"[]")]),
    "deep nesting behind an entry": (GOOD + b"[" * 5000, 1, [], [(Dead.NOT_JSON, b"[" * 5000)]),
}  # fmt: skip


@pytest.mark.parametrize(("line", "billed", "skipped", "dead"), LINES.values(), ids=LINES)
def test_every_entry_of_a_line_has_its_own_outcome(
    line: bytes, billed: int, skipped: list[Skip], dead: list[tuple[Dead, bytes]]
) -> None:
    """Cases 4, 23 and 25: nothing good is lost to its neighbour, and the entries balance."""
    data = b"\n".join([logged(request=REQUEST | {"id": "before"}), line, logged(request=REQUEST | {"id": "after"})])
    mapped = Mapper(Metering()).map_lines(data, 1000)
    check_books(mapped, 3, 2 + billed + len(skipped) + len(dead))
    check_accepted(mapped)
    assert mapped.books[Count.BILLED] == 2 + billed
    assert Counter(mapped.books.by_reason(SKIPPED)) == Counter(skipped)
    found = [(letter.reason, letter.line) for letter in mapped.dead_letters]
    assert [(reason, _json_or_raw(kept)) for reason, kept in found] == [(r, _json_or_raw(kept)) for r, kept in dead]
    start = data.index(b"\n") + 1
    for letter in mapped.dead_letters:
        assert data[letter.start_offset - 1000 : letter.end_offset - 1000] == line + b"\n"
        assert letter.start_offset == 1000 + start
    ids = [event.id for event in mapped.events]
    assert ids[0].startswith("before-") and ids[-1].startswith("after-")
    assert set(ids[1:-1]) <= {f"{BASE}:api_request", f"second-{STARTED_AT}:api_request"}
    assert len(ids) == len(set(ids)) == 2 + billed


def _json_or_raw(kept: bytes) -> Any:
    try:
        return json.loads(kept)
    except (ValueError, RecursionError):
        return kept


def test_an_entry_has_the_same_ids_alone_and_among_others() -> None:
    """Also where the id is a hash: how the entries were packed changes nothing (cases 36 and 62)."""
    other = WITHOUT_ID | {"started_at": STARTED_AT + 1}
    one, two = line_of(WITHOUT_ID), line_of(other)
    alone = [event.id for event in mapped_by(one + b"\n" + two).events]
    assert len(set(alone)) == 8 and alone[0] == f"{HASH}:api_request"
    for packed in (
        one + two, b"[" + one + b"," + two + b"]", b"x" + one + two, b'{"message":' + one + b"}" + two,
        b'[{"message":' + one + b'},{"message":' + two + b"}]",
    ):  # fmt: skip
        assert [event.id for event in mapped_by(packed).events] == alone


def test_only_whole_lines_and_their_entries_are_counted() -> None:
    array = b"[" + b",".join([GOOD, SECOND, b"7"]) + b"]"
    mapped = mapped_by(b"\n\n" + array + b"\n" + GOOD + b"\n" + GOOD[:50])
    check_books(mapped, 5, 2 + 3 + 1 + 1)
    assert mapped.books[Count.BILLED] == 3 and mapped.books[SKIPPED + Skip.BLANK_LINE] == 2


# Rules.

SCOPE = {"consumer": "initech", "route": "route-1", "service": "llm-service"}


def test_rules_change_what_an_entry_becomes() -> None:
    rules = (
        Rule(service="llm-service", meter_api_requests=False, emit_zero_tokens=True),
        Rule(route="route-1", subject=Subject(field="username"), attributes=ATTRIBUTES[:1]),
        Rule(route="llm-route", consumer="97d42fdf", enabled=False),
    )
    line = logged(ai={"proxy": call(0, 4)})
    by_service = mapped_by(line, rules=rules[:1])
    assert [event.id for event in by_service.events] == [f"{BASE}:input", f"{BASE}:output"]
    by_route = mapped_by(line, rules=rules[:2])
    assert [event.id for event in by_route.events] == [f"{BASE}:api_request", f"{BASE}:output"]
    assert {event.subject for event in by_route.events} == {"initech"}
    assert {event["data"]["department"] for event in events_of(by_route)} == {"research"}
    off = mapped_by(line, rules=rules)
    assert off.events == [] and off.books.by_reason(SKIPPED) == {"rule_disabled": 1}
    elsewhere = mapped_by(logged(route=..., service=...), rules=rules)
    assert events_of(elsewhere) == events_of(mapped_by(logged(route=..., service=...)))


def test_metering_off_but_for_one_rule_meters_that_scope_alone() -> None:
    on = Rule(consumer="initech", enabled=True)
    mapped = mapped_by(logged() + b"\n" + logged(consumer={"id": "x"}) + b"\n" + SESSION, enabled=False, rules=(on,))
    assert events_of(mapped) == [api_event()]
    assert mapped.books.by_reason(SKIPPED) == {"rule_disabled": 1, "stream_session": 1}
    assert mapped_by(logged(), enabled=False).books.by_reason(SKIPPED) == {"rule_disabled": 1}


def test_a_rule_reads_headers_and_parameters_that_metering_does_not() -> None:
    rule = Rule(
        service="llm-service", subject=(Subject(look_up_value_in="header", field="X-None"),
                                        Subject(look_up_value_in="query", field="team")),
        personal_fields=frozenset({"request_user_agent"}),
        attributes=(Attribute(source="header", look_up_value_in="X-Department", event_property_name="d"),),
    )  # fmt: skip
    (event,) = events_of(mapped_by(logged(), rules=(rule,)))
    assert event["subject"] == "blue" and event["data"]["subject_type"] == "query"
    assert event["data"]["request_user_agent"] == "OpenAI/Python 1.58.1" and event["data"]["d"] == "research"
    (event,) = events_of(mapped_by(logged(service=...), rules=(rule,)))
    assert event["subject"] == "consumer:97d42fdf" and {"request_user_agent", "d"}.isdisjoint(event["data"])


def test_a_rule_may_meter_ai_where_metering_does_not() -> None:
    rule = Rule(service="llm-service", meter_ai_token_usage=True, meter_mcp_tool_calls=True)
    line = logged(ai={"proxy": call(3, 4), "mcp": MCP})
    kinds = ["api_request", "input", "output", "mcp_tool_call.1"]
    assert [event.id for event in mapped_by(line, meter_ai_token_usage=False, rules=(rule,)).events] == [
        f"{BASE}:{kind}" for kind in kinds
    ]


def test_what_a_filter_keeps_out_is_skipped_before_anything_else_is_looked_at() -> None:
    """A request that is not metered can't become a dead letter for its time, its subject or its counts."""
    bad = logged(started_at=0, consumer={"id": "\x1b"}, ai={"proxy": call(-1, "x")})
    for settings_, reason in (({"methods": ("GET",)}, "filtered_method"), ({"statuses": ("5xx",)}, "filtered_status"),
                              ({"paths": ("/x",)}, "filtered_path"), ({"workspaces": ("x",)}, "filtered_workspace"),
                              ({"enabled": False}, "rule_disabled")):  # fmt: skip
        mapped = mapped_by(bad, **settings_)
        assert mapped.books.by_reason(SKIPPED) == {reason: 1} and not mapped.dead_letters


# What became of an entry, and why.


def explained_by(data: bytes, **metering: Any) -> list[Explained]:
    return list(Mapper(Metering(**metering)).explain(data, 500))


def test_each_entry_is_explained_with_the_rule_that_decided() -> None:
    rules = (
        Rule(service="llm-service", methods=("GET",)),
        Rule(service="service-1", statuses=("5xx",)),
        Rule(consumer="globex", route="llm-route", enabled=False),
    )
    data = b"\n".join([
        logged(), logged(request=REQUEST | {"method": "GET", "id": ""}), logged(response={"status": 500}), b" ",
        logged(consumer={"id": "g", "username": "globex"}) + logged(service=...), SESSION, b"x", b"{}", BAD_TIME,
        b"[" + logged(service=..., started_at=0) + b"]",
    ])  # fmt: skip
    found = explained_by(data, rules=rules)
    reasons = [each.outcome.reason if isinstance(each.outcome, Unbillable) else each.outcome for each in found]
    assert [(each.request_id, each.rule, reason) for each, reason in zip(found, reasons, strict=True)] == [
        (ID, "metering.rules[0]", Skip.FILTERED_METHOD),
        (None, "metering.rules[0]", None),
        (ID, "metering.rules[1]", None),
        (None, None, Skip.BLANK_LINE),
        (ID, "metering.rules[2]", Skip.RULE_DISABLED),
        (ID, "metering", None),
        (None, None, Skip.STREAM_SESSION),
        (None, None, Dead.NOT_JSON),
        (None, None, Dead.NOT_AN_ENTRY),
        (ID, "metering.rules[0]", Skip.FILTERED_METHOD),
        (ID, "metering", Dead.BAD_STARTED_AT),
    ]  # fmt: skip
    assert all(bool(e.events) == (e.outcome is None) for e in found)
    starts = [500 + sum(len(line) + 1 for line in data.split(b"\n")[:n]) for n in range(10)]
    assert [e.start_offset for e in found] == [*starts[:5], starts[4], *starts[5:]]


def check_explained(mapper: Mapper, data: bytes) -> None:
    """`explain` and `map_lines` tell the same: the same events in order, the same outcomes, entry by entry."""
    mapped, found = mapper.map_lines(data, 7), list(mapper.explain(data, 7))
    assert len(found) == mapped.books[Count.ENTRIES]
    told = msgspec.json.encode([event for each in found for event in each.events])
    assert told == msgspec.json.encode(mapped.events)
    skips = Counter(str(each.outcome) for each in found if isinstance(each.outcome, Skip))
    assert skips == Counter(mapped.books.by_reason(SKIPPED))
    faults = [(each.start_offset, each.outcome.reason) for each in found if isinstance(each.outcome, Unbillable)]
    assert faults == [(letter.start_offset, letter.reason) for letter in mapped.dead_letters]
    assert sum(each.outcome is None for each in found) == mapped.books[Count.BILLED]


@pytest.mark.parametrize("metering", [metering for _, _, metering in OUTCOMES.values() if metering], ids=str)
def test_explaining_agrees_with_mapping(metering: Json) -> None:
    data = b"\n".join([*(line for _, line, _ in OUTCOMES.values()), *(line for line, *_ in LINES.values())])
    check_explained(Mapper(Metering(**metering)), data)


# Anything at all.

_traffic = Traffic(5, started_at_ms=STARTED_AT)
SEEDS = [_traffic.entry() for _ in range(60)]
MAPPERS = [
    Mapper(Metering()),
    Mapper(
        Metering(
            subject=Subject(look_up_value_in="header", field="x-tenant"),
            attributes=ATTRIBUTES,
            personal_fields=frozenset({"client_ip", "request_uri", "request_user_agent"}),
            emit_zero_tokens=True,
            meter_failed_ai_calls=True,
            on_missing_subject="dead_letter",
        )
    ),
    Mapper(Metering(subject=Subject(look_up_value_in="query", field="page"), meter_api_requests=False)),
    Mapper(Metering(subject=Subject(field="custom_id"), meter_ai_token_usage=False)),
    Mapper(Metering(subject=Subject(look_up_value_in="application"))),
]
TEXT = st.text(alphabet=st.characters(exclude_categories=()), max_size=8)
ANY_JSON: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from(
        [0, -1, 1, "", "12", 12.0, 2**53, 2**53 + 1, 2**64, 10**400, 1e300, "UNSPECIFIED", {}, [], None, True]
    )
    | st.integers()
    | st.floats()
    | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.sampled_from(["usage", "id"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [(*path, key) for key, _ in inner] + [found for key, item in inner for found in paths_of(item, (*path, key))]


@st.composite
def mutated_lines(draw: st.DrawFn) -> bytes:
    """An entry with odd values anywhere, perhaps with bytes cut, flipped or put in."""
    entry = json.loads(json.dumps(draw(st.sampled_from(SEEDS))))
    for _ in range(draw(st.integers(0, 3))):
        *parents, last = draw(st.sampled_from(paths_of(entry) or [("request",)]))
        target = entry
        for key in parents:
            target = target[key]
        target[last] = draw(ANY_JSON)
    ascii_only = draw(st.booleans())
    line = json.dumps(entry, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass").replace(b"\n", b" ")
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(line)))
        kept = draw(st.sampled_from([start, start + 1, start + 2, len(line)]))
        line = line[:start] + draw(st.binary(max_size=2)) + line[kept:]
    return line


@settings(max_examples=200, deadline=None)
@given(st.lists(mutated_lines(), min_size=1, max_size=2), st.sampled_from(MAPPERS))
def test_whatever_the_lines_hold_they_are_accounted_for(lines: list[bytes], mapper: Mapper) -> None:
    """Cases 22, 25 and 66 to 69 together: never raises, books balance, ids are the same again, OpenMeter accepts.

    A cut line may hold more than one entry's worth: a dead letter's line is then a part of the line it stands in.
    """
    data = b"\n".join(lines)
    mapped = mapper.map_lines(data, 1000)
    cut = data.split(b"\n")
    counted = sum(max(1, len(pieces(line))) if line.strip() else 1 for line in (cut if cut[-1] else cut[:-1]))
    check_books(mapped, len(cut) if cut[-1] else len(cut) - 1, counted)
    if mapped.events:
        check_accepted(mapped)
    again = mapper.map_lines(data + b"\n", 5)
    assert events_of(again) == events_of(mapped)
    for letter in mapped.dead_letters:
        whole = data[letter.start_offset - 1000 : letter.end_offset - 1000].removesuffix(b"\n")
        assert whole == letter.line or letter.line in [piece.raw for piece in pieces(whole)]
        assert letter.detail.isascii() and len(letter.detail) < 120
    for line in cut:
        events = mapper.map_lines(line).events
        assert len({event.id for event in events}) == len(events)


@settings(max_examples=200, deadline=None)
@given(mutated_lines(), st.sampled_from(MAPPERS))
def test_the_fast_path_and_the_lenient_one_bill_the_same(line: bytes, mapper: Mapper) -> None:
    """A BOM before the line forces the lenient path; what both can read they read alike."""
    fast, lenient = mapper.map_lines(line), mapper.map_lines(BOM + line)
    try:
        json.loads(line.decode("utf-8", "replace"), strict=False)
    except (ValueError, RecursionError):
        return
    if line.strip() and b"\n" not in line and not line.startswith(BOM):
        assert events_of(fast) == events_of(lenient)
        assert fast.books == lenient.books


# Generated entries under generated rules.

SOMETIMES = st.sampled_from([None, 0, 1, 5, 10, 2**53, 12.0])
RARELY_BAD = SOMETIMES | SOMETIMES | SOMETIMES | st.sampled_from([-1, 2**53 + 1, 1.5, "12", True, 10**400, 1e300, []])
DETAILS = st.none() | st.dictionaries(
    st.sampled_from(["cached_tokens", "audio_tokens", "reasoning_tokens", "audio_tokens_count", "else"]), SOMETIMES
)
USAGES = st.fixed_dictionaries(
    {},
    optional={
        "prompt_tokens": RARELY_BAD, "completion_tokens": RARELY_BAD, "prompt_token": RARELY_BAD,
        "input_tokens": RARELY_BAD, "output_tokens": RARELY_BAD,
        "prompt_tokens_details": DETAILS, "completion_tokens_details": DETAILS, "input_tokens_details": DETAILS,
    },
)  # fmt: skip
CALLS_OF_TOOLS = st.lists(
    st.fixed_dictionaries(
        {"method": st.sampled_from(["tools/call", "tools/call", "tools/list"])},
        optional={"tool_name": TEXT, "latency": SOMETIMES, "error": TEXT | st.fixed_dictionaries({"message": TEXT})},
    ),
    max_size=3,
)
AI = st.fixed_dictionaries(
    {},
    optional={
        **{name: st.fixed_dictionaries({"usage": USAGES}, optional={"meta": st.just(META)})
           for name in ("proxy", "ai-proxy", "ai-request-transformer", "zeta")},
        "usage": USAGES, "meta": st.just(META), "mcp": st.fixed_dictionaries({"rpc": CALLS_OF_TOOLS}),
    },
)  # fmt: skip
NAMED = st.sampled_from(
    [{"id": "1", "name": "a", "username": "a"}, {"id": "2", "name": "b", "username": "b"}, None, {}]
)
ENTRIES = st.fixed_dictionaries(
    {
        "request": st.fixed_dictionaries(
            {"id": st.sampled_from([ID, "other", "", None]), "method": st.sampled_from(["GET", "POST", None])},
            optional={
                "uri": st.sampled_from(["/", "/llm/v1?a=b", "/health"]),
                "headers": st.fixed_dictionaries({}, optional={"x-tenant": TEXT, "host": TEXT, "user-agent": TEXT}),
                "querystring": st.sampled_from([{}, [], {"team": "blue"}, {"team": True}]),
            },
        ),
        "started_at": st.sampled_from([STARTED_AT, STARTED_AT, STARTED_AT + 1, float(STARTED_AT), 0]),
    },
    optional={
        "response": st.fixed_dictionaries({"status": st.sampled_from([200, 404, 500, None, "200"])}),
        "service": NAMED, "route": NAMED, "consumer": NAMED, "ai": AI,
        "workspace": st.sampled_from(["w-1", "w-2"]), "session": st.sampled_from([{}, None]),
    },
)  # fmt: skip
SETTINGS_OF = {
    "enabled": st.booleans(), "meter_ai_token_usage": st.booleans(), "meter_mcp_tool_calls": st.booleans(),
    "emit_zero_tokens": st.booleans(), "meter_failed_ai_calls": st.booleans(), "token_details": st.booleans(),
    "split_cached_input": st.booleans(), "on_missing_subject": st.sampled_from(["skip", "dead_letter"]),
    "subject": st.sampled_from([
        {}, {"field": "username"}, [{"look_up_value_in": "header", "field": "X-Tenant"}, {"field": "id"}],
        [{"look_up_value_in": "query", "field": "team"}, {"look_up_value_in": "application"}, {}],
    ]),
    "attributes": st.sampled_from([
        [], [{"source": "query", "look_up_value_in": "team", "event_property_name": "t"}],
        [{"source": "header", "look_up_value_in": "X-Tenant", "event_property_name": "h"},
         {"source": "query", "look_up_value_in": "team", "event_property_name": "t"}],
    ]),
    "personal_fields": st.sampled_from([[], ["request_uri"], ["client_ip", "request_user_agent"]]),
    "methods": st.sampled_from([[], ["GET"], ["get", "POST"]]),
    "statuses": st.sampled_from([[], ["2xx"], [404, "5xx"]]), "meter_api_requests": st.booleans(),
    "paths": st.sampled_from([[], ["/llm"], ["~/h"]]), "workspaces": st.sampled_from([[], ["w-1"]]),
}  # fmt: skip
SCOPED = st.fixed_dictionaries({}, optional={kind: st.sampled_from(["1", "a", "b"]) for kind in SCOPE}).filter(bool)
RULE_SETS = st.lists(
    st.tuples(SCOPED, st.fixed_dictionaries({}, optional=SETTINGS_OF)).map(lambda parts: parts[0] | parts[1]),
    max_size=4,
)


@st.composite
def meterings(draw: st.DrawFn) -> Metering:
    try:
        return Metering.model_validate(
            draw(st.fixed_dictionaries({}, optional=SETTINGS_OF)) | {"rules": draw(RULE_SETS)}
        )
    except ValueError:  # settings that are on and meter nothing
        reject()


@settings(max_examples=150, deadline=None)
@given(st.lists(ENTRIES, min_size=1, max_size=4), meterings(), st.sampled_from(["lines", "glued", "array", "message"]))
def test_generated_entries_under_generated_rules(entries: list[Json], metering: Metering, packed: str) -> None:
    """Each entry has one outcome; ids are the same again and distinct; both versions of OpenMeter take all events."""
    mapper = Mapper(metering)
    lines = [json.dumps(entry).encode() for entry in entries]
    data = {
        "lines": b"\n".join(lines), "glued": b"".join(lines), "array": b"[" + b",".join(lines) + b"]",
        "message": b"\n".join(b'{"message":' + line + b"}" for line in lines),
    }[packed]  # fmt: skip
    mapped = mapper.map_lines(data)
    check_books(mapped, len(entries) if packed in ("lines", "message") else 1, len(entries))
    if mapped.events:
        check_accepted(mapped)
    check_explained(mapper, data)
    alone = [Mapper(metering).map_lines(line) for line in lines]
    assert [event for each in alone for event in events_of(each)] == events_of(mapped)
    for each, entry in zip(alone, entries, strict=True):
        ids = [event.id for event in each.events]
        assert len(set(ids)) == len(ids)
        if ids and entry["request"]["id"]:
            base = f"{entry['request']['id']}-{int(entry['started_at'])}:"
            assert all(each_id.startswith(base) for each_id in ids)
    assert mapped.books[Count.FAILED_AI_CALLS] == sum(each.books[Count.FAILED_AI_CALLS] for each in alone)


PACKED_MAPPERS = [*MAPPERS, Mapper(Metering(**NEW_METERS, rules=(Rule(service="billing-api", methods=("GET",)),)))]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(mutated_lines(), min_size=1, max_size=3), st.sampled_from(PACKED_MAPPERS), st.sampled_from([b"\n", b""])
)
def test_explaining_agrees_with_mapping_whatever_the_lines_hold(
    lines: list[bytes], mapper: Mapper, glue: bytes
) -> None:
    """Explaining reads the slow way, mapping the fast one where it can: what both tell is the same."""
    check_explained(mapper, glue.join(lines))


def test_traffic_of_all_kongs_is_billed_to_the_last_token() -> None:
    """Mapping agrees with a truth that was worked out from what was generated, not from the mapper."""
    traffic = Traffic(2026, started_at_ms=STARTED_AT)
    data = b"".join(traffic.line() for _ in range(3_000))
    mapped = mapped_by(data, subject=Subject(field="username"))
    truth = traffic.truth
    check_books(mapped, 3_000)
    assert mapped.books[Count.BILLED] == 3_000 - truth.anonymous
    assert mapped.books.by_reason(SKIPPED) == {"no_subject": truth.anonymous} and not mapped.dead_letters
    assert mapped.books[Count.FAILED_AI_CALLS] == truth.failed_ai_calls
    assert len(mapped.events) == truth.events
    requests, tokens = Counter[str](), Counter[tuple[str, str, str]]()
    for event in events_of(mapped):
        if event["type"] == "kong.api_request":
            requests[event["subject"]] += 1
        else:
            data_of = event["data"]
            tokens[event["subject"], data_of["model"], data_of["type"]] += data_of["tokens"]
    assert requests == truth.api_requests and tokens == truth.tokens


# Containers' logs, and what stands among the entries there.

STAMP = "2026-11-21T10:00:00.123456789Z"
NGINX = b'10.0.0.1 - - [21/Nov/2026:10:00:00 +0000] "GET /a HTTP/1.1" 200 5 "-" "curl/8"'
NGINX_ERROR = b'2026/11/21 10:00:00 [error] 1#0: *5 bad, client: 10.0.0.1, server: kong, request: "GET / HTTP/1.1"'


def as_cri(line: bytes, size: int = 1000) -> bytes:
    """As containerd writes it, cut after `size` bytes."""
    parts = [line[start : start + size] for start in range(0, len(line), size)] or [b""]
    tags = ["P"] * (len(parts) - 1) + ["F"]
    return b"".join(f"{STAMP} stdout {tag} ".encode() + part + b"\n" for tag, part in zip(tags, parts, strict=True))


def as_docker(line: bytes, size: int = 1000) -> bytes:
    text = line.decode() + "\n"
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    return b"".join(
        json.dumps({"log": part, "stream": "stdout", "time": STAMP}, separators=(",", ":")).encode() + b"\n"
        for part in parts
    )


WRAPPERS: dict[Format, Callable[[bytes], bytes]] = {"cri": as_cri, "docker": as_docker}


def test_an_entry_is_billed_alike_however_its_log_was_written() -> None:
    traffic = Traffic(5, started_at_ms=STARTED_AT)
    lines = [traffic.line()[:-1] for _ in range(300)]
    mapper = Mapper(Metering())
    plain = mapper.map_lines(b"\n".join(lines))
    check_books(plain, 300)
    written: list[tuple[bytes, Format]] = [(b"".join(map(wrap, lines)), name) for name, wrap in WRAPPERS.items()]
    three = [as_cri, as_docker, lambda line: line + b"\n"]
    written.append((b"".join(three[number % 3](line) for number, line in enumerate(lines)), "auto"))
    for data, format in written:
        for told in (format, "auto"):
            mapped = mapper.map_lines(data, 0, told)
            check_books(mapped, data.count(b"\n"), 300)
            assert events_of(mapped) == events_of(plain)
            assert len([*mapper.explain(data, 0, told)]) == 300


@pytest.mark.parametrize("format", WRAPPERS)
@pytest.mark.parametrize(("outcome", "line", "metering"), OUTCOMES.values(), ids=OUTCOMES)
def test_a_wrapped_line_has_the_outcome_of_the_line_itself(
    outcome: Skip | Dead | None, line: bytes, metering: Json, format: Format
) -> None:
    """Cases 4 and 22 to 25; but other programs' lines, which have no place in a file of Kong's own, are skipped."""
    if format == "docker":
        line = line.decode("utf-8", "replace").encode()
    before, data = as_cri(b""), WRAPPERS[format](line)
    mapped = Mapper(Metering(**metering)).map_lines(before + data + before, 1000)
    check_books(mapped, (before + data + before).count(b"\n"), 3)
    mapped.books.subtract({SKIPPED + Skip.BLANK_LINE: 2})
    told = [*mapped.books.by_reason(SKIPPED), *mapped.books.by_reason(DEAD_LETTERS)]
    is_other = told == [Skip.NOT_AN_ENTRY] and not any(mark in line for mark in (b'"request":', b"started_at"))
    assert told == ([] if outcome is None else [outcome]) or is_other
    for letter in mapped.dead_letters:
        assert letter.line == line
        assert (letter.start_offset, letter.end_offset) == (1000 + len(before), 1000 + len(before + data))


@pytest.mark.parametrize("format", WRAPPERS)
def test_in_a_fixed_format_any_other_line_is_kept_aside(format: Format) -> None:
    """Also an entry: it was not written by what the configuration says writes there. A blank line is none."""
    data = WRAPPERS[format](GOOD) + GOOD + b"\n" + NGINX + b"\n\n"
    mapped = Mapper(Metering()).map_lines(data, 0, format)
    check_books(mapped, data.count(b"\n"), 4)
    assert mapped.books[Count.BILLED] == 1 and mapped.books.by_reason(SKIPPED) == {Skip.BLANK_LINE: 1}
    words = {"cri": "not a CRI line", "docker": "not a line of Docker's json-file"}[format]
    kept = [(letter.reason, letter.detail, letter.line) for letter in mapped.dead_letters]
    assert kept == [(Dead.NOT_JSON, words, GOOD), (Dead.NOT_JSON, words, NGINX)]


def test_in_ndjson_nothing_is_unwrapped_and_nothing_skipped_as_foreign() -> None:
    data = NGINX + b"\n" + as_docker(GOOD, 10_000) + GOOD
    mapped = Mapper(Metering()).map_lines(data, 0, "ndjson")
    check_books(mapped, 3)
    assert mapped.books.by_reason(DEAD_LETTERS) == {Dead.NOT_JSON: 1, Dead.NOT_AN_ENTRY: 1}


STDOUT: dict[str, tuple[bytes, int, int, list[bytes]]] = {
    # the line; how many entries are billed, how many skipped as no entry, what is kept aside
    "nginx's access log": (NGINX, 0, 1, []),
    "nginx's error log": (NGINX_ERROR, 0, 1, []),
    "nginx before an entry": (NGINX + GOOD, 1, 1, []),
    "nginx between entries": (GOOD + NGINX + SECOND, 2, 1, []),
    "nginx behind an entry": (GOOD + NGINX_ERROR, 1, 1, []),
    "nginx within a torn entry": (GOOD[:100] + NGINX, 0, 0, [GOOD[:100] + NGINX]),
    "a torn entry behind nginx": (NGINX + GOOD[:100], 0, 0, [NGINX + GOOD[:100]]),
    "a torn entry, nginx, an entry": (GOOD[:100] + NGINX + SECOND, 1, 0, [GOOD[:100] + NGINX]),
    "an entry behind the error log, which might be a client's": (NGINX_ERROR + GOOD, 0, 0, [NGINX_ERROR + GOOD]),
}


@pytest.mark.parametrize("wrap", [lambda line: line + b"\n", as_cri, as_docker], ids=["plain", "cri", "docker"])
@pytest.mark.parametrize(("line", "billed", "skipped", "kept"), STDOUT.values(), ids=STDOUT)
def test_lines_of_nginx_are_counted_and_nothing_of_an_entry_with_them(
    wrap: Callable[[bytes], bytes], line: bytes, billed: int, skipped: int, kept: list[bytes]
) -> None:
    """Case 4: on stdout entries stand among nginx's lines, and above 4096 bytes within them."""
    data = wrap(line)
    mapped = Mapper(Metering()).map_lines(data)
    check_books(mapped, data.count(b"\n"), billed + skipped + len(kept))
    assert mapped.books[Count.BILLED] == billed
    assert mapped.books.by_reason(SKIPPED) == ({Skip.NOT_AN_ENTRY: skipped} if skipped else {})
    assert [letter.line.replace(b" ", b"") for letter in mapped.dead_letters] == [
        raw.replace(b" ", b"") for raw in kept
    ]


@pytest.mark.parametrize("wrap", [lambda line: line + b"\n", as_cri, as_docker], ids=["plain", "cri", "docker"])
@pytest.mark.parametrize(
    "hostile",
    [NGINX.decode(), NGINX_ERROR.decode(), f"{STAMP} stdout P ", '{"log":"', "\ud800" + NGINX_ERROR.decode(), "\0"],
)
def test_no_client_escapes_billing_by_what_it_sends(wrap: Callable[[bytes], bytes], hostile: str) -> None:
    """Case 22: whatever a header or a path holds, the request is billed."""
    headers = {"user-agent": hostile, hostile: hostile}
    line = json.dumps(ENTRY | {"request": REQUEST | {"uri": hostile, "headers": headers}}).encode()
    mapped = Mapper(Metering()).map_lines(wrap(line) + wrap(b"[" + line + b"]") + wrap(GOOD[:50] + line))
    assert mapped.books[Count.BILLED] == 3 and len(mapped.dead_letters) == 1


def test_nul_bytes_before_an_entry_are_counted() -> None:
    """Case 23."""
    data = b"\0" * 1000 + GOOD + b"\n" + b"\0" * 24 + b"\n" + SECOND + b"\n\0" + as_cri(GOOD) + b"\0" + NGINX
    mapped = Mapper(Metering()).map_lines(data)
    check_books(mapped, data.count(b"\n") + 1, 5)
    assert mapped.books[Count.NUL_BYTES] == 1026
    assert mapped.books[Count.BILLED] == 3
    assert mapped.books.by_reason(SKIPPED) == {Skip.BLANK_LINE: 1, Skip.NOT_AN_ENTRY: 1}
    assert Count.NUL_BYTES not in Mapper(Metering()).map_lines(GOOD).books
