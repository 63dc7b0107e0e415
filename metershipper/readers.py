"""Settings compiled into functions of an entry: who is billed, and by which attributes. Pure."""

import unicodedata
from collections.abc import Callable
from math import isfinite
from operator import attrgetter
from typing import Any, TypeAlias

from metershipper.books import Dead
from metershipper.entry import Entry, format_number
from metershipper.metering import Attribute, Subject
from metershipper.pieces import Unbillable

MAX_SUBJECT_BYTES = 1024
PERSONAL_FIELDS = ("client_ip", "request_uri", "request_user_agent")

AnyEntry: TypeAlias = Entry[Any, Any, Any]


def first_value(value: Any) -> str | None:
    """The first value of a header or query parameter as text; None when absent, empty or without a value (`?beta`)."""
    if isinstance(value, list):
        value = value[0] if value else None
    if type(value) is str:
        return value or None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not isfinite(value):
        return None
    return format_number(value)


def _checked_subject(subject: str | None) -> str | None:
    """Raises `Unbillable` for what no customer is called: over 1 KiB, or with control characters."""
    if subject is None or (len(subject) < MAX_SUBJECT_BYTES // 4 and subject.isprintable()):
        return subject
    if len(subject.encode("utf-8", "replace")) > MAX_SUBJECT_BYTES:
        raise Unbillable(Dead.BAD_SUBJECT, f"the subject is longer than {MAX_SUBJECT_BYTES} bytes")
    if any(_steers(character) for character in subject):
        raise Unbillable(Dead.BAD_SUBJECT, "the subject holds control characters")
    return subject


def _steers(character: str) -> bool:
    """Control characters, and what turns the direction of text: nobody is called that."""
    return unicodedata.category(character) == "Cc" or character in _BIDI


_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def value_reader(section: str, attribute: str) -> Callable[[AnyEntry], str | None]:
    """How to read one header or query parameter: its field `attribute` in that `section` of the request."""
    read_section, read_value = attrgetter(f"request.{section}"), attrgetter(attribute)

    def read(entry: AnyEntry) -> str | None:
        values = read_section(entry)
        return None if values is None else first_value(read_value(values))

    return read


def subject_reader(
    subjects: tuple[Subject, ...], headers: dict[str, str], query: dict[str, str]
) -> Callable[[AnyEntry], tuple[str, str] | None]:
    """How to find who is billed and where that stood; None when there is nobody where the rules look."""
    readers = [(_one_subject_reader(subject, headers, query), subject.look_up_value_in) for subject in subjects]

    def read(entry: AnyEntry) -> tuple[str, str] | None:
        for read_one, kind in readers:
            subject = _checked_subject(read_one(entry))
            if subject is not None:
                return subject, kind
        return None

    return read


def _one_subject_reader(
    subject: Subject, headers: dict[str, str], query: dict[str, str]
) -> Callable[[AnyEntry], str | None]:
    match subject.look_up_value_in:
        case "header":
            return value_reader("headers", headers[str(subject.field).lower()])
        case "query":
            return value_reader("querystring", query[str(subject.field)])
        case "application":
            return _application
        case "consumer":  # pragma: no branch (mypy knows there is no other)
            return _consumer_id if subject.field is None else _consumer_field(subject.field)


def _consumer_id(entry: AnyEntry) -> str | None:
    return f"consumer:{entry.consumer.id}" if entry.consumer and entry.consumer.id else None


def _consumer_field(name: str) -> Callable[[AnyEntry], str | None]:
    read_field: Callable[[Any], str | None] = attrgetter(name)
    return lambda entry: (read_field(entry.consumer) or None) if entry.consumer else None


def _application(entry: AnyEntry) -> str | None:
    """The application, or the credential Konnect's application auth leaves where there is no consumer."""
    if entry.application and entry.application.id:
        return f"application:{entry.application.id}"
    credential = entry.authenticated_entity
    return f"application:{credential.id}" if credential and credential.id and entry.consumer is None else None


def attributes_reader(
    attributes: tuple[Attribute, ...], headers: dict[str, str], query: dict[str, str]
) -> Callable[[AnyEntry], tuple[str | None, ...]]:
    """How to read the attributes, in the order of the configuration."""
    readers = [
        value_reader("headers", headers[a.look_up_value_in.lower()])
        if a.source == "header"
        else value_reader("querystring", query[a.look_up_value_in])
        for a in attributes
    ]
    if not readers:
        return lambda entry: ()
    return lambda entry: tuple(read(entry) for read in readers)


def personal_reader(wanted: frozenset[str], headers: dict[str, str]) -> Callable[[AnyEntry], tuple[str | None, ...]]:
    """The three personal fields; only the listed ones are ever read."""
    readers: dict[str, Callable[[AnyEntry], str | None]] = {
        "client_ip": attrgetter("client_ip"),
        "request_uri": attrgetter("request.uri"),
    }
    if "request_user_agent" in wanted:
        readers["request_user_agent"] = value_reader("headers", headers["user-agent"])
    if not wanted:
        return lambda entry: (None, None, None)
    return lambda entry: tuple(readers[name](entry) if name in wanted else None for name in PERSONAL_FIELDS)
