"""The command line: every mistake of a user is one line and an exit code, never a stack trace. Results go to stdout,
the rest to stderr (CASES 33, 34, 51, 70, 75).
"""

import contextlib
import io
import json
import logging
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import httpx
import pytest
from click.testing import CliRunner, Result

from metershipper import __main__, __version__
from metershipper.cli import cli
from metershipper.traffic import Traffic

COMMANDS = ["check", "dead-letters", "demo", "import-kong", "map", "replay", "run", "sandbox", "status"]
SECRET = "spat_V3ryS3cret"
ENTRIES = 5


@pytest.fixture(autouse=True)
def process_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """`run` changes these for its whole process, which here is that of the tests."""
    monkeypatch.chdir(tmp_path)
    levels = {name: logging.getLogger(name).level for name in ("httpx", "httpcore", "watchfiles")}
    mask = os.umask(0o022)
    yield
    os.umask(mask)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def invoke(*arguments: str | Path, stdin: bytes | None = None) -> Result:
    """Run a command; whatever it ends with is an exit code and no exception."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert "Traceback" not in result.output
    return result


def refused(exit_code: int, *arguments: str | Path) -> str:
    """The one line a refused command says."""
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    return lines[0].removeprefix("metershipper: ")


def write_log(directory: Path, entries: int = ENTRIES) -> Path:
    traffic = Traffic(1, started_at_ms=1_780_000_000_000)
    path = directory / "usage.log"
    path.write_bytes(b"".join(traffic.line() for _ in range(entries)))
    return path


def write_config(
    directory: Path, url: str = "http://127.0.0.1:1/events", state: str = "state", extra: str = ""
) -> Path:
    path = directory / "config.toml"
    path.write_text(
        f'[openmeter]\ningest_endpoint = "{url}"\n{extra}\n[openmeter.batch]\nmax_wait_seconds = 0.01\n'
        f'[[inputs.files]]\npath = "{directory}/usage.log"\n[state]\ndirectory = "{state}"\n'
    )
    return path


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# --- help


def test_the_help_lists_every_command() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert sorted(cli.commands) == COMMANDS
    listed = result.stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed if line.startswith("  ") and line[2] != " "] == COMMANDS
    assert not [line for line in listed if line.endswith("...")]  # no summary is cut
    assert "Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 partly done." in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_help_with_a_summary_and_words_for_every_option(name: str, option: str) -> None:
    result = invoke(name, option)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: cli {name} [OPTIONS]")
    command = cli.commands[name]
    summary = (command.help or "").split("\n\n")[0]
    assert summary.endswith(".")
    assert f"\n  {summary}\n" in result.stdout  # on one line
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert all(each.help for each in options)
    assert not [each for each in options if "token" in str(each.name)]  # secrets are never on a command line


def test_no_command_shows_the_help() -> None:
    result = invoke()
    assert result.exit_code == 2
    assert "Commands:" in result.output


def test_the_version_is_that_of_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["metershipper", "--version"])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"metershipper, version {__version__}\n"


def test_it_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "metershipper", "--version"], capture_output=True, text=True, check=True
    )
    monkeypatch.setattr(sys, "argv", ["metershipper", "status", "-c", "none.toml"])
    monkeypatch.delitem(sys.modules, "metershipper.__main__")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("metershipper", run_name="__main__", alter_sys=True)
    assert run.stdout == f"metershipper, version {__version__}\n"
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("metershipper: none.toml: no such file")


# --- which configuration


@pytest.mark.parametrize("command", ["run", "check", "status"])
def test_without_a_configuration_it_says_how_to_name_one(command: str) -> None:
    assert refused(2, command) == (
        "config.toml: no such file here; name one with -c or $METERSHIPPER_CONFIG, or copy config.example.toml"
    )


@pytest.mark.parametrize("command", ["run", "check", "status", "map"])
def test_a_configuration_that_is_not_there_is_named(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "none.toml: no such file; name one with -c, or copy config.example.toml"
    assert refused(2, command, "-c", "none.toml") == words
    monkeypatch.setenv("METERSHIPPER_CONFIG", "none.toml")
    assert refused(2, command) == words


def test_the_option_comes_before_the_variable_and_that_before_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.toml", "variable.toml", "option.toml"):
        (tmp_path / name).write_text(f'[metering]\nsource = "from-{name}"')

    def source(*arguments: str) -> str:
        event = json.loads(invoke("map", *arguments, stdin=write_log(tmp_path).read_bytes()).stdout.splitlines()[0])
        return str(event["source"])

    assert source() == "from-config.toml"
    monkeypatch.setenv("METERSHIPPER_CONFIG", "variable.toml")
    assert source() == "from-variable.toml"
    assert source("-c", "option.toml") == "from-option.toml"
    monkeypatch.setenv("METERSHIPPER_CONFIG", "")
    assert source() == "from-config.toml"


def test_every_problem_of_a_configuration_is_a_line_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("x = 1\n[openmeter]\ntimeout_seconds = 0\n")
    result = invoke("check")
    assert (result.exit_code, result.stdout) == (2, "")
    assert sorted(result.stderr.splitlines()) == [
        "metershipper: config.toml: openmeter.timeout_seconds: should be greater than 0 (it is 0)",
        "metershipper: config.toml: x: unknown key; known here are inputs, metering, openmeter, state",
    ]


# --- wrong usage


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["--nonsense"],
        ["run", "--nonsense"],
        ["run", "extra"],
        ["run", "--grace-seconds", "soon"],
        ["run", "--grace-seconds", "-1"],
        ["run", "--grace-seconds", "3601"],
        ["run", "-c"],
        ["check", "--conect"],
        ["status", "--jsn"],
        ["map", "--nonsense"],
        ["sandbox", "--database", "/"],
        ["demo", "--keep", sys.executable],
    ],
    ids=lambda arguments: " ".join(arguments[:-1]) or arguments[0],
)
def test_wrong_usage_is_exit_code_2_with_help_at_hand(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error: " in result.stderr


def test_a_grace_period_that_is_no_number_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    assert refused(2, "run", "--grace-seconds", "nan") == "--grace-seconds nan: not a number of seconds"


# --- map


def test_map_needs_no_configuration_and_keeps_results_and_summary_apart(tmp_path: Path) -> None:
    log = write_log(tmp_path, 20)
    from_file, from_stdin = invoke("map", log), invoke("map", stdin=log.read_bytes())
    assert from_file.exit_code == from_stdin.exit_code == 0
    assert from_file.stdout == from_stdin.stdout
    events = [json.loads(line) for line in from_file.stdout.splitlines()]
    assert {event["specversion"] for event in events} == {"1.0"}
    assert from_file.stderr.startswith("20 lines: ")
    assert f"{len(events)} events" in from_file.stderr
    assert list(tmp_path.iterdir()) == [log]  # no state


def test_map_names_a_file_it_can_not_read(tmp_path: Path) -> None:
    for path, why in {"none.log": "No such file or directory", str(tmp_path): "Is a directory"}.items():
        result = invoke("map", path)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.splitlines()[-1] == f"metershipper: {path}: can't be read: {why}"


# --- status


def test_status_before_the_first_run_says_what_to_do(tmp_path: Path) -> None:
    write_config(tmp_path)
    assert refused(1, "status") == ("state/checkpoint.sqlite: nothing was recorded yet; start `metershipper run` first")


def test_status_of_a_state_of_another_user_is_one_line(tmp_path: Path) -> None:
    """The state directory is 0700: any other user meets this."""
    state = tmp_path / "state"
    state.mkdir()
    config = write_config(tmp_path, state=f"{state}")
    invoke("status", "-c", config)  # all that is imported is imported now, with rights to read it
    user = os.geteuid()
    state.chmod(0o000)
    for each in (tmp_path, *tmp_path.parents[:2]):
        each.chmod(0o755)
    if user == 0:  # to root no mode means anything
        os.seteuid(65534)
    try:
        words = refused(1, "status", "-c", config)
    finally:
        os.seteuid(user)
        state.chmod(0o700)
    assert words == f"{state}: can't be read: Permission denied"


def test_status_of_a_name_that_can_not_be_is_one_line(tmp_path: Path) -> None:
    write_config(tmp_path, state="x" * 300)
    assert refused(1, "status").endswith("can't be read: File name too long")


# --- run


@pytest.mark.parametrize("state", ["file/state", "file", "/proc/nonexistent", "x" * 300])
def test_a_state_directory_that_can_not_be_is_refused_before_anything_is_read(state: str, tmp_path: Path) -> None:
    """CASES 33."""
    write_log(tmp_path)
    (tmp_path / "file").touch()
    write_config(tmp_path, state=state)
    words = refused(1, "run")
    assert words.startswith(f"{state}: can't be created: ")
    assert words.endswith("; create it for this user or set state.directory")


@pytest.mark.parametrize(
    ("token_file", "problem"),
    [
        ("none", "none: the token can't be read: No such file or directory"),
        (".", ".: the token can't be read: Is a directory"),
        ("x" * 300, f"{'x' * 300}: the token can't be read: File name too long"),
        ("usage.log", "usage.log: holds no token; it must be one line of printable ASCII without spaces"),
    ],
)
def test_a_token_file_without_a_token_stops_the_start(token_file: str, problem: str, tmp_path: Path) -> None:
    """CASES 70: what the file holds is not shown."""
    (tmp_path / "usage.log").write_text(f"{SECRET} {SECRET}")
    (tmp_path / "usage.log").chmod(0o600)
    write_config(tmp_path, extra=f'api_token_file = "{token_file}"')
    assert refused(2, "run") == problem
    assert refused(2, "check") == problem


def test_a_run_without_input_or_endpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    assert refused(2, "run").startswith("config.toml: no input; add [[inputs.files]]")
    (tmp_path / "config.toml").write_text('[[inputs.files]]\npath = "usage.log"')
    assert refused(2, "run").startswith("config.toml: openmeter.ingest_endpoint is missing")
    assert not (tmp_path / "state").exists()


class Watched(logging.Handler):
    """Lets another thread wait for a log line."""

    def __init__(self) -> None:
        super().__init__()
        self._seen = threading.Condition()
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        with self._seen:
            self._lines.append(record.getMessage())
            self._seen.notify_all()

    def wait_for(self, words: str) -> None:
        with self._seen:
            assert self._seen.wait_for(lambda: any(words in line for line in self._lines), 20), self._lines

    def text(self) -> str:
        return "\n".join(self._lines)


@pytest.fixture
def log_lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    handler = Watched()
    logger = logging.getLogger("metershipper")
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.manager._clear_cache()  # type: ignore[attr-defined]
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@contextlib.contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Act in another thread; a failure there fails the test, and stops what it was to stop."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            act()
        except BaseException as error:
            failures.append(error)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=guarded)
    thread.start()
    yield
    thread.join(20)
    assert not failures, failures


@pytest.fixture
def sandbox_url(tmp_path: Path) -> Iterator[str]:
    command = [
        sys.executable,
        "-m",
        "metershipper",
        "sandbox",
        "--listen",
        "127.0.0.1:0",
        "--database",
        "sandbox.sqlite",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_ends_in_order_and_status_tells_what_it_did(
    number: signal.Signals, tmp_path: Path, sandbox_url: str, log_lines: Watched
) -> None:
    """CASES 51, 70, 75: one signal, everything delivered and checkpointed, exit code 0; the token in no output."""
    write_log(tmp_path)
    (tmp_path / "token").write_text(SECRET)
    (tmp_path / "token").chmod(0o644)
    write_config(tmp_path, f"{sandbox_url}/api/v1/events", extra='api_token_file = "token"')

    def stop() -> None:
        log_lines.wait_for("started")
        os.kill(os.getpid(), number)

    with meanwhile(stop):
        result = invoke("run", "--grace-seconds", "10")
    assert (result.exit_code, result.stdout) == (0, "")
    said = log_lines.text()
    assert f"{number.name}: stopping" in said
    assert re.search(r"stopped: (\d+) events were in flight, \1 finished, 0 events left for the next start", said)
    assert "token: readable by every user of this machine; chmod 600 it" in said
    assert SECRET not in said + result.output
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700

    table, as_json = invoke("status"), invoke("status", "--json")
    assert table.exit_code == as_json.exit_code == 0
    report = json.loads(as_json.stdout)
    assert report["running"] is False
    assert report["books"]["balanced"] is True
    assert "state: not running" in table.stdout
    assert f"{report['books']['lines']} lines" in table.stdout
    counts = httpx.get(f"{sandbox_url}/sandbox/counts", trust_env=False).json()
    assert counts["events"] == report["books"]["events"]


def test_a_second_signal_ends_a_run_at_once_with_exit_code_1(tmp_path: Path, log_lines: Watched) -> None:
    """CASES 51: the endpoint is down, the grace period is long, and whoever stops it twice means it."""
    write_log(tmp_path)
    write_config(tmp_path, f"http://127.0.0.1:{closed_port()}/api/v1/events")

    def stop_twice() -> None:
        log_lines.wait_for("not delivered: the connection was refused")
        os.kill(os.getpid(), signal.SIGTERM)
        log_lines.wait_for("SIGTERM: stopping")
        os.kill(os.getpid(), signal.SIGINT)

    with meanwhile(stop_twice):
        result = invoke("run", "--grace-seconds", "3600")
    assert result.exit_code == 1
    assert "stopped at once: " in log_lines.text()


def test_a_second_run_on_one_state_directory_is_refused_by_name(tmp_path: Path, log_lines: Watched) -> None:
    """CASES 34: the second exits with 2 and names directory and process; the first goes on."""
    write_log(tmp_path)
    write_config(tmp_path, f"http://127.0.0.1:{closed_port()}/api/v1/events")
    second: list[subprocess.CompletedProcess[str]] = []

    def start_second() -> None:
        log_lines.wait_for("not delivered")
        command = [sys.executable, "-m", "metershipper", "run"]
        second.append(subprocess.run(command, capture_output=True, text=True, timeout=20))
        second.append(subprocess.run([*command[:-1], "status"], capture_output=True, text=True, timeout=20))
        os.kill(os.getpid(), signal.SIGTERM)

    with meanwhile(start_second):
        first = invoke("run", "--grace-seconds", "0")
    assert first.exit_code == 0
    run, status = second
    assert run.returncode == 2
    assert run.stderr == (
        f"metershipper: state: in use by process {os.getpid()}; one state directory serves one process: "
        "stop that one, or give this one its own state.directory\n"
    )
    assert status.returncode == 0
    assert f"state: running as process {os.getpid()}" in status.stdout


def test_the_log_of_a_run_holds_no_request_lines(tmp_path: Path, log_lines: Watched) -> None:
    """CASES 70: httpx logs each URL at INFO; `run` silences it, and sets what it writes to be private."""
    write_log(tmp_path)
    write_config(tmp_path, f"http://127.0.0.1:{closed_port()}/api/v1/events")

    def stop() -> None:
        log_lines.wait_for("not delivered")
        os.kill(os.getpid(), signal.SIGTERM)

    with meanwhile(stop):
        assert invoke("run", "--grace-seconds", "0").exit_code == 0
    assert {logging.getLogger(name).getEffectiveLevel() for name in ("httpx", "httpcore")} == {logging.WARNING}
    assert os.umask(0o022) == 0o077


# --- sandbox


@pytest.mark.parametrize(
    "listen",
    [
        "8888",
        ":8888",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:http",
        "127.0.0.1:-1",
        "127.0.0.1:65536",
        "127.0.0.1:²",
        "127.0.0.1:" + "9" * 5000,
        "127.0.0.1:1:",
        "",
    ],
)
def test_an_address_that_is_none_is_refused_with_an_example(listen: str) -> None:
    assert refused(2, "sandbox", "--listen", listen) == f"--listen {listen}: not HOST:PORT, for instance 127.0.0.1:8888"


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert refused(2, "sandbox", "--listen", address).startswith(f"--listen {address}: Address already in use")


@pytest.mark.parametrize("host", ["nonexistent.invalid", "192.0.2.1", "x" * 300])
def test_a_host_that_is_not_this_machine_is_named(host: str) -> None:
    assert refused(2, "sandbox", "--listen", f"{host}:0").startswith(f"--listen {host}:0: ")


def test_a_database_that_can_not_be_opened_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "none" / "sandbox.sqlite"
    words = refused(2, "sandbox", "--listen", "127.0.0.1:0", "--database", path)
    assert words == f"--database {path}: unable to open database file"


def test_the_sandbox_says_where_it_listens_and_ends_with_exit_code_0(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    statuses: list[int] = []

    def post_and_stop() -> None:
        with open(reading, encoding="utf-8") as said:
            url = said.readline().strip()
        headers = {"Content-Type": "application/cloudevents-batch+json"}
        answer = httpx.post(f"{url}/api/v1/events", content=b"[]", headers=headers, trust_env=False)
        statuses.append(answer.status_code)
        os.kill(os.getpid(), signal.SIGTERM)

    with open(writing, "w", encoding="utf-8") as out, meanwhile(post_and_stop):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out.buffer, write_through=True))
        try:
            ended = cli.main(["sandbox", "--listen", "127.0.0.1:0"], standalone_mode=False)
        finally:
            sys.stdout.detach()  # type: ignore[union-attr]
            monkeypatch.undo()
    assert ended is None
    assert statuses == [204]


# --- demo


def test_a_demo_that_can_not_keep_its_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert refused(2, "demo", "--keep", "file/kept") == "--keep file/kept: can't be used: Not a directory"


def test_a_demo_does_not_mix_with_an_earlier_one(tmp_path: Path) -> None:
    """It would count the earlier one's lines and say that its own books do not balance."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "usage.log").touch()
    assert refused(2, "demo", "--keep", "kept") == "--keep kept: not empty; name a new or an empty directory"
