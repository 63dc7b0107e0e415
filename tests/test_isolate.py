"""What is sent apart of a refused batch: one bad event costs only itself, in a bounded number of requests, with the
bytes it always had (CASES 40, 42, 43).
"""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metershipper.batcher import Batch, Span
from metershipper.books import Books
from metershipper.isolate import CONVICTING_FAILURES, Delivery, Piece, Step, select, split, step_after
from metershipper.retry import Answer, Verdict

OK = Answer(Verdict.ACCEPTED, "HTTP 204", 204)
TOO_LARGE = Answer(Verdict.TOO_LARGE, "HTTP 413", 413)
BROKEN = Answer(Verdict.RETRY, "HTTP 500", 500)
UNREACHABLE = Answer(Verdict.RETRY, "the connection was refused")


def refused(*suspects: int) -> Answer:
    return Answer(Verdict.REFUSED, "HTTP 400", 400, suspects=suspects)


def span(events: int) -> Span:
    return Span(1, 10, b"", Books(), [], events)


def batch_of(*owners: Span) -> Batch:
    """One batch of numbered events; white space in it shows whether bytes are kept."""
    shares = [(owner, owner.unsettled) for owner in owners]
    events = sum(count for _, count in shares)
    return Batch(b"[" + b",".join(b'{"id": %d }' % n for n in range(events)) + b"]", events, shares)


def ids(batch: Batch) -> list[int]:
    return [int(part.split(b":")[1].strip(b" }]")) for part in batch.body.split(b",")] if batch.events else []


def isolate(events: int, answer_of: Callable[[list[int]], Answer]) -> tuple[list[int], list[int], int]:
    """Send a batch to a server that answers so: what was accepted, what was refused, how many requests it took."""
    owners = [span(events // 3), span(events - events // 3)]
    delivery = Delivery.of(batch_of(*owners), 0)
    accepted: list[int] = []
    bad: list[int] = []
    requests = passed = 0
    while delivery.pieces:
        requests += 1
        piece = delivery.pieces.popleft()
        answer = answer_of(ids(piece.batch))
        step = step_after(piece, answer, passed)
        if step is Step.DONE:
            passed += 1
            delivery.trusts_pointer &= not piece.is_suspect
            accepted += ids(piece.batch)
        elif step is Step.REFUSE:
            bad += ids(piece.batch)
        elif step is Step.SPLIT:
            delivery.pieces.extendleft(reversed(split(piece, answer, trusts_pointer=delivery.trusts_pointer)))
        else:
            delivery.pieces.append(piece)
        if step in (Step.DONE, Step.REFUSE):
            for owner, count in piece.batch.shares:
                owner.unsettled -= count
    assert [owner.unsettled for owner in owners] == [0, 0]
    return accepted, bad, requests


@given(st.integers(1, 60), st.sets(st.integers(0, 59), max_size=8), st.sampled_from(["right", "absent", "lying"]))
def test_exactly_the_bad_events_are_refused(events: int, marked: set[int], pointer: str) -> None:
    """Case 43: whatever the server points at, every good event is accepted once, in a bounded number of requests."""
    poison = {number for number in marked if number < events}

    def answer_of(sent: list[int]) -> Answer:
        bad = [place for place, number in enumerate(sent) if number in poison]
        if not bad:
            return OK
        return refused(*({"right": bad[:1], "absent": [], "lying": [(bad[0] + 1) % len(sent), 10**6]}[pointer]))

    accepted, bad, requests = isolate(events, answer_of)
    assert sorted(accepted) == [number for number in range(events) if number not in poison]
    assert sorted(bad) == sorted(poison)
    assert requests <= 2 * events + 2
    if pointer == "right":
        assert requests <= 2 * len(poison) + 1


def test_all_suspects_of_v3_are_parted_at_once() -> None:
    """Case 43, OPENMETER 2: v3 names all of them, so one request finds all and one delivers the rest."""
    poison = [3, 40, 99]
    accepted, bad, requests = isolate(
        100, lambda sent: refused(*(n for n, each in enumerate(sent) if each in poison)) if {*sent} & {*poison} else OK
    )
    assert (len(accepted), bad, requests) == (97, poison, 5)


@given(st.integers(1, 50), st.integers(1, 20))
def test_what_is_too_large_is_halved_as_often_as_it_takes(events: int, most: int) -> None:
    """Case 42: in order, each once, and nothing is refused that fits."""
    accepted, bad, _ = isolate(events, lambda sent: OK if len(sent) <= most else TOO_LARGE)
    assert (accepted, bad) == (list(range(events)), [])


@given(st.integers(2, 40), st.integers(0, 39))
def test_an_event_that_always_fails_is_found_by_what_passes(events: int, poison: int) -> None:
    """Case 40: a batch of which one event fails with 5xx: the others pass, and it stays alone."""
    poison %= events
    delivery = Delivery.of(batch_of(span(events)), 0)
    passed = 0
    for _ in range(400):
        piece = delivery.pieces.popleft()
        answer = BROKEN if poison in ids(piece.batch) else OK
        step = step_after(piece, answer, passed)
        if step is Step.DONE:
            passed += 1
        elif step is Step.SPLIT:
            delivery.pieces.extendleft(reversed(split(piece, answer, trusts_pointer=True)))
        else:
            assert step is Step.WAIT
            delivery.pieces.append(piece)
        if delivery.is_hopeless:
            break
    assert [ids(piece.batch) for piece in delivery.pieces] == [[poison]]
    for number in range(1, CONVICTING_FAILURES + 1):
        last = step_after(delivery.pieces[0], BROKEN, passed + number)
        if last is Step.REFUSE:
            break
    assert last is Step.REFUSE


def test_without_others_passing_nothing_is_convicted() -> None:
    """Case 39: a server that is down says nothing about an event; all that is done is to try one event apart."""
    single, several = Piece(batch_of(span(1))), Piece(batch_of(span(10)))
    assert {step_after(single, BROKEN, 7) for _ in range(1000)} == {Step.WAIT}
    assert [step_after(several, BROKEN, 7) for _ in range(3)] == [Step.WAIT, Step.WAIT, Step.SPLIT]
    first, rest = split(several, BROKEN, trusts_pointer=True)
    assert (ids(first.batch), ids(rest.batch)) == ([0], list(range(1, 10)))
    assert {step_after(rest, BROKEN, 7) for _ in range(1000)} == {Step.WAIT}


def test_what_never_reached_the_server_is_no_failure_of_an_event() -> None:
    piece = Piece(batch_of(span(1)))
    for passed in range(100):
        assert step_after(piece, UNREACHABLE, passed) is Step.WAIT
        assert step_after(piece, Answer(Verdict.SLOW_DOWN, "HTTP 429", 429), passed) is Step.WAIT
    assert (piece.attempts, piece.failures) == (200, 0)


def test_events_keep_their_bytes_and_their_spans() -> None:
    """An id is never made anew; each span is owed exactly its own events."""
    one, two = span(2), span(3)
    parts = select(batch_of(one, two), [[4, 0], [1, 2, 3]])
    assert [part.body for part in parts] == [b'[{"id": 4 },{"id": 0 }]', b'[{"id": 1 },{"id": 2 },{"id": 3 }]']
    assert [part.shares for part in parts] == [[(two, 1), (one, 1)], [(one, 1), (two, 2)]]


@pytest.mark.parametrize("suspects", [(), (7,), (0, 1, 2)])
def test_a_pointer_that_helps_nothing_is_passed_over(suspects: tuple[int, ...]) -> None:
    """Absent, out of range, or at every event: halves."""
    parts = split(Piece(batch_of(span(3))), refused(*suspects), trusts_pointer=True)
    assert [ids(part.batch) for part in parts] == [[0], [1, 2]]
