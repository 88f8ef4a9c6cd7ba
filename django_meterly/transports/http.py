"""The ledger over HTTP: one request a call, and one of three outcomes.

Nothing here follows a redirect, keeps a cookie or reads the environment: calls
go through a ``requests`` adapter directly, below the session that does those
things.
"""

from __future__ import annotations

import io
import json
import os
import re
import time
import uuid
from contextvars import ContextVar
from http.client import HTTPException, HTTPResponse
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection

from .. import __version__
from ..errors import (
    MeterlyError,
    MeterlyNotSentError,
    MeterlyUnknownOutcomeError,
    api_error,
)
from .base import Transport

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from requests import PreparedRequest, Response

    from .base import Call

__all__ = ["HttpTransport"]

MAX_ANSWER_BYTES = 2**20
POOL_SIZE = 64


class HttpTransport(Transport):
    """Speaks the wire contract to Meterly Cloud or a self-hosted ledger.

    *base_url* may carry a path. *connect_timeout*, *read_timeout* (the longest
    silence) and *deadline* (the whole call) are seconds; a host name is looked
    up by the operating system, whose own limits apply. *proxies* (as ``requests``
    takes them, http and https only) and *verify* (``True``, or the path of a CA
    bundle) are the only way to change route and trust: the environment is not
    read. Raises ``ValueError`` for a key or URL that cannot be meant.
    """

    base_url = ""

    def __init__(
        self,
        api_key: str | None,
        *,
        base_url: str = "https://api.getmeterly.dev",
        connect_timeout: float = 2.0,
        read_timeout: float = 3.0,
        deadline: float = 8.0,
        allow_insecure_http: bool = False,
        proxies: Mapping[str, str] | None = None,
        verify: bool | str = True,
    ) -> None:
        self._auth = _Bearer(api_key)
        problem = _key_problem(api_key)
        # Or a debug page would show the key with the frame of the error.
        del api_key
        if problem := problem or _url_problem(base_url, allow_insecure_http):
            raise ValueError(problem)
        self.base_url = base_url.rstrip("/")
        self.connect_timeout = connect_timeout
        self.read_timeout = read_timeout
        self.deadline = deadline
        self.verify = verify
        self._proxies = dict(proxies or {})
        if any(url.lower().startswith("socks") for url in self._proxies.values()):
            raise ValueError("proxies must be http or https proxies, not SOCKS.")
        self._open_pool()

    @classmethod
    def from_settings(cls, settings: Any) -> HttpTransport:
        return cls(
            settings.API_KEY,
            base_url=settings.BASE_URL,
            connect_timeout=settings.CONNECT_TIMEOUT,
            read_timeout=settings.READ_TIMEOUT,
            deadline=settings.DEADLINE,
            allow_insecure_http=settings.ALLOW_INSECURE_HTTP,
        )

    def __repr__(self) -> str:
        return f"HttpTransport({self.base_url!r})"

    def __reduce__(self) -> Any:
        raise TypeError("HttpTransport holds an API key and cannot be pickled.")

    def close(self) -> None:
        self._adapter.close()

    def send(self, call: Call) -> dict[str, Any]:
        timeout = self.deadline if call.timeout is None else call.timeout
        attempt = _Attempt(min(timeout, self.deadline), self.read_timeout)
        request_id = uuid.uuid4().hex
        token = _attempt.set(attempt)
        try:
            return self._exchange(call, request_id, attempt)
        except _FOREIGN as exc:
            cause = _root(exc)
        finally:
            _attempt.reset(token)
        # Raised out here, so that no context drags along the prepared request
        # and urllib3's frames: both hold the API key.
        where = f"{call.method} {call.path}"
        if not attempt.sent:
            raise MeterlyNotSentError(
                f"{where} was not sent to {self.base_url}: {cause}"
            )
        raise MeterlyUnknownOutcomeError(
            f"No usable answer to {where} (request {request_id}): {cause}"
        )

    def _exchange(
        self, call: Call, request_id: str, attempt: _Attempt
    ) -> dict[str, Any]:
        request = self._prepare(call, request_id)
        if self._pid != os.getpid():
            self._open_pool()
        response = self._adapter.send(
            request,
            stream=True,
            timeout=(min(self.connect_timeout, attempt.left()), self.read_timeout),
            verify=self.verify,
            proxies=self._proxies,
        )
        try:
            data = _json_object(response)
        finally:
            # Back in the pool when it was read to its end, gone otherwise.
            response.raw.close()
        if response.status_code // 100 == 2 and data is not None:
            return data
        raise _refusal(call, response, data, request_id)

    def _prepare(self, call: Call, request_id: str) -> PreparedRequest:
        url = self.base_url + call.path
        headers = {
            "Accept": "application/json",
            # A body that is never unpacked cannot be a decompression bomb.
            "Accept-Encoding": "identity",
            "User-Agent": f"django-meterly/{__version__}",
            "X-Request-Id": request_id,
        }
        body = None
        if call.method == "POST":
            body = json.dumps(call.payload, separators=(",", ":")).encode()
            headers["Content-Type"] = "application/json"
            headers["Idempotency-Key"] = call.idempotency_key or ""
        elif call.payload:
            url = f"{url}?{urlencode(call.payload)}"
        request = requests.PreparedRequest()
        # requests runs auth last, on the bytes and headers that will be sent.
        request.prepare(
            method=call.method, url=url, headers=headers, data=body, auth=self._auth
        )
        return request

    def _open_pool(self) -> None:
        # Of one process: a forked one must not speak on its parent's sockets.
        self._adapter = _Adapter(pool_connections=1, pool_maxsize=POOL_SIZE)
        self._pid = os.getpid()


class _Bearer:
    """Sends the API key as a bearer token; its repr hides it."""

    __slots__ = ("_header",)

    def __init__(self, api_key: str | None) -> None:
        self._header = f"Bearer {api_key}"

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        request.headers["Authorization"] = self._header
        return request

    def __repr__(self) -> str:
        return "<bearer key>"


class _Attempt:
    """What one call may still take, and whether the request has left."""

    __slots__ = ("ends_at", "read_timeout", "received", "sent")

    def __init__(self, seconds: float, read_timeout: float) -> None:
        self.ends_at = time.monotonic() + seconds
        self.read_timeout = read_timeout
        self.received = 0
        self.sent = False

    def left(self) -> float:
        left = self.ends_at - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline of the call has passed")
        return left


# urllib3 makes and pools the connections, so the attempt cannot be handed down.
_attempt: ContextVar[_Attempt] = ContextVar("meterly_attempt")


class _Reader(io.RawIOBase):
    """A socket's bytes, for as long and as many as the attempt allows.

    A socket's own time-out begins anew with every byte, so a server that sends
    one now and then would be listened to for ever.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        super().__init__()
        self._raw = raw
        self._sock = sock
        self._attempt = _attempt.get()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        attempt = self._attempt
        self._sock.settimeout(min(attempt.read_timeout, attempt.left()))
        count = self._raw.readinto(buffer)
        attempt.received += count or 0
        if attempt.received > MAX_ANSWER_BYTES:
            raise OSError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        buffered: Any = self.fp
        self.fp = io.BufferedReader(_Reader(buffered.detach(), sock))


class _Watched(HTTPConnection):
    response_class = _Response

    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.is_closed:
            self.connect()
        attempt = _attempt.get()
        self.timeout = attempt.left()
        # From here on nothing can prove that the ledger did not get the call.
        attempt.sent = True
        super().request(*args, **kwargs)


class _WatchedTls(_Watched, HTTPSConnection):
    pass


class _HttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Watched


class _HttpsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _WatchedTls


class _Adapter(HTTPAdapter):
    """An adapter without retries whose connections keep the deadline."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        _watch(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        return _watch(super().proxy_manager_for(*args, **kwargs))

    def close(self) -> None:
        # Left alone, urllib3 closes its sockets when they are collected.
        for manager in (self.poolmanager, *self.proxy_manager.values()):
            for key in manager.pools.keys():  # noqa: SIM118 (not iterable)
                manager.pools[key].close()
        super().close()


def _watch(manager: Any) -> Any:
    manager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
    return manager


#: What requests, urllib3 and the standard library raise on the way to a ledger.
_FOREIGN = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    HTTPException,
    OSError,
    UnicodeError,
)


def _root(exc: BaseException) -> str:
    """Return what went wrong at the bottom, without the wrapping."""
    while below := exc.__cause__ or exc.__context__:
        exc = below
    return f"{type(exc).__name__}: {exc}"


def _json_object(response: Response) -> dict[str, Any] | None:
    body = b"".join(response.raw.stream(2**16, decode_content=False))
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _refusal(
    call: Call, response: Response, data: dict[str, Any] | None, request_id: str
) -> MeterlyError:
    status = response.status_code
    if not 400 <= status < 600:
        return MeterlyUnknownOutcomeError(
            f"The ledger answered {call.method} {call.path} (request {request_id}) "
            f"with status {status} and no result: not what a ledger does."
        )
    error = (data or {}).get("error")
    details = dict(error) if isinstance(error, dict) else {}
    code, message = details.pop("code", None), details.pop("message", "")
    retry_after = response.headers.get("Retry-After", "")
    if re.fullmatch(r"[0-9]{1,5}", retry_after):
        details["retryAfter"] = int(retry_after)
    return api_error(
        status,
        code if isinstance(code, str) else None,
        message if isinstance(message, str) else "",
        request_id=response.headers.get("X-Request-Id", request_id),
        method=call.method,
        path=call.path,
        details=details,
    )


def _key_problem(api_key: object) -> str:
    if not api_key:
        return (
            "An API key is needed to reach the ledger over HTTP: "
            'give MeterlyClient(api_key=...) or set METERLY["API_KEY"].'
        )
    if not isinstance(api_key, str) or not re.fullmatch(r"[\x21-\x7e]+", api_key):
        return "The API key must be visible ASCII characters without spaces."
    if api_key.startswith("mk_hmac_"):
        # Its secret must never travel, so it cannot serve as a bearer token.
        return "HMAC keys are not supported; use a bearer key."
    return ""


def _url_problem(base_url: str, allow_insecure_http: bool) -> str:
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"base_url must be an http or https URL, not {base_url!r}."
    if parts.username is not None or parts.query or parts.fragment:
        # Not shown: whatever stands before the @ may be a secret.
        return "base_url must not have a user, a query or a fragment."
    private = parts.scheme == "https" or _is_loopback(parts.hostname)
    if not private and not allow_insecure_http:
        return (
            f"base_url {base_url!r} would send the API key in the clear. Use https, "
            "or set allow_insecure_http (ALLOW_INSECURE_HTTP) on a trusted network."
        )
    return ""


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
