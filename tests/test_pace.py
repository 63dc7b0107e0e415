"""How much is sent at the same time: less to a server that says it is overloaded, slowly more again (CASES 41)."""

from hypothesis import given
from hypothesis import strategies as st

from metershipper.health import Health
from metershipper.pace import Pace


def test_it_halves_once_for_what_was_sent_together_and_grows_one_by_one() -> None:
    pace = Pace(8)
    for _ in range(8):
        pace.overloaded(10.0, 0.0)
    assert pace.limit == 4
    pace.overloaded(12.0, 0.0)
    assert pace.limit == 2
    grown = []
    for _ in range(60):
        pace.accepted()
        grown.append(pace.limit)
    assert grown[:3] == [2, 2, 3]
    assert grown == sorted(grown) and grown[-1] == 8


def test_nobody_sends_before_the_server_wants_it() -> None:
    pace = Pace(4)
    pace.overloaded(10.0, 30.0)
    pace.overloaded(11.0, 1.0)
    assert pace.hold_until == 40.0


@given(st.integers(1, 64), st.lists(st.one_of(st.none(), st.floats(0, 3)), max_size=200))
def test_the_limit_is_always_between_one_and_the_ceiling(ceiling: int, story: list[float | None]) -> None:
    pace, now = Pace(ceiling), 0.0
    for seconds in story:
        if seconds is None:
            pace.accepted()
        else:
            now += seconds
            pace.overloaded(now, 0.0)
        assert 1 <= pace.limit <= ceiling


def test_health_tells_why_and_since_when() -> None:
    """CASES 44: red with a reason, green by itself."""
    health = Health()
    assert health.is_ready
    health.trouble("HTTP 401", 5.0)
    health.trouble("HTTP 404", 7.0)
    assert (health.is_ready, health.reason, health.since) == (False, "HTTP 404", 5.0)
    health.recovered(9.0)
    health.recovered(11.0)
    assert (health.is_ready, health.since) == (True, 9.0)
