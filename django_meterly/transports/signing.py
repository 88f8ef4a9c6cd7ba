"""How a request proves its sender: with a bearer key, or with a signature.

A *signer* is made with the API key, and called with each prepared request when its
method, URL, headers and body are final. It returns the request, as an auth object of
``requests`` does. ``METERLY["SIGNER"]`` or ``MeterlyClient(signer=...)`` names another
signer.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..wire import string_to_sign

if TYPE_CHECKING:
    from collections.abc import Callable

    from requests import PreparedRequest

    Signer = Callable[[PreparedRequest], PreparedRequest]

__all__ = ["BearerSigner", "HmacSigner", "Secret", "signer_for"]

HMAC_PREFIX = "mk_hmac_"
_HMAC_KEY = re.compile(r"mk_hmac_([A-Za-z0-9]+)_([\x21-\x7e]+)")
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Secret(str):
    """A string whose ``repr`` does not show it.

    Use it for API keys in settings and local variables: debug pages, error reports and
    ``manage.py diffsettings`` print a ``repr``. It cannot be pickled. For example::

        >>> Secret("mk_live_...")
        '********'
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "'********'"

    def __deepcopy__(self, memo: dict[int, Any]) -> Secret:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("A Secret cannot be pickled.")


class BearerSigner:
    """Sends the API key itself, as a bearer token."""

    __slots__ = ("_header",)

    def __init__(self, api_key: str) -> None:
        self._header = Secret(f"Bearer {api_key}")

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        request.headers["Authorization"] = self._header
        return request

    def __reduce__(self) -> Any:
        raise TypeError("BearerSigner holds an API key and cannot be pickled.")


class HmacSigner:
    """Signs with an HMAC key, ``mk_hmac_<keyId>_<secret>``, and never sends the secret.

    It signs the time, method, path with query, host, idempotency key and body as they
    are sent. Raises ``ValueError`` for a key of another form.
    """

    __slots__ = ("_key_id", "_mac")

    def __init__(self, api_key: str) -> None:
        match = _HMAC_KEY.fullmatch(api_key)
        # A debug page would show the key with the frame of the error.
        del api_key
        if match is None:
            raise ValueError("An HMAC key has the form mk_hmac_<keyId>_<secret>.")
        self._key_id = match[1]
        # Copied for each request, so that the secret itself is not kept.
        self._mac = hmac.new(match[2].encode(), digestmod=hashlib.sha256)

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        host = _host(request.url or "")
        # http.client might write another Host header than the signed one.
        request.headers["Host"] = host
        timestamp = str(int(time.time()))
        mac = self._mac.copy()
        mac.update(
            string_to_sign(
                timestamp,
                request.method or "",
                request.path_url,
                host,
                request.headers.get("Idempotency-Key", ""),
                _bytes(request.body),
            )
        )
        request.headers["Authorization"] = Secret(
            f"METERLY-HMAC-SHA256 keyId={self._key_id}, timestamp={timestamp}, "
            f"signature={mac.hexdigest()}"
        )
        return request

    def __reduce__(self) -> Any:
        raise TypeError("HmacSigner holds an API key and cannot be pickled.")


def signer_for(api_key: str) -> Signer:
    """Return the signer that goes with the form of *api_key*."""
    if api_key.startswith(HMAC_PREFIX):
        return HmacSigner(api_key)
    return BearerSigner(api_key)


def _host(url: str) -> str:
    """Return the Host header: lower-case, without the scheme's own port."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if ":" in host:
        host = f"[{host}]"
    if parts.port in (None, _DEFAULT_PORTS[parts.scheme]):
        return host
    return f"{host}:{parts.port}"


def _bytes(body: Any) -> bytes:
    return body.encode() if isinstance(body, str) else body or b""
