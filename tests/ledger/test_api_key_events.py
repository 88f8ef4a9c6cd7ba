"""What is on record of a key: its creation, its revocation, and its use after that."""

from __future__ import annotations

from io import StringIO
from threading import Barrier, Thread
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connection, models
from django.test import Client

from django_meterly.db import from_now
from django_meterly.errors import MeterlyUsageError
from django_meterly.ledger.authentication import create_api_key
from django_meterly.ledger.models import ApiKey, ApiKeyEvent
from tests.ledger.test_signature import sign

pytestmark = pytest.mark.django_db

PATH = "/ledger/v1/customers?externalId=a"


def events() -> list[tuple[str, str]]:
    found = ApiKeyEvent.objects.order_by("pk").values_list("kind", "actor")
    return list(found)


@pytest.fixture(params=["bearer", "hmac"])
def api_key(request, workspace) -> tuple[ApiKey, str]:
    return create_api_key(workspace, "x", hmac=request.param == "hmac", actor="me")


def use(api_key: tuple[ApiKey, str], **headers: str) -> Any:
    row, key = api_key
    authorization = sign(key, "GET", PATH) if row.key_id else f"Bearer {key}"
    headers = {"Authorization": authorization, **headers}
    return Client().get(PATH, headers=headers, REMOTE_ADDR="192.0.2.7")


def revoke(row: ApiKey) -> None:
    assert row.revoke(actor="me")


def expire(row: ApiKey) -> None:
    ApiKey.objects.filter(pk=row.pk).update(expires_at=from_now(-1))


def test_f56_creation_and_revocation_are_on_record():
    call_command(
        "meterly_ledger_apikey", "create", "x", stdout=StringIO(), stderr=StringIO()
    )
    row = ApiKey.objects.get()
    assert events() == [("created", "meterly_ledger_apikey")]
    assert row.revoke(actor="alice")
    assert not row.revoke(actor="bob")
    assert events()[1:] == [("revoked", "alice")]


@pytest.mark.parametrize("end", [revoke, expire])
def test_f56_the_use_of_a_dead_key_is_on_record_once_an_hour(api_key, end):
    assert use(api_key).status_code == 200
    end(api_key[0])
    for number in range(5):
        assert use(api_key, **{"X-Request-Id": f"r{number}"}).status_code == 401
    event = ApiKeyEvent.objects.get(kind="refused")
    assert (event.api_key, event.actor) == (api_key[0], "")
    assert (event.request_id, event.remote_address) == ("r0", "192.0.2.7")
    ApiKey.objects.update(refused_at=from_now(-3601))
    use(api_key)
    use(api_key)
    assert [kind for kind, _ in events()].count("refused") == 2


def test_f56_a_key_that_was_never_one_and_a_wrong_signature_leave_no_record(workspace):
    row, key = create_api_key(workspace, "x", hmac=True)
    revoke(row)
    before = events()
    # Key ids are not secret: only who can sign has the key.
    use((row, f"{key[:-1]}{'a' if key[-1] != 'a' else 'b'}"))
    use((row, key.replace(str(row.key_id), "nobody")))
    use((ApiKey(), "mk_live_unknown"))
    assert events() == before


@pytest.mark.django_db(transaction=True)
@pytest.mark.database
def test_f56_many_uses_at_once_leave_one_record(workspace):
    api_key = create_api_key(workspace, "x")
    revoke(api_key[0])
    barrier = Barrier(6)
    statuses = []

    def attack() -> None:
        barrier.wait(30)
        statuses.append(use(api_key).status_code)
        connection.close()

    threads = [Thread(target=attack) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert statuses == [401] * 6
    assert [kind for kind, _ in events()].count("refused") == 1


def test_f56_an_event_cannot_be_changed_or_deleted(api_key):
    event = ApiKeyEvent.objects.get()
    event.actor = "somebody else"
    for change in (
        event.save,
        event.delete,
        ApiKeyEvent.objects.all().delete,
        lambda: ApiKeyEvent.objects.update(actor="x"),
    ):
        with pytest.raises(MeterlyUsageError, match="append-only"):
            change()
    # Nor does its key take it along.
    with pytest.raises(models.ProtectedError):
        api_key[0].delete()
    assert events() == [("created", "me")]
