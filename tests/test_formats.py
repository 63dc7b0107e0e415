"""What stands around entries: wrapped lines come out whole and once, and only what is nobody's usage is foreign."""

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metershipper.formats import Format, Text, Wrapper, apart_from_errors, complete_lines, is_foreign, unwrapped
from metershipper.lines import whole_lines
from metershipper.pieces import pieces

TIME = "2026-11-21T10:00:00.123456789Z"
ENTRY = b'{"request":{"id":"r1","headers":{"user-agent":"x stdout P y"}},"started_at":1782907200015}'
FORGED = b'{"request":{"id":"f","x":"{"},"started_at":1782907200015}'
ACCESS = b'10.0.0.1 - - [21/Nov/2026:10:00:00 +0000] "GET /a HTTP/1.1" 200 5 "-" "curl/8 {" kong_request_id: "ab12"'
ERROR = (
    b"2026/11/21 10:00:00 [error] 123#0: *5 connect() failed (111: Connection refused) while connecting to upstream, "
    b'client: 10.0.0.1, server: kong, request: "GET /a HTTP/1.1", upstream: "http://10.0.0.2:80/a", host: "x"'
)


def cri(text: bytes, tag: str = "F", stream: str = "stdout", time: str = TIME) -> bytes:
    return f"{time} {stream} {tag} ".encode() + text + b"\n"


def docker(text: str, stream: str = "stdout", **more: object) -> bytes:
    line = {"log": text, "stream": stream, **more, "time": TIME}
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def texts(data: bytes, format: Format = "auto") -> list[bytes]:
    return [text.payload for text in unwrapped(data, 0, format)]


UNWRAPPED: dict[str, tuple[bytes, list[bytes]]] = {
    "nothing": (b"", []),
    "plain lines": (ENTRY + b"\n\nx", [ENTRY, b"", b"x"]),
    "CRI": (cri(b"a") + cri(b"b", stream="stderr"), [b"a", b"b"]),
    "CRI by a zone, without a fraction": (cri(b"a", time="2026-11-21T10:00:00+01:00"), [b"a"]),
    "CRI with more tags": (cri(b"a", "P:x") + cri(b"b", "F:x:y"), [b"ab"]),
    "CRI, empty": (cri(b"") + f"{TIME} stdout F\n".encode() + f"{TIME} stdout F\r\n".encode(), [b"", b"", b""]),
    "CRI in parts": (cri(b"a", "P") + cri(b" b", "P") + cri(b"c"), [b"a bc"]),
    "CRI, without the last newline": (cri(b"a", "P") + cri(b"b")[:-1], [b"ab"]),
    "CRI, not finished": (cri(b"a") + cri(b"b", "P") + cri(b"c", "P"), [b"a", b"bc"]),
    "CRI, without its beginning": (cri(b"b"), [b"b"]),
    "CRI, two streams": (
        cri(b"a", "P") + cri(b"x", "P", "stderr") + cri(b"b", "P") + cri(b"y", "F", "stderr") + cri(b"c"),
        [b"xy", b"abc"],
    ),
    "CRI behind NULs and a BOM": (b"\0\0\xef\xbb\xbf" + cri(b"a"), [b"a"]),
    "Docker": (docker("a\n") + docker("é\n", "stderr"), [b"a", "é".encode()]),
    "Docker with attributes": (docker("a\n", attrs={"tag": "kong"}), [b"a"]),
    "Docker, empty": (docker("\n"), [b""]),
    "Docker, CRLF": (docker("a\r\n")[:-1] + b"\r\n", [b"a\r"]),
    "Docker in parts": (docker("a") + docker("b\\n") + docker("c\n"), [b"ab\\nc"]),
    "Docker, two streams": (docker("a") + docker("x\n", "stderr") + docker("b\n"), [b"x", b"ab"]),
    "both at once": (docker("a") + cri(b"x", "P") + docker("b\n") + ENTRY + b"\n" + cri(b"y"), [b"ab", ENTRY, b"xy"]),
    # Lines that only look like wrapped ones are lines.
    "CRI, another tag": (cri(b"a", "X"), [cri(b"a", "X")[:-1]]),
    "CRI, another stream": (cri(b"a", "F", "stdin"), [cri(b"a", "F", "stdin")[:-1]]),
    "a time alone": (TIME.encode(), [TIME.encode()]),
    "Docker, no time": (b'{"log":"a\\n","stream":"stdout"}', [b'{"log":"a\\n","stream":"stdout"}']),
    "Docker, no text": (b'{"log":"","stream":5,"time":"x"}', [b'{"log":"","stream":5,"time":"x"}']),
    "Docker, cut": (docker("a\n")[:-5], [docker("a\n")[:-5]]),
    "an entry with a log": (docker("a\n", request={"id": "r"}), [docker("a\n", request={"id": "r"})[:-1]]),
}  # fmt: skip


@pytest.mark.parametrize(("data", "expected"), UNWRAPPED.values(), ids=UNWRAPPED)
def test_lines_are_unwrapped_one_by_one_by_what_they_look_like(data: bytes, expected: list[bytes]) -> None:
    assert texts(data) == expected


def test_a_text_knows_the_raw_lines_it_came_from() -> None:
    first, other, last = cri(b"a", "P"), ENTRY + b"\n", cri(b"b")
    one, two, three = len(first), len(first + other), len(first + other + last)
    assert list(unwrapped(first + other + last + b"x", 100)) == [
        Text(ENTRY, 100 + one, 100 + two, None),
        Text(b"ab", 100, 100 + three, "cri"),
        Text(b"x", 100 + three, 101 + three, None),
    ]


def test_a_fixed_format_unwraps_no_other() -> None:
    data = cri(b"a") + docker("b\n")
    first, second = data.splitlines()
    assert texts(data, "ndjson") == [first, second]
    assert texts(data, "cri") == [b"a", second]
    assert texts(data, "docker") == [first, b"b"]
    open_record = cri(b"a", "P") + docker("b")
    assert complete_lines(open_record, "ndjson") == len(open_record)
    assert complete_lines(open_record, "cri") == complete_lines(open_record) == 0
    assert complete_lines(open_record, "docker") == len(cri(b"a", "P"))


@pytest.mark.parametrize(
    ("complete", "rest"),
    [
        (b"", b""),
        (b"", b"half"),
        (ENTRY + b"\n", b"half"),
        (b"{\n", b"{"),
        (b'{"\n\n', b""),
        (cri(b"a") + cri(b"b", "P") + cri(b"c"), cri(b"d")[:-1]),
        (cri(b"a"), cri(b"b", "P") + cri(b"c")[:-1]),
        (cri(b"a"), cri(b"b", "P") + cri(b"x", "F", "stderr") + ENTRY + b"\n" + cri(b"c", "P")),
        (cri(b"a"), cri(b"x", "P", "stderr") + cri(b"b", "P") + cri(b"c")),
        (cri(b"a"), cri(b"x", "P", "stderr") + cri(b"b", "P") + cri(b"y", "F", "stderr")),
        (docker("a\n"), docker("b") + docker("x\n", "stderr")),
        (docker("a") + docker("b\n"), docker("c\\n")),
        (ENTRY + b"\n" + b"\0\0" + cri(b"a"), b"\0\0" + cri(b"b", "P")),
    ],
    ids=repr,
)
def test_complete_lines_end_before_a_record_that_is_not_finished(complete: bytes, rest: bytes) -> None:
    """Also when the other stream went on meanwhile: what overlaps with the open record is read again with it."""
    assert complete_lines(complete + rest) == len(complete)


@given(st.lists(st.sampled_from([ENTRY, b"", b"{", b"{}", b" stdout P ", b'{"log":"x"}', b'{"a":1,"log":""', ACCESS])))
def test_complete_lines_of_plain_lines_are_the_whole_lines(lines: list[bytes]) -> None:
    data = b"\n".join(lines)
    assert complete_lines(data) == whole_lines(data)


Records = list[tuple[str, list[str]]]
# What a container wrote: by record its stream, and its text in parts. Quotes, backslashes and ends like Docker's own.
TEXT = st.text(st.sampled_from('a{}"\\ né\0:P'), max_size=6) | st.just('\\n","stream":"stdout"')
RECORDS = st.lists(
    st.tuples(st.sampled_from(["stdout", "stderr"]), st.lists(TEXT, min_size=1, max_size=4)), min_size=1, max_size=12
)


def lines_of(records: Records, stream: str, wrapper: Wrapper) -> list[bytes]:
    lines: list[bytes] = []
    for _, parts in (record for record in records if record[0] == stream):
        for number, part in enumerate(parts, 1):
            is_last = number == len(parts)
            if wrapper == "cri":
                lines.append(cri(part.encode(), "F" if is_last else "P", stream))
            else:
                lines.append(docker(part + "\n" * is_last, stream))
    return lines


@settings(max_examples=300)
@given(records=RECORDS, wrapper=st.sampled_from(["cri", "docker"]), data=st.data())
def test_whatever_a_container_wrote_comes_out_once_and_in_order(
    records: Records, wrapper: Wrapper, data: st.DataObject
) -> None:
    """However the runtime cut the records, mixed the streams, and however the file is read in blocks."""
    waiting = {stream: lines_of(records, stream, wrapper) for stream in ("stdout", "stderr")}
    log = b""
    while any(waiting.values()):
        stream = data.draw(st.sampled_from([stream for stream, lines in waiting.items() if lines]))
        log += waiting[stream].pop(0)
    cuts = data.draw(st.lists(st.integers(0, len(log)), max_size=6))
    found: list[Text] = []
    position = 0
    for cut in (*sorted(cuts), len(log)):
        block = log[position : max(cut, position)]
        length = complete_lines(block)
        found += unwrapped(block[:length], position)
        position += length
    assert position == len(log)
    for stream in ("stdout", "stderr"):
        wrote = ["".join(parts).encode() for name, parts in records if name == stream]
        marker = f" {stream} ".encode() if wrapper == "cri" else f'"stream":"{stream}","time"'.encode()
        assert [text.payload for text in found if marker in log[text.start_offset :].split(b"\n")[0]] == wrote
    assert len(found) == len(records)


def judged(text: bytes, *, wrapped: bool) -> list[bool]:
    return [is_foreign(piece, wrapped=wrapped) for piece in apart_from_errors(pieces(text))]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        ACCESS,
        ACCESS + b"\r",
        b"\0" + ACCESS,
        ACCESS.replace(b"10.0.0.1 - -", b"2001:db8::1 - a user [x]"),
        ACCESS.replace(b"10.0.0.1", b"unix:"),
        ACCESS.replace(b"/a", b"/\\x22request\\x22:{}"),
        ERROR,
        ERROR.replace(b"GET /a", b"GET /" + FORGED + b"{"),
        b"2026/11/21 10:00:00 [notice] 1#0: signal process started",
        b"2026/11/21 10:00:00 [warn] 1#0: *1 [lua] init.lua:5: no license, context: init_worker_by_lua*",
    ],
    ids=lambda text: text[:60],
)
def test_lines_of_nginx_are_foreign(text: bytes, wrapped: bool) -> None:
    assert judged(text, wrapped=wrapped) == [True]


@pytest.mark.parametrize(
    "text",
    [
        b"stack traceback:",
        b"\t[C]: in function 'error'",
        b"2026-11-21 kong started",
        b"12",
        b'{"level":"info","msg":"started"}',
        b'{"message":{"level":"info"}}',
    ],
)
def test_other_programs_are_foreign_on_the_output_of_a_container_alone(text: bytes) -> None:
    assert judged(text, wrapped=True) == [True]
    assert judged(text, wrapped=False) == [False]


CUT = len(ENTRY) // 2
KEPT: dict[str, bytes] = {
    "the beginning of an entry": ENTRY[:CUT],
    "the end of one": ENTRY[CUT:],
    "the first byte of one": b"{",
    "the last bytes of one": b"5}",
    "the middle of one": b'x","size":5,"y',
    "the middle of one, all text": b"x" * 4096,
    "a beginning, then nginx": ENTRY[:CUT] + ACCESS,
    "a beginning, then nginx's error log": ENTRY[:CUT] + ERROR,
    "nginx, then a beginning": ACCESS + ENTRY[:CUT],
    "nginx, then the first byte of one": ACCESS + b"{",
    "nginx's error log, then a beginning": ERROR + ENTRY[:CUT],
    "an entry without its request": b'{"started_at":1782907200015,"client_ip":"10.0.0.1"}',
    "a request that is no object": b'{"request":"GET"}',
    "several objects": b'{"a":1}{"b":2}',
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("text", KEPT.values(), ids=KEPT)
def test_what_may_be_a_part_of_an_entry_is_not(text: bytes, wrapped: bool) -> None:
    """Case 4: entries above 4096 bytes tear each other on stdout; not even a part of one is skipped."""
    assert not any(judged(text, wrapped=wrapped))


@pytest.mark.parametrize(
    "glue",
    [
        lambda entry: ACCESS + entry,
        lambda entry: entry + ACCESS,
        lambda entry: entry + ERROR,
        lambda entry: b"2026/11/21" + entry,
    ],
    ids=["behind access", "before access", "before error", "behind a torn prefix"],
)
def test_an_entry_glued_to_a_line_of_nginx_is_one(glue: Callable[[bytes], bytes]) -> None:
    """Case 4."""
    found = apart_from_errors(pieces(glue(ENTRY)))
    assert [piece.value for piece in found if piece.value is not None] == [json.loads(ENTRY)]


@pytest.mark.parametrize(
    "line",
    [
        ERROR.replace(b"GET /a", b"GET /" + FORGED + b"{"),
        ERROR.replace(b'host: "x"', b'referrer: "' + FORGED + b'{"'),
        ERROR.replace(b'GET /a HTTP/1.1"', b"GET /" + FORGED)[: ERROR.index(b"GET /a") + 5 + len(FORGED)],
        ENTRY[:30] + ERROR.replace(b"GET /a", b"GET /" + FORGED + b"{"),
    ],
    ids=["in the path", "in a header", "at the end, cut by nginx", "behind a torn entry"],
)
def test_a_client_cannot_have_an_entry_of_its_own_billed_through_the_error_log(line: bytes) -> None:
    """nginx quotes the request as it came: whoever sends what looks like an entry bills another for it."""
    assert any(piece.value is not None for piece in pieces(line))
    assert [piece.value for piece in apart_from_errors(pieces(line))] == [None]
