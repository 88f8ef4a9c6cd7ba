"""What error reports show of a request whose key was on its way to the database."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import async_to_sync
from django.db import InterfaceError, OperationalError, connection
from django.http import HttpRequest
from django.test import AsyncClient, Client
from django.utils.log import AdminEmailHandler
from django.views.debug import technical_500_response
from rest_framework.request import Request

from django_meterly.ledger import authentication
from django_meterly.ledger.api import views
from django_meterly.ledger.authentication import create_api_key
from tests.ledger.test_signature import sign

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.django_db

PATHS = {
    "look-up": "/ledger/v1/customers?externalId=a",
    "health": "/ledger/health",
    "call": "/ledger/v1/customers?externalId=a",
}
HEADERS = [
    "Bearer {key}",
    "bearer {key}",
    "Bearer  {key}",
    "Bearer {key} ",
    "Basic {key}",
    "Token {key}",
    "{key}",
    "METERLY-HMAC-SHA256 {key}",
    "METERLY-HMAC-SHA256 keyId={key}, timestamp=1, signature=0",
]


class Reports(AdminEmailHandler):
    """What Django would mail to the admins, and what other reporters are given."""

    def __init__(self) -> None:
        super().__init__(include_html=True)
        self.setLevel("ERROR")
        self.records: list[logging.LogRecord] = []
        self.mails: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        super().emit(record)

    def send_mail(self, subject: str, message: str, *args: Any, **kwargs: Any) -> None:
        self.mails += [subject, message, kwargs["html_message"]]


@pytest.fixture
def reports() -> Iterator[Reports]:
    handler = Reports()
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)


def shown(value: Any, depth: int = 0) -> Iterator[str]:
    """Yield what a thorough reporter shows of a local variable."""
    yield repr(value)
    if depth > 5:
        return
    if isinstance(value, dict):
        for each in value.values():
            yield from shown(each, depth + 1)
    elif isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from shown(each, depth + 1)
    elif isinstance(value, Request):
        yield from shown(value._request, depth + 1)
    elif isinstance(value, HttpRequest):
        yield from shown(value.META, depth + 1)
        yield from shown(dict(value.headers), depth + 1)
        yield from shown(getattr(value, "scope", {}), depth + 1)


def everything(exc: BaseException | None) -> Iterator[str]:
    while exc is not None:
        yield str(exc)
        traceback = exc.__traceback__
        while traceback is not None:
            yield from shown(traceback.tb_frame.f_locals)
            traceback = traceback.tb_next
        exc = exc.__cause__ or exc.__context__


def request_of(exc: BaseException) -> Any:
    traceback: Any = exc.__traceback__
    while traceback is not None:
        request = traceback.tb_frame.f_locals.get("request")
        if isinstance(request, Request):
            return request._request
        traceback = traceback.tb_next
    raise AssertionError("There is no request in the frames.")


def send(kind: str, path: str, authorization: str) -> int:
    headers = {"Authorization": authorization}
    if kind == "wsgi":
        client = Client(raise_request_exception=False)
        return client.get(path, headers=headers).status_code
    aclient = AsyncClient(raise_request_exception=False)
    return async_to_sync(aclient.get)(path, headers=headers).status_code


def fail(place: str, monkeypatch: Any, error: type[Exception]) -> Any:
    """Let the database be down when a request is at *place*."""

    def down(*args: Any) -> None:
        raise error("the database is down")

    if place == "call":
        monkeypatch.setattr(views, "perform", down)
        return connection.execute_wrapper(lambda execute, *args: execute(*args))
    return connection.execute_wrapper(down)


@pytest.mark.parametrize("server", ["wsgi", "asgi"])
@pytest.mark.parametrize("error", [OperationalError, InterfaceError])
@pytest.mark.parametrize("place", PATHS)
@pytest.mark.parametrize("kind", ["bearer", "hmac"])
def test_f54_no_report_shows_a_live_key(
    workspace, reports, monkeypatch, server, error, place, kind
):
    key = create_api_key(workspace, "x", hmac=kind == "hmac")[1]
    path = PATHS[place]
    if kind == "hmac":
        authorization = sign(key, "GET", path)
        secrets = [authorization.rpartition("=")[2], key.split("_", 3)[3]]
    else:
        authorization = f"Bearer {key}"
        secrets = [key.removeprefix("mk_live_")]
    with fail(place, monkeypatch, error):
        assert send(server, path, authorization) == 503
    errors = [record for record in reports.records if record.exc_info]
    assert errors
    texts = [*reports.mails]
    assert any("the database is down" in text for text in texts)
    for record in reports.records:
        texts += shown(record.__dict__)
    for record in errors:
        exc: Any = record.exc_info[1]
        page = technical_500_response(
            request_of(exc), type(exc), exc, exc.__traceback__
        )
        texts += [page.content.decode(), *everything(exc)]
    for secret in secrets:
        assert not [text for text in texts if secret in text]


@pytest.mark.parametrize("server", ["wsgi", "asgi"])
@pytest.mark.parametrize("header", HEADERS)
def test_f54_nor_one_that_was_sent_in_another_way(
    workspace, reports, monkeypatch, server, header
):
    key = create_api_key(workspace, "x")[1]
    secret = key.removeprefix("mk_live_")
    # Where no key is looked up the database is not asked, and so not missed.
    with fail("health", monkeypatch, OperationalError):
        send(server, PATHS["look-up"], header.format(key=key))
        assert send(server, PATHS["health"], header.format(key=key)) == 503
    texts = [*reports.mails]
    for record in reports.records:
        texts += shown(record.__dict__)
        texts += everything(record.exc_info[1] if record.exc_info else None)
    assert not [text for text in texts if secret in text]


@pytest.mark.parametrize("kind", ["bearer", "hmac"])
def test_f54_a_key_that_cannot_be_saved_is_not_reported(workspace, monkeypatch, kind):
    made = []

    def watched(secret: str) -> str:
        made.append(secret)
        return secret

    token, derive = authentication.secrets.token_urlsafe, authentication._hmac_secret
    monkeypatch.setattr(
        authentication.secrets, "token_urlsafe", lambda size: watched(token(size))
    )
    monkeypatch.setattr(
        authentication, "_hmac_secret", lambda *args: watched(derive(*args))
    )

    def down(execute: Any, sql: str, *args: Any) -> Any:
        if "apikeyevent" in sql:
            raise OperationalError("the database is down")
        return execute(sql, *args)

    with connection.execute_wrapper(down), pytest.raises(OperationalError) as raised:
        create_api_key(workspace, "x", hmac=kind == "hmac")
    # Without this test's own frame, which knows what was made.
    raised.value.__traceback__ = raised.value.__traceback__.tb_next
    texts = list(everything(raised.value))
    assert any("'workspace': <Workspace: acme>" in text for text in texts)
    (secret,) = made
    assert not [text for text in texts if secret in text]
