"""The configuration: its keys, their defaults, and how a file and the environment become one checked value.

The single list of options. Never reads what a token file holds (see `openmeter.Token`) and never shows a secret.
"""

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from metershipper.credentials import is_token
from metershipper.errors import ConfigError
from metershipper.formats import Format
from metershipper.lines import MAX_LINE_BYTES
from metershipper.metering import ONE_OR_SEVERAL, Metering, Section

ENV_PREFIX = "METERSHIPPER_"
ENV_DELIMITER = "__"
# Sections of the contract that this version does not serve yet: refused, so that nobody waits for what never comes.
NOT_YET = {
    "admin": "metrics and health are not part of this version: use `metershipper status --json`",
}


def _checked_path(value: Any) -> Any:
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise PydanticCustomError("path_type", "should be a path: text that is not empty and holds no NUL character")
    return value


PositiveSeconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]
CheckedPath = Annotated[Path, BeforeValidator(_checked_path)]


class Batch(Section):
    """What one POST may carry: it is sent when the first of these is reached."""

    max_events: int = Field(500, gt=0, le=10_000)
    max_bytes: int = Field(1_000_000, ge=1_000, le=100_000_000)
    max_wait_seconds: PositiveSeconds = 1.0


class Retry(Section):
    """Waiting between tries: exponential with full jitter. There is no give-up: usage is money."""

    initial_delay_seconds: PositiveSeconds = 0.5
    max_delay_seconds: PositiveSeconds = 60.0

    @model_validator(mode="after")
    def _ordered(self) -> "Retry":
        if self.max_delay_seconds < self.initial_delay_seconds:
            raise ValueError("max_delay_seconds is below initial_delay_seconds")
        return self


class OpenMeter(Section):
    """Where usage events go, and how."""

    ingest_endpoint: str | None = None
    api_token: SecretStr | None = None
    api_token_file: CheckedPath | None = None
    timeout_seconds: PositiveSeconds = 10.0
    ssl_verify: bool = True
    ca_file: CheckedPath | None = None
    max_in_flight: int = Field(4, gt=0, le=64)
    dedupe_window_days: int = Field(32, ge=0, le=36500)
    batch: Batch = Batch()
    retry: Retry = Retry()

    @field_validator("ingest_endpoint")
    @classmethod
    def _checked_endpoint(cls, url: str | None) -> str | None:
        return url if url is None else _checked_url(url)

    @field_validator("api_token")
    @classmethod
    def _checked_token(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None and not is_token(token.get_secret_value()):
            raise ValueError("a token is one line of printable ASCII without spaces")
        return token

    @model_validator(mode="after")
    def _one_of_each(self) -> "OpenMeter":
        if self.api_token is not None and self.api_token_file is not None:
            raise ValueError("api_token and api_token_file are both set, here or by environment; keep one")
        if self.ca_file is not None and not self.ssl_verify:
            raise ValueError("ca_file has no meaning with ssl_verify = false; remove one")
        return self


class FileInput(Section):
    """A log file to follow, or a glob."""

    path: str = Field(min_length=1)
    read_from: Literal["beginning", "end"] = "beginning"
    format: Format = "auto"

    @field_validator("path")
    @classmethod
    def _checked_log(cls, path: str) -> str:
        _checked_path(path)
        if path.startswith("~"):
            raise ValueError("~ is not expanded; write the whole path")
        if path.endswith((".gz", ".zst")):
            raise ValueError("a compressed file does not grow; follow the log Kong writes")
        return path


class HttpLog(Section):
    """Where Kong's http-log posts to, and what it may take. `repeat_window_seconds`: see `repeats`."""

    listen: str = "127.0.0.1:8090"
    path: str = "/"
    token_file: CheckedPath | None = None
    cert_file: CheckedPath | None = None
    key_file: CheckedPath | None = None
    client_ca_file: CheckedPath | None = None
    max_body_bytes: int = Field(64 * 1024 * 1024, ge=1024, le=1024 * 1024 * 1024)
    spool_max_bytes: int = Field(1024 * 1024 * 1024, ge=1024)
    repeat_window_seconds: float = Field(900.0, ge=0, le=86400, allow_inf_nan=False)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port; port 0 is any that is free."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)

    @field_validator("listen")
    @classmethod
    def _checked_listen(cls, listen: str) -> str:
        host, _, port = listen.rpartition(":")
        if (
            not host
            or not re.fullmatch("[0-9]{1,5}", port)
            or int(port) > 65535
            or (":" in host.strip("[]")) != (host.startswith("[") and host.endswith("]"))
        ):
            raise ValueError("not HOST:PORT, for instance 127.0.0.1:8090, 0.0.0.0:8090 or [::1]:8090")
        return listen

    @field_validator("path")
    @classmethod
    def _checked_url_path(cls, path: str) -> str:
        if not re.fullmatch(r"/[A-Za-z0-9._~/-]*", path):
            raise ValueError('not a path of a URL, such as "/" or "/kong"')
        return path

    @model_validator(mode="after")
    def _safe(self) -> "HttpLog":
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together; set both or none")
        if self.client_ca_file is not None and self.cert_file is None:
            raise ValueError("client_ca_file asks clients for certificates, which needs cert_file and key_file")
        if self.token_file is None and self.client_ca_file is None and not is_loopback(self.address[0]):
            raise ValueError(
                f"listen {self.listen} is reachable by others, who could send usage that never was: set token_file, or "
                "client_ca_file with cert_file and key_file; or listen on 127.0.0.1"
            )
        if self.spool_max_bytes < self.max_body_bytes:
            raise ValueError("spool_max_bytes is below max_body_bytes: a large body would never be accepted")
        return self


class Inputs(Section):
    """Where entries come from."""

    files: tuple[FileInput, ...] = ()
    http_log: HttpLog | None = None
    max_line_bytes: int = Field(MAX_LINE_BYTES, ge=4096, le=64 * 1024 * 1024)

    @field_validator("files")
    @classmethod
    def _distinct(cls, files: tuple[FileInput, ...]) -> tuple[FileInput, ...]:
        paths = [file.path for file in files]
        repeated = sorted({path for path in paths if paths.count(path) > 1})
        if repeated:
            raise ValueError(f"path {repeated[0]!r} stands twice")
        return files


class State(Section):
    """Where positions, books and dead letters are kept: one directory for one process."""

    directory: CheckedPath = Path("/var/lib/metershipper")


class Config(BaseSettings):
    """The whole configuration, frozen. Every key has a default, so that `map` works with no file at all."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter=ENV_DELIMITER, extra="forbid", frozen=True
    )

    openmeter: OpenMeter = OpenMeter()
    inputs: Inputs = Inputs()
    state: State = State()
    metering: Metering = Metering()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over the file; there are no other sources."""
        return env_settings, init_settings


def load_config(path: Path | None) -> Config:
    """The configuration of the file at `path` (None: no file) and the environment, checked.

    Raises: ConfigError with one line a problem: the file or variable, the key, what is wrong, what to do.
    """
    values = _read_toml(path) if path is not None else {}
    where = str(path) if path is not None else "configuration"
    problems = _not_yet(values, where) + _reserved(values, where) + _unknown_variables(os.environ)
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        return Config(**values)
    except ValidationError as error:
        lines = [_problem(dict(detail), where) for detail in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None
    except ValueError as error:  # pydantic-settings: a list or table given by environment is not JSON
        raise ConfigError(f"environment: {_setting_name(error)}: not valid JSON, as lists and tables must be") from None


def require_for_run(config: Config, where: str) -> None:
    """Raise `ConfigError` unless there is something to read and somewhere to send it."""
    if not config.inputs.files and config.inputs.http_log is None:
        raise ConfigError(
            f'{where}: no input; add [[inputs.files]] with path = "/var/log/kong/usage.log", or [inputs.http_log]'
        )
    endpoint_of(config, where)


def endpoint_of(config: Config, where: str) -> str:
    """The ingest endpoint, or `ConfigError` when there is none."""
    if config.openmeter.ingest_endpoint is None:
        raise ConfigError(
            f"{where}: openmeter.ingest_endpoint is missing; for a local OpenMeter it is "
            '"http://127.0.0.1:8888/api/v1/events", for Konnect "https://us.api.konghq.com/v3/openmeter/events"'
        )
    return config.openmeter.ingest_endpoint


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`: its name, or an address of the loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name one with -c, or copy config.example.toml") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; a configuration is TOML") from None
    except (ValueError, RecursionError) as error:  # also numbers and nesting beyond what Python reads
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _not_yet(values: Mapping[str, Any], where: str) -> list[str]:
    def stands(key: str) -> bool:
        table: Any = values
        for part in key.split("."):
            if not isinstance(table, Mapping) or part not in table:
                return False
            table = table[part]
        return True

    return [f"{where}: {key}: {reason}" for key, reason in NOT_YET.items() if stands(key)]


def _reserved(values: Mapping[str, Any], where: str) -> list[str]:
    """Keys that pydantic-settings would take for its own options, such as `_env_file`."""
    return [f"{where}: {key}: unknown key{_suggestion((key,))}" for key in values if key.startswith("_")]


def _unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables of ours that name no section.

    Without the delimiter they are left alone: Kubernetes sets METERSHIPPER_PORT and the like for a service of our name.
    """
    sections = sorted(Config.model_fields)
    ours = [name for name in environment if name.startswith(ENV_PREFIX) and ENV_DELIMITER in name]
    named = {name: name.removeprefix(ENV_PREFIX).split(ENV_DELIMITER)[0].lower() for name in sorted(ours)}
    unknown = f"unknown section; known are {', '.join(sections)}"
    problems = [f"environment: {n}: {NOT_YET.get(name, unknown)}" for n, name in named.items() if name not in sections]
    meant = {name.replace(ENV_DELIMITER, "_"): name for name in _variables(Config, ENV_PREFIX)}
    single = [name for name in sorted(environment) if name.upper() in meant and ENV_DELIMITER not in name]
    return problems + [f"environment: {name}: unknown; did you mean {meant[name.upper()]}?" for name in single]


def _variables(model: Any, prefix: str) -> Iterator[str]:
    """The variable of every key below `model`."""
    for name in model.model_fields:
        section = _model_of(model, name)
        if hasattr(section, "model_fields") and section is not FileInput:
            yield from _variables(section, f"{prefix}{name.upper()}{ENV_DELIMITER}")
        yield f"{prefix}{name.upper()}"


def _problem(detail: dict[str, Any], where: str) -> str:
    location: tuple[Any, ...] = detail["loc"]
    key = ".".join(str(part) for part in location if part not in ONE_OR_SEVERAL)
    origin = _variable_of(detail) or where
    if detail["type"] == "extra_forbidden":
        return f"{origin}: {key}: {NOT_YET.get(key) or f'unknown key{_suggestion(location)}'}"
    # Only numbers where a number belongs, and the words of a closed list, are repeated: any other input might be a
    # secret in the wrong place.
    given, kind = detail["input"], detail["type"]
    number = isinstance(given, int | float) and not kind.endswith("_type") and kind != "value_error"
    shown = f" (it is {given!r:.40})" if number or (kind == "literal_error" and isinstance(given, str)) else ""
    message = str(detail["msg"]).removeprefix("Value error, ").replace("Input should", "should", 1)
    for theirs, ours in _PLAIN_WORDS.items():
        message = re.sub(theirs, ours, message)
    return f"{origin}: {key}: {message}{shown}"


# What pydantic calls by Python's names, in TOML's.
_PLAIN_WORDS = {
    r"a valid (tuple|frozenset)": "a list",
    r"a valid dictionary( or instance of \w+)?": "a table",
    r"String should match pattern .*": "holds a character that can't stand there",
}


def _variable_of(detail: dict[str, Any]) -> str | None:
    """The environment variable a problem comes from; None when it comes from the file."""
    location = [part for part in detail["loc"] if part not in ONE_OR_SEVERAL]
    keys = takewhile(lambda part: not isinstance(part, int), location)  # a list comes from one variable as JSON
    variable = ENV_PREFIX + ENV_DELIMITER.join(str(part).upper() for part in keys)
    ours = sorted(name.upper() for name in os.environ)
    if variable in ours:
        return f"environment variable {variable}"
    # A section as a whole is made of file and environment; any other value that has keys below it came from these.
    deeper = [name for name in ours if name.startswith(variable + ENV_DELIMITER)]
    return f"environment variable {deeper[0]}" if deeper and detail["type"] != "value_error" else None


def _suggestion(location: tuple[Any, ...]) -> str:
    model: Any = Config
    for part in location[:-1]:
        if not isinstance(part, int) and part not in ONE_OR_SEVERAL:
            model = _model_of(model, str(part))
    known = sorted(model.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here are {', '.join(known)}"


def _model_of(model: Any, field: str) -> Any:
    annotation = model.model_fields[field].annotation
    return next((arg for arg in getattr(annotation, "__args__", ()) if hasattr(arg, "model_fields")), annotation)


def _setting_name(error: ValueError) -> str:
    named = re.search(r'"([a-z_]+)"', str(error))
    return ENV_PREFIX + named[1].upper() + "…" if named else "a variable"


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:  # its words would repeat a part of the URL, which may hold a password
        raise ValueError("not a URL: host or port can't be read") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_valid:
        raise ValueError("not an http:// or https:// URL")
    if parts.username is not None or parts.password is not None:
        raise ValueError("holds credentials; put the token into api_token_file instead")
    if not url.isprintable() or " " in url:
        raise ValueError("holds a space, a line break or a control character")
    if "{" in url:
        raise ValueError("still holds a {placeholder}; write the region, for instance us or eu")
    if parts.query or parts.fragment:
        raise ValueError("holds a query or a fragment; an ingest endpoint has none")
    if not parts.path.rstrip("/").endswith("/events") or parts.path.endswith("/"):
        raise ValueError(
            "does not end in /events; OpenMeter's paths are /api/v1/events, /api/v3/openmeter/events, "
            "and /v3/openmeter/events on Konnect"
        )
    return url
