"""The traffic generator: same bytes each time, shaped like Kong's, and a truth that an independent recount confirms."""

import json
import math
import runpy
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest

from metershipper.traffic import Traffic, Truth, cjson

START = 1_780_000_000_123
ENTRIES = 5_000
SAMPLES = Path(__file__).parents[1] / "samples"


@pytest.fixture(scope="module")
def written() -> tuple[list[bytes], Truth]:
    traffic = Traffic(7, started_at_ms=START)
    return [traffic.line() for _ in range(ENTRIES)], traffic.truth


@pytest.fixture(scope="module")
def lines(written: tuple[list[bytes], Truth]) -> list[bytes]:
    return written[0]


@pytest.fixture(scope="module")
def entries(lines: list[bytes]) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in lines]


def ai_containers(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The containers under `ai`, wherever the generation puts them; read with no knowledge of how they were made."""
    ai = entry.get("ai", {})
    return [ai] if "usage" in ai else list(ai.values())


def tokens_of(container: dict[str, Any]) -> tuple[int, int]:
    usage = container["usage"]
    prompt = usage.get("prompt_tokens", usage.get("prompt_token"))
    completion = usage.get("completion_tokens", usage.get("completion_token"))
    assert usage["total_tokens"] == prompt + completion
    return prompt, completion


def recount(entries: list[dict[str, Any]]) -> Truth:
    """What the entries must bill, by the rules alone."""
    truth = Truth(entries=len(entries))
    for entry in entries:
        if "consumer" not in entry:
            truth.anonymous += 1
            continue
        subject = entry["consumer"]["username"]
        truth.api_requests[subject] += 1
        truth.events += 1
        for container in ai_containers(entry):
            prompt, completion = tokens_of(container)
            if entry["response"]["status"] >= 400 and completion == 0:
                truth.failed_ai_calls += prompt > 0
                continue
            answered = container["meta"]["response_model"]
            asked = container["meta"].get("request_model", "UNSPECIFIED")
            billed = {
                (answered if asked == "UNSPECIFIED" else asked, "request"): prompt,
                (answered, "response"): completion,
            }
            for (model, direction), tokens in billed.items():
                truth.tokens[subject, model, direction] += tokens
                truth.events += tokens > 0
    return truth


def test_the_same_seed_gives_the_same_bytes(lines: list[bytes]) -> None:
    again, other = Traffic(7, started_at_ms=START), Traffic(8, started_at_ms=START)
    assert [again.line() for _ in range(300)] == lines[:300]
    assert [other.line() for _ in range(3)] != lines[:3]


def test_entry_and_line_are_two_views_of_one_stream(entries: list[dict[str, Any]]) -> None:
    """A test may use either: only what JSON can't say (more than 14 digits) differs."""
    traffic = Traffic(7, started_at_ms=START)
    for parsed in entries[:300]:
        entry = traffic.entry()
        assert list(entry) == list(parsed)
        assert orjson.loads(cjson(entry)) == parsed


def test_changing_an_entry_leaves_the_next_ones_alone(entries: list[dict[str, Any]]) -> None:
    traffic = Traffic(7, started_at_ms=START)
    for parsed in entries[:100]:
        entry = traffic.entry()
        assert orjson.loads(cjson(entry)) == parsed
        entry["service"]["name"] = entry["route"]["name"] = entry["request"]["headers"]["host"] = "changed"
        if "consumer" in entry:
            entry["consumer"]["username"] = "changed"


def test_each_line_is_one_entry_for_every_parser(lines: list[bytes]) -> None:
    for line in lines[:1_000]:
        assert line.endswith(b"}\n") and line.count(b"\n") == 1
        assert json.loads(line) == orjson.loads(line)


def test_truth_agrees_with_a_recount(written: tuple[list[bytes], Truth], entries: list[dict[str, Any]]) -> None:
    truth = written[1]
    assert recount(entries) == truth
    assert truth.entries == ENTRIES
    assert sum(truth.api_requests.values()) == ENTRIES - truth.anonymous
    assert 0.03 < truth.anonymous / ENTRIES < 0.05
    assert truth.failed_ai_calls > 50
    assert all(truth.tokens.values()) and "UNSPECIFIED" not in {model for _, model, _ in truth.tokens}


def test_all_generations_appear_in_their_share(entries: list[dict[str, Any]]) -> None:
    seen = Counter((entry["response"]["headers"]["via"].split("/")[1], "ai" in entry) for entry in entries)
    shares = {key: round(100 * count / ENTRIES) for key, count in seen.items()}
    expected = {
        ("2.8.3", False): 12,
        ("3.4.2", False): 13,
        ("3.9.1", False): 20,
        ("3.6.1", True): 8,
        ("3.7.1", True): 9,
        ("3.8.0", True): 10,
        ("3.9.1", True): 16,
        ("3.12.0.0-enterprise-edition", True): 12,
    }
    assert shares.keys() == expected.keys()
    assert all(abs(shares[key] - share) <= 2 for key, share in expected.items()), shares


def test_ai_usage_is_where_each_generation_puts_it(entries: list[dict[str, Any]]) -> None:
    shapes: dict[str, Counter[frozenset[str]]] = {}
    for entry in entries:
        if "ai" in entry:
            version = entry["response"]["headers"]["via"].split("/")[1]
            shapes.setdefault(version, Counter())[frozenset(entry["ai"])] += 1
    assert {version: set(found) for version, found in shapes.items()} == {
        "3.6.1": {frozenset({"meta", "usage"})},
        "3.7.1": {frozenset({"ai-proxy"})},
        "3.8.0": {frozenset({"ai-proxy"})},
        "3.9.1": {frozenset({"proxy"}), frozenset({"proxy", "ai-request-transformer"})},
        "3.12.0.0-enterprise-edition": {frozenset({"proxy"})},
    }


def test_the_odd_ai_calls_appear(entries: list[dict[str, Any]]) -> None:
    calls = [(entry, container) for entry in entries for container in ai_containers(entry)]
    failed = [entry for entry, call in calls if entry["response"]["status"] >= 400]
    assert {entry["response"]["status"] for entry in failed} == {400, 429, 502}
    assert {tokens_of(call)[1] for entry, call in calls if entry["response"]["status"] >= 400} == {0}
    assert 20 < sum(tokens_of(call)[1] == 0 and entry["response"]["status"] == 200 for entry, call in calls) < 250
    hits = [call for _, call in calls if call.get("cache", {}).get("cache_status") == "Hit"]
    assert hits and not any("llm_latency" in call["meta"] for call in hits)
    assert any(call["meta"]["request_model"] == "UNSPECIFIED" for _, call in calls)
    assert any(entry["response"]["headers"]["content-type"] == "text/event-stream" for entry, _ in calls)


def test_keys_appear_with_the_release_that_brought_them(entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        via = entry["response"]["headers"]["via"].split("/")[1]
        release = tuple(int(part) for part in via.split(".")[:2])
        assert ("id" in entry["request"]) == (release >= (3, 5))
        assert ("upstream_status" in entry) == (release >= (3, 3))
        assert ("source" in entry) == (release >= (3, 6))
        assert ("workspace" in entry) == ("workspace_name" in entry) == (release >= (3, 7))
        assert ("receive" in entry["latencies"]) == (release >= (3, 7))
        assert isinstance(entry["request"]["size"], int) and isinstance(entry["response"]["size"], int)


def test_request_ids_are_distinct_and_look_like_kongs(entries: list[dict[str, Any]]) -> None:
    ids = [entry["request"]["id"] for entry in entries if "id" in entry["request"]]
    assert len(set(ids)) == len(ids)
    for request_id in ids:
        words = [request_id[start : start + 8] for start in range(0, 32, 8)]
        assert len(request_id) == 32 and all(int(word, 16) < 2**31 for word in words)


def test_time_only_moves_forward(entries: list[dict[str, Any]]) -> None:
    times = [START, *(entry["started_at"] for entry in entries)]
    steps = [after - before for before, after in pairwise(times)]
    assert min(steps) == 1 and max(steps) == 40


def test_headers_and_arguments_have_the_forms_kong_gives_them(entries: list[dict[str, Any]]) -> None:
    departments = {type(entry["request"]["headers"]["x-department"]) for entry in entries}
    assert departments == {str, list}
    arguments = [value for entry in entries for value in entry["request"]["querystring"].values()]
    assert {type(value) for value in arguments} == {str, bool, list} and "" in arguments
    assert any(entry["request"]["querystring"] == {} for entry in entries)
    credentials = {entry["request"]["headers"].get("authorization") for entry in entries}
    assert credentials == {None, "REDACTED"}


def test_ai_lines_are_of_realistic_size(lines: list[bytes]) -> None:
    sizes = sorted(len(line) for line in lines if b'"ai":{' in line)
    assert sizes[0] > 2_300 and sizes[-1] < 3_500
    assert sizes[len(sizes) // 10] > 2_500 and sizes[len(sizes) * 9 // 10] < 3_200
    assert 0.52 < len(sizes) / len(lines) < 0.58


def test_only_the_old_generation_escapes_slashes(lines: list[bytes]) -> None:
    for line in lines:
        old = b'"kong\\/2.8.3"' in line
        assert (b"\\/" in line) == old
        assert not old or line.count(b"/") == line.count(b"\\/")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1775462399040, "1775462399040"),
        (99_999_999_999_999, "99999999999999"),
        (10**14, "1e+14"),
        (123_456_789_012_345, "1.2345678901234e+14"),
        (-(10**15), "-1e+15"),
        (1775462399040512345.0, "1.7754623990405e+18"),
        (998.0, "998"),
        (1.001 * 1000, "1001"),
        (211 / 7, "30.142857142857"),
        (0.00037, "0.00037"),
        (0.1 + 0.2, "0.3"),
        (1.5e-07, "1.5e-07"),
        (0, "0"),
        (-1, "-1"),
        (True, "true"),
        (False, "false"),
        (None, "null"),
        ({}, "{}"),
        ([], "[]"),
        ({"a": [1, {"b": None}], "c": ""}, '{"a":[1,{"b":null}],"c":""}'),
        ("/a/b", '"/a/b"'),
        ('say "hi" \\', '"say \\"hi\\" \\\\"'),
        ("\x00\x01\x0b\x1f", '"\\u0000\\u0001\\u000b\\u001f"'),
        ("\b\t\n\f\r", '"\\b\\t\\n\\f\\r"'),
        ("\x7f", '"\\u007f"'),
        ("café ☕ \u2028 🦍", '"café ☕ \u2028 🦍"'),
        ({"ключ\x7f": 1}, '{"ключ\\u007f":1}'),
    ],
)
def test_cjson_encodes_as_lua_does(value: Any, text: str) -> None:
    assert cjson(value) == text


def test_cjson_escapes_slashes_on_request() -> None:
    assert cjson({"a/b": ["/", "\\/"]}, escape_slash=True) == '{"a\\/b":["\\/","\\\\\\/"]}'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_cjson_refuses_what_lua_refuses(value: float) -> None:
    with pytest.raises(ValueError, match="NaN and infinity"):
        cjson({"a": [value]})


def test_the_sample_log_is_what_its_script_writes(tmp_path: Path) -> None:
    truth = runpy.run_path(str(SAMPLES / "generate.py"))["write_log"](tmp_path)
    written = (tmp_path / "usage.log").read_bytes()
    assert written == (SAMPLES / "usage.log").read_bytes(), "run: python samples/generate.py"
    assert recount([orjson.loads(line) for line in written.splitlines()]) == truth
