"""Ids are drawn in order, and transactions commit in any order: the gaps of a seal."""

from __future__ import annotations

import datetime as dt
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from django.db import connection, transaction

from django_meterly.ledger import customers, grants, seals, verification
from django_meterly.ledger.models import Entry, Seal
from tests.ledger.tampering import forge, found, sql, unguarded

# On SQLite, conftest.py leaves this file out.
pytestmark = [pytest.mark.database, pytest.mark.django_db(transaction=True)]

HOUR = seals.MYSQL_OPEN


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """No hour has to pass on MySQL."""
    monkeypatch.setattr(seals, "MYSQL_OPEN", dt.timedelta(0))


@contextmanager
def open_transaction(work, *, commit=True):
    """Do *work* in a transaction of another connection, left open meanwhile."""
    worked, end = threading.Event(), threading.Event()

    def hold():
        try:
            with transaction.atomic():
                result.append(work())
                worked.set()
                assert end.wait(60)
                transaction.set_rollback(not commit)
        finally:
            worked.set()
            connection.close()

    result = []
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(hold)
        try:
            assert worked.wait(60)
            yield result
        finally:
            end.set()
            future.result()


def test_f53_a_long_transaction_that_holds_a_low_id_is_sealed_late(
    move, other, monkeypatch
):
    before = move()
    with open_transaction(lambda: move(other)) as (low,):
        high = move()
        assert before < low < high
        assert seals.seal_entries().late == 0
        # "id > head" would miss it from now on.
        assert Seal.objects.get().gaps[-1] == [low, low]
        move()
        seals.seal_entries()
        assert found() == []
        # It can still come: nothing is settled.
        assert seals.head("default").settled == 0
        move()

    sealed = seals.seal_entries()
    assert (sealed.entries, sealed.late) == (2, 1)
    assert seals.head("default").late == [[low, low]]
    assert found() == []
    seals.seal_entries()
    assert found(seals.head("default").hash) == []
    with unguarded():
        sql("UPDATE meterly_ledger_entry SET description = 'x' WHERE id = %s", low)
        assert ("seal 3", "hash") in found()


def test_f53_a_gap_is_settled_when_nobody_is_left_who_could_fill_it(
    move, other, monkeypatch
):
    with open_transaction(lambda: move(other), commit=False) as (low,):
        move()
        seals.seal_entries()
        assert Seal.objects.get().gaps[-1] == [low, low]
    # Rolled back: a seal says so, once.
    settle(1)
    assert seals.head("default").number == 2
    seals.seal_entries()
    assert Seal.objects.count() == 2
    assert found() == []

    # An entry in it is a forgery, though nothing else contradicts it.
    with unguarded():
        forge(low)
        assert ("seal 1", "gaps") in found()
        head = seals.seal_entries().head
        assert ("seal 1", "gaps") in found(head.hash)


def test_on_mysql_gaps_stay_open_for_an_hour(move, other, monkeypatch):
    monkeypatch.setattr(seals, "MYSQL_OPEN", HOUR)
    if connection.vendor != "mysql":
        return
    with open_transaction(lambda: move(other), commit=False):
        move()
        seals.seal_entries()
    assert seals.seal_entries().head.settled == 0
    assert Seal.objects.count() == 1


def test_f53_a_gap_outlives_many_seals_and_late_ones(move, other, monkeypatch):
    third = grants.grant(
        customers.ensure_workspace("acme").pk,
        external_id="user_3",
        amount=100,
        credit_unit="credits",
        reference="opening",
        idempotency_key="opening-3",
    ).account.customer_id
    with open_transaction(lambda: move(other)) as (low,):
        with open_transaction(lambda: move(third)) as (next_,):
            for _ in range(3):
                move()
                seals.seal_entries()
            assert Seal.objects.get(number=1).gaps[-1] == [low, next_]
        # One of the two has come.
        assert seals.seal_entries().late == 1
        assert seals.head("default").late == [[next_, next_]]
        assert found() == []
        move()
        seals.seal_entries()
        assert seals.head("default").settled == 0
    assert seals.seal_entries().late == 1
    move()
    settle(2)
    assert found() == []
    assert verification.sealed() == Entry.objects.count()


def test_a_seal_waits_for_nobody_and_nobody_for_it(move, other, monkeypatch):
    if connection.vendor == "sqlite":
        return
    real = seals._horizon

    def horizon(connection):
        # In the middle of the sealer's work.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(in_thread, move).result(timeout=20)
        return real(connection)

    with open_transaction(lambda: move(other)):
        move()
        monkeypatch.setattr(seals, "_horizon", horizon)
        monkeypatch.setattr(seals, "BATCH", 3)
        assert seals._seal("default").count == 3


def settle(number):
    """Seal until the gaps of this seal are settled.

    PostgreSQL's transactions in other databases count, too: those of other tests.
    """
    give_up = time.monotonic() + 30
    while seals.seal_entries().head.settled < number:
        assert time.monotonic() < give_up
        time.sleep(0.05)


def in_thread(call):
    try:
        return call()
    finally:
        connection.close()
