"""Which files the paths of a replay name: files, globs and directories, and what of them is not worth a look.

Only looks at names and kinds; opens nothing (`replay_survey` does).
"""

import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from metershipper.errors import UsageError
from metershipper.records import Identity
from metershipper.rotation import FOREIGN_SUFFIXES, LEFT_BEHIND


@dataclass(slots=True)
class Named:
    """The files that paths name, each once; `sought`: those that directories or patterns brought.

    Of these `skipped` were passed over, and `unreadable` is what could not be looked into; each with why, by path.
    """

    paths: list[str] = field(default_factory=list)
    sought: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)


def named_by(paths: Sequence[str]) -> Named:
    """Files, globs and directories as files. Raises: UsageError naming what is none, or names nothing."""
    named, seen = Named(), set[Identity]()
    for path in paths:
        if path == "-":
            raise UsageError(
                "-: what comes by a pipe has no identity, so nobody could know it again; save it to a file"
            )
        is_literal = os.path.lexists(path) or not glob.has_magic(path)
        found = [path] if is_literal else sorted(glob.glob(path, recursive=True))
        if not found:
            raise UsageError(f"{path}: no file of that name")
        for file in _files_of(path, named) if is_literal else _sought(found, named):
            status = os.stat(file)
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                named.paths.append(file)
                if file != path:
                    named.sought.add(file)
    return named


def _files_of(path: str, named: Named) -> Iterator[str]:
    try:
        path.encode()
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            os.scandir(path).close()
    except UnicodeEncodeError:
        raise UsageError(f"{path!a}: the name is not UTF-8; rename it") from None
    except OSError as error:
        raise UsageError(f"{path}: can't be read: {error.strerror}") from None
    if stat.S_ISREG(status.st_mode):
        yield path
    elif not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{path}: not a regular file, so it has no content that could be known again")
    else:
        yield from _files_in(path, named)


def _files_in(directory: str, named: Named) -> Iterator[str]:
    def tell(error: OSError) -> None:
        named.unreadable[os.path.abspath(error.filename)] = f"can't be listed: {error.strerror}"

    for place, directories, names in os.walk(directory, onerror=tell):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        linked = [name for name in directories if os.path.islink(os.path.join(place, name))]
        named.skipped |= {os.path.join(os.path.abspath(place), name): "a link to a directory" for name in linked}
        yield from _sought([os.path.join(place, name) for name in sorted(names)], named)


def _sought(paths: Iterable[str], named: Named) -> Iterator[str]:
    """Those that are worth a look, of what was found and not named."""
    for path in paths:
        if os.path.isdir(path):
            continue  # of a pattern
        try:
            reason = _why_not(path, os.path.basename(path))
        except FileNotFoundError:
            reason = "a link that leads nowhere"
        except OSError as error:
            named.unreadable[os.path.abspath(path)] = f"can't be read: {error.strerror}"
            continue
        if reason:
            named.skipped[os.path.abspath(path)] = reason
        else:
            yield path


def _why_not(path: str, name: str) -> str | None:
    """Why a file that was found is passed over, by its name and kind."""
    if name.startswith("."):
        return "hidden"
    if name.endswith(LEFT_BEHIND):
        return "left behind by an editor or a copy"
    if name.endswith(FOREIGN_SUFFIXES):
        return "compressed in a way that can't be unpacked here"
    try:
        path.encode()
        return None if stat.S_ISREG(os.stat(path).st_mode) else "not a regular file"
    except UnicodeEncodeError:
        return "the name is not UTF-8"
