from __future__ import annotations

import io
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.contrib.auth.decorators import login_required
from django.core.files.base import ContentFile
from django.http import FileResponse, Http404, HttpResponse
from django.shortcuts import get_object_or_404, redirect
from django.template.response import TemplateResponse
from django.utils.crypto import get_random_string
from django.views.decorators.cache import cache_control
from django.views.decorators.http import require_POST

from django_meterly import MeterlyError, get_client, meterly_guard
from django_meterly.models import Customer, Reservation
from django_meterly.types import Balance

from . import drawing
from .forms import PosterForm
from .models import FRAMES, Animation, Poster
from .tasks import RENDER_SECONDS, render_animation

if TYPE_CHECKING:
    from django.http import HttpRequest
    from PIL.Image import Image

#: In image_credits.
POSTER_PRICE = 25
POSTER_SIZE = (1200, 1600)
THUMBNAIL_SIZE = (360, 480)


@login_required
def studio(request: HttpRequest) -> HttpResponse:
    return _studio(request, PosterForm())


def _studio(request: HttpRequest, form: PosterForm, status: int = 200) -> HttpResponse:
    posters = Poster.objects.filter(owner=request.user).order_by("-pk")
    work = Reservation.objects.filter(customer__owner=request.user)
    context = {
        "form": form,
        "posters": posters[:12],
        "work": work.order_by("-created_at")[:8],
        "price": POSTER_PRICE,
    }
    return _page(request, "studio", context, status)


def _page(
    request: HttpRequest, name: str, context: dict[str, Any], status: int = 200
) -> HttpResponse:
    # The template asks for the balances when it is rendered, after the guard has ended.
    # While a guarded view runs, the price of its work is still held.
    context["balances"] = partial(_balances, request.user)
    return TemplateResponse(request, f"studio/{name}.html", context, status=status)


def _balances(user: Any) -> list[Balance] | None:
    """Return the user's accounts, or ``None`` when the ledger cannot be asked."""
    customer = Customer.objects.for_owner(user)
    accounts = {
        unit: Balance(unit, balance=0, reserved=0, available=0)
        for unit in ("image_credits", "render_seconds")
    }
    # Without an id, the ledger does not know this customer yet.
    if customer.customer_id:
        try:
            found = get_client().get_balances(customer.customer_id).balances
        except MeterlyError:
            return None
        accounts.update({account.credit_unit: account for account in found})
    return list(accounts.values())


def _reference(kind: str) -> str:
    return f"{kind}-{get_random_string(10, 'abcdefghijkmnpqrstuvwxyz23456789')}"


@meterly_guard(
    "image_credits", POSTER_PRICE, reference=lambda request: _reference("poster")
)
def create_poster(request: HttpRequest) -> HttpResponse:
    """Draw a poster. It is charged when it is finished, and only then."""
    if request.method != "POST":
        # The log-in page may redirect here. Reading is free.
        return redirect("studio")
    form = PosterForm(request.POST)
    if not form.is_valid():
        # A response with a status of 400 or more costs nothing.
        return _studio(request, form, status=422)
    poster = form.save(commit=False)
    poster.owner = request.user
    poster.reference = request.meterly.reference
    image = drawing.draw(poster.title, poster.style, POSTER_SIZE)
    poster.image.save(f"{poster.reference}.png", _png(image), save=False)
    small = image.resize(THUMBNAIL_SIZE, reducing_gap=2)
    poster.thumbnail.save(f"{poster.reference}-small.png", _png(small), save=False)
    poster.save()
    return redirect(poster)


def _png(image: Image) -> ContentFile[bytes]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return ContentFile(file.getvalue())


@login_required
def poster(request: HttpRequest, pk: int) -> HttpResponse:
    poster = get_object_or_404(Poster, pk=pk, owner=request.user)
    animations = [
        (animation, animation.stage(animation.reservation()))
        for animation in poster.animations.order_by("-pk")
    ]
    context = {"poster": poster, "animations": animations, "hold": RENDER_SECONDS}
    return _page(request, "poster", context)


@login_required
@cache_control(private=True, max_age=86400)
def poster_file(request: HttpRequest, pk: int, name: str) -> FileResponse:
    """Send the PNG or its thumbnail, to its owner only."""
    poster = get_object_or_404(Poster, pk=pk, owner=request.user)
    files = {"poster.png": poster.image, "thumbnail.png": poster.thumbnail}
    if name not in files:
        raise Http404
    return FileResponse(
        files[name].open(),
        as_attachment="download" in request.GET,
        filename=f"{poster.reference}.png",
    )


@require_POST
@meterly_guard(
    "render_seconds",
    RENDER_SECONDS,
    reference=lambda request, pk: _reference("animation"),
    ttl_seconds=settings.ANIMATION_SECONDS,
)
def animate(request: HttpRequest, pk: int) -> HttpResponse:
    """Order an animated version: reserve its credits, and hand it off to a job."""
    poster = get_object_or_404(Poster, pk=pk, owner=request.user)
    animation = poster.animations.create(
        reference=request.meterly.reference,
        dies_half_way="dies_half_way" in request.POST,
    )
    request.meterly.hand_off(render_animation, animation.pk)
    return redirect(animation)


def _animation(request: HttpRequest, pk: int) -> Animation:
    owned = Animation.objects.filter(poster__owner=request.user)
    return get_object_or_404(owned.select_related("poster"), pk=pk)


@login_required
def animation(request: HttpRequest, pk: int) -> HttpResponse:
    # Read the reservation before the progress: a job that is done has all its frames.
    animation = _animation(request, pk)
    reservation = animation.reservation()
    stage = animation.stage(reservation)
    if stage == "done":
        animation.refresh_from_db()
    context = {
        "animation": animation,
        "poster": animation.poster,
        "reservation": reservation,
        "stage": stage,
        "open": stage in ("waiting", "rendering"),
        "frames": FRAMES,
    }
    return _page(request, "animation", context)


@login_required
@cache_control(private=True, max_age=86400)
def animation_file(request: HttpRequest, pk: int) -> FileResponse:
    animation = _animation(request, pk)
    if not animation.image:
        raise Http404
    return FileResponse(
        animation.image.open(),
        as_attachment="download" in request.GET,
        filename=f"{animation.reference}.png",
    )


@cache_control(max_age=86400)
def style_sample(request: HttpRequest, style: str) -> HttpResponse:
    if style not in drawing.STYLES:
        raise Http404
    return HttpResponse(_sample(style), content_type="image/png")


@cache
def _sample(style: str) -> bytes:
    return _png(drawing.draw(drawing.STYLES[style].label, style, (180, 240))).read()


@login_required
def credits_page(request: HttpRequest) -> HttpResponse:
    return _page(request, "credits", {})
