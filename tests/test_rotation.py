"""Which log a file may be a part of, by its name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metershipper.rotation import FOREIGN_SUFFIXES, is_compressed_name, logs_of


@pytest.mark.parametrize(
    "name",
    [
        "usage.log.1", "usage.log.12", "usage.log-20261121", "usage.log-20261121-13", "usage.log.2026-11-21",
        "usage.log_2026-11-21T13:00:00", "usage.log-1763700000", "usage-20261121.log", "usage.1.log",
        "usage_2026-11-21.log", "usage-2026-11-21T13:00.log", "usage.log.1.old",
        "usage.log.1.gz", "usage.log.1.zst", "usage.log-20261121.gz", "usage-20261121.log.zst", "usage.log.gz",
        "usage.log.20261121-101010.gz",
    ],
)  # fmt: skip
def test_names_that_logrotate_makes_are_rotated_siblings(name: str) -> None:
    assert "usage.log" in logs_of(name)


@pytest.mark.parametrize(
    "name",
    [
        "usage.log", "usage.log.swp", "usage.log.1.swp", "usage.log.1~", "usage.log.tmp", "usage.log.1.tmp",
        "other.log", "usage.logs.1", "usagexlog.1", "usage-v2.log", "usage.log.", "my-usage.log.1", "usage.log.old", "",
        *(f"usage.log.1{suffix}" for suffix in FOREIGN_SUFFIXES), "usage.log.1.gz.tmp", ".gz",
    ],
)  # fmt: skip
def test_other_names_are_not(name: str) -> None:
    assert "usage.log" not in logs_of(name)


def test_a_name_without_a_suffix_has_siblings_too() -> None:
    assert "access" in logs_of("access.1")
    assert "access" in logs_of("access-20261121")
    assert "access" not in logs_of("access.log")


def test_characters_with_a_meaning_in_patterns_are_taken_as_they_are() -> None:
    assert "a+(b).log" in logs_of("a+(b).log.1")
    assert "a+(b).log" not in logs_of("aab.log.1")


def test_the_longest_log_comes_first() -> None:
    """usage-1.log.1 is a part of usage-1.log where there is one, and else perhaps of usage.log."""
    assert logs_of("usage-1.log.1")[0] == "usage-1.log"
    assert logs_of("usage-20261121.log")[0] == "usage.log"


@given(st.text(".-_0123456789abgz", max_size=30))
def test_no_name_is_a_part_of_itself(name: str) -> None:
    assert all(base and base != name for base in logs_of(name))


def test_compressed_names_are_known_by_their_suffix() -> None:
    assert is_compressed_name("usage.log.1.gz") and is_compressed_name("usage.log.1.xz")
    assert not is_compressed_name("usage.log.1") and not is_compressed_name("gz")
