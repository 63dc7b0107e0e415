"""Processes that read and map files for a replay, one file at a time each; what they make comes back by a pipe.

Owns the processes and what they and the parent say to each other. A process gets a task on its standard input and
answers with messages on its standard output; when the parent does not take them it waits, so memory is bounded. It ends
when its input does, also in the middle of a task: nothing is left behind, even by SIGKILL. Never posts, never commits.

A batch names its spans by where they end: they may have come with an earlier message.
"""

import asyncio
import fcntl
import gc
import os
import pickle
import queue
import struct
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from metershipper.batcher import Batch, Span
from metershipper.errors import MeterShipperError
from metershipper.isolate import select
from metershipper.mapper import Mapper
from metershipper.metering import Metering
from metershipper.replay_reading import FAULTY_READING, BatchLimits, Reading, Task

_LENGTH = struct.Struct("<Q")
# What the parent holds of a process's messages before that one has to wait: twice this, a few blocks' worth.
_READ_AHEAD_BYTES = 1024 * 1024
# What an unprivileged process may have.
_PIPE_BYTES = 1024 * 1024


class WorkerDied(MeterShipperError):
    """A process ended in the middle of its task."""


@dataclass(frozen=True, slots=True)
class Message:
    """A part of what a task makes. `batches`: each with its body, its events, and how many of them each span has.

    `ended`: the task is done; `fault`: why it was not, though nothing is wrong with the process.
    """

    spans: list[Span] = field(default_factory=list)
    batches: list[tuple[bytes, int, list[tuple[int, int]]]] = field(default_factory=list)
    ended: bool = False
    fault: Exception | None = None


@dataclass(slots=True)
class Spans:
    """The parent's spans of one task, by where they end, for as long as batches may still name them."""

    _waiting: dict[int, tuple[Span, int]] = field(default_factory=dict)

    def take(self, message: Message) -> list[Batch]:
        """The batches of a message, with the spans that it and earlier ones brought."""
        self._waiting |= {span.end_offset: (span, span.unsettled) for span in message.spans if span.unsettled}
        return [
            Batch(body, events, [self._share(*share) for share in shares]) for body, events, shares in message.batches
        ]

    def take_rest(self, message: Message) -> list[Batch]:
        """Of a message that comes after a stop: what earlier spans still wait for, and nothing of its own."""
        rest: list[Batch] = []
        for body, events, shares in message.batches:
            wanted = [self._share(*share) for share in shares if share[0] in self._waiting]
            count = sum(each for _, each in wanted)
            batch = Batch(body, events, wanted)
            if count:
                rest += [batch] if count == events else select(batch, [range(count)])  # the earlier ones come first
        return rest

    @property
    def waits(self) -> bool:
        """Whether there are spans of which not all events came."""
        return bool(self._waiting)

    def _share(self, end_offset: int, events: int) -> tuple[Span, int]:
        span, left = self._waiting.pop(end_offset)
        if left > events:
            self._waiting[end_offset] = span, left - events
        return span, events


# In the process


def main() -> None:
    """Work on tasks until the input ends."""
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not stand among the messages
    with suppress(OSError):  # a message in few pieces: each costs both sides a turn
        fcntl.fcntl(target, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    gc.freeze()  # what was imported stays; and of what is made of lines next to nothing is a cycle
    gc.set_threshold(100_000)
    try:
        metering, limits = _received(source)
    except EOFError:
        return  # the parent was killed at once
    mapper = Mapper(metering)
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
    stopped = threading.Event()

    def receive() -> None:
        while True:
            try:
                task = _received(source)
            except (EOFError, OSError):
                os._exit(0)  # the parent is gone, or wants no more
            if task is None:
                stopped.set()
            else:
                tasks.put(task)

    threading.Thread(target=receive, daemon=True).start()
    while True:
        try:
            _work(tasks.get(), mapper, limits, target, stopped)
        except BrokenPipeError:
            os._exit(0)


def _work(task: Task, mapper: Mapper, limits: BatchLimits, target: BinaryIO, stopped: threading.Event) -> None:
    fault: Exception | None = None
    batches: list[Batch] = []
    try:
        with Reading(task, mapper, limits) as reading:
            try:
                while not stopped.is_set() and (block := reading.next_block()) is not None:
                    _send(target, _message(*reading.take(block)))
            finally:
                batches = reading.rest()  # what was taken waits for all its events
    except BrokenPipeError:
        raise
    except FAULTY_READING as error:
        fault = error
    message = _message([], batches)
    _send(target, Message(message.spans, message.batches, ended=True, fault=fault))


def _message(spans: list[Span], batches: list[Batch]) -> Message:
    shares = [[(span.end_offset, events) for span, events in batch.shares] for batch in batches]
    return Message(spans, [(batch.body, batch.events, each) for batch, each in zip(batches, shares, strict=True)])


def _send(target: BinaryIO, message: object) -> None:
    data = pickle.dumps(message, protocol=5)
    target.write(_LENGTH.pack(len(data)))
    target.write(data)
    target.flush()


def _received(source: BinaryIO) -> Any:
    (length,) = _LENGTH.unpack(_exactly(source, _LENGTH.size))
    return pickle.loads(_exactly(source, length))


def _exactly(source: BinaryIO, length: int) -> bytes:
    data = source.read(length)
    if len(data) < length:
        raise EOFError
    return data


# In the parent


class Worker:
    """One process. Use as an async context manager; it does not outlive the block."""

    def __init__(self, metering: Metering, limits: BatchLimits) -> None:
        self._setup = metering, limits
        # It imports from where the parent does, and not from the directory that it happens to be started in.
        self._import_path = os.pathsep.join(os.path.abspath(each) for each in sys.path)

    async def __aenter__(self) -> "Worker":
        # Apart from the terminal: Ctrl-C is the parent's to hear.
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-c", "from metershipper.replay_workers import main; main()"),
            env=os.environ | {"PYTHONPATH": self._import_path},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_READ_AHEAD_BYTES,
            start_new_session=True,
        )
        self._tell(self._setup)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
        # `wait` waits for the end of its output, too, which is not seen while nobody reads what is before it.
        await self._process.communicate()

    @property
    def process_id(self) -> int:
        """Of the process."""
        return self._process.pid

    def stop(self) -> None:
        """End the task with the block that it is at."""
        self._tell(None)

    def _tell(self, what: object) -> None:
        assert self._process.stdin is not None
        data = pickle.dumps(what, protocol=5)
        self._process.stdin.write(_LENGTH.pack(len(data)) + data)

    async def messages(self, task: Task) -> AsyncIterator[Message]:
        """What a task makes, to its end. Raises: WorkerDied."""
        assert self._process.stdout is not None
        try:
            self._tell(task)
            while True:
                (length,) = _LENGTH.unpack(await self._process.stdout.readexactly(_LENGTH.size))
                message: Message = pickle.loads(await self._process.stdout.readexactly(length))
                yield message
                if message.ended:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            code = await self._process.wait()
            raise WorkerDied(
                f"{task.path}: the process that read it ended with {code}"
                f"{' (SIGKILL: perhaps out of memory)' if code == -9 else ''}; what was acknowledged is kept, and the "
                "same command resumes"
            ) from None
