"""The ledger over HTTP: a call is sent until it has one of three outcomes.

Nothing here follows a redirect, keeps a cookie or reads the environment: calls
go through a ``requests`` adapter directly, below the session that does those
things. The adapter does not retry; the loop around it is the only one.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import socket
import sys
import threading
import time
import uuid
from contextvars import ContextVar
from http.client import HTTPException, HTTPResponse, parse_headers
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlencode

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from tenacity import RetryCallState, Retrying, retry_if_exception
from urllib3.connection import HTTPConnection, HTTPSConnection

from .. import __version__
from ..errors import (
    OUTAGE,
    MeterlyApiError,
    MeterlyAuthenticationError,
    MeterlyError,
    MeterlyForbiddenError,
    MeterlyNotSentError,
    MeterlyUnknownOutcomeError,
    api_error,
    is_known,
)
from ..wire import NEVER_MISSING, check_api_key, check_base_url
from .base import Transport
from .signing import Secret, signer_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from requests import PreparedRequest

    from .base import Call
    from .signing import Signer

__all__ = ["HttpTransport"]

MAX_ANSWER_BYTES = 2**20
POOL_SIZE = 64
#: A retry waits up to this many seconds, the next up to twice as long, and so on.
BACKOFF_FIRST, BACKOFF_MOST = 0.25, 2.0
#: Retries that are allowed at once, and by each call: when everything fails, a
#: ledger that is in trouble gets a tenth more requests, not three times as many.
BUDGET_SIZE, BUDGET_SHARE = 10.0, 0.1

_HEADERS = {
    "Accept": "application/json",
    # A body that is never unpacked cannot be a decompression bomb.
    "Accept-Encoding": "identity",
    "User-Agent": f"django-meterly/{__version__}",
}
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_encode = json.JSONEncoder(separators=(",", ":")).encode


def _is_ca_bundle(path: Any) -> bool:
    # bytes and numbers are paths, too, or open files.
    return isinstance(path, str | os.PathLike) and os.path.exists(path)


class HttpTransport(Transport):
    """Speaks the wire contract to Meterly Cloud or a self-hosted ledger.

    *base_url* may carry a path. *connect_timeout*, *read_timeout* (the longest
    silence) and *deadline* (the whole call, with all its attempts) are seconds; a
    host name is looked up by the operating system, whose own limits apply. A call
    is sent *max_attempts* times at most, with the same idempotency key and body.
    *signer* is called with the key and returns what authorizes each attempt
    (``signing``); by default the key's prefix decides. *proxies* (as ``requests``
    takes them, http and https only) and *verify* (``True``, or the path of a CA
    bundle) are the only way to change route and trust: the environment is not
    read. TLS is always verified. Raises ``ValueError`` for a key, a URL or a
    *verify* that cannot be meant.
    """

    base_url = ""
    advice = ' Check the base URL (METERLY["BASE_URL"]).'

    def __init__(
        self,
        api_key: str | None,
        *,
        base_url: str = "https://api.getmeterly.dev",
        connect_timeout: float = 2.0,
        read_timeout: float = 3.0,
        deadline: float = 8.0,
        max_attempts: int = 3,
        signer: Callable[[str], Signer] | None = None,
        allow_insecure_http: bool = False,
        proxies: Mapping[str, str] | None = None,
        verify: Literal[True] | str | os.PathLike[str] = True,
    ) -> None:
        # Or a debug page would show the key with the frame of an error.
        if isinstance(api_key, str):
            api_key = Secret(api_key)
        api_key = Secret(check_api_key(api_key))
        base_url = check_base_url(base_url, allow_insecure_http=allow_insecure_http)
        if verify is not True and not _is_ca_bundle(verify):
            raise ValueError(
                f"verify must be True or the path of a CA bundle, not {verify!r}: the "
                "ledger's certificate is always verified. For a ledger with a private "
                'CA name its file, as in verify="/etc/ssl/ledger-ca.pem".'
            )
        self._sign = (signer or signer_for)(api_key)
        self.base_url = base_url.rstrip("/")
        prepared = requests.PreparedRequest()
        prepared.prepare_url(base_url, None)
        # As it goes over the wire: the host in ASCII, the path quoted.
        self._prepared_url = (prepared.url or "").rstrip("/")
        self.connect_timeout = connect_timeout
        self.read_timeout = read_timeout
        self.deadline = deadline
        self.max_attempts = max_attempts
        self.verify = verify if verify is True else os.fspath(verify)
        self._proxies = dict(proxies or {})
        if any(url.lower().startswith("socks") for url in self._proxies.values()):
            raise ValueError("proxies must be http or https proxies, not SOCKS.")
        self._open_pool()

    @classmethod
    def from_settings(cls, settings: Any) -> HttpTransport:
        return cls(
            settings.API_KEY,
            signer=settings.SIGNER,
            base_url=settings.BASE_URL,
            connect_timeout=settings.CONNECT_TIMEOUT,
            read_timeout=settings.READ_TIMEOUT,
            deadline=settings.DEADLINE,
            max_attempts=settings.MAX_ATTEMPTS,
            allow_insecure_http=settings.ALLOW_INSECURE_HTTP,
        )

    def __repr__(self) -> str:
        return f"HttpTransport({self.base_url!r})"

    def __reduce__(self) -> Any:
        raise TypeError("HttpTransport holds an API key and cannot be pickled.")

    def close(self) -> None:
        self._adapter.close()

    def name_of(self, call: Call) -> str:
        return f"{call.method} {self.base_url}{call.path}"

    def send(self, call: Call) -> dict[str, Any]:
        if self._pid != os.getpid():
            self._open_pool()
        self._budget.deposit()
        operation = _Operation(call, self.deadline, self.read_timeout)
        try:
            return self._attempt(operation)
        except MeterlyError:
            pass
        try:
            return self._try_again(operation, call.attempts or self.max_attempts)
        except MeterlyError:
            pass
        # Out here, so that the errors of the attempts are no context of this one.
        raise operation.outcome()

    def _try_again(self, operation: _Operation, attempts: int) -> dict[str, Any]:
        """Send the call until it was sent *attempts* times, the first one included.

        Raises the last attempt's ``MeterlyError``, the first one's where there is
        nothing to be tried again.
        """
        budget = self._budget
        failed = iter(operation.errors[:])

        def attempt() -> dict[str, Any]:
            for error in failed:
                raise error
            return self._attempt(operation)

        def give_up(state: RetryCallState) -> bool:
            return (
                state.attempt_number >= attempts
                or state.upcoming_sleep >= operation.seconds_left
                or not budget.withdraw()
            )

        again: dict[str, Any] = Retrying(
            retry=retry_if_exception(_may_be_asked_again),
            wait=_wait,
            stop=give_up,
            reraise=True,
        )(attempt)
        return again

    def _attempt(self, operation: _Operation) -> dict[str, Any]:
        """Send the call once. Raises ``MeterlyError``, and notes it."""
        outer = sys.exception()
        operation.sent = False
        token = _operation.set(operation)
        try:
            return self._exchange(operation)
        except MeterlyError as exc:
            operation.errors.append(exc)
            raise
        except _FOREIGN as exc:
            cause = list(_chain(exc, outer))[-1]
            error = operation.failure(f"{type(cause).__name__}: {cause}")
        except BaseException as exc:
            # An interrupt, say. Sockets and headers are in the frames below, which
            # error reports show with their variables.
            for each in _chain(exc, outer):
                each.__traceback__ = None
            raise
        finally:
            _operation.reset(token)
        # Out here, so that no context drags along the prepared request and
        # urllib3's frames: both hold the authorization.
        operation.errors.append(error)
        raise error

    def _exchange(self, operation: _Operation) -> dict[str, Any]:
        request = operation.request
        if request is None:
            request = operation.request = self._prepare(operation)
        # Anew for each attempt, so that a signature's time is the attempt's.
        request = self._sign(request)
        response: Any = self._adapter.send(
            request,
            stream=True,
            timeout=(min(self.connect_timeout, operation.left()), self.read_timeout),
            verify=self.verify,
            proxies=self._proxies,
        )
        try:
            data = _json_object(response)
        finally:
            # Back in the pool when it was read to its end, gone otherwise.
            response.close()
        if response.status // 100 == 2 and data is not None:
            if response.headers.get("Idempotency-Replayed") == "true":
                data["replayed"] = True
            return data
        raise self._refusal(operation, response, data)

    def _prepare(self, operation: _Operation) -> PreparedRequest:
        call = operation.call
        # By hand: preparing it as requests does takes as long as half of sending it.
        request = requests.PreparedRequest()
        request.method = call.method
        request.url = self._prepared_url + call.path
        request.headers = CaseInsensitiveDict(_HEADERS)
        request.headers["X-Request-Id"] = operation.request_id
        if call.method == "POST":
            request.body = _encode(call.payload).encode()
            request.headers["Content-Length"] = str(len(request.body))
            request.headers["Content-Type"] = "application/json"
            request.headers["Idempotency-Key"] = call.idempotency_key or ""
        elif payload := call.payload:
            request.url = f"{request.url}?{urlencode(payload)}"
        return request

    def _refusal(
        self,
        operation: _Operation,
        response: urllib3.BaseHTTPResponse,
        data: dict[str, Any] | None,
    ) -> MeterlyError:
        """Return the error of an answer that is not a success of the ledger's."""
        call, request_id = operation.call, operation.request_id
        status = response.status
        error = (data or {}).get("error")
        details = dict(error) if isinstance(error, dict) else {}
        code, message = details.pop("code", None), details.pop("message", "")
        # A proxy, too, has pages for these.
        by_status = status == 429 or 500 <= status < 600
        # Other APIs have these, with codes of their own: a 404 of one of them says
        # nothing about a customer.
        by_code = status in (401, 403, 404)
        ours = is_known(code) if by_code else isinstance(code, str)
        if status == 404 and call.operation in NEVER_MISSING:
            ours = False
        if not by_status and not (400 <= status < 600 and ours):
            return MeterlyUnknownOutcomeError(
                f"{self.name_of(call)} (request {request_id}) was answered with status "
                f"{status} and a body that is not a ledger's.{self.advice}"
            )
        if _REQUEST_ID.fullmatch(named := response.headers.get("X-Request-Id", "")):
            request_id = named
        retry_after = response.headers.get("Retry-After", "")
        if re.fullmatch(r"[0-9]{1,5}", retry_after):
            details["retryAfter"] = int(retry_after)
        return api_error(
            status,
            code,
            message,
            request_id=request_id,
            method=call.method,
            path=call.path,
            details=details,
        )

    def _open_pool(self) -> None:
        # Of one process: a forked one must not speak on its parent's sockets.
        self._adapter = _Adapter(pool_connections=1, pool_maxsize=POOL_SIZE)
        self._budget = _RetryBudget()
        self._pid = os.getpid()


class _Operation:
    """One call: what time it has left, and what its attempts came to."""

    __slots__ = (
        "call",
        "ends_at",
        "errors",
        "read_timeout",
        "received",
        "request",
        "request_id",
        "sent",
    )

    def __init__(self, call: Call, deadline: float, read_timeout: float) -> None:
        seconds = deadline if call.timeout is None else min(call.timeout, deadline)
        self.ends_at = time.monotonic() + seconds
        self.call = call
        self.read_timeout = read_timeout
        self.request_id = uuid.uuid4().hex
        self.request: PreparedRequest | None = None
        self.errors: list[MeterlyError] = []
        # Of the attempt that is under way.
        self.sent = False
        self.received = 0

    @property
    def seconds_left(self) -> float:
        return self.ends_at - time.monotonic()

    def left(self) -> float:
        left = self.seconds_left
        if left <= 0:
            raise TimeoutError("the deadline of the call has passed")
        return left

    def failure(self, cause: str) -> MeterlyError:
        """Return the error of an attempt that ended without an answer."""
        where = f"{self.call.method} {self.call.path} (request {self.request_id})"
        if self.sent:
            return MeterlyUnknownOutcomeError(f"No usable answer to {where}: {cause}")
        return MeterlyNotSentError(f"{where} was not sent: {cause}")

    def outcome(self) -> MeterlyError:
        """Return the error of the whole call, which need not be the last one's.

        An answer decides. Without one, an attempt that may have arrived leaves
        the call unknown, whatever the later ones met, and it was not sent only
        if none of them was.
        """
        last = self.errors[-1]
        if not isinstance(last, OUTAGE):
            return last
        for error in reversed(self.errors):
            if isinstance(error, MeterlyUnknownOutcomeError):
                if error is last:
                    return last
                unknown = MeterlyUnknownOutcomeError(f"{error} Later: {last}")
                unknown.__cause__ = last
                return unknown
        for error in reversed(self.errors):
            if not isinstance(error, MeterlyNotSentError):
                return error
        return last


class _RetryBudget:
    """How many retries a transport may still make: a bucket that calls fill."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens = BUDGET_SIZE

    def deposit(self) -> None:
        with self._lock:
            self._tokens = min(self._tokens + BUDGET_SHARE, BUDGET_SIZE)

    def withdraw(self) -> bool:
        with self._lock:
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True


def _may_be_asked_again(exc: BaseException) -> bool:
    return isinstance(exc, OUTAGE) and not isinstance(
        exc, MeterlyAuthenticationError | MeterlyForbiddenError
    )


def _wait(state: RetryCallState) -> float:
    """Return the seconds before the next attempt: full jitter, doubled each time."""
    most = min(BACKOFF_FIRST * 2 ** (state.attempt_number - 1), BACKOFF_MOST)
    jitter = random.uniform(0, most)  # noqa: S311
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, MeterlyApiError):
        jitter += error.details.get("retryAfter", 0)
    return jitter


# urllib3 makes and pools the connections, so the operation cannot be handed down.
_operation: ContextVar[_Operation] = ContextVar("meterly_operation")


class _Reader(io.RawIOBase):
    """A socket's bytes, for as long and as many as the call allows.

    A socket's own time-out begins anew with every byte, so a server that sends
    one now and then would be listened to for ever.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        super().__init__()
        self._raw = raw
        self._sock = sock
        self._operation = _operation.get()
        self._operation.received = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        operation = self._operation
        self._sock.settimeout(min(operation.read_timeout, operation.left()))
        count = self._raw.readinto(buffer)
        operation.received += count or 0
        if operation.received > MAX_ANSWER_BYTES:
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

    def _read_status(self) -> Any:
        # http.client itself skips no other interim answer than 100.
        parent: Any = super()
        while True:
            version, status, reason = parent._read_status()
            if not 102 <= status < 200:
                return version, status, reason
            parse_headers(self.fp)


class _Watched(HTTPConnection):
    response_class = _Response

    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.is_closed:
            self.connect()
        operation = _operation.get()
        self.timeout = operation.left()
        # From here on nothing can prove that the ledger did not get the call.
        operation.sent = True
        super().request(*args, **kwargs)

    def _new_conn(self) -> socket.socket:
        # urllib3 would give every address of a host the whole time-out, and TLS
        # as much again.
        operation = _operation.get()
        patience: Any = self.timeout
        failure = OSError("the host has no address")
        addresses: Any = socket.getaddrinfo(
            self._dns_host, self.port, type=socket.SOCK_STREAM
        )
        for *_, address in addresses:
            try:
                sock = socket.create_connection(
                    address[:2], min(patience, operation.left())
                )
            except OSError as exc:
                failure = exc
            else:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.settimeout(max(min(patience, operation.seconds_left), 0.001))
                return sock
        raise failure


class _WatchedTls(_Watched, HTTPSConnection):
    pass


class _HttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Watched


class _HttpsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _WatchedTls


class _Adapter(HTTPAdapter):
    """An adapter without retries whose connections keep the deadline."""

    _pool: Any = None

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        _watch(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        return _watch(super().proxy_manager_for(*args, **kwargs))

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        # Every call goes to one host, with one proxy and one trust.
        if self._pool is None:
            self._pool = super().get_connection_with_tls_context(*args, **kwargs)
        return self._pool

    def build_response(self, req: Any, resp: Any) -> Any:
        """Return urllib3's own response: no cookies, nothing to be unpacked."""
        return resp

    def close(self) -> None:
        self._pool = None
        # Left alone, urllib3 closes its sockets when they are collected.
        for manager in (self.poolmanager, *self.proxy_manager.values()):
            for key in manager.pools.keys():  # noqa: SIM118 (not iterable)
                manager.pools[key].close()
        super().close()


def _watch(manager: Any) -> Any:
    manager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
    return manager


#: What requests, urllib3, json and the standard library raise on the way to a
#: ledger; their warnings too, which a program may have turned into errors.
_FOREIGN = (
    requests.RequestException,
    requests.exceptions.RequestsWarning,
    urllib3.exceptions.HTTPError,
    urllib3.exceptions.HTTPWarning,
    HTTPException,
    OSError,
    ValueError,
)


def _chain(
    exc: BaseException | None, outer: BaseException | None
) -> Iterator[BaseException]:
    """Go down from *exc* to what caused it, but not to what the caller handles."""
    while exc is not None and exc is not outer:
        yield exc
        exc = exc.__cause__ or exc.__context__


def _json_object(response: urllib3.BaseHTTPResponse) -> dict[str, Any] | None:
    body = response.read(decode_content=False)
    try:
        data = _decode(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON.")


# Python's own decoder takes NaN and Infinity for numbers.
_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode
