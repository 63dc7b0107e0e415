"""The `replay` command as its user meets it: the plan, the question, the delivery, the result, the exit code.

Owns the order of these and nothing else.
"""

import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import click
import orjson

from metershipper.config import Config, endpoint_of
from metershipper.dead_letter_commands import parse_instant
from metershipper.errors import MeterShipperError, UsageError
from metershipper.logs import start_logging
from metershipper.openmeter import Token
from metershipper.replay_command import Estimate, deliver, dry_run, estimate, look_around
from metershipper.replay_plan import Plan
from metershipper.replay_report import (
    books_as_dict,
    looking,
    plan_as_dict,
    result_as_dict,
    show_plan,
    show_result,
    show_totals,
    totals_as_list,
    watching,
)
from metershipper.replay_state import ReplayState
from metershipper.scope import Scope

# As for `run`: below the 10 s that Docker grants.
GRACE_SECONDS = 8.0
_INTERRUPTED = 3
_QUESTION = "Did nothing else bill them, and shall they be sent?"
_NOT_WRITTEN = "standard output can't be written"
_STATUS = "what is delivered is recorded: see `metershipper status`"


class OutputLost(MeterShipperError):
    """Standard output can't be written."""


def replay_paths(
    config: Config,
    where: str,
    paths: Sequence[str],
    *,
    since: str | None,
    until: str | None,
    subject: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    workers: int,
    limit_events_per_second: float | None,
) -> int:
    """Do what the command line says. Returns the exit code. Raises: MeterShipperError."""
    begin, end = (None if text is None else parse_instant(text) for text in (since, until))
    scope = Scope.of(begin, end, subject)
    if limit_events_per_second is not None and not math.isfinite(limit_events_per_second):
        raise UsageError("--limit-events-per-second: not a number of events")
    if not dry_run:
        endpoint_of(config, where)
    start_logging()
    os.umask(0o077)  # whatever the state directory holds is for this user alone
    try:
        with ReplayState(config.state.directory, dry_run=dry_run) as state:
            with looking() as (on_start, on_bytes):
                plan = look_around(config, state, paths, scope, on_start=on_start, on_bytes=on_bytes)
            told = estimate(config, plan)
            document = {"plan": plan_as_dict(plan, told)}
            if not as_json:
                _show_plan(plan, told, is_agreed_to=yes and not dry_run)
            if dry_run:
                return _dry(config, state, plan, document, as_json=as_json)
            try:
                _ask(plan, told, yes=yes, is_shown=not as_json)
            except UsageError:
                if as_json:
                    asked = ". ".join([*plan.doubts, _QUESTION])
                    _put(lambda: _print(document | {"asked": asked, "result": None}))
                raise
            if warning := Token(config.openmeter).warning:
                logging.getLogger("metershipper").warning(warning)
            done = deliver(
                *(config, where, state, plan),
                workers=workers,
                events_per_second=limit_events_per_second,
                grace_seconds=GRACE_SECONDS,
                watch=watching,
            )
            if as_json:
                lost = _put(lambda: _print(document | {"result": result_as_dict(done, state)}))
            else:
                lost = _put(lambda: show_result(done, state))
            if lost is not None:
                _say(f"{_NOT_WRITTEN}: {lost.strerror}; what became of the files is not shown; {_STATUS}")
            if done.failure is not None:
                raise done.failure
            # A reader that leaves wants no more; of one that gets half a document nobody shall think that it is whole.
            return done.exit_code if lost is None or isinstance(lost, BrokenPipeError) else OutputLost.exit_code
    except KeyboardInterrupt:
        click.echo("metershipper: interrupted; the same command goes on where this one was", err=True)
        return _INTERRUPTED


def _show_plan(plan: Plan, told: Estimate | None, *, is_agreed_to: bool) -> None:
    """Print the plan. Raises: OutputLost where it can't be, and nobody agreed to it unseen."""
    lost = _put(lambda: show_plan(plan, told))
    if lost is None:
        return
    # Sending does not depend on who reads about it, but only `--yes` says so before a plan was seen. And on a full disk
    # nothing is begun: the state may be on it, too.
    if not is_agreed_to or not isinstance(lost, BrokenPipeError):
        raise OutputLost(f"{_NOT_WRITTEN}: {lost.strerror}; nothing was sent")
    _say(f"{_NOT_WRITTEN}: {lost.strerror}; goes on, because of --yes; {_STATUS}")


def _dry(config: Config, state: ReplayState, plan: Plan, document: dict[str, Any], *, as_json: bool) -> int:
    with looking() as (on_start, on_bytes):
        on_start(len(plan.to_send), plan.bytes_to_send)
        totals = dry_run(config, state, plan, on_bytes)
    if as_json:
        lost = _put(lambda: _print(document | {"totals": totals_as_list(totals), "books": books_as_dict(totals.books)}))
    else:
        lost = _put(lambda: show_totals(totals))
    if lost is not None:
        raise OutputLost(f"{_NOT_WRITTEN}: {lost.strerror}; nothing was sent")
    return 0


def _ask(plan: Plan, told: Estimate | None, *, yes: bool, is_shown: bool) -> None:
    """Go on only where nothing can be billed twice, or somebody said so. Raises: UsageError."""
    if not plan.doubtful or yes:
        return
    if not (sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()):
        names = ", ".join(file.survey.path for file in plan.doubtful[:3])
        others = " and others" if len(plan.doubtful) > 3 else ""
        raise UsageError(
            f"{'. '.join(plan.doubts)}. These are {names}{others}; nothing was sent. If nothing else billed them: --yes"
        )
    if not is_shown:
        show_plan(plan, told, to_stderr=True)
    try:
        if click.confirm(_QUESTION, err=True):
            return
    except click.Abort:  # Ctrl-C or Ctrl-D: no, without the end of a line
        click.echo(err=True)
    raise UsageError("nothing was sent")


def _put(show: Callable[[], None]) -> OSError | None:
    """Print to standard output. Returns why that failed; then all that would follow goes nowhere."""
    try:
        show()
        return None
    except OSError as error:
        with suppress(OSError):  # else what is still to be written would fail once more at the exit
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        return error


def _say(line: str) -> None:
    with suppress(OSError):  # standard error may be the same closed pipe
        click.echo(f"metershipper: {line}", err=True)


def _print(document: dict[str, Any]) -> None:
    click.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())
