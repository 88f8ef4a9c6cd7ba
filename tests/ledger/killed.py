"""A process that is killed at every point between two of its statements.

::

    python -m tests.ledger.killed

It forks, and the child moves credits until it kills itself: before its first
statement, after it, before the second, and so on. The same calls are then made
once more with the same keys, and the books are looked at. It prints how many
times it died.
"""

from __future__ import annotations

import itertools
import os
import signal
from io import StringIO
from typing import Any

import django


def main() -> None:
    django.setup()
    from django.core.management import call_command
    from django.db import connections

    from django_meterly.ledger import customers, grants, spending

    workspace = customers.ensure_workspace("killed").pk

    def move(number: int) -> Any:
        """Add 10 credits, use 5 of them in all; return the account."""
        key = f"{number}-{{}}".format

        def hold(name: str, amount: int) -> str:
            return spending.reserve(
                workspace,
                customer,
                amount=amount,
                reference="job",
                idempotency_key=key(name),
            ).reservation_id

        customer = grants.grant(
            workspace,
            external_id="user_1",
            amount=10,
            credit_unit="credits",
            reference=key("grant"),
            idempotency_key=key("grant"),
        ).account.customer_id
        held = hold("reserve", 5)
        spending.extend(workspace, held, ttl_seconds=600, idempotency_key=key("extend"))
        spending.commit(workspace, held, amount=3, idempotency_key=key("commit"))
        spending.release(workspace, hold("again", 4), idempotency_key=key("release"))
        spending.use(
            workspace,
            customer,
            amount=2,
            reference="page",
            idempotency_key=key("use"),
        )
        return customers.default_balance(workspace, customer)

    for number in itertools.count():
        connections.close_all()
        child = os.fork()
        if not child:
            left = number

            def counted(execute: Any, *arguments: Any) -> Any:
                nonlocal left
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = execute(*arguments)
                if left == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 2
                return result

            with connections["default"].execute_wrapper(counted):
                move(number)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        account = move(number)
        assert account.balance == 5 * (number + 1), (number, account)
        assert account.reserved == 0, (number, account)
        call_command("meterly_ledger_verify", stdout=StringIO())
        if not os.WIFSIGNALED(status):
            assert status == 0
            print(number)
            return


if __name__ == "__main__":
    main()
