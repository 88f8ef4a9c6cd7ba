"""Celery tasks that settle what crashes and outages left behind.

``manage.py meterly_settle`` does the same without Celery.
"""

from __future__ import annotations

from typing import Any

from celery import current_app, shared_task

# Settings modules import beat_schedule(): the models are not to be had yet.

#: Runs that may wait in a busy queue; what waits for longer expires. Not 1: in a
#: queue that lags behind by a whole interval, nothing would ever run.
MOST_WAITING = 20


@shared_task(name="django_meterly.tasks.release_stale_reservations", ignore_result=True)
def release_stale_reservations(seconds: float = 60.0) -> None:
    """Give up the reservations whose lease has run out, and release them.

    Then forget what was settled ``JOURNAL_RETENTION`` ago. Each for *seconds* at
    most: a long backlog must not take every worker there is.
    """
    from . import journal
    from .client import get_client

    journal.record_lapsed(seconds=seconds)
    journal.settle_due(get_client(), seconds=seconds)
    journal.prune(seconds=seconds)


@shared_task(name="django_meterly.tasks.settle_reservations", ignore_result=True)
def settle_reservations(seconds: float = 60.0) -> None:
    """Carry out the commits, releases and grants that are due.

    Commits and releases for *seconds* at most.
    """
    from . import grants, journal
    from .client import get_client

    client = get_client()
    journal.settle_due(client, seconds=seconds)
    grants.settle_due(client)


def beat_schedule(
    *, release_every: float = 60.0, settle_every: float = 15.0
) -> dict[str, dict[str, Any]]:
    """Return the entries for ``CELERY_BEAT_SCHEDULE``; intervals in seconds.

    For the settings module. Several beats and several workers at once do no
    harm: every row is claimed. A run ends after its interval, so that a backlog
    keeps two workers busy, and no more.
    """
    # By name, because a task object would load the Celery app, and that the
    # settings, in the middle of which we are.
    return {
        "meterly-release-stale-reservations": {
            "task": "django_meterly.tasks.release_stale_reservations",
            "schedule": release_every,
            "kwargs": {"seconds": release_every},
            "options": {"expires": MOST_WAITING * release_every},
        },
        "meterly-settle-reservations": {
            "task": "django_meterly.tasks.settle_reservations",
            "schedule": settle_every,
            "kwargs": {"seconds": settle_every},
            "options": {"expires": MOST_WAITING * settle_every},
        },
    }


def missing_from_beat() -> list[str]:
    """Return which of our tasks the project's beat lacks, if it runs others of them.

    A schedule without any is no mistake by itself: cron may do it.
    """
    ours = {entry["task"] for entry in beat_schedule().values()}
    scheduled = {
        entry.get("task") for entry in (current_app.conf.beat_schedule or {}).values()
    }
    return sorted(ours - scheduled) if ours & scheduled else []
