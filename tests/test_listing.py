"""What stands in the directories: logs and what may be parts of them. Numbers are those of the cases."""

import os
from pathlib import Path
from typing import Literal

import pytest

from metershipper.config import FileInput
from metershipper.listing import LISTING_SECONDS, MAX_SUBDIRECTORIES, Found, Listing
from metershipper.records import Identity

Clock = list[float]


def listing_of(
    *paths: Path | str, clock: Clock | None = None, read_from: Literal["beginning", "end"] = "end"
) -> Listing:
    times = [0.0] if clock is None else clock
    return Listing([FileInput(path=str(path), read_from=read_from) for path in paths], lambda: times[0])


def nothing_known(_: Identity) -> str | None:
    return None


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"{}\n")


def rested(*directories: Path) -> None:
    """These directories did not change for a while."""
    for directory in directories:
        os.utime(directory, ns=(10**18, 10**18))


def names(found: dict[str, list[Found]]) -> dict[str, str]:
    """Parts by name, and the name of the log of each."""
    return {Path(part.path).name: Path(part.log).name for parts in found.values() for part in parts}


def test_logs_and_their_compressed_parts_are_told_apart(tmp_path: Path) -> None:
    """`usage.log*` names them all (cases 19, 27)."""
    touch(*(tmp_path / name for name in ("usage.log", "usage.log.1", "usage.log.2.gz", "usage.log.3.zst")))
    logs, compressed = listing_of(tmp_path / "usage.log*").logs(())
    whole = {Path(each.path).name: each.whole and Path(each.whole).name for each in logs.values()}
    assert whole == {"usage.log": None, "usage.log.1": "usage.log"}
    assert {Path(each.path).name: Path(each.log).name for each in compressed} == {
        "usage.log.2.gz": "usage.log",
        "usage.log.3.zst": "usage.log",
    }
    assert all(each.listed and each.from_end for each in (*logs.values(), *compressed))


def test_read_from_end_is_for_inputs_that_were_never_looked_through(tmp_path: Path) -> None:
    touch(tmp_path / "usage.log")
    listing = listing_of(tmp_path / "usage.log")
    assert [each.from_end for each in listing.logs(())[0].values()] == [True]
    assert [each.from_end for each in listing.logs({str(tmp_path / "usage.log")})[0].values()] == [False]


def test_a_compressed_file_without_a_log_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """(case 29)"""
    touch(tmp_path / "alone.log.1.xz")
    listing = listing_of(tmp_path / "alone*")
    for _ in range(3):
        assert listing.logs(()) == ({}, [])
    assert len(caplog.messages) == 1 and "no log stands beside it" in caplog.messages[0]
    assert not listing.failures


def test_parts_belong_to_the_log_with_the_longest_name(tmp_path: Path) -> None:
    """usage-1.log.1 is one of usage-1.log where there is one (case 8)."""
    touch(
        *(tmp_path / name for name in ("usage.log.1", "usage-1.log.1", "usage-20261121.log.gz", "other.log.1", "a.txt"))
    )
    logs = {str(tmp_path / "usage.log"): "in", str(tmp_path / "usage-1.log"): "in"}
    found = listing_of(tmp_path / "usage.log").beside(logs, nothing_known)
    assert names(found) == {
        "usage.log.1": "usage.log",
        "usage-1.log.1": "usage-1.log",
        "usage-20261121.log.gz": "usage.log",
    }
    assert all(part.named and part.input == "in" and not part.beneath for part in found[str(tmp_path)])


def test_a_file_that_was_read_before_is_a_part_under_any_name(tmp_path: Path) -> None:
    """(case 8)"""
    touch(tmp_path / "kept-aside", tmp_path / "stranger")
    known = os.stat(tmp_path / "kept-aside").st_ino
    log = str(tmp_path / "usage.log")
    found = listing_of(log).beside({log: log}, lambda identity: log if identity[1] == known else "another.log")
    assert [(Path(part.path).name, part.log, part.named) for part in found[str(tmp_path)]] == [
        ("kept-aside", log, False)
    ]


def test_an_unchanged_directory_is_listed_again_only_after_a_while(tmp_path: Path) -> None:
    """A released file that grew does not change it (case 5)."""
    clock = [0.0]
    log = str(tmp_path / "usage.log")
    touch(tmp_path / "usage.log.1")
    rested(tmp_path)
    listing = listing_of(log, clock=clock)
    assert listing.beside({log: log}, nothing_known)
    assert listing.beside({log: log}, nothing_known) == {}
    clock[0] += LISTING_SECONDS
    assert listing.beside({log: log}, nothing_known)
    assert listing.beside({log: log}, nothing_known) == {}
    listing.look_again()
    assert listing.beside({log: log}, nothing_known)
    touch(tmp_path / "usage.log.2")
    assert len(names(listing.beside({log: log}, nothing_known))) == 2
    assert len(names(listing.beside({log: log}, nothing_known))) == 2  # it may change within a tick of its clock


def test_a_directory_beneath_is_looked_through_unless_it_has_such_a_log_itself(tmp_path: Path) -> None:
    """logrotate's olddir; and another gateway's directory (case 8)."""
    touch(tmp_path / "usage.log", tmp_path / "old" / "usage.log.1")
    touch(tmp_path / "gateway-2" / "usage.log", tmp_path / "gateway-2" / "usage.log.1")
    (tmp_path / "old" / "deeper").mkdir()
    touch(tmp_path / "old" / "deeper" / "usage.log.2")
    (tmp_path / "link").symlink_to("gateway-2")
    log = str(tmp_path / "usage.log")
    found = listing_of(log).beside({log: log}, nothing_known)
    assert names(found) == {"usage.log.1": "usage.log"}
    assert [part.beneath for part in found[str(tmp_path / "old")]] == [True]
    assert str(tmp_path / "gateway-2") not in found


def test_a_directory_with_many_beneath_it_is_no_place_of_rotation(tmp_path: Path) -> None:
    """What is looked through at every look is bounded."""
    log = str(tmp_path / "usage.log")
    for number in range(MAX_SUBDIRECTORIES):
        touch(tmp_path / f"{number}" / "usage.log.1")
    assert len(listing_of(log).beside({log: log}, nothing_known)) == MAX_SUBDIRECTORIES + 1
    (tmp_path / "one-more").mkdir()
    assert list(listing_of(log).beside({log: log}, nothing_known)) == [str(tmp_path)]


def test_a_directory_that_is_gone_holds_nothing(tmp_path: Path) -> None:
    """And that is no failure: it may be mounted later (case 19)."""
    log = str(tmp_path / "late" / "usage.log")
    listing = listing_of(log)
    assert listing.logs(())[0] == {}
    assert listing.beside({log: log}, nothing_known) == {str(tmp_path / "late"): []}
    assert not listing.failures
    touch(tmp_path / "late" / "usage.log.1")
    assert names(listing.beside({log: log}, nothing_known)) == {"usage.log.1": "usage.log"}


def test_parts_stand_beside_a_link_and_beside_what_it_leads_to(tmp_path: Path) -> None:
    """(case 18)"""
    touch(tmp_path / "pods" / "0.log", tmp_path / "pods" / "0.log.20261121-101010.gz", tmp_path / "usage.log.1")
    (tmp_path / "usage.log").symlink_to("pods/0.log")
    log = str(tmp_path / "usage.log")
    found = listing_of(log).beside({log: log}, nothing_known)
    assert names(found) == {"usage.log.1": "usage.log", "0.log.20261121-101010.gz": "usage.log"}


def test_links_and_directories_are_no_parts(tmp_path: Path) -> None:
    """A planted link leads nowhere (case 72)."""
    touch(tmp_path / "secret")
    (tmp_path / "usage.log.1").symlink_to("secret")
    (tmp_path / "usage.log.2").mkdir()
    os.mkfifo(tmp_path / "usage.log.3")
    log = str(tmp_path / "usage.log")
    assert names(listing_of(log).beside({log: log}, nothing_known)) == {}


def test_a_complaint_is_told_once_until_it_is_forgiven(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """(case 20)"""
    listing = listing_of(tmp_path / "usage.log")
    for _ in range(3):
        listing.complain("usage.log", "is odd", failed=False)
    assert not listing.failures
    listing.complain("usage.log", "is worse")
    assert listing.failures
    listing.forgive("usage.log")
    listing.complain("usage.log", "is worse")
    assert caplog.messages == ["usage.log: is odd", "usage.log: is worse", "usage.log: is worse"]
