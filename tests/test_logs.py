"""Log lines: JSON where no person looks, one bounded line each, whatever they hold (CASES 70, 74)."""

import io
import json
import logging
import sys

import pytest

from metershipper.logs import MAX_MESSAGE_CHARACTERS, JsonLines, TextLines, start_logging


def record(message: str, *arguments: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("metershipper.delivery", logging.WARNING, "", 0, message, arguments, None)
    made.created, made.msecs = 1_790_000_000.25, 250.0
    vars(made).update(extra)
    return made


def test_a_line_is_an_object_with_counts_as_fields() -> None:
    assert json.loads(JsonLines().format(record("%d tries", 3, tries=3, seconds=1.5))) == {
        "time": "2026-09-21T14:13:20.250Z",
        "level": "WARNING",
        "logger": "metershipper.delivery",
        "message": "3 tries",
        "tries": 3,
        "seconds": 1.5,
    }


def test_an_exception_stays_on_the_line() -> None:
    made = record("failed")
    try:
        raise ValueError("why")
    except ValueError:
        made.exc_info = sys.exc_info()
    line = JsonLines().format(made)
    assert "\n" not in line and "ValueError: why" in json.loads(line)["exception"]


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines()])
def test_nothing_forges_a_line_or_fills_the_log(formatter: logging.Formatter) -> None:
    """Case 74: newlines, escapes, direction marks, a megabyte."""
    hostile = "a\nERROR forged\x1b[31m\x00\x9b\u202e" + "x" * 1_000_000
    line = formatter.format(record("%s", hostile))
    assert line.isprintable()
    assert len(line) < MAX_MESSAGE_CHARACTERS + 300


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "kind"), [(Terminal(), TextLines), (io.StringIO(), JsonLines), (None, JsonLines)])
def test_a_terminal_gets_text(
    stream: io.StringIO | None, kind: type[logging.Formatter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(sys, "stderr", stream)
    start_logging()
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler.formatter, kind)
