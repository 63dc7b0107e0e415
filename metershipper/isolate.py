"""Which part of a batch to send apart, so that one bad event costs only itself. Pure; no I/O, no clock.

A batch on its way is a `Delivery` of one piece. A refusal cuts a piece up: the events that the server points at alone,
else in halves, down to one event. A pointer is a hint and no verdict: an event is refused when it was refused alone.
Pieces are cut from the encoded batch, so every event keeps its bytes, and with them its id.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

import msgspec

from metershipper.batcher import Batch, Span
from metershipper.retry import Answer, Verdict

# A piece that fails with 5xx is suspected after this many tries, if others passed meanwhile.
SUSPICIOUS_FAILURES = 3
# A single event is given up to the dead letters after this many failures with others passing before each: about a
# minute at the default delays. A server that fails every other time does not get there.
CONVICTING_FAILURES = 8
# Cutting a batch of n events up takes at most 2n requests; after this many without a rest there is one, so that a
# server that refuses everything is not hammered.
MAX_REQUESTS_IN_A_ROW = 64


class Step(Enum):
    """What to do with a piece after an answer."""

    DONE = "done"
    WAIT = "wait"  # try the same again later
    AGAIN = "again"  # try the same again at once
    SPLIT = "split"
    REFUSE = "refuse"  # one event that the server does not take


@dataclass(slots=True)
class Piece:
    """A part of a batch, and how it fared. `passed`: how many posts had been accepted when it last failed with 5xx."""

    batch: Batch
    attempts: int = 0
    failures: int = 0
    convicting: int = 0
    passed: int | None = None
    canary_sent: bool = False
    is_suspect: bool = False
    due_at: float = 0.0  # seconds on a monotonic clock: not to be tried before

    @property
    def is_single(self) -> bool:
        """Whether there is nothing left to cut."""
        return self.batch.events <= 1


@dataclass(slots=True)
class Delivery:
    """One batch on its way: the pieces of it that are not settled. `passed_before`: posts accepted when it began."""

    pieces: deque[Piece]
    passed_before: int
    trusts_pointer: bool = True
    requests_in_a_row: int = 0
    rests: int = 0

    @classmethod
    def of(cls, batch: Batch, passed: int) -> "Delivery":
        """A batch that was not sent yet."""
        return cls(deque([Piece(batch)]), passed)

    @property
    def is_hopeless(self) -> bool:
        """Whether only single events are left that failed again and again: they need not keep others waiting."""
        return all(piece.is_single and piece.failures >= SUSPICIOUS_FAILURES and piece.due_at for piece in self.pieces)

    def went_through(self) -> None:
        """A piece was accepted, so the server is well: what only waited for that is due at once, oldest first."""
        self.rests = 0
        for piece in self.pieces:
            if not piece.convicting:
                piece.due_at = 0.0


def step_after(piece: Piece, answer: Answer, passed: int) -> Step:
    """What to do with `piece` after `answer`, and note in it how it fared.

    Args: `passed`, how many posts of any batch were accepted so far: what tells an event at fault from a server that
    is down. Without it a piece of several is only parted from its first event, once: should that one pass, the server
    is well.
    """
    if answer.verdict is Verdict.ACCEPTED:
        return Step.DONE
    if answer.verdict in (Verdict.REFUSED, Verdict.TOO_LARGE):
        return Step.REFUSE if piece.is_single else Step.SPLIT
    piece.attempts += 1
    if answer.status is None or answer.status < 500:
        return Step.WAIT
    piece.failures += 1
    others_passed = piece.passed is not None and passed > piece.passed
    piece.passed = passed
    if others_passed:
        piece.convicting += 1
    if piece.is_single:
        return Step.REFUSE if piece.convicting >= CONVICTING_FAILURES else Step.WAIT
    if piece.failures >= SUSPICIOUS_FAILURES and (piece.convicting or not piece.canary_sent):
        return Step.SPLIT
    return Step.WAIT


def split(piece: Piece, answer: Answer, *, trusts_pointer: bool) -> list[Piece]:
    """The parts to send in place of `piece`, of several events: suspects alone and first, else halves."""
    events = piece.batch.events
    if answer.verdict is Verdict.REFUSED and trusts_pointer:
        suspects = sorted({position for position in answer.suspects if position < events})
        if suspects and len(suspects) < events:
            return _apart(piece.batch, suspects)
    if answer.verdict in (Verdict.REFUSED, Verdict.TOO_LARGE):
        return [Piece(part) for part in _halves(piece.batch)]
    if not piece.convicting:
        first, rest = (Piece(part, attempts=piece.attempts) for part in _cut(piece.batch, 1))
        rest.canary_sent, rest.failures, rest.passed = True, piece.failures, piece.passed
        return [first, rest]
    # The suspicion goes on with both: one more failure while the other one passes is enough.
    return [
        Piece(part, failures=SUSPICIOUS_FAILURES - 1, passed=piece.passed, canary_sent=True)
        for part in _halves(piece.batch)
    ]


def _halves(batch: Batch) -> list[Batch]:
    return _cut(batch, batch.events // 2)


def _cut(batch: Batch, count: int) -> list[Batch]:
    return select(batch, [range(count), range(count, batch.events)])


def _apart(batch: Batch, suspects: list[int]) -> list[Piece]:
    rest = sorted(set(range(batch.events)) - set(suspects))
    *alone, others = select(batch, [*([position] for position in suspects), rest])
    return [*(Piece(part, is_suspect=True) for part in alone), Piece(others)]


def select(batch: Batch, parts: Sequence[Sequence[int]]) -> list[Batch]:
    """A batch for each part: the events at these positions, byte for byte, with their shares of spans."""
    events = msgspec.json.decode(batch.body, type=list[msgspec.Raw])
    owners = [span for span, count in batch.shares for _ in range(count)]
    return [
        Batch(
            b"[" + b",".join(bytes(events[position]) for position in part) + b"]",
            len(part),
            _shares([owners[position] for position in part] if owners else []),
        )
        for part in parts
    ]


def _shares(owners: list[Span]) -> list[tuple[Span, int]]:
    runs = [list(run) for _, run in groupby(owners, key=id)]
    return [(run[0], len(run)) for run in runs]
