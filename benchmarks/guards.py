"""What a guarded view costs: all of it against the floor, and nothing at all.

The first is a decorated view, called with a request, over the embedded ledger: the
journal's row and the ledger's movements, in two transactions. The second is the
decorator itself on a request that is free (GET), next to two decorators that most
projects have: each against the same view without a decorator.
"""

from __future__ import annotations

import random
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from django.contrib.auth.models import User
from django.db import transaction
from django.http import HttpResponse
from django.test import RequestFactory

from django_meterly import get_client, guard, meterly_guard
from django_meterly.models import Customer

from .ledgers import MUCH, PREPARED, connected, floor

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.http import HttpRequest

    from .crew import Maker

WAFFLE, RATELIMIT = "django-waffle", "django-ratelimit"


def create_users(count: int) -> list[User]:
    client = get_client()
    users = User.objects.bulk_create(
        User(username=f"guarded-{number}") for number in range(count)
    )
    with transaction.atomic():
        for user in users:
            customer = Customer.objects.resolve(user)
            customer.register(client, "credits")
            client.grant_credits(customer.external_id, MUCH, "credits", "opening")
    return users


def view(request: HttpRequest) -> HttpResponse:
    return HttpResponse("done")


def _request(method: str, user: User) -> HttpRequest:
    # Made beforehand: what a request costs is nobody's doing here.
    request: HttpRequest = getattr(RequestFactory(), method)("/")
    request.user = user
    return request


def guarded_view(users: list[User]) -> Callable[[], Any]:
    guarded = meterly_guard("credits", 1)(view)
    requests = [_request("post", user) for user in users]

    def run() -> None:
        response = guarded(random.choice(requests))
        if response.status_code != 200:
            raise RuntimeError(f"The view answered {response.status_code}.")

    return run


def guarded_block(users: list[User]) -> Callable[[], Any]:
    def run() -> None:
        with guard(random.choice(users), 1, "credits"):
            pass

    return run


def makers(users: list[User]) -> dict[str, Maker]:
    """Return the floor, and the guard in its forms."""
    return {
        "floor": partial(floor, len(users)),
        "guarded view": partial(connected, guarded_view, users, OPTIONS={}),
        "guarded view, prepared": partial(
            connected, guarded_view, users, OPTIONS=PREPARED
        ),
        "guard() block": partial(connected, guarded_block, users, OPTIONS={}),
    }


def _decorated() -> tuple[dict[str, Any], dict[str, str]]:
    """Return the view under each decorator, ours first, and who cannot be had."""
    off = meterly_guard("credits", methods=["GET"], enforcement="off")
    found: dict[str, Any] = {
        "django-meterly, a free request": meterly_guard()(view),
        "django-meterly, ENFORCEMENT off": off(view),
    }
    missing = {}
    try:
        from waffle.decorators import waffle_flag
        from waffle.models import Flag

        Flag.objects.create(name="on", everyone=True)
        found[f"{WAFFLE}, waffle_flag"] = waffle_flag("on")(view)
    except (ImportError, RuntimeError) as exc:
        missing[WAFFLE] = f"{type(exc).__name__}: {exc}"
    try:
        from django_ratelimit.decorators import ratelimit

        limit = ratelimit(key="ip", rate="100000000/m")
        found[f"{RATELIMIT}, ratelimit"] = limit(view)
    except ImportError as exc:
        missing[RATELIMIT] = f"{type(exc).__name__}: {exc}"
    return found, missing


def idle(rounds: int, calls: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return by decorator the microseconds of CPU it adds to one call, by round."""
    decorated, missing = _decorated()
    request = _request("get", User(username="nobody"))
    found: dict[str, list[float]] = {name: [] for name in decorated}

    def cost(function: Any) -> float:
        started = time.process_time()
        for _call in range(calls):
            function(request)
        return (time.process_time() - started) / calls * 1e6

    for number in range(rounds + 1):
        bare = statistics.median(cost(view) for _ in range(3))
        for name, function in decorated.items():
            added = cost(function) - bare
            # The first round only warms up, and fills their caches.
            if number:
                found[name].append(added)
    return found, missing
