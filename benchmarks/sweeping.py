"""Measure the sweeper: rows a second, and the most memory a process took.

::

    python -m benchmarks.sweeping sqlite
    python -m benchmarks.sweeping postgresql --rows 100000 --sweepers 2

The rows are reservations whose lease has run out, for a thousand customers of the
embedded ledger. Each sweeper is a process that runs ``manage.py meterly_settle``.
PostgreSQL is started here, durable as it comes: every COMMIT waits for the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests import database

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

CUSTOMERS = 1000


def setup() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
    import django
    from django.conf import settings

    options = settings.DATABASES["default"]
    if options["ENGINE"].endswith("sqlite3"):
        # As docs/settings.md has it.
        options["OPTIONS"] = {
            "transaction_mode": "IMMEDIATE",
            "timeout": 20,
            "init_command": "PRAGMA journal_mode=WAL",
        }
    django.setup()


def sweep() -> None:
    """Be one sweeper; print what it came to as JSON."""
    setup()
    from django.core.management import call_command
    from django.db import connection

    queries = 0

    def count(execute: Any, *args: Any) -> Any:
        nonlocal queries
        queries += 1
        return execute(*args)

    connection.ensure_connection()
    before = _peak_mib()
    with connection.execute_wrapper(count):
        call_command("meterly_settle", "--json", stdout=sys.stderr)
    print(json.dumps({"queries": queries, "before": before, "peak": _peak_mib()}))


def _peak_mib() -> float:
    # Kibibytes, but on macOS bytes.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(rows: int, sweepers: int) -> None:
    setup()
    from django.core.management import call_command
    from django.db import connection

    from django_meterly.models import Reservation
    from tests.backlog import leave_behind
    from tests.books import fund

    connection.creation.create_test_db(verbosity=0)
    server, _, _ = os.environ["DATABASE_URL"].rpartition("/")
    name = Path(connection.settings_dict["NAME"]).name
    environment = {**os.environ, "DATABASE_URL": f"{server}/{name}"}
    try:
        for number in range(CUSTOMERS):
            count = rows // CUSTOMERS + (number < rows % CUSTOMERS)
            if count:
                leave_behind(fund(f"user_{number}", count), count)
        print(f"{rows} rows, {sweepers} sweepers, {connection.vendor}", flush=True)
        begun = time.monotonic()
        children = [
            subprocess.Popen(
                [sys.executable, "-m", __spec__.name, "--sweep"],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(sweepers)
        ]
        found = [json.loads(child.communicate()[0]) for child in children]
        took = time.monotonic() - begun
        left = Reservation.objects.exclude(state="released").count()
        tried = set(Reservation.objects.values_list("settle_attempts", flat=True))
        call_command("meterly_ledger_verify", stdout=sys.stderr)
        queries = sum(one["queries"] for one in found)
        print(
            f"{rows / took:.0f} rows a second ({took:.0f} s), "
            f"{queries / rows:.2f} queries a row; a sweeper's memory: "
            + ", ".join(f"{o['before']:.0f} to {o['peak']:.0f} MiB" for o in found)
            + f"; left {left}, attempts {sorted(tried)}",
            flush=True,
        )
    finally:
        connection.creation.destroy_test_db(name, verbosity=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("database", choices=["sqlite", "postgresql", "mariadb"])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--sweepers", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="meterly-") as folder:
        path = Path(folder)
        server: AbstractContextManager[str]
        if options.database == "sqlite":
            server = nullcontext(f"sqlite:///{path / 'sweeping.sqlite3'}")
        elif options.database == "postgresql":
            server = database.postgresql(path, durable=True)
        else:
            server = database.mariadb(path)
        with server as url:
            os.environ["DATABASE_URL"] = url
            measure(options.rows, options.sweepers)


if __name__ == "__main__":
    sweep() if sys.argv[1:] == ["--sweep"] else main()
