"""Dead letters: bounded, without secrets, found again, and never without a trace; and what a retry makes of them (CASES
43, 66, 68, 71).
"""

import asyncio
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from metershipper import dead_letter_commands, dead_letters
from metershipper.batcher import Batch
from metershipper.books import Books, Count, Dead, Received
from metershipper.checkpoint import Checkpoint
from metershipper.config import Batch as BatchSettings
from metershipper.config import Config, OpenMeter, Retry, State
from metershipper.dead_letters import MAX_AGE_SECONDS, Filter, Letter
from metershipper.errors import StateError
from metershipper.events import DeadLetter, RefusedEvent
from metershipper.housekeeping import WARN_AGE_SECONDS, Housekeeping, tell_bounds
from metershipper.ledger import Ledger, Settled
from metershipper.mapper import Mapper
from metershipper.metering import Metering, Subject
from metershipper.records import NewFile, Sample
from metershipper.redelivery import Redelivery
from metershipper.retry import Answer, Verdict
from metershipper.state import StateLock, make_private_directory

NOW = 1_790_000_000.0
SECRET = "s3cr3t-V4lue_0123456789"
EVENT = {
    "specversion": "1.0", "id": "a-1:output", "source": "kong", "type": "kong.llm_request", "subject": "acme",
    "time": "2026-01-01T00:00:00.000Z", "data": {"tokens": 7, "type": "response"},
}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    make_private_directory(tmp_path / "state")
    with Checkpoint(tmp_path / "state") as opened:
        opened.register([NewFile("/log", 1, 2, Sample())])
        yield opened


def line(content: bytes, reason: Dead = Dead.NOT_JSON) -> DeadLetter:
    return DeadLetter(10, 20, reason, "no JSON", content)


def refused() -> RefusedEvent:
    return RefusedEvent(10, 20, Dead.REFUSED, "HTTP 400", orjson.dumps(EVENT), "acme", "kong.llm_request", "a-1:output")


def keep(checkpoint: Checkpoint, *letters: DeadLetter | RefusedEvent, now: float = NOW) -> None:
    with checkpoint.transaction():
        checkpoint.dead_letters.keep(1, letters, now)


def kept(checkpoint: Checkpoint, wanted: Filter = Filter()) -> list[Letter]:  # noqa: B008  # a tuple: immutable
    return checkpoint.dead_letters.select(wanted, 1000)


def want_all(checkpoint: Checkpoint) -> None:
    with checkpoint.transaction():
        checkpoint.dead_letters.want(Filter(), NOW)


def redeliver(checkpoint: Checkpoint, mapper: Mapper, answer: Answer | None = None) -> list[bytes]:
    """Try all again; the server accepts everything, or refuses each with `answer`. Returns what it got."""
    ledger, got = Ledger(), []

    async def put(batch: Batch) -> None:
        got.append(batch.body)
        if answer is None:
            ledger.acknowledged(batch)
        else:
            ledger.refused(batch, answer)

    async def run() -> None:
        redelivery = Redelivery(checkpoint, mapper, BatchSettings(max_events=1 if answer else 500), put)
        await redelivery.step()
        await redelivery.step()

    want_all(checkpoint)
    asyncio.run(run())
    return got


# --- what is kept


def test_content_above_the_cap_is_cut_and_its_place_is_kept(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record that there was one is never lost, and what is purged makes room."""
    monkeypatch.setattr(dead_letters, "MAX_CONTENT_BYTES", 100)
    keep(checkpoint, line(b"x" * 60), line(b"y" * 60), line(b"z" * 40))
    assert [(letter.content[:1], letter.is_cut, letter.start_offset) for letter in kept(checkpoint)] == [
        (b"x", False, 10),
        (b"", True, 10),
        (b"z", False, 10),
    ]
    assert checkpoint.dead_letters.fill(NOW).size == 1.0
    with checkpoint.transaction():
        assert checkpoint.dead_letters.want(Filter(), NOW) == [1, 3], "without content there is nothing to retry"
        assert checkpoint.dead_letters.purge(Filter(ids=(1,))) == 1
    keep(checkpoint, line(b"w" * 60))
    assert kept(checkpoint)[-1].content == b"w" * 60


def test_content_that_is_too_old_is_cut_after_a_warning(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    keep(checkpoint, line(b"old"))
    keep(checkpoint, line(b"new"), now=NOW + MAX_AGE_SECONDS)
    with checkpoint.transaction():
        almost = NOW + MAX_AGE_SECONDS * 0.9
        tell_bounds(checkpoint.dead_letters.expire(almost), checkpoint.dead_letters.fill(almost))
        assert "the oldest is 81 days old" in caplog.text and len(caplog.records) == 1
        late = NOW + MAX_AGE_SECONDS + 1
        tell_bounds(checkpoint.dead_letters.expire(late), checkpoint.dead_letters.fill(late))
    assert caplog.records[-1].getMessage() == "1 dead letters are older than 90 days: their content was cut away"
    assert [(letter.content, letter.is_cut) for letter in kept(checkpoint)] == [(b"", True), (b"new", False)]
    assert checkpoint.dead_letters.fill(late).size == 3 / dead_letters.MAX_CONTENT_BYTES


def test_letters_are_found_by_reason_subject_time_and_number(checkpoint: Checkpoint) -> None:
    keep(checkpoint, line(b"a"))
    keep(checkpoint, line(b"b", Dead.BAD_SUBJECT), refused(), now=NOW + 10)
    for wanted, numbers in (
        (Filter(), [1, 2, 3]),
        (Filter(reason="refused"), [3]),
        (Filter(subject="acme"), [3]),
        (Filter(since=NOW + 10), [2, 3]),
        (Filter(until=NOW + 10), [1]),
        (Filter(ids=(1, 3)), [1, 3]),
        (Filter(ids=(1, 3), reason="not_json"), [1]),
        (Filter(subject="' OR 1 --"), []),
    ):
        assert [letter.dead_letter_id for letter in kept(checkpoint, wanted)] == numbers
        assert checkpoint.dead_letters.count(wanted) == len(numbers)
    assert [each.dead_letter_id for each in checkpoint.dead_letters.select(Filter(), 1, after=1)] == [2]


def test_a_page_is_bounded_in_bytes(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_letters, "PAGE_BYTES", 10)
    keep(checkpoint, *[line(b"x" * 6)] * 5)
    assert len(kept(checkpoint)) == 2


# --- what a retry makes of it


def entry(*, request_id: bool = True, tokens: int = -1, headers: dict[str, str] | None = None) -> bytes:
    return orjson.dumps(
        {
            "request": {"method": "GET", "headers": headers or {}} | ({"id": "r1"} if request_id else {}),
            "consumer": {"username": "acme"},
            "started_at": 1_790_000_000_000,
            "ai": {"proxy": {"usage": {"prompt_tokens": tokens}}},
        }
    )


WITHOUT_TOKENS = Mapper(Metering(subject=Subject(field="username"), meter_ai_token_usage=False))


def commit_dead(checkpoint: Checkpoint, content: bytes) -> None:
    """As `run` does: the line is counted and its letter kept, in one transaction."""
    mapped = Mapper(Metering(subject=Subject(field="username"))).map_lines(content + b"\n")
    assert len(mapped.dead_letters) == 1 and not mapped.events
    checkpoint.commit([Settled(1, 100, b"", mapped.books, mapped.dead_letters)])


def test_a_line_is_billed_with_the_id_it_would_have_had(checkpoint: Checkpoint) -> None:
    """Case 68: an id made of a hash is that of the whole entry, though its secrets were not kept."""
    whole = entry(request_id=False, headers={"cookie": SECRET})
    commit_dead(checkpoint, whole)
    (letter,) = kept(checkpoint)
    assert SECRET.encode() not in letter.content and letter.entry_hash
    (body,) = redeliver(checkpoint, WITHOUT_TOKENS)
    assert [event["id"] for event in orjson.loads(body)] == [
        event.id for event in WITHOUT_TOKENS.map_lines(whole).events
    ]
    assert kept(checkpoint) == []
    books = checkpoint.books()
    assert +books == {"lines": 1, "entries": 1, "billed": 1, "events": 1, "events.acknowledged": 1, "ids.hashed": 1}
    assert books.balanced and books.events_balanced


def test_nobody_is_billed_by_what_was_blanked(checkpoint: Checkpoint) -> None:
    """Case 71: where a secret is the subject, its blank must not become a customer."""
    commit_dead(checkpoint, entry(headers={"x-api-key": SECRET}))
    by_key = Metering(subject=Subject(look_up_value_in="header", field="x-api-key"), meter_ai_token_usage=False)
    assert redeliver(checkpoint, Mapper(by_key)) == []
    (letter,) = kept(checkpoint)
    assert "was taken out of this copy as a secret" in letter.detail and letter.tries == 1 and not letter.is_wanted
    assert checkpoint.books().balanced


def test_a_line_that_is_skipped_now_is_counted_as_skipped(checkpoint: Checkpoint) -> None:
    commit_dead(checkpoint, entry())
    nobody = Mapper(Metering(subject=Subject(field="custom_id"), meter_ai_token_usage=False))
    assert redeliver(checkpoint, nobody) == []
    assert kept(checkpoint) == []
    assert +checkpoint.books() == {"lines": 1, "entries": 1, "skipped.no_subject": 1}


def test_a_line_whose_event_is_refused_becomes_a_refused_event(checkpoint: Checkpoint) -> None:
    commit_dead(checkpoint, entry())
    redeliver(checkpoint, WITHOUT_TOKENS, Answer(Verdict.REFUSED, "HTTP 400", 400, "no such subject"))
    (letter,) = kept(checkpoint)
    assert (letter.kind, letter.reason, letter.detail) == ("event", "refused", "HTTP 400: no such subject")
    assert (letter.start_offset, letter.subject, letter.tries) == (0, "acme", 1)
    books = checkpoint.books()
    assert (books[Count.BILLED], books[Count.REFUSED], books.dead_letters) == (1, 1, 0)
    assert books.balanced and books.events_balanced


def test_a_refused_event_is_sent_as_it_was_and_moves_in_the_books(checkpoint: Checkpoint) -> None:
    counted = Books({Count.LINES: 1, Count.ENTRIES: 1, Count.BILLED: 1, Count.EVENTS: 1, Count.TOKENS_RESPONSE: 7})
    counted.update({Count.REFUSED: 1, Count.REFUSED_TOKENS_RESPONSE: 7})
    checkpoint.commit([Settled(1, 100, b"", counted, [], [refused()])])
    again = Answer(Verdict.REFUSED, "HTTP 422", 422, "still not")
    assert redeliver(checkpoint, WITHOUT_TOKENS, again) == [b"[" + orjson.dumps(EVENT) + b"]"]
    (letter,) = kept(checkpoint)
    assert (letter.detail, letter.tries, checkpoint.books()) == ("HTTP 422: still not", 1, counted)
    assert redeliver(checkpoint, WITHOUT_TOKENS) == [b"[" + orjson.dumps(EVENT) + b"]"]
    assert kept(checkpoint) == []
    books = checkpoint.books()
    assert (books[Count.ACKNOWLEDGED], books[Count.REFUSED], books[Count.REFUSED_TOKENS_RESPONSE]) == (1, 0, 0)
    assert books.balanced and books.events_balanced


def test_of_an_overlong_line_there_is_only_the_beginning(checkpoint: Checkpoint) -> None:
    keep(checkpoint, DeadLetter(0, 20_000_000, Dead.LINE_TOO_LONG, "a line of 20000000 bytes", entry(tokens=1)))
    assert redeliver(checkpoint, WITHOUT_TOKENS) == []
    assert kept(checkpoint)[0].detail == "a line of 20000000 bytes"


def test_an_outcome_that_was_recorded_counts_once(checkpoint: Checkpoint) -> None:
    """A commit whose caller was stopped is made again with the next one."""
    commit_dead(checkpoint, entry())

    async def put(batch: Batch) -> None:
        Ledger().acknowledged(batch)

    async def run() -> None:
        redelivery = Redelivery(checkpoint, WITHOUT_TOKENS, BatchSettings(), put)
        await redelivery.step()
        once_more = list(redelivery._open)
        await redelivery.record()
        redelivery._open = once_more
        await redelivery.record()

    want_all(checkpoint)
    asyncio.run(run())
    assert checkpoint.books()[Count.BILLED] == 1 and checkpoint.books().balanced


# --- the warning that usage waits


def test_usage_that_waits_is_warned_of_within_the_hour(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """Case 39, OPENMETER 3: an invoice closes an hour after its period."""
    caplog.set_level(logging.WARNING)
    ages = iter([WARN_AGE_SECONDS - 1, WARN_AGE_SECONDS + 61, WARN_AGE_SECONDS + 62])

    async def put(_: Batch) -> None:
        raise AssertionError

    keeper = Housekeeping(
        checkpoint, Redelivery(checkpoint, WITHOUT_TOKENS, BatchSettings(), put), lambda: next(ages), Books()
    )
    for _ in range(3):
        keeper._warn_of_age()
    (told,) = caplog.records
    assert "was read 31 min ago" in told.getMessage()
    assert vars(told)["oldest_unsettled_seconds"] == 1861


def test_how_long_usage_waits_is_noted_when_it_changes(checkpoint: Checkpoint) -> None:
    """For `status`, which is another process (case 39): a write for each change, not for each second."""
    ages = iter([0.0, 5.0, 60.0, 60.2, 30.0, 0.0, 0.0])

    async def put(_: Batch) -> None:
        raise AssertionError

    keeper = Housekeeping(
        checkpoint, Redelivery(checkpoint, WITHOUT_TOKENS, BatchSettings(), put), lambda: next(ages), Books()
    )

    async def run() -> list[int | None]:
        checkpoint.note_oldest_unsettled(5)  # of the process before
        noted = []
        for _ in range(7):
            await keeper._note_age()
            noted.append(checkpoint.oldest_unsettled_at())
        return noted

    now = time.time()
    none, short, long, same, shorter, *over = asyncio.run(run())
    assert (none, short, over) == (None, None, [None, None])
    assert long is not None and shorter is not None
    assert long == same and abs(now - 60 - long) < 5 and abs(now - 30 - shorter) < 5


def housekeeping(checkpoint: Checkpoint, received: Books) -> Housekeeping:
    async def put(_: Batch) -> None:
        raise AssertionError

    return Housekeeping(checkpoint, Redelivery(checkpoint, WITHOUT_TOKENS, BatchSettings(), put), lambda: 0.0, received)


def test_what_the_receiver_counts_is_moved_to_the_books(checkpoint: Checkpoint) -> None:
    received = Books()
    keeper = housekeeping(checkpoint, received)

    async def run() -> None:
        await keeper.note_received()
        assert checkpoint.books() == Books()
        for _ in range(2):
            received.update({Received.REQUESTS: 2, Received.REPEATS: 0, Received.NO_ROOM: 1})
            await keeper.note_received()
            await keeper.note_received()

    asyncio.run(run())
    assert checkpoint.books() == Books({Received.REQUESTS: 4, Received.NO_ROOM: 2})
    assert +received == Books()


def test_connections_that_were_cut_off_are_told_together(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """Case 59: a flood is one line, not one for each connection."""
    received = Books()
    keeper = housekeeping(checkpoint, received)

    async def run() -> None:
        for _ in range(3):
            received.update({Received.TOO_SLOW: 5, Received.CROWDED_OUT: 7, Received.NO_ROOM: 1})
            await keeper.note_received()

    asyncio.run(run())
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == "http-log: cut off 7 crowded_out, 5 too_slow; what got a 200 is safe, Kong sends the rest again"


def test_what_could_not_be_noted_is_noted_the_next_time(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is counted meanwhile with it (case 60)."""
    received = Books({Received.REQUESTS: 2})
    keeper = housekeeping(checkpoint, received)

    def count(_: Books) -> None:
        received[Received.REQUESTS] += 3
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "count", count)
        with pytest.raises(sqlite3.OperationalError):
            asyncio.run(keeper.note_received())
    assert received[Received.REQUESTS] == 5
    asyncio.run(keeper.note_received())
    assert checkpoint.books()[Received.REQUESTS] == 5


def test_what_is_noted_while_housekeeping_ends_is_noted_once(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that writes it goes on."""
    received = Books({Received.REQUESTS: 2})
    keeper = housekeeping(checkpoint, received)
    began, go_on = threading.Event(), threading.Event()
    count = checkpoint.count

    def slow_count(books: Books) -> None:
        began.set()
        assert go_on.wait(10)
        count(books)

    async def run() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "count", slow_count)
            noting = asyncio.create_task(keeper.note_received())
            await asyncio.to_thread(began.wait, 10)
            noting.cancel()
            await asyncio.wait({noting})
            go_on.set()
        await keeper.note_received()

    asyncio.run(run())  # which waits for its threads
    assert checkpoint.books()[Received.REQUESTS] == 2


# --- the commands, where things do not go as wished


def config_of(directory: Path) -> Config:
    endpoint = OpenMeter(
        ingest_endpoint="http://127.0.0.1:9/api/v1/events",
        retry=Retry(initial_delay_seconds=0.01, max_delay_seconds=0.01),
    )
    return Config(openmeter=endpoint, state=State(directory=directory / "state"))


def test_a_retry_without_an_endpoint_is_left_to_the_next_run(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 39: what was asked for is not forgotten."""
    monkeypatch.setattr(dead_letter_commands, "PATIENCE_SECONDS", 0.2)
    keep(checkpoint, refused())
    done = dead_letter_commands.retry(config_of(tmp_path), "config.toml", Filter())
    assert (done.asked, done.settled, done.kept, done.waiting, done.exit_code) == (1, 0, 0, 1, 3)
    assert [letter.is_wanted for letter in kept(checkpoint)] == [True]


def test_a_retry_beside_a_process_that_does_not_get_to_it_says_so(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letter_commands, "PATIENCE_SECONDS", 0.2)
    keep(checkpoint, refused())
    with StateLock(tmp_path / "state"):
        done = dead_letter_commands.retry(config_of(tmp_path), "config.toml", Filter())
    assert (done.asked, done.waiting, done.exit_code) == (1, 1, 3)


def test_where_nothing_was_recorded_there_is_nothing_to_list(tmp_path: Path) -> None:
    for act in (
        lambda: list(dead_letter_commands.letters(tmp_path, Filter(), 1)),
        lambda: dead_letter_commands.purge(tmp_path, Filter()),
        lambda: dead_letter_commands.retry(config_of(tmp_path), "config.toml", Filter()),
    ):
        with pytest.raises(StateError, match="nothing was recorded yet"):
            act()
    assert not (tmp_path / "state").exists()


def test_a_long_list_comes_in_pages(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_letter_commands, "PAGE_ROWS", 2)
    keep(checkpoint, *[line(b"x")] * 5)
    for limit, numbers in ((100, [1, 2, 3, 4, 5]), (3, [1, 2, 3])):
        found = dead_letter_commands.letters(tmp_path / "state", Filter(), limit)
        assert [letter.dead_letter_id for letter in found] == numbers
