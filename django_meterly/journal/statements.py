"""A step of the journal and its movement as one statement, on PostgreSQL."""

from __future__ import annotations

import datetime as dt
import functools
import uuid
from typing import TYPE_CHECKING, Any

from django.db import Error, connections

from ..conf import meterly_settings
from ..db import READS_COMMITTED, DatabaseNow, from_now, is_outage, reconnect
from ..errors import MeterlyError, MeterlyUnknownOutcomeError
from ..models import Reservation
from ..transports.base import JoinedTransport, NothingLocked, Statement
from . import calls
from .rows import DENIED_RETENTION, OUTCOMES, State, alias, announce

if TYPE_CHECKING:
    from ..client import MeterlyClient
    from ..types import ReservationResult


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
    using: str, client: MeterlyClient, row: Reservation, lease: float
) -> ReservationResult | MeterlyError:
    """Ask a ledger that writes *row* in the statement that holds the credits."""
    insert = _insert(using, row, lease + meterly_settings.LEASE_GRACE)
    try:
        answer, row.state = calls.ask(client.carrying(insert), row)
    except Error as exc:
        if not is_outage(exc):
            raise
        connection = connections[using]
        # Leaving an atomic block, Django would have replaced a dead connection.
        if not connection.is_usable():
            reconnect(connection)
        # There may be a hold and its row, which lapse: what follows is another row.
        row.pk = uuid.uuid4()
        row.key = str(row.pk)
        raise MeterlyUnknownOutcomeError(f"The database failed: {exc}") from exc
    if row.state == State.RESERVED:
        row._state.adding = False
        row._state.db = using
    else:
        row.settled_at = DatabaseNow()
        if row.state == State.DENIED:
            row.next_attempt_at = from_now(DENIED_RETENTION)
        row.save(force_insert=True, using=using)
    return answer


def _insert(using: str, row: Reservation, lease: float) -> Statement:
    """Return the INSERT of *row*, with its hold's id and a lease of *lease* seconds."""
    sql, fields = _insert_sql(using)
    connection = connections[using]
    values = (
        field.get_db_prep_save(field.pre_save(row, add=True), connection)
        for field in fields
    )
    return Statement(sql, (*values, dt.timedelta(seconds=lease)))


@functools.cache
def _insert_sql(using: str) -> tuple[str, list[Any]]:
    """Return the text of that INSERT, and the fields whose values it takes."""
    quote = connections[using].ops.quote_name
    values = {
        "state": f"'{State.RESERVED.value}'",
        "reservation_id": "movement.reservation_id",
        "lease_until": "STATEMENT_TIMESTAMP() + %s",
    }
    fields = [f for f in Reservation._meta.concrete_fields if f.attname not in values]
    columns = ", ".join(quote(str(f.column)) for f in fields)
    sql = (
        f"INSERT INTO {quote(Reservation._meta.db_table)} "  # noqa: S608
        f"({columns}, {', '.join(values)}) "
        f"SELECT {'%s, ' * len(fields)}{', '.join(values.values())} FROM movement"
    )
    return sql, fields


def decide_in_one_statement(
    client: MeterlyClient, row: Reservation, charge: int | None, *, fence: int
) -> bool:
    """Decide and settle *row* in one statement, if that is all there is to it.

    A success costs *charge*, and ``None`` is a failure. Returns whether it was done.
    If not, something is out of the ordinary, and nothing was. Raises what the
    database raises; then it may have been done.
    """
    if row.state != State.RESERVED or not row.reservation_id:
        return False
    if charge is not None and charge > row.amount:
        return False
    outcome = State.RELEASED if charge is None else State.COMMITTED
    using = alias()
    connection = connections[using]
    table = connection.ops.quote_name(Reservation._meta.db_table)
    # In the work's own transaction, only where a busy account does not make it fail.
    allowed = f" AND {READS_COMMITTED}" if connection.in_atomic_block else ""
    carrying = client.carrying(
        Statement(
            f"UPDATE {table} SET state = %s, charge = %s, lease_until = NULL, "  # noqa: S608
            "decided_at = STATEMENT_TIMESTAMP(), settled_at = STATEMENT_TIMESTAMP() "
            "FROM movement WHERE id = %s",
            (outcome.value, charge, row.pk),
            lock=f"SELECT id FROM {table} "  # noqa: S608
            f"WHERE id = %s AND state = %s AND fence = %s{allowed} FOR NO KEY UPDATE",
            lock_parameters=(row.pk, State.RESERVED.value, fence),
        )
    )
    try:
        if charge is None:
            carrying.release_reservation(
                row.reservation_id, idempotency_key=row.wire_key("release")
            )
        else:
            calls.commit(carrying, row, charge)
    except (MeterlyError, NothingLocked):
        return False
    row.state, row.charge = outcome, charge
    announce(OUTCOMES[outcome], row)
    return True
