"""What an answer of the endpoint means, and how long to wait before the next try. Pure: randomness is an argument."""

from dataclasses import dataclass
from enum import Enum

ACCEPTED_STATUSES = frozenset({200, 202, 204})
TRANSIENT_STATUSES = frozenset({408, 425, 429})
MAX_SHOWN_CHARACTERS = 200


class Verdict(Enum):
    """What to do with a batch after an answer. There is no verdict that drops it."""

    ACCEPTED = "accepted"
    RETRY = "retry"  # passes by itself: the network, 408, 425, 429, 5xx
    NEEDS_A_PERSON = "needs a person"  # 3xx, 4xx, or a page in place of an answer: tried again all the same


@dataclass(frozen=True, slots=True)
class Answer:
    """One try: the verdict, and in words what came back and what to do about it. Never holds a token."""

    verdict: Verdict
    reason: str


def classify(status: int, content_type: str, body: str) -> Answer:
    """The meaning of an HTTP answer to an ingest request.

    Only 200, 202 and 204 with an empty or JSON body mean accepted (OpenMeter v1 answers 204, v3 202): a redirect or a
    page from a proxy in between is no acknowledgement, however good its status looks.
    """
    if status in ACCEPTED_STATUSES:
        if not body.strip() or "json" in content_type.lower():
            return Answer(Verdict.ACCEPTED, f"HTTP {status}")
        return Answer(
            Verdict.NEEDS_A_PERSON,
            f"HTTP {status} with a {one_line(content_type) or 'body'} that OpenMeter does not send: "
            "something else answers at ingest_endpoint",
        )
    if status in TRANSIENT_STATUSES or status >= 500:
        return Answer(Verdict.RETRY, f"HTTP {status}{_words(body)}")
    return Answer(Verdict.NEEDS_A_PERSON, f"HTTP {status}: {_advice(status)}{_words(body)}")


def _advice(status: int) -> str:
    if 300 <= status < 400:
        return "a redirect, which is never followed: write the final URL into ingest_endpoint"
    return {
        400: "the endpoint refuses an event of this batch",
        401: "the token is missing or wrong",
        403: "the token may not ingest events",
        404: "there is no ingest endpoint at this path",
        405: "there is no ingest endpoint at this path",
        413: "the batch is too large for the endpoint: lower openmeter.batch.max_bytes",
    }.get(status, "not understood")


def one_line(text: str) -> str:
    """What others wrote, on one line and bounded: it goes to a log."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:MAX_SHOWN_CHARACTERS]


def _words(body: str) -> str:
    """The server's own words."""
    words = one_line(body)
    return f" ({words})" if words else ""


def delay_seconds(attempt: int, initial_seconds: float, max_seconds: float, random: float) -> float:
    """How long to wait after the failed try number `attempt` (from 1): exponential, capped, with full jitter.

    `random` is in [0, 1). The exponent is bounded so that a try in the thousands does not overflow.
    """
    ceiling = min(max_seconds, initial_seconds * 2.0 ** min(attempt - 1, 60))
    return ceiling * random
