"""Entries and seals are never changed: what Python and the database refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
from django.core.management import CommandError, call_command
from django.db import DatabaseError, IntegrityError, connection, models, transaction

from django_meterly import errors
from django_meterly.ledger import checks, customers, seals, spending, triggers
from django_meterly.ledger.models import SHAPES, Entry, Hold, Seal
from tests.ledger.holds import reserve
from tests.ledger.tampering import sql, unguarded

pytestmark = pytest.mark.database

committing = pytest.mark.django_db(transaction=True)


@pytest.fixture
def entry(workspace, customer):
    """The last one of two entries, both sealed."""
    reserve(workspace, customer)
    seals.seal_entries()
    return Entry.objects.order_by("pk").last()


@contextmanager
def refused(error=IntegrityError, match="append-only"):
    """Expect an error, and rows that are as before."""
    before = [list(model.objects.order_by("pk").values()) for model in (Entry, Seal)]
    with pytest.raises(error, match=match), transaction.atomic():
        yield
    after = [list(model.objects.order_by("pk").values()) for model in (Entry, Seal)]
    assert after == before


# What Python has for it


@pytest.mark.django_db
@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.save(),
        lambda entry: entry.save(update_fields=["amount"]),
        lambda entry: entry.delete(),
        lambda entry: Entry.objects.filter(pk=entry.pk).update(amount=1),
        lambda entry: Entry.objects.filter(pk=entry.pk).delete(),
        lambda entry: Entry.objects.all()._raw_delete("default"),
        lambda entry: Entry.objects.bulk_update([entry], ["amount"]),
        lambda entry: Entry.objects.update_or_create(
            {"amount": 1}, public_id=entry.public_id
        ),
        lambda entry: Entry.objects.bulk_create(
            [entry],
            update_conflicts=True,
            update_fields=["amount"],
            unique_fields=["public_id"],
        ),
        lambda entry: entry.account.entries.update(amount=1),
        lambda entry: Seal.objects.update(count=9),
        lambda entry: Seal.objects.all().delete(),
        lambda entry: Seal.objects.get().save(),
    ],
)
def test_f52_python_refuses_to_change_an_entry(entry, change):
    with refused(errors.MeterlyUsageError):
        change(entry)


@pytest.mark.django_db
def test_f52_an_entry_made_with_a_taken_primary_key_is_refused(entry):
    values = Entry.objects.filter(pk=entry.pk).values().get()
    with refused(match=None):
        Entry(**{**values, "amount": 1}).save()
    with refused(match=None):
        Entry(**values).save()


@pytest.mark.django_db
def test_f52_managers_that_know_nothing_are_refused_by_the_database(entry):
    plain = models.QuerySet(Entry).filter(pk=entry.pk)
    with refused():
        plain.update(amount=1)
    with refused():
        plain._raw_delete("default")
    with refused():
        Entry.save_base(entry, raw=True)


# What SQL has for it


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("model", "column"),
    [
        (model, field.column)
        for model in (Entry, Seal)
        for field in model._meta.concrete_fields
    ],
)
def test_f52_no_column_is_updated(entry, model, column):
    with refused():
        sql(f"UPDATE {model._meta.db_table} SET {column} = {column}")


@pytest.mark.django_db
@pytest.mark.parametrize("key", ["id", "public_id", "idempotency_key"])
def test_f52_no_insert_replaces_a_row(entry, key):
    values = Entry.objects.filter(pk=entry.pk).values().get()
    fresh = {
        "id": entry.pk + 1000,
        "public_id": "ent_new",
        "idempotency_key": "new",
        "amount": 99,
        "reserved_delta": 99,
    }
    del fresh[key]
    values |= fresh
    columns = ", ".join(values)
    places = ", ".join(["%s"] * len(values))
    insert = f"INTO meterly_ledger_entry ({columns}) VALUES ({places})"
    if connection.vendor == "postgresql":
        unique = "workspace_id, idempotency_key" if key == "idempotency_key" else key
        ways = [f"INSERT {insert} ON CONFLICT ({unique}) DO UPDATE SET amount = 99"]
    elif connection.vendor == "mysql":
        ways = [
            f"REPLACE {insert}",
            f"INSERT {insert} ON DUPLICATE KEY UPDATE amount = 99",
        ]
    else:
        ways = [
            f"INSERT OR REPLACE {insert}",
            f"REPLACE {insert}",
            f"INSERT {insert} ON CONFLICT DO UPDATE SET amount = 99",
        ]
    for way in ways:
        with refused():
            sql(way, *values.values())


@pytest.mark.django_db
def test_f52_an_update_that_replaces_is_refused(entry):
    if connection.vendor == "sqlite":
        with refused():
            sql("UPDATE OR REPLACE meterly_ledger_entry SET public_id = 'x'")


@pytest.mark.django_db
@pytest.mark.parametrize("model", [Entry, Seal])
def test_f52_a_row_is_not_deleted(entry, model):
    entries = models.QuerySet(Entry).order_by("pk")
    if model is Seal:
        reserve(entry.workspace, entry.account.customer.public_id, 1, "another")
        seals.seal_entries()
    last = model.objects.order_by("pk").last().pk
    pk = model._meta.pk.column
    with refused():
        sql(f"DELETE FROM {model._meta.db_table} WHERE {pk} = %s", last)
    assert entries.exists()


@pytest.mark.django_db
def test_f52_sqlite_deletes_from_the_oldest_on_and_verify_finds_it(entry, capsys):
    if connection.vendor != "sqlite":
        return
    first = Entry.objects.order_by("pk").first()
    sql("DELETE FROM meterly_ledger_entry WHERE id = %s", first.pk)
    with pytest.raises(CommandError):
        call_command("meterly_ledger_verify")
    out = capsys.readouterr().out
    assert "balance_after" in out
    assert f"entries {first.pk} to {first.pk}" in out


# Shapes


def test_every_kind_has_a_shape():
    assert {*SHAPES} == {*Entry.Kind.values}


GOOD = {
    "credits_granted": {"balance_delta": 5, "unique_reference": "r"},
    "credits_added": {"balance_delta": 5, "unique_reference": "r"},
    "credits_used": {"balance_delta": -5},
    "credits_reserved": {"reserved_delta": 5, "hold": True},
    "credits_committed": {"balance_delta": -5, "reserved_delta": -5, "hold": True},
    "credits_released": {"reserved_delta": -5, "hold": True},
    "credits_expired": {"reserved_delta": -5, "hold": True},
}


@pytest.mark.django_db
@pytest.mark.parametrize("kind", SHAPES)
def test_f52_the_database_ties_kind_amount_and_deltas_together(entry, kind):
    hold = Hold.objects.get()

    def attempt(**changes):
        values = {
            "public_id": "ent_new",
            "workspace_id": entry.workspace_id,
            "account_id": entry.account_id,
            "kind": kind,
            "amount": 5,
            "balance_delta": 0,
            "reserved_delta": 0,
            "balance_after": 10,
            "reserved_after": 5,
            "reference": "r",
            **GOOD[kind],
            **changes,
        }
        values["hold"] = hold if values.get("hold") else None
        try:
            with transaction.atomic():
                Entry(**values).save()
                transaction.set_rollback(True)
        except DatabaseError:
            return False
        return True

    assert attempt()
    committed = kind == "credits_committed"
    # A commit of nothing, and of a part.
    assert attempt(amount=0, balance_delta=0) is committed
    assert attempt(reserved_delta=-9) is committed
    for other in {*SHAPES} - {kind}:
        deltas = [
            {name: GOOD[each].get(name) for name in ("balance_delta", "reserved_delta")}
            for each in (kind, other)
        ]
        alike = deltas[0] == deltas[1]
        assert attempt(kind=other) is alike, other
    for changes in (
        {"kind": "credits_invented"},
        {"amount": 0},
        {"amount": 4},
        {"amount": -5, "balance_delta": 5, "reserved_delta": 5},
        *({"balance_delta": n} for n in (-6, -4, 4, 6)),
        {"reserved_delta": -4},
        {"reserved_delta": 4},
    ):
        assert not attempt(**changes), changes


@pytest.mark.django_db
@pytest.mark.parametrize("amount", [0, -1, -(2**63)])
def test_f52_amounts_that_move_credits_backwards_are_refused(
    any_path, workspace, customer, amount
):
    held = reserve(workspace, customer, 10, "held")
    for call in (
        lambda: spending.use(
            workspace.pk, customer, amount=amount, reference="r", idempotency_key="u"
        ),
        lambda: reserve(workspace, customer, amount),
        lambda: spending.commit(
            workspace.pk,
            held.reservation_id,
            # Nothing may be charged, but not less.
            amount=amount or -1,
            idempotency_key="c",
        ),
    ):
        with pytest.raises(errors.MeterlyInvalidRequestError) as caught:
            call()
        assert caught.value.details.keys() == {"fields"}
    account = customers.default_balance(workspace.pk, customer)
    assert (account.balance, account.reserved) == (100, 10)
    assert Entry.objects.count() == 2


# Where the triggers are


@committing
def test_f52_migrate_creates_what_is_missing():
    assert triggers.missing(connection) == []
    triggers.drop_triggers(connection)
    missing = triggers.missing(connection)
    assert [*missing] == [*triggers.triggers(connection)]
    call_command("migrate", verbosity=0)
    assert triggers.missing(connection) == []


@committing
def test_f52_migrate_mends_a_trigger_that_does_nothing(transactional_db):
    name = "meterly_ledger_entry_no_update"
    if connection.vendor == "postgresql":
        sql("ALTER TABLE meterly_ledger_entry DISABLE TRIGGER ALL")
    elif connection.vendor == "mysql":
        sql(f"DROP TRIGGER {name}")
        sql(
            f"CREATE TRIGGER {name} BEFORE UPDATE ON meterly_ledger_entry "
            "FOR EACH ROW SET NEW.amount = NEW.amount"
        )
    else:
        sql(f"DROP TRIGGER {name}")
        sql(
            f"CREATE TRIGGER {name} BEFORE UPDATE ON meterly_ledger_entry "
            "BEGIN SELECT 1; END"
        )
    assert len(triggers.missing(connection)) == 1
    call_command("migrate", verbosity=0)
    assert triggers.missing(connection) == []


@committing
def test_f52_a_table_that_a_migration_makes_anew_gets_its_triggers_back(entry):
    field = models.CharField(max_length=20, null=True)
    field.set_attributes_from_name("extra")
    altered = models.CharField(max_length=40, null=True)
    altered.set_attributes_from_name("extra")
    field.model = altered.model = Entry
    with connection.schema_editor() as editor:
        editor.add_field(Entry, field)
        editor.alter_field(Entry, field, altered)
    with connection.schema_editor() as editor:
        editor.remove_field(Entry, altered)
    call_command("migrate", verbosity=0)
    assert triggers.missing(connection) == []
    with refused():
        sql("UPDATE meterly_ledger_entry SET amount = 1")


@committing
@pytest.mark.skipif(
    "config.getoption('nomigrations')", reason="This run has no migrations to test."
)
def test_f52_migrating_back_leaves_nothing_behind():
    try:
        call_command("migrate", "meterly_ledger", "zero", verbosity=0)
        tables = connection.introspection.table_names()
        assert not [name for name in tables if name.startswith("meterly_ledger")]
        assert checks.check_triggers(databases=["default"]) == []
    finally:
        call_command("migrate", verbosity=0)
    assert triggers.missing(connection) == []


@committing
def test_f52_a_check_and_verify_say_that_triggers_are_missing(entry, capsys):
    assert checks.check_triggers(databases=["default"]) == []
    with unguarded():
        (message,) = checks.check_triggers(databases=["default"])
        assert message.id == "meterly_ledger.W001"
        assert "'default'" in message.msg
        # Without the databases, Django asks for no connection.
        assert checks.check_triggers(databases=None) == []
        call_command("meterly_ledger_verify")
    said = capsys.readouterr()
    assert "does not refuse changes" in said.err
    assert "the books balance" in said.out
    call_command("meterly_ledger_verify")
    assert capsys.readouterr().err == ""


# Other people's projects

SETTINGS = """
import os
from pathlib import Path
from tests.settings import DATABASES, env

SECRET_KEY = "x"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES["default"]["NAME"] = env("PLAIN_NAME")
DATABASES["default"]["TEST"] = {"NAME": env("PLAIN_NAME") + "_test"}
INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "django_meterly",
    "django_meterly.ledger",
    "plain",
]
METERLY = {
    "TRANSPORT": "django_meterly.ledger.transport.LedgerTransport",
    "UNITS": {"credits": "credits"},
}
"""

TESTS = """
from django.test import TestCase, TransactionTestCase
from django_meterly import get_client
from django_meterly.ledger.models import Entry
from django_meterly.ledger import seals

def move(case):
    client = get_client()
    case.assertEqual(Entry.objects.count(), case.there)
    granted = client.grant_credits("user_1", 100, "credits", "welcome")
    held = client.reserve_credits(granted.grant.customer_id, 10, unit="credits")
    client.commit_reservation(held.reservation_id)
    client.use_credits(granted.grant.customer_id, 5, unit="credits")
    case.assertEqual(Entry.objects.count(), case.there + 4)

class Committing(TransactionTestCase):
    there = 0
    def test_one(self):
        move(self)
        self.assertEqual(seals.seal_entries().entries, 4)
    def test_two(self):
        move(self)

class Chosen(TransactionTestCase):
    available_apps = [
        "django.contrib.contenttypes", "django.contrib.auth",
        "django_meterly", "django_meterly.ledger", "plain",
    ]
    reset_sequences = True
    there = 0
    def test_one(self):
        move(self)
    def test_two(self):
        move(self)

class Fixture(TransactionTestCase):
    fixtures = ["books.json"]
    there = 2
    def test_one(self):
        move_with_fixture(self)
    def test_two(self):
        move_with_fixture(self)

class FixtureRolledBack(TestCase):
    fixtures = ["books.json"]
    there = 2
    def test_one(self):
        move_with_fixture(self)

def move_with_fixture(case):
    case.assertEqual(Entry.objects.count(), 2)
    get_client().grant_credits("user_0", 1, "credits", "more")
    case.assertEqual(Entry.objects.count(), 3)
"""

STORY = """
from django.core.management import call_command
from django_meterly import get_client
from django_meterly.ledger.models import Entry

client = get_client()
granted = client.grant_credits("user_0", 100, "credits", "welcome")
client.use_credits(granted.grant.customer_id, 5, unit="credits")
call_command("meterly_ledger_seal")
# It cuts times to milliseconds: what was sealed is not the same any more.
call_command(
    "dumpdata",
    "meterly_ledger",
    exclude=["meterly_ledger.seal"],
    output="plain/fixtures/books.json",
)
call_command("flush", interactive=False)
assert Entry.objects.count() == 0
call_command("loaddata", "books.json")
assert Entry.objects.count() == 2
call_command("meterly_ledger_verify")
call_command("flush", interactive=False)
call_command("flush", interactive=False)
call_command("loaddata", "books.json")
call_command("meterly_ledger_verify")
"""


@committing
@pytest.mark.slow("a project of its own, and Django's test runner in it")
def test_f52_flush_loaddata_and_transaction_test_cases_go_on_working(tmp_path):
    app = tmp_path / "plain"
    (app / "fixtures").mkdir(parents=True)
    (app / "__init__.py").touch()
    (app / "models.py").touch()
    (app / "settings.py").write_text(SETTINGS)
    (app / "tests.py").write_text(TESTS)
    (app / "story.py").write_text(STORY)
    (tmp_path / "manage.py").write_text(
        "import sys\n"
        "from django.core.management import execute_from_command_line\n"
        "execute_from_command_line(sys.argv)\n"
    )
    name = connection.settings_dict["NAME"]
    plain = f"{name}_plain"
    if connection.vendor == "sqlite":
        plain = str(tmp_path / "plain.sqlite3")
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "plain.settings",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()]),
        "PLAIN_NAME": plain,
    }

    def manage(*arguments):
        done = subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=tmp_path,
            env=environment,
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    if connection.vendor != "sqlite":
        sql(f"CREATE DATABASE {connection.ops.quote_name(plain)}")
    try:
        manage("migrate", "-v0")
        assert "no issues" in manage("check", "--database", "default")
        said = manage("shell", "-v0", "-c", "import plain.story")
        assert said.count("the books balance") == 2
        assert "OK" in manage("test", "--noinput")
        # As most projects do it: with the fixtures of the other database's.
        assert "OK" in manage("test", "--noinput", "--reverse", "--keepdb")
    finally:
        if connection.vendor != "sqlite":
            for database in (plain, f"{plain}_test"):
                sql(f"DROP DATABASE IF EXISTS {connection.ops.quote_name(database)}")
