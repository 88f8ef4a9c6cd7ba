from __future__ import annotations

import re
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from django_meterly.ledger.models import ApiKey

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


def test_action_is_required():
    with pytest.raises(CommandError):
        run()


@pytest.mark.parametrize("name", ["", " acme", "x" * 256])
def test_workspace_that_settings_could_not_name_is_refused(name):
    with pytest.raises(CommandError, match="--workspace must be"):
        run("create", "shop", "--workspace", name)
    assert not ApiKey.objects.exists()
