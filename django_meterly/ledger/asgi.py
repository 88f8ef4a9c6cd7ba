"""The ledger's limit on request bodies, for ASGI servers.

A WSGI server needs nothing: ``api.parsers.read_body`` limits what it reads.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

from .conf import MAX_BODY_BYTES


class BodyLimit:
    """Answer 400 to a body of more than 64 KiB, while it is received.

    Under ASGI Django stores the whole body, in memory or in a file, before it calls a
    view. This class counts the bytes that arrive, whatever ``Content-Length`` says.
    Other paths than *path*, the ledger's, are left alone. In ``asgi.py``::

        application = BodyLimit(get_asgi_application(), path="/ledger/")
    """

    def __init__(self, application: Any, *, path: str = "/") -> None:
        self.application = application
        self.path = path

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(self.path):
            await self.application(scope, receive, send)
            return
        received = 0

        async def counted() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                # Django drops a request whose client has left, and sends no answer.
                return {"type": "http.disconnect"}
            return message

        await self.application(scope, counted, send)
        if received > MAX_BODY_BYTES:
            await _refuse(send)


async def _refuse(send: Any) -> None:
    request_id = f"req_{uuid.uuid4().hex}"
    message = f"The body is longer than {MAX_BODY_BYTES} bytes."
    error = {"code": "invalid_request", "message": message}
    body = json.dumps({"error": error, "requestId": request_id}).encode()
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Cache-Control": "no-store, private",
        "X-Request-Id": request_id,
    }
    pairs = [(name.lower().encode(), headers[name].encode()) for name in headers]
    await send({"type": "http.response.start", "status": 400, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
