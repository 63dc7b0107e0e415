"""What a body of Kong's http-log holds: one entry, or an array of them, as lines for the spool. Pure; bytes in and out.

Nothing is decoded for its meaning and nothing is encoded again: a line is the entry as it came, but for line breaks
between its parts. What can't be told apart is a line as well: it becomes a dead letter where all lines are read. A body
is never refused here, since Kong sends a refused batch again for a while and then drops it, with all that is behind it.

Shapes: an object with `queue.max_batch_size` 1 (the default), otherwise always an array (Kong 3.3, http-log).
"""

import json
import re
from collections.abc import Iterable

import msgspec

from metershipper.pieces import BOM, MAX_SALVAGE_CHARACTERS, next_entry

# Up to here a body is split as a whole, which is the fast way; a larger one as it comes, so that it takes no memory.
WHOLE_BYTES = 1024 * 1024
SPACE = b" \t\r\n"

Line = bytes | msgspec.Raw

_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_item = msgspec.json.Decoder(msgspec.Raw).decode
_LENIENT = json.JSONDecoder(strict=False)
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
            if not before <= WHOLE_BYTES < self.held_bytes:
                return []
            piece = b"".join(self._pieces)
            self._pieces = [piece]
            if not _beginning(piece).startswith(b"["):
                return []
            self._pieces, self._splitter = [], _ArraySplitter()
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


def _is_json(item: bytes) -> bool:
    """Also of what Python alone reads: NaN, lone surrogates, control characters in a string."""
    try:
        _decode_item(item)
    except (msgspec.MsgspecError, RecursionError):
        try:
            _LENIENT.decode(item.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return False
    return True


def _lines(items: Iterable[bytes]) -> list[Line]:
    """Items as lines. Within JSON a line break is only space; a string can't hold one."""
    stripped = (item.strip(SPACE) for item in items)
    return [item.replace(b"\n", b" ") for item in stripped if item]


class _ArraySplitter:
    """The items of an array, told apart by brackets, commas and quotes alone: what is wrong inside one stays there.

    But for a quote too many or too few: then what follows is cut in the wrong places. An item that is no JSON, with
    something behind it that is no object, is taken for that, and entries are looked for from there on.
    """

    def __init__(self) -> None:
        self._text = bytearray()  # from the beginning of the first item that is not handed out yet
        self._at = 0
        self._depth = 0
        self._has_begun = False
        self._in_string = False
        self._behind_doubtful: int | None = None  # where the item behind one that is no JSON begins
        self._is_torn = False

    @property
    def held_bytes(self) -> int:
        """The length of what is not handed out yet."""
        return len(self._text)

    def add(self, piece: bytes) -> list[bytes]:
        """The items that are complete with this piece."""
        self._text += piece
        items: list[bytes] = []
        begin = 0
        while not self._is_torn and (mark := self._next_mark()) is not None:
            if mark in b"[{":
                self._has_begun = True
                self._depth += 1
                begin = self._at if self._depth == 1 else begin
            elif self._depth == 1 and mark in b",]":
                found = self._items_from(begin)
                begin = self._at if found else begin
                items += found
                self._depth -= mark == b"]"
            elif mark in b"]}":
                self._depth = max(1, self._depth - 1)
        del self._text[:begin]
        self._at -= begin
        if self._behind_doubtful is not None:
            self._behind_doubtful -= begin
        return items

    def _items_from(self, begin: int) -> list[bytes]:
        """The item that ends here, and a doubtful one before it; none while it can't be told."""
        end, behind = self._at - 1, self._behind_doubtful
        with memoryview(self._text) as text:  # an item may be large: it is copied once
            item = bytes(text[begin if behind is None else behind : end])
            if behind is None:
                if not item.strip(SPACE) or _is_json(item):
                    return [item]
                self._behind_doubtful = self._at
            elif item.strip(SPACE).startswith(b"{") and _is_json(item):
                self._behind_doubtful = None
                return [bytes(text[begin : behind - 1]), item]
            else:
                self._is_torn = True
            return []

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
        while budget > 0 and not self._is_told():
            text = self._text.decode("utf-8", "surrogateescape")
            begin, budget = next_entry(text, 1, budget, followed_by=(",", "]", ""))
            if begin is None:
                break
            items.append(text[:begin].encode("utf-8", "surrogateescape").rstrip(SPACE + b","))
            self._text, self._at, self._depth, self._in_string = bytearray(), 0, 1, False
            self._behind_doubtful, self._is_torn = None, False
            items += self.add(text[begin:].encode("utf-8", "surrogateescape"))
        items.append(bytes(self._text))
        return items

    def _is_told(self) -> bool:
        """Whether the array ended, as far as can be told: also with an item that is no JSON, and nothing behind it."""
        behind = self._behind_doubtful
        if behind is not None and not self._depth and not self._text[behind:].strip(SPACE):
            del self._text[behind - 1 :]
            return True
        return not self._depth and not self._is_torn and behind is None
