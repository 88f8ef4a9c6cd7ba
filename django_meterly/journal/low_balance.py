"""The signal ``low_balance``, when a movement takes a balance below ``LOW_BALANCE``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.db import transaction
from django.db.models import Q

from .. import signals
from ..conf import meterly_settings
from ..db import DatabaseNow, from_now
from ..models import Customer, LowBalance, Reservation
from .rows import alias

if TYPE_CHECKING:
    from ..types import Balance


def watch_balance(row: Reservation, balance: Balance | None, moved: int) -> None:
    """Announce that *moved* credits took the balance below ``LOW_BALANCE``."""
    if balance is None:
        # The ledger's answer did not contain the balance.
        return
    threshold = meterly_settings.LOW_BALANCE.get(row.unit)
    available = balance.available
    if threshold is None or not available < threshold <= available + moved:
        return
    using = alias()

    def announce_once() -> None:
        known, _ = LowBalance.objects.using(using).get_or_create(
            customer=row.customer, unit=row.unit
        )
        cooldown = meterly_settings.LOW_BALANCE_COOLDOWN
        if (
            LowBalance.objects.using(using)
            .filter(
                Q(announced_at=None) | Q(announced_at__lt=from_now(-cooldown)),
                pk=known.pk,
            )
            .update(announced_at=DatabaseNow())
        ):
            signals.announce(
                signals.low_balance,
                Customer,
                using=using,
                customer=row.customer,
                unit=row.unit,
                available=available,
                threshold=threshold,
            )

    if signals.low_balance.has_listeners(Customer):
        # After the COMMIT: no movement waits for this, or fails because of it.
        transaction.on_commit(announce_once, using=using, robust=True)
