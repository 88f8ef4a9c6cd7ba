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
import sys
from concurrent.futures import ThreadPoolExecutor

import django
from django.conf import settings


def main(external_id: str, threads: str, attempts: str, options: str) -> None:
    database = settings.DATABASES["default"]
    database["OPTIONS"] = {**database.get("OPTIONS", {}), **json.loads(options)}
    django.setup()
    from django.db import connection

    from django_meterly.errors import MeterlyInsufficientCreditsError
    from django_meterly.ledger import operations

    workspace = operations.ensure_workspace("acme").pk
    customer = operations.find_customer(workspace, external_id=external_id)
    assert customer is not None

    def spend(thread: int) -> int:
        succeeded = 0
        try:
            for number in range(int(attempts)):
                try:
                    operations.reserve(
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
