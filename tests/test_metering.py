"""The `[metering]` section: what may be set, what a rule inherits, and what is refused with words that help."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from metershipper.metering import (
    API_FIELDS,
    BUILT_IN,
    DETAIL_FIELDS,
    LLM_FIELDS,
    MCP_FIELDS,
    Attribute,
    Metering,
    MeteringSettings,
    Rule,
    Subject,
    path_pattern,
    status_range,
)

Json = dict[str, Any]

DEPARTMENT = Attribute(source="header", look_up_value_in="x-department", event_property_name="department")
# For each key that a rule may set: a value that differs from the default, and another one.
SETTABLE: dict[str, tuple[Any, Any]] = {
    "enabled": (False, True),
    "meter_api_requests": (False, True),
    "meter_ai_token_usage": (False, True),
    "meter_mcp_tool_calls": (True, False),
    "on_missing_subject": ("dead_letter", "skip"),
    "emit_zero_tokens": (True, False),
    "meter_failed_ai_calls": (True, False),
    "token_details": (True, False),
    "split_cached_input": (True, False),
    "personal_fields": (frozenset({"client_ip"}), frozenset()),
    "subject": (Subject(field="username"), (Subject(field="id"), Subject())),
    "attributes": ((DEPARTMENT,), ()),
    "methods": (("GET",), ()),
    "statuses": ((429, "2xx"), ()),
    "paths": (("/llm",), ()),
    "workspaces": (("default",), ()),
}


def test_every_setting_is_inherited_or_overridden_in_the_tests_below() -> None:
    assert set(SETTABLE) == set(MeteringSettings.model_fields)
    assert set(Rule.model_fields) - set(MeteringSettings.model_fields) == {"service", "route", "consumer"}
    assert set(Metering.model_fields) - set(MeteringSettings.model_fields) == {"source", "rules"}


@pytest.mark.parametrize("key", SETTABLE)
def test_what_a_rule_does_not_set_is_as_in_metering(key: str) -> None:
    base = Metering.model_validate({name: value for name, (value, _) in SETTABLE.items() if name == key})
    wanted = SETTABLE[key][0] if key != "enabled" else True  # a rule is on unless it says otherwise
    assert getattr(Rule(service="a").over(base), key) == wanted


@pytest.mark.parametrize("key", SETTABLE)
def test_what_a_rule_sets_holds_also_where_it_is_the_default(key: str) -> None:
    base = Metering.model_validate({key: SETTABLE[key][0]})
    settings = Rule.model_validate({"service": "a", key: SETTABLE[key][1]}).over(base)
    assert getattr(settings, key) == SETTABLE[key][1]
    others = [name for name in SETTABLE if name not in (key, "enabled")]
    assert [getattr(settings, name) for name in others] == [getattr(base, name) for name in others]


def test_an_explicit_default_of_a_rule_is_not_taken_for_unset() -> None:
    base = Metering(methods=("GET",), meter_api_requests=False)
    settings = Rule(service="a", methods=(), meter_api_requests=True).over(base)
    assert settings.methods == () and settings.meter_api_requests


def test_a_subject_is_one_or_a_chain_of_them() -> None:
    one = Subject(field="username")
    assert Metering().subjects == (Subject(),)
    assert Metering(subject=one).subjects == (one,)
    assert Metering(subject=(one, Subject())).subjects == (one, Subject())
    from_toml: Json = {"subject": [{"look_up_value_in": "header", "field": "x-a"}, {"field": "id"}]}
    assert [subject.field for subject in Metering.model_validate(from_toml).subjects] == ["x-a", "id"]


RANGES: dict[int | str, tuple[int, int]] = {
    429: (429, 429), "429": (429, 429), "1xx": (100, 199), "2xx": (200, 299), "5xx": (500, 599),
    "200-399": (200, 399), "404-404": (404, 404), "100-599": (100, 599),
}  # fmt: skip


@pytest.mark.parametrize(("status", "expected"), RANGES.items(), ids=[str(status) for status in RANGES])
def test_a_status_filter_is_a_status_a_class_or_a_range(status: int | str, expected: tuple[int, int]) -> None:
    assert status_range(status) == expected
    assert Metering(statuses=(status,)).statuses == (status,)


@pytest.mark.parametrize(
    "status",
    [0, 99, 600, -200, 2000, "", "2XX", "6xx", "0xx", "2x", "xx", "x", "399-200", "200-", "-200", "200-300-400",
     "200 - 300", " 200", "200\n", "2xx-4xx", "20", "OK", "!404", True],
    ids=repr,
)  # fmt: skip
def test_what_is_no_status_is_refused_with_what_to_write(status: Any) -> None:
    with pytest.raises(ValueError, match='is no status; write 429, "2xx" or "200-399"'):
        status_range(status)
    with pytest.raises(ValidationError, match="is no status"):
        Metering(statuses=(200, status))


PATHS: dict[str, tuple[str, list[str], list[str]]] = {
    "everything": ("/", ["/", "/a", "//"], ["", "a", "*"]),
    "a prefix": ("/llm", ["/llm", "/llm/v1", "/llmx"], ["/ll", "/LLM", "/x/llm", ""]),
    "a prefix with a slash": ("/llm/", ["/llm/", "/llm/v1"], ["/llm"]),
    "a prefix is no expression": ("/a.b+(c", ["/a.b+(c", "/a.b+(c/d"], ["/axb+(c", "/a.bb(c"]),
    "an expression": ("~/v[12]/chat", ["/v1/chat", "/v2/chat/completions"], ["/v3/chat", "/x/v1/chat"]),
    "an expression with an end": ("~/v1/chat$", ["/v1/chat"], ["/v1/chat/", "/v1/chats"]),
    "an expression for anywhere": ("~.*chat", ["/v1/chat", "chat"], ["/v1"]),
    "alternatives": ("~/a$|/b$", ["/a", "/b"], ["/ab", "/c"]),
}


@pytest.mark.parametrize(("path", "passing", "others"), PATHS.values(), ids=PATHS)
def test_a_path_filter_is_a_prefix_or_an_expression(path: str, passing: list[str], others: list[str]) -> None:
    pattern = path_pattern(path)
    assert [given for given in passing + others if pattern.match(given)] == passing


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("", "'' is no path; a prefix begins with /, a regular expression with ~"),
        ("llm", "'llm' is no path"),
        ("*", "'*' is no path"),
        ("http://h/a", "is no path"),
        ("~(", "'~(' is no regular expression: missing ), unterminated subpattern"),
        ("~*", "is no regular expression: nothing to repeat"),
    ],
)
def test_what_is_no_path_is_refused(path: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        path_pattern(path)
    with pytest.raises(ValidationError, match=re.escape(problem)):
        Metering(paths=("/ok", path))


NOTHING: dict[str, Json] = {
    "all off": {"meter_api_requests": False, "meter_ai_token_usage": False},
    "a rule that puts off the rest": {
        "meter_api_requests": False, "rules": [{"service": "a", "meter_ai_token_usage": False}],
    },
    "the second rule": {
        "rules": [{"service": "a"}, {"route": "b", "meter_ai_token_usage": False, "meter_api_requests": False}],
    },
    "a rule that only enables": {
        "enabled": False, "meter_api_requests": False, "meter_ai_token_usage": False,
        "rules": [{"service": "a", "enabled": True}],
    },
}  # fmt: skip


@pytest.mark.parametrize("metering", NOTHING.values(), ids=NOTHING)
def test_settings_that_are_on_and_meter_nothing_are_refused(metering: Json) -> None:
    with pytest.raises(ValidationError, match="nothing would be metered"):
        Metering.model_validate(metering)


SOMETHING: dict[str, Json] = {
    "tool calls alone": {"meter_api_requests": False, "meter_ai_token_usage": False, "meter_mcp_tool_calls": True},
    "off on purpose": {"enabled": False, "meter_api_requests": False, "meter_ai_token_usage": False},
    "off but for one rule": {"enabled": False, "rules": [{"service": "a", "enabled": True}]},
    "a rule off": {"rules": [{"service": "a", "enabled": False, "meter_api_requests": False}]},
    "a rule with all of its own": {
        "meter_api_requests": False, "meter_ai_token_usage": True,
        "rules": [{"service": "a", "meter_api_requests": True, "meter_ai_token_usage": False}],
    },
}  # fmt: skip


@pytest.mark.parametrize("metering", SOMETHING.values(), ids=SOMETHING)
def test_settings_that_meter_something_or_are_off_are_taken(metering: Json) -> None:
    assert Metering.model_validate(metering)


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ({}, "no scope: set service, route or consumer; what holds for all belongs into"),
        ({"methods": ["GET"]}, "no scope"),
        ({"service": ""}, "at least 1 character"),
        ({"service": 5}, "valid string"),
        ({"service": "a", "source": "b"}, "Extra inputs are not permitted"),
        ({"service": "a", "rules": []}, "Extra inputs are not permitted"),
        ({"service": "a", "attributes": [DEPARTMENT, DEPARTMENT]}, "two attributes are named 'department'"),
        ({"service": "a", "subject": []}, "at least 1 item"),
    ],
    ids=str,
)
def test_a_rule_that_can_not_be_meant_is_refused(rule: Json, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Rule.model_validate(rule)


@pytest.mark.parametrize("where", ["header", "query"])
@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "a\x00"], ids=repr)
def test_a_name_that_no_header_or_parameter_has_is_refused(where: Any, name: str) -> None:
    with pytest.raises(ValidationError, match="can't be the name of a header or a query parameter"):
        Subject(look_up_value_in=where, field=name)
    with pytest.raises(ValidationError, match="can't be the name of a header or a query parameter"):
        Attribute(source=where, look_up_value_in=name, event_property_name="a")


def test_the_properties_of_the_events_are_a_closed_list() -> None:
    """Meters are made for these names: a change breaks them, and an attribute may take none of them."""
    assert set(API_FIELDS) | set(LLM_FIELDS) | set(DETAIL_FIELDS) | set(MCP_FIELDS) == BUILT_IN
    for fields in (API_FIELDS, LLM_FIELDS + DETAIL_FIELDS, MCP_FIELDS):
        assert len(set(fields)) == len(fields)
    for name in BUILT_IN:
        with pytest.raises(ValidationError, match="built-in property"):
            Attribute(source="query", look_up_value_in="a", event_property_name=name)
