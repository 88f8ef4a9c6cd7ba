from __future__ import annotations

import os
import sys
import tracemalloc
from io import StringIO
from typing import ClassVar

import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.db.models import F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.extra.django import TestCase
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from django_meterly import errors
from django_meterly.db import from_now
from django_meterly.ledger import (
    customers,
    expiry,
    grants,
    seals,
    spending,
    verification,
)
from django_meterly.ledger.idempotency import fingerprint_of
from django_meterly.ledger.management.commands import meterly_ledger_verify
from django_meterly.ledger.models import Account, Entry, Hold, LedgerCustomer
from tests.ledger.tampering import sql, undone, unguarded

pytestmark = pytest.mark.database


@pytest.fixture
def books(workspace, customer):
    """A ledger with one hold of each kind."""
    for number, close in enumerate((spending.commit, spending.release, None), start=1):
        held = spending.reserve(
            workspace.pk,
            customer,
            amount=10 * number,
            reference="job",
            idempotency_key=f"job-{number}",
        )
        if close is not None:
            close(workspace.pk, held.reservation_id, idempotency_key=f"end-{number}")


ACCOUNT = "account ", "balance"
RESERVED = "account ", "reserved"
AFTER = "entry ent_", "_after"


def edit_entry(kind, **values):
    """Change an entry as only somebody at the database can."""
    assignments = ", ".join(f"{name} = {name} + %s" for name in values)
    with connection.cursor() as cursor:
        cursor.execute(
            f"UPDATE {Entry._meta.db_table} SET {assignments} WHERE kind = %s",
            [*values.values(), kind],
        )


@pytest.mark.django_db
def test_good_books_balance(books, capsys):
    call_command("meterly_ledger_verify")
    assert capsys.readouterr().out == "1 accounts, 6 entries: the books balance.\n"


@pytest.mark.django_db
def test_an_empty_ledger_balances(capsys):
    call_command("meterly_ledger_verify")
    assert capsys.readouterr().out == "0 accounts, 0 entries: the books balance.\n"


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("spoil", "row", "column", "count"),
    [
        (lambda: Account.objects.update(balance=F("balance") + 1), *ACCOUNT, 1),
        # The reserved credits are compared with entries and with live holds.
        (lambda: Account.objects.update(reserved=F("reserved") + 1), *RESERVED, 2),
        # Its entry knows, too.
        (lambda: Hold.objects.live().update(amount=1), *RESERVED, 2),
        (lambda: edit_entry("credits_committed", balance_delta=1), *AFTER, 2),
        # What was reserved before it, what it was of, and its shape.
        (lambda: edit_entry("credits_released", reserved_delta=1), *AFTER, 3),
        (lambda: edit_entry("credits_granted", balance_delta=1), *AFTER, 2),
        # Wrong in itself, and wrong as what the next one follows from.
        (lambda: edit_entry("credits_released", balance_after=1), *AFTER, 2),
        (
            lambda: Hold.objects.filter(status="released").update(status="committed"),
            *("hold res_", "status"),
            1,
        ),
    ],
)
def test_a_difference_is_shown_and_fails(books, spoil, row, column, count, capsys):
    with unguarded(), undone():
        spoil()
        before = list(Account.objects.values())

        with pytest.raises(CommandError, match=f"Differences: {count}") as caught:
            call_command("meterly_ledger_verify")

        # Nothing is repaired silently.
        assert list(Account.objects.values()) == before

    assert caught.value.returncode == 1
    first, *lines = capsys.readouterr().out.splitlines()
    assert "do not balance" in first
    assert any(
        line.startswith(row) and " user_1 credits " in line and f"{column} " in line
        for line in lines
    )


@pytest.mark.django_db(transaction=True)
def test_personal_data_that_was_erased_is_no_difference(books):
    mark = verification.ERASED
    with unguarded(), undone():
        sql("UPDATE meterly_ledger_customer SET external_id = %s", f"{mark} 1")
        call_command("meterly_ledger_verify")
        sql("UPDATE meterly_ledger_customer SET external_id = 'user_2'")
        with pytest.raises(CommandError, match="Differences: 1"):
            call_command("meterly_ledger_verify")
        sql(
            "UPDATE meterly_ledger_entry SET reference = %s, unique_reference = %s, "
            "description = %s WHERE kind = 'credits_granted'",
            *[f"{mark} 1"] * 3,
        )
        call_command("meterly_ledger_verify")


@pytest.mark.django_db
def test_accounts_are_compared_page_by_page(workspace, monkeypatch, capsys):
    monkeypatch.setattr(verification, "PAGE", 2)
    monkeypatch.setattr(meterly_ledger_verify, "SHOWN", 3)
    for number in range(5):
        grants.grant(
            workspace.pk,
            external_id=f"user_{number}",
            amount=1,
            credit_unit="credits",
            reference="opening",
            idempotency_key=f"opening-{number}",
        )
    call_command("meterly_ledger_verify")
    assert "5 accounts, 5 entries" in capsys.readouterr().out
    Account.objects.update(balance=2)
    with pytest.raises(CommandError, match="Differences: 5"):
        call_command("meterly_ledger_verify")
    out = capsys.readouterr().out
    assert "user_2" in out
    assert "user_3" not in out
    assert out.endswith("... and 2 more.\n")


class Terminal(StringIO):
    def isatty(self):
        return True


@pytest.mark.django_db
@pytest.mark.parametrize("stderr", [Terminal(), StringIO()])
def test_the_progress_bar_is_for_terminals(books, monkeypatch, capsys, stderr):
    monkeypatch.setattr(sys, "stderr", stderr)
    call_command("meterly_ledger_verify")
    assert ("[....." in stderr.getvalue()) == stderr.isatty()
    assert capsys.readouterr().out == "1 accounts, 6 entries: the books balance.\n"


@pytest.mark.django_db
@pytest.mark.parametrize(
    "count",
    [
        20_000,
        # LEDGER_ENTRIES=1000000 for the long run.
        pytest.param(
            int(os.environ.get("LEDGER_ENTRIES", "200000")),
            marks=pytest.mark.slow("a ledger of 200,000 entries"),
        ),
    ],
)
def test_memory_is_flat_however_many_entries_there_are(workspace, count):
    accounts = [
        Account(
            customer=LedgerCustomer.objects.create(
                workspace=workspace, external_id=f"user_{number}", credit_unit="credits"
            ),
            unit="credits",
            balance=count // 10,
        )
        for number in range(10)
    ]
    Account.objects.bulk_create(accounts)
    with connection.cursor() as cursor:
        cursor.executemany(
            f"INSERT INTO {Entry._meta.db_table} (public_id, workspace_id, account_id, "
            "kind, amount, balance_delta, reserved_delta, balance_after, "
            "reserved_after, reference, unique_reference, description, "
            "idempotency_key, fingerprint, created_at) VALUES (%s, %s, %s, "
            "'credits_added', 1, 1, 0, %s, 0, %s, %s, '', %s, %s, "
            "'2026-01-01 00:00:00')",
            (
                (
                    *(f"ent_{n}", workspace.pk, accounts[n % 10].pk, n // 10 + 1),
                    *(f"ref-{n}", f"ref-{n}", f"key-{n}"),
                    fingerprint_of(
                        "add_credits",
                        f"key-{n}",
                        customer_id=accounts[n % 10].customer.public_id,
                        amount=1,
                        unit=None,
                        reference=f"ref-{n}",
                        description="",
                    ),
                )
                for n in range(count)
            ),
        )
    assert seals.seal_entries().entries == count
    out = StringIO()
    tracemalloc.start()
    try:
        call_command("meterly_ledger_verify", stdout=out)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert out.getvalue().startswith(
        f"10 accounts, {count} entries: the books balance.\n{count} entries are sealed"
    )
    # One entry alone would take a kilobyte.
    assert peak < 2 * 2**20


class Ledger(RuleBasedStateMachine):
    """Random calls, also repeated and late ones, against a model in Python."""

    names = st.sampled_from(["a", "b"])
    keys = st.integers(0, 30).map(str)
    amounts = st.integers(1, 60)
    _runs: ClassVar[int] = 0

    def __init__(self):
        super().__init__()
        Ledger._runs += 1
        self.workspace = customers.ensure_workspace(f"run-{Ledger._runs}").pk
        self.customers = {
            name: customers.create_customer(
                self.workspace,
                external_id=name,
                credit_unit="credits",
                idempotency_key=f"create-{name}",
            ).customer_id
            for name in "ab"
        }
        # Hypothesis leaves rules out of a run, also the one that adds credits: without
        # any, nothing moves.
        grants.add(
            self.workspace,
            self.customers["a"],
            amount=60,
            reference="opening",
            idempotency_key="opening",
        )
        self.holds = []

    def attempt(self, call, *args, **kwargs):
        try:
            return call(self.workspace, *args, **kwargs)
        except errors.MeterlyApiError:
            return None

    @rule(name=names, amount=amounts, reference=keys, key=keys)
    def add(self, name, amount, reference, key):
        self.attempt(
            grants.add,
            self.customers[name],
            amount=amount,
            reference=reference,
            idempotency_key=key,
        )

    @rule(name=names, amount=amounts, key=keys)
    def use(self, name, amount, key):
        self.attempt(
            spending.use,
            self.customers[name],
            amount=amount,
            reference="page",
            idempotency_key=key,
        )

    @rule(name=names, amount=amounts, key=keys)
    def reserve(self, name, amount, key):
        held = self.attempt(
            spending.reserve,
            self.customers[name],
            amount=amount,
            reference="job",
            idempotency_key=key,
        )
        if held is not None:
            self.holds.append(held.reservation_id)

    @rule(data=st.data(), amount=st.none() | st.integers(0, 60), key=keys)
    def commit(self, data, amount, key):
        if self.holds:
            self.attempt(
                spending.commit,
                data.draw(st.sampled_from(self.holds)),
                amount=amount,
                idempotency_key=key,
            )

    @rule(data=st.data(), key=keys)
    def release(self, data, key):
        if self.holds:
            self.attempt(
                spending.release,
                data.draw(st.sampled_from(self.holds)),
                idempotency_key=key,
            )

    @rule(data=st.data(), seconds=st.integers(1, 600), key=keys)
    def extend(self, data, seconds, key):
        if self.holds:
            self.attempt(
                spending.extend,
                data.draw(st.sampled_from(self.holds)),
                ttl_seconds=seconds,
                idempotency_key=key,
            )

    @rule(data=st.data())
    def let_expire(self, data):
        if self.holds:
            Hold.objects.live().filter(
                public_id=data.draw(st.sampled_from(self.holds))
            ).update(expires_at=from_now(-1))

    @rule()
    def sweep(self):
        expiry.expire_due()

    @invariant()
    def entries_rebuild_the_balances(self):
        for account in Account.objects.filter(customer__workspace=self.workspace):
            balance = reserved = 0
            for entry in account.entries.order_by("pk"):
                balance += entry.balance_delta
                reserved += entry.reserved_delta
                assert (entry.balance_after, entry.reserved_after) == (
                    balance,
                    reserved,
                )
                assert 0 <= reserved <= balance
            assert (account.balance, account.reserved) == (balance, reserved)
            held = account.holds.live().values_list("amount", flat=True)
            assert sum(held) == reserved

    @invariant()
    def every_hold_was_closed_at_most_once(self):
        for hold in Hold.objects.filter(account__customer__workspace=self.workspace):
            kinds = list(hold.entries.order_by("pk").values_list("kind", flat=True))
            closing = [] if hold.status == "reserved" else [f"credits_{hold.status}"]
            assert kinds == ["credits_reserved", *closing]


class TestLedger(TestCase):
    """The database is rolled back after the runs, by Django's own test case."""

    def test_random_calls_leave_books_that_balance(self):
        machine = Ledger.TestCase
        machine.settings = settings(
            max_examples=settings().max_examples // 6,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        machine("runTest").runTest()
        assert Entry.objects.exists()
        call_command("meterly_ledger_verify")
