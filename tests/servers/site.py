"""What the servers serve: guarded views whose fate the query string decides.

``?hold=NAME`` lets the work wait in the middle, until the test has seen where it
is and lets it go on. ``?raise=``, ``?template=`` and ``?status=`` are its ends;
the template ``held`` is where ``?render=NAME`` waits.
"""

from __future__ import annotations

import asyncio
import io
import os
import time
import uuid
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from django.contrib.auth.models import Group
from django.core.exceptions import PermissionDenied
from django.db import transaction
from django.http import FileResponse, Http404, HttpResponse, StreamingHttpResponse
from django.template.response import TemplateResponse
from django.urls import include, path
from rest_framework.authentication import SessionAuthentication
from rest_framework.decorators import api_view, authentication_classes
from rest_framework.response import Response

from django_meterly import meterly_guard
from tests import views
from tests.dying import pass_by

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

KINDS: dict[str, type[BaseException]] = {
    "boom": views.Boom,
    "404": Http404,
    "403": PermissionDenied,
    "exit": SystemExit,
    "interrupt": KeyboardInterrupt,
}


def _arrive(request: HttpRequest, where: str) -> Path | None:
    """Tell the test that the work waits, and in which process; return for what."""
    if not (name := request.GET.get(where)):
        return None
    folder = Path(os.environ["SERVER_FOLDER"])
    # Seen by the test only when it is whole.
    (folder / f"{name}.part").write_text(str(os.getpid()))
    (folder / f"{name}.part").rename(folder / f"{name}.held")
    return folder / f"{name}.go"


def hold(request: HttpRequest, where: str = "hold") -> None:
    gate = _arrive(request, where)
    while gate and not gate.exists():
        time.sleep(0.02)
    if gate:
        gate.with_suffix(".passed").touch()


async def ahold(request: HttpRequest) -> None:
    gate = _arrive(request, "hold")
    while gate and not gate.exists():
        await asyncio.sleep(0.02)


def _end(request: HttpRequest) -> HttpResponseBase:
    if kind := request.GET.get("raise"):
        raise KINDS[kind]
    if template := request.GET.get("template"):
        wait = partial(hold, request, "render")
        context = {"value": 1, "wait": wait}
        return TemplateResponse(request, f"tests/{template}.html", context)
    return HttpResponse("done", status=int(request.GET.get("status", "200")))


@meterly_guard("image_credits", 25)
def paid(request: HttpRequest) -> HttpResponseBase:
    Group.objects.create(name=str(uuid.uuid4()))
    hold(request)
    transaction.on_commit(lambda: pass_by("commit"))
    return _end(request)


@meterly_guard("image_credits", 25)
async def apaid(request: HttpRequest) -> HttpResponseBase:
    await Group.objects.acreate(name=str(uuid.uuid4()))
    await ahold(request)
    return _end(request)


def _chunks(request: HttpRequest) -> Iterator[bytes]:
    for number in range(int(request.GET.get("chunks", "3"))):
        yield b"%d\n" % number
        if number == 0 and (used := request.GET.get("used")):
            request.meterly.charge(int(used))  # type: ignore[attr-defined]


def _pauses(request: HttpRequest) -> Iterator[float]:
    """Yield how long each chunk is followed by nothing: ``?pace=&last=`` seconds."""
    count = int(request.GET.get("chunks", "3"))
    pace = float(request.GET.get("pace", "0"))
    yield from [pace] * (count - 2)
    # Before the last chunk.
    yield float(request.GET.get("last", pace))
    yield from [pace] * 2


def stream(request: HttpRequest) -> HttpResponseBase:
    def chunks() -> Iterator[bytes]:
        for chunk, pause in zip(_chunks(request), _pauses(request), strict=False):
            yield chunk
            time.sleep(pause)
        hold(request)

    return StreamingHttpResponse(chunks())


async def astream(request: HttpRequest) -> HttpResponseBase:
    async def chunks() -> AsyncIterator[bytes]:
        for chunk, pause in zip(_chunks(request), _pauses(request), strict=False):
            yield chunk
            await asyncio.sleep(pause)
        await ahold(request)

    return StreamingHttpResponse(chunks())


@meterly_guard("image_credits", 25)
def late(request: HttpRequest) -> HttpResponseBase:
    """Return, after a while, a response of which everything is still to come."""
    hold(request)
    return StreamingHttpResponse(_chunks(request))


def file(request: HttpRequest) -> HttpResponseBase:
    hold(request)
    return FileResponse(io.BytesIO(b"x" * 100_000), filename="poster.png")


class Session(SessionAuthentication):
    """A session without its CSRF token, which these readers do not have."""

    def enforce_csrf(self, request: Any) -> None:
        pass


@api_view(["POST"])
@authentication_classes([Session])
def rest(request: Any) -> Response:
    hold(request)
    if kind := request.query_params.get("raise"):
        raise KINDS[kind]
    return Response({"done": True})


#: What a reader may leave, under each policy.
LEFT = {"plain": paid.__wrapped__, "aplain": apaid.__wrapped__, "file": file}


def _leaving(policy: str) -> list[Any]:
    guard = meterly_guard("image_credits", 25, on_disconnect=policy)
    views = {name: guard(view) for name, view in LEFT.items()}
    # Above @api_view, which makes the view that is guarded.
    views["rest"] = guard(rest)
    return [path(f"{name}/{policy}/", view) for name, view in views.items()]


def _streaming(view: Any, policy: str) -> Any:
    guarded = meterly_guard("image_credits", 25, on_disconnect=policy, methods=["GET"])(
        view
    )
    return path(f"{view.__name__}/{policy}/", guarded)


urlpatterns = [
    path("paid/", paid),
    path("apaid/", apaid),
    path("late/", late),
    *_leaving("charge"),
    *_leaving("release"),
    *[
        _streaming(view, policy)
        for view in (stream, astream)
        for policy in ("release", "charge")
    ],
    path("breaks_at_commit/", views.breaks_at_commit),
    path("loses_connection/", views.loses_connection),
    path("ledger/", include("django_meterly.ledger.urls")),
]
