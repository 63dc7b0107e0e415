"""The shipper delivers each batch until it is accepted, says so once, and tells what is wrong without flooding the log
(CASES 38, 39, 44, 48, 51).
"""

import asyncio
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import pytest

from metershipper import shipper as shipper_module
from metershipper.batcher import Batch, Span
from metershipper.books import Books
from metershipper.config import OpenMeter, Retry
from metershipper.isolate import MAX_REQUESTS_IN_A_ROW
from metershipper.openmeter import Endpoint
from metershipper.retry import Answer, Verdict, classify
from metershipper.shipper import Posts, Shipper

OK = Answer(Verdict.ACCEPTED, "HTTP 204")
DOWN = Answer(Verdict.RETRY, "HTTP 503 (overloaded)")
NO_TOKEN = Answer(Verdict.NEEDS_A_PERSON, "HTTP 401: the token is missing or wrong")
AT_ONCE = Retry(initial_delay_seconds=1e-6, max_delay_seconds=1e-6)
LATER = Retry(initial_delay_seconds=1000, max_delay_seconds=1000)


def batch(number: int) -> Batch:
    return Batch(b'[{"id":"%d"}]' % number, 1, [])


def never_refused(refused: Batch, answer: Answer) -> None:
    raise AssertionError(f"{refused.body!r} was refused: {answer.reason}")


class Scripted:
    """An endpoint that gives these answers, then accepts everything; keeps what came."""

    def __init__(self, answers: Iterable[Answer] = ()) -> None:
        self._answers = iter(answers)
        self.bodies: list[bytes] = []

    async def post(self, body: bytes) -> Answer:
        self.bodies.append(body)
        await asyncio.sleep(0)
        return next(self._answers, OK)


class Held:
    """An endpoint that accepts when it is told to; knows how many posts wait."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self.waiting = 0
        self.most = 0
        self.all_here = asyncio.Event()
        self.release = asyncio.Event()

    async def post(self, body: bytes) -> Answer:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        if self.waiting == self._wanted:
            self.all_here.set()
        await self.release.wait()
        self.waiting -= 1
        return OK


async def deliver(
    endpoint: Posts, batches: Sequence[Batch], *, workers: int = 1, retry: Retry = AT_ONCE
) -> list[Batch]:
    """Ship all batches, then stop; what was accepted, in order."""
    queue: asyncio.Queue[Batch] = asyncio.Queue()
    accepted: list[Batch] = []
    all_accepted = asyncio.Event()

    def on_accepted(each: Batch) -> None:
        accepted.append(each)
        if sum(each.events for each in accepted) == sum(each.events for each in batches):
            all_accepted.set()

    shipper = Shipper(endpoint, retry, queue, on_accepted, never_refused, workers)
    for each in batches:
        queue.put_nowait(each)
    tasks = [asyncio.create_task(shipper.work()) for _ in range(workers)]
    tasks.append(asyncio.create_task(shipper.work_aside()))
    async with asyncio.timeout(20):
        await all_accepted.wait()
        await queue.join()
    for task in tasks:
        task.cancel()
    assert all(
        isinstance(each, asyncio.CancelledError) for each in await asyncio.gather(*tasks, return_exceptions=True)
    )
    return accepted


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [f"{record.levelname} {record.getMessage()}" for record in caplog.records if record.name.startswith("meter")]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, logger="metershipper")
    return caplog


# --- delivery


def test_batches_are_delivered_in_order_and_reported_once_each() -> None:
    batches = [batch(number) for number in range(20)]
    endpoint = Scripted()
    accepted = asyncio.run(deliver(endpoint, batches))
    assert [id(each) for each in accepted] == [id(each) for each in batches]
    assert endpoint.bodies == [each.body for each in batches]


@pytest.mark.parametrize("answer", [DOWN, NO_TOKEN, Answer(Verdict.RETRY, "no answer within 10 s")])
def test_there_is_no_give_up(answer: Answer) -> None:
    """CASES 39, 44: each try sends the same bytes, so the same ids; the batch is reported when it is accepted."""
    endpoint = Scripted([answer] * 50)
    one = batch(1)
    assert asyncio.run(deliver(endpoint, [one])) == [one]
    assert endpoint.bodies == [one.body] * 51


def test_a_batch_is_reported_after_its_acceptance_and_before_the_next_is_sent() -> None:
    """Order to protect: accepted, then reported, then the next."""
    story: list[str] = []

    class Telling:
        def __init__(self) -> None:
            self._answers = iter([DOWN, NO_TOKEN, OK, OK])

        async def post(self, body: bytes) -> Answer:
            answer = next(self._answers)
            story.append(f"{answer.verdict.name} {body.decode()}")
            return answer

    async def run() -> None:
        queue: asyncio.Queue[Batch] = asyncio.Queue()
        shipper = Shipper(
            Telling(), AT_ONCE, queue, lambda each: story.append(f"reported {each.body.decode()}"), never_refused, 1
        )
        for number in (1, 2):
            queue.put_nowait(batch(number))
        task = asyncio.create_task(shipper.work())
        await queue.join()
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(run())
    one, two = '[{"id":"1"}]', '[{"id":"2"}]'
    assert story == [
        f"RETRY {one}",
        f"NEEDS_A_PERSON {one}",
        f"ACCEPTED {one}",
        f"reported {one}",
        f"ACCEPTED {two}",
        f"reported {two}",
    ]


def test_a_batch_that_is_refused_does_not_hold_up_the_others() -> None:
    class Refusing(Scripted):
        async def post(self, body: bytes) -> Answer:
            await super().post(body)
            others_done = len(set(self.bodies)) == 10
            return DOWN if body == batch(0).body and not others_done else OK

    accepted = asyncio.run(deliver(Refusing(), [batch(number) for number in range(10)], workers=2))
    assert sorted(each.body for each in accepted) == [batch(number).body for number in range(10)]
    assert accepted[0].body != batch(0).body


@pytest.mark.parametrize("workers", [1, 4, 64])
def test_as_many_are_in_flight_as_there_are_workers_and_no_more(workers: int) -> None:
    async def run() -> Held:
        endpoint = Held(workers)
        shipping = asyncio.create_task(deliver(endpoint, [batch(n) for n in range(workers + 3)], workers=workers))
        async with asyncio.timeout(5):
            await endpoint.all_here.wait()
        endpoint.release.set()
        assert len(await shipping) == workers + 3
        return endpoint

    assert asyncio.run(run()).most == workers


@pytest.mark.parametrize("seed", range(3))
def test_through_random_failures_each_batch_is_accepted_exactly_once(seed: int) -> None:
    """Over real HTTP (CASES 38, 48): refusals, resets before and after the server kept it, silence. What is reported
    was kept, each batch is reported once, and what came twice came with the same bytes.
    """
    random_ = random.Random(seed)
    kept: list[bytes] = []
    batches = [batch(number) for number in range(60)]

    serving: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                body = await reader.readexactly(length)
                what = random_.choice(["keep", "keep", "refuse", "reset", "keep, then reset", "keep, then hang"])
                if "keep" in what:
                    kept.append(body)
                if "reset" in what:
                    return writer.transport.abort()
                if "hang" not in what:
                    status = b"204 X" if what == "keep" else random_.choice([b"500 X", b"401 X", b"404 X", b"200 X"])
                    answer = b"<html>" if status == b"200 X" else b""
                    writer.write(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(answer), answer))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    async def run() -> list[Batch]:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/api/v1/events"
            async with Endpoint(url, OpenMeter(timeout_seconds=0.05)) as endpoint:
                accepted = await deliver(endpoint, batches, workers=4)
            await asyncio.wait(serving)
            return accepted

    accepted = asyncio.run(run())
    assert sorted(each.body for each in accepted) == sorted(each.body for each in batches)
    assert {each.body for each in accepted} == set(kept)
    assert len(kept) > len(batches)  # some were kept twice: by the same id, so billed once


# --- stopping (CASES 51)


async def stuck(where: str) -> tuple[Shipper, Awaitable[Any], list[Batch], "asyncio.Queue[Batch]"]:
    """A shipper that waits in one of the places where it can, and what comes when it is there."""
    queue: asyncio.Queue[Batch] = asyncio.Queue()
    accepted: list[Batch] = []
    if where == "queue":
        return Shipper(Scripted(), LATER, queue, accepted.append, never_refused, 1), asyncio.sleep(0), accepted, queue
    queue.put_nowait(batch(1))
    if where == "post":
        held = Held(1)
        return Shipper(held, LATER, queue, accepted.append, never_refused, 1), held.all_here.wait(), accepted, queue
    refused = asyncio.Event()

    class Refusing:
        async def post(self, body: bytes) -> Answer:
            refused.set()
            return DOWN

    return Shipper(Refusing(), LATER, queue, accepted.append, never_refused, 1), refused.wait(), accepted, queue


@pytest.mark.parametrize("where", ["queue", "post", "wait for the next try"])
def test_a_cancellation_is_not_swallowed_and_reports_nothing(where: str) -> None:
    async def run() -> None:
        shipper, there, accepted, queue = await stuck(where)
        task = asyncio.create_task(shipper.work())
        await there
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=5)
        assert task.cancelled()
        assert accepted == []
        if where != "queue":
            with pytest.raises(TimeoutError):  # what was in flight is still owed
                await asyncio.wait_for(queue.join(), 0.01)

    asyncio.run(run())


def test_an_error_in_the_report_is_not_swallowed() -> None:
    """A batch that could not be settled must not count as done."""

    def fail(_: Batch) -> None:
        raise LookupError("no such span")

    async def run() -> None:
        queue: asyncio.Queue[Batch] = asyncio.Queue()
        queue.put_nowait(batch(1))
        await Shipper(Scripted(), AT_ONCE, queue, fail, never_refused, 1).work()

    with pytest.raises(LookupError, match="no such span"):
        asyncio.run(run())


# --- the log


def test_an_outage_is_told_once_with_its_reason_and_its_end(log: pytest.LogCaptureFixture) -> None:
    asyncio.run(deliver(Scripted([DOWN] * 50), [batch(1), batch(2)]))
    assert lines(log) == [
        "WARNING not delivered: HTTP 503 (overloaded); nothing is lost, trying again (tries 1, for 0 s)",
        "INFO delivering again after 50 failed tries in 0 s",
    ]


def test_what_a_person_must_look_into_is_an_error(log: pytest.LogCaptureFixture) -> None:
    asyncio.run(deliver(Scripted([NO_TOKEN] * 5), [batch(1)]))
    assert lines(log)[0] == (
        "ERROR not delivered: HTTP 401: the token is missing or wrong; nothing is lost, trying again (tries 1, for 0 s)"
    )


def test_each_new_kind_of_trouble_is_told(log: pytest.LogCaptureFixture) -> None:
    kinds = [DOWN, NO_TOKEN, Answer(Verdict.RETRY, "the connection was refused: nothing listens there")]
    asyncio.run(deliver(Scripted(kinds * 10), [batch(1)]))
    told = lines(log)
    assert [each.reason in line for each, line in zip(kinds, told, strict=False)] == [True] * 3
    assert len(told) == 4


def test_the_same_trouble_in_ever_new_words_is_told_once(log: pytest.LogCaptureFixture) -> None:
    """A gateway puts a new request id into each of its refusals (CASES 74)."""
    answers = [classify(500, "application/json", f'{{"request_id": "{number}"}}') for number in range(100)]
    asyncio.run(deliver(Scripted(answers), [batch(1)]))
    told = lines(log)
    assert len(told) == 2
    assert '"request_id": "0"' in told[0]


def test_trouble_that_goes_on_is_told_again_from_time_to_time(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipper_module, "REPEAT_LOG_SECONDS", 0.0)
    asyncio.run(deliver(Scripted([DOWN] * 3), [batch(1)]))
    assert [line.partition("trying again ")[2] for line in lines(log)[:3]] == [
        "(tries 1, for 0 s)",
        "(tries 2, for 0 s)",
        "(tries 3, for 0 s)",
    ]


def test_a_second_outage_soon_after_the_first_does_not_flood_the_log(log: pytest.LogCaptureFixture) -> None:
    """An endpoint that fails every other time says it once, and the end of it once."""
    asyncio.run(deliver(Scripted([DOWN, OK] * 100), [batch(number) for number in range(100)]))
    assert len(lines(log)) == 2


def test_a_healthy_endpoint_is_not_mentioned(log: pytest.LogCaptureFixture) -> None:
    asyncio.run(deliver(Scripted(), [batch(number) for number in range(10)]))
    assert lines(log) == []


def test_waits_grow_to_their_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """CASES 39: capped, jittered. The waits are those of `retry`, which has its own tests."""
    waits: list[float] = []
    real_sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds:
            waits.append(seconds)
        await real_sleep(0)

    monkeypatch.setattr(asyncio, "sleep", note)
    retry = Retry(initial_delay_seconds=0.5, max_delay_seconds=8)
    asyncio.run(deliver(Scripted([DOWN] * 300), [batch(1)], retry=retry))
    bounds = [min(8, 0.5 * 2**number) for number in range(300)]
    assert len(waits) == 300
    assert all(0 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))
    assert max(waits[10:]) > 4
    assert len(set(waits)) == 300  # no two senders keep in step


# --- refusals, pauses, overload (CASES 40-45)

REFUSED = Answer(Verdict.REFUSED, "HTTP 400: the endpoint refuses an event of this batch (no)", 400, "no")
BUSY = Answer(Verdict.SLOW_DOWN, "HTTP 429", 429)
BROKEN = Answer(Verdict.RETRY, "HTTP 500", 500)


def batch_of(*ids: int) -> Batch:
    events = b",".join(b'{"id":"%d"}' % number for number in ids)
    return Batch(b"[" + events + b"]", len(ids), [(Span(1, 1, b"", Books(), [], len(ids)), len(ids))])


def ids_in(body: bytes) -> list[str]:
    return [str(event["id"]) for event in json.loads(body)]


class Judging:
    """An endpoint whose answer depends on what it gets; keeps what came, and how much of it at the same time."""

    def __init__(self, answer_of: Callable[[list[str]], Answer]) -> None:
        self.answer_of = answer_of
        self.got: list[list[str]] = []
        self.under_way = 0
        self.most = 0

    async def post(self, body: bytes) -> Answer:
        ids = ids_in(body)
        self.got.append(ids)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.under_way -= 1
        return self.answer_of(ids)


async def settle(
    endpoint: Posts, batches: Sequence[Batch], *, workers: int = 1, retry: Retry = AT_ONCE
) -> tuple[list[str], list[str], Shipper]:
    """Ship all batches until each event is accepted or refused: which were what, in order."""
    queue: asyncio.Queue[Batch] = asyncio.Queue()
    accepted: list[str] = []
    refused: list[str] = []
    done = asyncio.Event()

    def note(into: list[str], each: Batch) -> None:
        into += ids_in(each.body)
        if len(accepted) + len(refused) == sum(each.events for each in batches):
            done.set()

    shipper = Shipper(
        endpoint, retry, queue, lambda each: note(accepted, each), lambda each, _: note(refused, each), workers
    )
    for each in batches:
        queue.put_nowait(each)
    tasks = [asyncio.create_task(work()) for work in (*[shipper.work] * workers, shipper.work_aside)]
    async with asyncio.timeout(20):
        await done.wait()
        await queue.join()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return accepted, refused, shipper


def test_one_bad_event_costs_only_itself_and_is_told_once(log: pytest.LogCaptureFixture) -> None:
    """Case 43: with as few requests as halving takes, and no event in the log."""
    endpoint = Judging(lambda ids: REFUSED if {"17", "40"} & {*ids} else OK)
    accepted, refused, _ = asyncio.run(settle(endpoint, [batch_of(*range(n, n + 25)) for n in (0, 25, 50, 75)]))
    assert (sorted(refused), len(accepted), len(set(accepted))) == (["17", "40"], 98, 98)
    assert len(endpoint.got) < 30
    (told,) = lines(log)
    assert told.startswith(
        "ERROR 1 events refused by the endpoint and kept as dead letters, the last one with HTTP 400"
    )
    assert '"id"' not in told


def test_an_event_is_not_convicted_by_a_server_that_accepts_nothing() -> None:
    """Case 43: neither before the server accepts an empty batch, nor for what it said before that."""
    tries = iter(range(1000))
    endpoint = Judging(lambda ids: REFUSED if next(tries) < 20 else OK)
    accepted, refused, _ = asyncio.run(settle(endpoint, [batch_of(1)]))
    assert (accepted, refused) == (["1"], [])
    assert [] in endpoint.got


def test_a_single_bad_event_is_refused_when_an_empty_batch_is_accepted() -> None:
    endpoint = Judging(lambda ids: REFUSED if ids else OK)
    assert asyncio.run(settle(endpoint, [batch_of(1)]))[:2] == ([], ["1"])
    assert endpoint.got == [["1"], [], ["1"]]


@pytest.mark.parametrize("workers", [1, 4])
def test_hopeless_events_do_not_keep_others_waiting(workers: int) -> None:
    """Case 40: more events that always fail than there are workers; all others pass, and what passes convicts them."""
    poison = {str(number) for number in range(0, 300, 30)}
    endpoint = Judging(lambda ids: BROKEN if poison & {*ids} else OK)

    async def run() -> tuple[set[str], list[str]]:
        queue: asyncio.Queue[Batch] = asyncio.Queue(maxsize=1)
        accepted: set[str] = set()
        refused: list[str] = []
        shipper = Shipper(
            *(endpoint, AT_ONCE, queue, lambda each: accepted.update(ids_in(each.body))),
            *(lambda each, _: refused.extend(ids_in(each.body)), workers),
        )
        tasks = [asyncio.create_task(work()) for work in (*[shipper.work] * workers, shipper.work_aside)]
        async with asyncio.timeout(20):
            number = 0
            while len(refused) < len(poison) or number < 300:
                await queue.put(batch_of(number, number + 1, number + 2))
                number += 3
            await queue.join()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return accepted, refused

    accepted, refused = asyncio.run(run())
    assert sorted(refused) == sorted(poison)
    assert len(accepted & {str(number) for number in range(300)}) == 290


def test_while_a_person_is_needed_one_asks_and_all_others_wait() -> None:
    """Case 44: no stampede of refused tries; ready again by itself."""
    many_tries = asyncio.Event()
    most: list[int] = []

    def answer_of(ids: list[str]) -> Answer:
        if len(endpoint.got) == 100:
            endpoint.most = 0
        if len(endpoint.got) == 200:
            most.append(endpoint.most)
            many_tries.set()
        return NO_TOKEN if len(endpoint.got) <= 300 else OK

    endpoint = Judging(answer_of)
    story: list[tuple[bool, str | None]] = []

    async def run() -> list[str]:
        queue: asyncio.Queue[Batch] = asyncio.Queue()
        accepted: list[str] = []
        shipper = Shipper(endpoint, AT_ONCE, queue, lambda each: accepted.extend(ids_in(each.body)), never_refused, 8)
        for number in range(40):
            queue.put_nowait(batch_of(number))
        tasks = [asyncio.create_task(shipper.work()) for _ in range(8)]
        async with asyncio.timeout(20):
            await many_tries.wait()
            story.append((shipper.health.is_ready, shipper.health.reason))
            assert len({tuple(ids) for ids in endpoint.got[8:200]}) == 1, "one batch asks"
            await queue.join()
        story.append((shipper.health.is_ready, shipper.health.reason))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return accepted

    assert sorted(asyncio.run(run()), key=int) == [str(number) for number in range(40)]
    assert story == [(False, NO_TOKEN.reason), (True, None)]
    assert most == [1]


def test_an_overloaded_server_gets_less_at_the_same_time_and_then_more() -> None:
    """Case 41: additive increase, multiplicative decrease."""
    answers = iter([BUSY] * 1)
    endpoint = Judging(lambda ids: next(answers, OK))
    _, _, shipper = asyncio.run(settle(endpoint, [batch_of(number) for number in range(8)], workers=8))
    assert shipper._pace.limit in (4, 5)
    endpoint = Judging(lambda ids: OK)
    *_, shipper = asyncio.run(settle(endpoint, [batch_of(number) for number in range(100)], workers=8))
    assert (endpoint.most, shipper._pace.limit) == (8, 8)


def test_nobody_sends_while_the_server_wants_to_be_left_alone() -> None:
    """Case 41: Retry-After holds for all workers."""
    times: list[float] = []
    answers = iter([Answer(Verdict.SLOW_DOWN, "HTTP 503", 503, retry_after_seconds=0.3)])

    class Timed:
        async def post(self, body: bytes) -> Answer:
            times.append(time.monotonic())
            return next(answers, OK)

    asyncio.run(settle(Timed(), [batch_of(number) for number in range(5)], workers=1))
    assert times[1] - times[0] >= 0.3
    assert times[-1] - times[1] < 0.3


def test_a_server_that_refuses_everything_is_not_hammered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 43: a rest after so many requests in a row, the longer the less comes of it."""
    waits: list[float] = []
    real_sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds:
            waits.append(seconds)
        await real_sleep(0)

    monkeypatch.setattr(asyncio, "sleep", note)
    endpoint = Judging(lambda ids: REFUSED if ids else OK)
    _, refused, _ = asyncio.run(settle(endpoint, [batch_of(*range(500))], retry=LATER))
    assert len(refused) == 500
    assert len(endpoint.got) <= 2 * 500 + 2
    assert len(waits) == (len(endpoint.got) - 2) // MAX_REQUESTS_IN_A_ROW
