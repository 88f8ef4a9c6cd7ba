"""Ledgers in whose calls a process dies by chance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django_meterly.ledger.transport import LedgerTransport
from django_meterly.testing import FaultyTransport
from tests.chaos.notes import die_by_chance

if TYPE_CHECKING:
    from django_meterly.transports.base import Call


class Joined(LedgerTransport):
    """The ledger in the journal's own transactions."""

    def send(self, call: Call) -> dict[str, Any]:
        die_by_chance(f"before {call.operation}")
        answer = super().send(call)
        die_by_chance(f"after {call.operation}")
        return answer


class Remote(FaultyTransport):
    """A ledger that joins no transaction: every step is durable by itself."""

    far_end = "tests.chaos.ledger.Joined"
