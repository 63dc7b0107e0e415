"""Delivers batches until the server accepts them. There is no give-up: usage is money.

Owns the retrying, the waiting, how much is under way at a time, and what is logged about it. Never decides what an
answer means (`retry`) or what to send apart (`isolate`), never speaks HTTP (`openmeter`), and never moves a position:
it only reports what was accepted, and which single events the server refused.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from metershipper.batcher import Batch
from metershipper.config import Retry
from metershipper.health import Health
from metershipper.isolate import MAX_REQUESTS_IN_A_ROW, Delivery, Piece, Step, split, step_after
from metershipper.pace import Pace
from metershipper.retry import Answer, Verdict, delay_seconds

log = logging.getLogger("metershipper.delivery")

# The same trouble is repeated in the log at most this often.
REPEAT_LOG_SECONDS = 30.0
# So many batches of which only hopeless single events are left may wait beside the others without holding them up.
MAX_ASIDE = 100
EMPTY_BATCH = b"[]"


class Posts(Protocol):
    """What the shipper needs of an endpoint."""

    async def post(self, body: bytes) -> Answer:
        """Send one encoded batch."""
        ...


@dataclass(slots=True)
class _Trouble:
    """What is wrong at the moment, so that the log tells it once and then from time to time."""

    tries: int = 0
    since: float = 0.0
    logged: bool = False


class Shipper:
    """Workers that take batches from a bounded queue; as many as may be in flight.

    Args: `on_accepted` gets each batch, or part of one, that the server took; `on_refused` a batch of one event that it
    does not take, with its answer. Both are called once for each event.
    """

    def __init__(
        self,
        endpoint: Posts,
        retry: Retry,
        batches: "asyncio.Queue[Batch]",
        on_accepted: Callable[[Batch], None],
        on_refused: Callable[[Batch, Answer], None],
        max_in_flight: int,
    ) -> None:
        self._endpoint = endpoint
        self._retry = retry
        self._batches = batches
        self._on_accepted = on_accepted
        self._on_refused = on_refused
        self.health = Health()
        self._pace = Pace(max_in_flight)
        self._under_way = 0
        self._line = asyncio.Lock()  # those who wait for their turn, in order
        self._room = asyncio.Event()
        self._open = asyncio.Event()  # clear while one of the workers finds out whether the set-up was put right
        self._open.set()
        self._passed = 0
        self._aside: list[Delivery] = []
        self._put_aside = asyncio.Event()
        self._trouble = _Trouble()
        self._logged_at: dict[str, float] = {}
        self._refused_untold = 0

    async def work(self) -> None:
        """Deliver one batch after the other, until cancelled."""
        while True:
            delivery = Delivery.of(await self._batches.get(), self._passed)
            while delivery.pieces:
                if delivery.is_hopeless and len(self._aside) < MAX_ASIDE:
                    self._aside.append(delivery)
                    self._put_aside.set()
                    break
                await self._next_step(delivery)
            self._batches.task_done()

    async def work_aside(self) -> None:
        """Go on with what was put aside, one post at a time, until cancelled."""
        while True:
            while not self._aside:
                self._put_aside.clear()
                await self._put_aside.wait()
            delivery = min(self._aside, key=lambda each: each.pieces[0].due_at)
            if (wait_seconds := delivery.pieces[0].due_at - time.monotonic()) > 0:
                self._put_aside.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_seconds):
                        await self._put_aside.wait()  # what comes may be due earlier
                continue
            await self._next_step(delivery)
            if not delivery.pieces:
                self._aside.remove(delivery)

    # One batch: pieces are sent until each is accepted or, alone, refused

    async def _next_step(self, delivery: Delivery) -> None:
        """Send the next piece, once it is due, and do what the answer asks for."""
        piece = delivery.pieces[0]
        await self._rest(delivery)
        if (wait_seconds := piece.due_at - time.monotonic()) > 0:
            await asyncio.sleep(wait_seconds)
        passed_before = self._passed
        answer = await self._post(piece.batch.body)
        delivery.pieces.popleft()
        step = step_after(piece, answer, self._passed)
        refused_at_once = step is Step.REFUSE and answer.verdict in (Verdict.REFUSED, Verdict.TOO_LARGE)
        if refused_at_once and passed_before <= delivery.passed_before:
            step = await self._doubt(delivery, piece)
        match step:
            case Step.DONE:
                if piece.is_suspect:
                    delivery.trusts_pointer = False
                self._passed += 1
                delivery.went_through()
                self._on_accepted(piece.batch)
            case Step.REFUSE:
                self._report_refused(answer)
                self._on_refused(piece.batch, answer)
            case Step.SPLIT:
                parts = split(piece, answer, trusts_pointer=delivery.trusts_pointer)
                delivery.pieces.extendleft(reversed(parts))
            case Step.AGAIN:
                delivery.pieces.appendleft(piece)
            case Step.WAIT:
                delivery.requests_in_a_row = 0
                piece.due_at = time.monotonic() + self._wait_seconds(piece.attempts, answer)
                delivery.pieces.append(piece)

    async def _rest(self, delivery: Delivery) -> None:
        """Pause a delivery that makes many requests in a row, the longer the less comes of it."""
        delivery.requests_in_a_row += 1
        if delivery.requests_in_a_row > MAX_REQUESTS_IN_A_ROW:
            delivery.requests_in_a_row = 0
            delivery.rests += 1
            await asyncio.sleep(self._delay_seconds(delivery.rests))

    async def _doubt(self, delivery: Delivery, piece: Piece) -> Step:
        """An event was refused alone, by an endpoint that has accepted nothing since: does it accept anything?

        An empty batch is in order for OpenMeter's v1 and v3 alike, and bills nothing. If it is accepted the event gets
        another try, and what is said then is about the event.
        """
        if (await self._post(EMPTY_BATCH)).verdict is Verdict.ACCEPTED:
            delivery.passed_before = -1
            return Step.AGAIN
        piece.attempts += 1
        piece.failures += 1
        return Step.WAIT

    def _wait_seconds(self, attempt: int, answer: Answer) -> float:
        return (answer.retry_after_seconds or 0.0) + self._delay_seconds(attempt)

    def _delay_seconds(self, attempt: int) -> float:
        # Jitter only spreads the load of many senders; it guards nothing.
        spread = random.random()
        return delay_seconds(attempt, self._retry.initial_delay_seconds, self._retry.max_delay_seconds, spread)

    # One post: when it is its turn, and again for as long as a person is needed

    async def _post(self, body: bytes) -> Answer:
        """Post when there is room. While the set-up is wrong, all wait, and one tries until it was put right."""
        attempt = 0
        try:
            while True:
                await self._turn(probing=attempt > 0)
                try:
                    answer = await self._endpoint.post(body)
                finally:
                    self._under_way -= 1
                    self._room.set()
                self._note(answer)
                if answer.verdict is not Verdict.NEEDS_A_PERSON:
                    return answer
                if attempt or self._open.is_set():
                    attempt += 1
                    self._open.clear()
                    await asyncio.sleep(self._delay_seconds(attempt))
        finally:
            if attempt:
                self._open.set()

    async def _turn(self, *, probing: bool) -> None:
        """Wait until one more may be under way, and count it. First come, first served, but for the one that probes."""
        if probing:
            await self._until_wanted()
        else:
            async with self._line:
                while not self._may_send():
                    await self._open.wait()
                    await self._until_wanted()
                    if self._under_way >= self._pace.limit:
                        self._room.clear()
                        await self._room.wait()
        self._under_way += 1

    def _may_send(self) -> bool:
        is_wanted = time.monotonic() >= self._pace.hold_until
        return self._open.is_set() and is_wanted and self._under_way < self._pace.limit

    async def _until_wanted(self) -> None:
        """Wait as long as the server asked to be left alone."""
        if (wait_seconds := self._pace.hold_until - time.monotonic()) > 0:
            await asyncio.sleep(wait_seconds)

    def _note(self, answer: Answer) -> None:
        now = time.monotonic()
        match answer.verdict:
            case Verdict.ACCEPTED:
                self._pace.accepted()
                self.health.recovered(now)
                self._report_success()
            case Verdict.REFUSED | Verdict.TOO_LARGE:
                pass  # reported when it is known which event it is
            case Verdict.SLOW_DOWN:
                self._pace.overloaded(now, answer.retry_after_seconds or 0.0)
                self._report_trouble(answer)
            case Verdict.RETRY:
                self._report_trouble(answer)
            case Verdict.NEEDS_A_PERSON:
                self.health.trouble(answer.reason, now)
                self._report_trouble(answer)

    # The log: each trouble once, then from time to time, and its end

    def _is_told(self, what: str) -> bool:
        """Whether this was told a short while ago; if not, it is now."""
        now = time.monotonic()
        if now - self._logged_at.get(what, -REPEAT_LOG_SECONDS) < REPEAT_LOG_SECONDS:
            return True
        self._logged_at = {reason: at for reason, at in self._logged_at.items() if now - at < REPEAT_LOG_SECONDS}
        self._logged_at[what] = now
        return False

    def _report_trouble(self, answer: Answer) -> None:
        trouble, now = self._trouble, time.monotonic()
        if not trouble.tries:
            trouble.since = now
        trouble.tries += 1
        if self._is_told(answer.reason.partition(" (")[0]):  # without the server's words, which often hold a request id
            return
        trouble.logged = True
        level = logging.ERROR if answer.verdict is Verdict.NEEDS_A_PERSON else logging.WARNING
        log.log(
            level,
            "not delivered: %s; nothing is lost, trying again (tries %d, for %.0f s)",
            answer.reason,
            trouble.tries,
            now - trouble.since,
            extra={"tries": trouble.tries, "seconds": round(now - trouble.since, 3), "status": answer.status},
        )

    def _report_success(self) -> None:
        trouble = self._trouble
        if trouble.logged:
            seconds = time.monotonic() - trouble.since
            log.info(
                "delivering again after %d failed tries in %.0f s",
                trouble.tries,
                seconds,
                extra={"tries": trouble.tries, "seconds": round(seconds, 3)},
            )
        if trouble.tries:
            self._trouble = _Trouble()

    def _report_refused(self, answer: Answer) -> None:
        self._refused_untold += 1
        if self._is_told("refused"):
            return
        log.error(
            "%d events refused by the endpoint and kept as dead letters, the last one with %s; all others are "
            "delivered, see `metershipper dead-letters list`",
            self._refused_untold,
            answer.reason,
            extra={"events": self._refused_untold, "status": answer.status},
        )
        self._refused_untold = 0
