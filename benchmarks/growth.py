"""A ledger that has been in use for long: entries made by SQL, books that balance."""

from __future__ import annotations

from django.db import connection

from django_meterly.ledger.models import Entry, Hold

#: Random as the real ones are, so that their indexes grow as the real ones do.
_ID = "md5(n::text || %s)"

# Every hold of one credit has been committed: two entries each.
_HOLDS = f"""
INSERT INTO meterly_ledger_hold (public_id, account_id, amount, status, reference,
    expires_at, created_at, closed_at)
SELECT 'res_' || {_ID}, (%s::bigint[])[1 + n %% %s], 1, 'committed', 'job-' || n,
    now(), now(), now()
FROM generate_series(0, %s) n
"""
_ENTRIES = f"""
INSERT INTO meterly_ledger_entry (public_id, workspace_id, account_id, hold_id, kind,
    amount, balance_delta, reserved_delta, balance_after, reserved_after, reference,
    description, idempotency_key, fingerprint, created_at)
SELECT 'ent_' || md5(random()::text), c.workspace_id, h.account_id, h.id, k.kind,
    1, k.balance_delta, k.reserved_delta,
    a.balance + 1 + k.balance_delta
        - row_number() OVER (PARTITION BY h.account_id, k.kind ORDER BY h.id),
    CASE k.reserved_delta WHEN 1 THEN 1 ELSE 0 END, h.reference, '',
    gen_random_uuid()::text, {_ID.replace("n::text", "h.id::text")}
        || {_ID.replace("n::text", "h.id::text")}, now()
FROM meterly_ledger_hold h
JOIN meterly_ledger_account a ON a.id = h.account_id
JOIN meterly_ledger_customer c ON c.id = a.customer_id
CROSS JOIN (VALUES (1, 'credits_reserved', 0, 1), (2, 'credits_committed', -1, -1))
    AS k (step, kind, balance_delta, reserved_delta)
ORDER BY h.id, k.step
"""
_ACCOUNTS = """
UPDATE meterly_ledger_account a SET balance = balance - h.spent
FROM (SELECT account_id, count(*) AS spent FROM meterly_ledger_hold GROUP BY 1) h
WHERE h.account_id = a.id
"""


def grow(customers: list[str], entries: int) -> None:
    """Give the ledger *entries* entries, spread over *customers* evenly.

    Indexes and constraints are taken away meanwhile and made anew.
    """
    with connection.cursor() as cursor:
        cursor.execute("SET maintenance_work_mem = '256MB'")
        cursor.execute("SET work_mem = '256MB'")
        cursor.execute(
            "SELECT a.id FROM meterly_ledger_account a"
            " JOIN meterly_ledger_customer c ON c.id = a.customer_id"
            " WHERE c.public_id = ANY(%s)",
            [customers],
        )
        accounts = [pk for (pk,) in cursor.fetchall()]
        again = []
        for model in (Entry, Hold):
            table = model._meta.db_table
            cursor.execute(
                "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint"
                " WHERE conrelid = %s::regclass AND contype IN ('f', 'u', 'c')",
                [table],
            )
            for name, definition in cursor.fetchall():
                cursor.execute(f'ALTER TABLE {table} DROP CONSTRAINT "{name}"')
                again.append(
                    f'ALTER TABLE {table} ADD CONSTRAINT "{name}" {definition}'
                )
            cursor.execute(
                "SELECT indexname, indexdef FROM pg_indexes"
                " WHERE tablename = %s AND indexname NOT LIKE '%%\\_pkey'",
                [table],
            )
            for name, definition in cursor.fetchall():
                cursor.execute(f'DROP INDEX "{name}"')
                again.append(definition)
        cursor.execute(_HOLDS, ["hold", accounts, len(accounts), entries // 2 - 1])
        cursor.execute(_ENTRIES, ["", "again"])
        cursor.execute(_ACCOUNTS)
        for statement in again:
            cursor.execute(statement)
        for statement in ("VACUUM ANALYZE", "CHECKPOINT"):
            cursor.execute(statement)
    connection.close()
