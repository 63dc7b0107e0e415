"""Processes that read and map: what they send is what one process would have made; and none outlives its parent."""

import asyncio
import os
import signal
from pathlib import Path

import msgspec
import pytest

from metershipper.batcher import Span
from metershipper.books import Books
from metershipper.mapper import Mapper
from metershipper.metering import Metering, Subject
from metershipper.records import Sample
from metershipper.replay_reading import BatchLimits, Changed, Reading, Task
from metershipper.replay_survey import survey
from metershipper.replay_workers import _READ_AHEAD_BYTES, Message, Spans, Worker, WorkerDied
from metershipper.scope import Scope
from metershipper.traffic import Traffic

METERING = Metering(subject=Subject(field="username"))
LIMITS = BatchLimits(70, 1_000_000)


def write(path: Path, count: int, seed: int = 1) -> bytes:
    traffic = Traffic(seed, started_at_ms=1_790_000_000_000)
    data = b"".join(traffic.line() for _ in range(count))
    path.write_bytes(data)
    return data


def task_for(path: Path, *, passed: tuple[tuple[int, int, Scope], ...] = (), scope: Scope | None = None) -> Task:
    seen = survey(str(path), lambda heads, place: [])
    place = (str(path), 7, 0, seen.content_bytes, seen.head, seen.stamp)
    return Task(*place, scope or Scope(), passed, True, 2**20)


def made_here(task: Task) -> tuple[list[Span], list[str]]:
    """The spans, and the ids of the events in order."""
    spans, bodies = [], []
    with Reading(task, Mapper(METERING), LIMITS) as reading:
        while (block := reading.next_block()) is not None:
            new, batches = reading.take(block)
            spans += new
            bodies += [batch.body for batch in batches]
        bodies += [batch.body for batch in reading.rest()]
    return spans, ids_of(bodies)


def ids_of(bodies: list[bytes]) -> list[str]:
    return [event["id"] for body in bodies for event in msgspec.json.decode(body)]


async def made_there(worker: Worker, task: Task) -> tuple[list[Span], list[str]]:
    spans, bodies, known = [], [], Spans()
    async for message in worker.messages(task):
        if message.fault is not None:
            raise message.fault
        spans += message.spans
        for batch in known.take(message):
            bodies.append(batch.body)
            assert sum(events for _, events in batch.shares) == batch.events
            for span, events in batch.shares:
                span.unsettled -= events
    assert not any(span.unsettled for span in spans)
    return spans, ids_of(bodies)


def described(spans: list[Span]) -> list[object]:
    return [(span.start_offset, span.end_offset, span.tail, span.books, span.dead_letters) for span in spans]


def test_a_process_makes_what_is_made_here(tmp_path: Path) -> None:
    """The same spans, books, dead letters and events; task after task; and a file that changed is told."""
    first, second = tmp_path / "first.log", tmp_path / "second.log"
    data = write(first, 900)
    first.write_bytes(data + b"not json\n")
    write(second, 5, seed=2)

    async def work() -> None:
        async with Worker(METERING, LIMITS) as worker:
            for task in (task_for(first), task_for(second), task_for(first, scope=Scope(subject="acme"))):
                here, there = made_here(task), await made_there(worker, task)
                assert described(there[0]) == described(here[0])
                assert there[1] == here[1] and here[1]
            task = task_for(second)
            second.write_bytes(b"{}\n")
            with pytest.raises(Changed):
                await made_there(worker, task)
            second.unlink()
            with pytest.raises(FileNotFoundError):
                await made_there(worker, task)
            pid = worker.process_id
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    asyncio.run(work())


def test_a_process_that_dies_is_told(tmp_path: Path) -> None:
    write(tmp_path / "file.log", 3000)

    async def work() -> None:
        async with Worker(METERING, LIMITS) as worker:
            messages = worker.messages(task_for(tmp_path / "file.log"))
            await anext(messages)
            os.kill(worker.process_id, signal.SIGKILL)
            with pytest.raises(WorkerDied, match="SIGKILL"):
                async for _ in messages:
                    pass

    asyncio.run(work())


def test_a_process_that_is_stopped_ends_with_what_it_began(tmp_path: Path) -> None:
    """Every event of every span it told of comes: nothing has to be sent twice."""
    write(tmp_path / "file.log", 9000)

    async def work() -> None:
        async with Worker(METERING, LIMITS) as worker:
            spans, known = [], Spans()
            async for message in worker.messages(task_for(tmp_path / "file.log")):
                spans += message.spans
                for batch in known.take(message):
                    for span, events in batch.shares:
                        span.unsettled -= events
                worker.stop()
            assert spans and not any(span.unsettled for span in spans)
            assert spans[-1].end_offset < (tmp_path / "file.log").stat().st_size

    asyncio.run(work())


def test_a_process_that_waits_for_its_messages_to_be_taken_is_ended_at_once(tmp_path: Path) -> None:
    """As when the endpoint is down: its pipe is full, and so is what is held of it here."""
    write(tmp_path / "file.log", 6000)

    async def work() -> None:
        async with Worker(METERING, LIMITS) as worker:
            messages = worker.messages(task_for(tmp_path / "file.log"))
            await anext(messages)
            while len(worker._process.stdout._buffer) <= 2 * _READ_AHEAD_BYTES:  # type: ignore[union-attr]  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(work(), 10))


def test_after_a_stop_only_what_earlier_spans_wait_for_is_taken() -> None:
    first, second, third = (Span(1, end, b"", Books(), [], 2) for end in (100, 200, 300))
    spans = Spans()
    assert spans.take(Message([first])) == [] and spans.waits
    (batch,) = spans.take_rest(Message([second], [(b'[{"id":1},{"id":2},{"id":3}]', 3, [(100, 2), (200, 1)])]))
    assert (batch.body, batch.events, batch.shares) == (b'[{"id":1},{"id":2}]', 2, [(first, 2)])
    assert spans.take_rest(Message([third], [(b'[{"id":4},{"id":5}]', 2, [(200, 1), (300, 1)])])) == []
    assert not spans.waits


def test_batches_find_the_spans_of_earlier_messages() -> None:
    first, second = (Span(1, end, b"", Books(), [], 10) for end in (100, 200))
    spans = Spans()
    (batch,) = spans.take(Message([first], [(b"[1]", 4, [(100, 4)])]))
    assert batch.shares == [(first, 4)]
    (batch,) = spans.take(Message([second], [(b"[2]", 9, [(100, 6), (200, 3)])]))
    assert batch.shares == [(first, 6), (second, 3)]


def test_a_block_is_cut_where_an_earlier_replay_ended(tmp_path: Path) -> None:
    """What it delivered is left out up to there, and its dead letters are no dead letters again."""
    path = tmp_path / "file.log"
    data = write(path, 100)
    bad = b"not json\n"
    half = data.index(b"\n", len(data) // 2) + 1
    path.write_bytes(bad + data + bad)
    passed = ((0, half + len(bad), Scope(subject="acme")),)
    spans, ids = made_here(task_for(path, passed=passed))
    assert [(span.start_offset, span.end_offset) for span in spans] == [
        (0, half + len(bad)),
        (half + len(bad), len(data) + 2 * len(bad)),
    ]
    assert all(span.books.balanced for span in spans)
    assert spans[0].books["skipped.already_delivered"] > 1 and not spans[1].books["skipped.already_delivered"]
    assert [len(span.dead_letters) for span in spans] == [0, 1]
    acme = made_here(task_for(path, scope=Scope(subject="acme")))[1]
    assert set(acme) & set(ids) and len(set(ids)) == len(ids)
    assert Sample.of(spans[0].tail) == Sample.of((bad + data)[: half + len(bad)][-256:])


def test_of_a_block_that_turns_out_to_be_torn_nothing_is_sent(tmp_path: Path) -> None:
    """What an event waits for must be known: not one line of such a block is taken."""
    path = tmp_path / "file"
    lines = write(path, 20).splitlines(keepends=True)
    path.write_bytes(b"".join(lines)[:-1])
    half = len(b"".join(lines[:10]))
    task = task_for(path, passed=((0, half, Scope(subject="acme")),))
    path.write_bytes(b"".join([*lines[:-1], lines[-1][:-1], b" more\n"]))
    with Reading(task, Mapper(METERING), LIMITS) as reading:
        block = reading.next_block()
        assert block is not None
        with pytest.raises(Changed):
            reading.take(block)
        assert reading.rest() == []
