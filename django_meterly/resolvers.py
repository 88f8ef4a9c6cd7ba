"""Who pays for a request, and under which id the ledger knows them: the defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .conf import meterly_settings

if TYPE_CHECKING:
    from django.db.models import Model
    from django.http import HttpRequest


def request_user(request: HttpRequest) -> Any:
    """Return the logged-in user, or ``None`` when nobody is (``CUSTOMER_RESOLVER``).

    A resolver of your own may return an instance of ``CUSTOMER_MODEL``, a
    ``Customer``, an external id, or ``None``.
    """
    user = getattr(request, "user", None)
    return user if user is not None and user.is_authenticated else None


def external_id(owner: Model) -> str:
    """Return ``user_<pk>``: the model's name and the primary key (``EXTERNAL_ID``).

    The name is ``CUSTOMER_MODEL``'s: a proxy's instance is the same customer.
    """
    _, _, model = meterly_settings.CUSTOMER_MODEL.rpartition(".")
    return f"{model.lower()}_{owner.pk}"
