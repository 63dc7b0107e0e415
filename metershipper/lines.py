"""Cutting bytes into whole lines, and what is kept of one that is too long. Pure; offsets are bytes."""

from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

# Up to here a line is read as a whole; what AI plugins log of a request and its answer is well below.
MAX_LINE_BYTES = 16 * 1024 * 1024
KEPT_OF_OVERLONG_LINE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Overlong:
    """A line above the limit, without its newline: its length in bytes, its SHA-256, and its beginning."""

    length: int
    sha256: str
    head: bytes


@dataclass(slots=True)
class Skimmed:
    """A line above the limit, as far as it was read."""

    length: int = 0
    _head: bytes = b""
    _digest: Any = field(default_factory=sha256)

    def add(self, data: bytes) -> None:
        """More of the line."""
        self._head = self._head or data[:KEPT_OF_OVERLONG_LINE_BYTES]
        self.length += len(data)
        self._digest.update(data)

    def ended(self) -> Overlong:
        """The whole line."""
        return Overlong(self.length, self._digest.hexdigest(), self._head)


def whole_lines(data: bytes) -> int:
    """Length of the part of `data` that ends with its last newline; 0 when no line is complete.

    A line is complete with its newline and not before: what a timer would cut off may be half an entry.
    """
    return data.rfind(b"\n") + 1


def split_lines(data: bytes) -> list[bytes]:
    """The lines of `data` without their newlines; the last one may have had none."""
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def first_line(data: bytes) -> bytes:
    """The first complete line with its newline; empty when none is complete."""
    return data[: data.find(b"\n") + 1]
