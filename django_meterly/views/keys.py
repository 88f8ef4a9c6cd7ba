"""The idempotency key that a request brings along: by its header, or in a form."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from ..transports.base import MAX_CALLER_KEY_LENGTH, check_key

if TYPE_CHECKING:
    from django.http import HttpRequest

KEY_HEADER = "Idempotency-Key"
#: The name of the hidden field that ``{% meterly_form_key %}`` renders.
FORM_FIELD = "meterly_form_key"
#: What the journal puts before a client's key, so that no client can use up a key
#: that the project's own code is going to use for the same customer.
PREFIX = "client:"

# A string of RFC 9651: in it, only these two characters are escaped.
_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')


def requested_key(request: HttpRequest) -> str | None:
    """Return the journal's key for the one that *request* names, if it names one.

    The ``Idempotency-Key`` header (draft-ietf-httpapi-idempotency-key-header)
    goes before the form's field. Its value is a quoted string of structured
    fields, or the bare key: 1 to 200 visible ASCII characters. Anything else comes
    back as it is, for ``guard()`` to refuse.
    """
    # REST framework's request, seen through: what Django's has parsed is the point.
    request = getattr(request, "_request", request)
    key = request.headers.get(KEY_HEADER)
    if key is None:
        key = _form_key(request)
    elif key.startswith('"'):
        quoted = _QUOTED.fullmatch(key)
        # Not unquoted it stays one that cannot be a key.
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
        # Reading it would fix where the uploads go, which is the view's to say
        # (request.upload_handlers), and leave no body for it to read. Unless
        # somebody has read it before: the CSRF protection of the view does, though
        # not for a request of the test client.
        if not (
            hasattr(request, "_post") or getattr(request, "csrf_processing_done", False)
        ):
            return None
    elif request.content_type != "application/x-www-form-urlencoded":
        return None
    return request.POST.get(FORM_FIELD)
