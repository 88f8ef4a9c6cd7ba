"""Celery tasks: expire holds, and seal entries.

Without Celery, ``manage.py meterly_ledger_expire`` and ``meterly_ledger_seal`` do the
same.
"""

from __future__ import annotations

from celery import shared_task

from . import expiry, idempotency, seals


# A task that waited for 20 intervals is dropped. This is set here, because
# django-celery-beat ignores the "expires" of a schedule's entry.
@shared_task(name="django_meterly.ledger.tasks.expire_holds", expires=20 * 60.0)
def expire_holds() -> int:
    """Expire reservations whose time has run out, and return how many there were.

    It also deletes idempotency records that are older than ``RECORD_RETENTION``.
    """
    idempotency.prune_records()
    return expiry.expire_due()


@shared_task(name="django_meterly.ledger.tasks.seal_entries", expires=20 * 300.0)
def seal_entries() -> str | None:
    """Seal the entries that are not sealed yet; return the chain's last hash."""
    head = seals.seal_entries().head
    return None if head is None else str(head.hash)
