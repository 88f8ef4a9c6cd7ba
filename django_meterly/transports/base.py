"""The seam between the client and a ledger: one call in, one answer out.

Also the limits of the wire contract, because both ends of the seam keep them:
the client before anything is sent, the ledger before anything is moved.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_AMOUNT = 2**63 - 1
MAX_KEY_LENGTH = 255
#: Of a key that the caller of a guard names: other keys are derived from it.
MAX_CALLER_KEY_LENGTH = 200
MAX_TEXT_LENGTH = 255
MAX_DESCRIPTION_LENGTH = 1000
MAX_TTL_SECONDS = 86400

# operation -> (method, path). Path parameters are taken out of the arguments;
# what is left is the JSON body of a POST or the query of a GET.
ROUTES: dict[str, tuple[str, str]] = {
    "create_customer": ("POST", "/v1/customers"),
    "find_customer": ("GET", "/v1/customers"),
    "grant_credits": ("POST", "/v1/grants"),
    "get_balance": ("GET", "/v1/customers/{customerId}/balance"),
    "get_balances": ("GET", "/v1/customers/{customerId}/balances"),
    "add_credits": ("POST", "/v1/customers/{customerId}/credits/add"),
    "use_credits": ("POST", "/v1/customers/{customerId}/credits/use"),
    "reserve_credits": ("POST", "/v1/reservations"),
    "get_reservation": ("GET", "/v1/reservations/{reservationId}"),
    "commit_reservation": ("POST", "/v1/reservations/{reservationId}/commit"),
    "release_reservation": ("POST", "/v1/reservations/{reservationId}/release"),
    "extend_reservation": ("POST", "/v1/reservations/{reservationId}/extend"),
    "list_entries": ("GET", "/v1/customers/{customerId}/entries"),
}


#: Calls that name nothing which could be missing: their 404 is not a ledger's.
NEVER_MISSING = ("create_customer", "find_customer", "grant_credits")


@dataclass(frozen=True, slots=True)
class Statement:
    """SQL of the caller's that is to be one statement with a movement.

    *source* is a SELECT of the one row that the movement depends on: it locks a row, or
    it finds who pays. If there is no such row, nothing is done, and ``NothingFound`` is
    raised. Else its columns are in *found* when the call returns or raises.

    *sql* writes a row. It may read two relations: ``source``, and ``movement``, which
    has one row if the call moved credits, and none if it did not. The column
    ``movement.reservation_id`` is the hold's.

    With a ``reserve_credits``, the source finds the customer. Its first column,
    ``payer_id``, stands for the ``FOUND`` of the call, and its second, ``scope``, goes
    before the call's idempotency key.
    """

    sql: str
    parameters: tuple[Any, ...]
    source: str
    source_parameters: tuple[Any, ...] = ()
    found: list[Any] = field(default_factory=list)


#: The ``customer_id`` of a reserve whose ``Statement`` finds the customer.
FOUND = "found"


class NothingFound(Exception):
    """The source of a ``Statement`` found no row, and so nothing was done."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the wire contract, on its way to a ledger.

    *operation* is a key of ``ROUTES``. *arguments* have their names on the wire
    (camelCase), those of the path included. *idempotency_key* is set on every
    POST. *timeout* is the number of seconds the whole call may take, and
    *attempts* how often it may be sent in them; ``None`` leaves either to the
    transport. A *statement* is for transports with ``carries_statements``.
    """

    operation: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    idempotency_key: str | None = None
    timeout: float | None = None
    attempts: int | None = None
    statement: Statement | None = None

    @property
    def method(self) -> str:
        return ROUTES[self.operation][0]

    @property
    def path(self) -> str:
        """The path below the base URL, with its parameters filled in."""
        return ROUTES[self.operation][1].format_map(self.arguments)

    @property
    def payload(self) -> dict[str, Any]:
        """The arguments that do not stand in the path."""
        template = ROUTES[self.operation][1]
        return {
            name: value
            for name, value in self.arguments.items()
            if f"{{{name}}}" not in template
        }


class Transport:
    """Carries calls to a ledger.

    A transport raises the exceptions of ``django_meterly.errors`` and no others,
    and may be used from several threads at once. The client checks every answer, so a
    transport only has to decode it. For example::

        class MyTransport(Transport):
            def send(self, call):
                status, body = my_gateway(call.method, call.path, call.payload)
                if status < 400:
                    return body
                raise api_error(status, body["error"]["code"])
    """

    #: Whether a commit may name less than the hold. Where not, the client commits
    #: all of it and adds the rest again.
    partial_commit = True
    #: Whether ``async`` code has to call it on the thread that Django keeps for
    #: synchronous code, as whatever uses Django's database connections has to be.
    thread_sensitive = False
    #: What to look at when the answers are not a ledger's, for error messages.
    advice = ""
    #: Whether the ledger answered this process the last time; kept by the client.
    reachable = True

    @classmethod
    def from_settings(cls, settings: Any) -> Transport:
        """Return a transport set up by *settings* (``django_meterly.conf``)."""
        return cls()

    @classmethod
    def longest_hold(cls) -> int:
        """Return for how many seconds the ledger holds credits at most."""
        return MAX_TTL_SECONDS

    def send(self, call: Call) -> dict[str, Any]:
        """Carry out *call* and return the answer's body, with its wire names.

        The body is a ``dict`` of what JSON can say: texts, whole numbers, lists and
        ``dict``. Raises ``MeterlyApiError`` when the ledger said no,
        ``MeterlyNotSentError`` when the call provably never reached it, and
        ``MeterlyUnknownOutcomeError`` when it may or may not have been applied.

        If the ledger says that an earlier call had the same key, the body has
        ``"replayed": True``.
        """
        raise NotImplementedError

    def name_of(self, call: Call) -> str:
        """Return what *call* is named in error messages: its method and path."""
        return f"{call.method} {call.path}"

    def aliases(self) -> tuple[str, ...]:
        """Return the databases of this project that movements are written to."""
        return ()

    def joins(self, using: str) -> bool:
        """Return whether movements can be part of a transaction on *using*."""
        return False

    def carries_statements(self, using: str) -> bool:
        """Return whether a call's ``Statement`` on *using* is one with its movement.

        That is for ``reserve_credits``, ``commit_reservation`` and
        ``release_reservation``. The caller's row is written if, and only if, credits
        are moved; when the call returns, they are. The errors of the database, which
        is the caller's own, are raised as they are. A transport that makes calls anew
        on their way has to pass the statement on, or to say that it carries none.
        """
        return False

    def unit_of_work(self, using: str) -> AbstractContextManager[Any]:
        """Return a block in which calls and rows of *using* stand or fall together.

        A null context where the ledger does not share that database.
        """
        return nullcontext()

    def close(self) -> None:
        """Give back what the transport holds open."""


def string_to_sign(
    timestamp: str,
    method: str,
    target: str,
    host: str,
    idempotency_key: str,
    body: bytes,
) -> bytes:
    """Return what an HMAC key signs of a request.

    *timestamp* is in Unix seconds, *target* the path with its query as sent, *host*
    the ``Host`` header in lower case without a default port, *idempotency_key*
    empty where there is none, and *body* the final bytes. Raises ``ValueError``
    for a field with a line feed in it: two requests could be signed alike.
    """
    fields = (timestamp, method, target, host, idempotency_key)
    if any("\n" in field for field in fields):
        raise ValueError("A signed field must not contain a line feed.")
    return "\n".join(("v1", *fields, hashlib.sha256(body).hexdigest())).encode()


_VISIBLE = re.compile(r"[\x21-\x7e]+")
_TEXT = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")
_UNIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_amount(value: object, name: str = "amount", *, minimum: int = 1) -> int:
    """Return *value* if it is a number of credits, or raise ``ValueError``."""
    # bool is an int, and Django's integer fields take 1.5 for 1: neither is an
    # amount anybody meant.
    if type(value) is not int:
        raise ValueError(
            f"{name} must be an int, not {type(value).__name__} {shown(value)}. "
            "Credits are whole numbers."
        )
    if not minimum <= value <= MAX_AMOUNT:
        raise ValueError(
            f"{name} must be from {minimum} to 2**63 - 1, not {shown(value)}."
        )
    return value


def check_ttl(value: object, name: str = "ttl_seconds") -> int:
    """Return *value* if a hold can last that many seconds, or raise ``ValueError``."""
    if type(value) is not int or not 1 <= value <= MAX_TTL_SECONDS:
        raise ValueError(
            f"{name} must be a whole number of seconds from 1 to "
            f"{MAX_TTL_SECONDS}, not {shown(value)}."
        )
    return value


def check_key(
    value: object, name: str = "idempotency_key", *, length: int = MAX_KEY_LENGTH
) -> str:
    """Return *value* if it is an idempotency key, or raise ``ValueError``."""
    if (
        not isinstance(value, str)
        or len(value) > length
        or not _VISIBLE.fullmatch(value)
    ):
        raise ValueError(
            f"{name} must be 1 to {length} visible ASCII characters "
            f"without spaces, not {shown(value)}."
        )
    return value


def check_text(value: object, name: str, *, length: int = MAX_TEXT_LENGTH) -> str:
    """Return *value* if it is a reference or external id, or raise ``ValueError``."""
    if not isinstance(value, str) or len(value) > length or not _TEXT.fullmatch(value):
        raise ValueError(
            f"{name} must be 1 to {length} printable ASCII characters, with no "
            f"space at either end, not {shown(value)}."
        )
    return value


def check_unit(value: object, name: str = "unit") -> str:
    """Return *value* if it names a credit unit, or raise ``ValueError``."""
    if not isinstance(value, str) or not _UNIT.fullmatch(value):
        raise ValueError(
            f"{name} must be 1 to 64 letters, digits, '_', '.' or '-', and begin "
            f"with a letter or digit, not {shown(value)}."
        )
    return value


def check_identifier(value: object, name: str) -> str:
    """Return *value* if it can be an id in a path, or raise ``ValueError``."""
    if not isinstance(value, str) or not _IDENTIFIER.fullmatch(value):
        raise ValueError(
            f"{name} must be 1 to 64 letters, digits, '_' or '-', not {shown(value)}."
        )
    return value


def check_description(
    value: object, name: str = "description", *, length: int = MAX_DESCRIPTION_LENGTH
) -> str:
    """Return *value* if it is a description, or raise ``ValueError``."""
    if not isinstance(value, str) or len(value) > length:
        raise ValueError(
            f"{name} must be a text of at most {length} characters, not {shown(value)}."
        )
    # Half of a surrogate pair, which JSON can name, is no text to a database.
    if "\x00" in value or re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{name} must not contain NUL characters or lone surrogates.")
    return value


def shown(value: object) -> str:
    """Return *value* for an error's message: one printable line of a bounded length."""
    if isinstance(value, dict | list | tuple):
        # It may be too deep for repr().
        return "{...}" if isinstance(value, dict) else "[...]"
    if isinstance(value, int) and value.bit_length() > 128:
        # It may be too long for repr().
        return "a huge number"
    text = repr(value[:80] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def clean_text(value: object, length: int) -> str:
    """Return the first *length* characters of a text, each made printable.

    Control characters, line feeds, NUL, surrogates and marks that change the writing
    direction become spaces. Anything but a text becomes an empty one.
    """
    if not isinstance(value, str):
        return ""
    text = value[:length]
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else " " for char in text)


def check_api_key(value: object, name: str = "api_key") -> str:
    """Return an API key without the white space around it, or raise ``ValueError``.

    Secrets are mounted as files, and files end with a line feed. The message does not
    show the key.
    """
    if value is None or value == "":
        raise ValueError(
            f"{name}: an API key is needed to reach the ledger over HTTP: "
            'give MeterlyClient(api_key=...) or set METERLY["API_KEY"].'
        )
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a str, not {type(value).__name__}.")
    if not re.fullmatch(r"\s*[\x21-\x7e]+\s*", str(value)):
        raise ValueError(f"{name} must be visible ASCII characters without spaces.")
    return value.strip()


def check_base_url(
    value: object, name: str = "base_url", *, allow_insecure_http: bool = False
) -> str:
    """Return a ledger's base URL without the white space around it.

    Raises ``ValueError`` for anything but an http or https URL, for one with a user, a
    query or a fragment, and for plain http beyond loopback, unless
    *allow_insecure_http*.
    """
    like = "like 'https://ledger.example.com'"
    if not isinstance(value, str):
        raise ValueError(
            f"{name} must be a str, {like}, not {type(value).__name__} {shown(value)}."
        )
    url = str(value).strip()
    # Not shown: what stands before an @ may be a secret.
    this = "this one" if "@" in url else shown(url)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        # Its message would show the port, or a part of a password.
        raise ValueError(f"{name} must be a URL, {like}, not {this}.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{name} must be an http or https URL, {like}, not {this}.")
    if parts.username is not None or set(url) & {"?", "#"}:
        raise ValueError(f"{name} must not have a user, a query or a fragment.")
    # urlsplit() drops line feeds, and others read a backslash as a slash.
    if not url.isprintable() or "\\" in url or " " in parts.netloc or port == 0:
        raise ValueError(f"{name} must be a URL, {like}, not {this}.")
    private = parts.scheme == "https" or _is_loopback(parts.hostname)
    if not private and not allow_insecure_http:
        raise ValueError(
            f"{name} {this} would send the API key in the clear. Use https, or set "
            "allow_insecure_http (ALLOW_INSECURE_HTTP) on a trusted network."
        )
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
