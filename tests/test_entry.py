"""Decoding one line: the fast path and the lenient one give the same entry; the hash recipe is pinned."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metershipper.books import Dead
from metershipper.entry import (
    AiPart,
    Cache,
    Consumer,
    EntryDecoder,
    Identified,
    Meta,
    Response,
    Service,
    Usage,
    clean_text,
    content_hash,
    field_names,
    format_number,
)
from metershipper.pieces import BOM, MAX_INTEGER_DIGITS, Unbillable, whole_object
from metershipper.readers import AnyEntry

DECODER = EntryDecoder({"host", "x-tenant"}, {"team"}, ai=True)
HEADERS, QUERY = field_names({"host", "x-tenant"}), field_names({"team"})


def read(decoder: EntryDecoder, line: bytes) -> AnyEntry:
    """The entry in a line, the fast way or else the slow one, as the mapper reads it."""
    return decoder.decode(line) or decoder.convert(whole_object(line))


def hash_of(line: bytes) -> str:
    return content_hash(whole_object(line))


def fields_of(entry: Any) -> Any:
    """An entry as plain dicts, to be compared across decoders."""
    return msgspec.to_builtins(entry)


def test_field_names_are_in_a_fixed_order_whatever_the_order_of_the_names() -> None:
    assert field_names(["x-tenant", "host", "host"]) == {"host": "value_0", "x-tenant": "value_1"}
    assert field_names([]) == {}


def test_every_field_that_billing_reads_is_decoded() -> None:
    line = json.dumps(
        {
            "request": {
                "id": "r1", "method": "GET", "uri": "/a", "size": 12,
                "headers": {"host": "h", "x-tenant": ["a", "b"], "x-other": 1}, "querystring": {"team": True, "q": 1},
            },
            "response": {"status": 200, "size": "34", "headers": {}},
            "started_at": 1782907200015,
            "client_ip": "10.0.0.1",
            "consumer": {"id": "c1", "username": "acme", "custom_id": "crm-1", "tags": []},
            "application": {"id": "a1"},
            "authenticated_entity": {"id": "e1", "consumer_id": "c1"},
            "route": {"id": "ro", "name": "route"},
            "service": {"id": "se", "name": "service", "port": 443, "protocol": "https"},
            "upstream_status": "502, 200",
            "ai": {
                "proxy": {"usage": {"prompt_tokens": 3}, "meta": {"plugin_id": "p"}, "cache": {"cache_status": "Hit"}}
            },
            "latencies": {"request": 1.5},
        }
    ).encode()  # fmt: skip
    entry = read(DECODER, line)
    request = entry.request
    assert request is not None
    assert (request.id, request.method, request.uri, request.size) == ("r1", "GET", "/a", 12)
    assert getattr(request.headers, HEADERS["host"]) == "h"
    assert getattr(request.headers, HEADERS["x-tenant"]) == ["a", "b"]
    assert getattr(request.querystring, QUERY["team"]) is True
    assert entry.response == Response(200, "34")
    assert (entry.started_at, entry.client_ip, entry.upstream_status) == (1782907200015, "10.0.0.1", "502, 200")
    assert entry.consumer == Consumer("c1", "acme", "crm-1")
    assert (entry.application, entry.authenticated_entity) == (Identified("a1"), Identified("e1"))
    assert entry.service == Service("se", "service", 443, "https")
    part = AiPart(usage=Usage(prompt_tokens=3), meta=Meta(plugin_id="p"), cache=Cache("Hit"))
    assert entry.ai == {"proxy": part}


@pytest.mark.parametrize(
    "ai", ["{}", "[]", "null", '"text"', '{"proxy":null}', '{"proxy":{"usage":[]}}', '{"proxy":{"usage":{"x":{}}}}']
)
def test_ai_is_not_even_looked_at_when_it_is_not_metered(ai: str) -> None:
    decoder = EntryDecoder((), (), ai=False)
    line = f'{{"request":{{"id":"r"}},"ai":{ai}}}'.encode()
    entry = read(decoder, line)
    assert entry.request is not None and entry.request.id == "r"
    assert not isinstance(entry.ai, dict)
    assert fields_of(read(decoder, BOM + line)) == fields_of(entry)


ODD_SECTIONS = {
    "empty Lua tables are lists": ('"headers":[],"querystring":[]', {"headers": None, "querystring": None}),
    "a number as id": ('"id":12', {"id": "12"}),
    "an integral float as id": ('"id":12.0', {"id": "12"}),
    "a float as id": ('"id":1.5', {"id": "1.5"}),
    "a boolean as id": ('"id":true', {"id": None}),
    "an object as id": ('"id":{}', {"id": None}),
    "null as id": ('"id":null', {"id": None}),
    "a lone surrogate in the id": ('"id":"a\\ud800b"', {"id": "a\ufffdb"}),
    "a pair of surrogates in the id": ('"id":"\\ud83d\\ude00"', {"id": "\U0001f600"}),
    "an escaped slash": ('"id":"a\\/b"', {"id": "a/b"}),
    "size as text": ('"size":"12"', {"size": "12"}),
    "size as odd text": ('"size":"1_000"', {"size": "1_000"}),
    "size as a fraction": ('"size":12.5', {"size": 12}),
    "size NaN": ('"size":NaN', {"size": None}),
    "size infinite": ('"size":1e400', {"size": None}),
    "size a boolean": ('"size":true', {"size": None}),
    "size a list": ('"size":[1]', {"size": None}),
    "method a list": ('"method":["GET"]', {"method": None}),
    "a key twice: the last one counts": ('"id":"a","id":"b"', {"id": "b"}),
    "a key with an escape in it": ('"\\u0069d":"a"', {"id": "a"}),
    "a raw control character": ('"id":"a\tb"', {"id": "a\tb"}),
    "header value with lone surrogates": (
        '"headers":{"host":"\\udc00","x-tenant":["\\ud800",1,{"a":"\\ud800"}]}',
        {"host": "\ufffd", "x-tenant": ["\ufffd", 1, {"a": "\ud800"}]},
    ),
}


@pytest.mark.parametrize(("text", "expected"), ODD_SECTIONS.values(), ids=ODD_SECTIONS)
def test_odd_values_are_read_as_they_were_meant(text: str, expected: dict[str, Any]) -> None:
    """Case 25 and the ways of lua-cjson: a value without meaning is absent, its neighbours are kept."""
    line = f'{{"request":{{"uri":"/kept",{text}}},"started_at":5}}'.encode()
    for form in (line, BOM + line, b"  " + line + b"\r"):
        entry = read(DECODER, form)
        request: Any = entry.request
        assert (request.uri, entry.started_at) == ("/kept", 5)
        for name, value in expected.items():
            found = getattr(request.headers, HEADERS[name]) if name in HEADERS else getattr(request, name)
            assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("status", '"404"', 404), ("status", "404.0", 404), ("status", '"no"', None), ("status", '"1e3"', None),
        ("status", "true", None), ("status", '"' + "9" * 5000 + '"', None), ("status", "-1", -1),
    ],
    ids=str,
)  # fmt: skip
def test_a_status_is_a_whole_number_or_absent(field: str, value: str, expected: int | None) -> None:
    entry = read(DECODER, f'{{"request":{{}},"response":{{"{field}":{value}}}}}'.encode())
    assert entry.response is not None and getattr(entry.response, field) == expected


@pytest.mark.parametrize("garbage", [b"\xff", b"\xc3", b"\xc0\x80", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"], ids=repr)
def test_invalid_utf8_becomes_replacement_characters(garbage: bytes) -> None:
    """Case 22: the client's bytes are copied raw by lua-cjson; the entry is still an entry."""
    entry = read(DECODER, b'{"request":{"id":"r","headers":{"host":"' + garbage + b'"}},"consumer":{"id":"c"}}')
    host = getattr(entry.request.headers, HEADERS["host"])  # type: ignore[union-attr]
    assert set(host) == {"\ufffd"} and entry.consumer == Consumer("c")


NOT_ENTRIES = {
    "cut": (b'{"request":{"id":', Dead.NOT_JSON, "not valid JSON at character 17"),
    "empty": (b"", Dead.NOT_JSON, "not valid JSON at character 0"),
    "a BOM alone": (BOM, Dead.NOT_JSON, "not valid JSON at character 0"),
    "nested too deep": (b"[" * 100_000, Dead.NOT_JSON, "nested too deep"),
    "array": (b"[]", Dead.NOT_AN_ENTRY, "a JSON array, not an object"),
    "string": (b'"request"', Dead.NOT_AN_ENTRY, "a JSON string, not an object"),
    "integer": (b"12", Dead.NOT_AN_ENTRY, "a JSON number, not an object"),
    "float": (b"1e400", Dead.NOT_AN_ENTRY, "a JSON number, not an object"),
    "boolean": (b"true", Dead.NOT_AN_ENTRY, "a JSON boolean, not an object"),
    "null": (b"null", Dead.NOT_AN_ENTRY, "a JSON null, not an object"),
    "an object of another program": (b'{"level":"info"}', Dead.NOT_AN_ENTRY, "without `request`"),
    "request is null": (b'{"request":null}', Dead.NOT_AN_ENTRY, "without `request`"),
    "request is text": (b'{"request":"GET / HTTP/1.1"}', Dead.NOT_AN_ENTRY, "without `request`"),
}


@pytest.mark.parametrize(("line", "reason", "detail"), NOT_ENTRIES.values(), ids=NOT_ENTRIES)
def test_what_is_no_entry_says_why(line: bytes, reason: Dead, detail: str) -> None:
    """Case 25. Glued objects are not here any more: each is an entry of its own, see test_pieces."""
    with pytest.raises(Unbillable) as raised:
        read(DECODER, line)
    assert raised.value.reason is reason
    assert detail in raised.value.detail == str(raised.value)


def test_the_reason_never_repeats_the_line() -> None:
    """Cases 71 and 74: it goes to logs, and the line may hold secrets."""
    for line in (b'{"apikey":"s3cret"', b'"s3cret"', b'{"s3cret":1}', b"s3cret", b'{"a":\x1b[31ms3cret}'):
        with pytest.raises(Unbillable) as raised:
            read(DECODER, line)
        assert "s3cret" not in raised.value.detail and raised.value.detail.isprintable()


@pytest.mark.parametrize("depth", [300, 600, 900], ids=str)
@pytest.mark.parametrize("where", ["started_at", "host"])
def test_deep_nesting_where_a_value_is_read_never_escapes(where: str, depth: int) -> None:
    """Case 25: also in a line that needs the lenient path, which walks what it reads."""
    nested = "[" * depth + "]" * depth
    text = (
        f'"request":{{}},"started_at":{nested}'
        if where == "started_at"
        else f'"request":{{"headers":{{"host":{nested}}}}}'
    )
    for line in (f"{{{text}}}".encode(), BOM + f"{{{text}}}".encode()):
        try:
            entry = read(DECODER, line)
        except Unbillable as error:
            assert error.detail == "nested too deep"
        else:
            assert entry.request is not None


@pytest.mark.parametrize("digits", [MAX_INTEGER_DIGITS, MAX_INTEGER_DIGITS + 1, 5000, 100_000])
def test_an_integer_of_any_length_is_a_number(digits: int) -> None:
    """Case 25: Python refuses to parse more than 4,300 digits; we must not stop on such a line."""
    value = whole_object(b'{"a":' + b"9" * digits + b"}")["a"]
    assert value == (10**digits - 1 if digits <= MAX_INTEGER_DIGITS else float("inf"))


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_cleaned_text_can_be_encoded_and_valid_text_is_left_alone(text: str) -> None:
    cleaned = clean_text(text)
    cleaned.encode("utf-8")
    assert clean_text(cleaned) == cleaned
    if not any("\ud800" <= character <= "\udfff" for character in text):
        assert cleaned == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (-3, "-3"), (12.0, "12"), (-0.0, "0"), (1.5, "1.5"), (1e22, "1" + "0" * 22), (float("inf"), "inf")],
)
def test_numbers_are_written_as_the_client_would_have(value: int | float, text: str) -> None:
    assert format_number(value) == text


HASHED = (
    b'{"request":{"method":"GET","uri":"/a/b","headers":{"host":"caf\xc3\xa9"},"size":12},"started_at":1782907200015}'
)
HASH = "6df1890ee3de1e5723a4145502b344b2"
SAME = {
    "as it is": HASHED,
    "keys in another order": (
        b'{"started_at":1782907200015,"request":{"size":12,"headers":{"host":"caf\xc3\xa9"},"uri":"/a/b","method":"GET"}}'
    ),
    "slashes escaped": HASHED.replace(b"/", b"\\/"),
    "integral numbers as floats": HASHED.replace(b":12}", b":12.0}").replace(b"1782907200015", b"1.782907200015e12"),
    "beyond ASCII escaped": HASHED.replace("é".encode(), b"\\u00e9"),
    "white space": HASHED.replace(b":", b" : ").replace(b",", b",\t") + b"\r",
    "a BOM": BOM + HASHED,
}


@pytest.mark.parametrize("line", SAME.values(), ids=SAME)
def test_the_hash_recipe_is_pinned(line: bytes) -> None:
    """Recipe 1. A change of it bills every entry without a request id again: never change it, add another (case 36)."""
    assert hash_of(line) == HASH


@pytest.mark.parametrize(
    "other",
    [
        HASHED.replace(b"015}", b"016}"), HASHED.replace(b"GET", b"PUT"), HASHED.replace(b":12}", b":12.5}"),
        HASHED.replace(b":12}", b':"12"}'), HASHED.replace(b"size", b"Size"), HASHED.replace(b"/a/b", b"/a/B"),
        HASHED.replace(b":12}", b":null}"), HASHED[:-1] + b',"latencies":{}}', HASHED.replace(b"/a/b", b"/a/b\xff"),
    ],
)  # fmt: skip
def test_entries_that_differ_anywhere_hash_differently(other: bytes) -> None:
    """Case 68: else a day of traffic would bill as one request."""
    assert hash_of(other) != HASH


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=15,
)


@given(st.dictionaries(st.text(), JSON_VALUES, max_size=5), st.randoms(use_true_random=False))
def test_the_hash_survives_any_re_encoding(entry: dict[str, Any], random: Any) -> None:
    def reordered(value: Any) -> Any:
        if isinstance(value, dict):
            keys = list(value)
            random.shuffle(keys)
            return {key: reordered(value[key]) for key in keys}
        if isinstance(value, list):
            return [reordered(item) for item in value]
        if type(value) is int and abs(value) < 2**53 and random.random() < 0.5:
            return float(value)
        return value

    line = json.dumps(entry, ensure_ascii=False).encode()
    again = json.dumps(reordered(entry), indent=1).replace("/", "\\/").replace("\n", " ").encode()
    assert hash_of(line) == hash_of(again) == hash_of(BOM + line + b"\r")


def test_an_entry_nested_too_deep_to_be_hashed_says_so() -> None:
    for depth in (700, 100_000):
        with pytest.raises(Unbillable, match="nested too deep"):
            hash_of(b'{"a":' + b"[" * depth + b"]" * depth + b"}")


def test_nuls_before_an_entry_do_not_cost_it() -> None:
    """A crash can leave a run of NULs at the head of a line (case 23)."""
    line = b'{"request":{"id":"r1"},"started_at":1782907200015}'
    assert fields_of(read(DECODER, b"\0" * 1000 + line)) == fields_of(read(DECODER, line))


@pytest.mark.parametrize("session", [b"false", b"1", b"[]", b"null"])
def test_only_an_object_makes_a_stream_session(session: bytes) -> None:
    with pytest.raises(Unbillable) as refused:
        read(DECODER, b'{"session":' + session + b"}")
    assert refused.value.reason is Dead.NOT_AN_ENTRY
