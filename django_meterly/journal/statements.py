"""A step of the journal and its movement as one statement, on PostgreSQL.

A round trip costs more than the work of the movement itself. So a guard is two
statements: ``reserve`` and ``decide_in_one_statement``. Both return without a change if
something is out of the ordinary, and the caller takes the way of several statements.
"""

from __future__ import annotations

import datetime as dt
import functools
import uuid
from typing import TYPE_CHECKING, Any

from django.db import Error, connections

from ..conf import meterly_settings
from ..db import (
    READS_COMMITTED,
    DatabaseNow,
    from_now,
    is_outage,
    on_live_connection,
    reconnect,
)
from ..errors import MeterlyError, MeterlyUnknownOutcomeError
from ..models import Customer, Reservation, select_sql, wire_scope_sql
from ..transports.base import FOUND, JoinedTransport, NothingFound, Statement
from . import calls
from .rows import DENIED_RETENTION, OUTCOMES, State, alias, announce

if TYPE_CHECKING:
    from ..client import MeterlyClient
    from ..types import ReservationResult
    from .payers import Payer


def fits_one_statement(client: MeterlyClient, using: str) -> bool:
    """Return whether a movement and its row can be one statement in autocommit.

    In the caller's transaction they need a savepoint, because a statement that fails
    would end the transaction.
    """
    connection = connections[using]
    return (
        carries_statements(client, using)
        and not connection.in_atomic_block
        and connection.get_autocommit()
    )


def carries_statements(client: MeterlyClient, using: str) -> bool:
    """Return whether a movement and its row on *using* can be one statement."""
    transport = client.transport
    return isinstance(transport, JoinedTransport) and transport.carries_statements(
        using
    )


def reserve(
    using: str, client: MeterlyClient, row: Reservation, payer: Payer, lease: float
) -> ReservationResult | MeterlyError | None:
    """Ask a ledger that writes *row* in the statement that holds the credits.

    The statement finds the customer, too. Returns ``None``, and does nothing, if the
    customer is new, owes credits, or is not registered at the ledger, or if the call
    was refused before the statement was sent. Raises the errors in ``OUTAGE``; then
    *row* has no customer.
    """
    statement = _opening(using, row, payer, lease + meterly_settings.LEASE_GRACE)
    carrying = client.carrying(statement)

    def ask() -> tuple[ReservationResult | MeterlyError, str]:
        return calls.ask(row, lambda: _hold_of_found(carrying, row))

    try:
        if isinstance(payer.named, Customer) and payer.named.fits(using):
            answer, row.state = ask()
        else:
            # Most guards begin with this statement, so it may meet a connection that
            # died long ago. It is sent again with the same keys: it is done once.
            answer, row.state = on_live_connection(using, ask)
    except NothingFound:
        # It may have found the customer before, and lost the connection. Then the hold
        # and its row exist, and they lapse.
        _renew(row)
        return None
    except (Error, MeterlyUnknownOutcomeError) as exc:
        if isinstance(exc, Error) and not is_outage(exc):
            raise
        connection = connections[using]
        # Django replaces a dead connection only when it leaves an atomic block.
        if not connection.is_usable():
            reconnect(connection)
        # The hold and its row may exist; then they lapse. The next try is another row.
        _renew(row)
        raise MeterlyUnknownOutcomeError(f"The database failed: {exc}") from exc
    if not statement.found:
        # For example, the ledger's MAX_TTL is shorter than the hold is to be.
        row.state, row.last_error = State.INTENT, ""
        return None
    row.customer = payer.found(using, statement.found[2:])
    if row.state == State.RESERVED:
        row._state.adding = False
        row._state.db = using
    else:
        row.settled_at = DatabaseNow()
        if row.state == State.DENIED:
            row.next_attempt_at = from_now(DENIED_RETENTION)
        row.save(force_insert=True, using=using)
    return answer


def _renew(row: Reservation) -> None:
    """Make *row* another row, with another wire key."""
    row.pk = uuid.uuid4()
    row.key = str(row.pk)


def _hold_of_found(carrying: MeterlyClient, row: Reservation) -> ReservationResult:
    """Send what ``calls.hold`` sends, for a customer that the statement finds."""
    return carrying.reserve_credits(
        FOUND,
        row.amount,
        unit=row.unit,
        reference=row.reference,
        idempotency_key=row.key_suffix("reserve"),
        ttl_seconds=row.ttl_seconds,
    )


def _opening(using: str, row: Reservation, payer: Payer, lease: float) -> Statement:
    """Return the statement that finds *payer* and inserts *row*.

    The row gets the hold's id, and a lease of *lease* seconds.
    """
    name, value = Customer.identify(payer.named)
    connection = connections[using]
    sql, fields = _insert_sql(using)
    values = (
        field.get_db_prep_save(field.pre_save(row, add=True), connection)
        for field in fields
    )
    found_by: Any = Customer._meta.get_field(name)
    may_owe = meterly_settings.ON_DEBT == "allow"
    return Statement(
        sql,
        (*values, dt.timedelta(seconds=lease)),
        _source_sql(using, name),
        (found_by.get_db_prep_value(value, connection), may_owe),
    )


@functools.cache
def _source_sql(using: str, name: str) -> str:
    """Return the SELECT of the customer whose field *name* has one value.

    It finds only customers who are registered and who owe nothing, or may owe.
    """
    return (
        f"SELECT customer_id AS payer_id, {wire_scope_sql('external_id')} AS scope, "  # noqa: S608
        f"customer.* FROM ({select_sql(using, name)}) AS customer "
        "WHERE customer_id <> '' AND (%s OR NOT owes)"
    )


@functools.cache
def _insert_sql(using: str) -> tuple[str, list[Any]]:
    """Return the text of the INSERT, and the fields whose values it takes."""
    quote = connections[using].ops.quote_name
    values = {
        "customer_id": "source.id",
        "state": f"'{State.RESERVED.value}'",
        "reservation_id": "movement.reservation_id",
        "lease_until": "STATEMENT_TIMESTAMP() + %s",
        # The defaults of a new row. Parameters would cost more than the columns.
        "attempt": "1",
        "lapsed": "false",
        "fence": "0",
        "settle_attempts": "0",
        "refusals": "0",
        "last_error": "''",
    }
    fields = [
        field
        for field in Reservation._meta.concrete_fields
        if field.attname not in values and not field.null
    ]
    columns = [*(str(field.column) for field in fields), *values]
    sql = (
        f"INSERT INTO {quote(Reservation._meta.db_table)} "  # noqa: S608
        f"({', '.join(map(quote, columns))}) "
        f"SELECT {'%s, ' * len(fields)}{', '.join(values.values())} "
        "FROM movement, source"
    )
    return sql, fields


def decide_in_one_statement(
    client: MeterlyClient, row: Reservation, charge: int | None, *, fence: int
) -> bool:
    """Decide and settle *row* in one statement, if that is all there is to it.

    A success costs *charge*; ``None`` is a failure. Returns whether it was done. If
    not, nothing was changed. Raises the database's errors; then it may have been done.
    """
    if row.state != State.RESERVED or not row.reservation_id:
        return False
    if charge is not None and charge > row.amount:
        return False
    outcome = State.RELEASED if charge is None else State.COMMITTED
    using = alias()
    connection = connections[using]
    table = connection.ops.quote_name(Reservation._meta.db_table)
    # In the work's own transaction only at an isolation level at which a busy account
    # does not make it fail.
    allowed = f" AND {READS_COMMITTED}" if connection.in_atomic_block else ""
    carrying = client.carrying(
        Statement(
            f"UPDATE {table} SET state = %s, charge = %s, lease_until = NULL, "  # noqa: S608
            "decided_at = STATEMENT_TIMESTAMP(), settled_at = STATEMENT_TIMESTAMP() "
            "FROM movement WHERE id = %s",
            (outcome.value, charge, row.pk),
            source=f"SELECT id FROM {table} "  # noqa: S608
            f"WHERE id = %s AND state = %s AND fence = %s{allowed} FOR NO KEY UPDATE",
            source_parameters=(row.pk, State.RESERVED.value, fence),
        )
    )
    try:
        if charge is None:
            carrying.release_reservation(
                row.reservation_id, idempotency_key=row.wire_key("release")
            )
        else:
            calls.commit(carrying, row, charge)
    except (MeterlyError, NothingFound):
        return False
    row.state, row.charge = outcome, charge
    announce(OUTCOMES[outcome], row)
    return True
