"""What people have for Kong's metering-and-billing plugin: decK, Admin API, Konnect, Kubernetes or Terraform.

Reads text and finds the plugin's instances in it; `kong_toml` writes the configuration. Which form a file has is told
by what it holds. Never shows a value it read, but for names.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from metershipper.errors import UsageError
from metershipper.kong_toml import MARK_AFTER, MARK_BEFORE, PluginInstance, Reference, Scope, render, resolve

PLUGIN = "metering-and-billing"
TERRAFORM_PREFIX = "konnect_gateway_plugin_"
TERRAFORM_TYPE = TERRAFORM_PREFIX + PLUGIN.replace("-", "_")
# The settings that decide what is billed to whom: none of them may be guessed.
DECISIVE_SETTINGS = ("ingest_endpoint", "meter_api_requests", "meter_ai_token_usage", "subject", "attributes")
PROTOCOLS = frozenset({"grpc", "grpcs", "http", "https"})
# Parts of an instance beside its configuration that narrow what it does, or say it elsewhere.
INEXPRESSIBLE = {
    "condition": "not imported: condition; everything in the scope is metered, whether the expression holds or not",
    "partials": "not imported: partials; what they configure is not in the input",
    "consumerRef": "not imported: consumerRef; annotate the KongConsumer instead",
    "count": "not imported: count; imported as one instance",
    "for_each": "not imported: for_each; imported as one instance, repeat it for each of them",
}
UNKNOWN_FORM = "neither a decK file, nor plugin objects, Kubernetes resources or Terraform"
_TEMPLATE = re.compile(r"\$\{\{(.*?)\}\}")
_TEMPLATE_VARIABLE = re.compile(r"""\s*env\s+\\?["'`](\w+)\\?["'`].*""")
_HCL = re.compile(r"^\s*(resource|terraform|provider|variable|locals|module|data|output|import)\b[^:\n]*\{", re.M)
_HCL_EXPRESSION = re.compile(r"(?<!\$)\$\{|(?<!%)%\{")
_DECK_LISTS = ("services", "routes", "consumers", "consumer_groups", "plugins")
_PLUGIN_KINDS = ("KongPlugin", "KongClusterPlugin")
_ANNOTATION = "konghq.com/plugins"

Found = tuple[str, PluginInstance]  # the name of a plugin of any kind, and its instance


@dataclass(frozen=True, slots=True)
class Document:
    """One parsed document, and the name of the input it is from."""

    origin: str
    value: Any
    is_terraform: bool = False


def import_kong(paths: tuple[str, ...], report: Callable[[str], None]) -> str:
    """The text of a configuration that meters as Kong's plugin does in these files; `-` is stdin.

    Args: `report` takes one line for each thing that could not be imported.
    Raises: UsageError with one line: a file that can't be read or parsed, or no instance of the plugin at all.
    """
    try:
        documents = [document for path in dict.fromkeys(paths) for document in parse(_read(path), _name_of(path))]
        names = dict.fromkeys(each.origin for each in documents)
        return render(find_instances(documents, report), names, report)
    except RecursionError:
        raise UsageError(f"{', '.join(map(_name_of, paths))}: nested too deeply") from None


def parse(text: str, origin: str) -> list[Document]:
    """The documents in a text of any form. Raises UsageError that names file and line."""
    text = _TEMPLATE.sub(_marked, text.removeprefix("\ufeff"))
    if text.lstrip().startswith(("{", "[")):
        return [Document(origin, _parse_json(text, origin))]
    if _HCL.search(text) and not re.search(r"^(_format_version|apiVersion)\s*:", text, re.M):
        return [Document(origin, _parse_hcl(text, origin), is_terraform=True)]
    return [Document(origin, value) for value in _parse_yaml(text, origin) if value is not None]


def find_instances(documents: list[Document], report: Callable[[str], None]) -> list[PluginInstance]:
    """The instances of the metering-and-billing plugin. Raises UsageError, which says what else was found, for none."""
    found: list[Found] = []
    seen: dict[str, list[str]] = {}
    resources: list[_Resource] = []
    for document in documents:
        form, plugins = _read_document(document, resources)
        found += plugins
        seen.setdefault(document.origin, []).extend([form, *(f"plugin {name}" for name, _ in plugins)])
    instances = [instance for name, instance in [*found, *_kubernetes_plugins(resources)] if name == PLUGIN]
    if not instances:
        what = "; ".join(f"{origin} ({', '.join(dict.fromkeys(words))})" for origin, words in seen.items())
        raise UsageError(f"no {PLUGIN} plugin in {_printable(what) or 'an empty input'}")
    for origin, words in seen.items():
        if UNKNOWN_FORM in words:
            report(f"{origin}: not imported: a document that is {UNKNOWN_FORM}")
    return instances


def _read_document(document: Document, resources: "list[_Resource]") -> tuple[str, list[Found]]:
    """What form a document has, and its plugins; Kubernetes resources are kept for later: one refers to another."""
    value = document.value
    if document.is_terraform:
        return "Terraform", list(_terraform_plugins(value, document.origin))
    if isinstance(value, Mapping) and "apiVersion" in value and "kind" in value:
        found = [_Resource(document.origin, each) for each in _unlisted(value)]
        resources += found
        plugins = [f"plugin {each.value.get('plugin')}" for each in found if each.kind in _PLUGIN_KINDS]
        return ", ".join(["Kubernetes", *sorted({each.kind for each in found}), *plugins]), []
    if isinstance(value, Mapping) and ("_format_version" in value or any(key in value for key in _DECK_LISTS)):
        return "decK file", list(_deck_plugins(value, document.origin))
    objects = list(_api_plugins(value, document.origin))
    return ("plugin objects" if objects else UNKNOWN_FORM), objects


# --- texts


def _name_of(path: str) -> str:
    return "stdin" if path == "-" else _printable(path)


def _read(path: str) -> str:
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{_name_of(path)}: line {data[: error.start].count(10) + 1}: not UTF-8 text") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise UsageError(f"{_name_of(path)}: can't be read: {getattr(error, 'strerror', None) or error}") from None


def _marked(template: re.Match[str]) -> str:
    """What decK fills in when it runs, as text that YAML and JSON take for a plain value."""
    variable = _TEMPLATE_VARIABLE.fullmatch(template[1])
    words = f"${variable[1]}" if variable else re.sub(r"[^\w $.|-]+", " ", template[1]).strip()
    return f"{MARK_BEFORE}{words}{MARK_AFTER}"


def _parse_json(text: str, origin: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{origin}: line {error.lineno}: not valid JSON: {error.msg}") from None
    except ValueError:  # a number of thousands of digits
        raise UsageError(f"{origin}: not valid JSON: a number is too long") from None


def _parse_yaml(text: str, origin: str) -> list[Any]:
    try:
        return list(yaml.safe_load_all(text))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{origin}: line {line}: not valid YAML: {_printable(str(error.problem))}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UsageError(f"{origin}: line {line}: not valid YAML: a control character") from None
    except (yaml.YAMLError, ValueError, OverflowError):  # a date or a number that can't be one
        raise UsageError(f"{origin}: not valid YAML: a date or number is out of range") from None


def _parse_hcl(text: str, origin: str) -> Any:
    import hcl2
    from lark.exceptions import UnexpectedInput

    options = hcl2.SerializationOptions(with_comments=False, explicit_blocks=False, preserve_heredocs=False)
    try:
        return _from_hcl(hcl2.loads(text, serialization_options=options))
    except UnexpectedInput as error:
        line = error.line if error.line > 0 else text.count("\n") + 1
        raise UsageError(f"{origin}: line {line}: not valid Terraform (HCL)") from None
    except RecursionError:
        raise
    except Exception as error:  # its own defects: some valid expressions end in a TypeError
        raise UsageError(f"{origin}: python-hcl2 can't read this Terraform ({type(error).__name__})") from None


def _from_hcl(value: Any) -> Any:
    """Values as the other forms have them; expressions, which only Terraform can compute, as references."""
    if isinstance(value, Mapping):
        return {str(key).strip('"'): _from_hcl(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_from_hcl(each) for each in value]
    if not isinstance(value, str):
        return value
    if not (len(value) >= 2 and value[0] == value[-1] == '"'):
        return Reference(value.removeprefix("${").removesuffix("}") if value.startswith("${") else value)
    if _HCL_EXPRESSION.search(value):
        return Reference(value[1:-1])
    try:
        return json.loads(value.replace("$${", "${").replace("%%{", "%{"), strict=False)
    except ValueError:  # an escape that only HCL has
        return Reference(value[1:-1])


# --- decK, Admin API, Konnect API: plugin objects, alone or within the entity they are for


def _deck_plugins(file: Mapping[str, Any], origin: str) -> Iterator[Found]:
    shared = file.get("_plugin_configs")
    workspace = file.get("_workspace")
    note = (f"only for the workspace {workspace} in Kong; metered in all of them here",) if workspace else ()

    def of(entity: Mapping[str, Any], scope: Scope, path: str) -> Iterator[Found]:
        for index, plugin in _numbered(entity.get("plugins")):
            yield _plugin(plugin, scope, f"{origin}: {path}plugins[{index}]", shared, note)

    yield from of(file, Scope(), "")
    for index, service in _numbered(file.get("services")):
        path = f"services[{index}]."
        yield from of(service, Scope(service=_reference(service, "service")), path)
        for number, route in _numbered(service.get("routes")):
            yield from of(route, Scope(route=_reference(route, "route")), f"{path}routes[{number}].")
    for index, route in _numbered(file.get("routes")):
        yield from of(route, Scope(route=_reference(route, "route")), f"routes[{index}].")
    for index, consumer in _numbered(file.get("consumers")):
        yield from of(consumer, Scope(consumer=_reference(consumer, "consumer")), f"consumers[{index}].")
    for index, group in _numbered(file.get("consumer_groups")):
        scope = Scope(consumer_group=_reference(group, "consumer group"))
        yield from of(group, scope, f"consumer_groups[{index}].")


def _api_plugins(body: Any, origin: str, path: str = "") -> Iterator[Found]:
    """One plugin object, a list of them, or either in an envelope."""
    if isinstance(body, list):
        for index, each in _numbered(body):
            yield from _api_plugins(each, origin, f"{path}[{index}]")
    elif isinstance(body, Mapping):
        if isinstance(body.get("name"), str):
            yield _plugin(body, Scope(), f"{origin}: {path.lstrip('.')}" if path else origin)
            return
        for key in ("data", "items", "item", "plugin"):
            if key in body:
                yield from _api_plugins(body[key], origin, f"{path}.{key}")


def _plugin(
    plugin: Mapping[str, Any], scope: Scope, origin: str, shared: Any = None, notes: tuple[str, ...] = ()
) -> Found:
    """A plugin object within `scope`, which its own references narrow."""
    config = resolve(plugin.get("config"))
    defaults = _mapping(_mapping(shared).get(str(plugin.get("_config"))))
    if defaults and not isinstance(config, Reference):
        config = {**defaults, **_mapping(config)}
    return _found(plugin.get("name"), plugin, _narrowed(scope, plugin), config, origin, notes)


def _found(
    name: Any, plugin: Mapping[str, Any], scope: Scope, config: Any, origin: str, notes: Iterable[str] = ()
) -> Found:
    enabled = resolve(plugin.get("enabled"))
    if not isinstance(enabled, bool | Reference | None):
        enabled = Reference("a value that is neither true nor false")
    if isinstance(config, Reference):
        config = dict.fromkeys(DECISIVE_SETTINGS, config)
    told = [text for key, text in INEXPRESSIBLE.items() if plugin.get(key) not in (None, [], "")]
    protocols = plugin.get("protocols")
    if isinstance(protocols, list) and protocols and not PROTOCOLS.issubset(map(str, protocols)):
        told.append("not imported: protocols; requests of all protocols are metered")
    enabled = True if enabled is None else enabled
    return str(name), PluginInstance(scope, enabled, _mapping(config), _printable(origin), (*notes, *told))


def _narrowed(scope: Scope, plugin: Mapping[str, Any]) -> Scope:
    own = {key: _reference(plugin.get(key), key) for key in ("service", "route", "consumer", "consumer_group")}
    return Scope(**{**scope.parts, **{key: value for key, value in own.items() if value is not None}})


def _reference(entity: Any, kind: str) -> str | Reference | None:
    """The name or id of an entity, from the entity or from a reference to it; None when there is none."""
    if isinstance(entity, Mapping):
        keys = ("name", "username", "id")
        entity = next((entity[key] for key in keys if entity.get(key) is not None), Reference(f"the name of a {kind}"))
    if entity is None or isinstance(entity, Reference):
        return entity
    if isinstance(entity, str | int) and not isinstance(entity, bool):
        resolved = resolve(str(entity))
        return resolved if isinstance(resolved, Reference) else str(entity)
    return Reference(f"the name of a {kind}")


# --- Kubernetes: plugins are resources, which others name in an annotation or a filter


@dataclass(frozen=True, slots=True)
class _Resource:
    origin: str
    value: Mapping[str, Any] = field(repr=False)

    @property
    def kind(self) -> str:
        return str(self.value.get("kind"))

    @property
    def name(self) -> str:
        return str(_mapping(self.value.get("metadata")).get("name"))

    @property
    def namespace(self) -> str | None:
        namespace = _mapping(self.value.get("metadata")).get("namespace")
        return None if namespace is None or self.kind == "KongClusterPlugin" else str(namespace)

    @property
    def label(self) -> str:
        """The resource in words: `Service default/billing`."""
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"

    @property
    def plugin_names(self) -> set[str]:
        """The plugins it names, each `name` or `namespace:name`."""
        annotation = _mapping(_mapping(self.value.get("metadata")).get("annotations")).get(_ANNOTATION)
        names = {name.strip() for name in str(annotation or "").split(",")}
        for _, rule in _numbered(_mapping(self.value.get("spec")).get("rules")):
            for _, each in _numbered(rule.get("filters")):
                extension = _mapping(each.get("extensionRef"))
                if extension.get("kind") in _PLUGIN_KINDS:
                    names.add(str(extension.get("name")))
        return names - {""}

    def uses(self, plugin: "_Resource") -> bool:
        same = None in (self.namespace, plugin.namespace) or self.namespace == plugin.namespace
        return (same and plugin.name in self.plugin_names) or f"{plugin.namespace}:{plugin.name}" in self.plugin_names


def _unlisted(value: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The resources in what `kubectl get` prints: one, or a List of them."""
    if str(value.get("kind")).endswith("List") and isinstance(value.get("items"), list):
        return [each for _, each in _numbered(value["items"])]
    return [value]


def _kubernetes_plugins(resources: list[_Resource]) -> Iterator[Found]:
    for plugin in (each for each in resources if each.kind in _PLUGIN_KINDS):
        users = [each for each in resources if each.kind not in _PLUGIN_KINDS and each.uses(plugin)]
        labels = _mapping(_mapping(plugin.value.get("metadata")).get("labels"))
        is_global = plugin.kind == "KongClusterPlugin" and str(labels.get("global")).lower() == "true"
        scopes = list(_scopes(users))
        notes: list[str] = []
        if not scopes and not is_global:
            notes.append(f"nothing in the input names {plugin.label}, so it is taken to be for all traffic")
        for scope in ([Scope()] if is_global or not scopes else []) + scopes:
            yield _kubernetes_plugin(plugin, scope, notes)


def _kubernetes_plugin(plugin: _Resource, scope: Scope, notes: list[str]) -> Found:
    value = plugin.value
    config, secret = value.get("config"), _secret(value.get("configFrom"))
    notes = [*notes, f"not imported: configFrom ({secret.text})"] if secret else notes
    for _, patch in _numbered(value.get("configPatches")):
        source = _secret(patch.get("valueFrom")) or Reference("a Secret")
        config = _patched(_mapping(config), str(patch.get("path")).strip("/").split("/"), source)
    disabled = resolve(value.get("disabled"))
    enabled = disabled if isinstance(disabled, Reference) else disabled is not True
    settings = {**value, "enabled": enabled}
    return _found(value.get("plugin"), settings, scope, secret or config, f"{plugin.origin}: {plugin.label}", notes)


def _scopes(users: list[_Resource]) -> Iterator[Scope]:
    """What a plugin is for when these resources name it: with consumers, only for them on the others' traffic.

    Source: ForeignRelations.GetCombinations of Kong's ingress controller.
    """
    traffic = [{key: name} for key, name in map(_kong_name, users) if key in ("service", "route")]
    people = [{key: name} for key, name in map(_kong_name, users) if key == "consumer"]
    groups = [{key: name} for key, name in map(_kong_name, users) if key == "consumer_group"]
    for who in people or groups:
        for what in traffic or [{}]:
            yield Scope(**who, **what)
    if not people and not groups:
        yield from (Scope(**what) for what in traffic)


def _kong_name(resource: _Resource) -> tuple[str, str | Reference]:
    """Which entity of Kong a resource is, and its name there, as far as the resource tells."""
    namespace = resource.namespace or "default"
    if resource.kind == "KongConsumer":
        return "consumer", _reference(resource.value.get("username"), "consumer") or Reference(resource.label)
    if resource.kind == "KongConsumerGroup":
        return "consumer_group", resource.name
    example = f"{namespace}.{resource.name}.80"
    if resource.kind == "Service":
        return "service", Reference(f"Kong's name of {resource.label}, such as {example} (Admin API: /services)")
    return "route", Reference(f"Kong's names of the routes of {resource.label} (Admin API: /routes)")


def _secret(source: Any) -> Reference | None:
    reference = _mapping(_mapping(source).get("secretKeyRef"))
    if not source:
        return None
    return Reference(f"key {reference.get('key')} of Secret {reference.get('name')}")


def _patched(config: Mapping[str, Any], path: list[str], value: Reference) -> dict[str, Any]:
    """The configuration with one value, at the path of a JSON patch, replaced."""
    key, rest = path[0], path[1:]
    inner = config.get(key)
    if rest and not isinstance(inner, Mapping | None):
        return {**config, key: value}  # within a list: all of it is unknown
    return {**config, key: _patched(_mapping(inner), rest, value) if rest else value}


# --- Terraform


def _terraform_plugins(module: Mapping[str, Any], origin: str) -> Iterator[Found]:
    for _, block in _numbered(module.get("resource")):
        for kind, resources in block.items():
            if not kind.startswith(TERRAFORM_PREFIX):
                continue
            for name, body in _mapping(resources).items():
                plugin = {key: _only(value) for key, value in _mapping(body).items()}
                label = PLUGIN if kind == TERRAFORM_TYPE else kind
                yield _found(
                    label, plugin, _narrowed(Scope(), plugin), plugin.get("config"), f"{origin}: {kind}.{name}"
                )


def _only(value: Any) -> Any:
    """The table of a block that stands once; in HCL `config { }` is a list of one, `config = { }` a table."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping) else value


# --- small helps


def _numbered(value: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The tables of a list with their places; nothing when it is not a list."""
    for index, each in enumerate(value if isinstance(value, list) else []):
        if isinstance(each, Mapping):
            yield index, each


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)
