"""Bodies of http-log become lines: every entry exactly once, as it came, however the body was cut or laid out."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metershipper import bodies
from metershipper import pieces as pieces_module
from metershipper.bodies import WHOLE_BYTES, Body
from metershipper.pieces import MAX_SALVAGE_CHARACTERS, pieces

BOM = b"\xef\xbb\xbf"
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
entries = st.lists(st.dictionaries(st.text(), values, max_size=4), max_size=6)
cuts = st.lists(st.integers(0, 400), max_size=6)
limits = st.sampled_from([1, 20, WHOLE_BYTES])


def chunked(body: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted({cut for cut in cuts if cut < len(body)} | {len(body)})
    return [body[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def lines_of(body: bytes, cuts: list[int] | None = None, whole_bytes: int = WHOLE_BYTES) -> list[bytes]:
    """The lines of a body that comes in these pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "WHOLE_BYTES", whole_bytes)
        splitter = Body()
        lines = [line for piece in chunked(body, cuts or []) for line in splitter.add(piece)]
        lines += splitter.end()
    found = [bytes(line) for line in lines]
    assert all(line and b"\n" not in line for line in found)
    return found


def entry(number: int, **more: Any) -> dict[str, Any]:
    return {"request": {"id": f"{number:032x}", "uri": "/"}, "started_at": 1700000000000 + number, **more}


def encoded(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


# --- what Kong sends


@given(items=entries, cuts=cuts, limit=limits, before=st.sampled_from([b"", BOM, b" \r\n", BOM + b"\n"]))
def test_a_compact_array_gives_its_items_as_they_are(
    items: list[dict[str, Any]], cuts: list[int], limit: int, before: bytes
) -> None:
    """Nothing is encoded again: ids that are hashes of an entry depend on its bytes (case 57)."""
    assert lines_of(before + encoded(items) + b"\n", cuts, limit) == [encoded(item) for item in items]


@given(items=entries, cuts=cuts, limit=limits, indent=st.sampled_from([0, 2, "\t"]), ascii=st.booleans())
def test_a_pretty_printed_array_gives_one_line_for_each_item(
    items: list[dict[str, Any]], cuts: list[int], limit: int, indent: int | str, ascii: bool
) -> None:
    text = json.dumps(items, indent=indent, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    assert [json.loads(line) for line in lines_of(text, cuts, limit)] == items


@given(items=st.lists(values, max_size=6), cuts=cuts)
def test_items_of_any_kind_are_kept_the_fast_way_and_the_slow_way_alike(items: list[Any], cuts: list[int]) -> None:
    """A string or a number is no entry; that is said where lines are read (case 55)."""
    body = encoded(items)
    assert lines_of(body, cuts, 1) == lines_of(body, cuts) == [encoded(item) for item in items]


@given(value=st.dictionaries(st.text(), values, max_size=4), cuts=cuts, limit=limits)
def test_an_object_is_one_line(value: dict[str, Any], cuts: list[int], limit: int) -> None:
    assert lines_of(encoded(value), cuts, limit) == [encoded(value)]
    pretty = lines_of(b"\r\n" + json.dumps(value, indent=1).encode(), cuts, limit)
    assert [json.loads(line) for line in pretty] == [value]


@pytest.mark.parametrize("body", [b"", b" \r\n", b"[]", b" [ ] ", b"[\n]\n", BOM, BOM + b"[]"])
@pytest.mark.parametrize("limit", [1, WHOLE_BYTES])
def test_nothing_gives_no_line(body: bytes, limit: int) -> None:
    assert lines_of(body, None, limit) == []


# --- what is wrong in one place costs nothing in another


FAULTY = [
    b"NaN",
    b"nul",
    b"-",
    b"'x'",
    b"{'a':1}",
    b'{"a":}',
    b'{"a":1,}',
    b'{"a":NaN}',
    b'{"a":"\\ud800"}',  # half of a surrogate pair, which cjson lets pass
    b'{"a":"\xff\xfe"}',
    b'{"a":"\x01"}',
    b'{"a":"\\q"}',
    b'{"a":01}',
    b"\xff",
    b"1 2",
    b"{} {}",
]


@pytest.mark.parametrize("faulty", FAULTY)
@pytest.mark.parametrize("limit", [1, WHOLE_BYTES])
def test_a_faulty_item_is_a_line_of_its_own(faulty: bytes, limit: int) -> None:
    """(case 55)"""
    before, behind = encoded(entry(1)), encoded(entry(2))
    assert lines_of(b"[" + b",".join([before, faulty, behind]) + b"]", None, limit) == [before, faulty, behind]


@given(
    items=st.lists(st.sampled_from(FAULTY) | st.integers(0, 99).map(lambda n: encoded(entry(n))), max_size=8),
    cuts=cuts,
    limit=limits,
)
def test_good_items_among_faulty_ones_are_all_there(items: list[bytes], cuts: list[int], limit: int) -> None:
    """Faulty ones that follow each other may be one line: where the one ends nobody can tell for sure."""
    found = lines_of(b"[" + b",".join(items) + b"]", cuts, limit)
    assert [line for line in found if line.startswith(b'{"request"')] == [
        item for item in items if item.startswith(b'{"request"')
    ]
    assert b",".join(found).rstrip(b"]") == b",".join(items)
    if not any(a in FAULTY and b in FAULTY for a, b in pairwise(items)):
        assert found == items


@given(note=st.text("ab,{}[]: ", max_size=20), at=st.integers(0, 2), cuts=cuts, limit=limits)
def test_a_quote_too_few_costs_only_its_own_entry(note: str, at: int, cuts: list[int], limit: int) -> None:
    """From there on strings and what is between them change places: commas in strings seem to be those of the array."""
    torn = b'{"request":{"id":"torn ' + note.encode()
    good = [encoded(entry(number, note=f"KHTML, like {{Gecko}}, {note}")) for number in (1, 2, 3)]
    items = [*good[:at], torn, *good[at:]]
    found = lines_of(b"[" + b",".join(items) + b"]", cuts, limit)
    assert [line for line in found if line in good] == good
    assert len(found) == 4


@given(tear=st.integers(1, 60), cuts=cuts, limit=limits)
def test_an_entry_torn_in_the_middle_of_the_array_costs_only_itself(tear: int, cuts: list[int], limit: int) -> None:
    """Its brackets and quotes do not pair: where the next entry begins is told by the entries."""
    torn = encoded(entry(0, note="a, \\ and [ in a string"))[:tear]
    good = [encoded(entry(number)) for number in (1, 2, 3)]
    found = lines_of(b"[" + b",".join([good[0], torn, *good[1:]]) + b"]", cuts, limit)
    assert (found[0], found[-2:]) == (good[0], good[1:])
    assert b",".join(found[1:-2]).rstrip(b",") == torn.rstrip(b",")


@given(end=st.integers(0, 300), cuts=cuts, limit=limits)
def test_a_body_that_ends_too_early_gives_what_is_complete_and_the_rest(end: int, cuts: list[int], limit: int) -> None:
    good = [encoded(entry(number)) for number in range(4)]
    body = (b"[" + b",".join(good) + b"]")[:end]
    found = lines_of(body, cuts, limit)
    complete = [line for line in good if b"[" + b",".join(good[: good.index(line) + 1]) in body]
    assert found[: len(complete)] == complete
    assert b"".join(found).replace(b",", b"") == body.removeprefix(b"[").removesuffix(b"]").replace(b",", b"")


@given(behind=st.sampled_from([b'{"a":1}', b'[{"a":1}]', b'"x', b"]", b"]]}}", b"\xff"]), cuts=cuts, limit=limits)
def test_what_follows_the_array_is_a_line_however_the_body_was_cut(behind: bytes, cuts: list[int], limit: int) -> None:
    items = [encoded(entry(1)), encoded(entry(2))]
    body = b"[" + b",".join(items) + b"]"
    assert lines_of(body + behind, [len(body), *cuts], limit) == [*items, behind]


@given(body=st.binary(max_size=60) | st.text(alphabet='[]{}",:\\ \n1a').map(str.encode), cuts=cuts)
def test_any_bytes_are_taken_and_the_pieces_make_no_difference(body: bytes, cuts: list[int]) -> None:
    """Nothing but space, commas and the brackets of the array is ever left out."""
    lines = lines_of(body, cuts, 1)
    assert lines == lines_of(body, [], 1)
    assert sorted(b"".join(lines + lines_of(body)).translate(None, b" \t\r\n,[]\xef\xbb\xbf")) == sorted(
        2 * body.translate(None, b" \t\r\n,[]\xef\xbb\xbf")
    )


def test_an_object_with_line_breaks_in_its_strings_is_still_one_entry() -> None:
    """No JSON, but a line break there is space for whom reads it: the entry is billed."""
    (line,) = lines_of(b'[{"request":{"uri":"/a\nb"}}]')
    (piece,) = pieces(line)
    assert piece.value == {"request": {"uri": "/a b"}}


@pytest.mark.parametrize("limit", [1, WHOLE_BYTES])
def test_nesting_without_end_is_one_line(limit: int) -> None:
    deep = b"[" * 100_000
    assert lines_of(b"[1," + deep, None, limit) == [b"1", deep]


def test_a_search_for_entries_in_a_hostile_body_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each `{"` could begin an entry, to the end of the text: only so much of it is tried."""
    budgets: list[int] = []

    def next_entry(text: str, start: int, budget: int, followed_by: tuple[str, ...]) -> tuple[int | None, int]:
        budgets.append(budget)
        return original(text, start, budget, followed_by)

    original = pieces_module.next_entry
    monkeypatch.setattr(bodies, "next_entry", next_entry)
    body = b"[" + b'{"a":[' * 20_000
    assert lines_of(body) == [body[1:]]
    assert budgets == [MAX_SALVAGE_CHARACTERS]


# --- memory


def test_of_a_large_array_only_the_item_that_is_not_complete_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """(case 58: memory flat)"""
    monkeypatch.setattr(bodies, "WHOLE_BYTES", 1000)
    body, found = Body(), []
    item = encoded(entry(1, note="x" * 100))
    for number in range(500):
        found += body.add((b"," if number else b"[") + item)
        assert body.held_bytes <= 1000 + len(item) + 2
    assert len(found) > 480
    assert [bytes(line) for line in [*found, *body.add(b"]"), *body.end()]] == [item] * 500
    assert body.held_bytes == 0


def test_what_is_held_of_other_bodies_is_told() -> None:
    body = Body()
    assert body.add(b'{"a":') == []
    assert body.held_bytes == 5
    assert body.add(b"1}") == []
    assert body.held_bytes == 7
