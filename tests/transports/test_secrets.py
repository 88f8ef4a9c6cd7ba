"""No key, secret or signature is in what people and machines get to read."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from typing import Any

import environ
import pytest
from django.views.debug import ExceptionReporter

from django_meterly import MeterlyClient, get_client
from django_meterly.conf import from_env
from django_meterly.errors import MeterlyError
from django_meterly.transports import HttpTransport
from django_meterly.transports.signing import HmacSigner
from tests.transports.server import KEY, RESERVE, answer, close, hang, reset

HMAC_KEY = "mk_hmac_k1_s3cr3ts3cr3ts3cr3t"
MALFORMED = HMAC_KEY.replace("k1", "k-1")
KEYS = {"bearer": KEY, "hmac": HMAC_KEY}


def secrets_in(text: str) -> list[str]:
    """Return what of keys, secrets and signatures is in *text*."""
    return re.findall(
        rf"{KEY}|{HMAC_KEY}|s3cr3ts3cr3t|signature=[0-9a-f]+|Bearer mk_", text
    )


def debug_page(error: BaseException) -> str:
    """Return what Django would show for *error*, as a page and as an e-mail."""
    reporter = ExceptionReporter(None, type(error), error, error.__traceback__)
    page = reporter.get_traceback_html() + reporter.get_traceback_text()
    assert type(error).__name__ in page
    return page


@pytest.fixture(autouse=True)
def _debug(settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    settings.DEBUG = True
    settings.METERLY = {"API_KEY": HMAC_KEY}
    caplog.set_level("DEBUG")


def test_the_search_finds_what_it_looks_for():
    for text in (KEY, HMAC_KEY, f"Bearer {KEY}", "x signature=00ff", "s3cr3ts3cr3t"):
        assert secrets_in(f"<{text}>")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "behave",
    [
        hang,
        reset,
        close,
        answer({}, "401 No"),
        answer({}, "503 No"),
        answer({}, "302 Found"),
        answer(b"{"),
    ],
    ids=["silence", "reset", "closed", "401", "503", "302", "broken"],
)
def test_f46_failed_call_shows_nothing(serve, caplog, behave, key):
    server = serve(behave, key=KEYS[key], read_timeout=0.2, max_attempts=2)
    meterly = MeterlyClient(transport=server.transport)
    with pytest.raises(MeterlyError) as caught:
        meterly.reserve_credits("c1", 5)
    assert secrets_in(debug_page(caught.value)) == []
    assert secrets_in(caplog.text) == []
    assert secrets_in(repr([vars(record) for record in caplog.records])) == []


@pytest.mark.parametrize("key", KEYS)
def test_f46_call_that_could_not_be_sent_shows_nothing(free_port, caplog, key):
    transport = HttpTransport(KEYS[key], base_url=f"http://127.0.0.1:{free_port}")
    with pytest.raises(MeterlyError) as caught:
        transport.send(RESERVE)
    assert secrets_in(debug_page(caught.value)) == []
    assert secrets_in(caplog.text) == []


@pytest.mark.parametrize("key", KEYS)
def test_f46_successful_call_logs_nothing(serve, caplog, key):
    server = serve(answer({}), key=KEYS[key])
    server.transport.send(RESERVE)
    assert "/v1/reservations" in caplog.text
    assert secrets_in(caplog.text) == []
    assert secrets_in(repr([vars(record) for record in caplog.records])) == []


class Interrupted(BaseException):
    """A time limit, an interrupt: whatever may end a call anywhere."""


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("where", ["send", "receive"])
def test_f46_interrupted_call_shows_nothing(serve, monkeypatch, key, where):
    def interrupt(*args: Any) -> None:
        raise Interrupted

    server = serve(hang, key=KEYS[key])
    if where == "send":
        # The frames of http.client that hold the request's bytes.
        monkeypatch.setattr(
            "django_meterly.transports.connections.Connection.connect",
            lambda connection: setattr(connection, "sock", _Unwilling()),
        )
    else:
        previous = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(Interrupted) as caught:
            server.transport.send(RESERVE)
    finally:
        if where == "receive":
            signal.signal(signal.SIGALRM, previous)
    assert secrets_in(debug_page(caught.value)) == []


class _Unwilling:
    def sendall(self, data: bytes) -> None:
        raise Interrupted

    def settimeout(self, seconds: float) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    "wrong",
    [
        {"API_KEY": f"{HMAC_KEY}\nX: 1"},
        {"API_KEY": HMAC_KEY.encode()},
        {"API_KEY": [HMAC_KEY]},
        {"API_KEY": MALFORMED},
        {"BASE_URL": "ftp://x"},
        {"BASE_URL": "http://ledger.test"},
        {"NO_SUCH_SETTING": 1},
        {"DEADLINE": "soon"},
        {"SIGNER": "no.such.Signer"},
        {"TRANSPORT": "no.such.Transport"},
    ],
    ids=str,
)
def test_f46_wrong_settings_show_nothing(settings, wrong):
    settings.METERLY = {
        "TRANSPORT": "django_meterly.transports.HttpTransport",
        "API_KEY": HMAC_KEY,
        **wrong,
    }
    del wrong
    with pytest.raises(Exception, match=r".") as caught:
        get_client()
    assert secrets_in(debug_page(caught.value)) == []


@pytest.mark.parametrize(
    "options", [{"base_url": "ftp://x"}, {"proxies": {"http": "socks5://x"}}, {"no": 1}]
)
def test_f46_wrong_arguments_show_nothing(options):
    with pytest.raises((ValueError, TypeError)) as caught:
        MeterlyClient(HMAC_KEY, **options)
    assert secrets_in(debug_page(caught.value)) == []


def test_f46_malformed_key_shows_nothing():
    with pytest.raises(ValueError, match="HMAC key") as caught:
        HmacSigner(MALFORMED)
    assert secrets_in(debug_page(caught.value)) == []


def test_f46_key_with_a_transport_shows_nothing():
    transport = HttpTransport(KEY)
    with pytest.raises(TypeError) as caught:
        MeterlyClient(HMAC_KEY, transport=transport)
    assert secrets_in(debug_page(caught.value)) == []


def test_f46_client_and_transport_show_nothing():
    for key in KEYS.values():
        meterly = MeterlyClient(key)
        shown = [meterly, vars(meterly), meterly.transport, vars(meterly.transport)]
        assert secrets_in(f"{shown!r} {meterly} {meterly.transport}") == []


def test_f46_settings_from_the_environment_are_dumped_without_the_key(tmp_path):
    class Environ(environ.Env):
        ENVIRON = {"METERLY_API_KEY": HMAC_KEY}

    assert from_env(Environ()) == {"API_KEY": HMAC_KEY}
    assert secrets_in(repr(from_env(Environ()))) == []

    (tmp_path / "dumped.py").write_text(
        "import environ\n"
        "from django_meterly.conf import from_env\n"
        "METERLY = from_env(environ.Env())\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "django", "diffsettings", "--all"],
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}",
            "DJANGO_SETTINGS_MODULE": "dumped",
            "METERLY_API_KEY": HMAC_KEY,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "METERLY = {'API_KEY': '********'}" in done.stdout
    assert secrets_in(done.stdout + done.stderr) == []
