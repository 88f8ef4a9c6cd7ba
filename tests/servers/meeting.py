"""A ledger that answers nobody before three have asked."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, ClassVar

from django_meterly.testing import FaultyTransport
from tests.children import PATIENCE

if TYPE_CHECKING:
    from django_meterly.transports.base import Call


class MeetingTransport(FaultyTransport):
    together: ClassVar[threading.Barrier] = threading.Barrier(3, timeout=PATIENCE / 2)

    def send(self, call: Call) -> dict[str, Any]:
        if call.operation == "reserve_credits":
            self.together.wait()
        return super().send(call)
