"""The views of a chaos run: they reserve, and hand the job off."""

from __future__ import annotations

import json
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.urls import path

from django_meterly import meterly_guard
from tests.chaos.work import HELD, keeping


def order(request: HttpRequest, number: int) -> HttpResponse:
    data = json.loads(request.body)
    job = keeping.s(number, data["payer"], data["plan"]).set(**data["options"])
    task_id = request.meterly.hand_off(job)  # type: ignore[attr-defined]
    return HttpResponse(task_id)


def _reference(request: HttpRequest, number: int) -> str:
    return f"job-{number}"


def _guarded(ttl_seconds: int) -> Any:
    return meterly_guard(amount=HELD, reference=_reference, ttl_seconds=ttl_seconds)(
        order
    )


urlpatterns = [
    path("order/<int:number>", _guarded(15)),
    # Jobs that are put off for longer find their credits released.
    path("order-briefly/<int:number>", _guarded(1)),
]
