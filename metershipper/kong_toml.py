"""Instances of Kong's metering-and-billing plugin as the text of a configuration. Pure; never writes a token.

A value that the input does not hold becomes a table where a plain value belongs: `check` refuses it until it is
replaced, so that nothing is billed by a guess.
"""

import json
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from metershipper.errors import UsageError

# Stand around the name of an environment variable that decK would put there. From Unicode's private use area, so that
# they are plain characters to YAML and JSON, and part of no real value.
MARK_BEFORE, MARK_AFTER = "\ue000", "\ue001"
SETTINGS = frozenset({
    "api_token", "attributes", "ingest_endpoint", "keepalive", "meter_ai_token_usage", "meter_api_requests", "queue",
    "ssl_verify", "subject", "timeout",
})  # fmt: skip
QUEUE_BATCH = ("max_batch_size", "max_coalescing_delay")
DESTINATION = ("ingest_endpoint", "api_token", "ssl_verify")
QUEUE_LIMITS = frozenset({
    "concurrency_limit", "initial_retry_delay", "max_bytes", "max_entries", "max_retry_delay", "max_retry_time",
})  # fmt: skip
SUBJECT_KEYS = ("look_up_value_in", "field")
ATTRIBUTE_KEYS = ("source", "look_up_value_in", "event_property_name")
# What the plugin does where its configuration says nothing (schema of Kong 3.14).
METER_DEFAULTS = {"meter_api_requests": True, "meter_ai_token_usage": True}
DELIVERY_DEFAULTS = {"ssl_verify": True, "timeout": 10_000}
DEFAULT_BATCH_SIZE = 1
MAX_BATCH_EVENTS = 10_000  # what openmeter.batch.max_events allows
LOG_PATH = "/var/log/kong/usage.log"
TOKEN_FILE = "/run/secrets/openmeter-token"
COMMENT_WIDTH = 110
WRONG_TYPE = "a value of the wrong type"
# Where a token comes from, when that can be told without telling a part of the token.
_TOKEN_ORIGIN = re.compile(
    r"\$\w+|\$\{\w+\}|\{vault://[^{}]*\}|(var|local|data|module)\.[\w.\[\]*-]+|key \S+ of Secret \S+"
)
_SHELL_NAME = re.compile(r"\$\w+")


@dataclass(frozen=True, slots=True)
class Reference:
    """A value that is not in the input; `text` says where it comes from."""

    text: str


@dataclass(frozen=True, slots=True)
class Scope:
    """The traffic an instance is for: names or ids; all None is all traffic."""

    service: str | Reference | None = None
    route: str | Reference | None = None
    consumer: str | Reference | None = None
    consumer_group: str | Reference | None = None

    @property
    def parts(self) -> dict[str, str | Reference]:
        """What is set, by the keys of a rule."""
        names = ("service", "route", "consumer", "consumer_group")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def __str__(self) -> str:
        words = [f"{k.replace('_', ' ')} {v.text if isinstance(v, Reference) else v}" for k, v in self.parts.items()]
        return ", ".join(words) or "all traffic"


@dataclass(frozen=True, slots=True)
class PluginInstance:
    """One configured instance of the plugin; `notes` say what of it can't be expressed."""

    scope: Scope
    enabled: bool | Reference
    config: Mapping[str, Any]
    origin: str
    notes: tuple[str, ...] = ()


def resolve(value: Any) -> Any:
    """The value itself, or a `Reference` where it is only a name for one.

    Example: `resolve("$TOKEN")` is `Reference("$TOKEN")`; `resolve("consumer")` is `"consumer"`.
    """
    if not isinstance(value, str):
        return value
    if MARK_BEFORE in value:
        return Reference(value.replace(MARK_BEFORE, "").replace(MARK_AFTER, ""))
    if "${" in value or "{vault://" in value or _SHELL_NAME.fullmatch(value):
        return Reference(value)
    return value


def render(instances: list[PluginInstance], names: Iterable[str], report: Callable[[str], None]) -> str:
    """The configuration that does what these instances do in Kong.

    Args: `names` of the inputs, for the heading; `report` takes a line for each thing that was not imported.
    Raises: UsageError when two instances claim the same scope.
    """
    instances = _distinct(instances)
    page = _Page(report)
    page.comment(f"metershipper configuration, imported from Kong's metering-and-billing plugin in {', '.join(names)}.")
    page.comment("Adjust the path below, set the token, then: metershipper check -c config.toml --connect")
    expressible = [each for each in instances if "consumer_group" not in each.scope.parts]
    general = next((each for each in expressible if not each.scope.parts), None)
    scoped = [each for each in expressible if each.scope.parts]
    ordered = [each for each in (general, *scoped) if each is not None]
    primary = next((each for each in ordered if each.enabled), next(iter(ordered), instances[0]))
    _write_destination(page, primary)
    _write_differences(page, primary, [each for each in ordered if each.enabled])
    _write_batch(page, primary)
    page.line("", "[[inputs.files]]")
    page.comment("Adjust: the log that Kong's file-log plugin writes.")
    page.line(f"path = {_toml(LOG_PATH)}")
    _write_general(page, general)
    for each in instances:
        if "consumer_group" in each.scope.parts:
            page.line("")
            page.warn(
                each,
                f"scoped to {each.scope}: not imported; Kong's logs do not say which consumer group a request was "
                "counted for. Its traffic is metered as if this instance did not exist",
            )
    for each in scoped:
        _write_rule(page, each, [other for other in ordered if other is not each])
    return page.text()


class _Page:
    """Lines of TOML; whatever the user must know is also reported."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._lines: list[str] = []
        self._report = report

    def line(self, *lines: str) -> None:
        self._lines += lines

    def comment(self, text: str) -> None:
        self.line(*textwrap.wrap(_one_line(text), COMMENT_WIDTH, initial_indent="# ", subsequent_indent="# "))

    def warn(self, instance: PluginInstance, text: str) -> None:
        self.comment(f"{text}.")
        self._report(_one_line(f"{instance.origin}: {text}"))

    def key(self, instance: PluginInstance, key: str, value: Any, variable: str = "") -> None:
        """One `key = value`; where the value is not known, how to get on; `variable` can then give it instead."""
        if isinstance(value, Reference):
            instead = f", or set {variable}" if variable else ""
            self.comment(f"{key} is not in the input: it comes from {value.text}. Write its value here{instead}.")
            self._report(_one_line(f"{instance.origin}: {key} comes from {value.text}; write its value"))
        self.line(f"{key} = {_toml(value)}")

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def _distinct(instances: list[PluginInstance]) -> list[PluginInstance]:
    """The instances, each once: a Kong can't have two of one scope."""
    kept: dict[object, PluginInstance] = {}
    for each in instances:
        known = not any(isinstance(part, Reference) for part in each.scope.parts.values())
        first = kept.setdefault(each.scope if known else object(), each)
        if (first.config, first.enabled) != (each.config, each.enabled):
            raise UsageError(
                _one_line(
                    f"{each.origin}: for {each.scope}, as is {first.origin}, but configured differently; import one "
                    "Kong at a time, and together with the files that say which traffic each instance is for"
                )
            )
    return list(kept.values())


def _write_destination(page: _Page, instance: PluginInstance) -> None:
    page.line("", "[openmeter]")
    endpoint = _endpoint(instance.config)
    if endpoint is None:
        page.comment('ingest_endpoint = "https://us.api.konghq.com/v3/openmeter/events"')
        page.warn(instance, "ingest_endpoint is missing in the input")
    else:
        page.key(instance, "ingest_endpoint", endpoint, "METERSHIPPER_OPENMETER__INGEST_ENDPOINT")
    origin = resolve(instance.config.get("api_token"))
    told = isinstance(origin, Reference) and _TOKEN_ORIGIN.fullmatch(origin.text)
    source = f"its value in Kong, {origin.text}" if told else "its value in Kong"
    page.comment(f"The token is not copied. Set METERSHIPPER_OPENMETER__API_TOKEN to {source}, or name a file with it:")
    page.comment(f"api_token_file = {_toml(TOKEN_FILE)}")
    delivery = DELIVERY_DEFAULTS | _given(instance.config)
    page.key(instance, "timeout_seconds", _seconds(resolve(delivery["timeout"])))
    page.key(instance, "ssl_verify", resolve(delivery["ssl_verify"]))


def _write_batch(page: _Page, instance: PluginInstance) -> None:
    queue = _given(_table(instance.config.get("queue")))
    limits = sorted(QUEUE_LIMITS & queue.keys())
    if limits:
        page.comment(
            f"Not needed: queue.{', queue.'.join(limits)}. The log is the buffer, not memory, and retries never give "
            "up; [openmeter.retry] says how long they wait."
        )
    if "keepalive" in _given(instance.config):
        page.comment("Not needed: keepalive. Connections are kept open as long as they are of use.")
    size, delay = resolve(queue.get("max_batch_size")), resolve(queue.get("max_coalescing_delay"))
    if size == DEFAULT_BATCH_SIZE:
        page.comment(
            "queue.max_batch_size = 1 is Kong's default: left at 500 events, the same usage in fewer requests."
        )
        size = None
    if size is None and delay is None:
        return
    page.line("", "[openmeter.batch]")
    if isinstance(size, int) and size > MAX_BATCH_EVENTS:
        page.comment(f"queue.max_batch_size is {size} in Kong; {MAX_BATCH_EVENTS} is the most here.")
        size = MAX_BATCH_EVENTS
    if size is not None:
        page.key(instance, "max_events", size)
    if delay is not None:
        page.key(instance, "max_wait_seconds", max(delay, 0.001) if _is_number(delay) else delay)


def _write_differences(page: _Page, primary: PluginInstance, instances: list[PluginInstance]) -> None:
    """Say what of the other instances' destinations is lost: there is one."""
    expected = DELIVERY_DEFAULTS | _given(primary.config)
    for each in instances:
        own = DELIVERY_DEFAULTS | _given(each.config)
        different = [key for key in DESTINATION if own.get(key) != expected.get(key)]
        if different:
            page.warn(
                each,
                f"{', '.join(different)} of the instance for {each.scope} differ from those of {primary.origin}: "
                "metershipper has one destination, and sends all usage there. For a second one, run a second "
                "metershipper with its own configuration and state directory",
            )


def _write_general(page: _Page, general: PluginInstance | None) -> None:
    page.line("", "[metering]")
    if general is None:
        page.comment("No instance of the plugin is for all traffic: what no rule names is not metered.")
        page.line("enabled = false")
        return
    page.comment(f"From {general.origin}.")
    _write_settings(page, general, "metering")


def _write_rule(page: _Page, instance: PluginInstance, others: list[PluginInstance]) -> None:
    page.line("")
    if instance.enabled is False and any(other.enabled for other in others):
        # Kong passes over a disabled instance: the next wider one meters (kong/runloop/plugins_iterator.lua).
        page.warn(
            instance,
            f"disabled for {instance.scope}: no rule is written, because Kong meters such traffic by the next wider "
            "instance. To leave it unmetered here, add a rule for it with enabled = false",
        )
        return
    page.comment(f"From {instance.origin}.")
    page.line("[[metering.rules]]")
    for key, value in instance.scope.parts.items():
        page.key(instance, key, value)
    _write_settings(page, instance, "metering.rules")


def _write_settings(page: _Page, instance: PluginInstance, table: str) -> None:
    """The keys of [metering] or of a rule, all of them: what Kong's defaults fill in is written out."""
    for note in (*instance.notes, *(f"not imported: {key}" for key in _unknown_keys(instance.config))):
        page.warn(instance, note)
    given = METER_DEFAULTS | _given(instance.config)
    settings = {key: resolve(given[key]) for key in METER_DEFAULTS}
    enabled = instance.enabled
    if enabled is True and all(value is False for value in settings.values()):
        page.comment("Neither API requests nor AI tokens are metered by this instance.")
        enabled = False
    if enabled is not True:
        page.key(instance, "enabled", enabled)
    for key, value in settings.items():
        page.key(instance, key, value)
    page.comment("Kong drops the usage of requests that name nobody to bill.")
    page.line('on_missing_subject = "skip"')
    subject, attributes = resolve(given.get("subject")), resolve(given.get("attributes"))
    subject, attributes = _of_kind(subject, Mapping), _of_kind(attributes, list) or []
    if isinstance(subject, Reference):
        page.key(instance, "subject", subject)
    if isinstance(attributes, Reference) or not attributes:
        page.key(instance, "attributes", attributes)
        attributes = []
    if not isinstance(subject, Reference):
        _write_subject(page, instance, _table(subject), table)
    for attribute in attributes:
        page.line("", f"[[{table}.attributes]]")
        for key in ATTRIBUTE_KEYS:
            if (value := _table(attribute).get(key)) is not None:
                page.key(instance, key, resolve(value))


def _write_subject(page: _Page, instance: PluginInstance, subject: Mapping[str, Any], table: str) -> None:
    page.line("", f"[{table}.subject]")
    where = resolve(_given(subject).get("look_up_value_in", "consumer"))
    page.key(instance, "look_up_value_in", where)
    if where == "application":
        return  # there is one way to name an application; a field has no meaning
    if (field := _given(subject).get("field")) is not None:
        variable = "METERSHIPPER_METERING__SUBJECT__FIELD" if table == "metering" else ""
        page.key(instance, "field", resolve(field), variable)


def _unknown_keys(config: Mapping[str, Any]) -> list[str]:
    unknown = [str(key) for key in config if key not in SETTINGS]
    known = QUEUE_LIMITS.union(QUEUE_BATCH)
    unknown += ["queue"] if not isinstance(config.get("queue") or {}, Mapping) else []
    unknown += [f"queue.{key}" for key in _table(config.get("queue")) if key not in known]
    unknown += [f"subject.{key}" for key in _table(config.get("subject")) if key not in SUBJECT_KEYS]
    attributes = config.get("attributes")
    for attribute in attributes if isinstance(attributes, list) else []:
        unknown += [f"attributes.{key}" for key in _table(attribute) if key not in ATTRIBUTE_KEYS]
    return sorted(set(unknown))


def _endpoint(config: Mapping[str, Any]) -> Any:
    value = resolve(config.get("ingest_endpoint"))
    text = value.text if isinstance(value, Reference) else value
    if isinstance(text, str) and re.search(r"@|\?", text):  # what may be a password is not shown
        return Reference("a URL with credentials or a query, which has to be written without them")
    return value


def _seconds(milliseconds: Any) -> Any:
    return milliseconds / 1000 if _is_number(milliseconds) else milliseconds


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _given(table: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are set: the Admin API writes null for those that are not."""
    return {key: value for key, value in table.items() if value is not None}


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _of_kind(value: Any, kind: type) -> Any:
    """The value if it is of this kind, unknown or not set; else a `Reference` that says that it is neither."""
    return value if value is None or isinstance(value, (kind, Reference)) else Reference(WRONG_TYPE)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _quoted(value)
    if value == []:
        return "[]"
    return f"{{ replace = {_quoted(value.text if isinstance(value, Reference) else WRONG_TYPE)} }}"


def _quoted(text: str) -> str:
    """A basic string: JSON's escapes are TOML's, but for DEL; a lone surrogate can't be written at all."""
    valid = text.encode("utf-8", "replace").decode()
    return json.dumps(valid, ensure_ascii=False).replace("\x7f", "\\u007f")


def _one_line(text: str) -> str:
    """Text for a comment or a message: whatever could end the line is a space."""
    return "".join(char if char.isprintable() else " " for char in text)
