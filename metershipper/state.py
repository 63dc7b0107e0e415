"""The state directory: made for this user alone, and locked for one process. Never reads or writes the checkpoint."""

import fcntl
import os
import time
from pathlib import Path

from metershipper.errors import StateError, StateInUse

LOCK_NAME = "lock"
REPLAY_LOCK_NAME = "replay.lock"  # beside `run`, one replay at a time
# How long a second process tries: `status` holds the lock for an instant to see whether it is free.
LOCK_PATIENCE_SECONDS = 0.5
# The lock file is a process id, padded so that it is overwritten in place, and then, once there is a checkpoint:
_PID_BYTES = 21
_USED = b"used\n"
_HELD = (
    "in use by process {holder}; one state directory serves one process: "
    "stop that one, or give this one its own state.directory"
)
_HELD_BY_REPLAY = (
    "process {holder} is replaying what `run` began to read, and will come to its end: start this again then, "
    "or stop the replay with Ctrl-C or SIGTERM"
)
REPLAY_HELD = "process {holder} is replaying; one replay at a time: wait for it, or stop it with Ctrl-C or SIGTERM"


class StateLock:
    """A kernel lock on the state directory: nothing stale is left behind by a kill.

    Args: `name`, of the lock's file; `held`, what the user is told when another process has it.
    """

    def __init__(self, directory: Path, name: str = LOCK_NAME, held: str = _HELD) -> None:
        self._path = directory / name
        self._directory = directory
        self._held = held

    def __enter__(self) -> "StateLock":
        """Take the lock. Raises StateInUse when a process holds it, StateError when the directory can't be used."""
        make_private_directory(self._directory)
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StateError(f"{self._path}: can't be opened: {error.strerror}") from None
        try:
            self._take()
        except OSError as error:
            os.close(self._fd)
            raise StateError(f"{self._path}: can't be written: {error.strerror}") from None
        except StateInUse:
            os.close(self._fd)
            raise
        return self

    def _take(self) -> None:
        deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
        while not _try_lock(self._fd, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                holder = _pid_in(self._fd) or "unknown"
                is_replay = self._held is _HELD and holder == str(holder_of(self._directory, REPLAY_LOCK_NAME))
                held = _HELD_BY_REPLAY if is_replay else self._held
                raise StateInUse(f"{self._directory}: {held.format(holder=holder)}")
            time.sleep(0.05)
        os.pwrite(self._fd, f"{os.getpid():<{_PID_BYTES - 1}}\n".encode(), 0)

    @property
    def was_used(self) -> bool:
        """Whether there ever was a checkpoint in this directory."""
        return os.pread(self._fd, len(_USED), _PID_BYTES) == _USED

    def mark_used(self) -> None:
        """Remember that there is a checkpoint: should it be missing one day, that is told apart from a first start."""
        if not self.was_used:
            os.pwrite(self._fd, _USED, _PID_BYTES)
            os.fsync(self._fd)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def holder_of(directory: Path, name: str = LOCK_NAME) -> int | None:
    """The id of the process that holds the state directory, or this lock of it; None when no process does."""
    try:
        fd = os.open(directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return None if _try_lock(fd, fcntl.LOCK_SH) else int(_pid_in(fd) or 0)
    finally:
        os.close(fd)


def _pid_in(fd: int) -> str:
    text = os.pread(fd, _PID_BYTES, 0).partition(b"\n")[0].strip()
    return text.decode("ascii") if text.isdigit() else ""


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def make_private_directory(directory: Path) -> None:
    """Create the state directory for this user alone. Raises StateError, naming what to do."""
    try:
        missing = [path for path in (directory, *directory.absolute().parents) if not path.exists()]
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for created in missing:
            sync_directory(created.absolute().parent)
        writable = os.access(directory, os.W_OK | os.X_OK)
    except OSError as error:
        raise StateError(
            f"{directory}: can't be created: {error.strerror}; create it for this user or set state.directory"
        ) from None
    if not writable:
        raise StateError(f"{directory}: not writable by this user; change its owner or set state.directory")


def state_problem(directory: Path) -> str | None:
    """Why the state directory could not be used by this user; None when nothing speaks against it. Changes nothing."""
    existing = next((path for path in (directory, *directory.absolute().parents) if path.exists()), directory)
    if not existing.is_dir():
        return f"{directory}: can't be created: {existing} is not a directory"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{directory}: {existing} is not writable by this user; create it for this user or set state.directory"
    return None


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable: a file that is synced can still lose its name in a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
