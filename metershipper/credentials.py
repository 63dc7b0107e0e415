"""A token in a file: read when it is needed, since it may be replaced while we run. Never shows what the file holds."""

import re
import stat
from pathlib import Path

import aiofiles

from metershipper.errors import ConfigError


def is_token(text: str) -> bool:
    """Whether `text` can stand in an Authorization header: one word of printable ASCII."""
    return bool(re.fullmatch(r"[\x21-\x7e]+", text))


class TokenFile:
    """One line with one token."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def read(self) -> str:
        """The token now. Raises ConfigError naming the file."""
        try:
            async with aiofiles.open(self._path, encoding="ascii") as file:
                text = (await file.read()).strip()
        except OSError as error:
            raise ConfigError(f"{self._path}: the token can't be read: {error.strerror}") from None
        except UnicodeDecodeError:
            text = ""
        if not is_token(text):
            raise ConfigError(f"{self._path}: holds no token; it must be one line of printable ASCII without spaces")
        return text

    @property
    def warning(self) -> str | None:
        """What is unsafe about the file, if anything."""
        try:
            readable_by_others = bool(self._path.stat().st_mode & stat.S_IROTH)
        except OSError:  # whoever reads it says so
            return None
        return f"{self._path}: readable by every user of this machine; chmod 600 it" if readable_by_others else None
