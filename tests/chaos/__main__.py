"""Kill the processes of a small site at random, and see what it is charged.

::

    python -m tests.chaos                       # 300 jobs in 180 seconds, on SQLite
    python -m tests.chaos --jobs 40 --seconds 20 --seed 7
    python -m tests.database postgresql python -m tests.chaos

Workers, beat, sweeper, broker and database are started here, and nothing else is
killed. What must be true afterwards is said, and checked, in ``promises``. The exit
code is 1 when a promise was broken; then the folder of the run is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests import brokers, database
from tests.children import broker_options

if TYPE_CHECKING:
    from collections.abc import Callable

#: Seconds after which Redis takes a message for lost that nobody acknowledged.
VISIBILITY_TIMEOUT = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--seed", type=int, default=random.randrange(10_000))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--broker", choices=["redis", "rabbitmq", "filesystem"], default="redis"
    )
    parser.add_argument(
        "--ledger",
        choices=["joined", "remote"],
        default="joined",
        help="in the journal's own transactions, or in none of them",
    )
    parser.add_argument(
        "--deaths",
        type=float,
        default=0.01,
        help="the chance that a process dies at a call to the ledger (%(default)s)",
    )
    parser.add_argument("--keep", action="store_true", help="keep the run's folder")
    options = parser.parse_args()
    # An ordinary exit, so that all that was started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    server = f"{options.broker}-server"
    if options.broker != "filesystem" and not brokers.installed(server):
        print(f"{server} is not installed.")
        return 2
    folder = Path(tempfile.mkdtemp(prefix="meterly-chaos-"))
    broken = True
    try:
        with ExitStack() as stack:
            broken = _run(folder, options, stack)
    finally:
        if broken or options.keep:
            print(f"What the processes said is in {folder}")
        else:
            shutil.rmtree(folder)
    return int(broken)


def _run(folder: Path, options: argparse.Namespace, stack: ExitStack) -> bool:
    url, broker, restart = _start_broker(options.broker, folder, stack)
    metering = {
        "TRANSPORT": f"tests.chaos.ledger.{options.ledger.capitalize()}",
        # So short that work outlives its lease, and that nobody waits for long.
        "LEASE_GRACE": 3,
        "RESERVATION_TTL": 15,
        "DEADLINE": 3,
    }
    os.environ.update(
        DJANGO_SETTINGS_MODULE="tests.chaos.settings",
        CHAOS_FOLDER=str(folder),
        CHILD_METERLY=json.dumps(metering),
        CHILD_BROKER=str(folder / "broker"),
        CHILD_BROKER_URL=url,
        CHILD_BROKER_OPTIONS=json.dumps(broker),
    )
    os.environ.setdefault("DATABASE_URL", f"sqlite:///{folder / 'chaos.sqlite3'}")

    import django
    from django.db import connection

    django.setup()
    from tests.chaos.conductor import Conductor

    before = os.environ["DATABASE_URL"]
    connection.creation.create_test_db(verbosity=0)
    server, _, _ = before.rpartition("/")
    name = Path(connection.settings_dict["NAME"]).name
    os.environ["DATABASE_URL"] = f"{server}/{name}"
    print(
        f"{options.jobs} jobs in {options.seconds:g} s, seed {options.seed}: "
        f"{options.broker}, {connection.vendor}, ledger {options.ledger}",
        flush=True,
    )
    try:
        result = Conductor(
            folder,
            jobs=options.jobs,
            seconds=options.seconds,
            seed=options.seed,
            workers=options.workers,
            deaths=options.deaths,
            restart=restart,
            visibility_timeout=VISIBILITY_TIMEOUT,
        ).run()
    finally:
        if connection.vendor == "postgresql":
            # Of processes that were killed a moment ago.
            with connection.cursor() as cursor:
                cursor.execute(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
        if connection.vendor != "sqlite":
            connection.creation.destroy_test_db(name, verbosity=0)
        else:
            connection.close()
    for what, value in result.table:
        print(f"  {what:<40} {value}")
    for promise in result.broken:
        print(f"BROKEN: {promise}")
    print("Every promise was kept." if not result.broken else "Not every promise was.")
    return bool(result.broken)


def _start_broker(
    name: str, folder: Path, stack: ExitStack
) -> tuple[str, dict[str, Any], Callable[[], None] | None]:
    """Return a broker's URL and options, and how to restart it."""
    place = folder / "broker"
    place.mkdir()
    if name == "filesystem":
        return "filesystem://", broker_options(str(place)), None
    if name == "rabbitmq":
        return stack.enter_context(brokers.rabbitmq(place)), {}, None
    port = database.free_port()
    running = stack.enter_context(ExitStack())
    url = running.enter_context(brokers.redis(place, port))

    def restart() -> None:
        running.close()
        running.enter_context(brokers.redis(place, port))

    options = {
        "visibility_timeout": VISIBILITY_TIMEOUT,
        # Look for lost messages often, and be not kept from it by a killed worker.
        "unacked_restore_interval": 2,
        "unacked_restore_throttle": 1,
        "unacked_mutex_expire": 5,
    }
    return url, options, restart


if __name__ == "__main__":
    sys.exit(main())
