"""What a replay shows: on a wide terminal, on a narrow one, of many days."""

from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from metershipper import replay_report
from metershipper.books import Books, Count
from metershipper.replay_command import Estimate, Line, Totals
from metershipper.replay_outcome import FileResult, Outcome, Tally, tell_copies
from metershipper.replay_paths import Named
from metershipper.replay_plan import Plan, PlannedFile, decide, make_plan
from metershipper.replay_report import plan_as_dict, result_as_dict, show_plan, show_result, show_totals
from metershipper.scope import Scope
from tests.test_replay_plan import DAY, NOW, survey_of

LONG = "/srv/archive/kong/production/eu-central-1/2026-05/usage.log-20260501.gz"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "type[Shown]":
    Shown.monkeypatch, Shown.capsys = monkeypatch, capsys
    return Shown


class Shown:
    """What is printed on a terminal of a width."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __init__(self, width: int) -> None:
        def console(**_: bool) -> Console:
            return Console(width=width, force_terminal=True, color_system=None, highlight=False)

        self.monkeypatch.setattr(replay_report, "_console", console)

    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.capsys.readouterr().out.splitlines()]


def plan_of(scope: Scope | None = None, **changes: object) -> Plan:
    survey = survey_of(**({"path": LONG} | changes))
    return make_plan([survey], scope or Scope(), window_days=32, may_resume_run=True, now=NOW)


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_shows_paths_whole_and_all_numbers(shown: type[Shown], width: int) -> None:
    terminal = shown(width)
    show_plan(plan_of(), None)
    lines = terminal.lines()
    assert "".join(lines).startswith(LONG)  # wrapped by the terminal alone
    assert "  new: 1.0 kB, to send 1.0 kB" in lines
    assert any(line.startswith("  from 2026-09-") for line in lines)
    assert "to send: 1.0 kB of content from 1 file, about 10 entries" in lines


def test_a_wide_terminal_shows_a_table(shown: type[Shown]) -> None:
    terminal = shown(160)
    show_plan(plan_of(), Estimate(20, 1.0))
    lines = terminal.lines()
    assert lines[1].startswith(LONG) and lines[1].split()[-5:] == ["new", "1.0", "kB", "1.0", "kB"]
    assert "about 10 entries and 20 events; at least 1 s of this machine's work" in lines[2]


def test_of_a_period_no_events_are_promised(shown: type[Shown]) -> None:
    terminal = shown(200)
    scope = Scope.of(NOW - 1.5 * DAY, None, None)
    show_plan(plan_of(scope), Estimate(0, 1.0))
    told = " ".join(terminal.lines())
    assert "to go through: 1.0 kB of content from 1 file, about 10 entries; at least" in told
    assert "; only what is from 2026-" in told and "events" not in told
    assert plan_as_dict(plan_of(scope), Estimate(7, 1.0))["estimated_events"] is None
    show_plan(plan_of(Scope.of(NOW + 9 * DAY, None, None)), None)
    assert "nothing to send: nothing is left of the period" in terminal.lines()


def test_what_directories_hold_that_is_no_log_is_told(shown: type[Shown]) -> None:
    terminal = shown(200)
    named = Named(skipped={f"/a/{n}": "hidden" for n in range(11)}, unreadable={"/a/b": "can't be listed: no"})
    plan = make_plan([survey_of()], Scope(), named, window_days=32, may_resume_run=True, now=NOW)
    show_plan(plan, None)
    lines = terminal.lines()
    assert "passed over: 1 file more" in lines and "! /a/b: can't be listed: no; it is left" in lines
    assert plan_as_dict(plan, None)["unreadable"] == [{"path": "/a/b", "reason": "can't be listed: no"}]


class Done:
    """What is shown of a replay that ended."""

    failure = None
    was_stopped = False
    exit_code = 3

    def __init__(self, result: FileResult) -> None:
        self.results = [result, FileResult(result.planned, Outcome.ALREADY_DELIVERED)]
        self.tally = Tally(1000)
        self.unreadable = {"/a/b": "can't be listed: no"}


class State:
    """Where earlier replays had settled as much again."""

    def books_of(self, file_ids: list[int]) -> Books:
        return Books({Count.ENTRIES: 20, Count.BILLED: 20, Count.EVENTS: 40, Count.ACKNOWLEDGED: 40})


@pytest.mark.parametrize("width", [80, 200])
def test_the_result_is_that_of_this_replay_and_what_is_there_in_all(shown: type[Shown], width: int) -> None:
    survey = survey_of(path=LONG)
    planned = PlannedFile(survey, decide(survey, Scope(), may_resume_run=True, now=NOW))
    done = Done(FileResult(planned, Outcome.DELIVERED, [7]))
    done.tally.settled(7, Books({Count.ENTRIES: 10, Count.BILLED: 10, Count.EVENTS: 20, Count.ACKNOWLEDGED: 20}))
    terminal = shown(width)
    show_result(done, State())  # type: ignore[arg-type]
    lines = terminal.lines()
    assert "all files, by this replay:" in lines and "! /a/b: can't be listed: no; it is left" in lines
    if width == 200:
        assert lines[0].split()[-3:] == ["acknowledged", "in", "all"]
        assert lines[1].split() == [LONG, "delivered", "10", "10", "0", "20", "20", "0", "40"]
    else:
        assert lines[0] == LONG
        assert lines[1].startswith("  delivered; by this replay 10 entries, 10 billed, 0 skipped, 20 events")
        assert lines[3:5] == [LONG, "  already delivered"]
    told = result_as_dict(done, State())["files"]  # type: ignore[arg-type]
    assert (told[0]["books"]["events"], told[0]["books_in_all"]["events"]) == (20, 40)
    assert (told[1]["books"], told[1]["books_in_all"]) == (None, None)


def test_a_copy_of_what_was_delivered_before_a_stop_is_not_left() -> None:
    plan = make_plan([survey_of(), survey_of(path="twin")], Scope(), window_days=32, may_resume_run=True, now=NOW)
    for outcome, expected in ((Outcome.DELIVERED, Outcome.COPY), (Outcome.INTERRUPTED, Outcome.WAITING)):
        results = [FileResult(plan.files[0], outcome), FileResult(plan.files[1])]
        tell_copies(results)
        assert results[1].outcome is expected


@pytest.mark.parametrize(("days", "rows"), [(31, 31), (62, 3)])
def test_totals_of_many_days_are_told_by_month(shown: type[Shown], days: int, rows: int) -> None:
    months = [(5, 31), (6, 30), (7, 31)]
    dates = [f"2026-{month:02}-{day:02}" for month, length in months for day in range(1, length + 1)][:days]
    events = Counter({Line(day, "llm.request", "acme", "gpt", "input"): 2 for day in dates})
    totals = Totals(events, Counter(dict.fromkeys(events, 5)), Books())
    terminal = shown(160)
    show_totals(totals)
    lines = terminal.lines()
    assert sum(line.startswith("acme") for line in lines) == rows
    assert any(line.startswith("by day: with --json") for line in lines) == (rows == 3)
    if rows == 3:
        assert lines[1].split() == ["acme", "2026-05", "llm.request", "gpt", "input", "62", "155"]
    terminal = shown(40)
    show_totals(totals)
    assert terminal.lines()[0] == "acme"


def test_a_path_may_be_as_long_as_it_likes(shown: type[Shown], tmp_path: Path) -> None:
    terminal = shown(80)
    show_plan(plan_of(path=str(tmp_path / ("x" * 200))), None)
    assert "to send 1.0 kB" in " ".join(terminal.lines())
