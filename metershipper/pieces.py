"""What one line holds when it is not simply one entry: several, none, or parts of some. Pure; reads JSON, not Kong.

Kong writes one entry a line, with one write(2) whose result it does not check (file-log, 3.9): a full disk tears a
line, and the next one is glued to what is left of it. Others send arrays of entries (http-log), or nest an entry under
`message` (custom_fields_by_lua). Whatever is a complete object is taken; what is not is reported as a fault of its own.
"""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from metershipper.books import Dead

BOM = b"\xef\xbb\xbf"
# Python refuses to parse longer integers (CVE-2020-10735); as a float such a number is still comparable, and refused.
MAX_INTEGER_DIGITS = 4000
# How much text is gone through again in a torn line, in search of a complete entry, before the rest is given up: a line
# of a few kilobytes is searched to its end, a hostile one of megabytes costs some tenths of a second.
MAX_SALVAGE_CHARACTERS = 8 * 1024 * 1024
# Above these a line is kept aside as a whole: they bound the time and the memory that a hostile one can take.
MAX_PIECES = 10_000
MAX_VALUES = 500_000


class Unbillable(Exception):
    """What was read becomes a dead letter: `reason` from the closed list, `detail` in words, never its content."""

    def __init__(self, reason: Dead, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Piece(NamedTuple):
    """One entry's worth of a line: an object, or the fault that stands in its place. `raw`: its bytes."""

    value: dict[str, Any] | None
    fault: Unbillable | None
    raw: bytes


def pieces(line: bytes) -> list[Piece]:
    """Everything that `line` holds, in order; never empty.

    A BOM or NULs before it are skipped, invalid UTF-8 becomes U+FFFD, raw control characters pass: Kong's encoder
    copies a client's bytes as they are (lua-cjson), so such a line is still a request to be billed.
    """
    text = line.lstrip(b"\0").removeprefix(BOM).decode("utf-8", "replace").rstrip("\0 \t\r\n")
    if sum(map(text.count, "{[,")) > MAX_VALUES:
        return [Piece(None, Unbillable(Dead.NOT_AN_ENTRY, f"more than {MAX_VALUES} JSON values on one line"), line)]
    found = list(islice((piece for value in _values(text) for piece in _unfolded(value)), MAX_PIECES + 1))
    if len(found) > MAX_PIECES:
        return [Piece(None, Unbillable(Dead.NOT_AN_ENTRY, f"more than {MAX_PIECES} entries on one line"), line)]
    if len(found) > 1 and not any(_is_entry(piece.value) for piece in found):
        # Nothing of the line can be used: it is one fault, however many fragments it seems to hold.
        faults = [piece.fault for piece in found if piece.fault and piece.fault.reason is Dead.NOT_JSON]
        none_of_them = Unbillable(Dead.NOT_AN_ENTRY, "several JSON values, none of them an entry")
        found = [Piece(None, faults[0] if faults else none_of_them, line)]
    return [found[0]._replace(raw=line)] if len(found) == 1 else found


def whole_object(line: bytes) -> dict[str, Any]:
    """The first object in `line`. Raises `Unbillable` where there is none."""
    found = pieces(line)
    if found[0].fault is not None:
        raise found[0].fault
    assert found[0].value is not None
    return found[0].value


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(value.get(key), dict) for key in ("request", "session"))


def _values(text: str) -> Iterator[Any]:
    """The JSON values of a line, one after the other, and a `Piece` with a fault for what is none."""
    position = _skip_space(text, 0)
    budget = MAX_SALVAGE_CHARACTERS
    while True:
        try:
            value, end = _DECODER.raw_decode(text, position)
        except RecursionError:
            yield _fault("nested too deep", text[position:])
            return
        except ValueError as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else position
        else:
            at = _skip_space(text, end)
            if at >= len(text) or isinstance(value, dict | list):
                yield value
                if at >= len(text):
                    return
                position = at
                continue
            # A number or a string with more after it is no value of its own: something torn, or text, begins so.
        begin, budget = next_entry(text, position + 1, budget)
        yield _fault(f"not valid JSON at character {at}", text[position:begin])
        if begin is None:
            return
        position = begin


def next_entry(
    text: str, start: int, budget: int, followed_by: tuple[str, ...] = ("", "{", "[")
) -> tuple[int | None, int]:
    """Where the next complete entry begins, and what is left of the budget of characters to go through.

    Only what is `followed_by` one of these counts ("": by nothing): what stands inside a torn entry is none, whatever
    a client made it look like, and something of that entry follows.
    """
    while budget > 0 and (start := text.find('{"', start)) >= 0:
        budget -= len(text) - start
        try:
            value, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            start += 1
            continue
        after = _skip_space(text, end)
        if text[after : after + 1] in followed_by and (_is_entry(value) or _is_entry(value.get("message"))):
            return start, budget
        start += 1
    return None, budget


def _unfolded(value: Any) -> Iterator[Piece]:
    """The entries of one JSON value: of an array with an object in it its items, so that a bad one costs no other."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        yield from map(_piece, value)
    else:
        yield value if isinstance(value, Piece) else _piece(value)


def _piece(value: Any) -> Piece:
    """One JSON value as an entry: of an object what is nested under `message`, where that is how Kong wrote it."""
    if isinstance(value, dict):
        message = value.get("message")
        entry = message if "request" not in value and isinstance(message, dict) else value
        return Piece(entry, None, _encoded(value))
    detail = f"a JSON {_JSON_NAMES.get(type(value), 'number')}, not an object"
    return Piece(None, Unbillable(Dead.NOT_AN_ENTRY, detail), _encoded(value))


def _fault(detail: str, text: str) -> Piece:
    return Piece(None, Unbillable(Dead.NOT_JSON, detail), text.encode("utf-8", "replace"))


def _encoded(value: Any) -> bytes:
    try:
        return json.dumps(value, separators=(",", ":")).encode()
    except RecursionError:
        return b""


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n\0":
        position += 1
    return position


def _parse_integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_INTEGER_DIGITS else float(digits)


_DECODER = json.JSONDecoder(strict=False, parse_int=_parse_integer)
_JSON_NAMES = {list: "array", str: "string", bool: "boolean", type(None): "null"}
