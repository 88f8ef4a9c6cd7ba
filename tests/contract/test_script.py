from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import django_meterly

SCRIPT = """
import sys

from django_meterly import MeterlyClient, MeterlyInsufficientCreditsError

with MeterlyClient(api_key=sys.argv[1], base_url=sys.argv[2]) as meterly:
    granted = meterly.grant_credits("user_123", 100, "image_credits", "signup")
    customer = granted.grant.customer_id
    held = meterly.reserve_credits(customer, 25, reference="render-1")
    meterly.commit_reservation(held.reservation_id, amount=20)
    print(meterly.get_balance(customer).available)
    with meterly.guard(customer, 10):
        pass
    try:
        meterly.use_credits(customer, 1000)
    except MeterlyInsufficientCreditsError as exc:
        print(exc.available)

from django.conf import settings

assert not settings.configured
assert "rest_framework" not in sys.modules
"""


def test_client_works_in_a_plain_script(live_ledger, api_key, tmp_path):
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("DJANGO_SETTINGS_MODULE", "DATABASE_URL")
    }
    environment["PYTHONPATH"] = str(Path(django_meterly.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, api_key, live_ledger],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("80\n70\n", "")
