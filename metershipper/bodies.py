"""What a body of Kong's http-log holds: one entry, or an array of them, as lines for the spool. Pure; bytes in and out.

Nothing is decoded for its meaning and nothing is encoded again: a line is the entry as it came, but for line breaks
between its parts. What can't be told apart is a line as well: it becomes a dead letter where all lines are read. A body
is never refused here, since Kong sends a refused batch again for a while and then drops it, with all that is behind it.

Shapes: an object with `queue.max_batch_size` 1 (the default), otherwise always an array (Kong 3.3, http-log).
"""

import re
from collections.abc import Iterable

import msgspec

from metershipper.pieces import BOM, MAX_SALVAGE_CHARACTERS, next_entry

# Up to here a body is split as a whole, which is the fast way; a larger one as it comes, so that it takes no memory.
WHOLE_BYTES = 1024 * 1024
SPACE = b" \t\r\n"

Line = bytes | msgspec.Raw

_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_MARK = re.compile(rb'["\[\]{},]')
_MARK_IN_STRING = re.compile(rb'["\\]')


class Body:
    """One body, given piece by piece: the lines that are complete after each piece, and the others at the end."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._splitter: _ArraySplitter | None = None
        self.held_bytes = 0  # what is kept in memory at the moment

    def add(self, piece: bytes) -> list[Line]:
        """The next piece of the body."""
        self.held_bytes += len(piece)
        if self._splitter is None:
            before = self.held_bytes - len(piece)
            self._pieces.append(piece)
            if not before <= WHOLE_BYTES < self.held_bytes or not _beginning(b"".join(self._pieces)).startswith(b"["):
                return []
            piece, self._pieces, self._splitter = b"".join(self._pieces), [], _ArraySplitter()
        items = self._splitter.add(piece)
        self.held_bytes = self._splitter.held_bytes
        return _lines(items)

    def end(self) -> list[Line]:
        """The body is complete."""
        if self._splitter is not None:
            return _lines(self._splitter.end())
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces = []
        text = _beginning(body)
        if not text.startswith(b"["):
            return _lines([text])
        try:
            items = _decode_items(text)
        except (msgspec.MsgspecError, RecursionError):
            splitter = _ArraySplitter()
            return _lines([*splitter.add(text), *splitter.end()])
        return _lines(map(bytes, items)) if b"\n" in text else [*items]


def _beginning(body: bytes) -> bytes:
    return body.removeprefix(BOM).lstrip(SPACE)


def _lines(items: Iterable[bytes]) -> list[Line]:
    """Items as lines. Within JSON a line break is only space; a string can't hold one."""
    stripped = (item.strip(SPACE) for item in items)
    return [item.replace(b"\n", b" ") for item in stripped if item]


class _ArraySplitter:
    """The items of an array, told apart by brackets, commas and quotes alone: what is wrong inside one stays there."""

    def __init__(self) -> None:
        self._text = bytearray()  # from the beginning of the item that is not complete yet
        self._at = 0
        self._depth = 0
        self._has_begun = False
        self._in_string = False

    @property
    def held_bytes(self) -> int:
        """The length of what is not complete yet."""
        return len(self._text)

    def add(self, piece: bytes) -> list[bytes]:
        """The items that are complete with this piece."""
        self._text += piece
        items: list[bytes] = []
        begin = 0
        while (mark := self._next_mark()) is not None:
            if mark in b"[{":
                self._has_begun = True
                self._depth += 1
                begin = self._at if self._depth == 1 else begin
            elif self._depth == 1 and mark in b",]":
                with memoryview(self._text) as text:  # an item may be large: it is copied once
                    items.append(bytes(text[begin : self._at - 1]))
                begin = self._at
                self._depth -= mark == b"]"
            elif mark in b"]}":
                self._depth = max(1, self._depth - 1)
        del self._text[:begin]
        self._at -= begin
        return items

    def _next_mark(self) -> bytes | None:
        """The next bracket, or comma, outside of strings; None before there is one. Reading goes on behind it."""
        while self._at < len(self._text) and (self._depth or not self._has_begun):
            found = (_MARK_IN_STRING if self._in_string else _MARK).search(self._text, self._at)
            if found is None:
                self._at = len(self._text)
                return None
            mark = found[0]
            if mark == b"\\":
                if found.end() == len(self._text):
                    self._at = found.start()
                    return None
                self._at = found.end() + 1
                continue
            self._at = found.end()
            if mark == b'"':
                self._in_string = not self._in_string
            elif mark != b"," or self._depth == 1:
                return mark
        return None

    def end(self) -> list[bytes]:
        """What is left. Where an item is torn, so that its brackets or quotes do not pair, the entries behind it are
        looked for.
        """
        items: list[bytes] = []
        budget = MAX_SALVAGE_CHARACTERS
        while self._depth and budget > 0:
            text = self._text.decode("utf-8", "surrogateescape")
            begin, budget = next_entry(text, 1, budget, followed_by=(",", "]", ""))
            if begin is None:
                break
            items.append(text[:begin].encode("utf-8", "surrogateescape").rstrip(SPACE + b","))
            self._text, self._at, self._depth, self._in_string = bytearray(), 0, 1, False
            items += self.add(text[begin:].encode("utf-8", "surrogateescape"))
        items.append(bytes(self._text))
        return items
