"""What one line holds: several entries, none, or what is left of some; nothing of it is lost, and nothing raises."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metershipper.books import Dead
from metershipper.pieces import BOM, Piece, Unbillable, pieces, whole_object

Json = dict[str, Any]

ENTRY = b'{"request":{"id":"r1","headers":{"host":"h"}},"response":{"status":200},"started_at":1782907200015}'
OTHER = b'{"request":{"id":"r2"},"tries":[{"ip":"10.0.0.1"}],"started_at":1782907200016}'
SESSION = b'{"session":{"sent":1},"started_at":1782907200015}'
FOREIGN = b'{"level":"info"}'
VALUE, OTHER_VALUE, FOREIGN_VALUE = json.loads(ENTRY), json.loads(OTHER), json.loads(FOREIGN)


def told(line: bytes) -> list[Any]:
    """Each piece as its value, or as its reason and what was wrong."""
    return [
        piece.value if piece.fault is None else (piece.fault.reason, piece.fault.detail.split(" at ")[0])
        for piece in pieces(line)
    ]


NOT_JSON = (Dead.NOT_JSON, "not valid JSON")
NOT_AN_ENTRY = (Dead.NOT_AN_ENTRY, "several JSON values, none of them an entry")
A_NUMBER = (Dead.NOT_AN_ENTRY, "a JSON number, not an object")
HELD: dict[str, tuple[bytes, list[Any]]] = {
    "one entry": (ENTRY, [VALUE]),
    "a stream session": (SESSION, [json.loads(SESSION)]),
    "an object of something else": (FOREIGN, [FOREIGN_VALUE]),
    "an empty object": (b"{}", [{}]),
    "a BOM before it": (BOM + ENTRY, [VALUE]),
    "NULs before it": (b"\0" * 5000 + ENTRY, [VALUE]),
    "NULs and a BOM before it": (b"\0" + BOM + ENTRY, [VALUE]),
    "NULs behind it": (ENTRY + b"\0" * 5000, [VALUE]),
    "CR behind it": (ENTRY + b"\r", [VALUE]),
    "white space around it": (b" \t" + ENTRY + b"\t \r", [VALUE]),
    "an array of one": (b"[" + ENTRY + b"]", [VALUE]),
    "an array of two": (b"[" + ENTRY + b" , " + OTHER + b"]", [VALUE, OTHER_VALUE]),
    "an array with an object of something else": (b"[" + FOREIGN + b"," + ENTRY + b"]", [FOREIGN_VALUE, VALUE]),
    "an array with what is no object: one bad item never costs the others": (
        b"[5," + ENTRY + b",[{}],null," + OTHER + b"]",
        [A_NUMBER, VALUE, (Dead.NOT_AN_ENTRY, "a JSON array, not an object"),
         (Dead.NOT_AN_ENTRY, "a JSON null, not an object"), OTHER_VALUE],
    ),
    "two entries glued": (ENTRY + OTHER, [VALUE, OTHER_VALUE]),
    "two entries glued with NULs between": (ENTRY + b"\0\0\0" + OTHER, [VALUE, OTHER_VALUE]),
    "three glued, one of something else": (ENTRY + FOREIGN + OTHER, [VALUE, FOREIGN_VALUE, OTHER_VALUE]),
    "an entry and a session": (ENTRY + SESSION, [VALUE, json.loads(SESSION)]),
    "an entry and an array": (ENTRY + b"[" + OTHER + b"," + OTHER + b"]", [VALUE, OTHER_VALUE, OTHER_VALUE]),
    "an entry and a number": (ENTRY + b" 12", [VALUE, A_NUMBER]),
    "an entry and text": (ENTRY + b" stdout", [VALUE, NOT_JSON]),
    "an entry, then a torn one": (ENTRY + OTHER[:-20], [VALUE, NOT_JSON]),
    "a torn one, then an entry": (OTHER[:-1] + ENTRY, [NOT_JSON, VALUE]),
    "a torn one, then two": (OTHER[:9] + ENTRY + OTHER, [NOT_JSON, VALUE, OTHER_VALUE]),
    "two torn ones, then an entry": (OTHER[:-1] + ENTRY[:-1] + OTHER, [NOT_JSON, OTHER_VALUE]),
    "a torn one, an entry, a torn one": (OTHER[:30] + ENTRY + OTHER[:30], [NOT_JSON, VALUE, NOT_JSON]),
    "torn within a text": (b'{"request":{"uri":"/a' + ENTRY, [NOT_JSON, VALUE]),
    "torn behind a backslash": (b'{"request":{"uri":"/a\\' + ENTRY, [NOT_JSON, VALUE]),
    "torn behind a colon": (b'{"request":' + ENTRY, [NOT_JSON, VALUE]),
    "torn, with complete objects in it": (
        b'{"latencies":{"kong":1},"route":{"id":"x","service":{"id":"y"}},"q' + ENTRY, [NOT_JSON, VALUE],
    ),
    "without its beginning, from a number on": (b'0015,"client_ip":"10.0.0.1"}' + ENTRY, [NOT_JSON, VALUE]),
    "without its beginning, from a text on": (b'"id":5}' + ENTRY, [NOT_JSON, VALUE]),
    "behind a time stamp": (b"2026-07-01T12:00:00Z stdout F " + ENTRY, [NOT_JSON, VALUE]),
    "nested under message": (b'{"message":' + ENTRY + b',"level":"info"}', [VALUE]),
    "a session under message": (b'{"message":' + SESSION + b"}", [json.loads(SESSION)]),
    "each of an array under message": (
        b'[{"message":' + ENTRY + b'},{"message":' + OTHER + b"}]", [VALUE, OTHER_VALUE],
    ),
    "torn, then nested under message": (ENTRY[:20] + b'{"message":' + OTHER + b"}", [NOT_JSON, OTHER_VALUE]),
    "a message that is text": (
        b'{"request":{},"message":"hello"}', [{"request": {}, "message": "hello"}],
    ),
    "an entry with a field called message": (
        b'{"request":{"id":"a"},"message":' + ENTRY + b"}", [{"request": {"id": "a"}, "message": VALUE}],
    ),
    "a key twice: the last one counts": (
        b'{"request":{"id":"a"},"request":{"id":"b"}}', [{"request": {"id": "b"}}],
    ),
    # Nothing of the line is an entry: one fault for the whole line.
    "nothing": (b"", [NOT_JSON]),
    "NULs alone": (b"\0" * 5000, [NOT_JSON]),
    "a BOM alone": (BOM, [NOT_JSON]),
    "an empty array": (b"[]", [(Dead.NOT_AN_ENTRY, "a JSON array, not an object")]),
    "an array of numbers": (b"[1,2]", [(Dead.NOT_AN_ENTRY, "a JSON array, not an object")]),
    "an array of objects of something else": (b"[" + FOREIGN + b"," + FOREIGN + b"]", [NOT_AN_ENTRY]),
    "objects of something else glued": (FOREIGN + FOREIGN + FOREIGN, [NOT_AN_ENTRY]),
    "a torn entry": (ENTRY[:-1], [NOT_JSON]),
    "an object of something else and a torn entry": (FOREIGN + ENTRY[:-1], [NOT_JSON]),
    "a line of another log": (b'10.0.0.1 - - [x] "GET / HTTP/1.1" 200', [NOT_JSON]),
    "numbers": (b"1 2 3", [NOT_JSON]),
    "invalid UTF-8": (b"\xff\xfe", [NOT_JSON]),
    "a request that is no object": (b'{"request":"GET"}{"session":[]}', [NOT_AN_ENTRY]),
}  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), HELD.values(), ids=HELD)
def test_every_entry_of_a_line_is_found_and_the_rest_says_why(line: bytes, expected: list[Any]) -> None:
    """Cases 4, 23 to 25 and 55: nothing good is lost to what stands beside it."""
    assert told(line) == expected
    for piece in pieces(line):
        assert (piece.value is None) == (piece.fault is not None)
        if piece.fault is not None:
            assert piece.fault.detail.isascii() and len(piece.fault.detail) < 120


@pytest.mark.parametrize(
    "line", [line for line, expected in HELD.values() if len(expected) == 1], ids=lambda line: repr(line[:30])
)
def test_a_single_piece_holds_the_whole_line_as_it_is(line: bytes) -> None:
    (piece,) = pieces(line)
    assert piece.raw == line


def test_each_of_several_pieces_holds_its_own_bytes() -> None:
    torn = b'{"request":{"uri":"/caf\xc3\xa9'
    assert [piece.raw for piece in pieces(torn + ENTRY + b"[" + OTHER + b"]")] == [torn, ENTRY, OTHER]
    wrapped = b'{"message":' + ENTRY + b"}"
    assert [piece.raw for piece in pieces(wrapped + b" 12")] == [wrapped, b"12"]


def test_invalid_text_is_replaced_and_the_entry_is_read() -> None:
    """Case 22: invalid UTF-8, raw control characters, lone surrogates."""
    (piece,) = pieces(b'{"request":{"id":"a\xff\x01\tb\\ud800"}}')
    assert piece.value == {"request": {"id": "a\ufffd\x01\tb\ud800"}}
    first, second = pieces(b'{"request":{"id":"\\ud800"}}{"request":{"id":"\xff"}}')
    assert first.raw == b'{"request":{"id":"\\ud800"}}' and json.loads(second.raw) == second.value


def test_what_is_nested_too_deep_is_one_fault_and_costs_nothing_before_it() -> None:
    """Case 25."""
    deep = b'{"a":' * 100_000
    assert told(deep) == told(b"[" * 100_000) == [(Dead.NOT_JSON, "nested too deep")]
    assert told(ENTRY + deep) == [VALUE, (Dead.NOT_JSON, "nested too deep")]
    assert pieces(ENTRY + deep)[1].raw == deep
    assert told(b"x" + deep + ENTRY)[0] == NOT_JSON


def test_an_object_too_deep_to_be_written_again_is_still_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> str:
        raise RecursionError

    monkeypatch.setattr("metershipper.pieces.json.dumps", refuse)
    assert pieces(ENTRY + OTHER) == [Piece(VALUE, None, b""), Piece(OTHER_VALUE, None, b"")]


@pytest.mark.parametrize("digits", [400, 4000, 4001, 5000, 100_000])
def test_integers_of_any_length_are_read_wherever_they_stand(digits: int) -> None:
    """Case 25."""
    line = b'{"request":{"size":' + b"9" * digits + b"}}"
    assert len(pieces(line)) == 1 and len(pieces(line + ENTRY)) == len(pieces(b"x" + line + ENTRY)[1:]) == 2
    assert told(b"9" * digits) == [A_NUMBER]


def test_a_torn_line_of_usual_length_is_searched_to_its_end() -> None:
    """However many objects the torn entry holds: the complete one behind it is billed."""
    line = b'{"x":[' + b'{"a":1},' * 500 + ENTRY
    torn, entry = pieces(line)
    assert torn.fault is not None and torn.fault.reason is Dead.NOT_JSON
    assert entry.value is not None and entry.fault is None


def test_the_search_in_a_hostile_line_is_bounded() -> None:
    """A line of megabytes full of beginnings would otherwise be gone through once from each of them (case 25)."""
    line = b'{"x":[' + b'{"a":1},' * 1000 + b'"' + b"y" * 2_000_000 + b'",' + ENTRY
    (given_up,) = pieces(line)
    assert given_up.raw == line and given_up.fault is not None and given_up.fault.reason is Dead.NOT_JSON


def test_complete_objects_need_no_tries() -> None:
    assert len(pieces(ENTRY * 500)) == 500


def test_the_whole_object_is_the_first_one_or_its_fault() -> None:
    assert whole_object(ENTRY + OTHER) == VALUE
    assert whole_object(b'{"message":' + OTHER + b"}") == OTHER_VALUE
    with pytest.raises(Unbillable, match="not valid JSON at character 0") as refused:
        whole_object(b"x" + ENTRY[:-1])
    assert refused.value.reason is Dead.NOT_JSON


def forms_of(line: bytes) -> dict[str, bytes]:
    return {"as it is": line, "BOM": BOM + line, "NULs": b"\0\0" + line + b"\0", "CRLF": line + b"\r"}


FRAGMENTS = [
    ENTRY, OTHER, SESSION, FOREIGN, b"", b" ", b"\0", b",", b"[", b"]", b"{", b"}", b'"', b"\\", b"12", b"null",
    b"\xff", BOM, b'{"message":', b'{"request":', b'{"a":1}', b"[" * 2000, b'{"a":' * 2000, b"9" * 5000,
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=4).map(lambda b: b.replace(b"\n", b"")), max_size=6),
    st.integers(0, 200),
)
def test_whatever_a_line_is_made_of_there_is_a_piece_and_never_an_error(parts: list[bytes], cut: int) -> None:
    line = b"".join(parts)[cut // 3 :]
    for form in forms_of(line).values():
        found = pieces(form)
        assert found
        assert all((piece.value is None) != (piece.fault is None) for piece in found)
        if len(found) > 1:
            assert any(piece.value is not None and {"request", "session"} & piece.value.keys() for piece in found)
    assert all(isinstance(piece.raw, bytes) for piece in pieces(line))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, len(OTHER) - 1), st.lists(st.sampled_from([ENTRY, OTHER, SESSION]), min_size=1, max_size=4))
def test_a_line_torn_anywhere_costs_itself_alone(cut: int, following: list[bytes]) -> None:
    """Case 4: one dead letter for what was torn, and each entry glued to it is there."""
    found = pieces(OTHER[:cut] + b"".join(following))
    assert [piece.raw for piece in found] == [OTHER[:cut], *following]
    assert found[0].fault is not None and found[0].fault.reason is Dead.NOT_JSON
    assert [piece.value for piece in found[1:]] == [json.loads(line) for line in following]


JOINED: dict[str, Callable[[list[bytes]], bytes]] = {
    "glued": b"".join,
    "in an array": lambda lines: b"[" + b",".join(lines) + b"]",
    "each under message": lambda lines: b"".join(b'{"message":' + line + b"}" for line in lines),
}


@pytest.mark.parametrize("joined", JOINED.values(), ids=JOINED)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_as_many_entries_come_out_as_went_in(joined: Callable[[list[bytes]], bytes], count: int) -> None:
    assert told(joined([ENTRY, OTHER, ENTRY][: count % 3] + [OTHER] * (count - count % 3))) == (
        [VALUE, OTHER_VALUE, VALUE][: count % 3] + [OTHER_VALUE] * (count - count % 3)
    )


@pytest.mark.parametrize(
    "line",
    [b'{"request":{}}' * 400_000, b'{"a":1}' * 400_000, b"[" + b"{}," * 2_000_000 + b"{}]", ENTRY * 10_001],
    ids=["entries", "objects", "array", "one entry too many"],
)
def test_a_line_of_very_many_values_is_kept_aside_whole_and_at_once(line: bytes) -> None:
    """Case 25: neither the time nor the memory that a hostile line takes grows with what it holds."""
    (piece,) = pieces(line)
    assert piece.fault is not None and piece.fault.reason is Dead.NOT_AN_ENTRY
    assert piece.fault.detail.startswith("more than ") and piece.raw == line


def test_what_a_client_wrote_inside_a_torn_entry_is_no_entry() -> None:
    """A logged body that looks like an entry must not be billed when the line around it is torn."""
    forged = b'{"request":{"id":"zz"},"consumer":{"id":"c"},"started_at":1770000000000}'
    torn, entry = pieces(b'{"ai":{"payload":' + forged + b'},"x":"' + ENTRY)
    assert torn.fault is not None
    assert entry.value is not None and entry.value["request"].get("id") != "zz"
