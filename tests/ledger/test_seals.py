"""The chain of hashes over the entries, and the gaps in it."""

from __future__ import annotations

import datetime as dt
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from hypothesis import given
from hypothesis import strategies as st

from django_meterly.ledger import grants, seals, spending, tasks, verification
from django_meterly.ledger.models import Account, Entry, Seal
from tests.ledger.holds import reserve
from tests.ledger.tampering import forge, found, sql, unguarded

pytestmark = pytest.mark.database

# Entries begin with 1: no gap comes before them.
committing = pytest.mark.django_db(transaction=True, reset_sequences=True)
ids = st.sets(st.integers(1, 30)).map(sorted)


def chain():
    return [
        (seal.number, seal.first, seal.last, seal.count, seal.gaps, seal.late)
        for seal in Seal.objects.order_by("number")
    ]


# Ranges


@given(ids)
def test_ranges_are_the_ids(numbers):
    found = seals.ranges(numbers)
    assert [n for first, last in found for n in range(first, last + 1)] == numbers
    assert seals.size(found) == len(numbers)
    assert all(one[1] + 1 < other[0] for one, other in pairwise(found))


@given(ids, ids)
def test_without_is_the_difference(one, other):
    expected = seals.ranges(sorted({*one} - {*other}))
    assert seals.without(seals.ranges(one), seals.ranges(other)) == expected
    # As the late ids of several seals come: next to each other.
    assert seals.without(seals.ranges(one), [[n, n] for n in other]) == expected


@pytest.mark.parametrize(
    "value",
    [None, "x", 1, {}, [1], [[1]], [[2, 1]], [[1, 2], [2, 3]], [[True, 2]], [["1", 2]]],
)
def test_ranges_that_somebody_has_made_up_are_none(value):
    assert verification.sound(value) == []


# A chain


@committing
def test_each_run_seals_what_is_new(move, capsys):
    first = move()
    call_command("meterly_ledger_seal")
    said = capsys.readouterr()
    head = Seal.objects.get()
    assert said.out == f"{head.hash}\n"
    assert said.err == "2 entries sealed, 0 of them late.\n"
    assert (head.number, head.last, head.count) == (1, first, 2)

    call_command("meterly_ledger_seal")
    said = capsys.readouterr()
    assert said.out == f"{head.hash}\n"
    assert said.err == "0 entries sealed, 0 of them late.\n"

    move()
    assert tasks.seal_entries() == Seal.objects.get(number=2).hash
    call_command("meterly_ledger_verify")
    last = Seal.objects.get(number=2).hash
    assert capsys.readouterr().out == (
        "1 accounts, 3 entries: the books balance.\n"
        f"3 entries are sealed, by 2 seals. The last one is {last}.\n"
    )


@committing
def test_an_empty_ledger_has_no_seal(capsys):
    call_command("meterly_ledger_seal")
    assert capsys.readouterr().out == ""
    assert tasks.seal_entries() is None


@committing
def test_many_entries_make_many_seals(move, monkeypatch):
    monkeypatch.setattr(seals, "BATCH", 3)
    monkeypatch.setattr(verification, "PAGE", 2)
    for _ in range(9):
        move()
    assert seals.seal_entries().entries == 10
    assert [seal[3] for seal in chain()] == [3, 3, 3, 1]
    assert found() == []


@committing
def test_nothing_is_sealed_inside_a_transaction(move):
    move()
    with pytest.raises(RuntimeError), transaction.atomic():
        seals.seal_entries()


@committing
def test_a_run_without_news_is_four_statements(move, django_assert_max_num_queries):
    move()
    seals.seal_entries()
    with django_assert_max_num_queries(6):
        seals.seal_entries()


@committing
@pytest.mark.parametrize("change", ["amount", "everything"])
def test_f53_a_consistent_rewrite_of_what_is_sealed_is_found(move, change):
    move()
    head = seals.seal_entries().head
    with unguarded():
        # The entry, the account and the fingerprint: nothing contradicts anything.
        entry = Entry.objects.last()
        if change == "everything":
            sql("DELETE FROM meterly_ledger_entry WHERE id = %s", entry.pk)
            sql("UPDATE meterly_ledger_account SET balance = 100")
        else:
            sql(
                "UPDATE meterly_ledger_entry SET created_at = '2026-01-01 00:00:00' "
                "WHERE id = %s",
                entry.pk,
            )
        assert {row for row, _ in found()} == {f"seal {head.number}"}
        # Without the chain, nothing is to be seen.
        sql("DELETE FROM meterly_ledger_seal")
        assert found() == []
        # But whoever has kept its head knows.
        assert found(head.hash) == [("seal", "hash")]


@committing
def test_f53_a_chain_that_was_cut_is_found_by_its_head(move, capsys, tmp_path):
    heads = tmp_path / "heads"
    for _ in range(3):
        move()
        seals.seal_entries()
    first, _, last = Seal.objects.order_by("number")
    for kept in (first, last):
        heads.write_text(f"{kept.hash}\n")
        call_command("meterly_ledger_verify", heads=str(heads))
    with unguarded():
        sql("DELETE FROM meterly_ledger_seal WHERE number = 3")
    call_command("meterly_ledger_verify")
    capsys.readouterr()
    with pytest.raises(CommandError, match="Differences: 1"):
        call_command("meterly_ledger_verify", heads=str(heads))
    assert f"{last.hash}  a chain without it" in capsys.readouterr().out


@committing
def test_f53_a_new_chain_over_rewritten_entries_lacks_the_earlier_heads(
    move, capsys, tmp_path
):
    heads = tmp_path / "heads"

    def seal():
        capsys.readouterr()
        call_command("meterly_ledger_seal")
        with heads.open("a") as file:
            file.write(capsys.readouterr().out)

    move()
    seal()
    [first] = heads.read_text().split()
    with unguarded():
        sql("UPDATE meterly_ledger_entry SET created_at = '2026-01-01 00:00:00'")
        sql("DELETE FROM meterly_ledger_seal")
    # The forged chain's head is appended to what was kept, as every head is.
    move()
    seal()
    assert len(heads.read_text().split()) == 2
    with pytest.raises(CommandError, match="Differences: 1"):
        call_command("meterly_ledger_verify", heads=str(heads))
    assert f"{first}  a chain without it" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "\n", "abc", f"{'a' * 64}\nConnection refused"])
def test_f53_heads_that_are_none_are_an_error(text, tmp_path, monkeypatch):
    heads = tmp_path / "heads"
    heads.write_text(text)
    with pytest.raises(CommandError, match=r"no hash|not a hash"):
        call_command("meterly_ledger_verify", heads=str(heads))
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    with pytest.raises(CommandError, match=r"no hash|not a hash"):
        call_command("meterly_ledger_verify", heads="-")


def test_f53_heads_that_cannot_be_read_are_an_error(tmp_path):
    with pytest.raises(CommandError, match="cannot be read"):
        call_command("meterly_ledger_verify", heads=str(tmp_path / "none"))


@committing
def test_f53_an_entry_that_no_seal_would_cover_is_found(move):
    pk = move()
    with unguarded():
        forge(-5)
        assert any(column == "id" for _, column in found())
        sql("DELETE FROM meterly_ledger_entry WHERE id = %s", -5)
    assert found() == []
    assert pk


@committing
def test_f53_what_is_named_can_be_looked_up(move, capsys):
    ids = [move() for _ in range(3)]
    seals.seal_entries()
    with unguarded():
        sql("DELETE FROM meterly_ledger_entry WHERE id = %s", ids[1])
    with pytest.raises(CommandError):
        call_command("meterly_ledger_verify")
    out = capsys.readouterr().out
    assert f"entries {ids[1]} to {ids[1]}, by primary key" in out
    assert "as they are now" in out


@committing
def test_the_hash_is_the_same_on_every_database(workspace, customer):
    account = Account.objects.get()
    with unguarded():
        sql("DELETE FROM meterly_ledger_entry")
        Account.objects.update(balance=0)
        Entry(
            pk=7,
            public_id="ent_fixed",
            workspace_id=3,
            account_id=account.pk,
            hold=None,
            kind="credits_added",
            amount=2**62,
            balance_delta=2**62,
            reserved_delta=0,
            balance_after=2**62,
            reserved_after=0,
            reference='a "ü" 😀\\',
            description="",
            unique_reference='a "ü" 😀\\',
            idempotency_key="Key-1 ",
            fingerprint="f" * 64,
            created_at=dt.datetime(2026, 3, 1, 1, 2, 3, 456789, dt.UTC),
        ).save()
        row = Entry.objects.values(*seals.COLUMNS).get()
    assert row.pop("account_id") == account.pk
    digest = seals.Digest("")
    digest.add(row)
    seal = Seal(
        number=1,
        first=1,
        last=7,
        count=1,
        gaps=[[1, 6]],
        late=[],
        settled=0,
        created_at=dt.datetime(2026, 3, 1, tzinfo=dt.timezone(dt.timedelta(hours=5))),
    )
    assert digest.seal(seal) == (
        "49fce53fbd2ef9ff3ad0d2841d4c56357abd9d3b5adc558c327db97163e452c8"
    )


# Gaps


@committing
def test_f53_an_entry_in_a_gap_of_sqlite_is_a_forgery(move):
    if connection.vendor != "sqlite":
        return
    ids = [move() for _ in range(3)]
    with unguarded():
        sql("DELETE FROM meterly_ledger_entry WHERE id = %s", ids[1])
    seals.seal_entries()
    assert Seal.objects.get().gaps == [[ids[1], ids[1]]]
    with unguarded():
        forge(ids[1])
    assert ("seal 1", "gaps") in found()


# Several at once


@committing
def test_f53_of_two_sealers_one_has_its_way(move, monkeypatch):
    move()
    real, once = seals._horizon, iter([True])

    def horizon(connection):
        # Another beat, between this one's look and its seal.
        if next(once, False):
            assert seals.seal_entries().entries == 2
        return real(connection)

    monkeypatch.setattr(seals, "_horizon", horizon)
    assert seals.seal_entries().entries == 0
    assert [seal[3] for seal in chain()] == [2]
    assert found() == []


def in_thread(call):
    try:
        return call()
    finally:
        connection.close()


@committing
def test_f53_seals_while_credits_are_moved_miss_nothing(
    workspace, customer, monkeypatch
):
    monkeypatch.setattr(seals, "MYSQL_OPEN", dt.timedelta(0))
    monkeypatch.setattr(seals, "BATCH", 20)
    customers = [
        grants.grant(
            workspace.pk,
            external_id=f"many_{number}",
            amount=100,
            credit_unit="credits",
            reference="opening",
            idempotency_key=f"many-{number}",
        ).account.customer_id
        for number in range(4)
    ]
    stop = threading.Event()

    def work(customer_id):
        for number in range(25):
            held = reserve(workspace, customer_id, 1, f"{customer_id}-{number}")
            if number % 3:
                spending.commit(
                    workspace.pk,
                    held.reservation_id,
                    idempotency_key=f"{customer_id}-{number}-end",
                )
            elif connection.vendor != "sqlite":
                # Ids that nobody will ever use.
                with transaction.atomic():
                    spending.use(
                        workspace.pk,
                        customer_id,
                        amount=1,
                        reference="rolled back",
                        idempotency_key=f"{customer_id}-{number}-no",
                    )
                    transaction.set_rollback(True)

    def seal():
        count = 0
        while not stop.is_set():
            count += seals.seal_entries().entries
        return count

    with ThreadPoolExecutor(6) as pool:
        sealers = [pool.submit(in_thread, seal) for _ in range(2)]
        workers = [pool.submit(in_thread, lambda c=c: work(c)) for c in customers]
        try:
            for worker in workers:
                worker.result()
        finally:
            stop.set()
        count = sum(sealer.result() for sealer in sealers)
    count += seals.seal_entries().entries
    assert count == verification.sealed() == Entry.objects.count()
    assert found() == []
    # With nobody at work, all gaps are settled.
    give_up = time.monotonic() + 30
    while any(open_ for _, open_ in seals.open_gaps("default", seals.head("default"))):
        # PostgreSQL's transactions in other databases count, too.
        assert time.monotonic() < give_up
        time.sleep(0.05)
        seals.seal_entries()
