"""Rules compiled from the configuration: who is billed, and by which attributes."""

import json
from typing import Any

import pytest

from metershipper.books import Dead
from metershipper.entry import EntryDecoder, field_names
from metershipper.metering import Attribute, Subject
from metershipper.pieces import Unbillable, whole_object
from metershipper.readers import (
    MAX_SUBJECT_BYTES,
    AnyEntry,
    attributes_reader,
    first_value,
    personal_reader,
    subject_reader,
    value_reader,
)

HEADERS, QUERY = field_names(["x-tenant", "user-agent"]), field_names(["Team"])
DECODER = EntryDecoder(HEADERS, QUERY, ai=False)
MISSING: Any = object()


def entry(*, headers: Any = MISSING, query: Any = MISSING, **sections: Any) -> AnyEntry:
    request = {"headers": headers, "querystring": query, "uri": "/a?b=c"}
    kept = {name: value for name, value in request.items() if value is not MISSING}
    line = json.dumps({"request": kept, **sections}).encode()
    return DECODER.decode(line) or DECODER.convert(whole_object(line))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("acme", "acme"),
        ("", None),
        (" ", " "),
        (None, None),
        (True, None),  # `?beta`: a query parameter without a value
        (False, None),
        (0, "0"),
        (12, "12"),
        (12.0, "12"),
        (1.5, "1.5"),
        (["first", "second"], "first"),
        ([True, "second"], None),
        (["", "second"], None),
        ([12, "second"], "12"),
        ([], None),
        ([["nested"]], None),
        ({"a": "b"}, None),
    ],
    ids=str,
)
def test_the_first_value_counts_as_text(value: Any, text: str | None) -> None:
    """Case 66: repeated headers are arrays, numbers become strings, nothing is made of an empty one."""
    assert first_value(value) == text


CONSUMER = {"id": "c-1", "username": "acme", "custom_id": "crm-1"}
SUBJECTS: dict[str, tuple[Subject, dict[str, Any], str | None]] = {
    "Kong's own form": (Subject(), {"consumer": CONSUMER}, "consumer:c-1"),
    "no consumer": (Subject(), {}, None),
    "a consumer without id": (Subject(), {"consumer": {"username": "acme"}}, None),
    "a consumer with an empty id": (Subject(), {"consumer": {"id": ""}}, None),
    "username": (Subject(field="username"), {"consumer": CONSUMER}, "acme"),
    "custom_id": (Subject(field="custom_id"), {"consumer": CONSUMER}, "crm-1"),
    "bare id": (Subject(field="id"), {"consumer": CONSUMER}, "c-1"),
    "username missing": (Subject(field="username"), {"consumer": {"id": "c-1"}}, None),
    "username empty": (Subject(field="username"), {"consumer": {"username": ""}}, None),
    "username a number": (Subject(field="username"), {"consumer": {"username": 12.0}}, "12"),
    "username without consumer": (Subject(field="username"), {}, None),
    "application": (Subject(look_up_value_in="application"), {"application": {"id": "a-1"}}, "application:a-1"),
    "application before consumer": (
        Subject(look_up_value_in="application"),
        {"application": {"id": "a-1"}, "authenticated_entity": {"id": "e-1"}, "consumer": CONSUMER},
        "application:a-1",
    ),
    "application by its credential": (
        Subject(look_up_value_in="application"),
        {"authenticated_entity": {"id": "e-1"}},
        "application:e-1",
    ),
    "an empty application by its credential": (
        Subject(look_up_value_in="application"),
        {"application": {"id": ""}, "authenticated_entity": {"id": "e-1"}},
        "application:e-1",
    ),
    "a consumer's credential is no application": (
        Subject(look_up_value_in="application"),
        {"authenticated_entity": {"id": "e-1"}, "consumer": CONSUMER},
        None,
    ),
    "no application at all": (Subject(look_up_value_in="application"), {"authenticated_entity": {}}, None),
    "header": (Subject(look_up_value_in="header", field="X-Tenant"), {"headers": {"x-tenant": "t-1"}}, "t-1"),
    "header sent twice": (
        Subject(look_up_value_in="header", field="x-tenant"),
        {"headers": {"x-tenant": ["t-1", "t-2"]}},
        "t-1",
    ),
    "header missing": (Subject(look_up_value_in="header", field="x-tenant"), {"headers": {}}, None),
    "headers missing": (Subject(look_up_value_in="header", field="x-tenant"), {}, None),
    "query": (Subject(look_up_value_in="query", field="Team"), {"query": {"Team": "q-1", "team": "no"}}, "q-1"),
    "query keeps its case": (Subject(look_up_value_in="query", field="Team"), {"query": {"team": "no"}}, None),
    "query without value": (Subject(look_up_value_in="query", field="Team"), {"query": {"Team": True}}, None),
    "query an empty Lua table": (Subject(look_up_value_in="query", field="Team"), {"query": []}, None),
}


@pytest.mark.parametrize(("rule", "sections", "expected"), SUBJECTS.values(), ids=SUBJECTS)
def test_the_subject_is_found_where_the_rule_looks(
    rule: Subject, sections: dict[str, Any], expected: str | None
) -> None:
    """Case 66."""
    found = subject_reader((rule,), HEADERS, QUERY)(entry(**sections))
    assert found == (None if expected is None else (expected, rule.look_up_value_in))


@pytest.mark.parametrize(
    ("username", "accepted"),
    [
        ("a" * MAX_SUBJECT_BYTES, True),
        ("a" * (MAX_SUBJECT_BYTES + 1), False),
        ("\U0001f600" * (MAX_SUBJECT_BYTES // 4), True),
        ("\U0001f600" * (MAX_SUBJECT_BYTES // 4 + 1), False),
        ("a" * 10_240, False),
        ("zero\u200bwidth", True),
        ("caf\u00e9 noir", True),
        ("\ud800", True),  # billed under U+FFFD
        ("line\nbreak", False),
        ("\x00", False),
        ("tab\t", False),
        ("\x1b[31m", False),
        ("del\x7f", False),
        ("c1\x85", False),
        ("csi\x9b31m", False),
        ("turned\u202eb", False),
    ],
    ids=lambda value: ascii(value)[:16],
)
def test_a_subject_is_at_most_a_kilobyte_without_control_characters(username: str, accepted: bool) -> None:
    """Case 66: nobody is called that; it is kept aside with its reason, not billed to a wrong name."""
    read = subject_reader((Subject(field="username"),), HEADERS, QUERY)
    logged = entry(consumer={"username": username})
    if accepted:
        assert read(logged) == (username.replace("\ud800", "\ufffd"), "consumer")
        return
    with pytest.raises(Unbillable) as raised:
        read(logged)
    assert raised.value.reason is Dead.BAD_SUBJECT
    assert raised.value.detail in ("the subject is longer than 1024 bytes", "the subject holds control characters")


def test_a_value_reader_reads_one_header_or_parameter() -> None:
    read = value_reader("headers", HEADERS["x-tenant"])
    assert read(entry(headers={"x-tenant": "t"})) == "t"
    assert read(entry(headers={"other": "t"})) is None
    assert read(entry()) is None


def test_attributes_come_in_the_order_of_the_configuration() -> None:
    attributes = (
        Attribute(source="query", look_up_value_in="Team", event_property_name="team"),
        Attribute(source="header", look_up_value_in="X-Tenant", event_property_name="tenant"),
    )
    read = attributes_reader(attributes, HEADERS, QUERY)
    assert read(entry(headers={"x-tenant": ["t", "u"]}, query={"Team": 7})) == ("7", "t")
    assert read(entry(headers={"x-tenant": ""})) == (None, None)
    assert attributes_reader((), HEADERS, QUERY)(entry(headers={"x-tenant": "t"})) == ()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (frozenset[str](), (None, None, None)),
        (frozenset({"client_ip"}), ("10.0.0.1", None, None)),
        (frozenset({"request_uri"}), (None, "/a?b=c", None)),
        (frozenset({"request_user_agent"}), (None, None, "curl/8")),
        (frozenset({"client_ip", "request_uri", "request_user_agent"}), ("10.0.0.1", "/a?b=c", "curl/8")),
    ],
    ids=lambda value: ",".join(sorted(value)) if isinstance(value, frozenset) else "",
)
def test_only_the_listed_personal_fields_are_read(wanted: frozenset[str], expected: tuple[str | None, ...]) -> None:
    """Case 71: events carry mapped fields only."""
    logged = entry(headers={"user-agent": "curl/8"}, client_ip="10.0.0.1")
    assert personal_reader(wanted, HEADERS)(logged) == expected


@pytest.mark.parametrize("value", ["NaN", "1e999", "-1e999"])
def test_what_is_no_number_is_nobody(value: str) -> None:
    """Case 25: NaN and infinity never reach the server, and are no customer's name."""
    line = b'{"request":{"headers":{"x-tenant":' + value.encode() + b"}}}"
    logged = DECODER.decode(line) or DECODER.convert(whole_object(line))
    assert subject_reader((Subject(look_up_value_in="header", field="x-tenant"),), HEADERS, QUERY)(logged) is None
