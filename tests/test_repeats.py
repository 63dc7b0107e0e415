"""What was received a short while ago is known again; what was not never is; memory is bounded."""

import struct
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from metershipper import repeats
from metershipper.repeats import DIGEST_BYTES, MAX_PLACES, Repeats, Table, digest_of

WINDOW = 900.0


def digest(number: int) -> bytes:
    return digest_of(b"%d" % number)


def colliding(number: int) -> bytes:
    """Digests that all belong into the same place of a table."""
    return struct.pack("<QI", number << 40, number)


def is_repeat(known: Repeats, line_digest: bytes, now: float) -> bool:
    known.expire(now)
    return known.add(line_digest, now) is None


def places_in(known: Repeats) -> int:
    return sum(table.places for table in known.tables)


@given(lines=st.lists(st.binary(max_size=10_000), unique=True))
def test_a_digest_depends_on_every_byte(lines: list[bytes]) -> None:
    """Also beyond what is hashed in one step."""
    digests = {digest_of(line) for line in lines}
    assert len(digests) == len(lines)
    assert all(len(each) == DIGEST_BYTES for each in digests)
    assert all(digest_of(line) != digest_of(line + b"x") for line in lines)


def test_the_second_time_is_a_repeat_within_the_window() -> None:
    known = Repeats(WINDOW)
    assert not is_repeat(known, digest(1), 0)
    assert is_repeat(known, digest(1), 0)
    assert is_repeat(known, digest(1), WINDOW)
    assert not is_repeat(known, digest(2), WINDOW)


def test_after_the_window_it_is_forgotten() -> None:
    """Its table takes in more for a quarter of the window, and goes as a whole."""
    known = Repeats(WINDOW)
    assert not is_repeat(known, digest(1), 0)
    assert not is_repeat(known, digest(2), WINDOW / 4 - 1)
    assert not is_repeat(known, digest(3), WINDOW)
    assert not is_repeat(known, digest(1), WINDOW * 1.25)
    assert is_repeat(known, digest(3), WINDOW * 1.25)


def test_a_table_that_went_is_named_so_that_its_file_can_go() -> None:
    known = Repeats(WINDOW)
    assert known.expire(0) == []
    first = known.add(digest(1), 0)
    assert known.expire(WINDOW) == []
    assert known.add(digest(2), WINDOW) != first
    assert known.expire(WINDOW + 1) == [first]


@pytest.mark.parametrize("back", [1.0, WINDOW, 10 * WINDOW])
def test_a_clock_that_goes_backwards_never_makes_a_repeat_of_something_new(back: float) -> None:
    known = Repeats(WINDOW)
    assert not any(is_repeat(known, digest(number), 5000 + number) for number in range(100))
    assert not any(is_repeat(known, digest(number), 5000 - back) for number in range(100, 200))
    assert all(is_repeat(known, digest(number), 5000 - back) for number in range(100, 200))


def test_a_window_of_nothing_knows_only_what_comes_at_once() -> None:
    known = Repeats(0.0)
    assert not is_repeat(known, digest(1), 10.0)
    assert not is_repeat(known, digest(1), 10.5)
    assert places_in(known) <= 2 * 2**14


def test_what_was_not_received_after_all_is_no_repeat_and_the_others_stay_known() -> None:
    """Others whose search goes through the same places are still found."""
    known = Repeats(WINDOW)
    known.expire(0)
    for number in range(1, 50):
        known.add(colliding(number), 0)
    for number in range(1, 50, 2):
        known.forget(colliding(number))
    found = [number for number in range(1, 50) if known.add(colliding(number), 0) is None]
    assert found == list(range(2, 50, 2))
    assert all(known.add(colliding(number), 0) is None for number in range(1, 50))
    known.forget(colliding(99))  # never known


def test_digests_of_zeros_are_digests() -> None:
    """A place with zeros is a free one."""
    known = Repeats(WINDOW)
    for each in (bytes(12), bytes(8) + b"\1\0\0\0"):
        assert [is_repeat(known, each, 0) for _ in range(2)] == [False, True]


def test_restored_digests_are_known_for_as_long_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "_SMALLEST_PLACES", 16)
    known = Repeats(WINDOW)
    known.restore(7, [digest(number) for number in range(1000)], until=5000)
    known.restore(9, [digest(number) for number in range(1000, 1010)] * 2, until=5100)
    assert known.expire(5101) == []
    assert all(known.add(digest(number), 5101) is None for number in range(1010))
    assert known.add(digest(2000), 5101) == 10  # a table of its own, so that no file is written to again
    assert known.expire(5000 + WINDOW + 1) == [7]
    assert not is_repeat(known, digest(1), 5000 + WINDOW + 1)
    assert is_repeat(known, digest(1001), 5000 + WINDOW + 1)


def test_memory_is_bounded_and_the_oldest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more entries than fit into it (case 58)."""
    monkeypatch.setattr(repeats, "_SMALLEST_PLACES", 64)
    monkeypatch.setattr(repeats, "_LARGEST_PLACES", 256)
    known = Repeats(WINDOW, max_places=1024)
    gone: list[int] = []
    for number in range(10_000):
        gone += known.expire(float(number) / 100)
        assert known.add(digest(number), float(number) / 100) is not None
        assert places_in(known) <= 1024 + 256
    assert gone == sorted(set(gone))
    assert all(is_repeat(known, digest(number), 100.0) for number in range(9_700, 10_000))
    assert not is_repeat(known, digest(0), 100.0)


def test_all_of_it_takes_what_is_documented() -> None:
    table = Table(1, 0, 0, places=2**14)
    arrays = [value for name in ("_low", "_high") if isinstance(value := getattr(table, name), array)]
    assert sum(each.itemsize * len(each) for each in arrays) == 12 * 2**14
    assert MAX_PLACES * 12 == 48 * 2**20


def test_a_table_is_never_so_full_that_looking_up_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "_SMALLEST_PLACES", 64)
    known = Repeats(WINDOW)
    known.expire(0)
    for number in range(3000):
        known.add(digest(number), 0)
    assert all(table.used <= table.places * 0.6 + 1 for table in known.tables)


# --- a model: when was what last received


class RepeatsModel(RuleBasedStateMachine):
    """Anything in any order. Within three quarters of the window all must be known; after the window and a quarter of
    it nothing may be; what was never received, or taken back, never.
    """

    @initialize()
    def begin(self) -> None:
        self.known = Repeats(WINDOW)
        self.now = 10_000.0
        self.ever: set[int] = set()
        self.received: dict[int, float] = {}  # when; what a clock that was set back made uncertain is not among them
        self.files: dict[int, list[int]] = {}  # number of a table -> what its file holds
        self.written_at: dict[int, float] = {}

    def _expire(self) -> None:
        for number in self.known.expire(self.now):
            self.files.pop(number, None)

    @rule(number=st.integers(0, 40))
    def receive(self, number: int) -> None:
        self._expire()
        table = self.known.add(digest(number), self.now)
        if number not in self.ever:
            assert table is not None
        elif number not in self.received:
            pass
        elif self.now - self.received[number] <= WINDOW:
            assert table is None
        elif self.now - self.received[number] > WINDOW * 1.25:
            assert table is not None
        if table is not None:
            self.ever.add(number)
            self.received[number] = self.now
            self.files.setdefault(table, []).append(number)
            self.written_at[table] = self.now

    @rule(number=st.integers(41, 60))
    def receive_in_vain(self, number: int) -> None:
        self._expire()
        assert self.known.add(digest(number), self.now) is not None
        self.known.forget(digest(number))

    @rule(seconds=st.floats(0.0, WINDOW))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def restart(self) -> None:
        self.known = Repeats(WINDOW)
        for number in sorted(self.files):
            if 0 <= self.now - self.written_at[number] <= WINDOW:
                digests = [digest(each) for each in self.files[number]]
                self.known.restore(number, digests, self.written_at[number])
            else:
                del self.files[number]

    @rule(seconds=st.floats(0.1, 3 * WINDOW))
    def set_clock_back(self, seconds: float) -> None:
        """What was received may be forgotten then, and nothing else is taken for it."""
        self.now -= seconds
        self.received = {}

    @invariant()
    def is_small(self) -> None:
        assert places_in(self.known) <= MAX_PLACES


def test_model() -> None:
    run_state_machine_as_test(RepeatsModel, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))
