"""Many rows that nobody has decided, as dead processes leave them behind."""

from __future__ import annotations

import datetime as dt
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from django.utils import timezone

from django_meterly.ledger.models import Account, Entry, Hold
from django_meterly.models import Customer, Reservation
from django_meterly.transports.base import Transport
from tests.children import environment, started, wait_until

if TYPE_CHECKING:
    from django_meterly.transports.base import Call

#: Rows inserted at a time.
PAGE = 1000


def leave_behind(
    customer: Customer, count: int, *, unit: str = "image_credits"
) -> None:
    """Reserve one credit *count* times for *customer*, with leases long run out.

    What the guard would write, in bulk: live holds, their entries, and rows.
    """
    account = Account.objects.get(customer__public_id=customer.customer_id, unit=unit)
    now = timezone.now()
    past, later = now - dt.timedelta(hours=1), now + dt.timedelta(hours=1)
    for start in range(0, count, PAGE):
        numbers = range(start, min(start + PAGE, count))
        holds = Hold.objects.bulk_create(
            Hold(
                account=account,
                amount=1,
                reference=f"left-{number}",
                expires_at=later,
                created_at=now,
            )
            for number in numbers
        )
        rows = [
            Reservation(
                customer=customer,
                unit=unit,
                amount=1,
                reference=hold.reference,
                key=f"{customer.pk}-{hold.public_id}",
                ttl_seconds=300,
                state="reserved",
                reservation_id=hold.public_id,
                lease_until=past,
            )
            for hold in holds
        ]
        Reservation.objects.bulk_create(rows)
        Entry.objects.bulk_create(
            Entry(
                workspace=account.customer.workspace,
                account=account,
                hold=hold,
                kind=Entry.Kind.RESERVED,
                amount=1,
                balance_delta=0,
                reserved_delta=1,
                balance_after=account.balance,
                reserved_after=account.reserved + number + 1,
                reference=hold.reference,
                idempotency_key=row.wire_key("reserve"),
                created_at=now,
            )
            for number, hold, row in zip(numbers, holds, rows, strict=True)
        )
    account.reserved += count
    account.save(update_fields=["reserved"])


def settled_by_two(log: Path, timeout: float = 60) -> str:
    """Let two processes run the sweeper at the same moment; return what they said."""
    code = "from tests import dying; dying.settle()"
    with ExitStack() as stack:
        sweepers = [
            stack.enter_context(
                started("django", "shell", "-c", code, env=environment(), log=log)
            )
            for _ in range(2)
        ]
        wait_until(lambda: log.exists() and log.read_text().count("ready") == 2, log)
        for sweeper in sweepers:
            assert sweeper.stdin
            print("go", file=sweeper.stdin, flush=True)
        for sweeper in sweepers:
            sweeper.wait(timeout)
    said = log.read_text()
    assert [sweeper.returncode for sweeper in sweepers] == [0, 0], said
    assert "could not be settled" not in said, said
    return said


class Notebook(Transport):
    """A remote ledger that releases whatever it is told to, and notes it.

    In the file that ``NOTEBOOK`` in the environment names, a line each. It costs
    next to nothing, so that the sweeper can be tried with many rows.
    """

    def send(self, call: Call) -> dict[str, Any]:
        assert call.operation == "release_reservation"
        released = call.arguments["reservationId"]
        # In one piece, whoever writes at the same time.
        with Path(os.environ["NOTEBOOK"]).open("ab", buffering=0) as notebook:
            notebook.write(f"{released}\n".encode())
        return {
            "reservationId": released,
            "customerId": "cus_1",
            "unit": "image_credits",
            "amount": 1,
            "status": "released",
            "reference": "left",
            "expiresAt": "2030-01-01T00:00:00Z",
            "balance": {
                "customerId": "cus_1",
                "creditUnit": "image_credits",
                "balance": 1,
                "reserved": 0,
                "available": 1,
            },
        }
