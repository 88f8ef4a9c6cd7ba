"""The ledger over HTTP: a call is sent until it has one of three outcomes.

``send`` encodes the call once. Each attempt signs the request, sends it and decodes
the answer; ``retries`` decides about the next attempt.

This module follows no redirect, keeps no cookie and reads no environment variable: it
uses an adapter of ``requests`` directly, and not a session, which does those things.
"""

from __future__ import annotations

import json
import os
import re
import sys
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlencode

import requests
from requests.structures import CaseInsensitiveDict

from .. import __version__
from ..errors import (
    MeterlyApiError,
    MeterlyError,
    MeterlyNotFoundError,
    MeterlyNotSentError,
    MeterlyUnknownOutcomeError,
    api_error,
    is_known,
)
from ..wire import NEVER_MISSING, check_api_key, check_base_url, clean_text, shown
from . import retries
from .base import Transport
from .connections import FOREIGN, Adapter, Exchange, current
from .signing import Secret, signer_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from django.core.checks import CheckMessage
    from requests import PreparedRequest

    from .base import Call
    from .signing import Signer

__all__ = ["HttpTransport", "Request"]

_HEADERS = {
    "Accept": "application/json",
    # A body that is never unpacked cannot be a decompression bomb.
    "Accept-Encoding": "identity",
    "User-Agent": f"django-meterly/{__version__}",
}
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_PATH = re.compile(r"/[\x21\x22\x24-\x7e]*")
_HEADER = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")
_encode = json.JSONEncoder(separators=(",", ":")).encode
#: The exceptions of a ``decode`` that meets a body of another shape.
_UNDECODABLE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


@dataclass(frozen=True, slots=True)
class Request:
    """A call in the form in which it is sent; ``HttpTransport.encode`` returns it.

    *path* begins with a slash, comes after the base URL, and may have a query. The
    transport adds ``Content-Length`` and ``X-Request-Id`` to the *headers*. Raises
    ``ValueError`` for a path or header that cannot be sent as it is. For example::

        Request("GET", "/accounts/7?unit=tokens")
    """

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None

    def __post_init__(self) -> None:
        if not _PATH.fullmatch(self.path):
            raise ValueError(
                "A request's path must begin with '/' and be visible ASCII characters "
                f"without '#', not {shown(self.path)}."
            )
        for name, value in self.headers.items():
            if not _HEADER.fullmatch(value):
                raise ValueError(
                    f"The header {shown(name)} must be printable ASCII characters, not "
                    f"{shown(value)}."
                )


class HttpTransport(Transport):
    """Speaks the wire contract to Meterly Cloud or a self-hosted ledger.

    *base_url* may have a path. *connect_timeout*, *read_timeout* (the longest silence)
    and *deadline* (the whole call, with all its attempts) are seconds. The operating
    system looks up the host name, within its own limits. A call is sent at most
    *max_attempts* times, with the same idempotency key and body.

    *signer* is called with the key, and returns a function that authorizes each attempt
    (``signing``). By default, the key's prefix decides. *proxies* (as in ``requests``,
    http and https only) and *verify* (``True``, or the path of a CA bundle) are the
    only way to change route and trust. TLS is always verified. Raises ``ValueError``
    for an invalid key, URL, proxy or *verify*.

    For another wire format, override ``encode`` and ``decode``. Attempts, deadlines,
    connections and the three outcomes stay as they are.
    """

    base_url = ""
    advice = ' Check the base URL (METERLY["BASE_URL"]).'
    #: Makes the signer from the key, if no other one is given.
    signer: Callable[[str], Signer] = staticmethod(signer_for)

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
        # A debug page would show the plain key with the frame of an error.
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
        self._sign = (signer or self.signer)(api_key)
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

    @classmethod
    def check(cls, settings: Any) -> list[CheckMessage]:
        """Report what the first call would raise: a missing API key, for example."""
        from django.core.checks import Error

        try:
            cls.from_settings(settings).close()
        except (TypeError, ValueError) as exc:
            return [
                Error(
                    f"METERLY cannot set up the transport: {exc}",
                    hint=(
                        "Set METERLY['API_KEY'] (METERLY_API_KEY with from_env), or "
                        "set METERLY['TRANSPORT'] to "
                        "'django_meterly.ledger.transport.LedgerTransport' to keep the "
                        "credits in your own database."
                    ),
                    id="meterly.E006",
                )
            ]
        return []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    def __reduce__(self) -> Any:
        raise TypeError("HttpTransport holds an API key and cannot be pickled.")

    def close(self) -> None:
        self._adapter.close()

    def name_of(self, call: Call) -> str:
        request = self.encode(call)
        return f"{request.method} {self.base_url}{_without_query(request)}"

    # The wire format

    def encode(self, call: Call) -> Request:
        """Return the request for *call*. Override this for another wire format.

        The same call always has to give the same method, path and body: a call whose
        outcome is unknown is sent again, perhaps by another process. Raises
        ``ValueError`` if the call cannot be sent; that is a ``MeterlyNotSentError``.
        """
        path, payload = call.path, call.payload
        if call.method != "POST":
            query = f"?{urlencode(payload)}" if payload else ""
            return Request(call.method, f"{path}{query}")
        headers = {"Content-Type": "application/json"}
        if call.idempotency_key:
            headers["Idempotency-Key"] = call.idempotency_key
        return Request(call.method, path, headers, _encode(payload).encode())

    def decode(
        self, call: Call, status: int, headers: Mapping[str, str], body: bytes
    ) -> dict[str, Any]:
        """Return the answer's body with its wire names, or raise its error.

        Override this for another wire format. It gets every answer but redirects;
        *headers* are case-insensitive. Raise what ``api_error`` returns if the ledger
        certainly said no. Raise ``ValueError`` (or ``KeyError``, ``TypeError``, ...) if
        the answer may come from another server, for example the page of a proxy.

        The transport decides the rest. Only a 2xx can be a success. A 5xx is always an
        unknown outcome, and so is a body that cannot be decoded, except with a 429.
        """
        data = _json(body.decode("utf-8-sig"))
        if not isinstance(data, dict):
            raise ValueError("the body is not a JSON object")
        if status // 100 == 2:
            if headers.get("Idempotency-Replayed") == "true":
                data["replayed"] = True
            return data
        error = data.get("error")
        details = dict(error) if isinstance(error, dict) else {}
        code, message = details.pop("code", None), details.pop("message", "")
        # Other APIs answer these, too, with codes that the contract does not know. A
        # 404 of one of them says nothing about a customer.
        known = is_known(code) if status in (401, 403, 404) else isinstance(code, str)
        if not known and status != 429 and status < 500:
            raise ValueError("the body names no error code of a ledger")
        raise api_error(status, code, message, details=details)

    # Sending

    def send(self, call: Call) -> dict[str, Any]:
        if self._pid != os.getpid():
            self._open_pool()
        sending = self._prepare(call)
        return retries.send(
            lambda: self._attempt(sending),
            sending.exchange,
            call.attempts or self.max_attempts,
            self._budget,
        )

    def _prepare(self, call: Call) -> _Sending:
        seconds = self.deadline
        if call.timeout is not None:
            seconds = min(call.timeout, seconds)
        exchange = Exchange(seconds, self.read_timeout)
        try:
            request = self.encode(call)
        except MeterlyError:
            raise
        except ValueError as exc:
            raise MeterlyNotSentError(f"{call.operation} was not sent: {exc}") from exc
        request_id = uuid.uuid4().hex
        # By hand: preparing it as requests does takes as long as half of sending it.
        prepared = requests.PreparedRequest()
        prepared.method = request.method
        prepared.url = self._prepared_url + request.path
        prepared.headers = CaseInsensitiveDict(_HEADERS)
        prepared.headers["X-Request-Id"] = request_id
        prepared.headers.update(request.headers)
        if request.body is not None:
            prepared.body = request.body
            prepared.headers["Content-Length"] = str(len(request.body))
        return _Sending(call, request, request_id, prepared, exchange)

    def _attempt(self, sending: _Sending) -> dict[str, Any]:
        """Send the call once, or raise ``MeterlyError``."""
        outer = sys.exception()
        sending.exchange.sent = False
        token = current.set(sending.exchange)
        try:
            return self._exchange(sending)
        except MeterlyError:
            raise
        except FOREIGN as exc:
            cause = list(_chain(exc, outer))[-1]
            error = sending.failure(f"{type(cause).__name__}: {cause}")
        except BaseException as exc:
            # An interrupt, for example. The frames below hold sockets and headers, and
            # error reports show a frame's variables.
            for each in _chain(exc, outer):
                each.__traceback__ = None
            raise
        finally:
            current.reset(token)
        # Outside the except clause: the context would keep the prepared request and
        # urllib3's frames, which both hold the authorization.
        raise error

    def _exchange(self, sending: _Sending) -> dict[str, Any]:
        # Each attempt is signed again, so that the signature has the attempt's time.
        request = self._sign(sending.prepared)
        left = sending.exchange.left()
        response: Any = self._adapter.send(
            request,
            stream=True,
            timeout=(min(self.connect_timeout, left), self.read_timeout),
            verify=self.verify,
            proxies=self._proxies,
        )
        try:
            body = response.read(decode_content=False)
        finally:
            # This returns the connection to the pool if the answer was read to its end.
            response.close()
        return self._read(sending, response.status, response.headers, body)

    def _read(
        self, sending: _Sending, status: int, headers: Mapping[str, str], body: bytes
    ) -> dict[str, Any]:
        """Return the decoded answer, or raise its error, in every wire format."""
        error: MeterlyApiError | None = None
        why = ""
        if status // 100 in (2, 4, 5):
            try:
                answer = self.decode(sending.call, status, headers, body)
            except MeterlyApiError as exc:
                error = exc
            except _UNDECODABLE as exc:
                why = f" ({type(exc).__name__}: {clean_text(str(exc), 200)})"
            else:
                if status // 100 == 2:
                    return answer
        raise self._refusal(sending, status, headers, error, why)

    def _refusal(
        self,
        sending: _Sending,
        status: int,
        headers: Mapping[str, str],
        error: MeterlyApiError | None,
        why: str,
    ) -> MeterlyError:
        """Return the error of an answer that is not a success.

        *error* is what ``decode`` made of the answer, and *why* is the reason if it
        could not decode it.
        """
        if isinstance(error, MeterlyNotFoundError) and (
            sending.call.operation in NEVER_MISSING
        ):
            error = None
        if status // 100 == 5 and not isinstance(error, MeterlyUnknownOutcomeError):
            error = None
        if error is None and (status == 429 or status // 100 == 5):
            # A proxy answers these, too, with any page.
            error = api_error(status, None)
        if error is None:
            return MeterlyUnknownOutcomeError(
                f"{sending.request.method} {self.base_url}{sending.path} "
                f"(request {sending.request_id}) was answered with status {status} and "
                f"a body that is not a ledger's{why}.{self.advice}"
            )
        error.method, error.path = sending.request.method, sending.path
        named = headers.get("X-Request-Id", "")
        if _REQUEST_ID.fullmatch(named):
            error.request_id = named
        error.request_id = error.request_id or sending.request_id
        retry_after = headers.get("Retry-After", "")
        if re.fullmatch(r"[0-9]{1,5}", retry_after):
            error.details["retryAfter"] = int(retry_after)
        return error

    def _open_pool(self) -> None:
        # For this process: a forked one must not speak on its parent's sockets.
        self._adapter = Adapter()
        self._budget = retries.RetryBudget()
        self._pid = os.getpid()


@dataclass(slots=True)
class _Sending:
    """A call that is being sent."""

    call: Call
    request: Request
    request_id: str
    prepared: PreparedRequest
    exchange: Exchange

    @property
    def path(self) -> str:
        return _without_query(self.request)

    def failure(self, cause: str) -> MeterlyError:
        """Return the error of an attempt that ended without an answer."""
        where = f"{self.request.method} {self.path} (request {self.request_id})"
        if self.exchange.sent:
            return MeterlyUnknownOutcomeError(f"No usable answer to {where}: {cause}")
        return MeterlyNotSentError(f"{where} was not sent: {cause}")


def _without_query(request: Request) -> str:
    return request.path.partition("?")[0]


def _is_ca_bundle(path: Any) -> bool:
    # bytes and numbers are paths, too, or open files.
    return isinstance(path, str | os.PathLike) and os.path.exists(path)


def _chain(
    exc: BaseException | None, outer: BaseException | None
) -> Iterator[BaseException]:
    """Go down from *exc* to its cause, but not to what the caller handles."""
    while exc is not None and exc is not outer:
        yield exc
        exc = exc.__cause__ or exc.__context__


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON.")


# Python's own decoder takes NaN and Infinity for numbers.
_json = json.JSONDecoder(parse_constant=_refuse_constant).decode
