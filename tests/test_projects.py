"""Each project of ``tests/projects``, from ``migrate`` to books that balance."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
import requests
from django.db import connection

from tests.projects.running import Project, environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.projects.running import Browser

ROOT_PASSWORD = "a password"
GRANT = (
    "from django_meterly import get_client, grants\n"
    "from django_meterly.models import Customer\n"
    "customer = Customer.objects.get()\n"
    "print(grants.grant(get_client(), customer, 100, 'image_credits', "
    "reason='Welcome', reference='welcome'))"
)
BALANCE = (
    "from django_meterly import get_client\n"
    "from django_meterly.models import Customer\n"
    "id = Customer.objects.get().customer_id\n"
    "account, = get_client().get_balances(id).balances\n"
    "print(account.available, account.reserved)"
)


class Story:
    """Somebody without credits gets some, and orders posters.

    By session and form, with credits that the admin grants; the others differ.
    """

    def __init__(self, name: str, folder: Path, **env: str) -> None:
        self.name = name
        self.project = Project(
            folder,
            env=environment(
                DJANGO_SETTINGS_MODULE=f"tests.projects.{name}.settings",
                PROJECT_FOLDER=str(folder),
                DJANGO_SUPERUSER_PASSWORD=ROOT_PASSWORD,
                **env,
            ),
        )

    def prepare(self) -> None:
        self.project.manage(
            "createsuperuser",
            "--noinput",
            "--username",
            "root",
            "--email",
            "root@example.com",
        )

    def arrive(self, browser: Browser) -> None:
        browser.log_in("root", ROOT_PASSWORD)

    def order(self, browser: Browser, how: str = "") -> requests.Response:
        return browser.send("/order/", **({how: "1"} if how else {}))

    def grant(self, browser: Browser) -> None:
        customers = "/admin/meterly/customer/"
        listed = browser.ask("GET", customers)
        assert listed.status_code == 200
        chosen = browser.send(
            customers, action="grant_credits", _selected_action="1", index="0"
        )
        page = chosen.headers["Location"]
        wrong = browser.send(page, amount="ten", unit="image_credits", reason="A gift")
        assert (wrong.status_code, "digits only" in wrong.text) == (200, True)
        sent = browser.send(page, amount="100", unit="image_credits", reason="A gift")
        assert sent.headers["Location"] == f"{customers}1/change/", sent.text
        shown = browser.ask("GET", f"{customers}1/change/")
        assert "image_credits" in shown.text
        for admin in ("reservation", "grant"):
            listed = browser.ask("GET", f"/admin/meterly/{admin}/")
            assert listed.status_code == 200

    def sweep(self) -> None:
        self.project.manage("meterly_settle")

    def tell(self) -> None:
        """Tell all of it, from an empty folder."""
        project = self.project
        project.manage("migrate", "--verbosity=0")
        project.manage("check", "--database=default")
        self.prepare()
        with project.serving() as browser:
            self.arrive(browser)
            self.poor(self.order(browser))
            self.grant(browser)
            assert self.order(browser).status_code == 200
            assert project.shell(BALANCE) == "75 0"
            assert self.order(browser, "fail").status_code == 403
            assert project.shell(BALANCE) == "75 0"
            with pytest.raises(requests.ConnectionError):
                self.order(browser, "die")
        assert project.shell(BALANCE) in ("50 25", "75 0")
        # The hold lasts a second, and its lease a little longer.
        time.sleep(1.5)
        self.sweep()
        assert project.shell(BALANCE) == "75 0"
        project.manage("meterly_ledger_verify")

    def poor(self, response: requests.Response) -> None:
        assert response.status_code == 402
        assert "Not enough credits" in response.text


class Teams(Story):
    def prepare(self) -> None:
        self.project.manage(
            "createsuperuser",
            "--noinput",
            "--username=root",
            "--email=root@example.com",
        )
        self.project.shell(
            "from tests.projects.teams.models import Member\n"
            "Member.objects.create_user('lone', 'lone@example.com', 'a password', "
            "is_staff=True)"
        )

    def arrive(self, browser: Browser) -> None:
        browser.log_in("lone@example.com", ROOT_PASSWORD)
        alone = self.order(browser)
        assert (alone.status_code, "Nobody pays" in alone.text) == (403, True)
        browser.forget()
        browser.log_in("root@example.com", ROOT_PASSWORD)


class Tokens(Story):
    headers = {"Accept": "application/json"}

    def arrive(self, browser: Browser) -> None:
        assert self.order(browser).status_code == 401
        who = {"username": "root", "password": ROOT_PASSWORD}
        given = browser.ask("POST", "/token/", data=who, headers=self.headers)
        token = given.json()["token"]
        self.headers = {**self.headers, "Authorization": f"Token {token}"}

    def order(self, browser: Browser, how: str = "") -> requests.Response:
        data = {how: 1} if how else {}
        return browser.ask("POST", "/order/", json=data, headers=self.headers)

    def poor(self, response: requests.Response) -> None:
        (error,) = response.json()["errors"]
        assert (response.status_code, error["code"]) == (402, "insufficient_credits")

    def grant(self, browser: Browser) -> None:
        self.project.shell(GRANT)
        balances = browser.ask("GET", "/credits/balances/", headers=self.headers)
        assert balances.json()["balances"][0]["available"] == 100


class Bare(Story):
    def prepare(self) -> None:
        self.project.shell(
            "from tests.projects.bare.models import Person\n"
            "Person.objects.create(name='ada')"
        )

    def arrive(self, browser: Browser) -> None:
        away = browser.ask("POST", "/order/")
        assert away.headers["Location"] == "/accounts/login/?next=/order/"

    def order(self, browser: Browser, how: str = "") -> requests.Response:
        data = {how: "1"} if how else {}
        return browser.ask("POST", "/order/", data=data, headers={"X-Person": "ada"})

    def poor(self, response: requests.Response) -> None:
        super().poor(response)
        assert "text/html" in response.headers["Content-Type"]

    def grant(self, browser: Browser) -> None:
        blocked = browser.ask("POST", "/block/", headers={"X-Person": "ada"})
        self.poor(blocked)
        self.project.shell(GRANT)


class Ninja(Story):
    def order(self, browser: Browser, how: str = "") -> requests.Response:
        headers = {"X-CSRFToken": browser.csrf_token}
        return browser.ask("POST", "/api/order", json={"how": how}, headers=headers)


class Naive(Story):
    def sweep(self) -> None:
        told = self.project.shell(
            "import datetime as dt\n"
            "from django_meterly.models import Reservation\n"
            "now = dt.datetime.now()\n"
            "for row in Reservation.objects.all():\n"
            "    assert abs(row.created_at - now) < dt.timedelta(minutes=5), row\n"
            "print('right')"
        )
        assert told == "right"
        super().sweep()


class Cached(Story):
    def prepare(self) -> None:
        super().prepare()
        told = self.project.shell(
            "from tests.projects.cached.checked import main; main()"
        )
        assert told == "9 cases"


SWEPT = """
from django_celery_beat.models import PeriodicTask
from django_meterly.models import Reservation
still_open = Reservation.objects.exclude(state__in=Reservation.State.final())
ours = PeriodicTask.objects.filter(task__startswith="django_meterly")
print(still_open.count(), ours.count())
"""


class Beat(Story):
    def sweep(self) -> None:
        with self.project.running(
            "celery",
            "--app=tests.projects.beat.celery",
            "worker",
            "--beat",
            "--pool=solo",
            "--loglevel=INFO",
            "--schedule=unused",
        ) as log:
            give_up = time.monotonic() + 60
            # Nothing is open any more, and the schedule is in the database.
            while self.project.shell(SWEPT) != "0 4":
                assert time.monotonic() < give_up, log.read_text()
        assert self.project.shell(BALANCE) == "75 0"


STORIES: dict[str, type[Story]] = {
    "teams": Teams,
    "tokens": Tokens,
    "uuids": Story,
    "replica": Story,
    "bare": Bare,
    "naive": Naive,
    "themed": Story,
    "ninja": Ninja,
    "cached": Cached,
}
if find_spec("django_celery_beat"):
    # It does not allow Django 6.1. tox installs it in the environments below that,
    # where only quick tests are run.
    STORIES["beat"] = Beat
#: Quick, and far from what the other tests have.
QUICK = ("bare", "beat")
SLOW = pytest.mark.slow("whole projects, of which some were run")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=() if name in QUICK else SLOW,
        )
        for name in STORIES
    ],
)
def test_a_whole_project_reserves_charges_and_releases(
    name: str, tmp_path: Path
) -> None:
    STORIES[name](name, tmp_path).tell()


if connection.vendor == "postgresql":

    @pytest.fixture
    def database_url(db: None) -> Iterator[str]:
        """Another database on the server of the tests, empty."""
        import psycopg

        server = urlsplit(os.environ["DATABASE_URL"])._replace(query="")
        name = f"project_{os.getpid()}"
        with psycopg.connect(server.geturl(), autocommit=True) as administrator:
            administrator.execute(f'CREATE DATABASE "{name}"')
            try:
                yield server._replace(path=f"/{name}").geturl()
            finally:
                administrator.execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    @pytest.mark.database
    @SLOW
    def test_a_project_with_a_pool_of_connections(
        tmp_path: Path, database_url: str
    ) -> None:
        Story("pooled", tmp_path, PROJECT_DATABASE_URL=database_url).tell()
