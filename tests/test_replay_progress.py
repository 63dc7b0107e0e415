"""What a replay says of how far it is: never how long it takes while nobody answers."""

from metershipper.replay_outcome import SILENT_SECONDS, Tally
from metershipper.replay_report import pace_of

NOON = 1_790_000_000.0 // 86400 * 86400 + 43200


def test_an_endpoint_that_does_not_answer_is_waited_for_from_what_it_was_sent_on() -> None:
    tally = Tally(1000)
    assert tally.silent_since(NOON) is None  # it was sent nothing
    tally.posted(5, NOON)
    tally.posted(5, NOON + 1)
    assert tally.silent_since(NOON + SILENT_SECONDS - 0.1) is None
    assert tally.silent_since(NOON + 100) == NOON
    tally.answered(5, NOON + 100)
    assert tally.silent_since(NOON + 101) is None
    assert tally.silent_since(NOON + 200) == NOON + 100
    tally.answered(5, NOON + 200)
    assert tally.silent_since(NOON + 300) is None  # it owes no answer
    tally.posted(1, NOON + 300)
    assert tally.silent_since(NOON + 301) is None


def test_while_it_is_waited_for_no_time_is_promised() -> None:
    tally = Tally(1000, read_bytes=500, entries=20, events=40, acknowledged=30)
    tally.posted(10, NOON)
    assert pace_of(tally, 10.0, NOON + 1) == "about 10 s left, 30 acknowledged, 2 entries/s, 4 events/s"
    waiting = pace_of(tally, 100.0, NOON + 90)
    assert waiting.startswith("waiting for the endpoint since 2026-09-2") and "12:00:00 UTC" in waiting
    assert "left" not in waiting and "30 acknowledged" in waiting
