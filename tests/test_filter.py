"""`metershipper map`: entries in, events as NDJSON and a summary out; every line accounted for, nothing touched."""

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard
from click.testing import CliRunner, Result

from metershipper.cli import cli
from metershipper.content import BLOCK_BYTES
from metershipper.filter import SHOWN_BAD_LINES
from metershipper.lines import MAX_LINE_BYTES
from metershipper.sandbox import parse_events
from metershipper.traffic import Traffic, Truth

START = 1782907200000
BOM = b"\xef\xbb\xbf"
GOOD = b'{"request":{"id":"r-%d"},"started_at":1782907200015,"consumer":{"id":"c-1"}}\n'
COMMAND = [sys.executable, "-m", "metershipper", "map"]


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No configuration but what a test names; and `map` leaves nothing behind."""
    for name in list(os.environ):
        if name.startswith("METERSHIPPER_"):
            monkeypatch.delenv(name)
    directory = tmp_path / "cwd"
    directory.mkdir()
    monkeypatch.chdir(directory)
    yield directory
    assert [path.name for path in directory.iterdir() if path.name != "config.toml"] == []


@pytest.fixture(scope="module")
def traffic() -> tuple[bytes, Truth]:
    source = Traffic(99, started_at_ms=START)
    return b"".join(source.line() for _ in range(1_500)), source.truth


def run_map(*arguments: str | Path, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(cli, ["map", *map(str, arguments)], input=stdin)


def events_of(result: Result) -> list[dict[str, Any]]:
    assert result.stdout_bytes == b"" or result.stdout_bytes.endswith(b"\n")
    return [orjson.loads(line) for line in result.stdout_bytes.splitlines()]


def ids_of(result: Result) -> list[str]:
    return [event["id"] for event in events_of(result)]


def good(*numbers: int) -> bytes:
    return b"".join(GOOD % number for number in numbers)


def good_ids(*numbers: int) -> list[str]:
    return [f"r-{number}-1782907200015:api_request" for number in numbers]


def test_it_works_with_no_configuration_at_all(tmp_path: Path, traffic: tuple[bytes, Truth]) -> None:
    data, truth = traffic
    (tmp_path / "usage.log").write_bytes(data)
    assert len(data) > 2 * BLOCK_BYTES
    result = run_map(tmp_path / "usage.log")
    assert result.exit_code == 0
    events = events_of(result)
    assert len(events) == truth.events == len({event["id"] for event in events})
    assert parse_events(orjson.dumps(events), "application/cloudevents-batch+json", "v3") == events
    tokens = {
        direction: sum(count for (_, _, each), count in truth.tokens.items() if each == direction)
        for direction in ("request", "response")
    }
    hashed = sum("id" not in json.loads(line)["request"] and b'"consumer"' in line for line in data.splitlines())
    assert result.stderr.splitlines() == [
        f"1500 lines: {1500 - truth.anonymous} entries billed, {truth.anonymous} skipped, 0 bad lines",
        f"{truth.events} events; tokens: {tokens['request']} request (input), {tokens['response']} response (output)",
        f"skipped: no_subject {truth.anonymous}",
        f"AI calls not billed: failed_ai_call {truth.failed_ai_calls} (only an estimate of their input was logged)",
        f"ids: {hashed} entries have no request id (Kong before 3.5); theirs is a hash of the entry",
    ]


def test_a_file_and_stdin_give_the_same_bytes(tmp_path: Path, traffic: tuple[bytes, Truth]) -> None:
    """Ground rule 2: ids come from the request, never from the file."""
    data, _ = traffic
    (tmp_path / "usage.log").write_bytes(data)
    from_file = run_map(tmp_path / "usage.log").stdout_bytes
    assert run_map("-", stdin=data).stdout_bytes == from_file
    assert run_map(stdin=data).stdout_bytes == from_file
    windows = BOM + data.replace(b"\n", b"\r\n")
    assert run_map(stdin=windows).stdout_bytes == from_file
    process = subprocess.run([*COMMAND, "-"], input=data, capture_output=True, timeout=60)
    assert (process.returncode, process.stdout) == (0, from_file)
    assert process.stderr.decode().startswith("1500 lines: ")


def test_nothing_in_is_nothing_out() -> None:
    result = run_map()
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.splitlines() == [
        "0 lines: 0 entries billed, 0 skipped, 0 bad lines",
        "0 events; tokens: 0 request (input), 0 response (output)",
    ]


def test_a_last_line_without_its_newline_is_billed() -> None:
    """Case 3: a pipe that ended will not bring it any more."""
    assert ids_of(run_map(stdin=good(1, 2)[:-1])) == good_ids(1, 2)


def test_several_paths_are_mapped_in_turn(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tmp_path / f"{number}.log").write_bytes(good(number))
    result = run_map(tmp_path / "1.log", "-", tmp_path / "3.log", stdin=good(7))
    assert ids_of(result) == good_ids(1, 7, 3)
    assert result.stderr.startswith("3 lines: 3 entries billed")


def test_bad_lines_are_told_by_their_place_and_never_by_their_content(tmp_path: Path) -> None:
    """Cases 71 and 74."""
    log = tmp_path / "usage.log"
    log.write_bytes(good(1) + b'{"apikey":"s3cret"}\n' + good(2) + b"\x1b[31ms3cret\n" + good(3) + b"cut")
    first, length = len(good(1)), len(good(1))
    result = run_map(log)
    assert ids_of(result) == good_ids(1, 2, 3)
    second = first + 20 + length
    third = second + 12 + length
    assert result.stderr.splitlines() == [
        f"bad line: {log}, bytes {first}-{first + 20}: not_an_entry: "
        "a JSON object without `request`, which every Kong entry has",
        f"bad line: {log}, bytes {second}-{second + 12}: not_json: not valid JSON at character 0",
        f"bad line: {log}, bytes {third}-{third + 3}: not_json: not valid JSON at character 0",
        "6 lines: 3 entries billed, 0 skipped, 3 bad lines",
        "3 events; tokens: 0 request (input), 0 response (output)",
        "bad lines: not_json 2",
        "bad lines: not_an_entry 1",
    ]


def test_bad_lines_are_all_counted_but_only_the_first_are_told(tmp_path: Path) -> None:
    for name, count in (("a", 4), ("b", 30), ("c", 5)):
        (tmp_path / name).write_bytes(b"bad\n" * count)
    result = run_map(*(tmp_path / name for name in "abc"))
    told = [line for line in result.stderr.splitlines() if line.startswith("bad line: ")]
    assert len(told) == SHOWN_BAD_LINES
    assert [line.split(",")[0] for line in told] == [f"bad line: {tmp_path / name}" for name in "aaaabbbbbb"]
    assert "39 lines: 0 entries billed, 0 skipped, 39 bad lines" in result.stderr
    assert "bad line: stdin, bytes 0-4:" in run_map(stdin=b"bad\n").stderr


@pytest.mark.parametrize("end", ["in the middle", "at the end", "at the end without a newline", "alone"])
def test_a_line_above_the_limit_costs_no_other_line(tmp_path: Path, end: str) -> None:
    """Case 21: one dead letter, the next line unaffected; also where it begins and ends inside of a block."""
    size = MAX_LINE_BYTES + 3 * BLOCK_BYTES // 2
    long = b'{"request":{"id":"' + b"x" * (size - 18)
    assert len(long) == size
    before, after = {
        "in the middle": (good(1, 2), b"\n" + good(3) + b"bad\n" + good(4)),
        "at the end": (good(1, 2), b"\n"),
        "at the end without a newline": (good(1, 2), b""),
        "alone": (b"", b""),
    }[end]
    log = tmp_path / "usage.log"
    log.write_bytes(before + long + after)
    result = run_map(log)
    assert ids_of(result) == (good_ids(1, 2) if before else []) + (good_ids(3, 4) if len(after) > 1 else [])
    length = size + (1 if after else 0)
    assert result.stderr.splitlines()[0] == (
        f"bad line: {log}, bytes {len(before)}-{len(before) + length}: line_too_long: "
        f"a line of {size} bytes, SHA-256 {sha256(long).hexdigest()}; its beginning is kept"
    )
    assert "bad lines: line_too_long 1" in result.stderr
    if end == "in the middle":
        start = len(before) + length + len(good(3))
        assert result.stderr.splitlines()[1].startswith(f"bad line: {log}, bytes {start}-{start + 4}: not_json")


def test_a_line_of_several_megabytes_is_billed() -> None:
    """Case 21: bodies of language models in logs."""
    long = GOOD % 1
    long = long.replace(b"}\n", b',"x":"' + b"y" * (5 * BLOCK_BYTES) + b'"}\n')
    assert ids_of(run_map(stdin=good(0) + long + good(2))) == good_ids(0, 1, 2)


GZ = gzip.compress(good(0, 1)) + gzip.compress(good(2))


def test_a_gz_is_mapped_like_what_it_holds(tmp_path: Path) -> None:
    """Case 29: also when it is made of several parts, and whatever it is called."""
    path = tmp_path / "usage.log.1"
    path.write_bytes(GZ)
    result = run_map(path)
    assert (result.exit_code, ids_of(result)) == (0, good_ids(0, 1, 2))


def test_what_follows_a_damaged_archive_is_mapped_too(tmp_path: Path) -> None:
    """Case 29: one bad month among many hides no other."""
    cut, whole, worse = tmp_path / "cut.gz", tmp_path / "whole.log", tmp_path / "worse.gz"
    cut.write_bytes(GZ[:-9])
    whole.write_bytes(gzip.decompress(GZ))
    worse.write_bytes(GZ[:20])
    result = CliRunner().invoke(cli, ["map", str(cut), str(whole), str(worse)])
    alone = CliRunner().invoke(cli, ["map", str(whole)])
    assert result.exit_code == 1
    assert result.stdout.endswith(alone.stdout) and alone.stdout
    assert [line for line in result.stderr.splitlines() if ": damaged (" in line] == [
        f"metershipper: {path}: damaged (it ends in the middle); mapped as far as it unpacks" for path in (cut, worse)
    ]


def test_several_entries_on_a_line_are_told(tmp_path: Path) -> None:
    """What is billed, skipped and bad adds up to the entries, not to the lines."""
    path = tmp_path / "array.log"
    path.write_bytes(b'[{"request":{}},{"a":1}]\n{"b":2}\n')
    result = CliRunner().invoke(cli, ["map", str(path)])
    assert "2 lines with 3 entries: 0 entries billed, 0 skipped, 3 bad lines" in result.stderr


@pytest.mark.parametrize(
    "damaged", [GZ[:-9], GZ[:-9] + b"\xff" * 9, GZ + b"rest"], ids=["cut", "overwritten", "longer"]
)
def test_a_damaged_gz_is_mapped_as_far_as_it_unpacks_and_fails(tmp_path: Path, damaged: bytes) -> None:
    """Case 29: what decodes is mapped, then an error names the file and the exit code tells."""
    path = tmp_path / "usage.log.gz"
    path.write_bytes(damaged)
    result = run_map(path)
    assert result.exit_code == 1
    assert ids_of(result)[:2] == good_ids(0, 1)
    assert f"metershipper: {path}: damaged (" in result.stderr
    assert "lines: " in result.stderr and "Traceback" not in result.stderr


def test_a_zst_is_unpacked(tmp_path: Path) -> None:
    """Whatever its name; in pieces, none of which tears a line."""
    path = tmp_path / "usage.log.1"
    path.write_bytes(zstandard.compress(good(*range(1, 2000))))
    assert ids_of(run_map(path)) == good_ids(*range(1, 2000))


def test_a_zst_that_ends_too_early_is_mapped_as_far_as_it_unpacks(tmp_path: Path) -> None:
    """Case 29."""
    path = tmp_path / "usage.log.zst"
    packed = zstandard.compress(good(1) + random.Random(1).randbytes(400_000).hex().encode() + b"\n" + good(2))
    path.write_bytes(packed[: len(packed) - 3])
    result = run_map(path)
    assert (result.exit_code, ids_of(result)[:1]) == (1, good_ids(1))
    assert f"{path}: damaged (it ends in the middle); mapped as far as it unpacks" in result.stderr


def test_a_path_that_cannot_be_read_ends_the_run_after_those_before_it(tmp_path: Path) -> None:
    log, missing = tmp_path / "usage.log", tmp_path / "missing.log"
    log.write_bytes(good(1))
    result = run_map(log, missing)
    assert result.exit_code == 2 and ids_of(result) == good_ids(1)
    assert result.stderr.endswith(f"\nmetershipper: {missing}: can't be read: No such file or directory\n")
    assert result.stderr.startswith("1 lines: 1 entries billed")
    result = run_map(tmp_path)
    assert result.exit_code == 2 and "can't be read: Is a directory" in result.stderr


CONFIG = """
[metering]
source = "eu"
meter_api_requests = false
emit_zero_tokens = true
[metering.subject]
field = "username"
"""
AI_LINE = (
    b'{"request":{"id":"r"},"started_at":1782907200015,"consumer":{"id":"c","username":"acme"},'
    b'"ai":{"proxy":{"usage":{"prompt_tokens":7,"completion_tokens":0}}}}\n'
)


@pytest.mark.parametrize("how", ["-c", "environment", "here"])
def test_a_configuration_is_followed_wherever_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path = Path("config.toml") if how == "here" else tmp_path / "other.toml"
    path.write_text(CONFIG)
    if how == "environment":
        monkeypatch.setenv("METERSHIPPER_CONFIG", str(path))
    result = run_map(*(("-c", path) if how == "-c" else ()), stdin=AI_LINE)
    assert result.exit_code == 0
    assert [(event["source"], event["subject"], event["data"]["tokens"]) for event in events_of(result)] == [
        ("eu", "acme", 7),
        ("eu", "acme", 0),
    ]


@pytest.mark.parametrize(
    ("text", "problem"), [("[metering]\nsubjects = 1\n", "metering.subjects"), ("[metering", "not valid TOML")]
)
def test_a_wrong_configuration_maps_nothing(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "other.toml"
    path.write_text(text)
    result = run_map("-c", path, stdin=AI_LINE)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"metershipper: {path}: ") and problem in result.stderr


def test_a_slow_pipe_is_mapped_as_it_comes() -> None:
    """`tail -f usage.log | metershipper map -` shows each event at once, and half a line only when it is whole."""
    with subprocess.Popen(
        [*COMMAND, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        for number in (1, 2):
            process.stdin.write(good(number))
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["id"] == good_ids(number)[0]
        process.stdin.write(good(3)[:30])
        process.stdin.flush()
        process.stdin.write(good(3)[30:])
        process.stdin.close()
        assert json.loads(process.stdout.readline())["id"] == good_ids(3)[0]
        assert process.stderr.read().startswith(b"3 lines: 3 entries billed, 0 skipped, 0 bad lines")
    assert process.returncode == 0


def test_a_reader_that_leaves_early_gets_no_traceback(traffic: tuple[bytes, Truth], tmp_path: Path) -> None:
    """`metershipper map usage.log | head -n 1`."""
    log = tmp_path / "usage.log"
    log.write_bytes(traffic[0])
    with subprocess.Popen([*COMMAND, str(log)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        assert json.loads(process.stdout.readline())["specversion"] == "1.0"
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode in (0, 1)


STAMP = b"2026-11-21T10:00:00.123456789Z"


def cri(text: bytes, tag: bytes = b"F", stream: bytes = b"stdout") -> bytes:
    return STAMP + b" " + stream + b" " + tag + b" " + text + b"\n"


def test_the_log_of_a_container_is_mapped_as_it_is(tmp_path: Path) -> None:
    """CRI, as Kubernetes keeps it: cut records, two streams, nginx's own lines, a hole left by a crash."""
    access = b'10.0.0.1 - - [21/Nov/2026:10:00:00 +0000] "GET /a HTTP/1.1" 200 5 "-" "curl/8"'
    entries = [GOOD[:-1] % number for number in range(3)]
    log = tmp_path / "0.log"
    log.write_bytes(
        cri(b"2026/11/21 10:00:00 [notice] 1#0: start worker processes", stream=b"stderr")
        + cri(entries[0][:40], b"P") + cri(b"stack traceback:", stream=b"stderr") + cri(entries[0][40:])
        + cri(access) + b"\0\0\0" + cri(entries[1]) + cri(b'{"torn') + cri(entries[2])[:-1]
    )  # fmt: skip
    process = subprocess.run([*COMMAND, str(log)], capture_output=True, timeout=60)
    assert process.returncode == 0
    assert [json.loads(line)["id"] for line in process.stdout.splitlines()] == good_ids(0, 1, 2)
    start = log.read_bytes().index(cri(b'{"torn'))
    assert process.stderr.decode().splitlines() == [
        f"bad line: {log}, bytes {start}-{start + len(cri(b'{' + b'torn')) + 1}: not_json: "
        "not valid JSON at character 1",
        "8 lines with 7 entries: 3 entries billed, 3 skipped, 1 bad lines",
        "3 events; tokens: 0 request (input), 0 response (output)",
        "skipped: not_an_entry 3",
        "bad lines: not_json 1",
        "NUL bytes stepped over: 3 (a crash of the writer's machine, or a sparse file)",
    ]


def test_a_cut_record_over_the_end_of_a_block_is_not_torn() -> None:
    """Case 21: blocks end where a record does, so that one of several megabytes is billed from any of its parts on."""
    long = (GOOD % 1).replace(b"}\n", b',"x":"' + b"y" * (3 * BLOCK_BYTES) + b'"}')
    parts = [long[start : start + 16_384] for start in range(0, len(long), 16_384)]
    data = cri(GOOD[:-1] % 0) + b"".join(cri(part, b"P") for part in parts[:-1]) + cri(parts[-1]) + cri(GOOD[:-1] % 2)
    assert ids_of(run_map(stdin=data)) == good_ids(0, 1, 2)


def test_a_record_above_the_limit_costs_no_other() -> None:
    """Case 21: memory stays bounded; the parts of such a record are bad lines, and what stands around it is billed."""
    part = cri(b'"y","z":' * 2048, b"P")
    count = MAX_LINE_BYTES // len(part) + 100
    data = cri(GOOD[:-1] % 0) + cri(GOOD[:-3] % 1, b"P") + part * count + cri(b'"}') + cri(GOOD[:-1] % 2)
    result = run_map(stdin=data)
    assert ids_of(result) == good_ids(0, 2)
    assert f"{count + 4} lines with " in result.stderr and " entries: 2 entries billed, 0 skipped" in result.stderr
