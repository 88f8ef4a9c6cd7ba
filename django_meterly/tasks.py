"""``meterly_task``, and the Celery tasks that sweep.

``manage.py meterly_settle`` sweeps without Celery.
"""

from __future__ import annotations

import datetime as dt
import inspect
import logging
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Generator
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict, Unpack

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
from .options import shows
from .policies import TaskKeywords, TaskOptions, ViewKeywords

if TYPE_CHECKING:
    from collections.abc import Callable

    from .guards import Guard
    from .jobs import Job

logger = logging.getLogger(__name__)

# Settings modules import beat_schedule(), so this module must not import the models.

#: How many runs may wait in a busy queue; older ones expire. Not 1: in a queue that
#: lags behind by a whole interval, nothing would ever run.
MOST_WAITING = 20

#: Seconds between two runs, by default.
RELEASE_EVERY, SETTLE_EVERY = 60.0, 15.0

#: How much an unknown name must resemble an option of this package to be a typo.
_TYPO = 0.85
_EXAMPLE = '@meterly_task("gpu_seconds", 100, customer=lambda job_id: ...)'

#: The guarded job at work in this thread, the innermost if they are nested.
_current: ContextVar[Job | None] = ContextVar("meterly_job", default=None)


class _CeleryKeywords(TypedDict, total=False):
    """The options of Celery's ``shared_task``, for type checkers and editors.

    ``meterly_task`` passes all others on, too: a *base* class may have its own.
    """

    name: str
    base: type[Task[..., Any]]
    bind: bool
    throws: tuple[type[BaseException], ...]
    acks_late: bool
    acks_on_failure: bool
    acks_on_failure_or_timeout: bool
    acks_on_timeout: bool
    after_return: Callable[..., Any]
    autoretry_for: tuple[type[BaseException], ...]
    backend: Any
    compression: str | None
    default_retry_delay: float
    dont_autoretry_for: tuple[type[BaseException], ...]
    exchange: str
    expires: float | dt.datetime | None
    ignore_result: bool
    lazy: bool
    max_retries: int | None
    on_failure: Callable[..., Any]
    on_success: Callable[..., Any]
    priority: int | None
    pydantic: bool
    pydantic_context: dict[str, Any] | None
    pydantic_dump_kwargs: dict[str, Any] | None
    pydantic_strict: bool
    queue: str
    rate_limit: str | int | float | None
    reject_on_worker_lost: bool
    resultrepr_maxsize: int
    retry_backoff: bool | float
    retry_backoff_max: float
    retry_jitter: bool
    retry_kwargs: dict[str, Any]
    routing_key: str
    send_events: bool
    serializer: str
    shared: bool
    soft_time_limit: float | None
    store_errors_even_if_ignored: bool
    time_limit: float | None
    track_started: bool
    trail: bool
    typing: bool


class _Keywords(TaskKeywords, _CeleryKeywords, total=False):
    """The keywords of ``meterly_task``."""


@shows(_EXAMPLE, _Keywords, others=True)
def meterly_task(
    unit: str | None = None,
    amount: int | Callable[..., Any] = 1,
    **options: Unpack[_Keywords],
) -> Callable[[Callable[..., Any]], Any]:
    """Guard a Celery task: reserve credits, run it, then commit or release.

    ::

        @meterly_task("gpu_seconds", 100, customer=owner_of, bind=True)
        def render_video(self, job_id):
            ...
            self.meterly.charge(used)

    ``Policies``, ``WorkOptions`` and ``TaskOptions`` in ``django_meterly.policies``
    explain the options. A task without *customer* can only be handed off
    (``request.meterly.hand_off``), and then runs under the reservation of the view.
    All other options go to Celery's ``shared_task``. An option of a view, and a name
    that looks like a misspelled option of this package, are a ``TypeError``.

    While the task runs, its ``meterly`` is the ``Guard``: ``self.meterly`` with *bind*,
    else ``celery.current_task.meterly``. One task id is charged once, however often its
    message is delivered.

    Raises ``ValueError`` and ``TypeError`` for invalid options when the task is
    defined. The task raises what ``guard()`` raises.
    """
    celerys: dict[str, Any] = dict(options)
    ours = {
        name: celerys.pop(name)
        for name in TaskKeywords.__annotations__
        if name in options
    }
    checked = TaskOptions(unit=unit, amount=amount, **ours)
    _refuse_unknown(celerys)
    bind: bool = celerys.pop("bind", False)

    def decorate(function: Callable[..., Any]) -> Any:
        if any(is_kind(function) for is_kind in _KINDS_NEVER_RUN):
            raise _never_run(function.__qualname__)
        checked.fit(function, bind=bind)
        run = _guarded(function, checked, bind=bind)
        return shared_task(**{"bind": True, **_attributes(checked, celerys)})(run)

    return decorate


def _guarded(
    function: Callable[..., Any], options: TaskOptions, *, bind: bool
) -> Callable[..., Any]:
    """Return the ``run()`` of a task that runs *function* under its guard."""

    @wraps(function)
    def run(task: Any, *args: Any, **kwargs: Any) -> Any:
        job = _job_of(task)
        if job is None:
            # Called by its run(), as unit tests do.
            return task(*args, **kwargs)
        if job.lifecycle is None:
            _begin(task, job, options, args, kwargs)
        result = function(task, *args, **kwargs) if bind else function(*args, **kwargs)
        if isinstance(result, Awaitable | Generator | AsyncGenerator):
            if isinstance(result, Coroutine | Generator):
                result.close()
            raise _never_run(task.name)
        return result

    # By this signature Celery checks a task's arguments when it is sent.
    signature = inspect.signature(function)
    if not bind:
        first = inspect.Parameter("task", inspect.Parameter.POSITIONAL_ONLY)
        parameters = [first, *signature.parameters.values()]
        signature = signature.replace(parameters=parameters)
    run.__signature__ = signature  # type: ignore[attr-defined]
    return run


def _attributes(checked: TaskOptions, celerys: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a guarded task: those of its guard, and *celerys*."""
    return {
        "__call__": _call,
        "retry": _retry,
        "meterly": property(_guard_of),
        "meterly_guarded": True,
        "meterly_options": checked,
        **celerys,
        # A refusal for too few credits is expected, so it needs no traceback.
        "throws": (
            MeterlyInsufficientCreditsError,
            MeterlyUnavailableError,
            *celerys.get("throws", ()),
        ),
    }


#: Celery calls these functions, but does not run what they return.
_KINDS_NEVER_RUN = (
    iscoroutinefunction,
    inspect.isgeneratorfunction,
    inspect.isasyncgenfunction,
)


def _never_run(name: str) -> TypeError:
    return TypeError(
        f"The task {name} is async, or a generator. Celery does not run what that "
        "returns, and its work would be charged before it is done. Write a plain "
        "function; in it, async_to_sync() runs async code."
    )


def _refuse_unknown(options: dict[str, Any]) -> None:
    """Raise ``TypeError`` for a name that only a view's guard has, and for a typo.

    Celery takes any name, and sets it as an attribute of the task.
    """
    views = ViewKeywords.__annotations__
    ours = ["unit", "amount", *TaskKeywords.__annotations__, "throws"]
    for name in options:
        if name in views:
            raise TypeError(f"{name} is an option of a view's guard, not of a task's.")
        known = hasattr(options.get("base") or Task, name)
        if not known and suggestion(name, [*views, *ours], _TYPO):
            raise TypeError(f"There is no option {name!r}.")


def _job_of(task: Any) -> Job | None:
    """Return the innermost job of *task* that is at work in this thread."""
    job = _current.get()
    while job is not None and job.name != task.name:
        job = job.outer
    return job


def _guard_of(task: Any) -> Guard:
    job = _job_of(task)
    from .guards import Guard

    if job is None or job.lifecycle is None:
        raise MeterlyUsageError(f"{task.name} is not at work: it has no guard now.")
    return Guard(job.lifecycle)


def _call(task: Any, *args: Any, **kwargs: Any) -> Any:
    """Run *task*, and settle when everything that Celery wraps around it is done.

    Workers, ``apply`` and plain calls come here. Only here it is known whether an
    exception is a retry.
    """
    from .handoffs import header_of
    from .jobs import Job

    request, outer = task.request, _job_of(task)
    direct = request.called_directly or (
        # A task may call itself as a function: that is not a second delivery.
        outer is not None and outer.request_id == request.id
    )
    task_id = request.id
    if request.replaced_task_nesting:
        # A task that replaces this one has its id, and may have its name.
        task_id = f"{task_id}:{request.replaced_task_nesting}"
    job = Job(
        task.name,
        None if direct else task_id,
        request_id=request.id,
        header=None if direct else header_of(request),
        outer=_current.get(),
    )
    if not direct:
        # Celery copies the request of a task that defines __call__. Reading children
        # creates that list here, so that both requests share it.
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
    """End a copy of *task* whose work another copy has claimed; drop its outcome."""
    logger.warning(
        "%s[%s] was claimed by another copy meanwhile: this one settles nothing, and "
        "its result is dropped.",
        task.name,
        task.request.id,
        exc_info=exc,
    )
    # With Redis, a message that is delivered again has the delivery tag of the first.
    # If this copy acknowledges or rejects its message, the other copy's is removed, and
    # if that one dies, nobody does the work. A retry's message looks again, too.
    if not isinstance(exc, Retry):
        _look_again(task)
    raise Ignore("Another copy of this task has claimed it.") from exc


def _look_again(task: Any) -> None:
    """Send the task once more, in case the copy that is at work dies."""
    request = task.request
    if task.meterly_options.on_duplicate == "retry" and not request.is_eager:
        # Not by retry(), which counts as a failure.
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
        # Celery itself logs only "ignored".
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

    The credits first: once its message is sent, the retry may start elsewhere.
    """
    job = _job_of(task)
    if job is not None and job.task_id is not None:
        if task.meterly_options.on_retry == "keep":
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


# The tasks that beat runs set "expires" themselves, because django-celery-beat drops it
# from a schedule's entry. The runs that pile up in a dead queue are useless.
@shared_task(
    name="django_meterly.tasks.release_stale_reservations",
    ignore_result=True,
    expires=MOST_WAITING * RELEASE_EVERY,
)
def release_stale_reservations(seconds: float = 60.0) -> None:
    """Release the reservations whose lease has lapsed.

    Then delete the rows that were settled ``JOURNAL_RETENTION`` ago. Each step takes
    at most *seconds*, so that a long backlog cannot occupy every worker.
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

    Commits and releases take at most *seconds*.
    """
    from . import grants, journal
    from .client import get_client

    client = get_client()
    journal.settle_due(client, seconds=seconds)
    grants.settle_due(client)


@shared_task(name="django_meterly.tasks.release_handed_off", ignore_result=True)
def release_handed_off(header: Any, name: str, task_id: str) -> None:
    """Release what *header* hands off to the task *name*[*task_id*].

    The task will not run. If it has claimed the hold all the same, nothing happens.
    """
    from . import handoffs, journal
    from .client import get_client

    reservation_id = handoffs.read(header, name, task_id)
    if reservation_id not in handoffs.NO_HOLD:
        journal.withdraw(get_client(), reservation_id)


@task_revoked.connect
def _release_revoked(sender: Any = None, request: Any = None, **kwargs: Any) -> None:
    """Let a worker release the credits of a hand-off that was revoked or expired."""
    from .handoffs import header_of

    header = header_of(request)
    if header is not None and getattr(sender, "meterly_guarded", False):
        # This runs in the worker's main process, which must not wait for a database.
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
        if task.meterly_options.on_duplicate == "ignore" and task.acks_late
    ]


@register("meterly", deploy=True)
def check_secret_key(**kwargs: Any) -> list[CheckMessage]:
    """Warn when hand-offs are signed with a key that others may know."""
    try:
        keys = [settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS]
    except ImproperlyConfigured:
        return []  # Django reports it.
    if not guarded_tasks() or not any(
        str(key).startswith(SECRET_KEY_INSECURE_PREFIX) for key in keys
    ):
        return []
    return [
        CheckWarning(
            "Hand-offs to tasks are signed with a SECRET_KEY that startproject has "
            "written. Somebody who knows it and can write to your broker can run "
            "tasks for free.",
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

    For example, ``CELERY_BEAT_SCHEDULE = beat_schedule()`` in the settings module. With
    *ledger* also those of the embedded ledger, which expire its holds and seal its
    entries.

    Several beats and several workers may run at once, because every row is claimed. A
    run ends after its interval, so that a backlog occupies at most two workers.
    """
    # By name: a task object would load the Celery app, which would load the settings,
    # which are calling this function.
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
    """Return which of the sweeping tasks are missing from the project's beat.

    A schedule without any of them is fine: cron may sweep instead.
    """
    ledger = apps.is_installed("django_meterly.ledger")
    ours = {entry["task"] for entry in beat_schedule(ledger=ledger).values()}
    scheduled = {
        entry.get("task") for entry in (current_app.conf.beat_schedule or {}).values()
    }
    return sorted(ours - scheduled) if ours & scheduled else []
