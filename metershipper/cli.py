"""The command line: parses words, calls the part that does the work, shows the result. Results go to stdout, the rest
to stderr. Never holds logic of its own. Imports are made where they are used, so that each command starts fast.
"""

import asyncio
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from metershipper import __version__
from metershipper.errors import ConfigError, MeterShipperError, UsageError

if TYPE_CHECKING:
    from metershipper.config import Config

CONFIG_VARIABLE = "METERSHIPPER_CONFIG"
DEFAULT_CONFIG = "config.toml"
# Below the 10 s that Docker grants and the 30 s of Kubernetes.
DEFAULT_GRACE_SECONDS = 8.0


def _config_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "-c",
        "--config",
        "config_path",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help=f"Configuration (TOML).  [default: ${CONFIG_VARIABLE}, then ./{DEFAULT_CONFIG}]",
    )(command)


class _Cli(click.Group):
    """Shows a `MeterShipperError` as one line with its exit code, also when called from a test."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MeterShipperError as error:
            for line in str(error).splitlines():
                click.echo(f"metershipper: {line}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="metershipper")
def cli() -> None:
    """Turn Kong gateway access logs into usage events and deliver them to OpenMeter or Konnect Metering & Billing:
    nothing lost, nothing billed twice, every line accounted for.

    \b
    Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 partly done.
    """


@cli.command()
@_config_option
@click.option(
    "--grace-seconds",
    type=click.FloatRange(0, 3600),
    default=DEFAULT_GRACE_SECONDS,
    show_default=True,
    help="How long a stop lets batches in flight finish.",
)
@click.option(
    "--start-over",
    is_flag=True,
    help="If the checkpoint is damaged or lost: set it aside and read every log, and its rotated files, again.",
)
def run(config_path: Path | None, grace_seconds: float, start_over: bool) -> None:
    """Follow files, receive http-log, ship until SIGTERM.

    The first SIGTERM or SIGINT stops reading, finishes what is in flight and checkpoints; a second one stops at once.
    After either nothing is lost: what was not acknowledged is read again at the next start.
    """
    from metershipper.config import require_for_run
    from metershipper.logs import start_logging
    from metershipper.openmeter import Token
    from metershipper.sidecar import Sidecar

    if math.isnan(grace_seconds):  # click takes it for a number within any range
        raise UsageError("--grace-seconds nan: not a number of seconds")
    config, where = _load(config_path)
    require_for_run(config, where)
    start_logging()
    os.umask(0o077)  # whatever the state directory holds is for this user alone
    if warning := Token(config.openmeter).warning:
        logging.getLogger("metershipper").warning(warning)
    with asyncio.Runner(loop_factory=_new_event_loop()) as runner:
        forced = runner.run(_run_until_signalled(Sidecar(config, where, grace_seconds, start_over=start_over)))
    sys.exit(1 if forced else 0)


def _new_event_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where there is one: the receiver takes twice as many requests with it."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _run_until_signalled(sidecar: Any) -> bool:
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals, stop: Callable[[], None]) -> None:
        logging.getLogger("metershipper").info("%s: stopping", number.name)
        stop()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, sidecar.stop_now)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number, sidecar.stop)
    stopped = await sidecar.run()
    return bool(stopped.forced)


@cli.command()
@_config_option
@click.option("--since", metavar="TIME", help="Only events at or after this time: 2026-05-01[T12:00:00Z].")
@click.option("--until", metavar="TIME", help="Only events before this time.")
@click.option("--subject", metavar="TEXT", help="Only events of this subject.")
@click.option("--dry-run", is_flag=True, help="Tell what would be sent, and send nothing.")
@click.option("--yes", is_flag=True, help="Do not ask, also where something could be billed twice.")
@click.option("--json", "as_json", is_flag=True, help="Print plan and result as one JSON document.")
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes that map files.")
@click.option("--limit-events-per-second", type=click.FloatRange(0, min_open=True), help="Send no faster than this.")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
def replay(config_path: Path | None, paths: tuple[str, ...], **options: Any) -> None:
    """Backfill: ship archived logs, once and only once.

    PATHs are files, globs or directories; plain, gzip or zstd. What was shipped before, by `run` or by a replay, is
    known by its content and not sent again. Shows a plan first, and asks where usage could be billed twice. The same
    command resumes after any interruption. Works beside `run`.

    \b
    Example:
      metershipper replay --dry-run '/archive/kong/**/*.gz'
    Exit codes: 0 all delivered, 1 failed, 2 wrong usage, 3 something is left.
    """
    from metershipper.replay_face import replay_paths

    config, where = _load(config_path)
    sys.exit(replay_paths(config, where, paths, **options))


@cli.command(name="map")
@_config_option
@click.option("--explain", is_flag=True, help="Tell for each entry what was billed or skipped, and by which rule.")
@click.option("--json", "as_json", is_flag=True, help="With --explain: as NDJSON.")
@click.argument("paths", nargs=-1, metavar="[PATH]...")
def map_command(config_path: Path | None, explain: bool, as_json: bool, paths: tuple[str, ...]) -> None:
    """Turn entries into usage events, as a pure filter.

    Entries come from files or stdin (-), usage events go to stdout as NDJSON, a summary to stderr. Touches no network
    and no state, and works with no configuration at all.

    \b
    Example:
      metershipper map samples/usage.log | head -n 1
    """
    from metershipper.explain import explain_paths
    from metershipper.filter import map_paths

    config = _load(config_path)[0] if _config_path(config_path) else _defaults()
    if explain:
        explain_paths(config.metering, paths or ("-",), _shower(as_json))
        return
    if as_json:
        raise UsageError("--json goes with --explain; without it the events are NDJSON already")
    if sys.stdout is None or sys.stdin is None:
        raise UsageError("map needs its standard input and output open")
    map_paths(config.metering, paths or ("-",), sys.stdout.buffer, lambda text: click.echo(text, err=True))


@cli.command(name="import-kong")
@click.argument("paths", nargs=-1, required=True, metavar="FILE...")
def import_kong_command(paths: tuple[str, ...]) -> None:
    """Print the configuration for what Kong's plugin does.

    Reads what there is for Kong's metering-and-billing plugin, from files or stdin (-): decK YAML, Admin API or Konnect
    API bodies, Kubernetes KongPlugin manifests, Terraform. What has no equivalent becomes a comment that says why.
    Secrets are never copied.

    \b
    Example:
      metershipper import-kong kong.yaml > config.toml
    """
    from metershipper.kong_import import import_kong

    text = import_kong(paths, lambda line: click.echo(f"metershipper: {line}", err=True))
    click.echo(text, nl=False)


@cli.command()
@_config_option
@click.option("--connect", is_flag=True, help="Also prove the endpoint and the token, with an empty batch.")
def check(config_path: Path | None, connect: bool) -> None:
    """Validate the configuration and say what it does.

    In words: what will be metered, for whom, from where, to where.
    """
    from metershipper.check import explain, prove_connection

    config, where = _load(config_path)
    for line in asyncio.run(explain(config, where)):
        click.echo(line)
    if connect:
        proof = asyncio.run(prove_connection(config, where))
        click.echo(proof.text)
        sys.exit(0 if proof.ok else 1)


@cli.command()
@_config_option
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def status(config_path: Path | None, as_json: bool) -> None:
    """Show positions, lag, books and dead letters.

    As of the last checkpoint; works while `run` runs.
    """
    import orjson

    from metershipper.status import read_status, render

    report = read_status(_load(config_path)[0].state.directory)
    if as_json:
        click.echo(orjson.dumps(report.as_dict(), option=orjson.OPT_INDENT_2).decode())
    else:
        render(report)


@cli.group(name="dead-letters")
def dead_letters() -> None:
    """List, show, retry and purge what could not be billed.

    Lines that are no entry or hold a bad value, and events that the endpoint refused; each with its reason, where it
    was read, and its content without secrets. Works while `run` runs.
    """


def _letter_filters(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--subject", metavar="TEXT", help="Only refused events of this subject."),
        click.option("--until", metavar="TIME", help="Only those kept before this time."),
        click.option("--since", metavar="TIME", help="Only those kept at or after this time: 2026-05-01[T12:00:00Z]."),
        click.option("--reason", metavar="REASON", help="Only those with this reason, for instance not_json."),
    ):
        command = option(command)
    return command


def _letter_filter(
    ids: tuple[int, ...], reason: str | None, since: str | None, until: str | None, subject: str | None
) -> Any:
    from metershipper.books import Dead
    from metershipper.dead_letter_commands import parse_instant
    from metershipper.dead_letters import Filter

    if reason is not None and reason not in {*Dead}:
        raise UsageError(f"--reason {reason}: unknown; reasons are {', '.join(Dead)}")
    if len(ids) > 500:
        raise UsageError("more than 500 numbers; use --reason, --since, --until or --subject")
    begin, end = (None if text is None else parse_instant(text) for text in (since, until))
    return Filter(ids, reason, subject, begin, end)


@dead_letters.command(name="list")
@_config_option
@_letter_filters
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="Show at most so many.")
@click.option("--json", "as_json", is_flag=True, help="Print NDJSON, with content.")
def list_dead_letters(config_path: Path | None, limit: int, as_json: bool, **filters: str | None) -> None:
    """Show which there are, oldest first."""
    import orjson

    from metershipper.dead_letter_commands import count, letters, line_of

    directory, wanted = _load(config_path)[0].state.directory, _letter_filter((), **filters)
    for letter in letters(directory, wanted, limit):
        click.echo(orjson.dumps(letter.as_dict()).decode() if as_json else line_of(letter))
    if not as_json:
        click.echo(f"{count(directory, wanted)} dead letters", err=True)


@dead_letters.command()
@_config_option
@click.argument("number", type=int, metavar="ID")
def show(config_path: Path | None, number: int) -> None:
    """Show all that is known of one, as JSON."""
    import orjson

    from metershipper.dead_letter_commands import letters

    for letter in letters(_load(config_path)[0].state.directory, _letter_filter((number,), None, None, None, None), 1):
        click.echo(orjson.dumps(letter.as_dict(), option=orjson.OPT_INDENT_2).decode())
        return
    raise UsageError(f"{number}: no such dead letter")


@dead_letters.command()
@_config_option
@_letter_filters
@click.argument("ids", nargs=-1, type=int, metavar="[ID]...")
def retry(config_path: Path | None, ids: tuple[int, ...], **filters: str | None) -> None:
    """Try them again: all, or those that fit.

    Lines are mapped with today's configuration, refused events are sent as they were; ids stay the same. A running
    `run` does it with the configuration it was started with; else it is done here.
    """
    from metershipper.dead_letter_commands import retry as retry_letters

    config, where = _load(config_path)
    done = retry_letters(config, where, _letter_filter(ids, **filters))
    click.echo(
        f"{done.asked} tried: {done.settled} settled, {done.kept} failed again, {done.waiting} waiting for `run`"
    )
    sys.exit(done.exit_code)


@dead_letters.command()
@_config_option
@_letter_filters
@click.option("--yes", is_flag=True, help="Really delete; without it only their number is told.")
@click.argument("ids", nargs=-1, type=int, metavar="[ID]...")
def purge(config_path: Path | None, ids: tuple[int, ...], yes: bool, **filters: str | None) -> None:
    """Delete them for good: all, or those that fit.

    The books go on counting them.
    """
    from metershipper.dead_letter_commands import count
    from metershipper.dead_letter_commands import purge as purge_letters

    directory, wanted = _load(config_path)[0].state.directory, _letter_filter(ids, **filters)
    if not yes:
        raise UsageError(f"{count(directory, wanted)} dead letters would be deleted for good; add --yes to do it")
    click.echo(f"{purge_letters(directory, wanted)} dead letters deleted")


@cli.command()
@click.option("--listen", default="127.0.0.1:8888", show_default=True, metavar="HOST:PORT", help="Port 0: a free one.")
@click.option(
    "--database",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Keep the events in this SQLite file.  [default: in memory]",
)
def sandbox(listen: str, database: Path | None) -> None:
    """Serve an endpoint like OpenMeter's, for evaluation.

    It accepts usage events as OpenMeter does, for evaluation and tests: it validates events, stores each (source, id)
    once, lists them (GET /api/v1/events) and sums usage (GET /sandbox/usage). It is no OpenMeter: no meters, no
    customers, no billing, no authentication.
    """
    from metershipper.sandbox import serve

    host, _, port = listen.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise UsageError(f"--listen {listen}: not HOST:PORT, for instance 127.0.0.1:8888")

    def announce(url: str) -> None:
        click.echo(url)
        click.echo(f"ingest: {url}/api/v1/events (v1), {url}/api/v3/openmeter/events (v3)", err=True)
        click.echo(f"look:   {url}/api/v1/events, {url}/sandbox/usage, {url}/sandbox/counts", err=True)

    try:
        serve(host.strip("[]"), int(port), database, announce)
    except OSError as error:
        # One without strerror comes from the database and names it.
        raise UsageError(f"--listen {listen}: {error.strerror}" if error.strerror else f"--database {error}") from None


@cli.command()
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Keep all files here.")
def demo(keep: Path | None) -> None:
    """See it work in under 30 s, with no account.

    No configuration either. Kong-like traffic goes into a log file and to the http-log receiver; a real `run` ships it
    to a sandbox on loopback and is killed with SIGKILL half-way; at the end the sandbox's books are held against what
    was written.
    """
    from metershipper.demo import run_demo

    sys.exit(0 if run_demo(keep) else 1)


def _shower(as_json: bool) -> Callable[[dict[str, Any]], None]:
    """How `map --explain` prints a report."""
    if as_json:
        import orjson

        return lambda told: click.echo(orjson.dumps(told))
    from rich.console import Console

    from metershipper.explain import line_of

    console = Console(highlight=False, soft_wrap=True)
    return lambda told: console.print(line_of(told))


def _config_path(given: Path | None) -> Path | None:
    """The configuration file to use; None when none was named and there is none in this directory."""
    if given is not None:
        return given
    if named := os.environ.get(CONFIG_VARIABLE):
        return Path(named)
    return Path(DEFAULT_CONFIG) if Path(DEFAULT_CONFIG).exists() else None


def _load(given: Path | None) -> "tuple[Config, str]":
    """The configuration, and how to name its origin in a message."""
    from metershipper.config import ENV_DELIMITER, ENV_PREFIX, load_config

    path = _config_path(given)
    if path is None and any(name.startswith(ENV_PREFIX) and ENV_DELIMITER in name for name in os.environ):
        return load_config(None), "environment"
    if path is None:
        raise ConfigError(
            f"{DEFAULT_CONFIG}: no such file here; name one with -c or ${CONFIG_VARIABLE}, or copy config.example.toml"
        )
    return load_config(path), str(path)


def _defaults() -> "Config":
    from metershipper.config import load_config

    return load_config(None)
