"""The idempotency key that a request carries: in its header, or in a form."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from ..wire import MAX_CALLER_KEY_LENGTH, check_key

if TYPE_CHECKING:
    from django.http import HttpRequest

KEY_HEADER = "Idempotency-Key"
#: The name of the hidden field that ``{% meterly_form_key %}`` renders.
FORM_FIELD = "meterly_form_key"
#: The journal puts this before a client's key, so that clients cannot use up the keys
#: of the project's code for the same customer.
PREFIX = "client:"

# A string of RFC 9651: in it, only these two characters are escaped.
_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')


def requested_key(request: HttpRequest) -> str | None:
    """Return the journal's key for the key of *request*, or ``None`` without one.

    The ``Idempotency-Key`` header (draft-ietf-httpapi-idempotency-key-header) goes
    before the form's field. Its value is 1 to 200 visible ASCII characters, bare or as
    a quoted string of structured fields. For example, ``"order-1"`` and ``order-1``
    are both ``client:order-1``. An invalid value is returned unchanged, and the guard
    refuses it.
    """
    # From REST framework's request to Django's, because that has parsed the form.
    request = getattr(request, "_request", request)
    key = request.headers.get(KEY_HEADER)
    if key is None:
        key = _form_key(request)
    elif key.startswith('"'):
        quoted = _QUOTED.fullmatch(key)
        # A badly quoted value becomes an empty key, which the guard refuses.
        key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else ""
    if key is None:
        return None
    try:
        check_key(key, KEY_HEADER, length=MAX_CALLER_KEY_LENGTH)
    except ValueError:
        return key
    named = PREFIX + key
    if len(named) <= MAX_CALLER_KEY_LENGTH:
        return named
    return PREFIX + hashlib.sha256(key.encode()).hexdigest()


def _form_key(request: HttpRequest) -> str | None:
    if request.method != "POST":
        return None
    if request.content_type == "multipart/form-data":
        # Reading the form would decide where uploads go before the view can say so
        # by request.upload_handlers, and leave it no body to read. So it is only read
        # if somebody has read it before. CSRF protection does that, but not for
        # requests of the test client.
        if not (
            hasattr(request, "_post") or getattr(request, "csrf_processing_done", False)
        ):
            return None
    elif request.content_type != "application/x-www-form-urlencoded":
        return None
    return request.POST.get(FORM_FIELD)
