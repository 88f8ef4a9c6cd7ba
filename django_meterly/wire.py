"""The limits of the wire contract, and the checks that keep them.

Both ends of the seam use them: the client before it sends a call, the ledger before
it moves credits.
"""

from __future__ import annotations

import hashlib
import re
from ipaddress import ip_address
from urllib.parse import urlsplit

MAX_AMOUNT = 2**63 - 1
MAX_KEY_LENGTH = 255
#: For a key that the caller of a guard names, because longer keys are derived from it.
MAX_CALLER_KEY_LENGTH = 200
MAX_TEXT_LENGTH = 255
MAX_DESCRIPTION_LENGTH = 1000
MAX_TTL_SECONDS = 86400

# operation -> (method, path). The path takes its parameters from the arguments; the
# other arguments are the JSON body of a POST or the query of a GET.
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


#: Calls that name no object which could be missing. No ledger answers them with 404.
NEVER_MISSING = ("create_customer", "find_customer", "grant_credits")


def string_to_sign(
    timestamp: str,
    method: str,
    target: str,
    host: str,
    idempotency_key: str,
    body: bytes,
) -> bytes:
    """Return the bytes of a request that an HMAC key signs.

    *timestamp* is in Unix seconds. *target* is the path with its query as sent. *host*
    is the ``Host`` header in lower case without a default port. *idempotency_key* is
    empty for a GET. *body* has the final bytes. Raises ``ValueError`` for a field with
    a line feed, because two requests could have the same signature.
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
    # bool is an int, and Django's integer fields take 1.5 for 1. Nobody means either
    # as an amount.
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
    # JSON can name half of a surrogate pair, which databases refuse.
    if "\x00" in value or re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{name} must not contain NUL characters or lone surrogates.")
    return value


def shown(value: object) -> str:
    """Return *value* for an error's message: one printable line of bounded length.

    For example, ``shown("a" * 1000)`` has 80 characters.
    """
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
    # A URL with an @ is not shown, because a secret may precede it.
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
