"""What a refused request is answered: a page for browsers, problem+json for APIs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.contrib.auth.views import redirect_to_login
from django.http import HttpResponse, JsonResponse
from django.template.loader import render_to_string
from django.urls import get_script_prefix
from django.utils.cache import patch_vary_headers
from django.utils.http import url_has_allowed_host_and_scheme
from django.utils.translation import gettext as _

from .conf import meterly_settings
from .errors import (
    MeterlyDuplicateError,
    MeterlyIdempotencyMismatchError,
    MeterlyInsufficientCreditsError,
    MeterlyInvalidKeyError,
    MeterlyUnavailableError,
)
from .models import MAX_CALLER_KEY_LENGTH

if TYPE_CHECKING:
    from django.http import HttpRequest

    from .errors import MeterlyError

#: What the guard raises and an edge renders.
RENDERED = (
    MeterlyInsufficientCreditsError,
    MeterlyUnavailableError,
    MeterlyDuplicateError,
    MeterlyInvalidKeyError,
    MeterlyIdempotencyMismatchError,
)


def render(request: HttpRequest, exc: MeterlyError) -> HttpResponse:
    """Return the response for one of the ``RENDERED`` exceptions.

    402 with ``required, available, reserved, unit, top_up_url``, 503 with
    ``Retry-After``, 409 with ``state`` and ``reference``, 422 for a key that was
    used for something else, or 400 for one that cannot be one. Browsers get
    ``meterly/402.html`` and its kin, which a project may override; everybody
    else ``application/problem+json`` (RFC 9457).
    """
    if isinstance(exc, MeterlyInsufficientCreditsError):
        return _respond(
            request,
            402,
            "insufficient_credits",
            _("Your credits are in use")
            if exc.held_by_running_work
            else _("Not enough credits"),
            _(
                "Your running work holds the credits this needs. "
                "Try again when it is done."
            )
            if exc.held_by_running_work
            else _("This needs %(required)d %(unit)s, and %(available)d are available.")
            % {
                "required": exc.required,
                "unit": exc.unit,
                "available": exc.available,
            },
            required=exc.required,
            available=exc.available,
            reserved=exc.reserved,
            unit=exc.unit,
            top_up_url=meterly_settings.TOP_UP_URL,
            held_by_running_work=exc.held_by_running_work,
        )
    if isinstance(exc, MeterlyUnavailableError):
        response = _respond(
            request,
            503,
            "unavailable",
            _("Credits cannot be checked right now"),
            _("Nothing was charged. Please try again in a moment."),
        )
        response["Retry-After"] = str(exc.retry_after)
        return response
    if isinstance(exc, MeterlyInvalidKeyError):
        return _respond(
            request,
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
        return _respond(
            request,
            422,
            "idempotency_mismatch",
            _("This is not the request that was sent before"),
            _(
                "Its idempotency key belongs to another request, or to one at another "
                "price. Nothing was charged. Reload the form, or send a new key."
            ),
        )
    assert isinstance(exc, MeterlyDuplicateError)
    response = _respond(
        request,
        409,
        "duplicate",
        _("This was asked for already"),
        _("The same request is being worked on right now. Nothing is charged twice.")
        if exc.in_progress
        else _(
            "The same request was carried out before. It was not run again, and its "
            "answer is not kept. To do it once more, reload the form, or send a new "
            "key."
        ),
        state=exc.state,
        reference=exc.reference,
    )
    if exc.in_progress:
        response["Retry-After"] = "5"
    return response


def login_required(request: HttpRequest) -> HttpResponse:
    """Return what somebody gets for whom no customer is known.

    A browser is sent to the project's log-in page, everybody else gets 401.
    """
    if wants_html(request):
        return redirect_to_login(request.get_full_path())
    return _respond(
        request,
        401,
        "unauthenticated",
        _("Log in first"),
        _("This costs credits, and nobody is known to pay for it."),
    )


def wants_html(request: HttpRequest) -> bool:
    """Return whether the client asks for HTML, and not only accepts anything."""
    preferred = request.get_preferred_type(
        ["application/problem+json", "application/json", "text/html"]
    )
    return preferred == "text/html"


def _respond(
    request: HttpRequest, status: int, code: str, title: str, detail: str, **extra: Any
) -> HttpResponse:
    response: HttpResponse
    if wants_html(request):
        context = {
            "status": status,
            "code": code,
            "title": title,
            "detail": detail,
            "back_url": _back_url(request),
            **extra,
        }
        response = HttpResponse(
            render_to_string(f"meterly/{status}.html", context, request=request),
            status=status,
        )
    else:
        problem = {
            "type": "about:blank",
            "title": title,
            "status": status,
            "detail": detail,
            "code": code,
            **extra,
        }
        response = JsonResponse(
            problem, status=status, content_type="application/problem+json"
        )
    response["Cache-Control"] = "no-store"
    patch_vary_headers(response, ["Accept"])
    return response


def _back_url(request: HttpRequest) -> str:
    """Return where the client came from, if that is here, or the front page."""
    referer = request.headers.get("Referer")
    if url_has_allowed_host_and_scheme(
        referer, {request.get_host()}, require_https=request.is_secure()
    ):
        return str(referer)
    return get_script_prefix()
