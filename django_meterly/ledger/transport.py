"""The embedded ledger, called in this process."""

from __future__ import annotations

import uuid
from typing import Any

from django.db import Error

from ..errors import MeterlyApiError, MeterlyUnknownOutcomeError
from ..transports.base import Call, JoinedTransport
from . import database, postgresql, service
from .conf import ledger_settings


class LedgerTransport(JoinedTransport):
    """Carries calls to the embedded ledger, in this process.

    The first call creates the workspace ``METERLY_LEDGER["WORKSPACE"]``.
    """

    def __repr__(self) -> str:
        return "LedgerTransport()"

    @classmethod
    def longest_hold(cls) -> int:
        """Return ``METERLY_LEDGER["MAX_TTL"]``."""
        return int(ledger_settings.MAX_TTL)

    def send(self, call: Call) -> dict[str, Any]:
        """Carry out *call*.

        Raises ``MeterlyApiError``, and ``MeterlyUnknownOutcomeError`` if the database
        failed. The caller's transaction is broken then, if there is one, and its
        rollback undoes the movement. A call with a statement raises the database's
        error itself.
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

    def alias(self) -> str:
        """Return the ledger's database."""
        return database.write_alias()

    def carries_statements(self, using: str) -> bool:
        """Return whether the ledger is in *using*, and *using* is PostgreSQL."""
        return self.joins(using) and postgresql.serves(using)
