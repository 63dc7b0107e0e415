"""A token in a file: one line, read anew each time, and never shown (case 70)."""

import asyncio
from pathlib import Path

import pytest

from metershipper.credentials import TokenFile, is_token
from metershipper.errors import ConfigError

SECRET = "s3cr3t~!#"


def read(path: Path) -> str:
    return asyncio.run(TokenFile(path).read())


@pytest.mark.parametrize("text", [SECRET, "a", "".join(map(chr, range(0x21, 0x7F)))])
def test_a_token_is_one_word_of_printable_ascii(text: str) -> None:
    assert is_token(text)


@pytest.mark.parametrize("text", ["", " ", "a b", "a\n", "a\tb", "ä", "a\x7f", "a\0"])
def test_anything_else_is_none(text: str) -> None:
    assert not is_token(text)


@pytest.mark.parametrize("around", ["", "\n", "\r\n", " \n\n"])
def test_the_file_may_end_as_editors_and_secret_stores_end_it(around: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes((SECRET + around).encode())
    assert read(path) == SECRET


def test_it_is_read_anew_each_time(tmp_path: Path) -> None:
    """It may be replaced while we run."""
    path = tmp_path / "token"
    path.write_text("old")
    token = TokenFile(path)
    assert asyncio.run(token.read()) == "old"
    (tmp_path / "new").write_text("new")
    (tmp_path / "new").rename(path)
    assert asyncio.run(token.read()) == "new"


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"two\nlines", "tökn".encode(), b"\xff", b"a\0b"])
def test_a_file_without_a_token_is_refused_and_not_shown(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: holds no token; it must be one line of printable ASCII without spaces"


@pytest.mark.parametrize(("name", "reason"), [("missing", "No such file or directory"), (".", "Is a directory")])
def test_a_file_that_can_not_be_read_is_named(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"the token can't be read: {reason}"):
        read(tmp_path / name)


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o640, False), (0o644, True), (0o604, True)])
def test_a_file_that_everybody_can_read_is_told(mode: int, warns: bool, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(SECRET)
    path.chmod(mode)
    warning = TokenFile(path).warning
    assert warning == (f"{path}: readable by every user of this machine; chmod 600 it" if warns else None)
    assert TokenFile(tmp_path / "missing").warning is None
