"""What holds for every test: none of the configuration or the proxies of the machine it runs on."""

import os

import pytest

OURS = "METERSHIPPER_"
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test sees the environment variables it sets itself, and no others of ours."""
    for name in list(os.environ):
        if name.upper().startswith(OURS) or name.upper() in PROXIES:
            monkeypatch.delenv(name)
