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
    """Reads one JSON object, and refuses what readers disagree about.

    That is: a name that comes twice, and text that is not UTF-8. NaN and the
    infinities are read, as what no field takes, so that the refusal can name the
    field. How long a body may be is ``read_body``'s to say.
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
    """Read the body of *request*, at most 64 KiB of it, for all who want it later.

    What counts are the bytes that come, whatever ``Content-Length`` says. Raises
    ``ParseError`` for a longer body, and for one that is cut off: the rest of it
    might have said that a part of the credits is to be charged, and not all.
    """
    if hasattr(request, "meterly_body_read"):
        return
    stream, declared = request._stream, request.META.get("CONTENT_LENGTH")
    if "HTTP_TRANSFER_ENCODING" in request.META and not hasattr(request, "scope"):
        # Django takes such a body for empty. A server that ends it says so.
        if not request.META.get("wsgi.input_terminated"):
            raise ParseError("The body needs a Content-Length.")
        stream, declared = request.META["wsgi.input"], None
    limit = min(MAX_BODY_BYTES, settings.DATA_UPLOAD_MAX_MEMORY_SIZE or MAX_BODY_BYTES)
    try:
        body = stream.read(limit + 1)
    except Exception as exc:
        # The client has left, or its chunks are malformed: each server has its own
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
    """Let gunicorn end the connection if nobody has read the body of *request*.

    It would wait for the rest, 2 seconds or 5, in a worker or a thread that others
    need; an application has no header to say that it shall not.
    """
    connection = request.META.get("gunicorn.socket")
    has_body = request.META.get("CONTENT_LENGTH") or (
        "HTTP_TRANSFER_ENCODING" in request.META
    )
    unread = has_body and not hasattr(request, "meterly_body_read")
    # Not a TLS socket, which would go on in clear.
    if unread and type(connection) is socket.socket:
        # When the answer is sent. Both ways: gunicorn takes the end of what it reads
        # for the end of the body, and the rest that comes late for a new request.
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
