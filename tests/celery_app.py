"""A project's Celery app, with tasks that are guarded in their body.

Workers and beats run as ``python -m celery -A tests.celery_app ...``, in the
environment of ``tests.children``; ``CHILD_BROKER`` names the broker's folder.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import Celery

app = Celery("tests", include=["tests.jobs"])
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()


@app.task(name="finish")
def finish(external_id: str) -> None:
    from django_meterly import guard

    with guard(external_id, 25):
        pass


@app.task(name="hang")
def hang(external_id: str, marker: str) -> None:
    """Work until killed; the file *marker* then holds the process id."""
    from django_meterly import guard

    with guard(external_id, 25):
        Path(f"{marker}.part").write_text(str(os.getpid()))
        Path(f"{marker}.part").rename(marker)
        time.sleep(600)
