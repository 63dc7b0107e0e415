"""Taking over from Kong's plugin: import, `check`, `map`, and out come the events that the documented example bills."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from metershipper.cli import cli
from tests.test_kong_import import EXAMPLES, FORMS

ENTRY = {
    "request": {
        "id": "6f1d9c0e2b7a4f5c8d3e1a0b9c7d5e4f",
        "method": "POST",
        "uri": "/chat",
        "size": 100,
        "headers": {"host": "api.test", "x-tenant-id": "tenant-7", "x-department": "sales", "x-project": "apollo"},
    },
    "response": {"status": 200, "size": 200},
    "started_at": 1782907200015,
    "consumer": {"id": "c-1", "username": "alice"},
    "ai": {
        "proxy": {
            "usage": {"prompt_tokens": 14, "completion_tokens": 21},
            "meta": {"request_model": "gpt-4o", "response_model": "gpt-4o-2024-11-20", "provider_name": "openai"},
        }
    },
}
API = {"type": "kong.api_request", "subject": "consumer:c-1", "data": {"request_method": "POST"}}
# What each documented example bills for that entry: of each event the parts that the example is about.
BILLED: dict[str, list[dict[str, Any]]] = {
    "by consumer": [API],
    "AI tokens": [
        {
            "type": "kong.llm_request",
            "subject": "consumer:c-1",
            "data": {"tokens": 14, "type": "request", "model": "gpt-4o", "provider": "openai"},
        },
        {
            "type": "kong.llm_request",
            "subject": "consumer:c-1",
            "data": {"tokens": 21, "type": "response", "model": "gpt-4o-2024-11-20", "provider": "openai"},
        },
    ],
    "by tenant header": [API | {"subject": "tenant-7"}],
    "by department and project": [API | {"data": {"department": "sales", "project": "apollo"}}],
}


def holds(event: dict[str, Any], wanted: dict[str, Any]) -> bool:
    data = {name: event["data"].get(name) for name in wanted["data"]}
    return (event["type"], event["subject"], data) == (wanted["type"], wanted["subject"], wanted["data"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("example", EXAMPLES)
def test_what_kongs_plugin_bills_is_billed_after_the_import(example: str, form: str, tmp_path: Path) -> None:
    plugin, config, log = (tmp_path / name for name in ("plugin", "config.toml", "usage.log"))
    plugin.write_text(FORMS[form](EXAMPLES[example]))
    log.write_text(json.dumps(ENTRY) + "\n")

    imported = CliRunner().invoke(cli, ["import-kong", str(plugin)])
    assert imported.exit_code == 0
    config.write_text(imported.stdout)
    checked = CliRunner().invoke(cli, ["check", "-c", str(config)])
    assert checked.exit_code == 0, checked.output
    mapped = CliRunner().invoke(cli, ["map", "-c", str(config), str(log)])
    events = [json.loads(line) for line in mapped.stdout.splitlines()]
    assert len(events) == len(BILLED[example])
    assert all(holds(event, wanted) for event, wanted in zip(events, BILLED[example], strict=True)), events
