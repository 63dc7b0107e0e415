"""Writes usage.log beside itself: made-up Kong entries, the same ones each time, at least one of each shape.

And usage.events.ndjson, the usage events that they are mapped to without any configuration.

Run from an environment where metershipper is installed: python samples/generate.py
"""

from pathlib import Path

from metershipper.filter import map_paths
from metershipper.metering import Metering
from metershipper.traffic import Traffic, Truth

SEED = 31
STARTED_AT_MS = 1_782_907_200_000  # 2026-07-01T12:00:00Z
LINES = 60

SHAPES = {
    "Kong 2.8, slashes escaped": rb'"via":"kong\/2.8.3"',
    "Kong 3.4, without request.id": b'"via":"kong/3.4.2"',
    "Kong 3.6, AI usage flat": b'"via":"kong/3.6.1"',
    "Kong 3.7, AI usage in the singular": b'"prompt_token":',
    "Kong 3.8, container ai-proxy": b'"via":"1.1 kong/3.8.0"',
    "Kong 3.9, container proxy": b'"ai":{"proxy":',
    "Kong 3.12, token details": b'"prompt_tokens_details":',
    "streamed answer": b"text/event-stream",
    "answer from the semantic cache": b'"cache_status":"Hit"',
    "two AI containers in one entry": b'"ai-request-transformer":',
    "embeddings, which have no output tokens": b"/v1/embeddings",
    "upstream retried": b'"upstream_status":"502, 200"',
    "header sent twice": b'"x-department":[',
    "query argument without a value": b'"expand":true',
    "query argument repeated": b'"tag":[',
}


def write_log(directory: Path) -> Truth:
    """Write usage.log into the directory; returns what it must bill."""
    traffic = Traffic(SEED, started_at_ms=STARTED_AT_MS)
    log = b"".join([traffic.line() for _ in range(LINES)])
    missing = [shape for shape, marker in SHAPES.items() if marker not in log]
    assert not missing, f"another seed is needed: {missing}"
    assert traffic.truth.anonymous and traffic.truth.failed_ai_calls, "another seed is needed"
    (directory / "usage.log").write_bytes(log)
    return traffic.truth


def write_events(directory: Path) -> None:
    """Write usage.events.ndjson for the usage.log in the directory."""
    with (directory / "usage.events.ndjson").open("wb") as out:
        map_paths(Metering(), (str(directory / "usage.log"),), out, print)


if __name__ == "__main__":
    folder = Path(__file__).parent
    write_log(folder)
    write_events(folder)
