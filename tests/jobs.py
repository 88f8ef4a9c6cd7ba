"""Guarded tasks, as a project has them; ``tests.celery_app`` imports them.

What a run is to do, and leaves behind, is in files of a folder that it gets.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celery import current_task, shared_task
from celery.exceptions import Ignore, Reject

from django_meterly import MeterlyUnavailableError, guard
from django_meterly.tasks import meterly_task

if TYPE_CHECKING:
    from collections.abc import Callable


class Broken(Exception):
    """What a job fails with."""


def payer(external_id: str, *args: Any, **options: Any) -> str:
    return external_id


def note(folder: str | None, what: str) -> None:
    """Append a line to the *folder*'s notes; one write, so that none is torn."""
    if folder:
        with Path(folder, "notes").open("a") as notes:
            notes.write(f"{what}\n")


def at_work(folder: str | None) -> int:
    """Say that a run has begun, and which one of them it is, from 1."""
    if not folder:
        return 1
    note(folder, f"began {os.getpid()}")
    return Path(folder, "notes").read_text().count("began")


def wait_for(folder: str, name: str) -> None:
    """Work until there is a file of this *name*."""
    give_up = time.monotonic() + 120
    while not Path(folder, name).exists() and time.monotonic() < give_up:
        time.sleep(0.02)


@meterly_task(amount=25, customer=payer, name="jobs.plain")
def plain(external_id: str, used: int | None = None) -> str:
    if used is not None:
        current_task.meterly.charge(used)
    return f"done for {external_id}"


@meterly_task(
    "image_credits",
    lambda external_id, amount: amount,
    customer=payer,
    reference=lambda external_id, amount: f"order-{amount}",
    name="jobs.priced",
    bind=True,
)
def priced(self: Any, external_id: str, amount: int) -> str:
    return str(self.meterly.reference)


@meterly_task(amount=25, customer=payer, name="jobs.fails", bind=True)
def fails(self: Any, external_id: str, folder: str | None = None) -> None:
    at_work(folder)
    raise Broken


@meterly_task(amount=25, name="jobs.handed_off")
def handed_off(folder: str | None = None, used: int | None = None) -> None:
    at_work(folder)
    if used is not None:
        current_task.meterly.charge(used)


@meterly_task(amount=25, name="jobs.handed_off_retries", bind=True)
def handed_off_retries(self: Any, folder: str | None = None) -> None:
    at_work(folder)
    if not self.request.retries:
        raise self.retry(countdown=0)
    self.meterly.charge(7)


@shared_task(name="jobs.hands_off", ignore_result=True)
def hands_off(folder: str) -> None:
    with guard("user_1", 25) as work:
        work.hand_off(handed_off, folder, used=2)


@meterly_task(amount=25, name="jobs.handed_off_replaces", bind=True)
def handed_off_replaces(self: Any, folder: str | None = None) -> None:
    at_work(folder)
    raise self.replace(plain.si("user_1", used=3))


@meterly_task(
    amount=25,
    customer=payer,
    name="jobs.waits_for_the_ledger",
    autoretry_for=(MeterlyUnavailableError,),
    retry_kwargs={"countdown": 0},
)
def waits_for_the_ledger(external_id: str) -> None: ...


def _retrying(self: Any, external_id: str, fail: int, folder: str | None) -> int:
    at_work(folder)
    if self.request.retries < fail:
        raise self.retry(countdown=0, exc=Broken())
    return int(self.request.retries)


retries_keeping = meterly_task(
    amount=25, customer=payer, name="jobs.retries_keeping", bind=True, max_retries=3
)(_retrying)
retries_releasing = meterly_task(
    amount=25,
    customer=payer,
    name="jobs.retries_releasing",
    bind=True,
    max_retries=3,
    on_retry="release",
)(_retrying)


@meterly_task(
    amount=25,
    customer=payer,
    name="jobs.autoretries",
    autoretry_for=(Broken,),
    retry_kwargs={"countdown": 0, "max_retries": 2},
)
def autoretries(external_id: str, fail: int, folder: str | None = None) -> None:
    at_work(folder)
    if current_task.request.retries < fail:
        raise Broken


@meterly_task(amount=25, customer=payer, name="jobs.replaces", bind=True)
def replaces(self: Any, external_id: str, times: int, folder: str | None = None) -> Any:
    at_work(folder)
    if times:
        return self.replace(replaces.si(external_id, times - 1, folder))
    return "replaced"


@meterly_task(amount=25, customer=payer, name="jobs.rejects")
def rejects(external_id: str) -> None:
    raise Reject("not now", requeue=False)


@meterly_task(amount=25, customer=payer, name="jobs.nested", bind=True)
def nested(self: Any, external_id: str) -> int:
    plain(external_id, used=1)
    self.meterly.charge(2)
    return int(self.meterly.lifecycle.charge)


@meterly_task(amount=25, customer=payer, name="jobs.long", ttl_seconds=2)
def long(external_id: str, seconds: float, look: Callable[[], None]) -> None:
    """Look now and then; called plainly only, for a function does not travel."""
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        time.sleep(0.2)
        look()


def _work(self: Any, external_id: str, folder: str, *steps: str) -> str:
    """Do what *steps* say for this run; the last is for all that follow.

    ``wait`` works until the test says "go", ``hang`` for ever, ``die`` kills this
    process. ``wait-raise``, ``wait-retry`` and so on do that after the wait.
    """
    run = at_work(folder)
    step = steps[min(run, len(steps)) - 1]
    if step == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if step == "hang":
        time.sleep(600)
    if step.startswith("wait"):
        wait_for(folder, f"go-{run}")
    note(folder, f"done {run}")
    if (end := step.partition("-")[2]) == "retry":
        raise self.retry(countdown=0)
    if end:
        raise {"raise": Broken, "reject": Reject, "ignore": Ignore}[end]()
    return f"run {run}"


works = meterly_task(
    amount=25,
    customer=payer,
    name="jobs.works",
    bind=True,
    acks_late=True,
    reject_on_worker_lost=True,
)(_work)
works_early = meterly_task(
    amount=25, customer=payer, name="jobs.works_early", bind=True
)(_work)
works_alone = meterly_task(
    amount=25,
    customer=payer,
    name="jobs.works_alone",
    bind=True,
    on_duplicate="ignore",
)(_work)
