"""`map --explain`: entry by entry, what was billed or skipped, and by which rule; for people, or as NDJSON."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
from rich.markup import escape

from metershipper.books import Dead, Skip
from metershipper.filter import Chunk, chunks_of, name_of, opened
from metershipper.mapper import Explained, Mapper
from metershipper.metering import Metering
from metershipper.pieces import Unbillable
from metershipper.retry import one_line

_COLOURS = {"billed": "green", "skipped": "yellow", "dead letter": "red"}


def explain_paths(metering: Metering, paths: tuple[str, ...], show: Callable[[dict[str, Any]], None]) -> None:
    """Show one report for each entry of every path, in order. Raises as `filter.map_paths` does."""
    mapper = Mapper(metering)
    for path in paths:
        with opened(path) as source:
            for chunk in chunks_of(source):
                for explained in _explained(mapper, chunk):
                    show(report(path, explained))


def _explained(mapper: Mapper, chunk: Chunk) -> list[Explained]:
    if chunk.overlong is None:
        return list(mapper.explain(chunk.data, chunk.start_offset))
    fault = Unbillable(Dead.LINE_TOO_LONG, f"a line of {chunk.overlong.length} bytes")
    return [Explained(chunk.start_offset, None, None, fault, [])]


def report(path: str, explained: Explained) -> dict[str, Any]:
    """What became of an entry, as plain values; `rule` is what the configuration calls the settings that decided."""
    outcome = explained.outcome
    told: dict[str, Any] = {"path": name_of(path), "offset": explained.start_offset}
    told |= {"request_id": explained.request_id, "rule": explained.rule}
    if isinstance(outcome, Skip):
        return told | {"outcome": "skipped", "reason": str(outcome)}
    if outcome is not None:
        return told | {"outcome": "dead letter", "reason": str(outcome.reason), "detail": outcome.detail}
    events: list[Any] = msgspec.to_builtins(explained.events)
    return told | {"outcome": "billed", "subject": events[0]["subject"], "events": events}


def line_of(told: dict[str, Any]) -> str:
    """A report on one line, in rich's markup."""
    outcome = told["outcome"]
    where = escape(f"{told['path']}:{told['offset']}")
    what = f"[{_COLOURS[outcome]}]{outcome}[/]"
    if outcome == "billed":
        usage = ", ".join(_usage(told["events"]))
        what += f" to {escape(one_line(told['subject']))}: {escape(one_line(usage))}"
    else:
        detail = f" ({told['detail']})" if "detail" in told else ""
        what += f": {told['reason']}{escape(detail)}"
    rule = f" [dim]by {escape('[' + told['rule'] + ']')}[/]" if told["rule"] else ""
    return f"{where} {escape(one_line(told['request_id'] or '-'))} {what}{rule}"


def _usage(events: list[dict[str, Any]]) -> list[str]:
    """Events in words: tokens by direction and model, the others by their number."""
    told, others = [], Counter[str]()
    for event in events:
        data = event["data"]
        if "tokens" in data:
            told.append(f"{data['tokens']} {data['type']} tokens of {data.get('model', 'an unnamed model')}")
        else:
            others[event["type"]] += 1
    return [f"{count} {name}" for name, count in others.items()] + told
