"""Who calls the ledger's API: bearer keys, of which only a hash is kept."""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING

from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed

from .models import ApiKey
from .operations import write_alias

if TYPE_CHECKING:
    from rest_framework.request import Request

    from .models import Workspace


def create_api_key(
    workspace: Workspace, name: str, *, test: bool = False
) -> tuple[ApiKey, str]:
    """Return a new key of *workspace*: its row, and the key itself.

    The key cannot be had again: the row only has its SHA-256. *test* keys differ
    in their prefix, for people to tell them apart.
    """
    key = f"mk_{'test' if test else 'live'}_{secrets.token_urlsafe(32)}"
    row = ApiKey.objects.create(
        workspace=workspace,
        name=name,
        prefix=key[:12],
        last4=key[-4:],
        key_hash=_hash(key),
    )
    return row, key


class BearerAuthentication(BaseAuthentication):
    """Lets in whoever has a bearer key; ``request.auth`` is its ``ApiKey``."""

    def authenticate(self, request: Request) -> tuple[None, ApiKey]:
        # Every failure reads the same, so that nothing is learnt from it.
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            # Unsalted, because the key is 256 random bits: nobody guesses it
            # from the hash, and looking it up by the hash takes no secret time.
            rows = ApiKey.objects.using(write_alias()).active()
            rows = rows.filter(key_hash=_hash(key)).select_related("workspace")
            if row := rows.first():
                return None, row
        raise AuthenticationFailed("A valid API key is required.")

    def authenticate_header(self, request: Request) -> str:
        return "Bearer"


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
