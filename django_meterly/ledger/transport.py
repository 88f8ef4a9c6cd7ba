"""The ledger in this very process, in your own database."""

from __future__ import annotations

import uuid
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from django.db import Error, transaction

from ..errors import MeterlyApiError, MeterlyUnknownOutcomeError
from ..transports.base import Call, Transport
from . import database, postgresql, service
from .conf import ledger_settings

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class LedgerTransport(Transport):
    """Carries calls to the embedded ledger without leaving the process.

    They are for the workspace ``METERLY_LEDGER["WORKSPACE"]``, which is created
    when first needed.
    """

    thread_sensitive = True

    def __repr__(self) -> str:
        return "LedgerTransport()"

    @classmethod
    def longest_hold(cls) -> int:
        """Return ``METERLY_LEDGER["MAX_TTL"]``."""
        return int(ledger_settings.MAX_TTL)

    def send(self, call: Call) -> dict[str, Any]:
        """Carry out *call*.

        Raises ``MeterlyApiError``, and ``MeterlyUnknownOutcomeError`` when the
        database failed. In a transaction of the caller's that one means that it
        is broken, and takes the movement with it when it is rolled back. To a call
        with a statement it happens as the database's own error.
        """
        try:
            answer = service.perform(
                ledger_settings.WORKSPACE,
                call.operation,
                call.arguments,
                call.idempotency_key,
                call.statement,
            )
        except MeterlyApiError as exc:
            exc.method, exc.path = call.method, call.path
            exc.request_id = f"req_{uuid.uuid4().hex}"
            raise
        except Error as exc:
            if call.statement is not None:
                raise
            raise MeterlyUnknownOutcomeError(
                f"The ledger's database failed: {exc}"
            ) from exc
        if call.statement is not None and answer.replayed:
            raise MeterlyUnknownOutcomeError(
                f"The idempotency key {call.idempotency_key!r} was used before, by a "
                "call that has not written this one's row."
            )
        return {**answer.body, "replayed": True} if answer.replayed else answer.body

    def aliases(self) -> tuple[str, ...]:
        """Return the ledger's database."""
        return (database.write_alias(),)

    def joins(self, using: str) -> bool:
        """Return whether the ledger's tables are in the database *using*."""
        return database.write_alias() == using

    def carries_statements(self, using: str) -> bool:
        """Return whether the ledger is in *using*, and that is PostgreSQL."""
        return self.joins(using) and postgresql.serves(using)

    def unit_of_work(self, using: str) -> AbstractContextManager[Any]:
        """Return an ``atomic`` block if the ledger joins it, else a null context."""
        return transaction.atomic(using=using) if self.joins(using) else nullcontext()
