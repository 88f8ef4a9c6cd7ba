"""Who pays for a request, and under which id the ledger knows them: the defaults."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from .conf import meterly_settings
from .wire import check_text

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

    The name and the key are ``CUSTOMER_MODEL``'s, also for an instance of a proxy or
    of a child. A key that is too long for an external id, or has other than printable
    ASCII characters, is replaced by a digest: ``owner_3cd1...``.
    """
    from .models import Customer

    _, _, model = meterly_settings.CUSTOMER_MODEL.rpartition(".")
    target = Customer._meta.get_field("owner").target_field
    name = f"{model.lower()}_{getattr(owner, target.attname)}"
    try:
        return check_text(name, "external_id")
    except ValueError:
        return f"owner_{hashlib.sha256(name.encode()).hexdigest()}"
