"""Who pays for a request, and under which id the ledger knows them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from . import functions
from .conf import meterly_settings
from .wire import check_text

if TYPE_CHECKING:
    from django.db.models import Model
    from django.http import HttpRequest


def payer_of(request: Any) -> Any:
    """Return whom ``CUSTOMER_RESOLVER`` names, or ``None``. Call it from sync code."""
    return somebody(functions.result(meterly_settings.CUSTOMER_RESOLVER, request))


def somebody(payer: Any) -> Any:
    """Return *payer*, or ``None`` for a user who is not logged in."""
    # By its attribute: the class is Django's, REST framework's or the project's.
    return None if getattr(payer, "is_anonymous", False) is True else payer


def request_user(request: HttpRequest) -> Any:
    """Return the logged-in user, or ``None``: the default of ``CUSTOMER_RESOLVER``.

    Another resolver may return an instance of ``CUSTOMER_MODEL``, a ``Customer``, an
    external id, or ``None``. For example::

        def team(request):
            return request.user.team if request.user.is_authenticated else None
    """
    user = getattr(request, "user", None)
    return user if user is not None and user.is_authenticated else None


def external_id(owner: Model) -> str:
    """Return ``user_<pk>``: the model's name and key, the default of ``EXTERNAL_ID``.

    The name and the key are those of ``CUSTOMER_MODEL``, also for an instance of a
    proxy or of a child. A key that is too long for an external id, or has other than
    printable ASCII characters, is replaced by a digest: ``owner_3cd1...``.
    """
    from .models import Customer

    _, _, model = meterly_settings.CUSTOMER_MODEL.rpartition(".")
    target = Customer._meta.get_field("owner").target_field
    name = f"{model.lower()}_{getattr(owner, target.attname)}"
    try:
        return check_text(name, "external_id")
    except ValueError:
        return f"owner_{hashlib.sha256(name.encode()).hexdigest()}"
