"""What a newcomer stumbles over is said in one clear line, and nothing that costs usage is passed over in silence."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from metershipper.checkpoint import Checkpoint
from metershipper.cli import cli
from metershipper.config import FileInput, load_config
from metershipper.errors import ConfigError
from metershipper.files import FileSet
from metershipper.state import state_problem
from tests.integration.support import FaultyEndpoint, Site, append, stop

LINE = b'{"request":{"id":"r"},"started_at":1782907200015}\n'


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    (tmp_path / "state").mkdir()
    with Checkpoint(tmp_path / "state") as opened:
        yield opened


def scanned(checkpoint: Checkpoint, *paths: Path) -> FileSet:
    files = FileSet([FileInput(path=str(path)) for path in paths], checkpoint, lambda: 0.0)
    files.load()
    files.scan()
    return files


def test_rotated_files_that_are_not_read_are_named_once(
    tmp_path: Path, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """At the first start, and after the state was lost: what is not billed is said, with what to do."""
    for name in ("usage.log", "usage.log.1", "usage.log-20261121"):
        (tmp_path / name).write_bytes(LINE.replace(b'"r"', f'"{name}"'.encode()))
    files = scanned(checkpoint, tmp_path / "usage.log")
    files.scan()
    files.close()
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sorted(told) == [
        f"{tmp_path}/{name}: rotated before its log was first followed, so it is not read; "
        "to bill it too, list it as an input, or `metershipper replay` it"
        for name in ("usage.log-20261121", "usage.log.1")
    ]


def test_a_rotated_file_that_is_listed_as_an_input_is_read(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """The way out that the warning names works, also after the warning."""
    (tmp_path / "usage.log").write_bytes(LINE)
    (tmp_path / "usage.log.1").write_bytes(b"".join(b'{"n":%d}\n' % n for n in range(3)))
    scanned(checkpoint, tmp_path / "usage.log").close()
    files = scanned(checkpoint, tmp_path / "usage.log", tmp_path / "usage.log.1")
    read = b""
    while block := files.next_block():
        read += block.data
    files.close()
    assert read.count(b"\n") == 4


def test_a_log_that_is_not_there_is_told_once(
    tmp_path: Path, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    files = scanned(checkpoint, tmp_path / "usage.log")
    files.scan()
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/usage.log: no such file yet; it is followed as soon as it appears"
    ]
    files.close()


def test_dead_letters_are_told_in_the_log_as_a_sum(tmp_path: Path) -> None:
    """A person is needed: the log of `run` says so, once for a flood."""
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        append(site.log, b"not json\n" * 20, b"[]\n")
        with site.running() as process:
            site.wait_for_lines(process, 21)
            append(site.log, b"not json\n")
            site.wait_for_lines(process, 22)
            assert stop(process) == 0
    told = [line for line in site.errors.read_text().splitlines() if "ERROR" in line]
    assert len(told) == 1
    assert (
        "kept as dead letters: 20 not_json, 1 not_an_entry; nothing is lost, see `metershipper dead-letters list`"
        in told[0]
    )
    shown = CliRunner().invoke(cli, ["status", "-c", str(site.config)]).output
    assert "22 dead letters" in shown
    assert "dead letters: not_json 21" in shown


def test_a_variable_with_one_underscore_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METERSHIPPER_OPENMETER_API_TOKEN", "spat_x")
    with pytest.raises(ConfigError) as refused:
        load_config(None)
    assert str(refused.value) == (
        "environment: METERSHIPPER_OPENMETER_API_TOKEN: unknown; did you mean METERSHIPPER_OPENMETER__API_TOKEN?"
    )


def test_the_environment_alone_is_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METERSHIPPER_OPENMETER__INGEST_ENDPOINT", "http://127.0.0.1:8888/api/v1/events")
    monkeypatch.setenv("METERSHIPPER_INPUTS__FILES", '[{"path": "/var/log/kong/usage.log"}]')
    shown = CliRunner().invoke(cli, ["check"])
    assert shown.exit_code == 0
    assert shown.output.startswith("environment is valid.")


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ('[inputs]\nfiles = "x"', "inputs.files: should be a list"),
        ('[metering]\npersonal_fields = "client_ip"', "metering.personal_fields: should be a list"),
        ("[openmeter]\nbatch = 5", "openmeter.batch: should be a table"),
        ('[metering]\nsource = "a b"', "metering.source: holds a character that can't stand there"),
        ('[[inputs.files]]\npath = "~/usage.log"', "inputs.files.0.path: ~ is not expanded; write the whole path"),
    ],
)
def test_mistakes_are_told_in_the_words_of_the_file(tmp_path: Path, toml: str, problem: str) -> None:
    (tmp_path / "config.toml").write_text(toml)
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / "config.toml")
    assert str(refused.value) == f"{tmp_path}/config.toml: {problem}"


def test_a_state_directory_that_can_not_be_is_noted_by_check(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert state_problem(tmp_path / "new" / "state") is None
    assert (
        state_problem(tmp_path / "file" / "x")
        == f"{tmp_path}/file/x: can't be created: {tmp_path}/file is not a directory"
    )
    config = tmp_path / "config.toml"
    config.write_text(
        f'[openmeter]\ningest_endpoint = "http://127.0.0.1:8888/api/v1/events"\n'
        f'[[inputs.files]]\npath = "{tmp_path}"\n[state]\ndirectory = "{tmp_path}/file"\n'
    )
    shown = CliRunner().invoke(cli, ["check", "-c", str(config)]).output
    assert f"Note    {tmp_path}/file: can't be created" in shown
    assert f"Reads   {tmp_path}, which is a directory and not followed" in shown


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_state_directory_of_another_user_is_noted_by_check() -> None:
    assert "not writable by this user" in (state_problem(Path("/etc/metershipper-state")) or "")


@pytest.mark.parametrize(
    ("redirection", "words", "exit_code"),
    [
        ("> /dev/full", "the output can't be written: No space left on device", 1),
        (">&-", "map needs its standard input and output open", 2),
        ("| head -c 1", "", 0),
    ],
)
def test_an_output_that_can_not_be_written_is_no_traceback(
    tmp_path: Path, redirection: str, words: str, exit_code: int
) -> None:
    (tmp_path / "usage.log").write_bytes(LINE.replace(b"}\n", b',"consumer":{"id":"c"}}\n') * 5000)
    command = f"{sys.executable} -m metershipper map usage.log {redirection}"
    shown = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == exit_code
    assert words in shown.stderr
    assert "Traceback" not in shown.stderr
