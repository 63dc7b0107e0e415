"""How many entries the http-log receiver takes, each durable before its 200, and how long Kong waits for an answer.

    python -m tests.benchmarks.receiving [--entries 40000]

The real sidecar as a process (receive, spool, sync, tail, map, post, checkpoint), 16 keep-alive connections as Kong's
workers have them, and an endpoint that only reads and answers; all of them share the machine. Beside the absolute
numbers stands the ratio to a bare `orjson.loads` loop over the same entries in the same run.
"""

import argparse
import multiprocessing
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.speed import Server, Sink, ai_lines, bare_loop, best_seconds, blocks_of, wait_for_lines

CONNECTIONS = 16
ARRAY_ENTRIES = 100


def requests_of(entries: list[bytes], size: int) -> list[bytes]:
    """HTTP requests as Kong's http-log sends them: one entry, or an array of `size`."""
    requests = []
    for start in range(0, len(entries), size):
        body = entries[start] if size == 1 else b"[" + b",".join(entries[start : start + size]) + b"]"
        head = (
            f"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: lua-resty-http/0.17.2\r\n"
            f"Content-Type: application/json; charset=utf-8\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        requests.append(head.encode() + body)
    return requests


def send_all(port: int, requests: list[bytes]) -> tuple[float, list[float]]:
    """Send each request over one of the connections; seconds altogether, and of each one until its answer."""
    waiting = iter(requests)
    latencies: list[float] = []
    with selectors.DefaultSelector() as selector:
        began = time.perf_counter()
        for _ in range(CONNECTIONS):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _send_next(selector, connection, waiting)
        while selector.get_map():
            for key, _ in selector.select():
                answer = key.fileobj.recv(4096)  # type: ignore[union-attr]  # always a socket here
                if not answer.startswith(b"HTTP/1.1 200 "):
                    raise SystemExit(f"unexpected answer: {answer!r}")
                latencies.append(time.perf_counter() - key.data)
                selector.unregister(key.fileobj)
                _send_next(selector, key.fileobj, waiting)  # type: ignore[arg-type]
        return time.perf_counter() - began, latencies


def _send_next(selector: selectors.DefaultSelector, connection: socket.socket, waiting: Iterator[bytes]) -> None:
    request = next(waiting, None)
    if request is None:
        connection.close()
        return
    connection.sendall(request)
    selector.register(connection, selectors.EVENT_READ, time.perf_counter())


def measure(entries: list[bytes], size: int) -> tuple[float, list[float], float]:
    """Entries per second received, the latencies, and entries per second until all were delivered and checkpointed."""
    requests = requests_of(entries, size)
    with tempfile.TemporaryDirectory() as name, Server(("127.0.0.1", 0), Sink) as server:
        sink = multiprocessing.get_context("fork").Process(target=server.serve_forever, daemon=True)
        sink.start()  # not a thread: it would compete with the senders
        directory = Path(name)
        (directory / "config.toml").write_text(
            f"""
[openmeter]
ingest_endpoint = "http://127.0.0.1:{server.server_address[1]}/api/v1/events"
[inputs.http_log]
listen = "127.0.0.1:0"
[state]
directory = "{directory}/state"
[metering]
subject = {{ field = "username" }}
"""
        )
        command = [sys.executable, "-m", "metershipper", "run", "-c", str(directory / "config.toml")]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            while "receiving Kong's http-log on http://127.0.0.1:" not in (line := process.stderr.readline()):
                pass
            port = int(line.split("http://127.0.0.1:")[1].split("/")[0])
            threading.Thread(target=process.stderr.read, daemon=True).start()
            began = time.perf_counter()
            seconds, latencies = send_all(port, requests)
            delivered = wait_for_lines(directory / "state", len(entries)) - began
            process.send_signal(signal.SIGTERM)
            process.wait()
        sink.kill()
    return len(entries) / seconds, latencies, len(entries) / delivered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=40_000)
    data = ai_lines(parser.parse_args().entries)
    entries = data.splitlines()
    print(f"{len(entries):,} AI entries of {len(data) / len(entries):,.0f} bytes, {CONNECTIONS} connections")
    blocks = blocks_of(data)
    bare = len(entries) / best_seconds(lambda: bare_loop(blocks))
    print(f"bare orjson.loads loop          {bare:>9,.0f} entries/s   1.00")
    for size, name in ((1, "one entry in a request"), (ARRAY_ENTRIES, f"arrays of {ARRAY_ENTRIES}")):
        rate, latencies, delivered = measure(entries, size)
        middle, late = statistics.median(latencies), statistics.quantiles(latencies, n=100)[-1]
        print(
            f"{name:30}  {rate:>9,.0f} entries/s   {rate / bare:.2f}   durable in {middle * 1000:.1f} ms (median), "
            f"{late * 1000:.1f} ms (99 %); delivered and checkpointed at {delivered:,.0f} entries/s"
        )


if __name__ == "__main__":
    main()
