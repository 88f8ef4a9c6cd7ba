"""``manage.py meterly_settle``, once a second, until killed."""

from __future__ import annotations

import time

import django
from django.core.management import CommandError, call_command

if __name__ == "__main__":
    django.setup()
    while True:
        try:
            call_command("meterly_settle")
        except CommandError as exc:
            # Stuck rows: what came of the run says so, too.
            print(exc, flush=True)
        time.sleep(1)
