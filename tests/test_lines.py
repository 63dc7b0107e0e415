"""Cutting bytes into whole lines, and telling rotated siblings by name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metershipper.lines import COMPRESSED_SUFFIXES, first_line, is_rotated_name, whole_lines


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


@pytest.mark.parametrize(
    "name",
    [
        "usage.log.1", "usage.log.12", "usage.log-20261121", "usage.log-20261121-13", "usage.log.2026-11-21",
        "usage.log_2026-11-21T13:00:00", "usage.log-1763700000", "usage-20261121.log", "usage.1.log",
        "usage_2026-11-21.log", "usage-2026-11-21T13:00.log", "usage.log.1.old",
    ],
)  # fmt: skip
def test_names_that_logrotate_makes_are_rotated_siblings(name: str) -> None:
    assert is_rotated_name(name, "usage.log")


@pytest.mark.parametrize(
    "name",
    [
        "usage.log", "usage.log.swp", "usage.log.1.swp", "usage.log.1~", "usage.log.tmp", "usage.log.1.tmp",
        "other.log", "usage.logs.1", "usagexlog.1", "usage-v2.log", "usage.log.", "my-usage.log.1", "usage.log.old", "",
        *(f"usage.log.1{suffix}" for suffix in COMPRESSED_SUFFIXES),
    ],
)  # fmt: skip
def test_other_names_are_not(name: str) -> None:
    assert not is_rotated_name(name, "usage.log")


def test_a_name_without_a_suffix_has_siblings_too() -> None:
    assert is_rotated_name("access.1", "access")
    assert is_rotated_name("access-20261121", "access")
    assert not is_rotated_name("access.log", "access")


def test_characters_with_a_meaning_in_patterns_are_taken_as_they_are() -> None:
    assert is_rotated_name("a+(b).log.1", "a+(b).log")
    assert not is_rotated_name("aab.log.1", "a+(b).log")
