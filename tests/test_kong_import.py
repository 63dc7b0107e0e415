"""What people have for Kong's metering-and-billing plugin becomes the configuration that bills the same: the four
documented examples in each of the five forms, scopes, what can't be expressed, secrets, and what is refused.
"""

import io
import json
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from metershipper.config import load_config
from metershipper.errors import ConfigError, UsageError
from metershipper.kong_import import import_kong

KONNECT = "https://us.api.konghq.com/v3/openmeter/events"
SECRET = "spat_V3ryS3cret"
SERVICE_ID = "7bca09b6-6a4a-4e0e-9b0c-0d3c5a3a6f10"


class Imported:
    """The outcome of one import: the text, what it says to a TOML parser, and the lines reported."""

    def __init__(self, *paths: Path | str) -> None:
        self.reported: list[str] = []
        self.text = import_kong(tuple(str(path) for path in paths), self.reported.append)
        self.values: dict[str, Any] = tomllib.loads(self.text)
        self.metering: dict[str, Any] = self.values["metering"]
        self.rules: list[dict[str, Any]] = self.metering.get("rules", [])

    @property
    def comments(self) -> str:
        lines = (line.removeprefix("#").strip() for line in self.text.splitlines() if line.startswith("#"))
        return " ".join(lines)


@pytest.fixture
def imported(tmp_path: Path) -> Callable[..., Imported]:
    def importing(*texts: str) -> Imported:
        paths = [tmp_path / f"input{number}" for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(textwrap.dedent(text), encoding="utf-8")
        return Imported(*paths)

    return importing


def check(directory: Path, text: str) -> str:
    """What `check` finds wrong with a configuration."""
    (directory / "config.toml").write_text(text, encoding="utf-8")
    try:
        load_config(directory / "config.toml")
    except ConfigError as error:
        return str(error)
    return ""


# --- the four documented examples, in five forms

EXAMPLES: dict[str, dict[str, Any]] = {
    "by consumer": {
        "meter_api_requests": True,
        "meter_ai_token_usage": False,
        "subject": {"look_up_value_in": "consumer"},
    },
    "AI tokens": {
        "meter_api_requests": False,
        "meter_ai_token_usage": True,
        "subject": {"look_up_value_in": "consumer"},
    },
    "by tenant header": {
        "meter_api_requests": True,
        "meter_ai_token_usage": False,
        "subject": {"look_up_value_in": "header", "field": "x-tenant-id"},
    },
    "by department and project": {
        "meter_api_requests": True,
        "meter_ai_token_usage": False,
        "subject": {"look_up_value_in": "consumer"},
        "attributes": [
            {"source": "header", "look_up_value_in": "x-department", "event_property_name": "department"},
            {"source": "header", "look_up_value_in": "x-project", "event_property_name": "project"},
        ],
    },
}


def _deck(config: dict[str, Any]) -> str:
    token = '  api_token: ${{ env "DECK_AUTH_TOKEN" }}\n'
    return '_format_version: "3.0"\nplugins:\n- name: metering-and-billing\n  config:\n' + textwrap.indent(
        f"  ingest_endpoint: {KONNECT}\n{token}{_yaml(config)}", "  "
    )


def _admin_api(config: dict[str, Any]) -> str:
    return json.dumps(
        {
            "name": "metering-and-billing",
            "config": {"ingest_endpoint": KONNECT, "api_token": SECRET, **config},
        }
    )


def _konnect_api(config: dict[str, Any]) -> str:
    """As the API answers: with what it adds, and null for what is not set."""
    answer = {
        "id": "0e9f1d4c-1111-4a63-8f0e-ef5f3f5a0a01",
        "name": "metering-and-billing",
        "enabled": True,
        "created_at": 1767225600,
        "protocols": ["grpc", "grpcs", "http", "https"],
        "service": None,
        "route": None,
        "consumer": None,
        "consumer_group": None,
        "instance_name": None,
        "config": {
            "ingest_endpoint": KONNECT,
            "api_token": "{vault://konnect/openmeter-token}",
            "keepalive": 60000,
            "ssl_verify": True,
            "timeout": 10000,
            "queue": {"max_batch_size": 1, "max_entries": 10000, "max_retry_time": 60, "max_bytes": None},
            "attributes": None,
            **config,
        },
    }
    return json.dumps({"data": [answer], "next": None}, indent=2)


def _kubernetes(config: dict[str, Any]) -> str:
    return f"""\
apiVersion: configuration.konghq.com/v1
kind: KongClusterPlugin
metadata:
  name: metering
  labels:
    global: "true"
  annotations:
    kubernetes.io/ingress.class: kong
plugin: metering-and-billing
config:
  ingest_endpoint: {KONNECT}
  api_token: {SECRET}
{_yaml(config)}"""


def _terraform(config: dict[str, Any]) -> str:
    return f"""\
variable "auth_token" {{
  type = string # not in this file
}}

resource "konnect_gateway_plugin_metering_and_billing" "metering" {{
  enabled          = true
  control_plane_id = konnect_gateway_control_plane.main.id
  config = {{
    ingest_endpoint = "{KONNECT}"
    api_token       = var.auth_token
{textwrap.indent(_hcl(config), "    ")}  }}
}}
"""


def _yaml(config: dict[str, Any]) -> str:
    lines = []
    for key, value in config.items():
        if isinstance(value, dict):
            lines += [f"  {key}:", *(f"    {name}: {each}" for name, each in value.items())]
        elif isinstance(value, list):
            lines.append(f"  {key}:")
            for item in value:
                lines += [f"  {'-' if n == 0 else ' '} {name}: {item[name]}" for n, name in enumerate(item)]
        else:
            lines.append(f"  {key}: {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def _hcl(config: dict[str, Any]) -> str:
    def literal(value: Any) -> str:
        if isinstance(value, dict):
            return "{\n" + "".join(f"  {key} = {literal(each)}\n" for key, each in value.items()) + "}"
        return f"[{', '.join(map(literal, value))}]" if isinstance(value, list) else json.dumps(value)

    return "".join(f"{key} = {literal(value)}\n" for key, value in config.items())


FORMS: dict[str, Callable[[dict[str, Any]], str]] = {
    "decK": _deck,
    "Admin API": _admin_api,
    "Konnect API": _konnect_api,
    "Kubernetes": _kubernetes,
    "Terraform": _terraform,
}


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_each_documented_example_means_the_same(
    form: str, example: str, imported: Callable[..., Imported], tmp_path: Path
) -> None:
    """The same configuration whatever it was read from; only comments differ."""
    result = imported(FORMS[form](EXAMPLES[example]))
    assert result.values == {
        "openmeter": {"ingest_endpoint": KONNECT, "timeout_seconds": 10.0, "ssl_verify": True},
        "inputs": {"files": [{"path": "/var/log/kong/usage.log"}]},
        "metering": {"attributes": [], "on_missing_subject": "skip", **EXAMPLES[example]},
    }
    assert result.reported == []
    assert SECRET not in result.text
    assert check(tmp_path, result.text) == ""


@pytest.mark.parametrize("form", FORMS)
def test_the_same_input_gives_the_same_text(form: str, imported: Callable[..., Imported]) -> None:
    text = FORMS[form](EXAMPLES["by department and project"])
    assert imported(text).text == imported(text).text


@pytest.mark.parametrize(
    ("form", "source"),
    [
        ("decK", "$DECK_AUTH_TOKEN"),
        ("Konnect API", "{vault://konnect/openmeter-token}"),
        ("Terraform", "var.auth_token"),
        ("Admin API", None),
    ],
)
def test_the_comment_tells_where_the_token_comes_from(
    form: str, source: str | None, imported: Callable[..., Imported]
) -> None:
    comments = imported(FORMS[form](EXAMPLES["by consumer"])).comments
    told = f"its value in Kong, {source}," if source else "its value in Kong,"
    assert f"Set METERSHIPPER_OPENMETER__API_TOKEN to {told} or name a file" in comments
    assert 'api_token_file = "/run/secrets/openmeter-token"' in comments


# --- scopes

CONFIG: dict[str, Any] = {"ingest_endpoint": KONNECT, "api_token": SECRET}
PLUGIN: dict[str, Any] = {"name": "metering-and-billing", "config": CONFIG}


def scope_of(rule: dict[str, Any]) -> dict[str, Any]:
    return {key: rule[key] for key in ("service", "route", "consumer") if key in rule}


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ({"services": [{"name": "billing", "plugins": [PLUGIN]}]}, [{"service": "billing"}]),
        (
            {"services": [{"name": "billing", "routes": [{"name": "invoices", "plugins": [PLUGIN]}]}]},
            [{"route": "invoices"}],
        ),
        ({"routes": [{"id": SERVICE_ID, "plugins": [PLUGIN]}]}, [{"route": SERVICE_ID}]),
        ({"consumers": [{"username": "alice", "plugins": [PLUGIN]}]}, [{"consumer": "alice"}]),
        (
            {"consumers": [{"username": "alice", "plugins": [PLUGIN | {"service": "billing"}]}]},
            [{"service": "billing", "consumer": "alice"}],
        ),
        ({"plugins": [PLUGIN | {"service": "billing"}]}, [{"service": "billing"}]),
        ({"plugins": [PLUGIN | {"service": {"name": "billing"}}]}, [{"service": "billing"}]),
        ({"plugins": [PLUGIN | {"service": {"id": SERVICE_ID}}]}, [{"service": SERVICE_ID}]),
        (
            {"plugins": [PLUGIN | {"route": "invoices", "consumer": {"username": "alice"}}]},
            [{"route": "invoices", "consumer": "alice"}],
        ),
        ({"plugins": [PLUGIN | {"service": 42}]}, [{"service": "42"}]),
        ({"plugins": [PLUGIN | {"service": [1]}]}, [{"service": {"replace": "the name of a service"}}]),
        ({"routes": [{"plugins": [PLUGIN]}]}, [{"route": {"replace": "the name of a route"}}]),
    ],
)
def test_a_deck_scope_is_a_rule(
    file: dict[str, Any], expected: list[dict[str, str]], imported: Callable[..., Imported]
) -> None:
    """Nested in its entity or naming it; without an instance for all traffic the rest is not metered."""
    result = imported(json.dumps({"_format_version": "3.0"} | file))
    assert [scope_of(rule) for rule in result.rules] == expected
    assert {key: value for key, value in result.metering.items() if key != "rules"} == {"enabled": False}


def test_a_rule_sets_every_key_that_the_instance_decides(imported: Callable[..., Imported], tmp_path: Path) -> None:
    """Nothing of it may come from [metering]: in Kong one instance takes the place of the other as a whole."""
    general = {"meter_ai_token_usage": False, "subject": {"look_up_value_in": "header", "field": "x-tenant-id"}}
    result = imported(
        json.dumps(
            {
                "plugins": [
                    PLUGIN | {"config": CONFIG | general},
                    PLUGIN | {"service": "billing"},
                ]
            }
        )
    )
    assert result.rules == [
        {
            "service": "billing",
            "meter_api_requests": True,
            "meter_ai_token_usage": True,
            "on_missing_subject": "skip",
            "attributes": [],
            "subject": {"look_up_value_in": "consumer"},
        }
    ]
    assert "enabled" not in result.metering
    assert check(tmp_path, result.text) == ""


def test_an_admin_api_list_may_hold_other_plugins(imported: Callable[..., Imported]) -> None:
    body = {"data": [{"name": "key-auth", "config": {}}, PLUGIN | {"service": {"id": SERVICE_ID}}]}
    assert [scope_of(rule) for rule in imported(json.dumps(body)).rules] == [{"service": SERVICE_ID}]


@pytest.mark.parametrize("envelope", ["plugin", "item", "data"])
def test_a_plugin_object_may_be_in_an_envelope(envelope: str, imported: Callable[..., Imported]) -> None:
    assert imported(json.dumps({envelope: PLUGIN})).values["openmeter"]["ingest_endpoint"] == KONNECT


def test_shared_configuration_of_a_deck_file_is_merged(imported: Callable[..., Imported]) -> None:
    result = imported(
        f"""
        _plugin_configs:
          usage: {{ingest_endpoint: "{KONNECT}", meter_api_requests: false}}
        plugins:
        - name: metering-and-billing
          _config: usage
          config: {{timeout: 2500}}
        """
    )
    assert result.values["openmeter"] == {
        "ingest_endpoint": KONNECT,
        "timeout_seconds": 2.5,
        "ssl_verify": True,
    }
    assert result.metering["meter_api_requests"] is False


def test_a_terraform_reference_is_left_open(imported: Callable[..., Imported], tmp_path: Path) -> None:
    """Only Terraform knows the id: `check` refuses the configuration until it is written."""
    result = imported(
        f"""
        resource "konnect_gateway_plugin_metering_and_billing" "orders" {{
          count = local.metered ? 1 : 0
          config = {{
            ingest_endpoint = "https://${{var.region}}.api.konghq.com/v3/openmeter/events"
            api_token = "{SECRET}"
            timeout = 5 * 1000
          }}
          service = {{ id = konnect_gateway_service.orders[0].id }}
        }}
        """
    )
    assert result.rules[0]["service"] == {"replace": "konnect_gateway_service.orders[0].id"}
    assert result.values["openmeter"]["timeout_seconds"] == {"replace": "5 * 1000"}
    assert "service is not in the input: it comes from konnect_gateway_service.orders[0].id." in result.comments
    problems = check(tmp_path, result.text)
    for key in ("openmeter.ingest_endpoint", "openmeter.timeout_seconds", "metering.rules.0.service"):
        assert f"{key}: should be a valid" in problems
    assert [line.partition(": ")[2] for line in result.reported] == [
        "konnect_gateway_plugin_metering_and_billing.orders: ingest_endpoint comes from "
        "https://${var.region}.api.konghq.com/v3/openmeter/events; write its value",
        "konnect_gateway_plugin_metering_and_billing.orders: timeout_seconds comes from 5 * 1000; write its value",
        "konnect_gateway_plugin_metering_and_billing.orders: service comes from konnect_gateway_service.orders[0].id; "
        "write its value",
        "konnect_gateway_plugin_metering_and_billing.orders: not imported: count; imported as one instance",
    ]


def test_terraform_values_are_those_of_hcl(imported: Callable[..., Imported]) -> None:
    """Escapes, heredocs, blocks instead of tables, and a literal `${`; what is no literal is left open."""
    result = imported(
        f"""
        resource "konnect_gateway_plugin_metering_and_billing" "x" {{
          config {{
            ingest_endpoint = <<-EOT
        {KONNECT}
        EOT
            meter_api_requests = var.metered
            subject = {{ look_up_value_in = "header", "field" = "x-\\u0061\\"b" }}
            attributes = [
              {{ source = "query", look_up_value_in = upper("p"), event_property_name = "a\\U0001F600" }},
              {{ source = "query", look_up_value_in = "${{var.p}}", event_property_name = bare }},
            ]
          }}
        }}
        resource "konnect_gateway_plugin_key_auth" "y" {{ config = {{}} }}
        """
    )
    assert result.values["openmeter"]["ingest_endpoint"].strip() == KONNECT
    assert result.metering["meter_api_requests"] == {"replace": "var.metered"}
    assert result.metering["subject"]["field"] == 'x-a"b'
    assert result.metering["attributes"] == [
        {
            "source": "query",
            "look_up_value_in": {"replace": 'upper("p")'},
            "event_property_name": {"replace": "a\\U0001F600"},
        },
        {"source": "query", "look_up_value_in": {"replace": "${var.p}"}, "event_property_name": {"replace": "bare"}},
    ]


# --- Kubernetes

KONG_PLUGIN = f"""
apiVersion: configuration.konghq.com/v1
kind: KongPlugin
metadata: {{name: usage, namespace: shop}}
plugin: metering-and-billing
config: {{ingest_endpoint: "{KONNECT}", api_token: "{SECRET}"}}
"""


def resource(kind: str, name: str, more: str = "", namespace: str = "shop", plugins: str = "usage") -> str:
    return f"""---
apiVersion: v1
kind: {kind}
metadata:
  name: {name}
  namespace: {namespace}
  annotations: {{konghq.com/plugins: "{plugins}"}}
{more}
"""


ALICE = resource("KongConsumer", "alice-resource", "username: alice")
CART = "Kong's name of Service shop/cart, such as shop.cart.80 (Admin API: /services)"
SHOP = "Kong's names of the routes of Ingress shop/shop (Admin API: /routes)"


@pytest.mark.parametrize(
    ("manifests", "expected"),
    [
        (ALICE, [{"consumer": "alice"}]),
        (resource("Service", "cart"), [{"service": {"replace": CART}}]),
        (resource("Ingress", "shop", plugins="cors, usage"), [{"route": {"replace": SHOP}}]),
        (
            resource("Ingress", "shop") + resource("Service", "cart"),
            [{"route": {"replace": SHOP}}, {"service": {"replace": CART}}],
        ),
        (resource("Ingress", "shop") + ALICE, [{"route": {"replace": SHOP}, "consumer": "alice"}]),
        (resource("KongConsumer", "b", "custom_id: x"), [{"consumer": {"replace": "KongConsumer shop/b"}}]),
        (
            ALICE + resource("KongConsumer", "bob", "username: bob", namespace="other", plugins="shop:usage"),
            [{"consumer": "alice"}, {"consumer": "bob"}],
        ),
        (ALICE + resource("KongConsumer", "bob", "username: bob", namespace="other"), [{"consumer": "alice"}]),
        (resource("KongConsumerGroup", "gold"), []),
    ],
)
def test_annotations_give_the_scope_of_a_kongplugin(
    manifests: str, expected: list[dict[str, Any]], imported: Callable[..., Imported]
) -> None:
    """A consumer's username is its name in Kong; services and routes get names that only the controller knows."""
    result = imported(KONG_PLUGIN + manifests)
    assert [scope_of(rule) for rule in result.rules] == expected
    assert result.metering["enabled"] is False


def test_annotations_may_be_in_another_file(imported: Callable[..., Imported]) -> None:
    assert [scope_of(rule) for rule in imported(KONG_PLUGIN, ALICE).rules] == [{"consumer": "alice"}]


def test_an_httproute_filter_gives_the_scope(imported: Callable[..., Imported]) -> None:
    route = """---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: cart, namespace: shop}
spec:
  rules:
  - filters:
    - type: ExtensionRef
      extensionRef: {group: configuration.konghq.com, kind: KongPlugin, name: usage}
"""
    rules = imported(KONG_PLUGIN + route).rules
    assert "HTTPRoute shop/cart" in rules[0]["route"]["replace"]


def test_a_kubectl_list_is_read(imported: Callable[..., Imported]) -> None:
    items = [
        {
            "apiVersion": "configuration.konghq.com/v1",
            "kind": "KongPlugin",
            "metadata": {"name": "usage"},
            "disabled": True,
            "plugin": "metering-and-billing",
            "config": CONFIG,
        },
        {
            "apiVersion": "configuration.konghq.com/v1",
            "kind": "KongConsumer",
            "metadata": {"name": "alice", "annotations": {"konghq.com/plugins": "usage"}},
            "username": "alice",
        },
    ]
    result = imported(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    assert [scope_of(rule) | {"enabled": rule["enabled"]} for rule in result.rules] == [
        {"consumer": "alice", "enabled": False}
    ]


def test_a_kongplugin_that_nothing_names_is_taken_to_be_global(imported: Callable[..., Imported]) -> None:
    result = imported(KONG_PLUGIN)
    assert "enabled" not in result.metering
    assert "nothing in the input names KongPlugin shop/usage, so it is taken to be for all traffic" in result.comments
    assert len(result.reported) == 1


def test_a_global_cluster_plugin_may_have_scopes_too(imported: Callable[..., Imported]) -> None:
    text = _kubernetes(EXAMPLES["AI tokens"]) + resource("KongConsumer", "a", "username: alice", plugins="metering")
    result = imported(text)
    assert result.metering["meter_ai_token_usage"] is True
    assert [scope_of(rule) for rule in result.rules] == [{"consumer": "alice"}]


def test_configuration_from_a_secret_is_left_open(imported: Callable[..., Imported], tmp_path: Path) -> None:
    """What is billed to whom stands in the Secret: no default takes its place."""
    result = imported(
        """
        apiVersion: configuration.konghq.com/v1
        kind: KongClusterPlugin
        metadata: {name: usage, labels: {global: "true"}}
        plugin: metering-and-billing
        configFrom: {secretKeyRef: {name: usage-secret, key: config}}
        """
    )
    place = {"replace": "key config of Secret usage-secret"}
    assert result.values["openmeter"]["ingest_endpoint"] == place
    assert {key: value for key, value in result.metering.items() if key != "on_missing_subject"} == {
        "meter_api_requests": place,
        "meter_ai_token_usage": place,
        "subject": place,
        "attributes": place,
    }
    assert "not imported: configFrom (key config of Secret usage-secret)" in result.comments
    assert check(tmp_path, result.text).count("\n") >= 4


def test_patches_from_secrets_are_left_open(imported: Callable[..., Imported]) -> None:
    result = imported(
        KONG_PLUGIN.replace(f', api_token: "{SECRET}"', ', attributes: [{"source": "query"}]')
        + """
configPatches:
- {path: /api_token, valueFrom: {secretKeyRef: {name: s, key: token}}}
- {path: /subject/field, valueFrom: {secretKeyRef: {name: s, key: header}}}
- {path: /attributes/0/look_up_value_in, valueFrom: {secretKeyRef: {name: s, key: a}}}
- {path: /timeout}
"""
    )
    assert "its value in Kong, key token of Secret s," in result.comments
    assert result.metering["subject"]["field"] == {"replace": "key header of Secret s"}
    assert result.metering["attributes"] == {"replace": "key a of Secret s"}
    assert result.values["openmeter"]["timeout_seconds"] == {"replace": "a Secret"}


# --- environment references and secrets


@pytest.mark.parametrize(
    ("written", "source"),
    [
        ('${{ env "DECK_SUBJECT_HEADER" }}', "$DECK_SUBJECT_HEADER"),
        ("\"${{ env 'DECK_SUBJECT_HEADER' }}\"", "$DECK_SUBJECT_HEADER"),
        ('"${{ env "DECK_SUBJECT_HEADER" }}"', "$DECK_SUBJECT_HEADER"),
        ('x-${{ env "DECK_TENANT" | toString }}-id', "x-$DECK_TENANT-id"),
        ("${{ other }}", "other"),
        ("$SUBJECT_HEADER", "$SUBJECT_HEADER"),
        ('"${SUBJECT_HEADER}"', "${SUBJECT_HEADER}"),
        ('"{vault://env/subject-header}"', "{vault://env/subject-header}"),
    ],
)
def test_an_environment_reference_is_left_open(
    written: str, source: str, imported: Callable[..., Imported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """decK would fill it in: the value is asked for, in the file or as a variable of ours."""
    result = imported(
        f"""
        _format_version: "3.0"
        plugins:
        - name: metering-and-billing
          config:
            ingest_endpoint: {KONNECT}
            subject: {{look_up_value_in: header, field: {written if "{{" in written else json.dumps("?")}}}
        """.replace('"?"', written)
    )
    assert result.metering["subject"] == {"look_up_value_in": "header", "field": {"replace": source}}
    assert f"it comes from {source}. Write its value here" in result.comments
    assert check(tmp_path, result.text).endswith("config.toml: metering.subject.field: should be a valid string")
    monkeypatch.setenv("METERSHIPPER_METERING__SUBJECT__FIELD", "x-tenant-id")
    assert check(tmp_path, result.text) == ""


def test_an_endpoint_from_the_environment_can_come_from_ours(
    imported: Callable[..., Imported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deck = _deck(EXAMPLES["by consumer"]).replace(KONNECT, '${{ env "DECK_INGEST_ENDPOINT" }}')
    result = imported(deck)
    assert "or set METERSHIPPER_OPENMETER__INGEST_ENDPOINT." in result.comments
    assert "openmeter.ingest_endpoint" in check(tmp_path, result.text)
    monkeypatch.setenv("METERSHIPPER_OPENMETER__INGEST_ENDPOINT", KONNECT)
    assert check(tmp_path, result.text) == ""


@pytest.mark.parametrize(
    "plugin",
    [
        {"config": {"api_token": SECRET}},
        {"config": {"api_token": "${" + SECRET}},
        {"config": {"api_token": [SECRET]}},
        {"config": {"auth_token": SECRET}},
        {"config": {"ingest_endpoint": f"https://user:{SECRET}@openmeter.example/api/v1/events"}},
        {"config": {"ingest_endpoint": f"https://user:{SECRET}@${{HOST}}/api/v1/events"}},
        {"config": {"ingest_endpoint": f"https://openmeter.example/api/v1/events?token={SECRET}"}},
        {"config": {"attributes": SECRET, "subject": SECRET, "queue": SECRET, "timeout": [SECRET]}},
        {"config": SECRET},
        {"enabled": SECRET, "config": {}},
    ],
)
def test_a_secret_is_never_shown(plugin: dict[str, Any], imported: Callable[..., Imported]) -> None:
    result = imported(json.dumps({"name": "metering-and-billing"} | plugin))
    assert SECRET not in result.text
    assert SECRET not in "".join(result.reported)


def test_a_token_within_an_expression_is_not_shown(imported: Callable[..., Imported]) -> None:
    text = _terraform(EXAMPLES["by consumer"]).replace("var.auth_token", f'coalesce(var.t, "{SECRET}")')
    assert SECRET not in imported(text).text


# --- what is on and off, and what can't be expressed


def instances(*plugins: dict[str, Any]) -> str:
    return json.dumps({"data": [{"name": "metering-and-billing", **plugin} for plugin in plugins]})


def test_a_disabled_instance_stays_off(imported: Callable[..., Imported], tmp_path: Path) -> None:
    result = imported(instances({"enabled": False, "config": CONFIG}))
    assert result.metering["enabled"] is False
    assert check(tmp_path, result.text) == ""
    alone = imported(instances({"enabled": False, "config": CONFIG, "service": "billing"}))
    assert [scope_of(rule) | {"enabled": rule["enabled"]} for rule in alone.rules] == [
        {"service": "billing", "enabled": False}
    ]


def test_a_disabled_instance_leaves_its_traffic_to_the_wider_one(imported: Callable[..., Imported]) -> None:
    """As in Kong, which passes over it; a rule that is off would keep usage from being billed that Kong bills."""
    result = imported(instances({"config": CONFIG}, {"enabled": False, "config": CONFIG, "service": "billing"}))
    assert "enabled" not in result.metering
    assert result.rules == []
    assert "disabled for service billing: no rule is written" in result.comments
    assert len(result.reported) == 1


def test_an_instance_that_meters_nothing_is_off(imported: Callable[..., Imported], tmp_path: Path) -> None:
    nothing = {"meter_api_requests": False, "meter_ai_token_usage": False}
    result = imported(instances({"config": CONFIG | nothing}))
    assert result.metering["enabled"] is False
    assert check(tmp_path, result.text) == ""


def test_whether_it_is_on_may_be_unknown(imported: Callable[..., Imported], tmp_path: Path) -> None:
    result = imported(_terraform(EXAMPLES["by consumer"]).replace("= true", "= var.metered", 1))
    assert result.metering["enabled"] == {"replace": "var.metered"}
    assert "metering.enabled" in check(tmp_path, result.text)


def test_a_batch_is_as_large_and_as_old_as_in_kong(imported: Callable[..., Imported]) -> None:
    queue = {"max_batch_size": 200, "max_coalescing_delay": 2.5, "max_entries": 9, "concurrency_limit": -1}
    result = imported(instances({"config": CONFIG | {"queue": queue, "keepalive": 1000}}))
    assert result.values["openmeter"]["batch"] == {"max_events": 200, "max_wait_seconds": 2.5}
    assert "Not needed: queue.concurrency_limit, queue.max_entries. The log is the buffer" in result.comments
    assert "retries never give up" in result.comments
    assert "Not needed: keepalive." in result.comments
    assert result.reported == []


@pytest.mark.parametrize(
    ("queue", "expected"),
    [
        ({"max_batch_size": 1}, None),
        ({"max_batch_size": 1_000_000}, {"max_events": 10_000}),
        ({"max_coalescing_delay": 0}, {"max_wait_seconds": 0.001}),
        ({"max_batch_size": "${SIZE}"}, {"max_events": {"replace": "${SIZE}"}}),
    ],
)
def test_a_batch_beyond_what_is_allowed(
    queue: dict[str, Any], expected: dict[str, Any] | None, imported: Callable[..., Imported]
) -> None:
    result = imported(instances({"config": CONFIG | {"queue": queue}}))
    assert result.values["openmeter"].get("batch") == expected


def test_there_is_one_destination(imported: Callable[..., Imported]) -> None:
    other = {"ingest_endpoint": "https://eu.api.konghq.com/v3/openmeter/events", "api_token": "other"}
    result = imported(instances({"config": CONFIG}, {"config": other, "service": "billing"}))
    assert result.values["openmeter"]["ingest_endpoint"] == KONNECT
    assert len(result.reported) == 1
    assert "ingest_endpoint, api_token of the instance for service billing differ" in result.reported[0]
    assert "ingest_endpoint, api_token of the instance for service billing differ" in result.comments


def test_a_consumer_group_is_told_and_left_out(imported: Callable[..., Imported]) -> None:
    group = {"_format_version": "3.0", "consumer_groups": [{"name": "gold", "plugins": [PLUGIN]}]}
    result = imported(json.dumps(group))
    assert result.metering == {"enabled": False}
    assert "scoped to consumer group gold: not imported" in result.comments
    assert len(result.reported) == 1


def test_what_is_not_known_is_told(imported: Callable[..., Imported]) -> None:
    config = {
        "new_setting": 1,
        "queue": {"q": 1},
        "subject": {"s": 1},
        "attributes": [{"a": 1}, 5],
        "ingest_endpoint": None,
    }
    text = json.dumps(
        {
            "_workspace": "team",
            "plugins": [
                PLUGIN
                | {"config": config, "condition": "x", "partials": [{"id": "p"}], "protocols": ["https"], "tags": ["t"]}
            ],
        }
    )
    result = imported(text)
    told = [line.partition("plugins[0]: ")[2] for line in result.reported]
    assert told == [
        "ingest_endpoint is missing in the input",
        "only for the workspace team in Kong; metered in all of them here",
        "not imported: condition; everything in the scope is metered, whether the expression holds or not",
        "not imported: partials; what they configure is not in the input",
        "not imported: protocols; requests of all protocols are metered",
        "not imported: attributes.a",
        "not imported: new_setting",
        "not imported: queue.q",
        "not imported: subject.s",
    ]
    for line in told:
        assert f"{line}." in result.comments


def test_a_field_of_an_application_has_no_meaning_and_is_left_out(
    imported: Callable[..., Imported], tmp_path: Path
) -> None:
    config = CONFIG | {"subject": {"look_up_value_in": "application", "field": "id"}}
    text = imported(json.dumps(PLUGIN | {"config": config})).text
    assert check(tmp_path, text) == ""
    assert tomllib.loads(text)["metering"]["subject"] == {"look_up_value_in": "application"}


def test_names_can_not_break_out_of_a_comment_or_a_string(imported: Callable[..., Imported]) -> None:
    name = 'a"\n[state]\ndirectory = "/x"\x7f\u2028\\'
    config = CONFIG | {"k\n[state]\n": 1}
    result = imported(instances({"config": config, "service": name}, {"config": CONFIG, "route": "\ud800"}))
    assert [scope_of(rule) for rule in result.rules] == [{"service": name}, {"route": "?"}]
    assert "state" not in result.values
    assert not any("\n" in line for line in result.reported)


# --- inputs and what is refused


def test_stdin_is_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\ufeff" + _deck(EXAMPLES["AI tokens"])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    result = Imported("-", "-")
    assert result.metering["meter_ai_token_usage"] is True
    assert "plugin in stdin." in result.comments


def test_the_same_instance_twice_is_one(imported: Callable[..., Imported]) -> None:
    text = instances({"config": CONFIG, "service": "billing"})
    assert len(imported(text, text).rules) == 1


def test_two_instances_of_unknown_scopes_are_two(imported: Callable[..., Imported]) -> None:
    text = instances({"config": CONFIG, "service": "$A"}, {"config": {"timeout": 1}, "service": "$A"})
    assert len(imported(text).rules) == 2


def test_a_document_that_is_nothing_of_kongs_is_told(imported: Callable[..., Imported]) -> None:
    result = imported(instances({"config": CONFIG}), "just: text")
    assert [line.rpartition("/")[2] for line in result.reported] == [
        "input1: not imported: a document that is neither a decK file, nor plugin objects, Kubernetes resources or "
        "Terraform"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no metering-and-billing plugin in an empty input"),
        ("hello", "input0 (neither a decK file, nor plugin objects, Kubernetes resources or Terraform)"),
        (
            '_format_version: "3.0"\nplugins: [{name: key-auth}, {name: cors}, {name: cors}, 5]',
            "input0 (decK file, plugin key-auth, plugin cors)",
        ),
        ('_format_version: "3.0"\nplugins: {}', "input0 (decK file)"),
        ("[]", "input0 (neither a decK file, nor plugin objects, Kubernetes resources or Terraform)"),
        ('[{"name": "cors"}]', "input0 (plugin objects, plugin cors)"),
        (
            KONG_PLUGIN.replace("metering-and-billing", "cors") + resource("Service", "s"),
            "input0 (Kubernetes, KongPlugin, plugin cors, Kubernetes, Service)",
        ),
        (
            'resource "konnect_gateway_plugin_cors" "x" {}\nresource "aws_vpc" "y" {}',
            "input0 (Terraform, plugin konnect_gateway_plugin_cors)",
        ),
        ("a: b\nc: [1,\n", "input0: line 3: not valid YAML: expected the node content, but found '<stream end>'"),
        ("a: !env X\n", "input0: line 1: not valid YAML: could not determine a constructor for the tag '!env'"),
        ("a: b\nc: \x01\n", "input0: line 2: not valid YAML: a control character"),
        ("a: 2026-99-99\n", "input0: not valid YAML: a date or number is out of range"),
        ('{\n "a": b}', "input0: line 2: not valid JSON: Expecting value"),
        (f"[{'9' * 5000}]", "input0: not valid JSON: a number is too long"),
        ('resource "a" "b" {\n  x = \n}\n', "input0: line 2: not valid Terraform (HCL)"),
        ('resource "a" "b" {\n', "input0: line 2: not valid Terraform (HCL)"),
        (
            'resource "a" "b" {\n  x = { for k in y : k => 1 }\n}\n',
            "input0: python-hcl2 can't read this Terraform (TypeError)",
        ),
        ("[" * 100_000, "input0: nested too deeply"),
        ("a: " + "[" * 5_000, "input0: nested too deeply"),
        ("data: &a {data: *a}", "input0: nested too deeply"),
        (f'resource "a" "b" {{\n  x = {"[" * 2_000}{"]" * 2_000}\n}}\n', "input0: nested too deeply"),
        (
            instances({"config": CONFIG}, {"config": {}}),
            "input0: data[1]: for all traffic, as is ",
        ),
    ],
)
def test_an_input_that_can_not_be_imported_is_told_in_one_line(
    text: str, message: str, imported: Callable[..., Imported]
) -> None:
    with pytest.raises(UsageError) as raised:
        imported(text)
    told = str(raised.value)
    assert message in told
    assert "\n" not in told
    assert raised.value.exit_code == 2


def test_a_file_that_can_not_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"a: b\nname: caf\xe9\n")
    unreadable: list[tuple[Path | str, str]] = [
        (tmp_path / "absent.yaml", "absent.yaml: can't be read: No such file or directory"),
        (tmp_path, "can't be read: Is a directory"),
        (tmp_path / "latin", "latin: line 2: not UTF-8 text"),
        ("a\0b", "can't be read: embedded null byte"),
    ]
    for path, message in unreadable:
        with pytest.raises(UsageError, match=message):
            Imported(path)
