"""What stands in the directories: the logs that the inputs name, and files that may be rotated parts of them.

Blocks while it looks. Opens nothing and knows no content: a name and an inode only say what is worth opening.
"""

import fnmatch
import glob
import logging
import os
import stat
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from metershipper.config import FileInput
from metershipper.records import Identity
from metershipper.rotation import is_compressed_name, logs_of

log = logging.getLogger("metershipper.tailer")

# A directory whose listing did not change is listed again after this, for a released file that grew after all.
LISTING_SECONDS = 30.0
# Within one tick of its clock a directory can change again unseen, so that a fresh listing is not relied on.
FRESH_SECONDS = 2.0
# Directories beneath that of a log are looked through for logrotate's `olddir`; where there are more, it is none.
MAX_SUBDIRECTORIES = 64


@dataclass(frozen=True, slots=True)
class Found:
    """A file seen in a directory. `log`: the path of the log that it is or may be a part of; `input`: what names that.

    `from_end`: only what comes is read of it; of something compressed, if it was not there at first. `named`: it is
    called as rotation would call it, and not just known by its inode. `listed`: an input names it. `whole`: of a log
    that an input names, the other one whose copy it may be (`usage.log*`). `beneath`: it is in a directory beneath that
    of the log.
    """

    path: str
    log: str
    input: str
    status: os.stat_result
    from_end: bool = False
    named: bool = True
    listed: bool = False
    whole: str | None = None
    beneath: bool = False

    @property
    def identity(self) -> Identity:
        """Device and inode."""
        return self.status.st_dev, self.status.st_ino

    @property
    def directory(self) -> str:
        """Where it is."""
        return os.path.dirname(self.path) or "."


@dataclass(slots=True)
class Listing:
    """The disk as the inputs see it. `clock` is monotonic, in seconds."""

    inputs: Sequence[FileInput]
    clock: Callable[[], float]
    failures: set[str] = field(default_factory=set)  # what could not be looked at since this was last cleared
    _listed: dict[str, tuple[int, float]] = field(default_factory=dict)  # directory: its mtime, when it was listed
    _beneath: dict[str, list[str]] = field(default_factory=dict)  # directory: those in it
    _complaints: dict[str, str] = field(default_factory=dict)
    _notices: dict[str, str] = field(default_factory=dict)

    def logs(self, known_inputs: Collection[str]) -> tuple[dict[Identity, Found], list[Found]]:
        """The regular files that the inputs name: the logs, and what is compressed beside one (`usage.log*`).

        Args: `known_inputs`, those for which `read_from = "end"` says nothing any more.
        """
        seen: dict[Identity, tuple[str, os.stat_result, FileInput]] = {}
        for entry in self.inputs:
            paths = self._named_by(entry.path)
            if not any(map(os.path.lexists, paths)):
                self.complain(entry.path, "no such file yet; it is followed as soon as it appears", failed=False)
            for path in paths:
                status = self._regular(path)
                if status is not None:
                    seen.setdefault((status.st_dev, status.st_ino), (path, status, entry))
        paths_seen = {path for path, _, _ in seen.values()}
        logs: dict[Identity, Found] = {}
        compressed: list[Found] = []
        for identity, (path, status, entry) in seen.items():
            whole = _whole_of(path, paths_seen)
            from_end = entry.read_from == "end"
            if not is_compressed_name(path):
                from_end = from_end and entry.path not in known_inputs
                logs[identity] = Found(path, path, entry.path, status, from_end, listed=True, whole=whole)
            elif whole is not None:
                compressed.append(Found(path, whole, entry.path, status, from_end, listed=True))
            else:
                self.complain(path, "compressed, and no log stands beside it, so it is not followed", failed=False)
        return logs, compressed

    def _named_by(self, pattern: str) -> list[str]:
        if not glob.has_magic(pattern):
            return [pattern]
        directory = os.path.dirname(pattern) or "."
        try:  # a directory that can't be listed is an empty one for `glob`
            if not glob.has_magic(directory):
                os.scandir(directory).close()
        except FileNotFoundError:
            pass
        except OSError as error:
            self.complain(directory, f"can't be listed: {error.strerror}; trying again")
        return sorted(glob.glob(pattern, recursive=True))

    def _regular(self, path: str) -> os.stat_result | None:
        try:
            path.encode()
            status = os.stat(path)
        except FileNotFoundError:
            return None
        except UnicodeEncodeError:
            self.complain(path, "the name is not UTF-8, so it is not followed", failed=False)
            return None
        except OSError as error:
            self.complain(path, f"can't be looked at: {error.strerror}; trying again")
            return None
        if stat.S_ISREG(status.st_mode):
            return status
        if not stat.S_ISDIR(status.st_mode) or any(path == entry.path for entry in self.inputs):
            self.complain(path, "not a regular file, so it is not followed", failed=False)
        return None

    def beside(self, logs: Mapping[str, str], log_of: Callable[[Identity], str | None]) -> dict[str, list[Found]]:
        """What may be rotated parts of `logs`, by directory; only of directories that changed since a recent look.

        Args: `logs`, the input of each log; `log_of`, the log of a file that was read before and is not open.
        """
        bases: dict[str, dict[str, str]] = {}
        for path in logs:
            for place in {path, os.path.realpath(path) if os.path.islink(path) else path}:
                directory, name = os.path.split(place)
                bases.setdefault(directory or ".", {})[name] = path
        found: dict[str, list[Found]] = {}
        beneath: dict[str, dict[str, str]] = {}
        for directory, names in bases.items():
            entries = self._changed(directory)
            if entries is not None:
                found[directory] = self._parts(entries, names, logs, log_of)
            beneath |= {path: names for path in self._beneath.get(directory, ()) if path not in bases}
        for directory, names in beneath.items():
            entries = self._changed(directory)
            # A log of the same name stands there: these are the rotated files of that one.
            if entries is not None and not any(entry.name in names for entry in entries):
                found[directory] = self._parts(entries, names, logs, log_of, beneath=True)
        for gone in set(self._listed) - set(bases) - set(beneath):
            del self._listed[gone]
            self._beneath.pop(gone, None)
        return found

    def _parts(
        self,
        entries: Iterable["os.DirEntry[str]"],
        names: Mapping[str, str],
        logs: Mapping[str, str],
        log_of: Callable[[Identity], str | None],
        *,
        beneath: bool = False,
    ) -> list[Found]:
        parts: list[Found] = []
        for entry in entries:
            status = self._regular(entry.path)
            if status is None:
                continue
            path = next((names[base] for base in logs_of(entry.name) if base in names), None)
            stored = log_of((status.st_dev, status.st_ino))
            if path is not None:
                parts.append(Found(entry.path, path, logs[path], status, beneath=beneath))
            elif stored is not None and stored in logs:
                parts.append(Found(entry.path, stored, logs[stored], status, named=False, beneath=beneath))
        return parts

    def _changed(self, directory: str) -> list["os.DirEntry[str]"] | None:
        """The directory's files; None when it is unchanged since a recent listing, or can't be listed."""
        now = self.clock()
        try:
            changed = os.stat(directory).st_mtime_ns
            mtime, listed_at = self._listed.get(directory, (-1, 0.0))
            if changed == mtime and now - listed_at < LISTING_SECONDS:
                return None
            fresh = abs(time.time() - changed / 1e9) < FRESH_SECONDS
            with os.scandir(directory) as scan:
                entries = list(scan)
            self._listed[directory] = (-1 if fresh else changed, now)
        except FileNotFoundError:
            entries = []
        except OSError as error:
            self.complain(directory, f"can't be listed: {error.strerror}; trying again")
            return None
        beneath = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        self._beneath[directory] = beneath if len(beneath) <= MAX_SUBDIRECTORIES else []
        return [entry for entry in entries if entry.is_file(follow_symlinks=False)]

    def failed_for(self, path: str) -> bool:
        """Whether a file, the directory it is in, or what an input's pattern names could not be looked at."""
        directory = os.path.dirname(path) or "."
        return any(each in (path, directory) or fnmatch.fnmatchcase(each, path) for each in self.failures)

    def look_again(self) -> None:
        """List every directory anew at the next look."""
        self._listed.clear()

    def complain(self, path: str, problem: str, *, failed: bool = True) -> None:
        """Log a problem of a path once, and again only when it changes. `failed`: what is there is not known."""
        if failed:
            self.failures.add(path)
        told = self._complaints if failed else self._notices
        if told.get(path) != problem:
            told[path] = problem
            log.warning("%s: %s", path, problem)

    def forgive(self, path: str) -> None:
        """It can be looked at again."""
        self._complaints.pop(path, None)


def _whole_of(path: str, paths: Collection[str]) -> str | None:
    """Which of `paths` is the log that `path` is a rotated part of, by its name."""
    directory, slash, name = path.rpartition("/")
    return next((whole for base in logs_of(name) if (whole := directory + slash + base) in paths), None)
