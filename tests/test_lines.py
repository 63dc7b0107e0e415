"""Cutting bytes into whole lines."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metershipper.lines import first_line, whole_lines


@pytest.mark.parametrize(
    ("data", "length"),
    [(b"", 0), (b"half", 0), (b"\n", 1), (b"a\n", 2), (b"a\nhalf", 2), (b"a\n\nb\n", 5), (b"a\r\nb", 3), (b"a\rb", 0)],
)
def test_a_line_is_complete_with_its_newline_and_not_before(data: bytes, length: int) -> None:
    """Case 2: half an entry is never taken for a whole one."""
    assert whole_lines(data) == length


@given(st.lists(st.sampled_from([b"a", b"\n", b"\r", b"{}", b"\x00", b"\xff"]), max_size=30).map(b"".join), st.data())
def test_reading_in_any_pieces_gives_the_same_lines(data: bytes, draw: st.DataObject) -> None:
    lines, rest = b"", b""
    while data:
        size = draw.draw(st.integers(1, len(data)))
        rest += data[:size]
        data = data[size:]
        length = whole_lines(rest)
        lines, rest = lines + rest[:length], rest[length:]
    assert b"\n" not in rest
    assert not lines or lines.endswith(b"\n")
    assert whole_lines(lines + rest) == len(lines)


@pytest.mark.parametrize(("data", "line"), [(b"", b""), (b"half", b""), (b"a\nb\n", b"a\n"), (b"\na\n", b"\n")])
def test_the_first_line_is_given_only_when_it_is_complete(data: bytes, line: bytes) -> None:
    assert first_line(data) == line
