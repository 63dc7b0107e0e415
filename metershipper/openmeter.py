"""The OpenMeter endpoint: one POST in, one `Answer` out. Owns the HTTP client and the token.

Never retries, never logs, never raises for what a server or a network does, and never follows a redirect: a 301 would
turn the POST into `GET /api/v1/events`, which answers 200 with a list (OpenMeter v1).
"""

import asyncio
import errno
import os
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any

import httpx

from metershipper import __version__
from metershipper.config import OpenMeter
from metershipper.credentials import TokenFile
from metershipper.errors import ConfigError
from metershipper.retry import Answer, Verdict, classify, http_date, one_line, retry_after_seconds

# v1 compares it letter by letter, so it carries no charset (openmeter/ingest/httpdriver/ingest.go).
BATCH_CONTENT_TYPE = "application/cloudevents-batch+json"
# An acknowledgement is empty or a few bytes; what is longer is not read to its end.
MAX_ANSWER_BYTES = 64 * 1024


class Token:
    """The bearer token: from the configuration, or from its file, which may be rotated while we run."""

    def __init__(self, settings: OpenMeter) -> None:
        self._secret = settings.api_token
        self._file = TokenFile(settings.api_token_file) if settings.api_token_file else None

    async def read(self) -> str | None:
        """The token now; None when none is configured. Raises ConfigError naming the file, never what it holds."""
        if self._file is None:
            return self._secret.get_secret_value() if self._secret else None
        return await self._file.read()

    @property
    def warning(self) -> str | None:
        """What is unsafe about the token file, if anything."""
        return self._file.warning if self._file else None


class Endpoint:
    """A connection to the ingest endpoint, used as an async context manager.

    Raises: ConfigError on entry, when the token or the CA file can't be read, or the HTTP client can't be set up.
    """

    def __init__(self, url: str, settings: OpenMeter) -> None:
        self._url = url
        self._settings = settings
        self._token = Token(settings)

    async def __aenter__(self) -> "Endpoint":
        self._authorization = await self._read_authorization()
        self._token_was_refused = False
        _refuse_unusable(self._url)
        self._verify = _tls_context(self._settings)
        try:
            self._client = httpx.AsyncClient(
                verify=self._verify,
                timeout=httpx.Timeout(self._settings.timeout_seconds),
                limits=httpx.Limits(max_connections=self._settings.max_in_flight, keepalive_expiry=60),
                follow_redirects=False,
                event_hooks={"response": [_forget_redirect]},
                headers={
                    "User-Agent": f"metershipper/{__version__}",
                    "Content-Type": BATCH_CONTENT_TYPE,
                    "Accept-Encoding": "identity",
                },
            )
        except (OSError, ImportError, ValueError, httpx.InvalidURL) as error:
            # The words of the others repeat the proxy's URL, which may hold a password.
            reason = f": {error}" if isinstance(error, OSError | ImportError) else ""
            raise ConfigError(
                f"environment: no HTTP client with these proxy variables or this SSL_CERT_FILE{reason}"
            ) from None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def _read_authorization(self) -> dict[str, str]:
        token = await self._token.read()
        return {"Authorization": f"Bearer {token}"} if token else {}

    async def post(self, body: bytes) -> Answer:
        """Send one encoded batch; the whole exchange has `timeout_seconds`."""
        if self._token_was_refused:
            await self._renew_token()
        sent = self._authorization
        try:
            async with asyncio.timeout(self._settings.timeout_seconds):
                status, headers, text = await self._exchange(body, sent)
        except TimeoutError:
            return Answer(Verdict.RETRY, f"no answer within {self._settings.timeout_seconds:g} s")
        except (httpx.HTTPError, OSError) as error:
            if _is_certificate_refused(error):
                await self._renew_certificates()
            return Answer(Verdict.RETRY, one_line(_without_token(describe(error), sent)))
        self._token_was_refused = status in (401, 403)  # read again before the next try, however late that is
        content_type = _without_token(headers.get("content-type", ""), sent)
        wait_seconds = retry_after_seconds(headers.get("retry-after"), http_date(headers.get("date"), time.time()))
        return classify(status, content_type, _without_token(text, sent), wait_seconds)

    async def _exchange(self, body: bytes, headers: dict[str, str]) -> tuple[int, httpx.Headers, str]:
        opened: list[Any] = []

        async def remember_opened(event: str, details: dict[str, Any]) -> None:
            if event == "connection.connect_tcp.complete":
                opened.append(details["return_value"])

        sending = self._client.stream(
            "POST", self._url, content=body, headers=headers, extensions={"trace": remember_opened}
        )
        content = bytearray()
        try:
            async with sending as response:
                async for chunk in response.aiter_raw():  # never unpacked: a few KiB can unpack to gigabytes
                    content += chunk
                    if len(content) > MAX_ANSWER_BYTES:
                        break
        except BaseException:
            for stream in opened:  # httpcore 1.0 leaves it open when it is cancelled within the TLS handshake
                await stream.aclose()
            raise
        text = bytes(content).decode("utf-8", "replace")
        return response.status_code, response.headers, text

    async def _renew_token(self) -> None:
        """The token file may have been rotated. An unreadable one changes nothing: the next try reports the refusal."""
        try:
            self._authorization = await self._read_authorization()
        except ConfigError:
            return

    async def _renew_certificates(self) -> None:
        """The CA file may have been replaced; what it holds now is trusted as well, and nothing else ever is."""
        if self._settings.ca_file is not None and isinstance(self._verify, ssl.SSLContext):
            with suppress(OSError):  # ssl.SSLError is one; the next try reports the refusal again
                await asyncio.to_thread(self._verify.load_verify_locations, os.fspath(self._settings.ca_file))


def _is_certificate_refused(error: BaseException) -> bool:
    return any(isinstance(cause, ssl.SSLCertVerificationError) for cause in _causes(error))


async def _forget_redirect(response: httpx.Response) -> None:
    """httpx reads the target even when it follows no redirect, and raises what is no HTTPError for a broken one."""
    response.headers.pop("location", None)


def _without_token(text: str, headers: dict[str, str]) -> str:
    """A server may repeat the token it got; what it says goes to a log."""
    token = headers.get("Authorization", "").removeprefix("Bearer ")
    return text.replace(token, "REDACTED") if token else text


def _refuse_unusable(url: str) -> None:
    try:
        httpx.URL(url).host  # noqa: B018  # reading it decodes an international name
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError(f"openmeter.ingest_endpoint: not a usable URL: {error}") from None


def _tls_context(settings: OpenMeter) -> ssl.SSLContext | bool:
    if not settings.ssl_verify:
        return False
    if settings.ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=os.fspath(settings.ca_file))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{settings.ca_file}: no usable CA certificates: {error.strerror or error}") from None


def describe(error: BaseException) -> str:
    """A failed exchange in plain words: which part of the way failed."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, socket.gaierror):
            return "the host name can't be resolved (DNS)"
        if isinstance(cause, ssl.SSLError):
            return f"TLS failed: {getattr(cause, 'verify_message', '') or cause.reason or cause}"
        if isinstance(cause, ConnectionRefusedError) or getattr(cause, "errno", None) == errno.ECONNREFUSED:
            return "the connection was refused: nothing listens there"
    if isinstance(error, httpx.TimeoutException):
        return "the connection timed out"
    return f"the exchange failed: {type(error).__name__}{f' ({error})' if str(error) else ''}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        current = waiting.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [current.__cause__, current.__context__]
        if isinstance(current, BaseExceptionGroup):
            waiting += current.exceptions
