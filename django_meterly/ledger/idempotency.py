"""Which call had an idempotency key before, and what it asked for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from django.db import IntegrityError, transaction

from ..errors import MeterlyIdempotencyMismatchError
from .models import Entry, Record

_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def fingerprint_of(operation: str, idempotency_key: str, **arguments: Any) -> str:
    """Return a digest of what a call asks for.

    The key is in it, so that ``verification`` sees when it was altered.
    """
    called = text_of(operation, idempotency_key, **arguments)
    return hashlib.sha256(called.encode()).hexdigest()


def text_of(operation: str, idempotency_key: str, **arguments: Any) -> str:
    """Return the text whose digest is the fingerprint of a call."""
    return _encode([operation, idempotency_key, arguments])


@dataclass(frozen=True, slots=True)
class Request:
    """A call, and whether its key was used before.

    The key of a movement is in its entry, for ever. The key of another call is in a
    ``Record``, for ``METERLY_LEDGER["RECORD_RETENTION"]``.
    """

    using: str
    workspace_id: int
    idempotency_key: str
    fingerprint: str

    def known(self) -> Entry | Record | None:
        """Return what an earlier call with this key has left, whatever it asked for.

        An entry comes with its account, customer and hold, and ``hold_status``.
        """
        key = {
            "workspace_id": self.workspace_id,
            "idempotency_key": self.idempotency_key,
        }
        entry = Entry.objects.using(self.using).current().filter(**key).first()
        return entry or Record.objects.using(self.using).filter(**key).first()

    def recorded(self) -> Entry | Record | None:
        """Return what an earlier call has left that asked for the same.

        Raises ``MeterlyIdempotencyMismatchError`` when it asked for something else.
        """
        known = self.known()
        if known is not None and known.fingerprint != self.fingerprint:
            raise MeterlyIdempotencyMismatchError
        return known

    def record(self) -> None:
        """Record the key of a call that moves no credits.

        Raises ``IntegrityError`` when it is recorded already.
        """
        with transaction.atomic(using=self.using):
            Record.objects.using(self.using).create(
                workspace_id=self.workspace_id,
                idempotency_key=self.idempotency_key,
                fingerprint=self.fingerprint,
            )

    def remember(self) -> None:
        """Record the key of a call that was answered, and moved no credits.

        Raises ``MeterlyIdempotencyMismatchError`` when a call that asked for
        something else was faster.
        """
        try:
            self.record()
        except IntegrityError:
            self.recorded()
