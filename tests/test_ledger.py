"""What may be committed: positions move over contiguous settled spans only, and count exactly those spans."""

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from metershipper.batcher import Batch, Batcher, Span
from metershipper.books import Books, Count, Dead
from metershipper.events import DeadLetter, RefusedEvent, UsageEvent
from metershipper.ledger import COMPACT_ABOVE_SPANS, Ledger, Settled, merge
from metershipper.retry import Answer, Verdict


def span(file_id: int, end_offset: int, events: int, *, dead: int = 0) -> Span:
    read = events + dead
    books = Books({Count.LINES: read, Count.ENTRIES: read, Count.BILLED: events, "dead_letters.not_json": dead})
    letters = [DeadLetter(end_offset - 1, end_offset, Dead.NOT_JSON, "", b"%d" % n) for n in range(dead)]
    return Span(file_id, end_offset, b"tail %d" % end_offset, books, letters, events)


def share(*shares: tuple[Span, int]) -> Batch:
    return Batch(b"", sum(count for _, count in shares), list(shares))


def test_an_acknowledgement_out_of_order_moves_no_position() -> None:
    """Case 31: event k in flight, k + 1 acknowledged: the position stays before k."""
    ledger, first, second = Ledger(), span(1, 100, 2), span(1, 200, 3)
    ledger.opened(first)
    ledger.opened(second)
    ledger.acknowledged(share((second, 3)))
    assert ledger.take_settled() == []
    assert ledger.unsettled_events == 2
    ledger.acknowledged(share((first, 1)))
    assert ledger.take_settled() == []
    ledger.acknowledged(share((first, 1)))
    (ground,) = ledger.take_settled()
    assert (ground.file_id, ground.end_offset, ground.tail) == (1, 200, b"tail 200")
    assert ground.books == first.books + second.books
    assert ledger.take_settled() == [] and ledger.unsettled_events == 0


def test_a_span_without_events_waits_for_the_ones_before_it() -> None:
    """Skipped lines and dead letters are committed in their place, not ahead of it."""
    ledger, first, second = Ledger(), span(1, 100, 1), span(1, 200, 0, dead=2)
    ledger.opened(first)
    ledger.opened(second)
    assert ledger.take_settled() == []
    ledger.acknowledged(share((first, 1)))
    (ground,) = ledger.take_settled()
    assert ground.end_offset == 200 and ground.dead_letters == second.dead_letters


def test_a_span_without_events_settles_by_itself() -> None:
    ledger = Ledger()
    ledger.opened(span(1, 100, 0, dead=1))
    (ground,) = ledger.take_settled()
    assert ground.end_offset == 100 and ground.books.dead_letters == 1


def test_files_do_not_wait_for_each_other() -> None:
    ledger, slow, fast = Ledger(), span(1, 100, 1), span(2, 50, 1)
    ledger.opened(slow)
    ledger.opened(fast)
    ledger.acknowledged(share((fast, 1)))
    assert [ground.file_id for ground in ledger.take_settled()] == [2]
    ledger.acknowledged(share((slow, 1)))
    assert [ground.file_id for ground in ledger.take_settled()] == [1]


def test_ground_that_could_not_be_written_is_merged_with_the_next() -> None:
    """Case 33: a full disk delays a commit; what it would have counted goes into the next one, once."""
    a, b, c = span(1, 100, 1), span(2, 10, 2, dead=1), span(1, 300, 4, dead=2)
    earlier = [Settled(1, 100, b"a", Books(a.books), []), Settled(2, 10, b"b", Books(b.books), b.dead_letters[:])]
    later = [Settled(1, 300, b"c", Books(c.books), c.dead_letters[:]), Settled(3, 7, b"d")]
    assert merge(earlier, later) == [
        Settled(1, 300, b"c", Books(a.books + c.books), c.dead_letters),
        Settled(2, 10, b"b", Books(+b.books), b.dead_letters),
        Settled(3, 7, b"d", Books(), []),
    ]
    assert earlier[0] == Settled(1, 100, b"a", Books(a.books), []), "the parts stay as they were"
    assert merge([], []) == []


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 9), st.integers(0, 2)), max_size=25),
    st.integers(1, 7),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_the_position_is_the_highest_contiguous_settled_one(
    made: list[tuple[int, int, int]], max_events: int, random: object, commit_fails: bool
) -> None:
    """Whatever the order of acknowledgements: positions and books are those of exactly the settled spans (case 31)."""
    ledger, batcher = Ledger(), Batcher(max_events, 10_000, 1.0)
    spans: dict[int, list[Span]] = defaultdict(list)
    events_of: dict[int, int] = {}
    batches: list[Batch] = []
    for number, (file_id, events, dead) in enumerate(made):
        new = span(file_id, 100 * (len(spans[file_id]) + 1), events, dead=dead)
        spans[file_id].append(new)
        events_of[id(new)] = events
        ledger.opened(new)
        batcher.add(new, [UsageEvent("1.0", f"{number}-{n}", "s", "t", "c", "", {}) for n in range(events)], 0.0)
        batches += batcher.take_due(0.0)
    batches += batcher.take_due(0.0, all_of_it=True)
    random.shuffle(batches)  # type: ignore[attr-defined]  # a random.Random of hypothesis

    acknowledged: dict[int, int] = defaultdict(int)
    committed: dict[int, Settled] = {}
    unwritten: list[Settled] = []
    for number, batch in enumerate([None, *batches]):
        if batch is not None:
            ledger.acknowledged(batch)
            for owner, count in batch.shares:
                acknowledged[id(owner)] += count
        unwritten = merge(unwritten, ledger.take_settled())
        if commit_fails and number % 3 == 1 and number < len(batches):
            continue
        committed = {ground.file_id: ground for ground in merge(committed.values(), unwritten)}
        unwritten = []
        for file_id, read in spans.items():
            settled: list[Span] = []
            for each in read:
                if acknowledged[id(each)] < events_of[id(each)]:
                    break
                settled.append(each)
            expected, books = Settled(file_id, 0, b""), Books()
            for each in settled:
                books.update(each.books)
                expected.end_offset, expected.tail = each.end_offset, each.tail
                expected.dead_letters += each.dead_letters
            ground = committed.get(file_id, Settled(file_id, 0, b""))
            assert (ground.end_offset, ground.tail) == (expected.end_offset, expected.tail)
            assert ground.books == books and ground.dead_letters == expected.dead_letters
            assert ground.books.balanced
        assert ledger.unsettled_events == sum(events_of.values()) - sum(acknowledged.values())
    assert ledger.unsettled_events == 0
    assert {file_id: ground.end_offset for file_id, ground in committed.items()} == {
        file_id: read[-1].end_offset for file_id, read in spans.items()
    }


# --- events that the server refuses, and what waits behind them

TEXT = b'{"specversion":"1.0","id":"a","source":"s","type":"kong.llm_request","subject":"c","time":"","data":{%b}}'


def test_a_refused_event_settles_its_span_and_is_counted_apart() -> None:
    """Case 43: the letter is committed with the position that passes it; tokens and all."""
    ledger, one = Ledger(), Span(1, 100, b"", Books({Count.EVENTS: 3}), [], 3, 40)
    ledger.opened(one)
    ledger.acknowledged(share((one, 2)))
    assert ledger.take_settled() == []
    event = TEXT % b'"tokens":7,"type":"request_cached"'
    ledger.refused(Batch(b"[" + event + b"]", 1, [(one, 1)]), Answer(Verdict.REFUSED, "HTTP 400", 400, "no"))
    (ground,) = ledger.take_settled()
    assert ground.refused == [RefusedEvent(40, 100, Dead.REFUSED, "HTTP 400: no", event, "c", "kong.llm_request", "a")]
    assert ground.books == {"events": 3, "events.acknowledged": 2, "events.refused": 1, "refused.tokens.request": 7}
    assert ground.books.events_balanced


def test_what_is_settled_behind_a_span_that_waits_takes_no_memory() -> None:
    """Cases 40, 49: one event that is tried for hours, while others pass."""
    ledger, stuck = Ledger(), span(1, 10, 1)
    ledger.opened(stuck)
    for number in range(5000):
        new = span(1, 20 + number, 1, dead=1)
        ledger.opened(new)
        ledger.acknowledged(share((new, 1)))
        assert ledger.take_settled() == []
    assert len(ledger._open[1]) <= COMPACT_ABOVE_SPANS
    ledger.acknowledged(share((stuck, 1)))
    (ground,) = ledger.take_settled()
    assert (ground.end_offset, len(ground.dead_letters)) == (5019, 5000)
    assert ground.books[Count.ENTRIES] == 10_001 and ground.books.balanced


def test_the_age_is_that_of_the_oldest_span_of_any_file() -> None:
    ledger, old, young = Ledger(), span(1, 10, 1), span(2, 10, 1)
    assert ledger.oldest_unsettled_seconds(100.0) == 0.0
    old.read_at, young.read_at = 40.0, 70.0
    ledger.opened(young)
    ledger.opened(old)
    assert ledger.oldest_unsettled_seconds(100.0) == 60.0
    ledger.acknowledged(share((old, 1)))
    ledger.take_settled()
    assert ledger.oldest_unsettled_seconds(100.0) == 30.0
