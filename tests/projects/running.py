"""How tests run a project: its commands, its server, and a browser to visit it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests

from tests.database import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent.parent
#: Seconds that a command may take on a busy machine.
PATIENCE = 120
#: What the tests' own processes are told, and a project is not.
_OURS = ("DJANGO_", "DATABASE_URL", "METERLY", "CHILD_", "CELERY_")


def environment(**more: str) -> dict[str, str]:
    """Return the environment of somebody who has installed this package."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(_OURS)
    }
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **more}


@dataclass
class Project:
    """A project whose commands are run in *folder*."""

    folder: Path
    python: str = sys.executable
    env: dict[str, str] = field(default_factory=environment)

    def run(self, *command: str, typed: str = "", status: int = 0) -> str:
        """Run *command*, which ends with *status*; return what it printed.

        *typed* is what it reads.
        """
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.env,
            input=typed,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        said = f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
        assert done.returncode == status, said
        return done.stdout

    def manage(self, *arguments: str, **options: Any) -> str:
        """Run a command of Django; see ``run``."""
        return self.run(*self._manage, *arguments, **options)

    @property
    def _manage(self) -> tuple[str, ...]:
        # Without a manage.py, DJANGO_SETTINGS_MODULE says which project it is.
        own = (self.folder / "manage.py").exists()
        return (self.python, *(("manage.py",) if own else ("-m", "django")))

    def shell(self, code: str) -> str:
        """Run *code* with the project set up; return what it printed."""
        return self.manage("shell", "--verbosity=0", f"--command={code}").strip()

    @contextmanager
    def running(self, *command: str) -> Iterator[Path]:
        """Run *command* meanwhile, a module of Python; yield what it logs to."""
        log = self.folder / "log"
        with (
            log.open("w") as output,
            subprocess.Popen(
                [self.python, "-m", *command],
                cwd=self.folder,
                env=self.env,
                stdout=output,
                stderr=subprocess.STDOUT,
            ) as process,
        ):
            try:
                yield log
            finally:
                process.kill()

    @contextmanager
    def serving(self) -> Iterator[Browser]:
        """Run the project's server; yield a browser that has opened it."""
        url = f"127.0.0.1:{free_port()}"
        _, *manage = self._manage
        module = manage[1:] if manage[0] == "-m" else ["manage"]
        with (
            self.running(*module, "runserver", "--noreload", url) as log,
            requests.Session() as session,
        ):
            browser = Browser(session, f"http://{url}", log)
            browser.wait()
            yield browser


class _Hidden(HTMLParser):
    """The hidden fields of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fields: dict[str, str | None] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        name = given.get("name")
        if tag == "input" and given.get("type") == "hidden" and name:
            self.fields[name] = given.get("value")


class Browser:
    """Somebody who visits a project's site, and sends its forms."""

    def __init__(self, session: requests.Session, url: str, log: Path) -> None:
        session.trust_env = False
        session.headers["Accept"] = "text/html"
        self._session = session
        self._url = url
        self._log = log

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        """Send a request to *path*; follow no redirect."""
        response = self._session.request(
            method,
            f"{self._url}{path}",
            allow_redirects=False,
            timeout=PATIENCE,
            **options,
        )
        assert response.status_code != 500, self._log.read_text()
        return response

    def wait(self) -> None:
        """Wait until the server answers; fail with its log if it does not."""
        give_up = time.monotonic() + PATIENCE
        while True:
            try:
                self.ask("GET", "/nobody-is-here/")
            except requests.ConnectionError:
                assert time.monotonic() < give_up, self._log.read_text()
                time.sleep(0.05)
            else:
                return

    @property
    def csrf_token(self) -> str:
        """The token for requests that scripts send."""
        return str(self._session.cookies["csrftoken"])

    def forget(self) -> None:
        """Log out, as by a browser that is closed."""
        self._session.cookies.clear()

    def send(self, path: str, form: str = "", **fields: Any) -> requests.Response:
        """Open the page *form* (or *path*), and send its form to *path*.

        Fields that the page has hidden, such as the CSRF token, are sent along.
        """
        opened = self.ask("GET", form or path)
        assert opened.status_code == 200, (opened.status_code, opened.text)
        page = _Hidden(opened.text)
        return self.ask(
            "POST",
            path,
            data={**page.fields, **fields},
            headers={"Referer": f"{self._url}{form or path}"},
        )

    def log_in(self, username: str, password: str) -> None:
        """Log in at the admin's page."""
        sent = self.send("/admin/login/", username=username, password=password)
        assert sent.status_code == 302, sent.text
