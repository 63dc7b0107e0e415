"""The rate of events: never above it on average, whatever the size of the batches."""

import pytest

from metershipper.throttle import Throttle


@pytest.mark.parametrize(("rate", "batch"), [(100.0, 500), (1000.0, 100), (0.5, 1), (7.0, 7)])
def test_on_average_the_rate_is_kept(rate: float, batch: int) -> None:
    throttle, now, sent = Throttle(rate), 50.0, 0
    for _ in range(200):
        now += throttle.wait_seconds(batch, now)
        sent += batch
        assert sent - batch <= (now - 50.0) * rate + 1e-6
    assert sent >= (now - 50.0) * rate


def test_the_first_batch_goes_at_once_and_a_pause_gathers_one_second() -> None:
    throttle = Throttle(10.0)
    assert throttle.wait_seconds(500, 0.0) == 0.0
    assert throttle.wait_seconds(1, 0.0) == 50.0
    now = 1000.0
    assert [throttle.wait_seconds(5, now) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
