"""What tests share: the rule about skips, the database, ledgers and a customer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from django.contrib.auth.models import User
from django.db import connection, connections
from django.test import RequestFactory
from django.utils import translation

from django_meterly import client as meterly_client
from django_meterly.testing import faults
from tests import database
from tests.books import fund
from tests.refusing import refusing_database

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from django.test import Client
    from pytest_django import DjangoDbBlocker

    from django_meterly.models import Customer

pytest_plugins = ["tests.selection"]

R = TypeVar("R", pytest.TestReport, pytest.CollectReport)

# Taken out of the environment, because it is no METERLY setting and from_env()
# refuses variables that name none.
NO_SKIP = os.environ.pop("METERLY_TEST_NO_SKIP", "") == "1"

# What only PostgreSQL does.
collect_ignore = []
if connection.vendor != "postgresql":
    collect_ignore += ["test_at_once.py", "test_payers.py"]


def _without_skips(report: R) -> R:
    # An expected failure is reported as a skip, too, but it did run.
    if NO_SKIP and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"METERLY_TEST_NO_SKIP forbids this skip: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[
    None, pytest.TestReport, pytest.TestReport
]:
    return _without_skips((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[
    None, pytest.CollectReport, pytest.CollectReport
]:
    return _without_skips((yield))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The long ones begin first: at the end, nobody waits for one of them.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def django_db_setup(
    django_db_setup: None, django_db_blocker: DjangoDbBlocker
) -> Iterator[None]:
    """Let child processes open the test database: ``DATABASE_URL`` names it."""
    url, mark, options = os.environ["DATABASE_URL"].partition("?")
    server, _, _ = url.rpartition("/")
    name = Path(connection.settings_dict["NAME"]).name
    os.environ["DATABASE_URL"] = f"{server}/{name}{mark}{options}"
    yield
    if connection.vendor == "postgresql":
        # PostgreSQL drops no database that is in use: by a process that was killed a
        # moment ago, or by a thread that asgiref keeps for the next coroutine.
        with django_db_blocker.unblock(), connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )


@pytest.fixture(autouse=True)
def nothing_is_inherited() -> Iterator[None]:
    """Neither a request's language nor a client, with its outage, outlives a test."""
    yield
    translation.deactivate()
    if meterly_client._current is not None:
        meterly_client._current.client.close()
        meterly_client._current = None


@pytest.fixture
def joined(settings: Any) -> None:
    """The ledger in the journal's own database and transactions (the default)."""
    settings.METERLY = {
        **settings.METERLY,
        "TRANSPORT": "django_meterly.ledger.transport.LedgerTransport",
    }


@pytest.fixture
def remote(settings: Any) -> Iterator[faults]:
    """A ledger that joins no transaction, and meets the faults a test names."""
    settings.METERLY = {
        **settings.METERLY,
        "TRANSPORT": "django_meterly.testing.FaultyTransport",
    }
    with faults() as line:
        yield line


@pytest.fixture(params=["joined", "remote"])
def any_ledger(request: pytest.FixtureRequest) -> Any:
    """Both kinds of ledger, one after the other."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def user(db: None) -> User:
    return User.objects.create_user("alice")


@pytest.fixture
def customer(user: User, any_ledger: Any) -> Customer:
    """The user, with 100 credits in either kind of ledger."""
    return fund(user)


@pytest.fixture
def payer(client: Client, user: User, customer: Customer) -> Client:
    """The browser in which the user is logged in."""
    client.force_login(user)
    return client


@pytest.fixture
def request_(user: User) -> Any:
    """A request of the user's, as a view gets it."""
    request = RequestFactory().post("/")
    request.user = user
    return request


@pytest.fixture
def atomic_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """``ATOMIC_REQUESTS`` on the default database."""
    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", True)


@pytest.fixture(params=[False, True], ids=["autocommit", "atomic_requests"])
def any_requests(request: pytest.FixtureRequest) -> bool:
    """Without and with ``ATOMIC_REQUESTS``."""
    if request.param:
        request.getfixturevalue("atomic_requests")
    return bool(request.param)


@pytest.fixture
def refusing() -> Iterator[Callable[[str], None]]:
    """What has the database refuse the accounts of a unit, from then on."""
    with refusing_database() as begin:
        yield begin


@pytest.fixture
def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    return database.free_port()


@pytest.fixture
def prepared() -> Iterator[None]:
    """Let the server bind the parameters, and know the statements."""
    connection.close()
    before = connection.settings_dict["OPTIONS"]
    connection.settings_dict["OPTIONS"] = {**before, "server_side_binding": True}
    yield
    connection.close()
    connection.settings_dict["OPTIONS"] = before
