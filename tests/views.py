"""Guarded views for the tests."""

from __future__ import annotations

from typing import Any

from django.contrib.auth.models import Group
from django.core.exceptions import PermissionDenied
from django.db import connection, transaction
from django.http import (
    Http404,
    HttpRequest,
    HttpResponse,
    HttpResponseBase,
    StreamingHttpResponse,
)
from django.template.response import TemplateResponse

from django_meterly import meterly_guard
from django_meterly.models import Grant


class Boom(Exception):
    """What failing work raises."""


def _work(request: HttpRequest) -> None:
    """Leave a trace in the view's own transaction."""
    Group.objects.create(name=request.POST.get("trace", "trace"))


@meterly_guard("image_credits", 25)
def paid(request: HttpRequest) -> HttpResponse:
    _work(request)
    return HttpResponse("done", status=int(request.POST.get("status", "200")))


@meterly_guard("image_credits", 25)
def settles(request: HttpRequest) -> HttpResponse:
    request.meterly.charge(int(request.POST["used"]))  # type: ignore[attr-defined]
    return HttpResponse("done")


@meterly_guard("image_credits", 25)
def raises(request: HttpRequest) -> HttpResponse:
    _work(request)
    kinds: dict[str, BaseException] = {
        "boom": Boom("boom"),
        "404": Http404(),
        "403": PermissionDenied(),
        "exit": SystemExit(3),
        "interrupt": KeyboardInterrupt(),
        "generator": GeneratorExit(),
    }
    raise kinds[request.POST["kind"]]


def _done(request: HttpRequest) -> HttpResponseBase:
    if request.POST.get("late"):
        return TemplateResponse(request, "tests/good.html", {"value": 1})
    return HttpResponse("done")


@meterly_guard("image_credits", 25)
def breaks_at_commit(request: HttpRequest) -> HttpResponseBase:
    # The foreign key is checked at COMMIT: the view itself succeeds.
    Grant.objects.create(
        customer_id=987654321, unit="x", amount=1, reason="x", reference="x"
    )
    return _done(request)


@meterly_guard("image_credits", 25)
def breaks_after_commit(request: HttpRequest) -> HttpResponseBase:
    _work(request)

    def fail() -> None:
        raise Boom("somebody's on_commit")

    transaction.on_commit(fail)
    return _done(request)


@meterly_guard("image_credits", 25)
def rolls_back(request: HttpRequest) -> HttpResponse:
    _work(request)
    transaction.set_rollback(True)
    return HttpResponse("done")


@meterly_guard("image_credits", 25)
def loses_connection(request: HttpRequest) -> HttpResponse:
    _work(request)
    from tests.test_decorators import kill_backend

    kill_backend(connection)
    return HttpResponse("done")


@meterly_guard("image_credits", 25)
def template(request: HttpRequest) -> TemplateResponse:
    return TemplateResponse(request, request.POST["template"], {"value": 1})


@meterly_guard("image_credits", 25)
def stream(request: HttpRequest) -> HttpResponseBase:
    def chunks() -> Any:
        yield b"one"
        if request.POST.get("used"):
            request.meterly.charge(int(request.POST["used"]))  # type: ignore[attr-defined]
        yield b"two"
        if request.POST.get("break"):
            raise Boom("in the stream")
        yield b"three"

    response = StreamingHttpResponse(chunks())
    if request.POST.get("length"):
        response["Content-Length"] = request.POST["length"]
    return response


@meterly_guard("image_credits", 25)
def nested(request: HttpRequest) -> HttpResponse:
    from django_meterly import guard

    with guard(
        request.user, 10, durable=not connection.in_atomic_block, reference="inner"
    ):
        pass
    return HttpResponse("done")


@meterly_guard("image_credits", 25, idempotency_key=lambda r: r.POST.get("key"))
def keyed(request: HttpRequest) -> HttpResponse:
    return HttpResponse("done", status=int(request.POST.get("status", "200")))


@meterly_guard(amount=lambda request: int(request.POST["amount"]), methods=["get"])
def reading(request: HttpRequest) -> HttpResponse:
    return HttpResponse("done")


@transaction.non_atomic_requests
@meterly_guard("image_credits", 25)
def exempt(request: HttpRequest) -> HttpResponse:
    _work(request)
    return HttpResponse(str(connection.in_atomic_block))


@meterly_guard("image_credits", 25)
def atomic(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(connection.in_atomic_block))
