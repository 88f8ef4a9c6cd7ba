"""Guarded work that kills its own process at the point that ``DIE_AT`` names.

``before:OPERATION`` and ``after:OPERATION`` are calls to the ledger, ``work`` is
inside the work, ``commit`` right after the COMMIT of a view's transaction. At
``HANG_AT`` it comes to a stop instead.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from django.contrib.auth.models import Group, User
from django.core.management import call_command
from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.test import Client, override_settings
from django.urls import path

from django_meterly import get_client, grants, meterly_guard
from django_meterly.ledger.transport import LedgerTransport
from django_meterly.models import Customer
from django_meterly.testing import FaultyTransport

if TYPE_CHECKING:
    from django_meterly.transports.base import Call


def pass_by(point: str) -> None:
    if os.environ.get("DIE_AT") == point:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("HANG_AT") == point:
        time.sleep(600)


class DyingLedger(LedgerTransport):
    def send(self, call: Call) -> dict[str, Any]:
        pass_by(f"before:{call.operation}")
        answer = super().send(call)
        pass_by(f"after:{call.operation}")
        return answer


class DyingRemote(FaultyTransport):
    """The same at the far end of a line."""

    far_end = "tests.dying.DyingLedger"


@meterly_guard("image_credits", 25)
def work(request: HttpRequest) -> HttpResponse:
    Group.objects.create(name="trace")
    pass_by("work")
    transaction.on_commit(lambda: pass_by("commit"))
    if "used" in request.POST:
        request.meterly.charge(int(request.POST["used"]))  # type: ignore[attr-defined]
    return HttpResponse("done", status=int(request.POST.get("status", "200")))


urlpatterns = [path("", work)]


def request_work(**data: Any) -> None:
    """Let the only user request the view above."""
    with override_settings(ROOT_URLCONF=__name__):
        client = Client()
        client.force_login(User.objects.get())
        client.post("/", data)


def grant(amount: int) -> None:
    """Grant credits to the only customer."""
    customer = Customer.objects.get()
    grants.grant(
        get_client(), customer, amount, "image_credits", reason="r", reference="dying"
    )


def settle() -> None:
    """Settle when told to by a line on the standard input; tell from when to when."""
    print("ready", flush=True)
    sys.stdin.readline()
    begun = time.time()
    call_command("meterly_settle")
    print(f"from {begun} until {time.time()}", flush=True)
