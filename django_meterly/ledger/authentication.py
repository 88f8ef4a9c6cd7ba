"""API keys: create them, and let a request in that has one.

``manage.py meterly_ledger_apikey`` calls ``create_api_key``. ``api.views`` names the
other classes: ``KeyAuthentication`` finds the key of a request, ``ScopePermission``
asks whether it may make this call.

The ledger stores no key. It keeps the hash of a bearer key. It derives the secret of an
HMAC key from Django's ``SECRET_KEY`` and the key's id whenever it needs it. After the
``SECRET_KEY`` was replaced, HMAC keys work as long as ``SECRET_KEY_FALLBACKS`` lists
the old one.
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
from django.db import DatabaseError, OperationalError, transaction
from django.db.models import BooleanField, Case, Q, Value, When
from django.utils.crypto import salted_hmac
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed, Throttled
from rest_framework.permissions import BasePermission

from ..db import DatabaseNow, from_now
from ..transports.base import string_to_sign
from .api.parsers import read_body
from .api.throttling import FailureThrottle
from .database import write_alias
from .models import ApiKey, ApiKeyEvent

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterable

    from django.http import HttpRequest
    from rest_framework.request import Request

    from .models import Workspace

logger = logging.getLogger("django_meterly.ledger")

MAX_CLOCK_SKEW_SECONDS = 300
LAST_USED_SECONDS = 60
REFUSED_SECONDS = 3600
MAX_NAME_LENGTH = 255

HMAC_PREFIX = "mk_hmac_"

_SIGNED = re.compile(
    r"(?i:METERLY-HMAC-SHA256) keyId=(?P<key_id>[A-Za-z0-9]{1,64}), "
    r"timestamp=(?P<timestamp>[0-9]{1,12}), signature=(?P<signature>[0-9a-f]{64})"
)


#: The scope that a key needs for each operation.
SCOPES = {
    "create_customer": ApiKey.Scope.SPEND,
    "find_customer": ApiKey.Scope.READ,
    "grant_credits": ApiKey.Scope.GRANT,
    "get_balance": ApiKey.Scope.READ,
    "get_balances": ApiKey.Scope.READ,
    "add_credits": ApiKey.Scope.GRANT,
    "use_credits": ApiKey.Scope.SPEND,
    "reserve_credits": ApiKey.Scope.SPEND,
    "get_reservation": ApiKey.Scope.READ,
    "commit_reservation": ApiKey.Scope.SPEND,
    "release_reservation": ApiKey.Scope.SPEND,
    "extend_reservation": ApiKey.Scope.SPEND,
    "list_entries": ApiKey.Scope.READ,
}


def create_api_key(
    workspace: Workspace,
    name: str,
    *,
    scopes: Iterable[str] = (ApiKey.Scope.SPEND,),
    expires_in: dt.timedelta | None = None,
    hmac: bool = False,
    actor: str = "",
) -> tuple[ApiKey, str]:
    """Return a new key of *workspace*: its row, and the key itself.

    Show the key now: the row does not have it, and it cannot be shown again. *scopes*
    are words of ``ApiKey.Scope``; every key may read. Without *expires_in* the key
    never expires. In a test workspace it is a test key, which begins with ``mk_test_``
    or ``mk_hmac_test``. The event of the creation names *actor*. Raises ``ValueError``
    for an invalid name or scope.

    For example, a key that can spend credits for 90 days, and create none::

        row, key = create_api_key(workspace, "shop", expires_in=timedelta(days=90))
    """
    if not name.strip() or not name.isprintable() or len(name) > MAX_NAME_LENGTH:
        raise ValueError(
            f"The name of a key must be 1 to {MAX_NAME_LENGTH} printable characters."
        )
    scopes = {ApiKey.Scope(scope) for scope in scopes}
    if not scopes:
        raise ValueError("A key needs a scope.")
    row = ApiKey(
        workspace=workspace,
        name=name,
        is_test=workspace.is_test,
        may_spend=ApiKey.Scope.SPEND in scopes,
        may_grant=ApiKey.Scope.GRANT in scopes,
    )
    if expires_in is not None:
        row.expires_at = from_now(expires_in.total_seconds())
    key = _name_hmac_key(row) if hmac else _name_bearer_key(row)
    try:
        with transaction.atomic(using=write_alias()):
            row.save()
            row.events.create(kind=ApiKeyEvent.Kind.CREATED, actor=actor)
    except DatabaseError:
        # The key may be valid nevertheless, and error reports show local variables.
        key = ""
        raise
    return row, key


def _name_hmac_key(row: ApiKey) -> str:
    """Return a new HMAC key, and put its id into the *row*."""
    row.prefix = HMAC_PREFIX
    row.key_id = f"{'test' if row.is_test else ''}{secrets.token_hex(8)}"
    secret = _hmac_secret(row.key_id, settings.SECRET_KEY)
    return f"{HMAC_PREFIX}{row.key_id}_{secret}"


def _name_bearer_key(row: ApiKey) -> str:
    """Return a new bearer key, and put its hash into the *row*."""
    key = f"mk_{'test' if row.is_test else 'live'}_{secrets.token_urlsafe(32)}"
    row.prefix, row.last4, row.key_hash = key[:12], key[-4:], _hash(key)
    return key


class Claim:
    """The key that a request claims to have: a hash, or a key id with a signature.

    The header is removed from the request, and ``repr`` of a claim shows nothing: error
    reports show headers and local variables, and some reporters do not know which of
    them are secret.
    """

    def __init__(self, request: HttpRequest) -> None:
        header = _take_header(request)
        scheme, _, key = header.partition(" ")
        #: A lookup of the key's row; empty if the request has no valid header.
        self.found: dict[str, str] = {}
        self.signature: tuple[str, str] | None = None
        if scheme.lower() == "bearer":
            # Unsalted, because the key is 256 random bits: nobody guesses it
            # from the hash, and looking it up by the hash takes no secret time.
            self.found = {"key_hash": _hash(key)}
        elif signed := _SIGNED.fullmatch(header):
            self.found = {"key_id": signed["key_id"]}
            self.signature = signed["timestamp"], signed["signature"]


class KeyAuthentication(BaseAuthentication):
    """Lets a request with a valid key in; ``request.auth`` is its ``ApiKey``.

    The view has put a ``Claim`` on Django's request, as ``meterly_claim``.
    """

    def authenticate(self, request: Request) -> tuple[None, ApiKey]:
        claim: Claim = request._request.meterly_claim  # type: ignore[attr-defined]
        # The row first: the body is read only for a key id that exists.
        row = _look_up(claim)
        if row is not None and _is_signed(request._request, row, claim):
            if row.is_active:
                _note_use(row)
                return None, row
            _note_refusal(row, request)
        # Only failures are counted and throttled. The address may belong to a proxy
        # that valid clients use, too, so a valid key is always let in.
        throttle = FailureThrottle()
        if not throttle.allow_request(request, None):
            raise Throttled(throttle.wait())
        # Every failure reads the same, so that an attacker learns nothing from it.
        raise AuthenticationFailed("A valid API key is required.")

    def authenticate_header(self, request: Request) -> str:
        return "Bearer"


class ScopePermission(BasePermission):
    """Lets a key do what its scopes name."""

    def has_permission(self, request: Request, view: Any) -> bool:
        key: Any = request.auth
        operation = view.operations.get(request.method)
        # Without an operation the answer is 405, whatever key was sent.
        if operation is None or SCOPES[operation] in key.scopes:
            return True
        self.message = f'This call needs a key with the scope "{SCOPES[operation]}".'
        return False


def _take_header(request: HttpRequest) -> str:
    """Remove the ``Authorization`` header from *request*, and return it."""
    # Under WSGI, META is the server's environment itself.
    header = request.META.pop("HTTP_AUTHORIZATION", "")
    # Django builds ``headers`` from META again when it is next read.
    request.__dict__.pop("headers", None)
    scope = getattr(request, "scope", None)
    if scope is not None:
        scope["headers"] = [
            pair for pair in scope["headers"] if pair[0].lower() != b"authorization"
        ]
    return str(header)


def _look_up(claim: Claim) -> Any:
    if not claim.found:
        return None
    return (
        ApiKey.objects.using(write_alias())
        .current()
        .filter(**claim.found)
        .annotate(
            is_unnoted=Case(
                When(_unnoted("last_used_at", LAST_USED_SECONDS), then=Value(True)),
                default=Value(False),
                output_field=BooleanField(),
            )
        )
        .first()
    )


def _unnoted(field: str, seconds: int) -> Q:
    return Q(**{field: None}) | Q(**{f"{field}__lt": from_now(-seconds)})


def _note_use(row: Any) -> None:
    if not row.is_unnoted:
        return
    unnoted = _unnoted("last_used_at", LAST_USED_SECONDS)
    keys = ApiKey.objects.using(write_alias()).filter(unnoted, pk=row.pk)
    try:
        keys.update(last_used_at=DatabaseNow())
    except OperationalError:
        # The call goes on without the note.
        logger.warning("The use of API key %s was not noted.", row.pk)


def _note_refusal(row: ApiKey, request: Request) -> None:
    """Record the use of a dead key as an event, once in ``REFUSED_SECONDS``."""
    alias = write_alias()
    unnoted = _unnoted("refused_at", REFUSED_SECONDS)
    keys = ApiKey.objects.using(alias).filter(unnoted, pk=row.pk)
    with transaction.atomic(using=alias):
        # Of many requests at once only one updates the row.
        if keys.update(refused_at=DatabaseNow()):
            row.events.create(
                kind=ApiKeyEvent.Kind.REFUSED,
                request_id=request.parser_context["view"].request_id,
                remote_address=request.META.get("REMOTE_ADDR", "")[:64],
            )


def _is_signed(request: HttpRequest, row: ApiKey, claim: Claim) -> bool:
    """Return whether the signature is valid; a bearer key needs none."""
    if claim.signature is None:
        return True
    timestamp, signature = claim.signature
    if abs(time.time() - int(timestamp)) > MAX_CLOCK_SKEW_SECONDS:
        return False
    read_body(request)
    try:
        text = string_to_sign(
            timestamp,
            str(request.method),
            target_of(request) or request.get_full_path(),
            _host(request),
            request.headers.get("Idempotency-Key", ""),
            request.body,
        )
    except (DisallowedHost, ValueError):
        return False
    given = bytes.fromhex(signature)
    # Every key is compared, so that the time does not tell which one matched.
    matches = [
        compare_digest(
            hmac_digest(
                _hmac_secret(str(row.key_id), secret_key).encode(), text, "sha256"
            ),
            given,
        )
        for secret_key in (settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS)
    ]
    return any(matches)


def target_of(request: HttpRequest) -> str:
    """Return the path with its query as they were sent, or ``""`` if unknown.

    ``PATH_INFO`` is unquoted, and quoting it again may give another text than the
    client has signed.
    """
    scope = getattr(request, "scope", None)
    if scope is not None and scope.get("raw_path"):
        query = scope.get("query_string", b"")
        target = (scope["raw_path"] + (b"?" + query if query else b"")).decode("latin1")
    else:
        # gunicorn's name for it, and that of uWSGI, mod_wsgi and waitress.
        target = request.META.get("RAW_URI") or request.META.get("REQUEST_URI") or ""
    return str(target)


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
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()
