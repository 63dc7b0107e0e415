"""Who may stay when there are too many connections, and which addresses and certificates are refused."""

import asyncio
import resource
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metershipper import listener
from metershipper.books import Books
from metershipper.config import HttpLog
from metershipper.errors import ConfigError
from metershipper.listener import MAX_CONNECTIONS, Guests, listening


class Visitor:
    """A connection; once crowded out it leaves, as a real one does."""

    def __init__(self, guests: Guests) -> None:
        self.guests = guests
        self.is_known = False
        self.is_out = False

    def crowd_out(self) -> None:
        self.is_out = True
        self.guests.leave(self)

    def send_something_of_use(self) -> None:
        self.guests.waits_for_us(self)
        self.is_known = True
        self.guests.we_wait(self)


def enter(guests: Guests, count: int = 1) -> list[Visitor]:
    visitors = [Visitor(guests) for _ in range(count)]
    for visitor in visitors:
        guests.enter(visitor)
    return visitors


# --- guests (case 59)


def test_up_to_the_limit_everybody_stays() -> None:
    guests = Guests(3)
    assert not any(visitor.is_out for visitor in enter(guests, 3))
    assert len(guests) == 3


def test_who_never_sent_anything_of_use_goes_first_the_longest_waiting_one() -> None:
    guests = Guests(3)
    (known,) = enter(guests)
    known.send_something_of_use()
    strangers = enter(guests, 4)
    assert [visitor.is_out for visitor in strangers] == [True, True, False, False]
    assert not known.is_out


def test_a_flood_of_strangers_costs_no_known_one_its_place() -> None:
    guests = Guests(10)
    known = enter(guests, 10)
    for visitor in known:
        visitor.send_something_of_use()
    enter(guests, 500)
    assert sum(visitor.is_out for visitor in known) == 1  # one place stays for who comes anew
    assert known[0].is_out


def test_of_known_ones_the_one_that_is_idle_for_longest_goes() -> None:
    guests = Guests(2)
    first, second = enter(guests, 2)
    first.send_something_of_use()
    second.send_something_of_use()
    first.send_something_of_use()
    (third,) = enter(guests)
    assert [first.is_out, second.is_out, third.is_out] == [False, True, False]


def test_who_waits_for_us_is_never_crowded_out() -> None:
    guests = Guests(2)
    served = enter(guests, 2)
    for visitor in served:
        guests.waits_for_us(visitor)
    (late,) = enter(guests)
    assert late.is_out
    assert not any(visitor.is_out for visitor in served)
    guests.we_wait(served[0])
    (later,) = enter(guests)
    assert [served[0].is_out, later.is_out] == [True, False]


def test_leaving_twice_is_leaving() -> None:
    guests = Guests(2)
    (visitor,) = enter(guests)
    guests.leave(visitor)
    guests.leave(visitor)
    assert len(guests) == 0


@given(
    limit=st.integers(1, 5),
    steps=st.lists(st.tuples(st.sampled_from(["enter", "ask", "answer", "leave"]), st.integers(0, 9)), max_size=60),
)
def test_there_are_never_more_than_the_limit_and_nobody_is_forgotten(limit: int, steps: list[tuple[str, int]]) -> None:
    guests = Guests(limit)
    present: list[Visitor] = []
    for step, number in steps:
        present = [visitor for visitor in present if not visitor.is_out]
        if step == "enter":
            present += enter(guests)
        elif present:
            visitor = present[number % len(present)]
            if step == "ask":
                guests.waits_for_us(visitor)
            elif step == "answer":
                visitor.is_known = bool(number % 2)
                guests.we_wait(visitor)
            else:
                guests.leave(visitor)
                present.remove(visitor)
        assert len(guests) == sum(not visitor.is_out for visitor in present) <= limit


# --- addresses, certificates and limits


async def _app(scope: object, receive: object, send: object) -> None:
    raise AssertionError


def refusal(settings: HttpLog) -> str:
    async def listen() -> None:
        async with listening(settings, _app, Books()):
            raise AssertionError

    with pytest.raises(ConfigError) as caught:
        asyncio.run(listen())
    return str(caught.value)


def test_an_address_that_is_in_use_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        assert (
            refusal(HttpLog(listen=listen)) == f"inputs.http_log.listen: {listen} can't be used: Address already in use"
        )


@pytest.mark.parametrize(
    "host",
    ["192.0.2.1", "no-such-host.invalid", "a..b", "x" * 70, "a\0b"],
    ids=["foreign", "unknown", "empty label", "long", "NUL"],
)
def test_an_address_that_is_none_of_ours_is_told(host: str, tmp_path: Path) -> None:
    """Also one that can't be a name: in one line, and no traceback."""
    message = refusal(HttpLog(listen=f"{host}:0", token_file=tmp_path / "token"))
    assert message.startswith(f"inputs.http_log.listen: {host}:0 can't be used: ")
    assert "\n" not in message


@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n"])
def test_a_certificate_that_can_not_be_read_is_told(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "cert.pem"
    if content is not None:
        path.write_bytes(content)
    settings = HttpLog(listen="127.0.0.1:0", cert_file=path, key_file=path)
    assert refusal(settings).startswith(f"{path}, {path}: no certificate with its key can be read: ")


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_the_url_is_told_with_the_port_that_was_free(host: str) -> None:
    async def listen() -> str:
        async with listening(HttpLog(listen=f"{host}:0", path="/kong"), _app, Books()) as url:
            return url

    url = asyncio.run(listen())
    assert url.startswith(f"http://{host}:")
    assert url.endswith("/kong")
    assert int(url.removesuffix("/kong").rpartition(":")[2]) > 0


def test_the_limit_of_connections_fits_the_limit_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised where that is allowed; files and the endpoint keep theirs."""
    limits = [(256, 4096), (256, 512), (64, 64), (resource.RLIM_INFINITY, resource.RLIM_INFINITY), (10**6, 10**6)]
    limits.append((256, resource.RLIM_INFINITY))
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: given.append(limit))
    found = []
    for limit in limits:
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: limit)
        found.append(listener._max_connections())
    assert found == [MAX_CONNECTIONS, 256, 16, MAX_CONNECTIONS, MAX_CONNECTIONS, MAX_CONNECTIONS]
    assert given == [(1256, 4096), (512, 512), (64, 64), (1256, resource.RLIM_INFINITY)]
