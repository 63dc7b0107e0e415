"""How fast mapping and `run` are, as ratios to a bare `orjson.loads` loop over the same file in the same run.

    python tests/benchmarks/speed.py [--lines 60000]

Absolute numbers say something about the machine, ratios about metershipper. The end-to-end part runs the real sidecar
(tail, map, post, checkpoint) as a process, against an endpoint that only reads and answers; both share the machine, so
the sidecar's own processor time is given beside the wall clock.
"""

import argparse
import os
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import orjson

from metershipper.books import Count
from metershipper.checkpoint import Checkpoint
from metershipper.content import BLOCK_BYTES
from metershipper.errors import StateError
from metershipper.lines import whole_lines
from metershipper.mapper import Mapper
from metershipper.metering import Metering, Subject
from metershipper.traffic import Traffic

REPEATS = 3
METERINGS = {
    "AI tokens only": Metering(meter_api_requests=False, subject=Subject(field="username")),
    "AI tokens and API requests": Metering(subject=Subject(field="username")),
}


def ai_lines(count: int) -> bytes:
    """AI entries of a current Kong, about 2.9 KB each."""
    traffic = Traffic(1, started_at_ms=1_790_000_000_000)
    lines: list[bytes] = []
    while len(lines) < count:
        line = traffic.line()
        if b'"proxy":{' in line:
            lines.append(line)
    return b"".join(lines)


def blocks_of(data: bytes) -> list[bytes]:
    """The file in the blocks in which the tailer reads it."""
    blocks, start = [], 0
    while start < len(data):
        length = whole_lines(data[start : start + BLOCK_BYTES])
        blocks.append(data[start : start + length])
        start += length
    return blocks


def best_seconds(work: Callable[[], object]) -> float:
    """The fastest of a few runs: the least disturbed one."""
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def bare_loop(blocks: list[bytes]) -> None:
    for block in blocks:
        for line in block.splitlines():
            orjson.loads(line)


def map_and_encode(mapper: Mapper, blocks: list[bytes]) -> None:
    encode = msgspec.json.Encoder().encode
    for block in blocks:
        encode(mapper.map_lines(block).events)


class Sink(socketserver.StreamRequestHandler):
    """Reads each request and answers 204: as little as an endpoint can do."""

    def handle(self) -> None:
        while length := self._content_length():
            self.rfile.read(length)
            self.wfile.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    def _content_length(self) -> int:
        length = 0
        while (line := self.rfile.readline().lower()) not in (b"\r\n", b""):
            if line.startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        return length


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 16


def end_to_end(data: bytes, count: int, metering: str) -> tuple[float, float, int]:
    """Seconds by the wall, seconds of the sidecar's processor, and its largest resident size in MB."""
    with tempfile.TemporaryDirectory() as name, Server(("127.0.0.1", 0), Sink) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        directory = Path(name)
        (directory / "usage.log").write_bytes(data)
        (directory / "config.toml").write_text(
            f"""
[openmeter]
ingest_endpoint = "http://127.0.0.1:{server.server_address[1]}/api/v1/events"
[openmeter.batch]
max_wait_seconds = 0.05
[[inputs.files]]
path = "{directory}/usage.log"
[state]
directory = "{directory}/state"
[metering]
{metering}
subject = {{ field = "username" }}
"""
        )
        command = [sys.executable, "-m", "metershipper", "run", "-c", str(directory / "config.toml")]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            began = wait_for_lines(directory / "state", 1)
            seconds = wait_for_lines(directory / "state", count) - began
            resident = peak_resident_mb(process.pid)
            process.send_signal(signal.SIGTERM)
            _, _, usage = os.wait4(process.pid, 0)
            process.returncode = 0
        server.shutdown()
    return seconds, usage.ru_utime + usage.ru_stime, resident


def peak_resident_mb(process_id: int) -> int:
    """From /proc: what wait4 reports includes the parent's memory at the time of the fork."""
    status = Path(f"/proc/{process_id}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def wait_for_lines(state: Path, lines: int) -> float:
    """When that many lines were acknowledged and checkpointed."""
    while True:
        try:
            with Checkpoint(state, read_only=True) as checkpoint:
                if checkpoint.books()[Count.LINES] >= lines:
                    return time.perf_counter()
        except StateError:
            pass
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=60_000)
    count: int = parser.parse_args().lines
    data = ai_lines(count)
    blocks = blocks_of(data)
    print(f"{count:,} AI lines of {len(data) / count:,.0f} bytes")
    bare = count / best_seconds(lambda: bare_loop(blocks))
    print(f"bare orjson.loads loop                        {bare:>9,.0f} lines/s   1.00")
    for name, metering in METERINGS.items():
        mapper = Mapper(metering)
        rate = count / best_seconds(lambda mapper=mapper: map_and_encode(mapper, blocks))  # type: ignore[misc]
        print(f"{'map and encode, ' + name:45} {rate:>9,.0f} lines/s   {rate / bare:.2f}")
    for name, metering in METERINGS.items():
        setting = f"meter_api_requests = {str(metering.meter_api_requests).lower()}"
        wall, processor, resident = end_to_end(data, count, setting)
        rate = count / wall
        print(
            f"{'run end to end, ' + name:45} {rate:>9,.0f} lines/s   {rate / bare:.2f}"
            f"   ({count / processor:,.0f} lines per processor second, {resident} MB resident)"
        )


if __name__ == "__main__":
    main()
