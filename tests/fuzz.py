"""Fuzz the ledger's REST API over HTTP, along its OpenAPI document.

::

    python -m tests.fuzz

starts a server of its own on a new SQLite database and runs schemathesis against
it, always with the same seed. No 5xx, no status, header or body that the document
does not name; afterwards the books have to balance.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import schemathesis

from tests.database import free_port

ROOT = Path(__file__).parent.parent
SEED = "20260101"
EXAMPLES = "150"
# What valid data may still be answered: no such customer, too few credits, a key
# or a reference used before, a hold that is closed.
CONFIG = """
hooks = "tests.fuzz"

[checks.positive_data_acceptance]
expected-statuses = ["2xx", "402", "404", "409", "422"]

[[operations]]
include-path-regex = "customers/[{]customerId[}]"
parameters = { "path.customerId" = "CUSTOMER" }

[[operations]]
include-operation-id = "get_reservation"
parameters = { "path.reservationId" = "RESERVATION" }

[[operations]]
# A cursor comes from the page before, no more is committed than is held, and no
# balance exceeds 2**63 - 1.
include-operation-id = [
  "list_entries", "commit_reservation", "grant_credits", "add_credits",
]
checks.positive_data_acceptance.expected-statuses = [
  "2xx", "400", "402", "404", "409", "422",
]
"""


SEED_ROWS = """
from django_meterly.ledger.customers import ensure_workspace
from django_meterly.ledger.grants import grant
from django_meterly.ledger.spending import reserve
workspace = ensure_workspace("default").pk
customer = grant(
    workspace, external_id="user_1", amount=10**12, credit_unit="tokens",
    reference="seed", idempotency_key="seed",
).account.customer_id
print(customer, reserve(
    workspace, customer, amount=1, reference="seed", idempotency_key="seed-hold",
).reservation_id)
"""


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Send whole numbers as such: to JSON schema 5.0 is one, to the contract not."""
    if isinstance(body, dict):
        return {
            name: int(value)
            if isinstance(value, float) and value.is_integer()
            else value
            for name, value in body.items()
        }
    return body


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="meterly-fuzz-") as folder:
        return _fuzz(Path(folder))


def _fuzz(folder: Path) -> int:
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "DATABASE_URL": f"sqlite:///{folder / 'ledger.sqlite3'}",
    }

    def manage(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "django", *arguments],
            cwd=ROOT,
            env={**environment, "PYTHONPATH": str(ROOT)},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.strip()

    manage("migrate", "--verbosity=0")
    key = manage("meterly_ledger_apikey", "create", "fuzz", "--scope", "spend", "grant")
    customer, reservation = manage("shell", "--no-imports", "-c", SEED_ROWS).split()
    config = folder / "schemathesis.toml"
    seeded = CONFIG.replace("CUSTOMER", customer).replace("RESERVATION", reservation)
    config.write_text(seeded, "utf-8")
    port = free_port()
    url = f"http://127.0.0.1:{port}/ledger"
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [
                sys.executable,
                *("-m", "gunicorn", "--bind", f"127.0.0.1:{port}"),
                *("--worker-class", "gthread", "--threads", "4"),
                "--no-control-socket",
                "django.core.wsgi:get_wsgi_application()",
            ],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            _wait_for(f"{url}/health", server)
            result = subprocess.run(
                [
                    *("schemathesis", f"--config-file={config}", "run"),
                    *(f"{url}/openapi.json", f"--url={url}", f"--seed={SEED}"),
                    *(
                        f"--header=Authorization: Bearer {key}",
                        "--generation-database=none",
                    ),
                    *(f"--max-examples={EXAMPLES}", "--checks=all", *sys.argv[1:]),
                ],
                cwd=folder,
                env={**environment, "PYTHONPATH": str(ROOT)},
                check=False,
            ).returncode
        finally:
            server.terminate()
            server.wait(30)
    print(manage("meterly_ledger_verify"))
    if result:
        print((folder / "server.log").read_text("utf-8")[-10_000:])
    return result


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > give_up:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
