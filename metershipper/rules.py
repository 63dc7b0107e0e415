"""Which settings hold for an entry: scoped rules in Kong's precedence, and their filters. Pure."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from metershipper.books import Skip
from metershipper.meter import Meter
from metershipper.metering import MeteringSettings, Rule, path_pattern, status_range
from metershipper.readers import AnyEntry

# Kong's precedence of plugin scopes, the most specific first (consumer groups left out: no log names them).
PRECEDENCE = (
    ("consumer", "route", "service"),
    ("consumer", "route"),
    ("consumer", "service"),
    ("route", "service"),
    ("consumer",),
    ("route",),
    ("service",),
)
# Entries of one gateway name few different scopes; past this many the choice is made anew.
MAX_REMEMBERED_SCOPES = 10_000

Names = tuple[str | None, ...]


@dataclass(slots=True)
class RuleBook:
    """The rules of one configuration, and the meter that each stands for; `base` is `[metering]` itself."""

    base: Meter
    base_settings: MeteringSettings
    rules: list[tuple[Rule, MeteringSettings, Meter]]
    _base: "_Choice" = field(init=False)
    _ranked: list[tuple[int, Rule, "_Choice"]] = field(init=False)
    _remembered: dict[Names, list["_Choice"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Compile every filter once, whatever scopes the entries will name."""
        self._base = _Choice(self.base, _filter(self.base_settings))
        self._ranked = [(_rank(rule), rule, _Choice(meter, _filter(settings))) for rule, settings, meter in self.rules]

    def meter_for(self, entry: AnyEntry) -> Meter | Skip:
        """The meter for an entry, or why it is not metered.

        The most specific scope decides. Of several rules with that scope the first one whose filters pass is taken;
        when none passes, the entry is not metered: a filter keeps out, it does not hand over to a wider scope.
        """
        choices = self._remembered_or_chosen(_names(entry))
        fault: Skip | None = None
        for choice in choices:
            refused = choice.refuses(entry)
            if refused is None:
                return choice.meter
            fault = fault or refused
        assert fault is not None
        return fault

    def name_for(self, entry: AnyEntry) -> str:
        """What the configuration calls the rule that decides about an entry, also when it keeps it out."""
        meter = self.meter_for(entry)
        return meter.name if isinstance(meter, Meter) else self._remembered_or_chosen(_names(entry))[0].meter.name

    def _remembered_or_chosen(self, names: Names) -> list["_Choice"]:
        choices = self._remembered.get(names)
        if choices is None:
            choices = self._choose(names)
            if len(self._remembered) < MAX_REMEMBERED_SCOPES:
                self._remembered[names] = choices
        return choices

    def _choose(self, names: Names) -> list["_Choice"]:
        matching = [(rank, choice) for rank, rule, choice in self._ranked if _matches(rule, names)]
        if not matching:
            return [self._base]
        best = min(rank for rank, _ in matching)
        return [choice for rank, choice in matching if rank == best]


@dataclass(slots=True, frozen=True)
class _Choice:
    meter: Meter
    refuses: Callable[[AnyEntry], Skip | None]


def _names(entry: AnyEntry) -> Names:
    service, route, consumer = entry.service, entry.route, entry.consumer
    return (
        *((service.id, service.name) if service else (None, None)),
        *((route.id, route.name) if route else (None, None)),
        *((consumer.id, consumer.username) if consumer else (None, None)),
    )


def _rank(rule: Rule) -> int:
    scope = tuple(kind for kind in ("consumer", "route", "service") if getattr(rule, kind) is not None)
    return PRECEDENCE.index(scope)


def _matches(rule: Rule, names: Names) -> bool:
    scopes = ((rule.service, names[0:2]), (rule.route, names[2:4]), (rule.consumer, names[4:6]))
    return all(wanted is None or wanted in given for wanted, given in scopes)


def _filter(settings: MeteringSettings) -> Callable[[AnyEntry], Skip | None]:
    """Why these settings do not meter an entry; None when they do."""
    if not settings.enabled:
        return lambda entry: Skip.RULE_DISABLED
    checks: list[Callable[[AnyEntry], Skip | None]] = []
    if settings.methods:
        checks.append(_method_check(frozenset(method.upper() for method in settings.methods)))
    if settings.statuses:
        checks.append(_status_check([status_range(status) for status in settings.statuses]))
    if settings.paths:
        patterns = [path_pattern(path) for path in settings.paths]
        checks.append(lambda entry: None if _path_passes(entry, patterns) else Skip.FILTERED_PATH)
    if settings.workspaces:
        wanted = frozenset(settings.workspaces)
        checks.append(
            lambda entry: None if {entry.workspace, entry.workspace_name} & wanted else Skip.FILTERED_WORKSPACE
        )
    return lambda entry: next((refused for check in checks if (refused := check(entry)) is not None), None)


def _method_check(wanted: frozenset[str]) -> Callable[[AnyEntry], Skip | None]:
    def check(entry: AnyEntry) -> Skip | None:
        method = entry.request.method if entry.request is not None else None
        return None if (method or "").upper() in wanted else Skip.FILTERED_METHOD

    return check


def _status_check(ranges: list[tuple[int, int]]) -> Callable[[AnyEntry], Skip | None]:
    def check(entry: AnyEntry) -> Skip | None:
        status = entry.response.status if entry.response is not None else None
        passes = status is not None and any(first <= status <= last for first, last in ranges)
        return None if passes else Skip.FILTERED_STATUS

    return check


def _path_passes(entry: AnyEntry, patterns: "list[re.Pattern[str]]") -> bool:
    uri = entry.request.uri if entry.request is not None else None
    path = (uri or "").partition("?")[0]
    return any(pattern.match(path) for pattern in patterns)
