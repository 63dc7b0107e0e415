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


SCOPED = {
    "decK, nested in a consumer": """
_format_version: "3.0"
consumers:
- username: alice
  plugins:
  - name: metering-and-billing
    config: {ingest_endpoint: "https://us.api.konghq.com/v3/openmeter/events", api_token: t,
             meter_ai_token_usage: false}
""",
    "Admin API, for a consumer": json.dumps(
        {
            "name": "metering-and-billing",
            "consumer": {"id": "c-1"},
            "config": {
                "ingest_endpoint": "https://us.api.konghq.com/v3/openmeter/events",
                "api_token": "t",
                "meter_ai_token_usage": False,
            },
        }
    ),
    "Kubernetes, named by a KongConsumer": """
apiVersion: configuration.konghq.com/v1
kind: KongPlugin
metadata: {name: usage}
plugin: metering-and-billing
config: {ingest_endpoint: "https://us.api.konghq.com/v3/openmeter/events", api_token: t, meter_ai_token_usage: false}
---
apiVersion: configuration.konghq.com/v1
kind: KongConsumer
metadata: {name: alice, annotations: {konghq.com/plugins: usage}}
username: alice
""",
}


@pytest.mark.parametrize("text", SCOPED.values(), ids=SCOPED)
def test_a_plugin_of_one_scope_bills_that_scope_and_no_other(text: str, tmp_path: Path) -> None:
    """Without a global instance Kong meters nothing else; nor do we, and the scope itself is billed."""
    plugin, config, log = (tmp_path / name for name in ("plugin", "config.toml", "usage.log"))
    plugin.write_text(text)
    other = ENTRY | {"consumer": {"id": "c-2", "username": "bob"}}
    log.write_text("".join(json.dumps(entry) + "\n" for entry in (ENTRY, other)))
    config.write_text(CliRunner().invoke(cli, ["import-kong", str(plugin)]).stdout)
    mapped = CliRunner().invoke(cli, ["map", "-c", str(config), str(log)])
    (event,) = [json.loads(line) for line in mapped.stdout.splitlines()]
    assert holds(event, API)
    assert "skipped: rule_disabled 1" in mapped.stderr
