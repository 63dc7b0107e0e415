"""`map --explain`: entry by entry, what became of it and by which rule."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from metershipper.cli import cli
from metershipper.lines import MAX_LINE_BYTES

CONFIG = """
[metering]
subject = { field = "username" }
meter_mcp_tool_calls = true
[[metering.rules]]
service = "internal"
enabled = false
[[metering.rules]]
consumer = "globex"
methods = ["POST"]
"""


def entry(number: int, **sections: Any) -> bytes:
    request = {"id": f"r{number}", "method": "GET", "uri": "/"} | sections.pop("request", {})
    base = {"request": request, "started_at": 1782907200000 + number, "consumer": {"username": "acme"}}
    return json.dumps(base | sections).encode() + b"\n"


AI = {"proxy": {"usage": {"prompt_tokens": 3, "completion_tokens": 4}, "meta": {"request_model": "m1"}}}
MCP = {"mcp": {"rpc": [{"method": "tools/call", "tool_name": "t"}, {"method": "ping"}]}}
LINES = [
    entry(0, ai=AI),
    entry(1, service={"name": "internal"}),
    entry(2, consumer={"username": "globex"}),
    entry(3, consumer={"username": "globex"}, request={"method": "POST"}),
    b"not json\n",
    entry(4, consumer={}),
    entry(5, ai=MCP),
    b"\n",
]


def explain(tmp_path: Path, *options: str, data: bytes = b"".join(LINES)) -> Result:
    (tmp_path / "config.toml").write_text(CONFIG)
    (tmp_path / "usage.log").write_bytes(data)
    return CliRunner().invoke(
        cli, ["map", "--explain", *options, "-c", str(tmp_path / "config.toml"), str(tmp_path / "usage.log")]
    )


def test_every_entry_is_explained_on_one_line(tmp_path: Path) -> None:
    result = explain(tmp_path)
    assert result.exit_code == 0
    offsets = [sum(map(len, LINES[:number])) for number in range(len(LINES))]
    expected = [
        "r0 billed to acme: 1 kong.api_request, 3 request tokens of m1, 4 response tokens of m1 by [metering]",
        "r1 skipped: rule_disabled by [metering.rules[0]]",
        "r2 skipped: filtered_method by [metering.rules[1]]",
        "r3 billed to globex: 1 kong.api_request by [metering.rules[1]]",
        "- dead letter: not_json (not valid JSON at character 0)",
        "r4 skipped: no_subject by [metering]",
        "r5 billed to acme: 1 kong.api_request, 1 kong.mcp_tool_call by [metering]",
        "- skipped: blank_line",
    ]
    log = tmp_path / "usage.log"
    assert result.output.splitlines() == [f"{log}:{o} {e}" for o, e in zip(offsets, expected, strict=True)]


def test_as_json_it_holds_the_events_themselves(tmp_path: Path) -> None:
    reports = [json.loads(line) for line in explain(tmp_path, "--json").output.splitlines()]
    assert [report["outcome"] for report in reports].count("billed") == 3
    mapped = CliRunner().invoke(cli, ["map", "-c", str(tmp_path / "config.toml"), str(tmp_path / "usage.log")]).stdout
    events = [event for report in reports if report["outcome"] == "billed" for event in report["events"]]
    assert events == [json.loads(line) for line in mapped.splitlines()]
    assert reports[1] | {"path": ""} == {
        "path": "",
        "offset": len(LINES[0]),
        "request_id": "r1",
        "rule": "metering.rules[0]",
        "outcome": "skipped",
        "reason": "rule_disabled",
    }


def test_a_line_above_the_limit_is_explained_too(tmp_path: Path) -> None:
    """Case 21."""
    result = explain(tmp_path, data=b"x" * (MAX_LINE_BYTES + 2_000_000) + b"\n" + LINES[0])
    assert "- dead letter: line_too_long (a line of" in result.output.splitlines()[0]
    assert "r0 billed to acme" in result.output.splitlines()[1]


@pytest.mark.parametrize("hostile", ["\x1b[31mred", "[bold]x[/bold]", "a\nb"])
def test_what_a_log_holds_cannot_dress_up_the_terminal(tmp_path: Path, hostile: str) -> None:
    """Case 74: no escape sequence, markup or line break of an entry reaches the terminal."""
    result = explain(tmp_path, data=entry(0, request={"id": hostile}))
    (line,) = result.output.splitlines()
    assert "\x1b" not in line
    assert "[bold]" not in hostile or "[bold]x[/bold]" in line


def test_models_and_subjects_cannot_either(tmp_path: Path) -> None:
    """Case 74, for what stands in the events: a model that forges a line of the report stays on its own."""
    ai = {"proxy": {"usage": {"prompt_tokens": 1}, "meta": {"request_model": "\x1b[31mX\nbad line"}}}
    result = explain(tmp_path, data=entry(0, ai=ai))
    (line,) = result.output.splitlines()
    assert "\x1b" not in line


def test_json_alone_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["map", "--json", str(tmp_path)])
    assert result.exit_code == 2
    assert "--json goes with --explain" in result.stderr


def test_a_record_of_a_container_is_explained_where_it_begins(tmp_path: Path) -> None:
    stamp, line = b"2026-11-21T10:00:00.1Z stdout ", LINES[0]
    data = b"\n" + stamp + b"P " + line[:50] + b"\n" + stamp + b"F " + line[50:] + stamp + b"F started\n"
    told = [json.loads(line) for line in explain(tmp_path, "--json", data=data).output.splitlines()]
    assert [(report["offset"], report["outcome"], report.get("reason")) for report in told] == [
        (0, "skipped", "blank_line"),
        (1, "billed", None),
        (data.rindex(stamp), "skipped", "not_an_entry"),
    ]
    assert told[1]["request_id"] == "r0"
