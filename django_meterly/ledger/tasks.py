"""Celery tasks. Without Celery, ``meterly_ledger_expire`` and ``meterly_ledger_seal``
do the same."""

from __future__ import annotations

from celery import shared_task

from . import expiry, idempotency, seals


# Each expires by itself when 20 runs could wait: django-celery-beat drops the "expires"
# of a schedule's entry.
@shared_task(name="django_meterly.ledger.tasks.expire_holds", expires=20 * 60.0)
def expire_holds() -> int:
    """Give back what expired reservations hold; return how many those were.

    Idempotency records past their retention go, too.
    """
    idempotency.prune_records()
    return expiry.expire_due()


@shared_task(name="django_meterly.ledger.tasks.seal_entries", expires=20 * 300.0)
def seal_entries() -> str | None:
    """Seal the entries that are not sealed yet; return the chain's last hash."""
    head = seals.seal_entries().head
    return None if head is None else str(head.hash)
