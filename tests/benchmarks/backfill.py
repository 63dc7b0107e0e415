"""How fast `replay` is, with one process and with several, against an endpoint that only reads and answers.

    python -m tests.benchmarks.backfill [--lines 60000] [--files 6] [--workers 2]

Prints entries per second of each, as ratios to a bare `orjson.loads` loop over the same lines, and the ratio of several
processes to one. The rate is that of the delivery alone, from the first acknowledged event to the last one: starting
and planning are no part of it. All share the machine: run it where nothing else does.
"""

import argparse
import gzip
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.benchmarks.speed import Server, Sink, ai_lines, bare_loop, best_seconds, blocks_of


class TimedSink(Sink):
    """Remembers when the first and the last request came."""

    def handle(self) -> None:
        while length := self._content_length():
            self.rfile.read(length)
            self.wfile.write(b"HTTP/1.1 204 No Content\r\n\r\n")
            self.server.times.append(time.monotonic())  # type: ignore[attr-defined]


def replay_seconds(paths: list[Path], workers: int) -> tuple[float, float]:
    """Seconds of delivering, and of the processors' time of replay and its processes."""
    with tempfile.TemporaryDirectory() as name, Server(("127.0.0.1", 0), TimedSink) as server:
        times: list[float] = []
        server.times = times  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = Path(name) / "config.toml"
        config.write_text(
            f"""
[openmeter]
ingest_endpoint = "http://127.0.0.1:{server.server_address[1]}/api/v1/events"
[state]
directory = "{name}/state"
[metering]
subject = {{ field = "username" }}
"""
        )
        command = [
            sys.executable,
            "-m",
            "metershipper",
            "replay",
            "-c",
            str(config),
            "--yes",
            "--workers",
            str(workers),
        ]
        before = _children_seconds()
        subprocess.run([*command, *map(str, paths)], check=True, capture_output=True)
        processors = _children_seconds() - before
        server.shutdown()
        return max(times) - min(times), processors


def _children_seconds() -> float:
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=60_000)
    parser.add_argument("--files", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="Plain files; without it they are compressed with gzip.")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    data = ai_lines(options.lines)
    blocks = blocks_of(data)
    bare = options.lines / best_seconds(lambda: bare_loop(blocks))
    print(f"{options.lines:,} AI lines of {len(data) / options.lines:,.0f} bytes in {options.files} files")
    print(f"bare orjson.loads loop      {bare:>9,.0f} entries/s   1.00")
    lines = data.splitlines(keepends=True)
    each = -(-len(lines) // options.files)
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory) / f"usage.log.{number}" for number in range(options.files)]
        for number, path in enumerate(paths):
            part = b"".join(lines[number * each : (number + 1) * each])
            path.write_bytes(part if options.plain else gzip.compress(part, 1))
        rates: dict[int, float] = {}
        for workers in (1, options.workers):
            seconds, processors = min(replay_seconds(paths, workers) for _ in range(options.repeats))
            rates[workers] = options.lines / seconds
            print(
                f"replay --workers {workers:<10} {rates[workers]:>9,.0f} entries/s   {rates[workers] / bare:.2f}"
                f"   ({options.lines / processors:,.0f} entries per processor second, start and plan included)"
            )
    print(f"{options.workers} workers to one process: {rates[options.workers] / rates[1]:.2f}")


if __name__ == "__main__":
    main()
