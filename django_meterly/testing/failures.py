"""A ledger that fails, as a test says."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from django.apps import apps
from django.utils.module_loading import import_string

from .. import client as clients
from ..client import MeterlyClient
from ..conf import meterly_settings, suggestion
from ..errors import (
    MeterlyNotSentError,
    MeterlyUnknownOutcomeError,
    MeterlyUsageError,
)
from ..transports.base import Call, Transport
from ..wire import ROUTES
from .blocks import Block, override_meterly

LEDGER_TRANSPORT = "django_meterly.ledger.transport.LedgerTransport"


@dataclass(frozen=True)
class Altered:
    """A fault: the call is carried out, and its answer goes through *change*."""

    change: Callable[[dict[str, Any]], Any]


Word = Literal["unsent", "lost", "unanswered"]
Fault = Word | BaseException | type[BaseException] | Callable[[], Any] | Altered | None
#: The faults that are texts.
WORDS = ("unsent", "lost", "unanswered")


class faults(Block["faults"]):  # noqa: N801
    """Let calls to the ledger fail in a block of a test.

    ::

        with faults(commit_reservation="unanswered") as line:
            client.post("/posters/")      # charged, but nobody has heard of it
        sweep()                           # the sweeper asks again

    Each argument is a method of ``MeterlyClient`` and the fault that its calls meet, or
    a list of faults for its next calls, one each. ``everything`` stands for the methods
    that are not named. A fault is

    - ``"unsent"``: the call certainly never reaches the ledger, because it is down.
    - ``"lost"``: a time-out. The call never reaches the ledger, but nobody knows that.
    - ``"unanswered"``: a time-out, too. The call is carried out; its answer is lost.
    - an exception of ``django_meterly.errors``: a refusal. It is raised, and the call
      is not carried out.
    - a function without arguments, which runs before the call is carried out, for
      example ``expire_holds``.
    - ``Altered``, to change the answer.
    - ``None``: nothing is wrong.

    In the block, the ledger of ``TRANSPORT`` behaves like a remote one: no movement is
    part of the journal's transaction. The block yields an object with ``calls`` (all
    calls, also those that were not sent), ``operations()`` (their names) and ``meet()``
    (which adds faults). Blocks may be nested. Raises ``TypeError`` for an unknown
    method, and ``ValueError`` for an unknown fault.
    """

    def __init__(
        self, everything: Fault = None, **operations: Fault | Sequence[Fault]
    ) -> None:
        super().__init__()
        self._everything = _checked(everything)
        self._script = {
            _operation(name): _listed(value) for name, value in operations.items()
        }

    def enable(self) -> faults:
        self.calls: list[Call] = []
        self._always: dict[str, Fault] = {}
        self._waiting: dict[str, deque[Fault]] = {}
        for operation, value in self._script.items():
            if isinstance(value, list):
                self.meet(operation, *value)
            else:
                self._always[operation] = value
        self._override: override_meterly | None = None
        transport = meterly_settings.TRANSPORT
        if not issubclass(transport, FaultyTransport):
            FaultyTransport.far_end = transport
            self._override = override_meterly(TRANSPORT=FaultyTransport)
            self._override.enable()
        FaultyTransport.lines.append(self)
        return self

    def disable(self) -> None:
        FaultyTransport.lines.remove(self)
        if self._override is not None:
            self._override.disable()
            FaultyTransport.far_end = LEDGER_TRANSPORT
            # The client was made for this far end, and the next block may have the
            # same settings and another far end.
            clients._current = None

    def meet(self, operation: str, *faults: Fault) -> None:
        """Let the next calls of *operation* meet *faults*, one each."""
        waiting = self._waiting.setdefault(_operation(operation), deque())
        waiting.extend(map(_checked, faults))

    def operations(self) -> list[str]:
        """Return the names of the calls that were to be sent, in order."""
        return [call.operation for call in self.calls]

    def _next(self, call: Call) -> Fault:
        self.calls.append(call)
        if waiting := self._waiting.get(call.operation):
            return waiting.popleft()
        named = call.operation in self._script
        return self._always.get(call.operation, None if named else self._everything)


class FaultyTransport(Transport):
    """A transport to a ledger over a line that may fail, as ``faults`` says.

    As ``METERLY["TRANSPORT"]`` it reaches the embedded ledger, which then behaves like
    a remote one. To reach another ledger, set *far_end* in a subclass to its transport
    or the dotted path of that.
    """

    far_end: ClassVar[type[Transport] | str] = LEDGER_TRANSPORT
    #: The blocks that are entered, the outermost first.
    lines: ClassVar[list[faults]] = []

    def __init__(self, ledger: Transport) -> None:
        self.ledger = ledger
        self.partial_commit = ledger.partial_commit
        self.thread_sensitive = ledger.thread_sensitive

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.ledger!r})"

    @classmethod
    def from_settings(cls, settings: Any) -> FaultyTransport:
        return cls(cls._transport().from_settings(settings))

    @classmethod
    def longest_hold(cls) -> int:
        return cls._transport().longest_hold()

    @classmethod
    def _transport(cls) -> type[Transport]:
        far_end: Any = cls.far_end
        if isinstance(far_end, str):
            far_end = import_string(far_end)
        return far_end  # type: ignore[no-any-return]

    def send(self, call: Call) -> dict[str, Any]:
        met = [line._next(call) for line in self.lines]
        # The innermost block decides, if it has something for this call.
        fault = next((one for one in reversed(met) if one is not None), None)
        if fault == "unsent":
            raise MeterlyNotSentError("refused")
        if fault == "lost":
            raise MeterlyUnknownOutcomeError("read time-out")
        if isinstance(fault, BaseException | type):
            raise fault
        if callable(fault):
            fault()
        answer = self.ledger.send(call)
        if fault == "unanswered":
            raise MeterlyUnknownOutcomeError("read time-out")
        if isinstance(fault, Altered):
            altered: dict[str, Any] = fault.change(answer)
            return altered
        return answer

    def close(self) -> None:
        self.ledger.close()


def _operation(name: str) -> str:
    if name not in ROUTES:
        raise TypeError(
            f"Unknown call {name!r}: name a method of MeterlyClient."
            f"{suggestion(name, ROUTES)}"
        )
    return name


def _listed(value: Fault | Sequence[Fault]) -> Fault | list[Fault]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_checked(one) for one in value]
    return _checked(value)


def _checked(fault: Any) -> Fault:
    if isinstance(fault, str) and fault not in WORDS:
        raise ValueError(
            f"A fault is one of {', '.join(WORDS)}, an exception, a function or "
            f"Altered, not {fault!r}."
        )
    if isinstance(fault, type):
        known = issubclass(fault, BaseException)
    else:
        known = isinstance(fault, str | BaseException | Altered | None)
        known = known or callable(fault)
    if not known:
        raise ValueError(f"{fault!r} is not a fault.")
    return cast("Fault", fault)


def embedded(name: str) -> MeterlyClient:
    """Return a client of the embedded ledger that meets no faults.

    If the project uses another ledger, nothing is sent to it: this raises
    ``MeterlyUsageError``, which says that *name* needs the embedded one.
    """
    transport = meterly_settings.TRANSPORT
    if apps.is_installed("django_meterly.ledger"):
        from ..ledger.transport import LedgerTransport

        if issubclass(transport, FaultyTransport):
            transport = transport._transport()
        if issubclass(transport, LedgerTransport):
            return MeterlyClient(transport=transport.from_settings(meterly_settings))
    raise MeterlyUsageError(
        f"{name} works on the embedded ledger, and METERLY['TRANSPORT'] is "
        f"{transport.__qualname__}. "
        "In the settings of your tests, add 'django_meterly.ledger' to INSTALLED_APPS "
        f"and set METERLY['TRANSPORT'] to {LEDGER_TRANSPORT!r}. Every call, result and "
        "error is the same there."
    )
