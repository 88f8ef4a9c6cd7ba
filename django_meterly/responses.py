"""What a refused request is answered: a page for browsers, problem+json for APIs."""

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

from . import units
from .conf import meterly_settings
from .errors import (
    MeterlyDebtError,
    MeterlyDuplicateError,
    MeterlyIdempotencyMismatchError,
    MeterlyInsufficientCreditsError,
    MeterlyInvalidKeyError,
    MeterlyUnavailableError,
)
from .resolvers import request_user
from .wire import MAX_CALLER_KEY_LENGTH

if TYPE_CHECKING:
    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

#: What the guard raises and an edge renders.
RENDERED = (
    MeterlyInsufficientCreditsError,
    MeterlyUnavailableError,
    MeterlyDuplicateError,
    MeterlyInvalidKeyError,
    MeterlyIdempotencyMismatchError,
)


#: ``Cache-Control`` of refusals and balances. Django's own cache heeds "private" only.
UNSHARED = "private, no-store"
_TEMPLATES = Path(__file__).parent / "templates"
_FILES = "django.template.loaders.filesystem.Loader"
_SHARING = re.compile(r"\b(?:public|private|no-store|s-maxage)\b", re.I)


class Problem(NamedTuple):
    """What somebody whose request is refused is told, in whichever format."""

    status: int
    code: str
    title: str
    detail: str
    #: What else belongs to it, by its name in the answer.
    extra: dict[str, Any] = {}
    #: Seconds for ``Retry-After``.
    retry_after: int | None = None


def problem(exc: Exception) -> Problem:
    """Return what to say about one of the ``RENDERED`` exceptions.

    402 with ``required, available, reserved, unit, top_up_url`` (and ``owed`` for a
    customer with debts), 503 with
    ``Retry-After``, 409 with ``state`` and ``reference``, 422 for a key that was
    used for something else, or 400 for one that cannot be one. Raises
    ``TypeError`` for any other exception.
    """
    if isinstance(exc, MeterlyInsufficientCreditsError):
        code = "insufficient_credits"
        unit_name = units.name_of(exc.unit)
        extra: dict[str, Any] = {}
        if isinstance(exc, MeterlyDebtError):
            code = "debt"
            extra["owed"] = exc.owed
            title = _("Earlier work is not paid for yet")
            detail = _(
                "You owe %(owed)d %(unit)s for earlier work, and %(available)d are "
                "available. New credits pay for that first."
            ) % {"owed": exc.owed, "unit": unit_name, "available": exc.available}
        elif exc.held_by_running_work:
            title = _("Your credits are in use")
            detail = _(
                "Your running work holds the credits this needs. "
                "Try again when it is done."
            )
        else:
            title = _("Not enough credits")
            detail = _(
                "This needs %(required)d %(unit)s, and %(available)d are available."
            ) % {
                "required": exc.required,
                "unit": unit_name,
                "available": exc.available,
            }
        extra |= {
            "required": exc.required,
            "available": exc.available,
            "reserved": exc.reserved,
            "unit": exc.unit,
            "top_up_url": meterly_settings.TOP_UP_URL,
            "held_by_running_work": exc.held_by_running_work,
        }
        return Problem(402, code, title, detail, extra)
    if isinstance(exc, MeterlyUnavailableError):
        return Problem(
            503,
            "unavailable",
            _("Credits cannot be checked right now"),
            _("Nothing was charged. Please try again in a moment."),
            retry_after=exc.retry_after,
        )
    if isinstance(exc, MeterlyInvalidKeyError):
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
    if isinstance(exc, MeterlyIdempotencyMismatchError):
        return Problem(
            422,
            "idempotency_mismatch",
            _("This is not the request that was sent before"),
            _(
                "Its idempotency key belongs to another request, or to one at another "
                "price. Nothing was charged. Reload the form, or send a new key."
            ),
        )
    if isinstance(exc, MeterlyDuplicateError):
        return Problem(
            409,
            "duplicate",
            _("This was asked for already"),
            _(
                "The same request is being worked on right now. "
                "Nothing is charged twice."
            )
            if exc.in_progress
            else _(
                "The same request was carried out before. It was not run again, and "
                "its answer is not kept. To do it once more, reload the form, or send "
                "a new key."
            ),
            {"state": exc.state, "reference": exc.reference},
            retry_after=5 if exc.in_progress else None,
        )
    raise TypeError(f"The guard does not raise {exc!r} as a refusal.")


def render(request: HttpRequest, exc: Exception) -> HttpResponse:
    """Return the response for one of the ``RENDERED`` exceptions.

    Browsers get ``meterly/402.html`` and its kin, which a project may override;
    everybody else ``application/problem+json`` (RFC 9457).
    """
    return _respond(request, problem(exc))


def nobody_pays(request: HttpRequest) -> HttpResponse:
    """Return what somebody gets for whom no customer is known.

    Who is logged in gets 403: another log-in would not help. Else a browser is sent to
    the project's log-in page, and everybody else gets 401.
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
    """Return what to say to a user who is logged in, and for whom nobody pays."""
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
    """Return whether the client asks for HTML, and not only accepts anything."""
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
        # The project's engines look into no app's folder, or there are none.
        own = _engine().get_template(name)
        return str(own.render(RequestContext(request, context)))
    return template.render(context, request)


def _engine() -> Engine:
    """Return an engine that finds the project's templates first, and then ours."""
    for backend in engines.all():
        if isinstance(backend, DjangoTemplates):
            theirs = backend.engine
            return Engine(
                dirs=theirs.dirs,
                # For pages of theirs that ours extend, or that extend ours.
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
    # Django's own function cannot be imported where its auth app is not installed.
    url = urlsplit(resolve_url(settings.LOGIN_URL))
    query = QueryDict(url.query, mutable=True)
    query["next"] = request.get_full_path()
    return HttpResponseRedirect(url._replace(query=query.urlencode("/")).geturl())


def keep_private(response: HttpResponseBase) -> None:
    """Let only the caller's own cache keep *response*, unless it says otherwise.

    A shared cache would give to everybody what one customer has paid for. A response
    says otherwise by ``public``, ``private``, ``no-store`` or ``s-maxage``; by
    ``max-age`` alone it does not.
    """
    said = response.get("Cache-Control", "")
    if not _SHARING.search(said):
        response["Cache-Control"] = f"{said}, private" if said else "private"


def _back_url(request: HttpRequest) -> str:
    """Return where the client came from, if that is here, or the front page."""
    referer = request.headers.get("Referer")
    if url_has_allowed_host_and_scheme(
        referer, {request.get_host()}, require_https=request.is_secure()
    ):
        return str(referer)
    return get_script_prefix()
