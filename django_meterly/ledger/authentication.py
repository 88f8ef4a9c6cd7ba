"""Who calls the ledger's API: bearer keys and HMAC keys.

Neither is stored. Of a bearer key a hash is kept. An HMAC key's secret is derived
from Django's ``SECRET_KEY`` and the key's id whenever it is needed, and from
``SECRET_KEY_FALLBACKS`` for as long as a former one stands there.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import re
import secrets
import time
from hmac import compare_digest
from hmac import digest as hmac_digest
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.core.exceptions import DisallowedHost
from django.db import OperationalError
from django.db.models import BooleanField, Case, Q, Value, When
from django.utils.crypto import salted_hmac
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed, ParseError
from rest_framework.permissions import BasePermission

from ..db import DatabaseNow, from_now
from ..transports.base import string_to_sign
from .api.parsers import MAX_BODY_BYTES
from .models import ApiKey
from .operations import write_alias

if TYPE_CHECKING:
    from django.http import HttpRequest
    from rest_framework.request import Request

    from .models import Workspace

logger = logging.getLogger("django_meterly.ledger")

MAX_CLOCK_SKEW_SECONDS = 300
LAST_USED_SECONDS = 60

HMAC_PREFIX = "mk_hmac_"

_SIGNED = re.compile(
    r"(?i:METERLY-HMAC-SHA256) keyId=(?P<key_id>[A-Za-z0-9]{1,64}), "
    r"timestamp=(?P<timestamp>[0-9]{1,12}), signature=(?P<signature>[0-9a-f]{64})"
)


def create_api_key(
    workspace: Workspace,
    name: str,
    *,
    test: bool = False,
    hmac: bool = False,
    scope: str = ApiKey.Scope.WRITE,
) -> tuple[ApiKey, str]:
    """Return a new key of *workspace*: its row, and the key itself.

    The key cannot be had again: the row has a hash of it, or nothing at all if it
    is an *hmac* key. *test* bearer keys differ in their prefix, for people to tell
    them apart. With the *scope* ``"read"`` a key changes nothing.
    """
    row = ApiKey(workspace=workspace, name=name, scope=scope)
    if hmac:
        row.prefix = HMAC_PREFIX
        row.key_id = secrets.token_hex(8)
        secret = _hmac_secret(row.key_id, settings.SECRET_KEY)
        key = f"{HMAC_PREFIX}{row.key_id}_{secret}"
    else:
        key = f"mk_{'test' if test else 'live'}_{secrets.token_urlsafe(32)}"
        row.prefix, row.last4, row.key_hash = key[:12], key[-4:], _hash(key)
    row.save()
    return row, key


class KeyAuthentication(BaseAuthentication):
    """Lets in whoever has a key; ``request.auth`` is its ``ApiKey``."""

    def authenticate(self, request: Request) -> tuple[None, ApiKey]:
        # Every failure reads the same, so that nothing is learnt from it.
        header = request.headers.get("Authorization", "")
        scheme, _, key = header.partition(" ")
        found: dict[str, Any] | None = None
        if scheme.lower() == "bearer":
            # Unsalted, because the key is 256 random bits: nobody guesses it
            # from the hash, and looking it up by the hash takes no secret time.
            found = {"key_hash": _hash(key)}
        # The secret follows from the key id, so an unknown key takes the same way
        # as a wrong signature: the row is looked up after that.
        elif (signed := _SIGNED.fullmatch(header)) and _is_signed(
            request._request, **signed.groupdict()
        ):
            found = {"key_id": signed["key_id"]}
        if found and (row := _active_key(**found)):
            return None, row
        raise AuthenticationFailed("A valid API key is required.")

    def authenticate_header(self, request: Request) -> str:
        return "Bearer"


class ScopePermission(BasePermission):
    """Lets a key with the scope ``read`` do nothing but read."""

    message = "This API key may only read."

    def has_permission(self, request: Request, view: Any) -> bool:
        key: Any = request.auth
        return request.method == "GET" or key.scope == ApiKey.Scope.WRITE


def _active_key(**found: str) -> ApiKey | None:
    """Return the active key with these values, and note that it is being used."""
    keys = ApiKey.objects.using(write_alias()).active()
    unnoted = Q(last_used_at=None) | Q(last_used_at__lt=from_now(-LAST_USED_SECONDS))
    row: Any = (
        keys.filter(**found)
        .select_related("workspace")
        .annotate(
            unnoted=Case(
                When(unnoted, then=Value(True)),
                default=Value(False),
                output_field=BooleanField(),
            )
        )
        .first()
    )
    if row is not None and row.unnoted:
        try:
            keys.filter(unnoted, pk=row.pk).update(last_used_at=DatabaseNow())
        except OperationalError:
            # Not worth refusing a call for.
            logger.warning("The use of API key %s was not noted.", row.pk)
    key: ApiKey | None = row
    return key


def _is_signed(
    request: HttpRequest, *, key_id: str, timestamp: str, signature: str
) -> bool:
    if abs(time.time() - int(timestamp)) > MAX_CLOCK_SKEW_SECONDS:
        return False
    try:
        # Before the body is read: it has to be in memory to be hashed.
        if int(request.META.get("CONTENT_LENGTH") or 0) > MAX_BODY_BYTES:
            raise ParseError(f"The body is longer than {MAX_BODY_BYTES} bytes.")
        text = string_to_sign(
            timestamp,
            str(request.method),
            _target(request),
            _host(request),
            request.headers.get("Idempotency-Key", ""),
            request.body,
        )
    except (DisallowedHost, ValueError):
        return False
    given = bytes.fromhex(signature)
    # All of them, however early one fits: time tells nothing.
    matches = [
        compare_digest(
            hmac_digest(_hmac_secret(key_id, secret_key).encode(), text, "sha256"),
            given,
        )
        for secret_key in (settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS)
    ]
    return any(matches)


def _target(request: HttpRequest) -> str:
    """Return the path with its query as they were sent, if the server tells.

    ``PATH_INFO`` is unquoted, and quoting it again may end differently.
    """
    scope = getattr(request, "scope", None)
    if scope is not None and scope.get("raw_path"):
        query = scope.get("query_string", b"")
        target = (scope["raw_path"] + (b"?" + query if query else b"")).decode("latin1")
    else:
        # gunicorn's name for it, and that of uWSGI, mod_wsgi and waitress.
        target = request.META.get("RAW_URI") or request.META.get("REQUEST_URI") or ""
    return str(target) if target.startswith("/") else request.get_full_path()


def _host(request: HttpRequest) -> str:
    host = request.get_host().lower()
    return host.removesuffix(":443" if request.is_secure() else ":80")


def _hmac_secret(key_id: str, secret_key: str | bytes) -> str:
    digest = salted_hmac(
        "django_meterly.ledger.authentication",
        key_id,
        secret_key,
        algorithm="sha256",
    ).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
