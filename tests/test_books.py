"""The books: every entry has exactly one outcome, under a name of a closed list."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metershipper.books import DEAD_LETTERS, SKIPPED, Books, Count, Dead, Skip

OUTCOMES: list[Skip | Dead | None] = [None, *Skip, *Dead]  # None: billed


def books_of(outcomes: Iterable[Skip | Dead | None]) -> Books:
    books = Books()
    for outcome in outcomes:
        books[Count.LINES] += 1
        books[Count.ENTRIES] += 1
        if outcome is None:
            books[Count.BILLED] += 1
        elif isinstance(outcome, Skip):
            books.skip(outcome)
        else:
            books.dead_letter(outcome)
    return books


@given(st.lists(st.sampled_from(OUTCOMES), max_size=60), st.integers(0, 60))
def test_entries_equal_billed_and_skipped_and_dead_lettered(outcomes: list[Skip | Dead | None], lines: int) -> None:
    """Ground rule 1 of the reliability cases. A line may hold several entries: lines are no part of the balance."""
    books = books_of(outcomes)
    books[Count.LINES] = lines
    assert books.balanced
    assert books.skipped == sum(isinstance(outcome, Skip) for outcome in outcomes)
    assert books.dead_letters == sum(isinstance(outcome, Dead) for outcome in outcomes)


@given(st.lists(st.lists(st.sampled_from(OUTCOMES), max_size=20), max_size=5))
def test_adding_books_is_counting_the_lines_together(parts: list[list[Skip | Dead | None]]) -> None:
    total = Books()
    for part in parts:
        total.update(books_of(part))
    assert total == books_of(outcome for part in parts for outcome in part)


@pytest.mark.parametrize("name", [Count.ENTRIES, Count.BILLED, SKIPPED + Skip.NO_USAGE, DEAD_LETTERS + Dead.NOT_JSON])
def test_an_entry_counted_twice_or_never_unbalances_the_books(name: str) -> None:
    books = books_of(OUTCOMES)
    books[name] += 1
    assert not books.balanced


def test_a_reason_of_the_same_name_is_counted_apart_for_skips_and_dead_letters() -> None:
    books = books_of([Skip.NO_SUBJECT, Skip.NO_SUBJECT, Dead.NO_SUBJECT])
    assert books.by_reason(SKIPPED) == {"no_subject": 2}
    assert books.by_reason(DEAD_LETTERS) == {"no_subject": 1}


def test_reasons_are_listed_by_frequency_then_name_and_without_zeros() -> None:
    books = books_of([Skip.NO_USAGE, Skip.NO_USAGE, Skip.STREAM_SESSION, Skip.BLANK_LINE])
    books[SKIPPED + Skip.NO_SUBJECT] += 0
    assert list(books.by_reason(SKIPPED).items()) == [("no_usage", 2), ("blank_line", 1), ("stream_session", 1)]


def test_the_names_are_a_closed_list_that_others_rely_on() -> None:
    """The checkpoint, `status --json` and `map` show these names: renaming one breaks a stored state."""
    assert {*Count} == {
        "lines", "entries", "billed", "events", "tokens.request", "tokens.response", "calls.failed_ai_call",
        "ids.hashed", "bytes.nul", "events.acknowledged", "events.refused", "refused.tokens.request",
        "refused.tokens.response",
    }  # fmt: skip
    assert {*Skip} == {
        "blank_line", "not_an_entry", "no_subject", "no_usage", "rule_disabled", "filtered_method", "filtered_status",
        "filtered_path", "filtered_workspace", "failed_ai_call", "stream_session",
        "outside_period", "other_subject", "already_delivered",
    }  # fmt: skip
    assert {*Dead} == {
        "not_json", "not_an_entry", "line_too_long", "bad_started_at", "bad_token_count", "bad_subject", "no_subject",
        "refused",
    }  # fmt: skip


def test_a_count_is_found_under_its_plain_name_and_its_enum_alike() -> None:
    """Books come back from the checkpoint with plain strings."""
    books = Books({"lines": 1, "entries": 3, "billed": 1, "skipped.no_usage": 1, "dead_letters.not_json": 1})
    assert books[Count.LINES] == 1 and books[Count.ENTRIES] == 3
    assert books.balanced
