"""The `[metering]` section: what is metered, for whom, by which rules. Checked here; compiled in `readers`, `rules`.

The names are those of Kong's metering-and-billing plugin (Kong 3.14), and scoped rules take precedence as plugins do.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

# Kong logs these two headers as "REDACTED" (kong/pdk/log.lua, all versions from 2.1).
REDACTED_HEADERS = frozenset({"authorization", "proxy-authorization"})
# The `data` properties of the two usage events, in the order in which the mapper fills them; an attribute may not
# take the place of one of them.
API_FIELDS = (
    "request_method", "request_host", "request_size_bytes", "response_http_status", "response_size_bytes",
    "upstream_status", "route_id", "route_name", "service_id", "service_name", "service_port", "service_protocol",
    "subject_type", "client_ip", "request_uri", "request_user_agent",
)  # fmt: skip
LLM_FIELDS = (
    "tokens", "type", "model", "request_model", "response_model", "provider", "ai_plugin_id", "ai_plugin_name",
    "api_request_id", "cache_status", "http_status", "route_id", "route_name", "service_id", "service_name",
    "subject_type",
)  # fmt: skip
# Details of a token count, from Kong 3.11: their names in the entry are their names in `data`.
DETAIL_FIELDS = (
    "cached_tokens", "reasoning_tokens", "audio_tokens", "image_tokens", "text_tokens",
    "accepted_prediction_tokens", "rejected_prediction_tokens",
)  # fmt: skip
MCP_FIELDS = (
    "tool_name", "method", "latency_ms", "error", "api_request_id", "http_status", "route_id", "route_name",
    "service_id", "service_name", "subject_type",
)  # fmt: skip
BUILT_IN = frozenset(API_FIELDS + LLM_FIELDS + DETAIL_FIELDS + MCP_FIELDS)
# How pydantic names the two forms of `subject` in the place of an error.
ONE_OR_SEVERAL = ("one", "several")


class Section(BaseModel):
    """A table of the configuration: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _checked_name(name: str) -> str:
    if not name.isprintable() or set(name) & {'"', "\\"}:
        raise ValueError(f"{name!r} can't be the name of a header or a query parameter")
    return name


def _refuse_redacted(header: str) -> None:
    if header.lower() in REDACTED_HEADERS:
        raise ValueError(f'Kong logs the header {header!r} as "REDACTED" for every request; choose another')


class Subject(Section):
    """Who is billed. Without `field` a consumer is `consumer:<id>`, as Kong's own plugin names it."""

    look_up_value_in: Literal["consumer", "application", "header", "query"] = "consumer"
    field: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _checked_field(self) -> "Subject":
        where, field = self.look_up_value_in, self.field
        if where == "consumer" and field not in (None, "username", "custom_id", "id"):
            raise ValueError(
                f"field {field!r} is not known for a consumer; use username, custom_id or id, or leave it out"
            )
        if where == "application" and field is not None:
            raise ValueError("field has no meaning with look_up_value_in = 'application'; remove it")
        if where in ("header", "query") and field is None:
            raise ValueError(f"field is missing: the name of the {where} to look in")
        if where in ("header", "query"):
            _checked_name(str(field))
        if where == "header":
            _refuse_redacted(str(field))
        return self


class Attribute(Section):
    """An extra dimension: a header or query parameter of the request as a property of `data`."""

    source: Literal["header", "query"]
    look_up_value_in: str = Field(min_length=1)
    event_property_name: str = Field(min_length=1, pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")

    @model_validator(mode="after")
    def _checked_names(self) -> "Attribute":
        _checked_name(self.look_up_value_in)
        if self.source == "header":
            _refuse_redacted(self.look_up_value_in)
        if self.event_property_name in BUILT_IN:
            raise ValueError(f"event_property_name {self.event_property_name!r} is a built-in property; choose another")
        return self


def _form(value: Any) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


Subjects = Annotated[
    Annotated[Subject, Tag("one")] | Annotated[tuple[Subject, ...], Field(min_length=1), Tag("several")],
    Discriminator(_form),
]


class MeteringSettings(Section):
    """What may differ from scope to scope. The filters come last: what they keep out is counted, and not metered."""

    enabled: bool = True
    meter_api_requests: bool = True
    meter_ai_token_usage: bool = True
    meter_mcp_tool_calls: bool = False
    on_missing_subject: Literal["skip", "dead_letter"] = "skip"
    emit_zero_tokens: bool = False
    meter_failed_ai_calls: bool = False
    token_details: bool = False
    split_cached_input: bool = False
    personal_fields: frozenset[Literal["client_ip", "request_uri", "request_user_agent"]] = frozenset()
    subject: Subjects = Subject()
    attributes: tuple[Attribute, ...] = ()
    methods: tuple[str, ...] = ()
    statuses: tuple[int | str, ...] = ()
    paths: tuple[str, ...] = ()
    workspaces: tuple[str, ...] = ()

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """Where to look for who is billed, in order: the first hit wins."""
        return self.subject if isinstance(self.subject, tuple) else (self.subject,)

    @field_validator("statuses")
    @classmethod
    def _checked_statuses(cls, statuses: tuple[int | str, ...]) -> tuple[int | str, ...]:
        for status in statuses:
            status_range(status)
        return statuses

    @field_validator("paths")
    @classmethod
    def _checked_paths(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            path_pattern(path)
        return paths

    @model_validator(mode="after")
    def _checked_settings(self) -> "MeteringSettings":
        names = [attribute.event_property_name for attribute in self.attributes]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"two attributes are named {repeated[0]!r}")
        return self

    def refuse_nothing(self) -> None:
        """Raise ValueError when these settings are on and meter nothing."""
        if self.enabled and not (self.meter_api_requests or self.meter_ai_token_usage or self.meter_mcp_tool_calls):
            raise ValueError(
                "nothing would be metered: set meter_api_requests or meter_ai_token_usage to true, or enabled to false"
            )


class Rule(MeteringSettings):
    """Settings for a scope: what is not set here is as in `[metering]`. Names or ids."""

    service: str | None = Field(None, min_length=1)
    route: str | None = Field(None, min_length=1)
    consumer: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _checked_scope(self) -> "Rule":
        if self.service is None and self.route is None and self.consumer is None:
            raise ValueError("no scope: set service, route or consumer; what holds for all belongs into [metering]")
        return self

    def over(self, base: MeteringSettings) -> MeteringSettings:
        """These settings, and those of `base` where they are not set."""
        own = self.model_fields_set | {"enabled"}  # a rule is on unless it says otherwise, also where [metering] is off
        values = {name: getattr(self if name in own else base, name) for name in MeteringSettings.model_fields}
        return MeteringSettings.model_construct(**values)


class Metering(MeteringSettings):
    """What is metered and how, where no rule says otherwise."""

    # A URI reference that every parser takes; what looks like host:port is not one.
    source: str = Field(
        "kong", min_length=1, pattern=r"^([A-Za-z][A-Za-z0-9+.-]*:)?([A-Za-z0-9._~/@?#&=+-]|%[0-9A-Fa-f]{2})+$"
    )
    rules: tuple[Rule, ...] = ()

    @model_validator(mode="after")
    def _checked_as_a_whole(self) -> "Metering":
        self.refuse_nothing()
        for number, rule in enumerate(self.rules):
            try:
                rule.over(self).refuse_nothing()
            except ValueError as error:
                raise ValueError(f"rules.{number}: {error}") from None
        return self


def status_range(status: int | str) -> tuple[int, int]:
    """The first and last status that a filter like 429, "429", "2xx" or "200-399" lets pass. Raises ValueError."""
    text = str(status)
    if found := re.fullmatch(r"([1-5])xx", text):
        return int(found[1]) * 100, int(found[1]) * 100 + 99
    if found := re.fullmatch(r"([1-5]\d\d)(?:-([1-5]\d\d))?", text):
        first, last = int(found[1]), int(found[2] or found[1])
        if first <= last:
            return first, last
    raise ValueError(f'{status!r} is no status; write 429, "2xx" or "200-399"')


def path_pattern(path: str) -> re.Pattern[str]:
    """What a path must begin with: a prefix, or a regular expression after `~`, as in Kong. Raises ValueError."""
    if path.startswith("~"):
        try:
            return re.compile(path[1:])
        except re.error as error:
            raise ValueError(f"{path!r} is no regular expression: {error}") from None
    if not path.startswith("/"):
        raise ValueError(f"{path!r} is no path; a prefix begins with /, a regular expression with ~")
    return re.compile(re.escape(path))
