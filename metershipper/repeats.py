"""Which entries were received a short while ago, so that a batch that Kong sends again costs nothing. Pure; no I/O.

Kong sends a batch again whose answer was slow or lost, byte by byte the same (http-log keeps its entries encoded). An
entry is known by a digest of its bytes. Memory is bounded: of more entries than fit into it the oldest are forgotten
before their time, and then the server knows the repeat by its id.

Kept as tables with open addressing in two arrays, 12 bytes a place: a set of Python's would take six times as much.
"""

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import msgspec

DIGEST_BYTES = 12
# A table is never filled beyond this share, or looking something up takes long.
_FILL = 0.6
_SMALLEST_PLACES, _LARGEST_PLACES = 2**14, 2**20
# All tables together: 48 MiB, for 2.5 million entries.
MAX_PLACES = 4 * _LARGEST_PLACES
# A table takes in what comes within such a part of the window, so that it can go as a whole.
_TABLES_IN_WINDOW = 4

# Of 2 KiB and more hashlib lets other threads run meanwhile; getting the interpreter back then takes up to 5 ms, a
# thousand times as long as the digest.
_SLICE_BYTES = 2047

_split = struct.Struct("<QI").unpack


def digest_of(line: bytes | msgspec.Raw) -> bytes:
    """By what an entry is known. Not shorter than this: a false repeat would be lost usage."""
    view = memoryview(line)
    digest = sha256(view[:_SLICE_BYTES])
    for begin in range(_SLICE_BYTES, len(view), _SLICE_BYTES):
        digest.update(view[begin : begin + _SLICE_BYTES])
    return digest.digest()[:DIGEST_BYTES]


@dataclass(slots=True)
class Table:
    """The digests of some time. `number` tells tables apart; `since` and `until`: seconds of any one clock."""

    number: int
    since: float
    until: float
    places: int = _SMALLEST_PLACES
    used: int = 0
    _low: "array[int]" = field(init=False)
    _high: "array[int]" = field(init=False)

    def __post_init__(self) -> None:
        self._low = array("Q", bytes(8 * self.places))
        self._high = array("I", bytes(4 * self.places))

    @property
    def is_full(self) -> bool:
        """Whether the next digest belongs into another table."""
        return self.used >= self.places * _FILL

    def place_of(self, low: int, high: int) -> int:
        """Where a digest is, or -1 - the place where it belongs."""
        lows, mask = self._low, self.places - 1
        place = low & mask
        while found := lows[place]:
            if found == low and self._high[place] == high:
                return place
            place = (place + 1) & mask
        return -1 - place

    def put(self, place: int, low: int, high: int) -> None:
        """Keep a digest at its free place."""
        self._low[place], self._high[place] = low, high
        self.used += 1

    def strike_out(self, place: int) -> None:
        """Keep the place, so that others are found behind it, but not the digest."""
        self._high[place] ^= 0xFFFFFFFF


@dataclass(slots=True)
class Repeats:
    """The digests of the last `window_seconds`. Times are arguments, of a clock that survives a restart."""

    window_seconds: float
    max_places: int = MAX_PLACES
    tables: list[Table] = field(default_factory=list)

    def expire(self, now: float) -> list[int]:
        """Forget what is older than the window, and make ready to add. Returns the numbers of the tables that went."""
        if not self.tables or not 0 <= now - self.tables[-1].since < self.window_seconds / _TABLES_IN_WINDOW:
            self._open_table(now)
        gone = {table.number for table in self.tables[:-1] if not 0 <= now - table.until <= self.window_seconds}
        places = sum(table.places for table in self.tables if table.number not in gone)
        for table in self.tables[:-1]:
            if places > self.max_places and table.number not in gone:
                gone.add(table.number)
                places -= table.places
        self.tables = [table for table in self.tables if table.number not in gone]
        return sorted(gone)

    def add(self, digest: bytes, now: float) -> int | None:
        """Remember a digest; returns the number of its table, None when it is a repeat. After `expire`."""
        low, high = _numbers(digest)
        for table in self.tables[:-1]:
            if table.place_of(low, high) >= 0:
                return None
        table = self.tables[-1]
        place = table.place_of(low, high)
        if place >= 0:
            return None
        if table.is_full:
            table = self._open_table(now)
            place = table.place_of(low, high)
        table.put(-1 - place, low, high)
        table.until = now
        return table.number

    def forget(self, digest: bytes) -> None:
        """What was just added was not received after all."""
        low, high = _numbers(digest)
        for table in self.tables:
            if (place := table.place_of(low, high)) >= 0:
                table.strike_out(place)

    def restore(self, number: int, digests: Sequence[bytes], until: float) -> None:
        """A table of before a restart, the oldest first."""
        places = _SMALLEST_PLACES
        while len(digests) > places * _FILL:
            places *= 2
        table = Table(number, until - self.window_seconds, until, places)
        for digest in digests:
            low, high = _numbers(digest)
            if (place := table.place_of(low, high)) < 0:
                table.put(-1 - place, low, high)
        self.tables.append(table)

    def _open_table(self, now: float) -> Table:
        last = self.tables[-1] if self.tables else Table(0, now, now)
        places = min(2 * last.places, _LARGEST_PLACES) if last.is_full else _SMALLEST_PLACES
        self.tables.append(Table(last.number + 1, now, now, places))
        return self.tables[-1]


def _numbers(digest: bytes) -> tuple[int, int]:
    low, high = _split(digest)
    return low or 1, high  # 0 marks a free place
