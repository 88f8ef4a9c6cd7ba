"""Answer a refused request: a page for browsers, problem+json for APIs.

``problem`` puts each exception into words, for ``render`` here and for
``rest_framework.exceptions``. ``admission`` and the middleware call ``render``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from django.conf import settings
from django.http import HttpResponse, HttpResponseRedirect, JsonResponse, QueryDict
from django.shortcuts import resolve_url
from django.template import Engine, RequestContext, TemplateDoesNotExist, engines
from django.template.backends.django import DjangoTemplates
from django.template.loader import get_template
from django.urls import get_script_prefix
from django.utils.cache import patch_vary_headers
from django.utils.http import url_has_allowed_host_and_scheme
from django.utils.translation import gettext as _

from .. import units
from ..conf import meterly_settings
from ..errors import (
    MeterlyDebtError,
    MeterlyDuplicateError,
    MeterlyIdempotencyMismatchError,
    MeterlyInsufficientCreditsError,
    MeterlyInvalidKeyError,
    MeterlyUnavailableError,
)
from ..resolvers import request_user
from ..wire import MAX_CALLER_KEY_LENGTH

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

#: ``Cache-Control`` of refusals and balances. Django's cache obeys "private" only.
UNSHARED = "private, no-store"
_TEMPLATES = Path(__file__).parent.parent / "templates"
_FILES = "django.template.loaders.filesystem.Loader"
_SHARING = re.compile(r"\b(?:public|private|no-store|s-maxage)\b", re.I)


class Problem(NamedTuple):
    """The answer to a refused request, in words and facts, before it has a format."""

    status: int
    code: str
    title: str
    detail: str
    #: Other members of the answer. For example ``{"required": 25, "available": 3}``.
    extra: dict[str, Any] = {}
    #: Seconds for ``Retry-After``.
    retry_after: int | None = None


def problem(exc: Exception) -> Problem:
    """Return what to say about one of the ``RENDERED`` exceptions.

    For example, ``MeterlyDuplicateError`` is a 409 with ``state`` and ``reference``.
    Raises ``TypeError`` for any other exception.
    """
    for cls, describe in _PROBLEMS.items():
        if isinstance(exc, cls):
            return describe(exc)
    raise TypeError(f"The guard does not raise {exc!r} as a refusal.")


def _insufficient_credits(exc: MeterlyInsufficientCreditsError) -> Problem:
    if exc.held_by_running_work:
        title = _("Your credits are in use")
        detail = _(
            "Your running work holds the credits this needs. Try again when it is done."
        )
    else:
        title = _("Not enough credits")
        detail = _(
            "This needs %(required)d %(unit)s, and %(available)d are available."
        ) % {
            "required": exc.required,
            "unit": units.name_of(exc.unit),
            "available": exc.available,
        }
    return Problem(402, "insufficient_credits", title, detail, _amounts(exc))


def _debt(exc: MeterlyDebtError) -> Problem:
    return Problem(
        402,
        "debt",
        _("Earlier work is not paid for yet"),
        _(
            "You owe %(owed)d %(unit)s for earlier work, and %(available)d are "
            "available. New credits pay for that first."
        )
        % {
            "owed": exc.owed,
            "unit": units.name_of(exc.unit),
            "available": exc.available,
        },
        {"owed": exc.owed, **_amounts(exc)},
    )


def _amounts(exc: MeterlyInsufficientCreditsError) -> dict[str, Any]:
    return {
        "required": exc.required,
        "available": exc.available,
        "reserved": exc.reserved,
        "unit": exc.unit,
        "top_up_url": meterly_settings.TOP_UP_URL,
        "held_by_running_work": exc.held_by_running_work,
    }


def _unavailable(exc: MeterlyUnavailableError) -> Problem:
    return Problem(
        503,
        "unavailable",
        _("Credits cannot be checked right now"),
        _("Nothing was charged. Please try again in a moment."),
        retry_after=exc.retry_after,
    )


def _invalid_key(exc: MeterlyInvalidKeyError) -> Problem:
    return Problem(
        400,
        "invalid_idempotency_key",
        _("This idempotency key cannot be used"),
        _(
            "It must be 1 to %(length)d visible ASCII characters, without spaces. "
            "Nothing was charged."
        )
        % {"length": MAX_CALLER_KEY_LENGTH},
    )


def _mismatch(exc: MeterlyIdempotencyMismatchError) -> Problem:
    return Problem(
        422,
        "idempotency_mismatch",
        _("This is not the request that was sent before"),
        _(
            "Its idempotency key belongs to another request, or to one at another "
            "price. Nothing was charged. Reload the form, or send a new key."
        ),
    )


def _duplicate(exc: MeterlyDuplicateError) -> Problem:
    if exc.in_progress:
        detail = _(
            "The same request is being worked on right now. Nothing is charged twice."
        )
    else:
        detail = _(
            "The same request was carried out before. It was not run again, and its "
            "answer is not kept. To do it once more, reload the form, or send a new "
            "key."
        )
    return Problem(
        409,
        "duplicate",
        _("This was asked for already"),
        detail,
        {"state": exc.state, "reference": exc.reference},
        retry_after=5 if exc.in_progress else None,
    )


_PROBLEMS: dict[type[Exception], Callable[[Any], Problem]] = {
    # A debt is also a lack of credits, so it comes first.
    MeterlyDebtError: _debt,
    MeterlyInsufficientCreditsError: _insufficient_credits,
    MeterlyUnavailableError: _unavailable,
    MeterlyDuplicateError: _duplicate,
    MeterlyInvalidKeyError: _invalid_key,
    MeterlyIdempotencyMismatchError: _mismatch,
}
#: The exceptions that the guard raises and an edge renders.
RENDERED = tuple(_PROBLEMS)


def render(request: HttpRequest, exc: Exception) -> HttpResponse:
    """Return the response for one of the ``RENDERED`` exceptions.

    A browser gets a page, ``meterly/402.html`` for example, which a project may
    override. Other clients get ``application/problem+json`` (RFC 9457).
    """
    return _respond(request, problem(exc))


def nobody_pays(request: HttpRequest) -> HttpResponse:
    """Return the response to a request for which no customer is known.

    A logged-in user gets 403, because another log-in would not help. Otherwise a
    browser is sent to the project's log-in page, and other clients get 401.
    """
    if request_user(request) is not None:
        return _respond(request, no_customer())
    if wants_html(request):
        return _redirect_to_login(request)
    return _respond(
        request,
        Problem(
            401,
            "unauthenticated",
            _("Log in first"),
            _("This costs credits, and nobody is known to pay for it."),
        ),
    )


def no_customer() -> Problem:
    """Return the problem of a logged-in user who has no customer."""
    return Problem(
        403,
        "no_customer",
        _("Nobody pays for your account"),
        _(
            "This costs credits, and your account does not belong to anybody who pays. "
            "Ask the people who run this site."
        ),
    )


def wants_html(request: HttpRequest) -> bool:
    """Return whether the client names HTML; ``*/*`` does not count."""
    preferred = request.get_preferred_type(
        ["application/problem+json", "application/json", "text/html"]
    )
    return preferred == "text/html"


def _respond(request: HttpRequest, problem: Problem) -> HttpResponse:
    facts = {
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
        "code": problem.code,
        **problem.extra,
    }
    response: HttpResponse
    if wants_html(request):
        context = {**facts, "back_url": _back_url(request)}
        page = _page(f"meterly/{problem.status}.html", context, request)
        response = HttpResponse(page, status=problem.status)
    else:
        response = JsonResponse(
            {"type": "about:blank", **facts},
            status=problem.status,
            content_type="application/problem+json",
        )
    if problem.retry_after is not None:
        response["Retry-After"] = str(problem.retry_after)
    response["Cache-Control"] = UNSHARED
    patch_vary_headers(response, ["Accept"])
    return response


def _page(name: str, context: dict[str, Any], request: HttpRequest) -> str:
    try:
        template = get_template(name)
    except TemplateDoesNotExist:
        # The project has no engine, or none that looks into the folders of apps.
        own = _engine().get_template(name)
        return str(own.render(RequestContext(request, context)))
    return template.render(context, request)


def _engine() -> Engine:
    """Return an engine that finds the project's templates, and after them ours."""
    for backend in engines.all():
        if isinstance(backend, DjangoTemplates):
            theirs = backend.engine
            return Engine(
                dirs=theirs.dirs,
                # The project's: ours may extend them, or they ours.
                loaders=[*theirs.loaders, (_FILES, [str(_TEMPLATES)])],
                context_processors=theirs.context_processors,
                libraries=theirs.libraries,
                builtins=theirs.builtins,
            )
    return Engine(
        dirs=[str(_TEMPLATES)],
        libraries={
            "i18n": "django.templatetags.i18n",
            "meterly": "django_meterly.templatetags.meterly",
        },
    )


def _redirect_to_login(request: HttpRequest) -> HttpResponse:
    # Django's redirect_to_login() can only be imported if its auth app is installed.
    url = urlsplit(resolve_url(settings.LOGIN_URL))
    query = QueryDict(url.query, mutable=True)
    query["next"] = request.get_full_path()
    return HttpResponseRedirect(url._replace(query=query.urlencode("/")).geturl())


def keep_private(response: HttpResponseBase) -> None:
    """Let only the caller's cache keep *response*, unless it says otherwise.

    A shared cache would give everybody the work that one customer has paid for. These
    words in ``Cache-Control`` say otherwise: ``public``, ``private``, ``no-store``,
    ``s-maxage``. ``max-age`` alone does not.
    """
    said = response.get("Cache-Control", "")
    if not _SHARING.search(said):
        response["Cache-Control"] = f"{said}, private" if said else "private"


def _back_url(request: HttpRequest) -> str:
    """Return the page of this site that the client came from, or the front page."""
    referer = request.headers.get("Referer")
    if url_has_allowed_host_and_scheme(
        referer, {request.get_host()}, require_https=request.is_secure()
    ):
        return str(referer)
    return get_script_prefix()
