from __future__ import annotations

import hashlib
import re

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.urls import reverse

from django_meterly.db import from_now
from django_meterly.ledger import seals, spending
from django_meterly.ledger.models import (
    Account,
    ApiKey,
    ApiKeyEvent,
    Entry,
    Hold,
    LedgerCustomer,
    Seal,
    Workspace,
)

pytestmark = pytest.mark.django_db

MODELS = [Account, ApiKey, ApiKeyEvent, LedgerCustomer, Entry, Hold, Seal, Workspace]


@pytest.fixture
def api_key(workspace):
    return ApiKey.objects.create(
        workspace=workspace,
        name="server",
        prefix="mk_live_",
        last4="wxyz",
        key_hash=hashlib.sha256(b"mk_live_secret").hexdigest(),
    )


@pytest.fixture
def rows(workspace, customer, api_key):
    api_key.events.create(kind=ApiKeyEvent.Kind.CREATED, actor="alice")
    spending.reserve(
        workspace.pk, customer, amount=5, reference="job", idempotency_key="job"
    )
    seals.seal_entries()


def url(model, view, *args):
    return reverse(f"admin:meterly_ledger_{model._meta.model_name}_{view}", args=args)


@pytest.mark.parametrize("model", MODELS)
def test_rows_are_listed_searched_and_shown(admin_client, rows, model):
    row = model.objects.first()
    assert admin_client.get(url(model, "changelist")).status_code == 200
    found = admin_client.get(url(model, "changelist"), {"q": "nothing like it"})
    assert found.context["cl"].result_count == 0
    assert admin_client.get(url(model, "change", row.pk)).status_code == 200


def test_an_account_does_not_reserve_what_has_expired(admin_client, rows):
    account = Account.objects.get()
    for expected in ([100, 5, 95], [100, 0, 100]):
        shown = admin_client.get(url(Account, "changelist")).content.decode()
        cells = re.findall(r'class="field-[a-z_]+">(\d+)<', shown)
        assert [int(cell) for cell in cells] == expected
        page = admin_client.get(url(Account, "change", account.pk)).content.decode()
        cells = re.findall(r'class="readonly">(\d+)<', page)
        assert [int(cell) for cell in cells] == expected
        Hold.objects.update(expires_at=from_now(-1))
    ordered = admin_client.get(url(Account, "changelist"), {"o": "4"})
    assert ordered.status_code == 200


@pytest.mark.parametrize("model", MODELS)
def test_not_even_a_superuser_changes_or_deletes_a_row(admin_client, rows, model):
    row = model.objects.first()
    assert admin_client.post(url(model, "change", row.pk), {}).status_code == 403
    assert admin_client.post(url(model, "delete", row.pk), {}).status_code == 403
    action = {"action": "delete_selected", "_selected_action": [row.pk], "post": "yes"}
    admin_client.post(url(model, "changelist"), action)
    assert model.objects.filter(pk=row.pk).exists()


@pytest.mark.parametrize("model", [m for m in MODELS if m is not Workspace])
def test_rows_are_not_added(admin_client, model):
    assert admin_client.get(url(model, "add")).status_code == 403


def test_a_workspace_is_added(admin_client):
    admin_client.post(url(Workspace, "add"), {"name": "acme"})
    admin_client.post(url(Workspace, "add"), {"name": "sandbox", "is_test": "on"})
    admin_client.post(url(Workspace, "add"), {"name": " "})
    found = Workspace.objects.order_by("name").values_list("name", "is_test")
    assert list(found) == [("acme", False), ("sandbox", True)]


@pytest.mark.parametrize(
    ("model", "query"),
    [
        (LedgerCustomer, "user_1"),
        (Account, "user_1"),
        (Hold, "job"),
        (Entry, "opening"),
        (ApiKey, "wxyz"),
        (ApiKeyEvent, "alice"),
        (Workspace, "acme"),
    ],
)
def test_a_row_is_found(admin_client, rows, model, query):
    found = admin_client.get(url(model, "changelist"), {"q": query})
    assert found.context["cl"].result_count == 1


def test_f46_no_page_shows_a_keys_hash(admin_client, api_key):
    for page in (url(ApiKey, "changelist"), url(ApiKey, "change", api_key.pk)):
        content = admin_client.get(page).content.decode()
        assert "wxyz" in content
        assert api_key.key_hash not in content


def revoke(client, api_key):
    return client.post(
        url(ApiKey, "changelist"),
        {"action": "revoke", "_selected_action": [api_key.pk]},
        follow=True,
    )


def test_a_key_is_revoked_once_and_that_is_logged(admin_client, api_key):
    assert "1 key was revoked." in revoke(admin_client, api_key).content.decode()
    api_key.refresh_from_db()
    first = api_key.revoked_at
    assert first is not None

    revoke(admin_client, api_key)

    api_key.refresh_from_db()
    assert api_key.revoked_at == first
    assert LogEntry.objects.count() == 1
    event = api_key.events.get()
    assert (event.kind, event.actor) == ("revoked", "admin")
    shown = admin_client.get(url(ApiKeyEvent, "changelist")).content.decode()
    assert "server (mk_live_…wxyz)" in shown


@pytest.mark.parametrize(
    ("codenames", "revoked"),
    [(["view_apikey"], False), (["view_apikey", "change_apikey"], True)],
)
def test_a_key_is_revoked_only_with_permission(client, api_key, codenames, revoked):
    user = User.objects.create_user("staff", is_staff=True)
    user.user_permissions.set(
        Permission.objects.filter(
            codename__in=codenames, content_type__app_label="meterly_ledger"
        )
    )
    client.force_login(user)

    revoke(client, api_key)

    api_key.refresh_from_db()
    assert (api_key.revoked_at is not None) == revoked
