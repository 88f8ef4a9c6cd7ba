from __future__ import annotations

import re
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from django_meterly.ledger.models import ApiKey
from tests.ledger.test_signature import sign

pytestmark = pytest.mark.django_db


def run(*arguments: Any) -> tuple[str, str]:
    stdout, stderr = StringIO(), StringIO()
    call_command("meterly_ledger_apikey", *arguments, stdout=stdout, stderr=stderr)
    return stdout.getvalue(), stderr.getvalue()


def test_created_key_is_all_of_stdout_and_lets_its_workspace_in(client):
    stdout, stderr = run("create", "shop", "--workspace", "acme")
    key = stdout.removesuffix("\n")
    assert re.fullmatch(r"mk_live_[A-Za-z0-9_-]{43}", key)
    assert "acme" in stderr
    assert key not in stderr
    response = client.get(
        "/ledger/v1/customers",
        {"externalId": "a"},
        headers={"Authorization": f"Bearer {key}"},
    )
    assert response.status_code == 200
    assert ApiKey.objects.get().workspace.name == "acme"


def test_workspace_is_the_settings_one_by_default(settings):
    settings.METERLY_LEDGER = {"WORKSPACE": "shop"}
    stdout, _ = run("create", "x", "--test")
    assert stdout.startswith("mk_test_")
    assert ApiKey.objects.get().workspace.name == "shop"


def test_f46_key_is_stored_and_listed_nowhere():
    key = run("create", "shop")[0].strip()
    row = ApiKey.objects.values().get()
    assert key not in repr(row)
    assert key not in run("list")[0]
    assert f"{key[:12]}…{key[-4:]}" in run("list")[0]


def test_revoked_key_is_refused_and_listed_as_such(client):
    key = run("create", "shop")[0].strip()
    number = ApiKey.objects.get().pk
    run("revoke", str(number))
    headers = {"Authorization": f"Bearer {key}"}
    assert client.get("/ledger/v1/customers", headers=headers).status_code == 401
    assert "revoked" in run("list")[0]
    with pytest.raises(CommandError, match="no active key"):
        run("revoke", str(number))


def test_a_new_key_may_write_unless_it_is_told_to_read():
    run("create", "shop")
    run("create", "reports", "--scope", "read")
    assert list(ApiKey.objects.order_by("pk").values_list("scope", flat=True)) == [
        "write",
        "read",
    ]
    with pytest.raises(CommandError, match="invalid choice"):
        run("create", "shop", "--scope", "admin")


def test_an_hmac_key_is_all_of_stdout_and_its_secret_listed_nowhere():
    stdout, stderr = run("create", "shop", "--hmac")
    key = stdout.removesuffix("\n")
    row = ApiKey.objects.get()
    assert re.fullmatch(rf"mk_hmac_{row.key_id}_[A-Za-z0-9_-]{{43}}", key)
    assert row.kind == "hmac"
    listed = run("list")[0]
    assert f"mk_hmac_{row.key_id}_…\thmac\t" in listed.replace(")", "")
    for text in (stderr, listed):
        assert key.removeprefix(f"mk_hmac_{row.key_id}_") not in text
    with pytest.raises(CommandError, match="--test is for bearer keys"):
        run("create", "shop", "--hmac", "--test")


def test_the_list_tells_when_a_key_was_last_used(client):
    key = run("create", "shop")[0].strip()
    assert "never used" in run("list")[0]
    client.get("/ledger/v1/customers", headers={"Authorization": f"Bearer {key}"})
    assert re.search(r"last used \d{4}-\d\d-\d\d \d\d:\d\d$", run("list")[0].strip())


@pytest.mark.parametrize("kind", [[], ["--hmac"]])
def test_a_key_is_rotated_with_two_active_at_once(client, kind):
    def status(key):
        path = "/ledger/v1/customers?externalId=a"
        authorization = sign(key, "GET", path) if kind else f"Bearer {key}"
        return client.get(path, headers={"Authorization": authorization}).status_code

    old, new = (run("create", "shop", *kind)[0].strip() for _ in range(2))
    assert (status(old), status(new)) == (200, 200)
    run("revoke", str(ApiKey.objects.order_by("pk").first().pk))
    assert (status(old), status(new)) == (401, 200)


def test_action_is_required():
    with pytest.raises(CommandError):
        run()


@pytest.mark.parametrize("name", ["", " acme", "x" * 256])
def test_workspace_that_settings_could_not_name_is_refused(name):
    with pytest.raises(CommandError, match="--workspace must be"):
        run("create", "shop", "--workspace", name)
    assert not ApiKey.objects.exists()
