"""The books: everything read is counted under exactly one outcome. The closed list of names lives here alone.

Pure counting; never reads, writes or logs. The books balance when

    entries = billed + skipped (by reason) + dead-lettered (by reason)
    events = acknowledged + refused

A line is one entry, but for an array of entries and for entries glued together, which count each (see `pieces`).
The first line is about what Kong logged, the second about what the server took. An entry is billed when it became
usage events; should the server take some of them and refuse one, the entry stays billed, and the event is counted as
refused, with its tokens. So what was billed is `acknowledged` events, and of the tokens those that are not refused.

Names appear unchanged in the checkpoint, in `status --json` and in `map`'s summary.
"""

from collections import Counter
from enum import StrEnum
from typing import Any

SKIPPED = "skipped."
DEAD_LETTERS = "dead_letters."
RECEIVED = "received."
CUT_OFF = "received.cut_off."


class Count(StrEnum):
    """What is counted beside the reasons. `lines` and `billed` are part of the balance, the others tell more."""

    LINES = "lines"  # lines read, whatever became of them
    ENTRIES = "entries"  # what those lines held; a line without any entry counts as one
    BILLED = "billed"  # entries that became at least one usage event
    EVENTS = "events"  # usage events
    TOKENS_REQUEST = "tokens.request"  # input tokens in those events
    TOKENS_RESPONSE = "tokens.response"  # output tokens in those events
    FAILED_AI_CALLS = "calls.failed_ai_call"  # failed AI calls whose estimated tokens were not billed
    ACKNOWLEDGED = "events.acknowledged"  # events the server accepted
    REFUSED = "events.refused"  # events it does not take, each kept as a dead letter
    REFUSED_TOKENS_REQUEST = "refused.tokens.request"  # input tokens in those; part of `tokens.request`
    REFUSED_TOKENS_RESPONSE = "refused.tokens.response"  # likewise output tokens
    HASHED_IDS = "ids.hashed"  # billed entries without a request id (Kong before 3.5): id from a hash of the entry
    NUL_BYTES = "bytes.nul"  # NUL bytes that were stepped over: a crash of the writer's machine, or a sparse file


class Skip(StrEnum):
    """Why an entry was not billed, on purpose."""

    BLANK_LINE = "blank_line"
    NOT_AN_ENTRY = "not_an_entry"  # a line of nginx; on a container's output, of any other program
    NO_SUBJECT = "no_subject"  # nobody to bill: no consumer, header or query parameter where the rule looks
    NO_USAGE = "no_usage"  # nothing the rules meter, for instance a plain request where only AI usage is metered
    RULE_DISABLED = "rule_disabled"  # the most specific rule says enabled = false
    FILTERED_METHOD = "filtered_method"  # not among the rule's `methods`; likewise the next three
    FILTERED_STATUS = "filtered_status"
    FILTERED_PATH = "filtered_path"
    FILTERED_WORKSPACE = "filtered_workspace"
    FAILED_AI_CALL = "failed_ai_call"  # only an estimate of a failed AI call (status >= 400, no output)
    STREAM_SESSION = "stream_session"  # a TCP or TLS session of Kong's stream mode: no request in it
    OUTSIDE_PERIOD = "outside_period"  # of a replay: not between --since and --until
    OTHER_SUBJECT = "other_subject"  # of a replay: not of its --subject
    ALREADY_DELIVERED = "already_delivered"  # of a replay: an earlier one, with other bounds, delivered it


class Dead(StrEnum):
    """Why a line was kept aside until a person acts; `REFUSED`: why an event was, of an entry that is billed."""

    NOT_JSON = "not_json"
    NOT_AN_ENTRY = "not_an_entry"
    LINE_TOO_LONG = "line_too_long"
    BAD_STARTED_AT = "bad_started_at"
    BAD_TOKEN_COUNT = "bad_token_count"
    BAD_SUBJECT = "bad_subject"
    NO_SUBJECT = "no_subject"  # with on_missing_subject = "dead_letter"
    REFUSED = "refused"  # an event that the server does not take, counted as `Count.REFUSED`


class Received(StrEnum):
    """What the http-log receiver was asked, as far as it is not entries: those are counted as they are read.

    Nothing of this is part of the balance: a repeat was counted when it came first, a refused batch comes again.
    """

    REQUESTS = "received.requests"  # answered with 200
    REPEATS = "received.repeats"  # entries that were received before, within the window
    UNAUTHORIZED = "received.refused.unauthorized"  # 401
    WRONG_ADDRESS = "received.refused.wrong_address"  # 404 or 405: no request of http-log's
    TOO_LARGE = "received.refused.too_large"  # 413
    NO_ROOM = "received.refused.no_room"  # 503: the spool or its disk is full, or the disk fails
    MALFORMED = "received.cut_off.malformed"  # 400: not HTTP
    TOO_SLOW = "received.cut_off.too_slow"  # header or body did not come in time, or the header is endless
    BROKEN_OFF = "received.cut_off.broken_off"  # the sender went away before the body was complete
    CROWDED_OUT = "received.cut_off.crowded_out"  # more connections than are allowed


class Books(Counter[str]):
    """Counts by name; adding two books is `update`."""

    def skip(self, reason: Skip) -> None:
        """Count one line as not billed on purpose."""
        self[SKIPPED + reason] += 1

    def dead_letter(self, reason: Dead) -> None:
        """Count one line as kept aside."""
        self[DEAD_LETTERS + reason] += 1

    def by_reason(self, prefix: str) -> dict[str, int]:
        """Counts below `prefix` (`SKIPPED` or `DEAD_LETTERS`), by reason, most frequent first."""
        found = {name.removeprefix(prefix): n for name, n in self.items() if n and name.startswith(prefix)}
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: counts by name, reasons as nested tables."""
        plain: dict[str, Any] = {str(count): self[count] for count in Count}
        return plain | {"skipped": self.by_reason(SKIPPED), "dead_letters": self.by_reason(DEAD_LETTERS)}

    @property
    def skipped(self) -> int:
        """Lines not billed on purpose."""
        return sum(self.by_reason(SKIPPED).values())

    @property
    def dead_letters(self) -> int:
        """Lines kept aside."""
        return sum(self.by_reason(DEAD_LETTERS).values())

    @property
    def balanced(self) -> bool:
        """Whether everything read has exactly one outcome."""
        return self[Count.ENTRIES] == self[Count.BILLED] + self.skipped + self.dead_letters

    @property
    def events_balanced(self) -> bool:
        """Whether every event has exactly one outcome: true of what is settled, not of what was only mapped."""
        return self[Count.EVENTS] == self[Count.ACKNOWLEDGED] + self[Count.REFUSED]
