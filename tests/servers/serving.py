"""Real servers as child processes, and clients that come and go as they like."""

from __future__ import annotations

import http.client
import os
import re
import socket
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from django.core.management import call_command

from django_meterly.models import Reservation
from django_meterly.testing import assert_books_balance, lapse_leases
from tests.books import states
from tests.children import PATIENCE, environment, started, wait_until

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

LEDGERS = {
    "joined": "django_meterly.ledger.transport.LedgerTransport",
    "remote": "django_meterly.testing.FaultyTransport",
}
GUNICORN = (
    "gunicorn",
    "tests.servers.gateway:wsgi",
    "--bind=127.0.0.1:0",
    "--no-control-socket",
)
COMMANDS = {
    "sync": (*GUNICORN, "--worker-class=sync"),
    "gthread": (*GUNICORN, "--worker-class=gthread", "--threads=4"),
    "uvicorn": ("uvicorn", "tests.servers.gateway:asgi", "--port=0", "--lifespan=off"),
}


class Visit:
    """A request on a connection of its own."""

    def __init__(self, port: int, method: str, path: str, cookie: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, PATIENCE)
        headers = {"Cookie": cookie, "Connection": "close"}
        self._connection.request(method, path, headers=headers)
        # http.client lets go of it when the answer says that it is the last.
        self._socket = self._connection.sock
        self._response: http.client.HTTPResponse | None = None

    def response(self) -> http.client.HTTPResponse:
        self._response = self._connection.getresponse()
        return self._response

    def hang_up(self) -> None:
        """Break the connection off, as a browser does that is closed."""
        # With a reset: what is still written to it fails at once.
        linger = struct.pack("ii", 1, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close()

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
        self._connection.close()
        self._socket.close()


class Site:
    """A server that runs in *process*, and what the work in it says by files."""

    def __init__(
        self, process: subprocess.Popen[str], folder: Path, log: Path, *, atomic: bool
    ) -> None:
        self.process = process
        self.atomic = atomic
        self.folder = folder
        self.log = log
        self.cookie = ""
        self._visits: list[Visit] = []
        wait_until(self._find_port, log)

    def _find_port(self) -> bool:
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.said())
        self.port = int(found[1]) if found else 0
        return bool(found)

    def begin(self, method: str, path: str) -> Visit:
        """Send a request; its answer is for ``response()`` to wait for."""
        visit = Visit(self.port, method, path, self.cookie)
        self._visits.append(visit)
        return visit

    def request(self, method: str, path: str) -> tuple[int, bytes]:
        """Return the status and the body of the answer."""
        response = self.begin(method, path).response()
        return response.status, response.read()

    def close(self) -> None:
        """Forget the visits, and what the work said."""
        while self._visits:
            self._visits.pop().close()
        for pattern in ("*.held", "*.go", "*.passed"):
            for file in self.folder.glob(pattern):
                file.unlink()

    def wait_for(self, name: str) -> int:
        """Wait until the work that holds at *name* is there; return its process."""
        file = self.folder / f"{name}.held"
        wait_until(file.exists, self.log)
        return int(file.read_text())

    def let_go(self, name: str) -> None:
        (self.folder / f"{name}.go").touch()

    def has_passed(self, name: str) -> bool:
        return (self.folder / f"{name}.passed").exists()

    def wait_until(self, condition: Any) -> None:
        wait_until(condition, self.log)

    def said(self) -> str:
        return self.log.read_text()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


@contextmanager
def serving(
    kind: str,
    folder: Path,
    *options: str,
    atomic_requests: bool = False,
    env: dict[str, str] | None = None,
    **meterly: Any,
) -> Iterator[Site]:
    """Run one of ``COMMANDS`` with *options*, until the block ends."""
    folder.mkdir()
    log = folder / "log"
    environ = {
        **environment(atomic_requests=atomic_requests, **meterly),
        "DJANGO_SETTINGS_MODULE": "tests.servers.settings",
        "PYTHONUNBUFFERED": "1",
        "SERVER_FOLDER": str(folder),
        **(env or {}),
    }
    log.touch()
    with started(*COMMANDS[kind], *options, env=environ, log=log) as process:
        yield Site(process, folder, log, atomic=atomic_requests)


def served(*names: str) -> pytest.MarkDecorator:
    """Run a test under each of the servers *names* (``gthread-joined-atomic``)."""
    return pytest.mark.parametrize("site", names, indirect=True)


def settled(site: Site, state: str) -> None:
    """Wait until the one row is in *state*, without a sweeper; then run one."""
    site.wait_until(lambda: states() == [state])
    swept()
    assert states() == [state]


def swept() -> None:
    """Run the sweeper, a second time in vain, and let the books be verified."""
    for _again in range(2):
        lapse_leases()
        call_command("meterly_settle", verbosity=0)
    assert not Reservation.objects.filter(state__in=Reservation.State.open())
    assert not Reservation.objects.due()
    assert_books_balance()
