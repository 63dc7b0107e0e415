"""The documents say what is so: README, config.example.toml, CHANGELOG, --help, samples and CI cannot drift."""

import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from pydantic import BaseModel

import metershipper
from metershipper.books import Dead, Skip
from metershipper.cli import cli
from metershipper.config import Config, load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "config.example.toml"
TEST_COMMAND = "python3 -m venv .venv && .venv/bin/pip install -e '.[dev]' && .venv/bin/pytest"


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language in README, without the indentation of the list they stand in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", README, re.MULTILINE | re.DOTALL)
    return ["".join(line[len(indent) :] for line in text.splitlines(keepends=True)) for indent, text in found]


def console_commands() -> list[tuple[str, str]]:
    """Every command of README with the output printed below it."""
    commands = []
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block.replace("\\\n", ""), flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            commands.append((command, output))
    return commands


def leaf_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of the configuration with its default; list items as their own section."""
    for name, field in model.model_fields.items():
        nested = models_in(field.annotation)
        if nested:
            yield from leaf_keys(nested[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.default


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models a key may hold: itself, in a list, or as one form of several (`subject`: one table or a list)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in models_in(part)]


def as_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, frozenset | tuple):
        return "[]"
    return f'"{value}"' if isinstance(value, str | Path) else str(value)


def test_the_example_configuration_loads_as_it_is() -> None:
    config = load_config(EXAMPLE)
    assert config.inputs.files[0].path == "/var/log/kong/usage.log"
    assert config.openmeter.ingest_endpoint == "http://127.0.0.1:8888/api/v1/events"
    assert CliRunner().invoke(cli, ["check", "-c", str(EXAMPLE)]).exit_code == 0


@pytest.mark.parametrize(("key", "default"), list(leaf_keys(Config)), ids=lambda value: str(value)[:40])
def test_the_example_configuration_names_every_key_with_its_default(key: str, default: Any) -> None:
    """A secret in the file itself is possible and not shown; the rest stands there."""
    name = key.rpartition(".")[2]
    lines = [line for line in EXAMPLE.read_text().splitlines() if re.match(rf"(# )?{name} +=|(# )?{name} = ", line)]
    if name == "api_token":
        assert "METERSHIPPER_OPENMETER__API_TOKEN" in EXAMPLE.read_text()
        return
    assert lines, f"{key} is missing"
    if default is not None and "PydanticUndefined" not in str(default):
        shown = [line.removeprefix("# ") for line in lines]
        assert any(line.startswith(f"{name} = {as_toml(default)}") for line in shown), (key, default, shown)


def test_the_example_configuration_stands_when_all_its_defaults_are_uncommented(tmp_path: Path) -> None:
    """What stands behind "#" is valid too: each commented key in its section, alternatives of a key left out."""
    seen: set[str] = set()
    lines = []
    section = ""
    for line in EXAMPLE.read_text().splitlines():
        bare = re.sub(r"^# (?=\[|[a-z_]+ = )", "", line)
        if bare.startswith("["):
            section = bare.split("#")[0]
        name = f"{section}{bare.split(' = ')[0]}"
        if " = " in bare and not bare.startswith("#"):
            if name in seen or name.endswith("[openmeter]ca_file"):
                continue
            seen.add(name)
        lines.append(bare)
    path = tmp_path / "config.toml"
    path.write_text("\n".join(lines))
    assert load_config(path).metering.attributes[0].event_property_name == "department"


def test_toml_in_the_readme_loads(tmp_path: Path) -> None:
    first, *parts = blocks("toml")
    path = tmp_path / "config.toml"
    path.write_text("".join([first, *parts]))
    config = load_config(path)
    assert config.metering.subjects[0].field == "username"
    assert config.inputs.http_log is not None and config.inputs.http_log.token_file


def test_the_map_command_prints_what_the_readme_shows() -> None:
    ((command, output),) = [(c, o) for c, o in console_commands() if c.startswith("metershipper map")]
    words = shlex.split(command.partition(">")[0])
    shown = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}
    )
    assert (shown.returncode, shown.stderr) == (0, output)


def test_the_check_command_prints_what_the_readme_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the last line, which needs Konnect; its words are those of `check` for a real endpoint."""
    ((_, output),) = [(c, o) for c, o in console_commands() if c.startswith("metershipper check")]
    block = blocks("toml")[0]
    log, token = tmp_path / "usage.log", tmp_path / "token"
    log.write_bytes(b"x" * 151_210)
    token.write_text("spat_x")
    token.chmod(0o600)
    (tmp_path / "config.toml").write_text(
        block.replace("/var/log/kong/usage.log", str(log)).replace("/run/secrets/openmeter-token", str(token))
    )
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(cli, ["check", "-c", "config.toml"])
    assert shown.output.replace(str(log), "/var/log/kong/usage.log").splitlines() == output.splitlines()[:-1]


def test_the_readme_names_every_command_and_no_other() -> None:
    assert set(re.findall(r"^\| `metershipper ([\w-]+)`", README, re.MULTILINE)) == set(cli.commands)


def test_every_command_of_the_readme_exists() -> None:
    """Every `metershipper COMMAND --option` anywhere in README has that command with that option."""
    used = re.findall(r"metershipper (run|replay|map|check|status|sandbox|demo)\b([^`|\n]*)", README)
    assert used
    for command, rest in used:
        options = {option for parameter in cli.commands[command].params for option in parameter.opts}
        assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest)) - {"-v"} <= options, (command, rest)


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_help_opens_with_a_line_that_fits_the_overview(command: str) -> None:
    shown = CliRunner().invoke(cli, [command, "--help"])
    assert shown.exit_code == 0
    assert shown.output.startswith(f"Usage: cli {command}")
    overview = CliRunner().invoke(cli, ["--help"], terminal_width=80).output
    (line,) = re.findall(rf"^  {command} .*$", overview, re.MULTILINE)
    assert not line.endswith("..."), line


def test_the_readme_names_every_reason() -> None:
    for reason in (*Skip, *Dead):
        assert f"`{reason}`" in README, reason


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    newest = re.search(r"^## (\S+) - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert metershipper.__version__ == project["version"] == newest[1]


def test_ci_runs_the_test_command_of_the_readme() -> None:
    steps = (ROOT / ".ci" / "run").read_text()
    assert TEST_COMMAND in [command for command, _ in console_commands()]
    for step in re.split(r" && ", TEST_COMMAND)[1:]:
        assert all(word in steps for word in step.split()), step


def test_every_way_to_configure_http_log_says_the_same() -> None:
    """decK and the Kong Ingress Controller in samples, the Admin API in README: a queue that is patient (case 60)."""
    deck = yaml.safe_load((ROOT / "samples" / "kong-http-log.yaml").read_text())["plugins"][0]["config"]
    kic = yaml.safe_load((ROOT / "samples" / "kong-http-log.kic.yaml").read_text())
    (admin,) = [block for block in blocks("console") if block.startswith("$ curl")]
    body = json.loads(admin.partition("-d '")[2].rpartition("'")[0])
    assert kic["config"]["queue"] == deck["queue"]
    assert body["config"]["queue"].items() <= deck["queue"].items()
    assert 100 <= deck["queue"]["max_batch_size"] <= 200
    assert deck["queue"]["max_retry_time"] == 3600
    assert kic["plugin"] == body["name"] == "http-log"


def test_samples_are_what_their_generator_writes(tmp_path: Path) -> None:
    generator = runpy.run_path(str(ROOT / "samples" / "generate.py"))
    generator["write_log"](tmp_path)
    generator["write_events"](tmp_path)
    for name in ("usage.log", "usage.events.ndjson"):
        assert (tmp_path / name).read_bytes() == (ROOT / "samples" / name).read_bytes(), name


def test_links_of_the_documents_lead_somewhere() -> None:
    for path in (ROOT / "README.md", ROOT / "samples" / "README.md", ROOT / "CHANGELOG.md"):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
            assert (path.parent / link).exists(), (path.name, link)
