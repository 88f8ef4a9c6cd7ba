"""Balances for front ends: what the caller has, and never the key it is read with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rest_framework.exceptions import NotFound
from rest_framework.response import Response
from rest_framework.views import APIView

from .. import responses, units
from ..errors import OUTAGE, MeterlyUnavailableError
from .balances import balances_of
from .exceptions import complete_answers, counterpart, nobody_pays

if TYPE_CHECKING:
    from rest_framework.request import Request

    from ..types import Balance


class _OwnView(APIView):
    # Project-wide ones may ask for a queryset, or for credits; these are one's own.
    permission_classes = []

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().initial(request, *args, **kwargs)
        complete_answers(self)


class BalancesView(_OwnView):
    """Answer the caller's own balances, one object for each unit.

    ``{"balances": [{"unit", "available", "reserved", "balance"}, ...]}``. The caller
    is whoever your authenticators and ``CUSTOMER_RESOLVER`` say; nobody known gets
    401, a ledger that cannot be asked is a 503.
    """

    def get(self, request: Request) -> Response:
        return _private({"balances": [_json(each) for each in _balances(request)]})


class BalanceView(_OwnView):
    """Answer the caller's balance in one unit: zeros before the first grant.

    404 for a unit that ``UNITS`` does not declare, and that the caller does not have.
    """

    def get(self, request: Request, unit: str) -> Response:
        for balance in _balances(request):
            if balance.credit_unit == unit:
                return _private(_json(balance))
        try:
            units.check_declared(unit)
        except ValueError as exc:
            raise NotFound from exc
        return _private({"unit": unit, "available": 0, "reserved": 0, "balance": 0})


def _balances(request: Request) -> tuple[Balance, ...]:
    try:
        balances = balances_of(request)
    except OUTAGE as exc:
        raise counterpart(MeterlyUnavailableError(str(exc))) from exc
    if balances is None:
        raise nobody_pays(request)
    return balances


def _json(balance: Balance) -> dict[str, Any]:
    return {
        "unit": balance.credit_unit,
        "available": balance.available,
        "reserved": balance.reserved,
        "balance": balance.balance,
    }


def _private(data: dict[str, Any]) -> Response:
    return Response(data, headers={"Cache-Control": responses.UNSHARED})
