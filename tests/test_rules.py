"""Which settings hold for an entry: Kong's precedence of scopes, filters, and what a filter keeps out."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metershipper import rules as rules_module
from metershipper.books import Skip
from metershipper.entry import EntryDecoder, field_names
from metershipper.meter import Meter
from metershipper.metering import Metering, Rule
from metershipper.readers import AnyEntry
from metershipper.rules import PRECEDENCE, RuleBook

Json = dict[str, Any]

DECODER = EntryDecoder({"host"}, (), ai=False)
HEADERS = field_names({"host"})
ENTRY: Json = {
    "request": {"method": "POST", "uri": "/llm/v1/chat?x=/admin"},
    "response": {"status": 200},
    "service": {"id": "s-1", "name": "billing"},
    "route": {"id": "r-1", "name": "chat"},
    "consumer": {"id": "c-1", "username": "acme", "custom_id": "crm-1"},
    "workspace": "w-1",
    "workspace_name": "default",
}


def entry(**changes: Any) -> AnyEntry:
    return DECODER.convert({name: value for name, value in (ENTRY | changes).items() if value is not ...})


def book(*rules: Json, **base: Any) -> RuleBook:
    metering = Metering(**base, rules=tuple(Rule(**rule) for rule in rules))

    def meter(name: str, found: Any) -> Meter:
        return Meter(name, found, "kong", HEADERS, {})

    named = [
        (rule, rule.over(metering), meter(f"rules[{n}]", rule.over(metering))) for n, rule in enumerate(metering.rules)
    ]
    return RuleBook(meter("metering", metering), metering, named)


def decided(rules: RuleBook, given: AnyEntry) -> str | Skip:
    """The name of the rule that meters an entry, or why none does."""
    meter = rules.meter_for(given)
    assert rules.meter_for(given) == meter, "the choice is remembered"
    return meter if isinstance(meter, Skip) else meter.name


SCOPES: list[tuple[str, ...]] = [
    ("consumer", "route", "service"),
    ("consumer", "route"),
    ("consumer", "service"),
    ("route", "service"),
    ("consumer",),
    ("route",),
    ("service",),
]  # the order of the documentation of Kong's plugins
IDS = {"consumer": "c-1", "route": "r-1", "service": "s-1"}
NAMES = {"consumer": "acme", "route": "chat", "service": "billing"}


def scoped(scope: tuple[str, ...], values: dict[str, str]) -> Json:
    return {kind: values[kind] for kind in scope}


def test_the_precedence_is_that_of_kong() -> None:
    assert list(PRECEDENCE) == SCOPES


@pytest.mark.parametrize("values", [IDS, NAMES], ids=["by id", "by name"])
@pytest.mark.parametrize("first", range(len(SCOPES)), ids=lambda n: "+".join(SCOPES[n]))
def test_the_most_specific_scope_decides(first: int, values: dict[str, str]) -> None:
    """All seven, whatever their order in the file; without rules for it an entry is metered as [metering] says."""
    rules = [scoped(scope, values) for scope in SCOPES[first:]]
    assert decided(book(*rules), entry()) == "rules[0]"
    assert decided(book(*reversed(rules)), entry()) == f"rules[{len(rules) - 1}]"
    mixed = [scoped(scope, IDS if n % 2 else NAMES) for n, scope in enumerate(SCOPES[first:])]
    assert decided(book(*mixed), entry()) == "rules[0]"


@pytest.mark.parametrize("better", SCOPES, ids="+".join)
@pytest.mark.parametrize("worse", SCOPES, ids="+".join)
def test_of_each_two_scopes_the_one_of_higher_precedence_decides(
    better: tuple[str, ...], worse: tuple[str, ...]
) -> None:
    if SCOPES.index(better) < SCOPES.index(worse):
        assert decided(book(scoped(worse, IDS), scoped(better, NAMES)), entry()) == "rules[1]"
        assert decided(book(scoped(better, IDS), scoped(worse, NAMES)), entry()) == "rules[0]"


@pytest.mark.parametrize("scope", SCOPES, ids="+".join)
@pytest.mark.parametrize("missing", ["consumer", "route", "service"])
@pytest.mark.parametrize("other", [..., None, {}, {"id": "x", "name": "x", "username": "x"}], ids=str)
def test_a_scope_matches_only_when_all_of_it_does(scope: tuple[str, ...], missing: str, other: Any) -> None:
    given = entry(**{missing: other})
    assert decided(book(scoped(scope, IDS)), given) == ("metering" if missing in scope else "rules[0]")


def test_a_name_is_that_of_its_own_kind() -> None:
    """A service called as a route is another thing; a consumer's custom id is no name of it."""
    for rule in ({"service": "chat"}, {"route": "billing"}, {"consumer": "billing"}, {"consumer": "crm-1"},
                 {"service": "Billing"}, {"service": "billin"}, {"route": "r-1 "}):  # fmt: skip
        assert decided(book(rule), entry()) == "metering"


def test_entries_of_different_scopes_do_not_share_a_choice() -> None:
    rules = book({"service": "billing"}, {"consumer": "acme", "enabled": False})
    for _ in range(2):
        assert decided(rules, entry()) is Skip.RULE_DISABLED
        assert decided(rules, entry(consumer={"id": "c-2", "username": "globex"})) == "rules[0]"
        assert decided(rules, entry(consumer=..., service={"id": "s-2"})) == "metering"


def test_more_scopes_than_are_remembered_are_chosen_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules_module, "MAX_REMEMBERED_SCOPES", 2)
    rules = book({"service": "s-3"}, {"service": "s-4"})
    for _ in range(2):
        found = [decided(rules, entry(service={"id": f"s-{n}"})) for n in range(6)]
        assert found == ["metering", "metering", "metering", "rules[0]", "rules[1]", "metering"]
    assert len(rules._remembered) == 2


FILTERS: dict[str, tuple[Json, Skip, list[Json], list[Json]]] = {
    # settings, the reason, entries that pass, entries that do not
    "methods": (
        {"methods": ("post", "Get")},
        Skip.FILTERED_METHOD,
        [{"request": {"method": "POST"}}, {"request": {"method": "get"}}],
        [{"request": {"method": "PUT"}}, {"request": {}}, {"request": {"method": ""}},
         {"request": {"method": "POSTS"}}],
    ),
    "statuses": (
        {"statuses": (429, "2xx", "300-302", "404")},
        Skip.FILTERED_STATUS,
        [{"response": {"status": status}} for status in (200, 299, 300, 302, 404, 429)],
        [{"response": {"status": status}} for status in (199, 303, 403, 428, 500, 0, -200, None)]
        + [{"response": ...}, {"response": {}}],
    ),
    "paths": (
        {"paths": ("/llm/", "~/v[12]/")},
        Skip.FILTERED_PATH,
        [{"request": {"uri": uri}} for uri in ("/llm/", "/llm/x?y=/z", "/v1/", "/v2/?/v3/")],
        [{"request": {"uri": uri}} for uri in ("/llm", "/llm?/llm/", "/x/llm/", "/v3/", "/x?/v1/", "", "?/llm/", None)]
        + [{"request": {}}],
    ),
    "a path with an end": (
        {"paths": ("~/chat$",)},
        Skip.FILTERED_PATH,
        [{"request": {"uri": "/chat"}}, {"request": {"uri": "/chat?a=b"}}, {"request": {"uri": "/chat?"}}],
        [{"request": {"uri": "/chat/?a"}}],
    ),
    "workspaces": (
        {"workspaces": ("w-1", "billing")},
        Skip.FILTERED_WORKSPACE,
        [{"workspace": "w-1", "workspace_name": "x"}, {"workspace": "w-9", "workspace_name": "billing"},
         {"workspace": ..., "workspace_name": "billing"}, {"workspace": "w-1", "workspace_name": ...}],
        [{"workspace": "w-9", "workspace_name": "x"}, {"workspace": ..., "workspace_name": ...},
         {"workspace": None, "workspace_name": ""}, {"workspace": "W-1", "workspace_name": "Billing"}],
    ),
    "off": ({"enabled": False}, Skip.RULE_DISABLED, [], [{}]),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "reason", "passing", "others"), FILTERS.values(), ids=FILTERS)
def test_a_filter_keeps_out_what_does_not_pass_with_its_reason(
    settings: Json, reason: Skip, passing: list[Json], others: list[Json]
) -> None:
    """In [metering] itself, in a rule, and, but for `enabled`, inherited by a rule that sets something else."""
    cases = [("metering", book(**settings)), ("rules[0]", book({"service": "billing"} | settings))]
    if "enabled" not in settings:
        cases.append(("rules[0]", book({"service": "billing", "emit_zero_tokens": True}, **settings)))
    for name, rules in cases:
        assert [decided(rules, entry(**changes)) for changes in passing] == [name] * len(passing)
        assert [decided(rules, entry(**changes)) for changes in others] == [reason] * len(others)
        assert all(rules.name_for(entry(**changes)) == name for changes in passing + others)


def test_an_empty_filter_of_a_rule_lifts_that_of_metering() -> None:
    base: Json = {"methods": ("GET",), "statuses": (500,), "paths": ("/x",), "workspaces": ("x",), "enabled": False}
    lifted: Json = {"methods": (), "statuses": (), "paths": (), "workspaces": (), "enabled": True}
    assert decided(book({"service": "s-1"} | lifted, **base), entry()) == "rules[0]"
    for key in lifted:
        reason = decided(book({"service": "s-1"} | lifted | {key: base[key]}, **base), entry())
        assert isinstance(reason, Skip)


def test_the_first_filter_that_refuses_tells_the_reason() -> None:
    """In the order of the configuration's keys: enabled, methods, statuses, paths, workspaces."""
    filters: list[Json] = [{"enabled": False}, {"methods": ("GET",)}, {"statuses": (500,)}, {"paths": ("/x",)},
                           {"workspaces": ("x",)}]  # fmt: skip
    reasons = [Skip.RULE_DISABLED, Skip.FILTERED_METHOD, Skip.FILTERED_STATUS, Skip.FILTERED_PATH,
               Skip.FILTERED_WORKSPACE]  # fmt: skip
    for first in range(len(filters)):
        together: Json = {key: value for each in filters[first:] for key, value in each.items()}
        assert decided(book(**together), entry()) is reasons[first]


def test_of_several_rules_with_the_best_scope_the_first_that_passes_is_taken() -> None:
    only_get, only_post, any_method = ({"service": "billing", "methods": m} for m in (("GET",), ("POST",), ()))
    assert decided(book(only_get, only_post, any_method), entry()) == "rules[1]"
    assert decided(book(any_method, only_post), entry()) == "rules[0]"
    assert decided(book(only_get, any_method, only_post), entry()) == "rules[1]"
    by_id = {"service": "s-1", "enabled": False}
    assert decided(book(by_id, only_post), entry()) == "rules[1]"
    rules = book(only_get, only_post)
    assert decided(rules, entry(request={"method": "GET"})) == "rules[0]"
    assert rules.name_for(entry()) == "rules[1]"


def test_when_none_passes_the_first_one_tells_why_and_no_wider_scope_is_asked() -> None:
    get = {"route": "chat", "methods": ("GET",)}
    failed = {"route": "chat", "statuses": ("5xx",)}
    wide: Json = {"service": "billing"}
    assert decided(book(get, failed, wide), entry()) is Skip.FILTERED_METHOD
    assert decided(book(failed, wide, get), entry()) is Skip.FILTERED_STATUS
    assert book(wide, failed, get).name_for(entry()) == "rules[1]"
    assert decided(book(wide, {"route": "chat", "enabled": False}), entry()) is Skip.RULE_DISABLED


def test_metering_off_with_one_rule_on_meters_that_scope_alone() -> None:
    """A rule is on unless it says otherwise: so an import of scoped plugins, and no global one, bills their scopes."""
    rules = book({"service": "billing"}, {"route": "chat", "enabled": False}, enabled=False)
    assert decided(rules, entry(route=...)) == "rules[0]"
    assert decided(rules, entry()) is Skip.RULE_DISABLED, "the route's rule is off and the more specific one"
    assert decided(rules, entry(service=..., route=...)) is Skip.RULE_DISABLED
    assert rules.name_for(entry(service=..., route=...)) == "metering"


VALUES = st.sampled_from([None, "a", "b"])
RULES = st.fixed_dictionaries(
    {"consumer": VALUES, "route": VALUES, "service": VALUES, "methods": st.sampled_from([(), ("GET",)])}
).filter(lambda rule: any(rule[kind] for kind in IDS))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(RULES, max_size=6), st.fixed_dictionaries({kind: VALUES for kind in IDS}), st.sampled_from(["GET", "PUT"])
)
def test_the_choice_is_that_of_a_plain_search(rules: list[Json], given: Json, method: str) -> None:
    """The same answer as walking the table of precedence, scope by scope."""
    named = {"consumer": "username", "route": "name", "service": "name"}
    of_entry = {kind: {named[kind]: value} if value else ... for kind, value in given.items()}
    expected: str | Skip = "metering"
    for scope in SCOPES:
        wanted = [
            n
            for n, rule in enumerate(rules)
            if {kind for kind in IDS if rule[kind]} == set(scope) and all(rule[kind] == given[kind] for kind in scope)
        ]
        if wanted:
            passing = [n for n in wanted if not rules[n]["methods"] or method == "GET"]
            expected = f"rules[{passing[0]}]" if passing else Skip.FILTERED_METHOD
            break
    assert decided(book(*rules), entry(**of_entry, request={"method": method})) == expected
