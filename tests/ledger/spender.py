"""A process that spends: it reserves one credit at a time, in some threads.

::

    python -m tests.ledger.spender CUSTOMER THREADS ATTEMPTS OPTIONS

It prints ``ready``, waits for a line, and prints how many succeeded and how many
were refused. *OPTIONS* is JSON for the database's own. Any other exception
than a refusal ends it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import django
from django.conf import settings


def start_spender(
    customer: str,
    *,
    attempts: int,
    threads: int = 1,
    options: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Start this module; ``run`` tells it when to begin."""
    return subprocess.Popen(
        [
            sys.executable,
            *("-m", "tests.ledger.spender", customer),
            *(str(threads), str(attempts), json.dumps(options or {})),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )


def run(spenders: list[Any]) -> list[tuple[int, ...]]:
    """Let them all go at the same moment; return what each of them printed."""
    try:
        for spender in spenders:
            assert spender.stdout.readline() == "ready\n"
        for spender in spenders:
            spender.stdin.write("go\n")
            spender.stdin.flush()
        printed = [spender.communicate()[0] for spender in spenders]
        assert [spender.returncode for spender in spenders] == [0] * len(spenders)
    finally:
        for spender in spenders:
            spender.kill()
            spender.wait()
            spender.stdin.close()
            spender.stdout.close()
    return [tuple(map(int, text.split())) for text in printed]


def main(external_id: str, threads: str, attempts: str, options: str) -> None:
    database = settings.DATABASES["default"]
    database["OPTIONS"] = {**database.get("OPTIONS", {}), **json.loads(options)}
    django.setup()
    from django.db import connection

    from django_meterly.errors import MeterlyInsufficientCreditsError
    from django_meterly.ledger import customers, spending

    workspace = customers.ensure_workspace("acme").pk
    customer = customers.find_customer(workspace, external_id=external_id)
    assert customer is not None

    def spend(thread: int) -> int:
        succeeded = 0
        try:
            for number in range(int(attempts)):
                try:
                    spending.reserve(
                        workspace,
                        customer.customer_id,
                        amount=1,
                        reference="job",
                        idempotency_key=f"{os.getpid()}-{thread}-{number}",
                    )
                except MeterlyInsufficientCreditsError:
                    pass
                else:
                    succeeded += 1
        finally:
            connection.close()
        return succeeded

    print("ready", flush=True)
    sys.stdin.readline()
    with ThreadPoolExecutor(int(threads)) as pool:
        succeeded = sum(pool.map(spend, range(int(threads))))
    print(succeeded, int(threads) * int(attempts) - succeeded, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
