"""The configuration: its defaults are the documented ones, every mistake is named where it was made, and no secret is
ever shown (CASES 70).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, SecretStr

from metershipper.config import NOT_YET, Config, FileInput, HttpLog, endpoint_of, load_config, require_for_run
from metershipper.errors import ConfigError
from metershipper.metering import BUILT_IN, Attribute

SECRET = "spat_V3ryS3cret"
URL = "http://127.0.0.1:8888/api/v1/events"
# Keys whose text must mean something; any other key takes what `sample` makes of its type.
MEANINGFUL: dict[str, Any] = {
    "openmeter.ingest_endpoint": URL,
    "metering.subject": {"look_up_value_in": "header", "field": "x-tenant"},
    "metering.statuses": [429, "2xx", "200-399"],
    "metering.paths": ["/llm", "~/v[12]/"],
    "metering.rules": [{"service": "billing-api", "meter_ai_token_usage": False}],
}


def write(directory: Path, toml: str) -> Path:
    path = directory / "config.toml"
    path.write_text(toml, encoding="utf-8")
    return path


def refusal(path: Path | None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


def refusal_of(directory: Path, toml: str) -> str:
    """The refusal of a file that holds `toml`, without the path it must begin with."""
    path = write(directory, toml)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    return message.replace(f"{path}: ", "")


# --- every key there is, found by walking the models


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every key that is no table, with its type and its default."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.annotation, field.get_default()


def sample(annotation: Any, default: Any) -> Any:
    """A valid value, as JSON has it, that differs from the default."""
    choices = [choice for choice in get_args(annotation) if choice is not type(None)]
    if get_origin(annotation) is Literal:
        return next(choice for choice in choices if choice != default)
    if get_origin(annotation) in (tuple, frozenset):
        return [sample(choices[0], None)]
    if choices:
        return sample(choices[0], default)
    if issubclass(annotation, BaseModel):
        required = {name: f for name, f in annotation.model_fields.items() if f.is_required()}
        return {name: sample(f.annotation, None) for name, f in required.items()}
    if annotation is bool:
        return not default
    return default + 1 if issubclass(annotation, int | float) else "some-text"


def value_at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def as_json(value: Any) -> Any:
    """A value of the configuration as a file would hold it; defaults of a table in a list are left out."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_defaults=True)
    if isinstance(value, tuple | frozenset):
        return [as_json(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def variable(key: str) -> str:
    return "METERSHIPPER_" + key.upper().replace(".", "__")


LEAVES = list(leaves(Config))


def test_the_defaults_are_the_documented_ones() -> None:
    assert load_config(None).model_dump(mode="json") == {
        "openmeter": {
            "ingest_endpoint": None,
            "api_token": None,
            "api_token_file": None,
            "timeout_seconds": 10.0,
            "ssl_verify": True,
            "ca_file": None,
            "max_in_flight": 4,
            "dedupe_window_days": 32,
            "batch": {"max_events": 500, "max_bytes": 1_000_000, "max_wait_seconds": 1.0},
            "retry": {"initial_delay_seconds": 0.5, "max_delay_seconds": 60.0},
        },
        "inputs": {"files": [], "http_log": None, "max_line_bytes": 16 * 1024 * 1024},
        "state": {"directory": "/var/lib/metershipper"},
        "metering": {
            "source": "kong",
            "rules": [],
            "enabled": True,
            "meter_api_requests": True,
            "meter_ai_token_usage": True,
            "meter_mcp_tool_calls": False,
            "on_missing_subject": "skip",
            "emit_zero_tokens": False,
            "meter_failed_ai_calls": False,
            "token_details": False,
            "split_cached_input": False,
            "personal_fields": [],
            "subject": {"look_up_value_in": "consumer", "field": None},
            "attributes": [],
            "methods": [],
            "statuses": [],
            "paths": [],
            "workspaces": [],
        },
    }
    assert (FileInput(path="x").read_from, FileInput(path="x").format) == ("beginning", "auto")


def test_a_file_may_set_everything(tmp_path: Path) -> None:
    config = load_config(
        write(
            tmp_path,
            f"""
            [openmeter]
            ingest_endpoint = "https://us.api.konghq.com/v3/openmeter/events"
            api_token = "{SECRET}"
            timeout_seconds = 3
            ca_file = "/etc/ca.pem"
            max_in_flight = 2
            batch = {{ max_events = 1, max_bytes = 1000, max_wait_seconds = 0.1 }}
            retry = {{ initial_delay_seconds = 1, max_delay_seconds = 1 }}
            [[inputs.files]]
            path = "/var/log/kong/*.log"
            read_from = "end"
            format = "cri"
            [[inputs.files]]
            path = "/var/log/kong-2/usage.log"
            [state]
            directory = "state"
            [metering]
            source = "https://kong.example/estate-1?x=%20#y"
            meter_api_requests = false
            on_missing_subject = "dead_letter"
            personal_fields = ["client_ip", "request_uri", "request_user_agent"]
            subject = {{ look_up_value_in = "header", field = "X-Customer" }}
            [[metering.attributes]]
            source = "query"
            look_up_value_in = "Authorization"
            event_property_name = "department"
            """,
        )
    )
    assert config.openmeter.api_token is not None
    assert config.openmeter.api_token.get_secret_value() == SECRET
    assert config.openmeter.retry.max_delay_seconds == 1
    assert [file.path for file in config.inputs.files] == ["/var/log/kong/*.log", "/var/log/kong-2/usage.log"]
    assert config.metering.subjects[0].field == "X-Customer"
    assert config.metering.attributes[0].look_up_value_in == "Authorization"  # a query parameter may have any name
    require_for_run(config, "config.toml")


# --- the environment


@pytest.mark.parametrize(("key", "annotation", "default"), LEAVES, ids=[leaf[0] for leaf in LEAVES])
def test_every_key_can_be_set_by_environment_and_changes_nothing_else(
    key: str, annotation: Any, default: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = MEANINGFUL[key] if key in MEANINGFUL else sample(annotation, default)
    as_text = value if isinstance(value, str) else json.dumps(value)
    monkeypatch.setenv(variable(key), as_text)
    config = load_config(None)
    assert value != as_json(default)
    assert as_json(value_at(config, key)) == value
    monkeypatch.delenv(variable(key))
    others = load_config(None)
    assert [k for k, *_ in LEAVES if value_at(config, k) != value_at(others, k)] == [key]


SUBJECT_BY_ENVIRONMENT: dict[str, tuple[dict[str, str], str, list[tuple[str, str | None]]]] = {
    "a part of the table": ({"SUBJECT__FIELD": "username"}, "", [("consumer", "username")]),
    "all parts": (
        {"SUBJECT__FIELD": "x-a", "SUBJECT__LOOK_UP_VALUE_IN": "header"},
        '[metering.subject]\nfield = "id"',
        [("header", "x-a")],
    ),
    "a part over the file": (
        {"SUBJECT__FIELD": "x-b"},
        '[metering.subject]\nlook_up_value_in = "header"\nfield = "x-a"',
        [("header", "x-b")],
    ),
    "a list": (
        {"SUBJECT": '[{"look_up_value_in": "query", "field": "team"}, {}]'},
        "",
        [("query", "team"), ("consumer", None)],
    ),
    "a list over the file": (
        {"SUBJECT": "[{}]"}, '[metering.subject]\nlook_up_value_in = "header"\nfield = "x-a"', [("consumer", None)],
    ),
    "a table over a list in the file": (
        {"SUBJECT": '{"field": "id"}'}, '[[metering.subject]]\nfield = "username"', [("consumer", "id")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("variables", "toml", "subjects"), SUBJECT_BY_ENVIRONMENT.values(), ids=SUBJECT_BY_ENVIRONMENT)
def test_a_subject_is_one_table_or_a_list_also_by_environment(
    variables: dict[str, str],
    toml: str,
    subjects: list[tuple[str, str | None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"METERSHIPPER_METERING__{name}", value)
    config = load_config(write(tmp_path, toml))
    assert [(subject.look_up_value_in, subject.field) for subject in config.metering.subjects] == subjects


@pytest.mark.parametrize("text", ["123456", "true", "null", "[]", "{}", '"x"', "-1e5"])
def test_a_token_from_the_environment_is_taken_as_it_stands(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token may look like JSON and is still text."""
    monkeypatch.setenv("METERSHIPPER_OPENMETER__API_TOKEN", text)
    token = load_config(None).openmeter.api_token
    assert token is not None
    assert token.get_secret_value() == text


def test_the_environment_beats_the_file_key_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(
        tmp_path,
        '[openmeter.batch]\nmax_events = 7\nmax_bytes = 7000\n[state]\ndirectory = "file"\n'
        '[[inputs.files]]\npath = "file-1"\n[[inputs.files]]\npath = "file-2"\n',
    )
    monkeypatch.setenv("METERSHIPPER_OPENMETER__BATCH__MAX_EVENTS", "9")
    monkeypatch.setenv("METERSHIPPER_STATE__DIRECTORY", "environment")
    monkeypatch.setenv("METERSHIPPER_INPUTS__FILES", '[{"path": "environment"}]')
    config = load_config(path)
    assert (config.openmeter.batch.max_events, config.openmeter.batch.max_bytes) == (9, 7000)
    assert config.state.directory == Path("environment")
    assert [file.path for file in config.inputs.files] == ["environment"]  # a list is replaced, not merged


def test_kubernetes_service_variables_of_our_name_do_not_disturb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes sets these in every pod of a namespace with a service called metershipper."""
    before = load_config(None)
    for name, value in {
        "METERSHIPPER_PORT": "tcp://10.0.0.1:9464",
        "METERSHIPPER_SERVICE_HOST": "10.0.0.1",
        "METERSHIPPER_SERVICE_PORT": "9464",
        "METERSHIPPER_PORT_9464_TCP_ADDR": "10.0.0.1",
        "METERSHIPPER_OPENMETER_PORT": "tcp://10.0.0.1:80",
        "METERSHIPPER_CONFIG": "config.toml",
    }.items():
        monkeypatch.setenv(name, value)
    assert load_config(None) == before


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("OPENMETER__TIMEOUT", "5", "openmeter.timeout: unknown key; did you mean timeout_seconds?"),
        ("OPENMETER__BATCH__MAX_EVENT", "5", "openmeter.batch.max_event: unknown key; did you mean max_events?"),
        ("INPUTS__FILES", '[{"pth": "a", "path": "b"}]', "inputs.files.0.pth: unknown key; did you mean path?"),
        ("INPUTS__FILES", '[{"path": "b"}, {"path": 5}]', "inputs.files.1.path: should be a valid string"),
        ("INPUTS__FILES__0__PATH", "x", "inputs.files: should be a list"),
        ("OPENMETER__API_TOKEN__FILE", "/x", "openmeter.api_token: should be a valid string"),
        ("OPENMETER__MAX_IN_FLIGHT", "0", "openmeter.max_in_flight: should be greater than 0"),
        ("METERING__SUBJECT", '[{"feild": "id"}]', "metering.subject.0.feild: unknown key; did you mean field?"),
        ("METERING__SUBJECT__FEILD", "id", "metering.subject.feild: unknown key; did you mean field?"),
        (
            "METERING__RULES",
            '[{"service": "a"}, {"service": "b", "statuses": ["7xx"]}]',
            "metering.rules.1.statuses: '7xx' is no status",
        ),
        ("METERING__PATHS", '["llm"]', "metering.paths: 'llm' is no path; a prefix begins with /"),
        ("OPENMETER__SSL_VERIFY", "maybe", "openmeter.ssl_verify: should be a valid boolean"),
        ("INPUTS__HTTP_LOG__LISTEN", "x", "inputs.http_log.listen: not HOST:PORT, for instance 127.0.0.1:8090"),
        ("INPUTS__HTTP_LOG__TOKEN", SECRET, "inputs.http_log.token: unknown key; did you mean token_file?"),
        ("INPUTS__HTTP_LOG__MAX_BODY_BYTES", "1", "inputs.http_log.max_body_bytes: should be greater than or equal to"),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable_and_not_the_file(
    name: str, value: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"METERSHIPPER_{name}", value)
    message = refusal(write(tmp_path, '[[inputs.files]]\npath = "usage.log"\n'))
    assert message.startswith(f"environment variable METERSHIPPER_{name}: {problem}")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("OPENMTER__API_TOKEN", "unknown section; known are inputs, metering, openmeter, state"),
        ("_X__Y", "unknown section; known are inputs, metering, openmeter, state"),
        ("ADMIN__LISTEN", NOT_YET["admin"]),
    ],
)
def test_a_variable_of_an_unknown_section_is_refused(name: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"METERSHIPPER_{name}", SECRET)
    assert refusal(None) == f"environment: METERSHIPPER_{name}: {problem}"


@pytest.mark.parametrize("value", ["/var/log/usage.log", f'[{{"path": "{SECRET}"', SECRET])
def test_a_list_by_environment_that_is_not_json_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METERSHIPPER_INPUTS__FILES", value)
    message = refusal(None)
    assert message == "environment: METERSHIPPER_INPUTS…: not valid JSON, as lists and tables must be"


# --- mistakes in the file


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ("[openmetr]\nx = 1", "openmetr: unknown key; did you mean openmeter?"),
        ('log = "x"', "log: unknown key; known here are inputs, metering, openmeter, state"),
        ("[openmeter]\nmax_inflight = 4", "openmeter.max_inflight: unknown key; did you mean max_in_flight?"),
        ("[openmeter.batch]\nevents_max = 4", "openmeter.batch.events_max: unknown key; did you mean max_events?"),
        ("[openmeter.batch]\nzz = 4", "openmeter.batch.zz: unknown key; known here are max_bytes, max_events, max_wai"),
        (
            '[[inputs.files]]\npath = "a"\n[[inputs.files]]\npaths = "b"\npath = "b"',
            "inputs.files.1.paths: unknown key",
        ),
        ('[metering.subject]\nfeild = "id"', "metering.subject.feild: unknown key; did you mean field?"),
        (
            '[[metering.attributes]]\nsource = "query"\nlook_up_value = "a"\n'
            'look_up_value_in = "a"\nevent_property_name = "a"',
            "metering.attributes.0.look_up_value: unknown key; did you mean look_up_value_in?",
        ),
        ('[[metering.subject]]\nfeild = "id"', "metering.subject.0.feild: unknown key; did you mean field?"),
        (
            '[[metering.rules]]\nservice = "a"\nmetods = ["GET"]',
            "metering.rules.0.metods: unknown key; did you mean methods?",
        ),
        (
            '[[metering.rules]]\nservice = "a"\n[[metering.rules.subject]]\nfeild = "id"',
            "metering.rules.0.subject.0.feild: unknown key; did you mean field?",
        ),
        ('[[metering.rules]]\nservice = "a"\nsource = "b"', "metering.rules.0.source: unknown key"),
        ("a.b.c = 1", "a: unknown key; known here are"),
        ('"" = 1', ": unknown key; known here are"),
        ('_env_file = ".env"', "_env_file: unknown key"),
        ("_cli_parse_args = true", "_cli_parse_args: unknown key"),
        ("__pydantic_self__ = 1", "__pydantic_self__: unknown key"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(toml: str, problem: str, tmp_path: Path) -> None:
    assert refusal_of(tmp_path, toml).startswith(problem)


def test_every_problem_is_told_at_once_one_line_each(tmp_path: Path) -> None:
    message = refusal_of(
        tmp_path, "x = 1\n[openmeter]\ntimeout_seconds = 0\n[state]\ndirectory = 5\n[[inputs.files]]\n"
    )
    assert sorted(line.split(":")[0] for line in message.splitlines()) == [
        "inputs.files.0.path",
        "openmeter.timeout_seconds",
        "state.directory",
        "x",
    ]


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ('openmeter = "x"', "openmeter: should be a table"),
        ("inputs = 5", "inputs: should be a table"),
        ('inputs = { files = "usage.log" }', "inputs.files: should be a list"),
        ("[[inputs.files]]\npath = 5", "inputs.files.0.path: should be a valid string"),
        ("[[inputs.files]]", "inputs.files.0.path: Field required"),
        ('[[inputs.files]]\npath = ""', "inputs.files.0.path: String should have at least 1 character"),
        ('[[inputs.files]]\npath = "a\\u0000"', "inputs.files.0.path: should be a path"),
        ('[[inputs.files]]\npath = "a.log.gz"', "inputs.files.0.path: a compressed file does not grow"),
        (
            '[[inputs.files]]\npath = "a"\nread_from = "start"',
            "inputs.files.0.read_from: should be 'beginning' or 'end'",
        ),
        (
            '[[inputs.files]]\npath = "a"\nformat = "containerd"',
            "inputs.files.0.format: should be 'auto', 'ndjson', 'cri' or 'docker' (it is 'containerd')",
        ),
        ('[[inputs.files]]\npath = "a"\n[[inputs.files]]\npath = "a"', "inputs.files: path 'a' stands twice"),
        ("[state]\ndirectory = 5", "state.directory: should be a path"),
        ('[state]\ndirectory = ""', "state.directory: should be a path"),
        ('[state]\ndirectory = "a\\u0000"', "state.directory: should be a path"),
        ('[openmeter]\nca_file = ""', "openmeter.ca_file: should be a path"),
        ('[openmeter]\napi_token_file = ""', "openmeter.api_token_file: should be a path"),
        ('[openmeter]\nca_file = "a"\nssl_verify = false', "openmeter: ca_file has no meaning with ssl_verify = false"),
        (
            "[openmeter]\nssl_verify = 2",
            "openmeter.ssl_verify: should be a valid boolean, unable to interpret input (it",
        ),
        ("[openmeter]\ntimeout_seconds = 0", "openmeter.timeout_seconds: should be greater than 0 (it is 0)"),
        ("[openmeter]\ntimeout_seconds = -0.5", "openmeter.timeout_seconds: should be greater than 0 (it is -0.5)"),
        ("[openmeter]\ntimeout_seconds = 86401", "openmeter.timeout_seconds: should be less than or equal to 86400"),
        ("[openmeter]\ntimeout_seconds = nan", "openmeter.timeout_seconds: should be a finite number (it is nan)"),
        ("[openmeter]\ntimeout_seconds = inf", "openmeter.timeout_seconds: should be a finite number (it is inf)"),
        ('[openmeter]\ntimeout_seconds = "soon"', "openmeter.timeout_seconds: should be a valid number"),
        ("[openmeter]\nmax_in_flight = 65", "openmeter.max_in_flight: should be less than or equal to 64 (it is 65)"),
        (
            "[openmeter]\nmax_in_flight = 1.5",
            "openmeter.max_in_flight: should be a valid integer, got a number with a f",
        ),
        (
            "[openmeter]\ndedupe_window_days = -1",
            "openmeter.dedupe_window_days: should be greater than or equal to 0 (it is -1)",
        ),
        ("[openmeter.batch]\nmax_events = 0", "openmeter.batch.max_events: should be greater than 0 (it is 0)"),
        ("[openmeter.batch]\nmax_events = 10001", "openmeter.batch.max_events: should be less than or equal to 10000"),
        ("[openmeter.batch]\nmax_bytes = 999", "openmeter.batch.max_bytes: should be greater than or equal to 1000"),
        (
            "[openmeter.batch]\nmax_bytes = 100000001",
            "openmeter.batch.max_bytes: should be less than or equal to 10000",
        ),
        ("[openmeter.retry]\nmax_delay_seconds = 0.1", "openmeter.retry: max_delay_seconds is below initial_delay_sec"),
        ('[metering]\nsource = "a b"', "metering.source: holds a character that can't stand there"),
        ('[metering]\nsource = "100%"', "metering.source: holds a character that can't stand there"),
        ('[metering]\nsource = "10.0.0.1:8000"', "metering.source: holds a character that can't stand there"),
        ('[metering]\nsource = "kong\\n"', "metering.source: holds a character that can't stand there"),
        ('[metering]\nsource = ""', "metering.source: String should have at least 1 character"),
        (
            '[metering]\non_missing_subject = "drop"',
            "metering.on_missing_subject: should be 'skip' or 'dead_letter' (it",
        ),
        ('[metering]\npersonal_fields = ["ip"]', "metering.personal_fields.0: should be 'client_ip', 'request_uri' or"),
        ("[metering]\nmeter_api_requests = false\nmeter_ai_token_usage = false", "metering: nothing would be metered"),
        ("[metering]\nsubject = []", "metering.subject: Tuple should have at least 1 item"),
        ('[metering]\nsubject = "username"', "metering.subject: should be a table"),
        ("[metering]\nstatuses = [99]", "metering.statuses: 99 is no status; write 429,"),
        ('[metering]\nstatuses = ["399-200"]', "metering.statuses: '399-200' is no status"),
        ('[metering]\npaths = ["~("]', "metering.paths: '~(' is no regular expression: "),
        ('[[metering.rules]]\nmethods = ["GET"]', "metering.rules.0: no scope: set service, route or consumer"),
        ('[[metering.rules]]\nservice = ""', "metering.rules.0.service: String should have at least 1 character"),
        (
            '[[metering.rules]]\nservice = "a"\nmeter_api_requests = false\nmeter_ai_token_usage = false',
            "metering: rules.0: nothing would be metered",
        ),
        ('[metering.subject]\nfield = "email"', "metering.subject: field 'email' is not known for a consumer; use"),
        (
            '[metering.subject]\nlook_up_value_in = "header"',
            "metering.subject: field is missing: the name of the header",
        ),
        ('[metering.subject]\nlook_up_value_in = "query"', "metering.subject: field is missing: the name of the query"),
        (
            '[metering.subject]\nlook_up_value_in = "application"\nfield = "id"',
            "metering.subject: field has no meaning with look_up_value_in = 'application'",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_the_problem(toml: str, problem: str, tmp_path: Path) -> None:
    message = refusal_of(tmp_path, toml)
    assert message.startswith(problem)
    assert "\n" not in message


def test_a_number_beyond_all_bounds_is_cut_in_the_message(tmp_path: Path) -> None:
    message = refusal_of(tmp_path, f"[openmeter.batch]\nmax_events = {'9' * 400}")
    assert message.startswith("openmeter.batch.max_events: should be less than or equal to 10000 (it is 999")
    assert len(message) < 150


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("ftp://h/api/v1/events", "not an http:// or https:// URL"),
        ("h:8888/api/v1/events", "not an http:// or https:// URL"),
        ("http:///api/v1/events", "not an http:// or https:// URL"),
        ("http://h:0/api/v1/events", "not an http:// or https:// URL"),
        ("http://h:99999/api/v1/events", "not a URL: host or port can't be read"),
        ("http://[::1/api/v1/events", "not a URL: host or port can't be read"),
        ("http://ho st/api/v1/events", "holds a space, a line break or a control character"),
        ("http://h\n/api/v1/events", "holds a space, a line break or a control character"),
        ("http://h/\x01/events", "holds a space, a line break or a control character"),
        ("http://h/\u00ad/events", "holds a space, a line break or a control character"),
        ("https://{region}.api.konghq.com/v3/openmeter/events", "still holds a {placeholder}"),
        ("http://h/api/v1/events?x=1", "holds a query or a fragment"),
        ("http://h/api/v1/events#x", "holds a query or a fragment"),
        ("http://h/api/v1/events/", "does not end in /events"),
        ("http://h/api/v1", "does not end in /events"),
        ("http://h", "does not end in /events"),
        ("", "not an http:// or https:// URL"),
    ],
)
def test_an_endpoint_that_can_not_work_is_refused(url: str, problem: str, tmp_path: Path) -> None:
    message = refusal_of(tmp_path, f"[openmeter]\ningest_endpoint = {json.dumps(url)}")
    assert message.startswith(f"openmeter.ingest_endpoint: {problem}")


@pytest.mark.parametrize(
    "url",
    [
        URL,
        "http://localhost:8888/api/v3/openmeter/events",
        "https://sg.api.konghq.com/v3/openmeter/events",
        "https://proxy.example/openmeter/events",
        "http://[::1]:8888/api/v1/events",
        "HTTPS://müller.example/events",
    ],
)
def test_an_endpoint_that_can_work_is_kept_as_written(url: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"[openmeter]\ningest_endpoint = {json.dumps(url)}")
    assert endpoint_of(load_config(path), "") == url


# --- secrets (CASES 70)


@pytest.mark.parametrize(
    "toml",
    [
        f'token = "{SECRET}"',
        f'[openmeter]\ntoken = "{SECRET}"',
        f'[openmeter]\napi_token = {{ value = "{SECRET}" }}',
        f'[openmeter]\napi_token = ["{SECRET}"]',
        f'[openmeter]\napi_token = "{SECRET} "',
        f'[openmeter]\napi_token = "{SECRET}\\n"',
        f'[openmeter]\napi_token = "Bearer {SECRET}"',
        f'[openmeter]\napi_token = "{SECRET}ü"',
        f'[openmeter]\napi_token = "{SECRET}"\napi_token_file = "/run/token"',
        f'[openmeter]\napi_token = "{SECRET}"\ntimeout_seconds = 0',
        f'[openmeter]\napi_token = "{SECRET}"\napi_token = "{SECRET}"',
        f"[openmeter]\napi_token = {SECRET}",
        f'[openmeter]\napi_token = "{SECRET}',
        f"[openmeter]\napi_token = '{SECRET}\n'",
        f'[openmeter]\ntimeout_seconds = "{SECRET}"',
        f'[openmeter]\nssl_verify = "{SECRET}"',
        f'openmeter = "{SECRET}"',
        f'openmeter = ["{SECRET}"]',
        f'[openmeter]\nca_file = ["{SECRET}"]',
        f'[[inputs.files]]\npth = "{SECRET}"',
        *(
            f'[openmeter]\ningest_endpoint = "https://{place}/api/v1/events"'
            for place in (
                f"{SECRET}@h",
                f"user:{SECRET}@h",
                f":{SECRET}@h",
                f"user:{SECRET}/x@h",
                f"user:{SECRET}#x@h",
                f"user:{SECRET}?x@h",
                f"user:{SECRET}℀@h",
                f"[{SECRET}]",
                f"{SECRET} x@h",
                f"h/{SECRET}?",
            )
        ),
        f'[openmeter]\ningest_endpoint = "{SECRET}"',
        f'[metering]\nsource = "{SECRET} x"',
    ],
)
def test_a_secret_in_a_wrong_place_is_never_repeated(toml: str, tmp_path: Path) -> None:
    assert SECRET not in refusal_of(tmp_path, toml)


@pytest.mark.parametrize("key", ["api_token", "api_token_file", "ingest_endpoint"])
def test_a_secret_of_digits_is_never_repeated(key: str, tmp_path: Path) -> None:
    """Numbers are shown in messages, but not where a text belongs."""
    message = refusal_of(tmp_path, f"[openmeter]\n{key} = 1234567890")
    assert message.startswith(f"openmeter.{key}: should be a ")
    assert "12345" not in message


@pytest.mark.parametrize("value", [f"{SECRET} x", f" {SECRET}", f"{SECRET}\n", f"{SECRET}\x7f", f"é{SECRET}", ""])
def test_a_token_from_the_environment_that_can_not_be_sent_is_refused_unseen(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METERSHIPPER_OPENMETER__API_TOKEN", value)
    assert refusal(None) == (
        "environment variable METERSHIPPER_OPENMETER__API_TOKEN: openmeter.api_token: "
        "a token is one line of printable ASCII without spaces"
    )


def test_a_refusal_keeps_no_secret_in_its_causes(tmp_path: Path) -> None:
    """Not even a stack trace would show it."""
    path = write(tmp_path, f'[openmeter]\napi_token = "{SECRET}"\nunknown = "{SECRET}"')
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.__suppress_context__
    assert SECRET not in repr(caught.value)


def test_a_secret_shows_in_no_form_of_the_configuration(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, f'[openmeter]\napi_token = "{SECRET}"'))
    forms = (str(config), repr(config), f"{config.openmeter}", config.model_dump_json(), repr(config.model_dump()))
    assert not [form for form in forms if SECRET in form]


# --- what may not be a subject or an attribute


@pytest.mark.parametrize("header", ["authorization", "Authorization", "PROXY-AUTHORIZATION", "Proxy-Authorization"])
def test_a_header_that_kong_redacts_is_refused_as_subject_and_as_attribute(header: str, tmp_path: Path) -> None:
    subject = f'[metering.subject]\nlook_up_value_in = "header"\nfield = "{header}"'
    attribute = (
        f'[[metering.attributes]]\nsource = "header"\nlook_up_value_in = "{header}"\nevent_property_name = "who"'
    )
    words = f"Kong logs the header '{header}' as \"REDACTED\" for every request; choose another"
    assert refusal_of(tmp_path, subject) == f"metering.subject: {words}"
    assert refusal_of(tmp_path, attribute) == f"metering.attributes.0: {words}"


def attribute_named(*names: str) -> str:
    return "".join(
        f'[[metering.attributes]]\nsource = "header"\nlook_up_value_in = "x-a"\nevent_property_name = "{name}"\n'
        for name in names
    )


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_an_attribute_may_not_take_the_name_of_a_built_in_property(name: str, tmp_path: Path) -> None:
    assert refusal_of(tmp_path, attribute_named(name)) == (
        f"metering.attributes.0: event_property_name '{name}' is a built-in property; choose another"
    )


def test_two_attributes_may_not_have_one_name(tmp_path: Path) -> None:
    message = refusal_of(tmp_path, attribute_named("department", "team", "department"))
    assert message == "metering: two attributes are named 'department'"


@pytest.mark.parametrize("name", ["", "1a", "a b", "a\\n", "ä", "$.x"])
def test_an_attribute_name_no_meter_could_use_is_refused(name: str, tmp_path: Path) -> None:
    problem = "holds a character that can't stand there" if name else "String should have at least 1 character"
    assert refusal_of(tmp_path, attribute_named(name)) == f"metering.attributes.0.event_property_name: {problem}"


# --- the file itself


def test_a_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    assert refusal(path) == f"{path}: no such file; name one with -c, or copy config.example.toml"


def test_a_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: can't be read: Is a directory"


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ("[openmeter]\nmax_in_flight = \n", "(at line 2, column 17)"),
        ("a = 1\n\na = 2\n", "(at line 3, column 6)"),
        ("[openmeter\n", "(at line 1, column 11)"),
        ('x = "open', "(at end of document)"),
        (f"x = {'9' * 5000}", "4300 digits"),
        (f"x = {'[' * 5000}", "recursion"),
    ],
)
def test_a_file_that_is_not_toml_is_one_line_with_the_place(toml: str, problem: str, tmp_path: Path) -> None:
    message = refusal_of(tmp_path, toml)
    assert message.startswith("not valid TOML: ")
    assert problem in message
    assert "\n" not in message


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xff\xfe[\x00")
    assert refusal(path) == f"{path}: not UTF-8 text; a configuration is TOML"


# --- the receiver (case 61)


HTTP_LOG = "[inputs.http_log]\n"
LISTEN_PROBLEM = "inputs.http_log.listen: not HOST:PORT, for instance 127.0.0.1:8090, 0.0.0.0:8090 or [::1]:8090"
REACHABLE = (
    "inputs.http_log: listen {} is reachable by others, who could send usage that never was: set token_file, or "
    "client_ca_file with cert_file and key_file; or listen on 127.0.0.1"
)


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        *(
            (f'listen = "{listen}"', LISTEN_PROBLEM)
            for listen in (
                *("", "8090", ":8090", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536", "127.0.0.1:-1"),
                *("::1:8090", "[::1:8090", "::1]:8090", "[127.0.0.1]:8090", "127.0.0.1:٣", "http://127.0.0.1:8090/"),
            )
        ),
        *(
            (f'path = "{path}"', 'inputs.http_log.path: not a path of a URL, such as "/" or "/kong"')
            for path in ("", "kong", "/kong?x", "/k ong", "/kong#", "/{id}", "/%20", "/kong\\n")
        ),
        *(
            (f'listen = "{listen}"', REACHABLE.format(listen))
            for listen in ("0.0.0.0:8090", "[::]:8090", "192.0.2.1:80", "kong.example:80", "[::ffff:127.0.0.1]:80")
        ),
        ('cert_file = "c"', "inputs.http_log: cert_file and key_file belong together; set both or none"),
        ('key_file = "k"', "inputs.http_log: cert_file and key_file belong together; set both or none"),
        (
            'client_ca_file = "ca"',
            "inputs.http_log: client_ca_file asks clients for certificates, which needs cert_file and key_file",
        ),
        (
            'listen = "0.0.0.0:1"\ncert_file = "c"\nkey_file = "k"',  # encrypted, but anybody's
            REACHABLE.format("0.0.0.0:1"),
        ),
        ('token_file = ""', "inputs.http_log.token_file: should be a path: text that is not empty and holds no NUL"),
        (
            "max_body_bytes = 1023",
            "inputs.http_log.max_body_bytes: should be greater than or equal to 1024 (it is 1023)",
        ),
        ("max_body_bytes = 1073741825", "inputs.http_log.max_body_bytes: should be less than or equal to 1073741824"),
        ("spool_max_bytes = 1000", "inputs.http_log.spool_max_bytes: should be greater than or equal to 1024"),
        (
            "spool_max_bytes = 67108863",
            "inputs.http_log: spool_max_bytes is below max_body_bytes: a large body would never be accepted",
        ),
        ("repeat_window_seconds = -1", "inputs.http_log.repeat_window_seconds: should be greater than or equal to 0"),
        (
            "repeat_window_seconds = 86401",
            "inputs.http_log.repeat_window_seconds: should be less than or equal to 86400",
        ),
        ("repeat_window_seconds = nan", "inputs.http_log.repeat_window_seconds: should be a finite number"),
        ('listen_on = ""', "inputs.http_log.listen_on: unknown key; did you mean listen?"),
    ],
)
def test_a_receiver_that_could_not_work_or_is_open_to_others_is_refused(
    toml: str, problem: str, tmp_path: Path
) -> None:
    assert refusal_of(tmp_path, HTTP_LOG + toml).startswith(problem)


@pytest.mark.parametrize(
    ("toml", "address"),
    [
        ("", ("127.0.0.1", 8090)),
        ('listen = "127.0.0.1:0"', ("127.0.0.1", 0)),
        ('listen = "127.255.255.254:65535"', ("127.255.255.254", 65535)),
        ('listen = "[::1]:8090"', ("::1", 8090)),
        ('listen = "localhost:8090"', ("localhost", 8090)),
        ('listen = "0.0.0.0:8090"\ntoken_file = "t"', ("0.0.0.0", 8090)),
        ('listen = "[::]:8090"\ncert_file = "c"\nkey_file = "k"\nclient_ca_file = "ca"', ("::", 8090)),
        ("max_body_bytes = 1024\nspool_max_bytes = 1024", ("127.0.0.1", 8090)),
        ("repeat_window_seconds = 0", ("127.0.0.1", 8090)),
    ],
)
def test_a_receiver_for_this_machine_alone_or_with_credentials_is_fine(
    toml: str, address: tuple[str, int], tmp_path: Path
) -> None:
    config = load_config(write(tmp_path, f'{HTTP_LOG}{toml}\n[openmeter]\ningest_endpoint = "{URL}"'))
    require_for_run(config, "config.toml")  # an input of its own
    assert config.inputs.http_log is not None
    assert config.inputs.http_log.address == address


def test_the_receiver_has_safe_defaults(tmp_path: Path) -> None:
    assert load_config(None).inputs.http_log is None  # without its section nothing is received
    http_log = load_config(write(tmp_path, HTTP_LOG)).inputs.http_log
    assert http_log is not None
    assert http_log.model_dump(mode="json") == {
        "listen": "127.0.0.1:8090",
        "path": "/",
        "token_file": None,
        "cert_file": None,
        "key_file": None,
        "client_ca_file": None,
        "max_body_bytes": 64 * 1024 * 1024,
        "spool_max_bytes": 1024 * 1024 * 1024,
        "repeat_window_seconds": 900.0,
    }


def test_the_receiver_by_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "LISTEN": "0.0.0.0:9000",
        "PATH": "/kong",
        "TOKEN_FILE": "/run/secrets/kong",
        "MAX_BODY_BYTES": "2048",
        "SPOOL_MAX_BYTES": "4096",
        "REPEAT_WINDOW_SECONDS": "60",
    }.items():
        monkeypatch.setenv(f"METERSHIPPER_INPUTS__HTTP_LOG__{name}", value)
    assert load_config(None).inputs.http_log == HttpLog(
        listen="0.0.0.0:9000",
        path="/kong",
        token_file=Path("/run/secrets/kong"),
        max_body_bytes=2048,
        spool_max_bytes=4096,
        repeat_window_seconds=60,
    )


def test_a_receiver_by_environment_that_is_open_to_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METERSHIPPER_INPUTS__HTTP_LOG__LISTEN", "0.0.0.0:8090")
    assert REACHABLE.format("0.0.0.0:8090") in refusal(None)


# --- what this version does not serve, and what a run needs


@pytest.mark.parametrize(
    ("key", "toml"),
    [
        ("admin", '[admin]\nlisten = "127.0.0.1:9464"'),
    ],
)
def test_a_section_of_a_later_version_is_refused_with_what_to_do(key: str, toml: str, tmp_path: Path) -> None:
    """`metering.rules` is not among them any more: this version serves it."""
    assert refusal_of(tmp_path, toml) == f"{key}: {NOT_YET[key]}"


def test_a_run_needs_an_input_and_an_endpoint(tmp_path: Path) -> None:
    nothing = load_config(write(tmp_path, ""))
    with pytest.raises(ConfigError, match=r"^config\.toml: no input; add \[\[inputs\.files\]\]"):
        require_for_run(nothing, "config.toml")
    only_input = load_config(write(tmp_path, '[[inputs.files]]\npath = "usage.log"'))
    with pytest.raises(ConfigError, match=r"^config\.toml: openmeter\.ingest_endpoint is missing; .*127\.0\.0\.1:8888"):
        require_for_run(only_input, "config.toml")


def test_the_configuration_can_not_be_changed() -> None:
    config = load_config(None)
    frozen: Mapping[str, BaseModel] = {"state": config, "max_events": config.openmeter.batch}
    for name, section in frozen.items():
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, name, None)
    assert Attribute.model_config["extra"] == "forbid"
