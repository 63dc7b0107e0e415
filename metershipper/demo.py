"""`demo`: the whole of it on one machine in under 30 s, and the proof that nothing was lost or billed twice.

Everything is real but the gateway and the server: a log file written as Kong's file-log does it, batches posted as its
http-log does it, `run` as a process of its own with a configuration and a checkpoint, killed with SIGKILL half-way, and
the sandbox in place of OpenMeter.
What must be billed is known from the traffic generator, which shares no code with the mapper.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from metershipper.books import Books, Count, Received
from metershipper.errors import StateError, UsageError
from metershipper.status import read_status
from metershipper.traffic import Traffic, Truth

SEED = 20260101
ENTRIES_PER_SECOND = 1000
MAX_BATCH_SIZE = 20  # entries in one request of http-log
SECONDS_BEFORE_KILL = 2.0
SECONDS_WHILE_DOWN = 0.5
SECONDS_AFTER_RESTART = 2.0
# A process that has not come this far after this long is stuck.
PATIENCE_SECONDS = 12.0

_CONFIG = """\
[openmeter]
ingest_endpoint = "{url}/api/v1/events"

[openmeter.batch]
max_events = 100
max_wait_seconds = 0.2

[[inputs.files]]
path = "{log}"

[inputs.http_log]
listen = "127.0.0.1:{port}"

[state]
directory = "{state}"

[metering.subject]
look_up_value_in = "consumer"
field = "username"
"""


class DemoFailed(Exception):
    """Something did not come as far as it should have; the message says what."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was written, what the sidecar's books say, and what the sandbox counted."""

    truth: Truth
    books: Books
    counts: dict[str, int]
    usage: list[dict[str, Any]]

    def differences(self) -> list[str]:
        """Every way in which the three disagree; empty when the books balance."""
        requests: Counter[str] = Counter()
        tokens: Counter[tuple[str, str, str]] = Counter()
        for row in self.usage:
            if row["type"] is None:
                requests[row["subject"]] += row["events"]
            else:
                tokens[row["subject"], row["model"], row["type"]] += row["tokens"]
        compared = {
            "lines read": (self.books[Count.LINES], self.truth.entries),
            "events sent": (self.books[Count.EVENTS], self.truth.events),
            "events stored": (self.counts["events"], self.truth.events),
            "entries skipped": (self.books.skipped, self.truth.anonymous),
            "dead letters": (self.books.dead_letters, 0),
            "API requests by subject": (requests, +self.truth.api_requests),
            "tokens by subject, model and direction": (tokens, +self.truth.tokens),
        }
        return [f"{what}: {got} instead of {wanted}" for what, (got, wanted) in compared.items() if got != wanted]


def run_demo(keep: Path | None) -> bool:
    """Run it all, print what happens, and return whether the books balance."""
    console = Console(highlight=False, soft_wrap=True)
    with ExitStack() as stack:
        if keep is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="metershipper-demo-")))
        else:
            directory = keep
            try:
                directory.mkdir(parents=True, exist_ok=True)
                used = any(directory.iterdir())
            except OSError as error:
                raise UsageError(f"--keep {keep}: can't be used: {error.strerror}") from None
            if used:  # the books of an earlier demo would be counted as this one's
                raise UsageError(f"--keep {keep}: not empty; name a new or an empty directory")
        try:
            outcome = _Demo(directory.resolve(), console).run()
        except (DemoFailed, OSError, httpx.HTTPError) as error:
            console.print(f"The demo failed: {error}", markup=False)
            return False
    return show(outcome, console)


def show(outcome: Outcome, console: Console) -> bool:
    """Print usage and books; return whether they balance."""
    table = Table("subject", "model", "direction", "events", "tokens", box=SIMPLE_HEAD)
    for column in table.columns[3:]:
        column.justify = "right"
    console.print("\nUsage, as the sandbox counts it:")
    for row in sorted(outcome.usage, key=lambda row: (row["subject"], row["model"] or "")):
        is_call = row["type"] is not None
        cells = (row["model"], row["type"]) if is_call else ("(API requests)", "")
        table.add_row(row["subject"], *cells, f"{row['events']:,}", f"{row['tokens']:,}" if is_call else "")
    console.print(table)
    truth, books, counts = outcome.truth, outcome.books, outcome.counts
    differences = outcome.differences()
    lost = max(0, truth.events - counts["events"])
    repeats = counts["repeats"] + books[Received.REPEATS]
    console.print(
        f"{truth.entries:,} entries in ({truth.anonymous:,} skipped: no consumer), {counts['events']:,} events out, "
        f"{repeats:,} repeats absorbed, {lost} lost: checked against what was written."
    )
    for difference in differences:
        console.print(f"THE BOOKS DO NOT BALANCE: {difference}", markup=False)
    return not differences


class _HttpLog:
    """Kong's http-log: a queue in memory, sent in batches, the same batch again until it is answered with 2xx."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self._waiting: list[bytes] = []
        self._batch: list[bytes] = []

    def add(self, entry: bytes) -> None:
        """Queue an entry."""
        self._waiting.append(entry)

    def send(self) -> bool:
        """Send what waits, as far as it is taken; whether all of it was."""
        while self._batch or self._waiting:
            if not self._batch:
                self._batch, self._waiting = self._waiting[:MAX_BATCH_SIZE], self._waiting[MAX_BATCH_SIZE:]
            try:
                answer = self._client.post("/", content=b"[" + b",".join(self._batch) + b"]")
            except httpx.TransportError:
                return False
            if not answer.is_success:
                return False
            self._batch = []
        return True


class _Demo:
    """The steps of the demo, over one directory."""

    def __init__(self, directory: Path, console: Console) -> None:
        self._directory = directory
        self._console = console
        self._log = directory / "usage.log"
        self._state = directory / "state"
        self._traffic = Traffic(SEED, started_at_ms=int(time.time() * 1000))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port: int = free.getsockname()[1]
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{self._port}", trust_env=False)
        self._http_log = _HttpLog(self._client)

    def run(self) -> Outcome:
        with self._sandbox() as sandbox, self._client:
            assert sandbox.stdout is not None
            url = sandbox.stdout.readline().strip()
            if not url:
                raise DemoFailed("the sandbox did not start")
            self._say(f"a sandbox endpoint listens on {url}")
            (self._directory / "config.toml").write_text(
                _CONFIG.format(url=url, log=self._log, port=self._port, state=self._state), encoding="utf-8"
            )
            with self._sidecar() as sidecar:
                self._say(
                    "`metershipper run` follows usage.log and receives http-log; Kong-like traffic comes both ways"
                )
                self._write(SECONDS_BEFORE_KILL / 2)
                self._wait_until_settled(sidecar, some=True)
                self._write(SECONDS_BEFORE_KILL / 2)
                sidecar.kill()  # some batches are in flight now, some are acknowledged and not yet checkpointed
                self._say("the sidecar is killed with SIGKILL; Kong writes on, and logrotate rotates the log")
            self._write(SECONDS_WHILE_DOWN / 2)
            self._log.rename(self._log.with_name("usage.log.1"))
            self._write(SECONDS_WHILE_DOWN / 2)
            with self._sidecar() as sidecar:
                self._say("the sidecar is started again: it finishes the rotated file and the spool, then goes on")
                self._write(SECONDS_AFTER_RESTART)
                self._wait_until_settled(sidecar, some=False)
                sidecar.send_signal(signal.SIGTERM)
                if sidecar.wait(PATIENCE_SECONDS) != 0:
                    raise DemoFailed(f"`run` ended with exit code {sidecar.returncode}; see {self._directory}/run.log")
            self._say("everything is acknowledged and checkpointed; the sidecar is stopped with SIGTERM")
            books = read_status(self._state).books
            with httpx.Client(base_url=url, trust_env=False) as client:
                counts = client.get("/sandbox/counts").raise_for_status().json()
                usage = client.get("/sandbox/usage").raise_for_status().json()["usage"]
            return Outcome(self._traffic.truth, books, counts, usage)

    def _sandbox(self) -> AbstractContextManager["subprocess.Popen[str]"]:
        return _process("sandbox", "--listen", "127.0.0.1:0", out=subprocess.PIPE, errors=subprocess.DEVNULL)

    @contextmanager
    def _sidecar(self) -> Iterator["subprocess.Popen[str]"]:
        with (self._directory / "run.log").open("a") as errors:
            config = str(self._directory / "config.toml")
            with _process("run", "-c", config, out=subprocess.DEVNULL, errors=errors) as process:
                yield process

    def _write(self, seconds: float) -> None:
        """Log entries as Kong does: every other one by file-log, with one write to a file opened for appending; the
        others by http-log.
        """
        fd = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            ends_at = time.monotonic() + seconds
            for number in range(int(seconds * ENTRIES_PER_SECOND)):
                line = self._traffic.line()
                if number % 2:
                    self._http_log.add(line.rstrip())
                else:
                    os.write(fd, line)
                due_at = ends_at - seconds + number / ENTRIES_PER_SECOND
                if number % 50 == 0:
                    self._http_log.send()
                    time.sleep(max(0.0, due_at - time.monotonic()))
        finally:
            os.close(fd)

    def _wait_until_settled(self, sidecar: "subprocess.Popen[str]", *, some: bool) -> None:
        """Wait until all that was logged is settled, or `some` of it."""
        wanted = 1 if some else self._traffic.truth.entries
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            self._http_log.send()
            if sidecar.poll() is not None:
                raise DemoFailed(f"`run` ended with exit code {sidecar.returncode}; see {self._directory}/run.log")
            try:
                books = read_status(self._state).books
            except StateError:
                books = Books()
            if books[Count.LINES] >= wanted:
                return
            time.sleep(0.1)

    def _say(self, text: str) -> None:
        self._console.print(f"  {text}", markup=False)


@contextmanager
def _process(*arguments: str, out: int, errors: Any = None) -> Iterator["subprocess.Popen[str]"]:
    """One of our own commands, with none of the user's configuration; it does not outlive the block."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("METERSHIPPER_")}
    environment["NO_PROXY"] = environment["no_proxy"] = "127.0.0.1"
    command = [sys.executable, "-m", "metershipper", *arguments]
    with subprocess.Popen(command, stdout=out, stderr=errors, env=environment, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(PATIENCE_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
