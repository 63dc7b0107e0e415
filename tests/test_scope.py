"""Scopes: what a filtered replay takes, and by which text it is known again."""

import pytest

from metershipper.books import Skip
from metershipper.errors import UsageError
from metershipper.mapper import Mapper
from metershipper.metering import Metering, Subject
from metershipper.scope import Scope, Sieve

NOON = 1_780_000_000.0
TIME = "2026-05-28T20:26:40.000Z"


def test_bounds_are_written_as_the_times_of_events_are() -> None:
    assert Scope.of(NOON, None, None).since == TIME
    assert Scope.of(NOON + 0.0015, None, None).since == "2026-05-28T20:26:40.002Z"
    assert Scope.of(1_790_000_000.123, None, None).since == "2026-09-21T14:13:20.123Z"
    assert Scope.of(-1e12, 1e12, None) == Scope("1970-01-01T00:00:00.000Z", "2106-02-07T06:28:16.000Z")


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        (Scope(), None),
        (Scope(since=TIME), None),
        (Scope(until=TIME), Skip.OUTSIDE_PERIOD),
        (Scope(since="2026-05-28T20:26:40.001Z"), Skip.OUTSIDE_PERIOD),
        (Scope(until="2026-05-28T20:26:40.001Z"), None),
        (Scope(subject="acme"), None),
        (Scope(subject="globex"), Skip.OTHER_SUBJECT),
        (Scope(until=TIME, subject="globex"), Skip.OUTSIDE_PERIOD),
    ],
)
def test_an_entry_is_in_a_scope_or_it_is_told_why_not(scope: Scope, expected: Skip | None) -> None:
    """`since` belongs to the period, `until` does not, so that periods that touch share nothing."""
    assert scope.skip(TIME, "acme") == expected
    assert Sieve(Scope(), [scope]).skip(TIME, "acme") == (Skip.ALREADY_DELIVERED if expected is None else None)


def test_what_is_outside_is_told_before_what_was_delivered() -> None:
    assert Sieve(Scope(subject="globex"), [Scope()]).skip(TIME, "acme") is Skip.OTHER_SUBJECT


@pytest.mark.parametrize(
    ("scope", "text"),
    [
        (Scope(), None),
        (Scope(since=TIME), f'{{"since": "{TIME}"}}'),
        (Scope(TIME, "2027-01-01T00:00:00.000Z", 'a "b"\n'), None),
    ],
)
def test_a_scope_has_one_text(scope: Scope, text: str | None) -> None:
    assert Scope.parse(scope.canonical) == scope
    if text is not None:
        assert scope.canonical == text


@pytest.mark.parametrize(
    ("since", "until", "subject", "words"),
    [(NOON, NOON, None, "nothing lies between"), (NOON, NOON - 1, None, "--until"), (None, None, "", "--subject")],
)
def test_what_holds_nothing_is_refused(since: float, until: float, subject: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Scope.of(since, until, subject)


def test_what_a_sieve_leaves_out_counts_no_events_and_no_tokens() -> None:
    """The books balance: an entry that is left out has one outcome, whatever was in it."""
    entry = b'{"request":{"id":"%d","method":"GET"},"started_at":1780000000000,"consumer":{"username":"%s"}}\n'
    data = entry % (1, b"acme") + entry % (2, b"globex") + b"no json\n\n"
    mapper = Mapper(Metering(subject=Subject(field="username")))
    mapped = mapper.map_lines(data, sieve=Sieve(Scope(subject="acme")))
    assert [event.subject for event in mapped.events] == ["acme"]
    assert mapped.books["skipped.other_subject"] == 1
    assert len(mapped.dead_letters) == 1
    assert mapped.books.balanced
    assert mapper.map_lines(data, sieve=Sieve(Scope())).books == mapper.map_lines(data).books
