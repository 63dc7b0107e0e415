"""Which part of the usage a replay is about: a period, a subject, or everything. Pure.

All events of an entry share time and subject, so that an entry is in a scope as a whole. A scope has one canonical
text, by which a filtered replay finds what it delivered before.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from metershipper.books import Skip
from metershipper.errors import UsageError

# Events carry times between 2001 and 2106 (see `mapper`); beyond them a bound excludes nothing, or everything.
_EARLIEST, _LATEST = 0.0, 4_294_967_296.0


@dataclass(frozen=True, slots=True)
class Scope:
    """Events at or after `since` and before `until`, of one `subject`; None: no such bound.

    The bounds are written as an event's time is: RFC 3339 in UTC with milliseconds, so that they compare as text.
    """

    since: str | None = None
    until: str | None = None
    subject: str | None = None

    @classmethod
    def of(cls, since_seconds: float | None, until_seconds: float | None, subject: str | None) -> "Scope":
        """A scope by seconds since the epoch. Raises: UsageError when nothing can be in it."""
        if since_seconds is not None and until_seconds is not None and until_seconds <= since_seconds:
            raise UsageError("--until is not after --since: nothing lies between")
        if subject == "":
            raise UsageError("--subject: no subject is empty")
        return cls(_text_of(since_seconds), _text_of(until_seconds), subject)

    @classmethod
    def parse(cls, canonical: str | None) -> "Scope":
        """The scope of which this is the text."""
        return cls() if canonical is None else cls(**json.loads(canonical))

    @property
    def canonical(self) -> str | None:
        """Its one text; None for everything."""
        bounds = {"since": self.since, "until": self.until, "subject": self.subject}
        set_ones = {name: value for name, value in bounds.items() if value is not None}
        return json.dumps(set_ones, sort_keys=True) if set_ones else None

    def skip(self, time: str, subject: str) -> Skip | None:
        """Why an entry of this time and subject is not in it; None when it is."""
        if (self.since is not None and time < self.since) or (self.until is not None and time >= self.until):
            return Skip.OUTSIDE_PERIOD
        return Skip.OTHER_SUBJECT if self.subject not in (None, subject) else None


@dataclass(frozen=True, slots=True)
class Sieve:
    """What a replay takes of some lines: what is in its scope, and in none of those `delivered` before."""

    scope: Scope
    delivered: Sequence[Scope] = ()

    def skip(self, time: str, subject: str) -> Skip | None:
        """Why an entry is left out; None when it is taken."""
        reason = self.scope.skip(time, subject)
        if reason is None and any(scope.skip(time, subject) is None for scope in self.delivered):
            return Skip.ALREADY_DELIVERED
        return reason


def _text_of(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    bounded = min(max(seconds, _EARLIEST), _LATEST)
    # Upwards: no event lies between two milliseconds, and a bound in between is after the earlier one.
    milliseconds = math.ceil(round(bounded * 1000, 2))
    whole = datetime.fromtimestamp(milliseconds // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{whole}.{milliseconds % 1000:03d}Z"
