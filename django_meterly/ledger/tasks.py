"""Celery tasks; ``meterly_ledger_expire`` does the same without Celery."""

from __future__ import annotations

from celery import shared_task

from . import operations


@shared_task(name="django_meterly.ledger.tasks.expire_holds")
def expire_holds() -> int:
    """Give back what expired reservations hold; return how many those were.

    Idempotency records past their retention go, too.
    """
    operations.prune_records()
    return operations.expire_due()
