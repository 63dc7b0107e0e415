"""What stands around an entry in a log: a container runtime's wrapping, and lines of nginx. Pure; bytes in and out.

Owns the wire forms and who wrote a text; never decodes an entry and never counts.

- CRI (containerd, CRI-O): `<RFC 3339 time> stdout|stderr P|F[:tag] <text>`; all lines of a record but its last have P.
- Docker's json-file: `{"log":"<text>","stream":"stdout","attrs":{...},"time":"..."}`, in this order; a record above
  16 KiB is cut, and all lines of it but the last have a `log` without a newline at its end.

stdout and stderr share a file and are cut independently: a record goes on in the next line of its own stream. On stdout
Kong's entries stand among the access log of nginx; its error log comes by stderr.
"""

import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import msgspec

from metershipper.lines import split_lines, whole_lines
from metershipper.pieces import BOM, Piece

Format = Literal["auto", "ndjson", "cri", "docker"]
Wrapper = Literal["cri", "docker"]

# What a line in a fixed format is not, in words.
NOT_WRAPPED = {"cri": "not a CRI line", "docker": "not a line of Docker's json-file"}

_CRI = re.compile(
    rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d) (stdout|stderr) ([PF])(?::[^ \n]*)?(?: |\r?$)"
)
_DOCKER = b'{"log":"'

# nginx escapes quotes in its access log, so that quotes pair up; what is glued to a line has no space before it.
_ACCESS = re.compile(
    rb'(?:[0-9a-fA-F.:]+|unix:) - [^"]*? \[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\]'
    rb'(?= ")(?: +(?:"[^"]*"|[^ "{]+))*+'
)
_ERROR = re.compile(rb"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d \[(?:debug|info|notice|warn|error|crit|alert|emerg)\] \d+#\d+: ")
# The error log quotes the client's request as it came; nginx lets no space into a path.
_REQUEST = re.compile(rb'"[A-Z]+ \S* HTTP/[\d.]+"')
_JSON_MARKS = (b'{"', b'":', b',"')
# Writes to a pipe are in one piece up to PIPE_BUF bytes. A longer text may be the middle of an entry.
_MAX_PROSE_BYTES = 4096
# Every entry of Kong has some of these, also one from which `custom_fields_by_lua` removed the request.
_KONG_KEYS = {"request", "session", "started_at"}


class Text(NamedTuple):
    """What one record of a log says: its bytes, where in the file its first line starts and its last one ends.

    `wrapper`: what it was unwrapped from; None for a line that stood as it is.
    """

    payload: bytes
    start_offset: int
    end_offset: int
    wrapper: Wrapper | None


class _Part(NamedTuple):
    """One line of a container runtime: a record, or a part of one. `source`: the sequence of parts it belongs to."""

    source: tuple[Wrapper, str]
    payload: bytes
    is_last: bool


class _DockerLine(msgspec.Struct):
    log: str
    stream: Literal["stdout", "stderr"]
    time: str
    request: Any = None


_decode_docker = msgspec.json.Decoder(_DockerLine).decode


def complete_lines(data: bytes, format: Format = "auto") -> int:
    """Length of the longest part of `data` that ends with a line and not within a record of a container runtime.

    With a record open at the end it ends where none was open before: records of two streams may overlap. For plain
    lines it is `whole_lines`, and one look at the beginning of each line.
    """
    length = whole_lines(data)
    if format == "ndjson":
        return length
    unfinished: set[tuple[Wrapper, str]] = set()
    start = complete = 0
    find, last_start = data.find, length - 3  # no record is as short as two bytes
    while start <= last_start:
        end = find(b"\n", start) + 1
        # One byte that Docker's lines have and most of Kong's have not: cheaper than the whole comparison.
        if data[start] != b"{"[0] or (data[start + 2] == b"l"[0] and data.startswith(_DOCKER, start)):
            part = _part(data[start:end], format)
            if part is not None and part.is_last:
                unfinished.discard(part.source)
            elif part is not None:
                complete = complete if unfinished else start
                unfinished.add(part.source)
        start = end
    return complete if unfinished else length


def unwrapped(data: bytes, start_offset: int = 0, format: Format = "auto") -> Iterator[Text]:
    """The texts of some lines, of which the last may lack its newline; `start_offset` is where they begin."""
    unwrapper = Unwrapper(format)
    offset, end = start_offset, start_offset + len(data)
    for line in split_lines(data):
        text = unwrapper.add(line, offset, min(offset + len(line) + 1, end))
        if text is not None:
            yield text
        offset += len(line) + 1
    yield from unwrapper.rest()


class Unwrapper:
    """Puts the records of one block together, line by line."""

    def __init__(self, format: Format) -> None:
        self._format = format
        self._open: dict[tuple[Wrapper, str], tuple[list[bytes], int, int]] = {}

    def add(self, line: bytes, start: int, end: int) -> Text | None:
        """The text that `line`, which stands from `start` to `end`, completes; None for a part that is not the last."""
        part = _part(line, self._format)
        if part is None:
            return Text(line, start, end, None)
        payloads, begin, _ = self._open.pop(part.source, ([], start, end))
        payloads.append(part.payload)
        if part.is_last:
            return Text(b"".join(payloads), begin, end, part.source[0])
        self._open[part.source] = payloads, begin, end
        return None

    def rest(self) -> Iterator[Text]:
        """What was begun and not finished, as far as it is there."""
        for (wrapper, _), (payloads, begin, end) in self._open.items():
            yield Text(b"".join(payloads), begin, end, wrapper)


def _part(line: bytes, format: Format) -> _Part | None:
    """`line`, with or without its newline, as a part of a record; None where it is not wrapped in that format."""
    line = line.lstrip(b"\0").removeprefix(BOM)
    if line.startswith(b"{"):
        return _docker_part(line) if format in ("auto", "docker") and line.startswith(_DOCKER) else None
    found = _CRI.match(line) if format in ("auto", "cri") else None
    if found is None:
        return None
    return _Part(("cri", found[1].decode()), line[found.end() :], found[2] == b"F")


def _docker_part(line: bytes) -> _Part | None:
    try:
        log, stream, _, request = msgspec.structs.astuple(_decode_docker(line))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return _Part(("docker", stream), log.removesuffix("\n").encode(), log.endswith("\n")) if request is None else None


def apart_from_errors(found: list[Piece]) -> list[Piece]:
    """The pieces of a line, of which one may be a line of nginx's error log: nothing behind its beginning is an entry.

    It quotes what a client sent as it came, and is cut after some kilobytes: what looks like an entry, even at the very
    end, may be a client's that wants another to be billed.
    """
    at = next((n for n, piece in enumerate(found) if piece.fault is not None and _ERROR.search(piece.raw)), None)
    if at is None or at == len(found) - 1:
        return found
    return [*found[:at], found[at]._replace(raw=b"".join(piece.raw for piece in found[at:]))]


def is_foreign(piece: Piece, *, wrapped: bool) -> bool:
    """Whether a piece is nothing of Kong's log: a line of nginx, or, on a container's output, any other program's.

    Whatever might be a part of a torn entry is not: that is nobody's to skip.
    """
    if piece.value is not None:
        return wrapped and not _KONG_KEYS & piece.value.keys()
    text = piece.raw.strip(b"\0 \t\r\n")
    if _ACCESS.fullmatch(text):
        return True
    is_prose = wrapped and len(text) < _MAX_PROSE_BYTES and not text.startswith(b"{") and not text.endswith(b"}")
    rest = _REQUEST.sub(b"", text)
    return (is_prose or bool(_ERROR.match(text))) and not any(mark in rest for mark in _JSON_MARKS)
