"""`demo` does the whole job in under 30 s, and fails when the books do not balance."""

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from metershipper.books import Books, Count
from metershipper.cli import cli
from metershipper.demo import Outcome, run_demo, show
from metershipper.traffic import Truth


def test_demo_balances_the_books_in_under_30_seconds(tmp_path: Path) -> None:
    began = time.monotonic()
    shown = subprocess.run([sys.executable, "-m", "metershipper", "demo"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert time.monotonic() - began < 30
    assert "0 lost: checked against what was written." in shown.stdout
    assert "acme" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_demo_keeps_its_files_where_it_is_told(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    assert run_demo(kept)
    assert {path.name for path in kept.iterdir()} == {"config.toml", "run.log", "state", "usage.log", "usage.log.1"}


def test_demo_does_not_start_over_the_files_of_another_one(tmp_path: Path) -> None:
    (tmp_path / "usage.log").write_text("")
    shown = subprocess.run(
        [sys.executable, "-m", "metershipper", "demo", "--keep", str(tmp_path)], capture_output=True, text=True
    )
    assert shown.returncode == 2
    assert "not empty" in shown.stderr


def outcome(stored: int, tokens: int) -> Outcome:
    truth = Truth(entries=2, events=4, api_requests=Counter(acme=2), tokens=Counter({("acme", "m", "request"): 30}))
    books = Books({Count.LINES: 2, Count.BILLED: 2, Count.EVENTS: 4})
    usage: list[dict[str, Any]] = [
        {"event_type": "kong.api_request", "subject": "acme", "model": None, "type": None, "events": 2, "tokens": 0},
        {
            "event_type": "kong.llm_request",
            "subject": "acme",
            "model": "m",
            "type": "request",
            "events": 2,
            "tokens": tokens,
        },
    ]
    return Outcome(truth, books, {"events": stored, "repeats": 1}, usage)


def test_demo_balances_only_when_nothing_differs(capsys: object) -> None:
    assert show(outcome(stored=4, tokens=30), Console())


def test_demo_says_what_was_lost(tmp_path: Path) -> None:
    with (tmp_path / "shown").open("w") as file:
        assert not show(outcome(stored=3, tokens=29), Console(file=file, width=200))
    shown = (tmp_path / "shown").read_text()
    assert "1 lost" in shown
    assert "THE BOOKS DO NOT BALANCE: events stored: 3 instead of 4" in shown
    assert "tokens by subject, model and direction" in shown


def test_a_demo_that_can_not_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback and no false balance when a part of it does not start."""
    monkeypatch.setattr("metershipper.demo._CONFIG", 'unknown = "{url} {log} {state}"\n')
    shown = CliRunner().invoke(cli, ["demo", "--keep", str(tmp_path)])
    assert shown.exit_code == 1
    assert "The demo failed: `run` ended with exit code 2" in shown.output
