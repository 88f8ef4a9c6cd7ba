"""Every kind of guarded view under gunicorn and uvicorn: ``python kinds.py``.

A reader asks each view for its whole story, and then once more, but hangs up in the
middle. Then the server is killed while a view of each kind works. A table shows the
charges, and they are checked: no work is charged twice, no missing work is charged, and
in the end the ledger's books balance. The exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from demo import PATIENCE, Browser, DemoError, Site, _expect
from rich.console import Console
from rich.markup import escape
from rich.table import Table

KINDS = [
    "function",
    "class_based",
    "api_function",
    "api_class",
    "api_set",
    "template",
    "stream",
    "async_function",
    "async_stream",
]
SERVERS = {
    "gunicorn": ("gunicorn", "studio.wsgi", "--bind=127.0.0.1:0", "--log-level=info"),
    "uvicorn": ("uvicorn", "studio.asgi:application", "--port=0", "--lifespan=off"),
}
GRANTED = 1000
#: Seconds between two of the twelve words, for a reader who will leave.
PAUSE = 0.3


class Reader:
    """alice, with a new connection for each visit."""

    def __init__(self, site: Site, address: str, password: str) -> None:
        self.site = site
        self.browser = Browser(site, address)
        self.browser.log_in("log-in/", "alice", password)
        self.address = urlsplit(address)

    def begin(self, kind: str, pause: float = 0) -> socket.socket:
        """Ask for a story without waiting for it."""
        session = self.browser._session
        cookies = "; ".join(
            f"{name}={value}" for name, value in session.cookies.items()
        )
        assert self.address.hostname
        assert self.address.port
        line = socket.create_connection((self.address.hostname, self.address.port))
        line.settimeout(PATIENCE)
        line.sendall(
            f"POST /kinds/{kind}/?pause={pause} HTTP/1.1\r\n"
            f"Host: {self.address.netloc}\r\nCookie: {cookies}\r\n"
            f"X-CSRFToken: {session.cookies['csrftoken']}\r\n"
            "Connection: close\r\nContent-Length: 0\r\n\r\n".encode()
        )
        return line

    def read(self, kind: str) -> None:
        with self.begin(kind) as line:
            answer = b""
            while data := line.recv(65536):
                answer += data
        if not (answer.startswith(b"HTTP/1.1 200") and b"everybody." in answer):
            raise DemoError(f"{kind} answered {answer.decode()}")

    def balance(self) -> tuple[int, int]:
        return self.browser.balances()["image_credits"]

    def wait_for_work(self) -> None:
        give_up = time.monotonic() + PATIENCE
        while self.balance()[1] == 0:
            if time.monotonic() > give_up:
                raise DemoError("Nobody is at work.")

    def settled(self, left: int, what: str) -> None:
        """Wait until nothing is held any more, and check what is left."""
        give_up = time.monotonic() + PATIENCE
        while (balance := self.balance())[1] and time.monotonic() < give_up:
            # The server may be gone. Then only the sweeper settles.
            self.site.manage("meterly_settle")
        _expect(balance, (left, 0), f"What alice has left after {what}")


def start(site: Site, server: str) -> str:
    """Start *server*; return its address."""
    site.start(server, *SERVERS[server])
    give_up = time.monotonic() + PATIENCE
    while not (found := re.search(r"http://127\.0\.0\.1:\d+", site.tail(server))):
        site.check()
        if time.monotonic() > give_up:
            raise DemoError(f"{server} does not start:\n{site.tail(server)}")
        time.sleep(0.1)
    return f"{found[0]}/"


def drive(site: Site, server: str, password: str, left: int) -> dict[str, list[str]]:
    """Let alice read under *server*; return the outcomes of each kind."""
    reader = Reader(site, start(site, server), password)
    told: dict[str, list[str]] = {}
    for kind in KINDS:
        reader.read(kind)
        left -= 1
        reader.settled(left, f"{kind} under {server}")
        line = reader.begin(kind, PAUSE)
        reader.wait_for_work()
        line.close()
        # Hanging up is not free: the work was done, or is still done.
        left -= 1
        reader.settled(left, f"hanging up on {kind} under {server}")
        told[kind] = ["charged", "charged"]

    lines = [reader.begin(kind, PAUSE) for kind in KINDS]
    reader.wait_for_work()
    child = site.children.pop(server)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for line in lines:
        line.close()
    return told


def run(site: Site, console: Console) -> None:
    site.env |= {"METERLY_RESERVATION_TTL": "4", "DEBUG": "False"}
    site.manage("migrate", "--verbosity=0")
    passwords = dict(line.split() for line in site.manage("studio_users").splitlines())
    console.print(site.manage("shell", "-v", "0", "-c", GRANT))
    table = Table("", *(f"{server}, {end}" for server in SERVERS for end in ENDS))
    rows: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for server in SERVERS:
        left = int(site.manage("shell", "-v", "0", "-c", BALANCE))
        for kind, told in drive(site, server, passwords["alice"], left).items():
            rows[kind] += told
        give_up = time.monotonic() + PATIENCE
        # Leases lapse one by one, and a failed settlement waits before its next try.
        while (states := site.manage("shell", "-v", "0", "-c", OPEN)) != "[]":
            if time.monotonic() > give_up:
                raise DemoError(
                    f"{server} left what the sweeper cannot settle: {states}"
                )
            time.sleep(1)
            site.manage("meterly_settle")
    for kind, told in rows.items():
        table.add_row(kind, *told)
    console.print(table)
    verified = site.manage("meterly_ledger_verify")
    if "the books balance" not in verified:
        raise DemoError(verified)
    console.print(
        "Both servers were killed with all kinds at work, and the sweeper has settled "
        f"what they left. meterly_ledger_verify: [bold]{escape(verified)}[/]"
    )


ENDS = ("read", "left")
GRANT = f"""
from django.contrib.auth.models import User
from django_meterly import get_client, grants
from django_meterly.models import Customer
alice = Customer.objects.resolve(User.objects.get(username="alice"))
alice.register(get_client(), "image_credits")
grants.grant(get_client(), alice, {GRANTED}, "image_credits", reason="stories",
             reference="stories")
print("alice has {GRANTED} image_credits, and reads.")
"""
BALANCE = """
from django_meterly import get_client
from django_meterly.models import Customer
print(get_client().get_balances(Customer.objects.get().customer_id).balances[0].balance)
"""
OPEN = """
from django_meterly.models import Reservation
over = Reservation.objects.exclude(state__in=["committed", "released"])
print(list(over.values_list("state", "last_error")))
"""


def main() -> int:
    console = Console(highlight=False)
    with (
        tempfile.TemporaryDirectory(
            prefix="meterly-kinds-", ignore_cleanup_errors=True
        ) as folder,
        ExitStack() as stack,
    ):
        site = Site(Path(folder))
        stack.callback(site.stop)
        try:
            run(site, console)
        except DemoError as exc:
            console.print(f"[red]✗ {escape(str(exc))}[/]")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
