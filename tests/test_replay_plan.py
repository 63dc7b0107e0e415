"""What is to be sent of a file, by what is known of its content (cases 62-64)."""

from typing import Any

import pytest

from metershipper.records import Sample, Stamp, StoredFile
from metershipper.replay_plan import Finding, Step, decide, make_plan
from metershipper.replay_survey import Survey
from metershipper.scope import Scope

NOW = 1_790_000_000.0
DAY = 86_400.0
HEAD = Sample(500, "ab")
ACME, MAY = Scope(subject="acme"), Scope(since="2026-05-01T00:00:00.000Z")


def survey_of(*records: StoredFile, **changes: Any) -> Survey:
    """A file of 1,000 bytes, written long ago."""
    values: dict[str, Any] = {
        "path": "old.log",
        "identity": (1, 2),
        "stamp": Stamp(1000, int((NOW - DAY) * 1e9)),
        "compressed": False,
        "heads": (HEAD,),
        "content_bytes": 1000,
        "lines_end": 1000,
        "lines": 10,
        "end": Sample(256, "ef"),
        "first_at": NOW - 2 * DAY,
        "last_at": NOW - DAY,
        "records": records,
    }
    return Survey(**(values | changes))


def record(
    position: int,
    start: int = 0,
    scope: Scope | None = None,
    *,
    by: Any = "replay",
    history: bool = False,
    seen: int | None = None,
) -> StoredFile:
    number = position + start + 1
    text = None if scope is None else scope.canonical
    return StoredFile(
        *(number, "old.log", None, None, HEAD, Sample(), position),
        history=history,
        seen_bytes=seen,
        start_offset=start,
        origin=by,
        scope=text,
    )


BLANK, RUN_HALF, RUN_ALL = record(0, by="run"), record(500, by="run"), record(1000, by="run")
HALF, ALL, ACME_HALF = record(500), record(1000), record(500, scope=ACME)

CASES: list[tuple[str, tuple[StoredFile, ...], Scope, bool, Finding, list[Step], int]] = [
    ("nothing is known", (), Scope(), True, Finding.NEW, [Step(0, 1000)], 0),
    ("only history", (record(1000, by="run", history=True),), Scope(), True, Finding.NEW, [Step(0, 1000)], 0),
    ("all replayed", (ALL,), Scope(), True, Finding.DELIVERED, [], 0),
    ("all shipped live", (RUN_ALL,), Scope(), False, Finding.DELIVERED, [], 0),
    ("it is a part of what was read", (record(5000),), Scope(), True, Finding.DELIVERED, [], 0),
    ("replayed in part", (HALF,), Scope(), False, Finding.PARTLY_DELIVERED, [Step(500, 1000, HALF)], 0),
    ("begun by a run that goes on", (RUN_HALF,), Scope(), False, Finding.LEFT_TO_RUN, [], 500),
    (
        "begun by a run that stopped",
        (RUN_HALF,),
        Scope(),
        True,
        Finding.PARTLY_DELIVERED,
        [Step(500, 1000, RUN_HALF)],
        0,
    ),
    (
        "seen empty by a run that stopped",
        (b := record(0, by="run"),),
        Scope(),
        True,
        Finding.NEW,
        [Step(0, 1000, b)],
        0,
    ),
    ("seen empty by a run that goes on", (b,), Scope(), False, Finding.LEFT_TO_RUN, [], 1000),
    (
        *("followed from its end", (record(1000, 300, by="run"),), Scope(), False),
        *(Finding.PARTLY_DELIVERED, [Step(0, 300)], 0),
    ),
    (
        *("followed from the middle, by a run that goes on", (record(600, 300, by="run"),), Scope(), False),
        *(Finding.PARTLY_DELIVERED, [Step(0, 300)], 400),
    ),
    ("filtered, nothing known", (), ACME, True, Finding.NEW, [Step(0, 1000)], 0),
    ("filtered, all was sent", (RUN_ALL,), ACME, False, Finding.DELIVERED, [], 0),
    ("filtered, done before", (record(1000, scope=ACME),), ACME, True, Finding.DELIVERED, [], 0),
    ("filtered, begun before", (ACME_HALF,), ACME, True, Finding.PARTLY_DELIVERED, [Step(500, 1000, ACME_HALF)], 0),
    ("another filter", (ACME_HALF,), MAY, True, Finding.NEW, [Step(0, 1000, None, (ACME_HALF,))], 0),
    ("everything after a filter", (ACME_HALF,), Scope(), True, Finding.NEW, [Step(0, 1000, None, (ACME_HALF,))], 0),
    ("filtered, what a replay of all left", (HALF,), ACME, True, Finding.PARTLY_DELIVERED, [Step(500, 1000)], 0),
    ("filtered, what run left", (RUN_HALF,), ACME, True, Finding.LEFT_TO_RUN, [], 500),
    (
        *("a filter behind a part", (HALF, c := record(800, 500, ACME)), ACME, True),
        *(Finding.PARTLY_DELIVERED, [Step(800, 1000, c)], 0),
    ),
    (
        *("everything behind a part and a filter", (HALF, c), Scope(), True),
        *(Finding.PARTLY_DELIVERED, [Step(500, 1000, HALF, (c,))], 0),
    ),
]


@pytest.mark.parametrize(
    ("records", "scope", "may_resume_run", "finding", "steps", "left"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_each_gap_has_exactly_one_reader(
    records: tuple[StoredFile, ...], scope: Scope, may_resume_run: bool, finding: Finding, steps: list[Step], left: int
) -> None:
    decision = decide(survey_of(*records), scope, may_resume_run=may_resume_run, now=NOW)
    assert (decision.finding, list(decision.steps), decision.left_to_run_bytes) == (finding, steps, left)
    assert not decision.unfinished


def test_an_unfinished_line_is_left_while_the_file_is_fresh() -> None:
    """(case 3)"""
    torn = {"content_bytes": 1000, "lines_end": 900}
    fresh = Stamp(1000, int((NOW - 5) * 1e9))
    old = decide(survey_of(**torn), Scope(), may_resume_run=True, now=NOW)
    assert (old.steps, old.unfinished) == ((Step(0, 1000),), False)
    young = decide(survey_of(**torn, stamp=fresh), Scope(), may_resume_run=True, now=NOW)
    assert (young.steps, young.unfinished) == ((Step(0, 900),), True)


def test_of_a_damaged_file_whole_lines_are_sent() -> None:
    """(case 29)"""
    damaged = survey_of(content_bytes=1000, lines_end=700, damage="it ends in the middle")
    assert decide(damaged, Scope(), may_resume_run=True, now=NOW).steps == (Step(0, 700),)
    nothing = survey_of(content_bytes=90, lines_end=0, damage="it ends in the middle")
    assert decide(nothing, Scope(), may_resume_run=True, now=NOW).finding is Finding.EMPTY


def test_the_oldest_goes_first_and_a_copy_is_told() -> None:
    young, old = survey_of(path="a"), survey_of(path="b", first_at=NOW - 9 * DAY, end=Sample(256, "aa"))
    unknown = survey_of(path="c", first_at=None, last_at=None, heads=(Sample(9, "x"),))
    copy = survey_of(path="d", compressed=True)
    plan = make_plan([young, copy, unknown, old], Scope(), window_days=32, may_resume_run=True, now=NOW)
    assert [(file.survey.path, file.finding) for file in plan.files] == [
        ("b", Finding.NEW),
        ("a", Finding.NEW),
        ("d", Finding.COPY),
        ("c", Finding.NEW),
    ]
    assert plan.files[2].copy_of == "a"
    assert (plan.bytes_to_send, plan.entries_to_send) == (3000, 30)


@pytest.mark.parametrize(
    ("survey", "scope", "window_days", "doubtful"),
    [
        (survey_of(first_at=NOW - 40 * DAY), Scope(), 32, True),
        (survey_of(first_at=NOW - 40 * DAY), Scope(), 45, False),
        (survey_of(first_at=NOW - 1), Scope(), 0, True),
        (survey_of(record(500, seen=500), first_at=NOW - 40 * DAY), Scope(), 32, True),  # put together of two files
        (survey_of(record(500, seen=500), first_at=NOW - 40 * DAY, times=((500, NOW - DAY),)), Scope(), 32, False),
        (survey_of(record(500, seen=500), first_at=NOW - 40 * DAY, times=((600, NOW - 33 * DAY),)), Scope(), 32, True),
        (survey_of(record(500, seen=600), first_at=NOW - 40 * DAY), Scope(), 32, False),
        (survey_of(record(500), first_at=NOW - 40 * DAY), Scope(), 32, False),
        (survey_of(record(1000), first_at=NOW - 40 * DAY), Scope(), 32, False),
        (survey_of(record(1000, 300, by="run"), first_at=NOW - 40 * DAY), Scope(), 32, True),  # read from its end
        (survey_of(record(500), first_at=NOW - 40 * DAY), ACME, 32, True),
        (survey_of(first_at=NOW - 40 * DAY), Scope.of(NOW - 31 * DAY, None, None), 32, False),
        (survey_of(first_at=NOW - 40 * DAY), Scope.of(None, NOW, "acme"), 32, True),
    ],
)
def test_only_what_nobody_knows_any_more_is_doubtful(
    survey: Survey, scope: Scope, window_days: int, doubtful: bool
) -> None:
    """Case 63: new content with events older than the window."""
    plan = make_plan([survey], scope, window_days=window_days, may_resume_run=True, now=NOW)
    assert bool(plan.doubtful) == doubtful
    assert any("openmeter.dedupe_window_days" in warning for warning in plan.warnings) == doubtful


def test_content_behind_a_complete_record_is_counted_alone() -> None:
    """Case 63: `cat may.log june.log`, of which may was delivered: what is asked about is june."""
    plan = make_plan(
        [survey_of(record(600, seen=600), first_at=NOW - 90 * DAY)],
        *(Scope(),),
        window_days=32,
        may_resume_run=True,
        now=NOW,
    )
    assert plan.files[0].finding is Finding.PARTLY_DELIVERED
    assert "1 file with content that is not known here, up to 400 bytes and about 4 entries" in plan.doubts[0]


@pytest.mark.parametrize("size", [1000, 10**9])
def test_a_named_file_without_an_entry_is_doubtful(size: int) -> None:
    odd = survey_of(first_at=None, last_at=None, content_bytes=size, end=Sample(9, "odd"))
    plan = make_plan([odd, survey_of()], Scope(), window_days=32, may_resume_run=True, now=NOW)
    assert [file.survey for file in plan.doubtful] == [odd]
    (doubt,) = plan.doubts
    assert doubt.startswith("1 file without any entry of Kong's") and "old.log" in doubt
    begun = survey_of(record(500), first_at=None, last_at=None)
    assert not make_plan([begun], Scope(), window_days=32, may_resume_run=True, now=NOW).doubtful


@pytest.mark.parametrize(
    ("since", "until", "changes", "is_outside"),
    [
        (3.5, None, {}, False),  # its entries ended up to a day later
        (4.5, None, {}, True),
        (None, -9, {}, False),
        (None, -11, {}, True),
        (4.5, None, {"in_order": False}, False),
        (4.5, None, {"last_at": None, "first_at": None}, False),
        (4.5, None, {"damage": "it ends in the middle"}, False),
        (4.5, None, {"records": (record(500),)}, True),
    ],
)
def test_a_file_outside_of_the_period_is_not_sent(
    since: float | None, until: float | None, changes: dict[str, Any], is_outside: bool
) -> None:
    """Ten days before to three days after some time; bounds are days from then on."""
    then = NOW - 60 * DAY
    bounds = [None if each is None else then + each * DAY for each in (since, until)]
    scope = Scope.of(bounds[0], bounds[1], None)
    values = {"first_at": then - 10 * DAY, "last_at": then + 3 * DAY} | changes
    plan = make_plan([survey_of(**values)], scope, window_days=32, may_resume_run=True, now=NOW)
    assert (plan.files[0].finding is Finding.OUTSIDE) == is_outside
    assert (plan.bytes_to_send == 0) == is_outside
    assert not is_outside or not plan.warnings


def test_run_is_named_by_its_process() -> None:
    plan = make_plan([survey_of(RUN_HALF)], Scope(), window_days=32, may_resume_run=False, now=NOW, run_process_id=4711)
    (warning,) = plan.warnings
    assert "1 file begun by `run` (process 4711) and left to it, which reads it on" in warning


def test_damage_is_told_in_one_sentence() -> None:
    """(case 29)"""
    damaged = survey_of(content_bytes=5000, lines_end=1700, damage="incorrect data check", first_at=NOW - 1)
    plan = make_plan([damaged], Scope(), window_days=32, may_resume_run=True, now=NOW)
    assert "old.log: damaged (incorrect data check): from byte 1,700 of its content on" in plan.warnings[0]
    assert "5000" not in plan.warnings[0]
