"""The REST API's views. ``urls`` makes one for each path; ``service`` has all rules.

A view reads the request, finds the API key, calls ``service.perform`` and returns its
answer. It sets the headers of the contract, for example ``X-Request-Id``.
"""

from __future__ import annotations

import re
import uuid
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from django.db import connections, transaction
from django.http import HttpResponse
from rest_framework.exceptions import MethodNotAllowed, ParseError
from rest_framework.negotiation import DefaultContentNegotiation
from rest_framework.renderers import BaseRenderer, JSONRenderer
from rest_framework.response import Response
from rest_framework.views import APIView

from ...errors import MeterlyApiError
from ..authentication import Claim, KeyAuthentication, ScopePermission, target_of
from ..database import write_alias
from ..service import perform
from .exceptions import exception_handler, wrong_field
from .parsers import StrictJSONParser, hang_up_after, read_body
from .throttling import KeyThrottle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from django.http import HttpRequest
    from rest_framework.request import Request

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class _PlainJSONRenderer(JSONRenderer):
    compact, ensure_ascii, strict = True, False, True


class _AlwaysJSON(DefaultContentNegotiation):
    def select_renderer(
        self,
        request: Request,
        renderers: Iterable[BaseRenderer],
        format_suffix: str | None = None,
    ) -> tuple[BaseRenderer, str]:
        renderer = next(iter(renderers))
        return renderer, str(renderer.media_type)


class OperationView(APIView):
    """One path of the contract; *operations* maps its methods to their operations.

    The project's ``REST_FRAMEWORK`` settings do not apply here.
    """

    operations: Mapping[str, str] = {}
    is_let_in = False

    http_method_names = ["get", "post"]
    authentication_classes: tuple[Any, ...] = (KeyAuthentication,)
    content_negotiation_class = _AlwaysJSON
    parser_classes = (StrictJSONParser,)
    permission_classes: tuple[Any, ...] = (ScopePermission,)
    renderer_classes = (_PlainJSONRenderer,)
    throttle_classes: tuple[Any, ...] = (KeyThrottle,)
    versioning_class = None

    @classmethod
    def as_view(cls, **initkwargs: Any) -> Any:
        view = super().as_view(**initkwargs)
        # Each operation is one transaction, and the answer must follow its COMMIT. In
        # a transaction of ATOMIC_REQUESTS it would come before.
        for alias in connections:
            view = transaction.non_atomic_requests(using=alias)(view)
        return view

    def setup(self, request: HttpRequest, *args: Any, **kwargs: Any) -> None:
        super().setup(request, *args, **kwargs)
        given = request.headers.get("X-Request-Id", "")
        sane = _REQUEST_ID.fullmatch(given)
        self.request_id = given if sane else f"req_{uuid.uuid4().hex}"
        # In public views, too: a client may send its key there, and the claim removes
        # the header, so that error reports do not show it.
        request.meterly_claim = Claim(request)  # type: ignore[attr-defined]

    @property
    def allowed_methods(self) -> list[str]:
        return list(self.operations)

    def get_exception_handler(self) -> Callable[..., Response]:
        return exception_handler

    def finalize_response(
        self, request: Any, response: Any, *args: Any, **kwargs: Any
    ) -> Any:
        response = super().finalize_response(request, response, *args, **kwargs)
        response["X-Request-Id"] = self.request_id
        # Django's cache middleware respects "private" only.
        response["Cache-Control"] = "no-store, private"
        if not self.is_let_in:
            hang_up_after(response, request._request)
        return response

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        target = target_of(request._request)
        if target and not target.startswith("/"):
            # "POST http://other/v1/grants" names a host that is not the signed one.
            raise ParseError("The request target must be a path.")
        super().initial(request, *args, **kwargs)
        if request.method not in self.operations:
            raise MethodNotAllowed(str(request.method))
        self.is_let_in = True
        if request.method == "POST":
            read_body(request._request)

    def get(self, request: Request, **path: str) -> Response:
        query = request.query_params
        for name, values in query.lists():
            if len(values) > 1:
                raise wrong_field(name, "This field comes twice.")
        return self._perform(request, query.dict(), path)

    def post(self, request: Request, **path: str) -> Response:
        body: Any = request.data
        return self._perform(request, body, path)

    def _perform(
        self, request: Request, arguments: dict[str, Any], path: dict[str, str]
    ) -> Response:
        operation = self.operations[str(request.method)]
        for name in path:
            if name in arguments:
                raise wrong_field(name, "There is no such field.")
        key: Any = request.auth
        answer = perform(
            key.workspace,
            operation,
            {**arguments, **path},
            request.headers.get("Idempotency-Key"),
        )
        headers = {"Idempotency-Replayed": "true"} if answer.replayed else None
        return Response(answer.body, status=answer.status, headers=headers)


class UnknownPathView(OperationView):
    """Answers 404 where the contract has no path.

    The code is ``unknown_path``, not ``not_found``: a client with a wrong base URL must
    not think that the customer is missing.
    """

    schema = None

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        raise MeterlyApiError("There is no such path.", status=404, code="unknown_path")


class _PublicView(OperationView):
    """Answers a GET with or without a key."""

    authentication_classes = ()
    permission_classes = ()
    throttle_classes = ()


class HealthView(_PublicView):
    """Answers 200 while the database answers, and 503 otherwise."""

    operations = {"GET": "health"}

    def get(self, request: Request, **path: str) -> Response:
        with connections[write_alias()].cursor() as cursor:
            cursor.execute("SELECT 1")
        return Response({"status": "ok"})


class DocumentView(_PublicView):
    """Serves the OpenAPI document, which the tests compare with these views."""

    operations = {"GET": "openapi"}
    schema = None

    def get(self, request: Request, **path: str) -> Any:
        return HttpResponse(_document(), content_type="application/json")


@cache
def _document() -> bytes:
    return Path(__file__).with_name("openapi.json").read_bytes()
