"""The guarded tasks of a chaos run; they note what they do (see ``notes``)."""

from __future__ import annotations

import os
import random
import time
import uuid
from typing import Any

from celery.signals import task_postrun, task_prerun

from django_meterly.tasks import meterly_task
from tests.chaos.notes import die_by_chance, note

#: What is held for a job, of which it may charge less or more.
HELD = 10

# A child of a prefork worker runs one task at a time.
_run: str | None = None
_started_at = 0.0


class Broken(Exception):
    """What a job fails with."""


def payer(number: int, external_id: str, plan: Any) -> str:
    return external_id


def reference(number: int, *args: Any) -> str:
    return f"job-{number}"


def _work(self: Any, number: int, external_id: str, plan: dict[str, Any]) -> None:
    global _run
    _run = str(uuid.uuid4())
    work = self.meterly
    note(
        "began",
        job=number,
        run=_run,
        reservation=str(work.reservation.pk),
        fence=work.fence,
        pid=os.getpid(),
        parent=os.getppid(),
        started_at=_started_at,
    )
    try:
        if self.request.retries < plan["retries"]:
            # Before: the credits are handed over inside, and then it may die.
            note("gave up", run=_run)
            raise self.retry(countdown=1)
        time.sleep(plan["seconds"])
        if plan["raises"]:
            raise Broken
        if plan["charge"] is not None:
            # Each run another amount, so that it can be seen whose was charged.
            work.charge(random.randint(*plan["charge"]))
        note("finished", run=_run, charge=work.lifecycle.charge)
        # Done, and nobody knows yet: the worst of moments.
        time.sleep(plan["linger"])
    except BaseException:
        # The SystemExit of a cold shutdown, too.
        note("gave up", run=_run)
        raise


@task_prerun.connect
def _start(**facts: Any) -> None:
    global _started_at
    _started_at = time.time()


@task_postrun.connect
def _ended(state: str, **facts: Any) -> None:
    """Note how Celery has taken a run that has begun: what was decided is decided."""
    global _run
    if _run is not None:
        run, _run = _run, None
        if state == "SUCCESS":
            # Charged, but neither reported nor acknowledged.
            die_by_chance("after the decision")
        note("ended", run=run, state=state or "STOPPED")


keeping = meterly_task(
    amount=HELD,
    customer=payer,
    reference=reference,
    name="chaos.keeping",
    bind=True,
    max_retries=5,
)(_work)
releasing = meterly_task(
    amount=HELD,
    customer=payer,
    reference=reference,
    on_retry="release",
    name="chaos.releasing",
    bind=True,
    max_retries=5,
)(_work)
