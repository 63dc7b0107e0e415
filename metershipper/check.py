"""`check`: the configuration in plain words, and the proof that endpoint and token work. Changes nothing anywhere."""

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from metershipper.config import Config, FileInput, HttpLog, OpenMeter, endpoint_of, is_loopback, require_for_run
from metershipper.credentials import TokenFile
from metershipper.metering import MeteringSettings, Rule, Subject
from metershipper.openmeter import Endpoint, Token
from metershipper.retry import Verdict
from metershipper.state import state_problem


@dataclass(frozen=True, slots=True)
class Proof:
    """What came of trying the endpoint."""

    ok: bool
    text: str


async def explain(config: Config, where: str) -> list[str]:
    """What will be metered, for whom, from where, to where: one sentence a line, in the order of the flow.

    Raises: ConfigError when there is nothing to read, nowhere to send it, or the token can't be read.
    """
    require_for_run(config, where)
    token = Token(config.openmeter)
    has_token = await token.read() is not None
    if config.inputs.http_log is not None and config.inputs.http_log.token_file:
        await TokenFile(config.inputs.http_log.token_file).read()
    return list(_sentences(config, where, token, has_token=has_token))


def _sentences(config: Config, where: str, token: Token, *, has_token: bool) -> Iterator[str]:
    yield f"{where} is valid."
    for file in config.inputs.files:
        yield f"Reads   {_input(file)}"
    if config.inputs.http_log is not None:
        yield f"Takes   {_receiver(config.inputs.http_log)}"
    yield from _metering(config.metering)
    for number, rule in enumerate(config.metering.rules):
        yield f"Rule    metering.rules[{number}], for {_scope(rule)}, in place of the above:"
        yield from (f"  {line}" for line in _metering(rule.over(config.metering)))
    yield f"Sends   {_destination(config.openmeter, endpoint_of(config, where), has_token)}"
    yield f'Source  "{config.metering.source}", the same for every gateway whose usage must not be billed twice'
    yield f"Keeps   positions, books and dead letters in {config.state.directory}"
    if problem := state_problem(config.state.directory):
        yield f"Note    {problem}"
    http_log = config.inputs.http_log
    http_log_warning = TokenFile(http_log.token_file).warning if http_log and http_log.token_file else None
    yield from (f"Note    {warning}" for warning in (token.warning, http_log_warning) if warning)
    if has_token and _is_plain_and_remote(endpoint_of(config, where)):
        yield "Note    the token travels unencrypted: ingest_endpoint is http:// and not on this machine"
    if not config.openmeter.ssl_verify:
        yield "Note    the endpoint's certificate is not checked: ssl_verify = false"


def _receiver(settings: HttpLog) -> str:
    """Kong's http_endpoint, from whom it is taken, and how much may wait."""
    host, port = settings.address
    url = f"{'http' if settings.cert_file is None else 'https'}://{f'[{host}]' if ':' in host else host}:{port}"
    keys = [name for name, asked in (("token", settings.token_file), ("certificate", settings.client_ca_file)) if asked]
    who = f"from who has a {' and a '.join(keys)}" if keys else "from anybody on this machine"
    return f"http-log on {url}{settings.path}, {who}; at most {settings.spool_max_bytes:,} bytes wait on disk"


def _input(file: FileInput) -> str:
    found = sorted(glob.glob(file.path, recursive=True)) if glob.has_magic(file.path) else [file.path]
    if os.path.isdir(file.path):
        return f"{file.path}, which is a directory and not followed: name a file in it, or a glob"
    found = [path for path in found if os.path.isfile(path)]
    start = "from the beginning" if file.read_from == "beginning" else "from its end, when it is first seen"
    if not found:
        return f"{file.path}, {start}; no such file yet: it is followed as soon as it appears"
    unreadable = [path for path in found if not os.access(path, os.R_OK)]
    if unreadable:
        return f"{file.path}, {start}; {unreadable[0]} is not readable by this user"
    size = sum(os.path.getsize(path) for path in found)
    files = "" if found == [file.path] else f"{len(found)} files, "
    return f"{file.path}, {start}; {files}{size:,} bytes now"


def _metering(settings: MeteringSettings) -> Iterator[str]:
    if not settings.enabled:
        yield "Meters  nothing: enabled = false"
        return
    yield f"Meters  {_meters(settings)}"
    filters = ("methods", "statuses", "paths", "workspaces")
    only = [f"{name} {', '.join(map(str, wanted))}" for name in filters if (wanted := getattr(settings, name))]
    if only:
        yield f"Only    {'; '.join(only)}; others are skipped and counted"
    yield f"Bills   {_subject(settings)}"
    for attribute in settings.attributes:
        kind = "header" if attribute.source == "header" else "query parameter"
        yield f"Adds    {attribute.event_property_name}, from the {kind} {attribute.look_up_value_in}"
    if settings.personal_fields:
        yield f"Adds    personal data: {', '.join(sorted(settings.personal_fields))}"


def _scope(rule: Rule) -> str:
    parts = [f"{kind} {name}" for kind in ("consumer", "route", "service") if (name := getattr(rule, kind)) is not None]
    return ", ".join(parts)


def _meters(settings: MeteringSettings) -> str:
    parts = []
    if settings.meter_api_requests:
        parts.append("every API request (kong.api_request)")
    if settings.meter_ai_token_usage:
        cached = ", cached input apart" if settings.split_cached_input else ""
        details = ", with details" if settings.token_details else ""
        zero = ", also 0" if settings.emit_zero_tokens else ""
        failed = "also" if settings.meter_failed_ai_calls else "not"
        parts.append(
            f"input and output tokens of AI calls (kong.llm_request{cached}{details}{zero}), {failed} of failed calls"
        )
    if settings.meter_mcp_tool_calls:
        parts.append("every call of an MCP tool (kong.mcp_tool_call)")
    return "; ".join(parts)


def _subject(settings: MeteringSettings) -> str:
    missing = "skipped and counted" if settings.on_missing_subject == "skip" else "kept as dead letters"
    who = ", else ".join(_who(subject) for subject in settings.subjects)
    return f"{who}; entries without it are {missing}"


def _who(subject: Subject) -> str:
    match subject.look_up_value_in:
        case "consumer":
            return f"the consumer's {subject.field}" if subject.field else "the consumer, as consumer:<id>"
        case "application":
            return "the application, as application:<id>"
        case "header":
            return f"the value of the header {subject.field}"
        case "query":
            return f"the value of the query parameter {subject.field}"


def _destination(settings: OpenMeter, url: str, has_token: bool) -> str:
    batch = settings.batch
    version = "v3" if "/v3/" in url else "v1" if "/v1/" in url else "unknown version"
    return (
        f"to {url} (OpenMeter {version}), {'with' if has_token else 'without'} a token; "
        f"at most {batch.max_events} events, {batch.max_bytes} bytes or {batch.max_wait_seconds:g} s in a batch, "
        f"{settings.max_in_flight} in flight"
    )


def _is_plain_and_remote(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "http" and not is_loopback(parts.hostname or "")


async def prove_connection(config: Config, where: str) -> Proof:
    """Send an empty batch, which OpenMeter v1 and v3 accept and which bills nothing."""
    async with Endpoint(endpoint_of(config, where), config.openmeter) as endpoint:
        answer = await endpoint.post(b"[]")
    if answer.verdict is Verdict.ACCEPTED:
        return Proof(True, f"Connection OK: the endpoint took an empty batch ({answer.reason})")
    return Proof(False, f"Connection failed: {answer.reason}")
