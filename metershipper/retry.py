"""What an answer of the endpoint means, and how long to wait before the next try.

Pure: randomness and the time are arguments.
"""

import math
import re
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum

import msgspec

ACCEPTED_STATUSES = frozenset({200, 202, 204})
TRANSIENT_STATUSES = frozenset({408, 425})
OVERLOAD_STATUSES = frozenset({429, 503})
REFUSAL_STATUSES = frozenset({400, 422})
TOO_LARGE_STATUS = 413
MAX_SHOWN_CHARACTERS = 200
MAX_KEPT_CHARACTERS = 1000
# A server that asks for more patience than this gets this much: OpenMeter closes an invoice an hour after its period.
MAX_RETRY_AFTER_SECONDS = 300.0


class Verdict(Enum):
    """What to do with a batch after an answer. There is no verdict that drops it."""

    ACCEPTED = "accepted"
    RETRY = "retry"  # passes by itself: the network, 408, 425, 5xx
    SLOW_DOWN = "slow down"  # 429, 503: passes by itself, the sooner the less is sent at the same time
    REFUSED = "refused"  # 400, 422: an event of this batch is at fault
    TOO_LARGE = "too large"  # 413
    NEEDS_A_PERSON = "needs a person"  # 3xx, other 4xx, or a page in place of an answer: tried again all the same


@dataclass(frozen=True, slots=True)
class Answer:
    """One try: the verdict, and in words what came back and what to do about it. Never holds a token.

    `status`: of HTTP, None when none came. `words`: what the server said, one line. `retry_after_seconds`: how long it
    asks to wait, within bounds. `suspects`: places in the batch, from 0, of the events it says are at fault.
    """

    verdict: Verdict
    reason: str
    status: int | None = None
    words: str = ""
    retry_after_seconds: float | None = None
    suspects: tuple[int, ...] = ()

    @property
    def refusal(self) -> str:
        """The server's status and words, for the dead letter of an event it does not take."""
        return f"HTTP {self.status}: {self.words}" if self.words else self.reason


def classify(status: int, content_type: str, body: str, retry_after_seconds: float | None = None) -> Answer:
    """The meaning of an HTTP answer to an ingest request.

    Only 200, 202 and 204 with an empty or JSON body mean accepted (OpenMeter v1 answers 204, v3 202): a redirect or a
    page from a proxy in between is no acknowledgement, however good its status looks.
    """
    if status in ACCEPTED_STATUSES:
        if not body.strip() or "json" in content_type.lower():
            return Answer(Verdict.ACCEPTED, f"HTTP {status}", status)
        return Answer(
            Verdict.NEEDS_A_PERSON,
            f"HTTP {status} with a {one_line(content_type) or 'body'} that OpenMeter does not send: "
            "something else answers at ingest_endpoint",
            status,
        )
    words = one_line(body, MAX_KEPT_CHARACTERS)
    if status in OVERLOAD_STATUSES:
        return Answer(Verdict.SLOW_DOWN, f"HTTP {status}{_said(body)}", status, words, retry_after_seconds)
    if status in TRANSIENT_STATUSES or status >= 500:
        return Answer(Verdict.RETRY, f"HTTP {status}{_said(body)}", status, words, retry_after_seconds)
    verdict = Verdict.NEEDS_A_PERSON
    suspects: tuple[int, ...] = ()
    if status in REFUSAL_STATUSES:
        verdict, suspects = Verdict.REFUSED, suspects_in(body)
    elif status == TOO_LARGE_STATUS:
        verdict = Verdict.TOO_LARGE
    return Answer(verdict, f"HTTP {status}: {_advice(status)}{_said(body)}", status, words, None, suspects)


def _advice(status: int) -> str:
    if 300 <= status < 400:
        return "a redirect, which is never followed: write the final URL into ingest_endpoint"
    return {
        400: "the endpoint refuses an event of this batch",
        401: "the token is missing or wrong: replace the token file, it is read again at every try",
        403: "the token may not ingest events: replace the token file, it is read again at every try",
        404: "there is no ingest endpoint at this path: correct ingest_endpoint",
        405: "there is no ingest endpoint at this path: correct ingest_endpoint",
        407: "the proxy wants credentials: they belong into the URL in HTTPS_PROXY or HTTP_PROXY",
        413: "the batch is too large for the endpoint: lower openmeter.batch.max_bytes",
        422: "the endpoint refuses an event of this batch",
    }.get(status, "not understood")


class _InvalidParameter(msgspec.Struct):
    field: str = ""


class _Problem(msgspec.Struct):
    """A refusal of OpenMeter: v1 tells the first fault in words, v3 all of them by field."""

    detail: str = ""
    invalid_parameters: list[_InvalidParameter] = []


# v3: "3.subject"; v1: "/3/subject: ...", or `... Error at "/3/subject": ...` in longer words.
_V3_FIELD = re.compile(r"(?:body\.)?(\d{1,9})(?:\.|$)", re.ASCII)
_V1_DETAIL = re.compile(r'(?:^|["\s])/(\d{1,9})(?=[/":\s]|$)', re.ASCII)


def suspects_in(body: str) -> tuple[int, ...]:
    """The places, from 0, of the events that a refusal points at; empty when it points at none."""
    try:
        problem = msgspec.json.decode(body.encode("utf-8", "replace"), type=_Problem)
    except (msgspec.DecodeError, RecursionError):
        return ()
    fields = [_V3_FIELD.match(parameter.field) for parameter in problem.invalid_parameters]
    found = [match for match in fields if match] or [match for match in [_V1_DETAIL.search(problem.detail)] if match]
    return tuple(sorted({int(match[1]) for match in found}))


def retry_after_seconds(value: str | None, now: float) -> float | None:
    """The header Retry-After as seconds from now, 0 to `MAX_RETRY_AFTER_SECONDS`; None when it is missing or nonsense.

    Args: `value`, a number of seconds or an HTTP date; `now`, seconds since the epoch by the clock that wrote the date:
    the server's (its header Date) where it tells, else ours.
    """
    if value is None:
        return None
    try:
        seconds = float(value) if re.fullmatch(r"\s*-?[\d.]{1,20}\s*", value, re.ASCII) else _http_date(value) - now
    except ValueError:
        return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)


def http_date(value: str | None, otherwise: float) -> float:
    """An HTTP date as seconds since the epoch; `otherwise` when there is none."""
    try:
        return otherwise if value is None else _http_date(value)
    except ValueError:
        return otherwise


def _http_date(value: str) -> float:
    try:
        return parsedate_to_datetime(value).timestamp()
    except (TypeError, IndexError, OverflowError) as error:  # the parser's answers to nonsense, beside ValueError
        raise ValueError("not a date") from error


def one_line(text: str, characters: int = MAX_SHOWN_CHARACTERS) -> str:
    """What others wrote, on one line and bounded: it goes to a log."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:characters]


def _said(body: str) -> str:
    """The server's own words, for a log."""
    words = one_line(body)
    return f" ({words})" if words else ""


def delay_seconds(attempt: int, initial_seconds: float, max_seconds: float, random: float) -> float:
    """How long to wait after the failed try number `attempt` (from 1): exponential, capped, with full jitter.

    `random` is in [0, 1). The exponent is bounded so that a try in the thousands does not overflow.
    """
    ceiling = min(max_seconds, initial_seconds * 2.0 ** min(attempt - 1, 60))
    return ceiling * random
