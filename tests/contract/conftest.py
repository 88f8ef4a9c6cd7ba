from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from django_meterly.client import MeterlyClient
from django_meterly.ledger.authentication import create_api_key
from django_meterly.ledger.customers import ensure_workspace
from django_meterly.ledger.transport import LedgerTransport
from tests import database

if TYPE_CHECKING:
    from collections.abc import Iterator


ALL = ["spend", "grant"]


@pytest.fixture(scope="session")
def live_ledger(
    django_db_setup: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The base URL of a server process on the test database."""
    port = database.free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [
                sys.executable,
                *("-m", "gunicorn", "--bind", f"127.0.0.1:{port}"),
                *("--worker-class", "gthread", "--threads", "16"),
                *("--keep-alive", "60", "--no-control-socket"),
                "django.core.wsgi:get_wsgi_application()",
            ],
            env={**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"},
            stdout=output,
            stderr=output,
        )
    try:
        give_up = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > give_up:
                    pytest.fail(f"The server does not start:\n{log.read_text()}")
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/ledger"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def api_key(transactional_db: None) -> str:
    """A key of the workspace that the in-process transport uses, too."""
    return create_api_key(ensure_workspace("default"), "contract", scopes=ALL)[1]


@pytest.fixture
def hmac_key(transactional_db: None) -> str:
    """A key that signs, of that same workspace."""
    workspace = ensure_workspace("default")
    return create_api_key(workspace, "contract", scopes=ALL, hmac=True)[1]


@pytest.fixture(params=["in process", "api key", "HMAC key"])
def meterly(
    request: pytest.FixtureRequest, transactional_db: None
) -> Iterator[MeterlyClient]:
    """A client of each kind: whatever a test says holds for all."""
    if request.param == "in process":
        client = MeterlyClient(transport=LedgerTransport())
    else:
        client = MeterlyClient(
            request.getfixturevalue(request.param.replace(" ", "_").lower()),
            base_url=request.getfixturevalue("live_ledger"),
        )
    with client:
        yield client
