"""Balances for front ends. The API key stays on the server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rest_framework.exceptions import NotFound
from rest_framework.response import Response
from rest_framework.views import APIView

from .. import units
from ..views import responses
from .balances import balances_of
from .exceptions import refuse

if TYPE_CHECKING:
    from rest_framework.request import Request

    from ..types import Balance


class _OwnView(APIView):
    # The caller may always see these balances. The project's default permissions may
    # ask for a queryset, which these views do not have, or for credits.
    permission_classes = []


class BalancesView(_OwnView):
    """Answer the caller's own balances, one object for each unit.

    ``{"balances": [{"unit", "available", "reserved", "balance"}, ...]}``. Your
    authenticators and ``CUSTOMER_RESOLVER`` find the caller. An unknown caller gets
    401, and 503 says that the ledger cannot be asked.
    """

    def get(self, request: Request) -> Response:
        return _private({"balances": [_json(each) for each in _balances(request)]})


class BalanceView(_OwnView):
    """Answer the caller's balance in one unit, with zeros before the first grant.

    The answer is 404 if ``UNITS`` does not declare the unit and the caller has none of
    it.
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
    balances = balances_of(request)
    if balances is None:
        refuse(request, None)
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
