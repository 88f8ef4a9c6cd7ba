"""Find the earlier call with an idempotency key, and compare what it asked for.

A caller that does not know whether its call arrived sends it again with the same key.
The ledger then answers as before, and moves nothing. It finds the earlier call in one
of two tables:

* ``Entry``: a call that moved credits. The entry is kept for ever, and its key with it.
* ``Record``: a call that moved none, for example ``extend``. ``prune_records`` deletes
  it ``METERLY_LEDGER["RECORD_RETENTION"]`` later.

The *fingerprint* is a digest of the arguments. The same key with another fingerprint is
a mismatch: the key was used for something else.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from django.db import IntegrityError, transaction

from ..db import change_in_batches, from_now
from ..errors import MeterlyIdempotencyMismatchError
from .conf import ledger_settings
from .database import write_alias
from .models import Entry, Record

_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def fingerprint_of(operation: str, idempotency_key: str, **arguments: Any) -> str:
    """Return a digest of what a call asks for.

    It includes the key, so that ``verification`` notices when a key was altered.
    """
    called = text_of(operation, idempotency_key, **arguments)
    return hashlib.sha256(called.encode()).hexdigest()


def text_of(operation: str, idempotency_key: str, **arguments: Any) -> str:
    """Return the text whose digest is the fingerprint of a call."""
    return _encode([operation, idempotency_key, arguments])


@dataclass(frozen=True, slots=True)
class Request:
    """One call: its key, and the fingerprint of its arguments."""

    using: str
    workspace_id: int
    idempotency_key: str
    fingerprint: str

    @classmethod
    def of(
        cls, workspace_id: int, idempotency_key: str, operation: str, **arguments: Any
    ) -> Request:
        """Return the request of a call of *operation* with these *arguments*."""
        fingerprint = fingerprint_of(operation, idempotency_key, **arguments)
        return cls(write_alias(), workspace_id, idempotency_key, fingerprint)

    def known(self) -> Entry | Record | None:
        """Return the entry or record of an earlier call, whatever it asked for.

        An entry comes with its account, customer and hold, and ``hold_status``.
        """
        key = {
            "workspace_id": self.workspace_id,
            "idempotency_key": self.idempotency_key,
        }
        entry = Entry.objects.using(self.using).current().filter(**key).first()
        return entry or Record.objects.using(self.using).filter(**key).first()

    def recorded(self) -> Entry | Record | None:
        """Return the entry or record of an earlier call that asked for the same.

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
        """Do as ``record``, but accept an equal call that was faster.

        Raises ``MeterlyIdempotencyMismatchError`` when the faster call asked for
        something else.
        """
        try:
            self.record()
        except IntegrityError:
            self.recorded()


def prune_records() -> int:
    """Delete the records that are older than ``RECORD_RETENTION``; return how many."""
    old = Record.objects.using(write_alias()).filter(
        created_at__lt=from_now(-ledger_settings.RECORD_RETENTION)
    )
    return change_in_batches(
        old, lambda rows: rows.delete()[1].get(Record._meta.label, 0)
    )
