from __future__ import annotations

import re
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import IntegrityError, transaction

from django_meterly.db import from_now
from django_meterly.ledger.models import ApiKey, ApiKeyEvent, Workspace
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
    run("create", "x")
    assert ApiKey.objects.get().workspace.name == "shop"


def test_f46_key_is_stored_and_listed_nowhere():
    key = run("create", "shop")[0].strip()
    row = ApiKey.objects.values().get()
    event = ApiKeyEvent.objects.values().get()
    assert key not in repr((row, event))
    assert key not in run("list")[0]
    assert f"{key[:12]}…{key[-4:]}" in run("list")[0]


def test_revoked_key_is_refused_and_listed_as_such(client):
    key = run("create", "shop")[0].strip()
    number = ApiKey.objects.get().pk
    run("revoke", str(number))
    headers = {"Authorization": f"Bearer {key}"}
    assert client.get("/ledger/v1/customers", headers=headers).status_code == 401
    assert "revoked" in run("list")[0]
    with pytest.raises(CommandError, match="revoked already"):
        run("revoke", str(number))


@pytest.mark.parametrize(
    ("options", "scopes"),
    [
        ([], ["read", "spend"]),
        (["--scope", "read"], ["read"]),
        (["--scope", "grant"], ["read", "grant"]),
        (["--scope", "read", "spend", "grant"], ["read", "spend", "grant"]),
    ],
)
def test_f56_a_new_key_may_spend_unless_it_is_told_otherwise(options, scopes):
    run("create", "shop", *options)
    assert ApiKey.objects.get().scopes == scopes
    assert f"\t{','.join(scopes)}\t" in run("list")[0]


def test_f56_a_key_expires_when_it_is_told_to():
    for after in ("12h", "90d", "52w"):
        run("create", after, "--expires", after)
    hours = [
        round((row.expires_at - row.created_at).total_seconds() / 3600, 2)
        for row in ApiKey.objects.order_by("pk")
    ]
    assert hours == [12, 90 * 24, 52 * 7 * 24]
    assert "\texpires 20" in run("list")[0]
    ApiKey.objects.update(expires_at=from_now(-1))
    assert run("list")[0].count("\texpired 20") == 3
    # It can be revoked all the same.
    run("revoke", str(ApiKey.objects.first().pk))
    assert run("list")[0].count("\trevoked 20") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--scope", "admin"], "invalid choice"),
        (["x", "--scope", "write"], "invalid choice"),
        (["x", "--scope", "spend,grant"], "invalid choice"),
        (["x", "--scope"], "expected at least one argument"),
        (["x", "--expires", "90"], '"90" is not a duration like "12h", "90d"'),
        (["x", "--expires", "0d"], "is not a duration"),
        (["x", "--expires=-1d"], "is not a duration"),
        (["x", "--expires", "1y"], "is not a duration"),
        (["x", "--expires", "999999w"], "is not a duration"),
        ([""], "name of a key must be"),
        ([" "], "name of a key must be"),
        (["a\nb"], "name of a key must be"),
        (["a\x1b[2J"], "name of a key must be"),
        (["x" * 256], "name of a key must be"),
    ],
)
def test_f56_a_wrong_value_is_refused_and_creates_nothing(arguments, message):
    with pytest.raises(CommandError, match=message):
        run("create", *arguments)
    assert not ApiKey.objects.exists()
    assert not Workspace.objects.exists()


def test_f56_a_test_key_is_one_of_a_test_workspace_that_is_created(settings):
    settings.METERLY_LEDGER = {"WORKSPACE": "shop"}
    bearer, hmac = (run("create", "x", "--test", *kind)[0] for kind in ([], ["--hmac"]))
    assert bearer.startswith("mk_test_")
    assert hmac.startswith("mk_hmac_test")
    workspace = Workspace.objects.get()
    assert (workspace.name, workspace.is_test) == ("shop-test", True)
    run("create", "x", "--test", "--workspace", "sandbox")
    assert Workspace.objects.get(name="sandbox").is_test


def test_f56_test_and_live_keys_are_not_created_in_one_workspace():
    run("create", "x", "--workspace", "live")
    run("create", "x", "--workspace", "sandbox", "--test")
    for kind in ([], ["--hmac"]):
        with pytest.raises(CommandError, match='"live" is not a test workspace'):
            run("create", "x", "--workspace", "live", "--test", *kind)
        with pytest.raises(CommandError, match='"sandbox" is a test workspace'):
            run("create", "x", "--workspace", "sandbox", *kind)
    assert ApiKey.objects.count() == 2


def test_f56_the_database_has_no_key_without_a_name(workspace):
    with pytest.raises(IntegrityError), transaction.atomic():
        ApiKey.objects.create(workspace=workspace, name="", key_id="k")


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
