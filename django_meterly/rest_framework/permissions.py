"""``HasCredits``: refuse callers without credits early."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.utils.translation import gettext_lazy as _
from rest_framework.permissions import BasePermission

from .. import units
from ..views.methods import costs
from ..wire import check_amount
from .balances import balances_of

if TYPE_CHECKING:
    from rest_framework.request import Request
    from rest_framework.views import APIView


class HasCredits(BasePermission):
    """Let callers in who have *amount* credits of *unit* available.

    Subclass it for another *amount* or *unit* (``DEFAULT_UNIT`` by default)::

        class HasFive(HasCredits):
            amount = 5

    It refuses by 403, before a guard or a job reserves, and does not replace them: it
    holds nothing, so two requests at once both pass it with the last credit. Methods
    that are free, for example GET, always pass.

    If the ledger cannot be asked, the answer is 503. An invalid *amount* or *unit*
    raises ``ValueError``.
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
        return any(
            balance.credit_unit == unit and balance.available >= amount
            for balance in balances_of(request) or ()
        )
