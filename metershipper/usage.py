"""AI usage in one entry: which calls there are, whichever Kong wrote them, and how many tokens each took. Pure."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from metershipper.books import Dead
from metershipper.entry import AiPart, Usage
from metershipper.metering import DETAIL_FIELDS
from metershipper.pieces import Unbillable

# OpenMeter's server reads numbers as doubles: above this an integer is no longer exact.
MAX_TOKENS = 2**53
# The containers that can be an entry's main AI call, in the order in which the first one present is taken.
MAIN_CONTAINERS = ("proxy", "ai-proxy", "ai-proxy-advanced")
UNSPECIFIED = "UNSPECIFIED"
FLAT = ""


class AiCall(NamedTuple):
    """One AI call found in an entry. `suffix` keeps the ids of several calls in one entry apart."""

    suffix: str
    container: str
    part: AiPart
    usage: Usage


def ai_calls(ai: dict[str, AiPart]) -> Iterator[AiCall]:
    """The AI calls of one entry, the main one first; each is billed once.

    A plugin's container holds `usage` (Kong 3.7 and later). The flat form (3.6) is the sum over all plugins of the
    request, so it counts only where no container has usage. The main call is the first of `MAIN_CONTAINERS`, else the
    first by name; the further ones carry their container's name in their ids.
    """
    if len(ai) == 1:  # by far the most frequent: one container
        ((name, part),) = ai.items()
        if name == "usage":
            yield AiCall("", FLAT, part, part)
        elif part.usage is not None:
            yield AiCall("", name, part, part.usage)
        return
    names = [name for name, part in ai.items() if part.usage is not None and _has_counts(part.usage)]
    if not names:
        if (flat := ai.get("usage")) is not None:
            yield AiCall("", FLAT, ai.get("meta") or flat, flat)  # `ai.meta` holds the models itself
        return
    names.sort(
        key=lambda name: (MAIN_CONTAINERS.index(name) if name in MAIN_CONTAINERS else len(MAIN_CONTAINERS), name)
    )
    for number, name in enumerate(names):
        part = ai[name]
        assert part.usage is not None
        yield AiCall(f".{name}" if number else "", name, part, part.usage)


def _has_counts(usage: Usage) -> bool:
    """Kong 3.8 writes `usage: {}` when the provider told nothing: that stands for no call, and hides no flat sum."""
    counts = (usage.prompt_tokens, usage.completion_tokens, usage.prompt_token, usage.completion_token)
    return any(count is not None for count in (*counts, usage.input_tokens, usage.output_tokens))


def input_tokens(usage: Usage) -> int | None:
    """Input tokens under whichever name this Kong uses; None when missing. Raises `Unbillable` for a bad count."""
    tokens = usage.prompt_tokens
    if type(tokens) is int and 0 < tokens <= MAX_TOKENS:
        return tokens
    return _first_count(usage.prompt_tokens, usage.prompt_token, usage.input_tokens)


def output_tokens(usage: Usage) -> int | None:
    """Output tokens, as `input_tokens`."""
    tokens = usage.completion_tokens
    if type(tokens) is int and 0 < tokens <= MAX_TOKENS:
        return tokens
    return _first_count(usage.completion_tokens, usage.completion_token, usage.output_tokens)


def _first_count(*values: Any) -> int | None:
    """The first count above zero; else 0 where there is a zero; else None. Every value is checked."""
    counts = [_count(value) for value in values if value is not None]
    return next(filter(None, counts), 0) if counts else None


def _count(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_TOKENS:
        raise Unbillable(Dead.BAD_TOKEN_COUNT, f"a token count is {shown(value)}, not a whole number from 0 to 2^53")
    return value


def shown(value: Any) -> str:
    """A bad number for a message: numbers as they are, of anything else only its type."""
    return repr(value)[:40] if isinstance(value, int | float) else f"a {type(value).__name__}"


def model_of(first: str | None, other: str | None) -> str | None:
    """Kong writes UNSPECIFIED where a plugin took the model from its own configuration: then the other one is known."""
    return first if first and first != UNSPECIFIED else other or first


def input_details(usage: Usage) -> dict[str, int]:
    """The details of the input tokens, by the names of `DETAIL_FIELDS`. Raises `Unbillable` for a bad count."""
    return _details(usage.prompt_tokens_details) or _details(usage.input_tokens_details)


def output_details(usage: Usage) -> dict[str, int]:
    """The details of the output tokens, as `input_details`."""
    return _details(usage.completion_tokens_details) or _details(usage.output_tokens_details)


def cached_tokens(usage: Usage) -> int:
    """How many input tokens came from the provider's cache. Raises `Unbillable` for a bad count."""
    return input_details(usage).get("cached_tokens", 0)


def _details(table: Any) -> dict[str, int]:
    if not isinstance(table, dict):
        return {}
    # One name differs between the two forms of the table: audio_tokens_count in that of input_tokens (Kong 3.11).
    values = {"audio_tokens": table.get("audio_tokens_count"), **table}
    return {name: _count(values[name]) for name in DETAIL_FIELDS if values.get(name) is not None}
