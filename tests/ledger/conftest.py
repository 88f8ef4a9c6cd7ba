from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from django.conf import settings
from django.core.cache import cache

from django_meterly.ledger import operations, postgresql

if TYPE_CHECKING:
    from django_meterly.ledger.models import Workspace

ENGINE = settings.DATABASES["default"]["ENGINE"]
POSTGRESQL = ENGINE == "django.db.backends.postgresql"
PATHS = ["functions", "portable"] if POSTGRESQL else ["portable"]
collect_ignore = [] if POSTGRESQL else ["test_paths.py", "test_postgresql.py"]


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
    return operations.ensure_workspace("acme")


@pytest.fixture
def customer(workspace: Workspace) -> str:
    """The id of a customer with 100 credits of the unit "credits"."""
    return operations.grant(
        workspace.pk,
        external_id="user_1",
        amount=100,
        credit_unit="credits",
        reference="opening",
        idempotency_key="opening",
    ).account.customer_id
