"""Read the body of a request, strictly and within its limit."""

from __future__ import annotations

import json
import socket
from functools import partial
from io import BytesIO
from typing import IO, TYPE_CHECKING, Any

from django.conf import settings
from rest_framework.exceptions import ParseError
from rest_framework.parsers import BaseParser

from ...errors import MeterlyInvalidRequestError
from ..conf import MAX_BODY_BYTES
from .exceptions import wrong_field

if TYPE_CHECKING:
    from collections.abc import Mapping

    from django.http import HttpRequest


class StrictJSONParser(BaseParser):
    """Reads one JSON object, and refuses whatever JSON readers read differently.

    For example, it refuses ``{"amount": 1, "amount": 1000}``, and text that is not
    UTF-8. NaN and the infinities are read: the check of the field refuses them, and its
    error names the field. ``read_body`` limits the length.
    """

    media_type = "application/json"

    def parse(
        self,
        stream: IO[Any],
        media_type: str | None = None,
        parser_context: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        try:
            data = json.loads(stream.read().decode(), object_pairs_hook=_object)
            # "\ud800" is valid JSON, but no text that can be stored or sent back.
            json.dumps(data, ensure_ascii=False).encode()
        except MeterlyInvalidRequestError:
            # It names the field.
            raise
        except (ValueError, RecursionError) as exc:
            raise ParseError(f"The body is not valid JSON: {exc}") from exc
        if not isinstance(data, dict):
            raise ParseError("The body is not a JSON object.")
        return data


def read_body(request: HttpRequest) -> None:
    """Read the body of *request*, at most 64 KiB, and keep it as ``request.body``.

    The bytes that arrive are counted, whatever ``Content-Length`` says. Raises
    ``ParseError`` for a longer body, and for one that was cut off: ``{}`` commits the
    whole hold, and the missing rest may have said ``"amount": 3``.
    """
    if hasattr(request, "meterly_body_read"):
        return
    stream, declared = request._stream, request.META.get("CONTENT_LENGTH")
    if "HTTP_TRANSFER_ENCODING" in request.META and not hasattr(request, "scope"):
        # Django takes such a body for empty. A server that ends the stream at the end
        # of the body says so.
        if not request.META.get("wsgi.input_terminated"):
            raise ParseError("The body needs a Content-Length.")
        stream, declared = request.META["wsgi.input"], None
    limit = min(MAX_BODY_BYTES, settings.DATA_UPLOAD_MAX_MEMORY_SIZE or MAX_BODY_BYTES)
    try:
        body = stream.read(limit + 1)
    except Exception as exc:
        # The client has left, or its chunks are malformed. Each server raises other
        # exceptions for that.
        raise ParseError("The body cannot be read.") from exc
    if len(body) > limit:
        raise ParseError(f"The body is longer than {limit} bytes.")
    if declared and declared.lstrip("0") != str(len(body)).lstrip("0"):
        raise ParseError("The body is not as long as its Content-Length says.")
    request.META["CONTENT_LENGTH"] = str(len(body))
    request._body, request._stream = body, BytesIO(body)
    request.meterly_body_read = True  # type: ignore[attr-defined]


def hang_up_after(response: Any, request: HttpRequest) -> None:
    """Make gunicorn end the connection if the body of *request* was not read.

    It would wait 2 or 5 seconds for the rest, in a worker or thread that other requests
    need. An application cannot prevent that by a header.
    """
    connection = request.META.get("gunicorn.socket")
    has_body = request.META.get("CONTENT_LENGTH") or (
        "HTTP_TRANSFER_ENCODING" in request.META
    )
    unread = has_body and not hasattr(request, "meterly_body_read")
    # Not a TLS socket, which would go on unencrypted.
    if unread and type(connection) is socket.socket:
        # After the answer was sent, and in both directions: gunicorn would take the
        # rest of the body, when it arrives late, for a new request.
        response._resource_closers.append(
            partial(connection.shutdown, socket.SHUT_RDWR)
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name, value in pairs:
        if name in data:
            shown = name.encode(errors="replace").decode()
            raise wrong_field(shown, "This field comes twice.")
        data[name] = value
    return data
