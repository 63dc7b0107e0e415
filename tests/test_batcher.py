"""Batches: every event in exactly one, in order, within the limits, due by count or by age on an explicit clock."""

from dataclasses import dataclass, field

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metershipper.batcher import Batch, Batcher, Span, encode_batches, split_shares
from metershipper.books import Books, Count
from metershipper.events import Mapped, UsageEvent


def event(number: int, size: int = 0) -> UsageEvent:
    return UsageEvent("1.0", f"id-{number}", "kong", "kong.api_request", "acme", "t", {"pad": "x" * size})


def span(events: int, file_id: int = 1) -> Span:
    return Span(file_id, 0, b"", Books(), [], events)


def ids(batches: list[Batch]) -> list[str]:
    return [event["id"] for batch in batches for event in orjson.loads(batch.body)]


def test_a_span_counts_the_events_it_waits_for() -> None:
    mapped = Mapped([event(1), event(2)], Books({Count.LINES: 3}), [])
    made = Span.of(7, 4096, b"tail", mapped)
    assert (made.file_id, made.end_offset, made.tail, made.unsettled) == (7, 4096, b"tail", 2)
    assert made.books is mapped.books and made.dead_letters is mapped.dead_letters


def test_nothing_is_due_before_the_first_event() -> None:
    batcher = Batcher(500, 1_000_000, 1.0)
    batcher.add(span(0), [], now=5.0)
    assert batcher.wait_seconds(100.0) is None
    assert batcher.take_due(100.0) == []
    assert batcher.take_due(100.0, all_of_it=True) == []


def test_a_batch_is_due_when_it_is_full() -> None:
    batcher = Batcher(3, 1_000_000, 1.0)
    first, second = span(2), span(5)
    batcher.add(first, [event(1), event(2)], now=0.0)
    assert batcher.take_due(0.0) == []
    batcher.add(second, [event(n) for n in range(3, 8)], now=0.0)
    batches = batcher.take_due(0.0)
    assert [batch.events for batch in batches] == [3, 3]
    assert [batch.shares for batch in batches] == [[(first, 2), (second, 1)], [(second, 3)]]
    assert ids(batches) == [f"id-{n}" for n in range(1, 7)]
    assert ids(batcher.take_due(0.0, all_of_it=True)) == ["id-7"]


def test_a_batch_is_due_when_its_oldest_event_is_old() -> None:
    batcher = Batcher(500, 1_000_000, 1.0)
    batcher.add(span(1), [event(1)], now=10.0)
    assert batcher.wait_seconds(10.25) == 0.75
    batcher.add(span(1), [event(2)], now=10.75)
    assert batcher.wait_seconds(10.75) == 0.25, "the age is that of the oldest event"
    assert batcher.take_due(10.99) == []
    assert batcher.wait_seconds(12.0) == 0.0
    assert ids(batcher.take_due(11.0)) == ["id-1", "id-2"]
    assert batcher.wait_seconds(11.0) is None


def test_what_a_full_batch_leaves_behind_gets_a_wait_of_its_own() -> None:
    batcher = Batcher(2, 1_000_000, 1.0)
    batcher.add(span(3), [event(1), event(2), event(3)], now=10.0)
    assert ids(batcher.take_due(10.0)) == ["id-1", "id-2"]
    assert batcher.wait_seconds(10.5) == 0.5
    assert ids(batcher.take_due(11.0)) == ["id-3"]


def test_an_aged_batch_takes_everything_with_it() -> None:
    batcher = Batcher(2, 1_000_000, 1.0)
    batcher.add(span(5), [event(n) for n in range(5)], now=0.0)
    assert [batch.events for batch in batcher.take_due(2.0)] == [2, 2, 1]
    assert batcher.wait_seconds(2.0) is None


@pytest.mark.parametrize("sizes", [[5000], [10, 5000, 10], [5000, 5000], [10] * 50, [900] * 9], ids=str)
def test_a_batch_above_max_bytes_is_halved_but_an_event_is_never_cut(sizes: list[int]) -> None:
    events = [event(number, size) for number, size in enumerate(sizes)]
    owner = span(len(events))
    batches = encode_batches(events, [(owner, len(events))], 1000)
    assert ids(batches) == [f"id-{n}" for n in range(len(events))]
    assert [batch.events for batch in batches] == [len(orjson.loads(batch.body)) for batch in batches]
    assert all(len(batch.body) <= 1000 or batch.events == 1 for batch in batches)
    assert all(batch.shares == [(owner, batch.events)] for batch in batches)


def test_shares_are_split_at_any_event() -> None:
    a, b = span(2), span(3)
    expected = {
        0: ([], [(a, 2), (b, 3)]),
        1: ([(a, 1)], [(a, 1), (b, 3)]),
        2: ([(a, 2)], [(b, 3)]),
        4: ([(a, 2), (b, 2)], [(b, 1)]),
        5: ([(a, 2), (b, 3)], []),
    }
    assert {count: split_shares([(a, 2), (b, 3)], count) for count in expected} == expected


@dataclass
class Added:
    """Everything that was put into a batcher, by span, and what came out."""

    events: dict[str, int] = field(default_factory=dict)  # id -> index of its span
    spans: list[Span] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(150, 3000),
    st.lists(st.tuples(st.lists(st.integers(0, 1500), max_size=15), st.floats(0, 0.7), st.booleans()), max_size=25),
)
def test_every_event_is_in_exactly_one_batch_in_order(
    max_events: int, max_bytes: int, steps: list[tuple[list[int], float, bool]]
) -> None:
    """Whatever the spans, sizes and pauses: nothing lost, nothing twice, within both limits, never later than due."""
    batcher, added, now, oldest = Batcher(max_events, max_bytes, 1.0), Added(), 100.0, None
    for sizes, pause, take in steps:
        now += pause
        events = [event(len(added.events) + number, size) for number, size in enumerate(sizes)]
        owner = span(len(events))
        batcher.add(owner, events, now)
        added.events |= {each.id: len(added.spans) for each in events}
        added.spans.append(owner)
        oldest = now if oldest is None and events else oldest
        assert batcher.wait_seconds(now) == (None if oldest is None else max(0.0, oldest + 1.0 - now))
        if take:
            batches = batcher.take_due(now)
            added.batches += batches
            waiting = len(added.events) - len(ids(added.batches))
            if oldest is not None and now >= oldest + 1.0:
                assert waiting == 0, "old events leave"
            assert waiting < max_events, "full batches leave"
            oldest = None if not waiting else now if batches else oldest
    added.batches += batcher.take_due(now, all_of_it=True)

    assert ids(added.batches) == list(added.events)
    waiting_for = [0] * len(added.spans)
    for batch in added.batches:
        held = orjson.loads(batch.body)
        assert 1 <= batch.events == len(held) <= max_events
        assert len(batch.body) <= max_bytes or batch.events == 1
        owners = [added.events[each["id"]] for each in held]
        shared = [(added.spans.index(owner), count) for owner, count in batch.shares]
        assert shared == [(owner, owners.count(owner)) for owner in dict.fromkeys(owners)]
        for index, count in shared:
            waiting_for[index] += count
    assert waiting_for == [each.unsettled for each in added.spans]
