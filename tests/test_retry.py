"""What an answer means for the batch, and how long the next try waits. No answer ever drops a batch."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metershipper.retry import (
    MAX_RETRY_AFTER_SECONDS,
    MAX_SHOWN_CHARACTERS,
    Verdict,
    classify,
    delay_seconds,
    http_date,
    retry_after_seconds,
    suspects_in,
)

ACCEPTED, RETRY, PERSON = Verdict.ACCEPTED, Verdict.RETRY, Verdict.NEEDS_A_PERSON
REFUSED, TOO_LARGE, SLOW_DOWN = Verdict.REFUSED, Verdict.TOO_LARGE, Verdict.SLOW_DOWN
JSON, PROBLEM, HTML = "application/json", "application/problem+json", "text/html; charset=utf-8"
PAGE = "<html><body>Please log in</body></html>"


@pytest.mark.parametrize("status", [200, 202, 204])
@pytest.mark.parametrize(
    ("content_type", "body", "verdict"),
    [
        pytest.param("", "", ACCEPTED, id="empty"),
        pytest.param(HTML, "", ACCEPTED, id="empty, called HTML"),
        pytest.param("", " \r\n", ACCEPTED, id="white space"),
        pytest.param(JSON, '{"ok":true}', ACCEPTED, id="JSON"),
        pytest.param("application/json; charset=utf-8", "{}", ACCEPTED, id="JSON with a parameter"),
        pytest.param("Application/JSON", "{}", ACCEPTED, id="media types have no case"),
        pytest.param("application/vnd.api+json", "{}", ACCEPTED, id="a kind of JSON"),
        pytest.param(HTML, PAGE, PERSON, id="HTML"),
        pytest.param("", PAGE, PERSON, id="a body of no type"),
        pytest.param("text/plain", "OK", PERSON, id="text"),
    ],
)
def test_only_an_empty_or_json_body_is_an_acknowledgement(
    status: int, content_type: str, body: str, verdict: Verdict
) -> None:
    """Case 45: the page of a proxy in between is none, however good its status looks."""
    answer = classify(status, content_type, body)
    assert answer.verdict is verdict
    assert str(status) in answer.reason
    assert ("ingest_endpoint" in answer.reason) == (verdict is PERSON)


@pytest.mark.parametrize(
    ("status", "verdict", "words"),
    [
        (301, PERSON, "a redirect, which is never followed"),
        (302, PERSON, "a redirect, which is never followed"),
        (307, PERSON, "write the final URL into ingest_endpoint"),
        (308, PERSON, "write the final URL into ingest_endpoint"),
        (304, PERSON, "redirect"),
        (400, REFUSED, "refuses an event"),
        (422, REFUSED, "refuses an event"),
        (401, PERSON, "the token is missing or wrong"),
        (403, PERSON, "the token may not ingest"),
        (404, PERSON, "no ingest endpoint at this path"),
        (405, PERSON, "no ingest endpoint at this path"),
        (413, TOO_LARGE, "lower openmeter.batch.max_bytes"),
        (418, PERSON, "not understood"),
        (100, PERSON, "not understood"),
        (201, PERSON, "not understood"),
        (203, PERSON, "not understood"),
        (408, RETRY, "408"),
        (425, RETRY, "425"),
        (429, SLOW_DOWN, "429"),
        (500, RETRY, "500"),
        (502, RETRY, "502"),
        (503, SLOW_DOWN, "503"),
        (504, RETRY, "504"),
        (599, RETRY, "599"),
    ],
)
@pytest.mark.parametrize(("content_type", "body"), [("", ""), (PROBLEM, '{"detail":"no"}'), (HTML, PAGE)])
def test_every_other_status_is_tried_again(
    status: int, verdict: Verdict, words: str, content_type: str, body: str
) -> None:
    """Cases 39, 41, 44 and 45: what passes by itself waits, the rest calls a person; the body changes nothing."""
    answer = classify(status, content_type, body)
    assert answer.verdict is verdict
    assert words in answer.reason and str(status) in answer.reason
    assert not body or body in answer.reason, "the server's own words help most"


@given(st.integers(100, 999), st.text(max_size=20), st.text(max_size=400))
def test_any_answer_has_a_verdict_and_fits_one_line_of_a_log(status: int, content_type: str, body: str) -> None:
    """Case 74: an answer can't forge lines in our log or fill it."""
    answer = classify(status, content_type, body)
    assert answer.verdict in Verdict
    if status not in (200, 202, 204):
        assert answer.verdict is not ACCEPTED
        assert answer.reason.isprintable()
        assert len(answer.reason) < MAX_SHOWN_CHARACTERS + 150


def test_control_characters_and_length_of_the_servers_words_are_bounded() -> None:
    answer = classify(500, HTML, "\x1b[31mred\nsecond\tline\x00" + "x" * 1000)
    assert answer.reason == f"HTTP 500 ({('[31mred second line ' + 'x' * 1000)[:MAX_SHOWN_CHARACTERS]})"


@pytest.mark.parametrize(
    ("attempt", "ceiling"),
    [(1, 0.5), (2, 1.0), (3, 2.0), (7, 32.0), (8, 60.0), (9, 60.0), (1_000, 60.0), (10**9, 60.0), (10**400, 60.0)],
    ids=lambda value: f"{value:.6g}" if isinstance(value, float) else f"{len(str(value))} digits",
)
def test_the_delay_doubles_up_to_the_cap(attempt: int, ceiling: float) -> None:
    """Case 39: an outage of any length neither overflows nor stops the tries."""
    assert delay_seconds(attempt, 0.5, 60.0, 0.0) == 0.0
    assert delay_seconds(attempt, 0.5, 60.0, 0.5) == ceiling / 2
    assert delay_seconds(attempt, 0.5, 60.0, math.nextafter(1.0, 0.0)) == pytest.approx(ceiling)


@given(
    st.integers(1, 10**30),
    st.floats(1e-6, 86400),
    st.floats(1e-6, 86400),
    st.floats(0, 1, exclude_max=True),
)
def test_the_delay_is_never_negative_nor_above_the_cap(
    attempt: int, initial_seconds: float, max_seconds: float, random: float
) -> None:
    delay = delay_seconds(attempt, initial_seconds, max_seconds, random)
    assert 0 <= delay <= max_seconds
    assert delay <= initial_seconds * 2.0 ** min(attempt - 1, 60)


# --- what a refusal points at (case 43; OPENMETER 2)


@pytest.mark.parametrize(
    ("body", "places"),
    [
        ('{"detail": "/3/subject: minimum string length is 1"}', (3,)),
        ('{"detail": "request body has an error: Error at \\"/12/data\\": value must be an object"}', (12,)),
        ('{"detail": "/0: no"}', (0,)),
        ('{"invalid_parameters": [{"field": "7.subject"}, {"field": "2.data.x"}, {"field": "7.id"}]}', (2, 7)),
        ('{"invalid_parameters": [{"field": "body.4"}]}', (4,)),
        ('{"invalid_parameters": [{"field": "subject"}], "detail": "see /api/v1/events"}', ()),
        ('{"detail": "invalid content type: text/plain"}', ()),
        ('{"detail": 7}', ()),
        ("[" * 100_000, ()),
        ("<html>", ()),
        ("", ()),
    ],
)
def test_the_servers_pointer_is_read_where_there_is_one(body: str, places: tuple[int, ...]) -> None:
    assert suspects_in(body) == places
    assert classify(400, PROBLEM, body).suspects == places


@given(st.text(max_size=300))
def test_no_body_of_a_refusal_is_an_exception(body: str) -> None:
    assert all(place >= 0 for place in suspects_in(body))


# --- Retry-After (case 41)

NOW = 1_790_000_000.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("0", 0.0),
        ("7", 7.0),
        (" 12 ", 12.0),
        ("-1", 0.0),
        ("86400", MAX_RETRY_AFTER_SECONDS),
        ("9" * 20, MAX_RETRY_AFTER_SECONDS),
        ("9" * 400, None),
        ("1.5", 1.5),
        ("1.2.3", None),
        ("nan", None),
        ("soon", None),
        ("", None),
        ("Mon, 21 Sep 2026 14:13:50 GMT", 30.0),
        ("Mon, 21 Sep 2026 14:13:00 GMT", 0.0),
        ("Mon, 21 Sep 2099 14:13:00 GMT", MAX_RETRY_AFTER_SECONDS),
        ("Mon, 99 Sep 2026 14:13:00 GMT", None),
    ],
)
def test_retry_after_is_read_in_both_forms_and_clamped(value: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(value, NOW) == seconds


@given(st.text(max_size=60))
def test_no_header_is_an_exception(value: str) -> None:
    seconds = retry_after_seconds(value, NOW)
    assert seconds is None or 0 <= seconds <= MAX_RETRY_AFTER_SECONDS
    assert math.isfinite(http_date(value, NOW))


def test_the_date_of_the_server_is_its_clock() -> None:
    assert http_date("Mon, 21 Sep 2026 14:13:20 GMT", 1.0) == NOW
    assert http_date(None, 1.0) == http_date("never", 1.0) == 1.0
