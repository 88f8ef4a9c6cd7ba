"""``HasCredits``: turn callers without credits away early."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.utils.translation import gettext_lazy as _
from rest_framework.permissions import BasePermission

from .. import units
from ..errors import OUTAGE, MeterlyUnavailableError
from ..methods import costs
from ..wire import check_amount
from .balances import balances_of
from .exceptions import complete_answers, counterpart

if TYPE_CHECKING:
    from rest_framework.request import Request
    from rest_framework.views import APIView


class HasCredits(BasePermission):
    """Let callers in who have credits available: *amount* of *unit*.

    It reads a balance and holds nothing, so it is no guard: two requests at once
    both pass it with the last credit. Use it to refuse early, by 403, before a guard
    or a job reserves. Methods that guards charge nothing for pass. Subclass it for
    another *amount* or *unit* (``DEFAULT_UNIT`` by default; one of ``UNITS``).

    A ledger that cannot be asked is a 503. An invalid *amount* or *unit* is a
    ``ValueError``.
    """

    message = _("You have no credits left for this.")
    code = "insufficient_credits"
    unit: str | None = None
    amount = 1

    def has_permission(self, request: Request, view: APIView) -> bool:
        if not costs(request.method, None):
            return True
        amount = check_amount(self.amount, f"{type(self).__name__}.amount", minimum=0)
        unit = units.check_declared(self.unit) if self.unit else units.default()
        try:
            balances = balances_of(request)
        except OUTAGE as exc:
            complete_answers(view)
            raise counterpart(MeterlyUnavailableError(str(exc))) from exc
        return any(
            balance.credit_unit == unit and balance.available >= amount
            for balance in balances or ()
        )
