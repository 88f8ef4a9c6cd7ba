"""Does a sweeper run, and does it do everything?"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from django.core.checks import CheckMessage, Tags, register
from django.core.checks import Warning as CheckWarning
from django.core.exceptions import ImproperlyConfigured
from django.db import Error as AnyDatabaseError
from django.db import connections

from .. import journal
from ..models import Reservation

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Seconds a row may be overdue before it is worth a warning.
OVERDUE = 3600


@register("meterly", Tags.database)
def check_sweeping(
    databases: Sequence[str] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """Warn about rows that a sweeper would have settled long ago."""
    using = journal.alias()
    if using not in (databases or ()):
        return []
    connection = connections[using]
    try:
        with connection.cursor() as cursor:
            tables = connection.introspection.table_names(cursor)
        if Reservation._meta.db_table not in tables:
            return []
        overdue = journal.backlog(OVERDUE)
    except (ImproperlyConfigured, AnyDatabaseError):
        # Other checks report an unreachable database and missing migrations.
        return []
    if overdue.oldest_due_seconds is None:
        return []
    return [
        CheckWarning(
            f"Nothing seems to sweep: {overdue.lapsed + overdue.due} reservations in "
            f"the database {using!r} have been overdue for more than an hour, the "
            f"oldest for {overdue.oldest_due_seconds / 3600:.1f} hours.",
            hint=(
                "Run manage.py meterly_settle from cron, or Celery beat with "
                "django_meterly.tasks.beat_schedule(). If one of them runs, the "
                "ledger is out of reach: see its log."
            ),
            id="meterly.W007",
        )
    ]


@register("meterly")
def check_beat(**kwargs: Any) -> list[CheckMessage]:
    """Warn when Celery beat runs some of our tasks, and not all of them."""
    if "celery" not in sys.modules:
        return []
    from ..tasks import missing_from_beat

    return [
        CheckWarning(
            f"Celery's beat_schedule lacks the task {name!r}.",
            hint=(
                "Take all of django_meterly.tasks.beat_schedule(), with ledger=True if "
                "the embedded ledger is installed. Each of them is needed."
            ),
            id="meterly.W008",
        )
        for name in missing_from_beat()
    ]
