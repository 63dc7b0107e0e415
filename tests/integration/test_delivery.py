"""Delivery never drops money: the sidecar as a process under every answer a server can give (CASES 38-52, OPENMETER
1, 2): what is stored at the end is exactly what was logged, but for what a server refused event by event.
"""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from metershipper.books import Books, Count
from metershipper.sandbox import Fault, RefusedError, Version, refuse
from metershipper.traffic import Traffic
from tests.integration.support import (
    FaultyEndpoint,
    Received,
    Reply,
    Site,
    append,
    expected_ids,
    stop,
    wait_until,
)

TOKEN = "spat_OldAndSecret"


def lines_of(seed: int, count: int) -> list[bytes]:
    traffic = Traffic(seed, started_at_ms=1_790_000_000_000)
    return [traffic.line() for _ in range(count)]


def refuses(ids: set[str], version: Version, pointer: str) -> Callable[[Received], Reply | None]:
    """An endpoint that refuses every batch with one of `ids` in it; `pointer`: right, absent or lying."""

    def behaviour(request: Received) -> Reply | None:
        bad = [place for place, event in enumerate(request.events) if event["id"] in ids]
        if not bad:
            return None
        if pointer == "absent":
            return Reply(400, b'{"status": 400, "title": "Bad Request"}')
        places = bad if pointer == "right" else [(place + 1) % len(request.events) for place in bad]
        faults = [Fault("minimum string length is 1", "min_length", (str(place), "subject")) for place in places]
        return Reply(400, bytes(refuse(RefusedError(*faults), version).body))

    return behaviour


def some_of(ids: list[str], count: int) -> set[str]:
    return set(random.Random(5).sample(ids, count))


def assert_exact(site: Site, endpoint: FaultyEndpoint, lines: list[bytes], refused: set[str]) -> Books:
    """Stored is what was logged without what was refused, each once; each refused event is one dead letter."""
    wanted = [each for each in expected_ids(lines) if each not in refused]
    assert Counter(endpoint.ids()) == Counter(wanted)
    assert Counter(str(letter.event_id) for letter in site.letters()) == Counter(refused)
    books = site.books()
    assert books.balanced and books.events_balanced
    assert (books[Count.ACKNOWLEDGED], books[Count.REFUSED]) == (len(wanted), len(refused))
    assert books[Count.LINES] == len(lines)
    return books


# --- One bad event costs only itself (cases 40, 42, 43)


@pytest.mark.parametrize("version", ["v1", "v3"])
@pytest.mark.parametrize("pointer", ["right", "absent", "lying"])
def test_a_poison_event_costs_only_itself(version: Version, pointer: str, tmp_path: Path) -> None:
    """Case 43: one bad event among thousands, with the server's pointer, without, and with a wrong one."""
    lines = lines_of(1, 1500)
    poison = some_of(expected_ids(lines), 3)
    with FaultyEndpoint(behaviour=refuses(poison, version, pointer)) as endpoint:
        site = Site(tmp_path, endpoint.url)
        append(site.log, *lines)
        with site.running() as process:
            site.wait_for_lines(process, len(lines))
            assert stop(process) == 0
        assert_exact(site, endpoint, lines, poison)
        letter = site.letters()[0]
        assert letter.reason == "refused"
        assert letter.detail.startswith("HTTP 400: ")
        assert ("minimum string length is 1" in letter.detail) == (pointer != "absent")
        assert orjson.loads(letter.content)["id"] == letter.event_id
        assert endpoint.store.counts()["repeats"] == 0
    assert "refused by the endpoint and kept as dead letters" in site.errors.read_text()


def test_a_batch_that_is_too_large_is_halved(tmp_path: Path) -> None:
    """Case 42: a gateway that takes little; everything arrives, and what is too large by itself is a dead letter."""
    lines = lines_of(2, 300)
    huge = some_of(expected_ids(lines), 1)

    def behaviour(request: Received) -> Reply | None:
        too_large = len(request.events) > 7 or any(event["id"] in huge for event in request.events)
        return Reply(413, b"<html>413 Request Entity Too Large</html>", "text/html") if too_large else None

    with FaultyEndpoint(behaviour=behaviour) as endpoint:
        site = Site(tmp_path, endpoint.url)
        append(site.log, *lines)
        with site.running() as process:
            site.wait_for_lines(process, len(lines))
            assert stop(process) == 0
        assert_exact(site, endpoint, lines, huge)
        assert "413 Request Entity Too Large" in site.letters()[0].detail


@pytest.mark.parametrize("max_in_flight", [1, 4])
def test_an_event_that_always_fails_with_5xx_is_found(max_in_flight: int, tmp_path: Path) -> None:
    """Case 40: the batch fails again and again while others pass, also where nothing else is in flight."""
    lines = lines_of(3, 400)
    poison = {expected_ids(lines)[70]}

    def behaviour(request: Received) -> Reply | None:
        return Reply(500, b"message too large") if any(each["id"] in poison for each in request.events) else None

    with FaultyEndpoint(behaviour=behaviour) as endpoint:
        site = Site(tmp_path, endpoint.url)
        site.configure("openmeter", f"max_in_flight = {max_in_flight}")
        append(site.log, *lines)
        with site.running() as process:
            wait_until(
                lambda: len(endpoint.ids()) == len(expected_ids(lines)) - 1,
                lambda: site.story(process),
            )
            more = lines_of(4, 300)  # life goes on: what passes meanwhile is what convicts
            for start in range(0, len(more), 10):
                append(site.log, *more[start : start + 10])
                before = endpoint.requests
                wait_until(lambda before=before: endpoint.requests > before + 1 or bool(site.letters()))  # type: ignore[misc]
            site.wait_for_lines(process, len(lines) + len(more))
            assert stop(process) == 0
        assert_exact(site, endpoint, lines + more, poison)
        assert site.letters()[0].detail == "HTTP 500: message too large"


def test_an_outage_makes_no_dead_letters(tmp_path: Path) -> None:
    """Cases 39, 40: a server that fails with everything says nothing about any event."""
    lines = lines_of(5, 200)
    with FaultyEndpoint(behaviour=lambda _: Reply(500, b"down")) as endpoint:
        site = Site(tmp_path, endpoint.url)
        append(site.log, *lines)
        with site.running() as process:
            wait_until(lambda: endpoint.requests > 150, lambda: site.story(process))
            assert site.books()[Count.LINES] == 0
            endpoint.behaviour = lambda _: None
            site.wait_for_lines(process, len(lines))
            assert stop(process) == 0
        assert_exact(site, endpoint, lines, set())


def test_a_server_that_refuses_everything_gets_no_event_convicted(tmp_path: Path) -> None:
    """Case 43: where not even an empty batch is accepted, a refusal says nothing about an event."""
    lines = lines_of(6, 20)
    with FaultyEndpoint(behaviour=lambda _: Reply(400, b"The plain HTTP request was sent to HTTPS port")) as endpoint:
        site = Site(tmp_path, endpoint.url)
        append(site.log, *lines)
        with site.running() as process:
            wait_until(lambda: endpoint.requests > 300, lambda: site.story(process))
            assert site.letters() == []
            endpoint.behaviour = lambda _: None
            site.wait_for_lines(process, len(lines))
            assert stop(process) == 0
        assert_exact(site, endpoint, lines, set())


def test_a_kill_during_isolation_loses_nothing_and_counts_exactly(tmp_path: Path) -> None:
    """Cases 30, 43: SIGKILL while refused events are being found; each is one dead letter at the end."""
    lines = lines_of(7, 900)
    poison = some_of(expected_ids(lines), 40)
    with FaultyEndpoint(behaviour=refuses(poison, "v1", "absent")) as endpoint:
        site = Site(tmp_path, endpoint.url)
        append(site.log, *lines)
        for number in range(6):
            with site.running() as process:
                before = endpoint.requests
                wait_until(lambda b=before, n=number: endpoint.requests > b + 40 + 25 * n)  # type: ignore[misc]
                process.kill()
        with site.running() as process:
            site.wait_for_lines(process, len(lines))
            assert stop(process) == 0
        assert_exact(site, endpoint, lines, poison)


# --- What looks like the configuration pauses, and drops nothing (cases 44, 45)


def test_a_rotated_token_is_taken_up_without_a_restart(tmp_path: Path) -> None:
    """Case 44: while the token is refused one batch at a time asks, and nothing else is sent."""
    lines = lines_of(8, 600)
    good = TOKEN

    def behaviour(request: Received) -> Reply | None:
        return (
            None if request.headers.get("authorization") == f"Bearer {good}" else Reply(401, b'{"detail": "expired"}')
        )

    with FaultyEndpoint(behaviour=behaviour) as endpoint:
        site = Site(tmp_path, endpoint.url)
        token = tmp_path / "token"
        token.write_text(TOKEN)
        token.chmod(0o600)
        site.configure("openmeter", f'api_token_file = "{token}"')
        append(site.log, *lines[:300])
        with site.running() as process:
            site.wait_for_lines(process, 300)
            good = "spat_NewAndSecret"
            append(site.log, *lines[300:])
            site.wait_for_words(process, "the token is missing or wrong: replace the token file")
            token.write_text(good)
            site.wait_for_lines(process, len(lines))
            site.wait_for_words(process, "delivering again after")
            assert stop(process) == 0
        assert_exact(site, endpoint, lines, set())
    assert TOKEN not in site.errors.read_text() and good not in site.errors.read_text()


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(404), "there is no ingest endpoint at this path"),
        (Reply(405), "there is no ingest endpoint at this path"),
        (Reply(403), "the token may not ingest events"),
        (Reply(200, b"<html>Sign in</html>", "text/html"), "something else answers at ingest_endpoint"),
        (Reply(409), "not understood"),
    ],
    ids=["404", "405", "403", "a page", "409"],
)
def test_a_wrong_set_up_pauses_and_resumes_by_itself(reply: Reply, words: str, tmp_path: Path) -> None:
    """Cases 44, 45: one line says what is wrong; when it is put right everything arrives, without a restart."""
    lines = lines_of(9, 300)
    with FaultyEndpoint(behaviour=lambda _: reply) as endpoint:
        site = Site(tmp_path, endpoint.url)
        append(site.log, *lines)
        with site.running() as process:
            site.wait_for_words(process, words)
            wait_until(lambda: endpoint.requests > 12, lambda: site.story(process))
            assert site.books()[Count.LINES] == 0
            endpoint.behaviour = lambda _: None
            site.wait_for_lines(process, len(lines))
            assert stop(process) == 0
        assert_exact(site, endpoint, lines, set())
    assert len([line for line in site.errors.read_text().splitlines() if "not delivered" in line]) == 1


def test_a_redirect_is_not_followed_and_the_token_stays(tmp_path: Path) -> None:
    """Case 45: nothing at all arrives at the other origin, least of all the token."""
    lines = lines_of(10, 100)
    with FaultyEndpoint(keeps_received=True) as other, FaultyEndpoint() as endpoint:
        endpoint.behaviour = lambda _: Reply(307, headers={"Location": other.url})
        site = Site(tmp_path, endpoint.url)
        site.configure("openmeter", f'api_token = "{TOKEN}"')
        append(site.log, *lines)
        with site.running() as process:
            site.wait_for_words(process, "a redirect, which is never followed")
            wait_until(lambda: endpoint.requests > 5, lambda: site.story(process))
            endpoint.behaviour = lambda _: None
            site.wait_for_lines(process, len(lines))
            assert stop(process) == 0
        assert_exact(site, endpoint, lines, set())
        assert other.received == [] and other.requests == 0


# --- Overload, hanging servers, outages (cases 38, 39, 41, 48-51)


@pytest.mark.parametrize(
    "retry_after", ["0", "1", "-1", "Wed, 21 Oct 2015 07:28:00 GMT", "soon"], ids=lambda value: str(value)[:4]
)
def test_an_overloaded_server_gets_everything_in_the_end(retry_after: str, tmp_path: Path) -> None:
    """Case 41: 429 and 503 with every kind of Retry-After; nothing is lost, and nothing is a dead letter."""
    lines = lines_of(11, 200)
    luck = random.Random(1)

    def behaviour(_: Received) -> Reply | None:
        if luck.random() > 0.3:
            return None
        return Reply(luck.choice([429, 503]), b"slow down", "text/plain", {"Retry-After": retry_after})

    with FaultyEndpoint(behaviour=behaviour) as endpoint:
        site = Site(tmp_path, endpoint.url)
        append(site.log, *lines)
        with site.running() as process:
            site.wait_for_lines(process, len(lines))
            assert stop(process) == 0
        assert_exact(site, endpoint, lines, set())


def test_a_server_that_stores_and_then_hangs_stores_each_event_once(tmp_path: Path) -> None:
    """Cases 38, 48: no answer within the deadline; the repeat carries the same ids."""
    lines = lines_of(12, 150)
    luck = random.Random(2)
    hanging = Reply(stores=True, hangs=True)
    with FaultyEndpoint(behaviour=lambda _: hanging if luck.random() < 0.4 else None) as endpoint:
        site = Site(tmp_path, endpoint.url)
        site.config.write_text(site.config.read_text().replace("timeout_seconds = 2.0", "timeout_seconds = 0.2"))
        append(site.log, *lines)
        with site.running() as process:
            site.wait_for_lines(process, len(lines))
            assert stop(process) == 0
        assert_exact(site, endpoint, lines, set())
        assert endpoint.store.counts()["repeats"] > 0


def resident_bytes(pid: int) -> int:
    (line,) = [each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def test_an_outage_stops_the_reading_and_bounds_memory(tmp_path: Path) -> None:
    """Cases 49, 50: a dead server, a fast writer, and rotations; less than 200 MB resident, and an exact catch-up,
    oldest first.
    """
    sample = lines_of(13, 2000)
    copies = 16  # a line again and again has the same ids: what the server stores stays small
    with FaultyEndpoint(behaviour=lambda _: Reply(503, b"down")) as endpoint:
        site = Site(tmp_path, endpoint.url)
        site.configure("openmeter", "max_in_flight = 1")
        site.config.write_text(site.config.read_text().replace("max_events = 50", "max_events = 500"))
        with site.running() as process:
            first = lines_of(14, 500)
            append(site.log, *first)
            wait_until(lambda: endpoint.requests > 2, lambda: site.story(process))
            append(site.log, b"".join(sample) * copies)
            site.log.rename(f"{site.log}.1")
            append(site.log, sample[0], b"".join(sample) * copies)
            wait_until(lambda: endpoint.requests > 12, lambda: site.story(process))
            assert resident_bytes(process.pid) < 200_000_000
            assert site.books()[Count.LINES] == 0
            endpoint.behaviour = lambda _: None
            lines = len(first) + 2 * copies * len(sample) + 1
            oldest = expected_ids(first)
            wait_until(lambda: len(endpoint.ids()) >= len(oldest), lambda: site.story(process))
            assert set(endpoint.ids()[: len(oldest)]) == set(oldest)
            site.wait_for_lines(process, lines)
            assert resident_bytes(process.pid) < 200_000_000
            assert stop(process) == 0
        assert set(endpoint.ids()) == set(expected_ids(first + sample))
        assert site.books()[Count.LINES] == lines
        assert site.books().balanced and site.books().events_balanced


def last_line(site: Site) -> dict[str, Any]:
    return dict(json.loads(site.errors.read_text().splitlines()[-1]))


def test_a_stop_tells_what_was_in_flight_what_finished_and_what_is_left(tmp_path: Path) -> None:
    """Case 51: the numbers are in the last log line, as words and as fields."""
    lines = lines_of(15, 200)
    events = len(expected_ids(lines))
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        endpoint.answering.clear()
        append(site.log, *lines)
        with site.running("--grace-seconds", "0.3") as process:
            wait_until(lambda: endpoint.requests == 4, lambda: site.story(process))
            assert stop(process) == 0
        told = last_line(site)
        assert (told["in_flight_events"], told["finished_events"], told["left_events"]) == (events, 0, events)
        assert f"{events} events were in flight, 0 finished, {events} events left" in told["message"]
        with site.running("--grace-seconds", "30") as process:
            wait_until(lambda: endpoint.requests >= 8, lambda: site.story(process))
            process.terminate()
            site.wait_for_words(process, "SIGTERM: stopping")
            endpoint.answering.set()
            assert process.wait(30) == 0
        told = last_line(site)
        assert (told["in_flight_events"], told["finished_events"], told["left_events"]) == (events, events, 0)
        assert Counter(endpoint.ids()) == Counter(expected_ids(lines))


# --- Dead letters, as commands (cases 43, 66, 71)

SECRET = "s3cr3t-that-a-client-sent"


def bad_line(number: int, *, request_id: bool = True) -> bytes:
    """An entry with a bad count and with a secret, which only another configuration bills."""
    entry = {
        "request": {"method": "GET", "headers": {"cookie": SECRET, "x-api-key": SECRET}, "querystring": {}}
        | ({"id": f"bad{number}"} if request_id else {}),
        "consumer": {"username": "acme"},
        "started_at": 1_790_000_000_000 + number,
        "ai": {"proxy": {"usage": {"prompt_tokens": -1}}},
    }
    return orjson.dumps(entry) + b"\n"


def test_dead_letters_are_listed_shown_and_purged(tmp_path: Path) -> None:
    """Beside a running process: by reason and subject; no secret in them; and nothing is purged without --yes."""
    lines = lines_of(16, 50)
    poison = {expected_ids(lines)[5]}
    with FaultyEndpoint(behaviour=refuses(poison, "v3", "right")) as endpoint:
        site = Site(tmp_path, endpoint.url)
        append(site.log, *lines, b"not json\n", bad_line(1))
        with site.running() as process:
            site.wait_for_lines(process, len(lines) + 2)
            listed = site.command("dead-letters", "list")
            assert listed.returncode == 0
            assert len(listed.stdout.splitlines()) == 3
            assert listed.stderr == "3 dead letters\n"
            as_json = site.command("dead-letters", "list", "--json").stdout
            letters = [json.loads(line) for line in as_json.splitlines()]
            assert SECRET not in as_json and as_json.count("REDACTED") == 2
            assert {letter["reason"] for letter in letters} == {"refused", "not_json", "bad_token_count"}
            (event,) = [letter for letter in letters if letter["kind"] == "event"]
            found = site.command("dead-letters", "list", "--reason", "refused", "--subject", event["subject"], "--json")
            assert json.loads(found.stdout) == event
            assert json.loads(site.command("dead-letters", "show", str(event["dead_letter_id"])).stdout) == event
            assert site.command("dead-letters", "list", "--until", "2020-01-01").stdout == ""
            assert len(site.command("dead-letters", "list", "--since", "2020-01-01").stdout.splitlines()) == 3
            refused = site.command("dead-letters", "purge", "--reason", "not_json")
            assert refused.returncode == 2 and "1 dead letters would be deleted" in refused.stderr
            assert site.command("dead-letters", "show", "999").returncode == 2
            assert site.command("dead-letters", "list", "--reason", "nonsense").returncode == 2
            assert site.command("dead-letters", "list", "--since", "yesterday").returncode == 2
            assert site.command("dead-letters", "purge", "--reason", "not_json", "--yes").returncode == 0
            assert len(site.letters()) == 2
            assert stop(process) == 0
        assert site.books().by_reason("dead_letters.")["not_json"] == 1, "what was purged stays counted"
        assert site.books().balanced and site.books().events_balanced
    for path in site.state.iterdir():
        assert SECRET.encode() not in path.read_bytes()


@pytest.mark.parametrize("running", [True, False], ids=["by the running process", "by itself"])
def test_a_retry_bills_what_can_be_billed_now(running: bool, tmp_path: Path) -> None:
    """Case 43: refused events and bad lines, tried again after a fix: same ids, once; the books move with them."""
    lines = lines_of(17, 60)
    poison = some_of(expected_ids(lines), 2)
    fixed = [bad_line(number) for number in range(3)]
    with FaultyEndpoint(behaviour=refuses(poison, "v1", "right")) as endpoint:
        site = Site(tmp_path, endpoint.url)
        append(site.log, *lines, *fixed, b"not json\n")
        with site.running() as process:
            site.wait_for_lines(process, len(lines) + 4)
            assert stop(process) == 0
        assert len(site.letters()) == 6
        failed = site.command("dead-letters", "retry", "--reason", "refused")
        assert (failed.returncode, failed.stdout) == (3, "2 tried: 0 settled, 2 failed again, 0 waiting for `run`\n")
        assert [letter.tries for letter in site.letters() if letter.kind == "event"] == [1, 1]

        endpoint.behaviour = lambda _: None
        site.config.write_text(site.config.read_text() + "[metering]\nmeter_ai_token_usage = false\n")
        if running:
            with site.running() as process:
                wait_until(lambda: site.command("status", "--json").stdout.count('"running": true') == 1)
                done = site.command("dead-letters", "retry")
                assert stop(process) == 0
        else:
            done = site.command("dead-letters", "retry")
        assert (done.returncode, done.stdout) == (3, "6 tried: 5 settled, 1 failed again, 0 waiting for `run`\n")
        new_ids = [f"bad{number}-{1_790_000_000_000 + number}:api_request" for number in range(3)]
        assert Counter(endpoint.ids()) == Counter(expected_ids(lines) + new_ids)
        (left,) = site.letters()
        assert (left.reason, left.content, left.tries) == ("not_json", b"not json", 1)
        books = site.books()
        assert books.balanced and books.events_balanced
        assert (books[Count.REFUSED], books[Count.REFUSED_TOKENS_REQUEST]) == (0, 0)
        assert books[Count.ACKNOWLEDGED] == len(expected_ids(lines)) + 3
        assert books.by_reason("dead_letters.") == {"not_json": 1}
        assert books[Count.LINES] == len(lines) + 4
        assert site.command("dead-letters", "purge", "--yes").stdout == "1 dead letters deleted\n"
        assert site.command("dead-letters", "retry").stdout.startswith("0 tried")
