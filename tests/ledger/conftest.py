from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from django.conf import settings
from django.core.cache import cache

from django_meterly.ledger import customers, grants, postgresql, spending

if TYPE_CHECKING:
    from collections.abc import Callable

    from django_meterly.ledger.models import Workspace

ENGINE = settings.DATABASES["default"]["ENGINE"]
POSTGRESQL = ENGINE == "django.db.backends.postgresql"
PATHS = ["functions", "portable"] if POSTGRESQL else ["portable"]
collect_ignore = [] if POSTGRESQL else ["test_paths.py", "test_postgresql.py"]
if ENGINE == "django.db.backends.sqlite3":
    # It has one writer at a time, and no roles.
    collect_ignore += ["test_gaps.py", "test_roles.py"]


@pytest.fixture(params=PATHS)
def any_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to move credits on PostgreSQL, in child processes too."""
    monkeypatch.setattr(postgresql, "enabled", request.param == "functions")
    monkeypatch.setenv("LEDGER_PATH", request.param)
    path: str = request.param
    return path


@pytest.fixture(autouse=True)
def no_failures_are_remembered() -> None:
    """All tests send from one address, and their bad keys are counted together."""
    cache.clear()


@pytest.fixture
def workspace(request: pytest.FixtureRequest) -> Workspace:
    """A workspace, in a test that has a database already."""
    return customers.ensure_workspace("acme")


@pytest.fixture
def customer(workspace: Workspace) -> str:
    """The id of a customer with 100 credits of the unit "credits"."""
    return grants.grant(
        workspace.pk,
        external_id="user_1",
        amount=100,
        credit_unit="credits",
        reference="opening",
        idempotency_key="opening",
    ).account.customer_id


@pytest.fixture
def move(workspace: Workspace, customer: str) -> Callable[..., int]:
    """Use one credit, by default of the customer, and return the entry's id."""
    from django_meterly.ledger.models import Entry

    numbers = iter(range(10_000))

    def move(customer_id: str = customer) -> int:
        key = f"move-{next(numbers)}"
        entry = spending.use(
            workspace.pk, customer_id, amount=1, reference=key, idempotency_key=key
        )
        pk: int = Entry.objects.get(public_id=entry.entry_id).pk
        return pk

    return move


@pytest.fixture
def other(workspace: Workspace) -> str:
    """A customer whose account nobody else waits for."""
    return grants.grant(
        workspace.pk,
        external_id="user_2",
        amount=100,
        credit_unit="credits",
        reference="opening",
        idempotency_key="opening-2",
    ).account.customer_id
