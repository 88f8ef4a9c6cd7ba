"""``meterly_task``, and the Celery tasks that settle what crashes left behind.

``manage.py meterly_settle`` does the latter without Celery.
"""

from __future__ import annotations

import datetime as dt
import inspect
import logging
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Generator
from contextvars import ContextVar
from dataclasses import fields
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn

from asgiref.sync import iscoroutinefunction
from celery import Task, current_app, shared_task
from celery.exceptions import Ignore, Retry
from celery.signals import task_revoked
from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, register
from django.core.checks import Warning as CheckWarning
from django.core.checks.security.base import SECRET_KEY_INSECURE_PREFIX
from django.core.exceptions import ImproperlyConfigured

from .conf import meterly_settings, suggestion
from .errors import (
    MeterlyDuplicateError,
    MeterlyInsufficientCreditsError,
    MeterlyUnavailableError,
    MeterlyUsageError,
)
from .options import GuardOptions, shows

if TYPE_CHECKING:
    from collections.abc import Callable

    from .guards import Guard
    from .jobs import Job

logger = logging.getLogger(__name__)

# Settings modules import beat_schedule(): the models are not to be had yet.

#: Runs that may wait in a busy queue; what waits for longer expires. Not 1: in a
#: queue that lags behind by a whole interval, nothing would ever run.
MOST_WAITING = 20

#: Seconds between two runs, by default.
RELEASE_EVERY, SETTLE_EVERY = 60.0, 15.0

#: How alike an option of ours and one that is unknown have to be to be called a typo.
_TYPO = 0.85
_EXAMPLE = '@meterly_task("gpu_seconds", 100, customer=lambda job_id: ...)'

#: The guarded job at work in this thread, the innermost if they are nested.
_current: ContextVar[Job | None] = ContextVar("meterly_job", default=None)


@shows(_EXAMPLE)
def meterly_task(
    unit: str | None = None,
    amount: int | Callable[..., Any] = 1,
    *,
    customer: Callable[..., Any] | None = None,
    reference: str | Callable[..., Any] | None = None,
    overage: str | None = None,
    on_unavailable: str | None = None,
    enforcement: str | None = None,
    ttl_seconds: int | None = None,
    on_retry: str = "keep",
    on_duplicate: str = "retry",
    bind: bool = False,
    throws: tuple[type[Exception], ...] = (),
    **options: Any,
) -> Callable[[Callable[..., Any]], Any]:
    """Guard a Celery task: reserve credits, run it, then commit or release.

    ::

        @meterly_task("gpu_seconds", 100, customer=owner_of, bind=True)
        def render_video(self, job_id):
            ...
            self.meterly.charge(used)

    *unit*, *amount*, *overage*, *on_unavailable* and *enforcement* are those of
    ``meterly_guard``. *customer*,
    *amount* and *reference* may be functions; they get the task's arguments. A task
    without *customer* can only be handed off (``request.meterly.hand_off``), and then
    runs under the reservation of the view. *ttl_seconds* is how long credits are held
    when nobody is heard of; while the task runs, its heartbeat extends the hold.
    Everything else goes to ``shared_task``, except names that only a guard of a view
    has, and those that are nearly an option of this one: they are a ``TypeError``.

    While the task runs, its ``meterly`` is the ``Guard``: ``self.meterly`` with *bind*,
    else ``celery.current_task.meterly``.

    One task id is charged once, however often its message is delivered. *on_retry*
    says what ``retry()`` and ``autoretry_for`` do with the credits: ``"keep"`` them
    for the retry, or ``"release"`` them. *on_duplicate* says what a copy does that
    comes while the task is at work elsewhere: ``"retry"`` looks again after
    ``LEASE_GRACE``, in case that worker dies; ``"ignore"`` ends it.

    Raises ``ValueError`` and ``TypeError`` for options out of bounds when the task is
    defined. The task raises what ``guard()`` raises.
    """
    checked = GuardOptions(
        unit=unit,
        amount=amount,
        customer=customer,
        reference=reference,
        overage=overage,
        on_unavailable=on_unavailable,
        enforcement=enforcement,
        ttl_seconds=ttl_seconds,
    )
    for name, value, choices in (
        ("on_retry", on_retry, ("keep", "release")),
        ("on_duplicate", on_duplicate, ("retry", "ignore")),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, not {value!r}.")
    _refuse_unknown(options)

    def decorate(function: Callable[..., Any]) -> Any:
        if iscoroutinefunction(function) or any(
            is_kind(function)
            for is_kind in (inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        ):
            raise _never_run(function.__qualname__)
        checked.fit_task(function, bind=bind)

        @wraps(function)
        def run(task: Any, *args: Any, **kwargs: Any) -> Any:
            job = _job_of(task)
            if job is None:
                # By its run(), as unit tests do.
                return task(*args, **kwargs)
            if job.guard is None:
                _begin(task, job, checked, args, kwargs)
            result = (
                function(task, *args, **kwargs) if bind else function(*args, **kwargs)
            )
            if isinstance(result, Awaitable | Generator | AsyncGenerator):
                if isinstance(result, Coroutine | Generator):
                    result.close()
                raise _never_run(task.name)
            return result

        # By this Celery checks a task's arguments when it is sent.
        signature = inspect.signature(function)
        if not bind:
            first = inspect.Parameter("task", inspect.Parameter.POSITIONAL_ONLY)
            parameters = [first, *signature.parameters.values()]
            signature = signature.replace(parameters=parameters)
        run.__signature__ = signature  # type: ignore[attr-defined]
        attributes: dict[str, Any] = {
            # Too few credits are no accident, and need no traceback.
            "throws": (
                MeterlyInsufficientCreditsError,
                MeterlyUnavailableError,
                *throws,
            ),
            "__call__": _call,
            "retry": _retry,
            "meterly": property(_guard_of),
            "meterly_guarded": True,
            "meterly_options": checked,
            "meterly_on_retry": on_retry,
            "meterly_on_duplicate": on_duplicate,
        }
        return shared_task(**{"bind": True, **attributes, **options})(run)

    return decorate


def _never_run(name: str) -> TypeError:
    return TypeError(
        f"The task {name} is async, or a generator. Celery does not run what that "
        "returns, and its work would be charged before it is done. Write a plain "
        "function; in it, async_to_sync() runs async code."
    )


def _refuse_unknown(options: dict[str, Any]) -> None:
    """Raise ``TypeError`` for an option that is neither Celery's nor ours, but nearly.

    Celery makes attributes of the task of whatever it is told.
    """
    views = [field.name for field in fields(GuardOptions)]
    ours = [*views, "on_retry", "on_duplicate", "throws"]
    for name in options:
        if name in views:
            raise TypeError(f"{name} is an option of a view's guard, not of a task's.")
        known = hasattr(options.get("base") or Task, name)
        if not known and suggestion(name, ours, _TYPO):
            raise TypeError(f"There is no option {name!r}.")


def _job_of(task: Any) -> Job | None:
    """Return the innermost job of *task* that is at work in this thread."""
    job = _current.get()
    while job is not None and job.name != task.name:
        job = job.outer
    return job


def _guard_of(task: Any) -> Guard:
    job = _job_of(task)
    if job is None or job.guard is None:
        raise MeterlyUsageError(f"{task.name} is not at work: it has no guard now.")
    return job.guard


def _call(task: Any, *args: Any, **kwargs: Any) -> Any:
    """Run *task*, and settle when everything that Celery puts around it is done.

    Workers, ``apply`` and plain calls come here. Only out here it is known whether
    an exception is a retry.
    """
    from .handoffs import header_of
    from .jobs import Job

    request, outer = task.request, _job_of(task)
    direct = request.called_directly or (
        # A task that calls itself as a function is no second delivery.
        outer is not None and outer.request_id == request.id
    )
    task_id = request.id
    if request.replaced_task_nesting:
        # The task that takes a task's place has its id, and may have its name.
        task_id = f"{task_id}:{request.replaced_task_nesting}"
    job = Job(
        task.name,
        None if direct else task_id,
        request_id=request.id,
        header=None if direct else header_of(request),
        outer=_current.get(),
    )
    if not direct:
        # Celery copies the request for a task with a __call__ of its own. The list
        # of what it has started is made here, so that both have the same.
        _ = request.children
    token = _current.set(job)
    try:
        result = super(type(task), task).__call__(*args, **kwargs)
        job.succeed()
    except BaseException as exc:
        if job.kept and isinstance(exc, Retry):
            raise
        job.fail()
        if not (job.superseded and isinstance(exc, Exception)):
            raise
        _drop(task, exc)
    finally:
        _current.reset(token)
    if job.superseded:
        _drop(task)
    return result


def _drop(task: Any, exc: Exception | None = None) -> NoReturn:
    """End a copy whose work another copy has claimed, whatever became of it."""
    logger.warning(
        "%s[%s] was claimed by another copy meanwhile: this one settles nothing, and "
        "its result is dropped.",
        task.name,
        task.request.id,
        exc_info=exc,
    )
    # With Redis a message that came again has the delivery tag of the first: to
    # acknowledge ours, or to reject it, is to remove theirs, and if they die, nobody
    # would do the work. The message of a retry looks again, too.
    if not isinstance(exc, Retry):
        _look_again(task)
    raise Ignore("Another copy of this task has claimed it.") from exc


def _look_again(task: Any) -> None:
    """Send the task once more, in case the copy that is at work dies."""
    request = task.request
    if task.meterly_on_duplicate == "retry" and not request.is_eager:
        # Not by retry(): it is no failure, and counts for nothing.
        task.signature_from_request(
            request,
            countdown=meterly_settings.LEASE_GRACE,
            retries=request.retries,
        ).apply_async()


def _begin(task: Any, job: Job, options: Any, args: Any, kwargs: Any) -> None:
    from . import db

    try:
        with db.serving():
            job.begin(options, args, kwargs)
    except MeterlyDuplicateError as exc:
        # Celery says no more of it than "ignored".
        request = task.request
        logger.info("%s[%s] is left alone: %s", task.name, request.id, exc)
        if exc.in_progress:
            _look_again(task)
        raise Ignore(str(exc)) from exc


def _retry(
    task: Any,
    args: Any = None,
    kwargs: Any = None,
    exc: Any = None,
    throw: bool = True,
    eta: dt.datetime | None = None,
    countdown: float | None = None,
    max_retries: int | None = None,
    **options: Any,
) -> Any:
    """Keep the credits for the retry, or release them, and then retry as Celery does.

    Before the message is sent: the retry may start at once, elsewhere.
    """
    job = _job_of(task)
    if job is not None and job.task_id is not None:
        if task.meterly_on_retry == "keep":
            if eta is not None:
                delay = (eta - dt.datetime.now(eta.tzinfo)).total_seconds()
            else:
                delay = task.default_retry_delay if countdown is None else countdown
            job.keep(max(delay, 0))
        else:
            job.fail()
    return super(type(task), task).retry(
        args=args,
        kwargs=kwargs,
        exc=exc,
        throw=throw,
        eta=eta,
        countdown=countdown,
        max_retries=max_retries,
        **options,
    )


# The tasks that beat runs expire by themselves, because django-celery-beat drops the
# "expires" of a schedule's entry. Nobody needs the runs that a dead queue has gathered.
@shared_task(
    name="django_meterly.tasks.release_stale_reservations",
    ignore_result=True,
    expires=MOST_WAITING * RELEASE_EVERY,
)
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


@shared_task(
    name="django_meterly.tasks.settle_reservations",
    ignore_result=True,
    expires=MOST_WAITING * SETTLE_EVERY,
)
def settle_reservations(seconds: float = 60.0) -> None:
    """Carry out the commits, releases and grants that are due.

    Commits and releases for *seconds* at most.
    """
    from . import grants, journal
    from .client import get_client

    client = get_client()
    journal.settle_due(client, seconds=seconds)
    grants.settle_due(client)


@shared_task(name="django_meterly.tasks.release_handed_off", ignore_result=True)
def release_handed_off(header: Any, name: str, task_id: str) -> None:
    """Release what *header* hands off to the task *name*[*task_id*]: it will not run.

    Unless the task has claimed it.
    """
    from . import handoffs, journal
    from .client import get_client

    reservation_id = handoffs.read(header, name, task_id)
    if reservation_id not in handoffs.NO_HOLD:
        journal.withdraw(get_client(), reservation_id)


@task_revoked.connect
def _release_revoked(sender: Any = None, request: Any = None, **kwargs: Any) -> None:
    """Have the credits released of a hand-off that was revoked, or has expired."""
    from .handoffs import header_of

    header = header_of(request)
    if header is not None and getattr(sender, "meterly_guarded", False):
        # This is the worker's main process, which cannot wait for a database.
        release_handed_off.apply_async((header, sender.name, request.id), retry=False)


@register("meterly")
def check_tasks(**kwargs: Any) -> list[CheckMessage]:
    """Warn about guarded tasks that are lost when their worker is killed."""
    return [
        CheckWarning(
            f"The task {task.name!r} is acknowledged late, and its copies are ignored.",
            hint=(
                "The message of a killed task is delivered again while the dead one's "
                "lease is still good. Set on_duplicate to 'retry', or acks_late to "
                "False."
            ),
            id="meterly.W006",
        )
        for task in guarded_tasks()
        if task.meterly_on_duplicate == "ignore" and task.acks_late
    ]


@register("meterly", deploy=True)
def check_secret_key(**kwargs: Any) -> list[CheckMessage]:
    """Warn when hand-offs are signed with a key that others may know."""
    try:
        keys = [settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS]
    except ImproperlyConfigured:
        return []  # Django says so.
    if not guarded_tasks() or not any(
        str(key).startswith(SECRET_KEY_INSECURE_PREFIX) for key in keys
    ):
        return []
    return [
        CheckWarning(
            "Hand-offs to tasks are signed with a SECRET_KEY that startproject has "
            "written: whoever knows it and your broker can run tasks for nothing.",
            hint=(
                "Set a long random SECRET_KEY, the same for web and workers. When you "
                "change it, keep the old one in SECRET_KEY_FALLBACKS of both until the "
                "queues are empty."
            ),
            id="meterly.W009",
        )
    ]


def guarded_tasks() -> list[Any]:
    """Return every ``meterly_task`` of the current app."""
    return [
        task
        for task in current_app.tasks.values()
        if getattr(task, "meterly_guarded", False)
    ]


def beat_schedule(
    *,
    release_every: float = RELEASE_EVERY,
    settle_every: float = SETTLE_EVERY,
    ledger: bool = False,
    expire_every: float = 60.0,
    seal_every: float = 300.0,
) -> dict[str, dict[str, Any]]:
    """Return the entries for ``CELERY_BEAT_SCHEDULE``; intervals in seconds.

    With *ledger* also those of the embedded ledger, which expire its holds and seal
    its entries.

    For the settings module. Several beats and several workers at once do no
    harm: every row is claimed. A run ends after its interval, so that a backlog
    keeps two workers busy, and no more.
    """
    # By name, because a task object would load the Celery app, and that the
    # settings, in the middle of which we are.
    ours: dict[str, dict[str, Any]] = {
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
    if ledger:
        for name, task, every in (
            ("meterly-ledger-expire-holds", "expire_holds", expire_every),
            ("meterly-ledger-seal-entries", "seal_entries", seal_every),
        ):
            ours[name] = {
                "task": f"django_meterly.ledger.tasks.{task}",
                "schedule": every,
                "options": {"expires": MOST_WAITING * every},
            }
    return ours


def missing_from_beat() -> list[str]:
    """Return which of our tasks the project's beat lacks, if it runs others of them.

    A schedule without any is no mistake by itself: cron may do it.
    """
    ledger = apps.is_installed("django_meterly.ledger")
    ours = {entry["task"] for entry in beat_schedule(ledger=ledger).values()}
    scheduled = {
        entry.get("task") for entry in (current_app.conf.beat_schedule or {}).values()
    }
    return sorted(ours - scheduled) if ours & scheduled else []
