from __future__ import annotations

import json
from pathlib import Path

import pytest

from django_meterly.ledger.authentication import SCOPES
from django_meterly.wire import ROUTES

pytest.importorskip("drf_spectacular")

from drf_spectacular.validation import validate_schema

from tests import openapi


def test_the_document_is_the_one_the_code_makes():
    assert openapi.PATH.read_text("utf-8") == openapi.text(), (
        "Run: python -m tests.openapi"
    )


def test_the_document_is_valid_openapi():
    validate_schema(json.loads(openapi.PATH.read_text("utf-8")))


def test_the_document_is_served_to_anybody(client):
    response = client.get("/ledger/openapi.json")
    assert response.status_code == 200
    assert response["Content-Type"] == "application/json"
    assert response.json() == openapi.document()


def test_f56_every_operation_names_the_scope_it_needs():
    for methods in openapi.document()["paths"].values():
        for operation in methods.values():
            name = operation["operationId"]
            if name == "health":
                assert operation["security"] == []
                continue
            scope = SCOPES[name].value
            assert operation["security"] == [
                {"bearerKey": [scope]},
                {"hmacKey": [scope]},
            ]
            assert f'"{scope}"' in operation["description"]


def test_the_document_is_read_once(client, monkeypatch):
    served = client.get("/ledger/openapi.json").content
    monkeypatch.setattr(Path, "read_bytes", None)
    assert client.get("/ledger/openapi.json").content == served


def test_every_route_is_documented():
    documented = {
        operation["operationId"]: (method.upper(), path)
        for path, methods in openapi.document()["paths"].items()
        for method, operation in methods.items()
    }
    assert documented == {**ROUTES, "health": ("GET", "/health")}
