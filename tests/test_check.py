"""`check` says in plain words what a configuration does, and with --connect tells apart everything that can be wrong
with an endpoint (CASES 44-48, 70, 75). Its exit code is 0, 1 or 2, and it never ends in a stack trace.
"""

import asyncio
import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvicorn
from click.testing import CliRunner, Result

from metershipper.check import Proof, explain, prove_connection
from metershipper.cli import cli
from metershipper.config import Config, load_config
from metershipper.errors import ConfigError
from metershipper.sandbox import Store, bind, build_app

SECRET = "spat_V3ryS3cret"
PATHS = {"v1": "/api/v1/events", "v3": "/api/v3/openmeter/events", "Konnect": "/v3/openmeter/events"}


def load(directory: Path, toml: str) -> Config:
    path = directory / "config.toml"
    path.write_text(toml, encoding="utf-8")
    return load_config(path)


def told(directory: Path, toml: str) -> list[str]:
    return asyncio.run(explain(load(directory, toml), "config.toml"))


def check(directory: Path, toml: str, *options: str) -> Result:
    """The command itself."""
    (directory / "config.toml").write_text(toml, encoding="utf-8")
    result = CliRunner().invoke(cli, ["check", "-c", str(directory / "config.toml"), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def to_endpoint(url: str, *lines: str) -> str:
    return "\n".join(
        ["[openmeter]", f'ingest_endpoint = "{url}"', *lines, "[[inputs.files]]", 'path = "/nonexistent/usage.log"']
    )


# --- the words


def test_the_least_configuration_in_words(tmp_path: Path) -> None:
    assert told(tmp_path, to_endpoint("http://127.0.0.1:8888/api/v1/events")) == [
        "config.toml is valid.",
        "Reads   /nonexistent/usage.log, from the beginning; no such file yet: it is followed as soon as it appears",
        "Meters  every API request (kong.api_request); input and output tokens of AI calls (kong.llm_request), "
        "not of failed calls",
        "Bills   the consumer, as consumer:<id>; entries without it are skipped and counted",
        "Sends   to http://127.0.0.1:8888/api/v1/events (OpenMeter v1), without a token; "
        "at most 500 events, 1000000 bytes or 1 s in a batch, 4 in flight",
        'Source  "kong", the same for every gateway whose usage must not be billed twice',
        "Keeps   positions, books and dead letters in /var/lib/metershipper",
    ]


def test_a_configuration_with_everything_in_words(tmp_path: Path) -> None:
    for name, size in {"a.log": 1234567, "b.log": 1, "c.txt": 1}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "d.log").mkdir()
    token = tmp_path / "token"
    token.write_text(SECRET)
    token.chmod(0o644)
    assert told(
        tmp_path,
        f"""
        [openmeter]
        ingest_endpoint = "http://127.example.com/api/v3/openmeter/events"
        api_token_file = "{token}"
        ssl_verify = false
        max_in_flight = 2
        batch = {{ max_events = 10, max_bytes = 5000, max_wait_seconds = 0.25 }}
        [[inputs.files]]
        path = "{tmp_path}/*.log"
        read_from = "end"
        [[inputs.files]]
        path = "{tmp_path}/c.txt"
        [state]
        directory = "state"
        [metering]
        source = "estate-1"
        meter_api_requests = false
        on_missing_subject = "dead_letter"
        emit_zero_tokens = true
        meter_failed_ai_calls = true
        personal_fields = ["request_uri", "client_ip"]
        subject = {{ look_up_value_in = "header", field = "x-customer" }}
        [[metering.attributes]]
        source = "header"
        look_up_value_in = "x-department"
        event_property_name = "department"
        [[metering.attributes]]
        source = "query"
        look_up_value_in = "team"
        event_property_name = "team_name"
        """,
    ) == [
        "config.toml is valid.",
        f"Reads   {tmp_path}/*.log, from its end, when it is first seen; 2 files, 1,234,568 bytes now",
        f"Reads   {tmp_path}/c.txt, from the beginning; 1 bytes now",
        "Meters  input and output tokens of AI calls (kong.llm_request, also 0), also of failed calls",
        "Bills   the value of the header x-customer; entries without it are kept as dead letters",
        "Adds    department, from the header x-department",
        "Adds    team_name, from the query parameter team",
        "Adds    personal data: client_ip, request_uri",
        "Sends   to http://127.example.com/api/v3/openmeter/events (OpenMeter v3), with a token; "
        "at most 10 events, 5000 bytes or 0.25 s in a batch, 2 in flight",
        'Source  "estate-1", the same for every gateway whose usage must not be billed twice',
        "Keeps   positions, books and dead letters in state",
        f"Note    {token}: readable by every user of this machine; chmod 600 it",
        "Note    the token travels unencrypted: ingest_endpoint is http:// and not on this machine",
        "Note    the endpoint's certificate is not checked: ssl_verify = false",
    ]


def test_rules_filters_and_details_in_words(tmp_path: Path) -> None:
    """What a scoped rule changes is told under its scope, also what it keeps out."""
    shown = told(
        tmp_path,
        to_endpoint("http://127.0.0.1:8888/api/v1/events")
        + """
        [metering]
        token_details = true
        split_cached_input = true
        meter_mcp_tool_calls = true
        statuses = ["2xx", 429]
        paths = ["/v1/"]
        subject = [{ look_up_value_in = "consumer" }, { look_up_value_in = "header", field = "x-tenant" }]
        [[metering.rules]]
        service = "internal"
        enabled = false
        [[metering.rules]]
        route = "chat"
        consumer = "acme"
        meter_api_requests = false
        meter_mcp_tool_calls = false
        statuses = []
        """,
    )
    start = shown.index(next(line for line in shown if line.startswith("Meters")))
    assert shown[start : start + 9] == [
        "Meters  every API request (kong.api_request); input and output tokens of AI calls "
        "(kong.llm_request, cached input apart, with details), not of failed calls; "
        "every call of an MCP tool (kong.mcp_tool_call)",
        "Only    statuses 2xx, 429; paths /v1/; others are skipped and counted",
        "Bills   the consumer, as consumer:<id>, else the value of the header x-tenant; "
        "entries without it are skipped and counted",
        "Rule    metering.rules[0], for service internal, in place of the above:",
        "  Meters  nothing: enabled = false",
        "Rule    metering.rules[1], for consumer acme, route chat, in place of the above:",
        "  Meters  input and output tokens of AI calls (kong.llm_request, cached input apart, with details), "
        "not of failed calls",
        "  Only    paths /v1/; others are skipped and counted",
        "  Bills   the consumer, as consumer:<id>, else the value of the header x-tenant; "
        "entries without it are skipped and counted",
    ]


def test_a_konnect_configuration_in_words(tmp_path: Path) -> None:
    url = "https://eu.api.konghq.com/v3/openmeter/events"
    words = told(
        tmp_path,
        to_endpoint(url, f'api_token = "{SECRET}"') + "\n[metering]\nmeter_ai_token_usage = false\n"
        '[metering.subject]\nfield = "username"',
    )
    assert words[2:5] == [
        "Meters  every API request (kong.api_request)",
        "Bills   the consumer's username; entries without it are skipped and counted",
        f"Sends   to {url} (OpenMeter v3), with a token; "
        "at most 500 events, 1000000 bytes or 1 s in a batch, 4 in flight",
    ]
    assert not [line for line in words if SECRET in line or line.startswith("Note")]


@pytest.mark.parametrize(
    ("subject", "words"),
    [
        ('look_up_value_in = "application"', "the application, as application:<id>"),
        ('look_up_value_in = "query"\nfield = "customer"', "the value of the query parameter customer"),
        ('look_up_value_in = "consumer"\nfield = "custom_id"', "the consumer's custom_id"),
    ],
)
def test_who_is_billed_in_words(subject: str, words: str, tmp_path: Path) -> None:
    lines = told(tmp_path, to_endpoint("http://localhost/events") + f"\n[metering.subject]\n{subject}")
    assert f"Bills   {words}; entries without it are skipped and counted" in lines


@pytest.mark.parametrize(
    ("url", "noted"),
    [
        ("http://localhost/events", False),
        ("http://127.9.9.9/events", False),
        ("http://[::1]:8888/events", False),
        ("https://example.com/events", False),
        ("http://example.com/events", True),
        ("http://10.0.0.1/events", True),
        ("http://127.0.0.1.example.com/events", True),
        ("http://localhost.example.com/events", True),
    ],
)
def test_a_token_that_would_travel_in_the_clear_is_noted(url: str, noted: bool, tmp_path: Path) -> None:
    words = told(tmp_path, to_endpoint(url, f'api_token = "{SECRET}"'))
    assert any("travels unencrypted" in line for line in words) is noted
    assert any("OpenMeter unknown version" in line for line in words)


def test_a_log_this_user_may_not_read_is_told(tmp_path: Path) -> None:
    """CASES 20."""
    log = tmp_path / "usage.log"
    log.touch(mode=0o000)
    config = load(tmp_path, to_endpoint("http://localhost/events").replace("/nonexistent/usage.log", str(log)))
    user = os.getresuid()
    if user[0] == 0:  # to root no mode means anything
        os.setresuid(65534, -1, -1)
    try:
        words = asyncio.run(explain(config, "config.toml"))
    finally:
        os.setresuid(*user)
    assert words[1] == f"Reads   {log}, from the beginning; {log} is not readable by this user"


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ("", "no input; add [[inputs.files]]"),
        ('[[inputs.files]]\npath = "usage.log"', "openmeter.ingest_endpoint is missing"),
        (to_endpoint("http://h/events", 'api_token_file = "/nonexistent"'), "/nonexistent: the token can't be read"),
        (to_endpoint("http://h/events", 'api_token = "x"', "timeout = 1"), "openmeter.timeout: unknown key"),
        ("[openmeter", "not valid TOML"),
    ],
)
def test_a_configuration_that_can_not_run_is_refused_with_exit_code_2(toml: str, problem: str, tmp_path: Path) -> None:
    result = check(tmp_path, toml, "--connect")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("metershipper: ")
    assert problem in result.stderr
    assert result.stderr.count("\n") == 1


# --- the proof


@pytest.fixture
def sandbox_url() -> Iterator[str]:
    """A sandbox on loopback, in a thread."""
    started = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started.set()

    with contextlib.closing(Store()) as store, contextlib.closing(bind("127.0.0.1", 0)) as listener:
        server = Server(uvicorn.Config(build_app(store), lifespan="off", ws="none", log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        assert started.wait(10)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


@pytest.mark.parametrize(("path", "status"), [("v1", 204), ("v3", 202), ("Konnect", 202)])
def test_a_sandbox_of_either_version_is_proven(path: str, status: int, sandbox_url: str, tmp_path: Path) -> None:
    result = check(tmp_path, to_endpoint(f"{sandbox_url}{PATHS[path]}", f'api_token = "{SECRET}"'), "--connect")
    assert (result.exit_code, result.stderr) == (0, "")
    last = result.stdout.splitlines()[-1]
    assert last == f"Connection OK: the endpoint took an empty batch (HTTP {status})"
    assert SECRET not in result.output


def test_without_connect_nothing_is_sent(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        result = check(tmp_path, to_endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/events"))
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{tmp_path}/config.toml is valid.\n")


def test_a_wrong_path_of_the_sandbox_is_a_404(sandbox_url: str, tmp_path: Path) -> None:
    result = check(tmp_path, to_endpoint(f"{sandbox_url}/openmeter/events"), "--connect")
    assert result.exit_code == 1
    assert "Connection failed: HTTP 404: there is no ingest endpoint at this path" in result.stdout


def prove(directory: Path, answer: bytes, *lines: str, host: str = "", tls: ssl.SSLContext | None = None) -> Proof:
    """The proof of a server that sends `answer` to whatever comes."""

    async def run() -> Proof:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await reader.readuntil(b"[]")
                if answer:
                    writer.write(answer)
                else:
                    await reader.read()  # until the client leaves
                await writer.drain()
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls) as server:
            port = server.sockets[0].getsockname()[1]
            url = f"{'https' if tls else 'http'}://{host or '127.0.0.1'}:{port}/api/v1/events"
            toml = to_endpoint(url, f'api_token = "{SECRET}"', *lines)
            return await prove_connection(load(directory, toml), "config.toml")

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            "401 X\r\n\r\n",
            "HTTP 401: the token is missing or wrong: replace the token file, it is read again at every try",
        ),
        (
            "403 X\r\n\r\n",
            "HTTP 403: the token may not ingest events: replace the token file, it is read again at every try",
        ),
        ("404 X\r\n\r\n", "HTTP 404: there is no ingest endpoint at this path: correct ingest_endpoint"),
        (
            "301 X\r\nLocation: https://example.com/\r\n\r\n",
            "HTTP 301: a redirect, which is never followed: write the final URL into ingest_endpoint",
        ),
        (
            "200 OK\r\nContent-Type: text/html\r\n\r\n<html>",
            "HTTP 200 with a text/html that OpenMeter does not send: something else answers at ingest_endpoint",
        ),
        ("503 X\r\n\r\nbusy", "HTTP 503 (busy)"),
        (f"500 X\r\n\r\n{SECRET}", "HTTP 500 (REDACTED)"),
    ],
)
def test_each_refusal_is_told_apart(answer: str, words: str, tmp_path: Path) -> None:
    assert prove(tmp_path, f"HTTP/1.1 {answer}".encode()) == Proof(False, f"Connection failed: {words}")


def test_an_endpoint_that_never_answers_is_told(tmp_path: Path) -> None:
    proof = prove(tmp_path, b"", "timeout_seconds = 0.2")
    assert proof == Proof(False, "Connection failed: no answer within 0.2 s")


def test_a_certificate_that_does_not_fit_is_told(tmp_path: Path) -> None:
    """CASES 47: unknown CA, wrong host name, and neither."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")

    def serving(*names: str) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        ca.issue_cert(*names).configure_cert(context)
        return context

    ok = b"HTTP/1.1 204 X\r\n\r\n"
    ours = f'ca_file = "{tmp_path}/ca.pem"'
    unknown = prove(tmp_path, ok, tls=serving("127.0.0.1"))
    wrong = prove(tmp_path, ok, ours, host="localhost", tls=serving("other.example"))
    right = prove(tmp_path, ok, ours, host="localhost", tls=serving("localhost"))
    assert unknown == Proof(False, "Connection failed: TLS failed: unable to get local issuer certificate")
    assert not wrong.ok
    assert wrong.text.startswith(
        "Connection failed: TLS failed: Hostname mismatch, certificate is not valid for 'local"
    )
    assert right == Proof(True, "Connection OK: the endpoint took an empty batch (HTTP 204)")


def test_dns_and_a_closed_port_are_told_apart_with_exit_code_1(tmp_path: Path) -> None:
    """CASES 46."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    unknown = check(tmp_path, to_endpoint("https://nonexistent.invalid/api/v1/events"), "--connect")
    refused = check(tmp_path, to_endpoint(f"http://127.0.0.1:{port}/api/v1/events"), "--connect")
    assert (unknown.exit_code, refused.exit_code) == (1, 1)
    assert unknown.stdout.endswith("\nConnection failed: the host name can't be resolved (DNS)\n")
    assert refused.stdout.endswith("\nConnection failed: the connection was refused: nothing listens there\n")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('ca_file = "/nonexistent.pem"', "/nonexistent.pem: no usable CA certificates: No such file or directory"),
        ('ca_file = "/"', "/: no usable CA certificates: Is a directory"),
    ],
)
def test_a_ca_file_that_is_none_is_a_mistake_of_the_configuration(line: str, problem: str, tmp_path: Path) -> None:
    result = check(tmp_path, to_endpoint("https://127.0.0.1:1/events", line), "--connect")
    assert result.exit_code == 2
    assert result.stderr == f"metershipper: {problem}\n"


def test_a_name_no_client_can_use_is_a_mistake_of_the_configuration(tmp_path: Path) -> None:
    result = check(tmp_path, to_endpoint("https://xn--a/events"), "--connect")
    assert result.exit_code == 2
    assert result.stderr.startswith("metershipper: openmeter.ingest_endpoint: not a usable URL: ")


def test_the_words_come_before_the_proof_and_need_an_endpoint(tmp_path: Path) -> None:
    config: Any = load(tmp_path, "")
    with pytest.raises(ConfigError, match=r"^somewhere: openmeter\.ingest_endpoint is missing"):
        asyncio.run(prove_connection(config, "somewhere"))
