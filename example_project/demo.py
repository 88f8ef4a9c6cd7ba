"""The whole story of a credit, told by real processes: ``python demo.py [--once]``.

The demo starts a web server, a Celery worker and a beat, uses the studio's pages over
HTTP, and checks every number. Afterwards the studio keeps running until Ctrl-C. With
``--once`` the demo ends instead, and its exit code is 1 if anything was wrong. It
leaves neither processes nor files.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

import requests
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.progress import TimeElapsedColumn as ElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

#: Seconds for which an animation's credits wait for a worker: minutes in production.
HOLD_SECONDS = 60
#: Seconds after a job's last heartbeat in which its credits are still held.
LEASE_SECONDS = 6
#: Seconds that anything may take on a busy machine.
PATIENCE = 60.0
POSTERS = [
    ("Midsummer on the roof", "suns"),
    ("North sea, slowly", "waves"),
    ("Form & Farbe", "shapes"),
    ("Jazz in the old power station", "moon"),
]


class DemoError(Exception):
    """A step of the demo went wrong."""


class Site:
    """The studio's processes, and the folder with everything they write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        # Leave out variables that lead to other databases, brokers and ledgers.
        foreign = ("CELERY_", "DATABASE_", "DJANGO_", "GUNICORN_", "METERLY_")
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(foreign)},
            "PYTHONPATH": str(HERE.parent),
            "PYTHONUNBUFFERED": "1",
            "SECRET_KEY": secrets.token_urlsafe(),
            "DEBUG": "True",
            "STATE_DIR": str(folder),
            "TMPDIR": str(folder),
            # Sweep after seconds instead of minutes, so that the demo can show it.
            "ANIMATION_SECONDS": str(HOLD_SECONDS),
            "METERLY_LEASE_GRACE": str(LEASE_SECONDS),
            "SWEEP_EVERY": "1",
        }

    def manage(self, *arguments: str) -> str:
        """Run ``manage.py`` and return what it printed."""
        done = subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=HERE,
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise DemoError(
                f"manage.py {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}"
            )
        return done.stdout.strip()

    def start(self, name: str, *command: str, **options: Any) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.children[name] = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=HERE,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # In a new process group, which stop() ends, and Ctrl-C does not.
                start_new_session=True,
                **options,
            )

    def start_web(self) -> str:
        """Start the web server on a free port; return the studio's address."""
        # The server inherits the socket, so that nobody else can take the port.
        with socket.create_server(("127.0.0.1", 0)) as listener:
            number = listener.fileno()
            self.start(
                "web",
                "gunicorn",
                "studio.wsgi",
                f"--bind=fd://{number}",
                pass_fds=[number],
            )
            return f"http://127.0.0.1:{listener.getsockname()[1]}/"

    def check(self) -> None:
        """Raise ``DemoError`` if one of the processes has ended."""
        for name, child in self.children.items():
            if child.poll() is not None:
                raise DemoError(
                    f"The {name} process has ended with {child.returncode}. "
                    f"It said last:\n{self.tail(name)}"
                )

    def tail(self, name: str, lines: int = 25) -> str:
        text = (self.folder / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def stop(self) -> None:
        """End all processes and their children."""
        for child in self.children.values():
            child.terminate()
        # A worker needs longer to end by itself, but it has nothing to finish here.
        give_up = time.monotonic() + 3
        for child in self.children.values():
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0, give_up - time.monotonic()))
            # End the rest of its group. macOS refuses this for an empty group.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


class Browser:
    """A user's browser: keeps cookies, and sends forms with their CSRF token."""

    def __init__(self, site: Site, address: str) -> None:
        self._site = site
        self._address = address
        self._session = requests.Session()
        # Connect directly to the loopback interface, without configured proxies.
        self._session.trust_env = False
        self._session.headers["Accept"] = "text/html"

    def get(self, path: str) -> requests.Response:
        return self._answer(self._session.get, path)

    def submit(self, page: str, action: str, /, **fields: Any) -> requests.Response:
        """Open *page* and send its form to *action*; redirects are followed."""
        opened = self.get(page)
        token = _found(r'name="csrfmiddlewaretoken" value="([^"]+)"', opened)
        return self._answer(
            self._session.post,
            action,
            data={"csrfmiddlewaretoken": token, **fields},
            headers={"Referer": opened.url},
        )

    def log_in(self, page: str, name: str, password: str) -> None:
        fields = {"username": name, "password": password, "next": f"/{page}"}
        answer = self.submit(page, page, **fields)
        if "sessionid" not in self._session.cookies or answer.status_code != 200:
            raise DemoError(f"{name} could not log in ({answer.status_code}).")

    def balances(self) -> dict[str, tuple[int, int]]:
        """Return what the studio's page shows: unit -> (available, reserved)."""
        shown = re.findall(
            r'data-unit="(\w+)" data-available="(\d+)" data-reserved="(\d+)"',
            self.get("").text,
        )
        return {unit: (int(available), int(held)) for unit, available, held in shown}

    def _answer(
        self, send: Callable[..., requests.Response], path: str, **options: Any
    ) -> requests.Response:
        try:
            answer = send(urljoin(self._address, path), timeout=PATIENCE, **options)
        except requests.RequestException as exc:
            self._site.check()
            raise DemoError(f"{path or '/'}: {exc}") from exc
        if answer.status_code >= 500:
            raise DemoError(
                f"{path or '/'} answered {answer.status_code}. The web server said "
                f"last:\n{self._site.tail('web')}"
            )
        return answer


def _found(pattern: str, page: requests.Response) -> str:
    match = re.search(pattern, page.text, re.DOTALL)
    if match is None:
        raise DemoError(f"{page.url} ({page.status_code}) does not show {pattern}.")
    return unescape(match[1])


def _expect(actual: object, expected: object, what: str) -> None:
    if actual != expected:
        raise DemoError(f"{what}: {actual!r}, where {expected!r} should be.")


class Story:
    """The steps, one after the other, each checked and told."""

    STEPS = 15

    def __init__(self, site: Site, console: Console, progress: Progress) -> None:
        self.site = site
        self.progress = progress
        self.bar = progress.add_task("", total=self.STEPS)
        self.console = console
        self.passwords: dict[str, str] = {}
        self.address = ""

    def doing(self, what: str) -> None:
        self.progress.update(self.bar, description=what)

    def done(self, what: str) -> None:
        """Print what was done, and what alice has now."""
        self.progress.advance(self.bar)
        number = int(self.progress.tasks[self.bar].completed)
        self.console.print(f"[green]✓[/] [bold]{number:2}[/] {what}")

    def balance(self, **expected: tuple[int, int]) -> None:
        """Check alice's balances, (available, reserved) by unit, and print them."""
        balances = self.alice.balances()
        _expect(balances, expected, "The balances of alice")
        shown = "   ".join(
            f"{unit} [bold]{available}[/]" + (f" + {held} held" if held else "")
            for unit, (available, held) in balances.items()
        )
        self.console.print(f"     [dim]alice has[/] {shown}", highlight=False)

    def wait_until(self, condition: Callable[[], Any], what: str) -> Any:
        give_up = time.monotonic() + PATIENCE
        while not (result := condition()):
            self.site.check()
            if time.monotonic() > give_up:
                raise DemoError(
                    f"Waited {PATIENCE:.0f} s in vain for {what}. The worker said "
                    f"last:\n{self.site.tail('worker')}"
                )
            time.sleep(0.2)
        return result

    def tell(self) -> None:
        self.set_up()
        self.grant()
        self.draw()
        self.run_dry()
        self.lose_a_job()
        self.finish_a_job()
        self.close_the_books()

    def set_up(self) -> None:
        self.doing("Creating the database")
        self.site.manage("migrate", "--verbosity=0")
        users = self.site.manage("studio_users")
        self.passwords = dict(line.split() for line in users.splitlines())
        self.done("The database is there, with alice, bob and an admin in it.")

        self.doing("Starting the web server, a Celery worker and a beat")
        self.address = self.site.start_web()
        celery = ("celery", "--app=studio", "--quiet")
        self.site.start(
            "worker",
            *celery,
            "worker",
            "--pool=prefork",
            "--concurrency=2",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
            "--loglevel=info",
        )
        self.alice = Browser(self.site, self.address)
        self.wait_until(lambda: self.alice.get("log-in/").ok, "the log-in page")
        self.wait_until(lambda: " ready." in self.site.tail("worker"), "the worker")
        self.site.start("beat", *celery, "beat", "--pidfile=")
        self.done(
            f"A web server at [cyan]{self.address}[/], a worker and a beat are running."
        )

    def grant(self) -> None:
        self.doing("Logging in")
        self.alice.log_in("log-in/", "alice", self.passwords["alice"])
        self.done("alice logged in.")
        self.balance(image_credits=(0, 0), render_seconds=(0, 0))

        self.doing("Granting credits in the admin")
        admin = Browser(self.site, self.address)
        admin.log_in("admin/login/", "admin", self.passwords["admin"])
        customers = "admin/meterly/customer/"
        listed = admin.get(customers)
        # Opening the studio has made alice a customer.
        row = r'name="_selected_action" value="(\d+)"(?:(?!</tr>).)*alice'
        pk = _found(row, listed)
        for amount, unit in ((100, "image_credits"), (60, "render_seconds")):
            form = admin.submit(
                customers, customers, action="grant_credits", _selected_action=pk
            )
            granted = admin.submit(
                form.url,
                form.url,
                amount=amount,
                unit=unit,
                reason="Welcome to the studio",
                reference=_found(r'name="reference" value="([^"]+)"', form),
            )
            name = unit.replace("_", " ")
            _found(rf"(Granted {amount} {name} to \w+)", granted)
        self.done("The admin granted her 100 image credits and 60 render seconds.")
        self.balance(image_credits=(100, 0), render_seconds=(60, 0))

    def draw(self) -> None:
        for number, (title, style) in enumerate(POSTERS, 1):
            self.doing(f"Drawing “{title}”")
            page = self.alice.submit("", "posters/", title=title, style=style)
            _expect(page.status_code, 200, f"The page of “{title}”")
            png = self.alice.get(_found(r'src="(/posters/\d+/poster.png)"', page))
            with Image.open(io.BytesIO(png.content)) as image:
                _expect((image.format, image.size), ("PNG", (1200, 1600)), title)
            self.poster = page.url
            self.done(f"“{title}” was drawn (1200 x 1600) for 25 image credits.")
            self.balance(image_credits=(100 - 25 * number, 0), render_seconds=(60, 0))
            if number == 1:
                self.doing("Sending the form without a title")
                page = self.alice.submit("", "posters/", title="", style=style)
                _expect(page.status_code, 422, "A form without a title")
                self.done("A form without a title was refused (422), and cost nothing.")
                self.balance(image_credits=(75, 0), render_seconds=(60, 0))

    def run_dry(self) -> None:
        self.doing("Asking for a fifth poster")
        page = self.alice.submit("", "posters/", title="One more", style="letters")
        _expect(page.status_code, 402, "The fifth poster")
        _found(r"(This needs 25 image credits, and 0 are available\.)", page)
        self.done("A fifth poster was refused: [bold]402[/], not enough credits.")
        self.balance(image_credits=(0, 0), render_seconds=(60, 0))

    def lose_a_job(self) -> None:
        self.doing("Rendering an animation that will be killed half-way")
        job = self.order(dies_half_way="on")
        self.wait_until(lambda: self.stage(job)[0] == "rendering", "the job to start")
        self.balance(image_credits=(0, 0), render_seconds=(30, 30))
        self.wait_until(lambda: "SIGKILL" in self.site.tail("worker"), "the kill")
        _, page = self.stage(job)
        frames = _found(r'data-frames="(\d+)"', page)
        self.done(
            f"An animation's process was [bold]killed[/] (SIGKILL) after {frames} of "
            "24 frames. Its credits are still held."
        )
        self.balance(image_credits=(0, 0), render_seconds=(30, 30))

        self.doing(f"Waiting for its lease to run out ({LEASE_SECONDS} s)")
        self.wait_until(lambda: self.stage(job)[0] == "lost", "the sweeper")
        self.done("The sweeper released what the dead job held: its credits came back.")
        self.balance(image_credits=(0, 0), render_seconds=(60, 0))

    def finish_a_job(self) -> None:
        self.doing("Rendering an animation to its end")
        job = self.order()
        self.wait_until(lambda: self.stage(job)[0] == "done", "the animation")
        _, page = self.stage(job)
        cost = int(_found(r'data-charge="(\d+)"', page))
        png = self.alice.get(_found(r'src="(/animations/\d+/poster.png)"', page))
        with Image.open(io.BytesIO(png.content)) as image:
            frames = getattr(image, "n_frames", 1)
            _expect((image.size, frames), ((600, 800), 24), "The animation")
        self.done(
            f"Another animation was finished: {frames} frames, "
            f"{len(png.content) // 1024} KiB. It held 30 and was charged {cost}."
        )
        self.balance(image_credits=(0, 0), render_seconds=(60 - cost, 0))

    def close_the_books(self) -> None:
        self.doing("Asking the ledger's REST API")
        from django_meterly import MeterlyClient

        key = self.site.manage(
            "meterly_ledger_apikey", "create", "demo", "--scope", "read"
        )
        with MeterlyClient(key, base_url=f"{self.address}ledger") as client:
            customer = client.find_customer("user_1")
            assert customer is not None
            rest = client.get_balances(customer.customer_id).balances
        _expect(
            {b.credit_unit: (b.available, b.reserved) for b in rest},
            self.alice.balances(),
            "The balances over REST",
        )
        self.done(f"The REST API at [cyan]{self.address}ledger[/] says the same.")

        self.doing("Verifying the books")
        verified = self.site.manage("meterly_ledger_verify")
        if "the books balance" not in verified:
            raise DemoError(verified)
        self.done(f"manage.py meterly_ledger_verify: [bold]{escape(verified)}[/]")

    def order(self, **fields: str) -> str:
        """Order an animated version of the last poster; return its page's address."""
        page = self.alice.submit(self.poster, f"{self.poster}animate/", **fields)
        _expect(page.status_code, 200, "The animation's page")
        return page.url

    def stage(self, job: str) -> tuple[str, requests.Response]:
        page = self.alice.get(job)
        return _found(r'data-stage="(\w+)"', page), page


def run(once: bool) -> int:
    console = Console(highlight=False)
    started = time.monotonic()
    with ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(
                prefix="meterly-demo-", ignore_cleanup_errors=True
            )
        )
        site = Site(Path(folder))
        stack.callback(_stop_undisturbed, site)
        progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            ElapsedColumn(),
            console=console,
            transient=True,
        )
        try:
            with progress:
                story = Story(site, progress.console, progress)
                story.tell()
        except DemoError as exc:
            console.print(f"[red]✗ {escape(str(exc))}[/]")
            return 1
        console.print(
            Panel(
                "\n".join(
                    f"{name}: password [bold]{password}[/]"
                    for name, password in story.passwords.items()
                )
                + f"\n\nThe admin is at [cyan]{story.address}admin/[/]",
                title=f"The studio is at [cyan]{story.address}[/]",
                expand=False,
            )
        )
        console.print(f"[dim]The story took {time.monotonic() - started:.0f} s.[/]")
        if once:
            return 0
        console.print("Press Ctrl-C to end it.")
        try:
            while True:
                time.sleep(1)
                site.check()
        except KeyboardInterrupt:
            return 0
        except DemoError as exc:
            console.print(f"[red]✗ {escape(str(exc))}[/]")
            return 1


def _stop_undisturbed(site: Site) -> None:
    # A second Ctrl-C must not leave processes behind.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    site.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--once", action="store_true", help="end after the story, instead of staying up"
    )
    arguments = parser.parse_args()
    # Clean up after every signal. Shells make background jobs ignore Ctrl-C: undo that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        sys.exit(run(arguments.once))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
