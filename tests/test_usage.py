"""AI usage in one entry: which calls there are and how many tokens each took."""

import math
from typing import Any

import pytest

from metershipper.books import Dead
from metershipper.entry import AiPart, Meta, Usage
from metershipper.pieces import Unbillable
from metershipper.usage import (
    FLAT,
    MAX_TOKENS,
    ai_calls,
    input_tokens,
    model_of,
    output_tokens,
    shown,
)

USED = AiPart(usage=Usage(prompt_tokens=1))
UNUSED = AiPart(meta=Meta(request_model="m"))
FLAT_USAGE = AiPart(prompt_tokens=9)

CALLS: dict[str, tuple[dict[str, AiPart], list[tuple[str, str]]]] = {
    "nothing": ({}, []),
    "3.6 flat": ({"usage": FLAT_USAGE, "meta": UNUSED}, [("", FLAT)]),
    "3.6 flat without meta": ({"usage": FLAT_USAGE}, [("", FLAT)]),
    "3.6 flat with payload": ({"usage": FLAT_USAGE, "payload": AiPart()}, [("", FLAT)]),
    "flat beside a container without counts": (
        {"proxy": AiPart(usage=Usage(), meta=Meta()), "usage": FLAT_USAGE, "meta": UNUSED}, [("", FLAT)],
    ),
    "meta alone": ({"meta": UNUSED}, []),
    "meta and payload": ({"meta": UNUSED, "payload": AiPart()}, []),
    "3.7 and 3.8": ({"ai-proxy": USED}, [("", "ai-proxy")]),
    "3.9 and later": ({"proxy": USED}, [("", "proxy")]),
    "advanced": ({"ai-proxy-advanced": USED}, [("", "ai-proxy-advanced")]),
    "a transformer alone": ({"ai-request-transformer": USED}, [("", "ai-request-transformer")]),
    "statistics switched off": ({"proxy": UNUSED}, []),
    "tool calls beside": ({"mcp": AiPart(), "proxy": USED, "a2a": AiPart()}, [("", "proxy")]),
    "a transformer beside": (
        {"ai-request-transformer": USED, "proxy": USED},
        [("", "proxy"), (".ai-request-transformer", "ai-request-transformer")],
    ),
    "proxy comes first, then the others by name": (
        {"zeta": USED, "ai-proxy-advanced": USED, "alpha": USED, "ai-proxy": USED, "proxy": USED},
        [("", "proxy"), (".ai-proxy", "ai-proxy"), (".ai-proxy-advanced", "ai-proxy-advanced"), (".alpha", "alpha"),
         (".zeta", "zeta")],
    ),
    "two transformers": ({"ai-b": USED, "ai-a": USED}, [("", "ai-a"), (".ai-b", "ai-b")]),
    "flat beside a container": ({"usage": FLAT_USAGE, "meta": UNUSED, "proxy": USED}, [("", "proxy")]),
    "flat beside containers without usage": ({"usage": FLAT_USAGE, "proxy": UNUSED}, [("", FLAT)]),
}  # fmt: skip


@pytest.mark.parametrize(("ai", "expected"), CALLS.values(), ids=CALLS)
def test_each_call_is_found_once(ai: dict[str, AiPart], expected: list[tuple[str, str]]) -> None:
    for order in (ai, dict(reversed(ai.items()))):
        assert [(call.suffix, call.container) for call in ai_calls(order)] == expected


def test_a_flat_call_has_its_models_from_the_flat_meta() -> None:
    (call,) = ai_calls({"usage": FLAT_USAGE, "meta": AiPart(request_model="asked")})
    assert call.usage is FLAT_USAGE and call.part.request_model == "asked"


COUNTS: dict[str, tuple[Any, int | None]] = {
    "missing": ({}, None),
    "zero is not missing": ({"s": 0}, 0),
    "plural": ({"s": 12}, 12),
    "singular, Kong 3.7": ({"": 12}, 12),
    "input and output, Kong 3.11": ({"put": 12}, 12),
    "plural wins": ({"s": 5, "": 6, "put": 7}, 5),
    "a zero gives way": ({"s": 0, "put": 7}, 7),
    "only zeros": ({"s": 0, "": 0, "put": 0}, 0),
    "integral float": ({"s": 12.0}, 12),
    "integral float in exponent form": ({"s": 1e3}, 1000),
    "the largest exact number": ({"s": MAX_TOKENS}, MAX_TOKENS),
    "minus zero": ({"s": -0.0}, 0),
}


def usage_of(direction: str, counts: dict[str, Any]) -> Usage:
    word, put = ("prompt_token", "input_tokens") if direction == "input" else ("completion_token", "output_tokens")
    return Usage(**{put if suffix == "put" else word + suffix: count for suffix, count in counts.items()})


@pytest.mark.parametrize("direction", ["input", "output"])
@pytest.mark.parametrize(("counts", "expected"), COUNTS.values(), ids=COUNTS)
def test_tokens_are_read_under_every_name_kong_gave_them(
    direction: str, counts: dict[str, Any], expected: int | None
) -> None:
    """Case 67: 0 and missing are told apart."""
    read, other = (input_tokens, output_tokens) if direction == "input" else (output_tokens, input_tokens)
    found = read(usage_of(direction, counts))
    assert found == expected and type(found) is type(expected)
    assert other(usage_of(direction, counts)) is None


BAD_COUNTS: list[Any] = [
    -1, -1.0, 1.5, True, False, "12", "12abc", "", math.nan, math.inf, -math.inf, 1e300, MAX_TOKENS + 1, 10**400,
    [], [12], {}, {"a": 1},
]  # fmt: skip


@pytest.mark.parametrize("direction", ["input", "output"])
@pytest.mark.parametrize("suffix", ["s", "", "put"])
@pytest.mark.parametrize("count", BAD_COUNTS, ids=lambda count: str(count)[:12])
def test_what_is_no_count_is_never_billed(direction: str, suffix: str, count: Any) -> None:
    """Case 67: OpenMeter would take a negative one as a credit, and text as nothing."""
    read = input_tokens if direction == "input" else output_tokens
    with pytest.raises(Unbillable, match="not a whole number from 0 to 2\\^53") as raised:
        read(usage_of(direction, {suffix: count}))
    assert raised.value.reason is Dead.BAD_TOKEN_COUNT
    assert len(raised.value.detail) < 120


@pytest.mark.parametrize(
    ("value", "text"),
    [(-5, "-5"), (1.5, "1.5"), (math.nan, "nan"), (10**90, "1" + "0" * 39), ("s3cret", "a str"), ([1], "a list")],
)
def test_of_a_bad_value_only_numbers_are_repeated(value: Any, text: str) -> None:
    assert shown(value) == text


@pytest.mark.parametrize(
    ("first", "other", "model"),
    [
        ("gpt", "claude", "gpt"),
        ("UNSPECIFIED", "claude", "claude"),
        (None, "claude", "claude"),
        ("", "claude", "claude"),
        ("UNSPECIFIED", None, "UNSPECIFIED"),
        ("UNSPECIFIED", "", "UNSPECIFIED"),
        ("UNSPECIFIED", "UNSPECIFIED", "UNSPECIFIED"),
        ("gpt", None, "gpt"),
        (None, None, None),
    ],
)
def test_an_unspecified_model_falls_back_to_the_other_one(
    first: str | None, other: str | None, model: str | None
) -> None:
    assert model_of(first, other) == model
