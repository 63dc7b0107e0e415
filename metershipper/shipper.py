"""Delivers batches until the server accepts them. There is no give-up: usage is money.

Owns the retrying, the waiting and what is logged about it. Never decides what an answer means (`retry`), never speaks
HTTP (`openmeter`), and never moves a position: it only reports what was accepted.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from metershipper.batcher import Batch
from metershipper.config import Retry
from metershipper.retry import Answer, Verdict, delay_seconds

log = logging.getLogger("metershipper.delivery")

# The same trouble is repeated in the log at most this often.
REPEAT_LOG_SECONDS = 30.0


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
    """Workers that take batches from a bounded queue; as many as may be in flight."""

    def __init__(
        self,
        endpoint: Posts,
        retry: Retry,
        batches: "asyncio.Queue[Batch]",
        on_accepted: Callable[[Batch], None],
    ) -> None:
        self._endpoint = endpoint
        self._retry = retry
        self._batches = batches
        self._on_accepted = on_accepted
        self._trouble = _Trouble()
        self._logged_at: dict[str, float] = {}

    async def work(self) -> None:
        """Deliver one batch after the other, until cancelled."""
        while True:
            batch = await self._batches.get()
            await self._deliver(batch)
            self._on_accepted(batch)
            self._batches.task_done()

    async def _deliver(self, batch: Batch) -> None:
        attempt = 0
        while True:
            attempt += 1
            answer = await self._endpoint.post(batch.body)
            if answer.verdict is Verdict.ACCEPTED:
                self._report_success()
                return
            self._report_trouble(answer)
            retry = self._retry
            # Jitter only spreads the load of many senders; it guards nothing.
            spread = random.random()
            await asyncio.sleep(delay_seconds(attempt, retry.initial_delay_seconds, retry.max_delay_seconds, spread))

    def _report_trouble(self, answer: Answer) -> None:
        trouble, now = self._trouble, time.monotonic()
        if not trouble.tries:
            trouble.since = now
        trouble.tries += 1
        same = answer.reason.partition(" (")[0]  # without the server's words, which often hold a request id
        if now - self._logged_at.get(same, -REPEAT_LOG_SECONDS) < REPEAT_LOG_SECONDS:
            return
        self._logged_at = {reason: at for reason, at in self._logged_at.items() if now - at < REPEAT_LOG_SECONDS}
        self._logged_at[same] = now
        trouble.logged = True
        level = logging.WARNING if answer.verdict is Verdict.RETRY else logging.ERROR
        log.log(
            level,
            "not delivered: %s; nothing is lost, trying again (tries %d, for %.0f s)",
            answer.reason,
            trouble.tries,
            now - trouble.since,
        )

    def _report_success(self) -> None:
        trouble = self._trouble
        if trouble.logged:
            seconds = time.monotonic() - trouble.since
            log.info("delivering again after %d failed tries in %.0f s", trouble.tries, seconds)
        if trouble.tries:
            self._trouble = _Trouble()
