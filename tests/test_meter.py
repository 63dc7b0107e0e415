"""One set of settings: which events an entry becomes, with their details, and what is counted of them."""

import json
import math
from typing import Any

import msgspec
import orjson
import pytest

from metershipper.books import Books, Count, Dead, Skip
from metershipper.entry import EntryDecoder, field_names
from metershipper.meter import Meter, as_bytes_count
from metershipper.metering import DETAIL_FIELDS, LLM_FIELDS, MCP_FIELDS, Attribute, Metering, Subject
from metershipper.pieces import Unbillable, whole_object
from metershipper.sandbox import Version, event_faults

Json = dict[str, Any]

HEADERS, QUERY = field_names(["host", "x-department", "x-tenant"]), field_names(["team"])
DECODER = EntryDecoder(HEADERS, QUERY, ai=True)
DEPARTMENT = Attribute(source="header", look_up_value_in="x-department", event_property_name="department")
TIME = "2026-07-01T12:00:00.015Z"
VERSIONS: tuple[Version, ...] = ("v1", "v3")
ENTRY: Json = {
    "request": {"id": "r1", "headers": {"host": "h", "x-department": "research"}, "querystring": {"team": "blue"}},
    "response": {"status": 200},
    "consumer": {"id": "c1", "username": "acme"},
    "route": {"id": "ro", "name": "route"},
    "service": {"id": "se", "name": "service"},
}
COMMON: Json = {
    "api_request_id": "r1", "http_status": 200, "route_id": "ro", "route_name": "route", "service_id": "se",
    "service_name": "service", "subject_type": "consumer",
}  # fmt: skip


def metered(entry: Json, **settings: Any) -> tuple[list[Json] | Skip, Books]:
    """The events as the server reads them, or the reason; and what was counted."""
    return metered_line(json.dumps(ENTRY | entry).encode(), **settings)


def metered_line(line: bytes, **settings: Any) -> tuple[list[Json] | Skip, Books]:
    entry = DECODER.decode(line) or DECODER.convert(whole_object(line))
    meter, books = Meter("metering", Metering(**settings), "kong", HEADERS, QUERY), Books()
    subject = meter.subject_of(entry)
    assert not isinstance(subject, Skip) and entry.request is not None
    found = meter.events_of(entry, entry.request, "base", subject, TIME, books)
    if isinstance(found, Skip):
        return found, books
    events: list[Json] = orjson.loads(msgspec.json.encode(found))
    assert [fault for event in events for version in VERSIONS for fault in event_faults(event, version)] == []
    assert len({event["id"] for event in events}) == len(events)
    return events, books


def ai_events(usage: Json, **settings: Any) -> list[tuple[str, Json]]:
    """Id and data of the events of one call, without what all of them hold."""
    events, _ = metered({"ai": {"proxy": {"usage": usage}}}, meter_api_requests=False, **settings)
    assert isinstance(events, list)
    common = COMMON | {"ai_plugin_name": "proxy"}
    for event in events:
        assert event["type"] == "kong.llm_request"
        assert {key: value for key, value in event["data"].items() if key in common} == common
    return [(e["id"], {key: value for key, value in e["data"].items() if key not in common}) for e in events]


ASKED = {"cached_tokens": 4, "audio_tokens": 0}
ANSWERED = {"reasoning_tokens": 5, "audio_tokens": 1, "accepted_prediction_tokens": 2, "rejected_prediction_tokens": 3}
USAGE = {
    "prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30, "prompt_tokens_details": ASKED,
    "completion_tokens_details": ANSWERED,
}  # fmt: skip


def test_details_are_left_out_unless_asked_for() -> None:
    assert ai_events(USAGE) == [
        ("base:input", {"tokens": 10, "type": "request"}),
        ("base:output", {"tokens": 20, "type": "response"}),
    ]


def test_details_stand_on_the_direction_they_are_of() -> None:
    """A zero is told; what is missing or unknown is left out. They add nothing to what is billed."""
    assert ai_events(USAGE, token_details=True) == [
        ("base:input", {"tokens": 10, "type": "request", **ASKED}),
        ("base:output", {"tokens": 20, "type": "response", **ANSWERED}),
    ]
    extended = USAGE | {"prompt_tokens_details": {"cached_tokens": 4.0, "audio_tokens": None, "unknown_tokens": "x"}}
    assert ai_events(extended, token_details=True)[0][1] == {"tokens": 10, "type": "request", "cached_tokens": 4}
    _, books = metered({"ai": {"proxy": {"usage": USAGE}}}, token_details=True)
    assert (books[Count.TOKENS_REQUEST], books[Count.TOKENS_RESPONSE]) == (10, 20)


def test_details_of_other_media_have_the_same_names() -> None:
    """Kong 3.11: input_tokens and output_tokens, with audio_tokens_count."""
    usage = {
        "prompt_tokens": 0, "prompt_tokens_details": {}, "completion_tokens_details": [],
        "input_tokens": 7, "input_tokens_details": {"text_tokens": 3, "image_tokens": 4, "audio_tokens_count": 2},
        "output_tokens": 8, "output_tokens_details": {"image_tokens": 8, "audio_tokens": 1, "audio_tokens_count": 2},
    }  # fmt: skip
    assert ai_events(usage, token_details=True) == [
        ("base:input", {"tokens": 7, "type": "request", "text_tokens": 3, "image_tokens": 4, "audio_tokens": 2}),
        ("base:output", {"tokens": 8, "type": "response", "image_tokens": 8, "audio_tokens": 1}),
    ]


@pytest.mark.parametrize("name", DETAIL_FIELDS)
def test_every_detail_can_be_told(name: str) -> None:
    usage: Json = {"prompt_tokens": 1, "completion_tokens": 1}
    usage |= {key: {name: 1} for key in ("prompt_tokens_details", "completion_tokens_details")}
    assert [data[name] for _, data in ai_events(usage, token_details=True)] == [1, 1]


@pytest.mark.parametrize("table", [None, {}, [], "x", 5, True, [{"cached_tokens": 1}]], ids=str)
@pytest.mark.parametrize("settings", [{"token_details": True}, {"split_cached_input": True}], ids=str)
def test_what_is_no_table_of_details_is_none(table: Any, settings: Json) -> None:
    """Lua's empty tables are written as {} or []."""
    usage = {"prompt_tokens": 10, "completion_tokens": 20, "prompt_tokens_details": table}
    assert ai_events(usage, **settings) == [
        ("base:input", {"tokens": 10, "type": "request"}),
        ("base:output", {"tokens": 20, "type": "response"}),
    ]


SPLIT: dict[str, tuple[Json, list[tuple[str, str, int]]]] = {
    "a part": ({"prompt_tokens": 10}, [("input", "request", 6), ("input_cached", "request_cached", 4)]),
    "all": ({"prompt_tokens": 4}, [("input_cached", "request_cached", 4)]),
    "none": ({"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 0}}, [("input", "request", 10)]),
    "not told": ({"prompt_tokens": 10, "prompt_tokens_details": {}}, [("input", "request", 10)]),
    "null": ({"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": None}}, [("input", "request", 10)]),
    "no tokens at all": ({"prompt_tokens": 0, "prompt_tokens_details": {"cached_tokens": 0}}, []),
    "singular": ({"prompt_token": 5}, [("input", "request", 1), ("input_cached", "request_cached", 4)]),
}


@pytest.mark.parametrize(("usage", "expected"), SPLIT.values(), ids=SPLIT)
def test_cached_input_is_an_event_of_its_own_and_the_sum_stays(
    usage: Json, expected: list[tuple[str, str, int]]
) -> None:
    usage = {"completion_tokens": 20, "prompt_tokens_details": {"cached_tokens": 4}} | usage
    found = [(i.partition(":")[2], d["type"], d["tokens"]) for i, d in ai_events(usage, split_cached_input=True)]
    assert found == [*expected, ("output", "response", 20)]
    _, books = metered({"ai": {"proxy": {"usage": usage}}}, split_cached_input=True)
    assert books[Count.TOKENS_REQUEST] == sum(tokens for _, _, tokens in expected)
    _, unsplit = metered({"ai": {"proxy": {"usage": usage}}})
    assert unsplit[Count.TOKENS_REQUEST] == books[Count.TOKENS_REQUEST]


def test_the_rest_of_an_input_all_cached_is_a_zero() -> None:
    found = ai_events(USAGE | {"prompt_tokens": 4}, split_cached_input=True, emit_zero_tokens=True)
    assert [data["tokens"] for _, data in found] == [0, 4, 20]
    found = ai_events({"prompt_tokens": 0, "completion_tokens": 0}, split_cached_input=True, emit_zero_tokens=True)
    assert [i for i, _ in found] == ["base:input", "base:output"], "nothing cached is no event"


def test_split_and_details_and_attributes_do_not_mix() -> None:
    """Attributes stand in their own places on every event; cached tokens are an event, and not a detail as well."""
    extra = {"department": "research"}
    found = ai_events(USAGE, split_cached_input=True, token_details=True, attributes=(DEPARTMENT,))
    assert found == [
        ("base:input", {"tokens": 6, "type": "request", "audio_tokens": 0, **extra}),
        ("base:input_cached", {"tokens": 4, "type": "request_cached", **extra}),
        ("base:output", {"tokens": 20, "type": "response", **ANSWERED, **extra}),
    ]


def test_the_cached_input_is_of_the_model_that_was_asked() -> None:
    meta = {"request_model": "asked", "response_model": "answered"}
    events, _ = metered(
        {"ai": {"proxy": {"usage": USAGE, "meta": meta}}}, split_cached_input=True, meter_api_requests=False
    )
    assert isinstance(events, list)
    assert [event["data"]["model"] for event in events] == ["asked", "asked", "answered"]


def test_each_of_several_calls_is_split() -> None:
    both = {"ai-request-transformer": {"usage": USAGE}, "proxy": {"usage": USAGE}}
    events, books = metered({"ai": both}, split_cached_input=True, meter_api_requests=False)
    assert isinstance(events, list)
    assert [event["id"] for event in events] == [
        "base:input", "base:input_cached", "base:output", "base:input.ai-request-transformer",
        "base:input_cached.ai-request-transformer", "base:output.ai-request-transformer",
    ]  # fmt: skip
    assert books[Count.TOKENS_REQUEST] == 20


BAD_COUNTS: list[Any] = [-1, 1.5, True, "4", "", math.nan, math.inf, -math.inf, 1e300, 2**53 + 1, 10**400, [], {}]


def refused(usage: Json, **settings: Any) -> Unbillable:
    """The fault of a bad count: it leaves nothing in the books, also of the good call before it."""
    entry = DECODER.convert(ENTRY | {"ai": {"proxy": {"usage": USAGE}, "second": {"usage": usage}}})
    meter, books = Meter("metering", Metering(**settings), "kong", HEADERS, QUERY), Books()
    assert entry.request is not None
    with pytest.raises(Unbillable) as raised:
        meter.events_of(entry, entry.request, "base", ("a", "consumer"), TIME, books)
    assert raised.value.reason is Dead.BAD_TOKEN_COUNT and len(raised.value.detail) < 120
    assert not +books
    return raised.value


@pytest.mark.parametrize("count", BAD_COUNTS, ids=lambda count: str(count)[:10])
@pytest.mark.parametrize("name", DETAIL_FIELDS)
def test_a_bad_detail_is_a_bad_count(name: str, count: Any) -> None:
    """Case 67. Where details are not asked for nobody looks at them."""
    for table in (
        "prompt_tokens_details",
        "completion_tokens_details",
        "input_tokens_details",
        "output_tokens_details",
    ):
        usage = {"prompt_tokens": 10, "completion_tokens": 20, table: {name: count}}
        refused(usage, token_details=True)
        if table in ("prompt_tokens_details", "input_tokens_details"):
            refused(usage, split_cached_input=True)
        assert len(ai_events(usage)) == 2


@pytest.mark.parametrize("asked", [3, 0, None])
def test_more_cached_than_asked_was_not_part_of_it(asked: int | None) -> None:
    """Anthropic before Kong 3.14.0.8: cache reads were left out of the input tokens. Both are billed, in full."""
    usage = USAGE | {"prompt_tokens": asked}
    found = [(data["type"], data["tokens"]) for _, data in ai_events(usage, split_cached_input=True)]
    assert found == [("request", 3)] * bool(asked) + [("request_cached", 4), ("response", 20)]


def test_a_failed_call_is_not_split_either() -> None:
    usage = USAGE | {"completion_tokens": 0}
    for asked in (4, 10):
        failed = {"response": {"status": 500}, "ai": {"proxy": {"usage": usage | {"prompt_tokens": asked}}}}
        found, books = metered(failed, split_cached_input=True, meter_api_requests=False)
        assert found is Skip.FAILED_AI_CALL and +books == {Count.FAILED_AI_CALLS: 1}
        found, books = metered(failed, split_cached_input=True, meter_failed_ai_calls=True, meter_api_requests=False)
        assert isinstance(found, list) and books[Count.TOKENS_REQUEST] == asked


# Calls of tools.

TOOL = {"id": "2", "method": "tools/call", "tool_name": "get-orders", "latency": 15, "response_body_size": 2175}
ONLY_TOOLS = {"meter_api_requests": False, "meter_ai_token_usage": False, "meter_mcp_tool_calls": True}


def tool_events(rpc: Any, **settings: Any) -> list[tuple[str, Json]]:
    found, _ = metered({"ai": {"mcp": {"mcp_session_id": "s", "rpc": rpc}}}, **ONLY_TOOLS | settings)
    if found is Skip.NO_USAGE:
        return []
    assert isinstance(found, list) and {event["type"] for event in found} == {"kong.mcp_tool_call"}
    return [(e["id"], {key: value for key, value in e["data"].items() if key not in COMMON}) for e in found]


def test_a_tool_call_is_an_event() -> None:
    events, books = metered({"ai": {"mcp": {"rpc": [TOOL | {"error": "timeout"}]}}}, **ONLY_TOOLS)
    assert events == [
        {
            "specversion": "1.0", "id": "base:mcp_tool_call.0", "source": "kong", "type": "kong.mcp_tool_call",
            "subject": "consumer:c1", "time": TIME,
            "data": {"tool_name": "get-orders", "method": "tools/call", "latency_ms": 15, "error": "timeout", **COMMON},
        }
    ]  # fmt: skip
    assert set(events[0]["data"]) == set(MCP_FIELDS)
    assert not +books


def test_tool_calls_are_counted_from_their_place_so_that_ids_stay() -> None:
    """What else stands in the list, such as tools/list, is no tool call and takes its place all the same."""
    rpc = [{"method": "initialize"}, TOOL, {"method": "tools/list"}, {}, None, TOOL | {"tool_name": "other"}, "x", 5]
    data: Json = {"method": "tools/call", "latency_ms": 15}
    assert tool_events(rpc) == [
        ("base:mcp_tool_call.1", {"tool_name": "get-orders", **data}),
        ("base:mcp_tool_call.5", {"tool_name": "other", **data}),
    ]


@pytest.mark.parametrize("rpc", [None, {}, [], "x", [[]], [{"method": "ping"}], [{"method": "tools/call/x"}]], ids=str)
def test_without_a_tool_call_there_is_none(rpc: Any) -> None:
    assert tool_events(rpc) == []


def test_tool_calls_are_metered_only_when_asked_for() -> None:
    entry: Json = {"ai": {"mcp": {"rpc": [TOOL]}, "proxy": {"usage": USAGE}}}
    for asked_for, kinds in ((False, ["api_request", "input", "output"]),
                             (True, ["api_request", "input", "output", "mcp_tool_call.0"])):  # fmt: skip
        events, _ = metered(entry, meter_mcp_tool_calls=asked_for)
        assert isinstance(events, list) and [event["id"] for event in events] == [f"base:{kind}" for kind in kinds]
    found, _ = metered({"ai": {"mcp": {"rpc": [TOOL]}}}, meter_api_requests=False)
    assert found is Skip.NO_USAGE
    found, _ = metered({}, **ONLY_TOOLS)
    assert found is Skip.NO_USAGE


def test_a_tool_call_beside_a_failed_ai_call_is_billed() -> None:
    entry = {"response": {"status": 500}, "ai": {"mcp": {"rpc": [TOOL]}, "proxy": {"usage": {"prompt_tokens": 3}}}}
    events, books = metered(entry, meter_mcp_tool_calls=True, meter_api_requests=False)
    assert isinstance(events, list) and [event["id"] for event in events] == ["base:mcp_tool_call.0"]
    assert +books == {Count.FAILED_AI_CALLS: 1}


@pytest.mark.parametrize(
    ("latency", "expected"),
    [(15, 15), (0, 0), (0.5, 0.5), (-1, ...), (True, ...), ("15", ...), (2**53, ...), (1e300, ...), (math.nan, ...),
     (math.inf, ...), (10**400, ...), ([], ...), (None, ...)],
    ids=lambda value: str(value)[:12],
)  # fmt: skip
def test_a_latency_is_a_number_a_server_takes_or_absent(latency: Any, expected: Any) -> None:
    ((_, data),) = tool_events([TOOL | {"latency": latency}])
    assert data.get("latency_ms", ...) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("timeout", "timeout"), ("", ...), (None, ...), (False, ...), (True, ...), ([], ...), (["x"], ...),
        ({}, ...), ({"code": -32601, "message": "unknown tool"}, "unknown tool"), ({"code": -32601}, "-32601"),
        ({"code": -32601, "message": None}, "-32601"), ({"code": -32601, "message": ""}, "-32601"),
        ({"message": {"a": 1}}, ...), (-32000, "-32000"), (5.0, "5"), (math.inf, "inf"),
    ],
    ids=str,
)  # fmt: skip
def test_the_error_of_a_tool_is_its_text(error: Any, expected: Any) -> None:
    ((_, data),) = tool_events([TOOL | {"error": error}])
    assert data.get("error", ...) == expected


@pytest.mark.parametrize("garbage", [b"\\ud800", b"\xff", b"\\u0000", b"\x01"], ids=repr)
@pytest.mark.parametrize("shape", [b'"G"', b'{"message":"G"}', b'{"code":1,"message":"G","data":"G"}'], ids=repr)
def test_the_error_of_a_tool_is_always_valid_text(shape: bytes, garbage: bytes) -> None:
    """Case 22: one event that can't be encoded would stop everything behind it."""
    call = b'{"method":"tools/call","tool_name":"G","error":' + shape + b"}"
    line = json.dumps(ENTRY).encode()[:-1] + b',"ai":{"mcp":{"rpc":[' + call + b"]}}}"
    events, _ = metered_line(line.replace(b"G", garbage), **ONLY_TOOLS)
    assert isinstance(events, list) and len(events) == 1 and len(events[0]["data"]["error"]) == 1


# Who is billed.


def subject_of(entry: Json, **settings: Any) -> tuple[str, str] | Skip:
    return Meter("metering", Metering(**settings), "kong", HEADERS, QUERY).subject_of(DECODER.convert(ENTRY | entry))


CHAIN = (
    Subject(look_up_value_in="header", field="X-Tenant"),
    Subject(look_up_value_in="query", field="team"),
    Subject(look_up_value_in="application"),
    Subject(field="custom_id"),
    Subject(),
)


def test_the_first_hit_of_a_chain_is_billed_and_named() -> None:
    request = ENTRY["request"]
    everything: Json = {
        "request": request | {"headers": {"x-tenant": "t1"}, "querystring": {"team": "blue"}},
        "application": {"id": "a1"}, "consumer": {"id": "c1", "custom_id": "crm-1"},
    }  # fmt: skip
    expected = [("t1", "header"), ("blue", "query"), ("application:a1", "application"), ("crm-1", "consumer"),
                ("consumer:c1", "consumer")]  # fmt: skip
    steps: list[Json] = [{}, {"request": request | {"headers": {}, "querystring": {"team": "blue"}}},
                         {"request": request | {"headers": {"x-tenant": ""}, "querystring": {"team": True}}},
                         {"application": None}, {"consumer": {"id": "c1", "custom_id": ""}},
                         {"consumer": None}]  # fmt: skip
    found = []
    for step in steps:
        everything |= step
        found.append(subject_of(everything, subject=CHAIN))
    assert found == [*expected, Skip.NO_SUBJECT]
    with pytest.raises(Unbillable) as raised:
        subject_of(everything, subject=CHAIN, on_missing_subject="dead_letter")
    assert raised.value.reason is Dead.NO_SUBJECT


def test_a_bad_subject_is_not_passed_over() -> None:
    """Who sends control characters must not be billed to somebody else."""
    request = ENTRY["request"] | {"headers": {"x-tenant": "a\x1b[2J"}}
    with pytest.raises(Unbillable) as raised:
        subject_of({"request": request}, subject=CHAIN)
    assert raised.value.reason is Dead.BAD_SUBJECT


@pytest.mark.parametrize(
    ("given", "expected"),
    [("t", "t"), (["t", "u"], "t"), (7, "7"), (7.0, "7"), (1.5, "1.5"), ([7], "7"), ("a" * 1024, "a" * 1024),
     ("é" * 512, "é" * 512), (" t", " t"), ("t\u2028", "t\u2028")],
    ids=lambda value: str(value)[:8],
)  # fmt: skip
def test_a_subject_is_the_first_value_as_text(given: Any, expected: str) -> None:
    """Case 66."""
    request = ENTRY["request"] | {"headers": {"x-tenant": given}}
    assert subject_of({"request": request}, subject=CHAIN[0]) == (expected, "header")


@pytest.mark.parametrize("given", [..., "", [], [""], True, None, {}, [[]], [None]], ids=str)
def test_no_subject_is_made_of_nothing(given: Any) -> None:
    """Case 66."""
    headers = {} if given is ... else {"x-tenant": given}
    assert subject_of({"request": ENTRY["request"] | {"headers": headers}}, subject=CHAIN[0]) is Skip.NO_SUBJECT


@pytest.mark.parametrize("given", ["a" * 1025, "é" * 513, "a" * 10_240, "a\n", "\x00", "a\x7f"], ids=lambda v: v[:4])
def test_what_no_customer_is_called_is_kept_aside(given: str) -> None:
    """Case 66."""
    request = ENTRY["request"] | {"headers": {"x-tenant": given}}
    with pytest.raises(Unbillable) as raised:
        subject_of({"request": request}, subject=CHAIN[0])
    assert raised.value.reason is Dead.BAD_SUBJECT and len(raised.value.detail) < 120


def test_the_kind_of_subject_stands_on_every_event() -> None:
    entry: Json = {"ai": {"mcp": {"rpc": [TOOL]}, "proxy": {"usage": USAGE}}}
    events, _ = metered(entry, subject=CHAIN, meter_mcp_tool_calls=True)
    assert isinstance(events, list) and len(events) == 4
    assert {event["data"]["subject_type"] for event in events} == {"query"}
    assert {event["subject"] for event in events} == {"blue"}


def test_details_come_behind_the_built_in_properties_and_before_attributes() -> None:
    """The order of `data` is fixed: LLM_FIELDS, details, attributes."""
    found, _ = metered(
        {"ai": {"proxy": {"usage": USAGE}}}, token_details=True, attributes=(DEPARTMENT,), meter_api_requests=False
    )
    assert isinstance(found, list)
    order = [*LLM_FIELDS, *DETAIL_FIELDS, "department"]
    for event in found:
        assert list(event["data"]) == [name for name in order if name in event["data"]]


@pytest.mark.parametrize(
    ("size", "count"), [(None, None), (5, 5), ("5", 5), ("", None), ("5.0", None), ("٣", None), ("9" * 18, 10**18 - 1)]
)
def test_sizes_are_numbers(size: int | str | None, count: int | None) -> None:
    assert as_bytes_count(size) == count
