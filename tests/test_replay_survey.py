"""Looking at files before anything is sent: which there are, what they hold, and which records know them."""

import gzip
import os
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from metershipper.content import open_content
from metershipper.errors import UsageError
from metershipper.records import Sample, StoredFile
from metershipper.replay_paths import named_by
from metershipper.replay_survey import heads_of, survey, times_in
from metershipper.traffic import Traffic

START_MS = 1_790_000_000_000


def lines_of(count: int, seed: int = 1) -> list[bytes]:
    traffic = Traffic(seed, started_at_ms=START_MS)
    return [traffic.line() for _ in range(count)]


def nothing_known(*_: object) -> list[StoredFile]:
    return []


def packed(data: bytes, form: str) -> bytes:
    if form == "plain":
        return data
    return gzip.compress(data) if form == "gzip" else zstandard.compress(data)


@pytest.mark.parametrize("form", ["plain", "gzip", "zstd"])
def test_whatever_it_is_compressed_with_content_is_the_same(tmp_path: Path, form: str) -> None:
    lines = lines_of(400)
    data, path = b"".join(lines), tmp_path / "file"
    path.write_bytes(packed(data, form))
    at = len(b"".join(lines[:300]))
    known = [
        StoredFile(1, "x", None, None, Sample.of(lines[0]), Sample.of(data[at - 256 : at]), at),
        StoredFile(2, "x", None, None, Sample.of(lines[0]), Sample.of(b"other"), at),
        StoredFile(3, "x", None, None, Sample.of(lines[0]), Sample.of(b"other"), len(data) + 5),
        StoredFile(4, "x", None, None, Sample.of(lines[0]), Sample.of(data[-256:]), len(data)),
        StoredFile(5, "x", None, None, Sample(), Sample(), 0),
    ]
    read: list[int] = []
    seen = survey(str(path), lambda heads, place: known, read.append)
    assert (seen.content_bytes, seen.lines_end, seen.damage) == (len(data), len(data), None)
    assert (seen.compressed, seen.head, seen.end) == (form != "plain", Sample.of(lines[0]), Sample.of(data[-256:]))
    assert [record.file_id for record in seen.records] == [1, 4, 5]
    assert seen.lines == 400 if form != "plain" else abs(seen.lines - 400) < 20
    assert abs((seen.first_at or 0) - START_MS / 1000) < 60
    assert (seen.last_at or 0) > (seen.first_at or 0)
    assert sum(read) == path.stat().st_size


def test_a_line_without_its_newline_is_known_once_it_has_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    heads = []
    for data in (b'{"a": 1}', b'{"a": 1}\n', b'{"a": 1}\n{"b": 2}\n'):
        path.write_bytes(data)
        content = open_content(os.open(path, os.O_RDONLY))
        heads.append(heads_of(content))
        content.close()
    assert heads[0][0] in heads[1] and heads[0][0] in heads[2]


@pytest.mark.parametrize("form", ["plain", "gzip"])
def test_an_empty_file_holds_nothing(tmp_path: Path, form: str) -> None:
    (tmp_path / "file").write_bytes(packed(b"", form))
    seen = survey(str(tmp_path / "file"), nothing_known)
    assert (seen.content_bytes, seen.lines_end, seen.heads, seen.first_at) == (0, 0, (), None)


def test_of_a_corrupt_file_only_what_stands_before_the_damage_is_trusted(tmp_path: Path) -> None:
    """Case 29: gzip tells by its checksum at the very end; what it unpacks to before that is another text."""
    data = b"".join(lines_of(600))
    compressed = bytearray(gzip.compress(data, 1))
    compressed[len(compressed) // 3] ^= 0xFF
    (tmp_path / "file.gz").write_bytes(bytes(compressed))
    seen = survey(str(tmp_path / "file.gz"), nothing_known)
    assert "incorrect data check" in str(seen.damage)
    assert len(data) // 4 < seen.lines_end < len(data) // 2
    with gzip.open(tmp_path / "whole.gz", "wb") as file:
        file.write(data)
    (tmp_path / "cut.gz").write_bytes((tmp_path / "whole.gz").read_bytes()[:-3000])
    cut = survey(str(tmp_path / "cut.gz"), nothing_known)
    assert cut.damage == "it ends in the middle"
    assert data[: cut.lines_end].endswith(b"\n") and len(data) * 0.9 < cut.lines_end < len(data)


def test_a_bomb_is_looked_at_in_bounded_memory(tmp_path: Path) -> None:
    """(case 29)"""
    packer = zstandard.ZstdCompressor().compressobj()
    parts = [packer.compress(b"x" * 2**20) for _ in range(128)]
    (tmp_path / "bomb.zst").write_bytes(b"".join([*parts, packer.flush()]))
    tracemalloc.start()
    try:
        seen = survey(str(tmp_path / "bomb.zst"), nothing_known)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (seen.content_bytes, seen.lines_end) == (128 * 2**20, 0)
    assert peak < 40 * 2**20


def test_entries_among_the_lines_of_a_container_are_found(tmp_path: Path) -> None:
    (line,) = lines_of(1)
    wrapped = b"2026-11-21T10:00:00.1Z stdout F " + line
    (tmp_path / "0.log").write_bytes(b"2026-11-21T10:00:00Z stderr F starting\n" * 50 + wrapped)
    seen = survey(str(tmp_path / "0.log"), nothing_known)
    assert abs((seen.first_at or 0) - START_MS / 1000) < 60


# Which files there are


def test_files_globs_and_directories_name_each_file_once(tmp_path: Path) -> None:
    for name in ("a.log", "b/c.log.1", "b/.hidden", ".git/x.log", "b/d.bz2", "b/e.log~", "odd[1].log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}\n")
    os.mkfifo(tmp_path / "b" / "fifo")
    (tmp_path / "twin.log").hardlink_to(tmp_path / "a.log")
    named = named_by([str(tmp_path / "odd[1].log"), str(tmp_path), str(tmp_path / "**" / "*.log")])
    assert [Path(path).relative_to(tmp_path).as_posix() for path in named.paths] == [
        *("odd[1].log", "a.log", "b/c.log.1")
    ]
    reasons = {Path(path).name: reason for path, reason in named.skipped.items()}
    assert reasons == {
        ".hidden": "hidden",
        "d.bz2": "compressed in a way that can't be unpacked here",
        "e.log~": "left behind by an editor or a copy",
        "fifo": "not a regular file",
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("-", "no identity"),
        ("none.log", "can't be read: No such file"),
        ("*.none", "no file of that name"),
        ("fifo", "not a regular file"),
        ("/dev/null", "not a regular file"),
        ("dangling", "can't be read: No such file"),
    ],
)
def test_what_can_not_be_replayed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    os.symlink("nowhere", "dangling")
    with pytest.raises(UsageError, match=words) as refused:
        named_by([name])
    assert str(refused.value).startswith(name)


def test_what_was_not_named_itself_is_told_and_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links, what a pattern brings beside logs, and a directory that can't be listed."""
    for name in ("a.log", "a.log~", "picture.zip", "b/c.log", "closed/d.log", "other/e.log"):
        (tmp_path / "kong" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "kong" / name).write_bytes(b"{}\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "f.log").write_bytes(b"{}\n")
    monkeypatch.chdir(tmp_path / "kong")
    os.symlink("../elsewhere/f.log", "to_a_file.log")
    os.symlink("../elsewhere", "to_a_directory")
    os.symlink("nowhere", "b/dangling")
    really = os.scandir

    def scandir(path: str) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return really(path)

    monkeypatch.setattr(os, "scandir", scandir)
    named = named_by(["."])
    assert named.paths == ["./a.log", "./to_a_file.log", "./b/c.log", "./other/e.log"]
    skipped = {os.path.relpath(path): reason for path, reason in named.skipped.items()}
    assert skipped == {
        "a.log~": "left behind by an editor or a copy",
        "picture.zip": "compressed in a way that can't be unpacked here",
        "to_a_directory": "a link to a directory",
        "b/dangling": "a link that leads nowhere",
    }
    assert named.unreadable == {str(tmp_path / "kong" / "closed"): "can't be listed: Permission denied"}
    assert named.sought == set(named.paths)
    by_pattern = named_by(["a.log", "*", "./*"])
    assert by_pattern.paths == ["a.log", "to_a_file.log"]
    assert by_pattern.sought == {"to_a_file.log"}
    assert len(by_pattern.skipped) == 2  # each once
    with pytest.raises(UsageError, match="closed: can't be read: Permission denied"):
        named_by(["closed"])


# When its entries began


def written_on(day: int, count: int = 40) -> bytes:
    traffic = Traffic(day, started_at_ms=START_MS + day * 86_400_000)
    return b"".join(traffic.line() for _ in range(count))


@pytest.mark.parametrize("form", ["plain", "gzip"])
def test_the_times_of_a_file_are_those_of_all_that_was_seen(tmp_path: Path, form: str) -> None:
    """Content that was put together in another order than that of time can't be judged by its ends."""

    def seen_in(*days: int) -> tuple[int, int, bool]:
        (tmp_path / "file").write_bytes(packed(b"".join(written_on(day, 900) for day in days), form))
        seen = survey(str(tmp_path / "file"), nothing_known)
        assert seen.first_at is not None and seen.last_at is not None
        first, last = (int((at - START_MS / 1000) // 86400) for at in (seen.first_at, seen.last_at))
        return first, last, seen.in_order

    assert seen_in(0, 3, 9) == (0, 9, True)
    assert seen_in(3, 0, 9) == (0, 9, False)
    assert seen_in(0, 9, 3) == (0, 9, False)


@pytest.mark.parametrize("form", ["plain", "zstd"])
def test_how_old_what_stands_behind_a_record_is(tmp_path: Path, form: str) -> None:
    old, young = written_on(0), written_on(50)
    (tmp_path / "file").write_bytes(packed(old + young, form))
    known = StoredFile(1, "x", None, None, Sample.of(old[: old.index(b"\n") + 1]), Sample.of(old[-256:]), len(old))
    seen = survey(str(tmp_path / "file"), lambda heads, place: [known])
    assert seen.records == (known,)
    assert abs((seen.first_from(0) or 0) - START_MS / 1000) < 60
    assert abs((seen.first_from(len(old)) or 0) - START_MS / 1000 - 50 * 86400) < 60


def test_the_last_entry_of_a_corrupt_file_is_the_last_that_is_sent(tmp_path: Path) -> None:
    """(case 29)"""
    data = b"".join(written_on(day, 100) for day in range(6))
    compressed = bytearray(gzip.compress(data, 1))
    compressed[len(compressed) // 2] ^= 0xFF
    (tmp_path / "file.gz").write_bytes(bytes(compressed))
    seen = survey(str(tmp_path / "file.gz"), nothing_known)
    last_sent = max(times_in(data[: seen.lines_end]))
    assert seen.damage is not None and seen.last_at == last_sent
    assert last_sent > START_MS / 1000 + 86400
