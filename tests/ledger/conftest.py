from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from django_meterly.ledger import operations

if TYPE_CHECKING:
    from django_meterly.ledger.models import Workspace


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
