"""A ledger at the far end of a bad line: the embedded one, with faults between.

It behaves as a remote ledger does (nothing of it joins the journal's
transactions), and loses, delays or refuses what a test tells it to.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from django_meterly.errors import MeterlyNotSentError, MeterlyUnknownOutcomeError
from django_meterly.ledger.transport import LedgerTransport

if TYPE_CHECKING:
    from collections.abc import Callable

    from django_meterly.transports.base import Call


@dataclass(frozen=True)
class Altered:
    """A fault: the call is carried out, and its answer goes through *change*."""

    change: Callable[[dict[str, Any]], Any]


class FaultyTransport(LedgerTransport):
    """Set ``METERLY["TRANSPORT"]`` to ``tests.faults.FaultyTransport``.

    ``faults`` maps an operation to what its next calls meet, in order; a call
    that finds none is carried out. ``calls`` lists what arrived or was to.
    """

    faults: ClassVar[dict[str, deque[Any]]] = {}
    calls: ClassVar[list[Call]] = []

    @classmethod
    def reset(cls) -> None:
        cls.faults.clear()
        cls.calls.clear()

    @classmethod
    def meet(cls, operation: str, *faults: Any) -> None:
        """Let the next calls of *operation* meet *faults*.

        ``"unsent"``: never reaches the ledger, and that is known.
        ``"lost"``: never reaches the ledger, but that is not known.
        ``"unanswered"``: carried out, and the answer is lost.
        ``Altered``: carried out, and answered otherwise.
        An exception is raised instead of the call, a callable is called before it.
        """
        cls.faults.setdefault(operation, deque()).extend(faults)

    @classmethod
    def operations(cls) -> list[str]:
        return [call.operation for call in cls.calls]

    def aliases(self) -> tuple[str, ...]:
        return ()

    def joins(self, using: str) -> bool:
        return False

    def unit_of_work(self, using: str) -> AbstractContextManager[Any]:
        return nullcontext()

    def send(self, call: Call) -> dict[str, Any]:
        self.calls.append(call)
        waiting = self.faults.get(call.operation)
        fault = waiting.popleft() if waiting else None
        if fault == "unsent":
            raise MeterlyNotSentError("refused")
        if fault == "lost":
            raise MeterlyUnknownOutcomeError("read time-out")
        if isinstance(fault, BaseException):
            raise fault
        if callable(fault):
            fault()
        answer = super().send(call)
        if fault == "unanswered":
            raise MeterlyUnknownOutcomeError("read time-out")
        if isinstance(fault, Altered):
            altered: dict[str, Any] = fault.change(answer)
            return altered
        return answer
