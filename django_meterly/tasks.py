"""Celery tasks that settle what crashes and outages left behind.

``manage.py meterly_settle`` does the same without Celery.
"""

from __future__ import annotations

from typing import Any

from celery import shared_task

# Settings modules import beat_schedule(): the models are not to be had yet.

#: Runs that may wait in a busy queue; what waits for longer expires. Not 1: in a
#: queue that lags behind by a whole interval, nothing would ever run.
MOST_WAITING = 20


@shared_task(name="django_meterly.tasks.release_stale_reservations", ignore_result=True)
def release_stale_reservations() -> None:
    """Give up the reservations whose lease has run out, and release them."""
    from . import journal
    from .client import get_client

    journal.sweep(get_client())


@shared_task(name="django_meterly.tasks.settle_reservations", ignore_result=True)
def settle_reservations() -> None:
    """Carry out the commits, releases and grants that are still due."""
    from . import grants, journal
    from .client import get_client

    client = get_client()
    journal.settle_due(client)
    grants.settle_due(client)


def beat_schedule(
    *, release_every: float = 60.0, settle_every: float = 15.0
) -> dict[str, dict[str, Any]]:
    """Return the entries for ``CELERY_BEAT_SCHEDULE``; intervals in seconds.

    For the settings module. Several beats and several workers at once do no
    harm: every row is claimed.
    """
    # By name, because a task object would load the Celery app, and that the
    # settings, in the middle of which we are.
    return {
        "meterly-release-stale-reservations": {
            "task": "django_meterly.tasks.release_stale_reservations",
            "schedule": release_every,
            "options": {"expires": MOST_WAITING * release_every},
        },
        "meterly-settle-reservations": {
            "task": "django_meterly.tasks.settle_reservations",
            "schedule": settle_every,
            "options": {"expires": MOST_WAITING * settle_every},
        },
    }
