"""What metershipper costs while nothing happens, and how soon it notices that something does.

    python -m tests.benchmarks.idle [--files 100] [--seconds 20]

Prints the share of one core and the memory of a `run` that follows quiet files, and how long a new line takes from its
write to its acknowledgement, beyond `max_wait_seconds`. On demand; no test.
"""

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from metershipper.traffic import Traffic
from tests.integration.support import FaultyEndpoint, Site, TimedStore, append, expected_ids, stop, wait_until

MAX_WAIT_SECONDS = 0.05  # as in `Site`
LINES = 30


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    store, traffic = TimedStore(), Traffic(3, started_at_ms=1_790_000_000_000)
    with tempfile.TemporaryDirectory() as directory, FaultyEndpoint(store=store) as endpoint:
        site = Site(Path(directory), endpoint.url)
        site.config.write_text(site.config.read_text().replace(str(site.log), f"{directory}/quiet-*.log"))
        for number in range(options.files):
            append(Path(directory) / f"quiet-{chr(97 + number // 26)}{chr(97 + number % 26)}.log", traffic.line())
        with site.running() as process:
            site.wait_for_lines(process, options.files)
            time.sleep(2)
            before, began = _cpu_seconds(process.pid), time.monotonic()
            time.sleep(options.seconds)
            share = (_cpu_seconds(process.pid) - before) / (time.monotonic() - began)
            memory = _resident_bytes(process.pid) >> 20
            print(f"{options.files} quiet files: {share:.2%} of one core, {memory} MB resident")
            log = Path(directory) / "quiet-aa.log"
            print(_latencies(store, log, traffic))
            assert stop(process) == 0


def _latencies(store: TimedStore, log: Path, traffic: Traffic) -> str:
    waits: list[float] = []
    while len(waits) < LINES:
        line = traffic.line()
        ids = expected_ids([line])
        written = time.monotonic_ns()
        append(log, line)
        if ids:
            wait_until(partial(_have_come, store, ids))
            waits.append((max(store.accepted[each] for each in ids) - written) / 1e9 - MAX_WAIT_SECONDS)
    median, longest = statistics.median(waits), max(waits)
    return f"a new line is acknowledged after max_wait_seconds + {median:.3f} s, at most {longest:.3f} s"


def _have_come(store: TimedStore, ids: list[str]) -> bool:
    return all(each in store.accepted for each in ids)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
